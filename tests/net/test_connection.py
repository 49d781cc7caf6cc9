"""Two connections that hand each other bytes, cut and damaged."""

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pllm.config import NetConfig
from p2pllm.errors import RemoteProtocolError
from p2pllm.identity import Identity
from p2pllm.net.budget import MemoryBudget
from p2pllm.net.connection import Connection, Established
from p2pllm.net.frames import Priority, StreamKind
from p2pllm.net.handshake import Handshake, Hello, StaticKeys
from p2pllm.net.noise import Role
from p2pllm.net.streams import StreamData

CONFIG = NetConfig()
KEYS = {
    role: StaticKeys.generate(Identity.from_seed(bytes([number]) * 32))
    for number, role in enumerate(Role)
}


def connection(role: Role, config: NetConfig = CONFIG) -> Connection:
    handshake = Handshake(role, KEYS[role], network_id=config.network_id, hello=Hello())
    return Connection(handshake, config, MemoryBudget(2**30))


def sent_by(side: Connection, now: float = 0.0) -> bytes:
    parts = []
    while (data := side.bytes_to_send(now)) is not None:
        parts.append(bytes(data))
    return b"".join(parts)


def roundtrip(first: Connection, second: Connection) -> bytes:
    """Hand bytes over until all is quiet; returns what `second` read on its streams."""
    read = bytearray()
    while True:
        there, back = sent_by(first), sent_by(second)
        if not there and not back:
            return bytes(read)
        if there:
            second.receive(there, 0.0)
        if back:
            first.receive(back, 0.0)
        while (event := second.next_event()) is not None:
            if isinstance(event, StreamData):
                read += event.data
                assert second.mux is not None
                second.mux.consume(event.stream, len(event.data))


def established() -> tuple[Connection, Connection]:
    first, second = connection(Role.INITIATOR), connection(Role.RESPONDER)
    roundtrip(first, second)
    return first, second


def open_stream(side: Connection, data: bytes) -> None:
    assert side.mux is not None
    side.mux.open(StreamKind.UNARY, Priority.DECODE, [data], deadline=10.0)


def test_both_sides_learn_who_the_other_is() -> None:
    first, second = established()
    event = first.next_event()
    assert isinstance(event, Established)
    assert event.hello.peer_id == KEYS[Role.RESPONDER].peer_id
    assert second.hello is not None
    assert second.hello.peer_id == KEYS[Role.INITIATOR].peer_id


def test_the_handshake_gives_the_first_round_trip() -> None:
    first, second = connection(Role.INITIATOR), connection(Role.RESPONDER)
    second.receive(sent_by(first, now=1.0), 1.02)
    first.receive(sent_by(second, now=1.02), 1.04)
    assert first.mux is not None
    assert first.mux.path.rtt_s == pytest.approx(0.04)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 3000))
def test_bytes_may_come_in_any_pieces(seed: int, most: int) -> None:
    rng = random.Random(seed)
    first, second = established()
    data = rng.randbytes(50_000)
    open_stream(first, data)
    wire = sent_by(first)
    while wire:
        size = rng.randint(1, most)
        second.receive(wire[:size], 0.0)
        wire = wire[size:]
    read = bytearray()
    while (event := second.next_event()) is not None:
        if isinstance(event, StreamData):
            read += event.data
    assert read == data


def test_a_stream_that_is_cut_off_waits_for_more() -> None:
    first, second = established()
    open_stream(first, bytes(1000))
    second.receive(sent_by(first)[:-1], 0.0)
    assert not [event for event in iter(second.next_event, None) if isinstance(event, StreamData)]


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32))
def test_any_damage_ends_in_a_remote_protocol_error_or_waits(seed: int) -> None:
    rng = random.Random(seed)
    first, second = established()
    open_stream(first, bytes(300))
    wire = bytearray(sent_by(first))
    wire[rng.randrange(len(wire))] ^= 1 << rng.randrange(8)
    read = b""
    try:
        second.receive(wire, 0.0)
        second.receive(bytes(70_000), 0.0)  # whatever was announced has come by now
    except RemoteProtocolError:
        return
    finally:
        while (event := second.next_event()) is not None:
            if isinstance(event, StreamData):
                read += bytes(event.data)
    raise AssertionError(f"damage went unnoticed: {read!r}")


@settings(max_examples=100, deadline=None)
@given(st.lists(st.binary(max_size=200), max_size=5))
def test_garbage_instead_of_a_handshake_ends_in_a_remote_protocol_error(
    chunks: list[bytes],
) -> None:
    for role in Role:
        side = connection(role)
        side.bytes_to_send(0.0)
        try:
            for chunk in chunks:
                side.receive(chunk, 0.0)
        except RemoteProtocolError:
            pass
        assert side.mux is None


def test_a_message_that_is_lost_or_repeated_is_noticed() -> None:
    for is_lost in (True, False):
        first, second = established()
        open_stream(first, b"one")
        wire = sent_by(first)
        open_stream(first, b"two")
        later = sent_by(first)
        if not is_lost:
            second.receive(wire, 0.0)
            later = wire
        with pytest.raises(RemoteProtocolError):
            second.receive(later, 0.0)


def test_small_frames_travel_together_and_large_ones_alone() -> None:
    first, second = established()
    for _ in range(5):
        open_stream(first, b"x" * 50)
    assert first.bytes_to_send(0.0) is not None
    assert first.bytes_to_send(0.0) is None
    open_stream(first, bytes(100_000))
    sizes = []
    while (data := first.bytes_to_send(0.0)) is not None:
        sizes.append(len(data))
    assert max(sizes) < CONFIG.frame_bytes + 100
    assert second.mux is not None


def test_closing_gives_the_memory_back() -> None:
    budget = MemoryBudget(2**30)
    handshake = Handshake(
        Role.RESPONDER, KEYS[Role.RESPONDER], network_id=CONFIG.network_id, hello=Hello()
    )
    second = Connection(handshake, replace(CONFIG, max_streams=8), budget)
    roundtrip(connection(Role.INITIATOR), second)
    assert budget.windows > 0
    second.close()
    assert budget.windows == 0
