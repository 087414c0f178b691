"""The guard's checks of what leaves in a secure aggregation: shares that were asked for, and masked words.

Part of ``client.egress``, which calls it with every such record. Knows no key and no mask: a handler that
went wrong, or was replaced, must not get past it.
"""

from flwr.app import RecordDict

from client.site import SiteConfig
from common.errors import EgressError
from common.messages import ModelUpdate, Record, from_records
from common.secure_aggregation.keys import SHARE_BYTES
from common.secure_aggregation.quantisation import length
from common.secure_aggregation.records import (
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

TAG_BYTES = 16
ASKED: dict[type[Record], type[InSession]] = {
    KeyAdvert: SessionOffer,
    SealedShares: SessionPlan,
    MaskedUpdate: MaskRequest,
    SurvivorSignature: SurvivorList,
    UnmaskShares: UnmaskRequest,
}
"""What each of these replies answers."""


def check_masked(request: RecordDict, reply: InSession, site: SiteConfig, allowed: set[str]) -> None:
    """Check a reply of a secure aggregation.

    Args:
        request: what the server sent.
        reply: what would leave.
        site: the site's name and policy.
        allowed: metrics that may leave in clear from a training.

    Raises:
        EgressError: another site, session or round, both shares of one site, or a metric too many.
    """
    asked = from_records(request, ASKED[type(reply)])
    if (reply.session, reply.round) != (asked.session, asked.round):
        raise EgressError("a reply to another session or round of secure aggregation")
    if isinstance(reply, SealedShares):
        if site.name in reply.shares:
            raise EgressError("a site's own share stays with it")
        if any(len(sealed) != 2 * SHARE_BYTES + TAG_BYTES for sealed in reply.shares.values()):
            raise EgressError("sealed shares have one length")
    elif isinstance(reply, MaskedUpdate):
        _check_masked_update(request, reply, site, allowed)
    elif isinstance(reply, UnmaskShares) and isinstance(asked, UnmaskRequest):
        _check_shares(reply, set(asked.survivors))


def _check_masked_update(
    request: RecordDict, reply: MaskedUpdate, site: SiteConfig, allowed: set[str]
) -> None:
    if reply.sender != site.name:
        raise EgressError("the update speaks for another site")
    if len(reply.vector) > length(from_records(request, ModelUpdate).arrays):
        raise EgressError("more words than the model that the server sent")
    if not reply.metrics.keys() <= allowed & set(site.policy.secure_aggregation.metrics):
        raise EgressError("a metric that the site's policy does not allow beside a masked update")


def _check_shares(reply: UnmaskShares, survivors: set[str]) -> None:
    if not reply.self_masks.keys() <= survivors or reply.mask_keys.keys() & survivors:
        raise EgressError("a share of a secret that must not be known")
    if any(len(share) != SHARE_BYTES for share in [*reply.self_masks.values(), *reply.mask_keys.values()]):
        raise EgressError("shares have one length")
