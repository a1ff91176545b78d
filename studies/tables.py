"""The papers' tables and figures by one command: what is missing is trained, then evaluated, then put on a page.

    python studies/tables.py all --recipe smoke           to see that everything runs: the numbers mean nothing
    python studies/tables.py all --recipe quick --plan    what is left to do, and how long it takes by the times so far
    python studies/tables.py light-1 exchange --data ~/VoiceBank --recipe paper

Writes NAME.md and NAME.json to the folder --runs. Recipe `paper` is that of the paper which a table is from. Runs that
several tables need are trained once. Started again, it goes on where it was interrupted.
"""

import argparse
import json
import math
import os
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from benchmark import MODELS
from study import ROOT, call, given

from minidvae.cli import SOURCES_OF_SPEECH, Parser, check_seed, choose_device, run
from minidvae.data.corpus import CONDITIONS_OF, Corpus, load_corpus
from minidvae.evaluation import html, report
from minidvae.files import write_json, write_text
from minidvae.training.config import RECIPES, RVAE_ORIGINAL, SettingError, known
from minidvae.training.run import resolve

# Title → flags of train.py. DATA is the corpus; NOISY too, with conditions laid over it where it has none of its own.
TRAININGS = MODELS | {
    "RVAE-original": ["--model", "rvae", "--set", *(f"{name}=" for name in RVAE_ORIGINAL)],
    "FHVAE-32": ["--model", "fhvae", "--set", "alpha=10", "z1_latent=32", "z2_latent=32"],
    "FHVAE-sound": ["--model", "fhvae", "--data", "NOISY", "--set", "features=log_magnitude"],
    "DeepSpeech2": ["--model", "deepspeech2", "--data", f"{CONDITIONS_OF}built-in"],
}
for alpha in ("0", "0.1", "1", "10"):
    TRAININGS[f"FHVAE-{alpha}"] = [
        "--model",
        "fhvae",
        "--set",
        f"alpha={alpha}",
        "z1_latent=16",
        "z2_latent=16",
    ]


@dataclass(frozen=True)
class Table:
    """A line of tables.tsv, which says what these are."""

    title: str
    source: str
    recipe: str
    command: str
    experiment: str = ""
    corpora: str = ""
    heading: str = ""


LINES = Path(__file__).with_suffix(".tsv").read_text(encoding="utf-8").splitlines()
TABLES = {
    name: Table(*rest)
    for name, *rest in (line.split("\t") for line in LINES if not line.startswith("#"))
}
OURS = ("smoke", "quick", "cpu_hour")  # recipes that no paper has
SHORTER = {
    "smoke": {"limit": 4, "clips": 32, "repeats": 1, "iterations": 5}
}  # flags that a recipe brings along
# Task: its flags, else --limit. Verification needs several utterances of each speaker.
FLAGS = {
    "generation": ("clips", "repeats"),
    "enhancement": ("limit", "noise", "iterations"),
    "verification": (),
}
NUMBER = re.compile(r"([-−]?[\d,]*\.?\d+)(?: ± (\d*\.?\d+))? ?%?")


@dataclass(frozen=True)
class Step:
    name: str  # of a training, or of the table that it makes
    words: tuple[str, ...]  # script and flags
    recipe: str
    folder: Path  # of the run or runs that it trains
    size: int = 1  # utterances or clips that it evaluates

    @property
    def command(self) -> str:
        return shlex.join(["python", *self.words])


def arguments() -> argparse.Namespace:
    about = "\n".join(
        f"  {name:14}  {table.title} ({table.source})" for name, table in TABLES.items()
    )
    parser = Parser(
        description=__doc__, epilog=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "names",
        nargs="*",
        metavar="NAME",
        default=["all"],
        help="all, or some of those below (default: all)",
    )
    add("--data", default="built-in", help=f"{SOURCES_OF_SPEECH} (default: built-in)")
    add("--recipe", help=f"paper, {', '.join(OURS)} (default: paper on a GPU, else quick)")
    add(
        "--runs",
        type=Path,
        default=Path("runs/tables"),
        help="folder for runs and pages (default: runs/tables)",
    )
    add("--plan", action="store_true", help="only print what is left to do, and how long it takes")
    for flag in ("limit", "clips", "repeats", "iterations", "seed"):
        add(f"--{flag}", type=int, metavar="N", help="as of evaluate.py")
    add("--noise", type=Path, metavar="DIR", help="as of evaluate.py")
    add("--device", help="as of evaluate.py")
    args = parser.parse_args()
    names = [known("table", name, ["all", *TABLES]) for name in args.names]
    args.names = list(TABLES if "all" in names else dict.fromkeys(names))
    on_gpu = choose_device(args.device or "auto").type == "cuda"
    args.recipe = known("recipe", args.recipe or ("paper" if on_gpu else "quick"), ["paper", *OURS])
    check_seed(args.seed or 0)
    for flag, least in {"limit": 1, "clips": 2, "repeats": 1, "iterations": 1}.items():
        if getattr(args, flag) is None:
            setattr(args, flag, SHORTER.get(args.recipe, {}).get(flag))
        elif getattr(args, flag) < least:
            raise SettingError(f"--{flag} {getattr(args, flag)}: expected at least {least}")
    if args.noise and not args.noise.is_dir():
        raise SettingError(f"--noise {args.noise}: no such folder")
    return args


