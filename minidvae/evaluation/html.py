"""The page of `evaluate.py --report`: one HTML file with all that was printed and written, which loads nothing else.

It is made of what an evaluation printed, with the tables that `report.table` made, and of what is in the folder of each
run: wav files, as MP3 beside their spectrograms, and pictures. What is the same in several runs is shown once.
"""

import base64
import io
import json
import re
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

import numpy as np
import soundfile
import torch

from ..data.audio import SAMPLE_RATE, STFT, load
from ..data.layouts import LICENCES
from ..files import write_text
from ..training.config import SettingError
from . import report

LIMIT = 14_500_000  # characters of a page
WIDEST = 1_200  # pixels of a picture

# What the names of a task's wav files are made of. Clips of one group are shown side by side, in the order of KINDS.
NAMES = {
    "resynthesis": r"(?P<group>.+)-(?P<kind>original|resynthesis)",
    "generation": r"(?P<kind>.+)-(?P<group>\d+)",
    "transformation": r"(?P<group>.+?)-(?P<kind>source|reference|reconstruction-.+|transformed-.+)",
    "enhancement": r"(?P<group>.+)-(?P<kind>noisy|enhanced|clean)",
}
KINDS = ("original", "resynthesis", "noisy", "enhanced", "clean", "source", "reference")


def template():
    """The page's template. SettingError where what a page needs is not installed."""
    try:
        import jinja2
        import PIL  # noqa: F401
    except ImportError as error:
        raise SettingError(f"--report: needs {error.name}; try pip install jinja2 pillow") from None
    if "MP3" not in soundfile.available_formats():
        raise SettingError(
            "--report: libsndfile is too old to write MP3; try pip install -U soundfile"
        )
    source = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    return jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
        source
    )


def blocks(printed: str) -> list[dict]:
    """What was printed, in order: {"text"} for a paragraph, {"heading", "rows", "left"} for a table."""
    tables = sorted((printed.find(text), text) for text in report.TABLES if text in printed)
    shown, end = [], 0
    for start, text in [*tables, (len(printed), "")]:
        joined = re.sub(
            r"(?<=.{90})\n(?=\S)", " ", printed[end:start].strip()
        )  # sentences over several lines
        shown += [{"text": paragraph} for paragraph in re.split(r"\n\s*\n", joined) if paragraph]
        shown += [report.TABLES[text]] if text else []
        end = start + len(text)
    return shown


def clips_of(task: str, files: list[Path]) -> Iterator[tuple[str, str, str]]:
    """(name of the group, what the clip is, name of the wav file without its ending) for each clip of a run."""
    if task == "exchange":  # a group for each pair, whose picture has its name
        for pair in (file.stem for file in files if file.suffix == ".png"):
            a, b = pair.split("--")
            exchanged = [
                f"z-{z}--w-{w}{phase}"
                for z, w in ((a, b), (b, a))
                for phase in ("", "-griffin-lim")
            ]
            yield from (
                (pair, re.sub("^z-(.*)--w-", r"z of \1, w of ", name), name)
                for name in (a, b, *exchanged)
            )
    for stem in (file.stem for file in files if file.suffix == ".wav" and task != "exchange"):
        match = re.fullmatch(NAMES.get(task, ""), stem)
        yield (match["group"], match["kind"].replace("-", " "), stem) if match else ("", stem, stem)


def collect(section: dict) -> dict:
    """What the page shows of an evaluation; "waiting": the groups of its clips, before `encode`."""
    groups, pictures, walks, task = {}, {}, [], section["task"]
    for run in section["runs"]:
        files, of_run = (
            sorted(run.target.iterdir()),
            f", {run.folder.name}" * (len(section["runs"]) > 1),
        )
        for group, kind, stem in clips_of(task, files):
            file = run.target / f"{stem}.wav"
            clips = groups.setdefault(group, {"name": group, "clips": {}, "pictures": {}})["clips"]
            clips.setdefault((kind, file.read_bytes()), (file, of_run))
        for file in (file for file in files if file.suffix == ".png"):
            name, content = file.stem.removesuffix("-tiles"), file.read_bytes()
            if name != file.stem:
                told = json.loads((run.target / "results.json").read_text(encoding="utf-8"))[
                    "traversals"
                ]
                walks.append(
                    picture(content, title=name + of_run, values=told["values"], latents=told[name])
                )
            elif (
                task != "resynthesis" and file.with_name(f"{name}-tiles.png") not in files
            ):  # else shown in other ways
                into = groups[name]["pictures"] if name in groups else pictures
                into[content] = name + of_run * (content not in into)
    shown = {
        "traversals": walks,
        "pictures": [picture(image, caption=text) for image, text in pictures.items()],
    }
    layouts = {
        run.corpus.without_conditions().layout for run in section["runs"] if run.corpus is not None
    }
    shown |= {
        "blocks": blocks(section["printed"]),
        "licences": sorted({*map(LICENCES.get, layouts)} - {None}),
    }
    return section | shown | {"groups": [], "waiting": list(groups.values())}


