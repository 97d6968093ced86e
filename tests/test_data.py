"""From files to token ids: formats, repairs, what is dropped and what is refused, labels, truncation, caching."""

import io
import json
import os
import subprocess
import sys
import tracemalloc
import zipfile
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import IMAGE_SIZE, PATCH_SIZE, make_image, make_image_processor, make_processor, make_tokenizer
from datasets import Dataset, Features, IterableDataset, Value
from datasets import Image as ImageFeature
from PIL import Image, ImageFile

from minimind_v_hf import MiniMindVProcessor
from minimind_v_hf.data import (
    SYSTEM_PROMPTS,
    DataReport,
    MiniMindVCollator,
    load_conversations,
    read_conversations,
    tokenize_conversations,
)
from minimind_v_hf.data.images import read_image
from minimind_v_hf.data.rows import RowError, parse_row


IMAGE_TOKENS = (IMAGE_SIZE // PATCH_SIZE) ** 2
COLOURS = {"red": (255, 0, 0), "blue": (0, 0, 255), "lime": (0, 255, 0)}


def chat(question: str, answer: str = "red", **row) -> dict:
    return {"conversations": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **row}


# The three samples of the format's description, the third with three placeholders and two images
SAMPLES = [
    chat("提供给定图像的简要描述。\n<image>", "橄榄油是自由使用的健康成分。", image="red.png"),
    chat("闹钟的位置对睡眠质量有什么影响？<image>", "把数字闹钟放在床头柜...", image="blue.png"),
    chat("context: Source Image: <image> Target Image: <image> What is the instruction?<image>", image="red.png, blue.png"),
]
ROWS = [
    {
        "conversations": [
            {"role": "user", "content": "<image>\nWhat colour is the circle?"},
            {"role": "assistant", "content": "red"},
            {"role": "user", "content": "图中有几个图形？"},
            {"role": "assistant", "content": "一"},
        ],
        "image": "red.png",
    },
    chat("<image><image> What?", "a dog", image="red.png, blue.png"),
    chat("Hi", "lazy"),
]


def encoded(colour: str, size: tuple[int, int] = (20, 20)) -> bytes:
    file = io.BytesIO()
    make_image(colour, size).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def images(tmp_path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for colour in COLOURS:
        (folder / f"{colour}.png").write_bytes(encoded(colour))
    return folder


@pytest.fixture
def write(tmp_path):
    def write_rows(rows: list, name: str = "data.jsonl") -> Path:
        path = tmp_path / name
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        return path

    return write_rows


def contents(dataset, row: int = 0) -> list[str]:
    return [message["content"] for message in dataset[row]["conversations"]]


def colours(sources) -> list[str]:
    names = {colour: name for name, colour in COLOURS.items()}
    return [names[read_image(source).getpixel((0, 0))] for source in sources]


# ── Formats ──


def test_all_formats_say_the_same(write, images, tmp_path):
    texts = [[message["content"] for message in row["conversations"]] for row in ROWS]
    names = [["red.png"], ["red.png", "blue.png"], []]
    messages = [
        {"messages": [{"role": m["role"], "content": m["content"]} for m in row["conversations"]], "images": list_}
        for row, list_ in zip(ROWS, names, strict=True)
    ]
    as_lists = json.loads(json.dumps(messages))
    for row in as_lists:
        for message in row["messages"]:
            pieces = message["content"].split("<image>")
            parts = [{"type": "text", "text": pieces[0]}]
            for piece in pieces[1:]:
                parts += [{"type": "image"}, {"type": "text", "text": piece}]
            message["content"] = parts
    inline = json.loads(json.dumps(as_lists))
    for row in inline:
        left = iter(row.pop("images"))
        for part in (part for message in row["messages"] for part in message["content"] if part["type"] == "image"):
            part["image"] = next(left)
    files = [[encoded(Path(name).stem) for name in list_] for list_ in names]
    bytes_file, single_file = tmp_path / "lists.parquet", tmp_path / "single.parquet"
    as_json = [json.dumps(row["conversations"]) for row in ROWS]
    black = encoded("black", (8, 8))
    pq.write_table(pa.table({"conversations": as_json, "image_bytes": [p or [black] for p in files]}), bytes_file)
    pq.write_table(pa.table({"conversations": as_json[::2], "image_bytes": [files[0][0], black]}), single_file)

    for rows, name in ((ROWS, "a.jsonl"), (messages, "b.jsonl"), (as_lists, "c.jsonl"), (inline, "d.jsonl")):
        dataset = load_conversations(write(rows, name), images)
        assert [contents(dataset, i) for i in range(3)] == texts, name
        assert dataset["images"][:] == [[str(images / image) for image in list_] for list_ in names], name
    report = DataReport()
    dataset = load_conversations(bytes_file, report=report)
    assert [contents(dataset, i) for i in range(3)] == texts
    assert dataset["images"][:] == files
    assert report.repaired == {"text-only rows with a black image of 8x8: it was left out": 1}
    dataset = load_conversations(single_file)
    assert [contents(dataset, i) for i in range(2)] == texts[::2]
    assert dataset["images"][:] == [files[0], []]


def test_a_placeholder_in_the_text_of_a_list_is_text(write, images, processor):
    content = [{"type": "text", "text": "What does <image> mean?"}, {"type": "image"}]
    row = {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "Hi"}], "images": ["red.png"]}
    dataset = tokenize_conversations(load_conversations(write([row]), images, strict=True), processor)
    assert dataset[0]["input_ids"].count(processor.image_token_id) == IMAGE_TOKENS
    assert "What does <image> mean?" in processor.decode(dataset[0]["input_ids"])


