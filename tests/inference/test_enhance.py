"""Enhancement of a recording: the equations on cases whose answer is known, every model with every
E-step."""

import itertools
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
    noisy_speech = NoisySpeech(power, 3, hold, seeded(seed))
    costs = []
    for _ in range(100):
        costs.append(noisy_speech.cost(speech).sum().item())
        noisy_speech.update(speech)
    for before, after in itertools.pairwise(costs):
        assert after <= before + 1e-9 * abs(before)
    assert costs[-1] < costs[0]
    torch.testing.assert_close(noisy_speech.spectra.sum(1), torch.ones(3, dtype=torch.float64))


def test_the_response_of_a_microphone_is_found():
    """The gains of speech whose power differs from its model by a curve over frequency must follow
    this curve, with one gain for each band."""
    frames = 300
    bins = 65
    generator = seeded()
    speech = torch.randn(1, frames, bins, generator=generator, dtype=torch.float64).mul(2).exp()
    log_response = torch.linspace(-2, 2, bins, dtype=torch.float64)
    periodogram = torch.empty_like(speech[0]).exponential_(generator=generator)
    power = 1e-3 * speech[0] * log_response.exp() * periodogram
    noisy_speech = NoisySpeech(power, 1, 4, generator)
    for _ in range(200):
        noisy_speech.update(speech)
    log_gain = noisy_speech.gain.log().mean(0)
    band = noisy_speech.bands.argmax(1)
    errors = []
    for k in band.unique():
        errors.append(log_gain[band == k].mean() - log_response[band == k].mean())
        assert noisy_speech.gain[0, band == k].unique().numel() == 1
    errors = torch.stack(errors)
    assert (errors - errors.mean()).abs().max() < 0.3


@pytest.mark.parametrize("name", DVAES)
def test_gradients_of_the_posterior(name):
    """Gradients of −log p(x, z, w) by autograd must be those of finite differences."""
    model = small(name).double()
    power = torch.rand(4, 9, dtype=torch.float64) + 0.1
    e_step = LatentOptimisation(model, power, EnhancementSettings(chains=2), seeded())
    noisy_speech = NoisySpeech(power, 2, 1, seeded())
    x_past = torch.rand(1, 4, 9, dtype=torch.float64)

    def objective(*latents: torch.Tensor) -> torch.Tensor:
        e_step.latents = list(latents)
        speech, cost = e_step.decode(x_past)
        return (noisy_speech.cost(speech) + cost).sum()

    assert torch.autograd.gradcheck(objective, tuple(e_step.latents))


class LinearGaussian(torch.nn.Module):
    """A model with the prior z_t = ½ z_{t−1} + u_t, u_t ~ N(0, diag(1, ½))."""

    def draw_noise(self, *_):
        return None

    def forward(self, x, _noise):
        rising = torch.linspace(-1, 1, x.shape[1])
        falling = torch.linspace(1, -2, x.shape[1])
        mean = torch.stack([rising, falling], 1)[None].double()
        return SimpleNamespace(q_z=Gaussian(mean, mean), q_w=None)

    def score(self, _x_past, z, _w=None):
        log_variance = torch.tensor([1.0, 0.5], dtype=z.dtype).log().expand_as(z)
        return Score(torch.zeros_like(z), Gaussian(past(z) / 2, log_variance))


def test_langevin_draws_from_the_posterior():
    """The samples must have the mean and covariance of the posterior, which is known for a
    linear-Gaussian prior and y = A z + e with e ~ N(0, ½). Each chain gives one sample, so that
    these are independent, and five standard errors of mean and covariance are allowed. In addition
    the variance may be larger by η·λ/4, because Langevin steps of size η are known to widen a
    Gaussian of precision λ by so much."""
    frames = 3
    chains = 4_000
    eta = 0.01
    A = torch.tensor([[1.0, 0.7], [-0.5, 1.2], [0.3, 0.3]], dtype=torch.float64)
    y = torch.randn(frames, 3, generator=seeded(), dtype=torch.float64) + 1
    identity = torch.eye(6, dtype=torch.float64)
    z_to_u = identity - 0.5 * torch.diag(torch.ones(4, dtype=torch.float64), -2)
    u_precision = torch.tensor([1.0, 2.0] * frames, dtype=torch.float64).diag()
    prior_precision = z_to_u.T @ u_precision @ z_to_u
    precision = prior_precision + 2 * torch.block_diag(*[A.T @ A] * frames)
    covariance = precision.inverse()
    mean = covariance @ (2 * y @ A).flatten()

    settings = EnhancementSettings("langevin", rate=eta, chains=chains)
    e_step = LatentOptimisation(LinearGaussian(), torch.ones(frames, 2), settings, seeded())
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
    standard_error = ((product + covariance.square()) / chains).sqrt()
    assert (error < 5 * standard_error + bias * product.sqrt()).all()


