"""Enhancement: the equations on cases whose answer is known, every model and E-step, and both commands."""

import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import enhancement_limits
import numpy as np
import pytest
import soundfile
import torch
from run_scripts import ROOT, call, evaluate_script, minidvae_command, surroundings, train_script  # noqa: F401

import minidvae
from minidvae.data.audio import STFT
from minidvae.data.corpus import load_corpus
from minidvae.evaluation.enhancement import Mixture, log_mmse, mix, oracle
from minidvae.evaluation.metrics import si_sdr
from minidvae.inference import enhance as enhancement
from minidvae.inference.enhance import (
    E_STEPS,
    Inference,
    Latents,
    Observation,
    Settings,
    blocks,
    enhance_speech,
    gains_of,
)
from minidvae.models import MODELS, build_model
from minidvae.models.base import DVAE, Gaussian, InputScale, Score, past

DVAES = [name for name, (kind, _) in MODELS.items() if issubclass(kind, DVAE)]
SMALL = {"width": 8, "feedforward": 8, "layers": 1, "w_embedding": 4, "w_hidden": 4, "w_layers": 1}


def small(name: str, bins: int = 9, **config) -> DVAE:
    torch.manual_seed(0)
    sizes = SMALL if name in ("light_dvae", "hit_dvae") else {}
    return build_model(name, bins=bins, latent=3, input_scale="root", **sizes | config).eval()


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("chains", "hold"), [(1, 1), (3, 1), (3, 6)])
@pytest.mark.parametrize("seed", range(4))
def test_the_m_step_never_raises_the_objective(chains, hold, seed):
    power = torch.rand(20, 9, generator=seeded(seed), dtype=torch.float64).exp() * 3
    speech = torch.rand(chains, 20, 9, generator=seeded(seed + 9), dtype=torch.float64) * 2 + 1e-3
    observation, costs = Observation(power, 3, hold, seeded(seed)), []
    for _ in range(100):
        costs.append(observation.cost(speech).sum().item())
        observation.update(speech)
    assert all(
        after <= before + 1e-9 * abs(before)
        for before, after in zip(costs, costs[1:], strict=False)
    )
    assert costs[-1] < costs[0]
    torch.testing.assert_close(observation.spectra.sum(1), torch.ones(3, dtype=torch.float64))


def test_the_response_of_a_microphone_is_found():
    """Speech that lies on its model but for a curve over frequency."""
    frames, bins, random = 300, 65, seeded()
    speech = torch.randn(1, frames, bins, generator=random, dtype=torch.float64).mul(2).exp()
    curve = torch.linspace(-2, 2, bins, dtype=torch.float64)
    power = (
        1e-3 * speech[0] * curve.exp() * torch.empty_like(speech[0]).exponential_(generator=random)
    )
    observation = Observation(power, 1, 4, random)
    for _ in range(200):
        observation.update(speech)
    found, band = observation.gain.log().mean(0), observation.bands.argmax(1)
    found, expected = (
        torch.stack([x[band == k].mean() for k in band.unique()]) for x in (found, curve)
    )
    assert (found - expected - (found - expected).mean()).abs().max() < 0.3
    assert all(observation.gain[0, band == k].unique().numel() == 1 for k in band.unique())


@pytest.mark.parametrize("name", DVAES)
def test_gradients_of_the_posterior(name):
    """Of −log p(x, z, w) by autograd and by finite differences."""
    model = small(name).double()
    power = torch.rand(4, 9, dtype=torch.float64) + 0.1
    e_step = Latents(model, power, Settings(chains=2), seeded())
    observation, x_past = (
        Observation(power, 2, 1, seeded()),
        torch.rand(1, 4, 9, dtype=torch.float64),
    )

    def objective(*latents: torch.Tensor) -> torch.Tensor:
        e_step.latents = list(latents)
        speech, cost = e_step.decode(x_past)
        return (observation.cost(speech) + cost).sum()

    assert torch.autograd.gradcheck(objective, tuple(e_step.latents))


