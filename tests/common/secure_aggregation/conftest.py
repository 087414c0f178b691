"""A consortium of sites that run the protocol without Flower: keys, certificates, and a server's steps."""

import dataclasses
from collections.abc import Callable, Collection
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from client.secure_aggregation import EPHEMERAL
from common.pki import read_node_key
from common.secure_aggregation import member
from common.secure_aggregation.cohort import Limits
from common.secure_aggregation.member import MemberState
from common.secure_aggregation.records import (
    KeyAdvert,
    MaskRequest,
    SealedShares,
    SessionOffer,
    SessionPlan,
    SurvivorList,
    UnmaskRequest,
    Words,
)
from common.secure_aggregation.recovery import MaskedSum
from deploy.simulation.simulate import _ephemeral_kit

SESSION, RUN, ROUND = "ab" * 16, 7, 3
SETTINGS = bytes(32)


@dataclasses.dataclass
class Consortium:
    """Sites, and an honest server that a test can bend."""

    names: list[str]
    authority: str
    node_keys: dict[str, ec.EllipticCurvePrivateKey]
    certificates: dict[str, str]
    root: Path
    limits: Limits = dataclasses.field(default_factory=lambda: Limits(3, 0.8))
    neighbours: int = 0
    threshold_share: float = 0.66
    model: bytes = b"m" * 32
    states: dict[str, MemberState] = dataclasses.field(default_factory=dict)
    adverts: dict[str, KeyAdvert] = dataclasses.field(default_factory=dict)

    def advertise(self, session: str = SESSION, round: int = ROUND) -> None:
        offer = SessionOffer(session=session, round=round)
        for name in self.names:
            advert, self.states[name] = member.advertise(offer, name, RUN, SETTINGS, self.node_keys[name])
            self.adverts[name] = advert.model_copy(update={"certificate": self.certificates[name]})

    def plan(self, adverts: dict[str, KeyAdvert] | None = None) -> SessionPlan:
        listed = self.adverts if adverts is None else adverts
        return SessionPlan(
            session=SESSION,
            round=ROUND,
            threshold_share=self.threshold_share,
            neighbours=self.neighbours,
            clip_range=1.0,
            weights=dict.fromkeys(sorted(listed), 1 / len(listed)),
            adverts=tuple(listed[name] for name in sorted(listed)),
        )

    def share(self, name: str, plan: SessionPlan, at: datetime | None = None) -> SealedShares:
        reply, self.states[name] = member.share(
            self.states[name], plan, self.authority, at or datetime.now(UTC), self.limits
        )
        return reply

    def receive(self, sealed: dict[str, SealedShares]) -> None:
        for name in sealed:
            shares = {sender: reply.shares[name] for sender, reply in sealed.items() if name in reply.shares}
            request = MaskRequest(session=SESSION, round=ROUND, sharing=tuple(sorted(sealed)), shares=shares)
            self.states[name] = member.receive(self.states[name], request, self.model)

    def masked(self, name: str, vector: Words) -> Words:
        out = vector.copy()
        self.states[name] = member.mask(self.states[name], out)
        return out

    def sign(self, name: str, survivors: Collection[str], **changes: object) -> bytes:
        told = SurvivorList(session=SESSION, round=ROUND, survivors=tuple(survivors))
        reply = member.agree(
            self.states[name], told.model_copy(update=changes), self.node_keys[name], self.limits
        )
        return reply.signature

    def agreed(self, survivors: Collection[str]) -> UnmaskRequest:
        """The list of survivors with everybody's signature."""
        signatures = {name: self.sign(name, survivors) for name in survivors}
        return UnmaskRequest(session=SESSION, round=ROUND, survivors=tuple(survivors), signatures=signatures)

    def run(
        self,
        vectors: dict[str, Words],
        *,
        no_shares: Collection[str] = (),
        no_vector: Collection[str] = (),
        no_answer: Collection[str] = (),
    ) -> MaskedSum:
        """A whole session with sites lost after each stage; the unmasked sum."""
        self.advertise()
        plan = self.plan()
        sealed = {name: self.share(name, plan) for name in self.names if name not in no_shares}
        self.receive(sealed)
        masked_sum = MaskedSum(plan, sealed, len(next(iter(vectors.values()))), self.model)
        for name in sealed:
            if name not in no_vector:
                masked_sum.add(name, self.masked(name, vectors[name]))
        request = self.agreed(masked_sum.survivors)
        masked_sum.unmask(
            {
                name: member.unmask(self.states[name], request, self.limits)
                for name in masked_sum.survivors
                if name not in no_answer
            }
        )
        return masked_sum


@pytest.fixture
def consortium(tmp_path: Path) -> Callable[..., Consortium]:
    """Makes a consortium of n sites, whose identities are real certificates."""

    def make(number: int = 5, **changes: object) -> Consortium:
        names = [f"site-{index:02d}" for index in range(number)]
        kits = {name: _ephemeral_kit(tmp_path, name) for name in names}
        made = Consortium(
            names,
            (kits[names[0]] / "ca.crt").read_text(),
            {name: read_node_key(kit / "node.key") for name, kit in kits.items()},
            {name: (kit / "node.crt").read_text() for name, kit in kits.items()},
            tmp_path / EPHEMERAL,
        )
        return dataclasses.replace(made, **changes)

    return make


@pytest.fixture
def vectors() -> Callable[..., dict[str, Words]]:
    """Makes one random vector per site."""

    def make(consortium: Consortium, length: int = 200_000) -> dict[str, Words]:
        generator = np.random.default_rng(5)
        return {name: generator.integers(0, 2**32, length, dtype=np.uint32) for name in consortium.names}

    return make
