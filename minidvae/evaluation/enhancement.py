"""Enhancement of noisy speech: mixtures of test speech with noise, or pairs of recordings, per signal-to-noise ratio.

Beside the models stand the recording itself, a classical method that needs no training (log-MMSE), and as the ceiling
the Wiener filter that knows speech and noise.
"""

import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from scipy.special import exp1
from tqdm import tqdm

from ..data import audio, synthetic
from ..data.audio import SAMPLE_RATE, STFT
from ..data.corpus import Corpus
from ..data.layouts import sounds
from ..inference.enhance import Settings, enhance_speech
from ..training.config import SettingError
from . import figures, metrics, report, resynthesis
from .runs import Options, Run

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


@report.by_corpus
def evaluate(runs: list[Run], options: Options) -> list[dict]:
    """A table for each ratio, and results.json, wav files and figures in the folder of every run."""
    mixtures = list(mixtures_of(runs[0], options))
    baselines = {
        "noisy": score(mixtures, [mixture.noisy for mixture in mixtures]),
        "log-MMSE": score(mixtures, [log_mmse(mixture.noisy) for mixture in mixtures]),
        "oracle Wiener": score(mixtures, [oracle(mixture) for mixture in mixtures]),
    }
    enhanced = partial(evaluate_run, mixtures=mixtures)
    results = report.evaluate_each(runs, options, enhanced, "wav files and figures")
    titles = dict(
        zip(report.titles(runs), (result["utterances"] for result in results), strict=True)
    )
    for snr in dict.fromkeys(mixture.snr for mixture in mixtures):
        cells = [
            [title, *row(utterances, snr)] for title, utterances in (baselines | titles).items()
        ]
        print(f"\n{'recorded pairs' if snr is None else f'{snr:g} dB'}")
        print(report.table(["", *(heading for heading, _ in COLUMNS.values()), "RTF"], cells))
    about = "Gain: of SI-SDR over the noisy recording. PESQ: narrow band, raw (P.862) and LQO; wide band (P.862.2)."
    print(
        f"\nMean ± standard error over recordings. {about} RTF: seconds of work for a second of sound."
    )
    return [result | {"baselines": baselines} for result in results]


def score(mixtures: list[Mixture], estimates: list[np.ndarray]) -> list[dict]:
    """What each estimate is measured as, with the name and the ratio of its mixture."""
    triples = (
        (m.clean, m.noisy, estimate) for m, estimate in zip(mixtures, estimates, strict=True)
    )
    measures = metrics.metrics_of(triples, metrics.enhancement_metrics)
    return [
        {"name": m.name, "snr": m.snr} | found for m, found in zip(mixtures, measures, strict=True)
    ]


def row(utterances: list[dict], snr: float | None) -> list[str]:
    """The cells of a table's row: means over the recordings of one ratio."""
    chosen = [{"rtf": np.nan} | utterance for utterance in utterances if utterance["snr"] == snr]
    summary = metrics.summary(
        {name: utterance[name] for name in (*COLUMNS, "rtf")} for utterance in chosen
    )
    return [*report.summary_cells(summary, COLUMNS), report.number(summary["rtf"]["mean"], ".2f")]


def evaluate_run(run: Run, options: Options, mixtures: list[Mixture]) -> dict:
    """Every mixture enhanced, then measured: {"settings", "utterances"}."""
    settings, estimates, rows = Settings.of(options.method, options.iterations), [], []
    for number, mixture in enumerate(tqdm(mixtures, "enhancement", unit="recording", disable=None)):
        noisy, seed = (
            torch.from_numpy(mixture.noisy).to(run.device),
            zlib.crc32(mixture.name.encode()) + options.seed,
        )
        start = time.perf_counter()
        clean, learned = enhance_speech(run.model, run.stft, noisy, settings, seed)
        estimates.append(clean.cpu().numpy())
        rtf = (time.perf_counter() - start) / (len(mixture.noisy) / SAMPLE_RATE)
        run.check_finite(estimates[-1], f"{mixture.name}: the model's output")
        rows.append({"rtf": rtf, "objective": [objective for *_, objective in learned]})
        if number < EXAMPLES:
            keep(run, mixture, estimates[-1], learned)
    scores = score(mixtures, estimates)
    return {
        "settings": vars(settings),
        "utterances": [a | b for a, b in zip(scores, rows, strict=True)],
    }


def keep(run: Run, mixture: Mixture, estimate: np.ndarray, learned: list) -> None:
    """Three sounds, and a picture of them with the noise as the model learned it."""
    heard = {"noisy": mixture.noisy, "enhanced": estimate, "clean": mixture.clean}
    for kind, sound in heard.items():
        audio.write(run.target / f"{mixture.name}-{kind}.wav", sound)
    picture(heard, learned, run.stft, run.target / f"{mixture.name}.png")


