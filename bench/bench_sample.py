"""One token per row beside plain PyTorch: filters on sorted logits, softmax, multinomial, and the
log-softmax at the token, as generation loops write them. On CUDA beside flashinfer's sampling too, its
softmax included where it wants probabilities; it returns no logprob."""

import cost
import peers
import pytest
import torch

from reasoners import ops

MIXES = {
    "greedy": {"temperature": 0.0},
    "plain": {},
    "top-k 50": {"top_k": 50},
    "top-p 0.95": {"top_p": 0.95},
    "min-p 0.05": {"min_p": 0.05},
    "all": {"temperature": 0.7, "top_k": 50, "top_p": 0.95, "min_p": 0.05},
}


def make(batch, vocabulary, dtype, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    rng_key = torch.zeros(batch, 4, dtype=torch.int64)
    rng_key[:, 2] = torch.arange(batch)
    return {
        "logits": (3 * torch.randn(batch, vocabulary)).to(dtype),
        "temperature": torch.full((batch,), temperature),
        "top_k": torch.full((batch,), top_k, dtype=torch.int32),
        "top_p": torch.full((batch,), top_p),
        "min_p": torch.full((batch,), min_p),
        "rng_key": rng_key,
    }


def warp_and_multinomial(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """One mix for the whole batch."""
    logprobs = logits.float().log_softmax(-1)
    if temperature == 0:
        token = logits.argmax(-1, keepdim=True)
        return token, logprobs.gather(-1, token)
    scores = logits.float() / temperature
    never = float("-inf")
    if top_k > 0:
        scores = scores.masked_fill(scores < scores.topk(top_k).values[:, -1:], never)
    if top_p < 1:
        ordered, order = scores.sort(descending=False)
        drop = ordered.softmax(-1).cumsum(-1) <= 1 - top_p
        scores = scores.masked_fill(drop.scatter(-1, order, drop), never)
    p = scores.softmax(-1)
    if min_p > 0:
        p = p.masked_fill(p < min_p * p.amax(-1, keepdim=True), 0)
    token = p.multinomial(1)
    return token, logprobs.gather(-1, token)


def run(measure, impl, batch, vocabulary, dtype, mix):
    inputs = make(batch, vocabulary, dtype, **MIXES[mix])
    logits = inputs["logits"]
    roof = {
        "num_bytes": cost.sample_bytes(batch, vocabulary, logits.element_size()),
        "tokens": batch,
    }
    if impl == "torch":
        measure(lambda: warp_and_multinomial(logits, **MIXES[mix]), rounds=7, **roof)
    else:
        measure(lambda: ops.sample(**inputs), **roof)


@pytest.mark.parametrize("impl", ["reasoners", "torch"])
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("vocabulary", [49152, 128256])
def bench_sample_by_mix(measure, vocabulary, mix, impl):
    run(measure, impl, 64, vocabulary, torch.float32, mix)


@pytest.mark.parametrize("impl", ["reasoners", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("batch", [1, 16])
def bench_sample_by_batch(measure, batch, dtype, impl):
    run(measure, impl, batch, 128256, dtype, "all")


# ---- CUDA

CUDA_MIXES = MIXES | {"top-k 50, top-p 0.95": {"top_k": 50, "top_p": 0.95}}


def check(tokens, logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """Every token is one that the filters keep, and as probable as draws are on average.

    A token at the edge of a filter may fall on either side of it by rounding: 2 % are let go there.
    """
    logits = logits.double()
    if temperature == 0:
        assert (logits.gather(1, tokens.long()[:, None])[:, 0] == logits.amax(-1)).all()
        return
    score = logits / temperature
    if top_k > 0:
        score = score.masked_fill(score < score.topk(top_k).values[:, -1:], float("-inf"))
    if top_p < 1:
        ordered, order = score.softmax(-1).sort(descending=True)
        above = ordered.cumsum(-1) - ordered
        ties = ordered[:, 1:] == ordered[:, :-1]  # which stay together
        above[:, 1:].masked_fill_(ties, 0)
        past = above.cummax(-1).values >= top_p * 1.02
        score = score.masked_fill(past.scatter(1, order, past), float("-inf"))
    if min_p > 0:
        p = score.softmax(-1)
        score = score.masked_fill(p < 0.98 * min_p * p.amax(-1, keepdim=True), float("-inf"))
    logprob = score.log_softmax(-1)
    drawn = logprob.gather(1, tokens.long()[:, None])[:, 0]
    assert drawn.isfinite().all(), "a token that the filters drop"
    p, finite = logprob.exp(), logprob.masked_fill(logprob.isinf(), 0)
    mean = (p * finite).sum(-1)
    variance = (p * finite.square()).sum(-1) - mean.square()
    off, spread = float((drawn - mean).sum()), float(variance.sum().sqrt())
    assert abs(off) < 6 * spread + 0.02 * len(tokens), "tokens too probable or too improbable"


@pytest.mark.cuda("sample")
@pytest.mark.parametrize("impl", ["reasoners", *peers.SAMPLE])
@pytest.mark.parametrize("mix", CUDA_MIXES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("batch", [1, 64, 512])
def bench_sample_cuda(measure, batch, dtype, mix, impl):
    num_bytes = cost.sample_bytes(batch, 128256, dtype.itemsize)
    filters = CUDA_MIXES[mix]
    torch.manual_seed(0)
    with torch.device("cuda"):
        sets = [make(batch, 128256, dtype, **filters) for _ in range(cost.rotation(num_bytes))]
    roof = {"num_bytes": num_bytes, "tokens": batch}
    with peers.skip_if_it_fails(impl in peers.SAMPLE):
        if impl in peers.SAMPLE:
            prepare = peers.SAMPLE[impl]()
            calls = [prepare(inputs["logits"], **filters) for inputs in sets]
            tokens = calls[0]()
        else:
            calls = [lambda inputs=inputs: ops.sample(**inputs) for inputs in sets]
            tokens, _ = calls[0]()
            roof["target_us"] = {1: 15, 512: 180}.get(batch)
        check(tokens, sets[0]["logits"], **filters)
        measure(calls, **roof)
