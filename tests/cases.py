"""The case table of every operator: a base case, then one changed factor a row, named."""

import torch

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
    "noise": {"state_dtype": torch.bfloat16, "noise": True},
    "noise, bf16, padding": {
        "dtype": torch.bfloat16, "state_dtype": torch.bfloat16, "noise": True, "batch": 4,
        "slots": [5, -1, 0, -7],
    },
    "noise, odd extents": {"state_dtype": torch.bfloat16, "noise": True, "P": 7, "N": 5},
}  # fmt: skip

SSD_SCAN_CASES = {
    "base": {},
    "bf16": {"dtype": torch.bfloat16},
    "no scale": {"scale": False},
    "no D": {"D": False},
    "no initial state": {"initial_state": False},
    "no option, bf16": {
        "scale": False, "D": False, "initial_state": False, "dtype": torch.bfloat16,
    },
    "batch 1": {"batch": 1},
    "empty batch": {"batch": 0},
    "length 0": {"length": 0},
    "length 1": {"length": 1},
    "a chunk less one": {"length": 31},
    "a chunk": {"length": 32},
    "a chunk and one": {"length": 33},
    "prime length": {"length": 131},
    "kv sharing (kv, kv, H)": {"Hx": 2, "Gb": 2},
    "one group (H, 1, 1), bf16": {"Gb": 1, "Gc": 1, "dtype": torch.bfloat16},
    "sharing out of step (2, 3, 1)": {"H": 6, "Hx": 2, "Gb": 3, "Gc": 1},
    "P 64, N 64 (Llamba-1B)": {"batch": 1, "P": 64, "N": 64, "H": 2, "Hx": 2, "Gb": 2, "Gc": 2},
    "P 96 (Llamba-3B), bf16": {
        "batch": 1, "P": 96, "N": 64, "H": 2, "Hx": 2, "Gb": 2, "Gc": 2, "dtype": torch.bfloat16,
    },
    "P 128, N 128": {
        "batch": 1, "length": 33, "P": 128, "N": 128, "H": 2, "Hx": 1, "Gb": 1, "Gc": 2,
    },
    "odd extents": {"P": 7, "N": 5},
    "zero decay": {"decay": 0.0},
    "decay -20": {"decay": 20.0},
    "decay -1000": {"decay": 1000.0},
    "packed": {"lengths": [33, 0, 1, 32, 47]},
    "packed, shared, no initial state, bf16": {
        "lengths": [5, 64], "Hx": 1, "Gb": 2, "initial_state": False, "dtype": torch.bfloat16,
    },
    "only empty sequences": {"lengths": [0, 0]},
}  # fmt: skip

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
    "shared pages": {
        "lengths": (600, 40, 560, 530, 300), "queries": (1,) * 5, "groups": ((1, 0), (1, 0), (3, 272)),
    },
    "shared pages, bf16": {
        "lengths": (600, 40, 560, 530, 300), "queries": (1,) * 5, "groups": ((1, 0), (1, 0), (3, 272)),
        "dtype": torch.bfloat16,
    },
    "several splits, bf16": {
        "lengths": (255, 256, 257, 2049), "queries": (1,) * 4, "dtype": torch.bfloat16,
    },
    # On CUDA more splits than a batch of combine_kernel.
    "a long row, bf16": {"lengths": (40009,), "queries": (1,), "dtype": torch.bfloat16},
    "a long row, group 8, D 128, bf16": {
        "lengths": (35000,), "queries": (1,), "heads": 8, "kv_heads": 1, "head_dim": 128,
        "dtype": torch.bfloat16,
    },
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
    # What tensor core kernels tile: 128 queries and heads by 64 or 128 positions.
    "prefill, prime lengths": {
        "lengths": (127, 61, 131), "queries": (127, 61, 131), "dtype": torch.bfloat16,
    },
    "prefill, cached pages and a piece": {
        "lengths": (331, 257), "queries": (131, 64), "dtype": torch.bfloat16,
    },
    "prefill, a piece of one token": {
        "lengths": (130, 77), "queries": (1, 1), "max_queries": 2, "dtype": torch.bfloat16,
    },
    "prefill, ragged and padding rows": {
        "lengths": (0, 65, 9, -5, 200, 64, 0), "queries": (0, 65, 1, 140, 7, 0, 3),
        "dtype": torch.bfloat16,
    },
    "prefill, many rows": {
        "lengths": tuple(3 + 5 * i % 90 for i in range(75)),
        "queries": tuple(i % 4 for i in range(75)), "dtype": torch.bfloat16,
    },
    "prefill, group 1": {
        "lengths": (197,), "queries": (150,), "heads": 2, "dtype": torch.bfloat16,
    },
    "prefill, group 4, D 128": {
        "lengths": (150,), "queries": (101,), "heads": 8, "head_dim": 128, "dtype": torch.bfloat16,
    },
    "prefill, group 3, D 128": {
        "lengths": (150,), "queries": (101,), "head_dim": 128, "dtype": torch.bfloat16,
    },
    "prefill, group 8, D 96": {
        "lengths": (150,), "queries": (101,), "heads": 16, "head_dim": 96, "dtype": torch.bfloat16,
    },
    "prefill, around steps": {
        "lengths": (127, 128, 129, 255, 256, 257), "queries": (31, 32, 33, 65, 64, 63), "heads": 8,
        "dtype": torch.bfloat16,
    },
    "prefill, around steps, D 128": {
        "lengths": (256, 257, 385), "queries": (256, 129, 43), "head_dim": 128,
        "dtype": torch.bfloat16,
    },
    "prefill, a short piece after many pages": {
        "lengths": (1500, 1030), "queries": (40, 7), "dtype": torch.bfloat16,
    },
    "prefill, a short piece after many pages, D 128": {
        "lengths": (1500, 1030), "queries": (40, 7), "head_dim": 128, "dtype": torch.bfloat16,
    },
    "prefill, group 3": {
        "lengths": (300,), "queries": (200,), "dtype": torch.bfloat16,
    },
    "prefill, group 16, D 128": {
        "lengths": (150,), "queries": (50,), "heads": 32, "head_dim": 128, "dtype": torch.bfloat16,
    },
    "prefill, group 20": {
        "lengths": (70,), "queries": (50,), "heads": 40, "dtype": torch.bfloat16,
    },
    "prefill, pages of 7": {
        "lengths": (150,), "queries": (90,), "page_size": 7, "dtype": torch.bfloat16,
    },
    "prefill, pages of 64": {
        "lengths": (150, 64), "queries": (90, 64), "page_size": 64, "dtype": torch.bfloat16,
    },
    "prefill, pages of 1000": {
        "lengths": (150,), "queries": (90,), "page_size": 1000, "dtype": torch.bfloat16,
    },
    "prefill, large scores, bf16": {
        "lengths": (130,), "queries": (130,), "magnitude": 30.0, "dtype": torch.bfloat16,
    },
    "prefill, negative scale": {
        "lengths": (130,), "queries": (130,), "scale": -0.3, "dtype": torch.bfloat16,
    },
    "prefill, negative scale, D 128": {
        "lengths": (130,), "queries": (130,), "scale": -0.3, "head_dim": 128,
        "dtype": torch.bfloat16,
    },
    "prefill, scale 0": {
        "lengths": (130,), "queries": (130,), "scale": 0.0, "dtype": torch.bfloat16,
    },
    "prefill and decode mixed": {
        "lengths": (70, 33, 0, 129), "queries": (70, 1, 3, 2), "dtype": torch.bfloat16,
    },
}  # fmt: skip

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
    "top-k, all equal": {"top_k": 50, "spread": 0.0, "vocabulary": 3000},
    "Llama-3, top-k and top-p": {"batch": 2, "vocabulary": 128256, "top_k": 50, "top_p": 0.95},
    "top-p 0": {"top_p": 0.0},
    "top-p 0.5": {"top_p": 0.5},
    "top-p 0.99, flat": {"top_p": 0.99, "spread": 0.3},
    "top-p, bf16 ties": {"top_p": 0.7, "dtype": torch.bfloat16, "vocabulary": 5000},
    "min-p": {"min_p": 0.1},
    "min-p 1": {"min_p": 1.0},
    # On CUDA the mass of all is known beforehand with temperature 1, and summed otherwise.
    "cool, top-p": {"temperature": 0.7, "top_p": 0.95},
    "hot, top-p": {"temperature": 1.5, "top_p": 0.5, "vocabulary": 20000, "batch": 40},
    "top-p, many rows": {"top_p": 0.95, "vocabulary": 20000, "batch": 60, "spread": 1.0},
    "a large top-k and top-p": {"top_k": 700, "top_p": 0.95, "vocabulary": 20000},
    "everything": {"temperature": 0.7, "top_k": 40, "top_p": 0.9, "min_p": 0.02},
    "a different mix per row": {
        "temperature": (0.0, 0.5, 1.0, 1.5) * 3, "top_k": (0, 0, 3, 0, 9, 9) * 2,
        "top_p": (1.0, 0.8, 0.9) * 4, "min_p": (0.0, 0.05) * 6,
    },
}  # fmt: skip

