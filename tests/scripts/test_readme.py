"""The documents: the Python in the README runs, links lead to files, commands name scripts and
settings that exist."""

import json
import re
import runpy
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from minidvae.data.audio import STFT
from minidvae.models import build_model
from minidvae.training import checkpoint
from minidvae.training.run import resolve

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
TINY = {"width": 16, "feedforward": 16, "layers": 1, "w_embedding": 8, "w_hidden": 8, "w_layers": 1}
PUBLISHED = ROOT / "tests" / "models" / "parity" / "vrnn.npz"
EXAMPLE = str(ROOT / "examples" / "resynthesise.py")


@pytest.fixture
def files(tmp_path, speech, monkeypatch):
    """Change to a folder with the runs `light` (a tiny LigHT-DVAE) and `fhvae`, a published VRNN
    and half a second of speech."""
    monkeypatch.chdir(tmp_path)
    # The scripts would change the signal handlers of the tests.
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    torch.manual_seed(0)
    write_run(Path("runs/light"), "light_dvae", **TINY)
    write_run(Path("runs/fhvae"), "fhvae", width=8)
    write_published_vrnn(Path("checkpoints/vrnn"))
    waveform, rate = soundfile.read(next(speech.rglob("*.wav")), dtype="float32")
    soundfile.write("speech.wav", waveform[: rate // 2], rate)
    return tmp_path


def write_run(folder: Path, model_name: str, **settings) -> None:
    folder.mkdir(parents=True)
    model = build_model(model_name, **settings)
    checkpoint.save(folder / "best.pt", model_name, model, STFT())


def write_published_vrnn(folder: Path) -> None:
    """Write the VRNN of the parity tests in the published format."""
    folder.mkdir(parents=True)
    parameters = {}
    with np.load(PUBLISHED) as arrays:
        for key in arrays.files:
            if key.startswith("param/"):
                parameters[key.removeprefix("param/")] = torch.from_numpy(arrays[key])
        network = json.loads(str(arrays["config"])) | {"name": "VRNN"}
    torch.save(parameters, folder / "vrnn.pt")
    window = 2 * (int(network["x_dim"]) - 1)  # samples
    lines = ["[STFT]", "fs = 16000", f"wlen_sec = {window / 16_000}", "hop_percent = 0.5"]
    lines.append("[Network]")
    for key, value in network.items():
        lines.append(f"{key} = {value}")
    (folder / "config.ini").write_text("\n".join(lines))


def run_example(monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["resynthesise.py", *arguments])
    runpy.run_path(EXAMPLE, run_name="__main__")


def test_the_python_of_the_readme_runs(files):
    """Fails if the code of the README, copied to a file, does not run where there are a run and a
    sound file of these names, or does not give what its comments say."""
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    assert soundfile.info("resynthesis.wav").frames == soundfile.info("speech.wav").frames
    assert names["log_variance"].shape == (4, 50, 513)
    torch.testing.assert_close(names["score"].log_variance, names["output"].log_variance)
    assert torch.isfinite(names["loss"])
    assert {"loss", "reconstruction", "kl_z"} <= set(names["terms"])


@pytest.mark.parametrize("model", ["runs/light", "checkpoints/vrnn"])
def test_the_example_resynthesises_a_file(files, monkeypatch, model):
    """Fails if the written file is not made of the model's variance and the phase of the input, or
    is not as long as the input."""
    torch.manual_seed(0)
    run_example(monkeypatch, model, "speech.wav", "out.wav")
    written, _ = soundfile.read("out.wav", dtype="float32")
    original, _ = soundfile.read("speech.wav", dtype="float32")
    assert written.shape == original.shape
    torch.manual_seed(0)
    trained, stft, _ = checkpoint.load_run(model)
    peak = np.abs(original).max()
    spectrum = stft.analyse(torch.from_numpy(original / peak))[None]
    log_variance = trained.eval().resynthesise(spectrum.abs().square(), "generation")
    estimated_spectrum = torch.polar((log_variance / 2).exp(), spectrum.angle())
    estimate = stft.synthesise(estimated_spectrum, len(original))[0]
    estimate = peak * estimate / max(1, peak * estimate.abs().max())
    assert np.abs(written - estimate.numpy()).max() < 2**-14


def test_the_example_refuses_what_it_cannot_use(files, monkeypatch, capsys):
    """Fails if a run or a sound file that cannot be used ends in a traceback, or is not named."""
    for arguments, expected in (
        (["runs/fhvae", "speech.wav", "out.wav"], "runs/fhvae"),
        (["runs/none", "speech.wav", "out.wav"], "runs/none"),
        (["runs/light", "none.wav", "out.wav"], "none.wav"),
    ):
        with pytest.raises(SystemExit) as stop:
            run_example(monkeypatch, *arguments)
        (line,) = capsys.readouterr().err.splitlines()
        assert stop.value.code == 2
        assert expected in line
        assert not Path("out.wav").exists()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_commands_of_the_documents(document):
    """Fails if a link leads to no file or to no heading, a command to no script, or if a setting of
    a `train.py` command is not one of its model's."""
    text = document.read_text()
    for target, heading in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", text):
        file = (document.parent / target).resolve() if target else document
        assert file.exists(), target
        if heading:
            assert heading in anchors_of(file), heading
    for script in re.findall(r"python (\S+\.py)", text):
        assert (ROOT / script).is_file(), script
    for line in re.findall(r"^    (python train\.py .*)$", text, re.MULTILINE):
        check_training_command(line)


def anchors_of(document: Path) -> set[str]:
    """Return the anchors that a renderer of Markdown gives the headings of a document."""
    titles = re.findall(r"^#+ (.*)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def check_training_command(line: str) -> None:
    """Resolve the settings of a command, which raises an error where one does not exist. Commands
    of a loop over models ($m) are not checked."""
    words = line.split(" && ")[0].split("  ")[0].split()
    if "--model" not in words or "$m" in words:
        return
    model = words[words.index("--model") + 1]
    recipe = words[words.index("--recipe") + 1] if "--recipe" in words else "quick"
    settings = {}
    for word in words:
        if "=" in word:
            key, _, value = word.partition("=")
            settings[key] = value
    resolve(model, recipe, settings)


def test_documents_name_no_path_of_one_machine():
    """Fails if a document has an absolute path, which readers do not have."""
    for document in DOCUMENTS:
        assert not re.search(r"[\s`(]/\w+/", document.read_text()), document
