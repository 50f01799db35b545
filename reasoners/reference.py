"""The operators as definitions, the makers of random inputs for them, and the tolerance of a check.

A reference is the definition written as plainly as PyTorch allows, one token after the other. It
computes in the dtype of its inputs: in float64 it is the oracle, in the kernel's own dtype it is the
yardstick of how large a rounding error plain PyTorch makes on the same data.
"""

import math
from itertools import pairwise

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
    floor: relative to the oracle's largest magnitude. Integers must be equal.
    """
    assert actual.shape == oracle.shape, f"{name}: shape {actual.shape}, expected {oracle.shape}"
    if actual.numel() == 0:
        return
    if not oracle.is_floating_point():
        different = (actual.cpu() != oracle.cpu()).nonzero()
        assert len(different) == 0, f"{name}: differs at {different[0].tolist()}"
        return
    actual, plain = actual.detach().double().cpu(), plain.detach().double().cpu()
    oracle = oracle.detach().double().cpu()
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


# ---- state_update, deferred_state_update, count_pending


def rounding_noise(rng_key, size):
    """The 16-bit numbers that round the elements of one slot's state, (size) int64."""
    return noise_halves(rng_key, 0x80000000, size)


def rounded(value, dtype, rng_key=None):
    """To nearest, or with a key to one of the two neighbours, each as often as it is near."""
    if rng_key is None or dtype not in (torch.bfloat16, torch.float16):
        return value.to(dtype)
    if dtype == torch.bfloat16:
        bits = (value.float().view(torch.int32) >> 16).to(torch.int16)
    else:
        nearest = value.to(dtype)
        bits = nearest.view(torch.int16) - (nearest.double().abs() > value.abs()).to(torch.int16)
    low, high = bits.view(dtype), (bits + 1).view(dtype)  # the neighbours toward and away from zero
    part = (value.double() - low.double()) / (high.double() - low.double())
    noise = rounding_noise(rng_key, value.numel()).view(value.shape) / 2**16
    up = noise + part >= 1 if dtype == torch.bfloat16 else noise < part
    return torch.where(value.isfinite(), torch.where(up, high, low), value.to(dtype))


def _fold(state, x, log_decay, B, scale):
    """One token onto one sequence's state (H, P, N)."""
    heads = len(log_decay)
    x, B = share(x, heads, 0), share(B, heads, 0)
    gain = x if scale is None else x * scale[:, None].to(x.dtype)
    step = (gain[:, :, None] * B[:, None, :]).to(state.dtype)
    return log_decay.exp()[:, None, None].to(state.dtype) * state + step


def _read(state, x, C, D):
    y = torch.einsum("hpn,hn->hp", state.to(x.dtype), share(C, len(state), 0))
    return y if D is None else y + D[:, None].to(x.dtype) * share(x, len(state), 0)


def state_update(state, slots, x, log_decay, B, C, scale=None, D=None, rng_key=None):
    """Returns (y, new state); the argument is left as it was."""
    state, y = state.clone(), x.new_zeros(*log_decay.shape, x.shape[2])
    for row, slot in enumerate(slots.tolist()):
        if slot >= 0:
            key = None if rng_key is None else rng_key[row]
            old = state[slot] if key is None else state[slot].to(log_decay.dtype)
            new = _fold(old, x[row], log_decay[row], B[row], None if scale is None else scale[row])
            y[row], state[slot] = _read(new, x[row], C[row], D), rounded(new, state.dtype, key)
    return y, state


def deferred_state_update(
    state, recent, recent_decay, pending, slots, x, log_decay, B, C, scale=None, D=None, period=1,
    rng_key=None,
):  # fmt: skip
    """Returns (y, new state, recent, recent_decay); the arguments are left as they were."""
    state, recent, recent_decay = state.clone(), recent.clone(), recent_decay.clone()
    y, width = x.new_zeros(*log_decay.shape, x.shape[2]), x.shape[1:].numel()
    for row, slot in enumerate(slots.tolist()):
        if slot < 0:
            continue
        key = None if rng_key is None else rng_key[row]
        held, new = int(pending[slot]), state[slot].to(log_decay.dtype)
        for entry, (decay, weight) in zip(recent[slot, :held], recent_decay[slot, :held]):
            xs, Bs = entry[:width].view(x.shape[1:]), entry[width:].view(B.shape[1:])
            new = _fold(new, xs, decay, Bs, weight)
        weight = torch.ones_like(log_decay[row]) if scale is None else scale[row]
        new = _fold(new, x[row], log_decay[row], B[row], weight)
        y[row] = _read(new, x[row], C[row], D)
        if held + 1 >= period:
            state[slot] = rounded(new, state.dtype, key)
        else:
            recent[slot, held] = torch.cat((x[row].flatten(), B[row].flatten()))
            recent_decay[slot, held] = torch.stack((log_decay[row], weight))
    return y, state, recent, recent_decay


def count_pending(pending, slots, period):
    """Returns the new pending; the argument is left as it was."""
    pending = pending.clone()
    for slot in slots[slots >= 0].tolist():
        pending[slot] = 0 if pending[slot] + 1 >= period else pending[slot] + 1
    return pending


def _keys(batch, g):
    return torch.randint(-(2**63), 2**63 - 1, (batch, 4), generator=g)


def state_update_inputs(
    batch=3, H=4, Hx=4, Gb=4, Gc=4, P=16, N=16, dtype=torch.float32, state_dtype=torch.float32,
    slots=None, scale=True, D=True, decay=1.0, noise=False, seed=0,
):  # fmt: skip
    """Random arguments of state_update."""
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
        "rng_key": _keys(batch, g) if noise else None,
    }