CAUSAL_CONV1D_CASES = {
    "base": {},
    "bf16": {"dtype": torch.bfloat16},
    "no bias": {"bias": False},
    "no initial state": {"initial_state": False},
    "no activation": {"silu": False},
    "no option, bf16": {
        "bias": False, "initial_state": False, "silu": False, "dtype": torch.bfloat16,
    },
    "width 2": {"width": 2},
    "width 3": {"width": 3},
    "length 0": {"length": 0},
    "length 1": {"length": 1},
    "as long as the history less one": {"length": 2},
    "as long as the history": {"length": 3},
    "empty batch": {"batch": 0},
    "batch 1": {"batch": 1},
    "one channel": {"channels": 1},
    "blocks of channels and a rest": {"channels": 300},
    "prime length": {"length": 131},
    "packed": {"lengths": [7, 0, 1, 2, 3, 20]},
    "packed, no initial state, bf16": {
        "lengths": [5, 1, 30], "initial_state": False, "dtype": torch.bfloat16,
    },
    "only empty sequences": {"lengths": [0, 0]},
}  # fmt: skip

CONV_UPDATE_CASES = {
    "base": {},
    "bf16": {"dtype": torch.bfloat16},
    "no bias": {"bias": False},
    "no activation": {"silu": False},
    "width 2": {"width": 2},
    "width 3": {"width": 3},
    "empty batch": {"batch": 0},
    "many rows": {"batch": 70},
    "blocks of channels and a rest": {"channels": 600},
    "padding rows": {"batch": 4, "slots": [5, -1, 0, -7], "lengths": [7, -3, 1, 0]},
    "only padding": {"batch": 2, "slots": [-1, -1], "lengths": [0, 0]},
    "every place in the ring": {"batch": 6, "lengths": [1, 2, 3, 4, 5, 8]},
    "a long sequence": {"batch": 1, "lengths": [131072]},
}

