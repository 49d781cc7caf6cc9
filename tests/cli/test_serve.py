"""What `p2pllm serve` makes of its options, and what it says about memory."""

import asyncio
from typing import Any

import pytest

from p2pllm.cli import serve
from p2pllm.cli.runner import GentleStop
from p2pllm.cli.serve import _memory_line
from p2pllm.cli.terminal import binary_size
from p2pllm.config import NodeConfig
from p2pllm.server.capacity import BlockCost, Capacity
from tests.cli.conftest import Terminal


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The configuration, the wishes and the stop of each `p2pllm serve`."""
    seen: list[Any] = []

    async def note(
        config: NodeConfig, identity: object, wanted: object, network: object, *rest: object
    ) -> None:
        seen.append((config, wanted, rest[-1]))

    monkeypatch.setattr(serve, "_serve", note)
    return seen


def test_room_is_kept_for_eight_sessions_unless_said_otherwise(
    terminal: Terminal, served: list[Any]
) -> None:
    for options in (
        [],
        ["--cache-sessions", "4", "--session-tokens", "1024"],
        ["--cache-sessions", "4", "--cache-tokens", "640"],
    ):
        assert terminal.type("serve", "--new-swarm", *options).exit_code == 0
    assert [config.server.cache_tokens for config, _, _ in served] == [8 * 2048, 4 * 1024, 640]


def test_weights_are_held_as_they_are_unless_said_otherwise(
    terminal: Terminal, served: list[Any]
) -> None:
    terminal.type("serve", "--new-swarm")
    terminal.type("serve", "--new-swarm", "--quantize", "int4", "--dtype", "bfloat16")
    assert [config.server.quantize for config, _, _ in served] == ["none", "int4"]


def test_a_server_balances_and_drains_unless_told_not_to(
    terminal: Terminal, served: list[Any]
) -> None:
    terminal.type("serve", "--new-swarm")
    terminal.type("serve", "--new-swarm", "--no-balance", "--drain-timeout", "5")
    assert [config.server.is_balanced for config, _, _ in served] == [True, False]
    assert [stop.within_s for _, _, stop in served] == [30.0, 5.0]


def test_the_memory_line_says_what_was_decided_and_why() -> None:
    capacity = Capacity(30, BlockCost(170 * 2**20, 27 * 2**20), 8 * 2**30)
    assert _memory_line(capacity, 16_384, 2048) == (
        "30 blocks: 5.0 GiB weights + 810 MiB cache for 8 sessions of 2048 tokens, of 8.0 GiB"
    )


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (2**20, "1.0 MiB"),
        (203.4 * 2**20, "203 MiB"),
        (1000 * 2**20, "1.0 GiB"),
        (2**40, "1024 GiB"),
    ],
)
def test_sizes_are_for_people(num_bytes: float, text: str) -> None:
    assert binary_size(num_bytes) == text


def test_a_stop_is_gentle_once_and_only_for_who_waits() -> None:
    async def scenario() -> None:
        stop = GentleStop(30.0)
        assert not stop.ask()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(stop.wait())
            await asyncio.sleep(0)
            assert stop.ask()
        assert not stop.ask()

    asyncio.run(scenario())
