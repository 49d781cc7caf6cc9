import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pllm.config import DhtConfig
from p2pllm.dht.contacts import Contact
from p2pllm.dht.kbuckets import AVOID_S, PING_AFTER_S, THIN_BUCKET, RoutingTable
from p2pllm.dht.keys import random_id_sharing, shared_prefix_bits
from p2pllm.ids import PeerId

OWN_ID = random.Random(0).getrandbits(256)
CONFIG = DhtConfig()


def contact_at(place: int, group: str | None = None, seq: int = 0) -> Contact:
    """A contact at any place in the id space; its PeerId is not the one that hashes there."""
    return Contact(PeerId(place.to_bytes(32, "big")), place, group=group, seq=seq)


def contacts_in(bucket: int, count: int, *, group: str | None = None) -> list[Contact]:
    rng = random.Random(bucket)
    return [contact_at(random_id_sharing(OWN_ID, bucket, rng), group) for _ in range(count)]


def table_of(*contacts: Contact, config: DhtConfig = CONFIG) -> RoutingTable:
    table = RoutingTable(OWN_ID, config, 0.0)
    for contact in contacts:
        table.on_success(contact, 0.0)
    return table


def test_a_peer_that_answered_is_in_the_table() -> None:
    (contact,) = contacts_in(0, 1)

    assert contact in table_of(contact)


def test_a_peer_that_others_told_of_is_not_in_the_table() -> None:
    (contact,) = contacts_in(0, 1)
    table = table_of()

    table.on_contact(contact)

    assert contact not in table
    assert table.wants(contact, 0.0)


def test_a_peer_that_fails_twice_in_a_row_is_dropped() -> None:
    (contact,) = contacts_in(0, 1)
    table = table_of(contact)

    table.on_failure(contact, 1.0)
    was_kept_after_one = contact in table
    table.on_failure(contact, 2.0)

    assert was_kept_after_one
    assert contact not in table


def test_an_answer_between_two_failures_keeps_a_peer() -> None:
    (contact,) = contacts_in(0, 1)
    table = table_of(contact)

    table.on_failure(contact, 1.0)
    table.on_success(contact, 2.0)
    table.on_failure(contact, 3.0)

    assert contact in table


def test_a_dropped_peer_is_avoided_for_a_time_that_doubles() -> None:
    (contact,) = contacts_in(0, 1)
    table = table_of(contact)
    table.on_failure(contact, 0.0)
    table.on_failure(contact, 0.0)

    assert table.is_avoided(contact.id, AVOID_S - 1)
    assert not table.wants(contact, AVOID_S - 1)
    assert not table.is_avoided(contact.id, AVOID_S)

    table.on_failure(contact, AVOID_S)

    assert table.is_avoided(contact.id, AVOID_S + 2 * AVOID_S - 1)
    assert not table.is_avoided(contact.id, AVOID_S + 2 * AVOID_S)


def test_a_dropped_peer_that_answers_again_is_back() -> None:
    (contact,) = contacts_in(0, 1)
    table = table_of(contact)
    table.on_failure(contact, 0.0)
    table.on_failure(contact, 0.0)

    table.on_success(contact, 1.0)

    assert contact in table
    assert not table.is_avoided(contact.id, 1.0)


def test_a_full_bucket_keeps_its_long_lived_peers_and_asks_after_the_oldest() -> None:
    *members, newcomer = contacts_in(0, CONFIG.k + 1)
    table = table_of(*members)

    table.on_success(newcomer, PING_AFTER_S)

    assert newcomer not in table
    assert table.next_ping() == members[0]
    assert not table.has_pings


def test_a_peer_that_failed_once_is_asked_after() -> None:
    (contact,) = contacts_in(0, 1)
    table = table_of(contact)

    table.on_failure(contact, 1.0)

    assert table.next_ping() == contact


def test_peers_seen_lately_are_not_asked_after() -> None:
    *members, newcomer = contacts_in(0, CONFIG.k + 1)
    table = table_of(*members)

    table.on_success(newcomer, PING_AFTER_S - 1)

    assert table.next_ping() is None


def test_a_spare_takes_the_place_of_a_peer_that_died() -> None:
    *members, newcomer = contacts_in(0, CONFIG.k + 1)
    table = table_of(*members)
    table.on_success(newcomer, 1.0)

    table.on_failure(members[3], 2.0)
    table.on_failure(members[3], 3.0)

    assert newcomer in table
    assert members[3] not in table
    assert len(table) == CONFIG.k


def test_no_more_than_two_of_an_address_group_share_a_bucket() -> None:
    crowd = contacts_in(0, 5, group="8.8.0.0/16")

    table = table_of(*crowd)

    assert len(table) == 2
    assert not table.wants(crowd[4], 0.0)


def test_no_more_than_three_of_an_address_group_share_the_table() -> None:
    crowd = [contacts_in(bucket, 1, group="8.8.0.0/16")[0] for bucket in range(5)]

    assert len(table_of(*crowd)) == 3


def test_a_dropped_peer_makes_room_for_another_of_its_group() -> None:
    first, second, third = contacts_in(0, 3, group="8.8.0.0/16")
    table = table_of(first, second)
    table.on_failure(first, 0.0)
    table.on_failure(first, 0.0)

    table.on_success(third, 1.0)

    assert third in table