SELECTIVE_SCAN_CASES = {
    "base": {},
    "bf16": {"dtype": torch.bfloat16},
    "no D": {"D": False},
    "no initial state": {"initial_state": False},
    "no option, bf16": {"D": False, "initial_state": False, "dtype": torch.bfloat16},
    "one group": {"Gc": 1},
    "a group per channel": {"Gb": 48, "Gc": 48},
    "groups out of step": {"Gb": 2, "Gc": 3},
    "N 5": {"N": 5},
    "N 64": {"N": 64},
    "length 0": {"length": 0},
    "length 1": {"length": 1},
    "a segment": {"length": 32},
    "a segment and one": {"length": 33},
    "prime length": {"length": 131},
    "empty batch": {"batch": 0},
    "blocks of channels and a rest": {"channels": 144, "Gb": 3, "Gc": 9},
    "zero decay": {"decay": 0.0},
    "strong decay": {"decay": 100.0},
    "packed": {"lengths": [33, 0, 1, 40]},
    "packed, no initial state, bf16": {
        "lengths": [5, 34], "initial_state": False, "dtype": torch.bfloat16,
    },
}  # fmt: skip

SELECTIVE_UPDATE_CASES = {
    "base": {},
    "bf16": {"dtype": torch.bfloat16},
    "bf16 data and state": {"dtype": torch.bfloat16, "state_dtype": torch.bfloat16},
    "no D": {"D": False},
    "a group per channel": {"Gb": 48, "Gc": 48},
    "N 5": {"N": 5},
    "empty batch": {"batch": 0},
    "many rows": {"batch": 40},
    "blocks of channels and a rest": {"channels": 288, "Gb": 6, "Gc": 18},
    "padding rows": {"batch": 4, "slots": [5, -1, 0, -7]},
}

