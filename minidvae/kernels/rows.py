"""What losses with one value per row share: the launch, and a gradient that is made in the forward pass.

The forward kernel has read all that the gradient needs, so it writes the gradient there and then, for an upstream
gradient of 1/rows for each row: that of the mean, which nearly every loss ends in. Backward compares it with the true
one, a number per row, and touches only tiles where the two differ. Beside the values and the upstream gradient, a
mean thus moves each input once and each gradient once, the least that is possible; any other upstream gradient (a
weight β other than 1, a scaled loss) costs one more reading and writing of the gradients, as much as a backward pass
that computes them anew from the inputs. Under torch.compile backward works on copies, for the same cost.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .common import differentiable_gradient, launchable, needs_gradient, tl, triton


def geometry(columns: int) -> dict:
    """Tile and warps of a kernel that reads (rows, columns) once, a tile after the other along the columns.

    512 elements by 4 warps, 4 in each thread: two float32 inputs keep 32 bytes per thread under way, in 32 registers,
    so that a multiprocessor holds its 64 warps and asks for 64 KB at a time (4.8 TB/s for 132 of them, at a latency of
    1 µs, is 36 KB each). Four inputs: 56 registers, 36 warps, as many bytes. Twice the elements cost more than twice
    the registers, addresses mostly. Tiles are wide, so that a thread has few rows to address; a quarter to a third of
    the lanes idle at 513 and 257 bins, where memory is the limit, not the lanes.
    """
    width = min(128, triton.next_power_of_2(columns))
    return {"ROWS": 512 // width, "COLUMNS": width, "num_warps": 4}


def as_rows(tensor: Tensor) -> Tensor:
    """(…, columns) → (rows, columns), the elements of a row beside one another; a copy only where that needs one."""
    rows = tensor.reshape(-1, tensor.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


@triton.jit
def rows_that_count(mask_ptr, row, rows):
    counts = row < rows
    if mask_ptr is not None:
        counts = tl.load(mask_ptr + row, mask=counts, other=0) != 0
    return counts


@triton.jit
def load_tile(ptr, stride, row, column, inside):
    """In float32; 0 outside (the interpreter takes any other value for the bits of a bfloat16)."""
    return tl.load(ptr + row[:, None] * stride + column[None, :], mask=inside, other=0).to(tl.float32)


@triton.jit
def store_tile(ptr, value, row, column, rows, columns):
    """Into a contiguous tensor, where there is one."""
    if ptr is not None:
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        tl.store(ptr + row[:, None] * columns + column[None, :], value.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def scale_rows_kernel(
    a_ptr, b_ptr, c_ptr, d_ptr, upstream_ptr, upstream_stride, rows, columns, scale,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Gradients (rows, columns) made for an upstream gradient of `scale` become those for the true one, in place."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    upstream = tl.load(upstream_ptr + row * upstream_stride, mask=row < rows, other=scale).to(tl.float32)
    if tl.sum((upstream != scale).to(tl.int32), axis=0) > 0:
        factor = tl.where(upstream == scale, 1.0, upstream / scale)[:, None]
        for start in range(0, columns, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            scale_tile(a_ptr, factor, row, column, rows, columns)
            scale_tile(b_ptr, factor, row, column, rows, columns)
            scale_tile(c_ptr, factor, row, column, rows, columns)
            scale_tile(d_ptr, factor, row, column, rows, columns)


@triton.jit
def scale_tile(ptr, factor, row, column, rows, columns):
    if ptr is not None:
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        store_tile(ptr, load_tile(ptr, columns, row, column, inside) * factor, row, column, rows, columns)


def scale_rows(gradients: Sequence[Tensor], upstream: Tensor, scale: float) -> None:
    """In place: at most four contiguous gradients (…, columns), made for an upstream gradient of `scale`, become those
    for `upstream` (…)."""
    rows, columns = upstream.numel(), gradients[0].shape[-1]
    upstream, tile = upstream.reshape(-1), geometry(columns)
    pointers = [*gradients, *[None] * (4 - len(gradients))]
    with torch.cuda.device_of(upstream):
        grid = (triton.cdiv(rows, tile["ROWS"]),)
        scale_rows_kernel[grid](*pointers, upstream, upstream.stride(0), rows, columns, scale, **tile)


@torch.library.custom_op("minidvae::scaled_rows", mutates_args=())
def scaled_rows_op(gradients: list[Tensor], upstream: Tensor, scale: float) -> list[Tensor]:
    """`scale_rows` on copies, as torch.compile wants its operations: without a trace on what they are given."""
    copies = [gradient.clone() for gradient in gradients]
    scale_rows(copies, upstream, scale)
    return copies


@scaled_rows_op.register_fake
def _(gradients, upstream, scale):
    return [torch.empty_like(gradient) for gradient in gradients]


class RowLoss(NamedTuple):
    """A loss with a value per row, all inputs (…, columns) of one shape.

    reference(*inputs, mask=mask): its definition. fused and plain (inputs, mask, wanted) → the values and, for each of
    the inputs, its gradient or None where it is not `wanted`: by a kernel, for an upstream gradient of 1/rows, and in
    plain PyTorch, for one of 1. operation: `fused` for torch.compile.
    """

    reference: Callable
    fused: Callable
    plain: Callable
    operation: Callable

    def by_kernel(self, mask: Tensor | None, *inputs: Tensor | None) -> Tensor:
        wanted = needs_gradient(*inputs)
        if torch.compiler.is_compiling():
            return self.operation(*inputs, mask, wanted)[0]
        return GradientAhead.apply(self, True, wanted, mask, *inputs)

    def differentiable_gradient(self, mask: Tensor | None, inputs: Sequence[Tensor | None], upstream: Tensor):
        return differentiable_gradient(lambda *inputs: self.reference(*inputs, mask=mask), inputs, upstream)

    def __call__(self, mask: Tensor | None, *inputs: Tensor | None) -> Tensor:
        """By the fastest path for these tensors."""
        given = [tensor for tensor in inputs if tensor is not None]
        if any(tensor.shape != given[0].shape for tensor in given):
            return self.reference(*inputs, mask=mask)
        maskable = mask is None or mask.dtype == torch.bool and mask.device == given[0].device
        if given[0].is_cuda and maskable and launchable(*given):
            return self.by_kernel(mask, *inputs)
        one_type = len({(tensor.dtype, tensor.device, tensor.layout) for tensor in given}) == 1
        if one_type and given[0].dtype in (torch.float32, torch.float64) and not torch.compiler.is_compiling():
            return GradientAhead.apply(self, False, needs_gradient(*inputs), mask, *inputs)
        return self.reference(*inputs, mask=mask)


class GradientAhead(torch.autograd.Function):
    """apply(loss, fused, wanted, mask, *inputs)"""

    @staticmethod
    def forward(ctx, loss, fused, wanted, mask, *inputs):
        ctx.loss, ctx.fused, ctx.wanted = loss, fused, wanted
        ctx.save_for_backward(mask, *inputs)
        value, ctx.gradients = (loss.fused if fused else loss.plain)(inputs, mask, wanted)
        return value

    @staticmethod
    def backward(ctx, upstream):
        mask, *inputs = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient itself is to be differentiated
            return None, None, None, None, *ctx.loss.differentiable_gradient(mask, inputs, upstream)
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:  # backward a second time: those of the forward pass were given away
            gradients = (ctx.loss.fused if ctx.fused else ctx.loss.plain)(inputs, mask, ctx.wanted)[1]
        given = [gradient for gradient in gradients if gradient is not None]
        if ctx.fused:
            scale_rows(given, where_counted(upstream, mask), 1 / upstream.numel())
        else:
            factor = where_counted(upstream, mask)[..., None]
            for gradient in given:
                gradient.mul_(factor)
        return None, None, None, None, *gradients


def register_gradient(loss: RowLoss) -> None:
    """The gradient of `loss.operation(*inputs, mask, wanted)`, which returns the values and a gradient per input."""

    def setup_context(ctx, inputs, output):
        *inputs, mask, wanted = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.wanted = wanted
        ctx.save_for_backward(mask, *inputs, *output[1:])

    def backward(ctx, upstream, *_):
        mask, *tensors = ctx.saved_tensors
        inputs, gradients = tensors[: len(tensors) // 2], tensors[len(tensors) // 2 :]
        if torch.is_grad_enabled():
            return *loss.differentiable_gradient(mask, inputs, upstream), None, None
        given = [gradient for gradient, wants in zip(gradients, ctx.wanted, strict=True) if wants]
        scaled = iter(scaled_rows_op(given, where_counted(upstream, mask), 1 / upstream.numel()))
        return *(next(scaled) if wants else None for wants in ctx.wanted), None, None

    loss.operation.register_autograd(backward, setup_context=setup_context)


def where_counted(upstream: Tensor, mask: Tensor | None) -> Tensor:
    """A masked frame has no gradient, whatever arrives there: 0/0 where a sequence is empty, for one."""
    return upstream if mask is None else upstream.masked_fill(~mask, 1 / upstream.numel())
