from collections.abc import Callable
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pllm import identity
from p2pllm.errors import (
    BadSignature,
    CodecError,
    LocalProtocolError,
    Refused,
    RemoteProtocolError,
)
from p2pllm.identity import Identity
from p2pllm.ids import PeerId
from p2pllm.net.handshake import (
    MAX_HELLO_BYTES,
    SIGNATURE_DOMAIN,
    Handshake,
    Hello,
    PeerHello,
    StaticKeys,
    prologue,
)
from p2pllm.net.noise import Cipher, NoiseHandshake, Role
from p2pllm.wire.codec import pack

ALICE = StaticKeys.generate(Identity.from_seed(bytes([1]) * 32))
BOB = StaticKeys.generate(Identity.from_seed(bytes([2]) * 32))
EVE = StaticKeys.generate(Identity.from_seed(bytes([3]) * 32))


def dialling(
    *,
    expected: PeerId | None = None,
    hello: Hello = Hello(),  # noqa: B008
    network_id: str = "main",
    cipher: Cipher = Cipher.AESGCM,
) -> Handshake:
    return Handshake(
        Role.INITIATOR, ALICE, network_id=network_id, hello=hello, expected=expected, cipher=cipher
    )


def answering(
    *,
    keys: StaticKeys = BOB,
    hello: Hello = Hello(),  # noqa: B008
    network_id: str = "main",
    verify: Callable[[PeerId, bytes, bytes, bytes], None] = identity.verify,
) -> Handshake:
    return Handshake(Role.RESPONDER, keys, network_id=network_id, hello=hello, verify=verify)


def roundtrip(first: Handshake, second: Handshake) -> None:
    """Hand bytes over until both have nothing more to say."""
    while True:
        there = first.bytes_to_send()
        if there:
            second.receive(there)
        back = second.bytes_to_send()
        if back:
            first.receive(back)
        if not (there or back):
            return


def result_of(handshake: Handshake) -> PeerHello:
    assert handshake.result is not None
    return handshake.result


@pytest.mark.parametrize("cipher", list(Cipher))
def test_both_sides_learn_who_the_other_is_and_share_keys(cipher: Cipher) -> None:
    alice, bob = dialling(expected=BOB.peer_id, cipher=cipher), answering()

    roundtrip(alice, bob)

    assert result_of(alice).peer_id == BOB.peer_id
    assert result_of(bob).peer_id == ALICE.peer_id
    assert result_of(alice).handshake_hash == result_of(bob).handshake_hash
    alice_send, alice_receive = alice.split()
    bob_send, bob_receive = bob.split()
    assert bob_receive.decrypt(alice_send.encrypt(b"there")) == b"there"
    assert alice_receive.decrypt(bob_send.encrypt(b"back")) == b"back"


def test_hellos_travel_and_features_are_intersected() -> None:
    ours = Hello(features=frozenset({"a", "b"}), observed="203.0.113.7:31337", agent="one/1")
    theirs = Hello(
        features=frozenset({"b", "c"}), observed="[2001:db8::1]:5", agent="two/2", membership=b"m"
    )
    alice, bob = dialling(hello=ours), answering(hello=theirs)

    roundtrip(alice, bob)

    seen = result_of(alice)
    assert seen.features == frozenset({"b"})
    assert seen.observed == "[2001:db8::1]:5"
    assert seen.agent == "two/2"
    assert seen.membership == b"m"
    assert result_of(bob).observed == "203.0.113.7:31337"


def test_the_highest_common_minor_version_is_chosen() -> None:
    alice, bob = dialling(hello=Hello(minor=(1, 3))), answering(hello=Hello(minor=(2, 7)))

    roundtrip(alice, bob)

    assert result_of(alice).minor == result_of(bob).minor == 3


def test_no_common_minor_version_is_said_in_words() -> None:
    alice, bob = dialling(hello=Hello(minor=(4, 5))), answering(hello=Hello(minor=(0, 3)))

    with pytest.raises(RemoteProtocolError, match=r"1\.0 to 1\.3, we speak 1\.4 to 1\.5"):
        roundtrip(alice, bob)


def test_bytes_may_arrive_one_at_a_time() -> None:
    alice, bob = dialling(), answering()

    for _ in range(2):
        for byte in alice.bytes_to_send():
            bob.receive(bytes([byte]))
        for byte in bob.bytes_to_send():
            alice.receive(bytes([byte]))

    assert result_of(bob).peer_id == ALICE.peer_id


def test_what_follows_the_handshake_is_kept() -> None:
    alice, bob = dialling(), answering()
    bob.receive(alice.bytes_to_send())
    alice.receive(bob.bytes_to_send())

    bob.receive(alice.bytes_to_send() + b"first frame")

    assert bob.leftover == b"first frame"
    assert alice.leftover == b""


def test_another_peer_than_the_expected_one_is_refused_by_name() -> None:
    alice, eve = dialling(expected=BOB.peer_id), answering(keys=EVE)
    names = f"expected peer {BOB.peer_id.short}, but {EVE.peer_id.short}"

    with pytest.raises(BadSignature, match=names):
        roundtrip(alice, eve)

    assert alice.bytes_to_send() == b""  # who we are is not told to the wrong peer


def test_a_stolen_identity_is_refused() -> None:
    # Eve shows Bob's identity and his signature, over a static key that she does not have.
    stolen = replace(EVE, peer_id=BOB.peer_id, signature=BOB.signature)

    with pytest.raises(BadSignature, match="not signed"):
        roundtrip(dialling(expected=BOB.peer_id), answering(keys=stolen))