DEFERRED_STATE_UPDATE_CASES = {
    "base": {},
    "bf16": {"dtype": torch.bfloat16},
    "bf16 data and state": {"dtype": torch.bfloat16, "state_dtype": torch.bfloat16},
    "bf16 state, fp32 data": {"state_dtype": torch.bfloat16},
    "writes, bf16 data and state": {
        "dtype": torch.bfloat16, "state_dtype": torch.bfloat16, "pending": 3,
    },
    "nothing pending": {"pending": 0},
    "writes": {"pending": 3},
    "period 1, nothing pending": {"period": 1, "pending": 0},
    "period 1, pending": {"period": 1, "pending": [0, 1, 3, 5, 7], "slots": [4, 0, 1]},
    "period 8, every pending": {
        "period": 8, "pending": [0, 1, 2, 3, 4, 5, 6, 7, 3, 1], "batch": 8,
        "slots": [7, 1, 0, 2, 3, 6, 4, 5],
    },
    "period 8, every pending, bf16": {
        "period": 8, "pending": [0, 1, 2, 3, 4, 5, 6, 7, 3, 1], "batch": 8,
        "slots": [7, 1, 0, 2, 3, 6, 4, 5], "dtype": torch.bfloat16, "state_dtype": torch.bfloat16,
    },
    "period 16, full": {"period": 16, "capacity": 15, "pending": 15},
    "capacity 0": {"period": 1, "capacity": 0, "pending": 0},
    "no scale": {"scale": False},
    "no D": {"D": False},
    "writes, no scale, no D": {"scale": False, "D": False, "pending": 3},
    "batch 1": {"batch": 1},
    "empty batch": {"batch": 0},
    "many rows": {"batch": 70},
    "kv sharing (kv, kv, H)": {"Hx": 2, "Gb": 2},
    "kv sharing, writes": {"Hx": 2, "Gb": 2, "pending": 3},
    "one group (H, 1, 1)": {"Gb": 1, "Gc": 1, "pending": [2, 3, 2, 3, 2]},
    "all shared": {"Hx": 1, "Gb": 1, "Gc": 2, "pending": [2, 3, 2, 3, 2]},
    "P 64, N 64 (Llamba-1B)": {
        "P": 64, "N": 64, "H": 2, "Hx": 2, "Gb": 2, "Gc": 2, "pending": [2, 3, 2, 3, 2],
    },
    "P 96 (Llamba-3B)": {
        "P": 96, "N": 64, "H": 2, "Hx": 2, "Gb": 2, "Gc": 2, "pending": [2, 3, 2, 3, 2],
    },
    "P 128, N 128": {
        "P": 128, "N": 128, "H": 3, "Hx": 1, "Gb": 1, "Gc": 3, "pending": [2, 3, 2, 3, 2],
    },
    "P 128, N 16": {"P": 128, "N": 16, "pending": [2, 3, 2, 3, 2]},
    "odd extents": {"P": 7, "N": 5, "pending": [2, 3, 2, 3, 2]},
    "zero decay": {"decay": 0.0, "pending": [2, 3, 2, 3, 2]},
    "strong decay": {"decay": 40.0, "pending": [2, 3, 2, 3, 2]},
    "decay -1000": {"decay": 1000.0, "pending": [2, 3, 2, 3, 2]},
    "padding rows": {"batch": 4, "slots": [5, -1, 0, -7], "pending": [2, 3, 2, 3, 2, 3]},
    "only padding": {"batch": 2, "slots": [-1, -1]},
    "noise": {"state_dtype": torch.bfloat16, "noise": True, "pending": [2, 3, 2, 3, 2]},
    "noise, period 1": {"state_dtype": torch.bfloat16, "noise": True, "period": 1, "pending": 0},
}  # fmt: skip

COUNT_PENDING_CASES = {
    "base": {},
    "period 1": {"period": 1},
    "period 16": {"period": 16, "pending": (15, 14, 0, 1, 15, 3, 2)},
    "no rows": {"slots": ()},
    "only padding": {"slots": (-1, -5)},
}

