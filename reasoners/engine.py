"""Token ids in, token ids out: many samples of many prompts, batched continuously.

A prompt is prefilled once; its samples fork from that state and decode together with everybody
else's. A sample leaves the batch the moment it ends and a waiting one takes its row. Nothing a sample
computes depends on its neighbours: prompts are prefilled in pieces cut at fixed positions, every
kernel treats rows apart, and random numbers are keyed by (seed, prompt, sample, position). On CUDA the
host is a window of steps behind the device: while one runs, it reads the one before, hands out what
ended, and prepares the next, in which rows that ended meanwhile are idle. What is
left to the BLAS library is the order of a matrix product's sums: `Linear` sees to it for MKL on AMD
and for bfloat16; MKL on Intel needs MKL_CBWR=AVX512,STRICT in the environment for float32.
"""

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from reasoners import ops
from reasoners.cache import Cache, CacheFull, bytes_to_hold, to_device
from reasoners.decode import ENDED, MAX_STOP_IDS, DecodeLoop, Drawn, Row
from reasoners.model import HybridLM
from reasoners.sampling import SamplingParams, prompt_key


@dataclass(frozen=True)
class Request:
    """Samples wanted of one prompt.

    prompt: token ids. samples: their indices, which key their random numbers; None for
    range(params.n). tag: anything, returned with each sample.
    """

    prompt: tuple[int, ...]
    params: SamplingParams
    samples: tuple[int, ...] | None = None
    tag: object = None

    def __post_init__(self):
        object.__setattr__(self, "prompt", tuple(self.prompt))
        if self.samples is None:
            object.__setattr__(self, "samples", tuple(range(self.params.n)))


@dataclass
class Sample:
    """One finished sample.

    token_ids: generated, the ending token included. logprobs: one per token when asked for.
    finish_reason: "stop" or "length". start_s, end_s: on time.perf_counter's clock.
    """

    request: Request
    index: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] | None = None
    finish_reason: str = ""
    start_s: float = 0.0
    end_s: float = 0.0


@dataclass
class _Prompt:
    """A request on its way into rows: its slot, how far it is prefilled, the samples still to fork."""

    request: Request
    slot: int
    waiting: deque[int]
    key: int
    logits: Tensor | None = None


@dataclass
class _Row:
    """A sample and the slot that it has.

    stop_ids: tokens that end it. loop_knows: whether the decode loop ends it by itself. last: its first
    token, on the device. on_their_way: tokens that the device may have drawn and the host has not read.
    place: where it was in the loop's last load.
    """

    sample: Sample
    slot: int
    key: int
    stop_ids: tuple[int, ...]
    loop_knows: bool
    last: Tensor | None = None
    on_their_way: int = 0
    place: int | None = None

    @property
    def remaining(self) -> int:
        drawn = len(self.sample.token_ids) + self.on_their_way
        return self.sample.request.params.max_tokens - drawn

    @property
    def rng_name(self) -> tuple[int, int, int]:
        return self.sample.request.params.seed, self.key, self.sample.index


@dataclass
class _Window:
    """What the device draws for some rows in some steps."""

    rows: list[_Row]
    steps: int
    drawn: Drawn


