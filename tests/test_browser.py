"""The page without a server: in a real browser as a person uses it, with the answers that transformers gives."""

import base64
import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_image, make_model, make_processor
from PIL import Image
from transformers import AutoTokenizer, CLIPImageProcessorPil

from minimind_v_hf import MiniMindVProcessor
from minimind_v_hf.chat import Conversation


sync_api = pytest.importorskip("playwright.sync_api")

ROOT = Path(__file__).parents[1]
BROWSER = ROOT / "examples" / "browser"
MODEL = BROWSER / "model"
FIXTURES = Path(__file__).parent / "fixtures" / "browser"
CONVERSATIONS = json.loads((FIXTURES / "conversations.json").read_text(encoding="utf-8"))
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FAKE_CAMERA = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]

if CHROMIUM is None or shutil.which("node") is None or not (BROWSER / "node_modules").is_dir():
    pytest.skip("needs Chromium, node, and npm ci in examples/browser", allow_module_level=True)


@contextlib.contextmanager
def served(command: Sequence[str | Path], **kwargs) -> Iterator[str]:
    """A server's address. Its first line names the port."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **kwargs)
    try:
        port = re.search(r":(\d+)/", process.stdout.readline()).group(1)
        yield f"http://127.0.0.1:{port}/"
    finally:
        process.terminate()
        process.wait(30)


def serve(*arguments: str | Path):
    return served([sys.executable, BROWSER / "serve.py", "--port", "0", *arguments])


@pytest.fixture(scope="module")
def chromium():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", *FAKE_CAMERA])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def address():
    with serve() as address:
        yield address


@pytest.fixture(scope="module")
def endless(tmp_path_factory):
    """The address of a model that talks until it is stopped, or has no room left."""
    folder = tmp_path_factory.mktemp("endless") / "model"
    shutil.copytree(MODEL, folder)
    for name in ("config.json", "generation_config.json"):
        settings = json.loads((folder / name).read_text())
        for part in (settings, settings.get("text_config", {})):
            part.pop("eos_token_id", None)
        (folder / name).write_text(json.dumps(settings))
    with serve("--model", folder) as address:
        yield address


class Page:
    """The page as a visitor has it before them."""

    def __init__(self, browser, address: str, is_ready: bool = True, **options):
        self.context = browser.new_context(**options)
        self.context.set_default_timeout(60_000)
        self.page = self.context.new_page()
        self.hosts: set[str] = set()
        self.errors: list[str] = []
        self.context.on("request", lambda request: self.hosts.add(re.match(r"\w+:(?://[^/]*)?", request.url).group()))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.goto(address)
        if is_ready:
            self.page.locator("#device").wait_for()

    def ask(self, question: str, images: Sequence[Path] = ()) -> str:
        if images:
            self.page.set_input_files("#files", images)
            self.page.locator(f"#attached li:nth-child({len(images)})").wait_for()
        self.page.fill("#question", question)
        self.page.press("#question", "Enter")
        return self.answer()

    def answer(self) -> str:
        self.page.wait_for_function(
            "document.querySelector('#stop').hidden && document.querySelector('.answer:last-child .status')"
        )
        return self.page.locator(".answer .text").last.text_content().strip()

    def tokens(self) -> int:
        return int(re.match(r"\d+", self.page.locator(".status").last.inner_text()).group())

    def notice(self) -> str:
        self.page.locator("#notice").wait_for()
        return self.page.locator("#notice p").inner_text()


@pytest.fixture
def visit(chromium):
    pages = []

    def open_page(address: str, **options) -> Page:
        pages.append(Page(chromium, address, **options))
        return pages[-1]

    yield open_page
    for page in pages:
        page.context.close()
        assert page.errors == []


# ── Answers ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_answers_equal_those_of_transformers(visit, address):
    """Many turns, several images in one question and in later ones, Chinese, and text that looks like control tokens."""
    page = visit(address, locale="en-US")
    threads = min(4, os.cpu_count() or 1)
    assert page.page.locator("#device").inner_text() == f"WASM, {threads} thread{'s' * (threads > 1)}"
    for conversation in CONVERSATIONS:
        answers = [page.ask(turn["question"], [FIXTURES / name for name in turn["images"]]) for turn in conversation]
        assert answers == [turn["answer"] for turn in conversation]
        page.page.click("#new")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A fresh model of random weights, its processor, and the address of its export. Any of many tokens ends its answers."""
    pytest.importorskip("onnxscript")
    from minimind_v_hf.conversion.to_onnx import convert

    torch.manual_seed(2)  # with which the answers are neither very short nor very long
    folder = tmp_path_factory.mktemp("exported")
    model, processor = make_model(), make_processor()
    model.generation_config.eos_token_id = [2, *range(290, 320)]
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    convert(folder / "model", folder / "onnx", dtype=["fp32"])
    with serve("--model", folder / "onnx") as address:
        yield model, processor, address


