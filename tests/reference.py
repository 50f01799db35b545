"""Float64 references of the operators, the makers of their inputs, and the tolerance of a test.

A reference is the definition written as plainly as PyTorch allows, one token after the other. It
computes in the dtype of its inputs: in float64 it is the oracle, in the kernel's own dtype it is the
yardstick of how large a rounding error plain PyTorch makes on the same data.
"""

import math

import numpy as np
import torch
from torch import Tensor


def widen(value):
    """Floating tensors to float64, everything else as it is."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.double()
    return value


def assert_close(actual: Tensor, oracle: Tensor, plain: Tensor, name: str, floor: float = 1e-6):
    """err(actual) <= 2 err(plain) + floor, against the float64 oracle, at the worst element.

    plain: the same definition computed by PyTorch in the dtype of the operator under test.
    floor: relative to the oracle's largest magnitude.
    """
    actual, plain = actual.detach().double().cpu(), plain.detach().double().cpu()
    oracle = oracle.detach().double().cpu()
    assert actual.shape == oracle.shape, f"{name}: shape {actual.shape}, expected {oracle.shape}"
    if actual.numel() == 0:
        return
    finite = oracle.isfinite()
    same = (actual == oracle) | (actual.isnan() & oracle.isnan()) | (finite & actual.isfinite())
    assert same.all(), f"{name}: non-finite values differ at {(~same).nonzero()[0].tolist()}"
    zero = torch.zeros((), dtype=torch.float64)
    error = torch.where(finite, (actual - oracle).abs(), zero)
    allowed = 2 * torch.where(finite, (plain - oracle).abs(), zero).max()
    allowed = allowed + floor * torch.where(finite, oracle.abs(), zero).max()
    worst = error.argmax()
    index = torch.unravel_index(worst, error.shape)
    assert error.max() <= allowed, (
        f"{name}: worst at {[int(i) for i in index]}: got {actual.flatten()[worst]:.8g}, expected "
        f"{oracle.flatten()[worst]:.8g}, error {error.max():.3g} > allowed {allowed:.3g}"
    )


def share(tensor: Tensor, heads: int, dim: int) -> Tensor:
    """Repeat consecutive groups along `dim` until there is one per head."""
    return tensor.repeat_interleave(heads // tensor.shape[dim], dim)


# ---- state_update


def state_update(state, slots, x, log_decay, B, C, scale=None, D=None):
    """Returns (y, new state); the argument is left as it was."""
    heads = log_decay.shape[1]
    x, B, C = share(x, heads, 1), share(B, heads, 1), share(C, heads, 1)
    state, y = state.clone(), torch.zeros_like(x)
    for row, slot in enumerate(slots.tolist()):
        if slot < 0:
            continue
        gain = x[row] if scale is None else x[row] * scale[row, :, None].to(x.dtype)
        step = gain[:, :, None] * B[row, :, None, :]
        decay = log_decay[row].exp()[:, None, None].to(state.dtype)
        state[slot] = decay * state[slot] + step.to(state.dtype)
        y[row] = torch.einsum("hpn,hn->hp", state[slot].to(x.dtype), C[row])
        if D is not None:
            y[row] += D[:, None].to(x.dtype) * x[row]
    return y, state


def state_update_inputs(
    batch=3, H=4, Hx=4, Gb=4, Gc=4, P=16, N=16, dtype=torch.float32, state_dtype=torch.float32,
    slots=None, scale=True, D=True, decay=1.0, seed=0,
):  # fmt: skip
    g = torch.Generator().manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    num_slots = batch + 2
    slots = torch.randperm(num_slots, generator=g)[:batch] if slots is None else torch.tensor(slots)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    return {
        "state": normal(num_slots, H, P, N).to(state_dtype),
        "slots": slots.int(),
        "x": normal(batch, Hx, P).to(dtype),
        "log_decay": (-decay * torch.rand(batch, H, generator=g)).to(wide),
        "B": normal(batch, Gb, N).to(dtype),
        "C": normal(batch, Gc, N).to(dtype),
        "scale": torch.rand(batch, H, generator=g).to(wide) if scale else None,
        "D": normal(H).to(wide) if D else None,
    }


STATE_UPDATE_CASES = {
    "base": {},
    "bf16": {"dtype": torch.bfloat16},
    "bf16 data and state": {"dtype": torch.bfloat16, "state_dtype": torch.bfloat16},
    "bf16 state, fp32 data": {"state_dtype": torch.bfloat16},
    "no scale": {"scale": False},
    "no D": {"D": False},
    "batch 1": {"batch": 1},
    "empty batch": {"batch": 0},
    "many rows": {"batch": 70},
    "kv sharing (kv, kv, H)": {"Hx": 2, "Gb": 2},
    "one group (H, 1, 1)": {"Gb": 1, "Gc": 1},
    "all shared": {"Hx": 1, "Gb": 1, "Gc": 2},
    "P 64, N 64 (Llamba-1B)": {"P": 64, "N": 64, "H": 2, "Hx": 2, "Gb": 2, "Gc": 2},
    "P 96 (Llamba-3B)": {"P": 96, "N": 64, "H": 2, "Hx": 2, "Gb": 2, "Gc": 2},
    "P 128, N 128": {"P": 128, "N": 128, "H": 3, "Hx": 1, "Gb": 1, "Gc": 3},
    "odd extents": {"P": 7, "N": 5},
    "zero decay": {"decay": 0.0},
    "strong decay": {"decay": 40.0},
    "padding rows": {"batch": 4, "slots": [5, -1, 0, -7]},
    "only padding": {"batch": 2, "slots": [-1, -1]},
}


# ---- append_kv, paged_attention


def append_kv(k_cache, v_cache, k, v, page_table, cu_seqlens_q, kv_lengths):
    """Returns the new (k_cache, v_cache); the arguments are left as they were."""
    k_cache, v_cache, page_size = k_cache.clone(), v_cache.clone(), k_cache.shape[2]
    starts = cu_seqlens_q.tolist()
    for row, length in enumerate(kv_lengths.tolist()):
        for token in range(starts[row], starts[row + 1] if length > 0 else 0):
            position = length - starts[row + 1] + token
            page, slot = page_table[row, position // page_size], position % page_size
            k_cache[page, :, slot], v_cache[page, :, slot] = k[token], v[token]
    return k_cache, v_cache


def paged_attention(q, k_cache, v_cache, page_table, cu_seqlens_q, kv_lengths, scale=None):
    """Gathers each row's pages, repeats heads, masks, softmax: one row after the other."""
    heads, head_dim = q.shape[1:]
    page_size, starts, y = k_cache.shape[2], cu_seqlens_q.tolist(), torch.zeros_like(q)
    for row, length in enumerate(kv_lengths.tolist()):
        if length <= 0:
            continue
        pages = page_table[row, : -(-length // page_size)].long()
        k, v = (c[pages].transpose(1, 2).flatten(0, 1)[:length] for c in (k_cache, v_cache))
        mine = slice(starts[row], starts[row + 1])
        scores = torch.einsum("qhd,khd->hqk", q[mine], share(k, heads, 1))
        scores = scores * (head_dim**-0.5 if scale is None else scale)
        queries = scores.shape[1]
        future = torch.ones(queries, length).triu(length - queries + 1).bool()
        weights = scores.masked_fill(future, float("-inf")).softmax(-1)
        y[mine] = torch.einsum("hqk,khd->qhd", weights, share(v, heads, 1))
    return y


def paged_attention_inputs(
    lengths=(37, 5, 64), queries=(1, 1, 1), heads=6, kv_heads=2, head_dim=64, page_size=16,
    dtype=torch.float32, scale=None, magnitude=1.0, seed=0,
):  # fmt: skip
    """Everything that must not be read is poison: pages of nobody, the rest of a row's last page,
    and table entries past a row's length."""
    g = torch.Generator().manual_seed(seed)
    rows = len(lengths)
    needed = [max(0, -(-length // page_size)) for length in lengths]
    num_pages = sum(needed) + 2
    order = torch.randperm(num_pages, generator=g).int()
    table = torch.randint(
        -(2**31), 2**31 - 1, (rows, max(needed, default=0) + 1), generator=g
    ).int()
    caches = torch.full((2, num_pages, kv_heads, page_size, head_dim), float("nan"))
    for row, length in enumerate(lengths):
        table[row, : needed[row]] = order[sum(needed[:row]) :][: needed[row]]
        for i in range(needed[row]):
            used = min(page_size, length - i * page_size)
            values = torch.randn(2, kv_heads, used, head_dim, generator=g)
            caches[:, table[row, i], :, :used] = values
    caches[0] *= magnitude
    return {
        "q": torch.randn(sum(queries), heads, head_dim, generator=g).to(dtype),
        "k_cache": caches[0].to(dtype),
        "v_cache": caches[1].to(dtype),
        "page_table": table,
        "cu_seqlens_q": torch.tensor([0, *torch.tensor(queries).cumsum(0)], dtype=torch.int32),
        "kv_lengths": torch.tensor(lengths, dtype=torch.int32),
        "scale": scale,
    }


PAGED_ATTENTION_CASES = {
    "base": {},
    "bf16": {"dtype": torch.bfloat16},
    "float64": {"dtype": torch.float64},
    "own scale": {"scale": 0.3},
    "large scores": {"magnitude": 30.0},
    "no rows": {"lengths": (), "queries": ()},
    "padding rows": {"lengths": (0, 9, -5), "queries": (1, 1, 2)},
    "a row without queries": {"queries": (1, 0, 1)},
    "edges of a page": {"lengths": (1, 15, 16, 17, 33), "queries": (1,) * 5},
    "several splits": {"lengths": (255, 256, 257, 2049), "queries": (1,) * 4},
    "group 1": {"heads": 2},
    "group 4, Llama-3.2-1B": {"heads": 8},
    "group 5": {"heads": 10},
    "group 8": {"heads": 16, "dtype": torch.bfloat16},
    "group 2, D 128": {"heads": 4, "head_dim": 128},
    "D 128, Llama-3.2-3B": {"head_dim": 128, "dtype": torch.bfloat16},
    "D 96": {"head_dim": 96},
    "D 80": {"head_dim": 80, "dtype": torch.bfloat16},
    "odd D": {"head_dim": 7},
    "pages of 1": {"page_size": 1},
    "pages of 7": {"page_size": 7},
    "pages of 64": {"page_size": 64},
    "prefill": {"lengths": (100,), "queries": (100,)},
    "prefill bf16": {"lengths": (100,), "queries": (100,), "dtype": torch.bfloat16},
    "prefill float64": {"lengths": (30,), "queries": (30,), "dtype": torch.float64},
    "prefill after a prefix": {"lengths": (211, 70), "queries": (100, 3)},
    "prefill, group 1, D 80": {
        "lengths": (140,), "queries": (139,), "heads": 2, "head_dim": 80,
    },
    "prefill, odd D, group 7": {
        "lengths": (67,), "queries": (67,), "heads": 14, "head_dim": 19, "page_size": 5,
    },
    "prefill, large scores": {"lengths": (130,), "queries": (130,), "magnitude": 30.0},
    "prefill and decode mixed": {
        "lengths": (70, 33, 0, 129), "queries": (70, 1, 3, 2), "dtype": torch.bfloat16,
    },
}  # fmt: skip


# ---- sample


def philox(counter, key):
    """Philox4x32-10 on uint64 arrays that hold 32-bit words: counter of 4, key of 2."""
    low = np.uint64(0xFFFFFFFF)
    c, k = [np.uint64(w) for w in counter], [np.uint64(w) for w in key]
    for _ in range(10):
        p, q = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        half = np.uint64(32)
        c = [(q >> half) ^ c[1] ^ k[0], q & low, (p >> half) ^ c[3] ^ k[1], p & low]
        k = [(k[0] + np.uint64(0x9E3779B9)) & low, (k[1] + np.uint64(0xBB67AE85)) & low]
    return c


def gumbel_noise(rng_key, vocabulary):
    """The noise of one row, (vocabulary) float64."""
    words = [(value >> shift) & 0xFFFFFFFF for value in rng_key.tolist() for shift in (0, 32)]
    name = philox(words[2:6], words[:2])
    block = np.arange(-(-vocabulary // 4), dtype=np.uint64)
    noise = philox([block, words[6], name[2], name[3]], name[:2])
    r = torch.from_numpy(np.stack(noise, -1).astype(np.int64)).flatten()[:vocabulary]
    v = ((r.float() + 0.5) * 2**-32).double()
    return -(-torch.log1p(-v)).clamp(max=25).log()


def sample_allowed(logits, temperature, top_k, top_p, min_p):
    """(vocabulary) bool: what the filters keep of one row."""
    z = logits.double() / temperature
    kept = torch.ones_like(z, dtype=torch.bool)
    if 0 < top_k < len(z):
        kept &= z >= z.sort(descending=True).values[top_k - 1]
    if top_p < 1:
        p, order = z.masked_fill(~kept, float("-inf")).softmax(-1).sort(descending=True)
        last = int((p.cumsum(0) < top_p).sum())
        kept &= z >= z[order[min(last, len(z) - 1)]]
    return kept & (z >= z.max() + math.log(min_p) if min_p > 0 else kept)


def sample(logits, temperature, top_k, top_p, min_p, rng_key):
    """One row after the other; returns (token, logprob float64)."""
    token, logprob = [], []
    for row, x in enumerate(logits.double()):
        if x.isnan().any() or x.max().isinf():
            token.append(-1), logprob.append(float("nan"))
            continue
        score = x
        if temperature[row] > 0:
            filters = (t[row].item() for t in (temperature, top_k, top_p, min_p))
            score = x / temperature[row].double() + gumbel_noise(rng_key[row], len(x))
            score = score.masked_fill(~sample_allowed(x, *filters), float("-inf"))
        token.append(int(score.argmax()))
        logprob.append(float(x.log_softmax(-1)[token[-1]]))
    return torch.tensor(token, dtype=torch.int64), torch.tensor(logprob, dtype=torch.float64)


def sample_inputs(
    batch=12, vocabulary=1000, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, spread=3.0,
    dtype=torch.float32, seed=0,
):  # fmt: skip
    g = torch.Generator().manual_seed(seed)

    def per_row(value, dtype):
        return torch.tensor(value, dtype=dtype).expand(batch).contiguous()

    return {
        "logits": (spread * torch.randn(batch, vocabulary, generator=g)).to(dtype),
        "temperature": per_row(temperature, torch.float32),
        "top_k": per_row(top_k, torch.int32),
        "top_p": per_row(top_p, torch.float32),
        "min_p": per_row(min_p, torch.float32),
        "rng_key": torch.randint(-(2**63), 2**63 - 1, (batch, 4), generator=g),
    }


SAMPLE_CASES = {
    "base": {},
    "bf16": {"dtype": torch.bfloat16},
    "empty batch": {"batch": 0},
    "one token": {"vocabulary": 1},
    "less than a block": {"vocabulary": 37},
    "a block": {"vocabulary": 64},
    "SmolLM2": {"batch": 2, "vocabulary": 49152},
    "Llama-3 and top-p": {"batch": 2, "vocabulary": 128256, "top_p": 0.9},
    "greedy": {"temperature": 0.0},
    "negative temperature is greedy": {"temperature": -1.0},
    "cold": {"temperature": 0.01},
    "colder than floats": {"temperature": 1e-42},
    "hot": {"temperature": 50.0},
    "flat": {"spread": 0.01},
    "peaked": {"spread": 30.0},
    "top-k 1": {"top_k": 1},
    "top-k 50": {"top_k": 50},
    "top-k of everything": {"top_k": 1000},
    "top-k past everything": {"top_k": 5000},
    "top-k with bf16 ties": {"top_k": 20, "dtype": torch.bfloat16, "vocabulary": 5000},
    "top-p 0": {"top_p": 0.0},
    "top-p 0.5": {"top_p": 0.5},
    "top-p 0.99, flat": {"top_p": 0.99, "spread": 0.3},
    "top-p, bf16 ties": {"top_p": 0.7, "dtype": torch.bfloat16, "vocabulary": 5000},
    "min-p": {"min_p": 0.1},
    "min-p 1": {"min_p": 1.0},
    "everything": {"temperature": 0.7, "top_k": 40, "top_p": 0.9, "min_p": 0.02},
    "a different mix per row": {
        "temperature": (0.0, 0.5, 1.0, 1.5) * 3, "top_k": (0, 0, 3, 0, 9, 9) * 2,
        "top_p": (1.0, 0.8, 0.9) * 4, "min_p": (0.0, 0.05) * 6,
    },
}  # fmt: skip
