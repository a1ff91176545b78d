"""What a few numbers a frame can say of speech, by linear codes: why LigHT-DVAE has a clock.

    python studies/linear_codes.py --data LibriSpeech

Principal components of the log power of training speech, of one frame or of several together, with --numbers a frame in
every row; the dev split is coded with them and resynthesised with its own phase. Frames that overlap by three quarters
say nearly the same: what four say together takes fewer numbers than four times what one says. A code that is the same
for every frame cannot use that, however many frames it looks at; its row is a filter over 16 frames, then one over 8,
trained on the squared error of the log power.
"""

import argparse

import numpy as np
import torch
from torch import Tensor, nn

from minidvae.cli import SOURCES_OF_SPEECH, Parser, run
from minidvae.data.audio import POWER_FLOOR, STFT, resynthesise
from minidvae.data.corpus import Corpus, load_corpus
from minidvae.evaluation import report
from minidvae.evaluation.metrics import si_sdr

TOGETHER = (1, 2, 4, 8)
TAPS, STEPS = 8, 3_000


def log_power(corpus: Corpus, stft: STFT) -> list[Tensor]:
    """Of every utterance, (frames, bins)."""
    spectra = (
        stft.analyse(torch.from_numpy(corpus.waveform(index))) for index in range(len(corpus))
    )
    return [spectrum.abs().square().clamp_min(POWER_FLOOR).log() for spectrum in spectra]


class Block(nn.Module):
    """The principal components of so many frames together."""

    def __init__(self, training: Tensor, together: int, numbers: int):
        super().__init__()
        self.together, bins = together, training.shape[1]
        starts = [
            training[k:][: (len(training) - k) // together * together]
            for k in range(0, together, -(-together // 2))
        ]
        blocks = torch.cat([part.reshape(-1, together * bins) for part in starts])
        _, vectors = torch.linalg.eigh(blocks.T @ blocks)
        self.register_buffer("components", vectors[:, -numbers * together :])

    def forward(self, x: Tensor) -> Tensor:
        blocks = nn.functional.pad(x, (0, 0, 0, -len(x) % self.together)).reshape(
            -1, self.components.shape[0]
        )
        return (blocks @ self.components @ self.components.T).reshape(-1, x.shape[1])[: len(x)]


class Filter(nn.Module):
    """One code for every frame: a filter over the frames around it, then one over the codes of it and those before."""

    def __init__(self, training: Tensor, numbers: int):
        super().__init__()
        torch.manual_seed(0)
        values, vectors = torch.linalg.eigh(training.T @ training / len(training))
        self.register_buffer("whiten", vectors[:, -128:] / values[-128:].sqrt())
        self.register_buffer("colour", (vectors[:, -128:] * values[-128:].sqrt()).T)
        self.encode = nn.Conv1d(128, numbers, 2 * TAPS, padding="same")
        self.decode = nn.Conv1d(numbers, 128, TAPS)
        optimiser = torch.optim.Adam(self.parameters(), 2e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, STEPS)
        for _ in range(STEPS):
            starts = torch.randint(len(training) - 400, (4,))
            x = torch.stack([training[start : start + 400] for start in starts])
            optimiser.zero_grad()
            (self(x) - x).square().sum(-1).mean().backward()
            optimiser.step()
            schedule.step()

    def forward(self, x: Tensor) -> Tensor:
        codes = self.encode((x @ self.whiten).transpose(-1, -2))
        return self.decode(nn.functional.pad(codes, (TAPS - 1, 0))).transpose(-1, -2) @ self.colour


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", default="built-in", help=f"{SOURCES_OF_SPEECH} (default: built-in)"
    )
    parser.add_argument(
        "--numbers", type=int, default=16, help="of the code, for each frame (default: 16)"
    )
    args = parser.parse_args()
    stft, corpus = STFT(), load_corpus(args.data)
    training, dev = torch.cat(log_power(corpus.split("train"), stft)), corpus.split("dev")
    mean = training.mean(0)
    training -= mean
    rows = []
    for title, code in [
        *((f"{n} frames together", lambda n=n: Block(training, n, args.numbers)) for n in TOGETHER),
        ("one code for every frame", lambda: Filter(training, args.numbers)),
    ]:
        model, ratios = code(), []
        for index, x in enumerate(log_power(dev, stft)):
            waveform = torch.from_numpy(dev.waveform(index))
            with torch.no_grad():
                coded = model(x - mean) + mean
            ratios.append(
                si_sdr(
                    resynthesise(coded, stft.analyse(waveform), stft, len(waveform)).numpy(),
                    waveform.numpy(),
                )
            )
        error = np.std(ratios, ddof=1) / np.sqrt(len(ratios))
        rows.append([title, report.mean_and_error(np.mean(ratios), error, 2)])
    print(report.table(["", "SI-SDR, dB"], rows))


if __name__ == "__main__":
    run(main)
