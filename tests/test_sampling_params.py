"""SamplingParams: vLLM's defaults and ranges; every refusal names the field, the value and what is allowed."""

import dataclasses
import math

import numpy as np
import pytest

from jaxinfer.request import RequestOutputKind, SamplingParams, check_bad_words


def test_defaults_are_vllms():
    assert dataclasses.asdict(SamplingParams()) == {
        "n": 1,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "seed": None,
        "stop": [],
        "stop_token_ids": [],
        "bad_words": [],
        "include_stop_str_in_output": False,
        "ignore_eos": False,
        "max_tokens": 16,
        "min_tokens": 0,
        "logprobs": None,
        "prompt_logprobs": None,
        "skip_special_tokens": True,
        "logit_bias": None,
        "allowed_token_ids": None,
        "structured_outputs": None,
        "output_kind": RequestOutputKind.CUMULATIVE,
    }


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("n", v) for v in (0, -1, 1.5, True, "2", None)],
        *[(f, v) for f in ("presence_penalty", "frequency_penalty") for v in (-2.1, 2.1, math.nan, True, "x", None)],
        *[("repetition_penalty", v) for v in (0, -1, math.inf, math.nan)],
        *[("temperature", v) for v in (-0.1, math.nan, math.inf, True, "1")],
        *[("top_p", v) for v in (0, -0.1, 1.01, math.nan)],
        *[("top_k", v) for v in (-2, 1.0, True, "5")],
        *[("min_p", v) for v in (-0.01, 1.01, math.nan)],
        *[("seed", v) for v in (1.0, True, "7")],
        *[("stop", v) for v in ("", ["a", ""], [1], 5)],
        *[("bad_words", v) for v in ([""], "word", [3])],
        *[("stop_token_ids", v) for v in ([-1], [1.0], "12", [True])],
        *[("max_tokens", v) for v in (0, -1, 1.5, True)],
        *[("min_tokens", v) for v in (-1, 17, 0.5, None)],
        *[(f, v) for f in ("logprobs", "prompt_logprobs") for v in (-1, 21, True, 1.0)],
        *[("logit_bias", v) for v in ({-1: 1.0}, {1: 101}, {1: -101}, {1: math.nan}, {"1": 1.0}, [1])],
        ("logit_bias", {i: 0.0 for i in range(1025)}),
        *[("allowed_token_ids", v) for v in ([], [-1], 5)],
        *[(f, 1) for f in ("include_stop_str_in_output", "ignore_eos", "skip_special_tokens")],
    ],
)
def test_refusals_name_the_field_and_say_what_is_allowed(field, value):
    with pytest.raises(ValueError, match=rf"SamplingParams: {field} must be .*, got "):
        SamplingParams(**{field: value})


def test_full_vocabulary_logprobs_are_refused_with_the_range():
    with pytest.raises(ValueError, match=r"logprobs must be None, or 0 to 20 .*got -1"):
        SamplingParams(logprobs=-1)


def test_accepted_edges():
    SamplingParams(top_k=-1, top_p=1, min_p=1, presence_penalty=-2, frequency_penalty=2, logprobs=20, prompt_logprobs=0)
    SamplingParams(max_tokens=None, min_tokens=10**6, seed=-(2**70), temperature=0)
    params = SamplingParams(top_k=np.int64(3), temperature=np.float32(0.5), stop="x", stop_token_ids=(np.int32(4),))
    assert (params.top_k, params.temperature, params.stop, params.stop_token_ids) == (3, 0.5, ["x"], [4])
    assert type(params.top_k) is int and type(params.stop_token_ids[0]) is int
    assert SamplingParams(seed=-1).seed is None


def test_unknown_field_is_refused():
    with pytest.raises(TypeError, match="best_of"):
        SamplingParams(best_of=2)


def test_greedy_takes_one_sequence():
    with pytest.raises(ValueError, match="n must be 1 when temperature is 0"):
        SamplingParams(n=2, temperature=0)


@pytest.mark.parametrize(
    "change",
    [
        {"temperature": 0.5},
        {"presence_penalty": 0.1},
        {"frequency_penalty": 0.1},
        {"repetition_penalty": 1.1},
        {"logit_bias": {1: 1.0}},
        {"allowed_token_ids": [1]},
        {"bad_words": ["a"]},
        {"min_tokens": 1},
        {"logprobs": 0},
    ],
)
def test_plain_greedy(change):
    plain = {"temperature": 0.0, "top_k": 5, "top_p": 0.5, "min_p": 0.1, "stop_token_ids": [1], "stop": "x"}
    assert SamplingParams(**plain).is_plain_greedy
    assert not SamplingParams(**(plain | change)).is_plain_greedy


def test_clone_shares_nothing_and_validates_again():
    params = SamplingParams(stop=["a"], stop_token_ids=[1], logit_bias={1: 2.0}, allowed_token_ids=[3], bad_words=["b"])
    copy = params.clone()
    assert copy == params
    for name in ("stop", "stop_token_ids", "logit_bias", "allowed_token_ids", "bad_words"):
        assert getattr(copy, name) is not getattr(params, name)
    params.temperature = -1
    with pytest.raises(ValueError, match="temperature"):
        params.clone()


@pytest.mark.parametrize("field", ["logit_bias", "allowed_token_ids", "stop_token_ids"])
def test_ids_outside_the_vocabulary_are_named(field):
    ids = [3, 10, 9, 400]
    params = SamplingParams(**{field: dict.fromkeys(ids, 1.0) if field == "logit_bias" else ids})
    params.validate_for_vocab(401)
    with pytest.raises(ValueError, match=rf"{field} must be .*\[0, 10\).*got \[10, 400\]"):
        params.validate_for_vocab(10)


def test_bad_words_limits():
    check_bad_words([[1] * 16] * 128)
    with pytest.raises(ValueError, match="129 token sequences, allowed are 128"):
        check_bad_words([[1]] * 129)
    with pytest.raises(ValueError, match=r"17 tokens .*allowed are 1 to 16"):
        check_bad_words([[1] * 17])
    with pytest.raises(ValueError, match="0 tokens"):
        check_bad_words([[]])
