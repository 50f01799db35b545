import pytest
import torch
from cases import SAMPLE_CASES

from reasoners import ops, reference
from reasoners.reference import assert_close, sample_inputs

CASES = pytest.mark.parametrize("case", SAMPLE_CASES.values(), ids=SAMPLE_CASES.keys())


def check(case, device="cpu"):
    inputs = sample_inputs(**case)
    expected, oracle = reference.sample(**inputs)
    token, logprob = ops.sample(**{k: v.to(device) for k, v in inputs.items()})
    assert (token.dtype, logprob.dtype) == (torch.int64, torch.float32)
    assert token.tolist() == expected.tolist()
    plain = inputs["logits"].float().log_softmax(-1).gather(-1, expected[:, None])[:, 0]
    assert_close(logprob, oracle, plain, "logprob")


@CASES
def test_against_reference(case):
    check(case)


@pytest.mark.cuda("sample")
@CASES
def test_against_reference_cuda(case):
    check(case, "cuda")


@pytest.mark.cuda("sample")
@CASES
def test_cuda_equals_cpu(case):
    inputs = sample_inputs(**case)
    expected = ops.sample(**inputs)
    on_cuda = {k: v.cuda() for k, v in inputs.items()}
    token, logprob = ops.sample(**on_cuda)
    assert token.tolist() == expected[0].tolist()
    torch.testing.assert_close(logprob.cpu(), expected[1], rtol=1e-5, atol=1e-5)
    again = ops.sample(**on_cuda)
    assert torch.equal(again[0], token) and torch.equal(again[1], logprob)
    # The end of every row is out of step with 16 bytes.
    on_cuda["logits"] = torch.nn.functional.pad(on_cuda["logits"], (0, 1))[:, :-1]
    assert ops.sample(**on_cuda)[0].tolist() == expected[0].tolist()


