"""The guard at a site's door: a Flower mod that lets out only what the contract and the policy allow.

A reply with any other record, key, dtype, shape or metric is refused as a whole and an error goes out in
its place. Errors, ours included, leave with a fixed text per kind: the text of an exception can carry a
path or a patient id, so it goes to the site's own log at most, never to the server.
"""

import logging
from collections.abc import Callable

from flwr.app import Context, Error, Message, RecordDict

from client.locate import find_site
from client.refusal import BudgetRefused
from client.site import SiteConfig
from common.config import RunConfig
from common.errors import ConfigError, DataError, EgressError, FedbagsError, RunError, UserError
from common.messages import (
    SITE_ERRORS,
    MessageError,
    ModelUpdate,
    PrivacyStatement,
    ProportionRelease,
    Record,
    SiteError,
    check_only,
    from_records,
)

log = logging.getLogger("fedbags.client")

Handler = Callable[[Message, Context], Message]


UNCOVERED_BY_DP = {"num-bags", "confusion"}
"""Metrics that may leave a private run. They are not covered by its epsilon, and the report says so: the
number of bags, and counts on labelled test images, which are never trained on."""

EXPECTED: dict[str, tuple[type[Record], ...]] = {
    "query.proportions": (ProportionRelease,),
    "train": (ModelUpdate, PrivacyStatement),
    "evaluate.bags": (ModelUpdate,),
    "evaluate.test": (ModelUpdate,),
}
"""The records that each kind of reply holds, all of them and no other."""


def guard(message: Message, context: Context, call_next: Handler) -> Message:
    """Flower mod: run the handler, check its reply, and replace a bad one by an error."""
    kind = message.metadata.message_type
    try:
        site = SiteConfig.load(find_site(context))
        private = RunConfig.from_flat(context.run_config).dp.epsilon > 0
        reply = call_next(message, context)
        check_reply(kind, message.content, reply.content, site, private=private)
    except Exception as error:
        code = classify(error)
        # The class alone: even the site's log lines carry no path, patient id or label.
        log.error(
            "%(phase)s refused: %(reason)s (%(error)s)",
            {"phase": kind, "reason": SITE_ERRORS[code], "error": type(error).__name__},
        )
        return Message(Error(int(code), SITE_ERRORS[code]), reply_to=message)
    return reply


def allowed_metrics(site: SiteConfig, *, private: bool) -> set[str]:
    """The metrics that may leave: those of the policy and, in a private run, only those without training
    data in them (losses and held-back figures come from private bags, and no noise covers them)."""
    allowed = set(site.policy.metrics)
    return allowed & UNCOVERED_BY_DP if private else allowed


def check_reply(
    kind: str, request: RecordDict, reply: RecordDict, site: SiteConfig, *, private: bool = False
) -> None:
    """Check that a reply holds what this kind of message may carry, and nothing else.

    Args:
        kind: the Flower message type.
        request: what the server sent; an update may only hold arrays that it sent, in their shapes.
        reply: what would leave.
        site: the site's name and policy.
        private: the run promises differential privacy.

    Raises:
        EgressError: anything else than the contract allows; names keys and shapes only.
    """
    try:
        kinds = EXPECTED[kind]
        check_only(reply, *kinds)
        for record in kinds:
            content = from_records(reply, record)
            if isinstance(content, ModelUpdate):
                sent = from_records(request, ModelUpdate)
                _check_update(kind, sent, content, site, allowed_metrics(site, private=private))
            elif getattr(content, "site", site.name) != site.name:
                raise EgressError("the record speaks for another site")
            elif isinstance(content, ProportionRelease):
                _check_release(content, site)
                if private and not content.is_private:
                    raise EgressError("exact counts in a private run")
    except MessageError as error:
        raise EgressError(str(error)) from error
    except KeyError as error:
        raise EgressError(f"no reply is defined for messages of type {error}") from error


def _check_update(
    kind: str, sent: ModelUpdate, reply: ModelUpdate, site: SiteConfig, allowed: set[str]
) -> None:
    if reply.sender != site.name:
        raise EgressError("the update speaks for another site")
    if kind != "train" and reply.arrays:
        raise EgressError(f"a reply to {kind} carries no arrays")
    for name, array in reply.arrays.items():
        if name not in sent.arrays:
            raise EgressError("an array that the server did not send")
        if array.shape != sent.arrays[name].shape:
            raise EgressError(f"array {name!r} has shape {array.shape}")
    for name in reply.metrics:
        if name.partition(".")[0] not in allowed:
            raise EgressError("a metric that the site's policy does not allow")


def _check_release(release: ProportionRelease, site: SiteConfig) -> None:
    if release.granularity != site.policy.release_proportions.value:
        raise EgressError(f"proportions released {release.granularity}, which policy does not allow")
    rows = {"none": 0, "total": 1, "per-bag": release.bags}[release.granularity]
    if len(release.leaf_counts) != rows:
        raise EgressError(f"{len(release.leaf_counts)} rows of counts for {release.granularity}")
    if release.granularity != "per-bag" and release.bag_sizes:
        raise EgressError("bag sizes leave only with counts per bag")


def classify(error: Exception) -> SiteError:
    """The code under which an exception leaves the site."""
    match error:
        case BudgetRefused():
            return SiteError.BUDGET
        case EgressError():
            return SiteError.EGRESS
        case DataError():
            return SiteError.DATA
        case ConfigError() | UserError():
            return SiteError.CONFIGURATION
        case RunError() | FedbagsError():
            return SiteError.TRAINING
        case _:
            return SiteError.INTERNAL
