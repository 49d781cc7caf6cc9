import random

from hypothesis import given
from hypothesis import strategies as st

from p2pllm.dht.keys import (
    distance,
    key_of,
    random_id_sharing,
    shared_prefix_bits,
    to_id,
    to_key,
)

PLACES = st.integers(0, 2**256 - 1)


def test_a_key_depends_on_network_namespace_and_name() -> None:
    keys = {
        key_of("main", "presence", "a"),
        key_of("test", "presence", "a"),
        key_of("main", "peer", "a"),
        key_of("main", "presence", "b"),
    }

    assert len(keys) == 4
    assert all(len(key) == 32 for key in keys)


def test_moving_letters_from_the_namespace_to_the_name_changes_the_key() -> None:
    assert key_of("main", "ab", "c") != key_of("main", "a", "bc")


def test_a_name_may_be_text_or_its_bytes() -> None:
    assert key_of("main", "peer", "ä") == key_of("main", "peer", "ä".encode())


@given(PLACES, PLACES, PLACES)
def test_distance_is_a_metric(a: int, b: int, c: int) -> None:
    assert distance(a, a) == 0
    assert distance(a, b) == distance(b, a)
    assert distance(a, c) <= distance(a, b) + distance(b, c)


@given(PLACES)
def test_a_place_survives_its_way_through_a_message(place: int) -> None:
    assert to_id(to_key(place)) == place


@given(PLACES, st.integers(0, 255), st.integers())
def test_a_random_id_shares_exactly_the_prefix_asked_for(place: int, bits: int, seed: int) -> None:
    assert shared_prefix_bits(place, random_id_sharing(place, bits, random.Random(seed))) == bits
