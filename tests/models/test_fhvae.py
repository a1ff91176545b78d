"""FHVAE and β-VAE: the bound, its closed forms, and the segments that they are trained on."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from run_scripts import call, log, surroundings, train_script  # noqa: F401
from torch.distributions import Independent, Normal, kl_divergence

from minidvae.data import audio
from minidvae.data.corpus import load_corpus
from minidvae.models import build_model
from minidvae.models.base import Gaussian
from minidvae.models.fhvae import FHVAE, SegmentBatch, prior
from minidvae.models.recurrent import recurrent
from minidvae.models.segments import SegmentEncoder, gaussian_log_likelihood
from minidvae.training import checkpoint
from minidvae.training.config import RECIPES, SettingError
from minidvae.training.run import resolve
from minidvae.training.segment_batches import FeatureSegments, feature_segments

SMALL = {"bins": 6, "frames": 4, "width": 8, "z1_latent": 2, "z2_latent": 3}
CPU = torch.device("cpu")


def small(**config) -> FHVAE:
    torch.manual_seed(0)
    model = build_model("fhvae", **(SMALL | config)).double()
    model.table.data.normal_()
    return model


def segments(count=5, frames=4, bins=6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, frames, bins, generator=generator, dtype=torch.float64)


def distribution(p: Gaussian) -> Independent:
    return Independent(Normal(p.mean, torch.exp(0.5 * p.log_variance)), p.mean.dim() - 1)


@pytest.mark.parametrize(
    ("architecture", "width", "millions"),
    [("fc", 512, 3.3), ("rnn", 256, 0.3), ("gru", 256, 0.8), ("lstm", 256, 1.1)],
)
def test_parameter_counts_are_the_papers(architecture, width, millions):
    """Appendix D, Table 4: 80 bins, 20 frames, 16 dimensions each, without the table of
    s-vectors."""
    model = build_model("fhvae", architecture=architecture, width=width)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == millions


def test_a_plain_rnn_remembers_at_first():
    """A change of the first frame, small enough for tanh to be linear, must reach the output 20
    frames later. Fails if the recurrent weights start so small that gradients vanish."""
    torch.manual_seed(0)
    network = recurrent("rnn", 5, 256)
    zeros = torch.zeros(1, 20, 5)
    touched = torch.cat([torch.full((1, 1, 5), 1e-2), zeros[:, 1:]], dim=1)
    change = (network(touched) - network(zeros)).norm(dim=-1)[0]
    assert change[-1] > 0.5 * change[0]


def test_log_likelihood_is_that_of_the_normal_distribution():
    x = segments()
    p = Gaussian(segments() * 0.3 + 1, segments().flip(0))
    expected = distribution(p).log_prob(x)
    log_likelihood = gaussian_log_likelihood(x, p).double()
    torch.testing.assert_close(log_likelihood, expected, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("architecture", ["lstm", "gru", "rnn", "fc"])
def test_the_loss_is_the_bound_term_by_term(architecture):
    """The loss must be equations 1 and 3, computed with torch.distributions; the softmax is that of
    the distances between z2 and every row of the table."""
    model = small(architecture=architecture, sequences=7, alpha=3.0)
    x = segments()
    row = torch.tensor([0, 3, 3, 6, 1])
    count = torch.tensor([4.0, 9, 9, 2, 5])
    noise_z1 = torch.randn(5, 2, dtype=torch.float64)
    noise_z2 = torch.randn(5, 3, dtype=torch.float64)
    noise = (noise_z1, noise_z2)
    loss, terms = model.loss(SegmentBatch(x, count, row), noise)

    p_x, out = model(x, noise)
    mu2 = model.table[row]
    zeros = torch.zeros_like(out.z1)
    likelihood = distribution(p_x).log_prob(x)
    kl_z1 = kl_divergence(distribution(out.q_z1), distribution(prior(zeros, 1.0)))
    kl_z2 = kl_divergence(distribution(out.q_z2), distribution(prior(mu2, 0.25)))
    mu2_prior = distribution(prior(torch.zeros_like(mu2), 1.0)).log_prob(mu2)
    bound = likelihood - kl_z1 - kl_z2 + mu2_prior / count
    distances = (out.q_z2.mean[:, None] - model.table).square().sum(-1)
    discriminative = torch.log_softmax(-distances / (2 * 0.25), dim=1)[torch.arange(5), row]
    torch.testing.assert_close(loss, -(bound + 3.0 * discriminative).mean(), rtol=1e-6, atol=1e-5)
    term = terms["discrimination"].double()
    torch.testing.assert_close(term, -discriminative.mean(), rtol=1e-6, atol=1e-5)

    # A sequence that is not in the table has an s-vector and no discriminative term.
    loss, _ = model.loss(SegmentBatch(x, count, s_vector=mu2), noise)
    torch.testing.assert_close(loss, -bound.mean(), rtol=1e-6, atol=1e-5)


def test_the_discriminative_term_can_see_a_sample():
    """`discriminate` chooses between the mean of q(z2) and a sample, for this term alone."""
    batch = SegmentBatch(segments(), torch.ones(5), torch.tensor([0, 1, 2, 0, 1]))
    noise_z1 = torch.zeros(5, 2, dtype=torch.float64)
    noise_z2 = torch.ones(5, 3, dtype=torch.float64)
    terms = {}
    for choice in ("mean", "sample"):
        model = small(sequences=3, discriminate=choice)
        _, terms[choice] = model.loss(batch, (noise_z1, noise_z2))
    assert terms["mean"]["discrimination"] != terms["sample"]["discrimination"]
    assert terms["mean"]["reconstruction"] == terms["sample"]["reconstruction"]


class LinearDecoder(torch.nn.Module):
    """x = W [z1, z2] + noise of variance 0.3"""

    def __init__(self, weight: torch.Tensor, frames: int):
        super().__init__()
        self.weight = weight
        self.frames = frames

    def forward(self, z):
        mean = (z @ self.weight.t()).unflatten(-1, (self.frames, -1))
        return Gaussian(mean, torch.full_like(mean, np.log(0.3)))


class ExactPosterior(torch.nn.Module):
    """Posterior of the latent variables behind some orthonormal columns of the linear decoder, its
    mean shifted by `shift`."""

    def __init__(self, columns, prior_mean, prior_variance, shift=0.0):
        super().__init__()
        self.columns = columns
        self.prior_mean = prior_mean
        self.prior_variance = prior_variance
        self.precision = 1 / prior_variance + 1 / 0.3
        self.shift = shift

    def forward(self, x, z2=None):
        weighted_sum = x.flatten(1) @ self.columns / 0.3 + self.prior_mean / self.prior_variance
        mean = weighted_sum / self.precision + self.shift
        return Gaussian(mean, torch.full_like(mean, -np.log(self.precision)))


def test_the_bound_of_a_linear_gaussian_model_is_its_evidence():
    """With orthonormal columns the exact posterior has a diagonal covariance and a closed form.
    With it the bound must be log p(x | μ2) + log p(μ2)/N, the first a Gaussian of known covariance.
    With a shifted posterior it must be less, by KL(q ‖ posterior); and it must always be what a
    Monte-Carlo estimate of E_q[log p(x, z) − log q(z)] gives."""
    model = small(alpha=0.0)
    x = segments(3)
    weight, _ = torch.linalg.qr(torch.randn(24, 5, dtype=torch.float64))
    weight_z1 = weight[:, :2]
    weight_z2 = weight[:, 2:]
    mu2 = torch.randn(3, 3, dtype=torch.float64)
    mu2_term = Normal(0, 1).log_prob(mu2).sum(-1) / 8
    mu1 = torch.zeros(3, 2, dtype=torch.float64)
    model.decoder = LinearDecoder(weight, 4)
    batch = SegmentBatch(x, torch.full((3,), 8.0), s_vector=mu2)

    covariance = 0.3 * torch.eye(24) + weight_z1 @ weight_z1.t() + 0.25 * weight_z2 @ weight_z2.t()
    p_x = torch.distributions.MultivariateNormal(mu2 @ weight_z2.t(), covariance)
    evidence = (p_x.log_prob(x.flatten(1)) + mu2_term).mean()
    for shift in (0.0, 0.4):
        model.encoder_z1 = ExactPosterior(weight_z1, mu1, 1.0)
        model.encoder_z2 = ExactPosterior(weight_z2, mu2, 0.25, shift)
        generator = torch.Generator().manual_seed(3)
        bounds = []
        estimates = []
        for _ in range(2000):
            noise = [torch.randn(3, n, generator=generator, dtype=torch.float64) for n in (2, 3)]
            bounds.append(-model.loss(batch, noise)[0].item())
            p_x, out = model(x, noise)
            log_p = distribution(p_x).log_prob(x)
            log_p += distribution(prior(0 * out.z1, 1.0)).log_prob(out.z1)
            log_p += distribution(prior(mu2, 0.25)).log_prob(out.z2) + mu2_term
            log_q = distribution(out.q_z1).log_prob(out.z1)
            log_q += distribution(out.q_z2).log_prob(out.z2)
            estimates.append((log_p - log_q).mean().item())
        difference = np.array(bounds) - np.array(estimates)
        assert abs(difference.mean()) < 4 * difference.std() / 2000**0.5
        gap = shift**2 * 3 / 2 * (1 / 0.25 + 1 / 0.3)  # KL of Gaussians with the same covariance
        standard_error = np.std(bounds) / 2000**0.5
        assert abs(evidence - gap - np.mean(bounds)) < 4 * standard_error + 1e-5
        if shift == 0:  # Every sample from the exact posterior gives the evidence.
            assert np.std(estimates) < 1e-5


def test_s_vectors_maximise_the_bound():
    """Appendix B: the closed form must be where a descent on the loss itself over μ2 ends."""
    model = small(alpha=0.0)
    x = segments(9)
    z1 = model.infer(x).q_z1.mean
    z2 = model.infer(x).q_z2.mean
    mu2 = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    noise = [torch.zeros(9, n, dtype=torch.float64) for n in (2, 3)]
    optimiser = torch.optim.LBFGS(
        [mu2], lr=1, max_iter=100, tolerance_grad=1e-9, line_search_fn="strong_wolfe"
    )

    def closure():
        optimiser.zero_grad()
        batch = SegmentBatch(x, torch.full((9,), 9.0), s_vector=mu2.expand(9, -1))
        loss, _ = model.loss(batch, noise)
        loss.backward()
        return loss

    optimiser.step(closure)
    torch.testing.assert_close(model.s_vector(z2), mu2.detach(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(model.mu1(z1), z1.sum(0) / 10)  # section 4.2


def test_a_latent_reaches_what_it_must():
    """q(z2) must see every frame of the segment, q(z1) must see z2, and every frame of the
    decoder's output must see z1. Fails if frames are left out or read in the wrong order."""
    model = small()
    x = segments().requires_grad_()
    q_z1, z1, q_z2, z2 = model.infer(x)
    (gradient_x,) = torch.autograd.grad(q_z2.mean.sum(), x, retain_graph=True)
    assert (gradient_x.abs().amax((0, 2)) > 0).all()
    (gradient_z2,) = torch.autograd.grad(q_z1.mean.sum(), z2)
    assert gradient_z2.abs().min() > 0
    assert isinstance(model.encoder_z1, SegmentEncoder)
    has_moved = model.decode(z1 + 1, z2) != model.decode(z1, z2)
    assert has_moved.any(-1).all()