# Of both Mamba-2 mixers.
MAMBA2_CASES = {
    "base": {},
    "bf16": {"dtype": torch.bfloat16},
    "bf16 data and state": {"dtype": torch.bfloat16, "state_dtype": torch.bfloat16},
    "writes, bf16 data and state": {
        "dtype": torch.bfloat16, "state_dtype": torch.bfloat16, "pending": 3,
    },
    "nothing kept": {"recent": False, "period": 1},
    "nothing kept, bf16": {
        "recent": False, "period": 1, "dtype": torch.bfloat16, "state_dtype": torch.bfloat16,
    },
    "writes": {"pending": 3},
    "period 1, pending": {"period": 1, "pending": [0, 1, 3, 5, 7], "slots": [4, 0, 1]},
    "period 8, every pending": {
        "period": 8, "pending": [0, 1, 2, 3, 4, 5, 6, 7, 3, 1], "batch": 8,
        "slots": [7, 1, 0, 2, 3, 6, 4, 5],
    },
    "batch 1": {"batch": 1},
    "empty batch": {"batch": 0},
    "many rows": {"batch": 70},
    "first tokens": {"lengths": [1, 2, 3]},
    "width 2": {"width": 2},
    "padding rows": {
        "batch": 4, "slots": [5, -1, 0, -7], "lengths": [7, 0, 1, 0], "pending": [2, 3, 2, 3, 2, 3],
    },
    "only padding": {"batch": 2, "slots": [-1, -1], "lengths": [0, 0]},
    "noise": {"state_dtype": torch.bfloat16, "noise": True, "pending": [2, 3, 2, 3, 2]},
    "noise, nothing kept": {
        "state_dtype": torch.bfloat16, "noise": True, "recent": False, "period": 1,
    },
}  # fmt: skip

DISCRETE_MAMBA2_UPDATE_CASES = MAMBA2_CASES | {
    "one group": {"G": 1},
    "P 64, N 64 (Llamba-1B)": {"P": 64, "N": 64, "H": 2, "G": 2, "pending": [2, 3, 2, 3, 2]},
    "P 96 (Llamba-3B)": {"P": 96, "N": 64, "H": 2, "G": 2, "pending": [2, 3, 2, 3, 2]},
    "P 128 (Llamba-8B)": {"P": 128, "N": 64, "H": 2, "G": 2, "pending": [2, 3, 2, 3, 2]},
}

MAMBA2_UPDATE_CASES = MAMBA2_CASES | {
    "no sharing": {"K": 4},
    "one kv head": {"K": 1},
    "P 64 (1B)": {"P": 64, "N": 64, "pending": [2, 3, 2, 3, 2]},
    "P 128 (3B)": {"P": 128, "N": 128, "H": 3, "K": 1, "pending": [2, 3, 2, 3, 2]},
    "N other than P": {"P": 32, "N": 16},
}

# Of both Mamba-2 mixers over whole sequences.
MAMBA2_WHOLE_CASES = {
    "base": {},
    "bf16": {"dtype": torch.bfloat16},
    "no past": {"past": False},
    "no initial state": {"initial_state": False},
    "no option, bf16": {"past": False, "initial_state": False, "dtype": torch.bfloat16},
    "width 2": {"width": 2},
    "width 3, bf16": {"width": 3, "dtype": torch.bfloat16},
    "empty batch": {"batch": 0},
    "length 0": {"length": 0},
    "length 1": {"length": 1},
    "as long as the history less one": {"length": 2},
    "prime length": {"length": 131},
    "packed": {"lengths": [33, 0, 1, 2, 20]},
    "packed, no option, bf16": {
        "lengths": [5, 0, 1, 34], "past": False, "initial_state": False, "dtype": torch.bfloat16,
    },
    "odd extents": {"P": 7, "N": 5},
}  # fmt: skip

DISCRETE_MAMBA2_SCAN_CASES = MAMBA2_WHOLE_CASES | {
    "one group": {"G": 1},
    "P 64, N 64 (Llamba-1B)": {"batch": 1, "P": 64, "N": 64, "H": 2, "G": 2},
}

MAMBA2_SCAN_CASES = MAMBA2_WHOLE_CASES | {
    "no sharing": {"K": 4},
    "one kv head": {"K": 1},
    "N other than P": {"P": 32, "N": 16},
    "P 64 (1B)": {"batch": 1, "P": 64, "N": 64, "H": 2, "K": 1},
}

