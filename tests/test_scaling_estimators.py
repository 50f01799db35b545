from itertools import combinations
from math import comb

import numpy as np
import pytest

from reasoners.scaling.estimators import (
    bootstrap_interval,
    coverage,
    maj_at_k,
    majority_over_time,
    pass_at_k,
)


@pytest.mark.parametrize(
    ("n", "c", "k", "expected"),
    [
        (1, 0, 1, 0.0),
        (1, 1, 1, 1.0),
        (4, 1, 1, 1 / 4),
        (4, 1, 2, 1 / 2),
        (5, 2, 3, 1 - 1 / 10),
        (10, 3, 4, 1 - 35 / 210),
        (10, 7, 4, 1.0),
        (10, 0, 10, 0.0),
        (10, 1, 10, 1.0),
        (10_000, 1, 100, 0.01),
    ],
)
def test_pass_at_k(n, c, k, expected):
    assert pass_at_k(n, c, k) == pytest.approx(expected, rel=1e-12)


def test_pass_at_k_where_binomials_overflow_a_float():
    n, c, k = 10_000, 3_000, 50
    exact = 1 - comb(n - c, k) / comb(n, k)  # of exact integers
    assert pass_at_k(n, c, k) == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 1), (4, -1, 1), (4, 1, 5), (4, 1, 0), (0, 0, 1)])
def test_pass_at_k_rejects(n, c, k):
    with pytest.raises(ValueError, match=f"got n={n}, c={c}, k={k}"):
        pass_at_k(n, c, k)


def test_coverage():
    assert coverage([(4, 1), (4, 0), (4, 4)], k=1) == pytest.approx((0.25 + 0 + 1) / 3)
    assert coverage([(4, 1), (4, 0), (8, 1)], k=2) == pytest.approx((0.5 + 0 + 0.25) / 3)


@pytest.mark.parametrize(
    ("votes", "correct", "k", "expected"),
    [
        # one vote is one sample
        ([0, 1, 1, 2], [1, 0, 0, 0], 1, 1 / 4),
        # all samples: the largest class wins
        ([0, 1, 1, 2], [0, 1, 1, 0], 4, 1.0),
        ([0, 1, 1, 2], [1, 0, 0, 0], 4, 0.0),
        # a tie goes to the class drawn first
        ([0, 1, 1, 0], [1, 0, 0, 1], 4, 1.0),
        ([0, 1, 1, 0], [0, 1, 1, 0], 4, 0.0),
        # ... first in the subset: of {01, 01, 00, 11, 10, 10} the last three are right
        ([0, 1, 1, 0], [0, 1, 1, 0], 2, 3 / 6),
        # subsets 011 011 000 110 ... of three: 0-1-1, 0-1-0, 0-1-0, 1-1-0
        ([0, 1, 1, 0], [0, 1, 1, 0], 3, 2 / 4),
        # no answer casts no vote, and outvotes nobody
        ([-1, -1, -1, 0], [0, 0, 0, 1], 4, 1.0),
        ([-1, -1, -1, 0], [0, 0, 0, 1], 2, 3 / 6),
        ([-1, -1], [0, 0], 2, 0.0),
        # a class is right if one of its samples is (the verifier failed on the other)
        ([0, 0, 1], [0, 1, 0], 3, 1.0),
    ],
)
def test_maj_at_k(votes, correct, k, expected):
    assert maj_at_k(votes, correct, k) == pytest.approx(expected)


def by_definition(votes, correct, k):
    """The expectation over all subsets, one by one."""
    right = []
    for subset in combinations(range(len(votes)), k):
        cast = [votes[i] for i in subset if votes[i] >= 0]
        winner = max(cast, key=lambda vote: (cast.count(vote), -cast.index(vote)), default=None)
        right.append(any(correct[i] for i in range(len(votes)) if votes[i] == winner))
    return np.mean(right)


def test_maj_at_k_by_definition():
    rng = np.random.default_rng(1)
    for _ in range(30):
        votes = rng.integers(-1, 4, size=9)
        correct = votes == 2
        for k in (1, 2, 4, 5, 9):
            exact = by_definition(votes.tolist(), correct, k)
            assert maj_at_k(votes, correct, k) == pytest.approx(exact, abs=1e-12)
    votes = rng.integers(-1, 4, size=14)  # 3003 subsets of 6, so 3000 are drawn at random
    exact = by_definition(votes.tolist(), votes == 2, 6)
    assert 0.1 < exact < 0.9
    estimate = maj_at_k(votes, votes == 2, 6, num_subsets=3000)
    # Their standard error is at most 0.5 / sqrt(3000) = 0.009.
    assert estimate == pytest.approx(exact, abs=0.03) and estimate != exact


def test_maj_at_k_is_deterministic():
    votes = np.random.default_rng(0).integers(0, 5, size=64)
    first = maj_at_k(votes, votes == 0, 8, seed=3)
    assert maj_at_k(votes, votes == 0, 8, seed=3) == first
    assert maj_at_k(votes, votes == 0, 8, seed=4) != first


def test_maj_at_k_rejects():
    with pytest.raises(ValueError, match="got 2 votes, 1 correct, k=1"):
        maj_at_k([0, 1], [True], 1)
    with pytest.raises(ValueError, match="got 2 votes, 2 correct, k=3"):
        maj_at_k([0, 1], [True, False], 3)


def test_majority_over_time():
    votes = [-1, 0, 1, 1, 0, 0]
    correct = [vote == 1 for vote in votes]
    # Ahead: nobody, nobody, 0, 0 (tie), 1, 0 (tie), 0.
    expected = [False, False, False, False, True, False, False]
    assert majority_over_time(votes, correct).tolist() == expected


def test_bootstrap_interval():
    low, high = bootstrap_interval([0.5, 0.5, 0.5])
    assert (low, high) == (0.5, 0.5)
    # 400 problems, half of them solved: the mean has standard error 0.025, its 95 % is +-0.049.
    values = np.arange(400) % 2
    low, high = bootstrap_interval(values)
    assert low == pytest.approx(0.451, abs=0.006) and high == pytest.approx(0.549, abs=0.006)
    low, high = bootstrap_interval(values, level=0.5)
    assert low == pytest.approx(0.483, abs=0.006) and high == pytest.approx(0.517, abs=0.006)


def test_bootstrap_interval_of_several_curves():
    values = np.stack([np.arange(50) % 2, np.arange(50) % 5 == 0])
    low, high = bootstrap_interval(values)
    assert low.shape == high.shape == (2,)
    # Resampled alike, and equal to each one alone.
    for row in range(2):
        alone = bootstrap_interval(values[row])
        assert (low[row], high[row]) == pytest.approx(alone)
    # Another seed, another interval (40 quantiles, as each is one of 51 values only).
    levels = np.linspace(0.1, 0.9, 20)
    first, same, other = (
        [bootstrap_interval(values, x, seed) for x in levels] for seed in (0, 0, 1)
    )
    assert np.array_equal(first, same) and not np.array_equal(first, other)


def test_bootstrap_interval_rejects():
    with pytest.raises(ValueError, match="got 0 problems"):
        bootstrap_interval([])
    with pytest.raises(ValueError, match=r"level=1\.5"):
        bootstrap_interval([1.0], level=1.5)
