"""What a client believes of the swarm: announcements, measurements, and which one wins."""

from dataclasses import replace

import pytest

from p2pllm.ids import ModelId, PeerId
from p2pllm.spans import Span
from p2pllm.swarm import view as view_module
from p2pllm.swarm.announcements import Presence, ServerState
from p2pllm.swarm.timings import SegmentStep
from p2pllm.swarm.view import (
    BROKEN_LINK_S,
    FRESH_LINK_S,
    FRESH_TIMING_S,
    MAX_PENALTY_S,
    PENALTY_S,
    RTT_WINDOW_S,
    SUSPECT_S,
    UNKNOWN_BANDWIDTH_BYTES_S,
    UNKNOWN_RTT_S,
    LinkSource,
    Measurements,
    SwarmView,
    build_view,
)
from p2pllm.wire.messages import HopTiming, Numerics

MODEL = ModelId(bytes(32), "tiny")
A, B, C = (PeerId(letter * 32) for letter in (b"a", b"b", b"c"))
NOW = 1000.0


def a_presence(peer: PeerId, span: str, state: ServerState = ServerState.ONLINE) -> Presence:
    return Presence(
        peer,
        Span.parse(span),
        Numerics("float32"),
        state,
        seconds_per_block_1=0.01,
        seconds_per_block_8=0.024,
        prefill_tokens_s=1000.0,
        queue_s=0.5,
    )


def a_view(
    *presences: Presence, measurements: Measurements | None = None, now: float = NOW
) -> SwarmView:
    return build_view(MODEL, 20, presences, measurements or Measurements(), now)


# --- who has which blocks --------------------------------------------------------------------


def test_missing_spans_are_those_without_an_online_server() -> None:
    view = a_view(a_presence(A, "0:5"), a_presence(B, "5:20", ServerState.JOINING))
    assert view.missing() == (Span(5, 20),)
    assert view.missing(Span(3, 7)) == (Span(5, 7),)


def test_servers_are_found_by_block() -> None:
    view = a_view(a_presence(A, "0:12"), a_presence(B, "10:20"))
    holders = [[server.peer_id for server in servers] for servers in view.by_block()]
    assert (holders[9], holders[10], holders[12]) == ([A], [A, B], [B])


def test_spans_of_a_deeper_model_are_left_out() -> None:
    assert a_view(a_presence(A, "0:21")).servers == ()


def test_equal_knowledge_gives_an_equal_view_in_whatever_order_it_came() -> None:
    one, other = a_presence(A, "0:10"), a_presence(B, "10:20")
    assert a_view(one, other) == a_view(other, one)


# --- links -----------------------------------------------------------------------------------


def test_a_measured_link_goes_before_an_announced_one_and_that_before_an_estimate() -> None:
    measurements = Measurements()
    presences = [replace(a_presence(A, "0:10"), rtts=((B, 0.2),)), a_presence(B, "10:20")]
    announced = a_view(*presences, a_presence(C, "10:20")).link(A, B)
    measurements.on_rtt(A, B, 0.1, NOW)
    measured = a_view(*presences, measurements=measurements).link(A, B)
    assert (announced.rtt_s, announced.source) == (0.2, LinkSource.ANNOUNCED)
    assert (measured.rtt_s, measured.source) == (0.1, LinkSource.MEASURED)


def test_a_round_trip_counts_in_both_directions() -> None:
    measurements = Measurements()
    measurements.on_rtt(A, B, 0.1, NOW)
    view = a_view(replace(a_presence(A, "0:10"), rtts=((C, 0.2),)), measurements=measurements)
    assert (view.link(B, A).rtt_s, view.link(C, A).rtt_s) == (0.1, 0.2)
    neighbours = {peer: set(links) for peer, links in view.known_links.items()}
    assert neighbours == {A: {B, C}, B: {A}, C: {A}}


def test_an_unknown_link_is_estimated_from_the_distances_to_both_ends() -> None:
    measurements = Measurements()
    measurements.on_rtt(None, A, 0.05, NOW)
    measurements.on_rtt(None, B, 0.08, NOW)
    view = a_view(a_presence(A, "0:10"), a_presence(B, "10:20"), measurements=measurements)
    assert (view.link(A, B).rtt_s, view.link(A, B).source) == (0.08, LinkSource.ESTIMATED)
    assert view.link(A, C).rtt_s == UNKNOWN_RTT_S


