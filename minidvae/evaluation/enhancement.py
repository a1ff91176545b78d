"""Enhancement of noisy speech: mixtures of test speech with noise, or pairs of recordings, for each
signal-to-noise ratio.

Beside the models stand the recording itself, a classical method that needs no training (log-MMSE),
and as the upper bound the Wiener filter that knows speech and noise.
"""

import time
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.special import exp1
from tqdm import tqdm

from ..data import audio, synthetic
from ..data.audio import SAMPLE_RATE, STFT
from ..data.corpus import Corpus
from ..data.layouts import sounds as sound_files
from ..inference.enhance import EnhancementSettings, LearnedNoise, enhance_speech
from ..training.config import SettingError
from . import figures, metrics, report, resynthesis
from .results import Evaluation, Figure, RunResult, Sound, Table
from .runs import Options, Run, group_by_corpus, in_order_of

MODELS = resynthesis.MODELS
SNRS = (0.0, 5.0)  # dB
EXAMPLES = 3  # mixtures of which sounds and a figure are kept

COLUMNS = {  # measure: heading, decimals
    "si_sdr": ("SI-SDR", 2),
    "si_sdr_gain": ("gain", 2),
    "pesq": ("PESQ", 2),
    "pesq_lqo": ("PESQ-LQO", 2),
    "pesq_wb": ("PESQ-WB", 2),
    "estoi": ("ESTOI", 3),
}


@dataclass(frozen=True)
class Mixture:
    name: str
    snr: float | None  # dB; None for recorded pairs
    clean: np.ndarray  # (samples,)
    noisy: np.ndarray


def evaluate(runs: list[Run], options: Options) -> Evaluation:
    """Return a table for each ratio, and for each run its measures, and sounds and figures of
    EXAMPLES."""
    body = []
    results = []
    for group in group_by_corpus(runs):
        group_body, group_results = evaluate_corpus(group, options)
        body += group_body
        results += group_results
    return Evaluation(
        task="enhancement",
        description="Enhancement of noisy speech: mixtures of test speech with noise, or pairs of "
        "recordings, for each signal-to-noise ratio.",
        settings=options.select("noise", "snr", "pairs", "method", "iterations"),
        body=body,
        results=in_order_of(runs, results),
    )


def evaluate_corpus(runs: list[Run], options: Options) -> tuple[list[str | Table], list[RunResult]]:
    mixtures = list(mixtures_of(runs[0], options))
    baselines = {
        "noisy": score(mixtures, [mixture.noisy for mixture in mixtures]),
        "log-MMSE": score(mixtures, [log_mmse(mixture.noisy) for mixture in mixtures]),
        "oracle Wiener": score(mixtures, [oracle(mixture) for mixture in mixtures]),
    }
    results = [evaluate_run(run, options, mixtures) for run in runs]
    rows = dict(baselines)
    for title, result in zip(report.titles(runs), results, strict=True):
        rows[title] = result.values["utterances"]
    body = []
    for snr in dict.fromkeys(mixture.snr for mixture in mixtures):
        body.append("Recorded pairs" if snr is None else f"{snr:g} dB")
        body.append(table(rows, snr))
    body.append(
        "Mean ± standard error over recordings. Gain: of SI-SDR over the noisy recording. PESQ: "
        "narrow band, raw (P.862) and LQO; wide band (P.862.2). RTF: seconds of work for a second "
        "of sound."
    )
    for result in results:
        result.values["baselines"] = baselines
    return body, results


def table(rows: dict[str, list[dict]], snr: float | None) -> Table:
    """Return the means over the recordings of one ratio, a row for each title."""
    lines = []
    for title, utterances in rows.items():
        measures = []
        for utterance in utterances:
            if utterance["snr"] == snr:
                measures.append({name: utterance.get(name, np.nan) for name in (*COLUMNS, "rtf")})
        summary = metrics.summary(measures)
        rtf = report.number(summary["rtf"]["mean"], ".2f")
        lines.append([title, *report.summary_cells(summary, COLUMNS), rtf])
    return Table(["", *(heading for heading, _ in COLUMNS.values()), "RTF"], lines)


