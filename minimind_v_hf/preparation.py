"""Chat template and tokenizer of a new processor, made once, when a model is converted or created.

The template puts marks into text from messages, and the tokenizer takes them out: processing_minimind_v.py tells why.
"""

import copy
import itertools
import json
import re
from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils import logging

from .configuration_minimind_v import CONTROL_MARK, IMAGE_PLACEHOLDER


logger = logging.get_logger(__name__)

_CHAT_TEMPLATE = """\
{#- Text from a message: control tokens begin with "<", so each gets a mark, which the tokenizer's normalizer removes. -#}
{%- macro plain(text) -%}
    {{- text | replace("<", "<" ~ mark) -}}
{%- endmacro -%}
{#- A string may hold <image>. In a list, images and videos are items of their own, and <image> in a text item is text. -#}
{%- macro render(content) -%}
    {%- if content is string -%}
        {{- plain(content) | replace("<" ~ mark ~ "image>", image_token) -}}
    {%- elif content is not defined or content is mapping or content is not iterable -%}
        {{- raise_exception("A message has no content: expected a string or a list under 'content'.") -}}
    {%- else -%}
        {#- vLLM takes a template for one of lists when it finds a loop over just this name. -#}
        {%- for item in content -%}
            {%- set sources = namespace(count=0) -%}
            {%- for source in [item.image, item.path, item.url, item.base64] -%}
                {%- if source is defined and source is not none -%}{%- set sources.count = sources.count + 1 -%}{%- endif -%}
            {%- endfor -%}
            {%- if item.type == "image" -%}
                {%- if sources.count > 1 -%}
                    {{- raise_exception("An image has several sources: expected 'image', 'path', 'url' or 'base64'.") -}}
                {%- endif -%}
                {{- image_token -}}
            {%- elif item.type == "video" -%}
                {{- "<video>" -}}
            {%- elif item.type == "text" and sources.count -%}
                {{- raise_exception("A content of type 'text' names an image: expected an item of type 'image' for it.") -}}
            {%- elif item.type == "text" and item.text is string -%}
                {{- plain(item.text) -}}
            {%- elif item.type == "text" -%}
                {{- raise_exception("A content of type 'text' has no text: expected a string under 'text'.") -}}
            {%- else -%}
                {{- raise_exception("Unknown content type '" ~ item.type ~ "': expected 'image', 'video' or 'text'.") -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- if default_system and messages[0].role != "system" -%}
    {{- "<|im_start|>system\\n" ~ default_system ~ "<|im_end|>\\n" -}}
{%- endif -%}
{#- Trained with turns apart, a model is asked as if the question came first after the images of the first turn -#}
{%- set first = namespace(asked=false, images="", left_out=false) -%}
{%- if independent_turns and add_generation_prompt -%}
    {%- for message in messages -%}
        {%- if message.role == "user" and not first.asked -%}
            {%- set first.asked = true -%}
            {%- for part in render(message.content).split(image_token) -%}
                {%- if not loop.first -%}{%- set first.images = first.images ~ image_token -%}{%- endif -%}
            {%- endfor -%}
        {%- endif -%}
    {%- endfor -%}
{%- endif -%}
{%- for message in messages -%}
    {%- if message.role not in ["system", "user", "assistant"] -%}
        {{- raise_exception("Unknown role '" ~ message.role ~ "': expected 'system', 'user' or 'assistant'.") -}}
    {%- endif -%}
    {%- if first.images and not loop.last and message.role != "system" -%}
        {%- set first.left_out = true -%}
    {%- else -%}
        {{- "<|im_start|>" ~ message.role ~ "\\n" -}}
        {%- if message.role == "assistant" -%}
            {%- set content = render(message.content) -%}
            {%- set answer = namespace(content=content) -%}
            {%- generation -%}
                {%- if thinking -%}
                    {#- The assistant's own thoughts and calls are control tokens that it learned -#}
                    {%- for name in ["think>", "/think>", "tool_call>", "/tool_call>"] -%}
                        {%- set answer.content = answer.content | replace("<" ~ mark ~ name, "<" ~ name) -%}
                    {%- endfor -%}
                    {%- set content = answer.content -%}
                    {%- set reasoning = "" -%}
                    {%- if message.reasoning_content is string -%}
                        {%- set reasoning = plain(message.reasoning_content) -%}
                    {%- elif "</think>" in content -%}
                        {%- set reasoning = content.split("</think>")[0].split("<think>")[-1] -%}
                        {%- set content = content.split("</think>")[-1] -%}
                    {%- endif -%}
                    {%- set reasoning = reasoning.strip("\\n") -%}
                    {%- if reasoning or not (drop_empty_thinking is defined and drop_empty_thinking) -%}
                        {{- "<think>\\n" ~ reasoning ~ "\\n</think>\\n\\n" -}}
                    {%- endif -%}
                    {%- set content = content.lstrip("\\n") -%}
                {%- endif -%}
                {{- content ~ "<|im_end|>\\n" -}}
            {%- endgeneration -%}
        {%- else -%}
            {%- if first.left_out -%}{{- first.images ~ "\\n" -}}{%- endif -%}
            {{- render(message.content) ~ "<|im_end|>\\n" -}}
        {%- endif -%}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- "<|im_start|>assistant\\n" -}}
    {%- if thinking -%}
        {{- "<think>\\n" if open_thinking is defined and open_thinking else "<think>\\n\\n</think>\\n\\n" -}}
    {%- endif -%}
{%- endif -%}
"""


