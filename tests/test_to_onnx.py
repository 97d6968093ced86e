"""Export to ONNX: graphs that answer as the model does, in ONNX Runtime through generate(), and in transformers.js."""

import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MOE, make_image, make_model, make_processor
from evaluate import choice_scores
from PIL import Image
from transformers import AutoProcessor, TextIteratorStreamer


pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

from minimind_v_hf import MiniMindForCausalLM, MiniMindVOnnxModel, MiniMindVProcessor, MiniMindVTextConfig
from minimind_v_hf.chat import Conversation, answer_questions, encode_questions, load_model
from minimind_v_hf.conversion import ConversionError, onnx_graphs, to_onnx
from minimind_v_hf.conversion.folders import check_output


ROOT = Path(__file__).parents[1]
SIGLIP = {"model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
KINDS = {
    "dense": ({}, {}, ["fp32", "q8", "q4"]),
    "moe": (MOE, {}, ["fp32", "q4"]),
    # minimind-3: q/k norm, one expert per token and none shared, YaRN, SigLIP, a projector of two layers
    "minimind-3": (
        {"use_qk_norm": True, "num_experts": 4, "num_experts_per_tok": 1}
        | {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 128}},
        {"vision_config": SIGLIP, "projector_num_layers": 2, "projector_layer_norm": True},
        ["fp32", "q4f16"],
    ),
}
QUESTIONS = [
    ([], "Two?"),
    (["red"], "<image>\nWhat colour is the circle?"),
    (["blue", "green"], "<image>图中<image>"),
]


def save(folder: Path, model) -> Path:
    model.save_pretrained(folder)
    make_processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def export(tmp_path_factory):
    """By kind, the model and the folder of its graphs; each is exported once."""

    @functools.cache
    def export_once(kind: str):
        torch.manual_seed(1)
        text_config, fields, dtypes = KINDS[kind]
        folder = tmp_path_factory.mktemp(kind)
        model = make_model(text_config, **fields)
        model.generation_config.update(eos_token_id=None, pad_token_id=0)
        to_onnx.convert(save(folder / "model", model), folder / "onnx", dtype=dtypes)
        return model, folder / "onnx"

    return export_once


@pytest.fixture(params=KINDS)
def exported(request, export):
    return export(request.param)


@pytest.fixture
def dense(export):
    model, folder = export("dense")
    return model, MiniMindVOnnxModel.from_pretrained(folder, "fp32"), make_processor()


def batch(processor):
    """Prompts with none, one and two images, padded on the left."""
    conversations = [[{"role": "user", "content": text}] for _, text in QUESTIONS]
    return encode_questions(processor, conversations, [[make_image(name) for name in colours] for colours, _ in QUESTIONS])


def test_answers_of_each_precision(exported):
    model, folder = exported
    processor = MiniMindVProcessor.from_pretrained(folder)
    inputs = batch(processor)
    assert inputs["attention_mask"].sum(dim=1).tolist() == sorted(inputs["attention_mask"].sum(dim=1).tolist())
    expected = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    with torch.no_grad():
        logits = model(**inputs).logits[inputs["attention_mask"].bool()].log_softmax(-1)
    bounds = {"fp32": 1e-4, "fp16": 0.05, "q8": 1.0, "q4": 6.0, "q4f16": 6.0}
    for dtype, bound in bounds.items():
        if not to_onnx.graph_file(folder, "embed_tokens", dtype).exists():
            with pytest.raises(ValueError, match=f"has no graphs in {dtype}: expected one of fp32"):
                MiniMindVOnnxModel.from_pretrained(folder, dtype)
            continue
        onnx = MiniMindVOnnxModel.from_pretrained(folder, dtype)
        found = onnx(**inputs).logits[inputs["attention_mask"].bool()].log_softmax(-1)
        assert (found - logits).abs().max() < bound, dtype
        answers = onnx.generate(**inputs, max_new_tokens=12, do_sample=False)
        if dtype == "fp32":
            assert torch.equal(answers, expected)
        else:
            assert answers.shape == expected.shape


