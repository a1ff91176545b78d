"""I-vectors (Dehak et al., Front-end factor analysis for speaker verification, 2011), the baseline of verification.

The frames of an utterance come from a Gaussian mixture whose means are those of the universal background model,
moved within one low-dimensional subspace by a vector w that belongs to the utterance:

    p(x_t | w) = Σ_c ω_c N(x_t; μ_c + T_c w, Σ_c),    w ~ N(0, I);    the i-vector is E[w | x_{1:T}].

    background = train_background(train)                               # ω_c, μ_c, Σ_c
    statistics = collect_statistics(background, train)                 # of Baum and Welch
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

FRAMES_PER_COMPONENT = 400  # at least: each has 1,891 numbers to be estimated
BACKGROUND_FRAMES = 2_000_000  # at most, drawn at random: about 7 hours of speech
VARIANCE_FLOOR = 0.01  # of a component in any direction, over that of all frames in this direction
CHUNKS = {"cpu": 1024, "cuda": 16384}  # frames at a time
BLOCK = 256  # utterances at a time


def features(waveform: Tensor) -> Tensor:
    """Waveform (samples,) → 20 MFCC, their slopes and the slopes' slopes, of the frames with speech (frames, 60). The
    utterance's mean is not subtracted: the models that i-vectors are compared with see it too."""
    cepstra = audio.mfcc(waveform)
    slopes = audio.deltas(cepstra)
    return torch.cat([cepstra, slopes, audio.deltas(slopes)], dim=-1)[audio.voiced_frames(waveform)]


def features_of(corpus: Corpus, title: str, device: torch.device | str) -> Iterator[Tensor]:
    """`features` of every utterance, in order."""
    for index in tqdm(range(len(corpus)), desc=title, unit=" utterances", disable=None):
        yield features(torch.from_numpy(corpus.waveform(index)).to(device))


def _pack(symmetric: Tensor) -> Tensor:
    """(..., d, d) → its upper triangle (..., d(d + 1)/2)"""
    rows, columns = torch.triu_indices(*symmetric.shape[-2:], device=symmetric.device)
    return symmetric[..., rows, columns]


def _unpack(packed: Tensor, d: int) -> Tensor:
    """(..., d(d + 1)/2) → (..., d, d), symmetric"""
    rows, columns = torch.triu_indices(d, d, device=packed.device)
    symmetric = packed.new_empty(*packed.shape[:-1], d, d)
    symmetric[..., rows, columns] = packed
    symmetric[..., columns, rows] = packed
    return symmetric


def _monomials(frames: Tensor) -> Tensor:
    """(n, d) → x_i x_j for i ≤ j as _pack orders them, x_i, 1: (d(d + 1)/2 + d + 1, n) in float64"""
    x = frames.double().T.contiguous()
    rows, columns = torch.triu_indices(len(x), len(x), device=x.device)
    return torch.cat([x[rows] * x[columns], x, torch.ones_like(x[:1])])


@dataclass(frozen=True)
class GaussianMixture:
    """Weights (components,), means (components, d) and full covariances (components, d, d), float64."""

    weights: Tensor
    means: Tensor
    covariances: Tensor

    @cached_property
    def cholesky(self) -> Tensor:
        """Lower triangular L_c with Σ_c = L_c L_cᵀ, (components, d, d)"""
        return torch.linalg.cholesky(self.covariances)

    @cached_property
    def coefficients(self) -> Tensor:
        """Of ln ω_c N(x; μ_c, Σ_c) in the monomials of x, (components, monomials), with P = Σ_c⁻¹:

        −½ xᵀPx + xᵀPμ + ln ω_c − ½ μᵀPμ − ½ ln |2πΣ_c|"""
        d = self.means.shape[1]
        precision = torch.cholesky_inverse(self.cholesky)
        linear = torch.einsum("cij,cj->ci", precision, self.means)
        log_volume = self.cholesky.diagonal(dim1=1, dim2=2).log().sum(1) + d / 2 * math.log(
            2 * math.pi
        )
        constant = self.weights.log() - (linear * self.means).sum(1) / 2 - log_volume
        twice = torch.ones_like(precision[0]).fill_diagonal_(0.5)  # x_i x_j stands for x_j x_i too
        return torch.cat([_pack(-precision * twice), linear, constant[:, None]], dim=1)

    def responsibilities(self, monomials: Tensor) -> tuple[Tensor, Tensor]:
        """γ_c = p(c | x), (components, n), and ln p(x), (n,)"""
        joint = self.coefficients @ monomials
        evidence = joint.logsumexp(0)
        return joint.sub_(evidence).exp_(), evidence


