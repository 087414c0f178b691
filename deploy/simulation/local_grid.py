"""Drive Flower's ClientApps on this machine without Flower's processes.

This is Flower's Grid over the very same ClientApp as in a deployment. Each simulated site is a node with its
own Context; a message to it is serialised, handled (in a worker process, or in this one when there are no
workers) and its reply serialised back, so that sites and server share no memory. The state of a Context is
kept from message to message, as a SuperNode does, apart from the server.
"""

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from importlib import import_module
from multiprocessing import Pipe, active_children, get_context
from multiprocessing.connection import Connection
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from common.parts import discover
from deploy.flower import internals
from deploy.simulation.interrupt import held_off

_Scalar = bool | int | float | str

_CLIENT_APP = "client.app:app"
_RUN_ID, _SERVER_NODE = 1, 1
_FIRST_SITE_NODE = 1001
_PATIENCE = 5.0
"""Seconds that one pull waits for a reply before it says that there is none yet."""
_CLIENT_APP_DIED = 8
"""Flower's code for a ClientApp whose process died."""


@dataclass(frozen=True)
class _Node:
    """Describe a simulated node with its configuration and its state."""

    node_id: int
    node_config: dict[str, _Scalar]
    run_config: dict[str, _Scalar]
    state: bytes = b""
    """What its Context held after its last message, serialised."""


class _InlineExecutor(Executor):
    """Run a task in this process when its result is asked for.

    Nothing has to be started, and finished results do not pile up.
    """

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Defer the call to the first ``result()``."""
        return _Lazy(lambda: fn(*args, **kwargs))


class _Lazy(Future[Any]):
    def __init__(self, call: Callable[[], Any]) -> None:
        super().__init__()
        self._call = call

    def result(self, timeout: float | None = None) -> Any:
        return self._call()


class LocalGrid(Grid):
    """Exchange messages with nodes that live on this machine.

    Args:
        number_of_sites: nodes; node ``i`` has ``partition-id`` i.
        run_config: Flower's flat run configuration, for every node.
        workers: processes that handle messages; 0 handles them in this process.
        client_app: ``module:attribute`` of the ClientApp.
    """

    engine = "local"

    def __init__(
        self,
        number_of_sites: int,
        run_config: dict[str, _Scalar],
        workers: int = 0,
        client_app: str = _CLIENT_APP,
    ) -> None:
        self._nodes = {
            _FIRST_SITE_NODE + number: _Node(
                _FIRST_SITE_NODE + number,
                {"partition-id": number, "num-partitions": number_of_sites},
                run_config,
            )
            for number in range(number_of_sites)
        }
        self._run = internals.empty_run(_RUN_ID)
        self._client_app = client_app
        self._workers = workers
        self._lifeline = Pipe(duplex=False)[1]
        """Closed, or gone with this process, it ends the workers."""
        self._executor = self._new_executor()
        self._waiting: deque[_Task] = deque()
        self._running: dict[str, _Task] = {}
        self._sent = 0
        internals.become_server(_RUN_ID, _SERVER_NODE)

    def __enter__(self) -> "LocalGrid":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(at_once=kind is not None)

    def close(self, *, at_once: bool = False) -> None:
        """End the workers after their present work, or with ``at_once`` in the middle of it."""
        # The executor by itself would wait until every message under way is handled, and training takes long.
        if at_once:
            for process in active_children():
                process.terminate()
        self._executor.shutdown(wait=True, cancel_futures=True)
        self._lifeline.close()

    def server_context(self, run_config: dict[str, _Scalar]) -> Context:
        """Return the Context for the ServerApp."""
        return Context(_RUN_ID, _SERVER_NODE, {}, RecordDict(), run_config)

    def set_run(self, run: internals.Run) -> None:
        """Set the run, as Flower's runtime does."""
        self._run = run

    @property
    def run(self) -> internals.Run:
        """Return the run, which has no name here unless one was set."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Create a message.

        Deprecated in Flower; kept because the interface asks for it.
        """
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Return the ids of all sites, which are there from the start."""
        return list(self._nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Queue messages, start work on the first ones at once, and return their ids."""
        ids = []
        for message in messages:
            self._sent += 1
            message_id = f"message-{self._sent}"
            internals.name_message(message, message_id)
            self._waiting.append(_Task(message_id, message, self._nodes[message.metadata.dst_node_id]))
            ids.append(message_id)
        self._start_work()
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies that are there, each of them once.

        A reply that is not there yet is waited for, up to ``_PATIENCE`` seconds.
        """
        replies = (self._result(message_id) for message_id in message_ids)
        return [reply for reply in replies if reply is not None]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Push messages, then pull their replies."""
        return self.pull_messages(self.push_messages(messages))

    def _start_work(self) -> None:
        # Running few messages ahead of the server keeps finished replies from piling up.
        while self._waiting and len(self._running) < max(1, 2 * self._workers):
            task = self._waiting.popleft()
            self._running[task.message_id] = task
            self._submit(task)

    def _submit(self, task: "_Task") -> None:
        payload = internals.encode_message(task.message)
        node = self._nodes[task.node.node_id]
        # The first call starts the workers, which must not get the terminal's Ctrl-C: the server ends them.
        with held_off():
            task.future = self._executor.submit(_handle, payload, node, self._client_app)

    def _result(self, message_id: str) -> Message | None:
        task = self._running.get(message_id) or self._start_early(message_id)
        if task is None:
            return None
        while True:
            try:
                payload, state = task.future.result(timeout=_PATIENCE)
                number = task.node.node_id
                self._nodes[number] = replace(self._nodes[number], state=state)
                reply = internals.decode_message(payload)
                break
            except TimeoutError:
                return None
            except BrokenProcessPool:
                # A dead worker takes the messages of the others along: each is tried again by itself,
                # so that only the one that kills its worker is blamed.
                self._executor.shutdown(wait=False)
                self._executor = self._new_executor()
                if task.retried:
                    fault = Error(_CLIENT_APP_DIED, "the site's worker process died")
                    reply = Message(fault, reply_to=task.message)
                    break
                task.retried = True
                self._submit(task)
        del self._running[message_id]
        self._start_work()
        return reply

    def _new_executor(self) -> Executor:
        if not self._workers:
            return _InlineExecutor()
        # Fresh interpreters: forking a process that runs torch's threads can hang. The initialiser
        # imports the ClientApp while the server is still setting up.
        watched, self._lifeline = Pipe(duplex=False)
        return ProcessPoolExecutor(
            self._workers,
            get_context("spawn"),
            initializer=_start_worker,
            initargs=(self._client_app, watched),
        )

    def _start_early(self, message_id: str) -> "_Task | None":
        """Start a message that was asked for ahead of its turn.

        Returns None when there is no such message.
        """
        for task in self._waiting:
            if task.message_id == message_id:
                self._waiting.remove(task)
                self._running[message_id] = task
                self._submit(task)
                return task
        return None


