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

STARTS_WITHIN_S = 60.0
ENDS_WITHIN_S = 5.0

Ready = dict[str, Any]  # what a node writes to its --ready-file
Start = Callable[..., Ready]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Starts `p2pllm ARGUMENTS` on a free loopback port; returns what its ready file says."""
    directory = tmp_path_factory.mktemp("nodes")
    processes: list[subprocess.Popen[bytes]] = []

    def start_node(*arguments: str) -> Ready:
        number = len(processes)
        ready, log = directory / f"{number}.json", directory / f"{number}.log"
        command = [sys.executable, "-m", "p2pllm", *arguments]
        command += ["--listen", "127.0.0.1:0", "--ready-file", str(ready)]
        with log.open("wb") as output:
            processes.append(
                subprocess.Popen(command, stdout=output, stderr=output, env=_environment(directory))
            )
        return _wait_for(ready, processes[-1], log)

    yield start_node
    for process in processes:
        process.send_signal(signal.SIGINT)
    for process in processes:
        try:
            process.wait(ENDS_WITHIN_S)
        except subprocess.TimeoutExpired:
            process.kill()


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
