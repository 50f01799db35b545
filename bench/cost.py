"""Bytes that must move and FLOPs that must be done, as formulas: the roof under every measurement."""


def state_update_bytes(batch, heads, head_dim, state_dim, state_bytes=4, data_bytes=4):
    """The state is read and written once; x, B, C come in and y goes out once (B, C per head)."""
    state = 2 * heads * head_dim * state_dim * state_bytes
    data = heads * (2 * head_dim + 2 * state_dim) * data_bytes
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


def paged_attention_bytes(lengths, queries, heads, kv_heads, head_dim, data_bytes=4):
    """K and V of every row are read once; q comes in and y goes out once."""
    cache = 2 * sum(lengths) * kv_heads * head_dim
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
