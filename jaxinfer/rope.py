"""Rotary position embedding: its parameters as checkpoints give them, its frequencies, and nothing of jax."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

ROPE_TYPES = ("default", "linear", "llama3", "yarn")


def one_of(allowed: Collection[str]) -> str:
    return ", ".join(allowed)


def check_positive_int(field: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{field} = {value!r}: it must be an integer of at least 1")


def check_number(field: str, value: Any, above: float | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{field} = {value!r}: it must be a finite number")
    if above is not None and value <= above:
        raise ValueError(f"{field} = {value!r}: it must be greater than {above:g}")


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding: the frequencies, and what cos and sin are multiplied by.

    The arithmetic is that of transformers' `ROPE_INIT_FUNCTIONS`, in the same precision and order. Sources: Su et al.
    2021 (default), Chen et al. 2023, "Position Interpolation" (linear), Peng et al. 2023, "YaRN" (yarn), the Llama 3.1
    release (llama3). A field that a rope type does not use is left at its default.

    `freq_factors` divides the frequencies one by one; GGUF files store the llama3 scaling in that form.
    """

    rope_type: str = "default"
    rope_theta: float = 10000.0
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    freq_factors: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.rope_type not in ROPE_TYPES:
            raise ValueError(f"rope type {self.rope_type!r} is not supported; supported: {one_of(ROPE_TYPES)}")
        for field in ("rope_theta", "factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"):
            check_number(f"rope {field}", getattr(self, field), above=0)
        for field in ("attention_factor", "mscale", "mscale_all_dim"):
            if getattr(self, field) is not None:
                check_number(f"rope {field}", getattr(self, field))
        if self.rope_type == "llama3" and self.high_freq_factor == self.low_freq_factor:
            raise ValueError(
                f"rope low_freq_factor = high_freq_factor = {self.low_freq_factor}: type 'llama3' needs them to differ"
            )
        if self.rope_type in ("llama3", "yarn"):
            check_positive_int("rope original_max_position_embeddings", self.original_max_position_embeddings)
        if not isinstance(self.truncate, bool):
            raise ValueError(f"rope truncate = {self.truncate!r}: it must be true or false")

    def inv_freq(self, head_dim: int) -> np.ndarray:
        """The angle per position of each rotary pair, [head_dim // 2] float32, in radians."""
        exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
        # Raised in float64 and rounded once: the same float32 on every platform's libm.
        period = np.power(np.float64(self.rope_theta), exponent.astype(np.float64)).astype(np.float32)
        inv_freq: np.ndarray = np.float32(1) / period
        if self.rope_type == "linear":
            inv_freq = inv_freq / np.float32(self.factor)
        elif self.rope_type == "llama3":
            inv_freq = self._llama3(inv_freq)
        elif self.rope_type == "yarn":
            inv_freq = self._yarn(period, head_dim)
        if self.freq_factors is not None:
            if len(self.freq_factors) != head_dim // 2:
                raise ValueError(f"rope freq_factors has {len(self.freq_factors)} values, not head_dim // 2 = {head_dim // 2}")
            inv_freq = inv_freq / np.asarray(self.freq_factors, np.float32)
        return inv_freq

    def _llama3(self, inv_freq: np.ndarray) -> np.ndarray:
        """Long wavelengths divided by `factor`, short ones kept, and a ramp between the two."""
        old_context = self.original_max_position_embeddings
        assert old_context is not None
        low, high = self.low_freq_factor, self.high_freq_factor
        # torch divides a scalar by a tensor as scalar · (1 / tensor); so do we, for the same last bit.
        wavelength = np.float32(2 * math.pi) * (np.float32(1) / inv_freq)
        scaled = np.where(wavelength > np.float32(old_context / low), inv_freq / np.float32(self.factor), inv_freq)
        smooth = (np.float32(old_context) * (np.float32(1) / wavelength) - np.float32(low)) / np.float32(high - low)
        ramp = (np.float32(1) - smooth) * scaled / np.float32(self.factor) + smooth * scaled
        medium = (wavelength >= np.float32(old_context / high)) & (wavelength <= np.float32(old_context / low))
        return np.where(medium, ramp, scaled).astype(np.float32)

    def _yarn(self, period: np.ndarray, head_dim: int) -> np.ndarray:
        """Pairs turning over `beta_fast` times in the old context kept, those under `beta_slow` divided by `factor`."""
        old_context = self.original_max_position_embeddings
        assert old_context is not None

        def pair_that_turns(rotations: float) -> float:
            return head_dim * math.log(old_context / (rotations * 2 * math.pi)) / (2 * math.log(self.rope_theta))

        low: float = pair_that_turns(self.beta_fast)
        high: float = pair_that_turns(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        if low == high:
            high += 0.001  # as transformers does: no division by zero
        ramp = (np.arange(head_dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low)
        keep = np.float32(1) - np.clip(ramp, np.float32(0), np.float32(1))
        kept = np.float32(1) / period
        divided = np.float32(1) / (np.float32(self.factor) * period)
        return (divided * (np.float32(1) - keep) + kept * keep).astype(np.float32)

    @property
    def attention_scaling(self) -> float:
        """What cos and sin are multiplied by (YaRN's attention temperature); 1 for the other types."""
        if self.rope_type != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return float(self.attention_factor)

        def temperature(mscale: float) -> float:
            return 0.1 * mscale * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0

        if self.mscale and self.mscale_all_dim:
            return temperature(self.mscale) / temperature(self.mscale_all_dim)
        return temperature(1.0)


def _rope_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """The one set of rope parameters of a config.json, in either spelling.

    transformers 5 writes `rope_parameters` (with rope_theta inside, and one dict a layer type where they differ), older
    versions `rope_theta` and `rope_scaling` (whose type may be under "type").
    """
    parameters = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(parameters, Mapping):
        raise ValueError(f"rope parameters must be a mapping, not {parameters!r}")
    nested = {key: value for key, value in parameters.items() if isinstance(value, Mapping)}
    if nested:
        first, *others = nested.values()
        if any(other != first for other in others) or len(nested) != len(parameters):
            raise ValueError(f"rope_parameters that differ between layer types ({one_of(nested)}) are not supported")
        parameters = first
    return dict(parameters)


def rope_from_hf(config: Mapping[str, Any], max_position_embeddings: int) -> RopeConfig:
    parameters = _rope_parameters(config)
    rope_type = parameters.get("rope_type") or parameters.get("type") or "default"
    if "mrope_section" in parameters:
        rope_type = "mrope"
    if rope_type not in ROPE_TYPES:
        raise ValueError(f"rope type {rope_type!r} is not supported; supported: {one_of(ROPE_TYPES)}")
    partial = parameters.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise ValueError(f"partial_rotary_factor = {partial!r} is not supported; it must be 1")

    values: dict[str, Any] = {"rope_type": rope_type}
    theta = parameters.get("rope_theta", config.get("rope_theta"))
    if theta is not None:
        values["rope_theta"] = theta
    if rope_type in ("llama3", "yarn"):
        # transformers' order: the config's own key, then the rope parameters', then the model's length.
        original = config.get("original_max_position_embeddings") or parameters.get("original_max_position_embeddings")
        values["original_max_position_embeddings"] = original or max_position_embeddings

    needed = {"linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor"), "yarn": ()}
    missing = [key for key in needed.get(rope_type, ()) if parameters.get(key) is None]
    if missing:
        raise ValueError(f"rope type {rope_type!r} needs {one_of(missing)}; the config has {one_of(parameters)}")
    used = needed.get(rope_type, ())
    if rope_type == "yarn":
        used = ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate")
        check_positive_int("rope original_max_position_embeddings", values["original_max_position_embeddings"])
        factor = parameters.get("factor")
        values["factor"] = max_position_embeddings / values["original_max_position_embeddings"] if factor is None else factor
    values.update({key: parameters[key] for key in used if parameters.get(key) is not None})
    if rope_type == "yarn":  # transformers reads a zero beta as absent
        values = {key: value for key, value in values.items() if not (key in ("beta_fast", "beta_slow") and value == 0)}
    return RopeConfig(**values)
