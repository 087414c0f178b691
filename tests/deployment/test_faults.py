"""Processes killed, a disk full, sites that come and go in mid-run: the run goes on, and the ledgers hold.

Every test is one run on the shared consortium, whose commands are started again as a service manager would.
"""

import json
import os
import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest

from client.ledger.state import LedgerState
from deploy.flower.processes import free_port
from tests.deployment.conftest import SITES, Consortium, Run, alive, wait_until

pytestmark = pytest.mark.slow

FIRST, SECOND, THIRD = SITES
FOURTH = "hospital-4"


def ledger(consortium: Consortium, site: str) -> LedgerState:
    return LedgerState.read(consortium.data / site / "ledger.sqlite")


def assert_ledgers_hold(consortium: Consortium, run: Run, *sites: str) -> None:
    """What the server was told last is in each site's ledger, which may say more: a reply can be lost."""
    stated = run.summary["statements"]
    for site in sites:
        path = consortium.data / site / "ledger.sqlite"
        consortium.fedbags("ledger", "verify", path, "--head", stated[site]["ledger_head"])
        assert stated[site]["epsilon"] <= ledger(consortium, site).spent() + 1e-9


def test_superlink_killed_in_mid_run_ends_it_and_it_can_be_resumed(consortium: Consortium) -> None:
    run = consortium.start_run("superlink", 3)
    run.wait_for("round", round=1)
    before = consortium.kill("superlink")
    wait_until(lambda: consortium.status()["ready"], 60, "the coordinator comes back")
    assert consortium.program("superlink")["pid"] != before
    assert run.wait() == 1
    done = consortium.fedbags(
        "run", consortium.coordinator.folder, "--resume", "--out", run.folder, "--json", timeout=400
    )
    assert json.loads(done.stdout)["rounds"] == 3
    assert [event["updates"] for event in run.events("round")] == [3, 3, 3]
    assert_ledgers_hold(consortium, run, *SITES)


def test_supernode_killed_comes_back_by_itself(consortium: Consortium) -> None:
    before = consortium.program("supernode", THIRD)["pid"]
    run = consortium.start_run("supernode", 3)
    run.wait_for("round", round=1)
    consortium.kill("supernode", THIRD)
    killed = time.monotonic()
    wait_until(lambda: consortium.status(THIRD)["ready"] is False, 10, "its end is seen")
    wait_until(lambda: consortium.status(THIRD)["ready"], 150, "the SuperNode comes back")
    assert time.monotonic() - killed > 5  # it was refused for a while, and tried again
    assert consortium.program("supernode", THIRD)["pid"] != before
    assert run.wait() == 0, run.said
    assert len(run.events("round")) == 3
    assert all(event["updates"] >= 2 for event in run.events("round"))
    assert_ledgers_hold(consortium, run, FIRST, SECOND)
    assert consortium.status()["sites"][THIRD] == "online"


def forked_task(executor: int) -> int | None:
    """The process of a ClientApp: it was forked by the executor's fork server."""
    for task in descendants_of(executor):
        parent = int(Path(f"/proc/{task}/stat").read_text().rpartition(")")[2].split()[1])
        if parent != executor and "forkserver" in Path(f"/proc/{parent}/cmdline").read_text():
            return task
    return None


def descendants_of(pid: int) -> list[int]:
    found: list[int] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, path.read_text().split()):
            found += [child, *descendants_of(child)]
    return found


def kill_in_training(consortium: Consortium, site: str, executor: int) -> tuple[int, set[int]]:
    """Kill the ClientApp that has reserved a round; returns its process, and the rows it left open."""
    until = time.monotonic() + 120
    while not (open_ := ledger(consortium, site).open_reservations):
        assert time.monotonic() < until, "it never reserved"
        time.sleep(0.01)
    task = forked_task(executor)
    assert task is not None
    os.kill(task, signal.SIGKILL)
    return task, open_


def test_client_app_killed_in_training(consortium: Consortium) -> None:
    """What it had reserved stays spent, the round goes on without it, and the next one has it again."""
    executor = int(consortium.program("executor", SECOND)["pid"])
    run = consortium.start_run("clientapp", 3, **{"dp.steps-per-round": 1500})
    run.wait_for("enrolled")
    task, open_ = kill_in_training(consortium, SECOND, executor)
    assert run.wait() == 0, run.said
    assert not alive(task)
    book = ledger(consortium, SECOND)
    assert open_ <= book.open_reservations
    assert run.events("round", round=1, updates=2)
    assert run.events("left-out", round=1)
    assert run.events("update", site=SECOND)
    assert_ledgers_hold(consortium, run, *SITES)


