"""A site's journal: a line per message in figures, from real sites only, and never an identifier."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Error, Message, RecordDict

from client import door
from client.app import app
from client.ledger.anchor import anchor_file
from client.site import JOURNAL_FILE, PARTITION
from common.config import RunConfig
from common.records import ModelUpdate, SiteError
from common.wire import size, to_records
from deploy.consortium.kit import SiteKit
from deploy.flower.internals import become_server

REQUEST = to_records(ModelUpdate(sender="server", round=4))
CANARIES = ("patient-4711", "/secret/path", "melanoma")


def question(node: dict, kind: str = "train", group: str = "4") -> tuple[Message, Context]:
    become_server()
    message = Message(REQUEST, 7, kind, group_id=group)
    config = RunConfig().with_changes({"model.image-size": 16})
    return message, Context(11, 7, node, RecordDict(), config.to_flat())


def lines(path: Path) -> list[dict]:
    return [json.loads(text) for text in path.read_text().splitlines()]


def good(message: Message, context: Context) -> Message:
    return Message(to_records(ModelUpdate(sender="north", round=4)), reply_to=message)


def test_a_message_becomes_one_line_of_figures(tmp_path: Path) -> None:
    message, context = question({"data-path": str(tmp_path)})
    reply = door._record(message, context, good)
    (line,) = lines(tmp_path / JOURNAL_FILE)
    assert line.pop("seconds") >= 0
    assert line.pop("time") > 1e9
    assert line == {
        "run": 11,
        "round": 4,
        "phase": "train",
        "bytes_received": size(REQUEST),
        "bytes_sent": size(reply.content),
        "code": 0,
        "ledger_rows": 0,
        "ledger_head": "",
    }


def test_a_refusal_is_its_code_and_no_bytes(tmp_path: Path) -> None:
    def refuse(message: Message, context: Context) -> Message:
        return Message(Error(int(SiteError.BUDGET), "no"), reply_to=message)

    message, context = question({"data-path": str(tmp_path)})
    door._record(message, context, refuse)
    (line,) = lines(tmp_path / JOURNAL_FILE)
    assert (line["code"], line["bytes_sent"]) == (SiteError.BUDGET, 0)


def test_with_a_kit_the_journal_lies_where_the_kit_says(tmp_path: Path) -> None:
    message, context = question({"data-path": str(tmp_path / "data"), "kit": str(tmp_path)})
    door._record(message, context, good)
    kit = SiteKit(consortium="c", app_hash="0" * 64, site="north", server="fl.example.org", port=8443).at(
        tmp_path
    )
    assert len(lines(kit.logs / JOURNAL_FILE)) == 1


def test_a_simulated_site_keeps_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    message, context = question({PARTITION: 0})
    door._record(message, context, good)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("group", ["patient-4711", "9" * 5000, "-1", ""])
def test_what_a_server_writes_into_a_message_gets_no_further(group: str, tmp_path: Path) -> None:
    message, context = question({"data-path": str(tmp_path)}, kind="query.melanoma", group=group)
    door._record(message, context, good)
    (line,) = lines(tmp_path / JOURNAL_FILE)
    assert (line["round"], line["phase"]) == (0, door._OTHER)


def test_a_journal_that_cannot_be_written_stops_no_reply(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / JOURNAL_FILE).mkdir()
    message, context = question({"data-path": str(tmp_path)})
    assert not door._record(message, context, good).has_error()
    assert "the journal cannot be written (IsADirectoryError)" in caplog.text


def a_file_for_a_folder(ledger: Path, state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state.write_text("in the way")


def a_folder_for_the_anchor(ledger: Path, state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    anchor_file(ledger, state.parent).path.mkdir(parents=True)


def a_site_that_may_not_be_read(ledger: Path, state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Path.exists

    def exists(self: Path, **more: bool) -> bool:
        if self == ledger:
            raise PermissionError(13, "Permission denied", str(self))
        return right(self, **more)

    monkeypatch.setattr(Path, "exists", exists)


def a_disk_that_cannot_be_written(ledger: Path, state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Path.mkdir

    def mkdir(self: Path, *args: Any, **more: Any) -> None:
        if self == state:
            raise OSError(30, "Read-only file system", str(self))
        right(self, *args, **more)

    monkeypatch.setattr(Path, "mkdir", mkdir)


@pytest.mark.parametrize(
    "spoil",
    [
        a_file_for_a_folder,
        a_folder_for_the_anchor,
        a_site_that_may_not_be_read,
        a_disk_that_cannot_be_written,
    ],
)
def test_no_fault_of_a_file_changes_what_the_guard_decided(
    spoil: Callable[[Path, Path, pytest.MonkeyPatch], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever becomes of the ledger's anchor, the reply goes out and no exception with a path does."""
    data, kit = tmp_path / "data", tmp_path / "St-Mary-oncology"
    data.mkdir()
    (kit / "logs").mkdir(parents=True)
    (data / "ledger.sqlite").write_bytes(b"x")
    message, context = question({"data-path": str(data), "kit": str(kit)})
    spoil(data / "ledger.sqlite", kit / "state", monkeypatch)
    reply = door._record(message, context, good)
    monkeypatch.undo()
    assert not reply.has_error()
    assert [line["ledger_rows"] for line in lines(kit / "logs" / JOURNAL_FILE)] == [0]


def test_naming_the_ledgers_row_makes_no_folder(tmp_path: Path) -> None:
    data, kit = tmp_path / "data", tmp_path / "kit"
    data.mkdir()
    kit.mkdir()
    (data / "ledger.sqlite").write_bytes(b"x")
    message, context = question({"data-path": str(data), "kit": str(kit)})
    door._record(message, context, good)
    assert [path.name for path in kit.iterdir()] == ["logs"]


def test_planted_identifiers_reach_neither_journal_nor_log(
    sites_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    site = tmp_path / "secret" / "path"
    shutil.copytree(sites_dir / "hospital-1", site, ignore=shutil.ignore_patterns(JOURNAL_FILE))
    manifest = site / "manifest.csv"
    manifest.write_text(manifest.read_text() + "images/patient-4711-melanoma.png,bag-x\n")
    message, context = question({"data-path": str(site)})
    assert app(message, context).error.code == SiteError.DATA

    def fail(message: Message, context: Context) -> Message:
        logging.getLogger("fedbags.client").warning("cannot use %s", " ".join(CANARIES))
        try:
            raise ValueError(" ".join(CANARIES))
        except ValueError:
            logging.getLogger("fedbags.client").exception("it failed for %(label)s", {"label": "melanoma"})
        return good(message, context)

    door._record(message, context, fail)
    logged = capfd.readouterr().err.splitlines()
    assert [json.loads(text)["level"] for text in logged] == ["error", "warning", "error"]
    written = (site / JOURNAL_FILE).read_text()
    assert [line["code"] for line in lines(site / JOURNAL_FILE)] == [SiteError.DATA, 0]
    for canary in (*CANARIES, str(site), str(tmp_path)):
        assert canary not in written
        assert all(canary not in text for text in logged)
