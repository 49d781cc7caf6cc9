"""Keys and values that move to another server, so that nobody has to compute them again.

A client that wants a session elsewhere (its server is leaving, or another one is better) allows
the old server to give the pages away (`HandOver`), and names it to the new one (`Open.source`).
The new one pulls: it asks for tokens `[start, stop)` of its own blocks, and gets them as `Pages`,
part by part, each with a checksum. What it has got counts from then on as the session's length.
After an interruption it asks again from there, and when it gives up, the client replays what is
missing. The old server goes on serving meanwhile: what a step has written stays as it is, unless
the client itself rolls back.

Both sides compute in the same types (`Numerics`), or the contents would mean something else. How
many pull at once is bounded, at both ends, and fairly: a client whose reader is slow holds its own
places, and leaves others theirs. Each part is one short job of the device between two batches.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager

from p2pllm.errors import (
    BadRequest,
    Busy,
    CodecError,
    NotServed,
    RemoteProtocolError,
    RequestFailed,
    TransportError,
)
from p2pllm.ids import ModelId, PeerId
from p2pllm.net.endpoint import Endpoint
from p2pllm.net.frames import Priority
from p2pllm.net.rpc import Request
from p2pllm.server.sessions import Session, SessionTable
from p2pllm.server.successors import Successors
from p2pllm.server.worker import Worker
from p2pllm.wire.messages import Message, Numerics, Open, Output, Pages, Pull

logger = logging.getLogger(__name__)

PART_BYTES = 4 * 2**20  # of one `Pages`; copied in a millisecond or two
MAX_PULLS = 4  # under way at once, given and taken each
MAX_PULLS_EACH = 2  # of one client: a session that goes to two servers, or the next one's start
PLACE_WAIT_S = 1.0  # then the client had better replay
MAX_PULL_S = 60.0  # that one may take; a slow reader holds a place for no longer
ATTEMPTS = 3  # that fail one after the other, without a token
PAUSE_S = 0.2  # before the next one


class Places:
    """Who may pull now: a client's second pull must leave a place for another client."""

    def __init__(self) -> None:
        self._taken: Counter[PeerId] = Counter()
        self._freed = asyncio.Event()

    def __len__(self) -> int:
        return self._taken.total()

    def has_one(self, client: PeerId) -> bool:
        """Is there a place for one more pull of this client's sessions?"""
        mine = self._taken[client]
        return len(self) + (mine > 0) < MAX_PULLS and mine < MAX_PULLS_EACH

    @contextmanager
    def taken(self, client: PeerId) -> Iterator[None]:
        """Hold a place; raises Busy if there is none."""
        if not self.has_one(client):
            raise Busy("too many sessions are moving already", retry_after_s=PAUSE_S)
        self._taken[client] += 1
        try:
            yield
        finally:
            self._taken -= Counter((client,))  # which also forgets those that have none
            self._freed.set()
            self._freed = asyncio.Event()

    async def wait(self, client: PeerId, seconds: float) -> bool:
        """Wait for a place; False if there is none by then."""
        try:
            async with asyncio.timeout(seconds):
                while not self.has_one(client):
                    await self._freed.wait()
        except TimeoutError:
            return False
        return True


class Giver:
    """The old server's side: streams a session's pages to who may have them."""

    def __init__(
        self,
        model: ModelId,
        numerics: Numerics,
        sessions: SessionTable[Output],
        worker: Worker,
    ) -> None:
        self._model = model
        self._numerics = numerics
        self._sessions = sessions
        self._worker = worker
        self._places = Places()

    async def serve(self, request: Request[Pull]) -> AsyncGenerator[Message, None]:
        """The parts that are asked for, up to where the session has been computed."""
        pull = request.message
        if pull.model != self._model or pull.numerics != self._numerics:
            raise NotServed(f"the pages here are of {self._model} in {self._numerics}")
        if request.remaining_s(_now()) > MAX_PULL_S:
            raise BadRequest(f"a pull that may take longer than {MAX_PULL_S:.0f} s")
        session = self._sessions.on_pull(pull)
        with self._places.taken(session.client):
            async with aclosing(self._parts(pull, session)) as parts:
                async for part in parts:
                    yield part

    async def _parts(self, pull: Pull, session: Session[Output]) -> AsyncGenerator[Pages, None]:
        most = self._worker.tokens_in(PART_BYTES, pull.span)
        position = pull.start
        while True:
            stop = min(position + most, pull.stop, session.num_computed)
            if stop <= position:
                return
            part = await self._worker.export_pages(
                session.pages, pull.span, position, stop - position
            )
            # Pages that were given back meanwhile may hold somebody else's tokens by now.
            if self._sessions.on_pull(pull) is not session or session.num_computed < stop:
                return
            yield part
            self._sessions.on_pull(pull)  # raises if the session has been closed
            position = stop