# The fused kernels' are 16-bit data in chunks of 64 tokens and segments of 256. With 8 heads a row of
# in_proj is a multiple of 16 bytes, without which the other operators do the work.
CUDA_MIXER_SCAN_CASES = {
    name: {"batch": 1, "H": 8, "dtype": torch.bfloat16, **case}
    for name, case in {
        "fused": {"batch": 2},
        "fused, fp16": {"batch": 2, "dtype": torch.float16},
        "fused, no past": {"past": False},
        "fused, no initial state": {"initial_state": False, "length": 70},
        "fused, length 0": {"length": 0},
        "fused, length 1": {"length": 1},
        "fused, as long as the history less one": {"length": 2},
        "fused, width 2": {"width": 2, "length": 300},
        "fused, width 3": {"width": 3, "length": 70},
        "a chunk less one": {"length": 63},
        "a chunk": {"length": 64},
        "a chunk and one": {"length": 65},
        "several segments": {"length": 300},
        "walked, not dealt": {"batch": 20, "length": 257},
        "packed": {"lengths": [33, 0, 1, 64, 130, 2, 300]},
        "packed, no option": {"lengths": [5, 0, 70, 1], "past": False, "initial_state": False},
        "P 64, N 64": {"length": 200, "P": 64, "N": 64},
        "P 96": {"length": 70, "P": 96, "N": 64},
        "P 128, fp16": {"length": 70, "P": 128, "N": 64, "dtype": torch.float16},
        "P 64, N 128": {"length": 70, "P": 64, "N": 128},
        "P 128, N 128": {"length": 70, "P": 128, "N": 128},
        "P 72, N 40": {"length": 90, "P": 72, "N": 40},
    }.items()
}

MAMBA1_UPDATE_CASES = {
    "base": {},
    "bf16": {"dtype": torch.bfloat16},
    "bf16 data and state": {"dtype": torch.bfloat16, "state_dtype": torch.bfloat16},
    "no sharing": {"kv_dim": 96},
    "nothing unread": {"rest": 0},
    "N 8": {"N": 8},
    "several blocks of channels": {"inner": 768, "kv_dim": 256},
    "batch 1": {"batch": 1},
    "empty batch": {"batch": 0},
    "many rows": {"batch": 40},
    "first tokens": {"lengths": [1, 2, 3]},
    "width 3": {"width": 3},
    "padding rows": {"batch": 4, "slots": [5, -1, 0, -7], "lengths": [7, 0, 1, 0]},
    "only padding": {"batch": 2, "slots": [-1, -1], "lengths": [0, 0]},
}

ADD_RMS_NORM_CASES = {
    "base": {},
    "bf16": {"dtype": torch.bfloat16},
    "no delta": {"delta": False},
    "no delta, bf16": {"delta": False, "dtype": torch.bfloat16},
    "one row": {"shape": (96,)},
    "three dimensions": {"shape": (2, 3, 64)},
    "no rows": {"shape": (0, 96)},
    "one channel": {"shape": (4, 1)},
    "odd channels": {"shape": (3, 37)},
    "many rows": {"shape": (300, 64)},
    "SmolLM2": {"shape": (2, 576)},
    "Llama-1B, bf16": {"shape": (3, 2048), "dtype": torch.bfloat16},
    "Llama-8B, bf16": {"shape": (1, 4096), "dtype": torch.bfloat16},
    "large eps": {"eps": 1.0},
    "small values": {"magnitude": 1e-4},
    "large values": {"magnitude": 1e4},
}

ROTATE_CASES = {
    "base": {},
    "bf16": {"dtype": torch.bfloat16},
    "first positions": {"positions": [0, 1, 2, 3, 4]},
    "the last position": {"tokens": 1, "positions": [131071]},
    "no tokens": {"tokens": 0},
    "many tokens": {"tokens": 100},
    "one head": {"heads": 1},
    "D 128, bf16": {"head_dim": 128, "dtype": torch.bfloat16},
    "D 2": {"head_dim": 2},
    "D 10": {"head_dim": 10},
    "theta 1e4": {"theta": 1e4},
}

