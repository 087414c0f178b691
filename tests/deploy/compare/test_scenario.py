"""What a scenario file may say, and what is said of one that says something else."""

from collections.abc import Callable
from pathlib import Path

import pytest

from common.errors import ConfigError, UserError
from deploy.compare.scenario import Scenario, Setting

Write = Callable[..., Path]

METHOD = '\n[[methods]]\nname = "dllp"\nmethod = "dllp"\n'


def faults(path: Path) -> list[str]:
    """The faults of a scenario, one a line."""
    with pytest.raises(ConfigError) as caught:
        Scenario.load(path)
    first, *lines = str(caught.value).splitlines()
    assert str(path) in first
    assert lines.pop() == "docs/compare.md lists the keys."
    return [line.strip() for line in lines]


def test_keys_of_a_run_may_be_nested_or_dotted(scenario: Write) -> None:
    path = scenario("\n[run.loss]\ncoarse-weight = 0.5\n" + METHOD)
    assert Scenario.load(path).run["loss.coarse-weight"] == 0.5
    path = scenario('"loss.coarse-weight" = 0.5\n' + METHOD + "set = { loss.anneal-from = 2.0 }\n")
    loaded = Scenario.load(path)
    assert loaded.run["loss.coarse-weight"] == 0.5
    assert loaded.methods[0].set == {"loss.anneal-from": 2.0}


def test_a_setting_is_one_table_or_several(scenario: Write) -> None:
    several = "[[settings.pooled]]\n[[settings.pooled]]\nseeds = [7]\n[settings.federated]\npasses = 9\n"
    settings = Scenario.load(scenario(several + METHOD)).settings
    assert [grid.seeds for grid in settings[Setting.POOLED]] == [None, (7,)]
    assert settings[Setting.FEDERATED][0].passes == 9
    assert list(Scenario.load(scenario()).settings) == [Setting.POOLED], "pooled is the usual one"


@pytest.mark.parametrize(
    ("rest", "replaced", "fault"),
    [
        (METHOD + "sett = {}", {}, "[[methods]] 1 (dllp): unknown key 'sett'; did you mean 'set'?"),
        (METHOD + "set = { seed = 1 }", {}, "seed is set by the comparison itself; leave it out"),
        (METHOD + "set = { dp.epsilon = 4.0 }", {}, "private training draws bags by chance"),
        (
            METHOD + "set = { train.learning-rat = 1 }",
            {},
            "[[methods]] 1 (dllp) set: unknown key 'train.learning-rat'; did you mean 'train.learning-rate'?",
        ),
        (METHOD + METHOD, {}, "the name 'dllp' stands at 2 [[methods]]; make it unique"),
        ('[[methods]]\nname = "dllp"', {}, "[[methods]] 1 (dllp): the key 'method' is missing"),
        ('[[methods]]\nname = "a/b"\nmethod = "dllp"', {}, "[[methods]] 1 (a/b) name = 'a/b': String should"),
        (
            '[[methods]]\nname = "x"\nmethod = "dlp"',
            {},
            "[[methods]] 1 (x) method = 'dlp': there is no such method",
        ),
        (
            '[settings.pooled]\nmethods = ["dlpl"]\n' + METHOD,
            {},
            "settings.pooled.methods names 'dlpl', which is no [[methods]] entry; did you mean 'dllp'?",
        ),
        (
            "[settings.pooled]\nbagsizes = [8]" + METHOD,
            {},
            "settings.pooled: unknown key 'bagsizes'; did you",
        ),
        ("[settings.poled]" + METHOD, {}, "settings.poled = 'poled': Input should be 'pooled', 'local-only'"),
        (METHOD, {"bag_sizes": "[12]"}, "bag-sizes: images-per-step = 32 is no multiple of bag size 12"),
        (METHOD, {"bag_sizes": "[]"}, "bag-sizes = []: Tuple should have at least 1 item"),
        (METHOD, {"seeds": "[-1]"}, "seeds.0 = -1: Input should be greater than or equal to 0"),
        (METHOD, {"passes": '"2"'}, "passes = '2': Input should be a valid integer"),
        (METHOD, {"source": '"archiv"'}, "data.source = 'archiv': Input should be 'synthetic', 'table'"),
        (METHOD, {"groups": '"patients"'}, "data.groups = 'patients': String should match"),
        ("", {}, "at the top: the key 'methods' is missing"),
    ],
)
def test_faults_are_told_in_the_words_of_the_file(
    scenario: Write, rest: str, replaced: dict[str, str], fault: str
) -> None:
    found = faults(scenario(rest, **replaced))
    assert len(found) == 1, found
    assert fault in found[0]


def test_all_faults_are_told_together(scenario: Write) -> None:
    found = faults(scenario('[[methods]]\nname = "x"\nmethd = "dllp"\n', passes="0", sites="true"))
    assert len(found) == 4, found


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the scenario not found"):
        Scenario.load(tmp_path / "nothing.toml")
    (tmp_path / "x.toml").write_text("bag-sizes = [")
    with pytest.raises(ConfigError, match="cannot be read as TOML"):
        Scenario.load(tmp_path / "x.toml")
