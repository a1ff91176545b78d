"""Tensors in, tensors out: the operations on the hot path, each beside the definition it must equal."""

from .gaussian_kl import gaussian_kl, gaussian_kl_reference
from .is_divergence import is_divergence, is_divergence_reference

__all__ = ["gaussian_kl", "gaussian_kl_reference", "is_divergence", "is_divergence_reference"]
