"""Time, peak memory, CUDA graphs and tables, for all benches."""

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
from minidvae.training.config import SettingError  # noqa: E402

# ---------------------------------------------------------------------------------------- options


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def known_device(text: str) -> torch.device:
    try:
        torch.zeros(1, device=text).item()
    except (RuntimeError, AssertionError, ImportError):
        raise argparse.ArgumentTypeError(f"{text} is not on this machine; try cpu") from None
    return torch.device(text)


def new_file(text: str) -> Path:
    path = Path(text)
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(
            f"{path} cannot be written: it is a folder, or in one that is not there"
        )
    return path


def parser(description: str) -> argparse.ArgumentParser:
    """Return a parser with the options of every bench."""
    options = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument(
        "--repeats",
        type=positive,
        default=7,
        help="of each time, of which the median is taken (default: 7)",
    )
    options.add_argument(
        "--device",
        type=known_device,
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu, cuda, cuda:1, … (default: the GPU if there is one)",
    )
    options.add_argument(
        "--csv",
        type=new_file,
        help="also write the table to this file, and keep the rows that it has (default: none)",
    )
    options.add_argument(
        "--fresh", action="store_true", help="measure the rows that --csv has too (default: off)"
    )
    return options


def describe(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    available = "" if torch.cuda.is_available() else "no GPU here; "
    return f"{available}CPU, {torch.get_num_threads()} thread(s), torch {torch.__version__}"


# ------------------------------------------------------------------------------------------- time


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(call: Callable, device: torch.device, times: int = 1) -> float:
    """Return the seconds of one call, the mean of `times` calls without a wait between them. On one
    thread of a CPU they are CPU time, to which other processes of a busy machine do not add."""
    is_one_thread = device.type == "cpu" and torch.get_num_threads() == 1
    timer = time.process_time if is_one_thread else time.perf_counter
    synchronise(device)
    start = timer()
    for _ in range(times):
        call()
    synchronise(device)
    return (timer() - start) / times


def median_seconds(
    calls: dict[str, Callable], device: torch.device, repeats: int, turn_seconds: float = 0.0
) -> dict[str, float]:
    """Return the median seconds of each call. After one call each to warm up, the calls take turns
    in every repeat; a turn calls as often as fits in `turn_seconds`, at least once."""
    times_per_turn = {}
    for name, call in calls.items():
        first = max(1e-9, seconds(call, device))
        times_per_turn[name] = max(1, math.ceil(turn_seconds / first))
    measured = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            measured[name].append(seconds(call, device, times_per_turn[name]))
    return {name: statistics.median(values) for name, values in measured.items()}


def captured(call: Callable, device: torch.device) -> tuple[Callable, str]:
    """Return the call as a replay of its CUDA graph, and an empty remark; where it is not captured,
    the call itself, with the remark " eager" on a GPU."""
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


# ----------------------------------------------------------------------------------------- memory


def peak_mebibytes(call: Callable, device: torch.device) -> float:
    """Return the memory that a call adds at its peak to what was held before; NaN where the system
    does not tell. On a CPU it is resident memory as Linux counts it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        seconds(call, device)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    try:
        ctypes.CDLL(None).malloc_trim(0)  # gives freed memory back to the system
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = resident_mebibytes("VmRSS:")
        call()
        return resident_mebibytes("VmHWM:") - before
    except (AttributeError, OSError):  # not Linux, or another C library
        return float("nan")


def resident_mebibytes(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


# ----------------------------------------------------------------------------------------- tables


class MeasurementTable:
    """Rows that are printed as Markdown as they come, and written to a CSV file.

    Args:
        columns: of the table.
        path: of the CSV file; None: it is only printed.
        keep: keep the rows of a file that exists, which then are not measured again.
    """

    def __init__(self, columns: Sequence[str], path: Path | None = None, keep: bool = True):
        self.columns = list(columns)
        self.path = path
        self.rows = []
        if path is not None and keep:
            self.rows = read_rows(path, self.columns)
        print(markdown_row(self.columns))
        print(markdown_row(["---"] * len(self.columns)), flush=True)
        for row in self.rows:
            self.print(row)

    def has(self, **cells) -> bool:
        """Return whether a row has these cells."""
        for row in self.rows:
            if all(row[name] == str(cell) for name, cell in cells.items()):
                return True
        return False

    def add(self, *rows: dict) -> None:
        """Print rows and write the file."""
        for row in rows:
            self.rows.append(row)
            self.print(row)
        if self.path is not None:
            with atomic_write(self.path) as temporary, temporary.open("w", newline="") as file:
                writer = csv.DictWriter(file, self.columns)
                writer.writeheader()
                writer.writerows(self.rows)

    def print(self, row: dict) -> None:
        cells = [str(row.get(column, "")) or "–" for column in self.columns]
        print(markdown_row(cells), flush=True)


def read_rows(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """Return the rows that `MeasurementTable.add` wrote; none where there is no such file. Raises
    SettingError where the file has other columns."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != list(columns):
            raise SettingError(
                f"{path}: has other columns than this table; choose another file or --fresh"
            )
        return list(reader)


def markdown_row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def markdown(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [markdown_row(heading), markdown_row(["---"] * len(heading))]
    lines += [markdown_row(row) for row in rows]
    return "\n".join(lines)
