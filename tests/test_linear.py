import pytest
import torch
from cases import LINEAR_CASES

from reasoners import ops, reference


def check(case, device="cpu"):
    reference.check(ops.linear, "linear", device, **case)


@pytest.mark.parametrize("case", LINEAR_CASES.values(), ids=LINEAR_CASES.keys())
def test_against_reference(case):
    check(case)


@pytest.mark.cuda("linear")
@pytest.mark.parametrize("case", LINEAR_CASES.values(), ids=LINEAR_CASES.keys())
def test_against_reference_cuda(case):
    check(case, "cuda")


@pytest.mark.cuda("linear")
def test_float16_cuda():
    check({"dtype": torch.float16, "in_features": 1024}, "cuda")


def test_a_strided_row_is_read_in_place():
    inputs = reference.linear_inputs(rows=5)
    wide = torch.randn(5, 80)
    wide[:, 8:72] = inputs["x"]
    assert torch.equal(ops.linear(**inputs | {"x": wide[:, 8:72]}), ops.linear(**inputs))


@pytest.mark.cuda("linear")
@pytest.mark.parametrize(
    ("out_features", "in_features"),
    [
        (8224, 2048), (2048, 2048), (16384, 2048), (2048, 8192), (128256, 2048),  # Llamba-1B
        (9248, 3072), (3072, 3072), (3072, 8192),  # Llamba-3B
        (6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336),  # Llamba-8B
        (2048, 128), (3072, 512), (2048, 512),  # Mamba-1's dt, small ones
    ],
)  # fmt: skip
def test_a_row_is_the_same_bits_among_any_number_of_rows(out_features, in_features):
    """Our kernel for the fewest rows, cuBLAS above: both sum along in_features in one order."""
    torch.manual_seed(0)
    weight = torch.randn(out_features, in_features, device="cuda") / in_features**0.5
    weight, x = weight.bfloat16(), torch.randn(512, in_features, device="cuda").bfloat16()
    expected = ops.linear(x, weight)
    for rows in (1, 2, 4, 5, 8, 9, 16, 17, 24, 32, 48, 64, 96, 128, 160, 192, 256, 320, 448):
        assert torch.equal(ops.linear(x[:rows], weight), expected[:rows]), f"{rows} rows"


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"weight": torch.zeros(48, 32)}, ValueError, r"weight expected shape .* \(\*, 64\), got \(48, 32\)"),
        ({"weight": torch.zeros(48, 64).bfloat16()}, TypeError, "weight expected dtype Float"),
        ({"bias": torch.zeros(3)}, ValueError, r"bias expected shape .* \(48\), got \(3\)"),
    ],
)  # fmt: skip
def test_errors(change, error, words):
    with pytest.raises(error, match=f"linear: {words}"):
        ops.linear(**reference.linear_inputs() | change)


def test_opcheck():
    inputs = tuple(reference.linear_inputs().values())
    torch.library.opcheck(torch.ops.reasoners.linear.default, inputs)