@pytest.mark.parametrize("ends", [(None, A), (A, None)])
def test_an_unmeasured_server_is_at_the_assumed_distance(ends: tuple[PeerId, PeerId]) -> None:
    link = a_view(a_presence(A, "0:10")).link(*ends)
    assert (link.rtt_s, link.source) == (UNKNOWN_RTT_S, LinkSource.ESTIMATED)


def test_a_link_is_forgotten_when_it_is_not_measured_again() -> None:
    measurements = Measurements()
    measurements.on_rtt(None, A, 0.05, NOW)
    later = a_view(a_presence(A, "0:10"), measurements=measurements, now=NOW + FRESH_LINK_S + 1)
    assert later.servers[0].rtt_s is None
    assert later.link(None, A).source is LinkSource.ESTIMATED


def test_old_samples_do_not_weigh_on_new_ones() -> None:
    measurements = Measurements()
    measurements.on_rtt(None, A, 5.0, NOW)
    measurements.on_rtt(None, A, 0.05, NOW + FRESH_LINK_S + 1)
    view = a_view(a_presence(A, "0:10"), measurements=measurements, now=NOW + FRESH_LINK_S + 2)
    assert view.client_rtt_s(A) == 0.05


def test_bandwidth_is_taken_from_large_transfers_only() -> None:
    measurements = Measurements()
    measurements.on_rtt(None, A, 0.05, NOW)
    measurements.on_transfer(None, A, 1000, 0.5, NOW)
    assert (
        a_view(measurements=measurements).link(None, A).bandwidth_bytes_s
        == UNKNOWN_BANDWIDTH_BYTES_S
    )
    measurements.on_transfer(None, A, 1_000_000, 0.5, NOW)
    assert a_view(measurements=measurements).link(None, A).bandwidth_bytes_s == 2e6


# --- servers ---------------------------------------------------------------------------------


def on_step(measurements: Measurements, *, batch: int = 1, num_tokens: int = 1) -> None:
    measurements.on_step(
        A, num_blocks=10, batch=batch, num_tokens=num_tokens, queue_s=0.1, compute_s=0.24, now=NOW
    )


def test_without_measurements_the_announcement_is_believed() -> None:
    server = a_view(a_presence(A, "0:10")).servers[0]
    assert server.expected_queue_s == 0.5
    assert server.expected_prefill_tokens_s == 1000.0
    assert server.seconds_per_block(8) == pytest.approx(0.024)


def test_measured_steps_go_before_the_announcement() -> None:
    measurements = Measurements()
    on_step(measurements)
    server = a_view(a_presence(A, "0:10"), measurements=measurements).servers[0]
    assert server.expected_queue_s == 0.1
    assert server.seconds_per_block(1) == pytest.approx(0.024)
    assert server.seconds_per_block(8) == pytest.approx(0.024 * 2.4)


def test_a_measured_batch_is_scaled_by_the_announced_curve() -> None:
    measurements = Measurements()
    on_step(measurements, batch=8, num_tokens=8)
    server = a_view(a_presence(A, "0:10"), measurements=measurements).servers[0]
    assert server.seconds_per_block(8) == pytest.approx(0.024)
    assert server.seconds_per_block(1) == pytest.approx(0.01)


def test_long_steps_measure_prefill_and_short_ones_neither() -> None:
    measurements = Measurements()
    on_step(measurements, num_tokens=5)
    on_step(measurements, num_tokens=48)
    server = a_view(a_presence(A, "0:10"), measurements=measurements).servers[0]
    # The announced line says 0.01 s + 47 × 0.246 s / 255 per block, and it took 0.024 s.
    announced_s = 0.01 + 47 * 0.246 / 255
    assert server.expected_prefill_tokens_s == pytest.approx(1000 * announced_s / 0.024)
    assert server.seconds_per_block_1 is None


