"""LLM(model).generate(prompts, SamplingParams(n=64)): text in, text out, in the shape vLLM users know."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from reasoners.checkpoint import load_model, load_tokenizer
from reasoners.engine import Engine, Request, Sample
from reasoners.model import HybridLM
from reasoners.sampling import SamplingParams

Prompt = str | Sequence[int]


@dataclass(frozen=True)
class CompletionOutput:
    """One sample of a prompt.

    index: of the sample. token_ids: generated, the ending token included. text: without special
    tokens, cut at a stop string. logprobs: per token, when asked for; cumulative_logprob: their sum.
    finish_reason: "stop" (end of sequence or a stop string) or "length". start_s, end_s: on
    time.perf_counter's clock.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str
    logprobs: list[float] | None
    cumulative_logprob: float | None
    start_s: float
    end_s: float


@dataclass(frozen=True)
class RequestOutput:
    """A prompt and its samples in the order of their indices."""

    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]


class LLM:
    """A model, its tokenizer and an engine.

    model: a folder (Llama, Llamba or MambaInLlama layout, with its tokenizer) or a HybridLM.
    tokenizer: a folder or a transformers tokenizer; None takes the model's folder.
    dtype: None for bfloat16 where the hardware multiplies it, else float32. device: None for CUDA if
    there is a GPU and a kernel for every operator, else the CPU. max_length: longest prompt plus answer, None
    for the model's own limit or 4096, whichever is less. max_rows, max_bytes, state_dtype: see Engine.
    """

    def __init__(
        self,
        model: str | Path | HybridLM,
        tokenizer=None,
        *,
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
        max_rows: int | None = None,
        max_length: int | None = None,
        max_bytes: int | None = None,
        state_dtype: torch.dtype | None = None,
    ):
        if isinstance(model, HybridLM):
            self.model = model
        else:
            device = torch.device(device or default_device())
            dtype = dtype or default_dtype(device)
            self.model = load_model(model, dtype=dtype, device=device)
            tokenizer = tokenizer if tokenizer is not None else model
        self.tokenizer = load_tokenizer(tokenizer)
        self.max_length = max_length or min(self.model.config.max_length, 4096)
        self.engine = Engine(
            self.model,
            max_rows=max_rows,
            max_length=self.max_length,
            max_bytes=max_bytes,
            state_dtype=state_dtype,
            eos_token_ids=eos_token_ids(self.tokenizer, model),
            ends_with_stop=self._ends_with_stop,
        )

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | None = None,
    ) -> list[RequestOutput]:
        """All samples of all prompts. A prompt is text, taken as it is, or a list of token ids.

        Raises ValueError for a prompt that is empty or longer than the cache, before any work.
        """
        if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int)):
            prompts = [prompts]
        outputs: list[list[CompletionOutput]] = [[] for _ in prompts]
        requests = [self.request(p, params, tag=i) for i, p in enumerate(prompts)]
        for request in requests:
            self.engine.require_valid(request)
        for request, output in self.stream(requests):
            outputs[request.tag].append(output)
        return [
            RequestOutput(
                prompt if isinstance(prompt, str) else None,
                list(request.prompt),
                sorted(outs, key=lambda out: out.index),
            )
            for prompt, request, outs in zip(prompts, requests, outputs, strict=True)
        ]

    def chat(
        self, conversations: Sequence, params: SamplingParams | None = None
    ) -> list[RequestOutput]:
        """`generate` on conversations: lists of {"role", "content"} through the chat template."""
        if conversations and isinstance(conversations[0], dict):
            conversations = [conversations]
        return self.generate([self.encode_chat(messages) for messages in conversations], params)

    def stream(
        self, requests: Iterable[Request], should_stop: Callable[[], bool] = lambda: False
    ) -> Iterator[tuple[Request, CompletionOutput]]:
        """Each sample as it finishes, with the request it belongs to."""
        for item in self.events(requests, should_stop):
            if item is not None:
                yield item

    def events(
        self, requests: Iterable[Request], should_stop: Callable[[], bool] = lambda: False
    ) -> Iterator[tuple[Request, CompletionOutput] | None]:
        """`stream` with a None after every decode step, for callers with something to watch."""
        for sample in self.engine.run(requests, should_stop):
            yield None if sample is None else (sample.request, self._output(sample))

    def request(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        samples: Sequence[int] | None = None,
        tag: object = None,
    ) -> Request:
        """The engine's request for a prompt; `samples` picks sample indices instead of params.n."""
        tokens = self.encode(prompt) if isinstance(prompt, str) else prompt
        return Request(
            tuple(int(t) for t in tokens),
            params or SamplingParams(),
            None if samples is None else tuple(samples),
            tag,
        )

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, with the tokenizer's own beginning-of-sequence rule."""
        if self.tokenizer is None:
            raise ValueError("LLM: a text prompt needs a tokenizer, this LLM has none")
        return self.tokenizer(text)["input_ids"]

    def encode_chat(self, messages: Sequence[dict]) -> list[int]:
        """Token ids of a conversation up to where the assistant answers."""
        if self.tokenizer is None or not self.tokenizer.chat_template:
            raise ValueError("LLM: a conversation needs a tokenizer with a chat template")
        text = self.tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, tokenize=False
        )
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _output(self, sample: Sample) -> CompletionOutput:
        text = ""
        if self.tokenizer is not None:
            text = self.tokenizer.decode(sample.token_ids, skip_special_tokens=True)
        cuts = [cut for stop in sample.request.params.stop if (cut := text.find(stop)) >= 0]
        return CompletionOutput(
            index=sample.index,
            text=text[: min(cuts)] if cuts else text,
            token_ids=sample.token_ids,
            finish_reason=sample.finish_reason,
            logprobs=sample.logprobs,
            cumulative_logprob=None if sample.logprobs is None else sum(sample.logprobs),
            start_s=sample.start_s,
            end_s=sample.end_s,
        )

    def _ends_with_stop(self, token_ids: Sequence[int], stop: tuple[str, ...]) -> bool:
        # A stop string of n characters ends within the last n tokens, and one more may share its
        # first characters; a few more cover characters whose bytes are split over tokens.
        tail = token_ids[-(max(map(len, stop)) + 4) :]
        text = self.tokenizer.decode(tail, skip_special_tokens=True)
        return any(s in text for s in stop)


def default_device() -> str:
    """ "cuda" if there is a GPU and a CUDA kernel for every operator, else "cpu"."""
    from reasoners import ops

    return "cuda" if torch.cuda.is_available() and ops.all_on("cuda") else "cpu"


def default_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware multiplies it, else float32."""
    if device.type == "cuda" or torch.cpu._is_avx512_bf16_supported():
        return torch.bfloat16
    return torch.float32


def eos_token_ids(tokenizer, folder) -> set[int]:
    """End-of-sequence tokens: the tokenizer's, and those of generation_config.json if there is one."""
    ids = set()
    if tokenizer is not None and tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    if isinstance(folder, str | Path):
        path = Path(folder) / "generation_config.json"
        if path.exists():
            listed = json.loads(path.read_text()).get("eos_token_id")
            ids |= set(listed if isinstance(listed, list) else [listed]) - {None}
    return ids
