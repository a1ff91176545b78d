"""Results as text, as files, and as the page of `evaluate.py --report`, which loads nothing."""

import base64
import io
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from run_scripts import ROOT, call, evaluate_script, surroundings, train_script  # noqa: F401

from minidvae.data.audio import STFT
from minidvae.data.corpus import Corpus
from minidvae.evaluation import figures, report
from minidvae.evaluation.results import Evaluation, Figure, RunResult, Sound, Table, Traversal
from minidvae.evaluation.runs import Options, Run

TINY = ["width=16", "feedforward=32", "layers=1", "w_embedding=8", "w_hidden=8"]
TINY += ["frames=20", "batch=4", "report=4"]
NAMES = ("models", "resynthesis", "generation", "exchange", "enhancement")


class Page(HTMLParser):
    """A page: its elements as (tag, attributes) and its text. Every open element must be closed."""

    VOID = ("meta", "link", "img", "input")

    def __init__(self, path: Path):
        super().__init__()
        self.elements = []
        self.open = []
        self.words = []
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
    """Assert that sources are data, links lead to an element of the page, and styles and scripts
    name no address."""
    ids = {attributes["id"] for _, attributes in page.elements if "id" in attributes}
    for _, attributes in page.elements:
        for name in ("src", "href"):
            if name in attributes:
                value = attributes[name]
                assert value.startswith("data:") or value.removeprefix("#") in ids, value[:80]
    assert not re.search(r"https?:|url\((?!data:|var)|@import|fetch\(", page.source)


def results_printed(printed: str) -> list[str]:
    """Return the words that an evaluation printed, without the lines that name its runs and
    folders."""
    words = []
    for line in printed.splitlines():
        if not line.startswith(("light: ", "Results, sounds", "page.html")):
            words += line.split()
    return words


def content(uri: str) -> bytes:
    return base64.b64decode(uri.partition(",")[2])


def test_the_report_has_every_table_and_every_sound(speech, capsys):
    """All clips of the folders must be on the page, as MP3 of the same length, and so must all
    numbers that were printed."""
    training = ["--model", "light_dvae", "--data", speech, "--recipe", "quick", "--steps", 4]
    assert call(train_script, *training, "--run", "light", "--set", *TINY) == 0
    capsys.readouterr()
    tasks = ["--task", *NAMES[1:], "--limit", 2, "--snr", 0, "--iterations", 1]
    outputs = ["--json", "all.json", "--report", "page.html"]
    assert call(evaluate_script, "light", *tasks, *outputs) == 0
    printed = capsys.readouterr().out
    page = Page(Path("page.html"))
    check_loads_nothing(page)
    assert len(page.source) < 15e6 and [a["id"] for a in page.all("h2")] == list(NAMES)
    results = json.loads(Path("all.json").read_text())
    assert set(results) == set(NAMES[1:])
    assert all(len(runs) == 1 for runs in results.values())

    files = list(Path("light/eval").glob("*/*/*.wav"))
    players = page.all("audio")
    assert len(players) == len(files) > 8
    lengths = {soundfile.info(io.BytesIO(content(player["src"]))).frames for player in players}
    assert lengths == {soundfile.info(file).frames for file in files}
    for image in page.all("img"):
        assert Image.open(io.BytesIO(content(image["src"]))).format == "WEBP" and image["alt"]

    words = set(" ".join(page.words).split())
    assert set(results_printed(printed)) <= words
    assert "python evaluate.py light --task exchange --limit 2" in page.source
    command = "python evaluate.py light --task enhancement --limit 2 --snr 0 --iterations 1"
    assert command in page.source


def run(folder: Path, corpus: Corpus | None = None) -> Run:
    return Run(folder, "vae", torch.nn.Linear(2, 2), STFT(), {}, "speech", corpus, [])


def evaluation(task: str, *results: RunResult, body=(), **settings) -> Evaluation:
    return Evaluation(task, "", Options().select() | settings, list(body), list(results))


def result(folder: str = "run", data: str = "speech", **lists) -> RunResult:
    return RunResult(folder, "vae", data, {"measure": 1.5}, **lists)


def write_page(*evaluations: Evaluation, command: str = "") -> Page:
    sections = []
    for evaluation in evaluations:
        runs = [run(Path(result.run)) for result in evaluation.results]
        sections.append((evaluation, "", runs))
    report.write_html(Path("page.html"), command, sections)
    return Page(Path("page.html"))


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    return 0.1 * np.random.default_rng(seed).standard_normal(round(16_000 * seconds))


# ---------------------------------------------------------------------------------- text and files


def test_a_table_as_text():
    table = Table(["", "", "dB"], [["b", "z1", "2.5"], ["", "z2", "13"]], left_columns=2)
    assert report.render_table(table).splitlines() == ["        dB", "b  z1  2.5", "   z2   13"]
    text = report.render_text(evaluation("exchange", body=["first", table, "last"]))
    assert text.split("\n\n") == ["first", report.render_table(table), "last"]


