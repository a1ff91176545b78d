"""The DVAE contract, and what each model may depend on."""

import pytest
import torch

from minidvae.models import build_model
from minidvae.models.base import InputScale, past
from minidvae.models.light_dvae import VARIANTS

SMALL = {"bins": 9, "latent": 3, "w_latent": 4, "width": 16, "feedforward": 32, "layers": 2} | {
    "w_embedding": 8,
    "w_hidden": 8,
    "w_layers": 1,
}
TRANSFORMERS = [
    (name, {"variant": variant}) for name in ("hit_dvae", "light_dvae") for variant in VARIANTS
]
LOCAL = {"context": 5, "phases": 2, "heads": 2}
TRANSFORMERS += [(name, LOCAL) for name in ("hit_dvae_local", "light_dvae_local")]


def small(name: str, **config) -> torch.nn.Module:
    torch.manual_seed(0)
    settings = SMALL if "dvae" in name else {"bins": 9, "latent": 3, "hidden": (8,)}
    return build_model(name, **(settings | config)).double().eval()


def spectrum(batch=2, frames=7, bins=9) -> torch.Tensor:
    return (
        torch.rand(
            batch, frames, bins, generator=torch.Generator().manual_seed(1), dtype=torch.float64
        )
        * 4
    )


@pytest.mark.parametrize(("name", "millions"), [("light_dvae", 17.46), ("hit_dvae", 21.75)])
def test_parameter_counts_are_the_papers(name, millions):
    """Within 0.5 % of section 3.4, which rounds and leaves the size of the RNN for w open."""
    parameters = sum(p.numel() for p in build_model(name).parameters()) / 1e6
    assert parameters == pytest.approx(millions, rel=0.005)


def moved(before: torch.Tensor, after: torch.Tensor) -> list[int]:
    """Frames at which any output differs."""
    return (before != after).flatten(2).any(-1).any(0).nonzero().flatten().tolist()


@pytest.mark.parametrize(("name", "config"), TRANSFORMERS)
@pytest.mark.parametrize("frame", [0, 3, 6])
def test_causality_of_every_role(name, config, frame):
    """A frame of x, z or w that reached an output it must not reach, or failed to reach one it must, shows here."""
    model = small(name, **config)
    x, frames = spectrum(), 7
    positions, everything = model.positions(frames), list(range(frames))
    noise = model.draw_noise(2, frames, torch.Generator().manual_seed(2))
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

    changed_x, changed_z = x.clone(), z.clone()
    changed_x[:, frame] += 1
    changed_z[:, frame] += 1
    before = outputs(x, z, w)
    assert torch.equal(before["likelihood"], output.log_variance)
    assert torch.equal(before["prior"], torch.cat(output.p_z, -1))

    after = outputs(changed_x, z, w)
    assert moved(before["likelihood"], after["likelihood"]) == everything[frame + 1 :]  # x_{1:t−1}
    assert moved(before["prior"], after["prior"]) == everything[frame + 1 :]  # x_{1:t−1}
    assert moved(before["q_z"], after["q_z"]) == everything  # x_{1:T}

    after = outputs(x, changed_z, w)
    assert moved(before["likelihood"], after["likelihood"]) == everything[frame:]  # z_{1:t}
    assert moved(before["prior"], after["prior"]) == everything[frame + 1 :]  # z_{1:t−1}
    assert moved(before["q_z"], after["q_z"]) == []  # q(z_t | x, w) has no z

    after = outputs(x, z, w + 1)
    for role in before:
        assert moved(before[role], after[role]) == everything
    assert not torch.equal(model.infer_w(x).mean, model.infer_w(changed_x).mean)


def test_vae_frames_are_independent():
    model, x = small("vae"), spectrum()
    noise = model.draw_noise(2, 7, torch.Generator().manual_seed(2))
    changed = x.clone()
    changed[:, 3] += 1
    assert moved(model(x, noise).log_variance, model(changed, noise).log_variance) == [3]


