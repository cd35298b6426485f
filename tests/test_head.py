"""The head at greedy decode: each device's best token is that of the logits, which are not written where its kernel runs."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxinfer import quant
from jaxinfer.config import ModelConfig, model_config_file, read_json
from jaxinfer.model import Transformer
from jaxinfer.sharding import make_mesh
from pallas_kernels import linear, tuning

NEW_JAX = tuple(int(x) for x in jax.__version__.split(".")[:2]) >= (0, 11)
KINDS = {"tied": (True, None), "its own": (False, None), "int8": (False, "int8"), "int8 in tiles": (False, "int8")}


def transformer(kind: str, tp: int, dtype: str, monkeypatch: pytest.MonkeyPatch, **shape: int) -> Transformer:
    """A model of a vocabulary that needs padding, with random numbers in its head."""
    if kind == "int8 in tiles":
        monkeypatch.setattr(linear, "why_unsupported", lambda *args: None)
        monkeypatch.setattr(quant, "MAX_TILE_PADDING", np.inf)
    tied, quantization = KINDS[kind]
    tiny = {**read_json(model_config_file("tiny-llama")), "tie_word_embeddings": tied, "num_hidden_layers": 1, **shape}
    graph, state = nnx.split(Transformer(ModelConfig.from_hf(tiny), make_mesh(tp), jnp.dtype(dtype), quantization))
    return nnx.merge(graph, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state))


def filled(model: Transformer) -> Any:
    """The model's leaves, random."""
    rng = np.random.default_rng(0)

    def draw(x: jax.ShapeDtypeStruct) -> jax.Array:
        if x.dtype == jnp.int8:
            return jnp.asarray(rng.integers(-127, 128, x.shape), jnp.int8)
        return jnp.asarray(rng.uniform(0.5, 1.5, x.shape) if len(x.shape) == 1 else rng.normal(size=x.shape), x.dtype)

    return jax.tree.map(draw, nnx.split(model)[1])


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_the_best_are_those_of_the_logits(kind: str, tp: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = transformer(kind, tp, "float32", monkeypatch, vocab_size=203)
    if kind == "int8 in tiles":
        monkeypatch.setattr(linear, "linear", lambda x, weight, **kwargs: linear.reference(x, weight, **kwargs))
    graph = nnx.split(model)[0]
    both = jax.jit(lambda state, x: (lambda m: (m.logits(x), m.argmax(x)))(nnx.merge(graph, state)))
    hidden_BD = np.random.default_rng(1).normal(size=(5, model.config.hidden_size)).astype(np.float32)
    hidden_BD[3] = np.nan
    logits_BV, (value_BX, id_BX) = (jax.tree.map(np.asarray, x) for x in both(filled(model), hidden_BD))
    assert value_BX.shape == id_BX.shape == (5, tp) and id_BX.dtype == np.int32
    share = model.dims.V // tp
    for x in range(tp):
        shard_BV = np.where(np.isnan(logits_BV), -np.inf, logits_BV)[:, x * share : (x + 1) * share]
        np.testing.assert_array_equal(id_BX[:, x], x * share + shard_BV.argmax(axis=1))
        np.testing.assert_allclose(value_BX[:, x], shard_BV.max(axis=1), rtol=1e-5)
    assert (id_BX < 203).all() and np.isfinite(value_BX[[0, 1, 2, 4]]).all() and (value_BX[3] == -np.inf).all()


@pytest.mark.skipif(not NEW_JAX, reason="Mosaic GPU's lowering needs jax 0.11 or newer")
@pytest.mark.parametrize("tp", [1, 4])
@pytest.mark.parametrize("kind", ["tied", "its own", "int8 in tiles"])
def test_no_logits_are_written(kind: str, tp: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a Hopper GPU, and an int8 head that tuned/ has."""
    B, V = 16, 4 * 8448
    model = transformer(kind, tp, "bfloat16", monkeypatch, vocab_size=V, hidden_size=512)
    monkeypatch.setattr(tuning, "why_no_mosaic", lambda *args: None)
    monkeypatch.setattr(tuning, "lookup", lambda name, *args, **sizes: {} if name == "lm_head_int8" else None)
    graph, state = nnx.split(model)
    hidden_BD = jax.ShapeDtypeStruct((B, 512), jnp.bfloat16)

    def text(of: str) -> str:
        run = jax.jit(lambda state, x: getattr(nnx.merge(graph, state), of)(x))
        return run.trace(state, hidden_BD).lower(lowering_platforms=("cuda",)).as_text()

    written = re.compile(rf"tensor<(?:{B}x{V // tp}|{B}x{V})xf32>")
    assert written.search(text("logits"))
    best = text("argmax")
    assert not written.search(best) and best.count("custom_call @mosaic_gpu_v2") == 1


def test_an_int8_head_that_was_not_measured_is_multiplied_and_then_chosen_from(monkeypatch: pytest.MonkeyPatch) -> None:
    model = transformer("int8 in tiles", 1, "bfloat16", monkeypatch, vocab_size=512, hidden_size=256)
    products: list[Any] = []

    def product(x: jax.Array, weight: Any, **kwargs: Any) -> jax.Array:
        products.append(kwargs)
        return linear.reference(x, weight, **kwargs)

    monkeypatch.setattr(linear, "linear", product)
    graph = nnx.split(model)[0]
    jax.eval_shape(lambda state, x: nnx.merge(graph, state).argmax(x), filled(model), jnp.ones((2, 256), jnp.bfloat16))
    assert products == [{"out_dtype": jnp.float32}]
