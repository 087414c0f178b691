"""Run the server's part in one secure aggregation.

It relays keys and shares, adds up masked vectors and unmasks the sum. It sees public keys, ciphertexts,
masked words, and shares of secrets that the sites agreed to give up, and never an update. It knows nothing
of waiting for sites and of the use of the mean (rounds.py).
"""

import math
import re
import secrets
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from flwr.app import RecordDict

from common import pki
from common.config_tables import SecureAggregationConfig
from common.errors import IdentityError, RunError, SecureAggregationRefused
from common.records import FloatArray, MessageError, ModelUpdate, PrivacyStatement
from common.secure_aggregation import keys
from common.secure_aggregation.cohort import KEYS_SIGNED, effective_number, neighbourhoods
from common.secure_aggregation.quantisation import Grid, digest, length, mean_of, refuse_noise
from common.secure_aggregation.records import (
    SEALED_BYTES,
    InSession,
    KeyAdvert,
    MaskedUpdate,
    MaskRequest,
    SealedShares,
    SessionOffer,
    SessionPlan,
    SurvivorList,
    SurvivorSignature,
    UnmaskRequest,
    UnmaskShares,
)
from common.secure_aggregation.recovery import MaskedSum
from common.wire import check_only, combine, from_records, to_records
from server.exchange import check_statement, reading_reply
from server.shared_step import SharedStep

_KEYS, _SHARES, _TRAIN_MASKED = "query.keys", "query.shares", "train.masked"
_SURVIVORS, _UNMASK = "query.survivors", "query.unmask"
_ATTEMPTS = 2
"""How often the survivors are asked for what they may repeat."""
_FILE_NAME = re.compile(r"[A-Za-z0-9._-]+")

_T = TypeVar("_T", bound=InSession)
_Exchange = Callable[[str, Mapping[str, RecordDict]], Iterator[tuple[str, RecordDict]]]
"""Sends each site its request of a message type and yields what came back, in the order of the names."""
_Report = Callable[[str, str, str], None]
"""Called with (site, message type, reason) for what cannot be used."""


def _evened_weights(weights: Mapping[str, float], effective: int) -> dict[str, float]:
    """Return the weights, normalised and drawn towards equal ones as far as sites demand it.

    Sites refuse weights that count as fewer than ``effective`` equal sites (1 / sum of squares): their sum
    would be nearly one update. So (1 - a) w + a / n takes the place of w, with the smallest a that is
    enough.

    Args:
        weights: by site, not negative, in any unit, with a sum above 0.
        effective: smallest effective number of sites.
    """
    whole, number = sum(weights.values()), len(weights)
    shares = {site: weight / whole for site, weight in weights.items()}
    if number < effective or effective_number(list(shares.values())) >= effective * (1 - 1e-9):
        return shares
    spread = sum(share**2 for share in shares.values()) - 1 / number
    kept = math.sqrt((1 / effective - 1 / number) / spread)
    return {site: kept * share + (1 - kept) / number for site, share in shares.items()}


class UselessSum(RunError):  # noqa: N818 (it came off, and tells nothing)
    """Report that a sum was unmasked and must not be used.

    The sites unmask no second one of this round.
    """

    def __init__(self, round: int, reason: str) -> None:
        super().__init__(
            f"round {round}: {reason}\nNothing of it is used, and nobody can see whose update was wrong. "
            "Sites unmask one sum of a round: --resume goes on with the next round."
        )


class SessionFailed(RunError):  # noqa: N818 (it failed, and may be tried again)
    """Report that this attempt gave no sum, and nothing of it can be used."""


@dataclass(frozen=True)
class _MaskedMean:
    """Hold the result of one session."""

    update: ModelUpdate
    """The weighted mean of the sites' models, as if one site had sent it."""
    weight: float
    """Sum of the weights of the sites in the mean."""
    metrics: dict[str, dict[str, int | float]]
    """By site in the mean: what its policy let out in clear."""


