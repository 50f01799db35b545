"""deferred_state_update and count_pending."""

import pytest
import torch
from cases import COUNT_PENDING_CASES, CUDA_STATE_CASES, DEFERRED_STATE_UPDATE_CASES

from reasoners import ops, reference
from reasoners.reference import count_pending_inputs, deferred_state_update_inputs, same

HELD = ("state", "recent", "recent_decay", "pending")
TOKEN = ("x", "log_decay", "B", "C", "scale", "D")


def check(case, device="cpu"):
    before = deferred_state_update_inputs(**case)
    after = reference.check(ops.deferred_state_update, "deferred_state_update", device, **case)
    named = before["slots"][before["slots"] >= 0].long()
    others = [s for s in range(before["state"].shape[0]) if s not in named.tolist()]
    writes = before["pending"][named] + 1 >= before["period"]
    after = {k: v.cpu() for k, v in after.items() if isinstance(v, torch.Tensor)}
    assert torch.equal(after["pending"], before["pending"])
    for name in HELD[:3]:
        kept = others + named[writes if name != "state" else ~writes].tolist()
        assert same(after[name][kept], before[name][kept]), name


@pytest.mark.parametrize(
    "case", DEFERRED_STATE_UPDATE_CASES.values(), ids=DEFERRED_STATE_UPDATE_CASES.keys()
)
def test_against_reference(case):
    check(case)


CUDA_TABLE = DEFERRED_STATE_UPDATE_CASES | CUDA_STATE_CASES


@pytest.mark.cuda("deferred_state_update")
@pytest.mark.parametrize("case", CUDA_TABLE.values(), ids=CUDA_TABLE.keys())
def test_against_reference_cuda(case):
    check(case, "cuda")


@pytest.mark.parametrize("case", COUNT_PENDING_CASES.values(), ids=COUNT_PENDING_CASES.keys())
def test_count_pending(case):
    reference.check(ops.count_pending, "count_pending", **case)


@pytest.mark.cuda("count_pending")
@pytest.mark.parametrize("case", COUNT_PENDING_CASES.values(), ids=COUNT_PENDING_CASES.keys())
def test_count_pending_cuda(case):
    reference.check(ops.count_pending, "count_pending", "cuda", **case)


def test_float64_is_exact_to_rounding():
    inputs = deferred_state_update_inputs(
        dtype=torch.float64, state_dtype=torch.float64, pending=[0, 1, 2, 3, 5, 0, 0], batch=5,
        slots=[4, 3, 2, 1, 0],
    )  # fmt: skip
    expected = reference.deferred_state_update(**inputs)
    actual = (ops.deferred_state_update(**inputs), *(inputs[name] for name in HELD[:3]))
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13, equal_nan=True)


# ---- over many tokens


def start(device="cpu", **change):
    """Held tensors with nothing pending yet, and the slots of the rows."""
    inputs = deferred_state_update_inputs(**{"pending": 0, "capacity": 15, "period": 1} | change)
    held = {name: inputs[name].to(device) for name in HELD}
    return held, inputs["slots"].to(device)


def tokens(count, device="cpu", seed=50, **change):
    """One token a step for every row."""
    for t in range(count):
        inputs = reference.state_update_inputs(**change, seed=seed + t)
        yield {name: inputs[name].to(device) for name in TOKEN}


def run(held, slots, inputs, periods):
    """Every y; `held` moves on."""
    ys = []
    for token, period in zip(inputs, periods, strict=True):
        ys.append(ops.deferred_state_update(**held, slots=slots, **token, period=period))
        ops.count_pending(held["pending"], slots, period)
    return torch.stack(ys)


def settled(held, slots):
    """The states with what is pending folded onto them, by a token that adds nothing."""
    held = {name: value.clone() for name, value in held.items()}
    token = next(tokens(1, batch=len(slots), device=slots.device))
    token["x"], token["log_decay"] = token["x"] * 0, token["log_decay"] * 0
    run(held, slots, [token], [1])
    assert (held["pending"] == 0).all()
    return held["state"]


