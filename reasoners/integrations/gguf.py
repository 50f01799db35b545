"""GGUF files of Llama-architecture models to a model folder, through transformers' reader."""

import json
import os
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file


def convert_gguf(source: str | os.PathLike, folder: str | os.PathLike) -> Path:
    """Dequantise `source` (*.gguf) to a Hugging Face Llama folder with its tokenizer.

    folder: made whole or not at all; must not exist. Weights are stored in bfloat16; its
    rounding is far below the step of a quantised file. Returns the folder.

    Raises FileNotFoundError for no such file, FileExistsError for an existing folder, ImportError
    naming the missing packages.
    """
    source, folder = Path(source), Path(folder)
    if not source.is_file():
        raise FileNotFoundError(f"{source}: expected a GGUF file, there is none")
    if folder.exists():
        raise FileExistsError(f"{folder}: expected no such folder yet")
    try:
        import accelerate  # noqa: F401  transformers' reader needs both
        import gguf  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "reading GGUF needs two more packages: pip install 'distilled-reasoners[demo]'"
        ) from error
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    where = {"pretrained_model_name_or_path": source.parent, "gguf_file": source.name}
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(**where)
    drop = {"quantization_config", "architectures"}
    config = model.config.to_dict()
    config = {k: v for k, v in config.items() if not k.startswith("_") and k not in drop}
    if config.get("model_type") != "llama":
        raise ValueError(f"{source}: model_type expected 'llama', got {config.get('model_type')!r}")

    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".converting-") as scratch:
        made = Path(scratch, "model")
        tokenizer.save_pretrained(made)
        tensors = {n: t.to(torch.bfloat16).contiguous() for n, t in model.state_dict().items()}
        if config.get("tie_word_embeddings"):
            tensors.pop("lm_head.weight", None)
        save_file(tensors, made / "model.safetensors", metadata={"format": "pt"})
        (made / "config.json").write_text(json.dumps(config, indent=2, default=str) + "\n")
        generation = {
            "eos_token_id": tokenizer.eos_token_id,
            "bos_token_id": tokenizer.bos_token_id,
        }
        (made / "generation_config.json").write_text(json.dumps(generation) + "\n")
        os.rename(made, folder)
    return folder
