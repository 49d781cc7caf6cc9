"""What servers say about themselves in the DHT: their presence, and the models of the swarm.

    namespace "presence", name = the model's digest in hex    one `Presence` per server
    namespace "models",   name = "all"                         one `ModelListing` per server

A presence carries the whole span and everything a router needs to price the server without
asking it: speed, queue, free cache, and a few round trips to servers that could come next. It is
a claim, signed but not proved: a client's own measurements go before it (`p2pllm.swarm.view`).

A record has 1 KiB in all (`p2pllm.wire.records`), so PeerIds and round trips are packed as bytes,
and `to_body` clamps every value to the bounds that readers enforce.
"""

import enum
import struct
from dataclasses import dataclass
from typing import Any

from p2pllm.errors import CodecError
from p2pllm.ids import PEER_ID_BYTES, ModelId, PeerId
from p2pllm.spans import Span
from p2pllm.wire.messages import Numerics
from p2pllm.wire.records import PRESENCE_NAMESPACE, Record

MODELS_NAMESPACE = "models"
MODELS_NAME = "all"

MAX_RTTS = 10
MAX_RELAYS = 3
MAX_BLOCKS = 4096  # of a model; the deepest published ones have about 130
MAX_NAME_BYTES = 48  # of a public name, in UTF-8
MAX_MODEL_NAME_BYTES = 128
MAX_WORD_BYTES = 16  # of a version or a part of numerics
_MAX_TOKENS = 2**32 - 1
_MAX_SECONDS = 3600.0  # of a queue, or of one block's step
_MIN_SECONDS = 1e-9
_MIN_RATE, _MAX_RATE = 1e-3, 1e12
_MAX_SLOWDOWN = 1e3
_MAX_RTT_S = 60.0
_RTT = struct.Struct(f">{PEER_ID_BYTES}sI")  # PeerId, round trip in microseconds


class ServerState(enum.IntEnum):
    """Where a server stands in its life; only ONLINE ones take new sessions."""

    JOINING = 0  # loading its blocks
    ONLINE = 1
    DRAINING = 2  # finishes its sessions and then leaves