def test_numbers_and_dashes():
    assert report.number(None, ".2f") == report.number(float("nan"), ".2f") == "–"
    assert report.mean_and_error(1.234, 0.5, 1) == "1.2 ± 0.5"
    assert report.mean_and_error(1.234, float("nan"), 2) == "1.23"
    summary = {"pesq": {"mean": 2.5, "standard_error": 0.25, "count": 3}}
    assert report.summary_cells(summary, {"pesq": ("PESQ", 2)}, rows=4) == ["2.50 ± 0.25 (3)"]


def test_results_have_a_folder_for_each_corpus_and_setting():
    """Fails where an evaluation would overwrite another one."""
    names = set()
    all_settings = [{}, {"split": "dev"}, {"limit": 4}, {"seed": 1}, {"mode": "teacher_forcing"}]
    all_settings += [{"snr": (0.0, 2.5)}, {"method": "vem"}]
    all_settings += [{"noise": Path("/a/noise")}, {"noise": Path("/b/noise")}]
    for data in ("built-in", "/a/speech", "/b/speech", "conditions:/a/speech"):
        for settings in all_settings:
            name = report.folder_name(evaluation("enhancement", **settings), result(data=data))
            assert Path(name).name == name and not set(name) & set('\\:*?"<>| ')
            names.add(name)
    assert len(names) == 4 * 9
    name = report.folder_name(evaluation("enhancement", snr=(0.0, 2.5)), result(data="built-in"))
    assert name == "built-in-test-snr=0,2.5"


def test_a_folder_is_replaced_as_a_whole(tmp_path, monkeypatch):
    """Fails if files of an earlier evaluation stay, or if one that fails replaces some of them."""
    folder = tmp_path / "eval" / "resynthesis" / "speech-test"
    first = result(sounds=[Sound("a", "old", noise(0.1))], texts={"a.tsv": "text"})
    report.write_results(evaluation("resynthesis"), first, folder)
    assert {path.name for path in folder.iterdir()} == {"results.json", "a-old.wav", "a.tsv"}
    content = json.loads((folder / "results.json").read_text())
    assert content["run"] == "run" and content["measure"] == 1.5 and content["split"] == "test"
    second = result(
        sounds=[Sound("a", "z of b, w of c", noise(0.1))],
        figures=[Figure("the caption", b"1", group="a"), Figure("DET", b"2")],
    )
    report.write_results(evaluation("resynthesis"), second, folder)
    names = {"results.json", "a-z-of-b-w-of-c.wav", "a.png", "DET.png"}
    assert {path.name for path in folder.iterdir()} == names
    broken = result(sounds=[Sound("a", "nan", np.full(9, np.nan))])
    with pytest.raises(ValueError, match="not finite|not numbers"):
        report.write_results(evaluation("resynthesis"), broken, folder)
    assert {path.name for path in folder.iterdir()} == names
    assert list(folder.parent.iterdir()) == [folder]


# ---------------------------------------------------------------------------------------- the page


def test_what_runs_share_is_shown_once():
    """The noisy and the clean recording are the same for both runs."""
    clean = noise(0.5)
    noisy = noise(0.5, 1)
    results = []
    for number, name in enumerate(("one", "two")):
        sounds = [
            Sound("a-5dB", "noisy", noisy),
            Sound("a-5dB", "enhanced", noise(0.5, 2 + number)),
            Sound("a-5dB", "clean", clean),
        ]
        results.append(result(name, sounds=sounds))
    page = write_page(evaluation("enhancement", *results))
    labels = [image["alt"].removeprefix("spectrogram: ") for image in page.all("img")]
    assert labels == ["noisy", "enhanced, one", "enhanced, two", "clean"]
    assert len(page.all("audio")) == 4
    buttons = [attributes for attributes in page.all("button") if "aria-pressed" in attributes]
    assert len(buttons) == 4  # They switch between sounds of the same length.


def test_clips_of_different_lengths_have_no_switch():
    sounds = [Sound("1", "source", noise(0.5)), Sound("1", "reference", noise(0.7))]
    page = write_page(evaluation("transformation", result(sounds=sounds)))
    assert len(page.all("audio")) == 2
    assert not [a for a in page.all("button") if "aria-pressed" in a]


def test_names_are_text():
    """A name with the characters of HTML, or that is not UTF-8, must be shown as it is and must not
    become HTML."""
    sounds = [Sound('<i>x"', "original", noise(0.5)), Sound("other", "original", noise(0.5, 1))]
    shown = result("<b>&'\udcff", sounds=sounds)
    page = write_page(evaluation("resynthesis", shown, body=["<u>\udcff"]), command="<script>")
    text = "".join(page.words)
    assert all(name in text for name in ('<i>x"', "<b>&'\\udcff", "<u>\\udcff", "other"))
    assert not page.all("b") and not page.all("u")
    assert len(page.all("audio")) == 2 and len(page.all("script")) == 1


