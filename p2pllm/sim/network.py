"""A whole internet in memory: hosts that listen and dial, lines with delay, and faults.

    internet = SimNetwork(ShaperConfig(delay_s=0.015), seed=1)
    alice, bob = internet.host("10.0.0.1"), internet.host("10.0.0.2")
    listener = await bob.listen("0.0.0.0", 31337, on_link)
    link = await alice.dial("10.0.0.2", 31337)      # one round trip later

A host is a `p2pllm.net.link.Network`, so everything above the links runs on it unchanged. Lines
are a `MemoryLink` with a `ShapedLink` at each end. Connecting takes one round trip; a closed port
refuses after one; a host that is down, or behind a partition, never answers.

Not here: NATs (a later `sim/nat.py`), and lines shared by several links: each link has the
bandwidth of its pair to itself.
"""

import asyncio
import errno
import os
import random
from collections.abc import Callable
from dataclasses import dataclass

from p2pllm.config import ShaperConfig
from p2pllm.errors import PeerUnreachable, TransportError
from p2pllm.net.link import Link, Listener
from p2pllm.net.memory import MemoryLink, memory_pair
from p2pllm.net.shaper import ShapedLink

CONNECT_TIMEOUT_S = 127.0  # Linux gives up after so long (6 SYN retries)
FIRST_EPHEMERAL_PORT = 32_768  # Linux's range
LAST_PORT = 65_535


@dataclass(frozen=True, slots=True)
class _End:
    """One end of a link: what its host uses, and the memory link inside it."""

    host: str
    peer: str
    shaped: ShapedLink
    memory: MemoryLink


class SimNetwork:
    """Hosts by address, the lines between them, and their faults; deterministic by `seed`."""

    def __init__(self, line: ShaperConfig = ShaperConfig(), *, seed: int = 0) -> None:
        self._rng = random.Random(seed)
        self._line = line
        self._lines: dict[frozenset[str], ShaperConfig] = {}
        self._hosts: dict[str, SimHost] = {}
        self._ends: dict[frozenset[str], list[_End]] = {}  # by pair of hosts
        self._cut: set[frozenset[str]] = set()

    def host(self, address: str) -> "SimHost":
        """The host with this address, made at the first call."""
        return self._hosts.setdefault(address, SimHost(self, address))

    def shape(self, first: str, second: str, line: ShaperConfig) -> None:
        """Give the line between two hosts this shape, both ways, open links included."""
        self._lines[frozenset((first, second))] = line
        for end in self._live(frozenset((first, second))):
            end.shaped.config = line

    def partition(self, first: str, second: str) -> None:
        """Cut the line between two hosts: links stall, dials are never answered."""
        self._cut.add(frozenset((first, second)))
        for end in self._live(frozenset((first, second))):
            end.shaped.stall()

    def heal(self, first: str, second: str) -> None:
        """Undo `partition`: what was on its way arrives."""
        self._cut.discard(frozenset((first, second)))
        for end in self._live(frozenset((first, second))):
            if self._answers(end.host) and self._answers(end.peer):
                end.shaped.resume()

    def kill(self, address: str, *, is_silent: bool = False) -> None:
        """End a host's process: ports close, and peers see a reset after the one-way delay.

        `is_silent`: the whole machine vanishes instead. Links stall and dials to it hang.
        """
        host = self.host(address)
        host._listeners.clear()
        host._is_down = is_silent
        for pair in [pair for pair in self._ends if address in pair]:
            for end in self._live(pair):
                end.shaped.stall()
                if not is_silent and end.host == address:
                    self._reset(end)

    def revive(self, address: str) -> None:
        """Let a vanished host take part again; its old links stay dead."""
        self.host(address)._is_down = False

    def line(self, first: str, second: str) -> ShaperConfig:
        """The shape of the line between two hosts; a host reaches itself at no cost."""
        if first == second:
            return ShaperConfig()
        return self._lines.get(frozenset((first, second)), self._line)

    async def _dial(self, source: "SimHost", address: str, port: int, local_port: int) -> Link:
        line = self.line(source.address, address)
        await asyncio.sleep(2 * line.delay_s)
        target = self._hosts.get(address)
        is_cut = frozenset((source.address, address)) in self._cut
        if target is None or is_cut or target._is_down or source._is_down:
            await asyncio.sleep(CONNECT_TIMEOUT_S - 2 * line.delay_s)
            raise PeerUnreachable(f"{address} port {port}: no answer")
        on_link = target._listeners.get(port)
        if on_link is None:
            raise PeerUnreachable(f"{address} port {port}: connection refused")
        ours, theirs = self._connect(
            (source.address, source._port_to(address, port, local_port)), (address, port), line
        )
        on_link(theirs.shaped)
        return ours.shaped

    def _connect(
        self, source: tuple[str, int], target: tuple[str, int], line: ShaperConfig
    ) -> tuple[_End, _End]:
        first, second = memory_pair(source, target)
        # Each end draws its own jitter, so that one's traffic does not change the other's.
        ends = (
            _End(source[0], target[0], self._shaped(first, line), first),
            _End(target[0], source[0], self._shaped(second, line), second),
        )
        pair = frozenset((source[0], target[0]))
        self._ends[pair] = [*self._live(pair), *ends]
        return ends

    def _shaped(self, link: MemoryLink, line: ShaperConfig) -> ShapedLink:
        return ShapedLink(link, line, random.Random(self._rng.getrandbits(64)))

    def _reset(self, end: _End) -> None:
        """Close a dead process's end at once; the peer hears of it when the news has travelled."""
        delay_s = self.line(end.host, end.peer).delay_s
        asyncio.get_running_loop().call_later(delay_s, end.memory.abort)

    def _answers(self, address: str) -> bool:
        return not self.host(address)._is_down

    def _live(self, pair: frozenset[str]) -> list[_End]:
        return [end for end in self._ends.get(pair, ()) if not end.memory.is_closed]


