"""Speaker verification: error rates of scores computed by hand, i-vectors against the formulas."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.fft
import torch
from scipy.stats import multivariate_normal

from minidvae.data import audio
from minidvae.data.corpus import Corpus, CorpusError, Utterance, load_corpus
from minidvae.evaluation import figures, metrics
from minidvae.evaluation.report import render_table, render_text
from minidvae.evaluation.runs import Options, Run
from minidvae.fhvae import ivectors, verification
from minidvae.fhvae.encoding import encode
from minidvae.models import build_model
from minidvae.training.features import stft_of
from minidvae.training.run import resolve

# ------------------------------------------------------------------------------------- error rates

# Operating points (false alarms, misses) of these scores: (1, 0) (3/4, 0) (1/2, 0) (1/4, 0)
# (1/4, 1/3) (0, 1/3) (0, 2/3) (0, 1)
TARGET = [0.9, 0.8, 0.4]
NONTARGET = [0.7, 0.3, 0.2, 0.1]


@pytest.mark.parametrize(
    ("target", "nontarget", "hull", "crossing"),
    [
        # The hull goes from (1/4, 0) to (0, 1/3), so 1/4 − t/4 = t/3. The curve crosses the
        # diagonal where false alarms are 1/4.
        (TARGET, NONTARGET, 1 / 7, 1 / 4),
        ([3, 4], [1, 2, 2], 0, 0),
        ([0.5], [0.5], 1 / 2, 1 / 2),
        ([1, 1, 1], [1, 1], 1 / 2, 1 / 2),
        # All scores of 0 are accepted or rejected: (1, 0) (0, 1/2) (0, 1), so 1 − t = t/2.
        ([1, 0], [0, 0], 1 / 3, 1 / 3),
        # These scores are worse than chance. The hull includes random decisions, the curve not.
        ([1, 2], [3, 4], 1 / 2, 1),
        # (1, 0) (1/2, 0) (1/2, 1/2) (0, 1/2) (0, 1): the curve reaches the diagonal in a corner,
        # which the hull cuts off.
        ([2, 4], [1, 3], 1 / 4, 1 / 2),
    ],
)
def test_equal_error_rates_by_hand(target, nontarget, hull, crossing):
    """Fails where ties are split, the hull is not the lower one, or the diagonal is crossed at the
    wrong edge."""
    errors = metrics.detection_errors(target, nontarget)
    assert metrics.eer(errors) == pytest.approx(hull, abs=1e-15)
    assert metrics.eer_crossing(errors) == pytest.approx(crossing, abs=1e-15)


def test_hull_by_brute_force():
    """The equal error rate of the hull must be the lowest crossing of the diagonal by any line
    between two operating points."""
    generator = np.random.default_rng(0)
    for _ in range(50):
        shift = generator.uniform(-0.5, 2)
        ties = generator.integers(2, 40)
        target = np.round((generator.standard_normal(generator.integers(1, 40)) + shift) * ties)
        nontarget = np.round(generator.standard_normal(generator.integers(1, 40)) * ties)
        thresholds = np.unique([*target, *nontarget, np.inf])
        points = [((nontarget >= t).mean(), (target < t).mean()) for t in thresholds]
        lowest = 1
        for f, m in points:
            for g, n in points:
                if f >= m and g < n:
                    lowest = min(lowest, m + (f - m) / (f - m + n - g) * (n - m))
        errors = metrics.detection_errors(target, nontarget)
        assert metrics.eer(errors) == pytest.approx(lowest, abs=1e-12)


def test_detection_cost_by_hand():
    """Fails where the prior weighs the wrong error, or the cost is not divided by that of a
    constant answer."""
    errors = metrics.detection_errors(TARGET, NONTARGET)
    assert metrics.min_dcf(errors, 0.5) == pytest.approx(1 / 4)  # at (1/4, 0): ½·¼ over ½
    assert metrics.min_dcf(errors) == pytest.approx(1 / 3)  # at (0, 1/3): 0.01/3 over 0.01
    assert metrics.min_dcf(errors, 0.99) == pytest.approx(1 / 4)
    worse_than_chance = metrics.detection_errors([1, 2], [3, 4])
    assert metrics.min_dcf(worse_than_chance) == 1  # Rejecting everything is best.


@pytest.mark.parametrize(
    ("target", "nontarget"), [([], [1.0]), ([1.0], []), ([1.0, np.nan], [0.0])]
)
def test_scores_of_one_kind_or_none_are_refused(target, nontarget):
    """Fails where a rate would be 0/0, or a score that is no number is sorted somewhere."""
    with pytest.raises(ValueError, match="not a number|expected some of both"):
        metrics.detection_errors(target, nontarget)


# ------------------------------------------------------------------------------------------ trials


def clusters(speakers, each, d=5, spread=1.0, seed=0):
    """Return vectors around a centre for each speaker, in random order, and their speakers."""
    generator = np.random.default_rng(seed)
    names = generator.permutation(np.repeat([f"s{k}" for k in range(speakers)], each))
    centres = {f"s{k}": generator.standard_normal(d) for k in range(speakers)}
    vectors = [centres[name] + spread * generator.standard_normal(d) for name in names]
    return np.stack(vectors), names


def pairs_of(speakers):
    """Return all pairs of utterances of these speakers."""
    utterances = [SimpleNamespace(speaker=name) for name in speakers]
    return verification.all_pairs(SimpleNamespace(utterances=utterances))


def test_all_pairs_are_compared_once():
    """Fails where pairs are missed or repeated, or compare an utterance with itself."""
    vectors, speakers = clusters(7, 5)
    norms = np.linalg.norm(vectors, axis=1)
    target = []
    nontarget = []
    for i in range(35):
        for j in range(i):
            cosine = vectors[i] @ vectors[j] / norms[i] / norms[j]
            if speakers[i] == speakers[j]:
                target.append(cosine)
            else:
                nontarget.append(cosine)
    expected = metrics.detection_errors(target, nontarget)
    errors = verification.score(vectors, pairs_of(speakers))
    assert (errors.targets, errors.nontargets) == (len(target), len(nontarget)) == (70, 525)
    assert metrics.eer(errors) == pytest.approx(metrics.eer(expected), abs=1e-12)
    assert metrics.min_dcf(errors) == pytest.approx(metrics.min_dcf(expected), abs=1e-12)


def speech_of(counts, seconds=4):
    """Return a corpus of noise with counts[k] utterances of speaker k, each with 0.5 s before and
    after it that are trimmed."""
    generator = np.random.default_rng(0)
    utterances = []
    samples = []
    for speaker, count in enumerate(counts):
        for k in range(count):
            length = 16_000 * (seconds + 1)
            trim = (8_000, length - 8_000)
            position = {"start": len(utterances) * length, "length": length, "trim": trim}
            utterances.append(Utterance(f"u{speaker}{k}", f"s{speaker}", "test", **position))
            samples.append(generator.integers(-9000, 9000, length))
    return Corpus("noise", "folder", tuple(utterances), np.concatenate(samples).astype(np.int16))


def test_trial_list(tmp_path):
    """Fails where the pairs scored are not those of the list, in its order and with its labels."""
    corpus = speech_of([2, 2])
    path = tmp_path / "trials"
    path.write_text("u00 u01 target\n\nu10 u00 nontarget\nu11 u10 target\n")
    trials = verification.read_trials(path, corpus)
    vectors = np.array([[1.0, 0], [0.6, 0.8], [0, 2.0], [-3.0, 0]])
    assert trials.tolist() == [[0, 1, 1], [2, 0, 0], [3, 2, 1]]
    # The scores are 0.6 and 0 for pairs of one speaker, and 0 for the pair of two.
    errors = verification.score(vectors, trials)
    assert errors.misses.tolist() == [0, 1, 2] and errors.false_alarms.tolist() == [1, 0, 0]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("u00 u01\n", r"line 1: 'u00 u01'; expected lines of three words"),
        ("u00 u01 target\nu00 u10 impostor\n", "line 2: .*target|nontarget"),
        ("u00 u01 target\nu00 u99 nontarget\n", "line 2: no utterance 'u99' among the 4"),
        ("u00 u01 target\n", "1 target and 0 nontarget trials"),
        ("", "0 target and 0 nontarget trials"),
        (None, "cannot be read"),
    ],
)
def test_wrong_trial_lists(tmp_path, text, why):
    """Fails where the error is not one line that names the file and the line in it."""
    path = tmp_path / "trials"
    if text is not None:
        path.write_text(text)
    with pytest.raises(CorpusError, match=why) as error:
        verification.read_trials(path, speech_of([2, 2]))
    assert str(path) in str(error.value) and "\n" not in str(error.value)


# ------------------------------------------------------------------------------------- projections

# Both classes have the scatter diag(2, 8), so W = diag(4, 16)/(8 − 2). Their means differ by
# (3, 2).
CROSS = np.array([[1.0, 0], [-1, 0], [0, 2], [0, -2]])
TWO_CLASSES = np.concatenate([CROSS, CROSS + [3, 2]])
NAMES = np.repeat(["a", "b"], 4)


def test_lda_by_hand():
    """Fisher's direction is W⁻¹(3, 2) ∝ (6, 1), of unit variance within: 36·(2/3) + 8/3 = 80/3."""
    mean, projection = verification.lda(TWO_CLASSES, NAMES, dimension=12)
    np.testing.assert_allclose(mean, [1.5, 1])
    assert projection.shape == (2, 1)  # one less than there are classes
    direction = projection[:, 0] * np.sign(projection[0, 0])
    np.testing.assert_allclose(direction, np.array([6, 1]) / np.sqrt(80 / 3), rtol=1e-5)


