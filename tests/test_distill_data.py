"""Training data: what is learned of an example, packing, order, and going on in the middle."""

import itertools
import json
import pickle
import sys
import types

import pytest
import torch
from folders import END, byte_tokenizer
from test_model import random_model
from tokenizers import processors

from reasoners.distill.data import (
    Batch,
    Batches,
    Example,
    Generated,
    Hub,
    Records,
    example_from_record,
    open_source,
    tokenize,
)
from reasoners.llm import LLM


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def chat(*contents):
    roles = itertools.cycle(("user", "assistant"))
    return Example(tuple({"role": r, "content": c} for r, c in zip(roles, contents)))


def learned(example, tokenizer):
    ((tokens, counted),) = tokenize([example], tokenizer)
    return tokenizer.decode(tokens), tokenizer.decode([t for t, c in zip(tokens, counted) if c])


# ---- examples and tokens


@pytest.mark.parametrize(
    "record",
    [
        {"problem": "1+1?", "generated_solution": "2", "expected_answer": "2", "problem_source": "x"},
        {"problem": " 1+1?\n", "solution": "2", "answer": "3"},
        {"question": "1+1?", "answer": "2"},
        {"messages": [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]},
    ],
)  # fmt: skip
def test_records_of_many_names(record):
    assert list(example_from_record(record).messages) == list(chat("1+1?", "2").messages)


def test_the_instruction_follows_the_question_as_in_sampling():
    from reasoners.scaling import TASKS, Problem, messages

    task = TASKS["gsm8k"]
    asked = messages(task, Problem("x", "1+1?", "2"))
    example = example_from_record({"question": "1+1?", "answer": "2"}, task.instruction)
    assert example.messages[0] == asked[0]


def test_a_record_of_unknown_fields():
    with pytest.raises(ValueError, match=r"expected fields problem and .*, got prompt, reply"):
        example_from_record({"prompt": "a", "reply": "b"})


@pytest.mark.parametrize(
    "message", ["2", {"role": "user"}, {"content": "2"}, {"role": "assistant", "content": None}]
)
def test_messages_that_are_none(message):
    with pytest.raises(ValueError, match="expected messages with a role and a content of text"):
        example_from_record({"messages": [{"role": "user", "content": "1+1?"}, message]})


def test_the_assistants_tokens_are_learned_to_the_end_of_the_turn(tokenizer):
    whole, counted = learned(chat("1+1?", "2", "and 2+2?", "4"), tokenizer)
    assert whole == f"<|user|>1+1?{END}<|assistant|>2{END}<|user|>and 2+2?{END}<|assistant|>4{END}"
    assert counted == f"2{END}4{END}"


def test_an_end_is_appended_where_the_template_has_none(tokenizer):
    bare = byte_tokenizer()
    bare.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    assert learned(chat("1+1?", "2"), bare) == (f"user: 1+1?\nassistant: 2\n{END}", f"2\n{END}")
    # Only at the very end: within a conversation sampling puts none there either.
    long = chat("1+1?", "2", "and 2+2?", "4")
    assert learned(long, bare)[1] == f"2\n4\n{END}"
    prompt = LLM.encode_chat(types.SimpleNamespace(tokenizer=bare), long.messages[:3])
    assert tokenize([long], bare)[0][0][: len(prompt)] == prompt


def test_what_follows_the_end_is_not_learned():
    loud = byte_tokenizer()
    loud.chat_template = loud.chat_template.replace("<|end|>", "<|end|>\n")
    whole, counted = learned(chat("1+1?", "2"), loud)
    assert whole.endswith(f"2{END}\n")
    assert counted == f"2{END}"
    # An answer that mentions the end itself goes on.
    assert learned(chat("1+1?", f"2{END}3"), loud)[1] == f"2{END}3{END}"


@pytest.mark.parametrize("text", ["abc", f"abc{END}def", f"{END}abc"])
def test_a_text_is_learned_whole(text, tokenizer):
    assert learned(Example(text=text), tokenizer) == (text + END, text + END)


def test_a_text_that_ends_gets_no_second_end(tokenizer):
    assert learned(Example(text=f"abc{END}"), tokenizer)[0] == f"abc{END}"
    assert tokenize([Example(text="")], tokenizer) == [([], [])]


def test_a_text_begins_as_in_sampling():
    beginning = byte_tokenizer()
    beginning.add_special_tokens({"bos_token": "<|begin|>"})
    beginning.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", beginning.bos_token_id)]
    )
    example = Example(text="abc")
    prompt = LLM.encode(types.SimpleNamespace(tokenizer=beginning), "abc")
    assert prompt[0] == beginning.bos_token_id
    (text, conversation) = tokenize([example, chat("1+1?", "2")], beginning)
    assert text[0] == [*prompt, beginning.eos_token_id]
    assert beginning.bos_token_id not in conversation[0]  # the template's own affair


