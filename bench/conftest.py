"""Gives each row of a bench its roof and its rate.

Rows marked cuda run on a CUDA device, all others on the CPU: `--device` chooses which of the two. On
CUDA the time is the device's own, between two events.
"""

import json
import math
import os
from pathlib import Path

import cost
import pytest
import torch

PROBE_S = 5e-3  # a round replays at least about this much
ROWS = pytest.StashKey[list]()


def pytest_addoption(parser):
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.addoption("--device", choices=("cpu", "cuda"), default=default)


class DeviceClock:
    """A timer for pytest-benchmark that is moved on by device times that were measured elsewhere."""

    __name__ = "device_clock"

    def __init__(self):
        self.seconds = 0.0

    def __call__(self):
        return self.seconds


CLOCK = DeviceClock()


def pytest_collection_modifyitems(config, items):
    device = config.getoption("--device")
    for item in items:
        if Path(__file__).parent not in item.path.parents:
            continue
        on_cuda = item.get_closest_marker("cuda") is not None
        if on_cuda:
            item.add_marker(pytest.mark.benchmark(timer=CLOCK))
        if on_cuda != (device == "cuda"):
            item.add_marker(pytest.mark.skip(reason=f"not a row of --device {device}"))
        elif on_cuda and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def device_timer(calls, graph):
    """timed() -> device seconds of one call, of closures that are run one after the other.

    graph: capture them, over and over until a replay is long enough, and time the replay.
    """
    torch.cuda.empty_cache()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def once():
        for call in calls:
            call()

    def timed(run, count):
        # The run before fills the queue, so that nothing waits for the host between the events.
        if graph:
            run()
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3 / count

    once()  # compiles what is compiled at first use
    if not graph:
        return lambda: timed(once, len(calls))
    repeats = max(1, math.ceil(PROBE_S / (timed(once, len(calls)) * len(calls))))
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        for _ in range(repeats):
            once()
    return lambda: timed(captured.replay, repeats * len(calls))


@pytest.fixture
def measure(request, benchmark):
    """measure(fn, num_bytes=..., flops=..., tokens=..., rounds=...): time `fn`, note its rates.

    In rows marked cuda, fn may be a list of closures over different inputs, which together exceed the
    L2 cache (cost.rotation says how many); they are captured in one CUDA graph, or with graph=False
    just run. steps: how many calls' worth of work one closure is; bytes, FLOPs, tokens and all times
    are those of one call. roof_s: its least time on this device, by default num_bytes at the copy rate.
    target_us: of an H100, and so adapted to this device's copy rate.

    Returns the median seconds of one call. `extra_info` holds the roof's inputs first (bytes that must
    move, FLOPs), then what was reached.
    """
    on_cuda = request.node.get_closest_marker("cuda") is not None

    def run(
        fn, *, num_bytes=None, flops=None, tokens=None, rounds=15, warmup_rounds=3,
        graph=True, steps=1, target_us=None, roof_s=None,
    ):  # fmt: skip
        with torch.inference_mode():
            if on_cuda:
                timed = device_timer(fn if isinstance(fn, list) else [fn], graph)

                def fn():
                    CLOCK.seconds += timed() / steps

            benchmark.pedantic(fn, rounds=rounds, warmup_rounds=warmup_rounds, iterations=1)
        if benchmark.disabled:
            return None
        median_s = benchmark.stats.stats.median
        info = benchmark.extra_info
        if num_bytes is not None:
            info["bytes"] = num_bytes
            info["gb_per_s"] = round(num_bytes / median_s / 1e9, 2)
            if roof_s is None:
                roof_s = num_bytes / cost.device().bytes_per_s
        if flops is not None:
            info["flops"] = flops
            info["gflop_per_s"] = round(flops / median_s / 1e9, 1)
        if tokens is not None:
            info["tokens_per_s"] = round(tokens / median_s, 1)
        if on_cuda:
            if roof_s is not None:
                info["share_of_roof"] = round(roof_s / median_s, 4)
            if target_us is not None:
                info["target_us"] = round(cost.target_here_us(target_us, num_bytes or 0), 1)
            row = (*split_name(request.node), median_s, dict(info))
            request.config.stash.setdefault(ROWS, []).append(row)
            if "OUT" in os.environ:  # a call that runs out of time has these
                with open(Path(os.environ["OUT"], "rows.jsonl"), "a") as file:
                    file.write(json.dumps(row) + "\n")
        return median_s

    return run


def split_name(item):
    """(bench, parameters but `impl`, impl), as words."""
    params = dict(item.callspec.params) if hasattr(item, "callspec") else {}
    impl = word(params.pop("impl", ""))
    return item.originalname, " ".join(word(v) for v in params.values()), impl


def word(value):
    return str(getattr(value, "__name__", value)).removeprefix("torch.").replace(" ", "")


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter, config):
    rows = config.stash.get(ROWS, [])
    skipped = {
        report.nodeid.rpartition("::")[-1]: report.longrepr[-1].removeprefix("Skipped: ")
        for report in terminalreporter.getreports("skipped")
    }
    absent = {item: reason for item, reason in skipped.items() if reason.startswith("absent: ")}
    if not rows and not absent:
        return
    ours = {(bench, case): s for bench, case, impl, s, _ in rows if impl == "reasoners"}
    write = terminalreporter.write_line
    device = cost.device()
    rates = f"{device.bytes_per_s / 1e12:.2f} TB/s, {device.flops_per_s / 1e12:.0f} TFLOP/s"
    terminalreporter.section(f"{device.name}, roof {rates}")
    wide = max((len(case) for _, case, *_ in rows), default=0)
    order = {row[:2]: i for i, row in reversed(list(enumerate(rows)))}  # by first appearance
    order |= {row[0]: i for i, row in reversed(list(enumerate(rows)))}
    previous = None
    for bench, case, impl, seconds, info in sorted(rows, key=lambda r: (order[r[0]], order[r[:2]])):
        if bench != previous:
            columns = "".join(f"{c:>10}" for c in ("us", "GB/s", "share", "target", "vs ours"))
            write(f"{bench:<{wide + 15}}{columns}{'tokens/s':>12}")
            previous = bench
        share, target = info.get("share_of_roof"), info.get("target_us")
        base = ours.get((bench, case))
        cells = (
            f"{seconds * 1e6:.1f}",
            f"{info['gb_per_s']:.0f}" if "gb_per_s" in info else "",
            f"{share:.1%}" if share is not None else "",
            "" if target is None else f"{'<=' if seconds * 1e6 <= target else 'MISS'} {target:g}",
            f"{seconds / base:.2f}x" if base and impl != "reasoners" else "",
        )
        tokens = f"{info['tokens_per_s']:.0f}" if "tokens_per_s" in info else ""
        write(f"{case:<{wide}}  {impl:<13}{''.join(f'{c:>10}' for c in cells)}{tokens:>12}")
    for item, reason in absent.items():
        write(f"{item}  {reason}")
