"""The models that ship, on your own recordings.

    python -m minidvae models                               what ships
    python -m minidvae convert SOURCE.wav REFERENCE.wav     the words of SOURCE in the voice of REFERENCE

`minidvae …` after `pip install`.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

from . import command_line
from .command_line import Parser, check_seed, choose_device
from .data import audio
from .experiments import transformation
from .models.parameters import CheckpointError
from .training.checkpoint import PRETRAINED, load_run, pretrained
from .training.settings import SettingError


def models(args: argparse.Namespace) -> None:
    for name in pretrained():
        print((PRETRAINED / f"{name}.md").read_text())


def convert(args: argparse.Namespace) -> None:
    check_seed(args.seed)
    source, reference = audio.load(args.source), audio.load(args.reference)
    target = args.output or args.source.with_name(f"{args.source.stem}-as-{args.reference.stem}.wav")
    refuse_existing(target, args.force)
    model, _, content = load_run(args.model, choose_device(args.device))
    recipe = content.get("plan", {}).get("recipe", {})
    if content["model"] != "fhvae" or recipe.get("features") != "log_magnitude":
        there = f"a {content['model']} on {recipe.get('features', 'power')}"
        raise CheckpointError(f"{args.model}: holds {there}; expected an fhvae on log_magnitude, which can be heard")
    for path, waveform in ((args.source, source), (args.reference, reference)):
        if not np.any(waveform):
            raise audio.AudioError(f"{path}: is silent; expected speech")
    audio.write(target, transformation.convert(model.eval(), source, reference, args.seed))
    print(target)


def refuse_existing(target: Path, force: bool) -> None:
    if target.exists() and not force:
        raise SettingError(f"{target}: is there already; choose another name with -o, or replace it with --force")


def main() -> None:
    parser = Parser(prog="minidvae", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("models", help="the models that ship and their cards").set_defaults(call=models)
    command = commands.add_parser("convert", help="the words of SOURCE in the voice of REFERENCE")
    command.set_defaults(call=convert)
    command.add_argument("source", type=Path, metavar="SOURCE", help="sound file, any rate and number of channels")
    command.add_argument("reference", type=Path, metavar="REFERENCE", help="speech of the voice to take on")
    command.add_argument("-o", "--output", type=Path, help="file to write (default: SOURCE-as-REFERENCE.wav)")
    command.add_argument("--force", action="store_true", help="replace the output where it is there (default: refuse)")
    model = "run folder of an FHVAE with features=log_magnitude, or a model that ships (default: fhvae-librispeech)"
    command.add_argument("--model", default="fhvae-librispeech", help=model)
    command.add_argument("--seed", type=int, default=0, help="of the first phases (default: 0)")
    command.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, … (default: auto)")
    args = parser.parse_args()
    args.call(args)


def console() -> None:
    sys.argv[0] = "minidvae"
    command_line.run(main)


if __name__ == "__main__":
    console()
