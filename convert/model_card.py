"""The README.md of a converted folder: what it is, how to use it, and what the audit found."""

from pathlib import Path

from huggingface_hub import ModelCardData
from transformers import PreTrainedModel

from convert.architecture import RELEASES, Architecture
from convert.audit import Audit


_VLM_SNIPPET = """\
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

name = "{name}"
processor = AutoProcessor.from_pretrained(name, trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained(name, trust_remote_code=True)

image = Image.open("photo.jpg")
question = [{{"type": "image", "image": image}}, {{"type": "text", "text": "\\n描述一下这个图像的内容。"}}]
inputs = processor.apply_chat_template(
    [{{"role": "user", "content": question}}],
    add_generation_prompt=True,
    tokenize=True,
    return_dict=True,
    return_tensors="pt",
)
output = model.generate(**inputs, max_new_tokens=128)
print(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
"""

_TEXT_SNIPPET = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

name = "{name}"
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True)

inputs = tokenizer.apply_chat_template(
    [{{"role": "user", "content": "你好"}}], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)
output = model.generate(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=128)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
"""

FRESH_PROJECTOR = (
    "The weights were a language model's alone, so the projector is freshly initialised: "
    "this model cannot see before it is trained on pictures."
)


def parameter_counts(model: PreTrainedModel) -> dict[str, int]:
    """Parameters by part, in the order of a card's table; a shared tensor counts once."""
    counts = {"language model": 0, "projector": 0, "image encoder": 0}
    for name, parameter in model.named_parameters():
        part = "image encoder" if ".vision_tower." in name else "projector" if ".multi_modal_projector." in name else None
        counts[part or "language model"] += parameter.numel()
    return {part: count for part, count in counts.items() if count}


def active_parameters(model: PreTrainedModel) -> int | None:
    """Parameters of the language model that one token passes through; None for a dense model."""
    text = model.config.get_text_config()
    if not text.num_experts:
        return None
    experts = sum(parameter.numel() for name, parameter in model.named_parameters() if ".mlp.experts." in name)
    idle = experts * (text.num_experts - text.num_experts_per_tok) // text.num_experts
    return parameter_counts(model)["language model"] - idle


def model_card(name: str, source: Path, model: PreTrainedModel, architecture: Architecture, audit: Audit, dtype: str) -> str:
    """The text of README.md.

    Args:
        name: Hub id or folder of the model, for the snippet.
        source: the native file.
        model: as converted.
        architecture: as detected.
        audit: of the native file.
        dtype: of the language model's weights.
    """
    has_eyes = hasattr(model.config, "vision_config")
    text = model.config.get_text_config()
    metadata = ModelCardData(
        language=["zh", "en"],
        license="apache-2.0",
        library_name="transformers",
        pipeline_tag="image-text-to-text" if has_eyes else "text-generation",
        tags=["minimind-v" if has_eyes else "minimind", *(["moe"] if text.num_experts else [])],
    )
    lines = ["---", metadata.to_yaml(), "---", "", f"# {name.rsplit('/', 1)[-1]}", ""]
    kind = "vision-language model" if has_eyes else "language model"
    origin = "[MiniMind-V](https://github.com/jingyaogong/minimind-v)" if has_eyes else "MiniMind"
    lines += [f"A tiny {kind}, converted from the native {origin} weights `{source.name}` for transformers.", ""]
    if has_eyes and not architecture.has_projector:
        lines += [f"**{FRESH_PROJECTOR}**", ""]
    if audit.not_finite:
        lines += [f"**{not_finite_warning(audit)}**", ""]

    lines += ["## Use", "", "```python", (_VLM_SNIPPET if has_eyes else _TEXT_SNIPPET).format(name=name).rstrip(), "```", ""]
    lines += ["## Architecture", "", "| | | known from |", "|---|---|---|"]
    lines += [f"| {what} | {value} | {where} |" for what, value, where in architecture.rows]
    lines += ["", "| part | parameters |", "|---|---|"]
    counts = parameter_counts(model)
    lines += [f"| {part} | {count:,} |" for part, count in counts.items()]
    lines += [f"| in all | {sum(counts.values()):,} |"]
    active = active_parameters(model)
    if active is not None:
        lines += [f"| active per token, of the language model | {active:,} |"]

    lines += ["", "## Conversion", "", f"From {RELEASES[architecture.generation]} weights, language model in {dtype}."]
    lines += [f"Of the {len(audit.used) + len(audit.ignored)} tensors in the file, {len(audit.used)} are used"]
    lines[-1] += f" and {len(audit.ignored)} ignored:" if audit.ignored else "; none is unknown, missing or misshapen."
    if audit.ignored:
        lines += [""] + [f"* {len(names)}: {reason}" for reason, names in audit.ignored_by_reason().items()]
    lines += ["", "After writing, the folder was loaded in a fresh process; its logits were those of the converted model."]
    return "\n".join(lines) + "\n"


def not_finite_warning(audit: Audit) -> str:
    """What to say about NaN and infinite weights."""
    worst = ", ".join(f"{name} ({count})" for name, count in audit.not_finite[:3])
    more = f" and {len(audit.not_finite) - 3} more" if len(audit.not_finite) > 3 else ""
    return f"NaN or infinite weights in {worst}{more}: they were converted as they are, and this model will not work."
