"""The model: attention, masks, caches, losses, and what transformers expects of any model."""

import pytest
import torch
import transformers
from conftest import IMAGE_SIZE, MOE, make_config, make_model
from transformers import AttentionInterface, AutoModel, DynamicCache, GPT2Config, LlamaConfig, SiglipVisionConfig, StaticCache
from transformers.utils import logging

from minimind_v_hf import MiniMindForCausalLM, MiniMindVConfig, MiniMindVForConditionalGeneration, MiniMindVModel
from minimind_v_hf.arguments_minimind_v import CACHE
from minimind_v_hf.configuration_minimind_v import __version__
from minimind_v_hf.modeling_minimind import MiniMindExperts


IMAGE_TOKENS = 16


def prompt(model, *parts: int, images: int = 1) -> torch.Tensor:
    """Ids (1, T): random text of the given lengths, with an image between each two."""
    ids = []
    for number, length in enumerate(parts):
        ids += torch.randint(3, 180, (length,)).tolist()
        if number < images:
            ids += [model.config.image_token_id] * IMAGE_TOKENS
    return torch.tensor([ids])


def pixels(count: int = 1) -> torch.Tensor:
    return torch.randn(count, 3, IMAGE_SIZE, IMAGE_SIZE)


def assert_same(actual, expected, atol=1e-5):
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_attention"])
@torch.no_grad()
def test_attention_implementations_agree(model, implementation):
    input_ids, pixel_values = prompt(model, 4, 6).expand(2, -1), pixels(2)
    mask = torch.ones_like(input_ids)
    mask[0, :3] = 0
    expected = model(input_ids, pixel_values=pixel_values, attention_mask=mask).logits
    before = model.config.text_config._attn_implementation
    model.set_attn_implementation({"text_config": implementation})
    try:
        actual = model(input_ids, pixel_values=pixel_values, attention_mask=mask).logits
    finally:
        model.set_attn_implementation({"text_config": before})
    assert_same(actual[mask.bool()], expected[mask.bool()])


@torch.no_grad()
def test_the_image_changes_the_answer(model):
    input_ids = prompt(model, 4, 6)
    first, second = (model(input_ids, pixel_values=pixels()).logits for _ in range(2))
    assert_same(first[:, :4], second[:, :4])  # before the image
    assert (first[:, -6:] - second[:, -6:]).abs().max() > 0.1


@torch.no_grad()
def test_packed_sequences_do_not_see_each_other(model):
    first, second = prompt(model, 3, 5), prompt(model, 7, 2)
    images = pixels(2)
    alone = [model(ids, pixel_values=images[i : i + 1]).logits for i, ids in enumerate((first, second))]
    packed = torch.cat((first, second), dim=1)
    position_ids = torch.cat((torch.arange(first.shape[1]), torch.arange(second.shape[1])))[None]
    together = model(packed, pixel_values=images, position_ids=position_ids, use_cache=False).logits
    assert_same(together, torch.cat(alone, dim=1))


@torch.no_grad()
def test_positions_matter(model):
    input_ids = prompt(model, 12, images=0)
    stretched = model(input_ids, position_ids=torch.arange(0, 24, 2)[None]).logits
    assert (stretched - model(input_ids).logits).abs().max() > 0.01


@pytest.mark.parametrize("make_cache", [DynamicCache, lambda config: StaticCache(config=config, max_cache_len=64)])
@torch.no_grad()
def test_cached_logits_are_the_uncached_ones(model, make_cache):
    input_ids, pixel_values = prompt(model, 4, 6), pixels()
    expected = model(input_ids, pixel_values=pixel_values).logits
    try:
        cache = make_cache(config=model.config.text_config)
    except TypeError:
        cache = make_cache(model.config.text_config)
    split = 4 + IMAGE_TOKENS + 2
    start = model(input_ids[:, :split], pixel_values=pixel_values, cache=cache, use_cache=True)
    logits = [start.logits]
    for position in range(split, input_ids.shape[1]):
        position_ids = torch.tensor([[position]])
        step = model(input_ids[:, position : position + 1], cache=cache, position_ids=position_ids, use_cache=True)
        logits.append(step.logits)
    assert_same(torch.cat(logits, dim=1), expected)


@torch.no_grad()
def test_inputs_embeds_and_encoded_images_give_the_same(model):
    input_ids, pixel_values = prompt(model, 4, 6), pixels()
    expected = model(input_ids, pixel_values=pixel_values).logits
    embeds = model.get_input_embeddings()(input_ids)
    assert_same(model(inputs_embeds=embeds, pixel_values=pixel_values).logits, expected)
    encoded = {"image": model.get_image_features(pixel_values)}
    assert_same(model(input_ids, mm_encoder_outputs=encoded).logits, expected)
    # (batch, images, 3, height, width), as native MiniMind-V has it
    assert_same(model(input_ids, pixel_values=pixel_values[None]).logits, expected)