@pytest.mark.parametrize("streaming", [False, True])
def test_data_set_in_the_layout_of_the_hub(tmp_path, streaming):
    rows = [
        {"messages": [{"role": m["role"], "content": m["content"]} for m in row["conversations"]], "images": files}
        for row, files in zip(ROWS, [["red"], ["red", "blue"], []], strict=True)
    ]
    for row in rows:
        row["images"] = [make_image(colour) for colour in row["images"]]
    features = Features(
        {"messages": [{"role": Value("string"), "content": Value("string")}], "images": [ImageFeature()]},
    )
    (tmp_path / "hub" / "data").mkdir(parents=True)
    Dataset.from_list(rows, features=features).to_parquet(tmp_path / "hub" / "data" / "train-00000-of-00001.parquet")
    dataset = list(load_conversations(tmp_path / "hub", streaming=streaming))
    assert [colours(row["images"]) for row in dataset] == [["red"], ["red", "blue"], []]
    assert [row["conversations"][0]["content"] for row in dataset] == [row["conversations"][0]["content"] for row in ROWS]


@pytest.mark.parametrize("folder", ["", "inner/"])
def test_zip_archives(write, images, tmp_path, folder):
    archive = tmp_path / "images.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in images.iterdir():
            file.write(path, folder + path.name)
    data_file = write([*ROWS, chat("<image>", image="missing.png")])
    report = DataReport()
    dataset = load_conversations(data_file, archive, max_dropped=0.5, report=report)
    assert [colours(row["images"]) for row in dataset] == [["red"], ["red", "blue"], []]
    assert report.dropped == {"missing image": 1}
    with pytest.raises(ValueError, match=r"'\.\./a\.png' leads out"):
        load_conversations(write([chat("<image>", image="../a.png")]), archive)


def test_several_files_and_patterns(write, images, tmp_path):
    for index, row in enumerate(ROWS):
        write([row], f"part-{index}.jsonl")
    expected = [contents([row]) for row in ROWS]
    for files in (str(tmp_path / "part-*.jsonl"), [tmp_path / f"part-{i}.jsonl" for i in range(3)]):
        dataset = load_conversations(files, images)
        assert [contents(dataset, i) for i in range(3)] == expected


def test_streaming_gives_the_same_rows_and_splits_between_processes(write, images, processor):
    from datasets.distributed import split_dataset_by_node

    files = [write(ROWS, "a.jsonl"), write([*SAMPLES, chat("<image>", image="missing.png")], "b.jsonl")]
    expected = list(tokenize_conversations(load_conversations(files, images, max_dropped=0.5), processor))
    streamed = tokenize_conversations(load_conversations(files, images, streaming=True), processor)
    assert isinstance(streamed, IterableDataset)
    assert list(streamed) == expected
    for nodes in (2, 3):
        parts = [list(split_dataset_by_node(streamed, rank, nodes)) for rank in range(nodes)]
        assert sorted((row for part in parts for row in part), key=str) == sorted(expected, key=str)


def test_a_stream_decodes_each_image_once_and_drops_the_damaged(write, images, processor, monkeypatch):
    (images / "cut.png").write_bytes((images / "red.png").read_bytes()[:-40])
    decoded, load = [], ImageFile.ImageFile.load

    def count(image):
        decoded.extend([image] if image.tile else [])  # afterwards there is nothing left to decode
        return load(image)

    monkeypatch.setattr(ImageFile.ImageFile, "load", count)
    files = write([*ROWS, chat("<image>", image="cut.png")])
    rows = list(tokenize_conversations(load_conversations(files, images, streaming=True), processor))
    assert not decoded
    batch = MiniMindVCollator(processor, max_dropped=0.01)(rows)
    assert len(decoded) == 4  # red; red and blue; the damaged one
    assert [len(batch[name]) for name in ("input_ids", "pixel_values")] == [3, 3]
    for strict in (rows, rows[-1:]):
        with pytest.raises(ValueError, match=r"cut\.png.*truncated"):
            MiniMindVCollator(processor)(strict)
    packed = [{"samples": rows[2:]}, {"samples": rows[3:]}, {"samples": rows[:2]}]
    assert MiniMindVCollator(processor, max_dropped=0.01)(packed)["input_ids"].shape[0] == 2
    with pytest.raises(ValueError, match="Of no row of a batch"):
        MiniMindVCollator(processor, max_dropped=0.01)(rows[-1:])
    with pytest.raises(ValueError, match="1 of 1,000 rows have missing or corrupt images"):
        MiniMindVCollator(processor, max_dropped=0.0)(rows)


# ── Repairs, drops, refusals ──


