"""What Prometheus scrapes over HTTP is what the events, the journal and the ledger say, and names nobody."""

import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.request import urlopen

import pytest
from prometheus_client.parser import text_string_to_metric_families

from client.door import _append, _Done
from client.ledger.file import LEDGER_FILE
from client.ledger.state import LedgerState
from client.session import SiteSession
from client.site import SiteConfig
from common.errors import UserError
from common.records import SiteError
from common.run_records import Cause, SiteLeftOut, read_event
from deploy.consortium.kit import SiteKit
from deploy.runs.prometheus import _run_metrics, _site_metrics, serve
from deploy.runs.reading import RunSource, Stage, fold
from deploy.runs.site_state import SiteSource, SiteState, source
from server.run_folder import RunFolder

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]
CANARIES = ("patient-4711", "/secret", "melanoma")


def read(text: str) -> Samples:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def at(samples: Samples, name: str, **labels: str) -> float:
    return samples[name, frozenset(labels.items())]


@pytest.fixture
def scrape() -> Iterator[Callable[[Path], str]]:
    """Serves a path on loopback and scrapes it once; a path that was served before is scraped again."""
    served: dict[Path, tuple[int, Callable[[], None]]] = {}

    def get(path: Path) -> str:
        if path not in served:
            server, close = serve(source(path), 0)
            served[path] = (server.server_port, close)
        with urlopen(f"http://127.0.0.1:{served[path][0]}/metrics", timeout=30) as answer:
            return answer.read().decode()

    yield get
    for _, close in served.values():
        close()


@pytest.fixture
def site_kit(watched_run: Path, tmp_path: Path) -> Path:
    """A site's kit whose site took part in the run, with its ledger and three lines of journal."""
    kit = tmp_path / "kit"
    shutil.copytree(watched_run.parents[1] / "sites" / "hospital-1", kit / "data")
    shutil.copy(watched_run / "sites" / "hospital-1" / LEDGER_FILE, kit / "data")
    SiteKit(
        consortium="c",
        app_hash="0" * 64,
        site="hospital-1",
        server="fl.example.org",
        port=8443,
        data_path="data",
    ).at(kit).save()
    for round_, seconds, sent, code in (
        (1, 2.0, 100, 0),
        (2, 3.0, 100, 0),
        (3, 0.5, 0, int(SiteError.BUDGET)),
    ):
        _append(
            kit / "logs" / "journal.jsonl", _Done(1e9 + round_, 11, round_, "train", seconds, 50, sent, code)
        )
    return kit


def test_a_runs_metrics_are_those_of_its_events(watched_run: Path, scrape: Callable[[Path], str]) -> None:
    text = scrape(watched_run)
    samples = read(text)
    events = [json.loads(line) for line in (watched_run / "metrics.jsonl").read_text().splitlines()]
    phases = [event for event in events if event["event"] == "phase"]
    assert at(samples, "fedbags_run_info", run="first") == 1
    assert (at(samples, "fedbags_round"), at(samples, "fedbags_rounds")) == (2, 2)
    assert [stage for stage in Stage if at(samples, "fedbags_run_stage", stage=stage)] == [Stage.FINISHED]
    assert at(samples, "fedbags_sites", state="in") == 2
    assert at(samples, "fedbags_sites", state="out") == 1
    assert at(samples, "fedbags_site_taking_part", site="hospital-3") == 0
    for phase in ("train", "query.proportions", "evaluate.test"):
        took = [event["seconds"] for event in phases if event["phase"] == phase]
        assert at(samples, "fedbags_phase_seconds_sum", phase=phase) == pytest.approx(sum(took))
        assert at(samples, "fedbags_phase_seconds_count", phase=phase) == len(took)
    for direction in ("sent", "received"):
        total = sum(event[f"bytes_{direction}"] for event in phases)
        assert at(samples, "fedbags_bytes_total", direction=direction) == total > 0
    assert {cause: at(samples, "fedbags_refusals_total", reason=cause) for cause in Cause} == dict.fromkeys(
        Cause, 0
    ) | {"data": 1}
    assert at(samples, "fedbags_last_event_timestamp_seconds") == events[-1]["time"]
    for canary in (*CANARIES, str(watched_run)):
        assert canary not in text


def test_epsilon_at_the_coordinator_is_what_the_sites_ledgers_say(
    watched_run: Path, scrape: Callable[[Path], str]
) -> None:
    samples = read(scrape(watched_run))
    for site in ("hospital-1", "hospital-2"):
        book = LedgerState.read(watched_run / "sites" / site / LEDGER_FILE)
        spent = at(samples, "fedbags_epsilon_spent", site=site, delta="0.001")
        assert spent == pytest.approx(book.spent(), abs=1e-9)
        assert at(samples, "fedbags_epsilon_left", site=site, delta="0.001") == pytest.approx(4.0 - spent)


def test_a_scrape_sees_what_happened_since_the_last_one(own_run: Path, scrape: Callable[[Path], str]) -> None:
    before = read(scrape(own_run))
    late = {"round": 3, "site": "hospital-1", "phase": "train", "cause": Cause.DEADLINE, "reason": "late"}
    RunFolder(own_run).record(SiteLeftOut(**late))
    after = read(scrape(own_run))
    assert at(before, "fedbags_refusals_total", reason="deadline") == 0
    assert at(after, "fedbags_refusals_total", reason="deadline") == 1
    assert at(after, "fedbags_sites", state="in") == 1


