"""Serve Prometheus metrics of a run or a site, computed from its state at every scrape.

Every label is a constant name, a site's name, or the name of the run folder. docs/monitoring.md lists the
metrics. They are served over plain HTTP without a password, and so on the loopback address by default.
"""

from collections.abc import Callable, Iterator, Mapping
from http.server import HTTPServer
from threading import Lock
from typing import TypeVar

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric, SummaryMetricFamily
from prometheus_client.registry import Collector

from common.errors import UserError
from common.run_records import Cause
from common.text import visible
from deploy.runs.reading import PhaseTimes, RunSource, RunState, Stage
from deploy.runs.site_state import SiteSource, SiteState

_LOOPBACK = "127.0.0.1"

_Key = TypeVar("_Key", bound=tuple[str, ...])
"""The values of a metric's labels."""


class _WatchCollector(Collector):
    """Collect the metrics of a source whenever it is scraped."""

    def __init__(self, source: RunSource | SiteSource) -> None:
        self._source = source
        self._alone = Lock()

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics as of now."""
        # Each scrape has a thread of its own, and the source has one position in its file.
        with self._alone:
            if isinstance(self._source, SiteSource):
                metrics = _site_metrics(self._source.refresh())
            else:
                # Before the name is read, because refresh() decides which run is the newest.
                state = self._source.refresh()
                metrics = _run_metrics(state, self._source.name)
        yield from metrics


def serve(
    source: RunSource | SiteSource, port: int, address: str = _LOOPBACK
) -> tuple[HTTPServer, Callable[[], None]]:
    """Serve the metrics at any path, from a thread of its own.

    Args:
        source: what to watch.
        port: TCP port; 0 takes a free one.
        address: to listen on.

    Returns:
        The server, whose ``server_port`` is the port in use, and what ends it.

    Raises:
        UserError: the port or address cannot be had.
    """
    # With auto_describe the registry would collect once at registration, before the first scrape.
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_WatchCollector(source))
    try:
        server, thread = start_http_server(port, addr=address, registry=registry)
    except OSError as error:
        raise UserError(
            f"metrics cannot be served on {address}:{port}: {error.strerror or error}\n"
            "Choose another port with --port."
        ) from error

    def close() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return server, close


def _run_metrics(state: RunState, run: str) -> Iterator[Metric]:
    """Yield the metrics of a run, at the coordinator."""
    yield _gauge("fedbags_run_info", "Which run these metrics are of; always 1.", {(run,): 1.0}, "run")
    stages = {(stage.value,): float(stage is state.stage) for stage in Stage}
    yield _gauge("fedbags_run_stage", "1 for the stage that the run is in.", stages, "stage")
    early = float(bool(state.stopped_early))
    yield GaugeMetricFamily("fedbags_run_stopped_early", "1 if used-up budgets ended the run.", early)
    yield GaugeMetricFamily("fedbags_round", "The last finished round.", state.round)
    yield GaugeMetricFamily("fedbags_rounds", "The rounds that the run will have.", state.rounds)
    yield GaugeMetricFamily(
        "fedbags_rounds_skipped", "Rounds that left the model as it was.", len(state.skipped)
    )
    yield GaugeMetricFamily(
        "fedbags_round_updates", "Updates used in the last finished round.", state.updates
    )
    counts = {
        ("in",): state.count(taking_part=True),
        ("out",): state.count(taking_part=False),
        ("missing",): state.missing,
    }
    yield _gauge(
        "fedbags_sites", "Sites that take part, that do not, and that are waited for.", counts, "state"
    )
    taking_part = {(name,): float(site.taking_part) for name, site in state.sites.items()}
    yield _gauge(
        "fedbags_site_taking_part", "1 if the last thing heard of the site was good.", taking_part, "site"
    )
    if state.loss is not None:
        yield GaugeMetricFamily("fedbags_loss", "Mean training loss that sites sent last.", state.loss)
    yield from _shared(state.phases, state.bytes_sent, state.bytes_received, state.refusals)
    stated = {name: site for name, site in state.sites.items() if site.delta is not None}
    yield from _epsilon(
        {(name, f"{site.delta:g}"): site.epsilon for name, site in stated.items()},
        {(name, f"{site.delta:g}"): site.epsilon_left for name, site in stated.items()},
    )
    yield _last(state.last, "fedbags_last_event_timestamp_seconds", "When the run wrote its last event.")


def _site_metrics(state: SiteState) -> Iterator[Metric]:
    """Yield the metrics of a site, at the site."""
    yield _gauge(
        "fedbags_site_info", "Which site these metrics are of; always 1.", {(state.site,): 1.0}, "site"
    )
    yield GaugeMetricFamily("fedbags_round", "The round of the last message.", state.round)
    yield from _shared(state.phases, state.bytes_sent, state.bytes_received, state.refusals)
    yield GaugeMetricFamily(
        "fedbags_ledger_readable",
        "0 if there is a ledger that cannot be trusted.",
        float(not state.ledger_fault),
    )
    if (spending := state.spending) is not None:
        key = (state.site, f"{spending.delta:g}")
        yield from _epsilon({key: spending.epsilon}, {key: spending.left})
        text = "Reserved rounds that were never finished; they count as spent."
        yield GaugeMetricFamily("fedbags_unconfirmed_reservations", text, spending.unconfirmed)
    yield _last(
        state.last, "fedbags_last_message_timestamp_seconds", "When the site answered its last message."
    )


def _shared(
    phases: Mapping[str, PhaseTimes], sent: int, received: int, refusals: Mapping[Cause, int]
) -> Iterator[Metric]:
    seconds = SummaryMetricFamily("fedbags_phase_seconds", "Seconds that a phase took.", labels=["phase"])
    for name, phase in sorted(phases.items()):
        seconds.add_metric([name], phase.count, phase.seconds)
    yield seconds
    by_direction = {("sent",): sent, ("received",): received}
    yield _counter("fedbags_bytes", "Content of messages, bytes.", by_direction, "direction")
    # Every cause is exported from the start: Prometheus sees no increase in a series that begins at 1.
    by_cause = {(cause.value,): refusals.get(cause, 0) for cause in Cause}
    yield _counter("fedbags_refusals", "What was not sent or not used, by reason.", by_cause, "reason")


def _epsilon(
    spent: Mapping[tuple[str, str], float | None], left: Mapping[tuple[str, str], float | None]
) -> Iterator[Metric]:
    yield _gauge("fedbags_epsilon_spent", "Privacy budget spent (replace-one).", spent, "site", "delta")
    yield _gauge("fedbags_epsilon_left", "What the site's cap leaves.", left, "site", "delta")


def _last(time: float, name: str, text: str) -> Metric:
    return _gauge(name, text, {(): time} if time else {})


def _gauge(name: str, text: str, values: Mapping[_Key, float | None], *labels: str) -> Metric:
    metric = GaugeMetricFamily(name, text, labels=labels)
    return _filled(metric, values)


def _counter(name: str, text: str, values: Mapping[_Key, float], *labels: str) -> Metric:
    return _filled(CounterMetricFamily(name, text, labels=labels), values)


def _filled(metric: GaugeMetricFamily | CounterMetricFamily, values: Mapping[_Key, float | None]) -> Metric:
    for key, value in values.items():
        if value is not None:
            # A site chooses its own name, which must not carry control characters into the metrics.
            metric.add_metric([visible(label) for label in key], value)
    return metric
