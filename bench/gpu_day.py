"""All that is measured on a GPU: kernel tests, kernels, training steps, trainings by the LigHT paper's recipe, their
resynthesis; and a page that says which budget is met.

    python bench/gpu_day.py --minutes 9 --data ~/LibriSpeech     again and again, until it says that the day is done
    python bench/gpu_day.py --dry                                all of it on a CPU at small sizes, in two minutes

Every part is a process of its own with a limit of its own, so that one that fails or hangs takes no other with it. What
it finds is written as soon as it is known: rows of tables, checkpoints, after every part the page. A part that is cut
off by --minutes goes on in the next call; one that has had its limit, or failed, does not come again.

In --folder: `day.json`, what became of each part; `NAME.log`, its output; `kernels.csv` and `steps.csv`; the runs;
`gpu.md`, the page. Without a GPU, and without --dry, nothing runs and the page says "not measured".
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from kernels import NOT_MEASURED, milliseconds, summary
from timing import describe, markdown, new_file, positive, read_rows

from minidvae.command_line import SOURCES_OF_SPEECH, Parser, run
from minidvae.data.corpus import absolute
from minidvae.experiments.report import summary_cells
from minidvae.experiments.resynthesis import COLUMNS as MEASURES
from minidvae.files import atomic_write, write_json
from minidvae.training.settings import SettingError

ROOT = Path(__file__).parents[1]
GRACE = 30  # seconds that a part has to end by itself once it is told to
TRAININGS = ("light_dvae", "vae", "srnn")
STEPS = {
    "gpu": ("vrnn", "srnn", "dkf", "rvae", "light_dvae", "vae", "storn", "dsae", "hit_dvae"),
    "dry": ("vae", "srnn"),
}
FEW = "--repeats 1 --batch 2 --frames 5".split()
SMALL_LIGHT = "width=16 feedforward=16 layers=1 w_embedding=16 w_hidden=16".split()
DONE, CUT, STOPPED, FAILED = "done", "cut off", "stopped at its limit", "failed"


@dataclass
class Part:
    name: str
    command: list  # after the name of this Python
    limit: float  # minutes, all calls together
    needs: str = ""  # a run whose checkpoint it reads


def parts(folder: Path, data: list[str], dry: bool) -> list[Part]:
    """In the order of what matters most. The whole sweep of the kernels has what time is left."""
    kernels = ["bench/kernels.py", "--csv", folder / "kernels.csv", "--resume"]
    steps = [
        "bench/training.py",
        "--csv",
        folder / "steps.csv",
        "--resume",
        "--models",
        *STEPS["dry" if dry else "gpu"],
    ]
    first = FEW if dry else "--batch 32 256 --frames 20 150 --hidden 128 256 --bins 513 --precision fp32 tf32".split()
    of_tests = ["tests/kernels/test_kernel_losses.py", "-k", "hand or floor"] if dry else ["tests/kernels"]
    of_tests += ["-n", 4] if find_spec("xdist") and not dry else []
    found = [
        Part("tests", ["-m", "pytest", "-q", "-p", "no:cacheprovider", *of_tests], 4),
        Part("kernels", [*kernels, *first, *(["--hidden", 16, "--device", "cpu"] if dry else [])], 5),
        Part("steps", [*steps, *(FEW if dry else ["--batch", 32]), *(["--device", "cpu"] if dry else [])], 4),
    ]
    for model in TRAININGS:
        shorter = ["--steps", 2, "--device", "cpu", "--set", "batch=2", "frames=20", "report=1"] if dry else []
        shorter += SMALL_LIGHT if dry and model == "light_dvae" else []
        begin = ["--model", model, "--recipe", "light2023", *data, *shorter]
        found.append(Part(f"train {model}", ["train.py", "--run", folder / model, *begin], 11))
        flags = ["--json", folder / f"{model}.json", *(["--limit", 2, "--device", "cpu"] if dry else [])]
        evaluate = ["evaluate.py", folder / model, "--task", "resynthesis", *flags]
        found.append(Part(f"evaluate {model}", evaluate, 2, needs=model))
    return found if dry else [*found, Part("all kernels", kernels, 15)]


class Day:
    """What became of each part, kept in the folder."""

    def __init__(self, folder: Path, about: dict):
        self.folder, self.file = folder, folder / "day.json"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.state = {"about": about, "calls": 0, "parts": {}}
        if self.file.exists():
            try:
                self.state = json.loads(self.file.read_text())
                before = self.state["about"]
            except (KeyError, ValueError):
                raise SettingError(f"{self.file}: not written by this bench; choose another --folder") from None
            if before != about:
                differ = ", ".join(f"{name} {before.get(name)}, now {about[name]}" for name in about)
                raise SettingError(f"{folder}: a day of something else ({differ}); choose another --folder")

    def of(self, part: Part) -> dict:
        return self.state["parts"].setdefault(part.name, {"state": "", "seconds": 0.0, "note": ""})

    def open(self, part: Part) -> bool:
        return self.of(part)["state"] in ("", CUT)

    def write(self) -> None:
        write_json(self.file, self.state)

    def work(self, part: Part, seconds: float) -> None:
        """Run a part for so long at most, and note what became of it."""
        known = self.of(part)
        left = 60 * part.limit - known["seconds"]
        command = part.command
        if command[0] == "train.py" and (command[2] / "last.pt").exists():
            command = [*command[:3], "--resume", *(["--device", "cpu"] if "cpu" in command else [])]
        print(f"{part.name}: {min(left, seconds):.0f} s at most", flush=True)
        log, begun = self.folder / f"{part.name.replace(' ', '-')}.log", time.monotonic()
        with open(log, "ab") as output:
            process = subprocess.Popen(
                [sys.executable, *map(str, command)],
                cwd=ROOT,
                env=os.environ | {"PYTHONPATH": str(ROOT)},
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
            try:
                code = process.wait(min(left, seconds))
            except subprocess.TimeoutExpired:
                code = None
            finally:
                end(process)
        known["seconds"] = round(known["seconds"] + time.monotonic() - begun, 1)
        known["state"] = FAILED if code else DONE
        if code is None:
            known["state"] = STOPPED if left <= seconds else CUT
        lines = log.read_text(errors="replace").strip().splitlines()
        known["note"] = lines[-1].strip()[-160:] if lines else ""
        print(f"{part.name}: {known['state']} after {known['seconds']:.0f} s   {known['note']}", flush=True)
        self.write()


def end(process: subprocess.Popen) -> None:
    """A process that still runs is told to end, as a training then writes its checkpoint, and has GRACE for it."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            pass
    try:
        os.killpg(process.pid, signal.SIGKILL)  # and the processes that it started
    except ProcessLookupError:
        pass
    process.wait()