def test_the_described_samples_as_they_stand(write, images, processor):
    report = DataReport()
    dataset = load_conversations(write(SAMPLES), images, max_dropped=0.34, report=report)
    assert contents(dataset, 2)[0] == "context: Source Image: <image> Target Image: <image> What is the instruction?"
    assert [colours(row["images"]) for row in dataset] == [["red"], ["blue"], ["red", "blue"]]
    assert (report.rows, report.kept, report.images) == (3, 3, 4)
    assert report.repaired == {"<image> without an image: the last ones were removed": 1}
    assert "repaired         1  <image> without an image" in str(report)
    tokens = tokenize_conversations(dataset, processor)
    assert [row["input_ids"].count(processor.image_token_id) // IMAGE_TOKENS for row in tokens] == [1, 1, 2]
    with pytest.raises(ValueError, match=r"data.jsonl, line 3: 3 <image> placeholders, but 2 images"):
        load_conversations(write(SAMPLES), images, strict=True)


def test_images_without_placeholders_go_to_the_front(write, images):
    question = [{"role": "system", "content": "Look"}, *chat("a <image> b")["conversations"]]
    rows = [{"conversations": question, "image": "red.png, blue.png,lime.png"}]
    report = DataReport()
    dataset = load_conversations(write(rows), images, report=report)
    assert contents(dataset) == ["Look", "<image><image>\na <image> b", "red"]
    assert colours(dataset[0]["images"]) == ["blue", "lime", "red"]  # red keeps its place in the sentence
    assert report.repaired == {"images without <image>: put at the front": 1}
    with pytest.raises(ValueError, match="line 1: 1 <image> placeholders, but 3 images"):
        load_conversations(write(rows), images, strict=True)


def test_rows_with_missing_or_corrupt_images_are_dropped_and_counted(write, images):
    whole = io.BytesIO()
    Image.fromarray(np.random.randint(0, 256, (64, 64, 3), dtype=np.uint8)).save(whole, "JPEG")
    (images / "cut.jpg").write_bytes(whole.getvalue()[:-300])
    (images / "text.jpg").write_text("no image")
    bad = [chat("<image>", image=name) for name in ("cut.jpg", "text.jpg", "nowhere.jpg")]
    rows = [*[chat(f"<image>{i}", image="red.png") for i in range(97)], *bad]
    report = DataReport()
    dataset = load_conversations(write(rows), images, max_dropped=0.03, report=report)
    assert len(dataset) == 97
    assert [contents(dataset, i)[0] for i in range(97)] == [f"<image>{i}" for i in range(97)]
    assert (report.rows, report.kept, report.images) == (100, 97, 97)
    assert report.dropped == {"corrupt image": 2, "missing image": 1}
    assert "line 100: " in report.examples[2]
    for options in ({"max_dropped": 0.02}, {}):
        with pytest.raises(ValueError, match=r"(?s)3 of 100 rows have missing or corrupt images.*line 98: .*cut\.jpg"):
            load_conversations(write(rows), images, **options)
    with pytest.raises(ValueError, match=r"line 98: .*cut\.jpg'"):
        load_conversations(write(rows), images, max_dropped=0.5, strict=True)


@pytest.mark.parametrize("name", ["a\0b.png", "\ud800.png"])
def test_a_name_that_no_file_can_have_is_refused(write, images, name):
    with pytest.raises(ValueError, match=r"line 1: the image '.*\.png' cannot be the name of a file"):
        load_conversations(write([chat("<image>", image=name)]), images)


def test_nothing_left_is_an_error(write, images, processor):
    nothing = load_conversations(write([chat("<image>", image="nowhere.png")]), images, max_dropped=1)
    with pytest.raises(ValueError, match="nothing to learn from: no rows are left"):
        tokenize_conversations(nothing, processor)


def test_videos_are_refused(write, images):
    inline = [{"role": "user", "content": [{"type": "video", "video": "a.mp4"}, {"type": "text", "text": "What?"}]}]
    for row, message in (
        (chat("What?", videos=["a.mp4"]), "line 1: the row has video, and training takes images alone"),
        ({"messages": inline}, "line 1: expected content of type 'text' or 'image', got {'type': 'video'"),
    ):
        with pytest.raises(ValueError, match=message):
            load_conversations(write([row]), images)


@pytest.mark.parametrize("streaming", [False, True])
def test_placeholders_taken_away_count_towards_max_dropped(write, images, streaming):
    rows = [chat(f"<image>{number}", image="red.png") for number in range(1100)] + [chat("<image>")] * 12
    with pytest.raises(
        ValueError, match=r"(?s)12 of 1,112 rows have missing or corrupt images, or <image> without one.*line 11(01|12): "
    ):
        list(load_conversations(write(rows), images, streaming=streaming))
    assert len(list(load_conversations(write(rows), images, max_dropped=0.02, streaming=streaming))) == 1112


def test_a_stream_stops_when_too_many_images_are_bad(write, images):
    rows = [chat("<image>", image="nowhere.png") for _ in range(30)]
    with pytest.raises(ValueError, match="11 of 1,000 rows have missing or corrupt images"):
        list(load_conversations(write(rows), images, streaming=True))


def test_a_mended_image_is_checked_again(write, images):
    data_file = write([chat("<image>", image="red.png"), chat("<image>", image="late.png")])
    assert len(load_conversations(data_file, images, max_dropped=0.5)) == 1
    (images / "late.png").write_bytes(encoded("blue"))
    assert len(load_conversations(data_file, images)) == 2
    (images / "red.png").write_bytes(b"broken")
    assert len(load_conversations(data_file, images, max_dropped=0.5)) == 1
    data_file = write([chat("Hi")])
    assert contents(load_conversations(data_file, images)) == ["Hi", "red"]


@pytest.mark.parametrize("name", ["../secret.png", "a/../../secret.png", "{root}/secret.png", "link.png", "folder/secret.png"])
@pytest.mark.parametrize("streaming", [False, True])
def test_paths_out_of_the_image_folder_are_refused(write, images, tmp_path, name, streaming):
    (tmp_path / "secret.png").write_bytes(encoded("red"))
    (images / "link.png").symlink_to(tmp_path / "secret.png")
    (images / "folder").symlink_to(tmp_path)
    data_file = write([chat("<image>", image="red.png"), chat("<image>", image=name.format(root=tmp_path))])
    with pytest.raises(ValueError, match=r"line 2: .*leads? out of"):
        list(load_conversations(data_file, images, max_dropped=1, streaming=streaming))


def test_links_inside_the_folder_are_fine(write, images, tmp_path):
    (images / "link.png").symlink_to(images / "red.png")
    (tmp_path / "other name").symlink_to(images)
    dataset = load_conversations(write([chat("<image>", image="link.png")]), tmp_path / "other name")
    assert colours(dataset[0]["images"]) == ["red"]


@pytest.mark.parametrize(
    ("row", "error"),
    [
        ("{'conversations': []}", "not valid JSON .*Expecting property name"),
        ('{"conversations": [', "not valid JSON"),
        ("1" * 5000, "not valid JSON"),
        ("{", "a row must be one object on one line"),
        ("[1]", "expected an object with the key 'conversations', got list"),
        ({"text": "Hi"}, "expected the key 'conversations' or 'messages', got the keys 'text'"),
        ({"conversations": []}, "expected a list of messages, and at least one"),
        ({"conversations": [{"from": "human", "value": "Hi"}]}, "expected messages with 'role' and 'content', got .*human"),
        ({"conversations": [{"role": "robot", "content": "Hi"}]}, "unknown role 'robot': expected system, user, assistant"),
        ({"conversations": [{"role": "user", "content": 5}]}, "expected a string or a list as content, got int"),
        ({"conversations": [{"role": "user", "content": [{"type": "video"}]}]}, "type 'text' or 'image', got .*video"),
        ({"conversations": None}, "expected a list of messages as 'conversations', got null"),
        ({"conversations": "[" * 100_000}, "'conversations' is a string, but not of JSON: it is nested too deeply"),
        ("[" * 100_000, "the line is not valid JSON .it is nested too deeply"),
        ({"conversations": [{"role": "user", "content": "a"}], "messages": []}, "both 'conversations' and 'messages'"),
        ({"conversations": [{"role": "user", "content": None}]}, "expected a string or a list as content, got null"),
        (
            {"conversations": [{"role": "user", "content": [{"type": "text", "text": None}]}]},
            "expected a string as text, got null",
        ),
        ({"conversations": [{"role": "user", "content": [{"type": "text"}]}]}, "expected a string as text, got null"),
        ({"conversations": [{"role": "assistant", "content": "a", "tool_calls": [{}]}]}, "tool calls"),
        ({"conversations": [{"role": "assistant", "content": "a", "reasoning_content": ["b"]}]}, "reasoning_content, got list"),
        (chat("<image>", image=5), "expected images as file names or bytes, got int"),
        (chat("<image>", image="."), "the image '.' names no file"),
        (chat("<image><image>", image="red.png", images=["blue.png"]), "images in several columns: 'image', 'images'"),
        (chat("<image>", images=["https://a.example/red.png"]), "is a URL, and training reads files"),
        (chat("<image>", images=[{"path": "red.png", "url": "blue.png"}]), "an image with several sources: path, url"),
        (chat([{"type": "image", "url": "https://a.example/red.png"}]), "is a URL, and training reads files"),
        (chat([{"type": "image", "base64": "iVBORw0KGgo="}]), "base64"),
        (chat([{"type": "image", "image": "red.png", "path": "blue.png"}]), "an image with several sources: image, path"),
        (chat([{"type": "image", "file": "red.png"}]), "an image without a source .* got 'file'"),
        (chat([{"type": "image", "url": "red.png"}, {"type": "image"}]), "1 of 2 image items have no source"),
        (chat([{"type": "image_url", "image_url": {"url": "red.png"}}]), "type 'text' or 'image', got .*image_url"),
        (chat("a \ud800 b"), "surrogate"),
        ('{"conversations": [{"role": "user", "content": "a \\ud800 b"}]}', "surrogate"),
    ],
)
def test_rows_of_another_form_are_named(write, images, row, error):
    if "surrogate" in error and not isinstance(row, str):
        row = json.dumps(row)
    data_file = write([ROWS[0], "", row])
    for streaming in (False, True):
        with pytest.raises(ValueError, match=rf"data\.jsonl, line 3: .*{error}"):
            list(load_conversations(data_file, images, streaming=streaming))


def test_bad_bytes_are_named(write, images):
    data_file = write(ROWS)
    data_file.write_bytes(data_file.read_bytes() + b'{"conversations": "\xff"}\n')
    with pytest.raises(ValueError, match=r"line 4: the line is not valid JSON \('utf-8' codec"):
        load_conversations(data_file, images)


def test_bad_files_are_named(write, images, tmp_path):
    data_file = write(ROWS)
    for missing in (tmp_path / "nowhere.jsonl", str(tmp_path / "*.csv")):
        with pytest.raises(FileNotFoundError, match=r"There is no data file '"):
            load_conversations(missing, images)
    with pytest.raises(FileNotFoundError, match="There is no image folder or zip archive"):
        load_conversations(data_file, tmp_path / "no folder")
    with pytest.raises(ValueError, match="expected a folder of images or a zip archive"):
        load_conversations(data_file, data_file)
    with pytest.raises(ValueError, match=r"line 1: .*'red\.png', but no image folder was given"):
        load_conversations(data_file)
    with pytest.raises(ValueError, match="There are no rows"):
        load_conversations(write(["", ""]), images)
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 is not enough")
    with pytest.raises(ValueError, match=r"bad\.parquet: the Parquet file is damaged"):
        load_conversations(tmp_path / "bad.parquet")


def test_image_items_name_files_by_any_of_their_keys(write, images):
    for key in ("image", "path", "url"):
        dataset = load_conversations(write([chat([{"type": "image", key: "red.png"}, {"type": "text", "text": "Hi"}])]), images)
        assert contents(dataset) == ["<image>Hi", "red"]
        assert colours(dataset[0]["images"]) == ["red"]


def test_only_regular_files_of_bounded_size_are_read(write, images, monkeypatch):
    os.mkfifo(images / "pipe.png")
    (images / "folder.png").mkdir()
    with open(images / "sparse.png", "wb") as file:
        file.truncate(10**10)
    for name, reason in (
        ("pipe.png", "it is no regular file"),
        ("folder.png", "it is a folder"),
        ("sparse.png", "more than 256 MiB"),
    ):
        with pytest.raises(ValueError, match=f"line 1: .*{name}': .*{reason}"):
            load_conversations(write([chat("<image>", image=name)]), images)
        with pytest.raises(ValueError, match="Cannot read the image"):
            read_image(str(images / name))
    os.mkfifo(images.parent / "pipe.zip")
    with pytest.raises(ValueError, match="expected a folder of images or a zip archive"):
        load_conversations(write([chat("<image>", image="red.png")]), images.parent / "pipe.zip")


def test_members_of_archives_are_of_bounded_size(write, tmp_path):
    """As declared, and as they come out where the archive says less."""
    archive = tmp_path / "images.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file, file.open("a.png", "w") as member:
        for _ in range(257):
            member.write(bytes(2**20))
    data_file = write([chat("<image>", image="a.png")])
    with pytest.raises(ValueError, match="more than 256 MiB"):
        load_conversations(data_file, archive)
    size = (257 * 2**20).to_bytes(4, "little")
    archive.write_bytes(archive.read_bytes().replace(size, (100).to_bytes(4, "little")))
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"line 1: .*zip://a\.png.*Bad CRC"):
        load_conversations(data_file, archive)
    assert tracemalloc.get_traced_memory()[1] < 2**26
    tracemalloc.stop()


