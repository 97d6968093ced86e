"""Configurations: defaults, presets, impossible values, saving and loading."""

import copy
import json
import pickle

import pytest
import torch
from conftest import make_config
from transformers import AutoConfig, CLIPConfig, LlamaConfig, SiglipVisionConfig

from minimind_v_hf import MiniMindVConfig, MiniMindVForConditionalGeneration, MiniMindVTextConfig


def test_default_is_minimind2_v_small():
    config = MiniMindVConfig()
    assert config.image_seq_length == 196
    assert config.vision_config.model_type == "clip_vision_model"
    assert (config.text_config.hidden_size, config.text_config.num_hidden_layers) == (512, 8)
    assert (config.text_config.head_dim, config.text_config.intermediate_size) == (64, 1408)
    assert config.tie_word_embeddings
    assert config.get_text_config() is config.text_config


# Without the encoder, which the project's own figures leave out; the tied head counts once
@pytest.mark.parametrize(
    ("preset", "parameters", "image_tokens"),
    [
        ("minimind2-v-small", 26_223_616, 196),
        ("minimind2-v", 104_621_568, 196),
        ("minimind2-v-moe", 145_521_920, 196),
        ("minimind-3v", 65_094_912, 64),
        ("minimind-3v-moe", 199_599_360, 64),
    ],
)
def test_presets_have_the_published_sizes(preset, parameters, image_tokens):
    config = MiniMindVConfig.from_preset(preset)
    with torch.device("meta"):
        model = MiniMindVForConditionalGeneration(config)
    encoder = sum(p.numel() for p in model.model.vision_tower.parameters())
    assert sum(p.numel() for p in model.parameters()) - encoder == parameters
    assert config.image_seq_length == image_tokens
    assert encoder > 85_000_000


def test_minimind_3v_moe_uses_65m_of_its_parameters_per_token():
    text = MiniMindVConfig.from_preset("minimind-3v-moe").text_config
    idle_experts = text.num_experts - text.num_experts_per_tok
    idle = text.num_hidden_layers * idle_experts * 3 * text.hidden_size * text.moe_intermediate_size
    assert 199_599_360 - idle == pytest.approx(65e6, rel=0.01)