def check_period(periods, device="cpu"):
    held, slots = start(device)
    state = held["state"].clone()
    ys = run(held, slots, list(tokens(20, device)), periods)
    expected = [ops.state_update(state, slots, **token) for token in tokens(20, device)]
    torch.testing.assert_close(ys, torch.stack(expected), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(settled(held, slots), state, rtol=1e-5, atol=1e-5)


PERIODS = {str(n): [n] * 20 for n in (1, 2, 3, 4, 7, 8, 16)} | {
    "switching": [8] * 5 + [1] * 2 + [4] * 3 + [16] * 8 + [2] * 2
}


@pytest.mark.parametrize("periods", PERIODS.values(), ids=PERIODS.keys())
def test_any_period_is_the_plain_update(periods):
    check_period(periods)


@pytest.mark.cuda("deferred_state_update", "count_pending", "state_update")
@pytest.mark.parametrize("periods", PERIODS.values(), ids=PERIODS.keys())
def test_any_period_is_the_plain_update_cuda(periods):
    check_period(periods, "cuda")


def check_fork(device="cpu"):
    """Rows 0 and 1 of three; slot 0's sequence is copied to slot 4 and both get the same tokens."""
    held, _ = start(device)
    parent = torch.tensor([0], dtype=torch.int32, device=device)
    history = list(tokens(5, device, batch=1))
    run(held, parent, history, [8] * 5)
    for value in held.values():
        value[4] = value[0]
    both = torch.tensor([4, 0], dtype=torch.int32, device=device)
    for token in tokens(9, device, seed=90, batch=1):
        twice = {k: v if k == "D" else torch.cat((v, v)) for k, v in token.items()}
        y = run(held, both, [twice], [8])[0]
        assert torch.equal(y[0], y[1])
    for value in held.values():
        assert same(value[4], value[0])


def test_a_fork_continues_as_the_original():
    check_fork()


@pytest.mark.cuda("deferred_state_update", "count_pending")
def test_a_fork_continues_as_the_original_cuda():
    check_fork("cuda")


def check_rollback(taken, device="cpu"):
    held, slots = start(device)
    run(held, slots, list(tokens(3, device)), [8] * 3)
    straight = {name: value.clone() for name, value in held.items()}
    run(held, slots, list(tokens(taken, device, seed=80)), [8] * taken)
    held["pending"][slots.long()] -= taken
    rest = list(tokens(10, device, seed=90))
    assert torch.equal(run(held, slots, rest, [8] * 10), run(straight, slots, rest, [8] * 10))
    assert torch.equal(held["pending"], straight["pending"])
    assert torch.equal(held["state"], straight["state"])


@pytest.mark.parametrize("taken", [1, 2, 4])
def test_rolling_back_is_never_having_gone(taken):
    check_rollback(taken)


@pytest.mark.cuda("deferred_state_update", "count_pending")
@pytest.mark.parametrize("taken", [1, 2, 4])
def test_rolling_back_is_never_having_gone_cuda(taken):
    check_rollback(taken, "cuda")


# ---- a row by itself


@pytest.mark.parametrize("pending", [0, 2, 3])
def test_batch_mates_and_threads_change_nothing(pending):
    inputs = deferred_state_update_inputs(
        batch=6, pending=pending, dtype=torch.bfloat16, state_dtype=torch.bfloat16, noise=True
    )
    shared = (*HELD, "D", "period")
    alone = {k: v if k in shared else v[2:3] for k, v in inputs.items()}
    alone |= {name: inputs[name].clone() for name in HELD}
    y, slot = ops.deferred_state_update(**inputs), int(inputs["slots"][2])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert torch.equal(ops.deferred_state_update(**alone), y[2:3])
    finally:
        torch.set_num_threads(threads)
    for name in HELD:
        assert same(alone[name][slot], inputs[name][slot])


def test_strided_inputs_equal_contiguous():
    inputs = deferred_state_update_inputs()
    padded = torch.randn(3, 4, 40)
    padded[..., 8:24] = inputs["x"]
    strided = inputs | {"x": padded[..., 8:24]} | {name: inputs[name].clone() for name in HELD}
    expected = ops.deferred_state_update(**inputs)
    assert torch.equal(ops.deferred_state_update(**strided), expected)
    assert same(strided["recent"], inputs["recent"])


def test_nan_in_other_slots_does_not_leak():
    inputs = deferred_state_update_inputs(slots=[4, 0, 2])
    inputs["state"][[1, 3]] = float("nan")
    assert ops.deferred_state_update(**inputs).isfinite().all()


def pending(*counts):
    return torch.tensor(counts, dtype=torch.int32)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"period": 0}, ValueError, "period expected 1 to 8, got 0"),
        ({"period": 9}, ValueError, "period expected 1 to 8, got 9"),
        ({"pending": pending(0, 0, 8, 0, 0)}, ValueError, r"pending\[2\] expected 0 to 7, got 8"),
        ({"pending": pending(0, 0, -1, 0, 0)}, ValueError, r"pending\[2\] expected 0 to 7, got -1"),
        ({"pending": pending(0, 0, 0, 0)}, ValueError, r"pending expected shape \(slots\) = \(5\)"),
        ({"pending": torch.zeros(5)}, TypeError, "pending expected dtype Int"),
        ({"recent": torch.zeros(5, 7, 127)}, ValueError, r"recent expected shape .* \(5, \*, 128\)"),
        ({"recent": torch.zeros(5, 7, 256)[..., ::2]}, ValueError, "recent expected contiguous"),
        ({"recent": torch.zeros(5, 16, 128)}, ValueError, "capacity expected at most 15, got 16"),
        ({"recent_decay": torch.zeros(5, 6, 2, 4)}, ValueError, r"recent_decay expected shape .* \(5, 7, 2"),
        ({"slots": torch.tensor([2, 1, 9], dtype=torch.int32)}, ValueError, "slots expected below 5"),
        ({"slots": torch.tensor([2, 1, 1], dtype=torch.int32)}, ValueError, "got 1 twice"),
        ({"rng_key": torch.zeros(3, 4).long()}, ValueError, "rng_key expected None for a float32 state"),
    ],
)  # fmt: skip
def test_errors(change, error, words):
    inputs = deferred_state_update_inputs(slots=[2, 0, 1]) | change
    before = [inputs[name].clone() for name in HELD]
    with pytest.raises(error, match=f"deferred_state_update: .*{words}"):
        ops.deferred_state_update(**inputs)
    assert all(same(inputs[name], value) for name, value in zip(HELD, before, strict=True))


