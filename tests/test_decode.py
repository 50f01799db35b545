"""The decode loop on its own: what a step leaves behind, graphs against eager, no waiting inside."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from test_engine import FAMILIES, PROMPTS, assert_all_free, collect, naive, tiny

from reasoners import decode
from reasoners.cache import Cache
from reasoners.decode import ENDED, DecodeLoop, Row, ladder
from reasoners.engine import Engine, Request
from reasoners.model import CONFIGS, HybridLM
from reasoners.sampling import SamplingParams

DECODE_OPERATORS = (
    "discrete_mamba2_update", "mamba2_update", "mamba1_update", "add_rms_norm", "gate",
    "swiglu", "rotate_append_kv", "paged_attention", "sample", "advance", "count_pending", "ssd_scan",
    "selective_scan", "causal_conv1d", "softplus",
)  # fmt: skip


def test_ladder_rises_to_its_last():
    for rows in (1, 2, 3, 7, 16, 100, 512, 1000):
        sizes = ladder(rows)
        assert sizes == sorted(set(sizes))
        assert sizes[-1] == rows
        assert all(b <= 2 * a for a, b in pairwise(sizes))
    assert len(ladder(512)) < 24


def started(name="tiny-mamba2", rows=3, device="cpu", dtype=torch.float32, **options):
    """A loop that holds `rows` sequences of 5 tokens, each with its own 6th."""
    model = tiny(name, dtype).to(device)
    period = options.pop("period", 1)
    state_dtype = options.pop("state_dtype", None)
    cache = Cache(
        model,
        num_slots=rows + 2,
        max_length=64,
        page_size=4,
        period=period,
        state_dtype=state_dtype,
    )
    slots = [cache.allocate(40) for _ in range(rows)]
    prompts = [torch.arange(5) + 7 * i for i in range(rows)]
    tokens = torch.cat(prompts).to(device)
    model.extend(tokens, cache, cache.step(slots, [5] * rows))
    loop = DecodeLoop(model, cache, max_rows=rows + 1, max_steps=16, **options)
    held = [
        Row(slot, 10 + i, 6, 12, (3, 44, i), (), SamplingParams(temperature=1.0))
        for i, slot in enumerate(slots)
    ]
    return loop, held


@pytest.mark.parametrize("name", FAMILIES)
def test_many_steps_equal_one_at_a_time(name):
    loop, rows = started(name)
    loop.load(rows)
    tokens, logprobs = loop.run(10)
    assert (tokens >= 0).all()
    again, rows = started(name)
    again.load(rows)
    parts = [again.run(n) for n in (1, 3, 6)]
    assert torch.equal(tokens, torch.cat([part[0] for part in parts]))
    assert torch.equal(logprobs, torch.cat([part[1] for part in parts]))


def test_a_row_ends_by_itself_and_leaves_its_state_alone():
    loop, rows = started()
    loop.load(rows)
    tokens, _ = loop.run(12)
    column = tokens[:, 1].tolist()
    stop = next(t for t in column if column.index(t) >= 3)
    loop, rows = started()
    rows[1] = Row(*[*vars(rows[1]).values()][:5], (999, stop), rows[1].params)
    loop.load(rows)
    first = loop.run(column.index(stop) + 1)[0]
    assert first[-1, 1] == stop
    before = [
        layer.scan[rows[1].slot].clone() for layer in loop.cache.layers if hasattr(layer, "scan")
    ]
    rest = loop.run(12 - len(first))[0]
    assert (rest[:, 1] == ENDED).all()
    assert torch.equal(torch.cat((first, rest))[:, [0, 2]], tokens[:, [0, 2]])
    after = [layer.scan[rows[1].slot] for layer in loop.cache.layers if hasattr(layer, "scan")]
    assert all(torch.equal(a, b) for a, b in zip(before, after))
    assert (loop.run(1)[0] == ENDED).all()  # nothing remains of 12 tokens


@pytest.mark.parametrize("name", FAMILIES)
def test_an_engine_that_looks_seldom_draws_the_same(name):
    model = tiny(name)
    params = SamplingParams(n=4, max_tokens=21, seed=4)
    requests = [Request(p, params) for p in PROMPTS]
    often = Engine(model, max_rows=6, max_length=64, eos_token_ids={7, 30, 31})
    seldom = Engine(model, max_rows=6, max_length=64, eos_token_ids={7, 30, 31}, look_every=7)
    assert collect(often, requests) == collect(seldom, requests)
    assert_all_free(seldom)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(("rows", "steps"), [(1, 1), (3, 4), (6, 1), (6, 7), (20, 3)])
def test_an_engine_that_is_a_window_behind_draws_the_same(name, rows, steps):
    """Rows end, are replaced and regrouped while the next steps are under way already."""
    model = tiny(name)
    requests = [
        Request(prompt, SamplingParams(n=4, max_tokens=most, seed=4, logprobs=most == 2))
        for prompt, most in zip(PROMPTS, (21, 1, 2, 9, 20), strict=True)
    ]

    def run(**options):
        options = {"max_length": 64, "page_size": 4, "eos_token_ids": {7, 30, 31}} | options
        engine = Engine(model, **options)
        found = {
            (s.request.prompt, s.index): (s.token_ids, s.logprobs, s.finish_reason)
            for s in engine.run(requests)
            if s is not None
        }
        assert_all_free(engine)
        return found

    expected = run(max_rows=6)
    assert len(expected) == 20
    found = run(max_rows=rows, look_every=steps, ahead=1, period=2 if steps == 4 else 1)
    assert {key: one[::2] for key, one in found.items()} == {
        key: one[::2] for key, one in expected.items()
    }
    for key, (_, logprobs, _) in expected.items():
        assert found[key][1] == pytest.approx(logprobs, abs=1e-5)


@pytest.mark.parametrize("pays", [1, 10**9])
def test_rows_that_share_pages_go_on_where_they_are_put(pays, monkeypatch):
    model = tiny("tiny-llama")
    alone, _ = shared_prompts(model, 20, monkeypatch, 10**9)
    tokens, _ = shared_prompts(model, 7, monkeypatch, pays, ahead=1, look_every=3)
    assert tokens == alone


def test_an_engine_is_one_window_ahead_at_most():
    with pytest.raises(ValueError, match="ahead expected 0 or 1, got 2"):
        Engine(tiny(), ahead=2)


def test_stops_that_only_the_host_knows_cut_at_the_same_token():
    model = tiny()
    params = SamplingParams(n=3, max_tokens=20, stop=("x",), stop_token_ids=tuple(range(200, 240)))

    def run(look_every, ahead=0):
        engine = Engine(
            model, max_rows=3, max_length=64, look_every=look_every, ahead=ahead,
            ends_with_stop=lambda ids, _: len(ids) >= 3 and ids[-1] % 5 == 0,
        )  # fmt: skip
        return collect(engine, [Request(PROMPTS[2], params)])

    assert run(1) == run(6) == run(1, ahead=1) == run(6, ahead=1)


@pytest.mark.parametrize("name", ["tiny-llamba", "tiny-mamba2"])
def test_deferred_state_writes_keep_logits_and_forks(name):
    """The same tokens as with plain updates, whatever the period and the batch."""
    model = tiny(name, torch.float64)
    params = SamplingParams(n=5, max_tokens=22, seed=2)
    requests = [Request(p, params) for p in PROMPTS]
    plain = collect(Engine(model, max_rows=7, max_length=64), requests)
    for period, rows in ((2, 7), (8, 1), (8, 7), (8, 25), (16, 7)):
        engine = Engine(model, max_rows=rows, max_length=64, period=period)
        assert collect(engine, requests) == plain


def test_a_sequence_with_recent_tokens_can_be_prefilled_and_forked():
    model = tiny("tiny-llamba", torch.float64)
    cache = Cache(model, num_slots=4, max_length=64, period=8)
    tokens = torch.randint(0, 256, (20,))
    slot = cache.allocate(40)
    model.extend(tokens[:5], cache, cache.step([slot], [5]))
    for i in range(5, 11):
        model.extend(tokens[i : i + 1], cache, cache.step([slot], [1], decode=True))
    assert cache.pending[slot] == 6
    fork = cache.fork(slot, 40)
    one = model.extend(tokens[11:], cache, cache.step([slot], [9]))
    assert cache.pending[slot] == 0
    for i in range(11, 20):
        two = model.extend(tokens[i : i + 1], cache, cache.step([fork], [1], decode=True))
    with torch.no_grad():
        expected = model(tokens[None])[:, -1]
    torch.testing.assert_close(one, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(two, expected, rtol=1e-9, atol=1e-9)


def shared_prompts(model, rows, monkeypatch, pays, **options):
    """Tokens of samples of prompts that end inside of pages, and the pairs that the loop had."""
    monkeypatch.setattr(decode, "SHARED_PAYS", pays)
    params = SamplingParams(n=5, max_tokens=20, seed=8)
    prompts = [tuple(range(3, 3 + n)) for n in (75, 70, 1, 130)]
    engine = Engine(model, max_rows=rows, max_length=160, page_size=4, **options)
    seen, load = [], engine.loop.load

    def watch(rows):
        load(rows)
        size, grouped = engine.loop.kind
        seen.append((grouped, engine.loop.rows.shared[:size].cpu().clone()))

    engine.loop.load = watch
    tokens = collect(engine, [Request(p, params) for p in prompts])
    assert len(tokens) == 20
    return tokens, seen


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-mamba2"])
def test_rows_that_share_pages_are_neighbours_and_draw_the_same(name, monkeypatch):
    model = tiny(name)
    alone, seen = shared_prompts(model, 20, monkeypatch, 10**9)
    assert not any(grouped for grouped, _ in seen)
    for rows in (20, 7):
        tokens, seen = shared_prompts(model, rows, monkeypatch, 1)
        assert tokens == alone
        assert all(grouped for grouped, pairs in seen if (pairs[:, 1] >= 64).any())
        assert {int(t) for _, pairs in seen for t in pairs[:, 1]} == {0, 72, 68, 128}
        for _, pairs in seen:
            for i, (first, shares) in enumerate(pairs.tolist()):
                assert first == i or (shares and pairs[i - 1].tolist() == [first, shares])


def test_tokens_come_back_in_the_order_of_the_rows(monkeypatch):
    monkeypatch.setattr(decode, "SHARED_PAYS", 1)
    model = tiny("tiny-llama")

    def run(order):
        cache = Cache(model, num_slots=4, max_length=160, page_size=4)
        one, two = cache.allocate(100), cache.allocate(100)
        prompts = torch.arange(145) % 251
        model.extend(prompts, cache, cache.step([one, two], [70, 75]))
        slots = [one, cache.fork(one, 100), two, cache.fork(two, 100)]
        rows = [
            Row(slot, 10 + i, (71, 71, 76, 76)[i], 12, (3, 44, i), (), SamplingParams())
            for i, slot in enumerate(slots)
        ]
        loop = DecodeLoop(model, cache, max_rows=6, max_steps=8)
        loop.load([rows[i] for i in order])
        assert loop.kind == (4, True)
        assert loop.rows.shared[:4, 0].tolist() == [0, 0, 2, 2]
        assert set(loop.rows.shared[:4, 1].tolist()) == {68, 72}
        tokens, logprobs = loop.run(8)
        back = sorted(range(4), key=order.__getitem__)
        return tokens[:, back], logprobs[:, back]

    expected = run([0, 1, 2, 3])
    assert len({tuple(column.tolist()) for column in expected[0].T}) == 4
    for order in ([0, 2, 1, 3], [3, 0, 2, 1]):
        assert all(torch.equal(a, b) for a, b in zip(run(order), expected))


def test_sharing_waits_until_it_pays(monkeypatch):
    """5 samples of a prompt with 72 tokens in pages: 64 of them are read once and not 5 times."""
    model, params = tiny("tiny-llama"), SamplingParams(n=5, max_tokens=4)
    for pays, expected in ((256, True), (257, False)):
        monkeypatch.setattr(decode, "SHARED_PAYS", pays)
        engine = Engine(model, max_rows=5, max_length=160, page_size=4)
        run = engine.run([Request(range(75), params)])
        assert next(run) is None
        assert engine.loop.kind == (5, expected)
        run.close()


def test_graphs_and_rounding_that_cannot_be_had_are_refused():
    with pytest.raises(ValueError, match="graphs expected a CUDA model, got one on cpu"):
        started(graphs=True)
    with pytest.raises(NotImplementedError, match="stochastic_rounding expected mamba2"):
        started("tiny-mamba1", stochastic_rounding=True)
    with pytest.raises(ValueError, match="steps expected 1 to 16, got 17"):
        started()[0].run(17)


# ---- CUDA


@pytest.mark.cuda(*DECODE_OPERATORS)
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_graphs_equal_eager_token_for_token(name, dtype):
    model = tiny(name, dtype).to("cuda")
    params = SamplingParams(n=6, max_tokens=30, seed=9)
    requests = [Request(p, params) for p in PROMPTS]
    found = [
        collect(Engine(model, max_rows=8, max_length=80, graphs=graphs, look_every=k), requests)
        for graphs, k in ((False, 1), (False, 8), (True, 8), (True, 3))
    ]
    assert found[0] == found[1] == found[2] == found[3]


@pytest.mark.cuda(*DECODE_OPERATORS)
@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
def test_cuda_rows_that_share_pages_draw_the_same(graphs, monkeypatch):
    """Pages of one prompt are read once for its samples; they end at different steps."""
    config = replace(CONFIGS["llama-3.2-1b"], mixers=("attention",) * 2, vocab_size=4096)
    torch.manual_seed(0)
    model = HybridLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(3)
    model = model.to("cuda", torch.bfloat16)
    options = {"graphs": graphs, "look_every": 4, "max_bytes": 2**30}
    alone, _ = shared_prompts(model, 20, monkeypatch, 10**9, **options)
    for rows in (20, 7):
        tokens, seen = shared_prompts(model, rows, monkeypatch, 1, **options)
        assert tokens == alone
        assert any(grouped for grouped, _ in seen)


@pytest.mark.cuda(*DECODE_OPERATORS)
@pytest.mark.parametrize("name", FAMILIES)
def test_cuda_engine_equals_a_naive_loop(name):
    """The loop without a cache runs in float64 on the CPU."""
    params = SamplingParams(n=2, max_tokens=12, seed=5)
    model = tiny(name, torch.float64)
    engine = Engine(
        tiny(name).to("cuda"), max_rows=4, max_length=64, eos_token_ids={7}, page_size=4,
        prefill_chunk=8,
    )  # fmt: skip
    found = collect(engine, [Request(p, params) for p in PROMPTS])
    assert len(found) == len(PROMPTS) * params.n
    for (prompt, index), tokens in found.items():
        assert tokens == naive(model, prompt, params, index), (len(prompt), index)
    assert_all_free(engine)


@pytest.mark.cuda(*DECODE_OPERATORS)
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
def test_no_step_waits_for_the_device(name, graphs):
    loop, rows = started(name, device="cuda", graphs=graphs, period=8)
    loop.load(rows)
    loop.run(2)
    torch.cuda.set_sync_debug_mode("error")
    try:
        loop.start(8)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert (loop.drawn[:8, :3] >= 0).all()


@pytest.mark.cuda(*DECODE_OPERATORS)
@pytest.mark.parametrize("name", FAMILIES)
def test_the_engine_waits_only_for_what_it_reads(name):
    """Prompts, forks, loads and first draws are enqueued while the window before still runs."""
    model = tiny(name, torch.bfloat16).to("cuda")
    params = SamplingParams(n=6, max_tokens=30, seed=9)
    requests = [Request(p, params) for p in PROMPTS]
    engine = Engine(model, max_rows=8, max_length=80, eos_token_ids={7, 30})
    assert engine.ahead == 1
    expected = collect(engine, requests)  # captures the graphs
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert collect(engine, requests) == expected
    finally:
        torch.cuda.set_sync_debug_mode("default")
    plain = Engine(model, max_rows=3, max_length=80, eos_token_ids={7, 30}, ahead=0)
    assert collect(plain, requests) == expected


@pytest.mark.cuda(*DECODE_OPERATORS)
@pytest.mark.parametrize("name", ["tiny-llamba", "tiny-mamba2"])
@pytest.mark.parametrize("state", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_cuda_deferred_writes_keep_logprobs(name, state):
    """Teacher-forced by greedy choice: the two differ by the rounding of the states only."""
    results = []
    for period in (1, 8):
        loop, rows = started(name, rows=6, device="cuda", period=period, state_dtype=state)
        loop.load(rows)
        results.append(loop.run(12))
    same = results[0][0] == results[1][0]
    assert same.float().mean() > 0.9
    agreed = same.cumprod(0).bool()
    difference = (results[0][1] - results[1][1]).abs()[agreed].max()
    assert difference < (1e-3 if state == torch.float32 else 0.3)


@pytest.mark.cuda(*DECODE_OPERATORS)
def test_stochastic_rounding_repeats_at_any_batch_size():
    model = tiny("tiny-llamba", torch.bfloat16).to("cuda")
    params = SamplingParams(n=6, max_tokens=20, seed=9)
    requests = [Request(p, params) for p in PROMPTS[2:]]

    def tokens(**options):
        engine = Engine(model, max_rows=8, max_length=80, state_dtype=torch.bfloat16, **options)
        return collect(engine, requests)

    assert tokens(stochastic_rounding=True) == tokens(stochastic_rounding=True, graphs=False)
    assert tokens(stochastic_rounding=True) != tokens()


@pytest.mark.cuda(*DECODE_OPERATORS, "linear")
@pytest.mark.parametrize("name", ["llamba-1b", "mambainllama-1b-mamba2", "mambainllama-1b"])
def test_same_tokens_at_any_batch_size_cuda(name):
    """Real shapes, for it is cuBLAS that would choose another sum; states written late, too."""
    config = CONFIGS[name]
    kinds = ("attention", config.mixers[0]) if "attention" in config.mixers else config.mixers[:2]
    torch.manual_seed(0)
    model = HybridLM(replace(config, mixers=kinds, vocab_size=8192)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(3)
    model = model.to("cuda", torch.bfloat16)
    requests = [Request(range(40, 60), SamplingParams(n=150, max_tokens=24, seed=3))]

    def tokens(rows):
        return collect(Engine(model, max_rows=rows, max_length=64, max_bytes=2**31), requests)

    expected = tokens(150)
    assert len({tuple(t) for t in expected.values()}) > 100
    for rows in (1, 3, 7, 20, 100):
        assert tokens(rows) == expected, f"{rows} rows"
