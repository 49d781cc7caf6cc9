"""`p2pllm demo`: a whole swarm of processes on this computer, a question to it, and a murder.

The question is asked twice. The second time the server in the middle is killed while it answers,
another one takes over, and the two answers are compared.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from p2pllm.addresses import Address
from p2pllm.cli.asking import client_settings, swarm_model, tell_route
from p2pllm.cli.chat import chat
from p2pllm.cli.generate import Question, answer
from p2pllm.cli.nodes import asking_node
from p2pllm.cli.options import (
    DTYPES,
    ClientOptions,
    SamplingOptions,
    UseOptions,
    chain_option,
    common_options,
    option,
)
from p2pllm.cli.runner import exit_when_terminated, run, uninterrupted
from p2pllm.cli.terminal import Activity, tell
from p2pllm.config import NodeConfig, ShaperConfig
from p2pllm.errors import P2PLLMError

if TYPE_CHECKING:
    from p2pllm.client.model import SwarmModel
    from p2pllm.client.results import GenerationResult

# Thirds of the default model, and another server for the middle one.
SERVERS = {"server 0:10": "0:10", "server 10:20": "10:20", "server 20:30": "20:30"}
SPARE = {"spare 10:20": "10:20"}
CACHE_TOKENS = 8192
PROMPT = "Why do bees live in swarms?"
READY_WITHIN_S = 300.0  # three processes load torch and blocks at once, perhaps on two cores
POLL_S = 0.05
STOP_WITHIN_S = 5.0
KILL_AFTER = 12  # tokens of the second answer
LOG_LINES = 15  # of a server that failed
KEPT_VARIABLE = "P2PLLM_CACHE"  # where the model is; all other settings are the demo's own


@click.command("demo")
@option("--prompt", metavar="TEXT", default=PROMPT, show_default=True, help="What to ask.")
@option(
    "--max-new-tokens",
    type=click.IntRange(min=1),
    metavar="N",
    default=64,
    show_default=True,
    help="Stop after so many tokens.",
)
@option(
    "--dtype",
    type=click.Choice(DTYPES),
    default="float32",
    show_default=True,
    help="What all compute in; float32 answers the same on any way through the swarm.",
)
@chain_option
@option(
    "--kill/--no-kill",
    default=True,
    show_default=True,
    help="Ask again, and kill a server in the middle of the answer.",
)
@option("--chat", "stay", is_flag=True, help="Stay for a conversation afterwards.")
@common_options
@click.pass_context
def command(
    ctx: click.Context,
    prompt: str,
    max_new_tokens: int,
    dtype: str,
    is_chained: bool,
    kill: bool,
    stay: bool,
) -> None:
    """Run a whole swarm on this computer and ask it something.

    Fetches the default model, starts a bootstrap node, three servers with a third of the model
    each and a spare one, asks one question, shows the answer, the way it took and how fast it was.
    Then it asks again, kills a server in the middle of the answer (kill -9), and compares the two
    answers. In the end it stops everything.

    \b
    Examples:
      p2pllm demo
      p2pllm demo --no-kill --chat
    """
    sampling = SamplingOptions(max_new_tokens, temperature=0.0, top_k=0, top_p=1.0, seed=None)
    use = UseOptions("", dtype, "auto", patience=30.0, is_chained=is_chained)
    with exit_when_terminated(), Activity() as activity:
        _fetch(activity)
        with _LocalSwarm.running(dtype, activity, with_spare=kill) as swarm:
            network = swarm.client_options()
            config = asking_node(ctx, network, client_settings(use))
            victims = swarm if kill else None
            run(_ask(config, network, use, Question(prompt, sampling), victims, activity))
            if stay:
                chat(config, network, use, _for_chat(sampling))


async def _ask(
    config: NodeConfig,
    network: ClientOptions,
    use: UseOptions,
    question: Question,
    victims: "_LocalSwarm | None",
    activity: Activity,
) -> None:
    async with swarm_model(config, network, use, activity) as model:
        tell(f"\n> {question.prompt}")
        activity.say("waiting for the first token")
        result = await answer(model, question, activity)
        tell("")
        tell_route(result)
        if victims is not None:
            await _ask_and_kill(model, question, victims, result, activity)


async def _ask_and_kill(
    model: "SwarmModel",
    question: Question,
    victims: "_LocalSwarm",
    first: "GenerationResult",
    activity: Activity,
) -> None:
    """The same again, with a death in the middle."""
    victim = first.route[len(first.route) // 2]
    num_pieces = 0

    def on_piece() -> None:
        nonlocal num_pieces
        num_pieces += 1
        if num_pieces == KILL_AFTER:
            victims.kill(str(victim.peer_id))
            tell(f"\n(kill -9: server {victim.peer_id.short}, blocks {victim.blocks})")

    tell(f"\nThe same again; server {victim.peer_id.short} will not live to see the end of it.")
    tell(f"\n> {question.prompt}")
    activity.say("waiting for the first token")
    second = await answer(model, question, activity, on_piece=on_piece)
    tell("")
    tell_route(second)
    _compare(first.token_ids, second.token_ids)


def _compare(first: Sequence[int], second: Sequence[int]) -> None:
    """Say whether both answers are the same."""
    if first == second:
        tell(f"both answers are the same, all {len(first)} tokens of them")
        return
    same = next(
        (i for i, pair in enumerate(zip(first, second, strict=False)) if len(set(pair)) > 1),
        min(len(first), len(second)),
    )
    tell(
        f"the answers differ from token {same + 1} on: two tokens were as good as each other there"
    )


def _for_chat(sampling: SamplingOptions) -> SamplingOptions:
    """Livelier and longer than the one answer, as `p2pllm chat` has it."""
    return SamplingOptions(
        max(256, sampling.max_new_tokens), temperature=0.7, top_k=0, top_p=0.9, seed=None
    )


def _fetch(activity: Activity) -> None:
    from p2pllm.model.hub import DEFAULT_MODEL, resolve_model

    path = resolve_model(
        progress=lambda done, total: activity.on_bytes(f"fetching {DEFAULT_MODEL}", done, total)
    )
    activity.clear()
    _tell_place("model", f"{DEFAULT_MODEL}, in {path}")


def _tell_place(what: str, where: str) -> None:
    tell(f"{what:<16}{where}")


# --- processes --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Node:
    """One process of ours."""

    name: str
    process: "subprocess.Popen[bytes]"
    ready_file: Path
    log_file: Path

    @property
    def peer_id(self) -> str:
        """Who it is, once it is ready."""
        return str(json.loads(self.ready_file.read_text())["peer_id"])

    def addresses(self) -> list[str] | None:
        """Where it is, once it is ready; P2PLLMError if it has ended instead."""
        if self.ready_file.exists():
            addresses: list[str] = json.loads(self.ready_file.read_text())["addresses"]
            return addresses
        code = self.process.poll()
        if code is None:
            return None
        said = self._last_words()
        raise P2PLLMError(f"{self.name} ended with code {code}; it said last:\n{said}")

    def _last_words(self) -> str:
        lines = self.log_file.read_text(errors="replace").splitlines()[-LOG_LINES:]
        return "\n".join(f"  {line}" for line in lines)


class _LocalSwarm:
    """A bootstrap node and servers, as processes that end with the `with` block."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._nodes: list[_Node] = []
        self._peers: list[str] = []
        # Of its own, so that it neither finds nor disturbs any other swarm on this computer.
        self._name = f"demo-{os.getpid()}"

    @classmethod
    @contextlib.contextmanager
    def running(
        cls, dtype: str, activity: Activity, *, with_spare: bool
    ) -> Iterator["_LocalSwarm"]:
        """Start all; yields when all are ready, and stops them whatever happens."""
        with tempfile.TemporaryDirectory(prefix="p2pllm-demo-") as directory:
            swarm = cls(Path(directory))
            try:
                swarm._start(dtype, SERVERS | (SPARE if with_spare else {}), activity)
                yield swarm
            finally:
                activity.clear()
                tell("stopping the servers")
                with uninterrupted():
                    swarm._stop()

    def client_options(self) -> ClientOptions:
        """How a client joins it."""
        peers = tuple(Address.parse(peer) for peer in self._peers)
        return ClientOptions(self._name, (peers,), None, ShaperConfig())

    def kill(self, peer_id: str) -> None:
        """End a server as a power failure would."""
        for node in self._nodes:
            if node.peer_id == peer_id:
                node.process.kill()

    def _start(self, dtype: str, blocks: Mapping[str, str], activity: Activity) -> None:
        activity.say("starting the bootstrap node")
        bootstrap = self._launch("bootstrap node", ["bootstrap", "--new-swarm"])
        self._peers = self._wait_for([bootstrap], activity)
        activity.clear()
        _tell_place("bootstrap node", _without_id(self._peers[0]))
        common = ["--dtype", dtype, "--cache-tokens", str(CACHE_TOKENS)]
        common += ["--peers", ",".join(self._peers)]
        servers = [
            self._launch(name, ["serve", "--blocks", span, *common])
            for name, span in blocks.items()
        ]
        places = self._wait_for(servers, activity)
        activity.clear()
        for server, place in zip(servers, places, strict=True):
            _tell_place(server.name, _without_id(place))

    def _launch(self, name: str, arguments: Sequence[str]) -> _Node:
        file = self._directory / name.replace(" ", "-").replace(":", "-")
        ready_file, log_file = file.with_suffix(".json"), file.with_suffix(".log")
        command = [sys.executable, "-m", "p2pllm", *arguments, "--swarm", self._name]
        command += ["--listen", "127.0.0.1:0", "--ready-file", str(ready_file)]
        with log_file.open("wb") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=_environment(),
                start_new_session=True,  # Ctrl-C in a conversation stops the answer only
            )
        node = _Node(name, process, ready_file, log_file)
        self._nodes.append(node)
        return node

    def _wait_for(self, nodes: Sequence[_Node], activity: Activity) -> list[str]:
        """One address of each, once all are ready."""
        deadline = time.monotonic() + READY_WITHIN_S
        while True:
            found = [node.addresses() for node in nodes]
            ready = [addresses[0] for addresses in found if addresses]
            if len(ready) == len(nodes):
                return ready
            if time.monotonic() > deadline:
                late = ", ".join(n.name for n, a in zip(nodes, found, strict=True) if not a)
                raise P2PLLMError(f"not ready after {READY_WITHIN_S:.0f} s: {late}")
            what = "starting" if len(nodes) == 1 else "starting servers (each loads its blocks)"
            activity.on_blocks(what, len(ready), len(nodes))
            time.sleep(POLL_S)

    def _stop(self) -> None:
        for node in self._nodes:
            node.process.terminate()
        deadline = time.monotonic() + STOP_WITHIN_S
        for node in self._nodes:
            try:
                node.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                node.process.kill()
                node.process.wait()


def _without_id(address: str) -> str:
    return address.rpartition("@")[2]


def _environment() -> dict[str, str]:
    """Ours, without what configures p2pllm, and without the user's configuration file."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("P2PLLM_") or name == KEPT_VARIABLE
    }
    return kept | {"P2PLLM_CONFIG": os.devnull}
