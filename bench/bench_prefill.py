"""Prompt tokens a second through whole models with random weights, up to the last token's logits.

"reasoners" is what the engine does: prompts in pieces, several of them in a pass, states and keys kept
in its cache, the host's part included. "pieces of 512" is the same with smaller ones. Beside them
transformers' Llama with SDPA, the batch in one pass: with its own cache, without one, and without one
compiled, which takes most of a minute for each shape. The roof is the products with the weights at the
matrix rate; attention and scans are not counted as work.
"""

from functools import lru_cache, partial

import cost
import peers
import pytest
import torch
from bench_decode import our_model

from reasoners.engine import Engine, Request, _Run
from reasoners.model import CONFIGS, HybridLM
from reasoners.sampling import SamplingParams

SHAPES = {"1 x 2048": (1, 2048), "8 x 4096": (8, 4096), "64 x 512": (64, 512)}
STUDENTS = ["llamba-1b", "llamba-3b", "mambainllama-1b-mamba2", "llama-3.2-1b"]
TRANSFORMERS = {
    "transformers": {},
    "transformers-uncached": {"keep": False},
    "transformers-compiled": {"keep": False, "backend": "inductor"},
}
ROWS = [
    *((config, impl) for config in STUDENTS for impl in ("reasoners", "pieces of 512")),
    *(("llama-3.2-1b", impl) for impl in TRANSFORMERS),
]


@lru_cache(maxsize=1)
def transformers_model(config, device="cuda", dtype=torch.bfloat16):
    return peers.transformers_model(CONFIGS[config], device, dtype, maskless=True)


def ours(model, batch, length, chunk):
    """prefill() -> (batch, vocabulary) logits after the last tokens, by the engine's own prefill."""
    requests = [
        Request(tuple(torch.randint(model.config.vocab_size, (length,)).tolist()), params)
        for params in [SamplingParams(n=1, max_tokens=1)] * batch
    ]
    engine = Engine(model, max_rows=batch, max_length=length + 1, prefill_chunk=chunk)

    def prefill():
        run = _Run(engine, iter(requests))
        try:
            run._prefill()
            return torch.stack([prompt.logits for prompt in run.prompts])
        finally:
            run.release()

    return prefill, torch.tensor([request.prompt for request in requests], device=model.device)


def flops(config, batch, length):
    """The products with the weights, the head's for the last tokens alone."""
    head = 2 * config.vocab_size * config.d_model
    return cost.decode_step_flops(config, batch * length) - (length - 1) * batch * head


def check(logits, model, tokens):
    """The last row's logits are those of the path with gradients."""
    with torch.no_grad():
        expected = model.head(model.hidden(tokens[-1:])[:, -1])
    peers.require_close(logits[-1:], expected, "logits", most=0.1)


def run(measure, model, batch, length, impl, **settings):
    config = model.config
    prefill, tokens = ours(model, batch, length, 512 if impl == "pieces of 512" else None)
    check(prefill(), model, tokens)
    measure(
        prefill, flops=flops(config, batch, length), tokens=batch * length, rounds=5,
        warmup_rounds=1, **settings,
    )  # fmt: skip


@pytest.mark.parametrize("impl", ["reasoners", "pieces of 512", *TRANSFORMERS])
@pytest.mark.parametrize("config", ["tiny-llama", "tiny-llamba", "tiny-mamba2"])
def bench_prefill_tiny(measure, config, impl):
    if impl in TRANSFORMERS:
        if config != "tiny-llama":
            pytest.skip("transformers has no such model")
        model = transformers_model(config, "cpu", torch.float32)
        settings = TRANSFORMERS[impl]
        if "backend" in settings:  # inductor's code for CPU needs a compiler
            settings = settings | {"backend": "eager"}
        prefill = peers.transformers_prefill(model, 2, 200, **settings)
        assert prefill().shape == (2, 1, CONFIGS[config].vocab_size)
        measure(prefill, flops=flops(CONFIGS[config], 2, 200), tokens=400, rounds=5)
    else:
        run(measure, HybridLM(CONFIGS[config]).eval(), 2, 200, impl)


@pytest.mark.cuda
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("config", "impl"), ROWS)
def bench_prefill(measure, config, impl, shape):
    batch, length = SHAPES[shape]
    work = flops(CONFIGS[config], batch, length)
    timed = partial(measure, graph=False, roof_s=work / cost.device().flops_per_s)
    torch.manual_seed(0)
    if impl in TRANSFORMERS:
        with peers.skip_if_it_fails():
            model = transformers_model(config)
            prefill = peers.transformers_prefill(model, batch, length, **TRANSFORMERS[impl])
            assert prefill().shape == (batch, 1, CONFIGS[config].vocab_size)
            timed(prefill, flops=work, tokens=batch * length, rounds=5, warmup_rounds=1)
        return
    run(timed, our_model(config), batch, length, impl)
