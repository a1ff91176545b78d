"""I-vectors, the baseline of speaker verification (Dehak et al., Front-end factor analysis for
speaker verification, 2011).

The frames of an utterance come from a Gaussian mixture. Its means are those of the universal
background model, shifted within one low-dimensional subspace by a vector w of the utterance:

    p(x_t | w) = Σ_c ω_c N(x_t; μ_c + T_c w, Σ_c),    w ~ N(0, I)

The i-vector is E[w | x_{1:T}].

    background = train_background(train)                               # ω_c, μ_c, Σ_c
    statistics = collect_statistics(background, train)                 # Baum-Welch statistics
    loading = train_total_variability(statistics, dimension=100)       # T_c
    vectors = extract(loading, collect_statistics(background, test))   # (utterances, 100)
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from tqdm import tqdm

from ..data import audio
from ..data.corpus import Corpus, CorpusError

FRAMES_PER_COMPONENT = 400  # smallest number; a component has 1,891 parameters
BACKGROUND_FRAMES = 2_000_000  # largest number, drawn at random: about 7 hours of speech
VARIANCE_FLOOR = 0.01  # smallest variance in any direction, relative to that of all frames
MIN_COMPONENT_COUNT = 1e-6  # A component with fewer frames keeps its mean and covariance.
MIN_LOADING_COUNT = 1e-3  # A component with fewer frames keeps its loading.
K_MEANS_ITERATIONS = 10
CHUNKS = {"cpu": 1024, "cuda": 16384}  # frames that are processed at a time
BLOCK = 256  # utterances that are processed at a time


def features(waveform: Tensor) -> Tensor:
    """Return 20 MFCCs, their deltas and delta-deltas of the frames with speech (frames, 60) of a
    waveform (samples,). The utterance's mean is not subtracted: the models that i-vectors are
    compared with have it too."""
    cepstra = audio.mfcc(waveform)
    deltas = audio.deltas(cepstra)
    delta_deltas = audio.deltas(deltas)
    return torch.cat([cepstra, deltas, delta_deltas], dim=-1)[audio.voiced_frames(waveform)]


def features_of(corpus: Corpus, title: str, device: torch.device | str) -> Iterator[Tensor]:
    """Yield `features` of every utterance, in order."""
    for index in tqdm(range(len(corpus)), desc=title, unit=" utterances", disable=None):
        yield features(torch.from_numpy(corpus.waveform(index)).to(device))


def _pack(symmetric: Tensor) -> Tensor:
    """Return the upper triangle: (…, d, d) → (…, d(d + 1)/2)."""
    rows, columns = torch.triu_indices(*symmetric.shape[-2:], device=symmetric.device)
    return symmetric[..., rows, columns]


def _unpack(packed: Tensor, d: int) -> Tensor:
    """Return the symmetric matrix of an upper triangle: (…, d(d + 1)/2) → (…, d, d)."""
    rows, columns = torch.triu_indices(d, d, device=packed.device)
    symmetric = packed.new_empty(*packed.shape[:-1], d, d)
    symmetric[..., rows, columns] = packed
    symmetric[..., columns, rows] = packed
    return symmetric


def _monomials(frames: Tensor) -> Tensor:
    """Return the monomials of frames (n, d) up to degree 2, (d(d + 1)/2 + d + 1, n), float64:
    x_i x_j for i ≤ j in the order of `_pack`, then x_i, then 1."""
    x = frames.double().T.contiguous()
    rows, columns = torch.triu_indices(len(x), len(x), device=x.device)
    return torch.cat([x[rows] * x[columns], x, torch.ones_like(x[:1])])


@dataclass(frozen=True)
class GaussianMixture:
    """A mixture of Gaussians with full covariances. All tensors are float64."""

    weights: Tensor  # ω, (components,)
    means: Tensor  # μ, (components, d)
    covariances: Tensor  # Σ, (components, d, d)

    @cached_property
    def cholesky(self) -> Tensor:
        """Lower triangular L_c with Σ_c = L_c L_cᵀ, (components, d, d)."""
        return torch.linalg.cholesky(self.covariances)

    @cached_property
    def coefficients(self) -> Tensor:
        """Coefficients of ln ω_c N(x; μ_c, Σ_c) in the monomials of x, (components, monomials).
        With P = Σ_c⁻¹ it is

            −½ xᵀPx + xᵀPμ + ln ω_c − ½ μᵀPμ − ½ ln |2πΣ_c|
        """
        d = self.means.shape[1]
        precision = torch.cholesky_inverse(self.cholesky)
        linear = torch.einsum("cij,cj->ci", precision, self.means)
        half_log_determinant = self.cholesky.diagonal(dim1=1, dim2=2).log().sum(1)
        log_volume = half_log_determinant + d / 2 * math.log(2 * math.pi)
        constant = self.weights.log() - (linear * self.means).sum(1) / 2 - log_volume
        # The monomial x_i x_j with i < j also stands for x_j x_i: the factor is 1 instead of ½.
        factors = torch.ones_like(precision[0]).fill_diagonal_(0.5)
        return torch.cat([_pack(-precision * factors), linear, constant[:, None]], dim=1)

    def responsibilities(self, monomials: Tensor) -> tuple[Tensor, Tensor]:
        """Return γ_c = p(c | x), (components, n), and ln p(x), (n,)."""
        joint = self.coefficients @ monomials
        evidence = joint.logsumexp(0)
        return joint.sub_(evidence).exp_(), evidence


def _k_means(frames: Tensor, components: int, generator: torch.Generator) -> GaussianMixture:
    """Cluster frames (n, d) of zero mean and unit covariance by k-means, from frames drawn at
    random. Every component gets the mean covariance within the clusters."""
    n, d = frames.shape
    centres = frames[torch.randperm(n, generator=generator)[:components].to(frames.device)]
    for _ in tqdm(range(K_MEANS_ITERATIONS), desc="k-means", disable=None):
        sums = centres.new_zeros(components, d + 1)  # sums of the frames, and their number
        for chunk in frames.split(CHUNKS[frames.device.type]):
            nearest = (chunk @ centres.T - centres.square().sum(1) / 2).argmax(1)
            sums.index_add_(0, nearest, torch.cat([chunk, torch.ones_like(chunk[:, :1])], dim=1))
        counts = sums[:, -1:]
        centres = torch.where(counts > 0, sums[:, :-1] / counts.clamp(min=1), centres)
    means = centres.double()
    counts = sums[:, -1].double()
    within = torch.eye(d).to(means) - (means.T * (counts / n)) @ means
    weights = (counts + 1) / (n + components)
    return GaussianMixture(weights, means, _floored(within).expand(components, d, d))


def _floored(covariance: Tensor) -> Tensor:
    """Return the most likely covariance (…, d, d) with no eigenvalue below VARIANCE_FLOOR, in units
    of the covariance of all frames."""
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp(min=VARIANCE_FLOOR)[..., None, :]) @ vectors.mT


def fit_mixture(
    frames: Tensor, components: int, iterations: int = 10, tolerance: float = 1e-3, seed: int = 0
) -> GaussianMixture:
    """Return a mixture of full-covariance Gaussians for frames (n, d), by expectation-maximisation
    from k-means, until an iteration gains less than `tolerance` in the mean of ln p(x)."""
    frames = frames.double()
    mean = frames.mean(0)
    covariance = (frames - mean).T @ (frames - mean) / len(frames)
    lower = torch.linalg.cholesky(covariance)
    whitened = torch.linalg.solve_triangular(lower, (frames - mean).T, upper=False).T.float()
    mixture = _k_means(whitened, components, torch.Generator().manual_seed(seed))
    progress = tqdm(
        range(iterations), desc=f"{components} Gaussians", unit=" iterations", disable=None
    )
    previous_evidence = -math.inf
    for _ in progress:
        moments, evidence = expectation(mixture, whitened)
        if evidence - previous_evidence < tolerance:
            break
        previous_evidence = evidence
        mixture = maximisation(mixture, moments, len(whitened))
    means = mean + mixture.means @ lower.T
    return GaussianMixture(mixture.weights, means, lower @ mixture.covariances @ lower.T)


def expectation(mixture: GaussianMixture, frames: Tensor) -> tuple[Tensor, float]:
    """Return the moments of the frames (n, d) under each component, Σ_t γ_tc · monomials of x_t,
    (components, monomials), and the mean of ln p(x)."""
    moments = 0
    total = 0
    for chunk in frames.split(CHUNKS[frames.device.type]):
        monomials = _monomials(chunk)
        responsibilities, evidence = mixture.responsibilities(monomials)
        moments = moments + responsibilities @ monomials.T
        total = total + evidence.sum()
    return moments, float(total) / len(frames)


def maximisation(mixture: GaussianMixture, moments: Tensor, num_frames: int) -> GaussianMixture:
    """Return the most likely mixture for these moments. Components without frames are kept."""
    d = mixture.means.shape[1]
    counts = moments[:, -1]
    has_frames = counts > MIN_COMPONENT_COUNT
    second_moments, first_moments = (moments / counts[:, None]).tensor_split([-d - 1], dim=1)
    means = torch.where(has_frames[:, None], first_moments[:, :-1], mixture.means)
    covariances = _unpack(second_moments, d) - means[:, :, None] * means[:, None]
    covariances = torch.where(has_frames[:, None, None], covariances, mixture.covariances)
    return GaussianMixture(counts / num_frames, means, _floored(covariances))


def train_background(
    train: Corpus, components: int = 2048, seed: int = 0, device: torch.device | str = "cpu"
) -> GaussianMixture:
    """Return the universal background model of a corpus.

    `components` is halved until there are FRAMES_PER_COMPONENT frames for each. Raises CorpusError
    where there are not even enough frames for one.
    """
    frames = torch.cat(list(features_of(train, "background", device)))
    if len(frames) < FRAMES_PER_COMPONENT:
        seconds = f"{len(frames) / 100:.0f} s of speech in its training split"
        needed = f"{FRAMES_PER_COMPONENT / 100:.0f} s"
        raise CorpusError(f"{train.name}: holds {seconds}; i-vectors need at least {needed}")
    if len(frames) > BACKGROUND_FRAMES:
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randperm(len(frames), generator=generator)[:BACKGROUND_FRAMES]
        frames = frames[drawn.to(frames.device)]
    while components * FRAMES_PER_COMPONENT > len(frames):
        components //= 2
    return fit_mixture(frames, components, seed=seed)


def statistics_of(mixture: GaussianMixture, frames: Tensor) -> tuple[Tensor, Tensor]:
    """Return the Baum-Welch statistics of one utterance's frames (n, d). With γ_tc = p(c | x_t) and
    Σ_c = L_c L_cᵀ:

        counts (components,) = Σ_t γ_tc,    sums (components, d) = Σ_t γ_tc L_c⁻¹ (x_t − μ_c)
    """
    counts = 0
    sums = 0
    for chunk in frames.split(CHUNKS[frames.device.type]):
        responsibilities, _ = mixture.responsibilities(_monomials(chunk))
        counts = counts + responsibilities.sum(1)
        sums = sums + responsibilities @ chunk.double()
    deviations = sums - counts[:, None] * mixture.means
    whitened = torch.linalg.solve_triangular(mixture.cholesky, deviations[..., None], upper=False)
    return counts, whitened[..., 0]


# Counts (utterances, components) and sums (utterances, components, d), on the CPU.
Statistics = tuple[Tensor, Tensor]


def collect_statistics(mixture: GaussianMixture, corpus: Corpus) -> Statistics:
    """Return the statistics of every utterance; they take 4·components·(d + 1) bytes each. Those of
    an utterance without speech are zero."""
    components, d = mixture.means.shape
    counts = torch.empty(len(corpus), components)
    sums = torch.empty(len(corpus), components, d)
    for index, frames in enumerate(features_of(corpus, "statistics", mixture.means.device)):
        counts[index], sums[index] = statistics_of(mixture, frames)
    return counts, sums


def blocks(statistics: Statistics, device: torch.device | str) -> Iterator[Statistics]:
    """Yield the statistics of BLOCK utterances at a time, in float64 on the device."""
    for block in zip(*(part.split(BLOCK) for part in statistics), strict=True):
        yield tuple(part.to(device, torch.float64) for part in block)


def posterior(loading: Tensor, counts: Tensor, sums: Tensor, gram: Tensor) -> tuple[Tensor, Tensor]:
    """Return p(w | statistics) of a block of utterances.

    Args:
        loading: L_c⁻¹ T_c, (components, d, dimension).
        counts, sums: as in Statistics.
        gram: `_gram(loading)`.

    Returns:
        means (utterances, dimension) and covariances (utterances, dimension, dimension):

            Cov = (I + Σ_c n_c T_cᵀΣ_c⁻¹T_c)⁻¹,    mean = Cov·b,    b = Σ_c T_cᵀΣ_c⁻¹f_c

    Dehak et al. 2011, eq. 4; Kenny, Boulianne & Dumouchel, Eigenvoice modeling with sparse training
    data, 2005.
    """
    dimension = loading.shape[2]
    precision = _unpack(counts @ gram, dimension) + torch.eye(dimension).to(gram)
    lower = torch.linalg.cholesky(precision)
    linear = sums.flatten(1) @ loading.flatten(0, 1)
    means = torch.cholesky_solve(linear[..., None], lower)[..., 0]
    return means, torch.cholesky_inverse(lower)


def _gram(loading: Tensor) -> Tensor:
    """Return T_cᵀΣ_c⁻¹T_c of every component, (components, dimension·(dimension + 1)/2)."""
    return _pack(loading.mT @ loading)


def train_total_variability(
    statistics: Statistics,
    dimension: int,
    iterations: int = 10,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Return the total-variability matrix as the loading L_c⁻¹ T_c, (components, d, dimension), by
    expectation-maximisation from a random start.

    Each iteration ends with a change of coordinates that makes the mean second moment of w the
    identity (minimum divergence; Kenny, Bayesian speaker verification with heavy-tailed priors,
    2010).
    """
    num_utterances, components, d = statistics[1].shape
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(components, d, dimension, generator=generator, dtype=torch.float64)
    loading = 0.1 * start.to(device)
    has_frames = (statistics[0].sum(0) > MIN_LOADING_COUNT).to(device)
    progress = tqdm(
        range(iterations), desc=f"i-vectors {dimension}", unit=" iterations", disable=None
    )
    for _ in progress:
        # Expectation: moments of w, weighted by the statistics.
        gram = _gram(loading)
        total_moments = 0
        second_moments = 0
        first_moments = 0
        for counts, sums in blocks(statistics, device):
            mean, covariance = posterior(loading, counts, sums, gram)
            moments = _pack(covariance + mean[:, :, None] * mean[:, None])
            second_moments = second_moments + counts.T @ moments
            first_moments = first_moments + mean.T @ sums.flatten(1)
            total_moments = total_moments + moments.sum(0)

        # Maximisation: the loading of each component that has frames.
        first_moments = first_moments.unflatten(1, (components, d)).permute(1, 0, 2)
        loading = loading.clone()
        factors = torch.linalg.cholesky(_unpack(second_moments[has_frames], dimension))
        loading[has_frames] = torch.cholesky_solve(first_moments[has_frames], factors).mT

        # Minimum divergence.
        mean_moments = _unpack(total_moments / num_utterances, dimension)
        loading = loading @ torch.linalg.cholesky(mean_moments)
    return loading


def extract(loading: Tensor, statistics: Statistics) -> Tensor:
    """Return the i-vectors (utterances, dimension), on the CPU."""
    gram = _gram(loading)
    vectors = []
    for counts, sums in blocks(statistics, loading.device):
        means, _ = posterior(loading, counts, sums, gram)
        vectors.append(means.cpu())
    return torch.cat(vectors)