@dataclass(frozen=True, slots=True)
class Presence:
    """One server's word about itself.

    `seconds_per_block_1` and `_8`: one decode step of one block for 1 and for 8 sequences at once.
    `prefill_tokens_s`: tokens × blocks per second while reading a prompt, so that T tokens take
    T × blocks / prefill_tokens_s seconds; `prefill_slowdown` times as long while others decode
    there, as now. `free_tokens`: room in the K/V cache for new sessions,
    as tokens that may each go through the whole span. `queue_s`: how long a new step waits.
    `rtts`: measured round trips in seconds to servers that could be the next hop.
    `relays`: peers through which it can be reached when it cannot be dialled.
    `next_span`: where it is about to move; it serves `span` as long as it is ONLINE.
    `is_movable`: it moves to other blocks when the swarm gains by that.
    """

    peer_id: PeerId
    span: Span
    numerics: Numerics
    state: ServerState = ServerState.ONLINE
    seconds_per_block_1: float = 0.01
    seconds_per_block_8: float = 0.01
    prefill_tokens_s: float = 1000.0
    prefill_slowdown: float = 1.0
    free_tokens: int = 0
    queue_s: float = 0.0
    max_tokens_per_session: int = 0
    relays: tuple[PeerId, ...] = ()
    rtts: tuple[tuple[PeerId, float], ...] = ()
    public_name: str = ""
    version: str = ""
    next_span: Span | None = None
    is_movable: bool = False

    def seconds_per_block(self, batch: int) -> float:
        """One decode step of one block for `batch` sequences: the line through batch 1 and 8."""
        slope = max(0.0, self.seconds_per_block_8 - self.seconds_per_block_1) / 7
        return self.seconds_per_block_1 + slope * (batch - 1)

    def to_body(self) -> dict[str, Any]:
        """The record's body; what is out of the readers' bounds is clamped to them."""
        numerics, coming = self.numerics, self.next_span
        return {
            "span": [self.span.start, self.span.stop],
            "state": int(self.state),
            "numerics": [
                _printable(word, MAX_WORD_BYTES)
                for word in (numerics.dtype, numerics.quantization, numerics.kv_dtype)
            ],
            "block1_s": _clamp(self.seconds_per_block_1, _MIN_SECONDS, _MAX_SECONDS),
            "block8_s": _clamp(self.seconds_per_block_8, _MIN_SECONDS, _MAX_SECONDS),
            "prefill": _clamp(self.prefill_tokens_s, _MIN_RATE, _MAX_RATE),
            "slow": _clamp(self.prefill_slowdown, 1.0, _MAX_SLOWDOWN),
            "free": min(max(self.free_tokens, 0), _MAX_TOKENS),
            "queue_s": _clamp(self.queue_s, 0.0, _MAX_SECONDS),
            "max_tokens": min(max(self.max_tokens_per_session, 0), _MAX_TOKENS),
            "relays": b"".join(relay.key for relay in self.relays[:MAX_RELAYS]),
            "rtts": b"".join(
                _RTT.pack(peer.key, round(_clamp(rtt_s, 0.0, _MAX_RTT_S) * 1e6))
                for peer, rtt_s in self.rtts[:MAX_RTTS]
            ),
            "name": _printable(self.public_name, MAX_NAME_BYTES),
            "version": _printable(self.version, MAX_WORD_BYTES),
            "moves": self.is_movable,
            "next": None if coming is None else [coming.start, coming.stop],
        }

    @classmethod
    def from_record(cls, record: Record) -> "Presence":
        """Read a record of namespace "presence"; raises CodecError if its body is not one.

        A tombstone is not one either: the caller asks `record.is_tombstone` first.
        """
        if record.namespace != PRESENCE_NAMESPACE:
            raise CodecError(f"a record of namespace {record.namespace!r} is no presence")
        body = record.body
        return cls(
            peer_id=record.subkey,
            span=_span(body, "span"),
            numerics=_numerics(body),
            state=_state(body),
            seconds_per_block_1=_number(body, "block1_s", _MIN_SECONDS, _MAX_SECONDS),
            seconds_per_block_8=_number(body, "block8_s", _MIN_SECONDS, _MAX_SECONDS),
            prefill_tokens_s=_number(body, "prefill", _MIN_RATE, _MAX_RATE),
            prefill_slowdown=_number(body, "slow", 1.0, _MAX_SLOWDOWN) if "slow" in body else 1.0,
            free_tokens=_integer(body, "free", 0, _MAX_TOKENS),
            queue_s=_number(body, "queue_s", 0.0, _MAX_SECONDS),
            max_tokens_per_session=_integer(body, "max_tokens", 0, _MAX_TOKENS),
            relays=_relays(body),
            rtts=_rtts(body),
            public_name=_text(body, "name", MAX_NAME_BYTES),
            version=_text(body, "version", MAX_WORD_BYTES),
            next_span=None if body.get("next") is None else _span(body, "next"),
            is_movable=body.get("moves") is True,
        )


@dataclass(frozen=True, slots=True)
class ModelListing:
    """One server's entry in the index of models: which one it serves, and how deep that is."""

    peer_id: PeerId
    model: ModelId
    num_blocks: int
    hidden_size: int = 0  # values per token between blocks; 0: not said

    def to_body(self) -> dict[str, Any]:
        """The record's body."""
        return {
            "name": _printable(self.model.name, MAX_MODEL_NAME_BYTES),
            "digest": self.model.digest,
            "num_blocks": self.num_blocks,
            "hidden_size": self.hidden_size,
        }

    @classmethod
    def from_record(cls, record: Record) -> "ModelListing":
        """Read a record of namespace "models"; raises CodecError if its body is not one."""
        if record.namespace != MODELS_NAMESPACE:
            raise CodecError(f"a record of namespace {record.namespace!r} lists no model")
        digest = record.body.get("digest")
        if type(digest) is not bytes or len(digest) != 32:
            raise CodecError("a model's digest has 32 bytes")
        name = _text(record.body, "name", MAX_MODEL_NAME_BYTES)
        num_blocks = _integer(record.body, "num_blocks", 1, MAX_BLOCKS)
        hidden_size = _integer(record.body, "hidden_size", 0, 2**20, default=0)
        return cls(record.subkey, ModelId(digest, name), num_blocks, hidden_size)


