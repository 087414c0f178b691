"""No server says where a real site's data is, or where it writes."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from flwr.app import Context, RecordDict

from client.session import SiteSession, _find_site, _is_simulated
from client.site import (
    SiteConfig,
    SitePolicy,
    _PrivacyBudget,
    site_folders,
)
from common.config import RunConfig
from common.errors import ConfigError, UserError

Scalar = bool | int | float | str


def test_a_site_is_where_its_node_says(sites_dir: Path) -> None:
    node = {"data-path": str(sites_dir / "hospital-2"), "kit": "/kit"}
    assert _find_site(node, "") == sites_dir / "hospital-2"


def test_a_real_site_refuses_a_run_that_asks_for_other_data(sites_dir: Path) -> None:
    with pytest.raises(ConfigError, match="no server says where"):
        _find_site({"data-path": str(sites_dir / "hospital-1")}, str(sites_dir))


def test_a_real_site_reads_no_weights_file_that_the_server_names(sites_dir: Path, tmp_path: Path) -> None:
    named = {"model.features": f"colour-histogram,resnet18@{tmp_path / 'weights.safetensors'}"}

    def opened(node: dict[str, Scalar], **run: str) -> SiteSession:
        return SiteSession.open(Context(1, 1, node, RecordDict(), {**named, **run}))

    with pytest.raises(ConfigError, match="which files a site reads"):
        opened({"data-path": str(sites_dir / "hospital-1")})
    assert opened({"partition-id": 0}, **{"sites-dir": str(sites_dir)}).simulated


@pytest.mark.parametrize("node", [{"data-path": ""}, {"kit": "/kit"}])
def test_a_real_site_without_data_is_never_taken_for_a_simulated_one(
    sites_dir: Path, node: dict[str, Scalar]
) -> None:
    numbered = node | {"partition-id": 0}
    assert not _is_simulated(numbered)
    with pytest.raises(ConfigError, match="this node has no site"):
        _find_site(numbered, str(sites_dir))


def test_a_simulated_node_takes_the_folder_of_its_number(sites_dir: Path) -> None:
    assert _find_site({"partition-id": 1}, str(sites_dir)) == sites_dir / "hospital-2"
    with pytest.raises(UserError, match="3 site folders"):
        _find_site({"partition-id": 3}, str(sites_dir))
    with pytest.raises(ConfigError, match="needs a folder of sites"):
        _find_site({"partition-id": 0}, "")


@pytest.mark.parametrize("epsilon", [None, 1.0])
def test_a_real_site_never_writes_its_ledger_where_the_server_says(
    small_config: Callable[..., RunConfig], tmp_path: Path, epsilon: float | None
) -> None:
    config = small_config({"run-dir": str(tmp_path / "elsewhere")})
    site = SiteConfig(name="site-1", policy=SitePolicy(budget=_PrivacyBudget(epsilon=epsilon)))
    real, simulated = (
        SiteSession(config, site, tmp_path / "site", node, 1, RecordDict()).ledger_path
        for node in ({"data-path": "/data"}, {"partition-id": 0})
    )
    assert real.parent == tmp_path / "site"
    assert simulated.is_relative_to(tmp_path / "elsewhere") == (epsilon is None)


def test_what_a_broken_build_leaves_is_no_site(sites_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(sites_dir / "hospital-1", tmp_path / "one")
    shutil.copytree(sites_dir / "hospital-2", tmp_path / ".two-x1y2")
    assert site_folders(tmp_path) == [tmp_path / "one"]
