import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import pytest

from p2pllm.addresses import Address
from p2pllm.config import DhtConfig
from p2pllm.dht.keys import key_of
from p2pllm.dht.node import YOUNG_S, DhtNode
from p2pllm.dht.records import peer_key
from p2pllm.errors import (
    BadRequest,
    ConnectionLost,
    Forbidden,
    LocalProtocolError,
    LookupFailed,
    RequestFailed,
)
from p2pllm.identity import Identity
from p2pllm.ids import PeerId
from p2pllm.sim.dht_swarm import DhtSwarm
from p2pllm.sim.loop import WALL_EPOCH, LoopClock, run
from p2pllm.wire.codec import pack
from p2pllm.wire.messages import Ack, FindNode, FindValue, Message, Nodes, Values
from p2pllm.wire.records import PeerRecord, Record, make_record

CLIENT = DhtConfig(is_client=True)


def in_swarm(
    scenario: Callable[[DhtSwarm], Awaitable[None]],
    *,
    config: DhtConfig = DhtConfig(),  # noqa: B008
) -> None:
    """Run a scenario in an empty swarm whose messages are encoded, on virtual time."""

    async def main() -> None:
        async with asyncio.TaskGroup() as tasks:
            swarm = DhtSwarm(tasks, config, rng=random.Random(1), is_encoding=True)
            await scenario(swarm)
            swarm.kill_all()

    run(main())


async def grow(swarm: DhtSwarm, num_nodes: int) -> DhtNode:
    """A swarm that joined through its first node, which is returned."""
    first = swarm.add()
    for _ in range(num_nodes - 1):
        await swarm.add().bootstrap([first.peer_id])
    await asyncio.sleep(1)  # until those who introduced themselves have been asked back
    return first


def subkeys(records: Sequence[Record]) -> set[PeerId]:
    return {record.subkey for record in records}


# --- joining ---------------------------------------------------------------------------------


def test_a_node_that_joins_knows_the_swarm_and_is_known_by_it() -> None:
    async def scenario(swarm: DhtSwarm) -> None:
        first = await grow(swarm, 8)

        assert [node.snapshot().num_peers for node in swarm.nodes] == [7] * 8
        assert first.snapshot().num_failures == 0

    in_swarm(scenario)


def test_a_node_can_join_through_a_member_that_knows_the_first_by_name_only() -> None:
    async def scenario(swarm: DhtSwarm) -> None:
        first, second, third = swarm.add(), swarm.add(), swarm.add()
        await second.bootstrap([first.peer_id])
        await asyncio.sleep(1)

        reached = await third.bootstrap([second.peer_id])

        assert reached == 2

    in_swarm(scenario)


def test_joining_through_dead_peers_reaches_nobody() -> None:
    async def scenario(swarm: DhtSwarm) -> None:
        nobody = Identity.generate().peer_id

        assert await swarm.add().bootstrap([nobody]) == 0

    in_swarm(scenario)


def test_a_client_learns_of_others_and_is_not_listed() -> None:
    async def scenario(swarm: DhtSwarm) -> None:
        first = await grow(swarm, 5)
        client = swarm.add(config=CLIENT)

        await client.bootstrap([first.peer_id])
        await asyncio.sleep(60)

        assert client.snapshot().num_peers == 5
        assert all(node.snapshot().num_peers == 4 for node in swarm.nodes if node is not client)
        with pytest.raises(Forbidden):
            await client.handle(first.peer_id, None, FindNode(bytes(32)))

    in_swarm(scenario)


def test_a_node_whose_peers_all_vanished_joins_again_when_they_are_back() -> None:
    async def scenario(swarm: DhtSwarm) -> None:
        first = swarm.add(seed=b"f" * 32)
        node = swarm.add()
        await node.bootstrap([first.peer_id])
        swarm.kill(first.peer_id)
        await asyncio.sleep(300)  # its own record is stored again, in vain: the peer is dropped
        num_peers_alone = node.snapshot().num_peers

        swarm.add(seed=b"f" * 32)
        await asyncio.sleep(15)

        assert num_peers_alone == 0
        assert node.snapshot().num_peers == 1

    in_swarm(scenario)


# --- reading and writing ---------------------------------------------------------------------


def test_what_one_node_puts_all_others_get() -> None:
    async def scenario(swarm: DhtSwarm) -> None:
        await grow(swarm, 12)
        writer = swarm.nodes[3]

        num_replicas = await writer.put("presence", "model", {"x": 1})

        assert num_replicas == DhtConfig().replicas
        for node in swarm.nodes:
            (record,) = await node.get("presence", "model")
            assert (record.subkey, record.body) == (writer.peer_id, {"x": 1})

    in_swarm(scenario)


