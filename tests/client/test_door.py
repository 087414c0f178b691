"""One door: which questions a site answers, to whom, and that no sequence of them tells of a single bag."""

import csv
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message, RecordDict

from client import private_training
from client.app import app
from client.data.bags import BagStore
from client.door import QUESTIONS, SiteApp, _Touches
from client.egress import guard
from client.ledger.ledger import Ledger
from common.errors import BudgetRefused
from common.records import SITE_ERRORS, ModelUpdate, PrivacyStatement, ProportionRelease, SiteError
from common.wire import combine, from_records, to_records

from .asking import PRIVATE, SIZE, Node, constant_model, with_policy

BUDGET = {"budget": {"epsilon": 8.0, "delta": 1e-3}}
DLLP: dict[str, Any] = {"model.method": "dllp"}
TOUCHING = [kind for kind, question in QUESTIONS.items() if question.touches]
UNKNOWN = [
    "query",
    "query.images",
    "train.default",
    "train.twice",
    "evaluate",
    "evaluate.labels",
    "get_properties",
    "reconnect",
]


def refusal(reply: Message) -> tuple[int, str]:
    assert reply.has_error(), f"answered: {reply.content}"
    return reply.error.code, reply.error.reason


def test_every_question_has_a_handler_and_nothing_else_has() -> None:
    assert app.handlers.keys() == QUESTIONS.keys()
    for kind in ("query.images", "train"):
        with pytest.raises(ValueError, match="no question"):
            app.answers(kind)
    assert isinstance(app, SiteApp)


@pytest.mark.parametrize("kind", UNKNOWN)
def test_an_unknown_type_is_answered_by_the_guard(kind: str, sites_dir: Path) -> None:
    node = Node(sites_dir / "hospital-1")
    reply = node.ask(kind, node.model())
    assert refusal(reply) == (SiteError.QUESTION, SITE_ERRORS[SiteError.QUESTION])


@pytest.mark.parametrize("kind", QUESTIONS)
def test_a_request_with_other_records_than_its_type_has_is_no_question(kind: str, sites_dir: Path) -> None:
    node = Node(sites_dir / "hospital-1")
    short = RecordDict(dict(list(node.request(kind).items())[1:]))
    more = combine(node.request(kind), to_records(PrivacyStatement(site="server", round=1)))
    for odd in (short, more) if kind != "query.proportions" else (more,):
        assert refusal(node.ask(kind, odd))[0] == SiteError.QUESTION


@pytest.mark.parametrize("kind", TOUCHING)
def test_a_site_with_a_budget_answers_nothing_that_touches_its_data_without_privacy(
    kind: str, sites_dir: Path, tmp_path: Path
) -> None:
    node = Node(with_policy(sites_dir / "hospital-1", tmp_path / "site", **BUDGET))
    for held_back, masked in itertools.product((0.0, 1e-6, 0.9), (False, True)):
        settings = {"train__held_back": held_back, "secure_aggregation__enabled": masked}
        assert refusal(node.ask(kind, node.request(kind), **settings))[0] == SiteError.BUDGET


@pytest.mark.parametrize("kind", TOUCHING)
def test_a_real_site_without_a_budget_takes_part_in_no_private_run(kind: str, sites_dir: Path) -> None:
    node = Node(sites_dir / "hospital-1")
    settings = {key.replace(".", "__"): value for key, value in PRIVATE.items()}
    assert refusal(node.ask(kind, node.request(kind), **settings))[0] == SiteError.CONFIGURATION


def test_the_door_comes_before_any_data(sites_dir: Path, tmp_path: Path) -> None:
    """The handler of a refused question is not even called."""
    node = Node(with_policy(sites_dir / "hospital-1", tmp_path / "site", **BUDGET))
    called: list[Message] = []
    for kind in [*QUESTIONS, *UNKNOWN]:
        if kind not in QUESTIONS or QUESTIONS[kind].touches is not _Touches.NOTHING:
            message = node.message(kind, node.request(kind))
            guard(message, node.context({}), lambda message, context: called.append(message) or message)
    assert called == []


