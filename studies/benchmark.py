"""All DVAEs at one budget of time (LigHT-DVAE paper, Tables 1 and 3): ten trainings, then what each makes of test
speech and, with a recogniser, how far samples of each are from real speech.

    python studies/benchmark.py --data LibriSpeech --recipe cpu_hour --minutes 12 --seeds 3
    python train.py --model deepspeech2 --data conditions:built-in --run runs/deepspeech2  measures samples
    python studies/benchmark.py --data LibriSpeech --recipe cpu_hour --minutes 12 --recogniser runs/deepspeech2
    python studies/tables.py light-1 light-3 --data ~/VoiceBank --recipe paper     as in the paper, without a budget

SRNN is trained on the true past (TF, teacher forcing) and by scheduled sampling (SS), others as the recipe says.
--minutes: a step of each model is timed first, and each gets as many as fit. GEN: an autoregressive model is fed its
own past, GT: the true one. Started again, the study goes on where it was interrupted.
"""

import json
import shutil
import statistics
import tempfile
from pathlib import Path

import torch
from study import arguments, call, evaluate_all, evaluated, train_all

from minidvae.cli import run
from minidvae.evaluation import generation, resynthesis
from minidvae.evaluation.runs import Options
from minidvae.files import write_json
from minidvae.models import MODELS as KINDS
from minidvae.training.config import SettingError

MODELS = {
    "VAE": ["--model", "vae"],
    "DKF": ["--model", "dkf"],
    "STORN": ["--model", "storn"],
    "VRNN": ["--model", "vrnn"],
    "SRNN-SS": ["--model", "srnn", "--set", "own_past=0.5,1"],
    "SRNN-TF": ["--model", "srnn", "--set", "own_past=0,0"],
    "RVAE": ["--model", "rvae"],
    "DSAE": ["--model", "dsae"],
    "HiT-DVAE": ["--model", "hit_dvae"],
    "LigHT-DVAE": ["--model", "light_dvae"],
}
SEEDED = ("VAE", "LigHT-DVAE")  # trained with several seeds
TIMED = 40  # steps, of which the later half is timed
COUNT = {"type": int, "help": "as of evaluate.py"}
FLAGS = {
    "--minutes": {"type": float, "help": "of each training, in place of --steps"},
    "--seeds": {
        "type": int,
        "default": 1,
        "help": f"trainings of {' and '.join(SEEDED)} (default: 1)",
    },
    "--recogniser": {
        "type": Path,
        "metavar": "RUN",
        "help": "run folder of a deepspeech2; else no samples",
    },
    "--clips": COUNT,
    "--repeats": COUNT,
    "--w": {"choices": generation.W, "help": "as of evaluate.py"},
}


def steps_for(minutes: float, folder: Path, common: list[str]) -> dict[str, str]:
    """The number of steps that each model makes in so many minutes on this machine, as it is while this is measured. It
    is kept in `folder`. SettingError where that holds the steps of another number of minutes."""
    file = folder / "steps.json"
    if file.exists():
        kept = json.loads(file.read_text())
        if kept["minutes"] != minutes:
            raise SettingError(
                f"--minutes {minutes:g}: the runs in {folder} have {kept['minutes']:g}"
            )
        return kept["steps"]
    steps = {}
    for title, flags in MODELS.items():
        with tempfile.TemporaryDirectory() as timed:
            settings = [
                "--steps",
                TIMED,
                "--set",
                f"report={TIMED // 2}",
                "--run",
                Path(timed, "run"),
            ]
            call("train.py", *common, *flags, *settings)
            first, last = (
                json.loads(line) for line in Path(timed, "run/log.jsonl").read_text().splitlines()
            )
        steps[title] = str(
            max(1, round(60 * minutes * TIMED / 2 / (last["seconds"] - first["seconds"])))
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_json(file, {"minutes": minutes, "steps": steps})
    return steps


def main() -> None:
    args, common = arguments(__doc__, "runs/benchmark", FLAGS)
    measured = Options(recogniser=args.recogniser, clips=args.clips, repeats=args.repeats)
    generation.recogniser_of(
        measured, torch.device("cpu")
    )  # errors in these flags come before the trainings
    if args.minutes is not None and not 0 < args.minutes < float("inf"):
        raise SettingError(f"--minutes {args.minutes}: expected a number greater than 0")
    if args.seeds < 1:
        raise SettingError(f"--seeds {args.seeds}: expected at least 1")
    variants = dict(MODELS)
    if args.minutes is not None:
        steps = steps_for(args.minutes, args.runs, common)
        variants = {title: [*flags, "--steps", steps[title]] for title, flags in MODELS.items()}
    for title in SEEDED:
        for seed in range(1, args.seeds):
            variants[f"{title}-{seed}"] = [*variants[title], "--seed", str(seed)]
    runs = train_all(variants, args.runs, common)
    results = {"GEN": evaluate_all(runs, evaluated(args))}
    rereading = {
        title: folder
        for title, folder in runs.items()
        if KINDS[variants[title][1]][0].autoregressive
    }
    results["GT"] = evaluate_all(rereading, ["--mode", "teacher_forcing", *evaluated(args)])
    rows = {
        f"{title} {mode}": row for mode, found in results.items() for title, row in found.items()
    }
    tables = [resynthesis.table(rows)]
    if args.recogniser:
        flags = ["--task", "generation", *evaluated(args, "recogniser", "clips", "repeats", "w")]
        results["samples"] = evaluate_all(runs, flags)
        tables.append(
            generation.table(results["samples"] | next(iter(results["samples"].values()))["real"])
        )
        shutil.copyfile(
            args.runs / "VAE/eval/generation" / generation.SHEET, args.runs / generation.SHEET
        )
    write_json(args.runs / "results.json", results)
    print(f"\nAll numbers: {args.runs}/results.json")
    print("", *tables, sep="\n\n")
    for title in SEEDED if args.seeds > 1 else ():
        values = [
            row["summary"]["si_sdr"]["mean"]
            for name, row in results["GEN"].items()
            if name.startswith(title)
        ]
        print(
            f"{title}: SI-SDR {statistics.mean(values):.2f} ± {statistics.stdev(values):.2f} over {args.seeds} seeds"
        )


if __name__ == "__main__":
    run(main)