def test_damaged_archives_are_named(write, images, tmp_path):
    archive = tmp_path / "images.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.write(images / "red.png", "red.png")
    whole = archive.read_bytes()
    place = whole.index(b"PK\x01\x02")
    archive.write_bytes(whole[:place] + b"XXXX" + whole[place + 4 :])
    with pytest.raises(ValueError, match=r"images\.zip: the zip archive is damaged"):
        load_conversations(write([chat("<image>", image="red.png")]), archive)


@pytest.mark.parametrize("damage", ["footer", "pages", "text", "date"])
def test_damaged_parquet_is_named(tmp_path, damage):
    file = tmp_path / "bad.parquet"
    conversations = [json.dumps(row["conversations"]) for row in ROWS] * 100
    if damage == "date":
        pq.write_table(pa.table({"conversations": conversations[:1], "day": pa.array([2**31 - 1], pa.date32())}), file)
    elif damage == "text":
        pq.write_table(pa.table({"conversations": pa.array([b"\xff\xfe"]).cast(pa.binary()).view(pa.string())}), file)
    else:
        pq.write_table(pa.table({"conversations": conversations}), file, compression="none", use_dictionary=False)
        whole = bytearray(file.read_bytes())
        start = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little") if damage == "footer" else 4
        whole[start : start + 40] = b"\xff" * 40
        file.write_bytes(whole)
    for options in ({}, {"streaming": True}):
        with pytest.raises(ValueError, match=r"bad\.parquet: the Parquet file is damaged"):
            list(load_conversations(file, **options))


