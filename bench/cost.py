"""Bytes that must move and FLOPs that must be done, as formulas: the roof under every measurement."""


def state_update_bytes(batch, heads, head_dim, state_dim, state_bytes=4, data_bytes=4):
    """The state is read and written once; x, B, C come in and y goes out once (B, C per head)."""
    state = 2 * heads * head_dim * state_dim * state_bytes
    data = heads * (2 * head_dim + 2 * state_dim) * data_bytes
    return batch * (state + data)


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
