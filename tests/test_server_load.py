"""The server under load: many clients, a third of which leave, slow readers, nonsense; a signal; and a trained model."""

import asyncio
import gc
import json
import logging
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from served import NAME, Running, engine_config, tokenizer_directory

from jaxinfer.gate import TURNS

CLIENTS = 200


async def request(port: int, method: str, body: bytes, *headers: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = [f"{method} HTTP/1.1", "host: x", "connection: close", f"content-length: {len(body)}", *headers]
    writer.write("\r\n".join(head).encode() + b"\r\ncontent-type: application/json\r\n\r\n" + body)
    await writer.drain()
    return reader, writer


async def one_client(port: int, number: int, dice: random.Random) -> str:
    """A client of some kind; returns what it saw."""
    stream, tokens = dice.random() < 0.7, dice.randint(1, 60)
    body: dict[str, Any] = {"prompt": [dice.randrange(3, 500) for _ in range(dice.randint(1, 100))], "stream": stream}
    body |= {"max_tokens": tokens, "ignore_eos": True, "n": dice.choice([1, 1, 2])}
    kind = ["leaves", "slow", "malformed", "huge", "wrong key", *["stays"] * 4, *["leaves"] * 2][number % 11]
    data = json.dumps(body).encode()
    key = "authorization: Bearer key"
    if kind == "malformed":
        data = dice.choice([b"", b"{", b'{"prompt": 1e999}', b"[" * 5000, data[:-5], b"\xff\xfe", b'{"prompt":"a","x":1}'])
    elif kind == "huge":
        data = b'{"prompt": "' + b"a" * (3 << 20) + b'"}'
    elif kind == "wrong key":
        key = "authorization: Bearer kex"
    await asyncio.sleep(dice.random())
    reader, writer = await request(port, "POST /v1/completions", data, key)
    try:
        if kind == "leaves":
            await asyncio.sleep(dice.random() / 2)
            if dice.random() < 0.5:
                await reader.read(200)
            return kind
        if kind == "slow":  # a trickle
            answer = b""
            while part := await reader.read(500):
                answer += part
                await asyncio.sleep(0.01)
        else:
            answer = await reader.read()
    finally:
        writer.close()
    status = int(answer.split(b" ", 2)[1])
    if kind in ("stays", "slow"):
        assert status == 200, answer[:500]
        if stream:
            assert answer.rstrip().endswith(b"0") and b"data: [DONE]" in answer
            assert answer.count(b'"finish_reason":"length"') == body["n"]
        else:
            usage = json.loads(answer.partition(b"\r\n\r\n")[2])["usage"]
            assert usage["completion_tokens"] == tokens * body["n"]
    else:
        assert status == {"malformed": 400, "huge": 413, "wrong key": 401}[kind], answer[:500]
    return kind


@pytest.mark.slow
def test_two_hundred_clients_leave_nothing_behind(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "jaxinfer")  # pytest keeps what it captures, and another test may have asked for more
    config = engine_config(tokenizer_directory(tmp_path), max_num_seqs=16, num_gpu_blocks_override=100)
    with Running(config, api_key="key", max_request_bytes=1 << 20) as running:
        port = int(running.url.rsplit(":")[-1])

        async def wave(seed: int) -> Counter[str]:
            clients = (one_client(port, i, random.Random(seed * CLIENTS + i)) for i in range(CLIENTS))
            return Counter(await asyncio.gather(*clients))

        def tasks() -> int:
            answer = asyncio.run_coroutine_threadsafe(count_tasks(), running.loop)
            return answer.result(10)

        async def count_tasks() -> int:
            return len(asyncio.all_tasks())

        seen = asyncio.run(wave(0))
        assert seen["leaves"] > 50 and seen["slow"] > 15 and len(seen) == 6
        assert running.all_free()
        idle, threads = tasks(), threading.active_count()
        tracemalloc.start()
        held = []
        for seed in range(1, 6):
            asyncio.run(wave(seed))
            assert running.all_free()
            gc.collect()
            held.append(tracemalloc.get_traced_memory()[0])
            # Who leaves when is chance, so a wave may be the first to need some program; a leak grows with every wave.
            if len(held) > 1 and held[-1] - held[-2] < 1 << 18:
                break
        else:
            pytest.fail(f"every {CLIENTS} clients more hold more bytes: {held}")
        tracemalloc.stop()
        assert tasks() == idle and threading.active_count() == threads
        assert running.server.door.turns._value == TURNS
        assert not running.server.door.sequences and not running.server.llm._streams  # type: ignore[union-attr]
    assert running.status == 0


# ---- a process of its own


class Process:
    """`jaxinfer serve` of a tiny model; its log in `lines`."""

    def __init__(self, *flags: str):
        command = [sys.executable, "-m", "jaxinfer", "serve", "random:tiny-llama", "--port", "0", "--num-cpu-devices", "1"]
        command += ["--max-model-len", "256", "--max-num-seqs", "4", "--block-size", "16", "--no-use-tqdm", *flags]
        environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
        self.process = subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, env=environment, cwd=Path(__file__).parents[1]
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.url = self.wait_for(r"listening on (http://\S+)")

    def _read(self) -> None:
        assert self.process.stderr is not None
        self.lines.extend(iter(self.process.stderr.readline, ""))

    def wait_for(self, pattern: str, seconds: float = 90) -> str:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if match := re.search(pattern, "".join(self.lines)):
                return match[match.lastindex or 0]
            if self.process.poll() is not None:
                self._reader.join(5)
                break
            time.sleep(0.02)
        raise AssertionError(f"no {pattern!r} in the log:\n{''.join(self.lines)}")

    def end(self, seconds: float = 60) -> int:
        try:
            status = self.process.wait(seconds)
        finally:
            self.process.kill()
        self._reader.join(5)
        return status


@pytest.mark.slow
def test_sigterm_under_load_finishes_what_runs_and_exits_0() -> None:
    server = Process("--no-warmup", "--shutdown-timeout", "60", "--api-key", "key")
    server.wait_for("ready: ")
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="key", max_retries=0) as client:
        ask: dict[str, Any] = {"model": "random:tiny-llama", "prompt": [1, 2], "max_tokens": 250}
        ask["extra_body"] = {"ignore_eos": True}
        client.completions.create(**ask)  # compile
        streams = [client.completions.create(**ask, stream=True) for _ in range(8)]
        first = [next(iter(stream)) for stream in streams]
        server.process.send_signal(signal.SIGTERM)
        reasons = [[chunk.choices[0].finish_reason for chunk in stream] for stream in streams]
        assert len(first) == 8 and all(r[-1] == "length" for r in reasons)
    assert server.end() == 0
    finished = [line for line in server.lines if "POST /v1/completions 200" in line and "250 generated" in line]
    assert len(finished) == 9
    assert "Traceback" not in "".join(server.lines)


