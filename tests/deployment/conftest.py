"""A consortium of real processes on this machine: nginx, a SuperLink and three sites, from generated kits.

One for all tests that can share it: starting one takes half a minute. Everything listens on loopback.
"""

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from common.errors import UserError
from common.files import read_json_lines
from deploy.consortium.checks import nginx_program
from deploy.consortium.foreground import COMMAND
from deploy.consortium.kit import CoordinatorKit, SiteKit
from deploy.datasets.build import write_synthetic_sites
from deploy.datasets.options import SyntheticHospitals
from deploy.flower.processes import free_port, with_variable
from tests.deploy import in_process

SITES = ("hospital-1", "hospital-2", "hospital-3")
SIZE = 16
BUDGET = "epsilon = 900.0\ndelta = 0.0001\n"
SMALL = {"model.image-size": SIZE, "dp.steps-per-round": 2, "federation.patience": 120.0}
"""Of every run: images of 16 pixels, the fixed features of --dp, two steps a round."""

KEEP_UP = 'until "$@"; do [ $? -eq 2 ] && exit 2; sleep 2; done'
"""What the kits' units say: Restart=on-failure, RestartPreventExitStatus=2."""

Event = dict[str, Any]


class Consortium:
    """The kits below ``root``, the sites' data, and the commands of the documentation.

    Args:
        root: a folder; is filled by ``provision``.
        sites: names of sites.
        host: the coordinator's address.
        server_prefix, site_prefix: what to put before the commands of the two parties.
    """

    def __init__(
        self,
        root: Path,
        sites: Sequence[str] = SITES,
        host: str = "127.0.0.1",
        server_prefix: Sequence[str] = (),
        site_prefix: Sequence[str] = (),
    ) -> None:
        self.root, self.kits, self.data = root, root / "KITS", root / "DATA"
        self.sites, self.host = list(sites), host
        self.server_prefix, self.site_prefix = tuple(server_prefix), tuple(site_prefix)
        self._kept_up: list[subprocess.Popen[bytes]] = []

    @property
    def coordinator(self) -> CoordinatorKit:
        return CoordinatorKit.load(self.kits / "coordinator")

    def site(self, name: str) -> SiteKit:
        return SiteKit.load(self.kits / "sites" / name)

    def fedbags(
        self, *arguments: object, prefix: Sequence[str] = (), status: int | None = 0, timeout: float = 180
    ) -> "subprocess.CompletedProcess[str]":
        """One command; its exit status must be ``status``, if given."""
        done = subprocess.run(
            [*prefix, *COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=timeout,
            stdin=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False,
        )  # fmt: skip
        assert status is None or done.returncode == status, f"{arguments}: {done.stdout}{done.stderr}"
        return done

    def offline(self, *arguments: object) -> None:
        """A command that starts nothing and asks nobody, in this process."""
        done = in_process.fedbags(*arguments, cwd=self.root)
        assert done.returncode == 0, f"{arguments}: {done.stdout}{done.stderr}"

    def provision(self, prepare: Callable[[Path], None], admit: Sequence[str] | None = None) -> None:
        """Kits, keys that are made at the sites (all, or those to ``admit``), and data."""
        ports = "".join(
            f"[sites.{site}]\nruntime-port = {free_port()}\nmetrics-port = {free_port()}\n"
            for site in self.sites
        )
        (self.root / "consortium.toml").write_text(
            f'name = "trial"\n[server]\nhosts = ["{self.host}"]\naddress = "{self.host}"\n'
            f"port = {free_port()}\nadmin-port = {free_port()}\nmetrics-port = {free_port()}\n{ports}"
        )
        self.offline("provision", self.root / "consortium.toml", "--out", self.kits)
        prepare(self.data)
        for site in self.sites if admit is None else admit:
            self.admit(site)

    def admit(self, site: str, *, register: bool = True) -> None:
        """The site's key, its data, and the coordinator's certificate for it."""
        kit = self.kits / "sites" / site
        self.offline("site", "keygen", kit)
        if register:
            self.offline("provision", "add-key", self.kits, site, kit / "node.pub")
        text = (kit / "kit.toml").read_text()
        (kit / "kit.toml").write_text(text.replace('data-path = ""', f'data-path = "{self.data / site}"'))

    def server_up(self) -> None:
        kit = self.coordinator.folder
        self.keep_up("server", "up", kit, prefix=self.server_prefix)
        self.fedbags("server", "status", kit, "--wait", 90, prefix=self.server_prefix)

    def site_up(self, *names: str) -> None:
        """Bring sites up, all at once; their data is known to be good."""
        kits = [self.site(name).folder for name in names or self.sites]
        for kit in kits:
            self.keep_up("site", "up", kit, "--skip-data", prefix=self.site_prefix)
        for kit in kits:
            self.fedbags("site", "status", kit, "--wait", 90, prefix=self.site_prefix)

    def keep_up(self, *arguments: object, prefix: Sequence[str]) -> None:
        """Start a command that stays, and start it again when it fails, as a service manager does."""
        with (self.root / "up.log").open("ab") as log:
            started = subprocess.Popen(
                ["bash", "-c", KEEP_UP, "keep", *prefix, *COMMAND, *map(str, arguments)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )  # fmt: skip
        self._kept_up.append(started)

    def down(self) -> None:
        """End everything, sites first."""
        for site in self.sites:
            self.fedbags("site", "down", self.site(site).folder)
        self.fedbags("server", "down", self.coordinator.folder)
        for started in self._kept_up:
            started.wait(30)

    def left_over(self) -> list[int]:
        """Processes that any kit started and that live."""
        return with_variable("FLWR_HOME", f"{self.root}/")

    def status(self, site: str | None = None) -> dict[str, Any]:
        """`fedbags server status`, or that of a site."""
        kit, role = (self.site(site), "site") if site else (self.coordinator, "server")
        prefix = self.site_prefix if site else self.server_prefix
        done = self.fedbags(role, "status", kit.folder, "--json", prefix=prefix, status=None)
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def program(self, name: str, site: str | None = None) -> dict[str, Any]:
        """How one program is."""
        return next(p for p in self.status(site)["programs"] if p["name"] == name)

    def kill(self, name: str, site: str | None = None) -> int:
        """SIGKILL one program; returns its id."""
        pid = int(self.program(name, site)["pid"])
        os.kill(pid, signal.SIGKILL)
        return pid

    def start_run(self, out: str, rounds: int, **settings: object) -> "Run":
        return Run(self, self.root / out, rounds, {**SMALL, **settings})

    def run(self, out: str, rounds: int, **settings: object) -> "Run":
        """A whole run, completed."""
        run = self.start_run(out, rounds, **settings)
        assert run.wait() == 0, run.said
        return run


class Run:
    """`fedbags run` in the background, private with epsilon 8."""

    def __init__(
        self, consortium: Consortium, folder: Path, rounds: int, settings: dict[str, object]
    ) -> None:
        self.folder, self.said = folder, ""
        pairs = [part for key, value in settings.items() for part in ("--set", f"{key}={_toml(value)}")]
        self.process = subprocess.Popen(
            [
                *consortium.server_prefix, *COMMAND, "run", str(consortium.coordinator.folder),
                "--rounds", str(rounds), "--dp", "epsilon=8", "--out", str(folder), "--json", *pairs,
            ],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    def events(self, kind: str, **fields: object) -> list[Event]:
        """The events of this kind with these fields so far."""
        return [
            event
            for event in read_json_lines(self.folder / "metrics.jsonl")
            if event["event"] == kind and fields.items() <= event.items()
        ]

    def wait_for(self, kind: str, timeout: float = 120, **fields: object) -> Event:
        """Wait for an event."""
        until = time.monotonic() + timeout
        while not (found := self.events(kind, **fields)):
            assert self.process.poll() is None, f"the run ended: {self.process.communicate()[0]}"
            assert time.monotonic() < until, f"no {kind} {fields} in {timeout} s"
            time.sleep(0.05)
        return found[0]

    def wait(self, timeout: float = 420) -> int:
        """Wait for the end; returns the exit status."""
        self.said, _ = self.process.communicate(timeout=timeout)
        return self.process.returncode

    @property
    def summary(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / "summary.json").read_text())
        return found


def _toml(value: object) -> str:
    return json.dumps(value) if isinstance(value, bool | str) else str(value)


def wait_until(what: Callable[[], bool], timeout: float, why: str) -> None:
    """Poll until something holds."""
    until = time.monotonic() + timeout
    while not what():
        assert time.monotonic() < until, f"{why}: not in {timeout:g} s"
        time.sleep(0.3)


def alive(pid: int) -> bool:
    """Whether a process lives; one that waits to be reaped does not."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


def write_data(folder: Path, count: int) -> None:
    """Hospitals of 16 bags, each with a budget of its own, without which a real site trains not privately."""
    write_synthetic_sites(
        folder,
        SyntheticHospitals(
            sites=count, seed=1, images_per_site=64, image_size=SIZE, session_size=4, test_images_per_site=12
        ),
    )
    for site in folder.iterdir():
        text = (site / "site.toml").read_text().split("[policy.budget]")[0]
        (site / "site.toml").write_text(f"{text}\n[policy.budget]\n{BUDGET}")


@pytest.fixture(scope="session")
def nginx() -> str:
    """Debian's nginx, or a skip that says how to get it."""
    try:
        return nginx_program()
    except UserError as error:
        pytest.skip(str(error))


@contextmanager
def _up(found: Consortium) -> Iterator[Consortium]:
    """A consortium that is up, with data for one site more; nothing of it is left when it is down."""
    found.provision(lambda data: write_data(data, len(found.sites) + 1))
    try:
        found.server_up()
        found.site_up()
        yield found
    finally:
        found.down()
        left = found.left_over()
        assert not left, f"still running: {left}"


@pytest.fixture(scope="session")
def consortium(tmp_path_factory: pytest.TempPathFactory, nginx: str) -> Iterator[Consortium]:
    """Three sites."""
    with _up(Consortium(tmp_path_factory.mktemp("consortium"))) as found:
        yield found


@pytest.fixture
def smallest(tmp_path: Path, nginx: str) -> Iterator[Consortium]:
    """One site: each more takes ten seconds of a processor to start."""
    with _up(Consortium(tmp_path, SITES[:1])) as found:
        yield found


@pytest.fixture(scope="session")
def small_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A disk of two megabytes, or a skip where mounting is not permitted."""
    folder = tmp_path_factory.mktemp("disk")
    mount = shutil.which("mount")
    if mount is None:
        pytest.skip("mount is not installed")
    done = subprocess.run(
        [mount, "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        pytest.skip(f"mounting a small disk is not permitted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)
