"""Provide the apps of round_trip.py, which return what they receive and time the rounds."""

import json
import time
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from common.config import RunConfig
from server.exchange import Phase, ask

ROUNDS_FILE = "rounds.json"
client_app = ClientApp()
server_app = ServerApp()


@client_app.train()
def train(message: Message, context: Context) -> Message:
    return Message(message.content, reply_to=message)


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    config = RunConfig.from_flat(context.run_config)
    while len(nodes := list(grid.get_node_ids())) < config.federation.sites:
        time.sleep(0.2)
    content = RecordDict({"arrays": ArrayRecord({"w": Array(np.zeros(1000, np.float32))})})
    seconds = []
    for number in range(1, config.rounds + 1):
        started = time.perf_counter()
        replies = list(ask(grid, dict.fromkeys(nodes, content), Phase("train", number, 120.0)))
        seconds.append(time.perf_counter() - started)
        assert all(reply.content is not None for reply in replies), replies[0].failure
    (Path(config.run_dir) / ROUNDS_FILE).write_text(json.dumps(seconds))
