"""The two ends of a program that a benchmark runs beside itself and asks by lines of JSON.

The program greets with a line when it is ready, answers each line `{"ask": NAME, ...}` with one
line, and ends when its standard input does.
"""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TOOLS = Path(__file__).resolve().parents[1]
ENDS_WITHIN_S = 10.0


# --- inside the program ------------------------------------------------------------------------


def answer(greeting: Mapping[str, Any], asked: Mapping[str, Callable[..., Any]]) -> None:
    """Answer until standard input ends. `asked` has a function by name; its result is JSON."""
    _say(greeting)
    for line in sys.stdin:
        request = json.loads(line)
        _say(asked[request.pop("ask")](**request))


async def answer_async(
    greeting: Mapping[str, Any], asked: Mapping[str, Callable[..., Awaitable[Any]]]
) -> None:
    """The same beside other tasks of an event loop."""
    _say(greeting)
    while line := await asyncio.to_thread(sys.stdin.readline):
        request = json.loads(line)
        _say(await asked[request.pop("ask")](**request))


def _say(value: Any) -> None:
    print(json.dumps(value), flush=True)


# --- outside -----------------------------------------------------------------------------------


class Program:
    """One that runs. `greeting` is what it said when it was ready."""

    def __init__(self, popen: "subprocess.Popen[str]") -> None:
        self._popen = popen
        self.greeting: dict[str, Any] = self.read()

    def ask(self, name: str, **request: Any) -> Any:
        """Ask and wait for the answer."""
        self.send(name, **request)
        return self.read()

    def send(self, name: str, **request: Any) -> None:
        """Ask; `read` gives the answer."""
        assert self._popen.stdin is not None
        self._popen.stdin.write(json.dumps({"ask": name, **request}) + "\n")
        self._popen.stdin.flush()

    def read(self) -> Any:
        """The next answer."""
        assert self._popen.stdout is not None
        line = self._popen.stdout.readline()
        if not line:
            raise SystemExit(f"{self._popen.args!r} ended early; its errors stand above")
        return json.loads(line)


@contextmanager
def running(
    module: str, settings: Any, environment: Mapping[str, str] | None = None
) -> Iterator[Program]:
    """`python -m benchmarks.MODULE SETTINGS`, the settings as JSON; in our environment if no other
    is given."""
    given = os.environ if environment is None else environment
    with subprocess.Popen(
        [sys.executable, "-m", f"benchmarks.{module}", json.dumps(settings)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**given, "PYTHONPATH": f"{TOOLS}:{TOOLS.parent}"},
    ) as popen:
        assert popen.stdin is not None
        try:
            yield Program(popen)
        finally:
            popen.stdin.close()
            try:
                popen.wait(timeout=ENDS_WITHIN_S)
            except subprocess.TimeoutExpired:
                popen.kill()
