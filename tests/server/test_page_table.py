"""Pages that sessions share: what is in them, and that nobody's are lost or changed."""

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

from p2pllm.errors import BadRequest, Busy, CacheFull
from p2pllm.ids import PeerId
from p2pllm.model.config import ModelConfig
from p2pllm.model.edges import Edges
from p2pllm.model.span_model import SpanModel
from p2pllm.server.pages import PAGE_TOKENS
from p2pllm.server.sessions import EVICT_IDLE_S, Session
from p2pllm.sim.fake_model import FakeEdges, FakeSpanModel, fake_config
from p2pllm.spans import Span
from tests.server.page_lab import ALICE, BOB, LEASE_S, PageLab, keys_of, session_id

PROMPT = [(7 * number) % 200 for number in range(4 * PAGE_TOKENS)]
CONFIG = fake_config(2)
EDGES = FakeEdges(CONFIG)


def fake_lab(*, num_pages: int = 16, quota_pages: int = 16) -> PageLab:
    model = FakeSpanModel(CONFIG, Span(0, 2))
    return PageLab(model, lambda ids: EDGES.embed(torch.tensor(ids)), num_pages, quota_pages)


def prefilled(lab: PageLab, number: int = 1, *, client: PeerId = ALICE) -> Session[Tensor]:
    """A session of two promised pages and a bit more."""
    session = lab.open(number, PROMPT, 2, client=client)
    lab.run(session, session.length, PROMPT[session.length : 150])
    return session


# --- finding what is there ----------------------------------------------------------------------


@pytest.mark.parametrize("is_closed", [False, True])
def test_a_session_with_the_same_keys_begins_with_the_pages_of_another(is_closed: bool) -> None:
    lab = fake_lab()
    first = prefilled(lab)
    pages = first.pages
    if is_closed:
        lab.close(first)

    second = lab.open(2, PROMPT, 2)

    assert (second.length, second.num_shared) == (2 * PAGE_TOKENS, 2 * PAGE_TOKENS)
    assert second.pages[:2] == pages[:2]
    assert not set(second.pages[2:]) & set(first.pages[2:]) or is_closed
    output = lab.run(second, second.length, PROMPT[second.length : 200])
    assert torch.equal(output, lab.expected(PROMPT[:200])[2 * PAGE_TOKENS :])
    lab.assert_counts_are_right()


def test_the_pages_after_a_cached_beginning_follow_it_if_they_are_free() -> None:
    lab = fake_lab()
    lab.close(prefilled(lab))

    second = lab.open(2, PROMPT, 2)

    assert second.pages == tuple(range(second.pages[0], second.pages[0] + 4))


def test_only_pages_that_were_computed_are_found() -> None:
    lab = fake_lab()
    first = lab.open(1, PROMPT, 3)
    lab.run(first, 0, PROMPT[: PAGE_TOKENS + 10])
    lab.send(first, PAGE_TOKENS + 10, PROMPT[PAGE_TOKENS + 10 : 3 * PAGE_TOKENS])

    assert lab.open(2, PROMPT, 3).length == PAGE_TOKENS


def test_another_client_never_gets_them() -> None:
    lab = fake_lab()
    lab.close(prefilled(lab))

    assert lab.open(2, PROMPT, 2, client=BOB).length == 0


def test_other_blocks_never_get_them() -> None:
    lab = fake_lab()
    lab.close(prefilled(lab))
    request = lab.opening(2, keys=keys_of(PROMPT, 2), span=Span(0, 1))

    assert lab.table.open(request, 0.0).length == 0


def test_another_prefix_shares_the_pages_before_it_differs() -> None:
    lab = fake_lab()
    lab.close(prefilled(lab))
    other = [*PROMPT[:100], *PROMPT[:100]]

    assert lab.open(2, other, 3).length == PAGE_TOKENS


def test_no_more_is_shared_than_a_session_has_room_for() -> None:
    lab = fake_lab()
    prefilled(lab)

    session = lab.open(2, PROMPT, 2, max_tokens=PAGE_TOKENS)

    assert (session.length, session.max_tokens) == (PAGE_TOKENS, PAGE_TOKENS)
    lab.assert_counts_are_right()