def data_uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def picture(image: bytes | np.ndarray, **about) -> dict:
    """The content of an image file or pixels (height, width, 3) as `about` and {"src": WebP, "width", "height"}."""
    from PIL import Image

    drawn = Image.open(io.BytesIO(image)) if isinstance(image, bytes) else Image.fromarray(image)
    drawn.thumbnail((WIDEST, 4 * WIDEST))
    drawn.convert("RGB").save(buffer := io.BytesIO(), "WEBP", quality=45)
    return about | {
        "src": data_uri("image/webp", buffer.getvalue()),
        "width": drawn.width,
        "height": drawn.height,
    }


def encode(group: dict) -> dict:
    """A group with its clips as {"label", "audio": MP3, "picture"}, spectrograms on one scale from 80 dB under the
    maximum of the first. "switch": all are equally long, so that listening can go on from one in another."""
    from matplotlib import colormaps

    clips = sorted(group["clips"].items(), key=lambda clip: (*KINDS, clip[0][0]).index(clip[0][0]))
    shown, loudest, kinds = [], None, [kind for kind, _ in group["clips"]]
    waveforms = [load(file) for _, (file, _) in clips]
    for ((kind, _), (_, of_run)), waveform in zip(clips, waveforms, strict=True):
        level = (
            STFT(512, 200)
            .analyse(torch.from_numpy(waveform))
            .abs()
            .square()
            .clamp_min(1e-12)
            .log10()
            .numpy()
            / 8
        )
        loudest = level.max() if loudest is None else loudest
        pixels = colormaps["magma"]((level - loudest + 1).clip(0, 1).T[::-1], bytes=True)[..., :3]
        soundfile.write(
            buffer := io.BytesIO(), waveform, SAMPLE_RATE, format="MP3", subtype="MPEG_LAYER_III"
        )
        label, sound = (
            kind + of_run * (kinds.count(kind) > 1),
            data_uri("audio/mpeg", buffer.getvalue()),
        )
        shown.append({"label": label, "audio": sound, "picture": picture(pixels)})
    pictures = [picture(image, caption=text) for image, text in group["pictures"].items()]
    return group | {
        "clips": shown,
        "pictures": pictures,
        "switch": len(set(map(len, waveforms))) == 1,
    }


def write(path: Path, command: str, sections: list[dict]) -> None:
    """The page, written to `path`. A section is an evaluation: {"task", "about": what that is, "command": what repeats
    it, "printed": what it printed, "runs"}. Groups of clips that make the page longer than LIMIT are left out and
    counted; the first group of every task comes before the second of any."""
    runs, models, curves = (
        {run.folder: run for section in sections for run in section["runs"]},
        [],
        [],
    )
    for folder, run in runs.items():
        size, plan = (
            sum(p.numel() for p in run.model.parameters()),
            run.content.get("plan", {"data": "–"}),
        )
        models.append(
            [
                str(folder),
                run.name,
                f"{size:,}",
                plan.get("data", "see its model card"),
                run.trained,
            ]
        )
        if (file := folder / "curves.png").is_file():
            curves.append(picture(file.read_bytes(), caption=f"loss of {folder}"))
    shown, page = [collect(section) for section in sections], template()
    content = {
        "command": command,
        "models": models,
        "curves": curves,
        "sections": shown,
        "omitted": 0,
    }
    ranks, length = zip_longest(*(part["waiting"] for part in shown)), len(page.render(content))
    for part, group in (
        pair for rank in ranks for pair in zip(shown, rank, strict=True) if pair[1]
    ):
        encoded = encode(group)
        length += len(str(encoded))
        part["groups"] += [encoded] * (length < LIMIT)
        content["omitted"] += length >= LIMIT
    write_text(path, page.render(content).encode("utf-8", "backslashreplace").decode())
