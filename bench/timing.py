"""What the benches share: seconds and peak memory of a call, medians of calls that take turns, CUDA graphs, a table."""

import argparse
import csv
import ctypes
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # a bench measures the checkout that it is in

from minidvae.cli import Parser  # noqa: E402
from minidvae.files import atomic_write  # noqa: E402


def positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def known_device(text: str) -> torch.device:
    try:
        torch.zeros(1, device=text).item()
    except (RuntimeError, AssertionError, ImportError):
        raise argparse.ArgumentTypeError(f"{text} is not on this machine; try cpu") from None
    return torch.device(text)


def new_file(text: str) -> Path:
    if (path := Path(text)).is_dir() or not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(
            f"{path} cannot be written: it is a folder, or in one that is not there"
        )
    return path


def parser(description: str, resumable: bool = False) -> argparse.ArgumentParser:
    """With the options of every bench; `resumable`: --resume too."""
    found = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--repeats", type=positive, default=7)
    found.add_argument(
        "--device", type=known_device, default="cuda" if torch.cuda.is_available() else "cpu"
    )
    found.add_argument("--csv", type=new_file, help="write the table to this file as well")
    if resumable:
        found.add_argument(
            "--resume", action="store_true", help="keep the rows that --csv has, measure the others"
        )
    return found


def describe(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    available = "" if torch.cuda.is_available() else "no GPU here; "
    return f"{available}CPU, {torch.get_num_threads()} thread(s), torch {torch.__version__}"


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(call: Callable, device: torch.device, times: int = 1) -> float:
    """Of one call, the mean of several with no wait between them. With one thread of a CPU these are seconds of its
    work, to which other processes of a busy machine do not add."""
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter
    synchronise(device)
    start = clock()
    for _ in range(times):
        call()
    synchronise(device)
    return (clock() - start) / times


def median_seconds(
    calls: dict[str, Callable], device: torch.device, repeats: int, at_least: float = 0.0
) -> dict[str, float]:
    """Medians of calls that take turns within each repeat, after one call each; a turn is `at_least` so many seconds
    long."""
    turns = {
        name: max(1, math.ceil(at_least / max(1e-9, seconds(call, device))))
        for name, call in calls.items()
    }
    times = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            times[name].append(seconds(call, device, turns[name]))
    return {name: statistics.median(values) for name, values in times.items()}


def captured(call: Callable, device: torch.device) -> tuple[Callable, str]:
    """The call as a replay of its CUDA graph, or itself and a remark."""
    if device.type != "cuda":
        return call, ""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call()
    except RuntimeError:
        return call, " eager"
    return graph.replay, ""


def peak_mebibytes(call: Callable, device: torch.device) -> float:
    """What a call adds at its peak to the memory held before it. On the CPU from Linux's account of the process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        seconds(call, device)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    try:
        ctypes.CDLL(None).malloc_trim(0)  # free memory back to the system
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
        before = resident_mebibytes("VmRSS:")
        call()
        return resident_mebibytes("VmHWM:") - before
    except (AttributeError, OSError):  # not Linux, or another C library
        return float("nan")


def resident_mebibytes(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


class Table:
    """Rows, printed as they come. widths: of columns that are wider than their name."""

    def __init__(self, *columns: str, **widths: int):
        self.columns, self.rows, self.before = columns, [], []
        self.widths = {column: widths.get(column, max(8, len(column))) for column in columns}
        self.print({column: column for column in columns})

    def resume(self, path: Path | None) -> None:
        """Take the rows that a bench before this one has written."""
        if path is not None and path.exists():
            self.before = read_rows(path)
            self.rows = list(self.before)

    def has(self, **cells) -> bool:
        """Whether one of the rows before has these cells."""
        return any(
            all(row[name] == str(cell) for name, cell in cells.items()) for row in self.before
        )

    def add(self, row: dict) -> None:
        self.rows.append(row)
        self.print(row)

    def print(self, row: dict) -> None:
        print(
            "  ".join(f"{row.get(column, '–'):>{width}}" for column, width in self.widths.items()),
            flush=True,
        )

    def write(self, path: Path | None) -> None:
        if path is None:
            return
        with atomic_write(path) as beside, beside.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(self.rows)


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows that `Table.write` has written; none where there is no such file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def markdown(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (heading, ["---"] * len(heading), *rows))
