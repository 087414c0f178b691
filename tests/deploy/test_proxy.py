"""A proxy in the environment, as in a hospital's shell: this machine's talk to itself does not go there."""

import os
import subprocess
import sys
import urllib.request
from pathlib import Path

import httpx
import pytest

from deploy.flower.processes import _LOOPBACK_HOSTS, without_proxy

DEAD = "http://127.0.0.1:9"
PROXIES = ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "all_proxy", "grpc_proxy")


def shell(**given: str) -> dict[str, str]:
    """An environment with a dead proxy and no exception but those given."""
    kept = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    return kept | dict.fromkeys(PROXIES, DEAD) | given


@pytest.mark.parametrize(
    "given",
    [{}, {"no_proxy": "example.org"}, {"NO_PROXY": "example.org, 10.0.0.0/8"}, {"no_proxy": "*"}],
)
def test_exceptions_are_added_to_those_that_are_there(given: dict[str, str]) -> None:
    found = without_proxy(given, "fl.example.org")
    assert found["no_proxy"] == found["NO_PROXY"]
    listed = found["no_proxy"].split(",")
    assert {*_LOOPBACK_HOSTS, "fl.example.org"} <= set(listed)
    for value in given.values():
        assert {part.strip() for part in value.split(",")} <= set(listed)
    assert without_proxy(found, "fl.example.org") == found


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]"])
def test_httpx_and_the_standard_library_take_it_so(monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    for name, value in {**shell(), **without_proxy(shell())}.items():
        monkeypatch.setenv(name, value)
    with httpx.Client() as client:
        direct = client._transport_for_url(httpx.URL(f"http://{host}:9091/health"))
        proxied = client._transport_for_url(httpx.URL("http://fl.example.org/"))
    assert direct is not proxied
    assert urllib.request.proxy_bypass(host.strip("[]"))
    assert not urllib.request.proxy_bypass("fl.example.org")


def test_the_command_sets_it_for_itself_and_what_it_starts() -> None:
    code = (
        "import os, deploy.cli.main as cli\n"
        "cli.app = lambda: print(os.environ['no_proxy'], os.environ['NO_PROXY'])\n"
        "cli.main()"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], env=shell(), capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert all(word.split(",")[:3] == list(_LOOPBACK_HOSTS) for word in result.stdout.split())


@pytest.mark.slow
def test_flowers_engine_finishes_a_run(sites_dir: Path, tmp_path: Path) -> None:
    result = subprocess.run(
        [
            sys.executable, "-P", "-m", "fedbags", "simulate", "--sites-dir", str(sites_dir), "--rounds", "1",
            "--engine", "flower", "--out", "run", "--no-figures", "--set", "model.image-size=16",
            "--set", "model.atoms-per-class=2",
        ],
        cwd=tmp_path, env=shell(), capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "run" / "model.safetensors").exists()