def test_decode_returns_to_the_scale_of_the_features():
    """Fails if decoded features are left standardised."""
    model = small()
    x = segments()
    model.standardise.set(torch.full((6,), 5.0), torch.full((6,), 2.0))
    p_x, out = model(x, [torch.zeros(5, n, dtype=torch.float64) for n in (2, 3)])
    torch.testing.assert_close(model.decode(out.z1, out.z2), p_x.mean * 2 + 5)


def test_beta_weighs_the_divergence():
    x = SegmentBatch(segments(), torch.ones(5))
    noise = torch.zeros(5, 64, dtype=torch.float64)
    losses = {}
    for beta in (1.0, 4.0):
        torch.manual_seed(0)
        model = build_model("beta_vae", bins=6, frames=4, beta=beta).double()
        losses[beta], terms = model.loss(x, noise)
    torch.testing.assert_close(losses[4.0] - losses[1.0], 3 * terms["kl_z"])


# ----------------------------------------------------------------------------------- the data path


@pytest.fixture
def corpus(speech):
    return load_corpus(speech, progress=False, note=lambda line: None)


def recipe(**changes):
    settings, _ = resolve("fhvae", "quick", {})
    return replace(settings, batch=16, **changes)


@pytest.mark.parametrize("features", ["fbank", "log_magnitude"])
def test_segments_are_the_frames_of_their_utterance(corpus, features):
    """Every segment of a batch must be one of the segments of the utterance that its row names, and
    its count must be their number."""
    training = corpus.split("train")
    source = FeatureSegments(training, recipe(features=features, shift=7), 0, CPU)
    feature_function = {"fbank": audio.fbank, "log_magnitude": audio.log_magnitude}[features]
    batch = source(3)
    for x, row, count in zip(batch.x, batch.row, batch.count, strict=True):
        waveform = torch.from_numpy(training.waveform(int(row), trim=False))
        frames = feature_function(waveform, centred=False)
        segments_of_row = frames.unfold(0, 20, 7).transpose(1, 2)  # (N, frames, bins)
        assert count == len(segments_of_row)
        assert (segments_of_row - x).abs().flatten(1).amax(1).min() < 1e-4
    assert torch.equal(batch.x, source(3).x) and not torch.equal(batch.x, source(4).x)


