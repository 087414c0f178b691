"""The guard lets out what the contract and the policy allow, and nothing else; errors carry no data."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict

from client import egress
from client.app import app
from client.egress import SiteError, check_reply
from client.site import PrivateMetrics, SiteConfig, SitePolicy
from common.build import build_model
from common.config import RunConfig
from common.config_tables import DPConfig
from common.errors import ConfigError, DataError, EgressError, RunError, UserError
from common.hierarchy import Hierarchy
from common.messages import (
    SITE_ERRORS,
    Metric,
    ModelUpdate,
    PrivacyStatement,
    ProportionRelease,
    from_records,
    to_records,
)
from common.model_file import all_arrays
from deploy.local_grid import become_server

SITE = SiteConfig(name="north")
WEIGHT = np.ones((2, 3), np.float32)
REQUEST = to_records(ModelUpdate(sender="server", round=1, arrays={"w": WEIGHT}))
CANARIES = ("patient-4711", "/secret/path", "melanoma")


def good_reply() -> RecordDict:
    update = ModelUpdate(sender="north", round=1, arrays={"w": WEIGHT}, metrics={"num-bags": 3, "loss": 0.5})
    return to_records(update, PrivacyStatement(site="north", round=1))


def test_what_the_contract_allows_goes_out() -> None:
    check_reply("train", REQUEST, good_reply(), SITE)


def extra_record(reply: RecordDict) -> None:
    reply["labels"] = MetricRecord({"label": 3})


def extra_metric(reply: RecordDict) -> None:
    reply["metrics"]["age"] = 61  # type: ignore[index]


def label_as_metric(reply: RecordDict) -> None:
    reply["metrics"]["melanoma"] = 1  # type: ignore[index]


def path_as_config(reply: RecordDict) -> None:
    reply["path"] = ConfigRecord({"path": "/secret/path"})


def path_in_the_statement(reply: RecordDict) -> None:
    reply["privacy"] = ConfigRecord({"json": '{"site":"north","round":1,"path":"/secret/path"}'})


def extra_key_in_a_record(reply: RecordDict) -> None:
    reply["update"]["patient"] = "patient-4711"  # type: ignore[index]


def extra_array(reply: RecordDict) -> None:
    reply["arrays"]["images"] = Array(WEIGHT)  # type: ignore[index]


def other_shape(reply: RecordDict) -> None:
    other = to_records(ModelUpdate(sender="north", round=1, arrays={"w": np.ones((2, 4), np.float32)}))
    reply["arrays"], reply["update"] = other["arrays"], other["update"]


def other_dtype(reply: RecordDict) -> None:
    reply["arrays"] = ArrayRecord({"arrays": Array(np.ones(6, np.int64))})


def other_site(reply: RecordDict) -> None:
    text = str(reply["update"]["json"])  # type: ignore[index]
    reply["update"] = ConfigRecord({"json": text.replace("north", "south")})


def no_statement(reply: RecordDict) -> None:
    del reply["privacy"]


@pytest.mark.parametrize(
    "tamper",
    [
        extra_record, extra_metric, label_as_metric, path_as_config, path_in_the_statement,
        extra_key_in_a_record, extra_array, other_shape, other_dtype, other_site, no_statement,
    ],
)  # fmt: skip
def test_anything_else_is_refused_without_its_content(tamper: Callable[[RecordDict], None]) -> None:
    reply = good_reply()
    tamper(reply)
    with pytest.raises(EgressError) as caught:
        check_reply("train", REQUEST, reply, SITE)
    assert not any(canary in str(caught.value) for canary in CANARIES if canary != "melanoma")


def test_a_metric_that_policy_withholds_is_refused() -> None:
    quiet = SITE.model_copy(update={"policy": SitePolicy(metrics=("num-bags",))})
    with pytest.raises(EgressError, match="policy"):
        check_reply("train", REQUEST, good_reply(), quiet)


LOOK = SITE.model_copy(update={"policy": SitePolicy(private_metrics=PrivateMetrics.NOISE)})
PRIVATE = DPConfig(epsilon=8.0, metrics_scale=20.0)
PAID = [{"kind": "discrete_laplace", "scale": 20.0}] * 2


def look_reply(metrics: dict[str, Metric], events: Sequence[dict[str, float | str]] = PAID) -> RecordDict:
    update = ModelUpdate(sender="north", round=1, metrics=metrics)
    return to_records(update, PrivacyStatement(site="north", round=1, epsilon=1.0, events=tuple(events)))


NOISED_SUMS: dict[str, Metric] = {"noised-bags-tv": (512, -40), "held-back-bags": 7}


def test_noised_figures_leave_a_private_run_where_the_policy_says_so() -> None:
    check_reply("evaluate.bags", REQUEST, look_reply(NOISED_SUMS), LOOK, PRIVATE)
    check_reply("evaluate.bags", REQUEST, look_reply({}), SITE, PRIVATE)


@pytest.mark.parametrize(
    ("kind", "metrics", "events", "site"),
    [
        # withheld by the policy
        ("evaluate.bags", NOISED_SUMS, PAID, SITE),
        # figures without noise, under their own names and under that of a noised one
        ("evaluate.bags", {**NOISED_SUMS, "bags-l1": (0.5, 0.6)}, PAID, LOOK),
        ("evaluate.bags", {"bags-kl": (0.5, 0.6), "held-back-bags": 7}, PAID, LOOK),
        ("evaluate.bags", {"noised-bags-tv": (0.5123, 0.25), "held-back-bags": 7}, PAID, LOOK),
        ("evaluate.bags", {"noised-bags-tv": 0.5123}, PAID, LOOK),
        ("evaluate.bags", {"loss": 0.3}, PAID, LOOK),
        # not paid for, or at another scale
        ("evaluate.bags", NOISED_SUMS, PAID[:1], LOOK),
        ("evaluate.bags", NOISED_SUMS, [{"kind": "discrete_laplace", "scale": 8.0}] * 2, LOOK),
        # in another reply than that of a look
        ("train", NOISED_SUMS, PAID, LOOK),
    ],
)
def test_anything_else_of_held_back_bags_stays_in_a_private_run(
    kind: str, metrics: dict[str, Metric], events: list[dict[str, float | str]], site: SiteConfig
) -> None:
    with pytest.raises(EgressError):
        check_reply(kind, REQUEST, look_reply(metrics, events), site, PRIVATE)


def test_a_look_in_a_private_run_states_what_is_spent() -> None:
    reply = look_reply(NOISED_SUMS)
    del reply["privacy"]
    with pytest.raises(EgressError):
        check_reply("evaluate.bags", REQUEST, reply, LOOK, PRIVATE)


def test_a_reply_of_an_unknown_kind_is_refused() -> None:
    with pytest.raises(EgressError, match="no reply is defined"):
        check_reply("query.images", REQUEST, good_reply(), SITE)


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
def test_every_error_leaves_as_a_fixed_text(
    error: Exception, code: SiteError, sites_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    error.args = (" ".join(CANARIES), *error.args)

    def fail(message: Message, context: Context) -> Message:
        raise error

    message, context = ask("train", REQUEST, sites_dir)
    with caplog.at_level(logging.DEBUG):
        reply = egress.guard(message, context, fail)
    assert reply.error.code == code
    assert reply.error.reason == SITE_ERRORS[code]
    for canary in CANARIES:
        assert canary not in str(reply.error.reason)
        assert canary not in caplog.text


def ask(kind: str, content: RecordDict, sites_dir: Path, **changes: str) -> tuple[Message, Context]:
    become_server()
    config = RunConfig().with_changes({"model.image-size": 16, "model.atoms-per-class": 2, **changes})
    message = Message(content, 7, kind)
    return message, Context(
        1, 7, {"data-path": str(sites_dir / "hospital-1")}, RecordDict(), config.to_flat()
    )


def test_a_server_that_asks_for_another_folder_gets_a_fixed_refusal(sites_dir: Path) -> None:
    message, context = ask("train", REQUEST, sites_dir, **{"sites-dir": str(sites_dir)})
    assert app(message, context).error.reason == SITE_ERRORS[SiteError.CONFIGURATION]


def test_a_real_site_answers_with_the_three_records_only(sites_dir: Path) -> None:
    message, context = ask("query.proportions", RecordDict(), sites_dir)
    release = from_records(app(message, context).content, ProportionRelease)
    tree = Hierarchy.from_csv(sites_dir / "hospital-1" / "hierarchy.csv")
    assert release.tree() == tree
    assert release.granularity == "total"
    assert sum(release.leaf_counts[0]) == 64
    assert not release.is_private

    config = RunConfig.from_flat(context.run_config)
    model = build_model(config.model, tree, 0)
    request = to_records(ModelUpdate(sender="server", round=1, arrays=all_arrays(model)))
    message, context = ask("train", request, sites_dir)
    reply = app(message, context)
    assert not reply.has_error()
    assert set(reply.content) == {"arrays", "metrics", "update", "privacy"}
    update = from_records(reply.content, ModelUpdate)
    assert any((update.arrays[name] != array).any() for name, array in all_arrays(model).items())


def test_a_planted_fault_at_a_site_leaves_no_trace_of_data(
    sites_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    import shutil

    site = tmp_path / "patient-4711"
    shutil.copytree(sites_dir / "hospital-1", site)
    manifest = site / "manifest.csv"
    manifest.write_text(manifest.read_text() + "images/patient-4711-melanoma.png,bag-x\n")
    message, context = ask("query.proportions", RecordDict(), sites_dir)
    context.node_config["data-path"] = str(site)
    with caplog.at_level(logging.DEBUG):
        reply = app(message, context)
    assert reply.error.code == SiteError.DATA
    captured = capfd.readouterr()
    for canary in (*CANARIES, str(tmp_path)):
        for text in (str(reply.error.reason), caplog.text, captured.out, captured.err):
            assert canary not in text