class LinearGaussian(torch.nn.Module):
    """z_t = ½ z_{t−1} + u_t, u_t ~ N(0, diag(1, ½)): a prior over time, learned ones' kind."""

    def draw_noise(self, *_):
        return None

    def forward(self, x, _noise):
        mean = torch.stack(
            [torch.linspace(-1, 1, x.shape[1]), torch.linspace(1, -2, x.shape[1])], 1
        )[None].double()
        return SimpleNamespace(q_z=Gaussian(mean, mean), q_w=None)

    def score(self, _x_past, z, _w=None):
        log_variance = torch.tensor([1.0, 0.5], dtype=z.dtype).log().expand_as(z)
        return Score(torch.zeros_like(z), Gaussian(past(z) / 2, log_variance))


def test_langevin_draws_from_the_posterior():
    """Where it is known: a linear-Gaussian prior, and y = A z + e with e ~ N(0, ½). Each chain gives one sample, so
    that these are independent, and five standard errors of mean and covariance are allowed; beside them η·λ/4 of the
    variance, by which Langevin steps of size η are known to widen a Gaussian of precision λ."""
    frames, chains, eta = 3, 4_000, 0.01
    model = LinearGaussian()
    A = torch.tensor([[1.0, 0.7], [-0.5, 1.2], [0.3, 0.3]], dtype=torch.float64)
    y = torch.randn(frames, 3, generator=seeded(), dtype=torch.float64) + 1
    step = torch.eye(6, dtype=torch.float64) - 0.5 * torch.diag(
        torch.ones(4, dtype=torch.float64), -2
    )  # z → u
    prior = step.T @ torch.tensor([1.0, 2.0] * frames, dtype=torch.float64).diag() @ step
    precision = prior + 2 * torch.block_diag(*[A.T @ A] * frames)
    covariance = precision.inverse()
    mean = covariance @ (2 * y @ A).flatten()

    e_step = Latents(
        model, torch.ones(frames, 2), Settings("langevin", rate=eta, chains=chains), seeded()
    )
    for _ in range(1_500):
        _, cost = e_step.decode(torch.zeros(1, frames, 2))
        loss = (y - e_step.latents[0] @ A.T).square().sum() + cost.sum()
        (e_step.latents[0].grad,) = torch.autograd.grad(loss, e_step.latents)
        e_step.step()
    samples = e_step.latents[0].detach().flatten(1)
    spread = e_step.spreads[0].double().repeat(frames)
    bias = eta / 4 * torch.linalg.eigvalsh(spread[:, None] * precision * spread).max()
    variances = covariance.diag()
    assert bias < 0.03
    assert ((samples.mean(0) - mean).abs() < 5 * (variances / chains).sqrt()).all()
    product = variances[:, None] * variances
    error = (samples.T.cov() - covariance).abs()
    assert (
        error < 5 * ((product + covariance.square()) / chains).sqrt() + bias * product.sqrt()
    ).all()


class Band(torch.nn.Module):
    """Speech in a band of the lower half, where z says; the encoder is mistaken about where."""

    def __init__(self, mistaken: torch.Tensor, bins: int):
        super().__init__()
        self.mistaken, self.input_scale = mistaken, InputScale(bins, "root")
        self.register_buffer("place", torch.linspace(0, 1, bins))

    def draw_noise(self, *_):
        return None

    def forward(self, _x, _noise):
        return SimpleNamespace(q_z=Gaussian(self.mistaken[None, :, None], self.mistaken), q_w=None)

    def score(self, _x_past, z, _w=None):
        return Score(
            10 * torch.exp(-(((self.place - 0.25 - 0.15 * torch.tanh(z)) / 0.1) ** 2)) - 12
        )


