"""Guard a site as a Flower mod that admits questions and sends only what it encoded itself.

A handler's answer is parsed and compared with the site's own name, hierarchy, bags and ledger and with
the request. What goes out is the guard's own encoding of that, in a fixed order: no byte of the
handler's message leaves. A reply with any other record, key, dtype, shape, metric or value is refused as a
whole and an error goes out in its place. Errors, ours included, leave with a fixed text per kind: the text
of an exception can carry a path or a patient id, so it goes to the site's own log at most.
"""

import logging
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from flwr.app import Context, Error, Message, RecordDict

from client.data.bags import BagStore
from client.disclosure import may_leave
from client.door import QUESTIONS, Handler, Question, admit
from client.figures import check_metrics
from client.ledger.view import Charges
from client.locate import find_site
from client.masked_egress import check_keys, rebuild_masked
from client.opening import open_site, terms_of, trained_shapes
from client.release import name_version, release_proportions
from client.site import ReleaseProportions, SiteConfig, Terms
from common.config import RunConfig
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
    ModelUpdate,
    PrivacyStatement,
    ProportionRelease,
    Record,
    SiteError,
)
from common.secure_aggregation.records import InSession, KeyAdvert, MaskedUpdate
from common.wire import check_only, from_records, to_records

log = logging.getLogger("fedbags.client")


class UnknownQuestionError(FedbagsError):
    """Report a message type, or a request, that is none of the site's questions."""


@dataclass(frozen=True)
class Facts:
    """Hold the site's own facts and the request, with which a reply is compared."""

    kind: str
    question: Question
    request: RecordDict
    context: Context
    config: RunConfig
    folder: Path
    site: SiteConfig
    terms: Terms
    charges: Charges
    """What the site's ledger was charged while the question was answered."""

    @property
    def private(self) -> bool:
        """Return whether the run is private."""
        return self.config.dp.epsilon > 0

    @cached_property
    def store(self) -> BagStore:
        """Return the site's bags."""
        return open_site(self.context)[1]

    @cached_property
    def asked(self) -> ModelUpdate:
        """Return the model that the server sent."""
        return from_records(self.request, ModelUpdate)

    @cached_property
    def training(self) -> int:
        """Return the number of bags that are trained on."""
        return len(self.store.split(self.config.train.held_back, self.config.seed)[0])

    @property
    def held_back(self) -> int:
        """Return the number of bags that are held back."""
        return len(self.store) - self.training

    def allowed_metrics(self) -> frozenset[str]:
        """Return the names of the metrics that this reply may hold."""
        return may_leave(
            self.kind, self.config, self.site, self.terms, training=self.training, held_back=self.held_back
        )


def guard(message: Message, context: Context, call_next: Handler) -> Message:
    """Admit a question, have it answered, and send the guard's own encoding of the answer.

    This is a Flower mod.
    """
    kind, private = "a question", False
    try:
        # Inside the try, like all that follows: an exception that escaped to Flower would leave with its
        # text.
        facts = _gather(message, context)
        # Only from here on is the type one of ours: a text that the server made up must not enter the
        # site's log.
        kind, private = facts.kind, facts.private and bool(facts.question.touches)
        admit(facts.question, facts.config, facts.site, facts.terms)
        # The ledger's length was read before this line, so that only charges made for this very answer
        # count.
        answer = call_next(message, context).content
        records = to_records(*rebuild(facts, answer), transport=facts.config.federation.transport)
        return Message(records, reply_to=message)
    except Exception as error:
        code = classify(error, private=private)
        # The class alone: even the site's log lines carry no path, patient id or label. What a secure
        # aggregation is refused for has none of them in it, and the site must know.
        told = (
            str(error)
            if code in (SiteError.SECURE_AGGREGATION, SiteError.ROUND_TAKEN)
            else type(error).__name__
        )
        log.error(
            "%(phase)s refused: %(reason)s (%(error)s)",
            {"phase": kind, "reason": SITE_ERRORS[code], "error": told},
        )
        return Message(Error(int(code), SITE_ERRORS[code]), reply_to=message)


def _gather(message: Message, context: Context) -> Facts:
    """Gather the facts about a question before it is answered.

    Raises:
        UnknownQuestionError: the site has no such question, or the request holds other records.
    """
    kind = message.metadata.message_type
    question = QUESTIONS.get(kind)
    if question is None:
        raise UnknownQuestionError("the site does not answer messages of this type")
    try:
        check_only(message.content, *question.asks)
    except MessageError as error:
        raise UnknownQuestionError("the request does not hold the records of its type") from error
    config, folder = RunConfig.from_flat(context.run_config), find_site(context)
    site = SiteConfig.load(folder)
    return Facts(
        kind=kind,
        question=question,
        request=message.content,
        context=context,
        config=config,
        folder=folder,
        site=site,
        terms=terms_of(context, site),
        charges=Charges.before(context, config, site, folder),
    )