def test_count_pending_errors():
    for change, words in (
        ({"period": 0}, "period expected 1 to 16, got 0"),
        ({"slots": torch.tensor([1, 1], dtype=torch.int32)}, "slots expected distinct"),
        ({"slots": torch.tensor([7], dtype=torch.int32)}, "slots expected below 7"),
    ):
        inputs = count_pending_inputs() | change
        before = inputs["pending"].clone()
        with pytest.raises(ValueError, match=f"count_pending: {words}"):
            ops.count_pending(**inputs)
        assert torch.equal(inputs["pending"], before)


def test_opcheck():
    for case in ("base", "writes", "noise"):
        inputs = deferred_state_update_inputs(**DEFERRED_STATE_UPDATE_CASES[case])
        for name in ("recent", "recent_decay"):
            inputs[name].nan_to_num_(0.5)
        torch.library.opcheck(
            torch.ops.reasoners.deferred_state_update.default, tuple(inputs.values())
        )
    torch.library.opcheck(
        torch.ops.reasoners.count_pending.default, tuple(count_pending_inputs().values())
    )


def test_compiles_whole_with_dynamic_shapes():
    def step(inputs):
        y = ops.deferred_state_update(**inputs)
        ops.count_pending(inputs["pending"], inputs["slots"], inputs["period"])
        return y * 2

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (3, 5):
        inputs = deferred_state_update_inputs(batch=batch)
        other = inputs | {name: inputs[name].clone() for name in HELD}
        assert torch.equal(compiled(inputs), step(other))
        assert all(same(inputs[name], other[name]) for name in HELD)


