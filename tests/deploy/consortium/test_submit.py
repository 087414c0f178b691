"""What `fedbags run` asks for where nobody says anything."""

import io
import zipfile
from pathlib import Path

import pytest

from common.config import RunConfig
from common.errors import UserError
from deploy.configuration import RunRequest, compose
from deploy.consortium.app import build_bundle
from deploy.consortium.kit import CoordinatorKit
from deploy.consortium.provision import provision
from deploy.consortium.submit import _expected_sites, changes


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


def test_a_run_sends_the_keys_of_its_parts_and_an_older_app_is_named() -> None:
    """An app that knows no part still starts a run whose parts are as they always were."""
    app = build_bundle()
    run = RunConfig().with_changes({"model.method": "rot", "parts.rot.weight": 2.0, "rounds": 3})
    assert changes(app, run) == {"model.method": "rot", "parts.rot.weight": 2.0, "rounds": 3}
    older = io.BytesIO()
    with zipfile.ZipFile(older, "w") as archive:
        archive.writestr("pyproject.toml", '[tool.flwr.app.config]\nrounds = 12\nmodel.method = "lhfglp"\n')
    as_ever = run.with_changes({"parts.rot.weight": 1.0})
    assert changes(older.getvalue(), as_ever) == {"model.method": "rot", "rounds": 3}
    with pytest.raises(UserError, match=r"does not know parts\.rot\.weight: leave it out"):
        changes(older.getvalue(), run)