def _k_means(frames: Tensor, components: int, generator: torch.Generator) -> GaussianMixture:
    """Ten rounds of k-means on frames (n, d) of zero mean and unit covariance, from frames drawn at random. Every
    component gets the average covariance within the clusters."""
    n, d = frames.shape
    centres = frames[torch.randperm(n, generator=generator)[:components].to(frames.device)]
    for _ in tqdm(range(10), desc="k-means", disable=None):
        sums = centres.new_zeros(components, d + 1)
        for chunk in frames.split(CHUNKS[frames.device.type]):
            nearest = (chunk @ centres.T - centres.square().sum(1) / 2).argmax(1)
            sums.index_add_(0, nearest, torch.cat([chunk, torch.ones_like(chunk[:, :1])], dim=1))
        centres = torch.where(sums[:, -1:] > 0, sums[:, :-1] / sums[:, -1:].clamp(min=1), centres)
    means, counts = centres.double(), sums[:, -1].double()
    within = torch.eye(d).to(means) - (means.T * (counts / n)) @ means
    return GaussianMixture(
        (counts + 1) / (n + components), means, _floored(within).expand(components, d, d)
    )


def _floored(covariance: Tensor) -> Tensor:
    """The likeliest covariance (..., d, d) with no eigenvalue below the floor, in units of all frames' covariance."""
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp(min=VARIANCE_FLOOR)[..., None, :]) @ vectors.mT


def fit_mixture(
    frames: Tensor, components: int, iterations: int = 10, tolerance: float = 1e-3, seed: int = 0
) -> GaussianMixture:
    """A mixture of full-covariance Gaussians for frames (n, d), by expectation-maximisation from k-means, until an
    iteration has gained less than `tolerance` in the mean of ln p(x)."""
    frames = frames.double()
    mean, d, before = frames.mean(0), frames.shape[1], -math.inf
    lower = torch.linalg.cholesky((frames - mean).T @ (frames - mean) / len(frames))
    frames = torch.linalg.solve_triangular(lower, (frames - mean).T, upper=False).T.float()
    mixture = _k_means(frames, components, torch.Generator().manual_seed(seed))
    for _ in tqdm(
        range(iterations), desc=f"{components} Gaussians", unit=" iterations", disable=None
    ):
        moments, total = 0, 0
        for chunk in frames.split(CHUNKS[frames.device.type]):
            monomials = _monomials(chunk)
            responsibilities, evidence = mixture.responsibilities(monomials)
            moments = moments + responsibilities @ monomials.T
            total = total + evidence.sum()
        if (now := float(total) / len(frames)) - before < tolerance:
            break
        before, counts, alive = now, moments[:, -1], moments[:, -1] > 1e-6
        second, means = (moments / counts[:, None]).tensor_split([-d - 1], dim=1)
        means = torch.where(alive[:, None], means[:, :-1], mixture.means)
        covariances = _unpack(second, d) - means[:, :, None] * means[:, None]
        covariances = torch.where(alive[:, None, None], covariances, mixture.covariances)
        mixture = GaussianMixture(counts / len(frames), means, _floored(covariances))
    return GaussianMixture(
        mixture.weights, mean + mixture.means @ lower.T, lower @ mixture.covariances @ lower.T
    )


def train_background(
    train: Corpus, components: int = 2048, seed: int = 0, device: torch.device | str = "cpu"
) -> GaussianMixture:
    """The universal background model of a corpus. `components` is halved until there are FRAMES_PER_COMPONENT frames
    for each. CorpusError where not even one component has so many."""
    frames = torch.cat(list(features_of(train, "background", device)))
    if len(frames) < FRAMES_PER_COMPONENT:
        seconds = f"{len(frames) / 100:.0f} s of speech in its training split"
        raise CorpusError(
            f"{train.name}: holds {seconds}; i-vectors need at least {FRAMES_PER_COMPONENT / 100:.0f} s"
        )
    if len(frames) > BACKGROUND_FRAMES:
        chosen = torch.randperm(len(frames), generator=torch.Generator().manual_seed(seed))[
            :BACKGROUND_FRAMES
        ]
        frames = frames[chosen.to(frames.device)]
    while components * FRAMES_PER_COMPONENT > len(frames):
        components //= 2
    return fit_mixture(frames, components, seed=seed)


