"""runtime.setup changes a process once, so most of these ask a fresh process what it got."""

import json
import os
import subprocess
import sys

import pytest

from jaxinfer import runtime


def ask(repo_root, code: str, *, check: bool = True, **environment: str) -> dict:
    """Runs `code` in a new interpreter with a clean environment; it prints one JSON object as its last line."""
    drop = ("XLA_", "JAX_", "JAXINFER_", "NPROC", "NCCL_", "XDG_CACHE_HOME")
    env = {k: v for k, v in os.environ.items() if not k.startswith(drop)}
    env |= {"PYTHONPATH": str(repo_root), "JAX_PLATFORMS": "cpu", **environment}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]) | {"stderr": done.stderr}


def test_import_starts_neither_jax_nor_its_backend(repo_root):
    code = "import sys, json, jaxinfer, jaxinfer.runtime; print(json.dumps({'jax': 'jax' in sys.modules}))"
    got = ask(repo_root, code)
    assert got["jax"] is False


def test_forced_cpu_devices_get_threads_enough_and_no_backend_is_started(repo_root):
    got = ask(
        repo_root,
        "import os, json\n"
        "from jaxinfer import runtime\n"
        "before = runtime.backend_is_running()\n"
        "late = runtime.setup(num_cpu_devices=12)\n"
        "started = runtime.backend_is_running()\n"
        "import jax\n"
        "n = len(jax.devices())\n"
        "print(json.dumps(dict(before=before, started=started, late=late, n=n, after=runtime.backend_is_running(),\n"
        "    nproc=os.environ.get('NPROC'), nvls=os.environ['NCCL_NVLS_ENABLE'],\n"
        "    again=runtime.setup(num_cpu_devices=12), cache=jax.config.jax_compilation_cache_dir)))",
        NPROC="2",
        NCCL_NVLS_ENABLE="1",
    )
    assert (got["before"], got["started"], got["after"]) == (False, False, True)
    assert got["late"] == [] and got["again"] == []
    assert got["n"] == 12 and got["nproc"] == "24" and got["nvls"] == "0"
    assert got["cache"] is None, "a CPU's compiled programs are kept only on request"
    assert "NCCL_NVLS_ENABLE was 1 and is now 0" in got["stderr"]


def test_devices_forced_through_xla_flags_get_threads_too(repo_root):
    got = ask(
        repo_root,
        "import os, json\nfrom jaxinfer import runtime\nruntime.setup()\n"
        "print(json.dumps({'n': os.environ.get('NPROC')}))",
        XLA_FLAGS="--xla_force_host_platform_device_count=4",
        NPROC="3",
    )
    assert got["n"] == "16"


def test_after_the_backend_started_one_warning_says_what_no_longer_applies(repo_root):
    got = ask(
        repo_root,
        "import json, jax\njax.devices()\n"
        "from jaxinfer import runtime\n"
        "print(json.dumps({'late': runtime.setup(num_cpu_devices=4), 'same': runtime.setup(num_cpu_devices=1)}))",
        NPROC="2",
    )
    assert got["same"] == []
    assert [item.split()[0] for item in got["late"]] == ["num_cpu_devices=4", "NPROC=16"]
    warnings = [line for line in got["stderr"].splitlines() if "no longer apply" in line]
    assert len(warnings) == 1 and "num_cpu_devices=4 (running: 1)" in warnings[0]


def test_compiled_programs_are_kept_where_asked_even_after_the_first_compilation(repo_root, tmp_path):
    got = ask(
        repo_root,
        "import json, os, jax\njax.jit(lambda x: x + 1)(1)\n"
        "from jaxinfer import runtime\n"
        f"runtime.setup(cache_dir={str(tmp_path)!r})\n"
        "jax.jit(lambda x: x * 3 + 2)(1)\n"
        "print(json.dumps({'files': os.listdir(jax.config.jax_compilation_cache_dir)}))",
    )
    assert got["files"] and (tmp_path / "xla").is_dir()


