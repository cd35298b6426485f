"""The server as its clients see it: the official client, raw HTTP, a fuzzer; on a tiny random model."""

import asyncio
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import positive_data_acceptance
from served import NAME, Running, engine_config, tokenizer_directory

from jaxinfer import SamplingParams, __version__, cli
from jaxinfer.engine import EngineDeadError
from jaxinfer.gate import TURNS
from jaxinfer.server_config import ServerConfig

GREEDY = {"model": NAME, "temperature": 0.0}
LONG = {"prompt": "a", "max_tokens": 200, "ignore_eos": True}
MESSAGES = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with Running(engine_config(tokenizer_directory(tmp_path_factory.mktemp("tokenizer")))) as running:
        yield running


@pytest.fixture(scope="module")
def client(served: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def http(served: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=served.url, timeout=60) as client:
        yield client


def alone(served: Running, prompt: Any, **params: Any) -> Any:
    """What the engine gives without a server round it."""
    llm = served.server.llm

    async def run() -> Any:
        async for output in llm.generate(prompt, SamplingParams(**params)):
            last = output
        return last

    return asyncio.run(run())


# ---- the official client


def test_completion(served: Running, client: openai.OpenAI) -> None:
    expected = alone(served, "hello there", temperature=0.0, max_tokens=12).outputs[0]
    answer = client.completions.create(prompt="hello there", max_tokens=12, **GREEDY)
    assert answer.choices[0].text == expected.text
    assert answer.choices[0].finish_reason == "length"
    assert (answer.object, answer.model, len(answer.choices)) == ("text_completion", NAME, 1)
    prompt_tokens = len(served.engine.tokenizer.encode("hello there"))
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (prompt_tokens, 12, prompt_tokens + 12)


def test_streamed_completion_is_the_whole_one(client: openai.OpenAI) -> None:
    ask: dict[str, Any] = {"prompt": "once upon", "max_tokens": 20, "seed": 7, "n": 2, "model": NAME}
    whole = client.completions.create(**ask)
    text, reasons, usage = ["", ""], [None, None], None
    for chunk in client.completions.create(**ask, stream=True, stream_options={"include_usage": True}):
        for choice in chunk.choices:
            text[choice.index] += choice.text
            assert reasons[choice.index] is None  # nothing comes after the end
            reasons[choice.index] = choice.finish_reason
        usage = usage or chunk.usage
    assert text == [choice.text for choice in whole.choices] and text[0] != text[1]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert usage == whole.usage


def test_chat(served: Running, client: openai.OpenAI) -> None:
    prompt = served.engine.tokenizer.apply_chat_template(MESSAGES)

    async def ask() -> Any:
        async for output in served.server.llm.chat(MESSAGES, SamplingParams(temperature=0.0, max_tokens=10)):
            last = output
        return last

    output = asyncio.run(ask())
    expected = output.outputs[0]
    assert output.prompt_token_ids == prompt
    answer = client.chat.completions.create(messages=MESSAGES, max_completion_tokens=10, **GREEDY)
    assert (answer.object, answer.choices[0].message.role) == ("chat.completion", "assistant")
    assert answer.choices[0].message.content == expected.text
    assert answer.usage.prompt_tokens == len(prompt)
    chunks = list(client.chat.completions.create(messages=MESSAGES, max_tokens=10, stream=True, **GREEDY))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected.text
    assert [c.choices[0].finish_reason for c in chunks][-1] == "length" and {c.id for c in chunks} == {chunks[0].id}


def test_async_client(served: Running) -> None:
    async def ask(client: openai.AsyncOpenAI, prompt: str) -> str:
        stream = await client.completions.create(prompt=prompt, max_tokens=8, stream=True, **GREEDY)
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def main() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none") as client:
            return await asyncio.gather(*(ask(client, f"{i} times") for i in range(6)))

    texts = asyncio.run(main())
    assert texts == [alone(served, f"{i} times", temperature=0.0, max_tokens=8).outputs[0].text for i in range(6)]


def test_tools_are_refused_by_name(client: openai.OpenAI) -> None:
    tools: Any = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(messages=MESSAGES, tools=tools, model=NAME)
    assert refused.value.param == "tools" and "not support" in refused.value.message
    client.chat.completions.create(messages=MESSAGES, tools=[], tool_choice="none", max_tokens=1, model=NAME)


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).max_model_len == 256
    for call in (lambda: client.models.retrieve("other"), lambda: client.completions.create(model="other", prompt="a")):
        with pytest.raises(openai.NotFoundError) as wrong:
            call()
        assert wrong.value.code == "model_not_found" and NAME in wrong.value.message


