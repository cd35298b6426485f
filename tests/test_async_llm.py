"""AsyncLLM: many tasks on one engine, readers that leave, are late or slow, and an engine that dies."""

import asyncio
import gc
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from jaxinfer import SamplingParams
from jaxinfer.async_llm import AsyncLLM, RequestAborted
from jaxinfer.engine import EngineDeadError
from jaxinfer.request import CompletionOutput, RequestMetrics, RequestOutput, RequestOutputKind

SMALL = {"max_num_seqs": 4, "max_model_len": 256, "block_size": 16, "max_num_batched_tokens": 64, "use_tqdm": False}
LONG = {"max_tokens": 240, "ignore_eos": True}
DELTA, FINAL_ONLY = RequestOutputKind.DELTA, RequestOutputKind.FINAL_ONLY


@pytest.fixture(scope="module")
def llm() -> Iterator[AsyncLLM]:
    llm = AsyncLLM("random:tiny-llama", **SMALL)
    for params in (SamplingParams(max_tokens=2), SamplingParams(max_tokens=2, temperature=0.0)):  # compile
        asyncio.run(collect(llm, [1, 2], params))
    yield llm
    asyncio.run(llm.shutdown())


def greedy(n: int, kind: RequestOutputKind = RequestOutputKind.CUMULATIVE) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True, output_kind=kind)


async def collect(llm: AsyncLLM, prompt: list[int], params: SamplingParams, **options: Any) -> list[Any]:
    return [output async for output in llm.generate(prompt, params, **options)]


async def all_free(llm: AsyncLLM) -> bool:
    pool = llm.engine.scheduler.pool
    for _ in range(200):
        if not llm.engine.has_unfinished and pool.num_free == pool.num_pages - 1 and not llm._streams:
            return True
        await asyncio.sleep(0.01)
    return False


