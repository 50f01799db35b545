"""Bytes that must move and FLOPs that must be done, as formulas: the roof under every measurement."""

import math
import statistics
from dataclasses import dataclass
from functools import lru_cache

import torch


@dataclass(frozen=True)
class Device:
    """What a GPU does at most: bytes a second of a device copy (read + write), FLOPs a second of a bf16
    8192^3 product of random matrices, exponentials a second: 16 a cycle of a multiprocessor."""

    name: str
    bytes_per_s: float
    flops_per_s: float
    l2_bytes: float = 50e6
    exponentials_per_s: float = 132 * 16 * 1.755e9


H100 = Device("NVIDIA H100 80GB HBM3", 3.03e12, 753e12)  # measured; the targets are for it


@lru_cache
def device():
    """This machine's GPU, measured now; an H100 where there is none."""
    if not torch.cuda.is_available():
        return H100

    def median_s(run):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        times = []
        for _ in range(15):
            start.record()
            run()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e-3)
        return statistics.median(times[3:])

    source, target = torch.empty(2, 2**31, dtype=torch.uint8, device="cuda").random_()
    copy_s = median_s(lambda: target.copy_(source))
    a, b, product = torch.randn(3, 8192, 8192, device="cuda").bfloat16()
    product_s = median_s(lambda: torch.mm(a, b, out=product))
    properties = torch.cuda.get_device_properties(0)
    return Device(
        properties.name, 2 * source.numel() / copy_s, 2 * 8192**3 / product_s,
        properties.L2_cache_size,
        properties.multi_processor_count * 16 * getattr(properties, "clock_rate", 1.755e6) * 1e3,
    )  # fmt: skip


def target_here_us(target_us, num_bytes):
    """A target for an H100 on this device: what it allows beside the bytes' time stays the same."""
    change_s = num_bytes / device().bytes_per_s - num_bytes / H100.bytes_per_s
    return target_us + change_s * 1e6


def rotation(footprint, past=4):
    """How many input sets of `footprint` bytes exceed the L2 `past` times: each call finds its own cold."""
    return max(2, math.ceil(past * device().l2_bytes / footprint))


def state_update_bytes(
    batch, heads, head_dim, state_dim, state_bytes=4, data_bytes=4, kv_heads=None, period=1
):
    """The state is read and written once; x, B, C come in and y goes out once.

    C is per head; x and B have kv_heads heads, or one per head if None. period: the state is written
    every so many tokens; x and B of those since then are read, and this one's are written.
    """
    kv_heads = heads if kv_heads is None else kv_heads
    state = heads * head_dim * state_dim * state_bytes * (1 + 1 / period)
    data = (heads + kv_heads) * (head_dim + state_dim) * data_bytes
    recent = kv_heads * (head_dim + state_dim) * data_bytes + 8 * heads
    recent *= (period - 1) / 2 + (period - 1) / period
    return round(batch * (state + data + recent))


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


def selective_scan_backward_bytes(tokens, channels, data_bytes=4):
    """dy, x and the fp32 step come in, and the gradients of the last two go out once."""
    return tokens * channels * (3 * data_bytes + 8)


def selective_scan_s(num_bytes, tokens, channels, state_dim):
    """The longer of the bytes' time and that of an exponential for every state entry and token."""
    exponentials = tokens * channels * state_dim
    return max(num_bytes / device().bytes_per_s, exponentials / device().exponentials_per_s)


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
    """Seconds of one decode step at the copy and matmul rates of this machine's GPU.

    The weights' traffic hides behind their products, or these behind it; what else moves is added.
    """
    on = device()
    weights = decode_weight_bytes(config, weight_bytes)
    other = decode_step_bytes(config, batch, length, state_bytes, weight_bytes) - weights
    products = decode_step_flops(config, batch) / on.flops_per_s
    return max(weights / on.bytes_per_s, products) + other / on.bytes_per_s
