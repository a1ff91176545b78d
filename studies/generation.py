"""Generation (LigHT-DVAE paper, Table 3): seven trainings with one budget, then the distance of each to real speech.

    python train.py --model deepspeech2 --run runs/deepspeech2                         the features it is measured on
    python studies/generation.py --recogniser runs/deepspeech2 --recipe quick            built-in corpus
    python studies/generation.py --recogniser RUN --recipe light2023 --data ~/VoiceBank --set frames=100

SRNN is trained on the true past (TF, teacher forcing) and by scheduled sampling (SS); HiT-DVAE and LigHT-DVAE as their
recipe says, in light2023 on the true past. A contact sheet shows clips of all models under test clips. Started again,
the study goes on where it was interrupted.
"""

import shutil
from pathlib import Path

import torch
from study import arguments, evaluate_all, evaluated, train_all

from minidvae.command_line import run
from minidvae.experiments import generation, report
from minidvae.experiments.runs import Options
from minidvae.files import write_json

MODELS = {  # as in the paper's table
    "VAE": ["--model", "vae"],
    "DKF": ["--model", "dkf"],
    "RVAE": ["--model", "rvae"],
    "SRNN-SS": ["--model", "srnn", "--set", "own_past=0.1,1"],
    "SRNN-TF": ["--model", "srnn", "--set", "own_past=0,0"],
    "HiT-DVAE": ["--model", "hit_dvae"],
    "LigHT-DVAE": ["--model", "light_dvae"],
}
COUNT = {"type": int, "help": "as of evaluate.py"}
FLAGS = {
    "--recogniser": {"type": Path, "required": True, "metavar": "RUN", "help": "run folder of a deepspeech2"},
    "--clips": COUNT,
    "--repeats": COUNT,
    "--w": {"choices": generation.W, "help": "as of evaluate.py"},
}


def main() -> None:
    args, common = arguments(__doc__, "runs/generation", FLAGS)
    measured = Options(recogniser=args.recogniser, clips=args.clips, repeats=args.repeats)
    generation.recogniser_of(measured, torch.device("cpu"))  # errors in these flags come before the trainings
    runs = train_all(MODELS, args.runs, common)
    flags = ["--task", "generation", *evaluated(args, "recogniser", "clips", "repeats", "w")]
    results = evaluate_all(runs, flags)
    write_json(args.runs / "results.json", results)
    sheet = args.runs / generation.SHEET
    shutil.copyfile(next(iter(runs.values())) / "eval" / "generation" / generation.SHEET, sheet)
    print(f"\nAll numbers: {args.runs}/results.json, clips of all models: {sheet}\n")
    first = next(iter(results.values()))
    print(generation.table(results | first["real"]))
    print("\nThe paper's, on VoiceBank, 10,240 clips, features of another network (compare the order, not the values):")
    paper = [[title, distance] for _, title, distance in report.published("generation", "VoiceBank")]
    print(report.table(["", "FDSD"], paper))


if __name__ == "__main__":
    run(main)
