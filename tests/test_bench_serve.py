"""`bench serve` against a small OpenAI server whose timing and failures are known."""

import asyncio
import json
import math
import subprocess
import sys
import threading
import time
from collections import Counter

import numpy as np
import pytest

pytest.importorskip("aiohttp")
from aiohttp import web

from jaxinfer import cli
from jaxinfer.bench import serve
from jaxinfer.bench.client import Reply
from jaxinfer.bench.datasets import SampleRequest

FIRST, GAP = 0.2, 0.05  # seconds to the first token, and between tokens
BAD = "refused page dies error-event cut abort nothing garbage odd no-usage slow".split()


class FakeServer:
    """Streams max_tokens tokens of empty text; a prompt that names a fault of BAD gets it, except the first request."""

    def __init__(self):
        self.bodies, self.arrivals, self.headers, self.running, self.peak, self.starting = [], [], [], 0, 0, 0
        self.loop, self.started = asyncio.new_event_loop(), threading.Event()
        self.thread = threading.Thread(target=self.loop.run_until_complete, args=(self.main(),))
        self.thread.start()
        assert self.started.wait(10)

    async def main(self):
        app = web.Application()
        app.router.add_get("/v1/models", lambda request: self.models())
        app.router.add_post("/v1/completions", self.answer)
        app.router.add_post("/v1/chat/completions", self.answer)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0, shutdown_timeout=0.1).start()
        self.url = "http://{}:{}".format(*runner.addresses[0])
        self.stopped = asyncio.Event()
        self.started.set()
        await self.stopped.wait()
        await runner.cleanup()

    def close(self):
        self.loop.call_soon_threadsafe(self.stopped.set)
        self.thread.join()
        self.loop.close()

    async def models(self):
        if self.starting:
            self.starting -= 1
            return web.json_response({"error": {"message": "the model is being loaded"}}, status=503)
        return web.json_response({"object": "list", "data": [{"id": "fake-model"}, {"id": "other"}]})

    async def answer(self, request):
        self.arrivals.append(time.perf_counter())
        self.headers.append(request.headers)
        body = await request.json()
        self.bodies.append(body)
        self.running += 1
        self.peak = max(self.peak, self.running)
        try:
            return await self.stream(request, body, body.get("prompt") if len(self.bodies) > 1 else "")
        finally:
            self.running -= 1

    async def stream(self, request, body, fault):
        chat = "messages" in body
        if fault == "refused":
            return web.json_response({"error": {"message": "prompt too long", "code": 400}}, status=400)
        if fault == "page":
            return web.Response(text="<html>\nBad gateway</html>", status=502)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)

        async def send(event):
            line = b"data: " + (event if isinstance(event, bytes) else json.dumps(event).encode()) + b"\r\n\r\n"
            for part in line[:20], line[20:]:  # a packet's end is not a line's
                await response.write(part)
                await asyncio.sleep(0.002)

        if chat:
            await send({"choices": [{"delta": {"role": "assistant", "content": ""}}], "usage": None})
        count = 0 if fault == "nothing" else body.get("max_tokens") or body["max_completion_tokens"]
        for i in range(count):
            await asyncio.sleep(FIRST if i == 0 else GAP)
            if i == 1 and fault == "dies":
                request.transport.abort()
            elif i == 1 and fault == "error-event":
                await send({"error": {"message": "the step failed"}})
            elif i == 1 and fault == "garbage":
                await send(b"{what}")
            elif i == 1 and fault == "odd":
                await send(b"[1]")
            elif i == 1 and fault == "slow":
                await asyncio.sleep(10)
            content = {"delta": {"content": "é"}} if chat else {"text": ""}
            reason = None if i + 1 < count or chat else "abort" if fault == "abort" else "length"
            await send({"choices": [content | {"index": 0, "finish_reason": reason}], "usage": None})
        if chat:
            await send({"choices": [{"delta": {}, "finish_reason": "length"}], "usage": None})
        if fault != "no-usage":
            usage = {"prompt_tokens": 7, "completion_tokens": count, "prompt_tokens_details": {"cached_tokens": 2}}
            await send({"choices": [], "usage": usage})
        if fault != "cut":
            await send(b"[DONE]")
        return response


