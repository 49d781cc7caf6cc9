from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pllm.client.prefixes import PrefixKeys, leaders, num_shareable
from p2pllm.client.state import Hop
from p2pllm.ids import ModelId, PeerId
from p2pllm.spans import Span
from p2pllm.wire.messages import MAX_PREFIX_KEYS, PREFIX_KEY_BYTES, PREFIX_TOKENS, Numerics
from p2pllm.wire.tensors import TensorCodec

SECRET = b"s" * 32
MODEL = ModelId(b"m" * 32, "model")
FLOAT = Numerics("float32")
HOPS = (Hop(PeerId(b"a" * 32), Span(0, 4), FLOAT), Hop(PeerId(b"b" * 32), Span(4, 8), FLOAT))
PROMPT = list(range(3 * PREFIX_TOKENS + 1))
KEYS = PrefixKeys(SECRET, MODEL)

Keys = list[tuple[bytes, ...]]


def keys(prompt: Sequence[int] = PROMPT, hops: Sequence[Hop] = HOPS) -> Keys:
    return KEYS.of(prompt, TensorCodec.RAW, hops)


@pytest.mark.parametrize(
    ("num_tokens", "expected"),
    [(0, 0), (1, 0), (64, 0), (65, 64), (128, 64), (129, 128), (8192, 8128), (20_000, 8192)],
)
def test_whole_pages_are_shareable_but_not_the_last_token(num_tokens: int, expected: int) -> None:
    assert num_shareable([0] * num_tokens) == expected


def test_there_is_a_key_for_every_page_at_every_hop_and_no_two_are_alike() -> None:
    made = keys()

    assert [len(of_hop) for of_hop in made] == [3, 3]
    flat = [key for of_hop in made for key in of_hop]
    assert len(set(flat)) == 6
    assert {len(key) for key in flat} == {PREFIX_KEY_BYTES}


def test_equal_prompts_have_equal_keys_whoever_serves_them() -> None:
    others = tuple(replace(hop, peer=PeerId(b"c" * 32), record=b"record") for hop in HOPS)

    assert keys(list(PROMPT), others) == keys()
    assert PrefixKeys(SECRET, MODEL).of(PROMPT, TensorCodec.RAW, HOPS) == keys()


@given(
    page=st.integers(0, 2), offset=st.integers(0, PREFIX_TOKENS - 1), token=st.integers(500, 600)
)
def test_a_token_changes_the_keys_from_its_page_on(page: int, offset: int, token: int) -> None:
    changed = list(PROMPT)
    changed[page * PREFIX_TOKENS + offset] = token

    for before, after in zip(keys(), keys(changed), strict=True):
        assert before[:page] == after[:page]
        assert not set(before[page:]) & set(after)


def test_what_follows_a_prefix_does_not_change_its_keys() -> None:
    for before, after in zip(keys(), keys([*PROMPT, *range(100)]), strict=True):
        assert after[:3] == before
        assert len(after) == 4


@pytest.mark.parametrize(
    "other",
    [
        PrefixKeys(b"t" * 32, MODEL).of(PROMPT, TensorCodec.RAW, HOPS),
        PrefixKeys(SECRET, ModelId(b"n" * 32)).of(PROMPT, TensorCodec.RAW, HOPS),
        PrefixKeys(SECRET, MODEL, b"adapter").of(PROMPT, TensorCodec.RAW, HOPS),
        KEYS.of(PROMPT, TensorCodec.INT8, HOPS),
        KEYS.of(PROMPT, TensorCodec.RAW, [replace(hop, numerics=Numerics("a")) for hop in HOPS]),
        KEYS.of(PROMPT, TensorCodec.RAW, [replace(hop, span=Span(1, 4)) for hop in HOPS]),
    ],
    ids=["secret", "model", "adapter", "codec", "numerics", "blocks"],
)
def test_whatever_the_contents_depend_on_changes_all_keys(other: Keys) -> None:
    assert not {key for of_hop in other for key in of_hop} & {
        k for of_hop in keys() for k in of_hop
    }


def test_a_hops_keys_depend_on_those_before_it_and_not_on_those_after() -> None:
    first, second = HOPS
    before = keys(hops=(replace(first, numerics=Numerics("bfloat16")), second))
    after = keys(hops=(first, replace(second, numerics=Numerics("bfloat16"))))

    assert after[0] == keys()[0]
    assert not set(before[1]) & set(keys()[1])


def test_a_long_prompt_has_as_many_keys_as_an_open_may_carry() -> None:
    made = keys(list(range(100_000)))

    assert [len(of_hop) for of_hop in made] == [MAX_PREFIX_KEYS] * 2


def test_a_short_prompt_has_no_keys() -> None:
    assert keys(PROMPT[:PREFIX_TOKENS]) == [(), ()]


# --- batches --------------------------------------------------------------------------------------


def test_of_equal_prompts_the_later_ones_wait_for_the_first() -> None:
    assert leaders([PROMPT, PROMPT, PROMPT]) == [None, (0, 192), (0, 192)]


def test_prompts_that_differ_or_are_short_wait_for_nobody() -> None:
    assert leaders([PROMPT, PROMPT[1:], [1, 2], [1, 2], PROMPT[:64]]) == [None] * 5


def test_a_prompt_waits_for_the_earlier_one_that_saves_most() -> None:
    longer = [*PROMPT[:100], *range(1000, 1300)]

    assert leaders([PROMPT, longer, longer]) == [None, None, (1, 384)]


def test_nobody_waits_for_less_than_half_of_a_prompt() -> None:
    prompt = [*PROMPT[:64], *range(1000, 1000 + 64)]

    assert leaders([PROMPT, prompt, [*prompt, 7]]) == [None, (0, 64), None]
