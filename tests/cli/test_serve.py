"""What `p2pllm serve` makes of its options, and what it says about memory."""

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from p2pllm.cli import serve, supervisor
from p2pllm.cli.runner import GentleStop
from p2pllm.cli.serve import _memory_line
from p2pllm.cli.supervisor import Share
from p2pllm.cli.terminal import binary_size
from p2pllm.config import NodeConfig
from p2pllm.server.capacity import BlockCost, Capacity
from p2pllm.spans import Span
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


def test_keys_and_values_are_held_in_the_compute_type_unless_said_otherwise(
    terminal: Terminal, served: list[Any]
) -> None:
    terminal.type("serve", "--new-swarm")
    terminal.type("serve", "--new-swarm", "--kv-bits", "8")
    assert [config.server.kv_bits for config, _, _ in served] == [16, 8]
    assert terminal.type("serve", "--new-swarm", "--kv-bits", "4").exit_code == 2


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


class Supervised:
    """The last `p2pllm serve --per-device`."""

    shares: Sequence[Share]
    given: Sequence[str]


@pytest.fixture
def supervised(monkeypatch: pytest.MonkeyPatch) -> Supervised:
    seen = Supervised()

    class Noting:
        def __init__(self, shares: Sequence[Share], given: Sequence[str], *_: object) -> None:
            seen.shares, seen.given = shares, given

        async def run(self) -> None:
            """There are no processes."""

    monkeypatch.setattr(supervisor, "Supervisor", Noting)
    return seen


def test_per_device_starts_the_same_command_for_every_device(
    terminal: Terminal, supervised: Supervised
) -> None:
    typed = ["--new-swarm", "--per-device", "--device", "cuda:0, cuda:1", "--blocks", "0:30"]

    assert terminal.type("serve", *typed).exit_code == 0

    assert [share.device for share in supervised.shares] == ["cuda:0", "cuda:1"]
    assert [share.blocks for share in supervised.shares] == [Span(0, 15), Span(15, 30)]
    assert list(supervised.given) == typed


def test_several_devices_are_one_server_unless_said_otherwise(
    terminal: Terminal, served: list[Any]
) -> None:
    terminal.type("serve", "--new-swarm", "--device", "cuda:0,cuda:1")
    ((config, _, _),) = served
    assert config.server.device == "cuda:0,cuda:1"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--device", "cpu,cpu", "--blocks", "3:4"], "2 devices are named for 1 blocks"),
        (["--device", "cpu,,cpu"], "not a list of devices"),
        (["--device", "cpu,cpu"], "a device is named twice"),
        (["--announce", "203.0.113.7:31337"], "--announce is one address"),
    ],
)
def test_what_cannot_be_done_per_device_is_told(
    terminal: Terminal, supervised: Supervised, options: list[str], said: str
) -> None:
    result = terminal.type("serve", "--new-swarm", "--per-device", *options)
    assert result.exit_code in (1, 2)
    assert said in result.output


def test_a_device_that_is_not_there_is_told_before_anything_is_fetched(terminal: Terminal) -> None:
    result = terminal.type("serve", "--new-swarm", "--device", "cpu,cuda:99", "--model", "nowhere")
    assert result.exit_code == 1
    assert "no device 'cuda:99' here" in result.output


def test_a_new_swarm_of_the_file_can_be_declined(terminal: Terminal, served: list[Any]) -> None:
    options = ["--no-new-swarm", "--peers", "127.0.0.1:4"]
    assert terminal.type("serve", *options, env={"P2PLLM_NEW_SWARM": "1"}).exit_code == 0
    assert len(served) == 1