def test_wccn_by_hand():
    """Fails where the covariance is not pooled within the classes, or its inverse root is applied
    transposed."""
    turned = TWO_CLASSES @ np.array([[0.8, 0.6], [-0.6, 0.8]])
    mean, projection = verification.wccn(turned, NAMES)
    normalised = (turned - mean) @ projection
    within = sum(3 * np.cov(normalised[NAMES == name].T) for name in "ab") / 6
    np.testing.assert_allclose(within, np.eye(2), atol=1e-5)


def test_lda_finds_what_distinguishes_speakers():
    """Fails where directions are sorted the wrong way: dimensions of large variance that say
    nothing about the speaker must be removed."""
    vectors, speakers = clusters(30, 6, d=3, spread=0.3)
    loud = 10 * np.random.default_rng(2).standard_normal((len(vectors), 4))
    vectors = np.concatenate([loud, vectors], axis=1)
    mean, projection = verification.lda(vectors, speakers, 3)
    pairs = pairs_of(speakers)
    projected = (vectors - mean) @ projection
    assert metrics.eer(verification.score(vectors, pairs)) > 0.4
    assert metrics.eer(verification.score(projected, pairs)) < 0.15


def test_speakers_with_one_utterance_are_cut_in_pieces():
    """Fails where pieces overlap, run into the silence, or utterances are cut that need not be."""
    corpus = speech_of([1, 2])
    cut = verification.cut_single_utterances(corpus)
    assert [(u.name, u.speaker) for u in cut.utterances] == [
        *((f"u00-{k}", "s0") for k in range(3)),
        ("u10", "s1"),
        ("u11", "s1"),
    ]
    joined = np.concatenate([cut.waveform(k) for k in range(3)])
    np.testing.assert_array_equal(joined, corpus.waveform(0)[: len(joined)])
    assert len(corpus.waveform(0)) - len(joined) < 3
    np.testing.assert_array_equal(cut.waveform(4), corpus.waveform(2))
    too_short_to_cut = speech_of([1], seconds=1)
    assert len(verification.cut_single_utterances(too_short_to_cut)) == 1


