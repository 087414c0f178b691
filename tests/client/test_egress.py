"""The guard sends what it wrote itself: of a handler's reply nothing leaves that is not the honest answer."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from client import egress
from client.app import app
from client.egress import SiteError
from client.ledger import file
from client.ledger.file import LEDGER_FILE, Kind
from client.ledger.ledger import _CARRY_EVERY, Ledger, Opening
from client.ledger.state import LedgerState
from client.ledger.view import Charges
from client.session import SiteSession
from common.config import RunConfig
from common.errors import (
    ConfigError,
    DataError,
    EgressError,
    RunError,
    UserError,
)
from common.hierarchy import Hierarchy
from common.privacy.events import PoissonGaussian
from common.records import SITE_ERRORS, ModelUpdate, PrivacyStatement, ProportionRelease
from common.wire import from_records, to_records
from tests.cases import shortened

from .asking import PRIVATE, Node, with_policy

CANARIES = ("patient-4711", "/secret/path", "melanoma")
LOOK: dict[str, Any] = PRIVATE | {"dp.metrics-scale": 40.0}


class Case:
    """One question to one site, with the honest reply, which a test then changes."""

    def __init__(self, site: Path, kind: str, changes: dict[str, Any]) -> None:
        self.node, self.kind, self.changes = Node(site), kind, changes
        self.message = self.node.message(kind, self.node.request(kind, changes))
        self.context = self.node.context(changes)
        self.honest = self._honest()

    def _honest(self) -> RecordDict:
        """What the handler answers, seen inside the guard."""
        seen: list[RecordDict] = []

        def handler(message: Message, session: SiteSession) -> Message:
            reply = app.handlers[self.kind](message, session)
            seen.append(reply.content)
            return reply

        self.sent = egress.guard(self.message, self.context, handler)
        assert not self.sent.has_error(), self.sent.error
        return seen[0]

    def again(self) -> None:
        """Let the handler charge the ledger again, so that an honest reply would be paid for."""
        self.honest = self._honest()

    def send(self, change: Callable[[RecordDict], object], *, charge: bool = False) -> Message:
        """What leaves where a handler answers the honest reply with a change."""

        def handler(message: Message, session: SiteSession) -> Message:
            reply = app.handlers[self.kind](message, session) if charge else None
            content = reply.content if reply is not None else copied(self.honest)
            change(content)
            return Message(content, reply_to=message)

        return egress.guard(self.message, self.context, handler)


def copied(records: RecordDict) -> RecordDict:
    made = {ArrayRecord: ArrayRecord, MetricRecord: MetricRecord, ConfigRecord: ConfigRecord}
    return RecordDict({name: made[type(record)](dict(record)) for name, record in records.items()})


def plain(records: RecordDict) -> dict[str, Any]:
    """Records as something that compares by content."""
    return {
        name: {key: (v.dtype, v.shape, v.data) if isinstance(v, Array) else v for key, v in record.items()}
        for name, record in records.items()
    }


@pytest.fixture(scope="module")
def cases(sites_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    """By name: training and evaluations, with and without privacy."""
    root = tmp_path_factory.mktemp("cases")
    policy = {"private-metrics": "noise", "metrics": ["num-bags", "loss", "confusion"]}
    budget = {"budget": {"epsilon": 500.0, "delta": 1e-3}}
    clear = with_policy(sites_dir / "hospital-1", root / "clear", **{"release-proportions": "total"})
    per_bag = with_policy(
        sites_dir / "hospital-1",
        root / "per-bag",
        **{"release-proportions": "per-bag", "held-back": 0.5, "minimum-held-back-bags": 4},
    )
    private = with_policy(sites_dir / "hospital-1", root / "private", **policy, **budget)
    return {
        "train": Case(per_bag, "train", {}),
        "bags": Case(per_bag, "evaluate.bags", {}),
        "test": Case(clear, "evaluate.test", {}),
        "release": Case(clear, "query.proportions", {}),
        "release per bag": Case(per_bag, "query.proportions", {}),
        "private train": Case(private, "train", PRIVATE),
        "look": Case(private, "evaluate.bags", LOOK),
        "private release": Case(private, "query.proportions", PRIVATE),
        "private test": Case(private, "evaluate.test", PRIVATE),
    }


def edit(record: str, change: Callable[[dict[str, Any]], object]) -> Callable[[RecordDict], None]:
    """A change of the JSON of a record."""

    def apply(reply: RecordDict) -> None:
        content = json.loads(str(reply[record]["json"]))  # type: ignore[index]
        change(content)
        reply[record] = ConfigRecord({"json": json.dumps(content)})

    return apply


def text(record: str, old: str, new: str) -> Callable[[RecordDict], None]:
    """A change of the text of a record's JSON."""

    def apply(reply: RecordDict) -> None:
        before = str(reply[record]["json"])  # type: ignore[index]
        assert old in before
        reply[record] = ConfigRecord({"json": before.replace(old, new, 1)})

    return apply


