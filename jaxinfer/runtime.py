"""The process environment, set in one place before the jax backend starts, and a report of it.

XLA and NCCL read their settings once, when the backend starts. `setup` sets what the engine needs; where the backend
already runs it says, in one warning, exactly which settings no longer apply.
"""

import gc
import importlib.metadata
import logging
import os
import platform as host_platform
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

logger = logging.getLogger("jaxinfer")

# XLA sizes its CPU thread pool by NPROC; a pool smaller than the devices (and the helpers beside them) never completes
# a collective.
MIN_CPU_THREADS = 16

# (first jax version, first jax version without it, flag). Flags for the GPU backend, each measured to help before it
# stands here. An unknown flag aborts the process and versions know different ones, hence the bounds.
GPU_XLA_FLAGS: tuple[tuple[tuple[int, ...], tuple[int, ...], str], ...] = ()

CACHE_OFF = ("", "0", "off", "none")
# Two spellings of one variable; jax refuses both at once.
MEM_FRACTIONS = ("XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_CLIENT_MEM_FRACTION")
JAX_MEM_FRACTION = 0.75  # jax's own default

# Bytes a second that a read-only reduction reaches (not the data sheet's), measured on the device, by its kind's name.
KNOWN_READ_LIMITS = {"H200": 4.46e12}


def read_limit(device_kind: str) -> float | None:
    """KNOWN_READ_LIMITS for a device kind ("NVIDIA H200"), None for one we have not measured."""
    return next((limit for name, limit in KNOWN_READ_LIMITS.items() if name in device_kind), None)


def backend_is_running() -> bool:
    """Whether jax has started a backend, without starting one."""
    if "jax" not in sys.modules:
        return False
    from jax._src import xla_bridge  # no public question exists in 0.10 or 0.11

    return xla_bridge.backends_are_initialized()


def schedulable_cpus() -> int:
    """The CPUs this process may run on, which is what XLA counts where NPROC is not set."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def nvidia_gpu_present() -> bool:
    return Path("/dev/nvidiactl").exists()


def default_cache_dir() -> Path:
    """Where compiled programs are kept: $JAXINFER_CACHE_DIR, else $XDG_CACHE_HOME/jaxinfer, else ~/.cache/jaxinfer."""
    if named := os.environ.get("JAXINFER_CACHE_DIR"):
        return Path(named).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "jaxinfer"


def setup(
    *,
    platform: str | None = None,
    num_cpu_devices: int | None = None,
    gpu_memory_utilization: float | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> tuple[str, ...]:
    """Prepares the environment; returns the settings that no longer apply because the backend already runs.

    platform: "cpu" or "gpu" ("cuda"); None leaves the choice to jax. num_cpu_devices: force that many CPU devices
    (implies the CPU). gpu_memory_utilization: the fraction of each GPU's memory that jax may take; a fraction the user
    set in the environment stands. cache_dir: where compiled programs are kept; None is `default_cache_dir()` on a GPU
    and nothing on a CPU (whose programs are bound to the machine that compiled them), unless JAXINFER_CACHE_DIR names
    one; "off" keeps none. Calling it again with the same settings changes and says nothing.
    Raises ValueError for a setting outside its range.
    """
    if platform not in (None, "cpu", "gpu", "cuda"):
        raise ValueError(f"platform is {platform!r}; it must be 'cpu', 'gpu' ('cuda') or None")
    if num_cpu_devices is not None and num_cpu_devices < 1:
        raise ValueError(f"num_cpu_devices is {num_cpu_devices}; it must be at least 1")
    if gpu_memory_utilization is not None and not 0 < gpu_memory_utilization <= 1:
        raise ValueError(f"gpu_memory_utilization is {gpu_memory_utilization}; it must be above 0 and at most 1")
    if num_cpu_devices is not None:
        if platform in ("gpu", "cuda"):
            raise ValueError("num_cpu_devices forces CPU devices and cannot be combined with platform='gpu'")
        platform = "cpu"

    running = backend_is_running()
    late = [
        *_set_platform(platform, running),
        *_set_cpu_devices(num_cpu_devices, running),
        *_set_nccl(running),
        *_set_gpu(platform, gpu_memory_utilization, running),
    ]
    _set_compile_cache(platform, cache_dir, running)
    if late:
        logger.warning(
            "jax already runs, so these settings no longer apply: %s. Create the LLM (or call jaxinfer.runtime.setup) "
            "before anything else uses jax.",
            "; ".join(late),
        )
    return tuple(late)


def _set_platform(platform: str | None, running: bool) -> list[str]:
    if platform is None:
        return []
    import jax

    if running:
        wanted = "cpu" if platform == "cpu" else "gpu"
        return [] if jax.default_backend() == wanted else [f"platform={platform} (running: {jax.default_backend()})"]
    # The CPU stays reachable beside the GPU: weights pass through it.
    jax.config.update("jax_platforms", "cpu" if platform == "cpu" else "cuda,cpu")
    return []


def _set_cpu_devices(num_cpu_devices: int | None, running: bool) -> list[str]:
    import jax

    late = []
    if num_cpu_devices is not None:
        if not running:
            jax.config.update("jax_num_cpu_devices", num_cpu_devices)
        elif jax.device_count("cpu") != num_cpu_devices:
            late.append(f"num_cpu_devices={num_cpu_devices} (running: {jax.device_count('cpu')})")
    forced = num_cpu_devices or forced_cpu_devices()
    if forced > 1:
        threads = max(MIN_CPU_THREADS, 2 * forced)
        have = int(os.environ["NPROC"]) if os.environ.get("NPROC", "").isdigit() else schedulable_cpus()
        if have < threads:
            if running:
                late.append(f"NPROC={threads} (collectives over {forced} CPU devices may hang on {have} threads)")
            else:
                os.environ["NPROC"] = str(threads)
    return late


def _setting(name: str) -> Any:
    """A jax setting, by name: jax declares them at run time, out of a type checker's sight."""
    import jax

    return getattr(jax.config, name)


