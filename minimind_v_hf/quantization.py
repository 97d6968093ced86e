"""Decoder weights in eight bits, for answers on a CPU, whose speed is that of reading the weights.

Each row of a weight matrix is stored as int8 with one scale (symmetric, round to nearest): a quarter of float32's bytes. The
products run in bfloat16, which PyTorch's own kernel accumulates in float32.
"""

import functools

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from .modeling_minimind import MiniMindExperts


logger = logging.get_logger(__name__)

KERNEL_STEP = 64  # input features that the kernel may read at a time: it reads past the end of a matrix that is not so wide
MAX_KERNEL_ROWS = 16  # the kernel reads the weights well, but multiplies slowly: above this, float products win


def has_fast_bf16() -> bool:
    """Whether this machine multiplies bfloat16 matrices in hardware."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    abilities = torch.cpu.get_capabilities()
    return bool(abilities.get("amx_bf16") or abilities.get("avx512_bf16"))


@functools.cache
def kernel_is_right() -> bool:
    """Whether PyTorch's int8 kernel, a private function, is there and multiplies rightly on this machine; warns if not."""
    weight = (37 * torch.arange(48 * KERNEL_STEP) % 255 - 127).view(48, KERNEL_STEP).to(torch.int8)
    rows = (torch.arange(3 * KERNEL_STEP) % 17 - 8).view(3, KERNEL_STEP).bfloat16()
    expected = (rows.float() @ weight.float().T).bfloat16()
    try:
        right = torch.allclose(torch._weight_int8pack_mm(rows, weight, torch.ones(48).bfloat16()), expected, rtol=2**-7)
    except (AttributeError, RuntimeError, TypeError):
        right = False
    if not right:
        logger.warning(
            "PyTorch's int8 kernel is missing or wrong on this machine, so int8 weights save memory, but no time: choose "
            "float32 for speed."
        )
    return right


class Int8Linear(nn.Module):
    """A linear layer without bias over int8 weights.

    Args:
        weight: what is rounded, (out, in).
    """

    padded_weight: torch.Tensor  # (out, in rounded up to a multiple of KERNEL_STEP), int8, with zeros beyond `in`
    scale: torch.Tensor  # (out,), bfloat16

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.uses_kernel = kernel_is_right()
        weight = weight.detach().float()
        # Rounded before it divides, so that weight and scale belong together
        scale = (weight.abs().amax(dim=1) / 127).clamp(min=1e-12).bfloat16()
        rounded = (weight / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8)
        self.register_buffer("padded_weight", F.pad(rounded, (0, -self.in_features % KERNEL_STEP)))
        self.register_buffer("scale", scale)

    @property
    def weight(self) -> torch.Tensor:
        """The rounded weight, (out, in)."""
        return self.padded_weight[:, : self.in_features]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, self.in_features)
        if rows.shape[0] > MAX_KERNEL_ROWS or x.device.type != "cpu" or not self.uses_kernel:
            return F.linear(x, self.weight.to(x.dtype)) * self.scale.to(x.dtype)
        rows = F.pad(rows.bfloat16(), (0, -self.in_features % KERNEL_STEP))
        output = torch._weight_int8pack_mm(rows, self.padded_weight, self.scale)
        return output.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def _save_to_state_dict(self, *args, **kwargs):
        raise RuntimeError("int8 weights are made when a model is loaded, and not saved: save the model before quantize_int8.")

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


class Int8Experts(nn.Module):
    """The experts of a mixture, over int8 weights.

    Args:
        experts: a `MiniMindExperts`.
    """

    def __init__(self, experts: MiniMindExperts):
        super().__init__()
        self.gate_up_proj = nn.ModuleList(Int8Linear(weight) for weight in experts.gate_up_proj)
        self.down_proj = nn.ModuleList(Int8Linear(weight) for weight in experts.down_proj)
        self.act_fn = experts.act_fn

    def forward(self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        """As `MiniMindExperts`: hidden states (B*T, D), the experts of each token and their weights (B*T, A)."""
        shares = hidden_states.new_zeros(len(hidden_states), len(self.down_proj))  # (B*T, E)
        shares.scatter_(1, top_k_index, top_k_weights.to(shares.dtype))
        output = torch.zeros_like(hidden_states)
        for expert, (gate_up_proj, down_proj) in enumerate(zip(self.gate_up_proj, self.down_proj, strict=True)):
            # A compiled graph cannot depend on the choice: there every expert reads every token
            tokens = slice(None) if torch.compiler.is_compiling() else shares[:, expert].nonzero().squeeze(1)
            chosen = hidden_states[tokens]
            if len(chosen):
                gate, up = gate_up_proj(chosen).chunk(2, dim=-1)
                output[tokens] += down_proj(self.act_fn(gate) * up) * shares[tokens, expert, None]
        return output


def quantize_int8(model: PreTrainedModel) -> PreTrainedModel:
    """Round the decoder's linear layers, its experts and its head to int8, in place, for inference.

    The image encoder and the projector, which compute more than they read, stay as they are, and so do the embeddings. The
    result generates but is neither trained nor saved: keep the folder it came from.

    Args:
        model: `MiniMindVForConditionalGeneration` or `MiniMindForCausalLM`, in evaluation mode.

    Returns:
        The same model.
    """
    for parent in [*model.get_decoder().modules(), model]:
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and child.bias is None:
                setattr(parent, name, Int8Linear(child.weight))
            elif type(child).__name__ == "MiniMindExperts":  # by name: a folder's own code has another class
                setattr(parent, name, Int8Experts(child))
    return model.requires_grad_(False)