def metric(name: str, value: Any) -> Callable[[RecordDict], None]:
    def apply(reply: RecordDict) -> None:
        reply["metrics"] = MetricRecord({**reply["metrics"], name: value})  # type: ignore[dict-item]

    return apply


def without(record: str, key: str | None = None) -> Callable[[RecordDict], None]:
    def apply(reply: RecordDict) -> None:
        if key is None:
            del reply[record]
        else:
            del reply[record][key]  # type: ignore[attr-defined]

    return apply


def numbers(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[RecordDict], None]:
    """A change of the trained numbers."""

    def apply(reply: RecordDict) -> None:
        values = reply["arrays"]["arrays"].numpy()  # type: ignore[index,union-attr]
        reply["arrays"] = ArrayRecord({"arrays": Array(change(values.copy()))})

    return apply


def raw(change: Callable[[bytes], bytes]) -> Callable[[RecordDict], None]:
    """A change of the bytes of the array."""

    def apply(reply: RecordDict) -> None:
        own: Array = reply["arrays"]["arrays"]  # type: ignore[index,assignment]
        array = Array(own.dtype, own.shape, own.stype, change(own.data))
        reply["arrays"] = ArrayRecord({"arrays": array})

    return apply


def put(name: str, record: Any) -> Callable[[RecordDict], None]:
    def apply(reply: RecordDict) -> None:
        reply[name] = record

    return apply


def with_payload(values: np.ndarray) -> np.ndarray:
    """A NaN whose free bits hold a text."""
    values.view(np.uint32)[:2] = 0x7FC00000 | np.frombuffer(b"pt4711xx", np.uint16)[:2]
    return values


def more_arrays(reply: RecordDict) -> None:
    update = from_records(reply, ModelUpdate)
    extra = {**update.arrays, "patient": np.zeros(3, np.float32)}
    reply["arrays"], reply["update"] = (
        to_records(update.model_copy(update={"arrays": extra}))[key] for key in ("arrays", "update")
    )


def fewer_arrays(reply: RecordDict) -> None:
    update = from_records(reply, ModelUpdate)
    fewer = dict(list(update.arrays.items())[1:])
    reply["arrays"], reply["update"] = (
        to_records(update.model_copy(update={"arrays": fewer}))[key] for key in ("arrays", "update")
    )


def other_order(reply: RecordDict) -> None:
    update = from_records(reply, ModelUpdate)
    turned = dict(reversed(update.arrays.items()))
    reply["arrays"], reply["update"] = (
        to_records(update.model_copy(update={"arrays": turned}))[key] for key in ("arrays", "update")
    )


HEAD = "ab" * 32
LAPLACE = {"kind": "discrete_laplace", "scale": 40.0}
TEXT = "patient-4711: melanoma"