def test_keys_that_come_before_the_first_step_count_as_if_they_came_with_the_open() -> None:
    lab = fake_lab()
    late = lab.open(2)
    lab.close(prefilled(lab))
    num_free = lab.pool.num_free

    again = lab.table.open(lab.opening(2, keys=keys_of(PROMPT, 2)), 0.0)

    assert again is late
    assert again.length == 2 * PAGE_TOKENS
    assert lab.pool.num_free == num_free
    output = lab.run(again, again.length, PROMPT[again.length : 180])
    assert torch.equal(output, lab.expected(PROMPT[:180])[2 * PAGE_TOKENS :])
    lab.assert_counts_are_right()


def test_keys_that_come_after_a_step_are_too_late() -> None:
    lab = fake_lab()
    session = lab.open(2)
    lab.run(session, 0, PROMPT[:10])

    lab.table.open(lab.opening(2, keys=keys_of(PROMPT, 2)), 0.0)
    lab.run(session, 10, PROMPT[100:200])

    assert lab.open(3, PROMPT, 2).length == 0


# --- what a client may not make others believe --------------------------------------------------


def test_who_lies_about_its_tokens_deceives_itself_only() -> None:
    lab = fake_lab()
    liar = lab.open(1, PROMPT, 2)
    lab.run(liar, 0, PROMPT[50:200])

    honest = lab.open(2, PROMPT, 2, client=BOB)
    output = lab.run(honest, honest.length, PROMPT[honest.length : 150])

    assert torch.equal(output, lab.expected(PROMPT[:150]))


def test_after_another_epoch_nothing_is_promised_any_more() -> None:
    lab = fake_lab()
    session = lab.open(1, PROMPT, 2)
    lab.send(session, 0, PROMPT[50:200], epoch=1)
    lab.compute(session)

    assert lab.open(2, PROMPT, 2).length == 0


def test_after_a_rollback_only_what_is_before_it_is_promised() -> None:
    lab = fake_lab()
    session = prefilled(lab)
    lab.run(session, 70, PROMPT[:80])

    assert lab.open(2, PROMPT, 2).length == PAGE_TOKENS


def test_a_first_step_before_the_end_of_what_is_shared_computes_it_again() -> None:
    """Another hop had less of it."""
    lab = fake_lab()
    lab.close(prefilled(lab))
    session = lab.open(2, PROMPT, 2)

    output = lab.run(session, 0, PROMPT[:150])

    assert torch.equal(output, lab.expected(PROMPT[:150]))
    lab.close(session)
    assert lab.open(3, PROMPT, 2).length == 2 * PAGE_TOKENS


# --- writing to shared pages --------------------------------------------------------------------


@pytest.mark.parametrize("position", [0, 10, PAGE_TOKENS, 100, 2 * PAGE_TOKENS])
def test_a_rollback_into_shared_pages_leaves_them_as_they_are(position: int) -> None:
    lab = fake_lab()
    first = prefilled(lab)
    second = lab.open(2, PROMPT, 2)
    lab.run(second, second.length, PROMPT[second.length : 160])

    changed = [*PROMPT[:position], *PROMPT[30:120]]
    output = lab.run(second, position, changed[position:])
    assert torch.equal(output, lab.expected(changed)[position:])

    output = lab.run(first, 150, PROMPT[150:170])
    assert torch.equal(output, lab.expected(PROMPT[:170])[150:])
    lab.assert_counts_are_right()


def test_a_row_that_waits_reads_the_pages_that_it_was_taken_in_with() -> None:
    lab = fake_lab()
    first = prefilled(lab)
    second = lab.open(2, PROMPT, 2)
    lab.send(second, second.length, PROMPT[second.length : 160])
    lab.send(second, 70, PROMPT[:20])  # gets a page of its own
    lab.close(first)
    third = lab.open(3, max_tokens=10 * PAGE_TOKENS)
    lab.run(third, 0, PROMPT[:200])

    output = lab.compute(second)

    assert output is not None
    assert torch.equal(output, lab.expected(PROMPT[:160])[2 * PAGE_TOKENS :])


@pytest.mark.parametrize("has_written", [False, True])
def test_a_write_that_fails_leaves_the_shared_page(has_written: bool) -> None:
    lab = fake_lab()
    first = prefilled(lab)
    second = lab.open(2, PROMPT, 2)
    row = lab.send(second, 70, PROMPT[:80])
    if has_written:
        lab.compute(second, is_failing=True)
    else:
        lab.fail(second, row)

    assert (second.length, second.pages[:2]) == (70, first.pages[:2])
    output = lab.run(second, 70, PROMPT[:20])
    assert torch.equal(output, lab.expected([*PROMPT[:70], *PROMPT[:20]])[70:])
    lab.assert_counts_are_right()


