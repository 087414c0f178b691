"""The privacy-budget report: every number on the page is the JSON's, and the JSON's is the ledger's."""

import hashlib
import json
import math
import re
import shutil
import sqlite3
import subprocess
from contextlib import suppress
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from jsonschema import Draft202012Validator
from PIL import Image
from typer.testing import CliRunner

import deploy.report.accounts
from client.ledger.ledger import Ledger, Opening
from client.ledger.state import LedgerState
from common.errors import BudgetRefused, UserError
from common.privacy.accounting import spent
from common.privacy.events import Adjacency, DiscreteLaplace, PoissonGaussian, event_from_dict, merge
from common.privacy.proportions import release_counts
from common.privacy.randomness import Generator, InsecureSeededRandomness
from common.records import PrivacyStatement
from deploy.cli.ledger import report as report_command
from deploy.report.accounts import Accountants, EpsilonQuery, Epsilons
from deploy.report.files import _find_browser, report
from deploy.report.model import Report, Worst
from deploy.report.page import _field_path, _shown
from deploy.report.prose import _judgement, _listed
from tests.reference_accounting import opacus_rdp, without_amplification

DELTA = 1e-4
HOSTILE = '<script>alert("x")</script> & co.'
COMMIT = 40 * "c"
SIGMAS = {"north": 1.6, "south": 3.2}

app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)
app.command()(report_command)


def fill(
    folder: Path, site: str, sigma: float, cap: float = 20.0, generator: Generator = Generator.AES
) -> Ledger:
    """A ledger with a release, three confirmed rounds and one that broke off."""
    folder.mkdir(parents=True)
    ledger = Ledger.open(folder / "ledger.sqlite", Opening(site, "v1", cap, DELTA))
    counts = release_counts(
        np.array([[3, 5], [4, 2]]), scale=8.0, randomness=InsecureSeededRandomness(0, site)
    )
    ledger.store_release(counts, "demo", generator=generator)
    event = PoissonGaussian(sample_rate=0.3, noise_multiplier=sigma, steps=4)
    for number in range(1, 4):
        ledger.confirm(ledger.reserve(event, "demo", number, generator=generator))
    ledger.reserve(event, "demo", 4, generator=generator)
    return ledger


def refuse(ledger: Ledger) -> None:
    """One request that the cap does not allow."""
    with suppress(BudgetRefused):
        ledger.reserve(PoissonGaussian(sample_rate=1.0, noise_multiplier=0.2, steps=99), "demo", 5)


def write_run(run: Path, ledgers: dict[str, Ledger]) -> Path:
    """What the server leaves of a finished run."""
    statements = {site: ledger.statement(3).model_dump(mode="json") for site, ledger in ledgers.items()}
    release = {"mechanism": "discrete-laplace", "granularity": "total", "bags": 75, "data_version": "v1"}
    event = {"kind": "discrete_laplace", "scale": 8.0}
    summary = {
        "rounds": 3,
        "code": {"version": "0.1.0", "commit": COMMIT},
        "per_site": {site: {"bags": 75, "release": "exact", "epsilon": None} for site in statements},
        "statements": statements,
        "releases": {site: {**release, "event": event} for site in statements},
        "left_out": [{"round": 2, "site": "south", "phase": "train", "reason": "too late"}],
    }
    (run / "summary.json").write_text(json.dumps(summary))
    events: list[dict[str, Any]] = [{"event": "update", "round": 1, "site": "north", "bags": 67}]
    for site, statement in statements.items():
        for number in (1, 2, 3):
            share = statement["epsilon"] * math.sqrt(number / 3)
            events.append({"event": "statement", "round": number, "site": site, "epsilon": share})
    (run / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events) + '{"torn')
    dp = f"epsilon = 20.0\ndelta = {DELTA}\nclip-norm = 0.5\nsteps-per-round = 4\n"
    (run / "config.toml").write_text(f'name = "demo"\nrounds = 3\n[dp]\n{dp}')
    return run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of two sites with different noise, one refusal, and a round each that broke off."""
    folder = tmp_path / "demo"
    ledgers = {site: fill(folder / "sites" / site, site, sigma) for site, sigma in SIGMAS.items()}
    refuse(ledgers["south"])
    return write_run(folder, ledgers)


class Fields(HTMLParser):
    """Every element with a data-field: path, exact value, and the text that is shown."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, str, str]] = []
        self._open: list[str | None] | None = None
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        if "data-value" in given:
            self._open = [given["data-field"], given["data-value"], ""]

    def handle_data(self, data: str) -> None:
        if self._open is not None:
            assert self._open[2] is not None
            self._open[2] += data

    def handle_endtag(self, tag: str) -> None:
        if self._open is not None:
            path, value, text = self._open
            self.found.append((path or "", value or "", text or ""))
            self._open = None


