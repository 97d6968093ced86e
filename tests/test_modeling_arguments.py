"""What a forward pass is given: names that it knows and does not, caches by either name and lost ones, lengths and pixels."""

import pytest
import torch
import transformers
from conftest import MOE, make_config, make_model
from test_modeling import assert_same, pixels, prompt
from transformers import AttentionInterface, DynamicCache, LlamaConfig
from transformers.utils import logging

from minimind_v_hf import MiniMindForCausalLM, MiniMindVConfig, MiniMindVForConditionalGeneration
from minimind_v_hf.arguments_minimind_v import CACHE
from minimind_v_hf.configuration_minimind_v import __version__


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
@torch.no_grad()
def test_the_cache_goes_by_either_name(model, name):
    input_ids = prompt(model, 6, images=0)
    expected = model(input_ids).logits[:, -1:]
    cache = DynamicCache(config=model.config.text_config)
    model(input_ids[:, :-1], use_cache=True, **{name: cache})
    assert cache.get_seq_length() == 5
    assert_same(model(input_ids[:, -1:], use_cache=True, **{name: cache}).logits, expected)
    language_model = model.model.language_model
    assert language_model(input_ids[:, -1:], use_cache=True, **{name: cache}).last_hidden_state.shape == (1, 1, 32)
    assert cache.get_seq_length() == 7


@pytest.mark.parametrize("decoder", ["dense", "moe", "llama"])
def test_transformers_warns_of_nothing_deprecated(decoder, caplog, recwarn):
    if decoder == "llama":
        model = MiniMindVForConditionalGeneration(MiniMindVConfig(**make_config().to_dict() | {"text_config": LLAMA}))
    else:
        model = make_model(MOE if decoder == "moe" else None)
    logging.get_logger("transformers").warning_once.__func__.cache_clear()
    input_ids, pixel_values = prompt(model, 4, 6), pixels()
    model.eval().generate(input_ids, pixel_values=pixel_values, max_new_tokens=3, num_beams=2)
    model(input_ids, pixel_values=pixel_values, use_cache=True)
    model.train()(input_ids, pixel_values=pixel_values, labels=input_ids).loss.backward()
    # Renamed in 5.24
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    model(input_ids, pixel_values=pixel_values, labels=input_ids).loss.backward()
    warned = [record.getMessage() for record in caplog.records] + [str(warning.message) for warning in recwarn]
    assert [message for message in warned if "deprecated" in message] == []


LLAMA = LlamaConfig(vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)


def every_model() -> list:
    """A model of each class that a forward pass can be called of, and one with another decoder than ours."""
    vision = make_model()
    other = MiniMindVForConditionalGeneration(MiniMindVConfig(**make_config().to_dict() | {"text_config": LLAMA}))
    language = MiniMindForCausalLM(make_config().text_config)
    return [model.eval() for model in (vision, vision.model, vision.model.language_model, language, other)]


def test_an_unknown_argument_is_refused():
    ids = torch.tensor([[5, 6, 7]])
    for model in every_model():
        with pytest.raises(TypeError) as error:
            model(ids, kv_store=DynamicCache())
        assert "unknown argument: 'kv_store'" in str(error.value)
        assert f"minimind_v_hf {__version__}, and transformers is {transformers.__version__}" in str(error.value)
        model(ids, kv_store=None)  # nothing was asked for


def test_what_engines_hand_through_reaches_the_attention_function(model):
    received = []

    def attention(module, query, key, value, attention_mask, scaling, engine_state=None, **kwargs):
        received.append((engine_state, kwargs.get("attention_instances")))
        return torch.zeros_like(query.transpose(1, 2)), None

    AttentionInterface.register("an_engine", attention)
    before = model.config.text_config._attn_implementation
    model.config.text_config._attn_implementation = "an_engine"
    try:
        model(torch.tensor([[5, 6]]), attention_instances={0: "kernel"}, engine_state="page", use_cache=False)
        with pytest.raises(TypeError, match="'engine_stale'"):
            model(torch.tensor([[5, 6]]), engine_stale="page")
    finally:
        model.config.text_config._attn_implementation = before
    assert received == [("page", {0: "kernel"})] * 2


def test_a_lost_cache_is_an_error():
    ids, mask = torch.tensor([[5, 6, 7, 8]]), torch.ones(1, 4, dtype=torch.long)
    for model in every_model():
        cache = getattr(model(ids[:, :3], attention_mask=mask[:, :3], use_cache=True), CACHE)
        with pytest.raises(ValueError, match="mask covers 4 tokens, but there are 0 in the cache and 1 in this step"):
            model(ids[:, 3:], attention_mask=mask)
        model(ids[:, 3:], attention_mask=mask, **{CACHE: cache})


