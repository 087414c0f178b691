"""A coordinator that asks everything, in every order, gets what policy and ledger allow and nothing else.

Five sites of different policies, as real nodes with data folders and kits. The coordinator has no code of
ours in it: it sends every message type with every content that it can make, out of order and repeated, with
models of its own, and keeps every byte that comes back. What it got is then held against each site's policy
and ledger, and listed.
"""

import json
import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Error, Message, RecordDict
from flwr.common.serde import message_to_proto

from client.app import app
from client.data.tables import data_version, read_listing
from client.ledger.file import Kind
from client.ledger.state import LedgerState
from client.site import SiteConfig
from common.config import RunConfig, Scalar
from common.hierarchy import Hierarchy
from common.model.build import build_model
from common.model.model_file import all_arrays
from common.records import SITE_ERRORS, ModelUpdate, PrivacyStatement, ProportionRelease, Record
from common.secure_aggregation.records import (
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
from common.wire import combine, from_records, to_records
from deploy.datasets.build import write_synthetic_sites
from deploy.datasets.options import SyntheticHospitals
from deploy.flower.internals import become_server
from deploy.simulation.simulate import _ephemeral_kit

SIZE = 16
CAPS = {"hospital-1": 2.0, "hospital-2": 1.0}
SHARES, ALONE = "hospital-2", 1.5
"""The one that may count on the noise of others, and its cap for what is left without them."""
POLICIES = {
    "hospital-1": "release-proportions = 'total'\nbudget = {epsilon = 2.0, delta = 0.001}",
    "hospital-2": "release-proportions = 'per-bag'\nprivate-metrics = 'noise'\n"
    "budget = {epsilon = 1.0, delta = 0.001, alone-epsilon = 1.5}\n"
    "secure-aggregation = {shared-noise = true, minimum-sites = 2}",
    "hospital-3": "release-proportions = 'none'\nsecure-aggregation = {required = true}",
    "hospital-4": "release-proportions = 'total'\nheld-back = 0.7",
    "hospital-5": "release-proportions = 'none'\nmetrics = ['num-bags']",
}
"""Two with a budget, one whose updates leave masked only, and two without protection but their policy."""

CONFIGS: dict[str, dict[str, Scalar]] = {
    "plain": {},
    "one bag held back": {"train.held-back": 0.01},
    "another one": {"train.held-back": 0.01, "seed": 7},
    "nearly all held back": {"train.held-back": 0.9},
    "bad rows wanted away": {"skip-bad": True},
    "the server's own folder": {"sites-dir": "/"},
    "private": {"dp.epsilon": 0.5, "dp.delta": 1e-3, "dp.expected-bags": 4.0, "dp.steps-per-round": 1},
    "private beyond every cap": {"dp.epsilon": 9999.0, "dp.expected-bags": 4.0, "dp.delta": 1e-3},
    "private with looks": {"dp.epsilon": 0.5, "dp.delta": 1e-3, "dp.expected-bags": 4.0,
                           "dp.steps-per-round": 1, "dp.metrics-scale": 64.0, "train.held-back": 0.3,
                           "rounds": 3},
    "counts hardly noised": {"dp.epsilon": 9999.0, "dp.release-scale": 1e-3, "dp.delta": 1e-3},
    "private at odd settings": {"dp.epsilon": 0.5, "dp.delta": 1e-3, "dp.expected-bags": 1e-3,
                                "dp.steps-per-round": 100_000, "rounds": 100_000},
    "masked": {"secure-aggregation.enabled": True},
    "masked and private": {"secure-aggregation.enabled": True, "dp.epsilon": 0.5, "dp.delta": 1e-3,
                           "dp.expected-bags": 4.0, "dp.steps-per-round": 1},
    "masked on a ring": {"secure-aggregation.enabled": True, "secure-aggregation.neighbours": 2},
    "masked in pairs": {"secure-aggregation.enabled": True, "secure-aggregation.minimum-sites": 2,
                        "secure-aggregation.threshold-share": 0.51},
    "masked with shared noise": {"secure-aggregation.enabled": True, "secure-aggregation.minimum-sites": 2,
                                 "dp.epsilon": 0.5, "dp.delta": 1e-3, "dp.noise": "shared",
                                 "dp.sample-rate": 0.5, "dp.steps-per-round": 1},
}  # fmt: skip
CORE = ("plain", "private", "private with looks")
"""What the short form asks of every site."""
SIMPLE = ("query.proportions", "train", "evaluate.bags", "evaluate.test")
MASKED = ("query.keys", "query.shares", "train.masked", "query.survivors", "query.unmask")
UNKNOWN = ("query", "query.labels", "train.everything", "evaluate", "evaluate.train")

Content = Callable[[str, str], RecordDict]
"""(site, session) -> what is sent."""


@dataclass
class Site:
    """A real site: its folder, its kit, and what no byte that leaves may contain."""

    folder: Path
    kit: Path
    config: SiteConfig
    hierarchy: Hierarchy
    counts: np.ndarray[Any, np.dtype[np.int64]]
    secrets: tuple[bytes, ...]

    @classmethod
    def of(cls, folder: Path, kits: Path) -> "Site":
        config = SiteConfig.load(folder)
        hierarchy, listing = read_listing(folder, config)
        names = [row.path.rpartition("/")[2].encode() for row in listing.images]
        secrets = (*map(str.encode, listing.bag_ids), *names, str(folder).encode())
        fingerprint = data_version(folder, config, listing).encode()
        return cls(
            folder,
            _ephemeral_kit(kits, config.name),
            config,
            hierarchy,
            listing.counts,
            (*secrets, fingerprint),
        )


@dataclass(frozen=True)
class Answer:
    """One question and what came back."""

    site: str
    run: str
    kind: str
    asked: str
    reply: Message
    sent: bytes


@dataclass
class Coordinator:
    """Asks, and remembers everything."""

    sites: dict[str, Site]
    runs: dict[str, dict[str, Scalar]]
    answers: list[Answer] = field(default_factory=list)
    contexts: dict[tuple[str, str], Context] = field(default_factory=dict)

    def ask(
        self, site: str, run: str, kind: str, content: RecordDict, asked: str, group: str = "1"
    ) -> Message:
        """One message to one site, and its answer."""
        at = self.sites[site]
        if (site, run) not in self.contexts:
            node = {"data-path": str(at.folder), "kit": str(at.kit)}
            flat = {
                **RunConfig().to_flat(),
                "model.image-size": SIZE,
                "model.atoms-per-class": 1,
                **self.runs[run],
            }
            number = 1 + list(self.runs).index(run)
            self.contexts[site, run] = Context(
                number, 100 + list(self.sites).index(site), node, RecordDict(), flat
            )
        message = Message(content, self.contexts[site, run].node_id, kind, group_id=group)
        message.metadata.__dict__["_message_id"] = "m"
        try:
            reply = app(message, self.contexts[site, run])
        except Exception as error:  # Flower sends the text of an exception to the server
            reply = Message(Error(0, str(error)), reply_to=message)
        reply.metadata.__dict__["_message_id"] = "r"
        self.answers.append(
            Answer(site, run, kind, asked, reply, message_to_proto(reply).SerializeToString())
        )
        return reply

    def session(self, run: str, name: str, sites: list[str], weights: dict[str, float] | None = None) -> None:
        """One secure aggregation as far as it gets, with every list of survivors at its end."""
        now: dict[str, Any] = {"session": name, "round": 1}
        config = {**RunConfig().to_flat(), **self.runs[run]}
        adverts = dict(
            self._read(run, "query.keys", dict.fromkeys(sites, to_records(SessionOffer(**now))), KeyAdvert)
        )
        certificates = {site: (self.sites[site].kit / "node.crt").read_text() for site in adverts}
        if len(adverts) < 2:
            return
        plan = SessionPlan(
            **now,
            threshold_share=float(config["secure-aggregation.threshold-share"]),
            neighbours=int(config["secure-aggregation.neighbours"]),
            clip_range=float(config["secure-aggregation.clip-range"]),
            weights=weights or dict.fromkeys(sorted(adverts), 1 / len(adverts)),
            adverts=tuple(
                adverts[site].model_copy(update={"certificate": certificates[site]})
                for site in sorted(adverts)
            ),
        )
        sealed = dict(self._read(run, "query.shares", dict.fromkeys(adverts, to_records(plan)), SealedShares))
        requests = {
            site: combine(
                to_records(self.model(site)),
                to_records(
                    MaskRequest(
                        **now,
                        sharing=tuple(sorted(sealed)),
                        shares={p: s.shares[site] for p, s in sealed.items() if site in s.shares},
                    )
                ),
            )
            for site in sealed
        }
        masked = dict(self._read(run, "train.masked", requests, MaskedUpdate))
        everybody, *others = [sorted(masked), *[sorted(set(masked) - {site}) for site in sorted(masked)]]
        for left in (everybody, *others, everybody[:1]):
            listed = to_records(SurvivorList(**now, survivors=tuple(left)))
            signed = dict(
                self._read(
                    run, "query.survivors", dict.fromkeys(sealed, listed), SurvivorSignature, f"{len(left)}"
                )
            )
            signatures = {site: answer.signature for site, answer in signed.items()}
            request = to_records(UnmaskRequest(**now, survivors=tuple(left), signatures=signatures))
            dict(
                self._read(run, "query.unmask", dict.fromkeys(sealed, request), UnmaskShares, f"{len(left)}")
            )

    def model(self, site: str, round: int = 1, seed: int = 0) -> ModelUpdate:
        """A model that fits the site's tree."""
        config = RunConfig.from_flat({"model.image-size": SIZE, "model.atoms-per-class": 1})
        arrays = all_arrays(build_model(config.model, self.sites[site].hierarchy, seed))
        return ModelUpdate(sender="server", round=round, arrays=arrays)

    def _read(
        self,
        run: str,
        kind: str,
        requests: dict[str, RecordDict],
        record: type[Record],
        asked: str = "in turn",
    ) -> Iterator[tuple[str, Any]]:
        for site, content in requests.items():
            reply = self.ask(site, run, kind, content, asked)
            if reply.has_content():
                yield site, from_records(reply.content, record)


def simple_contents(coordinator: Coordinator, site: str) -> dict[str, RecordDict]:
    """What is sent with every message type that needs no session, right and wrong."""
    model = coordinator.model(site)
    zeros = {name: np.zeros_like(array) for name, array in model.arrays.items()}
    other = Hierarchy.from_rows(["leaf"], [["a"], ["b"]])
    config = RunConfig.from_flat({"model.image-size": SIZE, "model.atoms-per-class": 1})
    foreign = all_arrays(build_model(config.model, other, 0))
    some = dict(list(model.arrays.items())[:1])
    return {
        "a model": to_records(model),
        "a constant model": to_records(ModelUpdate(sender="server", round=1, arrays=zeros)),
        "a model of another round": to_records(model.model_copy(update={"round": 3})),
        "a model of another tree": to_records(ModelUpdate(sender="server", round=1, arrays=foreign)),
        "one array": to_records(ModelUpdate(sender="server", round=1, arrays=some)),
        "nothing": RecordDict(),
    }


@pytest.fixture(scope="module", params=["short", pytest.param("whole", marks=pytest.mark.slow)])
def coordinator(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Coordinator:
    """The coordinator, after it has asked everything; the short form draws a part of the questions."""
    root = tmp_path_factory.mktemp("hostile")
    write_synthetic_sites(
        root / "sites",
        SyntheticHospitals(
            sites=5, seed=1, images_per_site=96, image_size=SIZE, session_size=8, test_images_per_site=24
        ),
    )
    for name, policy in POLICIES.items():
        path = root / "sites" / name / "site.toml"
        path.write_text(f"name = '{name}'\n[policy]\n{policy}\n", encoding="utf-8")
    become_server()
    sites = {name: Site.of(root / "sites" / name, root / "kits") for name in POLICIES}
    coordinator = Coordinator(sites, dict(CONFIGS))
    contents = {site: simple_contents(coordinator, site) for site in sites}
    questions = [
        (site, run, kind, asked)
        for site in sites
        for run in CONFIGS
        for kind in (*SIMPLE, *MASKED, *UNKNOWN)
        for asked in contents[site]
    ]
    order = random.Random(0)
    short = request.param == "short"
    core = [(site, run, kind, "a model") for site in sites for run in CORE for kind in SIMPLE]
    questions = order.sample(questions, 200 if short else len(questions))
    again = order.sample(questions, len(questions) // 4)
    for site, run, kind, asked in order.sample(core, len(core)) + questions + again:
        coordinator.ask(site, run, kind, contents[site][asked], asked)
    for run in (
        ("masked", "masked in pairs", "masked with shared noise")
        if short
        else [name for name in CONFIGS if name.startswith("masked")]
    ):
        three = ["hospital-3", "hospital-4", "hospital-5"]
        coordinator.session(run, "0a" * 16, list(sites))
        for number, heavy in enumerate((1 / 3, 0.9, 0.5, 0.4)):
            light = (1 - heavy) / 2
            coordinator.session(
                run, f"{number:032x}", three, dict(zip(three, (heavy, light, light), strict=True))
            )
    return coordinator


def given(coordinator: Coordinator, record: type[Record], *kinds: str) -> Iterator[tuple[Answer, Any]]:
    """The records of one kind that were got, with the answers that they came in."""
    for answer in coordinator.answers:
        if answer.kind in kinds and answer.reply.has_content():
            yield answer, from_records(answer.reply.content, record)


def test_an_error_is_a_code_and_its_fixed_text(coordinator: Coordinator) -> None:
    errors = [answer.reply.error for answer in coordinator.answers if answer.reply.has_error()]
    assert errors
    assert {(error.code, error.reason) for error in errors} <= {(int(c), t) for c, t in SITE_ERRORS.items()}


def test_a_type_that_no_table_knows_is_refused(coordinator: Coordinator) -> None:
    assert not [
        answer for answer in coordinator.answers if answer.kind in UNKNOWN and answer.reply.has_content()
    ]


def test_no_byte_names_a_bag_a_file_a_folder_or_a_data_version(coordinator: Coordinator) -> None:
    for answer in coordinator.answers:
        # A bag's name such as b0001 comes up by chance in the random names and hashes that may leave.
        readable = re.sub(rb"[0-9a-f]{64}", b"", answer.sent)
        found = [
            secret
            for secret in coordinator.sites[answer.site].secrets
            if secret in (answer.sent if len(secret) == 64 else readable)
        ]
        assert not found, f"{answer.kind} of {answer.site} in {answer.run!r} tells {found[:3]}"


def test_counts_leave_as_the_policy_says_and_in_one_version(coordinator: Coordinator) -> None:
    versions = defaultdict(set)
    for answer, release in given(coordinator, ProportionRelease, "query.proportions"):
        policy = coordinator.sites[answer.site].config.policy
        assert release.granularity == policy.release_proportions.value
        assert release.is_private or policy.budget.epsilon is None
        versions[answer.site].add(release.leaf_counts)
    assert all(len(found) == 1 for found in versions.values()), "counts were drawn more than once"


def test_no_site_with_a_budget_answers_unprotected(coordinator: Coordinator) -> None:
    for answer in coordinator.answers:
        if answer.site in CAPS and answer.reply.has_content() and answer.kind in SIMPLE[:3]:
            assert "dp.epsilon" in CONFIGS[answer.run], f"{answer.kind} in {answer.run!r}"


def test_no_cap_is_passed_and_every_private_answer_is_in_the_ledger(coordinator: Coordinator) -> None:
    for name, cap in CAPS.items():
        path = coordinator.sites[name].folder / "ledger.sqlite"
        statements = [
            s for a, s in given(coordinator, PrivacyStatement, "train", "train.masked") if a.site == name
        ]
        assert statements, "no private round was granted at all"
        assert max(s.epsilon for s in statements) <= cap
        own = [s.epsilon_alone for s in statements if s.epsilon_alone is not None]
        # By its own share of noise alone a site may spend what its owner allowed of that, and no more.
        assert not own or (name == SHARES and max(own) <= ALONE)
        rounds = sum(entry.kind == Kind.RESERVED for entry in LedgerState.read(path).entries)
        assert len(statements) <= rounds


def test_exact_held_back_figures_are_of_many_bags_that_the_site_chose(coordinator: Coordinator) -> None:
    for answer, update in given(coordinator, ModelUpdate, "evaluate.bags"):
        exact = {"bags-kl", "bags-l1"} & {name.partition(".")[0] for name in update.metrics}
        if exact:
            assert update.metrics["held-back-bags"] >= 8
            assert answer.site not in CAPS


def test_no_update_in_clear_where_only_masked_ones_may_leave(coordinator: Coordinator) -> None:
    for answer, update in given(coordinator, ModelUpdate, "train"):
        assert answer.site != "hospital-3"
        assert not CONFIGS[answer.run].get("secure-aggregation.enabled")
        assert np.isfinite(np.concatenate([array.ravel() for array in update.arrays.values()])).all()


def test_one_sum_per_round_and_never_of_few(coordinator: Coordinator) -> None:
    lists = defaultdict(set)
    for answer, shares in given(coordinator, UnmaskShares, "query.unmask"):
        lists[answer.site, answer.run].add((shares.session, tuple(sorted(shares.self_masks))))
    assert lists, "no sum was ever unmasked, not even honestly"
    for where, found in lists.items():
        assert len(found) == 1, f"{where} helped to unmask {len(found)} sums of one round"
        assert all(len(survivors) >= 3 for _, survivors in found)


STATEMENT = (
    *("adjacency", "budget_left", "delta", "epsilon", "epsilon_alone", "events", "generator"),
    *("ledger_head", "losses", "round", "site", "unit"),
)
RELEASE = (
    "bag_sizes",
    "bags",
    "data_version",
    "event",
    "granularity",
    "hierarchy",
    "leaf_counts",
    "mechanism",
    "site",
)
SESSION = {"round", "session", "site"}
CONFUSION = {
    *(f"metrics.confusion.{reading}.{level}" for reading in ("argmax", "path") for level in range(3)),
    "metrics.confusion.smallest-cell",
}
UPDATE = {"update.round", "update.sender", "update.shapes"}
LISTED = {
    "query.proportions": {f"release.{name}" for name in RELEASE},
    "query.keys": {
        f"key-advert.{name}"
        for name in (
            *SESSION,
            "run",
            "settings",
            "seal_key",
            "mask_key",
            "commitment",
            "signature",
            "certificate",
        )
    },
    "query.shares": {f"sealed-shares.{name}" for name in (*SESSION, "shares")},
    "query.survivors": {f"survivor-signature.{name}" for name in (*SESSION, "signature")},
    "query.unmask": {f"unmask-shares.{name}" for name in (*SESSION, "self_masks", "mask_keys")},
    "train": {*UPDATE, "arrays.arrays", "metrics.num-bags", *(f"privacy.{name}" for name in STATEMENT)},
    "train.masked": {
        *(f"masked-update.{name}" for name in ("metrics", "round", "sender", "session")),
        *(f"privacy.{name}" for name in STATEMENT),
        "words.words",
    },
    "evaluate.bags": UPDATE,
    "evaluate.test": UPDATE,
}
"""What leaves any site, by message type: every field of every record."""
BESIDE = {
    "hospital-1": {"evaluate.bags": {f"privacy.{name}" for name in STATEMENT}},
    "hospital-2": {
        "evaluate.bags": {
            *(f"privacy.{name}" for name in STATEMENT), "metrics.noised-bags-tv", "metrics.held-back-bags",
        }
    },
    "hospital-3": {"evaluate.test": CONFUSION},
    "hospital-4": {
        "evaluate.test": CONFUSION,
        "evaluate.bags": {"metrics.bags-kl", "metrics.held-back-bags"},
        "train": {"metrics.num-images"},
    },
}  # fmt: skip
"""And what leaves one site besides, because its policy says so or because its budget pays for it."""


def test_what_left_is_this_list(coordinator: Coordinator) -> None:
    left: dict[tuple[str, str], set[str]] = defaultdict(set)
    for answer in coordinator.answers:
        if answer.reply.has_content():
            for name, record in answer.reply.content.items():
                fields = json.loads(str(record["json"])) if "json" in record else record
                left[answer.site, answer.kind] |= {f"{name}.{key}" for key in fields}
    for (site, kind), fields in sorted(left.items()):
        print(f"{site} {kind}: {', '.join(sorted(fields))}")
        assert fields <= LISTED[kind] | BESIDE.get(site, {}).get(kind, set())
    # Every line of the list is there because something left: a list that allows more would prove less.
    for kind, listed in LISTED.items():
        assert listed <= set().union(*(fields for (_, asked), fields in left.items() if asked == kind)), kind
    for site, kinds in BESIDE.items():
        for kind, listed in kinds.items():
            assert listed <= left[site, kind], f"{site} {kind}"