def test_a_file_holds_images_or_names_them(tmp_path, images):
    inline = json.dumps(chat([{"type": "image", "image": "red.png"}])["conversations"])
    file = tmp_path / "mixed.parquet"
    pq.write_table(pa.table({"conversations": [inline], "image_bytes": pa.array([None], pa.binary())}), file)
    with pytest.raises(ValueError, match="row 1: the row names an image, but the file holds images"):
        load_conversations(file, images)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"num_proc": 0}, "num_proc=0"),
        ({"num_proc": -2}, "num_proc=-2"),
        ({"num_proc": 1.5}, "num_proc=1.5"),
        ({"max_dropped": 1.5}, "max_dropped=1.5: expected a share from 0 to 1"),
        ({"max_dropped": float("nan")}, "max_dropped=nan"),
    ],
)
def test_options_out_of_range(write, images, options, error):
    with pytest.raises(ValueError, match=error):
        load_conversations(write(ROWS), images, **options)


@pytest.mark.parametrize("files", [[], None, 3])
def test_no_files(images, files):
    with pytest.raises(ValueError, match=r"data_files=.*: expected the names of files, and at least one"):
        load_conversations(files, images)


def test_a_damaged_folder_of_the_hub_is_named(tmp_path):
    folder = tmp_path / "hub"
    folder.mkdir()
    for name, content in (("a.parquet", b"PAR1 is not enough"), ("a.jsonl", b"{no JSON")):
        (folder / name).write_bytes(content)
        with pytest.raises(ValueError, match=r"Cannot read the data set '.*hub': "):
            load_conversations(folder)
        (folder / name).unlink()