def test_speech_and_noise_that_lie_on_their_models_are_told_apart():
    """From a wrong z, whose band lets only part of the speech through, both steps have to find the right one."""
    stft, frames = STFT(256, 64), 250
    time = torch.arange(frames)
    z = torch.sin(time / 10)
    model = Band(z + 0.8 * torch.cos(time / 7), stft.bins)
    speech = model.score(None, z[None, :, None]).log_variance[0].div(2).exp()
    noise = (torch.linspace(0, 1, stft.bins) > 0.7) * (1.5 + torch.sin(time / 20))[:, None] * 0.3
    parts = [
        stft.synthesise(
            power * torch.randn(frames, stft.bins, dtype=torch.complex64, generator=seeded(k))
        )
        for k, power in enumerate((speech, noise))
    ]
    for method in ("peem", "ldem"):
        ratios = []
        for rate in (0.0, 0.1):  # z that stays where it was put, and that moves
            settings = Settings(method, 150, rank=1, rate=rate, noise=0.01, encoder=0.0)
            ratios.append(
                si_sdr(
                    enhance_speech(model, stft, sum(parts), settings)[0].numpy(), parts[0].numpy()
                )
            )
        assert ratios[1] > 20 > ratios[0] + 3, ratios


RATES = {"vem": 0.003, "langevin": 0.003}


@pytest.mark.parametrize("method", E_STEPS)
@pytest.mark.parametrize("name", DVAES)
def test_every_model_with_every_e_step(name, method):
    """The objective falls farther than by the M-step alone, the same seed gives the same, and the model stays. Samples
    of the posterior lie around its mode, and may start nearer to it."""
    model, stft = small(name, bins=33), STFT(64, 16)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    noisy = torch.randn(800, generator=seeded())
    settings = Settings(
        method, iterations=12, rank=2, chains=2, rate=RATES.get(method, 0.03), noise=0.001
    )
    found, ((*_, objective),) = enhance_speech(model, stft, noisy, settings)
    _, ((*_, still),) = enhance_speech(model, stft, noisy, replace(settings, rate=0.0, noise=0.0))
    assert found.shape == noisy.shape and found.isfinite().all() and still[-1] < still[0]
    assert objective[-1] != still[-1] if method == "langevin" else objective[-1] < still[-1]
    assert torch.equal(found, enhance_speech(model, stft, noisy, settings)[0])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(
        parameter.grad is not None and parameter.grad.any() for parameter in model.parameters()
    )


@pytest.mark.parametrize("name", DVAES)
def test_vem_trains_the_inference_network_alone(name):
    model, power = small(name), torch.rand(6, 9) + 0.1
    e_step = Inference(model, power, Settings("vem", rate=0.1, chains=1), seeded())
    speech, cost = e_step.decode(torch.rand(1, 6, 9))
    (speech.sum() + cost.sum()).backward()
    e_step.step()
    z, w = (
        torch.randn(1, 6, 3),
        [torch.randn(1, n) for n in [getattr(model.config, "w_latent", 0)] if n],
    )
    scores = [one.score(torch.ones(1, 6, 9), z, *w) for one in (model, e_step.model)]
    assert torch.equal(scores[0].log_variance, scores[1].log_variance)
    if scores[0].p_z is not None:
        assert torch.equal(scores[0].p_z.mean, scores[1].p_z.mean)
    x, noise = power[None], model.draw_noise(1, 6, seeded())
    assert not torch.equal(model(x, noise).q_z.mean, e_step.model(x, noise).q_z.mean)


@pytest.mark.parametrize(("method", "stops"), [("peem", True), ("ldem", False)])
def test_peem_stops_where_nothing_moves(method, stops):
    settings = Settings(method, iterations=300, rank=1, rate=1e-7, chains=1)
    _, _, objective = gains_of(small("vae"), torch.rand(6, 9) + 0.1, settings, seeded())
    assert (len(objective) < 300) == stops


