"""The audit of a conversion: every native tensor is used or ignored for a reason, and nothing that a model needs is missing."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from .key_table import Row, to_native
from .report import ConversionError, shorten


ENCODER_PREFIX = "vision_encoder."
"""Of the encoder inside resume checkpoints."""

_IGNORED = {
    "the frozen encoder: it is the one of --vision-tower": lambda name: name.startswith(ENCODER_PREFIX),
    "a buffer that the model computes itself": lambda name: name.endswith((".mask", "freqs_cos", "freqs_sin", "pos_cis")),
}
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass
class Audit:
    """What became of each tensor of a native file, by native name."""

    used: list[str] = field(default_factory=list)
    ignored: dict[str, list[str]] = field(default_factory=dict)
    """By the reason."""
    problems: list[tuple[str, str, str]] = field(default_factory=list)
    """Name, what was found, what was expected. Any of them stops the conversion."""

    def rows(self) -> list[tuple[str, int, str]]:
        """What became of how many tensors and why, as a table."""
        ignored = [("ignored", len(names), f"{reason}: {shorten(names)}") for reason, names in self.ignored.items()]
        return [("used", len(self.used), ""), *ignored]

    def raise_if_spoiled(self, path: object) -> None:
        """Raise ConversionError where there are problems, with the first ones, how many more, and what to do."""
        if not self.problems:
            return
        first = "; ".join(f"{name}: {found}, expected {expected}" for name, found, expected in self.problems[:2])
        more = f"; and {len(self.problems) - 2} more" if len(self.problems) > 2 else ""
        advice = ""
        if any("lora" in name.lower() for name, *_ in self.problems):
            advice = ". Merge the LoRA weights into the full weights first"
        elif re.match(r"vision_proj\.\S+: \(\d+, (\d+)\), expected \(\d+, (?!\1\))", first):
            advice = ". Check --vision-tower: the projector was trained with an encoder of another width"
        raise ConversionError(f"{path} does not hold the model above: {first}{more}{advice}")


def audit_tensors(
    tensors: Mapping[str, torch.Tensor], table: list[Row], parameters: Mapping[str, torch.Tensor], tied: bool
) -> Audit:
    """Account for every tensor of a native file.

    Args:
        tensors, table: of the file, and of what is to be converted.
        parameters: of our model, by name, for their shapes.
        tied: whether the model shares its input and output embeddings, of which native files hold both.
    """
    audit = Audit()
    expected = {name: tuple(tensor.shape) for name, tensor in to_native(parameters, table).items()}
    for name, tensor in tensors.items():
        shape, reason = tuple(tensor.shape), next((reason for reason, fits in _IGNORED.items() if fits(name)), None)
        if name not in expected and reason:
            audit.ignored.setdefault(reason, []).append(name)
        elif shape != expected.get(name):
            audit.problems.append((name, str(shape), str(expected.get(name, "no such tensor"))))
        elif tensor.dtype not in _DTYPES:
            audit.problems.append((name, str(tensor.dtype).removeprefix("torch."), "float32, float16 or bfloat16"))
        elif count := tensor.numel() - int(tensor.isfinite().sum()):
            audit.problems.append((name, f"{count:,} of {tensor.numel():,} values NaN or infinite", "finite ones"))
        else:
            audit.used.append(name)
    audit.problems += [(name, "missing", str(shape)) for name, shape in expected.items() if name not in tensors]
    embedding, head = (next(row.native[0] for row in table if name in row.ours) for name in ("embed_tokens", "lm_head"))
    if tied and {embedding, head} <= set(audit.used) and not torch.equal(tensors[embedding], tensors[head]):
        audit.problems.append((head, "other values", f"those of {embedding}, with which it is shared"))
    return audit