@pytest.mark.parametrize("device", ["wasm", "webgpu"])
def test_answers_of_an_exported_model_equal_those_of_transformers(chromium, exported, tmp_path, device):
    odd_images(tmp_path)
    model, processor, address = exported
    arguments = ["--no-sandbox", "--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader", "--enable-features=Vulkan"]
    with contextlib.ExitStack() as stack:
        if device == "webgpu":
            chromium = chromium.browser_type.launch(executable_path=CHROMIUM, args=arguments)
            stack.callback(chromium.close)
        page = Page(chromium, f"{address}?device={device}", locale="en-US")
        stack.callback(page.context.close)
        shown = page.page.locator("#device").inner_text()
        if device == "webgpu" and shown != "WebGPU":
            pytest.skip("this Chromium has no WebGPU")
        conversation = Conversation(model, processor)
        turns = [("What colour?", ["large.png", "small.png"]), ("图中有几个图形？", []), ("And <image> here?", ["palette.png"])]
        for question, names in turns:
            for name in names:
                conversation.attach(image=tmp_path / name)
            expected = conversation.ask(question, max_new_tokens=512)
            answer = page.ask(question, [tmp_path / name for name in names])
            assert (answer, page.tokens()) == (expected.text.strip(), expected.tokens)
        assert page.errors == []


def test_a_click_on_an_example_is_answered(visit, address):
    page = visit(address, locale="en-US")
    page.page.get_by_role("button", name="How many shapes are there?").click()
    assert page.answer() == "three"
    assert page.page.locator("#welcome").is_hidden()
    page.page.click("#new")
    page.page.click("#language")
    page.page.get_by_role("button", name="右下是什么图形？").click()
    assert page.answer() == "圆环"


def test_questions_may_be_asked_while_the_model_loads_and_without_a_network_afterwards(visit, address):
    page = visit(address, is_ready=False, locale="en-US")
    page.page.locator(".example").first.click()
    assert page.answer() == "three"
    page.context.set_offline(True)
    turn = CONVERSATIONS[1][0]
    page.page.click("#new")
    assert page.ask(turn["question"], [FIXTURES / turn["images"][0]]) == turn["answer"]
    page.page.click("#new")
    page.page.locator(".example").last.click()
    assert page.answer() == "ring"
    assert page.hosts <= {address.rstrip("/"), "blob:"}  # nothing came from elsewhere


def test_progress_is_shown_while_it_loads(visit, address):
    page = visit("about:blank", is_ready=False, locale="en-US")
    page.context.route("**/decoder_model_merged*", lambda route: None)  # never comes
    page.page.goto(address)
    label = page.page.locator("#loading label")
    page.page.wait_for_function("document.querySelector('#loading label').textContent.startsWith('Loading the model')")
    assert re.fullmatch(r"Loading the model: \d+\.\d of \d+\.\d MB", label.inner_text())
    assert 0 < page.page.evaluate("document.querySelector('progress').value") <= 1


# ── Stopping, and no room left ───────────────────────────────────────────────────────────────────────────────────────


