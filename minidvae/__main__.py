"""The models that ship, on your own recordings.

    python -m minidvae models                               what ships
    python -m minidvae enhance NOISY.wav                    the speech without the noise, in NOISY-enhanced.wav
    python -m minidvae convert SOURCE.wav REFERENCE.wav     the words of SOURCE in the voice of REFERENCE

`minidvae …` after `pip install`.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from . import command_line, enhancement
from .command_line import Parser, check_seed, choose_device
from .data import audio
from .data.layouts import AUDIO
from .experiments import figures, transformation
from .models.base import DVAE
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


def enhance(args: argparse.Namespace) -> None:
    check_seed(args.seed)
    if args.iterations is not None and args.iterations < 1:
        raise SettingError(f"--iterations {args.iterations}: expected at least 1")
    settings, pairs = enhancement.Settings.of(args.method, args.iterations), targets_of(args.noisy, args.output)
    for _, target in pairs:
        refuse_existing(target, args.force)
    model, stft, content = load_run(args.model, choose_device(args.device))
    if not isinstance(model, DVAE):
        raise CheckpointError(f"{args.model}: holds a {content['model']}; expected a DVAE, which knows clean speech")
    model = model.eval()
    for source, target in pairs:
        noisy, rate, channels = audio.read(source, audio.SAMPLE_RATE, mix=False)
        if rate > audio.SAMPLE_RATE:
            print(f"{source}: {rate} Hz; the result has {audio.SAMPLE_RATE}")
        noisy = torch.from_numpy(noisy.T).to(next(model.parameters()).device)
        steps = settings.iterations * channels * len(list(enhancement.blocks(noisy.shape[1])))
        with tqdm(total=steps, desc=source.name, unit="step", disable=None) as bar:
            one_each = (enhancement.enhance_speech(model, stft, x, settings, args.seed, bar.update) for x in noisy)
            clean, learned = zip(*one_each, strict=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        back = min(rate, audio.SAMPLE_RATE)
        audio.write(target, audio.resample(torch.stack(clean, 1).cpu().numpy(), audio.SAMPLE_RATE, back), back)
        if args.plot and learned[0]:
            noise = torch.cat([observation.noise for observation, _ in learned[0]]).cpu().numpy()
            spectra = [stft.analyse(x[0] / noisy[0].abs().max()).abs().square().cpu().numpy() for x in (noisy, clean)]
            panels = zip(("noisy", "enhanced", "noise as learned, block by block"), (*spectra, noise), strict=True)
            figures.spectrograms(list(panels), stft, target.with_suffix(".png"))
        print(target)


def targets_of(noisy: Path, output: Path | None) -> list[tuple[Path, Path]]:
    """The sound files at a place, and where the result of each goes."""
    if not noisy.is_dir():
        return [(noisy, output or noisy.with_name(f"{noisy.stem}-enhanced.wav"))]
    files = sorted(path for path in noisy.rglob("*") if path.suffix.lower() in AUDIO and path.is_file())
    if not files:
        raise audio.AudioError(f"{noisy}: holds no sound files ({', '.join(AUDIO)})")
    folder = output or noisy.with_name(f"{noisy.name}-enhanced")
    return [(path, (folder / path.relative_to(noisy)).with_suffix(".wav")) for path in files]


def refuse_existing(target: Path, force: bool) -> None:
    if target.exists() and not force:
        raise SettingError(f"{target}: is there already; choose another name with -o, or replace it with --force")


def main() -> None:
    parser = Parser(prog="minidvae", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("models", help="the models that ship and their cards").set_defaults(call=models)

    command = commands.add_parser("enhance", help="the speech of NOISY without the noise")
    command.set_defaults(call=enhance)
    command.add_argument("noisy", type=Path, metavar="NOISY", help="sound file, or a folder of them")
    add_options(command, "NOISY-enhanced.wav, or a folder NOISY-enhanced", enhancement.DEFAULT, "a DVAE")
    methods = "how latents are found: by training the encoder, as the most probable ones, or as samples (default: ldem)"
    command.add_argument("--method", choices=enhancement.E_STEPS, default="ldem", help=methods)
    iterations = f"at most so many steps (default: {enhancement.Settings().iterations})"
    command.add_argument("--iterations", type=int, help=iterations)
    command.add_argument("--plot", action="store_true", help="also draw the spectrograms, in a png beside the result")

    command = commands.add_parser("convert", help="the words of SOURCE in the voice of REFERENCE")
    command.set_defaults(call=convert)
    command.add_argument("source", type=Path, metavar="SOURCE", help="sound file, any rate and number of channels")
    command.add_argument("reference", type=Path, metavar="REFERENCE", help="speech of the voice to take on")
    kind = "an FHVAE with features=log_magnitude"
    add_options(command, "SOURCE-as-REFERENCE.wav", "fhvae-librispeech", kind)
    args = parser.parse_args()
    args.call(args)


def add_options(command: argparse.ArgumentParser, target: str, model: str, kind: str) -> None:
    command.add_argument("-o", "--output", type=Path, help=f"where to write (default: {target})")
    command.add_argument("--force", action="store_true", help="replace the output where it is there (default: refuse)")
    command.add_argument(
        "--model", default=model, help=f"run folder of {kind}, or a model that ships (default: {model})"
    )
    command.add_argument("--seed", type=int, default=0, help="of all that is drawn at random (default: 0)")
    command.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, … (default: auto)")


def console() -> None:
    sys.argv[0] = "minidvae"
    command_line.run(main)


if __name__ == "__main__":
    console()