@pytest.mark.parametrize(("name", "config"), TRANSFORMERS)
def test_cached_generation_equals_recomputation(name, config):
    """The cached decoder must give what recomputing the whole past at each frame gives."""
    model, x = small(name, **config), spectrum(frames=12)
    noise = model.draw_noise(2, 12, torch.Generator().manual_seed(2))
    generated = model.resynthesise(x, "generation", noise)
    output = model(x, noise)
    own = torch.zeros_like(x)
    for t in range(12):
        log_variance = model.likelihood(output.z, output.w, past(own), model.positions(12))
        assert torch.allclose(log_variance[:, t], generated[:, t], rtol=0, atol=1e-10)
        own = model.feed_back(log_variance)


@pytest.mark.parametrize(
    ("name", "config"),
    [("light_dvae", {}), ("hit_dvae", {}), ("light_dvae_local", {"context": 4, "phases": 3})],
)
def test_samples_follow_prior_and_likelihood(name, config):
    """A sample must be a fixed point: its own z and x through prior and likelihood give its own frames again."""
    model = small(name, **config)
    drawn = []
    prior = model.prior
    model.prior = lambda *arguments, **options: (
        drawn.append(prior(*arguments, **options)) or drawn[-1]
    )
    log_variance = model.sample(2, 6, torch.Generator().manual_seed(3))
    noise_z, w, _ = model.draw_noise(2, 6, torch.Generator().manual_seed(3))
    z = torch.cat([p.sample(noise_z[:, t : t + 1]) for t, p in enumerate(drawn)], 1)
    x_past, positions = past(model.feed_back(log_variance)), model.positions(6)
    assert torch.allclose(
        prior(past(z), w, x_past, positions).mean, torch.cat([p.mean for p in drawn], 1), atol=1e-10
    )
    assert torch.allclose(model.likelihood(z, w, x_past, positions), log_variance, atol=1e-10)


@pytest.mark.parametrize("name", ["vae", "hit_dvae", "light_dvae", "light_dvae_local"])
def test_loss_is_the_bound(name):
    """−ELBO per frame, from torch.distributions and the definition of d_IS instead of our kernels."""
    model, x = small(name, beta_z=0.3), spectrum()
    noise = model.draw_noise(2, 7, torch.Generator().manual_seed(2))
    output = model(x, noise)

    def normal(gaussian):
        return torch.distributions.Normal(gaussian.mean, torch.exp(0.5 * gaussian.log_variance))

    ratio = x / output.log_variance.exp()
    expected = (ratio - ratio.log() - 1).sum()
    p_z = normal(output.p_z) if output.p_z else torch.distributions.Normal(0.0, 1.0)
    expected = expected + 0.3 * torch.distributions.kl_divergence(normal(output.q_z), p_z).sum()
    if output.q_w:
        kl_w = torch.distributions.kl_divergence(
            normal(output.q_w), torch.distributions.Normal(0.0, 1.0)
        ).sum()
        expected = expected + model.config.beta_w * kl_w
    loss, terms = model.loss(x, noise)
    assert loss.item() == pytest.approx(expected.item() / (2 * 7), rel=1e-10)
    assert loss.item() == terms["loss"].item() and not any(
        term.requires_grad for term in terms.values()
    )


@pytest.mark.parametrize("name", ["vae", "hit_dvae", "light_dvae", "light_dvae_local"])
def test_given_noise_everything_is_deterministic(name):
    model, x = small(name), spectrum()
    noise = model.draw_noise(2, 7, torch.Generator().manual_seed(2))
    for mode in ("generation", "teacher_forcing"):
        assert torch.equal(model.resynthesise(x, mode, noise), model.resynthesise(x, mode, noise))
    one, two = (model.sample(3, 5, torch.Generator().manual_seed(4)) for _ in range(2))
    assert torch.equal(one, two) and one.shape == (3, 5, 9)
    with pytest.raises(ValueError, match="teacher_forcing"):
        model.resynthesise(x, "teacher", noise)


