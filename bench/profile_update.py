"""One launch each of the state update, the fused mixer and its deferred form, for a profiler:
Llamba-1B, batch 512, 16-bit states. Every kernel runs twice; skip the first three launches."""

import torch
from bench_mixer_update import HEADS, make

from reasoners import ops

BATCH = 512

if __name__ == "__main__":
    fused, deferred = (make(BATCH, torch.bfloat16, period) for period in (1, 8))
    x, B, C = (torch.randn(BATCH, HEADS, 64, device="cuda").bfloat16() for _ in range(3))
    decay = -torch.rand(BATCH, HEADS, device="cuda")
    for _ in range(2):
        ops.state_update(fused["state"], fused["slots"], x, decay, B, C)
        ops.discrete_mamba2_update(**fused)
        ops.discrete_mamba2_update(**deferred)
        torch.cuda.synchronize()
