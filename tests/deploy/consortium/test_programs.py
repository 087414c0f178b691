"""What running Flower's processes relies on in the pinned Flower: exit codes, texts, switches."""

import inspect
from pathlib import Path

import flwr
import pytest
from flwr.common.config import parse_config_args
from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL, HEARTBEAT_PATIENCE, TIMESTAMP_TOLERANCE
from flwr.supercore.exit import ExitCode
from flwr.supernode import start_client_internal

from common.errors import UserError
from deploy.consortium import checks, foreground, programs
from deploy.consortium.foreground import Exit
from deploy.consortium.kit import SiteKit
from deploy.flower.processes import MISTAKES, SUPERNODE_CONNECTION


def kit(tmp_path: Path, data: str) -> SiteKit:
    folder = tmp_path / data
    folder.mkdir()
    (folder / "site.toml").touch()
    made = SiteKit(
        consortium="c", app_hash="0" * 64, site="north", server="fl.example.org", port=8443, data_path=data
    )
    return made.at(tmp_path)


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("SUPERNODE_CONNECTION_ERROR", SUPERNODE_CONNECTION),
        ("SUPERLINK_DATABASE_SCHEMA_MISMATCH", 105),
        ("SUPERNODE_NODE_AUTH_KEY_INVALID", 302),
        ("SUPEREXEC_AUTH_SECRET_LOAD_FAILED", 401),
        ("COMMON_TLS_SERVER_CERTIFICATES_INVALID", 605),
        ("RUNTIME_VERSION_INCOMPATIBLE", 606),
    ],
)
def test_exit_codes_are_flowers(name: str, code: int) -> None:
    assert getattr(ExitCode, name) == code
    found = foreground.diagnose(Exit(1, code, ""))
    assert (found is None) == (code == SUPERNODE_CONNECTION)
    assert found is None or found.mistake


def test_every_mistake_is_one_of_flowers() -> None:
    known = {value for value in vars(ExitCode).values() if isinstance(value, int)}
    assert set(MISTAKES) <= known


def test_the_text_of_a_connected_supernode_is_flowers() -> None:
    assert programs._NODE_ID_LOGGED in inspect.getsource(start_client_internal)


def test_every_switch_is_one_that_flower_reads(tmp_path: Path) -> None:
    sources = "".join(
        path.read_text(encoding="utf-8")
        for path in Path(next(iter(flwr.__path__))).rglob("*.py")
        if "proto" not in path.parts
    )
    variables = foreground._kit_environment(kit(tmp_path, "data"))
    switches = [name for name in variables if name.startswith("FLWR_")]
    assert len(switches) == 5
    for name in switches:
        assert f'"{name}"' in sources, name


def test_a_refused_node_is_told_what_may_be_the_cause_and_may_be_started_again() -> None:
    found = programs._diagnose_supernode(Exit(1, 305, "[code: 1000] could not be activated"))
    assert found is not None
    assert not found.mistake
    assert "add-key" in found.text
    assert "up to 60 s" in found.text
    assert HEARTBEAT_PATIENCE * HEARTBEAT_DEFAULT_INTERVAL <= 60


def test_a_wrong_clock_is_told_from_an_unknown_key() -> None:
    found = programs._diagnose_supernode(Exit(1, 305, "Client error '401 Unauthorized' for url"))
    assert found is not None
    assert "clocks differ" in found.text
    assert TIMESTAMP_TOLERANCE > checks._CLOCK_SKEW


def test_a_crash_has_no_diagnosis() -> None:
    assert programs._diagnose_supernode(Exit(-9, None, "")) is None
    assert programs._diagnose_executor(Exit(1, None, "")) is None


def test_a_mistake_that_the_executor_names_is_one() -> None:
    found = programs._diagnose_executor(Exit(2, None, "error: superexec.secret is missing\n"))
    assert found is not None
    assert found.mistake
    assert "superexec.secret is missing" in found.text


@pytest.mark.parametrize("data", ["data", "with space", "q'uote", "bäckerei", "a=b"])
def test_flower_reads_the_node_configuration_back(tmp_path: Path, data: str) -> None:
    made = kit(tmp_path, data)
    assert parse_config_args([programs._node_config(made)]) == {
        "site": "north",
        "data-path": str(tmp_path / data),
        "kit": str(tmp_path),
    }


@pytest.mark.parametrize("data", ['a"b', "a\\b", "a\nb"])
def test_a_path_that_flower_cannot_pass_on_is_a_clear_error(tmp_path: Path, data: str) -> None:
    with pytest.raises(UserError, match="cannot be passed on by Flower"):
        programs._node_config(kit(tmp_path, data))