def test_one_report_of_two_data_sets(write, images, processor):
    report = DataReport()
    for name, rows in (("a.jsonl", ROWS), ("b.jsonl", [*ROWS, {"conversations": [{"role": "user", "content": "Hi"}]}])):
        loaded = load_conversations(write(rows, name), images, report=report)
        tokenize_conversations(loaded, processor, report=report)
    assert (report.rows, report.kept, report.images) == (7, 6, 6)
    assert report.dropped == {"the assistant says nothing": 1}


def test_rows_are_read_for_other_uses_as_strictly_as_for_training(write, images):
    rows = [{**row, "kind": "colour"} for row in ROWS]
    found = list(read_conversations(write(rows), images))
    assert [raw for _, raw, _ in found] == rows
    assert found[1][0].endswith("data.jsonl, line 2")
    assert [row.images for _, _, row in found] == [
        [str(images / name) for name in names] for names in (["red.png"], ["red.png", "blue.png"], [])
    ]
    (images / "bad.png").write_text("no image")
    (images / "link.png").symlink_to(write(ROWS, "secret.png"))
    for row, error in (
        (chat("<image>", image="bad.png"), r"line 4: .*bad\.png"),
        (chat("<image>", image="link.png"), r"line 4: .*leads out"),
        (chat("<image>", image="../secret.png"), r"line 4: .*leads out"),
        (chat("<image>"), r"line 4: 1 <image> placeholders, but 0 images"),
        ({"conversations": [{"role": "tool", "content": "a"}]}, "line 4: unknown role 'tool'"),
    ):
        with pytest.raises(ValueError, match=error):
            list(read_conversations(write([*rows, row]), images))
    with pytest.raises(ValueError, match=r"There are no rows in .*data\.jsonl"):
        list(read_conversations(write([""]), images))


# ── Tokens ──


def test_tokens_are_the_processors_and_labels_are_what_the_assistant_says(write, images, processor):
    dataset = tokenize_conversations(load_conversations(write(ROWS), images), processor)
    assert dataset.column_names == ["input_ids", "labels", "images", "length"]
    learned_texts = []
    for row, sample in zip(ROWS, dataset, strict=True):
        prompt = processor.apply_chat_template(row["conversations"])
        outputs = processor(text=prompt, images=sample["images"] or None)
        assert sample["input_ids"] == list(outputs["input_ids"][0])
        assert sample["length"] == len(sample["labels"]) == len(sample["input_ids"])
        learned = [(token, label) for token, label in zip(sample["input_ids"], sample["labels"], strict=True) if label != -100]
        assert all(token == label for token, label in learned)
        learned_texts.append(processor.decode([label for _, label in learned]))
    assert learned_texts == ["red<|im_end|>\n一<|im_end|>\n", "a dog<|im_end|>\n", "lazy<|im_end|>\n"]


def test_image_tokens_are_never_labels(write, images, processor):
    dataset = tokenize_conversations(load_conversations(write([chat("Draw", "<image>!", image="red.png")]), images), processor)
    assert dataset[0]["input_ids"].count(processor.image_token_id) == IMAGE_TOKENS
    assert processor.image_token_id not in dataset[0]["labels"]


def test_an_image_of_one_token(write, images):
    processor = make_processor(image_seq_length=1)
    dataset = tokenize_conversations(load_conversations(write(ROWS), images), processor)
    assert [row["input_ids"].count(processor.image_token_id) for row in dataset] == [len(row["images"]) for row in dataset]


