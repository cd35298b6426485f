"""Loading: what arrives on the devices is the checkpoint, fused, padded and sharded; and every way a checkpoint can be
wrong is said in full."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from safetensors.numpy import load_file, save_file

from jaxinfer import weights
from jaxinfer.checkpoint import GGUFSource, open_checkpoint
from jaxinfer.config import model_config_file, read_json
from jaxinfer.model import Transformer
from jaxinfer.sharding import make_mesh, padded_dims, spec
from jaxinfer.weights import load_params

ROOT = Path(__file__).resolve().parent.parent
TPS = (1, 2, 3, 4, 8)
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama2": ("tiny-llama", {}),  # every query head with its own kv head
    "llama-one-kv-head": ("tiny-llama", {"num_attention_heads": 6, "num_key_value_heads": 1, "head_dim": 16}),
    "llama3": ("tiny-llama3", {}),  # tied; 9 query heads on 3 kv heads
    "mistral": ("tiny-mistral", {}),
    "qwen2": ("tiny-qwen2", {}),  # biases, tied
    "qwen3": ("tiny-qwen3", {}),  # head norms
}


# ---- checkpoints, written without transformers


def config_of(name: str, **overrides: Any) -> dict[str, Any]:
    shape, differences = SHAPES[name]
    return {**read_json(model_config_file(shape)), **differences, **overrides}


def random_tensors(config: dict[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """A state dict under transformers' names, float32."""
    D, F, V, N = (config[k] for k in ("hidden_size", "intermediate_size", "vocab_size", "num_attention_heads"))
    K, H = config["num_key_value_heads"], config.get("head_dim") or D // N
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (V, D)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        shapes |= {
            f"{layer}.self_attn.q_proj.weight": (N * H, D),
            f"{layer}.self_attn.k_proj.weight": (K * H, D),
            f"{layer}.self_attn.v_proj.weight": (K * H, D),
            f"{layer}.self_attn.o_proj.weight": (D, N * H),
            f"{layer}.mlp.gate_proj.weight": (F, D),
            f"{layer}.mlp.up_proj.weight": (F, D),
            f"{layer}.mlp.down_proj.weight": (D, F),
            f"{layer}.input_layernorm.weight": (D,),
            f"{layer}.post_attention_layernorm.weight": (D,),
        }
        if config["model_type"] == "qwen2":
            shapes |= {f"{layer}.self_attn.{x}_proj.bias": ((N if x == "q" else K) * H,) for x in "qkv"}
        if config["model_type"] == "qwen3":
            shapes |= {f"{layer}.self_attn.{x}_norm.weight": (H,) for x in "qk"}
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}


def write(path: Path, config: dict[str, Any], tensors: dict[str, np.ndarray], files: int = 1) -> Path:
    """A checkpoint directory; more than one file get an index."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    if files == 1:
        save_file(tensors, path / "model.safetensors")
        return path
    weight_map: dict[str, str] = {}
    for n in range(files):
        name = f"model-{n + 1:05d}-of-{files:05d}.safetensors"
        part = {tensor: tensors[tensor] for tensor in list(tensors)[n::files]}
        save_file(part, path / name)
        weight_map |= dict.fromkeys(part, name)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


def load(model: str | Path, tp: int, dtype: Any = jnp.float32, seed: int = 0) -> dict[str, jax.Array]:
    """Parameters by their path, in the checkpoint's order of axes: the model's blocks.0.attn.qkv_DKJH becomes
    "blocks.0.attn.qkv_KJHD" …; checks the leaves' order, sharding and type."""
    checkpoint = open_checkpoint(str(model))
    mesh = make_mesh(tp)
    transformer = Transformer(checkpoint.model_config, mesh, jnp.dtype(dtype))
    leaves = load_params(checkpoint, transformer, checkpoint.model_config, mesh, jnp.dtype(dtype), seed=seed, use_tqdm=False)
    _, abstract = nnx.split(transformer)
    assert [(x.shape, x.dtype) for x in leaves] == [(x.shape, x.dtype) for x in jax.tree.leaves(abstract)]
    named = {}
    for (path, variable), leaf in zip(nnx.to_flat_state(abstract), leaves, strict=True):
        name, letters, stored = ".".join(map(str, path)), variable.letters, variable.stored
        assert leaf.sharding == NamedSharding(mesh, spec(letters)), name
        named[name.removesuffix(letters) + stored] = jnp.transpose(leaf, [letters.index(letter) for letter in stored])
    return named