@pytest.fixture
def server():
    server = FakeServer()
    yield server
    server.close()


def bench(server, tmp_path, *words):
    """(exit status, result) of the command."""
    path = tmp_path / "result.json"
    argv = ["bench", "serve", "--base-url", server.url, "--output", str(path), *map(str, words)]
    status = cli.main(argv)
    return status, json.loads(path.read_text())


def test_times_and_counts_of_a_known_stream(server, tmp_path, capsys):
    words = "--num-prompts 3 --input-len 7 --output-len 5 --random-vocab-size 50 --ignore-eos --seed 3 --api-key k".split()
    words += "--num-warmups 2 --percentile-metrics ttft,itl,e2el --metric-percentiles 50,99.9".split()
    status, result = bench(server, tmp_path, *words)
    assert status == 0
    assert (result["completed"], result["failed"], result["model_id"]) == (3, 0, "fake-model")
    # Tokens are the server's usage, though none has text.
    assert (result["total_input_tokens"], result["total_output_tokens"], result["total_cached_tokens"]) == (21, 15, 6)
    assert result["output_chunks"] == 15 and result["generated_texts"] == ["", "", ""]
    for ttft, itl in zip(result["ttfts"], result["itls"], strict=True):
        assert FIRST * 0.99 <= ttft < FIRST + 0.5 and len(itl) == 4
    for metric in ("tpot", "itl"):
        assert GAP * 0.9 <= result[f"median_{metric}_ms"] / 1e3 < GAP * 4
    assert result["mean_e2el_ms"] == pytest.approx(result["mean_ttft_ms"] + 4 * result["mean_tpot_ms"])
    assert result["duration"] >= result["mean_e2el_ms"] / 1e3
    assert result["max_concurrent_requests"] == 3
    assert result["output_throughput"] == pytest.approx(15 / result["duration"])
    printed = capsys.readouterr().out
    assert "P99.9 ITL (ms):" in printed and "Mean E2EL" in printed and "TPOT" not in printed
    assert "note: 6 of the input tokens came from the server's prefix cache" in printed
    assert "api_key" not in json.dumps(result).replace('"api_key": null', "")
    # What was sent: one test request, two warm-ups and the measured ones, all different.
    assert len(server.bodies) == 6 and all(headers["Authorization"] == "Bearer k" for headers in server.headers)
    assert len({tuple(body["prompt"]) for body in server.bodies}) == 6
    for body in server.bodies:
        assert len(body["prompt"]) == 7 and max(body.pop("prompt")) < 50
        assert body == {
            "model": "fake-model", "max_tokens": 5, "temperature": 0.0, "ignore_eos": True, "stream": True,
            "stream_options": {"include_usage": True},
        }  # fmt: skip


def test_failures_are_counted_and_shown_by_what_went_wrong(server, tmp_path, capsys):
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": p, "output_tokens": 2}) for p in [*BAD, "refused", "fine"]))
    words = f"--dataset-name custom --dataset-path {path} --timeout 1.5".split()
    status, result = bench(server, tmp_path, *words)
    assert status == 1
    assert (result["completed"], result["failed"], result["total_output_tokens"]) == (2, 11, 4)
    assert sum(count is None for count in result["ttfts"]) == 4  # refused twice, page, nothing
    errors = Counter(result["errors"])
    assert errors[""] == 2 and errors["HTTP 400: prompt too long"] == 2
    for error in (
        "HTTP 502: <html> Bad gateway</html>", "the step failed", "the stream ended before [DONE]", "finish_reason abort",
        "the answer has no token", "timed out after 1.5 s (--timeout)",
    ):  # fmt: skip
        assert errors[error] == 1
    assert sum(error.startswith(("not an answer as OpenAI's", "Client", "Server")) for error in errors) == 3
    printed = capsys.readouterr().out
    assert "2 failed: HTTP 400: prompt too long\n" in printed
    assert "note: 1 answers came without usage" in printed