@pytest.fixture
def slow(llm: AsyncLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step takes at least 10 ms: 240 tokens more than two seconds."""
    step = llm.engine.step

    def slow_step() -> Any:
        time.sleep(0.01)
        return step()

    monkeypatch.setattr(llm.engine, "step", slow_step)


def test_kinds_of_output_agree(llm: AsyncLLM) -> None:
    async def main() -> None:
        whole = await collect(llm, [1, 2, 3], greedy(9, FINAL_ONLY))
        parts = await collect(llm, [1, 2, 3], greedy(9, DELTA))
        growing = await collect(llm, [1, 2, 3], greedy(9))
        tokens = whole[0].outputs[0].token_ids
        assert len(whole) == 1 and len(tokens) == 9 and whole[0].finished
        assert [token for output in parts for token in output.outputs[0].token_ids] == tokens
        assert growing[-1].outputs[0].token_ids == tokens
        assert all(tokens[: len(o.outputs[0].token_ids)] == o.outputs[0].token_ids for o in growing)

    asyncio.run(main())


def test_many_at_once_are_each_alone(llm: AsyncLLM) -> None:
    prompts = [list(range(1, 2 + i)) for i in range(20)]

    async def main() -> None:
        together = await asyncio.gather(*(collect(llm, p, greedy(10, FINAL_ONLY)) for p in prompts))
        for prompt, outputs in zip(prompts[::7], together[::7]):
            alone = await collect(llm, prompt, greedy(10, FINAL_ONLY))
            assert alone[0].outputs[0].token_ids == outputs[0].outputs[0].token_ids
        assert await all_free(llm)

    asyncio.run(main())


def test_several_event_loops_share_one(llm: AsyncLLM) -> None:
    found: list[Any] = []
    run = lambda: found.append(asyncio.run(collect(llm, [4, 5], greedy(20, FINAL_ONLY))))  # noqa: E731
    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({tuple(outputs[0].outputs[0].token_ids) for outputs in found}) == 1 and len(found) == 4


@pytest.mark.parametrize("how", ["break", "aclose", "cancel", "forget"])
def test_a_reader_that_leaves_aborts_its_request(llm: AsyncLLM, slow: None, how: str) -> None:
    async def main() -> None:
        outputs = llm.generate([1, 2, 3], SamplingParams(**LONG))
        if how == "cancel":
            task = asyncio.create_task(collect(llm, [1, 2, 3], SamplingParams(**LONG)))
            await asyncio.sleep(0.05)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        elif how == "break":
            async for _ in outputs:
                break
            del outputs
            gc.collect()
        else:
            await anext(outputs)
            if how == "aclose":
                await outputs.aclose()
            else:
                del outputs
                gc.collect()
        left = time.monotonic()
        assert await all_free(llm)
        assert time.monotonic() - left < 1.0

    asyncio.run(main())


def test_a_loop_that_ends_takes_its_requests_along(llm: AsyncLLM, slow: None) -> None:
    async def leave() -> None:
        llm.submit(await llm.prepare([1, 2], SamplingParams(**LONG)))
        await asyncio.sleep(0.05)

    asyncio.run(leave())
    assert asyncio.run(all_free(llm))


def test_timeout(llm: AsyncLLM, slow: None) -> None:
    async def main() -> None:
        start = time.monotonic()
        with pytest.raises(asyncio.TimeoutError, match="in time"):
            await collect(llm, [1, 2, 3], SamplingParams(**LONG), timeout=0.2)
        assert 0.15 < time.monotonic() - start < 2.0 and await all_free(llm)
        assert (await collect(llm, [1, 2, 3], greedy(2), timeout=30))[-1].finished

    asyncio.run(main())


def test_abort_ends_the_reader(llm: AsyncLLM, slow: None) -> None:
    async def main() -> None:
        task = asyncio.create_task(collect(llm, [1, 2, 3], SamplingParams(**LONG), request_id="mine"))
        await asyncio.sleep(0.05)
        with pytest.raises(ValueError, match="mine"):
            await collect(llm, [1], greedy(1), request_id="mine")
        await llm.abort("mine")
        await llm.abort("never heard of")
        with pytest.raises(RequestAborted, match="mine"):
            await task
        assert await all_free(llm)

    asyncio.run(main())


@pytest.mark.parametrize("begun", [False, True])
def test_a_cancelled_call_harms_nobody(llm: AsyncLLM, begun: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    entered, go_on = threading.Event(), threading.Event()

    def warm_up() -> None:
        entered.set()
        go_on.wait(10)

    monkeypatch.setattr(llm.engine.runner, "warm_up", warm_up)

    async def main() -> list[Any]:
        first = asyncio.create_task(llm.warm_up())
        await asyncio.to_thread(entered.wait, 10)
        second = asyncio.create_task(llm.warm_up())  # waits for its turn
        await asyncio.sleep(0.05)
        (first if begun else second).cancel()
        go_on.set()
        await asyncio.gather(first, second, return_exceptions=True)
        assert first.cancelled() == begun and second.cancelled() != begun
        return await collect(llm, [1, 2, 3], greedy(3))

    assert len(asyncio.run(main())[-1].outputs[0].token_ids) == 3


def test_wrong_prompts_are_told_and_harm_nobody(llm: AsyncLLM) -> None:
    async def main() -> None:
        good = asyncio.create_task(collect(llm, [1], greedy(20, FINAL_ONLY)))
        for wrong in ([], [512], [1] * 256, "text"):
            with pytest.raises(ValueError):
                await collect(llm, wrong, greedy(1))  # type: ignore[arg-type]
        assert len((await good)[0].outputs[0].token_ids) == 20

    asyncio.run(main())


def test_a_slow_reader_finds_its_outputs_merged_and_slows_nobody(llm: AsyncLLM) -> None:
    async def main() -> None:
        stream = llm.submit(await llm.prepare([1, 2, 3], greedy(100, DELTA)))
        first = await anext(stream)
        others = await asyncio.gather(*(collect(llm, [i], greedy(100, FINAL_ONLY)) for i in range(3)))
        assert all(len(o[0].outputs[0].token_ids) == 100 for o in others)
        assert await all_free(llm)  # it does not have to be read to end
        rest = [output async for output in stream]
        assert len(rest) == 1 and rest[0].finished
        expected = await collect(llm, [1, 2, 3], greedy(100, FINAL_ONLY))
        assert first.outputs[0].token_ids + rest[0].outputs[0].token_ids == expected[0].outputs[0].token_ids

    asyncio.run(main())


def test_two_readers_of_one_stream_are_refused(llm: AsyncLLM, slow: None) -> None:
    async def main() -> None:
        stream = llm.submit(await llm.prepare([1, 2, 3], SamplingParams(**LONG)))
        reader = asyncio.create_task(anext(stream))  # type: ignore[arg-type]
        await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="another task"):
            await anext(stream)
        await reader
        stream.close()
        assert await all_free(llm)

    asyncio.run(main())


def test_adding_outputs_keeps_what_each_sample_got() -> None:
    def output(*samples: CompletionOutput, finished: bool = False) -> RequestOutput:
        return RequestOutput("r", None, [1], None, list(samples), finished, RequestMetrics(0.0, None, None, None))

    old = output(CompletionOutput(0, "a", [1], logprobs=[{1: None}]), CompletionOutput(1, "x", [7]))  # type: ignore[dict-item]
    more = CompletionOutput(0, "b", [2, 3], logprobs=[{2: None}, {3: None}], finish_reason="stop")  # type: ignore[dict-item]
    old.add(output(more, CompletionOutput(1, "", []), finished=True))
    merged = old
    assert [(o.text, o.token_ids, o.finish_reason) for o in merged.outputs] == [("ab", [1, 2, 3], "stop"), ("x", [7], None)]
    assert [list(p) for p in merged.outputs[0].logprobs or []] == [[1], [2], [3]] and merged.finished


def test_a_duplicate_id_costs_the_first_request_nothing(llm: AsyncLLM) -> None:
    async def main() -> None:
        first = llm.submit(await llm.prepare([1, 2, 3], greedy(30), "twin"))
        second = llm.submit(await llm.prepare([4], greedy(3), "twin"))
        second.close()
        outputs = [output async for output in first]
        assert outputs[-1].finished and len(outputs[-1].outputs[0].token_ids) == 30

    asyncio.run(main())


def test_the_loop_is_called_once_a_step(llm: AsyncLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many requests a step has outputs for."""
    steps, calls = 0, 0

    async def main() -> None:
        nonlocal steps
        loop, step = asyncio.get_running_loop(), llm.engine.step
        schedule = loop.call_soon_threadsafe

        def counted(callback: Any, *args: Any, **options: Any) -> Any:
            nonlocal calls
            calls += threading.current_thread().name == "jaxinfer-engine"
            return schedule(callback, *args, **options)

        def counted_step() -> Any:
            nonlocal steps
            outputs = step()
            steps += bool(outputs)
            return outputs

        monkeypatch.setattr(loop, "call_soon_threadsafe", counted)
        monkeypatch.setattr(llm.engine, "step", counted_step)
        await asyncio.gather(*(collect(llm, [i], greedy(30, DELTA)) for i in range(4)))

    asyncio.run(main())
    assert 0 < calls <= steps


def test_crash_reaches_everybody_and_later_comers() -> None:
    async def main() -> None:
        llm = AsyncLLM("random:tiny-llama", **SMALL)
        waiting = [asyncio.create_task(collect(llm, [i], SamplingParams(**LONG))) for i in range(6)]
        while not llm._streams:
            await asyncio.sleep(0.01)

        def broken() -> Any:
            raise MemoryError("no pages on earth")

        llm.engine.step = broken  # type: ignore[method-assign]
        for error in await asyncio.gather(*waiting, return_exceptions=True):
            assert isinstance(error, EngineDeadError) and "no pages on earth" in str(error)
        assert llm.errored and not llm.is_running
        with pytest.raises(EngineDeadError, match="no pages on earth"):
            await collect(llm, [1], greedy(1))
        await llm.shutdown()

    asyncio.run(main())


def test_shutdown_ends_requests_and_thread(llm: AsyncLLM) -> None:
    async def main() -> None:
        async with AsyncLLM("random:tiny-llama", **SMALL) as other:
            task = asyncio.create_task(collect(other, [1], SamplingParams(**LONG)))
            while not other._streams:
                await asyncio.sleep(0.01)
        with pytest.raises(RequestAborted):
            await task
        with pytest.raises(EngineDeadError, match="shut down"):
            await collect(other, [1], greedy(1))
        assert not other.is_running and not other.errored
        assert not other._thread.is_alive()

    asyncio.run(main())


def test_chat_needs_a_tokenizer(llm: AsyncLLM) -> None:
    async def main() -> None:
        with pytest.raises(ValueError, match="tokenizer"):
            async for _ in llm.chat([{"role": "user", "content": "hi"}], greedy(1)):
                pass

    asyncio.run(main())