@pytest.mark.parametrize("samples", [1, 1_600, 160_000, 160_001, 500_000, 1_234_567])
def test_blocks_cover_a_recording(samples):
    total = torch.zeros(samples)
    for start, stop, weight in blocks(samples):
        assert stop - start <= enhancement.BLOCK
        total[start:stop] += weight
    torch.testing.assert_close(total, torch.ones(samples))


def test_silence_level_and_short_recordings():
    model, stft, settings = small("vae", bins=33), STFT(64, 16), Settings(iterations=3, rank=2)
    assert not enhance_speech(model, stft, torch.zeros(500), settings)[0].any()
    assert enhance_speech(model, stft, torch.ones(1), settings)[0].isfinite().all()
    noisy = torch.randn(700)
    quiet, loud = (enhance_speech(model, stft, gain * noisy, settings)[0] for gain in (2**-10, 1.0))
    torch.testing.assert_close(quiet * 2**10, loud)


def test_a_share_of_the_gains_is_the_encoders():
    """As the settings say; its noise is not what the search starts from."""
    model, power = small("vae", bins=33), torch.rand(20, 33, generator=seeded()) + 1e-3
    with torch.no_grad():
        search, half, encoder = (
            gains_of(model, power, Settings("peem", 5, chains=1, encoder=share), seeded())[0]
            for share in (0, 0.5, 1)
        )
        observation = Observation(power, 8, 4, seeded())
        before = observation.noise
        own = enhancement.encoder_gains(model, observation, seeded())
    torch.testing.assert_close(half, (search + encoder) / 2)
    torch.testing.assert_close(own, encoder)
    assert torch.equal(before, observation.noise) and not torch.allclose(search, encoder)


