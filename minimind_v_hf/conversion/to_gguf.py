"""A model folder to GGUF files for llama.cpp and what is built on it: the decoder and, of an encoder, the mmproj."""

import json
import re
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..model_card import model_card, table
from ..preparation import has_independent_turns
from ..processing_minimind_v import MiniMindVProcessor
from . import llama_cpp
from .folders import check_output, new_folder, read_model_folder, read_processor
from .report import ConversionError, explained, print_table, warn


DTYPES = ("f32", "f16", "q8_0", "q4_0")
CLASS_TOKENS = ("last", "first")
TOLERANCE = 1e-3
"""Of log-probabilities of text, between float32 here and in llama.cpp."""
IMAGE_TOLERANCE = 0.05
"""The same after an image: llama.cpp's GELU is a table in half precision."""
GOOD = 0.9
"""The share of its tokens that a precision should have in common with the model."""

_CLASS_TOKEN = {
    "last": "The mmproj is for llama.cpp as it is (its issue 25814): answers about images are near the model's, not equal. It "
    "puts CLIP's class token after the patches, but counts positions, and what it hands to the decoder, as if it stood before "
    "them. The positions in this file are moved to fit, so the encoder is exact; the decoder gets the patches from the second "
    "on, and the class token as the last. A build with the fix needs an mmproj made with `--class-token first`.",
    "first": "The mmproj is for a build of llama.cpp that puts CLIP's class token before the patches (the fix of its issue "
    "25814), where it is exact. Other builds compute wrong features from it: they need one made with `--class-token last`.",
}
_SQUARE = (
    "llama.cpp pads an image to a square with grey, where transformers cuts it (CLIP) or squeezes it (SigLIP): cut an image to "
    "the square that matters first."
)
_PLAIN = "What looks like a control token in a message, `<|im_start|>` say, is one to llama.cpp; in transformers it is text."

_APART = (
    "This model was trained to see an image and one question, and its own template leaves the turns before out. llama.cpp's "
    "has them: ask each question in a new conversation."
)

_CHAT_TEMPLATE = """\
{%- if default_system and messages[0].role != "system" -%}
    {{- "<|im_start|>system\\n" ~ default_system ~ "<|im_end|>\\n" -}}
{%- endif -%}
{%- for message in messages -%}
    {{- "<|im_start|>" ~ message.role ~ "\\n" -}}
    {%- if thinking and message.role == "assistant" and "</think>" not in message.content -%}
        {{- "<think>\\n" ~ (message.reasoning_content or "") ~ "\\n</think>\\n\\n" -}}
    {%- endif -%}
    {{- message.content ~ "<|im_end|>\\n" -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- "<|im_start|>assistant\\n" ~ ("<think>\\n\\n</think>\\n\\n" if thinking else "") -}}
{%- endif -%}
"""
_NO_THOUGHTS = "<think>\n\n</think>\n\n"


class Chat(NamedTuple):
    """What MiniMind's chat templates differ in."""

    default_system: str
    """The system message of a conversation that has none; "" for none."""
    thinking: bool
    """Whether an answer begins with a block of thoughts, left empty by a prompt."""

    def template(self) -> str:
        """In Jinja: ChatML without the marks of our processor, which llama.cpp would not take out again."""
        settings = {"default_system": self.default_system, "thinking": self.thinking}
        return "".join(f"{{%- set {name} = {json.dumps(value)} -%}}\n" for name, value in settings.items()) + _CHAT_TEMPLATE

    def ollama(self) -> str:
        """Template and system message, as a Modelfile has them."""
        past = '{{ if eq .Role "assistant" }}' + _NO_THOUGHTS + "{{ end }}" if self.thinking else ""
        lines = "{{- range .Messages }}<|im_start|>{{ .Role }}\n" + past + "{{ .Content }}<|im_end|>\n{{ end }}"
        lines += "<|im_start|>assistant\n" + (_NO_THOUGHTS if self.thinking else "")
        system = f'\nSYSTEM """{self.default_system}"""' if self.default_system else ""
        return f'TEMPLATE """{lines}"""{system}'