def build_chat_template(image_token: str, default_system: str | None, thinking: bool, independent_turns: bool = False) -> str:
    """The ChatML template of MiniMind-V, in Jinja, with `{% generation %}` around what a model learns.

    Args:
        image_token: written where an image belongs.
        default_system: system message of conversations that have none (MiniMind2), or None.
        thinking: open each answer with a `<think>` block (minimind-3); the option `open_thinking` of
            `apply_chat_template` then leaves it open in the prompt, and `drop_empty_thinking` omits blocks without thoughts.
        independent_turns: in a prompt about images of the first turn, leave out all turns but the last, as suits a model that
            was trained with `independent_turns` of the collator. Training text is not changed.
    """
    settings = {
        "image_token": image_token,
        "mark": CONTROL_MARK,
        "default_system": default_system or "",
        "thinking": thinking,
        "independent_turns": independent_turns,
    }
    header = "".join(f"{{%- set {name} = {json.dumps(value, ensure_ascii=False)} -%}}\n" for name, value in settings.items())
    return header + _CHAT_TEMPLATE


def has_independent_turns(chat_template: str | None) -> bool:
    """Whether prompts leave out all turns but the last."""
    return "{%- set independent_turns = true -%}" in (chat_template or "")


def rebuild_chat_template(chat_template: str | None, **changes: bool) -> str | None:
    """A template of this or an earlier version as this one writes it, with changes to its settings; None for any other."""
    setting = re.compile(r'\{%- set (\w+) = (".*"|true|false) -%\}')
    lines = itertools.takewhile(setting.fullmatch, (chat_template or "").splitlines())
    settings = {name: json.loads(value) for name, value in setting.findall("\n".join(lines))}
    if settings.pop("mark", None) is None:
        return None
    return build_chat_template(**settings | changes)


