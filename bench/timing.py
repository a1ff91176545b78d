"""What the benches share: seconds of a call, medians of calls that take turns, tables."""

import csv
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from minidvae.files import whole  # noqa: E402


def describe(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    available = "" if torch.cuda.is_available() else "no GPU here; "
    return f"{available}CPU, {torch.get_num_threads()} thread(s), torch {torch.__version__}"


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(call: Callable, device: torch.device, times: int = 1) -> float:
    """Of one call, the mean of several with no wait between them."""
    synchronise(device)
    start = time.perf_counter()
    for _ in range(times):
        call()
    synchronise(device)
    return (time.perf_counter() - start) / times


def median_seconds(
    calls: dict[str, Callable], device: torch.device, repeats: int, at_least: float = 0.0
) -> dict[str, float]:
    """Medians of warm calls that take turns within each repeat, each turn `at_least` so many seconds long."""
    turns = {name: max(1, math.ceil(at_least / seconds(call, device))) for name, call in calls.items()}
    times = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            times[name].append(seconds(call, device, turns[name]))
    return {name: statistics.median(values) for name, values in times.items()}


def print_row(columns: Sequence[str], row: dict, widths: dict[str, int] | None = None) -> None:
    widths = {column: max(8, len(column)) for column in columns} | (widths or {})
    print("  ".join(f"{row.get(column, '–'):>{widths[column]}}" for column in columns), flush=True)


def write_csv(path: Path, columns: Sequence[str], rows: list[dict]) -> None:
    with whole(path) as beside, beside.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
