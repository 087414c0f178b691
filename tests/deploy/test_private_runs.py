"""Private runs from end to end: what is spent, who refuses, and that no statement disagrees with a ledger."""

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Context, Message, RecordDict
from safetensors.numpy import load_file

from client import app as client_app
from client.data.bags import BagStore
from client.ledger.check import verify
from client.ledger.ledger import Ledger
from client.ledger.state import LedgerState
from client.site import PrivateMetrics, SiteConfig, _PrivacyBudget
from common.config import RunConfig
from common.errors import RunError
from common.files import read_json_lines
from common.hierarchy import Hierarchy
from common.model.build import build_model
from common.model.model_file import all_arrays
from common.privacy.accounting import spent
from common.privacy.events import Adjacency, event_from_dict
from common.privacy.proportions import GRID
from common.records import ModelUpdate, SiteError
from common.wire import to_records
from deploy.datasets.build import write_synthetic_sites
from deploy.datasets.options import SyntheticHospitals
from deploy.flower.internals import become_server
from deploy.report.files import report
from deploy.runs.reading import read_summary
from deploy.runs.show import print_summary
from deploy.simulation.local_grid import LocalGrid
from server.app import app
from tests.reference_accounting import opacus_prv

Config = Callable[..., RunConfig]
PRIVATE = {
    "dp.epsilon": 4.0, "dp.delta": 1e-3, "dp.expected-bags": 3.0, "dp.steps-per-round": 2, "rounds": 2,
}  # fmt: skip


def run(config: RunConfig) -> dict:
    flat = config.to_flat()
    with LocalGrid(config.federation.sites, flat) as grid:
        app(grid, grid.server_context(flat))
    return json.loads((Path(config.run_dir) / "summary.json").read_text())


def ledgers(config: RunConfig) -> dict[str, LedgerState]:
    found = sorted(Path(config.run_dir).glob("sites/*/ledger.sqlite"))
    return {path.parent.name: LedgerState.read(path) for path in found}


@pytest.fixture
def uneven(tmp_path: Path) -> Path:
    """Two hospitals, one with twice the bags of the other."""
    small, large = tmp_path / "small", tmp_path / "large"
    for out, images in ((small, 64), (large, 128)):
        write_synthetic_sites(
            out,
            SyntheticHospitals(
                sites=1,
                seed=images,
                images_per_site=images,
                image_size=16,
                session_size=8,
                test_images_per_site=16,
            ),
        )
    both = tmp_path / "both"
    for name, source in (("small", small), ("large", large)):
        shutil.copytree(source / "hospital-1", both / name)
        SiteConfig.load(both / name).model_copy(update={"name": name}).save(both / name)
    return both


def with_budget(sites: Path, epsilon: float, delta: float = 1e-3) -> None:
    for site in sites.iterdir():
        config = SiteConfig.load(site)
        policy = config.policy.model_copy(update={"budget": _PrivacyBudget(epsilon=epsilon, delta=delta)})
        config.model_copy(update={"policy": policy}).save(site)


def test_every_site_stays_within_epsilon_with_noise_of_its_own(small_config: Config, uneven: Path) -> None:
    config = small_config(PRIVATE | {"sites-dir": str(uneven), "federation.sites": 2})
    summary = run(config)
    books = ledgers(config)
    assert set(books) == {"small", "large"}
    sigmas = set()
    for site, book in books.items():
        exported = book.export()
        events = [event_from_dict(event) for event in exported["events"]]
        assert {event.kind for event in events} == {"poisson_gaussian", "discrete_laplace"}
        assert exported["spent"]["replace_one"] <= 4.0
        assert exported["spent"]["replace_one"] == pytest.approx(
            spent(events, 1e-3, Adjacency.REPLACE_ONE), rel=1e-9
        )
        training = [event for event in events if event.kind == "poisson_gaussian"]
        assert sum(event.steps for event in training) == 4
        # Another accountant, on the events that it can hold, in its own adjacency.
        assert opacus_prv(training, 1e-3) <= exported["spent"]["add_remove"] * 1.01
        sigmas |= {event.noise_multiplier for event in training}
        statement = summary["statements"][site]
        assert statement["epsilon"] == pytest.approx(exported["spent"]["replace_one"])
        assert statement["ledger_head"] == exported["head"]
        assert summary["releases"][site]["mechanism"] == "discrete-laplace"
        assert verify(Path(config.run_dir) / "sites" / site / "ledger.sqlite") == []
    assert len(sigmas) == 2


