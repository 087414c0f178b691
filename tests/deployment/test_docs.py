"""The documentation's commands: all of them exist, and the quickstart's are run as one script."""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import click
import pytest

from client.ledger.state import LedgerState
from client.site import SiteConfig
from common.files import read_json_lines
from deploy.flower.processes import free_port, with_variable
from tests.deploy import in_process
from tests.deployment import documents
from tests.deployment.conftest import SITES
from tests.deployment.documents import PAGES, ROOT

QUICKSTART = ROOT / "docs" / "quickstart.md"
SECURITY = ROOT / "docs" / "security.md"
FEDBAGS = Path(sys.executable).parent / "fedbags"
PATH = os.pathsep.join([str(FEDBAGS.parent), os.environ["PATH"]])
ATTACKS = 15
"""Rows of the table of attacks."""


def ids(path: Path) -> str:
    return path.stem


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_every_command_of_a_block_is_taken(page: Path) -> None:
    for block in documents.shell_blocks(page.read_text(encoding="utf-8")):
        for arguments in documents.fedbags_commands(block):
            try:
                documents.parse(arguments)
            except click.UsageError as error:
                pytest.fail(f"fedbags {shlex.join(arguments)}: {error.format_message()}")


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_every_command_of_a_sentence_exists(page: Path) -> None:
    for command in documents.inline_commands(page.read_text(encoding="utf-8")):
        documents.check_named(shlex.split(command)[1:])


def test_the_pages_have_commands_to_check() -> None:
    text = QUICKSTART.read_text(encoding="utf-8")
    found = [a for block in documents.shell_blocks(text) for a in documents.fedbags_commands(block)]
    assert ["provision", "consortium.toml", "--out", "KITS"] in found
    assert ["site", "keygen", "KITS/sites/hospital-$n"] in found
    run = next(arguments for arguments in found if arguments[0] == "run")
    assert run[-2:] == ["--out", "KITS/coordinator/state/runs/first"]
    assert len(found) > 12
    inline = [command for page in PAGES for command in documents.inline_commands(page.read_text("utf-8"))]
    assert len(inline) > 30


@pytest.mark.parametrize(
    "wrong",
    [
        "fedbags serve up KITS/coordinator",
        "fedbags server up KITS/coordinator --daemon",
        "for n in 1 2; do fedbags site up; done",
        "X=1 fedbags run KITS/coordinator --rounds many",
        "true && fedbags provision consortium.toml",
        "fedbags run KIT \\\n    --round 3",
    ],
)
def test_a_wrong_command_is_found(wrong: str) -> None:
    (arguments,) = documents.fedbags_commands(wrong)
    with pytest.raises((click.UsageError, LookupError)):
        documents.parse(arguments)


def test_a_wrong_command_of_a_sentence_is_found() -> None:
    documents.check_named(["site", "approve"])
    for wrong in (["site", "allow"], ["site", "approve", "--force"]):
        with pytest.raises(LookupError):
            documents.check_named(wrong)


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_every_link_leads_somewhere(page: Path) -> None:
    for target, anchor in documents.LINK.findall(page.read_text(encoding="utf-8")):
        path = page.parent / target if target else page
        assert path.exists(), target
        if anchor:
            assert anchor in documents.anchors(path.read_text(encoding="utf-8")), f"{target}#{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_every_named_test_exists(page: Path) -> None:
    for file, test in documents.TEST.findall(page.read_text(encoding="utf-8")):
        assert (ROOT / file).is_file(), file
        assert not test or test in documents.tests_of(ROOT / file), f"{file}::{test}"


def test_every_attack_names_a_test() -> None:
    section = SECURITY.read_text(encoding="utf-8").partition("## Attacks")[2].partition("\n## ")[0]
    rows = [row for row in section.splitlines() if row.startswith("|")][2:]
    assert len(rows) == ATTACKS
    for row in rows:
        assert any(test for _, test in documents.TEST.findall(row)), row


def test_the_hospitals_site_file_is_one(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "hospital.md").read_text(encoding="utf-8")
    (tmp_path / "site.toml").write_text(text.partition("```toml\n")[2].partition("```")[0])
    policy = SiteConfig.load(tmp_path).policy
    assert policy.budget.epsilon == 8
    assert policy.secure_aggregation.required