def test_unknown_preset_lists_the_known_ones():
    with pytest.raises(ValueError, match="preset='minimind-9': expected one of 'minimind2-v-small', "):
        MiniMindVConfig.from_preset("minimind-9")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 100, "num_attention_heads": 7}, "num_attention_heads=7: expected a divisor of hidden_size=100"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3: expected a divisor of num_attention_heads=8"),
        ({"head_dim": 7}, "head_dim=7: expected a positive even integer"),
        ({"hidden_size": 10**9}, "hidden_size=1000000000: Value must be .* smaller or equal to 131072"),
        ({"head_dim": 10**9}, r"num_attention_heads \* head_dim=8000000000: expected an integer from 1 to 131072"),
        ({"intermediate_size": 10**9}, "intermediate_size=1000000000: expected an integer from 1 to 131072"),
        ({"moe_intermediate_size": 0}, "moe_intermediate_size=0: expected an integer from 1"),
        ({"vocab_size": 10**12}, "vocab_size=1000000000000: Value must be"),
        ({"num_experts": 10**6}, "num_experts=1000000: Value must be"),
        ({"vocab_size": 0}, "vocab_size=0: Value must be greater or equal to 1 and smaller or equal to 4194304"),
        ({"hidden_size": "512"}, "hidden_size='512': expected int"),
        ({"num_hidden_layers": 2.5}, "num_hidden_layers=2.5: expected int"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000: Value must be .* or equal to 1024"),
        ({"use_qk_norm": "x"}, "use_qk_norm='x': expected bool"),
        ({"norm_topk_prob": 1}, "norm_topk_prob=1: expected bool"),
        ({"seq_aux": None}, "seq_aux=None: expected bool"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings='no': expected bool"),
        ({"use_cache": 0}, "use_cache=0: expected bool"),
        ({"output_router_logits": "x"}, "output_router_logits='x': expected bool"),
        ({"num_experts": 2, "num_experts_per_tok": 3}, "num_experts_per_tok=3: expected an integer from 1 to num_experts=2"),
        ({"num_experts": -1}, "num_experts=-1: Value must be greater or equal to 0"),
        ({"attention_dropout": 1.5}, "attention_dropout=1.5: Value must be greater or equal to 0 and smaller than 1"),
        ({"rms_norm_eps": -1e-5}, "rms_norm_eps=-1e-05: Value must be greater than 0"),
        ({"initializer_range": "big"}, "initializer_range='big': expected int \\| float"),
        ({"router_aux_loss_coef": -1}, "router_aux_loss_coef=-1: Value must be greater or equal to 0"),
        ({"hidden_act": "nonsense"}, "hidden_act='nonsense': Value must be one of \\['gelu', "),
        ({"pad_token_id": 6400}, "pad_token_id=6400: expected None, or an id in the vocabulary, from 0 to 6399"),
        ({"eos_token_id": [2, -1]}, r"eos_token_id=\[2, -1\]: expected None, or an id"),
        ({"rope_parameters": "yarn"}, "rope_parameters='yarn': expected .*dict"),
        (
            {"rope_parameters": {"rope_type": "nonsense"}},
            r"\['rope_type'\]='nonsense': expected one of default, ",
        ),
        ({"rope_parameters": {"rope_theta": 0}}, r"rope_parameters\['rope_theta'\]=0: expected a number from 1 on"),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 0.5}},
            r"\['factor'\]=0.5: expected a number from 1 on",
        ),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters={'rope_type': 'yarn', .*[Mm]issing.*'factor'"),
    ],
)
def test_impossible_text_values_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        MiniMindVTextConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_token_id": 6400}, "image_token_id=6400: expected an id in the vocabulary, from 0 to 6399"),
        ({"image_token_id": -1}, "image_token_id=-1: "),
        ({"image_seq_length": 195}, "image_seq_length=195: expected 196, which is what the encoder gives"),
        ({"patches_per_token": 5}, "patches_per_token=5: expected a divisor of the encoder's 196 patches"),
        ({"projector_layer_norm": "x"}, "projector_layer_norm='x': expected bool"),
        ({"multimodal_projector_bias": 0}, "multimodal_projector_bias=0: expected bool"),
        ({"tie_word_embeddings": "x"}, "tie_word_embeddings='x': expected bool"),
        ({"vision_config": {"num_hidden_layers": 0}}, "vision_config.num_hidden_layers=0: expected an integer from 1 to 1024"),
        ({"vision_config": {"num_hidden_layers": 10**9}}, "vision_config.num_hidden_layers=1000000000: expected an integer"),
        ({"projector_num_layers": 3}, "projector_num_layers=3: expected Literal\\[1, 2\\]"),
        ({"projector_hidden_act": "nonsense"}, "projector_hidden_act='nonsense': Value must be one of \\['gelu', "),
        ({"vision_config": {"model_type": "eye"}}, "vision_config.model_type='eye': expected one that transformers knows"),
        ({"vision_config": {"patch_size": 0}}, "vision_config.patch_size=0: expected an integer from 1 to 8192"),
        ({"vision_config": {"image_size": 8, "patch_size": 16}}, "vision_config.patch_size=16: expected at most image_size=8"),
        ({"text_config": 5}, "text_config=5: expected a config, a dict or None"),
    ],
)
def test_impossible_values_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        MiniMindVConfig(**fields)


def test_image_tokens_follow_the_encoder_and_the_merging():
    assert MiniMindVConfig(vision_config={"image_size": 256, "patch_size": 16}).image_seq_length == 256
    assert MiniMindVConfig(vision_config={"image_size": 256, "patch_size": 16}, patches_per_token=4).image_seq_length == 64


def test_other_encoders_and_decoders():
    config = MiniMindVConfig(text_config=LlamaConfig(hidden_size=64), vision_config={"model_type": "siglip_vision_model"})
    assert isinstance(config.vision_config, SiglipVisionConfig)
    assert config.text_config.model_type == "llama"
    assert not config.tie_word_embeddings


def test_of_a_whole_clip_the_vision_half_is_taken():
    clip = CLIPConfig(vision_config={"image_size": 32, "patch_size": 8})
    for given in (clip, clip.to_dict()):
        config = MiniMindVConfig(vision_config=given)
        assert config.vision_config.model_type == "clip_vision_model"
        assert config.image_seq_length == 16


