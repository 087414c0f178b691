"""The gate stands in Flower's own ClientApp process: what it refuses is neither unpacked nor run.

Each test runs that process for one task; only its network is replaced, by a task that lies in files.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from flwr.cli.install import install_from_fab

from deploy.consortium import gate
from deploy.consortium.gate import _REFUSED_APP, AppNotApproved
from deploy.consortium.kit import app_hash
from tests.cases import shortened

WriteApp = Callable[..., tuple[Path, bytes]]

TASK = """
import json, sys
from pathlib import Path
from flwr.app import Context, Message, RecordDict
from flwr.supercore.constant import TaskType
from flwr.supercore.fab import Fab
from flwr.supercore.run import Run
from flwr.supercore.superexec.executor import ExecutionSpec
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode.runtime import run_clientapp as flower
from deploy.consortium import gate

task = json.loads(Path(sys.argv[1]).read_text())

class Nothing:
    is_running = False
    def __init__(self, *_): pass
    def start(self): pass
    def close(self): pass

def pull_task_input(client):
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 2
    run = Run.create_empty(1)
    run.fab_id, run.fab_version = task["id"], task["version"]
    context = Context(1, 2, {}, RecordDict(), {})
    fab = Fab(task["hash"], Path(task["content"]).read_bytes(), {})
    return Message(RecordDict(), 2, "query"), context, run, fab

def push_message(client, reply, context):
    said = reply.error.reason if reply.has_error() else dict(reply.content["answer"])
    Path(task["reply"]).write_text(json.dumps(said))

