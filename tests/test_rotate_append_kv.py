import pytest
import torch
from cases import ROTATE_APPEND_KV_CASES

from reasoners import ops, reference
from reasoners.reference import rotate_append_kv_inputs

CASES = ROTATE_APPEND_KV_CASES
MANY = {"lengths": (1500, 0, 900, 9), "queries": (1400, 2, 890, 9)}  # and rows of padding
CUDA = {k: v for k, v in CASES.items() if v.get("dtype") != torch.float64} | {
    "fp16": {"dtype": torch.float16},
    "many tokens": {"lengths": (700, 300), "queries": (700, 290), "dtype": torch.bfloat16},
    # Several in a block.
    "2,301 tokens, bf16": {**MANY, "dtype": torch.bfloat16},
    "2,301 tokens, D 128": {**MANY, "head_dim": 128},
    "2,301 tokens, D 10, pages of 7": {**MANY, "head_dim": 10, "page_size": 7},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_against_reference(case):
    reference.check(ops.rotate_append_kv, "rotate_append_kv", **case)


@pytest.mark.cuda("rotate_append_kv")
@pytest.mark.parametrize("case", CUDA.values(), ids=CUDA.keys())
def test_against_reference_cuda(case):
    reference.check(ops.rotate_append_kv, "rotate_append_kv", "cuda", **case)


def check_composition(case, device="cpu"):
    """rotate, then append_kv: the same bits, and keys and values of the projection stay."""
    made = rotate_append_kv_inputs(**case)
    one, two = ({k: v.to(device, copy=True) for k, v in made.items()} for _ in range(2))
    ops.rotate_append_kv(**one)
    kv_heads, starts = made["k_cache"].shape[1], made["cu_seqlens_q"].tolist()
    positions, real = [], []
    for row, length in enumerate(made["kv_lengths"].tolist()):
        for token in range(starts[row], starts[row + 1]):
            positions.append(length - starts[row + 1] + token if length > 0 else 0)
            real.append(length > 0)
    positions = torch.tensor(positions, dtype=torch.int32, device=device)
    q, k, v = two["qkv"].split([made["qkv"].shape[1] - 2 * kv_heads, kv_heads, kv_heads], 1)
    ops.rotate(two["qkv"][:, :-kv_heads], positions, two["inv_freq"])
    where = (two[name] for name in ("page_table", "cu_seqlens_q", "kv_lengths"))
    ops.append_kv(two["k_cache"], two["v_cache"], k, v, *where)
    for name in ("k_cache", "v_cache"):
        assert torch.equal(one[name], two[name])
    assert torch.equal(one["qkv"][real, : q.shape[1]], q[real])
    assert torch.equal(one["qkv"][:, q.shape[1] :].cpu(), made["qkv"][:, q.shape[1] :])


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_equals_its_composition(case):
    check_composition(case)


@pytest.mark.cuda("rotate_append_kv", "rotate", "append_kv")
@pytest.mark.parametrize("case", CUDA.values(), ids=CUDA.keys())
def test_equals_its_composition_cuda(case):
    check_composition(case, "cuda")


def check_slice(device):
    """Heads of a wider projection, at its stride; an odd offset takes the unaligned path."""
    inputs = {k: v.to(device) for k, v in rotate_append_kv_inputs().items()}
    for offset in (64, 3):
        wide = torch.randn(3, 20 * 64, device=device)
        strided = wide[:, offset : offset + 640].unflatten(1, (10, 64))
        strided.copy_(inputs["qkv"])
        one, two = ({k: v.clone() for k, v in inputs.items()} for _ in range(2))
        ops.rotate_append_kv(**one)
        before = wide.clone()
        ops.rotate_append_kv(**{**two, "qkv": strided})
        assert torch.equal(strided, one["qkv"])
        assert torch.equal(two["k_cache"], one["k_cache"])
        assert torch.equal(wide[:, :offset], before[:, :offset])
        assert torch.equal(wide[:, offset + 640 :], before[:, offset + 640 :])


def test_slice_of_a_projection():
    check_slice("cpu")


@pytest.mark.cuda("rotate_append_kv")
def test_slice_of_a_projection_cuda():
    check_slice("cuda")


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"qkv": torch.zeros(3, 3, 64)}, ValueError, "qkv expected at least 4 heads, .* got 3"),
        ({"qkv": torch.zeros(3, 10, 32)}, ValueError, r"qkv expected shape .* got \(3, 10, 32\)"),
        ({"qkv": torch.zeros(3, 10, 64).bfloat16()}, TypeError, "qkv expected dtype Float, got"),
        ({"qkv": torch.zeros(3, 20, 64)[:, ::2]}, ValueError, "qkv expected packed heads"),
        ({"inv_freq": torch.zeros(64)}, ValueError, r"inv_freq expected shape .* \(32\), got \(64\)"),
        ({"kv_lengths": torch.tensor([37, 5, 81]).int()}, ValueError,
         r"kv_lengths\[2\] expected at most 80 tokens"),
    ],
)  # fmt: skip
def test_errors(change, error, words):
    with pytest.raises(error, match=f"rotate_append_kv: {words}"):
        ops.rotate_append_kv(**rotate_append_kv_inputs() | change)
    with pytest.raises(ValueError, match="rotate_append_kv: head_dim expected even, got 7"):
        ops.rotate_append_kv(**rotate_append_kv_inputs(head_dim=7) | {"inv_freq": torch.zeros(3)})


def test_opcheck():
    inputs = tuple(rotate_append_kv_inputs().values())
    torch.library.opcheck(torch.ops.reasoners.rotate_append_kv.default, inputs)
