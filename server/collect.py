"""Collect the sites' updates and figures of one round, whichever way they come.

Single updates are checked one by one; masked ones come as one sum by secure aggregation. Sites that are
missing are asked again until the quorum is there. What a site has spent is written down here, whatever
becomes of its update. The module does not decide what happens after a round (rounds.py).
"""

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

from flwr.app import RecordDict

from common.config import RunConfig
from common.config_tables import Strategy
from common.hierarchy import Hierarchy
from common.model.classifier import HierarchicalClassifier
from common.model.model_file import trainable_arrays
from common.records import MessageError, ModelUpdate, PrivacyStatement, SiteError
from common.run_records import Cause, DeclaredLoss, LedgerLost, LeftOut, Stated, UpdateTaken
from common.wire import from_records
from server.aggregation import Aggregator, Arrays, fedpals_weights, training_bags
from server.enrolment import Quorum, RoundCohort, is_answer
from server.evaluation import check_figures
from server.exchange import Phase, ask, cause_of, fault_of, is_replay, read_update, usable_loss
from server.secure_aggregation import Session, SessionFailed, UselessSum
from server.shared_step import SharedStep
from server.statements import StatementStore

log = logging.getLogger("fedbags.server")

_TRAIN, EVALUATE_BAGS, EVALUATE_TEST = "train", "evaluate.bags", "evaluate.test"


