"""Several trainings with one budget, and their evaluation, for the studies in this folder."""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from minidvae.cli import Parser
from minidvae.evaluation.results import RunResult
from minidvae.files import write_json
from minidvae.training.config import SettingError

ROOT = Path(__file__).parents[1]
SHARED_FLAGS = ("device", "seed")  # flags that trainings and evaluations have


def parse_arguments(
    description: str, folder: str, flags: dict[str, dict] | None = None
) -> tuple[argparse.Namespace, list[str]]:
    """Parse the flags of a study: --runs, --limit, SHARED_FLAGS and those of `flags` (name →
    keyword arguments of add_argument). All others are those of its trainings.

    Returns:
        the study's flags, and the flags of its trainings: SHARED_FLAGS and all others.
    """
    parser = Parser(
        description=description,
        epilog="All other flags are train.py's and hold for every training: --data, --recipe, "
        "--steps, --set, …",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--runs", type=Path, default=Path(folder), help=f"folder for the runs (default: {folder})"
    )
    parser.add_argument(
        "--limit", type=int, help="evaluate on only so many utterances (default: all)"
    )
    parser.add_argument("--device", help="of trainings and evaluations (default: auto)")
    parser.add_argument("--seed", help="of trainings and evaluations (default: 0)")
    for name, options in (flags or {}).items():
        parser.add_argument(name, **options)
    args, training_flags = parser.parse_known_args()
    if args.limit is not None and args.limit < 1:
        raise SettingError(f"--limit {args.limit}: expected at least 1")
    return args, [*training_flags, *given_flags(args, *SHARED_FLAGS)]


def given_flags(args: argparse.Namespace, *names: str) -> list[str]:
    """Return the flags of these names that the user gave, as another script takes them."""
    flags = []
    for name in names:
        value = getattr(args, name)
        if value is not None:
            flags += [f"--{name}", str(value)]
    return flags


def evaluation_flags(args: argparse.Namespace, *names: str) -> list[str]:
    """Return `given_flags`, with those that every evaluation takes."""
    return given_flags(args, "limit", *SHARED_FLAGS, *names)


def train_all(variants: dict[str, list[str]], folder: Path, common: list[str]) -> dict[str, Path]:
    """Train every variant with train.py, one after the other. A run that was interrupted continues,
    a finished one stays.

    Args:
        variants: title → its flags, --model among them.
        folder: of the runs.
        common: flags of all variants.

    Returns:
        title → run folder.

    Raises:
        SettingError: `folder` holds another study. A training that fails ends the program.
    """
    runs = {title: folder / title for title in variants}
    flags = {title: [*common, *variant] for title, variant in variants.items()}
    plan = folder / "study.json"
    if plan.exists():
        try:
            former = json.loads(plan.read_text())
        except ValueError:
            raise SettingError(
                f"{plan}: truncated, or not written by a study; choose another --runs"
            ) from None
        if former != flags:
            raise SettingError(
                f"{folder}: holds runs with other flags (see study.json in it); choose another "
                "--runs"
            )
    folder.mkdir(parents=True, exist_ok=True)
    write_json(plan, flags)
    for title, run in runs.items():
        print(f"\n{title}", flush=True)
        if (run / "last.pt").exists():
            call("train.py", "--resume", "--run", run)
        else:
            call("train.py", *flags[title], "--run", run)
    return runs


def evaluate_all(runs: dict[str, Path], flags: list[str]) -> dict[str, RunResult]:
    """Evaluate all runs with evaluate.py. Return title → result."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "results.json"
        call("evaluate.py", *runs.values(), *flags, "--json", file)
        results = json.loads(file.read_text())
    by_title = {}
    for title, values in zip(runs, results, strict=True):
        by_title[title] = RunResult(values["run"], values["model"], values["data"], values)
    return by_title


def call(script: str, *flags: object) -> None:
    """Run a script of this project; where it fails, exit with its code. It has said why."""
    command = [sys.executable, ROOT / script, *(str(flag) for flag in flags)]
    code = subprocess.run(command).returncode
    if code:
        sys.exit(code)