def steps_of(name: str, args: argparse.Namespace, corpus: Corpus) -> list[Step]:
    """The trainings that a table needs, and last the command that makes it."""
    table, common = TABLES[name], given(args, "seed", "device")
    recipe, (script, *words) = (
        table.recipe if args.recipe == "paper" else args.recipe,
        table.command.split(),
    )
    noisy = (
        args.data
        if "both" in {u.condition for u in corpus.utterances}
        else CONDITIONS_OF + args.data
    )
    meant, steps = {"DATA": args.data, "NOISY": noisy}, []
    shorter = (
        ["--set", "frames=100"] if corpus.layout == "VoiceBank" else []
    )  # LigHT-DVAE paper, section 3.1
    for title in (word for word in words if word in TRAININGS):
        flags = [*(() if "--data" in TRAININGS[title] else ("--data", "DATA")), *TRAININGS[title]]
        own = recipe if flags[flags.index("--model") + 1] in RECIPES[recipe].models else "fhvae2017"
        meant[title] = str(args.runs / "models" / f"{title}-{own}")
        flags = [
            *(meant.get(flag, flag) for flag in flags),
            "--recipe",
            own,
            "--run",
            meant[title],
            *common,
        ]
        flags += shorter if own == "light2023" else []
        steps.append(Step(title, ("train.py", *flags), own, Path(meant[title])))
    task = next((after for flag, after in pairwise(words) if flag == "--task"), None)
    own, folder = FLAGS.get(task, ("limit",)), args.runs / "studies" / f"{name}-{recipe}"
    flags = (
        []
        if task
        else [
            "--recipe",
            recipe,
            "--runs",
            str(folder),
            *(shorter if recipe == "light2023" else []),
        ]
    )
    flags = [*(meant.get(word, word) for word in words), *flags, *given(args, *own), *common]
    clips, utterances = (args.clips or 512) * (args.repeats or 3), len(corpus.split("test"))
    size = clips if task == "generation" else ("limit" in own and args.limit) or utterances
    return [*steps, Step(name, (script, *flags), recipe, folder, size)]


def trained(folder: Path) -> list[tuple[str, int, float]]:
    """(model, steps, seconds) of every training in a folder, as far as it came."""
    found = []
    for log in folder.rglob("log.jsonl"):
        if lines := log.read_text().splitlines():
            last, plan = json.loads(lines[-1]), json.loads(log.with_name("config.json").read_text())
            found.append((plan["model"], last["step"], last["seconds"]))
    return found


def seconds_left(step: Step, done: dict[str, dict]) -> float | None:
    """How long a command will take: its steps by the seconds of a step in the trainings of the same name, and what it
    evaluates in proportion to the last evaluation of that name. The recipes in OURS, which have models of one size,
    stand in for one another. Without these the mean of all commands of the same recipe; None where there is none."""
    alike = OURS if step.recipe in OURS else (step.recipe,)
    timed = max(
        (trained(step.folder.with_name(f"{step.name}-{recipe}")) for recipe in alike), key=len
    )
    before = [row for row in done.values() if row["name"] == step.name and row["recipe"] in alike][
        -1:
    ]
    lengths = [resolve(model, step.recipe, {})[0].steps for model, *_ in timed]
    if not (timed or before) or 0 in lengths:  # 0: it is said in epochs
        others = [row["seconds"] for row in done.values() if row["recipe"] == step.recipe]
        return statistics.mean(others) if others else None
    left = sum(
        seconds / steps * length for (_, steps, seconds), length in zip(timed, lengths, strict=True)
    )
    left = max(0, left - sum(seconds for *_, seconds in trained(step.folder)))
    return left + sum(row["evaluating"] * step.size / row["size"] for row in before)


def what_is_left(steps: list[Step], done: dict[str, dict]) -> str:
    times = [seconds_left(step, done) for step in steps]
    minutes, unknown = math.ceil(sum(filter(None, times)) / 60), times.count(None)
    told = f", about {minutes // 60} h {minutes % 60:02} min" * (unknown < len(steps))
    return (
        f"Left: {len(steps)} commands{told}"
        + f"; {unknown} of them were not timed with any recipe" * (unknown > 0)
    )


def execute(step: Step) -> list[dict]:
    """Run a command to its end. Returns the tables that it printed and what stands around them, as `html.blocks`."""
    if step.words[0] == "train.py":
        begun = (step.folder / "last.pt").exists()
        call(*(["train.py", "--resume", "--run", step.folder] if begun else step.words))
        return []
    with tempfile.NamedTemporaryFile() as tables:
        environment, printed = (
            os.environ | {"MINIDVAE_TABLES": tables.name, "PYTHONUNBUFFERED": "1"},
            [],
        )
        words = [sys.executable, ROOT / step.words[0], *step.words[1:]]
        with subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True) as process:
            for line in process.stdout:
                print(line, end="", flush=True)
                printed.append(line)
        if process.returncode:
            sys.exit(process.returncode)  # it has said why
        report.TABLES.update(map(json.loads, tables))
    blocks, before = html.blocks("".join(printed)), []
    while blocks and "rows" not in blocks[0]:
        before = blocks.pop(0)["text"].splitlines()[
            -1:
        ]  # its last line may be the title of the table
    return [{"text": line} for line in before] + blocks


