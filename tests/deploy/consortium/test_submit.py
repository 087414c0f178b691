"""What `fedbags run` asks for where nobody says anything."""

from pathlib import Path

import pytest

from common.errors import UserError
from deploy.configuration import RunRequest, compose
from deploy.consortium.kit import CoordinatorKit
from deploy.consortium.provision import provision
from deploy.consortium.submit import _expected_sites


def coordinator(folder: Path, keys_here: bool) -> CoordinatorKit:
    (folder / "consortium.toml").write_text(
        'name = "trial"\n[server]\nhosts = ["127.0.0.1"]\n[sites.a]\n[sites.b]\n'
    )
    provision(folder / "consortium.toml", folder / "KITS", keys_here=keys_here)
    return CoordinatorKit.load(folder / "KITS" / "coordinator")


def test_all_sites_with_a_key_are_waited_for_and_every_round_is_looked_at(tmp_path: Path) -> None:
    kit = coordinator(tmp_path, keys_here=True)
    config = compose(RunRequest(_expected_sites(kit, {}, None)))
    assert config.federation.sites == 2
    assert all(config.evaluation.is_due(number, 5) for number in range(1, 6))


def test_options_and_a_file_win(tmp_path: Path) -> None:
    kit = coordinator(tmp_path, keys_here=True)
    assert _expected_sites(kit, {"federation.sites": 1}, None) == {"federation.sites": 1}
    assert _expected_sites(kit, {"rounds": 2}, tmp_path / "config.toml") == {"rounds": 2}


def test_a_consortium_without_keys_has_nobody_to_wait_for(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="add-key"):
        _expected_sites(coordinator(tmp_path, keys_here=False), {}, None)
