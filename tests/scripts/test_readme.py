"""What the documents say: the Python in the README runs, links lead somewhere, commands name what there is."""

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


@pytest.fixture
def files(tmp_path, speech, monkeypatch):
    """A folder with a run of a tiny LigHT-DVAE, a published VRNN, an FHVAE and a sound file, and to work in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        signal, "signal", lambda *_: None
    )  # scripts would change those of the tests
    torch.manual_seed(0)
    stft = STFT()
    for name, model in (
        ("light_dvae", build_model("light_dvae", **TINY)),
        ("fhvae", build_model("fhvae", width=8)),
    ):
        folder = Path("runs") / name.removesuffix("_dvae")
        folder.mkdir(parents=True)
        checkpoint.save(folder / "best.pt", name, model, stft)
    folder = Path("checkpoints/vrnn")
    folder.mkdir(parents=True)
    with np.load(PUBLISHED) as arrays:
        parameters = {
            key: torch.from_numpy(arrays[key]) for key in arrays.files if key.startswith("param/")
        }
        network = json.loads(str(arrays["config"])) | {"name": "VRNN"}
    torch.save(
        {key.removeprefix("param/"): value for key, value in parameters.items()}, folder / "vrnn.pt"
    )
    window = 2 * (int(network["x_dim"]) - 1)
    lines = [
        "[STFT]",
        "fs = 16000",
        f"wlen_sec = {window / 16_000}",
        "hop_percent = 0.5",
        "[Network]",
    ]
    (folder / "config.ini").write_text(
        "\n".join([*lines, *(f"{key} = {value}" for key, value in network.items())])
    )
    waveform, rate = soundfile.read(next(speech.rglob("*.wav")), dtype="float32")
    soundfile.write("speech.wav", waveform[: rate // 2], rate)
    return tmp_path


def test_the_python_of_the_readme_runs(files):
    """Copied into a file, with a run and a sound file of these names, it must give what its comments say."""
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    assert soundfile.info("resynthesis.wav").frames == soundfile.info("speech.wav").frames
    assert names["log_variance"].shape == (4, 50, 513)
    torch.testing.assert_close(names["score"].log_variance, names["output"].log_variance)
    assert torch.isfinite(names["loss"]) and {"loss", "reconstruction", "kl_z"} <= set(
        names["terms"]
    )


@pytest.mark.parametrize("model", ["runs/light", "checkpoints/vrnn"])
def test_the_example_resynthesises_a_file(files, monkeypatch, model):
    """The written file must be what the model's variance and the phase of the input give, as long as the input."""
    monkeypatch.setattr(sys, "argv", ["resynthesise.py", model, "speech.wav", "out.wav"])
    torch.manual_seed(0)
    runpy.run_path(str(ROOT / "examples" / "resynthesise.py"), run_name="__main__")
    written, _ = soundfile.read("out.wav", dtype="float32")
    original, _ = soundfile.read("speech.wav", dtype="float32")
    assert written.shape == original.shape
    torch.manual_seed(0)
    trained, stft, _ = checkpoint.load_run(model)
    peak = np.abs(original).max()
    spectrum = stft.analyse(torch.from_numpy(original / peak))[None]
    log_variance = trained.eval().resynthesise(spectrum.abs().square(), "generation")
    estimate = stft.synthesise(
        torch.polar((log_variance / 2).exp(), spectrum.angle()), len(original)
    )[0]
    estimate = peak * estimate / max(1, peak * estimate.abs().max())
    assert np.abs(written - estimate.numpy()).max() < 2**-14


def test_the_example_refuses_what_it_cannot_use(files, monkeypatch, capsys):
    for arguments, named in (
        (["runs/fhvae", "speech.wav", "out.wav"], "runs/fhvae"),
        (["runs/none", "speech.wav", "out.wav"], "runs/none"),
        (["runs/light", "none.wav", "out.wav"], "none.wav"),
    ):
        monkeypatch.setattr(sys, "argv", ["resynthesise.py", *arguments])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(ROOT / "examples" / "resynthesise.py"), run_name="__main__")
        (line,) = capsys.readouterr().err.splitlines()
        assert stop.value.code == 2 and named in line and not Path("out.wav").exists()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_commands_of_the_documents(document):
    """A link must lead to a file, a heading that it names must be there, a script must exist, and every setting of a
    `train.py` command must be one of its model's."""
    text = document.read_text()
    for target, heading in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", text):
        file = (document.parent / target).resolve() if target else document
        assert file.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert heading in anchors, heading
    for script in re.findall(r"python (\S+\.py)", text):
        assert (ROOT / script).is_file(), script
    for line in re.findall(r"^    (python train\.py .*)$", text, re.MULTILINE):
        words = line.split(" && ")[0].split("  ")[0].split()
        if "--model" in words and "$m" not in words:
            pairs = [word.partition("=") for word in words if "=" in word]
            recipe = words[words.index("--recipe") + 1] if "--recipe" in words else "quick"
            resolve(
                words[words.index("--model") + 1], recipe, {key: value for key, _, value in pairs}
            )


def test_documents_name_no_path_of_one_machine():
    for document in DOCUMENTS:
        assert not re.search(r"[\s`(]/\w+/", document.read_text()), document