@torch.no_grad()
def test_image_features(model):
    features = model.get_image_features(pixels(3))
    assert features.pooler_output.shape == (3, IMAGE_TOKENS, 32)
    assert features.last_hidden_state.shape == (3, IMAGE_TOKENS + 1, 32)
    assert isinstance(model.get_image_features(pixels(), return_dict=False), tuple)


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


@torch.no_grad()
def test_outputs(model):
    model.set_attn_implementation("eager")
    outputs = model(prompt(model, 4, 6), pixel_values=pixels(), output_hidden_states=True, output_attentions=True)
    model.set_attn_implementation("sdpa")
    length = 10 + IMAGE_TOKENS
    assert outputs.logits.shape == (1, length, 320)
    assert [h.shape for h in outputs.hidden_states] == [(1, length, 32)] * 3
    assert [a.shape for a in outputs.attentions] == [(1, 4, length, length)] * 2
    assert_same(outputs.attentions[0].sum(-1), torch.ones(1, 4, length))
    assert outputs.image_hidden_states.shape == (1, IMAGE_TOKENS, 32)
    assert getattr(outputs, CACHE).get_seq_length() == length
    assert getattr(model(prompt(model, 4, images=0), use_cache=False), CACHE) is None


@torch.no_grad()
def test_logits_to_keep(model):
    input_ids, pixel_values = prompt(model, 4, 6), pixels()
    full = model(input_ids, pixel_values=pixel_values).logits
    assert_same(model(input_ids, pixel_values=pixel_values, logits_to_keep=2).logits, full[:, -2:])
    chosen = torch.tensor([1, 5])
    assert_same(model(input_ids, pixel_values=pixel_values, logits_to_keep=chosen).logits, full[:, chosen])


def test_loss_is_the_mean_over_labels_or_divided_by_num_items(model):
    input_ids = prompt(model, 4, 6)
    labels = input_ids.masked_fill(input_ids == model.config.image_token_id, -100)
    labels[:, :2] = -100
    outputs = model(input_ids, pixel_values=pixels(), labels=labels)
    shifted = torch.nn.functional.cross_entropy(outputs.logits[0, :-1], labels[0, 1:], reduction="sum")
    count = (labels[:, 1:] != -100).sum()
    assert_same(outputs.loss, shifted / count)


def test_num_items_in_batch():
    model = make_model()
    input_ids = prompt(model, 12, images=0)
    mean, total = (model(input_ids, labels=input_ids, **kwargs).loss for kwargs in ({}, {"num_items_in_batch": 22}))
    assert_same(total, mean / 2)


def test_aux_loss_only_in_training_or_on_request():
    model = make_model(MOE)
    input_ids = prompt(model, 12, images=0)
    plain = model(input_ids, labels=input_ids)
    assert plain.aux_loss is None
    assert plain.router_logits is None
    requested = model(input_ids, labels=input_ids, output_router_logits=True)
    assert requested.aux_loss > 0
    assert [r.shape for r in requested.router_logits] == [(12, 4)] * 2
    assert_same(requested.loss, plain.loss)
    model.train()
    trained = model(input_ids, labels=input_ids)
    assert_same(trained.loss, plain.loss + trained.aux_loss)
    trained.aux_loss.backward()
    assert model.model.language_model.layers[0].mlp.gate.weight.grad.abs().sum() > 0


def test_gradients_reach_every_parameter(model):
    model.train()
    input_ids = prompt(model, 60, 60)
    model(input_ids, pixel_values=pixels(), labels=input_ids).loss.backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    model.zero_grad()
    model.eval()
    # CLIP's pooled output, and what only it uses, is of no use here. A shift of all keys changes no attention weight.
    assert {name for name in without if "post_layernorm" not in name and not name.endswith("k_proj.bias")} == set()


def test_gradient_checkpointing_changes_no_gradient():
    model = make_model(MOE).train()
    input_ids, pixel_values = prompt(model, 6, 6), pixels()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(input_ids, pixel_values=pixel_values, labels=input_ids).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert_same(gradients[1][name], gradient)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision(dtype, tmp_path):
    model = make_model()
    input_ids, pixel_values = prompt(model, 4, 6), pixels()
    expected = model(input_ids, pixel_values=pixel_values).logits
    model.save_pretrained(tmp_path)
    half = MiniMindVForConditionalGeneration.from_pretrained(tmp_path, dtype=dtype).eval()
    logits = half(input_ids, pixel_values=pixel_values).logits
    assert logits.dtype == dtype
    assert (logits.float() - expected).abs().mean() < 0.05 * expected.abs().mean()


