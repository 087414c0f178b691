"""Run the rounds of one run on the server.

A round asks the sites to train, aggregates, evaluates on held-back bags, and keeps a checkpoint. ``Rounds``
holds what changes from round to round (the model, the best model, the server optimiser and the state that a
checkpoint keeps) and nothing that cannot be restored from a checkpoint.
"""

import logging
import time
from typing import Any

from flwr.app import RecordDict

from common.model.classifier import HierarchicalClassifier
from common.model.model_file import all_arrays, load_arrays, trainable_arrays
from common.records import FloatArray, ModelUpdate
from common.run_records import BagsEvaluated, RoundDone, RoundSkipped, StoppedEarly
from common.wire import to_records
from server import run_folder
from server.aggregation import build_optimiser
from server.collect import EVALUATE_BAGS, EVALUATE_TEST, Collector
from server.enrolment import ATTEMPTS, QuorumMissed
from server.evaluation import noised_bag_figures, pooled_bag_figures, selection_score
from server.secure_aggregation import UselessSum

log = logging.getLogger("fedbags.server")

_SERVER = "server"


class Rounds:
    """Run one run on the server, from its first round or a checkpoint to the selected model."""

    def __init__(self, collector: Collector, model: HierarchicalClassifier) -> None:
        self.collector, self.model = collector, model
        self.config, self.folder, self.state, self.roster = (
            collector.config, collector.folder, collector.state, collector.roster
        )  # fmt: skip
        self.optimiser = build_optimiser(self.config)
        self.best: dict[str, FloatArray] = dict(trainable_arrays(model))
        self.skipped = 0
        """Rounds in a row, up to now, that were skipped without anybody's being named."""

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
            try:
                self._train(number)
            except UselessSum as error:
                if not self._may_skip(number):
                    raise
                self._skip(number, str(error))
            except QuorumMissed as error:
                # Sites that have done their part of this round would answer the same again, so only the
                # next round can go on.
                if self.collector.taken and self._may_skip(number):
                    self._skip(number, str(error))
                elif self._ends_early(number):
                    return
                else:
                    raise
            if self.config.evaluation.is_due(number, self.config.rounds):
                self._evaluate_bags(number)
            self.state.round = number
            self.state.seconds += time.monotonic() - started
            run_folder.save_checkpoint(
                self.folder.checkpoints,
                self.state,
                trainable_arrays(self.model),
                self.best,
                self.optimiser.state(),
            )

    def _may_skip(self, number: int) -> bool:
        """Return True if this round may be skipped.

        It may not after too many skipped rounds in a row that nobody was expelled for, and not where no round
        would be trained at all.
        """
        if self.state.skipped + 1 == number == self.config.rounds:
            return False
        return self.collector.named or self.skipped < ATTEMPTS

    def _skip(self, number: int, reason: str) -> None:
        """Leave the model as it is in this round, and go on with the next."""
        # A site unmasks one sum of a round and never a second. Where it did, and the sum was lost before
        # the checkpoint or is of no use, this round cannot be had again, and the next one can.
        self.state.skipped += 1
        self.skipped += not self.collector.named
        self.folder.record(RoundSkipped(round=number, sites=sorted(self.collector.taken), reason=reason))
        log.warning("round %(round)d skipped: %(reason)s", {"round": number, "reason": reason})

    def _ends_early(self, number: int) -> bool:
        """End the run early and return True if used-up privacy budgets keep it below its quorum.

        Without a complete round there is no model; then the result is False, and the run has failed.
        """
        # Budgets do not come back, so there is nothing to wait for, and the model of the last complete
        # round is as good as it was.
        quorum, left = self.config.attendance.quorum, len(self.roster.nodes)
        if not self.state.round or not self.collector.used_up or left >= quorum:
            return False
        names = ", ".join(sorted(self.collector.used_up))
        self.state.stopped_early = (
            f"the privacy budget of {names} does not allow round {number}; {left} site(s) are left, the "
            f"quorum is {quorum}"
        )
        self.folder.record(StoppedEarly(round=self.state.round, reason=self.state.stopped_early))
        log.warning("stopped early: %(reason)s", {"reason": self.state.stopped_early})
        if self.state.best_score is None:
            self.best, self.state.best_round = dict(trainable_arrays(self.model)), self.state.round
        # The sites of the last complete round test its model: that costs no budget.
        gone = self.collector.used_up.items()
        self.roster.nodes.update({site: node for site, (node, last) in gone if last >= self.state.round})
        return True

    def _train(self, number: int) -> None:
        """Collect the sites' updates of one round, and make the next model."""
        reference, collected = trainable_arrays(self.model), self.optimiser.aggregator()
        losses = self.collector.updates(number, self.model, self._request(number), collected)
        load_arrays(self.model, self.optimiser.step(reference, collected, number, self.config.rounds))
        self.skipped = 0
        mean_loss = sum(losses.values()) / len(losses) if losses else None
        self.folder.record(RoundDone(round=number, updates=collected.count, loss=mean_loss))
        log.info("round %d: %d updates, mean loss %s", number, collected.count, mean_loss)

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

    def evaluate_test(self) -> dict[str, ModelUpdate]:
        """Return the selected model's confusion counts on each site's labelled images, by site."""
        return self._evaluations(EVALUATE_TEST, self.state.round)

    def _evaluations(self, kind: str, number: int) -> dict[str, ModelUpdate]:
        return self.collector.evaluations(kind, number, self._request(number), self.model.hierarchy)

    def _request(self, number: int) -> RecordDict:
        """Return the request that holds the model, the same for every site."""
        update = ModelUpdate(sender=_SERVER, round=number, arrays=all_arrays(self.model))
        return to_records(update, transport=self.config.federation.transport)
