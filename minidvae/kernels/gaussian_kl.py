"""Kullback-Leibler divergence between two Gaussians with diagonal covariance, from their log-variances."""

import torch
from torch import Tensor


def gaussian_kl_reference(
    q_mean: Tensor, q_log_variance: Tensor, p_mean: Tensor | None = None, p_log_variance: Tensor | None = None
) -> Tensor:
    """KL(q ‖ p) = ½ Σ_d ( lp − lq + (e^{lq} + (μq − μp)²)·e^{−lp} − 1 )

    All arguments are (…, dimensions); without p the prior is N(0, I). Returns (…), float32 at least.
    """
    q_mean, q_log_variance = _accumulate(q_mean), _accumulate(q_log_variance)
    if p_mean is None:
        return 0.5 * (torch.exp(q_log_variance) + q_mean.square() - q_log_variance - 1).sum(-1)
    p_mean, p_log_variance = _accumulate(p_mean), _accumulate(p_log_variance)
    spread = (torch.exp(q_log_variance) + (q_mean - p_mean).square()) * torch.exp(-p_log_variance)
    return 0.5 * (p_log_variance - q_log_variance + spread - 1).sum(-1)


def _accumulate(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


gaussian_kl = gaussian_kl_reference
