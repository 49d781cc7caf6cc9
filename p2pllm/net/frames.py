"""Frames: what one Noise message of a connection holds.

    u8 type   u32 stream   payload

    OPEN      u8 flags  u8 priority  u8 kind  u32 remaining_ms  data    a new stream
    DATA      u8 flags  data                                            more of a stream
    CREDIT    u8 group  u64 limit        total bytes allowed, see below
    RESET     u16 code                   both directions end; what is queued is dropped
    STOP                                 "send no more on this stream": answered with an end
    PING      u64 nonce
    PONG      u64 nonce
    RECEIVED  u64 total                  bytes of priorities 2 and 3 that have arrived
    DONE      u32 stream *               these pushes have been taken over by the application
    GOAWAY    u16 code                   no new streams, please

Whoever dialled opens odd streams, the other side even ones, with rising numbers. A type with the
high bit set may be ignored by who does not know it; any other unknown type ends the connection.

Flags of OPEN and DATA: 1 nothing follows; 2 the stream is of priority 2 or 3 (so that bytes of a
stream that its reader has forgotten can be counted); 4 the bytes were granted by name.
Limits in CREDIT are absolute, so that repeating one does no harm (as in RFC 9000 §4.1). On
stream 0, for all bytes without flag 4 of priorities 0 and 1 (group 0) or 2 and 3 (group 1); on a
stream, for its bytes, which the connection's limit covers as well (group 0) or not (group 1).
"""

import enum
import struct

from p2pllm.errors import CodecError

HEAD = struct.Struct(">BI")
OPEN = struct.Struct(">BIBBBI")
DATA = struct.Struct(">BIB")
CREDIT = struct.Struct(">BIBQ")
CODE = struct.Struct(">BIH")
NUMBER = struct.Struct(">BIQ")
STREAM_ID = struct.Struct(">I")

FLAG_END = 1
FLAG_HEAVY = 2
FLAG_GRANTED = 4
GRANTED = 1  # the group in a stream's CREDIT
IGNORABLE = 0x80
MAX_STREAM_ID = 2**32 - 1
MAX_REMAINING_S = 3600.0  # a longer deadline is cut to this: no call may stay for ever


class FrameType(enum.IntEnum):
    """The number is the first byte on the wire."""

    OPEN = 1
    DATA = 2
    CREDIT = 3
    RESET = 4
    STOP = 5
    PING = 6
    PONG = 7
    RECEIVED = 8
    DONE = 9
    GOAWAY = 10


class Priority(enum.IntEnum):
    """What may overtake what; lower goes first. The number is on the wire."""

    CONTROL = 0
    DECODE = 1
    PREFILL = 2  # prefill and backward
    BULK = 3  # bulk transfers and echoes


class StreamKind(enum.IntEnum):
    """What the opener expects on a stream; the number is on the wire."""

    UNARY = 0  # one message each way
    STREAMING = 1  # one message there, many back
    PUSH = 2  # one message there, DONE back


class Code(enum.IntEnum):
    """Why a stream was reset, or a connection is going away. Peers may send others."""

    CANCELLED = 1
    DEADLINE = 2
    REFUSED = 3  # a bound on streams is reached; nothing was done
    MALFORMED = 5  # the message did not parse
    CLOSING = 6  # after a GOAWAY; nothing was done, another connection may serve
    REPLACED = 7  # another connection of the same kind to the same peer is kept
    IDLE = 8
    UNHANDLED = 9  # nobody here takes messages of this type


def parse(layout: struct.Struct, frame: bytes | memoryview) -> tuple[int, ...]:
    """All fields of a frame with a fixed layout; raises CodecError if its length is wrong."""
    if len(frame) != layout.size:
        raise CodecError(f"a frame of type {frame[0]} has {layout.size} bytes, not {len(frame)}")
    return layout.unpack(frame)


def parse_head(layout: struct.Struct, frame: bytes | memoryview) -> tuple[int, ...]:
    """The leading fields of a frame that goes on with data; raises CodecError if it is short."""
    if len(frame) < layout.size:
        raise CodecError(f"a frame of type {frame[0]} has at least {layout.size} bytes")
    return layout.unpack_from(frame)
