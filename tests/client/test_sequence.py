"""Texts that grow token by token: what may be shown, and where they end."""

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pllm.client.sequence import Finish, Sequence

EOS = 0


@dataclass
class Letters:
    """Token n is the n-th letter; the last `lag` letters are held back, as half a character is."""

    lag: int = 0
    waiting: list[str] = field(default_factory=list)

    def push(self, token: int) -> str:
        self.waiting.append(chr(ord("a") + token))
        shown = self.waiting[: len(self.waiting) - self.lag]
        del self.waiting[: len(shown)]
        return "".join(shown)

    def flush(self) -> str:
        rest, self.waiting = "".join(self.waiting), []
        return rest


def tokens_of(text: str) -> list[int]:
    return [ord(letter) - ord("a") for letter in text]


def sequence(
    *stops: str, max_new_tokens: int = 100, eos: frozenset[int] = frozenset(), lag: int = 0
) -> Sequence:
    return Sequence((1, 2, 3), max_new_tokens, Letters(lag), eos, stops)


def fed(made: Sequence, text: str) -> list[str]:
    """The pieces that are shown for each letter, until the text ends."""
    pieces = []
    for token in tokens_of(text):
        pieces.append(made.push(token))
        if made.finish is not None:
            break
    return pieces


def test_text_without_stop_strings_is_shown_at_once() -> None:
    made = sequence()
    assert fed(made, "hello") == list("hello")
    assert (made.text, made.finish) == ("hello", None)


def test_a_stop_string_is_never_shown_also_if_it_comes_in_pieces() -> None:
    made = sequence("lox")
    assert fed(made, "helloxyz") == ["h", "e", "", "l", "", ""]
    assert (made.text, made.finish) == ("hel", Finish.STOP)


def test_what_only_looked_like_a_stop_string_is_shown_later() -> None:
    made = sequence("llama")
    assert fed(made, "hellox") == ["h", "e", "", "", "llo", "x"]
    assert made.text == "hellox"


def test_the_first_of_several_stop_strings_ends_the_text() -> None:
    made = sequence("cd", "bcd", "z")
    fed(made, "abcd")
    assert (made.text, made.finish) == ("a", Finish.STOP)


def test_an_end_token_ends_the_text_and_is_not_in_it() -> None:
    made = sequence("bx", eos=frozenset({EOS}))
    pieces = fed(made, "cba")
    assert pieces == ["c", "", "b"]
    assert (made.text, made.token_ids, made.finish) == ("cb", tokens_of("cb"), Finish.EOS)


def test_the_last_token_brings_what_was_held_back() -> None:
    made = sequence("bcx", max_new_tokens=3)
    assert fed(made, "abcde") == ["a", "", "bc"]
    assert (made.finish, len(made.token_ids)) == (Finish.LENGTH, 3)


def test_what_the_detokenizer_held_back_comes_at_the_end() -> None:
    made = sequence(max_new_tokens=4, lag=2)
    assert fed(made, "abcd") == ["", "", "a", "bcd"]


def test_a_stop_string_in_what_is_flushed_still_counts() -> None:
    made = sequence("cd", max_new_tokens=4, lag=2)
    assert "".join(fed(made, "abcd")) == "ab"
    assert made.finish is Finish.STOP


@pytest.mark.parametrize("lag", [0, 1, 3])
@given(
    text=st.text("abc", min_size=1, max_size=30),
    stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
    max_new_tokens=st.integers(1, 30),
)
def test_pieces_join_to_the_text_before_the_first_stop_string(
    lag: int, text: str, stops: list[str], max_new_tokens: int
) -> None:
    made = sequence(*stops, max_new_tokens=max_new_tokens, lag=lag)

    pieces = fed(made, text)

    shown = "".join(pieces)
    assert shown == made.text
    assert not any(stop in shown for stop in stops)
    whole = text[:max_new_tokens]
    cut = min((whole.find(stop) for stop in stops if stop in whole), default=None)
    if made.finish is Finish.STOP:
        assert any(whole.startswith(stop, len(made.text)) for stop in stops)
    elif made.finish is Finish.LENGTH:
        assert cut is None
        assert shown == whole
    else:
        assert text.startswith(shown)
        assert len(text) - len(shown) <= lag + max(map(len, stops), default=1) - 1