def score(mixtures: list[Mixture], estimates: list[np.ndarray]) -> list[dict]:
    """Return the measures of each estimate, with the name and the ratio of its mixture."""
    triples = []
    for mixture, estimate in zip(mixtures, estimates, strict=True):
        triples.append((mixture.clean, mixture.noisy, estimate))
    measures = metrics.metrics_of(triples, metrics.enhancement_metrics)
    rows = []
    for mixture, measure in zip(mixtures, measures, strict=True):
        rows.append({"name": mixture.name, "snr": mixture.snr} | measure)
    return rows


def evaluate_run(run: Run, options: Options, mixtures: list[Mixture]) -> RunResult:
    """Enhance every mixture, then measure it: {"settings", "utterances"}."""
    settings = EnhancementSettings.for_method(options.method, options.iterations)
    estimates = []
    rows = []
    sounds = []
    pictures = []
    for number, mixture in enumerate(tqdm(mixtures, "enhancement", unit="recording", disable=None)):
        noisy = torch.from_numpy(mixture.noisy).to(run.device)
        seed = zlib.crc32(mixture.name.encode()) + options.seed
        start = time.perf_counter()
        clean, learned = enhance_speech(run.model, run.stft, noisy, settings, seed)
        estimate = clean.cpu().numpy()
        seconds = time.perf_counter() - start
        run.check_finite(estimate, f"{mixture.name}: the model's output")
        estimates.append(estimate)
        objectives = [noise.objective for noise in learned]
        rows.append({"rtf": seconds / (len(noisy) / SAMPLE_RATE), "objective": objectives})
        if number < EXAMPLES:
            waveforms = {"noisy": mixture.noisy, "enhanced": estimate, "clean": mixture.clean}
            for label, waveform in waveforms.items():
                sounds.append(Sound(mixture.name, label, waveform))
            png = draw_enhancement(waveforms, learned, run.stft)
            pictures.append(Figure(mixture.name, png, group=mixture.name))
    scores = score(mixtures, estimates)
    values = {
        "settings": asdict(settings),
        "utterances": [measures | row for measures, row in zip(scores, rows, strict=True)],
    }
    return run.result(values, sounds=sounds, figures=pictures)


def draw_enhancement(
    waveforms: dict[str, np.ndarray], learned: list[LearnedNoise], stft: STFT
) -> bytes:
    """Draw spectrograms of sounds (samples,) by title, the noisy one first, and of the noise as it
    was learned."""
    peak = np.abs(next(iter(waveforms.values()))).max()
    panels = []
    for title, waveform in waveforms.items():
        power = stft.analyse(torch.from_numpy(waveform / peak)).abs().square()
        panels.append((title, power.numpy()))
    noise = torch.cat([block.levels @ block.spectra for block in learned]).cpu().numpy()
    panels.append(("noise as learned, block by block", noise))
    return figures.spectrograms(panels, stft)


def mixtures_of(run: Run, options: Options) -> Iterator[Mixture]:
    """Yield recorded pairs, or every test utterance at each ratio: with clips of a folder, looped
    where they are shorter, or with the built-in noises in turn. The same ones for every model."""
    if options.pairs:
        if options.noise or options.snr:
            raise SettingError(
                "recorded pairs are as they were recorded; leave out --noise and --snr"
            )
        yield from run.test
        return
    snrs = options.snr or SNRS
    if not np.isfinite(snrs).all():
        raise SettingError("--snr: expected finite numbers")
    clips = noise_clips(options.noise) if options.noise else None
    for snr in snrs:
        for index in range(len(run.test)):
            yield mix(run.test, index, snr, clips, options.seed)


def mix(test: Corpus, index: int, snr: float, clips: list[np.ndarray] | None, seed: int) -> Mixture:
    """Mix a test utterance with one of the clips, or of the built-in noises, at a ratio in dB."""
    utterance = test.utterances[index]
    clean = test.waveform(index)
    random = np.random.default_rng((seed, zlib.crc32(utterance.name.encode())))
    if clips is None:
        name = synthetic.NOISES[index % len(synthetic.NOISES)]
        noise = synthetic.make_noise(name, len(clean), random)
    else:
        clip = clips[index % len(clips)]
        start = random.choice(np.flatnonzero(clip))  # not in a silence
        noise = np.take(clip, np.arange(len(clean)) + start, mode="wrap")
    noisy = clean + synthetic.at_ratio(noise, clean, snr)
    return Mixture(f"{utterance.name}-{snr:g}dB", snr, clean, noisy.astype(np.float32))


