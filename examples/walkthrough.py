"""One forward pass of MiniMind-V with the shape of every step, printed and checked; docs/walkthrough.md explains them.

    python examples/walkthrough.py                                # MiniMind2-V small, random weights, nothing to download
    python examples/walkthrough.py --model runs/quickstart/model  # a saved model

Hooks on the modules record what passes, so the shapes are those of the model's own forward.
"""

import argparse
import math

import torch
import torch.nn.functional as F
from PIL import Image
from transformers import CLIPImageProcessorPil

from minimind_v_hf import MiniMindVConfig, MiniMindVForConditionalGeneration
from minimind_v_hf.arguments_minimind_v import CACHE
from minimind_v_hf.chat import load_model
from minimind_v_hf.scripts import errors_in_one_line


# A conversation in the tokens of the published MiniMind2: system "看图回答。", user "<image>\n这是什么？", assistant "一只猫"
BEFORE_IMAGE = [1, 85, 736, 201, 1380, 2537, 2212, 286, 2, 201, 1, 320, 275, 201]
AFTER_IMAGE = [201, 3744, 1541, 814, 2, 201, 1, 1078, 538, 501, 201]
ANSWER = [333, 1623, 2989, 2, 201]  # with <|im_end|> and a line break, which are learned too
IMAGE = Image.new("RGB", (256, 256), "#f0f0f0")
IMAGE.paste("#d62728", (16, 16, 113, 113))  # a red square at the top left


def fresh_model():
    """MiniMind2-V small with random weights, and its inputs for the conversation above."""
    torch.manual_seed(0)
    config = MiniMindVConfig.from_preset("minimind2-v-small")
    prompt = BEFORE_IMAGE + [config.image_token_id] * config.image_seq_length + AFTER_IMAGE
    ids, labels = torch.tensor([prompt + ANSWER]), torch.tensor([[-100] * len(prompt) + ANSWER])
    pixel_values = CLIPImageProcessorPil()(IMAGE, return_tensors="pt")["pixel_values"]
    model = MiniMindVForConditionalGeneration(config).eval()
    return model, {"input_ids": ids, "labels": labels, "pixel_values": pixel_values}


def saved_model(folder: str):
    """A saved model, and its inputs for a conversation as its own processor prepares them."""
    model, processor = load_model(folder)
    question = [{"type": "image", "image": IMAGE}, {"type": "text", "text": "\nHow many shapes are there?"}]
    conversation = [{"role": "user", "content": question}, {"role": "assistant", "content": "one"}]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "return_assistant_tokens_mask": True}
    inputs = processor.apply_chat_template(conversation, **options).to(model.device)
    inputs["labels"] = inputs["input_ids"].masked_fill(~inputs.pop("assistant_masks").bool(), -100)
    return model, inputs


@torch.no_grad()
def walk(model, inputs) -> None:
    """Run the model once, print each step, and raise ValueError where one is not as expected."""
    config, text, vision, inner = model.config, model.config.get_text_config(), model.config.vision_config, model.model
    given, made = {}, {}  # by the module: its input and its output

    def record(module, args, kwargs, output) -> None:
        given[module] = args[0] if args else kwargs.get("inputs_embeds")
        made[module] = getattr(output, "last_hidden_state", output)

    for module in model.modules():
        module.register_forward_hook(record, with_kwargs=True)
    outputs = model(**inputs, use_cache=True)

    tokens, length = config.image_seq_length, inputs["input_ids"].shape[1]
    patches = (vision.image_size // vision.patch_size) ** 2
    extra = int(vision.model_type == "clip_vision_model")  # the class token; SigLIP has none
    hidden = [1, length, text.hidden_size]
    merged, projected = given[inner.language_model], made[inner.multi_modal_projector]
    learned = int((inputs["labels"] != -100).sum())
    show("pixel_values", inputs["pixel_values"], [1, 3, *[vision.image_size] * 2], "one image: channels, height, width")
    show("input_ids", inputs["input_ids"], [1, length], f"{length - tokens} tokens of text and {tokens} placeholders")
    show("embed_tokens", made[model.get_input_embeddings()], hidden, "those of the placeholders mean nothing")
    encoded = f"class tokens: {extra}, patches: {patches}"
    show("encoder", made[inner.vision_tower], [1, extra + patches, vision.hidden_size], encoded)
    show("patches", given[inner.multi_modal_projector], [1, patches, vision.hidden_size], "without the class token")
    show("projector", projected, [1, tokens, text.hidden_size], "image tokens, as wide as the decoder")
    show("masked_scatter", merged, hidden, "the image tokens in place of the placeholders")
    for number, layer in enumerate(inner.language_model.layers):
        show(f"layer {number}", made[layer], hidden)
    show("logits", outputs.logits, [1, length, text.vocab_size], "at each position, a score for each next token")
    show("labels", inputs["labels"], [1, length], f"{learned} learned, the others are -100")

    is_image = inputs["input_ids"] == config.image_token_id
    check("merged image == projected image", torch.equal(merged[is_image], projected[0]), True)
    # The scores at a position are for the next token, so the last have no label, and the first label has no scores
    loss = F.cross_entropy(outputs.logits[0, :-1], inputs["labels"][0, 1:], ignore_index=-100)
    check("loss == mean over the learned tokens", torch.allclose(outputs.loss, loss), True)
    print(f"{'loss':<16}{loss:<20.4f}by chance it would be ln {text.vocab_size} = {math.log(text.vocab_size):.4f}")
    cached = [tensor for layer in outputs[CACHE].layers for tensor in (layer.keys, layer.values)]
    shape = [1, text.num_key_value_heads, length, text.head_dim]
    check("KV cache", {tuple(tensor.shape) for tensor in cached}, {tuple(shape)})
    size = sum(tensor.nbytes for tensor in cached)
    print(f"{'KV cache':<16}{shape!s:<20}keys, and as many values, in {len(cached) // 2} layers: {size:,} bytes")


def show(name: str, tensor: torch.Tensor, shape: list[int], meaning: str = "") -> None:
    check(name, list(tensor.shape), shape)
    print(f"{name:<16}{shape!s:<20}{meaning}".rstrip())


def check(what: str, found, expected) -> None:
    if found != expected:
        raise ValueError(f"{what}: expected {expected}, found {found}.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or Hub id of a saved model (default: a fresh MiniMind2-V small)")
    folder = parser.parse_args().model
    with errors_in_one_line():
        walk(*(saved_model(folder) if folder else fresh_model()))