def test_every_segment_is_drawn(corpus):
    """Rows must be drawn in proportion to the number of segments of their utterances."""
    source = FeatureSegments(corpus.split("train"), recipe(shift=20), 0, CPU)
    source.features = lambda cuts: cuts  # Features are not needed and slow to compute.
    rows = torch.cat([source(step).row for step in range(400)])
    expected = source.index.counts / source.index.counts.sum()
    frequencies = np.bincount(rows, minlength=len(expected)) / len(rows)
    tolerance = 4 * np.sqrt(expected.max() / len(rows))
    np.testing.assert_allclose(frequencies, expected, atol=tolerance)


def test_statistics_standardise_the_training_set(corpus):
    source = FeatureSegments(corpus.split("train"), recipe(), 0, CPU)
    model = build_model("fhvae")
    source.prepare(model, fresh=True)
    x = torch.cat([source.features(cuts) for _, cuts in source.index.in_order(64)])
    scaled = model.standardise(x).flatten(0, 1)
    torch.testing.assert_close(scaled.mean(0), torch.zeros(80), atol=1e-3, rtol=0)
    torch.testing.assert_close(scaled.std(0), torch.ones(80), atol=1e-2, rtol=0)
    assert model.table.shape == (len(source.index.counts), 16)


def test_development_takes_s_vectors_from_the_closed_form(corpus):
    """Sequences of the development set have no row in the table: their s-vectors must be the
    closed form of all their segments."""
    development = corpus.split("test")
    model = build_model("fhvae")
    index = feature_segments(development, recipe())
    batches = list(FeatureSegments(development, recipe(), 0, CPU).development(model))
    assert sum(size for _, size in batches) == len(index)
    x = torch.cat([batch.x for batch, _ in batches])
    s_vectors = torch.cat([batch.s_vector for batch, _ in batches])
    rows = index.rows(np.arange(len(index)))
    for sequence in range(len(index.counts)):
        z2 = model.infer(x[rows == sequence])[2].mean
        expected = model.s_vector(z2).expand(len(z2), -1)
        torch.testing.assert_close(s_vectors[rows == sequence], expected)


