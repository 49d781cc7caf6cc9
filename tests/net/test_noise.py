import json
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pllm.errors import LocalProtocolError, RemoteProtocolError
from p2pllm.net.noise import MAX_NONCE, TAG_BYTES, Cipher, CipherState, NoiseHandshake, Role

VECTORS = Path(__file__).parent.parent / "vectors" / "noise_xx.json"
CIPHERS = pytest.mark.parametrize("cipher", list(Cipher))


def load_vectors() -> list[dict[str, Any]]:
    vectors: list[dict[str, Any]] = json.loads(VECTORS.read_text())["vectors"]
    return vectors


def key(seed: int) -> X25519PrivateKey:
    return X25519PrivateKey.from_private_bytes(bytes([seed]) * 32)


def new_pair(
    cipher: Cipher = Cipher.AESGCM, *, rekey_after: int = 2**30
) -> tuple[NoiseHandshake, NoiseHandshake]:
    return (
        NoiseHandshake(Role.INITIATOR, key(1), b"p", cipher, key(2), rekey_after=rekey_after),
        NoiseHandshake(Role.RESPONDER, key(3), b"p", cipher, key(4), rekey_after=rekey_after),
    )


def complete(initiator: NoiseHandshake, responder: NoiseHandshake) -> None:
    responder.read_message(initiator.write_message())
    initiator.read_message(responder.write_message())
    responder.read_message(initiator.write_message())


@pytest.mark.parametrize("vector", load_vectors(), ids=lambda vector: str(vector["name"]))
def test_the_published_vectors_come_out_byte_for_byte(vector: dict[str, Any]) -> None:
    def side(role: Role, name: str) -> NoiseHandshake:
        secret = {
            part: X25519PrivateKey.from_private_bytes(bytes.fromhex(vector[f"{name}_{part}"]))
            for part in ("static", "ephemeral")
        }
        prologue = bytes.fromhex(vector[f"{name}_prologue"])
        cipher = next(c for c in Cipher if c.protocol_name.decode() == vector["name"])
        return NoiseHandshake(role, secret["static"], prologue, cipher, secret["ephemeral"])

    initiator, responder = side(Role.INITIATOR, "init"), side(Role.RESPONDER, "resp")
    messages = [
        (bytes.fromhex(message["payload"]), bytes.fromhex(message["ciphertext"]))
        for message in vector["messages"]
    ]
    writer, reader = initiator, responder
    for payload, ciphertext in messages[:3]:
        assert writer.write_message(payload) == ciphertext
        assert reader.read_message(ciphertext) == payload
        writer, reader = reader, writer

    assert initiator.handshake_hash == responder.handshake_hash
    ciphers = {Role.INITIATOR: initiator.split(), Role.RESPONDER: responder.split()}
    for payload, ciphertext in messages[3:]:  # they go on in turn: the responder is next
        assert ciphers[writer.role][0].encrypt(payload) == ciphertext
        assert ciphers[reader.role][1].decrypt(ciphertext) == payload
        writer, reader = reader, writer


@CIPHERS
def test_each_side_learns_the_others_static_key(cipher: Cipher) -> None:
    initiator, responder = new_pair(cipher)

    complete(initiator, responder)

    assert initiator.is_complete
    assert responder.is_complete
    assert initiator.remote_static == key(3).public_key().public_bytes_raw()
    assert responder.remote_static == key(1).public_key().public_bytes_raw()


def test_messages_out_of_turn_are_our_own_mistake() -> None:
    initiator, responder = new_pair()

    with pytest.raises(LocalProtocolError):
        responder.write_message()
    with pytest.raises(LocalProtocolError):
        initiator.read_message(b"")
    with pytest.raises(LocalProtocolError):
        initiator.split()


def test_unequal_prologues_fail_at_the_first_encrypted_message() -> None:
    initiator = NoiseHandshake(Role.INITIATOR, key(1), b"one")
    responder = NoiseHandshake(Role.RESPONDER, key(3), b"another")
    responder.read_message(initiator.write_message())

    with pytest.raises(RemoteProtocolError):
        initiator.read_message(responder.write_message())


def test_unequal_ciphers_fail_at_the_first_encrypted_message() -> None:
    initiator = NoiseHandshake(Role.INITIATOR, key(1), b"p", Cipher.AESGCM)
    responder = NoiseHandshake(Role.RESPONDER, key(3), b"p", Cipher.CHACHAPOLY)
    responder.read_message(initiator.write_message())

    with pytest.raises(RemoteProtocolError):
        initiator.read_message(responder.write_message())


@pytest.mark.parametrize("point", [bytes(32), b"\x01" + bytes(31)], ids=["zero", "one"])
def test_a_point_of_small_order_is_refused(point: bytes) -> None:
    _, responder = new_pair()
    responder.read_message(point)

    with pytest.raises(RemoteProtocolError, match="X25519"):
        responder.write_message()


def test_a_static_key_of_small_order_is_refused() -> None:
    initiator = NoiseHandshake(Role.INITIATOR, key(1), b"p")
    responder = NoiseHandshake(Role.RESPONDER, ZeroKey.as_private(), b"p")
    responder.read_message(initiator.write_message())

    with pytest.raises(RemoteProtocolError, match="X25519"):
        initiator.read_message(responder.write_message())