def test_a_site_exports_its_journal_and_its_own_ledger(site_kit: Path, scrape: Callable[[Path], str]) -> None:
    text = scrape(site_kit)
    samples = read(text)
    assert at(samples, "fedbags_site_info", site="hospital-1") == 1
    assert at(samples, "fedbags_round") == 3
    assert at(samples, "fedbags_phase_seconds_sum", phase="train") == 5.5
    assert at(samples, "fedbags_bytes_total", direction="sent") == 200
    assert at(samples, "fedbags_bytes_total", direction="received") == 150
    assert at(samples, "fedbags_refusals_total", reason="budget") == 1
    assert at(samples, "fedbags_last_message_timestamp_seconds") == 1e9 + 3
    book = LedgerState.read(site_kit / "data" / LEDGER_FILE)
    assert at(samples, "fedbags_epsilon_spent", site="hospital-1", delta="0.001") == book.spent() > 0
    assert at(samples, "fedbags_epsilon_left", site="hospital-1", delta="0.001") == 4.0 - book.spent()
    assert at(samples, "fedbags_ledger_readable") == 1
    assert str(site_kit) not in text


def test_a_ledger_that_cannot_be_trusted_is_seen_and_stops_no_scrape(
    site_kit: Path, scrape: Callable[[Path], str]
) -> None:
    (site_kit / "data" / LEDGER_FILE).write_bytes(b"no ledger, /secret/path patient-4711")
    text = scrape(site_kit)
    samples = read(text)
    assert at(samples, "fedbags_ledger_readable") == 0
    assert at(samples, "fedbags_bytes_total", direction="sent") == 200
    assert "fedbags_epsilon_spent{" not in text
    assert not any(canary in text for canary in (*CANARIES, str(site_kit)))


def test_a_data_folder_without_a_kit_is_a_site_too(site_kit: Path) -> None:
    watched = source(site_kit / "data")
    assert isinstance(watched, SiteSource)
    assert watched.refresh().spending is not None


def test_the_exporters_ledger_is_the_one_that_training_writes(site_kit: Path, small_config: Callable) -> None:
    from flwr.app import RecordDict

    data = site_kit / "data"
    site = SiteConfig.load(data)
    session = SiteSession(small_config(), site, data, {"data-path": str(data)}, 7, RecordDict())
    assert session.ledger_path == data / LEDGER_FILE


def test_before_the_first_run_there_is_a_page_too(own_run: Path, scrape: Callable[[Path], str]) -> None:
    runs = own_run.parent
    server, close = serve(RunSource(runs / "none-yet", newest=True), 0)
    with urlopen(f"http://127.0.0.1:{server.server_port}/metrics", timeout=30) as answer:
        samples = read(answer.read().decode())
    close()
    assert at(samples, "fedbags_run_stage", stage="starting") == 1


def test_texts_of_events_never_become_labels() -> None:
    told = " ".join(CANARIES)
    events = [
        {"event": "joined", "site": "a", "time": 1.0},
        {"event": "left-out", "site": "a", "phase": "train", "reason": told, "time": 1.0},
        {"event": "left-out", "site": told, "phase": "enrol", "reason": told, "time": 1.0},
        {"event": "failed", "reason": told, "time": 1.0},
    ]
    for metric in _run_metrics(fold(map(read_event, events)), "first"):
        for sample in metric.samples:
            assert not any(canary in value for value in sample.labels.values() for canary in CANARIES)


def test_every_metric_is_documented_and_the_other_way_round(watched_run: Path, site_kit: Path) -> None:
    page = (Path(__file__).parents[3] / "docs" / "monitoring.md").read_text()
    named = {
        line.split("`")[1].partition("{")[0] for line in page.splitlines() if line.startswith("| `fedbags_")
    }
    state, site = RunSource(watched_run).refresh(), source(site_kit).refresh()
    exported = {
        metric.name + {"counter": "_total"}.get(metric.type, "")
        for metric in (*_run_metrics(state, "first"), *_site_metrics(site))
    }
    # A private run sends no loss.
    assert exported | {"fedbags_loss"} == named
    for cause in Cause:
        assert f"`{cause}`" in page


def test_a_port_in_use_is_one_clear_error(watched_run: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UserError, match="Choose another port"):
            serve(RunSource(watched_run), taken.getsockname()[1])


def test_nothing_to_watch_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing to watch"):
        source(tmp_path)


def test_the_command_serves_on_loopback_until_it_is_ended(watched_run: Path) -> None:
    code = "from deploy.cli.main import main; main()"
    with subprocess.Popen(
        [sys.executable, "-c", code, "metrics", str(watched_run), "--port", "0"],
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stderr is not None
            said = process.stderr.readline()
            assert said.startswith("serving http://127.0.0.1:")
            with urlopen(said.split()[1], timeout=30) as answer:
                assert at(read(answer.read().decode()), "fedbags_round") == 2
        finally:
            process.terminate()


def test_a_ledger_that_could_not_be_read_once_is_read_again(
    site_kit: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched, read_book = source(site_kit), LedgerState.read

    def busy(path: Path) -> LedgerState:
        raise UserError("locked")

    monkeypatch.setattr(LedgerState, "read", busy)
    assert watched.refresh().spending is None
    monkeypatch.setattr(LedgerState, "read", read_book)
    state = watched.refresh()
    assert isinstance(state, SiteState)
    assert (state.ledger_fault, state.spending is not None) == ("", True)