@pytest.mark.parametrize("name", ["vae", "hit_dvae", "light_dvae", "light_dvae_local"])
@pytest.mark.parametrize("scale", InputScale.SCALES)
def test_digital_silence_is_finite(name, scale):
    """x = 0 in the middle of an utterance must not put inf or nan into the loss or any gradient."""
    model, x = small(name, input_scale=scale).float(), spectrum().float()
    model.fit_statistics(x)
    x[:, 2:4] = 0
    model.output.bias.data[0] = -1000.0  # sure of silence
    loss, _ = model.loss(x[:, 2:4])
    model.output.bias.data[0] = 0.0
    loss, _ = model.loss(x)
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", ["hit_dvae", "light_dvae"])
def test_raw_power_has_finite_gradients(name):
    """Raw power of 10⁷ makes attention scores for which the gradients of a fused kernel overflow."""
    torch.manual_seed(0)
    sizes = {
        "width": 128,
        "feedforward": 32,
        "layers": 1,
        "w_embedding": 8,
        "w_hidden": 8,
        "w_layers": 1,
    }
    model = build_model(name, input_scale="power", **sizes)
    x = 30 * torch.exp(3 * torch.randn(4, 50, 513))
    model.fit_statistics(x)
    loss, _ = model.loss(x)
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in model.parameters())


def test_input_scale_standardises():
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
    """The bias is the constant that minimises the Itakura-Saito divergence."""
    model, power = small("vae"), spectrum(20, 30)
    model.fit_statistics(power)
    assert torch.allclose(model.output.bias.exp(), power.mean((0, 1)))


@pytest.mark.parametrize("bf16", [False, True])
def test_training_on_the_own_past(bf16):
    """With probability 1 no past is the true one, and there is no gradient through it; every weight still learns, also
    under autocast, whose cache of cast weights must not outlive the pass without gradient."""
    model, x = small("light_dvae").float(), spectrum().float()
    noise = model.draw_noise(2, 7, torch.Generator().manual_seed(2), scheduled_sampling=True)
    forced = model(x, noise).log_variance
    own = model(x, noise, scheduled_sampling_prob=1.0).log_variance
    assert torch.equal(own[:, 0], forced[:, 0]) and (own[:, 1:] != forced[:, 1:]).any(-1).all()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss, _ = model.loss(x, noise, scheduled_sampling_prob=1.0)
    loss.backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


@torch.no_grad()
def test_scheduled_sampling_corrupts_the_past():
    """A share of the sequences has the past of others, from silent to twice as loud, every second one decoded."""
    model, x = small("light_dvae", input_scale="root"), spectrum(batch=8)
    model.fit_statistics(x)
    generator = torch.Generator().manual_seed(2)
    z, w, draws = model.draw_noise(8, 7, generator, scheduled_sampling=True)
    x_past = past(model.input_scale(x))
    corrupted = model.corrupt_past(x_past, z, w, draws, 0.75)
    assert torch.equal(corrupted[6:], x_past[6:]) and not corrupted[:, 0].any()
    silence = model.input_scale(torch.zeros_like(x[:1, :1]))
    gains = (corrupted - silence)[:6, 1:] / (x_past.roll(1, 0) - silence)[:6, 1:]
    for row in (1, 3, 5):  # one gain for the whole sequence
        expected = torch.full_like(gains[row], 2 * draws[row].item())
        torch.testing.assert_close(gains[row], expected)
    start = silence + 2 * draws[:6, None, None] * (x_past.roll(1, 0)[:6] - silence)
    start[:, 0] = 0
    decoded = model.likelihood(z[:6], w[:6], start, model.positions(7))
    torch.testing.assert_close(corrupted[:6:2], past(model.feed_back(decoded))[::2])


@pytest.mark.parametrize("name", ["light_dvae", "hit_dvae_local"])
def test_given_noise_scheduled_sampling_is_deterministic(name):
    model, x = small(name), spectrum(batch=4)
    noise = model.draw_noise(4, 7, scheduled_sampling=True)
    first, again = (model.loss(x, noise, scheduled_sampling_prob=0.5)[0] for _ in range(2))
    assert torch.equal(first, again) and first != model.loss(x, noise)[0]


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="light_dvae"):
        build_model("light")
    with pytest.raises(ValueError, match="latent"):
        build_model("vae", latents=3)
    with pytest.raises(ValueError, match="inv_s_nr"):
        small("light_dvae", variant="inverse")