ROTATE_APPEND_KV_CASES = {
    "base": {},
    "bf16": {"dtype": torch.bfloat16},
    "float64": {"dtype": torch.float64},
    "no rows": {"lengths": (), "queries": ()},
    "padding rows": {"lengths": (0, 9, -5), "queries": (1, 1, 2)},
    "a row without queries": {"queries": (1, 0, 1)},
    "prefill after a prefix": {"lengths": (211, 70), "queries": (100, 3)},
    "no queries of attention": {"heads": 0},
    "group 8, bf16": {"heads": 16, "dtype": torch.bfloat16},
    "D 128, bf16": {"head_dim": 128, "dtype": torch.bfloat16},
    "D 80, bf16": {"head_dim": 80, "dtype": torch.bfloat16},
    "D 2": {"head_dim": 2},
    "D 10": {"head_dim": 10},
    "pages of 7": {"page_size": 7},
    "theta 1e4": {"theta": 1e4},
}

ADVANCE_CASES = {
    "base": {},
    "first step": {"t": 0},
    "last step": {"t": 4},
    "one row": {"rows": 1, "alive": 1.0},
    "no rows": {"rows": 0},
    "all rows ended": {"alive": 0.0},
    "many rows": {"rows": 300},
    "no stop ids": {"stops": 0},
    "many stop ids": {"stops": 9},
    "no spare columns": {"spare": 0},
}

GATE_CASES = {
    "base": {},
    "bf16": {"dtype": torch.bfloat16},
    "no bias": {"bias": False},
    "one row": {"shape": (37,)},
    "three dimensions": {"shape": (2, 3, 16)},
    "no rows": {"shape": (0, 16)},
    "several threads": {"shape": (300, 200)},
}

DISTILLATION_LOSSES_CASES = {
    "base": {},  # KL(student || teacher)
    "bf16": {"dtype": torch.bfloat16},
    "KL(teacher || student)": {"beta": 0.0},
    "between": {"beta": 0.3},
    "between, bf16": {"beta": 0.7, "dtype": torch.bfloat16},
    "cross entropy and KL": {"kl_weight": 0.25},
    "cross entropy alone": {"kl_weight": 0.0, "taught": False},
    "cross entropy beside a teacher": {"kl_weight": 0.0},
    "temperature": {"temperature": 2.0, "kl_weight": 0.5},
    "temperature, between": {"temperature": 0.7, "beta": 0.5, "kl_weight": 0.5},
    "no gradient": {"gradient": False, "kl_weight": 0.5},
    "no rows": {"shape": (0, 37)},
    "one token to draw": {"shape": (3, 1)},
    "many logits": {"shape": (40, 5000), "kl_weight": 0.5},
    "many logits, bf16": {"shape": (3, 9000), "kl_weight": 0.5, "dtype": torch.bfloat16},
}

