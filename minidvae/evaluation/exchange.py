"""Exchange of the sequence latent: the z of one utterance decoded with the w of another, and the
reverse (poster of the LigHT-DVAE paper). For DSAE, w is its v.

Two measures of the speaker tell what w holds: the mean log-spectrum and F0. Where w holds none of
it, the exchanged utterance stays with the one that its z came from; where w holds all of it, it
goes to the one that its w came from. For comparison, a w of another utterance of the same speaker:
where it moves an utterance as far, w does not hold the speaker.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..data import audio
from ..data.corpus import Corpus, CorpusError, Utterance
from ..models import MODELS as ALL_MODELS
from ..models.base import DVAE, bounded
from ..models.dsae import DSAE
from ..models.light_dvae import LigHTDVAE
from . import figures, metrics, report
from .pairs import conversion_pairs
from .results import Evaluation, Figure, RunResult, Sound, Table
from .runs import Options, Run, generator_for

MODELS = [name for name, (kind, _) in ALL_MODELS.items() if issubclass(kind, LigHTDVAE | DSAE)]

PAIRS = 32  # pairs of utterances, of speakers of different sexes where these are known
EXAMPLES = 3  # pairs of which sound and spectrograms are kept
QUIET = 30.0  # dB under the loudest frame: quieter ones have no part in the mean log-spectrum
MIN_F0_DISTANCE = 0.1  # ln Hz: pairs that are nearer cannot show which one the F0 follows

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
class AnalysedUtterance:
    """A whole utterance and its latents, one draw."""

    utterance: Utterance
    waveform: np.ndarray  # (samples,)
    spectrum: Tensor  # complex, (frames, bins)
    z: Tensor  # (1, frames, latent)
    w: Tensor  # (1, sequence latent)


def evaluate(runs: list[Run], options: Options) -> Evaluation:
    """Return one table, and for each run its measures, and sounds and figures of EXAMPLES."""
    results = [evaluate_run(run, options) for run in runs]
    rows = []
    for title, result in zip(report.titles(runs), results, strict=True):
        rows.append([title, *report.summary_cells(result.values["summary"], COLUMNS)])
    return Evaluation(
        task="exchange",
        description="Exchange of the sequence latent: the z of one utterance decoded with the w of "
        "another, and the reverse (poster of the LigHT-DVAE paper). For DSAE, w is its v.",
        settings=options.select(),
        body=[
            Table(["", *(heading for heading, _ in COLUMNS.values())], rows),
            "Mean ± standard error over exchanges. First the distance between two reconstructed "
            "utterances, then from z of one with w of the other to each. Follows w: 0 where that "
            "stays with z, 1 where it goes with w. Own speaker's w: the distance to z's that a w "
            "of another utterance of the same speaker makes.",
        ],
        results=results,
    )


@torch.no_grad()
def evaluate_run(run: Run, options: Options) -> RunResult:
    """Exchange w within pairs of utterances and measure what it does, {"summary", "exchanges"}.
    Raises CorpusError where all utterances are of one speaker."""
    pairs = conversion_pairs(run.test, PAIRS, options.seed)
    if not pairs:
        raise CorpusError(
            f"{run.data}: the utterances to test are all of one speaker; exchange needs two"
        )
    rows = []
    sounds = []
    pictures = []
    for number, (first, second) in enumerate(tqdm(pairs, "exchange", unit="pair", disable=None)):
        a = analyse(run, first, options.seed)
        b = analyse(run, second, options.seed)
        for z_from, w_from, index in ((a, b, first), (b, a, second)):
            other = analyse(run, another_of_speaker(run.test, index), options.seed)
            rows.append(measure_exchange(run, z_from, w_from, other))
        if number < EXAMPLES:
            sounds += example_sounds(run, a, b, options.seed)
            pictures.append(example_figure(run, a, b))
    measures = []
    for row in rows:
        measures.append({name: row[name] for name in COLUMNS})
    values = {"summary": metrics.summary(measures), "exchanges": rows}
    return run.result(values, sounds=sounds, figures=pictures)


def analyse(run: Run, index: int, seed: int) -> AnalysedUtterance:
    utterance = run.test.utterances[index]
    waveform = run.test.waveform(index)
    spectrum = run.stft.analyse(torch.from_numpy(waveform).to(run.device))
    generator = generator_for(seed, utterance.name)
    noise = run.model.draw_noise(1, len(spectrum), generator)
    output = run.model(spectrum.abs().square()[None], noise)
    return AnalysedUtterance(utterance, waveform, spectrum, output.z, output.w)


def another_of_speaker(test: Corpus, index: int) -> int:
    """Return the next utterance of the same speaker; `index` where there is no other."""
    for k in range(1, len(test) + 1):
        other = (index + k) % len(test)
        if test.utterances[other].speaker == test.utterances[index].speaker:
            return other
    return index


def decode(model: DVAE, z_from: AnalysedUtterance, w_from: AnalysedUtterance) -> Tensor:
    """Return the log-variance (frames, bins) of the z of one utterance with the w of another."""
    return bounded(model.decode(z_from.z, w_from.w)[0])


def measure_exchange(
    run: Run, z_from: AnalysedUtterance, w_from: AnalysedUtterance, other: AnalysedUtterance
) -> dict:
    """Return the measures of one exchange. other: an utterance of the speaker of `z_from`."""
    row = {"z": z_from.utterance.name, "w": w_from.utterance.name}
    row |= compare(
        decode(run.model, z_from, z_from),
        decode(run.model, w_from, w_from),
        decode(run.model, z_from, w_from),
        decode(run.model, z_from, other),
        run.stft,
    )
    if other.utterance is z_from.utterance:
        row["spectrum_own_speaker"] = np.nan
        row["f0_own_speaker"] = np.nan
    return row


def compare(
    of_z: Tensor, of_w: Tensor, exchanged: Tensor, same_speaker: Tensor, stft: audio.STFT
) -> dict[str, float]:
    """Measure where an exchanged utterance is between the two that its z and its w came from, and
    how far z with a w of the same speaker is from the first; all log-variances (frames, bins).
    Distances are root mean squares."""
    decoded = (of_z, of_w, exchanged, same_speaker)
    spectra = [mean_log_spectrum(log_variance) for log_variance in decoded]
    pitches = []
    for log_variance in decoded:
        f0 = audio.pitch(log_variance.exp(), stft)  # nan: no voice
        pitches.append(f0.log().nanmedian())
    row = {}
    row |= distances("spectrum", *spectra, min_distance=0.0)
    row |= distances("f0", *pitches, min_distance=MIN_F0_DISTANCE)
    return row


def distances(
    name: str,
    of_z: Tensor,
    of_w: Tensor,
    exchanged: Tensor,
    same_speaker: Tensor,
    min_distance: float,
) -> dict[str, float]:
    between = rms_distance(of_z, of_w)
    from_z = rms_distance(exchanged, of_z)
    from_w = rms_distance(exchanged, of_w)
    follows_w = from_z / (from_z + from_w) if between > min_distance else float("nan")
    return {
        f"{name}_between": between,
        f"{name}_from_z": from_z,
        f"{name}_from_w": from_w,
        f"{name}_follows_w": follows_w,
        f"{name}_own_speaker": rms_distance(same_speaker, of_z),
    }


def rms_distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).square().mean().sqrt())


def mean_log_spectrum(log_variance: Tensor) -> Tensor:
    """Return the mean spectrum in dB (bins,) of (frames, bins) over the frames that are not QUIET,
    with the overall level taken out."""
    decibel = 10 / np.log(10)
    level = decibel * log_variance.logsumexp(-1)
    spectrum = decibel * log_variance[level > level.max() - QUIET].mean(0)
    return spectrum - spectrum.mean()


def group_name(a: AnalysedUtterance, b: AnalysedUtterance) -> str:
    return f"{a.utterance.name}--{b.utterance.name}"


def exchange_label(z_from: AnalysedUtterance, w_from: AnalysedUtterance) -> str:
    return f"z of {z_from.utterance.name}, w of {w_from.utterance.name}"


def example_figure(run: Run, a: AnalysedUtterance, b: AnalysedUtterance) -> Figure:
    """Draw the spectrograms of two utterances and of both exchanges."""
    panels = []
    for title, z_from, w_from in (
        (a.utterance.name, a, a),
        (b.utterance.name, b, b),
        (exchange_label(a, b), a, b),
        (exchange_label(b, a), b, a),
    ):
        power = decode(run.model, z_from, w_from).exp().cpu().numpy()
        panels.append((title, power))
    group = group_name(a, b)
    return Figure(group, figures.spectrograms(panels, run.stft), group=group)


def example_sounds(run: Run, a: AnalysedUtterance, b: AnalysedUtterance, seed: int) -> list[Sound]:
    """Return the originals, and each exchanged utterance with the phase of the one that its z came
    from and with one found by Griffin-Lim."""
    group = group_name(a, b)
    sounds = [
        Sound(group, a.utterance.name, a.waveform),
        Sound(group, b.utterance.name, b.waveform),
    ]
    for z_from, w_from in ((a, b), (b, a)):
        log_variance = decode(run.model, z_from, w_from)
        length = len(z_from.waveform)
        label = exchange_label(z_from, w_from)
        generator = generator_for(seed, z_from.utterance.name)
        with_phase = audio.resynthesise(log_variance, z_from.spectrum, run.stft, length)
        griffin_lim = audio.griffin_lim(
            log_variance.exp(), run.stft, length=length, generator=generator
        )
        sounds.append(Sound(group, label, with_phase.cpu().numpy()))
        sounds.append(Sound(group, f"{label}, Griffin-Lim", griffin_lim.cpu().numpy()))
    return sounds
