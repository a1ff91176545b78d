"""All DVAEs at one budget of time (LigHT-DVAE paper, Tables 1 and 3): a training of each, then the
resynthesis of test speech and, with a recogniser, the distance of samples from real speech.

    python studies/benchmark.py --data LibriSpeech --minutes 12 --seeds 3
    python train.py --model deepspeech2 --data conditions:built-in --run runs/deepspeech2
    python studies/benchmark.py --data LibriSpeech --minutes 12 --recogniser runs/deepspeech2

SRNN is trained on the true past (TF, teacher forcing) and by scheduled sampling (SS), others as
the recipe says. --minutes: a step of each model is timed first, and each gets as many as fit. GEN:
an autoregressive model is fed its own past, GT: the true one. Started again, the study continues
where it was interrupted. `bash studies/all.sh light-1 light-3` has the papers' recipes instead of a
budget.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import torch
from study import call, evaluate_all, evaluation_flags, parse_arguments, train_all

from minidvae.cli import run
from minidvae.evaluation import generation, resynthesis
from minidvae.evaluation.report import render_table
from minidvae.evaluation.results import RunResult
from minidvae.evaluation.runs import Options
from minidvae.files import write_json
from minidvae.models import MODELS as MODEL_TYPES
from minidvae.training.config import SettingError

MODELS = {
    "VAE": ["--model", "vae"],
    "DKF": ["--model", "dkf"],
    "STORN": ["--model", "storn"],
    "VRNN": ["--model", "vrnn"],
    "SRNN-SS": ["--model", "srnn", "--set", "scheduled_sampling=0.5,1"],
    "SRNN-TF": ["--model", "srnn", "--set", "scheduled_sampling=0,0"],
    "RVAE": ["--model", "rvae"],
    "DSAE": ["--model", "dsae"],
    "HiT-DVAE": ["--model", "hit_dvae"],
    "LigHT-DVAE": ["--model", "light_dvae"],
    "LigHT-DVAE-local": ["--model", "light_dvae_local"],
}
SEEDED = ("VAE", "LigHT-DVAE", "LigHT-DVAE-local")  # trained with several seeds
TIMED_STEPS = 40  # the later half is timed
FLAGS = {
    "--minutes": {
        "type": float,
        "help": "of each training, in place of --steps (default: the recipe's steps)",
    },
    "--seeds": {
        "type": int,
        "default": 1,
        "help": f"trainings of {', '.join(SEEDED)} (default: 1)",
    },
    "--recogniser": {
        "type": Path,
        "metavar": "RUN",
        "help": "run folder of a deepspeech2, to measure samples (default: not measured)",
    },
    "--clips": {"type": int, "help": "as of evaluate.py"},
    "--repeats": {"type": int, "help": "as of evaluate.py"},
    "--w": {"choices": generation.W_SOURCES, "help": "as of evaluate.py"},
}


def main() -> None:
    args, common = parse_arguments(__doc__, "runs/benchmark", FLAGS)
    check_flags(args)
    variants = make_variants(args, common)
    runs = train_all(variants, args.runs, common)
    results = {"GEN": evaluate_all(runs, evaluation_flags(args))}
    autoregressive = {}
    for title, folder in runs.items():
        model = variants[title][1]
        if MODEL_TYPES[model][0].autoregressive:
            autoregressive[title] = folder
    if autoregressive:
        flags = ["--mode", "teacher_forcing", *evaluation_flags(args)]
        results["GT"] = evaluate_all(autoregressive, flags)
    rows = {}
    for mode, of_mode in results.items():
        for title, result in of_mode.items():
            rows[f"{title} {mode}"] = result
    tables = [resynthesis.table(rows)]
    if args.recogniser:
        flags = evaluation_flags(args, "recogniser", "clips", "repeats", "w")
        results["samples"] = evaluate_all(runs, ["--task", "generation", *flags])
        values = {title: result.values for title, result in results["samples"].items()}
        real = next(iter(values.values()))["real"]
        tables.append(generation.table(values | real))
    all_values = {}
    for name, of_name in results.items():
        all_values[name] = {title: result.values for title, result in of_name.items()}
    write_json(args.runs / "results.json", all_values)
    print(f"\nAll numbers: {args.runs}/results.json")
    for table in tables:
        print(f"\n{render_table(table)}")
    if args.seeds > 1:
        print_seeds(results["GEN"], args.seeds)


def check_flags(args: argparse.Namespace) -> None:
    """Raise errors in the flags before the trainings."""
    options = Options(recogniser=args.recogniser, clips=args.clips, repeats=args.repeats)
    generation.load_recogniser(options, torch.device("cpu"))
    if args.minutes is not None and not 0 < args.minutes < float("inf"):
        raise SettingError(f"--minutes {args.minutes}: expected a number greater than 0")
    if args.seeds < 1:
        raise SettingError(f"--seeds {args.seeds}: expected at least 1")


def make_variants(args: argparse.Namespace, common: list[str]) -> dict[str, list[str]]:
    """Return title → flags of every training."""
    variants = dict(MODELS)
    if args.minutes is not None:
        steps = steps_for(args.minutes, args.runs, common)
        for title, flags in MODELS.items():
            variants[title] = [*flags, "--steps", steps[title]]
    for title in SEEDED:
        for seed in range(1, args.seeds):
            variants[f"{title}-{seed}"] = [*variants[title], "--seed", str(seed)]
    return variants


def steps_for(minutes: float, folder: Path, common: list[str]) -> dict[str, str]:
    """Return the number of steps that each model makes in so many minutes on this machine, as busy
    as it is now. It is kept in `folder`. Raises SettingError where that holds the steps of another
    number of minutes."""
    file = folder / "steps.json"
    if file.exists():
        budget = json.loads(file.read_text())
        if budget["minutes"] != minutes:
            raise SettingError(
                f"--minutes {minutes:g}: the runs in {folder} have {budget['minutes']:g}"
            )
        return budget["steps"]
    steps = {}
    for title, flags in MODELS.items():
        seconds = time_steps(flags, common)
        steps[title] = str(max(1, round(60 * minutes / seconds)))
    folder.mkdir(parents=True, exist_ok=True)
    write_json(file, {"minutes": minutes, "steps": steps})
    return steps


def time_steps(flags: list[str], common: list[str]) -> float:
    """Return the seconds of a training step."""
    half = TIMED_STEPS // 2
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "run")
        timed = ["--steps", TIMED_STEPS, "--set", f"report={half}", "--run", folder]
        call("train.py", *common, *flags, *timed)
        lines = (folder / "log.jsonl").read_text().splitlines()
    first = json.loads(lines[0])
    last = json.loads(lines[1])
    return (last["seconds"] - first["seconds"]) / half


def print_seeds(results: dict[str, RunResult], seeds: int) -> None:
    for title in SEEDED:
        titles = [title, *(f"{title}-{seed}" for seed in range(1, seeds))]
        values = [results[name].values["summary"]["si_sdr"]["mean"] for name in titles]
        mean = statistics.mean(values)
        deviation = statistics.stdev(values)
        print(f"{title}: SI-SDR {mean:.2f} ± {deviation:.2f} over {seeds} seeds")


if __name__ == "__main__":
    run(main)
