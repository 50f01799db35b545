"""The tokenizer of models that start from nothing."""

import pytest
from transformers import AutoTokenizer

from reasoners.distill.tokenizer import build_tokenizer
from reasoners.llm import eos_token_ids

TEXTS = [
    f"Mia has {a} apples and buys {b} more. She has {a + b} apples."
    for a in range(30)
    for b in (7, 120)
]


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(TEXTS, 320)


@pytest.mark.parametrize(
    "text",
    ["Mia has 12 apples.", "  two  spaces\n\n#### 34\n", "λ → ∞, naïve 😀\t\x00", "", "1234567", "a1b22 c"],
)  # fmt: skip
def test_any_text_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_digits_stand_alone_and_words_do_not(tokenizer):
    tokens = tokenizer.tokenize("She has 120 apples.")
    assert tokens[-1] != "." or "Ġapples" in tokens
    assert [t for t in tokens if any(c.isdigit() for c in t)] == ["1", "2", "0"]
    assert len(tokens) <= 9


def test_the_template(tokenizer):
    chat = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]
    whole = tokenizer.apply_chat_template(chat, tokenize=False)
    assert whole == "<|user|>1+1?<|assistant|>2<|end|>"
    prompt = tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
    assert whole.startswith(prompt) and prompt == "<|user|>1+1?<|assistant|>"
    system = [{"role": "system", "content": "Be brief."}, *chat]
    text = tokenizer.apply_chat_template(system, tokenize=False)
    assert text == "<|user|>Be brief.\n\n1+1?<|assistant|>2<|end|>"


def test_the_same_texts_give_the_same_files(tokenizer, tmp_path):
    for name, made in (("a", tokenizer), ("b", build_tokenizer(TEXTS, 320))):
        made.save_pretrained(tmp_path / name)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    opened = AutoTokenizer.from_pretrained(tmp_path / "a")
    assert opened("Mia has 3.")["input_ids"] == tokenizer("Mia has 3.")["input_ids"]
    assert opened.decode(sorted(eos_token_ids(opened, tmp_path / "a"))) == "<|end|>"
    assert len(opened) == len(tokenizer) <= 320


def test_no_room_for_the_bytes():
    with pytest.raises(ValueError, match="vocab_size expected at least 260, got 100"):
        build_tokenizer(TEXTS, 100)
