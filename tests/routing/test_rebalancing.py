"""When a server moves: one server's rule, and whole swarms of them with old news of each other."""

import heapq
import random
from bisect import bisect_right, insort
from dataclasses import dataclass, field, replace

import pytest

from p2pllm.ids import PeerId
from p2pllm.routing.placement import (
    Move,
    Placed,
    Placement,
    choose_span,
    holders_to_check,
    is_still_right,
    next_move,
)
from p2pllm.routing.rebalancing import (
    LOOK_S,
    MIN_STAY_S,
    PASSED_OVER_S,
    PROMISE_S,
    TURN_S,
    URGENT_LOOK_S,
    URGENT_STAY_S,
    MoveRule,
    Promises,
)
from p2pllm.spans import Span
from tests.routing.test_placement import a_placement, covered, peer

LACKING = a_placement("0:5", "0:5")  # 5:10 has nobody, and peer 0 is the first of two to go
WEAK = a_placement("0:5", "0:5", "0:5", "5:10")  # 5:10 has a third of what 0:5 has


# --- one server ------------------------------------------------------------------------------


def test_a_move_must_be_right_at_two_looks() -> None:
    rule = MoveRule(peer(0), joined_at=0.0)
    assert rule.on_look(LACKING, 100.0) is None
    assert rule.on_look(LACKING, 103.0) == Span(5, 10)


def test_a_move_that_was_not_needed_in_between_starts_again() -> None:
    rule = MoveRule(peer(0), joined_at=0.0)
    rule.on_look(LACKING, 100.0)
    assert rule.on_look(a_placement("0:5", "5:10"), 103.0) is None
    assert rule.on_look(LACKING, 113.0) is None


def test_looks_are_closer_while_blocks_are_lacking() -> None:
    rule = MoveRule(peer(0), joined_at=0.0)
    assert rule.next_look_s == LOOK_S
    rule.on_look(LACKING, 100.0)
    assert rule.next_look_s == URGENT_LOOK_S
    rule.on_look(WEAK, 110.0)
    assert rule.next_look_s == LOOK_S


@pytest.mark.parametrize(
    ("placement", "stay_s"), [(LACKING, URGENT_STAY_S), (WEAK, MIN_STAY_S)], ids=str
)
def test_a_server_stays_for_a_while_where_it_is(placement: Placement, stay_s: float) -> None:
    rule = MoveRule(peer(0), joined_at=0.0)
    rule.on_moved(100.0)
    rule.on_look(placement, 100.0)
    assert rule.on_look(placement, 100.0 + stay_s - 1.0) is None
    assert rule.on_look(placement, 100.0 + stay_s) == Span(5, 10)


def test_nobody_moves_out_of_turn() -> None:
    rule = MoveRule(peer(1), joined_at=0.0)
    assert [rule.on_look(LACKING, now) for now in (100.0, 103.0, 106.0)] == [None] * 3


def test_who_does_not_take_its_turn_is_passed_over_for_a_while() -> None:
    rule = MoveRule(peer(1), joined_at=0.0)
    rule.on_look(LACKING, 100.0)
    rule.on_look(LACKING, 100.0 + TURN_S)
    rule.on_look(LACKING, 103.0 + TURN_S)
    assert rule.on_look(LACKING, 106.0 + TURN_S) == Span(5, 10)
    assert rule.on_look(LACKING, 100.0 + TURN_S + PASSED_OVER_S) is None


# --- promises --------------------------------------------------------------------------------


def test_who_has_promised_does_not_leave_before_it_is_over() -> None:
    promises = Promises()
    assert promises.promise(Span(2, 4), Span(0, 5), now=0.0)
    assert not promises.begin({3, 4}, now=PROMISE_S - 1.0)
    assert promises.begin({0, 1, 4}, now=PROMISE_S - 1.0)
    assert promises.begin({3, 4}, now=PROMISE_S)


def test_who_is_about_to_leave_promises_only_what_it_keeps() -> None:
    promises = Promises()
    promises.begin({0, 1}, now=0.0)
    assert not promises.promise(Span(1, 3), Span(0, 5), now=1.0)
    assert promises.promise(Span(2, 5), Span(0, 5), now=1.0)
    promises.end()
    assert promises.promise(Span(1, 3), Span(0, 5), now=2.0)


