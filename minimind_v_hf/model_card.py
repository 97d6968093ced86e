"""The README.md of a model folder, trained or converted: what it is, how to use it, and where it comes from."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from huggingface_hub import ModelCardData
from transformers import PreTrainedModel


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


def parameter_counts(model: PreTrainedModel) -> dict[str, int]:
    """Parameters by part, and in all; a shared tensor counts once.

    Of a mixture of experts, also those of the language model that one token passes through.
    """
    counts = {"language model": 0, "projector": 0, "image encoder": 0}
    experts = 0
    for name, parameter in model.named_parameters():
        part = "image encoder" if ".vision_tower." in name else "projector" if ".multi_modal_projector." in name else None
        counts[part or "language model"] += parameter.numel()
        experts += parameter.numel() if ".mlp.experts." in name else 0
    counts = {part: count for part, count in counts.items() if count}
    counts["in all"] = sum(counts.values())
    text = model.config.get_text_config()
    if experts:
        idle = experts * (text.num_experts - text.num_experts_per_tok) // text.num_experts
        counts["active per token, of the language model"] = counts["language model"] - idle
    return counts


def table(rows: Iterable[Sequence[object]], header: Sequence[str] = ("", "")) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def model_card(
    name: str, model: PreTrainedModel, summary: str, sections: Mapping[str, str], use: str | None = None, **metadata: Any
) -> str:
    """The text of README.md.

    Args:
        name: Hub id or folder of the model, for the snippet.
        model: a MiniMind-V or a MiniMind.
        summary: what stands below the title.
        sections: heading and Markdown of what follows the snippet and the sizes.
        use: Markdown in place of the snippet, for files that others than transformers read.
        metadata: fields of `ModelCardData` besides those that the model tells, say `license`.
    """
    has_vision = hasattr(model.config, "vision_config")
    is_moe = bool(getattr(model.config.get_text_config(), "num_experts", 0))
    data = ModelCardData(
        pipeline_tag="image-text-to-text" if has_vision else "text-generation",
        tags=["minimind-v" if has_vision else "minimind", *(["moe"] if is_moe else [])],
        **{"library_name": "transformers", **metadata},
    )
    snippet = (_VLM_SNIPPET if has_vision else _TEXT_SNIPPET).format(name=name)
    parts = [f"---\n{data.to_yaml()}\n---", f"# {name.rstrip('/').rsplit('/', 1)[-1]}", summary]
    parts += ["## Use", use or f"```python\n{snippet}```", "## Size"]
    parts += [table([(part, f"{count:,}") for part, count in parameter_counts(model).items()], ("part", "parameters"))]
    for heading, content in sections.items():
        parts += [f"## {heading}", content]
    return "\n\n".join(parts) + "\n"