# ---- fields


def complete(http: httpx.Client, path: str = "/v1/completions", **body: Any) -> dict[str, Any]:
    answer = http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_several_prompts_and_samples_keep_their_order(served: Running, http: httpx.Client) -> None:
    prompts = ["abc", "de", "fghij"]
    ask = {"prompt": prompts, "n": 2, "seed": 5, "max_tokens": 6, "return_token_ids": True}
    choices = complete(http, **ask)["choices"]
    expected = [o.token_ids for p in prompts for o in alone(served, p, n=2, seed=5, max_tokens=6).outputs]
    assert [c["index"] for c in choices] == list(range(6)) and [c["token_ids"] for c in choices] == expected
    streamed: list[list[int]] = [[] for _ in range(6)]
    for chunk in events(http, "/v1/completions", **ask):
        streamed[chunk["choices"][0]["index"]] += chunk["choices"][0]["token_ids"]
    assert streamed == expected
    ids = [served.engine.tokenizer.encode(p) for p in prompts]
    assert [c["token_ids"] for c in complete(http, **{**ask, "prompt": ids})["choices"]] == expected


def events(http: httpx.Client, path: str, **body: Any) -> list[dict[str, Any]]:
    answer = http.post(path, json={**body, "stream": True})
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/event-stream")
    lines = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_logprobs_and_echo(served: Running, http: httpx.Client) -> None:
    ask = {"prompt": "hello", "max_tokens": 4, "temperature": 0, "logprobs": 2, "echo": True, "return_token_ids": True}
    choice = complete(http, **ask)["choices"][0]
    logprobs, tokenizer = choice["logprobs"], served.engine.tokenizer
    assert choice["text"] == "hello" + tokenizer.decode(choice["token_ids"])
    assert logprobs["tokens"] == [tokenizer.id_to_piece_text(i) for i in choice["prompt_token_ids"] + choice["token_ids"]]
    assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
    assert all(lp <= 0 for lp in logprobs["token_logprobs"][1:])
    assert logprobs["text_offset"] == [len("".join(logprobs["tokens"][:i])) for i in range(len(logprobs["tokens"]))]
    assert all(2 <= len(top) <= 3 for top in logprobs["top_logprobs"][1:])
    chunks = events(http, "/v1/completions", **ask)
    for key in logprobs:
        streamed = [x for chunk in chunks for x in chunk["choices"][0]["logprobs"][key]]
        assert all(x == (pytest.approx(y) if isinstance(y, float | dict) else y) for x, y in zip(streamed, logprobs[key])), key
        assert len(streamed) == len(logprobs[key])
    # the likelihood of a prompt, nothing generated
    scored = complete(http, **{**ask, "max_tokens": 0})
    assert scored["choices"][0]["text"] == "hello" and scored["usage"]["completion_tokens"] == 0
    assert scored["choices"][0]["logprobs"]["tokens"] == logprobs["tokens"][:-4]


