"""Write the defaults of ``common.config`` into pyproject.toml, where Flower looks (`make defaults`)."""

from pathlib import Path

import tomli_w

from common.config import RunConfig
from common.parts import shipped_with_settings

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"
_START, _END = "[tool.flwr.app.config]\n", "[tool.hatch.build.targets.wheel]\n"


def with_defaults(pyproject: str) -> str:
    """Return the text of a pyproject.toml whose ``[tool.flwr.app.config]`` holds the defaults."""
    before, _, rest = pyproject.partition(_START)
    _, _, after = rest.partition(_END)
    defaults = RunConfig().model_dump(mode="json", by_alias=True)
    # Flower takes no key that is not in the table, so the settings of all our parts are in it.
    defaults["parts"] = {
        part.name: part.settings().model_dump(mode="json", by_alias=True) for part in shipped_with_settings()
    }
    table = tomli_w.dumps({"tool": {"flwr": {"app": {"config": defaults}}}})
    return f"{before}{table}\n{_END}{after}"


if __name__ == "__main__":
    PYPROJECT.write_text(with_defaults(PYPROJECT.read_text(encoding="utf-8")), encoding="utf-8")
