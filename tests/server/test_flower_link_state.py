"""What Flower's own SuperLink state says of nodes that go away, which our faults' handling relies on."""

import time
from collections.abc import Iterator
from typing import Any

import pytest
from flwr.app import Message, RecordDict
from flwr.server.superlink.linkstate import LinkStateFactory
from flwr.supercore.constant import NOOP_FEDERATION_ID, TaskType
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.superlink.federation import NoOpFederationManager
from flwr.superlink.grid.inmemory_grid import InMemoryGrid

from common.run_records import FLOWER_ERRORS
from deploy.flower.internals import become_server
from server.exchange import Phase, ask


@pytest.fixture
def grid() -> Iterator[InMemoryGrid]:
    """A run of Flower's SuperLink, without its processes."""
    grid = InMemoryGrid(LinkStateFactory(":flwr-in-memory:", NoOpFederationManager(), ObjectStoreFactory()))
    run_id = grid.state.create_run(
        None, None, "hash", {}, NOOP_FEDERATION_ID, None, "aid", TaskType.SERVER_APP
    )
    (run,) = grid.state.get_run_info(run_ids=[run_id])
    grid.set_run(run)
    become_server(run_id)
    yield grid
    become_server()


def connect(grid: InMemoryGrid, key: bytes, heartbeat: float = 30.0) -> int:
    node = grid.state.create_node("owner", "owner", key, heartbeat)
    assert grid.state.activate_node(node, heartbeat)
    return node


def failures(grid: Any, nodes: list[int]) -> list[tuple[int, int, str]]:
    replies = ask(grid, {node: RecordDict() for node in nodes}, Phase("train", 1, 2.0))
    return [(reply.node, reply.code, reply.failure) for reply in replies]


def test_a_node_without_heartbeats_is_not_listed_and_its_error_names_the_superlink(
    grid: InMemoryGrid,
) -> None:
    alive, dead = connect(grid, b"alive"), connect(grid, b"dead", heartbeat=0.01)
    time.sleep(0.1)
    assert list(grid.get_node_ids()) == [alive]
    (message_id,) = grid.push_messages([Message(RecordDict(), dead, "train", ttl=60.0, group_id="1")])
    (reply,) = grid.pull_messages([message_id])
    assert reply.has_error()
    assert reply.metadata.src_node_id == 1  # so a reply is told by the request that it answers
    assert reply.metadata.reply_to_message_id == message_id
    assert failures(grid, [dead]) == [(dead, 5, FLOWER_ERRORS[5])]
    assert grid.state.activate_node(dead, 30.0)
    assert set(grid.get_node_ids()) == {alive, dead}  # back under the same id


def test_no_message_is_sent_to_a_revoked_node(grid: InMemoryGrid) -> None:
    node = connect(grid, b"revoked")
    grid.state.delete_node("owner", node)
    assert list(grid.get_node_ids()) == []
    assert failures(grid, [node]) == [(node, 0, "the message could not be sent to the site")]