def test_the_folder_says_how_well_each_precision_answers(exported):
    _, folder = exported
    card = (folder / "README.md").read_text()
    dtypes = [dtype for dtype in to_onnx.PRECISIONS if to_onnx.graph_file(folder, "embed_tokens", dtype).exists()]
    assert "library_name: transformers.js" in card.split("---")[1].splitlines()
    assert r'text: "\n描述一下这个图像的内容。"' in card  # a line break inside a string is none in JavaScript
    precisions = card.partition("## Precisions")[2]
    rows = [line.split(" | ") for line in precisions.splitlines() if line.startswith("| ")][2:]
    assert [row[0].removeprefix("| ") for row in rows] == dtypes
    assert rows[0][2] == "100.0%"
    shares = {dtype: float(row[2].rstrip("%")) for dtype, row in zip(dtypes, rows, strict=True)}
    for dtype, share in shares.items():
        assert (f"**{dtype} answers badly: only {share}% of the greedy tokens" in card) == (share < 95)
    best = json.loads((folder / "config.json").read_text())["transformers.js_config"]
    assert shares[best["dtype"]] >= 95
    assert best["device_config"].keys() == {"wasm", "webgpu"}


def test_the_files_are_those_that_transformers_js_reads(exported):
    model, folder = exported
    config, settings, processor, tokenizer = (
        json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        for name in ("config", "preprocessor_config", "processor_config", "tokenizer_config")
    )
    assert config["model_type"] == "llava"
    assert config["image_token_index"] == model.config.image_token_id
    shape = {"num_hidden_layers": 2, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512}
    assert shape.items() <= config["text_config"].items()
    assert settings["image_processor_type"] == "CLIPImageProcessor"
    assert settings["processor_class"] == "LlavaProcessor"
    assert settings["size"] == {"shortest_edge": 16}
    assert (processor["patch_size"], processor["num_additional_image_tokens"], processor["image_token"]) == (4, 0, "<image>")
    assert tokenizer["chat_template"] == (folder / "chat_template.jinja").read_text(encoding="utf-8")
    assert isinstance(AutoProcessor.from_pretrained(folder), MiniMindVProcessor)
    check_output(folder, overwrite=True, inputs=[])


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "temperature": 1.5, "top_p": 0.9, "num_return_sequences": 2},
        {"num_beams": 3, "num_return_sequences": 2, "do_sample": False},
        {"use_cache": False, "do_sample": False},
        {"stop_strings": ["e", "a"], "do_sample": False},
        {"repetition_penalty": 1.3, "do_sample": False},
    ],
    ids=["sampling", "beams", "without a cache", "stop strings", "penalty"],
)
def test_generate_is_transformers_own(dense, options):
    model, onnx, processor = dense
    inputs = batch(processor)
    if "stop_strings" in options:
        options = options | {"tokenizer": processor.tokenizer}
    answers = []
    for each in (model, onnx):
        torch.manual_seed(7)
        answers.append(each.generate(**inputs, max_new_tokens=10, **options))
    assert torch.equal(*answers)
    assert answers[0].shape[0] == 3 * options.get("num_return_sequences", 1)


def test_answers_stream(dense):
    model, onnx, processor = dense
    inputs = encode_questions(processor, [[{"role": "user", "content": "Two?"}]], [[]])
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    onnx.generate(**inputs, max_new_tokens=9, do_sample=False, streamer=streamer)
    expected = answer_questions(model, processor, inputs, max_new_tokens=9)
    assert "".join(streamer).strip() == expected[0]


def test_a_conversation_goes_on_from_its_cache(dense):
    model, onnx, processor = dense
    conversations = [Conversation(each, processor) for each in (model, onnx)]
    for colours, question in [([], "Hello"), (["red", "blue"], "What colour?"), ([], "图中有几个图形？"), (["green"], "And?")]:
        answers = []
        for conversation in conversations:
            for colour in colours:
                conversation.attach(image=make_image(colour))
            answers.append(conversation.ask(question, max_new_tokens=9))
        expected, found = ((each.text, each.cached_tokens, each.new_tokens, each.new_images) for each in answers)
        assert found == expected


