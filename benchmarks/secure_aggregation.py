"""Compare a round of secure aggregation with a plain round, without training.

    python benchmarks/secure_aggregation.py [--json] [--sites 5] [--repeats 3]

The model has 11 M parameters and there are 5 sites. Both sides are the real ones. server.rounds asks, the
ClientApp with its guard answers, LocalGrid serialises every message both ways, all in this process. Only
local training is left out. In its place each site adds a fixed step to every trained parameter. A round is
everything from the trainable arrays of the current model to the next model, that is requests, replies,
checks, sum and server optimiser, and for secure aggregation all five waves, signatures, secret sharing,
quantisation and masks. Enrolment, model building and checkpoints are outside.

``ratio`` is processor time, secure / plain, the median of pairs of rounds that are measured in turn (a shared
machine then slows both); ``wire_ratio`` the bytes of all masked replies to ``train.masked`` over the raw
float32 bytes of the arrays; ``all_bytes_ratio`` all that the sites send in a round over the same.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from flwr.app import Message

import client.app
from client.training import TrainingResult
from common.config import RunConfig, Scalar
from common.model.model_file import trainable_arrays
from common.wire import size
from deploy.datasets.build import write_synthetic_sites
from deploy.datasets.options import SyntheticHospitals
from deploy.simulation.local_grid import LocalGrid
from deploy.simulation.simulate import make_ephemeral_pki
from server.app import _begin
from server.rounds import Rounds
from server.run_folder import RunFolder

STEP = 1e-3
PIXELS = 32


class CountingGrid(LocalGrid):
    """Count the bytes of the replies of a LocalGrid by message type."""

    def __init__(self, sites: int, flat: dict[str, Scalar]) -> None:
        super().__init__(sites, flat)
        self.bytes: Counter[str] = Counter()

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies after counting them, where a reply's type is that of its request."""
        replies = list(super().pull_messages(message_ids))
        for reply in replies:
            assert not reply.has_error(), reply.error.reason
            self.bytes[reply.metadata.message_type] += size(reply.content)
        return replies


def no_training(model, store, config, round, seeds):  # type: ignore[no-untyped-def]
    """Add a fixed step to every parameter, in place of local training."""
    for parameter in model.parameters():
        parameter.data.add_(STEP)
    training, _ = store.split(config.train.held_back, config.seed)
    return TrainingResult(1.0, 1, len(training), 8 * len(training))


def prepare(folder: Path, sites: int, secure: bool) -> tuple[Rounds, CountingGrid]:
    """Return a server before its first round, with its sites enrolled, and its grid."""
    config = RunConfig().with_changes(
        {
            "run-dir": str(folder / ("secure" if secure else "plain")),
            "sites-dir": str(folder / "sites"),
            "federation.sites": sites,
            "rounds": 100,
            "model.backbone": "resnet18",
            "model.image-size": PIXELS,
            "secure-aggregation.enabled": secure,
        }
    )
    run = RunFolder(Path(config.run_dir))
    run.open(config)
    if secure:
        make_ephemeral_pki(config)
    grid = CountingGrid(sites, config.to_flat())
    return _begin(grid, config, run), grid


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--sites", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    # The measured time is that of the exchange alone.
    client.app.train_round = no_training
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_synthetic_sites(
            folder / "sites",
            SyntheticHospitals(
                sites=options.sites,
                seed=0,
                images_per_site=16,
                image_size=PIXELS,
                session_size=8,
                test_images_per_site=4,
            ),
        )
        sides = {secure: prepare(folder, options.sites, secure) for secure in (False, True)}
        arrays = trainable_arrays(sides[False][0].model)
        raw = options.sites * sum(array.nbytes for array in arrays.values())
        seconds: dict[bool, list[float]] = {False: [], True: []}
        walls: dict[bool, list[float]] = {False: [], True: []}
        for number in range(1, options.repeats + 2):  # the first pair warms up
            for secure, (rounds, grid) in sides.items():
                grid.bytes.clear()
                cpu, wall = time.process_time(), time.perf_counter()
                rounds._train(number)
                seconds[secure].append(time.process_time() - cpu)
                walls[secure].append(time.perf_counter() - wall)
        pairs = zip(seconds[True][1:], seconds[False][1:], strict=True)
        sent = sides[True][1].bytes
        result = {
            "ratio": statistics.median(secure / plain for secure, plain in pairs),
            "plain_cpu_seconds": statistics.median(seconds[False][1:]),
            "secure_cpu_seconds": statistics.median(seconds[True][1:]),
            "plain_wall_seconds": statistics.median(walls[False][1:]),
            "secure_wall_seconds": statistics.median(walls[True][1:]),
            "wire_ratio": sent["train.masked"] / raw,
            "all_bytes_ratio": sum(sent.values()) / raw,
            "parameters": raw / 4 / options.sites,
        }
    if options.json:
        print(json.dumps(result))
    else:
        for key, value in result.items():
            print(f"{key:22s} {value:14.4f}")


if __name__ == "__main__":
    main()
