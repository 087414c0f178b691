"""What a ledger composed before, kept beside it: used where it is its own, and never to tell less."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from client.ledger import anchor, state
from client.ledger import ledger as ledger_module
from client.ledger.anchor import _SEAL_BYTES, CarryFile
from client.ledger.check import verify
from client.ledger.ledger import Ledger, Opening
from common.errors import UserError
from common.privacy import accounting
from common.privacy.accounting import amounts_of
from common.privacy.events import Adjacency, PoissonGaussian, merge

DELTA = 1e-5
AGREEMENT = 1e-6
DIRECT = 3
ROUNDS = 6
REPLACE_ONE = Adjacency.REPLACE_ONE


def step(number: int) -> PoissonGaussian:
    return PoissonGaussian(sample_rate=0.1, noise_multiplier=4.0 + 0.1 * number, steps=5)


def forget_all() -> None:
    """Leave what a new process has: nothing."""
    accounting._kept = ()
    for cache in (accounting._epsilon, accounting._coarse, accounting._fine):
        cache.cache_clear()


@pytest.fixture(autouse=True)
def carried(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(accounting, "DIRECT", DIRECT)
    forget_all()
    yield
    forget_all()


def opened(path: Path, cap: float = 8.0) -> Ledger:
    return Ledger.open(path, Opening("site-1", "v1", cap, DELTA))


def fill(folder: Path, first: int = 0, last: int = ROUNDS) -> Path:
    folder.mkdir(exist_ok=True)
    ledger = opened(folder / "ledger.sqlite")
    for number in range(first, last):
        ledger.reserve(step(number), "run", number + 1)
        ledger.statement(number + 1)
    return ledger.path


@pytest.fixture
def ledger_path(tmp_path: Path) -> Path:
    """A ledger of more different events than are composed directly, of another process."""
    path = fill(tmp_path / "site-1")
    assert CarryFile(path).path.is_file()
    forget_all()
    return path


def afresh(ledger: Ledger) -> float:
    return accounting._epsilon.__wrapped__(merge(ledger.events()), DELTA, REPLACE_ONE, True)


def weaken(path: Path, *, sealed: bool) -> None:
    """Rewrite the file so that it tells of the same events at next to no loss."""
    file = CarryFile(path)
    about, kept = accounting.unpack(file.path.read_bytes()[_SEAL_BYTES:])
    quiet = [
        replace(one, pld=accounting._release(1e6, REPLACE_ONE, one.interval).self_compose(1)) for one in kept
    ]
    content = accounting.pack(quiet, about)
    seal = file._seal(content) if sealed else file.path.read_bytes()[:_SEAL_BYTES]
    file.path.write_bytes(seal + content)


def cut(path: Path) -> None:
    file = CarryFile(path).path
    file.write_bytes(file.read_bytes()[:-100])


def flip(path: Path) -> None:
    file = CarryFile(path).path
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def take_anothers(path: Path) -> None:
    """The file of another ledger of the same site, with the same events."""
    secret = path.parent / "site.secret"
    other = fill(path.parent.parent / "other")
    forget_all()
    shutil.copy(secret, other.parent / "site.secret")
    ledger = opened(other)
    CarryFile(other).path.unlink()
    ledger.statement(ROUNDS)
    forget_all()
    shutil.copy(CarryFile(other).path, CarryFile(path).path)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "weakened": lambda path: weaken(path, sealed=False),
    "cut": cut,
    "one bit": flip,
    "empty": lambda path: CarryFile(path).path.write_bytes(b""),
    "text": lambda path: CarryFile(path).path.write_text("no composition"),
    "another ledger's": take_anothers,
    "another secret": lambda path: (path.parent / "site.secret").write_bytes(bytes(32)),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_file_that_is_not_the_ledgers_own_is_dropped_and_written_anew(
    damage: Callable[[Path], object], ledger_path: Path
) -> None:
    damage(ledger_path)
    ledger = opened(ledger_path)
    assert accounting._kept == ()
    assert ledger.statement(ROUNDS).epsilon == pytest.approx(afresh(ledger), abs=1e-12)
    forget_all()
    opened(ledger_path)
    assert accounting._kept != ()


def test_a_file_of_another_accountant_is_dropped(ledger_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(anchor, "version", lambda _: "0.7.0")
    opened(ledger_path)
    assert accounting._kept == ()


def test_the_ledgers_own_file_is_used(ledger_path: Path) -> None:
    ledger = opened(ledger_path)
    assert {dict(one.amounts) == amounts_of(merge(ledger.events())) for one in accounting._kept} == {True}
    assert ledger.statement(ROUNDS).epsilon == pytest.approx(afresh(ledger), abs=AGREEMENT)


def test_an_older_file_of_the_ledger_is_used_for_what_it_holds(ledger_path: Path) -> None:
    kept = CarryFile(ledger_path).path.read_bytes()
    fill(ledger_path.parent, ROUNDS, ROUNDS + 2)
    CarryFile(ledger_path).path.write_bytes(kept)
    forget_all()
    ledger = opened(ledger_path)
    assert accounting._kept != ()
    assert ledger.statement(ROUNDS + 2).epsilon == pytest.approx(afresh(ledger), abs=AGREEMENT)


@pytest.mark.parametrize("goes_on", [False, True])
def test_the_file_of_a_ledger_that_was_rolled_back_is_dropped(ledger_path: Path, goes_on: bool) -> None:
    """Ledger and anchor restored from one old backup agree; the newer file beside them must not be used."""
    backup = [(path, path.read_bytes()) for path in ledger_path.parent.glob("ledger*")]
    fill(ledger_path.parent, ROUNDS, ROUNDS + 2)
    newer = CarryFile(ledger_path).path.read_bytes()
    for path, content in backup:
        path.write_bytes(content)
    forget_all()
    if goes_on:  # the same events again: only the chain tells
        fill(ledger_path.parent, ROUNDS, ROUNDS + 2)
        forget_all()
    CarryFile(ledger_path).path.write_bytes(newer)
    ledger = opened(ledger_path)
    assert accounting._kept == ()
    assert ledger.statement(1).epsilon == pytest.approx(afresh(ledger), abs=1e-12)


COUNT = """
import json, sys
from dp_accounting.pld import privacy_loss_distribution as pld
from common.privacy import accounting
accounting.DIRECT = {direct}
right, built = pld.from_gaussian_mechanism, []
def note(sigma, **options):
    built.append([sigma, options["value_discretization_interval"]])
    return right(sigma, **options)
