"""Drawing a trace that `generate --trace` has written."""

import json
from pathlib import Path

import pytest

from p2pllm.ids import PeerId
from p2pllm.routing.trace import TraceWriter
from p2pllm.spans import Span
from p2pllm.swarm.timings import SegmentStep
from p2pllm.wire.messages import HopTiming
from tests.cli.conftest import Terminal

NUM_TOKENS = 20


@pytest.fixture
def trace(tmp_path: Path) -> str:
    """A trace of twenty tokens after a prompt of one."""
    path = tmp_path / "trace.jsonl"
    with path.open("w") as file:
        writer = TraceWriter(file.write, started=0.0, prompt_tokens=1)
        for token in range(NUM_TOKENS):
            writer.on_segment(
                SegmentStep(
                    peers=(PeerId(bytes(32)),),
                    spans=(Span(0, 4),),
                    batch=1,
                    num_tokens=1,
                    sent_at=float(token),
                    received_at=token + 0.05,
                    timings=(HopTiming(0.0, 0.03, 0.0, 0.02),),
                    rtt_s=0.02,
                    position=token,
                )
            )
    return str(path)


def test_a_trace_is_drawn_without_a_terminal(terminal: Terminal, trace: str) -> None:
    result = terminal.type("trace", trace, "--width", "80")
    assert result.exit_code == 0
    assert "hop 1 aaaaaaaa 0:4: link 20.0, queue 0.0, compute 30.0" in result.stdout
    assert "20 tokens in all; --tokens 12:20 shows the rest" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80


@pytest.mark.parametrize(
    ("tokens", "drawn"), [("3", ["3"]), ("17:", ["17", "18", "19"]), ("2:4", ["2", "3"])]
)
def test_some_tokens_are_drawn(
    terminal: Terminal, trace: str, tokens: str, drawn: list[str]
) -> None:
    lines = terminal.type("trace", trace, "--tokens", tokens).stdout.splitlines()
    end = lines.index("")
    assert [line.split()[0] for line in lines[1:end]] == drawn


def test_the_summary_is_one_json_object(terminal: Terminal, trace: str) -> None:
    found = json.loads(terminal.type("trace", trace, "--json").stdout)
    assert found["hops"][0]["num_steps"] == NUM_TOKENS
    assert found["hops"][0]["compute_ms"] == 30.0


@pytest.mark.parametrize("tokens", ["x", "4:4", "-1", "7:3"])
def test_a_wrong_range_is_explained(terminal: Terminal, trace: str, tokens: str) -> None:
    result = terminal.type("trace", trace, f"--tokens={tokens}")
    assert result.exit_code == 2
    assert "--tokens" in result.stderr


def test_tokens_beyond_the_end_are_named_with_those_that_there_are(
    terminal: Terminal, trace: str
) -> None:
    result = terminal.type("trace", trace, "--tokens", "50:60")
    assert result.exit_code == 1
    assert "choose --tokens within 0:20" in result.stderr


@pytest.mark.parametrize("content", [b"hello\n", b"\xff\xfe\x00", b""])
def test_another_file_is_refused(terminal: Terminal, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "other"
    path.write_bytes(content)
    result = terminal.type("trace", str(path))
    assert result.exit_code == 1
