"""Rendering of an `Evaluation` as text, as files in the folder of each run, as JSON, and as an HTML
page; and functions that format the cells of tables.
"""

import base64
import io
import math
import os
import re
import shutil
import textwrap
import zlib
from collections.abc import Iterable, Sequence
from itertools import zip_longest
from pathlib import Path

import numpy as np
import soundfile
import torch

from ..data import audio
from ..data.audio import SAMPLE_RATE, STFT
from ..data.layouts import LICENCES
from ..files import write_json, write_text
from ..training.config import SettingError
from .results import Evaluation, Figure, RunResult, Sound, Table, Traversal
from .runs import Options, Run

MAX_PAGE_LENGTH = 14_500_000  # characters
MAX_PICTURE_WIDTH = 1_200  # pixels

# --------------------------------------------------------------------------------- cells of tables


def number(value: float | None, format_spec: str) -> str:
    """Format a value; a dash where it is unknown (None or nan)."""
    if value is None or math.isnan(value):
        return "–"
    return format(value, format_spec)


def mean_and_error(mean: float | None, error: float | None, decimals: int) -> str:
    """Return `mean ± error`; the mean alone where the error is unknown."""
    text = number(mean, f".{decimals}f")
    if error is None or math.isnan(error):
        return text
    return f"{text} ± {number(error, f'.{decimals}f')}"


def summary_cells(
    summary: dict[str, dict], columns: dict[str, tuple[str, int]], rows: int = 0
) -> list[str]:
    """Return mean and error of each measure of a `metrics.summary`.

    Args:
        columns: measure → (heading, decimals).
        rows: number of utterances. A measure that is defined for fewer shows for how many.
    """
    cells = []
    for measure, (_, decimals) in columns.items():
        statistics = summary[measure]
        cell = mean_and_error(statistics["mean"], statistics["standard_error"], decimals)
        if statistics["count"] < rows:
            cell += f" ({statistics['count']})"
        cells.append(cell)
    return cells


def titles(runs: list[Run]) -> list[str]:
    """Return the title of each run's row: its folder, and its corpus where not all have the
    same."""
    if len({run.data for run in runs}) == 1:
        return [str(run.folder) for run in runs]
    return [f"{run.folder} on {run.data}" for run in runs]


def published_layout(runs: list[Run], options: Options) -> str | None:
    """Return the layout of the runs' corpus if published results on it may stand beside ours: all
    pairs and utterances of its test split, decoded from the model's own past, w not from its
    posterior. Else None."""
    asked = (options.split, options.mode, options.limit, options.trials)
    is_comparable = asked == ("test", "generation", None, None) and options.w != "posterior"
    if is_comparable and len({run.data for run in runs}) == 1:
        return runs[0].corpus.layout
    return None


def published(experiment: str, layout: str | None) -> list[list[str]]:
    """Return the rows of published.tsv for an experiment on a corpus of this layout, from the
    third cell on."""
    rows = []
    text = Path(__file__).with_name("published.tsv").read_text(encoding="utf-8")
    for line in text.splitlines():
        if not line.startswith("#"):
            name, corpus, *cells = line.split("\t")
            if (name, corpus) == (experiment, layout):
                rows.append(cells)
    return rows


# -------------------------------------------------------------------------------------------- text


def render_table(table: Table) -> str:
    """Return a table as text: columns as wide as their widest cell."""
    columns = []
    for index, column in enumerate(zip(table.heading, *table.rows, strict=True)):
        alignment = "<" if index < table.left_columns else ">"
        width = max(len(cell) for cell in column)
        columns.append([f"{cell:{alignment}{width}}" for cell in column])
    lines = ["  ".join(cells).rstrip() for cells in zip(*columns, strict=True)]
    return "\n".join(lines)


def render_text(evaluation: Evaluation) -> str:
    """Return the tables and paragraphs of an evaluation as text."""
    blocks = []
    for block in evaluation.body:
        if isinstance(block, Table):
            blocks.append(render_table(block))
        else:
            blocks.append(textwrap.fill(block, 110, break_long_words=False))
    return "\n\n".join(blocks)


# ------------------------------------------------------------------------------------------- files


def to_json(evaluation: Evaluation) -> list[dict]:
    """Return the values of each run, with its folder, model, corpus, split and seed."""
    return [run_to_json(evaluation, result) for result in evaluation.results]


def run_to_json(evaluation: Evaluation, result: RunResult) -> dict:
    source = {
        "run": result.run,
        "model": result.model,
        "data": result.data,
        "split": evaluation.settings["split"],
        "seed": evaluation.settings["seed"],
    }
    return source | result.values