def _check_keys(advert: KeyAdvert, certificate: str) -> None:
    """Refuse one site's keys where they would make every other site refuse the session.

    The sites check them again, against the authority that they trust; the server is not believed.

    Args:
        advert: what the site sent.
        certificate: PEM, of the site.

    Raises:
        RunError: a point of small order, one key for two purposes, or a signature or certificate that is not
            valid now.
    """
    if len({advert.seal_key, advert.mask_key, advert.commitment}) != 3:
        raise SecureAggregationRefused("one key for two purposes")
    # A point of small order shows only when it is used, so the server uses it once with a key of its own.
    for key in (advert.seal_key, advert.mask_key):
        keys.pairwise_key(keys.new_secret(), key, "check", b"")
    owner = pki.read_identity(certificate, datetime.now(UTC))
    if owner.site != advert.site:
        raise IdentityError(f"the certificate is of {owner.site!r}")
    pki.verify(owner.public_key, KEYS_SIGNED, advert.signed(), advert.signature)


def _of_another_run(adverts: Mapping[str, KeyAdvert]) -> list[str]:
    """Return the sites that state another run or configuration than most sites.

    The others would not share secrets with them.
    """
    given = {site: (advert.run, advert.settings) for site, advert in adverts.items()}
    common = Counter(given.values()).most_common(1)
    return [site for site, settings in given.items() if settings != common[0][0]]


def _with_a_shared_key(adverts: Mapping[str, KeyAdvert]) -> list[str]:
    """Return the sites that share a key, or an owner's key, with another.

    No site would go on with both.
    """
    now = datetime.now(UTC)
    held = {
        site: (
            advert.seal_key,
            advert.mask_key,
            advert.commitment,
            pki.read_identity(advert.certificate, now).public_key.public_numbers(),
        )
        for site, advert in adverts.items()
    }
    seen = Counter(key for all_of_one in held.values() for key in all_of_one)
    return [site for site, all_of_one in held.items() if any(seen[key] > 1 for key in all_of_one)]


