"""Define the records that sites and server exchange in one secure aggregation, in their order.

Every record names its session, a random text that the server draws anew for every attempt at a round. This
module knows nothing of Flower, of keys' owners, and of the meaning of the masked numbers.
"""

import hashlib
import json
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BeforeValidator, Field

from common.records import MOST_SITES, Record, SiteName

SHARE_BYTES = 52
"""Of a 32-byte secret: a 4-byte index and three blocks of 16 (Flower pads to whole blocks, always)."""
SEALED_BYTES = 2 * 32 + 2 * SHARE_BYTES + 16
"""What a site seals for a neighbour: a digest of each of two shares in clear, both shares, and a tag."""
_SESSION = Field(pattern=r"^[0-9a-f]{32}$", description="128 random bits, in hex")
Words = NDArray[np.uint32]
_Shares = Annotated[dict[SiteName, Annotated[bytes, Field(max_length=200)]], Field(max_length=MOST_SITES)]
"""By site, what only it can open, or a share."""


class InSession(Record):
    """Serve as the base of records that belong to one session, which is one attempt at a round."""

    session: str = _SESSION
    round: int = Field(ge=1, le=10**9)


class SessionOffer(InSession):
    """Ask a site to make keys for this session.

    The server sends it to each site.
    """


class KeyAdvert(InSession):
    """Announce a site's fresh public keys, signed with the site's node key.

    The site sends it to the server, which passes it on to every other site.
    """

    site: SiteName
    run: int = Field(ge=0, lt=2**64)
    settings: bytes = Field(
        min_length=32, max_length=32, description="SHA-256 of the configuration that this site was given"
    )
    seal_key: bytes = Field(min_length=32, max_length=32, description="X25519, for sealing shares")
    mask_key: bytes = Field(min_length=32, max_length=32, description="X25519, for pairwise masks")
    commitment: bytes = Field(min_length=32, max_length=32, description="SHA-256 of the self-mask's seed")
    signature: bytes = Field(b"", max_length=200, description="ECDSA of ``signed()``")
    certificate: str = Field(
        "",
        max_length=10_000,
        pattern=r"^[A-Za-z0-9+/= \n-]*$",
        description="PEM; the server adds it where empty",
    )

    def signed(self) -> bytes:
        """Return the bytes that are signed, which are all but the signature and the certificate."""
        return canonical(self.model_dump(mode="json", exclude={"signature", "certificate"}))


class SessionPlan(InSession):
    """State the participants, their weights, and the scaling of the numbers.

    The server sends it to each site.
    """

    threshold_share: float = Field(gt=0.5, le=1, description="of a site and its neighbours, to unmask")
    neighbours: int = Field(ge=0, multiple_of=2, description="per site; 0: all")
    clip_range: float = Field(
        ge=0.01, le=1e6, description="each coordinate of an update is clipped to +-this"
    )
    weights: dict[SiteName, Annotated[float, Field(ge=0, le=1)]] = Field(
        max_length=MOST_SITES, description="by site; they sum to 1"
    )
    adverts: tuple[KeyAdvert, ...] = Field(
        max_length=MOST_SITES, description="in the order of the site names"
    )

    @property
    def sites(self) -> list[str]:
        """Return the names of the participants, sorted."""
        return sorted(advert.site for advert in self.adverts)

    def advert(self, site: str) -> KeyAdvert:
        """Return the keys of one site."""
        return next(advert for advert in self.adverts if advert.site == site)

    def transcript(self) -> bytes:
        """Return the SHA-256 of all that every site must see alike."""
        plan = self.model_dump(mode="json", exclude={"adverts"})
        adverts = [advert.signed().hex() for advert in self.adverts]
        # The transcript is part of every derived key: sites that were sent different lists, weights or
        # ranges cannot open each other's shares. Certificates are left out because the server may add them.
        return hashlib.sha256(canonical({"plan": plan, "adverts": adverts})).digest()


class SealedShares(InSession):
    """Hold two digests of shares and one ciphertext for each neighbour, which only this neighbour can open.

    A site sends it to the server.
    """

    site: SiteName
    shares: _Shares


class MaskRequest(InSession):
    """State the sites that shared secrets, and pass on the shares sealed for the receiver.

    The server sends it to a site together with the model.
    """

    sharing: tuple[SiteName, ...] = Field(
        max_length=MOST_SITES, description="whose shares were handed on, the receiver included, sorted"
    )
    shares: _Shares


def _words(vector: Any) -> Words:
    if not isinstance(vector, np.ndarray) or vector.dtype != np.uint32 or vector.ndim != 1:
        raise ValueError("a masked vector is one-dimensional uint32")
    view = vector.view()
    view.flags.writeable = False
    return view


class MaskedUpdate(InSession):
    """Hold a site's quantised update plus masks, modulo 2**32, and the metrics that policy allows.

    A site sends it to the server.
    """

    sender: SiteName
    vector: Annotated[Words, BeforeValidator(_words)] = Field(default=np.zeros(0, np.uint32), exclude=True)
    metrics: dict[Annotated[str, Field(max_length=60, pattern=r"^[a-z0-9.-]+$")], int | float] = Field(
        default={}, max_length=10
    )


class SurvivorList(InSession):
    """List the survivors, which are the sites whose masked vectors have arrived.

    The server sends it to each site.
    """

    survivors: tuple[SiteName, ...] = Field(max_length=MOST_SITES)


class SurvivorSignature(InSession):
    """Sign the one list of survivors that this site was given.

    The site sends it to the server, which passes it on to every survivor.
    """

    site: SiteName
    signature: bytes = Field(min_length=1, max_length=200, description="ECDSA with the site's node key")


class UnmaskRequest(SurvivorList):
    """Repeat the list of survivors, with the signatures over it.

    The server sends it to each survivor.
    """

    signatures: _Shares = Field(description="by site")


class UnmaskShares(InSession):
    """Hold one share for each neighbour, of its self-mask or of its mask key, never of both.

    A site sends it to the server.
    """

    site: SiteName
    # Both secrets of one site together would take all masks off its vector.
    self_masks: _Shares = Field(description="shares for those whose vector is in the sum")
    mask_keys: _Shares = Field(description="shares for those whose vector is missing")


def canonical(content: Any) -> bytes:
    """Return the one JSON text of a content, the same on every machine."""
    # Signatures and keys are made over this text, so two machines must agree on every byte of it.
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
