"""Pictures. matplotlib is imported when one is drawn, and draws to files only."""

from pathlib import Path

import numpy as np
from scipy.special import ndtri

from .audio import SAMPLE_RATE, STFT
from .files import whole
from .metrics import DetectionErrors, eer


def _figure(*shape: int, **options):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt.subplots(*shape, squeeze=False, layout="constrained", **options)


def _save(figure, path: str | Path) -> None:
    import matplotlib.pyplot as plt

    with whole(path) as beside:
        figure.savefig(beside, dpi=120)
    plt.close(figure)


def curves(reports: list[dict], path: str | Path) -> None:
    """One panel for each term of the loss: training and development against the step."""
    terms = list(reports[-1]["train"])
    figure, axes = _figure(1, len(terms), figsize=(3.2 * len(terms), 2.8))
    steps = [report["step"] for report in reports]
    for axis, term in zip(axes[0], terms, strict=True):
        parts = [part for part in ("train", "dev") if term in reports[-1][part]]
        values = np.array([[report[part][term] for part in parts] for report in reports])
        axis.plot(steps, values, label=parts)
        axis.set(title=term, xlabel="step")
        if values.min() > 0 and values.max() > 20 * values.min():
            axis.set_yscale("log")
    axes[0, 0].legend()
    _save(figure, path)


def spectrograms(rows: list[tuple[str, np.ndarray]], stft: STFT, path: str | Path) -> None:
    """Power spectrograms (frames, bins) under one another, in dB on one scale: 80 dB under the first's maximum."""
    figure, axes = _figure(len(rows), 1, figsize=(8, 2.2 * len(rows)), sharex=True)
    top = 10 * np.log10(max(rows[0][1].max(), 1e-12))
    for axis, (title, power) in zip(axes[:, 0], rows, strict=True):
        extent = (0, len(power) * stft.hop / SAMPLE_RATE, 0, SAMPLE_RATE / 2000)
        level = 10 * np.log10(np.maximum(power.T, 1e-12))
        image = axis.imshow(
            level, origin="lower", aspect="auto", extent=extent, vmin=top - 80, vmax=top, cmap="magma"
        )
        axis.set(title=title, ylabel="kHz")
    axes[-1, 0].set_xlabel("s")
    figure.colorbar(image, ax=axes[:, 0].tolist(), label="dB")
    _save(figure, path)


def det_curves(detectors: dict[str, DetectionErrors], path: str | Path) -> None:
    """Detection error trade-off: misses against false alarms by title, on the scale of normal deviates, with a dot
    at the equal error rate."""
    figure, axes = _figure(1, 1, figsize=(6, 6))
    axis, percent = axes[0, 0], np.array([0.1, 0.5, 1, 2, 5, 10, 20, 40, 60])
    limits = ndtri(np.array([0.0005, 0.65]))
    for title, errors in detectors.items():
        rates = np.stack([errors.false_alarm_rates, errors.miss_rates]).clip(1e-5, 1 - 1e-5)
        points = np.unique(ndtri(rates).round(3), axis=1)  # rising false alarms; no more than the eye can tell apart
        (line,) = axis.step(points[0], points[1], where="post", label=title)
        rate = ndtri(np.clip(eer(errors), 1e-5, 1))
        axis.plot(rate, rate, "o", color=line.get_color(), markersize=4)
    axis.plot(limits, limits, color="0.8", linewidth=0.8, zorder=0)
    for set_ticks in (axis.set_xticks, axis.set_yticks):
        set_ticks(ndtri(percent / 100), [f"{value:g}" for value in percent])
    axis.set(xlabel="false alarms, %", ylabel="misses, %", xlim=limits, ylim=limits, aspect="equal")
    axis.grid(color="0.9")
    axis.legend(fontsize="small")
    _save(figure, path)
