"""The library without async: the same calls, blocking. For scripts and notebooks.

    import p2pllm.sync

    with p2pllm.sync.connect(peers=["203.0.113.7:31337"]) as swarm:
        model = swarm.model()
        for piece in model.generate("The capital of France is", max_new_tokens=32):
            print(piece, end="", flush=True)

An event loop runs in a thread of its own for as long as the `with` block; every call here runs
one coroutine there and waits for it. Ctrl-C in the waiting thread cancels that coroutine.
"""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from p2pllm.loops import LoopThread

if TYPE_CHECKING:  # torch is imported when a swarm is connected, not before
    from torch import Tensor

    from p2pllm.client.client import Swarm
    from p2pllm.client.model import Prompt, SavedSession, Session, SwarmModel
    from p2pllm.client.results import GenerationResult
    from p2pllm.routing.planner import Route
    from p2pllm.swarm.announcements import ModelListing
    from p2pllm.swarm.view import SwarmView

T = TypeVar("T")


class _Portal(LoopThread):
    """The loop's thread, with a way to hold async context managers open in it."""

    @contextmanager
    def inside(self, make: Callable[[], AbstractAsyncContextManager[T]]) -> Iterator[T]:
        """Hold an async context manager open in one task of the loop, entered and left there."""
        entered: asyncio.Future[T] = self.run(_new_future())
        leave: asyncio.Event = self.run(_new_event())

        async def hold() -> None:
            try:
                async with make() as value:
                    entered.set_result(value)
                    await leave.wait()
            except BaseException as exc:
                if entered.done():
                    raise
                entered.set_exception(exc)

        holding = asyncio.run_coroutine_threadsafe(hold(), self._loop)
        try:
            yield self.run(_wait_for(entered))
        finally:
            self._loop.call_soon_threadsafe(leave.set)
            holding.result()


async def _new_future() -> "asyncio.Future[Any]":
    return asyncio.get_running_loop().create_future()


async def _new_event() -> asyncio.Event:
    return asyncio.Event()


async def _wait_for(future: "asyncio.Future[T]") -> T:
    return await future


@contextmanager
def connect(peers: str | Sequence[str] = (), **options: Any) -> Iterator["SyncSwarm"]:
    """Join a swarm as a client; takes what `p2pllm.connect` takes."""
    from p2pllm.client.client import connect as connect_async

    with _Portal() as portal, portal.inside(lambda: connect_async(peers, **options)) as swarm:
        yield SyncSwarm(swarm, portal)


class SyncSwarm:
    """A swarm joined as a client; see `p2pllm.client.client.Swarm`."""

    def __init__(self, swarm: "Swarm", portal: _Portal) -> None:
        self._swarm = swarm
        self._portal = portal

    def models(self) -> list["ModelListing"]:
        """What the swarm's servers say they serve, one entry per server."""
        return self._portal.run(self._swarm.models())

    def model(self, name: str | None = None, **options: Any) -> "SyncModel":
        """A model of the swarm; the default model if no name is given."""
        return SyncModel(self._portal.run(self._swarm.model(name, **options)), self._portal)


class SyncModel:
    """A model served by the swarm; see `p2pllm.client.model.SwarmModel`."""

    def __init__(self, model: "SwarmModel", portal: _Portal) -> None:
        self._model = model
        self._portal = portal

    def generate(
        self, prompt: "Prompt", *, session: "SyncSession | None" = None, **options: Any
    ) -> Iterator[str]:
        """Generate text piece by piece; leaving the loop early frees the servers' memory."""
        inner = session.session if session else None
        generation = self._model.generate(prompt, session=inner, **options)
        try:
            while (piece := self._portal.run(_next(generation))) is not None:
                yield piece
        finally:
            self._portal.run(generation.aclose())

    def generate_batch(
        self, prompts: "Sequence[Prompt]", **options: Any
    ) -> list["GenerationResult"]:
        """Generate for several prompts at once."""
        return self._portal.run(self._model.generate_batch(prompts, **options))

    def forward(self, token_ids: Sequence[int]) -> "Tensor":
        """Logits (T, V) of a token sequence."""
        return self._portal.run(self._model.forward(token_ids))

    def hidden_states(self, prompts: "Sequence[Prompt]", **options: Any) -> "list[Tensor]":
        """The last block's outputs (T, D) of whole sequences."""
        return self._portal.run(self._model.hidden_states(prompts, **options))

    def forward_hidden(self, hidden: "Sequence[Tensor]", **options: Any) -> "list[Tensor]":
        """The same from hidden states (T, D) of each sequence."""
        return self._portal.run(self._model.forward_hidden(hidden, **options))

    def view(self) -> "SwarmView":
        """The servers of this model as they are now."""
        return self._portal.run(self._model.view())

    def route(self, **options: Any) -> "Route":
        """The route that a generation would take now."""
        return self._portal.run(self._model.route(**options))

    @contextmanager
    def session(self, **options: Any) -> Iterator["SyncSession"]:
        """A session to step through by hand."""
        with self._portal.inside(lambda: self._model.session(**options)) as session:
            yield SyncSession(session, self._portal)

    @contextmanager
    def resume(self, saved: "SavedSession") -> Iterator["SyncSession"]:
        """A session that holds what `SyncSession.export` has saved."""
        with self._portal.inside(lambda: self._model.resume(saved)) as session:
            yield SyncSession(session, self._portal)


class SyncSession:
    """One sequence's cache along a route; see `p2pllm.client.model.Session`."""

    def __init__(self, session: "Session", portal: _Portal) -> None:
        self.session = session
        self._portal = portal

    @property
    def position(self) -> int:
        """How many tokens the session holds."""
        return self.session.position

    def step(self, token_ids: Sequence[int]) -> "Tensor":
        """Logits (T, V) of the next tokens."""
        return self._portal.run(self.session.step(token_ids))

    def rollback(self, position: int) -> None:
        """Forget all tokens from `position` on."""
        self.session.rollback(position)

    def export(self) -> "SavedSession":
        """What `SyncModel.resume` needs to open such a session again."""
        return self.session.export()

    def fork(self) -> "SyncSession":
        """A second session with the same tokens; close it when it is done with."""
        return SyncSession(self._portal.run(self.session.fork()), self._portal)

    def close(self) -> None:
        """Free the servers' memory; the `with` block of `SyncModel.session` does it by itself."""
        self._portal.run(self.session.close())


async def _next(generation: Any) -> str | None:
    try:
        piece: str = await anext(generation)
    except StopAsyncIteration:
        return None
    return piece
