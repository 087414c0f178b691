"""The scenario in docs/compare.md is one, and the page names what there is."""

from pathlib import Path

from deploy.compare.scenario import Context, Data, Scenario, Setting, expand

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "compare.md").read_text(encoding="utf-8")


def test_the_pages_scenario_means_what_it_says(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(PAGE.partition("```toml\n")[2].partition("```")[0])
    cells = expand(Scenario.load(file), Context(tmp_path))
    count = {setting: sum(cell.setting is setting for cell in cells) for setting in Setting}
    assert count == {Setting.POOLED: 2 * 3 + 1 + 3 + 2 * 2, Setting.LOCAL_ONLY: 5, Setting.FEDERATED: 1}


def test_the_page_names_every_key_and_scenario() -> None:
    keys = [field.alias or name for model in (Scenario, Data) for name, field in model.model_fields.items()]
    for key in keys:
        assert f"`{key}`" in PAGE or f"[{key}]" in PAGE or f"\n{key} " in PAGE or f"[{key}." in PAGE, key
    for file in (ROOT / "benchmarks").rglob("*.toml"):
        assert f"`{file.name}`" in PAGE or f"{file.relative_to(ROOT)}" in PAGE, file
