"""Gaps filled: from cases whose answer is known to the command."""

from types import SimpleNamespace

import inpainting as study
import numpy as np
import pytest
import soundfile
import torch
from cli import call, minidvae_command, surroundings  # noqa: F401

from minidvae.data.audio import STFT
from minidvae.enhancement import Settings
from minidvae.inpainting import FADE, Gap, fill, inpaint
from minidvae.models.base import Gaussian, InputScale, Score, past


class SlowBand(torch.nn.Module):
    """Speech in a band whose place is z, which moves as a random walk; the encoder takes it for still."""

    def __init__(self, bins: int):
        super().__init__()
        self.input_scale = InputScale(bins, "root")
        self.register_buffer("place", torch.linspace(0, 1, bins))

    def draw_noise(self, *_):
        return None

    def forward(self, x, _noise):
        z = torch.linspace(-0.01, 0.01, x.shape[1])[None, :, None]
        return SimpleNamespace(q_z=Gaussian(z, z), q_w=None)

    def score(self, _x_past, z, _w=None):
        log_variance = 5 * torch.cos(torch.pi * (self.place - 0.5 - 0.3 * torch.tanh(z)))
        return Score(log_variance, Gaussian(past(z), torch.full_like(z, -3.0)))


def test_missing_frames_are_on_the_way_from_one_end_to_the_other():
    """The most probable path of a random walk between two places is the straight line."""
    model = SlowBand(65)
    z = torch.tensor([-1.0] * 20 + np.linspace(-1, 1, 12)[1:-1].tolist() + [1.0] * 20)
    truth = model.score(None, z[None, :, None]).log_variance[0]
    known = torch.arange(50).sub(24.5).abs() > 5
    power = torch.where(known[:, None], truth.exp(), 1e9)  # which must not be looked at
    gap = Gap(power, known)
    found = fill(model, Settings("peem", iterations=300, chains=1, rate=3.0), gap, torch.Generator())
    assert torch.equal(found[known], power[known])
    assert (found.log() - truth)[~known].abs().max() < 0.5
    assert (gap.interpolated().log() - truth)[~known].abs().max() > 1


def interpolated(gap, _generator):
    return gap.interpolated()


@pytest.mark.parametrize("rate", [8_000, 16_000, 44_100])
def test_the_rest_of_the_recording_stays(rate):
    """Bit for bit, but for the fades; and a tone goes on through gaps, at either end of the file too."""
    time = np.arange(rate) / rate
    tone = (0.3 * np.sin(2 * np.pi * 440 * time)).astype(np.float32)
    gaps = [(0.0, 0.01), (0.3, 0.34), (0.37, 0.38), (0.99, 1.0)]
    damaged, far = tone.copy(), np.ones(rate, bool)
    for start, stop in gaps:
        damaged[round(start * rate) : round(stop * rate)] = start == 0.37
        far &= (time < start - FADE) | (time > stop + FADE)
    filled = inpaint(damaged, rate, gaps, STFT(), interpolated)
    assert filled.dtype == np.float32 and filled.shape == tone.shape
    assert np.array_equal(filled[far], tone[far])
    inside = (time > 0.3 - FADE) & (time < 0.34 + FADE)
    assert np.mean((filled - tone)[inside] ** 2) < 0.1 * np.mean(tone**2)
    assert np.array_equal(filled, inpaint(damaged, rate, gaps, STFT(), interpolated))


def test_distance_in_a_gap():
    """Ten times the power is 10 dB off everywhere; silence is far off."""
    sound = np.random.default_rng(0).standard_normal(640).astype(np.float32) * 0.1
    assert study.log_spectral_distance(sound * 10**0.5, sound) == pytest.approx(10, abs=1e-3)
    assert study.log_spectral_distance(0 * sound, sound) > 40


@pytest.fixture
def damaged(shipped):
    wave = np.random.default_rng(0).integers(-9_000, 9_000, (24_000, 2)).astype(np.int16)
    wave[8_000:9_000] = 0
    soundfile.write("a.wav", wave, 16_000)
    soundfile.write("short.wav", wave[:700], 16_000)
    soundfile.write("nan.wav", np.where(np.arange(9_000) == 99, np.nan, 0.1), 16_000, subtype="FLOAT")
    return wave


def test_command(damaged, shipped, capsys):
    command = ["inpaint", "a.wav", "--missing", "0.5-0.5625,1.2-1.25", "--model", shipped]
    assert minidvae_command(*command) == 0 and "a-inpainted.wav" in capsys.readouterr().out
    filled, rate = soundfile.read("a-inpainted.wav", dtype="int16")
    assert filled.shape == damaged.shape and rate == 16_000
    far = np.r_[:7_900, 9_100:19_100, 20_100:24_000]
    assert np.array_equal(filled[far], damaged[far]) and filled[8_000:9_000].any()
    assert minidvae_command(*command) == 2 and "--force" in capsys.readouterr().err
    assert minidvae_command(*command, "--force") == 0
    assert np.array_equal(filled, soundfile.read("a-inpainted.wav", dtype="int16")[0])
    assert minidvae_command(*command, "-o", "b.wav", "--seed", 1) == 0
    assert not np.array_equal(filled, soundfile.read("b.wav", dtype="int16")[0])


BAD = {
    ("a.wav", "1.2"): "expected seconds",
    ("a.wav", "one-two"): "expected seconds",
    ("a.wav", "1.2-1.3-1.4"): "expected seconds",
    ("a.wav", ""): "expected seconds",
    ("a.wav", "1.3-1.2"): "within 0-1.5 s",
    ("a.wav", "nan-1"): "within 0-1.5 s",
    ("a.wav", "1.4-1.6"): "within 0-1.5 s",
    ("a.wav", "1.2-1.3,1.25-1.4"): "do not overlap",
    ("a.wav", "0-1.5"): "are known",
    ("short.wav", "0.02-0.03"): "are known",
    ("nan.wav", "0.1-0.2"): "not numbers",
    ("none.wav", "0.1-0.2"): "no such file",
}


@pytest.mark.parametrize("arguments", BAD)
def test_bad_input(damaged, shipped, arguments, capsys):
    file, missing = arguments
    assert minidvae_command("inpaint", file, "--missing", missing, "--model", shipped) == 2
    error = capsys.readouterr().err
    assert (
        BAD[arguments] in error
        and error.count("\n") == 1
        and not list(filter(None, map(str, study.Path().glob("*inpainted*"))))
    )


def test_study(speech, shipped, capsys):
    assert call(study, shipped, "--data", speech, "--limit", 2, "--iterations", 2, "--json", "all.json") == 0
    out = capsys.readouterr().out
    assert all(words in out for words in ("silence", "linear interpolation", shipped, "160 ms"))
