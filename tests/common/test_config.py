"""The run configuration: flat and back, bounded, unknown keys refused, one set of defaults."""

import tomllib
from pathlib import Path

import pytest

from common.config import RunConfig, Scalar, flatten, parse_setting
from common.errors import ConfigError, UserError

from .app_table import PYPROJECT, with_defaults


def test_flat_and_toml_forms_give_the_same_object_back(tmp_path: Path) -> None:
    config = RunConfig().with_changes({"rounds": 3, "model.method": "dllp", "train.learning-rate": 0.01})
    assert config.model.method == "dllp"
    assert RunConfig.from_flat(config.to_flat()) == config
    path = tmp_path / "config.toml"
    path.write_text(config.to_toml())
    assert RunConfig.from_toml(path) == config


def test_flower_gets_the_same_defaults() -> None:
    text = PYPROJECT.read_text(encoding="utf-8")
    table = flatten(tomllib.loads(text)["tool"]["flwr"]["app"]["config"])
    assert RunConfig.from_flat(table) == RunConfig()
    rest = {key: value for key, value in table.items() if not key.startswith("parts.")}
    assert rest == RunConfig().to_flat()
    assert with_defaults(text) == text, "run `make defaults`"


def test_every_fault_is_listed_with_its_key_and_a_hint() -> None:
    with pytest.raises(ConfigError) as caught:
        RunConfig.from_flat({"train.heldback": 0.2, "rounds": 0, "model.method": "magic"})
    text = str(caught.value)
    assert "did you mean 'train.held-back'" in text
    assert "rounds = 0" in text
    assert "model.method = 'magic'" in text


def test_central_noise_of_an_older_configuration_is_read_only_where_it_is_off(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    table = "\n[central-dp]\nclip-norm = 1.0\nnoise-multiplier = "
    path.write_text(RunConfig().to_toml() + table + "0.0\n")
    assert RunConfig.from_toml(path) == RunConfig()
    path.write_text(RunConfig().to_toml() + table + "1.0\n")
    with pytest.raises(ConfigError, match="noise added by the server is no longer offered"):
        RunConfig.from_toml(path)


def test_a_file_that_is_missing_or_no_toml_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not found"):
        RunConfig.from_toml(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("rounds = = 3")
    with pytest.raises(ConfigError, match="cannot be read as TOML"):
        RunConfig.from_toml(tmp_path / "bad.toml")


def test_settings_are_toml_scalars_or_text() -> None:
    assert parse_setting("rounds=3") == ("rounds", 3)
    assert parse_setting("skip-bad = false") == ("skip-bad", False)
    assert parse_setting("model.backbone=resnet18") == ("model.backbone", "resnet18")
    for bad in ("rounds", "=3", "federation.allow=[1,2]"):
        with pytest.raises(ConfigError, match="--set"):
            parse_setting(bad)


def test_configuration_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        RunConfig().rounds = 3  # type: ignore[misc]


def test_a_method_says_what_is_left_empty_and_single_parts_can_be_chosen() -> None:
    config = RunConfig().with_changes({"model.method": "llp-vat"})
    assert config.model.recipe.terms == ("matching", "vat")
    assert config.to_flat()["parts.vat.weight"] == 0.05
    assert RunConfig.from_flat(config.to_flat()) == config
    own = config.with_changes({"model.terms": "matching, rot", "parts.rot.temperature": 0.5})
    assert own.model.recipe.terms == ("matching", "rot")
    assert not any(key.startswith("parts.vat") for key in own.to_flat()), "its settings went with the term"
    assert own.to_toml().count("[parts.rot]") == 1
    with pytest.raises(ConfigError, match=r"block and tied scores need one at every level"):
        RunConfig().with_changes({"model.levels": "leaf"})


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"model.head": "protopnet"}, "no head 'protopnet'.*known: linear"),
        ({"model.block": "dictionnary"}, "no block 'dictionnary'; did you mean 'dictionary'"),
        ({"model.terms": "matching,rott"}, "no term 'rott'; did you mean 'rot'"),
        (
            {"model.method": "rot", "parts.rot.temprature": 1.0},
            "no such setting.*'temperature'",
        ),
        ({"model.method": "rot", "parts.rot.weight": -1.0}, r"parts.rot.weight = -1.0"),
        ({"parts.rot.weight": 2.0}, "no part .rot. is in this run: choose it"),
        ({"parts.nothing.weight": 2.0}, "no part 'nothing' has settings"),
        ({"parts.rot": 2.0}, r"parts\.NAME\.KEY"),
    ],
)
def test_a_wrong_part_or_key_of_one_is_named(changes: dict[str, Scalar], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        RunConfig().with_changes(changes)


def test_settings_of_methods_as_0_1_wrote_them_are_read() -> None:
    old = {"objective.rot-temperature": 0.5, "objective.vat-weight": 0.1, "model.dictionary": False}
    assert RunConfig.from_flat({"model.method": "rot", **old}).to_flat()["parts.rot.temperature"] == 0.5
    assert RunConfig.from_flat(old).model.recipe.block == "none"
    assert "parts" not in RunConfig.from_flat(old).to_toml()
