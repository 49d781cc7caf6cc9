"""A token's way, from what several processes noted of it. Pure; `timeline` makes the notes."""

import itertools
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

AT_A_SERVER = (
    "received",
    "step parsed",
    "step queued",
    "device begins",
    "device ends",
    "results taken",
    "sends",
)
STEP_BYTES = 600  # a message that holds a hidden state has more; acknowledgements have less


class Note(NamedTuple):
    """Something passed a station."""

    moment: float
    name: str
    station: str
    num_bytes: int


def rounds_of(notes: Sequence[Note]) -> list[list[Note]]:
    """The notes of each token: it begins when the client sends a step, and ends with the next."""
    starts = [
        index
        for index, note in enumerate(notes)
        if note.name == "client" and note.station == "sends" and note.num_bytes > STEP_BYTES
    ]
    return [list(notes[a:b]) for a, b in itertools.pairwise(starts)]


def stations(hops: int) -> list[tuple[str, str]]:
    """A token's way: who, and what happens there."""
    way = [("client", "sends")]
    for number in range(1, hops + 1):
        way += [(f"server {number}", station) for station in AT_A_SERVER]
    return [*way, *(("client", name) for name in ("received", "answer parsed", "answer matched"))]


def way_of(tokens: Sequence[Sequence[Note]], hops: int) -> list[dict[str, Any]]:
    """The median time to each station from the one before; tokens that lack one do not count."""
    way = stations(hops)
    found = [moments for token in tokens if (moments := _moments(token, way)) is not None]
    rows = []
    for index, (name, station) in enumerate(way[1:], 1):
        times = [moments[index] - moments[index - 1] for moments in found]
        before = way[index - 1]
        step = f"{before[1]} → {station}"
        rows.append({"where": name, "step": step, "us": round(1e6 * statistics.median(times))})
    heads = [time for token in tokens if (time := _head_s(token)) is not None]
    rows.append({"where": "client", "step": "head", "us": round(1e6 * statistics.median(heads))})
    last = [token[-1].moment - moments[-1] for token in tokens if (moments := _moments(token, way))]
    step = "answer matched → next token sent, the head included"
    rows.append({"where": "client", "step": step, "us": round(1e6 * statistics.median(last))})
    return rows


def _moments(token: Sequence[Note], way: Sequence[tuple[str, str]]) -> list[float] | None:
    """When it passed each station, each after the one before; None if one is missing."""
    moments: list[float] = []
    for name, station in way:
        has_size = station in ("sends", "received")
        passed = [
            note.moment
            for note in token
            if (note.name, note.station) == (name, station)
            and (not has_size or note.num_bytes > STEP_BYTES)
            and (not moments or note.moment >= moments[-1])
        ]
        if not passed:
            return None
        moments.append(passed[0])
    return moments


def _head_s(token: Sequence[Note]) -> float | None:
    begins = [note.moment for note in token if note.station == "head begins"]
    ends = [note.moment for note in token if note.station == "head ends"]
    return ends[0] - begins[0] if begins and ends else None