class Band(torch.nn.Module):
    """A model of speech in a band of the lower half of the spectrum, whose centre depends on z. Its
    encoder returns `encoded_z` (frames,), whatever the input."""

    def __init__(self, encoded_z: torch.Tensor, bins: int):
        super().__init__()
        self.encoded_z = encoded_z
        self.input_scale = InputScale(bins, "root")
        self.register_buffer("frequency", torch.linspace(0, 1, bins))

    def draw_noise(self, *_):
        return None

    def forward(self, _x, _noise):
        q_z = Gaussian(self.encoded_z[None, :, None], self.encoded_z)
        return SimpleNamespace(q_z=q_z, q_w=None)

    def score(self, _x_past, z, _w=None):
        centre = 0.25 + 0.15 * torch.tanh(z)
        return Score(10 * torch.exp(-(((self.frequency - centre) / 0.1) ** 2)) - 12)


def test_speech_and_noise_that_lie_on_their_models_are_told_apart():
    """The search starts from a wrong z, whose band lets only part of the speech through. E-step and
    M-step together must find the right one."""
    stft = STFT(256, 64)
    frames = 250
    time = torch.arange(frames)
    z = torch.sin(time / 10)
    model = Band(z + 0.8 * torch.cos(time / 7), stft.bins)
    magnitude = model.score(None, z[None, :, None]).log_variance[0].div(2).exp()
    noise_magnitude = 0.3 * (torch.linspace(0, 1, stft.bins) > 0.7).float()
    noise_magnitude = noise_magnitude * (1.5 + torch.sin(time / 20))[:, None]
    speech = random_waveform(stft, magnitude, seeded(0))
    noise = random_waveform(stft, noise_magnitude, seeded(1))
    for method in ("peem", "ldem"):
        ratios = {}
        for rate in (0.0, 0.1):  # With rate 0, z stays that of the encoder.
            settings = EnhancementSettings(method, 150, rank=1, rate=rate, noise=0.01, encoder=0.0)
            enhanced, _ = enhance_speech(model, stft, speech + noise, settings)
            ratios[rate] = si_sdr(enhanced.numpy(), speech.numpy())
        assert ratios[0.1] > 20 > ratios[0.0] + 3, ratios


def random_waveform(stft: STFT, magnitude: torch.Tensor, generator: torch.Generator):
    """Return a Gaussian waveform whose STFT has these standard deviations (frames, bins)."""
    spectrum = torch.randn(*magnitude.shape, dtype=torch.complex64, generator=generator)
    return stft.synthesise(magnitude * spectrum)


RATES = {"vem": 0.003, "langevin": 0.003}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", DVAES)
def test_every_model_with_every_e_step(name, method):
    """The objective must fall farther than by the M-step alone, the same seed must give the same
    result, and the model must stay as it was. Samples of the posterior (method langevin) lie around
    its mode and may start nearer to it, so that their objective may also rise."""
    model = small(name, bins=33)
    stft = STFT(64, 16)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    noisy = torch.randn(800, generator=seeded())
    rate = RATES.get(method, 0.03)
    settings = EnhancementSettings(method, 12, rank=2, chains=2, rate=rate, noise=0.001)
    enhanced, ((*_, objective),) = enhance_speech(model, stft, noisy, settings)
    m_step_alone = replace(settings, rate=0.0, noise=0.0)
    _, ((*_, m_step_objective),) = enhance_speech(model, stft, noisy, m_step_alone)
    assert enhanced.shape == noisy.shape and enhanced.isfinite().all()
    assert m_step_objective[-1] < m_step_objective[0]
    if method == "langevin":
        assert objective[-1] != m_step_objective[-1]
    else:
        assert objective[-1] < m_step_objective[-1]
    assert torch.equal(enhanced, enhance_speech(model, stft, noisy, settings)[0])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    for parameter in model.parameters():
        assert parameter.grad is None or not parameter.grad.any()


@pytest.mark.parametrize("name", DVAES)
def test_vem_trains_the_inference_network_alone(name):
    """After a step of VEM, decoder and prior must be those of the model, and q(z) another one."""
    model = small(name)
    power = torch.rand(6, 9) + 0.1
    settings = EnhancementSettings("vem", rate=0.1, chains=1)
    e_step = EncoderFineTuning(model, power, settings, seeded())
    speech, cost = e_step.decode(torch.rand(1, 6, 9))
    (speech.sum() + cost.sum()).backward()
    e_step.step()
    x_past = torch.ones(1, 6, 9)
    z = torch.randn(1, 6, 3)
    w_latent = getattr(model.config, "w_latent", 0)
    w = torch.randn(1, w_latent) if w_latent else None
    before = model.score(x_past, z, w)
    after = e_step.model.score(x_past, z, w)
    assert torch.equal(before.log_variance, after.log_variance)
    if before.p_z is not None:
        assert torch.equal(before.p_z.mean, after.p_z.mean)
    x = power[None]
    noise = model.draw_noise(1, 6, seeded())
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
    """Silence must stay silent, one sample must give a finite one, and the result must not depend
    on the level of the recording."""
    model = small("vae", bins=33)
    stft = STFT(64, 16)
    settings = EnhancementSettings(iterations=3, rank=2)
    enhanced, _ = enhance_speech(model, stft, torch.zeros(500), settings)
    assert not enhanced.any()
    enhanced, _ = enhance_speech(model, stft, torch.ones(1), settings)
    assert enhanced.isfinite().all()
    noisy = torch.randn(700)
    quiet, _ = enhance_speech(model, stft, 2**-10 * noisy, settings)
    loud, _ = enhance_speech(model, stft, noisy, settings)
    torch.testing.assert_close(quiet * 2**10, loud)