class SimHost:
    """One computer of a `SimNetwork`; keeps the contract of `p2pllm.net.link.Network`."""

    def __init__(self, network: SimNetwork, address: str) -> None:
        self.address = address
        self._network = network
        self._listeners: dict[int, Callable[[Link], None]] = {}
        self._next_port = FIRST_EPHEMERAL_PORT
        self._is_down = False

    async def listen(self, host: str, port: int, on_link: Callable[[Link], None]) -> Listener:
        """Accept links at `port` (0: any free one). The host has one address: `host` is ignored."""
        if port in self._listeners:
            raise TransportError(f"port {port} is in use: {os.strerror(errno.EADDRINUSE)}")
        port = port or self._free_port()
        self._listeners[port] = on_link

        def close() -> None:
            if self._listeners.get(port) is on_link:
                del self._listeners[port]

        return Listener(self.address, port, close)

    async def dial(self, host: str, port: int, *, local_port: int = 0) -> Link:
        """Open a link to another host (or this one), from `local_port` unless that pair exists."""
        return await self._network._dial(self, host, port, local_port)

    def _port_to(self, host: str, port: int, local_port: int) -> int:
        in_use = {
            end.memory.local
            for end in self._network._live(frozenset((self.address, host)))
            if end.memory.remote == (host, port)
        }
        if local_port and (self.address, local_port) not in in_use:
            return local_port
        return self._free_port()

    def _free_port(self) -> int:
        """The next port of the ephemeral range; ports come round after 32,768 links."""
        while self._next_port in self._listeners:
            self._next_port = self._after(self._next_port)
        port, self._next_port = self._next_port, self._after(self._next_port)
        return port

    @staticmethod
    def _after(port: int) -> int:
        return port + 1 if port < LAST_PORT else FIRST_EPHEMERAL_PORT
