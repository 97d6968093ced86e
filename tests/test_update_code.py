"""Folders saved by earlier versions get the present code, and nothing else of them changes."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import make_config, make_model, make_processor
from test_hub import run_isolated

from minimind_v_hf import MiniMindForCausalLM, update_code


# What a folder of another version may hold: its model answers nothing but token 7
OLD_MODELING = """
import torch
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_minimind_v import MiniMindVConfig, MiniMindVTextConfig
from .video_minimind_v import read_video


class MiniMindForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = MiniMindVTextConfig

    def __init__(self, config):
        super().__init__(config)
        self.anything = torch.nn.Linear(1, 1)
        self.post_init()

    def forward(self, input_ids=None, **kwargs):
        logits = torch.zeros(*input_ids.shape, 320)
        logits[..., 7] = 1
        return CausalLMOutputWithPast(logits=logits)


class MiniMindVForConditionalGeneration(MiniMindForCausalLM):
    config_class = MiniMindVConfig
"""
CHILD = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
Auto = AutoModelForImageTextToText if sys.argv[2] == "vlm" else AutoModelForCausalLM
model = Auto.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
input_ids = torch.tensor([[5, 6, 7, 8]])
options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
tokens = [model.generate(input_ids=input_ids, use_cache=cached, **options)[0].tolist() for cached in (True, False)]
print(json.dumps(tokens))
"""


@pytest.fixture
def old_folder(tmp_path):
    """Saved by an earlier version: other code, one module more, and an auto_map that names other files."""

    def make(kind: str):
        folder = tmp_path / kind
        if kind == "vlm":
            model = make_model()
            make_processor().save_pretrained(folder)
        else:
            model = MiniMindForCausalLM(make_config().text_config).eval()
        model.save_pretrained(folder)
        for file in folder.glob("*minimind*.py"):
            if not file.name.startswith("configuration"):
                file.unlink()
        (folder / "modeling_minimind_v.py").write_text(OLD_MODELING)
        (folder / "video_minimind_v.py").write_text("read_video = None\n")
        config = json.loads((folder / "config.json").read_text())
        name = "MiniMindForCausalLM" if kind == "text" else "MiniMindVForConditionalGeneration"
        config["auto_map"] = {
            "AutoConfig": config["auto_map"]["AutoConfig"],
            "AutoModelForCausalLM": f"modeling_minimind_v.{name}",
            "AutoModelForImageTextToText": f"modeling_minimind_v.{name}",
        }
        config["note"] = "kept, 保留"
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        return folder, model

    return make


@pytest.mark.parametrize("kind", ["vlm", "text"])
def test_old_folder_answers_rightly_after_an_update(kind, old_folder, tmp_path):
    folder, model = old_folder(kind)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    old = json.loads(run_isolated(CHILD, folder, kind, home=tmp_path / ".."))
    assert old[0] == [5, 6, 7, 8, 7, 7, 7, 7, 7, 7]

    command = [sys.executable, "-m", "minimind_v_hf.update_code", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"{'replaced' if kind == 'vlm' else 'removed'} modeling_minimind_v.py" in done.stdout
    assert "replaced config.json" in done.stdout
    assert "removed video_minimind_v.py" in done.stdout
    assert not (folder / "video_minimind_v.py").exists()
    assert not list(folder.glob(".*"))

    (tmp_path / "fresh").mkdir()
    model.save_pretrained(tmp_path / "fresh")
    for file in (tmp_path / "fresh").glob("*.py"):
        assert (folder / file.name).read_bytes() == file.read_bytes()
    config, old_config = (json.loads(text) for text in ((folder / "config.json").read_text(), before["config.json"]))
    assert config.pop("auto_map") == dict(model.config.hub_auto_map)
    old_config.pop("auto_map")
    assert config == old_config
    for name, content in before.items():
        if not name.endswith(".py") and name != "config.json":
            assert (folder / name).read_bytes() == content

    input_ids = torch.tensor([[5, 6, 7, 8]])
    expected = model.generate(input_ids=input_ids, max_new_tokens=6, do_sample=False, eos_token_id=None, use_cache=False)
    assert json.loads(run_isolated(CHILD, folder, kind, home=tmp_path)) == [expected[0].tolist()] * 2
    assert update_code.update_code(folder) == []


def test_a_folder_as_it_is_saved_is_up_to_date(tmp_path):
    make_model().save_pretrained(tmp_path)
    make_processor().save_pretrained(tmp_path)
    assert update_code.update_code(tmp_path) == []


def test_many_folders_with_progress_and_the_wrong_ones_refused(old_folder, tmp_path, capsys):
    folder, _ = old_folder("text")
    (folder / "own_code.py").write_text("from .video_minimind_v import read_video\n")  # still imports it
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "garbage").mkdir()
    (tmp_path / "garbage" / "config.json").write_text("{")
    (tmp_path / "impossible").mkdir()
    (tmp_path / "impossible" / "config.json").write_text('{"model_type": "minimind_v_text", "hidden_size": 0}')
    wrong = [tmp_path / name for name in ("llama", "garbage", "impossible", "nothing")]
    files = {path: sorted(os.listdir(path)) for path in wrong[:3]}
    capsys.readouterr()
    assert update_code.main([*map(str, wrong), str(folder), str(folder)]) == 2
    output, errors = capsys.readouterr()
    assert output.splitlines()[0].startswith(f"[5/6] {folder}: ")
    assert output.splitlines()[1] == f"[6/6] {folder}: up to date"
    for line, reason in zip(errors.splitlines(), ("'llama'", "garbage", "hidden_size", "no config.json"), strict=True):
        assert line.startswith("error: ")
        assert reason in line
    assert {path: sorted(os.listdir(path)) for path in wrong[:3]} == files
    assert (folder / "video_minimind_v.py").is_file()


def test_a_folder_that_cannot_be_written_keeps_its_files(old_folder, monkeypatch, capsys):
    folder, _ = old_folder("text")
    before = sorted(os.listdir(folder))

    def full(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.replace", full)
    assert update_code.main([str(folder)]) == 2
    assert "No space left" in capsys.readouterr().err
    assert sorted(os.listdir(folder)) == before
    assert (folder / "modeling_minimind_v.py").read_text() == OLD_MODELING