def test_no_figure_of_private_bags_leaves_a_private_run(small_config: Config) -> None:
    config = small_config(PRIVATE)
    summary = run(config)
    assert summary["bags"] == []
    events = read_json_lines(Path(config.run_dir) / "metrics.jsonl")
    assert all(event["loss"] is None for event in events if event["event"] in ("update", "round"))
    assert not [event for event in events if event["event"] == "bags"]


NOISED = {"dp.metrics-scale": 40.0, "dp.epsilon": 6.0, "rounds": 3, "evaluation.every": 2}


def with_noise(sites_dir: Path, sites: Path, *withholding: str) -> Path:
    """A copy of the sites whose policy has noised figures sent, but for some."""
    shutil.copytree(sites_dir, sites)
    for site in sites.iterdir():
        if site.name not in withholding:
            config = SiteConfig.load(site)
            policy = config.policy.model_copy(update={"private_metrics": PrivateMetrics.NOISE})
            config.model_copy(update={"policy": policy}).save(site)
    return sites


def test_noised_figures_of_held_back_bags_are_paid_for_and_select_the_model(
    small_config: Config, sites_dir: Path, tmp_path: Path
) -> None:
    sites = with_noise(sites_dir, tmp_path / "noised", "hospital-3")
    config = small_config(PRIVATE | NOISED | {"sites-dir": str(sites)})
    summary = run(config)
    books = ledgers(config)
    for site, book in books.items():
        exported = book.export()
        events = [event_from_dict(event) for event in exported["events"]]
        looks = [event for event in events if event.kind == "discrete_laplace" and event.scale == 40.0]
        # Three levels, after rounds 2 and 3.
        assert len(looks) == (0 if site == "hospital-3" else 6)
        assert exported["spent"]["replace_one"] == spent(events, 1e-3, Adjacency.REPLACE_ONE)
        assert 5.9 < exported["spent"]["replace_one"] <= 6.0
        assert book.open_reservations == set()
        assert summary["statements"][site]["ledger_head"] == book.head
        assert summary["statements"][site]["epsilon"] == pytest.approx(book.spent())
    seen = [e for e in read_json_lines(Path(config.run_dir) / "metrics.jsonl") if e["event"] == "bags"]
    assert [event["round"] for event in seen] == [2, 3]
    assert all(set(level) == {"level", "l1"} for event in seen for level in event["levels"])
    best = min(seen, key=lambda event: event["score"])
    assert (summary["selected_round"], summary["bags"]) == (best["round"], best["levels"])
    sigmas = {site: book.events[-1] for site, book in books.items()}
    assert sigmas["hospital-1"] != sigmas["hospital-3"]
    report([Path(config.run_dir)], tmp_path / "report")
    told = json.loads((tmp_path / "report" / "report.json").read_text())
    assert told["problems"] == []
    assert told["sites"]["hospital-1"]["looks"][0]["figures"] == 6
    assert told["sites"]["hospital-1"]["looks"][0]["looks"] == 2
    assert told["sites"]["hospital-3"]["looks"] == []


@pytest.mark.parametrize("changes", [{"train.held-back": 0.0}, {"dp.metrics-scale": 0.0}])
def test_nothing_is_asked_of_held_back_bags_unless_wanted(
    changes: dict, small_config: Config, sites_dir: Path, tmp_path: Path
) -> None:
    sites = with_noise(sites_dir, tmp_path / "noised")
    config = small_config(
        PRIVATE | {"sites-dir": str(sites), "rounds": 1, "dp.metrics-scale": 40.0} | changes
    )
    assert run(config)["bags"] == []
    for book in ledgers(config).values():
        assert sum(event.kind == "discrete_laplace" for event in book.events) == 1


