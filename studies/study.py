"""What the studies in this folder share: several trainings with one budget, and their evaluation."""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from minidvae.cli import Parser
from minidvae.files import write_json
from minidvae.training.config import SettingError

ROOT = Path(__file__).parents[1]
BOTH = ("device", "seed")  # flags of trainings and of evaluations


def arguments(
    description: str, folder: str, flags: dict[str, dict] | None = None
) -> tuple[argparse.Namespace, list[str]]:
    """The flags of a study: --runs, --limit, BOTH and those of `flags` (name → what argparse is told of it). And the
    flags of its trainings: BOTH and all others that the user gave, which are train.py's."""
    others = "All other flags are train.py's and hold for every training: --data, --recipe, --steps, --set, …"
    options = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = Parser(description=description, epilog=others, **options)
    parser.add_argument(
        "--runs", type=Path, default=Path(folder), help=f"folder for the runs (default: {folder})"
    )
    parser.add_argument(
        "--limit", type=int, help="evaluate on only so many utterances (default: all)"
    )
    for name in BOTH:
        parser.add_argument(f"--{name}", help="of trainings and evaluations")
    for name, settings in (flags or {}).items():
        parser.add_argument(name, **settings)
    args, others = parser.parse_known_args()
    if args.limit is not None and args.limit < 1:
        raise SettingError(f"--limit {args.limit}: expected at least 1")
    return args, [*others, *given(args, *BOTH)]


def given(args: argparse.Namespace, *names: str) -> list[str]:
    """The flags of these names that the user gave, as another script takes them."""
    pairs = [(f"--{name}", getattr(args, name)) for name in names]
    return [str(part) for pair in pairs if pair[1] is not None for part in pair]


def evaluated(args: argparse.Namespace, *names: str) -> list[str]:
    """`given`, with what every evaluation takes: --limit and BOTH."""
    return given(args, "limit", *BOTH, *names)


def train_all(variants: dict[str, list[str]], folder: Path, common: list[str]) -> dict[str, Path]:
    """Train every variant with train.py, one after the other; a run that was interrupted goes on, a finished one stays.

    variants: title → its flags, --model among them; common: the flags of all. Returns title → run folder, one in
    `folder` for each. Raises SettingError where `folder` holds another study; a training that fails ends the program.
    """
    runs = {title: folder / title for title in variants}
    asked = {title: [*common, *flags] for title, flags in variants.items()}
    plan = folder / "study.json"
    try:
        begun = json.loads(plan.read_text()) if plan.exists() else asked
    except ValueError:
        raise SettingError(
            f"{plan}: truncated, or not written by a study; choose another --runs"
        ) from None
    if begun != asked:
        raise SettingError(
            f"{folder}: holds runs with other flags (see study.json in it); choose another --runs"
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_json(plan, asked)
    for title, run in runs.items():
        print(f"\n{title}", flush=True)
        if (run / "last.pt").exists():
            call("train.py", "--resume", "--run", run)
        else:
            call("train.py", *asked[title], "--run", run)
    return runs


def evaluate_all(runs: dict[str, Path], flags: list[str]) -> dict[str, dict]:
    """Title → what evaluate.py finds for its run."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "results.json"
        call("evaluate.py", *runs.values(), *flags, "--json", file)
        return dict(zip(runs, json.loads(file.read_text()), strict=True))


def call(script: str, *flags: object) -> None:
    ended = subprocess.run([sys.executable, ROOT / script, *map(str, flags)])
    if ended.returncode:
        sys.exit(ended.returncode)  # it has said why
