"""generate(): every mode gives the tokens that one forward pass after another would give."""

import pytest
import torch
from conftest import IMAGE_SIZE, MOE, make_model, make_processor
from transformers import DynamicCache, TextIteratorStreamer

from minimind_v_hf.arguments_minimind_v import CACHE


IMAGE_TOKENS = 16
IMAGE_TOKEN_ID = make_processor().image_token_id
GREEDY = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": -1, "pad_token_id": 0}
GREEDY |= {"suppress_tokens": [IMAGE_TOKEN_ID]}  # which a random model might write


@pytest.fixture(scope="module", params=["dense", "moe"])
def model(request):
    torch.manual_seed(1)
    return make_model(MOE if request.param == "moe" else None)


def sample(model, images: int, seed: int):
    """A prompt with so many images between stretches of text of random lengths."""
    generator = torch.Generator().manual_seed(seed)
    ids = []
    for number in range(images + 1):
        length = int(torch.randint(2, 9, (1,), generator=generator))
        ids += torch.randint(3, 180, (length,), generator=generator).tolist()
        if number < images:
            ids += [model.config.image_token_id] * IMAGE_TOKENS
    return torch.tensor([ids]), torch.randn(images, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)


def left_padded(samples):
    """Samples to one batch, as the processor makes it."""
    longest = max(ids.shape[1] for ids, _ in samples)
    rows = [torch.nn.functional.pad(ids, (longest - ids.shape[1], 0)) for ids, _ in samples]
    masks = [torch.nn.functional.pad(torch.ones_like(ids), (longest - ids.shape[1], 0)) for ids, _ in samples]
    batch = {"input_ids": torch.cat(rows), "attention_mask": torch.cat(masks)}
    images = torch.cat([pixels for _, pixels in samples])
    return batch | ({"pixel_values": images} if len(images) else {})


def uncached_greedy(model, input_ids, pixel_values, steps=8):
    with torch.no_grad():
        for _ in range(steps):
            pixels = pixel_values if len(pixel_values) else None
            logits = model(input_ids, pixel_values=pixels, use_cache=False).logits
            logits[..., IMAGE_TOKEN_ID] = -torch.inf
            input_ids = torch.cat((input_ids, logits[:, -1:].argmax(-1)), dim=1)
    return input_ids[:, -steps:].tolist()


@pytest.mark.parametrize("images", [0, 1, 2])
def test_cached_decoding_gives_the_uncached_tokens(model, images):
    input_ids, pixel_values = sample(model, images, seed=images)
    kwargs = {"pixel_values": pixel_values} if images else {}
    expected = uncached_greedy(model, input_ids, pixel_values)
    for options in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        output = model.generate(input_ids, **kwargs, **GREEDY, **options)
        assert output[:, input_ids.shape[1] :].tolist() == expected, options


def test_a_left_padded_batch_gives_the_tokens_of_each_prompt_alone(model):
    samples = [sample(model, images, seed) for seed, images in enumerate([2, 0, 1, 3, 1])]
    alone = [uncached_greedy(model, *one)[0] for one in samples]
    batch = left_padded(samples)
    output = model.generate(**batch, **GREEDY)
    assert output[:, batch["input_ids"].shape[1] :].tolist() == alone


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 3}])
def test_beams_with_several_images_per_sample(model, options):
    samples = [sample(model, images, seed) for seed, images in enumerate([2, 1, 3], start=7)]
    batch = left_padded(samples)
    together = model.generate(**batch, **GREEDY, **options)[:, batch["input_ids"].shape[1] :].tolist()
    alone = []
    for ids, pixel_values in samples:
        alone += model.generate(ids, pixel_values=pixel_values, **GREEDY, **options)[:, ids.shape[1] :].tolist()
    assert together == alone


def test_several_sequences_per_prompt(model):
    samples = [sample(model, images, seed) for seed, images in enumerate([2, 1], start=3)]
    batch = left_padded(samples)
    torch.manual_seed(0)
    output = model.generate(**batch, **GREEDY | {"do_sample": True, "num_return_sequences": 3, "temperature": 1e-4})
    output = output[:, batch["input_ids"].shape[1] :].tolist()
    # So cold, sampling is greedy: all three are the greedy answer of their own prompt
    assert output == [tokens for one in samples for tokens in uncached_greedy(model, *one) * 3]


