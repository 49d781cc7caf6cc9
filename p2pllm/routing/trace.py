"""The trace of a generation: where the time of every token went, as lines of JSON and as text.

A trace is a file of JSON objects, one a line. The first says what was generated; then comes one
`TraceRecord` per token and hop (for a prompt: per chunk and hop), and a `TraceMark` where a hop was
lost and replaced, or the route changed. `TraceWriter` makes them of what a client measures, and
`waterfall` draws them:

    token  hop  peer      blocks    ms   0                                      52.3
       12    1  mtkghcpl  0:10     17.4  ───────▒████
             2  3bcrp5rr  10:20    14.2              ──────████
             3  bmhletmz  20:30    20.7                        ──────████─────────

All moments are on the client's clock, in seconds since the generation began. Those within a step
follow from what the hops said of queue and computation, and from the client's guess of which link
took the rest (`p2pllm.swarm.timings`): clocks of other computers are not compared with ours.
"""

import json
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

from p2pllm.errors import ConfigError
from p2pllm.ids import PeerId
from p2pllm.swarm.timings import SegmentStep

VERSION = 1
MAX_LINE = 4096  # characters; records have about 300
MAX_RECORDS = 1_000_000
LINK, QUEUE, COMPUTE = "─▒█"
PLAIN = str.maketrans(LINK + QUEUE + COMPUTE, "-:#")  # for terminals without Unicode
MIN_WIDTH = 60
_HEAD = f"{'token':>7} {'hop':>3}  {'peer':8}  {'blocks':9} {'ms':>8}  "


@dataclass(frozen=True, slots=True)
class TraceRecord:
    """One token, or chunk of a prompt, at one hop.

    `token` counts the new tokens from 0; -1: a chunk of the prompt before its last one, which
    gives token 0. `position`: of the step's first token in the sequence. `sent_at` and
    `received_at` are when the step left the client and its output came back; `link_s` was spent
    on the way to the hop, `return_s` on the way back to the client. `num_bytes`: of the step's
    tensors, to and from. `is_relayed`: the client carried it to the next hop itself.
    """

    token: int
    hop: int
    peer: str
    blocks: str
    position: int
    num_tokens: int
    batch: int
    sent_at: float
    received_at: float
    link_s: float
    queue_s: float
    compute_s: float
    return_s: float = 0.0
    num_bytes: int = 0
    epoch: int = 0
    is_relayed: bool = False
    is_replay: bool = False

    @property
    def is_decode(self) -> bool:
        """A new token, and no part of a prompt or of a replay?"""
        return self.num_tokens == self.batch and not self.is_replay

    @property
    def total_s(self) -> float:
        """What the hop had of the step."""
        return self.link_s + self.queue_s + self.compute_s + self.return_s

    def to_line(self) -> str:
        """The record as a line of the file."""
        values = {
            name: round(value, 6) if isinstance(value, float) else value
            for name, value in asdict(self).items()
        }
        return json.dumps(values, separators=(",", ":")) + "\n"


@dataclass(frozen=True, slots=True)
class TraceMark:
    """Something happened: `what` in a word ("lost", "recovered", "moved"), `text` in a sentence."""

    at: float
    what: str
    text: str
    peer: str = ""

    def to_line(self) -> str:
        """The mark as a line of the file."""
        return json.dumps({"mark": asdict(self)}, separators=(",", ":")) + "\n"


@dataclass(frozen=True, slots=True)
class Trace:
    """A whole trace, read back."""

    model: str
    prompt_tokens: int
    records: tuple[TraceRecord, ...]
    marks: tuple[TraceMark, ...] = ()


T = TypeVar("T", TraceRecord, TraceMark)


