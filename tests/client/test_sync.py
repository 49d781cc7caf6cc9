"""The blocking facade, on a swarm over real loopback sockets with threads that compute."""

import concurrent.futures
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest

import p2pllm.sync
from p2pllm.client import client as client_module
from p2pllm.client.client import ModelParts
from p2pllm.config import NetConfig, NodeConfig
from p2pllm.errors import ConfigError, PeerUnreachable
from p2pllm.identity import Identity
from p2pllm.net.tcp import TcpNetwork
from p2pllm.server.server import BlockChoice, Server
from p2pllm.sim.fake_model import FakeEdges, greedy
from p2pllm.sim.swarm import LAB_DHT, LAB_SERVER, BytesTokenizer, fake_source
from p2pllm.spans import Span

SOURCE = fake_source(4)
PROMPT = "hello"
WANTED = greedy(SOURCE.config, list(PROMPT.encode()), 8)


@asynccontextmanager
async def two_servers() -> AsyncIterator[list[Server]]:
    servers: list[Server] = []
    async with AsyncExitStack() as stack:
        for span in (Span(0, 2), Span(2, 4)):
            config = NodeConfig(
                net=NetConfig(listen_host="127.0.0.1", listen_port=0),
                dht=LAB_DHT,
                peers=servers[0].node.addresses[:1] if servers else (),
                server=LAB_SERVER,
            )
            opening = Server.open(
                config, Identity.generate(), SOURCE, BlockChoice(span), network=TcpNetwork()
            )
            servers.append(await stack.enter_async_context(opening))
        yield servers


@pytest.fixture(scope="module")
def servers() -> Iterator[list[Server]]:
    with p2pllm.sync._Portal() as portal, portal.inside(two_servers) as made:
        yield made


@pytest.fixture
def entry(servers: list[Server], monkeypatch: pytest.MonkeyPatch) -> str:
    """An address to join at; models of any name are the fake one."""
    edges = FakeEdges(SOURCE.config)
    parts = ModelParts(SOURCE.model_id, SOURCE.config, BytesTokenizer(frozenset()), edges)
    monkeypatch.setattr(client_module, "_load_parts", lambda *_: parts)
    return str(servers[0].node.addresses[0])


def num_sessions(servers: list[Server]) -> int:
    return sum(len(server.service.sessions) for server in servers)


def test_text_comes_piece_by_piece_and_the_servers_are_freed(
    entry: str, servers: list[Server]
) -> None:
    with p2pllm.sync.connect([entry]) as swarm:
        pieces = list(swarm.model().generate(PROMPT, max_new_tokens=8))
        assert "".join(pieces) == bytes(WANTED).decode("latin-1")
        assert num_sessions(servers) == 0


def test_leaving_the_loop_early_frees_the_servers(entry: str, servers: list[Server]) -> None:
    with p2pllm.sync.connect([entry]) as swarm:
        pieces = swarm.model().generate(PROMPT, max_new_tokens=8)
        next(pieces)
        assert num_sessions(servers) == 2
        pieces.close()  # type: ignore[attr-defined]  # what leaving a loop does to a generator
        assert num_sessions(servers) == 0


def test_batches_sessions_and_logits(entry: str, servers: list[Server]) -> None:
    with p2pllm.sync.connect([entry]) as swarm:
        model = swarm.model()
        results = model.generate_batch([PROMPT, "x"], max_new_tokens=8)
        assert list(results[0].token_ids) == WANTED
        with model.session(max_tokens=64) as session:
            logits = session.step(list(PROMPT.encode()))
            session.rollback(2)
            assert session.position == 2
            assert session.step(list(PROMPT.encode())[2:]).equal(logits[2:])
        assert model.forward(list(PROMPT.encode())).equal(logits)
        whole = model.hidden_states([PROMPT, "x"])
        assert [len(output) for output in whole] == [len(PROMPT), 1]
        first = model.hidden_states([PROMPT], span=Span(0, 1))
        (rest,) = model.forward_hidden(first, span=Span(1, SOURCE.config.num_blocks))
        assert rest.equal(whole[0])
        assert num_sessions(servers) == 0


def test_errors_come_out_as_they_are_and_no_thread_stays(entry: str) -> None:
    before = threading.active_count()
    with p2pllm.sync.connect([entry]) as swarm:
        with pytest.raises(ConfigError):
            list(swarm.model().generate("", max_new_tokens=8))
    with pytest.raises(KeyError), p2pllm.sync.connect([entry]):
        raise KeyError("mine")
    with pytest.raises(ConfigError), p2pllm.sync.connect([]):
        pass
    with pytest.raises(PeerUnreachable), p2pllm.sync.connect(["127.0.0.1:1"]):
        pass
    assert threading.active_count() <= before + 1  # a device thread may still be ending


def test_ctrl_c_stops_a_generation_and_frees_the_servers(
    entry: str, servers: list[Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    with p2pllm.sync.connect([entry]) as swarm:
        pieces = swarm.model().generate(PROMPT, max_new_tokens=500)
        next(pieces)
        wait = _interrupted_once(monkeypatch)
        with pytest.raises(KeyboardInterrupt):
            for _ in pieces:
                pass
        assert wait.is_set()
        assert num_sessions(servers) == 0


def _interrupted_once(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Let the next wait for the loop's thread end with Ctrl-C."""
    was_raised = threading.Event()
    result = concurrent.futures.Future.result

    def interrupted(
        self: "concurrent.futures.Future[object]", timeout: float | None = None
    ) -> object:
        if not was_raised.is_set() and threading.current_thread() is threading.main_thread():
            was_raised.set()
            raise KeyboardInterrupt
        return result(self, timeout)

    monkeypatch.setattr(concurrent.futures.Future, "result", interrupted)
    return was_raised
