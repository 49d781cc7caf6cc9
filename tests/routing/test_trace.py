"""Traces: what is written, what is read back, and how it is drawn."""

import json
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pllm.errors import ConfigError
from p2pllm.ids import PeerId
from p2pllm.routing.trace import Trace, TraceWriter, read_trace, summary, waterfall
from p2pllm.spans import Span
from p2pllm.swarm.timings import SegmentStep
from p2pllm.wire.messages import HopTiming

A, B = PeerId(b"a" * 32), PeerId(b"b" * 32)
PROMPT_TOKENS = 10
TIMINGS = HopTiming(0.0, 0.01, 0.0, 0.02), HopTiming(0.005, 0.02, 0.0, 0.02)
WIDTH = 100


def a_step(
    position: int,
    num_tokens: int,
    sent_at: float,
    *,
    total_s: float = 0.065,
    timings: Sequence[HopTiming] = TIMINGS,
    is_replay: bool = False,
) -> SegmentStep:
    return SegmentStep(
        peers=(A, B),
        spans=(Span(0, 5), Span(5, 10)),
        batch=1,
        num_tokens=num_tokens,
        sent_at=sent_at,
        received_at=sent_at + total_s,
        timings=tuple(timings),
        sent_bytes=64,
        received_bytes=32,
        rtt_s=0.02,
        position=position,
        is_replay=is_replay,
    )


def written() -> list[str]:
    """Two chunks of a prompt, and two tokens with a mark between them."""
    lines: list[str] = []
    writer = TraceWriter(lines.append, started=100.0, prompt_tokens=PROMPT_TOKENS, model="tiny")
    writer.on_segment(a_step(0, 8, 100.0))
    writer.on_segment(a_step(8, 2, 100.01))
    writer.on_segment(a_step(10, 1, 100.1))
    writer.on_mark("lost", "b does not answer", 100.18, B)
    writer.on_segment(a_step(11, 1, 100.2))
    return lines


TRACE = read_trace(written())


def test_a_trace_is_read_as_it_was_written() -> None:
    assert (TRACE.model, TRACE.prompt_tokens, len(TRACE.records)) == ("tiny", PROMPT_TOKENS, 8)
    assert [record.token for record in TRACE.records[::2]] == [-1, 0, 1, 2]
    assert TRACE.marks[0].at == pytest.approx(0.18)
    assert TRACE.marks[0].peer == str(B)


def test_the_parts_of_a_record_are_where_the_time_went() -> None:
    first, second = TRACE.records[4:6]
    assert (first.link_s, first.queue_s, first.compute_s) == pytest.approx((0.01, 0.0, 0.01))
    assert second.link_s == second.return_s == pytest.approx(0.01)
    assert (second.queue_s, second.compute_s, second.num_bytes) == (0.005, 0.02, 96)
    assert (first.sent_at, first.received_at) == pytest.approx((0.1, 0.165))
    assert first.total_s + second.total_s == pytest.approx(0.065)


def test_a_step_without_timings_leaves_no_record() -> None:
    lines: list[str] = []
    writer = TraceWriter(lines.append, started=0.0, prompt_tokens=1)
    writer.on_segment(a_step(1, 1, 0.0, timings=TIMINGS[:1]))
    assert len(lines) == 1


def test_a_line_cut_short_at_the_end_is_left_out() -> None:
    lines = written()
    assert len(read_trace([*lines[:-1], lines[-1][:20]]).records) == 7


def test_names_of_newer_versions_are_left_out() -> None:
    lines = written()
    newer = json.dumps({**json.loads(lines[1]), "colour": "red"}) + "\n"
    assert read_trace([lines[0], newer]).records == TRACE.records[:1]


