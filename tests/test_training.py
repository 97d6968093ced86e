"""Training: the native recipe to the letter, what is frozen, and runs that survive whatever happens to them."""

import io
import json
import math
import multiprocessing.connection
import multiprocessing.forkserver
import os
import pickle
import random
import re
import resource
import runpy
import shutil
import socket
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from conftest import MOE, RESNET, make_image, make_model, make_processor, make_tokenizer
from datasets import Dataset
from PIL import Image
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments
from transformers.trainer_callback import TrainerCallback

from minimind_v_hf import MiniMindForCausalLM, MiniMindVForConditionalGeneration, MiniMindVProcessor
from minimind_v_hf import head_minimind_v as modeling
from minimind_v_hf.data import MiniMindVCollator, load_conversations, pack, tokenize_conversations
from minimind_v_hf.hardware import matmul_rate
from minimind_v_hf.training import (
    TRAINABLE,
    MiniMindVTrainer,
    RunArguments,
    SampleSheet,
    StageArguments,
    cache_features,
    checkpoint_to_resume,
    checkpoints,
    encoder_digest,
    freeze,
    load_checkpoint,
    load_data,
    load_start,
    native_recipe,
    parameter_table,
    parse_arguments,
    training_flops,
)
from minimind_v_hf.training.muon import MuonWithAdamW, orthogonalized