def test_a_step_of_a_prompt_lies_on_the_line_through_one_token_and_a_whole_chunk() -> None:
    server = a_view(a_presence(A, "0:10")).servers[0]
    assert server.prefill_block_s(1) == pytest.approx(0.01)
    assert server.prefill_block_s(256) == pytest.approx(0.256)
    assert server.prefill_block_s(511) == pytest.approx(0.502)


def test_the_queue_is_that_of_decode_steps_for_the_chunks_of_a_prompt_wait_for_each_other() -> None:
    measurements = Measurements()
    on_step(measurements, num_tokens=256)
    server = a_view(a_presence(A, "0:10"), measurements=measurements).servers[0]
    assert server.expected_queue_s == 0.5


def test_timings_are_forgotten_after_a_minute() -> None:
    measurements = Measurements()
    on_step(measurements)
    later = NOW + FRESH_TIMING_S + 1
    server = a_view(a_presence(A, "0:10"), measurements=measurements, now=later).servers[0]
    assert server.expected_queue_s == 0.5
    assert server.seconds_per_block_1 is None


# --- steps through several hops --------------------------------------------------------------


def a_step(*timings: HopTiming, num_tokens: int = 1, total_s: float = 0.5) -> SegmentStep:
    return SegmentStep(
        peers=(A, B),
        spans=(Span(0, 10), Span(10, 20)),
        batch=1,
        num_tokens=num_tokens,
        sent_at=NOW - total_s,
        received_at=NOW,
        timings=timings,
        rtt_s=0.1,
        rate_bytes_s=1e6,
    )


def test_a_step_teaches_every_hop_and_every_link() -> None:
    measurements = Measurements()
    timings = HopTiming(0.01, 0.1, 0.0, 0.2, 2e6), HopTiming(0.02, 0.05, 0.0, 0.3, 3e6)
    measurements.on_segment(a_step(*timings), NOW)
    view = a_view(a_presence(A, "0:10"), a_presence(B, "10:20"), measurements=measurements)
    links = [view.link(*ends) for ends in ((None, A), (A, B), (B, None))]
    assert [(link.rtt_s, link.bandwidth_bytes_s) for link in links] == [
        (0.1, 1e6),
        (0.2, 2e6),
        (0.3, 3e6),
    ]
    assert [server.queue_s for server in view.servers] == [0.01, 0.02]
    assert view.servers[1].seconds_per_block(1) == pytest.approx(0.005)


def test_the_overhead_of_hops_is_what_decode_steps_took_beyond_all_that_is_known() -> None:
    measurements = Measurements()
    timings = HopTiming(0.0, 0.1, 0.0, 0.2), HopTiming(0.0, 0.08, 0.0, 0.3)
    measurements.on_segment(a_step(*timings), NOW)
    assert a_view(measurements=measurements).overhead_s == pytest.approx(0.01)
    measurements.on_segment(a_step(*timings, num_tokens=100, total_s=0.52), NOW)
    assert a_view(measurements=measurements).overhead_s == pytest.approx(0.01)


def test_timings_that_are_not_one_per_hop_teach_nothing() -> None:
    measurements = Measurements()
    measurements.on_segment(a_step(HopTiming(0.0, 0.1, 0.0, 0.2)), NOW)
    assert measurements.links(NOW) == {}


def test_a_link_that_works_again_is_not_broken_any_more() -> None:
    measurements = Measurements()
    measurements.on_link_broken(A, B, NOW - 1)
    timings = HopTiming(0.0, 0.1, 0.0, 0.2), HopTiming(0.0, 0.1, 0.0, 0.2)
    measurements.on_segment(a_step(*timings), NOW)
    assert not a_view(measurements=measurements).broken_links


@pytest.mark.parametrize(
    ("after_s", "expected"), [(0.0, 0.05), (RTT_WINDOW_S / 2, 0.05), (2 * RTT_WINDOW_S, 0.3)]
)
def test_the_smallest_round_trip_of_a_while_counts(after_s: float, expected: float) -> None:
    measurements = Measurements()
    for rtt_s in (0.2, 0.05, 0.4):
        measurements.on_rtt(None, A, rtt_s, NOW)
    measurements.on_rtt(None, A, 0.3, NOW + after_s)
    view = a_view(a_presence(A, "0:10"), measurements=measurements, now=NOW + after_s)
    assert view.client_rtt_s(A) == expected


