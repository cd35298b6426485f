"""Configuration: the model's, read from its checkpoint, and the engine's, given by the user.

`ModelConfig.from_hf` and `ModelConfig.from_gguf` either describe a model that `jaxinfer.model` computes exactly as
transformers does, or raise a ValueError that names what is not supported and what is. Absent keys take the default of
transformers' configuration class for that architecture. Nothing here imports jax.
"""

import dataclasses
import difflib
import importlib.util
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import yaml

from jaxinfer.families import (
    FAMILIES,
    GGUF_ARCHITECTURES,
    SUPPORTED_ARCHITECTURES,
    SUPPORTED_GGUF_ARCHITECTURES,
    Family,
)
from jaxinfer.rope import RopeConfig, check_number, check_positive_int, one_of, rope_from_hf

DTYPES = ("bfloat16", "float16", "float32")
REQUIRED_KEYS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
MOE_KEYS = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True)
class ModelConfig:
    """What a model is, under Hugging Face's names. Sizes are the checkpoint's own, before any padding for sharding.

    `sliding_windows` has one entry a layer: None for full attention, else how many tokens a query sees, its own
    included. `dtype` is what the checkpoint declares.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    qkv_bias: bool
    qk_norm: bool
    sliding_windows: tuple[int | None, ...]
    rope: RopeConfig
    dtype: str
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        sizes = (*REQUIRED_KEYS, "num_key_value_heads", "head_dim", "max_position_embeddings")
        for field in sizes:
            check_positive_int(field, getattr(self, field))
        check_number("rms_norm_eps", self.rms_norm_eps, above=0)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads = {self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads = {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim = {self.head_dim}: it must be even, rotary embedding turns pairs")
        if not isinstance(self.tie_word_embeddings, bool):
            raise ValueError(f"tie_word_embeddings = {self.tie_word_embeddings!r}: it must be true or false")
        if len(self.sliding_windows) != self.num_hidden_layers:
            raise ValueError(
                f"layer_types has {len(self.sliding_windows)} entries for num_hidden_layers = {self.num_hidden_layers}"
            )
        for window in self.sliding_windows:
            if window is not None:
                check_positive_int("sliding_window", window)
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype {self.dtype!r} is not supported; supported: {one_of(DTYPES)}")
        for token in (*self.eos_token_ids, *(() if self.bos_token_id is None else (self.bos_token_id,))):
            if isinstance(token, bool) or not isinstance(token, int) or token < 0:
                raise ValueError(f"eos_token_id or bos_token_id {token!r}: it must be an integer of at least 0")

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], generation_config: Mapping[str, Any] | None = None) -> Self:
        """From the contents of config.json, and of generation_config.json, whose EOS ids take precedence.

        Raises:
            ValueError: a needed key is missing, or the model is one that jaxinfer does not support; names it.
        """
        family = _hf_family(config)
        missing = [key for key in REQUIRED_KEYS if config.get(key) is None]
        if missing:
            raise ValueError(f"the model's config lacks {one_of(missing)}")

        def get(key: str) -> Any:
            return config.get(key, family.defaults.get(key))

        _refuse_hf(family, config)
        heads = config["num_attention_heads"]
        for field in ("num_attention_heads", "num_hidden_layers", "hidden_size"):
            check_positive_int(field, config[field])
        head_dim = get("head_dim")
        eos = (generation_config or {}).get("eos_token_id")
        return cls(
            architecture=family.architecture,
            **{key: config[key] for key in REQUIRED_KEYS},
            num_key_value_heads=heads if get("num_key_value_heads") is None else get("num_key_value_heads"),
            head_dim=config["hidden_size"] // heads if head_dim is None else head_dim,
            rms_norm_eps=get("rms_norm_eps"),
            max_position_embeddings=get("max_position_embeddings"),
            tie_word_embeddings=get("tie_word_embeddings"),
            qkv_bias=family.qkv_bias,
            qk_norm=family.qk_norm,
            sliding_windows=_sliding_windows(family, config),
            rope=rope_from_hf(config, get("max_position_embeddings")),
            dtype=str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch."),
            bos_token_id=get("bos_token_id"),
            eos_token_ids=_token_ids(get("eos_token_id") if eos is None else eos),
        )

    @classmethod
    def from_gguf(
        cls,
        metadata: Mapping[str, Any],
        tensor_names: Collection[str] = (),
        rope_freqs: Sequence[float] | np.ndarray | None = None,
    ) -> Self:
        """From a GGUF file's metadata (key → value).

        Two facts live only in its tensors: the head is tied unless `tensor_names` holds "output.weight", and
        `rope_freqs` is the content of the tensor `GGUF_ROPE_FREQS` where the file has one (Llama 3.1's scaling).

        Raises:
            ValueError: a needed key is missing, or the model is one that jaxinfer does not support; names it.
        """
        name = metadata.get("general.architecture")
        if name not in GGUF_ARCHITECTURES:
            raise ValueError(f"GGUF architecture {name!r} is not supported; supported: {one_of(SUPPORTED_GGUF_ARCHITECTURES)}")
        family = FAMILIES[GGUF_ARCHITECTURES[name].architecture]

        def get(key: str, default: Any = None) -> Any:
            value = metadata.get(f"{name}.{key}", default)
            if isinstance(value, list | tuple | np.ndarray) and len(set(value)) == 1:
                value = value[0]  # one value a layer, all the same
            return value.item() if isinstance(value, np.generic) else value

        if get("expert_count"):
            raise ValueError(_moe_message(f"{name}.expert_count = {get('expert_count')}"))
        tokens = metadata.get("tokenizer.ggml.tokens")
        sizes = {
            "vocab_size": get("vocab_size", None if tokens is None else len(tokens)),
            "hidden_size": get("embedding_length"),
            "intermediate_size": get("feed_forward_length"),
            "num_hidden_layers": get("block_count"),
            "num_attention_heads": get("attention.head_count"),
        }
        missing = [key for key, value in sizes.items() if value is None]
        if missing:
            raise ValueError(f"the GGUF metadata lacks the keys for {one_of(missing)}")
        for field, value in sizes.items():
            check_positive_int(field, value)
        head_dim = get("attention.key_length", sizes["hidden_size"] // sizes["num_attention_heads"])
        for key in ("attention.value_length", "rope.dimension_count"):
            if get(key, head_dim) != head_dim:
                raise ValueError(f"{name}.{key} = {get(key)} is not supported; it must be the head size {head_dim}")
        window = get("attention.sliding_window") or None
        if window is not None and family.window == "layers":
            raise ValueError(f"{name}.attention.sliding_window = {window} is not supported in a GGUF file of {name!r}")
        eos = [metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
        bos = metadata.get("tokenizer.ggml.bos_token_id")
        return cls(
            architecture=family.architecture,
            **sizes,
            num_key_value_heads=get("attention.head_count_kv", sizes["num_attention_heads"]),
            head_dim=head_dim,
            rms_norm_eps=_shortest(get("attention.layer_norm_rms_epsilon", family.defaults["rms_norm_eps"])),
            max_position_embeddings=get("context_length", family.defaults["max_position_embeddings"]),
            tie_word_embeddings=GGUF_ARCHITECTURES[name].tensors["lm_head"] not in tensor_names,
            qkv_bias=family.qkv_bias,
            qk_norm=family.qk_norm,
            sliding_windows=(window,) * sizes["num_hidden_layers"],
            rope=_rope_from_gguf(get, rope_freqs),
            # GGUF file types 0 and 1 are whole files of float32 and float16; the rest dequantizes to whatever is asked.
            dtype={0: "float32", 1: "float16"}.get(metadata.get("general.file_type", -1), "bfloat16"),
            bos_token_id=None if bos is None else int(bos),
            eos_token_ids=tuple(dict.fromkeys(int(token) for token in eos if token is not None)),
        )


def _shortest(value: float) -> float:
    """The double that prints like the float32 a GGUF file stores (9.999999747378752e-06 → 1e-05)."""
    return float(str(np.float32(value)))


def _rope_from_gguf(get: Any, rope_freqs: Sequence[float] | np.ndarray | None) -> RopeConfig:
    rope_type = get("rope.scaling.type", "none")
    factor = get("rope.scaling.factor", get("rope.scale_linear"))
    if rope_type == "none" and factor not in (None, 0, 1):
        rope_type = "linear"  # the key that files had before scaling types
    known = {"none": "default", "linear": "linear", "yarn": "yarn"}
    if rope_type not in known:
        raise ValueError(f"GGUF rope scaling type {rope_type!r} is not supported; supported: {one_of(known)}")
    values: dict[str, Any] = {"rope_type": known[rope_type], "rope_theta": _shortest(get("rope.freq_base", 10000.0))}
    if rope_type != "none":
        values["factor"] = _shortest(1.0 if factor is None else factor)
    if rope_type == "yarn":
        values["original_max_position_embeddings"] = get("rope.scaling.original_context_length") or get("context_length")
        for field in ("beta_fast", "beta_slow"):
            if get(f"rope.scaling.yarn_{field}") is not None:
                values[field] = _shortest(get(f"rope.scaling.yarn_{field}"))
        unsupported = {"attn_factor": 1.0, "yarn_attn_factor": 1.0, "yarn_ext_factor": 1.0, "yarn_log_multiplier": 0.0}
        for key, neutral in unsupported.items():
            if get(f"rope.scaling.{key}", neutral) not in (neutral, -1.0):
                raise ValueError(f"GGUF rope.scaling.{key} = {get(f'rope.scaling.{key}')} is not supported")
    if rope_freqs is not None:
        values["freq_factors"] = tuple(float(value) for value in rope_freqs)
    return RopeConfig(**values)


def _moe_message(what: str) -> str:
    return f"mixture-of-experts models are not supported ({what}); supported: {one_of(SUPPORTED_ARCHITECTURES)}"


def _hf_family(config: Mapping[str, Any]) -> Family:
    names = config.get("architectures")
    if not names:
        by_type = {family.model_type: family.architecture for family in FAMILIES.values()}
        model_type = config.get("model_type")
        if model_type not in by_type:
            raise ValueError(
                f"the model's config has no architectures, and model_type {model_type!r} is not supported; "
                f"supported: {one_of(by_type)}"
            )
        names = [by_type[model_type]]
    for name in names:
        if name in FAMILIES:
            return FAMILIES[name]
    if any("Moe" in name or "MoE" in name or "Mixtral" in name for name in names):
        raise ValueError(_moe_message(one_of(names)))
    raise ValueError(f"architecture {one_of(names)} is not supported; supported: {one_of(SUPPORTED_ARCHITECTURES)}")


def _refuse_hf(family: Family, config: Mapping[str, Any]) -> None:
    """Raise on what a supported architecture's config can ask for and the model does not compute."""
    quantization = config.get("quantization_config") or config.get("compression_config")
    if quantization:
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, Mapping) else quantization
        raise ValueError(
            f"the checkpoint is quantized (quantization_config, quant_method {method!r}), which is not supported; "
            "use an unquantized safetensors checkpoint or a GGUF file"
        )
    for key in MOE_KEYS:
        if config.get(key):
            raise ValueError(_moe_message(f"{key} = {config[key]}"))
    activation = config.get("hidden_act", family.defaults["hidden_act"])
    if activation != "silu":
        raise ValueError(f"hidden_act = {activation!r} is not supported; supported: silu")
    # Llama and Qwen 3 alone read these keys; there they put biases on o_proj, or on the MLP, which the model has not.
    if family.architecture in ("LlamaForCausalLM", "Qwen3ForCausalLM") and config.get("attention_bias"):
        raise ValueError("attention_bias = true (biases on q, k, v and o projections) is not supported; it must be false")
    if family.architecture == "LlamaForCausalLM" and config.get("mlp_bias"):
        raise ValueError("mlp_bias = true is not supported; it must be false")