def test_a_slider_has_its_tiles():
    """The picture must have a row of tiles for each latent, the seeds and then the values."""
    seeds = np.random.default_rng(0).random((2, 3, 4)) + 10  # (n, frames, bins)
    walks = []
    for latent in range(2):
        values = [seeds + 20 + 10 * value + 40 * latent for value in range(3)]
        walks.append(("", np.stack(values, axis=1)))
    png = figures.traversal_tiles(seeds, walks)
    width, height = Image.open(io.BytesIO(png)).size
    assert (width, height) == ((1 + 3) * 2 * (3 + 2), 2 * 4)
    traversal = Traversal("traversal-z1", png, ["z1[4]", "z1[2]"], [-1, 0, 1])
    page = write_page(evaluation("transformation", result(traversals=[traversal])))
    (slider,) = [attributes for attributes in page.all("input") if attributes["type"] == "range"]
    assert (slider["min"], slider["max"], slider["data-values"]) == ("1", "3", "-1 0 1")
    assert len(page.all("option")) == 2 and "aspect-ratio: 10.0 / 4.0" in page.source
    check_loads_nothing(page)


def test_paragraphs_and_tables_keep_their_order():
    table = Table(["", "", "dB"], [["b", "z1", "2"], ["", "z2", "3"]], left_columns=2)
    page = write_page(evaluation("exchange", result(), body=["before", table, "after"]))
    words = " ".join(page.words).split()
    assert words.index("before") < words.index("z1") < words.index("z2") < words.index("after")


def test_what_does_not_fit_is_counted(monkeypatch):
    """The page must stay under its limit and say what it leaves out. The first clips of every task
    must come before the second ones of any."""
    sounds = [Sound(name, "original", noise(2, k)) for k, name in enumerate("abc")]
    evaluations = [
        evaluation("resynthesis", result(sounds=sounds)),
        evaluation("verification", result(sounds=[Sound("z", "original", noise(2, 9))])),
    ]
    full_length = len(write_page(*evaluations).source)
    monkeypatch.setattr(report, "MAX_PAGE_LENGTH", full_length * 0.7)
    page = write_page(*evaluations)
    assert len(page.source) < report.MAX_PAGE_LENGTH and len(page.all("audio")) == 2
    assert "2 groups of sounds" in page.source
    assert [name for name in "abcz" if f"<h3>{name}</h3>" in page.source] == ["a", "z"]


def test_a_report_that_cannot_be_written_is_refused_first(monkeypatch, capsys):
    """The report must be refused before a model is loaded; "nowhere" is no model."""
    Path("folder").mkdir()
    monkeypatch.setattr(soundfile, "available_formats", lambda: {"WAV": "WAV"})
    assert call(evaluate_script, "nowhere", "--report", "page.html") == 2
    assert "libsndfile that writes MP3" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "jinja2", None)
    for path, expected in (
        ("folder", "--report folder: is a folder"),
        ("none/page.html", "--report none/page.html: there is no folder none"),
        ("page.html", "needs jinja2; try pip install jinja2"),
    ):
        assert call(evaluate_script, "nowhere", "--report", path) == 2
        error = capsys.readouterr().err
        assert expected in error and error.count("\n") == 1 and not Path("page.html").exists()


def test_several_tasks(speech, capsys):
    """Each task is for the runs that it fits. A task that fits no run, or a run that no task fits,
    must be an error before any evaluation starts."""
    training = [
        "--data",
        speech,
        "--recipe",
        "quick",
        "--steps",
        1,
        "--set",
        "frames=20",
        "batch=4",
    ]
    assert call(train_script, *training, "--model", "vae", "--run", "vae") == 0
    sizes = ["width=8", "shift=5"]
    assert call(train_script, *training, *sizes, "--model", "fhvae", "--run", "fhvae") == 0
    capsys.readouterr()
    for arguments, expected in (
        (
            "vae --task resynthesis transformation",
            "--task transformation: is for none of these runs",
        ),
        ("vae fhvae --task resynthesis generation", "is not for fhvae, a fhvae"),
        ("vae --task resynthesis exchagne", "did you mean exchange"),
        ("vae --task resynthesis generation --snr 0", "is for --task enhancement, not resynthesis"),
        ("--task verification vae", "--task verification: is not for vae, a vae; try resynthesis"),
    ):
        assert call(evaluate_script, *arguments.split()) == 2
        error = capsys.readouterr().err
        assert expected in error and not Path("vae/eval").exists()
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


def test_the_licence_of_speech_is_named():
    """The page must name the licence of corpora that may be passed on, and say of others that they
    may not be published, also if conditions were laid over them."""
    samples = np.zeros(1, np.int16)
    runs = []
    for layout in ("LibriSpeech", "conditions:TIMIT", "folder"):
        clean = samples if ":" in layout else None
        runs.append(run(Path(layout), Corpus("", layout, (), samples, clean=clean)))
    report.write_html(Path("page.html"), "", [(evaluation("resynthesis"), "", runs)])
    words = Page(Path("page.html")).words
    licences = [text for text in words if text.startswith("Speech: ")]
    assert len(licences) == 2
    assert "CC BY 4.0" in licences[0] and "not to be published" in licences[1]