@pytest.mark.cuda("sample")
@pytest.mark.parametrize("vocabulary", [100, 2049, 70_001])
@pytest.mark.parametrize(
    "mix",
    [
        {"temperature": 0.0}, {}, {"top_k": 5, "top_p": 0.9}, {"top_p": 0.0}, {"top_p": 0.999},
        {"min_p": 0.5}, {"top_p": 0.3, "min_p": 0.01}, {"top_k": 300, "top_p": 0.5},
    ],
    ids=str,
)  # fmt: skip
def test_edges_on_cuda_equal_cpu(vocabulary, mix):
    """NaN, infinities, nothing but -inf, equal logits, +0 beside -0, one token possible."""
    nan, inf = float("nan"), float("inf")
    inputs = sample_inputs(batch=10, vocabulary=vocabulary, **mix)
    logits = inputs["logits"]
    logits[0, -1], logits[1, 0], logits[2, 70] = nan, nan, inf
    logits[3, [5, 6]], logits[4], logits[5, :-1] = inf, -inf, nan
    logits[6, [70, 80, -1]], logits[7], logits[8] = 50.0, 0.0, -inf
    logits[7, ::3], logits[8, 33] = -0.0, 1.0
    expected = ops.sample(**inputs)
    token, logprob = ops.sample(**{k: v.cuda() for k, v in inputs.items()})
    assert token.tolist() == expected[0].tolist()
    torch.testing.assert_close(logprob.cpu(), expected[1], rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize(
    "line",
    [
        "00000000 00000000 00000000 00000000 00000000 00000000 6627e8d5 e169c58d bc57ac4c 9b00dbd8",
        "ffffffff ffffffff ffffffff ffffffff ffffffff ffffffff 408f276d 41c83b0e a20bc7c6 6d5451fd",
        "243f6a88 85a308d3 13198a2e 03707344 a4093822 299f31d0 d16cfe09 94fdcceb 5001e420 24126ea1",
    ],
)
def test_reference_philox_gives_the_published_answers(line):
    """Random123, kat_vectors, philox4x32 with 10 rounds; csrc/philox.h asserts the same."""
    words = [int(word, 16) for word in line.split()]
    assert [int(word) for word in reference.philox(words[:4], words[4:6])] == words[6:]


# ---- statistics; the draws of one row differ in one part of the key


def draw(logits, draws, part=3, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, key=(7, 1, 2, 3)):
    rng_key = torch.tensor([key]).repeat(draws, 1)
    rng_key[:, part] = torch.arange(draws)
    full = torch.full((draws,), 1.0)
    return ops.sample(
        logits.expand(draws, -1), temperature * full, (top_k * full).int(), top_p * full,
        min_p * full, rng_key,
    )[0]  # fmt: skip


def assert_distributed(counts, probabilities):
    """Pearson's chi-square within five standard deviations of its mean."""
    expected = probabilities * counts.sum()
    possible = expected > 0
    assert (counts[~possible] == 0).all()
    chi2 = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
    freedom = int(possible.sum()) - 1
    assert chi2 <= freedom + 5 * (2 * freedom) ** 0.5, f"chi2 {chi2:.1f}, freedom {freedom}"


@pytest.mark.parametrize(
    "mix",
    [
        {},
        {"temperature": 0.6},
        {"temperature": 3.0},
        {"top_k": 7},
        {"top_p": 0.8},
        {"min_p": 0.1},
        {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
    ],
    ids=str,
)
def test_draws_follow_the_distribution(mix):
    logits = 1.5 * torch.randn(40, generator=torch.Generator().manual_seed(1))
    filters = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | mix
    z = logits.double() / filters["temperature"]
    allowed = reference.sample_allowed(logits, **filters)
    probabilities = z.masked_fill(~allowed, float("-inf")).softmax(-1)
    counts = draw(logits, 200_000, **mix).bincount(minlength=40)
    assert_distributed(counts, probabilities)


@pytest.mark.parametrize("part", range(4), ids=["seed", "prompt", "sample", "position"])
def test_every_part_of_the_key_gives_fresh_noise(part):
    logits = torch.zeros(16)
    tokens = draw(logits, 100_001, part)
    uniform = torch.full((256,), 1 / 256).double()
    assert_distributed(tokens.bincount(minlength=16), torch.full((16,), 1 / 16).double())
    assert_distributed((tokens[1:] * 16 + tokens[:-1]).bincount(minlength=256), uniform)
    other = draw(logits, 100_001, part, key=(8, 1, 2, 3) if part else (7, 1, 2, 4))
    assert_distributed((tokens * 16 + other).bincount(minlength=256), uniform)


@pytest.mark.parametrize("part", range(3), ids=["seed", "prompt", "sample"])
def test_high_halves_of_the_key_count(part):
    inputs = sample_inputs(batch=64, spread=0.0)
    other = inputs["rng_key"].clone()
    other[:, part] += 1 << 32
    token, _ = ops.sample(**inputs)
    assert (ops.sample(**{**inputs, "rng_key": other})[0] == token).sum() <= 2


# ---- the choice depends on the row alone


def test_batch_order_and_threads_change_nothing():
    inputs = sample_inputs(**SAMPLE_CASES["a different mix per row"])
    token, logprob = ops.sample(**inputs)
    order = torch.randperm(len(token))
    shuffled = ops.sample(**{k: v[order] for k, v in inputs.items()})
    assert torch.equal(shuffled[0], token[order]) and torch.equal(shuffled[1], logprob[order])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        for row in range(len(token)):
            alone = ops.sample(**{k: v[row : row + 1] for k, v in inputs.items()})
            assert torch.equal(alone[0][0], token[row]) and torch.equal(alone[1][0], logprob[row])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.cuda("sample")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [3001, 30_000, 128_256])
@pytest.mark.parametrize(
    "mix",
    [
        {}, {"top_k": 50, "top_p": 0.95}, {"top_k": 3000}, {"top_p": 0.9}, {"top_p": 0.999, "spread": 0.3},
        {"top_k": 200, "top_p": 0.5}, {"top_k": 3000, "top_p": 0.7},
        {"top_p": 0.05, "temperature": 3.0},  # often drawn again
    ],
    ids=str,
)  # fmt: skip
def test_batch_size_changes_nothing_on_cuda(vocabulary, dtype, mix):
    """How many blocks serve a row depends on the batch; what the row gets does not, bit for bit."""
    inputs = sample_inputs(batch=200, vocabulary=vocabulary, dtype=dtype, **mix)
    inputs = {k: v.cuda() for k, v in inputs.items()}
    token, logprob = ops.sample(**inputs)
    for begin, end in [(row, row + 1) for row in range(0, 200, 23)] + [(0, 20), (150, 200)]:
        part = ops.sample(**{k: v[begin:end] for k, v in inputs.items()})
        assert torch.equal(part[0], token[begin:end])
        assert torch.equal(part[1], logprob[begin:end])


def test_strided_inputs_equal_contiguous():
    inputs = sample_inputs(top_k=5)
    strided = {k: torch.stack([v, v], -1)[..., 0] for k, v in inputs.items()}
    for a, b in zip(ops.sample(**strided), ops.sample(**inputs)):
        assert torch.equal(a, b)


# ---- edges


def test_ties():
    inputs = sample_inputs(batch=3, vocabulary=300, temperature=0.0)
    inputs["logits"][:, [70, 200, 299]] = 50.0
    assert ops.sample(**inputs)[0].tolist() == [70, 70, 70]
    logits = torch.tensor([0.0, 1.0, 3.0, 1.0, -2.0, 1.0])
    for filters in ({"top_k": 2}, {"top_p": 0.8}, {"min_p": 0.1}):
        assert set(draw(logits, 1000, **filters).tolist()) == {1, 2, 3, 5}
    assert set(draw(torch.zeros(500), 20_000, top_k=3).tolist()) == set(range(500))
    assert set(draw(torch.zeros(500), 20_000, top_p=0.1).tolist()) == set(range(500))


def test_minus_infinity_is_never_chosen():
    logits = torch.full((200,), float("-inf"))
    logits[[3, 64, 190]] = torch.tensor([0.0, -1.0, -0.5])
    for filters in ({}, {"top_k": 100}, {"top_p": 0.999}, {"min_p": 1e-9}, {"temperature": 1e30}):
        tokens = draw(logits, 3000, **filters)
        assert set(tokens.tolist()) == {3, 64, 190}
    logits[[64, 190]] = float("-inf")
    token, logprob = ops.sample(
        **{**sample_inputs(batch=1, vocabulary=200), "logits": logits[None]}
    )
    assert token.item() == 3 and logprob.item() == 0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_without_a_distribution_are_flagged(temperature):
    nan, inf = float("nan"), float("inf")
    inputs = sample_inputs(batch=7, vocabulary=100, temperature=temperature, top_k=5, top_p=0.9)
    logits = inputs["logits"]
    logits[0, 99], logits[1, 0], logits[2, 70] = nan, nan, inf
    logits[3, [5, 6]], logits[4], logits[5, :99] = inf, -inf, nan
    token, logprob = ops.sample(**inputs)
    assert token[:6].tolist() == [-1] * 6 and logprob[:6].isnan().all()
    assert token[6] >= 0 and logprob[6].isfinite()


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"logits": torch.zeros(12, 9).double()}, TypeError, "logits expected dtype float32 or bfloat16"),
        ({"logits": torch.zeros(9)}, ValueError, r"logits expected shape .* got \(9\)"),
        ({"logits": torch.zeros(12, 0)}, ValueError, "logits expected a vocabulary, got 0 columns"),
        ({"temperature": torch.ones(11)}, ValueError, r"temperature expected shape .* = \(12\), got \(11\)"),
        ({"top_k": torch.ones(12)}, TypeError, "top_k expected dtype Int, got Float"),
        ({"top_p": torch.ones(12, 1)}, ValueError, r"top_p expected shape .* got \(12, 1\)"),
        ({"min_p": torch.ones(12).double()}, TypeError, "min_p expected dtype Float, got Double"),
        ({"rng_key": torch.zeros(12, 3).long()}, ValueError, r"rng_key expected shape .* got \(12, 3\)"),
    ],
)  # fmt: skip
def test_errors(change, error, words):
    with pytest.raises(error, match=f"sample: .*{words}"):
        ops.sample(**sample_inputs() | change)


def test_opcheck():
    inputs = sample_inputs(top_k=5)
    torch.library.opcheck(torch.ops.reasoners.sample.default, tuple(inputs.values()))


def test_compiles_whole_with_dynamic_shapes():
    def step(logits, *rest):
        token, logprob = ops.sample(logits * 2, *rest)
        return token + 1, logprob

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (3, 5):
        inputs = sample_inputs(batch=batch, top_p=0.9)
        for a, b in zip(compiled(*inputs.values()), step(*inputs.values())):
            assert torch.equal(a, b)
