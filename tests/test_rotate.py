import pytest
import torch
from cases import CUDA_CASES, ROTATE_CASES

from reasoners import ops, reference
from reasoners.reference import rotate_inputs


@pytest.mark.parametrize("case", ROTATE_CASES.values(), ids=ROTATE_CASES.keys())
def test_against_reference(case):
    reference.check(ops.rotate, "rotate", **case)


CUDA_TABLE = ROTATE_CASES | CUDA_CASES


@pytest.mark.cuda("rotate")
@pytest.mark.parametrize("case", CUDA_TABLE.values(), ids=CUDA_TABLE.keys())
def test_against_reference_cuda(case):
    reference.check(ops.rotate, "rotate", "cuda", **case)


def check_rotated(device):
    """Of a copy, over two leading dimensions; its derivative is the rotation back."""
    x, positions, inv_freq = (value.to(device) for value in rotate_inputs(tokens=6).values())
    before = x.clone()
    wide = before.unflatten(0, (2, 3)).requires_grad_(True)
    y = ops.rotated(wide, positions, inv_freq)
    assert torch.equal(x, before)
    ops.rotate(x, positions, inv_freq)
    assert torch.equal(y.detach().flatten(0, 1), x)
    dy = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, wide, dy)
    back = dy.flatten(0, 1).clone()
    ops.rotate(back, positions, -inv_freq)
    assert torch.equal(dx.flatten(0, 1), back)


def test_rotated():
    check_rotated("cpu")
    x, positions, inv_freq = rotate_inputs(dtype=torch.float64).values()
    x.requires_grad_(True)
    assert torch.autograd.gradcheck(lambda x: ops.rotated(x, positions, inv_freq), x)


@pytest.mark.cuda("rotate")
def test_rotated_cuda():
    check_rotated("cuda")


def check_slice(device):
    """The query and key heads of a fused projection, its values left alone."""
    projected = torch.randn(5, 7, 64).to(device)
    positions = torch.tensor([5, 0, 9, 3, 70000], dtype=torch.int32, device=device)
    inv_freq = rotate_inputs()["inv_freq"].to(device)
    expected, before = projected[:, :5].clone(), projected.clone()
    ops.rotate(expected, positions, inv_freq)
    ops.rotate(projected[:, :5], positions, inv_freq)
    assert torch.equal(projected[:, :5], expected)
    assert torch.equal(projected[:, 5:], before[:, 5:])


def test_slice_of_a_projection():
    check_slice("cpu")


@pytest.mark.cuda("rotate")
def test_slice_of_a_projection_cuda():
    check_slice("cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_is_the_same_bits_in_any_batch(dtype):
    inputs = rotate_inputs(tokens=70, head_dim=80, dtype=dtype)
    one = {k: v[9:10].clone() if k != "inv_freq" else v for k, v in inputs.items()}
    ops.rotate(**inputs)
    ops.rotate(**one)
    assert torch.equal(one["x"][0], inputs["x"][9])


def test_position_0_is_the_identity_and_lengths_stay():
    inputs = rotate_inputs(positions=[0, 1, 2, 3, 4])
    before = inputs["x"].clone()
    ops.rotate(**inputs)
    assert torch.equal(inputs["x"][0], before[0])
    torch.testing.assert_close(inputs["x"].norm(dim=-1), before.norm(dim=-1))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": torch.zeros(5, 3, 63)}, ValueError, "head_dim expected even, got 63"),
        ({"x": torch.zeros(5, 3, 128)[..., ::2]}, ValueError, "x expected packed heads"),
        ({"x": torch.zeros(5, 6, 64)[:, ::2]}, ValueError, "x expected packed heads"),
        ({"x": torch.zeros(1, 3, 64).expand(5, 3, 64)}, ValueError, "x expected packed heads"),
        ({"positions": torch.zeros(5).long()}, TypeError, "positions expected dtype Int, got Long"),
        ({"positions": torch.zeros(4).int()}, ValueError, "positions expected shape"),
        ({"inv_freq": torch.zeros(64)}, ValueError, r"inv_freq expected shape .* \(32\), got \(64\)"),
    ],
)  # fmt: skip
def test_errors(change, error, words):
    with pytest.raises(error, match=f"rotate: {words}"):
        ops.rotate(**rotate_inputs() | change)


def test_opcheck():
    torch.library.opcheck(torch.ops.reasoners.rotate.default, tuple(rotate_inputs().values()))


def test_compiles_whole_with_dynamic_shapes():
    def step(x, *rest):
        ops.rotate(x, *rest)
        return x * 2

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (3, 5):
        inputs = rotate_inputs(tokens=tokens)
        other = inputs | {"x": inputs["x"].clone()}
        assert torch.equal(compiled(*inputs.values()), step(*other.values()))
