from p2pllm.errors import ConnectionLost, TransportError
from p2pllm.ids import PeerId
from p2pllm.net.watch import Watch, Watches

PEER, OTHER = PeerId(bytes(32)), PeerId(bytes([1]) * 32)


def watch(heard: list[TransportError], peer: PeerId = PEER) -> tuple[Watch, list[Watch]]:
    """A watch, and where it is noted when it has been closed."""
    forgotten: list[Watch] = []
    return Watch(peer, heard.append, forgotten.append), forgotten


def test_only_the_first_and_the_last_watch_of_a_peer_change_anything() -> None:
    watches = Watches()
    (first, _), (second, _), (other, _) = watch([]), watch([]), watch([], OTHER)
    assert watches.add(first)
    assert not watches.add(second)
    assert watches.add(other)
    assert not watches.remove(first)
    assert PEER in watches
    assert watches.remove(second)
    assert PEER not in watches
    assert OTHER in watches


def test_a_loss_is_for_each_watch_once_until_the_peer_is_found_again() -> None:
    watches = Watches()
    first, _ = watch([])
    watches.add(first)
    assert list(watches.on_lost(PEER)) == [first]
    second, _ = watch([])
    watches.add(second)  # when the peer is silent, and its connection not closed yet
    assert list(watches.on_lost(PEER)) == [second]
    assert list(watches.on_lost(PEER)) == []
    watches.on_found(PEER)
    assert list(watches.on_lost(PEER)) == [first, second]


def test_a_loss_of_another_peer_is_none_of_its_business() -> None:
    watches = Watches()
    one, _ = watch([])
    watches.add(one)
    watches.on_found(OTHER)
    assert list(watches.on_lost(OTHER)) == []


def test_a_closed_watch_hears_nothing_and_is_forgotten_once() -> None:
    heard: list[TransportError] = []
    one, forgotten = watch(heard)
    one.tell(ConnectionLost("before"))
    with one:
        one.close()
    one.tell(ConnectionLost("after"))
    assert [str(error) for error in heard] == ["before"]
    assert forgotten == [one]
