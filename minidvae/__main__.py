"""The models that ship, on your own recordings.

    python -m minidvae models                               what ships
    python -m minidvae enhance NOISY.wav                    the speech without the noise, in NOISY-enhanced.wav
    python -m minidvae convert SOURCE.wav REFERENCE.wav     the words of SOURCE in the voice of REFERENCE

`minidvae …` after `pip install`.
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from . import cli
from .cli import Parser, check_seed, choose_device
from .data import audio
from .data.layouts import AUDIO, sounds
from .evaluation.enhancement import picture
from .files import CheckpointError
from .inference import enhance as enhancement
from .inference.convert import convert as convert_voice
from .inference.enhance import Settings
from .models.base import DVAE
from .training.checkpoint import PRETRAINED, load_run, pretrained
from .training.config import SettingError

STANDARD_OUTPUT = Path("/dev/stdout")


def models(args: argparse.Namespace) -> None:
    for name in pretrained():
        print((PRETRAINED / f"{name}.md").read_text())


def convert(args: argparse.Namespace) -> None:
    check_seed(args.seed)
    source, reference = audio.load(args.source), audio.load(args.reference)
    target = args.output or args.source.with_name(
        f"{args.source.stem}-as-{args.reference.stem}.wav"
    )
    refuse_existing(target, args.force)
    model, _, content = load_run(args.model, choose_device(args.device))
    recipe = content.get("plan", {}).get("recipe", {})
    if content["model"] != "fhvae" or recipe.get("features") != "log_magnitude":
        there = f"a {content['model']} on {recipe.get('features', 'power')}"
        raise CheckpointError(
            f"{args.model}: holds {there}; expected an fhvae on log_magnitude, which can be heard"
        )
    for path, waveform in ((args.source, source), (args.reference, reference)):
        if not np.any(waveform):
            raise audio.AudioError(f"{path}: is silent; expected speech")
    audio.write(target, convert_voice(model.eval(), source, reference, args.seed))
    print(target)


def enhance(args: argparse.Namespace) -> None:
    check_seed(args.seed)
    settings, pairs = Settings.of(args.method, args.iterations), targets_of(args.noisy, args.output)
    if not args.noisy.is_dir():
        for path in pairs[0][1], *([pairs[0][1].with_suffix(".png")] if args.plot else []):
            refuse_existing(path, args.force or path == STANDARD_OUTPUT)
    model, stft = enhancement.load_dvae(args.model, choose_device(args.device))
    unusable = 0
    for source, target in pairs:
        if args.noisy.is_dir() and target.exists() and not args.force:
            print(f"{target}: is there already, kept")
            continue
        try:
            enhance_file(source, target, model, stft, settings, args)
        except audio.AudioError as error:
            if not args.noisy.is_dir():
                raise
            print(error, file=sys.stderr)
            unusable += 1
    if unusable:
        raise audio.AudioError(f"{args.noisy}: {unusable} of {len(pairs)} files could not be used")


def enhance_file(
    source: Path, target: Path, model: DVAE, stft: audio.STFT, settings, args: argparse.Namespace
) -> None:
    """Each channel by itself. Standard input and output are `-`."""
    messages = sys.stderr if target == STANDARD_OUTPUT else sys.stdout
    with tempfile.NamedTemporaryFile() as received:
        if str(source) == "-":
            shutil.copyfileobj(sys.stdin.buffer, received)
            received.flush()
        read = received.name if str(source) == "-" else source
        noisy, rate, channels = audio.read(read, audio.SAMPLE_RATE, mix=False)
    if rate > audio.SAMPLE_RATE:
        print(f"{source}: {rate} Hz; the result has {audio.SAMPLE_RATE}", file=messages)
    noisy = torch.from_numpy(noisy.T).to(next(model.parameters()).device)
    steps = settings.iterations * channels * len(list(enhancement.blocks(noisy.shape[1])))
    with tqdm(total=steps, desc=source.name, unit="step", disable=None) as bar:
        one_each = (
            enhancement.enhance_speech(model, stft, x, settings, args.seed, bar.update)
            for x in noisy
        )
        clean, learned = zip(*one_each, strict=True)
    clean, back = torch.stack(clean, 1).cpu().numpy(), min(rate, audio.SAMPLE_RATE)
    length = len(clean) * back // audio.SAMPLE_RATE  # of the file
    target.parent.mkdir(parents=True, exist_ok=True)
    audio.write(target, audio.resample(clean, audio.SAMPLE_RATE, back)[:length], back)
    print(target, file=messages)
    if args.plot and learned[0]:
        heard = {"noisy": noisy[0].cpu().numpy(), "enhanced": clean[:, 0]}
        picture(heard, learned[0], stft, target.with_suffix(".png"))


def targets_of(noisy: Path, output: Path | None) -> list[tuple[Path, Path]]:
    """The sound files at a place, and where the result of each goes. SettingError where two would go to one place, or
    one is asked for that is no wav."""
    if not noisy.is_dir():
        beside = (
            STANDARD_OUTPUT if str(noisy) == "-" else noisy.with_name(f"{noisy.stem}-enhanced.wav")
        )
        if output is not None and output.is_dir():
            output = output / beside.name
        target = STANDARD_OUTPUT if str(output) == "-" else output or beside
        if target != STANDARD_OUTPUT and target.suffix.lower() != ".wav":
            raise SettingError(f"-o {target}: expected a name that ends in .wav")
        return [(noisy, target)]
    if not (files := sounds(noisy)):
        raise audio.AudioError(f"{noisy}: holds no sound files ({', '.join(AUDIO)})")
    folder = output or noisy.resolve().with_name(f"{noisy.resolve().name}-enhanced")
    pairs = [(path, (folder / path.relative_to(noisy)).with_suffix(".wav")) for path in files]
    if len({target for _, target in pairs}) < len(pairs):
        raise SettingError(
            f"{noisy}: holds files of one name in several formats, whose results would be one file"
        )
    return pairs


def refuse_existing(target: Path, force: bool) -> None:
    if target.exists() and not force:
        raise SettingError(
            f"{target}: is there already; choose another name with -o, or replace it with --force"
        )


def main() -> None:
    parser = Parser(
        prog="minidvae", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("models", help="the models that ship and their cards").set_defaults(
        call=models
    )

    command = commands.add_parser("enhance", help="the speech of NOISY without the noise")
    command.set_defaults(call=enhance)
    command.add_argument(
        "noisy", type=Path, metavar="NOISY", help="sound file, folder of them, or - for stdin"
    )
    add_options(
        command, "NOISY-enhanced.wav, or a folder NOISY-enhanced", enhancement.DEFAULT, "a DVAE"
    )
    method, iterations = Settings.method, f"at most so many steps (default: {Settings.iterations})"
    methods = f"latents by training the encoder, the most probable ones, or ones around them (default: {method})"
    command.add_argument("--method", choices=enhancement.E_STEPS, default=method, help=methods)
    command.add_argument("--iterations", type=int, help=iterations)
    command.add_argument(
        "--plot", action="store_true", help="also draw the spectrograms, in a png beside the result"
    )

    command = commands.add_parser("convert", help="the words of SOURCE in the voice of REFERENCE")
    command.set_defaults(call=convert)
    command.add_argument(
        "source", type=Path, metavar="SOURCE", help="sound file, any rate and number of channels"
    )
    command.add_argument(
        "reference", type=Path, metavar="REFERENCE", help="speech of the voice to take on"
    )
    kind = "an FHVAE with features=log_magnitude"
    add_options(command, "SOURCE-as-REFERENCE.wav", "fhvae-librispeech", kind)
    args = parser.parse_args()
    args.call(args)


def add_options(command: argparse.ArgumentParser, target: str, model: str, kind: str) -> None:
    command.add_argument("-o", "--output", type=Path, help=f"where to write (default: {target})")
    command.add_argument(
        "--force",
        action="store_true",
        help="replace the output where it is there (default: refuse)",
    )
    models = f"run folder of {kind}, or a model that ships (default: {model})"
    command.add_argument("--model", default=model, help=models)
    command.add_argument(
        "--seed", type=int, default=0, help="of all that is drawn at random (default: 0)"
    )
    command.add_argument(
        "--device", default="auto", help="auto, cpu, cuda, cuda:1, … (default: auto)"
    )


def console() -> None:
    sys.argv[0] = "minidvae"
    cli.run(main)


if __name__ == "__main__":
    console()
