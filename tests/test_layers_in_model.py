"""Decode with blocks in a few kernels (pallas_kernels.decode_layer): the model must give them the right things.

Here the reference stands in for the kernel, called in the same way.
"""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxinfer import LLM, SamplingParams
from jaxinfer.cache import KVCache, abstract_cache
from jaxinfer.config import ModelConfig, model_config_file, read_json
from jaxinfer.model import Batch, Block, Rows, Transformer
from jaxinfer.sharding import make_mesh, padded_dims
from pallas_kernels import decode_layer, linear

NAMES = ("qkv", "o", "gate_up", "down")
PROMPTS = [[1, 2, 3], list(range(5, 45)), [7]]


def model(**settings: Any) -> LLM:
    defaults = {"max_num_seqs": 4, "max_model_len": 128, "block_size": 16, "use_tqdm": False}
    return LLM(**{**defaults, **settings})


def tokens(llm: LLM, **kwargs: Any) -> list[list[int]]:
    params = SamplingParams(max_tokens=20, ignore_eos=True, **kwargs)
    return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, params, use_tqdm=False)]


def launches(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Make every block run as one; returns the calls of the kernel as they are traced."""
    calls: list[dict[str, Any]] = []
    layers = decode_layer.layers

    def recorded(residual_BD: Any, weights: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append({"weights": weights, **kwargs})
        return layers(residual_BD, weights, *args, **kwargs)

    monkeypatch.setattr(Block, "runs_as_one", lambda *args: True)
    monkeypatch.setattr(decode_layer, "layers", recorded)
    return calls


@pytest.mark.parametrize(("name", "steps"), [("tiny-llama3", 1), ("tiny-mistral", 4), ("tiny-qwen2", 1)])  # a window; biases
def test_tokens_are_the_same(name: str, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"model": f"random:{name}", "dtype": "float32", "num_scheduler_steps": steps}
    plain = model(**settings)
    expected = [tokens(plain, temperature=0.0), tokens(plain, seed=3)]
    llm = model(**settings)
    calls = launches(monkeypatch)
    assert [tokens(llm, temperature=0.0), tokens(llm, seed=3)] == expected
    assert calls and sum(len(call["weights"]) for call in calls) % llm.engine.model_config.num_hidden_layers == 0
    assert {call["window"] for call in calls} == set(llm.engine.model_config.sliding_windows)


def test_the_cache_is_still_updated_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = model(model="random:tiny-llama", dtype="float32")
    launches(monkeypatch)
    runner = llm.engine.runner
    bucket = next(b for b in runner.decode_buckets if b.rows == 4 and b.greedy)
    compiled = runner.compile(bucket, runner.cache)
    assert compiled.memory_analysis().alias_size_in_bytes >= runner.num_pages * runner.page_bytes
    shape = ",".join(map(str, runner.cache.keys[0].shape))
    assert f" f32[{shape}]" in compiled.as_text() and f"f32[{shape}]{{3,2,1,0}} copy(" not in compiled.as_text()


def test_int8_weights_go_to_it_as_they_are_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**read_json(model_config_file("tiny-llama")), **shape}))
    monkeypatch.setattr(linear, "why_unsupported", lambda *args: None)  # so that weights are tiled
    monkeypatch.setattr(linear, "linear", lambda x, weight, **kwargs: linear.reference(x, weight, **kwargs))
    settings = {"model": f"random:{config}", "quantization": "int8", "dtype": "bfloat16"}
    params = SamplingParams(temperature=0.0, max_tokens=2, logprobs=5, ignore_eos=True)

    def decoded(llm: LLM) -> dict[int, float]:
        """Logprobs of the first token that a decode step gives."""
        (output,) = llm.generate([list(range(3, 50))], params, use_tqdm=False)
        assert output.outputs[0].logprobs is not None
        return {token: entry.logprob for token, entry in output.outputs[0].logprobs[1].items()}

    expected = decoded(model(**settings))
    llm = model(**settings)
    calls = launches(monkeypatch)
    found = decoded(llm)
    assert calls and all(getattr(layer, name)[0].dtype == jnp.int8 for layer in calls[0]["weights"] for name in NAMES)
    common = expected.keys() & found.keys()
    assert len(common) >= 4
    np.testing.assert_allclose([found[t] for t in common], [expected[t] for t in common], atol=0.05)


@pytest.mark.skipif(jax.__version__ < "0.11", reason="Mosaic GPU's lowering needs jax 0.11 or newer")
@pytest.mark.parametrize(("quantization", "layers"), [(None, 1), ("int8", 1), ("int8", 2), (None, 3)])
def test_all_layers_are_one_kernel_to_compile(quantization: str | None, layers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mosaic compiles a kernel for seconds, and knows a repeated one by its text, which jax repeats only for equal calls."""
    shape = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 128}
    config = ModelConfig.from_hf({**read_json(model_config_file("tiny-llama")), **shape, "num_hidden_layers": 4})
    int8 = quantization is not None
    monkeypatch.setattr(linear, "why_unsupported", lambda *args: None)
    tuned = decode_layer.Config(blocks=32, rows=256 if int8 else 128, layers=layers)
    monkeypatch.setattr(decode_layer, "_chosen", lambda *args: tuned)
    mesh, dtype = make_mesh(1), jnp.dtype("bfloat16")
    graphdef, state = nnx.split(Transformer(config, mesh, dtype, quantization))
    leaves, treedef = jax.tree.flatten(state)
    cache = abstract_cache(config, padded_dims(config, 1), 9, 64, dtype, mesh)
    token_B = jax.ShapeDtypeStruct((2,), jnp.int32)
    rows = Rows(jax.ShapeDtypeStruct((2, 4), jnp.int32), token_B, token_B)

    def decode(leaves: list[jax.Array], cache: KVCache, token_B: jax.Array, rows: Rows) -> tuple[jax.Array, KVCache]:
        return nnx.merge(graphdef, jax.tree.unflatten(treedef, leaves))(token_B, cache, Batch(decode=rows))

    traced = jax.jit(decode, donate_argnums=1).trace(leaves, cache, token_B, rows)
    assert traced.lower(lowering_platforms=("cuda",)).as_text().count("@mosaic_gpu") == 1