ROOT = Path(__file__).parents[1]
COLOURS = ("red", "green", "blue", "yellow")
ROWS, BATCH, RATE = 24, 4, 3e-3
SETTINGS = {
    "learning_rate": RATE,
    "per_device_train_batch_size": BATCH,
    "num_train_epochs": 2,
    "logging_steps": 1,
    "save_steps": 4,
    "save_total_limit": None,
    "report_to": "none",
    "dataloader_num_workers": 0,
    "use_cpu": True,
    "bf16": False,
}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with a model to start from, rows about plain images and rows of text alone, and a file of arguments."""
    home = tmp_path_factory.mktemp("training")
    torch.manual_seed(0)
    make_model().save_pretrained(home / "start")
    make_processor().save_pretrained(home / "start")
    (home / "images").mkdir()
    rng = random.Random(0)
    with open(home / "train.jsonl", "w") as file:
        for number in range(ROWS):
            colour = rng.choice(COLOURS)
            make_image(colour).save(home / "images" / f"{number}.png")
            question, image = "<image>\nWhat colour is it?", {"image": f"{number}.png"}
            if number % 5 == 3:
                question, image = f"Say {colour}.", {}
            answer = colour + "!" * rng.randint(0, 8)
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"conversations": turns, **image}) + "\n")
    recipe = {
        "model": str(home / "start"),
        "data_files": [str(home / "train.jsonl")],
        "image_folder": str(home / "images"),
        **SETTINGS,
    }
    (home / "recipe.json").write_text(json.dumps(recipe))
    return home


@pytest.fixture(scope="module")
def rows(home):
    conversations = load_conversations(home / "train.jsonl", home / "images")
    return tokenize_conversations(conversations, make_processor(), 640)


OURS = ("save_encoder", "callbacks", "eval_dataset", "augment", "muon", "encoder_learning_rate")


def make_trainer(home, rows, output_dir, trainable="llm", model=None, trainer_class=MiniMindVTrainer, **kwargs):
    model = model or MiniMindVForConditionalGeneration.from_pretrained(home / "start")
    freeze(model, trainable)
    ours = {name: kwargs.pop(name) for name in OURS if name in kwargs}
    arguments = native_recipe() | {
        "output_dir": str(output_dir),
        "disable_tqdm": True,
        **SETTINGS,
    }
    processor = make_processor()
    return trainer_class(
        model=model,
        args=TrainingArguments(**arguments | kwargs),
        data_collator=MiniMindVCollator(processor),
        train_dataset=rows,
        processing_class=processor,
        **ours,
    )


def losses(trainer_or_folder) -> list[float]:
    if isinstance(trainer_or_folder, Trainer):
        history = trainer_or_folder.state.log_history
    else:
        last = max(Path(trainer_or_folder).glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
        history = json.loads((last / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "learning_rate" in entry]


@pytest.fixture(scope="module")
def uninterrupted(home, rows, tmp_path_factory) -> list[float]:
    """The losses of twelve steps in one process that nobody disturbs."""
    trainer = make_trainer(home, rows, tmp_path_factory.mktemp("uninterrupted"), save_strategy="no")
    trainer.train()
    assert len(losses(trainer)) == 12
    return losses(trainer)


# ── What learns ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_decoder_with_other_names_is_refused_with_the_cause():
    model = make_model({"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 320})
    with pytest.raises(ValueError, match="GPT2Model has no `layers` and `norm`"):
        freeze(model, "projector")


@pytest.mark.parametrize("trainable", TRAINABLE)
def test_what_is_trainable_moves_and_nothing_else(home, rows, tmp_path, trainable):
    model = make_model({"num_hidden_layers": 3})
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer = make_trainer(home, rows, tmp_path, trainable, model=model, max_steps=2, save_strategy="no")
    trainer.train()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    expected = {
        "projector": ("model.multi_modal_projector.",),
        "projector+last": ("model.multi_modal_projector.", "model.language_model.layers.2."),
        "projector+first_last": (
            "model.multi_modal_projector.",
            "model.language_model.layers.0.",
            "model.language_model.layers.2.",
        ),
        "llm": ("model.multi_modal_projector.", "model.language_model."),
        "all": ("model.",),
    }[trainable]
    # CLIP's last norm belongs to its pooled output, which nothing uses; a bias of the keys changes no attention
    unused = {name for name in before if "post_layernorm" in name}
    assert moved - unused == {name for name in before if name.startswith(expected)} - unused
    encoder_modes = {module.training for module in model.model.vision_tower.modules()}
    assert encoder_modes == {trainable == "all"}
    assert model.model.language_model.training


def test_a_frozen_encoder_leaves_no_graph():
    model = make_model().train()
    pixels = torch.rand(1, 3, 16, 16)
    freeze(model, "llm")
    assert model.get_image_features(pixels).last_hidden_state.grad_fn is None
    assert model.get_image_features(pixels).pooler_output.grad_fn is not None  # the projector learns
    freeze(model, "all")
    assert model.get_image_features(pixels).last_hidden_state.grad_fn is not None
    freeze(model, "llm")
    model.get_image_features(pixels.requires_grad_()).pooler_output.sum().backward()  # someone asks what the pixels do
    assert pixels.grad.abs().sum() > 0


def test_the_parameter_table_adds_up():
    model = make_model()
    freeze(model, "projector+last")
    *_, total = parameter_table(model).splitlines()
    counts = [int(number.replace(",", "")) for number in total.split()[1:]]
    assert sum(counts) == model.num_parameters()
    assert counts[0] == sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    with pytest.raises(ValueError, match="trainable='llms': expected one of projector, projector\\+last"):
        freeze(model, "llms")


# ── Loss ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def batch(rows):
    return MiniMindVCollator(make_processor())([rows[i] for i in range(8)])


@pytest.mark.parametrize("most", [2**25, 10 * 320], ids=["at once", "in chunks"])
@pytest.mark.parametrize("moe", [None, MOE], ids=["dense", "moe"])
@pytest.mark.parametrize("num_items", [None, torch.tensor(77)])
def test_logits_at_labels_alone_give_the_same_loss(batch, monkeypatch, most, moe, num_items):
    monkeypatch.setattr(modeling, "MAX_LOGITS", most)
    model = make_model(moe).train()
    kwargs = {} if num_items is None else {"num_items_in_batch": num_items}
    whole = model(**batch, **kwargs)
    whole.loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    positions = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: positions.append(output[..., 0].numel()))
    alone = model(**batch, **kwargs, skip_logits=True)
    alone.loss.backward()
    assert alone.logits is None
    assert max(positions) <= most // 320
    labelled = int((batch["labels"][:, 1:] != -100).sum())
    assert sum(positions) == (labelled if most > 10_000 else 2 * labelled)  # forward, and again in backward
    torch.testing.assert_close(alone.loss, whole.loss, atol=1e-6, rtol=1e-6)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-6, rtol=1e-4)


def test_a_batch_without_labels_teaches_nothing(batch):
    model = make_model().train()
    loss = model(**batch | {"labels": torch.full_like(batch["labels"], -100)}, skip_logits=True).loss
    loss.backward()
    assert loss == 0
    assert all(parameter.grad.abs().sum() == 0 for parameter in model.parameters() if parameter.grad is not None)


@pytest.mark.parametrize("moe", [None, MOE], ids=["dense", "moe"])
def test_the_loss_curve_is_that_of_a_plain_loop(home, rows, tmp_path, moe):
    """MiniMind-V's loop, by hand: mean loss of each batch, AdamW on everything, norm clipped at 1, a cosine to a tenth.

    Its steps count from 1: the first rate is a little below the peak, and the last one is the tenth.
    """
    torch.manual_seed(1)
    start = make_model(moe).state_dict()
    ours = make_model(moe)
    ours.load_state_dict(start)
    trainer = make_trainer(home, rows, tmp_path, "llm", model=ours, save_strategy="no", train_sampling_strategy="sequential")
    trainer.train()

    model = make_model(moe)
    model.load_state_dict(start)
    model.train()
    model.model.vision_tower.requires_grad_(False).eval()
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=RATE, weight_decay=0.01)
    loader = DataLoader(rows, batch_size=BATCH, collate_fn=MiniMindVCollator(make_processor()))
    step, steps, expected, rates = 0, 2 * len(loader), [], []
    for _ in range(2):
        for batch in loader:
            step += 1
            rates.append(RATE * (0.1 + 0.45 * (1 + math.cos(math.pi * step / steps))))
            optimizer.param_groups[0]["lr"] = rates[-1]
            loss = model(**batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(learning, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            expected.append(loss.item())
    assert rates[-1] == pytest.approx(RATE / 10)
    assert losses(trainer) == pytest.approx(expected, abs=2e-5)
    assert expected[-1] < expected[0] - 0.5
    logged = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    shift = 0 if logged[0] == pytest.approx(rates[0]) else 1  # or that of the step to come
    assert logged[: len(rates) - shift] == pytest.approx(rates[shift:], rel=1e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(ours.get_parameter(name), parameter, atol=1e-4, rtol=1e-3, msg=name)


@pytest.mark.parametrize("moe", [None, MOE], ids=["dense", "moe"])
def test_accumulated_steps_are_those_of_the_whole_batch(home, rows, tmp_path, moe):
    # Rows of one length: an auxiliary loss counts padding too, which differs between a batch and its parts
    alike = rows.filter(lambda row: len(row["input_ids"]) == len(rows[0]["input_ids"])).select([0] * 3 + [1] * 5)
    curves = []
    for size in (8, 2):
        torch.manual_seed(1)
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size, "num_train_epochs": 4}
        options |= {"train_sampling_strategy": "sequential", "save_strategy": "no"}
        trainer = make_trainer(home, alike, tmp_path, model=make_model(moe), **options)
        trainer.train()
        curves.append([(entry["loss"], entry["language_loss"]) for entry in trainer.state.log_history if "loss" in entry])
    assert len(curves[0]) == 4
    torch.testing.assert_close(torch.tensor(curves[0]), torch.tensor(curves[1]), atol=1e-5, rtol=1e-5)


def test_packed_rows_cost_the_same_as_samples_alone(home, rows, tmp_path):
    """One step over all rows: packed, the same labels are learned, from the same contexts."""
    curves = []
    for data in (rows, pack(rows, 300)):
        trainer = make_trainer(home, data, tmp_path, max_steps=1, per_device_train_batch_size=len(data), save_strategy="no")
        trainer.train()
        curves.append(trainer.state.log_history[0])
    alone, packed = curves
    assert packed["loss"] == pytest.approx(alone["loss"], abs=1e-5)
    assert packed["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-4)
    assert packed["supervised_share"] == pytest.approx(alone["supervised_share"])
    assert packed["images_per_second"] > 0


def test_packed_rows_that_flash_attention_would_mix_are_refused(home, rows, tmp_path):
    trainer = make_trainer(home, pack(rows, 300), tmp_path)
    trainer.model.config.text_config._attn_implementation = "flash_attention_2"
    packed = [trainer.train_dataset[i] for i in range(2)]
    with pytest.raises(ValueError, match=r"flash_attention_2 keeps packed samples apart only in batches of one row, .* has 2"):
        trainer.compute_loss(trainer.model, trainer.data_collator(packed))


def test_weights_that_are_sharded_already_are_refused(home, rows, tmp_path):
    model = make_model()
    model.lm_head.weight.ds_id = 0  # what DeepSpeed marks them with
    with pytest.raises(ValueError, match=r"sharded already \(ZeRO-3\), .* `load_start`"):
        make_trainer(home, rows, tmp_path, model=model)


def test_label_smoothing_is_refused(home, rows, tmp_path):
    with pytest.raises(ValueError, match=r"label_smoothing_factor=0.1: expected 0"):
        make_trainer(home, rows, tmp_path, label_smoothing_factor=0.1)


def test_checkpoints_are_not_pushed(home, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(MiniMindVTrainer, "init_hf_repo", lambda self: None)
    with pytest.raises(ValueError, match=r"hub_strategy=every_save: expected 'end'"):
        make_trainer(home, rows, tmp_path, push_to_hub=True, hub_strategy="every_save")
    make_trainer(home, rows, tmp_path, push_to_hub=True)


# ── Metrics ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_metrics_are_what_they_say(home, rows, tmp_path):
    trainer = make_trainer(
        home, rows, tmp_path, model=make_model(MOE), logging_steps=6, train_sampling_strategy="sequential", save_strategy="no"
    )
    trainer.train()
    entry = trainer.state.log_history[0]
    collated = list(DataLoader(rows, batch_size=BATCH, collate_fn=MiniMindVCollator(make_processor())))
    tokens = sum(int(batch["attention_mask"].sum()) for batch in collated)
    positions = sum(batch["input_ids"].numel() for batch in collated)
    labels = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in collated)
    images = sum(len(batch["pixel_values"]) for batch in collated)
    assert entry["supervised_share"] == pytest.approx(labels / tokens)
    assert entry["padding_share"] == pytest.approx(1 - tokens / positions)
    assert entry["tokens_per_second"] / entry["images_per_second"] == pytest.approx(tokens / images)
    assert entry["samples_per_second"] / entry["images_per_second"] == pytest.approx(ROWS / images)
    assert entry["language_loss"] + entry["aux_loss"] == pytest.approx(entry["loss"], abs=1e-5)
    assert 0 < entry["aux_loss"] < 0.1
    assert 0 < entry["mfu"] < 1


def test_flops_of_a_step_are_those_that_torch_counts():
    """With one sample of one image and all positions labelled, for which the formula allows no discount."""
    from torch.utils.flop_counter import FlopCounterMode

    model = make_model(attn_implementation="eager").train()
    batch = MiniMindVCollator(make_processor())(
        [{"input_ids": [190] * 16 + [5] * 24, "labels": [5] * 40, "images": [make_image()]}]
    )
    batch["input_ids"][0, :16] = model.config.image_token_id
    for trainable in ("projector", "llm", "all"):
        freeze(model, trainable)
        with FlopCounterMode(display=False) as counter:
            model(**batch).loss.backward()
        flops = training_flops(model)
        # torch counts the full square of the attention, the head at the last position too, and the class token's part
        counted = flops["token"] * 40 + flops["pair"] * 40 * 40 + flops["label"] * 40 + flops["image"]
        assert counted == pytest.approx(counter.get_total_flops(), rel=0.05), trainable
    assert matmul_rate(torch.device("cpu"), torch.float32) > 1e8


def test_the_operations_of_a_convolutional_encoder():
    """A stem of 7 x 7 on 8 x 8 places, two convolutions on 4 x 4, and on 2 x 2 two more and a shortcut."""
    model = make_model(vision_config=RESNET, text_config={"hidden_size": 8})
    model.requires_grad_(False)
    convolutions = 64 * 4 * 3 * 49 + 2 * 16 * 4 * 4 * 9 + 4 * (6 * 4 * 9 + 6 * 6 * 9 + 6 * 4)
    projector = 4 * 6 * 8
    assert training_flops(model)["image"] == 2 * (convolutions + projector)


@pytest.mark.parametrize("shape", [(16, 40), (40, 16), (24, 24)])
def test_muon_orthogonalizes(shape):
    """Directions stay, and all are about as strong: the strongest of these is 1000 times the weakest."""
    torch.manual_seed(0)
    left, _, right = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    result = orthogonalized(left @ torch.diag(torch.logspace(0, -3, len(right))) @ right)
    assert result.dtype == torch.float32
    strengths = left.T @ result @ right.T
    torch.testing.assert_close(strengths, strengths.diag().diag(), rtol=0, atol=1e-4)
    assert strengths.diag()[: len(right) // 2].min() > 0.6
    assert strengths.diag().max() < 1.3


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has Muon since 2.9")
def test_muon_steps_as_torch_has_it_and_adamw_for_the_rest():
    """Linear layers and flattened convolutions by Muon, embeddings, head and norms by AdamW, the encoder at its own rate."""
    model = make_model(vision_config=RESNET, text_config={"num_hidden_layers": 1})
    inner = model.model
    inner.language_model.norm.requires_grad_(False)
    muon = {
        "language_model.layers.0.mlp.up_proj.weight": 1e-3,
        "multi_modal_projector.linear_1.weight": 1e-3,
        "vision_tower.embedder.embedder.convolution.weight": 4e-3,
    }
    adamw = {
        "language_model.embed_tokens.weight": 1e-3,
        "language_model.layers.0.input_layernorm.weight": 1e-3,
        "vision_tower.embedder.embedder.normalization.weight": 4e-3,
    }
    expected, theirs = {}, []
    for rates, kind, options in (
        (muon, torch.optim.Muon, {"adjust_lr_fn": "match_rms_adamw"}),
        (adamw, torch.optim.AdamW, {"betas": (0.9, 0.99), "eps": 1e-8}),
    ):
        for name, rate in rates.items():
            expected[name] = inner.get_parameter(name).detach().clone()
            if kind is torch.optim.Muon:
                expected[name] = expected[name].flatten(1)
            theirs.append((name, kind([expected[name]], lr=rate, weight_decay=0.1, **options)))
    optimizer = MuonWithAdamW(model, 1e-3, 4e-3, 0.1, (0.9, 0.99), 1e-8)
    for seed in range(3):
        torch.manual_seed(seed)
        for name, parameter in inner.named_parameters():
            parameter.grad = torch.randn_like(parameter) if parameter.requires_grad else None
            if name in expected:
                expected[name].grad = parameter.grad.view_as(expected[name])
        optimizer.step()
        for _, other in theirs:
            other.step()
        if seed == 1:
            state = torch.load(io.BytesIO(saved(optimizer.state_dict())), weights_only=True)
            optimizer = MuonWithAdamW(model, 1e-3, 4e-3, 0.1, (0.9, 0.99), 1e-8)
            optimizer.load_state_dict(state)
    for name, weight in expected.items():
        # torch's Muon computes in bfloat16; a step of it changes a weight by about 2e-4, or 8e-4 in the encoder
        error = 2e-6 if name in adamw else 0.05 * muon[name]
        torch.testing.assert_close(inner.get_parameter(name).view_as(weight), weight, rtol=0, atol=error)
    assert inner.language_model.norm.weight.eq(1).all()
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in model.parameters())


def saved(state: dict) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def test_muon_follows_the_schedule_and_goes_on_after_an_interruption(home, rows, tmp_path):
    options = {"muon": True, "encoder_learning_rate": 2 * RATE, "trainable": "all", "max_steps": 8}
    whole = make_trainer(home, rows, tmp_path / "whole", **options)
    whole.train()
    rates = {group["lr"] for group in whole.optimizer.param_groups}
    assert sorted(rates) == pytest.approx([0.00040276, 0.00080553], rel=1e-4)
    resumed = make_trainer(home, rows, tmp_path / "resumed", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert losses(resumed) == losses(whole)
    adamw = make_trainer(home, rows, tmp_path / "adamw", **options | {"muon": False, "encoder_learning_rate": None})
    adamw.train()
    assert losses(adamw)[0] == losses(whole)[0]
    assert losses(adamw)[-1] != losses(whole)[-1]
    with pytest.raises(ValueError, match="bf16 instead of fp16"):
        make_trainer(home, rows, tmp_path / "fp16", fp16=True, **options)


def test_held_out_rows_are_answered_on_a_sheet(home, rows, tmp_path):
    conversations = load_conversations(home / "train.jsonl", home / "images")
    sheet = SampleSheet([conversations[i] for i in range(5)], make_processor())
    options = {"eval_dataset": rows.select(range(6)), "eval_strategy": "steps", "eval_steps": 2, "callbacks": [sheet]}
    options |= {"per_device_eval_batch_size": 4}
    trainer = make_trainer(home, rows, tmp_path, max_steps=2, save_strategy="no", **options)
    trainer.train()
    assert (tmp_path / "samples" / "step-000002.png").read_bytes().startswith(b"\x89PNG")
    # The mean over all labels, of whichever batches
    expected = mean_loss(trainer.model, rows.select(range(6)))
    assert trainer.state.log_history[-2]["eval_loss"] == pytest.approx(expected, abs=1e-5)
    trainer.compute_metrics = lambda prediction: {}  # which wants the logits
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, abs=1e-5)
    assert trainer._held_out.dtype == torch.float64


def test_samples_are_drawn_from_a_zip_archive_and_without_a_question(home, tmp_path):
    archive = tmp_path / "images.zip"
    with zipfile.ZipFile(archive, "w") as file:
        make_image("red").save(tmp_path / "a.png")
        file.write(tmp_path / "a.png", "a.png")
    data = tmp_path / "held_out.jsonl"
    answers = [{"role": "assistant", "content": "red"}]
    asked = {"conversations": [{"role": "user", "content": "<image>\nWhich colour?"}, *answers], "image": "a.png"}
    data.write_text(json.dumps(asked) + "\n" + json.dumps({"conversations": answers}) + "\n")
    sheet = SampleSheet(load_conversations(data, archive), make_processor())
    state = SimpleNamespace(is_world_process_zero=True, global_step=7)
    assert [row["conversations"][-1]["content"] for row in sheet.rows] == ["red"]
    sheet.on_evaluate(SimpleNamespace(output_dir=tmp_path), state, None, model=make_model())
    assert (tmp_path / "samples" / "step-000007.png").read_bytes().startswith(b"\x89PNG")


# ── Checkpoints ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_light_checkpoints_leave_the_encoder_out_and_get_it_back(home, rows, tmp_path):
    trainer = make_trainer(home, rows, tmp_path, max_steps=4)
    trainer.train()
    light = load_file(tmp_path / "checkpoint-4" / "model.safetensors")
    assert not any("vision_tower" in name for name in light)
    trained = trainer.model.state_dict()
    for encoder in (None, home / "start", trainer.model):
        loaded = load_checkpoint(tmp_path / "checkpoint-4", encoder).state_dict()
        assert loaded.keys() == trained.keys()
        assert all(torch.equal(loaded[name], trained[name]) for name in trained)
    (tmp_path / "checkpoint-1").mkdir()
    with pytest.raises(ValueError, match=r"checkpoint-1 is no complete checkpoint: it has no minimind_v_run.json"):
        load_checkpoint(tmp_path / "checkpoint-1")
    for auto in (AutoModelForImageTextToText, MiniMindVForConditionalGeneration):  # not with an encoder of random weights
        with pytest.raises(ValueError, match=r"without its image encoder: load it with .*load_checkpoint"):
            auto.from_pretrained(tmp_path / "checkpoint-4")
    with pytest.raises(ValueError, match="other weights than the one that it was trained with"):
        load_checkpoint(tmp_path / "checkpoint-4", make_model())
    with pytest.raises(ValueError, match="other weights than the one that it was trained with"):
        make_trainer(home, rows, tmp_path, model=make_model()).train(resume_from_checkpoint=True)

    make_trainer(home, rows, tmp_path / "whole", max_steps=4, save_encoder=True).train()
    whole = MiniMindVForConditionalGeneration.from_pretrained(tmp_path / "whole" / "checkpoint-4").state_dict()
    assert all(torch.equal(whole[name], trained[name]) for name in trained)


def test_the_best_light_checkpoint_is_loaded_at_the_end(home, rows, tmp_path):
    options = {"eval_dataset": rows.select(range(6)), "eval_strategy": "steps", "eval_steps": 4, "load_best_model_at_end": True}
    trainer = make_trainer(home, rows, tmp_path, learning_rate=0.5, max_steps=8, **options)  # gets worse and worse
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best == str(tmp_path / f"checkpoint-{trainer.state.best_global_step}")
    assert json.loads((Path(best) / "trainer_state.json").read_text())["best_model_checkpoint"] == best
    loaded = load_checkpoint(best).state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in trainer.model.state_dict().items())


def test_a_resumed_run_keeps_its_batches_of_like_length(home, rows, tmp_path):
    whole = make_trainer(home, rows, tmp_path, train_sampling_strategy="group_by_length")
    whole.train()
    resumed = make_trainer(home, rows, tmp_path, train_sampling_strategy="group_by_length", save_strategy="no")
    resumed.train(resume_from_checkpoint=tmp_path / "checkpoint-8")
    assert losses(resumed) == pytest.approx(losses(whole), abs=1e-5)


def test_a_resumed_run_keeps_its_batches(home, rows, tmp_path, uninterrupted):
    trainer = make_trainer(home, rows, tmp_path, callbacks=[StopAt(6)], save_steps=5)
    trainer.train()
    other = make_trainer(home, rows, tmp_path, per_device_train_batch_size=2)
    other.train(resume_from_checkpoint=True)
    assert other.args.gradient_accumulation_steps == 2
    assert losses(other) == pytest.approx(uninterrupted, abs=2e-5)
    with pytest.raises(ValueError, match="was trained with 4 samples in a step"):
        make_trainer(home, rows, tmp_path, per_device_train_batch_size=3).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="no complete checkpoint"):
        make_trainer(home, rows, tmp_path / "empty").train(resume_from_checkpoint=True)
    other = make_trainer(home, rows, tmp_path)
    other.processing_class = make_processor(tokenizer=make_tokenizer(300))  # as of other rows
    with pytest.raises(ValueError, match="checkpoint-5 was trained with another tokenizer than this run's"):
        other.train(resume_from_checkpoint=tmp_path / "checkpoint-5")
    other.processing_class = make_processor()
    other.processing_class.image_processor.image_mean = [0.9, 0.9, 0.9]
    with pytest.raises(ValueError, match="checkpoint-5 was trained with another mean or deviation of the images"):
        other.train(resume_from_checkpoint=tmp_path / "checkpoint-5")


def test_a_streamed_run_goes_on_where_it_was(home, tmp_path):
    """Also in its second pass over the data."""
    run = RunArguments(data_files=[str(home / "train.jsonl")], image_folder=str(home / "images"), streaming=True)

    def trained(folder, *callbacks, resume=None):
        args = TrainingArguments(output_dir=str(folder), use_cpu=True, seed=3)
        stream = load_data(run, args, make_processor()).train
        trainer = make_trainer(home, stream, folder, max_steps=12, callbacks=list(callbacks))
        trainer.train(resume_from_checkpoint=resume)
        return losses(trainer)

    expected = trained(tmp_path / "whole")
    assert len(expected) == 12
    trained(tmp_path / "parts", StopAt(9))
    assert trained(tmp_path / "parts", resume=True) == pytest.approx(expected, abs=1e-6)


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


class FillDisk(TrainerCallback):
    """From a step on, no file may grow beyond a few kilobytes."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 8:
            resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def test_a_full_disk_leaves_the_last_checkpoint(home, rows, tmp_path, uninterrupted):
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(OSError, match=r"(?i)checkpoint-8 could not .*file too large.*checkpoint-4 is saved, and"):
            make_trainer(home, rows, tmp_path, callbacks=[FillDisk()]).train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-4", "_run.lock"}
    trainer = make_trainer(home, rows, tmp_path)
    trainer.train(resume_from_checkpoint=True)
    assert losses(trainer) == pytest.approx(uninterrupted, abs=1e-6)