class Engine:
    """Generates for a HybridLM out of one Cache.

    max_rows: samples decoded together; None for 512 on CUDA, or as many as whose states fit, and 64
    elsewhere. max_length: longest prompt plus answer, in tokens.
    max_bytes: of the cache, None for half of the memory that is free now. eos_token_ids: tokens that
    end an answer. ends_with_stop: called with (token_ids, stop strings) for requests that have stop
    strings; true ends the answer. prefill_chunk: prompts are fed in pieces of this many tokens, four
    of them at most in a pass; None for 2048 on CUDA, where a pass costs the host 3 to 10 ms, and 512
    elsewhere.
    look_every: steps of a window, None for 8 on CUDA and 1 elsewhere. ahead: windows that the device is
    ahead of the host, 0 or 1, None for 1 on CUDA and 0 elsewhere.
    """

    def __init__(
        self,
        model: HybridLM,
        *,
        max_rows: int | None = None,
        max_length: int = 2048,
        max_bytes: int | None = None,
        page_size: int = 16,
        eos_token_ids: Iterable[int] = (),
        ends_with_stop: Callable[[Sequence[int], tuple[str, ...]], bool] | None = None,
        prefill_chunk: int | None = None,
        look_every: int | None = None,
        ahead: int | None = None,
        state_dtype: torch.dtype | None = None,
        period: int | None = None,
        stochastic_rounding: bool = False,
        graphs: bool | None = None,
    ):
        cuda = model.device.type == "cuda"
        period = (8 if cuda else 1) if period is None else period
        max_bytes = free_bytes(model.device) // 2 if max_bytes is None else max_bytes
        if max_rows is None:
            page_bytes, slot_bytes = bytes_to_hold(model, page_size, state_dtype, period)
            fit = (max_bytes - page_bytes) // slot_bytes - 1 if slot_bytes else 512
            max_rows = max(1, min(512 if cuda else 64, fit))
        if max_rows < 1:
            raise ValueError(f"Engine: max_rows expected >= 1, got {max_rows}")
        if ahead not in (None, 0, 1):
            raise ValueError(f"Engine: ahead expected 0 or 1, got {ahead}")
        self.model = model
        self.max_rows = max_rows
        self.eos_token_ids = frozenset(eos_token_ids)
        self.ends_with_stop = ends_with_stop
        self.prefill_chunk = (2048 if cuda else 512) if prefill_chunk is None else prefill_chunk
        self.ahead = int(cuda) if ahead is None else ahead
        self.cache = Cache(
            model,
            num_slots=max_rows
            + 1,  # prompts come in as rows get free: one at most waits beside them all
            max_length=max_length,
            max_bytes=max_bytes,
            page_size=page_size,
            state_dtype=state_dtype,
            period=period,
        )
        self.loop = DecodeLoop(
            model,
            self.cache,
            max_rows=max_rows,
            max_steps=(8 if cuda else 1) if look_every is None else look_every,
            graphs=graphs,
            stochastic_rounding=stochastic_rounding,
        )

    def stop_ids(self, params: SamplingParams) -> tuple[int, ...]:
        """Tokens that end an answer drawn with `params`."""
        eos = () if params.ignore_eos else self.eos_token_ids
        return (*sorted(eos), *params.stop_token_ids)

    def require_valid(self, request: Request):
        """Raise ValueError for a request that could never be served, with the numbers."""
        if not request.prompt:
            raise ValueError("Engine: prompt expected at least one token, got none")
        vocab = self.model.config.vocab_size
        wrong = next((t for t in request.prompt if not 0 <= t < vocab), None)
        if wrong is not None:
            raise ValueError(f"Engine: prompt tokens expected in [0, {vocab}), got {wrong}")
        if request.params.stop and self.ends_with_stop is None:
            raise ValueError("Engine: stop strings need an engine with ends_with_stop")
        self.cache.require_fit(len(request.prompt) + request.params.max_tokens)

    def run(
        self,
        requests: Iterable[Request],
        should_stop: Callable[[], bool] = lambda: False,
    ) -> Iterator[Sample | None]:
        """Yield each sample as it finishes, and None after every few steps as a sign of life.

        requests: pulled only as rows come free. should_stop: asked between steps; true drops the
        unfinished samples and returns. Closing the iterator does the same.
        Raises ValueError for a request that can never fit, FloatingPointError if logits hold NaN.
        """
        run = _Run(self, iter(requests))
        try:
            while not should_stop():
                yield from run.admit()
                started = run.decode()
                if run.done:
                    return
                yield from run.collect(self.ahead if started else 0)
                yield None
        finally:
            run.release()