pld.from_gaussian_mechanism = note
from client.ledger.ledger import Ledger, Opening
from common.privacy.events import PoissonGaussian
from pathlib import Path
ledger = Ledger.open(Path(sys.argv[1]), Opening("site-1", "v1", 8.0, {delta}))
ledger.refuse_used_up("run", 0)
ledger.reserve(PoissonGaussian(sample_rate=0.1, noise_multiplier=7.0, steps=5), "run", 99)
ledger.statement(99)
print(json.dumps(built))
"""


@pytest.mark.usefixtures("fine_grid")
def test_a_new_process_constructs_the_new_event_alone(ledger_path: Path) -> None:
    code = COUNT.format(direct=DIRECT, delta=DELTA)

    def constructed() -> list[float]:
        result = subprocess.run(
            [sys.executable, "-c", code, str(ledger_path)], capture_output=True, text=True, check=True
        )
        return sorted(sigma for sigma, _ in json.loads(result.stdout))

    assert constructed() == [7.0, 7.0]  # on the wide grid and on the fine one
    CarryFile(ledger_path).path.unlink()
    assert len(constructed()) > 2 * ROUNDS


def test_verify_composes_from_the_events_alone(ledger_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody who reads the site's secret hides spending beyond the cap: the next verify finds it."""
    ledger = opened(ledger_path, cap=1.5)
    monkeypatch.setattr(ledger_module, "fits", lambda *_: True)
    loud = PoissonGaussian(sample_rate=0.1, noise_multiplier=1.0, steps=50)
    ledger.reserve(loud, "run", 7)
    assert ledger.statement(7).epsilon > 1.5
    weaken(ledger_path, sealed=True)
    forget_all()
    ledger = opened(ledger_path, cap=1.5)
    assert ledger.statement(7).epsilon < 0.1
    assert [problem.reason for problem in verify(ledger_path)] == ["more than the cap of 1.5 was spent"]


def test_only_new_events_are_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a ledger of 100,000 rows, merging all events anew for each figure would take seconds."""
    ledger = opened(tmp_path / "ledger.sqlite")
    for number in (0, 1, 0):
        ledger.reserve(step(number), "run", 1, copies=50)
    sizes: list[int] = []
    monkeypatch.setattr(state, "merge", lambda events: sizes.append(len(events)) or merge(events))
    ledger.reserve(step(0), "run", 2)
    ledger.statement(2)
    assert sizes
    assert max(sizes) <= 3
    assert ledger.state.merged == merge(ledger.events())


@pytest.mark.parametrize("error", [OSError("no space"), UserError("no secret")])
def test_where_the_file_cannot_be_written_everything_is_charged_all_the_same(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(anchor, "write_bytes", fail)
    (tmp_path / "site-1").mkdir()
    ledger = opened(tmp_path / "site-1" / "ledger.sqlite")
    for number in range(ROUNDS):
        ledger.reserve(step(number), "run", number + 1)
    assert len(ledger.events()) == ROUNDS
    assert verify(ledger.path) == []


def test_a_ledger_of_few_different_events_has_no_such_file(tmp_path: Path) -> None:
    path = fill(tmp_path / "site-1", last=DIRECT)
    opened(path).reserve(step(0), "run", 9)
    assert sorted(found.name for found in path.parent.iterdir()) == ["ledger.anchor.json", "ledger.sqlite"]
