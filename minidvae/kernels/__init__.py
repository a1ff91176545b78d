"""Tensors in, tensors out: the operations on the hot path, each beside the definition it must equal."""

from .gaussian_kl import gaussian_kl, gaussian_kl_reference
from .is_divergence import is_divergence, is_divergence_reference
from .latent_scan import latent_scan, latent_scan_reference
from .lstm_scan import lstm_scan, lstm_scan_reference

__all__ = [
    "gaussian_kl",
    "gaussian_kl_reference",
    "is_divergence",
    "is_divergence_reference",
    "latent_scan",
    "latent_scan_reference",
    "lstm_scan",
    "lstm_scan_reference",
]
