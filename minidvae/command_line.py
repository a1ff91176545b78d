"""What train.py and evaluate.py share at the door: one-line errors, devices, precision, run folders."""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from .audio import AudioError
from .checkpoint import CheckpointError
from .corpus import CorpusError
from .recipes import SettingError

RUNS = Path("runs")


class Parser(argparse.ArgumentParser):
    """Prints every error as one line."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message} (--help shows the flags)\n")


def run(main: Callable[[], None]) -> None:
    """Call `main`; bad input becomes one line and exit code 2."""
    try:
        main()
    except (AudioError, CheckpointError, CorpusError, SettingError) as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        print(f"{Path(sys.argv[0]).name}: error: {error.filename or 'output'}: {error.strerror}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def choose_device(name: str) -> torch.device:
    """`auto`: the GPU if there is one. On a GPU, float32 matrix products use TF32."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError):
        raise SettingError(f"--device {name}: not on this machine; use auto or cpu") from None
    torch.set_float32_matmul_precision("high")
    return device


def overrides(pairs: list[str]) -> dict[str, str]:
    """["key=value", …] as a dict."""
    for pair in pairs:
        if "=" not in pair:
            raise SettingError(f"--set {pair}: expected key=value")
    return dict(pair.split("=", 1) for pair in pairs)


def newest_run() -> Path:
    found = sorted(RUNS.glob("*/last.pt"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise CheckpointError(f"{RUNS}/: holds no run yet; train one first: python train.py --model light_dvae")
    return found[-1].parent


def write(path: Path, text: str) -> None:
    """The file appears under its name only when whole."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(text)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
