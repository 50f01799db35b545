"""One language model for teachers, students and hybrids; it trains, prefills and decodes.

A model is a list of layers `h += mixer(norm1(h)); h += mlp(norm2(h))`, where each layer's mixer is one
of four kinds. Llama is all "attention", Llamba all "discrete_mamba2", MambaInLlama mixes "attention"
with "mamba1" or "mamba2": CONFIGS names them. `forward` sees whole sequences and has gradients,
`extend` feeds packed tokens to sequences held in a Cache; both run the same mixers.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.utils.checkpoint import checkpoint

from reasoners import ops
from reasoners.cache import Cache, KVPages, States, Step

MixerKind = Literal["attention", "discrete_mamba2", "mamba1", "mamba2"]


@dataclass(frozen=True)
class RopeScaling:
    """The "llama3" frequency scaling: long wavelengths are stretched by `factor`."""

    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_length: int = 8192


@dataclass(frozen=True)
class ModelConfig:
    """Everything that determines a model's shapes and equations.

    mixers: the kind of every layer. num_kv_heads: key/value heads of attention; the heads that x and
    B have in the hybrid's recurrent mixers; the groups of B and C in Llamba. state_dim: N of the
    recurrent mixers (0 if there are none). norm_eps: of every RMSNorm.
    """

    vocab_size: int
    d_model: int
    mlp_dim: int
    mixers: tuple[MixerKind, ...]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    state_dim: int = 0
    conv_width: int = 4
    norm_eps: float = 1e-5
    tie_embeddings: bool = True
    rope_theta: float = 500000.0
    rope_scaling: RopeScaling | None = None
    max_length: int = 131072

    def __post_init__(self):
        object.__setattr__(self, "mixers", tuple(self.mixers))
        for field in ("vocab_size", "d_model", "mlp_dim", "num_heads", "num_kv_heads", "head_dim"):
            if getattr(self, field) < 1:
                raise ValueError(f"ModelConfig: {field} expected >= 1, got {getattr(self, field)}")
        unknown = set(self.mixers) - set(get_args(MixerKind))
        if unknown or not self.mixers:
            raise ValueError(
                f"ModelConfig: mixers expected one or more of {get_args(MixerKind)}, got {self.mixers}"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"ModelConfig: num_kv_heads expected to divide num_heads = {self.num_heads}, got "
                f"{self.num_kv_heads}"
            )
        recurrent = set(self.mixers) - {"attention"}
        if recurrent and self.state_dim < 1:
            raise ValueError(f"ModelConfig: state_dim expected >= 1, got {self.state_dim}")
        if "mamba2" in recurrent and self.state_dim != self.head_dim:
            raise ValueError(
                f"ModelConfig: state_dim of mamba2 expected head_dim = {self.head_dim}, got "
                f"{self.state_dim}"
            )
        if "mamba1" in recurrent and self.kv_dim % self.state_dim:
            raise ValueError(
                f"ModelConfig: state_dim of mamba1 expected to divide {self.kv_dim}, got "
                f"{self.state_dim}"
            )

    @property
    def inner_dim(self) -> int:
        """Channels inside a mixer: heads * head_dim."""
        return self.num_heads * self.head_dim

    @property
    def kv_dim(self) -> int:
        """Channels of one key, value, or hybrid x or B."""
        return self.num_kv_heads * self.head_dim

    @property
    def family(self) -> str:
        """ "llama", "llamba" or "mambainllama"."""
        kinds = set(self.mixers)
        if kinds == {"attention"}:
            return "llama"
        if kinds == {"discrete_mamba2"}:
            return "llamba"
        if "discrete_mamba2" in kinds or {"mamba1", "mamba2"} <= kinds:
            raise ValueError(f"ModelConfig: no family mixes {sorted(kinds)}")
        return "mambainllama"


def _hybrid(teacher: ModelConfig, kind: MixerKind, keep, state_dim: int) -> ModelConfig:
    mixers = tuple("attention" if i in keep else kind for i in range(len(teacher.mixers)))
    return replace(teacher, mixers=mixers, state_dim=state_dim)


def _llamba(teacher: ModelConfig, head_dim: int, state_dim: int = 64) -> ModelConfig:
    heads = teacher.d_model // head_dim
    mixers = ("discrete_mamba2",) * len(teacher.mixers)
    return replace(
        teacher, mixers=mixers, num_heads=heads, num_kv_heads=heads, head_dim=head_dim,
        state_dim=state_dim, rope_scaling=None, max_length=131072,
    )  # fmt: skip


def student_config(
    teacher: ModelConfig, kind: str, keep: Collection[int] = (), state_dim: int | None = None
) -> ModelConfig:
    """The shape of a Llama's student.

    kind: "llamba", or "mamba1" or "mamba2" for a MambaInLlama that keeps the attention layers `keep`.
    state_dim: N; None for 64 in Llamba, 16 in Mamba-1, the head dim in Mamba-2. Llamba has 32 heads, or
    the teacher's number where 32 would be narrower than 64 channels.
    Raises ValueError for another kind, or layers to keep that are not there or that Llamba lacks.
    """
    layers = len(teacher.mixers)
    outside = sorted(i for i in keep if not 0 <= i < layers)
    if outside:
        raise ValueError(
            f"student_config: keep expected layers below {layers}, got {', '.join(map(str, outside))}"
        )
    if kind == "llamba":
        if keep:
            raise ValueError(
                f"student_config: keep expected none for llamba, which has no attention, got "
                f"{sorted(keep)}"
            )
        wide = teacher.d_model % 32 == 0 and teacher.d_model >= 32 * 64
        heads = 32 if wide else teacher.num_heads
        return _llamba(teacher, teacher.d_model // heads, state_dim or 64)
    if kind not in ("mamba1", "mamba2"):
        raise ValueError(f"student_config: kind expected llamba, mamba1 or mamba2, got {kind!r}")
    return _hybrid(teacher, kind, keep, state_dim or (16 if kind == "mamba1" else teacher.head_dim))


_LLAMA_1B = ModelConfig(
    128256, 2048, 8192, ("attention",) * 16, 32, 8, 64, rope_scaling=RopeScaling(32.0)
)
_LLAMA_3B = ModelConfig(
    128256, 3072, 8192, ("attention",) * 28, 24, 8, 128, rope_scaling=RopeScaling(32.0)
)
_LLAMA_8B = ModelConfig(
    128256, 4096, 14336, ("attention",) * 32, 32, 8, 128, tie_embeddings=False,
    rope_scaling=RopeScaling(8.0),
)  # fmt: skip
_SMOLLM2_135M = ModelConfig(
    49152, 576, 1536, ("attention",) * 30, 9, 3, 64, rope_theta=100000.0, max_length=8192
)
_TINY = ModelConfig(256, 96, 128, ("attention",) * 4, 6, 2, 16, max_length=512)
_KEEP_1B, _KEEP_3B = (3, 7, 11, 15), (3, 8, 13, 18, 23, 27)

CONFIGS: dict[str, ModelConfig] = {
    "llama-3.2-1b": _LLAMA_1B,
    "llama-3.2-3b": _LLAMA_3B,
    "llama-3.1-8b": _LLAMA_8B,
    "smollm2-135m": _SMOLLM2_135M,
    "llamba-1b": _llamba(_LLAMA_1B, 64),
    "llamba-3b": _llamba(_LLAMA_3B, 96),
    "llamba-8b": _llamba(_LLAMA_8B, 128),
    "mambainllama-1b": _hybrid(_LLAMA_1B, "mamba1", _KEEP_1B, 16),
    "mambainllama-3b": _hybrid(_LLAMA_3B, "mamba1", _KEEP_3B, 16),
    "mambainllama-1b-mamba2": _hybrid(_LLAMA_1B, "mamba2", _KEEP_1B, 64),
    "mambainllama-3b-mamba2": _hybrid(_LLAMA_3B, "mamba2", _KEEP_3B, 128),
    "tiny-llama": _TINY,
    "tiny-llamba": _llamba(_TINY, 16, 16),
    "tiny-mamba1": _hybrid(_TINY, "mamba1", (1,), 16),
    "tiny-mamba2": _hybrid(_TINY, "mamba2", (1,), 16),
}


def _wide(x: Tensor) -> Tensor:
    dtype = ops.wide_dtype(x.dtype)
    return x if x.dtype == dtype else x.to(dtype)  # Tensor.to takes 1 us to do nothing


class RMSNorm(nn.Module):
    """x / rms(x) times the weight, over the last `dim` channels; float32 inside."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) -> (..., dim)"""
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)

    def after(self, h: Tensor, delta: Tensor | None = None) -> Tensor:
        """h += delta, in place, and the norm of that, cast back before the weight; without gradients."""
        return ops.add_rms_norm(h, delta, self.weight, self.eps)