def test_a_full_disk_is_called_one(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda folder: SimpleNamespace(free=4096))
    with (
        pytest.raises(OSError, match=r"checkpoint-4 could not be written, the disk is full: .*No space left"),
        checkpoints.explained_failure(tmp_path / "checkpoint-4", str(tmp_path), is_writer=True),
    ):
        raise RuntimeError("No space left on device")


@pytest.fixture(scope="module")
def two_checkpoints(home, rows, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints") / "run"
    make_trainer(home, rows, folder, max_steps=8).train()
    return folder


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def spoil(path: Path) -> None:
    path.write_bytes(bytes(byte ^ 255 for byte in path.read_bytes()))


@pytest.mark.parametrize("harm", [cut, spoil, Path.unlink], ids=["cut", "spoiled", "missing"])
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(two_checkpoints, tmp_path, monkeypatch, name, harm):
    warned = []
    monkeypatch.setattr(checkpoints.logger, "warning", warned.append)
    folder = tmp_path / "run"
    shutil.copytree(two_checkpoints, folder)
    args = TrainingArguments(output_dir=str(folder), use_cpu=True)
    assert checkpoint_to_resume(args) == str(folder / "checkpoint-8")
    harm(folder / "checkpoint-8" / name)
    assert checkpoint_to_resume(args) == str(folder / "checkpoint-4")
    (warning,) = warned
    what = "missing" if harm is Path.unlink else "damaged"
    assert f"{folder / 'checkpoint-8' / name} is {what}: resume from another checkpoint." in warning
    args.resume_from_checkpoint = str(folder / "checkpoint-8")
    with pytest.raises(ValueError, match=f"checkpoint-8/{name} is"):
        checkpoint_to_resume(args)
    spoil(folder / "checkpoint-4" / "minimind_v_run.json")
    args.resume_from_checkpoint = None
    with pytest.raises(ValueError, match=f"No checkpoint in .* can be used: .*checkpoint-8/{name} is"):
        checkpoint_to_resume(args)


def test_a_checkpoint_without_its_optimizer_is_not_resumed(home, rows, tmp_path):
    make_trainer(home, rows, tmp_path, max_steps=4, save_only_model=True).train()
    with pytest.raises(ValueError, match=r"checkpoint-4 has no optimizer"):
        make_trainer(home, rows, tmp_path).train(resume_from_checkpoint=True)


def test_a_run_that_was_killed_after_its_last_step_takes_none_more(home, rows, two_checkpoints, tmp_path):
    shutil.copytree(two_checkpoints, tmp_path / "run")
    mark = tmp_path / "run" / "checkpoint-8" / "minimind_v_run.json"
    mark.write_text(json.dumps(json.loads(mark.read_text()) | {"seconds": 1000.0}))
    trainer = make_trainer(home, rows, tmp_path / "run", max_steps=8)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 8
    assert len(losses(trainer)) == 8
    trainer.save_model()
    trainer.create_model_card()
    # And its card counts the time of all its parts
    assert re.search(r"\| training time \| 10\d\d s \|", (tmp_path / "run" / "README.md").read_text())


def test_fewer_steps_than_a_checkpoint_has_are_warned_of(home, rows, two_checkpoints, tmp_path, caplog):
    shutil.copytree(two_checkpoints, tmp_path / "run")
    trainer = make_trainer(home, rows, tmp_path / "run", max_steps=5)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 8
    assert re.search(r"Nothing is left to train: .*checkpoint-8 has 8 steps, and 5 are asked for", caplog.text)


def test_two_runs_do_not_share_a_folder(tmp_path):
    """Not even after a crash: the lock ends with its process."""
    code = (
        "import sys\n"
        "from minimind_v_hf.training.checkpoints import claim_output_dir\n"
        "claim_output_dir(sys.argv[1])\n"
        "print('held', flush=True)\n"
        "sys.stdin.read()\n"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    with other:
        try:
            assert other.stdout.readline() == "held\n"
            with pytest.raises(ValueError, match=f"Another run is writing into {tmp_path}"):
                checkpoint_to_resume(args)
        finally:
            other.kill()
    assert checkpoint_to_resume(args) is None
    assert checkpoint_to_resume(args) is None  # once more in the same process


class Interrupt(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 6:
            raise KeyboardInterrupt


def test_an_interrupted_run_says_what_is_saved(home, rows, tmp_path):
    with pytest.raises(KeyboardInterrupt, match="checkpoint-4 is saved, and the same command goes on from there"):
        make_trainer(home, rows, tmp_path, callbacks=[Interrupt()]).train()
    with pytest.raises(KeyboardInterrupt, match="No checkpoint is saved yet: the same command starts from the beginning"):
        make_trainer(home, rows, tmp_path / "other", callbacks=[Interrupt()], save_strategy="no").train()


# ── The scripts, as real processes ───────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def launch(home):
    """Starts an example script with the file of arguments, in processes that have imported everything already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["minimind_v_hf.training"])
    saved = {name: os.environ.get(name) for name in ("PYTHONPATH", "HF_DATASETS_CACHE")}
    # The folder of a script is on the path of whoever starts it
    os.environ |= {
        "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "examples"))),
        "HF_DATASETS_CACHE": str(home / "cache"),
    }  # for the server, which starts now
    multiprocessing.forkserver.ensure_running()
    for name, value in saved.items():
        os.environ.pop(name)
        os.environ |= {} if value is None else {name: value}

    def start(output_dir, *arguments, processes=1, before=(), environment=None, script="sft.py", recipe="recipe.json"):
        argv = [*before, ROOT / "examples" / script, home / recipe, "--output_dir", output_dir, *arguments]
        with socket.create_server(("127.0.0.1", 0)) as server:
            common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": server.getsockname()[1], "WORLD_SIZE": processes}
        log = home / f"log-{time.monotonic_ns()}"
        running = []
        for rank in range(processes):
            ranks = common | {"RANK": rank, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": processes} if processes > 1 else {}
            variables = {name: str(value) for name, value in (ranks | (environment or {})).items()}
            running.append(context.Process(target=run_script, args=([*map(str, argv)], variables, log)))
            running[-1].start()
        codes = []
        while running:
            if not multiprocessing.connection.wait([process.sentinel for process in running], timeout=600):
                running[0].kill()
                running[0].join()
            for process in [process for process in running if not process.is_alive()]:
                running.remove(process)
                codes.append(process.exitcode)
                if process.exitcode:  # the others would wait for it
                    for other in running:
                        other.kill()
        return SimpleNamespace(returncode=next(filter(None, codes), 0), output=log.read_text())

    return start


def run_script(argv: list[str], environment: dict[str, str], log: Path) -> None:
    """What a process of `launch` does."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ |= environment
    sys.argv = argv
    runpy.run_path(argv[0], run_name="__main__")


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("pretrain.py", ["--data_files", "{tmp}/none.jsonl"], "none.jsonl"),
        ("pretrain.py", ["--data_files", "{tmp}/bad.jsonl", "--strict"], "bad.jsonl"),
        ("pretrain.py", ["--model", "{tmp}/none"], "none"),
        ("sft.py", ["--model", "{tmp}/empty"], "Cannot load {tmp}/empty: Error while deserializing header"),
        ("sft.py", ["--resume_from_checkpoint", "{tmp}/checkpoint-1"], "checkpoint-1 is unfinished, or of another trainer"),
        ("lora.py", ["--trainable", "llm"], "lora.py: error: unrecognized arguments: --trainable llm"),
        ("sft_trl.py", ["--save_encoder", "true"], "sft_trl.py: error: unrecognized arguments: --save_encoder true"),
        ("sft_trl.py", ["--output_dir", "{home}/start"], "start holds the model of a finished run"),
    ],
)
def test_what_a_user_can_mend_is_one_line_and_exit_code_2(home, launch, tmp_path, script, arguments, message):
    (tmp_path / "bad.jsonl").write_text('{"conversations": [}\n')
    shutil.copytree(home / "start", tmp_path / "empty")
    cut(tmp_path / "empty" / "model.safetensors")
    arguments = [argument.format(tmp=tmp_path, home=home) for argument in arguments]
    done = launch(tmp_path / "run", *arguments, script=script)
    assert done.returncode == 2, done.output
    assert "Traceback" not in done.output
    last = done.output.strip().splitlines()[-1]
    assert last.startswith(f"{script}: error: ")
    assert message.format(tmp=tmp_path) in last


INTERRUPTED = """
import os, runpy, signal, sys
from minimind_v_hf.training import MiniMindVTrainer

step = MiniMindVTrainer.training_step

def interrupted(self, *args, **kwargs):
    if self.state.global_step == 6:
        os.kill(os.getpid(), signal.SIGINT)
    return step(self, *args, **kwargs)

MiniMindVTrainer.training_step = interrupted
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_ctrl_c_says_what_is_saved_in_one_line(launch, tmp_path):
    driver = tmp_path / "interrupted.py"
    driver.write_text(INTERRUPTED)
    stopped = launch(tmp_path / "run", before=[driver])
    assert stopped.returncode == 130, stopped.output[-3000:]
    assert "Traceback" not in stopped.output
    saved = tmp_path / "run" / "checkpoint-4"
    assert f"sft.py: stopped. {saved} is saved, and the same command goes on from there.\n" in stopped.output


WITHOUT_EXTRAS = """
import runpy, sys
sys.modules |= {"matplotlib": None, "peft": None}
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("script", ["pretrain.py", "sft.py", "lora.py"])
def test_help_needs_no_optional_package(launch, tmp_path, script):
    """And a run says what to install, before it begins."""
    driver = tmp_path / "without_extras.py"
    driver.write_text(WITHOUT_EXTRAS)
    helped = launch(tmp_path / "run", "--help", before=[driver], script=script)
    assert helped.returncode == 0, helped.output
    assert "--data_files" in helped.output
    refused = launch(tmp_path / "run", before=[driver], script=script)
    module, extra = ("peft", "lora") if script == "lora.py" else ("matplotlib", "train")
    assert refused.returncode == 2, refused.output
    assert f'{script}: error: this script needs {module}: pip install -e ".[{extra}]"\n' in refused.output


def test_the_scripts_of_both_stages_differ_in_their_recipe_alone():
    def rest(script: str) -> tuple[str, str]:
        text = (ROOT / "examples" / script).read_text()
        before, recipe = text.split("RECIPE = {", 1)
        return before.split('"""', 2)[2], recipe.split("}", 1)[1]

    assert rest("sft.py") == rest("pretrain.py")


KILLED_WHILE_SAVING = """
import os, runpy, signal, sys
import torch

save = torch.save

def save_half(state, path, *args, **kwargs):
    save(state, path, *args, **kwargs)
    if "checkpoint-8" in str(path) and "optimizer" in str(path):
        with open(path, "r+b") as file:
            file.truncate(1000)
        os.kill(os.getpid(), signal.SIGKILL)

torch.save = save_half
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_killed_in_two_processes_and_resumed_in_one(home, launch, tmp_path, uninterrupted):
    driver = tmp_path / "killed_while_saving.py"
    driver.write_text(KILLED_WHILE_SAVING)
    output = tmp_path / "run"
    killed = launch(output, "--per_device_train_batch_size", 2, processes=2, before=[driver])
    assert killed.returncode == -9, killed.output[-3000:]
    assert (output / "checkpoint-8" / "optimizer.pt").stat().st_size == 1000
    assert [path.parent.name for path in output.glob("checkpoint-*/minimind_v_run.json")] == ["checkpoint-4"]
    # As a user would, in one process of its own
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", str(ROOT / "examples" / "sft.py")]
    command += [str(home / "recipe.json"), "--output_dir", str(output), "--per_device_train_batch_size", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_DATASETS_CACHE": str(home / "cache")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"Going on from {output / 'checkpoint-4'}" in done.stdout
    assert losses(output) == pytest.approx(uninterrupted, abs=2e-5)
    card = (output / "README.md").read_text()
    assert "| samples in a step | 4 |" in card
    assert (output / "model.safetensors").stat().st_mode == (output / "README.md").stat().st_mode  # not for the owner alone
    assert f"{ROWS} of {ROWS} rows" in card
    with pytest.raises(ValueError, match="holds the model of a finished run"):
        checkpoint_to_resume(TrainingArguments(output_dir=str(output), use_cpu=True))
    # The folder needs nothing else
    code = "from transformers import AutoModel; print(AutoModel.from_pretrained('.', trust_remote_code=True).num_parameters())"
    alone = subprocess.run([sys.executable, "-I", "-c", code], cwd=output, capture_output=True, text=True, check=False)
    assert int(alone.stdout) == make_model().num_parameters(), alone.stderr[-2000:]


def test_muon_in_two_processes_has_the_losses_of_one(home, rows, launch, tmp_path):
    alone = make_trainer(home, rows, tmp_path / "alone", muon=True, trainable="all", save_strategy="no")
    alone.train()
    options = ["--muon", "true", "--trainable", "all", "--per_device_train_batch_size", BATCH // 2]
    done = launch(tmp_path / "run", *options, processes=2)
    assert done.returncode == 0, done.output[-3000:]
    assert losses(tmp_path / "run") == pytest.approx(losses(alone), abs=1e-4)
    assert "Muon, and AdamW for what is no matrix" in (tmp_path / "run" / "README.md").read_text()
    with pytest.raises(ValueError, match="was written with Muon, and its optimizer cannot be read with nothing sharded"):
        make_trainer(home, rows, tmp_path / "other").train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))


def test_the_best_checkpoint_is_loaded_in_two_processes(home, launch, tmp_path):
    done = launch(
        tmp_path,
        *("--learning_rate", 0.5, "--max_steps", 8, "--per_device_train_batch_size", 2, "--load_best_model_at_end", "true"),
        *("--eval_files", home / "train.jsonl", "--eval_strategy", "steps", "--eval_steps", 4, "--samples", 0),
        processes=2,
    )
    assert done.returncode == 0, done.output[-3000:]
    state = json.loads((tmp_path / "checkpoint-8" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(tmp_path / f"checkpoint-{state['best_global_step']}")
    best = load_checkpoint(state["best_model_checkpoint"]).state_dict()
    saved = MiniMindVForConditionalGeneration.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(tensor, best[name]) for name, tensor in saved.items())


def accelerate_environment(name: str) -> dict[str, str]:
    """What `accelerate launch` tells processes, by one of our configurations."""
    path = str(ROOT / "examples" / "accelerate" / f"{name}.yaml")
    args, *_ = _validate_launch_command(launch_command_parser().parse_args(["--config_file", path, "script.py"]))
    if not args.use_deepspeed:
        return prepare_multi_gpu_env(args)
    args.deepspeed_fields_from_accelerate_config = ",".join(load_config_from_file(path).deepspeed_config)
    return prepare_deepspeed_cmd_env(args)[1]


@pytest.mark.parametrize("engine", ["fsdp2", "deepspeed_zero2", "deepspeed_zero3"])
def test_sharded_by_two_processes_stopped_and_resumed(home, rows, launch, tmp_path, uninterrupted, engine):
    if engine != "fsdp2":
        pytest.importorskip("deepspeed")
    (tmp_path / "interrupted.py").write_text(INTERRUPTED)
    held_out, output = tmp_path / "held_out.jsonl", tmp_path / "run"
    held_out.write_text("".join((home / "train.jsonl").read_text().splitlines(keepends=True)[:5]))

    def run(*drivers):
        drivers = [*([ROOT / "tests" / "shard_on_cpu.py"] if engine == "fsdp2" else []), *drivers]
        arguments = ["--per_device_train_batch_size", 2, "--per_device_eval_batch_size", 2]
        arguments += ["--eval_files", held_out, "--eval_strategy", "steps", "--eval_steps", 12]
        return launch(output, *arguments, processes=2, before=drivers, environment=accelerate_environment(engine))

    stopped = run(tmp_path / "interrupted.py")
    assert stopped.returncode == 130, stopped.output[-3000:]
    counts = make_model()
    freeze(counts, "llm")
    assert parameter_table(counts) in stopped.output
    done = run()
    assert done.returncode == 0, done.output[-3000:]
    assert f"Going on from {output / 'checkpoint-4'}" in done.output
    assert losses(output) == pytest.approx(uninterrupted, abs=2e-5)
    assert {"modeling_minimind_v.py", "processing_minimind_v.py"} <= {path.name for path in output.iterdir()}
    assert not list(output.glob("_fsdp*"))
    assert parameter_table(counts) in (output / "README.md").read_text()
    model = MiniMindVForConditionalGeneration.from_pretrained(output)
    start = MiniMindVForConditionalGeneration.from_pretrained(home / "start")
    assert encoder_digest(model) == encoder_digest(start)
    assert not torch.equal(model.lm_head.weight, start.lm_head.weight)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    saved = load_checkpoint(output / "checkpoint-12").state_dict()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(ValueError, match=r"checkpoint-8 was written with (FSDP|DeepSpeed ZeRO-\d in 2 processes), and its"):
        make_trainer(home, rows, tmp_path / "other").train(resume_from_checkpoint=output / "checkpoint-8")
    # Of the 2 x 2 places in the last batch, one row fills one; the others count for nothing
    history = json.loads((output / "checkpoint-12" / "trainer_state.json").read_text())["log_history"]
    (held_out_loss,) = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    assert held_out_loss == pytest.approx(mean_loss(model, rows.select(range(5))), abs=2e-5)
    # The shards together answer as the whole does
    sheet = SampleSheet(load_conversations(held_out, home / "images"), make_processor())
    state = SimpleNamespace(is_world_process_zero=True, global_step=12)
    sheet.on_evaluate(SimpleNamespace(output_dir=tmp_path), state, None, model=model)
    drawn, expected = (folder / "samples" / "step-000012.png" for folder in (output, tmp_path))
    assert drawn.read_bytes() == expected.read_bytes()


@torch.no_grad()
def mean_loss(model, rows) -> float:
    return model.eval()(**MiniMindVCollator(make_processor())(list(rows))).loss.item()


def test_streaming_is_split_without_repeats(launch, tmp_path):
    """Each of two processes writes down the rows that it trains on."""
    driver = tmp_path / "write_down.py"
    driver.write_text(
        "import os, runpy, sys\n"
        "from minimind_v_hf.data import MiniMindVCollator\n"
        "collate = MiniMindVCollator.__call__\n"
        "def write_down(self, rows):\n"
        "    with open(os.environ['SEEN'] + os.environ['RANK'], 'a') as file:\n"
        '        file.writelines(f\'{row["input_ids"]} {row["images"]}\\n\' for row in rows)\n'
        "    return collate(self, rows)\n"
        "MiniMindVCollator.__call__ = write_down\n"
        "sys.argv.pop(0)\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    options = ["--streaming", "--max_steps", 2, "--per_device_train_batch_size", 5, "--save_strategy", "no"]
    environment = {"SEEN": str(tmp_path / "seen-")}
    done = launch(tmp_path / "run", *options, processes=2, before=[driver], environment=environment)
    assert done.returncode == 0, done.output[-3000:]
    # The loader is a batch ahead, and there begins the second pass
    seen = [(tmp_path / f"seen-{rank}").read_text().splitlines()[:10] for rank in range(2)]
    assert len(seen[0]) == len(seen[1]) == 10
    assert len({*seen[0], *seen[1]}) == 20


# ── With peft and TRL ────────────────────────────────────────────────────────────────────────────────────────────────


def test_lora_trains_saves_reloads_and_merges(home, launch, tmp_path):
    peft = pytest.importorskip("peft")
    done = launch(tmp_path, "--save_steps", 6, "--cache_features", tmp_path / "features", script="lora.py")
    assert done.returncode == 0, done.output[-3000:]
    assert (tmp_path / "features" / "index.json").exists()
    batch = {"input_ids": torch.arange(3, 30)[None]}
    start = MiniMindVForConditionalGeneration.from_pretrained(home / "start")
    merged = MiniMindVForConditionalGeneration.from_pretrained(tmp_path / "merged")
    before = start(**batch).logits
    adapted = peft.PeftModel.from_pretrained(start, tmp_path / "adapter").eval()
    torch.testing.assert_close(merged(**batch).logits, adapted(**batch).logits, atol=1e-4, rtol=1e-4)
    assert (merged(**batch).logits - before).abs().max() > 0.01
    names = set(load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    assert not any("vision_tower" in name for name in names)
    assert any("multi_modal_projector" in name for name in names)
    for folder in ("adapter", "checkpoint-12"):
        with pytest.raises(ValueError, match=r"holds a LoRA adapter, .*PeftModel.from_pretrained\(model, "):
            load_checkpoint(tmp_path / folder)
    assert losses(tmp_path)[-1] < losses(tmp_path)[0]


def test_trl_has_the_same_losses(launch, tmp_path, uninterrupted):
    pytest.importorskip("trl")
    recipe = ["--disable_tqdm", "true", "--save_steps", 12]
    done = launch(tmp_path, *recipe, "--cache_features", tmp_path / "features", script="sft_trl.py")
    assert done.returncode == 0, done.output[-3000:]
    assert (tmp_path / "features" / "index.json").exists()
    assert losses(tmp_path) == pytest.approx(uninterrupted, abs=0.05)  # TRL spares norms and biases the weight decay


# ── Arguments ────────────────────────────────────────────────────────────────────────────────────────────────────────


def parse(monkeypatch, *argv, stage=None):
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *map(str, argv)])
    return parse_arguments({"learning_rate": 4e-4, "max_length": 640} | (stage or {}), "", StageArguments)


def test_flags_win_over_the_file_and_the_file_over_the_recipe(home, tmp_path, monkeypatch):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {home / 'start'}\ndata_files: [a.jsonl]\nimage_folder: images\nlearning_rate: 2e-3\nmax_length: 99\n"
    )
    run, args, _ = parse(monkeypatch, recipe, "--max_length", 50, "--output_dir", tmp_path, "--optim", "adafactor")
    assert (run.max_length, args.learning_rate, args.optim.value) == (50, 2e-3, "adafactor")
    assert (args.lr_scheduler_type.value, args.lr_scheduler_kwargs) == ("cosine_warmup_with_min_lr", {"min_lr_rate": 0.1})
    other = tmp_path / "other.yaml"
    other.write_text(recipe.read_text() + "\nlr_scheduler_type: linear\n")
    _, args, _ = parse(monkeypatch, other, "--output_dir", tmp_path)
    assert (args.lr_scheduler_type.value, args.lr_scheduler_kwargs) == ("linear", None)
    _, args, _ = parse(monkeypatch, recipe, "--output_dir", tmp_path, "--lr_scheduler_type", "linear", "--weight_decay", 0)
    assert (args.lr_scheduler_type.value, args.lr_scheduler_kwargs, args.weight_decay) == ("linear", None, 0)
    other.write_text(recipe.read_text() + "\nmax_steps: 100\n")
    _, args, _ = parse(monkeypatch, other, "--output_dir", tmp_path)
    assert args.max_steps == 100
    for flag in ("--num_train_epochs=3", "--num-train-epochs=3"):
        _, args, _ = parse(monkeypatch, other, "--output_dir", tmp_path, flag)
        assert (args.max_steps, args.num_train_epochs) == (-1, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Give either --model"),
        (["--model", "m", "--image_folder", "i"], "Give the training data with --data_files"),
        (["--model", "m", "--data_files", "d", "--image_folder", "i", "--trainable", "head"], "trainable='head': expected one"),
        (["--model", "m", "--data_files", "d", "--image_folder", "i", "--streaming"], "--max_steps"),
        (["--model", "m", "--data_files", "d", "--image_folder", "i", "--eval_strategy", "epoch"], "--eval_files"),
        (["--model", "m", "--data_files", "d", "--image_folder", "i", "--trainable", "all", "--cache_features", "f"], "frozen"),
        (
            ["--model", "m", "--data_files", "d", "--image_folder", "i", "--augment", "0.1", "--cache_features", "f"],
            "no --augment",
        ),
        (["--model", "m", "--data_files", "d", "--image_folder", "i", "--pack_length", "100"], "at least --max_length, 640"),
        (["--config", "c", "--data_files", "d", "--streaming", "--max_steps", "9"], "--streaming needs --processor"),
        (["--model", "m", "--data_files", "d", "--muon", "--optim", "sgd"], "--muon and --optim"),
        (["--model", "m", "--data_files", "d", "--threads", "0"], "--threads 0: expected 1 or more"),
        (["--model", "m", "--data_files", "d", "--augment", "3"], "augment=3.0: expected a share from 0 to 0.5"),
        (["--model", "m", "--data_files", "d", "--vision_tower", "v"], "--vision_tower belongs to --config"),
    ],
)
def test_arguments_that_cannot_work_are_refused(tmp_path, monkeypatch, capsys, arguments, message):
    with pytest.raises(SystemExit):
        parse(monkeypatch, *arguments, "--output_dir", tmp_path)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learnin_rate: 1e-3", "there is no argument learnin_rate"),
        ("max_steps:", "max_steps has no value"),
        ("config: 5", "config: expected a name or fields with values, got 5"),
        ("config: [5]", "config: expected a name or fields with values, got [5]"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused(tmp_path, monkeypatch, capsys, text, message):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(SystemExit):
        parse(monkeypatch, tmp_path / "recipe.yaml", "--data_files", "x.jsonl", "--output_dir", tmp_path)
    assert message in capsys.readouterr().err


def test_a_model_is_put_together_from_parts(home, tmp_path):
    """Fresh weights by a configuration, an encoder and a language model from their folders."""
    parts = MiniMindVForConditionalGeneration.from_pretrained(home / "start")
    parts.config.save_pretrained(tmp_path / "config")
    make_processor().tokenizer.save_pretrained(tmp_path / "tokenizer")
    parts.model.vision_tower.save_pretrained(tmp_path / "encoder")
    make_processor().image_processor.save_pretrained(tmp_path / "encoder")
    language_model = MiniMindForCausalLM(parts.config.text_config)
    language_model.save_pretrained(tmp_path / "llm")
    names = {"config": "config", "processor": "tokenizer", "vision_tower": "encoder", "language_model": "llm"}
    run = RunArguments(**{name: str(tmp_path / folder) for name, folder in names.items()})
    model, processor = load_start(run, TrainingArguments(use_cpu=True))
    assert processor.image_token_id == model.config.image_token_id == make_processor().image_token_id
    assert processor.image_processor.crop_size["height"] == 16
    for ours, theirs in (
        (model.model.vision_tower, parts.model.vision_tower),
        (model.model.language_model, language_model.model),
        (model.lm_head, language_model.lm_head),
    ):
        expected = theirs.state_dict()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in ours.state_dict().items())
    assert not torch.equal(model.model.multi_modal_projector.linear_1.weight, parts.model.multi_modal_projector.linear_1.weight)


def test_a_small_model_from_nothing(home, launch, tmp_path):
    """The recipe's own file: fresh weights by the configuration in it, and a tokenizer of the rows' own text."""
    recipe = yaml.safe_load((ROOT / "examples/recipes/from_scratch.yaml").read_text(encoding="utf-8"))
    data = {"data_files": [str(home / "train.jsonl")], "image_folder": str(home / "images")}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe | SETTINGS | data | {"max_steps": 4}))
    run = launch(tmp_path / "run", recipe=tmp_path / "recipe.yaml")
    assert run.returncode == 0, run.output
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "run", trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(tmp_path / "run")
    vision = recipe["config"]["vision_config"]
    assert (model.config.vision_config.image_size, model.config.vision_config.patch_size) == (
        vision["image_size"],
        vision["patch_size"],
    )
    assert len(processor.tokenizer.tokenize("What colour is it?")) == 5  # one token a word
    inputs = processor(images=Image.new("RGB", (300, 100)), text="<image>", return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, vision["image_size"], vision["image_size"])
    colours = processor(images=[make_image(colour) for colour in COLOURS], text="<image>" * 4, return_tensors="pt")
    assert colours["pixel_values"].mean((0, 2, 3)).abs().max() < 0.5  # measured on the rows' own images
    assert (colours["pixel_values"].std((0, 2, 3)) - 1).abs().max() < 0.3
    assert inputs["input_ids"].tolist() == [[model.config.image_token_id] * model.config.image_seq_length]
    state = torch.load(tmp_path / "run" / "checkpoint-4" / "optimizer.pt", weights_only=True)
    first, encoder = (group["initial_lr"] for group in state["muon"]["param_groups"])
    assert (first, encoder) == (RATE, recipe["encoder_learning_rate"])
    assert "| turns | each sees the image and itself alone |" in (tmp_path / "run" / "README.md").read_text()
    turns = [("user", "<image>\nIs it red?"), ("assistant", "no"), ("user", "What colour is it?")]
    prompt = processor.apply_chat_template(
        [{"role": role, "content": text} for role, text in turns], add_generation_prompt=True
    )
    assert prompt == "<|im_start|>user\n<image>\nWhat colour is it?<|im_end|>\n<|im_start|>assistant\n"
    # Training goes on with its encoder frozen, whose batch norms count in numbers without a dimension
    further = SETTINGS | data | {"model": str(tmp_path / "run"), "cache_features": str(tmp_path / "cache")}
    (tmp_path / "further.yaml").write_text(yaml.safe_dump(further))
    run = launch(tmp_path / "further", recipe=tmp_path / "further.yaml")
    assert run.returncode == 0, run.output
    assert np.all(np.load(tmp_path / "cache" / "checksums.npy"))
    encoder = load_checkpoint(tmp_path / "further" / "checkpoint-4").model.vision_tower.state_dict()
    assert all(torch.equal(tensor, encoder[name]) for name, tensor in model.model.vision_tower.state_dict().items())
    assert "independent_turns = false" in (tmp_path / "further" / "chat_template.jinja").read_text()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"visoin_config": {}}, "config: there is no field visoin_config in a MiniMindVConfig"),
        ({"text_config": {"hidden": 8}}, "text_config: there is no field hidden in a MiniMindVTextConfig"),
        ({"vision_config": {"patch": 8}}, "vision_config: there is no field patch in a CLIPVisionConfig"),
        ({"text_config": None, "vision_config": {"patch": 8}}, "vision_config: there is no field patch"),
        ({"text_config": {"vocab_size": 200}}, "259 tokens, but the configuration has a vocabulary of 200"),
        ({"text_config": {"vocab_size": 100}}, "259 tokens, but the configuration has a vocabulary of 100"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(home, config, message):
    run = RunArguments(config=config, data_files=[str(home / "train.jsonl")], image_folder=str(home / "images"))
    with pytest.raises(ValueError, match=message):
        load_start(run, TrainingArguments(use_cpu=True))


def test_held_out_images_are_not_augmented(home, rows, tmp_path, monkeypatch):
    """Training images change from step to step, held-out ones are what they are; without the option all are."""
    Image.radial_gradient("L").convert("RGB").save(tmp_path / "gradient.png")
    rows = rows.map(lambda row: {"images": [str(tmp_path / "gradient.png")] * len(row["images"])})
    for strength, uint8_pixels in ((0.0, True), (0.1, True), (0.1, False)):
        trainer = make_trainer(home, rows, tmp_path / str(strength), augment=strength, eval_dataset=rows)
        trainer.data_collator.uint8_pixels = uint8_pixels
        seen = {True: [], False: []}
        compute_loss = trainer.compute_loss

        def spy(model, inputs, *args, compute_loss=compute_loss, seen=seen, **kwargs):
            seen[model.training] += list(inputs["pixel_values"])
            return compute_loss(model, inputs, *args, **kwargs)

        monkeypatch.setattr(trainer, "compute_loss", spy)
        trainer.train()
        trainer.evaluate()
        different = {training: len({image.numpy().tobytes() for image in images}) for training, images in seen.items()}
        assert different == {True: len(seen[True]) if strength else 1, False: 1}


def test_parts_that_do_not_fit_are_refused_at_once(home):
    with pytest.raises(ValueError, match="makes 16 tokens of an image, but --config minimind2-v-small expects 196"):
        load_start(RunArguments(config="minimind2-v-small", processor=str(home / "start")), TrainingArguments())


def train_cached(home, rows, folder, output_dir, resume=None, **kwargs):
    """A run with the cache of features in `folder`: its trainer, and how many images each pass of the encoder had."""
    model = MiniMindVForConditionalGeneration.from_pretrained(home / "start")
    trainer = make_trainer(home, rows, output_dir, model=model, **kwargs)
    sets = [rows] + ([kwargs["eval_dataset"]] if "eval_dataset" in kwargs else [])
    collator = MiniMindVCollator(MiniMindVProcessor.from_pretrained(home / "start"))
    trainer.data_collator = cache_features(model, collator, sets, folder)
    passes: list[int] = []
    model.model.vision_tower.register_forward_hook(lambda _, args, output: passes.append(len(args[0])))
    trainer.train(resume_from_checkpoint=resume)
    return trainer, passes


def test_features_are_cached_in_the_first_epoch_and_change_no_loss(home, rows, tmp_path, uninterrupted):
    images = sum(map(len, rows["images"]))
    for first in (True, False):
        trainer, passes = train_cached(home, rows, tmp_path / "features", tmp_path / "run", save_strategy="no")
        assert losses(trainer) == pytest.approx(uninterrupted, abs=1e-5)
        assert all(entry["images_per_second"] > 0 for entry in trainer.state.log_history[:-1])
        assert sum(passes) == (images if first else 0)
    assert len(passes) == 0
    with pytest.raises(ValueError, match="holds something else than vectors"):
        train_cached(home, rows, home, tmp_path / "run")
    with pytest.raises(ValueError, match="only while the encoder is frozen"):
        train_cached(home, rows, tmp_path / "other", tmp_path / "run", trainable="all")


def test_a_run_killed_in_its_first_epoch_goes_on_with_a_cache_half_full(home, rows, launch, tmp_path, uninterrupted):
    features, images = tmp_path / "features", sum(map(len, rows["images"]))
    killer = tmp_path / "killer.py"
    killer.write_text(
        "import os, runpy, signal, sys\n"
        "from minimind_v_hf.training import FeatureCache\n"
        "write, left = FeatureCache.write, [5]\n"
        "def write_and_die(self, *args):\n"
        "    write(self, *args)\n"
        "    left[0] -= 1\n"
        "    if not left[0]:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "FeatureCache.write = write_and_die\n"
        "sys.argv.pop(0)\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    done = launch(tmp_path / "run", "--cache_features", features, before=[killer])
    assert done.returncode == -9, done.output[-3000:]
    kept = np.load(features / "checksums.npy")
    assert 0 < np.count_nonzero(kept) < images
    with open(features / "features.npy", "r+b") as file:  # as a machine may leave it that lost its power
        file.seek(-int(np.load(features / "features.npy", mmap_mode="r")[kept.nonzero()[0][-1] :].nbytes), os.SEEK_END)
        file.write(bytes(40))
    checkpoint = tmp_path / "run" / "checkpoint-4"
    trainer, passes = train_cached(home, rows, features, tmp_path / "run", str(checkpoint), save_strategy="no")
    assert losses(trainer) == pytest.approx(uninterrupted, abs=1e-5)
    assert sum(passes) == images - np.count_nonzero(kept) + 1
    assert np.all(np.load(features / "checksums.npy"))


def test_two_processes_fill_one_cache_also_with_held_out_and_packed_rows(home, rows, launch, tmp_path, uninterrupted):
    features = tmp_path / "features"
    options = ["--cache_features", features, "--per_device_train_batch_size", BATCH // 2, "--save_strategy", "no"]
    options += ["--eval_files", home / "train.jsonl", "--eval_strategy", "epoch", "--samples", 0]
    done = launch(tmp_path / "run", *options, processes=2)
    assert done.returncode == 0, done.output[-3000:]
    assert np.all(np.load(features / "checksums.npy"))
    packed = pack(rows, 200)
    trainer, passes = train_cached(home, rows, features, tmp_path / "again", save_strategy="no", eval_dataset=rows)
    assert not passes
    assert losses(trainer) == pytest.approx(uninterrupted, abs=1e-5)
    pixels, cached = MiniMindVCollator(make_processor()), trainer.data_collator
    batch = [packed[0], packed[1]]
    expected = trainer.model.eval()(**pixels(batch), use_cache=False).loss
    torch.testing.assert_close(trainer.model(**cached(batch), use_cache=False).loss, expected, atol=1e-5, rtol=1e-5)


def test_a_cache_is_filled_under_fsdp(launch, tmp_path, uninterrupted):
    options = {"before": [ROOT / "tests" / "shard_on_cpu.py"], "environment": accelerate_environment("fsdp2")}
    recipe = ["--cache_features", tmp_path / "features", "--per_device_train_batch_size", BATCH // 2]
    done = launch(tmp_path / "run", *recipe, processes=2, **options)
    assert done.returncode == 0, done.output[-3000:]
    assert losses(tmp_path / "run") == pytest.approx(uninterrupted, abs=2e-5)
    assert np.all(np.load(tmp_path / "features" / "checksums.npy"))


def test_processes_with_a_part_of_the_encoder_do_not_fill_a_cache(launch, tmp_path):
    pytest.importorskip("deepspeed")
    recipe = ["--cache_features", tmp_path / "features", "--per_device_train_batch_size", BATCH // 2]
    done = launch(tmp_path / "run", *recipe, processes=2, environment=accelerate_environment("deepspeed_zero3"))
    assert done.returncode
    assert "--cache_features is filled by processes with the whole encoder, not where each holds a part" in done.output


def test_cached_features_stay_on_the_disk_where_processes_are_not_forked(home, rows, launch, tmp_path):
    """As by default on macOS and Windows, and since Python 3.14; `launch` has started the server that they come from."""
    model = MiniMindVForConditionalGeneration.from_pretrained(home / "start")
    freeze(model, "llm")
    cached = cache_features(model, MiniMindVCollator(make_processor()), [rows], tmp_path / "features")
    model(**cached([rows[i] for i in range(3)]))
    assert len(pickle.dumps(cached.cache)) < 1000 < (tmp_path / "features" / "features.npy").stat().st_size
    (batch,) = DataLoader(rows.select(range(3)), 3, collate_fn=cached, num_workers=1, multiprocessing_context="forkserver")
    expected = cached([rows[i] for i in range(3)])["mm_encoder_outputs"]["image"].last_hidden_state
    assert expected.abs().sum() > 0
    assert torch.equal(batch["mm_encoder_outputs"]["image"].last_hidden_state, expected)


def test_cached_features_follow_what_they_were_made_of(tmp_path, caplog):
    image, kept = str(tmp_path / "image.png"), tmp_path / "kept"
    make_image("red").save(image)
    processor, model = make_processor(), make_model()
    rows = tokenize_conversations(
        Dataset.from_dict(
            {
                "conversations": [[{"role": "user", "content": "<image>"}, {"role": "assistant", "content": "a"}]],
                "images": [[image]],
            }
        ),
        processor,
    )
    freeze(model, "llm")

    def encoded(dtype=torch.float32, fresh=True):
        cached = cache_features(model, MiniMindVCollator(processor), [rows], kept, dtype)
        batch = cached([rows[0]])
        assert ("uncached" in batch) == fresh
        model(**batch)
        return cached.cache.read([image])[0]

    red = encoded()
    assert torch.equal(encoded(fresh=False), red)
    make_image("blue", (21, 20)).save(image)
    assert not caplog.text
    blue = encoded()
    assert "kept is made anew: it holds vectors of other images, or of another encoder" in caplog.text
    assert not torch.equal(blue, red)
    assert encoded(torch.bfloat16).dtype == torch.bfloat16
    processor.image_processor.image_mean = [0.9, 0.9, 0.9]
    assert not torch.equal(encoded(), blue)


@pytest.mark.parametrize("path", sorted((ROOT / "examples" / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_understands_the_configurations(path):
    config = load_config_from_file(str(path))
    assert config.num_processes == 2
    assert config.distributed_type.value in ("MULTI_GPU", "FSDP", "DEEPSPEED")
    assert config.mixed_precision == "no"  # another value would override the scripts' --bf16


def test_caches_do_not_mix(tmp_path):
    """Neither where a run replaces the folder of another, which still writes, nor where a model has two."""
    image = str(tmp_path / "image.png")
    make_image("red").save(image)
    rows = [{"input_ids": [make_processor().image_token_id] * 16, "labels": [-100] * 15 + [1], "images": [image]}]

    def cached(model, folder):
        freeze(model, "llm")
        return cache_features(model, MiniMindVCollator(make_processor()), [Dataset.from_list(rows)], tmp_path / folder)

    model, other = make_model(), make_model()
    before = cached(model, "one")
    batch = before(rows)
    ours = cached(other, "one")
    model(**batch)
    assert len(before.cache.read([image])[1]) == len(ours.cache.read([image])[1]) == 1

    second = cached(other, "two")
    other(**ours(rows))
    assert len(second.cache.read([image])[1]) == 1
    vectors, missing = ours.cache.read([image])
    assert not len(missing)
    assert not torch.equal(vectors, batch["mm_encoder_outputs"]["image"].last_hidden_state)
