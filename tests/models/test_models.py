"""The DVAE contract, and what each model may depend on."""

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from minidvae.models import build_model
from minidvae.models.base import Gaussian, InputScale, past
from minidvae.models.light_dvae import VARIANTS

SMALL = {"bins": 9, "latent": 3, "w_latent": 4, "width": 16, "feedforward": 32, "layers": 2}
SMALL |= {"w_embedding": 8, "w_hidden": 8, "w_layers": 1}
LOCAL = {"context": 5, "phases": 2, "heads": 2}
TRANSFORMERS = [("hit_dvae", {"variant": variant}) for variant in VARIANTS]
TRANSFORMERS += [("light_dvae", {"variant": variant}) for variant in VARIANTS]
TRANSFORMERS += [("hit_dvae_local", LOCAL), ("light_dvae_local", LOCAL)]


def small(name: str, **config) -> torch.nn.Module:
    torch.manual_seed(0)
    settings = SMALL if "dvae" in name else {"bins": 9, "latent": 3, "hidden": (8,)}
    return build_model(name, **(settings | config)).double().eval()


def spectrum(batch=2, frames=7, bins=9) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return 4 * torch.rand(batch, frames, bins, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(("name", "millions"), [("light_dvae", 17.46), ("hit_dvae", 21.75)])
def test_parameter_counts_are_the_papers(name, millions):
    """The counts must be within 0.5 % of section 3.4, which rounds and leaves the size of the RNN
    for w open."""
    parameters = sum(p.numel() for p in build_model(name).parameters()) / 1e6
    assert parameters == pytest.approx(millions, rel=0.005)


def moved(before: torch.Tensor, after: torch.Tensor) -> list[int]:
    """Return the frames at which any output differs."""
    return (before != after).flatten(2).any(-1).any(0).nonzero().flatten().tolist()


@pytest.mark.parametrize(("name", "config"), TRANSFORMERS)
@pytest.mark.parametrize("frame", [0, 3, 6])
def test_causality_of_every_role(name, config, frame):
    """Fails if a frame of x or z, or w, reaches an output that it must not reach, or does not reach
    one that it must reach."""
    model = small(name, **config)
    x = spectrum()
    positions = model.positions(7)
    all_frames = list(range(7))
    noise = model.draw_noise(2, 7, torch.Generator().manual_seed(2))
    output = model(x, noise)
    z, w = output.z, output.w

    def outputs(x, z, w):
        x_past = past(model.input_scale(x))
        prior = model.prior(past(z), w, x_past, positions)
        q_z = model.infer_z(model.input_scale(x), w)
        return {
            "likelihood": model.likelihood(z, w, x_past, positions),
            "prior": torch.cat(prior, -1),
            "q_z": torch.cat(q_z, -1),
        }

    changed_x = x.clone()
    changed_z = z.clone()
    changed_x[:, frame] += 1
    changed_z[:, frame] += 1
    before = outputs(x, z, w)
    assert torch.equal(before["likelihood"], output.log_variance)
    assert torch.equal(before["prior"], torch.cat(output.p_z, -1))

    after = outputs(changed_x, z, w)
    assert moved(before["likelihood"], after["likelihood"]) == all_frames[frame + 1 :]  # x_{1:t−1}
    assert moved(before["prior"], after["prior"]) == all_frames[frame + 1 :]  # x_{1:t−1}
    assert moved(before["q_z"], after["q_z"]) == all_frames  # x_{1:T}

    after = outputs(x, changed_z, w)
    assert moved(before["likelihood"], after["likelihood"]) == all_frames[frame:]  # z_{1:t}
    assert moved(before["prior"], after["prior"]) == all_frames[frame + 1 :]  # z_{1:t−1}
    assert moved(before["q_z"], after["q_z"]) == []  # q(z_t | x, w) has no z

    after = outputs(x, z, w + 1)
    for role in before:
        assert moved(before[role], after[role]) == all_frames
    assert not torch.equal(model.infer_w(x).mean, model.infer_w(changed_x).mean)


def test_vae_frames_are_independent():
    """Fails if a frame of x reaches the output of another one."""
    model = small("vae")
    x = spectrum()
    noise = model.draw_noise(2, 7, torch.Generator().manual_seed(2))
    changed = x.clone()
    changed[:, 3] += 1
    assert moved(model(x, noise).log_variance, model(changed, noise).log_variance) == [3]


@pytest.mark.parametrize(("name", "config"), TRANSFORMERS)
def test_cached_generation_equals_recomputation(name, config):
    """The decoder with a key-value cache must give what recomputing all past frames at each frame
    gives."""
    model = small(name, **config)
    x = spectrum(frames=12)
    noise = model.draw_noise(2, 12, torch.Generator().manual_seed(2))
    generated = model.resynthesise(x, "generation", noise)
    output = model(x, noise)
    generated_x = torch.zeros_like(x)
    for t in range(12):
        log_variance = model.likelihood(output.z, output.w, past(generated_x), model.positions(12))
        assert torch.allclose(log_variance[:, t], generated[:, t], rtol=0, atol=1e-10)
        generated_x = model.feed_back(log_variance)


@pytest.mark.parametrize(
    ("name", "config"),
    [("light_dvae", {}), ("hit_dvae", {}), ("light_dvae_local", {"context": 4, "phases": 3})],
)
def test_samples_follow_prior_and_likelihood(name, config):
    """A sample must be a fixed point: its z and x put through prior and likelihood must give its
    frames again."""
    model = small(name, **config)
    priors = []  # p(z_t) of each frame, in the order of sampling
    prior = model.prior

    def recording_prior(*arguments, **options):
        priors.append(prior(*arguments, **options))
        return priors[-1]

    model.prior = recording_prior
    log_variance = model.sample(2, 6, torch.Generator().manual_seed(3))
    noise_z, w, _ = model.draw_noise(2, 6, torch.Generator().manual_seed(3))
    z = torch.cat([p_z.sample(noise_z[:, t : t + 1]) for t, p_z in enumerate(priors)], dim=1)
    x_past = past(model.feed_back(log_variance))
    positions = model.positions(6)
    prior_mean = prior(past(z), w, x_past, positions).mean
    expected_mean = torch.cat([p_z.mean for p_z in priors], dim=1)
    assert torch.allclose(prior_mean, expected_mean, atol=1e-10)
    assert torch.allclose(model.likelihood(z, w, x_past, positions), log_variance, atol=1e-10)


@pytest.mark.parametrize("name", ["vae", "hit_dvae", "light_dvae", "light_dvae_local"])
def test_loss_is_the_bound(name):
    """The loss must be −ELBO per frame, here from torch.distributions and the definition of d_IS
    instead of our kernels."""
    model = small(name, beta_z=0.3)
    x = spectrum()
    noise = model.draw_noise(2, 7, torch.Generator().manual_seed(2))
    output = model(x, noise)
    ratio = x / output.log_variance.exp()
    expected = (ratio - ratio.log() - 1).sum()
    p_z = normal(output.p_z) if output.p_z else Normal(0.0, 1.0)
    expected = expected + 0.3 * kl_divergence(normal(output.q_z), p_z).sum()
    if output.q_w:
        kl_w = kl_divergence(normal(output.q_w), Normal(0.0, 1.0)).sum()
        expected = expected + model.config.beta_w * kl_w
    loss, terms = model.loss(x, noise)
    assert loss.item() == pytest.approx(expected.item() / (2 * 7), rel=1e-10)
    assert loss.item() == terms["loss"].item()
    assert not any(term.requires_grad for term in terms.values())


def normal(gaussian: Gaussian) -> Normal:
    return Normal(gaussian.mean, torch.exp(0.5 * gaussian.log_variance))


@pytest.mark.parametrize("name", ["vae", "hit_dvae", "light_dvae", "light_dvae_local"])
def test_given_noise_everything_is_deterministic(name):
    """Fails if resynthesis or sampling makes random draws other than those of its noise."""
    model = small(name)
    x = spectrum()
    noise = model.draw_noise(2, 7, torch.Generator().manual_seed(2))
    for mode in ("generation", "teacher_forcing"):
        assert torch.equal(model.resynthesise(x, mode, noise), model.resynthesise(x, mode, noise))
    first = model.sample(3, 5, torch.Generator().manual_seed(4))
    second = model.sample(3, 5, torch.Generator().manual_seed(4))
    assert torch.equal(first, second) and first.shape == (3, 5, 9)
    with pytest.raises(ValueError, match="teacher_forcing"):
        model.resynthesise(x, "teacher", noise)


@pytest.mark.parametrize("name", ["vae", "hit_dvae", "light_dvae", "light_dvae_local"])
@pytest.mark.parametrize("scale", InputScale.SCALES)
def test_digital_silence_is_finite(name, scale):
    """x = 0 in the middle of an utterance must not put inf or nan into the loss or any gradient."""
    model = small(name, input_scale=scale).float()
    x = spectrum().float()
    model.fit_statistics(x)
    x[:, 2:4] = 0
    model.output.bias.data[0] = -1000.0  # a model that is sure of silence
    loss, _ = model.loss(x[:, 2:4])
    model.output.bias.data[0] = 0.0
    loss, _ = model.loss(x)
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", ["hit_dvae", "light_dvae"])
def test_raw_power_has_finite_gradients(name):
    """Raw power of 10⁷ makes attention scores for which the gradients of a fused kernel
    overflow."""
    torch.manual_seed(0)
    sizes = {"width": 128, "feedforward": 32, "layers": 1}
    sizes |= {"w_embedding": 8, "w_hidden": 8, "w_layers": 1}
    model = build_model(name, input_scale="power", **sizes)
    x = 30 * torch.exp(3 * torch.randn(4, 50, 513))
    model.fit_statistics(x)
    loss, _ = model.loss(x)
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in model.parameters())


