"""From samples to batches: padding, packing with block-diagonal attention, pixels."""

import io

import numpy as np
import pytest
import torch
from conftest import IMAGE_SIZE, make_image, make_image_processor, make_model, make_processor
from datasets import Dataset, Features, Value
from PIL import Image
from transformers import SiglipImageProcessorPil, Trainer, TrainingArguments

from minimind_v_hf.data import MiniMindVCollator, PixelNormalizer, RandomAffine, group_by_fit, pack, tokenize_conversations


COLOURS = ["red", "blue", "lime"]


def jpeg(size: tuple[int, int]) -> bytes:
    """An image with large and small features."""
    y, x = np.mgrid[0 : size[1], 0 : size[0]] / max(size)
    waves = [np.sin(30 * x * y), np.cos(20 * (x - y)), np.sin(12 * x) * np.cos(50 * y)]
    file = io.BytesIO()
    Image.fromarray((127.5 + 127.5 * np.stack(waves, -1)).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, processor):
    """Samples with one, two, no and one image."""
    folder = tmp_path_factory.mktemp("images")
    for colour in COLOURS:
        make_image(colour).save(folder / f"{colour}.png")
    questions = ["<image>\nWhat colour is the circle?", "<image><image> What?", "Hi", "<image>How many shapes are there?"]
    images = [["red"], ["red", "blue"], [], ["lime"]]
    answers = ["red", "a lazy dog", "lazy", "图中"]
    rows = [
        {
            "conversations": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
            "images": [str(folder / f"{name}.png") for name in names],
        }
        for question, answer, names in zip(questions, answers, images, strict=True)
    ]
    message = {"role": Value("string"), "content": Value("string")}
    features = Features({"conversations": [message], "images": [Value("string")]})
    return tokenize_conversations(Dataset.from_list(rows, features=features), processor)


# ── Padding ──


