"""The audit of a conversion: every native tensor is used or ignored for a reason, and nothing that a model needs is missing."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from convert.architecture import Architecture
from convert.key_table import Row
from convert.native_files import ConversionError, NativeWeights


ENCODER_PREFIX = "vision_encoder."
"""Of the encoder inside resume checkpoints."""

_BUFFERS = ("mask", "freqs", "pos_cis")  # freqs_cos, freqs_sin, attention masks
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass
class Audit:
    """What became of each tensor of a native file.

    Args:
        used: native names of the tensors that the model is made of.
        ignored: the others that are known, each with the reason.
        problems: (name, what is wrong, what was expected). Any of them stops the conversion.
        not_finite: (name, how many values of how many are NaN or infinite). Reported, but converted as they are.
        cause: what probably lies behind the problems.
    """

    used: list[str] = field(default_factory=list)
    ignored: dict[str, str] = field(default_factory=dict)
    problems: list[tuple[str, str, str]] = field(default_factory=list)
    not_finite: list[tuple[str, str]] = field(default_factory=list)
    cause: str = ""

    def ignored_by_reason(self) -> dict[str, list[str]]:
        """The ignored tensors, in groups."""
        groups: dict[str, list[str]] = {}
        for name, reason in self.ignored.items():
            groups.setdefault(reason, []).append(name)
        return groups

    def raise_if_spoiled(self, path) -> None:
        """Stop where a tensor is unknown, missing or of another shape.

        Raises:
            ConversionError: there are problems; the message says how many, and the likely cause.
        """
        if not self.problems:
            return
        counts: dict[str, int] = {}
        for _, problem, _ in self.problems:
            kind = problem.split()[0]
            counts[kind] = counts.get(kind, 0) + 1
        summary = ", ".join(f"{count} {kind}" for kind, count in counts.items())
        raise ConversionError(f"{path} does not hold the model above ({summary} tensors). Likely cause: {self.cause}")


def expected_shapes(table: list[Row], parameters: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    """Shapes of the native tensors that make up the parameters of our model, which may be on the meta device."""
    return {
        name: tuple(part.shape)
        for row in table
        for name, part in zip(
            row.native, row.transform.to_native(parameters[row.ours].to("meta"), len(row.native)), strict=True
        )
    }


def audit_tensors(
    weights: NativeWeights, architecture: Architecture, table: list[Row], parameters: Mapping[str, torch.Tensor]
) -> Audit:
    """Account for every tensor of a native file.

    Args:
        weights: the file.
        architecture: what was detected in it.
        table: of the tensors to be converted.
        parameters: of our model, by name; they may be on the meta device.
    """
    audit = Audit()
    expected = expected_shapes(table, parameters)
    for name, tensor in weights.tensors.items():
        if name not in expected:
            reason = _reason_to_ignore(name)
            if reason:
                audit.ignored[name] = reason
            else:
                audit.problems.append((name, f"unknown {_shape(tensor.shape)}", "no such tensor in this architecture"))
        elif tuple(tensor.shape) != expected[name]:
            audit.problems.append((name, f"misshapen {_shape(tensor.shape)}", _shape(expected[name])))
        elif tensor.dtype not in _DTYPES:
            wanted = "float32, float16 or bfloat16"
            audit.problems.append((name, f"misshapen {str(tensor.dtype).removeprefix('torch.')}", wanted))
        else:
            audit.used.append(name)
            finite = torch.isfinite(tensor)
            if not finite.all():
                audit.not_finite.append((name, f"{int((~finite).sum()):,} of {tensor.numel():,} values"))
    audit.problems += [(name, "missing", _shape(shape)) for name, shape in expected.items() if name not in weights.tensors]
    if architecture.config.get_text_config().tie_word_embeddings:
        _check_tied(audit, weights, table)
    if audit.problems:
        audit.cause = _likely_cause(audit, weights, expected, architecture)
    return audit


def _shape(shape) -> str:
    return "(" + ", ".join(map(str, shape)) + ")"


def _reason_to_ignore(name: str) -> str | None:
    if name.startswith(ENCODER_PREFIX):
        return "the frozen encoder: it is the one of --vision-tower"
    if any(part in name for part in _BUFFERS):
        return "a buffer that the model computes itself"
    return None


def _check_tied(audit: Audit, weights: NativeWeights, table: list[Row]) -> None:
    """Native models share the input and output embeddings, and a file holds them twice."""
    by_ours = {
        row.ours.rsplit(".", 2)[-2]: row.native[0]
        for row in table
        if row.ours.endswith(("embed_tokens.weight", "lm_head.weight"))
    }
    embedding, head = by_ours["embed_tokens"], by_ours["lm_head"]
    if {embedding, head} <= set(audit.used) and not same_bits(weights.tensors[embedding], weights.tensors[head]):
        audit.used.remove(head)
        audit.problems.append((head, "different values", f"those of {embedding}, with which it is shared"))


def same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two tensors are equal bit for bit, NaN included."""
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    return torch.equal(first.contiguous().view(torch.uint8), second.contiguous().view(torch.uint8))


def _likely_cause(
    audit: Audit, weights: NativeWeights, expected: dict[str, tuple[int, ...]], architecture: Architecture
) -> str:
    kinds = {problem.split()[0] for _, problem, _ in audit.problems}
    names = {kind: [name for name, problem, _ in audit.problems if problem.startswith(kind)] for kind in kinds}
    if kinds == {"different"}:
        return "the file was edited, or comes from a model that does not share its embeddings"
    if "misshapen" in kinds:
        return _cause_of_shapes(names["misshapen"], weights, expected)
    if kinds >= {"unknown", "missing"}:
        if len(names["unknown"]) == len(names["missing"]):
            return "tensors were renamed: see the unknown names beside the missing ones"
        return "the file mixes two models, or is of a release that is not known here"
    if "unknown" in kinds:
        if any("lora" in name.lower() for name in names["unknown"]):
            return "LoRA weights are in the file: merge them into the full weights first"
        return "the file is of a fork or a later release of MiniMind, whose model has more parts"
    layers = {name.split("layers.")[1].split(".")[0] for name in names["missing"] if "layers." in name}
    if all(name.startswith("vision_proj.") for name in names["missing"]):
        return "the projector was saved in part; every release has weight and bias"
    where = f" (layer {', '.join(sorted(layers, key=int))})" if layers else ""
    return f"the file was saved in part or edited{where}"


def _cause_of_shapes(names: list[str], weights: NativeWeights, expected: dict[str, tuple[int, ...]]) -> str:
    found = {name: tuple(weights.tensors[name].shape) for name in names}
    if any(weights.tensors[name].dtype not in _DTYPES for name in names):
        return "the file is quantised, or holds something else than weights"
    if all(shape == expected[name][::-1] for name, shape in found.items()):
        return "tensors were transposed: PyTorch keeps a linear layer as (out, in)"
    if all(name.startswith("vision_proj.") for name in names):
        width = {expected[name][-1] != shape[-1] for name, shape in found.items() if len(shape) == 2}
        if width == {True}:
            return "another image encoder than the one that this projector was trained with: check --vision-tower"
        return "the projector comes from a model of another size than the language model"
    if all("_norm." in name and "self_attn" in name for name in names):
        return "another head count: check --num-attention-heads"
    return "the file mixes models of different sizes, or was edited"
