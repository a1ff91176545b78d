"""Kullback-Leibler divergence between two Gaussians with diagonal covariance, from their
log-variances.

On a GPU one kernel does either pass, and reads the inputs in both. On the CPU the closed form keeps
its gradients.
"""

import torch
from torch import Tensor

from .common import as_rows, differentiates_once, launchable, row_tiles, store, tl, triton


def gaussian_kl_reference(
    q_mean: Tensor,
    q_log_variance: Tensor,
    p_mean: Tensor | None = None,
    p_log_variance: Tensor | None = None,
) -> Tensor:
    """KL(q ‖ p) = ½ Σ_d ( lp − lq + (e^{lq} + (μq − μp)²)·e^{−lp} − 1 )

    q and p are (…, dimensions); without p it is N(0, I). Returns (…), float32 at least.
    """
    given = [x for x in (q_mean, q_log_variance, p_mean, p_log_variance) if x is not None]
    q_mean, q_log_variance, *p = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in given)
    if not p:
        return 0.5 * (torch.exp(q_log_variance) + q_mean.square() - q_log_variance - 1).sum(-1)
    p_mean, p_log_variance = p
    spread = (torch.exp(q_log_variance) + (q_mean - p_mean).square()) * torch.exp(-p_log_variance)
    return 0.5 * (p_log_variance - q_log_variance + spread - 1).sum(-1)


@triton.jit
def gaussian_kl_kernel(
    qm_ptr, ql_ptr, pm_ptr, pl_ptr, value_ptr, upstream_ptr, d_qm_ptr, d_ql_ptr, d_pm_ptr, d_pl_ptr,
    qm_stride, ql_stride, pm_stride, pl_stride, upstream_stride, rows, columns,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Forward (without an upstream gradient): the values. Backward: the gradients whose pointers
    are given."""
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    if upstream_ptr is not None:
        upstream = tl.load(upstream_ptr + row * upstream_stride, mask=row < rows, other=0).to(
            tl.float32
        )
    for start in range(0, columns, COLUMNS):
        column = start + tl.arange(0, COLUMNS)[None, :]
        inside = (row < rows) & (column < columns)
        qm = tl.load(qm_ptr + row * qm_stride + column, mask=inside, other=0).to(tl.float32)
        ql = tl.load(ql_ptr + row * ql_stride + column, mask=inside, other=0).to(tl.float32)
        precision, distance, log_ratio = 1.0, qm, ql  # log_ratio: of the variances, q over p
        if pm_ptr is not None:
            pm = tl.load(pm_ptr + row * pm_stride + column, mask=inside, other=0).to(tl.float32)
            pl = tl.load(pl_ptr + row * pl_stride + column, mask=inside, other=0).to(tl.float32)
            precision, distance, log_ratio = tl.exp(-pl), qm - pm, ql - pl
        if upstream_ptr is None:
            total += 0.5 * (
                tl.exp(log_ratio) - log_ratio + distance * distance * precision - 1
            )  # 0 outside
        else:
            d_mean, d_ql = upstream * distance * precision, 0.5 * upstream * (tl.exp(log_ratio) - 1)
            at = row * columns + column
            store(d_qm_ptr, at, d_mean, inside)
            store(d_ql_ptr, at, d_ql, inside)
            store(d_pm_ptr, at, -d_mean, inside)
            store(d_pl_ptr, at, -d_ql - 0.5 * d_mean * distance, inside)
    if upstream_ptr is None:
        tl.store(value_ptr + row, tl.sum(total, axis=1, keep_dims=True), mask=row < rows)


class FusedGaussianKL(torch.autograd.Function):
    """By the kernel, for inputs of one shape."""

    @staticmethod
    def forward(ctx, *inputs: Tensor | None) -> Tensor:
        ctx.save_for_backward(*inputs)
        value = torch.empty(inputs[0].shape[:-1], dtype=torch.float32, device=inputs[0].device)
        rows, strides, (grid, tile) = arguments(inputs)
        with torch.cuda.device_of(value):
            gaussian_kl_kernel[grid](*rows, value, *[None] * 5, *strides, *rows[0].shape, **tile)
        return value

    @staticmethod
    def backward(ctx, upstream: Tensor):
        differentiates_once("gaussian_kl")
        wanted = zip(ctx.saved_tensors, ctx.needs_input_grad, strict=True)
        gradients = [
            torch.empty(x.shape, dtype=x.dtype, device=x.device) if wants else None
            for x, wants in wanted
        ]
        upstream = upstream.reshape(-1)
        rows, strides, (grid, tile) = arguments(ctx.saved_tensors, upstream)
        with torch.cuda.device_of(upstream):
            gaussian_kl_kernel[grid](
                *rows, None, upstream, *gradients, *strides, *rows[0].shape, **tile
            )
        return tuple(gradients)


def arguments(inputs, upstream: Tensor | None = None):
    rows = [None if x is None else as_rows(x) for x in inputs]
    return rows, [0 if x is None else x.stride(0) for x in (*rows, upstream)], row_tiles(rows[0])


def gaussian_kl_fused(q_mean, q_log_variance, p_mean=None, p_log_variance=None) -> Tensor:
    return FusedGaussianKL.apply(q_mean, q_log_variance, p_mean, p_log_variance)


class PlainGaussianKL(torch.autograd.Function):
    """The closed form, for float32 or float64 inputs of one shape and dtype."""

    @staticmethod
    def forward(ctx, qm: Tensor, ql: Tensor, pm: Tensor | None, pl: Tensor | None) -> Tensor:
        distance, log_ratio = (qm, ql) if pm is None else (qm - pm, ql - pl)
        d_mean = qm if pm is None else torch.neg(pl).exp_().mul_(distance)
        ratio = torch.expm1(log_ratio)  # of the variances, less one
        ctx.save_for_backward(distance, d_mean, ratio)
        ctx.standard = pm is None
        return torch.addcmul(ratio, distance, d_mean).sub_(log_ratio).sum(-1).mul_(0.5)

    @staticmethod
    def backward(ctx, upstream: Tensor):
        differentiates_once("gaussian_kl")
        distance, d_mean, ratio = ctx.saved_tensors
        d_mean, d_ql = d_mean * upstream[..., None], ratio * (0.5 * upstream)[..., None]
        if ctx.standard:
            return d_mean, d_ql, None, None
        return d_mean, d_ql, -d_mean, torch.addcmul(d_ql, d_mean, distance, value=0.5).neg_()


def gaussian_kl(
    q_mean: Tensor,
    q_log_variance: Tensor,
    p_mean: Tensor | None = None,
    p_log_variance: Tensor | None = None,
) -> Tensor:
    """`gaussian_kl_reference` by the fastest path for these tensors; traced, its definition.
    Differentiable once."""
    inputs = (q_mean, q_log_variance, p_mean, p_log_variance)
    given = [x for x in inputs if x is not None]
    if len({(x.shape, x.device) for x in given}) == 1 and not torch.compiler.is_compiling():
        if q_mean.is_cuda and launchable(*given):
            return gaussian_kl_fused(*inputs)
        if not q_mean.is_cuda and {x.dtype for x in given} in ({torch.float32}, {torch.float64}):
            return PlainGaussianKL.apply(*inputs)
    return gaussian_kl_reference(*inputs)
