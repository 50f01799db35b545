import pytest
import torch

from reasoners.cache import COPIED_BYTES, Cache, CacheFull
from reasoners.model import CONFIGS, HybridLM


@pytest.fixture
def hybrid():
    return HybridLM(CONFIGS["tiny-mamba2"]).eval()


def fill(model, cache, slot, count):
    step = cache.step([slot], [count])
    model.extend(torch.arange(count) % 256, cache, step)


def pages_of(cache, slot):
    cache.apply()
    return [p for p in cache.page_table[slot].tolist() if p >= 0]


def test_fork_shares_full_pages_and_copies_the_partial_one(hybrid):
    cache = Cache(hybrid, num_slots=3, max_length=32, page_size=4)
    parent = cache.allocate(10)
    fill(hybrid, cache, parent, 10)
    child = cache.fork(parent, 20)
    assert pages_of(cache, child)[:2] == pages_of(cache, parent)[:2]
    assert pages_of(cache, child)[2] != pages_of(cache, parent)[2]
    cache.apply()
    layer = next(layer for layer in cache.layers if hasattr(layer, "k"))
    own, source = pages_of(cache, child)[2], pages_of(cache, parent)[2]
    assert torch.equal(layer.k[own][:, :2], layer.k[source][:, :2])
    before = layer.k[source].clone()
    fill(hybrid, cache, child, 3)
    assert torch.equal(layer.k[source], before)
    states = cache.layers[0]
    assert not torch.equal(states.scan[child], states.scan[parent])


def test_groups_are_forks_with_the_pages_that_all_of_them_share(hybrid):
    cache = Cache(hybrid, num_slots=8, max_length=32, page_size=4)
    one, two, lone = (cache.allocate(16) for _ in range(3))
    for slot, count in ((one, 10), (two, 3), (lone, 9)):
        fill(hybrid, cache, slot, count)
    forks = [cache.fork(one, 20), cache.fork(one, 20)]
    short = cache.fork(two, 20)  # shares no full page
    slots = [forks[0], lone, one, short, two, forks[1]]
    order, shared = cache.group(slots)
    assert order == [0, 2, 5, 1, 3, 4]
    assert shared == [(0, 8), (0, 8), (0, 8), (3, 0), (4, 0), (5, 0)]
    fill(hybrid, cache, forks[0], 6)
    late = cache.fork(forks[0], 20)  # shares 4 pages with its parent, 2 of them with all
    assert cache.group([forks[0], late]) == ([0, 1], [(0, 16), (0, 16)])
    assert cache.group([late, lone, forks[1], forks[0]]) == (
        [0, 2, 3, 1], [(0, 8), (0, 8), (0, 8), (3, 0)],
    )  # fmt: skip
    assert cache.group([lone]) == ([0], [(0, 0)])
    assert cache.group([]) == ([], [])


def test_everything_comes_back_in_any_order_of_free(hybrid):
    cache = Cache(hybrid, num_slots=4, max_length=32, page_size=4)
    total = cache.num_free_pages
    parent = cache.allocate(9)
    fill(hybrid, cache, parent, 9)
    forks = [cache.fork(parent, 16) for _ in range(3)]
    assert total - cache.num_free_pages == 3 + 3 * 2  # 2 of 4 pages are shared
    for slot in (forks[1], parent, forks[0]):
        cache.free(slot)
    assert total - cache.num_free_pages == 4
    cache.free(forks[2])
    assert (cache.num_free_pages, cache.num_free_slots) == (total, 4)


def test_a_new_sequence_sees_nothing_of_the_last_one(hybrid):
    cache = Cache(hybrid, num_slots=1, max_length=16)
    slot = cache.allocate(16)
    for layer in cache.layers:
        for tensor in (layer.k, layer.v) if hasattr(layer, "k") else layer.slot_tensors():
            tensor.fill_(float("nan"))
    cache.free(slot)
    slot = cache.allocate(16)
    logits = hybrid.extend(torch.arange(5), cache, cache.step([slot], [5]))
    assert logits.isfinite().all()


def test_recent_tokens_of_the_last_sequence_are_not_read():
    model = HybridLM(CONFIGS["tiny-llamba"]).eval()
    cache = Cache(model, num_slots=1, max_length=16, period=8)
    for layer in cache.layers:
        for tensor in layer.slot_tensors():
            tensor.fill_(float("nan"))
    slot = cache.allocate(16)
    for token in range(10):
        step = cache.step([slot], [1], decode=True)
        assert model.extend(torch.tensor([token]), cache, step).isfinite().all()


def test_fork_of_an_empty_sequence_is_empty(hybrid):
    """Although its parent is fed first, where states of the last owner are not cleared."""
    cache = Cache(hybrid, num_slots=2, max_length=16)
    for stack in cache.stacks:
        for tensor in stack.slot_tensors():
            tensor.fill_(float("nan"))
    parent = cache.allocate(16)
    child = cache.fork(parent, 16)
    fill(hybrid, cache, parent, 6)
    for stack in cache.stacks:
        assert not stack.conv[:, child].any() and not stack.scan[:, child].any()


