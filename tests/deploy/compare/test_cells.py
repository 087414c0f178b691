"""The cells that a scenario means."""

from collections.abc import Callable
from pathlib import Path

import pytest

from common.errors import ConfigError
from deploy.compare.scenario import Cell, Context, Scenario, Setting, expand

Write = Callable[..., Path]


def entry(name: str, method: str = "dllp", more: str = "") -> str:
    return f'\n[[methods]]\nname = "{name}"\nmethod = "{method}"\n{more}\n'


def cells(path: Path, context: Context | None = None) -> dict[str, Cell]:
    return {cell.name: cell for cell in expand(Scenario.load(path), context or Context())}


def test_one_file_says_a_whole_comparison(scenario: Write) -> None:
    """Eight methods and three seeds at one size, four at others, ablations, and two in all settings."""
    names = ["lhfglp", "dllp", "dllp-hierarchical", "llp-vat", "rot", "llpfc", "easyllp", "mixbag"]
    path = scenario(
        """
[[settings.pooled]]
[[settings.pooled]]
methods = ["lhfglp", "dllp", "rot", "mixbag"]
bag-sizes = [8, 32]
seeds = [0]
[settings.local-only]
methods = ["lhfglp", "dllp"]
seeds = [0]
[settings.federated]
methods = ["lhfglp", "dllp"]
seeds = [0]
passes = 6
"""
        + "".join(entry(name, name) for name in names)
        + entry("supervised", "supervised", 'settings = ["pooled"]')
        + entry(
            "no-masks",
            "lhfglp",
            'settings = ["pooled"]\nseeds = [1]\nbag-sizes = [16]\nset = { model.masks = false }',
        ),
        bag_sizes="[16]",
        seeds="[0, 1, 2]",
    )
    found = cells(path)
    count = {
        (setting, size): sum(cell.setting is setting and cell.bag_size == size for cell in found.values())
        for setting in Setting
        for size in (1, 8, 16, 32)
    }
    assert {key: number for key, number in count.items() if number} == {
        (Setting.POOLED, 16): 8 * 3 + 1,
        (Setting.POOLED, 8): 4,
        (Setting.POOLED, 32): 4,
        (Setting.POOLED, 1): 3,
        (Setting.LOCAL_ONLY, 16): 2 * 2,
        (Setting.FEDERATED, 16): 2,
    }
    assert not found["no-masks_bag16_seed1_pooled"].config.model.masks
    assert found["lhfglp_bag16_seed0_federated"].config.rounds == 6
    assert found["lhfglp_bag16_seed0_federated"].config.federation.sites == 2
    assert found["lhfglp_bag16_seed0_local-only_site2"].site == 2
    assert found["lhfglp_bag16_seed0_local-only_site2"].config.federation.sites == 1
    assert found["dllp_bag16_seed2_pooled"].config.seed == 2
    assert len({cell.division for cell in found.values()}) == 3 + 2 + 3 + 1


def test_a_step_sees_as_many_images_at_every_bag_size(scenario: Write) -> None:
    path = scenario(entry("dllp") + entry("bound", "supervised"), bag_sizes="[4, 8, 32]")
    per_step = {cell.bag_size: cell.config.train.bags_per_step for cell in cells(path).values()}
    assert per_step == {4: 8, 8: 4, 32: 1, 1: 32}


def test_what_is_said_closer_wins(scenario: Write) -> None:
    path = scenario(
        "\nloss.coarse-weight = 0.1\n[settings.pooled]\n"
        "set = { loss.coarse-weight = 0.2, loss.sparsity = 0.2 }\n"
        + entry("a")
        + entry("b", "dllp", "passes = 7\nset = { loss.coarse-weight = 0.3 }")
    )
    found = cells(path)
    a, b = found["a_bag8_seed0_pooled"], found["b_bag8_seed0_pooled"]
    assert (a.config.loss.coarse_weight, b.config.loss.coarse_weight, b.config.loss.sparsity) == (
        0.2,
        0.3,
        0.2,
    )
    assert (a.passes, b.passes) == (2, 7)
    for cell in cells(path, Context(overrides={"loss.coarse-weight": 0.4}, passes=1)).values():
        assert (cell.config.loss.coarse_weight, cell.passes) == (0.4, 1)


def test_passes_are_rounds_of_local_epochs(scenario: Write) -> None:
    path = scenario(entry("a", more="set = { train.local-epochs = 3 }"), passes="6")
    (cell,) = cells(path).values()
    assert (cell.config.rounds, cell.passes) == (2, 6)
    with pytest.raises(ConfigError, match=r"a at bag size 8, pooled: passes = 6 is no multiple of .* = 4"):
        cells(path, Context(overrides={"train.local-epochs": 4}))


def test_the_weights_file_lies_beside_the_scenario(scenario: Write) -> None:
    path = scenario('\nmodel.weights = "net.pth"\n' + entry("a"))
    (cell,) = cells(path, Context(Path("/data"))).values()
    assert cell.config.model.weights == "/data/net.pth"
    (cell,) = cells(path, Context(Path("/data"), {"model.weights": "mine.pth"})).values()
    assert cell.config.model.weights == "mine.pth"


@pytest.mark.parametrize(
    ("rest", "message"),
    [
        (entry("a", more="bag-sizes = [16]"), "no cell is left for a"),
        (entry("a") + entry("b", more='settings = ["federated"]'), "no cell is left for b"),
        (entry("a", more="set = { train.learning-rate = 99 }"), "a at bag size 8, pooled: the run config"),
        (
            "[[settings.pooled]]\n[[settings.pooled]]\npasses = 3\n" + entry("a"),
            "two parts of settings.pooled",
        ),
    ],
)
def test_scenarios_that_mean_nothing(scenario: Write, rest: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        cells(scenario(rest))


def test_the_input_size_must_be_said(scenario: Write) -> None:
    text = scenario().read_text().replace("model.image-size = 16\n", "")
    path = scenario()
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"model\.image-size in"):
        cells(path)


def test_every_benchmark_is_a_scenario() -> None:
    root = Path(__file__).parents[3]
    files = sorted((root / "benchmarks").rglob("*.toml"))
    assert len(files) == 10
    for file in files:
        head = file.read_text(encoding="utf-8").partition("title =")[0]
        assert f"fedbags compare {file.relative_to(root)} --out" in head, file
        assert cells(file), file
    short = cells(root / "benchmarks" / "short.toml").values()
    assert [cell.method for cell in short] == ["lhfglp", "dllp", "dllp-hierarchical", "llp-vat", "rot"]
