import asyncio

import pytest

from p2pllm.config import ShaperConfig
from p2pllm.errors import PeerUnreachable, TransportError
from p2pllm.net.link import Buffer, Link, Listener, Network
from p2pllm.sim.loop import run
from p2pllm.sim.network import CONNECT_TIMEOUT_S, SimNetwork

A, B, C = "10.0.0.1", "10.0.0.2", "10.0.0.3"
LINE = ShaperConfig(delay_s=0.015)


class Recorder:
    """A link's user that writes down what it is told, and when."""

    def __init__(self) -> None:
        self.arrivals: list[tuple[float, bytes]] = []
        self.closed: list[tuple[float, str]] = []

    def link_received(self, data: Buffer) -> None:
        self.arrivals.append((now(), bytes(data)))

    def link_writable(self) -> None:
        pass

    def link_closed(self, reason: str) -> None:
        self.closed.append((now(), reason))


def now() -> float:
    return round(asyncio.get_running_loop().time(), 9)  # sums of floats, to the nanosecond


class Service:
    """A listener at B's port 31337 that records on every link."""

    def __init__(self) -> None:
        self.links: list[Link] = []
        self.users: list[Recorder] = []
        self.listener: Listener

    def on_link(self, link: Link) -> None:
        self.links.append(link)
        self.users.append(Recorder())
        link.start(self.users[-1])

    async def listen_on(self, network: Network) -> "Service":
        self.listener = await network.listen("0.0.0.0", 31337, self.on_link)
        return self


async def connected(internet: SimNetwork) -> tuple[Link, Recorder, Link, Recorder]:
    """A started link from A to B, with both recorders."""
    service = await Service().listen_on(internet.host(B))
    link, user = await internet.host(A).dial(B, 31337), Recorder()
    link.start(user)
    return link, user, service.links[0], service.users[0]


def test_a_dial_takes_one_round_trip_and_a_byte_half_of_one() -> None:
    async def scenario() -> None:
        link, user, back, back_user = await connected(SimNetwork(LINE))
        assert now() == 0.030

        link.write(b"there")
        back.write(b"back")
        await asyncio.sleep(1)

        assert back_user.arrivals == [(0.045, b"there")]
        assert user.arrivals == [(0.045, b"back")]

    run(scenario())


def test_both_ends_see_each_others_addresses() -> None:
    async def scenario() -> None:
        link, _, back, _ = await connected(SimNetwork())
        assert link.remote == back.local == (B, 31337)
        assert link.local == back.remote
        assert link.local is not None
        assert link.local[0] == A

    run(scenario())


def test_a_dial_leaves_from_the_port_asked_for_unless_that_pair_exists() -> None:
    async def scenario() -> None:
        internet = SimNetwork()
        await Service().listen_on(internet.host(B))

        first = await internet.host(A).dial(B, 31337, local_port=31337)
        second = await internet.host(A).dial(B, 31337, local_port=31337)

        assert first.local == (A, 31337)
        assert second.local is not None
        assert second.local[0] == A
        assert second.local[1] != 31337

    run(scenario())


def test_any_free_port_can_be_listened_on() -> None:
    async def scenario() -> None:
        host = SimNetwork().host(A)
        first = await host.listen("0.0.0.0", 0, lambda link: None)
        second = await host.listen("0.0.0.0", 0, lambda link: None)
        assert first.port != second.port

    run(scenario())


def test_a_port_in_use_is_refused_and_free_after_close() -> None:
    async def scenario() -> None:
        host = SimNetwork().host(A)
        listener = await host.listen("0.0.0.0", 5, lambda link: None)
        with pytest.raises(TransportError, match="port 5 is in use"):
            await host.listen("0.0.0.0", 5, lambda link: None)

        listener.close()
        await host.listen("0.0.0.0", 5, lambda link: None)

    run(scenario())


def test_a_closed_port_refuses_after_a_round_trip() -> None:
    async def scenario() -> None:
        internet = SimNetwork(LINE)
        internet.host(B)
        with pytest.raises(PeerUnreachable, match="refused"):
            await internet.host(A).dial(B, 31337)
        assert now() == 0.030

    run(scenario())


