"""The server's part in one secure aggregation: relay keys and shares, add masked vectors, unmask the sum.

It sees public keys, ciphertexts, masked words, and shares of secrets that the sites agreed to give up; never
an update. Knows nothing of who is waited for and of what the mean is used for (rounds.py).
"""

import re
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from flwr.app import RecordDict

from common.config_tables import SecureAggregationConfig
from common.errors import RunError
from common.messages import (
    FloatArray,
    MessageError,
    ModelUpdate,
    PrivacyStatement,
    check_only,
    combine,
    from_records,
    to_records,
)
from common.secure_aggregation.quantisation import length, mean_of
from common.secure_aggregation.records import (
    InSession,
    KeyAdvert,
    MaskedUpdate,
    MaskRequest,
    SealedShares,
    SessionOffer,
    SessionPlan,
    UnmaskRequest,
    UnmaskShares,
)
from common.secure_aggregation.recovery import MaskedSum

KEYS, SHARES, TRAIN_MASKED, UNMASK = "query.keys", "query.shares", "train.masked", "query.unmask"
_FILE_NAME = re.compile(r"[A-Za-z0-9._-]+")

T = TypeVar("T", bound=InSession)
Exchange = Callable[[str, Mapping[str, RecordDict]], Iterator[tuple[str, RecordDict]]]
"""Sends each site its request of a message type and yields what came back, in the order of the names."""
Report = Callable[[str, str, str], None]
"""Called with (site, message type, reason) for what cannot be used."""


class SessionFailed(RunError):  # noqa: N818 (it failed, and may be tried again)
    """This attempt gave no sum; nothing of it can be used."""


@dataclass(frozen=True)
class MaskedMean:
    """What one session gives."""

    update: ModelUpdate
    """The weighted mean of the sites' models, as if one site had sent it."""
    weight: float
    """Sum of the weights of the sites in it."""
    metrics: dict[str, dict[str, int | float]]
    """By site in the mean: what its policy let out in clear."""


