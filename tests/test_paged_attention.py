"""append_kv and paged_attention."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from cases import PAGED_ATTENTION_CASES

from reasoners import ops, reference
from reasoners.reference import append_kv_inputs, assert_close, paged_attention_inputs, widen

CASES = pytest.mark.parametrize(
    "case", PAGED_ATTENTION_CASES.values(), ids=PAGED_ATTENTION_CASES.keys()
)
# What CUDA has instead of float64 is float16.
ON_CUDA = {k: v for k, v in PAGED_ATTENTION_CASES.items() if v.get("dtype") != torch.float64} | {
    f"{k}, fp16": {**PAGED_ATTENTION_CASES[k], "dtype": torch.float16}
    for k in (
        "base", "group 5", "D 128, Llama-3.2-3B", "D 96", "odd D", "prefill after a prefix",
        "prefill, prime lengths", "prefill, ragged and padding rows", "prefill, group 3, D 128",
        "prefill, group 8, D 96", "prefill, large scores, bf16", "prefill, around steps",
        "prefill, group 16, D 128",
    )
}  # fmt: skip
CUDA_CASES = pytest.mark.parametrize("case", ON_CUDA.values(), ids=ON_CUDA.keys())


def to_device(inputs, device):
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}


def check(case, device="cpu"):
    inputs = paged_attention_inputs(**case)
    oracle = reference.paged_attention(**{k: widen(v) for k, v in inputs.items()})
    plain = reference.paged_attention(**inputs)
    y = ops.paged_attention(**to_device(inputs, device))
    assert y.dtype == inputs["q"].dtype
    assert_close(y, oracle, plain, "y")

    same, lse = ops.paged_attention(**to_device(inputs, device), return_lse=True)
    assert torch.equal(same, y)
    # Always in float32, so plain PyTorch is given that too.
    wide = torch.promote_types(y.dtype, torch.float32)
    exact, close = (
        reference.paged_attention(
            **{k: v.to(t) if k in ("q", "k_cache", "v_cache") else v for k, v in inputs.items()},
            return_lse=True,
        )[1]
        for t in (torch.float64, wide)
    )
    assert lse.dtype == wide
    assert_close(lse, exact, close, "lse", floor=1e-5)


@CASES
def test_against_reference(case):
    check(case)


@pytest.mark.cuda("paged_attention")
@CUDA_CASES
def test_against_reference_cuda(case):
    check(case, "cuda")


def test_float64_is_exact_to_rounding():
    for queries in ((1, 1, 1), (20, 5, 64)):
        inputs = paged_attention_inputs(dtype=torch.float64, queries=queries)
        expected = reference.paged_attention(**inputs)
        torch.testing.assert_close(ops.paged_attention(**inputs), expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("length", [1, 15, 16, 17, 509, 2049])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_page_per_row_is_plain_attention(length, dtype):
    q, k, v = (torch.randn(2, h, n, 64).to(dtype) for h, n in ((9, 1), (3, length), (3, length)))
    ones = torch.ones(2, dtype=torch.int32)
    table, starts = torch.tensor([[0], [1]]).int(), torch.arange(3).int()
    y = ops.paged_attention(q[:, :, 0], k, v, table, starts, ones * length)
    wide = [t.double() for t in (q, k, v)]
    oracle = F.scaled_dot_product_attention(*wide, enable_gqa=True)[:, :, 0]
    plain = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)[:, :, 0]
    assert_close(y, oracle, plain, "y")


LENGTHS, QUERIES = (700, 33, 0, 129, 17, 300), (1, 1, 1, 100, 2, 1)


def mixed_inputs(**change):
    return paged_attention_inputs(
        lengths=LENGTHS, queries=QUERIES, max_queries=max(QUERIES), **change
    )


def row_of(inputs, row):
    """The inputs of one row alone."""
    start, end = inputs["cu_seqlens_q"][row : row + 2].tolist()
    return {
        **inputs,
        "q": inputs["q"][start:end],
        "page_table": inputs["page_table"][row : row + 1],
        "cu_seqlens_q": torch.tensor([0, end - start], dtype=torch.int32),
        "kv_lengths": inputs["kv_lengths"][row : row + 1],
    }, slice(start, end)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batch_mates_change_nothing(dtype):
    inputs = mixed_inputs(dtype=dtype)
    y = ops.paged_attention(**inputs)
    for row in range(len(LENGTHS)):
        alone, mine = row_of(inputs, row)
        assert torch.equal(ops.paged_attention(**alone), y[mine])


@pytest.mark.cuda("paged_attention")
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_batch_mates_change_nothing_cuda(dtype, head_dim):
    inputs = mixed_inputs(dtype=dtype, head_dim=head_dim)
    y = ops.paged_attention(**to_device(inputs, "cuda"))
    assert torch.equal(ops.paged_attention(**to_device(inputs, "cuda")), y)
    for row in range(len(LENGTHS)):
        alone, mine = row_of(inputs, row)
        assert torch.equal(ops.paged_attention(**to_device(alone, "cuda")), y[mine])


@pytest.mark.cuda("paged_attention")
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(32, 8, 64), (24, 8, 128), (6, 2, 96)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_row_is_the_same_bits_at_any_batch_size_cuda(dtype, heads, kv_heads, head_dim):
    """At 150 rows a block walks all of a row, at 1 its splits are dealt out, at 5 in turns."""
    shape = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "dtype": dtype}
    lengths = tuple(1 + 37 * i % 2500 for i in range(150))
    inputs = paged_attention_inputs(lengths=lengths, queries=(1,) * 150, **shape)
    y = ops.paged_attention(**to_device(inputs, "cuda"))
    for row in (0, 1, 33, 66, 67, 149):
        alone, mine = row_of(inputs, row)
        assert torch.equal(ops.paged_attention(**to_device(alone, "cuda")), y[mine])
        longer = F.pad(alone["page_table"], (0, 5000))
        assert torch.equal(
            ops.paged_attention(**to_device({**alone, "page_table": longer}, "cuda")), y[mine]
        )
    for begin, end in ((40, 80), (62, 67)):
        some = {
            "q": inputs["q"][begin:end],
            "page_table": inputs["page_table"][begin:end],
            "cu_seqlens_q": torch.arange(end - begin + 1).int(),
            "kv_lengths": inputs["kv_lengths"][begin:end],
        }
        together = ops.paged_attention(**to_device(inputs | some, "cuda"))
        assert torch.equal(together, y[begin:end])


# heads, kv heads, head_dim of what CUDA prefills on tensor cores
PREFILL_SHAPES = pytest.mark.parametrize(
    "shape",
    [
        {"heads": 32, "kv_heads": 8, "dtype": torch.bfloat16},
        {"heads": 6, "kv_heads": 2, "head_dim": 128, "dtype": torch.bfloat16},
        {"heads": 6, "kv_heads": 2, "head_dim": 96, "page_size": 64, "dtype": torch.float16},
        {"heads": 2, "kv_heads": 2, "head_dim": 128, "page_size": 7, "dtype": torch.float16},
        {"heads": 16, "kv_heads": 2, "page_size": 24, "dtype": torch.bfloat16},
        {"heads": 3, "kv_heads": 3, "dtype": torch.float16},
        {"heads": 16, "kv_heads": 1, "head_dim": 128, "dtype": torch.bfloat16},
        {"heads": 20, "kv_heads": 1, "dtype": torch.float16},
    ],
    ids=[
        "32/8 D 64", "6/2 D 128", "6/2 D 96", "2/2 D 128", "16/2 D 64", "3/3 D 64", "16/1 D 128",
        "20/1 D 64",
    ],
)  # fmt: skip


def piece_of(inputs, begin, end):
    """Queries [begin, end) of a lone row, as they come before what follows is in the cache."""
    table, page_size = inputs["page_table"][0], inputs["k_cache"].shape[2]
    caches = {k: inputs[k].clone() for k in ("k_cache", "v_cache")}
    pages = -(-int(inputs["kv_lengths"][0]) // page_size)
    for cache in caches.values():
        cache[table[end // page_size + 1 : pages].long()] = float("nan")
        if end // page_size < pages:
            cache[table[end // page_size], :, end % page_size :] = float("nan")
    return {
        **inputs,
        **caches,
        "q": inputs["q"][begin:end],
        "cu_seqlens_q": ints(0, end - begin).to(table.device),
        "kv_lengths": ints(end).to(table.device),
        "max_queries": max(2, end - begin),
    }


@pytest.mark.cuda("paged_attention", "paged_attention_lse")
@PREFILL_SHAPES
@pytest.mark.parametrize(
    ("length", "all_cuts"),
    [
        (331, ((1, 330), (64,), (63, 65, 66), (127, 128, 129), (7, 20, 21, 150), (320,))),
        (1300, ((512, 1024), (255, 256, 257, 700))),
    ],
    ids=["331", "1300"],
)
def test_where_a_prompt_is_cut_changes_no_bit_cuda(shape, length, all_cuts):
    inputs = paged_attention_inputs(lengths=(length,), queries=(length,), **shape)
    inputs = to_device(inputs, "cuda")
    whole, lse = ops.paged_attention(**inputs, return_lse=True)
    assert torch.equal(ops.paged_attention(**inputs), whole)
    for cuts in all_cuts:
        for begin, end in pairwise((0, *cuts, length)):
            piece = piece_of(inputs, begin, end)
            y, part = ops.paged_attention(**piece, return_lse=True)
            assert torch.equal(y, whole[begin:end]) and torch.equal(part, lse[begin:end])


@pytest.mark.cuda("paged_attention")
@PREFILL_SHAPES
def test_prefill_in_any_company_is_the_same_bits_cuda(shape):
    """Of 70 rows of 0 to 90 queries, some of them padding."""
    lengths = tuple(0 if i % 11 == 5 else 95 + 37 * i % 300 for i in range(70))
    queries = tuple(13 * i % 91 for i in range(70))
    inputs = paged_attention_inputs(lengths=lengths, queries=queries, max_queries=90, **shape)
    y = ops.paged_attention(**to_device(inputs, "cuda"))
    for row in (0, 1, 2, 5, 31, 32, 33, 34, 63, 64, 69):
        alone, mine = row_of(inputs, row)
        assert torch.equal(ops.paged_attention(**to_device(alone, "cuda")), y[mine])
    moved = to_device(permuted(inputs), "cuda")
    assert torch.equal(ops.paged_attention(**moved), y)
    heads = shape["heads"]
    qkv = torch.cat([inputs["q"], inputs["q"][:, : heads // 2]], 1).cuda()
    assert torch.equal(ops.paged_attention(**{**moved, "q": qkv[:, :heads]}), y)


@pytest.mark.cuda("paged_attention", "paged_attention_lse")
@PREFILL_SHAPES
def test_prefill_is_decode_but_for_rounding_cuda(shape):
    inputs = paged_attention_inputs(lengths=(1, 64, 65, 700), queries=(1,) * 4, **shape)
    inputs = to_device(inputs, "cuda")
    y, lse = ops.paged_attention(**inputs | {"max_queries": 1}, return_lse=True)
    other, other_lse = ops.paged_attention(**inputs | {"max_queries": 2}, return_lse=True)
    torch.testing.assert_close(other, y, rtol=0.016, atol=0.005)
    torch.testing.assert_close(other_lse, lse, rtol=1e-5, atol=1e-5)


@pytest.mark.cuda("paged_attention")
def test_captured_graph_follows_the_rows_of_a_prefill_cuda():
    """How the tokens are dealt to rows changes between capture and replay, which shapes do not say."""
    inputs = paged_attention_inputs(
        lengths=(400, 200, 300), queries=(50, 50, 50), heads=32, kv_heads=8, dtype=torch.bfloat16
    )
    inputs = to_device(inputs, "cuda")
    ops.paged_attention(**inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ops.paged_attention(**inputs)
    for starts, lengths in (
        ((0, 150, 150, 150), (399, 0, 0)), ((0, 1, 2, 150), (17, 200, 148)),
        ((0, 0, 64, 150), (5, 64, 300)), ((0, 50, 100, 150), (50, 0, 51)),
    ):  # fmt: skip
        inputs["cu_seqlens_q"].copy_(ints(*starts))
        inputs["kv_lengths"].copy_(ints(*lengths))
        graph.replay()
        replayed = y.clone()
        assert torch.equal(ops.paged_attention(**inputs), replayed)
        on_cpu = to_device(inputs, "cpu")
        oracle = reference.paged_attention(**{k: widen(v) for k, v in on_cpu.items()})
        assert_close(replayed, oracle, reference.paged_attention(**on_cpu), "y")


def check_halves(device="cpu", **change):
    """A query over the first pages and over the rest, merged: as if over all of them."""
    lengths, cut, page_size = (700, 300, 513), 256, 16
    inputs = paged_attention_inputs(lengths=lengths, queries=(1,) * 3, **change)
    inputs = to_device(inputs, device)
    whole, lse = ops.paged_attention(**inputs, return_lse=True)
    first = {**inputs, "kv_lengths": torch.full_like(inputs["kv_lengths"], cut)}
    second = {
        **inputs,
        "page_table": inputs["page_table"][:, cut // page_size :],
        "kv_lengths": inputs["kv_lengths"] - cut,
    }
    halves = [ops.paged_attention(**half, return_lse=True) for half in (first, second)]
    together = torch.logaddexp(halves[0][1], halves[1][1])
    torch.testing.assert_close(together, lse, rtol=1e-5, atol=1e-5)
    merged = sum(y * (part - together).exp()[..., None] for y, part in halves)
    tight = {"rtol": 0.016, "atol": 2e-3} if whole.element_size() == 2 else {}
    torch.testing.assert_close(merged.to(whole.dtype), whole, **tight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_halves_merge_by_their_lse(dtype):
    check_halves(dtype=dtype)


@pytest.mark.cuda("paged_attention_lse")
@pytest.mark.parametrize("max_queries", [1, 2])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_halves_merge_by_their_lse_cuda(dtype, head_dim, max_queries):
    check_halves("cuda", dtype=dtype, head_dim=head_dim, max_queries=max_queries)


# lengths, groups of (rows, tokens they share)
SHARED = {
    "one group": ((600, 560, 530, 700), ((4, 512),)),
    "rows part within a split": ((500, 490, 470), ((3, 448),)),
    "less than a block": ((60, 70, 80), ((3, 48),)),
    "groups and loners": ((600, 40, 300, 310, 320, 17, 700, 710),
                          ((1, 0), (1, 0), (3, 272), (1, 0), (2, 640))),
    "padding rows in a group": ((400, 0, 420, -3, 0), ((4, 384), (1, 0))),
    "one token of its own": ((513, 513), ((2, 512),)),
    "a long prefix": ((2100, 2200, 2050), ((3, 2048),)),
    "more rows than a block takes": (tuple(330 + 3 * i for i in range(90)), ((33, 320), (57, 256))),
    "groups and loners in any place": (tuple(280 + 5 * i for i in range(24)),
                                       ((1, 0), (2, 192), (1, 0), (5, 272), (7, 128), (1, 0),
                                        (4, 256), (2, 0), (1, 0))),
}  # fmt: skip


def check_shared(lengths, groups, device="cpu", **change):
    """With and without `shared`: the same bits, also for each row alone."""
    inputs = paged_attention_inputs(
        lengths=lengths, queries=(1,) * len(lengths), groups=groups, **change
    )
    if device == "cuda":
        inputs = to_device(inputs, device)
    together, lse = ops.paged_attention(**inputs, return_lse=True)
    for same in ops.paged_attention(**{**inputs, "shared": None}, return_lse=True):
        assert torch.equal(same, together if same.ndim == 3 else lse)
    if device == "cuda":  # splits are dealt out otherwise
        longer = F.pad(inputs["page_table"], (0, 3000))
        assert torch.equal(ops.paged_attention(**{**inputs, "page_table": longer}), together)
    for row in range(min(len(lengths), 4)):
        alone, mine = row_of(to_device(inputs, "cpu"), row)
        alone = to_device({**alone, "shared": None}, device)
        assert torch.equal(ops.paged_attention(**alone), together[mine])


@pytest.mark.parametrize(("lengths", "groups"), SHARED.values(), ids=SHARED.keys())
def test_sharing_changes_no_bit(lengths, groups):
    check_shared(lengths, groups)


@pytest.mark.cuda("paged_attention")
@pytest.mark.parametrize(("lengths", "groups"), SHARED.values(), ids=SHARED.keys())
@pytest.mark.parametrize(
    "shape",
    [
        {"heads": 32, "kv_heads": 8, "dtype": torch.bfloat16},
        {"heads": 6, "kv_heads": 2, "head_dim": 128, "dtype": torch.bfloat16},
        {"heads": 10, "kv_heads": 1, "head_dim": 96, "dtype": torch.float16},
        {"page_size": 8, "heads": 2, "dtype": torch.float16},
        {"dtype": torch.float32},
    ],
    ids=["32/8 D 64", "6/2 D 128", "10/1 D 96", "2/2 D 64", "fp32"],
)
def test_sharing_changes_no_bit_cuda(lengths, groups, shape):
    check_shared(lengths, groups, "cuda", **shape)


@pytest.mark.cuda("paged_attention")
@pytest.mark.parametrize("rows", [4, 60])
def test_shared_pages_are_those_of_the_first_row_cuda(rows):
    """The tables of the others are not asked, even when the first row has ended."""
    inputs = paged_attention_inputs(
        lengths=(400,) * rows, queries=(1,) * rows, groups=((rows, 384),), heads=32, kv_heads=8,
        dtype=torch.bfloat16,
    )  # fmt: skip
    inputs = to_device(inputs, "cuda")
    y = ops.paged_attention(**inputs)
    inputs["page_table"][1:, :24] = inputs["page_table"][:1, 24]
    inputs["kv_lengths"][0] = 0
    ended = ops.paged_attention(**inputs)
    assert torch.equal(ended[1:], y[1:]) and not ended[0].any()


@pytest.mark.cuda("paged_attention")
@pytest.mark.parametrize("rows", [3, 60])
def test_captured_graph_follows_growing_rows_and_groups_cuda(rows):
    """Lengths grow over splits and groups come and go between capture and replay."""
    pages, prefix = 60, 320
    q = torch.randn(rows, 32, 64, device="cuda").bfloat16()
    caches = torch.randn(2, rows * pages, 8, 16, 64, device="cuda").bfloat16()
    table = torch.randperm(rows * pages, device="cuda").int().view(rows, pages)
    table[:, : prefix // 16] = table[0, : prefix // 16]
    starts, lengths = torch.arange(rows + 1, device="cuda").int(), torch.zeros(rows).int().cuda()
    alone = torch.stack([torch.arange(rows), torch.zeros(rows)], 1).int().cuda()
    group = torch.tensor([[0, prefix]] * (rows - 1) + [[rows - 1, 0]]).int().cuda()
    shared = alone.clone()

    def step(shared):
        return ops.paged_attention(q, caches[0], caches[1], table, starts, lengths, shared=shared)

    step(shared)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step(shared)
    for length in (1, 64, 255, 256, 321, 511, 512, 513, 950):
        lengths.copy_(length + torch.arange(rows) % 7)
        shared.copy_(group if length > prefix else alone)
        graph.replay()
        assert torch.equal(y, step(None)), length


@pytest.mark.cuda("append_kv", "paged_attention")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_captured_graph_follows_the_values_cuda(dtype):
    """k, v and q are slices of one matrix; lengths and pages change between capture and replay."""
    rows, heads, kv_heads, head_dim, page_size = 4, 6, 2, 64, 16
    qkv = torch.randn(rows, heads + 2 * kv_heads, head_dim, device="cuda").to(dtype)
    q, k, v = qkv.split([heads, kv_heads, kv_heads], 1)
    caches = torch.randn(2, 12, kv_heads, page_size, head_dim, device="cuda").to(dtype)
    table = torch.randperm(12, device="cuda").int().view(rows, 3)
    starts, lengths = torch.arange(rows + 1, device="cuda").int(), ints(1, 0, 17, 30).cuda()

    def step():
        ops.append_kv(caches[0], caches[1], k, v, table, starts, lengths)
        return ops.paged_attention(q, caches[0], caches[1], table, starts, lengths)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step()
    before = caches.clone()
    for changed in ((2, 1, 18, 31), (48, 33, 0, 16)):
        qkv.normal_()
        lengths.copy_(torch.tensor(changed))
        table.copy_(torch.randperm(12).view(rows, 3))
        caches.copy_(before)
        graph.replay()
        replayed = y.clone(), caches.clone()
        caches.copy_(before)
        assert torch.equal(step(), replayed[0]) and torch.equal(caches, replayed[1])
        where = [t.cpu() for t in (table, starts, lengths)]
        expected = reference.append_kv(*before.cpu(), k.cpu(), v.cpu(), *where)
        assert torch.equal(torch.stack(expected), caches.cpu())


def test_threads_change_nothing():
    inputs = mixed_inputs()
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(ops.paged_attention(**inputs))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def permuted(inputs):
    """The same on pages with other numbers."""
    num_pages = inputs["k_cache"].shape[0]
    new_place = torch.randperm(num_pages)
    moved = {k: torch.empty_like(inputs[k]) for k in ("k_cache", "v_cache")}
    for k, cache in moved.items():
        cache[new_place] = inputs[k]
    table = inputs["page_table"].clone()
    real = (table >= 0) & (table < num_pages)
    table[real] = new_place[table[real].long()].int()
    return {**inputs, **moved, "page_table": table}


def test_permuted_pages_change_nothing():
    inputs = mixed_inputs()
    y = ops.paged_attention(**permuted(inputs))
    assert torch.equal(y, ops.paged_attention(**inputs))


def test_fork_that_shares_pages_equals_separate_copies():
    prompt = paged_attention_inputs(lengths=(32, 7), queries=(1, 1))
    own = prompt["page_table"][0, :2].tolist()
    caches = {k: torch.cat([prompt[k], prompt[k][own]]) for k in ("k_cache", "v_cache")}
    num_pages = prompt["k_cache"].shape[0]
    lengths = torch.tensor([32, 32], dtype=torch.int32)
    results = []
    for fork in (own, [num_pages, num_pages + 1]):
        table = torch.tensor([own, fork], dtype=torch.int32)
        rest = {**prompt, **caches, "page_table": table, "kv_lengths": lengths}
        results.append(ops.paged_attention(**rest))
    assert torch.equal(results[0], results[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decode_token_by_token_is_prefill(dtype):
    """Through append_kv, on pages that grow out of order."""
    length, heads, kv_heads, head_dim, page_size = 41, 6, 2, 64, 8
    q, k, v = (torch.randn(length, h, head_dim).to(dtype) for h in (heads, kv_heads, kv_heads))
    table = torch.tensor([[4, 0, 5, 1, 3, 2, -9]], dtype=torch.int32)

    def run(chunks):
        caches = torch.full((2, 6, kv_heads, page_size, head_dim), float("nan")).to(dtype)
        y, begin = [], 0
        for n in chunks:
            where = table, torch.tensor([0, n]).int(), torch.tensor([begin + n]).int()
            mine = slice(begin, begin + n)
            ops.append_kv(caches[0], caches[1], k[mine], v[mine], *where)
            y.append(ops.paged_attention(q[mine], caches[0], caches[1], *where))
            begin += n
        return torch.cat(y), caches

    whole, caches = run([length])
    for chunks in ([1] * length, [13, 1, 20, 7]):
        y, same_caches = run(chunks)
        assert torch.equal(same_caches.nan_to_num(), caches.nan_to_num())
        oracle = F.scaled_dot_product_attention(
            *(t.double().transpose(0, 1) for t in (q, k, v)), is_causal=True, enable_gqa=True
        ).transpose(0, 1)
        assert_close(y, oracle, whole, "y")


def test_strided_inputs_equal_contiguous():
    inputs = mixed_inputs()
    padded = torch.randn(inputs["q"].shape[0], 6, 80)
    padded[..., 8:72] = inputs["q"]
    wide_table = torch.stack([inputs["page_table"]] * 2, -1)
    strided = {**inputs, "q": padded[..., 8:72], "page_table": wide_table[..., 0]}
    assert torch.equal(ops.paged_attention(**strided), ops.paged_attention(**inputs))


def test_nan_in_a_row_stays_in_the_row_and_is_seen():
    for queries in ((1, 1, 1), (5, 1, 64)):
        inputs = paged_attention_inputs(queries=queries)
        inputs["k_cache"][inputs["page_table"][0, 0]] = float("nan")
        y = ops.paged_attention(**inputs)
        assert y[: queries[0]].isnan().all() and y[queries[0] :].isfinite().all()


# ---- append_kv


def check_append(case, device="cpu"):
    case = {k: v for k, v in case.items() if k not in ("scale", "magnitude", "heads")}
    inputs = append_kv_inputs(**{"queries": (1, 1, 1), **case})
    expected = reference.append_kv(**inputs)
    moved = to_device(inputs, device)
    assert ops.append_kv(**moved) is None
    for name, cache in zip(("k_cache", "v_cache"), expected):
        torch.testing.assert_close(moved[name].cpu(), cache, rtol=0, atol=0, equal_nan=True)


@CASES
def test_append_against_reference(case):
    check_append(case)


@pytest.mark.cuda("append_kv")
@CUDA_CASES
def test_append_against_reference_cuda(case):
    check_append(case, "cuda")


def test_append_many_tokens_on_several_threads():
    inputs = append_kv_inputs(lengths=(3000, 900), queries=(2999, 900))
    expected = reference.append_kv(**inputs)
    ops.append_kv(**inputs)
    assert torch.equal(inputs["k_cache"].nan_to_num(), expected[0].nan_to_num())
    assert torch.equal(inputs["v_cache"].nan_to_num(), expected[1].nan_to_num())


def test_append_strided_equals_contiguous():
    inputs = append_kv_inputs()
    expected = reference.append_kv(**inputs)
    k = torch.stack([inputs["k"]] * 2, -1)[..., 1]
    ops.append_kv(**{**inputs, "k": k})
    assert torch.equal(inputs["k_cache"].nan_to_num(), expected[0].nan_to_num())


# ---- both: domain, registration


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"k_cache": torch.zeros(10, 2, 16, 64).half()}, TypeError, "k_cache expected dtype float32"),
        ({"k_cache": torch.zeros(10, 2, 64)}, ValueError, r"k_cache expected shape .* got \(10, 2, 64\)"),
        ({"k_cache": torch.zeros(10, 2, 0, 64)}, ValueError, "page_size expected at least 1, got 0"),
        ({"v_cache": torch.zeros(10, 2, 8, 64)}, ValueError, r"v_cache expected shape .*, 16, 64\), got"),
        ({"k_cache": torch.zeros(10, 2, 16, 128)[..., ::2]}, ValueError, "k_cache expected contiguous"),
        ({"page_table": torch.zeros(3, 4).long()}, TypeError, "page_table expected dtype Int"),
        ({"cu_seqlens_q": ints(0, 1, 2)}, ValueError, r"cu_seqlens_q expected shape .* = \(4\), got \(3\)"),
        ({"cu_seqlens_q": ints(0, 1, 2, 4)}, ValueError, "cu_seqlens_q expected to run from 0 to 3"),
        ({"cu_seqlens_q": ints(0, 2, 1, 3)}, ValueError, "non-decreasing, got 2 before 1"),
        ({"kv_lengths": ints(37, 5)}, ValueError, r"kv_lengths expected shape \(rows\) = \(3\), got \(2\)"),
        ({"kv_lengths": ints(37, 5, 81)}, ValueError, r"kv_lengths\[2\] expected at most 80 tokens"),
        ({"cu_seqlens_q": ints(0, 0, 3, 3), "kv_lengths": ints(37, 2, 64)}, ValueError,
         r"kv_lengths\[1\] expected at least the 3 queries"),
        ({"page_table": torch.full((3, 5), 10).int()}, ValueError,
         r"page_table\[0\]\[0\] expected a page below 10, got 10"),
        ({"page_table": torch.full((3, 5), -1).int()}, ValueError, r"page_table\[0\]\[0\] .* got -1"),
    ],
)  # fmt: skip
def test_errors(change, error, words):
    inputs = paged_attention_inputs() | change
    with pytest.raises(error, match=f"paged_attention: .*{words}"):
        ops.paged_attention(**inputs)
    k = torch.randn(3, 2, 64)
    mine = ("q", "scale", "max_queries", "shared")
    inputs = {name: value for name, value in inputs.items() if name not in mine}
    before = inputs["k_cache"].clone(), inputs["v_cache"].clone()
    with pytest.raises(error, match=f"append_kv: .*{words}"):
        ops.append_kv(**inputs, k=k, v=k)
    for name, cache in zip(("k_cache", "v_cache"), before):
        torch.testing.assert_close(inputs[name], cache, rtol=0, atol=0, equal_nan=True)


def test_errors_of_q_and_k():
    inputs = paged_attention_inputs()
    with pytest.raises(ValueError, match="paged_attention: kv_heads expected to divide heads = 5"):
        ops.paged_attention(**{**inputs, "q": torch.zeros(3, 5, 64)})
    with pytest.raises(TypeError, match="paged_attention: q expected dtype Float, got BFloat16"):
        ops.paged_attention(**{**inputs, "q": inputs["q"].bfloat16()})
    with pytest.raises(ValueError, match=r"append_kv: k expected shape .* \(\*, 2, 64\), got"):
        ops.append_kv(**{**append_kv_inputs(), "k": torch.zeros(3, 4, 64)})
    with pytest.raises(ValueError, match=r"append_kv: v expected shape .* \(3, 2, 64\), got"):
        ops.append_kv(**{**append_kv_inputs(), "v": torch.zeros(4, 2, 64)})


@pytest.mark.parametrize(
    ("pairs", "words"),
    [
        (((0, 32), (0, 16), (2, 0)), r"shared\[1\] expected .* pair of the row before, got \[0, 16\]"),
        (((0, 32), (2, 0), (2, 0)), r"shared\[1\] expected its own row, .* got \[2, 0\]"),
        (((0, 0), (1, 32), (0, 0)), r"shared\[2\] expected its own row"),
        (((0, 24), (0, 24), (2, 0)), r"shared\[0\] expected a multiple of 16 tokens up to 80, got 24"),
        (((0, -16), (1, 0), (2, 0)), r"shared\[0\] expected a multiple of 16"),
        (((0, 48), (0, 48), (2, 0)), r"shared\[0\] expected fewer tokens than its row's 37, got 48"),
        (((0, 32), (0, 32), (2, 0)), r"page_table\[1\]\[0\] expected page \d+ of row 0, with which"),
        (((0, 0), (1, 0)), r"shared expected shape \(rows, 2\) = \(3, 2\), got \(2, 2\)"),
    ],
)  # fmt: skip
def test_errors_of_shared(pairs, words):
    inputs = paged_attention_inputs(lengths=(37, 40, 64)) | {"shared": torch.tensor(pairs).int()}
    with pytest.raises(ValueError, match=f"paged_attention: {words}"):
        ops.paged_attention(**inputs)


def test_shared_needs_one_query_a_row():
    pairs = torch.tensor([[0, 0], [1, 0], [2, 0]]).int()
    with pytest.raises(ValueError, match="one query a row, got 7 queries of 3 rows"):
        ops.paged_attention(**paged_attention_inputs(queries=(1, 1, 5)) | {"shared": pairs})
    with pytest.raises(ValueError, match="one query a row, got 2 queries of row 0"):
        ops.paged_attention(**paged_attention_inputs(queries=(2, 0, 1)) | {"shared": pairs})
    with pytest.raises(ValueError, match="shared expected with max_queries = 1, got 2"):
        ops.paged_attention(**paged_attention_inputs(max_queries=2) | {"shared": pairs})


def test_errors_of_max_queries():
    for queries, max_queries, words in (
        ((1, 1, 1), 0, "max_queries expected at least 1, got 0"),
        ((1, 1, 5), 1, "max_queries = 1 expected with one query a row, got 7 queries of 3 rows"),
        ((2, 0, 1), None, "max_queries expected at least the 2 queries of row 0, got 1"),
        ((2, 3, 1), 2, "max_queries expected at least the 3 queries of row 1, got 2"),
    ):
        inputs = paged_attention_inputs(queries=queries, max_queries=max_queries)
        with pytest.raises(ValueError, match=f"paged_attention: {words}"):
            ops.paged_attention(**inputs)


def test_opcheck():
    op = torch.ops.reasoners
    for queries in ((1, 1, 1), (5, 1, 64)):
        inputs = paged_attention_inputs(scale=0.125, queries=queries, max_queries=max(queries))
        for k in ("k_cache", "v_cache"):
            inputs[k] = inputs[k].nan_to_num()
        torch.library.opcheck(op.paged_attention.default, tuple(inputs.values()))
        lse = torch.ops.reasoners.paged_attention_lse
        torch.library.opcheck(lse.default, tuple(inputs.values()))
    inputs = append_kv_inputs()
    inputs["k_cache"], inputs["v_cache"] = (inputs[k].nan_to_num() for k in ("k_cache", "v_cache"))
    torch.library.opcheck(op.append_kv.default, tuple(inputs.values()))


def test_compiles_whole_with_dynamic_shapes():
    def step(q, k, v, k_cache, v_cache, *where):
        ops.append_kv(k_cache, v_cache, k, v, *where)
        return ops.paged_attention(q, k_cache, v_cache, *where) * 2

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for lengths in ((37, 5, 64), (3, 70, 12, 9, 1)):
        inputs = append_kv_inputs(lengths=lengths, queries=(1,) * len(lengths))
        q = torch.randn(len(lengths), 6, 64)
        where = [inputs[k] for k in ("page_table", "cu_seqlens_q", "kv_lengths")]
        caches = inputs["k_cache"], inputs["v_cache"]
        mine, other = ([c.clone() for c in caches] for _ in range(2))
        y = compiled(q, inputs["k"], inputs["v"], *mine, *where)
        assert torch.equal(y, step(q, inputs["k"], inputs["v"], *other, *where))
        assert torch.equal(mine[0].nan_to_num(), other[0].nan_to_num())
