"""The command line with real processes: a server's whole life, and what users see of it."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

STOPS_WITHIN_S = 3.0
WAITS_S = 60.0
PROMPT = "The capital of France is"

pytestmark = pytest.mark.slow(120)


@pytest.fixture(scope="module")
def entry(start: Any) -> str:
    """The address of a swarm in which nobody serves blocks 10:20."""
    entry: str = start("bootstrap")["addresses"][0]
    for span in ("0:10", "20:30"):
        start("serve", "--blocks", span, "--dtype", "float32", "--peers", entry)
    return entry


@pytest.fixture
def middle(entry: str, tmp_path: Path) -> Iterator["Process"]:
    """The server that the swarm lacks."""
    ready = tmp_path / "ready.json"
    arguments = ["serve", "--blocks", "10:20", "--dtype", "float32", "--peers", entry, "-v"]
    arguments += ["--listen", "127.0.0.1:0", "--ready-file", str(ready)]
    with Process(tmp_path / "server.log", *arguments) as server:
        server.wait_until(ready.exists)
        yield server


class Process:
    """`p2pllm ARGUMENTS`, with what it says in a file; stopped at the end of the `with` block."""

    def __init__(self, log: Path, *arguments: str) -> None:
        self.log = log
        with log.open("wb") as output:
            self._process = subprocess.Popen(_command(*arguments), stdout=output, stderr=output)

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop(signal.SIGINT)  # a server that is killed stays announced for two minutes

    def wait_until(self, is_so: Callable[[], bool]) -> None:
        """Wait for something that the process brings about."""
        deadline = time.monotonic() + WAITS_S
        while not is_so():
            assert self._process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            try:
                self._process.wait(0.02)
            except subprocess.TimeoutExpired:
                continue

    def stop(self, *signals: signal.Signals) -> tuple[int, float]:
        """Send signals; returns the exit code, and after how many seconds it came."""
        started = time.monotonic()
        for number in signals:
            self._process.send_signal(number)
        try:
            code = self._process.wait(WAITS_S)
        finally:
            self._process.kill()
        return code, time.monotonic() - started


def _command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "p2pllm", *arguments, "--config", os.devnull]


def _type(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(_command(*arguments), capture_output=True, text=True, check=False)


def _missing(entry: str) -> list[str]:
    done = _type("status", "--peers", entry, "--json")
    assert done.returncode == 0, done.stderr
    (model,) = json.loads(done.stdout)["models"]
    missing: list[str] = model["missing"]
    return missing


def test_blocks_that_nobody_serves_are_named(entry: str) -> None:
    asked = _type("generate", PROMPT, "--peers", entry, "--patience", "0")
    routed = _type("route", "--peers", entry)
    assert _missing(entry) == ["10:20"]
    for done in (asked, routed):
        assert done.returncode == 1
        assert done.stdout == ""
        assert "error: no server for blocks 10:20" in done.stderr


def test_a_whole_swarm_answers_and_shows_its_route(entry: str, middle: Process) -> None:
    options = ["--peers", entry, "--raw", "--max-new-tokens", "8", "--ignore-eos"]
    asked = _type("generate", PROMPT, *options, "--json")
    streamed = _type("generate", PROMPT, *options, "--show-route")
    routed = _type("route", "--peers", entry, "--json")
    assert asked.returncode == streamed.returncode == routed.returncode == 0, asked.stderr
    answer = json.loads(asked.stdout)
    assert len(answer["token_ids"]) == 8
    assert [hop["blocks"] for hop in answer["route"]] == ["0:10", "10:20", "20:30"]
    assert [hop["blocks"] for hop in json.loads(routed.stdout)["hops"]] == [
        "0:10",
        "10:20",
        "20:30",
    ]
    assert streamed.stdout == answer["text"] + "\n"
    assert "tokens/s" in streamed.stderr


def test_a_conversation_remembers_what_was_said(entry: str, middle: Process) -> None:
    done = subprocess.run(
        _command("chat", "--peers", entry, "--temperature", "0", "--max-new-tokens", "16"),
        input="What is the capital of France?\nAnd of Italy?\n",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 2
    assert "Paris" in done.stdout
    assert middle.log.read_text().count("session opened") == 1


def test_ctrl_c_frees_the_sessions(entry: str, middle: Process, tmp_path: Path) -> None:
    arguments = ["generate", PROMPT, "--peers", entry, "--ignore-eos", "--max-new-tokens", "900"]
    with Process(tmp_path / "client.log", *arguments) as client:
        middle.wait_until(lambda: "session opened" in middle.log.read_text())
        code, _ = client.stop(signal.SIGINT)
    assert code == 130
    assert "error" not in client.log.read_text()
    middle.wait_until(lambda: "session closed" in middle.log.read_text())


@pytest.mark.parametrize(
    "signals", [(signal.SIGINT,), (signal.SIGINT, signal.SIGINT), (signal.SIGTERM,)], ids=str
)
def test_a_server_leaves_cleanly(
    entry: str, middle: Process, signals: tuple[signal.Signals, ...]
) -> None:
    assert _missing(entry) == []
    code, took_s = middle.stop(*signals)
    assert code == 0, middle.log.read_text()
    assert took_s < STOPS_WITHIN_S
    assert _missing(entry) == ["10:20"]  # its tombstone is there, long before the record expires


def test_a_port_in_use_is_an_error_that_says_so(entry: str) -> None:
    port = entry.rpartition(":")[2]
    done = _type("bootstrap", "--listen", f"127.0.0.1:{port}")
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: port {port} is in use")


def test_blocks_out_of_range_are_an_error_that_names_the_range(entry: str) -> None:
    done = _type("serve", "--blocks", "20:40", "--peers", entry, "--listen", "127.0.0.1:0")
    assert done.returncode == 1
    assert done.stderr.startswith("error: the model has 30 blocks; choose within 0:30")


def test_another_swarms_member_is_refused_with_the_reason(entry: str) -> None:
    done = _type("status", "--peers", entry, "--swarm", "other")
    assert done.returncode == 1
    assert "another network" in done.stderr


def test_the_doctor_reaches_the_peers(entry: str) -> None:
    done = _type("doctor", "--peers", entry, "--json")
    found = {finding["name"]: finding["verdict"] for finding in json.loads(done.stdout)["findings"]}
    assert (found["peer"], found["swarm"], found["skew"]) == ("ok", "ok", "ok")


def _is_listening(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout=5):
            return True
    except ConnectionRefusedError:
        return False


def _places(text: str) -> list[str]:
    """The addresses of the demo's nodes, as it shows them."""
    return re.findall(r"^(?:server|bootstrap) \S+ +(127\.0\.0\.1:\d+)$", text, re.MULTILINE)


def test_the_demo_answers_and_leaves_nothing_running() -> None:
    # In float32: of this answer's first token the two best logits differ by 0.1, bfloat16's step.
    options = ["--dtype", "float32", "--max-new-tokens", "16"]
    done = _type("demo", "--prompt", "What is the capital of France?", *options)
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout
    assert "tokens/s" in done.stderr
    places = _places(done.stderr)
    assert len(places) == 4
    assert not any(map(_is_listening, places))


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_demo_leaves_nothing_running(
    tmp_path: Path, number: signal.Signals, expected: int
) -> None:
    log = tmp_path / "demo.log"
    with Process(log, "demo", "--max-new-tokens", "2000") as demo:
        demo.wait_until(lambda: len(_places(log.read_text())) == 4)
        code, _ = demo.stop(number)
    assert code == expected, log.read_text()
    assert not any(map(_is_listening, _places(log.read_text())))
