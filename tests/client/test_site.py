"""site.toml: defaults, round trip, and faults that name file and key."""

from pathlib import Path

import pytest

from client.site import (
    KNOWN_METRICS,
    ReleaseProportions,
    SiteConfig,
    SitePolicy,
    _PrivacyBudget,
)
from common.errors import ConfigError, UserError


def test_defaults_release_the_total_and_all_known_metrics() -> None:
    policy = SiteConfig(name="x").policy
    assert policy.minimum_bag_size == 4
    assert policy.release_proportions is ReleaseProportions.TOTAL
    assert policy.terms(simulated=True).metrics == set(KNOWN_METRICS)
    assert policy.budget == _PrivacyBudget(epsilon=None, delta=None)


@pytest.mark.parametrize(
    ("policy", "withheld"),
    [
        (SitePolicy(), {"loss", "bags-l1"}),
        (SitePolicy(release_proportions=ReleaseProportions.PER_BAG), set()),
        (
            SitePolicy(release_proportions=ReleaseProportions.NONE),
            {"loss", "bags-l1", "bags-kl", "num-images"},
        ),
        (SitePolicy(budget=_PrivacyBudget(epsilon=1.0, delta=1e-6)), {"loss", "bags-l1", "confusion"}),
    ],
)
def test_a_real_site_withholds_what_tells_more_than_it_releases(
    policy: SitePolicy, withheld: set[str]
) -> None:
    terms = policy.terms(simulated=False)
    assert terms.metrics == set(KNOWN_METRICS) - withheld
    assert (terms.held_back, terms.minimum_held_back_bags) == (0.1, 8)
    assert (terms.minimum_cell_size, terms.skip_bad) == (5, False)


OF_0_1 = ("num-bags", "num-images", "loss", "bags-kl", "bags-l1", "held-back-bags", "confusion")


@pytest.mark.parametrize("budget", [_PrivacyBudget(), _PrivacyBudget(epsilon=1.0, delta=1e-6)])
@pytest.mark.parametrize("release", ReleaseProportions)
def test_the_list_that_0_1_wrote_by_itself_is_no_choice_of_a_real_site(
    release: ReleaseProportions, budget: _PrivacyBudget
) -> None:
    written = SitePolicy(metrics=OF_0_1, release_proportions=release, budget=budget)
    silent = SitePolicy(release_proportions=release, budget=budget)
    assert written.terms(simulated=False) == silent.terms(simulated=False)
    assert written.terms(simulated=True).metrics == set(OF_0_1)
    for chosen in (OF_0_1[:-1], (*OF_0_1[1:], OF_0_1[0]), ("loss",), ()):
        for simulated in (True, False):
            terms = SitePolicy(metrics=chosen, budget=budget).terms(simulated=simulated)
            assert terms.metrics == set(chosen)


def test_what_a_site_says_itself_holds_and_a_simulated_one_leaves_the_rest_to_the_run() -> None:
    silent = SitePolicy().terms(simulated=True)
    assert (silent.held_back, silent.skip_bad) == (None, None)
    assert (silent.minimum_held_back_bags, silent.minimum_cell_size) == (1, 0)
    said = SitePolicy(
        metrics=("loss",), held_back=0.3, minimum_held_back_bags=4, minimum_cell_size=2, skip_bad=True
    )
    for simulated in (True, False):
        terms = said.terms(simulated=simulated)
        assert terms.metrics == {"loss"}
        assert (terms.held_back, terms.minimum_held_back_bags) == (0.3, 4)
        assert (terms.minimum_cell_size, terms.skip_bad) == (2, True)


def test_save_then_load_gives_the_same_and_leaves_no_other_file(tmp_path: Path) -> None:
    policy = SitePolicy(
        minimum_bag_size=8,
        release_proportions=ReleaseProportions.NONE,
        metrics=("loss",),
        budget=_PrivacyBudget(epsilon=2.5, delta=1e-6),
    )
    config = SiteConfig(name="site.A_1", hierarchy="tree.csv", policy=policy)
    config.save(tmp_path)
    assert SiteConfig.load(tmp_path) == config
    assert [path.name for path in tmp_path.iterdir()] == ["site.toml"]
    text = (tmp_path / "site.toml").read_text(encoding="utf-8")
    assert "minimum-bag-size = 8" in text
    assert 'release-proportions = "none"' in text


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "'name' is missing"),
        ('name = "two words"', "name"),
        ('name = "x"\n[policy]\nminimum-bag-size = 0', "policy.minimum-bag-size"),
        ('name = "x"\n[policy]\nminimum-bagsize = 4', "did you mean 'policy.minimum-bag-size'"),
        ('name = "x"\n[policy]\nmetrics = ["loss", "labels"]', "'labels'"),
        ('name = "x"\n[policy]\nrelease-proportions = "all"', "policy.release-proportions"),
        ('name = "x"\n[policy.budget]\nepsilon = -1.0', "policy.budget.epsilon"),
        ('name = "x"\n[policy.budget]\nepsilon = inf', "policy.budget.epsilon"),
        ('name = "x"\nhierarchy = "../tree.csv"', "hierarchy"),
        ("name = ", "cannot be read as TOML"),
    ],
)
def test_a_faulty_file_is_named_with_its_key(tmp_path: Path, text: str, named: str) -> None:
    (tmp_path / "site.toml").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        SiteConfig.load(tmp_path)
    assert named in str(caught.value)
    assert "site.toml" in str(caught.value)


def test_a_file_that_is_not_utf8_and_a_missing_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not found"):
        SiteConfig.load(tmp_path)
    (tmp_path / "site.toml").write_bytes(b'name = "\xff"')
    with pytest.raises(ConfigError, match="cannot be read"):
        SiteConfig.load(tmp_path)
