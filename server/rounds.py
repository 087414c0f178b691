"""Run the rounds of one run on the server.

A round asks the sites to train, aggregates, evaluates on held-back bags, and keeps a checkpoint. ``Rounds``
holds what changes from round to round (the model, the best model, the server optimiser and the state that a
checkpoint keeps) and nothing that cannot be restored from a checkpoint.
"""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flwr.app import RecordDict
from flwr.serverapp import Grid

from common.config import RunConfig
from common.config_tables import Strategy
from common.model.lhfglp import LHFGLP
from common.model.model_file import all_arrays, load_arrays, trainable_arrays
from common.records import FloatArray, MessageError, ModelUpdate, PrivacyStatement, SiteError
from common.run_records import (
    BagsEvaluated,
    Cause,
    DeclaredLoss,
    LedgerLost,
    RoundDone,
    RoundSkipped,
    Stated,
    StoppedEarly,
    UpdateTaken,
)
from common.wire import from_records, to_records
from server import checkpoint
from server.acceptance import cause_of, fault_of, is_replay, read_update, usable_loss
from server.aggregation import (
    Aggregator,
    Arrays,
    ServerOptimiser,
    StreamingMean,
    fedpals_weights,
    training_bags,
)
from server.attendance import Attendance, QuorumMissed, Turn
from server.checkpoint import ServerState
from server.enrolment import ATTEMPTS, is_answer
from server.evaluation import check_figures, noised_bag_figures, pooled_bag_figures, selection_score
from server.exchange import ask
from server.run_folder import RunFolder
from server.secure_aggregation import Session, SessionFailed, UselessSum
from server.statements import StatementBook

log = logging.getLogger("fedbags.server")

TRAIN, EVALUATE_BAGS, EVALUATE_TEST = "train", "evaluate.bags", "evaluate.test"
SERVER = "server"


