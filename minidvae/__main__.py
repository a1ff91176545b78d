"""The models that ship, on your own recordings.

    python -m minidvae models                             print the cards of the models
    python -m minidvae enhance NOISY.wav                  speech enhancement → NOISY-enhanced.wav
    python -m minidvae convert SOURCE.wav REFERENCE.wav   voice conversion to the voice of REFERENCE

`minidvae …` after `pip install`.
"""

import argparse
import io
import sys
import tempfile
from pathlib import Path

import numpy as np
import soundfile
from tqdm import tqdm

from . import cli
from .data import audio
from .data.layouts import AUDIO, sounds
from .evaluation.enhancement import draw_enhancement
from .files import atomic_write
from .inference import convert, enhance
from .inference.enhance import EnhancedRecording, EnhancementSettings
from .models.base import DVAE
from .training.checkpoint import PRETRAINED, pretrained
from .training.config import SettingError

STANDARD_STREAM = Path("-")


def models_command(args: argparse.Namespace) -> None:
    for name in pretrained():
        print((PRETRAINED / f"{name}.md").read_text(encoding="utf-8"))


def convert_command(args: argparse.Namespace) -> None:
    cli.check_seed(args.seed)
    source = audio.load(args.source)
    reference = audio.load(args.reference)
    for path, waveform in ((args.source, source), (args.reference, reference)):
        if not np.any(waveform):
            raise audio.AudioError(f"{path}: is silent; expected speech")
    name = f"{args.source.stem}-as-{args.reference.stem}.wav"
    target = args.output or args.source.with_name(name)
    refuse_existing(target, args.force)
    model = convert.load_fhvae(args.model, cli.choose_device(args.device))
    audio.write(target, convert.convert_speech(model, source, reference, args.seed))
    print(target)


def enhance_command(args: argparse.Namespace) -> None:
    cli.check_seed(args.seed)
    if args.iterations is not None and args.iterations < 1:
        raise SettingError(f"--iterations {args.iterations}: expected at least 1")
    settings = EnhancementSettings.for_method(args.method, args.iterations)
    if args.noisy.is_dir():
        pairs = targets_of_folder(args.noisy, args.output)
    else:
        target = target_of_file(args.noisy, args.output)
        pairs = [(args.noisy, target)]
        if target != STANDARD_STREAM:
            refuse_existing(target, args.force)
            if args.plot:
                refuse_existing(target.with_suffix(".png"), args.force)
    model, stft = enhance.load_dvae(args.model, cli.choose_device(args.device))
    unusable = 0
    for source, target in pairs:
        if args.noisy.is_dir() and target.exists() and not args.force:
            print(f"{target}: exists already and is kept")
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
    source: Path,
    target: Path,
    model: DVAE,
    stft: audio.STFT,
    settings: EnhancementSettings,
    args: argparse.Namespace,
) -> None:
    """Enhance one file. Standard input and output are `-`; messages then go to standard error."""
    messages = sys.stderr if target == STANDARD_STREAM else sys.stdout
    with tempfile.TemporaryDirectory() as folder:
        file = source
        if source == STANDARD_STREAM:
            file = Path(folder, "standard-input")
            file.write_bytes(sys.stdin.buffer.read())
        noisy, rate, channels = audio.read(file, audio.SAMPLE_RATE, mix=False)
    if rate > audio.SAMPLE_RATE:
        print(f"{source}: {rate} Hz; the result has {audio.SAMPLE_RATE}", file=messages)
    num_blocks = len(list(enhance.blocks(len(noisy))))
    steps = settings.iterations * channels * num_blocks
    with tqdm(total=steps, desc=source.name, unit="step", disable=None) as bar:
        enhanced = enhance.enhance_recording(
            model, stft, noisy, rate, settings, args.seed, bar.update
        )
    if target == STANDARD_STREAM:
        write_to_standard_output(enhanced)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        audio.write(target, enhanced.waveform, enhanced.rate)
    print(target, file=messages)
    if args.plot and target != STANDARD_STREAM and enhanced.noise_of_channels[0]:
        plot(target.with_suffix(".png"), noisy[:, 0], enhanced, stft)


def write_to_standard_output(enhanced: EnhancedRecording) -> None:
    peak = max(1.0, np.abs(enhanced.waveform).max(initial=0.0))
    content = io.BytesIO()
    soundfile.write(
        content, enhanced.waveform / peak, enhanced.rate, format="WAV", subtype="PCM_16"
    )
    sys.stdout.flush()
    sys.stdout.buffer.write(content.getvalue())
    sys.stdout.buffer.flush()


