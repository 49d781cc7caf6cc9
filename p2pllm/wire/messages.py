"""Every message between peers: one frozen dataclass each, in one registry.

A message on a stream is

    u16 type   u8 version   u8 num_tensors   u32 num_bytes   body   tensor*

with the body a msgpack map of the dataclass's fields and the tensors as in `p2pllm.wire.tensors`.
Keys that a receiver does not know are ignored and a missing key takes the field's default, so a
newer minor version may add fields; anything else that does not fit is a `CodecError`. Inside
maps, a nested value (`Row`, `HopTiming`) is an array of its fields in order, to which newer
versions may append. The types say what a number may be (`Count`, `Seconds`): a size that is
negative is refused here and reaches no handler.

docs/protocol.md tells what each message is for and who answers it with what.
"""

import enum
import operator
import struct
import types
import typing
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from typing import Annotated, Any, ClassVar, TypeVar

from p2pllm.errors import REQUEST_ERRORS, CodecError, LocalProtocolError, RequestFailed
from p2pllm.ids import ModelId, PeerId, SessionId
from p2pllm.spans import Span
from p2pllm.wire.codec import Reader, pack, unpack_map
from p2pllm.wire.tensors import DType, TensorCodec, WireTensor, read_tensor

MAX_BODY_BYTES = 64 * 2**10  # everything but tensors; the largest is a 16 KiB page of records
MAX_TENSORS = 4
MAX_TEXT = 1024  # characters of an error's sentence or a name
MAX_ITEMS = 1024  # entries of any array in a body
HEAD_BYTES = 8
MIN_BUDGET_S = 0.001  # of a Step that has a deadline: 0 means that it has none
MAX_COUNT = 2**31 - 1  # of anything that is numbered or counted
PREFIX_TOKENS = 64  # that each further prefix key of an Open stands for: a page of the caches
PREFIX_KEY_BYTES = 16
MAX_PREFIX_KEYS = 128  # of an Open: the first 8192 tokens of a prompt


@dataclass(frozen=True, slots=True)
class Between:
    """What a number on the wire may be, both ends included."""

    least: float
    most: float


Count = Annotated[int, Between(0, MAX_COUNT)]
Positive = Annotated[int, Between(1, MAX_COUNT)]
Seconds = Annotated[float, Between(0.0, 1e15)]  # a duration, or a wall time
Rate = Annotated[float, Between(0.0, 1e15)]  # bytes per second


class Echo(enum.IntEnum):
    """Which of a hop's outputs it also sends to the client (design, section 5)."""

    NONE = 0
    DECODE_ONLY = 1
    ALL = 2


@dataclass(frozen=True, slots=True)
class Numerics:
    """What a server computes in: servers with equal numerics give equal results.

    `dtype` is the compute type ("float32", "bfloat16", "float16"), `quantization` how weights are
    held ("none" or a scheme's name), `kv_dtype` the type of cached keys and values.
    """

    dtype: str
    quantization: str = "none"
    kv_dtype: str = ""

    def __str__(self) -> str:
        extras = [self.quantization] if self.quantization != "none" else []
        extras += [f"kv {self.kv_dtype}"] if self.kv_dtype not in ("", self.dtype) else []
        return " ".join([self.dtype, *extras])


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence's part of a step: `num_tokens` tokens at `position`, …

    Fenced by `epoch` (rises with every change of route), numbered by `step` (rises by one).
    `acked` is the newest step whose output the client holds: older kept outputs may go.
    `tail`, if not 0, asks for the outputs of the last `tail` tokens only: after a prompt the
    client needs one hidden state, not thousands.
    `first_step` is the number of the first step of this epoch: only that one may leave numbers
    out, whatever else arrives before it. -1: not said, and whichever comes first may.
    """

    session: SessionId
    epoch: Count
    step: Count
    position: Count
    num_tokens: Positive
    acked: Annotated[int, Between(-1, MAX_COUNT)] = -1
    tail: Count = 0
    first_step: Annotated[int, Between(-1, MAX_COUNT)] = -1

    @property
    def num_outputs(self) -> int:
        """Rows of the output tensor that are this row's."""
        return min(self.tail or self.num_tokens, self.num_tokens)


