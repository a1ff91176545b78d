"""FHVAE training: time of a step against the plain loop, and memory against the number of sequences.

    python bench/fhvae.py                     a step of 256 segments × 20 frames × 80 bins; 1,000 to 100,000 sequences
    python bench/fhvae.py --device cuda

`reference` runs every LSTM one frame at a time, `nn.LSTM` is PyTorch's layer, `lstm_scan` our loop after one product
for all inputs (without a kernel: its definition), `shipped` what the model does on this device. They take turns within
each repeat; times are medians.

For the memory, sequences are simulated: an index of so many utterances over one second of noise. `full table` has a
row for each; `2,000 rows` is hierarchical sampling, the drawing of new rows included. Peak memory is what the steps add
to what was held before them, the index.
"""

from dataclasses import replace

import numpy as np
import torch
from timing import Table, describe, median_seconds, parser, peak_mebibytes, positive
from torch import nn

from minidvae.data.corpus import Corpus, Utterance
from minidvae.models import build_model
from minidvae.models.recurrent import LSTM
from minidvae.models.segments import SegmentBatch
from minidvae.training.run import resolve
from minidvae.training.segment_batches import FeatureSegments


class ReferenceLSTM(LSTM):
    forward = LSTM.forward_reference


class LibraryLSTM(LSTM):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.LSTM.forward(self, x)[0]


class ScannedLSTM(LSTM):
    forward = LSTM.scan


PATHS = {
    "reference": ReferenceLSTM,
    "nn.LSTM": LibraryLSTM,
    "lstm_scan": ScannedLSTM,
    "shipped": LSTM,
}
ROWS = 2000


def model_by(path: type[LSTM], device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    model = build_model("fhvae", sequences=ROWS, z1_latent=32, z2_latent=32)
    for part in (model.encoder_z1, model.encoder_z2, model.decoder):
        part.network = path(
            part.network.input_size, part.network.hidden_size, part.network.num_layers
        )
    return model.to(device)


def step(model: nn.Module, batch: SegmentBatch) -> None:
    model.zero_grad(set_to_none=True)
    model.loss(batch)[0].backward()


def measure_step(device: torch.device, repeats: int) -> None:
    x, row = torch.randn(256, 20, 80, device=device), torch.randint(ROWS, (256,), device=device)
    batch = SegmentBatch(x, torch.full((256,), 20.0, device=device), row)
    models = {name: model_by(path, device) for name, path in PATHS.items()}
    medians = median_seconds(
        {name: lambda m=model: step(m, batch) for name, model in models.items()}, device, repeats
    )
    print("\nstep of 256 × 20 frames:")
    table = Table("path", "ms", "× reference", path=9)
    for path, median in medians.items():
        table.add(
            {
                "path": path,
                "ms": f"{1e3 * median:.1f}",
                "× reference": f"{medians['reference'] / median:.2f}",
            }
        )


def simulated(sequences: int) -> Corpus:
    noise = np.random.default_rng(0).integers(-9000, 9000, 16_000, dtype=np.int16)
    length = len(noise)
    utterances = (
        Utterance(str(i), str(i), "train", 0, length, (0, length)) for i in range(sequences)
    )
    return Corpus("simulated", "manifest", tuple(utterances), noise)


def measure_memory(device: torch.device, sequences: int, rows: int) -> dict:
    recipe = replace(resolve("fhvae", "fhvae2017", {})[0], sequences=rows, table_steps=3)
    source = FeatureSegments(simulated(sequences), recipe, 0, device)
    model = build_model("fhvae", z1_latent=32, z2_latent=32).to(device)

    def steps() -> None:
        model.make_table(source.rows)
        optimiser = torch.optim.Adam(model.parameters())
        for number in range(4):
            model.before_step(source, optimiser, number)
            optimiser.zero_grad()
            model.loss(source(number))[0].backward()
            optimiser.step()

    steps()
    table = f"{rows:,} rows" if rows else "full"
    return {
        "sequences": f"{sequences:,}",
        "table": table,
        "MiB": f"{peak_mebibytes(steps, device):.0f}",
    }


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--sequences", type=positive, nargs="+", default=[1_000, 10_000, 100_000])
    arguments = options.parse_args()
    device = arguments.device
    print(describe(device))
    measure_step(device, arguments.repeats)
    print("\npeak of four steps:")
    table = Table("sequences", "table", "MiB", sequences=12, table=12)
    for rows in (ROWS, 0):
        for sequences in arguments.sequences:
            table.add(measure_memory(device, sequences, rows))
    table.write(arguments.csv)


if __name__ == "__main__":
    main()
