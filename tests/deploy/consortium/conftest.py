"""A small Flower app, for tests of what a site lets run."""

from collections.abc import Callable
from pathlib import Path

import pytest
from flwr.cli.build import build_fab_from_disk

PROJECT = """
[project]
name = "bare"
version = "1.0.0"
description = "answers a query"
license = "Apache-2.0"
dependencies = []
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[tool.flwr.app]
publisher = "tests"
[tool.flwr.app.components]
serverapp = "bare.server:app"
clientapp = "bare.client:app"
[tool.flwr.app.config]
out = ""
waves = 1
"""
CLIENT = """
import os
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
app = ClientApp()
@app.query()
def query(message, context):
    answer = ConfigRecord({"file": __file__, "folder": os.getcwd(), "word": "approved"})
    return Message(RecordDict({"answer": answer}), reply_to=message)
"""
SERVER = """
import json, time
from pathlib import Path
from flwr.app import Message, RecordDict
from flwr.serverapp import ServerApp
app = ServerApp()
@app.main()
def main(grid, context):
    while not (nodes := list(grid.get_node_ids())):
        time.sleep(0.2)
    waves = []
    for _ in range(int(context.run_config["waves"])):
        begun = time.monotonic()
        messages = [Message(RecordDict(), dst_node_id=node, message_type="query") for node in nodes]
        replies = list(grid.send_and_receive(messages, timeout=120))
        said = [r.error.reason if r.has_error() else dict(r.content["answer"]) for r in replies]
        waves.append({"seconds": time.monotonic() - begun, "said": said})
    out = Path(str(context.run_config["out"]))
    out.with_suffix(".part").write_text(json.dumps(waves))
    out.with_suffix(".part").replace(out)
"""


@pytest.fixture
def write_app(tmp_path: Path) -> Callable[..., tuple[Path, bytes]]:
    """Writes the folder of an app, with some files changed, and gives it with its bundle."""

    def write(name: str = "app", files: dict[str, str | None] | None = None) -> tuple[Path, bytes]:
        app = tmp_path / name
        all_files: dict[str, str | None] = {
            "pyproject.toml": PROJECT,
            "bare/__init__.py": "",
            "bare/client.py": CLIENT,
            "bare/server.py": SERVER,
        }
        for path, text in (all_files | (files or {})).items():
            if text is not None:
                (app / path).parent.mkdir(parents=True, exist_ok=True)
                (app / path).write_text(text)
        return app, build_fab_from_disk(app)

    return write