def test_where_a_peer_really_is_counts_more_than_what_it_claims() -> None:
    liars = [replace(c, group=f"group {i}") for i, c in enumerate(contacts_in(0, 5))]
    table = table_of()

    for contact in liars:
        table.on_success(contact, 0.0, host_group="8.8.0.0/16")

    assert len(table) == 2


@pytest.mark.parametrize("group", [None, "8.8.0.0/16"])
def test_the_bounds_per_group_can_be_lifted(group: str | None) -> None:
    config = DhtConfig(max_per_group_in_bucket=0, max_per_group_in_table=0)

    assert len(table_of(*contacts_in(0, 5, group=group), config=config)) == 5


def test_peers_without_a_group_are_not_bounded() -> None:
    assert len(table_of(*contacts_in(0, 5))) == 5


def test_a_thin_bucket_wants_rumours_and_a_fuller_one_does_not() -> None:
    *members, rumour = contacts_in(0, THIN_BUCKET + 1)

    assert table_of(*members[:-1]).wants(rumour, 0.0, only_if_thin=True)
    assert not table_of(*members).wants(rumour, 0.0, only_if_thin=True)


def test_a_newer_record_of_a_peer_replaces_the_older() -> None:
    (contact,) = contacts_in(0, 1)
    table = table_of(contact)
    newer, older = replace(contact, seq=2), replace(contact, seq=1)

    table.on_contact(newer)
    table.on_contact(older)

    assert table.closest(OWN_ID, 1) == [newer]


def test_the_bucket_that_no_lookup_touched_for_longest_is_due_for_refresh() -> None:
    table = table_of(*contacts_in(0, 1), *contacts_in(1, 1), *contacts_in(2, 1))
    table.on_lookup(contacts_in(0, 1)[0].id, 100.0)
    table.on_lookup(contacts_in(2, 1)[0].id, 200.0)

    assert table.bucket_to_refresh(CONFIG.refresh_bucket_s - 1) is None
    assert table.bucket_to_refresh(CONFIG.refresh_bucket_s) == 1


def test_an_empty_table_has_no_bucket_to_refresh() -> None:
    assert table_of().bucket_to_refresh(1e9) is None


def test_a_restored_peer_is_used_but_not_handed_on_until_it_answers() -> None:
    (contact,) = contacts_in(0, 1)
    table = table_of()

    table.restore([contact], 0.0)

    assert table.closest(OWN_ID, 1) == [contact]
    assert table.closest(OWN_ID, 1, only_verified=True) == []
    table.on_success(contact, 1.0)
    assert table.closest(OWN_ID, 1, only_verified=True) == [contact]


def test_a_restored_peer_leaves_with_its_first_failure() -> None:
    (contact,) = contacts_in(0, 1)
    table = table_of()
    table.restore([contact], 0.0)

    table.on_failure(contact, 1.0)

    assert contact not in table


def test_a_table_is_the_same_after_snapshot_and_restore() -> None:
    table = table_of(*contacts_in(0, 30), *contacts_in(3, 5))
    other = table_of()

    other.restore(table.snapshot().contacts, 0.0)

    assert set(other.snapshot().contacts) == set(table.snapshot().contacts)


@settings(max_examples=100)
@given(
    st.lists(st.integers(0, 2**256 - 1), max_size=60, unique=True),
    st.integers(0, 2**256 - 1),
    st.integers(1, 30),
)
def test_closest_is_what_sorting_all_by_distance_gives(
    places: list[int], target: int, count: int
) -> None:
    config = DhtConfig(k=100)
    table = table_of(*map(contact_at, places), config=config)

    found = [contact.id for contact in table.closest(target, count)]

    expected = sorted((p for p in places if p != OWN_ID), key=lambda place: place ^ target)
    assert found == expected[:count]


_EVENTS = st.lists(
    st.tuples(st.sampled_from("SSSF"), st.integers(0, 39), st.integers(0, 3)), max_size=200
)


@settings(max_examples=100)
@given(_EVENTS)
def test_no_order_of_events_breaks_the_bounds(events: list[tuple[str, int, int]]) -> None:
    config = DhtConfig(k=4)
    rng = random.Random(1)
    peers = [
        contact_at(random_id_sharing(OWN_ID, index % 3, rng), f"group {index % 7}")
        for index in range(40)
    ]
    table = table_of(config=config)
    now = 0.0
    for kind, index, delay in events:
        now += delay * 30.0
        if kind == "S":
            table.on_success(peers[index], now)
        else:
            table.on_failure(peers[index], now)
    snapshot = table.snapshot()
    groups = {contact.id: contact.group for contact in snapshot.contacts}
    for bucket in range(3):
        inside = [c for c in groups if shared_prefix_bits(OWN_ID, c) == bucket]
        assert len(inside) <= config.k
        for group in set(groups.values()):
            assert sum(groups[place] == group for place in inside) <= 2
    for group in set(groups.values()):
        assert sum(other == group for other in groups.values()) <= 3
    assert len(table) == len(groups)
