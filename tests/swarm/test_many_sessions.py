"""Real blocks, small ones with random weights, under many sessions at once: batching is harmless.

Sessions of very different lengths open and close at random on two servers, on virtual time. What
each is answered is what it is answered alone. In float32 tokens may differ only where the two best
logits are nearer than 1e-3 to each other; in fewer bits, where rounding decides, logits are
compared after the same tokens. In the end no page is missing.
"""

import asyncio
import random
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor

from p2pllm.client.model import SwarmModel
from p2pllm.config import ClientConfig, ServerConfig
from p2pllm.model.config import ModelConfig
from p2pllm.model.dummy import dummy_edges, dummy_model_id
from p2pllm.model.edges import Edges
from p2pllm.model.span_model import SpanCompute
from p2pllm.server.source import DummySource, LoadProgress
from p2pllm.sim.fake_model import FakeDevice
from p2pllm.sim.loop import run
from p2pllm.sim.swarm import FakeSource, SimServer, SimSwarm
from p2pllm.spans import Span
from tests.swarm.raw_client import assert_nothing_left

CONFIG = ModelConfig(
    model_type="llama",
    hidden_size=64,
    num_blocks=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    intermediate_size=128,
    vocab_size=256,
    max_position=8192,
    norm_eps=1e-5,
)
SERVER = ServerConfig(device="cpu", dtype="float32", cache_tokens=20_480, throughput=1e4)
SPANS = (Span(0, 2), Span(2, 4))
NUM_SESSIONS = 64
BATCH_S = 0.05  # so slow a device that many rows wait for it, and go together
NEAR_TIE = 1e-3
MAX_KL_NATS, MIN_AGREEMENT = 5e-3, 0.95
# What sessions computed must not be found by the same prompts alone.
CLIENT = ClientConfig(is_prefix_shared=False)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Products of 64 columns are not worth two, and waiting for the second takes ten times as long
    on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass(frozen=True, slots=True)
class DummyFake(FakeSource):
    """Real blocks with random weights where the simulator has its fake ones."""

    device: FakeDevice | None = field(default=None)

    def block_bytes(self, settings: ServerConfig) -> int:
        return DummySource(self.config, "small").block_bytes(settings)

    def load_span(
        self,
        span: Span,
        settings: ServerConfig,
        on_progress: LoadProgress | None,
        loaded: SpanCompute | None = None,
    ) -> SpanCompute:
        source = DummySource(self.config, "small")
        return source.load_span(span, settings, on_progress, loaded)


@dataclass(frozen=True, slots=True)
class Text:
    """One session: a prompt, and how many tokens are wanted; perhaps given up half way."""

    prompt: tuple[int, ...]
    new_tokens: int
    begins_s: float = 0.0
    is_given_up: bool = False


def texts(seed: int, count: int = NUM_SESSIONS) -> list[Text]:
    rng = random.Random(seed)
    return [
        Text(
            tuple(rng.randrange(256) for _ in range(rng.choice((1, 3, 20, 64, 65, 150, 300)))),
            new_tokens=rng.randint(2, 10),
            begins_s=rng.uniform(0.0, 0.1),
            is_given_up=rng.random() < 0.2,
        )
        for _ in range(count)
    ]


@asynccontextmanager
async def small_swarm(settings: ServerConfig) -> AsyncIterator[tuple[SwarmModel, list[SimServer]]]:
    dtype = torch.float32 if settings.dtype == "float32" else torch.bfloat16
    weights = dummy_edges(CONFIG, dtype, torch.device("cpu"))
    edges = Edges.load(CONFIG, weights, dtype=dtype)
    source = DummyFake(CONFIG, dummy_model_id(CONFIG, "small"))
    async with SimSwarm(CONFIG.num_blocks, source=source, edges=edges) as swarm:
        servers = [await swarm.add_server(span, settings, device_s=BATCH_S) for span in SPANS]
        async with swarm.client(CLIENT) as model:
            yield model, servers
        await asyncio.sleep(1.0)
        for server in servers:
            assert_nothing_left(server)


