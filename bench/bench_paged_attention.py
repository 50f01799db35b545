"""Attention over a paged cache beside PyTorch's SDPA on contiguous K and V of the same dtype.

SDPA is given what it likes best: no pages, equal lengths, K and V gathered beforehand.
"""

import cost
import pytest
import torch
import torch.nn.functional as F

from reasoners import ops

MODELS = {  # heads, kv_heads, head_dim
    "SmolLM2-135M": (9, 3, 64),
    "Llama-3.2-1B": (32, 8, 64),
    "Llama-3.2-3B": (24, 8, 128),
}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
IMPLS = pytest.mark.parametrize("impl", ["reasoners", "torch"])


def make(batch, length, queries, model, page_size, dtype, prefix=0):
    """Rows on scattered pages; their first `prefix` positions are shared."""
    heads, kv_heads, head_dim = MODELS[model]
    pages = -(-length // page_size)
    table = torch.randperm(batch * pages).int().view(batch, pages)
    table[:, : prefix // page_size] = table[0, : prefix // page_size]
    caches = torch.randn(2, batch * pages, kv_heads, page_size, head_dim).to(dtype)
    return {
        "q": torch.randn(batch * queries, heads, head_dim).to(dtype),
        "k_cache": caches[0],
        "v_cache": caches[1],
        "page_table": table,
        "cu_seqlens_q": (torch.arange(batch + 1) * queries).int(),
        "kv_lengths": torch.full((batch,), length, dtype=torch.int32),
    }


def contiguous(inputs, length):
    """q, k, v as (batch, heads, length, head_dim)."""
    batch = len(inputs["kv_lengths"])
    q = inputs["q"].unflatten(0, (batch, -1)).transpose(1, 2).contiguous()
    table = inputs["page_table"].long()
    k, v = (inputs[c][table].transpose(1, 2).flatten(2, 3) for c in ("k_cache", "v_cache"))
    return q, k[:, :, :length].contiguous(), v[:, :, :length].contiguous()


def run(measure, impl, batch, length, queries, model, page_size, dtype, prefix=0):
    inputs = make(batch, length, queries, model, page_size, dtype, prefix)
    q, k, v = contiguous(inputs, length)
    expected = F.scaled_dot_product_attention(q, k, v, enable_gqa=True, is_causal=queries > 1)
    y = ops.paged_attention(**inputs).unflatten(0, (batch, -1)).transpose(1, 2)
    torch.testing.assert_close(y, expected, rtol=0.02, atol=0.02)

    heads, kv_heads, head_dim = MODELS[model]
    lengths, counts = [length] * batch, [queries] * batch
    data_bytes = y.element_size()
    roof = {
        "num_bytes": cost.paged_attention_bytes(
            lengths, counts, heads, kv_heads, head_dim, data_bytes
        ),
        "flops": cost.paged_attention_flops(lengths, counts, heads, head_dim),
        "tokens": batch * queries,
    }
    if impl == "torch":
        measure(
            lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True, is_causal=queries > 1),
            **roof,
        )
    else:
        measure(lambda: ops.paged_attention(**inputs), **roof)


@IMPLS
@DTYPES
@pytest.mark.parametrize("batch", [1, 16, 64])
@pytest.mark.parametrize("model", MODELS)
def bench_decode_by_batch(measure, model, batch, dtype, impl):
    run(measure, impl, batch, 512, 1, model, 16, dtype)


@IMPLS
@DTYPES
@pytest.mark.parametrize("length", [128, 512, 2048])
@pytest.mark.parametrize("page_size", [16, 64])
def bench_decode_by_length(measure, page_size, length, dtype, impl):
    run(measure, impl, 8192 // length, length, 1, "SmolLM2-135M", page_size, dtype)


@DTYPES
@pytest.mark.parametrize("prefix", [0, 512, 1024])
def bench_decode_shared_prefix(measure, prefix, dtype):
    """64 samples of one prompt; what a prefix saves is the difference to prefix 0."""
    run(measure, "reasoners", 64, 1024, 1, "SmolLM2-135M", 16, dtype, prefix)


@IMPLS
@DTYPES
@pytest.mark.parametrize("model", MODELS)
def bench_prefill(measure, model, dtype, impl):
    run(measure, impl, 1, 1024, 1024, model, 16, dtype)


@pytest.mark.parametrize("impl", ["reasoners", "index_put"])
@pytest.mark.parametrize("queries", [1, 64])
def bench_append_kv(measure, queries, impl):
    inputs = make(64, 512, queries, "SmolLM2-135M", 16, torch.float32)
    tokens = inputs.pop("q").shape[0]
    k, v = torch.randn(2, tokens, *inputs["k_cache"].shape[1::2])
    position = (512 - queries + torch.arange(queries)).repeat(64, 1)
    page = inputs["page_table"].long().gather(1, position // 16).flatten()
    slot = (position % 16).flatten()

    def index_put():
        inputs["k_cache"][page, :, slot] = k
        inputs["v_cache"][page, :, slot] = v

    append = index_put if impl == "index_put" else lambda: ops.append_kv(k=k, v=v, **inputs)
    measure(append, num_bytes=4 * k.numel() * k.element_size(), tokens=tokens)
