"""Play a site's part in secure aggregation, one message after the other.

The mathematics are in ``common.secure_aggregation.member``. Here are the site's files (node key and CA
certificate of its kit), and its secrets between two messages: they wait in ``Context.state``, which a
SuperNode keeps in memory and never sends (``flwr.supernode.nodestate`` has no other kind). Knows nothing of
models beyond their arrays.

A replay guard stands with them. Flower runs every message in a process of its own, two at once if a server
sends two, and each gets the node's state as it was before. So a rule such as "one mask, one vector" is kept
in a small file, where the first process wins: a row of SQLite whose key is unique.
"""

import hashlib
import logging
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from numpy.typing import NDArray

from client.session import SiteSession
from client.site import KIT
from common.config import RunConfig
from common.errors import ConfigError, RoundTaken, RunError, SecureAggregationRefused, require_file
from common.pki import read_node_key
from common.records import FloatArray, ModelUpdate
from common.secure_aggregation import member
from common.secure_aggregation.cohort import Limits
from common.secure_aggregation.member import MemberState
from common.secure_aggregation.quantisation import Grid, digest, quantise, to_words
from common.secure_aggregation.records import (
    InSession,
    KeyAdvert,
    MaskRequest,
    SealedShares,
    SessionOffer,
    SessionPlan,
    SurvivorList,
    SurvivorSignature,
    UnmaskRequest,
    UnmaskShares,
    Words,
    canonical,
)
from common.wire import remember, remembered

log = logging.getLogger("fedbags.client")

CA_FILE, KEY_FILE, CERTIFICATE_FILE = "ca.crt", "node.key", "node.crt"
"""Files of a site's kit."""
EPHEMERAL = "throw-away-identities"
"""The folder, in the run folder of a simulation, with a kit for each of its sites."""
_STATE = "secure-aggregation"
_REPLAY_GUARD_FILE = "secure-aggregation.sqlite"
_WAIT_SECONDS = 30.0
"""How long to wait for another process that writes the replay guard."""
_MOST_CLIPPED = 1e-3
"""Largest share beyond the clip range of an update without noise. With settings that cut every number, each
would be plus or minus the range times the site's weight, and their sum would tell every site's sign."""


