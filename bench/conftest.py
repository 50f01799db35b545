"""Gives each row of a bench its roof and its rate."""

import pytest
import torch


@pytest.fixture
def measure(benchmark):
    """measure(fn, bytes=..., flops=..., tokens=..., rounds=...): time `fn`, note its rates.

    Returns the median seconds of one call. `extra_info` holds the roof's inputs first (bytes that must
    move, FLOPs), then what was reached.
    """

    def run(fn, *, num_bytes=None, flops=None, tokens=None, rounds=15, warmup_rounds=3):
        with torch.inference_mode():
            benchmark.pedantic(fn, rounds=rounds, warmup_rounds=warmup_rounds, iterations=1)
        median_s = benchmark.stats.stats.median
        if num_bytes is not None:
            benchmark.extra_info["bytes"] = num_bytes
            benchmark.extra_info["gb_per_s"] = round(num_bytes / median_s / 1e9, 2)
        if flops is not None:
            benchmark.extra_info["flops"] = flops
            benchmark.extra_info["gflop_per_s"] = round(flops / median_s / 1e9, 1)
        if tokens is not None:
            benchmark.extra_info["tokens_per_s"] = round(tokens / median_s, 1)
        return median_s

    return run


@pytest.fixture(scope="session")
def smollm2():
    """The folder of SmolLM2-135M-Instruct, as `reasoners demo` leaves it in the user's cache."""
    from reasoners.cli import smollm2_folder

    try:
        return smollm2_folder()
    except ImportError as error:
        pytest.skip(str(error))
