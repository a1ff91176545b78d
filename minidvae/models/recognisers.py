"""What the recognisers share: their batches, and the loss of transcripts."""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn


class FrameBatch(NamedTuple):
    """Consecutive frames of many utterances, with a label each."""

    x: Tensor  # (batch, frames, bins), not standardised
    labels: Tensor  # (batch, frames), int64; −1 where there is no frame
    first: Tensor  # (batch,), bool: an utterance begins, for which no state is carried over


class TranscriptBatch(NamedTuple):
    """Utterances with their transcripts."""

    x: Tensor  # (batch, frames, bins), not standardised, zeros after the end
    lengths: Tensor  # (batch,), int64, numbers of frames
    labels: Tensor  # (batch, longest transcript), int64, symbols from 1 on, anything after the end
    counts: Tensor  # (batch,), int64, numbers of symbols


class Recogniser(nn.Module):
    """A model from features of an utterance to symbols. Subclasses have `standardise`, of the
    features, and `build(bins, symbols)`, which makes new layers for this many bins and for these
    symbols."""


def ctc_loss(logits: Tensor, lengths: Tensor, batch: TranscriptBatch) -> Tensor:
    """Return −log p(labels | x), summed over all alignments (Graves et al. 2006), per symbol, mean
    over the batch.

    logits: (batch, frames, 1 + symbols) of utterances with these lengths; output 0 is the blank.
    Utterances with more symbols than frames, which have no alignment, count 0.
    """
    log_probabilities = logits.float().log_softmax(-1).transpose(0, 1)
    return F.ctc_loss(log_probabilities, batch.labels, lengths, batch.counts, zero_infinity=True)
