"""No server says where a real site's data is, or where it writes."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from flwr.app import Context, RecordDict

from client.budget import ledger_path
from client.locate import find_site, is_simulated, site_folders
from client.site import PrivacyBudget
from common.config import RunConfig
from common.errors import ConfigError, UserError

Scalar = bool | int | float | str


def context(node: dict[str, Scalar], run: dict[str, Scalar] | None = None) -> Context:
    return Context(1, 2, dict(node), RecordDict(), dict(run or {}))


def test_a_site_is_where_its_node_says(sites_dir: Path) -> None:
    node = {"data-path": str(sites_dir / "hospital-2"), "kit": "/kit"}
    assert find_site(context(node, {"run-dir": str(sites_dir / "hospital-1")})) == sites_dir / "hospital-2"


def test_a_real_site_refuses_a_run_that_asks_for_other_data(sites_dir: Path) -> None:
    with pytest.raises(ConfigError, match="no server says where"):
        find_site(context({"data-path": str(sites_dir / "hospital-1")}, {"sites-dir": str(sites_dir)}))


@pytest.mark.parametrize("node", [{"data-path": ""}, {"kit": "/kit"}])
def test_a_real_site_without_data_is_never_taken_for_a_simulated_one(
    sites_dir: Path, node: dict[str, Scalar]
) -> None:
    numbered = context(node | {"partition-id": 0}, {"sites-dir": str(sites_dir)})
    assert not is_simulated(numbered)
    with pytest.raises(ConfigError, match="this node has no site"):
        find_site(numbered)


def test_a_simulated_node_takes_the_folder_of_its_number(sites_dir: Path) -> None:
    run: dict[str, Scalar] = {"sites-dir": str(sites_dir)}
    assert find_site(context({"partition-id": 1}, run)) == sites_dir / "hospital-2"
    with pytest.raises(UserError, match="3 site folders"):
        find_site(context({"partition-id": 3}, run))


@pytest.mark.parametrize("epsilon", [None, 1.0])
def test_a_real_site_never_writes_its_ledger_where_the_server_says(
    small_config: Callable[..., RunConfig], tmp_path: Path, epsilon: float | None
) -> None:
    own, config = PrivacyBudget(epsilon=epsilon), small_config({"run-dir": str(tmp_path / "elsewhere")})
    real, simulated = context({"data-path": "/data"}), context({"partition-id": 0})
    assert ledger_path(real, config, tmp_path / "site", own).parent == tmp_path / "site"
    below_run = ledger_path(simulated, config, tmp_path / "site", own).is_relative_to(tmp_path / "elsewhere")
    assert below_run == (epsilon is None)


def test_what_a_broken_build_leaves_is_no_site(sites_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(sites_dir / "hospital-1", tmp_path / "one")
    shutil.copytree(sites_dir / "hospital-2", tmp_path / ".two-x1y2")
    assert site_folders(tmp_path) == [tmp_path / "one"]