def _sliding_windows(family: Family, config: Mapping[str, Any]) -> tuple[int | None, ...]:
    """One window a layer, as the family reads its keys."""
    layers = config["num_hidden_layers"]
    window = config.get("sliding_window", family.defaults.get("sliding_window"))
    if family.window == "none":
        return (None,) * layers
    types = config.get("layer_types")
    if types is not None:
        known = ("full_attention", "sliding_attention")
        for name in types:
            if name not in known:
                raise ValueError(f"layer type {name!r} is not supported; supported: {one_of(known)}")
    if family.window == "all":
        if types is not None and any((name == "sliding_attention") != (window is not None) for name in types):
            raise ValueError(
                f"{family.architecture} with layer_types {one_of(sorted(set(types)))} and sliding_window = "
                f"{window} is not supported; its window applies to all layers"
            )
        return (window,) * layers
    if not config.get("use_sliding_window", family.defaults["use_sliding_window"]):
        window = None
    if types is None:
        first = config.get("max_window_layers", family.defaults["max_window_layers"])
        return tuple(window if i >= first else None for i in range(layers))
    return tuple(window if name == "sliding_attention" else None for name in types)


def _token_ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(dict.fromkeys(value)) if isinstance(value, list | tuple) else (value,)


def generation_defaults(generation_config: Mapping[str, Any] | None) -> dict[str, Any]:
    """The sampling defaults a generation_config.json asks for, as SamplingParams fields.

    The keys are those vLLM reads (`ModelConfig.get_diff_sampling_param`), so `do_sample` is not among them; a null is
    absent, and `max_new_tokens` is `max_tokens`.
    """
    names = {
        **{name: name for name in ("repetition_penalty", "temperature", "top_k", "top_p", "min_p")},
        "max_new_tokens": "max_tokens",
    }
    given = generation_config or {}
    return {ours: given[theirs] for theirs, ours in names.items() if given.get(theirs) is not None}