def forced_cpu_devices() -> int:
    """How many CPU devices the user forced through jax_num_cpu_devices or XLA_FLAGS; 1 if none."""
    if _setting("jax_num_cpu_devices") > 0:
        return int(_setting("jax_num_cpu_devices"))
    found = re.findall(r"--?xla_force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
    return int(found[-1]) if found else 1


def _set_nccl(running: bool) -> list[str]:
    before = os.environ.get("NCCL_NVLS_ENABLE")
    # NVLink multicast can wedge a shared host's fabric; plain peer-to-peer is as fast for our sizes.
    os.environ["NCCL_NVLS_ENABLE"] = "0"
    if before == "0":
        return []
    if before is not None:
        logger.warning("NCCL_NVLS_ENABLE was %s and is now 0: jaxinfer does not use NVLink multicast", before)
    return ["NCCL_NVLS_ENABLE=0"] if running and _running_on_gpu() else []


def _running_on_gpu() -> bool:
    import jax

    return jax.default_backend() == "gpu"


def _gpu_expected(platform: str | None, running: bool) -> bool:
    """Whether the backend is, or is going to be, the GPU."""
    if running:
        return _running_on_gpu()
    if platform is not None:
        return platform != "cpu"
    chosen = _setting("jax_platforms")
    if chosen:
        return chosen.split(",")[0] in ("cuda", "gpu")
    return nvidia_gpu_present() and _version("jax-cuda13-plugin", "jax-cuda12-plugin") is not None


_own: dict[str, str] = {}  # what this process set itself, to tell it from the user's


def memory_fraction() -> float:
    """The fraction of each GPU's memory that jax's allocator takes or took when it started."""
    return float(next((os.environ[name] for name in MEM_FRACTIONS if os.environ.get(name)), JAX_MEM_FRACTION))


def _set_gpu(platform: str | None, fraction: float | None, running: bool) -> list[str]:
    if not _gpu_expected(platform, running):
        return []
    late = []
    # A fraction found in the environment is the user's and stands, unless it is the one set here earlier.
    named = next((os.environ[name] for name in MEM_FRACTIONS if os.environ.get(name)), None)
    if fraction is not None and named in (None, _own.get("fraction")) and named != str(fraction):
        if running:
            late.append(f"gpu_memory_utilization={fraction} (the allocator took {memory_fraction()})")
        else:
            os.environ[MEM_FRACTIONS[0]] = _own["fraction"] = str(fraction)
    present = os.environ.get("XLA_FLAGS", "").split()
    names = {flag.split("=")[0] for flag in present}
    missing = [flag for flag in gpu_xla_flags(_jax_version()) if flag.split("=")[0] not in names]
    if missing and running:
        late.extend(missing)
    elif missing:
        os.environ["XLA_FLAGS"] = " ".join([*present, *missing])
    return late


def gpu_xla_flags(version: tuple[int, ...]) -> list[str]:
    """The GPU backend's XLA flags that this jax version knows."""
    return [flag for first, last, flag in GPU_XLA_FLAGS if first <= version < last]


def compiler_options(platform: str) -> dict[str, Any]:
    """What XLA compiles the engine's programs with. A GPU's kernels take operands that begin at a multiple of 256 bytes; Mosaic
    refuses others as the program runs, and XLA would hand over a part of an array where it lies, as a lone row's pages."""
    return {"xla_gpu_enable_dynamic_slice_fusion": False} if platform == "gpu" else {}


def _jax_version() -> tuple[int, ...]:
    import jax

    return tuple(jax.__version_info__)


def _set_compile_cache(platform: str | None, cache_dir: str | os.PathLike[str] | None, running: bool) -> None:
    import jax

    asked: str | os.PathLike[str] | None = cache_dir if cache_dir is not None else os.environ.get("JAXINFER_CACHE_DIR")
    if asked is not None and str(asked).lower() in CACHE_OFF:
        return
    if asked is None and (_setting("jax_compilation_cache_dir") or not _gpu_expected(platform, running)):
        return
    folder = Path(asked).expanduser() if asked is not None else default_cache_dir()
    path = str(folder / "xla")
    if _setting("jax_compilation_cache_dir") == path:
        return
    jax.config.update("jax_compilation_cache_dir", path)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    if running:
        # jax decides at its first compilation whether there is a cache; make it look again.
        from jax.experimental.compilation_cache import compilation_cache

        compilation_cache.reset_cache()


def freeze_heap() -> None:
    """Have Python's garbage collector never look through what is alive now; JAX's and the model's objects take it 0.1 s.

    For a process that has one engine to its end, once that is ready, as the server's: what is frozen and later dropped is not
    freed where it is part of a cycle. `frozen_heap` is for a while only.
    """
    gc.collect()
    gc.freeze()


@contextmanager
def frozen_heap() -> Iterator[None]:
    """`freeze_heap` until the block ends, for a benchmark."""
    freeze_heap()
    try:
        yield
    finally:
        gc.unfreeze()


PACKAGES = (
    "jax", "jaxlib", "flax", "numpy", "safetensors", "tokenizers", "sentencepiece", "gguf", "jinja2", "huggingface_hub",
    "llguidance", "fastapi", "starlette", "uvicorn", "pydantic", "prometheus-client", "aiohttp", "openai",
    "jax-cuda13-plugin", "jax-cuda13-pjrt", "jax-cuda12-plugin", "nvidia-nccl-cu13", "nvidia-cudnn-cu13",
)  # fmt: skip
ENVIRONMENT = re.compile(r"^(XLA_|JAX_|JAXINFER_|NCCL_|CUDA_VISIBLE|NPROC$|HF_HUB_OFFLINE$|HF_HOME$|TF_GPU_ALLOCATOR$)")


def _version(*names: str) -> str | None:
    """The installed version of the first of these distributions that is installed."""
    for name in names:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def environment_report() -> dict[str, Any]:
    """What a bug report needs to say about this machine, as plain JSON values; starts the backend to see devices."""
    import jax

    from jaxinfer import __version__

    driver = Path("/proc/driver/nvidia/version")
    report: dict[str, Any] = {
        "jaxinfer": __version__,
        "python": sys.version.split()[0],
        "system": host_platform.platform(),
        "cpus": schedulable_cpus(),
        "packages": {name: version for name in PACKAGES if (version := _version(name)) is not None},
        "nvidia_driver": driver.read_text().splitlines()[0] if driver.exists() else None,
        "environment": {key: value for key, value in sorted(os.environ.items()) if ENVIRONMENT.match(key)},
        "compile_cache": _setting("jax_compilation_cache_dir"),
    }
    try:
        devices = jax.devices()
    except RuntimeError as error:
        return {**report, "backend": None, "backend_error": str(error), "devices": []}
    report["backend"] = jax.default_backend()
    report["devices"] = [
        {"id": d.id, "kind": d.device_kind, "platform": d.platform, "memory": _memory(d.memory_stats())} for d in devices
    ]
    return report


def _memory(stats: dict[str, int] | None) -> dict[str, int] | None:
    if not stats:
        return None
    return {key: stats[key] for key in ("bytes_in_use", "peak_bytes_in_use", "bytes_limit") if key in stats}
