"""Compare a deployed round of three sites with a trivial Flower round on the same processes.

    python benchmarks/deployed_round.py [--json] [--sites 3] [--rounds 10] [--modes train,evaluated,private]

The processes come from generated kits and run on loopback. They are nginx with TLS, the SuperLink, its
SuperExec, and per site a SuperNode with our executor and its gate. A trivial app (one tiny record there and
back) runs before and after the fedbags app, each approved at the sites with `fedbags site approve`. The modes
of a fedbags run:

- ``train``: rounds of training alone (held-back bags are evaluated after the last one);
- ``evaluated``: the default, in which each round is followed by a second wave of messages, to evaluate;
- ``private``: DP-SGD with the ledger, one wave a round.

``*_overhead_s`` is, for each round, the time from the end of the one before to its own end, less local
training at the slowest site (the clock of deployed_apps.py around it), less the median trivial round. A
site asks for messages twice a second in short rounds (deploy/flower/internals.py) and as often for
its app's reply, so a wave's seconds depend on where in these pauses it falls. The smallest, the median and
the largest are given. Other work on the machine's cores makes all of them larger.

The stricter of two trivial rounds is subtracted. ``trivial_round_s`` waits for replies as closely as fedbags
does. ``flower_trivial_round_s`` is the same through Flower's own ``send_and_receive``, which asks every 3 s.
"""

import argparse
import io
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Event
from typing import Any

import tomli_w
from deployed_apps import CLOCK_FILE
from flwr.cli.build import build_fab_from_files

from common.config import RunConfig, Scalar
from common.errors import UserError
from common.files import read_json_lines
from deploy.consortium.app import build_bundle
from deploy.consortium.checks import nginx_program
from deploy.consortium.control import control
from deploy.consortium.foreground import COMMAND
from deploy.consortium.kit import CoordinatorKit
from deploy.consortium.submit import COMPLETED, changes, wait_for_end
from deploy.datasets.build import write_synthetic_sites
from deploy.datasets.options import SyntheticHospitals
from deploy.flower.processes import free_port

APPS = Path(__file__).with_name("deployed_apps.py")
PIXELS, BAG = 16, 4
BUDGET = "[policy.budget]\nepsilon = 900.0\ndelta = 0.0001\n"
MODES: dict[str, dict[str, Scalar]] = {
    "train": {"evaluation.every": 1000},
    "evaluated": {},
    "private": {"dp.epsilon": 8.0, "dp.steps-per-round": 2},
}


