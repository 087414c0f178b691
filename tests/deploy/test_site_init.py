"""`fedbags site init`: site.toml by questions or options, never over another one, and the check after it."""

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

import deploy.cli.site
from client.data.bags import BagStore
from client.site import ReleaseProportions, SiteConfig, _PrivacyBudget
from common.errors import ConfigError, DataError, UserError
from deploy.cli.main import app


def init(*arguments: str | Path, answers: str = "") -> str:
    result = CliRunner().invoke(app, ["site", "init", *map(str, arguments)], input=answers)
    if result.exception is not None:
        raise result.exception
    return result.stdout


@pytest.fixture
def site(sites_dir: Path, tmp_path: Path) -> Path:
    """A site folder without site.toml."""
    shutil.copytree(sites_dir / "hospital-1", tmp_path / "ward-7")
    (tmp_path / "ward-7/site.toml").unlink()
    return tmp_path / "ward-7"


def test_options_become_the_policy_and_the_check_follows(site: Path) -> None:
    text = init(
        site, "--epsilon", "8", "--delta", "1e-4", "--release-proportions", "none", "--secure-aggregation",
        "--set", "secure-aggregation.minimum-sites=4", "--set", "metrics=num-bags,confusion",
        "--minimum-bag-size", "6",
    )  # fmt: skip
    config = SiteConfig.load(site)
    policy = config.policy
    assert config.name == "ward-7"
    assert (policy.budget.epsilon, policy.budget.delta) == (8.0, 1e-4)
    assert policy.release_proportions is ReleaseProportions.NONE
    assert (policy.minimum_bag_size, policy.metrics) == (6, ("num-bags", "confusion"))
    assert (policy.secure_aggregation.required, policy.secure_aggregation.minimum_sites) == (True, 4)
    assert "what would leave the building" in text
    assert len(BagStore.open(site, 16)) == 8


def test_nothing_is_overwritten_without_force_and_what_is_not_named_is_kept(site: Path) -> None:
    init(site, "--name", "north", "--epsilon", "8", "--delta", "1e-4")
    before = (site / "site.toml").read_text()
    with pytest.raises(UserError, match="exists already; change it with --force"):
        init(site, "--epsilon", "100")
    assert (site / "site.toml").read_text() == before
    init(site, "--force", "--epsilon", "2")
    config = SiteConfig.load(site)
    assert (config.name, config.policy.budget.epsilon, config.policy.budget.delta) == ("north", 2.0, 1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--epsilon", "-1"], "policy.budget.epsilon = -1.0: Input should be greater than 0"),
        (["--delta", "0.1"], "a budget has an epsilon"),
        (["--name", "a b"], "name = 'a b'"),
        (["--release-proportions", "some"], "policy.release-proportions = 'some'"),
        (["--set", "metric=loss"], "unknown key 'policy.metric'; did you mean 'policy.metrics'?"),
        (["--set", "metrics=x"], "unknown metric"),
        (["--set", "budget=3"], "policy.budget = 3"),
        (["--hierarchy", "../x"], "hierarchy = '../x'"),
    ],
)
def test_faulty_policies_write_nothing(site: Path, options: list[str], message: str) -> None:
    with pytest.raises((ConfigError, UserError)) as caught:
        init(site, *options)
    assert message in str(caught.value)
    assert not (site / "site.toml").exists()


def test_questions_on_a_terminal_ask_for_what_was_not_given(
    site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deploy.cli.site, "_on_terminal", lambda: True)
    init(site, "--minimum-bag-size", "5", answers="south\nper-bag\n3\n0.001\nn\n")
    config = SiteConfig.load(site)
    assert config.name == "south"
    assert config.policy.minimum_bag_size == 5
    assert config.policy.release_proportions is ReleaseProportions.PER_BAG
    assert (config.policy.budget.epsilon, config.policy.budget.delta) == (3.0, 0.001)
    assert not config.policy.secure_aggregation.required
    init(site, "--force", answers="\n" * 6)
    assert SiteConfig.load(site) == config, "what is there stands in brackets"
    init(site, "--force", answers="\n\n\n0\n\n")
    assert SiteConfig.load(site).policy.budget == _PrivacyBudget(), "the answer 0 is no budget"


def test_a_folder_without_tables_is_told_what_is_missing(tmp_path: Path) -> None:
    text = init(tmp_path / "new")
    assert "Still missing: manifest.csv, bags.csv, hierarchy.csv" in text
    assert SiteConfig.load(tmp_path / "new").name == "new"
    result = json.loads(init(tmp_path / "other", "--json"))
    assert result["missing"] == ["manifest.csv", "bags.csv", "hierarchy.csv"]


def test_bad_rows_are_told_after_writing(site: Path) -> None:
    (site / "bags.csv").write_text("bag_id,label,count\n")
    with pytest.raises(DataError, match="bad row"):
        init(site)
    assert (site / "site.toml").exists()


@pytest.mark.parametrize("what", ["site.toml", "manifest.csv"])
def test_every_advice_on_an_incomplete_folder_leads_to_counts_only(site: Path, what: str) -> None:
    SiteConfig(name="x").save(site)
    (site / what).unlink()
    with pytest.raises(UserError) as caught:
        BagStore.open(site, 16)
    assert "--source counts from images and one count per class and bag" in str(caught.value)