class TraceWriter:
    """Makes the lines of a trace, and hands each to `write`.

    `started` is the client's monotonic clock when the generation began, `prompt_tokens` the length
    of the (longest) prompt: which token a step gives follows from its position.
    """

    def __init__(
        self, write: Callable[[str], object], *, started: float, prompt_tokens: int, model: str = ""
    ) -> None:
        self._write = write
        self._started = started
        self._prompt_tokens = prompt_tokens
        head = {"p2pllm_trace": VERSION, "model": model, "prompt_tokens": prompt_tokens}
        write(json.dumps(head, separators=(",", ":")) + "\n")

    def on_segment(self, step: SegmentStep) -> None:
        """A step came back from a segment of the chain: one line for each of its hops."""
        shares = step.shares()
        token = max(-1, step.position + step.num_tokens // step.batch - self._prompt_tokens)
        last = len(step.peers) - 1
        for index, share in enumerate(shares):
            record = TraceRecord(
                token=token,
                hop=step.first_hop + index,
                peer=str(step.peers[index]),
                blocks=str(step.spans[index]),
                position=step.position,
                num_tokens=step.num_tokens,
                batch=step.batch,
                sent_at=step.sent_at - self._started,
                received_at=step.received_at - self._started,
                link_s=share.link_s,
                queue_s=share.queue_s,
                compute_s=share.compute_s,
                return_s=share.return_s,
                num_bytes=step.sent_bytes + (step.received_bytes if index == last else 0),
                epoch=step.epoch,
                is_relayed=index == last and step.is_relayed,
                is_replay=step.is_replay,
            )
            self._write(record.to_line())

    def on_mark(self, what: str, text: str, now: float, peer: PeerId | None = None) -> None:
        """Note that a hop was lost, recovered, or the route moved."""
        mark = TraceMark(round(now - self._started, 6), what, text, str(peer) if peer else "")
        self._write(mark.to_line())


# --- reading ---------------------------------------------------------------------------------


def read_trace(lines: Iterable[str]) -> Trace:
    """The trace that a file holds. A last line cut short is left out. Raises ConfigError."""
    rows = iter(lines)
    head = _parse_head(next(rows, ""))
    records: list[TraceRecord] = []
    marks: list[TraceMark] = []
    for number, line in enumerate(rows, start=2):
        if not line.endswith("\n"):
            break  # the program was killed while it wrote
        if len(records) >= MAX_RECORDS:
            raise ConfigError(f"a trace of more than {MAX_RECORDS} records")
        values = _parse(line, number)
        if "mark" in values:
            marks.append(_build(TraceMark, values["mark"], number))
        else:
            records.append(_build(TraceRecord, values, number))
    if not records:
        raise ConfigError("the trace is empty: no step came back before the generation ended")
    prompt_tokens, model = head.get("prompt_tokens"), head.get("model")
    return Trace(
        model if isinstance(model, str) else "",
        prompt_tokens if isinstance(prompt_tokens, int) else 0,
        tuple(records),
        tuple(marks),
    )


def _parse_head(line: str) -> dict[str, Any]:
    try:
        head = _parse(line, 1)
    except ConfigError:
        head = {}
    if head.get("p2pllm_trace") != VERSION:
        raise ConfigError(
            "this is no trace of p2pllm; make one with `p2pllm generate --trace FILE`"
        )
    return head


def _parse(line: str, number: int) -> dict[str, Any]:
    try:
        values = json.loads(line[:MAX_LINE])
    except ValueError as exc:
        raise ConfigError(f"line {number} of the trace is no JSON") from exc
    if not isinstance(values, dict):
        raise ConfigError(f"line {number} of the trace is no JSON object")
    return values


def _build(kind: type[T], values: Any, number: int) -> T:
    """A record of what a line holds; names that we do not know are of a newer version."""
    try:
        known = {f.name: _checked(values[f.name], f.type) for f in fields(kind) if f.name in values}
        return kind(**known)
    except (TypeError, KeyError) as exc:
        raise ConfigError(f"line {number} of the trace is no record") from exc


def _checked(value: Any, kind: Any) -> Any:
    """The value, if it is of the field's type; numbers are finite. Raises TypeError."""
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise TypeError
    if isinstance(value, int | float) and not -1e12 < value < 1e12:  # refuses NaN as well
        raise TypeError
    return value


# --- drawing ---------------------------------------------------------------------------------


def waterfall(
    trace: Trace, *, width: int, tokens: range | None = None, is_plain: bool = False
) -> Iterator[str]:
    """The steps of some tokens (None: all) as lines of text of at most `width` characters.

    The time axis begins with each step's sending; chunks of a prompt share one, since they
    overlap. Marks stand where they happened.
    """
    steps = [s for s in _steps(trace.records) if tokens is None or max(s[0].token, 0) in tokens]
    marks = [mark for mark in trace.marks if tokens is None or _is_among(mark, steps)]
    columns = max(width, MIN_WIDTH) - len(_HEAD)
    starts = _starts(steps)
    is_decode = [step[0].is_decode for step in steps]
    # Prompts take a hundred times as long as tokens, so each kind has a scale of its own.
    longest_s = {True: 1e-6, False: 1e-6}
    for step, start, kind in zip(steps, starts, is_decode, strict=True):
        longest_s[kind] = max(longest_s[kind], step[0].received_at - start)
    drawn: bool | None = None
    for step, start, kind in zip(steps, starts, is_decode, strict=True):
        while marks and marks[0].at <= step[0].sent_at:
            yield _marked(marks.pop(0), width)
        if kind is not drawn:
            axis = f"{longest_s[kind] * 1e3:.1f} ms"
            yield f"{_HEAD}0{axis:>{columns - 1}}"
            drawn = kind
        for line in _draw(step, start, longest_s[kind] / columns, columns):
            yield line.translate(PLAIN) if is_plain else line
    yield from (_marked(mark, width) for mark in marks)


def _steps(records: Sequence[TraceRecord]) -> list[list[TraceRecord]]:
    """The records by step and segment, in the order in which they were sent."""
    steps: dict[tuple[float, int, bool], list[TraceRecord]] = {}
    for record in records:
        key = (record.sent_at, record.position, record.is_replay)
        steps.setdefault(key, []).append(record)
    found = list(steps.values())
    for step in found:
        step.sort(key=lambda record: record.hop)
    return sorted(found, key=lambda step: step[0].sent_at)


def _starts(steps: Sequence[Sequence[TraceRecord]]) -> list[float]:
    """When the axis of each step begins: for a token's segments, and for all chunks that lead to
    the first token, with the first of them."""
    first: dict[tuple[int, bool], float] = {}
    keys = [(max(step[0].token, 0), step[0].is_replay) for step in steps]
    for key, step in zip(keys, steps, strict=True):
        first.setdefault(key, step[0].sent_at)
    return [first[key] for key in keys]


def _draw(
    step: Sequence[TraceRecord], start: float, column_s: float, columns: int
) -> Iterator[str]:
    at = step[0].sent_at - start
    for index, record in enumerate(step):
        bar = [" "] * columns
        for kind, seconds in (
            (LINK, record.link_s),
            (QUEUE, record.queue_s),
            (COMPUTE, record.compute_s),
            (LINK, record.return_s),
        ):
            begin, at = at, at + seconds
            if seconds > 0:
                last = max(int(begin / column_s), round(at / column_s) - 1)
                for column in range(int(begin / column_s), min(last + 1, columns)):
                    bar[column] = kind
        name = _name(record) if index == 0 else ""
        blocks = record.blocks + ("*" if record.is_relayed else "")
        text = (
            f"{name:>7} {record.hop + 1:>3}  {record.peer[:8]:8}  {blocks:9} "
            f"{record.total_s * 1e3:8.1f}  "
        )
        yield (text + "".join(bar)).rstrip()


def _name(record: TraceRecord) -> str:
    if record.is_replay:
        return "replay"
    return str(record.token) if record.num_tokens == record.batch else f"+{record.num_tokens}"


def _is_among(mark: TraceMark, steps: Sequence[Sequence[TraceRecord]]) -> bool:
    return bool(steps) and steps[0][0].sent_at <= mark.at <= steps[-1][-1].received_at


def _marked(mark: TraceMark, width: int) -> str:
    return f"   >>> {mark.at:.3f} s {mark.what}: {mark.text}"[: max(width, MIN_WIDTH)]


# --- summary ---------------------------------------------------------------------------------


def summary(trace: Trace, tokens: range | None = None) -> dict[str, Any]:
    """Medians per hop over the decode steps of some tokens, in milliseconds, and the totals."""
    chosen = [r for r in trace.records if tokens is None or max(r.token, 0) in tokens]
    decode = [record for record in chosen if record.is_decode]
    hops: dict[tuple[int, str, str], list[TraceRecord]] = {}
    for record in decode:
        hops.setdefault((record.hop, record.peer, record.blocks), []).append(record)
    return {
        "model": trace.model,
        "prompt_tokens": trace.prompt_tokens,
        "num_tokens": len({r.token for r in chosen if r.token >= 0}),
        "num_chunks": len({(r.sent_at, r.position) for r in chosen if r.num_tokens > r.batch}),
        "num_replays": len({(r.sent_at, r.position) for r in chosen if r.is_replay}),
        "duration_s": max((r.received_at for r in chosen), default=0.0),
        "hops": [_median_hop(key, hops[key]) for key in sorted(hops)],
        "marks": [asdict(mark) for mark in trace.marks],
    }


def _median_hop(key: tuple[int, str, str], records: Sequence[TraceRecord]) -> dict[str, Any]:
    hop, peer, blocks = key

    def median_ms(values: Iterable[float]) -> float:
        return round(statistics.median(values) * 1e3, 3)

    return {
        "hop": hop + 1,
        "peer": peer,
        "blocks": blocks,
        "num_steps": len(records),
        "link_ms": median_ms(r.link_s + r.return_s for r in records),
        "queue_ms": median_ms(r.queue_s for r in records),
        "compute_ms": median_ms(r.compute_s for r in records),
        "total_ms": median_ms(r.total_s for r in records),
        "bytes": round(statistics.median(r.num_bytes for r in records)),
    }
