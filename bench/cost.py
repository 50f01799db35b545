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
