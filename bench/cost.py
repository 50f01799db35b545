"""Bytes that must move and FLOPs that must be done, as formulas: the roof under every measurement."""


def state_update_bytes(batch, heads, head_dim, state_dim, state_bytes=4, data_bytes=4):
    """The state is read and written once; x, B, C come in and y goes out once (B, C per head)."""
    state = 2 * heads * head_dim * state_dim * state_bytes
    data = heads * (2 * head_dim + 2 * state_dim) * data_bytes
    return batch * (state + data)