def test_without_a_page_for_a_copy_the_cache_is_full_and_nothing_changes() -> None:
    lab = fake_lab(num_pages=6)
    first = prefilled(lab)
    second = lab.open(2, PROMPT, 2)
    assert lab.pool.num_free == 0

    with pytest.raises(CacheFull):
        lab.send(second, 70, PROMPT[:10])

    assert (second.length, second.pages[:2]) == (2 * PAGE_TOKENS, first.pages[:2])
    lab.run(second, second.length, PROMPT[second.length : 150])
    lab.close(first)
    lab.run(second, 70, PROMPT[:10])
    lab.assert_counts_are_right()


def test_what_is_yet_to_be_copied_is_not_there_to_be_read() -> None:
    lab = fake_lab()
    prefilled(lab)
    second = lab.open(2, PROMPT, 2)

    lab.send(second, 100, PROMPT[:10])

    assert second.num_computed == PAGE_TOKENS
    lab.compute(second)
    assert second.num_computed == 110


# --- forks --------------------------------------------------------------------------------------


def test_a_fork_shares_full_pages_and_has_its_own_last_one() -> None:
    lab = fake_lab()
    source = prefilled(lab)

    fork = lab.fork(1, 2, 150)

    assert fork.pages[:2] == source.pages[:2]
    assert not set(fork.pages[2:]) & set(source.pages[2:])
    assert lab.pool.held_by(ALICE) == 6
    for session, tail in ((fork, PROMPT[:30]), (source, PROMPT[100:130])):
        output = lab.run(session, 150, tail)
        assert torch.equal(output, lab.expected([*PROMPT[:150], *tail])[150:])
    lab.close(source)
    lab.assert_counts_are_right()
    output = lab.run(fork, 20, PROMPT[:10])
    assert torch.equal(output, lab.expected([*PROMPT[:20], *PROMPT[:10]])[20:])


# --- room ---------------------------------------------------------------------------------------


def test_cached_pages_are_free_for_everyone_and_the_longest_unused_go_first() -> None:
    lab = fake_lab(num_pages=8)
    lab.close(prefilled(lab, 1))
    other = [token + 1 for token in PROMPT]
    newer = lab.open(2, other, 2)
    lab.run(newer, newer.length, other[:150])
    lab.close(newer)
    assert (lab.pool.num_free, lab.pool.num_cached) == (8, 4)

    lab.open(3, client=BOB, max_tokens=6 * PAGE_TOKENS)

    assert lab.pool.num_cached == 2
    assert lab.open(4, other, 2, max_tokens=2 * PAGE_TOKENS).length == 2 * PAGE_TOKENS
    lab.assert_counts_are_right()


def test_of_one_prefix_the_end_goes_before_the_beginning() -> None:
    lab = fake_lab(num_pages=4)
    lab.close(prefilled(lab))

    blocker = lab.open(2, client=BOB, max_tokens=3 * PAGE_TOKENS)
    lab.close(blocker)

    assert lab.open(3, PROMPT, 2).length == PAGE_TOKENS


def test_a_session_needs_only_pages_that_are_not_shared() -> None:
    lab = fake_lab(num_pages=6, quota_pages=6)
    prefilled(lab)

    with pytest.raises(CacheFull):
        lab.open(3)
    lab.open(2, PROMPT, 2)

    assert (lab.pool.num_free, lab.pool.held_by(ALICE)) == (0, 6)
    assert lab.table.pages_needed(lab.opening(4, keys=keys_of(PROMPT, 2))) == 2


def test_idle_sessions_that_share_pages_are_evicted_if_all_of_them_may_go() -> None:
    lab = fake_lab(num_pages=6)
    prefilled(lab)
    lab.open(2, PROMPT, 2)
    now = EVICT_IDLE_S + 1.0

    gone = [lab.table.reclaim(now, [(BOB, 6)]) for _ in range(3)]

    assert [session is not None for session in gone] == [True, True, False]
    assert lab.open(3, client=BOB, max_tokens=6 * PAGE_TOKENS).length == 0
    lab.assert_counts_are_right()


# --- whatever sessions do -----------------------------------------------------------------------