@dataclass(frozen=True, slots=True)
class HopTiming:
    """What one hop did with a step, all in seconds (`sent_at` on the hop's own clock).

    `next_rtt_s` and `next_rate_bytes_s` are what its transport knows of the link that the output
    leaves on, to the next hop or the client: the smallest recent round trip, and the rate of
    delivery; 0: not known. All of it is a claim, see `p2pllm.swarm.timings`.
    """

    queue_s: Seconds
    compute_s: Seconds
    sent_at: Seconds
    next_rtt_s: Seconds = 0.0
    next_rate_bytes_s: Rate = 0.0


MESSAGES: dict[int, type["Message"]] = {}
M = TypeVar("M", bound="type[Message]")


class Message:
    """Base of all messages; subclasses are frozen dataclasses made known by `@message`."""

    __slots__ = ()
    TYPE: ClassVar[int]
    VERSION: ClassVar[int]


def message(number: int, version: int = 1) -> Callable[[M], M]:
    """Enter a dataclass into the registry as type `number`, which is never reused."""

    def register(cls: M) -> M:
        if number in MESSAGES:
            raise LocalProtocolError(f"message type {number} is taken")
        cls.TYPE, cls.VERSION = number, version
        MESSAGES[number] = cls
        return cls

    return register


# --- any request -----------------------------------------------------------------------------


@message(1)
@dataclass(frozen=True, slots=True)
class ErrorReply(Message):
    """The answer to a request that failed. `error` is a code of `p2pllm.errors`."""

    error: int
    text: str
    retry_after_s: Seconds = 0.0
    expected: Count = 0

    def to_exception(self) -> RequestFailed:
        """The error as the exception class that its code stands for."""
        cls = REQUEST_ERRORS.get(self.error, RequestFailed)
        return cls(self.text, retry_after_s=self.retry_after_s, expected=self.expected)

    @classmethod
    def from_exception(cls, exc: RequestFailed) -> "ErrorReply":
        """The reply that makes the other side raise the same."""
        return cls(exc.code, exc.message[:MAX_TEXT], exc.retry_after_s, exc.expected)


@message(2)
@dataclass(frozen=True, slots=True)
class Ack(Message):
    """Received; nothing more to say."""


# --- DHT -------------------------------------------------------------------------------------


@message(16)
@dataclass(frozen=True, slots=True)
class FindNode(Message):
    """Which peers do you know closest to `target`? Answered with `Nodes`.

    `sender` is the asker's signed peer record if it serves the DHT itself, else empty.
    """

    target: bytes
    sender: bytes = b""


@message(17)
@dataclass(frozen=True, slots=True)
class Nodes(Message):
    """Signed peer records (`p2pllm.wire.records`) of the closest peers known, closest first."""

    nodes: tuple[bytes, ...]


@message(18)
@dataclass(frozen=True, slots=True)
class FindValue(Message):
    """The records at `key`, from `cursor` on, and the closest peers. Answered with `Values`.

    `subkey` narrows to one writer's slot (empty: all).
    """

    namespace: str
    key: bytes
    subkey: bytes = b""
    cursor: Count = 0
    sender: bytes = b""


@message(19)
@dataclass(frozen=True, slots=True)
class Values(Message):
    """A page of records, the `cursor` of the next page (0: none), and the closest peers.

    `ages_s` says for each record how long ago the storer received it; `records` and `nodes`
    together stay within 16 KiB.
    """

    records: tuple[bytes, ...]
    cursor: Count
    nodes: tuple[bytes, ...]
    ages_s: tuple[Seconds, ...] = ()


@message(20)
@dataclass(frozen=True, slots=True)
class Store(Message):
    """Keep these records. Answered with `Stored`."""

    records: tuple[bytes, ...]
    sender: bytes = b""