# ---------------------------------------------------------------------------------------- features


def test_cepstra_and_slopes():
    """Fails where the transform is not orthonormal, or slopes are not per frame."""
    waveform = torch.from_numpy(np.random.default_rng(0).standard_normal(8000))
    expected = scipy.fft.dct(audio.fbank(waveform, 40).numpy(), norm="ortho")[:, :20]
    np.testing.assert_allclose(audio.mfcc(waveform).numpy(), expected, atol=1e-10)
    ramp = 3 * torch.arange(10.0)[:, None] + torch.tensor([0.0, 5.0])
    slopes = audio.deltas(ramp)
    torch.testing.assert_close(slopes[2:-2], torch.full((6, 2), 3.0))
    assert slopes[0, 0] == (3 * 1 + 2 * 6) / 10  # before the first frame, the first


def test_energy_detector():
    """Fails where the threshold is not 30 dB of power below the loudest frame, or silence counts as
    speech."""
    loud = torch.sin(torch.arange(16_000) * 0.3)
    level = torch.ones(16_000)
    level[8000:12_000] = 0.04  # −28 dB
    level[12_000:] = 0.02  # −34 dB
    voiced = audio.voiced_frames(loud * level)
    assert voiced[2:73].all() and not voiced[77:99].any()
    assert not audio.voiced_frames(torch.zeros(1600)).any()
    assert ivectors.features(torch.zeros(1600)).shape == (0, 60)


# --------------------------------------------------------------------------------------- i-vectors


