"""The tracker on virtual time: refreshing, pinging, waiting, and failures of all of these."""

import asyncio
from dataclasses import replace
from random import Random

import pytest

from p2pllm.config import ClientConfig
from p2pllm.errors import LookupFailed, PeerUnreachable
from p2pllm.identity import Identity
from p2pllm.ids import ModelId, PeerId
from p2pllm.sim.loop import run
from p2pllm.spans import Span
from p2pllm.swarm.announcements import (
    MODELS_NAME,
    MODELS_NAMESPACE,
    ModelListing,
    Presence,
    ServerState,
    presence_name,
)
from p2pllm.swarm.tracker import SwarmTracker, read_models
from p2pllm.swarm.view import PENALTY_S
from p2pllm.wire.messages import Numerics
from p2pllm.wire.records import PRESENCE_NAMESPACE, Record, make_record

MODEL = ModelId(b"m" * 32, "tiny")
IDENTITIES = [Identity.from_seed(bytes([number]) * 32) for number in range(40)]
CONFIG = ClientConfig(view_refresh_s=20.0, max_pings=6)


class FakeSwarm:
    """A DHT that answers after `delay_s` and servers that answer pings after their RTT."""

    def __init__(self, *spans: str, delay_s: float = 0.1) -> None:
        self.presences = [
            Presence(IDENTITIES[number].peer_id, Span.parse(span), Numerics("float32"))
            for number, span in enumerate(spans)
        ]
        self.delay_s = delay_s
        self.rtt_s = 0.05
        self.unreachable: set[PeerId] = set()
        self.is_broken = False
        self.num_lookups = 0
        self.pinged: list[PeerId] = []
        self.extra: list[Record] = []

    async def get(self, namespace: str, name: str) -> list[Record]:
        assert (namespace, name) == (PRESENCE_NAMESPACE, presence_name(MODEL))
        self.num_lookups += 1
        await asyncio.sleep(self.delay_s)
        if self.is_broken:
            raise LookupFailed("nobody answered")
        return [a_record(presence) for presence in self.presences] + self.extra

    async def ping(self, peer: PeerId) -> float:
        self.pinged.append(peer)
        if peer in self.unreachable:
            raise PeerUnreachable("no address answered")
        await asyncio.sleep(self.rtt_s)
        return self.rtt_s

    def tracker(self, config: ClientConfig = CONFIG) -> SwarmTracker:
        return SwarmTracker(MODEL, 20, self, self.ping, config, Random(1))


def identity_of(peer: PeerId) -> Identity:
    return next(identity for identity in IDENTITIES if identity.peer_id == peer)


def a_record(presence: Presence, *, is_tombstone: bool = False) -> Record:
    return make_record(
        PRESENCE_NAMESPACE,
        bytes(32),
        presence.peer_id,
        seq=1,
        issued=0.0,
        expires=1.0,
        body={} if is_tombstone else presence.to_body(),
        sign=identity_of(presence.peer_id).sign,
    )


def test_a_refresh_reads_the_servers_and_measures_them() -> None:
    async def scenario() -> None:
        swarm = FakeSwarm("0:10", "10:20")
        tracker = swarm.tracker()
        await tracker.refresh()
        view = tracker.view()
        assert view.missing() == ()
        assert [server.rtt_s for server in view.servers] == [0.05, 0.05]

    run(scenario())


def test_malformed_records_and_tombstones_are_left_out() -> None:
    async def scenario() -> None:
        swarm = FakeSwarm("0:10")
        broken = a_record(Presence(IDENTITIES[5].peer_id, Span(0, 5), Numerics("float32")))
        broken.body["span"] = "everything"
        gone = Presence(IDENTITIES[6].peer_id, Span(0, 5), Numerics("float32"))
        swarm.extra = [broken, a_record(gone, is_tombstone=True)]
        tracker = swarm.tracker()
        await tracker.refresh()
        assert [server.peer_id for server in tracker.view().servers] == [IDENTITIES[0].peer_id]

    run(scenario())


def test_refreshes_asked_for_at_once_share_one_lookup() -> None:
    async def scenario() -> None:
        swarm = FakeSwarm("0:20")
        tracker = swarm.tracker()
        async with asyncio.TaskGroup() as group:
            for _ in range(5):
                group.create_task(tracker.refresh())
        assert swarm.num_lookups == 1

    run(scenario())


