"""When one server moves: the placement says who should, this says whether we do so now.

A move costs the blocks' loading and the replay of all sessions that were here, and what a server
knows of the swarm is up to a minute old. So

- a move must be our turn, and go to the same span, at two looks in a row;
- we have been where we are for a while: `MIN_STAY_S`, or `URGENT_STAY_S` if blocks are lacking;
- whoever's turn it is and does nothing for `TURN_S` (it hangs, or has just moved) is passed over
  for a while, by everybody alike.

No view is fresh enough to be sure that a block which we leave keeps a server. So its other servers
are asked to stay (`Stay` on the wire), and `Promises` is what each of them keeps: who has promised
does not move away for a while, and who is about to move promises nothing. Two who ask each other
both stay; two who both go have each had another's promise.

The one pattern: `on_look` is fed with each view of the swarm, `next_look_s` says when the next one
is due. No clock, and no network: telling others and looking once more before anything is left is
what `p2pllm.server.balancer` does with the answer.
"""

from collections.abc import Iterable

from p2pllm.ids import PeerId
from p2pllm.routing.placement import Move, Placement, next_move
from p2pllm.spans import Span

LOOK_S = 10.0  # a lookup in the DHT and a ping per hop: as often as a client looks
URGENT_LOOK_S = 3.0  # while blocks are lacking
MIN_STAY_S = 300.0  # twice the life of a record: by then the swarm has seen the last move
URGENT_STAY_S = 10.0
TURN_S = 15.0  # a look, a second one, and the time to say so
PASSED_OVER_S = 120.0
PROMISE_S = 60.0  # longer than a drain, and than the news of the move needs to be everywhere


class MoveRule:
    """The looks of one server at its swarm. `joined_at` is monotonic, as is every `now`."""

    def __init__(self, own: PeerId, joined_at: float) -> None:
        self._own = own
        self._came_at = joined_at
        self._wanted: Span | None = None  # what the last look was for
        self._turn: tuple[PeerId, float] | None = None  # of whom, since when
        self._passed_over: dict[PeerId, float] = {}  # until when
        self._is_urgent = False
        self._thought: tuple[Placement, Move | None] | None = None

    @property
    def next_look_s(self) -> float:
        """Seconds until the next look; the shell adds its jitter."""
        return URGENT_LOOK_S if self._is_urgent else LOOK_S

    def on_look(self, placement: Placement, now: float) -> Span | None:
        """The span to move to now, or None."""
        self._passed_over = {p: until for p, until in self._passed_over.items() if until > now}
        move = self._next_move(placement.with_fixed(self._passed_over))
        self._is_urgent = placement.num_lacking > 0
        self._note_turn(move, now)
        wanted = move.span if move is not None and move.peer_id == self._own else None
        is_confirmed = wanted is not None and wanted == self._wanted
        self._wanted = wanted
        stay_s = URGENT_STAY_S if self._is_urgent else MIN_STAY_S
        return wanted if is_confirmed and now - self._came_at >= stay_s else None

    def _next_move(self, placement: Placement) -> Move | None:
        """Thought through again only if something has changed: it takes 30 ms for 200 servers."""
        if self._thought is None or self._thought[0] != placement:
            self._thought = placement, next_move(placement)
        return self._thought[1]

    def on_moved(self, now: float) -> None:
        """We are at another span from now on, or tried to be."""
        self._came_at, self._wanted, self._turn = now, None, None

    def _note_turn(self, move: Move | None, now: float) -> None:
        if move is None or move.peer_id == self._own:
            self._turn = None
        elif self._turn is None or self._turn[0] != move.peer_id:
            self._turn = move.peer_id, now
        elif now - self._turn[1] >= TURN_S:
            self._passed_over[move.peer_id] = now + PASSED_OVER_S
            self._turn = None


class Promises:
    """Blocks of ours that others rely on, and those that we are about to leave."""

    def __init__(self) -> None:
        self._kept_until: dict[int, float] = {}  # by block
        self._leaving: frozenset[int] = frozenset()

    def promise(self, asked: Span, here: Span, now: float) -> bool:
        """Will we, who have the blocks `here`, keep those asked for? If so we are bound to it."""
        if not here.covers(asked) or not self._leaving.isdisjoint(asked):
            return False
        self._kept_until.update(dict.fromkeys(asked, now + PROMISE_S))
        return True

    def begin(self, leaving: Iterable[int], now: float) -> bool:
        """We want to leave these: from now on they are promised to nobody. False: they are."""
        self._kept_until = {b: until for b, until in self._kept_until.items() if until > now}
        leaving = frozenset(leaving)
        if not leaving.isdisjoint(self._kept_until):
            return False
        self._leaving = leaving
        return True

    def end(self) -> None:
        """We have left them, or stay after all."""
        self._leaving = frozenset()