# Rows that only a CUDA kernel can run, to be added to a table above.
CUDA_CASES = {"fp16": {"dtype": torch.float16}}
# Of mamba1_update: the form for many rows, which N other than 16 and odd strides do not take.
CUDA_MAMBA1_CASES = CUDA_CASES | {
    name: {"batch": 40, "inner": 1024, "kv_dim": 256, "rest": 0, **case}
    for name, case in {
        "many rows, fp32": {},
        "many rows, fp32 data, bf16 state": {"state_dtype": torch.bfloat16},
        "many rows, fp16": {"dtype": torch.float16, "state_dtype": torch.float16},
        "many rows, no sharing": {"kv_dim": 1024, "dtype": torch.bfloat16},
        "many rows, 3 channels to 1": {"inner": 1152, "kv_dim": 384, "dtype": torch.bfloat16},
        "many rows, a rest of channels": {"inner": 1200, "kv_dim": 400, "dtype": torch.bfloat16},
        "many rows, width 3": {"width": 3, "dtype": torch.bfloat16},
        "many rows, N 32": {"N": 32, "dtype": torch.bfloat16},
        "many rows, odd stride": {"rest": 6, "dtype": torch.bfloat16},
    }.items()
}
# So many that blocks have several, or draw them; a case for each operator.
_BF16 = {"dtype": torch.bfloat16, "state_dtype": torch.bfloat16}
_DATA = {"dtype": torch.bfloat16}
_EIGHT = {"batch": 300, "H": 8, "Hx": 8, "Gb": 8, "Gc": 8, "N": 64}
_MIXER = {"batch": 300, "H": 8, "G": 8, "N": 64}
_MAMBA1 = {"rest": 0, "inner": 2048, "kv_dim": 512}
MANY_ROWS = {
    "state_update": {
        "P 64, N 64": _EIGHT | _BF16 | {"P": 64},
        "a small state, fp32": _EIGHT | _DATA | {"P": 32},
        "P 64, N 128, one group": _EIGHT | _BF16 | {"P": 64, "N": 128, "Gb": 1, "Gc": 1},
        "P 128, N 128, kv sharing": _EIGHT | _BF16 | {"P": 128, "N": 128, "Hx": 2, "Gb": 2},
    },
    "deferred_state_update": {
        "fp32": _EIGHT | _DATA | {"P": 64},
        "P 64, N 64": _EIGHT | _BF16 | {"P": 64},
        "fp16 data": _EIGHT | {"P": 64, "dtype": torch.float16, "state_dtype": torch.bfloat16},
        "P 32": _EIGHT | _BF16 | {"P": 32},
        "P 96": _EIGHT | _BF16 | {"P": 96},
        "P 64, N 128, one group": _EIGHT | _BF16 | {"P": 64, "N": 128, "Gb": 1, "Gc": 1},
        "P 128, N 128, kv sharing": _EIGHT | _BF16 | {"P": 128, "N": 128, "Hx": 2, "Gb": 2},
        "the most recent tokens": _EIGHT | _BF16 | {"P": 64, "period": 16, "capacity": 15},
    },
    "discrete_mamba2_update": {
        "fp32": _MIXER | _DATA | {"P": 64},
        "P 64, N 64": _MIXER | _BF16 | {"P": 64},
        "width 3": _MIXER | _BF16 | {"P": 64, "width": 3},
        "width 2, nothing kept": _MIXER
        | _BF16
        | {"P": 64, "width": 2, "recent": False, "period": 1},
        "P 96": _MIXER | _BF16 | {"P": 96},
    },
    "mamba2_update": {
        "fp32": {"batch": 300, "H": 8, "P": 64, "N": 64} | _DATA,
        "P 64, N 64": {"batch": 300, "H": 8, "P": 64, "N": 64} | _BF16,
        "P 128, N 128": {"batch": 300, "H": 6, "P": 128, "N": 128} | _BF16,
    },
    "mamba1_update": {
        "150 rows, fp32": _MAMBA1 | _DATA | {"batch": 150},
        "700 rows, fp32": _MAMBA1 | _DATA | {"batch": 700},
        "150 rows": _MAMBA1 | _BF16 | {"batch": 150},
        "700 rows": _MAMBA1 | _BF16 | {"batch": 700},
    },
}
CUDA_STATE_CASES = CUDA_CASES | {
    "fp16 data and state": {"dtype": torch.float16, "state_dtype": torch.float16},
    "noise, fp16": {"dtype": torch.float16, "state_dtype": torch.float16, "noise": True},
}
CUDA_N_CASES = CUDA_CASES | {
    "N 20": {"N": 20},
    "N 100": {"N": 100, "length": 17},
    "N 200, bf16": {"N": 200, "length": 13, "dtype": torch.bfloat16},
    "N 256": {"N": 256, "length": 9},
}

LINEAR_CASES = {
    "base": {},
    "bf16": {"dtype": torch.bfloat16},
    "bf16, no bias": {"dtype": torch.bfloat16, "bias": False},
    "no rows": {"rows": 0},
    "one row": {"rows": 1, "dtype": torch.bfloat16},
    "8 rows": {"rows": 8, "dtype": torch.bfloat16},
    "9 rows": {"rows": 9, "dtype": torch.bfloat16},
    "16 rows": {"rows": 16, "dtype": torch.bfloat16},
    "17 rows": {"rows": 17, "dtype": torch.bfloat16},
    "several stages": {"in_features": 3072, "dtype": torch.bfloat16},
    "several stages and a rest": {"in_features": 1120, "rows": 10, "dtype": torch.bfloat16},
    "2 rows, many stages": {"rows": 2, "in_features": 4096, "dtype": torch.bfloat16},
    "4 rows, and a rest": {"rows": 4, "in_features": 4624, "dtype": torch.bfloat16},
    "more tiles than blocks": {"out_features": 8224, "dtype": torch.bfloat16, "bias": False},
    "tiles and a rest": {"in_features": 1120, "out_features": 8224, "dtype": torch.bfloat16},
    "odd features": {"in_features": 37, "out_features": 19, "dtype": torch.bfloat16},
    "three dimensions": {"shape": (2, 3), "dtype": torch.bfloat16},
}
