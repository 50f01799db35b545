"""Decode steps of so many rows that blocks stay and rows come to them."""

import pytest
import torch
from cases import MANY_ROWS

from reasoners import ops, reference
from reasoners.reference import moved_to, same

PER_SLOT = {"conv_state", "state", "recent", "recent_decay", "pending"}
PER_ROW = {"slots", "lengths", "projected", "dt", "x", "log_decay", "B", "C", "scale", "rng_key"}
TABLE = [
    pytest.param(name, case, marks=pytest.mark.cuda(name), id=f"{name}-{row}")
    for name, cases in MANY_ROWS.items()
    for row, case in cases.items()
]


@pytest.mark.parametrize(("name", "case"), TABLE)
def test_many_rows_cuda(name, case):
    """Right on some rows; all are the same bits among few, and in a second run; the rest stays."""
    operator, (definition, make, mutated) = getattr(ops, name), reference.OPERATORS[name]
    batch, period = case["batch"], case.get("period", 8)
    slots = torch.randperm(batch + 2, generator=torch.Generator().manual_seed(1))[:batch]
    slots[3::7] = -1
    if name not in ("state_update", "mamba1_update"):
        case = {
            "period": period,
            "pending": [(5 * i + i // 7) % period for i in range(batch + 2)],
        } | case
        if not case.get("recent", True):
            del case["pending"]
    inputs = make(slots=slots.tolist(), **case)
    if "lengths" in inputs:
        inputs["lengths"][3::7] = -4
    held = [m for m in mutated if inputs[m] is not None]

    def part(rows, device):
        """The rows alone, each on a slot of its own."""
        few = {k: v[rows] if k in PER_ROW and v is not None else v for k, v in inputs.items()}
        where = slots[rows].clamp(min=0)
        few |= {k: few[k][where] for k in PER_SLOT & set(few) if few[k] is not None}
        own = torch.arange(len(few["slots"]))
        few["slots"] = own.where(few["slots"] >= 0, -1).int()
        return moved_to(device, few)

    after = moved_to("cuda", inputs)
    y = operator(**after)
    kept = {m: after[m].cpu() for m in held}

    def got(rows):
        """y and, of rows that are no padding, what they hold."""
        live = slots[rows] >= 0
        return live, [y[rows].cpu(), *(kept[m][slots[rows][live]] for m in held)]

    rows = torch.tensor([0, 3, 9, batch // 2, batch - 3, batch - 2, batch - 1])
    live, actual = got(rows)
    few = part(rows, "cpu")
    wide = {k: reference.widen(v) for k, v in few.items()}
    (oracle, *wide_held), (plain, *few_held) = (
        [v for v in definition(**k) if v is not None] for k in (wide, few)
    )
    oracle = [oracle, *(v[live] for v in wide_held)]
    plain = [plain, *(v[live] for v in few_held)]
    for i, results in enumerate(zip(actual, oracle, plain, strict=True)):
        reference.assert_close(*results, f"{name}, result {i}")
    for rows in torch.arange(batch).split(8):
        alone = part(rows, "cuda")
        out = operator(**alone)
        live, actual = got(rows)
        assert torch.equal(out.cpu(), actual[0])
        assert all(same(alone[m].cpu()[live], a) for m, a in zip(held, actual[1:], strict=True))
    others = sorted({*range(batch + 2)} - {*slots.tolist()})
    assert all(same(kept[m][others], inputs[m][others]) for m in held)
    again = moved_to("cuda", inputs)
    assert torch.equal(operator(**again), y)
    assert all(same(again[m], after[m]) for m in held)
