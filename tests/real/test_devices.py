"""Servers on several devices, with real processes: one over all of them, and one for each."""

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

WAITS_S = 60.0
STOPS_WITHIN_S = 5.0
SERVE = ["serve", "--dtype", "float32", "--cache-tokens", "512", "--throughput", "1000"]
ASK = ["The capital of France is", "--raw", "--max-new-tokens", "8", "--ignore-eos", "--json"]

pytestmark = pytest.mark.slow(120)


class Supervisor:
    """`p2pllm serve --per-device` on two devices that are both this computer's CPU."""

    def __init__(self, directory: Path, blocks: str = "0:30") -> None:
        self.ready_file = directory / "ready.json"
        self._log = directory / "log"
        arguments = [*SERVE, "--new-swarm", "--per-device", "--device", "cpu,cpu"]
        arguments += ["--blocks", blocks, "--listen", "127.0.0.1:0"]
        arguments += ["--identity", str(directory / "me.key")]
        arguments += ["--ready-file", str(self.ready_file)]
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(_command(*arguments), stdout=log, stderr=log)
        self.wait_until(self.ready_file.exists)

    @property
    def ready(self) -> dict[str, Any]:
        ready: dict[str, Any] = json.loads(self.ready_file.read_text())
        return ready

    @property
    def said(self) -> str:
        return self._log.read_text()

    @property
    def children(self) -> list[int]:
        pid = self.process.pid
        return [
            int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        ]

    def wait_until(self, is_so: Callable[[], bool]) -> None:
        deadline = time.monotonic() + WAITS_S
        while not is_so():
            assert self.process.poll() is None, self.said
            assert time.monotonic() < deadline, self.said
            try:
                self.process.wait(0.05)
            except subprocess.TimeoutExpired:
                continue

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(STOPS_WITHIN_S)
        finally:
            self.process.kill()


@pytest.fixture(scope="module")
def supervisor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Supervisor]:
    running = Supervisor(tmp_path_factory.mktemp("per-device"))
    yield running
    running.stop()


def _is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"  # whoever takes orphans may be slow to bury them


@contextmanager
def _end_of(pid: int) -> Iterator[int]:
    """A descriptor that becomes readable when a process ends that need not be our child."""
    descriptor = os.pidfd_open(pid)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "p2pllm", *arguments, "--config", os.devnull]


def _answer(peers: list[str]) -> dict[str, Any]:
    command = _command("generate", *ASK, "--peers", ",".join(peers))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def test_a_server_for_each_device_and_one_over_all_answer_the_same(
    supervisor: Supervisor, start: Any
) -> None:
    split = start(*SERVE, "--new-swarm", "--device", "cpu,cpu", "--blocks", "0:30")

    parts, whole = _answer(supervisor.ready["addresses"]), _answer(split["addresses"])

    assert [server["blocks"] for server in supervisor.ready["servers"]] == ["0:15", "15:30"]
    assert [hop["blocks"] for hop in parts["route"]] == ["0:15", "15:30"]
    assert [hop["blocks"] for hop in whole["route"]] == ["0:30"]
    assert parts["token_ids"] == whole["token_ids"]
    assert "[cpu#2] Serving blocks 15:30" in supervisor.said


def test_a_server_that_dies_is_started_again_and_the_others_go_on(supervisor: Supervisor) -> None:
    first, second = supervisor.children
    before = supervisor.ready
    dead = before["servers"][1]["peer_id"]

    os.kill(second, signal.SIGKILL)

    supervisor.wait_until(lambda: "THE SERVER ON cpu#2 DIED (SIGKILL)" in supervisor.said)
    assert supervisor.children == [first]
    supervisor.wait_until(lambda: supervisor.ready != before)
    assert supervisor.ready["servers"][0] == before["servers"][0]
    assert supervisor.ready["servers"][1]["peer_id"] == dead  # its key is in a file
    assert len(supervisor.children) == 2


def test_the_end_of_the_command_is_the_end_of_all_servers(supervisor: Supervisor) -> None:
    children = supervisor.children
    assert len(children) == 2

    assert supervisor.stop() == 0, supervisor.said

    assert not any(map(_is_running, children))


def test_servers_end_when_the_command_is_killed(tmp_path: Path) -> None:
    running = Supervisor(tmp_path, blocks="0:2")
    children = running.children
    assert len(children) == 2

    with ExitStack() as watched:
        ends = [watched.enter_context(_end_of(child)) for child in children]
        running.process.kill()
        running.process.wait()

        for end in ends:  # readable when the process has ended, whoever its parent is by then
            assert select.select([end], [], [], STOPS_WITHIN_S)[0] == [end]


def test_a_server_that_cannot_start_ends_the_command_with_what_it_said(tmp_path: Path) -> None:
    arguments = [*SERVE, "--new-swarm", "--per-device", "--device", "cpu,cuda:99"]
    arguments += ["--blocks", "0:2", "--listen", "127.0.0.1:0"]
    done = subprocess.run(_command(*arguments), capture_output=True, text=True, check=False)

    assert done.returncode == 1
    assert "[cuda:99] error: no device 'cuda:99' here" in done.stderr
    assert "error: the server on cuda:99 did not start (exit code 1)" in done.stderr