def test_prompts_are_those_of_sampling(tokenizer):
    model = random_model("tiny-llama", torch.float32)
    example = chat("1+1?", "2")
    prompt = LLM(model, tokenizer, device="cpu").encode_chat(example.messages[:1])
    ((tokens, counted),) = tokenize([example], tokenizer)
    assert tokens[: len(prompt)] == prompt
    assert counted.index(True) == len(prompt)


def test_templates_that_cannot_be_cut(tokenizer):
    forgetful = byte_tokenizer()
    forgetful.chat_template = "{{ messages[-1].content }}"
    with pytest.raises(ValueError, match="chat template expected to write the messages one after"):
        tokenize([chat("1+1?", "2")], forgetful)
    forgetful.chat_template = None
    with pytest.raises(ValueError, match="needs a tokenizer with a chat template"):
        tokenize([chat("1+1?", "2")], forgetful)


# ---- sources


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "sums.jsonl"
    lines = [json.dumps({"question": f"{i}?", "answer": "x" * (1 + i * 7 % 40)}) for i in range(23)]
    path.write_text("\n".join(lines[:10]) + "\n\n" + "\n".join(lines[10:]))
    return path


def questions(source, start, count):
    return [source.example(i).messages[0]["content"] for i in range(start, start + count)]


def test_every_epoch_has_every_record_in_its_own_order(file):
    source = Records([file], seed=3)
    first, second = questions(source, 0, 23), questions(source, 23, 23)
    assert sorted(first) == sorted(second) == sorted(f"{i}?" for i in range(23))
    assert first != second
    assert questions(Records([file], seed=3), 0, 46) == first + second
    assert questions(Records([file], seed=4), 0, 23) != first


def test_a_json_list_is_a_file_of_records(file, tmp_path):
    rows = [json.loads(line) for line in file.read_text().split("\n") if line]
    (tmp_path / "sums.json").write_text(json.dumps(rows))
    source = open_source(str(tmp_path / "sums.json"), 3)
    assert questions(source, 0, 23) == questions(Records([file], seed=3), 0, 23)