def number(cell: str) -> float | list[float] | str | None:
    """What a cell says: a number, [mean, error], text, or nothing."""
    match = NUMBER.fullmatch(cell)
    values = (
        [float(text.replace("−", "-").replace(",", "")) for text in match.groups() if text]
        if match
        else []
    )
    return (values if len(values) > 1 else values[0]) if values else cell.strip("– ") or None


def markdown(heading: list[str], rows: list[list[str]]) -> str:
    return "\n".join(
        f"| {' | '.join(cells)} |" for cells in (heading, ["---"] * len(heading), *rows)
    )


def write_page(
    name: str, steps: list[Step], done: dict[str, dict], args: argparse.Namespace, layout: str
) -> None:
    """NAME.md: commands, tables, pictures, the paper's numbers. NAME.json: the same tables as numbers."""
    table, last = TABLES[name], steps[-1]
    folders = re.compile(
        "|".join(re.escape(f"{folder}/") for folder in (args.runs / "models", last.folder))
    )
    page = [f"# {table.title}", f"{table.source}. Corpus: {args.data}; recipe: {args.recipe}."]
    page += ["\n".join(f"    {step.command}" for step in steps)]
    tables = []
    for block in done[last.command]["blocks"]:
        if "rows" in block:
            rows = [[folders.sub("", cell) for cell in row] for row in block["rows"]]
            tables.append(
                {"columns": block["heading"], "rows": [list(map(number, row)) for row in rows]}
            )
            page += [markdown(block["heading"], rows)]
        else:
            page += [
                "\n".join(line for line in block["text"].splitlines() if not folders.search(line))
            ]
    task = Path(
        "eval", *(after for flag, after in pairwise(last.words) if flag in ("--task", "--mode"))
    )
    places = [step.folder / task for step in steps[:-1]] + [last.folder]
    files = [
        file
        for place in places
        for file in sorted(place.glob("*.png"))
        if not file.stem.endswith("-tiles")
    ]
    different = {file.read_bytes(): os.path.relpath(file, args.runs) for file in reversed(files)}
    pictures = reversed(different.values())
    page += ["\n".join(f"![{file}]({file})" for file in pictures)]
    for corpus in table.corpora.split():
        which = (
            "the corpus of this page"
            if corpus == layout
            else "another corpus: compare the order, not the values"
        )
        page += [f"## In the paper\n\n{corpus}, {which}."]
        page += [markdown(table.heading.split("|"), report.published(table.experiment, corpus))]
    write_text(args.runs / f"{name}.md", "\n\n".join(filter(None, page)) + "\n")
    about = {"title": table.title, "source": table.source, "data": args.data, "recipe": args.recipe}
    times = {step.command: done[step.command]["seconds"] for step in steps}
    write_json(args.runs / f"{name}.json", about | {"seconds": times, "tables": tables})


def main() -> None:
    args = arguments()
    corpus, file = load_corpus(args.data), args.runs / "done.json"
    asked = {"data": args.data, "seed": args.seed or 0}
    try:
        kept = json.loads(file.read_text()) if file.exists() else asked | {"done": {}}
    except ValueError:
        raise SettingError(
            f"{file}: truncated, or not written by tables.py; choose another --runs"
        ) from None
    if {flag: kept[flag] for flag in asked} != asked:
        other = f"--data {kept['data']} --seed {kept['seed']}"
        raise SettingError(f"{args.runs}: has the tables of {other}; choose another --runs")
    tables, done = {name: steps_of(name, args, corpus) for name in args.names}, kept["done"]
    left = {
        step.command: step
        for steps in tables.values()
        for step in steps
        if step.command not in done
    }
    if args.plan:
        print(*left, what_is_left(list(left.values()), done), sep="\n")
        return
    args.runs.mkdir(parents=True, exist_ok=True)
    for name, steps in tables.items():
        for step in (step for step in steps if step.command in left):
            print(
                f"\n{what_is_left(list(left.values()), done)}\n{name}: {step.command}", flush=True
            )
            start, before = (
                time.perf_counter(),
                sum(seconds for *_, seconds in trained(step.folder)),
            )
            blocks, seconds = execute(step), time.perf_counter() - start
            training = sum(seconds for *_, seconds in trained(step.folder)) - before
            times = {
                "size": step.size,
                "seconds": seconds,
                "evaluating": max(0, seconds - training),
            }
            done[step.command] = {
                "name": step.name,
                "recipe": step.recipe,
                **times,
                "blocks": blocks,
            }
            del left[step.command]
            write_json(file, kept)
        write_page(name, steps, done, args, corpus.layout)
        print(f"{args.runs / name}.md", flush=True)


if __name__ == "__main__":
    run(main)