def test_an_answer_streams_and_is_stopped_and_the_conversation_goes_on(visit, endless):
    page = visit(endless, locale="zh-CN")
    text = page.page.locator(".answer .text")
    page.page.evaluate("""() => {
        window.lengths = [];
        new MutationObserver(() => {
            const text = document.querySelector(".answer .text");
            if (text) lengths.push(text.textContent.length);
        }).observe(document.querySelector("#messages"), { subtree: true, childList: true, characterData: true });
    }""")
    page.page.fill("#question", "图中有几个图形？")
    page.page.press("#question", "Enter")
    page.page.wait_for_function("document.querySelector('.answer .text')?.textContent.length > 10")
    assert page.page.locator("#send").is_hidden()
    page.page.keyboard.press("Escape")
    page.answer()
    lengths = page.page.evaluate("lengths")
    assert len(set(lengths)) > 3
    assert lengths == sorted(lengths)
    tokens = re.fullmatch(r"(\d+) 个 token · 每秒 [\d.]+ 个 · 已停止", page.page.locator(".status").inner_text()).group(1)
    assert 3 < int(tokens) < 400
    stopped = text.inner_text()
    page.page.fill("#question", "还有呢？")
    page.page.press("#question", "Enter")
    page.page.locator("#stop").click()
    page.page.wait_for_function("document.querySelectorAll('.status').length === 2")
    assert text.first.inner_text() == stopped


def test_an_answer_is_stopped_before_the_model_is_there(visit, endless):
    page = visit(endless, is_ready=False, locale="en-US")
    page.page.fill("#question", "Hello")
    page.page.press("#question", "Enter")
    page.page.locator("#stop").click()
    page.answer()
    assert page.tokens() == 1
    # one token is too few for a rate
    assert re.fullmatch(r"1 token · [\d.]+ s · stopped", page.page.locator(".status").inner_text())


def test_a_conversation_without_room_is_refused_and_the_question_goes_back(visit, address):
    page = visit(address, locale="en-US")
    page.ask("How many shapes are there?", [FIXTURES / "held-out-0.jpg"])
    page.page.set_input_files("#files", FIXTURES / "held-out-1.jpg")
    page.page.locator("#attached li").wait_for()
    page.page.fill("#question", "And now? " * 200)
    page.page.press("#question", "Enter")
    assert re.search(r"grown to \d+ tokens, and this model holds 512\. Shorten the question, or start", page.notice())
    assert page.page.locator("#question").input_value() == "And now? " * 199 + "And now?"
    assert page.page.locator("#attached li").count() == 1
    assert page.page.locator(".question").count() == 1
    assert page.ask("图中有几个图形？") in ("一", "二", "三", "四")  # what came before is still there
    page.page.click("#new")
    assert page.page.locator("#notice").is_hidden()


def test_a_new_chat_stops_the_answer(visit, endless):
    page = visit(endless, locale="en-US")
    page.page.fill("#question", "Hello")
    page.page.press("#question", "Enter")
    page.page.wait_for_function("document.querySelector('.answer .text')?.textContent")
    page.page.click("#new")
    page.page.fill("#question", "How many shapes are there?")
    page.page.press("#question", "Enter")
    page.page.wait_for_function("document.querySelector('.answer .text')?.textContent")
    page.page.keyboard.press("Escape")
    page.answer()
    assert page.page.locator(".question").all_inner_texts() == ["How many shapes are there?"]
    assert page.page.locator(".answer").count() == 1


# ── Images ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def odd_images(folder: Path) -> dict[str, Image.Image]:
    noise = np.random.default_rng(0).integers(0, 256, (1001, 1503, 4), dtype=np.uint8)
    smooth = Image.fromarray(noise[:20, :30, :3]).resize((640, 427), Image.Resampling.BICUBIC)
    rotated = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    smooth.save(rotated, "JPEG", exif=exif, quality=95, subsampling=0)
    palette = smooth.convert("P")
    images = {
        "large.png": Image.fromarray(noise[..., :3]),
        "small.png": Image.fromarray(noise[:23, :41, :3]),
        "grey.png": Image.fromarray(noise[:90, :64, 0]),
        "long.png": Image.fromarray(noise[:7, :1502, :3]),  # whose middle is kept
        "palette.png": palette,
        "clear.png": Image.fromarray(noise[:80, :100]),
    }
    for name, image in images.items():
        image.save(folder / name)
    (folder / "rotated.jpg").write_bytes(rotated.getvalue())
    return images