def count_bags_by_asking(node: Node, seeds: int) -> set[tuple[int, ...]]:
    """The attack: one held-back bag by each seed, three models of constant answers, an L1 figure each.

    Against a model that answers class c alone, a bag's L1 distance is 2 (1 - its share of c).
    """
    store = BagStore.open(node.site, SIZE)
    coarse, leaves = store.hierarchy.sizes[0], store.hierarchy.sizes[-1]
    first = [int(np.argmax(store.hierarchy.paths[:, 0] == c)) for c in range(coarse)]
    arrays = node.arrays(DLLP)
    requests = []
    for leaf in first:
        scores = np.full(leaves, -40.0)
        scores[leaf] = 40.0
        model = ModelUpdate(sender="server", round=1, arrays=constant_model(arrays, [scores]))
        requests.append(to_records(model))
    found = set()
    for seed in range(seeds):
        settings = {"model__method": "dllp", "train__held_back": 1e-6, "seed": seed}
        shares = []
        for request in requests:
            reply = node.ask("evaluate.bags", request, **settings)
            if reply.has_error():
                return found
            metrics = from_records(reply.content, ModelUpdate).metrics
            distances = metrics.get("bags-l1")
            if isinstance(distances, tuple) and metrics.get("held-back-bags") == 1:
                shares.append(1 - distances[0] / 2)
        counts = 8 * np.array(shares)
        if len(counts) == coarse and np.allclose(counts, np.rint(counts), atol=1e-3):
            found.add(tuple(np.rint(counts).astype(int).tolist()))
    return found


@pytest.mark.parametrize("release", ["none", "total"])
@pytest.mark.parametrize("policy", [{}, BUDGET], ids=["no budget", "budget"])
def test_no_sequence_of_questions_counts_a_single_bag(
    policy: dict[str, Any], release: str, sites_dir: Path, tmp_path: Path
) -> None:
    """72 questions gave every bag's coarse counts; now no figure of a single bag leaves."""
    site = with_policy(
        sites_dir / "hospital-1", tmp_path / "site", **{**policy, "release-proportions": release}
    )
    assert count_bags_by_asking(Node(site), seeds=24) == set()


def test_the_attack_works_where_a_simulated_site_allows_it(sites_dir: Path) -> None:
    """The test above can fail: a simulated site has nobody to protect, and gives all of its bags away."""
    node = Node(sites_dir / "hospital-1", simulated=True)
    store = BagStore.open(node.site, SIZE)
    true = {tuple(row) for row in store.hierarchy.roll_up(store.leaf_counts)[0].tolist()}
    assert count_bags_by_asking(node, seeds=24) == true


OPEN = {"release-proportions": "per-bag", "held-back": 0.5, "minimum-held-back-bags": 4}


def figures(node: Node, **settings: Any) -> dict[str, Any]:
    reply = node.ask("evaluate.bags", node.model(), **settings)
    return from_records(reply.content, ModelUpdate).metrics


def test_a_real_site_s_figures_are_of_the_same_bags_whatever_the_server_sends(
    sites_dir: Path, tmp_path: Path
) -> None:
    node = Node(with_policy(sites_dir / "hospital-1", tmp_path / "site", **OPEN))
    seen = [
        figures(node, train__held_back=held_back, seed=seed)
        for held_back in (1e-6, 0.1, 0.9)
        for seed in (0, 1, 2)
    ]
    assert seen[0]["held-back-bags"] == 4
    assert all(other == seen[0] for other in seen)
    assert figures(node, train__held_back=0.0) == {}


def test_held_back_bags_differ_from_site_to_site_and_from_version_to_version(
    sites_dir: Path, tmp_path: Path
) -> None:
    """Membership follows from a secret: two copies of one folder hold back other bags."""
    copies = [
        Node(with_policy(sites_dir / "hospital-1", tmp_path / f"site-{number}", **OPEN))
        for number in range(4)
    ]
    assert len({figures(node)["bags-kl"] for node in copies}) > 1


@pytest.mark.parametrize(("fewest", "bags"), [(4, 4), (5, 0)])
def test_exact_figures_are_of_at_least_so_many_bags(
    fewest: int, bags: int, sites_dir: Path, tmp_path: Path
) -> None:
    policy = OPEN | {"minimum-held-back-bags": fewest}
    node = Node(with_policy(sites_dir / "hospital-1", tmp_path / "site", **policy))
    assert figures(node).get("held-back-bags", 0) == bags
    update = from_records(node.ask("train", node.model()).content, ModelUpdate)
    assert update.metrics["num-bags"] == 8 - bags  # bags that no figure can be made of are trained on


