"""The layered graph that a route is a path through.

A node is (server, block boundary): the activation after that many blocks is at that server. Its
edges are *compute the next blocks here* and *move to that server and compute the next ones
there*; a server may be entered and left inside its span. (Petals leaves a server only at its
span's end; Parallax never enters or leaves one inside.) The client is a node too, at the first
and the last boundary, and at every one where it relays each hop itself.

The graph is kept small without losing the optimum. Along a route with given servers the cost is
linear in the boundaries at which it changes servers, so there is an optimum with every change at
an end of a span. Hence

- boundaries where no span starts or ends are merged away, and
- a change from a to b is needed only where a's span ends or b's starts.

The argument lets a hop shrink to nothing, and so supposes that leaving a server out of a route
never makes the way longer: the triangle inequality. It holds by construction where the client
relays. In a chain, measured round trips may break it, and all that is lost then is the use of a
server as a mere relay, which is not wanted. `is_reduced=False` gives the graph without reduction.
"""

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

from p2pllm.ids import PeerId
from p2pllm.routing.costs import Candidate, CostModel
from p2pllm.spans import Span

CLIENT = -1
Node = tuple[int, int]  # (index of the candidate, or CLIENT; blocks computed)


class LayeredGraph:
    """The graph of the routes over `candidates` that cover `span`.

    `edges` is what `shortest_path` asks for; a path goes from `source` to `target`. It serves one
    search only, for it leaves out edges that cannot shorten what was settled before.
    """

    def __init__(
        self,
        costs: CostModel,
        candidates: Sequence[Candidate],
        span: Span,
        *,
        is_reduced: bool = True,
    ) -> None:
        self.source: Node = (CLIENT, span.start)
        self.target: Node = (CLIENT, span.stop)
        self._costs = costs
        self._is_reduced = is_reduced
        self._spans = [candidate.span for candidate in candidates]
        self._peers = [candidate.server.peer_id for candidate in candidates]
        self._price_candidates(candidates)
        ends = {end for part in self._spans for end in (part.start, part.stop)}
        boundaries = sorted(ends | {span.start, span.stop}) if is_reduced else [*span, span.stop]
        self._next = dict(pairwise(boundaries))
        self._starting: dict[int, list[int]] = {at: [] for at in boundaries}
        self._holding: dict[int, list[int]] = {at: [] for at in boundaries}  # the next block
        for index, part in enumerate(self._spans):
            self._starting[part.start].append(index)
            for at in boundaries[bisect_left(boundaries, part.start) :]:
                if at >= part.stop:
                    break
                self._holding[at].append(index)

    def _price_candidates(self, candidates: Sequence[Candidate]) -> None:
        """All weights that belong to one candidate, by its index."""
        costs, request = self._costs, self._costs.request
        self._is_relayed = request.relayed
        before, after = (None, None) if request.relayed else (request.before, request.after)
        self._arrive = [costs.move_weight(before, peer) for peer in self._peers]
        self._return = [costs.move_weight(peer, None) for peer in self._peers]
        self._leave = [costs.leave_weight(peer, after) for peer in self._peers]
        self._stay = [costs.stay_weight(candidate.server) for candidate in candidates]
        self._block = [costs.block_weight(candidate.server) for candidate in candidates]
        self._factor = [costs.factor(peer) for peer in self._peers]
        self._far = [costs.estimated_weight(peer) for peer in self._peers]
        self._known: dict[int, dict[int, float]] = {}  # made when first asked for
        self._left: dict[tuple[int, bool], tuple[float, list[int]]] = {}  # see `_not_reached`
        self._indices: dict[PeerId, list[int]] = {}
        for index, peer in enumerate(self._peers):
            self._indices.setdefault(peer, []).append(index)

    def edges(self, node: Node) -> Iterator[tuple[Node, float]]:
        """The nodes that one decision leads to, each with its cost in seconds."""
        index, at = node
        if index == CLIENT:
            if at != self.target[1]:
                yield from self._enter(at)
            return
        part = self._spans[index]
        if at < part.stop:
            after = self._next[at]
            yield (index, after), self._block[index] * (after - at)
        if at == self.target[1]:
            yield self.target, self._leave[index]
        elif self._is_relayed:
            yield (CLIENT, at), self._return[index]
        else:
            yield from self._change(index, at)

    def hops(self, path: Sequence[Node]) -> list[tuple[int, Span]]:
        """The path as (index of the candidate, blocks computed there)."""
        hops: list[tuple[int, Span]] = []
        for (previous, start), (index, stop) in pairwise(path):
            if index == CLIENT:
                continue
            if index == previous:
                start = hops.pop()[1].start
            hops.append((index, Span(start, stop)))
        return hops

    def _enter(self, at: int) -> Iterator[tuple[Node, float]]:
        after = self._next[at]
        for index in self._holding[at]:
            compute = self._block[index] * (after - at)
            yield (index, after), self._arrive[index] + self._stay[index] + compute

    def _change(self, index: int, at: int) -> Iterator[tuple[Node, float]]:
        # Most edges of a chain's graph would be made here: 75,000 for 500 servers of 5 to 15
        # blocks. Nodes are settled cheapest first. If another server was left at this boundary
        # before and is no farther from us, then whatever both can reach by links that are only
        # estimated is reached as cheaply from there, and these edges need not be made again.
        is_end = not self._is_reduced or at == self._spans[index].stop
        known, far, after = self._known_moves(index), self._far[index], self._next[at]
        length = after - at
        remaining = self._not_reached(index, at, is_end=is_end)
        if remaining is None:
            others: Iterable[int] = self._holding[at] if is_end else self._starting[at]
        else:
            others = [*self._entered(known, at, is_end=is_end), *remaining]
        for other in others:
            move = known.get(other)
            if move is None:
                farther = self._far[other]
                move = (farther if farther > far else far) * self._factor[other]
            if other != index:
                yield (other, after), move + self._stay[other] + self._block[other] * length

    def _not_reached(self, index: int, at: int, *, is_end: bool) -> Sequence[int] | None:
        """What a server no farther from us, left at this boundary before, may have reached at
        more cost: itself, and what it has known links to. None if there is no such server; then
        this one is it for those to come."""
        for kind in (True,) if is_end else (True, False):  # at a span's end all ways are open
            nearest = self._left.get((at, kind))
            if nearest is not None and nearest[0] <= self._far[index]:
                return nearest[1]
        remaining = self._entered([index, *self._known_moves(index)], at, is_end=is_end)
        self._left[at, is_end] = self._far[index], remaining
        return None

    def _entered(self, others: Iterable[int], at: int, *, is_end: bool) -> list[int]:
        """Those of the candidates to which one may change at this boundary."""
        spans = self._spans
        if is_end:
            return [other for other in others if spans[other].start <= at < spans[other].stop]
        return [other for other in others if spans[other].start == at]

    def _known_moves(self, index: int) -> dict[int, float]:
        """The weights of the moves from a server along links that are not just estimated."""
        known = self._known.get(index)
        if known is None:
            peer, costs = self._peers[index], self._costs
            known = self._known[index] = {
                other: (
                    costs.move_weight(peer, neighbour)
                    if (peer, neighbour) in costs.view.broken_links
                    else costs.link_weight(link, neighbour)
                )
                for neighbour, link in costs.view.known_links.get(peer, {}).items()
                for other in self._indices.get(neighbour, ())
            }
        return known