@message(21)
@dataclass(frozen=True, slots=True)
class Stored(Message):
    """For each record of the `Store`, in order: "" if kept, else why not."""

    refusals: tuple[str, ...]


# --- inference -------------------------------------------------------------------------------


@message(32)
@dataclass(frozen=True, slots=True)
class Open(Message):
    """Open a session on one hop, or take it over under a higher epoch. Answered with `Opened`.

    `push_token` is what this hop's predecessor will present; `next_hop` (the next hop's signed
    peer record, empty for the last) and `next_token` are what this hop needs to push onwards.
    With `source`, the signed peer record of a server that holds the session's blocks already, a
    new session's first `source_position` tokens are pulled from there: see `HandOver`.
    `prefix_keys` name the session's first tokens, 64 more each: those that sessions of this client
    with the same keys have left here need not be computed again, and `Opened.position` says so.
    """

    session: SessionId
    epoch: Count
    span: Span
    max_tokens: Positive
    model: ModelId
    numerics: Numerics
    push_token: bytes
    client: PeerId
    next_hop: bytes = b""
    next_token: bytes = b""
    echo: Echo = Echo.NONE
    codec: TensorCodec = TensorCodec.RAW
    is_compressed: bool = False
    wait_s: Seconds = 0.0
    source: bytes = b""
    source_token: bytes = b""
    source_position: Count = 0
    prefix_keys: tuple[bytes, ...] = ()


@message(33)
@dataclass(frozen=True, slots=True)
class Opened(Message):
    """The session is open with room for `max_tokens`, and stays while used within `lease_s`.

    `next_rtt_s` is the measured round trip to the next hop; negative if it could not be reached
    or there is none. `position` is the cache's length (above 0 when taken over, handed over, or
    begun with a prefix that was there), `next_step` the number that follows the newest step seen
    (0: none was).
    """

    lease_s: Seconds
    position: Count = 0
    next_rtt_s: float = -1.0
    numerics: Numerics = Numerics("")
    next_step: Count = 0


@message(34)
@dataclass(frozen=True, slots=True)
class Step(Message):
    """Compute these rows; pushed to a hop by the client or by the hop before it.

    `tensor` packs the rows' hidden states in order: (sum of num_tokens, D). `tokens` holds one
    push token per row when a hop pushes (the client proves itself by its PeerId). `timings`
    grows by one entry per hop. `budget_s` is the time left when it was sent.
    """

    rows: tuple[Row, ...]
    tensor: WireTensor
    tokens: tuple[bytes, ...] = ()
    timings: tuple[HopTiming, ...] = ()
    budget_s: Seconds = 0.0


@message(35)
@dataclass(frozen=True, slots=True)
class Output(Message):
    """Pushed to the client: the last hop's result of a step, or an echo of an earlier hop's.

    The rows are of one `Step`, all or some of them. `tensor` packs (sum of num_outputs, D).
    """

    rows: tuple[Row, ...]
    tensor: WireTensor
    timings: tuple[HopTiming, ...] = ()
    is_echo: bool = False


@message(36)
@dataclass(frozen=True, slots=True)
class HopFailed(Message):
    """Pushed to the client: these rows of a step went no further than the sender.

    `error` and `text` as in `ErrorReply`; `next_hop` is the unreachable successor (empty: the
    fault is the sender's own). `is_input`: the hidden states that came in were no good (of a wrong
    shape, not decodable, not finite), so the fault is the sender's of the step.
    """

    rows: tuple[Row, ...]
    error: int
    text: str
    next_hop: bytes = b""
    retry_after_s: Seconds = 0.0
    expected: Count = 0
    is_input: bool = False


@message(37)
@dataclass(frozen=True, slots=True)
class Rewire(Message):
    """Change a hop's successor under a new epoch. Answered with `Opened`."""

    session: SessionId
    epoch: Count
    next_hop: bytes = b""
    next_token: bytes = b""


