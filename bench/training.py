"""Time of a training step (forward, loss, backward) of each model, 257 bins: one frame at a time against shipped.

    python bench/training.py                                   the recurrent family at batch 32, T = 150
    python bench/training.py --models vrnn srnn --batch 32 256 --device cuda --csv training.csv

`reference` is `forward_reference`, the equations one frame at a time with autograd; `shipped` is `forward`. The two
take turns within each repeat; times are medians. Peak memory is what a step adds to what was held before it.

    python bench/training.py --models acoustic --batch 40 --frames 20   3 × 1024 → 512 on 80 bins, carried state
"""

import argparse
import ctypes
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from timing import describe, median_seconds, print_row, seconds, write_csv  # noqa: E402

from minidvae.models import MODELS, build_model  # noqa: E402
from minidvae.models.base import FrameBatch  # noqa: E402

PHONES = 61  # of TIMIT
FAMILY = ("vae", "dkf", "storn", "vrnn", "srnn", "rvae", "dsae")
BINS = 257
COLUMNS = ("model", "batch", "frames", "reference ms", "shipped ms", "ratio", "frames/s")
COLUMNS += ("reference MiB", "shipped MiB")


def step(model: torch.nn.Module, forward, *arguments) -> None:
    model.forward = forward
    model.zero_grad(set_to_none=True)
    model.loss(*arguments)[0].backward()


def peak_mebibytes(call, device: torch.device) -> float:
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


def measure(name: str, batch: int, frames: int, repeats: int, device: torch.device) -> dict:
    torch.manual_seed(0)
    if name == "acoustic":
        model = build_model(name, symbols=tuple(map(str, range(PHONES))), lanes=batch).to(device)
        x = torch.rand(batch, frames, model.config.bins, device=device)
        labels = torch.randint(PHONES, (batch, frames), device=device)
        arguments = (FrameBatch(x, labels, torch.zeros(batch, dtype=torch.bool, device=device)),)
    else:
        model = build_model(name, bins=BINS).to(device)
        arguments = (torch.rand(batch, frames, BINS, device=device), model.draw_noise(batch, frames))
    paths = {"shipped": model.forward}
    if hasattr(model, "forward_reference"):
        paths["reference"] = model.forward_reference
    calls = {path: lambda forward=forward: step(model, forward, *arguments) for path, forward in paths.items()}
    memory = {path: peak_mebibytes(call, device) for path, call in calls.items()}  # and the warm-up
    medians = median_seconds(calls, device, repeats)
    row = {"model": name, "batch": batch, "frames": frames, "frames/s": f"{batch * frames / medians['shipped']:.0f}"}
    for path in calls:
        row |= {f"{path} ms": f"{1e3 * medians[path]:.1f}", f"{path} MiB": f"{memory[path]:.0f}"}
    if "reference" in medians:
        row["ratio"] = f"{medians['reference'] / medians['shipped']:.2f}"
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=FAMILY, choices=MODELS, metavar="NAME")
    parser.add_argument("--batch", nargs="+", type=int, help="default: 32; on a GPU 32, 128 and 512")
    parser.add_argument("--frames", type=int, default=150)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--csv", type=Path, help="write the table to this file as well")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    print(describe(device))
    print_row(COLUMNS, dict(zip(COLUMNS, COLUMNS, strict=True)))
    rows = []
    for batch in arguments.batch or ((32, 128, 512) if device.type == "cuda" else (32,)):
        for name in arguments.models:
            rows.append(measure(name, batch, arguments.frames, arguments.repeats, device))
            print_row(COLUMNS, rows[-1])
    if arguments.csv:
        write_csv(arguments.csv, COLUMNS, rows)


if __name__ == "__main__":
    main()