@dataclass(frozen=True)
class Member:
    """Stand for one site in the session that its state belongs to."""

    node: SiteSession
    kit: Path
    done: Path
    """The replay guard, a file of the steps that the site has done."""

    @classmethod
    def open(cls, session: SiteSession) -> Self:
        """Return the member that this node is.

        Raises:
            ConfigError: secure aggregation is off in this run, or a real node has no kit.
        """
        if not session.config.secure_aggregation.enabled:
            raise ConfigError("secure aggregation is off in this run (secure-aggregation.enabled)")
        return cls(session, find_kit(session), _replay_guard(session))

    @property
    def limits(self) -> Limits:
        """Return the stricter of the site's demands and the run's."""
        own = self.node.site.policy.secure_aggregation
        fewest = max(own.minimum_sites, self.node.config.secure_aggregation.minimum_sites)
        return Limits(fewest, own.largest_share, own.fewest_neighbours)

    def advertise(self, offer: SessionOffer) -> KeyAdvert:
        """Make fresh keys, signed with the node key.

        Raises:
            RoundTaken: the site has unmasked a sum of this round already.
        """
        self._refuse_second_sum(offer)
        _do_once(self.done, f"{offer.session}/keys")
        advert, state = member.advertise(
            offer, self.node.site.name, self.node.run_id, settings_digest(self.node.config), self._node_key()
        )
        self._keep(state)
        return advert.model_copy(update={"certificate": own_certificate(self.kit)})

    def share(self, plan: SessionPlan) -> SealedShares:
        """Seal shares for the neighbours, once all keys are verified and the plan is the run's."""
        authority = require_file(
            self.kit / CA_FILE, "the consortium's CA certificate", "It came with the site's kit."
        )
        run = self.node.config.secure_aggregation
        # The range of shared noise follows from the bags of all sites. A wrong one spoils the sum and tells
        # nothing: what is summed is clipped and noised before it meets the grid.
        clip_range = plan.clip_range if self.node.config.shares > 1 else run.clip_range
        if (plan.threshold_share, plan.neighbours, plan.clip_range) != (
            run.threshold_share,
            run.neighbours,
            clip_range,
        ):
            raise SecureAggregationRefused(
                "a plan with another threshold-share, neighbours or clip-range than the run's configuration"
            )
        _do_once(self.done, f"{plan.session}/shares")
        reply, state = member.share(
            self._state(), plan, authority.read_text(encoding="ascii"), datetime.now(UTC), self.limits
        )
        self._keep(state)
        return reply

    @property
    def session(self) -> str:
        """Return the session that the site's secrets belong to."""
        return self._state().session

    def receive(self, request: MaskRequest, sent: ModelUpdate) -> None:
        """Take in the neighbours' shares, and record that this model is trained and masked.

        Raises:
            RoundTaken: the site has unmasked a sum of this round, or begun it with another model.
        """
        if sent.round != request.round:
            raise SecureAggregationRefused("a model of one round with the shares of another")
        self._refuse_second_sum(request)
        model = digest(sent.arrays)
        self._once_per_round(f"{self._round(request)}/model", model.hex(), "for another model")
        _do_once(self.done, f"{request.session}/masks")
        state = member.receive(self._state(), request, model)
        for peer in sorted(request.shares.keys() - state.held.keys()):
            named = {"round": request.round, "site": peer}
            log.warning("round %(round)d: the shares that %(site)s sealed for this site do not open", named)
        self._keep(state)

    def mask(self, sent: dict[str, FloatArray], trained: dict[str, FloatArray]) -> Words:
        """Return the update as masked words, and erase the masks from the state.

        Raises:
            RunError: the update is not finite, or too much of it is beyond the clip range.
        """
        state = self._state()
        plan = state.agreed()
        weight = plan.weights[self.node.site.name]
        # Signs of a private update are noised like the rest of it, and noise of many rounds may be large.
        most_clipped = 1.0 if self.node.config.dp.epsilon else _MOST_CLIPPED
        words = quantise(sent, trained, Grid(plan.clip_range, len(plan.sites)), weight, most_clipped)
        self._keep(member.mask(state, words))
        return words

    @property
    def steps_per_unit(self) -> float:
        """Return the steps of the session's grid in a unit of what is summed."""
        plan = self._state().agreed()
        return Grid(plan.clip_range, len(plan.sites)).scale

    def mask_sum(self, steps: NDArray[np.int64]) -> Words:
        """Return a noised sum of gradients as masked words, and erase the masks from the state.

        Args:
            steps: whole numbers of the grid, with this site's share of the noise.
        """
        words = to_words(steps)
        self._keep(member.mask(self._state(), words))
        return words

    def agree(self, request: SurvivorList) -> SurvivorSignature:
        """Sign the list of survivors.

        Asked again, the site signs the same list and no other.
        """
        answer = member.agree(self._state(), request, self._node_key(), self.limits)
        self._sign_one_list(request)
        return answer

    def unmask(self, request: UnmaskRequest) -> UnmaskShares:
        """Give one share per neighbour whose shares it holds.

        Asked again, it gives the same ones, and for other survivors none.

        Raises:
            RoundTaken: it has given shares for another sum of this round.
        """
        answer = member.unmask(self._state(), request, self.limits)
        self._sign_one_list(request)
        self._once_per_round(f"{self._round(request)}/sum", request.session, "in another session")
        return answer

    def _sign_one_list(self, request: SurvivorList) -> None:
        listed = hashlib.sha256(canonical(sorted(request.survivors))).hexdigest()
        _do_once(self.done, f"{request.session}/survivors", listed)

    def _refuse_second_sum(self, request: InSession) -> None:
        """Refuse before any work and any budget what ``unmask`` would refuse in the end."""
        if _done_with(self.done, f"{self._round(request)}/sum") is not None:
            raise RoundTaken(f"this site has given its part of a sum of round {request.round} already")

    def _once_per_round(self, key: str, content: str, otherwise: str) -> None:
        try:
            _do_once(self.done, key, content)
        except SecureAggregationRefused as error:
            raise RoundTaken(f"this site has done its part of this round {otherwise} already") from error

    def _round(self, request: InSession) -> str:
        return f"run {self.node.run_id}/round {request.round}"

    def _node_key(self) -> EllipticCurvePrivateKey:
        return read_node_key(self.kit / KEY_FILE)

    def _state(self) -> MemberState:
        state = remembered(self.node.state, _STATE, MemberState)
        if state is None:
            raise SecureAggregationRefused("this site has no keys (any more): its node was started again")
        return state

    def _keep(self, state: MemberState) -> None:
        remember(self.node.state, _STATE, state)