@message(38)
@dataclass(frozen=True, slots=True)
class Close(Message):
    """The session is over; free its pages. Answered with `Ack`, also if it is unknown."""

    sessions: tuple[SessionId, ...]
    epoch: Count


@message(39)
@dataclass(frozen=True, slots=True)
class Fork(Message):
    """Copy the first `position` tokens of a session into a new one. Answered with `Opened`."""

    session: SessionId
    epoch: Count
    new_session: SessionId
    position: Count
    push_token: bytes = b""
    next_token: bytes = b""


@message(40)
@dataclass(frozen=True, slots=True)
class Leaving(Message):
    """Pushed to a client: this server goes away in `deadline_s`; move these sessions elsewhere."""

    sessions: tuple[SessionId, ...]
    deadline_s: Seconds


@message(41)
@dataclass(frozen=True, slots=True)
class HandOver(Message):
    """Let whoever presents `token` read this session's keys and values. Answered with `Opened`.

    Sent by the client to the server that has them; the one that is to get them is told by `Open`
    (`source`, `source_token`), and sends `Pull`. Holds until the session is closed, or changed.
    """

    session: SessionId
    epoch: Count
    token: bytes


@message(42)
@dataclass(frozen=True, slots=True)
class Pull(Message):
    """Stream a session's tokens `[start, stop)` in the blocks of `span`, as `Pages`.

    Asked again from a later `start`, it goes on after an interruption.
    """

    session: SessionId
    token: bytes
    model: ModelId
    numerics: Numerics
    span: Span
    start: Count
    stop: Positive


@message(43)
@dataclass(frozen=True, slots=True)
class Pages(Message):
    """Keys and values of tokens `[position, position + num_tokens)`, as the cache holds them.

    `tensor`: (blocks, 2 · kv_heads, num_tokens, head_dim), all keys before all values, raw. In
    8 bits the last dimension has head_dim codes, and then the two bytes of their scale.
    `checksum`: CRC-32 of its data.
    """

    position: Count
    num_tokens: Positive
    checksum: Annotated[int, Between(0, 2**32 - 1)]
    tensor: WireTensor


# --- between servers -------------------------------------------------------------------------


@message(48)
@dataclass(frozen=True, slots=True)
class Stay(Message):
    """Keep these blocks for a minute: the sender is about to leave them. Answered with `Ack`."""

    model: ModelId
    span: Span


# --- without a session -----------------------------------------------------------------------


@message(56)
@dataclass(frozen=True, slots=True)
class Forward(Message):
    """Run whole sequences through blocks, and keep nothing. Answered with `Forwarded`.

    `tensor` packs the sequences' hidden states without padding: (sum of lengths, D). Each begins
    at position 0. `codec` and `is_compressed`: how the answer is to be coded.
    """

    model: ModelId
    numerics: Numerics
    span: Span
    lengths: tuple[Positive, ...]
    tensor: WireTensor
    codec: TensorCodec = TensorCodec.RAW
    is_compressed: bool = False


@message(57)
@dataclass(frozen=True, slots=True)
class Forwarded(Message):
    """The last block's outputs, packed as the hidden states of the `Forward` were."""

    tensor: WireTensor
    timing: HopTiming


# --- bodies ----------------------------------------------------------------------------------


_HEAD = struct.Struct(">HBBI")  # type, version, tensors, bytes of the body


def encode_head(msg: Message) -> bytes:
    """Head and body: all but the tensors, which `tensors_of` gives."""
    schema = _schema(type(msg))
    packed = pack({name: to_wire(getattr(msg, name)) for name, to_wire in schema.encoders})
    if len(packed) > MAX_BODY_BYTES:
        raise LocalProtocolError(f"{type(msg).__name__} of {len(packed)} bytes is too large")
    return _HEAD.pack(msg.TYPE, msg.VERSION, len(schema.tensors), len(packed)) + packed


def tensors_of(msg: Message) -> tuple[WireTensor, ...]:
    """The tensors that follow the body, in the order of the fields."""
    return tuple(getattr(msg, name) for name in _schema(type(msg)).tensors)