def test_hierarchical_sampling_draws_sequences_and_gives_them_their_closed_form(corpus):
    """Every `table_steps` steps the table must be that of other sequences, its rows must be the
    closed form of their segments, and batches must be drawn from these sequences alone."""
    settings = recipe(sequences=2, table_steps=5)
    source = FeatureSegments(corpus.split("train"), settings, 0, CPU)
    counts = source.index.counts
    ends = source.index.ends
    model = build_model("fhvae")
    source.prepare(model, fresh=True)
    optimiser = torch.optim.Adam(model.parameters())
    assert model.table.shape == (2, 16)
    before = model.table.clone()
    source.before_step(model, optimiser, 0)
    assert torch.equal(model.table, before)  # The closed form of an untrained encoder is useless.
    all_sequences = set()
    for step in range(5, 125, 5):
        source.before_step(model, optimiser, step)
        sequences = source.sequences_at(step)
        all_sequences |= set(sequences)
        for row, sequence in zip(model.table, sequences, strict=True):
            segment_indices = np.arange(ends[sequence] - counts[sequence], ends[sequence])
            z2 = model.infer(source.features(source.index[segment_indices]))[2].mean
            torch.testing.assert_close(row, model.s_vector(z2), rtol=1e-4, atol=1e-5)
        for batch in (source(step), source(step + 4)):
            assert set(batch.row.tolist()) <= {0, 1}
            expected_count = torch.from_numpy(counts[sequences])[batch.row]
            assert torch.equal(batch.count, expected_count)
    assert all_sequences == set(range(len(counts)))
    model.table.data.fill_(7)
    source.before_step(model, optimiser, 7)
    assert (model.table == 7).all()  # Between two drawings, training alone changes the table.


