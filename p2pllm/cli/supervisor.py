"""One server process for each device, started and looked after by one command.

Each process is a server like any other: it has its own key, port and blocks, and the swarm does
not know that they belong together. This one computes nothing: it hands on what they print, line by
line with the device's name in front, passes signals on, and starts a server again that has died.

A server that cannot even start ends them all: that is a mistake in what was asked for, and should
be seen at once. One that dies later is another matter. The others go on, and it is started again
after 2, 8 and 32 seconds, because a server of weeks must survive a fault of the driver; a fault
that stays is not tried for ever. Ten minutes of service make up for earlier deaths.
"""

import asyncio
import ctypes
import json
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from p2pllm.cli.nodes import write_ready
from p2pllm.cli.options import NodeOptions
from p2pllm.cli.runner import STOP_WITHIN_S, GentleStop
from p2pllm.cli.terminal import tell
from p2pllm.errors import ConfigError, P2PLLMError
from p2pllm.spans import Span, cut
from p2pllm.tasks import task_group, to_the_end

RESTART_DELAYS_S = (2.0, 8.0, 32.0)
STEADY_S = 600.0  # who served for so long has all restarts again
POLL_S = 0.1  # for ready files
KILL_AFTER_S = STOP_WITHIN_S - 0.5  # we must see their end before our own is forced
MAX_LINE_BYTES = 2**20
LAST_PORT = 65_535
PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True, slots=True)
class Share:
    """What one device gets of what was asked for; 0 and None: not said."""

    device: str
    label: str  # the device, and which one if it is named twice
    port: int
    identity: Path | None
    blocks: Span | None
    num_blocks: int
    memory_bytes: int


