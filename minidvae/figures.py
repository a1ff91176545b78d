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


def _spectrogram(axis, power: np.ndarray, stft: STFT, loudest: float):
    """The image of a power spectrogram (frames, bins), in dB from 80 under the loudest on."""
    top = 10 * np.log10(max(loudest, 1e-12))
    extent = (0, len(power) * stft.hop / SAMPLE_RATE, 0, SAMPLE_RATE / 2000)
    level = 10 * np.log10(np.maximum(power.T, 1e-12))
    return axis.imshow(level, origin="lower", aspect="auto", extent=extent, vmin=top - 80, vmax=top, cmap="magma")


def spectrograms(rows: list[tuple[str, np.ndarray]], stft: STFT, path: str | Path) -> None:
    """Power spectrograms (frames, bins) under one another, in dB on one scale: 80 dB under the first's maximum."""
    figure, axes = _figure(len(rows), 1, figsize=(8, 2.2 * len(rows)), sharex=True)
    for axis, (title, power) in zip(axes[:, 0], rows, strict=True):
        image = _spectrogram(axis, power, stft, rows[0][1].max())
        axis.set(title=title, ylabel="kHz")
    axes[-1, 0].set_xlabel("s")
    figure.colorbar(image, ax=axes[:, 0].tolist(), label="dB")
    _save(figure, path)


def contact_sheet(rows: list[tuple[str, np.ndarray, STFT]], path: str | Path) -> None:
    """LigHT-DVAE paper, Figure 3: a row of power spectrograms (clips, frames, bins) for each title, in dB on one scale:
    80 dB under the first row's maximum. Power is that over the energy of the window, so that rows of different windows
    compare."""
    across, loudest = len(rows[0][1]), rows[0][1].max() / rows[0][2].energy
    figure, axes = _figure(len(rows), across, figsize=(2.4 * across + 1, 1.5 * len(rows)), sharex=True, sharey=True)
    for (title, clips, stft), row in zip(rows, axes, strict=True):
        for axis, power in zip(row, clips, strict=True):
            image = _spectrogram(axis, power / stft.energy, stft, loudest)
        row[0].set_ylabel(f"{title}\nkHz", fontsize="small")
    for axis in axes[-1]:
        axis.set_xlabel("s")
    figure.colorbar(image, ax=axes.ravel().tolist(), label="dB", fraction=0.04, aspect=50)
    _save(figure, path)


def det_curves(detectors: dict[str, DetectionErrors], path: str | Path) -> None:
    """Detection error trade-off: misses against false alarms by title, on the scale of normal deviates, with a dot
    at the equal error rate."""
    figure, axes = _figure(1, 1, figsize=(6, 6))
    axis, percent = axes[0, 0], np.array([0.1, 0.5, 1, 2, 5, 10, 20, 40, 60])
    limits = ndtri(np.array([0.0005, 0.65]))
    for title, errors in detectors.items():
        rates = np.stack([errors.false_alarm_rates, errors.miss_rates]).clip(1e-5, 1 - 1e-5)
        points = ndtri(rates)[:, ::-1].round(3)  # rising false alarms, falling misses
        points = points[:, np.append(True, np.diff(points).any(0))]  # no more than the eye can tell apart
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


# ---- Segments of features, as in the FHVAE paper: dark is loud, time to the right, frequency upwards -----------------

FRAME_COLOURS = {"A": "tab:green", "B": "tab:red", "C": "tab:blue"}


def _tiles(segments: np.ndarray, gap: int) -> np.ndarray:
    """(rows, columns, frames, bins) → an image (rows · (bins + gap) − gap, columns · (frames + gap) − gap), the gaps
    nan and the first row on top."""
    rows, columns, frames, bins = segments.shape
    image = np.full((rows, bins + gap, columns, frames + gap), np.nan)
    image[:, :bins, :, :frames] = segments.transpose(0, 3, 1, 2)[:, ::-1]
    return image.reshape(rows * (bins + gap), columns * (frames + gap))[:-gap, :-gap]


def _levels(originals: np.ndarray) -> dict:
    """What is white and what is black: the same for all images that come from these."""
    low, high = np.percentile(originals, (5, 99.5))
    return {"vmin": low, "vmax": high, "cmap": "Greys", "interpolation": "nearest"}


