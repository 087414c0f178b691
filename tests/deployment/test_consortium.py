"""From an empty folder to a private run with three sites as real processes, and to nothing left."""

import json
import os
import shutil
import signal
import subprocess
import zipfile
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from client.ledger.state import LedgerState
from deploy.flower.processes import free_port, program
from tests.deployment.conftest import SITES, Consortium, Run, wait_until

ROUNDS = 3


def assert_a_whole_run(consortium: Consortium, run: Run, rounds: int) -> None:
    """Every site in every round; the report and the server say what the ledgers say."""
    assert [event["updates"] for event in run.events("round")] == [len(consortium.sites)] * rounds
    ledgers = {site: consortium.data / site / "ledger.sqlite" for site in consortium.sites}
    done = consortium.fedbags("report", run.folder, *ledgers.values(), "--out", run.folder / "report")
    assert "does not hold" not in done.stdout
    report = json.loads((run.folder / "report" / "report.json").read_text())
    assert report["problems"] == []
    stated = run.summary["statements"]
    for site, path in ledgers.items():
        book = LedgerState.read(path)
        assert not book.open_reservations
        assert stated[site]["epsilon"] == pytest.approx(book.spent(), abs=1e-9)
        assert stated[site]["ledger_head"] == book.head
        assert book.spent() > 0
        consortium.offline("ledger", "verify", path, "--head", book.head)


def test_a_site_trains_privately(smallest: Consortium) -> None:
    """TLS, node keys, the approved app, DP: one site and one round, the short form of the two below."""
    assert smallest.status()["sites"] == dict.fromkeys(smallest.sites, "online")
    run = smallest.run("short", 1)
    assert_a_whole_run(smallest, run, 1)
    for kit in (smallest.coordinator, smallest.site(SITES[0])):
        assert kit.metrics_endpoint is not None
        address, port = kit.metrics_endpoint
        scraped = httpx.get(f"http://{address}:{port}/metrics").text
        figures = {s.name: s.value for f in text_string_to_metric_families(scraped) for s in f.samples}
        epsilon = LedgerState.read(smallest.data / SITES[0] / "ledger.sqlite").spent()
        assert figures["fedbags_epsilon_spent"] == pytest.approx(epsilon, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "secure-aggregation"])
def test_three_sites_train_privately_for_three_rounds(consortium: Consortium, masked: bool) -> None:
    assert consortium.status()["sites"] == dict.fromkeys(SITES, "online")
    run = consortium.run(f"masked-{masked}", ROUNDS, **{"secure-aggregation.enabled": masked})
    assert_a_whole_run(consortium, run, ROUNDS)


@pytest.mark.slow
def test_flowers_own_command_runs_the_same_kit(consortium: Consortium, tmp_path: Path) -> None:
    """`flwr run APP NAME` with the kit's FLWR_HOME: the sites take the app, for it is the approved one."""
    kit, out = consortium.coordinator, tmp_path / "by-hand"
    zipfile.ZipFile(kit.app).extractall(tmp_path / "app")
    environment = os.environ | {"FLWR_HOME": str(kit.flower_home), "FLWR_TELEMETRY_ENABLED": "0"}
    settings = (
        f'run-dir="{out}" rounds=1 federation.sites=3 model.image-size=16 train.part="head" '
        'model.backbone="colour-histogram"'
    )
    private = (
        ' dp.epsilon=8.0 dp.steps-per-round=2 train.optimiser="sgd" train.held-back=0.0'
        ' train.augmentation="none"'
    )
    subprocess.run(
        [program("flwr"), "run", str(tmp_path / "app"), kit.connection, "--run-config", settings + private],
        env=environment, cwd=tmp_path, check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    wait_until((out / "summary.json").exists, 240, "the run ends")
    assert json.loads((out / "summary.json").read_text())["sites"] == len(SITES)


@pytest.mark.slow
def test_a_failed_run_ends_with_status_1_and_its_reason(consortium: Consortium) -> None:
    impossible = {
        "federation.sites": 4,
        "federation.quorum": 4,
        "federation.enrol-deadline": 5.0,
        "federation.patience": 1.0,
    }
    run = consortium.start_run("failed", 1, **impossible)
    assert run.wait() == 1
    assert "the quorum is 4" in run.said
    assert "Traceback" not in run.said


@pytest.mark.slow
def test_an_interrupted_run_is_stopped_and_can_be_resumed(consortium: Consortium) -> None:
    run = consortium.start_run("stopped", 3)
    run.wait_for("round", round=1)
    run.process.send_signal(signal.SIGINT)
    assert run.wait() == 1
    assert "was stopped" in run.said
    assert not run.events("finished")
    done = consortium.fedbags(
        "run", consortium.coordinator.folder, "--resume", "--out", run.folder, "--json", timeout=400
    )
    assert json.loads(done.stdout)["rounds"] == 3
    assert [event["round"] for event in run.events("round")] == [1, 2, 3]


@pytest.mark.slow
def test_mistakes_are_one_clear_error(consortium: Consortium, tmp_path: Path) -> None:
    """Started twice, a port in use, bad data, the other party's kit, an unknown key."""
    kit = consortium.coordinator
    site = consortium.site(SITES[0])

    def mistake(*arguments: object) -> str:
        said = consortium.fedbags(*arguments, status=2).stderr
        assert said.startswith("error: ")
        assert "Traceback" not in said
        return said

    assert "it runs already" in mistake("server", "up", kit.folder)
    assert "it runs already" in mistake("site", "up", site.folder)
    assert "needs role 'site'" in mistake("site", "up", kit.folder)
    copy = tmp_path / "coordinator"
    shutil.copytree(kit.folder, copy, ignore=shutil.ignore_patterns("state", "logs"))
    assert f"port {kit.server.port} on 127.0.0.1 (port, for the sites) is in use" in mistake(
        "server", "up", copy
    )
    bare = tmp_path / "site"
    shutil.copytree(site.folder, bare, ignore=shutil.ignore_patterns("state", "logs"))
    text = (bare / "kit.toml").read_text().replace(str(site.ports.runtime_port), str(free_port()))
    text = text.replace(str(site.ports.metrics_port), "0")
    (bare / "kit.toml").write_text(text.replace(f'"{consortium.data / site.site}"', '""'))
    assert "data-path is empty" in mistake("site", "up", bare)
    (bare / "kit.toml").write_text(text)
    other = consortium.data / SITES[1]
    (bare / "kit.toml").write_text(text.replace(str(consortium.data / site.site), str(other)))
    assert "has name = 'hospital-2'" in mistake("site", "up", bare)
    broken = tmp_path / "data"
    shutil.copytree(consortium.data / site.site, broken)
    (broken / "bags.csv").write_text("bag_id,label,count\nb1,no such label,4\n")
    (bare / "kit.toml").write_text(text.replace(str(consortium.data / site.site), str(broken)))
    assert "no such label" in mistake("site", "up", bare)
    assert "no-such-key" in mistake("run", kit.folder, "--set", "no-such-key=1")
