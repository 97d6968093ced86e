"""The web page: in a real browser as a person uses it, where there is one."""

import itertools
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import types
import urllib.request
from pathlib import Path

import pytest
import torch
from conftest import make_image, make_model, make_processor
from PIL import Image

from minimind_v_hf.shapes import PLACES


pytest.importorskip("gradio")
import web_demo


DEMO = Path(__file__).parents[1] / "examples" / "web_demo.py"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SAMPLING = {"temperature": 0, "top_p": 0.9, "top_k": 0, "penalty": 1, "length": 6}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("web")
    for name, seed in (("talker", 3), ("other", 4)):
        torch.manual_seed(seed)
        model = make_model({"max_position_embeddings": 100_000})
        model.generation_config.eos_token_id = None  # it talks until it is stopped
        model.save_pretrained(path / name)
        make_processor().save_pretrained(path / name)
    make_image().save(path / "red.png")
    (path / "broken.png").write_text("no image")
    return path


def steps(folder, text, files=(), talk=None, history=(), model="talker", request=None, **sampling):
    message = {"text": text, "files": [str(folder / name) for name in files]}
    talk, _ = web_demo.take(message, talk)
    return talk, list(web_demo.respond(talk, list(history), str(folder / model), **SAMPLING | sampling, request=request))


def test_answers_stream_and_the_conversation_goes_on(folder):
    talk, updates = steps(folder, "What?", ["red.png"])
    texts = [history[-1]["content"] for history, *_ in updates[1:]]
    assert len(texts) > 1
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))
    history, _, status = updates[-1]
    assert [message["role"] for message in history] == ["user", "user", "assistant"]
    assert re.fullmatch(r"6 tokens · \d+ tokens/s", status)
    talk, updates = steps(folder, "And?", talk=talk, history=history)
    assert len(updates[-1][0]) == 5
    assert len(talk.conversation.messages) == 4
    talk, updates = steps(folder, "And?", talk=talk, model="other")
    assert len(talk.conversation.messages) == 2  # another model knows nothing of it


def test_notice_of_what_cannot_be_read_and_the_question_goes_back(folder):
    with pytest.warns(UserWarning, match=r"^This file cannot be read: broken.png \(the file is not an image in a known format"):
        talk, updates = steps(folder, "What?", ["red.png", "broken.png"])
    history, box, _ = updates[-1]
    assert history == []
    assert box["value"] == {"text": "What?", "files": [str(folder / "red.png")]}  # the broken one does not stay
    talk, updates = steps(folder, "Hello", talk=talk)
    assert len(updates[-1][0]) == 2  # and no image is left over


def test_notices_are_in_the_language_of_the_browser(folder):
    request = types.SimpleNamespace(headers={"accept-language": "zh-CN,zh;q=0.9"})
    with pytest.warns(UserWarning, match="^无法读取这个文件：broken.png$"):
        steps(folder, "What?", ["broken.png"], request=request)
    with pytest.warns(UserWarning, match="^无法回答：问题太长"):
        steps(folder, "long " * 100_000, request=request)
    with pytest.warns(UserWarning, match="^No answer: The conversation has grown to .* shorten the question, or start"):
        steps(folder, "long " * 100_000)


def test_sliders_send_integers_and_questions_may_hold_half_a_character(folder):
    _, updates = steps(folder, "What \ud800?", ["red.png"], temperature=2, penalty=2, top_p=1)
    assert re.fullmatch(r"\d+ tokens · \d+ tokens/s", updates[-1][2])
    assert updates[-1][0][1]["content"] == "What ??"
    with pytest.warns(UserWarning, match="broken.png"):
        _, updates = steps(folder, "What \ud800?", ["broken.png"])
    assert updates[-1][1]["value"]["text"] == "What ??"  # what goes back into the box too


def test_while_it_answers_the_box_keeps_what_is_typed(folder):
    talk, _ = web_demo.take({"text": "one", "files": []}, None)
    _, box = web_demo.take({"text": "two", "files": []}, talk)
    assert "value" not in box
    assert talk.message["text"] == "one"
    _, box = web_demo.take({"text": "  ", "files": []}, None)
    assert "value" not in box


def test_a_port_that_is_taken(folder):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        command = [sys.executable, DEMO, "--model", folder / "talker", "--port", port]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2
    assert f"web_demo.py: error: cannot listen at 127.0.0.1:{port}: choose another --host or --port" in done.stderr
    assert "Traceback" not in done.stderr


