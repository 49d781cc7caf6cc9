"""Generating text: prefill, then a token at a time, for one or several sequences.

The sequences of one call share a chain and travel in the same messages. A prompt goes through
the hops in chunks that follow each other closely, so that hop 2 works on chunk 1 while hop 1 works
on chunk 2.
"""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass

from p2pllm.client.compute import ClientCompute, Drawing
from p2pllm.client.session import Chain
from p2pllm.client.state import SessionState
from p2pllm.errors import LocalProtocolError
from p2pllm.model.sampling import SamplingParams
from p2pllm.net.frames import Priority
from p2pllm.tasks import together
from p2pllm.wire.tensors import WireTensor

CHUNKS_IN_FLIGHT = 8  # below the server's window of 16 steps per session


@dataclass
class Progress:
    """What a generation has cost so far; times are the event loop's."""

    started: float
    first_token: float | None = None
    last_token: float | None = None
    num_steps: int = 0  # decode steps
    own_s: float = 0.0  # the client's own computation within them

    def on_token(self, now: float, *, own_s: float) -> None:
        """Note that a token (of each sequence) has come, with `own_s` of our own work in it."""
        if self.first_token is None:
            self.first_token = now
        else:
            self.num_steps += 1
            self.own_s += own_s
        self.last_token = now

    @property
    def ttft_s(self) -> float | None:
        """Time to first token, in seconds."""
        return None if self.first_token is None else self.first_token - self.started

    @property
    def own_s_per_step(self) -> float | None:
        """The client's own computation per decode step, in seconds."""
        return self.own_s / self.num_steps if self.num_steps else None

    @property
    def tpot_s(self) -> float | None:
        """Mean time per output token after the first, in seconds."""
        if self.first_token is None or self.last_token is None or not self.num_steps:
            return None
        return (self.last_token - self.first_token) / self.num_steps


async def prefill(
    chain: Chain,
    compute: ClientCompute,
    state: SessionState,
    token_ids: Sequence[int],
    *,
    tail: int,
    chunk_tokens: int,
) -> list[WireTensor]:
    """Send a prompt through the chain in overlapping chunks.

    Returns the outputs of the last `tail` tokens (0: of all), as a list of coded tensors in
    order; with a tail, chunks before the last are asked for one output that nobody reads.
    """
    if not token_ids:
        raise LocalProtocolError("a prompt needs at least one token")
    chunks = [
        token_ids[start : start + chunk_tokens] for start in range(0, len(token_ids), chunk_tokens)
    ]
    if tail > len(chunks[-1]):
        raise LocalProtocolError(f"a tail of {tail} is longer than the last chunk")
    gate = asyncio.Semaphore(CHUNKS_IN_FLIGHT)  # FIFO: chunks leave in order

    async def send(chunk: Sequence[int]) -> WireTensor:
        async with gate:
            tensor = await compute.embed(chunk, chain.wire)
            wanted = (tail if chunk is chunks[-1] else 1) if tail else 0
            # One priority for all: a last chunk of one token must not overtake the others.
            return await chain.step(
                [state], [len(chunk)], tensor, wanted, priority=Priority.PREFILL
            )

    outputs = await together(send(chunk) for chunk in chunks)
    return outputs[-1:] if tail else outputs


async def generate(
    chain: Chain,
    compute: ClientCompute,
    states: Sequence[SessionState],
    drawings: Sequence[Drawing],
    params: SamplingParams,
    progress: Progress,
    *,
    chunk_tokens: int,
) -> AsyncGenerator[dict[int, str], None]:
    """Generate until every sequence is finished; yields the new text by sequence index.

    A state may hold the beginning of its prompt already (`state.position` tokens of it). Prompts
    are prefilled side by side; the decode steps of all sequences that are not finished share one
    message per hop.
    """
    now = asyncio.get_running_loop().time
    prefilled = await together(
        prefill(
            chain,
            compute,
            state,
            drawing.sequence.prompt_ids[state.position :],
            tail=1,
            chunk_tokens=chunk_tokens,
        )
        for state, drawing in zip(states, drawings, strict=True)
    )
    outputs = [tensor for tensors in prefilled for tensor in tensors]
    active = list(range(len(states)))
    while True:
        started = now()
        step = await compute.advance(outputs, [drawings[i] for i in active], params, chain.wire)
        progress.on_token(now(), own_s=now() - started)
        yield {active[i]: piece for i, piece in enumerate(step.pieces)}
        active = [active[i] for i in step.going_on]
        if step.tensor is None:
            return
        going_on = [states[i] for i in active]
        outputs = [await chain.step(going_on, [1] * len(active), step.tensor, 0)]