@dataclass
class Session:
    """Run one attempt at one round.

    Args:
        exchange: sends requests to sites and yields their replies.
        report: called with unusable replies.
        expel: called with sites that cost a sum and take no part in the rest of the run, as ``report`` is.
        spent: called with every privacy statement; the budget is spent, whatever becomes of the update.
        config: of the secure aggregation.
        round: its number.
        weights: of the sites, in any unit.
        quorum: fewest sites in the sum.
        shared: with shared noise, what is done with a sum of gradients; None: updates are summed.
        name: the session's random text.
    """

    exchange: _Exchange
    report: _Report
    expel: _Report
    spent: Callable[[PrivacyStatement], None]
    config: SecureAggregationConfig
    round: int
    weights: Mapping[str, float]
    quorum: int
    shared: SharedStep | None = None
    name: str = field(default_factory=lambda: secrets.token_hex(16))

    def run(self, sites: Sequence[str], model: RecordDict, trained: Mapping[str, FloatArray]) -> _MaskedMean:
        """Run all five steps of the session and return the mean.

        Args:
            sites: the sites that are asked.
            model: the ModelUpdate that the sites train, as it is sent.
            trained: arrays with the names and shapes that a site trains.

        Raises:
            SessionFailed: too few sites were left at some step.
            UselessSum: the sum is not one of clipped updates.
        """
        plan = self._agree(sites)
        sealed = self._share(plan)
        # What the sites started from: a 16-bit transport has rounded it.
        sent = from_records(model, ModelUpdate).arrays
        total = MaskedSum(plan, sealed, length(trained), digest(sent))
        metrics = self._add_up(total, sealed, model)
        self._unmask(total, self._agree_on_survivors(total))
        start = {name: sent[name] for name in trained}
        weight = total.weight()
        grid = Grid(plan.clip_range, len(plan.adverts))
        try:
            # Nobody can see single updates, so these checks of the sum are all that stops words that are no
            # update.
            if self.shared is not None:
                refuse_noise(total.total, 1.0, len(plan.adverts))
                mean = self.shared.next_arrays(total.total, start, grid, total.survivors)
            else:
                refuse_noise(total.total, weight, len(plan.adverts))
                mean = mean_of(total.total, start, grid, weight)
        except RunError as error:
            raise UselessSum(self.round, str(error)) from error
        update = ModelUpdate(
            sender="sum", round=self.round, arrays=mean, metrics={"num-bags": len(total.survivors)}
        )
        scale = sum(self.weights[advert.site] for advert in plan.adverts)
        return _MaskedMean(update, weight * scale, metrics)

    def _agree(self, sites: Sequence[str]) -> SessionPlan:
        offer = to_records(SessionOffer(session=self.name, round=self.round))
        adverts = {}
        for site, advert in self._replies(_KEYS, dict.fromkeys(sites, offer), KeyAdvert):
            # Its own may be of another authority than the other sites trust: with it they would all refuse.
            certificate = self._certificate(site) if self.config.certificates else advert.certificate
            if not certificate:
                self.report(site, _KEYS, "there is no certificate for it")
                continue
            try:
                with reading_reply("unusable keys"):
                    _check_keys(advert, certificate)
            except MessageError as error:
                self.report(site, _KEYS, str(error))
                continue
            adverts[site] = advert.model_copy(update={"certificate": certificate})
        for site in _of_another_run(adverts):
            self.report(site, _KEYS, "it says that it was told another run or configuration than the others")
            del adverts[site]
        for site in _with_a_shared_key(adverts):
            self.report(site, _KEYS, "it has a key that another site has too")
            del adverts[site]
        self._need(len(adverts), "made keys")
        # A sum of gradients has no weights: all sites count alike towards what hides one of them.
        weights = {site: 1.0 if self.shared else self.weights[site] for site in sorted(adverts)}
        if sum(weights.values()) <= 0:
            raise SessionFailed("the weights of the sites that made keys sum to nothing")
        return SessionPlan(
            session=self.name,
            round=self.round,
            threshold_share=self.config.threshold_share,
            neighbours=self.config.neighbours,
            clip_range=self.shared.clip_range(sorted(adverts)) if self.shared else self.config.clip_range,
            weights=_evened_weights(weights, self.config.minimum_sites),
            adverts=tuple(adverts[site] for site in sorted(adverts)),
        )

    def _share(self, plan: SessionPlan) -> dict[str, SealedShares]:
        request = to_records(plan)
        sealed = {}
        joined = neighbourhoods(plan)
        for site, reply in self._replies(_SHARES, dict.fromkeys(plan.sites, request), SealedShares):
            if reply.shares.keys() != set(joined[site]) - {site}:
                # A neighbour without its share would refuse the session.
                self.report(site, _SHARES, "not one share for each of its neighbours")
                continue
            if any(len(shares) != SEALED_BYTES for shares in reply.shares.values()):
                self.report(site, _SHARES, "sealed shares of a wrong length")
                continue
            sealed[site] = reply
        self._need(len(sealed), "shared their secrets")
        return sealed

    def _add_up(
        self, total: MaskedSum, sealed: Mapping[str, SealedShares], model: RecordDict
    ) -> dict[str, dict[str, int | float]]:
        if short := total.short_of(total.sharing):
            raise SessionFailed(f"too few sites shared their secrets with {', '.join(short)}")
        # The sites would refuse such a sum in the end; to find it before they train costs nobody any budget.
        effective = effective_number([total.plan.weights[site] for site in total.sharing] or [1.0])
        if effective < self.config.minimum_sites * (1 - 1e-9):
            raise SessionFailed(
                f"the weights of the {len(total.sharing)} sites that shared their secrets count as "
                f"{effective:.2f} equal ones, {self.config.minimum_sites} are needed"
            )
        requests = {}
        for site in total.sharing:
            shares = {peer: reply.shares[site] for peer, reply in sealed.items() if site in reply.shares}
            request = MaskRequest(
                session=self.name, round=self.round, sharing=tuple(total.sharing), shares=shares
            )
            requests[site] = combine(model, to_records(request))
        metrics = {}
        for site, content in self.exchange(_TRAIN_MASKED, requests):
            try:
                with reading_reply("unusable reply"):
                    check_only(content, MaskedUpdate, PrivacyStatement)
                    statement = from_records(content, PrivacyStatement)
                    update = from_records(content, MaskedUpdate)
                check_statement(statement, site, self.round)
                # Before the vector is checked: the site's budget is spent even if the vector is of no use.
                self.spent(statement)
                with reading_reply("unusable reply"):
                    self._check(site, update.sender, update)
                    total.add(site, update.vector)
            except MessageError as error:
                self.report(site, _TRAIN_MASKED, str(error))
                continue
            metrics[site] = dict(update.metrics)
        self._need(len(total.survivors), "sent a masked update")
        return metrics

    def _agree_on_survivors(self, total: MaskedSum) -> UnmaskRequest:
        """Have the survivors sign the list of sites whose vectors are in the sum.

        Each will see that others signed the same list.
        """
        if short := total.short_of(total.survivors):
            raise SessionFailed(f"too few sites are left to unmask what {', '.join(short)} sent")
        listed = SurvivorList(session=self.name, round=self.round, survivors=tuple(sorted(total.survivors)))
        signed = self._repeatable(
            _SURVIVORS, listed, SurvivorSignature, lambda replies: len(replies) >= total.quorum()
        )
        if len(signed) < total.quorum():
            raise SessionFailed(
                f"{len(signed)} site(s) signed the list of survivors, {total.quorum()} are needed"
            )
        return UnmaskRequest(
            **listed.model_dump(), signatures={site: reply.signature for site, reply in signed.items()}
        )

    def _unmask(self, total: MaskedSum, request: UnmaskRequest) -> None:
        answers = self._repeatable(
            _UNMASK, request, UnmaskShares, lambda replies: bool(replies) and not total.missing(replies)
        )
        self._name(total, answers)
        try:
            total.unmask(answers)
        except RunError as error:
            raise SessionFailed(str(error)) from error

    def _name(self, total: MaskedSum, answers: Mapping[str, UnmaskShares]) -> None:
        """Report who gave or sealed shares that are of no use, and expel them where that costs the sum."""
        blame = self.expel if total.missing(answers) else self.report
        for holder, owner in total.wrong_shares(answers):
            blame(
                holder, _UNMASK, f"another share of a secret of {owner} than the one it was sealed; not used"
            )
        bad = total.bad_owners(answers)
        for owner in bad:
            blame(
                owner, _UNMASK, "the shares that it sealed do not give its secret, or too few can be opened"
            )
        for site, others in total.withheld(answers).items():
            if site not in bad:
                reason = "no share of one by the other, badly sealed or kept back"
                self.report(site, _UNMASK, f"between it and {', '.join(others)}: {reason}")

    def _repeatable(
        self, kind: str, request: SurvivorList, record: type[_T], enough: Callable[[dict[str, _T]], bool]
    ) -> dict[str, _T]:
        """Ask the survivors, and where too few answer ask the missing ones again."""
        replies: dict[str, _T] = {}
        content = to_records(request)
        for _ in range(_ATTEMPTS):
            # Asking again is safe: a site repeats its answer to the same list and gives no other.
            missing = [site for site in request.survivors if site not in replies]
            if missing and not enough(replies):
                replies |= dict(self._replies(kind, dict.fromkeys(missing, content), record))
        return replies

    def _replies(
        self, kind: str, requests: Mapping[str, RecordDict], record: type[_T]
    ) -> Iterator[tuple[str, _T]]:
        for site, content in self.exchange(kind, requests):
            try:
                with reading_reply("unusable reply"):
                    check_only(content, record)
                    reply = from_records(content, record)
                    self._check(site, getattr(reply, "site", ""), reply)
            except MessageError as error:
                self.report(site, kind, str(error))
                continue
            yield site, reply

    def _check(self, site: str, sender: str, reply: InSession) -> None:
        if sender != site or (reply.session, reply.round) != (self.name, self.round):
            raise MessageError(f"a reply of {sender!r}, or to another session")

    def _need(self, sites: int, did: str) -> None:
        if sites < self.quorum:
            raise SessionFailed(f"{sites} site(s) {did}, {self.quorum} are needed")

    def _certificate(self, site: str) -> str:
        """Return the certificate of a site whose kit has none, from the server's folder."""
        # Read anew each time, for a site that joins late gets its certificate while the run goes on. The
        # name comes from a site, so it must not lead out of the folder.
        path = Path(self.config.certificates) / f"{site}.crt"
        if not _FILE_NAME.fullmatch(site) or not path.is_file():
            return ""
        return path.read_text(encoding="ascii")