flower.RuntimeHttpClient.from_server_address = lambda **_: Nothing()
flower.HeartbeatSender = Nothing
flower.make_task_heartbeat_fn_http = lambda client: None
flower.pull_task_input, flower.push_message = pull_task_input, push_message
flower.push_task_output = lambda **_: None
spec = ExecutionSpec(
    TaskType.CLIENT_APP, "127.0.0.1:1", "token", True, None, True, None, False, task_id=1
)
gate.run_task(spec, task["approved"], task["folder"], task["state"])
"""

REFUSED = (
    "<class 'deploy.consortium.gate.AppNotApproved'>:"
    "<'this site runs only the app that it approved, and this is another one'>"
)
FAILED = (
    "<class 'deploy.consortium.gate.AppFailed'>:"
    "<'the approved app failed at this site; the site's log says why'>"
)


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., object]:
    """Runs one task and gives what was replied: the answer's record, or the text of the error."""

    def run(content: bytes, approved: str, home: Path | None = None, **stated: str) -> object:
        folder, state = tmp_path / "task", tmp_path / "state"
        folder.mkdir()
        (tmp_path / "content").write_bytes(content)
        task = {"id": "tests/bare", "version": "1.0.0", "hash": app_hash(content), "approved": approved}
        paths = {
            "content": tmp_path / "content",
            "reply": tmp_path / "reply",
            "folder": folder,
            "state": state,
        }
        text = json.dumps(task | stated | {name: str(path) for name, path in paths.items()})
        (tmp_path / "task.json").write_text(text)
        environment = os.environ | {
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_HOME": str(home or tmp_path / "home"),
        }
        result = subprocess.run(
            [sys.executable, "-P", "-c", TASK, tmp_path / "task.json"],
            env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert (tmp_path / "reply").exists(), result.stderr
        return json.loads((tmp_path / "reply").read_text())

    return run


def leaves_a_mark(mark: Path) -> str:
    """Code that shows that it was run."""
    return f"from pathlib import Path\nPath({str(mark)!r}).touch()\n"


def test_the_approved_app_answers_from_its_private_folder(
    write_app: WriteApp, run: Callable[..., object], tmp_path: Path
) -> None:
    _, content = write_app()
    reply = run(content, app_hash(content))
    assert isinstance(reply, dict)
    assert reply["word"] == "approved"
    assert Path(reply["file"]).is_relative_to(tmp_path / "task")
    assert Path(reply["folder"]) == tmp_path / "task"
    assert not (tmp_path / "home").exists()
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize("approved", ["the original", "nothing"])
def test_another_app_of_the_same_name_is_answered_unrun(
    write_app: WriteApp, run: Callable[..., object], tmp_path: Path, approved: str
) -> None:
    pinned = app_hash(write_app()[1]) if approved == "the original" else ""
    mark = leaves_a_mark(tmp_path / "mark")
    _, content = write_app("other", {"bare/__init__.py": mark, "sitecustomize.py": mark})
    assert run(content, pinned, hash=pinned) == REFUSED
    assert not (tmp_path / "mark").exists()
    assert not list((tmp_path / "task").rglob("*.*"))
    assert not (tmp_path / "home").exists()
    assert (tmp_path / "state" / _REFUSED_APP).read_bytes() == content


def test_files_edited_in_the_apps_folder_are_not_run(
    write_app: WriteApp, run: Callable[..., object], tmp_path: Path
) -> None:
    _, content = write_app()
    installed = install_from_fab(content, install_dir=tmp_path / "home", skip_prompt=True)
    (installed / "bare" / "__init__.py").write_text(leaves_a_mark(tmp_path / "mark"))
    reply = run(content, app_hash(content))
    assert isinstance(reply, dict)
    assert not Path(reply["file"]).is_relative_to(installed)
    assert not (tmp_path / "mark").exists()


def test_what_the_server_states_of_the_app_leads_nowhere_else(
    write_app: WriteApp, run: Callable[..., object], tmp_path: Path
) -> None:
    folder, content = write_app()
    planted = tmp_path / "planted.12345678"
    shutil.copytree(folder, planted)
    (planted / "bare" / "__init__.py").write_text(leaves_a_mark(tmp_path / "mark"))
    # Flower would look in FLWR_HOME/apps/../../planted.12345678.
    assert run(content, app_hash(content), id="/", version="/../planted", hash="12345678") == FAILED
    assert not (tmp_path / "mark").exists()


def test_the_apps_own_packages_are_loaded_and_not_the_sites(
    write_app: WriteApp, run: Callable[..., object], tmp_path: Path
) -> None:
    client = (
        "import common, common.errors, sys\nfrom flwr.app import *\nfrom flwr.clientapp import ClientApp\n"
        "app = ClientApp()\n"
        "@app.query()\n"
        "def query(message, context):\n"
        "    words = {'common': common.__file__, 'word': common.errors.WORD}\n"
        "    return Message(RecordDict({'answer': ConfigRecord(words)}), reply_to=message)\n"
    )
    files = {
        "bare/client.py": client,
        "common/__init__.py": "",
        "common/errors.py": "WORD = 'from the app'\n",
    }
    _, content = write_app(files=files)
    reply = run(content, app_hash(content))
    assert isinstance(reply, dict)
    assert reply["word"] == "from the app"
    assert Path(reply["common"]).is_relative_to(tmp_path / "task")


RAISING = [
    "raise ValueError('/data/patient-7')",
    "import patient_7",
    "this is no Python",
    "app = 'no app'",
    "from flwr.clientapp import ClientApp\napp = ClientApp()\n@app.query()\n"
    "def query(message, context):\n    raise OSError('/data/patient-7')\n",
]


@pytest.mark.parametrize("client", shortened(RAISING, [RAISING[0], RAISING[-1]]))
def test_no_text_of_an_exception_leaves(write_app: WriteApp, run: Callable[..., object], client: str) -> None:
    _, content = write_app(files={"bare/client.py": client})
    assert run(content, app_hash(content)) == FAILED


def test_a_full_disk_is_an_answer(write_app: WriteApp, tmp_path: Path) -> None:
    _, content = write_app()
    (tmp_path / "file").touch()
    with pytest.raises(gate.AppFailed):
        gate._Gate(app_hash(content), tmp_path / "file", tmp_path).install(content, skip_prompt=True)


def test_nothing_is_loaded_that_did_not_pass(tmp_path: Path) -> None:
    load = gate._Gate("", tmp_path, tmp_path).loader("", None, True)
    with pytest.raises(AppNotApproved):
        load("tests/bare", "1.0.0", "00")
