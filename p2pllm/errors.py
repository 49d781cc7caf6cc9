"""Every exception that p2pllm raises on purpose, in one tree.

    P2PLLMError
      LocalProtocolError        we misused an API of ours             -> fix the code
      RemoteProtocolError       the peer broke the rules              -> drop and penalise it
        CodecError              bytes that do not parse
        BadSignature            a signature or an identity that does not hold
      TransportError            unreachable, lost, timed out          -> retry, perhaps elsewhere
        PeerUnreachable         no address of the peer answered
        ConnectionLost          the link died under a request
        DeadlineExceeded        the time allowed for a request is over
        Refused                 the peer's own bounds say no, for now
      RequestFailed(code)       the peer answered with an error       -> the code says what to do
        Busy(retry_after_s)     its queue is full
        CacheFull(retry_after_s) no K/V pages are free for this session
        SessionUnknown          it does not hold that session (any more)
        StaleEpoch              a newer route of the session has fenced us off
        OutOfOrder(expected)    the step does not follow the cache's length
        BadRequest              it found our request malformed
        NotServed               it does not serve that span, model or numerics
        Forbidden               it does not serve us
        RemoteFault             something broke at its side
      LookupFailed              the DHT gave no usable answer
      NoRoute(missing)          no chain of servers covers all blocks
      OpenFailed(failures)      not every hop of a route could be opened    -> plan another
      StepFailed(peer, cause)   a hop did not carry out a step              -> replace the hop
      SessionLost               a generation could not be continued
      CheckpointError           a file of the model is missing, truncated or of another model
      ConfigError               what the user asked for cannot be      -> tell them what can

On the wire an error is a code and a sentence (`RequestFailed.code`), never a pickle: see
`p2pllm.wire.messages.ErrorReply`.
"""

from collections.abc import Mapping, Sequence
from typing import Any


class P2PLLMError(Exception):
    """The root of all errors raised on purpose by p2pllm."""


class LocalProtocolError(P2PLLMError):
    """An object of ours was used against its rules: a bug on this side."""


class RemoteProtocolError(P2PLLMError):
    """The peer sent something that the protocol does not allow."""


class CodecError(RemoteProtocolError):
    """Bytes that do not parse as what they claim to be, or exceed a bound."""


class BadSignature(RemoteProtocolError):
    """A signature does not verify, or proves another identity than the one expected."""


class TransportError(P2PLLMError):
    """The peer could not be reached or answered too late; trying again may help."""


class PeerUnreachable(TransportError):
    """No address of the peer could be connected to."""


class ConnectionLost(TransportError):
    """The connection ended while a request was under way."""


class DeadlineExceeded(TransportError):
    """The time allowed for a request is over."""


class Refused(TransportError):
    """A bound (connections, handshakes, streams) is reached, here or at the peer."""


class RequestFailed(P2PLLMError):
    """The peer answered a request with an error; subclasses say which one.

    `code` is the number that stands for the class on the wire.
    """

    code = 1

    def __init__(self, message: str, *, retry_after_s: float = 0.0, expected: int = 0) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after_s = retry_after_s
        self.expected = expected


class Busy(RequestFailed):
    """The peer's queue is full; ask again after `retry_after_s` seconds, or elsewhere."""

    code = 2


class CacheFull(RequestFailed):
    """No K/V pages are free; ask again after `retry_after_s` seconds, or elsewhere."""

    code = 3


class SessionUnknown(RequestFailed):
    """The server does not hold the session: never opened, expired or dropped."""

    code = 4


class StaleEpoch(RequestFailed):
    """The request carries an epoch older than the newest that the server has seen."""

    code = 5


class OutOfOrder(RequestFailed):
    """The step's position is past the cache's length, which is `expected`."""

    code = 6


class BadRequest(RequestFailed):
    """The server found the request malformed: wrong shape, NaN, too large."""

    code = 7


class NotServed(RequestFailed):
    """The server does not serve this span, model or numerics."""

    code = 8


class Forbidden(RequestFailed):
    """The server's allow or block list, or a missing token, keeps us out."""

    code = 9


class RemoteFault(RequestFailed):
    """An error at the peer that it did not foresee."""

    code = 10


REQUEST_ERRORS: dict[int, type[RequestFailed]] = {
    cls.code: cls
    for cls in (
        RequestFailed,
        Busy,
        CacheFull,
        SessionUnknown,
        StaleEpoch,
        OutOfOrder,
        BadRequest,
        NotServed,
        Forbidden,
        RemoteFault,
    )
}


class LookupFailed(P2PLLMError):
    """A DHT lookup ended without one usable answer."""


class NoRoute(P2PLLMError):
    """No chain of servers covers all blocks of the model.

    `missing` holds the uncovered spans as (start, stop) pairs.
    """

    def __init__(self, message: str, missing: Sequence[tuple[int, int]] = ()) -> None:
        super().__init__(message)
        self.missing = tuple(missing)


class OpenFailed(P2PLLMError):
    """Not every hop of a route could be opened.

    `failures` maps the peers that failed to their errors.
    """

    def __init__(self, failures: Mapping[Any, P2PLLMError]) -> None:
        super().__init__("; ".join(str(exc) for exc in failures.values()))
        self.failures = dict(failures)


class StepFailed(P2PLLMError):
    """A hop of a chain did not carry out a step.

    `peer` is who says so (`cause` is then a RequestFailed), who was lost (a TransportError) or who
    answered nonsense (a RemoteProtocolError). `next_hop`: `peer` could not pass the step on to it.
    `is_input`: `peer` finds the input wrong that it was given.
    """

    def __init__(
        self, peer: Any, cause: P2PLLMError, next_hop: Any = None, *, is_input: bool = False
    ) -> None:
        super().__init__(str(cause))
        self.peer = peer
        self.cause = cause
        self.next_hop = next_hop
        self.is_input = is_input


class SessionLost(P2PLLMError):
    """A session could not be continued on any server."""


class CheckpointError(P2PLLMError):
    """A model file is missing, truncated, or does not fit the model; names file and tensor."""


class ConfigError(P2PLLMError):
    """A setting that cannot be carried out; the message says what can."""
