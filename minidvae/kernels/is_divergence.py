"""Itakura-Saito divergence between a power spectrum and a model's variance, from the log-variance.

On a GPU one kernel does either pass: forward reads x and l, backward reads them again and writes
the gradient, 20 bytes a bin in float32 and 8 a frame. On the CPU the closed form keeps its gradient
from the forward pass.
"""

import torch
from torch import Tensor

from .common import as_rows, differentiates_once, launchable, row_tiles, tl, triton

FLOOR = 1e-12  # of the power: digital silence gives a finite loss, with a minimum


def is_divergence_reference(x: Tensor, log_variance: Tensor) -> Tensor:
    """Σ_f d_IS(x, e^l) with d_IS(x, e^l) = x·e^{−l} − log x + l − 1   (LigHT-DVAE paper, eq. 7)

    Up to a constant this is −log N_c(s; 0, diag e^l) for |s|² = x.

    x, log_variance: (…, bins), power and log-power. Returns (…): one value per frame, float32 at
    least.
    """
    dtype = torch.promote_types(torch.promote_types(x.dtype, log_variance.dtype), torch.float32)
    x, log_variance = x.to(dtype).clamp_min(FLOOR), log_variance.to(dtype)
    return (x * torch.exp(-log_variance) - torch.log(x) + log_variance - 1).sum(-1)


@triton.jit
def is_divergence_kernel(
    x_ptr, l_ptr, value_ptr, upstream_ptr, gradient_ptr, x_stride, l_stride, upstream_stride, rows, columns,
    FLOOR: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Forward (without an upstream gradient): the values. Backward: the gradient of l."""
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    if upstream_ptr is not None:
        upstream = tl.load(upstream_ptr + row * upstream_stride, mask=row < rows, other=0).to(
            tl.float32
        )
    for start in range(0, columns, COLUMNS):
        column = start + tl.arange(0, COLUMNS)[None, :]
        inside = (row < rows) & (column < columns)
        x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0).to(tl.float32)
        x = tl.where(x < FLOOR, FLOOR, x)  # a NaN stays one
        l = tl.load(l_ptr + row * l_stride + column, mask=inside, other=0).to(tl.float32)  # noqa: E741
        ratio = x * tl.exp(-l)
        if upstream_ptr is None:
            total += tl.where(inside, ratio - tl.log(x) + l - 1, 0)
        else:
            gradient = (upstream * (1 - ratio)).to(gradient_ptr.dtype.element_ty)
            tl.store(gradient_ptr + row * columns + column, gradient, mask=inside)
    if upstream_ptr is None:
        tl.store(value_ptr + row, tl.sum(total, axis=1, keep_dims=True), mask=row < rows)


class FusedISDivergence(torch.autograd.Function):
    """By the kernel, for x and l of one shape and an x without gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, log_variance: Tensor) -> Tensor:
        ctx.save_for_backward(x, log_variance)
        value = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
        x, l = as_rows(x), as_rows(log_variance)  # noqa: E741
        grid, tile = row_tiles(x)
        with torch.cuda.device_of(x):
            is_divergence_kernel[grid](
                x, l, value, None, None, x.stride(0), l.stride(0), 0, *x.shape, FLOOR, **tile
            )
        return value

    @staticmethod
    def backward(ctx, upstream: Tensor):
        differentiates_once("is_divergence")
        x, log_variance = ctx.saved_tensors
        gradient = torch.empty(x.shape, dtype=log_variance.dtype, device=x.device)
        x, l, upstream = as_rows(x), as_rows(log_variance), upstream.reshape(-1)  # noqa: E741
        grid, tile = row_tiles(x)
        strides = x.stride(0), l.stride(0), upstream.stride(0)
        with torch.cuda.device_of(x):
            is_divergence_kernel[grid](
                x, l, None, upstream, gradient, *strides, *x.shape, FLOOR, **tile
            )
        return None, gradient


is_divergence_fused = FusedISDivergence.apply


class PlainISDivergence(torch.autograd.Function):
    """The closed form in two buffers, for float32 or float64 of one dtype and an x without
    gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, log_variance: Tensor) -> Tensor:
        log_ratio = x.clamp_min(FLOOR).log_().sub_(log_variance)
        excess = torch.expm1(log_ratio)  # x·e^{−l} − 1
        ctx.save_for_backward(excess)
        return excess.sum(-1).sub_(log_ratio.sum(-1))

    @staticmethod
    def backward(ctx, upstream: Tensor):
        differentiates_once("is_divergence")
        (excess,) = ctx.saved_tensors
        return None, excess * -upstream[..., None]


def is_divergence(x: Tensor, log_variance: Tensor) -> Tensor:
    """`is_divergence_reference` by the fastest path for these tensors; traced, its definition.
    Differentiable once."""
    alike = (
        x.shape == log_variance.shape and x.device == log_variance.device and not x.requires_grad
    )
    if alike and not torch.compiler.is_compiling():
        if x.is_cuda and launchable(x, log_variance):
            return is_divergence_fused(x, log_variance)
        if (
            not x.is_cuda
            and x.dtype == log_variance.dtype
            and x.dtype in (torch.float32, torch.float64)
        ):
            return PlainISDivergence.apply(x, log_variance)
    return is_divergence_reference(x, log_variance)
