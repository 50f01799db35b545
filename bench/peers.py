"""Other people's kernels and models, to be timed beside ours; none is a dependency.

They are looked for on sys.path and in the folder that REASONERS_PEERS names (default `.peers`).
`python bench/peers.py` fills it where pip and nvcc are, under the Python and the torch of the machine
that is to measure: it installs the releases of RELEASES into build/peers, compiles for sm_90a what
flashinfer would compile at first use, and copies what is imported and what was compiled, packed, less
than 16 MB. Of flashinfer's prefill it leaves out the kernels that nothing here calls; their symbols stay
unresolved. A machine with the folder needs no network and no compiler.

Their package `__init__`s import much that is not needed here and may not be there, so only single
modules are imported, below stub packages. A peer that is missing, fails or disagrees with ours is
skipped with the reason.
"""

import ctypes
import gc
import importlib
import importlib.machinery
import lzma
import os
import shutil
import subprocess
import sys
import types
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
FOLDER = Path(os.environ.get("REASONERS_PEERS", ROOT / ".peers")).resolve()
RELEASES = {
    "flashinfer-python": "0.6.18",
    "apache-tvm-ffi": "0.1.15.post2",
    "fla-core": "0.6.0",
    "mamba-ssm": "2.3.2.post1",
    "einops": "0.8.2",
}


def _stub(*names):
    """Make packages whose submodules can be imported although their `__init__` never runs."""
    if str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))
    for name in names:
        if name in sys.modules:
            continue
        parent, _, _ = name.rpartition(".")
        path = sys.modules[parent].__path__ if parent else None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is None or spec.submodule_search_locations is None:
            raise ImportError(f"no package {name} on sys.path or in {FOLDER}")
        module = types.ModuleType(name)
        module.__spec__, module.__path__ = spec, list(spec.submodule_search_locations)
        sys.modules[name] = module


@contextmanager
def skip_if_it_fails(theirs=True):
    """Skip the row with the reason if a peer raises anything in here; our own errors pass through."""
    try:
        yield
    except Exception as error:
        if not theirs:
            raise
        import pytest

        lines = str(error).strip().splitlines() or [""]
        pytest.skip(f"absent: {type(error).__name__}: {lines[0][:300]}")


def relative_error(actual, expected):
    """RMS of the difference over the RMS of what was expected."""
    actual, expected = actual.float(), expected.float()
    return float((actual - expected).square().mean().sqrt() / expected.square().mean().sqrt())


def require_close(actual, expected, name="y", most=0.01):
    """Raise AssertionError unless the relative error is at most `most`: 1 % is wide for bfloat16."""
    assert actual.shape == expected.shape, f"{name}: {tuple(actual.shape)}, {tuple(expected.shape)}"
    error = relative_error(actual, expected)
    assert error <= most, f"{name} differs by {error:.2%} (RMS)"


# ---- state update: S = exp(dt A) S + dt x B^T, y = S C + D x