def picture(heard: dict[str, np.ndarray], learned: list, stft: STFT, path: Path) -> None:
    """Spectrograms of sounds (samples,), the noisy one first, and of the noise as `enhance_speech` learned it."""
    peak = np.abs(next(iter(heard.values()))).max()
    panels = [
        (kind, stft.analyse(torch.from_numpy(x / peak)).abs().square().numpy())
        for kind, x in heard.items()
    ]
    noise = torch.cat([levels @ spectra for levels, spectra, _ in learned]).cpu().numpy()
    figures.spectrograms([*panels, ("noise as learned, block by block", noise)], stft, path)


def mixtures_of(run: Run, options: Options) -> Iterator[Mixture]:
    """Recorded pairs, or every test utterance at each ratio: with clips of a folder, looped where they are shorter, or
    with the built-in noises in turn. The same ones for every model."""
    if options.pairs:
        if options.noise or options.snr:
            raise SettingError("--pairs: are as they were recorded; leave out --noise and --snr")
        yield from run.test
        return
    if not np.isfinite(options.snr or SNRS).all():
        raise SettingError("--snr: expected finite numbers")
    clips = clips_of(options.noise) if options.noise else None
    for snr in options.snr or SNRS:
        yield from (
            mix(run.test, index, snr, clips, options.seed) for index in range(len(run.test))
        )


def mix(test: Corpus, index: int, snr: float, clips: list[np.ndarray] | None, seed: int) -> Mixture:
    utterance, clean = test.utterances[index], test.waveform(index)
    random = np.random.default_rng((seed, zlib.crc32(utterance.name.encode())))
    if clips is None:
        noise = synthetic.make_noise(
            synthetic.NOISES[index % len(synthetic.NOISES)], len(clean), random
        )
    else:
        clip = clips[index % len(clips)]
        start = random.choice(np.flatnonzero(clip))  # not in a silence
        noise = np.take(clip, np.arange(len(clean)) + start, mode="wrap")
    noisy = clean + synthetic.at_ratio(noise, clean, snr)
    return Mixture(f"{utterance.name}-{snr:g}dB", snr, clean, noisy.astype(np.float32))


def clips_of(folder: Path) -> list[np.ndarray]:
    """The sounds of a folder that are not silent. SettingError where there is none."""
    clips = [clip for clip in map(audio.load, sounds(folder)) if clip.any()]
    if not clips:
        raise SettingError(f"--noise {folder}: holds no sound of noise")
    return clips


def pairs_of(folder: Path) -> Iterator[Mixture]:
    """DIR/clean/NAME and DIR/noisy/NAME, or clean-NAME and noisy-NAME in one folder. SettingError where there is none,
    or two files differ in length."""
    in_one = sounds(folder, "clean-*")
    found = in_one or sounds(folder, "clean/*")
    if not found:
        raise SettingError(
            f"--pairs {folder}: expected clean/ and noisy/ with the same names, or clean-* and noisy-*"
        )
    for path in found:
        name = path.name.removeprefix("clean-") if in_one else path.name
        partner = folder / f"noisy-{name}" if in_one else folder / "noisy" / name
        clean, noisy = audio.load(path), audio.load(partner)
        if clean.shape != noisy.shape:
            raise SettingError(f"--pairs {folder}: {path.name} and {partner.name} differ in length")
        yield Mixture(Path(name).stem, None, clean, noisy)


def oracle(mixture: Mixture) -> np.ndarray:
    """The Wiener filter |s|²/(|s|² + |n|²)."""
    stft = STFT()
    clean, noisy = (stft.analyse(torch.from_numpy(x)) for x in (mixture.clean, mixture.noisy))
    speech, noise = clean.abs().square(), (noisy - clean).abs().square()
    gains = speech / (speech + noise).clamp_min(1e-12)
    return stft.synthesise(gains * noisy, len(mixture.noisy)).numpy()


def log_mmse(noisy: np.ndarray) -> np.ndarray:
    """Ephraim & Malah 1985 (log-spectral amplitude, decision-directed a-priori ratio), with the noise tracked by the
    probability of speech of Gerkmann & Hendriks 2012."""
    stft = STFT(512, 256)
    spectrum = stft.analyse(torch.from_numpy(noisy))
    power = spectrum.abs().square().numpy().astype(np.float64) + 1e-12
    noise, presence, before = power[:5].mean(0), np.full(stft.bins, 0.5), np.zeros(stft.bins)
    likely, gains = 10**1.5, np.empty_like(power)  # the ratio of 15 dB where there is speech
    for t, now in enumerate(power):
        probability = 1 / (1 + (1 + likely) * np.exp(-now / noise * likely / (1 + likely)))
        presence = 0.9 * presence + 0.1 * probability
        probability = np.where(presence > 0.99, np.minimum(probability, 0.99), probability)
        noise = 0.8 * noise + 0.2 * ((1 - probability) * now + probability * noise)
        posterior = np.minimum(now / noise, 1e3)
        prior = np.maximum(0.98 * before / noise + 0.02 * np.maximum(posterior - 1, 0), 10**-2.5)
        wiener = prior / (1 + prior)
        gains[t] = np.minimum(wiener * np.exp(0.5 * exp1(np.maximum(wiener * posterior, 1e-8))), 1)
        before = gains[t] ** 2 * now
    return stft.synthesise(torch.from_numpy(gains).to(spectrum) * spectrum, len(noisy)).numpy()