def folder_name(evaluation: Evaluation, result: RunResult) -> str:
    """Return a name for the folder of a result that differs between corpora and settings: the
    corpus and the split, then the settings that are not the default."""
    defaults = vars(Options())
    parts = [short_name(result.data), evaluation.settings["split"]]
    for name, value in evaluation.settings.items():
        if name == "split" or value == defaults[name]:
            continue
        if isinstance(value, list | tuple):
            value = ",".join(f"{item:g}" for item in value)
        parts.append(f"{name}={short_name(str(value))}")
    return "-".join(parts)


def short_name(path: str) -> str:
    """Return a name that a folder can have. Paths differ by the end of the name, even if their last
    components are the same."""
    name = Path(path).name
    allowed = re.sub(r"[^\w,.+-]", "_", name)
    if allowed == path:
        return path
    return f"{allowed}-{zlib.crc32(path.encode()):08x}"


def write_results(evaluation: Evaluation, result: RunResult, folder: Path) -> None:
    """Write results.json, the sounds and the figures of a run to a folder, which is replaced as a
    whole."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = folder.with_name(f".{folder.name}.{os.getpid()}")
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    try:
        write_json(new / "results.json", run_to_json(evaluation, result))
        for sound in result.sounds:
            name = file_name(sound.group, sound.label)
            audio.write(new / f"{name}.wav", sound.waveform, sound.sample_rate)
        for figure in result.figures:
            name = file_name(figure.group, "" if figure.group else figure.label)
            (new / f"{name}.png").write_bytes(figure.png)
        for traversal in result.traversals:
            (new / f"{file_name(traversal.label, 'tiles')}.png").write_bytes(traversal.png)
        for name, text in result.texts.items():
            write_text(new / name, text)
        if folder.exists():
            os.replace(folder, old)
        os.replace(new, folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def file_name(group: str, label: str) -> str:
    """Return `group-label` as the name of a file."""
    name = "-".join(part for part in (group, label) if part)
    return re.sub(r'[\s/\\:*?"<>|,]+', "-", name)


# -------------------------------------------------------------------------------------------- HTML


def load_template():
    """Return the template of the page. Raises SettingError where a package that a page needs is not
    installed."""
    try:
        import jinja2
        import PIL  # noqa: F401
    except ImportError as error:
        raise SettingError(
            f"an HTML page needs {error.name}; try pip install jinja2 pillow"
        ) from None
    if "MP3" not in soundfile.available_formats():
        raise SettingError(
            "an HTML page needs a libsndfile that writes MP3; try pip install -U soundfile"
        )
    source = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(source)


def write_html(
    path: Path, command: str, evaluations: Sequence[tuple[Evaluation, str, list[Run]]]
) -> None:
    """Write one HTML file with everything in it, which loads nothing else.

    Groups of sounds that would make the page longer than MAX_PAGE_LENGTH are left out and counted;
    the first group of every task comes before the second of any. What is the same in several runs
    is shown once.

    Args:
        path: of the page.
        command: that made the page.
        evaluations: each with the command that repeats it and its runs.
    """
    template = load_template()
    sections = []
    groups_of_sections = []
    for evaluation, task_command, runs in evaluations:
        section, groups = page_section(evaluation, task_command, runs)
        sections.append(section)
        groups_of_sections.append(groups)
    all_runs = {}
    for _, _, runs in evaluations:
        all_runs.update({run.folder: run for run in runs})
    content = {
        "command": command,
        "models": [model_row(run) for run in all_runs.values()],
        "curves": training_curves(all_runs),
        "sections": sections,
        "omitted": 0,
    }
    length = len(template.render(content))
    for groups in zip_longest(*groups_of_sections):
        for section, group in zip(sections, groups, strict=True):
            if group is None:
                continue
            encoded = encode_group(group)
            length += len(str(encoded))
            if length < MAX_PAGE_LENGTH:
                section["groups"].append(encoded)
            else:
                content["omitted"] += 1
    page = template.render(content)
    write_text(path, page.encode("utf-8", "backslashreplace").decode())


def model_row(run: Run) -> list[str]:
    """Return the row of a run in the page's table of models."""
    parameters = sum(p.numel() for p in run.model.parameters())
    data = "–"
    if "plan" in run.content:
        data = run.content["plan"].get("data", "see its model card")
    return [str(run.folder), run.name, f"{parameters:,}", data, run.trained]


def training_curves(runs: dict[Path, Run]) -> list[dict]:
    curves = []
    for folder in runs:
        file = folder / "curves.png"
        if file.is_file():
            curves.append(encode_picture(file.read_bytes(), caption=f"loss of {folder}"))
    return curves


