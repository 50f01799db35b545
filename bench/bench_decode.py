"""Tokens a second of whole decode steps, with random weights.

A row's roof is cost.roof_s at its mean length: the weights, states, keys and values at the copy rate,
or the matrix products where they take longer than the weights.
"""

from functools import lru_cache

import cost
import peers
import pytest
import torch

from reasoners.cache import Cache
from reasoners.decode import DecodeLoop, Row
from reasoners.model import CONFIGS, HybridLM, parameter_dtype
from reasoners.sampling import SamplingParams


@lru_cache(maxsize=1)
def transformers_model(config):
    return peers.transformers_model(CONFIGS[config])


def theirs(config, batch, prompt, new):
    """decode() -> (batch, new) tokens, after `prompt` cached ones."""
    return peers.transformers_decoder(transformers_model(config), batch, prompt, new)


@lru_cache(maxsize=1)
def our_model(config):
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            model = HybridLM(CONFIGS[config]).eval()
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.to(parameter_dtype(name, torch.bfloat16))
        return model
    finally:
        torch.set_default_dtype(before)


def ours(config, batch, prompt, new, state_dtype=torch.bfloat16):
    """The same on our decode loop; the prompt's keys, values and states are random."""
    model = our_model(config)
    cache = Cache(
        model, num_slots=batch, max_length=prompt + new, state_dtype=state_dtype, period=8
    )
    for layer in cache.layers:
        tensors = layer.slot_tensors() if hasattr(layer, "scan") else (layer.k, layer.v)
        for tensor in tensors:
            tensor.normal_(std=0.1)
    slots = [cache.allocate(prompt + new) for _ in range(batch)]
    loop = DecodeLoop(model, cache, max_rows=batch, max_steps=new)
    rows = [Row(slot, 1 + slot, prompt, new, (0, 0, slot), (), SamplingParams()) for slot in slots]

    def decode():
        loop.load(rows)
        loop.start(new)
        return loop.drawn.T

    return decode


def ours_fp32(config, batch, prompt, new):
    return ours(config, batch, prompt, new, torch.float32)


IMPLEMENTATIONS = {"reasoners": ours, "reasoners-fp32-state": ours_fp32, "transformers": theirs}
STATE_BYTES = {"reasoners": 2}
ROWS = [
    *((config, "transformers") for config in ("llama-3.2-1b", "llama-3.2-3b")),
    ("llama-3.2-1b", "reasoners"),
    ("llamba-1b", "reasoners"),
    ("llamba-1b", "reasoners-fp32-state"),
    ("llamba-3b", "reasoners"),
    ("llamba-8b", "reasoners"),
    ("mambainllama-1b", "reasoners"),
    ("mambainllama-1b-mamba2", "reasoners"),
    ("mambainllama-3b", "reasoners"),
    ("mambainllama-3b-mamba2", "reasoners"),
]


@pytest.mark.cuda
@pytest.mark.parametrize("batch", [1, 16, 64, 256, 512])
@pytest.mark.parametrize(("prompt", "new"), [(1, 128), (256, 128), (1, 512)])
@pytest.mark.parametrize(("config", "impl"), ROWS)
def bench_decode(measure, config, impl, prompt, new, batch):
    decode = IMPLEMENTATIONS[impl](config, batch, prompt, new)
    held = torch.cuda.memory_allocated()  # weights, states, keys and values, buffers of rows
    torch.cuda.reset_peak_memory_stats()
    config, state_bytes = CONFIGS[config], STATE_BYTES.get(impl, 4)
    tokens = decode()
    assert tokens.shape == (batch, new)
    assert tokens.min() >= 0 and tokens.max() < config.vocab_size
    if impl != "transformers":
        assert torch.cuda.max_memory_allocated() <= 1.1 * held  # no step's logits are kept
    length = prompt + (new + 1) / 2  # tokens that a step attends to, on average
    measure(
        decode,
        num_bytes=round(cost.decode_step_bytes(config, batch, length, state_bytes)),
        flops=cost.decode_step_flops(config, batch),
        tokens=batch,
        roof_s=cost.roof_s(config, batch, length, state_bytes),
        rounds=3,
        warmup_rounds=0,
        graph=False,
        steps=new,
    )
