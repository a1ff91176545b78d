"""Analysis-resynthesis of whole utterances (LigHT-DVAE paper, Table 1; DVAE benchmark paper, Table 2)."""

import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from .. import audio, figures, metrics
from ..audio import STFT
from ..checkpoint import CheckpointError
from ..command_line import as_json, write
from ..corpus import Corpus
from ..models import MODELS as ALL_MODELS
from ..models.base import DVAE
from . import Options, Run, clear

MODELS = [name for name, (kind, _) in ALL_MODELS.items() if issubclass(kind, DVAE)]

EXAMPLES = 3  # utterances of which sound and spectrogram are kept
BATCH = 8_000  # frames resynthesised at once: two minutes at a hop of 16 ms

COLUMNS = {  # measure: heading, decimals
    "rmse": ("RMSE", 4),
    "si_sdr": ("SI-SDR", 2),
    "pesq": ("PESQ", 2),
    "pesq_lqo": ("PESQ-LQO", 2),
    "stoi": ("STOI", 3),
    "estoi": ("ESTOI", 3),
}

# On these corpora, as printed: LigHT-DVAE paper, Table 1, own past for the autoregressive models.
PUBLISHED = {
    "WSJ0": {
        "vae": {"rmse": 0.040, "si_sdr": 7.4, "pesq": 3.28, "estoi": 0.88},
        "dkf": {"rmse": 0.037, "si_sdr": 8.3, "pesq": 3.51, "estoi": 0.91},
        "rvae": {"rmse": 0.034, "si_sdr": 8.9, "pesq": 3.53, "estoi": 0.91},
        "srnn": {"rmse": 0.036, "si_sdr": 8.7, "pesq": 3.57, "estoi": 0.91},
        "hit_dvae": {"rmse": 0.031, "si_sdr": 10.0, "pesq": 3.52, "estoi": 0.91},
        "light_dvae": {"rmse": 0.030, "si_sdr": 10.1, "pesq": 3.55, "estoi": 0.91},
    },
    "VoiceBank": {
        "vae": {"rmse": 0.052, "si_sdr": 8.4, "pesq": 3.24, "estoi": 0.89},
        "dkf": {"rmse": 0.048, "si_sdr": 9.3, "pesq": 3.44, "estoi": 0.91},
        "rvae": {"rmse": 0.050, "si_sdr": 8.9, "pesq": 3.39, "estoi": 0.90},
        "srnn": {"rmse": 0.044, "si_sdr": 10.1, "pesq": 3.42, "estoi": 0.91},
        "hit_dvae": {"rmse": 0.039, "si_sdr": 11.4, "pesq": 3.60, "estoi": 0.93},
        "light_dvae": {"rmse": 0.038, "si_sdr": 11.6, "pesq": 3.58, "estoi": 0.93},
    },
}


def run(runs: list[Run], options: Options) -> list[dict]:
    results, corpora = {}, {run.data for run in runs}
    for run in runs:
        print(f"{run.folder}: {run.name}, {run.trained}; {len(run.test)} utterances of {run.data}")
        target = run.target / (options.mode if options.mode == "teacher_forcing" else "")
        result = evaluate(run.model, run.stft, run.test, options.mode, target, options.seed)
        settings = {"data": run.data, "split": options.split, "seed": options.seed}
        result |= {"run": str(run.folder), "model": run.name} | settings
        write(target / "results.json", as_json(result))
        mode = f" ({options.mode.replace('_', ' ')})" if run.model.autoregressive else ""
        results[f"{run.folder}{mode}" + (f" on {run.data}" if len(corpora) > 1 else "")] = result
        print(f"results.json, wav files and figures: {target}/")
    print()
    comparable = len(corpora) == 1 and options == Options(seed=options.seed)  # the whole test split, own past
    print(table(results, run.corpus.layout if comparable else None))
    print("\nMean ± standard error over utterances. RMSE after the best gain. PESQ: narrow band, raw (P.862) and LQO.")
    return list(results.values())


