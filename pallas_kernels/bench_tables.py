"""What the benchmark keeps of its rows, and tells: JSON, text, and the entries of tuned/*.json."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def merge(entries: Sequence[dict[str, Any]], found: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> list[dict[str, Any]]:
    """A kernel's list in tuned/*.json with what was found: entries of the same limits are replaced, others kept.

    Sorted by limits, lists of values ahead of them and none counting as infinite: an exact entry then stands ahead of every
    wider one. The widest measured is for everything beyond, where nothing was there before and it names no values.
    """

    def limits(when: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
        return tuple(sorted((name, tuple(x) if isinstance(x, list) else x) for name, x in when.items()))

    def order(when: tuple[tuple[str, Any], ...]) -> tuple[Any, ...]:
        found = [dict(when).get(name, math.inf) for name in names]
        return tuple((0, *x) if isinstance(x, tuple) else (1, x) for x in found)

    table = {limits(entry["when"]): entry["config"] for entry in entries}
    table |= {limits(when): config for when, config in found}
    names = sorted({name for when in table for name, _ in when})
    widest = max(table, key=order)
    if not any(isinstance(x, tuple) for _, x in widest):
        table.setdefault((), table[widest])
    return [{"when": dict(when), "config": table[when]} for when in sorted(table, key=order)]


def write_tuned(path: Path, found: dict[str, list[tuple[dict[str, Any], dict[str, Any]]]]) -> None:
    """Merge what was found into a tuned file: one entry a line."""
    kernels = json.loads(path.read_text()) if path.is_file() else {}
    for name, pairs in found.items():
        kernels[name] = merge(kernels.get(name, ()), pairs)
    lists = []
    for name, entries in kernels.items():
        rows = ",\n".join(f"    {json.dumps(entry)}" for entry in entries)
        lists.append(f"  {json.dumps(name)}: [\n{rows}\n  ]")
    path.write_text("{\n" + ",\n".join(lists) + "\n}\n")


def as_json(results: dict[str, Any]) -> str:
    """What --output holds, a row a line."""

    def text(value: Any) -> str:
        return "[\n" + ",\n".join(map(json.dumps, value)) + "\n]" if isinstance(value, list) else json.dumps(value)

    return "{" + ",\n".join(f"{json.dumps(name)}: {text(value)}" for name, value in results.items()) + "}\n"


def resumed(path: Path, about: dict[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows, and those left out, that a run before this one wrote; rows with an error are to be measured again.

    Raises ValueError where there are none, or they are of another device or jax.
    """
    if not path.is_file():
        raise ValueError(f"--resume: there is no {path} of a run before; leave --resume out to begin")
    before = json.loads(path.read_text())
    for name in ("device", "jax"):
        if before[name] != about[name]:
            raise ValueError(f"--resume: {path} is of {name} {before[name]!r}, this is {about[name]!r}; give another --output")
    return [row for row in before["rows"] if "error" not in row and "xla_error" not in row], before["left_out"]


def line(row: dict[str, Any]) -> str:
    """A row for people."""
    number = lambda name, form: format(row[name], form) if name in row else "-"  # noqa: E731
    text = f"{row['kernel']:18} {row['model']:13} {row['shape']:52} "
    if "left_out" in row:
        return text + f"left out: {row['left_out']}"
    text += (
        f"XLA {number('xla_us', '9.1f')} kernel {number('us', '9.1f')} "
        f"± {number('spread_us', '.1f')} limit {number('limit_us', '8.1f')} {number('percent_of_limit', '4.0f')} % "
        f"{number('faster', '5.2f')}× difference {number('relative_difference', '.0e')}"
    )
    return text + "".join(f"\n    {name}: {row[name]}" for name in ("config", "failed", "error", "xla_error") if name in row)


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """A Markdown table of what was measured, a line a kernel: least, median and most of its rows."""
    names = {"faster": "times as fast as XLA", "percent_of_limit": "% of the limit", "relative_difference": "difference"}
    lines = [f"| kernel | rows | {' | '.join(names.values())} | errors |", f"|{'---|' * (len(names) + 3)}"]

    def spread(name: str, found: Sequence[float]) -> str:
        form = {"faster": ".2f", "percent_of_limit": ".0f", "relative_difference": ".0e"}[name]
        if not found or any(map(math.isnan, found)):
            return "NaN" if found else "-"
        return " / ".join(format(x, form) for x in (min(found), statistics.median(found), max(found)))

    for kernel in dict.fromkeys(row["kernel"] for row in rows):
        mine = [row for row in rows if row["kernel"] == kernel]
        cells = [spread(name, [row[name] for row in mine if name in row]) for name in names]
        errors = sum("error" in row or "xla_error" in row for row in mine)
        lines.append(f"| {kernel} | {len(mine)} | {' | '.join(cells)} | {errors} |")
    return "\n".join(lines)