def privacy(**changes: Any) -> Callable[[RecordDict], None]:
    return edit("privacy", lambda content: content.update(changes))


def release(**changes: Any) -> Callable[[RecordDict], None]:
    return edit("release", lambda content: content.update(changes))


def another_count(content: dict[str, Any]) -> None:
    content["leaf_counts"][0][0] = 4711.0


THREE = ArrayRecord({"arrays": Array(np.zeros(3, np.float32))})
SMUGGLED: list[tuple[str, str, Callable[[RecordDict], object]]] = [
    # metrics
    ("a list in num-bags", "train", metric("num-bags", [4, 4711])),
    ("another number of bags", "train", metric("num-bags", 4711)),
    ("a float for a number of bags", "train", metric("num-bags", 4.25)),
    ("labels in confusion of a train reply", "train", metric("confusion.argmax.0", [3, 1, 4])),
    ("a patient id in a metric's name", "train", metric("confusion.patient-4711", 1)),
    ("a detail of an allowed metric", "train", metric("loss.patient-4711", 0.5)),
    ("an unknown metric", "train", metric("melanoma", 1)),
    ("a list of losses", "train", metric("loss", [0.5, 0.25])),
    ("a loss of NaN", "train", metric("loss", float("nan"))),
    ("more images than there are", "train", metric("num-images", 10**9)),
    ("a metric too few", "train", without("metrics", "num-images")),
    ("a level too many", "bags", metric("bags-kl", [0.5, 0.5, 0.5, 0.5])),
    ("a distance that none is", "bags", metric("bags-l1", [4711.0, 0.5, 0.5])),
    ("another number of held-back bags", "bags", metric("held-back-bags", 4711)),
    ("a matrix of another size", "test", metric("confusion.argmax.0", [9] * 8)),
    ("a level that is not there", "test", metric("confusion.argmax.7", [9] * 9)),
    ("a reading that is not there", "test", metric("confusion.labels.0", [9] * 9)),
    ("a count below the smallest cell", "test", metric("confusion.argmax.0", [1] * 9)),
    ("a negative count", "test", metric("confusion.argmax.0", [-4711] * 9)),
    ("exact counts of tests of a site with a budget", "private test", metric("num-bags", 8)),
    # the envelope
    ("another site", "train", edit("update", lambda c: c.update(sender="patient-4711"))),
    ("another round", "train", edit("update", lambda c: c.update(round=4711))),
    ("a key twice", "train", text("update", '"sender"', f'"sender":"{TEXT}","sender"')),
    ("a key too many", "train", edit("update", lambda c: c.update(patient=4711))),
    ("blanks in the text", "train", text("update", '"sender":', '"sender":   \t ')),
    ("a key of the record", "train", lambda r: r["update"].update(patient=TEXT)),  # type: ignore[union-attr]
    ("a further record", "train", put("labels", MetricRecord({"label": 3}))),
    ("a record of paths", "train", put("path", ConfigRecord({"path": "/secret/path"}))),
    ("a record too few", "train", without("privacy")),
    # arrays
    ("bytes after the array", "train", raw(lambda data: data + TEXT.encode())),
    ("text in the array's header", "train", raw(lambda data: data.replace(b" " * 9, b"#pt-4711 ", 1))),
    ("a NaN with a payload", "train", numbers(with_payload)),
    ("infinity", "train", numbers(lambda v: np.full_like(v, np.inf))),
    ("another dtype", "train", numbers(lambda v: v.astype(np.float64))),
    ("numbers too many", "train", numbers(lambda v: np.append(v, v[:1]))),
    ("another array", "train", more_arrays),
    ("an array too few", "train", fewer_arrays),
    ("another order of the arrays", "train", other_order),
    ("arrays beside an evaluation", "bags", put("arrays", THREE)),
    # the statement
    ("a generator in own words", "train", privacy(generator=TEXT)),
    ("a ledger's head in own words", "train", privacy(ledger_head=TEXT)),
    ("a ledger's head of a site without a ledger", "train", privacy(ledger_head=HEAD)),
    ("an epsilon of a run without one", "train", privacy(epsilon=0.4711)),
    ("a statement of another round", "train", privacy(round=4711)),
    ("a generator in own words, private", "private train", privacy(generator=TEXT)),
    ("another head", "private train", privacy(ledger_head=HEAD)),
    ("events in own words", "private train", privacy(events=[{"kind": TEXT}])),
    ("an event too many", "private train", edit("privacy", lambda c: c["events"].append(LAPLACE))),
    ("an event too few", "private train", edit("privacy", lambda c: c["events"].clear())),
    ("another epsilon", "private train", privacy(epsilon=0.4711)),
    ("another budget", "private train", privacy(budget_left=0.4711)),
    ("another delta", "private train", privacy(delta=0.4711)),
    ("a loss of a private run", "private train", metric("loss", 0.5)),
    # the release
    ("class names of its own", "release", edit("release", lambda c: c["hierarchy"]["rows"][0].append(TEXT))),
    ("a class renamed", "release", text("release", "round", "patient-4711")),
    ("a key beside the tree", "release", edit("release", lambda c: c["hierarchy"].update(patient=4711))),
    ("a data version in own words", "release", release(data_version=TEXT)),
    ("another number of bags in the release", "release", release(bags=4711)),
    ("bag sizes with a total", "release", release(bag_sizes=[8] * 8)),
    ("counts called noised", "release", release(mechanism="discrete-laplace", event=LAPLACE)),
    ("other counts", "release", edit("release", another_count)),
    ("an event of a run without one", "release", release(event=LAPLACE)),
    ("bag sizes of another sum", "release per bag", release(bag_sizes=[4711] * 8)),
    ("exact counts in a private run", "private release", release(mechanism="exact", event={})),
    ("other noise than the ledger keeps", "private release", edit("release", another_count)),
    (
        "another event than the ledger's",
        "private release",
        edit("release", lambda c: c["event"].update(scale=4711.0)),
    ),
    # a look
    ("a look in floats", "look", metric("noised-bags-tv", [0.5, 0.25, 0.125])),
    ("a look of one number", "look", metric("noised-bags-tv", 4711)),
    ("an exact figure beside the noised", "look", metric("bags-l1", [0.5, 0.5, 0.5])),
    ("a look of more levels", "look", metric("noised-bags-tv", [1, 2, 3, 4])),
    ("a look beyond its range", "look", metric("noised-bags-tv", [10**12, 0, 0])),
]