@pytest.mark.parametrize("multiple", [None, 1, 64])
def test_padding_is_on_the_right_and_images_keep_their_order(dataset, processor, multiple):
    batch = MiniMindVCollator(processor, pad_to_multiple_of=multiple)(list(dataset))
    longest = max(dataset["length"])
    width = longest if multiple in (None, 1) else -(-longest // 64) * 64
    for i, sample in enumerate(dataset):
        padding = width - sample["length"]
        assert batch["input_ids"][i].tolist() == sample["input_ids"] + [processor.tokenizer.pad_token_id] * padding
        assert batch["labels"][i].tolist() == sample["labels"] + [-100] * padding
        assert batch["attention_mask"][i].tolist() == [1] * sample["length"] + [0] * padding
    images = [make_image(colour) for colour in ("red", "red", "blue", "lime")]
    expected = processor.image_processor(images, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(batch["pixel_values"], expected, rtol=0, atol=1e-6)
    assert set(batch) == {"input_ids", "labels", "attention_mask", "pixel_values"}


def test_a_batch_without_images_reaches_the_projector(dataset, processor):
    batch = MiniMindVCollator(processor)([dataset[2]])
    assert batch["pixel_values"].shape == (0, 3, IMAGE_SIZE, IMAGE_SIZE)
    model = make_model()
    outputs = model(**batch)
    outputs.loss.backward()
    # Distributed training waits for a gradient of every parameter, and zero is one
    for name, parameter in model.named_parameters():
        if name.startswith(("model.multi_modal_projector", "model.vision_tower.embeddings")):
            assert parameter.grad is not None, name
            assert not parameter.grad.any(), name
    without = model(**{name: tensor for name, tensor in batch.items() if name != "pixel_values"})
    assert torch.equal(outputs.logits, without.logits)


def test_unreadable_image_is_named(dataset, processor, tmp_path):
    (tmp_path / "blue.png").write_text("no image")
    sample = dataset[0] | {"images": [str(tmp_path / "blue.png")]}
    with pytest.raises(ValueError, match=r"Cannot read the image .*blue\.png': the file is not an image"):
        MiniMindVCollator(processor)([sample])
    with pytest.raises(ValueError, match="pad_to_multiple_of=0"):
        MiniMindVCollator(processor, pad_to_multiple_of=0)


# ── Packing ──


def test_packed_rows_hold_samples_side_by_side(dataset, processor):
    samples = [dataset[2], dataset[0]]
    batch = MiniMindVCollator(processor, pad_to_multiple_of=32)([{"samples": samples}, {"samples": [dataset[2]]}])
    lengths = [sample["length"] for sample in samples]
    width = -(-sum(lengths) // 32) * 32
    padding = width - sum(lengths)
    assert batch["input_ids"].shape == batch["labels"].shape == (2, width)
    assert "attention_mask" not in batch
    ids = [token for sample in samples for token in sample["input_ids"]]
    assert batch["input_ids"][0].tolist() == ids + [processor.tokenizer.pad_token_id] * padding
    assert batch["labels"][0].tolist() == [label for s in samples for label in s["labels"]] + [-100] * padding
    assert batch["position_ids"][0].tolist() == [*range(lengths[0]), *range(lengths[1]), *range(padding)]
    assert batch["position_ids"][1].tolist() == [*range(lengths[0]), *range(width - lengths[0])]


def test_the_first_token_is_not_learned_from_a_neighbour(dataset, processor):
    sample = dataset[2] | {"labels": dataset[2]["input_ids"]}
    labels = MiniMindVCollator(processor)([{"samples": [sample, sample]}])["labels"]
    length = sample["length"]
    assert labels[0].tolist() == [-100, *sample["labels"][1:]] * 2
    assert labels.shape == (1, 2 * length)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("use_cache", [None, False])
@pytest.mark.parametrize("groups", [[[0, 1, 2, 3]], [[1], [0, 2, 3]], [[3, 0], [1, 2]]])
def test_packed_samples_see_themselves_alone(dataset, processor, groups, attention, use_cache):
    model = make_model(attn_implementation=attention)
    collator = MiniMindVCollator(processor, pad_to_multiple_of=8)
    batch = collator([{"samples": [dataset[i] for i in group]} for group in groups])
    with torch.no_grad():
        packed = model(**batch, use_cache=use_cache)
        total, learned = 0.0, 0
        for row, group in enumerate(groups):
            start = 0
            for i in group:
                alone = model(**MiniMindVCollator(processor)([dataset[i]]))
                end = start + dataset[i]["length"]
                torch.testing.assert_close(packed.logits[row, start:end], alone.logits[0], rtol=0, atol=1e-5)
                count = sum(label != -100 for label in dataset[i]["labels"])
                total, learned, start = total + alone.loss.item() * count, learned + count, end
    assert packed.loss.item() == pytest.approx(total / learned, abs=1e-5)


def test_packed_training_is_padded_training(dataset, processor, tmp_path):
    """The stock Trainer, whose loss counts learned tokens over the whole batch."""
    losses = []
    for rows in (dataset, pack(dataset, int(max(dataset["length"])))):
        torch.manual_seed(0)
        arguments = TrainingArguments(
            str(tmp_path), per_device_train_batch_size=4, max_steps=3, logging_steps=1, report_to="none", save_strategy="no",
            remove_unused_columns=False, use_cpu=True, learning_rate=1e-2, disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(make_model(), arguments, train_dataset=rows, data_collator=MiniMindVCollator(processor))
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(losses[0]) == 3
    assert losses[0][2] < losses[0][0]
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)


def test_packing_loses_nothing_and_wastes_little():
    lengths = np.random.randint(20, 300, 5000).tolist()
    groups = group_by_fit(lengths, 640)
    assert sorted(index for group in groups for index in group) == list(range(5000))
    assert max(sum(lengths[index] for index in group) for group in groups) <= 640
    assert len(groups) * 640 < 1.01 * sum(lengths)
    assert group_by_fit(lengths, 640) == groups
    assert group_by_fit(lengths, 640, seed=1) != groups
    assert group_by_fit([], 640) == []
    with pytest.raises(ValueError, match="A sample of 641 tokens does not fit into a row of 640"):
        group_by_fit([641, 20], 640)


def test_packed_data_sets(dataset):
    packed = pack(dataset, 140)
    rows = [packed[i] for i in range(len(packed))]
    streamed = list(pack(dataset.to_iterable_dataset(), 140))
    for found in (rows, streamed):
        samples = [sample for row in found for sample in row["samples"]]
        assert sorted(samples, key=str) == sorted(dataset, key=str)
        assert all(sum(sample["length"] for sample in row["samples"]) <= 140 for row in found)
        assert len(found) < len(dataset)
    assert packed[-1] == rows[-1]
    with pytest.raises(IndexError):
        packed[len(packed)]


def test_stock_trainers_group_by_length(dataset, processor, tmp_path):
    def mixed_batches(strategy: str) -> int:
        arguments = TrainingArguments(
            str(tmp_path),
            per_device_train_batch_size=2,
            train_sampling_strategy=strategy,
            remove_unused_columns=False,
            use_cpu=True,
        )
        rows = dataset.select([2, 1] * 40)
        trainer = Trainer(make_model(), arguments, train_dataset=rows, data_collator=MiniMindVCollator(processor))
        return sum(not batch["attention_mask"].all() for batch in trainer.get_train_dataloader())

    assert mixed_batches("random") > 10
    assert mixed_batches("group_by_length") < 5


# ── Pixels ──


@pytest.mark.parametrize("siglip", [False, True])
def test_bytes_normalised_on_the_device_are_the_processors_pixels(dataset, siglip):
    image_processor = make_image_processor()
    if siglip:
        image_processor = SiglipImageProcessorPil(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})
    processor = make_processor(image_processor)
    sample = dataset[0] | {"images": [jpeg((50, 31)), jpeg((20, 20))]}
    pixels = MiniMindVCollator(processor, uint8_pixels=True)([sample])["pixel_values"]
    assert pixels.dtype == torch.uint8
    images = [Image.open(io.BytesIO(file)) for file in sample["images"]]
    expected = processor(text="<image><image>", images=images, return_tensors="pt")
    normalize = PixelNormalizer(image_processor)
    torch.testing.assert_close(normalize(pixels), expected["pixel_values"], rtol=0, atol=1e-6)
    assert torch.equal(normalize(expected["pixel_values"]), expected["pixel_values"])
    assert torch.equal(normalize(pixels), MiniMindVCollator(processor)([sample])["pixel_values"])


def test_large_photographs_are_decoded_smaller(dataset):
    processor = make_processor(make_image_processor(224), image_seq_length=196)
    collator = MiniMindVCollator(processor, uint8_pixels=True)
    for size, bound in (((640, 480), 0.0), ((1024, 900), 0.5), ((2000, 3000), 0.5)):
        file = jpeg(size)
        pixels = collator([dataset[0] | {"images": [file]}])["pixel_values"].float()
        expected = processor.image_processor(Image.open(io.BytesIO(file)), do_rescale=False, do_normalize=False)["pixel_values"]
        assert (pixels - torch.as_tensor(np.stack(expected)).float()).abs().mean() <= bound


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_augmentation_moves_pixels_a_little_in_training_alone(dtype):
    torch.manual_seed(0)
    pixels = torch.full((20, 3, 40, 40), 255 if dtype == torch.uint8 else 1.0).to(dtype)
    pixels[:, :, 15:25, 4:14] = 0  # a black square, on the left
    augment = RandomAffine(0.1)
    changed = augment(pixels)
    assert changed.dtype == dtype
    assert changed.shape == pixels.shape
    black = (changed[:, 0] == 0).float()
    assert len({image.numpy().tobytes() for image in black}) == 20
    assert ((black.sum((1, 2)) > 60) & (black.sum((1, 2)) < 150)).all()
    assert black[:, :, 20:].sum() == 0
    assert set(changed[:, 0, 0, 0].tolist()) == {pixels.max().item()}  # the edge goes on
    grey = augment(pixels / 2)
    assert ((grey > 0) & (grey < grey.max())).any()
    assert torch.equal(augment.eval()(pixels), pixels)
    assert torch.equal(RandomAffine(0)(pixels), pixels)
    assert augment.train()(pixels[:0]).shape == (0, 3, 40, 40)
    with pytest.raises(ValueError, match=r"augment=0\.9: expected a share from 0 to 0.5"):
        RandomAffine(0.9)


# ── Turns that do not see each other ──


def test_each_turn_is_answered_as_if_it_were_alone(dataset, processor):
    """Of a row with two images and three turns, one with one image, and one of text, which stays whole."""

    def turns(count: int) -> list[dict[str, str]]:
        said = [("What?", "a lazy dog"), ("How many shapes are there?", "lazy"), ("Hi", "red")][:count]
        return [
            {"role": role, "content": text} for turn in said for role, text in zip(("user", "assistant"), turn, strict=True)
        ]

    def conversation(images: int, count: int) -> dict:
        messages = turns(count)
        messages[0]["content"] = "<image>" * images + messages[0]["content"]
        return {"conversations": messages, "images": dataset[1]["images"][:images]}

    rows = list(tokenize_conversations(Dataset.from_list([conversation(2, 3), conversation(1, 1)]), processor))
    rows += list(tokenize_conversations(Dataset.from_list([{"conversations": turns(2), "images": []}]), processor))
    model = make_model()
    batch = MiniMindVCollator(processor, independent_turns=True)(rows)
    labels = batch.pop("labels")
    assert batch["attention_mask"].shape == (3, 1, labels.shape[1], labels.shape[1])
    logits = model(**batch).logits
    ids, spoken = batch["input_ids"][0], labels[0] != -100
    end = int((ids == processor.image_token_id).nonzero()[-1]) + 1
    stops = (spoken & ~torch.cat([spoken[1:], torch.tensor([False])])).nonzero().flatten() + 1
    assert len(stops) == 3
    for start, stop in zip([end, *stops[:-1]], stops, strict=True):
        alone = torch.cat([ids[:end], ids[start:stop]])[None]
        expected = model(alone, pixel_values=batch["pixel_values"][:2]).logits[0, end:]
        torch.testing.assert_close(logits[0, start:stop], expected, atol=1e-4, rtol=0)
    for row, pixels in ((1, batch["pixel_values"][2:]), (2, None)):
        whole = torch.tensor(rows[row]["input_ids"])[None]
        expected = model(whole, pixel_values=pixels).logits[0]
        torch.testing.assert_close(logits[row, : whole.shape[1]], expected, atol=1e-4, rtol=0)
    assert logits.isfinite().all()
