import random

from hypothesis import given, settings
from hypothesis import strategies as st

from p2pllm.dht.contacts import Contact
from p2pllm.dht.lookup import MAX_PAGES, MAX_QUERIES, Lookup, Query
from p2pllm.identity import Identity
from p2pllm.ids import PeerId
from p2pllm.wire.records import Record, make_record

TARGET = 0
OWN_ID = 2**255
WRITER = Identity.from_seed(b"w" * 32)
KEY = b"k" * 32


def peer(place: int, group: str | None = None) -> Contact:
    """A peer at distance `place` from the target."""
    return Contact(PeerId(place.to_bytes(32, "big")), place, group=group)


def lookup_from(
    *seeds: Contact, alpha: int = 3, k: int = 4, quorum: int = 4, max_per_group: int = 2
) -> Lookup:
    return Lookup(
        TARGET,
        seeds,
        own_id=OWN_ID,
        alpha=alpha,
        k=k,
        quorum=quorum,
        max_per_group=max_per_group,
    )


def record(seq: int, writer: Identity = WRITER) -> Record:
    return make_record(
        "presence",
        KEY,
        writer.peer_id,
        seq=seq,
        issued=0.0,
        expires=120.0,
        body={"x": seq},
        sign=writer.sign,
    )


def queries(lookup: Lookup) -> list[Query]:
    """All queries that the lookup wants to send now."""
    found = []
    while (query := lookup.next_query()) is not None:
        found.append(query)
    return found


def places(asked: list[Query]) -> list[int]:
    return [query.contact.id for query in asked]


def test_the_closest_seeds_are_asked_first_and_at_most_alpha_at_once() -> None:
    lookup = lookup_from(*map(peer, [9, 5, 7, 1]), alpha=3)

    assert places(queries(lookup)) == [1, 5, 7]


def test_a_reply_frees_its_slot_while_others_are_still_awaited() -> None:
    lookup = lookup_from(*map(peer, [1, 5, 7, 9]), alpha=3)
    asked = queries(lookup)

    lookup.on_reply(asked[1], [peer(3)])

    assert places(queries(lookup)) == [3]


def test_a_failure_frees_its_slot_too() -> None:
    lookup = lookup_from(*map(peer, [1, 5, 7, 9]), alpha=3)
    asked = queries(lookup)

    lookup.on_failure(asked[0])

    assert places(queries(lookup)) == [9]


def test_lookup_stops_when_the_closest_have_answered() -> None:
    lookup = lookup_from(*map(peer, [1, 2, 50]), alpha=2, k=2, quorum=2)

    for query in queries(lookup):
        lookup.on_reply(query, [])

    assert lookup.is_done
    assert queries(lookup) == []
    assert [contact.id for contact in lookup.closest] == [1, 2]


def test_a_closer_peer_heard_of_must_answer_before_the_end() -> None:
    lookup = lookup_from(peer(5), k=1, quorum=1)
    lookup.on_reply(queries(lookup)[0], [peer(2)])

    assert not lookup.is_done

    lookup.on_reply(queries(lookup)[0], [])

    assert lookup.is_done


def test_a_peer_that_failed_is_replaced_by_the_next_closest() -> None:
    lookup = lookup_from(*map(peer, [1, 2, 3]), alpha=3, k=2, quorum=2)
    first, second = queries(lookup)
    lookup.on_reply(second, [])
    lookup.on_failure(first)

    assert not lookup.is_done

    lookup.on_reply(queries(lookup)[0], [])

    assert lookup.is_done
    assert [contact.id for contact in lookup.closest] == [2, 3]


def test_a_lookup_without_anybody_to_ask_is_done() -> None:
    lookup = lookup_from()

    assert lookup.is_done
    assert not lookup.has_answers


def test_a_read_ends_with_the_answers_of_the_beta_closest() -> None:
    lookup = lookup_from(*map(peer, range(1, 9)), alpha=5, k=8, quorum=3)

    for query in queries(lookup)[:3]:
        lookup.on_reply(query, [])

    assert lookup.is_done


def test_a_read_that_found_nothing_can_go_on_to_more_peers() -> None:
    lookup = lookup_from(*map(peer, range(1, 9)), alpha=3, k=8, quorum=3)
    for query in queries(lookup):
        lookup.on_reply(query, [])

    lookup.widen(5)

    assert not lookup.is_done
    assert [query.contact.id for query in queries(lookup)] == [4, 5, 6]


