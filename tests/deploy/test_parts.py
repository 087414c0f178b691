"""Parts of somebody else: found on a laptop, checked, copied into the app, and allowed by a site or not."""

import json
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from client.site import SitePolicy
from common import parts
from common.config import RunConfig
from common.errors import ConfigError, UserError
from common.parts import Kind, Part
from deploy.cli.main import app
from deploy.consortium import provision
from deploy.consortium.app import AddedParts, build_bundle, compare_apps, in_words, read_bundle
from deploy.consortium.kits import Kits
from deploy.parts import read_package

EXAMPLE = Path(__file__).parents[2] / "examples" / "sharp_parts"
SETTINGS = 'name = "lesions"\n[server]\nhosts = ["127.0.0.1"]\n[sites.north]\n[sites.south]\n'

pytestmark = pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")


def install(folder: Path, name: str, source: Path | str, license: str = "Apache-2.0") -> None:
    """Lay out a package as pip does."""
    module = name.replace("-", "_")
    if isinstance(source, Path):
        shutil.copy(source, folder / f"{module}.py")
    else:
        (folder / f"{module}.py").write_text(source)
    info = folder / f"{module}-0.1.0.dist-info"
    info.mkdir()
    stated = f"License-Expression: {license}\n" if license else ""
    (info / "METADATA").write_text(f"Metadata-Version: 2.4\nName: {name}\nVersion: 0.1.0\n{stated}")
    (info / "entry_points.txt").write_text(f"[fedbags.parts]\nown = {module}\n")
    (info / "RECORD").write_text(f"{module}.py,,\n")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of installed packages, on the path."""
    folder = tmp_path / "site-packages"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(parts, "_discovering", False)
    parts._of_others.cache_clear()
    yield folder
    parts._of_others.cache_clear()
    for name in ("sharp_parts", "bad_parts"):
        sys.modules.pop(name, None)


@pytest.fixture
def sharp(place: Path) -> Path:
    install(place, "sharp-parts", EXAMPLE / "sharp_parts.py")
    return place


def test_the_example_says_what_the_test_lays_out() -> None:
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]
    assert (project["name"], project["version"], project["license"]) == ("sharp-parts", "0.1.0", "Apache-2.0")
    assert project["entry-points"]["fedbags.parts"] == {"sharp": "sharp_parts"}


def test_installed_parts_are_found_on_a_laptop_only(sharp: Path) -> None:
    with pytest.raises(ConfigError, match="no head 'cosine'"):
        RunConfig().with_changes({"model.head": "cosine"})
    parts.discover()
    config = RunConfig().with_changes({"model.head": "cosine", "model.terms": "matching,entropy"})
    assert config.to_flat()["parts.entropy.weight"] == 0.1
    (term, head) = parts.provenance(config.part_names)
    assert (head["package"], head["version"], len(head["sha256"])) == ("sharp_parts", "0.1.0", 64)
    assert (term["kind"], term["name"]) == ("term", "entropy")


def test_every_part_is_listed_with_its_source(sharp: Path) -> None:
    result = CliRunner().invoke(app, ["parts", "list", "--json"])
    rows = {(row["kind"], row["name"]): row for row in json.loads(result.stdout)}
    assert rows["term", "entropy"]["from"] == "sharp_parts"
    assert rows["term", "entropy"]["settings"] == ["weight"]
    assert rows["block", "dictionary"]["from"] == "fedbags"
    assert "2505.23031" in rows["block", "dictionary"]["source"]
    assert len(rows) == len(parts.shipped_names()) + 2


def test_the_example_conforms_by_the_command_and_by_the_plugin(
    sharp: Path, conformance: Callable[[Part], list[str]]
) -> None:
    result = CliRunner().invoke(app, ["parts", "check", "sharp-parts", "--json"])
    checked = json.loads(result.stdout)["parts"]
    assert checked["cosine"] == [
        "2 arrays of its own: heads.0.directions.weight 2x128, heads.1.directions.weight 3x128",
        "may train privately: one bag alone, checked",
    ]
    for part in read_package("sharp-parts").parts:
        assert conformance(part) == checked[part.name]


@pytest.mark.parametrize(
    ("source", "license", "fault"),
    [
        ("import bad_parts.more\nPARTS = ()", "MIT", "No module named|imports itself"),
        ("import deploy\nPARTS = ()", "MIT", "imports deploy, which is not in an app"),
        ("PARTS = ()", "", "states no licence"),
        ("PARTS = 3", "MIT", "names no parts"),
    ],
)
def test_a_package_that_cannot_go_into_an_app_is_refused(
    place: Path, source: str, license: str, fault: str
) -> None:
    install(place, "bad-parts", source, license)
    with pytest.raises((UserError, ModuleNotFoundError), match=fault):
        read_package("bad-parts")
    with pytest.raises(UserError, match="no package 'bad-part' is installed; did you mean 'bad-parts'"):
        read_package("bad-part")


def test_a_package_with_weights_is_refused(place: Path) -> None:
    install(place, "bad-parts", "PARTS = ()")
    folder = place / "bad_parts"
    folder.mkdir()
    (place / "bad_parts.py").rename(folder / "__init__.py")
    (folder / "weights.bin").write_bytes(b"\0")
    with pytest.raises(UserError, match=r"brings bad_parts/weights\.bin.*holds Python alone"):
        read_package("bad-parts")


def test_added_parts_are_in_the_app_and_its_hash_and_stay_through_an_upgrade(
    sharp: Path, tmp_path: Path
) -> None:
    (tmp_path / "consortium.toml").write_text(SETTINGS)
    provision.provision(tmp_path / "consortium.toml", tmp_path / "KITS")
    before = read_bundle((tmp_path / "KITS" / "coordinator" / "app" / "fedbags.fab").read_bytes(), "before")
    result = CliRunner().invoke(app, ["parts", "add", "sharp-parts", str(tmp_path / "KITS")])
    assert result.exit_code == 0, result.output
    assert "term 'entropy' of sharp_parts 0.1.0 (Apache-2.0)" in result.output
    assert 'adds "entropy", "cosine" to [policy] parts' in " ".join(result.output.split())
    kit = Kits.open(tmp_path / "KITS", None).coordinator
    after = read_bundle(kit.app.read_bytes(), "after")
    assert after.hash == kit.app_hash != before.hash
    assert after.files["added_parts/sharp_parts/__init__.py"] == (EXAMPLE / "sharp_parts.py").read_bytes()
    shown = "\n".join(in_words(compare_apps(before, after)))
    assert "added    added_parts/sharp_parts/__init__.py" in shown
    assert "added    parts.entropy.weight = 0.1" in shown
    Kits.open(tmp_path / "KITS", None).update_app()
    assert kit.app.read_bytes() == after.content

    # The app's own code finds them, without the package and without anything else of this process.
    folder = tmp_path / "unpacked"
    with zipfile.ZipFile(kit.app) as archive:
        archive.extractall(folder)
    code = (
        "import tomllib; from common.config import RunConfig, flatten; from common import parts\n"
        "table = flatten(tomllib.load(open('pyproject.toml', 'rb'))['tool']['flwr']['app']['config'])\n"
        "config = RunConfig.from_flat({**table, 'model.head': 'cosine', 'model.terms': 'entropy'})\n"
        "print(parts.part(parts.Kind.HEAD, config.model.head).build.__module__, config.parts['entropy'])\n"
        "print(parts.provenance(config.part_names)[0]['package'])"
    )
    environment = {"PYTHONPATH": str(folder)}
    found = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert found.stdout.split() == ["added_parts.sharp_parts", "weight=0.1", "added_parts.sharp_parts"], (
        found.stderr
    )


def test_an_app_without_added_parts_is_what_it_was() -> None:
    assert build_bundle() == build_bundle(AddedParts())
    files = read_bundle(build_bundle(), "app").files
    assert "common/presets/methods/lhfglp.toml" in files
    assert not any(path.startswith("added_parts/") for path in files)


def test_a_site_says_which_parts_may_run_there() -> None:
    own = RunConfig().part_names
    assert own == ("resnet-small", "dictionary", "linear", "matching", "codes", "refined")
    SitePolicy().terms(simulated=False).refuse_parts(own)
    with pytest.raises(ConfigError, match=r"allows no part 'cosine'.*\[policy\] parts"):
        SitePolicy().terms(simulated=False).refuse_parts([*own, "cosine"])
    SitePolicy().terms(simulated=True).refuse_parts([*own, "cosine"])
    SitePolicy(parts=(*own, "cosine")).terms(simulated=False).refuse_parts([*own, "cosine"])
    with pytest.raises(ConfigError, match="'codes', 'refined'"):
        SitePolicy(parts=own[:4]).terms(simulated=True).refuse_parts(own)
    assert parts.Kind.HEAD is Kind.HEAD
