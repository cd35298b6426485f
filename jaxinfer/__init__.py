"""jaxinfer: Llama-family language models on one to many GPUs from one JAX process.

The public names load on first use, so that `import jaxinfer` starts no backend and its environment can still be set.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from jaxinfer.async_llm import AsyncLLM
    from jaxinfer.llm import LLM
    from jaxinfer.request import (
        CompletionOutput,
        RequestOutput,
        RequestOutputKind,
        SamplingParams,
        StructuredOutputsParams,
    )

_EXPORTS = {
    "LLM": "jaxinfer.llm",
    "AsyncLLM": "jaxinfer.async_llm",
    "SamplingParams": "jaxinfer.request",
    "StructuredOutputsParams": "jaxinfer.request",
    "RequestOutput": "jaxinfer.request",
    "RequestOutputKind": "jaxinfer.request",
    "CompletionOutput": "jaxinfer.request",
}

__all__ = [
    "LLM",
    "AsyncLLM",
    "CompletionOutput",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
    "StructuredOutputsParams",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'jaxinfer' has no attribute {name!r}; it exports {', '.join(sorted(__all__))}")
    return getattr(import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