def at(data: Any, path: str) -> Any:
    """The value at a path of the JSON."""
    for key in path.split("."):
        name = key.replace("%2E", ".").replace("%25", "%")
        data = data[int(name)] if isinstance(data, list) else data[name]
    return data


def read(out: Path) -> tuple[dict[str, Any], str]:
    """The JSON, checked against its schema, and the page, whose every figure is checked against the JSON."""
    data = json.loads((out / "report.json").read_text())
    schema = json.loads((out / "report.schema.json").read_text())
    Draft202012Validator.check_schema(schema)
    Draft202012Validator(schema).validate(data)
    Report.model_validate(data)
    page = (out / "report.html").read_text()
    fields = Fields(page).found
    assert fields
    for path, value, text in fields:
        exact = at(data, path)
        if exact is None:
            assert value == "null", path
        elif isinstance(exact, float):
            assert float(value) == exact, path
            assert float(text) == pytest.approx(exact, rel=1e-3), path
        else:
            assert value == str(exact) == text, path
    return data, page


def test_every_figure_on_the_page_is_the_json_which_is_the_ledger(run: Path, tmp_path: Path) -> None:
    written = report([run], tmp_path / "out")
    data, page = read(tmp_path / "out")
    assert written["problems"] == []
    _shown = {path for path, _, _ in Fields(page).found}
    for site in SIGMAS:
        book = LedgerState.read(run / "sites" / site / "ledger.sqlite")
        figures = data["sites"][site]
        assert figures["epsilon"] == book.spent()
        assert figures["add_remove"] == book.spent(Adjacency.ADD_REMOVE)
        assert (figures["cap"], figures["delta"]) == (book.cap.epsilon, book.cap.delta)
        assert figures["left"] == book.cap.epsilon - book.spent()
        assert figures["confirmed"] < figures["epsilon"]
        assert figures["opacus_rdp"] == opacus_rdp(book.events[1:], DELTA)
        assert figures["ledger"] == {"head": book.head, "rows": len(book.entries), "intact": True}
        assert figures["training"][0]["unconfirmed_rounds"] == 1
        assert figures["releases"][0]["epsilon_alone"] == 0.25
        assert [item["rounds"] for item in figures["what_if"]] == [1, 10, 100]
        again = spent([*book.events, *[book.events[-1]] * 10], DELTA, Adjacency.REPLACE_ONE)
        assert figures["what_if"][1]["epsilon"] == again
        for key in ("epsilon", "delta", "cap", "left", "add_remove", "opacus_rdp", "without_amplification"):
            assert f"sites.{site}.{key}" in _shown
    assert data["worst"]["site"] == "north"
    assert data["worst"]["epsilon"] == max(figures["epsilon"] for figures in data["sites"].values())
    assert len(data["sites"]["south"]["refusals"]) == 1
    assert data["sites"]["north"]["delta_limit"] == 1 / 67
    assert data["left_out"][0]["reason"] == "too late"
    assert len(data["disclosures"]) == len({item["key"] for item in data["disclosures"]}) == 17
    for item in data["disclosures"]:
        assert f'<article id="{item["key"]}">' in page


