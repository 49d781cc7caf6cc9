import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pllm.addresses import Address, parse_host_port, parse_many
from p2pllm.errors import ConfigError
from p2pllm.ids import PeerId

ALICE, BOB = PeerId(b"a" * 32), PeerId(b"b" * 32)

PEERS = st.binary(min_size=32, max_size=32).map(PeerId)
HOSTS = st.sampled_from(
    ["203.0.113.7", "localhost", "a.example", "::1", "2001:db8::1", "fe80::1%e0"]
)
ADDRESSES = st.builds(
    lambda host, port, peer_id, relay: Address(host, port, peer_id, relay if peer_id else None),
    HOSTS,
    st.integers(1, 65535),
    st.none() | PEERS,
    st.none() | PEERS,
)


@given(ADDRESSES)
def test_an_address_reads_what_it_writes(address: Address) -> None:
    assert Address.parse(str(address)) == address


@given(st.lists(ADDRESSES, max_size=4))
def test_a_list_with_commas_is_read_like_single_addresses(addresses: list[Address]) -> None:
    texts = [str(address) for address in addresses]

    assert parse_many(texts) == tuple(addresses)
    assert parse_many([", ".join(texts)]) == tuple(addresses)


@given(
    st.text(max_size=80)
    | st.text(alphabet="[]@:,.0159af relay\0é", max_size=40)
    | st.text(alphabet="[]@:.09a", max_size=20).map(lambda text: f"{ALICE}@{text}:1")
)
def test_any_text_is_an_address_or_a_config_error(text: str) -> None:
    try:
        address = Address.parse(text)
    except ConfigError:
        return
    assert Address.parse(str(address)) == address


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("203.0.113.7:31337", Address("203.0.113.7", 31337)),
        ("[::1]:1", Address("::1", 1)),
        (f"{ALICE}@[::1]:1", Address("::1", 1, ALICE)),
        (f"{ALICE}@relay:{BOB}@h.example:2", Address("h.example", 2, ALICE, BOB)),
    ],
)
def test_the_three_forms_are_read(text: str, expected: Address) -> None:
    assert Address.parse(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "host",
        ":1",
        "host:",
        "host:0",
        "host:65536",
        "host:-1",
        "host:1 2",
        "host:" + "9" * 5000,
        "::1:80",
        "[::1]",
        "[::1:80",
        "[[::1]]:80",
        "[]:80",
        "ho st:80",
        "ho\0st:80",
        "h@st:80",
        "@host:80",
        f"{ALICE}@{BOB}@host:80",
        f"relay:{BOB}@host:80",
        f"{ALICE}@relay:@host:80",
        f"{ALICE}@relay:{BOB}@",
        f"{ALICE}@relay:{'é' * 52}@host:80",
        "x" * 256 + ":80",
    ],
)
def test_anything_else_is_a_config_error(text: str) -> None:
    with pytest.raises(ConfigError):
        Address.parse(text)


@pytest.mark.parametrize("host", ["", "a b", "a,b", "a@b", "[::1]", "a\n", "x" * 256])
def test_a_host_that_could_not_be_written_and_read_again_is_refused(host: str) -> None:
    with pytest.raises(ConfigError):
        Address(host, 80)


def test_an_address_through_a_relay_says_whose_it_is() -> None:
    with pytest.raises(ConfigError):
        Address("host", 80, None, BOB)


def test_port_0_is_read_only_where_any_free_port_will_do() -> None:
    assert parse_host_port("127.0.0.1:0", allow_zero=True) == ("127.0.0.1", 0)
    with pytest.raises(ConfigError):
        parse_host_port("127.0.0.1:0")


def test_an_address_can_be_said_to_be_anothers() -> None:
    address = Address("::1", 80)

    assert address.of(ALICE) == Address("::1", 80, ALICE)
    assert address.of(ALICE).endpoint == "[::1]:80"
