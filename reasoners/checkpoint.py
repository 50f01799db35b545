"""Model folders: names and layouts on disk to ours and back, and a student's start from its teacher.

A layout is a table of rows "our tensor = these tensors on disk, stacked", read in both directions, so
that loading and saving cannot drift apart. Every tensor must be there, have its shape, be finite, and
none may be left over. Layouts: "llama" (Hugging Face), "llamba", "mambainllama" (the published split
names) and "mambainllama-fused" (M1's names). Nothing needs the base model or a GPU.
"""

import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from reasoners.model import HybridLM, ModelConfig, RopeScaling, parameter_dtype

MAX_SHARD_BYTES = 4 * 2**30


@dataclass(frozen=True)
class Row:
    """One of our tensors and the tensors on disk that hold it, stacked along dimension 0.

    parts: (name, rows) pairs. shape: on disk, when it differs from ours in size-1 dimensions only.
    """

    ours: str
    parts: tuple[tuple[str, int], ...]
    shape: tuple[int, ...] | None = None


def _same(ours: str, theirs: str, rows: int) -> Row:
    return Row(ours, ((theirs, rows),))


def layout_rows(config: ModelConfig, layout: str) -> list[Row]:
    """The table of a layout for a model of this shape."""
    c, llamba, fused = config, layout == "llamba", layout == "mambainllama-fused"
    inner, kv, width = c.inner_dim, c.kv_dim, c.conv_width
    root, embedding, norm = "model", "embed_tokens", "norm"
    if llamba:
        root, embedding, norm = "backbone", "embedding", "final_layernorm"
    vocab = c.vocab_size
    rows = [_same("embedding.weight", f"{root}.{embedding}.weight", vocab)]
    for i, kind in enumerate(c.mixers):
        ours, disk = f"layers.{i}", f"{root}.layers.{i}"
        mixer = f"{ours}.mixer"

        def same(name, theirs, count, ours=ours, disk=disk):
            rows.append(_same(f"{ours}.{name}", f"{disk}.{theirs}", count))

        def stacked(name, *parts, ours=ours, disk=disk):
            named = tuple((f"{disk}.{theirs}", count) for theirs, count in parts)
            rows.append(Row(f"{ours}.{name}", named))

        def conv(prefix, channels, mixer=mixer, disk=disk):
            shape = (channels, 1, width)
            weight = f"{disk}.{prefix}.conv1d.weight"
            rows.append(Row(f"{mixer}.conv.weight", ((weight, channels),), shape))
            rows.append(_same(f"{mixer}.conv.bias", f"{disk}.{prefix}.conv1d.bias", channels))

        same("norm1.weight", "input_layernorm.weight", c.d_model)
        same("norm2.weight", "post_attention_layernorm.weight", c.d_model)
        stacked(
            "mlp.gate_up_proj.weight",
            ("mlp.gate_proj.weight", c.mlp_dim),
            ("mlp.up_proj.weight", c.mlp_dim),
        )
        same("mlp.down_proj.weight", "mlp.down_proj.weight", c.d_model)
        if kind == "attention" and fused:
            same("mixer.qkv_proj.weight", "mha.in_proj.weight", inner + 2 * kv)
            same("mixer.out_proj.weight", "mha.out_proj.weight", c.d_model)
        elif kind == "attention":
            stacked(
                "mixer.qkv_proj.weight",
                ("self_attn.q_proj.weight", inner),
                ("self_attn.k_proj.weight", kv),
                ("self_attn.v_proj.weight", kv),
            )
            same("mixer.out_proj.weight", "self_attn.o_proj.weight", c.d_model)
        elif kind == "discrete_mamba2":
            group = c.num_kv_heads * c.state_dim
            same("mixer.in_proj.weight", "mixer.in_proj.weight", 2 * (inner + group) + c.num_heads)
            same("mixer.z_bias", "mixer.z_bias", inner)
            same("mixer.D", "mixer.D", c.num_heads)
            same("mixer.out_proj.weight", "mixer.out_proj.weight", c.d_model)
            conv("mixer", inner + 2 * group)
        elif kind == "mamba2":
            same("mixer.in_proj.weight", "mamba.in_proj.weight", 2 * (inner + kv) + c.num_heads)
            for name in ("dt_bias", "A_log", "D"):
                same(f"mixer.{name}", f"mamba.{name}", c.num_heads)
            same("mixer.norm.weight", "mamba.norm.weight", inner)
            same("mixer.out_proj.weight", "mamba.out_proj.weight", c.d_model)
            conv("mamba", inner + 2 * kv)
        else:
            rank = -(-c.d_model // 16)
            sizes = {"in_proj_z": inner, "in_proj_x": kv, "B_proj": kv, "C_proj": inner}
            if fused:
                total = sum(sizes.values()) + rank
                same("mixer.in_proj.weight", "mamba.in_proj.weight", total)
            else:
                sizes["dt_proj_down"] = rank
                parts = ((f"mamba.{name}.weight", count) for name, count in sizes.items())
                stacked("mixer.in_proj.weight", *parts)
            for name in ("dt_proj.weight", "dt_proj.bias", "A_log", "D"):
                same(f"mixer.{name}", f"mamba.{name}", inner)
            same("mixer.out_proj.weight", "mamba.out_proj.weight", c.d_model)
            conv("mamba", inner)
    rows.append(_same("norm.weight", f"{root}.{norm}.weight", c.d_model))
    if not c.tie_embeddings:
        rows.append(_same("head.weight", "lm_head.weight", vocab))
    return rows


# ---- config.json


def _read_json(path: Path) -> dict:
    try:
        data = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: expected JSON, got {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(data).__name__}")
    return data


_REQUIRED = object()


def _field(data: dict, path: Path, name: str, kind: type | tuple, default=_REQUIRED):
    value = data.get(name)
    if value is None:
        if default is _REQUIRED:
            raise ValueError(f"{path}: field {name!r} is missing")
        return default
    wanted = kind if isinstance(kind, tuple) else (kind,)
    if not isinstance(value, wanted) or (isinstance(value, bool) and bool not in wanted):
        names = " or ".join(t.__name__ for t in wanted)
        raise ValueError(f"{path}: field {name!r} expected {names}, got {value!r}")
    return value


def _only(data: dict, path: Path, name: str, *allowed):
    if data.get(name) not in (None, *allowed):
        raise NotImplementedError(
            f"{path}: field {name!r} expected {' or '.join(map(repr, allowed))}, got {data[name]!r}"
        )


_NUMBER = (int, float)


def _read_llama_config(data: dict, path: Path) -> ModelConfig:
    _only(data, path, "attention_bias", False)
    _only(data, path, "mlp_bias", False)
    _only(data, path, "hidden_act", "silu")
    heads = _field(data, path, "num_attention_heads", int)
    d_model = _field(data, path, "hidden_size", int)
    # transformers 5 writes one rope_parameters, earlier versions rope_theta and rope_scaling.
    rope = _field(data, path, "rope_parameters", dict, None)
    if rope is None:
        rope = dict(_field(data, path, "rope_scaling", dict, {}))
        rope["rope_theta"] = _field(data, path, "rope_theta", _NUMBER, 10000.0)
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    scaling = None
    if rope_type == "llama3":
        scaling = RopeScaling(
            float(_field(rope, path, "factor", _NUMBER)),
            float(_field(rope, path, "low_freq_factor", _NUMBER)),
            float(_field(rope, path, "high_freq_factor", _NUMBER)),
            _field(rope, path, "original_max_position_embeddings", int),
        )
    elif rope_type != "default":
        raise NotImplementedError(
            f"{path}: rope_type expected 'default' or 'llama3', got {rope_type!r}"
        )
    return ModelConfig(
        vocab_size=_field(data, path, "vocab_size", int),
        d_model=d_model,
        mlp_dim=_field(data, path, "intermediate_size", int),
        mixers=("attention",) * _field(data, path, "num_hidden_layers", int),
        num_heads=heads,
        num_kv_heads=_field(data, path, "num_key_value_heads", int, heads),
        head_dim=_field(data, path, "head_dim", int, d_model // heads),
        norm_eps=float(_field(data, path, "rms_norm_eps", _NUMBER)),
        tie_embeddings=_field(data, path, "tie_word_embeddings", bool, False),
        rope_theta=float(_field(rope, path, "rope_theta", _NUMBER)),
        rope_scaling=scaling,
        max_length=_field(data, path, "max_position_embeddings", int, 131072),
    )


def _read_llamba_config(data: dict, path: Path) -> ModelConfig:
    ssm = _field(data, path, "ssm_cfg", dict)
    mlp = _field(data, path, "mlp_cfg", dict)
    _only(data, path, "lm_head_bias", False)
    _only(mlp, path, "bias", False)
    _only(mlp, path, "act_fn", "silu")
    _only(ssm, path, "bias", False)
    _only(ssm, path, "activation", "identity")
    _only(ssm, path, "expand", 1)
    d_model = _field(data, path, "d_model", int)
    heads = _field(ssm, path, "n_v_heads", int)
    return ModelConfig(
        vocab_size=_field(data, path, "vocab_size", int),
        d_model=d_model,
        mlp_dim=_field(mlp, path, "intermediate_size", int),
        mixers=("discrete_mamba2",) * _field(data, path, "n_layer", int),
        num_heads=heads,
        num_kv_heads=_field(ssm, path, "n_qk_heads", int, heads),
        head_dim=d_model // heads,
        state_dim=_field(ssm, path, "d_state", int),
        conv_width=_field(ssm, path, "d_conv", int, 4),
        norm_eps=float(_field(data, path, "norm_epsilon", _NUMBER)),
        tie_embeddings=_field(data, path, "tie_embeddings", bool),
    )


def _read_hybrid_config(base: ModelConfig, data: dict, path: Path, kind: str) -> ModelConfig:
    ssm = _field(data, path, "ssm_cfg", dict, {})
    _only(ssm, path, "expand", 1)
    layers = _field(data, path, "n_layer", int, len(base.mixers))
    if layers != len(base.mixers):
        raise ValueError(
            f"{path}: field 'n_layer' expected {len(base.mixers)} as in config.json, got {layers}"
        )
    for name, value in (
        ("d_model", base.d_model),
        ("d_inner", base.inner_dim),
        ("d_xb", base.kv_dim),
    ):
        if _field(data, path, name, int, value) != value:
            raise ValueError(f"{path}: field {name!r} expected {value}, got {data[name]}")
    keep = _field(data, path, "attn_layers", list)
    if not all(isinstance(i, int) and 0 <= i < layers for i in keep):
        raise ValueError(f"{path}: field 'attn_layers' expected layers below {layers}, got {keep}")
    return ModelConfig(
        **{
            **vars(base),
            "mixers": tuple("attention" if i in keep else kind for i in range(layers)),
            "state_dim": _field(
                ssm, path, "d_state", int, 16 if kind == "mamba1" else base.head_dim
            ),
            "conv_width": _field(ssm, path, "d_conv", int, 4),
        }
    )


def load_config(folder: str | os.PathLike) -> tuple[ModelConfig, str]:
    """The ModelConfig of a model folder and the layout of its tensors.

    Raises FileNotFoundError for no such folder or file, ValueError for a missing or wrong field,
    NotImplementedError for an architecture feature that no model here has.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: expected a model folder, there is none")
    path = folder / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"{path}: a model folder has a config.json, this one has none")
    data = _read_json(path)
    hybrid = folder / "mamba_config.json"
    if data.get("model_type") == "llamba":
        return _read_llamba_config(data, path), "llamba"
    if hybrid.exists():
        names = _Tensors(folder).names()
        kind = "mamba2" if any(n.endswith("mamba.dt_bias") for n in names) else "mamba1"
        split = any("mamba.in_proj_x." in n for n in names) or any(
            ".self_attn." in n for n in names
        )
        config = _read_hybrid_config(
            _read_llama_config(data, path), _read_json(hybrid), hybrid, kind
        )
        return config, "mambainllama" if split else "mambainllama-fused"
    if data.get("model_type") == "llama":
        return _read_llama_config(data, path), "llama"
    raise NotImplementedError(
        f"{path}: model_type expected 'llama' or 'llamba', or a mamba_config.json beside it, got "
        f"{data.get('model_type')!r}"
    )


def config_files(config: ModelConfig, layout: str) -> dict[str, dict]:
    """File name -> content of the configuration files of a layout."""
    if layout == "llamba":
        mlp = {"intermediate_size": config.mlp_dim, "bias": False, "act_fn": "silu"}
        ssm = {
            "d_state": config.state_dim,
            "n_v_heads": config.num_heads,
            "n_qk_heads": config.num_kv_heads,
            "expand": 1,
            "chunk_size": 128,
            "activation": "identity",
            "bias": False,
        }
        data = {
            "model_type": "llamba",
            "vocab_size": config.vocab_size,
            "tie_embeddings": config.tie_embeddings,
            "pad_vocab_size_multiple": 8,
            "lm_head_bias": False,
            "d_model": config.d_model,
            "n_layer": len(config.mixers),
            "resid_dropout": 0.0,
            "norm_epsilon": config.norm_eps,
            "mlp_cfg": mlp,
            "ssm_cfg": ssm,
        }
        return {"config.json": data}
    scaling = config.rope_scaling
    data = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.mlp_dim,
        "num_hidden_layers": len(config.mixers),
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling
        and {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_length,
        },
        "max_position_embeddings": config.max_length,
    }
    if layout == "llama":
        return {"config.json": data}
    kinds = set(config.mixers) - {"attention"}
    ssm = {"expand": 1}
    if kinds == {"mamba2"}:
        ssm |= {"ngroups": config.num_heads, "d_state": config.state_dim}
    hybrid = {
        "d_model": config.d_model,
        "ssm_cfg": ssm,
        "rms_norm_eps": config.norm_eps,
        "vocab_size": config.vocab_size,
        "d_inner": config.inner_dim,
        "d_xb": config.kv_dim,
        "intermediate_size": config.mlp_dim,
        "hidden_act": "silu",
        "n_layer": len(config.mixers),
        "attn_layers": [i for i, kind in enumerate(config.mixers) if kind == "attention"],
    }
    return {"config.json": data, "mamba_config.json": hybrid}


# ---- tensors


class _Tensors:
    """The tensors of a folder by name, read one at a time from its safetensors files."""

    def __init__(self, folder: Path):
        index = folder / "model.safetensors.index.json"
        if index.exists():
            files = sorted(set(_field(_read_json(index), index, "weight_map", dict).values()))
        else:
            files = sorted(p.name for p in folder.glob("*.safetensors"))
        if not files:
            raise FileNotFoundError(f"{folder}: expected *.safetensors files, there are none")
        self._where = {}
        for name in files:
            path = folder / name
            if not path.exists():
                raise FileNotFoundError(f"{path}: named by {index.name}, there is none")
            try:
                handle = safe_open(path, framework="pt")
            except SafetensorError as error:
                raise ValueError(f"{path}: expected a safetensors file, got {error}") from error
            for key in handle.keys():  # noqa: SIM118, a handle is no mapping
                self._where[key] = (path, handle)

    def names(self) -> set[str]:
        return set(self._where)

    def path(self, name: str) -> Path:
        return self._where[name][0]

    def read(self, name: str) -> Tensor:
        return self._where[name][1].get_tensor(name)


def load_model(
    folder: str | os.PathLike,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> HybridLM:
    """The model of a folder, whichever layout it is in.

    Raises FileNotFoundError for a missing folder or file; ValueError for a missing or wrong config
    field, a missing, unexpected or wrong-shaped tensor, and for NaN or infinite weights, each named.
    """
    folder = Path(folder)
    config, layout = load_config(folder)
    tensors = _Tensors(folder)
    rows = layout_rows(config, layout)
    wanted = {name for row in rows for name, _ in row.parts}
    # Buffers that some exporters write; they follow from config.json.
    present = {n for n in tensors.names() if not n.endswith("rotary_emb.inv_freq")}
    if config.tie_embeddings:
        present.discard("lm_head.weight")
    for words, names in (("missing", wanted - present), ("unexpected", present - wanted)):
        if names:
            shown = ", ".join(sorted(names)[:5]) + (", ..." if len(names) > 5 else "")
            raise ValueError(f"{folder}: {len(names)} {words} tensors ({layout} layout): {shown}")

    with torch.device("meta"):
        model = HybridLM(config)
    shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    state = {}
    for row in rows:
        want = row.shape or shapes[row.ours]
        parts = []
        for name, count in row.parts:
            tensor = tensors.read(name)
            expected = (count, *want[1:])
            padded = row.ours in ("embedding.weight", "head.weight") and tensor.dim() == 2
            if padded and layout == "llamba" and tensor.shape[0] == -(-count // 8) * 8:
                tensor = tensor[:count]  # the vocabulary is padded to a multiple of 8 on disk
            if tuple(tensor.shape) != expected:
                raise ValueError(
                    f"{tensors.path(name)}: tensor {name} expected shape {expected}, got "
                    f"{tuple(tensor.shape)}"
                )
            if not torch.isfinite(tensor).all():
                raise ValueError(f"{tensors.path(name)}: tensor {name} holds NaN or infinity")
            parts.append(tensor)
        tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
        tensor = tensor.reshape(shapes[row.ours])
        state[row.ours] = tensor.to(device=device, dtype=parameter_dtype(row.ours, dtype))
    return model.assign(state).eval()


def save_model(model: HybridLM, folder: str | os.PathLike, layout: str | None = None):
    """Write a model folder in its family's layout, or in `layout`; all of it or nothing.

    layout: "llama", "llamba", "mambainllama", "mambainllama-fused"; None for the family's own.
    The files are written beside the target and moved in when complete; other files there, such as the
    tokenizer's, stay. Raises ValueError when the layout cannot hold the model.
    """
    family = model.config.family
    layout = layout or family
    if layout.removesuffix("-fused") != family:
        raise ValueError(f"save_model: layout expected that of a {family} model, got {layout!r}")
    if layout not in LAYOUTS:
        raise ValueError(f"save_model: layout expected one of {LAYOUTS}, got {layout!r}")
    folder = Path(folder)
    ours = model.state_dict()
    shards, size = [{}], 0
    for row in layout_rows(model.config, layout):
        tensor = ours[row.ours].detach().cpu()
        if row.shape:
            tensor = tensor.reshape(row.shape)
        if layout == "llamba" and row.ours in ("embedding.weight", "head.weight"):
            tensor = torch.nn.functional.pad(tensor, (0, 0, 0, -tensor.shape[0] % 8))
        counts = [count for _, count in row.parts]
        pieces = tensor.split(counts) if len(counts) > 1 else [tensor]
        for (name, _), piece in zip(row.parts, pieces, strict=True):
            num_bytes = piece.numel() * piece.element_size()
            if shards[-1] and size + num_bytes > MAX_SHARD_BYTES:
                shards.append({})
                size = 0
            shards[-1][name] = piece.contiguous()
            size += num_bytes

    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as scratch:
        written = []
        weight_map = {}
        for i, shard in enumerate(shards):
            name = "model.safetensors"
            if len(shards) > 1:
                name = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
            save_file(shard, Path(scratch, name), metadata={"format": "pt"})
            weight_map |= dict.fromkeys(shard, name)
            written.append(name)
        files = config_files(model.config, layout)
        if len(shards) > 1:
            total = sum(t.numel() * t.element_size() for shard in shards for t in shard.values())
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            files["model.safetensors.index.json"] = index
        for name, data in files.items():
            Path(scratch, name).write_text(json.dumps(data, indent=2) + "\n")
            written.append(name)
        for name in written:
            os.replace(Path(scratch, name), folder / name)
        for stale in [*folder.glob("model*.safetensors"), folder / "model.safetensors.index.json"]:
            if stale.exists() and stale.name not in written:
                stale.unlink()


LAYOUTS = ("llama", "llamba", "mambainllama", "mambainllama-fused")

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)


def copy_tokenizer(source: str | os.PathLike, target: str | os.PathLike):
    """Copy the tokenizer's files, as they are, from one model folder to another."""
    for name in TOKENIZER_FILES:
        if Path(source, name).exists():
            shutil.copyfile(Path(source, name), Path(target, name))


# ---- teacher -> student


@torch.no_grad()
def student_from_teacher(teacher: HybridLM, config: ModelConfig) -> HybridLM:
    """A student that starts from its teacher's weights; models.md calls this the initialisation.

    Embedding, head, norms, MLPs and kept attention layers are copied. MambaInLlama: v_proj becomes x,
    k_proj B, q_proj C, and o_proj out_proj; z, dt, convolution, A and D are fresh. Llamba: the mixer
    is fresh, its gate and convolution start as the identity. Fresh weights use torch's generator.

    Raises ValueError where the shapes of teacher and student do not match.
    """
    ours = teacher.config
    for name in ("vocab_size", "d_model", "mlp_dim", "tie_embeddings"):
        if getattr(ours, name) != getattr(config, name):
            raise ValueError(
                f"student_from_teacher: {name} expected {getattr(ours, name)} as in the teacher, got "
                f"{getattr(config, name)}"
            )
    if len(ours.mixers) != len(config.mixers):
        raise ValueError(
            f"student_from_teacher: layers expected {len(ours.mixers)}, got {len(config.mixers)}"
        )
    if ours.family != "llama":
        raise ValueError(f"student_from_teacher: teacher expected a llama, got {ours.family}")
    heads = ("num_heads", "num_kv_heads", "head_dim")
    if config.family == "mambainllama" and any(
        getattr(ours, h) != getattr(config, h) for h in heads
    ):
        raise ValueError("student_from_teacher: a hybrid expected the teacher's heads")

    student = HybridLM(config)
    state, source = student.state_dict(), teacher.state_dict()
    inner, kv = ours.inner_dim, ours.kv_dim
    for name, tensor in state.items():
        if ".mixer." not in name or config.mixers[int(name.split(".")[1])] == "attention":
            tensor.copy_(source[name])
    for i, kind in enumerate(config.mixers):
        if kind not in ("mamba1", "mamba2"):
            continue
        prefix = f"layers.{i}.mixer"
        q, k, v = source[f"{prefix}.qkv_proj.weight"].split((inner, kv, kv))
        # Both kinds order their rows z, x, B, C, dt.
        state[f"{prefix}.in_proj.weight"][inner : 2 * (inner + kv)] = torch.cat((v, k, q))
        state[f"{prefix}.out_proj.weight"].copy_(source[f"{prefix}.out_proj.weight"])
    fine = {name: t.to(parameter_dtype(name, teacher.dtype)) for name, t in state.items()}
    return student.assign(fine).to(teacher.device)


def load_tokenizer(source):
    """A transformers tokenizer from a folder; a tokenizer or None is returned as it is."""
    if source is None or not isinstance(source, str | Path):
        return source
    from transformers import AutoTokenizer
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it would warn of a config.json whose model it does not know
    try:
        return AutoTokenizer.from_pretrained(source, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"{source}: expected a tokenizer's files, got: {error}") from error
    finally:
        logging.set_verbosity(verbosity)