@pytest.mark.parametrize(("named", "kept"), [("", False), ("off", False), ("here", True)])
def test_cache_variable(repo_root, tmp_path, named, kept):
    folder = str(tmp_path / named) if kept else named
    got = ask(
        repo_root,
        "import json, jax\nfrom jaxinfer import runtime\nruntime.setup()\n"
        "print(json.dumps({'dir': jax.config.jax_compilation_cache_dir}))",
        JAXINFER_CACHE_DIR=folder,
    )
    assert got["dir"] == (f"{folder}/xla" if kept else None)


def test_gpu_settings_are_made_for_a_gpu_only(repo_root):
    code = (
        "import os, json\nfrom jaxinfer import runtime\n"
        "runtime.GPU_XLA_FLAGS = (((0, 1), (99,), '--xla_old_and_new=1'), ((0, 1), (0, 2), '--xla_gone=1'))\n"
        "runtime.setup(platform={platform!r}, gpu_memory_utilization=0.5)\n"
        "import jax\n"
        "named = [name for name in runtime.MEM_FRACTIONS if name in os.environ]\n"
        "print(json.dumps(dict(f=runtime.memory_fraction(), n=named, x=os.environ.get('XLA_FLAGS', ''),\n"
        "    p=jax.config.jax_platforms, c=jax.config.jax_compilation_cache_dir)))"
    )
    gpu = ask(repo_root, code.format(platform="gpu"), XDG_CACHE_HOME="/nowhere", XLA_FLAGS="--xla_mine=2")
    assert gpu["f"] == 0.5 and gpu["x"] == "--xla_mine=2 --xla_old_and_new=1"
    assert gpu["p"] == "cuda,cpu" and gpu["c"] == "/nowhere/jaxinfer/xla"
    cpu = ask(repo_root, code.format(platform="cpu"))
    assert cpu["n"] == [] and cpu["f"] == 0.75 and cpu["x"] == "" and cpu["c"] is None
    own = ask(repo_root, code.format(platform="gpu"), XLA_CLIENT_MEM_FRACTION="0.3", XDG_CACHE_HOME="/nowhere")
    assert own["f"] == 0.3 and len(own["n"]) == 1, "the user's fraction stands, and jax refuses both variables at once"


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"platform": "tpu"}, "platform is 'tpu'"),
        ({"num_cpu_devices": 0}, "num_cpu_devices is 0; it must be at least 1"),
        ({"num_cpu_devices": 2, "platform": "gpu"}, "cannot be combined"),
        ({"gpu_memory_utilization": 1.5}, "gpu_memory_utilization is 1.5"),
        ({"gpu_memory_utilization": 0.0}, "gpu_memory_utilization is 0.0"),
    ],
)
def test_settings_out_of_range(wrong, says):
    with pytest.raises(ValueError, match=says.replace("(", r"\(")):
        runtime.setup(**wrong)


def test_the_frozen_heap_is_left_alone_by_the_collector(repo_root):
    script = """
import gc
import jaxinfer
from jaxinfer import runtime
class Cycle: pass
dead, alive = Cycle(), Cycle()
dead.me, alive.me = dead, alive
del dead
before = gc.get_freeze_count()
cycles = lambda: sum(isinstance(o, Cycle) for o in gc.get_objects())
with runtime.frozen_heap():
    assert gc.get_freeze_count() > before + 10_000 and cycles() == 0
assert gc.get_freeze_count() == 0 and cycles() == 1
runtime.freeze_heap()
assert gc.get_freeze_count() > before + 10_000 and cycles() == 0
print("frozen")
"""
    result = subprocess.run([sys.executable, "-c", script], cwd=repo_root, capture_output=True, text=True)
    assert result.stdout.strip() == "frozen", result.stderr


def test_environment_report_is_plain_json():
    import jax

    report = json.loads(json.dumps(runtime.environment_report()))
    assert report["backend"] == jax.default_backend()
    assert len(report["devices"]) == jax.device_count()
    assert report["packages"]["jax"] == jax.__version__
    assert report["environment"]["NCCL_NVLS_ENABLE"] == "0"


@pytest.mark.gpu
def test_gpu_report_names_driver_and_memory():
    report = runtime.environment_report()
    assert report["backend"] == "gpu" and report["nvidia_driver"]
    assert all(device["memory"]["bytes_limit"] > 0 for device in report["devices"])