def test_several_files_are_shuffled_as_one(file, tmp_path):
    rows = [json.loads(line) for line in file.read_text().split("\n") if line]
    for name, part in (("a", rows[:9]), ("b", []), ("c", rows[9:])):
        (tmp_path / f"part-{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in part))
    source = open_source(str(tmp_path / "part-*.jsonl"), 3)
    assert questions(source, 0, 46) == questions(Records([file], seed=3), 0, 46)
    assert source.name == "part-a.jsonl and 2 more, 23 records, seed 3"
    (tmp_path / "part-d.jsonl").write_text("\n{")
    with pytest.raises(ValueError, match=r"part-d\.jsonl, line 2: expected JSON"):
        questions(open_source(str(tmp_path / "part-*.jsonl"), 3), 0, 24)


def test_a_list_that_is_no_text_names_the_file(tmp_path):
    (tmp_path / "bad.json").write_bytes(b'["\xff"]')
    with pytest.raises(ValueError, match=r"bad\.json: expected JSON, got .*utf-8"):
        open_source(str(tmp_path / "bad.json"), 0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"question": "a", "answer": "b"}\n{"question": ', r"bad\.jsonl, line 2: expected JSON"),
        ('\n[1]\n', r"bad\.jsonl, line 2: expected a JSON object, got list"),
        ('{"prompt": "a"}', r"bad\.jsonl, line 1: record expected fields .*, got prompt"),
        ("\n\n", r"bad\.jsonl: expected at least one record, got none"),
    ],
)  # fmt: skip
def test_bad_files_name_the_line(tmp_path, content, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        questions(Records([path], seed=0), 0, 2)


def test_no_such_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected a file of records, there is none"):
        open_source(str(tmp_path / "none.jsonl"), 0)


class FakeStream:
    """What `datasets` gives for streaming=True: iterable, shuffled anew in every epoch."""

    def __init__(self, rows):
        self.rows, self.epoch = rows, 0

    def shuffle(self, seed, buffer_size):
        return self

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        turn = self.epoch * 5 % len(self.rows)
        return iter(self.rows[turn:] + self.rows[:turn])


@pytest.fixture
def hub(monkeypatch):
    rows = [{"problem": f"{i}?", "generated_solution": "y" * (1 + i * 5 % 30)} for i in range(17)]
    fake = types.SimpleNamespace(load_dataset=lambda *a, **k: FakeStream(rows))
    monkeypatch.setitem(sys.modules, "datasets", fake)


def test_the_hub_is_streamed_over_and_over(hub):
    source = open_source("someone/sums", 0)
    assert isinstance(source, Hub)
    found = questions(source, 0, 40)
    assert sorted(found[:17]) == sorted(found[17:34])
    assert found[:17] != found[17:34]
    assert questions(open_source("someone/sums", 0), 20, 10) == found[20:30]
    assert questions(source, 3, 2) == found[3:5]
    # Another process reads a stream of its own.
    assert questions(pickle.loads(pickle.dumps(source)), 3, 2) == found[3:5]


def test_a_dataset_with_its_configuration(monkeypatch):
    asked = []

    def load_dataset(*names, **options):
        asked.append((names, options))
        return FakeStream([{"text": "a"}])

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    open_source("openai/gsm8k:main", 0)
    open_source("someone/sums", 0)
    streamed = {"split": "train", "streaming": True}
    assert asked == [(("openai/gsm8k", "main"), streamed), (("someone/sums", None), streamed)]


def test_the_hub_needs_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'distilled-reasoners\[datasets\]'"):
        open_source("someone/sums", 0)


# ---- packing


def made_up(index):
    return chat(f"{index}?", "z" * (1 + index * 11 % 50))


def documents(batch):
    bounds = batch.cu_seqlens.tolist()
    return [batch.tokens[0, a:b].tolist() for a, b in itertools.pairwise(bounds)]


def test_documents_stay_whole_and_none_is_lost(tokenizer):
    batches = Batches(Generated("made up", made_up), tokenizer, length=128)
    found = []
    for _ in range(6):
        batch = batches.take(4)
        assert batch.tokens.shape == (1, 512) and batch.num_sequences == 4
        assert set(range(0, 513, 128)) <= set(batch.cu_seqlens.tolist())
        found += [d for d, a in zip(documents(batch), batch.cu_seqlens.tolist()) if batch.real[a]]
        assert 0.9 * 512 < batch.num_tokens <= 512
        assert not batch.tokens[0, ~batch.real].any()
    assert batches.padding_share == pytest.approx(1 - sum(map(len, found)) / (6 * 512))
    expected = [
        t for t, _ in tokenize([made_up(i) for i in range(batches.num_examples)], tokenizer)
    ]
    still_open = [list(ids) for sequence in batches.open for ids, _ in sequence]
    assert sorted(found + still_open) == sorted(expected)


def test_targets_are_the_tokens_before_learned_ones(tokenizer):
    batch = Batches(Generated("made up", made_up), tokenizer, length=128).take(3)
    expected = []
    for start, tokens in zip(batch.cu_seqlens.tolist(), documents(batch)):
        if batch.real[start]:
            text = tokenizer.decode(tokens)
            (index,) = [i for i in range(200) if text.startswith(f"<|user|>{i}?")]
            counted = tokenize([made_up(index)], tokenizer)[0][1]
            expected += [start + i - 1 for i, c in enumerate(counted) if c]
    assert batch.targets.tolist() == expected
    assert torch.equal(batch.labels, batch.tokens[0, batch.targets + 1])


def texts(*lengths):
    """Documents of these lengths, the end included, over and over."""
    return Generated("texts", lambda i: Example(text="x" * (lengths[i % len(lengths)] - 1)))


def test_a_document_goes_where_it_fits_best(tokenizer):
    batch = Batches(texts(4, 7, 3), tokenizer, length=10).take(1)
    assert batch.cu_seqlens.tolist() == [0, 7, 10]


def test_no_document_learns_the_first_token_of_the_next(tokenizer):
    batch = Batches(texts(4, 6), tokenizer, length=10).take(2)
    assert batch.cu_seqlens.tolist() == [0, 4, 10, 14, 20]
    assert batch.targets.tolist() == [0, 1, 2, 4, 5, 6, 7, 8, 10, 11, 12, 14, 15, 16, 17, 18]


def test_a_long_document_is_cut(tokenizer):
    batches = Batches(Generated("long", lambda i: chat("?", "z" * 300)), tokenizer, length=64)
    batch = batches.take(2)
    assert (batches.num_cut, batch.num_tokens, batch.cu_seqlens.tolist()) == (2, 128, [0, 64, 128])


def test_examples_with_nothing_to_learn_are_left_out(tokenizer):
    def every_third(index):
        return chat("?" * (100 if index % 3 else 1), "z")

    batches = Batches(Generated("long prompts", every_third), tokenizer, length=64)
    assert batches.take(2).targets.numel() > 0
    assert batches.num_empty == pytest.approx(2 * batches.num_examples / 3, abs=2)
    never = Batches(Generated("only prompts", lambda i: chat("?" * 100, "z")), tokenizer, length=64)
    with pytest.raises(
        ValueError, match="an assistant's tokens within the first 64, got 1000 without"
    ):
        never.take(1)


def test_cut_and_put_together(tokenizer):
    batch = Batches(Generated("made up", made_up), tokenizer, length=128).take(6)
    for parts in (1, 2, 3, 6):
        cut = batch.split(parts)
        width = 768 // parts
        assert torch.equal(torch.cat([part.tokens for part in cut], 1), batch.tokens)
        targets = torch.cat([part.targets + i * width for i, part in enumerate(cut)])
        assert torch.equal(targets, batch.targets)
        assert torch.equal(torch.cat([part.labels for part in cut]), batch.labels)
        assert [d for part in cut for d in documents(part)] == documents(batch)
        assert sum(part.num_tokens for part in cut) == batch.num_tokens
        assert {part.num_sequences for part in cut} == {6 // parts}
    for parts in (4, 0):
        with pytest.raises(ValueError, match=f"expected to divide 6 sequences, got {parts}"):
            batch.split(parts)


def test_sequences_with_no_room(tokenizer):
    with pytest.raises(ValueError, match="length expected at least 2, got 1"):
        Batches(Generated("made up", made_up), tokenizer, length=1)


def test_a_state_stays_as_it_was(tokenizer):
    batches = Batches(Generated("made up", made_up), tokenizer, length=128)
    batches.take(1)
    state = batches.state_dict()
    before = json.dumps(state)
    batches.take(4)
    assert json.dumps(state) == before


@pytest.mark.parametrize("kind", ["generated", "file", "hub"])
def test_going_on_in_the_middle(kind, file, hub, tokenizer):
    def fresh():
        if kind == "generated":
            source = Generated("made up", made_up)
        else:
            source = open_source(str(file) if kind == "file" else "someone/sums", 1)
        return Batches(source, tokenizer, length=96)

    whole = fresh()
    expected = [whole.take(2) for _ in range(7)]
    for stop in range(7):
        first, second = fresh(), fresh()
        for _ in range(stop):
            first.take(2)
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        for batch in expected[stop:]:
            found = second.take(2)
            assert all(
                torch.equal(getattr(found, n), getattr(batch, n))
                for n in ("tokens", "cu_seqlens", "targets", "labels", "real")
            )
        assert json.dumps(second.state_dict()) == json.dumps(whole.state_dict())


def test_other_processes_tokenize_the_same(file, tokenizer):
    alone = Batches(Records([file], 1), tokenizer, length=96)
    helped = Batches(Records([file], 1), tokenizer, length=96, processes=2)
    try:
        for _ in range(20):  # more than one chunk of documents
            expected, found = alone.take(2), helped.take(2)
            assert torch.equal(found.tokens, expected.tokens)
            assert torch.equal(found.targets, expected.targets)
        state = alone.state_dict()
        expected = alone.take(2)
        for _ in range(30):
            helped.take(2)
        helped.load_state_dict(state)  # back
        assert torch.equal(helped.take(2).tokens, expected.tokens)
        for _ in range(60):
            alone.take(2)
        assert alone.next_example - helped.next_example > 2 * 64
        helped.load_state_dict(alone.state_dict())  # ahead by whole chunks
        assert torch.equal(helped.take(2).tokens, alone.take(2).tokens)
    finally:
        helped.close()


def test_errors_come_back_from_other_processes(tmp_path, tokenizer):
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}')
    batches = Batches(Records([tmp_path / "bad.jsonl"], 0), tokenizer, length=96, processes=1)
    try:
        with pytest.raises(ValueError, match="expected fields problem"):
            batches.take(1)
    finally:
        batches.close()


def test_a_state_of_something_else(file, tokenizer):
    state = Batches(Records([file], 1), tokenizer, length=96).state_dict()
    with pytest.raises(
        ValueError, match=r"source expected 'sums\.jsonl, 23 records, seed 2', got .*seed 1"
    ):
        Batches(Records([file], 2), tokenizer, length=96).load_state_dict(state)
    with pytest.raises(ValueError, match="length expected 64, got 96"):
        Batches(Records([file], 1), tokenizer, length=64).load_state_dict(state)


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-llamba", "tiny-mamba1", "tiny-mamba2"])
def test_nothing_leaks_from_one_document_into_another(name, tokenizer):
    model = random_model(name)
    batch = Batches(
        Generated("made up", lambda i: chat(f"{i}?", "z" * (i % 9))), tokenizer, length=64
    ).take(2)
    tokens = batch.tokens.clamp(max=255)
    with torch.no_grad():
        packed = model(tokens, batch.cu_seqlens)[0]
        for a, b in itertools.pairwise(batch.cu_seqlens.tolist()):
            alone = model(tokens[:, a:b])[0]
            torch.testing.assert_close(packed[a:b], alone, rtol=1e-9, atol=1e-9)


def test_batches_move():
    batch = Batch(torch.zeros(1, 4).long(), *(torch.zeros(1).long(),) * 3, torch.ones(4).bool(), 1)
    assert batch.to(torch.device("meta")).tokens.device.type == "meta"
    assert batch.num_tokens == 4