class _Run:
    """The state of one Engine.run: what waits, what is forked, what decodes, what is yet to be read."""

    def __init__(self, engine: Engine, source: Iterator[Request]):
        self.engine, self.cache, self.model = engine, engine.cache, engine.model
        self.source = source
        self.held: deque[Request] = deque()  # pulled, but there was no room yet
        self.exhausted = False
        self.prompts: deque[_Prompt] = deque()
        self.rows: list[_Row] = []
        self.loaded: list[_Row] | None = None  # what the decode loop holds
        self.windows: deque[_Window] = deque()  # not read yet, oldest first

    @property
    def done(self) -> bool:
        return self.exhausted and not (self.held or self.prompts or self.rows or self.windows)

    def release(self):
        for holder in [*self.prompts, *self.rows]:
            self.cache.free(holder.slot)
        self.prompts.clear()
        self.rows.clear()

    def admit(self) -> Iterator[Sample]:
        """Fill free rows with forks of waiting prompts, prefilling more prompts as needed."""
        while len(self.rows) < self.engine.max_rows:
            self._prefill()
            started = self._fork()
            if not started:
                return
            rows = [row for _, row in started]
            self.rows = [*self.rows, *rows]
            self._draw(rows, torch.stack([prompt.logits for prompt, _ in started]))
            if self.engine.ahead:
                return
            yield from self.collect(0)

    def decode(self) -> bool:
        """Start a few steps for every row; false if none of them can need any."""
        loop = self.engine.loop
        steps = min(loop.max_steps, max((row.remaining for row in self.rows), default=0))
        if steps < 1:
            return False
        if self.rows is not self.loaded:
            loop.load(
                [self._loop_row(row) if row.place is None else row.place for row in self.rows]
            )
            for place, row in enumerate(self.rows):
                row.place, row.last = place, None
            self.loaded = self.rows
        self._expect(self.rows, steps, loop.start(steps))
        return True

    def collect(self, keep: int) -> Iterator[Sample]:
        """Read all windows but the latest `keep`, and yield the samples that ended in them."""
        while len(self.windows) > keep:
            window = self.windows.popleft()
            tokens, logprobs = window.drawn.read()
            no_number = bool((tokens == -1).any())
            wanted = any(row.sample.logprobs is not None for row in window.rows)
            tokens = tokens.T.tolist()
            logprobs = logprobs.T.tolist() if wanted else [[]] * len(tokens)
            for row, drawn, scores in zip(window.rows, tokens, logprobs, strict=True):
                row.on_their_way -= window.steps
                if row.sample.finish_reason:
                    continue
                if no_number:
                    self._require_finite(row, drawn)
                self._take(row, drawn, scores)
            yield from self._finish()

    def _expect(self, rows: list[_Row], steps: int, drawn: Drawn):
        for row in rows:
            row.on_their_way += steps
        self.windows.append(_Window(rows, steps, drawn))

    def _loop_row(self, row: _Row) -> Row:
        """The row after its first token."""
        sample = row.sample
        length = len(sample.request.prompt) + 1
        remaining = sample.request.params.max_tokens - 1
        stops = row.stop_ids
        return Row(
            row.slot, row.last, length, remaining, row.rng_name, stops, sample.request.params
        )

    def _next_request(self) -> Request | None:
        if self.held:
            return self.held.popleft()
        if self.exhausted:
            return None
        request = next(self.source, None)
        if request is None:
            self.exhausted = True
        else:
            self.engine.require_valid(request)
        return request

    def _prefill(self):
        """Take in requests until their samples would fill the free rows, and run their prompts."""
        fresh = []
        wanted = self.engine.max_rows - len(self.rows) - sum(len(p.waiting) for p in self.prompts)
        while wanted > 0 and (request := self._next_request()) is not None:
            if not request.samples:
                continue
            try:
                slot = self.cache.allocate(len(request.prompt))
            except CacheFull:
                self.held.appendleft(request)
                break
            key = prompt_key(request.prompt)
            fresh.append(_Prompt(request, slot, deque(request.samples), key))
            self.prompts.append(fresh[-1])
            wanted -= len(request.samples)

        # Pieces end at multiples of the chunk, whoever shares the pass, so that a prompt's states and
        # keys are the same bits in any company.
        chunk = self.engine.prefill_chunk
        for start in range(0, max((len(p.request.prompt) for p in fresh), default=0), chunk):
            part = [p for p in fresh if len(p.request.prompt) > start]
            for group in _groups(part, 4 * chunk, chunk):
                self._feed(group, [p.request.prompt[start : start + chunk] for p in group])

    @torch.inference_mode()
    def _feed(self, prompts: list[_Prompt], pieces: list[tuple[int, ...]]):
        """Run a piece of each prompt."""
        step = self.cache.step([p.slot for p in prompts], [len(piece) for piece in pieces])
        tokens = [token for piece in pieces for token in piece]
        tokens = to_device(tokens, torch.int64, self.model.device)
        logits = self.model.extend(tokens, self.cache, step)
        for prompt, last in zip(prompts, logits, strict=True):
            prompt.logits = last

    def _fork(self) -> list[tuple[_Prompt, _Row]]:
        """Start waiting samples while rows, slots and pages last; returns them with their prompts."""
        started = []
        while self.prompts and len(self.rows) + len(started) < self.engine.max_rows:
            prompt = self.prompts[0]
            request = prompt.request
            capacity = len(request.prompt) + request.params.max_tokens
            last = len(prompt.waiting) == 1
            alone = not self.rows and not started and len(self.prompts) == 1
            try:
                if last:
                    self.cache.grow(prompt.slot, capacity)
                    slot = prompt.slot
                else:
                    slot = self.cache.fork(prompt.slot, capacity)
            except CacheFull:
                if self.rows or started:
                    break
                slot = self._give_way(prompt, alone)
                if slot is None:
                    continue
                last = True
            index = prompt.waiting.popleft()
            logprobs = [] if request.params.logprobs else None
            sample = Sample(request, index, logprobs=logprobs, start_s=time.perf_counter())
            stops = self.engine.stop_ids(request.params)
            loop_knows = not request.params.stop and len(stops) <= MAX_STOP_IDS
            started.append((prompt, _Row(sample, slot, prompt.key, stops, loop_knows)))
            if last:
                self.prompts.popleft()
        return started

    def _give_way(self, prompt: _Prompt, alone: bool) -> int | None:
        """Nothing runs and the first prompt cannot start a sample: prompts hold the memory.

        Send the other prompts back to the queue; if there is none, let the prompt itself become the
        sample and queue its other samples anew. Returns the slot in the second case.
        """
        if not alone:
            while len(self.prompts) > 1:
                other = self.prompts.pop()
                self.cache.free(other.slot)
                self.held.appendleft(_remaining(other))
            return None
        rest = _Prompt(prompt.request, -1, deque(list(prompt.waiting)[1:]), prompt.key)
        if rest.waiting:
            self.held.appendleft(_remaining(rest))
        self.cache.grow(prompt.slot, len(prompt.request.prompt) + prompt.request.params.max_tokens)
        return prompt.slot

    def _draw(self, rows: list[_Row], logits: Tensor):
        """Draw the first token of each of `rows` from its prompt's logits."""
        params = [row.sample.request.params for row in rows]
        keys = [(*row.rng_name, len(row.sample.request.prompt)) for row in rows]

        def each(values, dtype):
            return to_device(list(values), dtype, logits.device)

        tokens, logprobs = ops.sample(
            logits if logits.dtype in (torch.float32, torch.bfloat16) else logits.float(),
            each((p.temperature for p in params), torch.float32),
            each((p.top_k for p in params), torch.int32),
            each((p.top_p for p in params), torch.float32),
            each((p.min_p for p in params), torch.float32),
            each(keys, torch.int64),
        )
        for row, token in zip(rows, tokens.unbind(), strict=True):
            row.last = token
        self._expect(rows, 1, Drawn(tokens[None], logprobs[None]))

    def _require_finite(self, row: _Row, tokens: list[int]):
        if -1 not in tokens:
            return
        sample = row.sample
        raise FloatingPointError(
            f"Engine: logits of sample {sample.index} of a prompt of {len(sample.request.prompt)} tokens "
            f"are not finite after {len(sample.token_ids) + tokens.index(-1)} tokens"
        )

    def _take(self, row: _Row, tokens: list[int], logprobs: list[float]):
        """Give a row its new tokens, up to the one that ends it.

        The decode loop has ended it there too, unless only the host knows why.
        """
        sample = row.sample
        if ENDED in tokens:
            tokens = tokens[: tokens.index(ENDED)]
        pieces = [tokens] if row.loop_knows else [[t] for t in tokens]
        for piece in pieces:
            if not piece:
                return
            if sample.logprobs is not None:
                sample.logprobs += logprobs[: len(piece)]
                logprobs = logprobs[len(piece) :]
            sample.token_ids += piece
            sample.finish_reason = self._finish_reason(row)
            if sample.finish_reason:
                return

    def _finish(self) -> Iterator[Sample]:
        """Let go of the rows that are done, and yield their samples."""
        finished = [row for row in self.rows if row.sample.finish_reason]
        if not finished:
            return
        self.rows = [row for row in self.rows if not row.sample.finish_reason]
        now = time.perf_counter()
        for row in finished:
            row.sample.end_s = now
            self.cache.free(row.slot)
        yield from (row.sample for row in finished)

    def _finish_reason(self, row: _Row) -> str:
        sample, params = row.sample, row.sample.request.params
        if sample.token_ids[-1] in row.stop_ids:
            return "stop"
        if params.stop and self.engine.ends_with_stop(sample.token_ids, params.stop):
            return "stop"
        return "length" if len(sample.token_ids) >= params.max_tokens else ""


def _remaining(prompt: _Prompt) -> Request:
    request = prompt.request
    return Request(request.prompt, request.params, tuple(prompt.waiting), request.tag)


def _groups(prompts: list[_Prompt], max_tokens: int, chunk: int) -> Iterator[list[_Prompt]]:
    """Split into runs whose pieces, of at most `chunk` tokens each, add up to `max_tokens` or less."""
    group, total = [], 0
    for prompt in prompts:
        length = min(len(prompt.request.prompt), chunk)
        if group and total + length > max_tokens:
            yield group
            group, total = [], 0
        group.append(prompt)
        total += length
    if group:
        yield group


def free_bytes(device: torch.device) -> int:
    """Memory that is free now on a device (on the host: available physical memory)."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
