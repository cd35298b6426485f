"""What XLA made of the steps: collectives counted, cache updated in place, nothing large gathered, nothing compiled twice."""

import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxinfer import LLM, SamplingParams, runtime
from jaxinfer.buckets import DecodeBucket, PrefillBucket, coarse, decode_buckets, prefill_buckets
from jaxinfer.cache import KVCache, abstract_cache
from jaxinfer.config import ModelConfig, model_config_file, read_json
from jaxinfer.model import Batch, Rows, Transformer
from jaxinfer.sharding import make_mesh, padded_dims
from pallas_kernels import add_rms_norm

GREEDY = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)


def llm(tp: int, **kwargs) -> LLM:
    settings = {"max_num_seqs": 4, "max_model_len": 128, "block_size": 16, "max_num_batched_tokens": 32, "use_tqdm": False}
    return LLM("random:tiny-llama", tensor_parallel_size=tp, **{**settings, **kwargs})


def collectives(text: str) -> dict[str, list[int]]:
    """Kind → the number of elements of each collective's largest result in a compiled program's text."""
    found: dict[str, list[int]] = {}
    pattern = re.compile(r"= (.*?) (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(")
    for result, kind in pattern.findall(text):
        sizes = [int(np.prod([int(d) for d in dims.split(",") if d])) for dims in re.findall(r"\w+\[([\d,]*)\]", result)]
        found.setdefault(kind, []).append(max(sizes, default=1))
    return found


@pytest.mark.parametrize("tp", [2, 4, 8])
def test_decode_reduces_twice_a_layer_and_gathers_nothing_large(tp: int) -> None:
    engine = llm(tp).engine
    runner, layers = engine.runner, engine.model_config.num_hidden_layers
    bucket = next(b for b in runner.decode_buckets if b.greedy and b.rows == 4)
    found = collectives(runner.compile(bucket, runner.cache).as_text())
    hidden = bucket.rows * engine.model_config.hidden_size
    # Two a layer and the embedding's; the sampler's merge is one small all-gather of (value, id) a row and shard.
    assert found.pop("all-reduce") == [hidden] * (2 * layers + 1)
    assert found.pop("all-gather") == [2 * bucket.rows * tp]
    assert not found


@pytest.mark.parametrize("tp", [1, 4])
@pytest.mark.parametrize("kind", ["greedy", "sampling", "steps", "prefill"])
def test_the_cache_is_updated_in_place(tp: int, kind: str) -> None:
    runner = llm(tp, num_scheduler_steps=3 if kind == "steps" else None).engine.runner
    bucket: DecodeBucket | PrefillBucket
    if kind == "prefill":
        bucket = runner.prefill_buckets[0]
    else:
        steps = 3 if kind == "steps" else 1
        bucket = next(b for b in runner.decode_buckets if b.rows == 4 and b.steps == steps and b.greedy == (kind != "sampling"))
    compiled = runner.compile(bucket, runner.cache)
    assert compiled.memory_analysis().alias_size_in_bytes >= runner.num_pages * runner.page_bytes
    shape = ",".join(map(str, runner.cache.keys[0].addressable_shards[0].data.shape))
    if kind != "steps":  # the CPU backend copies what a loop carries; GPU programs are checked on the GPU
        assert not re.findall(rf"= f32\[{shape}\]\S* copy\(", compiled.as_text())


@pytest.mark.skipif(jax.__version__ < "0.11", reason="Mosaic GPU's lowering needs jax 0.11 or newer")
@pytest.mark.parametrize("tp", [1, 4])
@pytest.mark.parametrize(("cut", "kernels"), [(False, 1), (True, 2)])  # the last block's second half has fewer rows
def test_all_norms_are_one_kernel_to_compile(tp: int, cut: bool, kernels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(add_rms_norm, "why_unsupported", lambda *args: None)
    config = ModelConfig.from_hf({**read_json(model_config_file("tiny-llama")), "hidden_size": 128, "num_hidden_layers": 3})
    mesh, dtype = make_mesh(tp), jnp.dtype("bfloat16")
    graphdef, state = nnx.split(Transformer(config, mesh, dtype))
    leaves, treedef = jax.tree.flatten(state)
    cache = abstract_cache(config, padded_dims(config, tp), 9, 16, dtype, mesh)
    ints = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)  # noqa: E731

    def prefill(leaves: list[jax.Array], cache: KVCache, token_T: jax.Array, rows: Rows) -> tuple[jax.Array, KVCache]:
        return nnx.merge(graphdef, jax.tree.unflatten(treedef, leaves))(token_T, cache, Batch(chunks=rows), last_only=cut)

    traced = jax.jit(prefill, donate_argnums=1).trace(leaves, cache, ints(32), Rows(ints(2, 4), ints(2), ints(2), ints(2)))
    assert traced.lower(lowering_platforms=("cuda",)).as_text().count("custom_call @mosaic_gpu_v2") == kernels


