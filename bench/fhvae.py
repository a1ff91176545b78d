"""FHVAE training: time of a step against the plain loop, and memory against the number of sequences.

    python bench/fhvae.py                     a step of 256 segments × 20 frames × 80 bins; 1,000 to 100,000 sequences
    python bench/fhvae.py --device cuda

`reference` runs every LSTM one frame at a time, `nn.LSTM` is PyTorch's layer, `lstm_scan` our loop after one product
for all inputs, `shipped` what the model does on this device. They take turns within each repeat; times are medians.

For the memory, sequences are simulated: an index of so many utterances over one second of noise. `full table` has a
row for each; `2,000 rows` is hierarchical sampling, its redraw included. Peak memory is what the steps add to what
was held before them, the index.
"""

import argparse
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from timing import describe, median_seconds  # noqa: E402
from training import peak_mebibytes  # noqa: E402

from minidvae.batches import FeatureSegments  # noqa: E402
from minidvae.corpus import Corpus, Utterance  # noqa: E402
from minidvae.models import build_model  # noqa: E402
from minidvae.models.base import LSTM  # noqa: E402
from minidvae.models.fhvae import SegmentBatch  # noqa: E402
from minidvae.recipes import resolve  # noqa: E402

PATHS = {
    "reference": LSTM.forward_reference,
    "nn.LSTM": lambda lstm, x: twin(lstm)(x)[0],
    "lstm_scan": lambda lstm, x: lstm.scan(x)[0],
    "shipped": LSTM.forward,
}
ROWS = 2000


@cache
def twin(lstm: LSTM) -> torch.nn.LSTM:
    """PyTorch's layer on the same parameters."""
    layer = torch.nn.LSTM(lstm.input_size, lstm.hidden_size, batch_first=True)
    for name, parameter in lstm.named_parameters():
        setattr(layer, name, parameter)
    return layer


def step(model, batch, path: str) -> None:
    LSTM.forward = PATHS[path]
    model.zero_grad(set_to_none=True)
    model.loss(batch)[0].backward()


def measure_step(device: torch.device, repeats: int) -> None:
    model = build_model("fhvae", sequences=ROWS, z1_latent=32, z2_latent=32).to(device)
    x, row = torch.randn(256, 20, 80, device=device), torch.randint(ROWS, (256,), device=device)
    batch = SegmentBatch(x, torch.full((256,), 20.0, device=device), row)
    calls = {path: lambda path=path: step(model, batch, path) for path in PATHS}
    medians = median_seconds(calls, device, repeats)
    LSTM.forward = PATHS["shipped"]
    print("\nstep of 256 × 20 frames:")
    for path, median in medians.items():
        print(f"{path:>12} {1e3 * median:8.1f} ms   {medians['reference'] / median:5.2f} × reference")


def simulated(sequences: int) -> Corpus:
    noise = np.random.default_rng(0).integers(-9000, 9000, 16_000, dtype=np.int16)
    length = len(noise)
    utterances = (Utterance(str(i), str(i), "train", 0, length, (0, length)) for i in range(sequences))
    return Corpus("simulated", "manifest", tuple(utterances), noise)


def measure_memory(device: torch.device, sequences: int, rows: int) -> None:
    recipe = replace(resolve("fhvae", "fhvae2017", {})[0], sequences=rows, redraw=3)
    source = FeatureSegments(simulated(sequences), recipe, 0, device)
    model = build_model("fhvae", z1_latent=32, z2_latent=32).to(device)

    def steps() -> None:
        model.make_table(source.rows)
        optimiser = torch.optim.Adam(model.parameters())
        for number in range(4):
            source.prepare(model, optimiser, recipe, number)
            optimiser.zero_grad()
            model.loss(source(number))[0].backward()
            optimiser.step()

    steps()
    title = f"{rows:,} rows" if rows else "full table"
    print(f"{sequences:>12,} {title:>12} {peak_mebibytes(steps, device):>12.0f} MiB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    print(describe(device))
    measure_step(device, arguments.repeats)
    print("\n   sequences        table   peak of four steps")
    for rows in (ROWS, 0):
        for sequences in arguments.sequences:
            measure_memory(device, sequences, rows)


if __name__ == "__main__":
    main()
