"""The command line: sampling rates, channels, folders, standard input and output, bad input."""

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


def test_enhance_a_file(shipped, capsys):
    """Enhanced recordings must have 16 kHz or their own lower rate, their channels and their
    length, and must not be overwritten without --force."""
    waveform = np.random.default_rng(0).standard_normal((9_000, 2)) * 0.1
    soundfile.write("a.wav", waveform, 48_000)
    soundfile.write("b.flac", waveform[:, 0], 8_000)
    options = ["--model", shipped, "--iterations", 2, "--plot"]
    assert minidvae_command("enhance", "a.wav", *options) == 0
    enhanced, rate = soundfile.read("a-enhanced.wav")
    assert enhanced.shape == (3_000, 2) and rate == 16_000
    assert Path("a-enhanced.png").exists()
    assert "48000 Hz" in capsys.readouterr().out
    assert minidvae_command("enhance", "a.wav", *options) == 2
    assert "--force" in capsys.readouterr().err
    assert minidvae_command("enhance", "a.wav", *options, "--force", "--method", "vem") == 0
    assert minidvae_command("enhance", "b.flac", *options) == 0
    assert soundfile.info("b-enhanced.wav").samplerate == 8_000
    assert soundfile.info("b-enhanced.wav").frames == 9_000


def test_enhance_a_folder(shipped, capsys):
    """All files of a folder must be enhanced; enhanced ones must be kept when the command is
    repeated; a file that does not decode must be named."""
    waveform = np.random.default_rng(0).standard_normal(9_000) * 0.1
    options = ["--model", shipped, "--iterations", 2, "--plot"]
    Path("many/inner").mkdir(parents=True)
    for name in ("many/c.wav", "many/inner/d.wav"):
        soundfile.write(name, waveform, 16_000)
    assert minidvae_command("enhance", "many", *options) == 0
    assert {path.name for path in Path("many-enhanced").rglob("*.wav")} == {"c.wav", "d.wav"}
    capsys.readouterr()
    Path("many/broken.wav").write_bytes(b"RIFF")
    assert minidvae_command("enhance", "many", *options) == 2
    out, error = capsys.readouterr()
    assert out.count("kept") == 2 and "broken.wav" in error and "1 of 3 files" in error
    soundfile.write("many/c.flac", waveform, 16_000)  # Its result would also be c.wav.
    assert minidvae_command("enhance", "many", *options) == 2
    assert "one file" in capsys.readouterr().err


def test_standard_input_and_output(shipped):
    """Fails if anything but the wav file is written to standard output."""
    soundfile.write("a.wav", np.random.default_rng(0).standard_normal(2_000) * 0.1, 44_100)
    file = checkpoint.PRETRAINED / f"{shipped}.pt"
    Path("models").mkdir()
    Path("models/best.pt").write_bytes(file.read_bytes())
    command = [sys.executable, "-m", "minidvae", "enhance", "-"]
    command += ["--model", "models", "--iterations", "2"]
    completed = subprocess.run(
        command,
        input=Path("a.wav").read_bytes(),
        capture_output=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=True,
    )
    enhanced, rate = soundfile.read(io.BytesIO(completed.stdout))
    assert rate == 16_000 and len(enhanced) == 726 and b"44100 Hz" in completed.stderr


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
    assert BAD[arguments] in error and error.count("\n") == 1
    assert not list(Path().rglob("*enhanced*"))
