"""Compare the peak memory of the server with 64 sites and with 4, for ResNet-18 updates.

    python benchmarks/server_memory.py [--json] [--sites 64]

Each figure is the peak resident size of a process of its own that runs the real ServerApp for two rounds.
The sites are a grid that makes each reply when it is read, as Flower's SuperLink does for a ServerApp.
"""

import argparse
import json
import multiprocessing
import resource
import tempfile
from collections.abc import Iterable
from pathlib import Path

from flwr.app import Message, RecordDict

from common.config import RunConfig
from common.hierarchy import Hierarchy
from common.records import ModelUpdate, PrivacyStatement, ProportionRelease
from common.wire import from_records, to_records
from deploy.simulation.local_grid import LocalGrid
from server.app import app

TREE = Hierarchy.from_rows(["kind", "leaf"], [["a", "a1"], ["a", "a2"], ["b", "b1"], ["b", "b2"]])


class Echo(LocalGrid):
    """Answer for sites that send the model back almost unchanged."""

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        self.sent = {f"m{number}": message for number, message in enumerate(messages)}
        return list(self.sent)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self.reply(self.sent.pop(message_id)) for message_id in message_ids]

    def reply(self, message: Message) -> Message:
        site = f"site-{message.metadata.dst_node_id}"
        if message.metadata.message_type == "query.proportions":
            content = to_records(
                ProportionRelease(
                    site=site, data_version="v", hierarchy=TREE.to_dict(), granularity="total",
                    leaf_counts=((4.0,) * 4,), bags=10, bag_sizes=(), mechanism="exact", event={},
                )
            )  # fmt: skip
            return Message(content, reply_to=message)
        request = from_records(message.content, ModelUpdate)
        trains = message.metadata.message_type == "train"
        arrays = {name: array + 1e-3 for name, array in request.arrays.items()} if trains else {}
        update = ModelUpdate(
            sender=site, round=request.round, arrays=arrays, metrics={"num-bags": 10} if trains else {}
        )
        records = (update, PrivacyStatement(site=site, round=request.round)) if trains else (update,)
        content: RecordDict = to_records(*records)
        return Message(content, reply_to=message)


def peak(sites: int, queue: "multiprocessing.Queue[float]") -> None:
    with tempfile.TemporaryDirectory() as folder:
        config = RunConfig().with_changes(
            {
                "run-dir": str(Path(folder) / "run"),
                "rounds": 2,
                "federation.sites": sites,
                "model.backbone": "resnet18",
                "model.image-size": 64,
            }
        )
        flat = config.to_flat()
        with Echo(sites, flat) as grid:
            app(grid, grid.server_context(flat))
    queue.put(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--sites", type=int, default=64)
    options = parser.parse_args()
    # A forked process would count the memory of this one in its peak.
    context = multiprocessing.get_context("spawn")
    megabytes = {}
    for sites in (4, options.sites):
        queue = context.Queue()
        process = context.Process(target=peak, args=(sites, queue))
        process.start()
        megabytes[sites] = queue.get()
        process.join()
    few, many = megabytes.values()
    result = {"ratio": many / few, "mib_4": few, f"mib_{options.sites}": many}
    if options.json:
        print(json.dumps(result))
    else:
        print(f"server, {options.sites} sites / 4: {result['ratio']:.2f}  ({many:.0f} MiB / {few:.0f} MiB)")


if __name__ == "__main__":
    main()
