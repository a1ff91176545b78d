"""How results are reported: header lines, tables, numbers with their errors, results.json in the folder of a run."""

import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from ..files import append_line, write_json
from .runs import Options, Run

TABLES = {}  # text of a table that was made → {"heading", "rows", "left"}, for the page of --report


def number(value: float | None, form: str) -> str:
    """The value in this format, or a dash where it is unknown (None or nan)."""
    return "–" if value is None or math.isnan(value) else format(value, form)


def mean_and_error(mean: float | None, error: float | None, decimals: int) -> str:
    """`mean ± error`; the mean alone where the error is unknown."""
    return f"{number(mean, f'.{decimals}f')} ± {number(error, f'.{decimals}f')}".removesuffix(
        " ± –"
    )


def summary_cells(
    summary: dict[str, dict], columns: dict[str, tuple[str, int]], rows: int = 0
) -> list[str]:
    """Mean and error of each measure of a `metrics.summary`, and how often it is defined where that is in fewer than
    `rows`; columns: measure → (heading, decimals)."""
    cells = []
    for measure, (_, decimals) in columns.items():
        mean, error, count = (summary[measure][key] for key in ("mean", "standard_error", "count"))
        cells.append(
            mean_and_error(mean, error, decimals) + (f" ({count})" if count < rows else "")
        )
    return cells


def table(heading: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """Columns as wide as their widest cell, the first `left` of them flush left and the others flush right."""
    columns, rows = [], [list(row) for row in rows]
    for place, column in enumerate(zip(heading, *rows, strict=True)):
        side, width = "<" if place < left else ">", max(map(len, column))
        columns.append([f"{cell:{side}{width}}" for cell in column])
    text = "\n".join("  ".join(line).rstrip() for line in zip(*columns, strict=True))
    TABLES[text] = {"heading": heading, "rows": rows, "left": left}
    if kept := os.environ.get(
        "MINIDVAE_TABLES"
    ):  # a file for studies/tables.py, a line for each table
        with open(kept, "ab", buffering=0) as file:
            append_line(file, json.dumps([text, TABLES[text]]))
    return text


def begin(run: Run) -> None:
    """Print what is evaluated on what, make the folder for its files, and remove those of an evaluation before."""
    print(f"{run.folder}: {run.name}, {run.trained}; {len(run.test)} utterances of {run.data}")
    run.target.mkdir(parents=True, exist_ok=True)
    for file in run.target.iterdir():
        if file.suffix in (".json", ".png", ".wav"):
            file.unlink()


def write(run: Run, options: Options, result: dict, files: str) -> dict:
    """The result with what it is of, written to results.json; `files` says what else is in the folder."""
    about = {
        "run": str(run.folder),
        "model": run.name,
        "data": run.data,
        "split": options.split,
        "seed": options.seed,
    }
    write_json(run.target / "results.json", about | result)
    print(f"results.json, {files}: {run.target}/")
    return about | result


def titles(runs: list[Run]) -> list[str]:
    """The title of each run's row in a table: its folder, and its corpus where not all have the same."""
    several = len({run.data for run in runs}) > 1
    return [f"{run.folder} on {run.data}" if several else str(run.folder) for run in runs]


def evaluate_each(
    runs: list[Run], options: Options, evaluate_run: Callable, files: str
) -> list[dict]:
    """`begin`, `evaluate_run(run, options)` and `write` for one run after the other. Returns their results."""
    results = []
    for run in runs:
        begin(run)
        results.append(write(run, options, evaluate_run(run, options), files))
    return results


def by_corpus(evaluate: Callable[..., list[dict]]) -> Callable[..., list[dict]]:
    """A decorator: `evaluate` for the runs on one corpus, then for those on the next. Results are in order of runs."""

    def evaluate_all(runs: list[Run], options: Options, *rest) -> list[dict]:
        results = {}
        for data in dict.fromkeys(run.data for run in runs):
            group = [run for run in runs if run.data == data]
            results |= zip(map(id, group), evaluate(group, options, *rest), strict=True)
        return [results[id(run)] for run in runs]

    return evaluate_all


def published_layout(runs: list[Run], options: Options) -> str | None:
    """The layout of the runs' corpus where published results on it may stand beside ours: all pairs and utterances of
    its test split, decoded from the model's own past, w not from its posterior. Else None."""
    whole = (options.split, options.mode, options.limit, options.trials) == (
        "test",
        "generation",
        None,
        None,
    )
    alike = whole and options.w != "posterior" and len({run.data for run in runs}) == 1
    return runs[0].corpus.layout if alike else None


def published(experiment: str, layout: str | None) -> list[list[str]]:
    """The rows of published.tsv for an experiment on a corpus of this layout, from the third cell on."""
    lines = Path(__file__).with_name("published.tsv").read_text(encoding="utf-8").splitlines()
    rows = [line.split("\t") for line in lines if not line.startswith("#")]
    return [cells for name, corpus, *cells in rows if (name, corpus) == (experiment, layout)]
