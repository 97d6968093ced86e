"""Decoder weights in eight bits, for answers on a CPU, whose speed is that of reading the weights.

Each row of a weight matrix is stored as int8 with one scale (symmetric, round to nearest): a quarter of float32's bytes. The
products run in bfloat16, which PyTorch's own kernel accumulates in float32.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel


MAX_KERNEL_ROWS = 16  # the kernel reads the weights well, but multiplies slowly: above this, float products win


class Int8Linear(nn.Module):
    """A linear layer without bias over int8 weights.

    Args:
        linear: the layer whose weights are rounded.
    """

    weight: torch.Tensor  # (out, in), int8
    scale: torch.Tensor  # (out,), bfloat16

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach().float()
        # Rounded before it divides, so that weight and scale belong together
        scale = (weight.abs().amax(dim=1) / 127).clamp(min=1e-12).bfloat16()
        self.register_buffer("weight", (weight / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, self.in_features)
        if rows.shape[0] > MAX_KERNEL_ROWS or x.device.type != "cpu":
            return F.linear(x, self.weight.to(x.dtype)) * self.scale.to(x.dtype)
        output = torch._weight_int8pack_mm(rows.bfloat16(), self.weight, self.scale)
        return output.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def _save_to_state_dict(self, *args, **kwargs):
        raise RuntimeError("int8 weights are made when a model is loaded, and not saved: save the model before quantize_int8.")

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


def quantize_int8(model: PreTrainedModel) -> PreTrainedModel:
    """Round the decoder's linear layers and its head to int8, in place, for inference.

    The image encoder and the projector, which compute more than they read, stay as they are, and so do the embeddings and
    stacked experts. The result generates but is neither trained nor saved: keep the folder it came from.

    Args:
        model: `MiniMindVForConditionalGeneration` or `MiniMindForCausalLM`, in evaluation mode.

    Returns:
        The same model.
    """
    for parent in [*model.get_decoder().modules(), model]:
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and child.bias is None:
                setattr(parent, name, Int8Linear(child))
    return model.requires_grad_(False)