@pytest.mark.parametrize(("case", "change"), [pytest.param(*rest, id=name) for name, *rest in SMUGGLED])
def test_what_a_handler_smuggles_does_not_leave(
    case: str, change: Callable[[RecordDict], object], cases: dict[str, Case]
) -> None:
    """A changed reply is refused, or what goes out is byte for byte the honest one."""
    own = cases[case]
    if own.context.run_config["dp.epsilon"]:
        refused_or_the_ledgers_own(own, change)
        return
    reply = own.send(change)
    if reply.has_error():
        assert (reply.error.code, reply.error.reason) in [
            (int(code), told) for code, told in SITE_ERRORS.items()
        ]
    else:
        assert plain(reply.content) == plain(own.sent.content)


def refused_or_the_ledgers_own(own: Case, change: Callable[[RecordDict], object]) -> None:
    """In a private run every answer is charged anew, so it is compared with what the handler answered."""
    honest: list[dict[str, Any]] = []

    def after(reply: RecordDict) -> None:
        honest.append(plain(copied(reply)))
        change(reply)

    reply = own.send(after, charge=True)
    assert reply.has_error() or plain(reply.content) == honest[0]


def test_the_honest_replies_leave_as_they_are(cases: dict[str, Case]) -> None:
    for own in cases.values():
        assert plain(own.sent.content) == plain(own.honest)