def test_likelihoods_of_choices(dense):
    model, onnx, processor = dense
    choices = [["red", "a blue one"], ["yes"], ["x", "four shapes", "左上"]]
    with torch.no_grad():
        expected, found = (choice_scores(each, processor, batch(processor), choices) for each in (model, onnx))
    assert [pytest.approx(row, abs=1e-3) for row in expected] == found


def test_chat_and_evaluate_take_the_folder(export, tmp_path):
    _, folder = export("dense")
    make_image().save(tmp_path / "red.png")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    row = {"conversations": [{"role": "user", "content": "<image>\n?"}, {"role": "assistant", "content": "a"}]}
    (tmp_path / "data.jsonl").write_text(json.dumps(row | {"image": "red.png"}))
    commands = {
        "chat.py": ["--image", "red.png", "--max-new-tokens", "3", "What?"],
        "evaluate.py": ["--data", "data.jsonl", "--images", ".", "--output", "answers.jsonl", "--max-new-tokens", "3"],
    }
    for script, options in commands.items():
        command = [sys.executable, str(ROOT / "examples" / script), "--model", str(folder), *options]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
    model, processor = load_model(folder, "fp32")
    inputs = encode_questions(processor, [row["conversations"][:1]], [[make_image()]])
    answer = json.loads((tmp_path / "answers.jsonl").read_text())["answer"]
    assert answer == answer_questions(model, processor, inputs, max_new_tokens=3)[0]


def test_other_precisions_and_options_are_refused(export, dense, tmp_path):
    (_, folder), (_, onnx, _) = export("dense"), dense
    save(tmp_path, make_model())
    with pytest.raises(ValueError, match=r"has no precision 'q4': convert/to_onnx\.py makes a folder"):
        load_model(tmp_path, "q4")
    with pytest.raises(ValueError, match="has no graphs in bfloat16: expected one of fp32, q8, q4, or auto"):
        load_model(folder, "bfloat16")
    with pytest.raises(ValueError, match="is in ONNX, which knows nothing of attn_implementation"):
        load_model(folder, attn_implementation="eager")
    with pytest.raises(ValueError, match="holds no ONNX graphs"):
        MiniMindVOnnxModel.from_pretrained(tmp_path)
    with pytest.raises(NotImplementedError, match="copy it"):
        onnx.save_pretrained(tmp_path)


def test_what_forward_cannot_do_is_an_error(dense):
    _, onnx, processor = dense
    inputs = batch(processor)
    with pytest.raises(ValueError, match="hold 48 image tokens, but 2 images of 16 tokens"):
        onnx(**{**inputs, "pixel_values": inputs["pixel_values"][:2]})
    with pytest.raises(ValueError, match=r"holds image tokens .* but no pixel_values were given"):
        onnx.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=2)
    with pytest.raises(ValueError, match="the cache was lost"):
        onnx(inputs["input_ids"][:, -1:], attention_mask=inputs["attention_mask"])
    with pytest.raises(ValueError, match="expected a DynamicCache"):
        onnx.generate(**inputs, max_new_tokens=2, cache_implementation="static")
    with pytest.raises(TypeError, match="labels"):
        onnx(**inputs, labels=inputs["input_ids"])


def test_a_damaged_graph_is_named(export, tmp_path):
    _, folder = export("dense")
    shutil.copytree(folder, tmp_path / "onnx")
    path = to_onnx.graph_file(tmp_path / "onnx", "vision_encoder", "fp32")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"vision_encoder\.onnx cannot be opened"):
        load_model(tmp_path / "onnx", "fp32")


