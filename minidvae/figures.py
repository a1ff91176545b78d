"""Pictures. matplotlib is imported when one is drawn, and draws to files only."""

from pathlib import Path

import numpy as np

from .audio import SAMPLE_RATE, STFT
from .files import whole


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
        axis.plot(steps, [report["train"][term] for report in reports], label="train")
        axis.plot(steps, [report["dev"][term] for report in reports], label="dev")
        axis.set(title=term, xlabel="step")
        values = np.array([[report[part][term] for part in ("train", "dev")] for report in reports])
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
