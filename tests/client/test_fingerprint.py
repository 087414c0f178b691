"""No fingerprint of private tables leaves: an attacker who knows all but one bag tries every candidate for it
against everything that a site sent, wrote into a log or answered as an error."""

import logging
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict

from client.app import app
from client.data.tables import data_version, read_listing
from client.ledger.file import NO_ROW, _canonical, _chain_hash
from client.ledger.state import LedgerState
from client.session import SiteSession
from client.site import SiteConfig, SitePolicy, _PrivacyBudget
from common.config import RunConfig
from common.hierarchy import Hierarchy
from common.model.build import build_model
from common.model.model_file import all_arrays
from common.records import ModelUpdate, ProportionRelease
from common.wire import from_records, to_records
from deploy.flower.internals import become_server

HEX = re.compile(r"[0-9a-f]{12,}")
TRUE = (2, 2, 2)
"""Leaf counts of the bag that the attacker does not know (b3, six images)."""
CANDIDATES = [(red, green, 6 - red - green) for red in range(7) for green in range(7 - red)]


@pytest.fixture
def private_site(site: Path) -> Path:
    """The hand-made site with a budget."""
    policy = SitePolicy(budget=_PrivacyBudget(epsilon=30.0, delta=1e-3))
    SiteConfig(name="site-1", policy=policy).save(site)
    return site


def ask(site: Path, kind: str, **changes: object) -> Message:
    """The site's answer to one message of a run of its own."""
    become_server()
    settings = {"model.image-size": 16, "model.atoms-per-class": 2, "train.held-back": 0.34, "rounds": 2}
    config = RunConfig().with_changes({**settings, **changes})  # type: ignore[dict-item]
    model = build_model(config.model, Hierarchy.from_csv(site / "hierarchy.csv"), 0)
    content = to_records(ModelUpdate(sender="server", round=1, arrays=all_arrays(model)))
    context = Context(1, 7, {"data-path": str(site)}, RecordDict(), config.to_flat())
    asked = RecordDict() if kind.startswith("query") else content
    return app(Message(asked, 7, kind, group_id="1"), context)


PRIVATE = {"dp.epsilon": 20.0, "dp.delta": 1e-3, "dp.expected-bags": 1.0, "dp.steps-per-round": 1}
KINDS = ("query.proportions", "train", "evaluate.bags", "evaluate.test")


def texts(reply: Message) -> Iterator[str]:
    """All of a reply but its arrays."""
    if reply.has_error():
        yield f"{reply.error.code} {reply.error.reason}"
        return
    for record in reply.content.values():
        if isinstance(record, ConfigRecord):
            yield from map(str, record.values())


def what_leaves(
    site: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str], **changes: object
) -> str:
    """Everything that a server, or a reader of logs, gets of a run: replies, errors, lines."""
    with caplog.at_level(logging.DEBUG, logger="fedbags"):
        told = [text for kind in KINDS for text in texts(ask(site, kind, **changes))]
        manifest = site / "manifest.csv"
        before, status = manifest.read_text(), manifest.stat()
        manifest.write_text(before + "images/none.png,b9\n")  # a version of the tables that is refused
        told += [text for kind in KINDS for text in texts(ask(site, kind, **changes))]
        manifest.write_text(before)
        assert manifest.stat().st_size == status.st_size
    journal = site / "journal.jsonl"
    captured = capfd.readouterr()
    return "\n".join([*told, caplog.text, captured.out, captured.err, journal.read_text()])


def versions(site: Path, scratch: Path) -> dict[tuple[int, int, int], str]:
    """The data version of every candidate: all files but one bag's counts are known, times included."""
    found = {}
    for candidate in CANDIDATES:
        copy = scratch / "-".join(map(str, candidate))
        shutil.copytree(
            site, copy, ignore=shutil.ignore_patterns(".cache", "ledger*", "journal*", "site.secret")
        )
        lines = [line for line in (copy / "bags.csv").read_text().splitlines() if not line.startswith("b3,")]
        lines += [f"b3,{label},{n}" for label, n in zip(("red", "green", "blue"), candidate, strict=True)]
        (copy / "bags.csv").write_text("\n".join(lines) + "\n")
        config = SiteConfig.load(copy)
        found[candidate] = data_version(copy, config, read_listing(copy, config)[1])
    return found


