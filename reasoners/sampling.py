"""How tokens are drawn: the parameters a user sets, and the key of a sample's random numbers.

Every random number is a pure function of (seed, prompt, sample, position), so a sample has the same
tokens whatever the batch it runs in, the order of requests, or how often the run was interrupted.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class SamplingParams:
    """What to draw from each prompt.

    n: samples per prompt. temperature: 0 is greedy. top_k: 0 is off. top_p: 1 is off. min_p: 0 is
    off. Filters apply in this order, after the temperature. seed: of the random numbers.
    max_tokens: longest answer. stop: strings that end an answer and are cut from it.
    stop_token_ids: tokens that end an answer beside the end-of-sequence tokens. ignore_eos: go on past
    end-of-sequence. logprobs: keep the log-probability of every chosen token, under the model's own
    distribution (temperature 1, no filter).

    Raises ValueError naming the field, what was expected and what came.
    """

    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    max_tokens: int = 256
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: bool = False

    def __post_init__(self):
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        object.__setattr__(self, "stop", tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        self._require("n", self.n >= 1, "at least 1")
        self._require(
            "temperature", math.isfinite(self.temperature) and self.temperature >= 0, "at least 0"
        )
        self._require("top_k", self.top_k >= 0, "at least 0 (0 is off)")
        self._require("top_p", 0 < self.top_p <= 1, "above 0 and at most 1")
        self._require("min_p", 0 <= self.min_p <= 1, "between 0 and 1")
        self._require("seed", -(2**63) <= self.seed < 2**63, "a 64-bit integer")
        self._require("max_tokens", self.max_tokens >= 1, "at least 1")
        self._require("stop", all(self.stop), "non-empty strings")

    def _require(self, field, holds, wanted):
        if not holds:
            raise ValueError(
                f"SamplingParams: {field} expected {wanted}, got {getattr(self, field)!r}"
            )


def prompt_key(token_ids: Sequence[int]) -> int:
    """The 64-bit name of a prompt in its random numbers: a hash of its tokens.

    Equal prompts draw equal samples; another order or batch of prompts changes nothing.
    """
    data = b"".join(int(token).to_bytes(4, "little") for token in token_ids)
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little", signed=True)