# ---- many rows on CUDA: blocks that stay draw them by tickets, and look at slots early


def many_rows(batch, seed=0):
    """Of the kernel whose blocks stay, at every place of the period."""
    count = batch + 2
    inputs = deferred_state_update_inputs(
        batch=batch, H=8, Hx=8, Gb=8, Gc=8, P=64, N=64, dtype=torch.bfloat16, slots=range(batch),
        period=8, pending=[(5 * i + i // 7) % 8 for i in range(count)], seed=seed,
    )  # fmt: skip
    return {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}


def copied(inputs):
    return {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}


@pytest.mark.cuda("deferred_state_update")
def test_tickets_are_left_for_the_next_launch_cuda():
    """Launches after each other, of several graphs in turn and on two streams give the same."""
    batches = (150, 700)
    starts = [many_rows(batch) for batch in batches]
    expected = [copied(inputs) for inputs in starts]
    expected = [
        (inputs, [ops.deferred_state_update(**inputs) for _ in range(3)]) for inputs in expected
    ]

    graphs = []
    for start in starts:
        held, graph = copied(start), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = ops.deferred_state_update(**held)
        for name in HELD:
            held[name].copy_(start[name])
        graphs.append((held, graph, y))
    for turn in range(3):
        for (_, graph, y), (_, ys) in zip(graphs, expected, strict=True):
            graph.replay()
            assert torch.equal(y, ys[turn])
    streams = [torch.cuda.Stream() for _ in batches]
    both = [copied(inputs) for inputs in starts]
    torch.cuda.synchronize()
    for _ in range(3):
        for stream, inputs in zip(streams, both, strict=True):
            with torch.cuda.stream(stream):
                ops.deferred_state_update(**inputs)
    torch.cuda.synchronize()
    for (held, *_), inputs, (after, _) in zip(graphs, both, expected, strict=True):
        for name in HELD:
            assert same(held[name], after[name]) and same(inputs[name], after[name]), name


@pytest.mark.cuda("deferred_state_update", "state_update", "advance")
@pytest.mark.parametrize("batch", [2, 700])
def test_slots_that_the_launch_before_changes_cuda(batch):
    """A launch may look at slots while the one before it, here `advance`, still moves them on."""
    steps = 12
    inputs = many_rows(batch + steps)
    rows = {k: v[:batch] if k in ("slots", *TOKEN) and k != "D" else v for k, v in inputs.items()}
    plain = {k: v for k, v in rows.items() if k not in (*HELD[1:], "period")}

    def run(op, held, replays, launches):
        """Every y of a graph of so many launches, replayed so many times from `rows`."""
        counter = reference.advance_inputs(rows=batch, steps=2 * steps, t=0, alive=1.0)
        counter = {k: v.cuda() for k, v in counter.items()} | {"lengths": held["slots"]}
        counter["remaining"] += 1000
        counter["token"], counter["stop_ids"] = counter["token"].abs(), counter["stop_ids"] * 0 - 1
        graph, ys = torch.cuda.CUDAGraph(), []
        with torch.cuda.graph(graph):
            chain = []
            for _ in range(launches):
                ops.advance(**counter)  # every row's next slot
                chain.append(op(**held))
        for _ in range(replays):
            graph.replay()
            torch.cuda.synchronize()
            ys += [y.clone() for y in chain]
        return ys

    for op, arguments in ((ops.deferred_state_update, rows), (ops.state_update, plain)):
        apart, chained = copied(arguments), copied(arguments)
        expected, ys = run(op, apart, steps, 1), run(op, chained, 1, steps)
        assert torch.equal(apart["slots"], rows["slots"] + steps)
        for t in range(steps):
            assert torch.equal(ys[t], expected[t]), t
        for name in set(HELD) & set(apart):
            assert same(apart[name], chained[name]), name