@pytest.mark.parametrize(
    "settings",
    [
        {"size": {"shortest_edge": 64}, "crop_size": {"height": 64, "width": 64}, "resample": 3, "do_center_crop": True},
        {"size": {"height": 48, "width": 48}, "resample": 2, "do_center_crop": False},
    ],
    ids=["bicubic, cropped", "bilinear"],
)
def test_pixels_equal_those_of_the_processor(visit, address, tmp_path, settings):
    """To the bit, and within rounding where the browser lays transparency over white."""
    odd_images(tmp_path)
    page = visit(address, is_ready=False)
    python = CLIPImageProcessorPil(**settings, do_normalize=False, do_rescale=False)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    processor = MiniMindVProcessor(python, tokenizer, tokenizer.chat_template, 16)
    for path in sorted(tmp_path.iterdir()):
        page.page.set_input_files("#files", path)
        page.page.locator("#attached li").wait_for()
        shape, pixels = page.page.evaluate(
            """async ([settings, url]) => {
                const { readImage } = await import("./image.js");
                const file = await (await fetch(url)).blob();
                const { data, width, height } = await readImage(file, { do_resize: true, ...settings });
                return [[height, width, 3], Array.from(data)];
            }""",
            [settings, f"data:application/octet-stream;base64,{base64.b64encode(path.read_bytes()).decode()}"],
        )
        expected = processor(images=[path])["pixel_values"][0]
        difference = np.abs(np.array(pixels).reshape(shape).transpose(2, 0, 1) - np.asarray(expected, dtype=float))
        limit = 1 if path.name == "clear.png" else 0
        assert difference.max() <= limit, path.name
        page.page.locator(".remove").click()


def test_dropped_pasted_and_photographed_images(visit, address):
    page = visit(address, locale="en-US").page
    for event in ("drop", "paste"):
        page.evaluate(
            """async ([event, url]) => {
                const data = new DataTransfer();
                data.items.add(new File([await (await fetch(url)).blob()], `${event}.png`, { type: "image/png" }));
                const init = { bubbles: true, cancelable: true, dataTransfer: data, clipboardData: data };
                const Kind = event === "drop" ? DragEvent : ClipboardEvent;
                document.body.dispatchEvent(new Kind(event, init));
            }""",
            [event, "examples/shapes-1.png"],
        )
        page.locator(f"#attached img[alt='{event}.png']").wait_for()
    page.click("#photograph")
    page.wait_for_function("document.querySelector('video').videoWidth > 0")
    page.click("#shutter")
    page.locator("#attached img[alt='photograph.png']").wait_for()
    page.click("#photograph")
    page.wait_for_function("document.querySelector('#camera').open")
    page.keyboard.press("Escape")
    page.wait_for_function("!document.querySelector('#camera').open")
    assert page.locator("#attached li").count() == 3
    page.get_by_role("button", name="Remove paste.png").click()
    assert page.locator("#attached li").count() == 2


def test_a_broken_image_is_named_and_left_out(visit, address, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n no image")
    make_image().save(tmp_path / "red.png")
    page = visit(address, locale="en-US")
    page.page.set_input_files("#files", [tmp_path / "broken.png", tmp_path / "red.png"])
    page.page.locator("#attached img[alt='red.png']").wait_for()
    assert page.notice() == "broken.png is not an image that this browser can read."
    assert page.page.locator("#attached li").count() == 1
    page.page.get_by_role("button", name="Close").click()
    assert page.page.locator("#notice").is_hidden()


# ── Notices of what cannot be ────────────────────────────────────────────────────────────────────────────────────────


class BreaksOff(BaseHTTPRequestHandler):
    """A server that goes away in the middle of a file."""

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        self.wfile.write(b"no more")

    def log_message(self, *arguments):
        pass


def test_notice_of_a_download_that_breaks_off(visit, address):
    with ThreadingHTTPServer(("127.0.0.1", 0), BreaksOff) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        elsewhere = f"http://127.0.0.1:{server.server_port}/"
        for file in ("**/onnx/decoder*", "**/ort-*.wasm"):
            page = visit("about:blank", is_ready=False, locale="en-US")
            page.context.route(file, lambda route: route.continue_(url=elsewhere))
            page.page.goto(address)
            assert page.notice().startswith("The model cannot be fetched: the connection failed (")
        server.shutdown()


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (lambda route: route.abort(), "The model cannot be fetched: the connection failed (Failed to fetch)."),
        (
            lambda route: route.fulfill(status=404),
            "The model cannot be fetched: the server answers 404 for /model/onnx/vision_encoder_fp16.onnx.",
        ),
        (lambda route: route.fulfill(body=b"no graph"), "The model cannot run here: "),
    ],
    ids=["no network", "no file", "no graph"],
)
def test_notice_of_why_a_model_does_not_load_and_the_question_is_kept(visit, address, block, message):
    page = visit("about:blank", is_ready=False, locale="en-US")
    page.context.route("**/onnx/vision_encoder*", block)
    page.page.goto(address)
    page.page.locator(".example").first.click()
    assert page.notice().startswith(message)
    assert page.page.locator("#question").input_value() == "How many shapes are there?"
    assert page.page.locator("#attached li").count() == 1
    assert page.page.locator("#send").is_disabled()
    page.context.unroute_all()
    page.page.get_by_role("button", name="Reload").click()
    page.page.locator("#device").wait_for()