def test_study_of_limits(speech, shipped, capsys):
    assert call(enhancement_limits, shipped, "--data", speech, "--limit", 1) == 0
    rows = [line.rsplit("  ", 2) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 10 and all(row in str(rows) for row in enhancement_limits.ROWS)


def test_long_recordings_by_blocks(monkeypatch):
    """The noise of a block is where the next one starts, and seams are not heard: what is let through is as it was."""
    monkeypatch.setattr(enhancement, "BLOCK", 2_000)
    monkeypatch.setattr(enhancement, "OVERLAP", 400)
    model, stft = small("vae", bins=33), STFT(64, 16)
    noisy = torch.randn(7_000, generator=seeded())
    noisy[3_000:5_000] = 0  # a block of silence is passed over
    starts, gains_of = [], enhancement.gains_of

    def open_gains(model, power, settings, generator, spectra, tick):
        starts.append(spectra)
        gains, *learned = gains_of(model, power, settings, generator, spectra, tick)
        return torch.ones_like(gains), *learned

    monkeypatch.setattr(enhancement, "gains_of", open_gains)
    found, learned = enhance_speech(model, stft, noisy, Settings(iterations=3, rank=2))
    torch.testing.assert_close(found, noisy, atol=1e-5, rtol=1e-4)
    assert starts[0] is None and len(starts) == len(learned) == 5
    assert all(
        torch.equal(start, spectra)
        for start, (_, spectra, _) in zip(starts[1:], learned, strict=False)
    )


def test_silence_at_the_end_changes_little():
    """What is digitally silent says nothing of the noise."""
    model, stft, settings = small("vae", bins=33), STFT(64, 16), Settings(iterations=10, rank=2)
    noisy = torch.randn(4_000, generator=seeded()) * (1 + torch.arange(4_000) // 1_000 % 2)
    alone, _ = enhance_speech(model, stft, noisy, settings)
    padded, _ = enhance_speech(model, stft, torch.cat([noisy, torch.zeros(4_000)]), settings)
    assert si_sdr(padded[:4_000].numpy(), alone.numpy()) > 20


def test_baselines(speech):
    """log-MMSE takes white noise away, and the filter that knows both is ahead of it."""
    clean, _ = soundfile.read(min(speech.rglob("*.wav")), dtype="float32")
    noisy = clean + np.std(clean) * np.random.default_rng(0).standard_normal(len(clean)).astype(
        np.float32
    )
    classical, ceiling = (
        si_sdr(log_mmse(noisy), clean),
        si_sdr(oracle(Mixture("a", 0.0, clean, noisy)), clean),
    )
    assert 3 < classical < ceiling - 3


# ---- the commands -----------------------------------------------------------------------------------------


def test_the_face(shipped, speech):
    waveform, rate = soundfile.read(next(speech.rglob("*.wav")), dtype="float32")
    assert minidvae.enhance(waveform[:4000], rate, shipped, "peem").shape == (4000,)


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
    folder = enhancement.load_run.__globals__["PRETRAINED"] / f"{shipped}.pt"
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


def test_task(speech, capsys):
    arguments = [
        "--recipe",
        "quick",
        "--data",
        speech,
        "--run",
        "run",
        "--steps",
        2,
        "--set",
        "frames=20",
        "batch=4",
    ]
    assert call(train_script, "--model", "vae", *arguments) == 0
    task = ["run", "--task", "enhancement", "--iterations", 2]
    assert call(evaluate_script, *task, "--limit", 2, "--snr", 0, 10, "--json", "all.json") == 0
    out = capsys.readouterr().out
    assert all(words in out for words in ("0 dB", "10 dB", "log-MMSE", "oracle Wiener", "RTF"))
    (result,) = json.loads(Path("all.json").read_text())
    assert len(result["utterances"]) == 4 and result["settings"]["iterations"] == 2
    rows = {name: rows[0] for name, rows in result["baselines"].items()}
    assert (
        rows["noisy"]["si_sdr"] == pytest.approx(0, abs=0.5) and rows["noisy"]["si_sdr_gain"] == 0
    )
    assert rows["oracle Wiener"]["si_sdr"] > rows["log-MMSE"]["si_sdr"]
    assert len(list(Path("run/eval/enhancement").glob("*.wav"))) == 9

    Path("pairs").mkdir()
    Path("empty").mkdir()
    clean, rate = soundfile.read(next(speech.rglob("*.wav")))
    soundfile.write("pairs/clean-a.wav", clean, rate)
    soundfile.write(
        "pairs/noisy-a.wav",
        clean + 0.05 * np.random.default_rng(0).standard_normal(len(clean)),
        rate,
    )
    assert (
        call(evaluate_script, *task, "--pairs", "pairs") == 0
        and "recorded pairs" in capsys.readouterr().out
    )
    assert call(evaluate_script, *task, "--limit", 1, "--noise", "pairs") == 0
    assert (
        call(evaluate_script, *task, "--noise", "empty") == 2
        and "no sound of noise" in capsys.readouterr().err
    )
    assert (
        call(evaluate_script, *task, "--pairs", "empty") == 2 and "clean" in capsys.readouterr().err
    )
    assert (
        call(evaluate_script, *task, "--pairs", "pairs", "--snr", 3) == 2
        and "--snr" in capsys.readouterr().err
    )
    assert call(evaluate_script, *task, "--snr", "nan") == 2 and "finite" in capsys.readouterr().err
    assert (
        call(evaluate_script, "run", "--snr", 3) == 2 and "enhancement" in capsys.readouterr().err
    )


def test_mixtures_have_the_ratio_that_was_asked_for(speech):
    test = load_corpus(speech).split("test")
    for clips in (None, [np.ones(100, np.float32)]):
        for snr in (-5.0, 7.0):
            mixture = mix(test, 1, snr, clips, seed=0)
            noise = mixture.noisy - mixture.clean
            assert 10 * np.log10(np.mean(mixture.clean**2) / np.mean(noise**2)) == pytest.approx(
                snr, abs=0.01
            )
            assert np.array_equal(mixture.noisy, mix(test, 1, snr, clips, seed=0).noisy)
