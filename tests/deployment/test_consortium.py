"""From an empty folder to a private run with three sites as real processes, and to nothing left."""

import json

import pytest

from client.ledger_book import Book
from tests.deployment.conftest import SITES, Consortium

ROUNDS = 3


def test_three_sites_train_privately(consortium: Consortium) -> None:
    """TLS, node keys, the approved app, three rounds with DP; the report says what the ledgers say."""
    status = consortium.status()
    assert status["sites"] == dict.fromkeys(SITES, "online")
    run = consortium.run("first", ROUNDS)
    assert [event["updates"] for event in run.events("round")] == [len(SITES)] * ROUNDS
    ledgers = {site: consortium.data / site / "ledger.sqlite" for site in SITES}
    done = consortium.fedbags("report", run.folder, *ledgers.values(), "--out", consortium.root / "report")
    assert "does not hold" not in done.stdout
    report = json.loads((consortium.root / "report" / "report.json").read_text())
    assert report["problems"] == []
    stated = run.summary["statements"]
    for site, path in ledgers.items():
        book = Book.read(path)
        assert not book.open_reservations
        assert stated[site]["epsilon"] == pytest.approx(book.spent(), abs=1e-9)
        assert stated[site]["ledger_head"] == book.head
        assert book.spent() > 0
        consortium.fedbags("ledger", "verify", path, "--head", book.head)
