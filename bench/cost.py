"""Bytes that must move and FLOPs that must be done, as formulas: the roof under every measurement."""

import math
from functools import lru_cache

import torch

# Measured on one H100 80GB HBM3: a device copy (read + write) and a bf16 8192^3 matmul.
H100_BYTES_PER_S = 3.03e12
H100_FLOPS_PER_S = 753e12
H100_L2_BYTES = 50e6


def rotation(footprint, past=4):
    """How many input sets of `footprint` bytes exceed the L2 `past` times: each call finds its own cold."""
    return max(2, math.ceil(past * H100_L2_BYTES / footprint))


def state_update_bytes(
    batch, heads, head_dim, state_dim, state_bytes=4, data_bytes=4, kv_heads=None
):
    """The state is read and written once; x, B, C come in and y goes out once.

    C is per head; x and B have kv_heads heads, or one per head if None.
    """
    kv_heads = heads if kv_heads is None else kv_heads
    state = 2 * heads * head_dim * state_dim * state_bytes
    data = (heads + kv_heads) * (head_dim + state_dim) * data_bytes
    return batch * (state + data)


def ssd_scan_bytes(tokens, heads, head_dim, state_dim, data_bytes=4):
    """x, B, C and the fp32 decay come in and y goes out once (B, C per head)."""
    return tokens * heads * ((2 * head_dim + 2 * state_dim) * data_bytes + 4)


def ssd_scan_flops(tokens, heads, head_dim, state_dim):
    """The recurrence itself, one token after the other: S += u B^T and y = S C, a decay of S."""
    return tokens * heads * 5 * head_dim * state_dim


def ssd_scan_backward_bytes(tokens, heads, head_dim, state_dim, data_bytes=4):
    """dy, x, B, C and the decay come in; dx, dB, dC and the decay's gradient go out once."""
    return tokens * heads * ((3 * head_dim + 4 * state_dim) * data_bytes + 8)


def ssd_scan_backward_flops(tokens, heads, head_dim, state_dim):
    """The states once more (3), then dS, dC, dB, dx and the decay's gradient (3 + 2 + 2 + 2 + 2)."""
    return tokens * heads * 14 * head_dim * state_dim


def paged_attention_bytes(lengths, queries, heads, kv_heads, head_dim, data_bytes=4, prefix=0):
    """K and V of every row are read once, those of a prefix that all rows share once for all of them;
    q comes in and y goes out once."""
    cache = 2 * (sum(lengths) - max(0, len(lengths) - 1) * prefix) * kv_heads * head_dim
    return (cache + 2 * sum(queries) * heads * head_dim) * data_bytes


def paged_attention_flops(lengths, queries, heads, head_dim):
    """Two products per visible (query, position) pair: scores and values."""
    pairs = sum(n * length - n * (n - 1) // 2 for length, n in zip(lengths, queries))
    return 4 * pairs * heads * head_dim


def sample_bytes(batch, vocabulary, data_bytes=4):
    """The logits are read once."""
    return batch * vocabulary * data_bytes


def selective_scan_bytes(tokens, channels, data_bytes=4):
    """x and the fp32 step come in and y goes out once; B and C are small beside them."""
    return tokens * channels * (2 * data_bytes + 4)


def selective_update_bytes(batch, channels, state_dim, state_bytes=4):
    """The state is read and written once; all else is small beside it."""
    return 2 * batch * channels * state_dim * state_bytes


# ---- one decode step of a whole model


@lru_cache
def _model(config):
    """Elements of the matrices, and of all layers' (scan state, convolution state, K and V a token)."""
    from reasoners.model import HybridLM, Linear

    with torch.device("meta"):
        model = HybridLM(config)
    matrices = sum(m.weight.numel() for m in model.modules() if isinstance(m, Linear))
    shapes = [layer.mixer.cache_shapes() for layer in model.layers]
    scan, conv, kv = (
        sum(math.prod(s[n]) for s in shapes if n in s) for n in ("scan", "conv", "kv")
    )
    return matrices, scan, conv, 2 * kv


def decode_weight_bytes(config, weight_bytes=2):
    """Every matrix is read once; the head is one of them, tied to the embedding or not."""
    return _model(config)[0] * weight_bytes


def decode_step_bytes(config, batch, length, state_bytes=4, weight_bytes=2):
    """The weights once; per sequence, states read and written and `length` tokens of K and V read.

    Of a convolution's ring a step reads all entries but one and writes that one. Convolution states,
    keys and values are in the weights' dtype. Activations, norms, biases and logits are small beside
    these and left out.
    """
    _, scan, conv, kv = _model(config)
    sequence = 2 * scan * state_bytes + (conv + length * kv) * weight_bytes
    return decode_weight_bytes(config, weight_bytes) + batch * sequence


def decode_step_flops(config, batch):
    """The matrix products with the weights: two FLOPs per weight and sequence."""
    return 2 * batch * _model(config)[0]


def roof_s(config, batch, length, state_bytes=4, weight_bytes=2):
    """Seconds of one decode step on an H100 at its measured copy and matmul rates.

    The weights' traffic hides behind their products, or these behind it; what else moves is added.
    """
    weights = decode_weight_bytes(config, weight_bytes)
    other = decode_step_bytes(config, batch, length, state_bytes, weight_bytes) - weights
    products = decode_step_flops(config, batch) / H100_FLOPS_PER_S
    return max(weights / H100_BYTES_PER_S, products) + other / H100_BYTES_PER_S
