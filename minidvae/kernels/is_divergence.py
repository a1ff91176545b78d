"""Itakura-Saito divergence between a power spectrum and a model's variance, from the log-variance."""

import torch
from torch import Tensor

FLOOR = 1e-12  # of the power: digital silence gives a finite loss, with a minimum


def is_divergence_reference(x: Tensor, log_variance: Tensor) -> Tensor:
    """Σ_f d_IS(x, e^l) with d_IS(x, e^l) = x·e^{−l} − log x + l − 1   (LigHT-DVAE paper, eq. 7)

    Up to a constant this is −log N_c(s; 0, diag e^l) for |s|² = x.

    x, log_variance: (…, bins), power and log-power. Returns (…): one value per frame, float32 at least.
    """
    dtype = torch.promote_types(torch.promote_types(x.dtype, log_variance.dtype), torch.float32)
    x, log_variance = x.to(dtype).clamp_min(FLOOR), log_variance.to(dtype)
    return (x * torch.exp(-log_variance) - torch.log(x) + log_variance - 1).sum(-1)


is_divergence = is_divergence_reference