POLICIES = ("fcfs", "priority")
QUANTIZATIONS = ("int8",)


@dataclass(frozen=True)
class EngineConfig:
    """The engine's options, under vLLM's names. `load` reads them from YAML, `override` replaces some.

    model: a checkpoint directory, a GGUF file, a hub id, an alias of configs/aliases.yaml, or "random:<config.json>".
    tokenizer, chat_template: None takes the model's own. revision: the hub's branch, tag or commit.
    dtype: of weights and activations; "auto" takes the checkpoint's on GPU (bfloat16 for float32 checkpoints) and
        float32 on CPU.
    max_model_len: tokens, prompt and output; None takes the model's own limit.
    gpu_memory_utilization: the share of device memory for weights, cache and temporaries.
    num_gpu_blocks_override: pages in the cache, instead of measuring. block_size: tokens a page.
    max_num_seqs: sequences at a time. max_num_batched_tokens: prompt tokens a step (sequences that decode are not counted);
        None is 4096 on GPU, 512 on CPU.
    long_prefill_token_threshold: while sequences decode, a step takes at most so many tokens for each prompt that is pending
        (those of up to 64 sequences that decode in the same program are among them): they do not wait long for their next
        token where one long prompt arrives; 0 is no limit, None is 256.
    enable_prefix_caching: prompts reuse the pages of earlier ones that begin alike.
    scheduling_policy: "fcfs", or "priority": smaller Request.priority first, then arrival.
    num_scheduler_steps: decode steps a dispatch while nothing waits; None is 1.
    quantization: "int8" rounds the matrices as they are loaded (groups of 128, bfloat16 scales); embedding,
        norms, biases and a tied head stay.
    """

    model: str
    tokenizer: str | None = None
    revision: str | None = None
    tensor_parallel_size: int = 1
    dtype: str = "auto"
    max_model_len: int | None = None
    gpu_memory_utilization: float = 0.9
    num_gpu_blocks_override: int | None = None
    block_size: int = 64
    max_num_seqs: int = 64
    max_num_batched_tokens: int | None = None
    num_scheduler_steps: int | None = None
    enable_prefix_caching: bool = True
    long_prefill_token_threshold: int | None = None
    scheduling_policy: str = "fcfs"
    seed: int = 0
    quantization: str | None = None
    chat_template: str | None = None
    download_dir: str | None = None
    use_tqdm: bool = True

    def __post_init__(self) -> None:
        for field in ("model", "tokenizer", "download_dir"):
            if isinstance(getattr(self, field), Path):
                object.__setattr__(self, field, str(getattr(self, field)))
        for field in ("model", "tokenizer", "revision", "chat_template", "download_dir"):
            value = getattr(self, field)
            if (value is not None or field == "model") and (not isinstance(value, str) or not value):
                raise ValueError(f"{field} = {value!r}: it must be a string that is not empty")
        for field in ("tensor_parallel_size", "block_size", "max_num_seqs"):
            check_positive_int(field, getattr(self, field))
        for field in ("max_model_len", "num_gpu_blocks_override", "max_num_batched_tokens", "num_scheduler_steps"):
            if getattr(self, field) is not None:
                check_positive_int(field, getattr(self, field))
        if self.dtype not in ("auto", *DTYPES):
            raise ValueError(f"dtype = {self.dtype!r}: it must be one of auto, {one_of(DTYPES)}")
        check_number("gpu_memory_utilization", self.gpu_memory_utilization)
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ValueError(
                f"gpu_memory_utilization = {self.gpu_memory_utilization!r}: it must be greater than 0 and at most 1"
            )
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**63:
            raise ValueError(f"seed = {self.seed!r}: it must be an integer from 0 to 2**63 - 1")
        if self.quantization not in (None, *QUANTIZATIONS):
            raise ValueError(f"quantization = {self.quantization!r}: it must be {one_of(QUANTIZATIONS)} or None")
        long = self.long_prefill_token_threshold
        if long is not None and (isinstance(long, bool) or not isinstance(long, int) or long < 0):
            raise ValueError(f"long_prefill_token_threshold = {long!r}: it must be an integer, at least 0 (no limit)")
        if self.scheduling_policy not in POLICIES:
            raise ValueError(f"scheduling_policy = {self.scheduling_policy!r}: it must be one of {one_of(POLICIES)}")
        for field in ("use_tqdm", "enable_prefix_caching"):
            if not isinstance(getattr(self, field), bool):
                raise ValueError(f"{field} = {getattr(self, field)!r}: it must be true or false")

    @classmethod
    def load(cls, path: str | Path, **overrides: Any) -> Self:
        """From a YAML mapping of fields, or from the name of a preset in configs/ ("llama3-8b").

        Raises:
            FileNotFoundError: neither a file nor a preset; lists the presets.
            ValueError: not a mapping, an unknown key, or a value out of range.
        """
        file = Path(path)
        if not file.is_file():
            presets = {preset.stem: preset for preset in configs_dir().glob("*.yaml") if preset.name != _ALIASES}
            if str(path) not in presets:
                raise FileNotFoundError(f"no engine config {str(path)!r}; presets: {one_of(sorted(presets))}")
            file = presets[str(path)]
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
        if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
            raise ValueError(f"{file}: an engine config is a YAML mapping of field to value")
        values.update(overrides)
        _check_engine_keys(cls, values)
        if "model" not in values:
            raise ValueError(f"{file}: an engine config needs the key model")
        return cls(**values)

    def override(self, **values: Any) -> Self:
        """A copy with the given fields replaced. Raises ValueError on an unknown field or a value out of range."""
        _check_engine_keys(type(self), values)
        return dataclasses.replace(self, **values)


