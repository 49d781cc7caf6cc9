import asyncio
import socket
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import uvloop

from p2pllm.errors import PeerUnreachable, TransportError
from p2pllm.net import tcp
from p2pllm.net.link import Buffer, Link, LinkKind, Listener
from p2pllm.net.tcp import TcpNetwork

Run = Callable[[Coroutine[Any, Any, None]], None]


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Run:
    """Runs a scenario on a real loop of either kind."""

    def run_it(scenario: Coroutine[Any, Any, None]) -> None:
        factory = asyncio.new_event_loop if request.param == "asyncio" else uvloop.new_event_loop
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(scenario)

    return run_it


class Recorder:
    """A link's user that writes down what it is told and can be waited for."""

    def __init__(self) -> None:
        self.received = bytearray()
        self.reasons: list[str] = []
        self.num_writable = 0
        self._changed = asyncio.Event()

    def link_received(self, data: Buffer) -> None:
        self.received += data
        self._changed.set()

    def link_writable(self) -> None:
        self.num_writable += 1
        self._changed.set()

    def link_closed(self, reason: str) -> None:
        self.reasons.append(reason)
        self._changed.set()

    async def until(self, is_so: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not is_so():
                self._changed.clear()
                await self._changed.wait()

    async def until_received(self, num_bytes: int) -> None:
        await self.until(lambda: len(self.received) >= num_bytes)

    async def until_closed(self) -> None:
        await self.until(lambda: bool(self.reasons))


class Lab:
    """Links over loopback, each with a recorder; all are closed, and seen to be, at the end."""

    def __init__(self) -> None:
        self.network = TcpNetwork()
        self.users: dict[Link, Recorder] = {}
        self.dialled: list[Link] = []
        self.accepted: list[Link] = []
        self.listeners: list[Listener] = []
        self.started: set[Link] = set()
        self._changed = asyncio.Event()

    async def __aenter__(self) -> "Lab":
        return self

    async def __aexit__(self, *exc: object) -> None:
        for link in list(self.users):
            self.start(link)
            link.abort()
            await self.users[link].until_closed()
        for listener in self.listeners:
            listener.close()
        await asyncio.sleep(0)  # both loops close sockets at the end of the turn

    async def listen(self, host: str = "127.0.0.1", port: int = 0) -> Listener:
        listener = await self.network.listen(host, port, self._on_link)
        self.listeners.append(listener)
        return listener

    async def dial(self, port: int, host: str = "127.0.0.1", local_port: int = 0) -> Link:
        """Dial one of our listeners, and wait until it has accepted."""
        link = await self.network.dial(host, port, local_port=local_port)
        self.dialled.append(link)
        self.users[link] = Recorder()
        async with asyncio.timeout(10):
            while len(self.accepted) < len(self.dialled):
                self._changed.clear()
                await self._changed.wait()
        return link

    async def pair(self, host: str = "127.0.0.1", dial_host: str = "") -> tuple[Link, Link]:
        """A dialled link and its accepted end, not started."""
        listener = await self.listen(host)
        return await self.dial(listener.port, dial_host or host), self.accepted[-1]

    async def started_pair(self, host: str = "127.0.0.1") -> tuple[Link, Link]:
        ends = await self.pair(host)
        for link in ends:
            self.start(link)
        return ends

    def start(self, link: Link) -> None:
        if link not in self.started:
            self.started.add(link)
            link.start(self.users[link])

    def _on_link(self, link: Link) -> None:
        self.accepted.append(link)
        self.users[link] = Recorder()
        self._changed.set()


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_bytes_travel_both_ways(run: Run, host: str) -> None:
    async def scenario() -> None:
        async with Lab() as lab:
            dialled, accepted = await lab.started_pair(host)

            dialled.write(b"there")
            accepted.write(memoryview(b"back"))
            await lab.users[accepted].until_received(5)
            await lab.users[dialled].until_received(4)

            assert lab.users[accepted].received == b"there"
            assert lab.users[dialled].received == b"back"
            assert dialled.kind is LinkKind.TCP

    run(scenario())


def test_both_ends_know_their_addresses(run: Run) -> None:
    async def scenario() -> None:
        async with Lab() as lab:
            dialled, accepted = await lab.pair()

            assert dialled.remote == ("127.0.0.1", lab.listeners[0].port)
            assert dialled.remote == accepted.local
            assert dialled.local == accepted.remote

    run(scenario())


def test_an_ipv4_peer_of_a_dual_stack_listener_is_shown_as_ipv4(run: Run) -> None:
    async def scenario() -> None:
        async with Lab() as lab:
            _, accepted = await lab.pair("::", dial_host="127.0.0.1")

            assert accepted.remote is not None
            assert accepted.remote[0] == "127.0.0.1"

    run(scenario())


def test_nothing_is_delivered_before_start(run: Run) -> None:
    async def scenario() -> None:
        async with Lab() as lab:
            dialled, accepted = await lab.pair()
            lab.start(dialled)
            dialled.write(b"early")
            accepted.write(b"ping")
            await lab.users[dialled].until_received(4)  # the loop has looked at both sockets
            assert lab.users[accepted].received == b""

            lab.start(accepted)
            await lab.users[accepted].until_received(5)

            assert lab.users[accepted].received == b"early"

    run(scenario())


def test_a_link_that_ended_before_start_tells_it_at_start(run: Run) -> None:
    async def scenario() -> None:
        async with Lab() as lab:
            dialled, accepted = await lab.pair()
            lab.start(dialled)
            dialled.write(b"last words")
            dialled.close()
            await lab.users[dialled].until_closed()

            lab.start(accepted)
            await lab.users[accepted].until_closed()

            assert lab.users[accepted].received == b"last words"
            assert lab.users[accepted].reasons == ["closed by the peer"]

    run(scenario())


def test_a_reader_that_pauses_blocks_the_writer_until_it_resumes(run: Run) -> None:
    async def scenario() -> None:
        async with Lab() as lab:
            dialled, accepted = await lab.started_pair()
            await asyncio.sleep(0)
            accepted.pause_reading()
            sent = await write_until_blocked(dialled, 65_536)
            assert lab.users[dialled].num_writable == 0

            accepted.resume_reading()
            await lab.users[accepted].until_received(sent)
            await lab.users[dialled].until(lambda: lab.users[dialled].num_writable > 0)

            assert dialled.can_write
            assert len(lab.users[accepted].received) == sent

    run(scenario())


def test_at_most_one_frame_waits_in_user_space(run: Run) -> None:
    async def scenario() -> None:
        async with Lab() as lab:
            dialled, accepted = await lab.started_pair()
            await asyncio.sleep(0)
            accepted.pause_reading()

            await write_until_blocked(dialled, 16_384)

            assert isinstance(dialled, tcp.TcpLink)
            assert 0 < dialled._transport.get_write_buffer_size() <= 16_384

    run(scenario())


async def write_until_blocked(link: Link, frame_bytes: int) -> int:
    sent = 0
    while link.can_write:
        link.write(bytes(frame_bytes))
        sent += frame_bytes
        await asyncio.sleep(0)  # let the loop hand it to the kernel
    return sent


def test_close_sends_what_is_written(run: Run) -> None:
    async def scenario() -> None:
        async with Lab() as lab:
            dialled, accepted = await lab.started_pair()
            data = bytes(range(256)) * 32_768  # more than the kernel takes at once
            dialled.write(data)

            dialled.close()
            dialled.write(b"too late")
            await lab.users[accepted].until_closed()
            await lab.users[dialled].until_closed()

            assert lab.users[accepted].received == data
            assert lab.users[accepted].reasons == ["closed by the peer"]
            assert lab.users[dialled].reasons == ["closed"]
            assert not dialled.can_write

    run(scenario())


def test_abort_ends_both_sides(run: Run) -> None:
    async def scenario() -> None:
        async with Lab() as lab:
            dialled, accepted = await lab.started_pair()

            dialled.abort()
            await lab.users[dialled].until_closed()
            await lab.users[accepted].until_closed()

            assert lab.users[dialled].reasons == ["aborted"]
            assert len(lab.users[accepted].reasons) == 1

    run(scenario())


# --- dialling and listening --------------------------------------------------------------------


def test_a_closed_port_is_refused_in_words(run: Run) -> None:
    async def scenario() -> None:
        async with Lab() as lab:
            listener = await lab.listen()
            listener.close()
            await asyncio.sleep(0)  # uvloop closes at the end of the turn

            with pytest.raises(PeerUnreachable, match="connection refused"):
                await lab.network.dial("127.0.0.1", listener.port)

    run(scenario())


@pytest.mark.parametrize("host", ["nowhere.invalid", "a" * 64 + ".example"])
def test_an_unknown_host_is_named(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def no_such_name(*args: Any, **kwargs: Any) -> Any:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    async def scenario() -> None:
        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", no_such_name)
        with pytest.raises(PeerUnreachable, match=rf"no such host: '{host}'"):
            await TcpNetwork().dial(host, 1)

    asyncio.run(scenario())


def test_what_cannot_be_a_host_is_named(run: Run) -> None:
    async def scenario() -> None:
        with pytest.raises(PeerUnreachable, match="no such host"):
            await TcpNetwork().dial("nul\0", 1)

    run(scenario())


def test_a_port_in_use_is_named_with_what_to_do(run: Run) -> None:
    async def scenario() -> None:
        async with Lab() as lab:
            first = await lab.listen()

            with pytest.raises(TransportError, match=rf"port {first.port} is in use.*another port"):
                await lab.listen(port=first.port)

    run(scenario())


def test_a_port_can_be_listened_on_again_after_its_links_are_gone(run: Run) -> None:
    async def scenario() -> None:
        async with Lab() as lab:
            dialled, accepted = await lab.started_pair()
            port = lab.listeners[0].port
            accepted.close()  # our side keeps the port in TIME_WAIT
            await lab.users[dialled].until_closed()
            await lab.users[accepted].until_closed()
            lab.listeners[0].close()
            await asyncio.sleep(0)

            again = await lab.listen(port=port)

            assert again.port == port

    run(scenario())


def test_an_address_of_another_computer_cannot_be_listened_on(run: Run) -> None:
    async def scenario() -> None:
        async with Lab() as lab:
            with pytest.raises(TransportError, match="not an address of this computer"):
                await lab.listen("203.0.113.7")

    run(scenario())


def test_dials_leave_from_the_listening_port(run: Run) -> None:
    async def scenario() -> None:
        async with Lab() as lab:
            theirs, mine = await lab.listen(), await lab.listen()

            link = await lab.dial(theirs.port, local_port=mine.port)

            assert link.local == ("127.0.0.1", mine.port)

    run(scenario())


def test_a_second_dial_from_the_same_port_to_the_same_peer_takes_any_port(run: Run) -> None:
    async def scenario() -> None:
        async with Lab() as lab:
            theirs, mine = await lab.listen(), await lab.listen()

            first = await lab.dial(theirs.port, local_port=mine.port)
            second = await lab.dial(theirs.port, local_port=mine.port)

            assert first.local == ("127.0.0.1", mine.port)
            assert second.local != first.local

    run(scenario())


def test_a_system_without_the_socket_options_still_works(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    for option in ("SO_REUSEPORT", "TCP_NOTSENT_LOWAT"):
        monkeypatch.delattr(socket, option)

    async def scenario() -> None:
        async with Lab() as lab:
            theirs, mine = await lab.listen(), await lab.listen()

            link = await lab.dial(theirs.port, local_port=mine.port)

            assert link.local is not None
            assert link.local[1] != mine.port

    run(scenario())


def test_an_option_that_is_refused_is_done_without(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "TCP_NOTSENT_LOWAT", 9999)  # ENOPROTOOPT

    async def scenario() -> None:
        async with Lab() as lab:
            dialled, accepted = await lab.started_pair()
            dialled.write(b"x")
            await lab.users[accepted].until_received(1)

    run(scenario())


def test_a_dial_that_is_cancelled_leaves_no_socket_open(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[socket.socket] = []

    class Remembered(socket.socket):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            made.append(self)

    async def scenario(port: int) -> None:
        monkeypatch.setattr(socket, "socket", Remembered)
        dial = asyncio.ensure_future(TcpNetwork().dial("127.0.0.1", port))
        await asyncio.sleep(0)  # the dial has begun

        dial.cancel()
        with pytest.raises(asyncio.CancelledError):
            await dial

        monkeypatch.undo()
        assert [sock.fileno() for sock in made] == [-1]

    with socket.create_server(("127.0.0.1", 0)) as never_accepts:
        run(scenario(never_accepts.getsockname()[1]))
