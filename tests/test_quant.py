"""Int8 weights: what rounding costs, on any mesh, from one matrix to a real model's perplexity."""

import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxinfer import LLM, SamplingParams, quant
from jaxinfer.config import model_config_file, read_json
from jaxinfer.quant import QuantArray
from jaxinfer.sharding import make_mesh

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
PROMPTS = [[1, 2, 3], list(range(5, 70)), [7]]
dequantize = jax.jit(quant.dequantize, static_argnums=1)
PROSE = Path(__file__).parent / "data" / "prose.txt"  # from Carroll (1865) and Austen (1813)


def quantized(weight: jax.Array, letters: str, inputs: int, tp: int, tiled: bool = False) -> QuantArray:
    array = quant.abstract(letters, weight.shape, inputs, jnp.dtype("float32"), make_mesh(tp))
    array = quant.with_layout(array, tiled)
    return jax.jit(lambda w: quant.quantize(w, array))(weight)


def random(shape: tuple[int, ...], seed: int = 0) -> jax.Array:
    """Columns of very different sizes, and one of zeros."""
    rng = np.random.default_rng(seed)
    weight = rng.normal(size=shape) * 10.0 ** rng.uniform(-4, 4, size=shape[-1])
    weight[..., 0] = 0
    return jnp.asarray(weight, jnp.float32)


# letters, shape, reduced axes: column-parallel, row-parallel, with sizes that do and do not divide by 128
MATRICES = [
    ("DF", (256, 1024), 1),
    ("DF", (200, 24), 1),
    ("FD", (1024, 256), 1),
    ("FD", (8 * 37, 40), 1),
    ("DKJH", (72, 8, 3, 5), 1),
    ("KGHD", (8, 2, 10, 24), 3),
]


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("tp", [1, 2, 8])
@pytest.mark.parametrize(("letters", "shape", "inputs"), MATRICES)
def test_rounding_is_within_half_a_step(letters: str, shape: tuple[int, ...], inputs: int, tp: int, tiled: bool) -> None:
    weight = random(shape)
    array = quantized(weight, letters, inputs, tp, tiled)
    back = np.asarray(dequantize(array, jnp.float32), np.float64).reshape(math.prod(shape[:inputs]), -1)
    flat = np.asarray(weight, np.float64).reshape(back.shape)
    shards = tp if array.is_row_parallel else 1
    for shard, rounded in zip(np.split(flat, shards), np.split(back, shards)):
        for at in range(0, len(shard), 128):
            group = shard[at : at + 128]
            # Half a step of max/127, and what rounding the scale itself to bfloat16 (2**-9) takes from 127 steps of it.
            bound = np.abs(group).max(axis=0) / 127 * (0.5 + 127 * 2**-9) + 1e-30
            assert (np.abs(group - rounded[at : at + 128]) <= bound).all()
    assert (back[:, 0] == 0).all() or letters not in ("DF", "FD")
    assert array.values.dtype == jnp.int8 and array.scales.dtype == jnp.bfloat16


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("tp", [1, 2, 4, 8])
@pytest.mark.parametrize(("letters", "shape", "inputs"), MATRICES)
@pytest.mark.parametrize("rows", [3, 70])
def test_product_is_that_with_the_dequantized_weight(
    letters: str, shape: tuple[int, ...], inputs: int, tp: int, tiled: bool, rows: int
) -> None:
    weight = jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)
    array = quantized(weight, letters, inputs, tp, tiled)
    size = math.prod(shape[:inputs])
    x = jnp.asarray(np.random.default_rng(2).normal(size=(rows, size)), jnp.float32)
    out = jax.jit(quant.product)(x, array)
    expected = np.asarray(x, np.float64) @ np.asarray(dequantize(array, jnp.float32), np.float64).reshape(size, -1)
    assert out.shape == (rows, *shape[inputs:])
    np.testing.assert_allclose(np.asarray(out).reshape(rows, -1), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("tp", [1, 4])
@pytest.mark.parametrize("tiled", [False, True])
def test_gated_is_silu_times_up(tp: int, tiled: bool) -> None:
    weight = jnp.asarray(np.random.default_rng(3).normal(size=(96, 24, 2)), jnp.float32) / 10
    array = quantized(weight, "DFC", 1, tp, tiled)
    x = jnp.asarray(np.random.default_rng(4).normal(size=(5, 96)), jnp.float32)
    gate, up = np.moveaxis(np.asarray(quant.product(x, dequantize(array, jnp.float32)), np.float64), -1, 0)
    np.testing.assert_allclose(
        np.asarray(jax.jit(quant.gated, static_argnums=2)(x, array, array.mesh)),
        gate / (1 + np.exp(-gate)) * up,
        rtol=1e-4,
        atol=1e-5,
    )


def test_tiles_unpack_to_what_was_packed() -> None:
    rng = np.random.default_rng(0)
    values = jnp.asarray(rng.integers(-127, 128, (384, 256)), jnp.int8)
    scales = jnp.asarray(rng.uniform(1, 2, (3, 256)), jnp.bfloat16)
    packed = quant.pack(values, scales)
    assert [x.shape for x in packed] == [(2, 3, 128, 128), (2, 3, 128)]
    for before, after in zip((values, scales), quant.unpack(*packed)):
        np.testing.assert_array_equal(np.asarray(before.astype(jnp.float32)), np.asarray(after.astype(jnp.float32)))


def test_a_matrix_without_a_sharded_axis_is_refused() -> None:
    with pytest.raises(ValueError, match="letters 'DH': exactly one must be sharded"):
        quant.abstract("DH", (128, 128), 1, jnp.dtype("float32"), make_mesh(2))


# ---- whole models


def config_file(path: Path, name: str, **changes: Any) -> str:
    file = path / "config.json"
    file.write_text(json.dumps({**read_json(model_config_file(name)), **changes}))
    return f"random:{file}"


def llm(model: str, tp: int, quantization: str | None = "int8", **kwargs: Any) -> LLM:
    settings = {"max_num_seqs": 4, "max_model_len": 128, "block_size": 16, "use_tqdm": False, "dtype": "float32"}
    return LLM(model, tensor_parallel_size=tp, quantization=quantization, **{**settings, **kwargs})


def tokens(model: LLM) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in model.generate(PROMPTS, GREEDY, use_tqdm=False)]


