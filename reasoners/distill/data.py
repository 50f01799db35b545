"""Training data: from problems with solutions to packed batches, in an order that can be gone on with.

Examples have numbers. A source gives the example of a number; `Batches` tokenizes them one after the
other, packs whole documents into sequences and knows at any moment how to go on from there. A student
learns the assistant's tokens alone, up to and with the one that ends the turn.
"""

import glob
import itertools
import json
import multiprocessing
import os
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

OPEN_SEQUENCES = 16
PATIENCE = 1000  # examples with nothing to learn, one after the other, before that is an error


@dataclass(frozen=True)
class Example:
    """A conversation of {"role", "content"} messages, or a plain text that is learned whole."""

    messages: Sequence[Mapping[str, str]] = ()
    text: str | None = None


# A question and its worked solution, by the names that datasets give them.
FIELDS = (
    ("problem", "generated_solution"),  # OpenMathInstruct-2
    ("problem", "solution"),
    ("question", "answer"),  # GSM8K
)


def example_from_record(record: Mapping, instruction: str = "") -> Example:
    """The example of a dataset's record: question and solution, `messages`, or `text`.

    instruction: follows a question as in scaling.tasks.messages. Raises ValueError for other fields, or
    messages without a role and a content of text.
    """
    for question, solution in FIELDS:
        if isinstance(record.get(question), str) and isinstance(record.get(solution), str):
            asked = record[question].strip()
            if instruction:
                asked = f"{asked}\n\n{instruction}"
            return Example(
                (
                    {"role": "user", "content": asked},
                    {"role": "assistant", "content": record[solution].strip()},
                )
            )
    if isinstance(record.get("messages"), list):
        for message in record["messages"]:
            if not (
                isinstance(message, Mapping)
                and isinstance(message.get("role"), str)
                and isinstance(message.get("content"), str)
            ):
                raise ValueError(
                    f"record expected messages with a role and a content of text, got {message!r:.60}"
                )
        return Example(tuple(record["messages"]))
    if isinstance(record.get("text"), str):
        return Example(text=record["text"])
    names = ", ".join(f"{q} and {s}" for q, s in FIELDS)
    raise ValueError(f"record expected fields {names}, messages or text, got {', '.join(record)}")


# ---- sources


class Source(Protocol):
    """Examples by number, without end; `name` tells it from other sources."""

    name: str

    def example(self, index: int) -> Example:
        """Example `index`; numbers are asked for in order, except after a new start."""


@dataclass
class Generated:
    """Examples that a function makes of their numbers."""

    name: str
    example: Callable[[int], Example]


class Records:
    """JSONL files, or JSON lists, over and over, each time in another order.

    Of JSONL only the lines' places are kept in memory. All files are shuffled together.
    """

    def __init__(self, paths: Sequence[Path], seed: int, instruction: str = ""):
        self.paths, self.seed, self.instruction = list(paths), seed, instruction
        self._files = [self._list(p) if p.suffix == ".json" else _lines(p) for p in self.paths]
        self._ends = np.cumsum([len(file) for file in self._files])
        self.count = int(self._ends[-1])
        title = self.paths[0].name
        if len(self.paths) > 1:
            title += f" and {len(self.paths) - 1} more"
        if not self.count:
            raise ValueError(
                f"{self.paths[0].with_name(title)}: expected at least one record, got none"
            )
        self.name = f"{title}, {self.count} records, seed {seed}"
        self._order = (-1, None)

    def example(self, index: int) -> Example:
        """Record `index` of the endless order."""
        epoch, place = divmod(index, self.count)
        if self._order[0] != epoch:
            self._order = (epoch, np.random.default_rng([self.seed, epoch]).permutation(self.count))
        at = int(self._order[1][place])
        file = int(np.searchsorted(self._ends, at, side="right"))
        path, entries = self.paths[file], self._files[file]
        at -= int(self._ends[file]) - len(entries)
        if isinstance(entries, list):
            where, record = f"{path}, item {at + 1}", entries[at]
        else:
            number, offset = map(int, entries[at])
            where = f"{path}, line {number}"
            with path.open("rb") as lines:
                lines.seek(offset)
                record = self._parse(lines.readline(), where)
        if not isinstance(record, dict):
            raise ValueError(f"{where}: expected a JSON object, got {type(record).__name__}")
        try:
            return example_from_record(record, self.instruction)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None

    @classmethod
    def _list(cls, path: Path) -> list:
        found = cls._parse(path.read_bytes(), f"{path}")
        if not isinstance(found, list):
            raise ValueError(f"{path}: expected a JSON list, got {type(found).__name__}")
        return found

    @staticmethod
    def _parse(text: bytes, where: str):
        try:
            return json.loads(text)
        except ValueError as error:  # of JSON, or of UTF-8
            raise ValueError(f"{where}: expected JSON, got {text[:60]!r} ({error})") from None


