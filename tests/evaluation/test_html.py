"""The page of `evaluate.py --report`: what is on it, that it loads nothing, what is left out, bad input."""

import base64
import io
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import soundfile
import torch
from PIL import Image
from run_scripts import ROOT, call, evaluate_script, surroundings, train_script  # noqa: F401

from minidvae.data import audio
from minidvae.data.corpus import Corpus
from minidvae.evaluation import html, report

TINY = [
    "width=16",
    "feedforward=32",
    "layers=1",
    "w_embedding=8",
    "w_hidden=8",
    "frames=20",
    "batch=4",
    "report=4",
]
NAMES = ("models", "resynthesis", "generation", "exchange", "enhancement")


class Page(HTMLParser):
    """Elements of a page as (tag, attributes), its text, and that every element that is opened is closed."""

    VOID = ("meta", "link", "img", "input")

    def __init__(self, path: Path):
        super().__init__()
        self.elements, self.open, self.words = [], [], []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        self.words.append(text)

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.elements if name == tag]


def check_loads_nothing(page: Page) -> None:
    """Sources are data, links lead to a place on the page, and styles and scripts name no address."""
    ids = {attributes["id"] for _, attributes in page.elements if "id" in attributes}
    for _, attributes in page.elements:
        for value in (attributes[name] for name in ("src", "href") if name in attributes):
            assert value.startswith("data:") or value.removeprefix("#") in ids, value[:80]
    assert not re.search(r"https?:|url\((?!data:|var)|@import|fetch\(", page.source)


def content(uri: str) -> bytes:
    return base64.b64decode(uri.partition(",")[2])


def test_the_report_has_every_table_and_every_sound(speech, capsys):
    """All clips of the folders must be on the page, as MP3 that decode to the wav files, and all numbers printed."""
    data = ("--data", speech, "--recipe", "quick", "--steps", 4)
    assert call(train_script, "--model", "light_dvae", *data, "--run", "light", "--set", *TINY) == 0
    capsys.readouterr()
    tasks = ("--task", "resynthesis", "generation", "exchange", "enhancement", "--limit", 2)
    tasks = (*tasks, "--snr", 0, "--iterations", 1)
    assert (
        call(evaluate_script, "light", *tasks, "--json", "all.json", "--report", "page.html") == 0
    )
    printed, page = capsys.readouterr().out, Page(Path("page.html"))
    check_loads_nothing(page)
    assert len(page.source) < 15e6 and [a["id"] for a in page.all("h2")] == list(NAMES)
    results = json.loads(Path("all.json").read_text())
    assert {task: len(found) for task, found in results.items()} == dict.fromkeys(NAMES[1:], 1)

    files, pairs = (
        list(Path("light/eval").glob("*/*.wav")),
        len(list(Path("light/eval/exchange").glob("*.png"))),
    )
    others = sum(file.parent.name != "exchange" for file in files)
    players = page.all("audio")
    assert (
        len(players) == others + 6 * pairs and pairs
    )  # two originals, two exchanged, with the phase of z and without
    lengths = sorted(
        soundfile.info(io.BytesIO(content(player["src"]))).frames for player in players
    )
    assert set(lengths) == {soundfile.info(file).frames for file in files}
    for image in page.all("img"):
        assert Image.open(io.BytesIO(content(image["src"]))).format == "WEBP" and image["alt"]

    words = set(" ".join(page.words).split())
    assert set(printed.rpartition("page.html")[0].split()) <= words
    assert "python evaluate.py light --task exchange --limit 2" in page.source
    assert (
        "python evaluate.py light --task enhancement --limit 2 --snr 0 --iterations 1"
        in page.source
    )


def run_with(folder: Path, files: dict, content: dict | None = None) -> SimpleNamespace:
    """What the page asks of a run, with wav files (samples,) and pictures (height, width, 3) in its folder."""
    (folder / "eval").mkdir(parents=True)
    for name, array in files.items():
        if name.endswith(".wav"):
            audio.write(folder / "eval" / name, array)
        else:
            Image.fromarray(array).save(folder / "eval" / name)
    about = {
        "folder": folder,
        "name": "vae",
        "content": content or {},
        "trained": "step 1",
        "target": folder / "eval",
    }
    return SimpleNamespace(model=torch.nn.Linear(2, 2), corpus=None, **about)


def section(task: str, *runs: SimpleNamespace, printed: str = "") -> dict:
    return {"task": task, "about": "", "command": "", "printed": printed, "runs": runs}


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    return 0.1 * np.random.default_rng(seed).standard_normal(round(16_000 * seconds))


