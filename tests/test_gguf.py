"""llama.cpp computes what the model does from the files of to_gguf: log-probabilities, greedy tokens, and over its server.

xllamacpp may abort, so it runs in processes of its own.
"""

import json
import shutil
import sys
import urllib.request

import pytest
import torch
from conftest import CORPUS, IMAGE_SIZE, MOE, image_url, make_image, make_model, make_processor, refused, running_server

from convert import to_gguf
from minimind_v_hf import MiniMindForCausalLM
from minimind_v_hf.conversion import ConversionError, llama_cpp
from minimind_v_hf.preparation import prepare_tokenizer, rebuild_chat_template, train_tokenizer


gguf = pytest.importorskip("gguf")
needs_engine = pytest.mark.skipif(not llama_cpp.is_installed(), reason="xllamacpp is not installed")

SIGLIP = {"projector_num_layers": 2, "projector_layer_norm": True, "vision_config": {"model_type": "siglip_vision_model"}}
YARN = {"rope_type": "yarn", "factor": 16, "original_max_position_embeddings": 64, "attention_factor": 1.0, "rope_theta": 1e6}
QK_NORM = {"use_qk_norm": True}
KINDS = {
    "dense": ({}, {}),
    "moe": (MOE, {}),
    "yarn": ({"rope_parameters": YARN}, {}),
    "mixtral": ({"num_experts": 4}, {}),
    "3v": (QK_NORM, SIGLIP),
    "3v-moe": ({"num_experts": 4, "num_experts_per_tok": 1, **QK_NORM}, SIGLIP),
}
GRAPHS = {"dense": "llama", "moe": "bailingmoe", "yarn": "llama", "mixtral": "llama", "3v": "qwen3", "3v-moe": "qwen3moe"}
ASCII = make_processor().tokenizer.get_vocab().items()
NO_ASCII = sorted(number for token, number in ASCII if not (token.isascii() and token.isprintable()) or token.startswith("<"))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """By kind: the model, its processor and the folder of its GGUF files in float32, converted once."""
    made = {}

    def export(kind):
        if kind not in made:
            torch.manual_seed(0)
            text, rest = KINDS[kind]
            # Rows that fill the blocks of 32 weights of the quantised types
            model = make_model({"hidden_size": 64, "head_dim": 32, **text}, **rest)
            processor = make_processor()
            folder = tmp_path_factory.mktemp(kind)
            model.save_pretrained(folder / "model")
            processor.save_pretrained(folder / "model")
            to_gguf.main(["--model", str(folder / "model"), "--output", str(folder / "gguf"), "--dtype", "f32"])
            made[kind] = model, processor, folder
        return made[kind]

    return export


def files(folder, dtype="F32"):
    return folder / "gguf" / f"model-{dtype}.gguf", folder / "gguf" / f"mmproj-model-{dtype}.gguf"


def log_probabilities(answer, vocab_size=320):
    """(V,), of the one token of an answer."""
    entries = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    row = torch.full((vocab_size,), torch.nan)
    for entry in entries:
        row[entry["id"]] = entry["logprob"]
    return row


ONE_TOKEN = {"max_tokens": 1, "temperature": 0, "logit_bias": [["!", 1000.0]]}  # not half a character, which is kept back


@needs_engine
@pytest.mark.parametrize("kind", KINDS)
def test_log_probabilities_of_text(kind, exported):
    model, _, folder = exported(kind)
    input_ids = torch.randint(3, 320, (1, 90))
    input_ids[input_ids == model.config.image_token_id] = 5
    lengths = (1, 2, 5, 30, 60, 90)  # of those for YARN, the last ones beyond its original length
    requests = [{"prompt": input_ids[0, :length].tolist(), "logprobs": 320, **ONE_TOKEN} for length in lengths]
    answers = llama_cpp.ask(files(folder)[0], None, requests, [], 128)
    found = torch.stack([log_probabilities(answer) for answer in answers])
    with torch.no_grad():
        expected = model(input_ids).logits[0, torch.tensor(lengths) - 1].log_softmax(-1)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)
    assert str(gguf.GGUFReader(files(folder)[0]).get_field("general.architecture").contents()) == GRAPHS[kind]