def test_graphs_that_answer_otherwise_are_not_written(tmp_path, monkeypatch):
    save(tmp_path / "model", make_model())
    monkeypatch.setattr(onnx_graphs.EmbedTokens, "forward", lambda self, input_ids: -self.embed_tokens(input_ids))
    with pytest.raises(ConversionError, match="the graphs answer otherwise than the model"):
        to_onnx.convert(tmp_path / "model", tmp_path / "onnx", dtype=["fp32"])
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_folders_that_cannot_be_exported_are_refused(tmp_path):
    refused = {}
    text = MiniMindForCausalLM(MiniMindVTextConfig(vocab_size=320, hidden_size=32, num_hidden_layers=1, num_attention_heads=4))
    text.save_pretrained(tmp_path / "text")
    refused["text"] = "is a language model without images"
    rope = {"rope_type": "dynamic", "rope_theta": 1e6, "factor": 2.0}
    save(tmp_path / "dynamic", make_model({"rope_parameters": rope}))
    refused["dynamic"] = "'dynamic', whose frequencies change"
    checkpoint = save(tmp_path / "checkpoint", make_model())
    config = json.loads((checkpoint / "config.json").read_text()) | {"encoder_left_out": True}
    (checkpoint / "config.json").write_text(json.dumps(config))
    refused["checkpoint"] = "checkpoint in the middle of a training run, without its image encoder"
    llama = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 320}
    save(tmp_path / "llama", make_model(llama))
    refused["llama"] = "decoder 'llama'"
    refused["nothing"] = "it has no config.json"
    model = save(tmp_path / "tokenless", make_model())
    (model / "tokenizer.json").write_text("{")
    refused["tokenless"] = "tokenless: its processor"
    for name, reason in refused.items():
        with pytest.raises(ConversionError, match=reason):
            to_onnx.convert(tmp_path / name, tmp_path / "onnx")
    with pytest.raises(ConversionError, match="Cannot read the image"):
        to_onnx.convert(save(tmp_path / "model", make_model()), tmp_path / "onnx", images=[tmp_path / "no.png"])
    for name, options, reason in [("text", {}, "is not empty"), ("full", {"overwrite": True}, "it holds notes")]:
        (tmp_path / "full" / "onnx").mkdir(parents=True, exist_ok=True)
        (tmp_path / "full" / "config.json").touch()
        (tmp_path / "full" / "onnx" / "notes").touch()
        with pytest.raises(ConversionError, match=reason):
            to_onnx.convert(tmp_path / "model", tmp_path / name, **options)
    assert not (tmp_path / "onnx").exists()


def transformers_js() -> Path | None:
    """The folder of the package, where it and Node are installed."""
    modules = os.environ.get("NODE_MODULES", ROOT / "examples" / "browser" / "node_modules")
    package = Path(modules) / "@huggingface" / "transformers"
    return package if package.is_dir() and shutil.which("node") else None


@pytest.mark.skipif(not transformers_js(), reason="needs Node, and transformers.js in NODE_MODULES or examples/browser")
def test_transformers_js_gives_the_greedy_tokens(exported, tmp_path):
    model, folder = exported
    processor, noise = make_processor(), np.random.default_rng(0)
    prompts = []
    for colours, text in QUESTIONS:
        images = [str(tmp_path / f"{colour}.png") for colour in colours]
        for colour, path in zip(colours, images, strict=True):
            # noise of the encoder's size (resizing differs a little), the same in every run (PIL's own is not)
            image = Image.fromarray(noise.integers(0, 256, (16, 16, 3), dtype=np.uint8))
            image.paste(colour, (2, 3, 9, 9))
            image.save(path)
        prompts.append({"messages": [{"role": "user", "content": text}], "images": images})
    request = {"folder": str(folder), "dtype": "fp32", "maxNewTokens": 12, "prompts": prompts}
    command = ["node", str(ROOT / "tests" / "transformers_js.mjs"), str(transformers_js())]
    done = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    for prompt, found in zip(prompts, json.loads(done.stdout), strict=True):
        inputs = encode_questions(processor, [prompt["messages"]], [prompt["images"]])
        # transformers.js ends at the end of sequence of config.json, where generation_config.json says there is none
        eos = model.config.text_config.eos_token_id
        expected = model.generate(**inputs, max_new_tokens=12, do_sample=False, eos_token_id=eos)
        assert found == expected[0, inputs["input_ids"].shape[1] :].tolist()
