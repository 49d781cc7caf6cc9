"""`p2pllm chat`: a conversation, turn by turn, that keeps its session."""

import asyncio
import sys
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import click

from p2pllm.cli.asking import (
    client_settings,
    generate_options,
    has_chat_template,
    swarm_model,
    tell_event,
)
from p2pllm.cli.nodes import asking_node
from p2pllm.cli.options import (
    ClientOptions,
    SamplingOptions,
    UseOptions,
    client_options,
    common_options,
    sampling_options,
    use_options,
)
from p2pllm.cli.runner import exit_when_terminated
from p2pllm.cli.terminal import Activity, printable, tell
from p2pllm.config import NodeConfig
from p2pllm.errors import ConfigError, P2PLLMError
from p2pllm.loops import LoopThread

if TYPE_CHECKING:
    from p2pllm.client.model import Session, SwarmModel

FIRST_SESSION_TOKENS = 1024  # doubled as a conversation grows
COMMANDS = """\
/reset   forget the conversation
/help    this list
/quit    leave (so does Ctrl-D)
Ctrl-C   stop the answer"""


@click.command("chat")
@use_options
@client_options
@sampling_options(max_new_tokens=512, temperature=0.7, top_p=0.9)
@common_options
@click.pass_context
def command(
    ctx: click.Context, use: UseOptions, network: ClientOptions, sampling: SamplingOptions
) -> None:
    """Talk with a model of the swarm.

    The servers keep what was said, so each turn costs only its own words. Ctrl-C stops an answer,
    /reset begins anew, Ctrl-D leaves.

    \b
    Example:
      p2pllm chat --peers HOST:PORT
    """
    chat(asking_node(ctx, network, client_settings(use)), network, use, sampling)


def chat(
    config: NodeConfig, network: ClientOptions, use: UseOptions, sampling: SamplingOptions
) -> None:
    """Talk until the person leaves."""
    _enable_line_editing()
    conversation = Conversation(sampling)
    with exit_when_terminated(), LoopThread() as loop:
        try:
            loop.run(conversation.open(config, network, use))
            if sys.stdin.isatty():
                tell(f"{conversation.name}: say something. /help lists the commands.")
            while (line := _read_line()) is not None:
                if line == "/quit":
                    break
                _carry_out(loop, conversation, line)
        finally:
            loop.run(conversation.close())


def _carry_out(loop: LoopThread, conversation: "Conversation", line: str) -> None:
    if line == "/reset":
        loop.run(conversation.reset())
        tell("(forgotten)")
    elif line.startswith("/"):
        tell(COMMANDS if line == "/help" else f"no command {line.split()[0]}\n{COMMANDS}")
    elif line:
        try:
            loop.run(conversation.say(line))
        except KeyboardInterrupt:
            tell("\n(stopped)")
        except P2PLLMError as exc:
            tell(f"error: {exc}")


def _read_line() -> str | None:
    """What the person says; None at the end. Ctrl-C takes back what is typed."""
    while True:
        try:
            return input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            if sys.stdin.isatty():
                tell("")
            return None
        except KeyboardInterrupt:
            tell("\n(Ctrl-D leaves)")


def _enable_line_editing() -> None:
    try:
        import readline  # noqa: F401 - `input` uses it once it is imported
    except ImportError:
        pass  # not on Windows


@dataclass
class Conversation:
    """Messages, and the session that holds their tokens at the servers."""

    sampling: SamplingOptions
    messages: list[dict[str, str]] = field(default_factory=list)
    _stack: AsyncExitStack = field(default_factory=AsyncExitStack)
    _held: AsyncExitStack = field(default_factory=AsyncExitStack)  # the session
    _model: "SwarmModel | None" = None
    _session: "Session | None" = None

    @property
    def model(self) -> "SwarmModel":
        """The model; there is one once the conversation is open."""
        assert self._model is not None
        return self._model

    @property
    def name(self) -> str:
        """The model's name."""
        return self.model.model_id.name

    async def open(self, config: NodeConfig, network: ClientOptions, use: UseOptions) -> None:
        """Join the swarm and load the model."""
        with Activity() as activity:
            joined = swarm_model(config, network, use, activity)
            self.use(await self._stack.enter_async_context(joined))

    def use(self, model: "SwarmModel") -> None:
        """Talk with this model."""
        if not has_chat_template(model):
            raise ConfigError(
                f"{model.model_id.name} has no chat template: it continues texts and does not "
                "converse; use `p2pllm generate --raw`"
            )
        self._model = model

    async def close(self) -> None:
        """Free the servers' memory and leave the swarm."""
        await self._held.aclose()
        await self._stack.aclose()

    async def reset(self) -> None:
        """Forget everything."""
        self.messages.clear()
        await self._drop_session()

    async def say(self, text: str) -> None:
        """Say something and print the answer as it comes."""
        self.messages.append({"role": "user", "content": text})
        try:
            answer = await self._answer()
        except P2PLLMError:
            self.messages.pop()
            raise
        if answer:
            self.messages.append({"role": "assistant", "content": answer})
        else:
            self.messages.pop()  # stopped before the first word: as if it had not been said

    async def _answer(self) -> str:
        session = await self._session_for_messages()
        generation = self.model.generate(
            self.messages,
            session=session,
            on_event=tell_event,
            **generate_options(self.sampling),
        )
        try:
            async with generation:
                async for piece in generation:
                    click.echo(printable(piece), nl=False)
            click.echo()
        except asyncio.CancelledError:
            pass  # Ctrl-C: what was said so far is the answer
        (result,) = generation.results()
        return result.text

    async def _session_for_messages(self) -> "Session":
        """The session, or a larger one where the conversation has outgrown it."""
        limit = self._limit_tokens()
        needed = self._needed_tokens()
        while needed > limit and len(self.messages) > 2:
            del self.messages[:2]
            needed = self._needed_tokens()
            tell(f"(no more than {limit} tokens fit: the oldest question and answer are forgotten)")
        if self._session is not None and needed <= self._session.max_tokens:
            return self._session
        if self._session is not None:
            tell("(the session is full: moving to a larger one)")
            await self._drop_session()
        size = min(limit, max(FIRST_SESSION_TOKENS, 2 * needed))
        session = await self._held.enter_async_context(self.model.session(max_tokens=size))
        self._session = session
        return session

    async def _drop_session(self) -> None:
        self._session = None
        await self._held.aclose()

    def _needed_tokens(self) -> int:
        return len(self.model.encode(self.messages)) + self.sampling.max_new_tokens

    def _limit_tokens(self) -> int:
        """What the model was trained for, and some server of the swarm takes."""
        servers = self.model.tracker.view().servers
        held = [server.presence.max_tokens_per_session for server in servers]
        return min([self.model.config.max_position, *([max(held)] if held else [])])
