"""What a server learns of its own speed, from devices whose speed is known."""

import random

import pytest

from p2pllm.server.pace import GROWTH, LEAST_TOKENS, OUTLIER, Pace

CHUNK, BLOCKS = 256, 15


class Device:
    """Takes `start_s` for a batch and `token_s` for each of its tokens; pieces as they fit."""

    def __init__(self, start_s: float, token_s: float, decode_s: float) -> None:
        self.start_s, self.token_s, self.decode_s = start_s, token_s, decode_s
        self.pace = Pace(CHUNK)

    def decode(self, *, times: float = 1.0) -> None:
        self.pace.on_batch(times * self.decode_s, BLOCKS, 0)

    def prefill(self, num_tokens: int, *, times: float = 1.0) -> float:
        seconds = self.start_s + num_tokens * self.token_s
        self.pace.on_batch(times * seconds, BLOCKS, num_tokens)
        return seconds

    def piece(self, times: float = 2.0, most: int = CHUNK) -> int:
        within_s = times * self.pace.decode_s(BLOCKS)
        return self.pace.piece_tokens(within_s, BLOCKS, most)

    def settle(self) -> int:
        """Decode and prefill for a while; returns how long pieces are then."""
        self.decode()
        self.prefill(CHUNK)
        for _ in range(30):
            self.decode()
            self.prefill(self.piece())
        return self.piece()


def cpu() -> Device:
    return Device(0.006, 0.00027, decode_s=0.009)


def gpu() -> Device:
    """Decode batches are recorded, and three times as fast as any other."""
    return Device(0.012, 0.000004, decode_s=0.004)


def test_a_batch_with_a_piece_takes_twice_as_long_as_one_without() -> None:
    device = cpu()

    size = device.settle()

    assert device.prefill(size) == pytest.approx(2 * device.decode_s, rel=0.05)


def test_where_a_whole_chunk_takes_hardly_longer_it_is_the_piece() -> None:
    assert gpu().settle() == CHUNK


def test_that_a_whole_chunk_is_as_fast_is_found_out_late_too() -> None:
    device = gpu()
    device.decode()
    for _ in range(20):  # short prompts only, so far
        device.prefill(device.piece(most=60))
    assert device.piece(most=60) == LEAST_TOKENS

    device.prefill(device.piece())

    assert device.piece() == CHUNK


def test_a_first_whole_chunk_is_tried_to_learn_what_it_takes() -> None:
    device = cpu()
    device.decode()

    assert device.piece() == CHUNK
    device.prefill(CHUNK)
    assert device.piece() < CHUNK // 4


def test_a_piece_has_some_tokens_however_long_they_take() -> None:
    device = Device(0.001, 1.0, decode_s=0.002)

    assert device.settle() == LEAST_TOKENS
    assert device.piece(most=3) == 3


def test_a_server_that_becomes_slower_is_followed() -> None:
    device = cpu()
    device.settle()
    device.token_s *= 2

    for _ in range(20):
        device.prefill(device.piece())

    assert device.prefill(device.piece()) == pytest.approx(2 * device.decode_s, rel=0.1)


def test_a_stall_changes_little() -> None:
    device = cpu()
    size = device.settle()

    device.decode(times=1000)
    assert device.pace.decode_s(BLOCKS) <= (0.8 + 0.2 * OUTLIER) * device.decode_s * 1.001
    device.decode()
    device.prefill(size, times=1000)

    assert device.piece() > size / 2


def test_a_batch_that_was_faster_than_decode_rows_lets_pieces_grow_a_little() -> None:
    device = cpu()
    device.decode()
    device.prefill(CHUNK)
    for _ in range(50):
        device.pace.on_batch(0.0, BLOCKS, 40)

    assert device.piece() == pytest.approx(40 * GROWTH, abs=1)


def test_times_are_told_apart_by_the_number_of_blocks() -> None:
    device = cpu()
    device.settle()

    assert device.pace.decode_s(5) == pytest.approx(device.decode_s / 3)


@pytest.mark.parametrize("seed", range(20))
def test_whatever_is_measured_a_piece_is_within_its_bounds(seed: int) -> None:
    rng, pace = random.Random(seed), Pace(CHUNK)
    for _ in range(300):
        seconds = rng.choice([0.0, 1e-9, 1e-3, 1.0, 1e6])
        pace.on_batch(seconds, rng.randint(1, 80), rng.choice([0, 1, 9, 16, 100, CHUNK]))
        most = rng.randint(1, CHUNK)
        size = pace.piece_tokens(rng.choice([-1.0, 0.0, 1e-3, 1e6]), 15, most)
        assert min(most, LEAST_TOKENS) <= size <= most


def test_prompts_take_longer_while_others_decode_and_their_pieces_are_small() -> None:
    pace = Pace(256)
    assert pace.slowdown(2.0) == 1.0, "nothing is known"
    for _ in range(20):
        pace.on_batch(0.004, 1, 0)
        pace.on_batch(0.008, 1, 20)
        pace.on_batch(0.055, 1, 256)
    slowdown = pace.slowdown(2.0)
    piece = pace.piece_tokens(0.008, 1, 256)
    assert 16 <= piece < 40
    assert 1.5 < slowdown < 4.0


def test_where_whole_chunks_cost_hardly_more_prompts_are_not_slowed_down() -> None:
    pace = Pace(256)
    for _ in range(20):
        pace.on_batch(0.010, 1, 0)
        pace.on_batch(0.020, 1, 20)
        pace.on_batch(0.021, 1, 256)
    assert pace.slowdown(2.0) == 1.0