@pytest.mark.parametrize("release", ["none", "total", "per-bag"])
def test_each_metric_tells_no_more_of_the_counts_than_the_site_releases(
    release: str, sites_dir: Path, tmp_path: Path
) -> None:
    policy = OPEN | {"release-proportions": release}
    node = Node(with_policy(sites_dir / "hospital-1", tmp_path / "site", **policy))
    told = set(figures(node)) | set(
        from_records(node.ask("train", node.model()).content, ModelUpdate).metrics
    )
    bags = {"num-bags", "held-back-bags"}
    expected = {
        "none": bags,
        "total": bags | {"num-images", "bags-kl"},
        "per-bag": bags | {"num-images", "bags-kl", "bags-l1", "loss"},
    }
    assert told == expected[release]


def test_masks_are_not_undone_by_figures_in_clear(sites_dir: Path, tmp_path: Path) -> None:
    policy = OPEN | {"release-proportions": "total"}
    node = Node(with_policy(sites_dir / "hospital-1", tmp_path / "site", **policy))
    assert figures(node, secure_aggregation__enabled=True) == {}


@pytest.mark.parametrize("parts", [2, 8, 100_000])
def test_a_real_site_makes_no_exact_update_of_few_bags(parts: int, sites_dir: Path) -> None:
    node = Node(sites_dir / "hospital-1")
    reply = node.ask("train", node.model(), train__rounds_per_pass=parts)
    assert refusal(reply)[0] == SiteError.CONFIGURATION
    assert (
        not Node(node.site, simulated=True)
        .ask("train", node.model(), train__rounds_per_pass=parts)
        .has_error()
    )


@pytest.fixture
def private_node(sites_dir: Path, tmp_path: Path) -> Node:
    policy = BUDGET | {"private-metrics": "noise"}
    return Node(with_policy(sites_dir / "hospital-1", tmp_path / "site", **policy))


SETTINGS = {key.replace(".", "__"): value for key, value in PRIVATE.items()}


def test_the_ledger_is_asked_before_a_bag_is_trained_on(
    private_node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = []
    for owner, name in (
        (Ledger, "reserve"),
        (private_training, "train_round_privately"),
        (Ledger, "confirm"),
    ):
        right = getattr(owner, name)

        def spy(*args: Any, right: Any = right, name: str = name, **more: Any) -> Any:
            order.append(name)
            return right(*args, **more)

        monkeypatch.setattr(owner, name, spy)
    assert not private_node.ask("train", private_node.model(PRIVATE), **SETTINGS).has_error()
    assert order == ["reserve", "train_round_privately", "confirm"]


def test_what_the_ledger_refuses_is_not_trained(private_node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **more: Any) -> None:
        raise BudgetRefused("site", 1.0, 0.0, 1.0)

    trained = []
    monkeypatch.setattr(Ledger, "reserve", refuse)
    monkeypatch.setattr(private_training, "train_round_privately", lambda *args: trained.append(args))
    reply = private_node.ask("train", private_node.model(PRIVATE), **SETTINGS)
    assert refusal(reply)[0] == SiteError.BUDGET
    assert trained == []


@pytest.mark.parametrize("run", [False, True], ids=["run: refuse", "run: skip"])
@pytest.mark.parametrize(
    ("simulated", "own"), [(False, None), (False, False), (False, True), (True, None), (True, False)]
)
def test_whether_bad_rows_are_left_out_is_the_site_s_choice(
    simulated: bool, own: bool | None, run: bool, sites_dir: Path, tmp_path: Path
) -> None:
    """Which images a release and a test are of is not for a server to switch."""
    policy = {} if own is None else {"skip_bad": own}
    site = with_policy(sites_dir / "hospital-1", tmp_path / "sites" / "hospital-1", **policy)
    for table in ("manifest.csv", "test.csv"):
        with (site / table).open(encoding="utf-8", newline="") as stream:
            (site / next(csv.DictReader(stream))["path"]).write_bytes(b"no image")
    node = Node(site, simulated=simulated)
    skips = run if simulated and own is None else bool(own)
    for kind in ("query.proportions", "train", "evaluate.test"):
        reply = node.ask(kind, node.request(kind), skip_bad=run)
        if skips:
            assert not reply.has_error(), kind
        else:
            assert refusal(reply)[0] == SiteError.DATA, kind
    if skips:
        release = from_records(node.ask("query.proportions", skip_bad=run).content, ProportionRelease)
        assert release.bags == len(BagStore.open(site, SIZE, skip_bad=True)) == 7
