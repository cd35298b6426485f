"""What `bench serve` and `bench throughput` report alike: the names in their JSON, the printed block, the file."""

import argparse
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

WIDTH = 50


def rates(duration: float, completed: int, total_input_tokens: int, total_output_tokens: int) -> dict[str, float | int]:
    """vLLM's names: seconds, counts, and each a second."""
    return {
        "duration": duration,
        "completed": completed,
        "total_input_tokens": total_input_tokens,
        "total_output_tokens": total_output_tokens,
        "request_throughput": completed / duration,
        "output_throughput": total_output_tokens / duration,
        "total_token_throughput": (total_input_tokens + total_output_tokens) / duration,
    }


def header(title: str, fill: str = "-") -> str:
    return f"{title:{fill}^{WIDTH}}"


def row(name: str, value: float | int | str) -> str:
    """One line of vLLM's block: floats with two digits."""
    return f"{name + ':':<40} {f'{value:.2f}' if isinstance(value, float) else value}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--save-result", action="store_true", help="write everything measured to a JSON file in this folder")
    parser.add_argument("--result-filename", "--output", metavar="FILE", help="write it to this file (implies --save-result)")


def result_path(args: argparse.Namespace, name: str) -> Path | None:
    """Where the result goes, None for nowhere. name: what tells it from others where no file name was given.

    Raises ValueError where no file could be written: better before an hour of measuring than after.
    """
    if args.result_filename is None and not args.save_result:
        return None
    path = Path(args.result_filename or f"{name}-{time.strftime('%Y%m%d-%H%M%S')}.json").absolute()
    if not path.parent.is_dir() or path.is_dir():
        raise ValueError(f"--result-filename {path}: it must be a file in a folder that exists")
    return path


def write(result: Mapping[str, Any], path: Path) -> None:
    path.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n")
