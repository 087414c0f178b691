"""Train and score one cell of a comparison in a process of its own, and write result.json.

    python -P -m deploy.compare.cell RUN_FOLDER

The run folder holds order.json, which describes the work. In a process of its own the measured time and peak
memory belong to this cell alone, and a crash does not end the other cells. The process ends when its standard
input is closed, which happens when the process that started it is gone.
"""

import os
import resource
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from common.config import RunConfig, Scalar
from common.errors import FedbagsError
from common.files import write_json, write_text
from deploy.runs.reading import read_summary
from server.run_folder import RunFolder

ORDER, RESULT, LOG = "order.json", "result.json", "cell.log"


class Order(BaseModel):
    """Describe the work of one cell.

    Attributes:
        row: the cell in the table: method, bag_size, images_per_bag, seed, setting, passes (and site).
        identity: everything that its figures depend on, by name.
        config: the complete flat configuration of the run.
        test: the folder of the test images.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    row: dict[str, Scalar]
    identity: dict[str, Scalar | None]
    config: dict[str, Scalar]
    test: str

    def save(self, run: Path) -> None:
        """Write the order to the run folder, which is made if it is missing."""
        run.mkdir(parents=True, exist_ok=True)
        write_text(run / ORDER, self.model_dump_json(indent=2) + "\n")

    @classmethod
    def load(cls, run: Path) -> "Order":
        """Read the order from the run folder."""
        return cls.model_validate_json((run / ORDER).read_bytes())


def work(run: Path) -> None:
    """Train the run in this folder, or resume its training, then score it and write its result.

    Raises:
        FedbagsError: what the run raises.
    """
    started = time.monotonic()
    order = Order.load(run)
    # Imported here: other modules import Order from this one, and need neither torch nor Flower.
    import torch

    from client.data.labelled import LabelledImages
    from client.training import choose_device
    from common.model.model_file import load_model
    from deploy.compare.scoring import score
    from deploy.simulation.simulate import run_engine

    folder = RunFolder(run)
    config = RunConfig.from_flat(order.config).with_changes({"resume": folder.config.exists()})
    torch.set_num_threads(config.train.threads)
    ready = time.monotonic()
    # A cell that was stopped after its training, but before its result was written, needs scoring only.
    if not folder.summary.exists():
        run_engine(config, "local", workers=0)
    summary = read_summary(run)
    trained = time.monotonic()
    test = LabelledImages.open(Path(order.test), config.model.image_size)
    # The folder was made with test images.
    assert test is not None
    device = choose_device(config.train.device)
    # The stored model is the one selected on held-back bags, so the test images have no part in the choice.
    levels = score(load_model(run)[0], test, device)
    result: dict[str, Any] = {
        **order.row,
        "seconds": summary.seconds,
        "levels": levels,
        "proportion_l1": summary.bags[-1].l1 if summary.bags else None,
        "rounds": summary.rounds,
        "selected_round": summary.selected_round,
        "memory_mb": round(peak_memory() / 2**20, 1),
        "gpu_memory_mb": round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
        if device.type == "cuda"
        else None,
        "cpu_seconds": round(sum(os.times()[:2]), 1),
        "overhead_seconds": round(ready - started + time.monotonic() - trained, 1),
        "run": run.name,
        "commit": summary.code["commit"],
    }
    # Written last and atomically: a folder with a result is taken as done (see plan.py).
    write_json(run / RESULT, result)


def peak_memory() -> int:
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


def end_with_parent() -> None:
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
    end_with_parent()
    try:
        work(Path(sys.argv[1]))
    except FedbagsError as error:
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