def test_embeddings_are_tied(model, tmp_path):
    assert model.lm_head.weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    loaded = MiniMindVForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.language_model.embed_tokens.weight
    untied = make_model({"tie_word_embeddings": False})
    assert untied.lm_head.weight is not untied.get_input_embeddings().weight


def test_resize_token_embeddings():
    model = make_model()
    image_token_id = model.config.image_token_id
    model.resize_token_embeddings(352)
    assert model.config.text_config.vocab_size == 352
    assert model.lm_head.weight.shape == (352, 32)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert model.config.image_token_id == image_token_id
    assert model(prompt(model, 4, 6), pixel_values=pixels()).logits.shape[-1] == 352


def test_saving_and_loading_keeps_every_tensor(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded, info = MiniMindVForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    for (name, expected), (_, actual) in zip(model.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert torch.equal(actual, expected), name
    # Buffers that are not saved are made again
    rotary = loaded.model.language_model.rotary_emb
    assert torch.equal(rotary.inv_freq, model.model.language_model.rotary_emb.inv_freq)


def test_the_base_model_loads_from_the_whole(model, tmp_path):
    model.save_pretrained(tmp_path)
    base = MiniMindVModel.from_pretrained(tmp_path).eval()
    assert type(base) is MiniMindVModel
    input_ids, pixel_values = prompt(model, 4, 6), pixels()
    with torch.no_grad():
        hidden = base(input_ids, pixel_values=pixel_values).last_hidden_state
        assert_same(model.lm_head(hidden), model(input_ids, pixel_values=pixel_values).logits)


def test_auto_model_gives_the_head_from_a_folder_and_the_base_from_a_config(model, tmp_path):
    model.save_pretrained(tmp_path)
    assert type(AutoModel.from_pretrained(tmp_path)) is MiniMindVForConditionalGeneration
    assert type(AutoModel.from_config(model.config)) is MiniMindVModel


@torch.no_grad()
def test_device_map(model, tmp_path):
    model.save_pretrained(tmp_path)
    decoder = "model.language_model"
    parts = ["model.vision_tower", "model.multi_modal_projector", "lm_head", f"{decoder}.layers.0", f"{decoder}.norm"]
    parts += [f"{decoder}.embed_tokens", f"{decoder}.rotary_emb"]
    device_map = dict.fromkeys(parts, "cpu") | {f"{decoder}.layers.1": "disk"}
    loaded = MiniMindVForConditionalGeneration.from_pretrained(
        tmp_path, device_map=device_map, offload_folder=tmp_path / "offload"
    ).eval()
    input_ids, pixel_values = prompt(model, 4, 6), pixels()
    assert_same(loaded(input_ids, pixel_values=pixel_values).logits, model(input_ids, pixel_values=pixel_values).logits)


@torch.no_grad()
def test_compiles_without_graph_breaks(model):
    input_ids, pixel_values = prompt(model, 4, 6), pixels()
    cache = StaticCache(config=model.config.text_config, max_cache_len=64)
    expected = model(input_ids, pixel_values=pixel_values).logits
    compiled = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    prefill = compiled(input_ids=input_ids, pixel_values=pixel_values, cache=cache, use_cache=True)
    assert_same(prefill.logits, expected)
    more = torch.randint(3, 180, (1, 1))
    step = compiled(input_ids=more, cache=cache, use_cache=True, position_ids=torch.tensor([[input_ids.shape[1]]]))
    whole = model(torch.cat((input_ids, more), dim=1), pixel_values=pixel_values).logits
    assert_same(step.logits[:, -1], whole[:, -1])


@torch.no_grad()
@pytest.mark.parametrize(
    "decoder",
    [
        LlamaConfig(vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4),
        GPT2Config(vocab_size=320, n_embd=32, n_layer=2, n_head=4),
    ],
    ids=lambda config: config.model_type,
)
def test_other_encoder_and_decoder(decoder):
    siglip = SiglipVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=4
    )
    config = MiniMindVConfig(text_config=decoder, vision_config=siglip, image_token_id=5)
    model = MiniMindVForConditionalGeneration(config).eval()
    input_ids = prompt(model, 4, 6)
    output = model.generate(input_ids, pixel_values=pixels(), max_new_tokens=3, do_sample=False, eos_token_id=-1)
    assert output.shape[1] == input_ids.shape[1] + 3
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == decoder.tie_word_embeddings
    assert not torch.equal(model(input_ids, pixel_values=pixels()).logits, model(input_ids, pixel_values=-pixels()).logits)


def test_images_of_another_size_are_refused():
    model = make_model()
    with pytest.raises(ValueError, match="32x32 pixels, but the encoder expects 16x16"):
        model(prompt(model, 4, 6), pixel_values=torch.zeros(1, 3, 32, 32))


def test_text_alone_leaves_the_encoder_in_peace_when_generating():
    model = make_model().train()
    model.model.vision_tower.forward = None
    output = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, do_sample=False, eos_token_id=-1)
    assert output.shape == (1, 6)


