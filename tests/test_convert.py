"""Native weights to the Hub and back: nothing is lost, nothing is guessed, and what is wrong is one line."""

import functools
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import make_image, make_image_processor, make_tokenizer, refused
from safetensors.torch import load_file, save_file
from test_hub import run_isolated
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, CLIPConfig, CLIPModel, LlavaProcessor

from convert import from_native, to_llava, to_native
from minimind_v_hf import MiniMindForCausalLM, MiniMindVForConditionalGeneration, MiniMindVProcessor, conversion
from minimind_v_hf.conversion import ConversionError
from minimind_v_hf.conversion.verification import verify


GOLDENS = Path(__file__).parent / "fixtures" / "goldens"
INDEX = json.loads((GOLDENS / "index.json").read_text())
CONVERT = Path(__file__).parents[1] / "convert"
VARIANTS = {variant: ["--num-attention-heads", "4"] for variant in INDEX}
VARIANTS["g3-moe"] += ["--num-experts-per-tok", "2"]


@pytest.fixture(scope="module")
def tensors():
    return load_file(GOLDENS / "tensors.safetensors")


@pytest.fixture(scope="module")
def sources(tmp_path_factory, tensors) -> Path:
    """Per variant a native file and an encoder, and a tokenizer of 320 ids for all of them."""
    folder = tmp_path_factory.mktemp("sources")
    make_tokenizer().save_pretrained(folder / "tokenizer")
    for variant, entry in INDEX.items():
        (folder / variant).mkdir()
        torch.save(native_weights(tensors, variant), folder / variant / "sft_vlm_64.pth")
        if variant.endswith("yarn"):
            native_config = {"inference_rope_scaling": True, "max_position_embeddings": 4096}
            native_folder(folder / variant / "native", native_weights(tensors, variant), native_config)
        (folder / variant / "config.json").write_text(json.dumps(entry["vision_config"]))
        encoder = {name: tensors[key].clone() for name, key in entry["vision_tower"].items()}
        save_file(encoder, folder / variant / "model.safetensors", metadata={"format": "pt"})
        make_image_processor(entry["vision_config"]["image_size"]).save_pretrained(folder / variant)
    return folder


def native_weights(tensors, variant: str) -> dict[str, torch.Tensor]:
    return {name: tensors[key].clone() for name, key in INDEX[variant]["weights"].items()}


def native_folder(folder: Path, weights: dict[str, torch.Tensor], config: dict) -> Path:
    folder.mkdir()
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps({"model_type": "minimind-v", **config}))
    return folder


@pytest.fixture
def no_fresh_process(monkeypatch):
    """Leave out the process that loads a written folder, which other tests go through."""
    monkeypatch.setattr(conversion.from_native, "verify", lambda *args, **kwargs: 0.0)


def arguments(sources: Path, output: Path, variant: str = "g2-dense", weights: Path | None = None, *extra: str) -> list[str]:
    weights = weights or sources / variant / ("native" if variant.endswith("yarn") else "sft_vlm_64.pth")
    command = ["--weights", weights, "--vision-tower", sources / variant, "--tokenizer", sources / "tokenizer"]
    return [*map(str, command), "--output", str(output), *VARIANTS[variant], *extra]


def same_bits(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype
        and first[name].shape == second[name].shape
        and torch.equal(first[name].view(torch.uint8), second[name].view(torch.uint8))
        for name in first
    )