def test_save_and_load(tmp_path):
    config = make_config({"rope_parameters": {"rope_type": "yarn", "factor": 16.0, "rope_theta": 1e6}})
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() | {"_name_or_path": ""} == config.to_dict()
    assert isinstance(loaded, MiniMindVConfig)
    # Each part loads from the folder of the whole
    text_config = MiniMindVTextConfig.from_pretrained(tmp_path)
    of_the_file = {"transformers_version", "_name_or_path"}
    ours = {key: value for key, value in text_config.to_dict().items() if key not in of_the_file}
    assert ours == {key: value for key, value in config.text_config.to_dict().items() if key not in of_the_file}


def test_config_json_holds_only_what_matters(tmp_path):
    MiniMindVConfig().save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    assert content["image_seq_length"] == 196
    assert content["auto_map"]["AutoModel"] == "modeling_minimind_v.MiniMindVModel"
    assert "id2label" not in content["text_config"]
    assert "id2label" not in content["vision_config"]


def test_one_nested_field_is_overridden_at_load(tmp_path):
    make_config({"hidden_size": 48}).save_pretrained(tmp_path)
    loaded = MiniMindVConfig.from_pretrained(tmp_path, text_config={"vocab_size": 20})
    assert loaded.text_config.vocab_size == 20
    assert loaded.text_config.hidden_size == 48


def test_no_warning_without_arguments(no_warnings, caplog):
    MiniMindVConfig()
    MiniMindVTextConfig()
    assert not caplog.records


def test_preset_with_some_fields_set_differently():
    config = MiniMindVConfig.from_preset("minimind-3v", text_config={"num_hidden_layers": 2})
    assert config.text_config.num_hidden_layers == 2
    assert config.text_config.hidden_size == 768
    assert config.text_config.use_qk_norm
    assert MiniMindVConfig.from_preset("minimind-3v").text_config.num_hidden_layers == 8


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"projector_num_layers": True}, "projector_num_layers=True: expected Literal\\[1, 2\\]"),
        ({"projector_hidden_act": [1]}, r"projector_hidden_act=\[1\]: expected str"),
        ({"text_config": {"hidden_act": [1]}}, r"hidden_act=\[1\]: expected str"),
        (
            {"text_config": {"rms_norm_eps": float("inf")}},
            "rms_norm_eps=inf: Value must be greater than 0 and smaller or equal to 1",
        ),
        ({"vision_config": {"num_attention_heads": "x"}}, "vision_config: Field 'num_attention_heads' expected int, got str"),
        (
            {"vision_config": {"hidden_size": 12 * 10**8}},
            "vision_config.hidden_size=1200000000: expected an integer from 1 to 131072",
        ),
        ({"vision_config": {"image_size": 10**9}}, "vision_config.image_size=1000000000: expected an integer from 1 to 8192"),
        ({"vision_config": {"num_attention_heads": -1}}, "vision_config.num_attention_heads=-1: expected an integer from 1"),
        ({"vision_config": {"intermediate_size": 0}}, "vision_config.intermediate_size=0: expected an integer from 1"),
        ({"vision_config": {"hidden_act": "x"}}, "vision_config.hidden_act='x': expected one of"),
    ],
)
def test_what_would_fail_late_is_refused(fields, error):
    with pytest.raises(ValueError, match=error):
        MiniMindVConfig(**fields)


def test_a_config_is_checked_when_it_is_changed_and_when_it_is_saved(tmp_path):
    config = make_config()
    with pytest.raises(ValueError, match="projector_num_layers=3: expected"):
        config.projector_num_layers = 3
    with pytest.raises(ValueError, match="rms_norm_eps='1e-6': expected int"):
        config.text_config.rms_norm_eps = "1e-6"
    config.image_seq_length = 17
    with pytest.raises(ValueError, match="image_seq_length=17: expected 16, which is what the encoder gives"):
        config.save_pretrained(tmp_path)
    assert not (tmp_path / "config.json").exists()


def test_configs_are_copied_and_pickled():
    config = make_config()
    for copied in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert copied.to_dict() == config.to_dict()
