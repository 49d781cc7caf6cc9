"""What a client knows of its sequences and of the hops that they go through. Pure.

A `SessionState` is one sequence. Its `journals` are the client's half of the dual attention cache
(PETALS, arXiv 2209.01188, section 3.2): for every hop the inputs that it was sent, so that another
server can be given the same. Its `flights` are the steps under way. A step keeps its number
whatever happens to it: sent again, under a higher epoch, it is computed by the hops that have not
seen it and only repeated by those that have (docs/protocol.md).
"""

import math
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from p2pllm.client.journal import Journal
from p2pllm.ids import PeerId, SessionId
from p2pllm.spans import Span
from p2pllm.wire.messages import Numerics, Row
from p2pllm.wire.rows import rows_of
from p2pllm.wire.tensors import TensorCodec, WireTensor

FIRST_STEP = 2**16  # lower numbers are for the replays of a sequence that is rebuilt on a hop
ECHOES_AWAITED = 64  # finished steps of a sequence whose echoes may still come


@dataclass(frozen=True, slots=True)
class Hop:
    """One server's part of a chain."""

    peer: PeerId
    span: Span
    numerics: Numerics
    record: bytes = b""  # its signed peer record; empty: others are not told how to reach it
    record_at: float = field(default=0.0, compare=False)  # when it was read


@dataclass(frozen=True, slots=True)
class WireFormat:
    """How hidden states are asked to be coded."""

    codec: TensorCodec
    is_compressed: bool


@dataclass(eq=False)
class Flight:
    """One step under way: the rows of some sequences, sent together.

    `start` is the hop that it is to be sent to (again): the latest one whose input is known.
    """

    rows: tuple[Row, ...]
    tensor: WireTensor  # the input of the first hop
    start: int = 0
    was_interrupted: bool = False

    @property
    def num_tokens(self) -> int:
        """Tokens of all rows."""
        return sum(row.num_tokens for row in self.rows)


@dataclass(eq=False)
class Copy:
    """A sequence at hops that may take others' places. `held`: how many tokens each of them has.

    `journals` are those of all of its hops but the first, whose inputs are in the chain's journal.
    What the sequence forgets meanwhile, its copies forget, too (`cut`).
    """

    epoch: int
    push_tokens: list[bytes]
    journals: list[Journal]
    held: list[int]
    next_step: int = 0  # of its replays
    lowest_cut: float = math.inf  # since somebody looked last

    def cut(self, position: int) -> None:
        """The sequence was rolled back."""
        self.lowest_cut = min(self.lowest_cut, position)
        self.held = [min(held, position) for held in self.held]
        for journal in self.journals:
            journal.truncate(position)

    def hold(self, index: int, num_tokens: int) -> None:
        """A hop has got so many tokens, of which some may have been forgotten meanwhile."""
        self.held[index] = int(min(num_tokens, self.lowest_cut))


