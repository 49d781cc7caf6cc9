"""What `generate`, `chat` and `demo` share: reaching a model, and telling how it went."""

import gc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from p2pllm.cli.nodes import identity_of
from p2pllm.cli.options import ClientOptions, SamplingOptions, UseOptions
from p2pllm.cli.terminal import Activity, milliseconds, tell
from p2pllm.config import ClientConfig, NodeConfig
from p2pllm.errors import ConfigError

if TYPE_CHECKING:
    from p2pllm.client.client import Swarm
    from p2pllm.client.model import SwarmModel
    from p2pllm.client.results import ChainEvent, GenerationResult


def client_settings(use: UseOptions) -> ClientConfig:
    """The client's part of the configuration."""
    return ClientConfig(
        dtype=use.dtype,
        wire_codec=use.wire_codec,
        patience_s=use.patience,
        is_chained=use.is_chained,
        journal_bytes=use.journal_bytes,
    )


@asynccontextmanager
async def swarm_model(
    config: NodeConfig, network: ClientOptions, use: UseOptions, activity: Activity
) -> AsyncIterator["SwarmModel"]:
    """Join, and load what a client needs of the model."""
    activity.say("starting")
    from p2pllm.client.client import connect  # imports torch

    activity.say("joining the swarm")
    async with connect(
        config=config,
        dtype=use.dtype,
        wire_codec=use.wire_codec,
        identity=identity_of(network),
    ) as swarm:
        activity.say("loading the model's edges")
        model = await swarm.model(
            use.model or None,
            on_progress=lambda done, total: activity.on_bytes("fetching the model", done, total),
        )
        await _check_is_served(swarm, model)
        missing = model.tracker.view().missing()
        if missing and use.patience:
            spans = ", ".join(str(span) for span in missing)
            activity.clear()
            tell(f"no server for blocks {spans} of {model.model_id}; waiting {use.patience:g} s")
        # What is there now stays: a look through it for garbage takes 20 ms amid a text.
        gc.collect()
        gc.freeze()
        yield model


async def _check_is_served(swarm: "Swarm", model: "SwarmModel") -> None:
    """Waiting is of no use in a swarm that serves other models only."""
    if model.tracker.view().servers:
        return
    others = sorted({str(listing.model) for listing in await swarm.models()})
    if others:
        raise ConfigError(
            f"nobody here serves {model.model_id}; this swarm serves {', '.join(others)}: name one "
            "with --model (what follows the @ tells apart files of the same name)"
        )


def has_chat_template(model: "SwarmModel") -> bool:
    """Does the model know how conversations are written?"""
    from p2pllm.model.tokenizer import Tokenizer

    return isinstance(model.tokenizer, Tokenizer) and model.tokenizer.has_chat_template


def generate_options(sampling: SamplingOptions) -> dict[str, Any]:
    """The keyword arguments of `SwarmModel.generate`."""
    return {
        "max_new_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "seed": sampling.seed,
    }


def as_json(result: "GenerationResult") -> dict[str, Any]:
    """What `generate --json` prints."""
    return {
        "text": result.text,
        "token_ids": list(result.token_ids),
        "prompt_token_ids": list(result.prompt_token_ids),
        "finish": result.finish,
        "ttft_s": result.ttft_s,
        "tpot_s": result.tpot_s,
        "tokens_per_s": result.tokens_per_s,
        "bytes_per_token_per_hop": result.bytes_per_token_per_hop,
        "route": [
            {
                "peer_id": str(hop.peer_id),
                "blocks": str(hop.blocks),
                "rtt_s": hop.rtt_s,
                "queue_s": hop.queue_s,
                "compute_s": hop.compute_s,
            }
            for hop in result.route
        ],
        "journal_peak_bytes": result.journal_peak_bytes,
        "cached_prompt_tokens": result.cached_prompt_tokens,
        "recoveries": [
            {
                "reason": repair.reason,
                "lost": [{"peer_id": str(peer), "blocks": str(span)} for peer, span in repair.lost],
                "by": [{"peer_id": str(peer), "blocks": str(span)} for peer, span in repair.by],
                "stall_s": repair.stall_s,
                "replayed_tokens": repair.replayed_tokens,
            }
            for repair in result.recoveries
        ],
    }


def tell_event(event: "ChainEvent") -> None:
    """What happens to the route while text is generated, on stderr."""
    from p2pllm.client.results import Recovered, event_words

    if not isinstance(event, Recovered) or event.lost:
        tell(f"\n({event_words(event)[1]})")


def tell_route(result: "GenerationResult") -> None:
    """Which way the tokens went and how fast, on stderr."""
    tell("route     blocks      rtt ms  queue ms  compute ms")
    for hop in result.route:
        tell(
            f"{hop.peer_id.short}  {hop.blocks!s:<8}{milliseconds(hop.rtt_s):>10}"
            f"{milliseconds(hop.queue_s):>10}{milliseconds(hop.compute_s):>12}"
        )
    parts = [f"{len(result.token_ids)} tokens"]
    if result.ttft_s is not None:
        parts.append(f"first after {result.ttft_s:.2f} s")
    if result.tokens_per_s is not None:
        parts.append(f"then {result.tokens_per_s:.1f} tokens/s")
    num_lost = sum(len(repair.lost) for repair in result.recoveries)
    if num_lost:
        parts.append(f"{num_lost} lost server{'s' if num_lost > 1 else ''} replaced")
    tell(", ".join(parts))
