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
from test_compiled import collectives

from jaxinfer import LLM, SamplingParams
from jaxinfer.cache import KVCache, abstract_cache
from jaxinfer.config import ModelConfig, model_config_file, read_json
from jaxinfer.model import Batch, Block, Rows, Transformer
from jaxinfer.sharding import make_mesh, padded_dims
from pallas_kernels import decode_layer, linear, tuning

NAMES = ("qkv", "o", "gate_up", "down")
PROMPTS = [[1, 2, 3], list(range(5, 45)), [7]]


def model(**settings: Any) -> LLM:
    defaults = {"max_num_seqs": 4, "max_model_len": 128, "block_size": 16, "use_tqdm": False}
    return LLM(**{**defaults, **settings})


def tokens(llm: LLM, **kwargs: Any) -> list[list[int]]:
    params = SamplingParams(max_tokens=20, ignore_eos=True, **kwargs)
    return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, params, use_tqdm=False)]


def launches(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Make every block run as one kernel, or two over several devices; returns the calls of `layers` as they are traced."""
    calls: list[dict[str, Any]] = []
    layers = decode_layer.layers

    def recorded(residual_BD: Any, weights: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append({"weights": weights, **kwargs})
        return layers(residual_BD, weights, *args, **kwargs)

    monkeypatch.setattr(Block, "runs_as_kernels", lambda *args: True)
    monkeypatch.setattr(decode_layer, "layers", recorded)
    return calls


# Three kv heads, a window, biases; of two and of three kv heads there is one on each of four devices.
@pytest.mark.parametrize(("name", "steps"), [("tiny-llama3", 1), ("tiny-mistral", 4), ("tiny-qwen2", 1)])
@pytest.mark.parametrize("tp", [1, 4])
def test_tokens_are_the_same(name: str, steps: int, tp: int, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"model": f"random:{name}", "dtype": "float32", "num_scheduler_steps": steps}
    plain = model(**settings)
    expected = [tokens(plain, temperature=0.0), tokens(plain, seed=3)]
    llm = model(**settings, tensor_parallel_size=tp)
    calls = launches(monkeypatch)
    assert [tokens(llm, temperature=0.0), tokens(llm, seed=3)] == expected
    assert calls and sum(len(call["weights"]) for call in calls) % llm.engine.model_config.num_hidden_layers == 0
    assert {call["window"] for call in calls} == set(llm.engine.model_config.sliding_windows)


@pytest.mark.parametrize("tp", [1, 4])
def test_the_cache_is_still_updated_in_place(tp: int, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = model(model="random:tiny-llama", dtype="float32", tensor_parallel_size=tp)
    calls = launches(monkeypatch)
    runner = llm.engine.runner
    bucket = next(b for b in runner.decode_buckets if b.rows == 4 and b.greedy)
    compiled = runner.compile(bucket, runner.cache)
    text = compiled.as_text()
    assert calls and compiled.memory_analysis().alias_size_in_bytes >= runner.num_pages * runner.page_bytes
    shape = ",".join(map(str, runner.cache.keys[0].addressable_shards[0].data.shape))
    assert f" f32[{shape}]" in text and f"f32[{shape}]{{3,2,1,0}} copy(" not in text
    # After each half, and of the embedding; the sampler merges a (value, id) a row and device.
    hidden, layers = bucket.rows * llm.engine.model_config.hidden_size, llm.engine.model_config.num_hidden_layers
    expected = {} if tp == 1 else {"all-reduce": [hidden] * (2 * layers + 1), "all-gather": [2 * bucket.rows * tp]}
    assert collectives(text) == expected


@pytest.mark.parametrize("tp", [1, 2])
def test_int8_weights_go_to_it_as_they_are_stored(tp: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    llm = model(**settings, tensor_parallel_size=tp)
    calls = launches(monkeypatch)
    found = decoded(llm)
    shapes = {name: {getattr(layer, name)[0].shape for layer in calls[0]["weights"]} for name in NAMES}
    units = dict(qkv=(4 // tp, 2), o=(2, 2 // tp), gate_up=(8 // tp, 2), down=(2, 4 // tp))  # of columns, of rows
    assert calls and shapes == {name: {(*size, 128, 128)} for name, size in units.items()}
    assert all(getattr(layer, name)[0].dtype == jnp.int8 for layer in calls[0]["weights"] for name in NAMES)
    common = expected.keys() & found.keys()
    assert len(common) >= 4
    np.testing.assert_allclose([found[t] for t in common], [expected[t] for t in common], atol=0.05)


@pytest.mark.skipif(jax.__version__ < "0.11", reason="Mosaic GPU's lowering needs jax 0.11 or newer")
@pytest.mark.parametrize(
    ("quantization", "layers", "tp"), [(None, 1, 1), ("int8", 1, 1), ("int8", 2, 1), (None, 3, 1), (None, 1, 2), ("int8", 1, 2)]
)
def test_all_layers_are_one_kernel_to_compile(
    quantization: str | None, layers: int, tp: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mosaic compiles a kernel for seconds, and knows a repeated one by its text, which jax repeats only for equal calls. Over
    several devices there are two, the halves."""
    shape = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 128}
    config = ModelConfig.from_hf({**read_json(model_config_file("tiny-llama")), **shape, "num_hidden_layers": 4})
    int8 = quantization is not None
    monkeypatch.setattr(linear, "why_unsupported", lambda *args: None)
    tuned = decode_layer.Config(blocks=32, rows=256 if int8 else 128, layers=layers)
    monkeypatch.setattr(decode_layer, "_chosen", lambda *args, **halves: tuned)
    mesh, dtype = make_mesh(tp), jnp.dtype("bfloat16")
    graphdef, state = nnx.split(Transformer(config, mesh, dtype, quantization))
    leaves, treedef = jax.tree.flatten(state)
    cache = abstract_cache(config, padded_dims(config, tp), 9, 64, dtype, mesh)
    token_B = jax.ShapeDtypeStruct((2,), jnp.int32)
    rows = Rows(jax.ShapeDtypeStruct((2, 4), jnp.int32), token_B, token_B)

    def decode(leaves: list[jax.Array], cache: KVCache, token_B: jax.Array, rows: Rows) -> tuple[jax.Array, KVCache]:
        return nnx.merge(graphdef, jax.tree.unflatten(treedef, leaves))(token_B, cache, Batch(decode=rows))

    traced = jax.jit(decode, donate_argnums=1).trace(leaves, cache, token_B, rows)
    assert traced.lower(lowering_platforms=("cuda",)).as_text().count("@mosaic_gpu") == (1 if tp == 1 else 2)


