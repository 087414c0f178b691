"""Rebuild, for the guard, the replies of a secure aggregation that a site may send.

Part of ``client.egress``, which calls it with every such record. Knows no key and no mask: a handler that
went wrong, or was replaced, must not get past it.
"""

from flwr.app import Context, RecordDict

from client.site import SiteConfig
from common.config import RunConfig
from common.errors import EgressError
from common.records import Record, SiteName
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
from common.wire import from_records

SHARE_BYTES = 52
"""As ``common.secure_aggregation.keys``, which a run in clear does not load."""
TAG_BYTES = 16
ASKED: dict[type[Record], type[InSession]] = {
    KeyAdvert: SessionOffer,
    SealedShares: SessionPlan,
    MaskedUpdate: MaskRequest,
    SurvivorSignature: SurvivorList,
    UnmaskShares: UnmaskRequest,
}
"""What each of these replies answers."""


def rebuild_masked(
    request: RecordDict, reply: InSession, site: SiteConfig, run: int, words: int = 0
) -> InSession:
    """Return a reply of a secure aggregation made anew, in a fixed order.

    Args:
        request: what the server sent.
        reply: what the handler answered.
        site: the site's name and policy.
        run: the run's number, which keys are signed for.
        words: numbers that are trained, for a masked update.

    Raises:
        EgressError: another site, session, round or length, or both shares of one site.
    """
    asked = from_records(request, ASKED[type(reply)])
    if (reply.session, reply.round) != (asked.session, asked.round):
        raise EgressError("a reply to another session or round of secure aggregation")
    speaker = reply.sender if isinstance(reply, MaskedUpdate) else getattr(reply, "site", "")
    if speaker != site.name:
        raise EgressError("the record speaks for another site")
    match reply:
        case KeyAdvert():
            if reply.run != run:
                raise EgressError("keys for another run")
            return reply.model_copy()
        case SealedShares():
            assert isinstance(asked, SessionPlan)
            return _sealed(reply, set(asked.sites) - {site.name})
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


def check_keys(context: Context, config: RunConfig, site: SiteConfig, reply: KeyAdvert) -> None:
    """Refuse keys with another certificate than the kit's, or the digest of another configuration.

    Raises:
        EgressError: one of them differs; a field that is not checked could carry anything.
    """
    from client.secure_aggregation import find_kit, own_certificate, settings_digest

    if reply.certificate != own_certificate(find_kit(context, config, site)):
        raise EgressError("a certificate that is not the one of this site's kit")
    if reply.settings != settings_digest(config):
        raise EgressError("the digest of another configuration than this run's")


def _sealed(reply: SealedShares, others: set[SiteName]) -> SealedShares:
    if not reply.shares.keys() <= others:
        raise EgressError("a site's own share stays with it, and others go to members of the plan only")
    # The content is sealed, so its length is all that can be checked; any longer text could carry data.
    if any(len(sealed) != 2 * SHARE_BYTES + TAG_BYTES for sealed in reply.shares.values()):
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
