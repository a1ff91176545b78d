"""What the command-line scripts share: one-line errors, devices, seeds."""

import argparse
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from .data.audio import AudioError
from .data.corpus import CorpusError
from .files import CheckpointError
from .training import distributed
from .training.config import SettingError

SOURCES_OF_SPEECH = (
    "built-in, a folder of speech, or a manifest in TSV; conditions: before it lays noise over it"
)


class Parser(argparse.ArgumentParser):
    """Prints every error as one line. Abbreviations of flags are refused: they may become ambiguous
    in a later version."""

    def __init__(self, *arguments, **settings):
        super().__init__(*arguments, allow_abbrev=False, **settings)

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message} (--help shows the flags)\n")


def run(main: Callable[[], None]) -> None:
    """Call `main`. Bad input becomes one line and exit code 2. SIGTERM ends it as Ctrl-C does.
    Characters that standard output cannot encode, as in a file name that is not UTF-8, are printed
    with escapes."""
    sys.stdout.reconfigure(errors="backslashreplace")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return main()
    except (AudioError, CheckpointError, CorpusError, SettingError) as error:
        message = str(error)
    except OSError as error:
        message = f"{error.filename}: {error.strerror}" if error.filename else str(error)
    except (MemoryError, RuntimeError) as error:
        message = "out of memory; in training try a smaller batch: --set batch=8"
        if distributed.is_lost_process(error):
            message = "another process of this training has ended; continue with --resume"
        elif not isinstance(
            error, (MemoryError, torch.OutOfMemoryError)
        ) and "t allocate memory" not in str(error):
            raise
    except KeyboardInterrupt:
        sys.exit(130)
    print(
        f"{Path(sys.argv[0]).name}: error: {' '.join(message.splitlines())[:900]}", file=sys.stderr
    )
    sys.exit(2)


def choose_device(name: str) -> torch.device:
    """Return the device of a name; `auto` is the GPU if there is one. On a GPU, float32 matrix
    products use TF32. Raises SettingError where this machine does not have it."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError):
        raise SettingError(f"--device {name}: not on this machine; use auto or cpu") from None
    torch.set_float32_matmul_precision("high")
    return device


def has_bf16(device: torch.device) -> bool:
    """Return whether the device has instructions for matrix products in bfloat16."""
    if device.type == "cuda":
        return torch.version.hip is not None or torch.cuda.get_device_properties(device).major >= 8
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def check_seed(seed: int) -> None:
    """Raise SettingError where a seed is negative or has more than 32 bits."""
    if not 0 <= seed < 2**32:
        raise SettingError(f"--seed {seed}: expected 0 to {2**32 - 1}")