def conversation(*colours):
    images = [{"type": "image", "image": make_image(colour, (IMAGE_SIZE, IMAGE_SIZE))} for colour in colours]
    return [{"role": "user", "content": [*images, {"type": "text", "text": "What colour?"}]}]


def request(*colours, **options):
    images = [{"type": "image_url", "image_url": {"url": image_url(colour)}} for colour in colours]
    content = [*images, {"type": "text", "text": "What colour?"}]
    return {"messages": [{"role": "user", "content": content}], "temperature": 0, **options}


def prepare(processor, messages):
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    return processor.apply_chat_template(messages, **options)


def greedy_text(model, processor, messages):
    """Sixteen tokens, of those that are printable ASCII, so that each is a piece of the text."""
    inputs = prepare(processor, messages)
    options = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": -1, "suppress_tokens": NO_ASCII}
    return processor.decode(model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :])


GREEDY = {"max_tokens": 16, "logit_bias": [[number, False] for number in NO_ASCII]}


@needs_engine
@pytest.mark.parametrize("kind", ["3v", "3v-moe"])
def test_greedy_tokens_of_images(kind, exported):
    model, processor, folder = exported(kind)
    questions = (["red"], ["blue"], ["red", "blue"])
    answers = llama_cpp.ask(*files(folder), [], [request(*colours, **GREEDY) for colours in questions], 256)
    found = [answer["choices"][0]["message"]["content"] for answer in answers]
    expected = [greedy_text(model, processor, conversation(*colours)) for colours in questions]
    assert found == expected
    assert len(set(found)) == 3


@needs_engine
@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_what_the_bug_of_llama_cpp_leaves_of_clip(kind, exported):
    """The patches from the second on, one place early, and then the class token: all of them exact."""
    model, processor, folder = exported(kind)
    inputs = prepare(processor, conversation("red"))
    with torch.no_grad():
        encoded = model.model.vision_tower(inputs["pixel_values"]).last_hidden_state
        seen = model.model.multi_modal_projector(torch.cat((encoded[:, 2:], encoded[:, :1]), dim=1))
        embeddings = model.get_input_embeddings()(inputs["input_ids"])
        embeddings[inputs["input_ids"] == model.config.image_token_id] = seen[0]
        expected = model(inputs_embeds=embeddings).logits[0, -1].log_softmax(-1)
    (answer,) = llama_cpp.ask(*files(folder), [], [request("red", logprobs=True, top_logprobs=320, **ONE_TOKEN)], 128)
    torch.testing.assert_close(log_probabilities(answer), expected, atol=1e-2, rtol=0)


def test_both_forms_of_the_class_token(exported, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(llama_cpp, "is_installed", lambda: False)
    _, _, folder = exported("dense")
    rows = {}
    for form in ("first", "last"):
        command = ["--model", str(folder / "model"), "--output", str(tmp_path / form), "--class-token", form, "--dtype", "f32"]
        to_gguf.main(command)
        assert f"--class-token {'last' if form == 'first' else 'first'}" in capsys.readouterr().err
        assert "issue 25814" in (tmp_path / form / "README.md").read_text(encoding="utf-8")
        reader = gguf.GGUFReader(tmp_path / form / "mmproj-model-F32.gguf")
        assert reader.get_field("minimind_v.class_token").contents() == form
        rows[form] = next(torch.tensor(t.data) for t in reader.tensors if t.name == "v.position_embd.weight")
    torch.testing.assert_close(rows["last"], torch.cat((rows["first"][1:], rows["first"][:1])), atol=0, rtol=0)


def test_turns_that_were_trained_apart_are_told(exported, tmp_path, capsys):
    folder = exported("3v-moe")[2] / "model"
    shutil.copytree(folder, tmp_path / "model")
    template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    changed = rebuild_chat_template(template, independent_turns=True)
    (tmp_path / "model" / "chat_template.jinja").write_text(changed, encoding="utf-8")
    to_gguf.main(["--model", str(tmp_path / "model"), "--output", str(tmp_path / "gguf")])
    assert "ask each question in a new conversation" in capsys.readouterr().err
    assert "ask each question in a new conversation" in (tmp_path / "gguf" / "README.md").read_text(encoding="utf-8")


@needs_engine
def test_every_dtype_loads_and_answers(exported, tmp_path, capsys):
    model, processor, folder = exported("3v-moe")
    command = ["--model", str(folder / "model"), "--output", str(tmp_path / "gguf"), "--dtype", "f16", "q8_0", "q4_0"]
    to_gguf.main(command)
    report = capsys.readouterr().out
    card = (tmp_path / "gguf" / "README.md").read_text(encoding="utf-8")
    for dtype in ("f16", "q8_0", "q4_0"):
        assert f"  {dtype}" in report
        assert f"| {dtype} | " in card
    names = [f"model-{dtype}.gguf" for dtype in ("F16", "Q4_0", "Q8_0")]
    assert sorted(path.name for path in (tmp_path / "gguf").glob("*.gguf")) == ["mmproj-model-F16.gguf", *names]
    sizes = [(tmp_path / "gguf" / name).stat().st_size for name in names]
    assert sizes[1] < sizes[2] < sizes[0]
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "gguf" / names[1]).tensors}
    assert types["blk.0.ffn_gate_exps.weight"] == types["blk.0.attn_q.weight"] == "Q4_0"
    assert types["token_embd.weight"] == "Q8_0"
    assert types["blk.0.ffn_gate_inp.weight"] == types["blk.0.attn_q_norm.weight"] == "F32"
    (answer,) = llama_cpp.ask(*files(tmp_path, "F16"), [], [request("red", **GREEDY)], 128)
    assert answer["choices"][0]["message"]["content"] == greedy_text(model, processor, conversation("red"))


