"""The ``fedbags`` command in this process, for tests that are not about the process itself.

A process of its own takes seconds to load torch.
"""

import contextlib
import io
import logging
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

from deploy.cli.main import main


def fedbags(*arguments: object, cwd: Path) -> "subprocess.CompletedProcess[str]":
    """Run a command to its end; a run must have no worker processes.

    Returns:
        The exit status and the two streams, as subprocess.run does.
    """
    words = ["fedbags", *map(str, arguments)]
    out, err = io.StringIO(), io.StringIO()
    ours, flowers = logging.getLogger("fedbags"), logging.getLogger("flwr")
    propagate, level, status = ours.propagate, flowers.level, 0
    try:
        with (
            mock.patch.dict(os.environ),
            mock.patch.object(sys, "argv", words),
            contextlib.chdir(cwd),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            main()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        ours.propagate = propagate
        flowers.setLevel(level)
    return subprocess.CompletedProcess(words, status, out.getvalue(), err.getvalue())