class Rounds:
    """Run one run on the server, from its first round or a checkpoint to the selected model."""

    def __init__(
        self,
        grid: Grid,
        config: RunConfig,
        folder: RunFolder,
        attendance: Attendance,
        model: LHFGLP,
        state: ServerState,
    ) -> None:
        self.grid, self.config, self.folder = grid, config, folder
        self.attendance, self.roster = attendance, attendance.roster
        self.model = model
        self.state = state
        self.optimiser = ServerOptimiser(config.federation)
        self.best: dict[str, FloatArray] = dict(trainable_arrays(model))
        kept = config.federation.statements
        self.statements = StatementBook(
            Path(kept) if kept else None, state.statements, folder.path.name, state.statement_keys
        )
        self.used_up: dict[str, tuple[int, int]] = {}
        """Node and round of every site that left because of its privacy budget."""
        self.taken: set[str] = set()
        """Sites that have done their part of this round before (``SiteError.ROUND_TAKEN``)."""
        self.skipped = 0
        """Rounds in a row, up to now, that were skipped for it."""

    def restore(self, groups: dict[str, dict[str, Any]]) -> None:
        """Put the arrays of a checkpoint back."""
        load_arrays(self.model, groups["model"])
        self.best = groups["best"]
        self.optimiser.load_state(groups["optimiser"])

    def run(self) -> None:
        """Run every round that is left, with a checkpoint after each."""
        while self.state.round < self.config.rounds:
            started = time.monotonic()
            number = self.state.round + 1
            self.taken.clear()
            try:
                self._train(number)
            except UselessSum as error:
                if not self._may_skip(number):
                    raise
                self._skip(number, str(error))
            except QuorumMissed as error:
                # Sites that have done their part of this round would answer the same again, so only the
                # next round can go on.
                if self.taken and self._may_skip(number):
                    self._skip(number, str(error))
                elif self._ends_early(number):
                    return
                else:
                    raise
            if self.config.evaluation.is_due(number, self.config.rounds):
                self._evaluate_bags(number)
            self.state.round = number
            self.state.seconds += time.monotonic() - started
            checkpoint.save(
                self.folder.checkpoints,
                self.state,
                trainable_arrays(self.model),
                self.best,
                self.optimiser.state(),
            )

    def _may_skip(self, number: int) -> bool:
        """Return True if this round may be skipped.

        It may not after too many skipped rounds in a row, and not where no round would be trained at all.
        """
        return self.skipped < ATTEMPTS and not self.skipped + 1 == number == self.config.rounds

    def _skip(self, number: int, reason: str) -> None:
        """Leave the model as it is in this round, and go on with the next."""
        # A site unmasks one sum of a round and never a second. Where it did, and the sum was lost before
        # the checkpoint or is of no use, this round cannot be had again, and the next one can.
        self.skipped += 1
        self.folder.record(RoundSkipped(round=number, sites=sorted(self.taken), reason=reason))
        log.warning("round %(round)d skipped: %(reason)s", {"round": number, "reason": reason})

    def _ends_early(self, number: int) -> bool:
        """End the run early and return True if used-up privacy budgets keep it below its quorum.

        Without a complete round there is no model; then the result is False, and the run has failed.
        """
        # Budgets do not come back, so there is nothing to wait for, and the model of the last complete
        # round is as good as it was.
        quorum, left = self.config.attendance.quorum, len(self.roster.nodes)
        if not self.state.round or not self.used_up or left >= quorum:
            return False
        names = ", ".join(sorted(self.used_up))
        self.state.stopped_early = (
            f"the privacy budget of {names} does not allow round {number}; {left} site(s) are left, the "
            f"quorum is {quorum}"
        )
        self.folder.record(StoppedEarly(round=self.state.round, reason=self.state.stopped_early))
        log.warning("stopped early: %(reason)s", {"reason": self.state.stopped_early})
        if self.state.best_score is None:
            self.best, self.state.best_round = dict(trainable_arrays(self.model)), self.state.round
        # The sites of the last complete round test its model: that costs no budget.
        last = {site: node for site, (node, round) in self.used_up.items() if round >= self.state.round}
        self.roster.nodes.update(last)
        return True

    def _train(self, number: int) -> None:
        """Collect the sites' updates of one round, singly or as one masked sum, and make the next model."""
        reference = trainable_arrays(self.model)
        collect = self._collect_masked if self.config.secure_aggregation.enabled else self._collect
        collected, losses = collect(number, reference)
        load_arrays(self.model, self.optimiser.step(reference, collected, number, self.config.rounds))
        self.skipped = 0
        mean_loss = sum(losses.values()) / len(losses) if losses else None
        self.folder.record(RoundDone(round=number, updates=collected.count, loss=mean_loss))
        log.info("round %d: %d updates, mean loss %s", number, collected.count, mean_loss)

    def _collect(self, number: int, reference: Arrays) -> tuple[Aggregator, dict[str, float]]:
        """Ask the sites, and those that are missing again, until there are enough good updates."""
        collected = self.optimiser.aggregator()
        losses: dict[str, float] = {}
        turn = Turn(self.attendance, number)
        sent = from_records(self._request(number), ModelUpdate).arrays  # a 16-bit transport rounds it
        # Updates that are in stay in while the round waits: sites have spent budget on them.
        while collected.count < self.config.federation.quorum:
            sites = turn.sites()
            weights = self._weights()
            for site, update in self._ask(TRAIN, number, sites, turn):
                bags = self.roster.releases[site].bags
                fault = fault_of(update, reference, self.config.federation, bags)
                # An update of an earlier round, sent again, would move the model twice for one training.
                if not fault and is_replay(update, sent, self.state.digests):
                    fault = "the very same arrays as in an earlier round (replayed)"
                if fault:
                    self._left_out(site, TRAIN, Cause.UNUSABLE, fault, turn)
                    continue
                trained = update.metrics["num-bags"]
                assert isinstance(trained, int)  # fault_of checked it
                collected.add(update, weights.get(site, 0.0) if weights else float(trained))
                turn.done.add(site)
                loss = usable_loss(update.metrics.get("loss"))
                if loss is not None:
                    losses[site] = loss
                self.folder.record(UpdateTaken(round=number, site=site, bags=trained, loss=loss))
        return collected, losses

    def _collect_masked(self, number: int, reference: Arrays) -> tuple[Aggregator, dict[str, float]]:
        """Collect the mean of many sites' updates by secure aggregation.

        A session that fails is tried anew.
        """
        turn = Turn(self.attendance, number)
        while True:
            sites = turn.sites()
            session = Session(
                exchange=lambda kind, requests: self._exchange(kind, number, requests, turn),
                report=lambda site, kind, reason: self._left_out(site, kind, Cause.UNUSABLE, reason, turn),
                spent=self._note_statement,
                config=self.config.secure_aggregation,
                round=number,
                weights=self._weights() or self._bags(),
                quorum=self.config.attendance.quorum,
            )
            try:
                mean = session.run(sites, self._request(number), reference)
                break
            except SessionFailed as error:
                for site in sites:
                    turn.failed(site, str(error), final=False)
                log.warning("round %(round)d: %(reason)s", {"round": number, "reason": str(error)})
        if fault := fault_of(mean.update, reference, self.config.federation):
            # The sites have unmasked the sum already, and would not unmask another one of this round.
            raise UselessSum(number, f"the mean of the masked updates: {fault}")
        collected = StreamingMean()
        collected.add(mean.update, mean.weight)
        collected.count = len(mean.metrics)
        losses = {}
        for site, metrics in mean.metrics.items():
            # The update is in the sum by now, whatever else the site says of itself.
            bags, loss = metrics.get("num-bags", self._bags()[site]), usable_loss(metrics.get("loss"))
            if not 0 < bags <= self.roster.releases[site].bags:
                bags = self._bags()[site]
            if loss is not None:
                losses[site] = loss
            self.folder.record(UpdateTaken(round=number, site=site, bags=bags, loss=loss))
        return collected, losses

    def _evaluate_bags(self, number: int) -> None:
        private, scale = self.config.dp.epsilon > 0, self.config.dp.metrics_scale
        # Held-back bags are private data: a private run does not ask for them, or for noised sums only.
        asks = self.config.train.held_back > 0 and (scale > 0 or not private)
        updates = list(self._evaluations(EVALUATE_BAGS, number).values()) if asks else []
        pooled = noised_bag_figures if private else pooled_bag_figures
        figures = pooled(updates, self.model.hierarchy)
        if figures is None:
            # Without held-back bags there is nothing to select by: the newest model is kept.
            self.best, self.state.best_round = dict(trainable_arrays(self.model)), number
            return
        score = selection_score(figures)
        self.folder.record(BagsEvaluated(round=number, levels=figures, score=score))
        if self.state.best_score is None or score < self.state.best_score:
            self.best = dict(trainable_arrays(self.model))
            self.state.best_score, self.state.best_round, self.state.bags = score, number, figures

    def test_updates(self) -> dict[str, ModelUpdate]:
        """Return the selected model's confusion counts on each site's labelled images, by site."""
        return self._evaluations(EVALUATE_TEST, self.state.round)

    def _evaluations(self, kind: str, number: int) -> dict[str, ModelUpdate]:
        updates = {}
        for site, update in self._ask(kind, number, self.roster.names()):
            try:
                check_figures(update, self.model.hierarchy, self.roster.releases[site].bags)
            except MessageError as error:
                self._left_out(site, kind, cause_of(error), str(error), None)
                continue
            updates[site] = update
        return updates

    def _ask(
        self, kind: str, number: int, sites: Sequence[str], turn: Turn | None = None
    ) -> Iterator[tuple[str, ModelUpdate]]:
        """Send the model to the sites and yield readable replies, in the order of the site names."""
        requests = dict.fromkeys(sites, self._request(number))
        stated = kind == TRAIN or (kind == EVALUATE_BAGS and self.config.dp.epsilon > 0)
        for site, content in self._exchange(kind, number, requests, turn):
            try:
                update, statement = read_update(content, site, number, private=stated)
                if statement is not None:
                    self._note_statement(statement)  # the budget is spent, whatever becomes of the update
            except MessageError as error:
                self._left_out(site, kind, cause_of(error), str(error), turn)
                continue
            yield site, update

    def _exchange(
        self, kind: str, number: int, requests: Mapping[str, RecordDict], turn: Turn | None
    ) -> Iterator[tuple[str, RecordDict]]:
        """Send each site its request and yield the replies without errors, in the order of ``requests``."""
        by_node = {self.roster.nodes[site]: site for site in requests if site in self.roster.nodes}
        asked = {node: requests[site] for node, site in by_node.items()}
        if self.config.dp.epsilon:
            # What is known now must be in every answer; what another run learns meanwhile need not be.
            self.statements.asking({site: self.roster.keys[site] for site in by_node.values()})
        deadline, note = self.config.federation.deadline, self.folder.record
        for reply in ask(self.grid, asked, kind, round=number, deadline=deadline, note=note):
            site = by_node[reply.node]
            if reply.content is not None:
                yield site, reply.content
                continue
            self._left_out(site, kind, reply.cause, reply.failure, turn, final=is_answer(reply.code))
            if reply.code == SiteError.ROUND_TAKEN:
                self.taken.add(site)
            if reply.code == SiteError.BUDGET:
                self.used_up[site] = (reply.node, number)
                # A used-up budget is used up in every later round too.
                self.roster.leave(site, reply.failure)

    def _request(self, number: int) -> RecordDict:
        """Return the request that holds the model, the same for every site."""
        update = ModelUpdate(sender=SERVER, round=number, arrays=all_arrays(self.model))
        return to_records(update, transport=self.config.federation.transport)

    def _left_out(
        self, site: str, kind: str, cause: Cause, reason: str, turn: Turn | None, *, final: bool = True
    ) -> None:
        reason = self.attendance.report(site, kind, cause, reason)
        if turn is not None:
            turn.failed(site, reason, final=final)

    def _note_statement(self, statement: PrivacyStatement) -> None:
        """Write down what a site has spent.

        Raises:
            MessageError: it leaves out what the site stated before.
        """
        key = self.roster.keys[statement.site]
        before = self.statements.take(statement, key)
        self.state.statements[statement.site] = self.statements.last(statement.site, key) or statement
        self.state.statement_keys[statement.site] = key
        figures = statement.model_dump(include={"site", "epsilon", "delta", "budget_left"})
        self.folder.record(Stated(round=statement.round, **figures))
        if before is not None:
            loss = DeclaredLoss(
                round=statement.round, site=statement.site, epsilon=before.epsilon, delta=before.delta
            )
            self.state.losses.append(loss)
            self.folder.record(LedgerLost(**loss.model_dump()))
            log.warning("round %(round)d: %(site)s declares that its ledger lost rows", loss.model_dump())

    def _bags(self) -> dict[str, float]:
        """Return the training bags of every site, from its release."""
        held_back = self.config.train.held_back
        releases = self.roster.releases
        return {site: float(training_bags(release.bags, held_back)) for site, release in releases.items()}

    def _weights(self) -> dict[str, float]:
        """Return the site weights of FedPALS, or nothing where bag counts are the weights."""
        federation = self.config.federation
        if federation.strategy is not Strategy.FEDPALS:
            return {}
        return fedpals_weights(self.roster.releases, federation.pals_target, federation.pals_regularisation)