class Sharing(RuleBasedStateMachine):
    """Sessions of two clients open, step, roll back, fork, close; rows are computed in any order.

    `tokens` are each session's; outputs must be those of its tokens alone. `promised`: prompts.
    """

    @initialize(num_pages=st.integers(4, 14))
    def start(self, num_pages: int) -> None:
        self.lab = fake_lab(num_pages=num_pages, quota_pages=max(1, num_pages // 2))
        self.tokens: dict[int, list[int]] = {}
        self.promised: dict[int, list[int]] = {}
        self.number = 0

    def session(self, number: int) -> Session[Tensor]:
        held = self.lab.table.get(session_id(number))
        assert held is not None
        return held

    def pick(self, data: st.DataObject, numbers: list[int]) -> int:
        return data.draw(st.sampled_from(numbers))

    @property
    def computing(self) -> list[int]:
        return [n for n in self.tokens if self.session(n).running]

    @rule(
        client=st.sampled_from([ALICE, BOB]),
        kind=st.integers(0, 1),
        num_alike=st.integers(0, 3),
        num_keys=st.integers(0, 3),
        num_pages=st.integers(1, 5),
    )
    def open(
        self, client: PeerId, kind: int, num_alike: int, num_keys: int, num_pages: int
    ) -> None:
        """A prompt that is like all others for some pages."""
        alike = num_alike * PAGE_TOKENS
        prompt = [*PROMPT[:alike], *(token + kind for token in PROMPT[alike:])]
        self.number += 1
        keys = keys_of(prompt, num_keys)
        request = self.lab.opening(
            self.number, client=client, max_tokens=num_pages * PAGE_TOKENS, keys=keys
        )
        needed = self.lab.table.pages_needed(request)
        try:
            session = self.lab.table.open(request, self.lab.now)
        except (CacheFull, Busy, BadRequest):
            assert needed > self.lab.pool.num_free or len(self.lab.table) == 16
            return
        self.tokens[self.number] = prompt[: session.length]
        self.promised[self.number] = prompt[: num_keys * PAGE_TOKENS]

    @precondition(lambda self: self.tokens)
    @rule(data=st.data(), num_tokens=st.integers(1, 100), back=st.integers(0, 120))
    def step(self, data: st.DataObject, num_tokens: int, back: int) -> None:
        number = self.pick(data, list(self.tokens))
        session, tokens = self.session(number), self.tokens[number]
        position = max(0, len(tokens) - (back if back > 60 else 0))
        num_tokens = min(num_tokens, session.max_tokens - position)
        if num_tokens < 1 or len(session.running) > 3:
            return
        if position < len(tokens) and session.last_step is not None:
            self.promised[number] = self.promised[number][:position]
        expected = self.promised[number][position : position + num_tokens]
        fresh = data.draw(st.lists(st.integers(0, 250), min_size=1, max_size=3)) * num_tokens
        new = [*expected, *fresh][:num_tokens]
        try:
            self.lab.send(session, position, new)
        except CacheFull:
            return
        self.tokens[number] = [*tokens[:position], *new]

    @precondition(lambda self: self.computing)
    @rule(data=st.data())
    def compute(self, data: st.DataObject) -> None:
        number = self.pick(data, self.computing)
        session = self.session(number)
        queued = self.lab.queues[session.id][0]
        stop = queued.row.position + queued.row.num_tokens
        is_last = len(session.running) == 1
        output = self.lab.compute(session)
        if is_last:
            assert output is not None
            expected = self.lab.expected(self.tokens[number])
            assert torch.equal(output, expected[queued.row.position : stop])

    @precondition(lambda self: self.computing)
    @rule(data=st.data(), has_written=st.booleans())
    def fail(self, data: st.DataObject, has_written: bool) -> None:
        number = self.pick(data, self.computing)
        session = self.session(number)
        row = self.lab.queues[session.id][0].row
        if has_written:
            self.lab.compute(session, is_failing=True)
        else:
            self.lab.fail(session, row)
        # Later rows, that may have rolled back further, are lost with it: what is left is known.
        self.tokens[number] = self.tokens[number][: session.length]
        if session.length < row.position or len(self.tokens[number]) < session.length:
            self.drop(number)

    def drop(self, number: int) -> None:
        self.lab.close(self.session(number))
        del self.tokens[number], self.promised[number]

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        number = self.pick(data, list(self.tokens))
        session = self.session(number)
        position = data.draw(st.integers(0, session.length))
        self.number += 1
        try:
            self.lab.fork(number, self.number, position)
        except (Busy, CacheFull):
            return
        self.tokens[self.number] = self.tokens[number][:position]
        self.promised[self.number] = []

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        self.drop(self.pick(data, list(self.tokens)))

    @rule(seconds=st.sampled_from([1.0, 11.0, LEASE_S]), is_wanted=st.booleans())
    def wait(self, seconds: float, is_wanted: bool) -> None:
        """Leases end, or somebody wants everything."""
        self.lab.now += seconds
        gone = self.lab.table.expire(self.lab.now)
        waiting = [(BOB, self.lab.num_pages)] if is_wanted else []
        while (session := self.lab.table.reclaim(self.lab.now, waiting)) is not None:
            gone.append(session)
        for session in gone:
            number = int.from_bytes(session.id.value, "big")
            self.lab.queues.pop(session.id, None)
            del self.tokens[number], self.promised[number]

    @invariant()
    def all_pages_are_accounted_for(self) -> None:
        self.lab.assert_counts_are_right()

    @invariant()
    def sessions_are_as_long_as_they_should_be(self) -> None:
        for number, tokens in self.tokens.items():
            assert self.session(number).length == len(tokens)

    def teardown(self) -> None:
        for number in list(getattr(self, "tokens", {})):
            self.drop(number)
        if hasattr(self, "lab"):
            assert self.lab.pool.num_free == self.lab.num_pages


TestSharing = Sharing.TestCase
TestSharing.settings = settings(max_examples=50, stateful_step_count=30, deadline=None)


# --- the real model -----------------------------------------------------------------------------


@pytest.mark.parametrize("is_neighbour", [True, False])
def test_logits_of_the_real_model_are_those_without_sharing(is_neighbour: bool) -> None:
    lab, edges = real_lab()
    prompt = [(31 * number + 5) % 97 for number in range(3 * PAGE_TOKENS + 20)]
    alone = lab.expected(prompt)
    first = lab.open(1, prompt, 3)
    lab.run(first, 0, prompt[:100])
    lab.run(first, 100, prompt[100:])
    lab.close(first)
    if not is_neighbour:
        lab.open(3, max_tokens=PAGE_TOKENS)  # takes the page after the shared ones

    second = lab.open(2, prompt, 3)
    assert second.length == 3 * PAGE_TOKENS
    chunk = lab.run(second, second.length, prompt[second.length : -1])
    token = lab.run(second, len(prompt) - 1, prompt[-1:])

    logits = edges.logits(torch.cat([chunk, token]))
    torch.testing.assert_close(logits, edges.logits(alone[3 * PAGE_TOKENS :]), atol=1e-5, rtol=1e-5)


def real_lab() -> tuple[PageLab, Edges]:
    hidden, inner, kv, vocab = 48, 80, 16, 97
    config = ModelConfig(
        model_type="llama",
        hidden_size=hidden,
        num_blocks=2,
        num_heads=6,
        num_kv_heads=2,
        head_dim=8,
        intermediate_size=inner,
        vocab_size=vocab,
        max_position=512,
        norm_eps=1e-5,
    )
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) / shape[-1] ** 0.5

    def block() -> dict[str, Tensor]:
        return {
            "input_layernorm.weight": torch.ones(hidden),
            "post_attention_layernorm.weight": torch.ones(hidden),
            "self_attn.q_proj.weight": random(hidden, hidden),
            "self_attn.k_proj.weight": random(kv, hidden),
            "self_attn.v_proj.weight": random(kv, hidden),
            "self_attn.o_proj.weight": random(hidden, hidden),
            "mlp.gate_proj.weight": random(inner, hidden),
            "mlp.up_proj.weight": random(inner, hidden),
            "mlp.down_proj.weight": random(hidden, inner),
        }

    weights = {
        "model.embed_tokens.weight": random(vocab, hidden),
        "model.norm.weight": torch.ones(hidden),
        "lm_head.weight": random(vocab, hidden),
    }
    device = torch.device("cpu")
    edges = Edges.load(config, weights, dtype=torch.float32, device=device)
    model = SpanModel.load(
        config, Span(0, 2), iter([block(), block()]), dtype=torch.float32, device=device
    )
    return PageLab(model, lambda ids: edges.embed(torch.tensor(ids)), 12, 12), edges
