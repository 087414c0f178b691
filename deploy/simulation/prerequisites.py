"""Check what a run needs before anything heavy is loaded, and hold its folder.

Each check, of extras, device and model, takes milliseconds, raises one UserError that names the remedy, and
starts nothing. A folder is held by one process at a time: the kernel holds the lock, so a killed process
leaves it to the next one and nothing stale has to be removed. The file only names its holder.
"""

import os
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import UserError, require_file, writable

if TYPE_CHECKING:
    from common.config import RunConfig

_EXTRAS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "dp": ("private training (--dp)", ("opacus", "dp_accounting", "opendp")),
    "pretrained": ("a feature with ImageNet weights", ("timm",)),
    "dicom": ("reading DICOM files", ("pydicom",)),
}
"""Optional dependencies by the name of their extra: what for, and the modules."""
_ACCELERATORS = ("nvidia[0-9]*", "kfd", "dxg")
"""Device files in /dev: NVIDIA, AMD, and either under Windows' Linux."""
_LOCK = ".lock"


def check(config: "RunConfig") -> None:
    """Check that this machine has what a run is configured for.

    Raises:
        UserError: an extra is not installed, or there is no such device.
    """
    if config.dp.epsilon:
        _require_extra("dp")
    check_coordinator(config)
    if config.train.device == "cuda":
        _require_cuda()


def check_coordinator(config: "RunConfig") -> None:
    """Check that the coordinator's machine has what its part of a run is configured for.

    Raises:
        UserError: an extra is not installed.
    """
    # With shared noise the server finds the noise too, for the size of its steps.
    if config.dp.noise == "shared":
        _require_extra("dp")
    if any(name.startswith("efficientnet-lite") for name in config.model.feature_names):
        _require_extra("pretrained")


def _require_extra(extra: str) -> None:
    """Check that the modules of an extra can be found.

    Raises:
        UserError: how to install them.
    """
    for module in _EXTRAS[extra][1]:
        if not _is_there(module):
            raise UserError(missing_extra(module))


def missing_extra(module: str | None) -> str:
    """Return how to install a module that is missing, or an empty text if it belongs to no extra."""
    root = (module or "").partition(".")[0]
    for extra, (purpose, modules) in _EXTRAS.items():
        if root in modules:
            return f"{purpose} needs {root}, which is not installed: pip install 'fedbags[{extra}]'"
    return ""


def _require_cuda() -> None:
    """Check that PyTorch has a GPU to work on.

    Where there is no device at all (Linux), this is found without loading PyTorch.

    Raises:
        UserError: there is none, or this PyTorch cannot use it.
    """
    remedy = "Leave train.device out (auto takes a GPU where there is one), or set train.device=cpu."
    # Loading PyTorch takes seconds, and where no driver has made a device file it need not be asked.
    if sys.platform.startswith("linux") and not any(
        next(Path("/dev").glob(pattern), None) for pattern in _ACCELERATORS
    ):
        raise UserError(f"train.device = 'cuda', but this machine has no CUDA device (GPU).\n{remedy}")
    import torch

    if not torch.cuda.is_available():
        raise UserError(
            f"train.device = 'cuda', but PyTorch {torch.__version__} finds no CUDA device: its build or the "
            f"GPU's driver does not fit (`nvidia-smi` shows the driver).\n{remedy}"
        )


def require_model(run: Path, table: Path | None = None) -> None:
    """Check that a folder holds a model, and that the table to write has a folder to be written into.

    Raises:
        UserError: there is no model, or no folder for the table.
    """
    if not (run / "model.json").exists() and (run / "config.toml").exists():
        raise UserError(
            f"the run has not finished, so it has no model yet: {run}\n"
            f"Go on with it: fedbags simulate --out {run} --resume"
        )
    require_file(
        run / "model.json", "the model's card", "`fedbags runs list FOLDER` shows the runs below it."
    )
    if table is not None and (table.is_dir() or not table.absolute().parent.is_dir()):
        raise UserError(f"{table} cannot be written: it is a folder, or is in none. Give --csv another file.")


def _is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):
        return False


@contextmanager
def locked(folder: Path, what: str, patience: float = 0.0) -> Iterator[None]:
    """Hold a folder while the body of a ``with`` statement runs.

    The folder is made if missing. If it stays empty, it is removed again, with those of its parents that were
    made.

    Args:
        folder: to hold.
        what: what is done in it, for the message to the second one: ``a run``.
        patience: seconds to wait for another process to let go.

    Raises:
        UserError: another process holds it, or it cannot be written.
    """
    # Loaded here, since --help needs no lock.
    from filelock import FileLock, Timeout

    path = folder / _LOCK
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    with ExitStack() as stack:
        stack.callback(_remove_empty, made)
        with writable(folder):
            folder.mkdir(parents=True, exist_ok=True)
            try:
                stack.enter_context(FileLock(path, timeout=patience, poll_interval=0.1))
            except Timeout:
                holder = path.read_text(encoding="utf-8").strip() if path.exists() else ""
                raise UserError(
                    f"{what} is at work in {folder}: {holder or 'another process'}\n"
                    "Wait for it, end it, or choose another folder with --out."
                ) from None
            # Removed while it is locked: a process that opened it meanwhile finds that it is gone.
            stack.callback(path.unlink, missing_ok=True)
            since = time.strftime("%Y-%m-%d %H:%M:%S")
            path.write_text(f"process {os.getpid()} on {socket.gethostname()}, since {since}\n")
        yield


def _remove_empty(folders: Sequence[Path]) -> None:
    """Remove nested folders, the innermost first, up to the first that is not empty."""
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()