def test_the_sums_that_leave_are_not_the_exact_ones(
    small_config: Config, sites_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a site sends differs from what it computed by noise of the scale that was charged."""
    exact: list = []
    right = client_app.sum_distances

    def remember(*arguments: object) -> object:
        exact.append(right(*arguments))
        return exact[-1]

    monkeypatch.setattr(client_app, "sum_distances", remember)
    sites = with_noise(sites_dir, tmp_path / "noised", "hospital-2", "hospital-3")
    config = small_config(PRIVATE | NOISED | {"sites-dir": str(sites), "rounds": 8, "evaluation.every": 1})
    run(config)
    held_back = 2
    seen = [e for e in read_json_lines(Path(config.run_dir) / "metrics.jsonl") if e["event"] == "bags"]
    sent = np.array([[level["l1"] for level in event["levels"]] for event in seen]) / 2 * GRID * held_back
    noise = sent - np.array(exact)
    assert np.isclose(noise, np.rint(noise), atol=1e-6).all()
    # 24 numbers of a Laplace distribution of scale 40 * GRID: the mean of |noise| is that, give or take.
    assert 0.5 < np.abs(noise).mean() / (40 * GRID) < 1.8


def test_a_look_beyond_the_cap_is_refused_and_costs_nothing(
    small_config: Config, sites_dir: Path, tmp_path: Path
) -> None:
    sites = with_noise(sites_dir, tmp_path / "noised", "hospital-2", "hospital-3")
    config = small_config(PRIVATE | {"sites-dir": str(sites), "rounds": 1})
    site = sites / "hospital-1"
    flat = config.with_changes({"dp.metrics-scale": 0.2, "dp.epsilon": 40.0}).to_flat()
    with_budget(sites, epsilon=4.0)
    become_server()
    model = build_model(config.model, Hierarchy.from_csv(site / "hierarchy.csv"), 0)
    request = to_records(ModelUpdate(sender="server", round=1, arrays=all_arrays(model)))
    context = Context(1, 7, {"partition-id": 0}, RecordDict(), flat)
    reply = client_app.app(Message(request, 7, "evaluate.bags"), context)
    assert reply.error.code == SiteError.BUDGET
    book = LedgerState.read(site / "ledger.sqlite")
    assert (book.events, book.refusals) == ([], 1)


def test_runs_on_the_same_data_compose_and_one_too_many_is_refused(
    small_config: Config, sites_dir: Path, tmp_path: Path
) -> None:
    sites = tmp_path / "capped"
    shutil.copytree(sites_dir, sites)
    with_budget(sites, epsilon=8.0)
    first = small_config(PRIVATE | {"sites-dir": str(sites), "run-dir": str(tmp_path / "one")})
    run(first)
    run(first.with_changes({"run-dir": str(tmp_path / "two")}))
    ledger = sites / "hospital-1" / "ledger.sqlite"
    after_two = LedgerState.read(ledger)
    assert 4.0 < after_two.spent() <= 8.0
    third = first.with_changes({"run-dir": str(tmp_path / "three"), "dp.epsilon": 8.0})
    with pytest.raises(RunError, match="quorum"):
        run(third)
    after_three = LedgerState.read(ledger)
    assert after_three.spent() <= 8.0
    assert after_three.refusals >= 1
    events = read_json_lines(tmp_path / "three" / "metrics.jsonl")
    refused = [event for event in events if event["event"] == "left-out" and event["phase"] == "train"]
    assert {event["site"] for event in refused} == {"hospital-1", "hospital-2", "hospital-3"}
    assert all("privacy budget" in event["reason"] for event in refused)
    runs = {entry.body.get("run_id") for entry in after_three.entries} - {None}
    assert runs == {"one", "two", "three"}


def test_changed_data_takes_part_only_when_accepted_and_the_cap_counts_both_versions(
    small_config: Config, sites_dir: Path, tmp_path: Path
) -> None:
    sites = tmp_path / "capped"
    shutil.copytree(sites_dir, sites)
    with_budget(sites, epsilon=4.5)
    first = small_config(PRIVATE | {"sites-dir": str(sites), "run-dir": str(tmp_path / "one")})
    run(first)
    site = sites / "hospital-1"
    spent_before = LedgerState.read(site / "ledger.sqlite").spent()
    for image in sorted((site / "images").iterdir())[:3]:
        image.touch()
    (site / "site.toml").touch()  # a process that holds the folder open looks at its tables only
    second = first.with_changes(
        {"run-dir": str(tmp_path / "two"), "dp.epsilon": 0.4, "dp.release-scale": 50.0}
    )
    summary = run(second)
    assert sorted(summary["statements"]) == ["hospital-2", "hospital-3"]
    (refused,) = summary["left_out"]
    assert (refused["phase"], "accept-version" in refused["reason"]) == ("enrol", True)
    assert LedgerState.read(site / "ledger.sqlite").spent() == spent_before
    Ledger.accept_version(site / "ledger.sqlite", "hospital-1", BagStore.open(site, 16).data_version)
    third = second.with_changes({"run-dir": str(tmp_path / "three")})
    assert "hospital-1" in run(third)["statements"]
    book = LedgerState.read(site / "ledger.sqlite")
    assert spent_before < book.spent() <= 4.5
    assert len(book.versions) == 2
    fourth = first.with_changes({"run-dir": str(tmp_path / "four")})
    with pytest.raises(RunError, match="quorum"):
        run(fourth)
    assert LedgerState.read(site / "ledger.sqlite").spent() <= 4.5


def test_a_site_whose_budget_is_used_up_leaves_and_the_run_goes_on(
    small_config: Config, sites_dir: Path, tmp_path: Path
) -> None:
    sites = tmp_path / "sites-with-one-poor"
    shutil.copytree(sites_dir, sites)
    poor = tmp_path / "poor"
    poor.mkdir()
    shutil.move(str(sites / "hospital-2"), str(poor / "hospital-2"))
    with_budget(poor, epsilon=1.0)
    shutil.move(str(poor / "hospital-2"), str(sites / "hospital-2"))
    config = small_config(PRIVATE | {"sites-dir": str(sites), "federation.quorum": 2})
    summary = run(config)
    assert summary["sites"] == 2
    assert [(item["site"], item["phase"]) for item in summary["left_out"]] == [("hospital-2", "train")]
    assert LedgerState.read(sites / "hospital-2" / "ledger.sqlite").spent() <= 1.0


def test_a_site_with_a_budget_takes_no_part_in_a_run_without_privacy(
    small_config: Config, sites_dir: Path, tmp_path: Path
) -> None:
    sites = tmp_path / "capped"
    shutil.copytree(sites_dir, sites)
    with_budget(sites, epsilon=8.0)
    config = small_config({"sites-dir": str(sites)})
    with pytest.raises(RunError, match="privacy budget"):
        run(config)


class Dying(LocalGrid):
    """Dies when the last site has trained its second round."""

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = list(super().pull_messages(message_ids))
        if any(r.metadata.group_id == "2" and r.metadata.src_node_id == 1003 for r in replies):
            raise KeyboardInterrupt
        return replies


def test_a_round_that_is_done_again_is_paid_again_and_the_run_ends_early(
    small_config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small_config(PRIVATE | {"rounds": 3, "evaluation.every": 3})
    folder = Path(config.run_dir)
    flat = config.to_flat()
    with Dying(3, flat) as grid, pytest.raises(KeyboardInterrupt):
        app(grid, grid.server_context(flat))
    # The budget was made for three rounds; round 2 is trained a second time, so the last one is refused,
    # and the run ends with the model of round 2.
    summary = run(config.with_changes({"resume": True}))
    assert (summary["rounds"], summary["selected_round"], summary["sites"]) == (2, 2, 3)
    assert "does not allow round 3" in summary["stopped_early"]
    assert [level["images"] for level in summary["levels"]] == [72, 72, 72]
    (event,) = [e for e in read_json_lines(folder / "metrics.jsonl") if e["event"] == "stopped-early"]
    assert event["round"] == 2
    trained = load_file(sorted((folder / "checkpoints").iterdir())[-1])
    kept = load_file(folder / "model.safetensors")
    arrays = {
        name.removeprefix("model/"): array for name, array in trained.items() if name.startswith("model/")
    }
    assert arrays
    assert all((kept[name] == array).all() for name, array in arrays.items())
    report([folder], tmp_path / "report")
    told = json.loads((tmp_path / "report" / "report.json").read_text())
    assert told["problems"] == []
    assert told["stopped_early"] == summary["stopped_early"]
    assert any("ended early, after round 2" in text for text in told["cautions"])
    print_summary(read_summary(folder))
    assert "stopped early, after round 2" in capsys.readouterr().out
    for book in ledgers(config).values():
        trained = [entry for entry in book.entries if entry.kind == "confirmed"]
        steps = sum(event.steps for event in book.events if event.kind == "poisson_gaussian")
        assert (len(trained), steps) == (3, 6)
        assert book.spent() <= 4.0
        assert book.refusals == 1