def recent_inputs(num_slots, H, width, dtype, pending, capacity, decay, g):
    """recent, recent_decay and pending of every slot; what does not count is poison."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    pending = torch.tensor(pending, dtype=torch.int32).expand(num_slots).contiguous()
    recent = torch.randn(num_slots, capacity, width, generator=g, dtype=torch.float64).to(dtype)
    kept = torch.rand(num_slots, capacity, 2, H, generator=g).to(wide)
    kept[:, :, 0] *= -decay
    unused = torch.arange(capacity) >= pending[:, None]
    recent[unused], kept[unused] = float("nan"), float("nan")
    return {"recent": recent, "recent_decay": kept, "pending": pending}


def deferred_state_update_inputs(period=4, capacity=7, pending=2, **change):
    """Random arguments of deferred_state_update; pending: of every slot, or one for each."""
    token = state_update_inputs(**change)
    key = token.pop("rng_key")
    slots, heads = token["state"].shape[:2]
    width = token["x"].shape[1:].numel() + token["B"].shape[1:].numel()
    g = torch.Generator().manual_seed(change.get("seed", 0) + 1)
    recent = recent_inputs(
        slots, heads, width, token["x"].dtype, pending, capacity, change.get("decay", 1.0), g
    )
    state = {"state": token.pop("state")}
    return state | recent | token | {"period": period, "rng_key": key}


def count_pending_inputs(period=4, slots=(5, -1, 0, 3, 1), pending=(0, 1, 2, 3, 4, 5, 6)):
    """Arguments of count_pending."""
    pending, slots = (torch.tensor(v, dtype=torch.int32) for v in (pending, slots))
    return {"pending": pending, "slots": slots, "period": period}


# ---- ssd_scan


def ssd_scan(x, log_decay, B, C, scale=None, D=None, initial_state=None, cu_seqlens=None):
    """Returns (y, final states), one token after the other."""
    heads = log_decay.shape[2]
    x, B, C = share(x, heads, 2), share(B, heads, 2), share(C, heads, 2)
    gain = x if scale is None else x * scale[..., None].to(x.dtype)
    tokens = (gain, log_decay.exp(), B, C)
    if cu_seqlens is None:
        sequences, dim = [[t[i : i + 1] for t in tokens] for i in range(x.shape[0])], 0
    else:
        offsets, dim = cu_seqlens.tolist(), 1
        sequences = [[t[:, i:j] for t in tokens] for i, j in pairwise(offsets)]
    y = [x.new_zeros(0, *x.shape[1:]) if dim == 0 else x.new_zeros(1, 0, *x.shape[2:])]
    final = [log_decay.new_zeros(0, heads, x.shape[3], B.shape[3])]
    for i, sequence in enumerate(sequences):
        state = log_decay.new_zeros(1, heads, x.shape[3], B.shape[3])
        state = state if initial_state is None else initial_state[i : i + 1]
        rows = [x.new_zeros(1, 0, heads, x.shape[3])]
        for u, decay, b, c in zip(*(t.unbind(1) for t in sequence)):
            state = decay[..., None, None] * state + u[..., None] * b[..., None, :]
            rows.append(torch.einsum("bhpn,bhn->bhp", state.to(x.dtype), c)[:, None])
        y.append(torch.cat(rows, 1))
        final.append(state)
    y = torch.cat(y, dim)
    if D is not None:
        y = y + D[:, None].to(x.dtype) * x
    return y, torch.cat(final)


def ssd_scan_inputs(
    batch=2, length=40, H=4, Hx=4, Gb=4, Gc=4, P=16, N=16, dtype=torch.float32, scale=True, D=True,
    initial_state=True, lengths=None, decay=1.0, seed=0,
):  # fmt: skip
    """Random arguments of ssd_scan."""
    g = torch.Generator().manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    sequences = batch
    cu_seqlens = None
    if lengths is not None:
        batch, length, sequences = 1, sum(lengths), len(lengths)
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    return {
        "x": normal(batch, length, Hx, P).to(dtype),
        "log_decay": (-decay * torch.rand(batch, length, H, generator=g)).to(wide),
        "B": normal(batch, length, Gb, N).to(dtype),
        "C": normal(batch, length, Gc, N).to(dtype),
        "scale": torch.rand(batch, length, H, generator=g).to(wide) if scale else None,
        "D": normal(H).to(wide) if D else None,
        "initial_state": normal(sequences, H, P, N).to(wide) if initial_state else None,
        "cu_seqlens": cu_seqlens,
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


def paged_attention(
    q, k_cache, v_cache, page_table, cu_seqlens_q, kv_lengths, scale=None, max_queries=None,
    shared=None, return_lse=False,
):  # fmt: skip
    """Gathers each row's pages, repeats heads, masks, softmax: one row after the other."""
    heads, head_dim = q.shape[1:]
    page_size, starts, y = k_cache.shape[2], cu_seqlens_q.tolist(), torch.zeros_like(q)
    lse = q.new_full(q.shape[:2], float("-inf"))
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
        scores = scores.masked_fill(future, float("-inf"))
        y[mine] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), share(v, heads, 1))
        lse[mine] = scores.logsumexp(-1).T
    return (y, lse) if return_lse else y


