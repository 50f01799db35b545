"""Estimators: coverage and majority-vote accuracy from graded samples, as pure functions.

The samples of a problem are given as `votes` and `correct`, in the order in which they were drawn.
`votes` are class numbers of equivalent answers, -1 for no answer; a class is right if one of its
samples is.
"""

from collections.abc import Sequence
from itertools import combinations
from math import comb

import numpy as np
from numpy.typing import ArrayLike, NDArray


def pass_at_k(n: int, c: int, k: int) -> float:
    """Estimate the probability that at least one of k samples is right.

    `1 - C(n-c, k) / C(n, k)`, without bias for k <= n, as a product of factors in [0, 1].

    Args:
        n: Samples drawn.
        c: Those of them that are right.
        k: Samples of the question.

    Returns:
        The estimate.

    Raises:
        ValueError: Not 0 <= c <= n or not 1 <= k <= n.

    Source: Chen et al. 2021, Evaluating Large Language Models Trained on Code, section 2.1.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass_at_k: expected 0 <= c <= n and 1 <= k <= n, got {n=}, {c=}, {k=}")
    # Fewer than k wrong ones: the product runs through zero.
    return float(1.0 - np.prod(1.0 - k / np.arange(n - c + 1, n + 1))) if n - c >= k else 1.0


def coverage(counts: Sequence[tuple[int, int]], k: int) -> float:
    """Estimate the share of problems that k samples solve at least once.

    Args:
        counts: (samples drawn, right ones) of each problem.
        k: Samples per problem.

    Returns:
        The mean of `pass_at_k`.

    Source: Brown et al. 2024, Large Language Monkeys, section 2.
    """
    return float(np.mean([pass_at_k(n, c, k) for n, c in counts]))


def maj_at_k(
    votes: ArrayLike, correct: ArrayLike, k: int, num_subsets: int = 256, seed: int = 0
) -> float:
    """Estimate the probability that the majority of k samples is right.

    The expectation over subsets of k samples: over all of them where there are no more than
    `num_subsets`, and otherwise over that many random ones. Each sample with an answer has one
    vote. Among classes with equally many votes the one that was drawn first wins. Without any
    vote there is no answer, which counts as wrong.

    Args:
        votes (n): Answer class of each sample, -1 for no answer.
        correct (n): Whether each sample is right.
        k: Samples in a vote.
        num_subsets: The most subsets to look at.
        seed: Seed of the random subsets; equal arguments give equal results.

    Returns:
        The estimate, without bias for k <= n.

    Raises:
        ValueError: `votes` and `correct` differ in length, or not 1 <= k <= n.

    Source: Wang et al. 2023, Self-Consistency Improves Chain of Thought Reasoning.
    """
    votes, correct = np.asarray(votes), np.asarray(correct, dtype=bool)
    n = len(votes)
    if len(correct) != n or not 1 <= k <= n:
        raise ValueError(
            "maj_at_k: expected votes and correct of one length n and 1 <= k <= n, "
            f"got {n} votes, {len(correct)} correct, {k=}"
        )
    if not correct.any():
        return 0.0
    if comb(n, k) <= num_subsets:
        subsets = np.array(list(combinations(range(n), k)))
    else:
        shuffled = np.random.default_rng(seed).random((num_subsets, n)).argpartition(k - 1, axis=1)
        subsets = np.sort(shuffled[:, :k], axis=1)
    num_subsets = len(subsets)
    # One column more than classes: -1 means the last, where samples without an answer gather.
    num_columns = int(votes.max()) + 2
    columns = votes[subsets] % num_columns
    cells = (np.arange(num_subsets)[:, None] * num_columns + columns).ravel()
    num_votes = np.bincount(cells, minlength=num_subsets * num_columns)
    first = np.full(num_subsets * num_columns, k)
    np.minimum.at(first, cells, np.tile(np.arange(k), num_subsets))
    score = (num_votes * (k + 1) - first).reshape(num_subsets, num_columns)
    score[:, -1] = 0  # above classes without votes, below those with one
    class_correct = np.zeros(num_columns, dtype=bool)
    np.logical_or.at(class_correct, votes, correct & (votes >= 0))
    winners = score.argmax(axis=1)
    return float(class_correct[winners].mean())


def majority_over_time(votes: ArrayLike, correct: ArrayLike) -> NDArray[np.bool_]:
    """Tell whether the majority is right after each further sample.

    Args:
        votes (n): Answer class of each sample, -1 for no answer.
        correct (n): Whether each sample is right.

    Returns:
        (n + 1) whether the majority of the first 0, 1, ... n samples is right, with the tie rule
        of `maj_at_k`.
    """
    right = np.zeros(len(votes) + 1, dtype=bool)
    num_votes: dict[int, int] = {}  # in the order in which the classes were drawn
    class_correct: dict[int, bool] = {}
    for index, (vote, is_correct) in enumerate(zip(votes, correct, strict=True)):
        if vote >= 0:
            num_votes[vote] = num_votes.get(vote, 0) + 1
            class_correct[vote] = class_correct.get(vote, False) or bool(is_correct)
        if num_votes:
            right[index + 1] = class_correct[max(num_votes, key=num_votes.__getitem__)]
    return right


def bootstrap_interval(
    values: ArrayLike, level: float = 0.95, seed: int = 0, num_resamples: int = 2000
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Bound the mean over problems by the percentile bootstrap.

    It speaks of other problems of the same kind, not of other samples, and has no width where all
    problems agree.

    Args:
        values (..., problems): A value for each problem; leading axes are further curves or
            points, resampled alike.
        level: Probability mass between the bounds.
        seed: Seed of the resampling; equal arguments give equal results.
        num_resamples: Number of resamples.

    Returns:
        (...) lower and upper bounds.

    Raises:
        ValueError: No problems, or `level` not between 0 and 1.

    Source: Efron 1979, Bootstrap Methods: Another Look at the Jackknife.
    """
    values = np.asarray(values, dtype=np.float64)
    num_problems = values.shape[-1]
    if num_problems == 0 or not 0 < level < 1:
        raise ValueError(
            "bootstrap_interval: expected at least one problem and 0 < level < 1, "
            f"got {num_problems} problems, {level=}"
        )
    weights = np.random.default_rng(seed).multinomial(
        num_problems, np.full(num_problems, 1 / num_problems), size=num_resamples
    )
    means = values @ weights.T / num_problems
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2], axis=-1)
    return low, high
