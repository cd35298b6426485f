"""Where kernels run, and tuned configurations as data.

device name → tuned/<device>.json, {kernel: [{"when": {…}, "config": {…}}, …]}.
"""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

import jax

FOLDER = Path(__file__).parent / "tuned"


class Unsupported(ValueError):
    """A kernel was asked for by name that cannot do this here: the message says why, and what to name instead."""

    def __init__(self, kernel: str, why: str):
        super().__init__(f"{kernel}(implementation='mosaic'): {why}; pass None or 'reference'")


def device_name() -> str:
    """The first device's kind as a file name: "NVIDIA H200" → "nvidia_h200"."""
    return re.sub(r"[^a-z0-9]+", "_", jax.devices()[0].device_kind.lower()).strip("_")


def why_no_mosaic(interpret: Any = None) -> str | None:
    """Why no Mosaic GPU kernel of this package runs here, simulated where `interpret` is given; None where they do."""
    if tuple(int(x) for x in jax.__version__.split(".")[:2]) < (0, 11):
        return f"jax {jax.__version__}: the kernel needs jax 0.11 or newer"
    device = jax.devices()[0]
    if interpret is None and (device.platform != "gpu" or getattr(device, "compute_capability", "") != "9.0"):
        return f"{device.device_kind!r} is no Hopper GPU (compute capability 9.0)"
    return None


@functools.cache
def _load(device: str) -> dict[str, Any]:
    path = FOLDER / f"{device}.json"
    if not path.is_file():
        return {}
    table: dict[str, Any] = json.loads(path.read_text())
    return table


def lookup(kernel: str, device: str | None = None, **sizes: int) -> dict[str, Any] | None:
    """The config of the first entry of `kernel` that covers `sizes`; None where none fits.

    An entry's "when" maps a size's name to the largest value it covers, or to a list of all that it covers: {"pairs": 32, "K":
    [4, 8]} covers pairs ≤ 32 with a K of 4 or 8. A config of null says that none is to be used there.
    """
    for entry in _load(device or device_name()).get(kernel, ()):
        when = entry["when"].items()
        if all(sizes[name] in covered if isinstance(covered, list) else sizes[name] <= covered for name, covered in when):
            config: dict[str, Any] | None = entry["config"]
            return config
    return None
