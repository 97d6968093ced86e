"""Images of every kind, as the processor reads them: files, URLs, arrays, and what is wrong with them."""

import base64
import io
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
import torch
from conftest import IMAGE_SIZE, make_image
from PIL import Image
from test_processing import chat

from minimind_v_hf.image_reading_minimind_v import load_image


def as_file(image: Image.Image, **kwargs) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, **kwargs)
    file.seek(0)
    return file


def test_every_source_gives_the_same_pixels(processor, tmp_path):
    image = Image.fromarray(np.random.randint(0, 256, (IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8))
    path = tmp_path / "image.png"
    image.save(path)
    array = np.asarray(image)
    encoded = base64.b64encode(path.read_bytes()).decode()
    tensor = torch.from_numpy(array.copy())
    sources = [image, array, tensor, array.transpose(2, 0, 1), tensor.permute(2, 0, 1)]
    sources += [array / 255.0, tensor / 255.0, str(path), path, encoded]
    sources += [f"data:image/png;base64,{encoded}", path.read_bytes()]
    expected = processor(text="<image>", images=image, return_tensors="pt")["pixel_values"]
    for source in sources:
        actual = processor(text="<image>", images=[source], return_tensors="pt")["pixel_values"]
        assert torch.equal(actual, expected), type(source)
    content = [{"type": "image", "path": str(path)}, {"type": "image", "image": image}, {"type": "image", "url": str(path)}]
    outputs = processor.apply_chat_template(chat(("user", content)), tokenize=True, return_dict=True, return_tensors="pt")
    assert torch.equal(outputs["pixel_values"], expected.expand(3, -1, -1, -1))


def test_url(processor):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            found = self.path == "/red.png"
            self.send_response(200 if found else 404)
            self.end_headers()
            if found:
                self.wfile.write(as_file(make_image("red"), format="PNG").getvalue())

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    try:
        assert load_image(f"{address}/red.png").getpixel((0, 0)) == (255, 0, 0)
        with pytest.raises(ValueError, match=r"Cannot read the image \(http.*404"):
            processor(text="<image>", images=f"{address}/missing.png")
    finally:
        server.shutdown()


RED, WHITE = (255, 0, 0), (255, 255, 255)


def files():
    """Files that libraries often get wrong, and the colours that a person sees at the left and at the right."""
    halves = Image.new("RGB", (8, 8), "white")
    halves.paste(RED, (0, 0, 4, 8))
    transparent = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    transparent.paste((255, 0, 0, 255), (0, 0, 4, 8))
    palette = transparent.quantize(4)
    grey_alpha = Image.new("LA", (8, 8), (0, 0))
    grey_alpha.paste((0, 255), (0, 0, 4, 8))
    sixteen = Image.fromarray(np.repeat([[0] * 4 + [65535] * 4], 8, axis=0).astype(np.uint16))
    middle = Image.fromarray(np.full((8, 8), 32896, dtype=np.uint16))
    dark = Image.fromarray(np.full((8, 8), 200, dtype=np.uint16))
    rotated, exif = halves.rotate(90, expand=True), Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
    black, grey = (0, 0, 0), (128, 128, 128)
    return [
        ("rgb", as_file(halves, format="PNG"), RED, WHITE),
        ("rgba", as_file(transparent, format="PNG"), RED, WHITE),
        ("palette with transparency", as_file(palette, format="PNG"), RED, WHITE),
        ("palette", as_file(halves.convert("P", palette=Image.Palette.ADAPTIVE), format="GIF"), RED, WHITE),
        ("grey", as_file(Image.new("L", (8, 8), 128), format="PNG"), grey, grey),
        ("grey with alpha", as_file(grey_alpha, format="PNG"), black, WHITE),
        ("1 bit", as_file(Image.new("1", (8, 8), 1), format="PNG"), WHITE, WHITE),
        ("16 bit", as_file(sixteen, format="PNG"), black, WHITE),
        ("16 bit grey", as_file(middle, format="PNG"), grey, grey),
        ("16 bit, dark", as_file(dark, format="PNG"), (1, 1, 1), (1, 1, 1)),
        ("16 bit tiff, dark", as_file(dark, format="TIFF"), (1, 1, 1), (1, 1, 1)),
        ("16 bit tiff", as_file(sixteen, format="TIFF"), black, WHITE),
        ("cmyk", as_file(halves.convert("CMYK"), format="JPEG", quality=100, subsampling=0), RED, WHITE),
        ("exif", as_file(rotated, format="JPEG", quality=100, subsampling=0, exif=exif), RED, WHITE),
    ]


@pytest.mark.parametrize(("name", "file", "left", "right"), files(), ids=[case[0] for case in files()])
def test_images_look_as_a_person_sees_them(name, file, left, right, tmp_path):
    path = tmp_path / "image"
    path.write_bytes(file.getvalue())
    image = load_image(path)
    assert image.mode == "RGB"
    assert image.size == (8, 8)
    for x, colour in ((1, left), (6, right)):
        assert np.abs(np.subtract(image.getpixel((x, 4)), colour)).max() <= 6, image.getpixel((x, 4))


@pytest.mark.parametrize(
    ("array", "error"),
    [
        (np.zeros((2, 2, 7)), r"shape \(H, W\), \(H, W, C\) or \(C, H, W\), got \(2, 2, 7\)"),
        (np.full((4, 4, 3), np.nan), "NaN"),
        (np.full((4, 4, 3), -3.0), "from 0 to 255"),
        (5, "got int"),
    ],
)
def test_bad_arrays(array, error):
    with pytest.raises(ValueError, match=error):
        load_image(array)


def bad_files(folder):
    (folder / "text.jpg").write_text("no image")
    whole = as_file(Image.fromarray(np.random.randint(0, 256, (64, 64, 3), dtype=np.uint8)), format="JPEG").getvalue()
    (folder / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    Image.new("1", (20_000, 20_000)).save(folder / "bomb.png")
    Image.new("1", (10_000, 10_000)).save(folder / "large.png")
    return {
        "missing.jpg": "there is no such file",
        "text.jpg": "not an image in a known format",
        "truncated.jpg": "truncated or damaged",
        "bomb.png": "decompression bomb",
        "large.png": r"10000x10000 pixels exceed the limit",
    }


def test_bad_files_are_named(processor, tmp_path):
    for name, reason in bad_files(tmp_path).items():
        images = [[make_image()], [make_image(), str(tmp_path / name)]]
        with pytest.raises(ValueError, match=rf"(?s)Cannot read image 1 of sample 1 \(.*{name}\): .*{reason}"):
            processor(text=["<image>", "<image><image>"], images=images)
    # a flat list is told apart by the placeholders
    with pytest.raises(ValueError, match="Cannot read image 0 of sample 2"):
        processor(text=["<image><image>", "none", "<image>"], images=[make_image(), make_image(), "missing.jpg"])


@pytest.mark.parametrize(
    ("text", "images", "error"),
    [
        ("no placeholder", 1, "Sample 0 .* has 0 <image> placeholders, but 1 images"),
        ("<image><image>", 1, "Sample 0 .* has 2 <image> placeholders, but 1 images"),
        ("<image>", 0, "Sample 0 .* has 1 <image> placeholders, but 0 images were passed for it"),
        (["<image>", "<image><image>"], 2, r"2 samples have \[1, 2\] <image> placeholders, 3 in all, but 2 images"),
        (["<image>", "<image><image>"], [2, 1], "Sample 0 .* has 1 <image> placeholders, but 2 images"),
        (["<image>"], [1, 1], "there are 1 texts, and images for 2 samples"),
        ([1, 2], 0, "expected a string or a list of strings"),
    ],
)
def test_images_and_placeholders_must_match(processor, text, images, error):
    if isinstance(images, list):
        images = [[make_image()] * count for count in images]
    else:
        images = [make_image()] * images or None
    with pytest.raises(ValueError, match=error):
        processor(text=text, images=images)


def test_text_without_images(processor):
    outputs = processor(text=["What colour", "is the circle?"], padding=True, return_tensors="pt")
    assert "pixel_values" not in outputs
    assert outputs["attention_mask"].shape == outputs["input_ids"].shape