def noise_clips(folder: Path) -> list[np.ndarray]:
    """Return the sounds of a folder that are not silent. Raises SettingError where there are
    none."""
    clips = []
    for path in sound_files(folder):
        clip = audio.load(path)
        if clip.any():
            clips.append(clip)
    if not clips:
        raise SettingError(f"{folder}: holds no sound of noise")
    return clips


def load_pairs(folder: Path) -> Iterator[Mixture]:
    """Yield the pairs DIR/clean/NAME and DIR/noisy/NAME, or clean-NAME and noisy-NAME in one
    folder. Raises SettingError where there is none, or two files differ in length."""
    in_one_folder = sound_files(folder, "clean-*")
    clean_files = in_one_folder or sound_files(folder, "clean/*")
    if not clean_files:
        raise SettingError(
            f"{folder}: expected clean/ and noisy/ with the same names, or clean-* and noisy-*"
        )
    for path in clean_files:
        if in_one_folder:
            name = path.name.removeprefix("clean-")
            partner = folder / f"noisy-{name}"
        else:
            name = path.name
            partner = folder / "noisy" / name
        clean = audio.load(path)
        noisy = audio.load(partner)
        if clean.shape != noisy.shape:
            raise SettingError(f"{folder}: {path.name} and {partner.name} differ in length")
        yield Mixture(Path(name).stem, None, clean, noisy)


def oracle(mixture: Mixture) -> np.ndarray:
    """Return the estimate of the Wiener filter |s|²/(|s|² + |n|²), which knows both."""
    stft = STFT()
    clean = stft.analyse(torch.from_numpy(mixture.clean))
    noisy = stft.analyse(torch.from_numpy(mixture.noisy))
    speech = clean.abs().square()
    noise = (noisy - clean).abs().square()
    gains = speech / (speech + noise).clamp_min(1e-12)
    return stft.synthesise(gains * noisy, len(mixture.noisy)).numpy()


def log_mmse(noisy: np.ndarray) -> np.ndarray:
    """Return the log-spectral amplitude estimate of Ephraim & Malah 1985 with a decision-directed
    a-priori ratio, the noise tracked by the probability of speech of Gerkmann & Hendriks 2012."""
    stft = STFT(512, 256)
    spectrum = stft.analyse(torch.from_numpy(noisy))
    power = spectrum.abs().square().numpy().astype(np.float64) + 1e-12
    noise = power[:5].mean(0)
    presence = np.full(stft.bins, 0.5)
    previous_speech = np.zeros(stft.bins)
    speech_ratio = 10**1.5  # the signal-to-noise ratio where there is speech, 15 dB
    gains = np.empty_like(power)
    for t, frame in enumerate(power):
        exponent = -frame / noise * speech_ratio / (1 + speech_ratio)
        probability = 1 / (1 + (1 + speech_ratio) * np.exp(exponent))
        presence = 0.9 * presence + 0.1 * probability
        probability = np.where(presence > 0.99, np.minimum(probability, 0.99), probability)
        noise = 0.8 * noise + 0.2 * ((1 - probability) * frame + probability * noise)
        posterior_snr = np.minimum(frame / noise, 1e3)
        excess = np.maximum(posterior_snr - 1, 0)
        prior_snr = np.maximum(0.98 * previous_speech / noise + 0.02 * excess, 10**-2.5)
        wiener = prior_snr / (1 + prior_snr)
        integral = exp1(np.maximum(wiener * posterior_snr, 1e-8))
        gains[t] = np.minimum(wiener * np.exp(0.5 * integral), 1)
        previous_speech = gains[t] ** 2 * frame
    enhanced = torch.from_numpy(gains).to(spectrum) * spectrum
    return stft.synthesise(enhanced, len(noisy)).numpy()
