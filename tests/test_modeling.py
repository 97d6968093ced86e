"""The model: attention, masks, caches, losses, and what transformers expects of any model."""

import pytest
import torch
from conftest import IMAGE_SIZE, MOE, RESNET, make_config, make_model
from transformers import AutoModel, DynamicCache, GPT2Config, LlamaConfig, SiglipVisionConfig, StaticCache

from minimind_v_hf import MiniMindForCausalLM, MiniMindVConfig, MiniMindVForConditionalGeneration, MiniMindVModel
from minimind_v_hf.arguments_minimind_v import CACHE
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


def test_a_convolutional_encoder(tmp_path):
    """Its grid is read row by row, in training and after saving."""
    model = make_model(vision_config=RESNET).eval()
    images = pixels()
    assert (model.config.image_seq_length, model.config.vision_config.hidden_size) == (4, 6)
    grid = model.model.vision_tower(images).last_hidden_state  # (1, 6, 2, 2)
    patches = torch.stack([grid[:, :, 0, 0], grid[:, :, 0, 1], grid[:, :, 1, 0], grid[:, :, 1, 1]], dim=1)
    expected = model.model.multi_modal_projector(patches)
    torch.testing.assert_close(model.get_image_features(images).pooler_output, expected)
    model.save_pretrained(tmp_path)
    again = MiniMindVForConditionalGeneration.from_pretrained(tmp_path).eval()
    input_ids = torch.tensor([[5, *[model.config.image_token_id] * 4, 6]])
    logits = model(input_ids, pixel_values=images).logits
    assert torch.equal(again(input_ids, pixel_values=images).logits, logits)
    # Text alone, with an encoder that learns
    before = {name: tensor.clone() for name, tensor in model.train().named_buffers()}
    assert model(torch.tensor([[5, 6, 7]])).logits.isfinite().all()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.named_buffers())
    assert model.model.vision_tower.training


def test_a_patch_size_that_is_not_the_stride_is_refused():
    model = make_model(vision_config=RESNET | {"patch_size": 4})
    with pytest.raises(ValueError, match="gives 2 x 2 patches for an image of 16 x 16 pixels: patch_size=4"):
        model.get_image_features(pixels())


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
