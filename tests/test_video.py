"""Videos: which frames are taken of real files, how they reach the model, and what becomes of files that are none."""

import base64
import sys
import threading
from fractions import Fraction
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from conftest import IMAGE_SIZE, make_image, make_model, make_processor
from PIL import Image

from minimind_v_hf.chat import Conversation
from minimind_v_hf.video_reading_minimind_v import load_video, read_video, sample_uniformly


IMAGE_TOKENS = 16
GREYS = 12  # neighbouring frames differ by this much of 255, which survives compression


def grey(number: int) -> int:
    """The shade of a frame, which tells its number among the 20 next to it."""
    return GREYS * (number % 20)


def write_video(path, times, size=(64, 48), codec="mpeg4", options=None, keyframe_distance=15):
    """A video whose frames, at these times in seconds, have the greys of their numbers, with a red top left corner."""
    av = pytest.importorskip("av")
    with av.open(str(path), "w", options=options or {}) as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        stream.codec_context.gop_size, stream.bit_rate = keyframe_distance, 2_000_000
        if codec != "mpeg2video":  # which knows no other unit than its frames
            stream.codec_context.time_base = stream.time_base = Fraction(1, 1000)
        for number, time in enumerate(times):
            pixels = np.full((size[1], size[0], 3), grey(number), np.uint8)
            pixels[: size[1] // 2, : size[0] // 2] = (255, 0, 0)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = round(time * 1000), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def greys(frames):
    return [round(frame.getpixel((frame.width - 4, frame.height - 4))[0] / GREYS) for frame in frames]


def expected(numbers):
    return [number % 20 for number in numbers]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """3.5 seconds at 10 frames a second: four frames are shown, numbers 0, 10, 20 and 30."""
    return write_video(tmp_path_factory.mktemp("video") / "clip.mp4", [i / 10 for i in range(35)])


def test_uniform_sampling_is_at_the_middle_of_equal_parts():
    assert sample_uniformly(3, 64) == [0, 1, 2]
    assert sample_uniformly(64, 64) == list(range(64))
    assert sample_uniformly(10, 4) == [1, 3, 6, 8]
    for count in (65, 100, 129, 3600):
        g = count / 64
        assert sample_uniformly(count, 64) == [int(i * g + g / 2) for i in range(64)]


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi", "a.ts"])
def test_one_frame_a_second(name, tmp_path):
    frames = read_video(write_video(tmp_path / name, [i / 30 for i in range(100)]))
    assert greys(frames) == expected([0, 30, 60, 90])
    assert all(frame.size == (64, 48) and frame.mode == "RGB" for frame in frames)


@pytest.mark.parametrize(("name", "codec"), [("a.ts", "libx264"), ("a.ts", "mpeg2video"), ("a.mpg", "mpeg2video")])
@pytest.mark.parametrize("keyframe_distance", [50, 120])
def test_seeking_in_streams_without_an_index(name, codec, keyframe_distance, tmp_path):
    """FFmpeg lands behind the keyframe that it seeks in these."""
    av = pytest.importorskip("av")
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV cannot write {codec}")
    times = [i / 25 for i in range(253)]
    path = write_video(tmp_path / name, times, codec=codec, keyframe_distance=keyframe_distance)
    assert greys(read_video(path)) == expected(range(0, 253, 25))
    assert greys(read_video(path, max_frames=2)) == expected([50, 200])


def test_a_long_video_is_sampled_uniformly(tmp_path):
    path = write_video(tmp_path / "long.mp4", [i / 2 for i in range(260)])  # 130 seconds
    assert greys(read_video(path)) == expected([2 * second for second in sample_uniformly(130, 64)])
    assert greys(read_video(path, max_frames=5)) == expected([2 * second for second in (13, 39, 65, 91, 117)])


def test_times_count_where_the_rate_is_uneven(tmp_path):
    times = [0, 0.1, 0.2, 0.3, 1.5, 1.6, 1.7, 6.0, 6.9, 7.0]
    assert greys(read_video(write_video(tmp_path / "uneven.mkv", times))) == [0, 4, 7, 9]


def test_a_short_video_has_one_frame(tmp_path):
    assert greys(read_video(write_video(tmp_path / "short.mp4", [0, 0.1]))) == [0]


def test_frames_are_upright(clip, tmp_path):
    content = bytearray(clip.read_bytes())
    matrix = content.index(b"tkhd") + 44
    turned = np.array([0, 0x10000, 0, -0x10000, 0, 0, 0, 0, 0x40000000], ">i4")  # a quarter clockwise
    content[matrix : matrix + 36] = turned.tobytes()
    (tmp_path / "turned.mp4").write_bytes(content)
    frame = read_video(tmp_path / "turned.mp4")[0]
    assert frame.size == (48, 64)
    red, *others = (frame.getpixel(at) for at in ((44, 4), (4, 4), (4, 60), (44, 60)))
    assert red[0] > 200 > max(max(other) for other in others)


def test_large_frames_are_shrunk(tmp_path):
    (frame,) = read_video(write_video(tmp_path / "large.mp4", [0], size=(2048, 1600)))
    assert frame.size == (683, 534)
    assert frame.getpixel((0, 0))[0] > 200


# ── The processor ──


@pytest.mark.parametrize("key", ["path", "url", "video"])
def test_messages_with_videos_and_images(processor, clip, key):
    def conversation(shown):
        before = [{"type": "image", "image": make_image("green")}]
        after = [{"type": "text", "text": "What <video> and <image>?"}, {"type": "image", "image": make_image("blue")}]
        return [{"role": "user", "content": [*before, *shown, *after]}]

    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    actual = processor.apply_chat_template(conversation([{"type": "video", key: str(clip)}]), **options)
    frames = [{"type": "image", "image": frame} for frame in read_video(clip)]
    as_images = processor.apply_chat_template(conversation(frames), **options)
    assert actual["pixel_values"].shape == (6, 3, IMAGE_SIZE, IMAGE_SIZE)
    assert torch.equal(actual["input_ids"], as_images["input_ids"])
    assert torch.equal(actual["pixel_values"], as_images["pixel_values"])
    assert "What <video> and <image>?" in processor.decode(actual["input_ids"][0])


def test_prompts_with_videos(processor, clip):
    frames = read_video(clip)
    for videos in ([[str(clip)], [], [frames[:2], np.stack([np.asarray(frames[3])])]], [str(clip), frames[:2], frames[3:]]):
        outputs = processor(
            text=["a<video>b<image>", "c", "<video><image><video>"],
            images=[make_image("green"), make_image("blue")],
            videos=videos,
            padding=True,
            return_tensors="pt",
        )
        counts = (outputs["input_ids"] == processor.image_token_id).sum(dim=1) // IMAGE_TOKENS
        assert counts.tolist() == [5, 0, 4]
        order = [*frames, make_image("green"), *frames[:2], make_image("blue"), frames[3]]
        alone = processor(images=order, return_tensors="pt")["pixel_values"]
        assert torch.equal(outputs["pixel_values"], alone)
    few = processor(text="<video>", videos=clip, num_frames=2, return_tensors="pt")
    assert len(few["pixel_values"]) == 2
    assert len(processor(videos=[clip, frames[:1]], return_tensors="pt")["pixel_values"]) == 5
    assert len(processor(text="<video>", videos=clip.read_bytes(), return_tensors="pt")["pixel_values"]) == 4
    encoded = base64.b64encode(clip.read_bytes()).decode()
    assert len(processor(text="<video>", videos=f"data:video/mp4;base64,{encoded}", return_tensors="pt")["pixel_values"]) == 4


def test_the_model_sees_the_frames(processor, clip):
    torch.manual_seed(1)
    model, frames = make_model(), read_video(clip)
    with torch.no_grad():
        moving = model(**processor(text="<video>Hm", videos=clip, return_tensors="pt")).logits
        still = model(**processor(text="<image>" * 4 + "Hm", images=frames, return_tensors="pt")).logits
    assert torch.equal(moving, still)
    conversation = Conversation(model, processor)
    assert conversation.attach(video=str(clip)) == 4
    assert conversation.ask("What happens?", max_new_tokens=3).new_images == 4


def test_a_video_by_url(clip):
    handler = partial(SimpleHTTPRequestHandler, directory=clip.parent)
    handler.log_message = None
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        address = f"http://127.0.0.1:{server.server_port}"
        assert greys(load_video(f"{address}/{clip.name}")) == expected([0, 10, 20, 30])
        with pytest.raises(ValueError, match="404"):
            load_video(f"{address}/missing.mp4")
    finally:
        server.shutdown()


@pytest.mark.parametrize(
    ("text", "videos", "error"),
    [
        ("<video>", None, "Sample 0 .* has 1 <video> placeholders, but 0 videos were passed for it"),
        ("<video><video>", 1, "Sample 0 .* has 2 <video> placeholders, but 1 videos were passed for it"),
        (["<video>", "<video>"], 1, r"2 samples have \[1, 1\] <video> placeholders, 2 in all, but 1 videos were passed"),
    ],
)
def test_videos_and_placeholders_must_match(processor, text, videos, error):
    videos = [[make_image()]] * videos if videos else None
    with pytest.raises(ValueError, match=error):
        processor(text=text, videos=videos)


def test_a_placeholder_beside_images_alone_stays_text(processor, caplog):
    outputs = processor(text="<image>a <video>", images=make_image(), return_tensors="pt")
    assert processor.decode(outputs["input_ids"][0]).endswith("a <video>")
    assert len(outputs["pixel_values"]) == 1
    assert "no videos were passed: they stay text" in caplog.text


def test_bad_files_are_named(processor, clip, tmp_path):
    whole = write_video(tmp_path / "whole.mp4", [i / 10 for i in range(50)], options={"movflags": "faststart"}).read_bytes()
    cut = write_video(tmp_path / "whole.mkv", [i / 10 for i in range(50)]).read_bytes()
    make_image().save(tmp_path / "image.png")
    (tmp_path / "list.m3u8").write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{clip}\n#EXT-X-ENDLIST\n")
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "cut.mkv").write_bytes(cut[: len(cut) // 2])
    (tmp_path / "no index.mp4").write_bytes(clip.read_bytes()[:2000])
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "text.mp4").write_text("no video " * 1000)
    reasons = {
        "missing.mp4": "there is no such file",
        "cut.mp4": r"cut off: it should last 4.9 s, but ends after \d.\d s",
        "cut.mkv": r"cut off: it should last \d.\d s, but ends after \d.\d s",
        **dict.fromkeys(["no index.mp4", "empty.mp4", "text.mp4", "image.png", "list.m3u8"], "not a video in a known format"),
    }
    for name, reason in reasons.items():
        with pytest.raises(ValueError, match=rf"Cannot read video 1 of sample 0 \(.*{name}\): .*{reason}"):
            processor(text="<video><video>", videos=[clip, str(tmp_path / name)])
    with pytest.raises(ValueError, match="not a video in a known format"):
        load_video(bytes(2000))
    with pytest.raises(ValueError, match="expected a path, a URL or a list of frames, got int"):
        processor(text="<video>", videos=5)
    with pytest.raises(ValueError, match="num_frames"):
        processor(text="<video>", videos=clip, fps=2)


def test_without_pyav_it_says_what_to_install(monkeypatch, processor, clip):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match="pip install av"):
        processor(text="<video>", videos=str(clip))
    frames = processor(text="<video>", videos=[[make_image()] * 100], return_tensors="pt")  # these need no decoder
    assert len(frames["pixel_values"]) == 64
    assert isinstance(load_video([make_image()])[0], Image.Image)