def test_a_cancelled_refresh_does_not_cancel_those_who_joined_it() -> None:
    async def scenario() -> None:
        swarm = FakeSwarm("0:20")
        tracker = swarm.tracker()
        async with asyncio.TaskGroup() as group:
            first = group.create_task(tracker.refresh())
            second = group.create_task(tracker.refresh())
            await asyncio.sleep(0.05)
            first.cancel()
        assert first.cancelled()
        assert not second.cancelled()
        assert len(tracker.view().servers) == 1

    run(scenario())


def test_a_failed_lookup_is_raised_and_what_was_known_stays() -> None:
    async def scenario() -> None:
        swarm = FakeSwarm("0:20")
        tracker = swarm.tracker()
        await tracker.refresh()
        swarm.is_broken = True
        with pytest.raises(LookupFailed):
            await tracker.refresh()
        assert len(tracker.view().servers) == 1

    run(scenario())


def test_running_keeps_the_view_within_half_a_period_and_survives_failures() -> None:
    async def scenario() -> None:
        swarm = FakeSwarm("0:20")
        tracker = swarm.tracker()
        async with asyncio.TaskGroup() as group:
            running = group.create_task(tracker.run())
            await asyncio.sleep(25)
            swarm.is_broken = True
            await asyncio.sleep(20)
            swarm.is_broken = False
            await asyncio.sleep(15)
            running.cancel()
        assert swarm.num_lookups == 6  # one every 10 s
        assert len(tracker.view().servers) == 1

    run(scenario())


def test_a_fresh_view_is_taken_as_it_is_and_an_old_one_refreshed() -> None:
    async def scenario() -> None:
        swarm = FakeSwarm("0:20")
        tracker = swarm.tracker()
        await tracker.fresh_view()
        await asyncio.sleep(19)
        await tracker.fresh_view()
        assert swarm.num_lookups == 1
        await asyncio.sleep(2)
        await tracker.fresh_view()
        assert swarm.num_lookups == 2

    run(scenario())


def test_who_waits_for_a_change_is_told_soon() -> None:
    async def scenario() -> None:
        swarm = FakeSwarm("0:10")
        tracker = swarm.tracker()
        loop = asyncio.get_running_loop()
        async with asyncio.TaskGroup() as group:
            running = group.create_task(tracker.run())
            await asyncio.sleep(5)
            waiting = group.create_task(tracker.wait_for_change(60))
            await asyncio.sleep(3)
            swarm.presences.append(
                Presence(IDENTITIES[1].peer_id, Span(10, 20), Numerics("float32"))
            )
            joined_at = loop.time()
            assert await waiting
            assert loop.time() - joined_at < 2.5
            assert tracker.view().missing() == ()
            running.cancel()

    run(scenario())


def test_waiting_for_a_change_that_does_not_come_ends_in_time() -> None:
    async def scenario() -> None:
        swarm = FakeSwarm("0:10")
        tracker = swarm.tracker()
        async with asyncio.TaskGroup() as group:
            running = group.create_task(tracker.run())
            await asyncio.sleep(1)
            assert not await tracker.wait_for_change(15)
            after = swarm.num_lookups
            await asyncio.sleep(20)
            assert swarm.num_lookups - after <= 3  # back to the usual period
            running.cancel()

    run(scenario())


# --- pings -----------------------------------------------------------------------------------


def test_first_middle_and_last_servers_are_pinged_alike_within_the_bound() -> None:
    async def scenario() -> None:
        swarm = FakeSwarm(*["0:5"] * 10, *["5:15"] * 10, *["15:20"] * 10)
        tracker = swarm.tracker()
        await tracker.refresh()
        starts = {p.peer_id: p.span.start for p in swarm.presences}
        assert sorted(starts[peer] for peer in swarm.pinged) == [0, 0, 5, 5, 15, 15]

    run(scenario())


def test_every_server_is_measured_in_the_end() -> None:
    async def scenario() -> None:
        swarm = FakeSwarm(*["0:5"] * 10, *["5:15"] * 10, *["15:20"] * 10)
        tracker = swarm.tracker()
        for _ in range(5):
            await tracker.refresh()
        assert all(server.rtt_s == 0.05 for server in tracker.view().servers)
        assert len(swarm.pinged) == 30

    run(scenario())