SERVER = """
import signal, sys, xllamacpp
decoder, mmproj, _, port = sys.argv[1:]
params = xllamacpp.CommonParams()
params.model.path, params.mmproj.path, params.port, params.n_ctx = decoder, mmproj, int(port), 256
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
params.n_gpu_layers, params.mmproj_use_gpu, params.warmup, params.fit_params = 0, False, False, False
server = xllamacpp.Server(params)
signal.pause()
"""


@needs_engine
def test_an_openai_client_gets_the_greedy_tokens_as_a_stream(exported, tmp_path):
    openai = pytest.importorskip("openai")
    model, processor, folder = exported("3v")
    with running_server([sys.executable, "-I", "-c", SERVER, *files(folder)], "/health", tmp_path, {}) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", timeout=120)
        chunks = list(client.chat.completions.create(model="model", **bias(request("red")), max_tokens=16, stream=True))
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert text == greedy_text(model, processor, conversation("red"))
        assert len(chunks) > 8

        def post(path, body):
            data = json.dumps(body).encode()
            call = urllib.request.Request(address + path, data, {"Content-Type": "application/json"})
            with urllib.request.urlopen(call, timeout=60) as answer:
                return json.load(answer)

        for text in (
            "It's 12345 o'clock,  isn't it?\n\n",
            "图中有几个图形？ 左上的\t图形",
            "naïve 🙂 e\u0301 ½ x_1",
            "<|im_start|>",
        ):
            expected = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
            assert post("/tokenize", {"content": text, "parse_special": True})["tokens"] == expected, text
        roles = ("system", "user", "assistant", "user")
        for messages in ([{"role": role, "content": f"{role}!"} for role in roles[first:]] for first in (0, 1)):
            expected = processor.apply_chat_template(messages, add_generation_prompt=True)
            assert post("/apply-template", {"messages": messages})["prompt"] == expected


def bias(body):
    """As the OpenAI client has it: by the id as a string."""
    return body | {"logit_bias": {str(number): -100 for number in NO_ASCII}}


# ── Language models, and what is refused ─────────────────────────────────────────────────────────────────────────────