@pytest.mark.parametrize(
    ("change", "wins"),
    [({}, True), ({"dtype": jnp.float32}, False), ({"rows": 17}, False), ({"missing": "o"}, False), ({"P": 48}, False)],
    ids=str,
)
def test_it_runs_only_where_it_was_measured_to_win(change: dict[str, Any], wins: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    D, F, K, G, H = 4096, 14336, 8, 4, 128
    sizes = dict(qkv=(D, K * (G + 2) * H), o=(K * G * H, D), gate_up=(D, 2 * F), down=(F, D))

    def weight(size: tuple[int, int]) -> Any:
        tiles, units = size[1] // 128, size[0] // 128
        values = jax.ShapeDtypeStruct((tiles, units, 128, 128), jnp.int8)
        return values, jax.ShapeDtypeStruct((tiles, units, 128), jnp.bfloat16)

    weights = {name: None if name == change.get("missing") else weight(size) for name, size in sizes.items()}

    class Hopper:
        platform, device_kind, compute_capability, core_count = "gpu", "an H200", "9.0", 132

    def tuned(dims: Any, device: str | None = None) -> Any:
        return decode_layer.Config(blocks=128, rows=256, stages=4, flight=3) if dims.int8 and dims.B <= 16 else None

    monkeypatch.setattr(jax, "devices", lambda: [Hopper])
    monkeypatch.setattr(jax, "__version__", "0.11.2")
    monkeypatch.setattr(decode_layer, "tuned_config", tuned)
    page = (K, change.get("P", 64), H)
    assert decode_layer.wins(change.get("rows", 2), change.get("dtype", jnp.bfloat16), weights, page) is wins
