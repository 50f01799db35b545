import pytest
import torch
from folders import make_folder

from reasoners.llm import LLM, eos_token_ids
from reasoners.sampling import SamplingParams


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    return LLM(make_folder(tmp_path_factory.mktemp("model")), dtype=torch.float32, max_length=300)


def test_generate_in_the_shape_vllm_users_know(llm):
    params = SamplingParams(n=3, max_tokens=8, logprobs=True)
    first, second = llm.generate(["One and two", "Three"], params)
    assert first.prompt == "One and two"
    assert first.prompt_token_ids == llm.encode("One and two")
    assert len(first.prompt_token_ids) == 11
    assert [out.index for out in first.outputs] == [0, 1, 2]
    assert len({out.text for out in first.outputs + second.outputs}) == 6
    for out in first.outputs:
        assert len(out.logprobs) == len(out.token_ids) == 8
        assert out.cumulative_logprob == pytest.approx(sum(out.logprobs))
        assert out.finish_reason == "length"


def test_one_prompt_as_text_or_tokens(llm):
    params = SamplingParams(max_tokens=5)
    by_text = llm.generate("Hello", params)[0]
    by_ids = llm.generate(llm.encode("Hello"), params)[0]
    assert by_text.outputs[0].token_ids == by_ids.outputs[0].token_ids
    assert by_ids.prompt is None


def test_chat_goes_through_the_template(llm):
    messages = [{"role": "user", "content": "Hi"}]
    ids = llm.encode_chat(messages)
    assert llm.tokenizer.decode(ids) == "<|user|>Hi<|end|><|assistant|>"
    assert ids.count(llm.tokenizer.eos_token_id) == 1
    assert llm.chat(messages, SamplingParams(max_tokens=3))[0].prompt_token_ids == ids


def test_stop_string_ends_and_is_cut(llm):
    params = SamplingParams(max_tokens=200, seed=3)
    whole = llm.generate("Count", params)[0].outputs[0].text
    stop = whole[20:22]
    (out,) = llm.generate("Count", SamplingParams(max_tokens=200, seed=3, stop=stop))[0].outputs
    assert out.text == whole[: whole.index(stop)]
    assert out.finish_reason == "stop"
    assert len(out.token_ids) < 200


def test_stream_yields_samples_as_they_finish(llm):
    short = llm.request("a", SamplingParams(max_tokens=2), tag="short")
    long = llm.request("b", SamplingParams(max_tokens=9), tag="long")
    assert [request.tag for request, _ in llm.stream([long, short])] == ["short", "long"]


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("", "at least one token"),
        ("x" * 290, "at most max_length = 300 tokens, got 306"),
        ([1, 999], r"expected in \[0, 257\), got 999"),
    ],
)
def test_bad_prompts_are_refused_before_any_work(llm, prompt, words):
    with pytest.raises(ValueError, match=words):
        llm.generate(["fine", prompt], SamplingParams(max_tokens=16))


def test_model_without_tokenizer_takes_tokens_only(llm):
    bare = LLM(llm.model, max_length=64)
    assert (
        len(bare.generate([[1, 2, 3]], SamplingParams(max_tokens=4))[0].outputs[0].token_ids) == 4
    )
    with pytest.raises(ValueError, match="a text prompt needs a tokenizer"):
        bare.generate("text")


def test_eos_tokens_of_generation_config(tmp_path):
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 9]}')
    assert eos_token_ids(None, tmp_path) == {5, 9}


def test_folder_without_tokenizer_says_so(tmp_path):
    folder = make_folder(tmp_path / "model")
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ValueError, match="expected a tokenizer's files"):
        LLM(folder)
