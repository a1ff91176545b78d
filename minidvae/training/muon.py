"""Muon, an optimiser for the weight matrices of wide layers (Jordan et al. 2024,
kellerjordan.github.io/posts/muon).

    m ← βm + (1 − β)g,    u = βm + (1 − β)g                    Nesterov momentum
    W ← W − lr·0.2·√max(n, k)·orthogonal(u)                    W is n × k

where orthogonal(u) is near UVᵀ for u = USVᵀ: all directions of the gradient get steps of about the
same length. The factor gives the step the root mean square of one of AdamW (Liu et al.,
arXiv:2502.16982), so that one learning rate serves both.
"""

import torch
from torch import Tensor

MIN_SIDE = 64  # smallest side of a matrix that Muon takes
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # Jordan's coefficients
# Jordan takes 5. With 4, only the directions with the smallest singular values get shorter steps.
ITERATIONS = 4


class Muon(torch.optim.AdamW):
    """Muon for matrices whose sides are both at least MIN_SIDE, except in parameter groups with
    `muon=False`, and AdamW for all other parameters, with one learning rate and one decoupled
    weight decay.

    It multiplies in the precision of the parameters. `torch.optim.Muon` multiplies in bfloat16,
    which takes 16 to 27 times as long on a CPU without instructions for it.
    """

    def __init__(self, params, momentum: float = 0.95, **adamw):
        super().__init__(params, **adamw)
        self.momentum = momentum

    @torch.no_grad()
    def step(self):
        # Matrices of one shape are multiplied as one batch.
        matrices = {}
        for group in self.param_groups:
            for parameter in group["params"]:
                is_wide = parameter.ndim == 2 and min(parameter.shape) >= MIN_SIDE
                if is_wide and group.get("muon", True) and parameter.grad is not None:
                    matrices.setdefault(parameter.shape, []).append((parameter, group))
        for members in matrices.values():
            directions = [self.direction(parameter) for parameter, _ in members]
            updates = orthogonal(torch.stack(directions))
            for (parameter, group), update in zip(members, updates, strict=True):
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update, alpha=-group["lr"] * 0.2 * max(parameter.shape) ** 0.5)
                parameter.grad = None  # AdamW skips parameters without a gradient.
        super().step()

    def direction(self, parameter: Tensor) -> Tensor:
        """Return the Nesterov momentum u of a gradient, in its shape."""
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())  # AdamW expects one in every state that it loads.
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].lerp_(parameter.grad, 1 - self.momentum)
        return parameter.grad.lerp(state["momentum"], self.momentum)


def orthogonal(matrices: Tensor) -> Tensor:
    """Return matrices USVᵀ (count, n, k) with other singular values, by Newton-Schulz iterations:
    those above 1/200 of the norm of the matrix become 0.66 to 1.14, smaller ones are multiplied by
    up to 140."""
    a, b, c = NEWTON_SCHULZ
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