def test_truncation_never_cuts_inside_an_image(write, images, processor):
    turns = chat("<image>Hi", "red", image="red.png, blue.png, lime.png")
    turns["conversations"] += chat("<image> and <image>", "blue")["conversations"]
    loaded = load_conversations(write([turns]), images)
    whole = tokenize_conversations(loaded, processor)[0]
    first_answer = next(i for i, label in enumerate(whole["labels"]) if label != -100)
    seen = set()
    for max_length in range(first_answer + 1, whole["length"] + 1):
        cut = tokenize_conversations(loaded, processor, max_length)[0]
        assert cut["length"] <= max_length
        assert cut["input_ids"] == whole["input_ids"][: cut["length"]]
        assert cut["labels"] == whole["labels"][: cut["length"]]
        image_tokens = cut["input_ids"].count(processor.image_token_id)
        assert image_tokens == len(cut["images"]) * IMAGE_TOKENS
        assert cut["images"] == whole["images"][: len(cut["images"])]
        # As long as possible: the next token would be too much, or is an image that does not fit
        assert cut["length"] == max_length or whole["input_ids"][cut["length"]] == processor.image_token_id
        seen.add(len(cut["images"]))
    assert seen == {1, 2, 3}


def test_samples_that_do_not_fit_are_dropped_and_counted(write, images, processor):
    rows = [
        chat("Hi"),
        chat("Hi " * 100),
        chat("Hi", "lazy dog " * 100),
        {"conversations": [{"role": "user", "content": "Hi"}]},
    ]
    report = DataReport()
    dataset = tokenize_conversations(load_conversations(write(rows), images, report=report), processor, 64, report=report)
    assert len(dataset) == 2
    assert dataset["length"][:] == [len(row["input_ids"]) for row in dataset]
    assert dataset["length"][1] == 64
    assert (report.rows, report.kept) == (4, 2)
    assert report.dropped == {"the prompt alone exceeds max_length": 1, "the assistant says nothing": 1}
    assert report.repaired == {"cut at max_length": 1}
    with pytest.raises(ValueError, match=r"nothing to learn from \(the prompt alone exceeds max_length: 1; max_length=20\)"):
        tokenize_conversations(load_conversations(write(rows[1:2]), images), processor, 20)
    with pytest.raises(ValueError, match="max_length=16: an image alone takes 16 tokens"):
        tokenize_conversations(load_conversations(write(rows), images), processor, 16)


def test_a_huge_row_is_cut_before_it_is_tokenised(write, images, monkeypatch):
    processor = make_processor()
    text = "lazy dog " * 3_000_000
    rows = [chat("Hi", text), chat(text), chat("Hi")]
    rows.append({"conversations": [{"role": "user", "content": "Hi"}] * 100_000 + chat("Hi")["conversations"]})
    loaded = load_conversations(write(rows), images)
    lengths = []
    encode = type(processor.tokenizer).apply_chat_template

    def count(self, conversations, **options):
        lengths.extend(sum(len(message["content"]) for message in messages) for messages in conversations)
        return encode(self, conversations, **options)

    monkeypatch.setattr(type(processor.tokenizer), "apply_chat_template", count)
    report = DataReport()
    dataset = tokenize_conversations(loaded, processor, 64, report=report)
    assert max(lengths) < 2000
    assert dataset["length"][:] == [64, len(dataset[1]["input_ids"])]
    assert report.dropped == {"the prompt alone exceeds max_length": 2}
    expected = processor(text=processor.apply_chat_template(chat("Hi", "lazy dog " * 100)["conversations"]))["input_ids"][0][
        :64
    ]
    assert dataset[0]["input_ids"] == list(expected)


def test_cutting_the_text_early_changes_no_token(write, images):
    """A template may leave text out, here all but the last of the thoughts, and a tokenizer marks."""
    processor = thinking_processor()
    rows = [chat("Hi", "\n" * 5000 + "red"), chat("Hi", "<think>" + "a" * 5000 + "</think>red"), chat("\ufdd0" * 5000 + "Hi")]
    loaded = load_conversations(write(rows), images)
    whole = tokenize_conversations(loaded, processor)
    cut = tokenize_conversations(loaded, processor, 100)
    assert [row["input_ids"] for row in cut] == [row["input_ids"][:100] for row in whole]
    assert [row["labels"] for row in cut] == [row["labels"][:100] for row in whole]


