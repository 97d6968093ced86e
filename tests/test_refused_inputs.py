"""What a processor is given that is damaged, of another kind, or too large: it is refused, and the error names it."""

import base64
import io
import os
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
import torch
from conftest import make_config, make_image_processor, make_processor, make_tokenizer
from PIL import Image
from test_processing import IMAGE_TOKENS

from minimind_v_hf import MiniMindVProcessor
from minimind_v_hf.image_reading_minimind_v import load_image
from minimind_v_hf.video_reading_minimind_v import load_video


@pytest.mark.parametrize(("width", "height"), [(1, 20_000), (20_000, 1), (3, 70_000)])
def test_a_long_thin_image_needs_little_memory(width, height, processor, tmp_path):
    # Scaled by its shorter side it would be 224 x 4,480,000 pixels
    processor = make_processor(make_image_processor(224), image_seq_length=196)
    image = Image.new("RGB", (width, height), "red")
    image.putpixel((width // 2, height // 2), (0, 0, 255))
    image.save(tmp_path / "long.png")
    for source in (image, str(tmp_path / "long.png"), np.asarray(image)):
        loaded = load_image(source)
        assert max(loaded.size) == 100 * min(loaded.size)
        assert (0, 0, 255) in set(loaded.get_flattened_data() if hasattr(loaded, "get_flattened_data") else loaded.getdata())
        assert processor(text="<image>", images=source, return_tensors="pt")["pixel_values"].shape == (1, 3, 224, 224)
    with pytest.raises(ValueError, match="crop it first"):
        processor(text="<image>", images=np.zeros((20_000, 1, 3), np.float32), do_rescale=False)


def test_usual_images_are_not_cropped(tmp_path):
    image = Image.effect_noise((800, 8), 50).convert("RGB")  # exactly 100 : 1
    assert load_image(image).tobytes() == image.tobytes()


@pytest.mark.parametrize(
    ("image", "error"),
    [
        (Image.new("RGB", (0, 5)), "no pixels: it is 0x5"),
        (np.full((4, 4, 3), 1j), "got complex128"),
        (torch.full((3, 4, 4), 1j), "got complex64"),
        (np.full((4, 4, 3), np.nan), "NaN"),
        (np.full((4, 4, 3), "x"), "expected an array of integers, floats or booleans"),
        (Image.fromarray(np.full((4, 4), np.nan, np.float32)), "NaN"),
    ],
)
def test_what_is_no_image_is_refused(processor, image, error):
    with pytest.raises(ValueError, match=error):
        processor(text="<image>", images=image)


def test_nan_is_refused_in_pixels_that_the_caller_prepared(processor):
    with pytest.raises(ValueError, match="NaN"):
        processor(text="<image>", images=np.full((16, 16, 3), np.nan, np.float32), do_rescale=False)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_regular_file_is_refused_and_not_waited_for(processor, make, tmp_path):
    make(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a\.png.*not a regular file"):
        processor(text="<image>", images=str(tmp_path / "a.png"))


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "196", None, 10**9])
def test_image_seq_length_is_a_number_of_tokens(processor, value):
    with pytest.raises(ValueError, match=r"image_seq_length=.*expected an integer from 1 to 65536"):
        MiniMindVProcessor(processor.image_processor, processor.tokenizer, image_seq_length=value)


def test_audio_and_empty_prompts_are_refused(processor):
    with pytest.raises(ValueError, match="audio: expected None"):
        processor(text="a", audio=np.zeros(16_000))
    with pytest.raises(ValueError, match=r"prompt 1 \(counted from 0\) is empty"):
        processor(text=["a", ""])


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ([{"type": "text", "text": None}], "no text"),
        ([{"type": "text"}], "no text"),
        (None, "no content"),
        (7, "no content"),
        ({"type": "text", "text": "a"}, "no content"),
        ([{"type": "image", "path": "a.jpg", "url": "b.jpg"}], "several sources"),
    ],
)
def test_messages_without_content_are_refused(processor, content, error):
    with pytest.raises(Exception, match=error):
        processor.apply_chat_template([{"role": "user", "content": content}])
    with pytest.raises(Exception, match="no content"):
        processor.apply_chat_template([{"role": "user"}])


@pytest.mark.parametrize("key", ["image", "path", "url", "base64"])
def test_messages_hold_images_in_every_form(processor, key, tmp_path):
    file = io.BytesIO()
    Image.effect_noise((16, 16), 90).convert("RGB").save(file, "PNG")
    (tmp_path / "a.png").write_bytes(file.getvalue())
    expected = processor(text="<image>", images=str(tmp_path / "a.png"), return_tensors="pt")["pixel_values"]
    source = {
        "image": Image.open(file),
        "path": str(tmp_path / "a.png"),
        "base64": base64.b64encode(file.getvalue()).decode(),
        "url": "data:image/png;base64," + base64.b64encode(file.getvalue()).decode(),
    }[key]
    outputs = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image", key: source}]}], tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert torch.equal(outputs["pixel_values"], expected)


def test_a_damaged_template_is_named(tmp_path):
    processor = make_processor()
    processor.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{%- if messages -%}\nno end")
    damaged = MiniMindVProcessor.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"chat template of .*damaged: line 2"):
        damaged.apply_chat_template([{"role": "user", "content": "a"}])