@pytest.mark.parametrize("copied_bytes", [1 << 22, 1])
def test_forks_of_a_freed_parent_whose_slot_a_fork_takes(hybrid, monkeypatch, copied_bytes):
    monkeypatch.setitem(COPIED_BYTES, "cpu", copied_bytes)
    cache = Cache(hybrid, num_slots=4, max_length=16, page_size=4)
    parent, other = cache.allocate(6), cache.allocate(7)
    fill(hybrid, cache, parent, 6)
    fill(hybrid, cache, other, 7)
    tensors = [t for layer in cache.layers if hasattr(layer, "scan") for t in layer.slot_tensors()]
    of_parent, of_other = ([t[slot].clone() for t in tensors] for slot in (parent, other))
    first = cache.fork(parent, 8)
    cache.free(parent)
    taken = cache.fork(other, 8)
    second = cache.fork(taken, 8)
    assert taken == parent
    cache.apply()
    for slot, states in ((first, of_parent), (taken, of_other), (second, of_other)):
        assert all(torch.equal(t[slot], state) for t, state in zip(tensors, states, strict=True))


@pytest.mark.parametrize("name", ["tiny-llamba", "tiny-mamba1", "tiny-mamba2"])
@pytest.mark.parametrize("carried_bytes", [1, 2 * 3 * 6 * 16 * 16 * 4])
def test_states_are_the_same_bits_however_many_layers_are_carried_together(
    name, carried_bytes, monkeypatch
):
    model = HybridLM(CONFIGS[name]).eval()

    def states():
        cache = Cache(model, num_slots=4, max_length=32)
        slots = [cache.allocate(32) for _ in range(4)][1:]
        for fed, counts in ((slots[:2], (1, 7)), (slots, (6, 2, 9)), (slots[1:], (1, 5))):
            step = cache.step(fed, counts)
            model.extend(torch.arange(sum(counts)) % 256, cache, step)
        return [t for stack in cache.stacks for t in (stack.conv, stack.scan)]

    expected = states()
    monkeypatch.setattr("reasoners.cache.CARRIED_BYTES", carried_bytes)
    assert all(torch.equal(a, b) for a, b in zip(states(), expected, strict=True))


def test_a_prompt_beside_an_older_one_gets_the_bits_that_it_gets_alone(hybrid):
    cache = Cache(hybrid, num_slots=3, max_length=32)
    older, alone, beside = (cache.allocate(32) for _ in range(3))
    tokens = torch.arange(9)
    hybrid.extend(tokens[:4], cache, cache.step([older], [4]))
    expected = hybrid.extend(tokens, cache, cache.step([alone], [9]))
    step = cache.step([older, beside], [4, 9])
    logits = hybrid.extend(torch.cat([tokens[:4], tokens]), cache, step)
    assert torch.equal(logits[1:], expected)
    for states in cache.stacks:
        assert torch.equal(states.scan[:, beside], states.scan[:, alone])


def test_full_raises_now_and_works_later(hybrid):
    cache = Cache(hybrid, num_slots=2, num_pages=4, max_length=16, page_size=4)
    first = cache.allocate(12)
    with pytest.raises(CacheFull, match="2 pages wanted, 1 free"):
        cache.allocate(8)
    second = cache.allocate(4)
    with pytest.raises(CacheFull, match="all 2 slots are in use"):
        cache.allocate(4)
    cache.free(first)
    cache.free(second)
    cache.allocate(16)


def test_never_fitting_is_an_error_with_the_numbers(hybrid):
    cache = Cache(hybrid, num_slots=2, num_pages=3, max_length=16, page_size=4)
    with pytest.raises(ValueError, match="at most max_length = 16 tokens, got 17"):
        cache.allocate(17)
    with pytest.raises(ValueError, match="14 tokens needs 4 pages of 4, the cache has 3"):
        cache.allocate(14)


def test_growing_past_the_capacity_is_refused_and_changes_nothing(hybrid):
    cache = Cache(hybrid, num_slots=2, max_length=16, page_size=4)
    slot, other = cache.allocate(5), cache.allocate(5)
    fill(hybrid, cache, slot, 5)
    with pytest.raises(ValueError, match=f"slot {slot} has room for 8 tokens, got 5 \\+ 4"):
        cache.step([other, slot], [1, 4])
    assert (cache.lengths[slot], cache.lengths[other]) == (5, 0)


def test_decode_is_one_token_per_row(hybrid):
    cache = Cache(hybrid, num_slots=2, max_length=16)
    slots = [cache.allocate(5), cache.allocate(5)]
    with pytest.raises(ValueError, match=r"decode expected one token per row, got \[1, 2\]"):
        cache.step(slots, [1, 2], decode=True)


def test_pure_recurrent_models_need_no_pages():
    cache = Cache(HybridLM(CONFIGS["tiny-llamba"]), num_slots=2, max_length=1000)
    slots = [cache.allocate(1000), cache.allocate(900)]
    assert cache.num_pages == 0
    assert cache.page_table.shape == (2, 0)
    assert cache.group(slots) == ([0, 1], [(0, 0), (1, 0)])
    cache.free(slots[0])


def test_max_bytes_bounds_the_memory(hybrid):
    free = Cache(hybrid, num_slots=4, max_length=64)
    tight = Cache(hybrid, num_slots=4, max_length=64, max_bytes=free.num_bytes() - 1)
    assert tight.num_bytes() < free.num_bytes()
    assert tight.num_pages == free.num_pages - 1
    with pytest.raises(ValueError, match="max_bytes expected at least"):
        Cache(hybrid, num_slots=4, max_length=64, max_bytes=1000)
