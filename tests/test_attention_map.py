"""Where a model looks: the maps are the attention weights of the very step that chose each token."""

import sys

import numpy as np
import pytest
import torch
from attention_map import attention_maps, images_as_encoded, main
from conftest import IMAGE_SIZE, PATCH_SIZE, make_image, make_model, make_processor
from PIL import Image


SIDE = IMAGE_SIZE // PATCH_SIZE


def ask(processor, *images):
    content = [{"type": "image", "image": image} for image in images] + [{"type": "text", "text": "Where?"}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )


@pytest.mark.parametrize("layer", [None, 0, -1])
def test_maps_are_the_weights_of_the_step_that_chose_the_piece(layer):
    torch.manual_seed(3)
    processor, model = make_processor(), make_model(attn_implementation="eager")
    inputs = ask(processor, make_image("red"), make_image("blue"))
    looks = attention_maps(model, processor, inputs, max_new_tokens=6, layer=layer)
    tokens = model.generate(**inputs, max_new_tokens=6, do_sample=False)[:, :-1]
    assert "".join(look.text for look in looks) == processor.decode(
        model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    with torch.no_grad():
        attentions = model(tokens, pixel_values=inputs["pixel_values"], output_attentions=True).attentions
    chosen = attentions if layer is None else [attentions[layer]]
    rows = torch.stack([weights[0] for weights in chosen]).mean(dim=(0, 1))[inputs["input_ids"].shape[1] - 1 :]
    is_image = inputs["input_ids"][0] == processor.image_token_id
    first = rows[0, : len(is_image)][is_image].reshape(2, SIDE, SIDE)
    assert looks[0].maps.shape == (2, SIDE, SIDE)
    np.testing.assert_allclose(looks[0].maps, first, atol=1e-6)
    assert looks[0].share == pytest.approx(first.sum().item(), abs=1e-5)


def test_half_characters_are_joined_and_their_maps_averaged(monkeypatch):
    processor, model = make_processor(), make_model(attn_implementation="eager")
    inputs = ask(processor, make_image())
    start = inputs["input_ids"].shape[1]
    answer = processor.tokenizer("é龘a")["input_ids"]
    assert len(answer) > 3  # its bytes are tokens of their own
    step = [torch.rand(1, 4, 1, start + len(answer)) for _ in range(2)]
    sequences = torch.cat((inputs["input_ids"], torch.tensor([answer])), dim=1)
    output = type("Output", (), {"sequences": sequences, "attentions": [step] * len(answer)})
    monkeypatch.setattr(model, "generate", lambda **_: output)
    looks = attention_maps(model, processor, inputs)
    assert [look.text for look in looks] == ["é", "龘", "a"]
    np.testing.assert_allclose(looks[0].maps, looks[1].maps, rtol=1e-5)


def test_refusals():
    processor, model = make_processor(), make_model(attn_implementation="eager")
    with pytest.raises(ValueError, match="layer=2: this model has the layers 0 to 1"):
        attention_maps(model, processor, ask(processor, make_image()), layer=2)
    with pytest.raises(ValueError, match="no image"):
        attention_maps(model, processor, processor(text="Hm", return_tensors="pt"))


def test_images_are_drawn_as_the_encoder_gets_them():
    processor = make_processor()
    (image,) = images_as_encoded(processor, ask(processor, make_image("orange"))["pixel_values"])
    np.testing.assert_allclose(image, np.broadcast_to([1, 165 / 255, 0], (IMAGE_SIZE, IMAGE_SIZE, 3)), atol=1e-5)


def test_the_drawing(tmp_path, monkeypatch, capsys):
    torch.manual_seed(3)
    make_model().save_pretrained(tmp_path / "model")
    make_processor().save_pretrained(tmp_path / "model")
    make_image().save(tmp_path / "red.png")
    options = ["--model", str(tmp_path / "model"), "--image", str(tmp_path / "red.png"), "--max-new-tokens", "5"]
    output = tmp_path / "attention.png"
    monkeypatch.setattr(sys, "argv", ["attention_map.py", *options, "--output", str(output), "图中有什么？"])
    main()
    assert f"Look at {output}" in capsys.readouterr().out
    with Image.open(output) as drawing:
        pixels = np.asarray(drawing.convert("RGB"), float)
    assert pixels.shape[1] > 500
    # Coloured maps beside the red image: many different colours
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20
