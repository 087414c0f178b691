"""Guard a site by admitting questions and sending only what this module encoded itself.

A handler's answer is parsed and compared with the site's own name, hierarchy, bags and ledger and with
the request. What goes out is the guard's own encoding of that, in a fixed order: no byte of the
handler's message leaves. A reply with any other record, key, dtype, shape, metric or value is refused as a
whole and an error goes out in its place. Errors, ours included, leave with a fixed text per kind: the text
of an exception can carry a path or a patient id, so it goes to the site's own log at most.

In a secure aggregation the guard knows no key and no mask: a handler that went wrong, or was replaced, must
not get past it.
"""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from flwr.app import Context, Error, Message, RecordDict

from client.door import QUESTIONS, Handler, Question, admit
from client.ledger.view import Charges
from client.release import NOISED_SUMS, check_metrics, release_proportions
from client.session import SiteSession
from client.site import ReleaseProportions
from common.errors import (
    BudgetRefused,
    ConfigError,
    DataError,
    EgressError,
    FedbagsError,
    IdentityError,
    RoundTaken,
    RunError,
    SecureAggregationRefused,
    UserError,
)
from common.records import (
    SITE_ERRORS,
    MessageError,
    Metric,
    ModelUpdate,
    PrivacyStatement,
    ProportionRelease,
    Record,
    SiteError,
    SiteName,
)
from common.secure_aggregation.records import (
    SEALED_BYTES,
    SHARE_BYTES,
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
from common.wire import check_only, from_records, to_records

log = logging.getLogger("fedbags.client")

_ASKED: dict[type[Record], type[InSession]] = {
    KeyAdvert: SessionOffer,
    SealedShares: SessionPlan,
    MaskedUpdate: MaskRequest,
    SurvivorSignature: SurvivorList,
    UnmaskShares: UnmaskRequest,
}
"""By record of a reply in a secure aggregation, the record that it answers."""


class _UnknownQuestionError(FedbagsError):
    """Report a message type, or a request, that is none of the site's questions."""


@dataclass(frozen=True)
class _Case:
    """Hold a question at a site, with which the reply to it is compared."""

    kind: str
    question: Question
    request: RecordDict
    session: SiteSession
    charges: Charges
    """What the site's ledger was charged while the question was answered."""

    @cached_property
    def asked(self) -> ModelUpdate:
        """Return the model that the server sent."""
        return from_records(self.request, ModelUpdate)


def guard(message: Message, context: Context, call_next: Handler) -> Message:
    """Admit a question, have it answered, and send the guard's own encoding of the answer."""
    kind, private = "a question", False
    try:
        # Inside the try, like all that follows: an exception that escaped to Flower would leave with its
        # text.
        case = _open(message, context)
        session = case.session
        # Only from here on is the type one of ours: a text that the server made up must not enter the
        # site's log.
        kind, private = case.kind, session.private and bool(case.question.touches)
        admit(case.question, session)
        # The ledger's length was read before this line, so that only charges made for this very answer
        # count.
        answer = call_next(message, session).content
        records = to_records(*_rebuild(case, answer), transport=session.config.federation.transport)
        return Message(records, reply_to=message)
    except Exception as error:
        code = _classify(error, private=private)
        # The class alone: even the site's log lines carry no path, patient id or label. What a secure
        # aggregation is refused for has none of them in it, and the site must know.
        reason = (
            str(error)
            if code in (SiteError.SECURE_AGGREGATION, SiteError.ROUND_TAKEN)
            else type(error).__name__
        )
        log.error(
            "%(phase)s refused: %(reason)s (%(error)s)",
            {"phase": kind, "reason": SITE_ERRORS[code], "error": reason},
        )
        return Message(Error(int(code), SITE_ERRORS[code]), reply_to=message)


def _open(message: Message, context: Context) -> _Case:
    """Open the site's session for a question, and read the ledger's length before it is answered.

    Raises:
        _UnknownQuestionError: the site has no such question, or the request holds other records.
    """
    kind = message.metadata.message_type
    question = QUESTIONS.get(kind)
    if question is None:
        raise _UnknownQuestionError("the site does not answer messages of this type")
    try:
        check_only(message.content, *question.asks)
    except MessageError as error:
        raise _UnknownQuestionError("the request does not hold the records of its type") from error
    session = SiteSession.open(context)
    return _Case(kind, question, message.content, session, Charges.before(session))


def _rebuild(case: _Case, reply: RecordDict) -> list[Record]:
    """Return the records that a reply may consist of, made anew from the handler's answer.

    Raises:
        EgressError: the reply is anything but an answer to this question; names keys and shapes only.
    """
    kinds = case.question.answers_in(case.session.config)
    try:
        check_only(reply, *kinds)
        return [_rebuilt(case, reply, from_records(reply, kind)) for kind in kinds]
    except MessageError as error:
        raise EgressError(str(error)) from error


def _rebuilt(case: _Case, reply: RecordDict, record: Record) -> Record:
    session = case.session
    match record:
        case ModelUpdate():
            return _update(case, record)
        case PrivacyStatement():
            return _statement(case, record)
        case ProportionRelease():
            return _release(case, record)
        case InSession():
            words = 0
            if isinstance(record, MaskedUpdate):
                _check_metrics(case, record.metrics)
                _check_charge(case)
                words = sum(math.prod(shape) for shape in session.trained_shapes().values())
            return _rebuild_masked(case.request, record, session, words)
        case _:
            raise EgressError("a record that no reply may hold")


def _update(case: _Case, reply: ModelUpdate) -> ModelUpdate:
    """Return the update with trained arrays in the model's order and metrics in the order of their names."""
    session = case.session
    if (reply.sender, reply.round) != (session.site.name, case.asked.round):
        raise EgressError("the update speaks for another site or round")
    arrays = reply.arrays
    if case.kind == "train":
        if session.site.policy.secure_aggregation.required or session.config.secure_aggregation.enabled:
            raise EgressError("this site's updates leave masked only")
        shapes = session.trained_shapes()
        # Exactly the trained arrays: one more, such as a buffer with statistics of images, would leave
        # without noise.
        if arrays.keys() != shapes.keys():
            raise EgressError("the arrays are not exactly those that are trained")
        for name, shape in shapes.items():
            if arrays[name].shape != shape or not np.isfinite(arrays[name]).all():
                raise EgressError(f"array {name!r} has another shape, or values that are not finite")
        # The order of arrays could carry a message of its own, so it is fixed.
        arrays = {name: arrays[name] for name in shapes}
        _check_charge(case)
    elif arrays:
        raise EgressError("an evaluation carries no arrays")
    _check_metrics(case, reply.metrics)
    metrics = {name: reply.metrics[name] for name in sorted(reply.metrics)}
    return ModelUpdate(sender=session.site.name, round=case.asked.round, arrays=arrays, metrics=metrics)


def _check_charge(case: _Case) -> None:
    """Refuse a private round unless it was charged while this question was answered."""
    session = case.session
    if session.private and not case.charges.paid_for_training(case.asked.round, session.config):
        raise EgressError("a private round that the ledger has not paid for")


def _check_metrics(case: _Case, metrics: Mapping[str, Metric]) -> None:
    """Refuse metrics that this reply may not hold, and noised sums that were not charged for meanwhile."""
    session = case.session
    check_metrics(case.kind, session, metrics)
    levels = len(session.store.hierarchy.levels)
    paid = case.charges.paid_for_evaluation
    if NOISED_SUMS in metrics and not paid(case.asked.round, session.config, levels):
        raise EgressError("an evaluation on held-back bags that the ledger has not paid for")


def _statement(case: _Case, reply: PrivacyStatement) -> PrivacyStatement:
    """Return the ledger's own statement, or without privacy one that states no bound."""
    site, round = case.session.site.name, case.asked.round
    if (reply.site, reply.round) != (site, round):
        raise EgressError("the privacy statement speaks for another site or round")
    own = PrivacyStatement(site=site, round=round)
    if case.session.private:
        own = case.charges.statement(round, reply.ledger_head)
    if reply != own:
        raise EgressError("the privacy statement is not what the site's ledger states")
    return own


def _release(case: _Case, reply: ProportionRelease) -> ProportionRelease:
    """Return the release of this data version, exact as the policy allows or noised as in the ledger."""
    session = case.session
    releases = session.site.policy.release_proportions is not ReleaseProportions.NONE
    if session.private and releases:
        own = case.charges.release(session.store)
    else:
        own = release_proportions(session.store, session.version_name)
    if reply != own:
        raise EgressError("the release is not the one of this data version")
    return own


def _rebuild_masked(request: RecordDict, reply: InSession, session: SiteSession, words: int = 0) -> InSession:
    """Return a reply of a secure aggregation made anew, in a fixed order.

    Args:
        request: what the server sent.
        reply: what the handler answered.
        session: of the site.
        words: numbers that are trained, for a masked update.

    Raises:
        EgressError: another site, session, round or length, or both shares of one site.
    """
    asked = from_records(request, _ASKED[type(reply)])
    if (reply.session, reply.round) != (asked.session, asked.round):
        raise EgressError("a reply to another session or round of secure aggregation")
    speaker = reply.sender if isinstance(reply, MaskedUpdate) else getattr(reply, "site", "")
    if speaker != session.site.name:
        raise EgressError("the record speaks for another site")
    match reply:
        case KeyAdvert():
            _check_keys(session, reply)
            return reply.model_copy()
        case SealedShares():
            assert isinstance(asked, SessionPlan)
            return _sealed(reply, set(asked.sites) - {session.site.name})
        case MaskedUpdate():
            if len(reply.vector) != words:
                raise EgressError("not one word for each number that is trained")
            metrics = {name: reply.metrics[name] for name in sorted(reply.metrics)}
            return reply.model_copy(update={"metrics": metrics})
        case SurvivorSignature():
            return SurvivorSignature(
                **{name: getattr(reply, name) for name in SurvivorSignature.model_fields}
            )
        case UnmaskShares():
            assert isinstance(asked, UnmaskRequest)
            return _shares(reply, set(asked.survivors))
        case _:
            raise EgressError("a record that no reply may hold")


def _check_keys(session: SiteSession, reply: KeyAdvert) -> None:
    """Refuse keys for another run, with another certificate than the kit's or of another configuration.

    Raises:
        EgressError: one of them differs; a field that is not checked could carry anything.
    """
    # Imported here, as in ``client.app``: a run in clear loads no cryptography.
    from client.secure_aggregation import find_kit, own_certificate, settings_digest

    if reply.run != session.run_id:
        raise EgressError("keys for another run")
    if reply.certificate != own_certificate(find_kit(session)):
        raise EgressError("a certificate that is not the one of this site's kit")
    if reply.settings != settings_digest(session.config):
        raise EgressError("the digest of another configuration than this run's")


def _sealed(reply: SealedShares, others: set[SiteName]) -> SealedShares:
    if not reply.shares.keys() <= others:
        raise EgressError("a site's own share stays with it, and others go to members of the plan only")
    # The content is sealed, so its length is all that can be checked; any longer text could carry data.
    if any(len(sealed) != SEALED_BYTES for sealed in reply.shares.values()):
        raise EgressError("sealed shares have one length")
    return reply.model_copy(update={"shares": _sorted(reply.shares)})


def _shares(reply: UnmaskShares, survivors: set[SiteName]) -> UnmaskShares:
    # With both secrets of one site, the server could take all masks off that site's update.
    if not reply.self_masks.keys() <= survivors or reply.mask_keys.keys() & survivors:
        raise EgressError("a share of a secret that must not be known")
    if any(len(share) != SHARE_BYTES for share in [*reply.self_masks.values(), *reply.mask_keys.values()]):
        raise EgressError("shares have one length")
    return reply.model_copy(
        update={"self_masks": _sorted(reply.self_masks), "mask_keys": _sorted(reply.mask_keys)}
    )


def _sorted(shares: dict[SiteName, bytes]) -> dict[SiteName, bytes]:
    return {name: shares[name] for name in sorted(shares)}


def _classify(error: Exception, *, private: bool = False) -> SiteError:
    """Return the code under which an exception leaves the site.

    Args:
        error: what was raised.
        private: the question touches data in a private run. What fails there may depend on private data,
            so every failure but those of budget, protocol and configuration, which never do, looks alike.
    """
    match error:
        case _UnknownQuestionError():
            return SiteError.QUESTION
        case BudgetRefused():
            return SiteError.BUDGET
        case RoundTaken():
            return SiteError.ROUND_TAKEN
        case SecureAggregationRefused() | IdentityError():
            return SiteError.SECURE_AGGREGATION
        case ConfigError():
            return SiteError.CONFIGURATION
        # One code for all of these: which kind of failure it was could tell of a single bag, and no noise
        # covers it.
        case _ if private:
            return SiteError.UNANSWERED
        case EgressError():
            return SiteError.EGRESS
        case DataError():
            return SiteError.DATA
        case UserError():
            return SiteError.CONFIGURATION
        case RunError() | FedbagsError():
            return SiteError.TRAINING
        case _:
            return SiteError.INTERNAL
