from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from p2pllm.config import DhtConfig
from p2pllm.dht.records import Refusal
from p2pllm.dht.storage import RECORD_OVERHEAD_BYTES, Page, RecordStore
from p2pllm.ids import PeerId
from p2pllm.wire.records import Record, make_record

KEY = b"k" * 32


def record(
    writer: int = 1, seq: int = 1, *, key: bytes = KEY, body: dict[str, Any] | None = None
) -> Record:
    """An unsigned record: storage gets only what others have verified."""
    return make_record(
        "presence",
        key,
        PeerId(writer.to_bytes(32, "big")),
        seq=seq,
        issued=0.0,
        expires=120.0,
        body={"x": seq} if body is None else body,
        sign=lambda domain, message: bytes(64),
    )


def put(
    store: RecordStore,
    item: Record,
    *,
    now: float = 0.0,
    life_s: float = 120.0,
    group: str = "",
) -> Refusal | None:
    return store.put(item, item.to_bytes(), now=now, life_s=life_s, group=group)


def all_pages(store: RecordStore, *, max_bytes: int, now: float = 0.0) -> list[Page]:
    pages, cursor = [], 0
    while True:
        page = store.page("presence", KEY, now=now, max_bytes=max_bytes, cursor=cursor)
        pages.append(page)
        cursor = page.cursor
        if not cursor:
            return pages


def test_a_stored_record_is_found_with_its_age() -> None:
    store, item = RecordStore(DhtConfig()), record()
    put(store, item, now=10.0)

    page = store.page("presence", KEY, now=15.0, max_bytes=10_000)

    assert page == Page((item.to_bytes(),), (5.0,), 0)


def test_a_record_is_gone_when_its_life_is_over() -> None:
    store = RecordStore(DhtConfig())
    put(store, record(), life_s=120.0)

    assert len(store.records("presence", KEY, now=119.9)) == 1
    assert store.records("presence", KEY, now=120.0) == []
    assert store.snapshot().num_bytes == 0


def test_a_newer_record_replaces_the_older_and_not_the_reverse() -> None:
    store = RecordStore(DhtConfig())

    refusals = [put(store, record(seq=seq)) for seq in (1, 3, 2)]

    assert refusals == [None, None, Refusal.STALE]
    assert store.records("presence", KEY, now=0.0) == [record(seq=3)]


def test_hearing_a_record_again_does_not_make_it_live_longer() -> None:
    store = RecordStore(DhtConfig())
    put(store, record(), now=0.0)

    refusal = put(store, record(), now=100.0)

    assert refusal is None
    assert store.records("presence", KEY, now=121.0) == []


def test_of_equal_seq_the_larger_bytes_stay_whichever_came_first() -> None:
    one, other = record(body={"x": 1}), record(body={"x": 2})
    forth, back = RecordStore(DhtConfig()), RecordStore(DhtConfig())
    for item in (one, other):
        put(forth, item)
    for item in (other, one):
        put(back, item)

    assert forth.records("presence", KEY, now=0.0) == back.records("presence", KEY, now=0.0)


def test_a_tombstone_keeps_older_copies_out_until_it_expires() -> None:
    store = RecordStore(DhtConfig())
    put(store, record(seq=1))
    tombstone = record(seq=2, body={})
    put(store, tombstone, now=1.0)

    assert put(store, record(seq=1), now=100.0) is Refusal.STALE
    assert store.records("presence", KEY, now=100.0) == [tombstone]


def test_a_subkey_narrows_to_one_slot() -> None:
    store = RecordStore(DhtConfig())
    for writer in range(1, 4):
        put(store, record(writer))

    page = store.page("presence", KEY, now=0.0, max_bytes=10_000, subkey=record(2).subkey.key)

    assert page.records == (record(2).to_bytes(),)


def test_pages_stay_within_their_bytes_and_hold_every_record_once() -> None:
    store = RecordStore(DhtConfig())
    for writer in range(1, 101):
        put(store, record(writer))

    pages = all_pages(store, max_bytes=2000)

    sizes = [sum(len(data) + RECORD_OVERHEAD_BYTES for data in page.records) for page in pages]
    assert max(sizes) <= 2000
    assert len(pages) > 5
    found = [data for page in pages for data in page.records]
    assert found == [record(writer).to_bytes() for writer in range(1, 101)]


def test_updates_between_pages_make_a_reader_miss_nothing() -> None:
    store = RecordStore(DhtConfig())
    for writer in range(1, 21):
        put(store, record(writer))
    first = store.page("presence", KEY, now=0.0, max_bytes=2000)

    for writer in range(1, 21):
        put(store, record(writer, seq=2))

    rest = store.page("presence", KEY, now=0.0, max_bytes=100_000, cursor=first.cursor)
    assert len(first.records) + len(rest.records) == 20