def encode_message(msg: Message) -> list[bytes | bytearray | memoryview]:
    """The message as buffers to be sent one after the other; tensor data is not copied."""
    buffers: list[bytes | bytearray | memoryview] = [encode_head(msg)]
    for tensor in tensors_of(msg):
        buffers += [tensor.head_bytes(), tensor.data]
    return buffers


def decode_message(data: bytes | bytearray | memoryview) -> Message:
    """Parse one whole message; raises CodecError. Tensor data stays a view of `data`."""
    reader = Reader(data)
    number, version, num_tensors, num_bytes = reader.fields(_HEAD)
    cls = MESSAGES.get(number)
    if cls is None:
        raise CodecError(f"unknown message type {number}")
    if version < 1:
        raise CodecError(f"message version {version}")
    if num_tensors > MAX_TENSORS:
        raise CodecError(f"{num_tensors} tensors; at most {MAX_TENSORS} are allowed")
    if num_bytes > MAX_BODY_BYTES:
        raise CodecError(f"a body of {num_bytes} bytes; {MAX_BODY_BYTES} are allowed")
    body = unpack_map(reader.take(num_bytes), max_bytes=MAX_BODY_BYTES)
    tensors = [read_tensor(reader) for _ in range(num_tensors)]
    reader.finish()
    return _build(cls, body, tensors)


def _build(cls: type[Message], body: dict[str, Any], tensors: list[WireTensor]) -> Message:
    schema = _schema(cls)
    if len(tensors) < len(schema.tensors):
        raise CodecError(f"{cls.__name__} lacks its tensor")
    if cls is not Pages and any(tensor.header.dtype is DType.INT8 for tensor in tensors):
        raise CodecError(f"{cls.__name__} with hidden states in a type that is for pages only")
    values: dict[str, Any] = dict(zip(schema.tensors, tensors, strict=False))
    for name, from_wire in schema.decoders:
        if name in body:
            values[name] = from_wire(body[name])
        elif name in schema.required:
            raise CodecError(f"{cls.__name__} lacks {name!r}")
    return cls(**values)


# --- schemas: one pair of functions per field, made once per class from its annotations --------

_Convert = Callable[[Any], Any]


@dataclass(frozen=True, slots=True)
class _Schema:
    """What a class's fields are on the wire, in their order. Every token passes here six times."""

    encoders: tuple[tuple[str, _Convert], ...]  # of all fields but tensors
    decoders: tuple[tuple[str, _Convert], ...]
    required: frozenset[str]  # of these
    tensors: tuple[str, ...]  # the names of the others


_SCHEMAS: dict[type, _Schema] = {}


def _schema(cls: type) -> _Schema:
    schema = _SCHEMAS.get(cls)
    if schema is None:
        hints = typing.get_type_hints(cls, include_extras=True)
        encoders, decoders, required, tensors = [], [], set(), []
        for item in fields(cls):
            if hints[item.name] is WireTensor:
                tensors.append(item.name)
                continue
            to_wire, from_wire = _converters(hints[item.name])
            encoders.append((item.name, to_wire))
            decoders.append((item.name, from_wire))
            if item.default is MISSING:
                required.add(item.name)
        schema = _Schema(tuple(encoders), tuple(decoders), frozenset(required), tuple(tensors))
        _SCHEMAS[cls] = schema
    return schema


def _converters(kind: Any) -> tuple[_Convert, _Convert]:
    """How a value of this type is turned into what msgpack knows, and checked and turned back."""
    assert kind is not WireTensor, "tensors stand alone"
    if typing.get_origin(kind) is Annotated:
        number, bounds = typing.get_args(kind)
        return _same, _bounded(number, bounds)
    if kind in _SCALARS:
        return _same, _SCALARS[kind]
    if kind in _IDS:
        return _IDS[kind]
    if isinstance(kind, type) and issubclass(kind, enum.IntEnum):
        return int, lambda value: _enum(kind, value)
    if typing.get_origin(kind) is tuple:
        item_to, item_from = _converters(typing.get_args(kind)[0])
        return (
            lambda value: [item_to(item) for item in value],
            lambda value: tuple([item_from(item) for item in _array(value)]),
        )
    assert not isinstance(kind, types.UnionType), "an absent value has a default, not a None"
    return _nested(kind)


