"""Exchange of the sequence latent: the z of one utterance decoded with the w of another, and the reverse (poster of the
LigHT-DVAE paper). For DSAE, w is its v.

Two measures of the speaker tell what w holds: the mean log-spectrum and F0. Where w holds none of it the exchanged
utterance stays where the one is that its z came from, where w holds all of it it goes where the other one is. To
compare with, a w of another utterance of the same speaker: where it moves one as far, w is not the speaker's.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..data import audio
from ..data.corpus import Corpus, CorpusError, Utterance
from ..fhvae.transformation import conversion_pairs
from ..models.base import DVAE, bounded
from . import figures, metrics, report
from .runs import Options, Run, noise_of

MODELS = ["hit_dvae", "light_dvae", "dsae"]

PAIRS = 32  # of utterances, of different sexes where these are known
EXAMPLES = 3  # pairs of which sound and spectrograms are kept
QUIET = 30.0  # dB under the loudest frame: quieter ones have no part in the mean log-spectrum
LEAST = 0.1  # ln Hz: pairs that are nearer in F0 cannot show which one it follows

COLUMNS = {  # measure: heading, decimals
    "spectrum_between": ("spectra, dB", 2),
    "spectrum_from_z": ("to z's", 2),
    "spectrum_from_w": ("to w's", 2),
    "spectrum_follows_w": ("follows w", 3),
    "spectrum_own_speaker": ("own speaker's w", 2),
    "f0_between": ("F0, ln Hz", 3),
    "f0_from_z": ("to z's", 3),
    "f0_from_w": ("to w's", 3),
    "f0_follows_w": ("follows w", 3),
    "f0_own_speaker": ("own speaker's w", 3),
}


@dataclass
class Analysed:
    """A whole utterance and its latents, one draw."""

    utterance: Utterance
    waveform: np.ndarray  # (samples,)
    spectrum: Tensor  # complex, (frames, bins)
    z: Tensor  # (1, frames, latent)
    w: Tensor  # (1, sequence latent)


def evaluate(runs: list[Run], options: Options) -> list[dict]:
    """One table, and results.json, wav files and figures in the folder of every run."""
    results = report.evaluate_each(runs, options, evaluate_run, "wav files and figures")
    cells = [report.summary_cells(result["summary"], COLUMNS) for result in results]
    rows = [[title, *row] for title, row in zip(report.titles(runs), cells, strict=True)]
    print(f"\n{report.table(['', *(heading for heading, _ in COLUMNS.values())], rows)}")
    print(
        "\nMean ± standard error over exchanges. First the distance between two reconstructed utterances, then"
    )
    print(
        "from z of one with w of the other to each. Follows w: 0 where that stays with z, 1 where it goes with w."
    )
    print(
        "Own speaker's w: the distance to z's that a w of another utterance of the same speaker makes."
    )
    return results


@torch.no_grad()
def evaluate_run(run: Run, options: Options) -> dict:
    """Exchange w within pairs of utterances, measure what it does, and write wav files and figures of the first pairs.
    Returns {"summary": {measure: {mean, standard_error, count}}, "exchanges": a row for each}. Raises CorpusError where
    all utterances are of one speaker."""
    pairs = conversion_pairs(run.test, PAIRS, options.seed)
    if not pairs:
        raise CorpusError(
            f"{run.data}: the utterances to test are all of one speaker; exchange needs two"
        )
    rows = []
    for number, pair in enumerate(tqdm(pairs, "exchange", unit="pair", disable=None)):
        a, b = (analyse(run, index, options.seed) for index in pair)
        again_a, again_b = (analyse(run, another(run.test, index), options.seed) for index in pair)
        latents = ((a, a), (b, b), (a, b), (b, a), (a, again_a), (b, again_b))
        own_a, own_b, a_with_b, b_with_a, near_a, near_b = (
            decode(run.model, z, w) for z, w in latents
        )
        a_to_b, b_to_a = (own_a, own_b, a_with_b, near_a), (own_b, own_a, b_with_a, near_b)
        for z, w, again, decoded in ((a, b, again_a, a_to_b), (b, a, again_b, b_to_a)):
            rows.append(
                {"z": z.utterance.name, "w": w.utterance.name} | compare(*decoded, run.stft)
            )
            if again.utterance is z.utterance:
                rows[-1] |= dict.fromkeys(("spectrum_own_speaker", "f0_own_speaker"), np.nan)
        if number < EXAMPLES:
            write_example(run, a, b, (own_a, own_b, a_with_b, b_with_a), options.seed)
    measures = [{name: row[name] for name in COLUMNS} for row in rows]
    return {"summary": metrics.summary(measures), "exchanges": rows}


def analyse(run: Run, index: int, seed: int) -> Analysed:
    utterance, waveform = run.test.utterances[index], run.test.waveform(index)
    spectrum = run.stft.analyse(torch.from_numpy(waveform).to(run.device))
    noise = run.model.draw_noise(1, len(spectrum), noise_of(seed, utterance.name))
    output = run.model(spectrum.abs().square()[None], noise)
    return Analysed(utterance, waveform, spectrum, output.z, output.w)


def another(test: Corpus, index: int) -> int:
    """The next utterance of the same speaker; `index` where there is no other."""
    order = [(index + k) % len(test) for k in range(1, len(test) + 1)]
    return next(k for k in order if test.utterances[k].speaker == test.utterances[index].speaker)


def decode(model: DVAE, z: Analysed, w: Analysed) -> Tensor:
    """The log-variance (frames, bins) of the z of one utterance with the w of another."""
    return bounded(model.decode(z.z, w.w)[0])


def compare(
    own_z: Tensor, own_w: Tensor, exchanged: Tensor, same: Tensor, stft: audio.STFT
) -> dict[str, float]:
    """Where an exchanged utterance is between the two that its z and its w came from, and how far `same` is from the
    first, its z with a w of the same speaker; all log-variances (frames, bins). Distances are root mean squares."""
    decoded, row = (own_z, own_w, exchanged, same), {}
    spectra = [mean_log_spectrum(log_variance) for log_variance in decoded]
    pitches = [
        audio.pitch(log_variance.exp(), stft).log().nanmedian() for log_variance in decoded
    ]  # nan: no voice
    for name, (z, w, here, near), least in (("spectrum", spectra, 0.0), ("f0", pitches, LEAST)):
        points = ((z, w), (here, z), (here, w), (near, z))
        between, from_z, from_w, own = (float((a - b).square().mean().sqrt()) for a, b in points)
        follows = from_z / (from_z + from_w) if between > least else float("nan")
        row |= {f"{name}_between": between, f"{name}_from_z": from_z, f"{name}_from_w": from_w}
        row |= {f"{name}_follows_w": follows, f"{name}_own_speaker": own}
    return row


def mean_log_spectrum(log_variance: Tensor) -> Tensor:
    """(frames, bins) → dB (bins,), mean over the frames that are not QUIET, the overall level taken out."""
    level = 10 / np.log(10) * log_variance.logsumexp(-1)
    spectrum = 10 / np.log(10) * log_variance[level > level.max() - QUIET].mean(0)
    return spectrum - spectrum.mean()


def write_example(
    run: Run, a: Analysed, b: Analysed, decoded: tuple[Tensor, ...], seed: int
) -> None:
    """A--B.png with the four spectrograms, and wav files: the originals, and each exchanged utterance with the phase of
    the one that its z came from and with one found by Griffin-Lim."""
    first, second = a.utterance.name, b.utterance.name
    titles = [first, second, f"z of {first}, w of {second}", f"z of {second}, w of {first}"]
    panels = [
        (title, log_variance.exp().cpu().numpy())
        for title, log_variance in zip(titles, decoded, strict=True)
    ]
    figures.spectrograms(panels, run.stft, run.target / f"{first}--{second}.png")
    for z, w, log_variance in ((a, b, decoded[2]), (b, a, decoded[3])):
        name, length, noise = z.utterance.name, len(z.waveform), noise_of(seed, z.utterance.name)
        kept = audio.resynthesise(log_variance, z.spectrum, run.stft, length)
        found = audio.griffin_lim(log_variance.exp(), run.stft, length=length, generator=noise)
        exchanged = f"z-{name}--w-{w.utterance.name}"
        audio.write(run.target / f"{name}.wav", z.waveform)
        audio.write(run.target / f"{exchanged}.wav", kept.cpu().numpy())
        audio.write(run.target / f"{exchanged}-griffin-lim.wav", found.cpu().numpy())
