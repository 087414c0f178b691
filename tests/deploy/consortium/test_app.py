"""Only the app whose bytes the kit pins passes the gate, and a site sees what it approves."""

import hashlib
import io
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from common.errors import ConfigError, UserError
from deploy.cli.main import app as fedbags
from deploy.consortium import app, gate
from deploy.consortium.kit import SiteKit, app_hash

WriteApp = Callable[..., tuple[Path, bytes]]


@pytest.fixture
def kit(tmp_path: Path) -> SiteKit:
    folder = tmp_path / "kit"
    folder.mkdir()
    kit = SiteKit(consortium="test", app_hash="0" * 64, site="a", server="127.0.0.1", port=8443).at(folder)
    kit.save()
    return kit


def approve(kit: SiteKit, app: Path, *options: str, answer: str = "") -> tuple[int, str]:
    result = CliRunner().invoke(
        fedbags, ["site", "approve", str(kit.folder), str(app), *options], input=answer
    )
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def test_one_app_passes_and_every_other_one_is_refused() -> None:
    approved = hashlib.sha256(b"app").hexdigest()
    gate._admit(b"app", approved)
    for content, pinned in ((b"apq", approved), (b"", approved), (b"app", ""), (b"app", approved.upper())):
        with pytest.raises(gate.AppNotApproved):
            gate._admit(content, pinned)


def test_what_a_refusal_tells_the_server_is_fixed() -> None:
    with pytest.raises(gate.AppNotApproved) as refusal:
        gate._admit(b"secret", "")
    assert str(refusal.value) == "this site runs only the app that it approved, and this is another one"


def test_the_newest_refused_app_is_kept(tmp_path: Path) -> None:
    gate._keep_refused(b"first", tmp_path / "state")
    assert gate._keep_refused(b"second", tmp_path / "state").read_bytes() == b"second"
    assert os.listdir(tmp_path / "state") == [gate._REFUSED_APP]  # noqa: PTH208


def test_approving_pins_the_bytes_and_their_hash(kit: SiteKit) -> None:
    kit.approve(b"app")
    now = SiteKit.load(kit.folder)
    assert now.app_hash == hashlib.sha256(b"app").hexdigest()
    assert now.app.read_bytes() == b"app"
    assert now.model_copy(update={"app_hash": kit.app_hash}) == kit


def test_differences_are_told_in_words(kit: SiteKit, write_app: WriteApp) -> None:
    first, content = write_app()
    kit.approve(content)
    project, client = ((first / name).read_text() for name in ("pyproject.toml", "bare/client.py"))
    for old, new in (
        ("bare.client:app", "bare.extra:app"),
        ('out = ""\nwaves = 1', "waves = 9"),
        ("dependencies = []", 'dependencies = ["evil"]'),
    ):
        assert old in project
        project = project.replace(old, new)
    files = {"bare/client.py": client + "import evil\n", "bare/extra.py": "1\n2\n", "bare/server.py": None}
    other, _ = write_app("other", {"pyproject.toml": project, **files})
    status, output = approve(kit, other, answer="n\n")
    assert status == 1
    for line in (
        "Files (1 are as before):",
        "  changed  bare/client.py  (+1 -0 lines)",
        "  added    bare/extra.py  (+2 -0 lines)",
        "  removed  bare/server.py  (+0 -20 lines)",
        "  changed  clientapp: 'bare.client:app' -> 'bare.extra:app'",
        "  removed  out (was '')",
        "  changed  waves: 1 -> 9",
        "  changed  project.dependencies: [] -> ['evil']",
    ):
        assert line in output.splitlines(), output
    assert "Not approved; nothing was changed." in output
    assert SiteKit.load(kit.folder).app_hash == app_hash(content)
    assert "+import evil" not in output
    assert "+import evil" in approve(kit, other, "--diff", answer="n\n")[1]


def test_a_yes_approves_a_folder_or_a_bundle(kit: SiteKit, write_app: WriteApp, tmp_path: Path) -> None:
    folder, content = write_app()
    status, output = approve(kit, folder, answer="y\n")
    assert status == 0
    assert "all of this one is shown as added" in output
    assert SiteKit.load(kit.folder).app_hash == app_hash(content)
    bundle = tmp_path / "new.fab"
    bundle.write_bytes(write_app("new", {"bare/new.py": "x = 1\n"})[1])
    answer = json.loads(approve(kit, bundle, "--json")[1])
    assert answer["approved"] is False
    assert [file["path"] for file in answer["changes"]["files"]] == ["bare/new.py"]
    assert SiteKit.load(kit.folder).app_hash == app_hash(content)
    assert json.loads(approve(kit, bundle, "--json", "--yes")[1])["approved"] is True
    assert SiteKit.load(kit.folder).app_hash == app_hash(bundle.read_bytes())
    assert "This is the app that the site has approved." in approve(kit, bundle)[1]


def test_the_kits_copy_of_the_app_is_not_believed(kit: SiteKit, write_app: WriteApp) -> None:
    _, content = write_app()
    kit.approve(content)
    evil, other = write_app("evil", {"bare/evil.py": "x = 1\n"})
    kit.app.write_bytes(other)
    assert "  added    bare/client.py" in approve(kit, evil, answer="n\n")[1]


def bundle_of(*entries: tuple[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries:
            archive.writestr(name, content)
    return stream.getvalue()


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    ("entries", "complaint"),
    [
        ([], "not a Flower app bundle"),
        ([("a.py", b"1"), ("a.py", b"2")], "a file is in it twice"),
        ([("../a.py", b"1")], "lies outside"),
        ([("/a.py", b"1")], "lies outside"),
        ([("a.py", bytes(app._MAX_UNPACKED + 1))], "unpacks to more than 64 MiB"),
    ],
)
def test_what_could_be_shown_otherwise_than_it_unpacks_is_refused(
    entries: list[tuple[str, bytes]], complaint: str
) -> None:
    content = bundle_of(*entries) if entries else b"no zip"
    with pytest.raises(UserError, match=complaint):
        app.read_bundle(content, "app.fab")


def test_an_app_cannot_hide_lines_from_a_terminal() -> None:
    new = app.read_bundle(bundle_of(("a\x1b[2K\r.py", b"1"), ("b\u202e.py", b"\xff")), "app.fab")
    text = "\n".join(app.in_words(app.compare_apps(None, new)))
    assert "a\\x1b[2K\\r.py  (+1 -0 lines)" in text
    assert "b\\u202e.py  (not a text file)" in text


def test_mistakes_are_named(kit: SiteKit, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"Give a \.fab file, or the folder"):
        approve(kit, tmp_path / "nothing")
    with pytest.raises(UserError, match="is not the folder of a Flower app"):
        approve(kit, kit.folder)
    (kit.folder / "kit.toml").write_text('role = "site"\nkit-version = 1\n')
    with pytest.raises(ConfigError, match="app-hash"):
        approve(kit, tmp_path)
