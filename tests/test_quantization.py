"""int8 weights: what is rounded, by how much, and that answers go on as before."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import MOE, make_model
from torch import nn
from transformers import CompileConfig

from minimind_v_hf.quantization import MAX_KERNEL_ROWS, Int8Experts, Int8Linear, kernel_is_right, quantize_int8


def test_weights_are_rounded_to_the_nearest_of_255_steps_of_each_row():
    linear = nn.Linear(4, 2, bias=False)
    # The largest weight of a row is 127 steps; 0.5 steps round to even
    linear.weight.data = torch.tensor([[127.0, -127.0, 1.4, 0.0], [0.25, -0.125, 0.0, 0.0]])
    quantized = Int8Linear(linear.weight)
    assert quantized.weight.tolist() == [[127, -127, 1, 0], [127, -64, 0, 0]]
    assert quantized.weight.dtype == torch.int8
    torch.testing.assert_close(quantized.scale.float(), torch.tensor([1.0, 0.25 / 127]), rtol=2**-8, atol=0)


def test_a_row_of_zeros_stays_zero():
    linear = nn.Linear(8, 3, bias=False)
    linear.weight.data.zero_()
    assert not Int8Linear(linear.weight)(torch.randn(2, 8)).any()


@pytest.mark.parametrize("rows", [1, MAX_KERNEL_ROWS, MAX_KERNEL_ROWS + 1])
def test_the_product_is_that_of_the_rounded_weights(rows):
    torch.manual_seed(0)
    linear = nn.Linear(96, 40, bias=False)
    quantized = Int8Linear(linear.weight)
    x = torch.randn(rows, 1, 96)
    exact = x @ (quantized.weight.float() * quantized.scale.float()[:, None]).T
    output = quantized(x)
    assert output.dtype == torch.float32
    assert output.shape == (rows, 1, 40)
    # bfloat16 keeps 8 bits of each factor and of the result
    assert (output - exact).abs().max() < 2**-7 * exact.abs().max()
    assert (output - linear(x)).abs().max() < 0.02 * exact.abs().max()


@pytest.mark.parametrize(
    "kernel", [None, lambda rows, weight, scale: rows @ weight.T.to(rows.dtype) + 1], ids=["none", "wrong"]
)
def test_without_a_right_kernel_products_are_in_float(kernel, monkeypatch, caplog):
    kernel_is_right.cache_clear()
    monkeypatch.setattr(torch, "_weight_int8pack_mm", kernel)
    try:
        quantized = Int8Linear(torch.randn(40, 96))
    finally:
        kernel_is_right.cache_clear()
    assert "int8 kernel is missing or wrong on this machine" in caplog.text
    x = torch.randn(3, 96)
    exact = x @ (quantized.weight.float() * quantized.scale.float()[:, None]).T
    torch.testing.assert_close(quantized(x), exact)


# In a process of its own, which a kernel that reads beyond its matrices takes down
ODD_SIZES = """
import torch
from minimind_v_hf.quantization import Int8Linear, kernel_is_right

assert kernel_is_right()
print(torch.backends.cpu.get_cpu_capability())
for rows, inputs, outputs in [
    (1, 8, 8), (2, 8, 8), (2, 4, 3), (6, 40, 7), (1, 1, 1), (16, 72, 216), (128, 344, 128), (5, 500, 512), (1, 216, 72),
    (3, 33, 65),
]:
    linear = Int8Linear(torch.randn(outputs, inputs))
    x = torch.randn(rows, inputs)
    exact = x @ (linear.weight.float() * linear.scale.float()[:, None]).T
    assert (linear(x) - exact).abs().max() < 2**-6 * exact.abs().max(), (rows, inputs, outputs)
"""


@pytest.mark.parametrize("capability", ["default", "avx2", None])
def test_every_size_is_right_on_every_cpu(capability):
    environment = os.environ | ({"ATEN_CPU_CAPABILITY": capability} if capability else {})
    command = [sys.executable, "-c", ODD_SIZES]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]


def test_a_width_of_72_generates():
    model = quantize_int8(make_model({"hidden_size": 72, "head_dim": 10, "intermediate_size": 100}))
    ids = torch.arange(10, 20)[None]
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": -1}
    with torch.no_grad():
        by_hand = ids
        for _ in range(4):
            by_hand = torch.cat((by_hand, model(by_hand, use_cache=False).logits[:, -1:].argmax(-1)), dim=1)
    assert model.generate(ids, **options).tolist() == by_hand.tolist()


@pytest.mark.parametrize("variant", [None, MOE], ids=["dense", "moe"])
def test_the_decoder_and_the_head_are_rounded_and_nothing_else(variant):
    model = make_model(variant)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    assert quantize_int8(model) is model
    rounded = {name for name, module in model.named_modules() if isinstance(module, Int8Linear)}
    assert "lm_head" in rounded
    assert "model.language_model.layers.0.self_attn.q_proj" in rounded
    assert all(name == "lm_head" or name.startswith("model.language_model.layers.") for name in rounded)
    assert ("model.language_model.layers.0.mlp.experts.down_proj.3" in rounded) == (variant is MOE)
    left = dict(model.named_parameters())
    assert "model.language_model.embed_tokens.weight" in left
    assert "model.multi_modal_projector.linear_1.weight" in left
    assert any(name.startswith("model.vision_tower.") for name in left)
    assert all(torch.equal(parameter, before[name]) for name, parameter in left.items())


@pytest.mark.parametrize("variant", [None, MOE], ids=["dense", "moe"])
def test_logits_stay_near_those_of_the_whole_weights(variant):
    model = make_model(variant)
    ids = torch.arange(10, 40)[None]
    with torch.no_grad():
        whole = model(ids).logits
        rounded = quantize_int8(model)(ids).logits
    assert 0 < (rounded - whole).std() < 0.03 * whole.std()


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_experts_give_what_the_rounded_weights_would(compiled):
    experts = make_model(MOE).model.language_model.layers[0].mlp.experts
    quantized = Int8Experts(experts)
    for name in ("gate_up_proj", "down_proj"):
        rounded = [layer.weight.float() * layer.scale.float()[:, None] for layer in getattr(quantized, name)]
        getattr(experts, name).data = torch.stack(rounded)
    x = torch.randn(5, experts.down_proj.shape[1])
    index = torch.tensor([[0, 2], [2, 3], [3, 0], [2, 0], [0, 3]])  # nobody chooses expert 1
    weights = torch.rand(5, 2)
    with torch.no_grad():
        forward = torch.compile(quantized, fullgraph=True) if compiled else quantized
        expected, output = experts(x, index, weights), forward(x, index, weights)
    assert (output - expected).abs().max() < 2**-6 * expected.abs().max()


@pytest.mark.parametrize("variant", [None, MOE], ids=["dense", "moe"])
def test_compiled_decoding_gives_the_tokens_of_eager_decoding(variant):
    model = quantize_int8(make_model(variant))
    options = {"max_new_tokens": 8, "do_sample": False, "cache_implementation": "static"}
    ids = torch.arange(10, 20)[None]
    eager = model.generate(ids, **options, disable_compile=True)
    compiling = CompileConfig(fullgraph=True, mode="default")
    compiling._compile_all_devices = True  # transformers compiles by itself on GPUs only
    assert model.generate(ids, **options, compile_config=compiling).tolist() == eager.tolist()


def test_rounded_weights_are_not_saved_by_mistake(tmp_path):
    with pytest.raises(RuntimeError, match="before quantize_int8"):
        quantize_int8(make_model()).save_pretrained(tmp_path)
