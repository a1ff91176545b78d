"""Acoustic model of the FHVAE paper's recognisers (appendix G): LSTM layers with projection, frame by frame → phones.

    i, f, g, o = W_ih x_t + W_hh h_{t−1} + b    c_t = σ(f) c_{t−1} + σ(i) tanh(g)    h_t = W_hr (σ(o) tanh(c_t))

after Sak, Senior & Beaufays, Long short-term memory recurrent neural network architectures for large scale acoustic
modeling, Interspeech 2014, whose outputs come some frames after their frames, so that the network has heard what
follows. Trained on aligned labels by truncated back-propagation through time, the state of every utterance carried
from one piece to the next; or on transcripts with CTC.
"""

import warnings
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Standardise
from .recognisers import FrameBatch, Recogniser, TranscriptBatch, ctc_loss

warnings.filterwarnings(
    "ignore", "LSTM with projections is not supported with oneDNN"
)  # a matter of speed only


@dataclass
class AcousticConfig:
    bins: int = 80
    symbols: tuple[str, ...] = ()  # what the outputs stand for; set when training begins
    criterion: str = (
        "frames"  # cross-entropy with a label for every frame; or ctc, whose output 0 is the blank
    )
    width: int = 1024  # cells of a layer
    projection: int = 512  # outputs of a layer; 0: its cells, not projected
    layers: int = 3
    delay: int = 5  # criterion frames: the output for a frame comes so many frames after it
    lanes: int = 0  # utterances whose state is carried over; set when training begins


class Acoustic(Recogniser):
    def __init__(self, config: AcousticConfig):
        super().__init__()
        if config.projection >= config.width:
            raise ValueError(
                f"projection={config.projection}: expected less than width={config.width}, or 0"
            )
        self.config = config
        self.standardise = Standardise(config.bins)
        self.build(config.bins, config.symbols)

    def build(self, bins: int, symbols: tuple[str, ...]) -> None:
        """New layers for features of so many bins and for these symbols."""
        config, device = self.config, self.standardise.mean.device
        config.bins, config.symbols = bins, tuple(symbols)
        outputs = max(1, len(symbols) + (config.criterion == "ctc"))
        self.standardise = Standardise(bins)
        self.lstm = nn.LSTM(
            bins, config.width, config.layers, batch_first=True, proj_size=config.projection
        )
        self.output = nn.Linear(config.projection or config.width, outputs)
        self.register_buffer(
            "log_priors", torch.zeros(outputs)
        )  # of the symbols, on the training set
        self.carry(config.lanes)
        self.to(device)

    def carry(self, lanes: int) -> None:
        """A state of zeros for so many utterances in parallel."""
        config, device = self.config, self.standardise.mean.device
        config.lanes = lanes
        for name, width in (("h", config.projection or config.width), ("c", config.width)):
            self.register_buffer(name, torch.zeros(config.layers, lanes, width, device=device))

    def logits(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Utterances x (batch, frames, bins), features as they are, anything after the end, of `lengths` (batch,)
        frames → outputs (batch, frames, outputs) before the softmax, and their lengths."""
        delay = self.config.delay if self.config.criterion == "frames" else 0
        if delay:  # the last frame is repeated
            places = torch.arange(x.shape[1] + delay, device=x.device).minimum(lengths[:, None] - 1)
            x = x.gather(1, places[..., None].expand(-1, -1, x.shape[2]))
        return self.output(self.lstm(self.standardise(x))[0][:, delay:]), lengths

    def loss(self, batch: FrameBatch | TranscriptBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Criterion frames: cross-entropy per frame, and the share of frames whose phone is wrong ("errors"). The
        state is carried over in training only. Criterion ctc: −log p(labels | x) per symbol."""
        if self.config.criterion == "ctc":
            loss = ctc_loss(*self.logits(batch.x, batch.lengths), batch)
            return loss, {"loss": loss.detach()}
        kept = ~batch.first[:, None]
        h, last = self.lstm(
            self.standardise(batch.x), (self.h * kept, self.c * kept) if self.training else None
        )
        if self.training:
            self.h.copy_(last[0].detach())
            self.c.copy_(last[1].detach())
        logits, labels = self.output(h).float().flatten(0, 1), batch.labels.flatten()
        known = labels >= 0
        total = known.sum().clamp_min(1)
        loss = F.cross_entropy(logits, labels, ignore_index=-1, reduction="sum") / total
        errors = ((logits.argmax(-1) != labels) & known).sum() / total
        return loss, {"loss": loss.detach(), "errors": errors}