def _lines(path: Path) -> np.ndarray:
    """(records, 2) int64: line number and offset of every line that is not blank."""
    found, offset = array("q"), 0  # a list of pairs takes ten times the memory
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.isspace():
                found.extend((number, offset))
            offset += len(line)
    return np.frombuffer(found, dtype=np.int64).reshape(-1, 2)


class Hub:
    """A dataset of the Hugging Face hub, streamed and shuffled in a buffer, over and over.

    dataset: its id, and its configuration after a colon where it has several.
    """

    BUFFER = 10_000

    def __init__(self, dataset: str, seed: int, instruction: str = ""):
        try:
            from datasets import load_dataset
        except ModuleNotFoundError:
            raise ModuleNotFoundError(
                f"{dataset!r} is no .json or .jsonl path, and to read it from the Hugging Face hub "
                "takes: pip install 'distilled-reasoners[datasets]'"
            ) from None
        dataset_id, _, config = dataset.partition(":")
        stream = load_dataset(dataset_id, config or None, split="train", streaming=True)
        self._stream = stream.shuffle(seed=seed, buffer_size=self.BUFFER)
        self.name = f"{dataset}, seed {seed}"
        self.instruction = instruction
        self._next, self._records = 0, None

    def example(self, index: int) -> Example:
        """Record `index`; going back or far ahead reads the stream anew."""
        if self._records is None or index < self._next:
            self._next, self._records = 0, self._endless()
        record = next(itertools.islice(self._records, index - self._next, None))
        self._next = index + 1
        try:
            return example_from_record(record, self.instruction)
        except ValueError as error:
            raise ValueError(f"{self.name}, record {index}: {error}") from None

    def __getstate__(self) -> dict:
        # Another process cannot take over an open stream; it opens its own.
        return {**vars(self), "_next": 0, "_records": None}

    def _endless(self) -> Iterator[dict]:
        for epoch in itertools.count():
            self._stream.set_epoch(epoch)
            empty = True
            for record in self._stream:
                empty = False
                yield record
            if empty:
                raise ValueError(f"{self.name}: expected at least one record, got none")


def open_source(name: str, seed: int, instruction: str = "") -> Source:
    """The source of a name: "arithmetic" (endless made-up problems), a .json or .jsonl file, several
    as in "data/*.jsonl", or a dataset of the Hugging Face hub as in "openai/gsm8k:main".

    Raises FileNotFoundError where there is no such file, ModuleNotFoundError for a dataset when
    `datasets` is not installed.
    """
    if name == "arithmetic":
        return Generated("arithmetic", arithmetic_example)
    path = Path(name)
    if path.suffix in (".json", ".jsonl"):
        paths = [path] if path.exists() else [Path(found) for found in sorted(glob.glob(name))]
        if not paths:
            raise FileNotFoundError(f"{path}: expected a file of records, there is none")
        return Records(paths, seed, instruction)
    return Hub(name, seed, instruction)


