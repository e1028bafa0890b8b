"""The servers of a run, from its flags: what is refused, and where servers started here are to be reached."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from gft_megatron.observe.console import Console
from gft_megatron.training import servers


@pytest.fixture
def two_nodes(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.setattr(servers.dist, "get_world_size", lambda: 16)


def test_servers_of_several_nodes_are_not_at_an_address_that_only_their_own_node_reaches(two_nodes, monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    with pytest.raises(ValueError, match=r"MASTER_ADDR=localhost is (127\.0\.0\.1|::1) on its own node"):
        servers._host()
    monkeypatch.setattr(servers, "own_address", lambda host, port: "10.0.0.7")
    assert servers._host() == "10.0.0.7"


def test_servers_of_one_node_are_not_to_be_reached_from_others(two_nodes, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    assert servers._host() == "127.0.0.1"


def test_a_routers_address_is_read_before_anything_is_started(monkeypatch):
    monkeypatch.setattr(servers, "_launch", lambda *_: pytest.fail("started"))
    engine = SimpleNamespace(sglang_router_url="http://router", sglang_workers_per_node=1)
    with pytest.raises(ValueError, match="'http://router' is no address"):
        servers.find_servers(SimpleNamespace(engine=engine), Console())
