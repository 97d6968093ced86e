"""The same numbers as native MiniMind-V, in all eight variants. See fixtures/README.md for where they come from."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minimind_v_hf import MiniMindVConfig, MiniMindVForConditionalGeneration
from minimind_v_hf.conversion.key_table import from_native, key_table, to_native


GOLDENS = Path(__file__).parent / "fixtures" / "goldens"
INDEX = json.loads((GOLDENS / "index.json").read_text())
GENERATIONS = {"g1": "minimind2-2025-02", "g2": "minimind2", "g3": "minimind-3"}
YARN = {"rope_type": "yarn", "factor": 16, "original_max_position_embeddings": 2048, "beta_fast": 32, "beta_slow": 1}
YARN |= {"attention_factor": 1.0, "rope_theta": 1e6}
CASES = ["single", "batch", "two_images", "text_only"]


@pytest.fixture(scope="module")
def tensors():
    return load_file(GOLDENS / "tensors.safetensors")


def native_config(variant: str) -> MiniMindVConfig:
    """Our configuration of a variant, from what its native configuration says."""
    entry = INDEX[variant]
    native = {**entry["defaults"], **entry["native_config"]}
    text = {
        "vocab_size": native["vocab_size"],
        "hidden_size": native.get("hidden_size", native.get("dim")),
        "intermediate_size": native.get("intermediate_size", native.get("hidden_dim")),
        "num_hidden_layers": native.get("num_hidden_layers", native.get("n_layers")),
        "num_attention_heads": native.get("num_attention_heads", native.get("n_heads")),
        "num_key_value_heads": native.get("num_key_value_heads", native.get("n_kv_heads")),
        "rms_norm_eps": native.get("rms_norm_eps", native.get("norm_eps")),
        "rope_parameters": YARN if native.get("inference_rope_scaling") else None,
    }
    is_3 = variant.startswith("g3")
    if native["use_moe"]:
        text["num_experts"] = native["num_experts"] if is_3 else native["n_routed_experts"]
        text["num_experts_per_tok"] = native["num_experts_per_tok"]
        text["num_shared_experts"] = 0 if is_3 else int(native["n_shared_experts"])
        text["router_aux_loss_coef"] = native["router_aux_loss_coef"] if is_3 else native["aux_loss_alpha"]
        text["seq_aux"] = not is_3
    if is_3:
        text |= {"head_dim": native["head_dim"], "use_qk_norm": True}
        extra = {"image_token_id": 12, "projector_num_layers": 2, "projector_layer_norm": True}
    else:
        extra = {"image_token_id": 34}  # '@': in the goldens it stands for nothing else
    return MiniMindVConfig(text_config=text, vision_config=entry["vision_config"], **extra)


@pytest.fixture(scope="module", params=list(INDEX))
def golden(request, tensors):
    """A variant's model with its native weights, and what native MiniMind-V computed."""
    variant = request.param
    config = native_config(variant)
    table = key_table(config, GENERATIONS[variant[:2]])
    native = {name: tensors[key] for name, key in INDEX[variant]["weights"].items()}
    state_dict = from_native(native, table)
    for name, key in INDEX[variant]["vision_tower"].items():
        state_dict[f"model.vision_tower.{name}"] = tensors[key]
    model = MiniMindVForConditionalGeneration(config).eval()
    model.load_state_dict(state_dict, strict=True)
    return model, {name: tensors[key] for name, key in INDEX[variant]["expected"].items()}, table, native


@pytest.mark.parametrize("case", CASES)
def test_logits(golden, case):
    model, expected, *_ = golden
    with torch.no_grad():
        logits = model(expected[f"{case}.input_ids"], pixel_values=expected.get(f"{case}.pixel_values")).logits
    torch.testing.assert_close(logits[:, expected[f"{case}.logits_positions"]], expected[f"{case}.logits"], atol=5e-5, rtol=0)


def test_projected_image(golden):
    model, expected, *_ = golden
    with torch.no_grad():
        image = model.get_image_features(expected["single.pixel_values"]).pooler_output[0]
    torch.testing.assert_close(image, expected["single.projected_image"], atol=1e-5, rtol=0)


def test_greedy_tokens(golden):
    model, expected, *_ = golden
    input_ids = expected["single.input_ids"]
    output = model.generate(
        input_ids,
        pixel_values=expected["single.pixel_values"],
        max_new_tokens=24,
        do_sample=False,
        eos_token_id=-1,  # native did not stop either
    )
    assert output[:, input_ids.shape[1] :].tolist() == expected["single.greedy_24"].tolist()


def test_loss_and_gradients(golden):
    model, expected, table, _ = golden
    if "batch.loss" not in expected:
        pytest.skip("the first MiniMind2-V comes without losses")
    model.train()
    outputs = model(expected["batch.input_ids"], pixel_values=expected["batch.pixel_values"], labels=expected["batch.labels"])
    outputs.loss.backward()
    model.eval()
    aux_loss = outputs.aux_loss if outputs.aux_loss is not None else torch.zeros(())
    torch.testing.assert_close(aux_loss, expected["batch.aux_loss"][0], atol=1e-6, rtol=0)
    torch.testing.assert_close(outputs.loss - aux_loss, expected["batch.loss"][0], atol=1e-5, rtol=0)

    ours = {native: row.ours for row in table for native in row.native}
    parameters = dict(model.named_parameters())
    gradients = {name.removeprefix("batch.grad."): grad for name, grad in expected.items() if name.startswith("batch.grad.")}
    assert len(gradients) >= 3
    for name, gradient in gradients.items():
        torch.testing.assert_close(parameters[ours[name]].grad, gradient, atol=5e-5, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
    model.zero_grad()


def test_native_weights_survive_the_round_trip(golden):
    *_, table, native = golden
    back = to_native(from_native(native, table), table)
    assert back.keys() == native.keys()
    for name, tensor in native.items():
        assert torch.equal(back[name], tensor), name


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("variant", ["g2-moe", "g3-moe"])
def test_expert_implementations_agree(tensors, variant, implementation):
    config = native_config(variant)
    model = MiniMindVForConditionalGeneration._from_config(config, experts_implementation=implementation).eval()
    table = key_table(config, GENERATIONS[variant[:2]])
    native = {name: tensors[key] for name, key in INDEX[variant]["weights"].items()}
    missing, unexpected = model.load_state_dict(from_native(native, table), strict=False)
    assert not unexpected
    assert all(name.startswith("model.vision_tower.") for name in missing)
    expected = {name: tensors[key] for name, key in INDEX[variant]["expected"].items()}
    with torch.no_grad():
        logits = model(expected["text_only.input_ids"]).logits[:, expected["text_only.logits_positions"]]
    torch.testing.assert_close(logits, expected["text_only.logits"], atol=5e-5, rtol=0)