def arithmetic_example(index: int) -> Example:
    """Problem `index` of the arithmetic task's training split."""
    from reasoners.scaling.arithmetic import problem

    made = problem(index, "train")
    return Example(
        (
            {"role": "user", "content": made.question},
            {"role": "assistant", "content": made.solution},
        )
    )


# ---- tokens


def tokenize(examples: Sequence[Example], tokenizer) -> list[tuple[list[int], list[bool]]]:
    """Tokens of each example, and which of them are to be learned.

    Prompts get the tokens that LLM.encode_chat gives them, texts those of LLM.encode. Of an assistant's
    message everything is learned up to the end-of-sequence token; at the end of an example that token is
    appended where it is missing. Raises ValueError for a tokenizer without a chat template, or one that
    rewrites earlier messages.
    """
    pieces = [_pieces(example, tokenizer) for example in examples]
    written = iter(_encode(tokenizer, [text for parts in pieces for text, _ in parts], False))
    texts = iter(_encode(tokenizer, [e.text for e in examples if e.text], True))
    eos = tokenizer.eos_token_id
    end = [] if eos is None else [eos]
    found = []
    for example, parts in zip(examples, pieces):
        tokens: list[int] = []
        counted: list[bool] = []
        if example.text:
            tokens = next(texts)
            tokens = tokens if tokens[-1:] == end else tokens + end
            counted = [True] * len(tokens)
        for i, (_, answers) in enumerate(parts, 1):
            ids = next(written)
            if i == len(parts) and eos not in ids:
                ids = ids + end
            learned = 0
            if answers:
                learned = len(ids) - ids[::-1].index(eos) if eos in ids else len(ids)
            tokens += ids
            counted += [True] * learned + [False] * (len(ids) - learned)
        found.append((tokens, counted))
    return found


def _encode(tokenizer, texts: list[str], special: bool) -> list[list[int]]:
    # All in one call: a call takes longer than the tokens of a short text.
    return tokenizer(texts, add_special_tokens=special)["input_ids"] if texts else []


def _pieces(example: Example, tokenizer) -> list[tuple[str, bool]]:
    """A conversation in pieces, prompts and answers by turns; whether each is an answer."""
    if example.text is not None:
        return []
    if not tokenizer.chat_template:
        raise ValueError("tokenize: a conversation needs a tokenizer with a chat template")

    def render(count: int, prompt: bool) -> str:
        return tokenizer.apply_chat_template(
            list(example.messages[:count]), add_generation_prompt=prompt, tokenize=False
        )

    found, done = [], ""
    for i, message in enumerate(example.messages):
        if message["role"] != "assistant":
            continue
        prompt, whole = render(i, True), render(i + 1, False)
        if not (prompt.startswith(done) and whole.startswith(prompt)):
            raise ValueError(
                "tokenize: chat template expected to write the messages one after the other, got "
                f"{prompt!r} before {whole!r}"
            )
        found += [(prompt[len(done) :], False), (whole[len(prompt) :], True)]
        done = whole
    return found


# ---- batches


@dataclass
class Batch:
    """Packed sequences, one after the other.

    tokens: (1, sequences * length) int64. cu_seqlens: (documents + 1) int32 boundaries; padding is a
    document of its own, and none reaches over the end of a sequence. targets: (m) int64, positions
    whose next token is counted; labels: (m) int64, these tokens. real: (tokens) booleans, False for
    padding. num_sequences: how many there are.
    """

    tokens: Tensor
    cu_seqlens: Tensor
    targets: Tensor
    labels: Tensor
    real: Tensor
    num_sequences: int

    @property
    def num_tokens(self) -> int:
        """Tokens that are not padding."""
        return int(self.real.sum())

    def to(self, device: torch.device) -> "Batch":
        """The same on a device."""
        moved = {
            name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
            for name, value in vars(self).items()
        }
        return Batch(**moved)

    def split(self, parts: int) -> list["Batch"]:
        """Cut into batches of equally many whole sequences."""
        if parts < 1 or self.num_sequences % parts:
            raise ValueError(
                f"Batch: parts expected to divide {self.num_sequences} sequences, got {parts}"
            )
        if parts == 1:
            return [self]
        sequences = self.num_sequences // parts
        width = self.tokens.shape[1] // parts
        found = []
        for start in range(0, width * parts, width):
            inside = (self.cu_seqlens >= start) & (self.cu_seqlens <= start + width)
            aimed = (self.targets >= start) & (self.targets < start + width)
            found.append(
                Batch(
                    self.tokens[:, start : start + width],
                    self.cu_seqlens[inside] - start,
                    self.targets[aimed] - start,
                    self.labels[aimed],
                    self.real[start : start + width],
                    sequences,
                )
            )
        return found