def _tied(inputs):
    """The peers' arguments: one A, dt, D a head (stride 0), x, B and C of every head.

    B and C must have the same groups, so what is shared by heads in only some of x, B, C is repeated
    here, outside the time that is measured.
    """
    state, dt = inputs["state"], inputs["scale"]
    batch, heads = dt.shape
    _, _, head_dim, state_dim = state.shape

    def every(tensor, count=heads):
        return tensor.repeat_interleave(count // tensor.shape[1], 1)

    x, B, C = (inputs[n] for n in ("x", "B", "C"))
    groups = max(B.shape[1], C.shape[1])
    return {
        "state": state[:batch],
        "x": every(x),
        "dt": dt[:, :, None].expand(-1, -1, head_dim),
        "A": inputs["A"][:, None, None].expand(-1, head_dim, state_dim),
        "B": every(B, groups),
        "C": every(C, groups),
        "D": inputs["D"][:, None].expand(-1, head_dim),
    }


def mamba_ssm_state_update():
    """prepare(inputs) -> call() -> y, of mamba_ssm's Triton kernel.

    inputs: ops.state_update's with a positive `scale` as dt, and A (H) where log_decay = scale * A;
    slots must be 0, 1, ... in order. The kernel takes its tied path (TIE_HDIM) if A, dt and dt_bias
    all have stride 0 over P, so that there must be a bias: zeros.
    """
    module = _mamba_ssm("selective_state_update")

    def prepare(inputs):
        tied = _tied(inputs)
        bias = torch.zeros_like(inputs["D"])[:, None].expand_as(tied["D"])
        return lambda: module.selective_state_update(**tied, dt_bias=bias)

    return prepare


@cache
def _flashinfer(name):
    """The module flashinfer.`name`; if it is that of FOLDER, nothing is compiled."""
    os.environ.setdefault("FLASHINFER_LOGGING_LEVEL", "warning")
    _stub("flashinfer", "flashinfer.mamba")
    if Path(sys.modules["flashinfer"].__path__[0]).is_relative_to(FOLDER):
        os.environ.setdefault("FLASHINFER_DISABLE_JIT", "1")
        if torch.cuda.is_available():  # linked on a machine without it, they name no library
            ctypes.CDLL("libcuda.so.1", ctypes.RTLD_GLOBAL)
        for packed in FOLDER.rglob("*.so.xz"):
            library = packed.with_suffix("")
            if not library.exists():
                whole = library.with_suffix(f".{os.getpid()}")
                whole.write_bytes(lzma.decompress(packed.read_bytes()))
                whole.rename(library)  # others may do the same at this moment
    return importlib.import_module(f"flashinfer.{name}")


def flashinfer_state_update():
    """prepare(inputs) -> call() -> y, of flashinfer's kernel; inputs as for mamba_ssm, x bfloat16."""
    module = _flashinfer("mamba.selective_state_update")

    def prepare(inputs):
        tied = _tied(inputs)
        out = torch.empty_like(tied["x"])
        return lambda: module.selective_state_update(**tied, out=out)

    return prepare


STATE_UPDATE = {"mamba_ssm": mamba_ssm_state_update, "flashinfer": flashinfer_state_update}


# ---- paged attention


def _workspace():
    return torch.zeros(256 << 20, dtype=torch.uint8, device="cuda")


def _pages(table, lengths, page_size):
    """(offsets, page ids, tokens in the last page) of rows of a page table."""
    counts = -(-lengths // page_size)
    offsets = F.pad(counts.cumsum(0), (1, 0)).int()
    held = torch.cat([row[:count] for row, count in zip(table, counts.tolist(), strict=True)])
    return offsets, held, (lengths - 1) % page_size + 1


def _kinds(inputs):
    """(heads, kv_heads, head_dim, page_size), and the dtype."""
    _, heads, head_dim = inputs["q"].shape
    _, kv_heads, page_size, _ = inputs["k_cache"].shape
    dtype = inputs["q"].dtype
    return (heads, kv_heads, head_dim, page_size), {"q_data_type": dtype, "kv_data_type": dtype}


def _runs(wrapper, sets):
    return [
        lambda inputs=inputs: wrapper.run(inputs["q"], (inputs["k_cache"], inputs["v_cache"]))
        for inputs in sets
    ]


def flashinfer_decode(tensor_cores):
    """prepare(sets) -> calls() -> y, of flashinfer's decode on the CUDA cores or the tensor cores.

    sets: arguments of ops.paged_attention, one query a row and all of the same lengths. They are
    planned once and read the first one's page table, each in its own caches.
    """
    module = _flashinfer("decode")

    def prepare(sets):
        sizes, dtypes = _kinds(sets[0])
        pages = _pages(sets[0]["page_table"], sets[0]["kv_lengths"], sizes[-1])
        wrapper = module.BatchDecodeWithPagedKVCacheWrapper(
            _workspace(), "HND", use_tensor_cores=tensor_cores
        )
        wrapper.plan(*pages, *sizes, **dtypes)
        return _runs(wrapper, sets)

    return prepare


def flashinfer_cascade(backend):
    """The same of rows that all share a prefix, which is read once. backend: "fa2" or "fa3"."""
    module = _flashinfer("cascade")

    def prepare(sets):
        sizes, dtypes = _kinds(sets[0])
        page_size = sizes[-1]
        table, lengths = sets[0]["page_table"], sets[0]["kv_lengths"]
        rows, prefix = len(lengths), int(sets[0]["shared"][0, 1])
        first = _pages(table[:1], lengths.new_tensor([prefix]), page_size)
        own = _pages(table[:, prefix // page_size :], lengths - prefix, page_size)
        queries = [lengths.new_tensor([0, rows]), sets[0]["cu_seqlens_q"]]
        wrapper = module.MultiLevelCascadeAttentionWrapper(2, _workspace(), "HND")
        for level in wrapper._batch_prefill_wrappers:
            level._backend = backend  # the constructor has no argument for it
        wrapper.plan(queries, *(list(pair) for pair in zip(first, own)), *sizes, **dtypes)
        return _runs(wrapper, sets)

    return prepare


DECODE = {  # the better of the first two is to be quoted; the last two are for rows with a prefix
    "flashinfer": lambda: flashinfer_decode(False),
    "flashinfer-tc": lambda: flashinfer_decode(True),
    "cascade-fa2": lambda: flashinfer_cascade("fa2"),
    "cascade-fa3": lambda: flashinfer_cascade("fa3"),
}


# ---- sampling


def flashinfer_sample(from_logits):
    """prepare(logits, temperature, top_k, top_p, min_p) -> call() -> tokens, or NotImplementedError.

    from_logits: by their functions that take logits, where there are any; else by those that take
    probabilities, behind their softmax. All three filters are a chain of renormalisations, as engines
    write it. Unlike ours they return no logprob.
    """
    module = _flashinfer("sampling")
    # Without these the host would read the generator's state, which a graph cannot capture.
    draw = {"seed": 1, "offset": 0}

    def prepare(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
        filters = "".join(c for c, on in zip("kpm", (top_k > 0, top_p < 1, min_p > 0)) if on)
        if temperature == 0:
            raise NotImplementedError("no greedy sampling")

        def scaled():
            return logits if temperature == 1 else logits / temperature

        def probabilities():
            return module.softmax(logits, temperature)

        if from_logits:
            fused = module.top_k_top_p_sampling_from_logits
            ways = {
                "": lambda: module.sampling_from_logits(scaled(), **draw),
                "k": lambda: fused(scaled(), top_k, 1.0, **draw),
                "kp": lambda: fused(scaled(), top_k, top_p, **draw),
            }
        else:
            fused = module.top_k_top_p_sampling_from_probs
            ways = {
                "": lambda: module.sampling_from_probs(probabilities(), **draw),
                "k": lambda: module.top_k_sampling_from_probs(probabilities(), top_k, **draw),
                "p": lambda: module.top_p_sampling_from_probs(probabilities(), top_p, **draw),
                "m": lambda: module.min_p_sampling_from_probs(probabilities(), min_p, **draw),
                "kp": lambda: fused(probabilities(), top_k, top_p, **draw),
                "kpm": lambda: module.min_p_sampling_from_probs(
                    module.top_p_renorm_probs(
                        module.top_k_renorm_probs(probabilities(), top_k), top_p
                    ),
                    min_p,
                    **draw,
                ),
            }
        if filters not in ways:
            raise NotImplementedError("no such mix")
        return ways[filters]

    return prepare


SAMPLE = {
    "flashinfer": lambda: flashinfer_sample(False),
    "flashinfer-logits": lambda: flashinfer_sample(True),
}


# ---- the chunked scan


@cache
def _share_compiling():
    """Under `pytest -n`: Triton's kernels are compiled but not tuned, by each process in its own order.

    All tune the same kernels, and in the same order each would compile, or wait for, the same one.
    """
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker is None:
        return
    from triton.runtime.autotuner import Autotuner

    first, ordered = int(worker.removeprefix("gw")), Autotuner.prune_configs

    def prune_configs(self, kwargs):
        configs = ordered(self, kwargs)
        turn = first % len(configs)
        return [*configs[turn:], *configs[:turn]]

    def do_bench(kernel_call, quantiles):
        kernel_call()
        return [0.0] * len(quantiles)

    Autotuner.prune_configs, Autotuner.do_bench = prune_configs, staticmethod(do_bench)


def _mamba_ssm(name):
    _share_compiling()
    _stub("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton", "mamba_ssm.utils")
    return importlib.import_module(f"mamba_ssm.ops.triton.{name}")


def _fla(name):
    # What is tuned is not remembered on disk: a first run may have had company on the device.
    os.environ.setdefault("FLA_CACHE_RESULTS", "0")
    _share_compiling()
    _stub("fla", "fla.ops", "fla.ops.simple_gla", "fla.modules", "fla.modules.causal_conv1d")
    sys.modules["fla"].__version__ = RELEASES["fla-core"]
    return importlib.import_module(f"fla.{name}")


def mamba_ssm_scan(chunk):
    """prepare(x, log_decay, B, C, D) -> call() -> y, of mamba_ssm's Triton kernels.

    Their step sizes weigh x too: they get -log_decay as dt and A = -1, the same work as ours, and
    y is that of ours with scale = -log_decay.
    """
    module = _mamba_ssm("ssd_combined")

    def prepare(x, log_decay, B, C, D):
        dt, A = -log_decay, -torch.ones_like(D)
        return lambda: module.mamba_chunk_scan_combined(x, dt, A, B, C, chunk, D)

    return prepare


def mamba_ssm_scan_backward(chunk, forward=False):
    """prepare(dy, x, log_decay, B, C, D) -> call() -> (dx, ddt, dB, dC, dD): what their backward pass
    calls, with forward=True behind their forward pass.

    Called without autograd, which would run it on the stream of the forward pass and out of reach of a
    graph. The work and the bits are the same: of the forward pass it keeps neither states nor C B^T.
    Inputs and outputs as in mamba_ssm_scan.
    """
    module = _mamba_ssm("ssd_combined")

    def prepare(dy, x, log_decay, B, C, D):
        dt, A = -log_decay, -torch.ones_like(D)

        def scan():
            return module.mamba_chunk_scan_combined(x, dt, A, B, C, chunk, D)

        before = None if forward else scan()

        def call():
            out = scan() if forward else before
            dx, ddt, _, dB, dC, dD, *_ = module._mamba_chunk_scan_combined_bwd(
                dy, x, dt, A, B, C, out, chunk, D=D
            )
            return dx, ddt, dB, dC, dD

        return call

    return prepare


def fla_scan():
    """prepare(x, log_decay, B, C) -> call() -> y, of FLA's simple_gla: y without D x."""
    module = _fla("ops.simple_gla.chunk")

    def prepare(x, log_decay, B, C):
        if B.shape[2] != x.shape[2]:
            raise NotImplementedError("simple_gla wants B and C of every head")
        return lambda: module.chunk_simple_gla(C, B, x, log_decay, scale=1.0)[0]

    return prepare


# ---- a whole mixer


def llamba_mixer(chunk):
    """prepare(ops.discrete_mamba2_scan's inputs) -> call() -> out, of FLA's conv, mamba_ssm's scan and
    a gate that torch compiles.

    As in mamba_ssm_scan, the scan weighs x by softplus(a). Llamba would have to divide x by it first.
    """
    conv = _fla("modules.causal_conv1d.ops").causal_conv1d_fwd
    scan = _mamba_ssm("ssd_combined").mamba_chunk_scan_combined
    compiled = torch.compile(lambda y, z, z_bias: y * F.silu(z + z_bias), dynamic=False)

    def prepare(projected, conv_weight, conv_bias, z_bias, D, state_dim):
        heads, inner, channels = len(D), len(z_bias), len(conv_weight)
        group = (channels - inner) // 2
        A = -torch.ones_like(D)

        def call():
            xBC, z, a = projected.split((channels, inner, heads), -1)
            mixed = conv(xBC, conv_weight, conv_bias, None)[0]
            x, B, C = mixed.split((inner, group, group), -1)
            x = x.unflatten(-1, (heads, -1))
            B, C = (t.unflatten(-1, (-1, state_dim)) for t in (B, C))
            y = scan(x, a, A, B, C, chunk, D, dt_softplus=True)
            return compiled(y.flatten(-2), z, z_bias)

        return call

    return prepare


# ---- whole models: transformers' Llama


def transformers_model(config, device="cuda", dtype=torch.bfloat16, maskless=False):
    """LlamaForCausalLM with random weights of the shape of an all-attention ModelConfig.

    maskless: nothing but the causal flag for SDPA, which is right for whole prompts of one length.
    Without it a mask is made wherever torch.compile traces, and with a mask there is no flash attention.
    """
    from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    attention = "sdpa"
    if maskless:  # a name that has no function to make masks
        attention = "maskless_sdpa"
        AttentionInterface.register(attention, sdpa_attention_forward)
    theirs = LlamaConfig(
        vocab_size=config.vocab_size, hidden_size=config.d_model, intermediate_size=config.mlp_dim,
        num_hidden_layers=len(config.mixers), num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads, head_dim=config.head_dim,
        rms_norm_eps=config.norm_eps, tie_word_embeddings=config.tie_embeddings,
        max_position_embeddings=config.max_length, attn_implementation=attention, use_cache=True,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
    )  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return LlamaForCausalLM(theirs).eval()
    finally:
        torch.set_default_dtype(before)


def transformers_decoder(model, batch, prompt, new, greedy=False, backend="inductor"):
    """decode() -> (batch, new) tokens: `new` steps after `prompt` cached ones, sampled or greedy.

    A static cache and a compiled step that also draws the next token, replayed as one CUDA graph: the
    same work as generate(cache_implementation="static") without its Python between steps. The
    prompt's keys and values are random. On CPU, for tests, the step is called instead of replayed.
    """
    from transformers import StaticCache

    device, config = model.device, model.config
    torch.compiler.reset()  # with what an earlier decoder compiled goes its cache
    gc.collect()
    torch.cuda.empty_cache()
    cache = StaticCache(config=config, max_cache_len=prompt + new)
    cache.early_initialization(
        batch, config.num_key_value_heads, config.head_dim, model.dtype, device
    )
    for layer in cache.layers:
        layer.keys[:, :, :prompt].normal_()
        layer.values[:, :, :prompt].normal_()
    first = torch.randint(config.vocab_size, (batch, 1), device=device)
    token = first.clone()
    tokens = token.new_zeros(batch, new)
    index = token.new_zeros(1)

    def draw(token):
        logits = model(input_ids=token, past_key_values=cache, use_cache=True).logits[:, -1]
        if greedy:
            return logits.argmax(-1, keepdim=True)
        # torch.multinomial(softmax), one draw a row, without its checks on the host
        probabilities = logits.float().softmax(-1)
        noise = torch.empty_like(probabilities).exponential_()
        return (probabilities / noise).argmax(-1, keepdim=True)

    compiled = torch.compile(draw, backend=backend, dynamic=False)

    def step():
        token.copy_(compiled(token))
        tokens.index_copy_(1, index, token)
        index.add_(1)

    def rewind():
        token.copy_(first)
        index.zero_()
        for layer in cache.layers:
            layer.cumulative_length.fill_(prompt)

    rewind()
    run = step
    if device.type == "cuda":
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.inference_mode(), torch.cuda.stream(stream):
            for _ in range(min(3, new)):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.inference_mode(), torch.cuda.graph(graph):
            step()
        run = graph.replay

    @torch.inference_mode()
    def decode():
        rewind()
        for _ in range(new):
            run()
        return tokens

    return decode


def transformers_prefill(model, batch, length, keep=True, backend=None):
    """prefill() -> (batch, 1, vocabulary) logits after random prompts.

    keep: their keys and values too, in a cache that grows, as ours does; else they are dropped, which
    is less work. backend: that of torch.compile, which compiles for these sizes alone; None is eager.
    """
    tokens = torch.randint(model.config.vocab_size, (batch, length), device=model.device)

    def logits(tokens):
        return model(input_ids=tokens, use_cache=keep, logits_to_keep=1).logits

    if backend is not None:
        torch.compiler.reset()
        logits = torch.compile(logits, backend=backend, dynamic=False)

    @torch.inference_mode()
    def prefill():
        return logits(tokens)

    return prefill


# ---- filling the folder


def _import_all():
    """Whatever the functions above import."""
    for name in ("decode", "cascade", "sampling", "topk", "mamba.selective_state_update"):
        _flashinfer(name)
    for name in ("selective_state_update", "ssd_combined"):
        _mamba_ssm(name)
    for name in ("ops.simple_gla.chunk", "modules.causal_conv1d.ops"):
        _fla(name)


def _flashinfer_specs():
    """What flashinfer would compile for the calls above, on Hopper."""
    jit, mamba, sampling, topk, cascade = (
        importlib.import_module(f"flashinfer.jit{name}")
        for name in ("", ".mamba", ".sampling", ".topk", ".cascade")
    )
    bf16, fp32, int32 = torch.bfloat16, torch.float32, torch.int32

    def prefill(backend, head_dim):
        spec = jit.gen_batch_prefill_module(
            backend, bf16, bf16, bf16, int32, head_dim, head_dim, 0, False, False, False
        )
        # Contiguous keys and values, and custom masks, are for nobody here.
        unused = ("ragged", "mask_2", "mask_3")
        spec.sources = [s for s in spec.sources if not any(u in s.stem for u in unused)]
        return spec

    for sizes in ((64, 64), (128, 128)):  # P = 96 it does not compile for
        for dtype in (fp32, bf16):
            yield mamba.gen_selective_state_update_sm90_module(
                dtype, bf16, fp32, fp32, int32, None, *sizes, 1, int32, torch.int64
            )
    for dim in (64, 128):
        yield jit.gen_batch_decode_module(bf16, bf16, bf16, int32, dim, dim, 0, False, False)
    yield sampling.gen_sampling_module()
    yield cascade.gen_cascade_module()
    yield topk.gen_topk_module()
    yield prefill("fa2", 64)
    yield prefill("fa2", 128)
    yield prefill("fa3", 64)
    yield prefill("fa3", 128)


def fill():
    """Install the releases into build/peers, compile there, and copy what is used to FOLDER."""
    source = ROOT / "build/peers"
    source.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation"]
    for name, version in RELEASES.items():
        if not list(source.glob(f"{name.replace('-', '_')}-{version}.dist-info")):
            subprocess.run(
                [*pip, "--target", source, f"{name}=={version}"],
                env=os.environ | {"MAMBA_FORCE_BUILD": "TRUE", "MAMBA_SKIP_CUDA_BUILD": "TRUE"},
                check=True,
            )
    # A machine without a driver lacks libcuda, and a small toolkit libcudart: anything of that name
    # will do to link. And tvm_ffi's core wants a library of tests, for one name in it.
    for name, version, code in (
        ("libcuda.so", ".1", ""),
        ("libcudart.so", ".13", ""),
        ("libtvm_ffi_testing.so", "", "void TVMFFITestingDummyTarget() {}"),
    ):
        command = ["cc", "-shared", "-fPIC", "-x", "c", "-", f"-Wl,-soname,{name}{version}"]
        subprocess.run([*command, "-o", source / name], input=code.encode(), check=True)
    # Headers that a small toolkit lacks, curand's, are with the libraries that torch comes with.
    headers = Path(torch.__file__).parents[1].glob("nvidia/cu*/include")
    os.environ["CPLUS_INCLUDE_PATH"] = ":".join(map(str, headers))
    os.environ["FLASHINFER_EXTRA_LDFLAGS"] = f"-L{source}"
    os.environ["FLASHINFER_CUDA_ARCH_LIST"] = "9.0a"
    os.environ["FLASHINFER_WORKSPACE_BASE"] = str(source)
    sys.path.insert(0, str(source))
    _import_all()

    def carry(file, target):
        target = FOLDER / target
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
        if target.suffix == ".so":
            subprocess.run(["strip", target], check=True)
            Path(f"{target}.xz").write_bytes(lzma.compress(target.read_bytes(), preset=9))
            target.unlink()

    loaded = [getattr(m, "__file__", None) for m in list(sys.modules.values())]
    files = {Path(file) for file in loaded if file}
    # Which files these two import depends on the device and on the tensors that they see.
    some = [f for f in files if any(f.is_relative_to(source / name) for name in ("fla", "einops"))]
    files |= {beside for file in some for beside in file.parent.glob("*.py")}
    for file in [*files, source / "tvm_ffi/lib/libtvm_ffi.so"]:
        if file.is_relative_to(source):
            carry(file, file.relative_to(source))
    carry(source / "libtvm_ffi_testing.so", "tvm_ffi/lib/libtvm_ffi_testing.so")
    # flashinfer writes a module's sources from templates before it looks for it compiled.
    opened = set()
    sys.addaudithook(lambda event, arguments: event == "open" and opened.add(str(arguments[0])))
    for spec in _flashinfer_specs():
        spec.build()
        carry(spec.jit_library_path, f"flashinfer/data/aot/{spec.name}/{spec.name}.so")
        for file in map(Path, list(opened)):
            if file.is_relative_to(source / "flashinfer/data/csrc"):
                carry(file, file.relative_to(source))
        opened.clear()
        print("compiled", spec.name, flush=True)
    size = sum(f.stat().st_size for f in FOLDER.rglob("*") if f.is_file())
    print(f"{FOLDER}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    fill()
