"""`p2pllm generate`: text after a prompt."""

import json
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from p2pllm.cli.asking import (
    as_json,
    client_settings,
    generate_options,
    has_chat_template,
    swarm_model,
    tell_event,
    tell_route,
)
from p2pllm.cli.nodes import asking_node
from p2pllm.cli.options import (
    ClientOptions,
    SamplingOptions,
    UseOptions,
    client_options,
    common_options,
    option,
    sampling_options,
    use_options,
)
from p2pllm.cli.runner import run
from p2pllm.cli.terminal import Activity, printable
from p2pllm.config import NodeConfig
from p2pllm.errors import ConfigError

if TYPE_CHECKING:
    from p2pllm.client.generation import Generation, Prompt, SavedSession
    from p2pllm.client.model import SwarmModel
    from p2pllm.client.results import GenerationResult


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked, and what is to be shown of the answer."""

    prompt: "str | SavedSession"
    sampling: SamplingOptions
    stop: tuple[str, ...] = ()
    is_chat: bool | None = None  # None: if the model has a template
    ignore_eos: bool = False
    is_streamed: bool = True
    saved_to: Path | None = None
    traced_to: Path | None = None


@click.command("generate")
@click.argument("prompt", required=False)
@use_options
@client_options
@sampling_options(max_new_tokens=128, temperature=0.0, top_p=1.0)
@option("--stop", metavar="TEXT", multiple=True, help="End before this text; may be repeated.")
@option(
    "--chat/--raw",
    default=None,
    help="Wrap the prompt as a message in the model's chat template, or continue it as it is.  "
    "[default: --chat if the model has a template]",
)
@option("--ignore-eos", is_flag=True, help="Go on when the model wants to end.")
@option(
    "--save",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    metavar="FILE",
    help="Keep the tokens there, also if the answer breaks off: --resume goes on with them.",
)
@option(
    "--resume",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Continue what --save has kept, in place of a PROMPT.",
)
@option(
    "--trace",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    metavar="FILE",
    help="Write there where the time of each token goes; `p2pllm trace FILE` draws it.",
)
@option("--show-route", is_flag=True, help="Say which servers answered, and how fast.")
@option("--json", "as_object", is_flag=True, help="Print one JSON object at the end, only.")
@common_options
@click.pass_context
def command(
    ctx: click.Context,
    prompt: str | None,
    use: UseOptions,
    network: ClientOptions,
    sampling: SamplingOptions,
    stop: tuple[str, ...],
    chat: bool | None,
    ignore_eos: bool,
    save: Path | None,
    resume: Path | None,
    trace: Path | None,
    show_route: bool,
    as_object: bool,
) -> None:
    """Generate text with a model of the swarm.

    PROMPT is the text to answer or to continue; "-" reads it from standard input. The answer is
    printed as it comes.

    \b
    Examples:
      p2pllm generate --peers HOST:PORT "What is a swarm?"
      p2pllm generate --peers HOST:PORT --raw "The capital of France is" --max-new-tokens 8
      p2pllm generate --peers HOST:PORT --json - < question.txt
      p2pllm generate --peers HOST:PORT --save story.json "Once upon a time"
      p2pllm generate --peers HOST:PORT --resume story.json
    """
    for file in (save, trace):  # rather now than when the answer is there
        if file is not None and not file.parent.is_dir():
            raise click.UsageError(f"there is no directory {str(file.parent)!r}", ctx)
    config = asking_node(ctx, network, client_settings(use))
    question = Question(
        _prompt(ctx, prompt) if resume is None else _saved(ctx, resume, prompt),
        sampling,
        stop,
        chat,
        ignore_eos,
        is_streamed=not as_object,
        saved_to=save,
        traced_to=trace,
    )
    result = run(_generate(config, network, use, question))
    if as_object:
        click.echo(json.dumps(as_json(result)))
    if show_route:
        tell_route(result)


def _prompt(ctx: click.Context, prompt: str | None) -> str:
    if prompt is None and sys.stdin.isatty():
        raise click.UsageError('no PROMPT: give a text in quotes, or "-" for standard input', ctx)
    text = prompt
    if text is None or text == "-":
        text = sys.stdin.read()
    if not text:
        raise click.UsageError("the PROMPT is empty", ctx)
    return text


def _saved(ctx: click.Context, file: Path, prompt: str | None) -> "SavedSession":
    if prompt is not None:
        raise click.UsageError("give a PROMPT or --resume, not both", ctx)
    from p2pllm.client.generation import SavedSession

    return SavedSession.from_json(file.read_text(errors="replace"))


async def _generate(
    config: NodeConfig, network: ClientOptions, use: UseOptions, question: Question
) -> "GenerationResult":
    with Activity() as activity:
        async with swarm_model(config, network, use, activity) as model:
            activity.say("waiting for the first token")
            return await answer(model, question, activity)


async def answer(
    model: "SwarmModel",
    question: Question,
    activity: Activity,
    on_piece: Callable[[], None] = lambda: None,
) -> "GenerationResult":
    """Generate, and print the text as it comes."""
    with ExitStack() as files:
        trace = question.traced_to and files.enter_context(question.traced_to.open("w"))
        generation = model.generate(
            _tokens(model, question),
            stop=question.stop,
            ignore_eos=question.ignore_eos,
            on_event=tell_event,
            write_trace=trace.write if trace else None,
            **generate_options(question.sampling),
        )
        await _print(generation, question, activity, on_piece)
    (result,) = generation.results()
    return result


async def _print(
    generation: "Generation", question: Question, activity: Activity, on_piece: Callable[[], None]
) -> None:
    is_terminal, is_begun = sys.stdout.isatty(), False
    try:
        async with generation:
            async for piece in generation:
                activity.clear()
                if question.is_streamed:
                    click.echo(printable(piece) if is_terminal else piece, nl=False)
                    is_begun = True
                on_piece()
    finally:
        if is_begun:
            click.echo()
        if question.saved_to is not None:
            question.saved_to.write_text(generation.export().to_json() + "\n")


def _tokens(model: "SwarmModel", question: Question) -> "Prompt":
    """What to continue: a text, a message in the model's chat template, or saved tokens."""
    if not isinstance(question.prompt, str):
        if question.prompt.model_id != model.model_id:
            raise ConfigError(
                f"that was saved with {question.prompt.model_id}, and this is {model.model_id}"
            )
        return question.prompt.token_ids
    is_chat = has_chat_template(model) if question.is_chat is None else question.is_chat
    return [{"role": "user", "content": question.prompt}] if is_chat else question.prompt
