"""Frames per second of train.py, reports included: another checkout, this one, this one with a process per core or GPU.

    git worktree add ../before 22f389a
    python bench/versus.py ../before --models vae srnn rvae --set batch=32 frames=150 optimiser=adamw

The three take turns; the numbers are medians over --repeats trainings with `quick`, from its first report to
the last one. The last column says how far the training losses of the two checkouts are apart. Both get the settings of
--set, one of them those of --set-base or --set-this, where a setting is of one of them only.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from timing import Table, parser, positive

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


def train(checkout: Path, processes: int, cache: Path, flags: list) -> tuple[float, float]:
    """Frames per second, and the last training loss. SystemExit where train.py fails."""
    with tempfile.TemporaryDirectory() as folder:
        start, environment = [sys.executable], os.environ | {"MINIDVAE_CACHE": str(cache)}
        if processes > 1:
            start += [
                "-m",
                "torch.distributed.run",
                "--standalone",
                f"--nproc-per-node={processes}",
                "--",
            ]
            environment["OMP_NUM_THREADS"] = "1"
        command = [*start, str(checkout / "train.py"), *map(str, flags), "--run", f"{folder}/run"]
        ran = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
        if ran.returncode:
            sys.exit(ran.stderr[-2000:])
        recipe = json.loads(Path(folder, "run/config.json").read_text())["recipe"]
        first, *_, last = map(json.loads, Path(folder, "run/log.jsonl").read_text().splitlines())
    frames = recipe["batch"] * recipe["frames"] * (last["step"] - first["step"])
    return frames / (last["seconds"] - first["seconds"]), last["train"]["loss"]


def main() -> None:
    options = parser(__doc__)
    options.add_argument("base", type=Path, metavar="CHECKOUT")
    options.add_argument("--models", nargs="+", default=["vae", "rvae"], metavar="NAME")
    options.add_argument("--data", default="built-in", help="as of train.py (default: built-in)")
    options.add_argument(
        "--steps", type=positive, default=60, help="a third of them before the first report"
    )
    for which in ("", "-base", "-this"):
        options.add_argument(f"--set{which}", nargs="+", default=[], metavar="KEY=VALUE")
    args = options.parse_args()
    devices = torch.cuda.device_count() if args.device.type == "cuda" else os.cpu_count()
    table = Table(COLUMNS, args.csv, keep=not args.fresh)
    checkouts = {"base": args.base.absolute(), "this": ROOT, "processes": ROOT}
    own = {"base": args.set_base, "this": args.set_this, "processes": args.set_this}
    with tempfile.TemporaryDirectory() as caches:
        for model in args.models:
            if table.has(model=model):
                continue
            found = {name: [] for name in checkouts}
            for _ in range(args.repeats):
                for name, checkout in checkouts.items():
                    flags = [
                        "--model",
                        model,
                        "--data",
                        args.data,
                        "--recipe",
                        "quick",
                        "--steps",
                        args.steps,
                    ]
                    settings = [f"report={max(1, args.steps // 3)}", *args.set, *own[name]]
                    flags += ["--device", args.device, "--set", *settings]
                    processes = devices if name == "processes" else 1
                    found[name].append(train(checkout, processes, Path(caches, name), flags))
            speeds = {
                name: statistics.median(speed for speed, _ in runs) for name, runs in found.items()
            }
            base, this = (found[name][0][1] for name in ("base", "this"))
            row = {"model": model, **{name: f"{speed:.0f}" for name, speed in speeds.items()}}
            row |= {
                f"{name} / base": f"{speeds[name] / speeds['base']:.2f}"
                for name in ("this", "processes")
            }
            table.add(row | {"losses differ by": f"{abs(this / base - 1):.1e}"})


if __name__ == "__main__":
    main()
