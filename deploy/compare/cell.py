"""Train and score one cell of a comparison in a process of its own, and write result.json.

    python -P -m deploy.compare.cell RUN_FOLDER

The run folder holds order.json, which describes the work. In a process of its own the measured time and peak
memory belong to this cell alone, and a crash does not end the other cells. The process ends when its standard
input is closed, which happens when the process that started it is gone.
"""

import json
import os
import resource
import signal
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.config import RunConfig
from common.errors import FedbagsError
from common.files import write_json
from common.parts import discover
from deploy.compare.plan import RESULT, Order
from deploy.lazy import lazy_imports
from deploy.runs.reading import read_summary
from server.run_folder import RunFolder

if TYPE_CHECKING:
    import torch

# Loaded while a cell works, since loading torch counts as its overhead.
with lazy_imports():
    from deploy.compare import probes, scoring
    from deploy.simulation import simulate


def _work(run: Path) -> None:
    """Do what is missing in this folder: train the run or go on with it, score it, and ask its probes.

    Raises:
        FedbagsError: what the run or a probe raises.
    """
    started = time.monotonic()
    discover()
    order = Order.load(run)
    config = RunConfig.from_flat(order.config).with_changes({"resume": RunFolder(run).config.exists()})
    device = scoring.prepare(config)
    if not (run / RESULT).exists():
        # Written last and atomically: a folder with a result is taken as trained (see plan.py).
        write_json(run / RESULT, _train_and_score(run, order, config, device, started))
    if order.probes:
        model, test = scoring.read_model_and_tests(run, Path(order.test), config)
        result = json.loads((run / RESULT).read_text(encoding="utf-8"))
        result["probes"] = probes.measure(order.probes, model, test, device)
        write_json(run / RESULT, result)


def _train_and_score(
    run: Path, order: Order, config: RunConfig, device: "torch.device", started: float
) -> dict[str, Any]:
    """Return the result of a run, after training what of it is not trained yet."""
    ready = time.monotonic()
    # A cell that was stopped after its training, but before its result was written, needs scoring only.
    if not RunFolder(run).summary.exists():
        simulate.run_engine(config, "local", workers=0)
    summary = read_summary(run)
    trained = time.monotonic()
    levels = scoring.score(run, Path(order.test), config, device)
    return {
        **order.row,
        "seconds": summary.seconds,
        "levels": levels,
        "proportion_l1": summary.bags[-1].l1 if summary.bags else None,
        "rounds": summary.rounds,
        "selected_round": summary.selected_round,
        "memory_mb": round(_peak_memory() / 2**20, 1),
        "gpu_memory_mb": scoring.gpu_memory(device),
        "cpu_seconds": round(sum(os.times()[:2]), 1),
        "overhead_seconds": round(ready - started + time.monotonic() - trained, 1),
        "run": run.name,
        "commit": summary.code["commit"],
    }


def _peak_memory() -> int:
    """Return the largest amount of memory that this process has held at once, in bytes.

    On Linux the value is VmHWM, which starts with the program. ru_maxrss would also count what the parent
    process held when it started this one, if that was more.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # ru_maxrss is in bytes on macOS and in KiB elsewhere.
    return most if sys.platform == "darwin" else most * 1024


def _end_with_parent() -> None:
    """End this process as soon as its standard input is closed.

    The queue holds the other end of the pipe and never writes to it, so the pipe closes when the queue is
    gone.
    """

    def wait() -> None:
        while os.read(0, 1):
            pass
        # sys.exit would end this thread alone.
        os._exit(128 + signal.SIGHUP)

    threading.Thread(target=wait, daemon=True).start()


def main() -> None:
    """Run the order in the given run folder, and exit with status 0 when it is done and 1 when it failed."""
    _end_with_parent()
    try:
        _work(Path(sys.argv[1]))
    except FedbagsError as error:
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