@pytest.mark.parametrize(
    ("lines", "text"),
    [
        ([], "generate --trace"),
        (["once upon a time\n"], "generate --trace"),
        (["{}\n"], "generate --trace"),
        (written()[:1], "no step came back"),
        ([written()[0], "nonsense\n"], "line 2"),
        ([written()[0], "[]\n"], "line 2"),
        ([written()[0], '{"token":1}\n'], "line 2"),
        ([written()[0], '{"mark":7}\n'], "line 2"),
        ([written()[0], written()[1].replace('"hop":0', '"hop":"a"')], "line 2"),
        ([written()[0], written()[1].replace('"link_s":0.01', '"link_s":NaN')], "line 2"),
    ],
)
def test_what_is_no_trace_is_refused_with_a_word_on_what_to_do(lines: list[str], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        read_trace(lines)


@settings(max_examples=200)
@given(st.lists(st.text(max_size=60)), st.booleans())
def test_any_text_is_read_or_refused(lines: list[str], has_head: bool) -> None:
    head = written()[:1] if has_head else []
    try:
        read_trace([*head, *(line + "\n" for line in lines)])
    except ConfigError:
        return


# --- drawing ---------------------------------------------------------------------------------


def test_every_line_fits_the_width() -> None:
    for width in (60, 80, 133):
        assert max(map(len, waterfall(TRACE, width=width))) <= width


def test_a_token_is_drawn_as_links_queue_and_computation_one_after_the_other() -> None:
    lines = list(waterfall(TRACE, width=WIDTH, tokens=range(1, 2)))
    first, second = lines[1:3]
    assert first.split()[:5] == ["1", "1", str(A)[:8], "0:5", "20.0"]
    drawn = first.split()[5] + second.split()[4]
    assert [kind for kind, before in zip(drawn, " " + drawn, strict=False) if kind != before] == [
        *"─█─▒█─"
    ]
    assert len(first) <= second.index("▒")


def test_the_chunks_of_a_prompt_share_an_axis_and_tokens_have_one_of_their_own() -> None:
    lines = list(waterfall(TRACE, width=WIDTH))
    assert [line.split()[0] for line in lines if "hop" in line] == ["token", "token"]
    assert lines[0].endswith("75.0 ms")
    assert next(line for line in lines[1:] if "hop" in line).endswith("65.0 ms")
    one, other = lines[1], lines[3]
    assert one.split()[0] == "+8"
    assert other.split()[0] == "+2"
    assert other.index("─") > one.index("─")


def test_marks_stand_where_they_happened() -> None:
    lines = list(waterfall(TRACE, width=WIDTH))
    mark = next(i for i, line in enumerate(lines) if ">>>" in line)
    assert "lost: b does not answer" in lines[mark]
    assert lines[mark - 2].split()[0] == "1"
    assert lines[mark + 1].split()[0] == "2"


def test_a_plain_terminal_gets_plain_characters() -> None:
    for line in waterfall(TRACE, width=WIDTH, is_plain=True):
        assert line.isascii()


def test_only_the_asked_tokens_are_drawn() -> None:
    lines = list(waterfall(TRACE, width=WIDTH, tokens=range(2, 5)))
    assert [line.split()[0] for line in lines[1::2]] == ["2"]


def test_a_replay_is_called_so_and_counts_as_no_token() -> None:
    lines: list[str] = []
    writer = TraceWriter(lines.append, started=0.0, prompt_tokens=PROMPT_TOKENS)
    writer.on_segment(a_step(10, 1, 0.1))
    writer.on_segment(a_step(0, 11, 0.3, is_replay=True))
    trace = read_trace(lines)
    assert any(line.split()[0] == "replay" for line in waterfall(trace, width=WIDTH))
    found = summary(trace)
    assert (found["num_replays"], found["hops"][0]["num_steps"]) == (1, 1)


# --- summary ---------------------------------------------------------------------------------


def test_the_summary_has_the_medians_of_every_hop() -> None:
    found = summary(TRACE)
    assert (found["num_tokens"], found["num_chunks"], found["prompt_tokens"]) == (3, 2, 10)
    first, second = found["hops"]
    assert (first["peer"], first["blocks"], first["num_steps"]) == (str(A), "0:5", 2)
    assert (second["queue_ms"], second["compute_ms"]) == (5.0, 20.0)
    assert second["link_ms"] == pytest.approx(20.0)
    assert found["marks"][0]["what"] == "lost"


def test_the_summary_of_some_tokens_is_of_these_only() -> None:
    assert summary(TRACE, range(1, 2))["hops"][0]["num_steps"] == 1
    assert summary(Trace("", 0, TRACE.records), range(50, 60))["hops"] == []
