"""A server or a client that notes when a token passes which station.

    python -m benchmarks._traced '{"role": "_server", "name": "server 1", "path": …, "setup": …}'

Moments are of the machine's monotonic clock, which all processes share. They are written to the
file `path` at the end, one JSON list [moment, name, station, bytes] a line.
"""

import importlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from p2pllm.client.compute import ClientCompute
from p2pllm.client.exchange import Exchange
from p2pllm.net.tcp import TcpLink
from p2pllm.server.handlers import Service
from p2pllm.server.worker import Worker

# Of a method: what its beginning and its end are called; empty: not noted.
STATIONS: tuple[tuple[type, str, str, str], ...] = (
    (TcpLink, "buffer_updated", "received", ""),
    (TcpLink, "write", "sends", "sent"),
    (Service, "_on_step", "step parsed", "step queued"),
    (Worker, "_compute", "device begins", "device ends"),
    (Worker, "_hand_over", "results taken", ""),
    (Exchange, "_on_output", "answer parsed", "answer matched"),
    (ClientCompute, "_work", "head begins", "head ends"),
)


class Notes:
    """What was noted, in memory until the end."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._lines: list[tuple[float, str, str, int]] = []

    def note(self, station: str, num_bytes: int) -> None:
        if station:
            self._lines.append((time.monotonic(), self._name, station, num_bytes))

    def watch(self, owner: type, method: str, begins: str, ends: str) -> None:
        """Note the beginnings and ends of a method's calls."""
        work: Callable[..., Any] = getattr(owner, method)

        def watched(self_: object, *args: Any, **options: Any) -> Any:
            self.note(begins, _size(args[0]) if owner is TcpLink else 0)
            result = work(self_, *args, **options)
            self.note(ends, 0)
            return result

        setattr(owner, method, watched)

    def write(self, path: Path) -> None:
        path.write_text("".join(json.dumps(line) + "\n" for line in self._lines))


def _size(data: object) -> int:
    """Of what is written; of what was received the transport tells the size itself."""
    return data if isinstance(data, int) else len(data)  # type: ignore[arg-type]


def main() -> None:
    order = json.loads(sys.argv[1])
    notes = Notes(order["name"])
    for station in STATIONS:
        notes.watch(*station)
    program = importlib.import_module(f"benchmarks.{order['role']}")
    sys.argv[1] = json.dumps(order["setup"])
    try:
        program.main()
    finally:
        notes.write(Path(order["path"]))


if __name__ == "__main__":
    main()
