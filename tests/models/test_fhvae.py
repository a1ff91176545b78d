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
    return torch.randn(
        count, frames, bins, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )


def distribution(p: Gaussian) -> Independent:
    return Independent(Normal(p.mean, torch.exp(0.5 * p.log_variance)), p.mean.dim() - 1)


@pytest.mark.parametrize(
    ("architecture", "width", "millions"),
    [("fc", 512, 3.3), ("rnn", 256, 0.3), ("gru", 256, 0.8), ("lstm", 256, 1.1)],
)
def test_parameter_counts_are_the_papers(architecture, width, millions):
    """Appendix D, Table 4: 80 bins, 20 frames, 16 dimensions each, the table of s-vectors left out."""
    model = build_model("fhvae", architecture=architecture, width=width)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == millions


def test_a_plain_rnn_remembers_at_first():
    """A change of the first frame, small enough for tanh to be linear, is gone after twenty others."""
    torch.manual_seed(0)
    network = recurrent("rnn", 5, 256)
    zeros = torch.zeros(1, 20, 5)
    touched = torch.cat([torch.full((1, 1, 5), 1e-2), zeros[:, 1:]], dim=1)
    moved = (network(touched) - network(zeros)).norm(dim=-1)[0]
    assert moved[-1] > 0.5 * moved[0]


def test_log_likelihood_is_that_of_the_normal_distribution():
    x, p = segments(), Gaussian(segments() * 0.3 + 1, segments().flip(0))
    expected = distribution(p).log_prob(x)
    torch.testing.assert_close(
        gaussian_log_likelihood(x, p).double(), expected, rtol=1e-6, atol=1e-5
    )


