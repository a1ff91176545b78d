"""Gaps in speech filled by a DVAE, against two ways that need no model.

    python studies/inpainting.py light_dvae-librispeech vae-librispeech --data LibriSpeech --limit 50

One gap of each length lies in each test utterance, at a place drawn at random where it is not silent. What is measured
is the log-spectral distance of what was filled in from what was there, dB: over frames of 16 ms that lie in the gap as
a whole, the root of the mean square over frequencies, on recordings of peak 1 with power floored at 1e-8. Linear
interpolation is that of log-spectra between the known frames at both ends, with phases found as for the models.
"""

import argparse
import time
import zlib
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from minidvae.command_line import Parser, run
from minidvae.data.audio import POWER_FLOOR, SAMPLE_RATE, STFT, trim_bounds
from minidvae.data.corpus import load_corpus
from minidvae.enhancement import E_STEPS, load_dvae
from minidvae.experiments import report
from minidvae.files import write_json
from minidvae.inpainting import SETTINGS, fill, inpaint

LENGTHS = (20, 40, 80, 160)  # ms
SHORT = STFT(256, 64)


def log_spectral_distance(filled: np.ndarray, truth: np.ndarray) -> float:
    """Of what is in the gap alone, (samples,) both, dB."""
    a, b = (10 * SHORT.power(torch.from_numpy(x)).clamp_min(POWER_FLOOR).log10() for x in (filled, truth))
    return (a - b).square().mean(-1).sqrt().mean().item()


def place(clean: np.ndarray, length: int, name: str, seed: int) -> tuple[int, int]:
    """A gap of this many samples where the recording is within 30 dB of its loudest."""
    random = np.random.default_rng((seed, length, zlib.crc32(name.encode())))
    energy = np.convolve(np.square(clean, dtype=np.float64), np.ones(length), "valid")
    first, last = trim_bounds(clean)
    inside = np.arange(len(energy))
    loud = np.flatnonzero((energy > energy.max() / 1e3) & (inside >= first) & (inside + length <= last))
    start = int(random.choice(loud))
    return start, start + length


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="RUN", help="run folders of DVAEs, or models that ship")
    parser.add_argument("--data", default="built-in", help="corpus (default: built-in)")
    parser.add_argument("--split", default="test", help="of the corpus (default: test)")
    parser.add_argument("--limit", type=int, default=50, help="utterances, spread over the split (default: 50)")
    parser.add_argument("--method", choices=E_STEPS, default=SETTINGS.method, help=f"(default: {SETTINGS.method})")
    parser.add_argument("--iterations", type=int, default=SETTINGS.iterations, help=f"(default: {SETTINGS.iterations})")
    parser.add_argument("--rate", type=float, default=SETTINGS.rate, help=f"of steps (default: {SETTINGS.rate})")
    parser.add_argument("--chains", type=int, default=SETTINGS.chains, help=f"(default: {SETTINGS.chains})")
    parser.add_argument("--json", type=Path, help="also write all distances to this file")
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn at random (default: 0)")
    args = parser.parse_args()
    asked = dict(method=args.method, iterations=args.iterations, rate=args.rate, chains=args.chains)
    settings = replace(SETTINGS, **asked)
    corpus = load_corpus(args.data).split(args.split).spread(args.limit)
    fills = {"silence": (None, STFT())}
    for stft in (STFT(1024, 256), STFT(512, 128)):
        title = f"linear interpolation, frames of {1000 * stft.window_length // SAMPLE_RATE} ms"
        fills[title] = (lambda gap, _: gap.interpolated(), stft)
    for name in args.models:
        model, stft = load_dvae(name, "cpu")
        fills[name] = (partial(fill, model, settings), stft)

    distances = {name: {length: [] for length in LENGTHS} for name in fills}
    seconds = dict.fromkeys(fills, 0.0)
    for index in tqdm(range(len(corpus)), "inpainting", unit="utterance", disable=None):
        clean = corpus.waveform(index)
        clean = clean / np.abs(clean).max()
        for length in LENGTHS:
            name = corpus.utterances[index].name
            first, last = place(clean, length * SAMPLE_RATE // 1000, name, args.seed)
            damaged = clean.copy()
            damaged[first:last] = 0
            gaps = [(first / SAMPLE_RATE, last / SAMPLE_RATE)]
            for title, (of_gap, stft) in fills.items():
                begin, filled = time.perf_counter(), damaged
                if of_gap is not None:
                    filled = inpaint(damaged, SAMPLE_RATE, gaps, stft, of_gap, args.seed)
                seconds[title] += time.perf_counter() - begin
                distances[title][length].append(log_spectral_distance(filled[first:last], clean[first:last]))
    rows = [
        [title, *(mean_of(values) for values in found.values()), f"{seconds[title] / len(corpus) / len(LENGTHS):.2f}"]
        for title, found in distances.items()
    ]
    print(report.table(["gap of", *(f"{length} ms" for length in LENGTHS), "s a gap"], rows))
    print("\nLog-spectral distance in the gap, dB: mean ± standard error over utterances.")
    if args.json:
        write_json(args.json, {"settings": vars(settings), "distances": distances})


def mean_of(values: list[float]) -> str:
    return report.mean_and_error(np.mean(values), np.std(values, ddof=1) / len(values) ** 0.5, 2)


if __name__ == "__main__":
    run(main)
