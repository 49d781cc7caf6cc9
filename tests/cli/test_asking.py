"""What a user is told who asks for a model that this swarm does not serve."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from p2pllm.cli.asking import _check_is_served
from p2pllm.errors import ConfigError
from p2pllm.ids import ModelId, PeerId
from p2pllm.swarm.announcements import ModelListing

WANTED, OTHER = ModelId(b"w" * 32, "wanted"), ModelId(b"o" * 32, "other")


def check(servers: tuple[object, ...], listed: list[ModelId]) -> None:
    async def models() -> list[ModelListing]:
        return [ModelListing(PeerId(b"p" * 32), model, 2) for model in listed]

    swarm: Any = SimpleNamespace(models=models)
    tracker = SimpleNamespace(view=lambda: SimpleNamespace(servers=servers))
    model: Any = SimpleNamespace(tracker=tracker, model_id=WANTED)
    asyncio.run(_check_is_served(swarm, model))


def test_the_models_that_are_there_are_named() -> None:
    with pytest.raises(ConfigError, match=r"serves other@6f6f6f6f: name one with --model"):
        check((), [OTHER, OTHER])


def test_a_model_with_some_servers_may_become_whole() -> None:
    check(("a server",), [OTHER])


def test_in_an_empty_swarm_servers_may_still_come() -> None:
    check((), [])