@pytest.mark.parametrize("architecture", ["lstm", "gru", "rnn", "fc"])
def test_the_loss_is_the_bound_term_by_term(architecture):
    """Eq. 1 and 3 with torch.distributions, the softmax from distances between z2 and every row of the table."""
    model, x = small(architecture=architecture, sequences=7, alpha=3.0), segments()
    row, count = torch.tensor([0, 3, 3, 6, 1]), torch.tensor([4.0, 9, 9, 2, 5])
    noise = torch.randn(5, 2, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    loss, terms = model.loss(SegmentBatch(x, count, row), noise)

    (p_x, out), mu2 = model(x, noise), model.table[row]
    zeros = torch.zeros_like(out.z1)
    likelihood = distribution(p_x).log_prob(x)
    kl_z1 = kl_divergence(distribution(out.q_z1), distribution(prior(zeros, 1.0)))
    kl_z2 = kl_divergence(distribution(out.q_z2), distribution(prior(mu2, 0.25)))
    mu2_prior = distribution(prior(torch.zeros_like(mu2), 1.0)).log_prob(mu2)
    bound = likelihood - kl_z1 - kl_z2 + mu2_prior / count
    distances = (out.q_z2.mean[:, None] - model.table).square().sum(-1)
    discriminative = torch.log_softmax(-distances / (2 * 0.25), dim=1)[torch.arange(5), row]
    torch.testing.assert_close(loss, -(bound + 3.0 * discriminative).mean(), rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(
        terms["discrimination"].double(), -discriminative.mean(), rtol=1e-6, atol=1e-5
    )

    unseen, _ = model.loss(SegmentBatch(x, count, s_vector=mu2), noise)
    torch.testing.assert_close(unseen, -bound.mean(), rtol=1e-6, atol=1e-5)


def test_the_discriminative_term_can_see_a_sample():
    x, row, count = segments(), torch.tensor([0, 1, 2, 0, 1]), torch.ones(5)
    noise = torch.zeros(5, 2, dtype=torch.float64), torch.ones(5, 3, dtype=torch.float64)
    terms = {}
    for choice in ("mean", "sample"):
        _, terms[choice] = small(sequences=3, discriminate=choice).loss(
            SegmentBatch(x, count, row), noise
        )
    assert terms["mean"]["discrimination"] != terms["sample"]["discrimination"]
    assert terms["mean"]["reconstruction"] == terms["sample"]["reconstruction"]


class LinearDecoder(torch.nn.Module):
    """x = W [z1, z2] + noise of variance 0.3"""

    def __init__(self, weight: torch.Tensor, frames: int):
        super().__init__()
        self.weight, self.frames = weight, frames

    def forward(self, z):
        mean = (z @ self.weight.t()).unflatten(-1, (self.frames, -1))
        return Gaussian(mean, torch.full_like(mean, np.log(0.3)))


class Fixed(torch.nn.Module):
    def __init__(self, posterior):
        super().__init__()
        self.posterior = posterior

    def forward(self, x, given=None):
        return self.posterior(x.flatten(1))


def test_the_bound_of_a_linear_gaussian_model_is_its_evidence():
    """With orthonormal columns the exact posterior has a diagonal covariance and a closed form; with it the bound is
    log p(x | μ2) + log p(μ2)/N, the first a Gaussian of known covariance; with a wrong posterior it is less, by what
    a Monte-Carlo estimate of E_q[log p(x, z) − log q(z)] says."""
    model, x = small(alpha=0.0), segments(3)
    weight, _ = torch.linalg.qr(torch.randn(24, 5, dtype=torch.float64))
    mu2 = torch.randn(3, 3, dtype=torch.float64)
    model.decoder = LinearDecoder(weight, 4)

    def exact(columns, prior_mean, prior_variance, shift=0.0):
        precision = 1 / prior_variance + 1 / 0.3
        log_variance = torch.full_like(prior_mean, -np.log(precision))
        return lambda x: Gaussian(
            (x @ columns / 0.3 + prior_mean / prior_variance) / precision + shift, log_variance
        )

    covariance = (
        0.3 * torch.eye(24)
        + weight[:, :2] @ weight[:, :2].t()
        + 0.25 * weight[:, 2:] @ weight[:, 2:].t()
    )
    evidence = torch.distributions.MultivariateNormal(mu2 @ weight[:, 2:].t(), covariance).log_prob(
        x.flatten(1)
    )
    evidence = (evidence + Normal(0, 1).log_prob(mu2).sum(-1) / 8).mean()
    for shift in (0.0, 0.4):
        model.encoder_z1 = Fixed(exact(weight[:, :2], torch.zeros(3, 2, dtype=torch.float64), 1.0))
        model.encoder_z2 = Fixed(exact(weight[:, 2:], mu2, 0.25, shift))
        generator = torch.Generator().manual_seed(3)
        batch, bounds, estimates = SegmentBatch(x, torch.full((3,), 8.0), s_vector=mu2), [], []
        for _ in range(2000):
            noise = [torch.randn(3, n, generator=generator, dtype=torch.float64) for n in (2, 3)]
            bounds.append(-model.loss(batch, noise)[0].item())
            p_x, out = model(x, noise)
            joint = distribution(p_x).log_prob(x) + distribution(prior(0 * out.z1, 1.0)).log_prob(
                out.z1
            )
            joint = (
                joint
                + distribution(prior(mu2, 0.25)).log_prob(out.z2)
                + Normal(0, 1).log_prob(mu2).sum(-1) / 8
            )
            q = distribution(out.q_z1).log_prob(out.z1) + distribution(out.q_z2).log_prob(out.z2)
            estimates.append((joint - q).mean().item())
        difference = np.array(bounds) - np.array(estimates)
        assert abs(difference.mean()) < 4 * difference.std() / 2000**0.5
        gap = (
            shift**2 * 3 / 2 * (1 / 0.25 + 1 / 0.3)
        )  # KL(q ‖ posterior): the same covariance, a shifted mean
        standard_error = np.std(bounds) / 2000**0.5
        assert abs(evidence - gap - np.mean(bounds)) < 4 * standard_error + 1e-5
        assert (
            np.std(estimates) < 1e-5 or shift
        )  # with the exact posterior every sample gives the evidence


def test_s_vectors_maximise_the_bound():
    """Appendix B: the closed form against brute force, a descent on the loss itself over μ2."""
    model, x = small(alpha=0.0), segments(9)
    z1, z2 = (posterior.mean for posterior in (model.infer(x).q_z1, model.infer(x).q_z2))
    mu2 = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    noise = torch.zeros(9, 2, dtype=torch.float64), torch.zeros(9, 3, dtype=torch.float64)
    optimiser = torch.optim.LBFGS(
        [mu2], lr=1, max_iter=100, tolerance_grad=1e-9, line_search_fn="strong_wolfe"
    )

    def closure():
        optimiser.zero_grad()
        loss, _ = model.loss(
            SegmentBatch(x, torch.full((9,), 9.0), s_vector=mu2.expand(9, -1)), noise
        )
        loss.backward()
        return loss

    optimiser.step(closure)
    torch.testing.assert_close(model.s_vector(z2), mu2.detach(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(model.mu1(z1), z1.sum(0) / 10)  # section 4.2


def test_a_latent_reaches_what_it_must():
    """z1 sees z2 and the segment; the decoder sees both; a padded reading order would show here."""
    model, x = small(), segments().requires_grad_()
    q_z1, z1, q_z2, z2 = model.infer(x)
    assert (
        torch.autograd.grad(q_z2.mean.sum(), x, retain_graph=True)[0].abs().amax((0, 2)) > 0
    ).all()
    assert torch.autograd.grad(q_z1.mean.sum(), z2)[0].abs().min() > 0
    assert isinstance(model.encoder_z1, SegmentEncoder)
    moved = model.decode(z1 + 1, z2) != model.decode(z1, z2)
    assert moved.any(-1).all()


def test_decode_returns_to_the_scale_of_the_features():
    model, x = small(), segments()
    model.standardise.set(torch.full((6,), 5.0), torch.full((6,), 2.0))
    p_x, out = model(x, [torch.zeros(5, n, dtype=torch.float64) for n in (2, 3)])
    torch.testing.assert_close(model.decode(out.z1, out.z2), p_x.mean * 2 + 5)


def test_beta_weighs_the_divergence():
    x = SegmentBatch(segments(), torch.ones(5))
    noise = torch.zeros(5, 64, dtype=torch.float64)
    losses = {}
    for beta in (1.0, 4.0):
        torch.manual_seed(0)
        losses[beta], terms = (
            build_model("beta_vae", bins=6, frames=4, beta=beta).double().loss(x, noise)
        )
    torch.testing.assert_close(losses[4.0] - losses[1.0], 3 * terms["kl_z"])


# ------------------------------------------------------------------------------------------------- the data path


@pytest.fixture
def corpus(speech):
    return load_corpus(speech, progress=False, note=lambda line: None)


def recipe(**changes):
    settings, _ = resolve("fhvae", "quick", {})
    return replace(settings, batch=16, **changes)


@pytest.mark.parametrize("features", ["fbank", "log_magnitude"])
def test_segments_are_the_frames_of_their_utterance(corpus, features):
    """Every segment of a batch is found in the features of the whole utterance that its row names, at its place."""
    training = corpus.split("train")
    source = FeatureSegments(training, recipe(features=features, shift=7), 0, CPU)
    function = {"fbank": audio.fbank, "log_magnitude": audio.log_magnitude}[features]
    whole = [
        function(torch.from_numpy(training.waveform(i, trim=False)), centred=False)
        for i in range(len(training))
    ]
    batch = source(3)
    for x, row, count in zip(batch.x, batch.row, batch.count, strict=True):
        places = whole[row].unfold(0, 20, 7).transpose(1, 2)  # (N, frames, bins)
        assert count == len(places)
        assert (places - x).abs().flatten(1).amax(1).min() < 1e-4
    assert torch.equal(batch.x, source(3).x) and not torch.equal(batch.x, source(4).x)


def test_every_segment_is_drawn(corpus):
    """Rows in proportion to the number of segments of their utterances."""
    source = FeatureSegments(corpus.split("train"), recipe(shift=20), 0, CPU)
    source.features = lambda cuts: cuts  # the numbers alone
    rows = torch.cat([source(step).row for step in range(400)])
    expected = source.index.counts / source.index.counts.sum()
    found = np.bincount(rows, minlength=len(expected)) / len(rows)
    np.testing.assert_allclose(found, expected, atol=4 * np.sqrt(expected.max() / len(rows)))


def test_statistics_standardise_the_training_set(corpus):
    source, model = FeatureSegments(corpus.split("train"), recipe(), 0, CPU), build_model("fhvae")
    source.prepare(model, fresh=True)
    x = torch.cat([source.features(cuts) for _, cuts in source.index.in_order(64)])
    scaled = model.standardise(x).flatten(0, 1)
    torch.testing.assert_close(scaled.mean(0), torch.zeros(80), atol=1e-3, rtol=0)
    torch.testing.assert_close(scaled.std(0), torch.ones(80), atol=1e-2, rtol=0)
    assert model.table.shape == (len(source.index.counts), 16)


def test_development_takes_s_vectors_from_the_closed_form(corpus):
    development, model = corpus.split("test"), build_model("fhvae")
    index = feature_segments(development, recipe())
    batches = list(FeatureSegments(development, recipe(), 0, CPU).development(model))
    assert sum(size for _, size in batches) == len(index)
    x, s_vector = (
        torch.cat([getattr(batch, name) for batch, _ in batches]) for name in ("x", "s_vector")
    )
    rows = index.rows(np.arange(len(index)))
    for sequence in range(len(index.counts)):
        z2 = model.infer(x[rows == sequence])[2].mean
        torch.testing.assert_close(
            s_vector[rows == sequence], model.s_vector(z2).expand(len(z2), -1)
        )


def test_hierarchical_sampling_draws_sequences_and_gives_them_their_closed_form(corpus):
    training = corpus.split("train")
    few = recipe(sequences=2, table_steps=5)
    source, model = FeatureSegments(training, few, 0, CPU), build_model("fhvae")
    source.prepare(model, fresh=True)
    optimiser = torch.optim.Adam(model.parameters())
    assert model.table.shape == (2, 16)
    before = model.table.clone()
    source.before_step(
        model, optimiser, 0
    )  # an encoder that knows nothing yet has no closed form to give
    assert torch.equal(model.table, before)
    seen = set()
    for step in range(5, 125, 5):
        source.before_step(model, optimiser, step)
        chosen = source.sequences_at(step)
        seen |= set(chosen)
        for row, sequence in zip(model.table, chosen, strict=True):
            first, last = (
                source.index.ends[sequence] - source.index.counts[sequence],
                source.index.ends[sequence],
            )
            z2 = model.infer(source.features(source.index[np.arange(first, last)]))[2].mean
            torch.testing.assert_close(row, model.s_vector(z2), rtol=1e-4, atol=1e-5)
        drawn, later = source(step), source(step + 4)
        for batch in (drawn, later):
            assert set(batch.row.tolist()) <= {0, 1}
            assert torch.equal(
                batch.count, torch.from_numpy(source.index.counts[chosen])[batch.row]
            )
    assert seen == set(range(len(source.index.counts)))
    model.table.data.fill_(7)
    source.before_step(model, optimiser, 7)  # within a block the table is left to training
    assert (model.table == 7).all()


def test_without_drawing_the_table_holds_every_sequence(corpus):
    source = FeatureSegments(corpus.split("train"), recipe(sequences=1000), 0, CPU)
    assert np.array_equal(
        source.sequences_at(0), source.sequences_at(10_000)
    ) and source.rows == len(source.index.counts)


# ----------------------------------------------------------------------------------------------------- the scripts

TINY = ["width=8", "batch=4", "report=4", "sequences=2", "table_steps=3", "schedule=constant"]


def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(speech):
    """Twelve steps at once, or eight and then four; hierarchical sampling draws its table anew at 3, 6, 9."""
    arguments = ("--model", "fhvae", "--recipe", "quick", "--data", speech, "--set", *TINY)
    assert call(train_script, *arguments, "--run", "whole", "--steps", 12) == 0
    assert call(train_script, *arguments, "--run", "parts", "--steps", 8) == 0
    assert call(train_script, "--run", "parts", "--steps", 12, "--resume") == 0
    assert log("parts") == log("whole")
    assert json.loads(Path("whole/config.json").read_text())["model_settings"]["sequences"] == 2


def test_training_can_start_from_another_model(speech):
    """The statistics stay, the table begins with the closed form of the new corpus's sequences."""
    arguments = ("--model", "fhvae", "--data", speech, "--steps", 4)
    assert (
        call(train_script, *arguments, "--recipe", "quick", "--run", "first", "--set", *TINY) == 0
    )
    assert (
        call(
            train_script, "--init", "first", *arguments[2:], "--recipe", "quick", "--run", "second"
        )
        == 0
    )
    first, second = (checkpoint.load_run(run)[0] for run in ("first", "second"))
    assert torch.equal(first.standardise.mean, second.standardise.mean)
    assert len(first.table) == 2 and len(second.table) == 6  # three speakers, two utterances each


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ("features=power", "fbank"),
        ("window=512", "window"),
        ("own_past=0,1", "scheduled_sampling"),
        ("architecture=cnn", "lstm"),
    ]
    + [
        ("alpha=-1", "alpha"),
        ("shift=0", "shift"),
        ("discriminate=both", "sample"),
        ("features=mfcc", "fbank"),
    ],
)
def test_bad_settings_are_one_line(speech, setting, named, capsys):
    assert (
        call(
            train_script,
            "--model",
            "fhvae",
            "--recipe",
            "quick",
            "--data",
            speech,
            "--set",
            setting,
        )
        == 2
    )
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and named in error


def test_features_belong_to_segments():
    with pytest.raises(SettingError, match="features"):
        resolve("vae", "quick", {"features": "fbank"})


def test_the_papers_recipe_is_to_the_letter():
    """Appendix C."""
    settings, config = resolve("fhvae", "fhvae2017", {})
    assert (settings.batch, settings.epochs, settings.patience, settings.optimiser) == (
        256,
        500,
        50,
        "adam",
    )
    assert (settings.learning_rate, settings.betas, settings.epsilon) == (1e-3, (0.95, 0.999), 1e-8)
    assert (settings.weight_decay, settings.trim, settings.frames) == (1e-4, False, 20)
    assert (config["z1_variance"], config["z2_variance"], config["mu2_variance"]) == (
        1.0,
        0.25,
        1.0,
    )
    assert config["width"] == 256 and config["layers"] == 1 and config["architecture"] == "lstm"
    assert "fhvae" in RECIPES["fhvae2017"].models and "beta_vae" in RECIPES["fhvae2017"].models