def test_chat_sends_words_and_counts_neither_opening_nor_end(server, tmp_path):
    words = "--endpoint /v1/chat/completions --model m --num-prompts 1 --input-len 6 --output-len 3".split()
    status, result = bench(server, tmp_path, *words)
    assert status == 0 and result["model_id"] == "m"
    assert result["generated_texts"] == ["ééé"] and result["output_chunks"] == 3
    assert result["ttfts"][0] >= FIRST * 0.99  # the opening comes at once
    body = server.bodies[1]
    assert len(body["messages"][0]["content"].split()) == 6 and body["max_completion_tokens"] == 3


def test_waits_for_a_server_that_starts(server, tmp_path, capsys):
    server.starting = 2
    words = "--num-prompts 1 --input-len 1 --output-len 1".split()
    status = cli.main(["bench", "serve", "--base-url", server.url, *words])
    assert status != 0 and "give --ready-check-timeout-sec to wait for it" in capsys.readouterr().err and server.starting == 1
    status, result = bench(server, tmp_path, *words, "--ready-check-timeout-sec", 30)
    assert status == 0 and result["completed"] == 1 and server.starting == 0
    server.starting = 100
    status = cli.main(["bench", "serve", "--base-url", server.url, *words, "--ready-check-timeout-sec", "0.6"])
    told = capsys.readouterr().err
    assert status != 0 and "is not ready after 0.6 s" in told and "the model is being loaded" in told
    assert cli.main(["bench", "serve", "--ready-check-timeout-sec", "-1"]) != 0
    assert "--ready-check-timeout-sec is -1.0; it must be at least 0" in capsys.readouterr().err


def test_at_most_max_concurrency_at_a_time(server, tmp_path):
    words = "--num-prompts 7 --max-concurrency 3 --input-len 1 --output-len 1".split()
    _, result = bench(server, tmp_path, *words)
    assert server.peak == 3 and result["max_concurrent_requests"] == 3
    assert result["duration"] >= 3 * FIRST * 0.99
    assert result["mean_tpot_ms"] is None  # one token has none after it


def test_requests_are_sent_at_their_time(server, tmp_path):
    words = "--num-prompts 8 --request-rate 4 --seed 5 --input-len 1 --output-len 1".split()
    _, result = bench(server, tmp_path, *words)
    sent = np.array(server.arrivals[1:])
    wanted = np.array(serve.arrivals(8, 4, 1.0, seed=5))
    assert np.abs((sent - sent[0]) - (wanted - wanted[0])).max() < 0.2
    assert np.allclose(result["start_times"], wanted - wanted[0], atol=0.2) and result["request_rate"] == 4


@pytest.mark.parametrize("burstiness", [0.5, 1.0, 4.0])
def test_arrivals_are_a_gamma_process_of_the_asked_rate(burstiness):
    times = serve.arrivals(20000, 8.0, burstiness, seed=1)
    gaps = np.diff([0.0, *times])
    assert times[-1] == pytest.approx(20000 / 8.0) and gaps.min() >= 0
    assert gaps.std() / gaps.mean() == pytest.approx(burstiness**-0.5, rel=0.05)
    if burstiness == 1:  # Poisson: as many gaps above the mean as an exponential has
        assert (gaps > 1 / 8).mean() == pytest.approx(math.exp(-1), abs=0.02)
    assert times == serve.arrivals(20000, 8.0, burstiness, seed=1) != serve.arrivals(20000, 8.0, burstiness, seed=2)
    assert serve.arrivals(3, math.inf, 1.0, seed=1) == [0, 0, 0]


def reply(start, times, output_tokens):
    return Reply(start=start, times=times, input_tokens=10, output_tokens=output_tokens)