def test_chat_logprobs(http: httpx.Client) -> None:
    ask = {"messages": MESSAGES, "max_tokens": 3, "temperature": 0, "logprobs": True, "top_logprobs": 2}
    content = complete(http, "/v1/chat/completions", **ask)["choices"][0]["logprobs"]["content"]
    assert len(content) == 3
    for position in content:  # greedy: the token is the likeliest
        assert position["top_logprobs"][0]["token"] == position["token"] and len(position["top_logprobs"]) == 2
        assert bytes(position["bytes"]).decode(errors="replace") == position["token"]
    chunks = events(http, "/v1/chat/completions", **ask)
    streamed = [x for c in chunks for x in (c["choices"][0]["logprobs"] or {"content": []})["content"]]
    assert [x["token"] for x in streamed] == [x["token"] for x in content]


def test_prompt_logprobs(http: httpx.Client) -> None:
    answer = complete(http, prompt=[5, 6, 7], max_tokens=1, prompt_logprobs=1)
    positions = answer["choices"][0]["prompt_logprobs"]
    assert positions[0] is None and [set(p) >= {str(t)} for p, t in zip(positions[1:], [6, 7])] == [True, True]


def test_stop_bias_and_sampling_fields_reach_the_sampler(served: Running, http: httpx.Client) -> None:
    free = complete(http, prompt="hi", max_tokens=12, temperature=0, return_token_ids=True)["choices"][0]
    at = next(i for i in range(2, 12) if free["text"][i : i + 1].strip())
    stopped = complete(http, prompt="hi", max_tokens=12, temperature=0, stop=[free["text"][at]])["choices"][0]
    assert stopped["finish_reason"] == "stop" and stopped["stop_reason"] == free["text"][at]
    assert free["text"].startswith(stopped["text"]) and len(stopped["text"]) <= at
    by_id = complete(http, prompt="hi", max_tokens=12, temperature=0, stop_token_ids=[free["token_ids"][3]])["choices"][0]
    assert (by_id["finish_reason"], by_id["stop_reason"]) == ("stop", free["token_ids"][3])
    forced = complete(http, prompt="hi", max_tokens=3, logit_bias={"77": 100}, temperature=0, return_token_ids=True)
    assert forced["choices"][0]["token_ids"] == [77, 77, 77]
    allowed = complete(http, prompt="hi", max_tokens=8, allowed_token_ids=[40, 41], return_token_ids=True)
    assert set(allowed["choices"][0]["token_ids"]) <= {40, 41}
    params = {"top_k": 3, "min_p": 0.01, "top_p": 0.9, "repetition_penalty": 1.2, "presence_penalty": 0.1, "seed": 3}
    ours = complete(http, prompt="hi", max_tokens=9, return_token_ids=True, **params)["choices"][0]["token_ids"]
    assert ours == alone(served, "hi", max_tokens=9, **params).outputs[0].token_ids


@pytest.mark.parametrize(
    "form",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["red", "blue"]}}}},
        {"structured_outputs": {"json": {"enum": ["red", "blue"]}}},
        {"guided_json": {"enum": ["red", "blue"]}},
        {"guided_choice": ['"red"', '"blue"']},
        {"guided_regex": '"(red|blue)"'},
        {"guided_grammar": 'start: "\\"red\\"" | "\\"blue\\""'},
    ],
    ids=lambda form: next(iter(form)),
)
def test_structured_outputs(http: httpx.Client, form: dict[str, Any]) -> None:
    answer = complete(http, "/v1/chat/completions", messages=MESSAGES, max_tokens=40, **form)["choices"][0]
    assert answer["message"]["content"] in ('"red"', '"blue"') and answer["finish_reason"] == "stop"


