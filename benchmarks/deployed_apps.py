"""Provide the apps of deployed_round.py, which are a trivial app and the fedbags app with a clock.

``deployed_round`` copies this file into both bundles. The trivial app uses Flower alone. ``clocked_app`` is
the fedbags ClientApp, which also writes down how long local training itself took.
"""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

POLL = 0.05
CLOCK_FILE = "clock.jsonl"
server_app = ServerApp()
client_app = ClientApp()


@client_app.train()
def train(message: Message, context: Context) -> Message:
    """Return the content of the message as it is."""
    return Message(message.content, reply_to=message)


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    """Run rounds of one tiny record to all nodes and back, with two ways of waiting for the replies.

    The first way asks as closely as fedbags does, the second is that of Flower's own strategies.
    """
    sites, rounds = int(context.run_config["sites"]), int(context.run_config["rounds"])
    while len(nodes := list(grid.get_node_ids())) < sites:
        time.sleep(0.2)
    content = RecordDict({"arrays": ArrayRecord({"w": Array(np.zeros(100, np.float32))})})
    seconds: dict[str, list[float]] = {"prompt": [], "flower": []}
    for way, ask in (("prompt", _ask_promptly), ("flower", _ask_as_flower)):
        for number in range(rounds + 1):
            started = time.perf_counter()
            messages = [Message(content, node, "train", group_id=str(number)) for node in nodes]
            replies = ask(grid, messages)
            assert len(replies) == sites
            assert not any(reply.has_error() for reply in replies)
            seconds[way].append(time.perf_counter() - started)
    # The first round does not count: the sites fetch the app, or are at another point of their pauses.
    found = {way: values[1:] for way, values in seconds.items()}
    Path(str(context.run_config["out"])).write_text(json.dumps(found))


def _ask_as_flower(grid: Grid, messages: list[Message]) -> list[Message]:
    # Flower's own waiting asks for replies every 3 s.
    return list(grid.send_and_receive(messages, timeout=300.0))


def _ask_promptly(grid: Grid, messages: list[Message]) -> list[Message]:
    waiting, replies = set(grid.push_messages(messages)), []
    while waiting:
        found = list(grid.pull_messages(waiting))
        replies += found
        waiting -= {reply.metadata.reply_to_message_id for reply in found}
        time.sleep(POLL)
    return replies


class ClockedApp(ClientApp):
    """Run the fedbags ClientApp with a clock around local training, private or not."""

    def __call__(self, message: Message, context: Context) -> Message:
        """Return the app's reply, and add a line to the clock file in the kit's logs/."""
        # The executor forks a process per message, so the process's age is the time that its start took.
        age, started = _age(), time.perf_counter()
        # Imported here, so that loading the fedbags app is measured as well.
        from client import app

        load, training = time.perf_counter() - started, 0.0

        def timed(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                nonlocal training
                started = time.perf_counter()
                result = function(*args, **kwargs)
                training += time.perf_counter() - started
                return result

            return call

        def privately(*args: Any, **kwargs: Any) -> Any:
            # Imported at the first private round, which is when train_privately itself imports it.
            from client import private_training

            private_training.train_round_privately = timed(private_training.train_round_privately)
            return train_privately(*args, **kwargs)

        train_privately = app._train_privately
        app.train_round, app._train_privately = timed(app.train_round), privately
        reply = app.app(message, context)
        line = {
            "run": context.run_id,
            "round": int(message.metadata.group_id),
            "phase": message.metadata.message_type,
            "start": age,
            "load": load,
            "total": age + time.perf_counter() - started,
            "training": training,
        }
        with (Path(str(context.node_config["kit"])) / "logs" / CLOCK_FILE).open("a") as stream:
            stream.write(json.dumps(line) + "\n")
        return reply


clocked_app = ClockedApp()


def _age() -> float:
    """Return the seconds since this process was forked."""
    # Field 22 of proc(5) is the start of the process in clock ticks since boot. The name in field 2 may hold
    # spaces.
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
