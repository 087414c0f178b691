"""The house rules that a reader relies on: imports point one way, and training never sees labels."""

import ast
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("common", "server", "client", "deploy")


def test_the_contracts_of_imports_hold() -> None:
    """They stand in pyproject.toml; `lint-imports` of `make check` says which import breaks one."""
    command = Path(sys.executable).parent / "lint-imports"
    done = subprocess.run(
        [str(command), "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False,
        env={"PYTHONPATH": str(ROOT), "PATH": "", "NO_COLOR": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    assert " 0 broken" in done.stdout


def test_every_module_says_what_it_is_for() -> None:
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            assert not text.strip() or ast.get_docstring(ast.parse(text)), path


def modules_after(statement: str) -> set[str]:
    code = f"{statement}; import sys; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(result.stdout.split())


def test_the_client_loads_nothing_that_it_does_not_use() -> None:
    loaded = modules_after("import client.app")
    for heavy in ("opacus", "matplotlib", "sklearn", "pydicom", "client.data.labelled", "deploy.datasets"):
        assert heavy not in loaded


def test_help_loads_no_torch() -> None:
    loaded = modules_after("import deploy.cli.main")
    for heavy in ("torch", "flwr", "matplotlib", "sklearn", "numpy", "pandas", "pydantic", "rich.text"):
        assert heavy not in loaded


def test_watching_a_run_or_a_site_loads_neither_flower_nor_torch() -> None:
    loaded = modules_after("import deploy.runs.prometheus, deploy.runs.show, deploy.runs.site_state")
    for heavy in ("torch", "flwr", "dp_accounting"):
        assert heavy not in loaded


def test_flowers_private_parts_are_touched_in_one_module() -> None:
    """Besides it, the Control API and the types of SuperExec's tasks are named where they are used."""
    private = re.compile(
        r"(?m)^\s*(from|import) flwr\.(supercore|supernode|superlink|cli|proto|common\.serde)\b"
    )
    users = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        if private.search(path.read_text(encoding="utf-8"))
    }
    assert users - {"deploy/flower/internals.py"} == {
        "deploy/consortium/control.py",
        "deploy/consortium/executor.py",
        "deploy/consortium/gate.py",
    }


def test_only_wire_builds_flower_records_that_travel() -> None:
    users = {
        path.relative_to(ROOT).as_posix()
        for package in ("client", "server", "common")
        for path in (ROOT / package).rglob("*.py")
        if "ConfigRecord" in path.read_text(encoding="utf-8")
    }
    assert users == {"common/wire.py"}


def test_log_calls_have_constant_templates() -> None:
    """What is put in is then seen by common/text.py, which withholds identifiers."""
    levels = {"debug", "info", "warning", "error", "exception", "critical"}
    calls = 0
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                    continue
                if (
                    node.func.attr in levels
                    and isinstance(node.func.value, ast.Name)
                    and node.func.value.id == "log"
                ):
                    calls += 1
                    assert isinstance(node.args[0], ast.Constant), f"{path}:{node.lineno}"
    assert calls > 4
