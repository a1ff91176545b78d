"""Enhancement of a recording: the equations on cases whose answer is known, every model and every E-step."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch

import minidvae
from minidvae.data.audio import STFT
from minidvae.evaluation.metrics import si_sdr
from minidvae.inference import enhance as enhancement
from minidvae.inference.enhance import (
    METHODS,
    EncoderFineTuning,
    EnhancementSettings,
    LatentOptimisation,
    NoisySpeech,
    blocks,
    enhance_speech,
    find_gains,
)
from minidvae.models import MODELS, build_model
from minidvae.models.base import DVAE, Gaussian, InputScale, Score, past
from minidvae.models.light_dvae import LigHTDVAE

DVAES = [name for name, (kind, _) in MODELS.items() if issubclass(kind, DVAE)]
SMALL = {"width": 8, "feedforward": 8, "layers": 1, "w_embedding": 4, "w_hidden": 4, "w_layers": 1}


def small(name: str, bins: int = 9, **config) -> DVAE:
    torch.manual_seed(0)
    sizes = SMALL if issubclass(MODELS[name][0], LigHTDVAE) else {}
    if "local" in name:
        sizes = sizes | {"context": 3, "phases": 2}
    return build_model(name, bins=bins, latent=3, input_scale="root", **sizes | config).eval()


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("chains", "hold"), [(1, 1), (3, 1), (3, 6)])
@pytest.mark.parametrize("seed", range(4))
def test_the_m_step_never_raises_the_objective(chains, hold, seed):
    power = torch.rand(20, 9, generator=seeded(seed), dtype=torch.float64).exp() * 3
    speech = torch.rand(chains, 20, 9, generator=seeded(seed + 9), dtype=torch.float64) * 2 + 1e-3
    noisy_speech, costs = NoisySpeech(power, 3, hold, seeded(seed)), []
    for _ in range(100):
        costs.append(noisy_speech.cost(speech).sum().item())
        noisy_speech.update(speech)
    assert all(
        after <= before + 1e-9 * abs(before)
        for before, after in zip(costs, costs[1:], strict=False)
    )
    assert costs[-1] < costs[0]
    torch.testing.assert_close(noisy_speech.spectra.sum(1), torch.ones(3, dtype=torch.float64))


def test_the_response_of_a_microphone_is_found():
    """Speech that lies on its model but for a curve over frequency."""
    frames, bins, random = 300, 65, seeded()
    speech = torch.randn(1, frames, bins, generator=random, dtype=torch.float64).mul(2).exp()
    curve = torch.linspace(-2, 2, bins, dtype=torch.float64)
    power = (
        1e-3 * speech[0] * curve.exp() * torch.empty_like(speech[0]).exponential_(generator=random)
    )
    noisy_speech = NoisySpeech(power, 1, 4, random)
    for _ in range(200):
        noisy_speech.update(speech)
    found, band = noisy_speech.gain.log().mean(0), noisy_speech.bands.argmax(1)
    found, expected = (
        torch.stack([x[band == k].mean() for k in band.unique()]) for x in (found, curve)
    )
    assert (found - expected - (found - expected).mean()).abs().max() < 0.3
    assert all(noisy_speech.gain[0, band == k].unique().numel() == 1 for k in band.unique())


@pytest.mark.parametrize("name", DVAES)
def test_gradients_of_the_posterior(name):
    """Of −log p(x, z, w) by autograd and by finite differences."""
    model = small(name).double()
    power = torch.rand(4, 9, dtype=torch.float64) + 0.1
    e_step = LatentOptimisation(model, power, EnhancementSettings(chains=2), seeded())
    noisy_speech, x_past = (
        NoisySpeech(power, 2, 1, seeded()),
        torch.rand(1, 4, 9, dtype=torch.float64),
    )

    def objective(*latents: torch.Tensor) -> torch.Tensor:
        e_step.latents = list(latents)
        speech, cost = e_step.decode(x_past)
        return (noisy_speech.cost(speech) + cost).sum()

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

    e_step = LatentOptimisation(
        model,
        torch.ones(frames, 2),
        EnhancementSettings("langevin", rate=eta, chains=chains),
        seeded(),
    )
    for _ in range(1_500):
        _, cost = e_step.decode(torch.zeros(1, frames, 2))
        loss = (y - e_step.latents[0] @ A.T).square().sum() + cost.sum()
        (e_step.latents[0].grad,) = torch.autograd.grad(loss, e_step.latents)
        e_step.step()
    samples = e_step.latents[0].detach().flatten(1)
    spread = e_step.deviations[0].double().repeat(frames)
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
            settings = EnhancementSettings(method, 150, rank=1, rate=rate, noise=0.01, encoder=0.0)
            ratios.append(
                si_sdr(
                    enhance_speech(model, stft, sum(parts), settings)[0].numpy(), parts[0].numpy()
                )
            )
        assert ratios[1] > 20 > ratios[0] + 3, ratios


RATES = {"vem": 0.003, "langevin": 0.003}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", DVAES)
def test_every_model_with_every_e_step(name, method):
    """The objective falls farther than by the M-step alone, the same seed gives the same, and the model stays. Samples
    of the posterior lie around its mode, and may start nearer to it."""
    model, stft = small(name, bins=33), STFT(64, 16)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    noisy = torch.randn(800, generator=seeded())
    settings = EnhancementSettings(
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
    e_step = EncoderFineTuning(
        model, power, EnhancementSettings("vem", rate=0.1, chains=1), seeded()
    )
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
    settings = EnhancementSettings(method, iterations=300, rank=1, rate=1e-7, chains=1)
    _, _, objective = find_gains(small("vae"), torch.rand(6, 9) + 0.1, settings, seeded())
    assert (len(objective) < 300) == stops


@pytest.mark.parametrize("samples", [1, 1_600, 160_000, 160_001, 500_000, 1_234_567])
def test_blocks_cover_a_recording(samples):
    total = torch.zeros(samples)
    for start, stop, weight in blocks(samples):
        assert stop - start <= enhancement.BLOCK
        total[start:stop] += weight
    torch.testing.assert_close(total, torch.ones(samples))


def test_silence_level_and_short_recordings():
    model, stft, settings = (
        small("vae", bins=33),
        STFT(64, 16),
        EnhancementSettings(iterations=3, rank=2),
    )
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
            find_gains(
                model, power, EnhancementSettings("peem", 5, chains=1, encoder=share), seeded()
            )[0]
            for share in (0, 0.5, 1)
        )
        noisy_speech = NoisySpeech(power, 8, 4, seeded())
        before = noisy_speech.noise
        own = enhancement.encoder_gains(model, noisy_speech, seeded())
    torch.testing.assert_close(half, (search + encoder) / 2)
    torch.testing.assert_close(own, encoder)
    assert torch.equal(before, noisy_speech.noise) and not torch.allclose(search, encoder)


def test_long_recordings_by_blocks(monkeypatch):
    """The noise of a block is where the next one starts, and seams are not heard: what is let through is as it was."""
    monkeypatch.setattr(enhancement, "BLOCK", 2_000)
    monkeypatch.setattr(enhancement, "OVERLAP", 400)
    model, stft = small("vae", bins=33), STFT(64, 16)
    noisy = torch.randn(7_000, generator=seeded())
    noisy[3_000:5_000] = 0  # a block of silence is passed over
    starts = []

    def open_gains(model, power, settings, generator, spectra, on_iteration):
        starts.append(spectra)
        gains, *learned = find_gains(model, power, settings, generator, spectra, on_iteration)
        return torch.ones_like(gains), *learned

    monkeypatch.setattr(enhancement, "find_gains", open_gains)
    found, learned = enhance_speech(model, stft, noisy, EnhancementSettings(iterations=3, rank=2))
    torch.testing.assert_close(found, noisy, atol=1e-5, rtol=1e-4)
    assert starts[0] is None and len(starts) == len(learned) == 5
    assert all(
        torch.equal(start, spectra)
        for start, (_, spectra, _) in zip(starts[1:], learned, strict=False)
    )


def test_silence_at_the_end_changes_little():
    """What is digitally silent says nothing of the noise."""
    model, stft, settings = (
        small("vae", bins=33),
        STFT(64, 16),
        EnhancementSettings(iterations=10, rank=2),
    )
    noisy = torch.randn(4_000, generator=seeded()) * (1 + torch.arange(4_000) // 1_000 % 2)
    alone, _ = enhance_speech(model, stft, noisy, settings)
    padded, _ = enhance_speech(model, stft, torch.cat([noisy, torch.zeros(4_000)]), settings)
    assert si_sdr(padded[:4_000].numpy(), alone.numpy()) > 20


def test_from_python(shipped, speech):
    """Arrays and tensors, at any rate; what is no waveform, no method or no DVAE is a ValueError."""
    waveform, rate = soundfile.read(next(speech.rglob("*.wav")), dtype="float32")
    found = minidvae.enhance(waveform[:4000], rate, shipped, "peem")
    assert found.shape == (4000,) and found.dtype == np.float32
    same = minidvae.enhance(torch.from_numpy(waveform[:4000]), rate, shipped, "peem")
    assert np.array_equal(found, same)
    assert minidvae.enhance(waveform[:4000], 2 * rate, shipped, "peem").shape == (2000,)
    for arguments, message in (
        ((waveform[None, :4000], rate, shipped), "shape"),
        ((waveform[:4000] * np.nan, rate, shipped), "finite"),
        ((waveform[:4000], rate, shipped, "magic"), "vem, peem, ldem, langevin"),
        ((waveform[:4000], rate, "fhvae-librispeech"), "no such run folder|expected a DVAE"),
    ):
        with pytest.raises(ValueError, match=message):
            minidvae.enhance(*arguments)
