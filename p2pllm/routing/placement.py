"""Which span a server should have: when it joins, when several join at once, and later.

A block's *throughput* is the sum of what its servers offer: each its prefill rate, over the
(n + 1) / 2 of its n blocks that a request entering anywhere would use on average. One placement is
better than another if its weakest block is stronger; where these are equal the second weakest
decides, and so on (leximin order). That is the rule of Petals
(`block_selection.choose_best_blocks` of bigscience-workshop/petals) with two changes:

- *Every* move must make the placement better in that order, so no sequence of moves goes round in
  a circle: finitely many placements, each better than the one before. Petals compares weakest
  blocks only, each server by a simulation with random turns of its own.
- A move never takes away the last server of a block that it is sure to have now. Petals forbids
  this only while all blocks are served, and its servers stop serving before they load.

`next_move` simulates the best responses of all servers, and says whose move comes first. It is a
function of the placement alone: all who know the same agree on one server, so the members of a
like group do not run all at once. How often a server looks, and what it does about a move, is in
`p2pllm.routing.rebalancing` and `p2pllm.server.balancer`.

A server's speed is its own word. Memory for the attention cache is not looked at here: how many
blocks a server has is decided before, with room for its cache (`p2pllm.server.capacity`).
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from p2pllm.errors import ConfigError
from p2pllm.ids import PeerId
from p2pllm.spans import Span
from p2pllm.swarm.announcements import Presence, ServerState

MARGIN = 1 / 3  # by which the weakest block must gain; Petals moves below 0.75 of what could be
MAX_ROUNDS = 3  # of everyone's best response; 200 servers from one end are at 0.9 by then

# Shares are counted in whole 1/1000 tokens per second: sums are then exact in any order, and two
# servers that know the same compare the same numbers.
_UNIT = 1000


@dataclass(frozen=True, slots=True)
class Placed:
    """A server as placement sees it.

    `span`: where it is, or will be when its load or its move is done. `holds`: what of it others
    may rely on now; None while it loads, or leaves for quite other blocks. `rate`: tokens × blocks
    per second. `is_movable`: it would move if that helped.
    """

    peer_id: PeerId
    span: Span
    holds: Span | None
    rate: float
    is_movable: bool = False
    is_joining: bool = False
    share: int = field(init=False)  # it adds to each of its blocks, in 1/1000 tokens per second

    def __post_init__(self) -> None:
        share = max(1, round(_UNIT * self.rate * 2 / (len(self.span) + 1)))
        object.__setattr__(self, "share", share)

    @classmethod
    def of(cls, presence: Presence) -> "Placed | None":
        """The server that a presence speaks of; None if it leaves the swarm."""
        coming, is_online = presence.next_span, presence.state is ServerState.ONLINE
        if coming is not None:
            holds = presence.span.overlap(coming) if is_online else None
            return cls(presence.peer_id, coming, holds, presence.prefill_tokens_s)
        if presence.state is ServerState.DRAINING:
            return None
        return cls(
            presence.peer_id,
            presence.span,
            presence.span if is_online else None,
            presence.prefill_tokens_s,
            is_movable=presence.is_movable,
            is_joining=not is_online,
        )


@dataclass(frozen=True, slots=True)
class Move:
    """One server goes to another span."""

    peer_id: PeerId
    span: Span


@dataclass(frozen=True)  # without slots: the cached properties need a place
class Placement:
    """Who has which blocks; servers in the order of their PeerIds."""

    num_blocks: int
    servers: tuple[Placed, ...] = ()

    @classmethod
    def of(cls, presences: Iterable[Presence], num_blocks: int) -> "Placement":
        """What the presences say; servers whose blocks the model does not have are left out."""
        placed = [Placed.of(presence) for presence in presences]
        fitting = [s for s in placed if s is not None and s.span.stop <= num_blocks]
        return cls(num_blocks, tuple(sorted(fitting, key=lambda server: server.peer_id)))

    @cached_property
    def by_peer(self) -> dict[PeerId, Placed]:
        """The servers by their PeerId."""
        return {server.peer_id: server for server in self.servers}

    @cached_property
    def throughputs(self) -> list[int]:
        """Of each block, in 1/1000 tokens per second; those who still load count already."""
        throughputs = [0] * self.num_blocks
        for server in self.servers:
            _add(throughputs, server.span, server.share)
        return throughputs

    @cached_property
    def num_holders(self) -> list[int]:
        """How many servers have each block for sure."""
        counts = [0] * self.num_blocks
        for server in self.servers:
            _add(counts, server.holds, 1)
        return counts

    @cached_property
    def quality(self) -> list[int]:
        """The throughputs, weakest first: of two placements the greater list is better."""
        return sorted(self.throughputs)

    @property
    def num_lacking(self) -> int:
        """Blocks that nobody has or loads."""
        return self.throughputs.count(0)

    def without(self, peers: Collection[PeerId]) -> "Placement":
        """The placement if these were not there."""
        if not peers:
            return self
        return replace(self, servers=tuple(s for s in self.servers if s.peer_id not in peers))

    def only(self, peers: Collection[PeerId]) -> "Placement":
        """The placement if there were nobody else."""
        return replace(self, servers=tuple(s for s in self.servers if s.peer_id in peers))

    def with_fixed(self, peers: Collection[PeerId]) -> "Placement":
        """The placement if these did not move."""
        return replace(
            self,
            servers=tuple(
                replace(s, is_movable=False) if s.peer_id in peers else s for s in self.servers
            ),
        )

    def moved(self, move: Move) -> "Placement":
        """The placement after a move."""
        return replace(
            self,
            servers=tuple(
                replace(s, span=move.span, holds=move.span) if s.peer_id == move.peer_id else s
                for s in self.servers
            ),
        )


# --- joining ---------------------------------------------------------------------------------


def choose_span(placement: Placement, num_blocks: int, *, kept: Span | None = None) -> Span:
    """The span of `num_blocks` blocks that helps the swarm most; the first of equal ones.

    `kept`, where the server was or is about to be, wins unless another one's weakest block is
    weaker by `MARGIN`. The server itself must not be in the placement.
    Raises ConfigError unless 0 < num_blocks ≤ the model's.
    """
    total = placement.num_blocks
    if not 0 < num_blocks <= total:
        raise ConfigError(f"{num_blocks} blocks; the model has {total}: serve 1 or more")
    throughputs = placement.throughputs

    def window(span: Span) -> list[int]:
        return sorted(throughputs[span.start : span.stop])

    spans = [Span(start, start + num_blocks) for start in range(total - num_blocks + 1)]
    best = min(spans, key=window)
    if kept in spans:
        here, there = window(kept), window(best)
        if here.count(0) == there.count(0) and here[0] <= there[0] * (1 + MARGIN):
            return kept
    return best


def settle(placement: Placement, own: PeerId) -> Span:
    """Where `own`, which is joining, should go, beside others that join at the same time.

    All joining servers choose in turn, the lowest PeerId first, and keep what they have announced
    if that is good enough. Whoever knows the same comes to the same result, so those who had
    chosen alike part, and the first of them stays.
    """
    settled = replace(placement, servers=tuple(s for s in placement.servers if not s.is_joining))
    for server in placement.servers:
        if not server.is_joining:
            continue
        span = server.span
        if server.is_movable:
            span = choose_span(settled, len(span), kept=span)
        if server.peer_id == own:
            return span
        settled = replace(settled, servers=(*settled.servers, replace(server, span=span)))
    raise ConfigError(f"{own.short} is not joining")


# --- moving ----------------------------------------------------------------------------------


def next_move(placement: Placement) -> Move | None:
    """The move that comes first, if the swarm would gain enough by moving at all.

    That is the single best one. It is worth while if it does enough alone, or if it does when all
    others have found their best places too, in turn.
    """
    first = _best_move(placement) if _could_gain(placement) else None
    return first if first is not None and _pays(placement, first) else None


def is_still_right(placement: Placement, move: Move) -> bool:
    """Looked at again when others may be moving, too: is nothing lost, and enough gained?

    A server that is about to leave blocks no longer counts as their holder. So of two that are the
    last ones of a block and want to leave it, not both can.
    """
    server = placement.by_peer.get(move.peer_id)
    if server is None:
        return False
    is_safe = all(
        block in move.span or placement.num_holders[block] > 1 for block in server.holds or ()
    )
    return is_safe and _pays(placement, move)


def _pays(placement: Placement, move: Move) -> bool:
    after = placement.moved(move)
    return after.quality > placement.quality and (
        _is_worthwhile(placement, after) or _is_worthwhile(placement, equilibrium(after))
    )


def equilibrium(placement: Placement) -> Placement:
    """Where everybody ends who takes the best place in turn, until nobody gains by it.

    The turns are those of the PeerIds. Stops after `MAX_ROUNDS`: this is a prediction.
    """
    servers = list(placement.servers)
    throughputs, num_holders = list(placement.throughputs), list(placement.num_holders)
    for _ in range(MAX_ROUNDS):
        has_moved = False
        for number, server in enumerate(servers):
            span = _respond(throughputs, num_holders, server)
            if span is None:
                continue
            has_moved = True
            servers[number] = replace(server, span=span, holds=span)
            _add(throughputs, server.span, -server.share)
            _add(throughputs, span, server.share)
            _add(num_holders, server.holds, -1)
            _add(num_holders, span, 1)
        if not has_moved:
            break
    return replace(placement, servers=tuple(servers))


def best_response(placement: Placement, server: Placed) -> Span | None:
    """The span that makes the placement better than where `server` is; None if there is none.

    It keeps the blocks that only this server is sure to have. Of equal spans the one that shares
    most blocks with the present one is best: the others must be loaded.
    """
    return _respond(list(placement.throughputs), placement.num_holders, server)


def _respond(throughputs: list[int], num_holders: list[int], server: Placed) -> Span | None:
    """`best_response`, on lists of which it leaves the first as it was."""
    if not server.is_movable:
        return None
    here, length, share = server.span, len(server.span), server.share
    _add(throughputs, here, -share)  # what the others have
    starts = _starts(num_holders, server, len(throughputs))
    weakest = min(throughputs[starts[0] : starts[-1] + length])

    def preference(start: int) -> tuple[list[int], int, int]:
        return sorted(throughputs[start : start + length]), abs(start - here.start), start

    # Only windows with the weakest block in them can be best, and they are few.
    near = {
        start
        for block in range(starts[0], starts[-1] + length)
        if throughputs[block] == weakest
        for start in range(max(starts[0], block + 1 - length), min(starts[-1], block) + 1)
    }
    span = Span(best := min(near, key=preference), best + length)
    # Only these blocks change. Which list is greater decides for all blocks together.
    left, new = _of_first_only(throughputs, here, span), _of_first_only(throughputs, span, here)
    before = sorted([*[value + share for value in left], *new])
    after = sorted([*left, *[value + share for value in new]])
    _add(throughputs, here, share)
    return span if after > before else None


def _of_first_only(values: list[int], first: Span, second: Span) -> list[int]:
    """Of the blocks that only the first has; both are equally long."""
    if first.start <= second.start:
        return values[first.start : min(first.stop, second.start)]
    return values[max(first.start, second.stop) : first.stop]


def _add(values: list[int], span: Span | None, amount: int) -> None:
    if span is not None:
        for block in range(span.start, span.stop):
            values[block] += amount


def _starts(num_holders: Sequence[int], server: Placed, num_blocks: int) -> range:
    """Where a span may begin without giving up a block that nobody else holds."""
    length, last = len(server.span), num_blocks - len(server.span)
    holds = server.holds
    if holds is None or 1 not in num_holders[holds.start : holds.stop]:
        return range(last + 1)
    alone = [block for block in holds if num_holders[block] == 1]
    return range(max(0, alone[-1] + 1 - length), min(last, alone[0]) + 1)


def _best_move(placement: Placement) -> Move | None:
    """The single move that makes the placement best; the lowest PeerId of like servers."""
    throughputs = list(placement.throughputs)
    best: tuple[list[int], Move] | None = None
    seen: set[object] = set()
    for server in placement.servers:
        kind = (server.span, server.holds, server.share)
        if not server.is_movable or kind in seen:
            continue
        seen.add(kind)
        span = _respond(throughputs, placement.num_holders, server)
        if span is None:
            continue
        after = list(throughputs)
        _add(after, server.span, -server.share)
        _add(after, span, server.share)
        after.sort()
        if best is None or after > best[0]:
            best = after, Move(server.peer_id, span)
    return best[1] if best else None


def _could_gain(placement: Placement) -> bool:
    """Can any moves be worth while? Moves keep the sum of all throughputs, so the weakest block
    cannot get above the mean: cheap to see, and so it is in a swarm that is well placed."""
    weakest, mean = placement.quality[0], sum(placement.throughputs) / placement.num_blocks
    return weakest == 0 or weakest * (1 + MARGIN) < mean


def _is_worthwhile(before: Placement, after: Placement) -> bool:
    """Are fewer blocks lacking, or is the weakest one stronger by the margin?"""
    if before.num_lacking or after.num_lacking:
        return after.num_lacking < before.num_lacking
    return after.quality[0] > before.quality[0] * (1 + MARGIN)


# --- who is alive ----------------------------------------------------------------------------


def holders_to_check(
    placement: Placement,
    blocks: Iterable[int],
    *,
    alive: Collection[PeerId],
    gone: Collection[PeerId],
    trusted: Collection[PeerId] = (),
) -> tuple[PeerId, ...]:
    """Servers to ping until every block has a holder that is known to be alive, or none left.

    A server that is killed stays announced until its record expires. Nobody has to ask them all:
    one living holder per block is enough, so this is a chain, of the `trusted` ones (that answered
    before) first, then of those that reach farthest. Empty: there is nothing left to ask.
    """
    found: list[PeerId] = []
    known = [0] * placement.num_blocks
    for peer in alive:
        if peer in placement.by_peer:
            _add(known, placement.by_peer[peer].holds, 1)
    for block in blocks:
        if known[block] or not placement.num_holders[block]:
            continue
        candidates = [
            (server.peer_id in trusted, server.span.stop, server.peer_id)
            for server in placement.servers
            if server.holds is not None and block in server.holds and server.peer_id not in gone
        ]
        if candidates:
            found.append(max(candidates)[-1])
            _add(known, placement.by_peer[found[-1]].holds, 1)
    return tuple(found)
