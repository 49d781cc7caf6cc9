"""A swarm of DHT nodes that hand messages to each other as objects, on virtual time.

Without Noise and mux, a thousand nodes fit into one test: what is simulated is the DHT's own
behaviour under latency, death and wrong clocks. Nodes share one memory of verified records, since
they would all verify the same ones, at 150 µs each.
"""

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass

from p2pllm.addresses import Address
from p2pllm.config import DEFAULT_PORT, DhtConfig
from p2pllm.dht.contacts import ContactReader
from p2pllm.dht.node import DhtNode
from p2pllm.dht.records import RecordReader
from p2pllm.errors import DeadlineExceeded, PeerUnreachable
from p2pllm.identity import Identity
from p2pllm.ids import PeerId
from p2pllm.sim.loop import LoopClock
from p2pllm.wire.messages import Message, decode_message, encode_message

_SHARED_RECORDS = 200_000


@dataclass
class _Member:
    node: DhtNode
    task: asyncio.Task[None]
    is_reachable: bool


class DhtSwarm:
    """Nodes that live and die in the caller's task group. `members` are those alive."""

    def __init__(
        self,
        tasks: asyncio.TaskGroup,
        config: DhtConfig,
        *,
        rng: random.Random,
        rtt_s: tuple[float, float] = (0.010, 0.200),
        is_encoding: bool = False,
    ) -> None:
        """`rtt_s`: round trips are drawn evenly from there. `is_encoding`: messages as bytes."""
        self.rng = rng
        self.is_encoding = is_encoding
        self.num_requests = 0
        self._tasks = tasks
        self._config = config
        self._rtt_s = rtt_s
        self._members: dict[PeerId, _Member] = {}
        self._records = RecordReader(capacity=_SHARED_RECORDS)
        self._contacts = ContactReader(self._records, capacity=_SHARED_RECORDS)

    @property
    def nodes(self) -> list[DhtNode]:
        """All nodes alive, in the order of their coming."""
        return [member.node for member in self._members.values()]

    def add(
        self, *, config: DhtConfig | None = None, skew_s: float = 0.0, seed: bytes | None = None
    ) -> DhtNode:
        """A new node that runs, and knows nobody."""
        config = config or self._config
        identity = Identity.from_seed(seed or self.rng.randbytes(32))
        host = ".".join(str(self.rng.randrange(1, 100)) for _ in range(4))
        node = DhtNode(
            identity,
            config,
            _Wire(self, identity.peer_id, host),
            LoopClock(skew_s),
            random.Random(self.rng.random()),
            network_id="test",
            records=self._records,
            contacts=self._contacts,
        )
        node.set_addresses([Address(host, DEFAULT_PORT)], is_public=not config.is_client)
        task = self._tasks.create_task(node.run())
        self._members[node.peer_id] = _Member(node, task, not config.is_client)
        return node

    def kill(self, peer: PeerId) -> None:
        """A node is gone from one moment to the next, with all that it stored."""
        self._members.pop(peer).task.cancel()

    def kill_all(self) -> None:
        """The end, so that the caller's task group can finish."""
        for peer in list(self._members):
            self.kill(peer)

    async def deliver(
        self, sender: PeerId, host: str, receiver: PeerId, message: Message, timeout_s: float
    ) -> Message:
        """Carry a request over and its reply back."""
        self.num_requests += 1
        rtt_s = self.rng.uniform(*self._rtt_s)
        await asyncio.sleep(rtt_s / 2)
        member = self._members.get(receiver)
        if member is None or rtt_s > timeout_s:
            await asyncio.sleep(max(0.0, timeout_s - rtt_s / 2))
            raise DeadlineExceeded(f"{receiver.short} did not answer")
        if not member.is_reachable:
            raise PeerUnreachable(f"{receiver.short} cannot be dialled")
        reply = await member.node.handle(sender, host, self._carry(message))
        await asyncio.sleep(rtt_s / 2)
        return self._carry(reply)

    def _carry(self, message: Message) -> Message:
        if not self.is_encoding:
            return message
        return decode_message(b"".join(encode_message(message)))


class _Wire:
    """One node's way to the others."""

    def __init__(self, swarm: DhtSwarm, peer_id: PeerId, host: str) -> None:
        self._swarm = swarm
        self._peer_id = peer_id
        self._host = host

    async def request(self, peer: PeerId, message: Message, *, timeout_s: float) -> Message:
        return await self._swarm.deliver(self._peer_id, self._host, peer, message, timeout_s)

    def learn(self, peer: PeerId, addresses: Sequence[Address]) -> None:
        """Everybody can be found by name here."""