def rebuild(facts: Facts, reply: RecordDict) -> list[Record]:
    """Return the records that a reply may consist of, made anew from the handler's answer.

    Raises:
        EgressError: the reply is anything but an answer to this question; names keys and shapes only.
    """
    kinds = facts.question.answers_in(facts.config)
    try:
        check_only(reply, *kinds)
        return [_rebuilt(facts, reply, from_records(reply, kind)) for kind in kinds]
    except MessageError as error:
        raise EgressError(str(error)) from error


def _rebuilt(facts: Facts, reply: RecordDict, record: Record) -> Record:
    match record:
        case ModelUpdate():
            return _update(facts, record)
        case PrivacyStatement():
            return _statement(facts, record)
        case ProportionRelease():
            return _release(facts, record)
        case InSession():
            words = 0
            if isinstance(record, MaskedUpdate):
                check_metrics(facts, record.metrics)
                _check_charge(facts)
                shapes = trained_shapes(facts.config, facts.store.hierarchy).values()
                words = sum(math.prod(shape) for shape in shapes)
            if isinstance(record, KeyAdvert):
                check_keys(facts.context, facts.config, facts.site, record)
            return rebuild_masked(facts.request, record, facts.site, facts.context.run_id, words)
        case _:
            raise EgressError("a record that no reply may hold")


def _update(facts: Facts, reply: ModelUpdate) -> ModelUpdate:
    """Return the update with trained arrays in the model's order and metrics in the order of their names."""
    if (reply.sender, reply.round) != (facts.site.name, facts.asked.round):
        raise EgressError("the update speaks for another site or round")
    arrays = reply.arrays
    if facts.kind == "train":
        if facts.site.policy.secure_aggregation.required or facts.config.secure_aggregation.enabled:
            raise EgressError("this site's updates leave masked only")
        shapes = trained_shapes(facts.config, facts.store.hierarchy)
        # Exactly the trained arrays: one more, such as a buffer with statistics of images, would leave
        # without noise.
        if arrays.keys() != shapes.keys():
            raise EgressError("the arrays are not exactly those that are trained")
        for name, shape in shapes.items():
            if arrays[name].shape != shape or not np.isfinite(arrays[name]).all():
                raise EgressError(f"array {name!r} has another shape, or values that are not finite")
        # The order of arrays could carry a message of its own, so it is fixed.
        arrays = {name: arrays[name] for name in shapes}
        _check_charge(facts)
    elif arrays:
        raise EgressError("an evaluation carries no arrays")
    check_metrics(facts, reply.metrics)
    metrics = {name: reply.metrics[name] for name in sorted(reply.metrics)}
    return ModelUpdate(sender=facts.site.name, round=facts.asked.round, arrays=arrays, metrics=metrics)


def _check_charge(facts: Facts) -> None:
    """Refuse a private round unless it was charged while this question was answered."""
    if facts.private and not facts.charges.paid_for_training(facts.asked.round, facts.config):
        raise EgressError("a private round that the ledger has not paid for")


def _statement(facts: Facts, reply: PrivacyStatement) -> PrivacyStatement:
    """Return the ledger's own statement, or without privacy one that states no bound."""
    if (reply.site, reply.round) != (facts.site.name, facts.asked.round):
        raise EgressError("the privacy statement speaks for another site or round")
    own = PrivacyStatement(site=facts.site.name, round=facts.asked.round)
    if facts.private:
        own = facts.charges.statement(facts.asked.round, reply.ledger_head)
    if reply != own:
        raise EgressError("the privacy statement is not what the site's ledger states")
    return own


def _release(facts: Facts, reply: ProportionRelease) -> ProportionRelease:
    """Return the release of this data version, exact as the policy allows or noised as in the ledger."""
    releases = facts.site.policy.release_proportions is not ReleaseProportions.NONE
    if facts.private and releases:
        own = facts.charges.release(facts.store)
    else:
        own = release_proportions(facts.store, name_version(facts.store, facts.folder))
    if reply != own:
        raise EgressError("the release is not the one of this data version")
    return own


def classify(error: Exception, *, private: bool = False) -> SiteError:
    """Return the code under which an exception leaves the site.

    Args:
        error: what was raised.
        private: the question touches data in a private run. What fails there may depend on private data,
            so every failure but those of budget, protocol and configuration, which never do, looks alike.
    """
    match error:
        case UnknownQuestionError():
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
