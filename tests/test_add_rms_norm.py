import pytest
import torch
from cases import ADD_RMS_NORM_CASES, CUDA_CASES

from reasoners import ops, reference
from reasoners.model import RMSNorm
from reasoners.reference import add_rms_norm_inputs


@pytest.mark.parametrize("case", ADD_RMS_NORM_CASES.values(), ids=ADD_RMS_NORM_CASES.keys())
def test_against_reference(case):
    reference.check(ops.add_rms_norm, "add_rms_norm", **case)


CUDA_TABLE = ADD_RMS_NORM_CASES | CUDA_CASES


@pytest.mark.cuda("add_rms_norm")
@pytest.mark.parametrize("case", CUDA_TABLE.values(), ids=CUDA_TABLE.keys())
def test_against_reference_cuda(case):
    reference.check(ops.add_rms_norm, "add_rms_norm", "cuda", **case)


def check_sum_is_rounded_once(device):
    inputs = add_rms_norm_inputs(shape=(7, 300), dtype=torch.bfloat16)
    inputs = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    expected = inputs["h"] + inputs["delta"]
    alone = ops.add_rms_norm(expected, None, inputs["weight"], inputs["eps"])
    y = ops.add_rms_norm(**inputs)
    assert torch.equal(inputs["h"], expected)
    assert torch.equal(y, alone)


def test_sum_is_rounded_once():
    check_sum_is_rounded_once("cpu")


@pytest.mark.cuda("add_rms_norm")
def test_sum_is_rounded_once_cuda():
    check_sum_is_rounded_once("cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_equals_the_module(dtype):
    inputs = add_rms_norm_inputs(shape=(4, 576), dtype=dtype)
    norm = RMSNorm(576, inputs["eps"]).to(dtype)
    norm.weight.data.copy_(inputs["weight"])
    expected = norm(inputs["h"] + inputs["delta"])
    tight = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 2**-7}[dtype]
    torch.testing.assert_close(ops.add_rms_norm(**inputs), expected, rtol=tight, atol=1e-7)


@pytest.mark.parametrize("dim", [37, 576, 2048])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_is_the_same_bits_anywhere(dtype, dim):
    """In any company, at any address and on any number of threads."""
    inputs = add_rms_norm_inputs(shape=(70, dim), dtype=dtype)
    rest = (inputs["weight"], inputs["eps"])
    h = inputs["h"].clone()
    y, threads = ops.add_rms_norm(**inputs), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for shift in range(5):
            buffer = torch.empty(dim + 5, dtype=dtype)
            moved = buffer[shift : shift + dim].copy_(h[3])
            assert torch.equal(ops.add_rms_norm(moved, inputs["delta"][3], *rest), y[3])
            assert torch.equal(moved, inputs["h"][3])
    finally:
        torch.set_num_threads(threads)


def test_strided_delta_equals_contiguous():
    inputs = add_rms_norm_inputs()
    wide = torch.randn(5, 200)
    wide[:, 7:103] = inputs["delta"]
    strided = inputs | {"h": inputs["h"].clone(), "delta": wide[:, 7:103]}
    assert torch.equal(ops.add_rms_norm(**strided), ops.add_rms_norm(**inputs))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"h": torch.zeros(5, 192)[:, ::2]}, ValueError, "h expected contiguous"),
        ({"h": torch.zeros(5, 96).half()}, TypeError, "h expected dtype float32, bfloat16 or float64"),
        ({"delta": torch.zeros(4, 96)}, ValueError, r"delta expected shape \(5, 96\) as h, got \(4, 96\)"),
        ({"delta": torch.zeros(5, 96).bfloat16()}, TypeError, "delta expected dtype Float"),
        ({"weight": torch.zeros(95)}, ValueError, r"weight expected shape \(dim\) = \(96\), got \(95\)"),
        ({"eps": -1e-5}, ValueError, "eps expected at least 0"),
    ],
)  # fmt: skip
def test_errors(change, error, words):
    inputs = add_rms_norm_inputs() | change
    before = inputs["h"].clone()
    with pytest.raises(error, match=f"add_rms_norm: {words}"):
        ops.add_rms_norm(**inputs)
    assert torch.equal(inputs["h"], before)


def test_opcheck():
    for delta in (True, False):
        inputs = add_rms_norm_inputs(delta=delta)
        torch.library.opcheck(torch.ops.reasoners.add_rms_norm.default, tuple(inputs.values()))


def test_compiles_whole_with_dynamic_shapes():
    def step(h, *rest):
        return ops.add_rms_norm(h, *rest) * 2

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (3, 5):
        inputs = add_rms_norm_inputs(shape=(rows, 96))
        other = inputs | {"h": inputs["h"].clone()}
        assert torch.equal(compiled(*inputs.values()), step(*other.values()))
        assert torch.equal(inputs["h"], other["h"])
