"""`p2pllm doctor`: what works here, and what to do about the rest."""

import enum
import errno
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from p2pllm.addresses import Address
from p2pllm.cli.nodes import asking_node
from p2pllm.cli.options import ClientOptions, client_options, common_options, option
from p2pllm.cli.runner import run
from p2pllm.cli.terminal import Activity
from p2pllm.config import DEFAULT_PORT, NodeConfig
from p2pllm.errors import P2PLLMError

if TYPE_CHECKING:
    from p2pllm.swarm.node import Node

MIN_MEMORY_BYTES = 2 * 2**30  # torch, and a third of a small model
MIN_DISK_BYTES = 1 * 2**30
MIN_FILES = 1024  # 512 connections, their listening sockets and the model's files
RELEASED_AT = 1_760_000_000  # October 2025: no clock is right that shows an earlier time
MAX_SKEW_S = 60.0  # what the DHT tolerates
MAX_AGE_S = 70.0  # of the swarm's newest record: servers republish every 32 to 48 s
PING_TIMEOUT_S = 5.0


class Verdict(enum.StrEnum):
    """How a check ended."""

    OK = "ok"
    WARN = "warn"  # works, but not as it could
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was checked. `advice` says what to do unless it is OK."""

    name: str
    verdict: Verdict
    text: str
    advice: str = ""


@click.command("doctor")
@client_options
@option("--json", "as_object", is_flag=True, help="Print one JSON object.")
@common_options
@click.pass_context
def command(ctx: click.Context, network: ClientOptions, as_object: bool) -> None:
    """Check what works here, and say what to do about the rest.

    With --peers it also checks that these can be reached and that the clocks agree. Exits with 1
    if something fails.

    \b
    Examples:
      p2pllm doctor
      p2pllm doctor --peers HOST:PORT
    """
    findings = []
    with Activity() as activity:
        for finding in _all(ctx, network, activity):
            findings.append(finding)
            if not as_object:
                activity.clear()
                _show(finding)
    if as_object:
        click.echo(json.dumps({"findings": [_as_json(finding) for finding in findings]}))
    ctx.exit(1 if any(finding.verdict is Verdict.FAIL for finding in findings) else 0)


def _all(ctx: click.Context, network: ClientOptions, activity: Activity) -> Iterator[Finding]:
    yield _python()
    yield _event_loop()
    activity.say("importing torch")
    yield from _compute()
    yield _memory()
    yield _files()
    yield from _cache()
    yield from _ports()
    yield _clock()
    if network.peers:
        activity.say("asking the peers")
        yield from run(_swarm(asking_node(ctx, network)))


def _show(finding: Finding) -> None:
    colour = {Verdict.OK: "green", Verdict.WARN: "yellow", Verdict.FAIL: "red"}[finding.verdict]
    mark = click.style(f"{finding.verdict:<4}", fg=colour)
    click.echo(f"{mark}  {finding.name:<10} {finding.text}")
    if finding.advice:
        click.echo(f"{'':<17}→ {finding.advice}")


def _as_json(finding: Finding) -> dict[str, str]:
    return {
        "name": finding.name,
        "verdict": finding.verdict,
        "text": finding.text,
        "advice": finding.advice,
    }


# --- this computer ----------------------------------------------------------------------------


def _python() -> Finding:
    text = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    return Finding("python", Verdict.OK, text)


def _event_loop() -> Finding:
    if importlib.util.find_spec("uvloop") is not None:
        return Finding("loop", Verdict.OK, "uvloop")
    advice = "" if os.name == "nt" else "`pip install uvloop` makes the network faster"
    return Finding("loop", Verdict.OK if os.name == "nt" else Verdict.WARN, "asyncio", advice)


def _compute() -> Iterator[Finding]:
    try:
        import torch
    except (ImportError, OSError) as exc:
        yield Finding("torch", Verdict.FAIL, str(exc), "`pip install torch`; see pytorch.org")
        return
    from p2pllm.model.device import choose_device, choose_dtype, name_of

    yield Finding("torch", Verdict.OK, importlib.metadata.version("torch"))
    device = choose_device("auto")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    yield Finding("device", Verdict.OK, f"{device.type} ({name})")
    dtype = name_of(choose_dtype("auto", device))
    slow = dtype == "float32"
    text = f"{dtype}{' (no fast bfloat16 here)' if slow else ''}"
    yield Finding("dtype", Verdict.OK, text)
    yield Finding("threads", Verdict.OK, f"{torch.get_num_threads()} of {os.cpu_count()} cores")


def _memory() -> Finding:
    available = _available_bytes()
    if available is None:
        return Finding("memory", Verdict.OK, "unknown on this system")
    text = f"{available / 2**30:.1f} GiB available"
    if available < MIN_MEMORY_BYTES:
        advice = "end other programs, or serve fewer blocks with --memory"
        return Finding("memory", Verdict.WARN, text, advice)
    return Finding("memory", Verdict.OK, text)


def _available_bytes() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        values = {name: int(rest.split()[0]) for name, _, rest in (x.partition(":") for x in lines)}
        return values["MemAvailable"] * 1024
    except (OSError, ValueError, KeyError, IndexError):
        return None  # not Linux


def _files() -> Finding:
    try:
        import resource
    except ImportError:
        return Finding("files", Verdict.OK, "no limit on this system")
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < MIN_FILES:
        advice = f"`ulimit -n {MIN_FILES}` before a busy server"
        return Finding("files", Verdict.WARN, f"{soft} may be open at once", advice)
    return Finding("files", Verdict.OK, f"{soft} may be open at once")


def _cache() -> Iterator[Finding]:
    from p2pllm.model.hub import BUILT_IN, CACHE_VARIABLE, DEFAULT_MODEL, cache_directory

    place = cache_directory()
    move = f"or choose another place with {CACHE_VARIABLE}=DIRECTORY"
    try:
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=place):
            pass
        free = shutil.disk_usage(place).free
    except OSError as exc:
        text = f"{place}: {exc.strerror}"
        yield Finding("cache", Verdict.FAIL, text, f"make it writable, {move}")
        return
    text = f"{place}, {free / 2**30:.1f} GiB free"
    if free < MIN_DISK_BYTES:
        yield Finding("cache", Verdict.WARN, text, f"free some space, {move}")
    else:
        yield Finding("cache", Verdict.OK, text)
    file = place / "models" / f"{DEFAULT_MODEL}.gguf"
    if file.is_file() and file.stat().st_size == BUILT_IN[DEFAULT_MODEL].num_bytes:
        yield Finding("model", Verdict.OK, f"{DEFAULT_MODEL} is here")
    else:
        advice = "`p2pllm fetch` downloads it; servers and clients do so when they need it"
        yield Finding("model", Verdict.WARN, f"{DEFAULT_MODEL} is not here yet", advice)


def _ports() -> Iterator[Finding]:
    reason = _cannot_bind(0)
    if reason:
        yield Finding("ports", Verdict.FAIL, f"cannot listen: {reason}", "check the sandbox")
        return
    reason = _cannot_bind(DEFAULT_PORT)
    if reason:
        advice = "another server? choose another port with --listen 0.0.0.0:PORT"
        yield Finding("ports", Verdict.WARN, f"port {DEFAULT_PORT}: {reason}", advice)
    else:
        yield Finding("ports", Verdict.OK, f"port {DEFAULT_PORT} is free")


def _cannot_bind(port: int) -> str:
    try:
        with socket.socket() as sock:
            if os.name != "nt":  # there it would share the port
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(("0.0.0.0", port))
    except OSError as exc:
        return "in use" if exc.errno == errno.EADDRINUSE else exc.strerror or str(exc)
    return ""


def _clock() -> Finding:
    now = time.time()
    text = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now))
    if now < RELEASED_AT:
        return Finding("clock", Verdict.FAIL, text, "set the clock: announcements carry the time")
    return Finding("clock", Verdict.OK, text)


# --- the swarm --------------------------------------------------------------------------------


async def _swarm(config: NodeConfig) -> list[Finding]:
    """Reach each of the peers, and compare clocks with what the swarm has published."""
    from p2pllm.identity import Identity
    from p2pllm.net.tcp import TcpNetwork
    from p2pllm.swarm.announcements import MODELS_NAME, MODELS_NAMESPACE
    from p2pllm.swarm.node import Node

    async with Node.open(config, Identity.generate(), network=TcpNetwork()) as node:
        findings = [await _reach(node, address) for address in config.peers]
        if all(finding.verdict is Verdict.FAIL for finding in findings):
            return findings
        await node.join()
        try:
            records = await node.dht.get(MODELS_NAMESPACE, MODELS_NAME)
        except P2PLLMError as exc:
            findings.append(Finding("swarm", Verdict.FAIL, str(exc), "try other --peers"))
            return findings
    names = {str(record.body.get("name", "")) for record in records if not record.is_tombstone}
    findings.append(
        Finding("swarm", Verdict.OK, f"{len(records)} servers of {', '.join(sorted(names))}")
        if names
        else Finding("swarm", Verdict.WARN, "no server is here", "serve: `p2pllm serve --help`")
    )
    if records:
        findings.append(_skew(max(record.issued for record in records)))
    return findings


async def _reach(node: "Node", address: Address) -> Finding:
    try:
        peer = await node.endpoint.connect(address, timeout_s=PING_TIMEOUT_S)
        rtt_s = await node.endpoint.ping(peer, timeout_s=PING_TIMEOUT_S)
    except P2PLLMError as exc:
        advice = "is a node of this --swarm running there? is a firewall between?"
        return Finding("peer", Verdict.FAIL, f"{address.endpoint}: {exc}", advice)
    return Finding("peer", Verdict.OK, f"{address.endpoint} in {rtt_s * 1e3:.1f} ms")


def _skew(newest_issued: float) -> Finding:
    """Compare clocks: servers date what they publish, and publish it about every 40 s."""
    age_s = time.time() - newest_issued
    advice = "set this computer's clock (for example with NTP)"
    if age_s < -MAX_SKEW_S:
        text = f"{-age_s:.0f} s behind the swarm's"
        return Finding("skew", Verdict.FAIL, text, advice)
    if age_s > MAX_SKEW_S + MAX_AGE_S:
        text = f"about {age_s - MAX_AGE_S / 2:.0f} s ahead of the swarm's"
        return Finding("skew", Verdict.FAIL, text, advice)
    return Finding("skew", Verdict.OK, "this clock agrees with the swarm's")
