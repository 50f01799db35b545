"""The decode loop that lives on the device: forward, draw, stop test and bookkeeping of every row.

A step reads and writes buffers only, at fixed places, and never waits for the host. On CUDA it is
captured as a graph for every batch size of a ladder and replayed; elsewhere the same step runs as it
is. The host fills the rows, lets a few steps run, and reads what was drawn. It need not have read it to
fill the rows anew: those that go on have all that they need on the device.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from reasoners import ops
from reasoners.cache import Cache, Step, to_device
from reasoners.model import HybridLM
from reasoners.sampling import SamplingParams

ENDED = -2  # drawn by a row that has nothing to draw; -1 stands for logits that are not finite

# Pages that rows share are read for all of them in pieces of this many tokens, by a launch more in
# each layer. It pays when it spares about as many tokens a step: on an H200 11,520 cost 2 to 5 us a
# layer more than they spare, 130,560 spare 22 (8 heads of 64) to 53 us (8 of 128).
SHARED_PIECE = 64
SHARED_PAYS = 40_000

# Ending tokens that a row may name; the host finds further ones itself, a few steps later.
MAX_STOP_IDS = 8


@dataclass(frozen=True)
class Row:
    """A sequence that begins to decode: its slot, its last token and where it stands.

    last: a token, or a tensor of one on the device. length: tokens including `last`, which is not in the
    cache yet. remaining: tokens to draw. key: (seed, prompt, sample), which name its random numbers.
    stop_ids: tokens that end it.
    """

    slot: int
    last: int | Tensor
    length: int
    remaining: int
    key: tuple[int, int, int]
    stop_ids: tuple[int, ...]
    params: SamplingParams


def ladder(max_rows: int) -> list[int]:
    """The batch sizes that are captured: 1, 2, 4, 8, 16, then ever wider steps up to max_rows."""
    sizes, size = [], 1
    while size < max_rows:
        sizes.append(size)
        size += size if size < 16 else 16 if size < 64 else 32 if size < 256 else 64
    return [*sizes, max_rows]


class Drawn:
    """What some steps drew, on its way to the host."""

    def __init__(self, tokens: Tensor, logprobs: Tensor, places: Sequence[int] | None = None):
        self._places = places
        self._parts = [t.to("cpu", non_blocking=True, copy=True) for t in (tokens, logprobs)]
        self._there = torch.cuda.Event() if tokens.is_cuda else None
        if self._there is not None:
            self._there.record()

    def read(self) -> tuple[Tensor, Tensor]:
        """Wait for it: (steps, rows) tokens and logprobs, rows in the order in which they were loaded."""
        if self._there is not None:
            self._there.synchronize()
        if self._places is None:
            return tuple(self._parts)
        return tuple(part[:, self._places] for part in self._parts)


class DecodeLoop:
    """Runs decode steps of up to max_rows rows.

    max_steps: most steps of one `run`. graphs: capture and replay CUDA graphs; None means on CUDA.
    stochastic_rounding: round 16-bit scan states at random, unbiased, instead of to nearest.
    """

    def __init__(
        self,
        model: HybridLM,
        cache: Cache,
        *,
        max_rows: int,
        max_steps: int = 1,
        graphs: bool | None = None,
        stochastic_rounding: bool = False,
    ):
        self.model, self.cache = model, cache
        self.max_rows, self.max_steps = max_rows, max_steps
        self.stochastic_rounding = stochastic_rounding
        device = model.device
        cuda = device.type == "cuda"
        if stochastic_rounding and "mamba1" in model.config.mixers:
            raise NotImplementedError(
                "DecodeLoop: stochastic_rounding expected mamba2 mixers, got mamba1"
            )
        if graphs and not cuda:
            raise ValueError(f"DecodeLoop: graphs expected a CUDA model, got one on {device}")
        self.graphs = {} if (cuda if graphs is None else graphs) else None
        self._pool = None

        self.rows = _Buffers(device, max_rows)
        pages = cache.page_table.shape[1]
        self.page_table = torch.zeros(max_rows, pages, dtype=torch.int32, device=device)
        self.cu_seqlens = torch.arange(max_rows + 1, dtype=torch.int32, device=device)
        self.drawn = torch.zeros(max_steps, max_rows, dtype=torch.int64, device=device)
        self.logprobs = torch.zeros(max_steps, max_rows, dtype=torch.float32, device=device)
        self.steps_done = torch.zeros(1, dtype=torch.int32, device=device)
        self.num_rows = 0
        self.kind = (0, False)  # of the step: its rows with padding rows, whether rows share pages
        self._places: list[int] = []  # of the rows in the order they came
        self._slots: list[int] = []  # in that order

    def capture(self):
        """Capture every size of the ladder now, so that no later step has to."""
        for size in reversed(ladder(self.max_rows)):
            for grouped in (False, True) if self.cache.paged and size > 1 else (False,):
                self._require_graph((size, grouped))

    def load(self, rows: Sequence[Row | int]):
        """Take these rows from now on. Copies of forked slots are carried out first.

        A number is a row of the last load, by its place in that: it goes on from where it is, or stays
        ended. Rows that share pages become neighbours, if reading those once pays; that moves no token.
        """
        self.cache.apply()
        self.num_rows = len(rows)
        slots = [self._slots[row] if isinstance(row, int) else row.slot for row in rows]
        order, shared = self.cache.group(slots)
        spared = sum(
            tokens // SHARED_PIECE for i, (first, tokens) in enumerate(shared) if first < i
        )
        grouped = spared * SHARED_PIECE >= SHARED_PAYS
        old_places, self._slots = self._places, slots
        self._places = sorted(range(len(order)), key=order.__getitem__)
        sizes = ladder(self.max_rows) if self.graphs is not None else [self.num_rows]
        size = next(size for size in sizes if size >= self.num_rows)
        self.kind = (size, grouped)
        self._require_graph(self.kind)
        source, fresh = [-1] * self.max_rows, []
        for row, place in zip(rows, self._places, strict=True):
            if isinstance(row, int):
                source[place] = old_places[row]
            else:
                fresh.append((place, row))
        self.rows.take(fresh, shared, source)
        held = self.rows.slots[:size].clamp(min=0).long()
        self.page_table[:size] = self.cache.page_table[held]

    def run(self, steps: int) -> tuple[Tensor, Tensor]:
        """Draw up to `steps` tokens for every row; (steps, rows) tokens and logprobs on the host.

        A row that ended earlier has ENDED in the steps that were left.
        """
        return self.start(steps).read()

    def start(self, steps: int) -> Drawn:
        """`run` without waiting for what it draws."""
        if not 1 <= steps <= self.max_steps:
            raise ValueError(f"DecodeLoop: steps expected 1 to {self.max_steps}, got {steps}")
        self.steps_done.zero_()
        for _ in range(steps):
            if self.graphs is None:
                self._step(*self.kind)
            else:
                self.graphs[self.kind].replay()
        part = (slice(steps), slice(self.num_rows))
        return Drawn(self.drawn[part], self.logprobs[part], self._places)

    @torch.inference_mode()
    def _step(self, size: int, grouped: bool):
        rows = self.rows.first(size)
        step = Step(
            slots=rows.slots,
            page_table=self.page_table[:size],
            cu_seqlens=self.cu_seqlens[: size + 1],
            lengths=rows.lengths,
            decode=True,
            period=self.cache.period,
            rng_key=rows.rng_key if self.stochastic_rounding else None,
            shared=rows.shared if grouped else None,
        )
        logits = self.model.extend(rows.last, self.cache, step)
        if logits.dtype not in (torch.float32, torch.bfloat16):
            logits = logits.float()
        token, logprob = ops.sample(
            logits, rows.temperature, rows.top_k, rows.top_p, rows.min_p, rows.rng_key
        )
        ops.advance(
            token, logprob, rows.stop_ids, rows.last, rows.slots, rows.lengths,
            rows.remaining, rows.rng_key, self.drawn, self.logprobs, self.steps_done,
        )  # fmt: skip

    def _require_graph(self, kind: tuple[int, bool]):
        if self.graphs is None or kind in self.graphs:
            return
        # Padding rows only: the warm-up and the capture change no sequence.
        rows = self.rows.clone()
        self.rows.take([], [], [-1] * self.max_rows)
        self.steps_done.zero_()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._step(*kind)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            self._step(*kind)
        self._pool = self._pool or graph.pool()
        self.graphs[kind] = graph
        self.rows.copy_(rows)


class _Buffers:
    """What a step knows of its rows, as views of two flat tensors; first(n) is the same of n rows."""

    INTS = ("slots", "lengths", "remaining", "top_k")
    FLOATS = ("temperature", "top_p", "min_p")

    def __init__(self, device: torch.device, max_rows: int, pinned: bool = False):
        # One block of 32-bit and one of 64-bit words, so that the host fills all rows by two copies.
        count, longs = len(self.INTS) + len(self.FLOATS), 4 + 1 + 1 + MAX_STOP_IDS
        settings = {"device": device, "pin_memory": pinned}
        self.words = torch.zeros(count, max_rows, dtype=torch.int32, **settings)
        self.longs = torch.zeros(longs * max_rows, dtype=torch.int64, **settings)
        for name, words in zip(self.INTS + self.FLOATS, self.words, strict=True):
            setattr(self, name, words if name in self.INTS else words.view(torch.float32))
        sizes = (4 * max_rows, max_rows, max_rows, MAX_STOP_IDS * max_rows)
        keys, self.last, pairs, stops = self.longs.split(sizes)
        self.rng_key = keys.view(max_rows, 4)
        self.shared = pairs.view(torch.int32).view(max_rows, 2)
        self.stop_ids = stops.view(max_rows, MAX_STOP_IDS)

    def first(self, count: int) -> "_Buffers":
        part = object.__new__(_Buffers)
        for name in (*self.INTS, *self.FLOATS, "rng_key", "last", "shared", "stop_ids"):
            setattr(part, name, getattr(self, name)[:count])
        return part

    def copy_(self, other: "_Buffers"):
        self.words.copy_(other.words, non_blocking=True)
        self.longs.copy_(other.longs, non_blocking=True)

    def clone(self) -> "_Buffers":
        same = _Buffers(self.words.device, len(self.last))
        same.copy_(self)
        return same

    def take(
        self,
        fresh: Sequence[tuple[int, Row]],
        shared: Sequence[tuple[int, int]],
        source: Sequence[int],
    ):
        """Set rows: `fresh` ones with their places, and in place i what was in place source[i].

        Padding rows are where source is negative and nothing fresh. shared: of the first rows.
        """
        device, max_rows = self.words.device, len(self.last)
        host = _Buffers(torch.device("cpu"), max_rows, pinned=device.type == "cuda")
        host.fill(fresh, shared)
        new = host
        if device.type == "cuda":
            new = _Buffers(device, max_rows)
            new.copy_(host)
        on_device = [(place, row.last) for place, row in fresh if isinstance(row.last, Tensor)]
        if on_device:
            places, tokens = zip(*on_device, strict=True)
            new.last[to_device(places, torch.int64, device)] = torch.stack(tokens)
        goes_on = to_device([place >= 0 for place in source], torch.bool, device)
        place = to_device([max(place, 0) for place in source], torch.int64, device)
        self.words.copy_(torch.where(goes_on, self.words[:, place], new.words))
        for name in ("rng_key", "last", "stop_ids"):
            old, put = getattr(self, name), getattr(new, name)
            keep = goes_on if old.dim() == 1 else goes_on[:, None]
            old.copy_(torch.where(keep, old[place], put))
        self.shared.copy_(new.shared)

    def fill(self, rows: Sequence[tuple[int, Row]], shared: Sequence[tuple[int, int]]):
        """Set rows at their places, and what the first rows share; the others are padding."""
        self.slots.fill_(-1)
        self.stop_ids.fill_(-1)
        self.temperature.fill_(1)
        self.top_p.fill_(1)
        self.shared[:, 0] = torch.arange(len(self.shared))
        if shared:
            self.shared[: len(shared)] = torch.tensor(shared, dtype=torch.int32)
        if not rows:
            return
        places = torch.tensor([place for place, _ in rows])
        rows = [row for _, row in rows]
        for name, values in (
            ("slots", [row.slot if row.remaining > 0 else -1 for row in rows]),
            ("lengths", [row.length if row.remaining > 0 else 0 for row in rows]),
            ("remaining", [row.remaining for row in rows]),
            ("top_k", [row.params.top_k for row in rows]),
            ("temperature", [row.params.temperature for row in rows]),
            ("top_p", [row.params.top_p for row in rows]),
            ("min_p", [row.params.min_p for row in rows]),
            ("last", [0 if isinstance(row.last, Tensor) else row.last for row in rows]),
            ("rng_key", [(*row.key, row.length) for row in rows]),
            ("stop_ids", [(row.stop_ids + (-1,) * MAX_STOP_IDS)[:MAX_STOP_IDS] for row in rows]),
        ):
            buffer = getattr(self, name)
            buffer[places] = torch.tensor(values, dtype=buffer.dtype)