def _check_engine_keys(cls: type[EngineConfig], values: Collection[str]) -> None:
    allowed = [field.name for field in dataclasses.fields(cls)]
    for key in values:
        if key not in allowed:
            close = difflib.get_close_matches(key, allowed, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"unknown engine option {key!r}.{hint} Allowed: {one_of(allowed)}")


_ALIASES = "aliases.yaml"


def configs_dir() -> Path:
    """The directory of presets, model shapes and aliases: inside the installed package, or in a checkout."""
    package = Path(__file__).resolve().parent
    for candidate in (package / "configs", package.parent / "configs"):
        if (candidate / _ALIASES).is_file():
            return candidate
    raise FileNotFoundError(f"no configs directory at {package / 'configs'} or {package.parent / 'configs'}")


def model_config_file(name: str | Path) -> Path:
    """A config.json: `name` itself if it is a file (or a directory with one), else that shape of configs/models.

    "llama3-8b", "llama3-8b.json" and "configs/models/llama3-8b.json" all name the shape, wherever the process runs.

    Raises:
        FileNotFoundError: neither; lists the shapes.
    """
    path = Path(name)
    if path.is_dir() and (path / "config.json").is_file():
        return path / "config.json"
    if path.is_file():
        return path
    shapes = {shape.stem: shape for shape in (configs_dir() / "models").glob("*.json")}
    plain = path.parent in (Path("."), Path("configs/models"))
    stem = path.name.removesuffix(".json")
    if not plain or stem not in shapes:
        close = difflib.get_close_matches(stem, shapes, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise FileNotFoundError(f"no model config {str(name)!r}.{hint} Shapes here: {one_of(sorted(shapes))}")
    return shapes[stem]


def read_json(path: str | Path) -> dict[str, Any]:
    """A JSON object. Raises ValueError, naming the file, if it is not one."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, not a JSON object")
    return value


def load_aliases() -> dict[str, tuple[str, ...]]:
    """The alias table, configs/aliases.yaml: name → where to look, in order.

    A candidate is a hub id, or "package:<package>/<glob>" for a file inside an installed Python package.
    """
    table = yaml.safe_load((configs_dir() / _ALIASES).read_text(encoding="utf-8"))
    return {name: tuple(candidates) for name, candidates in table.items()}


def resolve_alias(name: str) -> str:
    """What `name` stands for: the first candidate that is there, or `name` unchanged when it is no alias.

    A hub id is always "there"; a package's file only where the package is installed (it is found, not imported).
    """
    candidates = load_aliases().get(name.lower())
    if candidates is None:
        return name
    for candidate in candidates:
        if not candidate.startswith("package:"):
            return candidate
        package, _, pattern = candidate.removeprefix("package:").partition("/")
        spec = importlib.util.find_spec(package)
        for folder in (spec and spec.submodule_search_locations) or ():
            files = sorted(Path(folder).glob(pattern))
            if files:
                return str(files[0])
    raise FileNotFoundError(f"model alias {name!r}: none of {one_of(candidates)} is installed")