def swap_grid(
    seeds: np.ndarray, originals: np.ndarray, reconstructions: np.ndarray, swapped: np.ndarray, path: str | Path
) -> None:
    """FHVAE paper, Figure 4. Segments (frames, bins) each: block A the reconstructions of (rows,) seeds; block B
    (columns,) originals over their reconstructions; block C (rows, columns), z1 of the row with z2 of the column."""
    rows, columns, frames, bins = swapped.shape
    gap = 2
    ratios = {"width_ratios": (1, columns), "height_ratios": (2, rows)}
    figure, axes = _figure(2, 2, figsize=(0.7 * (columns + 1.6), 1.0 * (rows + 2.4)), gridspec_kw=ratios)
    blocks = {"B": np.stack([originals, reconstructions]), "A": seeds[:, None], "C": swapped}
    levels = _levels(originals)
    figure.get_layout_engine().set(w_pad=0.06, h_pad=0.06, wspace=0.01, hspace=0.01)
    axes[0, 0].set_axis_off()
    for (name, segments), axis in zip(blocks.items(), (axes[0, 1], axes[1, 0], axes[1, 1]), strict=True):
        image = _tiles(segments, gap)
        axis.imshow(image, aspect="auto", **levels)
        axis.set(xticks=(), yticks=())
        for spine in axis.spines.values():
            spine.set(color=FRAME_COLOURS[name], linewidth=3)
        axis.set_title(name, color=FRAME_COLOURS[name], fontweight="bold", fontsize=14, loc="left", pad=3)
    _save(figure, path)


def traversal(
    seeds: np.ndarray, walks: list[tuple[str, np.ndarray]], values: np.ndarray, path: str | Path
) -> None:
    """FHVAE paper, Figures 11 to 14: a block for each latent, seeds (n, frames, bins) at its left and, at its right,
    what is decoded (n, values, frames, bins) while that latent takes `values`; `walks` are (title, decoded)."""
    across = min(4, len(walks))
    down = -(-len(walks) // across)
    n, steps, frames, bins = walks[0][1].shape
    figure, axes = _figure(down, across, figsize=(4.6 * across, 0.62 * n * down + 0.5 * down))
    figure.get_layout_engine().set(wspace=0.06, hspace=0.03)
    levels = _levels(seeds)
    for axis, (title, decoded) in zip(axes.flat, walks, strict=False):
        space = np.full((n * (bins + 4) - 4, 12), np.nan)
        image = np.hstack([_tiles(seeds[:, None], 4), space, _tiles(decoded, 4)])
        axis.imshow(image, aspect="auto", **levels)
        axis.set(yticks=(), title=title)
        middles = frames + 12 + (frames + 4) * np.arange(steps) + frames / 2
        axis.set_xticks([frames / 2, *middles], ["seed", *(f"{value:g}" for value in values)], fontsize=7)
        axis.tick_params(length=0)
        for spine in axis.spines.values():
            spine.set_visible(False)
    for axis in axes.flat[len(walks) :]:
        axis.set_axis_off()
    _save(figure, path)


def transformation(panels: dict[str, tuple[str, np.ndarray]], path: str | Path) -> None:
    """FHVAE paper, Figures 1 and 5: on the left the two utterances, on the right what is decoded of them. panels:
    (title, features (frames, bins)) of "source", "reference", "reconstruction", "transformed", "other" (the
    reconstruction of the reference)."""
    figure, axes = _figure(3, 2, figsize=(12, 6.5))
    places = {"source": (0, 0), "reference": (2, 0), "reconstruction": (0, 1), "transformed": (1, 1), "other": (2, 1)}
    levels = _levels(np.concatenate([panels["source"][1], panels["reference"][1]]))
    longest = max(len(features) for _, features in panels.values())
    for name, place in places.items():
        title, features = panels[name]
        axes[place].imshow(features.T, origin="lower", aspect="auto", **levels)
        axes[place].set(title=title, xticks=(), yticks=(), xlim=(0, longest))
    axes[1, 0].set_axis_off()
    for name, start in (("source", (0.5, 1.0)), ("reference", (0.5, 0.0))):
        colour = "tab:green" if name == "source" else "tab:red"
        what = "$z_1$" if name == "source" else r"$z_2$ moved by $\Delta\mu_2$"
        axes[1, 0].annotate(
            what, (1.0, 0.5), start, "axes fraction", color=colour, fontsize=13, ha="center", va="center",
            arrowprops={"arrowstyle": "->", "color": colour, "linewidth": 2},
        )
    _save(figure, path)


def reconstructions(examples: np.ndarray, titles: list[str], path: str | Path) -> None:
    """FHVAE paper, Figure 6: examples (n, 1 + models, frames, bins), each the original and its reconstructions; under
    them the lower half of the bins, where harmonics can be told apart, enlarged."""
    n, columns, frames, bins = examples.shape
    figure, axes = _figure(2, n, figsize=(1.4 * n * columns, 6))
    figure.get_layout_engine().set(wspace=0.08)
    levels = _levels(examples[:, 0])
    for example, whole_band, low_band in zip(examples, *axes, strict=True):
        for axis, shown in ((whole_band, example), (low_band, example[:, :, : bins // 2])):
            axis.imshow(_tiles(shown[None], 2), aspect="auto", **levels)
            axis.set(xticks=(), yticks=())
            for spine in axis.spines.values():
                spine.set_visible(False)
        whole_band.set_xticks(frames / 2 + (frames + 2) * np.arange(columns), titles, fontsize=8)
        whole_band.tick_params(length=0, top=True, labeltop=True, labelbottom=False)
    axes[0, 0].set_ylabel("all bins")
    axes[1, 0].set_ylabel("lower half")
    _save(figure, path)