def test_a_signature_for_another_purpose_is_refused() -> None:
    own = Identity.from_seed(bytes([2]) * 32)
    public = BOB.private.public_key().public_bytes_raw()
    keys = replace(BOB, signature=own.sign(b"p2pllm/something-else", public))

    with pytest.raises(BadSignature):
        roundtrip(dialling(), answering(keys=keys))


def test_another_network_is_said_in_words() -> None:
    with pytest.raises(RemoteProtocolError, match="another network or version"):
        roundtrip(dialling(network_id="main"), answering(network_id="test"))


def test_the_prologue_names_the_major_version_and_the_network() -> None:
    assert prologue("main") == b"p2pllm/1\0main"


def test_the_signature_check_is_the_callers_and_comes_last() -> None:
    asked: list[PeerId] = []

    def verify(peer_id: PeerId, domain: bytes, message: bytes, signature: bytes) -> None:
        assert domain == SIGNATURE_DOMAIN
        assert message == ALICE.private.public_key().public_bytes_raw()
        assert signature == ALICE.signature
        asked.append(peer_id)
        raise Refused("too many signatures to check")

    bob = answering(verify=verify)

    with pytest.raises(Refused):
        roundtrip(dialling(), bob)

    assert asked == [ALICE.peer_id]
    assert bob.result is None


def test_a_handshake_that_failed_or_ended_takes_nothing_more() -> None:
    alice, bob = dialling(), answering()
    with pytest.raises(RemoteProtocolError):
        answering().receive(b"\xff")
    roundtrip(alice, bob)

    with pytest.raises(LocalProtocolError):
        bob.receive(b"more")


def test_ciphers_cannot_be_taken_before_the_end() -> None:
    with pytest.raises(LocalProtocolError):
        dialling().split()


# --- what a peer may send ----------------------------------------------------------------------


@pytest.mark.parametrize("request_line", [b"GET / HTTP/1.1\r\n", b"\x16\x03\x01\x02\x00\x01"])
def test_other_protocols_are_recognised_by_the_first_byte(request_line: bytes) -> None:
    with pytest.raises(RemoteProtocolError, match="not a p2pllm peer"):
        answering().receive(request_line)


def test_an_answer_of_another_protocol_is_refused_before_it_is_waited_for() -> None:
    with pytest.raises(RemoteProtocolError, match="not a p2pllm peer"):
        dialling().receive(b"HT")


def test_a_message_that_never_ends_is_refused() -> None:
    bob = answering()

    with pytest.raises(RemoteProtocolError):
        bob.receive(b"\x01\x00\x20" + bytes(100_000))


def hello_fields() -> dict[str, object]:
    return {
        "identity": ALICE.peer_id.key,
        "signature": ALICE.signature,
        "minor": [0, 0],
        "features": [],
        "observed": "",
        "membership": b"",
        "agent": "",
    }


def say(payload: bytes) -> Handshake:
    """Bob after Alice's keys and exactly this payload."""
    bob = answering()
    noise = NoiseHandshake(Role.INITIATOR, ALICE.private, prologue("main"))

    def framed(message: bytes) -> bytes:
        return len(message).to_bytes(2, "big") + message

    bob.receive(b"\x01" + framed(noise.write_message()))
    noise.read_message(bob.bytes_to_send()[2:])
    bob.receive(framed(noise.write_message(payload)))
    return bob


def test_unknown_keys_are_ignored_and_optional_ones_may_be_missing() -> None:
    fields = hello_fields() | {"later": {"x": 1}}
    for name in ("features", "observed", "membership", "agent"):
        del fields[name]

    bob = say(pack(fields))

    assert result_of(bob).peer_id == ALICE.peer_id


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("identity", b"short"),
        ("identity", "text"),
        ("signature", bytes(63)),
        ("minor", [1, 0]),
        ("minor", [-1, 0]),
        ("minor", [0, True]),
        ("minor", [0]),
        ("minor", None),
        ("features", ["x" * 65]),
        ("features", ["x"] * 33),
        ("features", [1]),
        ("features", "text"),
        ("observed", "nowhere"),
        ("observed", "x" * 400),
        ("membership", bytes(1025)),
        ("membership", "text"),
        ("agent", "with\nnewline"),
        ("agent", 1),
    ],
)
def test_a_hello_with_a_wrong_field_is_refused(name: str, value: object) -> None:
    with pytest.raises(CodecError, match=name):
        say(pack(hello_fields() | {name: value}))


def test_a_hello_past_the_bound_is_refused() -> None:
    with pytest.raises(RemoteProtocolError):
        say(bytes(MAX_HELLO_BYTES + 1))


@settings(max_examples=40, deadline=None)
@given(st.binary(max_size=300))
def test_garbage_inside_the_encryption_ends_in_a_remote_error(payload: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        say(payload)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.binary(max_size=120), max_size=6), st.booleans())
def test_garbage_on_the_link_ends_in_a_remote_error(
    chunks: list[bytes], is_first_right: bool
) -> None:
    bob = answering()
    if is_first_right:
        bob.receive(dialling().bytes_to_send())

    try:
        for chunk in chunks:
            bob.receive(chunk)
    except RemoteProtocolError:
        pass

    assert bob.result is None


def test_a_static_key_is_signed_for_exactly_this_use() -> None:
    private = X25519PrivateKey.generate()

    keys = StaticKeys.of(Identity.from_seed(bytes(32)), private)

    public = private.public_key().public_bytes_raw()
    identity.verify(keys.peer_id, SIGNATURE_DOMAIN, public, keys.signature)
