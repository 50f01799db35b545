"""What a model remembers of its sequences: paged keys and values, convolution and scan states.

Attention layers store tokens in pages that sequences may share; recurrent layers store one state per
slot. A sequence is a slot: `allocate` one, feed it through `HybridLM.extend`, `fork` it into samples
that share its full pages, `free` it. Pages for a sequence's whole capacity are taken when it is
allocated or forked, so a running sequence never fails half-way and never has to be evicted; the price
is that a slot holds pages it may not reach.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from reasoners import ops


class CacheFull(RuntimeError):
    """No slot or too few pages are free now; they may be later."""


def to_device(values: Sequence, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers as a tensor on a device, without waiting for what the device has still to do."""
    pinned = torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda")
    return pinned.to(device, non_blocking=True)


# On their way from slots to their forks at a time; on a CPU no more than its caches hold.
COPIED_BYTES = {"cuda": 1 << 28, "cpu": 1 << 22}


def copy_entries(tensor: Tensor, targets: Tensor, sources: Tensor):
    """tensor[targets] = tensor[sources], in parts: no target may be a source further on."""
    part = max(1, COPIED_BYTES[tensor.device.type] // tensor[0].nbytes)
    for to, of in zip(targets.split(part), sources.split(part), strict=True):
        tensor[to] = tensor[of]


@dataclass
class Step:
    """One forward pass over packed tokens: which slots they extend and where they stand.

    slots: (rows) int32; page_table: (rows, max_pages) int32; cu_seqlens: (rows + 1) int32 offsets of
    the rows' tokens; lengths: (rows) int32, of the sequences after this step. decode: every row feeds
    one token, through the single-token kernels. period: scan states are written when a slot has this
    many tokens to fold in. rng_key: (rows, 4) int64, rounds 16-bit states at random; None rounds to
    nearest. shared: (rows, 2) int32, which rows begin with the same pages, as in ops.paged_attention;
    None when that is not to be used. carries: of prompts, a Carry for each of the cache's stacks. A
    negative slot with length 0 is a padding row.
    """

    slots: Tensor
    page_table: Tensor
    cu_seqlens: Tensor
    lengths: Tensor
    decode: bool
    period: int = 1
    rng_key: Tensor | None = None
    shared: Tensor | None = None
    carries: Sequence["Carry"] = ()


@dataclass
class KVPages:
    """Keys and values of one attention layer, each (pages, kv_heads, page_size, head_dim)."""

    k: Tensor
    v: Tensor


@dataclass
class States:
    """State of one recurrent layer, or of several with the same shapes: then all but pending has the
    layer in front.

    conv: (slots, width, channels), the input at position t in entry t % width. scan: (slots, ...).
    recent, recent_decay: the last tokens that scan does not contain yet, or None; pending: (slots) how
    many there are, one tensor for all layers. ops.deferred_state_update says how they are kept.
    stack, place: which of the cache's stacks a layer is in, and where.
    """

    conv: Tensor
    scan: Tensor
    recent: Tensor | None = None
    recent_decay: Tensor | None = None
    pending: Tensor | None = None
    recent_dims: tuple[int, int] = (0, 0)  # of a recent token's x and B
    stack: int = 0
    place: int = 0

    def slot_tensors(self) -> list[Tensor]:
        """What belongs to this layer's slots, the slot first."""
        own = (self.conv, self.scan, self.recent, self.recent_decay)
        return [tensor for tensor in own if tensor is not None]

    def mixer_states(self) -> tuple:
        """What the single-token mixers take first: conv, scan and the recent tokens."""
        return self.conv, self.scan, self.recent, self.recent_decay, self.pending

    @cached_property
    def first_slots(self) -> Tensor:
        """Of several layers, (layers, 1) int64: where each begins if their slots follow each other."""
        layers, num_slots = self.conv.shape[:2]
        return torch.arange(0, layers * num_slots, num_slots, device=self.conv.device)[:, None]

    def places(self, slots: Tensor) -> Tensor:
        """Of several layers, (layers * slots) int64: where all of them have these slots."""
        return (self.first_slots + slots).flatten()

    def layer(self, place: int) -> "States":
        """Of several layers, one."""
        own = (self.conv, self.scan, self.recent, self.recent_decay)
        own = (None if tensor is None else tensor[place] for tensor in own)
        return States(*own, self.pending, self.recent_dims, self.stack, place)


# More of them would cost a device more to put together than they spare in launches.
CARRIED_BYTES = 1 << 24


class Carry:
    """The states of some slots on their way between a cache and the layers that feed them prompts.

    stack: States of several layers, which come in turn. Those of the next few are gathered before the
    first of them and scattered after the last, as many as CARRIED_BYTES hold.
    slots: (rows) int64. before, after: (rows, width - 1) int64, where the first layer's rings, one after
    the other, have the inputs before the prompts, oldest first, and take the last ones; before is None
    if no slot has any, and then nothing is gathered.
    """

    def __init__(self, stack: States, slots: Tensor, before: Tensor | None, after: Tensor):
        self.stack = stack
        self.slots = stack.first_slots + slots  # (layers, rows), and so are the rings' entries
        first, width = stack.first_slots[:, :, None], stack.conv.shape[2]
        self.before = None if before is None else torch.add(before, first, alpha=width)
        self.after = torch.add(after, first, alpha=width)
        self.wide = ops.wide_dtype(stack.conv.dtype)
        layer_bytes = len(slots) * stack.scan[0, 0].numel() * self.wide.itemsize
        self.together = max(1, CARRIED_BYTES // layer_bytes)
        self._gathered = None
        self._left: list[tuple[Tensor, Tensor]] = []

    def begin(self, place: int) -> tuple[Tensor | None, Tensor | None]:
        """Past inputs (rows, width - 1, channels) and scan states (rows, ...), wide; None means zeros."""
        if self.before is None:
            return None, None
        i = place % self.together
        if i == 0:
            part = slice(place, place + self.together)
            past = self.stack.conv.flatten(0, 2)[self.before[part]]
            self._gathered = past, self.stack.scan.flatten(0, 1)[self.slots[part]].to(self.wide)
        past, initial = self._gathered
        return past[i], initial[i]

    def end(self, place: int, last_inputs: Tensor, final: Tensor):
        """The same after the prompts."""
        self._left.append((last_inputs, final))
        end = place + 1
        if end % self.together and end < len(self.slots):
            return
        part = slice(end - len(self._left), end)
        last_inputs, final = (
            torch.stack(left) if len(left) > 1 else left[0][None] for left in zip(*self._left)
        )
        self.stack.conv.flatten(0, 2)[self.after[part]] = last_inputs
        self.stack.scan.flatten(0, 1)[self.slots[part]] = final.to(self.stack.scan.dtype)
        self._left.clear()
        self._gathered = None


def _recent_dims(shape: dict) -> tuple[int, int]:
    """Values of x and of B that a recent token has, from a mixer's cache_shapes."""
    (x_heads, b_groups), (_, head_dim, state_dim) = shape["recent"], shape["scan"]
    return x_heads * head_dim, b_groups * state_dim


def bytes_to_hold(
    model, page_size: int, state_dtype: torch.dtype | None = None, period: int = 1
) -> tuple[int, int]:
    """What a Cache takes for a page, and for a slot, of all layers."""
    dtype = model.embedding.weight.dtype
    wide = ops.wide_dtype(dtype)
    page_bytes = slot_bytes = 0
    for layer in model.layers:
        shape = layer.mixer.cache_shapes()
        if "kv" in shape:
            page_bytes += 2 * page_size * math.prod(shape["kv"]) * dtype.itemsize
            continue
        slot_bytes += math.prod(shape["conv"]) * dtype.itemsize
        slot_bytes += math.prod(shape["scan"]) * (state_dtype or wide).itemsize
        if period > 1 and "recent" in shape:
            token_bytes = sum(_recent_dims(shape)) * dtype.itemsize
            slot_bytes += (period - 1) * (token_bytes + 2 * shape["scan"][0] * wide.itemsize)
    return page_bytes, slot_bytes


class Cache:
    """Slots and pages for the sequences of one model.

    model: anything with `.config` and `.layers[i].mixer.cache_shapes()`, a HybridLM.
    num_slots: sequences that can be alive at once. max_length: longest sequence, in tokens.
    num_pages: pages per attention layer, None for as many as all slots can use. max_bytes: upper bound
    of the memory, which limits num_pages. state_dtype: of the scan states; float32 unless the model
    computes in float64. period: decode steps from one write of a scan state to the next, see
    ops.deferred_state_update; 1 writes at every step and keeps no recent tokens, as models do that
    cannot keep any.
    """

    def __init__(
        self,
        model,
        *,
        num_slots: int,
        max_length: int,
        num_pages: int | None = None,
        max_bytes: int | None = None,
        page_size: int = 16,
        state_dtype: torch.dtype | None = None,
        period: int = 1,
    ):
        for name, value in (
            ("num_slots", num_slots),
            ("max_length", max_length),
            ("page_size", page_size),
            ("period", period),
        ):
            if value < 1:
                raise ValueError(f"Cache: {name} expected >= 1, got {value}")
        weight = model.embedding.weight
        dtype, device = weight.dtype, weight.device
        wide = ops.wide_dtype(dtype)
        state_dtype = state_dtype or wide
        self.num_slots, self.max_length, self.page_size = num_slots, max_length, page_size
        self.paged = any(kind == "attention" for kind in model.config.mixers)
        max_pages = -(-max_length // page_size) if self.paged else 0
        shapes = [layer.mixer.cache_shapes() for layer in model.layers]
        self.period = period if any("recent" in shape for shape in shapes) else 1
        page_bytes, state_bytes = bytes_to_hold(model, page_size, state_dtype, period)
        most = num_slots * max_pages
        if max_bytes is not None:
            most = min(most, (max_bytes - num_slots * state_bytes) // max(page_bytes, 1))
            if most < (1 if self.paged else 0):
                raise ValueError(
                    f"Cache: max_bytes expected at least {num_slots * state_bytes + page_bytes} for "
                    f"{num_slots} slots and one page, got {max_bytes}"
                )
        self.num_pages = most if num_pages is None or not self.paged else num_pages

        def zeros(*shape, dtype=dtype):
            return torch.zeros(shape, dtype=dtype, device=device)

        self.pending = zeros(num_slots, dtype=torch.int32)
        self.layers: list[KVPages | States] = [None] * len(shapes)
        # Layers of the same shapes lie in one tensor, the layer in front, so that what is done to all
        # of them is done at once.
        self.stacks: list[States] = []
        self._pages_of_layers: list[Tensor] = []  # (2 * layers * pages, ...), keys and values
        for shape in {tuple(shape.items()): shape for shape in shapes}.values():
            places = [i for i, other in enumerate(shapes) if other == shape]
            if "kv" in shape:
                kv_heads, head_dim = shape["kv"]
                pages = zeros(2, len(places), self.num_pages, kv_heads, page_size, head_dim)
                self._pages_of_layers.append(pages.flatten(0, 2))
                layers = (KVPages(k, v) for k, v in zip(*pages, strict=True))
            else:
                lead = (len(places), num_slots)
                stack = States(
                    conv=zeros(*lead, *shape["conv"]),
                    scan=zeros(*lead, *shape["scan"], dtype=state_dtype),
                    stack=len(self.stacks),
                )
                if period > 1 and "recent" in shape:
                    lead, heads = (*lead, period - 1), shape["scan"][0]
                    dims = _recent_dims(shape)
                    stack.recent = zeros(*lead, sum(dims))
                    stack.recent_decay = zeros(*lead, 2, heads, dtype=wide)
                    stack.pending = self.pending
                    stack.recent_dims = dims
                self.stacks.append(stack)
                layers = (stack.layer(i) for i in range(len(places)))
            for place, layer in zip(places, layers, strict=True):
                self.layers[place] = layer

        # As of the last `apply`, like the states.
        self.page_table = torch.full((num_slots, max_pages), -1, dtype=torch.int32, device=device)
        self.lengths = [0] * num_slots
        self._pages: dict[int, list[int]] = {}  # alive slots
        self._owners = [0] * self.num_pages
        self._free_slots = list(range(num_slots))[::-1]
        self._free_pages = list(range(self.num_pages))[::-1]
        # What forks and allocations have yet to do on the device, done together by `apply`.
        self._fresh: set[int] = set()
        self._copies: dict[int, int] = {}  # child -> parent
        self._copied: set[int] = set()  # those parents
        self._page_copies: list[tuple[int, int]] = []  # (target, source)
        self._repaged: set[int] = set()  # slots that have other pages than the page table says

    def num_bytes(self) -> int:
        """Bytes of all pages and states."""
        states = (t for stack in self.stacks for t in stack.slot_tensors())
        return sum(t.nbytes for t in (*states, *self._pages_of_layers))

    @property
    def num_free_slots(self) -> int:
        """Slots that can be allocated now."""
        return len(self._free_slots)

    @property
    def num_free_pages(self) -> int:
        """Pages that can be taken now."""
        return len(self._free_pages)

    def pages_for(self, length: int) -> int:
        """Pages that hold `length` tokens."""
        return -(-length // self.page_size) if self.paged else 0

    def require_fit(self, length: int):
        """Raise ValueError if a sequence of `length` tokens could never be held."""
        if length > self.max_length:
            raise ValueError(
                f"Cache: sequence expected at most max_length = {self.max_length} tokens, got {length}"
            )
        if self.pages_for(length) > self.num_pages:
            raise ValueError(
                f"Cache: a sequence of {length} tokens needs {self.pages_for(length)} pages of "
                f"{self.page_size}, the cache has {self.num_pages}"
            )

    def allocate(self, capacity: int) -> int:
        """A new empty sequence with room for `capacity` tokens; returns its slot.

        Raises CacheFull when it does not fit now, ValueError when it never will.
        """
        self.require_fit(capacity)
        slot = self._take(self.pages_for(capacity))
        self._fresh.add(slot)
        return slot

    def fork(self, slot: int, capacity: int) -> int:
        """A copy of `slot` with room for `capacity` tokens in all; returns the new slot.

        Full pages are shared, the last partial page and the states are copied. Neither sequence sees
        what the other appends.
        """
        self.require_fit(capacity)
        length, parent = self.lengths[slot], self._pages[slot]
        if capacity < length:
            raise ValueError(
                f"Cache: fork of {length} tokens expected at least that, got {capacity}"
            )
        shared = parent[: length // self.page_size] if self.paged else []
        child = self._take(self.pages_for(capacity) - len(shared), shared)
        self.lengths[child] = length
        self._copies[child] = self._copies.get(slot, slot)
        self._copied.add(self._copies[child])
        if self.paged and length % self.page_size:
            if slot in self._copies:
                self.apply()  # the source page is itself still to be copied
            self._page_copies.append((self._pages[child][len(shared)], parent[len(shared)]))
        return child

    def apply(self):
        """Write the page table, clear the states of allocated slots and copy those of forks, all at once.

        `step` begins with it; whoever reads or feeds the layers without `step` calls it first. It does
        not wait for the device.
        """
        device = self.page_table.device

        def index(values):
            return to_device(list(values), torch.int64, device)

        if self._repaged and self.paged:
            width = self.page_table.shape[1]
            held = (self._pages.get(slot, []) for slot in self._repaged)
            rows = [pages + [-1] * (width - len(pages)) for pages in held]
            self.page_table[index(self._repaged)] = to_device(rows, torch.int32, device)

        if self._fresh:
            slots = index(self._fresh)
            self.pending.index_fill_(0, slots, 0)  # which leaves nothing recent to be read
            for stack in self.stacks:
                places = stack.places(slots)
                for tensor in (stack.conv, stack.scan):
                    tensor.flatten(0, 1).index_fill_(0, places, 0)
        if self._copies:
            targets, sources = index(self._copies), index(self._copies.values())
            self.pending[targets] = self.pending[sources]
            for stack in self.stacks:
                places = stack.places(targets), stack.places(sources)
                for tensor in stack.slot_tensors():
                    copy_entries(tensor.flatten(0, 1), *places)
        if self._page_copies:
            targets, sources = (index(pages) for pages in zip(*self._page_copies, strict=True))
            for pages in self._pages_of_layers:
                first = torch.arange(0, len(pages), self.num_pages, device=device)[:, None]
                copy_entries(pages, (first + targets).flatten(), (first + sources).flatten())
        self._fresh.clear()
        self._copies.clear()
        self._copied.clear()
        self._page_copies.clear()
        self._repaged.clear()

    def settle(self, slots: Sequence[int]):
        """Fold the recent tokens of slots into their scan states."""
        if self.period == 1 or not slots:
            return
        rows = to_device(list(slots), torch.int64, self.page_table.device)
        for stack in self.stacks:
            if stack.recent is not None:
                # A token that adds nothing and forgets nothing, to all layers as if to one.
                layers, _, heads, head_dim, state_dim = stack.scan.shape
                places = stack.places(rows).int()
                x, B = stack.recent.new_zeros(len(places), sum(stack.recent_dims)).split(
                    stack.recent_dims, -1
                )
                x, B = x.unflatten(-1, (-1, head_dim)), B.unflatten(-1, (-1, state_dim))
                keep = stack.recent_decay.new_zeros(len(places), heads)
                state, *recent = (t.flatten(0, 1) for t in stack.slot_tensors()[1:])
                pending = self.pending.repeat(layers)
                ops.deferred_state_update(state, *recent, pending, places, x, keep, B, B)
        self.pending.index_fill_(0, rows, 0)

    def count(self, step: Step):
        """After all layers of a decode step: its tokens are recent ones now, or folded in."""
        if self.period > 1:
            ops.count_pending(self.pending, step.slots, step.period)

    def grow(self, slot: int, capacity: int):
        """Give an existing sequence room for `capacity` tokens in all."""
        self.require_fit(capacity)
        pages = self._pages[slot]
        pages.extend(self._take_pages(self.pages_for(capacity) - len(pages)))
        self._repaged.add(slot)

    def group(self, slots: Sequence[int]) -> tuple[list[int], list[tuple[int, int]]]:
        """Who shares pages with whom: forks of one prompt, as long as two of them are alive.

        Returns (order, shared): the order of `slots` in which sharers are neighbours, and for each of
        them in that order [place of its group's first, tokens in pages of all the group]; a slot that
        shares with no other has [its own place, 0].
        """
        groups: dict[int, list[int]] = {}  # by first page; slots without pages are by themselves
        for i, slot in enumerate(slots):
            pages = self._pages[slot]
            groups.setdefault(pages[0] if pages else -1 - i, []).append(i)
        order, shared = [], []
        for members in groups.values():
            common = self._pages[slots[members[0]]] if len(members) > 1 else []
            for i in members:
                pages = self._pages[slots[i]]
                if pages[: len(common)] != common:
                    same = (a == b for a, b in zip(pages, common))
                    common = common[: next((n for n, ok in enumerate(same) if not ok), len(pages))]
            shared += [(len(order), len(common) * self.page_size)] * len(members)
            order += members
        return order, shared

    def free(self, slot: int):
        """Forget a sequence; pages that no other sequence shares become free."""
        for page in reversed(self._pages.pop(slot)):
            self._owners[page] -= 1
            if self._owners[page] == 0:
                self._free_pages.append(page)
        self.lengths[slot] = 0
        self._fresh.discard(slot)
        self._copies.pop(slot, None)
        self._free_slots.append(slot)

    def step(self, slots: Sequence[int], counts: Sequence[int], *, decode: bool = False) -> Step:
        """The metadata for feeding `counts[i]` tokens to `slots[i]`, whose lengths grow by that.

        decode: take the single-token kernels; every count must be 1. It is said and not inferred:
        a prompt's last piece may be one token long, and must take the same path in any company.
        """
        if decode and any(count != 1 for count in counts):
            raise ValueError(f"Cache: decode expected one token per row, got {list(counts)}")
        starts, lengths, offsets = [], [], [0]
        for slot, count in zip(slots, counts, strict=True):
            start = self.lengths[slot]
            room = len(self._pages[slot]) * self.page_size if self.paged else self.max_length
            if start + count > room:
                raise ValueError(
                    f"Cache: slot {slot} has room for {room} tokens, got {start} + {count}"
                )
            starts.append(start)
            lengths.append(start + count)
            offsets.append(offsets[-1] + count)
        fresh = not decode and not any(starts)
        if fresh:
            # Their states are written and not read, unless forks of theirs are still to be made.
            self._fresh.difference_update(set(slots) - self._copied)
        self.apply()
        if not decode:
            self.settle([slot for slot, start in zip(slots, starts) if start > 0])
        for slot, length in zip(slots, lengths):
            self.lengths[slot] = length

        def ring(ends, width):  # the width - 1 entries before each end, oldest first
            return [
                slot * width + (end + older) % width
                for slot, end in zip(slots, ends)
                for older in range(1, width)
            ]

        lists = [slots, offsets, lengths]
        for stack in () if decode else self.stacks:
            width = stack.conv.shape[2]
            lists += [[] if fresh else ring(starts, width), ring(lengths, width)]
        # One copy to the device for all of them.
        numbers = to_device(
            [number for values in lists for number in values],
            torch.int64,
            self.page_table.device,
        )
        rows, _, _, *rings = numbers.split([len(values) for values in lists])
        if fresh and self.period > 1:
            self.pending.index_fill_(0, rows, 0)
        carries = [
            Carry(
                stack,
                rows,
                None if fresh else before.view(len(rows), -1),
                after.view(len(rows), -1),
            )
            for stack, before, after in zip(self.stacks, rings[::2], rings[1::2])
        ]
        ints = numbers[: 3 * len(rows) + 1].int()
        slots, cu_seqlens, lengths = ints.split([len(rows), len(rows) + 1, len(rows)])
        return Step(
            slots=slots,
            page_table=self.page_table[rows],
            cu_seqlens=cu_seqlens,
            lengths=lengths,
            decode=decode,
            period=self.period if decode else 1,
            carries=carries,
        )

    def _take(self, num_pages: int, shared: Sequence[int] = ()) -> int:
        if not self._free_slots:
            raise CacheFull(f"Cache: all {self.num_slots} slots are in use")
        pages = self._take_pages(num_pages)
        slot = self._free_slots.pop()
        if slot in self._copied:
            self.apply()  # its last owner's forks have not been copied yet
        for page in shared:
            self._owners[page] += 1
        self._pages[slot] = [*shared, *pages]
        self._repaged.add(slot)
        return slot

    def _take_pages(self, count: int) -> list[int]:
        if count > len(self._free_pages):
            raise CacheFull(f"Cache: {count} pages wanted, {len(self._free_pages)} free")
        pages = [self._free_pages.pop() for _ in range(count)]
        for page in pages:
            self._owners[page] = 1
        return pages