class Consortium:
    """Hold kits, data and processes of a consortium below one folder."""

    def __init__(self, root: Path, sites: int) -> None:
        self.root, self.kits, self.data = root, root / "KITS", root / "DATA"
        self.sites = [f"hospital-{number + 1}" for number in range(sites)]

    @property
    def coordinator(self) -> CoordinatorKit:
        return CoordinatorKit.load(self.kits / "coordinator")

    def kit(self, site: str) -> Path:
        return self.kits / "sites" / site

    def fedbags(self, *commands: Sequence[object]) -> None:
        """Run several commands at the same time, each of which must succeed."""
        running = [
            subprocess.Popen(
                [*COMMAND, *map(str, command)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
            for command in commands
        ]  # fmt: skip
        for process in running:
            said, _ = process.communicate()
            assert process.returncode == 0, said

    def up(self) -> None:
        """Create the kits and the data, and start all processes."""
        ports = "".join(
            f"[sites.{site}]\nruntime-port = {free_port()}\nmetrics-port = {free_port()}\n"
            for site in self.sites
        )
        settings = self.root / "consortium.toml"
        settings.write_text(
            'name = "benchmark"\n[server]\nhosts = ["127.0.0.1"]\naddress = "127.0.0.1"\n'
            f"port = {free_port()}\nadmin-port = {free_port()}\nmetrics-port = {free_port()}\n{ports}"
        )
        self.fedbags(["provision", settings, "--out", self.kits, "--keys-here"])
        write_synthetic_sites(
            self.data,
            SyntheticHospitals(
                sites=len(self.sites),
                seed=0,
                images_per_site=256,
                image_size=PIXELS,
                session_size=BAG,
                test_images_per_site=16,
            ),
        )
        for site in self.sites:
            kit = self.kit(site) / "kit.toml"
            kit.write_text(kit.read_text().replace('data-path = ""', f'data-path = "{self.data / site}"'))
        self.start("server", "up", self.coordinator.folder)
        self.fedbags(["server", "status", self.coordinator.folder, "--wait", 120])
        for site in self.sites:
            self.start("site", "up", self.kit(site), "--skip-data")
        self.fedbags(*(["site", "status", self.kit(site), "--wait", 120] for site in self.sites))

    def start(self, *command: object) -> None:
        """Start a command that stays, and which `down` ends."""
        with (self.root / "up.log").open("ab") as log:
            subprocess.Popen(
                [*COMMAND, *map(str, command)], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True,
            )  # fmt: skip

    def down(self) -> None:
        """End all processes."""
        self.fedbags(*(["site", "down", self.kit(site)] for site in self.sites))
        self.fedbags(["server", "down", self.coordinator.folder])

    def budgets(self, given: bool) -> None:
        """Give every site a budget, which private runs need, or none, which other runs need."""
        for site in self.sites:
            path = self.data / site / "site.toml"
            path.write_text(path.read_text().split("[policy.budget]")[0] + (BUDGET if given else ""))

    def run(self, app: bytes, config: Mapping[str, Scalar]) -> int:
        """Approve an app at every site, run it to its end, and return the run's id."""
        bundle = self.root / "app.fab"
        bundle.write_bytes(app)
        self.fedbags(*(["site", "approve", self.kit(site), bundle, "--yes"] for site in self.sites))
        with control(self.coordinator) as api:
            run = api.start_run(app, config)
            status = wait_for_end(api, run, Event())
        log = self.coordinator.logs / "superexec.log"
        assert status.outcome == COMPLETED, f"{status}\n{log.read_text()[-4000:]}"
        return run

    def clock(self, run: int) -> list[dict[str, Any]]:
        """Return the clock lines of all sites for a run."""
        files = [self.kit(site) / "logs" / CLOCK_FILE for site in self.sites]
        return [line for file in files for line in read_json_lines(file) if line["run"] == run]


def trivial_app() -> bytes:
    """Return the bundle of the trivial app."""
    project = {
        "project": {"name": "trivial", "version": "1.0.0", "license": "Apache-2.0", "dependencies": []},
        "tool": {
            "flwr": {
                "app": {
                    "publisher": "fedbags",
                    "components": {
                        "serverapp": "deployed_apps:server_app",
                        "clientapp": "deployed_apps:client_app",
                    },
                    "config": {"sites": 0, "rounds": 0, "out": ""},
                }
            }
        },
    }
    app, _ = build_fab_from_files({"pyproject.toml": tomli_w.dumps(project).encode(), APPS.name: APPS})
    return app


def clocked_app(folder: Path) -> bytes:
    """Return the bundle of the fedbags app with the clock in it."""
    with zipfile.ZipFile(io.BytesIO(build_bundle())) as bundle:
        bundle.extractall(folder)
    project = tomllib.loads((folder / "pyproject.toml").read_text())
    project["tool"]["flwr"]["app"]["components"]["clientapp"] = "deployed_apps:clocked_app"
    project["tool"]["flwr"]["app"]["fab-include"].append(APPS.name)
    # All but Flower's own list of the contents, which it makes anew.
    kept = [path for path in sorted(folder.rglob("*")) if path.suffix in (".py", ".toml", ".json")]
    files: dict[str, bytes | Path] = {path.relative_to(folder).as_posix(): path for path in kept}
    files |= {"pyproject.toml": tomli_w.dumps(project).encode(), APPS.name: APPS}
    app, _ = build_fab_from_files(files)
    return app


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Return the smallest, the median and the largest value, rounded to hundredths."""
    figures = {"min": min(seconds), "median": statistics.median(seconds), "max": max(seconds)}
    return {name: round(value, 2) for name, value in figures.items()}


def fedbags_rounds(consortium: Consortium, app: bytes, mode: str, rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each round but the first, of its training wave, and of its slowest site."""
    folder = consortium.root / f"run-{mode}"
    config = RunConfig().with_changes(
        {
            "run-dir": str(folder),
            "rounds": rounds + 1,
            "federation.sites": len(consortium.sites),
            "federation.quorum": len(consortium.sites),
            "model.image-size": PIXELS,
            **MODES[mode],
        }
    )
    consortium.budgets(mode == "private")
    run = consortium.run(app, changes(app, config))
    events = read_json_lines(folder / "metrics.jsonl")
    ended = {event["round"]: event["time"] for event in events if event["event"] == "round"}
    phases = [event for event in events if event["event"] == "phase"]
    waves = {event["round"]: event["seconds"] for event in phases if event["phase"] == "train"}
    clock = [line for line in consortium.clock(run) if line["phase"] == "train"]

    def slowest(what: str, number: int) -> float:
        return float(max(line[what] for line in clock if line["round"] == number))

    # The first round has no end before it, and its sites fetch the app.
    numbers = range(2, rounds + 2)
    return {
        "round": [ended[number] - ended[number - 1] for number in numbers],
        "wave": [waves[number] for number in numbers],
        **{what: [slowest(what, n) for n in numbers] for what in ("training", "start", "load", "total")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--sites", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--modes", default=",".join(MODES))
    options = parser.parse_args()
    try:
        nginx_program()
    except UserError as error:
        print(json.dumps({"skipped": str(error)}) if options.json else f"skipped: {error}")
        return
    # Without this SIGTERM would end this process alone, and leave the consortium's processes running.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    load = [os.getloadavg()[0]]
    with tempfile.TemporaryDirectory(prefix="fedbags-benchmark-") as name:
        consortium = Consortium(Path(name), options.sites)
        trivial, fedbags = trivial_app(), clocked_app(Path(name) / "APP")
        trivial_rounds: dict[str, list[float]] = {"prompt": [], "flower": []}

        def run_trivial() -> None:
            out = Path(name) / "trivial.json"
            consortium.run(trivial, {"sites": options.sites, "rounds": options.rounds // 2, "out": str(out)})
            for way, seconds in json.loads(out.read_text()).items():
                trivial_rounds[way] += seconds

        try:
            consortium.up()
            run_trivial()
            modes = {
                mode: fedbags_rounds(consortium, fedbags, mode, options.rounds)
                for mode in options.modes.split(",")
            }
            run_trivial()
        finally:
            consortium.down()
    load.append(os.getloadavg()[0])
    result: dict[str, Any] = {
        "trivial_round_s": spread(trivial_rounds["prompt"]),
        "flower_trivial_round_s": spread(trivial_rounds["flower"]),
    }
    bare = statistics.median(trivial_rounds["prompt"])
    for mode, found in modes.items():
        result |= {f"{mode}_{what}_s": spread(seconds) for what, seconds in found.items()}
        pairs = zip(found["round"], found["training"], strict=True)
        result[f"{mode}_overhead_s"] = spread([whole - training - bare for whole, training in pairs])
    result |= {"rounds": options.rounds, "load_average": load}
    if options.json:
        print(json.dumps(result))
        return
    for what, figures in result.items():
        print(f"{what:24s}", figures)


if __name__ == "__main__":
    main()