def test_records_of_all_replies_are_merged_and_the_newest_of_each_slot_wins() -> None:
    other = Identity.from_seed(b"o" * 32)
    lookup = lookup_from(*map(peer, [1, 2, 3]))
    first, second, third = queries(lookup)

    lookup.on_reply(first, [], [record(2)])
    lookup.on_reply(second, [], [record(1), record(5, other)])
    lookup.on_reply(third, [], [record(3)])

    assert lookup.records == {WRITER.peer_id: record(3), other.peer_id: record(5, other)}


def test_further_pages_are_asked_of_the_same_peer_until_the_cursor_ends() -> None:
    lookup = lookup_from(peer(1), k=1, quorum=1)
    lookup.on_reply(queries(lookup)[0], [], cursor=7)
    (second,) = queries(lookup)

    assert (second.contact.id, second.cursor) == (1, 7)
    assert not lookup.is_done

    lookup.on_reply(second, [], cursor=0)

    assert lookup.is_done


def test_a_cursor_that_does_not_move_on_ends_the_paging() -> None:
    lookup = lookup_from(peer(1), k=1, quorum=1)
    lookup.on_reply(queries(lookup)[0], [], cursor=7)

    lookup.on_reply(queries(lookup)[0], [], cursor=7)

    assert lookup.is_done


def test_endless_pages_end() -> None:
    lookup = lookup_from(peer(1), k=1, quorum=1)
    cursor = 0
    while asked := queries(lookup):
        cursor += 1
        lookup.on_reply(asked[0], [], cursor=cursor)

    assert lookup.is_done
    assert cursor == MAX_PAGES


def test_an_endless_chase_for_closer_peers_ends() -> None:
    lookup = lookup_from(peer(2**200), k=4, quorum=4)
    place, num_queries = 2**200, 0
    while asked := queries(lookup):
        for query in asked:
            num_queries += 1
            place -= 1
            lookup.on_reply(query, [peer(place)])

    assert lookup.is_done
    assert num_queries == MAX_QUERIES


def test_an_address_group_has_two_places_in_the_shortlist() -> None:
    sybils = [peer(place, "8.8.0.0/16") for place in range(1, 9)]
    honest = [peer(place, f"group {place}") for place in range(100, 104)]
    lookup = lookup_from(*sybils, *honest, alpha=10)

    assert places(queries(lookup)) == [1, 2, 100, 101]


def test_the_bound_per_group_can_be_lifted() -> None:
    lookup = lookup_from(*(peer(p, "8.8.0.0/16") for p in range(1, 9)), alpha=9, max_per_group=0)

    assert places(queries(lookup)) == [1, 2, 3, 4]


def test_we_do_not_ask_ourselves() -> None:
    lookup = lookup_from(peer(OWN_ID), peer(1))

    assert places(queries(lookup)) == [1]


def test_a_reply_adds_at_most_k_peers() -> None:
    lookup = lookup_from(peer(1000), alpha=100, k=4)

    lookup.on_reply(queries(lookup)[0], [peer(place) for place in range(900, 999)])

    assert lookup.snapshot().num_candidates == 5


def test_the_chain_counts_queries_that_were_caused_by_one_another() -> None:
    lookup = lookup_from(peer(9), peer(8), k=4)
    (first, second) = queries(lookup)
    lookup.on_reply(first, [peer(5)])
    lookup.on_reply(second, [peer(4)])
    (third, fourth) = queries(lookup)
    lookup.on_reply(third, [peer(2)])
    lookup.on_reply(fourth, [])

    last = queries(lookup)

    assert [query.depth for query in (first, third, last[0])] == [1, 2, 3]
    assert lookup.chain == 3


@settings(max_examples=60)
@given(st.integers(0, 2**32), st.integers(1, 12), st.floats(0, 0.4))
def test_any_order_of_replies_finds_the_closest_that_live(
    seed: int, alpha: int, dead_share: float
) -> None:
    rng = random.Random(seed)
    swarm = [peer(rng.randrange(1, 2**250)) for _ in range(60)]
    dead = {contact.id for contact in swarm[1:] if rng.random() < dead_share}
    lookup = lookup_from(swarm[0], alpha=alpha, k=8, quorum=8)
    waiting: list[Query] = []
    while True:
        waiting += queries(lookup)
        if not waiting:
            break
        query = waiting.pop(rng.randrange(len(waiting)))
        if query.contact.id in dead:
            lookup.on_failure(query)
        else:  # everybody knows all, so a reply holds the k closest of them
            lookup.on_reply(query, sorted(swarm, key=lambda contact: contact.id)[:8])

    assert lookup.is_done
    known = sorted(contact.id for contact in swarm)[:8]
    assert {p for p in known if p not in dead} <= {c.id for c in lookup.closest}
