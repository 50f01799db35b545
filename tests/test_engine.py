import itertools

import pytest
import torch

from reasoners import ops
from reasoners.cache import Cache, bytes_to_hold
from reasoners.decode import DecodeLoop
from reasoners.engine import Engine, Request
from reasoners.model import CONFIGS, HybridLM
from reasoners.sampling import SamplingParams, prompt_key

FAMILIES = ["tiny-llama", "tiny-llamba", "tiny-mamba1", "tiny-mamba2"]
PROMPTS = [tuple(range(3, 3 + n)) for n in (1, 5, 16, 23, 40)]


def tiny(name="tiny-mamba2", dtype=torch.float32):
    torch.manual_seed(0)
    model = HybridLM(CONFIGS[name]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(6)  # sharper than fresh weights: tokens then depend on the context
    return model.to(dtype)


def collect(engine, requests, **kwargs):
    """{(prompt, sample): tokens}"""
    found = {}
    for sample in engine.run(requests, **kwargs):
        if sample is not None:
            key = (sample.request.prompt, sample.index)
            assert key not in found
            found[key] = sample.token_ids
    return found


def assert_all_free(engine):
    assert engine.cache.num_free_slots == engine.cache.num_slots
    assert engine.cache.num_free_pages == engine.cache.num_pages


def naive(model, prompt, params, index):
    """No cache, no batch: the whole sequence through `forward` for every token."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + params.max_tokens:
        with torch.no_grad():
            logits = model(torch.tensor([tokens]))[:, -1].float()
        key = torch.tensor([[params.seed, prompt_key(prompt), index, len(tokens)]])
        token, _ = ops.sample(
            logits,
            torch.tensor([float(params.temperature)]),
            torch.tensor([params.top_k], dtype=torch.int32),
            torch.tensor([params.top_p]),
            torch.tensor([params.min_p]),
            key,
        )
        tokens.append(int(token))
        if int(token) == 7:
            break
    return tokens[len(prompt) :]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(n=3, max_tokens=12, seed=5),
        SamplingParams(n=2, max_tokens=12, temperature=0),
        SamplingParams(n=2, max_tokens=12, temperature=0.7, top_k=20, top_p=0.9, min_p=0.01),
    ],
    ids=["plain", "greedy", "filtered"],
)
@pytest.mark.parametrize("ahead", [0, 1])
def test_tokens_equal_a_naive_loop(name, params, ahead):
    model = tiny(name, torch.float64)
    engine = Engine(
        model, max_rows=4, max_length=64, eos_token_ids={7}, page_size=4, prefill_chunk=8,
        ahead=ahead,
    )  # fmt: skip
    found = collect(engine, [Request(p, params) for p in PROMPTS])
    assert len(found) == len(PROMPTS) * params.n
    for (prompt, index), tokens in found.items():
        assert tokens == naive(model, prompt, params, index), (len(prompt), index)
    assert_all_free(engine)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_same_tokens_at_any_batch_size_order_and_restart(name, dtype):
    model = tiny(name, dtype)
    params = SamplingParams(n=4, max_tokens=24, seed=11)
    requests = [Request(p, params) for p in PROMPTS]
    expected = collect(Engine(model, max_rows=32, max_length=64), requests)
    assert len({tuple(t) for t in expected.values()}) == len(expected)  # samples differ
    for rows in (1, 3, 7):
        assert collect(Engine(model, max_rows=rows, max_length=64), requests) == expected
    backwards = [Request(p, params, samples=(3, 2, 1, 0)) for p in PROMPTS[::-1]]
    assert collect(Engine(model, max_rows=5, max_length=64), backwards) == expected
    # Interrupted, then asked for the rest by another engine.
    first = Engine(model, max_rows=6, max_length=64)
    part = {}
    for sample in first.run(requests):
        if sample is not None:
            part[sample.request.prompt, sample.index] = sample.token_ids
            if len(part) == 5:
                break
    rest = [Request(p, params, tuple(i for i in range(4) if (p, i) not in part)) for p in PROMPTS]
    assert part | collect(Engine(model, max_rows=6, max_length=64), rest) == expected


def test_seeds_and_samples_differ_and_repeat():
    engine = Engine(tiny(), max_rows=8, max_length=64)
    one = collect(engine, [Request(PROMPTS[2], SamplingParams(n=4, max_tokens=16, seed=1))])
    two = collect(engine, [Request(PROMPTS[2], SamplingParams(n=4, max_tokens=16, seed=2))])
    again = collect(engine, [Request(PROMPTS[2], SamplingParams(n=4, max_tokens=16, seed=1))])
    assert one == again
    assert not set(map(tuple, one.values())) & set(map(tuple, two.values()))


def test_rows_leave_and_waiting_ones_enter():
    """A short answer never cuts or holds a long one."""
    engine = Engine(tiny(), max_rows=3, max_length=64)
    short, long = SamplingParams(n=5, max_tokens=2), SamplingParams(n=2, max_tokens=30)
    order = []
    for sample in engine.run([Request(PROMPTS[1], long), Request(PROMPTS[2], short)]):
        if sample is not None:
            order.append((sample.request.prompt, len(sample.token_ids)))
            assert sample.finish_reason == "length"
            assert sample.end_s >= sample.start_s
    assert order == [(PROMPTS[2], 2)] * 5 + [(PROMPTS[1], 30)] * 2


def test_requests_are_pulled_only_as_rows_come_free():
    engine = Engine(tiny(), max_rows=4, max_length=64)
    pulled = []

    def source():
        for i in itertools.count():
            pulled.append(i)
            yield Request(PROMPTS[i % 5], SamplingParams(n=2, max_tokens=8, seed=i))

    run = engine.run(source())
    for _ in range(20):
        next(run)
    assert len(pulled) < 10
    run.close()
    assert_all_free(engine)


def test_should_stop_drops_the_unfinished():
    engine = Engine(tiny(), max_rows=4, max_length=64)
    steps = itertools.count()
    requests = [Request(p, SamplingParams(n=3, max_tokens=20)) for p in PROMPTS]
    found = collect(engine, requests, should_stop=lambda: next(steps) >= 25)
    assert 0 < len(found) < 15
    assert_all_free(engine)


def test_end_of_sequence_stop_tokens_and_ignore_eos():
    model = tiny()
    params = SamplingParams(n=1, max_tokens=20, temperature=0)
    free = collect(Engine(model, max_length=64), [Request(PROMPTS[3], params)])
    tokens = free[PROMPTS[3], 0]
    cut = tokens.index(tokens[6]) + 1

    def run(engine, **changes):
        request = Request(PROMPTS[3], SamplingParams(**{**vars(params), **changes}))
        (sample,) = [s for s in engine.run([request]) if s is not None]
        return sample.token_ids, sample.finish_reason

    eos = Engine(model, max_length=64, eos_token_ids={tokens[6]})
    assert run(eos) == (tokens[:cut], "stop")
    assert run(eos, ignore_eos=True) == (tokens, "length")
    plain = Engine(model, max_length=64, ends_with_stop=lambda ids, stop: len(ids) == int(stop[0]))
    assert run(plain, stop_token_ids=(tokens[6],)) == (tokens[:cut], "stop")
    assert run(plain, stop=("4",)) == (tokens[:4], "stop")


def test_logprobs_are_those_of_the_forward_pass():
    model = tiny(dtype=torch.float64)
    engine = Engine(model, max_length=64)
    params = SamplingParams(max_tokens=10, temperature=0.5, top_k=5, logprobs=True)
    (sample,) = [s for s in engine.run([Request(PROMPTS[2], params)]) if s is not None]
    tokens = list(PROMPTS[2]) + sample.token_ids
    with torch.no_grad():
        exact = model(torch.tensor([tokens]))[0].log_softmax(-1)
    positions = range(len(PROMPTS[2]) - 1, len(tokens) - 1)
    expected = [float(exact[t, tokens[t + 1]]) for t in positions]
    assert sample.logprobs == pytest.approx(expected, abs=1e-5)


# ---- when memory is short


@pytest.mark.parametrize("num_pages", [12, 13, 16, 20, 40])
@pytest.mark.parametrize("ahead", [0, 1])
def test_out_of_pages_waits_and_changes_no_token(num_pages, ahead):
    model = tiny("tiny-llama")
    params = SamplingParams(n=5, max_tokens=8)
    requests = [Request(p, params) for p in PROMPTS]  # the longest needs 12 pages of 4
    expected = collect(Engine(model, max_rows=25, max_length=64), requests)
    engine = Engine(model, max_rows=8, max_length=64, page_size=4, ahead=ahead)
    engine.cache = type(engine.cache)(
        model, num_slots=6, max_length=64, num_pages=num_pages, page_size=4
    )
    engine.loop = DecodeLoop(model, engine.cache, max_rows=8)
    assert collect(engine, requests) == expected
    assert_all_free(engine)


def test_no_more_rows_than_states_fit():
    model = tiny("tiny-llamba")
    for period in (1, 8):
        one = Cache(model, num_slots=1, max_length=64, period=period)
        assert bytes_to_hold(model, 16, period=period) == (0, one.num_bytes())
    _, slot = bytes_to_hold(model, 16)
    assert Engine(model, max_length=64).max_rows == 64
    assert Engine(model, max_length=64, max_bytes=10 * slot + 1).max_rows == 9
    assert Engine(tiny("tiny-llama"), max_length=64, max_bytes=2**20).max_rows == 64


def test_a_request_that_can_never_fit_names_the_numbers():
    engine = Engine(tiny("tiny-llama"), max_rows=2, max_length=64)
    with pytest.raises(ValueError, match="at most max_length = 64 tokens, got 70"):
        collect(engine, [Request(PROMPTS[4], SamplingParams(max_tokens=30))])
    assert_all_free(engine)


@pytest.mark.parametrize(
    ("prompt", "words"),
    [((), "at least one token"), ((1, 256), r"\[0, 256\), got 256"), ((-1,), "got -1")],
)
def test_bad_prompts(prompt, words):
    with pytest.raises(ValueError, match=words):
        collect(Engine(tiny(), max_length=64), [Request(prompt, SamplingParams())])


def test_nan_logits_stop_the_run_and_keep_what_was_finished():
    model = tiny()
    engine = Engine(model, max_rows=2, max_length=64)
    params = SamplingParams(max_tokens=4)
    found, run = [], engine.run([Request(p, params) for p in PROMPTS])
    with pytest.raises(FloatingPointError, match="not finite"):
        for sample in run:
            if sample is not None:
                found.append(sample)
                model.norm.weight.data[0] = float("nan")
    assert found
    assert_all_free(engine)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"n": 0}, "n expected at least 1, got 0"),
        ({"temperature": -0.1}, "temperature expected at least 0, got -0.1"),
        ({"temperature": float("nan")}, "temperature expected"),
        ({"top_k": -1}, "top_k expected"),
        ({"top_p": 0.0}, "top_p expected above 0"),
        ({"top_p": 1.5}, "top_p expected"),
        ({"min_p": 2.0}, "min_p expected"),
        ({"max_tokens": 0}, "max_tokens expected at least 1"),
        ({"seed": 2**63}, "seed expected a 64-bit integer"),
        ({"stop": ("",)}, "stop expected non-empty strings"),
    ],
)
def test_sampling_params_say_what_is_wrong(change, words):
    with pytest.raises(ValueError, match=f"SamplingParams: {words}"):
        SamplingParams(**change)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_that_has_generated_can_be_trained(name, device):
    model = tiny(name).to(device)
    engine = Engine(model, max_rows=2, max_length=32)
    assert len(collect(engine, [Request((1, 2, 3), SamplingParams(n=2, max_tokens=4))])) == 2
    model(torch.arange(9, device=device)[None]).square().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_prompt_key_is_stable():
    """Stored runs are resumed by later versions: the key of a prompt may never change."""
    assert prompt_key((1, 2, 3)) == prompt_key([1, 2, 3])
    assert prompt_key((1, 2, 3)) == KEY_OF_123
    assert prompt_key((3, 2, 1)) != KEY_OF_123


KEY_OF_123 = -7044357283931317034