@dataclass
class Session:
    """One attempt at one round.

    Args:
        exchange: how sites are asked.
        report: where unusable replies are reported.
        spent: called with every privacy statement; the budget is spent, whatever becomes of the update.
        config: of the secure aggregation.
        round: its number.
        weights: of the sites, in any unit.
        quorum: fewest sites in the sum.
    """

    exchange: Exchange
    report: Report
    spent: Callable[[PrivacyStatement], None]
    config: SecureAggregationConfig
    round: int
    weights: Mapping[str, float]
    quorum: int
    name: str = field(default_factory=lambda: secrets.token_hex(16))

    def run(self, sites: Sequence[str], model: RecordDict, trained: Mapping[str, FloatArray]) -> MaskedMean:
        """All four steps.

        Args:
            sites: who is asked.
            model: the ModelUpdate that the sites train, as it is sent.
            trained: arrays with the names and shapes that a site trains.

        Raises:
            SessionFailed: too few sites were left at some step, or the sum is not one of clipped updates.
        """
        plan = self._agree(sites)
        sealed = self._share(plan)
        total, metrics = self._add_up(plan, sealed, model, length(trained))
        self._unmask(total)
        # What the sites started from: a 16-bit transport has rounded it.
        sent = from_records(model, ModelUpdate).arrays
        start = {name: sent[name] for name in trained}
        weight = total.weight()
        try:
            mean = mean_of(total.total, start, self.config.clip_range, weight, len(plan.adverts))
        except RunError as error:
            raise SessionFailed(str(error)) from error
        update = ModelUpdate(
            sender="sum", round=self.round, arrays=mean, metrics={"num-bags": len(total.survivors)}
        )
        scale = sum(self.weights[advert.site] for advert in plan.adverts)
        return MaskedMean(update, weight * scale, metrics)

    def _agree(self, sites: Sequence[str]) -> SessionPlan:
        offer = to_records(SessionOffer(session=self.name, round=self.round))
        adverts = {}
        for site, advert in self._replies(KEYS, dict.fromkeys(sites, offer), KeyAdvert):
            certificate = advert.certificate or self._certificate(site)
            if certificate:
                adverts[site] = advert.model_copy(update={"certificate": certificate})
            else:
                self.report(site, KEYS, "it sent no certificate, and there is none for it here")
        self._need(len(adverts), "made keys")
        whole = sum(self.weights[site] for site in adverts)
        if whole <= 0:
            raise SessionFailed("the weights of the sites that made keys sum to nothing")
        return SessionPlan(
            session=self.name,
            round=self.round,
            threshold_share=self.config.threshold_share,
            neighbours=self.config.neighbours,
            clip_range=self.config.clip_range,
            weights={site: self.weights[site] / whole for site in sorted(adverts)},
            adverts=tuple(adverts[site] for site in sorted(adverts)),
        )

    def _share(self, plan: SessionPlan) -> dict[str, SealedShares]:
        request = to_records(plan)
        sealed = dict(self._replies(SHARES, dict.fromkeys(plan.sites, request), SealedShares))
        self._need(len(sealed), "shared their secrets")
        return sealed

    def _add_up(
        self, plan: SessionPlan, sealed: Mapping[str, SealedShares], model: RecordDict, words: int
    ) -> tuple[MaskedSum, dict[str, dict[str, int | float]]]:
        total = MaskedSum(plan, list(sealed), words)
        if short := total.short_of(total.sharing):
            raise SessionFailed(f"too few sites shared their secrets with {', '.join(short)}")
        requests = {}
        for site in total.sharing:
            shares = {peer: reply.shares[site] for peer, reply in sealed.items() if site in reply.shares}
            request = MaskRequest(session=self.name, round=self.round, shares=shares)
            requests[site] = combine(model, to_records(request))
        metrics = {}
        for site, content in self.exchange(TRAIN_MASKED, requests):
            try:
                check_only(content, MaskedUpdate, PrivacyStatement)
                statement = from_records(content, PrivacyStatement)
                update = from_records(content, MaskedUpdate)
                if (statement.site, statement.round) != (site, self.round):
                    raise MessageError(f"privacy statement of {statement.site!r}")
                self.spent(statement)
                self._check(site, update.sender, update)
                total.add(site, update.vector)
            except (MessageError, RunError) as error:
                self.report(site, TRAIN_MASKED, f"unusable reply: {error}")
                continue
            metrics[site] = dict(update.metrics)
        self._need(len(total.survivors), "sent a masked update")
        return total, metrics

    def _unmask(self, total: MaskedSum) -> None:
        if short := total.short_of(total.survivors):
            raise SessionFailed(f"too few sites are left to unmask what {', '.join(short)} sent")
        request = to_records(
            UnmaskRequest(session=self.name, round=self.round, survivors=tuple(sorted(total.survivors)))
        )
        answers: dict[str, UnmaskShares] = {}
        # A lost answer may be asked for again: it is the same one. The others hold shares too.
        for asked in (total.survivors, total.sharing):
            missing = [site for site in sorted(asked) if site not in answers]
            if missing and (not answers or total.missing(answers)):
                answers |= dict(self._replies(UNMASK, dict.fromkeys(missing, request), UnmaskShares))
        try:
            total.unmask(answers)
        except RunError as error:
            raise SessionFailed(str(error)) from error

    def _replies(
        self, kind: str, requests: Mapping[str, RecordDict], record: type[T]
    ) -> Iterator[tuple[str, T]]:
        for site, content in self.exchange(kind, requests):
            try:
                check_only(content, record)
                reply = from_records(content, record)
                self._check(site, getattr(reply, "site", ""), reply)
            except MessageError as error:
                self.report(site, kind, f"unusable reply: {error}")
                continue
            yield site, reply

    def _check(self, site: str, says: str, reply: InSession) -> None:
        if says != site or (reply.session, reply.round) != (self.name, self.round):
            raise MessageError(f"a reply of {says!r}, or to another session")

    def _need(self, sites: int, did: str) -> None:
        if sites < self.quorum:
            raise SessionFailed(f"{sites} site(s) {did}, {self.quorum} are needed")

    def _certificate(self, site: str) -> str:
        """The certificate of a site whose kit has none, from the server's folder; read anew, for a site that
        joins late gets its certificate while the run goes on."""
        path = Path(self.config.certificates) / f"{site}.crt"
        if not self.config.certificates or not _FILE_NAME.fullmatch(site) or not path.is_file():
            return ""
        return path.read_text(encoding="ascii")