def test_sampling_is_random_and_repeatable(model):
    input_ids, pixel_values = sample(model, 1, seed=2)
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        options = GREEDY | {"do_sample": True, "top_p": 0.9, "temperature": 2.0}
        drawn.append(model.generate(input_ids, pixel_values=pixel_values, **options).tolist())
    assert drawn[0] == drawn[1] != drawn[2]


def test_prompt_lookup_gives_the_greedy_tokens(model):
    input_ids, pixel_values = sample(model, 1, seed=4)
    input_ids = torch.cat((input_ids, input_ids[:, -3:], input_ids[:, -3:]), dim=1)
    expected = model.generate(input_ids, pixel_values=pixel_values, **GREEDY)
    lookup = model.generate(input_ids, pixel_values=pixel_values, prompt_lookup_num_tokens=2, **GREEDY)
    assert lookup.tolist() == expected.tolist()


def test_repetition_penalty(model):
    input_ids, pixel_values = sample(model, 1, seed=5)
    penalised = model.generate(input_ids, pixel_values=pixel_values, repetition_penalty=100.0, **GREEDY)
    answer = penalised[0, input_ids.shape[1] :].tolist()
    assert len(set(answer)) == len(answer)
    assert not set(answer) & set(input_ids[0].tolist())


def test_eos_stops_a_sequence_and_pads_it(model):
    samples = [sample(model, 1, seed) for seed in (6, 7)]
    batch = left_padded(samples)
    start = batch["input_ids"].shape[1]
    free = model.generate(**batch, **GREEDY)[:, start:]
    eos = int(free[0, 2])
    stopped = model.generate(**batch, **GREEDY | {"eos_token_id": eos})[:, start:]
    first = free[0].tolist().index(eos)
    assert stopped[0, : first + 1].tolist() == free[0, : first + 1].tolist()
    assert set(stopped[0, first + 1 :].tolist()) <= {0}


def test_a_conversation_continues_from_its_cache(model):
    input_ids, pixel_values = sample(model, 1, seed=8)
    cache = DynamicCache(config=model.config.text_config)
    first = model.generate(input_ids, pixel_values=pixel_values, **{CACHE: cache}, **GREEDY)
    question, more_pixels = sample(model, 1, seed=9)
    conversation = torch.cat((first, question), dim=1)
    continued = model.generate(conversation, pixel_values=more_pixels, **{CACHE: cache}, **GREEDY)
    afresh = model.generate(conversation, pixel_values=torch.cat((pixel_values, more_pixels)), **GREEDY)
    assert continued.tolist() == afresh.tolist()


def test_inputs_embeds(model):
    input_ids, pixel_values = sample(model, 1, seed=10)
    embeds = model.get_input_embeddings()(input_ids).detach()
    expected = model.generate(input_ids, pixel_values=pixel_values, **GREEDY)[:, input_ids.shape[1] :]
    assert model.generate(inputs_embeds=embeds, pixel_values=pixel_values, **GREEDY).tolist() == expected.tolist()


def test_native_pixel_layout(model):
    samples = [sample(model, 2, seed) for seed in (11, 12)]
    batch = left_padded(samples)
    expected = model.generate(**batch, num_beams=2, **GREEDY)
    batch["pixel_values"] = batch["pixel_values"].unflatten(0, (2, 2))
    assert model.generate(**batch, num_beams=2, **GREEDY).tolist() == expected.tolist()


def test_what_only_generate_is_told_is_no_unknown_argument(model, processor):
    input_ids, pixel_values = sample(model, 1, seed=13)
    output = model.generate(input_ids, pixel_values=pixel_values, **GREEDY)
    options = GREEDY | {"tokenizer": processor.tokenizer, "stop_strings": ["never written"]}
    assert model.generate(input_ids, pixel_values=pixel_values, **options).tolist() == output.tolist()


def test_streaming(processor):
    torch.manual_seed(1)
    model = make_model()
    input_ids, pixel_values = sample(model, 1, seed=13)
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, timeout=60)
    output = model.generate(input_ids, pixel_values=pixel_values, streamer=streamer, **GREEDY)
    assert "".join(streamer) == processor.decode(output[0, input_ids.shape[1] :])
