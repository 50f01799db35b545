"""16 samples of one 100-token prompt: our engine beside transformers' generate, in one run."""

import pytest
import torch

from reasoners.engine import Engine, Request
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