@pytest.mark.parametrize("case", ["private train", "look"])
def test_an_answer_that_nothing_was_charged_for_stays(case: str, cases: dict[str, Case]) -> None:
    """The very reply that left a moment ago does not leave again: an older reservation paid for it."""
    reply = cases[case].send(lambda records: None)
    assert reply.error.code == SiteError.UNANSWERED


@pytest.fixture
def two_runs(sites_dir: Path, tmp_path: Path) -> tuple[Node, Node]:
    """Two nodes of one site with a budget, as two runs at once have it."""
    policy: dict[str, Any] = {"private-metrics": "noise", "budget": {"epsilon": 500.0, "delta": 1e-3}}
    site = with_policy(sites_dir / "hospital-1", tmp_path / "site", **policy)
    return Node(site), Node(site)


def in_run(kind: str, run: str, node: Node) -> tuple[Message, Context]:
    changes = LOOK | {"run-dir": f"runs/{run}"}
    return node.message(kind, node.request(kind, changes)), node.context(changes)


@pytest.mark.parametrize("when", shortened(["while it trains", "after its last row"], ["while it trains"]))
@pytest.mark.parametrize("other", ["train", "evaluate.bags", "query.proportions"])
@pytest.mark.parametrize("kind", ["train", "evaluate.bags"])
def test_what_another_run_is_charged_meanwhile_changes_nothing(
    kind: str, other: str, when: str, two_runs: tuple[Node, Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two private runs at one site: each reply is held against its own reservation and its own row."""
    first, second = two_runs
    answered: list[Message] = []

    def another() -> None:
        answered.append(app(*in_run(other, "B", second)))

    if when == "while it trains":
        monkeypatch.setattr(Ledger, "confirm", before(Ledger.confirm, another, answered))

    def handler(message: Message, session: SiteSession) -> Message:
        reply = app.handlers[kind](message, session)
        if not answered:
            another()
        return reply

    reply = egress.guard(*in_run(kind, "A", first), handler)
    assert not answered[0].has_error(), answered[0].error
    assert not reply.has_error(), reply.error
    stated = from_records(reply.content, PrivacyStatement)
    assert stated.ledger_head in {entry.hash for entry in LedgerState.read(first.site / LEDGER_FILE).entries}


def before(right: Callable[..., Any], first: Callable[[], None], done: list[Message]) -> Callable[..., Any]:
    """A method that does something else before the first call."""
    asked: list[object] = []

    def both(*args: Any) -> Any:
        if not asked and not done:
            asked.append(args)
            first()
        return right(*args)

    return both


def test_what_another_run_was_charged_pays_for_nothing(two_runs: tuple[Node, Node]) -> None:
    first, second = two_runs
    message, context = in_run("train", "A", first)
    kept: list[RecordDict] = []

    def honest(message: Message, session: SiteSession) -> Message:
        reply = app.handlers["train"](message, session)
        kept.append(copied(reply.content))
        return reply

    assert not egress.guard(message, context, honest).has_error()

    def unpaid(message: Message, session: SiteSession) -> Message:
        assert not app(*in_run("train", "B", second)).has_error()
        return Message(kept[0], reply_to=message)

    assert egress.guard(message, context, unpaid).error.code == SiteError.UNANSWERED


def test_a_statement_from_before_the_question_does_not_leave(two_runs: tuple[Node, Node]) -> None:
    """It would leave out what the question itself cost."""
    node, _ = two_runs
    message, context = in_run("train", "A", node)
    stated: list[Any] = []

    def handler(message: Message, session: SiteSession) -> Message:
        reply = app.handlers["train"](message, session)
        stated.append(reply.content["privacy"])
        reply.content["privacy"] = stated[0]
        return reply

    assert not egress.guard(message, context, handler).has_error()
    assert egress.guard(message, context, handler).error.code == SiteError.UNANSWERED


def test_the_guard_reads_the_ledger_once_a_reply_and_from_the_newest_row_that_carries_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, config = tmp_path / LEDGER_FILE, RunConfig().with_changes(PRIVATE)
    event = PoissonGaussian(sample_rate=0.01, noise_multiplier=50.0, steps=2)
    ledger = Ledger.open(path, Opening("site-1", "v1", 50.0, 1e-5))
    body = {"event": event.model_dump(), "run_id": "r", "round": 1, "copies": 1, "generator": ""}
    for _ in range(3):
        with ledger.transaction() as db:
            for _ in range(_CARRY_EVERY):
                ledger.append(db, Kind.RESERVED, body)
    rows = ledger.state.rows
    ledger.confirm(ledger.reserve(event, "r", 2))
    statement = ledger.statement(2)
    read: list[int] = []
    right = file.parse_row
    monkeypatch.setattr(file, "parse_row", lambda *args: read.append(args[1]) or right(*args))
    charges = Charges(path, "r", rows)
    assert charges.paid_for_training(2, config)
    assert not charges.paid_for_training(1, config)
    assert charges.statement(2, statement.ledger_head) == statement
    assert len(read) == len(set(read)) <= _CARRY_EVERY + 3
    assert min(read) > 2 * _CARRY_EVERY


def test_the_rest_of_a_reply_is_the_guard_s_own(cases: dict[str, Case]) -> None:
    """Group, type and time to live follow from the question, whatever the handler set."""
    own = cases["train"]

    def handler(message: Message, session: SiteSession) -> Message:
        reply = Message(copied(own.honest), reply_to=message, ttl=17.0)
        for key, value in (("group_id", TEXT), ("message_type", "train.x"), ("reply_to_message_id", TEXT)):
            reply.metadata.__dict__[f"_{key}"] = value
        return reply

    sent = egress.guard(own.message, own.context, handler)
    kept = sent.metadata
    assert (kept.group_id, kept.message_type, kept.reply_to_message_id) == ("1", "train", "m")
    assert kept.ttl > 17
    failed = egress.guard(own.message, own.context, lambda m, c: Message(Error(4711, TEXT), reply_to=m))
    assert (failed.error.code, failed.error.reason) == (SiteError.INTERNAL, SITE_ERRORS[SiteError.INTERNAL])


leaves = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=20), st.just(TEXT)
)
values = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)


@given(st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_other_record_is_refused_or_comes_out_as_the_honest_one(
    cases: dict[str, Case], data: st.DataObject
) -> None:
    """A random value in a random place of the JSON of a random reply without privacy."""
    own = cases[data.draw(st.sampled_from(["train", "bags", "test", "release", "release per bag"]))]
    record = data.draw(st.sampled_from([n for n, r in own.honest.items() if isinstance(r, ConfigRecord)]))
    content = json.loads(str(own.honest[record]["json"]))  # type: ignore[index]
    place, key = content, data.draw(st.sampled_from([*content, "more"]))
    while isinstance(place.get(key) if isinstance(place, dict) else place[key], dict | list):
        inner = place[key]
        keys: list[Any] = [*inner, "more"] if isinstance(inner, dict) else list(range(len(inner)))
        if not keys or data.draw(st.booleans()):
            break
        place, key = inner, data.draw(st.sampled_from(keys))
    place[key] = data.draw(values)
    changed = ConfigRecord({"json": json.dumps(content)})
    reply = own.send(put(record, changed))
    assert reply.has_error() or plain(reply.content) == plain(own.sent.content)


counted = st.one_of(
    st.integers(-(2**63), 2**63 - 1),
    st.floats(),
    st.lists(st.integers(-(2**63), 2**63 - 1), max_size=12),
    st.lists(st.floats(), max_size=12),
)


@given(st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_metric_leaves_under_its_name_in_its_type_and_range_or_not_at_all(
    cases: dict[str, Case], data: st.DataObject
) -> None:
    own = cases[data.draw(st.sampled_from(["train", "bags", "test"]))]
    known = list(own.honest["metrics"])
    name = data.draw(st.sampled_from(known) | st.text("abc-.019", min_size=1, max_size=20))
    reply = own.send(metric(name, data.draw(counted)))
    if not reply.has_error():
        sent, honest = reply.content["metrics"], own.sent.content["metrics"]
        assert sent.keys() == honest.keys()
        assert isinstance(sent, MetricRecord)
        for key, value in sent.items():
            assert type(value) is type(honest[key])  # type: ignore[index]
            if isinstance(value, list):
                assert len(value) == len(honest[key])  # type: ignore[index,arg-type]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (DataError("x"), SiteError.DATA),
        (ConfigError("x"), SiteError.CONFIGURATION),
        (UserError("x"), SiteError.CONFIGURATION),
        (RunError("x"), SiteError.TRAINING),
        (EgressError("x"), SiteError.EGRESS),
        (ValueError("x"), SiteError.INTERNAL),
        (OSError(28, "No space left on device"), SiteError.INTERNAL),
    ],
)
@pytest.mark.parametrize("private", [False, True])
def test_every_error_leaves_as_a_fixed_text(
    error: Exception, code: SiteError, private: bool, cases: dict[str, Case], caplog: pytest.LogCaptureFixture
) -> None:
    """In a private run, what may depend on private data looks the same, whatever it was."""
    error.args = (" ".join(CANARIES), *error.args)

    def fail(message: Message, context: Context) -> Message:
        raise error

    own = cases["private train" if private else "train"]
    with caplog.at_level(logging.DEBUG):
        reply = egress.guard(own.message, own.context, fail)
    if (private and code is not SiteError.CONFIGURATION) or (private and type(error) is UserError):
        code = SiteError.UNANSWERED
    assert reply.error.code == code
    assert reply.error.reason == SITE_ERRORS[code]
    for canary in CANARIES:
        assert canary not in str(reply.error.reason)
        assert canary not in caplog.text


def test_a_server_that_asks_for_another_folder_gets_a_fixed_refusal(sites_dir: Path) -> None:
    node = Node(sites_dir / "hospital-1")
    reply = node.ask("train", node.model(), sites_dir=str(sites_dir))
    assert reply.error.reason == SITE_ERRORS[SiteError.CONFIGURATION]


def test_a_real_site_answers_with_the_three_records_only(sites_dir: Path) -> None:
    node = Node(sites_dir / "hospital-1")
    release = from_records(node.ask("query.proportions").content, ProportionRelease)
    assert release.tree() == Hierarchy.from_csv(node.site / "hierarchy.csv")
    assert release.granularity == "total"
    assert sum(release.leaf_counts[0]) == 64
    assert not release.is_private
    model = node.model()
    reply = node.ask("train", model)
    assert set(reply.content) == {"arrays", "metrics", "update", "privacy"}
    update = from_records(reply.content, ModelUpdate)
    assert from_records(reply.content, PrivacyStatement).epsilon is None
    assert update.arrays.keys() <= model.arrays.keys()
    assert any((update.arrays[name] != model.arrays[name]).any() for name in update.arrays)


def test_a_planted_fault_at_a_site_leaves_no_trace_of_data(
    sites_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    site = tmp_path / "patient-4711"
    shutil.copytree(sites_dir / "hospital-1", site)
    manifest = site / "manifest.csv"
    manifest.write_text(manifest.read_text() + "images/patient-4711-melanoma.png,bag-x\n")
    with caplog.at_level(logging.DEBUG):
        reply = Node(site).ask("query.proportions")
    assert reply.error.code == SiteError.DATA
    captured = capfd.readouterr()
    for canary in (*CANARIES, str(tmp_path)):
        for told in (str(reply.error.reason), caplog.text, captured.out, captured.err):
            assert canary not in told