def mixture(components=3, d=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    roots = torch.randn(components, d, d, generator=generator, dtype=torch.float64)
    weights = torch.rand(components, generator=generator, dtype=torch.float64) + 0.2
    means = 2 * torch.randn(components, d, generator=generator, dtype=torch.float64)
    covariances = roots @ roots.mT + 0.3 * torch.eye(d)
    return ivectors.GaussianMixture(weights / weights.sum(), means, covariances)


def draw(mixture, n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    which = torch.multinomial(mixture.weights, n, replacement=True, generator=generator)
    noise = torch.randn(n, mixture.means.shape[1], generator=generator, dtype=torch.float64)
    return mixture.means[which] + torch.einsum("nij,nj->ni", mixture.cholesky[which], noise)


def log_densities(mixture, frames):
    """Return ln ω_c N(x; μ_c, Σ_c) by scipy, (components, n)."""
    rows = []
    for c, weight in enumerate(mixture.weights.numpy()):
        normal = multivariate_normal(mixture.means[c].numpy(), mixture.covariances[c].numpy())
        rows.append(np.log(weight) + normal.logpdf(frames.numpy()))
    return np.stack(rows)


def test_mixture_against_scipy():
    """Fails where an off-diagonal term counts once or thrice, or a constant is missing."""
    true = mixture()
    frames = draw(true, 50)
    expected = log_densities(true, frames)
    responsibilities, evidence = true.responsibilities(ivectors._monomials(frames))
    np.testing.assert_allclose(evidence, np.logaddexp.reduce(expected, axis=0), rtol=1e-10)
    np.testing.assert_allclose(
        responsibilities, np.exp(expected - np.logaddexp.reduce(expected, axis=0)), atol=1e-10
    )


def mean_evidence(mixture, frames):
    """The mean of ln p(x)."""
    return float(mixture.responsibilities(ivectors._monomials(frames))[1].mean())


@pytest.mark.parametrize(("frames", "components"), [(4000, 3), (300, 40)])
def test_mixture_training_never_falls(frames, components):
    """Fails where an M-step lowers the evidence, also if components lose their frames and variances
    are at the floor."""
    true = mixture()
    data = draw(true, frames) * torch.tensor([1.0, 100.0, 0.01, 1.0]) + 5
    # A third of the frames are the same, so that their component has no variance.
    data[: frames // 3] = data[0]
    fits = []
    for iterations in range(0, 15, 2):
        fits.append(ivectors.fit_mixture(data, components, iterations, tolerance=-1.0))
    evidence = [mean_evidence(fitted, data) for fitted in fits]
    assert min(np.diff(evidence)) > -1e-6 and evidence[-1] > evidence[0] + 0.1
    lower = torch.linalg.cholesky(torch.cov(data.T, correction=0))
    relative = torch.linalg.solve(lower, torch.linalg.solve(lower, fits[-1].covariances).mT)
    smallest = torch.linalg.eigvalsh((relative + relative.mT) / 2).min()
    assert smallest == pytest.approx(ivectors.VARIANCE_FLOOR, rel=1e-4)


def test_mixture_training_finds_the_mixture():
    """Fails where training ends far from the best: the training frames must be at least as likely
    as under the mixture that they are drawn from."""
    true = mixture(seed=3)
    frames = draw(true, 5000)
    fitted = ivectors.fit_mixture(frames, 3, iterations=100)
    true_evidence = np.logaddexp.reduce(log_densities(true, frames), axis=0).mean()
    assert mean_evidence(fitted, frames) > true_evidence - 1e-3


def test_statistics_by_hand(monkeypatch):
    """Fails where sums are not centred and whitened by component, or a chunk of frames is left
    out."""
    monkeypatch.setitem(ivectors.CHUNKS, "cpu", 7)
    true = mixture()
    frames = draw(true, 20)
    expected = log_densities(true, frames)
    gamma = np.exp(expected - np.logaddexp.reduce(expected, axis=0))
    counts, sums = ivectors.statistics_of(true, frames)
    np.testing.assert_allclose(counts, gamma.sum(1), rtol=1e-9)
    for c in range(3):
        deviation = sum(gamma[c, t] * (frames[t] - true.means[c]).numpy() for t in range(20))
        np.testing.assert_allclose(true.cholesky[c].numpy() @ sums[c].numpy(), deviation, atol=1e-9)


def test_posterior_by_hand():
    """The i-vector must be that of the paper, with supervectors and block-diagonal matrices."""
    generator = torch.Generator().manual_seed(0)
    true = mixture()
    counts = torch.rand(2, 3, generator=generator, dtype=torch.float64) * 20
    # The total variability matrix T has three components of four dimensions.
    matrix = torch.randn(12, 2, generator=generator, dtype=torch.float64)
    deviations = torch.randn(2, 12, generator=generator, dtype=torch.float64)  # F − Nμ
    lower = torch.block_diag(*true.cholesky)
    sigma = torch.block_diag(*true.covariances)
    loading = torch.linalg.solve(lower, matrix).reshape(3, 4, 2)
    sums = torch.linalg.solve(lower, deviations.T).T.reshape(2, 3, 4)
    means, covariances = ivectors.posterior(loading, counts, sums, ivectors._gram(loading))
    for u in range(2):
        n = torch.diag(counts[u].repeat_interleave(4))
        covariance = torch.linalg.inv(
            torch.eye(2) + matrix.T @ torch.linalg.inv(sigma) @ n @ matrix
        )
        mean = covariance @ matrix.T @ torch.linalg.inv(sigma) @ deviations[u]
        torch.testing.assert_close(covariances[u], covariance)
        torch.testing.assert_close(means[u], mean)


def test_total_variability_finds_a_planted_subspace():
    """Fails where an update of T is not the maximum, coordinates change wrongly, or an unused
    component changes the result."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    utterances, components, d, dimension = 300, 6, 5, 3
    planted = normal(components, d, dimension)
    w = normal(utterances, dimension)
    counts = 30 * torch.rand(utterances, components, generator=generator, dtype=torch.float64)
    counts[:, -1] = 0
    shifts = torch.einsum("cdr,ur->ucd", planted, w)
    sums = counts[..., None] * shifts + counts.sqrt()[..., None] * normal(utterances, components, d)
    statistics = (counts.float(), sums.float())
    loading = ivectors.train_total_variability(statistics, dimension, iterations=12)
    bases = [torch.linalg.qr(part[:-1].flatten(0, 1))[0] for part in (planted, loading)]
    assert torch.linalg.svdvals(bases[0].T @ bases[1]).min() > 0.999
    vectors = ivectors.extract(loading, statistics)
    explained = vectors @ torch.linalg.lstsq(vectors, w).solution
    assert (explained - w).square().mean() < 0.02
    second = vectors.T @ vectors / utterances
    torch.testing.assert_close(second, torch.eye(dimension, dtype=second.dtype), atol=0.05, rtol=0)


def test_i_vectors_in_two_threads_are_those_of_one():
    """Fails if training uses the LU decomposition of a batch of such matrices, which fails with two
    threads in torch 2.13."""
    generator = torch.Generator().manual_seed(0)
    before = torch.get_num_threads()
    loadings = []
    counts = 30 * torch.rand(12, 4, generator=generator)
    statistics = (counts, counts[..., None] * torch.randn(12, 4, 5, generator=generator))
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            loadings.append(ivectors.train_total_variability(statistics, 200, iterations=2))
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(*loadings)


def test_blocks_of_utterances_change_nothing(monkeypatch):
    """Fails where a block is dropped or weighs otherwise."""
    generator = torch.Generator().manual_seed(0)
    sums = torch.randn(10, 2, 3, generator=generator)
    statistics = (10 * torch.rand(10, 2, generator=generator), sums)
    expected = ivectors.train_total_variability(statistics, 2, iterations=3)
    monkeypatch.setattr(ivectors, "BLOCK", 4)
    by_blocks = ivectors.train_total_variability(statistics, 2, iterations=3)
    torch.testing.assert_close(by_blocks, expected, rtol=1e-9, atol=1e-9)
    assert ivectors.extract(expected, statistics).shape == (10, 2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_same():
    """Fails where a sum on the GPU is in a lower precision, or a tensor is left behind."""
    frames = draw(mixture(), 3000)
    on_cpu = mean_evidence(ivectors.fit_mixture(frames, 3), frames)
    frames = frames.cuda()
    on_gpu = mean_evidence(ivectors.fit_mixture(frames, 3), frames)
    assert on_gpu == pytest.approx(on_cpu, abs=1e-3)
    statistics = (10 * torch.rand(10, 2), torch.randn(10, 2, 3))
    on_cpu = ivectors.train_total_variability(statistics, 2, device="cpu")
    on_gpu = ivectors.train_total_variability(statistics, 2, device="cuda")
    torch.testing.assert_close(on_gpu.cpu(), on_cpu)


def test_too_little_speech_for_a_mixture():
    with pytest.raises(CorpusError, match="noise: holds 1 s of speech"):
        ivectors.train_background(speech_of([1], seconds=1), components=4)


# --------------------------------------------------------------------------------------- the table


@pytest.fixture(scope="module")
def corpus(speech, tmp_path_factory):
    return load_corpus(speech, cache=tmp_path_factory.mktemp("cache"), progress=False)


def run_of(name, corpus, folder, **sizes):
    torch.manual_seed(0)
    recipe, config = resolve(name, "quick" if name != "dsae" else "benchmark2021", {})
    model = build_model(name, **(config | sizes)).eval()
    plan = {"recipe": dataclasses.asdict(recipe)}
    content = {"model": name, "plan": plan, "progress": {"step": 7}}
    test = corpus.split("test")
    return Run(folder, name, model, stft_of(recipe), content, "speech", corpus, test)


def test_vectors_of_every_model(corpus, tmp_path):
    """Fails where a vector is not the mean of the posterior, or of the wrong latent."""
    test = corpus.split("test")
    for name, vector in (("light_dvae", "w"), ("dsae", "v")):
        run = run_of(name, corpus, tmp_path)
        vectors = verification.vectors_of(run, test)
        assert list(vectors) == [vector] and vectors[vector].shape == (4, run.model.config.w_latent)
        power = run.stft.analyse(torch.from_numpy(test.waveform(3))).abs().square()[None]
        with torch.no_grad():
            expected = run.model(power).q_w.mean[0]
        np.testing.assert_allclose(vectors[vector][3], expected.numpy(), atol=1e-5)
    run = run_of("fhvae", corpus, tmp_path, z1_latent=3, z2_latent=2)
    vectors = verification.vectors_of(run, test)
    speech = encode(run, test, 3)
    z1, z2 = speech.z1, speech.z2
    assert len(z1) == len(z2) > 5
    np.testing.assert_allclose(vectors["μ2"][3], z2.sum(0).numpy() / (len(z2) + 0.25), atol=1e-6)
    np.testing.assert_allclose(vectors["μ1"][3], z1.sum(0).numpy() / (len(z1) + 1), atol=1e-6)


def test_the_table_of_two_runs(corpus, tmp_path, monkeypatch):
    """Fails where a row, a figure or a note is missing, or published numbers are shown with another
    corpus."""
    monkeypatch.setattr(verification, "IVECTOR_DIMENSIONS", (2, 48))
    runs = [run_of("fhvae", corpus, tmp_path / "A", z1_latent=13, z2_latent=14, alpha=0.5)]
    runs.append(run_of("dsae", corpus, tmp_path / "B"))
    evaluation = verification.evaluate(runs, Options())
    printed = " ".join(render_text(evaluation).split())
    assert "6 pairs of 4 utterances by 2 speakers, 2 of one speaker" in printed
    assert "no i-vectors of 48 dimensions" in printed and "(paper)" not in printed
    rows = [result.values["rows"] for result in evaluation.results]
    fhvae = [(row["features"], row["dimension"]) for row in rows[0]]
    assert fhvae == [("i-vector", 2), ("μ2", 14), ("μ1", 13)]
    dsae = [(row["features"], row["dimension"]) for row in rows[1]]
    assert dsae == [("i-vector", 2), ("v", 16)]
    # There are three training speakers.
    assert rows[0][1]["lda_12"]["dimension"] == 2 and rows[0][1]["lda_24"] is None
    assert rows[0][1]["alpha"] == 0.5 and rows[1][1]["alpha"] is None
    assert all(0 <= row["raw"]["eer"] <= 0.5 for row in [*rows[0], *rows[1]])
    (det,) = evaluation.results[1].figures
    assert len(det.png) > 5000
    lines = render_table(verification.table(rows[0], "TIMIT")).splitlines()
    paper = [line.split()[1] for line in lines if line.startswith("(paper)")]
    assert paper == ["i-vector"] * 3 + ["μ2"] * 5 + ["μ1"] * 3


def test_splits_without_two_utterances_of_a_speaker(corpus, tmp_path):
    """Fails where a rate without target trials is a traceback or a number."""
    run = run_of("dsae", corpus, tmp_path)
    run.test = dataclasses.replace(run.test, utterances=run.test.utterances[::2])
    with pytest.raises(CorpusError, match="0 pairs of utterances by one speaker and 1 by two"):
        verification.evaluate([run], Options())


def test_det_figure():
    """Fails where a rate of 0 is drawn at minus infinity."""
    errors = metrics.detection_errors([2, 3], [0, 1])
    assert len(figures.det_curves({"all right": errors})) > 5000
