"""The rounds of one run: ask the sites to train, aggregate, look at held-back bags, keep a checkpoint.

``Rounds`` holds what changes from round to round (the model, the best model, the server optimiser and
the state that a checkpoint keeps) and nothing that cannot be restored from a checkpoint.
"""

import logging
import time
from collections.abc import Iterator
from typing import Any

from flwr.serverapp import Grid

from common.config import RunConfig, Strategy
from common.errors import RunError
from common.lhfglp import LHFGLP
from common.messages import (
    FloatArray,
    MessageError,
    ModelUpdate,
    PrivacyStatement,
    SiteError,
    from_records,
    to_records,
)
from common.model_file import all_arrays, load_arrays, trainable_arrays
from server import checkpoint
from server.aggregation import ServerOptimiser, fault_of
from server.checkpoint import LeftOut, ServerState
from server.enrolment import Roster, enrol
from server.evaluation import pooled_bag_figures, selection_score
from server.exchange import ask
from server.run_folder import RunFolder
from server.weights import fedpals_weights

log = logging.getLogger("fedbags.server")

TRAIN, EVALUATE_BAGS, EVALUATE_TEST = "train", "evaluate.bags", "evaluate.test"
SERVER = "server"


class Rounds:
    """One run on the server, from its first round or from a checkpoint to the selected model."""

    def __init__(
        self,
        grid: Grid,
        config: RunConfig,
        folder: RunFolder,
        roster: Roster,
        model: LHFGLP,
        state: ServerState,
    ) -> None:
        self.grid, self.config, self.folder, self.roster = grid, config, folder, roster
        self.model = model
        self.state = state
        self.optimiser = ServerOptimiser(config.federation, config.central_dp)
        self.best: dict[str, FloatArray] = dict(trainable_arrays(model))

    def restore(self, groups: dict[str, dict[str, Any]]) -> None:
        """Put the arrays of a checkpoint back."""
        load_arrays(self.model, groups["model"])
        self.best = groups["best"]
        self.optimiser.load_state(groups["optimiser"])

    def run(self) -> None:
        """Every round that is left; a checkpoint after each."""
        while self.state.round < self.config.rounds:
            started = time.monotonic()
            number = self.state.round + 1
            enrol(self.grid, self.roster, self.config.federation, number, self.report, self.folder.exchanged)
            self._train(number)
            if number % self.config.evaluation.every == 0 or number == self.config.rounds:
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

    def report(self, site: str, phase: str, reason: str) -> None:
        """Write down that something of a site was not used."""
        left_out = LeftOut(round=self.state.round + 1, site=site, phase=phase, reason=reason)
        self.state.left_out.append(left_out)
        self.folder.event("left-out", **left_out.model_dump())
        log.warning("round %(round)d: %(site)s left out of %(phase)s: %(reason)s", left_out.model_dump())

    def _train(self, number: int) -> None:
        reference = trainable_arrays(self.model)
        weights = self._weights()
        collected = self.optimiser.aggregator()
        losses: dict[str, float] = {}
        for site, update, statement in self._ask(TRAIN, number):
            fault = fault_of(update, reference, self.config.federation.max_update_mb)
            if not fault and statement is None:
                fault = "no privacy statement came with the update"
            if fault or statement is None:
                self.report(site, TRAIN, fault)
                continue
            bags = update.metrics["num-bags"]
            assert isinstance(bags, int)  # fault_of checked it
            collected.add(update, weights.get(site, 0.0) if weights else float(bags))
            self.state.statements[site] = statement
            loss = update.metrics.get("loss")
            if isinstance(loss, float):
                losses[site] = loss
            self.folder.event("update", round=number, site=site, bags=bags, loss=loss)
            self.folder.event(
                "statement",
                round=number,
                site=site,
                epsilon=statement.epsilon,
                delta=statement.delta,
                budget_left=statement.budget_left,
            )
        if collected.count < self.config.federation.quorum:
            raise RunError(
                f"round {number}: {collected.count} good update(s), the quorum is "
                f"{self.config.federation.quorum}. What was left out and why is in {self.folder.metrics}.\n"
                "The last checkpoint is intact: go on with --resume when the sites are back."
            )
        load_arrays(self.model, self.optimiser.step(reference, collected, number))
        mean_loss = sum(losses.values()) / len(losses) if losses else None
        self.folder.event("round", round=number, updates=collected.count, loss=mean_loss)
        log.info("round %d: %d updates, mean loss %s", number, collected.count, mean_loss)

    def _evaluate_bags(self, number: int) -> None:
        # Held-back bags are private data that no noise covers: a private run does not ask for them.
        updates = [] if self.config.dp.epsilon else [u for _, u, _ in self._ask(EVALUATE_BAGS, number)]
        figures = pooled_bag_figures(updates, self.model.hierarchy)
        if figures is None:
            # Without held-back bags there is nothing to select by: the newest model is kept.
            self.best, self.state.best_round = dict(trainable_arrays(self.model)), number
            return
        score = selection_score(figures)
        self.folder.event("bags", round=number, levels=figures, score=score)
        if self.state.best_score is None or score < self.state.best_score:
            self.best = dict(trainable_arrays(self.model))
            self.state.best_score, self.state.best_round, self.state.bags = score, number, figures

    def test_updates(self) -> dict[str, ModelUpdate]:
        """The selected model's confusion counts on each site's labelled images, by site."""
        return {site: update for site, update, _ in self._ask(EVALUATE_TEST, self.state.round)}

    def _ask(self, kind: str, number: int) -> Iterator[tuple[str, ModelUpdate, PrivacyStatement | None]]:
        """Send the model to every site and yield readable replies, in the order of the site names."""
        content = to_records(ModelUpdate(sender=SERVER, round=number, arrays=all_arrays(self.model)))
        by_node = {self.roster.nodes[site]: site for site in self.roster.names()}
        requests = dict.fromkeys(by_node, content)
        deadline, note = self.config.federation.deadline, self.folder.exchanged
        for reply in ask(self.grid, requests, kind, round=number, deadline=deadline, note=note):
            site = by_node[reply.node]
            if reply.content is None:
                self.report(site, kind, reply.failure)
                if reply.code == SiteError.BUDGET:
                    self.roster.leave(site)
                continue
            try:
                update = from_records(reply.content, ModelUpdate)
                statement = from_records(reply.content, PrivacyStatement) if kind == TRAIN else None
            except MessageError as error:
                self.report(site, kind, f"unreadable reply: {error}")
                continue
            if update.sender != site or update.round != number:
                self.report(site, kind, f"reply of {update.sender!r} for round {update.round}")
                continue
            yield site, update, statement

    def _weights(self) -> dict[str, float]:
        """Site weights of the label-marginal aware strategy; empty where bag counts are the weights."""
        federation = self.config.federation
        if federation.strategy is not Strategy.FEDPALS:
            return {}
        return fedpals_weights(self.roster.releases, federation.pals_target, federation.pals_regularisation)