def test_the_coordinators_commands_for_operations_work(tmp_path: Path) -> None:
    """A site joins and is revoked, the app and the certificates are renewed: as the page says it."""

    def fedbags(*arguments: str) -> None:
        done = in_process.fedbags(*arguments, cwd=tmp_path)
        assert done.returncode == 0, f"{arguments}: {done.stderr}"

    first = documents.shell_blocks(QUICKSTART.read_text(encoding="utf-8"))[0]
    subprocess.run(
        ["bash", "-c", first], cwd=tmp_path, check=True, capture_output=True, env=os.environ | {"PATH": PATH}
    )
    text = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    kit, nodes = "KITS/sites/hospital-4", tmp_path / "KITS" / "coordinator" / "nodes"
    done = []
    for block in documents.shell_blocks(text):
        for arguments in documents.fedbags_commands(block):
            if arguments[0] != "provision":
                continue
            if arguments[1] == "add-key":
                fedbags("site", "keygen", kit)
                (tmp_path / "node.pub").write_bytes((tmp_path / kit / "node.pub").read_bytes())
            fedbags(*arguments)
            done.append(arguments[1])
            assert (nodes / "hospital-4.crt").exists() == (arguments[1] == "add-key")
    assert done == ["add-site", "add-key", "revoke", "update-app"]

    inline = documents.inline_commands(text)
    server = tmp_path / "KITS" / "coordinator"
    for command in ("fedbags provision renew KITS", "fedbags provision consortium.toml --out KITS"):
        assert command in inline
        before = (server / "server.crt").read_bytes()
        if "consortium.toml" in command:
            (server / "server.key").unlink()
            (server / "server.crt").unlink()
        fedbags(*command.split()[1:])
        assert (server / "server.crt").read_bytes() != before
    assert (server / "server.key").exists()


def script() -> str:
    """The quickstart's blocks as one script; only the ports of the settings that it writes are others."""
    text = "\n".join(documents.shell_blocks(QUICKSTART.read_text(encoding="utf-8")))
    settings = re.search(r"consortium\.toml <<'END'\n(.*?)^END$", text, re.DOTALL | re.MULTILINE)
    assert settings
    there, count = re.subn(r"port = \d+", lambda _: f"port = {free_port()}", settings[1])
    assert count == 9
    return f"set -euo pipefail\n{text.replace(settings[1], there)}"


@pytest.fixture
def empty(tmp_path: Path, nginx: str) -> Iterator[Path]:
    """An empty folder; whatever a script that failed halfway left running there is ended."""
    folder = tmp_path / "empty"
    folder.mkdir()
    try:
        yield folder
    finally:
        for role, kits in (("site", "KITS/sites/*"), ("server", "KITS/coordinator")):
            for kit in folder.glob(kits):
                subprocess.run([FEDBAGS, role, "down", kit], capture_output=True, check=False)


def working_in(folder: Path) -> list[str]:
    """Processes whose working directory is below the folder, as a kit's programs' is."""
    found = []
    for link in Path("/proc").glob("[0-9]*/cwd"):
        with suppress(OSError):  # it ended, or is another user's
            if link.readlink().is_relative_to(folder):
                found.append(link.parent.name)
    return found


@pytest.mark.slow
def test_the_quickstart_from_an_empty_folder_to_a_finished_run(empty: Path) -> None:
    """Its commands alone: a private run with secure aggregation, told truly, and nothing left running."""
    assert FEDBAGS.is_file(), "fedbags is not installed beside this Python"
    done = subprocess.run(
        ["bash", "-c", script()], cwd=empty, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        timeout=1200, env=os.environ | {"PATH": PATH, "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert not with_variable("FLWR_HOME", f"{empty}/")
    assert not working_in(empty)

    run = empty / "KITS" / "coordinator" / "state" / "runs" / "first"
    events = read_json_lines(run / "metrics.jsonl")
    assert [e["updates"] for e in events if e["event"] == "round"] == [len(SITES)] * 3
    assert events[-1]["event"] == "finished"
    phases = {e["phase"] for e in events if e["event"] == "phase"}
    assert "train.masked" in phases
    assert "train" not in phases

    report = json.loads((empty / "report" / "report.json").read_text())
    assert report["problems"] == []
    assert set(report["sites"]) == set(SITES)
    stated = json.loads((run / "summary.json").read_text())["statements"]
    for site, figures in report["sites"].items():
        book = LedgerState.read(empty / "DATA" / site / "ledger.sqlite")
        assert not book.open_reservations
        assert 0 < book.spent() <= 4 < book.cap.epsilon
        assert figures["epsilon"] == pytest.approx(book.spent(), abs=1e-9)
        assert figures["stated"]["epsilon"] == pytest.approx(book.spent(), abs=1e-9)
        assert figures["ledger"]["head"] == stated[site]["ledger_head"] == book.head