@pytest.mark.parametrize(("name", "tp"), [("tiny-qwen2", 1), ("tiny-mistral", 4), ("tiny-qwen3", 2)])
def test_what_the_table_is_asked(name: str, tp: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(decode_layer, "wins", lambda *args: asked.append(args) or True)
    config, mesh, dtype = ModelConfig.from_hf(read_json(model_config_file(name))), make_mesh(tp), jnp.dtype("float32")
    page = (padded_dims(config, tp).K, 16, config.head_dim)
    graphdef, state = nnx.split(Transformer(config, mesh, dtype))
    answers: list[bool] = []

    def ask(state: nnx.State) -> None:
        answers.extend(block.runs_as_kernels(3, dtype, page) for block in nnx.merge(graphdef, state).blocks)

    jax.eval_shape(ask, state)
    if config.qk_norm:  # which the kernels do not have
        assert answers == [False] * config.num_hidden_layers and not asked
        return
    assert answers == [True] * config.num_hidden_layers == [(args[:2], *args[3:]) == ((3, dtype), page, tp) for args in asked]
    shapes = {getattr(args[2], name).shape[0] for args in asked for name in ("qkv", "gate_up")}
    assert shapes == {config.hidden_size} and all((args[2].bias_O is not None) == config.qkv_bias for args in asked)
    block = nnx.merge(graphdef, state).blocks[0]  # all norms of random weights are alike: no token shows which is which
    assert block.params()["norm_D"] is block.attn_norm_D and block.params()["mlp_norm_D"] is block.mlp_norm_D


@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.parametrize(
    ("change", "wins"),
    [
        ({}, True),
        ({"dtype": jnp.float32}, False),
        ({"rows": 17}, False),
        ({"F": 11008}, False),
        ({"missing": "o"}, False),
        ({"P": 48}, False),
    ],
    ids=str,
)
def test_it_runs_only_where_it_was_measured_to_win(
    change: dict[str, Any], wins: bool, devices: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    D, F, K, G, H = 4096, change.get("F", 14336), 8, 4, 128
    sizes = dict(qkv=(D, K * (G + 2) * H), o=(K * G * H, D), gate_up=(D, 2 * F), down=(F, D))

    def weight(size: tuple[int, int]) -> Any:
        tiles, units = size[1] // 128, size[0] // 128
        values = jax.ShapeDtypeStruct((tiles, units, 128, 128), jnp.int8)
        return values, jax.ShapeDtypeStruct((tiles, units, 128), jnp.bfloat16)

    weights = {name: None if name == change.get("missing") else weight(size) for name, size in sizes.items()}
    layer = decode_layer.Layer(norm_D=None, mlp_norm_D=None, **weights)

    class Hopper:
        platform, device_kind, compute_capability, core_count = "gpu", "an H200", "9.0", 132

    def table(devices: int) -> dict[str, Any]:  # of a device's own sizes
        when = {"rows": 16, "bf16": 0, "D": [4096], "F": [14336 // devices], "K": [8 // devices], "G": [4]}
        entry = {"when": when, "config": {"blocks": 128, "rows": 256, "stages": 4, "flight": 3}}
        return {"decode_layer" if devices == 1 else "decode_halves": [entry]}

    monkeypatch.setattr(jax, "devices", lambda: [Hopper])
    monkeypatch.setattr(jax, "__version__", "0.11.2")
    monkeypatch.setattr(tuning, "_load", lambda device: table(devices))
    rows, dtype, page = change.get("rows", 2), change.get("dtype", jnp.bfloat16), (K, change.get("P", 64), H)
    asked: dict[str, Any] = dict(rows=rows, dtype=dtype, layer=layer, page=page, devices=devices)
    assert decode_layer.wins(**asked) is wins
    monkeypatch.setattr(tuning, "_load", lambda device: table(5 - devices))  # that of whole layers is not that of halves
    assert not decode_layer.wins(**asked)