@dataclass(frozen=True)
class Normed:
    """norm(h), left to the product that takes it."""

    h: Tensor
    norm: RMSNorm


class Linear(nn.Linear):
    """y = x W^T (+ b); without gradients by ops.linear, whose rows do not depend on how many there are."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False):
        super().__init__(in_features, out_features, bias=bias)

    def forward(self, x: Tensor | Normed, onto: Tensor | None = None) -> Tensor | None:
        """(..., in_features) -> (..., out_features); nothing if that is added `onto` a tensor, in place.

        x may be Normed, and `onto` given, without gradients only.
        """
        if isinstance(x, Normed):
            return self._of_norm(x, gated=False)
        if onto is not None:
            return ops.add_linear(onto, x, self.weight)
        if torch.is_grad_enabled():
            return F.linear(x.contiguous(), self.weight, self.bias)
        return ops.linear(x, self.weight, self.bias)

    def gated(self, x: Tensor | Normed) -> Tensor:
        """silu(first half of y) times the second, (..., in_features) -> (..., out_features / 2)"""
        if isinstance(x, Normed):
            return self._of_norm(x, gated=True)
        return ops.swiglu(self(x))

    def _of_norm(self, x: Normed, gated: bool) -> Tensor:
        norm = x.norm
        return ops.rms_norm_linear(x.h, norm.weight, norm.eps, self.weight, self.bias, gated)


class HeadNorm(RMSNorm):
    """RMSNorm of every head by itself, with a weight for each channel of all heads."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., heads, head_dim) -> (..., heads * head_dim)"""
        return F.rms_norm(x, x.shape[-1:], None, self.eps).flatten(-2) * self.weight


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x)); gate and up are one matrix, gate's rows first."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_up_proj = Linear(config.d_model, 2 * config.mlp_dim)
        self.down_proj = Linear(config.mlp_dim, config.d_model)

    def forward(self, x: Tensor | Normed, onto: Tensor | None = None) -> Tensor | None:
        """(..., d_model) -> (..., d_model), as Linear.forward"""
        return self.down_proj(self.gate_up_proj.gated(x), onto)