def test_looks_at_held_back_bags_are_told_apart_and_counted(run: Path, tmp_path: Path) -> None:
    path = run / "sites" / "north" / "ledger.sqlite"
    ledger = Ledger.open(path, Opening("north", "v1", 20.0, DELTA))
    look = DiscreteLaplace(scale=50.0)
    ledger.confirm(ledger.reserve(look, "demo", 4, copies=3, generator=Generator.OPENDP))
    ledger.reserve(look, "demo", 4, copies=3, generator=Generator.OPENDP)
    report([path], tmp_path / "out")
    data, page = read(tmp_path / "out")
    figures, book = data["sites"]["north"], LedgerState.read(path)
    (told,) = figures["looks"]
    assert (told["figures"], told["looks"], told["unconfirmed_looks"]) == (6, 2, 1)
    assert told["epsilon_alone"] == 6 * 2 / 50
    assert len(figures["releases"]) == 1
    assert figures["epsilon"] == book.spent() == figures["spending"][-1]["epsilon"]
    # One more round like the last one has its looks too.
    again = spent([*book.events, *book.events[-7:]], DELTA, Adjacency.REPLACE_ONE)
    assert figures["what_if"][0] == {"rounds": 1, "epsilon": again, "fits": True}
    assert "3 figure(s)" in figures["rows"][-1]["what"]
    assert "Noised figures of held-back bags (north)" in page
    # From the statement alone the figures are known, and not how many looks they were.
    edit_summary(
        run, lambda summary: summary["statements"].update(north=ledger.statement(4).model_dump(mode="json"))
    )
    shutil.rmtree(run / "sites")
    report([run], tmp_path / "out")
    data, _ = read(tmp_path / "out")
    (told,) = data["sites"]["north"]["looks"]
    assert (told["figures"], told["looks"]) == (6, None)
    assert data["sites"]["south"]["looks"] == []
    assert data["problems"] == []


def test_a_ledger_alone_tells_every_row(run: Path, tmp_path: Path) -> None:
    ledger = run / "sites" / "south" / "ledger.sqlite"
    report([ledger], tmp_path / "out")
    data, _ = read(tmp_path / "out")
    book = LedgerState.read(ledger)
    figures = data["sites"]["south"]
    assert data["scope"] == "site"
    assert [row["row"] for row in figures["rows"]] == [entry.seq for entry in book.entries]
    assert "reserved, not confirmed" in {row["kind"] for row in figures["rows"]}
    assert figures["spending"][-1] == {"round": 4, "epsilon": book.spent()}
    assert figures["stated"] is None


def test_two_runs_on_the_same_data_are_one_spending(run: Path, tmp_path: Path) -> None:
    path = run / "sites" / "north" / "ledger.sqlite"
    ledger = Ledger.open(path, Opening("north", "v1", 20.0, DELTA))
    ledger.confirm(
        ledger.reserve(PoissonGaussian(sample_rate=0.3, noise_multiplier=1.6, steps=4), "again", 1)
    )
    report([run, path], tmp_path / "out")
    data, _ = read(tmp_path / "out")
    assert [part["run"] for part in data["sites"]["north"]["training"]] == ["demo", "again"]
    assert (
        data["sites"]["north"]["epsilon"]
        == LedgerState.read(path).spent()
        > data["sites"]["north"]["stated"]["epsilon"]
    )
    assert data["problems"] == []


def test_without_ledgers_the_statements_are_reported(run: Path, tmp_path: Path) -> None:
    shutil.rmtree(run / "sites")
    report([run], tmp_path / "out")
    data, _ = read(tmp_path / "out")
    for figures in data["sites"].values():
        assert figures["epsilon"] == pytest.approx(figures["stated"]["epsilon"])
        assert figures["ledger"] is None
        assert [point["round"] for point in figures["spending"]] == [1, 2, 3]


def edit_summary(run: Path, change: Any) -> None:
    summary = json.loads((run / "summary.json").read_text())
    change(summary)
    (run / "summary.json").write_text(json.dumps(summary))