def test_what_runs_share_is_shown_once(tmp_path):
    clean, noisy = noise(0.5), noise(0.5, 1)
    files = [
        {"a-5dB-noisy.wav": noisy, "a-5dB-clean.wav": clean, "a-5dB-enhanced.wav": noise(0.5, k)}
        for k in (2, 3)
    ]
    runs = [run_with(tmp_path / name, own) for name, own in zip(("one", "two"), files, strict=True)]
    html.write(tmp_path / "page.html", "", [section("enhancement", *runs)])
    page = Page(tmp_path / "page.html")
    labels = [image["alt"].removeprefix("spectrogram: ") for image in page.all("img")]
    assert (
        labels == ["noisy", "enhanced, one", "enhanced, two", "clean"]
        and len(page.all("audio")) == 4
    )
    buttons = [attributes for attributes in page.all("button") if "aria-pressed" in attributes]
    assert len(buttons) == 4  # of one length: listening switches from one to the other


def test_clips_of_different_lengths_have_no_switch(tmp_path):
    run = run_with(
        tmp_path / "run",
        {"conversion-1-source.wav": noise(0.5), "conversion-1-reference.wav": noise(0.7)},
    )
    html.write(tmp_path / "page.html", "", [section("transformation", run)])
    page = Page(tmp_path / "page.html")
    assert len(page.all("audio")) == 2 and not [
        a for a in page.all("button") if "aria-pressed" in a
    ]


def test_names_are_text(tmp_path):
    """A name with the characters of HTML, or that is not UTF-8, must be shown as it is and change nothing else."""
    run = run_with(tmp_path / "<b>&'", {'<i>x"-original.wav': noise(0.5), "other.wav": noise(0.5)})
    run.folder = Path("<b>&'\udcff")
    html.write(
        tmp_path / "page.html", "<script>", [section("resynthesis", run, printed="<u>\udcff")]
    )
    page = Page(tmp_path / "page.html")
    text = "".join(page.words)
    assert all(name in text for name in ('<i>x"', "<b>&'\\udcff", "<u>\\udcff", "other"))
    assert (
        not page.all("b")
        and not page.all("u")
        and len(page.all("audio")) == 2
        and len(page.all("script")) == 1
    )


def test_a_slider_has_its_tiles(tmp_path):
    """The tiles stand where the page looks for them: a row for each latent, the seeds and then the values."""
    from minidvae.evaluation import figures

    seeds = np.random.default_rng(0).random((2, 3, 4)) + 10  # (n, frames, bins)
    walks = [
        ("", np.stack([seeds + 20 + 10 * value + 40 * k for value in range(3)], axis=1))
        for k in range(2)
    ]
    run = run_with(tmp_path / "run", {})
    figures.traversal_tiles(seeds, walks, run.target / "traversal-z1-tiles.png")
    width, height = Image.open(run.target / "traversal-z1-tiles.png").size
    assert (width, height) == ((1 + 3) * 2 * (3 + 2), 2 * 4)
    told = {"values": [-1, 0, 1], "traversal-z1": ["z1[4]", "z1[2]"]}
    (run.target / "results.json").write_text(json.dumps({"traversals": told}))
    html.write(tmp_path / "page.html", "", [section("transformation", run)])
    page = Page(tmp_path / "page.html")
    (slider,) = (attributes for attributes in page.all("input") if attributes["type"] == "range")
    assert (slider["min"], slider["max"], slider["data-values"]) == ("1", "3", "-1 0 1")
    assert len(page.all("option")) == 2 and "aspect-ratio: 10.0 / 4.0" in page.source
    check_loads_nothing(page)


def test_tables_keep_their_order_and_their_notes():
    one = report.table(["", "dB"], [["a", "1"]])
    two = report.table(["", "", "dB"], [["b", "z1", "2"], ["", "z2", "3"]], 2)
    shown = html.blocks(f"first\n\n{two}\nof two\n\nbetween\n{one}\n")
    found = [block.get("text", block.get("heading")) for block in shown]
    assert found == ["first", ["", "", "dB"], "of two", "between", ["", "dB"]]
    assert shown[1]["rows"] == [["b", "z1", "2"], ["", "z2", "3"]] and shown[1]["left"] == 2


