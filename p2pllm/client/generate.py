"""Generating text: prefill, then a token at a time, for one or several sequences.

The sequences of one call share a chain and travel in the same messages. A prompt goes through
the hops in chunks that follow each other closely, so that hop 2 works on chunk 1 while hop 1 works
on chunk 2.
"""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass

from p2pllm.client.compute import ClientCompute, Drawing
from p2pllm.client.prefixes import leaders
from p2pllm.client.sequence import Sequence as TextSequence
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

    try:
        outputs = await together(send(chunk) for chunk in chunks)
    finally:
        if state.position < state.num_promised:  # other tokens may come in the place of these
            state.break_promise()
    return outputs[-1:] if tail else outputs


async def prefill_all(
    chain: Chain,
    compute: ClientCompute,
    states: Sequence[SessionState],
    sequences: Sequence[TextSequence],
    *,
    chunk_tokens: int,
) -> list[WireTensor]:
    """Send the prompts, or what the states lack of them, side by side; their last outputs.

    One that begins like an earlier one waits for that, and begins with what the hops hold then.
    """
    prompts = [sequence.prompt_ids for sequence in sequences]
    followed = leaders(prompts) if chain.sharing is not None else [None] * len(prompts)
    is_through = [asyncio.Event() for _ in prompts]

    async def prefill_one(index: int) -> WireTensor:
        state, prompt, leader = states[index], prompts[index], followed[index]
        is_late = leader is not None and state.position < leader[1]
        if leader is not None and is_late:
            await is_through[leader[0]].wait()
        if is_late or not state.num_promised:
            await chain.share(state, prompt)
        sequences[index].num_cached = state.position
        rest = prompt[state.position :]
        (output,) = await prefill(chain, compute, state, rest, tail=1, chunk_tokens=chunk_tokens)
        is_through[index].set()
        return output

    return await together(map(prefill_one, range(len(prompts))))


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

    A state may hold the beginning of its prompt already (`state.position` tokens of it). The
    decode steps of all sequences that are not finished share one message per hop.
    """
    now = asyncio.get_running_loop().time
    sequences = [drawing.sequence for drawing in drawings]
    outputs = await prefill_all(chain, compute, states, sequences, chunk_tokens=chunk_tokens)
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
