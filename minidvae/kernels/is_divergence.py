"""Itakura-Saito divergence between a power spectrum and a model's variance, from the log-variance.

On a GPU one kernel reads x and l once and writes the gradient once: in float32, 12 bytes per bin for a loss that ends
in the mean over frames, forward and backward (`rows.py`: 20 for any other, as for a backward pass that reads x and l
again), and 4 per frame. On the CPU the closed form writes into two buffers; about half the time of autograd through
the definition. Tried and left there: row blocks that stay in the cache (no faster), the factor 1/frames of a mean in
the forward pass as on a GPU (saves less than the comparison costs in lines).
"""

import torch
from torch import Tensor

from .common import needs_gradient, tl, triton
from .rows import RowLoss, as_rows, geometry, load_tile, register_gradient, rows_that_count, store_tile

FLOOR = 1e-12  # of the power: digital silence gives a finite loss, with a minimum


def is_divergence_reference(x: Tensor, log_variance: Tensor, mask: Tensor | None = None) -> Tensor:
    """Σ_f d_IS(x, e^l) with d_IS(x, e^l) = x·e^{−l} − log x + l − 1   (LigHT-DVAE paper, eq. 7)

    Up to a constant this is −log N_c(s; 0, diag e^l) for |s|² = x.

    x, log_variance: (…, bins), power and log-power. mask: (…), bool, the frames that count; the others give 0 and no
    gradient, whatever they hold. Returns (…): one value per frame, float32 at least.
    """
    dtype = torch.promote_types(torch.promote_types(x.dtype, log_variance.dtype), torch.float32)
    x, log_variance = x.to(dtype), log_variance.to(dtype)
    if mask is not None:
        x, log_variance = torch.where(mask[..., None], x, 1), torch.where(mask[..., None], log_variance, 0)
    x = x.clamp_min(FLOOR)
    return (x * torch.exp(-log_variance) - torch.log(x) + log_variance - 1).sum(-1)


@triton.jit
def is_divergence_kernel(
    x_ptr, l_ptr, mask_ptr, value_ptr, gradient_ptr, x_stride, l_stride, rows, columns, scale,
    FLOOR: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    counts = rows_that_count(mask_ptr, row, rows)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, columns, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = counts[:, None] & (column < columns)[None, :]
        x = load_tile(x_ptr, x_stride, row, column, inside)
        l = load_tile(l_ptr, l_stride, row, column, inside)  # noqa: E741
        x = tl.where(inside, tl.where(x < FLOOR, FLOOR, x), 1)  # a NaN stays one
        ratio = x * tl.exp(-l)
        total += ratio - tl.log(x) + l - 1
        store_tile(gradient_ptr, scale * (1 - ratio), row, column, rows, columns)
    tl.store(value_ptr + row, tl.sum(total, axis=1), mask=row < rows)


def launch(inputs, mask, wanted) -> tuple[Tensor, list[Tensor | None]]:
    x, log_variance = map(as_rows, inputs)
    (rows, columns), frames = log_variance.shape, inputs[1].shape[:-1]
    value = torch.empty(frames, dtype=torch.float32, device=x.device)
    gradient = torch.empty(inputs[1].shape, dtype=log_variance.dtype, device=x.device) if wanted[1] else None
    mask = None if mask is None else mask.expand(frames).contiguous().view(torch.uint8)
    tile = geometry(columns)
    with torch.cuda.device_of(x):
        is_divergence_kernel[triton.cdiv(rows, tile["ROWS"]),](
            x, log_variance, mask, value, gradient, x.stride(0), log_variance.stride(0), rows, columns, 1 / rows,
            FLOOR, **tile,
        )  # fmt: skip
    return value, [None, gradient]


def closed_form(inputs, mask, wanted) -> tuple[Tensor, list[Tensor | None]]:
    x, log_variance = inputs
    if mask is not None:
        x, log_variance = torch.where(mask[..., None], x, 1), torch.where(mask[..., None], log_variance, 0)
    x = x.clamp_min(FLOOR)
    gradient = torch.neg(log_variance).exp_()
    torch.addcmul(x.new_ones(()), x, gradient, value=-1, out=gradient)  # 1 − x·e^{−l}
    value = torch.sub(log_variance, x.log_(), out=x).sub_(gradient).sum(-1)
    return value, [None, gradient]


@torch.library.custom_op("minidvae::is_divergence", mutates_args=())
def is_divergence_op(
    x: Tensor, log_variance: Tensor, mask: Tensor | None, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    value, (_, gradient) = launch((x, log_variance), mask, wanted)
    return value, x.new_empty(0), log_variance.new_empty(0) if gradient is None else gradient


@is_divergence_op.register_fake
def _(x, log_variance, mask, wanted):
    value = x.new_empty(x.shape[:-1], dtype=torch.float32)
    gradient = torch.empty(x.shape if wanted[1] else (0,), dtype=log_variance.dtype, device=x.device)
    return value, x.new_empty(0), gradient


LOSS = RowLoss(is_divergence_reference, launch, closed_form, is_divergence_op)
register_gradient(LOSS)


def is_divergence_fused(x: Tensor, log_variance: Tensor, mask: Tensor | None = None) -> Tensor:
    """`is_divergence_reference` by the kernel, for an x without gradient."""
    return LOSS.by_kernel(mask, x, log_variance)


def is_divergence(x: Tensor, log_variance: Tensor, mask: Tensor | None = None) -> Tensor:
    """`is_divergence_reference`, by the fastest path for these tensors."""
    if any(needs_gradient(x)):
        return is_divergence_reference(x, log_variance, mask)
    return LOSS(mask, x, log_variance)
