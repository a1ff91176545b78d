"""The command line: recordings of any rate and number of channels, folders, standard input and output, bad input."""

import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from run_scripts import ROOT, minidvae_command, surroundings  # noqa: F401

from minidvae.training import checkpoint


def test_command(shipped, speech, capsys):
    wave = np.random.default_rng(0).standard_normal((9_000, 2)) * 0.1
    soundfile.write("a.wav", wave, 48_000)
    soundfile.write("b.flac", wave[:, 0], 8_000)
    command = ["enhance", "a.wav", "--model", shipped, "--iterations", 2, "--plot"]
    assert minidvae_command(*command) == 0
    found, rate = soundfile.read("a-enhanced.wav")
    assert found.shape == (3_000, 2) and rate == 16_000 and Path("a-enhanced.png").exists()
    assert "48000 Hz" in capsys.readouterr().out
    assert minidvae_command(*command) == 2 and "--force" in capsys.readouterr().err
    assert minidvae_command(*command, "--force", "--method", "vem") == 0
    assert minidvae_command("enhance", "b.flac", *command[2:]) == 0
    assert (
        soundfile.info("b-enhanced.wav").samplerate == 8_000
        and soundfile.info("b-enhanced.wav").frames == 9_000
    )
    Path("many/inner").mkdir(parents=True)
    for name in ("many/c.wav", "many/inner/d.wav"):
        soundfile.write(name, wave[:, 0], 16_000)
    assert minidvae_command("enhance", "many", *command[2:]) == 0
    assert {path.name for path in Path("many-enhanced").rglob("*.wav")} == {"c.wav", "d.wav"}
    capsys.readouterr()
    Path("many/broken.wav").write_bytes(b"RIFF")
    assert minidvae_command("enhance", "many", *command[2:]) == 2
    out, error = capsys.readouterr()
    assert out.count("kept") == 2 and "broken.wav" in error and "1 of 3 files" in error
    soundfile.write("many/c.flac", wave[:, 0], 16_000)
    assert (
        minidvae_command("enhance", "many", *command[2:]) == 2
        and "one file" in capsys.readouterr().err
    )


def test_standard_input_and_output(shipped):
    soundfile.write("a.wav", np.random.default_rng(0).standard_normal(2_000) * 0.1, 44_100)
    folder = checkpoint.PRETRAINED / f"{shipped}.pt"
    Path("models").mkdir()
    Path("models/best.pt").write_bytes(folder.read_bytes())
    command = [
        sys.executable,
        "-m",
        "minidvae",
        "enhance",
        "-",
        "--model",
        "models",
        "--iterations",
        "2",
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, input=Path("a.wav").read_bytes(), capture_output=True, env=environment, check=True
    )
    found, rate = soundfile.read(io.BytesIO(done.stdout))
    assert rate == 16_000 and len(found) == 726 and b"44100 Hz" in done.stderr


BAD = {
    ("enhance", "none.wav"): "no such file",
    ("enhance", "."): "no sound files",
    ("enhance", "none.wav", "--iterations", "0"): "--iterations",
    ("enhance", "none.wav", "-o", "a.flac"): ".wav",
    ("enhance", "none.wav", "--model", "fhvae-librispeech"): "expected a DVAE",
}


@pytest.mark.parametrize("arguments", BAD)
def test_bad_input_of_the_command(arguments, capsys):
    assert minidvae_command(*arguments) == 2
    error = capsys.readouterr().err
    assert (
        BAD[arguments] in error and error.count("\n") == 1 and not list(Path().rglob("*enhanced*"))
    )
