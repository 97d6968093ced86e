"""What learns and what is frozen."""

from torch import nn

from ..modeling_minimind_v import MiniMindVForConditionalGeneration
from ..modeling_minimind_v import is_frozen as is_frozen


TRAINABLE = ("projector", "projector+last", "projector+first_last", "llm", "all")
"""What can be trained: the projector alone, the projector with the last or the first and last decoder layer, the projector
with the whole language model, or everything."""


def freeze(model: MiniMindVForConditionalGeneration, trainable: str) -> None:
    """Let only a part of the model learn.

    Args:
        model: every `requires_grad` of it is set.
        trainable: one of `TRAINABLE`.

    Raises:
        ValueError: another word, or a decoder whose parts have other names than Llama's.
    """
    if trainable not in TRAINABLE:
        raise ValueError(f"trainable={trainable!r}: expected one of {', '.join(TRAINABLE)}.")
    inner = model.model
    if not (hasattr(inner.language_model, "layers") and hasattr(inner.language_model, "norm")):
        raise ValueError(
            f"{type(inner.language_model).__name__} has no `layers` and `norm`: training knows decoders with Llama's names, "
            "such as Llama, Qwen3, Mistral and MiniMind."
        )
    layers = inner.language_model.layers
    learning: dict[str, list[nn.Module]] = {
        "projector": [],
        "projector+last": [layers[-1]],
        "projector+first_last": [layers[0], layers[-1]],
        "llm": [inner.language_model, model.lm_head],
        "all": [model],
    }
    model.requires_grad_(False)
    for module in (inner.multi_modal_projector, *learning[trainable]):
        module.requires_grad_(True)


def parameter_table(model: MiniMindVForConditionalGeneration) -> str:
    """Trainable and frozen parameters by part of the model, as text for a terminal."""
    inner = model.model
    layers = inner.language_model.layers
    parts: list[tuple[str, list[nn.Module]]] = [
        ("vision encoder", [inner.vision_tower]),
        ("projector", [inner.multi_modal_projector]),
        ("embeddings", [inner.get_input_embeddings()]),
        ("first decoder layer", [layers[0]]),
        ("other decoder layers", list(layers[1:-1])),
        ("last decoder layer", [layers[-1]] if len(layers) > 1 else []),
        ("final norm and head", [inner.language_model.norm, model.lm_head]),
    ]
    lines = [f"{'part':<22}{'trainable':>14}{'frozen':>14}"]
    seen: set[int] = set()
    totals = [0, 0]
    for name, modules in parts:
        counts = [0, 0]
        for parameter in (parameter for module in modules for parameter in module.parameters()):
            if id(parameter) not in seen:  # a tied head is counted once, with the embeddings
                seen.add(id(parameter))
                counts[not parameter.requires_grad] += parameter.numel()
        totals = [total + count for total, count in zip(totals, counts, strict=True)]
        lines.append(f"{name:<22}{counts[0]:>14,}{counts[1]:>14,}")
    return "\n".join([*lines, f"{'all':<22}{totals[0]:>14,}{totals[1]:>14,}"])