# --- penalties -------------------------------------------------------------------------------


def penalty(measurements: Measurements) -> float:
    view = a_view(a_presence(A, "0:10"), measurements=measurements)
    return view.servers[0].penalty_until - NOW


def test_a_penalty_doubles_with_every_failure_up_to_a_bound() -> None:
    measurements = Measurements()
    lengths = []
    for _ in range(30):
        measurements.on_failure(A, NOW)
        lengths.append(penalty(measurements))
    assert lengths[:3] == [PENALTY_S, 2 * PENALTY_S, 4 * PENALTY_S]
    assert lengths[-1] == MAX_PENALTY_S


def test_a_step_that_works_ends_the_doubling_but_not_the_running_penalty() -> None:
    measurements = Measurements()
    for _ in range(5):
        measurements.on_failure(A, NOW)
    running = penalty(measurements)
    on_step(measurements)
    assert penalty(measurements) == running
    measurements.on_failure(A, NOW)
    assert penalty(measurements) == PENALTY_S


def is_penalised(measurements: Measurements, after_s: float) -> bool:
    view = a_view(a_presence(A, "0:10"), measurements=measurements, now=NOW + after_s)
    return view.is_penalised(view.servers[0])


def test_after_the_penalty_a_server_is_suspected_as_long_as_its_announcement_may_outlive_it() -> (
    None
):
    measurements = Measurements()
    measurements.on_failure(A, NOW)
    assert is_penalised(measurements, PENALTY_S - 1)
    assert is_penalised(measurements, PENALTY_S + 1)
    assert not is_penalised(measurements, SUSPECT_S + 1)


def test_a_server_that_answers_is_not_suspected_any_more_but_its_penalty_runs() -> None:
    measurements = Measurements()
    measurements.on_failure(A, NOW)
    measurements.on_rtt(None, A, 0.05, NOW + 1)
    assert is_penalised(measurements, PENALTY_S - 1)
    assert not is_penalised(measurements, PENALTY_S + 1)


def test_what_a_third_one_measured_says_nothing_of_a_suspected_server() -> None:
    measurements = Measurements()
    measurements.on_failure(A, NOW)
    measurements.on_rtt(B, A, 0.05, NOW + 1)
    assert is_penalised(measurements, PENALTY_S + 1)


def test_a_broken_link_penalises_neither_of_its_ends_and_is_forgotten() -> None:
    measurements = Measurements()
    measurements.on_link_broken(A, B, NOW)
    presences = a_presence(A, "0:10"), a_presence(B, "10:20")
    view = a_view(*presences, measurements=measurements)
    later = a_view(*presences, measurements=measurements, now=NOW + BROKEN_LINK_S + 1)
    assert view.broken_links == {(A, B)}
    assert not any(map(view.is_penalised, view.servers))
    assert not later.broken_links


def test_a_full_cache_is_waited_for_and_no_failure() -> None:
    measurements = Measurements()
    measurements.on_cache_full(A, 4.0, NOW - 1)
    view = a_view(a_presence(A, "0:10"), measurements=measurements)
    assert view.servers[0].cache_wait_s == 3.0
    assert not view.is_penalised(view.servers[0])


# --- bounds ----------------------------------------------------------------------------------


def test_memory_is_bounded_and_the_longest_untouched_go_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(view_module, "MAX_LINKS", 10)
    monkeypatch.setattr(view_module, "MAX_PEERS", 10)
    measurements = Measurements()
    for number in range(50):
        peer = PeerId(bytes([number]) * 32)
        measurements.on_rtt(None, peer, 0.1, NOW)
        measurements.on_failure(peer, NOW)
        measurements.on_failure(A, NOW)
    links = measurements.links(NOW)
    assert len(links) == 10
    assert (None, PeerId(bytes([49]) * 32)) in links
    assert measurements.server(a_presence(PeerId(bytes([1]) * 32), "0:1"), NOW).penalty_until == 0
    assert measurements.server(a_presence(A, "0:1"), NOW).penalty_until > NOW