@dataclass
class Pass:
    """What every mixer of one forward pass shares.

    cu_seqlens: boundaries of packed sequences, or None. inv_freq: rotary angles per position.
    max_length, positions: of whole sequences with attention, the longest and each token's place,
    (batch * length) int32. step: set when the pass extends cached sequences.
    """

    cu_seqlens: Tensor | None
    inv_freq: Tensor
    max_length: int = 0
    positions: Tensor | None = None
    step: Step | None = None

    def begin(self, cached: States | None) -> tuple[Tensor | None, Tensor | None]:
        """Past inputs and scan states that a recurrent layer goes on from; None means zeros."""
        if cached is None:
            return None, None
        return self.step.carries[cached.stack].begin(cached.place)

    def end(self, cached: States | None, last_inputs: Tensor, final: Tensor):
        """What it leaves."""
        if cached is not None:
            self.step.carries[cached.stack].end(cached.place, last_inputs, final)

    def causal_mask(self, rows: int, length: int, device: torch.device) -> Tensor:
        """(rows, 1, length, length) booleans, or 1 for rows: whether a token may look at another one.

        rows: that all packed tokens are cut in.
        """
        position = torch.arange(length, device=device)
        mask = (position[:, None] >= position)[None, None]
        if self.cu_seqlens is not None:
            token = torch.arange(rows * length, device=device)
            document = torch.bucketize(token, self.cu_seqlens, right=True).view(rows, 1, length)
            mask = mask & (document[..., None] == document[..., None, :])
        return mask


class Rotary:
    """Rotary frequencies, with the llama3 scaling when the config asks for it."""

    def __init__(self, config: ModelConfig):
        dim = config.head_dim
        exponents = torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim
        inv_freq = 1.0 / config.rope_theta**exponents
        scaling = config.rope_scaling
        if scaling is not None:
            # Wavelengths shorter than original / high_freq_factor stay, longer than original /
            # low_freq_factor are stretched by factor, those between are blended linearly.
            turns = scaling.original_max_length * inv_freq / (2 * math.pi)
            low, high = scaling.low_freq_factor, scaling.high_freq_factor
            keep = ((turns - low) / (high - low)).clamp(0, 1)
            inv_freq = keep * inv_freq + (1 - keep) * inv_freq / scaling.factor
        # Not a buffer: a model cast to bfloat16 must not round its frequencies.
        self.inv_freq = {torch.device("cpu"): inv_freq}

    def on(self, device: torch.device) -> Tensor:
        """The angle per position of every channel pair, (head_dim / 2) float32."""
        if device not in self.inv_freq:
            with torch.inference_mode(False):  # training may ask for them later
                self.inv_freq[device] = self.inv_freq[torch.device("cpu")].to(device)
        return self.inv_freq[device]


