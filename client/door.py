"""List every question that a site answers, and refuse those that it does not answer in a run.

``QUESTIONS`` is the only list of message types. The app takes handlers for these and no other, the guard
checks requests and replies against it, and the tests run over it. Knows nothing of how a question is
answered.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Flag, auto

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from client.session import SiteSession
from common.config import RunConfig
from common.errors import BudgetRefused, ConfigError
from common.records import ModelUpdate, PrivacyStatement, ProportionRelease, Record
from common.secure_aggregation.records import (
    KeyAdvert,
    MaskedUpdate,
    MaskRequest,
    SealedShares,
    SessionOffer,
    SessionPlan,
    SurvivorList,
    SurvivorSignature,
    UnmaskRequest,
    UnmaskShares,
)

Handler = Callable[[Message, SiteSession], Message]
Answer = Callable[[Message, Context], Message]
_Guard = Callable[[Message, Context, Handler], Message]
_Journal = Callable[[Message, Context, Answer], Message]


class Touches(Flag):
    """Name the part of a site's data that an answer is computed from."""

    NOTHING = 0
    BAGS = auto()
    """Images of bags, and the label counts of the bags."""
    TEST = auto()
    """Labelled test images."""


@dataclass(frozen=True)
class Question:
    """Describe one message type by the data that it touches and all records of its request and reply."""

    touches: Touches
    asks: tuple[type[Record], ...]
    answers: tuple[type[Record], ...]
    private_answers: tuple[type[Record], ...] = ()
    """In a private run, where it differs."""

    def answers_in(self, config: RunConfig) -> tuple[type[Record], ...]:
        """Return the kinds of records of a reply in this run."""
        return self.private_answers or self.answers if config.dp.epsilon else self.answers


QUESTIONS: dict[str, Question] = {
    "query.proportions": Question(Touches.BAGS, (), (ProportionRelease,)),
    "query.keys": Question(Touches.NOTHING, (SessionOffer,), (KeyAdvert,)),
    "query.shares": Question(Touches.NOTHING, (SessionPlan,), (SealedShares,)),
    "query.survivors": Question(Touches.NOTHING, (SurvivorList,), (SurvivorSignature,)),
    "query.unmask": Question(Touches.NOTHING, (UnmaskRequest,), (UnmaskShares,)),
    "train": Question(Touches.BAGS, (ModelUpdate,), (ModelUpdate, PrivacyStatement)),
    "train.masked": Question(Touches.BAGS, (ModelUpdate, MaskRequest), (MaskedUpdate, PrivacyStatement)),
    "evaluate.bags": Question(
        Touches.BAGS, (ModelUpdate,), (ModelUpdate,), private_answers=(ModelUpdate, PrivacyStatement)
    ),
    "evaluate.test": Question(Touches.TEST, (ModelUpdate,), (ModelUpdate,)),
}
"""By message type. A type that is not here cannot be answered."""


def admit(question: Question, session: SiteSession) -> None:
    """Refuse a question that this site does not answer in this run, before any data are opened.

    Raises:
        BudgetRefused: it touches data of a site with a privacy budget, and the run is not private.
        ConfigError: the run is private, and a real site has no budget.
    """
    if not question.touches:
        return
    cap = session.site.policy.budget.epsilon
    # The ledger sees private runs only. An exact update beside them would spend what no ledger counts.
    if not session.private and cap is not None:
        raise BudgetRefused(session.site.name, float("inf"), cap, cap)
    if session.private and cap is None and session.terms.strict:
        raise ConfigError(
            "this site has no privacy budget: write [policy.budget] epsilon and delta into site.toml"
        )


class SiteApp(ClientApp):
    """Run Flower's ClientApp so that every message, of whatever type, passes the journal and the guard.

    Flower's own refuses an unknown type before any mod sees it, in words of its own. Here ``answers`` takes
    the place of ``train``, ``evaluate`` and ``query``.

    Args:
        journal: outermost, so that it records what the guard decided to send.
        guard: next to the handlers, so that no reply goes around it. It opens the session that they get, and
            must let nothing pass that no handler is there for.
    """

    def __init__(self, journal: _Journal, guard: _Guard) -> None:
        # Flower's own registry of handlers stays empty: ``__call__`` below is the only way in.
        super().__init__()
        self.handlers: dict[str, Handler] = {}
        self._journal, self._guard = journal, guard

    def __call__(self, message: Message, context: Context) -> Message:
        """Answer one message."""
        return self._journal(message, context, self._guarded)

    def answers(self, kind: str) -> Callable[[Handler], Handler]:
        """Register the handler of a message type, which must be one of ``QUESTIONS``, once."""
        # A handler for a type outside the list would be one that guard and tests do not know.
        if kind not in QUESTIONS or kind in self.handlers:
            raise ValueError(f"{kind!r} is no question, or has a handler already")

        def register(handler: Handler) -> Handler:
            self.handlers[kind] = handler
            return handler

        return register

    def _guarded(self, message: Message, context: Context) -> Message:
        return self._guard(message, context, self._handle)

    def _handle(self, message: Message, session: SiteSession) -> Message:
        return self.handlers[message.metadata.message_type](message, session)