def test_programs_are_compiled_with_options_that_xla_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's: its kernels must not be handed parts of arrays in place (tests/test_gpu.py runs them)."""
    options = runtime.compiler_options("gpu")
    assert options == {"xla_gpu_enable_dynamic_slice_fusion": False} and not runtime.compiler_options("cpu")
    assert jax.jit(lambda x: x + 1, compiler_options=options)(1) == 2
    monkeypatch.setattr(runtime, "compiler_options", lambda platform: {f"xla_{platform}_nonsense": True})
    model = LLM("random:tiny-llama", dtype="float32", max_model_len=64, max_num_seqs=2, use_tqdm=False)
    with pytest.raises(Exception, match="xla_cpu_nonsense"):
        model.engine.runner.warm_up()


def test_donated_buffers_are_gone_and_the_pool_stays_where_it_is() -> None:
    model = llm(2)
    before = [*jax.tree.leaves(model.engine.runner.cache), *jax.tree.leaves(model.engine.runner.state)]
    pointers = [shard.data.unsafe_buffer_pointer() for shard in model.engine.runner.cache.keys[0].addressable_shards]
    model.generate([[1, 2, 3]], GREEDY, use_tqdm=False)
    assert all(array.is_deleted() for array in before)
    after = model.engine.runner.cache.keys[0].addressable_shards
    assert [shard.data.unsafe_buffer_pointer() for shard in after] == pointers


def test_nothing_is_compiled_after_warm_up(caplog: pytest.LogCaptureFixture) -> None:
    model = llm(2, max_num_seqs=2)
    model.warm_up()
    runner = model.engine.runner
    buckets = len(runner.decode_buckets) + len(runner.prefill_buckets)
    assert model.stats()["num_compilations"] == buckets
    model.generate([[1, 2, 3]], GREEDY, use_tqdm=False)  # the little programs round the buckets: admit, device_put
    with caplog.at_level(logging.WARNING), jax.log_compiles():
        sampled = SamplingParams(max_tokens=5, seed=1, logprobs=3, top_p=0.9)
        params = [GREEDY, sampled, SamplingParams(max_tokens=3, prompt_logprobs=2)]
        model.generate([list(range(1, 60)), [5], [9] * 40], params, use_tqdm=False)
    assert not [r.message for r in caplog.records if "Compiling" in r.message]
    assert model.stats()["num_compilations"] == buckets


@pytest.mark.parametrize("max_model_len", [64, 2048, 8192, 131072])
@pytest.mark.parametrize("max_num_seqs", [1, 2, 16, 256])
@pytest.mark.parametrize("steps", [None, 8])
def test_buckets_are_few_and_cover_everything(max_model_len: int, max_num_seqs: int, steps: int | None) -> None:
    from jaxinfer.config import EngineConfig

    config = EngineConfig(model="x", max_num_seqs=max_num_seqs, num_scheduler_steps=steps)
    decode, prefill = decode_buckets(config, max_model_len), prefill_buckets(config, max_model_len, 2048)
    assert len(set(decode)) == len(decode) <= 12
    assert len(set(prefill)) == len(prefill) <= 8
    pages = -(-max_model_len // config.block_size)
    for k in {1, steps or 1}:
        for greedy in (True, False):
            assert any((b.steps, b.greedy, b.rows, b.pages) == (k, greedy, max(2, max_num_seqs), pages) for b in decode)
    assert {b.pages for b in prefill if b.prompt_logprobs} == {pages}
    assert any(b.pages == pages and not b.prompt_logprobs for b in prefill)
    # Where rows decode beside prompts, the step has as many tokens in all as the scheduler counts.
    both = [b for b in prefill_buckets(config, max_model_len, 4096, any_length=True) if b.decode_rows]
    assert [b.tokens + b.decode_rows for b in both] == ([256, 1024] if max_num_seqs > 1 else [])


@pytest.mark.parametrize(
    ("max_num_seqs", "rows"),
    [
        (1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (32, [1, 2, 4, 8, 16, 32]), (64, [1, 2, 4, 8, 16, 32, 64]),
        (256, [2, 16, 64, 128, 192, 256]),
    ],
)
def test_decode_programs_where_one_serves_every_length(max_num_seqs: int, rows: list[int]) -> None:
    from jaxinfer.config import EngineConfig

    buckets = decode_buckets(EngineConfig(model="x", max_num_seqs=max_num_seqs), 8192, any_length=True)
    assert [b.rows for b in buckets if b.greedy] == [b.rows for b in buckets if not b.greedy] == rows


def test_the_pool_is_sized_in_coarse_steps_and_never_below_a_sequence() -> None:
    assert [coarse(n) for n in (0, 1, 255, 256, 257, 511, 513, 13300)] == [0, 1, 255, 256, 256, 510, 512, 13248]
    assert [coarse(n, 513) for n in (300, 512, 513, 515, 516, 1029)] == [300, 512, 513, 513, 516, 1024]
    assert all(coarse(n) <= n < 1.008 * coarse(n) for n in range(256, 20000, 7))