def fuse(tensors: dict[str, np.ndarray], config: dict[str, Any], tp: int) -> dict[str, np.ndarray]:
    """The model's parameters from a state dict: DESIGN.md's rules, written out head by head."""
    D, F, V, N = (config[k] for k in ("hidden_size", "intermediate_size", "vocab_size", "num_attention_heads"))
    K, H = config["num_key_value_heads"], config.get("head_dim") or D // N
    G = N // K
    repeat = tp // K if tp > K and tp % K == 0 else 1
    padded_K = tp if repeat > 1 else -(-K // tp) * tp
    padded_G = -(-G // repeat)
    up = lambda n: -(-n // tp) * tp  # noqa: E731

    def rows(x: np.ndarray, n: int) -> np.ndarray:
        return np.concatenate([x, np.zeros((n - len(x), *x.shape[1:]), x.dtype)])

    out = {"embed_VD": rows(tensors["model.embed_tokens.weight"], up(V)), "final_norm_D": tensors["model.norm.weight"]}
    if "lm_head.weight" in tensors:
        out["lm_head_VD"] = rows(tensors["lm_head.weight"], up(V))
    for i in range(config["num_hidden_layers"]):
        block, layer = f"blocks.{i}", f"model.layers.{i}"

        def heads(kind: str, what: str, layer: str = layer) -> np.ndarray:
            x = tensors[f"{layer}.self_attn.{kind}_proj.{what}"]
            return x.reshape(-1, H, *x.shape[1:])

        o = tensors[f"{layer}.self_attn.o_proj.weight"].reshape(D, N, H)
        out_o = np.zeros((D, padded_K, padded_G, H), np.float32)
        kinds: list[tuple[str, str, tuple[int, ...]]] = [("weight", "qkv_KJHD", (D,))]
        if f"{layer}.self_attn.q_proj.bias" in tensors:
            kinds.append(("bias", "qkv_bias_KJH", ()))
        for what, name, tail in kinds:
            fused = np.zeros((padded_K, padded_G + 2, H, *tail), np.float32)
            for k in range(min(padded_K, K * repeat)):
                source = k // repeat
                fused[k, padded_G] = heads("k", what)[source]
                fused[k, padded_G + 1] = heads("v", what)[source]
                for g in range(padded_G):
                    query = (k % repeat) * padded_G + g
                    if query < G:
                        fused[k, g] = heads("q", what)[source * G + query]
                        out_o[:, k, g] = o[:, source * G + query]
            out[f"{block}.attn.{name}"] = fused
        out[f"{block}.attn.o_DKGH"] = out_o
        for x in "qk":
            if f"{layer}.self_attn.{x}_norm.weight" in tensors:
                out[f"{block}.attn.{x}_norm_H"] = tensors[f"{layer}.self_attn.{x}_norm.weight"]
        gate, upward = (rows(tensors[f"{layer}.mlp.{x}_proj.weight"], up(F)) for x in ("gate", "up"))
        out[f"{block}.mlp.gate_up_FCD"] = np.stack([gate, upward], axis=1)
        out[f"{block}.mlp.down_DF"] = rows(tensors[f"{layer}.mlp.down_proj.weight"].T, up(F)).T
        out[f"{block}.attn_norm_D"] = tensors[f"{layer}.input_layernorm.weight"]
        out[f"{block}.mlp_norm_D"] = tensors[f"{layer}.post_attention_layernorm.weight"]
    return out


def assert_same(found: dict[str, jax.Array], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(np.asarray(found[name]).astype(np.float32), array, err_msg=name)


@pytest.mark.parametrize("tp", TPS)
@pytest.mark.parametrize("name", SHAPES)
def test_every_family_at_every_tp(name: str, tp: int, tmp_path: Path) -> None:
    config = config_of(name)
    tensors = random_tensors(config)
    assert_same(load(write(tmp_path, config, tensors), tp), fuse(tensors, config, tp))


def test_small_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many chunks a tensor, rows that do not divide: nothing is lost at their borders."""
    monkeypatch.setattr(weights, "CHUNK_BYTES", 7 * 64 * 4)
    config = config_of("mistral")
    tensors = random_tensors(config)
    assert_same(load(write(tmp_path, config, tensors), 3), fuse(tensors, config, 3))


@pytest.mark.parametrize("variant", ["llama3", "llama3.2", "mistral", "qwen2", "qwen2-window", "qwen3"])
def test_transformers_checkpoints(variant: str, tmp_path: Path) -> None:
    """As transformers writes them, in several files: its names are ours, and a tied head is not stored."""
    pytest.importorskip("torch")
    from tiny import config_dict, make_checkpoint

    path, model = make_checkpoint(tmp_path, variant, max_shard_size="60KB", dtype="bfloat16")
    assert len(list(path.glob("*.safetensors"))) > 1
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    config = config_dict(variant)
    if config["tie_word_embeddings"]:
        del state["lm_head.weight"]
    assert_same(load(path, 3), fuse(state, config, 3))


@pytest.mark.parametrize("stored", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
@pytest.mark.parametrize("wanted", [jnp.float32, jnp.bfloat16])
def test_dtypes(stored: Any, wanted: Any, tmp_path: Path) -> None:
    config = config_of("llama2", num_hidden_layers=1)
    tensors = {name: x.astype(stored) for name, x in random_tensors(config).items()}
    expected = fuse({name: x.astype(wanted).astype(np.float32) for name, x in tensors.items()}, config, 2)
    assert_same(load(write(tmp_path, config, tensors), 2, wanted), expected)


@pytest.mark.parametrize("files", [1, 3])
def test_left_over_but_harmless(files: int, tmp_path: Path) -> None:
    """The stored copy of a tied head, and old checkpoints' rotary frequencies."""
    config = config_of("llama3")
    tensors = random_tensors(config)
    more = {"lm_head.weight": tensors["model.embed_tokens.weight"]}
    more["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)
    path = write(tmp_path, config, {**tensors, **more}, files)
    save_file({"other": np.ones(3)}, path / "consolidated.safetensors")  # Mistral's second copy
    assert_same(load(path, 2), fuse(tensors, config, 2))


def test_each_device_reads_its_slice_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of("mistral", num_hidden_layers=1)
    tensors = random_tensors(config)
    checkpoint = open_checkpoint(str(write(tmp_path, config, tensors)))
    read: dict[str, int] = dict.fromkeys(tensors, 0)
    largest = 0
    source: Any = checkpoint.source
    original = source.read

    def counting(name: str, rows: slice, cols: slice | None = None) -> np.ndarray:
        nonlocal largest
        values = original(name, rows, cols)
        read[name] += values.size
        largest = max(largest, values.nbytes)
        return values

    monkeypatch.setattr(source, "read", counting)
    monkeypatch.setattr(weights, "CHUNK_BYTES", 4096)
    mesh = make_mesh(2)
    model = Transformer(checkpoint.model_config, mesh, jnp.dtype("float32"))
    load_params(checkpoint, model, checkpoint.model_config, mesh, jnp.dtype("float32"), use_tqdm=False)
    assert read == {name: x.size for name, x in tensors.items()}  # replicated ones too: once, not once a device
    assert largest <= 4096


# ---- GGUF


def permute(x: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp, convert_hf_to_gguf.py, LlamaModel.permute."""
    return x.reshape(heads, 2, x.shape[0] // heads // 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)


def gguf_name(name: str) -> str:
    parts = {
        **{"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"},
        **{"self_attn.o_proj": "attn_output", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"},
        **{"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"},
        **{"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"},
        **{"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"},
    }
    name = name.replace("model.layers.", "blk.")
    for hf, ours in parts.items():
        name = name.replace(hf, ours)
    return name


Q = gguf.GGMLQuantizationType
TYPES = {"attn_q": Q.Q8_0, "attn_k": Q.F16, "attn_v": Q.BF16, "attn_output": Q.Q8_0, "ffn_gate": Q.Q4_0}
TYPES |= {"ffn_up": Q.Q5_1, "ffn_down": Q.Q4_1, "token_embd": Q.Q8_0}


def write_gguf(
    path: Path, architecture: str, config: dict[str, Any], tensors: dict[str, np.ndarray], **extra: np.ndarray
) -> dict[str, np.ndarray]:
    """A GGUF file of many types; returns the tensors as they are after quantization, under transformers' names."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    stored = {}
    for name, x in tensors.items():
        target = gguf_name(name)
        kind = TYPES.get(target.split(".")[-2], Q.F32) if x.ndim > 1 else Q.F32
        heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
        turned = heads.get(target.split(".")[-2]) if architecture == "llama" else None
        data = gguf.quants.quantize(x if turned is None else permute(x, turned), kind)
        # Blocks lie along a row, so quantizing before or after moving whole rows is the same.
        stored[name] = gguf.quants.dequantize(gguf.quants.quantize(x, kind), kind).reshape(x.shape)
        writer.add_tensor(target, data, raw_dtype=kind)
    for name, x in extra.items():
        writer.add_tensor(name.replace("__", "."), x)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


GGUF_LLAMA = {"hidden_size": 64, "intermediate_size": 192, "num_attention_heads": 8, "num_key_value_heads": 2}


@pytest.mark.parametrize("tp", TPS)
def test_gguf_llama(tp: int, tmp_path: Path) -> None:
    """tp 8 reads half blocks of the output projection's columns: 16 of 32."""
    config = config_of("llama3", **GGUF_LLAMA)
    stored = write_gguf(tmp_path / "tiny.gguf", "llama", config, random_tensors(config))
    found = load(tmp_path, tp)  # a directory with one GGUF file
    assert_same(found, fuse(stored, config, tp))
    as_safetensors = load(write(tmp_path / "st", config, stored), tp)
    assert_same(found, {name: np.asarray(x) for name, x in as_safetensors.items()})


def test_gguf_qwen3_is_not_permuted(tmp_path: Path) -> None:
    config = config_of("qwen3", num_hidden_layers=1)
    stored = write_gguf(tmp_path / "tiny.gguf", "qwen3", config, random_tensors(config))
    assert_same(load(tmp_path / "tiny.gguf", 2), fuse(stored, config, 2))


def test_gguf_rope_freqs(tmp_path: Path) -> None:
    """Llama 3.1's scaling is in a tensor: it ends up in the config's frequencies."""
    config = config_of("llama3", **GGUF_LLAMA)
    scaled = open_checkpoint(str(write(tmp_path / "st", config, random_tensors(config)))).model_config.rope.inv_freq(16)
    plain = open_checkpoint(
        str(write(tmp_path / "plain", {**config, "rope_scaling": None}, random_tensors(config)))
    ).model_config.rope.inv_freq(16)
    factors = (plain / scaled).astype(np.float32)
    assert factors.max() > 2
    path = tmp_path / "tiny.gguf"
    write_gguf(path, "llama", config, random_tensors(config), **{"rope_freqs__weight": factors})
    np.testing.assert_allclose(open_checkpoint(str(path)).model_config.rope.inv_freq(16), scaled, rtol=1e-6)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL"])
def test_gguf_types(kind: str, tmp_path: Path) -> None:
    """Rows and columns of every type are those of the whole tensor dequantized."""
    block, size = gguf.GGML_QUANT_SIZES[Q[kind]]
    rng = np.random.default_rng(0)
    data = rng.integers(0, 60, (6, 3 * size), dtype=np.uint8)  # below 60: no infinities among the scales
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_tensor("x", data, raw_dtype=Q[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    source = GGUFSource(gguf.GGUFReader(tmp_path / "x.gguf").tensors)
    whole = gguf.quants.dequantize(data, Q[kind])
    assert source.readable(kind) and source.tensors["x"].shape == (6, 3 * block)
    np.testing.assert_array_equal(source.read("x", slice(1, 5)), whole[1:5])
    start, stop = block - 8, 2 * block + 3
    np.testing.assert_array_equal(source.read("x", slice(2, 4), slice(start, stop)), whole[2:4, start:stop])


def test_gguf_of_the_installed_package(smollm2_path: Path) -> None:
    """The alias finds it, and a permuted tensor read in odd parts is the whole one un-permuted."""
    checkpoint = open_checkpoint("smollm2-135m")
    assert checkpoint.path == smollm2_path and checkpoint.tokenizer_path == smollm2_path
    source, names = checkpoint.source, checkpoint.names
    assert isinstance(source, GGUFSource) and names is not None and checkpoint.model_config.tie_word_embeddings
    name = names["k", 7]
    tensor = next(t for t in gguf.GGUFReader(smollm2_path).tensors if t.name == name)
    raw = gguf.quants.dequantize(np.asarray(tensor.data), tensor.tensor_type)
    expected = raw.reshape(3, 32, 2, 576).swapaxes(1, 2).reshape(192, 576)
    parts = [source.read(name, slice(a, b)) for a, b in ((0, 5), (5, 64), (64, 150), (150, 192))]
    np.testing.assert_array_equal(np.concatenate(parts), expected)


# ---- random


@pytest.mark.parametrize("name", SHAPES)
def test_random_is_the_same_under_any_tp(name: str, tmp_path: Path) -> None:
    config = config_of(name)
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = f"random:{tmp_path / 'config.json'}"
    alone = {key: np.asarray(x) for key, x in load(model, 1).items()}
    tensors = unfuse(alone, config)
    for tp in TPS[1:]:
        assert_same(load(model, tp), fuse(tensors, config, tp))


def unfuse(params: dict[str, np.ndarray], config: dict[str, Any]) -> dict[str, np.ndarray]:
    """The state dict that `fuse` at tp 1 makes these parameters of."""
    D = config["hidden_size"]
    out = {"model.embed_tokens.weight": params["embed_VD"], "model.norm.weight": params["final_norm_D"]}
    if "lm_head_VD" in params:
        out["lm_head.weight"] = params["lm_head_VD"]
    for i in range(config["num_hidden_layers"]):
        block, layer = f"blocks.{i}", f"model.layers.{i}"
        for name, what in (("qkv_KJHD", "weight"), ("qkv_bias_KJH", "bias")):
            if f"{block}.attn.{name}" in params:
                fused = params[f"{block}.attn.{name}"]
                G, tail = fused.shape[1] - 2, fused.shape[3:]
                for x, part in (("q", fused[:, :G]), ("k", fused[:, G]), ("v", fused[:, G + 1])):
                    out[f"{layer}.self_attn.{x}_proj.{what}"] = part.reshape(-1, *tail)
        for x in "qk":
            if f"{block}.attn.{x}_norm_H" in params:
                out[f"{layer}.self_attn.{x}_norm.weight"] = params[f"{block}.attn.{x}_norm_H"]
        out[f"{layer}.self_attn.o_proj.weight"] = params[f"{block}.attn.o_DKGH"].reshape(D, -1)
        out[f"{layer}.mlp.gate_proj.weight"] = params[f"{block}.mlp.gate_up_FCD"][:, 0]
        out[f"{layer}.mlp.up_proj.weight"] = params[f"{block}.mlp.gate_up_FCD"][:, 1]
        out[f"{layer}.mlp.down_proj.weight"] = params[f"{block}.mlp.down_DF"]
        out[f"{layer}.input_layernorm.weight"] = params[f"{block}.attn_norm_D"]
        out[f"{layer}.post_attention_layernorm.weight"] = params[f"{block}.mlp_norm_D"]
    return out


def test_random_values() -> None:
    """Unit gain, norms of one, no two parameters or seeds alike; a shape of configs/models goes by its name."""
    found = {name: np.asarray(x) for name, x in load("random:tiny-qwen3", 1).items()}
    other = {name: np.asarray(x) for name, x in load("random:tiny-qwen3", 1, seed=1).items()}
    for name, x in found.items():
        if "norm" in name:
            assert (x == 1).all(), name
            continue
        inputs = x.shape[-1] if "o_DKGH" not in name else x[0].size
        assert np.abs(x).max() <= 3**0.5 * inputs**-0.5 * 1.0001
        assert x.std() * inputs**0.5 == pytest.approx(1, abs=0.02), name
        assert abs(x.mean()) * inputs**0.5 < 0.05, name
        assert abs(np.corrcoef(x.ravel(), other[name].ravel())[0, 1]) < 0.05, name
    first, second = (found[f"blocks.{i}.mlp.down_DF"].ravel() for i in (0, 1))
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.05
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 0.05  # neighbours


def test_random_never_holds_a_parameter_on_one_device(tmp_path: Path) -> None:
    """Each device computes its own slice: no temporaries, an eighth of the output, nothing communicated."""
    checkpoint = open_checkpoint("random:llama3-8b")
    mesh = make_mesh(8)
    dims = padded_dims(checkpoint.model_config, 8)
    shape = (dims.V, checkpoint.model_config.hidden_size)
    param = weights.Param("embed", None, "VD", shape, wanted="VD")
    program = weights._random_program(param, checkpoint.model_config, dims, mesh, jnp.dtype("bfloat16"))
    compiled: Any = program.lower(np.zeros(2, np.uint32)).compile()  # type: ignore[attr-defined]
    memory = compiled.memory_analysis()
    assert memory.output_size_in_bytes == shape[0] * shape[1] * 2 // 8
    assert memory.temp_size_in_bytes < 1 << 20
    assert not re.search(r"all-|collective|reduce-scatter", compiled.as_text())


# ---- memory

MEMORY_PROBE = """
import sys, threading, time
import jax, jax.numpy as jnp
from jaxinfer.checkpoint import open_checkpoint
from jaxinfer.model import Transformer
from jaxinfer.sharding import make_mesh
from jaxinfer.weights import load_params

def anonymous():
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith("RssAnon"))

def load(path, tp):
    checkpoint = open_checkpoint(path)
    mesh = make_mesh(tp)
    model = Transformer(checkpoint.model_config, mesh, jnp.dtype("bfloat16"))
    return lambda: load_params(checkpoint, model, checkpoint.model_config, mesh, jnp.dtype("bfloat16"), use_tqdm=False)

tiny, path, tp = sys.argv[1], sys.argv[2], int(sys.argv[3])
load(tiny, tp)()  # what jax itself needs is not the loader's
run = load(path, tp)
before, peak, done = anonymous(), 0, threading.Event()

def watch():
    global peak
    while not done.wait(0.001):
        peak = max(peak, anonymous())

thread = threading.Thread(target=watch)
thread.start()
leaves = run()
done.set()
thread.join()
own = sum(shard.data.nbytes for leaf in leaves for shard in leaf.addressable_shards)
print(peak - before - own, own, max(leaf.nbytes for leaf in leaves))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Checkpoints of 200 MB, whose largest tensor is 33 MB as bfloat16: safetensors (bfloat16) and GGUF (Q8_0)."""
    path = tmp_path_factory.mktemp("large")
    shape = {"hidden_size": 512, "intermediate_size": 2048, "vocab_size": 32000, "num_hidden_layers": 16}
    config = config_of("mistral", **shape, num_attention_heads=8, num_key_value_heads=4, head_dim=64)
    tensors = random_tensors(config)
    write(path / "st", config, {name: x.astype(ml_dtypes.bfloat16) for name, x in tensors.items()}, files=2)
    TYPES_BEFORE = dict(TYPES)
    try:
        TYPES.update(dict.fromkeys(TYPES, Q.Q8_0))
        write_gguf(path / "model.gguf", "llama", config, tensors)
    finally:
        TYPES.update(TYPES_BEFORE)
    tiny = config_of("mistral")
    write(path / "tiny", tiny, random_tensors(tiny))
    yield path


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize(("model", "tp"), [("st", 1), ("st", 4), ("model.gguf", 1)])
def test_host_memory_stays_near_the_largest_tensor(model: str, tp: int, large: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", MEMORY_PROBE, str(large / "tiny"), str(large / model), str(tp)],
        cwd=ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    extra, own, largest = map(int, result.stdout.split())
    assert own > 3 * 3 * largest / 2  # loading everything at once would be seen
    print(f"{model} tp {tp}: {extra / largest:.2f} times the largest fused tensor")
    assert extra <= 3 * largest, f"{extra / largest:.1f} times the largest fused tensor ({largest} bytes)"


# ---- what is wrong with a checkpoint


@pytest.fixture
def checkpoint(tmp_path: Path) -> tuple[Path, dict[str, Any], dict[str, np.ndarray]]:
    config = config_of("llama2")
    tensors = random_tensors(config)
    return write(tmp_path / "model", config, tensors), config, tensors


def message(model: str | Path, kind: type[Exception] = ValueError) -> str:
    with pytest.raises(kind) as raised:
        open_checkpoint(str(model))
    return str(raised.value)


def test_missing_left_over_and_misshapen_in_one_error(checkpoint: Any) -> None:
    path, config, tensors = checkpoint
    del tensors["model.layers.1.mlp.up_proj.weight"]
    del tensors["model.norm.weight"]
    tensors["model.layers.0.self_attn.q_proj.weight"] = np.zeros((3, 64), np.float32)
    tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(64, np.float32)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].astype(np.int8)
    text = message(write(path, config, tensors))
    for line in (
        str(path),
        "missing: model.layers.1.mlp.up_proj.weight [160, 64]",
        "missing: model.norm.weight [64]",
        "misshapen: model.layers.0.self_attn.q_proj.weight is [3, 64], by the config [64, 64]",
        "left over: model.layers.0.self_attn.q_proj.bias [64], which LlamaForCausalLM does not have",
        "wrong dtype: lm_head.weight is I8; supported: F64, F32, F16, BF16",
    ):
        assert line in text
    assert text.count("\n") == 5


def test_another_models_checkpoint_is_not_a_thousand_lines(checkpoint: Any) -> None:
    path, config, _ = checkpoint
    (path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 300}))
    assert re.search(r"… and \d{4} more$", message(path))


def test_fp8_tensors(checkpoint: Any) -> None:
    path, config, tensors = checkpoint
    name = "model.layers.0.mlp.down_proj.weight"
    tensors[name] = tensors[name].astype(ml_dtypes.float8_e4m3fn)
    assert f"wrong dtype: {name} is F8_E4M3" in message(write(path, config, tensors))


@pytest.mark.parametrize("left", [0.99, 0.5, 0.0005, 0.0])
def test_truncated_safetensors(left: float, checkpoint: Any) -> None:
    path, _, _ = checkpoint
    file = path / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: int(left * len(data))])
    text = message(path)
    assert "model.safetensors is truncated" in text and f"it has {int(left * len(data))} bytes" in text
    if left >= 0.5:  # the header is whole, so the size is known
        assert f"should have {len(data)}" in text


def test_truncated_and_absent_files_of_an_index(checkpoint: Any) -> None:
    path, config, tensors = checkpoint
    (path / "model.safetensors").unlink()
    write(path, config, tensors, files=4)
    (path / "model-00003-of-00004.safetensors").unlink()
    second = path / "model-00002-of-00004.safetensors"
    second.write_bytes(second.read_bytes()[:-10])
    text = message(path)
    assert "model-00003-of-00004.safetensors is named by model.safetensors.index.json and is not there" in text
    assert "model-00002-of-00004.safetensors is truncated" in text


def test_no_safetensors_file_at_all(checkpoint: Any) -> None:
    path, _, _ = checkpoint
    (path / "model.safetensors").write_text("<html>404, and more than eight bytes</html>")
    assert "is not a safetensors file" in message(path)


def test_a_tensor_in_two_files(checkpoint: Any) -> None:
    path, config, tensors = checkpoint
    (path / "model.safetensors").unlink()
    write(path, config, tensors, files=2)
    save_file({**load_file(path / "model-00002-of-00002.safetensors"), "model.embed_tokens.weight": np.ones(3)},
              path / "model-00002-of-00002.safetensors")  # fmt: skip
    assert "model.embed_tokens.weight stands in two files" in message(path)


def test_truncated_gguf(tmp_path: Path) -> None:
    config = config_of("llama3", **GGUF_LLAMA)
    path = tmp_path / "tiny.gguf"
    write_gguf(path, "llama", config, random_tensors(config))
    data = path.read_bytes()
    for size in (len(data) - 100, len(data) // 2, 100, 3, 0):
        path.write_bytes(data[:size])
        os.utime(path, ns=(size + 1, size + 1))
        assert f"{path} ({size} bytes) is not a readable GGUF file, or is truncated" in message(path)


def test_gguf_of_another_shape_and_type(tmp_path: Path) -> None:
    config = config_of("llama3", **GGUF_LLAMA)
    path = tmp_path / "tiny.gguf"
    tensors = random_tensors(config)
    tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"][:64]
    write_gguf(path, "llama", config, tensors, extra=np.zeros(4, np.int32))
    text = message(path)
    assert "misshapen: blk.0.ffn_up.weight is [64, 64], by the config [192, 64]" in text
    assert "left over: extra [4]" in text


def test_gguf_integers_are_no_weights() -> None:
    source = GGUFSource([])
    assert not any(source.readable(kind) for kind in ("I8", "I16", "I32", "I64", "Q8_K"))


@pytest.mark.parametrize("key", ["hidden_size", "vocab_size", "num_hidden_layers"])
def test_config_without_a_needed_key(key: str, checkpoint: Any) -> None:
    path, config, _ = checkpoint
    del config[key]
    (path / "config.json").write_text(json.dumps(config))
    assert f"{path / 'config.json'}: the model's config lacks {key}" in message(path)


def test_quantized_checkpoint(checkpoint: Any) -> None:
    path, config, _ = checkpoint
    (path / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "awq"}}))
    assert "awq" in message(path)