def test_writers_of_one_name_do_not_disturb_each_other() -> None:
    async def scenario(swarm: DhtSwarm) -> None:
        await grow(swarm, 30)
        await asyncio.gather(*(node.put("presence", "model", {"x": 1}) for node in swarm.nodes))

        records = await swarm.nodes[0].get("presence", "model")

        assert subkeys(records) == {node.peer_id for node in swarm.nodes}

    in_swarm(scenario)


def test_a_name_with_several_pages_of_records_is_read_whole() -> None:
    async def scenario(swarm: DhtSwarm) -> None:
        await grow(swarm, 60)
        body = {"x": "y" * 700}
        await asyncio.gather(*(node.put("presence", "model", body) for node in swarm.nodes))

        records = await swarm.nodes[0].get("presence", "model")

        assert len(records) == 60

    in_swarm(scenario)


def test_a_name_that_nobody_wrote_is_empty() -> None:
    async def scenario(swarm: DhtSwarm) -> None:
        first = await grow(swarm, 3)

        assert await first.get("presence", "model") == []

    in_swarm(scenario)


def test_a_lone_node_reads_what_it_wrote() -> None:
    async def scenario(swarm: DhtSwarm) -> None:
        node = swarm.add()

        assert await node.put("presence", "model", {"x": 1}) == 1
        assert subkeys(await node.get("presence", "model")) == {node.peer_id}

    in_swarm(scenario)


def test_a_client_without_peers_says_that_it_found_nobody() -> None:
    async def scenario(swarm: DhtSwarm) -> None:
        client = swarm.add(config=CLIENT)

        with pytest.raises(LookupFailed):
            await client.get("presence", "model")
        with pytest.raises(LookupFailed):
            await client.put("presence", "model", {"x": 1})

    in_swarm(scenario)


def test_a_second_put_replaces_the_first_also_after_a_restart() -> None:
    async def scenario(swarm: DhtSwarm) -> None:
        first = await grow(swarm, 5)
        writer = swarm.add(seed=b"w" * 32)
        await writer.bootstrap([first.peer_id])
        await writer.put("presence", "model", {"x": 1})
        swarm.kill(writer.peer_id)
        await asyncio.sleep(1)
        restarted = swarm.add(seed=b"w" * 32)
        await restarted.bootstrap([first.peer_id])

        await restarted.put("presence", "model", {"x": 2})

        (record,) = await first.get("presence", "model")
        assert record.body == {"x": 2}

    in_swarm(scenario)


def test_a_record_that_is_put_once_expires() -> None:
    async def scenario(swarm: DhtSwarm) -> None:
        first = await grow(swarm, 5)
        await swarm.nodes[2].put("presence", "model", {"x": 1}, ttl_s=50.0)

        await asyncio.sleep(49)
        before = await first.get("presence", "model")
        await asyncio.sleep(4)
        after = await first.get("presence", "model")

        assert len(before) == 1
        assert after == []

    in_swarm(scenario)


def test_concurrent_reads_of_one_name_are_one_lookup() -> None:
    async def scenario(swarm: DhtSwarm) -> None:
        first = await grow(swarm, 5)
        before = first.snapshot().num_lookups

        await asyncio.gather(*(first.get("presence", "model") for _ in range(10)))

        assert first.snapshot().num_lookups == before + 1

    in_swarm(scenario)


def test_a_reader_that_gives_up_does_not_spoil_the_read_of_others() -> None:
    async def scenario(swarm: DhtSwarm) -> None:
        first = await grow(swarm, 5)
        await first.put("presence", "model", {"x": 1})
        async with asyncio.TaskGroup() as tasks:
            impatient = tasks.create_task(first.get("presence", "model"))
            await asyncio.sleep(0)
            patient = tasks.create_task(first.get("presence", "model"))
            await asyncio.sleep(0)

            impatient.cancel()

        assert len(patient.result()) == 1

    in_swarm(scenario)


def test_a_read_can_be_cancelled_at_any_moment() -> None:
    async def scenario(swarm: DhtSwarm) -> None:
        first = await grow(swarm, 5)
        await first.put("presence", "model", {"x": 1})
        for tenth in range(6):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(tenth / 100):
                    await first.get("presence", "model")

        assert len(await first.get("presence", "model")) == 1

    in_swarm(scenario)


# --- publishing ------------------------------------------------------------------------------


def test_a_publication_stays_alive_while_its_node_runs_and_expires_when_it_dies() -> None:
    async def scenario(swarm: DhtSwarm) -> None:
        first = await grow(swarm, 10)
        writer = swarm.nodes[5]
        writer.publish("presence", "model", {"x": 1})

        await asyncio.sleep(600)
        alive = await first.get("presence", "model")
        swarm.kill(writer.peer_id)
        await asyncio.sleep(125)
        dead = await first.get("presence", "model")

        assert subkeys(alive) == {writer.peer_id}
        assert dead == []

    in_swarm(scenario)