def test_work_is_done_once(write, images):
    for number in range(8):
        (images / f"{number}.png").write_bytes(encoded("red"))
    data_file = write([*ROWS, *[chat("<image>", image=f"{number}.png") for number in range(8)]])

    def files():
        processor = make_processor()  # a new one, as in a new process
        dataset = tokenize_conversations(load_conversations(data_file, images), processor, max_length=100)
        return [entry["filename"] for entry in dataset.cache_files]

    first = files()
    times = [os.stat(file).st_mtime_ns for file in first]
    assert files() == first
    # Nor again in another process, where sets have another order
    code = (
        "import sys, datasets\n"
        "from conftest import make_processor\n"
        "from minimind_v_hf.data import load_conversations, tokenize_conversations\n"
        "datasets.config.HF_DATASETS_CACHE = sys.argv[3]\n"
        "dataset = tokenize_conversations(load_conversations(*sys.argv[1:3]), make_processor(), max_length=100)\n"
        "print(*[entry['filename'] for entry in dataset.cache_files])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(data_file), str(images), str(datasets.config.HF_DATASETS_CACHE)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == first
    assert "Checking the images" not in done.stderr  # as its progress bar would say
    assert [os.stat(file).st_mtime_ns for file in first] == times


def test_several_processes_give_the_same(write, images, processor):
    data_file = write([*ROWS, *SAMPLES, chat("<image>", image="nowhere.png")])
    one, two = (
        list(
            tokenize_conversations(
                load_conversations(data_file, images, max_dropped=0.5, num_proc=num_proc), processor, num_proc=num_proc
            )
        )
        for num_proc in (1, 2)
    )
    assert len(one) == 6
    assert one == two


# ── Augmentations ──


def thinking_processor() -> MiniMindVProcessor:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<think>", "</think>"])
    return make_processor(tokenizer=tokenizer)


def test_random_system_prompts(write, images):
    processor = make_processor()
    with_system = {"conversations": [{"role": "system", "content": "Own"}, *chat("Hi")["conversations"]]}
    loaded = load_conversations(write([*[chat(f"Hi {i}") for i in range(200)], with_system]), images)

    def systems(**options):
        texts = processor.batch_decode(tokenize_conversations(loaded, processor, **options)["input_ids"][:])
        return [text.split("system\n")[1].split("<|im_end|>")[0] for text in texts]

    assert systems() == ["You are a helpful assistant"] * 200 + ["Own"]
    drawn = systems(random_system=0.2)
    assert 20 < sum(text in SYSTEM_PROMPTS for text in drawn) < 65
    assert len({text for text in drawn if text in SYSTEM_PROMPTS}) == len(SYSTEM_PROMPTS)
    assert systems(random_system=0.2) == drawn
    assert systems(random_system=0.2, seed=1) != drawn
    assert all(text in SYSTEM_PROMPTS for text in systems(random_system=1)[:-1])
    assert drawn[-1] == systems(random_system=1)[-1] == "Own"
    with pytest.raises(ValueError, match=r"random_system=2: expected a probability"):
        tokenize_conversations(loaded, processor, random_system=2)


def test_empty_thinking_blocks_can_be_left_out(write, images):
    processor = thinking_processor()
    thoughtful = chat("Hi", "<think>\nhm\n</think>\n\nred")
    reasoned = chat("Hi")
    reasoned["conversations"][1]["reasoning_content"] = "hm"
    empty = chat("Hi", "<think>\n\n</think>\n\nred")
    loaded = load_conversations(write([*[chat("Hi")] * 100, empty, thoughtful, reasoned]), images)

    def answers(**options):
        labels = tokenize_conversations(loaded, processor, **options)["labels"][:]
        return [processor.decode([label for label in row if label != -100]).removesuffix("<|im_end|>\n") for row in labels]

    block, thought = "<think>\n\n</think>\n\nred", "<think>\nhm\n</think>\n\nred"
    assert answers() == [block] * 101 + [thought] * 2
    assert answers(drop_empty_thinking=1) == ["red"] * 101 + [thought] * 2
    drawn = answers(drop_empty_thinking=0.8)
    assert 65 < drawn[:100].count("red") < 95
    assert drawn[:101].count("red") + drawn[:101].count(block) == 101
    other = MiniMindVProcessor(make_image_processor(), processor.tokenizer, chat_template="{{ messages }}")
    with pytest.raises(ValueError, match="chat template does not know this option"):
        tokenize_conversations(loaded, other, drop_empty_thinking=0.8)


@pytest.mark.parametrize(
    ("row", "error"),
    [
        ({"content": [{"type": "text", "text": "q", "image": "0.png"}]}, "a text with 'image'"),
        ({"content": [{"type": "text", "text": "q", "url": "0.png"}]}, "a text with 'url'"),
        ({"content": [{"type": "image", "image": "0.png", "text": "q"}]}, "an image with 'text'"),
        ({"content": "q", "image": "0.png"}, "a message with 'image' beside its 'content'"),
        ({"content": "q", "images": ["0.png"]}, "a message with 'images' beside its 'content'"),
        ({"content": "q", "value": "other"}, "a message with 'value' beside its 'content'"),
    ],
)
def test_no_image_or_text_of_a_message_is_lost(row, error):
    with pytest.raises(RowError, match=error):
        parse_row({"conversations": [{"role": "user", **row}, {"role": "assistant", "content": "a"}]}, None)


@pytest.mark.parametrize("column", [{"image_path": "0.png"}, {"img": "a/b.JPG"}, {"image_url": ["x.webp", "y.webp"]}])
def test_an_image_in_a_column_that_is_not_read_is_refused(column):
    row = {"conversations": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    with pytest.raises(RowError, match=rf"names an image in the column '{next(iter(column))}': expected one of image, images"):
        parse_row(row | column, None)
    assert parse_row(row | {"id": "0.png is no name\n", "image_size": [3, 4], "source": "coco"}, None).images == []