def test_nobody_promises_what_it_does_not_have() -> None:
    assert not Promises().promise(Span(2, 6), Span(0, 5), now=0.0)


# --- swarms ----------------------------------------------------------------------------------

NUM_BLOCKS = 24
STALE_S = 40.0  # a record is stored again after 40 s: nothing that is alive is older
RECORD_S = 120.0
SETTLE_S = 1.5
LOAD_S = (2.0, 30.0)


@dataclass(eq=False)
class Member:
    """A server: what it has said, when, and what is true."""

    said: list[Placed]
    said_at: list[float]
    rule: MoveRule
    is_alive: bool = True
    gone: set[PeerId] = field(default_factory=set)
    promises: Promises = field(default_factory=Promises)
    num_moves: int = 0

    @property
    def now_says(self) -> Placed:
        return self.said[-1]

    def say(self, placed: Placed, now: float) -> None:
        self.said.append(placed)
        self.said_at.append(now)


class Swarm:
    """Servers that look, decide and move; each hears of each other with a delay of its own."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.members: dict[PeerId, Member] = {}
        self.delays: dict[tuple[PeerId, PeerId], float] = {}
        self.queue: list[tuple[float, int, str, PeerId, Span | None]] = []
        self.moves: list[float] = []
        self.gaps_by_moves: list[float] = []
        self.number = 0

    def at(self, when: float, what: str, peer_id: PeerId, span: Span | None = None) -> None:
        self.number += 1
        heapq.heappush(self.queue, (when, self.number, what, peer_id, span))

    def run(self, until: float) -> None:
        while self.queue and self.queue[0][0] <= until:
            now, _, what, peer_id, span = heapq.heappop(self.queue)
            if what == "join":
                self.join(peer_id, now)
            elif what == "leave":
                self.members[peer_id].is_alive = False
            elif self.members[peer_id].is_alive:
                member = self.members[peer_id]
                if what == "look":
                    self.look(member, now)
                elif what == "settled" and span is not None:
                    self.settled(member, span, now)
                elif span is not None:
                    self.arrive(member, span, now)

    def truth(self) -> Placement:
        alive = [m.now_says for m in self.members.values() if m.is_alive]
        return Placement(NUM_BLOCKS, tuple(sorted(alive, key=lambda s: s.peer_id)))

    def join(self, peer_id: PeerId, now: float) -> None:
        length, rate = self.rng.randint(2, 12), 10.0 * 2 ** self.rng.uniform(0, 5)
        span = choose_span(self.seen_by(peer_id, now), length)
        says = Placed(peer_id, span, span, rate, is_movable=True)
        self.members[peer_id] = Member([says], [now], MoveRule(peer_id, now))
        self.members = dict(sorted(self.members.items(), key=lambda item: item[0].key))
        self.at(now + self.rng.uniform(0, LOOK_S), "look", peer_id)

    def seen_by(self, reader: PeerId, now: float, own: Placed | None = None) -> Placement:
        """What others have said, as far as it has come here, less who is known to be gone."""
        seen, has_ghosts = [], False
        for peer_id, member in self.members.items():
            if peer_id == reader:
                continue
            delay = self.delays.setdefault((reader, peer_id), self.rng.uniform(0, STALE_S))
            index = bisect_right(member.said_at, now - delay) - 1
            if index >= 0 and (member.is_alive or now - member.said_at[-1] < RECORD_S):
                seen.append(member.said[index])
                has_ghosts |= not member.is_alive
        if own is None:
            return Placement(NUM_BLOCKS, tuple(seen))
        if has_ghosts:
            self.ping(self.members[reader], Placement(NUM_BLOCKS, tuple(seen)))
        living = [server for server in seen if server.peer_id not in self.members[reader].gone]
        insort(living, own, key=lambda server: server.peer_id.key)
        return Placement(NUM_BLOCKS, tuple(living))

    def ping(self, member: Member, others: Placement) -> None:
        alive: set[PeerId] = set()
        gone: set[PeerId] = set()
        while asked := holders_to_check(others, range(NUM_BLOCKS), alive=alive, gone=gone):
            for each in asked:
                (alive if self.members[each].is_alive else gone).add(each)
        member.gone = (member.gone | gone) - alive

    def look(self, member: Member, now: float) -> None:
        own = member.now_says
        span = member.rule.on_look(self.seen_by(own.peer_id, now, own), now)
        if span is not None and member.promises.begin(set(own.span) - set(span), now):
            going = replace(own, span=span, holds=own.span.overlap(span), is_movable=False)
            member.say(going, now)
            self.at(now + SETTLE_S, "settled", own.peer_id, own.span)
            return
        pause = member.rule.next_look_s * self.rng.uniform(0.7, 1.3)
        self.at(now + pause, "look", own.peer_id)

    def settled(self, member: Member, here: Span, now: float) -> None:
        going = member.now_says
        own = replace(going, span=here, holds=here, is_movable=True)
        seen = self.seen_by(own.peer_id, now, own)
        is_right = is_still_right(seen, Move(own.peer_id, going.span))
        if is_right and self.are_kept(seen, own, set(here) - set(going.span), now):
            self.note_gap(own, going, now)
            member.num_moves += 1
            self.moves.append(now)
            self.at(now + self.rng.uniform(*LOAD_S), "arrive", own.peer_id, going.span)
        else:
            member.say(own, now)
            member.promises.end()
            member.rule.on_moved(now)
            self.at(now + LOOK_S, "look", own.peer_id)

    def are_kept(self, seen: Placement, own: Placed, blocks: set[int], now: float) -> bool:
        """As the balancer asks for promises; those who answer know themselves."""
        others, yes, no = seen.without({own.peer_id}), set[PeerId](), set[PeerId]()
        while asked := holders_to_check(others, sorted(blocks), alive=yes, gone=no):
            for each in asked:
                member, said = self.members[each], others.by_peer[each].holds or ()
                held = sorted(blocks.intersection(said))
                here = member.now_says.holds
                is_kept = (
                    member.is_alive
                    and here is not None
                    and member.promises.promise(Span(held[0], held[-1] + 1), here, now)
                )
                (yes if is_kept else no).add(each)
        kept = others.only(yes).num_holders
        return all(kept[block] for block in blocks)

    def note_gap(self, own: Placed, going: Placed, now: float) -> None:
        """Does this move leave a block alone that somebody serves now?"""
        others = self.truth().without({own.peer_id})
        before = Placement(NUM_BLOCKS, (*others.servers, own))
        after = Placement(NUM_BLOCKS, (*others.servers, going))
        if covered(after) < covered(before):
            self.gaps_by_moves.append(now)

    def arrive(self, member: Member, span: Span, now: float) -> None:
        own = replace(member.now_says, span=span, holds=span, is_movable=True)
        member.say(own, now)
        member.promises.end()
        member.rule.on_moved(now)
        self.at(now + LOOK_S, "look", own.peer_id)


def churned(seed: int, *, num_servers: int) -> tuple[Swarm, float]:
    """A swarm of which a third leaves without a word while a third is still coming.

    Returns it when it has been quiet for some minutes, and the time at which it became quiet.
    """
    swarm = Swarm(seed)
    for number in range(num_servers):
        came = swarm.rng.uniform(0, 80) if number % 3 else swarm.rng.uniform(0, 40)
        swarm.at(came, "join", peer(number))
        if number % 3 == 0:
            swarm.at(swarm.rng.uniform(50, 100), "leave", peer(number))
    swarm.run(550.0)
    return swarm, 100.0


def test_two_hundred_servers_with_old_news_come_to_rest() -> None:
    """Nobody runs to and fro, no move leaves a block alone, and in the end all are strong."""
    swarm, quiet_at = churned(0, num_servers=200)
    end = swarm.truth()
    assert swarm.gaps_by_moves == []
    assert covered(end) == set(range(NUM_BLOCKS))
    assert max(member.num_moves for member in swarm.members.values()) <= 2
    assert not [when for when in swarm.moves if when > quiet_at + MIN_STAY_S + RECORD_S]
    assert end.quality[0] * NUM_BLOCKS > 0.7 * sum(end.throughputs)


@pytest.mark.parametrize("seed", range(6))
def test_small_swarms_that_lose_servers_lose_no_block_by_moving(seed: int) -> None:
    swarm, _ = churned(seed, num_servers=18)
    assert swarm.gaps_by_moves == []
    end = swarm.truth()
    if end.num_lacking:  # then no single server could go there without leaving others alone
        assert next_move(end) is None
