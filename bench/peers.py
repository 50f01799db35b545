"""Other people's kernels and models, to be timed beside ours; none is a dependency.

They are looked for on sys.path and in the folder that REASONERS_PEERS names (default `.peers`), which
is filled by

    pip install --no-deps --target .peers flashinfer-python apache-tvm-ffi einops packaging
    MAMBA_SKIP_CUDA_BUILD=TRUE pip install --no-deps --no-build-isolation --target .peers mamba-ssm

Their package `__init__`s import much that is not needed here and may not be there, so only the one
module is imported, below stub packages. A peer that is missing raises ImportError with the reason.
`python bench/peers.py` compiles, in parallel, what flashinfer would compile at each first use.
"""

import gc
import importlib
import importlib.machinery
import os
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch

FOLDER = Path(os.environ.get("REASONERS_PEERS", Path(__file__).parents[1] / ".peers")).resolve()


def _stub(name):
    """Make `name` a package whose submodules can be imported although its `__init__` never runs."""
    if name in sys.modules:
        return
    if str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))
    parent, _, _ = name.rpartition(".")
    path = sys.modules[parent].__path__ if parent else None
    spec = importlib.machinery.PathFinder.find_spec(name, path)
    if spec is None or spec.submodule_search_locations is None:
        raise ImportError(f"no package {name} on sys.path or in {FOLDER}")
    module = types.ModuleType(name)
    module.__spec__, module.__path__ = spec, list(spec.submodule_search_locations)
    sys.modules[name] = module


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
    for name in ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton"):
        _stub(name)
    module = importlib.import_module("mamba_ssm.ops.triton.selective_state_update")

    def prepare(inputs):
        tied = _tied(inputs)
        bias = torch.zeros_like(inputs["D"])[:, None].expand_as(tied["D"])
        return lambda: module.selective_state_update(**tied, dt_bias=bias)

    return prepare


@cache
def _flashinfer():
    os.environ.setdefault("FLASHINFER_LOGGING_LEVEL", "warning")
    if "CUDA_HOME" not in os.environ and "CUDA_PATH" not in os.environ:
        from torch.utils.cpp_extension import CUDA_HOME

        if CUDA_HOME is not None:
            os.environ["CUDA_HOME"] = CUDA_HOME
    for name in ("flashinfer", "flashinfer.jit", "flashinfer.trace", "flashinfer.mamba"):
        _stub(name)
    return importlib.import_module("flashinfer.mamba.selective_state_update")


@cache
def _flashinfer_build(state_dtype, head_dim, state_dim):
    """Compile and load the kernel; the error's words if that fails, so that it is tried once."""
    try:
        _flashinfer().get_selective_state_update_module(
            torch.device("cuda", torch.cuda.current_device()), state_dtype, torch.bfloat16,
            torch.float32, torch.float32, torch.int32, head_dim, state_dim, 1, torch.int32, torch.int64,
        )  # fmt: skip
    except (RuntimeError, OSError) as error:
        return f"flashinfer {state_dtype} P {head_dim} N {state_dim}: {error}"
    return None


def flashinfer_state_update():
    """prepare(inputs) -> call() -> y, of flashinfer's kernel; inputs as for mamba_ssm, x bfloat16.

    It is compiled by nvcc at the first use of each (dtype of the state, P, N), into ~/.cache.
    """
    module = _flashinfer()

    def prepare(inputs):
        tied = _tied(inputs)
        failure = _flashinfer_build(tied["state"].dtype, *tied["state"].shape[2:])
        if failure is not None:
            raise ImportError(failure)
        out = torch.empty_like(tied["x"])
        return lambda: module.selective_state_update(**tied, out=out)

    return prepare


STATE_UPDATE = {"mamba_ssm": mamba_ssm_state_update, "flashinfer": flashinfer_state_update}


# ---- the chunked scan


def mamba_ssm_scan(chunk):
    """prepare(x, log_decay, B, C, D) -> call() -> y, of mamba_ssm's Triton kernels.

    Their step sizes weigh x too: they get -log_decay as dt and A = -1, the same work as ours.
    """
    for name in ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton", "mamba_ssm.utils"):
        _stub(name)
    module = importlib.import_module("mamba_ssm.ops.triton.ssd_combined")

    def prepare(x, log_decay, B, C, D):
        dt, A = -log_decay, -torch.ones_like(D)
        return lambda: module.mamba_chunk_scan_combined(x, dt, A, B, C, chunk, D)

    return prepare


# ---- whole decode: transformers' Llama


def transformers_model(config, device="cuda", dtype=torch.bfloat16):
    """LlamaForCausalLM with random weights of the shape of an all-attention ModelConfig."""
    from transformers import LlamaConfig, LlamaForCausalLM

    theirs = LlamaConfig(
        vocab_size=config.vocab_size, hidden_size=config.d_model, intermediate_size=config.mlp_dim,
        num_hidden_layers=len(config.mixers), num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads, head_dim=config.head_dim,
        rms_norm_eps=config.norm_eps, tie_word_embeddings=config.tie_embeddings,
        max_position_embeddings=config.max_length, attn_implementation="sdpa", use_cache=True,
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


if __name__ == "__main__":
    cases = [
        (dtype, *sizes)
        for sizes in ((64, 64), (96, 64), (128, 128))
        for dtype in (torch.float32, torch.bfloat16)
    ]
    _flashinfer()
    with ThreadPoolExecutor(len(cases)) as pool:
        for case, failure in zip(cases, pool.map(lambda c: _flashinfer_build(*c), cases)):
            print("flashinfer", *case, "built" if failure is None else failure)