def test_a_record_larger_than_the_page_is_still_sent() -> None:
    store = RecordStore(DhtConfig())
    put(store, record())

    assert len(store.page("presence", KEY, now=0.0, max_bytes=1).records) == 1


def test_a_full_key_gives_up_what_expires_first() -> None:
    store = RecordStore(DhtConfig(max_subkeys_per_key=3))
    for writer, life_s in ((1, 50.0), (2, 30.0), (3, 40.0)):
        put(store, record(writer), life_s=life_s)

    refusal = put(store, record(4), life_s=60.0)

    assert refusal is None
    writers = {item.subkey for item in store.records("presence", KEY, now=0.0)}
    assert writers == {record(writer).subkey for writer in (1, 3, 4)}


def test_a_full_key_refuses_what_would_expire_before_all_others() -> None:
    store = RecordStore(DhtConfig(max_subkeys_per_key=2))
    for writer in (1, 2):
        put(store, record(writer), life_s=50.0)

    assert put(store, record(3), life_s=10.0) is Refusal.FULL


def test_one_network_with_many_identities_displaces_only_itself() -> None:
    store = RecordStore(DhtConfig(max_subkeys_per_key=10))
    for writer in (1, 2, 3):
        put(store, record(writer), life_s=60.0, group=f"honest {writer}")

    for writer in range(100, 200):
        put(store, record(writer), life_s=600.0, group="8.8.0.0/16")
    newcomer = put(store, record(4), life_s=60.0, group="honest 4")

    writers = {item.subkey for item in store.records("presence", KEY, now=0.0)}
    assert {record(writer).subkey for writer in (1, 2, 3, 4)} <= writers
    assert newcomer is None


def test_a_writer_has_so_many_bytes_over_all_keys() -> None:
    size = len(record().to_bytes())
    store = RecordStore(DhtConfig(max_bytes_per_writer=3 * size))

    for index in range(5):
        put(store, record(key=bytes([index]) * 32), life_s=100.0 + index)

    kept = [index for index in range(5) if store.records("presence", bytes([index]) * 32, now=0.0)]
    assert kept == [2, 3, 4]


def test_an_address_group_has_so_many_bytes_over_all_writers() -> None:
    size = len(record().to_bytes())
    store = RecordStore(DhtConfig(max_bytes_per_group=3 * size))
    put(store, record(99), group="1.1.0.0/16")

    for writer in range(1, 6):
        put(store, record(writer), life_s=100.0 + writer, group="8.8.0.0/16")

    writers = {item.subkey for item in store.records("presence", KEY, now=0.0)}
    assert writers == {record(writer).subkey for writer in (99, 3, 4, 5)}


def test_all_records_together_are_bounded() -> None:
    store = RecordStore(DhtConfig(max_records=10))

    for writer in range(1, 31):
        put(store, record(writer, key=bytes([writer]) * 32), life_s=100.0 + writer)

    assert store.snapshot().num_records == 10
    assert store.snapshot().num_evicted == 20


_PUTS = st.lists(
    st.tuples(
        st.integers(1, 6),  # writer
        st.integers(1, 5),  # seq
        st.integers(0, 2),  # key
        st.integers(1, 100),  # life
        st.integers(0, 20),  # seconds later
    ),
    max_size=80,
)


@settings(max_examples=100)
@given(_PUTS)
def test_no_order_of_stores_breaks_a_bound_or_the_books(
    puts: list[tuple[int, int, int, int, int]],
) -> None:
    size = len(record().to_bytes())
    config = DhtConfig(
        max_subkeys_per_key=4,
        max_records=8,
        max_bytes_per_writer=2 * size,
        max_bytes_per_group=4 * size,
    )
    store, now = RecordStore(config), 0.0
    best: dict[tuple[int, int], int] = {}
    for writer, seq, index, life_s, later_s in puts:
        now += later_s
        item = record(writer, seq, key=bytes([index]) * 32)
        put(store, item, now=now, life_s=life_s, group=f"group {writer % 3}" if writer % 3 else "")
        best[writer, index] = max(best.get((writer, index), 0), seq)

        held = [
            (index, r)
            for index in range(3)
            for r in store.records("presence", bytes([index]) * 32, now=now)
        ]
        snapshot = store.snapshot()
        assert snapshot.num_records == len(held) <= config.max_records
        assert snapshot.num_bytes == sum(len(r.to_bytes()) for _, r in held)
        for index in range(3):
            assert sum(place == index for place, _ in held) <= config.max_subkeys_per_key
        for writer in range(1, 7):
            mine = [r for _, r in held if r.subkey == record(writer).subkey]
            assert sum(len(r.to_bytes()) for r in mine) <= config.max_bytes_per_writer
        for group in (1, 2):
            theirs = [r for _, r in held if r.subkey.key[-1] % 3 == group]
            assert sum(len(r.to_bytes()) for r in theirs) <= config.max_bytes_per_group