# ── There and back ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("variant", VARIANTS)
def test_native_to_ours_to_native(variant, sources, tensors, tmp_path, no_fresh_process):
    from_native.main(arguments(sources, tmp_path / "model", variant))
    model = MiniMindVForConditionalGeneration.from_pretrained(tmp_path / "model").eval()
    expected = {name: tensors[key] for name, key in INDEX[variant]["expected"].items()}
    for case in ("single", "text_only"):
        input_ids = expected[f"{case}.input_ids"].clone()
        input_ids[input_ids == (12 if variant.startswith("g3") else 34)] = model.config.image_token_id
        with torch.no_grad():
            logits = model(input_ids, pixel_values=expected.get(f"{case}.pixel_values")).logits
        logits = logits[:, expected[f"{case}.logits_positions"]]
        torch.testing.assert_close(logits, expected[f"{case}.logits"], atol=5e-5, rtol=0)

    to_native.main(["--model", str(tmp_path / "model"), "--output", str(tmp_path / "back.pth")])
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    assert same_bits(back, native_weights(tensors, variant))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_and_the_encoder_keeps_its_bits(dtype, sources, tensors, tmp_path, no_fresh_process):
    native = {name: tensor.to(dtype) for name, tensor in native_weights(tensors, "g1-dense").items()}
    torch.save(native, tmp_path / "half.pth")
    from_native.main(arguments(sources, tmp_path / "model", "g1-dense", tmp_path / "half.pth"))
    assert json.loads((tmp_path / "model" / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    stored = load_file(tmp_path / "model" / "model.safetensors")
    assert {tensor.dtype for name, tensor in stored.items() if "vision_tower" in name} == {torch.float32}
    assert {tensor.dtype for name, tensor in stored.items() if "vision_tower" not in name} == {dtype}
    assert {p.dtype for p in MiniMindVForConditionalGeneration.from_pretrained(tmp_path / "model").parameters()} == {dtype}
    to_native.main(["--model", str(tmp_path / "model"), "--output", str(tmp_path / "back.pth")])
    assert same_bits(torch.load(tmp_path / "back.pth", weights_only=True), native)


# ── What a user gets ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_command_line_folder_and_the_snippet_of_its_card(sources, tmp_path):
    """The whole way, as a user goes it from another directory, and the card's own code run in a bare process."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, CONVERT / "from_native.py", *arguments(sources, tmp_path / "MyModel")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(r"num_attention_heads +4 +--num-attention-heads", done.stdout)
    assert re.search(r"max_position_embeddings +32768 +published default", done.stdout)
    assert re.search(r"used +32", done.stdout)
    assert "its logits differ by 0.0e+00" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["MyModel"]  # nothing temporary is left

    folder = tmp_path / "MyModel"
    generation = json.loads((folder / "generation_config.json").read_text())
    expected = {"do_sample": True, "temperature": 0.65, "top_p": 0.85, "eos_token_id": 2, "pad_token_id": 0, "bos_token_id": 1}
    assert expected.items() <= generation.items()
    card = (folder / "README.md").read_text(encoding="utf-8")
    for line in ("license: apache-2.0", "library_name: transformers", "pipeline_tag: image-text-to-text", "- zh", "- en"):
        assert line in card.split("---")[1].splitlines()
    assert "| projector | 2,112 |" in card
    assert "none is unknown, missing or misshapen" in card
    make_image().save(tmp_path / "photo.jpg")
    snippet = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    run_isolated(snippet.replace("max_new_tokens=128", "max_new_tokens=4"), home=tmp_path)


def test_image_token_takes_no_id_that_text_can_produce(sources, tmp_path, no_fresh_process):
    from_native.main(arguments(sources, tmp_path / "model"))
    processor = MiniMindVProcessor.from_pretrained(tmp_path / "model")
    before, after = make_tokenizer().get_vocab(), processor.tokenizer.get_vocab()
    assert len(processor.tokenizer) == 320
    assert after.pop("<image>") == before.pop("ÿ")
    assert after == before
    every_character = "".join(chr(c) for c in range(0x11000) if not 0xD800 <= c < 0xE000)
    assert processor.image_token_id not in processor.tokenizer(every_character)["input_ids"]


def test_language_model_weights_give_a_fresh_projector_and_say_so(sources, tensors, tmp_path, no_fresh_process, capsys):
    for variant in ("g2-dense", "g3-dense"):
        native = {name: t for name, t in native_weights(tensors, variant).items() if not name.startswith("vision_proj.")}
        torch.save(native, tmp_path / "llm_64.pth")
        from_native.main(arguments(sources, tmp_path / variant, variant, tmp_path / "llm_64.pth"))
        assert "projector is freshly initialised" in capsys.readouterr().err
        assert "projector is freshly initialised" in (tmp_path / variant / "README.md").read_text(encoding="utf-8")
        stored = load_file(tmp_path / variant / "model.safetensors")
        projector = {name: tensor for name, tensor in stored.items() if "multi_modal_projector" in name}
        assert len(projector) == (2 if variant == "g2-dense" else 6)
        assert all(tensor.isfinite().all() for tensor in projector.values())
        assert 0.01 < projector["model.multi_modal_projector.linear_1.weight"].std() < 0.03


def test_resume_checkpoint_with_the_encoder_inside(sources, tensors, tmp_path, no_fresh_process, capsys):
    native = native_weights(tensors, "g2-dense")
    inside = {f"vision_encoder.vision_model.{name}": tensors[key] for name, key in INDEX["g2-dense"]["vision_tower"].items()}
    inside = {name.replace("vision_model.vision_model.", "vision_model."): tensor.clone() for name, tensor in inside.items()}
    extra = {
        "vision_encoder.logit_scale": torch.ones(()),
        "model.freqs_cos": torch.ones(8, 8),
        "layers.0.attention.mask": torch.ones(1),
    }
    training = {
        "optimizer": {"state": {}, "param_groups": []},
        "scaler": {"scale": 2.0},
        "epoch": 1,
        "step": 7,
        "world_size": 2,
    }
    torch.save({"model": native | inside | extra, **training}, tmp_path / "resume.pth")
    command = arguments(sources, tmp_path / "model", "g2-dense", tmp_path / "resume.pth")
    from_native.main(command)
    output = capsys.readouterr().out
    assert re.search(r"ignored +5 +the state of the training: epoch, optimizer, scaler, …", output)
    assert re.search(rf"ignored +{len(inside) + 1} +the frozen encoder", output)
    assert re.search(r"ignored +2 +a buffer", output)

    inside["vision_encoder.vision_model.post_layernorm.weight"] += 1
    torch.save({"model": native | inside, **training}, tmp_path / "resume.pth")
    message = refused(capsys, from_native.main, [*command, "--overwrite"])
    assert "--vision-tower differs from the encoder in --weights, in post_layernorm.weight" in message


def test_native_folder_tells_what_a_file_cannot(sources, tensors, tmp_path, no_fresh_process, capsys):
    native_config = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    native_config |= {"num_key_value_heads": 2, "num_experts_per_tok": 1, "max_position_embeddings": 4096}
    native_config |= {"inference_rope_scaling": True, "vocab_size": 320, "rms_norm_eps": 1e-4, "aux_loss_alpha": 0.1}
    folder = native_folder(tmp_path / "native", native_weights(tensors, "g2-moe"), native_config)
    command = ["--weights", folder, "--vision-tower", sources / "g2-moe", "--tokenizer", sources / "tokenizer"]
    command = [*map(str, command), "--output", str(tmp_path / "model")]
    from_native.main(command)
    text = json.loads((tmp_path / "model" / "config.json").read_text())["text_config"]
    assert (text["num_attention_heads"], text["num_experts_per_tok"], text["rms_norm_eps"]) == (4, 1, 1e-4)
    assert (text["rope_parameters"]["rope_type"], text["rope_parameters"]["factor"]) == ("yarn", 16)
    assert text["router_aux_loss_coef"] == 0.1

    (folder / "config.json").write_text(json.dumps({"model_type": "minimind-v", "hidden_size": 128}))
    assert "config.json says hidden_size=128, but the weights have 64" in refused(
        capsys, from_native.main, [*command, "--overwrite"]
    )


def test_whole_clip_and_the_projector_that_joins_patches(sources, tensors, tmp_path, no_fresh_process, capsys):
    """Only the vision half of a CLIP with both is taken; and minimind-3v of early April 2026 takes four patches at once."""
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64}
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=INDEX["g2-dense"]["vision_config"], projection_dim=16))
    clip.save_pretrained(tmp_path / "clip")
    make_image_processor(28).save_pretrained(tmp_path / "clip")
    native = {name: t for name, t in native_weights(tensors, "g3-dense").items() if not name.startswith("vision_proj.")}
    native |= {"vision_proj.mlp.0.weight": torch.randn(64, 128), "vision_proj.mlp.0.bias": torch.randn(64)}
    native |= {"vision_proj.mlp.2.weight": torch.randn(64, 64), "vision_proj.mlp.2.bias": torch.randn(64)}
    torch.save(native, tmp_path / "p16.pth")
    command = ["--weights", tmp_path / "p16.pth", "--vision-tower", tmp_path / "clip", "--tokenizer", sources / "tokenizer"]
    from_native.main([*map(str, command), "--output", str(tmp_path / "model")])
    assert "released with 64 image tokens, but this encoder gives 49" in capsys.readouterr().err
    model = MiniMindVForConditionalGeneration.from_pretrained(tmp_path / "model")
    assert (model.config.patches_per_token, model.config.image_seq_length) == (4, 49)
    assert MiniMindVProcessor.from_pretrained(tmp_path / "model").image_seq_length == 49
    assert not any("text_model" in name for name in load_file(tmp_path / "model" / "model.safetensors"))
    for name, tensor in clip.vision_model.state_dict().items():
        assert torch.equal(model.model.vision_tower.state_dict()[name.removeprefix("vision_model.")], tensor), name
    to_native.main(["--model", str(tmp_path / "model"), "--output", str(tmp_path / "back.pth")])
    assert same_bits(torch.load(tmp_path / "back.pth", weights_only=True), native)


# ── What can be wrong ────────────────────────────────────────────────────────────────────────────────────────────────


class Attack:
    def __init__(self, command: str):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def rename(native, old, new):
    native[new] = native.pop(old)


SPOILED = {
    "renamed": (
        lambda n: rename(n, "model.norm.weight", "model.final_norm.weight"),
        "model.final_norm.weight: (64,), expected no such tensor; model.norm.weight: missing, expected (64,)",
    ),
    "missing": (lambda n: n.pop("model.layers.1.mlp.up_proj.weight"), "model.layers.1.mlp.up_proj.weight: missing"),
    "missing bias": (lambda n: n.pop("vision_proj.vision_proj.0.bias"), "vision_proj.vision_proj.0.bias: missing"),
    "unknown": (lambda n: n.update(extra=torch.ones(2)), "extra: (2,), expected no such tensor"),
    "transposed": (
        lambda n: n.update({"model.layers.0.mlp.up_proj.weight": n["model.layers.0.mlp.up_proj.weight"].T}),
        "model.layers.0.mlp.up_proj.weight: (64, 192), expected (192, 64)",
    ),
    "transposed embedding": (
        lambda n: n.update({"model.embed_tokens.weight": n["model.embed_tokens.weight"].T}),
        "model.embed_tokens.weight: (64, 320), expected (320, 64)",
    ),
    "another width": (lambda n: n.update({"vision_proj.vision_proj.0.weight": torch.ones(64, 48)}), "Check --vision-tower"),
    "another size": (
        lambda n: n.update({"vision_proj.vision_proj.0.weight": torch.ones(48, 32)}),
        "vision_proj.vision_proj.0.weight: (48, 32), expected (64, 32)",
    ),
    "integers": (
        lambda n: n.update({"model.norm.weight": torch.ones(64, dtype=torch.int8)}),
        "model.norm.weight: int8, expected float32, float16 or bfloat16",
    ),
    "NaN": (
        lambda n: n["model.layers.1.mlp.up_proj.weight"][0].copy_(torch.tensor([float("nan"), float("inf"), -1.0, 0.0] * 16)),
        "model.layers.1.mlp.up_proj.weight: 32 of 12,288 values NaN or infinite, expected finite ones",
    ),
    "untied": (
        lambda n: n.update({"lm_head.weight": n["lm_head.weight"] + 1}),
        "lm_head.weight: other values, expected those of model.embed_tokens.weight",
    ),
    "LoRA": (
        lambda n: n.update({"model.layers.0.self_attn.q_proj.lora.A.weight": torch.ones(8, 64)}),
        "Merge the LoRA weights",
    ),
    "projector alone": (lambda n: [n.pop(name) for name in list(n) if "vision_proj" not in name], "tensors are vision_proj"),
    "wrapped": (lambda n: [rename(n, name, f"module.{name}") for name in list(n)], "Of a wrapped or adapted model"),
    "not a tensor": (lambda n: n.update(step=3), "is a int, not a tensor"),
    "integer key": (lambda n: n.update({3: torch.ones(2)}), "its entry 3 is a Tensor"),
    "a billion layers": (
        lambda n: n.update({"model.layers.999999999.input_layernorm.weight": torch.ones(64)}),
        "model.layers.999999999.input_layernorm.weight: (64,), expected no such tensor",
    ),
}


@pytest.mark.parametrize("spoil", SPOILED)
def test_spoiled_weights_stop_with_the_likely_cause(spoil, sources, tensors, tmp_path, capsys):
    native = native_weights(tensors, "g2-dense")
    change, cause = SPOILED[spoil]
    change(native)
    torch.save(native, tmp_path / "spoiled.pth")
    command = arguments(sources, tmp_path / "model", "g2-dense", tmp_path / "spoiled.pth")
    assert cause in refused(capsys, from_native.main, command)
    assert [path.name for path in tmp_path.iterdir()] == ["spoiled.pth"]


def write_file(path: Path, kind: str, tmp_path: Path, good: bytes) -> None:
    if kind == "a pickle that executes":
        torch.save({"model.norm.weight": Attack(f"touch {tmp_path / 'executed'}")}, path)
    elif kind == "an old pickle that executes":
        path.write_bytes(pickle.dumps(Attack(f"touch {tmp_path / 'executed'}"), protocol=2))
    elif kind == "a damaged byte":
        path.write_bytes(good[: len(good) // 2] + bytes([good[len(good) // 2] ^ 1]) + good[len(good) // 2 + 1 :])
    elif kind == "another zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("notes.txt", "no weights")
    elif kind == "safetensors":
        save_file({"model.norm.weight": torch.ones(2)}, path)
    elif kind == "a native folder without weights":
        path.mkdir()
        (path / "config.json").write_text('{"model_type": "minimind-v"}')
    elif kind == "another model's folder":
        path.mkdir()
        (path / "config.json").write_text('{"model_type": "llama"}')
    elif kind == "a folder":
        path.mkdir()
    elif kind == "a list":
        torch.save([torch.ones(2)], path)
    else:
        path.write_bytes({"truncated": good[: len(good) // 2], "empty": b"", "text": b"hello"}[kind])


FILES = {
    "a pickle that executes": "system, but weights need no code",
    "an old pickle that executes": "system, but weights need no code",
    "truncated": "truncated or damaged",
    "a damaged byte": "truncated or damaged",
    "empty": "no PyTorch checkpoint",
    "text": "no PyTorch checkpoint",
    "another zip": "no PyTorch checkpoint",
    "safetensors": "but safetensors",
    "a folder": "config.json",
    "a native folder without weights": "pytorch_model.bin",
    "another model's folder": "model_type is 'llama'",
    "a list": "holds a list",
}


@pytest.mark.parametrize("kind", FILES)
def test_files_that_are_no_native_weights(kind, sources, tmp_path, capsys):
    path = tmp_path / "weights.pth"
    write_file(path, kind, tmp_path, (sources / "g2-dense" / "sft_vlm_64.pth").read_bytes())
    assert FILES[kind] in refused(capsys, from_native.main, arguments(sources, tmp_path / "model", "g2-dense", path))
    assert [path.name for path in tmp_path.iterdir()] == ["weights.pth"]


def test_a_number_of_heads_that_nothing_tells_is_assumed_with_a_warning(sources, tensors, tmp_path, no_fresh_process, capsys):
    def warning(variant: str, *options: str, weights: Path | None = None) -> str:
        command = arguments(sources, tmp_path / "model", variant, weights, "--overwrite")
        command = [*command[: command.index("--num-attention-heads")], "--overwrite", *options]
        from_native.main(command)
        return capsys.readouterr().err

    assert "num_attention_heads=8 is assumed, as in every published MiniMind2-V" in warning("g2-dense")
    assert "is assumed" in warning("g1-dense")
    assert "is assumed" not in warning("g2-dense", "--num-attention-heads", "8")
    assert "is assumed" not in warning("g3-dense")  # q_norm tells how wide a head is
    folder = native_folder(tmp_path / "native", native_weights(tensors, "g1-dense"), {"n_heads": 4})
    assert "is assumed" not in warning("g1-dense", weights=folder)
    assert json.loads((tmp_path / "model" / "config.json").read_text())["text_config"]["num_attention_heads"] == 4


def test_options_that_do_not_fit(sources, tmp_path, capsys):
    def message(*command: str) -> str:
        return refused(capsys, from_native.main, list(command))

    output = tmp_path / "model"
    good = arguments(sources, output)
    make_tokenizer(300).save_pretrained(tmp_path / "small")
    assert "vocab_size=300, but the weights have 320" in message(*good, "--tokenizer", str(tmp_path / "small"))
    assert "no tokenizer can be loaded" in message(*good, "--tokenizer", str(tmp_path / "nothing"))
    assert "no configuration can be loaded" in message(*good, "--vision-tower", str(tmp_path / "nothing"))
    assert "do not split into 7 heads" in message(*good, "--num-attention-heads", "7")
    assert "dense model" in message(*good, "--num-experts-per-tok", "2")
    assert "weights have 4" in message(*arguments(sources, output, "g3-dense", None, "--num-attention-heads", "8"))
    assert "there is no file" in message(*good, "--weights", str(tmp_path / "nothing.pth"))
    without_tower = [*good[:2], *good[4:]]
    assert "pass --vision-tower" in message(*without_tower)
    assert not output.exists()


NATIVE_CONFIGS = {
    '{"model_type": "minimind-v", "rope_theta": "x"}': "rope_parameters['rope_theta']='x': expected a number from 1 on",
    '{"model_type": "minimind-v", "inference_rope_scaling": true, "rope_scaling": {"factor": "x"}}': "['factor']='x': expected",
    '{"model_type": "minimind-v", "num_attention_heads": 0}': "do not split into 0 heads",
    '{"model_type": "minimind-v", "n_layers": 1000000000}': "num_hidden_layers=1000000000, but the weights have 3",
    '{"model_type": "minimind-v", "hidden_act": "sin"}': "hidden_act",
    '["minimind-v"]': "is no native folder",
    "[" * 100_000: "is no native folder",
}


@pytest.mark.parametrize("content", NATIVE_CONFIGS, ids=lambda content: content[:70])
def test_odd_native_configurations_are_refused(content, sources, tmp_path, capsys):
    (tmp_path / "native").mkdir()
    shutil.copy(sources / "g2-dense" / "sft_vlm_64.pth", tmp_path / "native" / "pytorch_model.bin")
    (tmp_path / "native" / "config.json").write_text(content)
    command = ["--weights", tmp_path / "native", "--vision-tower", sources / "g2-dense", "--tokenizer", sources / "tokenizer"]
    assert NATIVE_CONFIGS[content] in refused(
        capsys, from_native.main, [*map(str, command), "--output", str(tmp_path / "model")]
    )


ENCODERS = {
    "patch size 0": ("config.json", {"patch_size": 0}, "vision_config.patch_size=0: expected an integer from 1 to 8192"),
    "image size x": ("config.json", {"image_size": "x"}, "image_size"),
    "no layers": ("config.json", {"num_hidden_layers": 0}, "num_hidden_layers=0"),
    "a billion layers": ("config.json", {"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000"),
    "no heads": ("config.json", {"num_attention_heads": 0}, "no configuration can be loaded from there"),
    "more layers": ("config.json", {"num_hidden_layers": 5}, "it has no weights for encoder.layers.2."),
    "no size": ("preprocessor_config.json", {"crop_size": "x"}, "preprocessing"),
    "another size": ("preprocessor_config.json", {"crop_size": {"height": 24, "width": 24}}, "its preprocessing gives 3x24x24"),
    "a variance of 0": (
        "preprocessor_config.json",
        {"image_std": [0, 0, 0]},
        "expected positive numbers",
    ),
    "a factor of 0": (
        "preprocessor_config.json",
        {"rescale_factor": 0},
        "rescale_factor=0: expected positive",
    ),
    "no crop": ("preprocessor_config.json", {"do_center_crop": False}, "its preprocessing gives 3x28x56 pixels"),
    "activation": ("config.json", {"hidden_act": "nope"}, "vision_config.hidden_act='nope': expected one of"),
    "no preprocessing": ("preprocessor_config.json", "gone", "take preprocessor_config.json from where"),
    "garbage": ("preprocessor_config.json", None, "its preprocessing cannot be read"),
    "garbage weights": ("model.safetensors", None, "its weights cannot be loaded"),
}


@pytest.mark.parametrize("kind", ENCODERS)
def test_spoiled_encoders_are_refused(kind, sources, tmp_path, capsys):
    file, change, reason = ENCODERS[kind]
    tower = shutil.copytree(sources / "g2-dense", tmp_path / "tower")
    if change == "gone":
        (tower / file).unlink()
    else:
        content = "{" if change is None else json.dumps(json.loads((tower / file).read_text()) | change)
        (tower / file).write_text(content)
    command = [*arguments(sources, tmp_path / "model"), "--vision-tower", str(tower)]
    assert reason in refused(capsys, from_native.main, command)
    assert not (tmp_path / "model").exists()


def spoil_folder(folder: Path, kind: str) -> None:
    file = folder / "model.safetensors"
    if kind in ("truncated", "garbage"):
        file.write_bytes(file.read_bytes()[:-100] if kind == "truncated" else b"garbage" * 100)
    elif kind == "no weights":
        file.unlink()
    elif kind == "no config.json":
        (folder / "config.json").unlink()
    elif kind == "garbage config.json":
        (folder / "config.json").write_text("[]")
    else:
        tensors = load_file(file)
        name = "model.language_model.layers.1.mlp.up_proj.weight"
        tensor = tensors.pop(name)
        if kind == "unknown":
            tensors |= {name: tensor, "extra": torch.ones(1)}
        elif kind == "misshapen":
            tensors[name] = tensor.T.contiguous()
        elif kind == "NaN":
            tensors[name] = tensor.where(tensor > tensor.min(), float("nan"))
        elif kind == "integers":
            tensors[name] = tensor.to(torch.int8)
        save_file(tensors, file, metadata={"format": "pt"})


FOLDERS = {
    "truncated": "model.safetensors is truncated or damaged",
    "garbage": "model.safetensors is truncated or damaged",
    "no weights": "there is no model.safetensors",
    "no config.json": "no config.json",
    "garbage config.json": "no configuration can be loaded",
    "missing": 'Missing key(s) in state_dict: "model.language_model.layers.1.mlp.up_proj.weight"',
    "unknown": 'Unexpected key(s) in state_dict: "extra"',
    "misshapen": "size mismatch for model.language_model.layers.1.mlp.up_proj.weight",
    "integers": 'parameter named "model.language_model.layers.1.mlp.up_proj.weight"',
    "NaN": "NaN or infinite values in model.language_model.layers.1.mlp.up_proj.weight",
}


@pytest.mark.parametrize("main", [to_native.main, to_llava.main], ids=["to_native", "to_llava"])
@pytest.mark.parametrize("kind", FOLDERS)
def test_damaged_folders_are_not_converted(kind, main, sources, tmp_path, no_fresh_process, capsys):
    from_native.main(arguments(sources, tmp_path / "model"))
    spoil_folder(tmp_path / "model", kind)
    command = ["--model", str(tmp_path / "model"), "--output", str(tmp_path / "output")]
    assert FOLDERS[kind] in refused(capsys, main, command)
    assert not (tmp_path / "output").exists()


def test_an_answer_that_the_cache_changes_is_noticed(sources, tmp_path, no_fresh_process, monkeypatch):
    from_native.main(arguments(sources, tmp_path / "model"))
    model = MiniMindVForConditionalGeneration.from_pretrained(tmp_path / "model").eval()
    forward = type(model).forward
    prompt = conversion.verification.sample_inputs(model.config)["input_ids"].shape[1]

    @functools.wraps(forward)
    def other_answer(self, input_ids=None, **kwargs):
        output = forward(self, input_ids=input_ids, **kwargs)
        if input_ids.shape[1] > prompt:
            output.logits = output.logits.flip(-1)
        return output

    monkeypatch.setattr(type(model), "forward", other_answer)
    with pytest.raises(ConversionError, match="answers otherwise"):
        verify(model, tmp_path / "model", remote_code=True)


def test_overwrite_replaces_model_folders_only(sources, tmp_path, no_fresh_process, capsys):
    output = tmp_path / "model"
    command = arguments(sources, output)
    output.mkdir()  # empty is fine
    from_native.main(command)
    capsys.readouterr()
    (output / "old.json").write_text("{}")
    assert "pass --overwrite" in refused(capsys, from_native.main, command)
    from_native.main([*command, "--overwrite"])
    assert not (output / "old.json").exists()
    (output / "thesis.odt").write_text("precious")
    assert "it holds thesis.odt" in refused(capsys, from_native.main, [*command, "--overwrite"])
    assert (output / "thesis.odt").read_text() == "precious"
    for taken in (sources, sources / "g2-dense"):
        assert "is or holds the input" in refused(capsys, from_native.main, [*arguments(sources, taken), "--overwrite"])


def test_failure_while_writing_leaves_what_was_there(sources, tmp_path, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise ConversionError("the written folder gives other logits")

    monkeypatch.setattr(conversion.from_native, "verify", fail)
    output = tmp_path / "model"
    output.mkdir()
    (output / "config.json").write_text("{}")
    assert "other logits" in refused(capsys, from_native.main, [*arguments(sources, output), "--overwrite"])
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert [path.name for path in output.iterdir()] == ["config.json"]


def test_a_folder_that_gives_other_logits_is_noticed(sources, tmp_path, no_fresh_process):
    from_native.main(arguments(sources, tmp_path / "model"))
    model = MiniMindVForConditionalGeneration.from_pretrained(tmp_path / "model").eval()
    stored = load_file(tmp_path / "model" / "model.safetensors")
    stored["model.language_model.norm.weight"] *= 1.01
    save_file(stored, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConversionError, match="other logits"):
        verify(model, tmp_path / "model", remote_code=True)


# ── Stock models ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_llava_answers_alike_without_our_code(sources, tmp_path, no_fresh_process):
    from_native.main(arguments(sources, tmp_path / "ours"))
    # This one goes through a fresh process
    to_llava.main(["--model", str(tmp_path / "ours"), "--output", str(tmp_path / "llava")])
    assert not list((tmp_path / "llava").glob("*.py"))
    assert not any("auto_map" in path.read_text() for path in (tmp_path / "llava").glob("*.json"))
    ours = MiniMindVForConditionalGeneration.from_pretrained(tmp_path / "ours").eval()
    stock = AutoModelForImageTextToText.from_pretrained(tmp_path / "llava").eval()
    assert type(stock).__name__ == "LlavaForConditionalGeneration"
    messages = [{"role": "user", "content": [{"type": "image", "image": make_image()}, {"type": "text", "text": "What?"}]}]
    inputs = {}
    for name, processor_class in (("ours", MiniMindVProcessor), ("llava", LlavaProcessor)):
        processor = processor_class.from_pretrained(tmp_path / name)
        options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
        inputs[name] = processor.apply_chat_template(messages, **options)
    assert inputs["ours"]["input_ids"].tolist() == inputs["llava"]["input_ids"].tolist()
    torch.testing.assert_close(inputs["ours"]["pixel_values"], inputs["llava"]["pixel_values"], atol=0, rtol=0)
    with torch.no_grad():
        expected, logits = ours(**inputs["ours"]).logits, stock(**inputs["llava"]).logits
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


def test_llava_with_a_gelu_that_changes_nothing(sources, tensors, tmp_path, no_fresh_process):
    """As mlx-vlm reads it: two layers with biases, GELU between them, and rope_theta where transformers 4 had it."""
    native = {name: tensor.half() for name, tensor in native_weights(tensors, "g2-dense").items()}
    torch.save(native, tmp_path / "half.pth")
    from_native.main(arguments(sources, tmp_path / "ours", "g2-dense", tmp_path / "half.pth"))
    to_llava.main(["--model", str(tmp_path / "ours"), "--output", str(tmp_path / "llava"), "--gelu"])
    config = json.loads((tmp_path / "llava" / "config.json").read_text())
    assert config["projector_hidden_act"] == "gelu"
    assert config["text_config"]["rope_theta"] == 1e6
    stored = load_file(tmp_path / "llava" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
    first, second = (
        {kind: stored[f"{prefix}multi_modal_projector.linear_{number}.{kind}"] for kind in ("weight", "bias")}
        for number in (1, 2)
        for prefix in {name.partition("multi_modal_projector")[0] for name in stored if "multi_modal_projector" in name}
    )
    ours = MiniMindVForConditionalGeneration.from_pretrained(tmp_path / "ours", dtype=torch.float32).eval()
    pixel_values = torch.randn(2, 3, *[ours.config.vision_config.image_size] * 2)
    with torch.no_grad():
        outputs = ours.get_image_features(pixel_values)
        patches = outputs.last_hidden_state[:, 1:]
        values = torch.nn.functional.gelu(patches @ first["weight"].T + first["bias"])
        torch.testing.assert_close(values @ second["weight"].T + second["bias"], outputs.pooler_output, atol=2e-5, rtol=0)


def test_gelu_is_for_a_projector_of_one_layer(sources, tensors, tmp_path, no_fresh_process, capsys):
    native = {name: t for name, t in native_weights(tensors, "g2-dense").items() if not name.startswith("vision_proj.")}
    torch.save(native, tmp_path / "llm_64.pth")
    command = arguments(sources, tmp_path / "ours", "g2-dense", tmp_path / "llm_64.pth")
    from_native.main([*command[:2], *command[4:]])  # without --vision-tower
    command = ["--model", str(tmp_path / "ours"), "--output", str(tmp_path / "llava"), "--gelu"]
    assert "--gelu is for a projector of one layer" in refused(capsys, to_llava.main, command)


@pytest.mark.parametrize(("variant", "reason"), [("g2-moe", "shared expert"), ("g3-dense", "LayerNorm")])
def test_llava_refuses_what_it_cannot_hold(variant, reason, sources, tmp_path, no_fresh_process, capsys):
    from_native.main(arguments(sources, tmp_path / "ours", variant))
    assert reason in refused(capsys, to_llava.main, ["--model", str(tmp_path / "ours"), "--output", str(tmp_path / "llava")])
    assert not (tmp_path / "llava").exists()


@pytest.mark.parametrize(
    ("variant", "stock"),
    [("g2-dense", "LlamaForCausalLM"), ("g3-dense", "Qwen3ForCausalLM"), ("g3-moe", "Qwen3MoeForCausalLM")],
)
def test_language_models_as_stock_models(variant, stock, sources, tensors, tmp_path, no_fresh_process, monkeypatch):
    native = {name: t for name, t in native_weights(tensors, variant).items() if not name.startswith("vision_proj.")}
    torch.save(native, tmp_path / "llm_64.pth")
    command = arguments(sources, tmp_path / "ours", variant, tmp_path / "llm_64.pth")
    from_native.main([*command[:2], *command[4:]])  # without --vision-tower
    assert "pipeline_tag: text-generation" in (tmp_path / "ours" / "README.md").read_text(encoding="utf-8")
    if variant != "g3-moe":
        monkeypatch.setattr(conversion.to_llava, "verify", lambda *args, **kwargs: 0.0)
    to_llava.main(["--model", str(tmp_path / "ours"), "--output", str(tmp_path / "stock")])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "stock").eval()
    assert type(model).__name__ == stock
    ours = MiniMindForCausalLM.from_pretrained(tmp_path / "ours").eval()
    input_ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids).logits, ours(input_ids).logits, atol=1e-5, rtol=0)
    to_native.main(["--model", str(tmp_path / "ours"), "--output", str(tmp_path / "back.pth")])
    assert same_bits(torch.load(tmp_path / "back.pth", weights_only=True), native)


def test_way_back_refuses(sources, tmp_path, no_fresh_process, capsys):
    def message(model: Path, output: Path) -> str:
        return refused(capsys, to_native.main, ["--model", str(model), "--output", str(output)])

    from_native.main(arguments(sources, tmp_path / "model"))
    capsys.readouterr()
    (tmp_path / "there.pth").write_text("precious")
    assert "there already" in message(tmp_path / "model", tmp_path / "there.pth")
    assert (tmp_path / "there.pth").read_text() == "precious"
    assert "holds a 'clip_vision_model' model" in message(sources / "g2-dense", tmp_path / "back.pth")
    assert "no config.json" in message(tmp_path / "nothing", tmp_path / "back.pth")
    stored = load_file(tmp_path / "model" / "model.safetensors")
    del stored["model.language_model.norm.weight"]
    save_file(stored, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    assert "does not hold the model of its config.json" in message(tmp_path / "model", tmp_path / "back.pth")
    assert not (tmp_path / "back.pth").exists()
