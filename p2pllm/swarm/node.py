"""A member of the swarm: transport and DHT, joined.

Both sides need each other: the DHT asks over the transport, and the transport looks unknown peers
up in the DHT. Servers, clients and bootstrap nodes are all a `Node` with something on top.

    async with Node.open(config, identity, network=TcpNetwork()) as node:
        await node.join()
"""

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from p2pllm.addresses import Address
from p2pllm.clock import Clock, SystemClock
from p2pllm.config import NodeConfig
from p2pllm.dht.node import DhtNode
from p2pllm.errors import (
    LookupFailed,
    P2PLLMError,
    PeerUnreachable,
    RemoteProtocolError,
    TransportError,
)
from p2pllm.identity import Identity
from p2pllm.ids import PeerId
from p2pllm.net.endpoint import Endpoint
from p2pllm.net.frames import Priority
from p2pllm.net.link import Network
from p2pllm.net.rpc import Request
from p2pllm.tasks import task_group
from p2pllm.wire.messages import FindNode, FindValue, Message, Store
from p2pllm.wire.records import PeerRecord

logger = logging.getLogger(__name__)

CHECK_ADDRESSES_S = 10.0  # peers report at which address they see us as connections come and go
SAVE_TABLE_S = 60.0  # a restart loses at most a minute of acquaintances


class Node:
    """One peer with an endpoint and a DHT node. Use `Node.open`."""

    def __init__(self, config: NodeConfig, endpoint: Endpoint, dht: DhtNode) -> None:
        self.config = config
        self.endpoint = endpoint
        self.dht = dht
        for kind in (FindNode, FindValue, Store):
            endpoint.handle(kind, self._answer)

    @classmethod
    async def bind(
        cls,
        config: NodeConfig,
        identity: Identity,
        *,
        network: Network,
        clock: Clock | None = None,
        rng: random.Random | None = None,
    ) -> "Node":
        """Open the listening port; nothing runs yet. Raises TransportError if it is taken."""

        async def resolve(peer: PeerId) -> PeerRecord | None:
            try:
                return await dht.find_peer(peer)
            except LookupFailed:  # nobody to ask, as before joining
                return None

        endpoint = await Endpoint.bind(config.net, identity, network, resolve=resolve)
        dht = DhtNode(
            identity,
            config.dht,
            _Rpc(endpoint),
            clock or SystemClock(),
            rng or random.Random(),
            network_id=config.net.network_id,
            remote_host=endpoint.remote_host,
        )
        dht.set_addresses(endpoint.addresses, is_public=not config.dht.is_client)
        return cls(config, endpoint, dht)

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        config: NodeConfig,
        identity: Identity,
        *,
        network: Network,
        clock: Clock | None = None,
        rng: random.Random | None = None,
    ) -> AsyncIterator["Node"]:
        """A running node; on leaving, all its tasks are cancelled and its connections closed.

        An error of the body is raised as it is.
        """
        node = await cls.bind(config, identity, network=network, clock=clock, rng=rng)
        try:
            async with task_group() as tasks:
                running = tasks.create_task(node.run())
                try:
                    yield node
                finally:
                    running.cancel()
        finally:
            node.endpoint.close()  # again, if we were cancelled before `run` had begun

    @property
    def peer_id(self) -> PeerId:
        """Who we are."""
        return self.endpoint.peer_id

    @property
    def addresses(self) -> tuple[Address, ...]:
        """Where others can dial us."""
        return self.endpoint.addresses

    async def run(self) -> None:
        """Own the endpoint, the DHT and the saved table until cancelled."""
        async with task_group() as tasks:
            tasks.create_task(self.endpoint.run())
            tasks.create_task(self.dht.run())
            tasks.create_task(self._keep_table())
            tasks.create_task(self._keep_addresses())

    async def join(self) -> int:
        """Get to know the swarm through the configured peers and the saved table.

        Returns how many members answered. Raises PeerUnreachable if peers were given and none
        of them, nor any peer of the saved table, could be reached.
        """
        known = self._load_table()
        dialled = await asyncio.gather(*(self._dial(address) for address in self.config.peers))
        entry = [peer for peer in dialled if isinstance(peer, PeerId)]
        reached = await self.dht.bootstrap([*entry, *known])
        if self.config.peers and not entry and reached:
            logger.warning(
                "none of the given peers answered (%s); joined through peers known from before",
                ", ".join(address.endpoint for address in self.config.peers),
            )
        if self.config.peers and not reached:
            reasons = "; ".join(sorted({str(peer) for peer in dialled if peer is not None}))
            raise PeerUnreachable(
                f"none of the given peers could be reached ({reasons}); "
                "check the addresses, the swarm's name, and that a node is running there"
            )
        return reached

    async def _dial(self, address: Address) -> PeerId | P2PLLMError | None:
        """Who answers at an address; an error if nobody does, None if it is ourselves."""
        if address.peer_id == self.peer_id:
            return None
        if address.relay is not None:
            return PeerUnreachable(f"{address}: circuits through relays cannot be dialled yet")
        try:
            return await self.endpoint.connect(address, timeout_s=self.config.net.dial_timeout_s)
        except (TransportError, RemoteProtocolError) as exc:
            logger.info("peer not reached address=%s reason=%s", address, exc)
            return exc

    async def _answer(self, request: Request[Message]) -> Message:
        host = request.remote[0] if request.remote else None
        return await self.dht.handle(request.peer, host, request.message)

    async def _keep_addresses(self) -> None:
        """Tell the swarm when we learn of other addresses of ours than we told it at first."""
        said = self.addresses
        while True:
            await asyncio.sleep(CHECK_ADDRESSES_S)
            if self.addresses != said:
                said = self.addresses
                logger.info("addresses changed to=%s", ",".join(map(str, said)))
                self.dht.set_addresses(said, is_public=not self.config.dht.is_client)

    def _load_table(self) -> Sequence[PeerId]:
        if not self.config.table_path:
            return ()
        return self.dht.load(Path(self.config.table_path))

    async def _keep_table(self) -> None:
        if not self.config.table_path:
            return
        path = Path(self.config.table_path)
        try:
            while True:
                await asyncio.sleep(SAVE_TABLE_S)
                self.dht.save(path)
        finally:
            self.dht.save(path)


class _Rpc:
    """What the DHT needs of the transport."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint

    async def request(self, peer: PeerId, message: Message, *, timeout_s: float) -> Message:
        # Patience would mean a lookup within a lookup, for the addresses of a peer that has died.
        return await self._endpoint.request(
            peer, message, timeout_s=timeout_s, priority=Priority.CONTROL, is_patient=False
        )

    def learn(self, peer: PeerId, addresses: Sequence[Address]) -> None:
        self._endpoint.learn(peer, addresses)
