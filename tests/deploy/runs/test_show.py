"""The table that a person watches: what is in it, and that it follows a run to its end."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from client.ledger.file import LEDGER_FILE
from common.run_records import Finished, RunSummary, read_event
from deploy.runs.reading import PhaseTimes, fold
from deploy.runs.show import print_summary, run_table, site_table
from deploy.runs.site_state import SiteState, _Spending
from server.run_folder import RunFolder

EVENTS = [
    read_event({"event": kind, "time": at, **fields})
    for kind, at, fields in (
        ("enrolled", 100.0, {"round": 0, "rounds": 12, "sites": ["north", "south"]}),
        ("update", 110.0, {"round": 1, "site": "north", "bags": 75, "loss": 1.25}),
        ("statement", 110.0, {"site": "north", "epsilon": 2.5, "delta": 1e-4, "budget_left": 5.5}),
        (
            "left-out",
            120.0,
            {"site": "south", "phase": "train", "cause": "deadline", "reason": "no reply within 3 s"},
        ),
        (
            "left-out",
            120.0,
            {"site": "node 7", "phase": "enrol", "cause": "not-admitted", "reason": "its tree"},
        ),
        ("phase", 121.0, {"phase": "train", "seconds": 4.0, "bytes_sent": 2**20, "bytes_received": 2**21}),
        ("round", 122.0, {"round": 1, "updates": 1, "loss": 1.25}),
        ("waiting", 130.0, {"sites": ["south", "west"], "present": 1, "missing": 1, "quorum": 2}),
    )
]

RUN = """\
demo  waiting  round 1 of 12  loss 1.250  1 min 0 s, last sign 30 s ago
waiting for 1 more site(s), of: south, west
sites: 1 in, 1 out
┏━━━━━━━┳━━━━━┳━━━━━━━━━┳━━━━━━━━━━━━┳━━━━━━┳━━━━━━━┳━━━━━━━━━━━━━━━┳━━━━━━━┓
┃ site  ┃     ┃ updates ┃ last round ┃ bags ┃  loss ┃ epsilon spent ┃  left ┃
┡━━━━━━━╇━━━━━╇━━━━━━━━━╇━━━━━━━━━━━━╇━━━━━━╇━━━━━━━╇━━━━━━━━━━━━━━━╇━━━━━━━┩
│ north │  in │       1 │          1 │   75 │ 1.250 │         2.500 │ 5.500 │
│ south │ out │       0 │            │      │       │               │       │
└───────┴─────┴─────────┴────────────┴──────┴───────┴───────────────┴───────┘
south is out: no reply within 3 s
node 7 was not admitted: its tree
1.0 MiB sent, 2.0 MiB received
┏━━━━━━━┳━━━━━━━┳━━━━━━━━━━┳━━━━━━━━━━┓
┃ phase ┃ times ┃ mean (s) ┃ last (s) ┃
┡━━━━━━━╇━━━━━━━╇━━━━━━━━━━╇━━━━━━━━━━┩
│ train │     1 │     4.00 │     4.00 │
└───────┴───────┴──────────┴──────────┘
refused or not used: deadline 1, not-admitted 1
"""

SITE = """\
north  round 3, 4 messages answered, the last one 2 min 0 s ago
privacy budget, all runs
┏━━━━━━━━━━━━━━━━━━━━━┳━━━━━━━━━┓
┃                     ┃ epsilon ┃
┡━━━━━━━━━━━━━━━━━━━━━╇━━━━━━━━━┩
│ cap at delta 0.0001 │       8 │
│ spent               │     2.5 │
│ left                │     5.5 │
└─────────────────────┴─────────┘
1 reserved round(s) never finished; they count as spent
0.5 MiB sent, 1.0 MiB received
┏━━━━━━━┳━━━━━━━┳━━━━━━━━━━┳━━━━━━━━━━┓
┃ phase ┃ times ┃ mean (s) ┃ last (s) ┃
┡━━━━━━━╇━━━━━━━╇━━━━━━━━━━╇━━━━━━━━━━┩
│ train │     4 │     2.00 │     1.00 │
└───────┴───────┴──────────┴──────────┘
refused or not used: budget 1
"""


def drawn(what: object) -> str:
    console = Console(width=100, record=True, file=open("/dev/null", "w"), force_terminal=False)  # noqa: PTH123,SIM115
    console.print(what)
    console.file.close()
    return "".join(f"{line.rstrip()}\n" for line in console.export_text().splitlines())


def test_a_run_as_a_table() -> None:
    assert drawn(run_table(fold(EVENTS), "demo", 160.0)) == RUN


def test_a_site_as_a_table() -> None:
    state = SiteState(
        site="north", run=1, round=3, messages=4, last=1000.0, phases={"train": PhaseTimes(4, 8.0, 1.0)},
        bytes_sent=2**19, bytes_received=2**20, refusals={"budget": 1},
        spending=_Spending(2.5, 1e-4, 5.5, 8.0, 1, 1),
    )  # fmt: skip
    assert drawn(site_table(state, 1120.0)) == SITE


def test_a_site_without_a_ledger_and_one_with_a_damaged_ledger_say_so() -> None:
    assert drawn(site_table(SiteState(site="north"), 0.0)) == "north  no message answered yet\n"
    assert "row 3 is damaged" in drawn(
        site_table(SiteState(site="north", ledger_fault="row 3 is damaged"), 0.0)
    )


def status(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    code = "from deploy.cli.main import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, "status", *map(str, arguments)],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip


def test_the_command_prints_json(watched_run: Path) -> None:
    said = json.loads(status(watched_run, "--json").stdout)
    assert (said["run"], said["stage"], said["round"]) == ("first", "finished", 2)
    assert said["sites"]["hospital-3"]["updates"] == 1


def test_the_command_shows_a_sites_ledger(watched_run: Path, tmp_path: Path) -> None:
    data = tmp_path / "site"
    shutil.copytree(watched_run.parents[1] / "sites" / "hospital-1", data)
    shutil.copy(watched_run / "sites" / "hospital-1" / LEDGER_FILE, data)
    result = status(data, "--once")
    assert "privacy budget, all runs" in result.stdout
    assert result.stderr == ""


def test_the_live_table_ends_with_the_run(own_run: Path) -> None:
    last = (own_run / "metrics.jsonl").read_text().splitlines()[-1]
    assert json.loads(last)["event"] == "finished"
    lines = (own_run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (own_run / "metrics.jsonl").write_text("".join(lines[:-1]))
    code = "from deploy.cli.main import main; main()"
    with subprocess.Popen(
        [sys.executable, "-c", code, "status", str(own_run)], stdout=subprocess.PIPE, text=True
    ) as process:
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=4)
        RunFolder(own_run).record(Finished(round=2))
        shown, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "finished" in shown


def test_nothing_to_watch_is_one_clear_error(tmp_path: Path) -> None:
    result = status(tmp_path)
    assert result.returncode == 2
    assert "nothing to watch" in result.stderr


def test_a_run_without_labelled_test_images_has_its_heading(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    summary = {
        "name": "demo",
        "method": "lhfglp",
        "sites": 2,
        "rounds": 3,
        "selected_round": 2,
        "seconds": 9.0,
    }
    print_summary(RunSummary.model_validate(summary))
    assert capsys.readouterr().out.startswith(
        "demo: lhfglp, 2 sites, 3 rounds (model of round 2), 9 s; no labelled test images\n"
    )