def test_without_drawing_the_table_holds_every_sequence(corpus):
    source = FeatureSegments(corpus.split("train"), recipe(sequences=1000), 0, CPU)
    assert np.array_equal(source.sequences_at(0), source.sequences_at(10_000))
    assert source.rows == len(source.index.counts)


# ------------------------------------------------------------------------------------- the scripts

TINY = ["width=8", "batch=4", "report=4", "sequences=2", "table_steps=3", "schedule=constant"]


def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(speech):
    """12 steps at once and 8 and then 4 must give the same log. Hierarchical sampling draws its
    table anew at steps 3, 6 and 9."""
    arguments = ["--model", "fhvae", "--recipe", "quick", "--data", speech, "--set", *TINY]
    assert call(train_script, *arguments, "--run", "at_once", "--steps", 12) == 0
    assert call(train_script, *arguments, "--run", "resumed", "--steps", 8) == 0
    assert call(train_script, "--run", "resumed", "--steps", 12, "--resume") == 0
    assert log("resumed") == log("at_once")
    assert json.loads(Path("at_once/config.json").read_text())["model_settings"]["sequences"] == 2


def test_training_can_start_from_another_model(speech):
    """The statistics must stay, and the table must begin with the closed form of the new corpus's
    sequences."""
    arguments = ["--data", speech, "--steps", 4, "--recipe", "quick"]
    settings = ["--model", "fhvae", "--set", *TINY]
    assert call(train_script, *arguments, "--run", "first", *settings) == 0
    assert call(train_script, *arguments, "--run", "second", "--init", "first") == 0
    first, *_ = checkpoint.load_run("first")
    second, *_ = checkpoint.load_run("second")
    assert torch.equal(first.standardise.mean, second.standardise.mean)
    assert len(first.table) == 2
    assert len(second.table) == 6  # three speakers, two utterances each


@pytest.mark.parametrize(
    ("setting", "expected_word"),
    [
        ("features=power", "fbank"),
        ("window=512", "window"),
        ("own_past=0,1", "scheduled_sampling"),
        ("architecture=cnn", "lstm"),
        ("alpha=-1", "alpha"),
        ("shift=0", "shift"),
        ("discriminate=both", "sample"),
        ("features=mfcc", "fbank"),
    ],
)
def test_bad_settings_are_one_line(speech, setting, expected_word, capsys):
    """Fails if a bad setting is accepted, or its error is a traceback or does not help."""
    arguments = ["--model", "fhvae", "--recipe", "quick", "--data", speech, "--set", setting]
    assert call(train_script, *arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and expected_word in error


def test_features_belong_to_segments():
    with pytest.raises(SettingError, match="features"):
        resolve("vae", "quick", {"features": "fbank"})


def test_the_papers_recipe_is_to_the_letter():
    """The numbers are those of appendix C."""
    settings, config = resolve("fhvae", "fhvae2017", {})
    assert (settings.batch, settings.epochs, settings.patience) == (256, 500, 50)
    assert settings.optimiser == "adam"
    assert (settings.learning_rate, settings.betas, settings.epsilon) == (1e-3, (0.95, 0.999), 1e-8)
    assert (settings.weight_decay, settings.trim, settings.frames) == (1e-4, False, 20)
    assert config["z1_variance"] == 1.0
    assert config["z2_variance"] == 0.25
    assert config["mu2_variance"] == 1.0
    assert (config["width"], config["layers"], config["architecture"]) == (256, 1, "lstm")
    assert {"fhvae", "beta_vae"} <= set(RECIPES["fhvae2017"].models)