def cut(t: Tensor, rows: int) -> Tensor:
    """(batch, rows * length, ...) -> (batch * rows, length, ...)"""
    return t.unflatten(1, (rows, -1)).flatten(0, 1)


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions (Llama)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads
        self.head_dim = config.head_dim
        self.qkv_proj = Linear(config.d_model, config.inner_dim + 2 * config.kv_dim)
        self.out_proj = Linear(config.inner_dim, config.d_model)

    def cache_shapes(self):
        """What a Cache keeps for this layer."""
        return {"kv": (self.num_kv_heads, self.head_dim)}

    def forward(
        self,
        u: Tensor | Normed,
        this: Pass,
        cached: KVPages | None = None,
        onto: Tensor | None = None,
    ) -> Tensor | None:
        """(batch, length, d_model) -> the same, as Linear.forward"""
        qkv = self.qkv_proj(u).unflatten(-1, (-1, self.head_dim))
        if cached is not None:
            step = this.step
            where = (step.page_table, step.cu_seqlens, step.lengths)
            ops.rotate_append_kv(cached.k, cached.v, qkv[0], this.inv_freq, *where)
            q = qkv[0, :, : self.num_heads]
            # One token that ends a prompt is no decode: it gets the bits of a prompt in one piece.
            most = 1 if step.decode else max(2, q.shape[0])
            y = ops.paged_attention(
                q, cached.k, cached.v, *where, max_queries=most, shared=step.shared
            )
            return self.out_proj(y[None].flatten(-2), onto)
        heads = (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        q, k, v = qkv.split(heads, -2)
        q, k = (ops.rotated(t, this.positions, this.inv_freq) for t in (q, k))
        return self.out_proj(self._attend(q, k, v, this).flatten(-2), onto)

    def mixing_matrix(self, u: Tensor, this: Pass, rows: int = 1) -> Tensor:
        """The attention map (batch * rows, heads, length, length) of whole sequences, in float32.

        rows: into so many of one length u is cut; documents end where they do.
        """
        heads = (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        q, k, _ = self.qkv_proj(u).unflatten(-1, (-1, self.head_dim)).split(heads, -2)
        q, k = (ops.rotated(t, this.positions, this.inv_freq) for t in (q, k))
        k = k.repeat_interleave(self.num_heads // self.num_kv_heads, -2)
        q, k = (_wide(cut(t, rows)) for t in (q, k))
        scores = q.transpose(1, 2) @ k.permute(0, 2, 3, 1) * self.head_dim**-0.5
        mask = this.causal_mask(rows, q.shape[1], u.device)
        return scores.masked_fill(~mask, -math.inf).softmax(-1)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, this: Pass) -> Tensor:
        if this.cu_seqlens is not None and q.is_cuda and q.element_size() == 2:
            k, v = (t.repeat_interleave(self.num_heads // self.num_kv_heads, -2) for t in (k, v))
            where = (this.cu_seqlens, this.cu_seqlens, this.max_length, this.max_length)
            return varlen_attn(q[0], k[0], v[0], *where, window_size=(-1, 0))[None]
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        if this.cu_seqlens is None:
            parts = [(q, k, v)]
        else:
            lengths = this.cu_seqlens.diff().tolist()
            parts = zip(*(t.split(lengths, 2) for t in (q, k, v)), strict=True)
        y = [
            F.scaled_dot_product_attention(*part, is_causal=True, enable_gqa=True) for part in parts
        ]
        return (y[0] if len(y) == 1 else torch.cat(y, 2)).transpose(1, 2)


class CausalConv1d(nn.Module):
    """Depthwise causal convolution in front of a recurrent mixer, optionally with SiLU."""

    def __init__(self, channels: int, width: int, silu: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, width))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.silu = silu

    def forward(self, x: Tensor, this: Pass, past: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(batch, length, channels) -> the same, and the last inputs, as ops.causal_conv1d"""
        return ops.causal_conv1d(x, self.weight, self.bias, past, this.cu_seqlens, self.silu)


def scan_mixer(op, *arguments, this: Pass, cached: States | None) -> Tensor:
    """A mixer between its projections over whole sequences, or onward from cached states; no gradients.

    op: ops.discrete_mamba2_scan or ops.mamba2_scan; arguments: all before the optional ones.
    """
    past, initial = this.begin(cached)
    y, last_inputs, final = op(*arguments, past, initial, this.cu_seqlens)
    this.end(cached, last_inputs, final)
    return y


class DiscreteMamba2(nn.Module):
    """Llamba's mixer: S = sigmoid(-a) S + x B^T, y = S C + D x, gated by silu(z + z_bias).

    One matrix gives x, B, C, z, a; a convolution without activation runs over [x, B, C].
    Source: Bick et al. 2025 (Llamba).
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.num_heads, self.num_groups = config.num_heads, config.num_kv_heads
        self.head_dim, self.state_dim = config.head_dim, config.state_dim
        inner, group = config.inner_dim, config.num_kv_heads * config.state_dim
        self.sizes = (inner + 2 * group, inner, config.num_heads)
        self.conv_sizes = (inner, group, group)
        self.in_proj = Linear(config.d_model, sum(self.sizes))
        self.conv = CausalConv1d(sum(self.conv_sizes), config.conv_width, silu=False)
        self.z_bias = nn.Parameter(torch.zeros(inner))
        self.D = nn.Parameter(torch.ones(config.num_heads))
        self.out_proj = Linear(inner, config.d_model)

    def cache_shapes(self):
        """What a Cache keeps for this layer."""
        return {
            "conv": self.conv.weight.shape[::-1],
            "scan": (self.num_heads, self.head_dim, self.state_dim),
            "recent": (self.num_heads, self.num_groups),
        }

    def forward(
        self,
        u: Tensor | Normed,
        this: Pass,
        cached: States | None = None,
        onto: Tensor | None = None,
    ) -> Tensor | None:
        """(batch, length, d_model) -> the same, as Linear.forward"""
        projected = self.in_proj(u)
        if this.step is not None and this.step.decode:
            step, conv = this.step, self.conv
            y = ops.discrete_mamba2_update(
                *cached.mixer_states(), step.slots, step.lengths, projected[0], conv.weight,
                conv.bias, self.z_bias, _wide(self.D), step.period, step.rng_key,
            )  # fmt: skip
            return self.out_proj(y[None], onto)
        if cached is not None or not torch.is_grad_enabled():
            conv = self.conv
            y = scan_mixer(
                ops.discrete_mamba2_scan, projected, conv.weight, conv.bias, self.z_bias,
                _wide(self.D), self.state_dim, this=this, cached=cached,
            )  # fmt: skip
            return self.out_proj(y, onto)
        x, B, C, z, log_decay = self._scanned(projected, this)
        y, _ = ops.ssd_scan(x, log_decay, B, C, None, _wide(self.D), cu_seqlens=this.cu_seqlens)
        return self.out_proj(ops.gate(y.flatten(-2), z, self.z_bias), onto)

    def mixing_matrix(self, u: Tensor, this: Pass, rows: int = 1) -> Tensor:
        """The map of x that the scan applies, D included, as `Attention.mixing_matrix`."""
        _, B, C, _, log_decay = self._scanned(self.in_proj(u), this)
        B, C, log_decay = (cut(t, rows) for t in (B, C, log_decay))
        repeats, length = self.num_heads // self.num_groups, B.shape[1]
        B, C = (_wide(t).repeat_interleave(repeats, -2).transpose(1, 2) for t in (B, C))
        total = log_decay.transpose(1, 2).cumsum(-1)
        mask = this.causal_mask(rows, length, u.device)
        decay = (total[..., None] - total[..., None, :]).masked_fill(~mask, -math.inf).exp()
        return C @ B.mT * decay + torch.diag_embed(_wide(self.D)[:, None].expand(-1, length))

    def _scanned(self, projected: Tensor, this: Pass):
        """What the scan takes of in_proj's output, and the gate: x, B, C, z, log_decay."""
        xBC, z, a = projected.split(self.sizes, -1)
        x, B, C = self.conv(xBC, this)[0].split(self.conv_sizes, -1)
        x = x.unflatten(-1, (self.num_heads, self.head_dim))
        B = B.unflatten(-1, (self.num_groups, self.state_dim))
        C = C.unflatten(-1, (self.num_groups, self.state_dim))
        return x, B, C, z, -ops.softplus(a)  # log(sigmoid(-a))

    def reset(self):
        """The student's start: no gate (silu(z_bias) = 1), identity convolution, D = 1."""
        inner, group = self.conv_sizes[:2]
        nn.init.zeros_(self.in_proj.weight[inner + 2 * group :][:inner])
        nn.init.constant_(self.z_bias, 1.278464542761)
        nn.init.zeros_(self.conv.weight)
        nn.init.ones_(self.conv.weight[:, -1])
        nn.init.zeros_(self.conv.bias)
        nn.init.ones_(self.D)


def inverse_softplus_steps(count: int) -> Tensor:
    """(count) dt biases whose softplus is log-uniform in [1e-3, 0.1]."""
    low, high = math.log(1e-3), math.log(0.1)
    dt = torch.exp(torch.rand(count) * (high - low) + low).clamp(min=1e-4)
    return dt + torch.log(-torch.expm1(-dt))


class Mamba2(nn.Module):
    """MambaInLlama's Mamba-2 mixer; x and B are shared by the query heads of their kv head.

    One matrix gives z, x, B, C, dt; convolution and SiLU run over [x, B, C]; the output is gated by
    silu(z), then normalised per head. Source: Wang et al. 2024 (MambaInLlama).
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads
        self.head_dim = config.head_dim
        inner, kv = config.inner_dim, config.kv_dim
        self.sizes = (inner, inner + 2 * kv, config.num_heads)
        self.conv_sizes = (kv, kv, inner)
        self.in_proj = Linear(config.d_model, sum(self.sizes))
        self.conv = CausalConv1d(sum(self.conv_sizes), config.conv_width, silu=True)
        self.dt_bias = nn.Parameter(torch.zeros(config.num_heads))
        self.A_log = nn.Parameter(torch.zeros(config.num_heads))
        self.D = nn.Parameter(torch.ones(config.num_heads))
        self.norm = HeadNorm(inner, config.norm_eps)
        self.out_proj = Linear(inner, config.d_model)

    def cache_shapes(self):
        """What a Cache keeps for this layer."""
        return {
            "conv": self.conv.weight.shape[::-1],
            "scan": (self.num_heads, self.head_dim, self.head_dim),
            "recent": (self.num_kv_heads, self.num_kv_heads),
        }

    def forward(
        self,
        u: Tensor | Normed,
        this: Pass,
        cached: States | None = None,
        onto: Tensor | None = None,
    ) -> Tensor | None:
        """(batch, length, d_model) -> the same, as Linear.forward"""
        projected = self.in_proj(u)
        if this.step is not None and this.step.decode:
            step, conv, norm = this.step, self.conv, self.norm
            y = ops.mamba2_update(
                *cached.mixer_states(), step.slots, step.lengths, projected[0], conv.weight,
                conv.bias, _wide(self.dt_bias), _wide(self.A_log), _wide(self.D), norm.weight,
                norm.eps, step.period, step.rng_key,
            )  # fmt: skip
            return self.out_proj(y[None], onto)
        if cached is not None or not torch.is_grad_enabled():
            conv, norm = self.conv, self.norm
            y = scan_mixer(
                ops.mamba2_scan, projected, conv.weight, conv.bias, _wide(self.dt_bias),
                _wide(self.A_log), _wide(self.D), norm.weight, norm.eps, self.head_dim, this=this,
                cached=cached,
            )  # fmt: skip
            return self.out_proj(y, onto)
        z, xBC, dt = projected.split(self.sizes, -1)
        parts = self.conv(xBC, this)[0].split(self.conv_sizes, -1)
        x, B, C = (t.unflatten(-1, (-1, self.head_dim)) for t in parts)
        delta = ops.softplus(dt, _wide(self.dt_bias))
        log_decay = -delta * _wide(self.A_log).exp()
        y, _ = ops.ssd_scan(x, log_decay, B, C, delta, _wide(self.D), cu_seqlens=this.cu_seqlens)
        y = self.norm(ops.gate(y, z.unflatten(-1, (-1, self.head_dim))))
        return self.out_proj(y, onto)

    def reset(self):
        """Fresh decay and step size, as Mamba-2 starts."""
        with torch.no_grad():
            self.A_log.copy_(torch.empty(self.num_heads).uniform_(1, 16).log())
            self.dt_bias.copy_(inverse_softplus_steps(self.num_heads))
        nn.init.kaiming_uniform_(self.conv.weight[:, None], a=math.sqrt(5))
        nn.init.zeros_(self.conv.bias)
        nn.init.ones_(self.D)
        nn.init.ones_(self.norm.weight)


class Mamba1(nn.Module):
    """MambaInLlama's Mamba-1 mixer: a decay per channel and state entry.

    One matrix gives z, x, B, C, dt. x and B have the kv heads' channels and are repeated in chunks of
    state_dim channels, the order the published checkpoints are trained with; so is the dt bias that
    enters twice. Only x passes the convolution and SiLU. Source: Wang et al. 2024 (MambaInLlama).
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.state_dim, self.inner_dim = config.state_dim, config.inner_dim
        self.repeats = config.num_heads // config.num_kv_heads
        inner, kv, rank = config.inner_dim, config.kv_dim, -(-config.d_model // 16)
        self.sizes = (inner, kv, kv, inner, rank)
        self.in_proj = Linear(config.d_model, sum(self.sizes))
        self.conv = CausalConv1d(inner, config.conv_width, silu=True)
        self.dt_proj = Linear(rank, inner, bias=True)
        self.A_log = nn.Parameter(torch.zeros(inner, config.state_dim))
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = Linear(inner, config.d_model)

    def cache_shapes(self):
        """What a Cache keeps for this layer."""
        return {
            "conv": self.conv.weight.shape[::-1],
            "scan": (self.inner_dim, self.state_dim),
        }

    def forward(
        self,
        u: Tensor | Normed,
        this: Pass,
        cached: States | None = None,
        onto: Tensor | None = None,
    ) -> Tensor | None:
        """(batch, length, d_model) -> the same, as Linear.forward"""
        projected = self.in_proj(u)
        z, x, B, C, dt = projected.split(self.sizes, -1)
        if this.step is not None and this.step.decode:
            step, conv = this.step, self.conv
            y = ops.mamba1_update(
                cached.conv, cached.scan, step.slots, step.lengths, projected[0],
                self.dt_proj(dt)[0], conv.weight, conv.bias, self.dt_proj.bias, _wide(self.A_log),
                _wide(self.D), B.shape[-1],
            )  # fmt: skip
            return self.out_proj(y[None], onto)
        x = x.unflatten(-1, (-1, self.state_dim)).repeat_interleave(self.repeats, -2).flatten(-2)
        past, initial = this.begin(cached)
        x, last_inputs = self.conv(x, this, past)
        B, C = (t.unflatten(-1, (-1, self.state_dim)) for t in (B, C))
        delta = ops.softplus(self.dt_proj(dt), _wide(self.dt_proj.bias))
        A, D = -_wide(self.A_log).exp(), _wide(self.D)
        y, final = ops.selective_scan(x, delta, A, B, C, D, initial, this.cu_seqlens)
        this.end(cached, last_inputs, final)
        return self.out_proj(ops.gate(y, z), onto)

    def reset(self):
        """Fresh decay, step size and convolution, as Mamba starts."""
        rank = self.dt_proj.in_features
        with torch.no_grad():
            self.A_log.copy_(torch.arange(1, self.state_dim + 1).log().expand_as(self.A_log))
            self.dt_proj.bias.copy_(inverse_softplus_steps(self.inner_dim))
        nn.init.uniform_(self.dt_proj.weight, -(rank**-0.5), rank**-0.5)
        nn.init.kaiming_uniform_(self.conv.weight[:, None], a=math.sqrt(5))
        nn.init.zeros_(self.conv.bias)
        nn.init.ones_(self.D)


MIXERS = {
    "attention": Attention,
    "discrete_mamba2": DiscreteMamba2,
    "mamba1": Mamba1,
    "mamba2": Mamba2,
}


class Layer(nn.Module):
    """A mixer and an MLP, each behind its norm and beside the residual stream."""

    def __init__(self, config: ModelConfig, kind: MixerKind):
        super().__init__()
        self.norm1 = RMSNorm(config.d_model, config.norm_eps)
        self.mixer = MIXERS[kind](config)
        self.norm2 = RMSNorm(config.d_model, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, h: Tensor, this: Pass) -> Tensor:
        """(batch, length, d_model) -> the same"""
        h = h + self.mixer(self.norm1(h), this)
        return h + self.mlp(self.norm2(h))


def parameter_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """Decay parameters stay float32 in a half-precision model: an error in them compounds per token."""
    fine = name.endswith((".A_log", ".D", ".dt_bias"))
    return torch.float32 if fine and dtype in (torch.bfloat16, torch.float16) else dtype


class HybridLM(nn.Module):
    """A causal language model whose layers mix by attention or by a recurrence.

    Fresh weights are random; `reasoners.checkpoint.load_model` reads real ones.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(Layer(config, kind) for kind in config.mixers)
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.head = Linear(config.d_model, config.vocab_size)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight
        self.rotary = Rotary(config)
        if self.embedding.weight.device.type != "meta":
            self.reset()

    @torch.no_grad()
    def reset(self):
        """Random weights: matrices normal with deviation 0.02, mixers by their own rule."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        for layer in self.layers:
            if hasattr(layer.mixer, "reset"):
                layer.mixer.reset()

    def assign(self, state: dict[str, Tensor]) -> "HybridLM":
        """Take these tensors for weights, as they are; a tied head needs none. Returns the model."""
        if self.config.tie_embeddings:
            state = {**state, "head.weight": state["embedding.weight"]}
        self.load_state_dict(state, assign=True)
        if self.config.tie_embeddings:
            self.head.weight = self.embedding.weight
        return self

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights and activations."""
        return self.embedding.weight.dtype

    def forward(self, tokens: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """Logits (batch, length, vocab) of whole sequences, with gradients.

        tokens: (batch, length) integers. cu_seqlens: (sequences + 1) int32 offsets of documents packed
        into a batch of one; neither attention nor states cross them.
        """
        return self.head(self.hidden(tokens, cu_seqlens))

    def hidden(
        self, tokens: Tensor, cu_seqlens: Tensor | None = None, recompute: bool = False
    ) -> Tensor:
        """What the head sees, (batch, length, d_model): `forward` without the logits.

        recompute: keep the layers' inputs alone for the backward pass, and run the layers again there.
        """
        this = self.whole_pass(tokens, cu_seqlens)
        h = self.embedding(tokens)
        for layer in self.layers:
            h = checkpoint(layer, h, this, use_reentrant=False) if recompute else layer(h, this)
        return self.norm(h)

    def whole_pass(self, tokens: Tensor, cu_seqlens: Tensor | None = None) -> Pass:
        """What the layers share in a pass over whole sequences."""
        if tokens.dim() != 2:
            raise ValueError(
                f"HybridLM: tokens expected shape (batch, length), got {tuple(tokens.shape)}"
            )
        this = Pass(cu_seqlens, self.rotary.on(tokens.device))
        if "attention" in self.config.mixers:
            positions = torch.arange(tokens.shape[1], dtype=torch.int32, device=tokens.device)
            if cu_seqlens is not None:
                lengths = cu_seqlens.diff()
                this.max_length = int(lengths.max())
                positions = positions - cu_seqlens[:-1].repeat_interleave(lengths)
            this.positions = positions.repeat(tokens.shape[0])
        return this

    @torch.no_grad()
    def extend(self, tokens: Tensor, cache: Cache, step: Step) -> Tensor:
        """Feed packed tokens to cached sequences; logits (rows, vocab) after each row's last token.

        tokens: (tokens) integers in the order of step.cu_seqlens, from `cache.step(slots, counts)`.
        Mutates the cache's pages and states at the step's slots. Nothing here waits for the device.
        """
        this = Pass(step.cu_seqlens, self.rotary.on(tokens.device), step=step)
        # F.embedding takes 14 us for up to 16 rows on CUDA, and this 2.
        h = self.embedding.weight[tokens][None]
        few = h.is_cuda and h.element_size() == 2 and h.shape[1] <= ops.FEW_ROWS
        delta = None  # what is to be added to h: with the norm behind it, or by the products of few rows
        for layer, cached in zip(self.layers, cache.layers, strict=True):
            if few:
                layer.mixer(Normed(h, layer.norm1), this, cached, onto=h)
                layer.mlp(Normed(h, layer.norm2), onto=h)
            else:
                delta = layer.mixer(layer.norm1.after(h, delta), this, cached)
                delta = layer.mlp(layer.norm2.after(h, delta))
        if step.decode:
            cache.count(step)
        else:
            ends = step.cu_seqlens[1:].long() - 1
            h, delta = h[:, ends], None if delta is None else delta[:, ends]
        return self.head(Normed(h, self.norm) if few else self.norm.after(h, delta))[0]