@pytest.mark.parametrize(("layer_norm", "layers", "patches"), [(False, 1, 1), (True, 2, 1), (False, 2, 4)])
@torch.no_grad()
def test_projectors(layer_norm, layers, patches):
    model = make_model(projector_layer_norm=layer_norm, projector_num_layers=layers, patches_per_token=patches)
    features = model.get_image_features(pixels(2))
    assert features.pooler_output.shape == (2, IMAGE_TOKENS // patches, 32)
    projector = model.model.multi_modal_projector
    # By hand: each token is made of `patches` neighbouring vectors, and of nothing else
    vectors = features.last_hidden_state[0, 1:].reshape(IMAGE_TOKENS // patches, -1)
    if layer_norm:
        vectors = torch.nn.functional.layer_norm(vectors, vectors.shape[-1:])
    by_hand = projector.linear_1(vectors)
    if layers == 2:
        by_hand = projector.linear_2(torch.nn.functional.gelu(by_hand))
    # (the norm's bias is random in this model)
    if layer_norm:
        by_hand = projector.linear_2(torch.nn.functional.gelu(projector.linear_1(vectors + projector.norm.bias)))
    assert_same(features.pooler_output[0], by_hand)


def test_language_model_alone(tmp_path):
    config = make_config().text_config
    model = MiniMindForCausalLM(config).eval()
    input_ids = torch.randint(3, 180, (2, 7))
    output = model.generate(input_ids, max_new_tokens=4, do_sample=False, eos_token_id=-1)
    with torch.no_grad():
        by_hand = input_ids
        for _ in range(4):
            by_hand = torch.cat((by_hand, model(by_hand).logits[:, -1:].argmax(-1)), dim=1)
    assert output.tolist() == by_hand.tolist()
    model.save_pretrained(tmp_path)
    assert type(AutoModel.from_pretrained(tmp_path)).__name__ == "MiniMindModel"


def test_experts_loop_is_the_sum_over_chosen_experts():
    config = make_config(MOE | {"hidden_act": "silu"}).text_config
    config._experts_implementation = "eager"
    experts = MiniMindExperts(config)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x, index, weights = torch.randn(5, 32), torch.randint(0, 4, (5, 2)), torch.rand(5, 2)
    expected = torch.zeros(5, 32)
    for token in range(5):
        for choice in range(2):
            gate, up = (experts.gate_up_proj[index[token, choice]] @ x[token]).chunk(2)
            hidden = torch.nn.functional.silu(gate) * up
            expected[token] += weights[token, choice] * (experts.down_proj[index[token, choice]] @ hidden)
    assert_same(experts(x, index, weights), expected, atol=1e-4)


def test_reentrant_checkpointing_cannot_balance_experts_and_says_so(caplog):
    model = make_model(MOE).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    input_ids = prompt(model, 8, images=0)
    model(input_ids, labels=input_ids)
    assert "Pass gradient_checkpointing_kwargs={'use_reentrant': False}" in caplog.text


def test_missing_encoder_weights_are_initialised_as_the_encoder_wants(tmp_path):
    from safetensors.torch import load_file, save_file

    model = make_model(vision_config={"initializer_range": 0.02, "num_hidden_layers": 8})
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(file).items() if "vision_tower" not in name}
    save_file(tensors, file, metadata={"format": "pt"})
    loaded = MiniMindVForConditionalGeneration.from_pretrained(tmp_path)
    fresh = MiniMindVForConditionalGeneration(model.config)
    for (name, ours), (_, expected) in zip(loaded.named_parameters(), fresh.named_parameters(), strict=True):
        if "vision_tower" in name and name.endswith("proj.weight"):
            assert ours.std().item() == pytest.approx(expected.std().item(), rel=0.1), name


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
