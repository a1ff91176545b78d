"""Kullback-Leibler divergence between two Gaussians with diagonal covariance, from their log-variances.

On a GPU one kernel reads each input once and writes each gradient that is wanted once: in float32, 32 bytes per
dimension for four inputs with four gradients, 16 with the standard normal, which is not loaded, for a loss that ends
in the mean over frames (`rows.py`; twice the gradients' bytes more for any other). On the CPU the closed form takes a
third less time than autograd through the definition, with a prior, and a tenth less without.
"""

import torch
from torch import Tensor

from .common import tl, triton
from .rows import RowLoss, as_rows, geometry, load_tile, register_gradient, rows_that_count, store_tile


def gaussian_kl_reference(
    q_mean: Tensor,
    q_log_variance: Tensor,
    p_mean: Tensor | None = None,
    p_log_variance: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """KL(q ‖ p) = ½ Σ_d ( lp − lq + (e^{lq} + (μq − μp)²)·e^{−lp} − 1 )

    q and p are (…, dimensions); without p the prior is N(0, I). mask: (…), bool, the frames that count; the others
    give 0 and no gradient, whatever they hold. Returns (…), float32 at least.
    """
    given = [tensor for tensor in (q_mean, q_log_variance, p_mean, p_log_variance) if tensor is not None]
    given = [tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in given]
    if mask is not None:
        given = [torch.where(mask[..., None], tensor, 0) for tensor in given]
    q_mean, q_log_variance, *p = given
    if not p:
        return 0.5 * (torch.exp(q_log_variance) + q_mean.square() - q_log_variance - 1).sum(-1)
    p_mean, p_log_variance = p
    spread = (torch.exp(q_log_variance) + (q_mean - p_mean).square()) * torch.exp(-p_log_variance)
    return 0.5 * (p_log_variance - q_log_variance + spread - 1).sum(-1)


@triton.jit
def gaussian_kl_kernel(
    qm_ptr, ql_ptr, pm_ptr, pl_ptr, mask_ptr, value_ptr, d_qm_ptr, d_ql_ptr, d_pm_ptr, d_pl_ptr,
    qm_stride, ql_stride, pm_stride, pl_stride, rows, columns, scale,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    counts = rows_that_count(mask_ptr, row, rows)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, columns, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = counts[:, None] & (column < columns)[None, :]
        qm = load_tile(qm_ptr, qm_stride, row, column, inside)
        ql = load_tile(ql_ptr, ql_stride, row, column, inside)
        if pm_ptr is not None:
            pm = load_tile(pm_ptr, pm_stride, row, column, inside)
            pl = load_tile(pl_ptr, pl_stride, row, column, inside)
            ratio, d_mean = tl.exp(ql - pl), (qm - pm) * tl.exp(-pl)
            distance, d_pl = d_mean * (qm - pm), 0.5 * (1 - ratio - d_mean * (qm - pm))
            total += 0.5 * (pl - ql + ratio + distance - 1)
            store_tile(d_pm_ptr, -scale * d_mean, row, column, rows, columns)
            store_tile(d_pl_ptr, scale * d_pl, row, column, rows, columns)
        else:
            ratio, d_mean = tl.exp(ql), qm
            total += 0.5 * (ratio + qm * qm - ql - 1)
        store_tile(d_qm_ptr, scale * d_mean, row, column, rows, columns)
        store_tile(d_ql_ptr, scale * 0.5 * (ratio - 1), row, column, rows, columns)
    tl.store(value_ptr + row, tl.sum(total, axis=1), mask=row < rows)


def launch(inputs, mask, wanted) -> tuple[Tensor, list[Tensor | None]]:
    frames, (rows, columns) = inputs[0].shape[:-1], as_rows(inputs[0]).shape
    value = torch.empty(frames, dtype=torch.float32, device=inputs[0].device)
    gradients = [
        torch.empty(x.shape, dtype=x.dtype, device=x.device) if wants else None
        for x, wants in zip(inputs, wanted, strict=True)
    ]
    inputs = [None if x is None else as_rows(x) for x in inputs]
    strides = [0 if x is None else x.stride(0) for x in inputs]
    mask = None if mask is None else mask.expand(frames).contiguous().view(torch.uint8)
    tile = geometry(columns)
    with torch.cuda.device_of(value):
        gaussian_kl_kernel[triton.cdiv(rows, tile["ROWS"]),](
            *inputs, mask, value, *gradients, *strides, rows, columns, 1 / rows, **tile
        )
    return value, gradients


def closed_form(inputs, mask, wanted) -> tuple[Tensor, list[Tensor | None]]:
    if mask is not None:
        inputs = [None if x is None else torch.where(mask[..., None], x, 0) for x in inputs]
    qm, ql, pm, pl = inputs
    if pm is None:
        d_ql = torch.exp(ql).sub_(1).mul_(0.5)
        value = torch.addcmul(torch.add(d_ql, ql, alpha=-0.5), qm, qm, value=0.5).sum(-1)
        return value, [qm.clone() if wanted[0] else None, d_ql, None, None]
    difference = qm - pm
    d_qm = torch.exp(-pl).mul_(difference)
    d_ql = torch.sub(ql, pl).exp_().sub_(1).mul_(0.5)
    d_pl = torch.addcmul(d_ql, d_qm, difference, value=0.5).neg_()  # ½ (1 − spread)
    value = torch.sub(pl, ql).mul_(0.5).sub_(d_pl).sum(-1)
    gradients = [d_qm, d_ql, torch.neg(d_qm) if wanted[2] else None, d_pl]
    return value, [gradient if wants else None for gradient, wants in zip(gradients, wanted, strict=True)]


@torch.library.custom_op("minidvae::gaussian_kl", mutates_args=())
def gaussian_kl_op(
    q_mean: Tensor,
    q_log_variance: Tensor,
    p_mean: Tensor | None,
    p_log_variance: Tensor | None,
    mask: Tensor | None,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    value, gradients = launch((q_mean, q_log_variance, p_mean, p_log_variance), mask, wanted)
    return value, *(q_mean.new_empty(0) if gradient is None else gradient for gradient in gradients)


@gaussian_kl_op.register_fake
def _(q_mean, q_log_variance, p_mean, p_log_variance, mask, wanted):
    inputs = (q_mean, q_log_variance, p_mean, p_log_variance)
    value = q_mean.new_empty(q_mean.shape[:-1], dtype=torch.float32)
    return value, *(
        torch.empty(x.shape, dtype=x.dtype, device=x.device) if wants else q_mean.new_empty(0)
        for x, wants in zip(inputs, wanted, strict=True)
    )


LOSS = RowLoss(gaussian_kl_reference, launch, closed_form, gaussian_kl_op)
register_gradient(LOSS)


def gaussian_kl_fused(
    q_mean: Tensor,
    q_log_variance: Tensor,
    p_mean: Tensor | None = None,
    p_log_variance: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """`gaussian_kl_reference` by the kernel, for inputs of one shape."""
    return LOSS.by_kernel(mask, q_mean, q_log_variance, p_mean, p_log_variance)


def gaussian_kl(
    q_mean: Tensor,
    q_log_variance: Tensor,
    p_mean: Tensor | None = None,
    p_log_variance: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """`gaussian_kl_reference`, by the fastest path for these tensors."""
    return LOSS(mask, q_mean, q_log_variance, p_mean, p_log_variance)
