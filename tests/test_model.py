"""Mixers against models.md's equations in float64, and the one model in its three modes of use."""

import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from reasoners.cache import Cache
from reasoners.checkpoint import save_model
from reasoners.model import CONFIGS, HybridLM, Linear, Normed, Rotary, student_config

FAMILIES = ["tiny-llama", "tiny-llamba", "tiny-mamba1", "tiny-mamba2"]


def random_model(name, dtype=torch.float64, seed=0):
    """Random in every parameter, at a scale where activations, decays and gates are all alive."""
    torch.manual_seed(seed)
    model = HybridLM(CONFIGS[name]).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() >= 2 and ".conv." not in key and not key.endswith("A_log"):
                parameter.normal_(std=1 / math.sqrt(parameter.shape[-1]))
            elif ".norm" not in key and not key.startswith("norm"):
                parameter.normal_(std=0.5)
    return model.to(dtype)


# ---- independent implementations, one token after the other, on the tensors of the folder


def convolved(inputs, weight, bias):
    """inputs (l, c), weight (c, 1, 4): causal, depthwise."""
    padded = torch.cat((inputs.new_zeros(3, inputs.shape[1]), inputs))
    return (
        torch.stack([(padded[t : t + 4] * weight[:, 0].T).sum(0) for t in range(len(inputs))])
        + bias
    )


def llamba_mixer(u, w):
    """models.md section 3: 6 heads, P = N = 16."""
    heads, dim, state = 6, 16, 16
    x, B, C, z, a = (u @ w["in_proj.weight"].T).split((96, 96, 96, 96, 6), -1)
    conv = convolved(torch.cat((x, B, C), -1), w["conv1d.weight"], w["conv1d.bias"])
    x, B, C = conv.split(96, -1)
    S, rows = torch.zeros(heads, dim, state, dtype=u.dtype), []
    for t in range(len(u)):
        y = []
        for h in range(heads):
            xt, Bt, Ct = (v[t, 16 * h : 16 * h + 16] for v in (x, B, C))
            S[h] = torch.sigmoid(-a[t, h]) * S[h] + torch.outer(xt, Bt)
            y.append(S[h] @ Ct + w["D"][h] * xt)
        rows.append(torch.cat(y))
    return (torch.stack(rows) * F.silu(z + w["z_bias"])) @ w["out_proj.weight"].T


