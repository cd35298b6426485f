"""A model on disk, opened and checked but not yet read: its config and tensors, from safetensors or GGUF.

Nothing here imports jax. `weights` asks a source for rows and columns of single tensors, so that no more of a checkpoint
is in memory than what is being copied.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from jaxinfer.config import ModelConfig, read_json
from jaxinfer.families import FAMILIES, GGUF_ARCHITECTURES, GGUF_ROPE_FREQS, checkpoint_names, is_ignorable
from jaxinfer.hub import resolve_model
from jaxinfer.tokenizer import read_gguf

INDEX = "model.safetensors.index.json"
FLOATS = ("F64", "F32", "F16", "BF16")
ALL = slice(None)


class Tensor(NamedTuple):
    """What a checkpoint says of one tensor: its shape, output axis first, and its type there (F32, BF16, Q4_0 …)."""

    shape: tuple[int, ...]
    dtype: str


class SafetensorsSource:
    """The tensors of one or several .safetensors files.

    Args:
        directory: holds `model.safetensors.index.json` and the files it names, or .safetensors files without an index.

    Attributes:
        tensors: name → Tensor.

    Raises:
        ValueError: a file of the index is not there, or is truncated; with the full list.
    """

    def __init__(self, directory: Path):
        files = _safetensors_files(directory)
        problems = [
            f"{file.name} is named by {INDEX} and is not there (an interrupted download?)"
            for file in files
            if not file.is_file()
        ]
        self.tensors: dict[str, Tensor] = {}
        self._file: dict[str, Any] = {}
        for file in files:
            if not file.is_file():
                continue
            try:
                opened: Any = safe_open(file, framework="numpy")
            except SafetensorError as error:
                problems.append(f"{file.name} {_damage(file, error)}")
                continue
            for name in opened.keys():  # noqa: SIM118 (not a dict)
                if name in self._file:
                    problems.append(f"tensor {name} stands in two files, the second {file.name}")
                tensor = opened.get_slice(name)
                self.tensors[name] = Tensor(tuple(tensor.get_shape()), tensor.get_dtype())
                self._file[name] = opened
        if problems:
            raise ValueError(listed(f"the checkpoint {directory} cannot be read", problems))

    def read(self, name: str, rows: slice = ALL, cols: slice | None = None) -> np.ndarray:
        """Rows (and columns) of a tensor, in the type it is stored in."""
        tensor = self._file[name].get_slice(name)
        return tensor[rows] if cols is None else tensor[rows, cols]

    def readable(self, dtype: str) -> bool:
        """Whether tensors of a type can be weights: floating point, no quantized bytes."""
        return dtype in FLOATS


class GGUFSource:
    """The tensors of a GGUF file, dequantized as they are read.

    Args:
        tensors: of `read_gguf`; mapped into memory, so that only the rows asked for are read.
        permuted: names of tensors whose heads' rotary halves are interleaved: `read` gives their rows in the order of
            the checkpoint that was converted (the inverse of llama.cpp's `LlamaModel.permute`).
        head_dim: rows a head.
    """

    def __init__(self, tensors: list[Any], permuted: frozenset[str] = frozenset(), head_dim: int = 0):
        self._tensors = {tensor.name: tensor for tensor in tensors}
        self.tensors = {
            tensor.name: Tensor(tuple(int(n) for n in reversed(tensor.shape)), tensor.tensor_type.name) for tensor in tensors
        }
        self._permuted, self._head_dim = permuted, head_dim

    def read(self, name: str, rows: slice = ALL, cols: slice | None = None) -> np.ndarray:
        """Rows (and columns) of a tensor: float16 and bfloat16 as they are stored, everything else as float32."""
        from gguf.constants import GGML_QUANT_SIZES

        tensor = self._tensors[name]
        shape, dtype = self.tensors[name]
        data = tensor.data
        if name in self._permuted:
            row = np.arange(shape[0])[rows]
            head, within = row // self._head_dim, row % self._head_dim
            half = self._head_dim // 2
            data = data[head * self._head_dim + 2 * (within % half) + within // half]
        else:
            data = data[rows]
        if cols is None or len(shape) < 2:
            return _dequantize(np.asarray(data), dtype)
        start, stop, _ = cols.indices(shape[-1])
        if dtype in FLOATS and dtype != "BF16":
            return np.asarray(data[:, start:stop])
        block, size = GGML_QUANT_SIZES[tensor.tensor_type]
        first, last = start // block, -(-stop // block)  # whole blocks that cover the columns
        values = _dequantize(np.asarray(data[:, first * size : last * size]), dtype)
        return values[:, start - first * block : stop - first * block]

    def readable(self, dtype: str) -> bool:
        """Whether tensors of a type can be weights: floating point, or blocks that the gguf package dequantizes."""
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        if dtype in FLOATS:
            return True
        try:
            _dequantize(np.zeros((1, GGML_QUANT_SIZES[GGMLQuantizationType[dtype]][1]), np.uint8), dtype)
        except NotImplementedError:
            return False
        return not dtype.startswith("I") or dtype.startswith("IQ")  # I8 … I64 are integers


Source = SafetensorsSource | GGUFSource


@dataclass(frozen=True)
class Checkpoint:
    """A model that `weights.load_params` can load.

    tokenizer_path: a directory or .gguf file for `load_tokenizer`; None if there is no tokenizer ("random:").
    source: its tensors, checked against the config; None for random weights.
    names: (logical name, layer or None) → the tensor's name in the source.
    """

    model_config: ModelConfig
    generation_config: dict[str, Any]
    path: Path
    tokenizer_path: Path | None = None
    source: Source | None = None
    names: dict[tuple[str, int | None], str] | None = None


def open_checkpoint(model: str, *, revision: str | None = None, download_dir: str | None = None) -> Checkpoint:
    """Resolve, download if need be, and open a model; nothing but headers is read.

    Args:
        model, revision, download_dir: see `hub.resolve_model`.

    Raises:
        FileNotFoundError, ConnectionError: of `hub.resolve_model`.
        ValueError: the config is not supported, or tensors are missing, left over, misshapen, truncated or of a type
            that no weight has: one error with the full list.
    """
    files = resolve_model(model, revision=revision, download_dir=download_dir)
    if files.kind == "gguf":
        return _open_gguf(files.path)
    config_file = files.path / "config.json" if files.path.is_dir() else files.path
    generation_file = files.path / "generation_config.json"
    generation_config = read_json(generation_file) if generation_file.is_file() else {}
    try:
        config = ModelConfig.from_hf(read_json(config_file), generation_config)
    except ValueError as error:
        raise ValueError(f"{config_file}: {error}") from error
    if files.kind == "random":
        return Checkpoint(config, generation_config, files.path)
    source = SafetensorsSource(files.path)
    names = checkpoint_names(FAMILIES[config.architecture].tensors, config.num_hidden_layers, config.tie_word_embeddings)
    _check(files.path, source, names, config)
    return Checkpoint(config, generation_config, files.path, files.path, source, names)


def _open_gguf(path: Path) -> Checkpoint:
    metadata, tensors = read_gguf(path)
    plain = GGUFSource(tensors)
    freqs = plain.read(GGUF_ROPE_FREQS) if GGUF_ROPE_FREQS in plain.tensors else None
    try:
        config = ModelConfig.from_gguf(metadata, plain.tensors, freqs)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    family = GGUF_ARCHITECTURES[metadata["general.architecture"]]
    names = checkpoint_names(family.tensors, config.num_hidden_layers, config.tie_word_embeddings)
    turned = ("q", "k", "q_bias", "k_bias") if family.permuted_qk else ()
    permuted = frozenset(name for (logical, _), name in names.items() if logical in turned)
    source = GGUFSource(tensors, permuted, config.head_dim)
    _check(path, source, names, config)
    return Checkpoint(config, {}, path, path, source, names)


def logical_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Logical name → the shape of its tensor in a checkpoint, before any padding."""
    D, F, V, H = config.hidden_size, config.intermediate_size, config.vocab_size, config.head_dim
    N, K = config.num_attention_heads, config.num_key_value_heads
    return {
        **{"embed": (V, D), "lm_head": (V, D), "final_norm": (D,), "attn_norm": (D,), "mlp_norm": (D,)},
        **{"q": (N * H, D), "k": (K * H, D), "v": (K * H, D), "o": (D, N * H)},
        **{"q_bias": (N * H,), "k_bias": (K * H,), "v_bias": (K * H,), "q_norm": (H,), "k_norm": (H,)},
        **{"gate": (F, D), "up": (F, D), "down": (D, F)},
    }


def listed(what: str, problems: list[str], most: int = 400) -> str:
    """One message of many lines (a checkpoint of another model can have thousands: then the first ones and a count)."""
    more = [f"… and {len(problems) - most} more"] if len(problems) > most else []
    return "\n  ".join([f"{what}:", *problems[:most], *more])


def _check(path: Path, source: Source, names: dict[tuple[str, int | None], str], config: ModelConfig) -> None:
    """Every tensor is there, with its shape and a type that can be read, and none is left over."""
    shapes = logical_shapes(config)
    problems = []
    readable = {dtype: source.readable(dtype) for dtype in {tensor.dtype for tensor in source.tensors.values()}}
    for (logical, _), name in names.items():
        tensor = source.tensors.get(name)
        if tensor is None:
            problems.append(f"missing: {name} {list(shapes[logical])}")
            continue
        if tensor.shape != shapes[logical]:
            problems.append(f"misshapen: {name} is {list(tensor.shape)}, by the config {list(shapes[logical])}")
        if not readable[tensor.dtype]:
            problems.append(f"wrong dtype: {name} is {tensor.dtype}; supported: {', '.join(FLOATS)} (or GGUF's blocks)")
    used = set(names.values())
    for name, tensor in source.tensors.items():
        if name not in used and not is_ignorable(name, config.tie_word_embeddings):
            problems.append(f"left over: {name} {list(tensor.shape)}, which {config.architecture} does not have")
    if problems:
        raise ValueError(listed(f"the checkpoint {path} does not fit its config", problems))


def _safetensors_files(directory: Path) -> list[Path]:
    index = directory / INDEX
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ValueError(f"{index} has no weight_map")
        return [directory / name for name in sorted(set(weight_map.values()))]
    if (directory / "model.safetensors").is_file():
        return [directory / "model.safetensors"]
    # Mistral's repositories hold the same weights a second time, as consolidated*.safetensors with other names.
    return [file for file in sorted(directory.glob("*.safetensors")) if not file.name.startswith("consolidated")]


def _damage(file: Path, error: SafetensorError) -> str:
    """What is wrong with a file that safetensors refuses: truncated, most often."""
    size = file.stat().st_size
    if size < 8:
        return f"is truncated: it has {size} bytes, not even the length of its header"
    with file.open("rb") as f:
        length = int.from_bytes(f.read(8), "little")
        text = f.read(min(length, size))
    expected = 8 + length
    if len(text) == length:
        try:
            header = json.loads(text)
            expected += max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
        except (ValueError, TypeError, KeyError) as broken:
            return f"is not a safetensors file: {error} ({broken})"
    if size >= expected or length > 100_000_000:  # safetensors' own limit: these 8 bytes are no length
        return f"is not a safetensors file ({size} bytes): {error}"
    return f"is truncated: it has {size} bytes and should have {'at least ' if len(text) < length else ''}{expected}"


def _dequantize(data: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "BF16":
        return data.view(ml_dtypes.bfloat16)
    if dtype in FLOATS:
        return data
    from gguf import quants
    from gguf.constants import GGMLQuantizationType

    out = quants.dequantize(data, GGMLQuantizationType[dtype])
    return out.reshape(*data.shape[:-1], math.prod(out.shape) // math.prod(data.shape[:-1]))