def test_a_page_without_its_library_says_so(visit, address):
    page = visit("about:blank", is_ready=False, locale="en-US")
    page.context.route("**/transformers.min.js", lambda route: route.fulfill(status=404))
    page.page.goto(address)
    assert page.notice() == "The model cannot start: a file of this page is missing, or this browser is too old."


def test_without_javascript_the_page_says_what_it_needs(visit, address):
    page = visit(address, is_ready=False, java_script_enabled=False).page
    assert "needs a current browser with JavaScript" in page.locator("#unstarted").inner_text()


def test_a_browser_without_what_it_takes_is_told_so(visit, address):
    page = visit("about:blank", is_ready=False, locale="zh-CN")
    page.page.add_init_script("delete window.OffscreenCanvas")
    page.page.goto(address)
    assert page.notice().startswith("这个浏览器无法运行模型：缺少 OffscreenCanvas。")


def test_the_server_says_what_is_missing(tmp_path):
    command = [sys.executable, BROWSER / "serve.py", "--model", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr == f"serve.py: error: --model {tmp_path}: expected a folder that convert/to_onnx.py wrote\n"
    shutil.copy(BROWSER / "serve.py", tmp_path)
    command = [sys.executable, "serve.py", "--model", MODEL]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr == "serve.py: error: the JavaScript library is missing: npm ci --prefix .\n"


# ── Appearance ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_on_a_telephone_nothing_is_cut_off(visit, address):
    page = visit(address, locale="zh-CN", viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True).page
    box = page.locator("#question")
    assert box.get_attribute("placeholder") == "就图片提问"
    assert page.evaluate("document.documentElement.lang") == "zh-CN"

    def is_in_view(*elements):
        frames = [element.bounding_box() for element in elements]
        return all(
            frame["x"] >= 0 and frame["x"] + frame["width"] <= 390 and frame["y"] + frame["height"] <= 844 for frame in frames
        )

    assert is_in_view(*page.locator(".example").all(), page.locator("#send"), page.locator("#private"))
    page.locator(".example").first.tap()
    page.locator(".status").wait_for()
    assert is_in_view(page.locator("#device"), page.locator("#new"), page.locator("#language"), page.locator(".status"))
    box.fill("W" * 100)
    page.locator("#send").tap()
    page.wait_for_function("document.querySelectorAll('.status').length === 2")
    assert not page.evaluate("document.documentElement.scrollWidth > innerWidth")
    assert not page.evaluate("document.querySelector('#chat').scrollWidth > innerWidth")
    page.set_input_files("#files", [FIXTURES / "held-out-0.jpg", FIXTURES / "held-out-1.jpg"])
    page.locator("#attached li:nth-child(2)").wait_for()
    composer = page.locator("#composer").bounding_box()
    last = page.locator(".status").last.bounding_box()
    assert last["y"] + last["height"] <= composer["y"]  # the end of the chat stays in view


def test_by_keyboard_alone(visit, address):
    page = visit(address, locale="en-US")
    focused = []
    for _ in range(10):
        page.page.keyboard.press("Tab")
        focused.append(page.page.evaluate("document.activeElement.id || document.activeElement.className"))
    assert [name for name in focused if name][:6] == ["language", "example", "example", "question", "add", "photograph"]
    page.page.locator(".example").first.focus()
    page.page.keyboard.press("Enter")
    assert page.answer() == "three"


def test_colours_follow_the_system_and_are_legible(visit, address):
    def contrast(page, selector):
        return page.evaluate(
            """(selector) => {
                const parse = (text) => text.match(/[\\d.]+/g).map(Number);
                const linear = (v) => (v / 255 <= 0.03928 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4);
                const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
                let element = document.querySelector(selector);
                const text = light(parse(getComputedStyle(element).color));
                while (parse(getComputedStyle(element).backgroundColor)[3] === 0) element = element.parentElement;
                const ground = light(parse(getComputedStyle(element).backgroundColor));
                return (Math.max(text, ground) + 0.05) / (Math.min(text, ground) + 0.05);
            }""",
            selector,
        )

    grounds = []
    for scheme in ("light", "dark"):
        page = visit(address, color_scheme=scheme, locale="en-US").page
        page.locator(".example").first.click()
        page.locator(".status").wait_for()
        for selector in ("#question", "#device", ".status", ".question > p", ".answer .text", "#private", "#new", "#hint"):
            assert contrast(page, selector) >= 4.5, (scheme, selector)
        grounds.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert grounds[0] != grounds[1]


# ── A static host ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_is_built_runs_on_any_static_host_with_one_thread(visit, tmp_path):
    command = ["node", BROWSER / "build.mjs", "--output", tmp_path / "site" / "below"]
    subprocess.run(command, check=True, timeout=60, stdout=subprocess.DEVNULL)
    with served([sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1"], cwd=tmp_path / "site") as address:
        page = visit(f"{address}below/", locale="en-US")
        assert page.page.locator("#device").inner_text() == "WASM, 1 thread"
        assert "COOP" in page.page.locator("#device").get_attribute("title")
        page.page.locator(".example").first.click()
        assert page.answer() == "three"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "."], "something else is there: choose another folder"),
        (["--output", "diary.txt"], "something else is there: choose another folder"),
        (["--model", "nothing"], "expected a folder that convert/to_onnx.py wrote"),
        (["--nothing"], "Unknown option '--nothing'"),
    ],
    ids=["a folder of other things", "a file", "no model", "no option"],
)
def test_build_refuses_and_leaves_all_as_it_was(arguments, message, tmp_path):
    (tmp_path / "diary.txt").write_text("dear")
    (tmp_path / "model").mkdir()
    environment = os.environ | {"INIT_CWD": str(tmp_path)}
    command = ["node", BROWSER / "build.mjs", *arguments]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith("build.mjs: error: ")
    assert done.stderr.count("\n") == 1
    assert message in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["diary.txt", "model"]
    assert (tmp_path / "diary.txt").read_text() == "dear"