@torch.no_grad()
def test_the_check_of_the_cache_compiles_once(model):
    compiled = torch.compile(model.forward, fullgraph=True, backend="eager", dynamic=True)
    ids, mask = torch.randint(3, 180, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[0, :2] = 0
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length in (5, 7, 9):
            inputs = {"input_ids": ids[:, :length].clone(), "attention_mask": mask[:, :length].clone()}
            assert_same(compiled(**inputs, use_cache=False).logits, model(**inputs).logits)


def test_image_tokens_without_images(model, caplog):
    logging.get_logger("transformers").warning_once.__func__.cache_clear()
    ids = prompt(model, 3, 3)
    with pytest.raises(ValueError, match=r"holds image tokens .* but no pixel_values were given"):
        model.generate(ids, max_new_tokens=2)
    with torch.no_grad():
        model(ids[:, :3], use_cache=True)
        assert not caplog.records
        model(ids)
    assert "The prompt holds image tokens, but no pixel_values were given" in caplog.text
    with pytest.raises(ValueError, match="The prompts hold 16 image tokens, but 0 images"):
        model.train()(ids, labels=ids)
    model.eval()


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_model_may_write_the_image_token_itself(use_cache):
    model = make_model()
    wanted = model.config.image_token_id
    options = {"do_sample": False, "max_new_tokens": 3, "use_cache": use_cache, "forced_eos_token_id": wanted}
    options["logits_processor"] = [lambda ids, scores: torch.nn.functional.one_hot(torch.tensor([wanted]), 320).float()]
    assert model.generate(torch.tensor([[5, 6]]), **options).tolist() == [[5, 6, wanted, wanted, wanted]]


def test_more_tokens_than_positions_warn_once(caplog):
    model = make_model({"max_position_embeddings": 8})
    logging.get_logger("transformers").warning_once.__func__.cache_clear()
    packed = torch.cat((torch.arange(6), torch.arange(6)))[None]
    with torch.no_grad():
        model(torch.ones(1, 12, dtype=torch.long) * 5, position_ids=packed, use_cache=False)
        model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=5, do_sample=False, eos_token_id=-1)
        assert "positions" not in caplog.text
        model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=8, do_sample=False, eos_token_id=-1)
    assert caplog.text.count("The sequence has grown beyond the 8 positions") == 1


def test_an_empty_prompt_and_raw_pixels_are_refused(model):
    with pytest.raises(ValueError, match="The prompt is empty"):
        model(torch.zeros(1, 0, dtype=torch.long))
    for dtype in (torch.uint8, torch.complex64):
        with pytest.raises(ValueError, match=f"pixel_values are {dtype}: expected"):
            model(prompt(model, 3, 3), pixel_values=pixels().to(dtype))


def test_the_configs_that_a_caller_passes_stay_as_they_are():
    vision = make_config().vision_config
    vision._experts_implementation = "eager"
    MiniMindVForConditionalGeneration(MiniMindVConfig(text_config=make_config().text_config, vision_config=vision))
    assert vision._experts_implementation == "eager"


def test_text_alone_trains_the_projector_without_a_pass_through_a_frozen_encoder():
    model = make_model()
    model.model.vision_tower.requires_grad_(False)
    model.train()
    model.model.vision_tower.forward = None
    ids = prompt(model, 8, images=0)
    model(ids, labels=ids).loss.backward()
    for parameter in model.model.multi_modal_projector.parameters():
        assert torch.equal(parameter.grad, torch.zeros_like(parameter))
    assert model.model.language_model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("name", ["kwargs", "dropout", "query", "module"])
def test_names_of_the_attention_function_itself_are_no_arguments(name, model):
    with pytest.raises(TypeError, match=rf"unknown argument: '{name}'"):
        model(torch.ones(1, 3, dtype=torch.long), **{name: torch.ones(1)})


def test_what_is_no_cache_is_refused():
    ids = torch.tensor([[5, 6, 7, 8]])
    legacy = ((torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 3, 8)),) * 2
    for model in every_model():
        for cache in (legacy, list(legacy)):
            with pytest.raises(TypeError, match=f"The cache is a {type(cache).__name__}: expected a Cache of transformers"):
                model(ids[:, 3:], past_key_values=cache)


@torch.no_grad()
def test_experts_of_odd_widths_are_computed_one_by_one():
    widths = {"hidden_size": 36, "head_dim": 8, "moe_intermediate_size": 42}
    model = make_model(MOE | widths)
    assert model.config.text_config._experts_implementation == "eager"
    assert make_model(MOE).config.text_config._experts_implementation == "grouped_mm"
    assert model(torch.tensor([[5, 6, 7]])).logits.isfinite().all()
    config = make_config(MOE | widths).text_config
    with pytest.raises(ValueError, match="no multiple of 8: use experts_implementation='eager'"):
        MiniMindForCausalLM._from_config(config, experts_implementation="grouped_mm")


@pytest.mark.parametrize("images", [1, 3])
def test_images_and_placeholders_must_match(model, images):
    input_ids = prompt(model, 4, 6, 2, images=2)
    message = rf"The prompts hold 32 image tokens, but {images} images of 16 tokens give {16 * images} features"
    with pytest.raises(ValueError, match=message):
        model(input_ids, pixel_values=pixels(images))


def test_ids_and_embeddings_exclude_each_other(model):
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="either pixel_values or mm_encoder_outputs"):
        model(prompt(model, 2, 2), pixel_values=pixels(), mm_encoder_outputs={"image": model.get_image_features(pixels())})
