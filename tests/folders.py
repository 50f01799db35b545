"""Tiny but whole model folders: weights, tokenizer, chat template."""

from dataclasses import replace

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from reasoners.checkpoint import save_model
from reasoners.model import CONFIGS, HybridLM

END = "<|end|>"
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and the end token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: i for i, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)
    fast.chat_template = TEMPLATE
    return fast


def make_folder(folder, name="tiny-llama"):
    """A model folder with random weights; returns it."""
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    save_model(HybridLM(replace(CONFIGS[name], vocab_size=len(tokenizer))), folder)
    tokenizer.save_pretrained(folder)
    return folder
