import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from reasoners import checkpoint
from reasoners.checkpoint import (
    load_config,
    load_model,
    save_model,
    student_from_teacher,
)
from reasoners.model import CONFIGS, HybridLM

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def hf_llama(folder, *, tied=True, rope=None, shard="5GB"):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=100, hidden_size=48, intermediate_size=80, num_hidden_layers=3,
        num_attention_heads=6, num_key_value_heads=2, head_dim=16, tie_word_embeddings=tied,
        rope_theta=10000.0, rope_scaling=rope, rms_norm_eps=1e-5,
    )  # fmt: skip
    torch.manual_seed(1)
    model = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained(folder, max_shard_size=shard)
    return model


@pytest.fixture(params=["tiny-llama", "tiny-llamba", "tiny-mamba1", "tiny-mamba2"])
def tiny(request):
    torch.manual_seed(0)
    model = HybridLM(CONFIGS[request.param]).eval()
    # Every parameter random, so that a swapped or forgotten tensor shows.
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("rope", [None, LLAMA3_ROPE], ids=["plain rope", "llama3 rope"])
def test_logits_equal_transformers(tmp_path, tied, rope):
    theirs = hf_llama(tmp_path / "hf", tied=tied, rope=rope)
    ours = load_model(tmp_path / "hf")
    tokens = torch.randint(0, 100, (2, 200))
    with torch.no_grad():
        expected = theirs(tokens).logits
        torch.testing.assert_close(ours(tokens), expected, rtol=0, atol=2e-6)
        save_model(ours, tmp_path / "ours")
        again = type(theirs).from_pretrained(tmp_path / "ours")
        torch.testing.assert_close(again(tokens).logits, expected, rtol=0, atol=0)


def test_sharded_folder_both_ways(tmp_path, monkeypatch):
    theirs = hf_llama(tmp_path / "hf", shard="20KB")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 2
    ours = load_model(tmp_path / "hf")
    tokens = torch.arange(50)[None]
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=0, atol=2e-6)
    monkeypatch.setattr(checkpoint, "MAX_SHARD_BYTES", 20_000)
    save_model(ours, tmp_path / "ours")
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 2
    with torch.no_grad():
        torch.testing.assert_close(
            load_model(tmp_path / "ours")(tokens), ours(tokens), rtol=0, atol=0
        )
    monkeypatch.undo()
    save_model(ours, tmp_path / "ours")  # fewer shards over more: none of the old ones stays
    assert [p.name for p in (tmp_path / "ours").glob("*safetensors*")] == ["model.safetensors"]


def layouts_of(model):
    family = model.config.family
    return [name for name in checkpoint.LAYOUTS if name.removesuffix("-fused") == family]


def test_round_trip_of_every_layout(tiny, tmp_path):
    for layout in layouts_of(tiny):
        save_model(tiny, tmp_path / layout, layout)
        config, found = load_config(tmp_path / layout)
        assert (config, found) == (tiny.config, layout)
        again = load_model(tmp_path / layout).state_dict()
        for name, tensor in tiny.state_dict().items():
            assert torch.equal(tensor, again[name]), name


def test_published_names(tmp_path):
    """The split and fused names of MambaInLlama, and Llamba's, literally."""
    torch.manual_seed(0)
    expect = {
        ("tiny-mamba1", "mambainllama"): {
            "model.layers.0.mamba.in_proj_x.weight": (32, 96),
            "model.layers.0.mamba.C_proj.weight": (96, 96),
            "model.layers.0.mamba.dt_proj_down.weight": (6, 96),
            "model.layers.0.mamba.dt_proj.bias": (96,),
            "model.layers.0.mamba.conv1d.weight": (96, 1, 4),
            "model.layers.1.self_attn.k_proj.weight": (32, 96),
            "model.layers.0.mlp.up_proj.weight": (128, 96),
        },
        ("tiny-mamba1", "mambainllama-fused"): {
            "model.layers.0.mamba.in_proj.weight": (96 + 32 + 32 + 96 + 6, 96),
            "model.layers.1.mha.in_proj.weight": (160, 96),
            "model.layers.1.mha.out_proj.weight": (96, 96),
        },
        ("tiny-mamba2", "mambainllama"): {
            "model.layers.0.mamba.in_proj.weight": (96 + 32 + 32 + 96 + 6, 96),
            "model.layers.0.mamba.conv1d.weight": (160, 1, 4),
            "model.layers.0.mamba.norm.weight": (96,),
        },
        ("tiny-llamba", "llamba"): {
            "backbone.embedding.weight": (256, 96),
            "backbone.layers.3.mixer.in_proj.weight": (4 * 96 + 6, 96),
            "backbone.layers.3.mixer.z_bias": (96,),
            "backbone.layers.3.mixer.conv1d.weight": (288, 1, 4),
            "backbone.final_layernorm.weight": (96,),
        },
    }
    for (name, layout), shapes in expect.items():
        save_model(HybridLM(CONFIGS[name]), tmp_path / name / layout, layout)
        tensors = load_file(tmp_path / name / layout / "model.safetensors")
        for key, shape in shapes.items():
            assert tuple(tensors[key].shape) == shape, key
        assert "lm_head.weight" not in tensors