def train_tokenizer(texts: Iterable[str], vocab_size: int, across_words: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with MiniMind's control tokens, for a small model of one's own.

    Args:
        texts: what to learn from.
        vocab_size: tokens, of which 259 are bytes and control tokens.
        across_words: whether a token may span words, as suits a small world in which "top left" is one notion.
    """
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not across_words)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
    )


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None) -> PreTrainedTokenizerBase:
    """A copy of a tokenizer that has an image token and a chat template, and takes out control marks.

    MiniMind2's tokenizer has no image token, and a new id would grow the embedding. But its vocabulary, like every
    byte-level one, holds the byte 0xFF, which no valid UTF-8 contains: that entry (id 190) is renamed to `<image>`. Every
    other id stays as it is. minimind-3's tokenizer has `<|image_pad|>` and keeps it. A tokenizer without such a byte
    gets a new id, for which the model's embedding must be resized.

    Args:
        tokenizer: a fast tokenizer. One that is prepared already is returned as it is.
        chat_template: a Jinja template. By default ours, in the manner of the tokenizer's generation: with a `<think>`
            block when its vocabulary knows `<think>`, else with MiniMind2's default system message.

    Raises:
        ValueError: the tokenizer has no `tokenizers` backend.
    """
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise ValueError(
            f"{type(tokenizer).__name__} is not a fast tokenizer. MiniMindVProcessor needs one, with a tokenizer.json."
        )
    image_token = _find_image_token(tokenizer)
    named = image_token is not None and getattr(tokenizer, "image_token", None) == image_token
    normalizer = tokenizer.backend_tokenizer.normalizer
    removes_marks = normalizer is not None and normalizer.normalize_str(CONTROL_MARK) == ""
    if named and removes_marks and chat_template in (None, tokenizer.chat_template):
        return tokenizer

    if named:
        tokenizer = copy.deepcopy(tokenizer)
    else:
        state = tokenizer.backend_tokenizer.to_str() if image_token else _with_image_token(tokenizer)
        special = {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(state),
            model_max_length=tokenizer.model_max_length,
            clean_up_tokenization_spaces=False,
            extra_special_tokens={"image_token": image_token or IMAGE_PLACEHOLDER},
            **{name: token for name, token in special.items() if token is not None},
        )
    if not removes_marks:
        remove_marks = normalizers.Replace(CONTROL_MARK, "")
        tokenizer.backend_tokenizer.normalizer = (
            remove_marks if normalizer is None else normalizers.Sequence([remove_marks, normalizer])
        )
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"  # what batched generation needs
    if chat_template is None:
        thinking = "<think>" in tokenizer.get_added_vocab()
        default_system = None if thinking else "You are a helpful assistant"
        chat_template = build_chat_template(tokenizer.image_token, default_system, thinking)
    tokenizer.chat_template = chat_template
    return tokenizer


def _find_image_token(tokenizer: PreTrainedTokenizerBase) -> str | None:
    added = tokenizer.get_added_vocab()
    candidates = [getattr(tokenizer, "image_token", None), IMAGE_PLACEHOLDER, "<|image_pad|>"]
    return next((token for token in candidates if token in added), None)


def _with_image_token(tokenizer: PreTrainedTokenizerBase) -> str:
    """The tokenizer.json with `<image>`: in place of a byte that never occurs, or else as a new id."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    vocab = state["model"].get("vocab")
    # Byte-level BPE writes the bytes from 0xAE on as the character of the same number
    unreachable = [chr(byte) for byte in (*range(0xFF, 0xF4, -1), 0xC1, 0xC0)]
    if "ByteLevel" not in json.dumps(state["pre_tokenizer"]) or not isinstance(vocab, dict):
        unreachable = []
    merges = (merge if isinstance(merge, list) else merge.split(" ") for merge in state["model"].get("merges", []))
    merged = {part for merge in merges for part in merge}
    symbol = next((symbol for symbol in unreachable if symbol in vocab and symbol not in merged), None)
    if symbol is not None:
        token_id = vocab[IMAGE_PLACEHOLDER] = vocab.pop(symbol)
    else:
        token_id = len(tokenizer)
        logger.warning(
            f"This tokenizer has no image token and no unused entry: {IMAGE_PLACEHOLDER} becomes the new id {token_id}. "
            f"Call model.resize_token_embeddings({token_id + 1})."
        )
    image_token = {"id": token_id, "content": IMAGE_PLACEHOLDER, "special": True}
    image_token |= dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    state["added_tokens"] = sorted([*state["added_tokens"], image_token], key=lambda token: token["id"])
    return json.dumps(state)