# ------------------------------------------------------------------------------------------------------------ the page


def ratio_of(row: dict, one: str, other: str) -> float | None:
    one, other = (milliseconds(row.get(f"{name} ms", "")) for name in (one, other))
    return one / other if one and other else None


def kernel_times(rows: list[dict], operation: str, path: str, **cells) -> dict[str, dict]:
    """shape and precision → the row of a path, forward + backward."""
    return {
        (row["shape"], row["precision"]): row
        for row in rows
        if row["operation"] == operation and row["path"] == path and row["pass"] == "forward + backward"
        if milliseconds(row["ms"]) is not None and all(row[name] == cell for name, cell in cells.items())
    }


def least(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.2f}" for name, value in values.items())


def budgets(kernels: list[dict], steps: list[dict], seconds: dict[str, tuple[int, int, float]]) -> list[tuple]:
    """What was promised, what was measured, and whether the one meets the other."""
    found = []

    def budget(promise: str, values: dict[str, float], wanted: float, above: bool = True, all_of: int = 1) -> None:
        if len(values) < all_of:
            found.append((promise, least(values) or NOT_MEASURED, NOT_MEASURED))
            return
        worst = min(values.values()) if above else max(values.values())
        met = worst >= wanted if above else worst <= wanted
        found.append((promise, least(values), "met" if met else "**not met**"))

    def of_steps(one: str, other: str) -> dict[str, float]:
        ratios = {row["model"]: ratio_of(row, one, other) for row in steps if row["batch"] == "32"}
        wanted = ("vrnn", "srnn", "dkf", "rvae")
        return {model: ratios[model] for model in wanted if ratios.get(model) is not None}

    step = "a training step, 32 × 150 × 257, of VRNN, SRNN, DKF and RVAE: times"
    budget(f"{step} the loop over frames, at least 20", of_steps("reference", "shipped"), 20, all_of=4)
    budget(f"{step} that loop as a CUDA graph, at least 3", of_steps("reference graphed", "shipped"), 3, all_of=4)

    ours, library = (kernel_times(kernels, "lstm_scan", path) for path in ("shipped", "nn.LSTM"))
    speed = {
        case: milliseconds(library[case]["ms"]) / milliseconds(ours[case]["ms"]) for case in ours if case in library
    }
    for hidden in (128, 256):
        mine = {f"{shape} {kind}": v for (shape, kind), v in speed.items() if shape.endswith(f"hidden {hidden}")}
        budget(f"`lstm_scan`, hidden {hidden}: times cuDNN's speed, at least 1 (else layers stay with cuDNN)", mine, 1)

    for operation in ("is_divergence", "gaussian_kl"):
        ours = kernel_times(kernels, operation, "shipped", precision="fp32")
        compiled = kernel_times(kernels, operation, "torch.compile", precision="fp32")
        ours, compiled = ({shape: row for (shape, _), row in rows.items()} for rows in (ours, compiled))
        largest = max(
            ours, key=lambda shape: int(torch.tensor([int(n) for n in shape.split(" x ")]).prod()), default=None
        )
        share = {largest: float(ours[largest]["% of copy"])} if largest else {}
        budget(f"`{operation}`, fp32, largest shape: % of the bandwidth of a copy, at least 85", share, 85)
        speed = {s: milliseconds(compiled[s]["ms"]) / milliseconds(ours[s]["ms"]) for s in ours if s in compiled}
        budget(f"`{operation}`, fp32: times the speed of its compiled definition, at least 1", speed, 1)

    whole = {model: spent / 60 * steps / max(1, step) for model, (step, steps, spent) in seconds.items()}
    light = {"light_dvae": whole["light_dvae"]} if "light_dvae" in whole else {}
    budget("LigHT-DVAE by `light2023`, 25,000 steps: minutes, at most 10", light, 10, above=False)
    times = {row["model"]: milliseconds(row["shipped ms"]) for row in steps if row["batch"] == "32"}
    nine = {"all": sum(times.values()) * 25_000 / 60_000} if set(STEPS["gpu"]) <= set(times) else {}
    budget("all nine DVAEs, 25,000 of the steps below each: minutes, at most 60", nine, 60, above=False)
    return found


