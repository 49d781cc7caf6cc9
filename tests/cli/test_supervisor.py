"""What each device's server gets of what was asked for, and when one is started again."""

from dataclasses import replace
from pathlib import Path

import pytest

from p2pllm.cli.options import NodeOptions
from p2pllm.cli.supervisor import RESTART_DELAYS_S, STEADY_S, RestartPolicy, Share, share_out
from p2pllm.config import ShaperConfig
from p2pllm.errors import ConfigError
from p2pllm.spans import Span

NETWORK = NodeOptions(
    swarm="main",
    peers=(),
    new_swarm=True,
    listen=("0.0.0.0", 31337),
    announce=(),
    identity=None,
    ready_file=None,
    shape=ShaperConfig(),
)
GPUS = ("cuda:0", "cuda:1", "cuda:2")


def shares(
    devices: tuple[str, ...] = GPUS,
    network: NodeOptions = NETWORK,
    *,
    blocks: Span | None = None,
    num_blocks: int = 0,
    memory_bytes: int = 0,
) -> list[Share]:
    return share_out(
        devices, network, blocks=blocks, num_blocks=num_blocks, memory_bytes=memory_bytes
    )


def test_blocks_are_shared_out_in_the_order_of_the_devices() -> None:
    assert [share.blocks for share in shares(blocks=Span(10, 21))] == [
        Span(10, 14),
        Span(14, 18),
        Span(18, 21),
    ]


def test_numbers_of_blocks_and_memory_are_shared_out() -> None:
    shared = shares(num_blocks=10, memory_bytes=3 * 2**30)

    assert [share.num_blocks for share in shared] == [4, 3, 3]
    assert [share.memory_bytes for share in shared] == [2**30] * 3


def test_each_takes_what_fits_where_nothing_is_said() -> None:
    assert [(s.blocks, s.num_blocks, s.memory_bytes) for s in shares()] == [(None, 0, 0)] * 3


def test_ports_count_up_and_any_free_port_stays_any() -> None:
    anywhere = replace(NETWORK, listen=("0.0.0.0", 0))

    assert [share.port for share in shares()] == [31337, 31338, 31339]
    assert [share.port for share in shares(network=anywhere)] == [0, 0, 0]


def test_keys_are_files_beside_the_one_that_was_named() -> None:
    network = replace(NETWORK, identity=Path("keys/me.key"))

    names = [str(share.identity) for share in shares(network=network)]

    assert names == ["keys/me-0.key", "keys/me-1.key", "keys/me-2.key"]
    assert shares()[0].identity is None


def test_a_device_that_is_named_twice_has_two_labels() -> None:
    labels = [share.label for share in shares(("cpu", "cuda:0", "cpu"), blocks=Span(0, 3))]

    assert labels == ["cpu#1", "cuda:0", "cpu#2"]


def test_more_devices_than_blocks_are_refused() -> None:
    with pytest.raises(ConfigError, match="3 devices are named for 2 blocks"):
        shares(num_blocks=2)


def test_two_servers_on_one_device_must_not_both_take_all_of_it() -> None:
    with pytest.raises(ConfigError, match="say how many blocks"):
        shares(("cpu", "cpu"))
    assert len(shares(("cpu", "cpu"), memory_bytes=2**30)) == 2


def test_ports_must_not_end_too_soon() -> None:
    with pytest.raises(ConfigError, match="choose a lower one"):
        shares(network=replace(NETWORK, listen=("0.0.0.0", 65_534)))


def test_a_server_that_dies_again_and_again_is_given_up() -> None:
    policy = RestartPolicy()

    delays = [policy.on_death(1.0) for _ in range(len(RESTART_DELAYS_S) + 1)]

    assert delays == [*RESTART_DELAYS_S, None]


def test_a_server_that_served_for_long_has_all_restarts_again() -> None:
    policy = RestartPolicy()
    for _ in RESTART_DELAYS_S:
        policy.on_death(1.0)

    assert policy.on_death(STEADY_S) == RESTART_DELAYS_S[0]