def test_only_the_precisions_in_which_the_page_runs_are_built(tmp_path):
    model = tmp_path / "model"
    (model / "onnx").mkdir(parents=True)
    for suffix in ("", "_fp16", "_quantized", "_q4", "_q4f16"):
        (model / "onnx" / f"decoder{suffix}.onnx").touch()
    choices = {"dtype": "fp16", "device_config": {"wasm": {"dtype": "q8"}, "webgpu": {"dtype": "q4"}}}
    for config, built in (
        ({"transformers.js_config": choices}, ["decoder_q4.onnx", "decoder_quantized.onnx"]),
        ({"transformers.js_config": {"dtype": "fp32"}}, ["decoder.onnx"]),
        ({}, sorted(file.name for file in (model / "onnx").iterdir())),
    ):
        (model / "config.json").write_text(json.dumps(config))
        command = ["node", BROWSER / "build.mjs", "--model", model, "--output", tmp_path / "site"]
        subprocess.run(command, check=True, timeout=60, stdout=subprocess.DEVNULL)
        assert sorted(file.name for file in (tmp_path / "site" / "model" / "onnx").iterdir()) == built


def test_what_was_built_is_replaced(tmp_path):
    for _ in range(2):
        subprocess.run(["node", BROWSER / "build.mjs", "--output", tmp_path], check=True, timeout=60, stdout=subprocess.DEVNULL)
    assert (tmp_path / "lib" / "transformers.min.js").is_file()


def test_serve_needs_a_port_that_there_is():
    done = subprocess.run(
        [sys.executable, BROWSER / "serve.py", "--port", "99999"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr == "serve.py: error: cannot listen at 127.0.0.1:99999: bind(): port must be 0-65535.\n"
