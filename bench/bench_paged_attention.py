"""Attention over a paged cache beside PyTorch's SDPA on contiguous K and V of the same dtype.

SDPA is given what it likes best: no pages, equal lengths, K and V gathered beforehand. On CUDA the roof
of decode rows with a prefix reads it once; "plain" is the same call without `shared`. The roof of
prefill is the products' alone.
"""

from functools import partial

import cost
import peers
import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from reasoners import ops, reference

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


# ---- CUDA, bf16 and pages of 16

CASES = {  # lengths, tokens that all rows share
    "1 x 128": ([128], 0),
    "1 x 2048": ([2048], 0),
    "1 x 32768": ([32768], 0),
    "16 x 2048": ([2048] * 16, 0),
    "128 x 1024": ([1024] * 128, 0),
    "512 x 1024": ([1024] * 512, 0),
    "64 of 64 to 4096": ([64 * (1 + 37 * i % 64) for i in range(64)], 0),
    "16 x 1024, prefix 768": ([1024] * 16, 768),
    "64 x 200, prefix 176": ([200] * 64, 176),
    "256 x 768, prefix 512": ([768] * 256, 512),
}
TARGET_US = {
    ("Llama-3.2-1B", "1 x 32768"): 28,
    ("Llama-3.2-3B", "1 x 32768"): 48,
    ("Llama-3.2-1B", "1 x 2048"): 8.9,
    ("Llama-3.2-3B", "1 x 2048"): 10.8,
    ("Llama-3.2-1B", "16 x 2048"): 36,
    ("Llama-3.2-3B", "16 x 2048"): 55,
    ("Llama-3.2-1B", "128 x 1024"): 103,
    ("Llama-3.2-3B", "128 x 1024"): 187,
    ("Llama-3.2-1B", "512 x 1024"): 394,
    ("Llama-3.2-3B", "512 x 1024"): 721,
    ("Llama-3.2-1B", "256 x 768, prefix 512"): 65,
    ("Llama-3.2-3B", "256 x 768, prefix 512"): 115,
}


