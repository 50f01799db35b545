"""One launch each of decode's large kernels, for a profiler that begins when it is told to.

The state update, the fused mixer and its deferred form (Llamba-1B, batch 512, 16-bit states); attention to
1,024 tokens of 512 rows, and to 768 of 256 that share 512 (Llama-3.2-1B); sampling without
a filter and with all.
"""

import bench_mixer_update
import bench_paged_attention
import bench_sample
import torch

from reasoners import ops

BATCH, VOCABULARY = 512, 128256


def calls():
    fused, deferred = (bench_mixer_update.make(BATCH, torch.bfloat16, period) for period in (1, 8))
    heads = bench_mixer_update.HEADS
    x, B, C = (torch.randn(BATCH, heads, 64, device="cuda").bfloat16() for _ in range(3))
    decay = -torch.rand(BATCH, heads, device="cuda")
    yield lambda: ops.state_update(fused["state"], fused["slots"], x, decay, B, C)
    yield lambda: ops.discrete_mamba2_update(**fused)
    yield lambda: ops.discrete_mamba2_update(**deferred)
    for case in ("512 x 1024", "256 x 768, prefix 512"):
        inputs = bench_paged_attention.make_cuda(*bench_paged_attention.CASES[case], "Llama-3.2-1B")
        yield lambda inputs=inputs: ops.paged_attention(**inputs)
    for mix in ("plain", "all"):
        with torch.device("cuda"):
            inputs = bench_sample.make(BATCH, VOCABULARY, torch.bfloat16, **bench_sample.MIXES[mix])
        yield lambda inputs=inputs: ops.sample(**inputs)


if __name__ == "__main__":
    for call in calls():
        call()  # once for what only a first call does
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        call()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
