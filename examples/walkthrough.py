"""One forward pass of MiniMind-V with the shape of every step, printed and checked; docs/walkthrough.md explains them.

    python examples/walkthrough.py                                # MiniMind2-V small, random weights, nothing to download
    python examples/walkthrough.py --model runs/quickstart/model  # a saved model

Hooks on the modules record what passes, so the shapes are those of the model's own forward.
"""

import argparse
import math

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from transformers import CLIPImageProcessorPil

from minimind_v_hf import MiniMindVConfig, MiniMindVForConditionalGeneration
from minimind_v_hf.chat import errors_in_one_line, load_model
from minimind_v_hf.modeling_minimind_v import CACHE


# A conversation in the tokens of the published MiniMind2: system "看图回答。", user "<image>\n这是什么？", assistant "一只猫"
BEFORE_IMAGE = [1, 85, 736, 201, 1380, 2537, 2212, 286, 2, 201, 1, 320, 275, 201]
AFTER_IMAGE = [201, 3744, 1541, 814, 2, 201, 1, 1078, 538, 501, 201]
ANSWER = [333, 1623, 2989, 2, 201]  # with <|im_end|> and a line break, which are learned too


def draw_image() -> Image.Image:
    """A red square at the top left."""
    image = Image.new("RGB", (256, 256), "#f0f0f0")
    ImageDraw.Draw(image).rectangle((16, 16, 112, 112), fill="#d62728")
    return image


def fresh_model():
    """MiniMind2-V small with random weights, and its inputs for the conversation above."""
    torch.manual_seed(0)
    config = MiniMindVConfig.from_preset("minimind2-v-small")
    prompt = BEFORE_IMAGE + [config.image_token_id] * config.image_seq_length + AFTER_IMAGE
    inputs = {
        "input_ids": torch.tensor([prompt + ANSWER]),
        "labels": torch.tensor([[-100] * len(prompt) + ANSWER]),
        "pixel_values": CLIPImageProcessorPil()(draw_image(), return_tensors="pt")["pixel_values"],
    }
    return MiniMindVForConditionalGeneration(config).eval(), inputs


def saved_model(folder: str):
    """A saved model, and its inputs for a conversation as its own processor prepares them."""
    model, processor = load_model(folder)
    question = [{"type": "image", "image": draw_image()}, {"type": "text", "text": "\nHow many shapes are there?"}]
    conversation = [{"role": "user", "content": question}, {"role": "assistant", "content": "one"}]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "return_assistant_tokens_mask": True}
    inputs = processor.apply_chat_template(conversation, **options)
    is_answer = inputs.pop("assistant_masks").bool()
    inputs["labels"] = inputs["input_ids"].masked_fill(~is_answer, -100)
    return model, inputs.to(model.device)


@torch.no_grad()
def walk(model, inputs) -> None:
    """Run the model once, print each step, and raise ValueError where one is not as expected."""
    config, text, inner = model.config, model.config.get_text_config(), model.model
    seen: dict[str, torch.Tensor] = {}

    def record(name: str, module: torch.nn.Module, pick) -> None:
        """Keep what a module is given or gives."""
        hooks.append(module.register_forward_hook(lambda _, *passed: seen.update({name: pick(*passed)}), with_kwargs=True))

    hooks: list = []
    record("encoder", inner.vision_tower, lambda args, kwargs, output: output.last_hidden_state)
    record("patches", inner.multi_modal_projector, lambda args, kwargs, output: args[0])
    record("projector", inner.multi_modal_projector, lambda args, kwargs, output: output)
    record("embed_tokens", inner.get_input_embeddings(), lambda args, kwargs, output: output)
    record("masked_scatter", inner.language_model, lambda args, kwargs, output: kwargs["inputs_embeds"])
    for number, layer in enumerate(inner.language_model.layers):
        record(f"layer {number}", layer, lambda args, kwargs, output: output)
    record("logits", model.lm_head, lambda args, kwargs, output: output)
    outputs = model(**inputs, use_cache=True)
    for hook in hooks:
        hook.remove()
    seen |= inputs

    side, length, learned = config.vision_config.image_size, inputs["input_ids"].shape[1], int((inputs["labels"] != -100).sum())
    patches, tokens = (side // config.vision_config.patch_size) ** 2, config.image_seq_length
    before_patches = int(config.vision_config.model_type == "clip_vision_model")  # CLIP's class token; SigLIP has none
    width, hidden = config.vision_config.hidden_size, [1, length, text.hidden_size]
    expected = {
        "pixel_values": ([1, 3, side, side], "one image: channels, height, width"),
        "encoder": ([1, before_patches + patches, width], f"class tokens: {before_patches}, patches: {patches}"),
        "patches": ([1, patches, width], "without the class token"),
        "projector": ([1, tokens, text.hidden_size], "image tokens, as wide as the decoder"),
        "input_ids": ([1, length], f"{length - tokens} tokens of text and {tokens} placeholders"),
        "embed_tokens": (hidden, "those of the placeholders mean nothing"),
        "masked_scatter": (hidden, "the image tokens in place of the placeholders"),
        **{f"layer {number}": (hidden, "") for number in range(text.num_hidden_layers)},
        "logits": ([1, length, text.vocab_size], "at each position, a score for each next token"),
        "labels": ([1, length], f"{learned} learned, the others are -100"),
    }
    for name, (shape, meaning) in expected.items():
        _check(name, list(seen[name].shape), shape)
        print(f"{name:<16}{shape!s:<20}{meaning}".rstrip())

    is_image = inputs["input_ids"] == config.image_token_id
    _check("placeholders", int(is_image.sum()), tokens)
    _check("merged image == projected image", torch.equal(seen["masked_scatter"][is_image], seen["projector"][0]), True)
    # The scores at a position are for the next token, so the last have no label, and the first label has no scores
    loss = F.cross_entropy(seen["logits"][0, :-1], inputs["labels"][0, 1:], ignore_index=-100)
    _check("loss == mean over the learned tokens", torch.allclose(outputs.loss, loss), True)
    print(f"{'loss':<16}{loss:<20.4f}by chance it would be ln {text.vocab_size} = {math.log(text.vocab_size):.4f}")

    cached = [tensor for layer in outputs[CACHE].layers for tensor in (layer.keys, layer.values)]
    shape = [1, text.num_key_value_heads, length, text.head_dim]
    for tensor in cached:
        _check("KV cache", list(tensor.shape), shape)
    size = sum(tensor.nbytes for tensor in cached)
    print(f"{'KV cache':<16}{shape!s:<20}keys, and as many values, in {len(cached) // 2} layers: {size:,} bytes")


def _check(what: str, found, expected) -> None:
    if found != expected:
        raise ValueError(f"{what}: expected {expected}, found {found}.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or Hub id of a saved model (default: a fresh MiniMind2-V small)")
    folder = parser.parse_args().model
    with errors_in_one_line(parser):
        walk(*(saved_model(folder) if folder else fresh_model()))