def test_one_site_without_noise_takes_the_guarantee_from_all(run: Path, tmp_path: Path) -> None:
    shutil.rmtree(run / "sites" / "north")
    edit_summary(run, lambda summary: summary["statements"]["north"].update(epsilon=None, events=[]))
    report([run], tmp_path / "out")
    data, page = read(tmp_path / "out")
    assert data["status"] == "not-private"
    assert data["worst"] is None
    assert data["headline"].startswith("No privacy guarantee: north")
    assert '<section class="banner bad">' in page
    assert data["sites"]["south"]["epsilon"] is not None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"epsilon": 0.5}, "says epsilon 0.5"),
        ({"ledger_head": "0" * 64}, "no row"),
        ({"events": [{"kind": "discrete_laplace", "scale": 8.0}], "epsilon": 0.25}, "other events"),
    ],
)
def test_a_statement_that_disagrees_is_a_problem(
    run: Path, tmp_path: Path, change: dict[str, Any], reason: str
) -> None:
    edit_summary(run, lambda summary: summary["statements"]["north"].update(change))
    result = CliRunner().invoke(app, [str(run), "--out", str(tmp_path / "out"), "--json"])
    assert result.exit_code == 1, result.output
    assert any(reason in problem["reason"] for problem in json.loads(result.output)["problems"])
    data, page = read(tmp_path / "out")
    assert {problem["site"] for problem in data["problems"]} == {"north"}
    assert "The records do not hold up" in page