def make_cuda(lengths, prefix, model):
    heads, kv_heads, head_dim = MODELS[model]
    rows, pages = len(lengths), -(-max(lengths) // 16)
    table = torch.randperm(rows * pages, device="cuda").int().view(rows, pages)
    table[:, : prefix // 16] = table[0, : prefix // 16]
    caches = torch.randn(2, rows * pages, kv_heads, 16, head_dim, device="cuda").bfloat16()
    pairs = [[0, prefix] if prefix else [i, 0] for i in range(rows)]
    return {
        "q": torch.randn(rows, heads, head_dim, device="cuda").bfloat16(),
        "k_cache": caches[0],
        "v_cache": caches[1],
        "page_table": table,
        "cu_seqlens_q": torch.arange(rows + 1, device="cuda").int(),
        "kv_lengths": torch.tensor(lengths, device="cuda").int(),
        "shared": torch.tensor(pairs, device="cuda").int() if prefix else None,
    }


def check_cuda(inputs, y):
    """The first and the last row against float64."""
    for row in (0, len(inputs["kv_lengths"]) - 1):
        alone = {
            **{name: inputs[name] for name in ("k_cache", "v_cache")},
            "q": inputs["q"][row : row + 1],
            "page_table": inputs["page_table"][row : row + 1],
            "cu_seqlens_q": torch.tensor([0, 1]).int(),
            "kv_lengths": inputs["kv_lengths"][row : row + 1],
        }
        pages = alone["page_table"][0].unique()
        for name in ("k_cache", "v_cache"):
            alone[name] = alone[name][pages.long()]
        alone["page_table"] = torch.searchsorted(pages, alone["page_table"]).int()
        alone = {name: value.cpu() for name, value in alone.items()}
        oracle = reference.paged_attention(**{k: reference.widen(v) for k, v in alone.items()})
        reference.assert_close(y[row : row + 1], oracle, reference.paged_attention(**alone), "y")


@pytest.mark.cuda
@pytest.mark.parametrize("impl", ["reasoners", "plain", "torch", *peers.DECODE])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("model", ["Llama-3.2-1B", "Llama-3.2-3B"])
def bench_decode_cuda(measure, model, case, impl):
    lengths, prefix = CASES[case]
    if not prefix and (impl == "plain" or impl.startswith("cascade")):
        pytest.skip("no rows share")
    if impl == "torch" and (prefix or len(set(lengths)) > 1):
        pytest.skip("SDPA takes equal lengths and shares nothing")
    heads, kv_heads, head_dim = MODELS[model]
    num_bytes = cost.paged_attention_bytes(
        lengths, [1] * len(lengths), heads, kv_heads, head_dim, 2, prefix
    )
    torch.manual_seed(0)
    sets = [make_cuda(lengths, prefix, model) for _ in range(cost.rotation(num_bytes))]
    target = TARGET_US.get((model, case)) if impl == "reasoners" else None
    roof = {"num_bytes": num_bytes, "tokens": len(lengths), "target_us": target}
    if impl in peers.DECODE:
        with peers.skip_if_it_fails():
            calls = peers.DECODE[impl]()(sets)
            peers.require_close(calls[0](), ops.paged_attention(**sets[0]))
            measure(calls, **roof)
        return
    if impl == "torch":
        sets = [contiguous(inputs, lengths[0]) for inputs in sets]
        calls = [
            lambda qkv=qkv: F.scaled_dot_product_attention(*qkv, enable_gqa=True) for qkv in sets
        ]
    else:
        if impl == "plain":
            sets = [inputs | {"shared": None} for inputs in sets]
        calls = [lambda inputs=inputs: ops.paged_attention(**inputs) for inputs in sets]
        check_cuda(sets[0], calls[0]())
    measure(calls, **roof)


PREFILLS = {  # rows, new tokens of each, tokens in the cache before
    "8 x 4096": (8, 4096, 0),
    "1 x 8192": (1, 8192, 0),
    "8 x 512 after 3584": (8, 512, 3584),
}


def make_prefill_cuda(rows, queries, cached, model):
    heads, _, head_dim = MODELS[model]
    inputs = make_cuda([cached + queries] * rows, 0, model)
    return inputs | {
        "q": torch.randn(rows * queries, heads, head_dim, device="cuda").bfloat16(),
        "cu_seqlens_q": (torch.arange(rows + 1, device="cuda") * queries).int(),
        "max_queries": queries,
    }


def check_prefill_cuda(inputs, y, rows, queries):
    """A few queries of the first and the last row against float64, each as the last of its row."""
    for row in {0, rows - 1}:
        length = int(inputs["kv_lengths"][row])
        for query in (0, 1, queries // 2 + 5, queries - 1):
            visible, token = length - queries + query + 1, row * queries + query
            pages = inputs["page_table"][row, : -(-visible // 16)].long()
            alone = {
                "q": inputs["q"][token : token + 1],
                **{name: inputs[name][pages] for name in ("k_cache", "v_cache")},
                "page_table": torch.arange(len(pages)).int()[None],
                "cu_seqlens_q": torch.tensor([0, 1]).int(),
                "kv_lengths": torch.tensor([visible]).int(),
            }
            alone = {name: value.cpu() for name, value in alone.items()}
            oracle = reference.paged_attention(**{k: reference.widen(v) for k, v in alone.items()})
            plain = reference.paged_attention(**alone)
            reference.assert_close(y[token : token + 1], oracle, plain, "y")


SDPA = {"torch": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


@pytest.mark.cuda
@pytest.mark.parametrize("impl", ["reasoners", *SDPA])
@pytest.mark.parametrize("case", PREFILLS)
@pytest.mark.parametrize("model", ["Llama-3.2-1B", "Llama-3.2-3B"])
def bench_prefill_cuda(measure, model, case, impl):
    """Share of the roof: of the rate at which the device multiplies matrices."""
    rows, queries, cached = PREFILLS[case]
    heads, kv_heads, head_dim = MODELS[model]
    lengths, counts = [cached + queries] * rows, [queries] * rows
    flops = cost.paged_attention_flops(lengths, counts, heads, head_dim)
    num_bytes = cost.paged_attention_bytes(lengths, counts, heads, kv_heads, head_dim, 2)
    torch.manual_seed(0)
    inputs = make_prefill_cuda(rows, queries, cached, model)
    if impl in SDPA:
        q, k, v = contiguous(inputs, cached + queries)
        mask = causal_lower_right(queries, cached + queries) if cached else None

        def call():
            with sdpa_kernel(SDPA[impl]):
                return F.scaled_dot_product_attention(
                    q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True
                )
    else:
        call = partial(ops.paged_attention, **inputs)

    with peers.skip_if_it_fails(impl in SDPA):
        y = call() if impl == "reasoners" else call().transpose(1, 2).flatten(0, 1)
        check_prefill_cuda(inputs, y, rows, queries)
        measure(
            call, num_bytes=num_bytes, flops=flops, tokens=rows * queries,
            roof_s=flops / cost.device().flops_per_s,
        )  # fmt: skip


@pytest.mark.cuda
@pytest.mark.parametrize("impl", ["reasoners", "composition"])
@pytest.mark.parametrize("batch", [1, 64, 512, 8192])
def bench_rotate_append_kv_cuda(measure, batch, impl):
    heads, kv_heads, head_dim = MODELS["Llama-3.2-1B"]
    num_bytes = 2 * batch * (heads + 2 * kv_heads) * head_dim * 2
    inv_freq = torch.rand(head_dim // 2, device="cuda")

    def prepare():
        inputs = make_cuda([1024 if batch <= 512 else 16] * batch, 0, "Llama-3.2-1B")
        caches = inputs["k_cache"], inputs["v_cache"]
        where = inputs["page_table"], inputs["cu_seqlens_q"], inputs["kv_lengths"]
        qkv = torch.randn(batch, heads + 2 * kv_heads, head_dim, device="cuda").bfloat16()
        if impl == "reasoners":
            return lambda: ops.rotate_append_kv(*caches, qkv, inv_freq, *where)
        _, k, v = qkv.split([heads, kv_heads, kv_heads], 1)
        positions = where[2] - 1

        def composition():
            ops.rotate(qkv[:, :-kv_heads], positions, inv_freq)
            ops.append_kv(*caches, k, v, *where)

        return composition

    measure([prepare() for _ in range(2)], num_bytes=num_bytes, tokens=batch)
