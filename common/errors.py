"""Define the errors that fedbags raises on purpose and the exit status of each.

FedbagsError
├── UserError          exit 2: the user can mend it; says what, where, and what to do
│   ├── ConfigError    a key of the run or site configuration
│   └── DataError      rows of a site folder or of a source; all bad rows are listed together
├── RunError           exit 1: the run could not go on (quorum, deadline, lost site)
│   ├── IdentityError               a certificate or a signature is not what it must be
│   ├── SecureAggregationRefused    a site does not go on with a secure aggregation
│   │   └── RoundTaken              its part of this round is done: it goes on with the next
│   └── BudgetRefused               a site's privacy budget does not allow what was asked
└── EgressError        a site refused to send something (its text carries no data)
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

# A table with one systematic fault has thousands of bad rows; the first few show the pattern.
_MAX_ROWS_SHOWN = 20


class FedbagsError(Exception):
    """Serve as the base of every error that fedbags raises on purpose."""


class UserError(FedbagsError):
    """Report something that the user can mend.

    The command line prints it without a traceback and exits with 2.
    """


class ConfigError(UserError):
    """Report a configuration key that is unknown, missing or out of range."""


@dataclass(frozen=True)
class BadRow:
    """Name one row that cannot be used, with its place and the reason."""

    file: str
    row: int | None
    """1-based line of the file, the header being line 1; None when the fault has no line."""
    reason: str

    def __str__(self) -> str:
        where = self.file if self.row is None else f"{self.file}, row {self.row}"
        return f"{where}: {self.reason}"


_ELSEWHERE = "Choose a folder that you may write to, with space left, with --out."


@contextmanager
def writable(what: object, advice: str = _ELSEWHERE) -> Iterator[None]:
    """Turn a refusal of the disk into an error that says what could not be written, and what to do.

    Raises:
        UserError: what is done in the ``with`` statement raises OSError.
    """
    try:
        yield
    except OSError as error:
        lines = [f"{what} cannot be written: {error.strerror or error}", *([advice] if advice else [])]
        raise UserError("\n".join(lines)) from error


class DataError(UserError):
    """Report that one or more rows of a folder or table are unusable.

    Args:
        summary: one sentence that says what was being read and what is wrong.
        rows: every bad row found, in reading order.
        advice: what the user can do about it.
    """

    def __init__(self, summary: str, rows: Sequence[BadRow] = (), advice: str = "") -> None:
        self.summary, self.rows, self.advice = summary, tuple(rows), advice
        lines = [summary, *(f"  {row}" for row in self.rows[:_MAX_ROWS_SHOWN])]
        if len(self.rows) > _MAX_ROWS_SHOWN:
            lines.append(f"  ... and {len(self.rows) - _MAX_ROWS_SHOWN} more")
        if advice:
            lines.append(advice)
        super().__init__("\n".join(lines))


class RunError(FedbagsError):
    """Report that the run could not go on.

    The command line prints it and exits with 1.
    """


class IdentityError(RunError):
    """Report a certificate or signature that is not valid, in a text that names sites only."""


class SecureAggregationRefused(RunError):  # noqa: N818 (a refusal is an answer, not a fault)
    """Report that a site does not go on with a secure aggregation.

    The text names sites and counts, never a secret.
    """


class RoundTaken(SecureAggregationRefused):
    """Report that a site has done its part of a round already.

    It did so in another session or for another model, and does it once only.
    """


class EgressError(FedbagsError):
    """Report that a site refused to send a reply.

    The text names keys and shapes, never data.
    """


def require_file(path: Path, what: str, advice: str) -> Path:
    """Return ``path``, or raise a UserError that says which file is missing and what to do."""
    if not path.is_file():
        raise UserError(f"{what} not found: {path}\n{advice}")
    return path


class BudgetRefused(RunError):  # noqa: N818 (a refusal is an answer, not a fault)
    """Report that the site's cap does not allow an event, so that nothing was spent.

    Holds no data but the budget's figures.

    Attributes:
        site: who refuses.
        asked: epsilon that the event would add to what is spent.
        left: epsilon that the cap leaves.
        cap: the site's cap. All three at the cap's delta, replace-one of the ledger's unit (PLD).
    """

    def __init__(self, site: str, asked: float, left: float, cap: float) -> None:
        self.site, self.asked, self.left, self.cap = site, asked, left, cap
        super().__init__(
            f"site {site!r} refuses: this would add epsilon {asked:.4g}, and of its budget of {cap:g} "
            f"{left:.4g} is left"
        )