def test_input_scale_standardises():
    """Scaled training data must have mean 0 and standard deviation 1 per bin; raw power stays."""
    power = spectrum(50, 40).float() ** 3
    for scale in ("log", "root"):
        module = InputScale(9, scale)
        module.fit(power)
        scaled = module(power).flatten(0, 1)
        assert torch.allclose(scaled.mean(0), torch.zeros(9), atol=1e-4)
        assert torch.allclose(scaled.std(0), torch.ones(9), atol=1e-3)
    assert torch.equal(InputScale(9, "power")(power), power)
    with pytest.raises(ValueError, match="power, log, root"):
        InputScale(9, "mel")


def test_statistics_start_the_output_at_mean_power():
    """The bias must be the constant that minimises the Itakura-Saito divergence."""
    model = small("vae")
    power = spectrum(20, 30)
    model.fit_statistics(power)
    assert torch.allclose(model.output.bias.exp(), power.mean((0, 1)))


@pytest.mark.parametrize("bf16", [False, True])
def test_training_on_the_own_past(bf16):
    """Scheduled sampling with probability 1: no past is the true one, and no gradient goes through
    it. Every weight must still learn, also under autocast, whose cache of cast weights must not
    outlive the pass without gradient."""
    model = small("light_dvae").float()
    x = spectrum().float()
    noise = model.draw_noise(2, 7, torch.Generator().manual_seed(2), scheduled_sampling=True)
    teacher_forced = model(x, noise).log_variance
    on_own_past = model(x, noise, scheduled_sampling_prob=1.0).log_variance
    assert torch.equal(on_own_past[:, 0], teacher_forced[:, 0])
    assert (on_own_past[:, 1:] != teacher_forced[:, 1:]).any(-1).all()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss, _ = model.loss(x, noise, scheduled_sampling_prob=1.0)
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


