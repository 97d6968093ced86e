"""Muon for the matrices of a model's layers, and AdamW for everything else, as one optimizer."""

from typing import Any

import torch
from torch import nn

from ..modeling_minimind_v import MiniMindVForConditionalGeneration


MOMENTUM = 0.95
NEWTON_SCHULZ = 3.4445, -4.7750, 2.0315


class Muon(torch.optim.Optimizer):
    """Steps along the orthogonalised momentum of matrices (https://kellerjordan.github.io/posts/muon), in float32.

    `torch.optim.Muon(adjust_lr_fn="match_rms_adamw")` takes the same steps in bfloat16. On a processor without bfloat16
    instructions that takes as long as three training steps of a small model, and torch before 2.9 does not have it.

    Args:
        params: matrices (rows, columns), or groups of them. What has more dimensions is one of (rows, all others).
        lr: learning rate.
        weight_decay: share of the weights, times `lr`, that each step takes off.
    """

    def __init__(self, params: list[dict[str, Any]], lr: float, weight_decay: float):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take a step along the gradients."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(weight)
                momentum = state["momentum_buffer"]
                momentum.lerp_(weight.grad, 1 - MOMENTUM)
                update = orthogonalized(weight.grad.lerp(momentum, MOMENTUM).flatten(1))
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                # All entries together are as large as those of a step of AdamW
                weight.sub_(update.reshape(weight.shape), alpha=group["lr"] * 0.2 * max(update.shape) ** 0.5)


def orthogonalized(matrix: torch.Tensor) -> torch.Tensor:
    """The matrix (rows, columns) with all singular values between about 0.7 and 1.2, by five Newton-Schulz iterations."""
    a, b, c = NEWTON_SCHULZ
    wide = matrix.float() if matrix.shape[0] <= matrix.shape[1] else matrix.float().T
    wide = wide / wide.norm().clamp_min(1e-7)
    for _ in range(5):
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide if matrix.shape[0] <= matrix.shape[1] else wide.T


class MuonWithAdamW(torch.optim.Optimizer):
    """`Muon` for the weights of linear layers and convolutions, `torch.optim.AdamW` for all else that learns.

    In a small model from nothing, AdamW learns what most of the gradient is about, such as colours, and the rest much later.
    Muon takes steps of one size in all directions of a matrix (https://kellerjordan.github.io/posts/muon). To it, a convolution
    is a matrix of (channels, channels x height x width). Its steps are scaled to the size of AdamW's, so that a learning rate
    means the same to both.

    Args:
        model: what learns of it is trained.
        lr, encoder_lr: learning rate, and that of the image encoder.
        weight_decay: of all parameters.
        betas, eps: AdamW's.
    """

    def __init__(
        self,
        model: MiniMindVForConditionalGeneration,
        lr: float,
        encoder_lr: float,
        weight_decay: float,
        betas: tuple[float, float],
        eps: float,
    ):
        learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
        super().__init__(learning, {"lr": lr})
        # Of embeddings and heads, a step concerns a few rows alone
        ends = {model.get_input_embeddings().weight, model.get_output_embeddings().weight}
        layers = {module.weight for module in model.modules() if isinstance(module, (nn.Linear, nn.Conv2d))} - ends
        encoder = set(model.model.vision_tower.parameters())

        def groups(parameters: list[nn.Parameter]) -> list[dict[str, Any]]:
            parts = ([p for p in parameters if p not in encoder], lr), ([p for p in parameters if p in encoder], encoder_lr)
            return [{"params": part, "lr": rate} for part, rate in parts if part]

        self._parts: dict[str, torch.optim.Optimizer] = {}
        if matrices := groups([parameter for parameter in learning if parameter in layers]):
            self._parts["muon"] = Muon(matrices, lr, weight_decay)
        if others := groups([parameter for parameter in learning if parameter not in layers]):
            self._parts["adamw"] = torch.optim.AdamW(others, weight_decay=weight_decay, betas=betas, eps=eps)
        self._share_groups()

    def _share_groups(self) -> None:
        """So that a schedule, which writes into the groups, reaches both."""
        self.param_groups = [group for part in self._parts.values() for group in part.param_groups]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take a step along the gradients."""
        for part in self._parts.values():
            part.step()

    def state_dict(self) -> dict[str, Any]:
        """The states of both, by name."""
        return {name: part.state_dict() for name, part in self._parts.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the states of both."""
        for name, part in self._parts.items():
            part.load_state_dict(state_dict[name])
        self._share_groups()