def test_an_update_is_published_at_once() -> None:
    async def scenario(swarm: DhtSwarm) -> None:
        first = await grow(swarm, 10)
        publication = swarm.nodes[5].publish("presence", "model", {"x": 1})
        await publication.wait()
        started = asyncio.get_running_loop().time()

        publication.update({"x": 2})
        await publication.wait()

        (record,) = await first.get("presence", "model")
        assert record.body == {"x": 2}
        assert asyncio.get_running_loop().time() - started < 5

    in_swarm(scenario)


def test_what_is_withdrawn_is_gone_at_once_and_stays_gone() -> None:
    async def scenario(swarm: DhtSwarm) -> None:
        first = await grow(swarm, 10)
        publication = swarm.nodes[5].publish("presence", "model", {"x": 1})
        await publication.wait()

        await publication.withdraw()

        assert await first.get("presence", "model") == []
        await asyncio.sleep(60)
        assert await first.get("presence", "model") == []

    in_swarm(scenario)


def test_what_was_published_before_joining_is_stored_again_when_others_are_known() -> None:
    async def scenario(swarm: DhtSwarm) -> None:
        first = await grow(swarm, 5)
        node = swarm.add()
        publication = node.publish("test", "name", {"value": 1})
        await asyncio.sleep(1)
        num_replicas_alone = publication.num_replicas

        await node.bootstrap([first.peer_id])
        await asyncio.sleep(2)

        assert (num_replicas_alone, publication.num_replicas) == (1, 6)

    in_swarm(scenario)


def test_in_a_young_swarm_everybody_is_found_though_closer_peers_have_come_since() -> None:
    async def scenario(swarm: DhtSwarm) -> None:
        await grow(swarm, 8)
        await asyncio.sleep(YOUNG_S)

        for node in swarm.nodes:
            for other in swarm.nodes:
                assert await node.find_peer(other.peer_id) is not None

    in_swarm(scenario)


def test_a_publication_that_nobody_takes_is_tried_again() -> None:
    async def scenario(swarm: DhtSwarm) -> None:
        client = swarm.add(config=CLIENT)
        publication = client.publish("presence", "model", {"x": 1})
        await asyncio.sleep(20)
        first = swarm.add()
        await client.bootstrap([first.peer_id])

        num_replicas = await publication.wait()

        assert num_replicas == 1

    in_swarm(scenario)


def test_a_body_that_is_too_large_is_refused_where_it_is_given() -> None:
    async def scenario(swarm: DhtSwarm) -> None:
        node = swarm.add()

        with pytest.raises(LocalProtocolError):
            node.publish("presence", "model", {"x": "y" * 2000})

    in_swarm(scenario)


# --- peer records ----------------------------------------------------------------------------


def test_a_peers_addresses_are_found_by_its_name() -> None:
    async def scenario(swarm: DhtSwarm) -> None:
        first = await grow(swarm, 10)
        client = swarm.add(config=CLIENT)
        await client.bootstrap([first.peer_id])
        address = Address("relay.example", 1, client.peer_id, first.peer_id)
        client.set_addresses([address], is_public=False)
        await asyncio.sleep(5)

        found = await swarm.nodes[3].find_peer(client.peer_id)

        assert found == PeerRecord(client.peer_id, (address,), is_public=False)

    in_swarm(scenario)


def test_new_addresses_are_told_at_once() -> None:
    async def scenario(swarm: DhtSwarm) -> None:
        first = await grow(swarm, 10)
        moved = swarm.nodes[4]
        await asyncio.sleep(5)

        moved.set_addresses([Address("9.9.9.9", 9)], is_public=True)
        await asyncio.sleep(5)

        found = await first.find_peer(moved.peer_id)
        assert found is not None
        assert found.addresses == (Address("9.9.9.9", 9, moved.peer_id),)

    in_swarm(scenario)


def test_a_node_without_addresses_publishes_none() -> None:
    async def main() -> None:
        node = node_on(LyingRpc(Ack()))

        node.set_addresses([], is_public=False)

        assert node.snapshot().num_publications == 0

    run(main())


def test_a_peer_that_nobody_knows_is_none() -> None:
    async def scenario(swarm: DhtSwarm) -> None:
        first = await grow(swarm, 3)

        assert await first.find_peer(Identity.generate().peer_id) is None

    in_swarm(scenario)


# --- the saved table -------------------------------------------------------------------------


