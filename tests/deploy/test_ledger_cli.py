"""`fedbags ledger`: what it prints, and how it exits."""

import json
import shutil
import sqlite3
from pathlib import Path

import pytest
from typer.testing import CliRunner

from client.data.bags import BagStore
from client.ledger.anchor import LedgerLostError, anchor_file
from client.ledger.ledger import DataVersionError, Ledger, Opening
from client.ledger.state import LedgerState
from common.errors import UserError
from common.privacy.events import PoissonGaussian
from deploy.cli.ledger import app

EVENT = PoissonGaussian(sample_rate=0.05, noise_multiplier=1.0, steps=10)


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    """A ledger with one confirmed and one open round."""
    ledger = Ledger.open(tmp_path / "ledger.sqlite", Opening("site-1", "v1", 8.0, 1e-5))
    ledger.confirm(ledger.reserve(EVENT, "first", 1))
    ledger.reserve(EVENT, "first", 2)
    return ledger


def test_show_says_what_is_spent_and_every_row(ledger: Ledger) -> None:
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["show", str(ledger.path)])
    assert result.exit_code == 0, result.output
    assert f"epsilon {ledger.state.spent():.4g} of 8" in result.output
    assert "reserved, not confirmed" in result.output
    assert "10 steps, q 0.05, sigma 1" in result.output
    assert ledger.state.head in result.output


def test_export_prints_one_json_object(ledger: Ledger) -> None:
    result = CliRunner().invoke(app, ["export", str(ledger.path), "--json"])
    assert json.loads(result.output) == ledger.export()
    assert (
        ledger.state.head
        in CliRunner(env={"COLUMNS": "200"}).invoke(app, ["export", str(ledger.path)]).output
    )


def test_a_new_data_version_is_accepted_by_hand(sites_dir: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    shutil.copytree(sites_dir / "hospital-1", site)
    path, name = site / "ledger.sqlite", "hospital-1"
    Ledger.open(path, Opening(name, "old", 8.0, 1e-5)).reserve(EVENT, "first", 1)
    version = BagStore.open(site, 16).data_version
    with pytest.raises(DataVersionError):
        Ledger.open(path, Opening(name, version, 8.0, 1e-5))
    runner = CliRunner(env={"COLUMNS": "200"})
    told = json.loads(runner.invoke(app, ["accept-version", str(site), "--json"]).output)
    assert told == {"accepted": True, "data_version": version, "versions": ["old", version]}
    again = runner.invoke(app, ["accept-version", str(site), "--ledger", str(path)])
    assert "nothing was changed" in again.output
    assert f"epsilon {LedgerState.read(path).spent():.4g} of 8" in again.output
    assert Ledger.open(path, Opening(name, version, 8.0, 1e-5)).events() == (EVENT,)
    assert LedgerState.read(path).identifiers[version][:12] in runner.invoke(app, ["show", str(path)]).output


@pytest.mark.parametrize("with_kit", [False, True])
def test_a_loss_is_accepted_by_hand_and_shown(with_kit: bool, sites_dir: Path, tmp_path: Path) -> None:
    site, kit = tmp_path / "site", tmp_path / "kit"
    shutil.copytree(sites_dir / "hospital-1", site)
    (kit / "state").mkdir(parents=True)
    options = ["--kit", str(kit)] if with_kit else []
    path, version = site / "ledger.sqlite", BagStore.open(site, 16).data_version
    anchor = anchor_file(path, kit if with_kit else None)
    runner = CliRunner(env={"COLUMNS": "200"})
    told = runner.invoke(app, ["accept-loss", str(site), *options, "--json"])
    assert json.loads(told.output) == {"accepted": False}
    ledger = Ledger.open(path, Opening("hospital-1", version, 8.0, 1e-5), anchor=anchor)
    ledger.reserve(EVENT, "first", 1)
    spent = ledger.state.spent()
    path.unlink()
    with pytest.raises(LedgerLostError):
        Ledger.open(path, Opening("hospital-1", version, 8.0, 1e-5), anchor=anchor)
    told = runner.invoke(app, ["accept-loss", str(site), *options, "--json"])
    assert json.loads(told.output) == {"accepted": True, "losses": 1, "spent": pytest.approx(spent)}
    assert "nothing is lost" in runner.invoke(app, ["accept-loss", str(site), *options]).output
    verified = runner.invoke(app, ["verify", str(path), *options, "--json"])
    assert json.loads(verified.output) == {"intact": True, "losses": 1, "problems": []}
    assert "1 loss(es)" in runner.invoke(app, ["verify", str(path), *options]).output
    assert json.loads(runner.invoke(app, ["export", str(path), "--json"]).output)["losses"] == 1
    assert "lost" in runner.invoke(app, ["show", str(path)]).output


def test_the_coordinators_head_is_a_loss_where_the_site_itself_sees_none(
    sites_dir: Path, tmp_path: Path
) -> None:
    site = tmp_path / "site"
    shutil.copytree(sites_dir / "hospital-1", site)
    ledger = Ledger.open(
        site / "ledger.sqlite", Opening("hospital-1", BagStore.open(site, 16).data_version, 8.0, 1e-5)
    )
    ledger.reserve(EVENT, "first", 1)
    runner = CliRunner(env={"COLUMNS": "400"})
    told = runner.invoke(app, ["accept-loss", str(site)])
    assert "nothing is lost" in told.output
    assert "give the head that it names with --head" in told.output
    own = runner.invoke(app, ["accept-loss", str(site), "--head", ledger.state.head.upper()])
    assert own.output == "nothing is lost; nothing was changed\n"
    told = runner.invoke(app, ["accept-loss", str(site), "--head", "AB" * 32, "--json"])
    assert json.loads(told.output) == {"accepted": True, "losses": 1, "spent": None}
    assert isinstance(runner.invoke(app, ["accept-loss", str(site), "--head", "ab"]).exception, UserError)


def test_verify_exits_1_on_tampering_and_names_the_row(ledger: Ledger) -> None:
    runner, head = CliRunner(env={"COLUMNS": "200"}), ledger.statement(1).ledger_head
    assert runner.invoke(app, ["verify", str(ledger.path), "--head", head]).exit_code == 0
    assert runner.invoke(app, ["verify", str(ledger.path), "--head", "0" * 64]).exit_code == 1
    db = sqlite3.connect(ledger.path, isolation_level=None)
    db.execute("DROP TRIGGER no_update")
    db.execute("UPDATE entries SET body = '{}' WHERE seq = 3")
    db.close()
    result = runner.invoke(app, ["verify", str(ledger.path)])
    assert result.exit_code == 1
    assert "edited" in result.output
    found = json.loads(runner.invoke(app, ["verify", str(ledger.path), "--json"]).output)
    assert 3 in [problem["row"] for problem in found["problems"]]


def test_the_users_mistakes_are_told_as_such(ledger: Ledger, tmp_path: Path) -> None:
    runner = CliRunner()
    other = tmp_path / "notes.txt"
    other.write_text("no ledger")
    for arguments in (
        ["show", str(tmp_path / "none")],
        ["export", str(other)],
        ["verify", str(ledger.path), "--head", "abc"],
    ):
        assert isinstance(runner.invoke(app, arguments).exception, UserError)
