"""No name, label or reason is taken for markup, and no control character in one reaches a terminal."""

import ast
import io
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import deploy.cli.bags
import deploy.cli.consortium
import deploy.cli.runs
from common.run_records import RunEvent, RunSummary, read_event
from deploy.cli import say, terminal
from deploy.cli.terminal import Follower
from deploy.datasets import site_check
from deploy.runs import predict, show
from deploy.runs.prometheus import _WatchCollector
from deploy.runs.reading import fold
from deploy.runs.show import run_table
from server.run_folder import RunFolder

ROOT = Path(__file__).parents[2]

NAMES = {
    "a closing tag": "mel [/other]",
    "a tag alone": "[/x]",
    "a word in brackets": "carcinoma [nos]",
    "a colour": "[red]x",
    "an emoji code": ":skull:",
    "an escape sequence": "a\x1b[2J",
    "the eight-bit form": "a\x9b2J",
    "a carriage return": "a\rb",
    "a turned direction": "a\u202eb",
    "an invisible character": "a\u200bb",
}


def shown(name: str) -> str:
    """The name as it must appear."""
    return name if name.isprintable() else name.encode("unicode_escape").decode()


def event(kind: str, **fields: Any) -> RunEvent:
    return read_event({"event": kind, "time": 1.0, "round": 1, **fields})


def print_check(name: str) -> None:
    images = {"used": 1, "listed": 1, "converted": 0, "resized": 0, "quarantined": 0}
    site_check.print_check(
        {
            "site": "here", "data_version": "0", "test_images": 0, "images": images,
            "bags": {"used": 1, "listed": 1, "smallest": 1, "largest": 1, "mean": 1.0},
            "levels": [{"name": name, "classes": 2}],
            "leaves": {
                "private": False, "proportion_release": "total", "model_update": "exact", "metrics": [],
                "beyond_default": [],
                "label_counts": {name: 3.0},
            },
            "withheld": {"metrics": [], "always": []},
        }
    )  # fmt: skip


def print_summary(name: str) -> None:
    level = {
        "name": name, "classes": 2, "accuracy": 0.5, "balanced_accuracy": 0.5, "macro_f1": 0.5,
        "consistent_accuracy": 0.5,
    }  # fmt: skip
    show.print_summary(
        RunSummary.model_validate({
            "name": name, "method": "lhfglp", "sites": 1, "rounds": 1, "selected_round": 1, "seconds": 1.0,
            "stopped_early": name, "levels": [level], "bags": [{"level": name, "l1": 0.1}],
            "per_site": {name: {"bags": 1, "release": "exact", "epsilon": None, "levels": [level]}},
            "left_out": [{"round": 1, "site": name, "phase": "train", "reason": name}],
        })
    )  # fmt: skip


def print_predictions(name: str) -> None:
    level = {"level": "leaf", "class": name, "probability": 0.5}
    code = {"level": "leaf", "atoms": [{"atom": 1, "class": name, "value": 1.0}]}
    row = {"image": name, "levels": [level], "path": [name], "path_probability_product": 0.5, "codes": [code]}
    predict.print_predictions([row])


def print_build(name: str) -> None:
    site = SimpleNamespace(
        name=name, bags=1, images=1, test_images=0, bag_size_min=1, bag_size_mean=1.0, bag_size_max=1
    )
    report: Any = SimpleNamespace(
        out=Path("out") / name.replace("/", "|"), used=1, listed=1, sites=[site], notes=[name], quarantined=1
    )
    deploy.cli.bags._print(report)


def print_programs(name: str) -> None:
    program = {"name": "superlink", "status": "down", "pid": None, "since": "", "reason": name}
    deploy.cli.consortium._print({"programs": [program], "left_behind": 0, "sites": {name: "away"}}, "server")


def print_status(name: str) -> None:
    state = fold(
        [
            event("enrolled", sites=[name], rounds=3),
            event("left-out", site=name, phase="train", reason=name),
            event("left-out", site="node 4", phase="enrol", reason=name),
            event("waiting", sites=[name], missing=1),
            event("failed", reason=name),
        ]
    )
    terminal.console().print(run_table(state, name, 2.0))


def print_error(name: str) -> None:
    say(f"error: no such class: {name}", err=True)


PRINTERS: list[Callable[[str], None]] = [
    print_check, print_summary, print_predictions, print_build, print_programs, print_status, print_error,
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES.values(), ids=list(NAMES))
@pytest.mark.parametrize("printer", PRINTERS, ids=lambda printer: printer.__name__)
def test_names_are_printed_as_they_are(
    printer: Callable[[str], None], name: str, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    printer(name)
    captured = capsys.readouterr()
    text = captured.out + captured.err
    assert shown(name) in text
    assert not any(not c.isprintable() and c != "\n" for c in text)


@pytest.mark.parametrize("name", NAMES.values(), ids=list(NAMES))
def test_the_bars_of_a_run_print_names_as_they_are(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    folder = RunFolder(tmp_path)
    folder.record(event("enrolled", round=0, sites=[name, "other"]))
    folder.record(event("update", round=1, site="other", loss=None))
    folder.record(event("left-out", round=1, site=name, phase="train", reason=name))
    folder.record(event("left", round=1, site=name))
    with Follower(folder.metrics, 3):
        pass
    text = capsys.readouterr().err
    assert text.count(shown(name)) >= 3
    assert "\x9b" not in text
    assert "\x1b[2J" not in text


@pytest.mark.parametrize("name", NAMES.values(), ids=list(NAMES))
def test_metrics_hold_no_control_character(name: str) -> None:
    from prometheus_client import CollectorRegistry, generate_latest

    state = fold([event("enrolled", sites=[name], rounds=3)])
    source: Any = SimpleNamespace(refresh=lambda: state, name=name)
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_WatchCollector(source))
    text = generate_latest(registry).decode()
    assert all(c.isprintable() or c == "\n" for c in text)
    assert shown(name).replace("\\", "\\\\") in text


def test_a_cell_is_as_wide_as_what_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    rows = terminal.table("t", "name", "figure")
    rows.add_row("a\x1b[2J\x1b[3J", "1")
    rows.add_row("b", "2")
    screen = terminal.console()
    screen.file = io.StringIO()
    screen.print(rows)
    lines = [line.rstrip() for line in screen.file.getvalue().splitlines() if line.startswith(("│", "┃"))]
    assert len({len(line) for line in lines}) == 1


def test_nothing_prints_but_by_the_two_ways_that_show_texts_as_they_are() -> None:
    """``tables.console`` and ``say``; JSON is ASCII in any case."""
    allowed = {
        "Console": {"deploy/cli/terminal.py"},
        "PlainConsole": {"deploy/cli/terminal.py"},
        "TextColumn": {"deploy/cli/terminal.py"},
        "print": set[str](),
        "from_markup": set[str](),
    }
    found = 0
    for package in ("deploy", "server", "client", "common"):
        for path in (ROOT / package).rglob("*.py"):
            place = path.relative_to(ROOT).as_posix()
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if not isinstance(node, ast.Call):
                    continue
                if isinstance(node.func, ast.Name) and node.func.id in allowed:
                    assert place in allowed[node.func.id], f"{place}:{node.lineno}"
                    found += 1
                if isinstance(node.func, ast.Attribute) and node.func.attr in ("echo", "secho"):
                    argument = ast.unparse(node.args[0])
                    assert place == "deploy/cli/__init__.py" or argument.startswith("json.dumps("), (
                        f"{place}:{node.lineno}"
                    )
                    found += 1
    assert found >= 3