def presence_name(model: ModelId) -> str:
    """The name under which the presences of a model's servers are found."""
    return model.digest.hex()


# --- writing ---------------------------------------------------------------------------------


def _clamp(value: float, low: float, high: float) -> float:
    return min(max(float(value), low), high) if value == value else high  # NaN: the worst


def _printable(text: str, max_bytes: int) -> str:
    """The text without control characters, cut to a whole number of characters."""
    kept = "".join(c for c in text if c.isprintable()).encode("utf-8", "replace")[:max_bytes]
    return kept.decode("utf-8", "ignore")


# --- reading ---------------------------------------------------------------------------------


def _number(body: dict[str, Any], name: str, low: float, high: float) -> float:
    value = body.get(name)
    if (
        not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high
    ):  # refuses NaN as well
        raise CodecError(f"{name!r} must be a number from {low:g} to {high:g}")
    return float(value)


def _integer(
    body: dict[str, Any], name: str, low: int, high: int, *, default: int | None = None
) -> int:
    value = body.get(name, default)
    if type(value) is not int or not low <= value <= high:
        raise CodecError(f"{name!r} must be an integer from {low} to {high}")
    return value


def _text(body: dict[str, Any], name: str, max_bytes: int) -> str:
    return _word(body.get(name, ""), name, max_bytes)


def _word(value: object, name: str, max_bytes: int) -> str:
    # Only printable text: a name ends on other people's terminals, which obey escape sequences.
    if not isinstance(value, str) or not value.isprintable() or len(value.encode()) > max_bytes:
        raise CodecError(f"{name!r} must be printable text of at most {max_bytes} bytes")
    return value


def _span(body: dict[str, Any], name: str) -> Span:
    ends = body.get(name)
    if not isinstance(ends, list) or len(ends) != 2 or not all(type(end) is int for end in ends):
        raise CodecError(f"{name!r} must be two integers")
    start, stop = ends
    if not 0 <= start < stop <= MAX_BLOCKS:
        raise CodecError(f"{start}:{stop} is not a span of blocks")
    return Span(start, stop)


def _numerics(body: dict[str, Any]) -> Numerics:
    words = body.get("numerics")
    if not isinstance(words, list) or len(words) < 3:
        raise CodecError("'numerics' must be three words")
    dtype, quantization, kv_dtype = (_word(word, "numerics", MAX_WORD_BYTES) for word in words[:3])
    return Numerics(dtype, quantization, kv_dtype)


def _state(body: dict[str, Any]) -> ServerState:
    return ServerState(_integer(body, "state", min(ServerState), max(ServerState)))


def _packed(body: dict[str, Any], name: str, item_bytes: int, max_items: int) -> bytes:
    value = body.get(name, b"")
    if type(value) is not bytes or len(value) % item_bytes or len(value) > item_bytes * max_items:
        raise CodecError(f"{name!r} must be at most {max_items} times {item_bytes} bytes")
    return value


def _relays(body: dict[str, Any]) -> tuple[PeerId, ...]:
    packed = _packed(body, "relays", PEER_ID_BYTES, MAX_RELAYS)
    return tuple(
        PeerId(packed[at : at + PEER_ID_BYTES]) for at in range(0, len(packed), PEER_ID_BYTES)
    )


def _rtts(body: dict[str, Any]) -> tuple[tuple[PeerId, float], ...]:
    packed = _packed(body, "rtts", _RTT.size, MAX_RTTS)
    pairs = tuple((PeerId(key), micros / 1e6) for key, micros in _RTT.iter_unpack(packed))
    if any(rtt_s > _MAX_RTT_S for _, rtt_s in pairs):
        raise CodecError(f"a round trip of more than {_MAX_RTT_S:g} s")
    return pairs