def test_llamba_vocabulary_is_padded_on_disk(tmp_path):
    config = CONFIGS["tiny-llamba"].__class__(**{**vars(CONFIGS["tiny-llamba"]), "vocab_size": 250})
    model = HybridLM(config)
    save_model(model, tmp_path)
    on_disk = load_file(tmp_path / "model.safetensors")["backbone.embedding.weight"]
    assert on_disk.shape[0] == 256
    assert torch.equal(load_model(tmp_path).embedding.weight, model.embedding.weight)


def test_half_precision_keeps_decay_parameters_wide(tmp_path):
    save_model(HybridLM(CONFIGS["tiny-mamba2"]), tmp_path)
    model = load_model(tmp_path, dtype=torch.bfloat16)
    assert model.layers[0].mixer.A_log.dtype == torch.float32
    assert model.layers[0].mixer.in_proj.weight.dtype == torch.bfloat16
    assert model.head.weight is model.embedding.weight


# ---- bad input


@pytest.fixture
def folder(tmp_path):
    save_model(HybridLM(CONFIGS["tiny-llamba"]), tmp_path / "model")
    return tmp_path / "model"


def edit_tensors(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def edit_config(folder, change, name="config.json"):
    data = json.loads((folder / name).read_text())
    change(data)
    (folder / name).write_text(json.dumps(data))


def test_no_such_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: expected a model folder"):
        load_model(tmp_path / "nowhere")


def test_folder_without_config(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_model(tmp_path)


NORM = "backbone.layers.2.input_layernorm.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(NORM), f"1 missing tensors .*{NORM}"),
        (lambda t: t.update(extra=torch.zeros(1)), "1 unexpected tensors .*extra"),
        (lambda t: t.update({NORM: torch.ones(95)}), rf"{NORM} expected shape \(96,\), got \(95,\)"),
        (lambda t: t[NORM].__setitem__(5, float("nan")), f"{NORM} holds NaN or infinity"),
        (lambda t: t[NORM].__setitem__(5, float("inf")), f"{NORM} holds NaN or infinity"),
    ],
    ids=["missing", "unexpected", "wrong shape", "nan", "inf"],
)  # fmt: skip
def test_bad_tensors(folder, change, words):
    edit_tensors(folder, change)
    with pytest.raises(ValueError, match=words):
        load_model(folder)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda c: c.pop("n_layer"), ValueError, "field 'n_layer' is missing"),
        (lambda c: c.update(d_model="96"), ValueError, "field 'd_model' expected int, got '96'"),
        (lambda c: c.update(d_model=True), ValueError, "field 'd_model' expected int, got True"),
        (lambda c: c["ssm_cfg"].update(activation="silu"), NotImplementedError, "'activation' expected"),
        (lambda c: c.update(model_type="gpt2"), NotImplementedError, "model_type expected .* got 'gpt2'"),
    ],
)  # fmt: skip
def test_bad_config(folder, change, error, words):
    edit_config(folder, change)
    with pytest.raises(error, match=words):
        load_model(folder)


def test_bad_hybrid_config(tmp_path):
    save_model(HybridLM(CONFIGS["tiny-mamba1"]), tmp_path)
    edit_config(tmp_path, lambda c: c.update(attn_layers=[9]), "mamba_config.json")
    with pytest.raises(ValueError, match=r"attn_layers.* expected layers below 4, got \[9\]"):
        load_model(tmp_path)


