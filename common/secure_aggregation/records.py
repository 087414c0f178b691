"""What sites and server tell each other in one secure aggregation, in the order in which it is told.

Every record names its session, a random text that the server draws anew for every attempt at a round.
Knows nothing of Flower, of keys' owners, and of what the masked numbers mean.
"""

import hashlib
import json
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BeforeValidator, Field

from common.record import MOST_SITES, Record, SiteName

SESSION = Field(pattern=r"^[0-9a-f]{32}$", description="128 random bits, in hex")
Words = NDArray[np.uint32]
Shares = Annotated[dict[SiteName, Annotated[bytes, Field(max_length=200)]], Field(max_length=MOST_SITES)]
"""By site, what only it can open, or a share."""


class InSession(Record):
    """Base: which attempt at which round a record belongs to."""

    session: str = SESSION
    round: int = Field(ge=1, le=10**9)


class SessionOffer(InSession):
    """Server to site: make keys for this session."""


class KeyAdvert(InSession):
    """Site to server, and on to every other site: fresh public keys, signed with the site's node key."""

    site: SiteName
    run: int = Field(ge=0, lt=2**64)
    settings: bytes = Field(
        min_length=32,
        max_length=32,
        description="SHA-256 of the configuration that this site was told",
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
        """The bytes that the signature is over: everything but itself and the certificate."""
        return canonical(self.model_dump(mode="json", exclude={"signature", "certificate"}))


class SessionPlan(InSession):
    """Server to site: who takes part, with which weight, and how the numbers are scaled."""

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
        """Names of those who take part, sorted."""
        return sorted(advert.site for advert in self.adverts)

    def advert(self, site: str) -> KeyAdvert:
        """The keys of one site."""
        return next(advert for advert in self.adverts if advert.site == site)

    def transcript(self) -> bytes:
        """SHA-256 of all that every site must see alike; it is part of every key that is derived."""
        told = self.model_dump(mode="json", exclude={"adverts"})
        adverts = [advert.signed().hex() for advert in self.adverts]
        return hashlib.sha256(canonical({"plan": told, "adverts": adverts})).digest()


class SealedShares(InSession):
    """Site to server: for each neighbour one ciphertext that only this neighbour can open."""

    site: SiteName
    shares: Shares


class MaskRequest(InSession):
    """Server to site, beside the model: who shared secrets, and what the neighbours among them sealed."""

    sharing: tuple[SiteName, ...] = Field(
        max_length=MOST_SITES, description="whose shares were handed on, the receiver included, sorted"
    )
    shares: Shares


def _words(vector: Any) -> Words:
    if not isinstance(vector, np.ndarray) or vector.dtype != np.uint32 or vector.ndim != 1:
        raise ValueError("a masked vector is one-dimensional uint32")
    view = vector.view()
    view.flags.writeable = False
    return view


class MaskedUpdate(InSession):
    """Site to server: its quantised update plus masks, modulo 2**32, and the metrics that policy allows."""

    sender: SiteName
    vector: Annotated[Words, BeforeValidator(_words)] = Field(default=np.zeros(0, np.uint32), exclude=True)
    metrics: dict[Annotated[str, Field(max_length=60, pattern=r"^[a-z0-9.-]+$")], int | float] = Field(
        default={}, max_length=10
    )


class SurvivorList(InSession):
    """Server to site: whose masked vectors have arrived."""

    survivors: tuple[SiteName, ...] = Field(max_length=MOST_SITES)


class SurvivorSignature(InSession):
    """Site to server, and on to every survivor: the one list of survivors that this site was told, signed."""

    site: SiteName
    signature: bytes = Field(min_length=1, max_length=200, description="ECDSA with the site's node key")


class UnmaskRequest(SurvivorList):
    """Server to site: the list of survivors again, and who has signed it."""

    signatures: Shares = Field(description="by site")


class UnmaskShares(InSession):
    """Site to server: for each neighbour one share, of its self-mask or of its mask key, never of both."""

    site: SiteName
    self_masks: Shares = Field(description="shares for those whose vector is in the sum")
    mask_keys: Shares = Field(description="shares for those whose vector is missing")


def canonical(content: Any) -> bytes:
    """One text for one content, the same on every machine."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