@dataclass
class _Task:
    """Hold one message on its way through a worker."""

    message_id: str
    message: Message
    node: _Node
    retried: bool = False
    future: Future[tuple[bytes, bytes]] = field(default_factory=Future)


def _handle(payload: bytes, node: _Node, client_app: str) -> tuple[bytes, bytes]:
    """Handle one serialised message as the node, and return its reply and its state afterwards.

    This runs in a worker.
    """
    message = internals.decode_message(payload)
    state = internals.decode_records(node.state)
    context = Context(_RUN_ID, node.node_id, dict(node.node_config), state, dict(node.run_config))
    reply = _load_app(client_app)(message, context)
    internals.name_message(reply, f"reply-{message.metadata.message_id}")
    return internals.encode_message(reply), internals.encode_records(context.state)


def _start_worker(client_app: str, lifeline: Connection) -> None:
    """Prepare a worker process, which ends when the other end of ``lifeline`` does."""

    def watch() -> None:
        # Also a server that was killed closes its end of the pipe. No exception would end the main thread,
        # which may be in the middle of training.
        lifeline.poll(None)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    discover()
    _load_app(client_app)


def _load_app(client_app: str) -> ClientApp:
    """Return the ClientApp named ``module:attribute``, imported once per process."""
    module, _, attribute = client_app.partition(":")
    app: ClientApp = getattr(import_module(module), attribute)
    return app