def test_a_share_of_the_gains_is_the_encoders():
    """The gains must be the mean of those of the search and of the encoder, weighted as the
    settings say. The encoder's gains must not change the noise that the search starts from."""
    model = small("vae", bins=33)
    power = torch.rand(20, 33, generator=seeded()) + 1e-3
    gains = {}
    with torch.no_grad():
        for share in (0, 0.5, 1):
            settings = EnhancementSettings("peem", 5, chains=1, encoder=share)
            gains[share], *_ = find_gains(model, power, settings, seeded())
        noisy_speech = NoisySpeech(power, 8, 4, seeded())
        noise_before = noisy_speech.noise
        encoder_gains = enhancement.encoder_gains(model, noisy_speech, seeded())
    torch.testing.assert_close(gains[0.5], (gains[0] + gains[1]) / 2)
    torch.testing.assert_close(encoder_gains, gains[1])
    assert torch.equal(noise_before, noisy_speech.noise)
    assert not torch.allclose(gains[0], gains[1])


def test_long_recordings_by_blocks(monkeypatch):
    """The search of a block must start from the noise of the block before it. Blocks must be joined
    without seams: with all gains 1 the recording must stay as it was."""
    monkeypatch.setattr(enhancement, "BLOCK", 2_000)
    monkeypatch.setattr(enhancement, "OVERLAP", 400)
    noisy = torch.randn(7_000, generator=seeded())
    noisy[3_000:5_000] = 0  # A block of silence is not searched.
    initial_spectra = []

    def gains_of_one(model, power, settings, generator, spectra, on_iteration):
        initial_spectra.append(spectra)
        gains, *learned = find_gains(model, power, settings, generator, spectra, on_iteration)
        return torch.ones_like(gains), *learned

    monkeypatch.setattr(enhancement, "find_gains", gains_of_one)
    settings = EnhancementSettings(iterations=3, rank=2)
    enhanced, learned = enhance_speech(small("vae", bins=33), STFT(64, 16), noisy, settings)
    torch.testing.assert_close(enhanced, noisy, atol=1e-5, rtol=1e-4)
    assert initial_spectra[0] is None and len(initial_spectra) == len(learned) == 5
    for initial, (_, spectra, _) in zip(initial_spectra[1:], learned[:-1], strict=True):
        assert torch.equal(initial, spectra)


def test_silence_at_the_end_changes_little():
    """Fails if digital silence counts as a sample of the noise."""
    model = small("vae", bins=33)
    stft = STFT(64, 16)
    settings = EnhancementSettings(iterations=10, rank=2)
    noisy = torch.randn(4_000, generator=seeded()) * (1 + torch.arange(4_000) // 1_000 % 2)
    alone, _ = enhance_speech(model, stft, noisy, settings)
    padded, _ = enhance_speech(model, stft, torch.cat([noisy, torch.zeros(4_000)]), settings)
    assert si_sdr(padded[:4_000].numpy(), alone.numpy()) > 20


def test_from_python(shipped, speech):
    """Arrays and tensors must be taken, at any rate. A waveform of a wrong shape, an unknown method
    or a model that is no DVAE must be a ValueError."""
    waveform, rate = soundfile.read(next(speech.rglob("*.wav")), dtype="float32")
    waveform = waveform[:4000]
    enhanced = minidvae.enhance(waveform, rate, shipped, "peem")
    assert enhanced.shape == (4000,) and enhanced.dtype == np.float32
    enhanced_tensor = minidvae.enhance(torch.from_numpy(waveform), rate, shipped, "peem")
    assert np.array_equal(enhanced, enhanced_tensor)
    assert minidvae.enhance(waveform, 2 * rate, shipped, "peem").shape == (2000,)
    for arguments, message in (
        ((waveform[None], rate, shipped), "shape"),
        ((waveform * np.nan, rate, shipped), "finite"),
        ((waveform, rate, shipped, "magic"), "vem, peem, ldem, langevin"),
        ((waveform, rate, "fhvae-librispeech"), "no such run folder|expected a DVAE"),
    ):
        with pytest.raises(ValueError, match=message):
            minidvae.enhance(*arguments)