def find_chat(tokenizer: PreTrainedTokenizerBase, template: str | None) -> Chat:
    """What a template is made of, found by rendering it. Raises ConversionError where it is none of MiniMind's."""
    roles = (["user", "assistant", "user"], ["system", "user"])
    conversations = [[{"role": role, "content": f"{number}!"} for number, role in enumerate(row)] for row in roles]

    def render(template: str | None) -> list[str]:
        options: dict[str, Any] = {"chat_template": template, "tokenize": False, "add_generation_prompt": True}
        return [str(tokenizer.apply_chat_template(messages, **options)) for messages in conversations]

    with explained("its chat template cannot be rendered"):
        rendered = render(template)
    system = re.match(r"<\|im_start\|>system\n(.*?)<\|im_end\|>\n", rendered[0], re.DOTALL)
    chat = Chat(system[1] if system else "", rendered[0].endswith(_NO_THOUGHTS))
    if render(chat.template()) != rendered:
        raise ConversionError("its chat template is none of MiniMind's, which are ChatML with or without a block of thoughts")
    return chat


class Source(NamedTuple):
    """A model folder, read and checked."""

    name: str
    model: PreTrainedModel
    """In float32."""
    tokenizer: PreTrainedTokenizerBase
    processor: MiniMindVProcessor | None
    chat: Chat
    generation: GenerationConfig


def convert(
    model: str | Path,
    output: str | Path,
    *,
    dtypes: Sequence[str] = ("f16",),
    class_token: str = "last",
    overwrite: bool = False,
) -> None:
    """Write a decoder for each dtype, the mmproj, a Modelfile for Ollama and a card; with xllamacpp, compare the answers.

    Args:
        model: folder of a MiniMind-V or MiniMind model of this package.
        output: the folder to write.
        dtypes: one or more of `DTYPES`. The mmproj of a float32 decoder is in float32, that of all others in float16.
        class_token: "last" or "first", where llama.cpp puts CLIP's class token: see `_CLASS_TOKEN`.
        overwrite: replace a folder of a model that is there already.

    Raises:
        ConversionError: llama.cpp has no graph for this model or answers otherwise, the folder is damaged, or the package
            gguf is missing. Nothing is written then.
    """
    folder, output = Path(model), Path(output)
    check_output(output, overwrite, [folder])
    source = read(folder)
    has_class_token = source.processor is not None and source.model.config.vision_config.model_type == "clip_vision_model"
    notes = [_CLASS_TOKEN[class_token]] if has_class_token else []
    notes += [_SQUARE, _PLAIN] if source.processor else [_PLAIN]
    if source.processor and has_independent_turns(source.processor.chat_template):
        notes.append(_APART)
    answers, bad = [], []
    with new_folder(output) as staging:
        files = {dtype: write(source, staging, dtype, class_token) for dtype in dict.fromkeys(dtypes)}
        if llama_cpp.is_installed():
            text_questions = llama_cpp.ask_about_text(source.model, source.tokenizer, source.chat.template())
            image_questions = llama_cpp.ask_about_images(source.model, source.processor) if source.processor else None
            questions = (text_questions, image_questions)
            with tempfile.TemporaryDirectory() as work:
                exact = write(source, Path(work), "f32", class_token)
                check_float32(llama_cpp.compare(*questions, *exact), has_class_token)
            for dtype, paths in files.items():
                agreements = llama_cpp.compare(*questions, *paths)
                answers.append((dtype, *agreements))
                bad += [dtype] if agreements[0].share < GOOD else []
        sizes = [(path.name, f"{path.stat().st_size / 1e6:.1f} MB") for path in sorted(staging.glob("*.gguf"))]
        notes += [
            f"{dtype} is too coarse for this model: fewer than {GOOD:.0%} of its tokens are the model's." for dtype in bad
        ]
        (staging / "Modelfile").write_text(modelfile(source, *next(iter(files.values()))), encoding="utf-8")
        (staging / "README.md").write_text(card(source, next(iter(files.values())), sizes, answers, notes), encoding="utf-8")
    print_table(f"{folder} for llama.cpp", sizes)
    if answers:
        print_table("The next token, in transformers and in llama.cpp: after text, after images", answers)
    print(f"\nWritten to {output}", flush=True)
    if not answers:
        warn('the files are not compared with the model, since xllamacpp is not installed: pip install -e ".[gguf]"')
    elif has_class_token:
        warn("only after text must llama.cpp compute what the model does; after images it may differ, for this reason:")
    for note in notes:
        warn(note)


