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
from client.site import PrivateMetrics, SiteConfig
from common.config import RunConfig
from common.config_tables import DPConfig
from common.errors import (
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
from common.secure_aggregation.records import (
    InSession,
    KeyAdvert,
    MaskedUpdate,
    SealedShares,
    SurvivorSignature,
    UnmaskShares,
)

log = logging.getLogger("fedbags.client")

Handler = Callable[[Message, Context], Message]


UNCOVERED_BY_DP = {"num-bags", "confusion"}
"""Metrics that may leave a private run. They are not covered by its epsilon, and the report says so: the
number of bags, and counts on labelled test images, which are never trained on."""

NOISED = {"noised-bags-tv", "held-back-bags"}
"""What may leave a private run of a look at the held-back bags, where ``private-metrics`` is "noise": sums
with noise that the ledger has paid for (common/privacy/looks.py), and the number of bags, which is public."""

EXPECTED: dict[str, tuple[type[Record], ...]] = {
    "query.proportions": (ProportionRelease,),
    "train": (ModelUpdate, PrivacyStatement),
    "train.masked": (MaskedUpdate, PrivacyStatement),
    "query.keys": (KeyAdvert,),
    "query.shares": (SealedShares,),
    "query.survivors": (SurvivorSignature,),
    "query.unmask": (UnmaskShares,),
    "evaluate.bags": (ModelUpdate,),
    "evaluate.test": (ModelUpdate,),
}
"""The records that each kind of reply holds, all of them and no other."""

EXPECTED_PRIVATE = {**EXPECTED, "evaluate.bags": (ModelUpdate, PrivacyStatement)}
"""The same in a private run, where a look spends budget."""


def guard(message: Message, context: Context, call_next: Handler) -> Message:
    """Flower mod: run the handler, check its reply, and replace a bad one by an error."""
    kind = message.metadata.message_type
    try:
        site = SiteConfig.load(find_site(context))
        dp = RunConfig.from_flat(context.run_config).dp
        reply = call_next(message, context)
        check_reply(kind, message.content, reply.content, site, dp)
    except Exception as error:
        code = classify(error)
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
    return reply


def allowed_metrics(kind: str, site: SiteConfig, *, private: bool) -> set[str]:
    """The metrics that may leave: those of the policy and, in a private run, only those without training
    data in them (losses and held-back figures come from private bags, and no noise covers them), and the
    noised ones where the policy has them sent."""
    allowed = set(site.policy.metrics)
    if not private:
        return allowed
    noised = kind == "evaluate.bags" and site.policy.private_metrics is PrivateMetrics.NOISE
    return (allowed & UNCOVERED_BY_DP) | (NOISED if noised else set())


def check_reply(
    kind: str, request: RecordDict, reply: RecordDict, site: SiteConfig, dp: DPConfig | None = None
) -> None:
    """Check that a reply holds what this kind of message may carry, and nothing else.

    Args:
        kind: the Flower message type.
        request: what the server sent; an update may only hold arrays that it sent, in their shapes.
        reply: what would leave.
        site: the site's name and policy.
        dp: what the run promises; it is private where epsilon is above 0.

    Raises:
        EgressError: anything else than the contract allows; names keys and shapes only.
    """
    private = dp is not None and dp.epsilon > 0
    try:
        kinds = (EXPECTED_PRIVATE if private else EXPECTED)[kind]
        check_only(reply, *kinds)
        for record in kinds:
            content = from_records(reply, record)
            if isinstance(content, ModelUpdate):
                sent = from_records(request, ModelUpdate)
                _check_update(kind, sent, content, site, allowed_metrics(kind, site, private=private))
                if dp is not None and "noised-bags-tv" in content.metrics:
                    _check_look(content, from_records(reply, PrivacyStatement), dp)
            elif getattr(content, "site", site.name) != site.name:
                raise EgressError("the record speaks for another site")
            elif isinstance(content, InSession):
                # Imported here: a run in clear loads no cryptography.
                from client.masked_egress import check_masked

                check_masked(request, content, site, allowed_metrics(kind, site, private=private))
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
    if reply.arrays and site.policy.secure_aggregation.required:
        raise EgressError("this site's updates leave masked only")
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


def _check_look(update: ModelUpdate, statement: PrivacyStatement, dp: DPConfig) -> None:
    """Noised sums are whole steps, and the ledger has paid for each of them at the scale of the run."""
    sums = update.metrics["noised-bags-tv"]
    if not isinstance(sums, tuple) or not all(isinstance(value, int) for value in sums):
        raise EgressError("a figure of held-back bags without noise")
    paid = [event for event in statement.events if event.get("scale") == dp.metrics_scale]
    if len(paid) < len(sums):
        raise EgressError("figures of held-back bags that the ledger has not paid for")


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
        case RoundTaken():
            return SiteError.ROUND_TAKEN
        case SecureAggregationRefused() | IdentityError():
            return SiteError.SECURE_AGGREGATION
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
