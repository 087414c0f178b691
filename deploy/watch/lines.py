"""Follow a file of JSON lines that another process writes, such as a run's events or a site's journal.

Only new lines are read. A file that was replaced (a resumed run drops the events of rounds that it will do
again) is read from its start, and the caller is told so. The module does not interpret the lines.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class News:
    """Hold the lines that one call found."""

    lines: tuple[dict[str, Any], ...]
    restarted: bool
    """The file is not the one read before, or shorter: ``lines`` begin at its start."""


class JsonLinesFile:
    """Keep the position in a growing file of JSON objects, one per line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: tuple[int, int] | None = None
        self._position = 0

    def poll(self) -> News:
        """Return the complete lines that were added since the last call, or none where there is no file.

        A last line without its end is left for the next call. A line that is no JSON object (the disk was
        full in the middle of it) is left out.
        """
        try:
            stream = self.path.open("rb")
        except FileNotFoundError:
            restarted, self._file, self._position = self._file is not None, None, 0
            return News((), restarted)
        with stream:
            status = os.fstat(stream.fileno())
            file = (status.st_dev, status.st_ino)
            # A replaced file has another inode, and one that was cut in place ends before the position.
            restarted = self._file is not None and (file != self._file or status.st_size < self._position)
            if restarted:
                self._position = 0
            self._file = file
            stream.seek(self._position)
            lines = []
            for line in stream:
                if not line.endswith(b"\n"):
                    break
                self._position += len(line)
                value = _object(line)
                if value is not None:
                    lines.append(value)
        return News(tuple(lines), restarted)


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