Document = tuple[np.ndarray, np.ndarray]  # tokens, and whether each is to be learned


def _pack(sequences: list[list[Document]], length: int) -> Batch:
    tokens = torch.zeros(len(sequences) * length, dtype=torch.int64)
    learned = torch.zeros(len(tokens) + 1, dtype=torch.bool)
    real = torch.zeros(len(tokens), dtype=torch.bool)
    all_tokens, all_learned = tokens.numpy(), learned.numpy()
    boundaries = [0]
    for i, documents in enumerate(sequences):
        at = i * length
        for ids, counted in documents:
            all_tokens[at : at + len(ids)] = ids
            # What a document's first token follows is no part of it.
            all_learned[at + 1 : at + len(ids)] = counted[1:]
            at += len(ids)
            boundaries.append(at)
        real[i * length : at] = True
        if at < (i + 1) * length:
            boundaries.append((i + 1) * length)
    targets = learned[1:].nonzero()[:, 0]
    return Batch(
        tokens[None],
        torch.tensor(boundaries, dtype=torch.int32),
        targets,
        tokens[targets + 1],
        real,
        len(sequences),
    )


class Tokenized:
    """Documents of a source by number, tokenized by other processes ahead of when they are asked for."""

    CHUNK = 64

    def __init__(self, source: Source, tokenizer, processes: int):
        self.pool = ProcessPoolExecutor(
            processes,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_take_up,
            initargs=(source, tokenizer),
        )
        self.depth = 4 * processes
        self.first = 0  # the number of the first document in `chunks`
        self.chunks: deque[Future] = deque()

    def document(self, index: int) -> Document:
        """Document `index`; fast when they are asked for in order."""
        if not self.first <= index < self.first + self.CHUNK * (len(self.chunks) or 1):
            self.chunks.clear()
            self.first = index
        while index >= self.first + self.CHUNK:
            self.chunks.popleft()
            self.first += self.CHUNK
        while len(self.chunks) < self.depth:
            start = self.first + self.CHUNK * len(self.chunks)
            self.chunks.append(self.pool.submit(_tokenize_range, start, start + self.CHUNK))
        return self.chunks[0].result()[index - self.first]

    def close(self):
        """End the processes."""
        self.pool.shutdown(cancel_futures=True)


_own: tuple[Source, object] | None = None  # in a process of Tokenized


def _take_up(source: Source, tokenizer):
    global _own
    # The processes are the parallelism: threads of each would get in each other's way.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _own = source, tokenizer


def _tokenize_range(start: int, end: int) -> list[Document]:
    source, tokenizer = _own
    return _documents([source.example(index) for index in range(start, end)], tokenizer)


def _documents(examples: Sequence[Example], tokenizer) -> list[Document]:
    return [
        (np.array(tokens, np.int32), np.array(counted, bool))
        for tokens, counted in tokenize(examples, tokenizer)
    ]


