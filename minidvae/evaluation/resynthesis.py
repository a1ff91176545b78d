"""Analysis-resynthesis of whole utterances (LigHT-DVAE paper, Table 1; DVAE benchmark paper, Table 2)."""

from collections.abc import Iterator
from itertools import chain
from operator import itemgetter

import numpy as np
import torch
from tqdm import tqdm

from ..data import audio
from ..data.audio import SAMPLE_RATE
from ..models import MODELS as ALL_MODELS
from ..models.base import DVAE
from . import figures, metrics, report
from .runs import Options, Run, noise_of

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


def evaluate(runs: list[Run], options: Options) -> list[dict]:
    """One table, and results.json, wav files and figures in the folder of every run."""
    if options.mode == "teacher_forcing":
        for run in runs:
            run.target /= options.mode
    results = report.evaluate_each(runs, options, evaluate_run, "wav files and figures")
    mode = f" ({options.mode.replace('_', ' ')})"
    titles = [
        title + mode * run.model.autoregressive
        for title, run in zip(report.titles(runs), runs, strict=True)
    ]
    rows = dict(zip(titles, results, strict=True))
    print(f"\n{table(rows, report.published_layout(runs, options))}")
    print(
        "\nMean ± standard error over utterances. RMSE after the best gain. PESQ: narrow band, raw (P.862) and LQO."
    )
    return results


def resynthesise(
    model: DVAE, stft: audio.STFT, waveforms: list, mode: str, generators: list
) -> Iterator[tuple]:
    """Whole utterances (samples,) through the model: one draw of z per frame, from the torch.Generator of each, and the
    phase of the input. Yields for each the resynthesis (samples,) and its log-variance (frames, bins), numpy arrays."""
    device = next(model.parameters()).device
    spectra = [stft.analyse(torch.from_numpy(waveform).to(device)) for waveform in waveforms]
    noises = [
        model.draw_noise(1, len(s), generator)
        for s, generator in zip(spectra, generators, strict=True)
    ]
    log_variances = model.resynthesise_each(
        [spectrum.abs().square() for spectrum in spectra], mode, noises
    )
    for waveform, spectrum, log_variance in zip(waveforms, spectra, log_variances, strict=True):
        estimate = audio.resynthesise(log_variance, spectrum, stft, len(waveform))
        yield estimate.cpu().numpy(), log_variance.cpu().numpy()


def batches(lengths: list[int], frames: int = BATCH) -> list[list[int]]:
    """The indices of sequences, given their lengths, in batches of similar length: of at most so many frames with the
    padding, or of one sequence."""
    groups = []
    for index in sorted(range(len(lengths)), key=lambda index: lengths[index]):
        if not groups or (len(groups[-1]) + 1) * lengths[index] > frames:
            groups.append([])
        groups[-1].append(index)
    return groups


def evaluate_run(run: Run, options: Options) -> dict:
    """Resynthesise every test utterance, measure it, and write wav files and figures of the first EXAMPLES. Metrics run
    on all cores while the next utterances are resynthesised. Returns {"mode", "summary", "utterances"}. Raises
    CheckpointError where the model's output is not finite."""
    test, stft, folder = run.test, run.stft, run.target
    groups = batches([stft.frames(u.trim[1] - u.trim[0]) for u in test.utterances])

    def pairs() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for group in groups:
            names, waveforms = (
                [test.utterances[index].name for index in group],
                [test.waveform(i) for i in group],
            )
            generators = [noise_of(options.seed, name) for name in names]
            estimates = resynthesise(run.model, stft, waveforms, options.mode, generators)
            for index, name, waveform, (estimate, log_variance) in zip(
                group, names, waveforms, estimates, strict=True
            ):
                run.check_finite(estimate, f"{name}: the model's output")
                if index < EXAMPLES:
                    audio.write(folder / f"{name}-original.wav", waveform)
                    audio.write(folder / f"{name}-resynthesis.wav", estimate)
                    original = stft.analyse(torch.from_numpy(waveform)).abs().square().numpy()
                    panels = [
                        (f"{name}: original", original),
                        ("reconstruction", np.exp(log_variance)),
                    ]
                    figures.spectrograms(panels, stft, folder / f"{name}.png")
                yield waveform, estimate

    measures = metrics.metrics_of(pairs())
    measures = list(tqdm(measures, "resynthesis", len(test), unit="utterance", disable=None))
    rows = []
    for index, row in sorted(zip(chain(*groups), measures, strict=True), key=itemgetter(0)):
        u = test.utterances[index]
        rows.append(
            {"name": u.name, "speaker": u.speaker, "seconds": (u.trim[1] - u.trim[0]) / SAMPLE_RATE}
            | row
        )
    return {"mode": options.mode, "summary": metrics.summary(measures), "utterances": rows}


def table(results: dict[str, dict], layout: str | None = None) -> str:
    """The results by row title. `layout` names their corpus where published rows may stand beside them: rows follow for
    the models that are published on it."""
    rows = []
    for (
        title,
        result,
    ) in results.items():  # some utterances may have too little speech for a measure
        rows.append(
            [title, *report.summary_cells(result["summary"], COLUMNS, len(result["utterances"]))]
        )
    models = {result["model"] for result in results.values()}
    for model, *cells in report.published("resynthesis", layout):
        if model in models:
            rows.append([f"{model} (paper)", *cells])
    return report.table(["", *(heading for heading, _ in COLUMNS.values())], rows)