@torch.no_grad()
def test_scheduled_sampling_corrupts_the_past():
    """Six of eight sequences (probability 0.75) must have the past of another sequence, from silent
    to twice as loud, and every second one of these what the model decodes from that past."""
    model = small("light_dvae", input_scale="root")
    x = spectrum(batch=8)
    model.fit_statistics(x)
    generator = torch.Generator().manual_seed(2)
    z, w, draws = model.draw_noise(8, 7, generator, scheduled_sampling=True)
    x_past = past(model.input_scale(x))
    corrupted = model.corrupt_past(x_past, z, w, draws, 0.75)
    assert torch.equal(corrupted[6:], x_past[6:]) and not corrupted[:, 0].any()
    silence = model.input_scale(torch.zeros_like(x[:1, :1]))
    past_of_other = x_past.roll(1, 0)
    gains = (corrupted - silence)[:6, 1:] / (past_of_other - silence)[:6, 1:]
    for row in (1, 3, 5):  # one gain for all frames of a sequence
        expected = torch.full_like(gains[row], 2 * draws[row].item())
        torch.testing.assert_close(gains[row], expected)
    scaled_past = silence + 2 * draws[:6, None, None] * (past_of_other[:6] - silence)
    scaled_past[:, 0] = 0
    decoded = model.likelihood(z[:6], w[:6], scaled_past, model.positions(7))
    torch.testing.assert_close(corrupted[:6:2], past(model.feed_back(decoded))[::2])


@pytest.mark.parametrize("name", ["light_dvae", "hit_dvae_local"])
def test_given_noise_scheduled_sampling_is_deterministic(name):
    model = small(name)
    x = spectrum(batch=4)
    noise = model.draw_noise(4, 7, scheduled_sampling=True)
    first, _ = model.loss(x, noise, scheduled_sampling_prob=0.5)
    second, _ = model.loss(x, noise, scheduled_sampling_prob=0.5)
    assert torch.equal(first, second) and first != model.loss(x, noise)[0]


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="light_dvae"):
        build_model("light")
    with pytest.raises(ValueError, match="latent"):
        build_model("vae", latents=3)
    with pytest.raises(ValueError, match="inv_s_nr"):
        small("light_dvae", variant="inverse")
