"""The one structural rule: a module imports only modules listed above it, and the first ones know nothing of jax."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Top to bottom, as in README.md. What stands before `runtime` plans on the host and never touches a device.
LAYERS = (
    "families", "rope", "config", "server_config", "request", "vocab", "chat", "tokenizer", "structured_outputs",
    "outputs", "hub", "checkpoint", "pages", "scheduler", "buckets", "runtime", "sharding", "quant", "cache", "attention",
    "slots", "sampling", "model", "weights", "programs", "runner", "engine", "llm", "async_llm", "metrics", "openai_api",
    "openai_output", "gate", "server", "bench", "cli", "__main__",
)  # fmt: skip
WITHOUT_JAX = LAYERS[: LAYERS.index("runtime")]
JAX = {"jax", "jaxlib", "flax", "orbax"}
# The references our numbers are compared with: fine in a test, never at run time.
REFERENCES = {"torch", "transformers", "vllm", "tensorflow"}


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of every import in the file, also those inside functions; `from a import b` gives
    both a and a.b, since b may be a module."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    tree = ast.parse(path.read_text(), str(path))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module or "") if part)
            yield node.lineno, module
            for alias in node.names:
                yield node.lineno, f"{module}.{alias.name}"


def layer(path: Path) -> str:
    """families.py → families; bench/latency.py → bench; __init__.py → ''."""
    first = path.relative_to(ROOT / "jaxinfer").with_suffix("").parts[0]
    return "" if first == "__init__" else first


def violations(path: Path) -> list[str]:
    here = layer(path)
    found = []
    for line, name in imports(path):
        parts = name.split(".")
        where = f"{path.relative_to(ROOT)}:{line} imports {name}"
        if REFERENCES & set(parts):  # safetensors.torch too
            found.append(f"{where}: only tests may")
        if here in (*WITHOUT_JAX, "") and parts[0] in JAX | {"pallas_kernels"}:
            found.append(f"{where}: this module plans on the host, without jax")
        below = len(parts) > 1 and parts[0] == "jaxinfer" and parts[1] in LAYERS and parts[1] != here
        if here and below and LAYERS.index(parts[1]) > LAYERS.index(here):
            found.append(f"{where}: {parts[1]} stands below {here}")
    return found


@pytest.mark.parametrize("path", sources("jaxinfer"), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_only_what_stands_above(path):
    assert layer(path) in ("", *LAYERS), f"{path.name} has no place in LAYERS: say where it stands"
    assert violations(path) == []


@pytest.mark.parametrize("path", sources("pallas_kernels"), ids=lambda p: str(p.relative_to(ROOT)))
def test_kernels_know_nothing_of_the_engine(path):
    wrong = [(line, name) for line, name in imports(path) if name.split(".")[0] in REFERENCES | {"jaxinfer"}]
    assert wrong == []


def test_the_package_itself_loads_its_names_on_use():
    tree = ast.parse((ROOT / "jaxinfer/__init__.py").read_text())
    at_import = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert {alias.name for node in at_import for alias in node.names} == {"import_module", "TYPE_CHECKING", "Any"}


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("families", "import jax.numpy as jnp"),
        ("config", "from jaxinfer.engine import LLM"),
        ("config", "from . import engine"),
        ("pages", "def f():\n    from jaxinfer import cache"),
        ("runner", "from torch import nn"),
        ("scheduler", "import flax"),
    ],
)
def test_the_check_can_fail(tmp_path, monkeypatch, module, line):
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    path = tmp_path / "jaxinfer" / f"{module}.py"
    path.parent.mkdir()
    path.write_text(line)
    assert violations(path)
