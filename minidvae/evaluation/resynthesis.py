"""Analysis-resynthesis of whole utterances (LigHT-DVAE paper, Table 1; DVAE benchmark paper,
Table 2)."""

import itertools
from collections.abc import Iterator

import numpy as np
import torch
from tqdm import tqdm

from ..data import audio
from ..data.audio import SAMPLE_RATE
from ..models import MODELS as ALL_MODELS
from ..models.base import DVAE
from . import figures, metrics, report
from .results import Evaluation, Figure, RunResult, Sound, Table
from .runs import Options, Run, generator_for

MODELS = [name for name, (kind, _) in ALL_MODELS.items() if issubclass(kind, DVAE)]

EXAMPLES = 3  # utterances of which sound and spectrogram are kept
BATCH_FRAMES = 8_000  # frames resynthesised at once: two minutes at a hop of 16 ms

COLUMNS = {  # measure: heading, decimals
    "rmse": ("RMSE", 4),
    "si_sdr": ("SI-SDR", 2),
    "pesq": ("PESQ", 2),
    "pesq_lqo": ("PESQ-LQO", 2),
    "stoi": ("STOI", 3),
    "estoi": ("ESTOI", 3),
}


def evaluate(runs: list[Run], options: Options) -> Evaluation:
    """Return one table, and for each run its measures, and sounds and figures of EXAMPLES."""
    results = [evaluate_run(run, options) for run in runs]
    rows = {}
    for title, run, result in zip(report.titles(runs), runs, results, strict=True):
        if run.model.autoregressive:
            title += f" ({options.mode.replace('_', ' ')})"
        rows[title] = result
    return Evaluation(
        task="resynthesis",
        description="Analysis-resynthesis of whole utterances (LigHT-DVAE paper, Table 1; DVAE "
        "benchmark paper, Table 2).",
        settings=options.select("mode"),
        body=[
            table(rows, report.published_layout(runs, options)),
            "Mean ± standard error over utterances. RMSE after the best gain. PESQ: narrow band, "
            "raw (P.862) and LQO.",
        ],
        results=results,
    )


def resynthesise(
    model: DVAE,
    stft: audio.STFT,
    waveforms: list[np.ndarray],
    mode: str,
    generators: list[torch.Generator],
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pass whole utterances (samples,) through a model, with one draw of z for each frame, from the
    generator of each, and the phase of the input. Yield for each the resynthesis (samples,) and
    its log-variance (frames, bins)."""
    device = next(model.parameters()).device
    spectra = [stft.analyse(torch.from_numpy(waveform).to(device)) for waveform in waveforms]
    powers = [spectrum.abs().square() for spectrum in spectra]
    noises = []
    for spectrum, generator in zip(spectra, generators, strict=True):
        noises.append(model.draw_noise(1, len(spectrum), generator))
    log_variances = model.resynthesise_each(powers, mode, noises)
    for waveform, spectrum, log_variance in zip(waveforms, spectra, log_variances, strict=True):
        estimate = audio.resynthesise(log_variance, spectrum, stft, len(waveform))
        yield estimate.cpu().numpy(), log_variance.cpu().numpy()


def batches(lengths: list[int], max_frames: int = BATCH_FRAMES) -> list[list[int]]:
    """Return the indices of sequences, given their lengths, in batches of similar length: of at
    most so many frames with the padding, or of one sequence."""
    groups = []
    for index in sorted(range(len(lengths)), key=lambda index: lengths[index]):
        if not groups or (len(groups[-1]) + 1) * lengths[index] > max_frames:
            groups.append([])
        groups[-1].append(index)
    return groups


def evaluate_run(run: Run, options: Options) -> RunResult:
    """Resynthesise every test utterance and measure it, {"mode", "summary", "utterances"}. Metrics
    run on all cores while the next utterances are resynthesised. Raises CheckpointError where the
    model's output is not finite."""
    test = run.test
    num_frames = []
    for utterance in test.utterances:
        start, stop = utterance.trim
        num_frames.append(run.stft.frames(stop - start))
    groups = batches(num_frames)
    sounds = []
    pictures = []

    def pairs() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for group in groups:
            names = [test.utterances[index].name for index in group]
            waveforms = [test.waveform(index) for index in group]
            generators = [generator_for(options.seed, name) for name in names]
            outputs = resynthesise(run.model, run.stft, waveforms, options.mode, generators)
            for index, name, waveform, output in zip(group, names, waveforms, outputs, strict=True):
                estimate, log_variance = output
                run.check_finite(estimate, f"{name}: the model's output")
                if index < EXAMPLES:
                    sounds.append(Sound(name, "original", waveform))
                    sounds.append(Sound(name, "resynthesis", estimate))
                    pictures.append(draw_example(run, name, waveform, log_variance))
                yield waveform, estimate

    measured = metrics.metrics_of(pairs())
    measures = list(tqdm(measured, "resynthesis", len(test), unit="utterance", disable=None))
    indices = list(itertools.chain(*groups))
    rows = {}
    for index, row in zip(indices, measures, strict=True):
        utterance = test.utterances[index]
        start, stop = utterance.trim
        fields = {
            "name": utterance.name,
            "speaker": utterance.speaker,
            "seconds": (stop - start) / SAMPLE_RATE,
        }
        rows[index] = fields | row
    values = {
        "mode": options.mode,
        "summary": metrics.summary(measures),
        "utterances": [rows[index] for index in sorted(rows)],
    }
    return run.result(values, sounds=sounds, figures=pictures)


def draw_example(run: Run, name: str, waveform: np.ndarray, log_variance: np.ndarray) -> Figure:
    original = run.stft.analyse(torch.from_numpy(waveform)).abs().square().numpy()
    panels = [(f"{name}: original", original), ("reconstruction", np.exp(log_variance))]
    return Figure(name, figures.spectrograms(panels, run.stft), group=name)


def table(results: dict[str, RunResult], layout: str | None = None) -> Table:
    """Return the results by title. layout: of their corpus if published rows may stand beside them;
    rows follow for the models that are published on it."""
    rows = []
    for title, result in results.items():
        values = result.values
        # Some utterances may have too little speech for a measure.
        cells = report.summary_cells(values["summary"], COLUMNS, len(values["utterances"]))
        rows.append([title, *cells])
    models = {result.model for result in results.values()}
    for model, *cells in report.published("resynthesis", layout):
        if model in models:
            rows.append([f"{model} (paper)", *cells])
    return Table(["", *(heading for heading, _ in COLUMNS.values())], rows)