@dataclass(eq=False)
class SessionState:
    """Where one sequence stands."""

    id: SessionId
    max_tokens: int
    journals: list[Journal]  # by hop
    push_tokens: list[bytes]  # by hop: what its predecessor must present
    position: int = 0
    epoch: int = 0
    newest_epoch: int = 0  # that was ever used, also by copies
    num_promised: int = 0  # first tokens that the hops were told of, in this epoch
    num_shared: int = 0  # those of them that were not sent
    next_step: int = FIRST_STEP
    copies: list[Copy] = field(default_factory=list)
    flights: dict[int, Flight] = field(default_factory=dict)  # by step number, oldest first
    _rows: dict[int, Row] = field(default_factory=dict)  # of the flights
    _echoing: OrderedDict[int, Row] = field(default_factory=OrderedDict)  # finished lately

    @property
    def has_begun(self) -> bool:
        """Was any step of it sent?"""
        return self.next_step != FIRST_STEP

    def promise(self, num_tokens: int) -> None:
        """The hops are told which tokens will come first; see `p2pllm.client.prefixes`."""
        self.num_promised = num_tokens

    def break_promise(self) -> None:
        """Other tokens may come instead: under another epoch, in which nothing was promised."""
        if self.num_promised:
            self.num_promised = 0
            self.epoch = self.new_epoch()

    def assume(self, tensor: WireTensor) -> None:
        """The hops hold the next tokens already. `tensor`: what the first one would be sent.

        The other hops' inputs are holes in their journals. If they are needed, they are computed
        again, each from those of the hop before it.
        """
        self.journals[0].put(self.position, tensor)
        self.position += tensor.header.shape[0]
        self.num_shared = self.position

    def depart(self, flight: Flight, row: Row) -> None:
        """A step leaves; the state moves on as if it were through."""
        self.flights[row.step], self._rows[row.step] = flight, row
        self.next_step = row.step + 1
        self.position = row.position + row.num_tokens
        self.journals[0].put(row.position, part_of(flight.rows, flight.tensor, row))

    def next_row(self, num_tokens: int, tail: int) -> Row:
        """The row for the next tokens."""
        return Row(self.id, self.epoch, self.next_step, self.position, num_tokens, self.acked, tail)

    def arrive(self, row: Row) -> None:
        """A step is through all hops."""
        del self.flights[row.step]
        self._echoing[row.step] = self._rows.pop(row.step)
        if len(self._echoing) > ECHOES_AWAITED:
            self._echoing.popitem(last=False)

    def give_up(self, row: Row) -> None:
        """A step is not wanted any more: what it, and those after it, left does not count."""
        self.flights.pop(row.step, None)
        self._rows.pop(row.step, None)
        self.rollback(min(self.position, row.position))
        self.epoch = self.new_epoch()  # fences off what is still under way

    def new_epoch(self, skipped: int = 0) -> int:
        """An epoch that nothing of this sequence has had before."""
        self.newest_epoch += 1 + skipped
        return self.newest_epoch

    def rollback(self, position: int) -> None:
        """Forget all tokens from there on."""
        if position < self.num_promised:
            self.break_promise()
        self.num_shared = min(self.num_shared, position)
        self.position = position
        for journal in self.journals:
            journal.truncate(position)
        for copy in self.copies:
            copy.cut(position)
        # A late echo must not bring back what is forgotten; of a step that is cut, all is ignored.
        self._echoing = OrderedDict(
            (step, row)
            for step, row in self._echoing.items()
            if row.position + row.num_tokens <= position
        )

    def on_echo(self, hop: int, row: Row, tensor: WireTensor) -> bool:
        """A hop's output of a row: the next hop's input. Was it one of ours?"""
        sent = self._rows.get(row.step) or self._echoing.get(row.step)
        if sent is None or (sent.position, sent.num_tokens) != (row.position, row.num_tokens):
            return False
        if hop + 1 < len(self.journals):
            self.journals[hop + 1].put(row.position, tensor)
        return True

    def current(self, row: Row) -> Row:
        """The row as it is to be sent now.

        A hop that has not heard of the epoch takes `first_step` for its first one, and holds what
        overtakes it: the oldest step that goes through all hops that this row goes through.
        """
        start = self.flights[row.step].start
        first_step = min(step for step, flight in self.flights.items() if flight.start <= start)
        return replace(row, epoch=self.epoch, acked=self.acked, first_step=first_step)

    def knows_input(self, hop: int, row: Row) -> bool:
        """Is the row's input of that hop in its journal?"""
        stop = row.position + row.num_tokens
        return self.journals[hop].first_hole(row.position, stop) is None

    @property
    def acked(self) -> int:
        """All steps up to this one are through; kept outputs of theirs may go."""
        return min(self.flights, default=self.next_step) - 1

    def target(self, hop: int) -> int:
        """How many tokens `hop` must hold before the steps under way are sent again.

        Those that start there or before it bring their tokens themselves.
        """
        coming = (
            self._rows[step].position
            for step, flight in self.flights.items()
            if flight.start <= hop
        )
        return min(coming, default=self.position)

    def splice(
        self, first: int, stop: int, journals: Sequence[Journal], push_tokens: Sequence[bytes]
    ) -> None:
        """Hops [first, stop) were replaced by as many as there are `push_tokens`.

        `journals` are those of the new ones but the first, whose input is what it was.
        """
        for journal in self.journals[first + 1 : stop]:
            journal.close()
        self.journals[first + 1 : stop] = journals
        self.push_tokens[first:stop] = push_tokens

    def close(self) -> None:
        """Forget the journals."""
        for journal in self.journals:
            journal.close()


def part_of(rows: Sequence[Row], tensor: WireTensor, row: Row) -> WireTensor:
    """One row's part of a tensor that packs the inputs of several."""
    if len(rows) == 1:
        return tensor
    start = sum(other.num_tokens for other in rows[: rows.index(row)])
    return rows_of(tensor, start, start + row.num_tokens)


def latest_known_hop(states: Iterable[tuple[SessionState, Row]], num_hops: int) -> int:
    """The latest of some hops whose inputs of all these rows are known: it, and none before it,
    need be sent them again."""
    pairs = list(states)
    for hop in reversed(range(1, num_hops)):
        if all(state.knows_input(hop, row) for state, row in pairs):
            return hop
    return 0


def set_starts(flights: Iterable[tuple[Flight, Sequence[SessionState]]], num_hops: int) -> None:
    """Say from which hop on each step is to be sent again.

    No later than any younger step of the same sequence, so that at every hop the oldest one that
    is new to it comes first (`first_step`); hops that have computed it only repeat it.
    """
    pairs = [(flight, list(zip(states, flight.rows, strict=True))) for flight, states in flights]
    for flight, rows in pairs:
        flight.start = latest_known_hop(rows, num_hops)
    is_settled = False
    while not is_settled:
        is_settled = True
        for flight, rows in pairs:
            younger = (
                other.start
                for state, row in rows
                for step, other in state.flights.items()
                if step > row.step
            )
            latest = min(younger, default=flight.start)
            if latest < flight.start:
                flight.start = latest_known_hop(rows, latest + 1)
                is_settled = False
