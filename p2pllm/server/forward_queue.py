"""The line of requests that need no session: bounded, and fair between clients. Pure.

Clients take turns, a turn being what its user makes of it (the server computes a piece of a pass);
of one client's requests the oldest goes on until it is done. The line is bounded in requests and
bytes, and a client may fill a quarter of it, but for its first request, which only needs room.
"""

from collections import Counter, OrderedDict, deque
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from p2pllm.errors import Busy
from p2pllm.ids import PeerId
from p2pllm.metrics import MovingAverage

MAX_REQUESTS = 64
MAX_BYTES = 256 * 2**20  # of coded inputs
CLIENTS_SHARE = 4  # a client may have one part of so many
GUESSED_S = 50e-6  # a token in a block of a small model, on two cores
MIN_RETRY_S, MAX_RETRY_S = 0.05, 10.0


class Work(Protocol):
    """What the line must know of a request."""

    @property
    def client(self) -> PeerId:
        """Who asks."""
        ...

    @property
    def num_bytes(self) -> int:
        """Memory that its input takes."""
        ...

    @property
    def cost(self) -> int:
        """Tokens × blocks to be computed."""
        ...


W = TypeVar("W", bound=Work)


@dataclass
class ForwardQueue(Generic[W]):
    """The requests that are not done. Whoever is `next` stays in line until it is removed."""

    _line: OrderedDict[PeerId, deque[W]] = field(default_factory=OrderedDict)
    _bytes: Counter[PeerId] = field(default_factory=Counter)
    _cost: int = 0
    _s_per_cost: MovingAverage = field(default_factory=MovingAverage)

    def __len__(self) -> int:
        return sum(map(len, self._line.values()))

    def add(self, work: W) -> None:
        """Put a request at its client's end of the line; raises Busy if there is no room."""
        held, num_bytes = self._line.get(work.client, ()), self._bytes[work.client]
        if held and (
            len(held) >= MAX_REQUESTS // CLIENTS_SHARE
            or num_bytes + work.num_bytes > MAX_BYTES // CLIENTS_SHARE
        ):
            raise Busy(f"{len(held)} requests of yours wait here", retry_after_s=self.wait_s)
        in_all = self._bytes.total()
        if len(self) >= MAX_REQUESTS or (in_all and in_all + work.num_bytes > MAX_BYTES):
            raise Busy(f"{len(self)} requests wait here", retry_after_s=self.wait_s)
        self._line.setdefault(work.client, deque()).append(work)
        self._bytes[work.client] += work.num_bytes
        self._cost += work.cost

    @property
    def wait_s(self) -> float:
        """How long what is here takes: when to come again."""
        seconds = self._cost * self._s_per_cost.get(GUESSED_S)
        return min(max(seconds, MIN_RETRY_S), MAX_RETRY_S)

    def on_done(self, cost: int, seconds: float) -> None:
        """So much was computed, in so many seconds."""
        self._s_per_cost.add(seconds / cost)

    def next(self) -> W | None:
        """The oldest request of the client whose turn it is; the next turn is another's."""
        if not self._line:
            return None
        client = next(iter(self._line))
        self._line.move_to_end(client)
        return self._line[client][0]

    def remove(self, work: W) -> None:
        """It is done, or nobody wants it any more; nothing if it was removed before."""
        mine = self._line.get(work.client)
        if mine is None or work not in mine:
            return
        mine.remove(work)
        self._cost -= work.cost
        self._bytes[work.client] -= work.num_bytes
        if not mine:
            del self._line[work.client], self._bytes[work.client]

    def take_all(self) -> list[W]:
        """Everything, which is then gone from the line."""
        everything = [work for mine in self._line.values() for work in mine]
        for work in everything:
            self.remove(work)
        return everything
