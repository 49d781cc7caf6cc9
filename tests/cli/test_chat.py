"""A conversation's session: kept, outgrown, dropped, and its messages forgotten when too many."""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import pytest

from p2pllm.cli.chat import FIRST_SESSION_TOKENS, Conversation
from p2pllm.cli.options import SamplingOptions
from p2pllm.client.model import SwarmModel
from p2pllm.errors import SessionUnknown

SAMPLING = SamplingOptions(max_new_tokens=100, temperature=0.0, top_k=0, top_p=1.0, seed=None)


@dataclass
class FakeSession:
    """A session of a size."""

    max_tokens: int
    is_open: bool = True


@dataclass
class FakeModel:
    """Answers "yes"; a character is a token. `lost` sessions fail when they are used."""

    max_position: int = 100_000
    sessions: list[FakeSession] = field(default_factory=list)
    prompts: list[list[str]] = field(default_factory=list)
    lost: list[FakeSession] = field(default_factory=list)

    @property
    def config(self) -> Any:
        return SimpleNamespace(max_position=self.max_position)

    @property
    def tracker(self) -> Any:
        return SimpleNamespace(view=lambda: SimpleNamespace(servers=()))

    def encode(self, messages: Sequence[Mapping[str, str]]) -> tuple[int, ...]:
        return tuple(0 for message in messages for _ in message["content"])

    @asynccontextmanager
    async def session(self, *, max_tokens: int) -> AsyncIterator[FakeSession]:
        session = FakeSession(max_tokens)
        self.sessions.append(session)
        yield session
        session.is_open = False

    def generate(
        self, messages: Sequence[Mapping[str, str]], *, session: FakeSession, **_: object
    ) -> "FakeGeneration":
        self.prompts.append([message["content"] for message in messages])
        return FakeGeneration(is_lost=session in self.lost)


@dataclass
class FakeGeneration:
    """One piece of text."""

    is_lost: bool

    async def __aenter__(self) -> "FakeGeneration":
        return self

    async def __aexit__(self, *_: object) -> None:
        return None

    async def __aiter__(self) -> AsyncIterator[str]:
        if self.is_lost:
            raise SessionUnknown("gone")
        yield "yes"

    def results(self) -> list[Any]:
        return [SimpleNamespace(text="" if self.is_lost else "yes")]


@pytest.fixture
def model() -> FakeModel:
    return FakeModel()


def talk(model: FakeModel, *texts: str) -> Conversation:
    async def say_all() -> Conversation:
        conversation = Conversation(SAMPLING)
        conversation._model = cast(SwarmModel, model)
        for text in texts:
            await conversation.say(text)
        return conversation

    return asyncio.run(say_all())


def test_turns_share_one_session_and_see_what_was_said(model: FakeModel) -> None:
    talk(model, "one", "two")
    assert model.prompts == [["one"], ["one", "yes", "two"]]
    assert model.sessions == [FakeSession(FIRST_SESSION_TOKENS)]


def test_a_session_that_is_outgrown_is_replaced_by_a_larger_one(
    model: FakeModel, capsys: pytest.CaptureFixture[str]
) -> None:
    talk(model, "one", "x" * FIRST_SESSION_TOKENS)
    small, large = model.sessions
    assert not small.is_open
    assert large.max_tokens > 2 * small.max_tokens
    assert "moving to a larger one" in capsys.readouterr().err


def test_the_oldest_turns_are_forgotten_when_no_session_is_large_enough(
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = FakeModel(max_position=300)
    talk(model, "a" * 150, "b" * 150)
    assert model.prompts[-1] == ["b" * 150]
    assert "forgotten" in capsys.readouterr().err


def test_a_question_that_fails_is_as_if_it_had_not_been_asked(model: FakeModel) -> None:
    async def fail() -> Conversation:
        conversation = Conversation(SAMPLING)
        conversation._model = cast(SwarmModel, model)
        lost = FakeSession(FIRST_SESSION_TOKENS)
        model.lost = [lost]
        with pytest.raises(SessionUnknown):
            await conversation.say("one")
        return conversation

    assert asyncio.run(fail()).messages == []


def test_a_later_question_that_fails_is_forgotten_too(model: FakeModel) -> None:
    async def fail() -> Conversation:
        conversation = Conversation(SAMPLING)
        conversation._model = cast(SwarmModel, model)
        await conversation.say("one")
        model.lost = [model.sessions[0]]
        with pytest.raises(SessionUnknown):
            await conversation.say("two")
        return conversation

    messages = asyncio.run(fail()).messages
    assert [message["content"] for message in messages if message["role"] == "user"] == ["one"]


def test_reset_frees_the_session(model: FakeModel) -> None:
    async def reset() -> Conversation:
        conversation = Conversation(SAMPLING)
        conversation._model = cast(SwarmModel, model)
        await conversation.say("one")
        await conversation.reset()
        return conversation

    assert asyncio.run(reset()).messages == []
    assert not model.sessions[0].is_open
