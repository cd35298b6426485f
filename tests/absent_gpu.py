"""The engine's programs, compiled for H200s that are not there: XLA needs a topology for that, and Mosaic ptxas, but no GPU.

A program of its own, since it answers for the devices: python tests/absent_gpu.py '{"model": "random:llama3-8b", …}' prints a
list of facts, an object for each program. Needs jax-cuda13-plugin and jax-cuda13-pjrt of jax's version, nvidia-cuda-nvcc,
nvidia-nvvm and nvidia-cuda-crt, all with pip's --no-deps: into the environment, or with --target into a folder on PYTHONPATH.
"""

from __future__ import annotations

import collections
import importlib.util
import json
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

PACKAGES = ("jax_plugins.xla_cuda13", "nvidia.cu13")
# XLA's GpuTargetConfigProto.
H200 = """gpu_device_info { threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 4917248000000 l2_cache_size: 62914560 clock_rate_ghz: 1.98
device_memory_size: 150000000000 shared_memory_per_block_optin: 232448 cuda_compute_capability { major: 9 minor: 0 }
registers_per_core_limit: 65536 registers_per_block_limit: 65536 } platform_name: "CUDA" dnn_version_info { major: 9 minor: 8 }
device_description_str: "NVIDIA H200" """
CARD = SimpleNamespace(platform="gpu", device_kind="NVIDIA H200", core_count=132, compute_capability="9.0")


def found(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def programs(model: str, rows: list[int], tuned: dict[str, Any], **settings: Any) -> list[dict[str, Any]]:
    """Facts of the greedy decode programs of so many rows. tuned: entries for tables of tuned/ that have others, or none."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx
    from jax.experimental import topologies
    from jax.sharding import AxisType, Mesh

    from jaxinfer import slots
    from jaxinfer.attention import reads_valid_pages_only
    from jaxinfer.buckets import decode_buckets
    from jaxinfer.cache import abstract_cache
    from jaxinfer.checkpoint import open_checkpoint
    from jaxinfer.config import EngineConfig
    from jaxinfer.model import Transformer, spec_of
    from jaxinfer.programs import Programs
    from jaxinfer.request import SamplingParams
    from jaxinfer.sharding import padded_dims
    from pallas_kernels import tuning

    config = EngineConfig(model=model).override(**dict(max_model_len=2048, max_num_seqs=64) | settings)
    num_slots, length = config.max_num_seqs, config.max_model_len or 0
    tp, dtype = config.tensor_parallel_size, jnp.dtype("bfloat16")
    where = f"1x1x{tp}"
    topology = topologies.get_topology_desc(platform="cuda", topology_name=where, topology=where, target_config=H200)
    jax.devices = lambda: [CARD]  # whom kernels ask what they run on
    tuning._load("nvidia_h200").update(tuned)
    mesh = Mesh(np.array(topology.devices), ("tp",), axis_types=(AxisType.Auto,))
    shape = open_checkpoint(config.model).model_config
    dims, (graphdef, params) = padded_dims(shape, tp), nnx.split(Transformer(shape, mesh, dtype, config.quantization))

    def abstract(param: nnx.Param) -> Any:
        sharding = jax.sharding.NamedSharding(mesh, spec_of(param))
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), param.get_value())

    variables = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, nnx.Variable))
    leaves = jax.tree.leaves([abstract(param) for param in variables])
    empty = jax.eval_shape(lambda: slots.init_state(num_slots, dims.V, mesh))
    state = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), empty, slots.state_shardings(mesh)
    )
    pages = num_slots * length // config.block_size + 1
    cache = abstract_cache(shape, dims, pages, config.block_size, dtype, mesh)
    params_of_nobody = SamplingParams(temperature=0.0)
    nobody = slots.make_row(
        params_of_nobody, [0], [], eos_token_ids=[], bad_words_ids=[], vocab_size=shape.vocab_size, padded_vocab=dims.V,
        max_model_len=length, sample_index=0,
    )  # fmt: skip
    make = Programs(graphdef, jax.tree.structure(params), mesh, dtype, num_slots, nobody)
    any_length = reads_valid_pages_only(dtype, dims.G, shape.head_dim, config.block_size)
    buckets = [b for b in decode_buckets(config, length, any_length) if b.greedy and b.steps == 1 and b.rows in rows]
    return [
        {"rows": bucket.rows, **facts(make.compile(bucket, leaves, cache, state), cache, dims.K // tp)} for bucket in buckets
    ]


def facts(compiled: Any, cache: Any, heads: int) -> dict[str, Any]:
    """Of a program: what it launches, by kind; whether the cache is updated in place, and how often a part of it is copied."""
    text = compiled.as_text()
    entry = text[text.index("\nENTRY") :]
    kinds = "fusion|custom-call|copy|all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|sort|while"
    launches = collections.Counter(re.findall(rf" ({kinds})(?:-start)?\(", entry))
    pages, _, page, head = cache.keys[0].shape
    part = f"{pages},{heads},{page},{head}"
    size = 2 * len(cache.keys) * pages * heads * page * head * cache.keys[0].dtype.itemsize
    return {
        "launches": dict(launches),
        "kernels": entry.count('custom_call_target="mosaic_gpu'),
        "in_place": compiled.memory_analysis().alias_size_in_bytes >= size,
        "copies": len(re.findall(rf"= bf16\[{part}\]\S* copy\(", text)),
        "gathered": max((elements(line) for line in re.findall(r"= (\S+) all-gather", entry)), default=0),
    }


def elements(shapes: str) -> int:
    sizes = [re.findall(r"\d+", inside) for inside in re.findall(r"\w+\[([\d,]*)\]", shapes)]
    product = 1
    for size in max(sizes, key=len):
        product *= int(size)
    return product


def main() -> None:
    os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}
    os.environ.pop("XLA_FLAGS", None)  # the tests' own flags would make other programs
    spec = importlib.util.find_spec("nvidia.cu13")
    assert spec is not None and spec.submodule_search_locations, "see the docstring for what is needed"
    os.environ["PATH"] = f"{Path(spec.submodule_search_locations[0]) / 'bin'}:{os.environ['PATH']}"
    print(json.dumps(programs(**json.loads(sys.argv[1]))))


if __name__ == "__main__":
    main()
