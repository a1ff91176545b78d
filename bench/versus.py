"""Frames per second of train.py, reports included: another checkout, this one, and this one with a
process per core or GPU.

    git worktree add ../before edf02d1
    python bench/versus.py ../before --models vae srnn rvae --set batch=32 optimiser=adamw

The three take turns; the numbers are medians over --repeats trainings with `quick`, from its first
report to the last one. The last column says how far the training losses of the two checkouts are
apart. Both get the settings of --set, one of them those of --set-base or --set-this, where a
setting is of one of them only.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from timing import MeasurementTable, parser, positive

from minidvae.cli import run

ROOT = Path(__file__).parents[1]
COLUMNS = (
    "model",
    "base",
    "this",
    "processes",
    "this / base",
    "processes / base",
    "losses differ by",
)


def main() -> None:
    args = parse_arguments()
    table = MeasurementTable(COLUMNS, args.csv, keep=not args.fresh)
    with tempfile.TemporaryDirectory() as caches:
        for model in args.models:
            if not table.has(model=model):
                table.add(measure(model, args, Path(caches)))


def parse_arguments() -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument("base", type=Path, metavar="CHECKOUT", help="folder of the other checkout")
    options.add_argument(
        "--models",
        nargs="+",
        default=["vae", "rvae"],
        metavar="NAME",
        help="as of train.py (default: vae rvae)",
    )
    options.add_argument("--data", default="built-in", help="as of train.py (default: built-in)")
    options.add_argument(
        "--steps",
        type=positive,
        default=60,
        help="a third of them before the first report (default: 60)",
    )
    for suffix, checkouts in (("", "both"), ("-base", "the other"), ("-this", "this one")):
        options.add_argument(
            f"--set{suffix}",
            nargs="+",
            default=[],
            metavar="KEY=VALUE",
            help=f"settings of {checkouts} (default: the recipe's)",
        )
    return options.parse_args()


def measure(model: str, args: argparse.Namespace, caches: Path) -> dict:
    """Return the row of a model."""
    base_flags = training_flags(model, args, args.set_base)
    this_flags = training_flags(model, args, args.set_this)
    num_devices = torch.cuda.device_count() if args.device.type == "cuda" else os.cpu_count()
    base = args.base.absolute()
    speeds = {"base": [], "this": [], "processes": []}
    for _ in range(args.repeats):
        speed, base_loss = train(base, 1, caches / "base", base_flags)
        speeds["base"].append(speed)
        speed, this_loss = train(ROOT, 1, caches / "this", this_flags)
        speeds["this"].append(speed)
        speed, _ = train(ROOT, num_devices, caches / "processes", this_flags)
        speeds["processes"].append(speed)
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    row = {"model": model}
    for name, speed in medians.items():
        row[name] = f"{speed:.0f}"
    for name in ("this", "processes"):
        row[f"{name} / base"] = f"{medians[name] / medians['base']:.2f}"
    row["losses differ by"] = f"{abs(this_loss / base_loss - 1):.1e}"
    return row


def training_flags(model: str, args: argparse.Namespace, settings: list[str]) -> list[str]:
    report = max(1, args.steps // 3)
    flags = ["--model", model, "--data", args.data, "--recipe", "quick"]
    flags += ["--steps", str(args.steps), "--device", str(args.device)]
    return [*flags, "--set", f"report={report}", *args.set, *settings]


def train(checkout: Path, processes: int, cache: Path, flags: list[str]) -> tuple[float, float]:
    """Return frames per second, and the last training loss. Exits where train.py fails."""
    launch = [sys.executable]
    environment = os.environ | {"MINIDVAE_CACHE": str(cache)}
    if processes > 1:
        launch += ["-m", "torch.distributed.run", "--standalone"]
        launch += [f"--nproc-per-node={processes}", "--"]
        environment["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        command = [*launch, str(checkout / "train.py"), *flags, "--run", f"{folder}/run"]
        done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr[-2000:])
        recipe = json.loads(Path(folder, "run/config.json").read_text())["recipe"]
        lines = Path(folder, "run/log.jsonl").read_text().splitlines()
    first = json.loads(lines[0])
    last = json.loads(lines[-1])
    frames = recipe["batch"] * recipe["frames"] * (last["step"] - first["step"])
    return frames / (last["seconds"] - first["seconds"]), last["train"]["loss"]


if __name__ == "__main__":
    run(main)