def page_section(evaluation: Evaluation, command: str, runs: list[Run]) -> tuple[dict, list[dict]]:
    """Return what the page shows of an evaluation, and its groups of sounds, not yet encoded."""
    groups = {}
    pictures = {}  # content → caption
    traversals = []
    for result in evaluation.results:
        run_label = f", {Path(result.run).name}" if len(evaluation.results) > 1 else ""
        add_sounds(groups, result.sounds, run_label)
        for figure in result.figures:
            add_figure(groups, pictures, figure, run_label)
        for traversal in result.traversals:
            traversals.append(encode_traversal(traversal, run_label))
    section = {
        "task": evaluation.task,
        "about": evaluation.description,
        "command": command,
        "licences": licences(runs),
        "blocks": [page_block(block) for block in evaluation.body],
        "pictures": [encode_picture(png, caption=text) for png, text in pictures.items()],
        "traversals": traversals,
        "groups": [],
    }
    return section, list(groups.values())


def page_block(block: str | Table) -> dict:
    if isinstance(block, Table):
        return {"heading": block.heading, "rows": block.rows, "left": block.left_columns}
    return {"text": block}


def add_sounds(groups: dict[str, dict], sounds: Iterable[Sound], run_label: str) -> None:
    """Add the sounds of a run to their groups, the same sound of several runs once."""
    for sound in sounds:
        new_group = {"name": sound.group, "clips": {}, "pictures": {}}
        clips = groups.setdefault(sound.group, new_group)["clips"]
        clips.setdefault((sound.label, sound.waveform.tobytes()), (sound, run_label))


def add_figure(
    groups: dict[str, dict], pictures: dict[bytes, str], figure: Figure, run_label: str
) -> None:
    """Add a figure to its group of sounds, or to the pictures that stand by themselves. A picture
    that several runs share is named without a run."""
    shown = groups[figure.group]["pictures"] if figure.group in groups else pictures
    shown[figure.png] = figure.label if figure.png in shown else figure.label + run_label


def licences(runs: list[Run]) -> list[str]:
    """Return the licences of the speech on the page."""
    names = set()
    for run in runs:
        if run.corpus is not None:
            names.add(LICENCES.get(run.corpus.without_conditions().layout))
    return sorted(names - {None})


def data_uri(media_type: str, content: bytes) -> str:
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"


def encode_picture(image: bytes | np.ndarray, **fields) -> dict:
    """Return the content of an image file, or pixels (height, width, 3), as a WebP of at most
    MAX_PICTURE_WIDTH, with `fields`."""
    from PIL import Image

    if isinstance(image, bytes):
        picture = Image.open(io.BytesIO(image))
    else:
        picture = Image.fromarray(image)
    picture.thumbnail((MAX_PICTURE_WIDTH, 4 * MAX_PICTURE_WIDTH))
    content = io.BytesIO()
    picture.convert("RGB").save(content, "WEBP", quality=45)
    source = data_uri("image/webp", content.getvalue())
    return fields | {"src": source, "width": picture.width, "height": picture.height}


def encode_traversal(traversal: Traversal, run_label: str) -> dict:
    return encode_picture(
        traversal.png,
        title=traversal.label + run_label,
        values=traversal.values,
        latents=traversal.latents,
    )


def encode_group(group: dict) -> dict:
    """Return a group with its clips as {"label", "audio": MP3, "picture"}, in the order in which
    their labels first came. Their spectrograms have one scale, from 80 dB under the maximum of the
    first. "switch": all are equally long, so that listening can continue from one in another."""
    from matplotlib import colormaps

    labels = [label for label, _ in group["clips"]]
    clips = sorted(group["clips"].values(), key=lambda clip: labels.index(clip[0].label))
    shown = []
    loudest = None
    for sound, run_label in clips:
        waveform = sound.waveform.astype(np.float32)
        waveform /= max(1.0, np.abs(waveform).max())
        spectrum = STFT(512, 200).analyse(torch.from_numpy(waveform))
        level = spectrum.abs().square().clamp_min(1e-12).log10().numpy() / 8  # 80 dB: 1
        if loudest is None:
            loudest = level.max()
        pixels = colormaps["magma"]((level - loudest + 1).clip(0, 1).T[::-1], bytes=True)
        mp3 = io.BytesIO()
        soundfile.write(mp3, waveform, SAMPLE_RATE, format="MP3", subtype="MPEG_LAYER_III")
        is_ambiguous = labels.count(sound.label) > 1
        shown.append(
            {
                "label": sound.label + run_label if is_ambiguous else sound.label,
                "audio": data_uri("audio/mpeg", mp3.getvalue()),
                "picture": encode_picture(pixels[..., :3]),
            }
        )
    pictures = [encode_picture(png, caption=text) for png, text in group["pictures"].items()]
    lengths = {len(sound.waveform) for sound, _ in clips}
    return {
        "name": group["name"],
        "clips": shown,
        "pictures": pictures,
        "switch": len(lengths) == 1,
    }