class Taker:
    """The new server's side: fills a session's pages from another server."""

    def __init__(
        self,
        endpoint: Endpoint,
        sessions: SessionTable[Output],
        worker: Worker,
        successors: Successors,
    ) -> None:
        self._endpoint = endpoint
        self._sessions = sessions
        self._worker = worker
        self._successors = successors
        self._places = Places()

    async def fetch(
        self, session: Session[Output], opening: Open, source: PeerId, deadline: float
    ) -> None:
        """Pull until the session has the tokens that `opening` says, or until something fails.

        However it ends, the session's length says how far it came: nowhere, if no place was free.
        """
        started = _now()
        deadline, client = min(deadline, started + MAX_PULL_S), opening.client
        if not await self._places.wait(client, min(PLACE_WAIT_S, deadline - started)):
            logger.info("no place to pull id=%s client=%s", session.id, client.short)
            return
        try:
            with self._places.taken(client):
                async with asyncio.timeout_at(deadline):
                    await self._fetch(session, opening, source, deadline)
        except TimeoutError:
            logger.info("pages late id=%s source=%s", session.id, source.short)
        logger.info(
            "pages pulled id=%s source=%s tokens=%d of=%d after_s=%.3f",
            session.id,
            source.short,
            session.length,
            opening.source_position,
            _now() - started,
        )

    async def _fetch(
        self, session: Session[Output], opening: Open, source: PeerId, deadline: float
    ) -> None:
        failed = 0
        while failed < ATTEMPTS and session.length < opening.source_position:
            before = session.length
            if not self._sessions.may_pull(session, before):
                return  # it has computed something itself
            try:
                if not self._successors.may_use(opening.client, source, _now()):
                    return
                await self._pull(session, opening, source, deadline)
            except (TransportError, Busy) as exc:
                logger.info("pull interrupted id=%s at=%d reason=%s", session.id, before, exc)
                failed = 0 if session.length > before else failed + 1
                await asyncio.sleep(PAUSE_S)
            except (RequestFailed, RemoteProtocolError) as exc:
                logger.info("pull failed id=%s at=%d reason=%s", session.id, before, exc)
                return
            else:
                return  # it is complete, or the source has no more

    async def _pull(
        self, session: Session[Output], opening: Open, source: PeerId, deadline: float
    ) -> None:
        pull = Pull(
            session.id,
            opening.source_token,
            opening.model,
            opening.numerics,
            opening.span,
            session.length,
            opening.source_position,
        )
        timeout_s = deadline - _now()
        replies = self._endpoint.stream(source, pull, timeout_s=timeout_s, priority=Priority.BULK)
        position, most = session.length, self._worker.tokens_in(PART_BYTES, opening.span)
        async with aclosing(replies):
            async for part in replies:
                if not isinstance(part, Pages) or part.position != position:
                    raise CodecError(f"{type(part).__name__} that does not follow {position}")
                if part.num_tokens > min(most, opening.source_position - position):
                    raise CodecError(f"{part.num_tokens} tokens in one part, or past the end")
                if not self._sessions.may_pull(session, position):
                    return
                await self._worker.import_pages(session.pages, session.span, part)
                if not self._sessions.may_pull(session, position):
                    return  # closed or stepped meanwhile: whoever did that knows better
                self._sessions.on_pulled(session, part.num_tokens, _now())
                position = session.length


def _now() -> float:
    return asyncio.get_running_loop().time()