def resynthesise(
    model: DVAE, stft: STFT, waveforms: list[np.ndarray], mode: str, seeds: list[int]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Whole utterances through the model: one draw of z per frame, each utterance's own seed, the phase of the input.

    waveforms: (samples,) each. Yields for each the resynthesis (samples,) and its log-variance (frames, bins).
    """
    device = next(model.parameters()).device
    spectra = [stft.analyse(torch.from_numpy(waveform).to(device)) for waveform in waveforms]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    noises = [model.draw_noise(1, len(s), generator) for s, generator in zip(spectra, generators, strict=True)]
    log_variances = model.resynthesise_each([spectrum.abs().square() for spectrum in spectra], mode, noises)
    for waveform, spectrum, log_variance in zip(waveforms, spectra, log_variances, strict=True):
        estimate = audio.resynthesise(log_variance, spectrum, stft, len(waveform))
        yield estimate.cpu().numpy(), log_variance.cpu().numpy()


def batches(lengths: list[int], frames: int = BATCH) -> list[list[int]]:
    """Sequences, given by their lengths, in batches of similar ones: of so many frames with the padding, or of one."""
    groups = []
    for index in sorted(range(len(lengths)), key=lambda index: lengths[index]):
        if not groups or (len(groups[-1]) + 1) * lengths[index] > frames:
            groups.append([])
        groups[-1].append(index)
    return groups


def seed_of(seed: int, name: str) -> int:
    """The seed of an utterance's noise: the same whatever else is evaluated."""
    return zlib.crc32(f"{seed} {name}".encode())


def evaluate(model: DVAE, stft: STFT, test: Corpus, mode: str, folder: Path, seed: int = 0) -> dict:
    """Resynthesise every utterance of `test`, measure it, and write wav files and figures of the first EXAMPLES.

    Metrics run on all cores while the next utterances are resynthesised. Returns {"summary": …, "utterances": …}.
    Raises CheckpointError where the model's output is not finite.
    """
    clear(folder)
    groups = batches([stft.frames(u.trim[1] - u.trim[0]) for u in test.utterances])

    def pairs() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for group in groups:
            names, waveforms = [test.utterances[index].name for index in group], [test.waveform(i) for i in group]
            estimates = resynthesise(model, stft, waveforms, mode, [seed_of(seed, name) for name in names])
            for index, name, waveform, (estimate, log_variance) in zip(group, names, waveforms, estimates, strict=True):
                if not np.isfinite(estimate).all():
                    raise CheckpointError(f"{name}: the model's output is not finite; it cannot be evaluated")
                if index < EXAMPLES:
                    audio.write(folder / f"{name}-original.wav", waveform)
                    audio.write(folder / f"{name}-resynthesis.wav", estimate)
                    original = stft.analyse(torch.from_numpy(waveform)).abs().square().numpy()
                    panels = [(f"{name}: original", original), ("reconstruction", np.exp(log_variance))]
                    figures.spectrograms(panels, stft, folder / f"{name}.png")
                yield waveform, estimate

    with tqdm(total=len(test), desc="resynthesis", unit="utterance", disable=None) as bar:
        measured = metrics.resynthesis_metrics_of(pairs(), progress=bar.update)
    measures = dict(zip((index for group in groups for index in group), measured, strict=True))
    rows = []
    for index, u in enumerate(test.utterances):
        seconds = (u.trim[1] - u.trim[0]) / audio.SAMPLE_RATE
        rows.append({"name": u.name, "speaker": u.speaker, "seconds": seconds} | measures[index])
    return {"mode": mode, "summary": metrics.summary(measured), "utterances": rows}


def table(results: dict[str, dict], layout: str | None = None) -> str:
    """The table of results by row title. `layout` names their corpus where they may stand beside published rows:
    one corpus, its whole test split, own past; rows follow for the models that are published on it."""
    models = dict.fromkeys(result["model"] for result in results.values())
    published = {f"{name} (paper)": row for name, row in PUBLISHED.get(layout, {}).items() if name in models}
    width = max(map(len, [*results, *published]))
    lines = [" " * width + "".join(f"{heading:>18}" for heading, _ in COLUMNS.values())]
    for title, result in results.items():
        cells = []
        for measure, (_, d) in COLUMNS.items():
            mean, error, count = (result["summary"][measure][key] for key in ("mean", "standard_error", "count"))
            cells.append(f"{mean:.{d}f} ± {error:.{d}f}".removesuffix(" ± nan"))
            if count < len(result["utterances"]):  # the others have too little speech for it
                cells[-1] += f" ({count})"
        lines.append(f"{title:<{width}}" + "".join(f"{cell:>18}" for cell in cells))
    for title, values in published.items():
        cells = [f"{values[name]:.{d}f}" if name in values else "" for name, (_, d) in COLUMNS.items()]
        lines.append(f"{title:<{width}}" + "".join(f"{cell:>18}" for cell in cells))
    return "\n".join(lines)