def read(folder: Path) -> Source:
    """Read a model folder. Raises ConversionError where it is damaged, or llama.cpp cannot hold it."""
    gguf_files = writers()
    model = read_model_folder(folder)
    found, generation = read_processor(folder, model.config)
    processor = found if isinstance(found, MiniMindVProcessor) else None
    tokenizer = processor.tokenizer if processor else found
    gguf_files.check(model.config, tokenizer, processor and processor.image_processor)
    chat = find_chat(tokenizer, (processor or tokenizer).chat_template)
    return Source(folder.resolve().name, model.float().eval(), tokenizer, processor, chat, generation)


def writers() -> ModuleType:
    """The module that needs the package gguf. Raises ConversionError where that is missing."""
    try:
        from . import gguf_files
    except ImportError:
        raise ConversionError('the package gguf is not installed: pip install -e ".[gguf]"') from None
    return gguf_files


def write(source: Source, folder: Path, dtype: str, class_token: str) -> tuple[Path, Path | None]:
    """Write a decoder, and the mmproj that goes with it unless it is there. Returns both."""
    gguf_files = writers()
    decoder = folder / f"{source.name}-{dtype.upper()}.gguf"
    template = source.chat.template()
    gguf_files.write_decoder(decoder, source.name, source.model, source.tokenizer, template, source.generation, dtype)
    if source.processor is None:
        return decoder, None
    half = "f32" if dtype == "f32" else "f16"
    mmproj = folder / f"mmproj-{source.name}-{half.upper()}.gguf"
    if not mmproj.exists():
        image_processor = source.processor.image_processor
        gguf_files.write_encoder(mmproj, source.name, source.model, image_processor, half, class_token)
    return decoder, mmproj


def check_float32(agreements: Sequence[llama_cpp.Agreement], has_class_token: bool) -> None:
    """Raise a ConversionError where llama.cpp's float32 is not the model's, so that its graph is another one.

    Args:
        agreements: after text, and after images if the model has an encoder.
        has_class_token: whether a class token changes the images: see `_CLASS_TOKEN`.
    """
    for agreement, tolerance in zip(agreements, (TOLERANCE, None if has_class_token else IMAGE_TOLERANCE), strict=False):
        if tolerance is not None and not agreement.difference <= tolerance:
            raise ConversionError(f"llama.cpp computes something else than this model: {agreement}")


# ── What stands beside the files ─────────────────────────────────────────────────────────────────────────────────────


def modelfile(source: Source, decoder: Path, mmproj: Path | None) -> str:
    """What `ollama create` reads."""
    lines = [f"# ollama create {source.name.lower()} -f Modelfile"]
    lines += [f"FROM ./{path.name}" for path in (decoder, mmproj) if path]
    lines += [source.chat.ollama(), 'PARAMETER stop "<|im_end|>"']
    if source.generation.do_sample:
        lines += [f"PARAMETER {key} {value}" for key in ("temperature", "top_p") if (value := getattr(source.generation, key))]
    return "\n".join(lines) + "\n"


def card(
    source: Source,
    files: tuple[Path, Path | None],
    sizes: Iterable[Sequence[object]],
    answers: Sequence[Sequence[object]],
    notes: Sequence[str],
) -> str:
    """The README.md of the folder. `files` are those of the example."""
    decoder, mmproj = files
    command = f"llama-server --model {decoder.name}" + (f" --mmproj {mmproj.name}" if mmproj else "")
    use = f"```bash\n{command}    # a page and an OpenAI API at http://localhost:8080\n"
    use += f"ollama create {source.name.lower()} -f Modelfile\n```\n\n" + "\n".join(f"* {note}" for note in notes)
    sections = {"Files": table(sizes, ("file", "size"))}
    if answers:
        header = ("decoder", "after text", "after images")[: len(answers[0])]
        sections["Beside the model in float32"] = "The next token, here and in transformers:\n\n" + table(answers, header)
    kind = "vision-language model" if source.processor else "language model"
    summary = f"The tiny {kind} {source.name}, for llama.cpp and what is built on it."
    return model_card(source.name, source.model, summary, sections, use=use, library_name="gguf")