def share_out(
    devices: Sequence[str],
    network: NodeOptions,
    *,
    blocks: Span | None,
    num_blocks: int,
    memory_bytes: int,
) -> list[Share]:
    """Blocks and memory in equal shares, in the order of the devices; ports that follow another.

    Raises ConfigError for more devices than blocks, and for what cannot be shared out.
    """
    number, (_, port) = len(devices), network.listen
    asked = len(blocks) if blocks else num_blocks
    if asked and asked < number:
        raise ConfigError(
            f"{number} devices are named for {asked} blocks, and each serves one at least; name "
            "fewer with --device, or serve more blocks"
        )
    if len(set(devices)) < number and not asked and not memory_bytes:
        raise ConfigError(
            "a device is named twice, and each server on it would take all of its free memory; "
            "say how many blocks with --blocks or --num-blocks, or how much --memory"
        )
    if port and port + number - 1 > LAST_PORT:
        raise ConfigError(
            f"{number} ports from {port} on end after {LAST_PORT}; choose a lower one"
        )
    sizes = [asked // number + (i < asked % number) for i in range(number)]
    spans = cut(blocks, sizes) if blocks else [None] * number
    return [
        Share(
            device=device,
            label=_label(devices, i),
            port=port + i if port else 0,
            identity=_derived(network.identity, i),
            blocks=spans[i],
            num_blocks=0 if blocks else sizes[i],
            memory_bytes=memory_bytes // number,
        )
        for i, device in enumerate(devices)
    ]


def _label(devices: Sequence[str], index: int) -> str:
    device = devices[index]
    return (
        device if devices.count(device) == 1 else f"{device}#{devices[: index + 1].count(device)}"
    )


def _derived(identity: Path | None, index: int) -> Path | None:
    """Two servers must not share a key: "me.key" becomes "me-0.key", "me-1.key" …"""
    return identity and identity.with_name(f"{identity.stem}-{index}{identity.suffix}")


class RestartPolicy:
    """Whether to start a server again that has died, and when."""

    def __init__(self) -> None:
        self._delays = iter(RESTART_DELAYS_S)

    def on_death(self, lived_s: float) -> float | None:
        """Seconds to wait before the next start; None: give it up."""
        if lived_s >= STEADY_S:
            self._delays = iter(RESTART_DELAYS_S)
        return next(self._delays, None)


class _Server:
    """One process, and what is known of it."""

    def __init__(self, share: Share, ready_file: Path) -> None:
        self.share = share
        self.ready_file = ready_file
        self.ready = ""  # what its ready file says; empty: it is not ready
        self.was_ready = False
        self.process: asyncio.subprocess.Process | None = None

    @property
    def addresses(self) -> list[str]:
        """Where it is, if it is ready."""
        addresses: list[str] = json.loads(self.ready)["addresses"] if self.ready else []
        return addresses

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal, if it is there."""
        if self.process is not None and self.process.returncode is None:
            self.process.send_signal(number)


class Supervisor:
    """Runs `p2pllm serve` once for each share; `given` are the arguments that all have."""

    def __init__(
        self,
        shares: Sequence[Share],
        given: Sequence[str],
        network: NodeOptions,
        stopping: GentleStop,
        directory: Path,
    ) -> None:
        self._given = tuple(given)
        self._network = network
        self._stopping = stopping
        self._servers = [
            _Server(share, directory / f"{number}.json") for number, share in enumerate(shares)
        ]
        self._stopped = asyncio.Event()
        self._has_begun = asyncio.Event()  # there is a swarm to join
        self._has_told = False
        self._given_up: list[str] = []

    async def run(self) -> None:
        """Until all have ended, which they do when we are asked to stop.

        Cancelled, it ends them. Raises P2PLLMError if one does not start, or was given up.
        """
        if not self._network.new_swarm:
            self._has_begun.set()
        async with task_group() as tasks:
            waiting = tasks.create_task(self._stop_when_asked())
            async with task_group() as keeping:
                for server in self._servers:
                    keeping.create_task(self._keep(server))
            waiting.cancel()
        if self._given_up:
            raise P2PLLMError(f"given up after too many deaths: {', '.join(self._given_up)}")

    async def _stop_when_asked(self) -> None:
        await self._stopping.wait()
        self._stopped.set()
        self._has_begun.set()  # nobody waits for it any more
        for server in self._servers:
            server.signal(signal.SIGTERM)

    async def _keep(self, server: _Server) -> None:
        """See to it that it serves."""
        if server is not self._servers[0]:
            await self._has_begun.wait()
        policy, label = RestartPolicy(), server.share.label
        while not self._stopped.is_set():
            started = time.monotonic()
            code = await self._live(server)
            if self._stopped.is_set() or (code == 0 and server.was_ready):
                return  # told to, by us or by somebody else
            if not server.was_ready:
                raise P2PLLMError(f"the server on {label} did not start ({_reason(code)})")
            delay_s = policy.on_death(time.monotonic() - started)
            if delay_s is None:
                tell(f"THE SERVER ON {label} DIED AGAIN ({_reason(code)}) and is given up")
                self._given_up.append(label)
                return
            tell(
                f"THE SERVER ON {label} DIED ({_reason(code)}); the others go on, it is started "
                f"again in {delay_s:.0f} s"
            )
            await self._sleep(delay_s)

    async def _sleep(self, seconds: float) -> None:
        """Wait, but not if we are to stop."""
        try:
            async with asyncio.timeout(seconds):
                await self._stopped.wait()
        except TimeoutError:
            return

    async def _live(self, server: _Server) -> int:
        """One life of a server, from start to end; returns its exit code."""
        server.ready_file.unlink(missing_ok=True)
        process = server.process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "p2pllm", "serve", *self._arguments(server)),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            limit=MAX_LINE_BYTES,
            start_new_session=True,  # Ctrl-C comes to us, and once from us
            preexec_fn=_told_when_we_die(),
        )
        assert process.stdout is not None
        assert process.stderr is not None
        label = server.share.label
        try:
            async with task_group() as tasks:
                tasks.create_task(_hand_on(process.stdout, label, is_error=False))
                tasks.create_task(_hand_on(process.stderr, label, is_error=True))
                watching = tasks.create_task(self._watch(server))
                if self._stopped.is_set():  # while it was being started
                    process.terminate()
                code = await process.wait()
                watching.cancel()
        finally:
            server.ready = ""
            if process.returncode is None:
                await to_the_end(_end(process))
        return code

    async def _watch(self, server: _Server) -> None:
        """Look at its ready file, which it writes when it is ready, and anew when it moves."""
        while True:
            try:
                ready = server.ready_file.read_text()
            except FileNotFoundError:
                ready = ""
            if ready != server.ready:
                server.ready, server.was_ready = ready, True
                self._has_begun.set()
                self._on_ready()
            await asyncio.sleep(POLL_S)

    def _on_ready(self) -> None:
        """Say that all are ready, once, and where they are, each time that changes."""
        if not all(server.ready for server in self._servers):
            return
        servers = [json.loads(server.ready) for server in self._servers]
        addresses = [address for server in servers for address in server["addresses"]]
        content = {"servers": servers, "addresses": addresses, "model": servers[0]["model"]}
        if self._network.ready_file is not None:
            write_ready(self._network.ready_file, content)
        if not self._has_told:
            self._has_told = True
            click.echo(f"All {len(servers)} servers are ready. Ctrl-C stops them.")

    def _arguments(self, server: _Server) -> list[str]:
        """The given ones, and after them, so that they count, those of this server."""
        share, host = server.share, self._network.listen[0]
        own = ["--no-per-device", "--device", share.device, "--listen", _place(host, share.port)]
        own += ["--ready-file", str(server.ready_file)]
        if share.identity is not None:
            own += ["--identity", str(share.identity)]
        if share.blocks is not None:
            own += ["--blocks", str(share.blocks)]
        if share.num_blocks:
            own += ["--num-blocks", str(share.num_blocks)]
        if share.memory_bytes:
            own += ["--memory", str(share.memory_bytes)]
        others = [a for other in self._servers if other is not server for a in other.addresses]
        if self._network.new_swarm and others:  # the first one begins it, and is joined
            own += ["--no-new-swarm", "--peers", ",".join(others)]
        return [*self._given, *own]


def _told_when_we_die() -> Callable[[], None] | None:
    """What a new process does first, so that it drains should we be killed; on Linux."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl

    def ask() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGTERM)

    return ask


async def _hand_on(lines: asyncio.StreamReader, label: str, *, is_error: bool) -> None:
    """Print what a server prints, with its device in front."""
    while True:
        try:
            line = await lines.readline()
        except ValueError:  # no line of ours is that long; it has been dropped
            continue
        if not line:
            return
        click.echo(f"[{label}] {line.decode(errors='replace').rstrip()}", err=is_error)


async def _end(process: asyncio.subprocess.Process) -> None:
    """Tell it (again) to end, and see to it."""
    process.terminate()
    try:
        async with asyncio.timeout(KILL_AFTER_S):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()


def _place(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _reason(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"