class Batches:
    """Packed batches of a source, in one order, from wherever it was left.

    length: tokens of a sequence; a longer document is cut. Each document goes into the fullest of the
    open sequences that has room for it. Documents with nothing to learn are left out; ValueError if
    there are 1,000 of them without one to learn from. processes: that tokenize beside this one; 0
    tokenizes here. They do not change the batches. Counted in num_examples, num_cut and num_empty: examples
    read, cut, and left out.
    """

    def __init__(self, source: Source, tokenizer, *, length: int, processes: int = 0):
        if length < 2:
            raise ValueError(f"Batches: length expected at least 2, got {length}")
        self.source, self.tokenizer, self.length = source, tokenizer, length
        self._tokenized = Tokenized(source, tokenizer, processes) if processes else None
        self.next_example = 0
        self.open: list[list[Document]] = []
        self._used: list[int] = []  # tokens of each
        self.num_examples = self.num_cut = self.num_empty = self._empty_in_a_row = 0
        self._taken = self._padding = 0

    def take(self, sequences: int) -> Batch:
        """The next batch of so many sequences."""
        full = []
        while len(full) < sequences:
            if closed := self._add(self._document()):
                full.append(closed)
        batch = _pack(full, self.length)
        self._taken += batch.real.numel()
        self._padding += batch.real.numel() - batch.num_tokens
        return batch

    @property
    def padding_share(self) -> float:
        """How much of the batches that this object has given out is padding."""
        return self._padding / max(self._taken, 1)

    def _document(self) -> Document:
        while True:
            if self._tokenized is not None:
                tokens, counted = self._tokenized.document(self.next_example)
            else:
                example = self.source.example(self.next_example)
                ((tokens, counted),) = _documents([example], self.tokenizer)
            self.next_example += 1
            self.num_examples += 1
            self.num_cut += len(tokens) > self.length
            tokens, counted = tokens[: self.length], counted[: self.length]
            if counted[1:].any():
                self._empty_in_a_row = 0
                return tokens, counted
            self.num_empty += 1
            self._empty_in_a_row += 1
            if self._empty_in_a_row == PATIENCE:
                raise ValueError(
                    f"{self.source.name}: examples expected with an assistant's tokens within the first "
                    f"{self.length}, got {PATIENCE} without"
                )

    def close(self):
        """End the processes that tokenize."""
        if self._tokenized is not None:
            self._tokenized.close()

    def _add(self, document: Document) -> list[Document] | None:
        """Put a document somewhere; returns the sequence that this closes, if it does."""
        size = len(document[0])
        room = [i for i, used in enumerate(self._used) if used + size <= self.length]
        if room:
            fullest = max(room, key=self._used.__getitem__)
            self.open[fullest].append(document)
            self._used[fullest] += size
            if self._used[fullest] < self.length:
                return None
        else:
            self.open.append([document])
            self._used.append(size)
            if len(self.open) <= OPEN_SEQUENCES and size < self.length:
                return None
            fullest = self._used.index(max(self._used))
        del self._used[fullest]
        return self.open.pop(fullest)

    def state_dict(self) -> dict:
        """Where the stream stands, for JSON."""
        counts = {name: getattr(self, name) for name in _COUNTS}
        still_open = [
            [[tokens.tolist(), counted.tolist()] for tokens, counted in sequence]
            for sequence in self.open
        ]
        return {"source": self.source.name, "length": self.length, "open": still_open, **counts}

    def load_state_dict(self, state: dict):
        """Go on from there; ValueError for the state of another source or length."""
        for name, ours in (("source", self.source.name), ("length", self.length)):
            if state[name] != ours:
                raise ValueError(
                    f"Batches: {name} expected {ours!r}, got {state[name]!r} to go on from"
                )
        self.open = [
            [(np.array(tokens, np.int32), np.array(counted, bool)) for tokens, counted in sequence]
            for sequence in state["open"]
        ]
        self._used = [sum(len(tokens) for tokens, _ in sequence) for sequence in self.open]
        for name in _COUNTS:
            setattr(self, name, state[name])
        self._empty_in_a_row = 0


_COUNTS = ("next_example", "num_examples", "num_cut", "num_empty")