def test_a_node_restarts_from_its_saved_table_without_a_bootstrap_node(tmp_path: Path) -> None:
    async def scenario(swarm: DhtSwarm) -> None:
        first = await grow(swarm, 10)
        path = tmp_path / "cache" / "table"
        swarm.nodes[5].save(path)
        swarm.kill(first.peer_id)
        node = swarm.add()

        known = node.load(path)
        reached = await node.bootstrap([])

        assert set(known) >= {n.peer_id for n in swarm.nodes[1:4]}
        assert reached == 9
        assert first.peer_id not in {peer.peer_id for peer in node.table.snapshot().peers}

    in_swarm(scenario)


@pytest.mark.parametrize("content", [None, b"", b"\xff\x00", pack({"v": 1}), pack([1])])
def test_a_missing_or_broken_table_is_an_empty_one(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "table"
    if content is not None:
        path.write_bytes(content)

    async def scenario(swarm: DhtSwarm) -> None:
        assert swarm.add().load(path) == []

    in_swarm(scenario)


def test_a_table_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")

    async def scenario(swarm: DhtSwarm) -> None:
        swarm.add().save(tmp_path / "file" / "table")

    in_swarm(scenario)


# --- hostile peers ---------------------------------------------------------------------------

OWN, LIAR = Identity.from_seed(b"o" * 32), Identity.from_seed(b"l" * 32)
VICTIM = Identity.from_seed(b"v" * 32)
KEY = key_of("test", "presence", "model")


def forged(namespace: str, key: bytes) -> bytes:
    """A record in the victim's slot, signed by the liar."""
    return make_record(
        namespace,
        key,
        VICTIM.peer_id,
        seq=2**62,
        issued=WALL_EPOCH,
        expires=WALL_EPOCH + 100,
        body={"addresses": ["6.6.6.6:6"], "public": True},
        sign=LIAR.sign,
    ).to_bytes()


class LyingRpc:
    """Every peer answers with the same thing, whatever it is asked."""

    def __init__(self, reply: Message | Exception) -> None:
        self.reply = reply
        self.num_requests = 0

    async def request(self, peer: PeerId, message: Message, *, timeout_s: float) -> Message:
        self.num_requests += 1
        await asyncio.sleep(0.01)
        if isinstance(self.reply, Exception):
            raise self.reply
        return self.reply

    def learn(self, peer: PeerId, addresses: Sequence[Address]) -> None:
        raise AssertionError("nothing that a liar says is learned")


def node_on(rpc: LyingRpc) -> DhtNode:
    return DhtNode(
        OWN, DhtConfig(is_client=True), rpc, LoopClock(), random.Random(1), network_id="test"
    )


@pytest.mark.parametrize(
    "reply",
    [
        Nodes((forged("peer", peer_key("test", VICTIM.peer_id)),)),
        Values((forged("presence", KEY),), 0, ()),
        Ack(),
        ConnectionLost("gone"),
        RequestFailed("broken"),
        BadRequest("no"),
    ],
    ids=lambda reply: type(reply).__name__,
)
def test_a_peer_that_lies_or_fails_is_not_taken_in(reply: Message | Exception) -> None:
    async def main() -> None:
        node = node_on(LyingRpc(reply))

        reached = await node.bootstrap([LIAR.peer_id])

        assert reached == 0
        assert node.snapshot().num_peers == 0
        with pytest.raises(LookupFailed):
            await node.get("presence", "model")

    run(main())


def test_a_forged_record_is_not_returned_and_counted() -> None:
    async def main() -> None:
        rpc = LyingRpc(Nodes(()))
        node = node_on(rpc)
        await node.bootstrap([LIAR.peer_id])
        rpc.reply = Values((forged("presence", KEY),), 0, ())

        with pytest.raises(LookupFailed):
            await node.get("presence", "model")

        assert node.snapshot().refused == {"bad signature": 1}

    run(main())


def test_an_endless_stream_of_pages_ends() -> None:
    async def main() -> None:
        rpc = LyingRpc(Nodes(()))
        node = node_on(rpc)
        await node.bootstrap([LIAR.peer_id])
        rpc.reply = Values((), 2**62, ())

        assert await node.get("presence", "model") == []
        assert rpc.num_requests <= 4

    run(main())


def test_a_request_with_a_bad_introduction_is_refused() -> None:
    async def main() -> None:
        node = DhtNode(
            OWN, DhtConfig(), LyingRpc(Ack()), LoopClock(), random.Random(1), network_id="test"
        )
        sender = forged("peer", peer_key("test", VICTIM.peer_id))

        with pytest.raises(BadRequest):
            await node.handle(VICTIM.peer_id, None, FindValue("presence", KEY, sender=sender))

    run(main())