def dequantized_leaves(model: LLM) -> list[jax.Array]:
    """What an unquantized model of the same shape would hold."""
    runner = model.engine.runner
    state = runner.params
    out = []
    for _, variable in nnx.to_flat_state(state):
        value = variable.get_value()
        if isinstance(value, QuantArray):
            plain = dequantize(value, jnp.float32)
            value = plain.T if value.letters == "DV" else plain
        out.append(value)
    return out


# heads and sizes that do not divide by tp
@pytest.mark.parametrize(("name", "tp"), [("tiny-llama", 1), ("tiny-llama", 8), ("tiny-llama3", 2), ("tiny-qwen2", 4)])
def test_a_quantized_model_is_the_model_of_its_dequantized_weights(name: str, tp: int) -> None:
    model, other = llm(f"random:{name}", tp), llm(f"random:{name}", tp, None)
    leaves = dequantized_leaves(model)
    assert [x.shape for x in leaves] == [x.shape for x in other.engine.runner.leaves]
    before = other.engine.runner.leaves
    assert any((np.asarray(a) != np.asarray(b)).any() for a, b in zip(leaves, before))
    other.engine.runner.leaves = [jax.device_put(a, b.sharding) for a, b in zip(leaves, before)]
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    ours, theirs = (m.generate(PROMPTS, params, use_tqdm=False) for m in (model, other))
    for prompt, a, b in zip(PROMPTS, ours, theirs):
        pairs = zip(prompt[1:], a.prompt_logprobs[1:], b.prompt_logprobs[1:])
        for token, x, y in pairs:
            assert abs(x[token].logprob - y[token].logprob) < 1e-4


@pytest.mark.slow
def test_the_same_tokens_under_any_tensor_parallelism(tmp_path: Path) -> None:
    """Where every shard is whole groups, the shards' values are the same too."""
    shape = {
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "num_hidden_layers": 2,
    }
    name = config_file(tmp_path, "tiny-llama", **shape, tie_word_embeddings=False)
    one = tokens(llm(name, 1))
    assert [tokens(llm(name, tp)) for tp in (2, 4, 8)] == [one] * 3


