"""Real processes for the tests of this directory: started by `start`, ended after the module."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from p2pllm.ids import PeerId

STARTS_WITHIN_S = 60.0
ENDS_WITHIN_S = 5.0

Ready = dict[str, Any]  # what a node writes to its --ready-file
Start = Callable[..., Ready]
Launch = Callable[..., "NodeProcess"]


class NodeProcess:
    """`p2pllm ARGUMENTS` on a free loopback port; started again, it has the same place and key."""

    def __init__(self, directory: Path, number: int, arguments: tuple[str, ...]) -> None:
        self.ready: Ready = {}
        self.is_paused = False
        self._directory = directory
        self._file = directory / f"{number}.json"
        self._log = directory / f"{number}.log"
        self._arguments = [*arguments, "--identity", str(directory / f"{number}.key")]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def peer(self) -> PeerId:
        return PeerId.parse(self.ready["peer_id"])

    @property
    def address(self) -> str:
        address: str = self.ready["addresses"][0]
        return address

    @property
    def is_dead(self) -> bool:
        return self._process is None or self._process.poll() is not None

    @property
    def said(self) -> str:
        """All that it has printed."""
        return self._log.read_text()

    def launch(self) -> None:
        """Start it; `wait_until_ready` must follow."""
        self._file.unlink(missing_ok=True)
        place = self.address.rpartition("@")[2] if self.ready else "127.0.0.1:0"
        command = [sys.executable, "-m", "p2pllm", *self._arguments]
        command += ["--listen", place, "--ready-file", str(self._file)]
        with self._log.open("ab") as output:
            self._process = subprocess.Popen(
                command, stdout=output, stderr=output, env=_environment(self._directory)
            )

    def wait_until_ready(self) -> None:
        assert self._process is not None
        self.ready = _wait_for(self._file, self._process, self._log)

    def kill(self) -> None:
        """SIGKILL; returns when it is dead."""
        self._signal(signal.SIGKILL)
        if self._process is not None:
            self._process.wait(ENDS_WITHIN_S)

    def pause(self) -> None:
        """SIGSTOP: it is there, and says nothing."""
        self.is_paused = True
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT."""
        self.is_paused = False
        self._signal(signal.SIGCONT)

    def interrupt(self) -> None:
        """Ask it to end, in whatever state it is."""
        if self.is_paused:
            self.kill()
        self._signal(signal.SIGINT)

    def end(self) -> None:
        """Wait until it has ended, and see to that."""
        if self._process is None:
            return
        try:
            self._process.wait(ENDS_WITHIN_S)
        except subprocess.TimeoutExpired:
            self.kill()

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(number)


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launch]:
    """Starts `p2pllm ARGUMENTS`; returns the process, to be waited for and to be maltreated."""
    directory = tmp_path_factory.mktemp("nodes")
    nodes: list[NodeProcess] = []

    def launch_node(*arguments: str) -> NodeProcess:
        nodes.append(NodeProcess(directory, len(nodes), arguments))
        nodes[-1].launch()
        return nodes[-1]

    yield launch_node
    for node in nodes:
        node.interrupt()
    for node in nodes:
        node.end()


@pytest.fixture(scope="module")
def start(launch: Launch) -> Start:
    """Starts `p2pllm ARGUMENTS` and waits for it; returns what its ready file says."""

    def start_node(*arguments: str) -> Ready:
        node = launch(*arguments)
        node.wait_until_ready()
        return node.ready

    return start_node


def _environment(directory: Path) -> dict[str, str]:
    """Ours, with nobody's settings but the model cache, and identities of the test's own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("P2PLLM_")}
    if "P2PLLM_CACHE" in os.environ:
        kept["P2PLLM_CACHE"] = os.environ["P2PLLM_CACHE"]
    return {**kept, "XDG_DATA_HOME": str(directory), "XDG_CONFIG_HOME": str(directory)}


def _wait_for(ready: Path, process: "subprocess.Popen[bytes]", log: Path) -> Ready:
    deadline = time.monotonic() + STARTS_WITHIN_S
    while not ready.exists():
        if process.poll() is not None or time.monotonic() > deadline:
            raise AssertionError(f"the node did not start:\n{log.read_text()}")
        try:
            process.wait(0.05)
        except subprocess.TimeoutExpired:
            continue
    result: Ready = json.loads(ready.read_text())
    return result
