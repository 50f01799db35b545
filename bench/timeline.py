"""Of which kernels a decode step, a prefill or a training step consists, and how long each takes.

    python bench/timeline.py decode llamba-1b 512          rows
    python bench/timeline.py prefill llamba-1b 8 4096      prompts and their length
    python bench/timeline.py train llamba-1b 8 2048        sequences and their length, from llama-3.2-1b
    python bench/timeline.py answers llamba-1b             bench_generate.py's, out of the engine

By CUPTI, in the order of the time that they take together. Kernels may overlap: each is counted from when
its first thread block begins, though it may wait then for the one before it. `alone` counts from when all
that began before it had ended, so that it adds up to the time during which the device was busy.
"""

import re
import sys
from collections import defaultdict

import bench_decode
import bench_distill
import bench_generate
import bench_prefill
import torch
from torch.profiler import ProfilerActivity, profile

STEPS = 8  # of a decode loop: states are written every so many


def decode(config, batch):
    return bench_decode.ours(config, int(batch), 512, STEPS), STEPS


def prefill(config, batch, length):
    model = bench_decode.our_model(config)
    return bench_prefill.ours(model, int(batch), int(length), None)[0], 1


def train(config, sequences, length):
    batch = bench_distill.random_batch(128256, int(length), int(sequences))
    stage = bench_distill.STAGES["kl"]
    settings = (stage, batch, "cuda", torch.bfloat16, False)
    return bench_distill.training_step("llama-3.2-1b", config, *settings), 1


def answers(config):
    return bench_generate.answers(config)[0], 1


def kernels_of(call):
    """(name, begin, end) of what one call runs on the device, in microseconds, by begin."""
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        call()
        torch.cuda.synchronize()
    found = [
        (event.name, event.time_range.start, event.time_range.end)
        for event in profiled.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]
    return sorted(found, key=lambda kernel: kernel[1])


def short(name):
    """A kernel's name without what it returns, its parameters and namespaces."""
    name = re.sub(r"\(anonymous namespace\)::|reasoners::|at::native::|^void ", "", name)
    return re.sub(r"\(.*", "", re.sub(r"\(\w+\)(?=[\w-])", "", name))  # of (int)4 the 4 stays


def print_table(kernels, calls):
    """Rows of a kernel: how often a call has it, mean microseconds, those that it has alone, share."""
    rows, ended = defaultdict(lambda: [0, 0.0, 0.0]), kernels[0][1]
    for name, begin, end in kernels:
        row = rows[short(name)]
        row[0] += 1
        row[1] += end - begin
        row[2] += max(end - max(begin, ended), 0)
        ended = max(ended, end)
    span, busy = ended - kernels[0][1], sum(alone for _, _, alone in rows.values())
    print(
        f"{span / calls:.1f} us, device busy for {busy / calls:.1f}, {len(kernels) / calls:g} kernels"
    )
    print(f"{'kernel':70} {'count':>6} {'us':>8} {'alone':>8} {'all':>9} {'share':>6}")
    for name, (count, total, alone) in sorted(rows.items(), key=lambda item: -item[1][2]):
        print(
            f"{name[:70]:70} {count / calls:6.1f} {total / count:8.2f} {alone / count:8.2f} "
            f"{alone / calls:9.1f} {alone / span:6.1%}"
        )


if __name__ == "__main__":
    what, config, *sizes = sys.argv[1:]
    kinds = {"decode": decode, "prefill": prefill, "train": train, "answers": answers}
    call, calls = kinds[what](config, *sizes)
    print(f"{torch.cuda.get_device_name()}: {' '.join(sys.argv[1:])}")
    print_table(kernels_of(call), calls)