class ZeroKey:
    """A static "key" whose public half is the zero point; its own side pretends to a secret."""

    @staticmethod
    def as_private() -> X25519PrivateKey:
        return ZeroKey()  # type: ignore[return-value]

    def public_key(self) -> "ZeroKey":
        return self

    def public_bytes_raw(self) -> bytes:
        return bytes(32)

    def exchange(self, public: object) -> bytes:
        return bytes(32)


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 2))
def test_garbage_ends_in_a_remote_error_and_nothing_else(garbage: bytes, turn: int) -> None:
    initiator, responder = new_pair()
    sides = [(initiator, responder), (responder, initiator), (initiator, responder)]
    for writer, reader in sides[:turn]:
        reader.read_message(writer.write_message())
    _, victim = sides[turn]

    try:
        victim.read_message(garbage)
    except RemoteProtocolError:
        return
    assert turn == 0  # only the first message is open to anyone
    assert len(garbage) >= 32


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 95), st.integers(1, 255))
def test_any_changed_byte_of_an_encrypted_message_is_noticed(at: int, change: int) -> None:
    initiator, responder = new_pair()
    responder.read_message(initiator.write_message())
    message = bytearray(responder.write_message(b"hello"))
    message[at] ^= change
    if at == 31 and change == 0x80:
        return  # RFC 7748 §5: the top bit of a point is masked; the transcript catches it below

    with pytest.raises(RemoteProtocolError):
        initiator.read_message(message)


def test_a_handshake_message_past_the_limit_is_refused() -> None:
    initiator, responder = new_pair()

    with pytest.raises(RemoteProtocolError):
        responder.read_message(bytes(65_536))
    with pytest.raises(LocalProtocolError):
        initiator.write_message(bytes(65_536))


# --- the transport phase -----------------------------------------------------------------------


def cipher_pair(cipher: Cipher, *, rekey_after: int = 2**30) -> tuple[CipherState, CipherState]:
    secret = bytes(range(32))
    return (
        CipherState(cipher, secret, rekey_after=rekey_after),
        CipherState(cipher, secret, rekey_after=rekey_after),
    )


@CIPHERS
def test_both_directions_have_their_own_key(cipher: Cipher) -> None:
    initiator, responder = new_pair(cipher)
    complete(initiator, responder)
    there, back = initiator.split()

    assert there.encrypt(b"same") != back.encrypt(b"same")


@CIPHERS
def test_in_place_forms_agree_with_the_plain_ones(cipher: Cipher) -> None:
    sender, receiver = cipher_pair(cipher)
    other_sender, _ = cipher_pair(cipher)
    plaintext = bytes(range(256)) * 64
    sealed = bytearray(len(plaintext) + TAG_BYTES)
    opened = bytearray(len(plaintext))

    sender.encrypt_into(plaintext, memoryview(sealed), b"ad")
    receiver.decrypt_into(sealed, memoryview(opened), b"ad")

    assert sealed == other_sender.encrypt(plaintext, b"ad")
    assert opened == plaintext


@CIPHERS
def test_a_replayed_dropped_or_changed_message_does_not_decrypt(cipher: Cipher) -> None:
    sender, receiver = cipher_pair(cipher)
    first, second = sender.encrypt(b"first"), sender.encrypt(b"second")
    assert receiver.decrypt(first) == b"first"

    with pytest.raises(RemoteProtocolError):
        receiver.decrypt(first)
    _, receiver = cipher_pair(cipher)
    with pytest.raises(RemoteProtocolError):
        receiver.decrypt(second)
    _, receiver = cipher_pair(cipher)
    with pytest.raises(RemoteProtocolError):
        receiver.decrypt(first, b"other associated data")


@CIPHERS
@pytest.mark.parametrize("num_bytes", [0, 1, 15])
def test_a_message_shorter_than_its_tag_is_refused(cipher: Cipher, num_bytes: int) -> None:
    _, receiver = cipher_pair(cipher)

    with pytest.raises(RemoteProtocolError, match="tag"):
        receiver.decrypt(bytes(num_bytes))
    with pytest.raises(RemoteProtocolError, match="tag"):
        receiver.decrypt_into(bytes(num_bytes), memoryview(bytearray()))


@CIPHERS
def test_both_sides_rekey_at_the_same_message(cipher: Cipher) -> None:
    sender, receiver = cipher_pair(cipher, rekey_after=3)
    never, _ = cipher_pair(cipher)

    sealed = [sender.encrypt(bytes([i])) for i in range(8)]

    assert [receiver.decrypt(message) for message in sealed] == [bytes([i]) for i in range(8)]
    without = [never.encrypt(bytes([i])) for i in range(8)]
    assert [a == b for a, b in zip(sealed, without, strict=True)] == [True] * 3 + [False] * 5


@CIPHERS
def test_a_rekey_is_the_one_of_the_specification(cipher: Cipher) -> None:
    secret = bytes(range(32))
    state = CipherState(cipher, secret)

    state.rekey()

    new = cipher.aead(secret).encrypt(cipher.nonce(2**64 - 1), bytes(32), b"")[:32]
    assert state.encrypt(b"x") == cipher.aead(new).encrypt(cipher.nonce(0), b"x", b"")


@CIPHERS
def test_a_rekey_of_the_handshake_reaches_both_directions(cipher: Cipher) -> None:
    initiator, responder = new_pair(cipher, rekey_after=2)
    complete(initiator, responder)
    (i_send, i_receive), (r_send, r_receive) = initiator.split(), responder.split()

    for number in range(5):
        assert r_receive.decrypt(i_send.encrypt(bytes([number]))) == bytes([number])
        assert i_receive.decrypt(r_send.encrypt(bytes([number]))) == bytes([number])


def test_a_counter_near_its_end_is_refused_on_both_sides() -> None:
    sender, receiver = cipher_pair(Cipher.AESGCM)
    sender.counter = receiver.counter = MAX_NONCE

    with pytest.raises(LocalProtocolError):
        sender.encrypt(b"")
    with pytest.raises(LocalProtocolError):
        sender.encrypt_into(b"", memoryview(bytearray(16)))
    with pytest.raises(RemoteProtocolError):
        receiver.decrypt(bytes(16))
