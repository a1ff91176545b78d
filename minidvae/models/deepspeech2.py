"""Deep Speech 2 (Amodei et al., ICML 2016): from features to symbols, phones or characters, without
an alignment.

    two or three convolutions over frames × bins, min(max(·, 0), 20); the first halves the frames,
    each halves the bins recurrent layers in both directions, the two summed (paper, section 3.1)
    linear → blank and symbols, trained with CTC

Where the paper normalises over all frames of the batch, this network normalises every frame by
itself (LayerNorm): it computes the same in training and in use, and neither padding nor the other
utterances of a batch touch the result.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from .base import Standardise
from .recognisers import Recogniser, TranscriptBatch, ctc_loss

LAYERS = {"gru": nn.GRU, "lstm": nn.LSTM, "rnn": nn.RNN}
CLIP = 20.0  # largest output of the rectified linear units


@dataclass
class DeepSpeech2Config:
    bins: int = 200
    symbols: tuple[str, ...] = ()  # names of outputs 1, 2, …; 0 is the blank; set by the training
    # Channels of each convolution. The paper's largest network has a third one with 96.
    channels: tuple[int, ...] = (32, 32)
    architecture: str = "gru"  # or lstm, rnn
    width: int = 800  # width of a recurrent layer in each direction
    layers: int = 5  # the paper's have 1 to 7


class Convolution(nn.Module):
    """Convolution, LayerNorm over channels and bins of a frame, clipped ReLU.

    (batch, channels, frames, bins) → the same with half the bins (rounded up) and, with a stride of
    2, half the frames.
    """

    def __init__(
        self, inputs: int, outputs: int, bins: int, kernel: tuple[int, int], stride: tuple[int, int]
    ):
        super().__init__()
        padding = (kernel[0] // 2, kernel[1] // 2)
        self.convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.normalise = nn.LayerNorm((outputs, halved(bins)))

    def forward(self, x: Tensor) -> Tensor:
        frames = self.convolution(x).transpose(1, 2)  # (batch, frames, channels, bins)
        frames = self.normalise(frames)
        return F.hardtanh(frames, 0.0, CLIP).transpose(1, 2)


class DeepSpeech2(Recogniser):
    def __init__(self, config: DeepSpeech2Config):
        super().__init__()
        if config.architecture not in LAYERS:
            raise ValueError(f"architecture={config.architecture!r} is none of {', '.join(LAYERS)}")
        if not config.channels:
            raise ValueError("channels=(): expected those of one convolution at least")
        self.config = config
        self.build(config.bins, config.symbols)

    def build(self, bins: int, symbols: tuple[str, ...]) -> None:
        """Make new layers for this number of bins and for these symbols."""
        config = self.config
        device = self.output.weight.device if hasattr(self, "output") else None
        config.bins = bins
        config.symbols = tuple(symbols)
        self.standardise = Standardise(bins)
        self.convolutions = nn.ModuleList()
        inputs = 1
        for outputs in config.channels:
            is_first = inputs == 1
            kernel = (11, 41) if is_first else (11, 21)
            stride = (2, 2) if is_first else (1, 2)
            self.convolutions.append(Convolution(inputs, outputs, bins, kernel, stride))
            inputs = outputs
            bins = halved(bins)
        sizes = [inputs * bins] + [config.width] * (config.layers - 1)
        self.normalise = nn.ModuleList([nn.Identity()])
        self.normalise.extend(nn.LayerNorm(size) for size in sizes[1:])
        layer_type = LAYERS[config.architecture]
        self.recurrent = nn.ModuleList(
            layer_type(size, config.width, batch_first=True, bidirectional=True) for size in sizes
        )
        self.output = nn.Linear(config.width, 1 + len(symbols))
        self.to(device)

    def encode(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Return the outputs of the last recurrent layer (batch, ⌈frames / 2⌉, width), zeros after
        the end, and their number for each utterance. Every convolution sees zeros beyond both ends
        of each utterance, as if it were alone."""
        x = self.standardise(x) * valid(lengths, x.shape[1])[..., None]
        x = x[:, None]  # (batch, 1, frames, bins)
        lengths = halved(lengths)
        for convolution in self.convolutions:
            x = convolution(x)
            x = x * valid(lengths, x.shape[2])[:, None, :, None]
        frames = x.transpose(1, 2).flatten(2)
        packed = pack_padded_sequence(frames, lengths.cpu(), batch_first=True, enforce_sorted=False)
        for normalise, layer in zip(self.normalise, self.recurrent, strict=True):
            outputs, _ = layer(packed._replace(data=normalise(packed.data)))
            forward, backward = outputs.data.chunk(2, dim=-1)
            packed = packed._replace(data=forward + backward)
        num_frames = frames.shape[1]
        padded, _ = pad_packed_sequence(packed, batch_first=True, total_length=num_frames)
        return padded, lengths

    def logits(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Return the outputs (batch, ⌈frames / 2⌉, 1 + symbols) before the softmax, and their
        number for each utterance. x: features (batch, frames, bins), zeros after the end, of
        `lengths` (batch,) frames."""
        frames, lengths = self.encode(x, lengths)
        return self.output(frames), lengths

    def features(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Return the features of the Fréchet distance of speech: the mean over time of the last
        recurrent layer's output, (batch, frames, bins) → (batch, width), float32. Without `lengths`
        all utterances are as long as x."""
        if lengths is None:
            lengths = torch.full((len(x),), x.shape[1], device=x.device)
        frames, lengths = self.encode(x, lengths)
        return frames.float().sum(1) / lengths[:, None]

    def loss(self, batch: TranscriptBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return −log p(labels | x) per symbol, mean over the batch, and its terms, detached."""
        loss = ctc_loss(*self.logits(batch.x, batch.lengths), batch)
        return loss, {"loss": loss.detach()}


def halved(size):
    """Return a size after a stride of 2."""
    return (size + 1) // 2


def valid(lengths: Tensor, frames: int) -> Tensor:
    """Return which frames come before the end, (batch,) → (batch, frames), bool."""
    return torch.arange(frames, device=lengths.device) < lengths[:, None]