def heads(ledger: Path, version: str, *, salted: bool) -> set[str]:
    """Every head of the ledger if its rows were those of ``version``; salts are known only if ``salted``."""
    previous, found = NO_ROW, set()
    for entry in LedgerState.read(ledger).entries:
        body = {**entry.body, "data_version": version}
        if not salted:
            body.pop("salt", None)
        previous = _chain_hash(previous, entry.seq, entry.kind, _canonical(body))
        found.add(previous)
    return found


def bags_found(told: str, site: Path, scratch: Path, *, salted: bool = False) -> list[tuple[int, int, int]]:
    """The candidates that something in ``told`` speaks for."""
    strings = set(HEX.findall(told))
    ledger = site / "ledger.sqlite"
    found = []
    for candidate, version in versions(site, scratch).items():
        hashes = {version} | (heads(ledger, version, salted=salted) if ledger.exists() else set())
        if any(hash.startswith(string) or string.startswith(hash) for hash in hashes for string in strings):
            found.append(candidate)
    return found


Capture = Callable[..., str]


@pytest.fixture
def written(site: Path) -> None:
    """Rewrite bags.csv as the attacker would, so that the true candidate gives the very same bytes."""
    lines = [line for line in (site / "bags.csv").read_text().splitlines() if not line.startswith("b3,")]
    lines += [f"b3,{label},2" for label in ("red", "green", "blue")]
    (site / "bags.csv").write_text("\n".join(lines) + "\n")


@pytest.mark.usefixtures("written")
@pytest.mark.parametrize("policy", ["total", "none", "per-bag"])
def test_nothing_of_a_run_without_privacy_tells_which_candidate_is_true(
    policy: str,
    site: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """By hashes: counts that the policy releases are another matter."""
    SiteConfig(name="site-1", policy=SitePolicy(release_proportions=policy)).save(site)  # type: ignore[arg-type]
    told = what_leaves(site, caplog, capfd)
    assert len(HEX.findall(told)) >= 1
    assert bags_found(told, site, tmp_path / "candidates") == []


@pytest.mark.usefixtures("written")
def test_nothing_of_a_private_run_tells_which_candidate_is_true(
    private_site: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    told = what_leaves(private_site, caplog, capfd, **PRIVATE)
    assert len(set(HEX.findall(told))) >= 2  # a name of the data version, and heads
    assert bags_found(told, private_site, tmp_path / "candidates") == []
    # The attack is one: with the salts, which never leave, it finds the bag from the heads alone.
    assert bags_found(told, private_site, tmp_path / "again", salted=True) == [TRUE]


@pytest.mark.usefixtures("written")
def test_planted_bug_the_data_version_itself(
    site: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # For handler and guard alike: the guard alone would refuse what the handler sends.
    monkeypatch.setattr(SiteSession, "version_name", property(lambda session: session.store.data_version))
    assert bags_found(what_leaves(site, caplog, capfd), site, tmp_path / "candidates") == [TRUE]


def test_a_version_keeps_its_name_and_every_version_and_site_has_its_own(site: Path, tmp_path: Path) -> None:
    def name(folder: Path, **changes: object) -> str:
        reply = ask(folder, "query.proportions", **changes)
        return from_records(reply.content, ProportionRelease).data_version

    first = name(site)
    assert re.fullmatch("[0-9a-f]{64}", first)
    assert name(site, rounds=3) == first
    twin = tmp_path / "twin"
    shutil.copytree(site, twin, ignore=shutil.ignore_patterns("site.secret"))
    assert name(twin) != first
    (site / "images" / "10.png").touch()
    (site / "bags.csv").touch()
    assert name(site) != first


def test_a_private_run_sends_the_ledgers_name_of_the_version(private_site: Path) -> None:
    names = {
        from_records(
            ask(private_site, "query.proportions", **PRIVATE).content, ProportionRelease
        ).data_version
        for _ in range(2)
    }
    book = LedgerState.read(private_site / "ledger.sqlite")
    assert names == set(book.identifiers.values())
    assert not names & set(book.versions)