def save(folder, model, processor):
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@needs_engine
@pytest.mark.parametrize("across_words", [False, True])
def test_a_language_model_with_thoughts(across_words, tmp_path):
    tokenizer = train_tokenizer(CORPUS, 320, across_words)
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer = prepare_tokenizer(tokenizer)
    config = make_model({"vocab_size": 322, "hidden_size": 64, "tie_word_embeddings": False}).config.text_config
    model = MiniMindForCausalLM(config).eval()
    save(tmp_path / "model", model, tokenizer)
    to_gguf.main(["--model", str(tmp_path / "model"), "--output", str(tmp_path / "gguf")])
    assert {path.name for path in (tmp_path / "gguf").iterdir()} == {"model-F16.gguf", "Modelfile", "README.md"}
    text = CORPUS[0] + CORPUS[3] + "\n <think>12  3x4"
    input_ids = tokenizer(text, return_tensors="pt")["input_ids"]
    request = {"prompt": text, "logprobs": 322, **ONE_TOKEN}
    (answer,) = llama_cpp.ask(tmp_path / "gguf" / "model-F16.gguf", None, [request], [], 128)
    assert answer["usage"]["prompt_tokens"] == input_ids.shape[1]
    with torch.no_grad():
        expected = model(input_ids).logits[0, -1].log_softmax(-1)
    torch.testing.assert_close(log_probabilities(answer, 322), expected, atol=0.05, rtol=0)
    modelfile = (tmp_path / "gguf" / "Modelfile").read_text()
    assert "FROM ./model-F16.gguf\n" in modelfile
    assert "<think>\n\n</think>\n\n" in modelfile
    assert "pipeline_tag: text-generation" in (tmp_path / "gguf" / "README.md").read_text()


REFUSED = {
    "activation": ({"hidden_act": "gelu"}, {}, "hidden_act is 'gelu'"),
    "rope": ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6}}, {}, "'linear'"),
    "shared": ({**MOE, **QK_NORM}, {}, "shared experts and q/k norm"),
    "weights": ({"num_experts": 4, "norm_topk_prob": False}, {}, "norm_topk_prob"),
    "joined": ({}, {"patches_per_token": 4}, "joins 4 patches"),
    "projector": ({}, {"projector_num_layers": 2, "projector_hidden_act": "relu"}, "projector_hidden_act is 'relu'"),
    "encoder": ({}, {"vision_config": {"hidden_act": "relu"}}, "the encoder's hidden_act is 'relu'"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_no_graph_computes_is_refused(kind, tmp_path, capsys):
    text, rest, reason = REFUSED[kind]
    model = make_model(text, **rest)
    save(tmp_path / "model", model, make_processor(image_seq_length=model.config.image_seq_length))
    assert reason in refused(capsys, to_gguf.main, ["--model", str(tmp_path / "model"), "--output", str(tmp_path / "gguf")])
    assert not (tmp_path / "gguf").exists()


def test_a_template_that_would_be_lost_is_refused(tmp_path, capsys):
    processor = make_processor()
    processor.chat_template = "{% for message in messages %}{{ message.role }}: {{ message.content }}{% endfor %}"
    save(tmp_path / "model", make_model(), processor)
    assert "none of MiniMind's" in refused(
        capsys, to_gguf.main, ["--model", str(tmp_path / "model"), "--output", str(tmp_path / "gguf")]
    )


@needs_engine
def test_another_graph_than_the_model_is_noticed(tmp_path, monkeypatch, capsys):
    """Here: a decoder whose norms have another epsilon than the file says."""
    save(tmp_path / "model", make_model({"rms_norm_eps": 1e-2}), make_processor())
    monkeypatch.setattr(
        gguf.GGUFWriter,
        "add_layer_norm_rms_eps",
        lambda self, value: self.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5),
    )
    assert "llama.cpp computes something else than this model" in refused(
        capsys, to_gguf.main, ["--model", str(tmp_path / "model"), "--output", str(tmp_path / "gguf")]
    )
    assert not (tmp_path / "gguf").exists()


def test_what_llama_cpp_cannot_load_raises(tmp_path):
    (tmp_path / "broken.gguf").write_bytes(b"GGUF")
    if llama_cpp.is_installed():
        with pytest.raises(ConversionError, match=r"llama.cpp does not run broken.gguf"):
            llama_cpp.ask(tmp_path / "broken.gguf", None, [{"prompt": "a"}], [], 64)


def test_what_is_there_is_kept(exported, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(llama_cpp, "is_installed", lambda: False)
    _, _, folder = exported("dense")
    command = ["--model", str(folder / "model"), "--output", str(tmp_path / "gguf")]
    to_gguf.main(command)
    assert "not compared with the model" in capsys.readouterr().err
    assert "--overwrite" in refused(capsys, to_gguf.main, command)
    to_gguf.main([*command, "--overwrite"])
    assert "choose another folder" in refused(
        capsys, to_gguf.main, ["--model", str(folder / "model"), "--output", str(folder / "model"), "--overwrite"]
    )
