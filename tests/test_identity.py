import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pllm.errors import BadSignature, ConfigError
from p2pllm.identity import SIGNATURE_BYTES, Identity, verify
from p2pllm.ids import PeerId

ALICE, BOB = Identity.from_seed(b"a" * 32), Identity.from_seed(b"b" * 32)


def test_the_peer_id_is_the_public_key_of_the_seed() -> None:
    seed = bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60")

    identity = Identity.from_seed(seed)

    assert identity.peer_id.key.hex() == (  # RFC 8032 §7.1, test 1
        "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"
    )


@settings(max_examples=30)
@given(st.binary(max_size=255), st.binary(max_size=200))
def test_what_a_peer_signs_verifies(domain: bytes, message: bytes) -> None:
    signature = ALICE.sign(domain, message)

    assert len(signature) == SIGNATURE_BYTES
    verify(ALICE.peer_id, domain, message, signature)


@settings(max_examples=30)
@given(st.integers(0, 63), st.integers(1, 255))
def test_a_signature_with_a_changed_byte_does_not_hold(at: int, flip: int) -> None:
    signature = bytearray(ALICE.sign(b"domain", b"message"))
    signature[at] ^= flip

    with pytest.raises(BadSignature):
        verify(ALICE.peer_id, b"domain", b"message", bytes(signature))


def test_a_signature_holds_for_one_peer_one_domain_and_one_message() -> None:
    signature = ALICE.sign(b"domain", b"message")

    for peer, domain, message in [
        (BOB, b"domain", b"message"),
        (ALICE, b"another", b"message"),
        (ALICE, b"domain", b"messages"),
        (ALICE, b"domainm", b"essage"),  # the border between the two is signed as well
    ]:
        with pytest.raises(BadSignature):
            verify(peer.peer_id, domain, message, signature)


@settings(max_examples=30)
@given(st.binary(min_size=32, max_size=32), st.binary(max_size=70))
def test_any_key_and_signature_are_judged_without_another_error(
    key: bytes, signature: bytes
) -> None:
    with pytest.raises(BadSignature):
        verify(PeerId(key), b"domain", b"message", signature)


def test_an_identity_is_made_once_and_then_read(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "identity"

    made = Identity.load_or_create(path)

    assert Identity.load_or_create(path) == made
    assert made != Identity.load_or_create(tmp_path / "other")


def test_only_its_owner_may_read_the_seed(tmp_path: Path) -> None:
    path = tmp_path / "identity"

    Identity.load_or_create(path)

    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [path]


def test_processes_that_start_at_once_become_one_peer(tmp_path: Path) -> None:
    path = tmp_path / "identity"

    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: Identity.load_or_create(path), range(64)))

    assert len({identity.peer_id for identity in made}) == 1


@pytest.mark.parametrize("content", [b"", b"zz", b"00" * 31, b"00" * 33, b"\xff\xfe"])
def test_a_file_that_is_not_a_seed_is_a_config_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "identity"
    path.write_bytes(content)

    with pytest.raises(ConfigError, match="identity"):
        Identity.load_or_create(path)
    assert path.read_bytes() == content


def test_a_place_that_cannot_hold_a_file_is_a_config_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")

    for path in (tmp_path, tmp_path / "file" / "identity", tmp_path / "dangling"):
        with pytest.raises(ConfigError):
            Identity.load_or_create(path)


def test_the_private_key_is_not_shown() -> None:
    assert "Key" not in repr(ALICE)
    assert (b"a" * 32).hex() not in repr(ALICE)
