"""The default model through real processes: the tokens that the whole model gives in one process.

The vectors are greedy continuations by `transformers` in float32, with the end of text suppressed.
Their smallest gap between the two best logits is 0.0045, far above what other batch shapes change.
"""

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import p2pllm
import p2pllm.sync
from p2pllm.client.model import Prompt, SwarmModel

Case = dict[str, Any]
VECTORS = Path(__file__).parent.parent / "vectors" / "smollm2_135m_greedy.json"
CASES: list[Case] = json.loads(VECTORS.read_text())["cases"]
NUM_TOKENS = 48
MAX_KL_NATS = 0.01

THIRDS = ("0:10", "10:20", "20:30")
UNEVEN = ("0:17", "5:30", "12:22")  # overlapping: servers are entered and left inside their spans

pytestmark = pytest.mark.slow(240)


@pytest.fixture(scope="module")
def thirds(start: Any) -> str:
    return _swarm(start, THIRDS)


@pytest.fixture(scope="module")
def uneven(start: Any) -> str:
    return _swarm(start, UNEVEN)


def _swarm(start: Any, spans: tuple[str, ...]) -> str:
    """A bootstrap node and a server per span; returns the address to join at."""
    entry: str = start("bootstrap", "--new-swarm")["addresses"][0]
    for span in spans:
        ready = start("serve", "--blocks", span, "--dtype", "float32", "--peers", entry)
        assert ready["blocks"] == span
    return entry


def _prompt(case: Case) -> Prompt:
    return case["messages"] or case["prompt"]  # type: ignore[no-any-return]


async def _answer(model: SwarmModel, case: Case) -> tuple[int, ...]:
    generation = model.generate(_prompt(case), max_new_tokens=NUM_TOKENS, ignore_eos=True)
    (result,) = await generation.finish()
    assert list(result.prompt_token_ids) == case["prompt_ids"]
    return result.token_ids


def _run_cli(peer: str, case: Case) -> dict[str, Any]:
    messages = case["messages"]
    text = messages[-1]["content"] if messages else case["prompt"]
    command = [sys.executable, "-m", "p2pllm", "generate", text, "--peers", peer, "--json"]
    command += ["--dtype", "float32", "--wire-codec", "raw", "--temperature", "0", "--ignore-eos"]
    command += ["--max-new-tokens", str(NUM_TOKENS), "--chat" if messages else "--raw"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case["prompt"][:20]))
def test_the_command_line_gives_the_reference_tokens(thirds: str, case: Case) -> None:
    result = _run_cli(thirds, case)
    assert result["token_ids"] == case["greedy_ids"]
    assert result["prompt_token_ids"] == case["prompt_ids"]
    assert [hop["blocks"] for hop in result["route"]] == list(THIRDS)
    assert result["recoveries"] == []


def test_eight_clients_at_once_get_the_reference_tokens(thirds: str) -> None:
    async def ask(case: Case) -> tuple[int, ...]:
        async with p2pllm.connect([thirds], dtype="float32", wire_codec="raw") as swarm:
            return await _answer(await swarm.model(), case)

    async def ask_all() -> list[tuple[int, ...]]:
        return await asyncio.gather(*map(ask, CASES))

    answers = asyncio.run(ask_all())
    assert [list(answer) for answer in answers] == [case["greedy_ids"] for case in CASES]


@pytest.mark.parametrize("spans", ["thirds", "uneven"])
def test_one_batch_gives_the_reference_tokens(spans: str, request: pytest.FixtureRequest) -> None:
    peer: str = request.getfixturevalue(spans)
    with p2pllm.sync.connect([peer], dtype="float32", wire_codec="raw") as swarm:
        results = swarm.model().generate_batch(
            [_prompt(case) for case in CASES], max_new_tokens=NUM_TOKENS, ignore_eos=True
        )
    assert [list(result.token_ids) for result in results] == [case["greedy_ids"] for case in CASES]
    route = [str(hop.blocks) for hop in results[0].route]
    if spans == "uneven":
        assert not set(route) <= set(UNEVEN)  # a server is left or entered inside its span
    else:
        assert route == list(THIRDS)


def test_first_logits_agree_with_the_reference(thirds: str) -> None:
    with p2pllm.sync.connect([thirds], dtype="float32", wire_codec="raw") as swarm:
        model = swarm.model()
        for case in CASES:
            logits = model.forward(case["prompt_ids"])[-1]
            top5 = case["first_logits_top5"]
            expected = torch.tensor(top5["logits"])
            assert (logits[top5["ids"]] - expected).abs().max() <= 1e-3


def test_int8_activations_change_the_models_output_little(
    thirds: str, record_property: Any
) -> None:
    """Mean KL divergence from `raw` per reference text, three servers: at most 0.01 nats."""
    texts = [[*case["prompt_ids"], *case["greedy_ids"]] for case in CASES]
    outputs = {}
    for codec in ("raw", "int8"):
        with p2pllm.sync.connect([thirds], dtype="float32", wire_codec=codec) as swarm:
            model = swarm.model()
            outputs[codec] = [model.forward(text).log_softmax(-1) for text in texts]
    divergences = [
        float((exact.exp() * (exact - coded)).sum(-1).mean())
        for exact, coded in zip(outputs["raw"], outputs["int8"], strict=True)
    ]
    record_property("kl_nats", divergences)
    assert max(divergences) <= MAX_KL_NATS