def test_a_host_that_does_not_exist_never_answers() -> None:
    async def scenario() -> None:
        with pytest.raises(PeerUnreachable, match="no answer"):
            await SimNetwork(LINE).host(A).dial("10.9.9.9", 31337)
        assert now() == CONNECT_TIMEOUT_S

    run(scenario())


def test_each_pair_may_have_its_own_line() -> None:
    async def scenario() -> None:
        internet = SimNetwork(LINE)
        internet.shape(A, B, ShaperConfig(delay_s=0.1))
        link, _, _, back_user = await connected(internet)
        assert now() == 0.2

        internet.shape(B, A, ShaperConfig(delay_s=1.0))
        link.write(b"slower")
        await asyncio.sleep(5)

        assert back_user.arrivals == [(1.2, b"slower")]

    run(scenario())


def test_a_host_reaches_itself_at_no_cost() -> None:
    async def scenario() -> None:
        internet = SimNetwork(LINE)
        await Service().listen_on(internet.host(B))
        await internet.host(B).dial(B, 31337)
        assert now() == 0.0

    run(scenario())


def test_a_partition_stalls_links_and_dials_until_it_heals() -> None:
    async def scenario() -> None:
        internet = SimNetwork(LINE)
        link, user, _, back_user = await connected(internet)
        internet.partition(A, B)
        link.write(b"held")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(5):
                await internet.host(A).dial(B, 31337)
        assert back_user.arrivals == []

        internet.heal(A, B)
        await asyncio.sleep(1)

        assert [data for _, data in back_user.arrivals] == [b"held"]
        assert user.closed == []
        await internet.host(A).dial(B, 31337)

    run(scenario())


def test_a_partition_is_between_two_hosts_only() -> None:
    async def scenario() -> None:
        internet = SimNetwork(LINE)
        await connected(internet)
        internet.partition(A, B)

        await internet.host(C).dial(B, 31337)

    run(scenario())


def test_killing_a_host_resets_its_links_after_the_delay() -> None:
    async def scenario() -> None:
        internet = SimNetwork(LINE)
        link, user, back, _ = await connected(internet)
        back.write(b"lost with its sender")

        internet.kill(B)
        await asyncio.sleep(1)

        assert user.arrivals == []
        assert user.closed == [(0.045, "reset by the peer")]
        assert not link.can_write
        with pytest.raises(PeerUnreachable, match="refused"):
            await internet.host(A).dial(B, 31337)

    run(scenario())


def test_a_host_that_vanishes_silently_is_not_told_to_anyone() -> None:
    async def scenario() -> None:
        internet = SimNetwork(LINE)
        link, user, _, _ = await connected(internet)

        internet.kill(B, is_silent=True)
        link.write(b"into the void")
        await asyncio.sleep(1000)

        assert user.closed == []
        with pytest.raises(PeerUnreachable, match="no answer"):
            await internet.host(A).dial(B, 31337)

    run(scenario())


def test_healing_a_line_does_not_wake_a_vanished_host() -> None:
    async def scenario() -> None:
        internet = SimNetwork(LINE)
        link, _, _, back_user = await connected(internet)
        internet.kill(B, is_silent=True)
        internet.partition(A, B)

        internet.heal(A, B)
        link.write(b"into the void")
        await asyncio.sleep(10)

        assert back_user.arrivals == []

    run(scenario())


def test_a_revived_host_can_serve_again() -> None:
    async def scenario() -> None:
        internet = SimNetwork(LINE)
        await connected(internet)
        internet.kill(B, is_silent=True)

        internet.revive(B)
        await Service().listen_on(internet.host(B))

        await internet.host(A).dial(B, 31337)

    run(scenario())


def test_the_same_seed_gives_the_same_history() -> None:
    async def scenario(seed: int) -> list[tuple[float, bytes]]:
        internet = SimNetwork(ShaperConfig(0.01, 1e6, jitter_s=0.02), seed=seed)
        link, _, _, back_user = await connected(internet)
        for number in range(20):
            link.write(bytes([number]))
            await asyncio.sleep(0.003)
        await asyncio.sleep(1)
        return back_user.arrivals

    assert run(scenario(1)) == run(scenario(1))
    assert run(scenario(1)) != run(scenario(2))