def plot(path: Path, noisy: np.ndarray, enhanced: EnhancedRecording, stft: audio.STFT) -> None:
    """Draw the spectrograms of the first channel, at 16 kHz, and of the noise that was learned."""
    waveform = audio.resample(enhanced.waveform[:, 0], enhanced.rate, audio.SAMPLE_RATE)
    waveforms = {"noisy": noisy, "enhanced": waveform.astype(np.float32)}
    png = draw_enhancement(waveforms, enhanced.noise_of_channels[0], stft)
    with atomic_write(path) as temporary:
        temporary.write_bytes(png)


def target_of_file(noisy: Path, output: Path | None) -> Path:
    """Return where the result of a file goes. Raises SettingError where that is no wav file."""
    if output == STANDARD_STREAM or (output is None and noisy == STANDARD_STREAM):
        return STANDARD_STREAM
    target = noisy.with_name(f"{noisy.stem}-enhanced.wav")
    if output is not None:
        target = output / target.name if output.is_dir() else output
    if target.suffix.lower() != ".wav":
        raise SettingError(f"-o {target}: expected a name that ends in .wav")
    return target


def targets_of_folder(noisy: Path, output: Path | None) -> list[tuple[Path, Path]]:
    """Return the sound files of a folder, and where the result of each goes. Raises SettingError
    where two would go to one place."""
    files = sounds(noisy)
    if not files:
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
            f"{target}: exists already; choose another name with -o, or replace it with --force"
        )


def main() -> None:
    parser = cli.Parser(
        prog="minidvae",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    models = commands.add_parser("models", help="the models that ship and their cards")
    models.set_defaults(call=models_command)
    add_enhance_command(commands)
    add_convert_command(commands)
    args = parser.parse_args()
    args.call(args)


def add_enhance_command(commands) -> None:
    command = commands.add_parser("enhance", help="the speech of NOISY without the noise")
    command.set_defaults(call=enhance_command)
    command.add_argument(
        "noisy",
        type=Path,
        metavar="NOISY",
        help="sound file, folder of them, or - for standard input",
    )
    add_common_arguments(
        command, "NOISY-enhanced.wav, or a folder NOISY-enhanced", enhance.DEFAULT_MODEL, "a DVAE"
    )
    command.add_argument(
        "--method",
        choices=enhance.METHODS,
        default=EnhancementSettings.method,
        help="find latents by training the encoder, the most probable ones, or samples around them "
        f"(default: {EnhancementSettings.method})",
    )
    command.add_argument(
        "--iterations",
        type=int,
        help=f"at most so many steps (default: {EnhancementSettings.iterations})",
    )
    command.add_argument(
        "--plot",
        action="store_true",
        help="also draw the spectrograms, in a png beside the result (default: off)",
    )


def add_convert_command(commands) -> None:
    command = commands.add_parser("convert", help="the words of SOURCE in the voice of REFERENCE")
    command.set_defaults(call=convert_command)
    command.add_argument(
        "source", type=Path, metavar="SOURCE", help="sound file, any rate and number of channels"
    )
    command.add_argument(
        "reference", type=Path, metavar="REFERENCE", help="speech of the voice to take on"
    )
    add_common_arguments(
        command,
        "SOURCE-as-REFERENCE.wav",
        convert.DEFAULT_MODEL,
        "an FHVAE with features=log_magnitude",
    )


def add_common_arguments(
    command: argparse.ArgumentParser, target: str, model: str, kind: str
) -> None:
    command.add_argument("-o", "--output", type=Path, help=f"where to write (default: {target})")
    command.add_argument(
        "--force", action="store_true", help="replace an existing output (default: refuse)"
    )
    command.add_argument(
        "--model",
        default=model,
        help=f"run folder of {kind}, or a model that ships (default: {model})",
    )
    command.add_argument(
        "--seed", type=int, default=0, help="of everything that is drawn at random (default: 0)"
    )
    command.add_argument(
        "--device", default="auto", help="auto, cpu, cuda, cuda:1, … (default: auto)"
    )


def console() -> None:
    sys.argv[0] = "minidvae"
    cli.run(main)


if __name__ == "__main__":
    console()