def find_kit(session: SiteSession) -> Path:
    """Return the folder with node.key and ca.crt.

    It is the kit that the node names, or an ephemeral one in a simulation.

    Raises:
        ConfigError: a real node that names none, or a simulation whose sites have none in the run folder. A
            site does not take part without an identity.
    """
    if session.kit is not None:
        return session.kit
    if not session.simulated:
        raise ConfigError(
            f"secure aggregation needs the site's kit: start the SuperNode with --node-config '{KIT}=\"...\"'"
        )
    kit = _run_folder(session) / EPHEMERAL / session.site.name
    if not kit.is_dir():
        raise ConfigError(
            "a simulation with secure aggregation needs identities for its sites, which `fedbags simulate` "
            "makes in the run folder"
        )
    return kit


def own_certificate(kit: Path) -> str:
    """Return the certificate in a kit as PEM, or an empty text where there is none."""
    path = kit / CERTIFICATE_FILE
    return path.read_text(encoding="ascii") if path.is_file() else ""


def settings_digest(config: RunConfig) -> bytes:
    """Return the SHA-256 of a run's configuration, 32 bytes that are alike where the configuration is."""
    settings: dict[str, Any] = config.to_flat()
    if config.shares > 1:
        # Every site finds the common noise itself, so all must find it by the same accountant.
        settings = {**settings, "accountant": version("dp-accounting")}
    return hashlib.sha256(canonical(settings)).digest()


def _replay_guard(session: SiteSession) -> Path:
    """Return the replay guard's file, which lies with the site's data or under a simulated run."""
    if not session.simulated:
        return session.folder / _REPLAY_GUARD_FILE
    path = _run_folder(session) / "sites" / session.folder.name / _REPLAY_GUARD_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _run_folder(session: SiteSession) -> Path:
    """Return the folder of the run, which its simulated sites share and no other run does."""
    if session.config.run_dir:
        return Path(session.config.run_dir)
    return Path.home() / ".fedbags" / "runs" / session.run_name


def _do_once(path: Path, key: str, content: str | None = None) -> None:
    """Record a step as done for good, or refuse it if it was done before.

    With ``content``, the step may be repeated with the same content, and with no other.

    Raises:
        SecureAggregationRefused: it was done before (with something else).
        RunError: the file cannot be written; nothing may be done then.
    """
    with _open(path) as db:
        # One statement decides: reading first and writing then would let two processes both find the key
        # free.
        made = db.execute("INSERT OR IGNORE INTO claims VALUES (?, ?)", (key, content)).rowcount
        kept = db.execute("SELECT content FROM claims WHERE key = ?", (key,)).fetchone()
    if not made and (content is None or kept != (content,)):
        raise SecureAggregationRefused("asked a second time for what is done once")


def _done_with(path: Path, key: str) -> str | None:
    """Return the content with which a step was done, or None if it was not.

    Raises:
        RunError: the file cannot be read.
    """
    with _open(path) as db:
        kept = db.execute("SELECT content FROM claims WHERE key = ?", (key,)).fetchone()
    return kept[0] if kept else None


@contextmanager
def _open(path: Path) -> Iterator[sqlite3.Connection]:
    try:
        with closing(sqlite3.connect(path, timeout=_WAIT_SECONDS)) as db, db:
            # A step that a power cut undoes could be done again, and a second answer under the same
            # masks gives the first away.
            db.execute("PRAGMA synchronous = EXTRA")
            db.execute("CREATE TABLE IF NOT EXISTS claims (key TEXT PRIMARY KEY, content TEXT)")
            yield db
    except sqlite3.Error as error:
        raise RunError("the site's record of finished steps cannot be written; is its disk full?") from error
