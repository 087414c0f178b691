"""Flower's own runtime and ours run the same apps to the same model."""

import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from common.config import RunConfig
from common.errors import RunError
from deploy.flower.processes import free_port
from deploy.simulation import flower_engine
from deploy.simulation.local_grid import LocalGrid, _load_app
from server.app import app


def children_of_flower() -> set[str]:
    """Command lines of running Flower and Ray processes."""
    lines = set()
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = process.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if "flower-super" in command or "ray::" in command or "fedbags-flower-" in command:
            lines.add(f"{process.parent.name} {command}")
    return lines


@pytest.mark.slow
def test_both_engines_give_the_same_model_and_flower_leaves_nothing_behind(
    small_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    before = children_of_flower()
    ours = small_config()
    flat = ours.to_flat()
    with LocalGrid(3, flat) as grid:
        app(grid, grid.server_context(flat))
    theirs = ours.with_changes({"run-dir": str(tmp_path / "flower")})
    flower_engine.run_flower(theirs)
    first = load_file(Path(ours.run_dir) / "model.safetensors")
    second = load_file(tmp_path / "flower" / "model.safetensors")
    assert first.keys() == second.keys()
    for name, array in first.items():
        np.testing.assert_array_equal(array, second[name], err_msg=name)
    assert children_of_flower() <= before


@pytest.mark.slow
def test_a_run_that_fails_inside_flower_fails_here_too(
    small_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    config = small_config({"federation.max-update-mb": 0.001, "rounds": 1})
    with pytest.raises(RunError, match="finished:failed"):
        flower_engine.run_flower(config)


def test_flower_cannot_start_on_a_taken_port(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flower_engine, "program", lambda name: "/bin/false")
    with (
        pytest.raises(RunError, match="did not start"),
        flower_engine._superlink(tmp_path, free_port(), dict(os.environ)),
    ):
        pass


def test_the_generated_flower_app_names_both_components_and_every_key(tmp_path: Path) -> None:
    config = RunConfig().with_changes({"model.method": "rot"})
    flower_engine._write_app(tmp_path / "app", flower_engine._APPS, config)
    table = tomllib.loads((tmp_path / "app" / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    assert config.model_dump(mode="json", by_alias=True) == table["config"]
    assert table["config"]["parts"]["rot"] == {"weight": 1.0, "temperature": 1.0}
    for reference in table["components"].values():
        assert _load_app(reference) is not None


def test_a_dying_worker_is_blamed_alone(small_config: Callable[..., RunConfig]) -> None:
    code = (
        "from flwr.app import Message, RecordDict\n"
        "from deploy.simulation.local_grid import LocalGrid\n"
        "from server.exchange import Phase, ask\n"
        "if __name__ == '__main__':\n"
        "    with LocalGrid(4, {}, workers=2, client_app='dying_app:app') as grid:\n"
        "        nodes = dict.fromkeys(grid.get_node_ids(), RecordDict())\n"
        "        for reply in ask(grid, nodes, Phase('train', 1, 120.0)):\n"
        "            print(reply.failure or 'fine')\n"
    )
    folder = Path(small_config().run_dir).parent
    (folder / "dying_app.py").write_text(
        "import os\n"
        "from flwr.app import Message, RecordDict\n"
        "from flwr.clientapp import ClientApp\n"
        "app = ClientApp()\n"
        "@app.train()\n"
        "def train(message, context):\n"
        "    if context.node_config['partition-id'] == 1:\n"
        "        os._exit(9)\n"
        "    return Message(RecordDict(), reply_to=message)\n"
    )
    (folder / "main.py").write_text(code)
    result = subprocess.run(
        [sys.executable, "main.py"], cwd=folder, capture_output=True, text=True, timeout=200, check=False,
        env=os.environ | {"PYTHONPATH": str(folder)},
    )  # fmt: skip
    assert result.stdout.splitlines() == [
        "fine", "the app died at the site (killed, or out of memory)", "fine", "fine",
    ], result.stderr  # fmt: skip
