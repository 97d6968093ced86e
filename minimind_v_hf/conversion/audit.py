"""The audit of a conversion: every native tensor is used or ignored for a reason, and nothing that a model needs is missing."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from .key_table import Row
from .native_files import ConversionError, NativeWeights
from .report import shorten


ENCODER_PREFIX = "vision_encoder."
"""Of the encoder inside resume checkpoints."""

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass
class Audit:
    """What became of each tensor of a native file.

    Args:
        used: native names of the tensors that the model is made of.
        ignored: the others that are known, by the reason.
        problems: (name, what was found, what was expected). Any of them stops the conversion.
        not_finite: (name, how many values of how many are NaN or infinite). Reported, but converted as they are.
    """

    used: list[str] = field(default_factory=list)
    ignored: dict[str, list[str]] = field(default_factory=dict)
    problems: list[tuple[str, str, str]] = field(default_factory=list)
    not_finite: list[tuple[str, str]] = field(default_factory=list)

    def raise_if_spoiled(self, path) -> None:
        """Stop where a tensor is unknown, missing or of another kind.

        Raises:
            ConversionError: there are problems; the message says how many, the first ones, and what to do.
        """
        if not self.problems:
            return
        first = "; ".join(f"{name}: {found}, expected {expected}" for name, found, expected in self.problems[:2])
        more = f"; and {len(self.problems) - 2} more" if len(self.problems) > 2 else ""
        raise ConversionError(f"{path} does not hold the model above: {first}{more}{self._advice()}")

    def _advice(self) -> str:
        name, found, expected = self.problems[0]
        if "lora" in " ".join(name for name, *_ in self.problems).lower():
            return ". Merge the LoRA weights into the full weights first"
        if name.startswith("vision_proj.") and found.split(", ")[-1] != expected.split(", ")[-1]:
            return ". Check --vision-tower: the projector was trained with an encoder of another width"
        if all("_norm." in name and "self_attn" in name for name, *_ in self.problems):
            return ". Check --num-attention-heads"
        return ""

    @property
    def not_finite_warning(self) -> str:
        """What to tell of NaN and infinite weights; empty where there are none."""
        if not self.not_finite:
            return ""
        where = shorten([f"{name} ({count})" for name, count in self.not_finite])
        return f"NaN or infinite weights in {where}: they were converted as they are, and this model will not work."


def audit_tensors(weights: NativeWeights, table: list[Row], parameters: Mapping[str, torch.Tensor], tied: bool) -> Audit:
    """Account for every tensor of a native file.

    Args:
        weights: the file.
        table: of the tensors to be converted.
        parameters: of our model, by name; they may be on the meta device.
        tied: whether the model shares its input and output embeddings, of which native files hold both.
    """
    audit = Audit()
    expected = native_shapes(table, parameters)
    for name, tensor in weights.tensors.items():
        reason = _reason_to_ignore(name)
        dtype = str(tensor.dtype).removeprefix("torch.")
        if name in expected and tuple(tensor.shape) != expected[name]:
            audit.problems.append((name, str(tuple(tensor.shape)), str(expected[name])))
        elif name in expected and tensor.dtype not in FLOAT_DTYPES:
            audit.problems.append((name, dtype, "float32, float16 or bfloat16"))
        elif name in expected:
            audit.used.append(name)
            count = tensor.numel() - int(torch.isfinite(tensor).sum())
            if count:
                audit.not_finite.append((name, f"{count:,} of {tensor.numel():,} values"))
        elif reason:
            audit.ignored.setdefault(reason, []).append(name)
        else:
            audit.problems.append((name, str(tuple(tensor.shape)), "no such tensor"))
    audit.problems += [(name, "missing", str(shape)) for name, shape in expected.items() if name not in weights.tensors]
    if tied:
        native = {row.ours.rsplit(".", 2)[-2]: row.native[0] for row in table}
        embedding, head = native["embed_tokens"], native["lm_head"]
        if {embedding, head} <= set(audit.used) and not same_bits(weights.tensors[embedding], weights.tensors[head]):
            audit.problems.append((head, "other values", f"those of {embedding}, with which it is shared"))
    return audit


def native_shapes(table: list[Row], parameters: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    """Shapes of the native tensors that make up our parameters, which may be on the meta device."""
    return {
        name: tuple(part.shape)
        for row in table
        for name, part in zip(
            row.native, row.transform.to_native(parameters[row.ours].to("meta"), len(row.native)), strict=True
        )
    }


def _reason_to_ignore(name: str) -> str:
    if name.startswith(ENCODER_PREFIX):
        return "the frozen encoder: it is the one of --vision-tower"
    if name.endswith((".mask", "freqs_cos", "freqs_sin", "pos_cis")):
        return "a buffer that the model computes itself"
    return ""


def same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two tensors are equal bit for bit, NaN included."""
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    return torch.equal(first.contiguous().view(torch.uint8), second.contiguous().view(torch.uint8))
