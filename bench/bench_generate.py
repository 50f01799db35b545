"""Whole answers out of the engine: prompts, forks, draws and the host's part of it.

On the CPU beside transformers' generate, in one run. On CUDA with random weights, beside the same engine
whose device waits while the host reads what was drawn; the roof is that of its decode steps alone.
"""

import random

import cost
import pytest
import torch
from bench_decode import our_model

from reasoners.engine import Engine, Request
from reasoners.model import CONFIGS
from reasoners.sampling import SamplingParams

PROMPT_TOKENS, NEW_TOKENS = 100, 64


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def dtype(request):
    return request.param


def ours(folder, dtype, samples):
    from reasoners.checkpoint import load_model

    model = load_model(folder, dtype=dtype)
    engine = Engine(model, max_rows=samples, max_length=PROMPT_TOKENS + NEW_TOKENS)
    params = SamplingParams(n=samples, max_tokens=NEW_TOKENS, ignore_eos=True)
    prompt = tuple(range(1000, 1000 + PROMPT_TOKENS))

    def generate():
        finished = [s for s in engine.run([Request(prompt, params)]) if s is not None]
        assert sum(len(s.token_ids) for s in finished) == samples * NEW_TOKENS

    return generate


def theirs(folder, dtype, samples):
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder, dtype=dtype)
    model.generation_config.eos_token_id = None
    prompt = torch.arange(1000, 1000 + PROMPT_TOKENS)[None]

    def generate():
        tokens = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=True, top_k=0,
            num_return_sequences=samples, max_new_tokens=NEW_TOKENS, pad_token_id=0,
        )  # fmt: skip
        assert tokens.shape == (samples, PROMPT_TOKENS + NEW_TOKENS)

    return generate


@pytest.mark.parametrize("impl", [ours, theirs], ids=["reasoners", "transformers"])
@pytest.mark.parametrize("samples", [1, 16, 64])
def bench_generate(measure, smollm2, samples, dtype, impl):
    generate = impl(smollm2, dtype, samples)
    measure(generate, tokens=samples * NEW_TOKENS, rounds=3, warmup_rounds=1)


ROWS, GROUPS, SAMPLES = 512, 64, 32


def answers(config, ahead=1):
    """run() of an engine, and its requests: 64 prompts of 100 tokens, 32 samples of 64 to 512 tokens each."""
    dice = random.Random(0)
    requests = [
        Request(
            tuple(dice.randrange(1000, 100_000) for _ in range(PROMPT_TOKENS)),
            SamplingParams(n=SAMPLES, max_tokens=dice.randint(64, 512), temperature=0.8),
        )
        for _ in range(GROUPS)
    ]
    engine = Engine(
        our_model(config), max_rows=ROWS, max_length=PROMPT_TOKENS + 512,
        state_dtype=torch.bfloat16, ahead=ahead,
    )  # fmt: skip
    engine.loop.capture()

    def run():
        return sum(len(s.token_ids) for s in engine.run(requests) if s is not None)

    return run, requests


@pytest.mark.cuda
@pytest.mark.parametrize("impl", ["reasoners", "in turns"])
@pytest.mark.parametrize("config", ["llamba-1b", "llama-3.2-1b"])
def bench_generate_cuda(measure, config, impl):
    run, requests = answers(config, ahead=int(impl == "reasoners"))
    lengths = [request.params.max_tokens for request in requests]
    tokens = SAMPLES * sum(lengths)

    def generate():
        assert run() == tokens

    mean = PROMPT_TOKENS + sum(n * n / 2 for n in lengths) / sum(lengths)
    measure(
        generate,
        tokens=tokens,
        roof_s=tokens / ROWS * cost.roof_s(CONFIGS[config], ROWS, mean, 2),
        rounds=1,
        warmup_rounds=0,
        graph=False,
    )