def test_examples_ask_for_places_that_are_not_empty(tmp_path):
    examples = web_demo.draw_examples(tmp_path)
    asked = [
        (example, place)
        for example in examples
        for place, names in enumerate(PLACES)
        if any(name in example["text"] for name in names)
    ]
    assert len(asked) == 2
    for example, place in asked:
        left, top = place % 2 * 32, place // 2 * 32
        assert len(Image.open(example["files"][0]).crop((left, top, left + 32, top + 32)).getcolors()) > 1, example["text"]


@pytest.fixture(scope="module")
def page(folder):
    sync_api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, str(DEMO), "--port", str(port), "--model", "talker", "--model", "other"]
    environment = os.environ | {"PYTHONPATH": str(DEMO.parents[1]), "GRADIO_ANALYTICS_ENABLED": "False"}
    server = subprocess.Popen(command, cwd=folder, env=environment, stdout=-3, stderr=-3)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(180):
            assert server.poll() is None, "the page did not start"
            try:
                urllib.request.urlopen(address, timeout=5).close()
                break
            except OSError:
                time.sleep(0.5)
        with sync_api.sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            context = browser.new_context(viewport={"width": 390, "height": 844}, locale="zh-CN")
            context.set_default_timeout(60_000)
            page = context.new_page()
            page.goto(address)
            yield page
            browser.close()
    finally:
        server.terminate()
        server.wait(30)


@pytest.mark.parametrize("size", [(1280, 800), (390, 844)])
def test_in_a_browser_an_empty_chat_invites_and_nothing_is_cut(page, size):
    page.set_viewport_size({"width": size[0], "height": size[1]})
    page.locator("#chat").get_by_text("看图问答").wait_for()
    assert page.locator("#chat .example").count() == 4
    for part in (*page.locator("#chat .example").all(), page.locator("#chat h3"), page.locator("#options")):
        box = part.bounding_box()
        assert 0 <= box["y"] < box["y"] + box["height"] <= size[1]
    assert not page.evaluate("document.documentElement.scrollHeight > innerHeight")
    assert not page.evaluate("(log => log.scrollHeight > log.clientHeight)(document.querySelector('#chat [role=log]'))")


def test_in_a_browser_the_size_of_a_telephone(page, folder):
    box = page.locator("#box textarea")
    box.wait_for()
    assert box.get_attribute("placeholder") == "请提问；可添加图片或视频"  # the browser's language
    assert not page.evaluate("document.documentElement.scrollWidth > innerWidth")

    page.set_input_files("#box input[type=file]", str(folder / "red.png"))
    page.locator("#box img").wait_for()
    page.get_by_text("采样设置").click()
    page.get_by_label("number input for 回答的最大长度（token 数）").fill("2000")
    box.fill("这是什么？")
    box.press("Enter")
    page.locator("#chat .message img").wait_for()
    page.locator("#box button.stop-button").click()
    page.wait_for_function("document.querySelector('#status').innerText.includes('token')")
    count = int(re.fullmatch(r"(\d+) 个 token · 每秒 \d+ 个", page.locator("#status").inner_text()).group(1))
    assert 0 < count < 2000
    assert "这是什么？" in page.locator("#chat").inner_text()
    assert page.locator("#chat .message-buttons button:visible").count() == 0  # nothing under a short answer
    page.get_by_text("新对话").click()
    page.wait_for_function("!document.querySelector('#chat').innerText.includes('这是什么')")


def test_in_a_browser_examples_videos_and_another_model(page, folder):
    box, chat = page.locator("#box textarea"), page.locator("#chat")

    def ask(question):
        box.fill(question)
        box.press("Enter")
        page.locator("#box button.stop-button").click()
        page.wait_for_function("document.querySelector('#status').innerText.includes('token')")

    page.locator("#chat .example").nth(1).click()  # is asked at once
    page.locator("#box button.stop-button").click()
    page.wait_for_function("document.querySelector('#status').innerText.includes('token')")
    assert "左上的图形是什么颜色？" in chat.inner_text()
    assert chat.locator("img").count() == 1

    page.locator("#model input").click()
    page.get_by_role("option", name="other").click()
    page.locator("#chat").get_by_text("看图问答").wait_for()  # another model begins anew

    av = pytest.importorskip("av")
    with av.open(str(folder / "clip.mp4"), "w") as file:
        stream = file.add_stream("mpeg4", rate=2)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for colour in ("red", "red", "blue", "blue"):
            file.mux(stream.encode(av.VideoFrame.from_image(make_image(colour, (64, 64)))))
        file.mux(stream.encode())
    page.set_input_files("#box input[type=file]", str(folder / "clip.mp4"))
    page.locator("#box .thumbnail-item").wait_for()
    ask("W" * 100)
    assert chat.locator("video").count() == 1
    assert "W" * 100 in chat.inner_text()
    assert not page.evaluate("document.documentElement.scrollWidth > innerWidth")  # long words are broken