WRONG = [
    ({"temperature": -1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"),
    ({"max_tokens": 10**30}, "max_tokens"),
    ({"prompt": []}, "prompt"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": [512]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": {"a": 1}}, "prompt"),
    ({"prompt": "x" * 3000}, "prompt"),
    ({"prompt": "\ud800"}, None),
    ({"frobnicate": 1}, "frobnicate"),
    ({"suffix": "b"}, "suffix"),
    ({"best_of": 3}, "best_of"),
    ({"n": 0}, "n"),
    ({"n": 10**9}, "n"),
    ({"n": 2, "temperature": 0}, "n"),
    ({"logprobs": 21}, "logprobs"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"600": 1}}, "logit_bias"),
    ({"stop": [""]}, "stop"),
    ({"stop_token_ids": [99999]}, "stop_token_ids"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "prompt_logprobs": 1}, "prompt_logprobs"),
    ({"priority": 1}, "priority"),
    ({"response_format": {"type": "json_schema"}}, "response_format"),
    ({"guided_regex": "("}, "guided_regex"),
    ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice"),
]
WRONG_CHAT = [
    ({"messages": []}, "messages"),
    ({"messages": [{"content": "a"}]}, "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
    ({"functions": [{"name": "f"}]}, "functions"),
    ({"tool_choice": "auto"}, "tool_choice"),
    ({"modalities": ["audio"]}, "modalities"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 30}, "top_logprobs"),
    ({"logprobs": 3}, "logprobs"),
    ({"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens"),
    ({"max_completion_tokens": 1000}, "max_completion_tokens"),
    ({"chat_template": "{{ 1 }}"}, "chat_template"),
    ({"chat_template": "other"}, "chat_template"),
    ({"chat_template_kwargs": {"messages": 1}}, "chat_template_kwargs"),
]


@pytest.mark.parametrize(
    ("path", "field", "param"),
    [("/v1/completions", *wrong) for wrong in WRONG] + [("/v1/chat/completions", *wrong) for wrong in WRONG_CHAT],
    ids=lambda value: str(value)[:40],
)
def test_wrong_fields_are_400_and_named(http: httpx.Client, path: str, field: dict[str, Any], param: str | None) -> None:
    body = {"messages": MESSAGES} if "chat" in path else {"prompt": "a"}
    # httpx would refuse to send a lone surrogate itself
    answer = http.post(path, content=json.dumps(body | field).encode(), headers={"content-type": "application/json"})
    error = answer.json()["error"]
    assert answer.status_code == 400, answer.text
    assert error["type"] == "invalid_request_error" and error["param"] == param, error
    assert param is None or re.search(rf"\b{param}\b", error["message"]) or param == "guided_regex"
    if field.get("prompt") == "x" * 3000:
        assert "max_model_len=256" in error["message"]


def test_errors_all_have_openais_shape(served: Running, http: httpx.Client) -> None:
    sent = {"content": b"{", "headers": {"content-type": "application/json"}}
    chunks = iter([b'{"prompt": "', *[b"a" * 65536] * 300])
    answers = {
        400: [http.post("/v1/completions", **sent), http.post("/v1/completions", content=b"prompt=1"), http.post("/generate")],
        404: [http.get("/nothing"), http.get("/v1/nothing")],
        405: [http.get("/v1/completions"), http.delete("/health")],
        413: [
            http.post("/v1/completions", content=b"x" * (17 << 20)),
            http.post("/v1/completions", content=chunks, headers={"content-type": "application/json"}),
        ],
    }
    for status, found in answers.items():
        for answer in found:
            assert answer.status_code == status, answer.text
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_key(served: Running, http: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served.server.door, "api_key", "schlüssel")
    right = {"authorization": "Bearer schlüssel".encode()}
    for path in ("/v1/models", "/generate", "/tokenize", "/detokenize", "/v1/nothing"):
        for wrong in (b"", b"Bearer", b"Bearer x", b"Basic schl\xc3\xbcssel", b"Bearer schl\xc3\xbcssel2"):
            answer = http.get(path, headers={"authorization": wrong})
            assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
    assert http.get("/v1/models", headers=right).status_code == 200
    for path in ("/health", "/ready", "/version", "/metrics"):
        assert http.get(path).status_code == 200


def test_tokenize_and_back(served: Running, http: httpx.Client) -> None:
    text = "naïve 🍕"
    there = complete(http, "/tokenize", prompt=text, return_token_strs=True)
    assert there["tokens"] == served.engine.tokenizer.encode(text)
    assert (there["count"], there["max_model_len"], len(there["token_strs"])) == (len(there["tokens"]), 256, there["count"])
    assert complete(http, "/detokenize", tokens=there["tokens"])["prompt"] == text
    chat = complete(http, "/tokenize", messages=MESSAGES)
    assert complete(http, "/detokenize", tokens=chat["tokens"])["prompt"] == "<user>hello\n<bot>"
    for body in ({}, {"prompt": "a", "messages": MESSAGES}):
        assert http.post("/tokenize", json=body).status_code == 400
    assert http.post("/detokenize", json={"tokens": [512]}).json()["error"]["param"] == "tokens"


def test_generate_of_the_seeds(http: httpx.Client) -> None:
    answer = complete(http, "/generate", prompt="hello", max_tokens=5)
    assert set(answer) == {"text", "tokens"} and len(answer["tokens"]) <= 5
    assert http.post("/generate", json={"prompt": "a", "temperature": 1}).json()["error"]["param"] == "temperature"


def test_version_and_metrics(served: Running, http: httpx.Client) -> None:
    assert http.get("/version").json() == {"version": __version__}

    def numbers() -> dict[str, float]:
        lines = [line for line in http.get("/metrics").text.splitlines() if not line.startswith("#")]
        assert all('model_name="tiny"' in line for line in lines)
        return {re.sub(r',?model_name="tiny",?', "", name): float(x) for name, x in (line.rsplit(" ", 1) for line in lines)}

    before = numbers()
    complete(http, prompt=[1, 2, 3], max_tokens=4, ignore_eos=True)
    outputs = events(http, "/v1/completions", prompt=[1, 2, 3], max_tokens=32, ignore_eos=True)  # one may hold several tokens
    after = numbers()
    grown = {name: after[name] - before.get(name, 0) for name in after}
    assert grown["jaxinfer:prompt_tokens_total{}"] == 6 and grown["jaxinfer:generation_tokens_total{}"] == 36
    assert grown['jaxinfer:request_success_total{finished_reason="length"}'] == 2
    for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds", "time_per_output_token_seconds"):
        assert grown[f"jaxinfer:{name}_count{{}}"] == 2 == grown[f'jaxinfer:{name}_bucket{{le="+Inf"}}']
        assert after[f"jaxinfer:{name}_sum{{}}"] > 0
    assert grown["jaxinfer:inter_token_latency_seconds_count{}"] == len(outputs) - 1
    for name in (
        "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "gpu_cache_usage_perc",
        "num_preemptions_total", "prefix_cache_queries_total", "prefix_cache_hits_total",
    ):  # fmt: skip
        assert f"jaxinfer:{name}{{}}" in after


def logged(caplog: pytest.LogCaptureFixture, count: int) -> list[str]:
    """The log's lines, once there are so many: they are written when the answer is out."""
    deadline = time.monotonic() + 20
    while len(caplog.records) < count and time.monotonic() < deadline:
        time.sleep(0.01)
    return [record.getMessage() for record in caplog.records]


def test_one_line_in_the_log_for_a_request(http: httpx.Client, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "jaxinfer.gate"):
        answer = complete(http, prompt=[1, 2, 3], max_tokens=4, ignore_eos=True, user="ann")
        (line,) = logged(caplog, 1)
    assert line.startswith(f"{answer['id']} POST /v1/completions 200: 3 prompt tokens (0 cached), 4 generated, ttft ")
    assert re.search(r"tpot \d+\.\d\d ms, length, user 'ann'$", line)


def test_the_log_says_why_a_request_was_refused(http: httpx.Client, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "jaxinfer.gate"):
        http.post("/v1/completions", json={"prompt": "a", "top_p": 3})
        http.post("/v1/completions", json={"prompt": "a", "a\nb": 1})
        http.post("/v1/completions", json={"prompt": [5] * 500, "max_tokens": 2})
        http.post("/v1/completions", json={"prompt": "a", "model": "other"})
        lines = logged(caplog, 4)
    assert [line.split(" ")[3].rstrip(":") for line in lines] == ["400", "400", "400", "404"]
    assert "top_p" in lines[0] and "\n" not in lines[1] and "500 tokens" in lines[2] and "other" in lines[3]


def test_slow_bodies_hold_nobody_up_and_every_turn_comes_back(served: Running, http: httpx.Client) -> None:
    turns, address = served.server.door.turns, ("127.0.0.1", int(served.url.rsplit(":")[-1]))
    assert turns._value == TURNS
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 40\r\n\r\n"
    slow = [socket.create_connection(address) for _ in range(2 * TURNS)]
    for connection in slow:
        connection.sendall(head + b'{"prompt": ')
    assert complete(http, prompt=[1], max_tokens=2)["usage"]["completion_tokens"] <= 2
    slow[0].sendall(b'"a", "max_tokens": 1}'.ljust(29))
    assert slow[0].recv(1000).startswith(b"HTTP/1.1 200")
    for connection in slow:
        connection.close()
    for body in ({"prompt": "a", "model": "other"}, {"prompt": "a", "top_p": 3}, {"prompt": [5] * 500}, {}):
        assert http.post("/v1/completions", json=body).status_code in (400, 404)
    assert http.get("/v1/models").status_code == 200 and http.post("/tokenize", json={"prompt": "a"}).status_code == 200
    assert served.all_free() and turns._value == TURNS


def test_a_burst_is_submitted_as_it_is_parsed(served: Running, http: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of many requests must not wait until the last is parsed."""
    events: list[str] = []
    llm = served.server.running_llm()
    prepare, submit = llm.prepare, llm.submit

    def noted(*args: Any, **kwargs: Any) -> Any:
        events.append("prepare")
        return prepare(*args, **kwargs)

    def started(*args: Any, **kwargs: Any) -> Any:
        events.append("submit")
        return submit(*args, **kwargs)

    monkeypatch.setattr(llm, "prepare", noted)
    monkeypatch.setattr(llm, "submit", started)

    async def burst() -> None:
        async with httpx.AsyncClient(base_url=served.url, timeout=60) as client:
            body = {"prompt": [1, 2], "max_tokens": 1}
            answers = await asyncio.gather(*(client.post("/v1/completions", json=body) for _ in range(6 * TURNS)))
            assert {answer.status_code for answer in answers} == {200}

    asyncio.run(burst())
    waiting = [events[: i + 1].count("prepare") - events[: i + 1].count("submit") for i in range(len(events))]
    assert events.count("submit") == 6 * TURNS and max(waiting) <= TURNS


def test_cors_is_off_unless_asked(served: Running, http: httpx.Client) -> None:
    asked = {"origin": "https://a.example", "access-control-request-method": "POST"}
    assert http.options("/v1/completions", headers=asked).status_code == 405
    assert "access-control-allow-origin" not in http.get("/v1/models", headers=asked).headers
    with Running(served.engine.config, borrowed(served), allowed_origins=["https://a.example"]) as other:
        allowed = httpx.options(f"{other.url}/v1/completions", headers=asked)
        assert allowed.status_code == 200 and allowed.headers["access-control-allow-origin"] == "https://a.example"
        refused = httpx.get(f"{other.url}/v1/nothing", headers={"origin": "https://a.example"})
        assert refused.status_code == 404 and "access-control-allow-origin" in refused.headers


class Borrowed:
    """Another server's AsyncLLM, which outlives this one."""

    def __init__(self, llm: Any):
        self._llm = llm

    def __getattr__(self, name: str) -> Any:
        return getattr(self._llm, name)

    async def shutdown(self) -> None:
        pass


def borrowed(served: Running) -> Any:
    return Borrowed(served.server.llm)


# ---- when things go wrong


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_pages(served: Running, stream: bool) -> None:
    body = json.dumps({**LONG, "stream": stream, "n": 2, "prompt": ["a", "b"]}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    with slow_steps(served, 0.01), socket.create_connection(("127.0.0.1", int(served.url.rsplit(":")[-1]))) as sock:
        sock.sendall(head % len(body) + body)
        while not served.engine.has_unfinished:
            time.sleep(0.005)
        if stream:
            assert b"200 OK" in sock.recv(1000)
        sock.close()
        left = time.monotonic()
        assert served.all_free()
        assert time.monotonic() - left < 1.0  # its 200 tokens would take two seconds and more


class slow_steps:
    """The engine's steps take at least so long."""

    def __init__(self, served: Running, seconds: float):
        self.engine, self.seconds = served.engine, seconds

    def __enter__(self) -> None:
        step = self.engine.step

        def slow() -> Any:
            time.sleep(self.seconds)
            return step()

        self.engine.step = slow

    def __exit__(self, *exception: object) -> None:
        del self.engine.step


def test_a_failing_step_is_a_500_and_the_engine_goes_on(
    served: Running, http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, failures = served.engine.runner.run, []

    def failing(*plan: Any) -> Any:
        if failures:
            raise failures.pop()
        return run(*plan)

    monkeypatch.setattr(served.engine.runner, "run", failing)
    for body in (LONG, {**LONG, "stream": True}):  # before its first token: a status of its own
        failures.append(RuntimeError("the device said no"))
        answer = http.post("/v1/completions", json=body)
        assert answer.status_code == 500 and "the device said no" in answer.json()["error"]["message"]
    with http.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as answer:  # in the middle: an event
        lines = answer.iter_lines()
        next(lines)
        failures.append(RuntimeError("the device said no"))
        rest = [line for line in lines if line]
    assert "the device said no" in json.loads(rest[-2].removeprefix("data: "))["error"]["message"]
    assert rest[-1] == "data: [DONE]"
    assert served.all_free()
    assert complete(http, prompt="a", max_tokens=3)["choices"][0]["finish_reason"] in ("length", "stop")


def test_a_full_queue_is_a_429(served: Running) -> None:
    with (
        Running(served.engine.config, borrowed(served), max_queued_requests=0) as other,
        slow_steps(served, 0.01),
        httpx.Client(base_url=other.url) as http,
        http.stream("POST", "/v1/completions", json={**LONG, "n": 8, "stream": True}) as first,
    ):
        lines = first.iter_lines()  # kept: dropping it would close the connection
        next(lines)
        refused = http.post("/v1/completions", json=LONG)
        assert refused.status_code == 429 and refused.headers["retry-after"] == "1"
        assert refused.json()["error"]["type"] == "rate_limit_error"
        first.close()
        assert other.all_free()
        assert http.post("/v1/completions", json={**LONG, "max_tokens": 1}).status_code == 200


def test_stopping_finishes_what_runs_and_refuses_the_rest(served: Running) -> None:
    with Running(served.engine.config, borrowed(served)) as other, httpx.Client(base_url=other.url) as http:
        with slow_steps(served, 0.01), http.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as running:
            lines = running.iter_lines()
            next(lines)
            other.loop.call_soon_threadsafe(other.server.stop)
            with httpx.Client(base_url=other.url) as second:
                while second.get("/ready").status_code == 200:
                    time.sleep(0.01)
                refused = second.post("/v1/completions", json=LONG)
                assert refused.status_code == 503 and "retry-after" in refused.headers
                assert second.get("/health").status_code == 200
            *_, reason, done = [line for line in lines if line]
            assert '"finish_reason":"length"' in reason and done == "data: [DONE]"
        assert other.join() == 0


def test_stopping_aborts_what_does_not_finish_in_time(served: Running) -> None:
    with Running(served.engine.config, borrowed(served), shutdown_timeout=0.1) as other, slow_steps(served, 0.05):
        with (
            httpx.Client(base_url=other.url) as http,
            http.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as r,
        ):
            lines = r.iter_lines()
            next(lines)
            other.loop.call_soon_threadsafe(other.server.stop)
            *_, error, done = [line for line in lines if line]
            assert json.loads(error.removeprefix("data: "))["error"]["type"] == "server_error" and done == "data: [DONE]"
        assert other.join() == 0
    assert served.all_free()


def test_a_dead_engine_ends_the_server(served: Running) -> None:
    with Running(served.engine.config) as other, httpx.Client(base_url=other.url, timeout=20) as http:

        def dead() -> Any:
            raise EngineDeadError("the device is gone")

        other.engine.step = dead
        answer = http.post("/v1/completions", json={"prompt": "a"})
        assert answer.status_code == 500 and "the device is gone" in answer.json()["error"]["message"]
        assert http.get("/health").status_code == 503 and http.get("/ready").status_code == 503
        assert http.post("/v1/completions", json={"prompt": "a"}).status_code == 503
        assert other.join() == 1


def test_not_ready_before_it_is_warm(served: Running) -> None:
    slow, gate = borrowed(served), threading.Event()

    async def warm_up() -> None:
        await asyncio.to_thread(gate.wait)

    slow.warm_up = warm_up
    other = Running(served.engine.config, slow, warmup=True)
    starting = threading.Thread(target=other.__enter__)
    starting.start()
    with httpx.Client(base_url=other.url) as http:
        assert http.get("/health").status_code == 200 and http.get("/ready").status_code == 503
        assert http.post("/v1/completions", json=LONG).status_code == 503
        gate.set()
        starting.join()
        assert http.get("/ready").status_code == 200
    other.__exit__()


def test_a_model_without_a_tokenizer(served: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served.engine, "tokenizer", None)
    with Running(served.engine.config, borrowed(served)) as other, httpx.Client(base_url=other.url, timeout=60) as http:
        answer = complete(http, prompt=[5, 6], max_tokens=3, ignore_eos=True, logprobs=1, return_token_ids=True)
        choice = answer["choices"][0]
        assert choice["text"] == "" and len(choice["token_ids"]) == 3
        assert choice["logprobs"]["tokens"] == [f"token_id:{i}" for i in choice["token_ids"]]
        with slow_steps(served, 0.05):
            chunks = events(http, "/v1/completions", prompt=[5, 6], max_tokens=3, ignore_eos=True)
        assert [c["choices"][0]["text"] for c in chunks] == ["", "", ""]  # one a token, for who measures
        for path, body in (
            ("/v1/chat/completions", {"messages": MESSAGES}),
            ("/v1/completions", {"prompt": "text"}),
            ("/tokenize", {"prompt": "a"}),
            ("/detokenize", {"tokens": [1]}),
        ):
            refused = http.post(path, json=body)
            assert refused.status_code == 400 and "tokenizer" in refused.json()["error"]["message"]


def test_options(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve", "one", "--model", "two"]) == 2 and "two models" in capsys.readouterr().err
    assert cli.main(["serve", "random:tiny-llama", "--port", "-1"]) == 2 and "port = -1" in capsys.readouterr().err
    monkeypatch.setenv("JAXINFER_API_KEY", "from the environment")
    assert Running(engine_config(None)).server.door.api_key == "from the environment"
    for wrong in ({"port": 70000}, {"api_key": ""}, {"shutdown_timeout": -1.0}, {"max_queued_requests": -1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            ServerConfig(**wrong)


# ---- a fuzzer over the server's own description


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.name.lower())
def test_fuzzed(served: Running, mode: GenerationMode) -> None:
    schema, paths = schemathesis.openapi.from_url(f"{served.url}/openapi.json"), set()
    for result in schema.get_all_operations():
        operation = result.ok()
        if mode is GenerationMode.NEGATIVE and operation.method == "get":
            continue  # takes nothing that could be wrong
        paths.add(operation.path)

        @given(case=operation.as_strategy(generation_mode=mode))
        @settings(max_examples=15, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
        def ask(case: Any) -> None:
            # A schema cannot say what vocabulary and max_model_len allow: what fits it may still be a 400.
            case.call_and_validate(excluded_checks=[positive_data_acceptance])

        ask()
    assert {"/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize", "/generate"} <= paths
    assert served.all_free()