def test_a_site_joins_in_mid_run_and_is_revoked_in_mid_run(consortium: Consortium) -> None:
    run = consortium.start_run("changing", 12, **{"federation.sites": 3})
    ports = ("--runtime-port", free_port(), "--metrics-port", free_port())
    consortium.fedbags("provision", "add-site", consortium.kits, FOURTH, *ports)
    consortium.sites.append(FOURTH)
    run.wait_for("round", round=1)
    try:
        consortium.admit(FOURTH)
        consortium.site_up(FOURTH)
        assert run.wait_for("joined", site=FOURTH)["round"] > 1
        run.wait_for("update", site=FOURTH)
        consortium.fedbags("provision", "revoke", consortium.kits, FOURTH)
        last = run.wait_for("left", site=FOURTH)["round"]
        assert run.wait() == 0, run.said
        assert len(run.events("round")) == 12
        assert not [event for event in run.events("update", site=FOURTH) if event["round"] > last]
        assert run.events("round", round=12, updates=3)
        assert set(consortium.status()["sites"]) == set(SITES)
        wait_until(
            lambda: "is not registered" in consortium.program("supernode", FOURTH)["reason"],
            180,
            "the refusal",
        )
        assert_ledgers_hold(consortium, run, *SITES, FOURTH)
    finally:
        consortium.fedbags("site", "down", consortium.site(FOURTH).folder)
        consortium.sites.remove(FOURTH)


def fill(path: Path) -> None:
    """Write until the disk is full."""
    with path.open("wb", buffering=0) as stream, suppress(OSError):
        while True:
            stream.write(bytes(4096))
    assert shutil.disk_usage(path.parent).free == 0


def test_a_sites_disk_is_full_for_a_while(consortium: Consortium, small_disk: Path) -> None:
    """The site is left out while it cannot write its ledger, and takes part again when it can."""
    usual, kit = consortium.data / THIRD, consortium.site(THIRD)
    small = small_disk / THIRD

    def move(source: Path, target: Path) -> None:
        consortium.fedbags("site", "down", kit.folder)
        shutil.copytree(source, target, dirs_exist_ok=True)
        text = (kit.folder / "kit.toml").read_text()
        (kit.folder / "kit.toml").write_text(text.replace(f'"{source}"', f'"{target}"'))
        consortium.site_up(THIRD)

    move(usual, small)
    try:
        run = consortium.start_run("disk", 8)
        run.wait_for("update", site=THIRD, round=1)
        fill(small_disk / "fill")
        left_out = run.wait_for("left-out", site=THIRD)
        assert str(small) not in left_out["reason"]
        (small_disk / "fill").unlink()
        run.wait_for("update", site=THIRD, round=left_out["round"] + 2)
        assert run.wait() == 0, run.said
        assert len(run.events("round")) == 8
    finally:
        move(small, usual)
    assert_ledgers_hold(consortium, run, *SITES)


SHARED = {
    "dp.noise": "shared", "dp.steps-per-round": 1, "secure-aggregation.enabled": True,
    "secure-aggregation.minimum-sites": 2, "federation.quorum": 2,
}  # fmt: skip
ALLOWED = "alone-epsilon = 900.0\n[policy.secure-aggregation]\nshared-noise = true\nminimum-sites = 2\n"


def test_a_site_killed_in_a_round_of_shared_noise(consortium: Consortium) -> None:
    """Nothing comes off with fewer shares than are counted on, nothing is free, and the run goes on."""
    refused = consortium.start_run("not-allowed", 2, **SHARED)
    assert refused.wait() == 1, refused.said
    assert not refused.events("update")
    for site in SITES:
        path = consortium.data / site / "site.toml"
        path.write_text(path.read_text() + ALLOWED)
    # In a suite other runs may have trained before.
    paths = {site: consortium.data / site / "ledger.sqlite" for site in SITES}
    before = {site: len(ledger(consortium, site).events) for site in SITES if paths[site].exists()}
    executor = int(consortium.program("executor", SECOND)["pid"])
    run = consortium.start_run("shared", 4, **SHARED)
    run.wait_for("round", round=1)
    _, open_ = kill_in_training(consortium, SECOND, executor)
    assert run.wait() == 0, run.said
    assert open_ <= ledger(consortium, SECOND).open_reservations
    assert sorted(event["updates"] for event in run.events("round")) == [2, 3, 3, 3]
    assert_ledgers_hold(consortium, run, *SITES)
    for site in SITES:
        book = ledger(consortium, site)
        charged = [event for event in book.events[before.get(site, 0) :] if event.kind == "poisson_gaussian"]
        assert sum(event.steps for event in charged) == 4
        assert all(event.shares == 2 and event.discrete for event in charged)
        stated = run.summary["statements"][site]
        assert stated["epsilon_alone"] == pytest.approx(book.spent_alone(), rel=1e-6)
        assert stated["epsilon_alone"] > stated["epsilon"]