@pytest.mark.parametrize(
    ("conversation", "error"),
    [
        ([], r"expected a list of messages, got list \[\]"),
        ("Hi", "expected a list of messages, got str 'Hi'"),
        (None, "expected a list of messages, got NoneType"),
        ([5], r"Message 0 \(counted from 0\): expected a dict with role and content, got 5"),
        ([[{"role": "user", "content": "Hi"}], [None]], "Message 0 .* got None"),
        ([[[[{"role": "user", "content": "Hi"}]]]], "expected a dict with role and content"),
        ([{"role": "user", "content": [5]}], "Message 0 .* expected content items with a type, got 5"),
        ([{"role": "user", "content": ["Hi"]}], "expected content items with a type, got 'Hi'"),
        ([{"role": "user", "content": [{"text": "Hi"}]}], "expected content items with a type"),
        ([{"role": "user", "content": None}], "Message 0 .* has no content"),
        ([{"role": "user", "content": {"type": "text", "text": "Hi"}}], "Message 0 .* has no content"),
        ([{"role": "user", "content": [{"type": "video", "url": "a", "path": "b"}]}], "several sources, path and url"),
    ],
)
@pytest.mark.parametrize("tokenize", [False, True])
def test_what_is_no_conversation_is_refused(processor, conversation, error, tokenize):
    with pytest.raises(ValueError, match=error):
        processor.apply_chat_template(conversation, tokenize=tokenize, return_dict=True)


def test_a_deeply_nested_conversation_is_refused_or_rendered(processor):
    deep: list = []
    for _ in range(5000):
        deep = [deep]
    message = {"role": "user", "content": "Hi", "more": deep}
    try:
        rendered = processor.apply_chat_template([message])  # transformers 5.18 looks at no other key
    except ValueError as error:
        rendered = str(error)
    assert "nested too deeply" in rendered or "user\nHi<|im_end|>" in rendered


def test_build_prepares_a_copy_and_checks_the_image_token():
    tokenizer = make_tokenizer()
    processor = MiniMindVProcessor.build(make_image_processor(), tokenizer, make_config())
    assert processor.image_seq_length == IMAGE_TOKENS
    assert processor.chat_template == processor.tokenizer.chat_template
    assert tokenizer.chat_template is None
    assert getattr(tokenizer, "image_token", None) is None
    again = MiniMindVProcessor.build(make_image_processor(), processor.tokenizer, make_config())
    assert again.tokenizer is processor.tokenizer
    with pytest.raises(ValueError, match=r"has the id \d+, but config.image_token_id is 7: expected the same"):
        MiniMindVProcessor.build(make_image_processor(), tokenizer, make_config(image_token_id=7))
    with pytest.raises(ValueError, match=r"without. Give it to MiniMindVProcessor.build"):
        MiniMindVProcessor(make_image_processor(), tokenizer)


def test_build_says_that_it_needs_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "minimind_v_hf.preparation", None)
    with pytest.raises(ImportError, match=r"MiniMindVProcessor.build needs the package minimind_v_hf"):
        MiniMindVProcessor.build(make_image_processor(), make_tokenizer(), make_config())


@pytest.mark.parametrize("load", [load_image, load_video])
def test_a_download_that_breaks_off_is_an_error(load):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"x" * 10)

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with pytest.raises(ValueError, match="the download breaks off: 990 bytes are missing"):
            load(f"http://127.0.0.1:{server.server_port}/file")
        with pytest.raises(ValueError, match="nonnumeric port"):
            load("http://127.0.0.1:port/file")
    finally:
        server.shutdown()


@pytest.mark.parametrize("content", [b"null", b"[]", b"{{ x", b"\xff\xfe"])
@pytest.mark.parametrize("name", ["processor_config.json", "tokenizer_config.json", "tokenizer.json"])
def test_a_damaged_file_is_named(processor, name, content, tmp_path):
    processor.save_pretrained(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(OSError, match=rf"{tmp_path}.*{name}"):
        MiniMindVProcessor.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("text", "error"), [([], "expected a string or a list"), ("a\ud800", "prompt 0 .* half a surrogate pair")]
)
def test_text_that_is_none_is_refused(processor, text, error):
    with pytest.raises(ValueError, match=error):
        processor(text=text)


def test_a_tensor_without_data_is_refused(processor):
    with pytest.raises(ValueError, match="meta device"):
        processor(text="<image>", images=torch.zeros(3, 4, 4, device="meta"))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("crop_size", {"height": 10**6, "width": 10**6}),
        ("size", {"shortest_edge": 10**9}),
        ("size", {"shortest_edge": 0}),
        ("image_std", [0.0, 1.0, 1.0]),
        ("image_std", [float("nan")] * 3),
        ("rescale_factor", 0),
    ],
)
def test_settings_of_an_image_processor_are_checked(field, value):
    image_processor = make_image_processor()
    setattr(image_processor, field, value)
    with pytest.raises(ValueError, match=rf"image_processor\.{field}=.*: expected"):
        make_processor(image_processor)