def _nested(cls: type) -> tuple[_Convert, _Convert]:
    """Of a dataclass inside a message: an array of its fields."""
    schema = _schema(cls)
    names = [name for name, _ in schema.encoders]
    to_wire = [convert for _, convert in schema.encoders]
    from_wire = [convert for _, convert in schema.decoders]
    get_all = operator.attrgetter(*names)
    assert len(names) > 1, "attrgetter gives no tuple for one"

    def encode(value: Any) -> list[Any]:
        return [convert(item) for convert, item in zip(to_wire, get_all(value), strict=True)]

    def decode(value: Any) -> Any:
        items = _array(value)
        if len(items) < len(schema.required):
            raise CodecError(f"{cls.__name__} is too short")
        return cls(*[convert(item) for convert, item in zip(from_wire, items, strict=False)])

    return encode, decode


def _array(value: Any) -> list[Any]:
    if type(value) is not list or len(value) > MAX_ITEMS:
        raise CodecError(f"an array of at most {MAX_ITEMS} items is expected")
    return value


def _enum(kind: type[enum.IntEnum], value: Any) -> enum.IntEnum:
    try:
        return kind(_int(value))
    except ValueError as exc:
        raise CodecError(str(exc)) from exc


def _same(value: Any) -> Any:
    return value


def _int(value: Any) -> int:
    if type(value) is not int or not -(2**31) <= value < 2**63:
        raise CodecError("an integer is expected")
    return value


def _float(value: Any) -> float:
    if type(value) not in (int, float) or not -1e15 < value < 1e15:  # refuses NaN as well
        raise CodecError("a finite number is expected")
    return float(value)


def _bounded(number: type, bounds: Between) -> _Convert:
    """The check of a number of that type within bounds."""
    read, least, most = _SCALARS[number], bounds.least, bounds.most

    def check(value: Any) -> Any:
        if type(value) is not number:
            value = read(value)
        if least <= value <= most:  # which NaN is not
            return value
        raise CodecError(f"{value} where {least} to {most} is expected")

    return check


def _bool(value: Any) -> bool:
    if type(value) is not bool:
        raise CodecError("true or false is expected")
    return value


def _bytes(value: Any) -> bytes:
    if type(value) is not bytes:
        raise CodecError("bytes are expected")
    return value


def _text(value: Any) -> str:
    if type(value) is not str or len(value) > MAX_TEXT:
        raise CodecError(f"a text of at most {MAX_TEXT} characters is expected")
    return value


def _sized(value: Any, num_bytes: int) -> bytes:
    if len(_bytes(value)) != num_bytes:
        raise CodecError(f"{num_bytes} bytes are expected")
    return _bytes(value)


def _span(value: Any) -> Span:
    items = _array(value)
    if len(items) < 2 or not 0 <= _int(items[0]) < _int(items[1]) < 2**16:
        raise CodecError("not a span of blocks")
    return Span(items[0], items[1])


def _model(value: Any) -> ModelId:
    items = _array(value)
    if len(items) < 2:
        raise CodecError("not a model id")
    return ModelId(_sized(items[0], 32), _text(items[1]))


_SCALARS: dict[Any, _Convert] = {int: _int, float: _float, bool: _bool, bytes: _bytes, str: _text}
_IDS: dict[Any, tuple[_Convert, _Convert]] = {
    PeerId: (lambda value: value.key, lambda value: PeerId(_sized(value, 32))),
    SessionId: (lambda value: value.value, lambda value: SessionId(_sized(value, 16))),
    ModelId: (lambda value: [value.digest, value.name], _model),
    Span: (lambda value: [value.start, value.stop], _span),
}
