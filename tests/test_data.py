"""From JSONL and pictures to batches: token ids, labels, padding."""

import json

import pytest
import torch
from conftest import IMAGE_SIZE, make_image

from minimind_v_hf.collator import MiniMindVCollator
from minimind_v_hf.data import load_conversations, tokenize_conversations


IMAGE_TOKENS = 16
ROWS = [
    {
        "conversations": [
            {"role": "user", "content": "<image>\nWhat colour is the circle?"},
            {"role": "assistant", "content": "red"},
            {"role": "user", "content": "图中有几个图形？"},
            {"role": "assistant", "content": "一"},
        ],
        "image": "red.png",
    },
    {
        "conversations": [
            {"role": "user", "content": "<image><image> What?"},
            {"role": "assistant", "content": "a dog"},
        ],
        "image": "red.png, blue.png",
    },
    {"conversations": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "lazy"}]},
]


@pytest.fixture
def files(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for colour in ("red", "blue"):
        make_image(colour).save(images / f"{colour}.png")

    def write(rows):
        path = tmp_path / "data.jsonl"
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        return path, images

    return write


def test_tokens_are_the_processors_and_labels_are_what_the_assistant_says(files, processor):
    data_file, images = files(ROWS)
    dataset = tokenize_conversations(load_conversations(data_file, images), processor)
    assert dataset.column_names == ["images", "input_ids", "labels"]
    said = []
    for row, sample in zip(ROWS, dataset, strict=True):
        prompt = processor.apply_chat_template(row["conversations"])
        outputs = processor(text=prompt, images=sample["images"] or None)
        assert sample["input_ids"] == list(outputs["input_ids"][0])
        assert len(sample["labels"]) == len(sample["input_ids"])
        learned = [(token, label) for token, label in zip(sample["input_ids"], sample["labels"], strict=True) if label != -100]
        assert all(token == label for token, label in learned)
        said.append(processor.decode([label for _, label in learned]))
    assert said == ["red<|im_end|>\n一<|im_end|>\n", "a dog<|im_end|>\n", "lazy<|im_end|>\n"]


def test_image_tokens_are_never_labels(files, processor):
    conversation = [{"role": "user", "content": "Draw"}, {"role": "assistant", "content": "<image>!"}]
    row = {"conversations": conversation, "image": "red.png"}
    dataset = tokenize_conversations(load_conversations(*files([row])), processor)
    assert dataset[0]["input_ids"].count(processor.image_token_id) == IMAGE_TOKENS
    assert processor.image_token_id not in dataset[0]["labels"]


def test_collator_pads_on_the_right_and_keeps_the_order_of_images(files, processor):
    dataset = tokenize_conversations(load_conversations(*files(ROWS)), processor)
    batch = MiniMindVCollator(processor)([dataset[i] for i in range(3)])
    longest = max(len(ids) for ids in dataset["input_ids"])
    for i in range(3):
        length = len(dataset[i]["input_ids"])
        padding = longest - length
        assert batch["input_ids"][i].tolist() == dataset[i]["input_ids"] + [processor.tokenizer.pad_token_id] * padding
        assert batch["labels"][i].tolist() == dataset[i]["labels"] + [-100] * padding
        assert batch["attention_mask"][i].tolist() == [1] * length + [0] * padding
    colours = ["red", "red", "blue"]
    expected = processor.image_processor([make_image(colour) for colour in colours], return_tensors="pt")["pixel_values"]
    assert torch.equal(batch["pixel_values"], expected)
    assert batch["pixel_values"].shape == (3, 3, IMAGE_SIZE, IMAGE_SIZE)


def test_collator_without_images(files, processor):
    dataset = tokenize_conversations(load_conversations(*files(ROWS[2:])), processor)
    assert "pixel_values" not in MiniMindVCollator(processor)([dataset[0]])


def test_unreadable_image_is_named(files, processor):
    data_file, images = files(ROWS)
    (images / "blue.png").write_text("no picture")
    dataset = tokenize_conversations(load_conversations(data_file, images), processor)
    with pytest.raises(ValueError, match=r"Cannot read the image .*blue\.png: the file is not a picture"):
        MiniMindVCollator(processor)([dataset[1]])


def test_bad_input_is_named(files, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no data file '.*nowhere\.jsonl'"):
        load_conversations(tmp_path / "nowhere.jsonl", tmp_path)
    data_file, images = files([{"text": "hello"}])
    with pytest.raises(ValueError, match="expected rows with the key 'conversations', got the keys text"):
        load_conversations(data_file, images)
    data_file, images = files([ROWS[2], ROWS[1] | {"image": "red.png"}])
    with pytest.raises(ValueError, match=r"row 1 \(counted from 0\): 2 <image> placeholders, but 1 images: \['red.png'\]"):
        load_conversations(data_file, images)
    with pytest.raises(FileNotFoundError, match="There is no image folder"):
        load_conversations(data_file, tmp_path / "no folder")
