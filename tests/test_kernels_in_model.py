"""The model through its kernels, simulated on the CPU (jax 0.11 and newer), against the model through plain jnp."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxinfer import attention, cache, model, quant
from jaxinfer.config import ModelConfig
from jaxinfer.model import Batch, Rows, Transformer
from jaxinfer.sharding import make_mesh, padded_dims

NEW_JAX = tuple(int(x) for x in jax.__version__.split(".")[:2]) >= (0, 11)
pytestmark = pytest.mark.skipif(not NEW_JAX, reason="Mosaic GPU's interpret mode needs jax 0.11 or newer")

CONFIG = {
    "model_type": "qwen2",  # a Llama with biases
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 256,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
}


def through_kernels(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Have the model run its kernels, simulated; the names of those that it called."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    called: list[str] = []

    def simulate(where: Any, name: str, kernel: Any, operands: int, **settings: Any) -> None:
        """`where.name` calls the kernel, with nothing beside it: the simulator shares XLA's few threads with all else."""
        plain = getattr(where, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if name == "swiglu" and len(args[0]) < quant.swiglu.ROWS:
                return plain(*args, **kwargs)
            called.append(name)
            given = jax.block_until_ready(args[:operands])
            how = {**settings, **kwargs, "implementation": "mosaic", "interpret": plgpu.InterpretGPUParams()}
            return jax.block_until_ready(kernel(*given, **how))

        monkeypatch.setattr(where, name, wrapped)

    simulate(attention, "append_and_attend", attention.decode_attention.append_and_attend, 7)
    simulate(attention, "attend_chunks", attention.prefill_attention.prefill_attention, 7)
    two_stages = quant.swiglu.Config(cluster=1, stages=2)
    simulate(quant.swiglu, "swiglu", quant.swiglu.swiglu, 2, config=two_stages)
    simulate(model.add_rms_norm, "add_rms_norm", model.add_rms_norm.add_rms_norm, 3)
    monkeypatch.setattr(attention, "appends", lambda *args: True)
    return called


def steps(transformer: Transformer, kv: cache.KVCache, lengths: list[int], tokens: np.ndarray) -> tuple[Any, cache.KVCache]:
    """Logits of a prefill of all rows together, 128 tokens with the padding, then of a step of decode with a padding row."""
    R, offset = len(lengths), np.concatenate([[0], np.cumsum(lengths)])
    rows = lambda values: jnp.asarray(values, jnp.int32)  # noqa: E731
    pages = 1 + np.arange(2 * R).reshape(R, 2)
    chunks = Rows(rows(pages), rows([0] * R), rows(lengths), rows(offset[:-1]))
    flat = np.zeros(128, np.int32)
    flat[: offset[-1]] = tokens[: offset[-1]]
    hidden, kv = transformer(rows(flat), kv, Batch(chunks=chunks))
    logits = transformer.logits(hidden)[: offset[-1]]
    decode = Rows(rows([*pages, [0, 0]]), rows([*lengths, 0]), rows([1] * R + [0]))
    hidden, kv = transformer(rows(tokens[-R - 1 :]), kv, Batch(decode=decode))
    return jnp.concatenate([logits, transformer.logits(hidden)[:R]]), kv


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul:RuntimeWarning")  # NaN times something, as meant
def test_kernels_and_plain_jnp_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    config = ModelConfig.from_hf(CONFIG)
    mesh, rng = make_mesh(1), np.random.default_rng(0)
    graph, state = nnx.split(Transformer(config, mesh, jnp.dtype("bfloat16")))
    draw = lambda x: jnp.asarray(rng.normal(size=x.shape) * (0.1 if len(x.shape) > 1 else 1), x.dtype)  # noqa: E731
    transformer = nnx.merge(graph, jax.tree.map(draw, state))
    kv = cache.init_cache(config, padded_dims(config, 1), 8, 64, jnp.dtype("bfloat16"), mesh)
    nan = lambda pages: tuple(x.at[1:].set(jnp.nan) for x in pages)  # noqa: E731
    kv = replace(kv, keys=nan(kv.keys), values=nan(kv.values))
    lengths, tokens = [63, 1, 30], rng.integers(0, 256, 200).astype(np.int32)
    run = lambda: steps(transformer, kv, lengths, tokens)  # noqa: E731
    expected, cache_expected = run()
    called = through_kernels(monkeypatch)
    got, cache_got = run()
    layers = config.num_hidden_layers
    assert [called.count(n) for n in ("append_and_attend", "attend_chunks")] == [layers, layers]
    assert called.count("swiglu") == layers and called.count("add_rms_norm") == 2 * (2 * layers - 1)
    assert np.isfinite(got).all()
    for rows in (slice(None, -len(lengths)), slice(-len(lengths), None)):  # of the prefill, of the decode
        assert np.linalg.norm(got[rows] - expected[rows]) <= 2e-2 * np.linalg.norm(expected[rows])
    for one, other in zip(jax.tree.leaves(cache_got), jax.tree.leaves(cache_expected), strict=True):
        one, other = (np.asarray(x[1:].astype(jnp.float32)) for x in (one, other))  # page 0 is a bin
        np.testing.assert_array_equal(np.isnan(one), np.isnan(other))
        np.testing.assert_allclose(np.nan_to_num(one), np.nan_to_num(other), rtol=0.05, atol=0.05)