def paged_attention_inputs(
    lengths=(37, 5, 64), queries=(1, 1, 1), heads=6, kv_heads=2, head_dim=64, page_size=16,
    dtype=torch.float32, scale=None, magnitude=1.0, seed=0, groups=None, max_queries=None,
):  # fmt: skip
    """Everything that must not be read is poison: pages of nobody, the rest of a row's last page,
    and table entries past a row's length. groups: (rows, tokens they share) of neighbouring rows,
    until there are no rows left; None means that nobody does."""
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
    shared, row = [], 0
    for size, tokens in groups or ():
        pages = table[row, : tokens // page_size].clone()
        for i in range(row, row + size):
            if i > row and lengths[i] > 0:
                caches[:, table[i, : len(pages)].long()] = float("nan")
                table[i, : len(pages)] = pages
            shared.append([row, tokens])
        row += size
    return {
        "q": torch.randn(sum(queries), heads, head_dim, generator=g).to(dtype),
        "k_cache": caches[0].to(dtype),
        "v_cache": caches[1].to(dtype),
        "page_table": table,
        "cu_seqlens_q": torch.tensor([0, *torch.tensor(queries).cumsum(0)], dtype=torch.int32),
        "kv_lengths": torch.tensor(lengths, dtype=torch.int32),
        "scale": scale,
        "max_queries": max_queries,
        "shared": None if groups is None else torch.tensor(shared, dtype=torch.int32),
    }


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


def noise_halves(rng_key, first_block, size):
    """Numbers of 16 bits, eight of each block of a row's noise, (size) int64."""
    words = [(value >> shift) & 0xFFFFFFFF for value in rng_key.tolist() for shift in (0, 32)]
    name = philox(words[2:6], words[:2])
    block = np.arange(-(-size // 8), dtype=np.uint64) + np.uint64(first_block)
    noise = np.stack(philox([block, words[6], name[2], name[3]], name[:2]), -1).reshape(-1, 1)
    halves = np.concatenate((noise & np.uint64(0xFFFF), noise >> np.uint64(16)), -1)
    return torch.from_numpy(halves.astype(np.int64)).flatten()[:size]


def gumbel_noise(rng_key, vocabulary):
    """The noise of one row, (vocabulary) float64."""
    high, low = (noise_halves(rng_key, first, vocabulary) for first in (0, 1 << 30))
    r = high << 16 | low
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
    """Random arguments of paged_attention."""
    g = torch.Generator().manual_seed(seed)

    def per_row(value, dtype):
        return torch.tensor(value, dtype=dtype).expand(batch).contiguous()

    return {
        "logits": (spread * torch.randn(batch, vocabulary, generator=g)).to(dtype),
        "temperature": per_row(temperature, torch.float32),
        "top_k": per_row(top_k, torch.int32),
        "top_p": per_row(top_p, torch.float32),
        "min_p": per_row(min_p, torch.float32),
        "rng_key": _keys(batch, g),
    }


# ---- causal_conv1d, conv_update


def _sequences(x, cu_seqlens):
    """(rows of one sequence, its index) for sequences packed by cu_seqlens or one per batch row."""
    if cu_seqlens is None:
        return [((i, slice(None)), i) for i in range(x.shape[0])]
    return [((0, slice(i, j)), n) for n, (i, j) in enumerate(pairwise(cu_seqlens.tolist()))]


def causal_conv1d(x, weight, bias=None, initial_state=None, cu_seqlens=None, silu=False):
    """Returns (y, final states)."""
    width, y, final = weight.shape[1], torch.zeros_like(x), []
    for where, i in _sequences(x, cu_seqlens):
        past = x.new_zeros(width - 1, x.shape[2]) if initial_state is None else initial_state[i]
        inputs = torch.cat((past, x[where]))
        length = x[where].shape[0]
        out = sum(inputs[w : w + length] * weight[:, w] for w in range(width))
        out = out if bias is None else out + bias
        y = y.index_put(_index(x, where), torch.nn.functional.silu(out) if silu else out)
        final.append(inputs[length:])
    return y, torch.stack(final) if final else x.new_zeros(0, width - 1, x.shape[2])


def _index(x, where):
    tokens = torch.arange(x.shape[1])[where[1]]
    return torch.full_like(tokens, where[0]), tokens


def causal_conv1d_inputs(
    batch=2, length=19, channels=24, width=4, dtype=torch.float32, bias=True, initial_state=True,
    silu=True, lengths=None, seed=0,
):  # fmt: skip
    """Random arguments of causal_conv1d."""
    g = torch.Generator().manual_seed(seed)
    sequences, cu_seqlens = batch, None
    if lengths is not None:
        batch, length, sequences = 1, sum(lengths), len(lengths)
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    return {
        "x": normal(batch, length, channels),
        "weight": normal(channels, width),
        "bias": normal(channels) if bias else None,
        "initial_state": normal(sequences, width - 1, channels) if initial_state else None,
        "cu_seqlens": cu_seqlens,
        "silu": silu,
    }


def conv_update(state, slots, lengths, x, weight, bias=None, silu=False):
    """Returns (y, new state); the argument is left as it was."""
    state, y, width = state.clone(), torch.zeros_like(x), weight.shape[1]
    for row, (slot, length) in enumerate(zip(slots.tolist(), lengths.tolist())):
        if slot >= 0:
            past = state[slot, [(length + w) % width for w in range(width - 1)]]
            y[row] = causal_conv1d(x[row, None, None], weight, bias, past[None], None, silu)[0][
                0, 0
            ]
            state[slot, (length - 1) % width] = x[row]
    return y, state


def conv_update_inputs(
    batch=3, channels=24, width=4, dtype=torch.float32, bias=True, silu=True, slots=None,
    lengths=None, seed=0,
):  # fmt: skip
    """Random arguments of conv_update."""
    g = torch.Generator().manual_seed(seed)
    slots = torch.randperm(batch + 2, generator=g)[:batch] if slots is None else torch.tensor(slots)
    lengths = torch.randint(1, 40, (batch,), generator=g) if lengths is None else lengths

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    return {
        "state": normal(batch + 2, width, channels),
        "slots": slots.int(),
        "lengths": torch.as_tensor(lengths).int(),
        "x": normal(batch, channels),
        "weight": normal(channels, width),
        "bias": normal(channels) if bias else None,
        "silu": silu,
    }


# ---- selective_scan, selective_update


def selective_scan(x, delta, A, B, C, D=None, initial_state=None, cu_seqlens=None):
    """Returns (y, final states), one token after the other; states in delta's dtype."""
    channels = x.shape[2]
    B, C = share(B, channels, 2), share(C, channels, 2)
    y, final = torch.zeros_like(x), []
    for where, i in _sequences(x, cu_seqlens):
        state = torch.zeros_like(A) if initial_state is None else initial_state[i]
        rows = [x.new_zeros(0, channels)]
        for u, d, b, c in zip(x[where], delta[where], B[where], C[where]):
            state = (d[:, None] * A).exp() * state + (d * u)[:, None] * b
            rows.append((state.to(x.dtype) * c).sum(-1)[None])
        y = y.index_put(_index(x, where), torch.cat(rows))
        final.append(state)
    if D is not None:
        y = y + D.to(x.dtype) * x
    return y, torch.stack(final) if final else A.new_zeros(0, *A.shape)


def selective_scan_inputs(
    batch=2, length=21, channels=48, N=16, Gb=1, Gc=3, dtype=torch.float32, D=True,
    initial_state=True, lengths=None, decay=1.0, seed=0,
):  # fmt: skip
    """Random arguments of selective_scan."""
    g = torch.Generator().manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    sequences, cu_seqlens = batch, None
    if lengths is not None:
        batch, length, sequences = 1, sum(lengths), len(lengths)
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    return {
        "x": normal(batch, length, channels).to(dtype),
        "delta": torch.rand(batch, length, channels, generator=g).to(wide),
        "A": (-decay * torch.rand(channels, N, generator=g)).to(wide),
        "B": normal(batch, length, Gb, N).to(dtype),
        "C": normal(batch, length, Gc, N).to(dtype),
        "D": normal(channels).to(wide) if D else None,
        "initial_state": normal(sequences, channels, N).to(wide) if initial_state else None,
        "cu_seqlens": cu_seqlens,
    }


def selective_update(state, slots, x, delta, A, B, C, D=None):
    """Returns (y, new state); the argument is left as it was."""
    state, y = state.clone(), torch.zeros_like(x)
    for row, slot in enumerate(slots.tolist()):
        if slot >= 0:
            token = (t[row, None, None] for t in (x, delta))
            groups = (t[row, None, None] for t in (B, C))
            out, last = selective_scan(*token, A, *groups, D, state[slot, None].to(A.dtype))
            y[row], state[slot] = out[0, 0], last[0].to(state.dtype)
    return y, state


def selective_update_inputs(
    batch=3, channels=48, N=16, Gb=1, Gc=3, dtype=torch.float32, state_dtype=torch.float32, D=True,
    slots=None, seed=0,
):  # fmt: skip
    """Random arguments of selective_update."""
    g = torch.Generator().manual_seed(seed)
    inputs = selective_scan_inputs(batch, 1, channels, N, Gb, Gc, dtype, D, seed=seed)
    slots = torch.randperm(batch + 2, generator=g)[:batch] if slots is None else torch.tensor(slots)
    state = torch.randn(batch + 2, channels, N, generator=g, dtype=torch.float64).to(state_dtype)
    token = {name: inputs[name][:, 0] for name in ("x", "delta", "B", "C")}
    order = ("x", "delta", "A", "B", "C", "D")
    return {"state": state, "slots": slots.int()} | {n: (inputs | token)[n] for n in order}


# ---- gate, swiglu, softplus


def gate(x, z, bias=None):
    """x silu(z + bias)"""
    return x * torch.nn.functional.silu(z if bias is None else z + bias)


def gate_inputs(shape=(5, 37), dtype=torch.float32, bias=True, seed=0):
    """Random arguments of gate."""
    g = torch.Generator().manual_seed(seed)
    x, z = (4 * torch.randn(2, *shape, generator=g, dtype=torch.float64)).to(dtype)
    return {"x": x, "z": z, "bias": torch.randn(shape[-1], generator=g).to(dtype) if bias else None}


def swiglu(gate_up):
    """The second half times silu of the first"""
    z, x = gate_up.chunk(2, -1)
    return gate(x, z)


def swiglu_inputs(shape=(5, 37), dtype=torch.float32, seed=0):
    """Random arguments of swiglu; shape of its result."""
    inputs = gate_inputs(shape, dtype, bias=False, seed=seed)
    return {"gate_up": torch.cat((inputs["z"], inputs["x"]), -1)}


def softplus(x, bias=None):
    """log(1 + exp(x + bias)) in float32, or float64 for float64"""
    wide = x if x.dtype == torch.float64 else x.float()
    wide = wide if bias is None else wide + bias
    return torch.logaddexp(wide, torch.zeros_like(wide))


def softplus_inputs(shape=(5, 37), dtype=torch.float32, bias=True, seed=0):
    """Random arguments of softplus."""
    g = torch.Generator().manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x = (20 * torch.randn(*shape, generator=g, dtype=torch.float64)).to(dtype)
    return {"x": x, "bias": torch.randn(shape[-1], generator=g).to(wide) if bias else None}


# ---- distillation_losses


def distillation_losses(
    logits, taught, labels, beta=1.0, temperature=1.0, kl_weight=1.0, gradient=True
):
    """Cross entropy and divergence token by token, and the logits' gradient or the logits"""
    with torch.enable_grad():
        leaf = logits.detach().clone().requires_grad_()
        wide = leaf if leaf.dtype == torch.float64 else leaf.float()
        ce = torch.nn.functional.cross_entropy(wide, labels, reduction="none")
        kl = torch.zeros_like(ce)
        if taught is not None:
            s, t = (x.to(wide.dtype).div(temperature).log_softmax(-1) for x in (wide, taught))

            def divergence(p, q):
                return (p.exp() * (p - q).masked_fill(p.exp() == 0, 0)).sum(-1)

            if beta in (0, 1):
                kl = divergence(s, t) if beta else divergence(t, s)
            else:
                m = torch.logaddexp(s + math.log(1 - beta), t + math.log(beta))
                kl = beta * divergence(t, m) + (1 - beta) * divergence(s, m)
        loss = (1 - kl_weight) * ce if kl_weight < 1 else 0
        loss = loss + kl_weight * kl if kl_weight > 0 else loss
        result = torch.autograd.grad(loss.sum(), leaf)[0] if gradient else logits
    return ce.detach(), kl.detach(), result


def distillation_losses_inputs(
    shape=(5, 37), dtype=torch.float32, beta=1.0, temperature=1.0, kl_weight=1.0, gradient=True,
    taught=True, seed=0,
):  # fmt: skip
    """Random arguments of distillation_losses."""
    g = torch.Generator().manual_seed(seed)
    tokens, vocab = shape
    a, b = 3 * torch.randn(2, tokens, vocab, generator=g, dtype=torch.float64)
    return {
        "logits": a.to(dtype), "taught": (a + b / 3).to(dtype) if taught else None,
        "labels": torch.randint(vocab, (tokens,), generator=g), "beta": beta,
        "temperature": temperature, "kl_weight": kl_weight, "gradient": gradient,
    }  # fmt: skip


# ---- discrete_mamba2_update, mamba2_update, mamba1_update


def _recurrence(state, recent, recent_decay, pending, slots, token, period, rng_key):
    """(y, state, recent, recent_decay) by whichever operator the arguments ask for."""
    if recent is None:
        return *state_update(state, slots, *token, rng_key), None, None
    held = (recent, recent_decay, pending)
    return deferred_state_update(state, *held, slots, *token, period, rng_key)


def _no_padding(y, slots):
    return y.masked_fill((slots < 0)[:, None], 0)


def discrete_mamba2_update(
    conv_state, state, recent, recent_decay, pending, slots, lengths, projected, conv_weight,
    conv_bias, z_bias, D, period=1, rng_key=None,
):  # fmt: skip
    """Returns (out, conv_state, state, recent, recent_decay); the arguments are left as they were."""
    H, P, N = state.shape[1:]
    channels = conv_state.shape[2]
    group = (channels - H * P) // 2
    xBC, z, a = projected.split((channels, H * P, H), -1)
    conv, conv_state = conv_update(conv_state, slots, lengths, xBC, conv_weight, conv_bias)
    x, B, C = conv.split((H * P, group, group), -1)
    x, B, C = x.unflatten(-1, (H, P)), B.unflatten(-1, (-1, N)), C.unflatten(-1, (-1, N))
    log_decay = -softplus(a)
    token = (x, log_decay, B, C, None, D.to(log_decay.dtype))
    y, *states = _recurrence(state, recent, recent_decay, pending, slots, token, period, rng_key)
    return _no_padding(gate(y.flatten(1), z, z_bias), slots), conv_state, *states


def mamba2_update(
    conv_state, state, recent, recent_decay, pending, slots, lengths, projected, conv_weight,
    conv_bias, dt_bias, A_log, D, norm_weight, eps, period=1, rng_key=None,
):  # fmt: skip
    """Returns (out, conv_state, state, recent, recent_decay); the arguments are left as they were."""
    H, P, N = state.shape[1:]
    channels = conv_state.shape[2]
    K = (channels - H * N) // (P + N)
    z, xBC, dt = projected.split((H * P, channels, H), -1)
    conv, conv_state = conv_update(conv_state, slots, lengths, xBC, conv_weight, conv_bias, True)
    x, B, C = conv.split((K * P, K * N, H * N), -1)
    x, B, C = x.unflatten(-1, (K, P)), B.unflatten(-1, (K, N)), C.unflatten(-1, (H, N))
    wide = torch.float64 if dt.dtype == torch.float64 else torch.float32
    delta = softplus(dt, dt_bias.to(wide))
    token = (x, -delta * A_log.to(wide).exp(), B, C, delta, D.to(wide))
    y, *states = _recurrence(state, recent, recent_decay, pending, slots, token, period, rng_key)
    g = gate(y, z.unflatten(-1, (H, P)))
    out = _normalised(g, eps).flatten(1) * norm_weight
    return _no_padding(out, slots), conv_state, *states


def mamba1_update(
    conv_state, state, slots, lengths, projected, dt, conv_weight, conv_bias, dt_bias, A_log, D,
    kv_dim,
):  # fmt: skip
    """Returns (out, conv_state, state); the arguments are left as they were."""
    inner, N = A_log.shape
    z, x, B, C = projected[:, : 2 * (inner + kv_dim)].split((inner, kv_dim, kv_dim, inner), -1)
    x = share(x.unflatten(-1, (-1, N)), inner // N, 1).flatten(1)
    x, conv_state = conv_update(conv_state, slots, lengths, x, conv_weight, conv_bias, True)
    wide = torch.float64 if dt.dtype == torch.float64 else torch.float32
    delta, A = softplus(dt, dt_bias.to(wide)), -A_log.to(wide).exp()
    B, C = B.unflatten(-1, (-1, N)), C.unflatten(-1, (-1, N))
    y, state = selective_update(state, slots, x, delta, A, B, C, D.to(wide))
    return _no_padding(gate(y, z), slots), conv_state, state


def _mixer_inputs(batch, channels, width, state, columns, dtype, state_dtype, slots, lengths, g):
    """What every mixer's token starts with; a padding row's projection is poison."""
    slots = torch.randperm(batch + 2, generator=g)[:batch] if slots is None else torch.tensor(slots)
    lengths = torch.randint(1, 40, (batch,), generator=g) if lengths is None else lengths

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    projected = normal(batch, columns)
    projected[slots < 0] = float("nan")
    return normal, {
        "conv_state": normal(batch + 2, width, channels).to(dtype),
        "state": normal(batch + 2, *state).to(state_dtype),
        "slots": slots.int(),
        "lengths": torch.as_tensor(lengths).int(),
        "projected": projected.to(dtype),
        "conv_weight": (normal(channels, width) / width**0.5).to(dtype),
        "conv_bias": (normal(channels) / 4).to(dtype),
    }


def _held(inputs, recent, width, pending, capacity, g):
    """The arguments with recent, recent_decay and pending in their place."""
    slots, heads = inputs["state"].shape[:2]
    held = dict.fromkeys(("recent", "recent_decay", "pending"))
    if recent:
        dtype = inputs["projected"].dtype
        held = recent_inputs(slots, heads, width, dtype, pending, capacity, 1.0, g)
    first = {name: inputs.pop(name) for name in ("conv_state", "state")}
    return first | held | inputs


def discrete_mamba2_update_inputs(
    batch=3, H=4, G=4, P=16, N=16, width=4, dtype=torch.float32, state_dtype=torch.float32,
    slots=None, lengths=None, recent=True, period=4, capacity=7, pending=2, noise=False, seed=0,
):  # fmt: skip
    """Random arguments of discrete_mamba2_update."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    g = torch.Generator().manual_seed(seed)
    inner, channels = H * P, H * P + 2 * G * N
    common = (dtype, state_dtype, slots, lengths, g)
    columns = channels + inner + H
    normal, inputs = _mixer_inputs(batch, channels, width, (H, P, N), columns, *common)
    return _held(inputs, recent, inner + G * N, pending, capacity, g) | {
        "z_bias": normal(inner).to(dtype),
        "D": normal(H).to(wide),
        "period": period,
        "rng_key": _keys(batch, g) if noise else None,
    }


def mamba2_update_inputs(
    batch=3, H=4, K=2, P=16, N=16, width=4, dtype=torch.float32, state_dtype=torch.float32,
    slots=None, lengths=None, recent=True, period=4, capacity=7, pending=2, noise=False, seed=0,
):  # fmt: skip
    """Random arguments of mamba2_update."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    g = torch.Generator().manual_seed(seed)
    inner, channels = H * P, K * (P + N) + H * N
    common = (dtype, state_dtype, slots, lengths, g)
    columns = inner + channels + H
    normal, inputs = _mixer_inputs(batch, channels, width, (H, P, N), columns, *common)
    return _held(inputs, recent, K * (P + N), pending, capacity, g) | {
        "dt_bias": normal(H).to(wide),
        "A_log": normal(H).to(wide),
        "D": normal(H).to(wide),
        "norm_weight": normal(inner).to(dtype),
        "eps": 1e-5,
        "period": period,
        "rng_key": _keys(batch, g) if noise else None,
    }


def mamba1_update_inputs(
    batch=3, inner=96, kv_dim=32, N=16, rest=6, width=4, dtype=torch.float32,
    state_dtype=torch.float32, slots=None, lengths=None, seed=0,
):  # fmt: skip
    """Random arguments of mamba1_update; `rest` unread columns are poison."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    g = torch.Generator().manual_seed(seed)
    common = (dtype, state_dtype, slots, lengths, g)
    columns = 2 * (inner + kv_dim) + rest
    normal, inputs = _mixer_inputs(batch, inner, width, (inner, N), columns, *common)
    inputs["projected"][:, columns - rest :] = float("nan")
    tail = ("conv_weight", "conv_bias")
    first = {name: value for name, value in inputs.items() if name not in tail}
    return first | {
        "dt": normal(batch, inner).to(dtype),
        **{name: inputs[name] for name in tail},
        "dt_bias": normal(inner).to(dtype),
        "A_log": normal(inner, N).to(wide),
        "D": normal(inner).to(wide),
        "kv_dim": kv_dim,
    }


# ---- discrete_mamba2_scan, mamba2_scan


def discrete_mamba2_scan(
    projected, conv_weight, conv_bias, z_bias, D, state_dim, past=None, initial_state=None,
    cu_seqlens=None,
):  # fmt: skip
    """Returns (out, last inputs, final states)."""
    inner, heads, channels = len(z_bias), len(D), len(conv_weight)
    group = (channels - inner) // 2
    xBC, z, a = projected.split((channels, inner, heads), -1)
    conv, last = causal_conv1d(xBC, conv_weight, conv_bias, past, cu_seqlens)
    x, B, C = conv.split((inner, group, group), -1)
    x = x.unflatten(-1, (heads, inner // heads))
    B, C = (t.unflatten(-1, (group // state_dim, state_dim)) for t in (B, C))
    log_decay = -softplus(a)
    y, final = ssd_scan(x, log_decay, B, C, None, D.to(log_decay.dtype), initial_state, cu_seqlens)
    return gate(y.flatten(2), z, z_bias), last, final


def mamba2_scan(
    projected, conv_weight, conv_bias, dt_bias, A_log, D, norm_weight, eps, state_dim, past=None,
    initial_state=None, cu_seqlens=None,
):  # fmt: skip
    """Returns (out, last inputs, final states)."""
    inner, H, channels, N = len(norm_weight), len(D), len(conv_weight), state_dim
    P = inner // H
    K = (channels - H * N) // (P + N)
    z, xBC, dt = projected.split((inner, channels, H), -1)
    conv, last = causal_conv1d(xBC, conv_weight, conv_bias, past, cu_seqlens, True)
    x, B, C = conv.split((K * P, K * N, H * N), -1)
    x, B, C = x.unflatten(-1, (K, P)), B.unflatten(-1, (K, N)), C.unflatten(-1, (H, N))
    wide = torch.float64 if dt.dtype == torch.float64 else torch.float32
    delta = softplus(dt, dt_bias.to(wide))
    log_decay = -delta * A_log.to(wide).exp()
    y, final = ssd_scan(x, log_decay, B, C, delta, D.to(wide), initial_state, cu_seqlens)
    g = gate(y, z.unflatten(-1, (H, P)))
    return _normalised(g, eps).flatten(2) * norm_weight, last, final


def _mixer_scan_inputs(
    batch, length, channels, columns, state, width, dtype, past, initial_state, lengths, g
):
    """What both mixers start with, and what they end with."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    sequences, cu_seqlens = batch, None
    if lengths is not None:
        batch, length, sequences = 1, sum(lengths), len(lengths)
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    first = {
        "projected": normal(batch, length, columns).to(dtype),
        "conv_weight": (normal(channels, width) / width**0.5).to(dtype),
        "conv_bias": (normal(channels) / 4).to(dtype),
    }
    last = {
        "past": normal(sequences, width - 1, channels).to(dtype) if past else None,
        "initial_state": normal(sequences, *state).to(wide) if initial_state else None,
        "cu_seqlens": cu_seqlens,
    }
    return normal, wide, first, last


def discrete_mamba2_scan_inputs(
    batch=2, length=20, H=4, G=4, P=16, N=16, width=4, dtype=torch.float32, past=True,
    initial_state=True, lengths=None, seed=0,
):  # fmt: skip
    """Random arguments of discrete_mamba2_scan."""
    g = torch.Generator().manual_seed(seed)
    inner, channels = H * P, H * P + 2 * G * N
    common = (width, dtype, past, initial_state, lengths, g)
    columns = channels + inner + H
    normal, wide, first, last = _mixer_scan_inputs(
        batch, length, channels, columns, (H, P, N), *common
    )
    own = {"z_bias": normal(inner).to(dtype), "D": normal(H).to(wide), "state_dim": N}
    return first | own | last


def mamba2_scan_inputs(
    batch=2, length=20, H=4, K=2, P=16, N=16, width=4, dtype=torch.float32, past=True,
    initial_state=True, lengths=None, seed=0,
):  # fmt: skip
    """Random arguments of mamba2_scan."""
    g = torch.Generator().manual_seed(seed)
    inner, channels = H * P, K * (P + N) + H * N
    common = (width, dtype, past, initial_state, lengths, g)
    columns = inner + channels + H
    normal, wide, first, last = _mixer_scan_inputs(
        batch, length, channels, columns, (H, P, N), *common
    )
    own = {
        "dt_bias": normal(H).to(wide),
        "A_log": normal(H).to(wide),
        "D": normal(H).to(wide),
        "norm_weight": normal(inner).to(dtype),
        "eps": 1e-5,
        "state_dim": N,
    }
    return first | own | last


# ---- add_rms_norm, rotate


def _normalised(x, eps):
    wide = x if x.dtype == torch.float64 else x.float()
    return (wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt()).to(x.dtype)


def add_rms_norm(h, delta, weight, eps):
    """Returns (y, h + delta)."""
    h = h.clone() if delta is None else h + delta
    return _normalised(h, eps) * weight, h


def add_rms_norm_inputs(
    shape=(5, 96), dtype=torch.float32, delta=True, eps=1e-5, magnitude=1.0, seed=0
):
    """Random arguments of add_rms_norm."""
    g = torch.Generator().manual_seed(seed)
    h, other = (magnitude * torch.randn(2, *shape, generator=g, dtype=torch.float64)).to(dtype)
    weight = torch.randn(shape[-1], generator=g).to(dtype)
    return {"h": h, "delta": other if delta else None, "weight": weight, "eps": eps}


def rotate(x, positions, inv_freq):
    """Returns the rotated x; the argument is left as it was."""
    angle = (positions.float()[:, None, None] * inv_freq.float()).double()
    cos, sin = angle.cos().float(), angle.sin().float()
    if x.dtype == torch.float64:
        cos, sin = cos.double(), sin.double()
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)


def rotate_inputs(
    tokens=5, heads=3, head_dim=64, positions=None, theta=5e5, dtype=torch.float32, seed=0
):
    """Random arguments of rotate."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, heads, head_dim, generator=g, dtype=torch.float64).to(dtype)
    drawn = torch.randint(0, 131072, (tokens,), generator=g)
    positions = drawn if positions is None else torch.tensor(positions)
    inv_freq = 1 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    return {"x": x, "positions": positions.int(), "inv_freq": inv_freq}


# ---- advance


def advance(
    token, logprob, stop_ids, last, slots, lengths, remaining, rng_key, drawn, logprobs,
    step,
):  # fmt: skip
    """Returns everything from `last` on, moved; the arguments are left as they were."""
    moved = (last, slots, lengths, remaining, rng_key, drawn, logprobs, step)
    last, slots, lengths, remaining, rng_key, drawn, logprobs, step = (t.clone() for t in moved)
    t = int(step[0])
    for row, slot in enumerate(slots.tolist()):
        drawn[t, row] = token[row] if slot >= 0 else -2
        if slot < 0:
            continue
        last[row], logprobs[t, row] = token[row], logprob[row]
        remaining[row] -= 1
        if token[row] < 0 or token[row] in stop_ids[row] or remaining[row] == 0:
            slots[row], lengths[row] = -1, 0
        else:
            lengths[row] += 1
            rng_key[row, 3] += 1
    step[0] += 1
    return last, slots, lengths, remaining, rng_key, drawn, logprobs, step


def advance_inputs(rows=12, steps=5, t=2, stops=3, spare=2, alive=0.8, seed=0):
    """Random arguments of advance: few tokens and little left, so that rows end for every reason."""
    g = torch.Generator().manual_seed(seed)

    def ints(low, high, *shape, dtype=torch.int32):
        return torch.randint(low, high, shape, generator=g).to(dtype)

    slots = torch.randperm(rows + 3, generator=g)[:rows].int()
    ended = torch.rand(rows, generator=g) >= alive
    return {
        "token": ints(-1, 9, rows, dtype=torch.int64),
        "logprob": -torch.rand(rows, generator=g),
        "stop_ids": ints(-1, 9, rows, stops, dtype=torch.int64),
        "last": ints(0, 9, rows, dtype=torch.int64),
        "slots": slots.masked_fill(ended, -1),
        "lengths": ints(1, 50, rows),
        "remaining": ints(1, 4, rows),
        "rng_key": _keys(rows, g),
        "drawn": ints(0, 9, steps, rows + spare, dtype=torch.int64),
        "logprobs": torch.randn(steps, rows + spare, generator=g),
        "step": torch.tensor([t], dtype=torch.int32),
    }


def append_kv_inputs(queries=(1, 1, 1), **change):
    """Random arguments of append_kv."""
    inputs = paged_attention_inputs(queries=queries, **change)
    k_cache = inputs["k_cache"]
    g = torch.Generator().manual_seed(1)
    shape = (2, sum(queries), k_cache.shape[1], k_cache.shape[3])
    k, v = torch.randn(shape, generator=g).to(k_cache.dtype)
    names = ("page_table", "cu_seqlens_q", "kv_lengths")
    rest = {name: inputs[name] for name in names}
    return {"k_cache": k_cache, "v_cache": inputs["v_cache"], "k": k, "v": v, **rest}


def rotate_append_kv(k_cache, v_cache, qkv, inv_freq, page_table, cu_seqlens_q, kv_lengths):
    """Returns the new (k_cache, v_cache, qkv): rotate, then append_kv."""
    kv_heads, starts = k_cache.shape[1], cu_seqlens_q.tolist()
    positions = torch.zeros(len(qkv), dtype=torch.int32)
    for row, length in enumerate(kv_lengths.tolist()):
        mine = torch.arange(starts[row], starts[row + 1])
        positions[mine] = (length - starts[row + 1] + mine).int() if length > 0 else -1
    q, k, v = qkv.split([qkv.shape[1] - 2 * kv_heads, kv_heads, kv_heads], 1)
    q = torch.where(positions[:, None, None] < 0, q, rotate(q, positions, inv_freq))
    k_cache, v_cache = append_kv(
        k_cache, v_cache, rotate(k, positions, inv_freq), v, page_table, cu_seqlens_q, kv_lengths
    )
    return k_cache, v_cache, torch.cat((q, k, v), 1)


def rotate_append_kv_inputs(queries=(1, 1, 1), heads=6, theta=5e5, **change):
    """Random arguments of rotate_append_kv; what nobody wrote is 0, where append_kv has NaN."""
    inputs = append_kv_inputs(queries=queries, **change)
    k_cache, v_cache = (inputs[name].nan_to_num() for name in ("k_cache", "v_cache"))
    head_dim = k_cache.shape[3]
    q = torch.randn(sum(queries), heads, head_dim, generator=torch.Generator().manual_seed(2))
    names = ("page_table", "cu_seqlens_q", "kv_lengths")
    return {
        "k_cache": k_cache,
        "v_cache": v_cache,
        "qkv": torch.cat((q.to(k_cache.dtype), inputs["k"], inputs["v"]), 1),
        "inv_freq": 1 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim),
        **{name: inputs[name] for name in names},
    }


def linear(x, weight, bias=None):
    """x W^T + b"""
    y = x @ weight.T
    return y if bias is None else y + bias


def linear_inputs(
    rows=3, in_features=64, out_features=48, dtype=torch.float32, bias=True, shape=None, seed=0
):
    """Random arguments of linear."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    weight = normal(out_features, in_features) / math.sqrt(in_features)
    return {
        "x": normal(*((rows,) if shape is None else shape), in_features).to(dtype),
        "weight": weight.to(dtype),
        "bias": normal(out_features).to(dtype) if bias else None,
    }


def rms_norm_linear(h, norm_weight, eps, weight, bias=None, gated=False):
    """W norm(h) + b; gated: the second half times silu of the first"""
    y = linear(_normalised(h, eps) * norm_weight, weight, bias)
    return swiglu(y) if gated else y


def rms_norm_linear_inputs(gated=False, seed=0, **sizes):
    """Random arguments of rms_norm_linear; sizes as of linear_inputs."""
    inputs = linear_inputs(seed=seed, **sizes)
    g = torch.Generator().manual_seed(seed + 1)
    x = inputs["x"]
    return {
        "h": 3 * x,
        "norm_weight": torch.randn(x.shape[-1], generator=g).to(x.dtype),
        "eps": 1e-5,
        "weight": inputs["weight"],
        "bias": inputs["bias"],
        "gated": gated,
    }


def add_linear(h, x, weight):
    """Returns h + x W^T."""
    return h + linear(x, weight)


def add_linear_inputs(seed=0, **sizes):
    """Random arguments of add_linear; sizes as of linear_inputs."""
    inputs = linear_inputs(seed=seed, bias=False, **sizes)
    g = torch.Generator().manual_seed(seed + 1)
    shape = *inputs["x"].shape[:-1], inputs["weight"].shape[0]
    h = torch.randn(shape, generator=g).to(inputs["x"].dtype)
    return {"h": h, "x": inputs["x"], "weight": inputs["weight"]}


# ---- all of them

# Operator -> its definition, the maker of its inputs, the arguments it mutates.
OPERATORS = {
    "ssd_scan": (ssd_scan, ssd_scan_inputs, ()),
    "state_update": (state_update, state_update_inputs, ("state",)),
    "deferred_state_update": (
        deferred_state_update,
        deferred_state_update_inputs,
        ("state", "recent", "recent_decay"),
    ),
    "count_pending": (count_pending, count_pending_inputs, ("pending",)),
    "selective_scan": (selective_scan, selective_scan_inputs, ()),
    "selective_update": (selective_update, selective_update_inputs, ("state",)),
    "causal_conv1d": (causal_conv1d, causal_conv1d_inputs, ()),
    "conv_update": (conv_update, conv_update_inputs, ("state",)),
    "discrete_mamba2_update": (
        discrete_mamba2_update,
        discrete_mamba2_update_inputs,
        ("conv_state", "state", "recent", "recent_decay"),
    ),
    "mamba2_update": (
        mamba2_update,
        mamba2_update_inputs,
        ("conv_state", "state", "recent", "recent_decay"),
    ),
    "discrete_mamba2_scan": (discrete_mamba2_scan, discrete_mamba2_scan_inputs, ()),
    "mamba2_scan": (mamba2_scan, mamba2_scan_inputs, ()),
    "mamba1_update": (mamba1_update, mamba1_update_inputs, ("conv_state", "state")),
    "gate": (gate, gate_inputs, ()),
    "swiglu": (swiglu, swiglu_inputs, ()),
    "linear": (linear, linear_inputs, ()),
    "rms_norm_linear": (rms_norm_linear, rms_norm_linear_inputs, ()),
    "add_linear": (add_linear, add_linear_inputs, ("h",)),
    "softplus": (softplus, softplus_inputs, ()),
    "distillation_losses": (distillation_losses, distillation_losses_inputs, ("logits",)),
    "add_rms_norm": (add_rms_norm, add_rms_norm_inputs, ("h",)),
    "rotate": (rotate, rotate_inputs, ("x",)),
    "append_kv": (append_kv, append_kv_inputs, ("k_cache", "v_cache")),
    "rotate_append_kv": (
        rotate_append_kv,
        rotate_append_kv_inputs,
        ("k_cache", "v_cache", "qkv"),
    ),
    "paged_attention": (paged_attention, paged_attention_inputs, ()),
    "sample": (sample, sample_inputs, ()),
    "advance": (
        advance,
        advance_inputs,
        (
            "last",
            "slots",
            "lengths",
            "remaining",
            "rng_key",
            "drawn",
            "logprobs",
            "step",
        ),
    ),
}


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal bit for bit, NaN counted as equal to NaN."""
    return torch.equal(a.nan_to_num(12345.0), b.nan_to_num(12345.0))


def moved_to(device: str, inputs: dict) -> dict:
    """Copies of the tensors among arguments, on a device, beside the other arguments."""
    return {k: v.to(device, copy=True) if isinstance(v, Tensor) else v for k, v in inputs.items()}


def check(operator, name: str, device: str = "cpu", **case) -> dict:
    """Run `operator` on inputs made from `case` and compare everything it returns or mutates.

    Returns the arguments after the call, on `device`. Raises AssertionError naming the worst element.
    """
    definition, make, mutated = OPERATORS[name]
    inputs = make(**case)
    oracle = _outputs(definition(**{k: widen(v) for k, v in inputs.items()}))
    plain = _outputs(definition(**inputs))
    moved = moved_to(device, inputs)
    actual = _outputs((*_outputs(operator(**moved)), *(moved[argument] for argument in mutated)))
    assert len(actual) == len(oracle), f"{name}: {len(oracle)} results expected, got {len(actual)}"
    for i, results in enumerate(zip(actual, oracle, plain)):
        assert_close(*results, f"{name}, result {i}")
    return moved


def _outputs(value):
    values = [value] if value is None or isinstance(value, Tensor) else value
    return [v for v in values if v is not None]
