"""A token's way is read from notes of several processes, in whatever order they come."""

from tools.benchmarks._way import STEP_BYTES, Note, rounds_of, stations, way_of

LARGE = STEP_BYTES + 1


def notes_of_token(start: float, *, step_s: float = 0.001) -> list[Note]:
    """One token through one server, a station every `step_s`; with an acknowledgement between."""
    notes = [
        Note(start + index * step_s, name, station, LARGE)
        for index, (name, station) in enumerate(stations(1))
    ]
    small = Note(start + 0.5 * step_s, "server 1", "received", 30)
    head = [
        Note(start + 20 * step_s, "client", "head begins", 0),
        Note(start + 22 * step_s, "client", "head ends", 0),
    ]
    return [*notes, small, *head]


def sorted_notes(*tokens: list[Note]) -> list[Note]:
    return sorted(note for token in tokens for note in token)


def test_a_token_begins_with_each_step_that_the_client_sends() -> None:
    notes = sorted_notes(*(notes_of_token(second) for second in (1.0, 2.0, 3.0)))
    rounds = rounds_of(notes)
    assert [token[0].moment for token in rounds] == [1.0, 2.0]
    assert all(len(token) == len(notes_of_token(0.0)) for token in rounds)


def test_the_median_time_of_each_stretch_is_found() -> None:
    tokens = [
        sorted(notes_of_token(second, step_s=step_s))
        for second, step_s in ((1.0, 0.001), (2.0, 0.002), (3.0, 0.009))
    ]
    rows = way_of(tokens, 1)
    assert [row["us"] for row in rows[:-2]] == [2000] * 10
    assert rows[0] == {"where": "server 1", "step": "sends → received", "us": 2000}
    assert rows[-2]["us"] == 4000  # the head


def test_a_token_that_missed_a_station_does_not_count() -> None:
    whole = sorted(notes_of_token(1.0))
    cut = [note for note in whole if note.station != "device ends"]
    assert way_of([whole, cut], 1) == way_of([whole], 1)