def mamba2_mixer(u, w):
    """models.md section 5: 6 heads, 2 kv heads, P = N = 16."""
    z, x, B, C, dt = (u @ w["in_proj.weight"].T).split((96, 32, 32, 96, 6), -1)
    conv = F.silu(convolved(torch.cat((x, B, C), -1), w["conv1d.weight"], w["conv1d.bias"]))
    x, B, C = conv.split((32, 32, 96), -1)
    S, rows = torch.zeros(6, 16, 16, dtype=u.dtype), []
    for t in range(len(u)):
        y = []
        for h in range(6):
            kv = 16 * (h // 3)
            xt, Bt, Ct = x[t, kv : kv + 16], B[t, kv : kv + 16], C[t, 16 * h : 16 * h + 16]
            delta = F.softplus(dt[t, h] + w["dt_bias"][h])
            S[h] = torch.exp(-delta * w["A_log"][h].exp()) * S[h] + delta * torch.outer(xt, Bt)
            gated = (S[h] @ Ct + w["D"][h] * xt) * F.silu(z[t, 16 * h : 16 * h + 16])
            y.append(gated / (gated.square().mean() + 1e-5).sqrt())
        rows.append(torch.cat(y))
    return (torch.stack(rows) * w["norm.weight"]) @ w["out_proj.weight"].T


def mamba1_mixer(u, w):
    """models.md section 4: 6 heads over 2 kv heads, chunks of 16 channels, split weights."""
    z, x, B, C, r = (
        u @ w[f"{name}.weight"].T
        for name in ("in_proj_z", "in_proj_x", "B_proj", "C_proj", "dt_proj_down")
    )
    order = [16 * (c // 16 // 3) + c % 16 for c in range(96)]  # each chunk of 16 three times over
    x, B = x[:, order], B[:, order]
    x = F.silu(convolved(x, w["conv1d.weight"], w["conv1d.bias"]))
    delta = F.softplus(r @ w["dt_proj.weight"].T + w["dt_proj.bias"] + w["dt_proj.bias"])
    A = -w["A_log"].exp()
    S, rows = torch.zeros(96, 16, dtype=u.dtype), []
    for t in range(len(u)):
        y = []
        for c in range(96):
            g = 16 * (c // 16)
            S[c] = torch.exp(delta[t, c] * A[c]) * S[c] + delta[t, c] * x[t, c] * B[t, g : g + 16]
            y.append(S[c] @ C[t, g : g + 16] + w["D"][c] * x[t, c])
        rows.append(torch.stack(y))
    return (torch.stack(rows) * F.silu(z)) @ w["out_proj.weight"].T


@pytest.mark.parametrize(
    ("name", "prefix", "mixer"),
    [
        ("tiny-llamba", "backbone.layers.0.mixer.", llamba_mixer),
        ("tiny-mamba1", "model.layers.0.mamba.", mamba1_mixer),
        ("tiny-mamba2", "model.layers.0.mamba.", mamba2_mixer),
    ],
)
def test_mixer_equations(name, prefix, mixer, tmp_path):
    model = random_model(name)
    save_model(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    weights = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    u = torch.randn(37, 96, dtype=torch.float64)
    seen = []
    model.layers[0].mixer.register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
    with torch.no_grad():
        model(torch.randint(0, 256, (1, 37)))
        inputs, outputs = seen[0]
        torch.testing.assert_close(outputs[0], mixer(inputs[0], weights), rtol=1e-9, atol=1e-9)
        model.layers[0].norm1.register_forward_hook(lambda *_: u[None])
        model(torch.randint(0, 256, (1, 37)))
        torch.testing.assert_close(seen[1][1][0], mixer(u, weights), rtol=1e-9, atol=1e-9)


# ---- forward, prefill and decode are one model


def feed(model, cache, slots, pieces, decode=False):
    """Extend `slots` by `pieces` (lists of token ids); logits after each."""
    step = cache.step(slots, [len(piece) for piece in pieces], decode=decode)
    return model.extend(torch.tensor([t for piece in pieces for t in piece]), cache, step)


@pytest.fixture(params=FAMILIES)
def model(request):
    return random_model(request.param)


def test_teacher_forced_decode_equals_forward(model):
    """Prompts of different lengths in one batch, then token by token."""
    torch.manual_seed(2)
    lengths, total = (1, 7, 16, 33), 45
    tokens = torch.randint(0, 256, (4, total))
    with torch.no_grad():
        expected = model(tokens)
    cache = Cache(model, num_slots=4, max_length=total, page_size=8)
    slots = [cache.allocate(total) for _ in lengths]
    logits = feed(model, cache, slots, [tokens[i, :n].tolist() for i, n in enumerate(lengths)])
    for i, n in enumerate(lengths):
        torch.testing.assert_close(logits[i], expected[i, n - 1], rtol=1e-9, atol=1e-9)
    position = list(lengths)
    while alive := [i for i in range(4) if position[i] < total]:  # rows finish one after the other
        one = [[int(tokens[i, position[i]])] for i in alive]
        logits = feed(model, cache, [slots[i] for i in alive], one, decode=True)
        for row, i in enumerate(alive):
            torch.testing.assert_close(logits[row], expected[i, position[i]], rtol=1e-9, atol=1e-9)
            position[i] += 1


@pytest.mark.parametrize("cut", [1, 3, 15, 16, 17, 29])
def test_prefill_split_at_any_point(model, cut):
    tokens = torch.randint(0, 256, (30,)).tolist()
    cache = Cache(model, num_slots=2, max_length=32)
    whole, halves = cache.allocate(32), cache.allocate(32)
    expected = feed(model, cache, [whole], [tokens])
    feed(model, cache, [halves], [tokens[:cut]])
    logits = feed(model, cache, [halves], [tokens[cut:]])
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)


def test_prefill_and_decode_rows_in_one_step(model):
    tokens = torch.randint(0, 256, (2, 20))
    with torch.no_grad():
        expected = model(tokens)
    cache = Cache(model, num_slots=2, max_length=20)
    a, b = cache.allocate(20), cache.allocate(20)
    feed(model, cache, [a], [tokens[0, :19].tolist()])
    logits = feed(model, cache, [a, b], [tokens[0, 19:].tolist(), tokens[1].tolist()])
    torch.testing.assert_close(logits, expected[:, -1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("length", [1, 5, 8, 13])
def test_fork_continues_as_its_own_sequence(model, length):
    prompt = torch.randint(0, 256, (length,)).tolist()
    cache = Cache(model, num_slots=4, max_length=24, page_size=8)
    parent = cache.allocate(length)
    feed(model, cache, [parent], [prompt])
    forks = [cache.fork(parent, 24) for _ in range(3)]
    cache.free(parent)
    tails = torch.randint(0, 256, (3, 6))
    for t in range(6):
        logits = feed(model, cache, forks, tails[:, t : t + 1].tolist(), decode=True)
    with torch.no_grad():
        whole = torch.cat((torch.tensor(prompt).expand(3, -1), tails), 1)
        torch.testing.assert_close(logits, model(whole)[:, -1], rtol=1e-9, atol=1e-9)


def test_packed_documents_equal_separate_ones(model):
    documents = [torch.randint(0, 256, (n,)) for n in (5, 1, 20, 13)]
    cu_seqlens = torch.tensor([0, 5, 6, 26, 39], dtype=torch.int32)
    with torch.no_grad():
        packed = model(torch.cat(documents)[None], cu_seqlens)
        apart = torch.cat([model(d[None]) for d in documents], 1)
    torch.testing.assert_close(packed, apart, rtol=1e-10, atol=1e-10)


def test_gradients_reach_every_parameter(model):
    tokens = torch.randint(0, 256, (2, 21))
    loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", FAMILIES)
def test_lower_precision_stays_near_float64(name, dtype):
    tokens = torch.randint(0, 256, (2, 60))
    with torch.no_grad():
        expected = random_model(name)(tokens)
        got = random_model(name, dtype)(tokens)
    ratio = (got.double() - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert ratio < (1e-4 if dtype == torch.float32 else 1e-1), float(ratio)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_row_is_the_same_bits_in_any_batch(name, dtype):
    """What makes a sample's tokens independent of its neighbours."""
    model = random_model(name, dtype)
    prompts = [torch.randint(0, 256, (n,)).tolist() for n in (3, 21, 40, 9, 1, 17)]

    def logits_of(rows):
        cache = Cache(model, num_slots=len(rows), max_length=44)
        slots = [cache.allocate(44) for _ in rows]
        first = feed(model, cache, slots, [prompts[r] for r in rows])
        return first, feed(model, cache, slots, [[r] for r in rows], decode=True)

    together = logits_of(range(6))
    for row in range(6):
        for alone, shared in zip(logits_of([row]), together, strict=True):
            assert torch.equal(alone[0], shared[row]), f"row {row}"


@torch.no_grad()
@pytest.mark.parametrize("kind", FAMILIES)
def test_a_layer_that_norms_and_adds_in_its_products_is_the_same(kind):
    """What `extend` does for few rows on a GPU, here on the CPU."""
    model = HybridLM(CONFIGS[kind])
    tokens = torch.randint(256, (1, 7))
    this, layer = model.whole_pass(tokens), model.layers[0]
    h = model.embedding(tokens)
    expected = layer(h, this)
    h = h.clone()
    assert layer.mixer(Normed(h, layer.norm1), this, onto=h) is None
    assert layer.mlp(Normed(h, layer.norm2), onto=h) is None
    torch.testing.assert_close(h, expected)


def test_linear_has_gradients_or_the_operator():
    linear = Linear(8, 5, bias=True)
    x = torch.randn(2, 8)
    with torch.no_grad():
        torch.testing.assert_close(linear(x), x @ linear.weight.T + linear.bias)
        assert linear(x[:0]).shape == (0, 5)
    assert linear(x).requires_grad


def test_rotary_scaling_is_llama3():
    """Frequencies of Llama-3.2-1B, worked out by hand for the three bands."""
    inv = Rotary(CONFIGS["llama-3.2-1b"]).inv_freq[torch.device("cpu")].double()
    plain = 500000.0 ** (-torch.arange(0, 64, 2, dtype=torch.float64) / 64)
    wavelength = 2 * math.pi / plain
    short, long = wavelength < 8192 / 4, wavelength > 8192
    assert torch.allclose(inv[short], plain[short], rtol=1e-6)
    assert torch.allclose(inv[long], plain[long] / 32, rtol=1e-6)
    middle = ~short & ~long
    assert int(middle.sum()) >= 1
    smooth = (8192 / wavelength[middle] - 1) / 3
    mixed = (1 - smooth) * plain[middle] / 32 + smooth * plain[middle]
    assert torch.allclose(inv[middle], mixed, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("llama-3.2-1b", 1.236),
        ("llama-3.2-3b", 3.213),
        ("llama-3.1-8b", 8.030),
        ("smollm2-135m", 0.1345),
    ],
)
def test_named_configs_have_the_published_sizes(name, billions):
    with torch.device("meta"):
        model = HybridLM(CONFIGS[name])
    count = sum(p.numel() for p in model.parameters())
    assert round(count / 1e9, 3 if billions > 1 else 4) == billions


def test_state_bytes_are_those_of_the_paper():
    """bf16 scan state per sequence: Llamba-1B 4 MiB, 3B 10.5 MiB, 8B 16 MiB (plus convolution)."""
    for name, mib in (("llamba-1b", 4.0), ("llamba-3b", 10.5), ("llamba-8b", 16.0)):
        with torch.device("meta"):
            model = HybridLM(CONFIGS[name]).to(torch.bfloat16)
            cache = Cache(model, num_slots=1, max_length=8, state_dtype=torch.bfloat16)
        scan = sum(layer.scan.numel() * 2 for layer in cache.layers)
        assert scan == mib * 2**20


@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
def test_a_mixing_matrix_applied_is_what_the_layer_mixes(packed):
    """Of Llamba on x, of attention on v; packed documents do not see each other."""
    torch.manual_seed(3)
    cu_seqlens = torch.tensor([0, 5, 6, 13], dtype=torch.int32) if packed else None
    u = torch.randn(1, 13, 96, dtype=torch.float64)

    llamba = random_model("tiny-llamba")
    mixer, this = llamba.layers[0].mixer, llamba.whole_pass(torch.zeros(1, 13), cu_seqlens)
    with torch.no_grad():
        mixer.in_proj.weight[3 * 96 : 4 * 96] = 0  # z: the gate is silu(z_bias) alone
        matrix = mixer.mixing_matrix(u, this)
        x = mixer.conv(mixer.in_proj(u)[..., : 3 * 96], this)[0][..., :96].unflatten(-1, (6, 16))
        y = torch.einsum("bhij,bjhp->bihp", matrix, x).flatten(-2)
        expected = mixer.out_proj(y * F.silu(mixer.z_bias))
        torch.testing.assert_close(mixer(u, this), expected, rtol=1e-9, atol=1e-9)
    assert torch.equal(matrix, matrix.tril())

    llama = random_model("tiny-llama")
    mixer, this = llama.layers[0].mixer, llama.whole_pass(torch.zeros(1, 13), cu_seqlens)
    with torch.no_grad():
        matrix = mixer.mixing_matrix(u, this)
        v = mixer.qkv_proj(u)[..., -32:].unflatten(-1, (2, 16)).repeat_interleave(3, -2)
        y = torch.einsum("bhij,bjhp->bihp", matrix, v).flatten(-2)
        torch.testing.assert_close(mixer(u, this), mixer.out_proj(y), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(matrix.sum(-1), torch.ones(1, 6, 13, dtype=torch.float64))
    if packed:
        assert matrix[..., 6:, :6].abs().max() == 0


@pytest.mark.parametrize("name", FAMILIES)
def test_recomputed_layers_have_the_same_gradients(name):
    model = random_model(name)
    tokens = torch.randint(256, (1, 17))
    found = []
    for recompute in (False, True):
        model.zero_grad()
        model.hidden(tokens, recompute=recompute).square().sum().backward()
        found.append([p.grad for p in model.parameters()])
    for plain, recomputed in zip(*found):
        assert torch.equal(plain, recomputed)


def test_students_of_published_teachers_have_the_published_shapes():
    for size in ("1b", "3b"):
        teacher = CONFIGS[f"llama-3.2-{size}"]
        assert student_config(teacher, "llamba") == CONFIGS[f"llamba-{size}"]
        for kind, suffix in (("mamba1", ""), ("mamba2", "-mamba2")):
            named = CONFIGS[f"mambainllama-{size}{suffix}"]
            keep = [i for i, mixer in enumerate(named.mixers) if mixer == "attention"]
            assert student_config(teacher, kind, keep) == named


@pytest.mark.parametrize(
    ("kind", "keep", "message"),
    [
        ("llamba", (1,), r"keep expected none for llamba, which has no attention, got \[1\]"),
        ("mamba2", (0, 4, -1), "keep expected layers below 4, got -1, 4"),
        ("mamba3", (), "kind expected llamba, mamba1 or mamba2, got 'mamba3'"),
    ],
)
def test_students_that_cannot_be(kind, keep, message):
    with pytest.raises(ValueError, match=f"student_config: {message}"):
        student_config(CONFIGS["tiny-llama"], kind, keep)
