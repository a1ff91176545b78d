"""Acoustic model of the FHVAE paper's recognisers (appendix G): LSTM layers with projection, from
features to phones, frame by frame.

    i, f, g, o = W_ih x_t + W_hh h_{t−1} + b
    c_t = σ(f) c_{t−1} + σ(i) tanh(g)
    h_t = W_hr (σ(o) tanh(c_t))

Sak, Senior & Beaufays, Long short-term memory recurrent neural network architectures for large
scale acoustic modeling, Interspeech 2014. The output for a frame comes some frames later, so that
the network has seen the frames after it. The model is trained on aligned labels by truncated
back-propagation through time, with the state of every utterance carried from one piece to the next;
or on transcripts with CTC.
"""

import warnings
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Standardise
from .recognisers import FrameBatch, Recogniser, TranscriptBatch, ctc_loss

# The warning says that such an LSTM is slower than others.
warnings.filterwarnings("ignore", "LSTM with projections is not supported with oneDNN")


@dataclass
class AcousticConfig:
    bins: int = 80
    symbols: tuple[str, ...] = ()  # names of the outputs; set by the training
    criterion: str = "frames"  # cross-entropy per frame; or ctc, whose output 0 is the blank
    width: int = 1024  # cells of a layer
    projection: int = 512  # outputs of a layer; 0: the cells, without projection
    layers: int = 3
    delay: int = 5  # criterion frames: the output for a frame comes so many frames later
    lanes: int = 0  # number of utterances whose state is carried over; set by the training


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
        """Make new layers for this number of bins and for these symbols."""
        config = self.config
        device = self.standardise.mean.device
        config.bins = bins
        config.symbols = tuple(symbols)
        outputs = len(symbols) + 1 if config.criterion == "ctc" else max(1, len(symbols))
        self.standardise = Standardise(bins)
        self.lstm = nn.LSTM(
            bins, config.width, config.layers, batch_first=True, proj_size=config.projection
        )
        self.output = nn.Linear(config.projection or config.width, outputs)
        # Log-probabilities of the symbols in the training set.
        self.register_buffer("log_priors", torch.zeros(outputs))
        self.carry(config.lanes)
        self.to(device)

    def carry(self, lanes: int) -> None:
        """Make a state of zeros for this number of utterances in parallel."""
        config = self.config
        device = self.standardise.mean.device
        config.lanes = lanes
        h_width = config.projection or config.width
        self.register_buffer("h", torch.zeros(config.layers, lanes, h_width, device=device))
        self.register_buffer("c", torch.zeros(config.layers, lanes, config.width, device=device))

    def logits(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Return the outputs (batch, frames, outputs) before the softmax, and their lengths. x:
        features (batch, frames, bins), anything after the end, of `lengths` (batch,) frames."""
        delay = self.config.delay if self.config.criterion == "frames" else 0
        if delay:  # The last frame is repeated.
            frame_indices = torch.arange(x.shape[1] + delay, device=x.device)
            frame_indices = frame_indices.minimum(lengths[:, None] - 1)
            x = x.gather(1, frame_indices[..., None].expand(-1, -1, x.shape[2]))
        h, _ = self.lstm(self.standardise(x))
        return self.output(h[:, delay:]), lengths

    def loss(self, batch: FrameBatch | TranscriptBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss and its terms, detached.

        Criterion frames: cross-entropy per frame, and the share of frames with a wrong phone
        ("errors"). The state is carried over in training only. Criterion ctc: −log p(labels | x)
        per symbol.
        """
        if self.config.criterion == "ctc":
            loss = ctc_loss(*self.logits(batch.x, batch.lengths), batch)
            return loss, {"loss": loss.detach()}
        state = None
        if self.training:
            continues = ~batch.first[:, None]
            state = (self.h * continues, self.c * continues)
        h, (last_h, last_c) = self.lstm(self.standardise(batch.x), state)
        if self.training:
            self.h.copy_(last_h.detach())
            self.c.copy_(last_c.detach())
        logits = self.output(h).float().flatten(0, 1)
        labels = batch.labels.flatten()
        is_labelled = labels >= 0
        total = is_labelled.sum().clamp_min(1)
        loss = F.cross_entropy(logits, labels, ignore_index=-1, reduction="sum") / total
        errors = ((logits.argmax(-1) != labels) & is_labelled).sum() / total
        return loss, {"loss": loss.detach(), "errors": errors}
