"""What the kernels share: Triton or its absence, which tensors a kernel takes, activations, rows in
tiles.

Every fused path runs in Triton's interpreter too, on CPU tensors, when TRITON_INTERPRET=1 is set
before the import. The public functions never take it there: on the CPU they take plain PyTorch.
"""

from contextlib import nullcontext

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # not on this platform: the definitions below are read, and never launched
    from types import SimpleNamespace

    HAS_TRITON, INTERPRETED = False, False
    triton = SimpleNamespace(
        jit=lambda function=None, **options: function or (lambda function: function)
    )
    tl = SimpleNamespace(constexpr=lambda value: value)
else:
    HAS_TRITON, INTERPRETED = True, triton.knobs.runtime.interpret

# The interpreter keeps bfloat16 as raw 16-bit integers, with which `tl.dot` and arithmetic are
# silently wrong.
UPCAST = tl.constexpr(INTERPRETED)


@triton.jit
def dot(a, b, c, PRECISION: tl.constexpr):
    """a·b + c in float32; PRECISION, of float32 operands: "tf32", "tf32x3" or "ieee"."""
    if UPCAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, c, input_precision=PRECISION)


@triton.jit
def tanh(x):
    """2σ(2x) − 1, within 1e-7: exact at both ends, without overflow."""
    return 2 * tl.sigmoid(2 * x) - 1


@triton.jit
def store(ptr, at, value, inside):
    """Into a tensor, where there is one."""
    if ptr is not None:
        tl.store(ptr + at, value.to(ptr.dtype.element_ty), mask=inside)


def row_tiles(rows: Tensor) -> tuple[tuple[int], dict]:
    """Grid and tile of a kernel that reads (rows, columns) once, one tile after the other along the
    columns: 512 elements by 4 warps, wide rather than high, so that a thread has few rows to
    address."""
    width = min(128, triton.next_power_of_2(rows.shape[1]))
    tile = {"ROWS": 512 // width, "COLUMNS": width, "num_warps": 4}
    return (triton.cdiv(len(rows), tile["ROWS"]),), tile


def as_rows(tensor: Tensor) -> Tensor:
    """(…, columns) → (rows, columns), the elements of a row beside one another; a copy only where
    that needs one."""
    rows = tensor.reshape(-1, tensor.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def capable(device: torch.device) -> bool:
    """Whether a GPU is one that the kernels are compiled for: NVIDIA's, from sm_80 (bfloat16, 163
    KiB shared)."""
    if torch.version.cuda is None:
        return False
    chip = torch.cuda.get_device_properties(device)
    return chip.major >= 8 and chip.shared_memory_per_block_optin >= 163 * 1024


def launchable(*tensors: Tensor | None) -> bool:
    """Whether a kernel takes these tensors (None: an argument that is not there): float32 or
    bfloat16, strided, not empty, all on one capable GPU. In the interpreter: all on the CPU."""
    given = [tensor for tensor in tensors if tensor is not None]
    device = given[0].device
    return (
        HAS_TRITON
        and all(
            tensor.device == device
            and tensor.dtype in (torch.float32, torch.bfloat16)
            and tensor.layout == torch.strided
            and tensor.numel() > 0
            for tensor in given
        )
        and (INTERPRETED and device.type == "cpu" or device.type == "cuda" and capable(device))
    )


def exact_products() -> bool:
    """Whether the user wants products of float32 matrices exact, not in TF32."""
    matmul = torch.backends.cuda.matmul
    return (
        matmul.fp32_precision in ("none", "ieee")
        if hasattr(matmul, "fp32_precision")
        else not matmul.allow_tf32
    )


def differentiates_once(name: str) -> None:
    """Raises RuntimeError in a backward pass whose gradient is to be differentiated itself, as by
    create_graph=True."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{name} differentiates once; for a gradient of its gradient use {name}_reference"
        )


def without_autocast(device: torch.device):
    """A region in which tensors keep their dtype. Some devices, meta for one, know no autocast."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