@pytest.mark.parametrize("tied", [False, True])
def test_memory_is_half_and_embedding_norms_and_tied_heads_stay(tmp_path: Path, tied: bool) -> None:
    name = config_file(tmp_path, "tiny-llama", hidden_size=576, intermediate_size=1536, tie_word_embeddings=tied)
    model, plain = llm(name, 1, dtype="bfloat16"), llm(name, 1, None, dtype="bfloat16")
    runner = model.engine.runner
    state, shapes = nnx.to_flat_state(runner.params), nnx.to_flat_state(plain.engine.runner.params)
    ours = theirs = 0
    for (path, variable), (_, before) in zip(state, shapes):
        value = variable.get_value()
        matrix = path[-1].split("_")[0] in ("qkv", "o", "gate", "down", "lm")
        assert isinstance(value, QuantArray) == matrix, path
        if isinstance(value, QuantArray):
            ours, theirs = ours + value.nbytes, theirs + before.get_value().nbytes
    assert ours <= 0.53 * theirs
    assert any(path[-1] == "lm_head_VD" for path, _ in state) != tied
    # What a decode step reads is counted in the same bytes.
    saved = theirs - ours
    assert plain.engine.runner.step_weight_bytes - runner.step_weight_bytes == saved
    assert plain.stats()["params_bytes_per_device"] - model.stats()["params_bytes_per_device"] == saved


def test_decode_still_reduces_twice_a_layer_and_gathers_no_weight() -> None:
    from test_compiled import collectives

    engine = llm("random:tiny-llama", 2).engine
    runner = engine.runner
    bucket = next(b for b in runner.decode_buckets if b.greedy and b.rows == 4)
    found = collectives(runner.compile(bucket, runner.cache).as_text())
    hidden = bucket.rows * engine.model_config.hidden_size
    assert found.pop("all-reduce") == [hidden] * (2 * engine.model_config.num_hidden_layers + 1)
    assert max(size for sizes in found.values() for size in sizes) <= 2 * bucket.rows * 2


def test_unknown_quantizations_are_refused() -> None:
    with pytest.raises(ValueError, match="quantization = 'awq': it must be int8 or None"):
        llm("random:tiny-llama", 1, "awq")


# ---- a trained one


@pytest.mark.slow
def test_smollm2_loses_little(smollm2_path: Path, record_property: Any, capsys: pytest.CaptureFixture) -> None:
    models = {q: llm(str(smollm2_path), 1, q, max_model_len=1024, max_num_seqs=16) for q in (None, "int8")}
    ids = models[None].get_tokenizer().encode(PROSE.read_text())
    pieces = [ids[i : i + 768] for i in range(0, len(ids), 768)]
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    perplexity = {}
    for q, model in models.items():
        outputs = model.generate(pieces, params, use_tqdm=False)
        losses = [
            -entry[token].logprob for piece, o in zip(pieces, outputs) for token, entry in zip(piece[1:], o.prompt_logprobs[1:])
        ]
        perplexity[q] = math.exp(sum(losses) / len(losses))
    prompts = [piece[i : i + 64] for piece in pieces for i in range(0, len(piece) - 64, 128)]
    greedy = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True)
    texts = {
        q: [o.outputs[0].token_ids for o in model.generate(prompts, greedy, use_tqdm=False)] for q, model in models.items()
    }
    first = np.mean([a[0] == b[0] for a, b in zip(texts[None], texts["int8"])])
    same = np.mean([a == b for a, b in zip(texts[None], texts["int8"])])
    with capsys.disabled():
        print(
            f"\nSmolLM2, {len(ids)} tokens: perplexity {perplexity[None]:.4f} fp32, {perplexity['int8']:.4f} int8; of "
            f"{len(prompts)} prompts {first:.0%} agree on the next token, {same:.0%} on 16"
        )
    assert len(ids) > 2000
    assert perplexity["int8"] < 1.01 * perplexity[None]
    assert first > 0.8
