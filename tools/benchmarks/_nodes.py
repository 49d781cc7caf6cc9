"""Nodes as real processes of their own, to be killed, stopped and started again.

A node that is started again has the same address, the same identity and the same blocks.
"""

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

STARTS_WITHIN_S = 120.0
ENDS_WITHIN_S = 5.0
POLL_S = 0.05

# Their speed is stated, so that servers that start at once do not measure each other; it is about
# what two shared cores give, lest clients should move to whoever they have not tried yet.
SERVE = ("serve", "--dtype", "float32", "--throughput", "600", "--public-name", "lab")


class Node:
    """`p2pllm ARGUMENTS` on a loopback port of its own."""

    def __init__(self, directory: Path, name: str, arguments: tuple[str, ...]) -> None:
        self.name = name
        self.peer_id = ""
        self.address = ""  # HOST:PORT
        self.is_paused = False
        self._arguments = arguments
        self._directory = directory
        self._ready = directory / f"{name}.json"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def is_running(self) -> bool:
        """Is there a process, stopped or not?"""
        return self._process is not None and self._process.poll() is None

    def launch(self) -> None:
        """Start it; `ready` tells when it serves."""
        self._ready.unlink(missing_ok=True)
        command = [sys.executable, "-m", "p2pllm", *self._arguments]
        command += ["--listen", self.address or "127.0.0.1:0", "--ready-file", str(self._ready)]
        command += ["--identity", str(self._directory / f"{self.name}.key"), "-v"]
        with (self._directory / f"{self.name}.log").open("ab") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=log, env=_environment(self._directory)
            )

    async def ready(self) -> None:
        """Wait until it serves."""
        deadline = time.monotonic() + STARTS_WITHIN_S
        while not self._ready.exists():
            if not self.is_running or time.monotonic() > deadline:
                raise SystemExit(f"{self.name} did not start; see {self._directory}")
            await asyncio.sleep(POLL_S)
        found: dict[str, Any] = json.loads(self._ready.read_text())
        self.peer_id = found["peer_id"]
        self.address = found["addresses"][0].rpartition("@")[2]

    def send(self, number: signal.Signals) -> None:
        """A signal; nothing if it has ended."""
        if self._process is not None:
            self._process.send_signal(number)
            self.is_paused = number is signal.SIGSTOP or (
                self.is_paused and number is not signal.SIGCONT
            )

    async def kill(self) -> None:
        """kill -9; returns when it is dead."""
        self.send(signal.SIGKILL)
        await self.ended()

    async def ended(self, within_s: float = ENDS_WITHIN_S) -> None:
        """Wait until there is no process; after so many seconds, see to that."""
        deadline = time.monotonic() + within_s
        while self.is_running:
            if time.monotonic() > deadline:
                self.send(signal.SIGKILL)
            await asyncio.sleep(POLL_S)
        self.is_paused = False


class Swarm:
    """A bootstrap node, which nothing happens to, and servers."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory  # with the nodes' logs
        self.network = f"lab-{os.getpid()}"
        self.servers: list[Node] = []
        self.bootstrap = Node(directory, "bootstrap", ("bootstrap", "--swarm", self.network))

    async def start(self, spans: list[str]) -> None:
        """Start a server for each span, and wait for all."""
        self.bootstrap.launch()
        await self.bootstrap.ready()
        swarm = ("--swarm", self.network, "--peers", self.bootstrap.address)
        for number, span in enumerate(spans):
            node = Node(self.directory, f"server{number}", (*SERVE, "--blocks", span, *swarm))
            self.servers.append(node)
            node.launch()
        for server in self.servers:
            await server.ready()

    def by_peer(self, peer_id: str) -> Node:
        """The server with this identity."""
        return next(server for server in self.servers if server.peer_id == peer_id)

    async def stop(self) -> None:
        """End all processes, and forget the routing tables that they kept."""
        for node in (*self.servers, self.bootstrap):
            node.send(signal.SIGKILL)
        for node in (*self.servers, self.bootstrap):
            await node.ended()
        from p2pllm.model.hub import cache_directory

        for table in (cache_directory() / "tables").glob(f"{self.network}-*"):
            table.unlink()


@asynccontextmanager
async def running(spans: list[str]) -> AsyncIterator[Swarm]:
    """Servers of the default model in float32 for these spans."""
    swarm = Swarm(Path(tempfile.mkdtemp(prefix="p2pllm-lab-")))
    try:
        await swarm.start(spans)
        yield swarm
    finally:
        await swarm.stop()


def _environment(directory: Path) -> dict[str, str]:
    """Ours, with nobody's settings but the model cache, and this p2pllm."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("P2PLLM_")}
    if "P2PLLM_CACHE" in os.environ:
        kept["P2PLLM_CACHE"] = os.environ["P2PLLM_CACHE"]
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    place = str(directory)
    return {**kept, "PYTHONPATH": path, "XDG_DATA_HOME": place, "XDG_CONFIG_HOME": place}