def test_the_block_is_vllms():
    replies = [reply(0.0, [0.1, 0.2, 0.4], 3), reply(1.0, [1.2, 1.3], 5), Reply(start=1.0, error="boom")]
    result = serve.summarize([SampleRequest([1], 5)] * 3, replies, 2.0, [99.0])
    options = serve.Options(percentile_metrics="ttft,tpot,itl,e2el", max_concurrency=4, request_rate=2.0)
    expected = """
        ============ Serving Benchmark Result ============
        Successful requests:                     2
        Failed requests:                         1
        Maximum request concurrency:             4
        Request rate configured (RPS):           2.00
        Benchmark duration (s):                  2.00
        Total input tokens:                      20
        Total generated tokens:                  8
        Request throughput (req/s):              1.00
        Output token throughput (tok/s):         4.00
        Peak output token throughput (tok/s):    5.00
        Peak concurrent requests:                1
        Total token throughput (tok/s):          14.00
        ---------------Time to First Token----------------
        Mean TTFT (ms):                          150.00
        Median TTFT (ms):                        150.00
        P99 TTFT (ms):                           199.00
        -----Time per Output Token (excl. 1st token)------
        Mean TPOT (ms):                          87.50
        Median TPOT (ms):                        87.50
        P99 TPOT (ms):                           148.75
        ---------------Inter-token Latency----------------
        Mean ITL (ms):                           133.33
        Median ITL (ms):                         100.00
        P99 ITL (ms):                            198.00
        ----------------End-to-end Latency----------------
        Mean E2EL (ms):                          350.00
        Median E2EL (ms):                        350.00
        P99 E2EL (ms):                           399.00
        ==================================================
        1 failed: boom
        note: a chunk brings 1.60 tokens on average; ITL is the time between chunks
        """
    assert serve.summary(result, options).splitlines() == [line.strip() for line in expected.strip().splitlines()]


def test_a_run_in_which_everything_failed_still_reports():
    result = serve.summarize([SampleRequest([1], 5)], [Reply(error="boom")], 1.0, [99.0])
    assert "Mean TTFT (ms):                          -" in serve.summary(result, serve.Options())
    json.dumps(result, allow_nan=False)


def test_no_jax_in_the_client(server, tmp_path):
    code = (
        "import sys; from jaxinfer import cli; status = cli.main(sys.argv[1:]); "
        "sys.exit(status or 10 * bool({'jax', 'flax', 'torch', 'transformers'} & set(sys.modules)))"
    )
    words = ["bench", "serve", "--base-url", server.url, "--num-prompts", "2", "--input-len", "3", "--output-len", "2"]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Total generated tokens:                  4\n" in done.stdout and list(tmp_path.iterdir()) == []


def test_what_the_server_refuses_at_first_is_an_error_in_one_line(server, capsys):
    server.bodies.append(None)  # the first request is answered as asked now
    argv = ["bench", "serve", "--base-url", server.url, "--dataset-name", "custom"]
    assert cli.main([*argv, "--dataset-path", "no-such-file"]) == 2
    assert cli.main(["bench", "serve", "--base-url", server.url + "/nowhere"]) == 2
    assert cli.main(["bench", "serve", "--base-url", server.url + "/nowhere", "--model", "m"]) == 2
    assert cli.main(["bench", "serve", "--port", "1"]) == 2
    errors = capsys.readouterr().err
    for part in (
        "no-such-file", "/nowhere/v1/models: HTTP 404: 404: Not Found; give --model", "test request to",
        "completions failed: HTTP 404", "no server answers at http://127.0.0.1:1: ClientConnectorError",
    ):  # fmt: skip
        assert part in errors


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--base-url localhost:8000", "must begin with http://"),
        ("--endpoint /v1/embeddings", "must be /v1/completions or /v1/chat/completions"),
        ("--request-rate 0", "--request-rate is 0.0; it must be above 0"),
        ("--burstiness 2", "sent at a --request-rate: give one"),
        ("--max-concurrency 0", "--max-concurrency is 0; it must be at least 1"),
        ("--percentile-metrics ttft,x", "--percentile-metrics x: it must be among ttft,tpot,itl,e2el"),
        ("--metric-percentiles 99,a", "numbers with commas"),
        ("--metric-percentiles 101", "each must be 0 to 100"),
        ("--endpoint /v1/chat/completions --random-vocab-size 9", "a chat takes no token ids"),
        ("--output no-such-folder/x.json", "a folder that exists"),
    ],
)
def test_wrong_options_are_told_before_anything_is_sent(capsys, words, message):
    assert cli.main(["bench", "serve", *words.split()]) == 2
    assert message in capsys.readouterr().err