def test_a_statement_of_thousands_of_events_does_not_keep_the_report(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A site's own word takes a bounded time, and no figure stands for what was not computed."""
    real = deploy.report.accounts.spent

    def few(events: Any, *rest: Any) -> float:
        assert len(merge(events)) <= 100
        return real(events, *rest)

    monkeypatch.setattr(deploy.report.accounts, "spent", few)
    many = [
        {"kind": "poisson_gaussian", "sample_rate": 0.01, "noise_multiplier": 1.0 + n * 1e-6, "steps": 1}
        for n in range(4_000)
    ]
    edit_summary(run, lambda summary: summary["statements"]["north"].update(events=many))
    report([run], tmp_path / "with-ledger")
    data, _ = read(tmp_path / "with-ledger")
    assert data["sites"]["north"]["epsilon"] is not None
    assert any("other events" in problem["reason"] for problem in data["problems"])
    shutil.rmtree(run / "sites")
    report([run], tmp_path / "out")
    data, _ = read(tmp_path / "out")
    north = data["sites"]["north"]
    assert (north["status"], north["epsilon"]) == ("unknown", None)
    assert "4000 events of different noise" in north["why"]
    assert data["worst"] is None


def test_a_tampered_ledger_is_flagged_on_top_and_gives_no_figure(run: Path, tmp_path: Path) -> None:
    path = run / "sites" / "south" / "ledger.sqlite"
    db = sqlite3.connect(path, isolation_level=None)
    db.execute("DROP TRIGGER no_update")
    db.execute("""UPDATE entries SET body = replace(body, '"steps":4', '"steps":1') WHERE seq = 3""")
    db.close()
    for sources in ([run], [path]):
        arguments = [*map(str, sources), "--out", str(tmp_path / "out"), "--json"]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 1, result.output
        data, page = read(tmp_path / "out")
        assert 3 in [problem["row"] for problem in data["problems"]]
        assert data["sites"]["south"]["epsilon"] is None
        assert data["worst"] is None
        assert page.index("The records do not hold up") < page.index("In plain words")


def test_names_are_escaped(tmp_path: Path) -> None:
    ledger = fill(tmp_path / "site", HOSTILE, 2.0)
    report([ledger.path], tmp_path / "out")
    data, page = read(tmp_path / "out")
    assert list(data["sites"]) == [HOSTILE]
    assert "<script" not in page
    assert at({"sites": {"a.b%": 1}}, _field_path("sites", "a.b%")) == 1


def test_the_page_needs_nothing_from_elsewhere_and_has_both_schemes(run: Path, tmp_path: Path) -> None:
    report([run], tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text()
    assert not re.findall(r"https?://|//[a-z]+\.|@import|url\(|src=|<script|<link", page)
    assert "@media (prefers-color-scheme: dark)" in page
    assert "@media print" in page
    assert page.count("<svg") == 4


def test_no_epsilon_stands_without_its_terms(run: Path, tmp_path: Path) -> None:
    report([run], tmp_path / "out")
    data, page = read(tmp_path / "out")
    for text in (*data["summary"], *data["cautions"]):
        if "epsilon is" in text:
            assert all(word in text for word in ("delta", "bag", "replace-one", "PLD"))
    for site in re.findall(r'<section class="site".*?</section>', page, flags=re.DOTALL):
        assert all(word in site for word in ("replace-one", "at delta", "PLD (dp-accounting)", "bag"))


@pytest.mark.parametrize(
    ("generator", "kind", "caution"),
    [
        (Generator.AES, "secure", ""),
        (Generator.SEEDED, "insecure", "INSECURE random generator at south: this was a simulation"),
        (Generator.UNKNOWN, "unknown", "The records of south do not say which generator"),
    ],
)
def test_the_generator_is_what_the_site_recorded(
    generator: Generator, kind: str, caution: str, tmp_path: Path
) -> None:
    """From a ledger, from the federation's ledgers, and from statements alone."""
    folder = tmp_path / "demo"
    ledgers = {
        "north": fill(folder / "sites" / "north", "north", 2.0),
        "south": fill(folder / "sites" / "south", "south", 2.0, generator=generator),
    }
    write_run(folder, ledgers)
    for sources in ([folder / "sites" / "south"], [folder], [folder]):
        report(sources, tmp_path / "out")
        data, page = read(tmp_path / "out")
        south = data["sites"]["south"]
        assert (south["generator"], south["generators"]) == (kind, [generator.value])
        assert [text for text in data["cautions"] if "generator" in text] == (
            [text for text in data["cautions"] if text.startswith(caution)] if caution else []
        )
        assert ("INSECURE" in page) == (generator is Generator.SEEDED)
        told = next(item["text"] for item in data["disclosures"] if item["key"] == "generator")
        assert any(generator.value in text for text in told)
        if sources == [folder]:
            assert data["sites"]["north"]["generator"] == "secure"
            shutil.rmtree(folder / "sites", ignore_errors=True)


def test_a_ledger_that_mixes_generators_is_as_good_as_the_worst(tmp_path: Path) -> None:
    ledger = fill(tmp_path / "site", "north", 2.0)
    event = PoissonGaussian(sample_rate=0.3, noise_multiplier=2.0, steps=4)
    for generator, kind in ((Generator.UNKNOWN, "unknown"), (Generator.SEEDED, "insecure")):
        ledger.reserve(event, "demo", 9, generator=generator)
        assert generator in ledger.statement(9).generator
        report([ledger.path], tmp_path / "out")
        assert read(tmp_path / "out")[0]["sites"]["north"]["generator"] == kind


def test_a_run_with_noise_of_the_server_is_refused(run: Path, tmp_path: Path) -> None:
    config, table = run / "config.toml", "\n[central-dp]\nclip-norm = 1.0\nnoise-multiplier = "
    plain = config.read_text()
    config.write_text(plain + table + "0.0\n")
    report([run], tmp_path / "out")
    config.write_text(plain + table + "2.0\n")
    with pytest.raises(UserError, match="noise added by the server is no longer offered"):
        report([run], tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_the_code_configuration_and_data_of_the_run_are_named(run: Path, tmp_path: Path) -> None:
    report([run], tmp_path / "out")
    data, page = read(tmp_path / "out")
    origin = data["provenance"]
    assert (origin["code_version"], origin["code_commit"]) == ("0.1.0", COMMIT)
    assert origin["config_sha256"] == hashlib.sha256((run / "config.toml").read_bytes()).hexdigest()
    assert COMMIT in page
    assert origin["config_sha256"] in page
    shutil.rmtree(run / "sites")
    edit_summary(run, lambda summary: summary.pop("code"))
    report([run], tmp_path / "out")
    data, page = read(tmp_path / "out")
    assert data["provenance"]["code_commit"] is None
    assert 'data-field="provenance.code_commit" data-value="null">not recorded' in page
    assert data["sites"]["north"]["data_versions"] == ["v1"]


def test_cautions_and_audit(run: Path, tmp_path: Path) -> None:
    (run / "audit.json").write_text(json.dumps({"lower_bound": 1.5, "confidence": 0.95, "canaries": 30}))
    edit_summary(run, lambda summary: summary["releases"]["south"].update(bags=10**4))
    report([run], tmp_path / "out")
    data, _ = read(tmp_path / "out")
    assert data["audit"] == {"lower_bound": 1.5, "confidence": 0.95, "details": {"canaries": "30"}}
    assert any("south: delta" in text for text in data["cautions"])
    (run / "audit.json").write_text(json.dumps({"lower_bound": 99.0, "confidence": 0.95}))
    assert "the audit shows" in report([run], tmp_path / "out")["problems"][0]["reason"]


def test_mistakes_are_told_as_such_and_leave_nothing(run: Path, tmp_path: Path) -> None:
    empty, broken = tmp_path / "empty", tmp_path / "broken"
    empty.mkdir()
    (empty / "config.toml").write_text('name = "x"\n')
    shutil.copytree(run, broken)
    edit_summary(broken, lambda summary: summary["statements"]["north"].update(new="field"))
    other = tmp_path / "other.sqlite"
    shutil.copy(run / "sites" / "north" / "ledger.sqlite", other)
    db = sqlite3.connect(other)
    db.execute("PRAGMA user_version = 7")
    db.close()
    notes = tmp_path / "notes.txt"
    notes.write_text("no ledger")
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    for sources, word in (
        ([tmp_path / "none"], "neither a run folder nor a ledger"),
        ([empty], "no finished round"),
        ([broken], "not of a form"),
        ([other], "schema 7"),
        ([notes], "ledger"),
        ([run, copy], "two of the runs"),
    ):
        with pytest.raises(UserError, match=word):
            report(sources, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        report([run], tmp_path / "file" / "out")


def test_an_unfinished_run_is_reported_from_its_checkpoint(run: Path, tmp_path: Path) -> None:
    from server import run_folder

    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").unlink()
    state = run_folder.ServerState(round=2)
    statements = {
        site: Ledger.open(run / "sites" / site / "ledger.sqlite", Opening(site, "v1", 20.0, DELTA))
        for site in SIGMAS
    }
    state.statements = {site: ledger.statement(2) for site, ledger in statements.items()}
    run_folder.save_checkpoint(run / "checkpoints", state, {"w": np.zeros(1, np.float32)}, {}, {})
    report([run], tmp_path / "out")
    data, _ = read(tmp_path / "out")
    assert (data["finished"], data["rounds"]) == (False, 2)
    assert any("has not finished" in text for text in data["cautions"])
    assert set(data["sites"]) == set(summary["statements"])


@pytest.mark.usefixtures("fine_grid")
def test_figures_are_the_same_from_workers_and_without() -> None:
    questions = []
    for number in range(3):
        event = PoissonGaussian(sample_rate=0.1, noise_multiplier=2.0 + number, steps=20)
        questions.append(EpsilonQuery((event,), (event,), DELTA, (event,), (10,), (), (1e-6,)))
    done: list[str] = []
    with Accountants(expected=50) as workers, Accountants(expected=1) as alone:
        many = workers.answer_all(questions, meanwhile=lambda: done.append("many"))
        assert alone.answer_all(questions, meanwhile=lambda: done.append("one")) == many
    assert done == ["many", "one"]


def ask(*events: PoissonGaussian | DiscreteLaplace) -> Epsilons:
    question = EpsilonQuery(merge(events), merge(events), DELTA, (), (), (), ())
    with Accountants(expected=1) as accountants:
        return accountants.answer_all([question], meanwhile=lambda: None)[question]


@pytest.mark.usefixtures("fine_grid")
@pytest.mark.parametrize("sigma", [0.6, 2.0, 40.0])
def test_second_figures_agree_with_the_accountants(sigma: float) -> None:
    steps = PoissonGaussian(sample_rate=0.1, noise_multiplier=sigma, steps=80)
    release = DiscreteLaplace(scale=8.0)
    alone, together = ask(steps), ask(release, steps)
    assert alone.opacus_rdp == together.opacus_rdp == opacus_rdp([steps], DELTA)
    reference = without_amplification([steps], DELTA, Adjacency.REPLACE_ONE)
    assert alone.without_amplification == pytest.approx(reference, rel=1e-3)
    assert together.without_amplification == alone.without_amplification + 0.25


def test_long_lists_are_counted() -> None:
    assert _listed(["a"]) == "a"
    assert _listed(["a", "b", "c"]) == "a, b and c"
    assert _listed(list("abcdefgh")) == "a, b, c, d, e, f and 2 more"


def screenshot(browser: str, page: Path, picture: Path, width: int) -> np.ndarray[Any, Any]:
    """The page at a width; a frame, for no window is as narrow as a phone."""
    frame = picture.with_suffix(".html")
    style = f"width:{width}px;height:1600px;border:0"
    frame.write_text(
        f'<body style="margin:0"><iframe src="{page.resolve().as_uri()}" style="{style}"></iframe>'
    )
    command = [
        browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        "--hide-scrollbars", f"--user-data-dir={picture.with_suffix('')}",
        f"--window-size={max(width, 500)},1600", f"--screenshot={picture}", frame.as_uri(),
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    return np.asarray(Image.open(picture).convert("L"))[:, :width]


@pytest.fixture
def browser() -> str:
    found = _find_browser()
    if found is None:
        pytest.skip("no Chromium on the PATH")
    return found


def test_the_page_is_drawn_on_a_desktop_a_phone_and_paper(browser: str, run: Path, tmp_path: Path) -> None:
    written = report([run], tmp_path / "out", pdf=True)
    assert Path(written["pdf"]).read_bytes().startswith(b"%PDF")
    for width in (1280, 390):
        pixels = screenshot(browser, Path(written["html"]), tmp_path / f"{width}.png", width)
        assert pixels.shape[1] == width
        assert len(np.unique(pixels)) > 50
        # The outer margin is empty: nothing runs over the edge.
        assert len(np.unique(pixels[200:, -6:])) <= 2


def test_a_pdf_without_a_browser_is_a_mistake(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="needs Chromium"):
        report([run], tmp_path / "out", pdf=True)


def test_events_in_the_json_are_enough_to_recompute(run: Path, tmp_path: Path) -> None:
    """Somebody with another accountant needs only the training and release rows of the report."""
    report([run], tmp_path / "out")
    data, _ = read(tmp_path / "out")
    for figures in data["sites"].values():
        events = [
            *({"kind": "discrete_laplace", "scale": part["scale"]} for part in figures["releases"]),
            *(
                {"kind": "discrete_laplace", "scale": part["scale"]}
                for part in figures["looks"]
                for _ in range(part["figures"])
            ),
            *(
                {
                    "kind": "poisson_gaussian",
                    **{k: part[k] for k in ("sample_rate", "noise_multiplier", "steps")},
                }
                for part in figures["training"]
            ),
        ]
        assert figures["epsilon"] == spent(map(event_from_dict, events), DELTA, Adjacency.REPLACE_ONE)


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("left", 1.934e-7, "< 0.001"),
        ("epsilon", 0.00099, "< 0.001"),
        ("epsilon", 0.001, "0.001"),
        ("epsilon", 7.99999981, "8"),
        ("left", 0.0, "0"),
        ("cap", 12.5, "12.5"),
        ("delta", 1e-6, "0.000001"),
        ("delta_limit", 0.0001234, "0.0001234"),
        ("sample_rate", 0.0005, "0.0005"),
    ],
)
def test_nobody_reads_an_epsilon_beyond_its_thousandths(name: str, value: float, text: str) -> None:
    assert _shown(value, name) == text


@pytest.mark.parametrize(
    ("epsilon", "says"),
    [
        (0.0005, "this is strong"),
        (1.0, "this is strong"),
        (2.0, "stays in doubt"),
        (4.0, "does not hold off an attacker"),
        (8.0, "does not hold off an attacker"),
        (12.0, "this is weak"),
    ],
)
def test_the_judgement_and_the_bet_follow_from_one_scale(epsilon: float, says: str) -> None:
    """A bet that is right 99.97 % of the time and a "reasonable guarantee" stood side by side."""
    guess = 1 / (1 + math.exp(-epsilon))
    worst = Worst(
        site="north", epsilon=epsilon, delta=1e-4, unit="bag", adjacency="replace-one", accountant="PLD",
        cap=None, left=None, guess_right=guess,
    )  # fmt: skip
    text = _judgement(worst)
    assert says in text
    assert "reasonable" not in text
    assert ("in the middle" in text) == (1 < epsilon <= 10)
    assert ("does not hold off" in text) == (guess >= 0.95 and epsilon <= 10)


class Cells(HTMLParser):
    """Of every table: its column heads, and the label of each cell of its body."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tables: list[tuple[list[str], list[str | None], bool]] = []
        self._head = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "table":
            self.tables.append(([], [], "stack" in (given.get("class") or "").split()))
        elif tag == "td" and self.tables and "colspan" not in given:
            self.tables[-1][1].append(given.get("data-label"))
        self._head = tag == "th" and given.get("scope") != "row"

    def handle_data(self, data: str) -> None:
        if self._head and self.tables:
            self.tables[-1][0].append(data)
        self._head = False


def test_wide_tables_name_each_cell_for_a_phone(run: Path, tmp_path: Path) -> None:
    """A phone is too narrow for eight columns: the rows become blocks, a line for each cell."""
    report([run], tmp_path / "out")
    tables = Cells((tmp_path / "out/report.html").read_text()).tables
    wide = [(heads, labels) for heads, labels, stack in tables if len(heads) > 4 or stack]
    assert len(wide) > 3
    for heads, labels in wide:
        assert labels
        assert all(label in heads for label in labels)


def test_a_declared_loss_stands_with_what_had_been_stated(run: Path, tmp_path: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    summary["losses"] = [{"round": 2, "site": "north", "epsilon": 3.25, "delta": 1e-4}]
    (run / "summary.json").write_text(json.dumps(summary))
    report([run], tmp_path / "out")
    data = json.loads((tmp_path / "out/report.json").read_text())
    assert data["sites"]["north"]["declared_losses"] == [{"round": 2, "epsilon": 3.25, "delta": 1e-4}]
    assert data["sites"]["south"]["declared_losses"] == []
    page = (tmp_path / "out/report.html").read_text()
    assert "In round 2 the site declared that rows of its ledger were lost" in page
    assert 'data-value="3.25"' in page


@pytest.mark.parametrize("asked", [False, True])
@pytest.mark.parametrize(("mechanism", "told"), [("exact", "Exact counts of labels (north)"), ("none", None)])
def test_a_run_without_noise_is_not_described_as_a_private_one(
    mechanism: str, told: str | None, asked: bool, tmp_path: Path
) -> None:
    """But one that asked for privacy is never called one without, even where no site's record is left."""
    folder = tmp_path / "plain"
    folder.mkdir()
    statement = PrivacyStatement(site="north", round=3, epsilon=None, delta=None, budget_left=None)
    release = {"mechanism": mechanism, "granularity": "total", "bags": 75, "data_version": "v1", "event": {}}
    summary = {
        "rounds": 3,
        "code": {"version": "0.1.0", "commit": COMMIT},
        "per_site": {"north": {"bags": 75, "release": mechanism, "epsilon": None}},
        "statements": {"north": statement.model_dump(mode="json")},
        "releases": {"north": release},
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "metrics.jsonl").write_text("")
    (folder / "config.toml").write_text('name = "plain"\nrounds = 3\n' + "[dp]\nepsilon = 8.0\n" * asked)
    report([folder], tmp_path / "out")
    data, _ = read(tmp_path / "out")
    texts = {item["key"]: item["text"] for item in data["disclosures"]}
    assert [text for text in texts["released"] if "counts" in text.lower()] == (
        [f"{told}, which no epsilon covers."] if told else []
    )
    for key in ("trust", "mechanism", "sampling", "accountant", "delta"):
        assert texts[key][0].startswith("No noise was drawn here") is not asked
    assert texts["generator"][0].startswith("No noise was drawn") is not asked


def test_noised_counts_are_told_of_as_such(run: Path, tmp_path: Path) -> None:
    report([run], tmp_path / "out")
    data, _ = read(tmp_path / "out")
    texts = {item["key"]: item["text"] for item in data["disclosures"]}
    assert any(text.startswith("Counts of labels with noise (north and south)") for text in texts["released"])
    assert not any("Exact" in text for text in texts["released"])
    assert not any("No noise was drawn" in text for text in texts["trust"])
