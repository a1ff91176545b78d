"""Pictures, as the content of PNG files. matplotlib is imported when one is drawn."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from scipy.special import ndtri

from ..data.audio import SAMPLE_RATE, STFT
from ..files import atomic_write
from .metrics import DetectionErrors, eer


class Picture:
    """A figure and its axes (rows, columns) to draw on; `png` is its content afterwards."""

    def __init__(self, figure, axes):
        self.figure = figure
        self.axes = axes
        self.png = b""


@contextmanager
def _picture(rows: int, columns: int, pads: dict | None = None, **options) -> Iterator[Picture]:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(rows, columns, squeeze=False, layout="constrained", **options)
    figure.get_layout_engine().set(**pads or {})
    picture = Picture(figure, axes)
    yield picture
    content = io.BytesIO()
    figure.savefig(content, dpi=120)
    plt.close(figure)
    picture.png = content.getvalue()


def curves(reports: list[dict], path: str | Path) -> None:
    """Plot each term of the loss in a panel: training and development against the step."""
    terms = list(reports[-1]["train"])
    steps = [report["step"] for report in reports]
    with _picture(1, len(terms), figsize=(3.2 * len(terms), 2.8)) as picture:
        axes = picture.axes
        for axis, term in zip(axes[0], terms, strict=True):
            parts = [part for part in ("train", "dev") if term in reports[-1][part]]
            columns = []
            for part in parts:
                columns.append([report[part].get(term, np.nan) for report in reports])
            values = np.array(columns).T
            axis.plot(steps, values, label=parts)
            axis.set(title=term, xlabel="step")
            if values.min() > 0 and values.max() > 20 * values.min():
                axis.set_yscale("log")
        axes[0, 0].legend()
    with atomic_write(path) as temporary:
        temporary.write_bytes(picture.png)


def _spectrogram(axis, power: np.ndarray, stft: STFT, loudest: float):
    """Draw a power spectrogram (frames, bins) in dB, from 80 dB below `loudest` on."""
    top = 10 * np.log10(np.maximum(loudest, 1e-12))
    level = 10 * np.log10(np.maximum(power.T, 1e-12))
    extent = (0, len(power) * stft.hop / SAMPLE_RATE, 0, SAMPLE_RATE / 2000)
    return axis.imshow(
        level, origin="lower", aspect="auto", extent=extent, vmin=top - 80, vmax=top, cmap="magma"
    )


def spectrograms(rows: list[tuple[str, np.ndarray]], stft: STFT) -> bytes:
    """Return a PNG of power spectrograms (frames, bins), one below the other, in dB on one scale,
    from 80 dB below the maximum of the first on."""
    size = (8, 2.2 * len(rows))
    with _picture(len(rows), 1, figsize=size, sharex=True) as picture:
        axes = picture.axes
        for axis, (title, power) in zip(axes[:, 0], rows, strict=True):
            image = _spectrogram(axis, power, stft, rows[0][1].max())
            axis.set(title=title, ylabel="kHz")
        axes[-1, 0].set_xlabel("s")
        picture.figure.colorbar(image, ax=axes[:, 0].tolist(), label="dB")
    return picture.png


def contact_sheet(rows: list[tuple[str, np.ndarray, STFT]]) -> bytes:
    """Return a PNG with a row of power spectrograms (clips, frames, bins) for each title, in dB on
    one scale, from 80 dB below the maximum of the first row on (LigHT-DVAE paper, Figure 3).

    The power is divided by the energy of the window, so that rows with different windows compare.
    """
    _, first_clips, first_stft = rows[0]
    num_clips = len(first_clips)
    loudest = first_clips.max() / first_stft.energy
    size = (2.4 * num_clips + 1, 1.5 * len(rows))
    with _picture(len(rows), num_clips, figsize=size, sharex=True, sharey=True) as picture:
        axes = picture.axes
        for (title, clips, stft), row in zip(rows, axes, strict=True):
            for axis, power in zip(row, clips, strict=True):
                image = _spectrogram(axis, power / stft.energy, stft, loudest)
            row[0].set_ylabel(f"{title}\nkHz", fontsize="small")
        for axis in axes[-1]:
            axis.set_xlabel("s")
        everything = axes.ravel().tolist()
        picture.figure.colorbar(image, ax=everything, label="dB", fraction=0.04, aspect=50)
    return picture.png


def det_curves(detectors: dict[str, DetectionErrors]) -> bytes:
    """Return a PNG of detection error trade-off curves by title: misses against false alarms, on
    the scale of normal deviates, with a dot at the equal error rate."""
    percent = np.array([0.1, 0.5, 1, 2, 5, 10, 20, 40, 60])
    limits = ndtri([0.0005, 0.65])
    with _picture(1, 1, figsize=(6, 6)) as picture:
        axis = picture.axes[0, 0]
        for title, errors in detectors.items():
            rates = np.stack([errors.false_alarm_rates, errors.miss_rates]).clip(1e-5, 1 - 1e-5)
            points = ndtri(rates)[:, ::-1].round(3)  # rising false alarms, falling misses
            # Leave out points that cannot be distinguished.
            is_new = np.append(True, np.diff(points).any(0))
            points = points[:, is_new]
            (line,) = axis.step(points[0], points[1], where="post", label=title)
            rate = ndtri(np.clip(eer(errors), 1e-5, 1))
            axis.plot(rate, rate, "o", color=line.get_color(), markersize=4)
        axis.plot(limits, limits, color="0.8", linewidth=0.8, zorder=0)
        for set_ticks in (axis.set_xticks, axis.set_yticks):
            set_ticks(ndtri(percent / 100), [f"{value:g}" for value in percent])
        axis.set(
            xlabel="false alarms, %", ylabel="misses, %", xlim=limits, ylim=limits, aspect="equal"
        )
        axis.grid(color="0.9")
        axis.legend(fontsize="small")
    return picture.png


def _tiles(segments: np.ndarray, gap: int) -> np.ndarray:
    """Return segments (rows, columns, frames, bins) as one image (rows · (bins + gap) − gap,
    columns · (frames + gap) − gap), with gaps of nan and the first row on top."""
    rows, columns, frames, bins = segments.shape
    image = np.full((rows, bins + gap, columns, frames + gap), np.nan)
    image[:, :bins, :, :frames] = segments.transpose(0, 3, 1, 2)[:, ::-1]
    return image.reshape(rows * (bins + gap), columns * (frames + gap))[:-gap, :-gap]


def _features(axis, image: np.ndarray, originals: np.ndarray, **labels) -> None:
    """Draw an image without ticks, on the grey scale of these originals."""
    low, high = np.percentile(originals, (5, 99.5))
    axis.imshow(image, vmin=low, vmax=high, cmap="Greys", interpolation="nearest", aspect="auto")
    axis.set(xticks=(), yticks=(), **labels)


def swap_grid(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> bytes:
    """Return a PNG of three blocks of segments (frames, bins), as in the FHVAE paper, Figure 4: A
    (rows, 1), reconstructions of seeds; B (2, columns), originals over their reconstructions; C
    (rows, columns), z1 of the row with z2 of the column."""
    rows, columns = c.shape[:2]
    ratios = {"width_ratios": (1, columns), "height_ratios": (2, rows)}
    pads = {"w_pad": 0.06, "h_pad": 0.06, "wspace": 0.01, "hspace": 0.01}
    size = (0.7 * (columns + 1.6), 1.0 * (rows + 2.4))
    with _picture(2, 2, pads, figsize=size, gridspec_kw=ratios) as picture:
        axes = picture.axes
        axes[0, 0].set_axis_off()
        blocks = (("B", b, "tab:red"), ("A", a, "tab:green"), ("C", c, "tab:blue"))
        for axis, (name, segments, colour) in zip(axes.flat[1:], blocks, strict=True):
            _features(axis, _tiles(segments, gap=2), b[0])
            axis.spines[:].set(color=colour, linewidth=3)
            axis.set_title(name, color=colour, fontweight="bold", fontsize=14, loc="left", pad=3)
    return picture.png


def traversal(seeds: np.ndarray, walks: list[tuple[str, np.ndarray]], values: np.ndarray) -> bytes:
    """Return a PNG with a block for each latent, as in the FHVAE paper, Figures 11 to 14: seeds (n,
    frames, bins) at its left and, at its right, the decoded segments (n, values, frames, bins)
    while that latent takes `values`. walks: (title, decoded segments)."""
    num_columns = min(4, len(walks))
    num_rows = -(-len(walks) // num_columns)
    n, steps, frames, bins = walks[0][1].shape
    space = np.full((n * (bins + 4) - 4, 12), np.nan)
    middles = frames + 12 + (frames + 4) * np.arange(steps) + frames / 2
    size = (4.6 * num_columns, 0.62 * n * num_rows + 0.5 * num_rows)
    pads = {"wspace": 0.06, "hspace": 0.03}
    with _picture(num_rows, num_columns, pads, figsize=size) as picture:
        axes = picture.axes
        for axis, (title, decoded) in zip(axes.flat, walks, strict=False):
            image = np.hstack([_tiles(seeds[:, None], 4), space, _tiles(decoded, 4)])
            _features(axis, image, seeds, title=title)
            labels = ["seed", *(f"{value:g}" for value in values)]
            axis.set_xticks([frames / 2, *middles], labels, fontsize=7)
            axis.tick_params(length=0)
            axis.spines[:].set_visible(False)
        for axis in axes.flat[len(walks) :]:
            axis.set_axis_off()
    return picture.png


def traversal_tiles(seeds: np.ndarray, walks: list[tuple[str, np.ndarray]]) -> bytes:
    """Return the images of `traversal` without axes as a PNG of tiles of one size, for a page that
    shows two at a time: a row for each latent with the decoded segments (n, values, frames, bins)
    for each value; at the left of the first row the seeds."""
    import matplotlib.image

    low, high = np.percentile(seeds, (5, 99.5))
    tiles = np.stack([np.concatenate([seeds[:, None], decoded], axis=1) for _, decoded in walks])
    tiles[1:, :, 0] = low
    tiles = np.pad(tiles, ((0, 0), (0, 0), (0, 0), (0, 2), (0, 0)), constant_values=low)
    image = tiles.transpose(0, 4, 2, 1, 3)[:, ::-1].reshape(len(walks) * tiles.shape[-1], -1)
    content = io.BytesIO()
    matplotlib.image.imsave(content, image, vmin=low, vmax=high, cmap="Greys", format="png")
    return content.getvalue()


def transformation(panels: dict[str, tuple[str, np.ndarray]]) -> bytes:
    """Return a PNG with two utterances on the left and what is decoded from them on the right, as
    in the FHVAE paper, Figures 1 and 5. panels: (title, features (frames, bins)) of "source",
    "reference", "reconstruction", "transformed", "other" (the reconstruction of the reference)."""
    positions = {
        "source": (0, 0),
        "reference": (2, 0),
        "reconstruction": (0, 1),
        "transformed": (1, 1),
        "other": (2, 1),
    }
    originals = np.concatenate([panels["source"][1], panels["reference"][1]])
    longest = max(len(features) for _, features in panels.values())
    arrows = (("$z_1$", 1.0, "tab:green"), (r"$z_2$ moved by $\Delta\mu_2$", 0.0, "tab:red"))
    with _picture(3, 2, figsize=(12, 6.5)) as picture:
        axes = picture.axes
        for name, (title, features) in panels.items():
            axis = axes[positions[name]]
            _features(axis, features.T[::-1], originals, title=title, xlim=(0, longest))
        axes[1, 0].set_axis_off()
        for label, height, colour in arrows:
            arrow = {"arrowstyle": "->", "color": colour, "linewidth": 2}
            text = {"color": colour, "fontsize": 13, "ha": "center", "va": "center"}
            axes[1, 0].annotate(
                label, (1.0, 0.5), (0.5, height), "axes fraction", arrowprops=arrow, **text
            )
    return picture.png


def reconstructions(examples: np.ndarray, titles: list[str]) -> bytes:
    """Return a PNG of examples (n, 1 + models, frames, bins), each an original and its
    reconstructions, as in the FHVAE paper, Figure 6; below them the lower half of the bins,
    enlarged, where harmonics are visible."""
    n, columns, frames, bins = examples.shape
    size = (1.4 * n * columns, 6)
    with _picture(2, n, {"wspace": 0.08}, figsize=size) as picture:
        axes = picture.axes
        for example, full_band, low_band in zip(examples, *axes, strict=True):
            for axis, segments in ((full_band, example), (low_band, example[:, :, : bins // 2])):
                _features(axis, _tiles(segments[None], 2), examples[:, 0])
                axis.spines[:].set_visible(False)
            middles = frames / 2 + (frames + 2) * np.arange(columns)
            full_band.set_xticks(middles, titles, fontsize=8)
            full_band.tick_params(length=0, top=True, labeltop=True, labelbottom=False)
        axes[0, 0].set_ylabel("all bins")
        axes[1, 0].set_ylabel("lower half")
    return picture.png