def test_a_server_of_the_whole_model_is_pinged_once_a_refresh() -> None:
    async def scenario() -> None:
        swarm = FakeSwarm("0:20")
        await swarm.tracker().refresh()
        assert swarm.pinged == [IDENTITIES[0].peer_id]

    run(scenario())


def test_an_unreachable_server_is_penalised_and_holds_up_nobody() -> None:
    async def scenario() -> None:
        swarm = FakeSwarm("0:20", "0:20")
        swarm.unreachable = {IDENTITIES[0].peer_id}
        tracker = swarm.tracker()
        await tracker.refresh()
        await tracker.refresh()
        view = tracker.view()
        assert view.is_penalised(view.by_peer[IDENTITIES[0].peer_id])
        assert view.by_peer[IDENTITIES[1].peer_id].rtt_s == 0.05
        assert swarm.pinged.count(IDENTITIES[0].peer_id) == 1  # left alone while penalised

    run(scenario())


def test_a_suspected_server_is_pinged_before_others_when_its_penalty_is_over() -> None:
    async def scenario() -> None:
        swarm = FakeSwarm(*["0:10", "10:20"] * 10)
        tracker = swarm.tracker(replace(CONFIG, max_pings=1))
        await tracker.refresh()
        peer = next(p.peer_id for p in swarm.presences if p.peer_id not in swarm.pinged)
        tracker.measurements.on_failure(peer, asyncio.get_running_loop().time())
        await asyncio.sleep(PENALTY_S)
        was_suspected = tracker.view().is_penalised(tracker.view().by_peer[peer])
        await tracker.refresh()
        assert swarm.pinged[-1] == peer
        assert was_suspected
        assert not tracker.view().is_penalised(tracker.view().by_peer[peer])

    run(scenario())


def test_a_ping_that_never_ends_is_cut_off() -> None:
    async def scenario() -> None:
        swarm = FakeSwarm("0:20")
        swarm.rtt_s = 1000.0
        tracker = swarm.tracker()
        await tracker.refresh()
        view = tracker.view()
        assert asyncio.get_running_loop().time() < 3
        assert view.is_penalised(view.servers[0])

    run(scenario())


def test_servers_that_take_no_sessions_are_not_pinged() -> None:
    async def scenario() -> None:
        swarm = FakeSwarm("0:20", "0:20")
        swarm.presences[0] = replace(swarm.presences[0], state=ServerState.DRAINING)
        await swarm.tracker().refresh()
        assert swarm.pinged == [IDENTITIES[1].peer_id]

    run(scenario())


# --- who is allowed, and other models --------------------------------------------------------


def test_blocked_servers_are_not_seen_and_allowed_ones_alone_are() -> None:
    async def scenario() -> None:
        swarm = FakeSwarm("0:20", "0:20", "0:20")
        names = [str(identity.peer_id) for identity in IDENTITIES[:3]]
        blocking = swarm.tracker(replace(CONFIG, blocked_servers=frozenset(names[:1])))
        allowing = swarm.tracker(replace(CONFIG, allowed_servers=frozenset(names[:1])))
        await blocking.refresh()
        await allowing.refresh()
        assert {str(s.peer_id) for s in blocking.view().servers} == set(names[1:])
        assert {str(s.peer_id) for s in allowing.view().servers} == set(names[:1])

    run(scenario())


class FakeIndex:
    """A DHT with one entry in the index of models, and one that is broken."""

    async def get(self, namespace: str, name: str) -> list[Record]:
        assert (namespace, name) == (MODELS_NAMESPACE, MODELS_NAME)
        listing = ModelListing(IDENTITIES[0].peer_id, MODEL, 20, 64)
        bodies = [listing.to_body(), {"digest": b"short"}]
        return [
            make_record(
                MODELS_NAMESPACE,
                bytes(32),
                identity.peer_id,
                seq=1,
                issued=0.0,
                expires=1.0,
                body=body,
                sign=identity.sign,
            )
            for identity, body in zip(IDENTITIES, bodies, strict=False)
        ]


def test_models_are_listed_without_knowing_them() -> None:
    async def scenario() -> None:
        listings = await read_models(FakeIndex())
        assert [(x.model.name, x.num_blocks, x.hidden_size) for x in listings] == [("tiny", 20, 64)]

    run(scenario())