def statistics_of(mixture: GaussianMixture, frames: Tensor) -> tuple[Tensor, Tensor]:
    """The statistics of Baum and Welch of one utterance's frames (n, d): with γ_tc = p(c | x_t) and Σ_c = L_c L_cᵀ,

    counts (components,) = Σ_t γ_tc,    sums (components, d) = Σ_t γ_tc L_c⁻¹ (x_t − μ_c)."""
    counts, sums = 0, 0
    for chunk in frames.split(CHUNKS[frames.device.type]):
        responsibilities, _ = mixture.responsibilities(_monomials(chunk))
        counts = counts + responsibilities.sum(1)
        sums = sums + responsibilities @ chunk.double()
    deviations = sums - counts[:, None] * mixture.means
    return counts, torch.linalg.solve_triangular(
        mixture.cholesky, deviations[..., None], upper=False
    )[..., 0]


Statistics = tuple[
    Tensor, Tensor
]  # counts (utterances, components) and sums (utterances, components, d) on the CPU


def collect_statistics(mixture: GaussianMixture, corpus: Corpus) -> Statistics:
    """The statistics of every utterance: 4·components·(d + 1) bytes each. An utterance without speech has zeros."""
    (components, d), device = mixture.means.shape, mixture.means.device
    counts, sums = torch.empty(len(corpus), components), torch.empty(len(corpus), components, d)
    for index, frames in enumerate(features_of(corpus, "statistics", device)):
        counts[index], sums[index] = statistics_of(mixture, frames)
    return counts, sums


def blocks(statistics: Statistics, device: torch.device | str) -> Iterator[Statistics]:
    """Some utterances at a time, in float64 on the device."""
    for block in zip(*(part.split(BLOCK) for part in statistics), strict=True):
        yield tuple(part.to(device, torch.float64) for part in block)


def posterior(loading: Tensor, counts: Tensor, sums: Tensor, gram: Tensor) -> tuple[Tensor, Tensor]:
    """p(w | statistics) of a block of utterances.

    loading: L_c⁻¹ T_c, (components, d, dimension); gram: `_gram(loading)`; counts and sums as in Statistics. Returns
    means (utterances, dimension) and covariances (utterances, dimension, dimension):

        Cov = (I + Σ_c n_c T_cᵀΣ_c⁻¹T_c)⁻¹,    mean = Cov·b,    b = Σ_c T_cᵀΣ_c⁻¹f_c.

    Dehak et al. 2011, eq. 4; Kenny, Boulianne & Dumouchel, Eigenvoice modeling with sparse training data, 2005.
    """
    dimension = loading.shape[2]
    lower = torch.linalg.cholesky(_unpack(counts @ gram, dimension) + torch.eye(dimension).to(gram))
    linear = sums.flatten(1) @ loading.flatten(0, 1)
    return torch.cholesky_solve(linear[..., None], lower)[..., 0], torch.cholesky_inverse(lower)


def _gram(loading: Tensor) -> Tensor:
    """T_cᵀΣ_c⁻¹T_c of every component, (components, dimension·(dimension + 1)/2)"""
    return _pack(loading.mT @ loading)


def train_total_variability(
    statistics: Statistics,
    dimension: int,
    iterations: int = 10,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """The total variability matrix by expectation-maximisation, from a random start. Each iteration ends with a change
    of coordinates that makes the average second moment of w the identity (minimum divergence; Kenny, Bayesian speaker
    verification with heavy-tailed priors, 2010). Returns the loading L_c⁻¹ T_c (components, d, dimension)."""
    utterances, components, d = statistics[1].shape
    start = torch.randn(
        components, d, dimension, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    loading, present = 0.1 * start.to(device), (statistics[0].sum(0) > 1e-3).to(device)
    for _ in tqdm(
        range(iterations), desc=f"i-vectors {dimension}", unit=" iterations", disable=None
    ):
        gram, average, second, first = _gram(loading), 0, 0, 0
        for counts, sums in blocks(statistics, device):
            mean, covariance = posterior(loading, counts, sums, gram)
            moments = _pack(covariance + mean[:, :, None] * mean[:, None])
            second = second + counts.T @ moments
            first = first + mean.T @ sums.flatten(1)
            average = average + moments.sum(0)
        first = first.unflatten(1, (components, d)).permute(1, 0, 2)
        loading = loading.clone()
        factors = torch.linalg.cholesky(_unpack(second[present], dimension))
        loading[present] = torch.cholesky_solve(first[present], factors).mT
        loading = loading @ torch.linalg.cholesky(_unpack(average / utterances, dimension))
    return loading


def extract(loading: Tensor, statistics: Statistics) -> Tensor:
    """The i-vectors (utterances, dimension), on the CPU."""
    gram = _gram(loading)
    return torch.cat(
        [posterior(loading, *block, gram)[0].cpu() for block in blocks(statistics, loading.device)]
    )
