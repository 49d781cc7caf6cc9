import math

import pytest
import torch

from p2pllm.errors import ConfigError
from p2pllm.model.sampling import Draw, SamplingParams, sample, uniform


def draws(count: int, sequence: int = 0) -> list[Draw]:
    return [Draw(sequence, position) for position in range(count)]


def many(logits: list[float], params: SamplingParams, count: int) -> list[int]:
    """Tokens of `count` positions that all have the same logits."""
    return sample(torch.tensor(logits).expand(count, -1), [params] * count, draws(count))


def test_temperature_zero_takes_the_first_of_the_largest() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0, 1.0], [5.0, 5.0, 5.0, 5.0]])
    assert sample(logits, [SamplingParams()] * 2, draws(2)) == [1, 0]


def test_frequencies_are_the_probabilities() -> None:
    probs = [0.5, 0.25, 0.2, 0.05]
    count = 4000
    tokens = many([math.log(p) for p in probs], SamplingParams(temperature=1.0, seed=3), count)
    chi_squared = sum((tokens.count(i) - count * p) ** 2 / (count * p) for i, p in enumerate(probs))
    assert chi_squared < 11.3  # 99 % of true samples, 3 degrees of freedom


def test_temperature_sharpens() -> None:
    logits = [math.log(p) for p in (0.6, 0.4)]
    tokens = many(logits, SamplingParams(temperature=0.5, seed=1), 4000)
    assert abs(tokens.count(0) / 4000 - 0.36 / 0.52) < 0.03


def test_the_smallest_temperature_is_greedy() -> None:
    assert set(many([1.0, 2.0, 1.5], SamplingParams(temperature=1e-300), 20)) == {1}


def test_top_k_keeps_the_most_probable() -> None:
    tokens = many([0.1, 0.4, 0.2, 0.3], SamplingParams(temperature=5.0, top_k=2), 200)
    assert set(tokens) == {1, 3}


@pytest.mark.parametrize(("top_p", "kept"), [(0.5, {0}), (0.51, {0, 1}), (0.8, {0, 1, 2})])
def test_top_p_keeps_the_fewest_that_reach_it(top_p: float, kept: set[int]) -> None:
    logits = [math.log(p) for p in (0.5, 0.25, 0.2, 0.05)]
    params = SamplingParams(temperature=1.0, top_p=top_p - 1e-6)
    assert set(many(logits, params, 300)) == kept


def test_top_p_counts_what_top_k_has_left() -> None:
    logits = [math.log(p) for p in (0.4, 0.3, 0.2, 0.1)]
    params = SamplingParams(temperature=1.0, top_k=2, top_p=0.55)  # of 0.7: 0.4 is enough
    assert set(many(logits, params, 200)) == {0}


def test_a_nucleus_larger_than_the_guess_is_found() -> None:
    params = SamplingParams(temperature=1.0, top_p=0.9)
    tokens = many([0.0] * 5000, params, 400)
    assert len(set(tokens)) > 300
    assert len({token // 1000 for token in tokens}) == 5


def test_a_draw_depends_on_seed_sequence_and_position_only() -> None:
    torch.manual_seed(0)
    logits = torch.randn(6, 50)
    params = SamplingParams(temperature=1.0, seed=9)
    places = [Draw(sequence, position) for sequence in (0, 1) for position in (4, 5, 6)]
    together = sample(logits, [params] * 6, places)
    alone = [sample(logits[i : i + 1], [params], places[i : i + 1])[0] for i in range(6)]
    backwards = sample(logits.flip(0), [params] * 6, places[::-1])[::-1]
    assert together == alone == backwards


def test_seeds_sequences_and_positions_all_matter() -> None:
    numbers = {
        uniform(seed, Draw(sequence, position))
        for seed in range(10)
        for sequence in range(10)
        for position in range(10)
    }
    assert len(numbers) == 1000
    assert all(0.0 <= number < 1.0 for number in numbers)
    assert abs(sum(numbers) / 1000 - 0.5) < 0.03


def test_a_draw_stays_what_it_was_in_earlier_versions() -> None:
    assert uniform(1, Draw(2, 3)) == 0.942775585467353


@pytest.mark.parametrize(
    "wrong",
    [{"temperature": -1.0}, {"temperature": math.nan}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 2}],
)
def test_senseless_settings_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        SamplingParams(**wrong)  # type: ignore[arg-type]


def test_a_banned_token_is_never_chosen() -> None:
    logits = torch.tensor([[1.0, 5.0, 2.0]]).repeat(200, 1)
    draws = [Draw(0, position) for position in range(200)]
    greedy = SamplingParams(banned_ids=(1,))
    sampled = SamplingParams(temperature=1.0, seed=3, banned_ids=(1,))
    assert sample(logits, [greedy] * 200, draws) == [2] * 200
    assert set(sample(logits, [sampled] * 200, draws)) == {0, 2}


def test_each_row_is_drawn_by_its_own_params_whatever_stands_beside_it() -> None:
    logits = torch.randn(7, 3000, generator=torch.Generator().manual_seed(0))
    params = [
        SamplingParams(),
        SamplingParams(temperature=0.7, seed=1),
        SamplingParams(banned_ids=(int(logits[2].argmax()), 5)),
        SamplingParams(temperature=1.2, top_k=40, seed=2),
        SamplingParams(temperature=0.9, top_p=0.8, seed=3, banned_ids=(int(logits[4].argmax()),)),
        SamplingParams(),
        SamplingParams(temperature=2.0, top_p=0.99, seed=4),
    ]
    before = logits.clone()

    together = sample(logits, params, draws(7))

    alone = [sample(logits[i : i + 1], [params[i]], [Draw(0, i)])[0] for i in range(7)]
    assert together == alone
    assert logits.equal(before)
    assert (together[0], together[5]) == (int(logits[0].argmax()), int(logits[5].argmax()))
    assert together[2] == int(logits[2].topk(2).indices[1])
