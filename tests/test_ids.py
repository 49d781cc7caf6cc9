import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pllm.errors import ConfigError
from p2pllm.ids import ModelId, PeerId, SessionId

KEYS = st.binary(min_size=32, max_size=32)


@given(KEYS)
def test_a_peer_id_reads_what_it_writes(key: bytes) -> None:
    peer_id = PeerId(key)

    assert PeerId.parse(str(peer_id)) == peer_id
    assert PeerId.parse(str(peer_id).upper()) == peer_id


@given(KEYS)
def test_a_peer_id_is_shown_in_lower_case_base32_without_padding(key: bytes) -> None:
    text = str(PeerId(key))

    assert len(text) == 52
    assert set(text) <= set("abcdefghijklmnopqrstuvwxyz234567")


@given(st.text(min_size=52, max_size=52) | st.text(max_size=60))
def test_any_text_is_a_peer_id_or_a_config_error(text: str) -> None:
    try:
        peer_id = PeerId.parse(text)
    except ConfigError:
        return
    assert str(peer_id) == text.lower()


@pytest.mark.parametrize("char", ["é", "ß", "ı", "=", "1", " ", "\0"])
def test_characters_that_are_not_base32_are_a_config_error(char: str) -> None:
    with pytest.raises(ConfigError):
        PeerId.parse(char * 52)


def test_a_peer_has_one_text_only() -> None:
    text = str(PeerId(bytes(32)))  # the last character carries one bit of the key, and 4 of none

    with pytest.raises(ConfigError):
        PeerId.parse(text[:-1] + "b")


@pytest.mark.parametrize("size", [0, 31, 33])
def test_ids_of_another_length_are_refused(size: int) -> None:
    with pytest.raises(ConfigError):
        PeerId(bytes(size))
    with pytest.raises(ConfigError):
        ModelId(bytes(size))
    with pytest.raises(ConfigError):
        SessionId(bytes(size))


@given(KEYS, KEYS)
def test_peer_ids_are_ordered_as_their_bytes(one: bytes, other: bytes) -> None:
    assert (PeerId(one) < PeerId(other)) == (one < other)


def test_the_dht_id_is_the_sha256_of_the_key() -> None:
    peer_id = PeerId(b"k" * 32)

    assert peer_id.dht_id.to_bytes(32, "big") == hashlib.sha256(b"k" * 32).digest()


def test_a_peer_id_is_short_in_a_log() -> None:
    peer_id = PeerId(b"k" * 32)

    assert peer_id.short == str(peer_id)[:8]
    assert peer_id.short in repr(peer_id)
    assert str(peer_id) not in repr(peer_id)


def test_only_the_digest_tells_models_apart() -> None:
    model = ModelId(b"d" * 32, "a name")

    assert model == ModelId(b"d" * 32, "another")
    assert hash(model) == hash(ModelId(b"d" * 32, "another"))
    assert model != ModelId(b"e" * 32, "a name")
    assert model != b"d" * 32


def test_a_model_is_shown_as_its_name_and_eight_digits() -> None:
    assert str(ModelId(b"\xab" * 32, "smollm2")) == "smollm2@abababab"