def test_assistant_mask_behind_a_video(clip):
    processor = make_processor()
    messages = [
        {"role": "user", "content": [{"type": "video", "path": str(clip)}, {"type": "text", "text": "Which?"}]},
        {"role": "assistant", "content": "red"},
    ]
    options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    outputs = processor.apply_chat_template(messages, **options)
    learned = [token for token, mask in zip(outputs["input_ids"][0], outputs["assistant_masks"][0], strict=True) if mask]
    assert processor.tokenizer.decode(learned) == "red<|im_end|>\n"


@pytest.mark.parametrize("num_frames", [-3, 0, 1.5, "x", True])
def test_num_frames_is_a_positive_integer(processor, clip, num_frames):
    with pytest.raises(ValueError, match=r"num_frames=.*expected a positive integer"):
        processor(text="<video>", videos=str(clip), num_frames=num_frames)


def test_one_frame_is_no_video(processor):
    with pytest.raises(ValueError, match=r"frames, H, W, 3\), got \(48, 48, 3\)"):
        processor(text="<video>", videos=np.zeros((48, 48, 3), np.uint8))


@pytest.mark.parametrize("encoding", ["gbk", "latin-1"])
def test_titles_may_be_in_any_encoding(processor, clip, encoding, tmp_path):
    av = pytest.importorskip("av")
    title = {"gbk": "视频标题", "latin-1": "Größe"}[encoding].encode(encoding)
    with av.open(str(tmp_path / "marked.mkv"), "w") as output, av.open(str(clip)) as source:
        output.metadata["title"] = "@" * len(title)
        stream = output.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                output.mux(packet)
    data = (tmp_path / "marked.mkv").read_bytes()
    assert data.count(b"@" * len(title)) == 1
    (tmp_path / "titled.mkv").write_bytes(data.replace(b"@" * len(title), title))
    outputs = processor(text="<video>", videos=str(tmp_path / "titled.mkv"), return_tensors="pt")
    assert len(outputs["pixel_values"]) == len(processor(text="<video>", videos=str(clip), return_tensors="pt")["pixel_values"])
