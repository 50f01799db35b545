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


# What stands around a product: a row, and one factor changed.
AROUND_CASES = {
    "base": {},
    "bf16": {"dtype": torch.bfloat16},
    "one row": {"rows": 1, "dtype": torch.bfloat16},
    "5 rows": {"rows": 5, "dtype": torch.bfloat16},
    "no rows": {"rows": 0},
    "a norm of two turns and several stages": {"in_features": 1120, "dtype": torch.bfloat16},
    "the longest norm": {"in_features": 4096, "dtype": torch.bfloat16},
    "a longer one": {"in_features": 4112, "dtype": torch.bfloat16},
    "many stages and a rest": {"in_features": 3600, "dtype": torch.bfloat16},
    "more tiles than blocks": {"out_features": 8224, "dtype": torch.bfloat16},
    "odd features": {"in_features": 37, "out_features": 18, "dtype": torch.bfloat16},
    "three dimensions": {"shape": (1, 3), "dtype": torch.bfloat16},
}
AROUND = [
    pytest.param(name, extra | case, id=f"{name} {key} {row}".strip())
    for name, key, extra in (
        ("rms_norm_linear", "", {}),
        ("rms_norm_linear", "no bias", {"bias": False}),
        ("rms_norm_linear", "gated", {"gated": True}),
        ("add_linear", "", {}),
    )
    for row, case in AROUND_CASES.items()
]


@pytest.mark.parametrize(("name", "case"), AROUND)
def test_around_against_reference(name, case):
    reference.check(getattr(ops, name), name, **case)


@pytest.mark.cuda("rms_norm_linear", "add_linear")
@pytest.mark.parametrize(("name", "case"), AROUND)
def test_around_against_reference_cuda(name, case):
    reference.check(getattr(ops, name), name, "cuda", **case)


@pytest.mark.cuda("rms_norm_linear", "add_linear")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("in_features", [256, 576, 2048, 3072, 4096])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 64])
def test_around_is_the_bits_of_the_operators_one_by_one(rows, in_features, dtype):
    sizes = {"rows": rows, "in_features": in_features, "out_features": 512, "dtype": dtype}
    inputs = reference.rms_norm_linear_inputs(**sizes, bias=False)
    h, norm_weight, weight = (inputs[k].cuda() for k in ("h", "norm_weight", "weight"))
    y = ops.linear(ops.add_rms_norm(h, None, norm_weight, 1e-5), weight)
    assert torch.equal(ops.rms_norm_linear(h, norm_weight, 1e-5, weight), y)
    z, x = y.chunk(2, -1)
    gated = ops.rms_norm_linear(h, norm_weight, 1e-5, weight, gated=True)
    assert torch.equal(gated, ops.gate(x, z))
    total = torch.randn(rows, 512, device="cuda").to(dtype)
    expected = total + ops.linear(h, weight)
    ops.add_linear(total, h, weight)
    assert torch.equal(total, expected)


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
    for rows in (1, 2, 3, 4, 5, 8, 9, 16, 17, 24, 32, 48, 64, 96, 128, 160, 192, 256, 320, 448):
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


@pytest.mark.parametrize(
    ("name", "change", "error", "words"),
    [
        ("rms_norm_linear", {"norm_weight": torch.zeros(3)}, ValueError, "norm_weight expected shape"),
        ("rms_norm_linear", {"h": torch.zeros(64, 3).T}, ValueError, "h expected .*contiguous"),
        ("rms_norm_linear", {"eps": -1.0}, ValueError, "eps expected"),
        (
            "rms_norm_linear", {"weight": torch.zeros(47, 64), "bias": None, "gated": True},
            ValueError, "weight expected an even number of rows if gated, got 47",
        ),
        ("add_linear", {"h": torch.zeros(3, 47)}, ValueError, r"h expected shape \(3, 48\), got \(3, 47\)"),
        ("add_linear", {"h": torch.zeros(48, 3).T}, ValueError, "h expected .*contiguous"),
        ("add_linear", {"h": torch.zeros(3, 48).bfloat16()}, TypeError, "h expected dtype Float"),
    ],
)  # fmt: skip
def test_errors_around(name, change, error, words):
    inputs = reference.OPERATORS[name][1]() | change
    with pytest.raises(error, match=f"{name}: {words}"):
        getattr(ops, name)(**inputs)


@pytest.mark.parametrize("name", ["linear", "rms_norm_linear", "add_linear"])
def test_opcheck(name):
    inputs = tuple(reference.OPERATORS[name][1]().values())
    torch.library.opcheck(getattr(torch.ops.reasoners, name).default, inputs)
