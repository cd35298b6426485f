"""Decode programs as an H200 would run them, compiled without one: kernels and launches counted, the cache in place, what is
reduced over devices. absent_gpu.py says what it needs beside jax; skipped without."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import absent_gpu
import jax
import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        jax.__version__ < "0.11" or not all(map(absent_gpu.found, absent_gpu.PACKAGES)),
        reason="jax's CUDA plugin or ptxas is not installed (tests/absent_gpu.py)",
    ),
]
HALVES = {"decode_halves": [{"when": {"rows": 16}, "config": {"rows": 128}}]}
INT8_HALVES = {"decode_halves": [{"when": {"rows": 16}, "config": {"rows": 256}}]}


def compiled(model: str, rows: list[int], tuned: Any = None, **settings: Any) -> list[dict[str, Any]]:
    asked = json.dumps({"model": f"random:{model}", "rows": rows, "tuned": tuned or {}, **settings})
    command = [sys.executable, str(Path(absent_gpu.__file__)), asked]
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    assert [program["rows"] for program in found] == rows
    assert all(program["in_place"] and not program["copies"] for program in found)
    return found


@pytest.mark.parametrize(
    ("model", "quantization", "kernels"),
    [
        ("llama3.1-8b", None, 32 // 4 + 1),  # four layers a launch, and the head
        ("llama3.1-8b", "int8", 32 // 8 + 1),
        ("qwen2.5-7b", "int8", 28 // 4 + 1),
        ("llama3.2-1b", None, 16 * 3),  # attention and two norms a layer; the first has one to add less, the head is one
    ],
)
def test_launches_on_one_gpu(model: str, quantization: str | None, kernels: int) -> None:
    for program in compiled(model, [1, 16], quantization=quantization):
        assert program["kernels"] == kernels
        if model != "llama3.2-1b":
            assert sum(program["launches"].values()) <= 80


@pytest.mark.parametrize(
    ("model", "quantization", "layers", "tuned", "kernels", "fusions"),
    [
        ("llama3-8b", None, 32, {}, 3 * 32, 300),
        ("llama3-8b", None, 32, HALVES, 2 * 32 + 1, 20),
        ("llama3-70b", "int8", 80, INT8_HALVES, 2 * 80 + 1, 20),
    ],
)
def test_launches_on_each_of_four_gpus(
    model: str, quantization: str | None, layers: int, tuned: Any, kernels: int, fusions: int
) -> None:
    for program in compiled(model, [16], tuned, quantization=quantization, tensor_parallel_size=4):
        launches = program["launches"]
        assert program["kernels"] == kernels and launches["fusion"] <= fusions
        assert launches["all-reduce"] == 2 * layers + 1 and launches["all-gather"] == 1
        assert program["gathered"] <= 2 * 16 * 4, "the sampler's (value, id) of a row and device, and no weight"
        assert not launches.keys() - {"fusion", "custom-call", "copy", "all-reduce", "all-gather"}