def test_what_does_not_fit_is_counted(tmp_path, monkeypatch):
    """The first clips of every task come before the second ones of any, and the page stays under its limit."""
    files = {f"{name}-original.wav": noise(2, k) for k, name in enumerate("abc")}
    sections = [section("resynthesis", run_with(tmp_path / "one", files))]
    sections += [section("verification", run_with(tmp_path / "two", {"z.wav": noise(2)}))]
    html.write(tmp_path / "page.html", "", sections)
    whole = len((tmp_path / "page.html").read_text())
    monkeypatch.setattr(html, "LIMIT", whole * 0.7)
    html.write(tmp_path / "page.html", "", sections)
    page = Page(tmp_path / "page.html")
    assert (
        len(page.source) < html.LIMIT
        and len(page.all("audio")) == 2
        and "2 groups of sounds" in page.source
    )
    assert [name for name in ("a", "b", "c", "z") if f"<h3>{name}</h3>" in page.source] == ["a"]


def test_a_report_that_cannot_be_written_is_refused_first(monkeypatch, capsys):
    """Before a model is loaded: "nowhere" is none."""
    Path("folder").mkdir()
    monkeypatch.setattr(soundfile, "available_formats", lambda: {"WAV": "WAV"})
    assert call(evaluate_script, "nowhere", "--report", "page.html") == 2
    assert "too old to write MP3" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "jinja2", None)
    for path, expected in (
        ("folder", "--report folder: is a folder"),
        ("none/page.html", "--report none/page.html: there is no folder none"),
        ("page.html", "--report: needs jinja2; try pip install jinja2"),
    ):
        assert call(evaluate_script, "nowhere", "--report", path) == 2
        error = capsys.readouterr().err
        assert expected in error and error.count("\n") == 1 and not Path("page.html").exists()


def test_several_tasks(speech, capsys):
    """Each is for the runs that it fits; a task that fits none, or a run that none fits, is refused before any runs."""
    data = ("--data", speech, "--recipe", "quick", "--steps", 1)
    settings = ("--set", "frames=20", "batch=4")
    assert call(train_script, "--model", "vae", *data, "--run", "vae", *settings) == 0
    assert (
        call(
            train_script,
            "--model",
            "fhvae",
            *data,
            "--run",
            "fhvae",
            *settings,
            "width=8",
            "shift=5",
        )
        == 0
    )
    capsys.readouterr()
    for arguments, expected in (
        (
            ("vae", "--task", "resynthesis", "transformation"),
            "--task transformation: is for none of these runs",
        ),
        (("vae", "fhvae", "--task", "resynthesis", "generation"), "is not for fhvae, a fhvae"),
        (("vae", "--task", "resynthesis", "exchagne"), "did you mean exchange"),
        (
            ("vae", "--task", "resynthesis", "generation", "--snr", "0"),
            "is for --task enhancement, not resynthesis",
        ),
        (
            ("--task", "verification", "vae"),
            "--task verification: is not for vae, a vae; try resynthesis",
        ),
    ):
        assert call(evaluate_script, *arguments) == 2
        assert expected in capsys.readouterr().err and not Path("vae/eval").exists()
    assert call(evaluate_script, "--limit", 2, "--task", "resynthesis", "generation", "vae") == 0
    assert {path.name for path in Path("vae/eval").iterdir()} == {"resynthesis", "generation"}


def test_the_page_of_the_models_that_ship_loads_nothing():
    page = Page(ROOT / "docs" / "report.html")
    check_loads_nothing(page)
    assert len(page.source) < 3e6 and "python evaluate.py light_dvae-librispeech" in page.source


def test_the_page_with_librispeech_loads_nothing_and_names_it():
    page = Page(ROOT / "docs" / "librispeech.html")
    check_loads_nothing(page)
    assert len(page.source) < 2e6 and "CC BY 4.0" in page.source


def test_the_licence_of_speech_is_named(tmp_path):
    """Of corpora that may be passed on and of those that may not, with conditions laid over them or without."""
    layouts = ("LibriSpeech", "conditions:TIMIT", "folder")
    runs = [run_with(tmp_path / layout, {}) for layout in layouts]
    for run, layout in zip(runs, layouts, strict=True):
        samples = np.zeros(1, np.int16)
        run.corpus = Corpus("", layout, (), samples, clean=samples if ":" in layout else None)
    html.write(tmp_path / "page.html", "", [section("resynthesis", *runs)])
    told = [text for text in Page(tmp_path / "page.html").words if text.startswith("Speech: ")]
    assert len(told) == 2 and "CC BY 4.0" in told[0] and "not to be published" in told[1]
