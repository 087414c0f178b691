"""Keep a site's journal of every message that it handled, in figures, one JSON line each.

It is meant for the site alone: ``fedbags status`` and ``fedbags metrics`` at the site read it, and nothing of
it is sent. Written from one place, the outermost Flower mod, after the guard has decided; a line holds
numbers and words of ours, so no path, patient id or label can be in it. Knows nothing of what a message
means.
"""

import json
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flwr.app import Context, Message

from client.door import QUESTIONS, Answer
from client.ledger.file import LEDGER_FILE, LedgerError
from client.site import DATA_PATH, KIT, journal_path
from common.logs import JsonLines
from common.wire import size

log = logging.getLogger("fedbags.client")

_OTHER = "other"
"""The phase of a message of a type that the site does not know."""


@dataclass(frozen=True)
class _Done:
    """Describe one message that the site handled."""

    time: float
    """When the reply was ready, seconds since 1970."""
    run: int
    round: int
    """As the server said; 0 where it said none."""
    phase: str
    """The message type."""
    seconds: float
    bytes_received: int
    bytes_sent: int
    """0 where an error went out instead."""
    code: int
    """The error code that went out (``SiteError``, or Flower's); 0 for a reply."""
    ledger_rows: int = 0
    """Rows of the site's ledger; 0 where it has none."""
    ledger_head: str = ""
    """Hash of the newest of them. A ledger that does not hold it was lost or rolled back."""


def record(message: Message, context: Context, call_next: Answer) -> Message:
    """Hand a message on, and write the outcome to the journal.

    Simulated sites keep no journal.
    """
    path = journal_path(context.node_config)
    if path is None:
        return call_next(message, context)
    started = time.monotonic()
    received = size(message.content) if message.has_content() else 0
    with _log_lines():
        reply = call_next(message, context)
        group, kind = message.metadata.group_id, message.metadata.message_type
        done = _Done(
            time=round(time.time(), 3),
            run=context.run_id,
            # The server chooses this text: nothing but a short number of it may enter the journal.
            round=int(group) if group.isdecimal() and len(group) < 10 else 0,
            phase=kind if kind in QUESTIONS else _OTHER,
            seconds=round(time.monotonic() - started, 3),
            bytes_received=received,
            bytes_sent=0 if reply.has_error() else size(reply.content),
            code=reply.error.code if reply.has_error() else 0,
            **_ledger_mark(context.node_config),
        )
        try:
            _append(path, done)
        except OSError as error:
            # The reply is worth more than the line about it, and the ledger has its own say on full disks.
            log.warning("the journal cannot be written (%(error)s)", {"error": type(error).__name__})
    return reply


def _ledger_mark(node: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ledger's length and head as its anchor holds them, for a line of the journal."""
    data, kit = node.get(DATA_PATH), node.get(KIT)
    if not data:
        return {}
    ledger = Path(str(data)) / LEDGER_FILE
    try:
        if not ledger.exists():
            return {}
        # Imported here: a site without a budget loads no accountants.
        from client.ledger.anchor import anchor_file

        anchor = anchor_file(ledger, Path(str(kit)) if kit else None).read()
    except (OSError, LedgerError) as error:
        # The guard has decided already: nothing here may change what goes out, or add to it.
        log.warning("the journal cannot name the ledger's row (%(error)s)", {"error": type(error).__name__})
        return {}
    return {} if anchor is None else {"ledger_rows": anchor.rows, "ledger_head": anchor.head}


def _append(path: Path, done: _Done) -> None:
    """Add a line to the journal.

    The journal's folder is made where it is missing, but not the one around it.
    """
    # No ``parents``: a kit or site folder that is missing must show, and not come into being empty.
    path.parent.mkdir(exist_ok=True)
    with path.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(asdict(done)) + "\n")


@contextmanager
def _log_lines() -> Iterator[None]:
    """Send our log lines to standard error as JSON while a message is handled.

    The executor's log keeps them.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    logger = logging.getLogger("fedbags")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