def test_torn_files(folder):
    (folder / "config.json").write_text('{"model_type": "lla')
    with pytest.raises(ValueError, match="expected JSON"):
        load_model(folder)


def test_torn_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match="expected a safetensors file"):
        load_model(folder)


def test_failed_save_leaves_the_old_folder(folder, monkeypatch):
    before = load_file(folder / "model.safetensors")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        save_model(HybridLM(CONFIGS["tiny-llamba"]), folder)
    after = load_file(folder / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_layout_of_another_family(tmp_path):
    with pytest.raises(ValueError, match="layout expected that of a llamba model, got 'llama'"):
        save_model(HybridLM(CONFIGS["tiny-llamba"]), tmp_path, "llama")


# ---- teacher -> student


@pytest.mark.parametrize("name", ["tiny-mamba1", "tiny-mamba2"])
def test_hybrid_starts_from_attention(name):
    teacher = HybridLM(CONFIGS["tiny-llama"])
    student = student_from_teacher(teacher, CONFIGS[name])
    old, new = teacher.layers[0].mixer, student.layers[0].mixer
    q, k, v = old.qkv_proj.weight.split((96, 32, 32))
    _, x, B, C, _ = new.in_proj.weight.split((96, 32, 32, 96, new.in_proj.weight.shape[0] - 256))
    assert torch.equal(x, v)
    assert torch.equal(B, k)
    assert torch.equal(C, q)
    assert torch.equal(new.out_proj.weight, old.out_proj.weight)
    assert torch.equal(
        student.layers[1].mixer.qkv_proj.weight, teacher.layers[1].mixer.qkv_proj.weight
    )
    assert torch.equal(
        student.layers[0].mlp.down_proj.weight, teacher.layers[0].mlp.down_proj.weight
    )
    assert torch.equal(student.embedding.weight, teacher.embedding.weight)
    assert student.head.weight is student.embedding.weight
    dt = torch.nn.functional.softplus(new.dt_bias if name == "tiny-mamba2" else new.dt_proj.bias)
    assert dt.min() >= 0.99e-3
    assert dt.max() <= 0.101


def test_llamba_starts_with_open_gate_and_identity_convolution():
    teacher = HybridLM(CONFIGS["tiny-llama"])
    mixer = student_from_teacher(teacher, CONFIGS["tiny-llamba"]).layers[2].mixer
    z_rows = mixer.in_proj.weight[96 + 2 * 96 :][:96]
    assert (z_rows == 0).all()
    gate = torch.nn.functional.silu(mixer.z_bias)
    torch.testing.assert_close(gate, torch.ones(96), rtol=0, atol=1e-6)
    assert torch.equal(mixer.conv.weight, torch.eye(4)[3].expand(288, 4))
    assert (mixer.D == 1).all()


def test_student_of_another_shape():
    teacher = HybridLM(CONFIGS["tiny-llama"])
    config = CONFIGS["tiny-llamba"].__class__(**{**vars(CONFIGS["tiny-llamba"]), "mlp_dim": 100})
    with pytest.raises(ValueError, match="mlp_dim expected 128 as in the teacher, got 100"):
        student_from_teacher(teacher, config)


def test_copy_tokenizer_takes_only_tokenizer_files(folder, tmp_path):
    (folder / "tokenizer.json").write_text("{}")
    target = tmp_path / "other"
    target.mkdir()
    checkpoint.copy_tokenizer(folder, target)
    assert [p.name for p in target.iterdir()] == ["tokenizer.json"]
    shutil.rmtree(target)


def test_smollm2_logits_equal_transformers():
    """The real weights, from the package that `make demo` and `make test` install."""
    transformers = pytest.importorskip("transformers")
    from reasoners.cli import smollm2_folder

    try:
        folder = smollm2_folder()
    except ImportError as error:
        pytest.skip(str(error))
    theirs = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = transformers.AutoTokenizer.from_pretrained(folder)(
        "Natalia sold clips to 48 of her friends in April, and then half as many in May. " * 5,
        return_tensors="pt",
    )["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(
            load_model(folder)(tokens), theirs(tokens).logits, rtol=0, atol=2e-4
        )