def trained(folder: Path) -> dict[str, tuple[int, int, float]]:
    """For each training that has come to a report: its steps so far, all its steps, seconds."""
    found = {}
    for model in TRAININGS:
        log, plan = folder / model / "log.jsonl", folder / model / "config.json"
        lines = log.read_text().splitlines() if log.exists() else []
        if lines and plan.exists():
            last = json.loads(lines[-1])
            found[model] = last["step"], json.loads(plan.read_text())["recipe"]["steps"], last["seconds"]
    return found


def page(day: Day, all_parts: list[Part], dry: bool) -> str:
    folder, about = day.folder, day.state["about"]
    kernels, steps = read_rows(folder / "kernels.csv"), read_rows(folder / "steps.csv")
    seconds = trained(folder)
    lines = ["# On a GPU", ""]
    if dry:
        lines += ["**A dry run on a CPU at small sizes: the numbers say nothing.**", ""]
    on = about["device"] if dry or torch.cuda.is_available() else f"{NOT_MEASURED}: no GPU was at hand"
    lines += [f"    python bench/gpu_day.py --minutes 9 --data {about['data']}", ""]
    lines += [f"Device: {on}. Times are medians of interleaved repeats. Calls so far: {day.state['calls']}.", ""]

    lines += ["## Budgets", ""]
    rows = [(promise, measured, "dry" if dry else met) for promise, measured, met in budgets(kernels, steps, seconds)]
    lines += [markdown(("budget", "measured", ""), rows), ""]

    lines += ["## Parts", ""]
    rows = []
    for part in all_parts:
        known = day.of(part)
        note = known["note"].replace("|", "/") if part.name == "tests" or known["state"] == FAILED else ""
        rows.append((part.name, known["state"] or NOT_MEASURED, f"{known['seconds']:.0f} s", note))
    lines += [markdown(("part", "what became of it", "took", ""), rows), ""]

    lines += [
        "## Kernels",
        "",
        "Milliseconds; bold is what beats `shipped`. `reference` is the definition, of a scan the loop ",
    ]
    lines[-1] += "over frames, each path as a CUDA graph."
    lines += ["", summary(kernels) if kernels else f"{NOT_MEASURED.capitalize()}.", ""]
    both = [row for row in kernels if row["pass"] == "forward + backward" and row["path"] == "shipped"]
    if both:
        lines += ["`shipped`, forward + backward:", ""]
        columns = ("operation", "precision", "shape", "GB/s", "% of copy", "TFLOP/s")
        lines += [markdown(columns, [[row[name] for name in columns] for row in both]), ""]

    lines += ["## Training steps", "", "Milliseconds, 257 bins; `graphed` is the same as a CUDA graph.", ""]
    columns = ("model", "batch", "frames", "reference ms", "shipped ms", "reference graphed ms", "shipped graphed ms")
    columns += ("frames/s", "shipped MiB")
    lines += [markdown(columns, [[row[name] for name in columns] for row in steps]) if steps else "Not measured.", ""]

    lines += ["## By the recipe `light2023`", "", "GEN resynthesis of the test split, mean ± standard error.", ""]
    rows = []
    for model in TRAININGS:
        step, whole, spent = seconds.get(model, (0, 0, 0.0))
        cells = [NOT_MEASURED] + [""] * (len(MEASURES) - 1)
        if (file := folder / f"{model}.json").exists():
            (result,) = json.loads(file.read_text())
            cells = summary_cells(result["summary"], MEASURES, len(result["utterances"]))
        rows.append((model, f"{step:,} of {whole:,}" if whole else "0", f"{spent / 60:.1f}", *cells))
    heading = ("model", "steps", "minutes", *(title for title, _ in MEASURES.values()))
    lines += [markdown(heading, rows), ""]
    return "\n".join(lines)


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=positive, default=9, help="of this call at most (default: 9)")
    parser.add_argument("--data", default="built-in", help=f"{SOURCES_OF_SPEECH} (default: built-in)")
    parser.add_argument("--folder", type=Path, help="for all that is written (default: runs/gpu-day, or runs/dry-day)")
    parser.add_argument("--page", type=new_file, help="write the page to this file as well")
    names = [part.name for part in parts(Path(), [], False)]
    parser.add_argument("--parts", nargs="+", choices=names, metavar="PART", help=f"only these: {', '.join(names)}")
    parser.add_argument("--dry", action="store_true", help="on a CPU at small sizes, to see that every part runs")
    args = parser.parse_args()
    stop = time.monotonic() + 60 * args.minutes
    folder = (args.folder or ROOT / "runs" / ("dry-day" if args.dry else "gpu-day")).absolute()
    gpu = torch.cuda.is_available() and not args.dry
    device = describe(torch.device("cuda" if gpu else "cpu"))
    about = {"device": device, "data": args.data, "dry": args.dry}
    day, all_parts = Day(folder, about), parts(folder, ["--data", absolute(args.data)], args.dry)
    day.state["calls"] += 1

    def write_page() -> None:
        text = page(day, all_parts, args.dry)
        for path in (folder / "gpu.md", args.page):
            if path is not None:
                with atomic_write(path) as beside:
                    beside.write_text(text)

    write_page()
    for part in all_parts if gpu or args.dry else ():
        left = stop - time.monotonic() - GRACE
        chosen = args.parts is None or part.name in args.parts
        ready = not part.needs or list((folder / part.needs).glob("*.pt"))
        if chosen and ready and day.open(part) and left > 0:
            day.work(part, left)
            write_page()
    rest = [part.name for part in all_parts if day.open(part)]
    day.write()
    print(f"\n{(folder / 'gpu.md').read_text()}")
    if not gpu and not args.dry:
        print("No GPU here: nothing was measured. --dry shows on a CPU that every part runs.")
    else:
        print(f"Left for another call: {', '.join(rest)}." if rest else f"The day is done: {folder}/gpu.md")
    sys.exit(bool(args.dry and any(day.of(part)["state"] != DONE for part in all_parts)))


if __name__ == "__main__":
    run(main)
