"""Which span a server takes, and when it would be better off with another."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pllm.errors import ConfigError
from p2pllm.ids import PeerId
from p2pllm.routing.placement import (
    Move,
    Placed,
    Placement,
    best_response,
    choose_span,
    equilibrium,
    holders_to_check,
    is_still_right,
    next_move,
    settle,
)
from p2pllm.spans import Span
from p2pllm.swarm.announcements import Presence, ServerState
from p2pllm.wire.messages import Numerics


def peer(number: int) -> PeerId:
    return PeerId(number.to_bytes(32, "big"))


def a_presence(
    number: int, span: str, rate: float = 100.0, state: ServerState = ServerState.ONLINE
) -> Presence:
    return Presence(
        peer(number), Span.parse(span), Numerics("float32"), state, prefill_tokens_s=rate
    )


def placed(
    number: int, span: str, rate: float = 100.0, *, is_fixed: bool = False, is_joining: bool = False
) -> Placed:
    place = Span.parse(span)
    holds = None if is_joining else place
    return Placed(peer(number), place, holds, rate, not is_fixed, is_joining)


def a_placement(*servers: tuple[str, float] | str, num_blocks: int = 10) -> Placement:
    """Movable servers 0, 1, 2, … as span and rate, 100 where none is said."""
    pairs = [(server, 100.0) if isinstance(server, str) else server for server in servers]
    return Placement(num_blocks, tuple(placed(number, *pair) for number, pair in enumerate(pairs)))


def covered(placement: Placement) -> set[int]:
    return {block for block in range(placement.num_blocks) if placement.num_holders[block]}


# --- what presences say ----------------------------------------------------------------------


def test_a_server_offers_its_rate_over_half_its_blocks() -> None:
    placement = Placement.of([a_presence(0, "2:5", 100.0)], 10)
    assert placement.throughputs[1:6] == [0, 50_000, 50_000, 50_000, 0]


def test_joining_servers_count_and_leaving_ones_do_not() -> None:
    joining = Placement.of([a_presence(0, "0:5", state=ServerState.JOINING)], 10)
    draining = Placement.of([a_presence(0, "0:5", state=ServerState.DRAINING)], 10)
    assert choose_span(joining, 5) == Span(5, 10)
    assert choose_span(draining, 5) == Span(0, 5)


def test_nobody_relies_on_a_server_that_still_loads() -> None:
    placement = Placement.of([a_presence(0, "0:5", state=ServerState.JOINING)], 10)
    assert covered(placement) == set()


def test_a_moving_server_counts_where_it_goes_and_holds_what_it_keeps() -> None:
    going = replace(a_presence(0, "0:5"), next_span=Span(3, 8))
    placement = Placement.of([going], 10)
    assert [block for block, rate in enumerate(placement.throughputs) if rate] == [3, 4, 5, 6, 7]
    assert covered(placement) == {3, 4}


def test_a_server_of_blocks_that_the_model_does_not_have_is_left_out() -> None:
    assert Placement.of([a_presence(0, "5:20")], 10).servers == ()


# --- joining ---------------------------------------------------------------------------------


def test_the_first_server_starts_at_the_first_block() -> None:
    assert choose_span(a_placement(), 4) == Span(0, 4)


def test_blocks_that_nobody_serves_come_first() -> None:
    assert choose_span(a_placement("0:4", ("6:10", 1.0)), 2) == Span(4, 6)


def test_a_window_with_the_weakest_block_wins_over_one_that_is_weak_on_average() -> None:
    placement = a_placement(("0:1", 1.0), ("1:4", 1000.0), ("4:10", 20.0))
    assert choose_span(placement, 2) == Span(0, 2)


def test_the_second_weakest_block_decides_where_the_weakest_are_equal() -> None:
    placement = a_placement(("0:4", 50.0), ("5:10", 30.0))  # 4 is empty; 20 before it, 10 after
    assert choose_span(placement, 2) == Span(4, 6)


def test_a_server_that_comes_back_keeps_its_place_among_equal_ones() -> None:
    placement = a_placement("0:5", "5:10")
    assert choose_span(placement, 5, kept=Span(5, 10)) == Span(5, 10)
    assert choose_span(placement, 5, kept=Span(2, 7)) == Span(2, 7)


def test_a_server_that_comes_back_goes_where_blocks_are_lacking() -> None:
    assert choose_span(a_placement("0:5"), 5, kept=Span(0, 5)) == Span(5, 10)


def test_a_place_of_another_length_is_not_kept() -> None:
    assert choose_span(a_placement(), 4, kept=Span(5, 10)) == Span(0, 4)


@pytest.mark.parametrize("num_blocks", [0, -1, 11])
def test_impossible_numbers_of_blocks_are_refused(num_blocks: int) -> None:
    with pytest.raises(ConfigError, match="the model has 10"):
        choose_span(a_placement(), num_blocks)


@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=12),
    st.lists(st.integers(1, 30), max_size=4),
)
@settings(max_examples=60)
def test_servers_that_join_together_part_within_a_few_looks(
    lengths: list[int], present: list[int]
) -> None:
    """They all announce what they would choose alone, then look again and again."""
    online = tuple(placed(100 + i, f"0:{n}", is_fixed=True) for i, n in enumerate(present))
    alone = Placement(30, online)
    joining = tuple(
        placed(number, str(choose_span(alone, length)), is_joining=True)
        for number, length in enumerate(lengths)
    )
    for _ in range(2):
        seen = Placement(30, (*joining, *online))
        joining = tuple(replace(s, span=settle(seen, s.peer_id)) for s in joining)
    again = Placement(30, (*joining, *online))
    assert all(settle(again, s.peer_id) == s.span for s in joining)
    one_by_one = alone
    for server in joining:
        span = choose_span(one_by_one, len(server.span))
        one_by_one = Placement(30, (*one_by_one.servers, replace(server, span=span)))
    assert again.num_lacking <= one_by_one.num_lacking


def test_four_that_join_together_with_half_the_model_each_cover_it_twice() -> None:
    joining = [placed(number, "0:5", is_joining=True) for number in range(4)]
    seen = Placement(10, tuple(joining))
    spans = [settle(seen, server.peer_id) for server in joining]
    assert spans == [Span(0, 5), Span(5, 10), Span(0, 5), Span(5, 10)]


# --- moving ----------------------------------------------------------------------------------


def test_a_well_placed_swarm_stays_as_it_is() -> None:
    assert next_move(a_placement("0:5", "5:10", "0:5", "5:10")) is None


def test_one_of_two_like_servers_goes_where_blocks_are_lacking_and_the_first_of_them() -> None:
    placement = a_placement("0:5", "0:5")
    assert next_move(placement) == Move(peer(0), Span(5, 10))


def test_the_last_server_of_a_block_stays() -> None:
    placement = a_placement("0:5", num_blocks=20)
    assert best_response(placement, placement.servers[0]) is None
    assert next_move(a_placement("0:5", "0:5", "10:15", num_blocks=20)) is not None


def test_a_server_moves_as_far_as_its_own_blocks_allow() -> None:
    placement = a_placement("0:4", ("4:7", 1.0), num_blocks=8)
    server = placement.servers[1]
    assert best_response(placement, server) is None  # 7 is empty, but nobody else has 4
    beside = Placement(8, (*placement.servers, placed(2, "4:5")))
    assert best_response(beside, server) == Span(5, 8)


def test_servers_that_do_not_move_are_not_asked_to() -> None:
    fixed = Placement(10, (placed(0, "0:5", is_fixed=True), placed(1, "0:5")))
    assert next_move(fixed) == Move(peer(1), Span(5, 10))
    assert next_move(fixed.with_fixed({peer(1)})) is None


def test_a_small_gain_moves_nobody() -> None:
    nearly = a_placement(("0:5", 100.0), ("0:5", 100.0), ("5:10", 100.0), ("5:10", 75.0))
    assert next_move(nearly) is None


def test_two_who_would_leave_the_same_block_cannot_both() -> None:
    both = Placement.of(
        [
            replace(a_presence(0, "0:5"), is_movable=True),
            replace(a_presence(1, "0:5"), next_span=Span(5, 10)),
        ],
        15,
    )
    assert not is_still_right(both, Move(peer(0), Span(10, 15)))
    alone = Placement.of([replace(a_presence(0, "0:5"), is_movable=True), a_presence(1, "0:5")], 15)
    assert is_still_right(alone, Move(peer(0), Span(10, 15)))


def test_a_move_that_another_is_making_already_is_not_right_any_more() -> None:
    seen = Placement.of(
        [
            replace(a_presence(0, "0:5"), is_movable=True),
            a_presence(1, "0:5"),
            replace(a_presence(2, "0:5"), next_span=Span(5, 10)),
        ],
        10,
    )
    assert not is_still_right(seen, Move(peer(0), Span(5, 10)))


@st.composite
def placements(draw: st.DrawFn) -> Placement:
    num_blocks = draw(st.integers(1, 20))
    servers = []
    for number in range(draw(st.integers(0, 10))):
        length = draw(st.integers(1, num_blocks))
        start = draw(st.integers(0, num_blocks - length))
        rate = draw(st.sampled_from([1.0, 10.0, 100.0]) | st.floats(0.1, 1e6))
        servers.append(
            placed(number, f"{start}:{start + length}", rate, is_fixed=draw(st.booleans()))
        )
    return Placement(num_blocks, tuple(servers))


@given(placements(), st.data())
@settings(max_examples=100)
def test_no_sequence_of_best_responses_loses_a_block_or_comes_back(
    placement: Placement, data: st.DataObject
) -> None:
    """In any order, also against the rule that says who is next."""
    seen = [placement.quality]
    for _ in range(30):
        responses = [
            Move(server.peer_id, span)
            for server in placement.servers
            if (span := best_response(placement, server)) is not None
        ]
        if not responses:
            break
        after = placement.moved(data.draw(st.sampled_from(responses)))
        assert covered(after) >= covered(placement)
        assert after.quality > seen[-1]  # so no placement is seen twice
        placement = after
        seen.append(placement.quality)


@given(placements())
@settings(max_examples=100)
def test_moves_come_to_an_end_and_stay_there_for_a_thousand_rounds(placement: Placement) -> None:
    before, num_moves = placement, 0
    for _ in range(1000):
        move = next_move(placement)
        if move is None:
            break  # it is a function of the placement: all further rounds are the same
        placement, num_moves = placement.moved(move), num_moves + 1
    assert next_move(placement) is None
    assert num_moves <= 5 * len(placement.servers)
    assert covered(placement) >= covered(before)
    assert placement.num_lacking <= before.num_lacking


@given(placements())
@settings(max_examples=50)
def test_the_same_knowledge_gives_the_same_move(placement: Placement) -> None:
    shuffled = Placement.of([], placement.num_blocks)
    shuffled = replace(shuffled, servers=tuple(sorted(placement.servers, key=lambda s: s.peer_id)))
    assert next_move(shuffled) == next_move(placement)


def test_a_large_swarm_finds_its_balance() -> None:
    """200 servers that all came to the front end up with every block about as strong."""
    rates = [10.0 * 2 ** (number % 5) for number in range(200)]
    crowd = tuple(placed(number, f"0:{1 + number % 7}", rate) for number, rate in enumerate(rates))
    end = equilibrium(Placement(80, crowd))
    mean = sum(end.throughputs) / 80
    assert end.quality[0] > 0.85 * mean


# --- who is alive ----------------------------------------------------------------------------


def test_a_chain_of_pings_covers_every_block_once() -> None:
    placement = a_placement("0:5", "0:3", "3:6", "5:10", "5:10")
    asked = holders_to_check(placement, range(10), alive=(), gone=())
    assert asked == (peer(0), peer(4))


def test_who_answered_before_is_asked_first() -> None:
    placement = a_placement("0:5", "0:3", "3:6", "5:10", "5:10")
    asked = holders_to_check(placement, range(10), alive=(), gone=(), trusted={peer(1), peer(3)})
    assert asked == (peer(1), peer(2), peer(3))


def test_others_are_asked_where_one_did_not_answer() -> None:
    placement = a_placement("0:5", "0:3", "3:6", "5:10", "5:10")
    asked = holders_to_check(placement, range(10), alive={peer(4)}, gone={peer(0)})
    assert asked == (peer(1), peer(2))


@given(placements(), st.sets(st.integers(0, 9)))
@settings(max_examples=60)
def test_asking_ends_with_every_block_that_has_a_living_holder_known(
    placement: Placement, dead: set[int]
) -> None:
    alive: set[PeerId] = set()
    gone: set[PeerId] = set()
    while asked := holders_to_check(placement, range(placement.num_blocks), alive=alive, gone=gone):
        assert not alive & set(asked)
        for each in asked:
            (gone if int.from_bytes(each.key, "big") in dead else alive).add(each)
    living = placement.without({peer(number) for number in dead})
    known = Placement(placement.num_blocks, tuple(placement.by_peer[each] for each in alive))
    assert covered(known) == covered(living)