def test_sigterm_while_loading_and_a_taken_port_and_a_wrong_model() -> None:
    server = Process()  # warms up, for a while
    assert httpx.get(f"{server.url}/health").status_code == 200
    assert httpx.get(f"{server.url}/ready").status_code == 503
    port = server.url.rsplit(":")[-1]
    taken = subprocess.run(
        [sys.executable, "-m", "jaxinfer", "serve", "random:tiny-llama", "--port", port], capture_output=True, text=True
    )
    assert taken.returncode == 2 and f"cannot listen on 127.0.0.1, port {port}" in taken.stderr
    server.process.send_signal(signal.SIGTERM)
    assert server.end(20) == 0
    wrong = [sys.executable, "-m", "jaxinfer", "serve", "/no/such/model", "--port", "0", "--num-cpu-devices", "1"]
    told = subprocess.run(wrong, capture_output=True, text=True)
    assert told.returncode == 2 and told.stderr.splitlines()[-1].startswith("error: ") and "Traceback" not in told.stderr


# ---- a trained model


@pytest.mark.slow
def test_64_streams_of_smollm2_give_the_tokens_they_have_alone(smollm2_path: Path) -> None:
    config = engine_config(
        None, str(smollm2_path), max_num_seqs=32, max_model_len=128, block_size=32, max_num_batched_tokens=256
    )
    prompts = [f"{word} {n}" for n in range(2) for word in ("Once", "The cat", "def f", "1, 2,", "A", "Paris", "x =", "I")]

    async def ask(client: openai.AsyncOpenAI, prompt: str) -> list[int]:
        stream = await client.completions.create(
            model=NAME, prompt=prompt, max_tokens=8, temperature=0, stream=True, extra_body={"return_token_ids": True}
        )
        return [token async for chunk in stream for token in chunk.choices[0].token_ids]

    async def main(url: str) -> tuple[list[list[int]], list[list[int]]]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", timeout=300) as client:
            together = await asyncio.gather(*(ask(client, prompt) for prompt in prompts * 4))
            return together, [await ask(client, prompt) for prompt in prompts]

    with Running(config) as running:
        together, alone = asyncio.run(main(running.url))
        assert len(together) == 64 and together == alone * 4 and len({tuple(t) for t in alone}) > 10
        assert running.all_free()
