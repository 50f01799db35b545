"""Tokens a second of a training step, and the share of the GPU's products it reaches (MFU).

FLOPs are those of the products with weights, 6 for a trained weight and token and 2 for a teacher's,
without attention and scans: what recomputation adds is not counted as work. Rows marked cuda train
Llamba-1B from a Llama-3.2-1B's shape with random weights, 16,384 packed tokens a step.
"""

import itertools

import cost
import peers
import pytest
import torch
import torch.nn.functional as F

from reasoners import ops
from reasoners.checkpoint import student_from_teacher
from reasoners.distill.data import Batch
from reasoners.distill.losses import generalized_jsd
from reasoners.distill.objectives import Objective
from reasoners.distill.optimizer import Optimizer, decayed_names
from reasoners.distill.recipe import Stage
from reasoners.model import CONFIGS, HybridLM, parameter_dtype

MIXERS = ("layers.*.mixer.*",)
STAGES = {
    "matrices": Stage("matrices", "matrix_orientation", 1, 1, 1e-4, train=MIXERS),
    "hidden": Stage("hidden", "hidden_alignment", 1, 1, 1e-4, train=MIXERS),
    "kl": Stage("kl", "end_to_end", 1, 1, 1e-4),
}


def random_batch(vocab, length, sequences):
    """Packed sequences of four documents each, every token counted that follows another."""
    tokens = torch.randint(vocab, (1, sequences * length))
    bounds = list(range(0, sequences * length + 1, length // 4))
    targets = torch.cat([torch.arange(a, b - 1) for a, b in itertools.pairwise(bounds)])
    return Batch(
        tokens, torch.tensor(bounds, dtype=torch.int32), targets, tokens[0, targets + 1],
        torch.ones(tokens.numel(), dtype=torch.bool), sequences,
    )  # fmt: skip


def training_step(teacher, student, stage, batch, device, dtype, recompute):
    """step() of forward, backward and AdamW."""
    torch.manual_seed(0)
    with torch.device(device):
        taught = HybridLM(CONFIGS[teacher])
        for name, parameter in taught.named_parameters():
            parameter.data = parameter.data.to(parameter_dtype(name, dtype))
        taught.requires_grad_(False)
        learning = student_from_teacher(taught, CONFIGS[student]).requires_grad_(False)
    for _, parameter in stage.trained(learning):
        parameter.requires_grad_(True)
    objective = Objective(stage, learning, taught, recompute)
    optimizer = Optimizer(
        stage.trained(learning), betas=stage.betas, weight_decay=0.1,
        decayed=decayed_names(learning),
    )  # fmt: skip
    batch = batch.to(device)

    def step():
        with torch.inference_mode(False), torch.enable_grad():
            total, _ = objective(batch)
            (total / objective.count(batch)).backward()
            optimizer.clip(1.0)
            optimizer.step(1e-4)

    return step


def step_flops(teacher, student, tokens):
    """Products with weights: the student's forward and backward, the teacher's forward."""
    per_token = [cost.decode_step_flops(CONFIGS[name], 1) for name in (student, teacher)]
    return tokens * (3 * per_token[0] + per_token[1])


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("student", ["tiny-llamba", "tiny-mamba2"])
def bench_distill_tiny(measure, student, stage):
    if student == "tiny-mamba2" and stage == "matrices":
        pytest.skip("Mamba-2 has no matrix orientation stage")
    batch = random_batch(256, 128, 4)
    settings = (STAGES[stage], batch, "cpu", torch.float32, False)
    step = training_step("tiny-llama", student, *settings)
    flops = step_flops("tiny-llama", student, 512)
    measure(step, flops=flops, tokens=512, rounds=5, warmup_rounds=1)


@pytest.mark.cuda
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("stage", STAGES)
def bench_distill(measure, benchmark, stage, recompute):
    batch = random_batch(128256, 2048, 8)
    settings = (STAGES[stage], batch, "cuda", torch.bfloat16, recompute)
    step = training_step("llama-3.2-1b", "llamba-1b", *settings)
    flops = step_flops("llama-3.2-1b", "llamba-1b", batch.tokens.numel())
    roof_s = flops / cost.device().flops_per_s  # so that the share is MFU
    torch.cuda.reset_peak_memory_stats()
    step()
    benchmark.extra_info["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 1)
    measure(
        step, flops=flops, tokens=batch.tokens.numel(), rounds=5, warmup_rounds=0, graph=False,
        roof_s=roof_s,
    )  # fmt: skip


def composed(logits, taught, labels):
    """distillation_losses by PyTorch's operators and autograd."""
    with torch.inference_mode(False), torch.enable_grad():
        leaf = logits.detach().requires_grad_()
        ce = F.cross_entropy(leaf.detach().float(), labels, reduction="none")
        kl = generalized_jsd(leaf, taught, 1.0)
        return ce, kl, torch.autograd.grad(kl.sum(), leaf)[0]


@pytest.mark.cuda("distillation_losses")
@pytest.mark.parametrize("impl", ["reasoners", "torch"])
def bench_distillation_losses(measure, impl, tokens=2048, vocab=128256):
    """Cross entropy, KL(student || teacher) and its gradient from 16-bit logits, which come and go once."""
    with torch.inference_mode(False):
        logits, taught = (torch.randn(tokens, vocab, device="cuda").bfloat16() for _ in range(2))
        labels = torch.randint(vocab, (tokens,), device="cuda")
    expected, kept = composed(logits, taught, labels), logits.clone()
    found = ops.distillation_losses(kept, taught, labels)
    for name, actual, oracle in zip(("ce", "kl", "gradient"), (*found, kept), expected):
        peers.require_close(actual, oracle, name)
    # Is the gradient's gradient in the next round, which is as much work.
    work = logits.clone()
    calls = {
        "reasoners": lambda: ops.distillation_losses(work, taught, labels),
        "torch": lambda: composed(logits, taught, labels),
    }
    measure(calls[impl], num_bytes=3 * logits.nbytes, tokens=tokens, rounds=5, graph=False)