class Collector:
    """Ask the sites of a run, and take in what they answer."""

    def __init__(self, config: RunConfig, quorum: Quorum) -> None:
        self.config, self._quorum = config, quorum
        self.grid, self.folder, self.state, self.roster = (
            quorum.grid, quorum.folder, quorum.state, quorum.roster
        )  # fmt: skip
        kept = config.federation.statements
        known, keys = self.state.statements, self.state.statement_keys
        self._statements = StatementStore(Path(kept) if kept else None, known, self.folder.path.name, keys)
        self.used_up: dict[str, tuple[int, int]] = {}
        """Node and round of every site that left because of its privacy budget."""
        self.taken: set[str] = set()
        """Sites that have done their part of this round before (``SiteError.ROUND_TAKEN``)."""
        self.named = False
        """Whether a site was expelled in this round."""

    def updates(
        self, number: int, model: HierarchicalClassifier, request: RecordDict, collected: Aggregator
    ) -> dict[str, float]:
        """Collect the good updates of one round, singly or as one masked sum.

        Args:
            number: the round.
            model: what is trained.
            request: what holds it, the same for every site.
            collected: takes the updates.

        Returns:
            The training losses that the sites' policies let out, by site.

        Raises:
            QuorumMissed: too few sites gave one.
            UselessSum: the masked sum is not one of updates.
        """
        self.taken.clear()
        self.named = False
        reference = trainable_arrays(model)
        if not self.config.secure_aggregation.enabled:
            return self._single(number, request, reference, collected)
        shared = None
        if self.config.shares > 1:
            shared = SharedStep.of(self.config, number, self._bags(), model)
        return self._masked(number, request, reference, collected, shared)

    def _single(
        self, number: int, model: RecordDict, reference: Arrays, collected: Aggregator
    ) -> dict[str, float]:
        losses: dict[str, float] = {}
        cohort = RoundCohort(self._quorum, number)
        sent = from_records(model, ModelUpdate).arrays  # a 16-bit transport rounds it
        # Updates that are in stay in while the round waits: sites have spent budget on them.
        while collected.count < self.config.federation.quorum:
            sites = cohort.sites()
            weights = self._weights()
            for site, update in self._ask(_TRAIN, number, dict.fromkeys(sites, model), cohort):
                bags = self.roster.releases[site].bags
                fault = fault_of(update, reference, self.config.federation, bags)
                # An update of an earlier round, sent again, would move the model twice for one training.
                if not fault and is_replay(update, sent, self.state.digests):
                    fault = "the very same arrays as in an earlier round (replayed)"
                if fault:
                    self._left_out(_unusable(site, _TRAIN, fault), cohort)
                    continue
                trained = update.metrics["num-bags"]
                assert isinstance(trained, int)  # fault_of checked it
                collected.add(update, weights.get(site, 0.0) if weights else float(trained))
                cohort.done.add(site)
                loss = usable_loss(update.metrics.get("loss"))
                if loss is not None:
                    losses[site] = loss
                self.folder.record(UpdateTaken(round=number, site=site, bags=trained, loss=loss))
        return losses

    def _masked(
        self,
        number: int,
        model: RecordDict,
        reference: Arrays,
        collected: Aggregator,
        shared: SharedStep | None,
    ) -> dict[str, float]:
        cohort = RoundCohort(self._quorum, number)
        while True:
            sites = cohort.sites()
            session = Session(
                exchange=lambda kind, requests: self._exchange(kind, number, requests, cohort),
                report=lambda site, kind, reason: self._left_out(_unusable(site, kind, reason), cohort),
                expel=lambda site, kind, reason: self._expel(site, kind, reason, cohort),
                spent=self._note_statement,
                config=self.config.secure_aggregation,
                round=number,
                weights=self._weights() or self._bags(),
                quorum=self.config.attendance.quorum,
                shared=shared,
            )
            try:
                mean = session.run(sites, model, reference)
                break
            except SessionFailed as error:
                for site in sites:
                    cohort.failed(site, str(error), final=False)
                log.warning("round %(round)d: %(reason)s", {"round": number, "reason": str(error)})
        if fault := fault_of(mean.update, reference, self.config.federation):
            # The sites have unmasked the sum already, and would not unmask another one of this round.
            raise UselessSum(number, f"the mean of the masked updates: {fault}")
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
        return losses

    def evaluations(
        self, kind: str, number: int, model: RecordDict, hierarchy: Hierarchy
    ) -> dict[str, ModelUpdate]:
        """Return the figures of the model that each site sends, by site, as far as they can be right.

        Args:
            kind: ``EVALUATE_BAGS`` or ``EVALUATE_TEST``.
            number: the round.
            model: the request, the same for every site.
            hierarchy: the federation's.
        """
        updates = {}
        for site, update in self._ask(kind, number, dict.fromkeys(self.roster.names(), model), None):
            try:
                check_figures(update, hierarchy, self.roster.releases[site].bags)
            except MessageError as error:
                self._left_out(_unusable(site, kind, error), None)
                continue
            updates[site] = update
        return updates

    def _ask(
        self, kind: str, number: int, requests: Mapping[str, RecordDict], cohort: RoundCohort | None
    ) -> Iterator[tuple[str, ModelUpdate]]:
        """Send the model to the sites and yield readable replies, in the order of ``requests``."""
        stated = kind == _TRAIN or (kind == EVALUATE_BAGS and self.config.dp.epsilon > 0)
        for site, content in self._exchange(kind, number, requests, cohort):
            try:
                update, statement = read_update(content, site, number, private=stated)
                if statement is not None:
                    self._note_statement(statement)  # the budget is spent, whatever becomes of the update
            except MessageError as error:
                self._left_out(_unusable(site, kind, error), cohort)
                continue
            yield site, update

    def _exchange(
        self, kind: str, number: int, requests: Mapping[str, RecordDict], cohort: RoundCohort | None
    ) -> Iterator[tuple[str, RecordDict]]:
        """Send each site its request and yield the replies without errors, in the order of ``requests``."""
        by_node = {self.roster.nodes[site]: site for site in requests if site in self.roster.nodes}
        asked = {node: requests[site] for node, site in by_node.items()}
        if self.config.dp.epsilon:
            # What is known now must be in every answer; what another run learns meanwhile need not be.
            self._statements.asking({site: self.roster.keys[site] for site in by_node.values()})
        phase = Phase(kind, number, self.config.federation.deadline)
        for reply in ask(self.grid, asked, phase, self.folder.record):
            site = by_node[reply.node]
            if reply.content is not None:
                yield site, reply.content
                continue
            left_out = LeftOut(site=site, phase=kind, cause=reply.cause, reason=reply.failure)
            self._left_out(left_out, cohort, final=is_answer(reply.code))
            if reply.code == SiteError.ROUND_TAKEN:
                self.taken.add(site)
            if reply.code == SiteError.BUDGET:
                self.used_up[site] = (reply.node, number)
                # A used-up budget is used up in every later round too.
                self.roster.leave(site, reply.failure)

    def _left_out(self, left_out: LeftOut, cohort: RoundCohort | None, *, final: bool = True) -> None:
        self._quorum.report(left_out)
        if cohort is not None:
            cohort.failed(left_out.site, left_out.reason, final=final)

    def _expel(self, site: str, kind: str, reason: str, cohort: RoundCohort) -> None:
        """Leave out a site that cost the round its sum, in this round and in every later one."""
        self._left_out(_unusable(site, kind, f"{reason} (out for the rest of the run)"), cohort)
        self.roster.expel(site, reason)
        self.named = True

    def _note_statement(self, statement: PrivacyStatement) -> None:
        """Write down what a site has spent.

        Raises:
            MessageError: it leaves out what the site stated before.
        """
        key = self.roster.keys[statement.site]
        before = self._statements.take(statement, key)
        self.state.statements[statement.site] = self._statements.last(statement.site, key) or statement
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
        if federation.strategy != Strategy.FEDPALS:
            return {}
        return fedpals_weights(self.roster.releases, federation.pals_target, federation.pals_regularisation)


def _unusable(site: str, phase: str, fault: str | MessageError) -> LeftOut:
    """Return the record of a reply that came and is not used."""
    cause = cause_of(fault) if isinstance(fault, MessageError) else Cause.UNUSABLE
    return LeftOut(site=site, phase=phase, cause=cause, reason=str(fault))