async def answer(model: SwarmModel, text: Text) -> list[int]:
    """A greedy generation; empty if it is given up."""
    await asyncio.sleep(text.begins_s)
    generation = model.generate(text.prompt, max_new_tokens=text.new_tokens, ignore_eos=True)
    if text.is_given_up:
        async with generation:
            async for _ in generation:
                return []
    (result,) = await generation.finish()
    return list(result.token_ids)


async def num_near_ties(model: SwarmModel, text: Text, ours: list[int], alone: list[int]) -> int:
    """1 if two answers differ where they may; fails where they may not; 0 if they do not."""
    pairs = zip(ours, alone, strict=True)
    place = next((n for n, (a, b) in enumerate(pairs) if a != b), None)
    if place is None:
        return 0
    logits = (await model.forward([*text.prompt, *alone[:place]]))[-1]
    best, second = logits.topk(2).values
    assert float(best - second) < NEAR_TIE, f"token {place} of {len(text.prompt)} + {len(alone)}"
    return 1


def test_sessions_at_once_give_the_tokens_of_one_after_the_other() -> None:
    asked = texts(seed=1)

    async def main() -> None:
        async with small_swarm(SERVER) as (model, _):
            at_once = await asyncio.gather(*(answer(model, text) for text in asked))
            kept = [(text, ours) for text, ours in zip(asked, at_once, strict=True) if ours]
            ties = 0
            for text, ours in kept:
                alone = await answer(model, replace(text, begins_s=0.0))
                ties += await num_near_ties(model, text, ours, alone)
            assert len(kept) > NUM_SESSIONS // 2
            assert ties <= 2  # of 50 texts: more would be no accident

    run(main())


def test_a_session_of_8192_tokens_is_right_beside_others() -> None:
    rng = random.Random(2)
    long = Text(tuple(rng.randrange(256) for _ in range(8192 - 12)), new_tokens=12)
    others = [replace(text, is_given_up=False) for text in texts(seed=3, count=12)]

    async def main() -> None:
        async with small_swarm(SERVER) as (model, _):
            answers = await asyncio.gather(*(answer(model, text) for text in (long, *others)))
            for text, ours in zip((long, *others), answers, strict=True):
                whole = [*text.prompt, *ours]
                (hidden,) = await model.hidden_states([whole])  # another way to the same
                edges = model.compute._edges
                logits = edges.logits(hidden[len(text.prompt) - 1 : -1])
                best = logits.topk(2).values
                is_near = best[:, 0] - best[:, 1] < NEAR_TIE
                assert ((logits.argmax(-1) == torch.tensor(ours)) | is_near).all()

    run(main())


async def forced(model: SwarmModel, text: Text) -> Tensor:
    """Logits of a prompt and of further tokens, one at a time: (T, V)."""
    await asyncio.sleep(text.begins_s)
    rng = random.Random(len(text.prompt))
    async with model.session(max_tokens=len(text.prompt) + text.new_tokens) as session:
        logits = [await session.step(text.prompt)]
        for _ in range(text.new_tokens if not text.is_given_up else 1):
            logits.append(await session.step([rng.randrange(256)]))  # noqa: PERF401
        return torch.cat(logits)


def divergence(alone: Sequence[Tensor], at_once: Sequence[Tensor]) -> tuple[float, float]:
    """Mean KL in nats, and how often the most probable token is the same."""
    p, q = torch.cat(list(alone)).log_softmax(-1), torch.cat(list(at_once)).log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1)
    return float(kl.mean()), float((p.argmax(-1) == q.argmax(-1)).float().mean())


@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8", "int4"])
def test_sessions_at_once_have_the_logits_of_one_after_the_other(weights: str) -> None:
    is_quantized = weights.startswith("int")
    quantized = replace(SERVER, dtype="bfloat16", quantize=weights)
    settings = quantized if is_quantized else replace(SERVER, dtype=weights)
    asked = texts(seed=4)

    async def main() -> None:
        async with small_swarm(settings) as (model, _):
            at_once = await asyncio.gather(*(forced(model, text) for text in asked))
            alone = [await forced(model, replace(text, begins_s=0.0)) for text in asked]
        mean_kl, agreement = divergence(alone, at_once)
        assert mean_kl <= MAX_KL_NATS
        assert agreement >= MIN_AGREEMENT

    run(main())
