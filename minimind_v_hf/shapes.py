"""A small bilingual image-question data set, drawn here: coloured shapes, and what a person may ask about them.

Each image has four places, which may be empty. The questions ask for colours, shapes, positions and counts, in English
and in Chinese, and every one of them needs the image. The files are in the MiniMind-V format: JSONL and JPEG.
"""

import argparse
import itertools
import json
import random
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw
from tqdm import tqdm

from .scripts import errors_in_one_line


IMAGE_SIZE = 64
PLACES = [("top left", "左上"), ("top right", "右上"), ("bottom left", "左下"), ("bottom right", "右下")]
SHAPES = [("ring", "圆环"), ("square", "正方形"), ("cross", "十字")]
COLOURS = {("red", "红色"): "#d62728", ("green", "绿色"): "#2ca02c", ("blue", "蓝色"): "#1f5fd0", ("yellow", "黄色"): "#f2c318"}
NUMBERS = [("zero", "零"), ("one", "一"), ("two", "二"), ("three", "三"), ("four", "四")]

Pair = tuple[str, str]
"""The same in English and in Chinese."""


class Thing(NamedTuple):
    """One shape in an image."""

    shape: Pair
    colour: Pair


Scene = tuple[Thing | None, ...]
"""What stands in each of the four places."""


class Question(NamedTuple):
    """A question and its answer, in both languages."""

    kind: str
    text: Pair
    answer: Pair


def all_scenes() -> list[Scene]:
    """Every way to fill the four places, but for the empty image."""
    things = [None, *itertools.starmap(Thing, itertools.product(SHAPES, COLOURS))]
    return [scene for scene in itertools.product(things, repeat=len(PLACES)) if any(scene)]


def draw(scene: Scene, rng: random.Random) -> Image.Image:
    """Draw a scene, with sizes and positions a little different every time."""
    scale = 2  # drawn larger and shrunk, for smooth edges
    tint = tuple(rng.randint(225, 255) for _ in range(3))
    image = Image.new("RGB", (IMAGE_SIZE * scale,) * 2, tint)
    canvas = ImageDraw.Draw(image)
    cell = IMAGE_SIZE * scale // 2
    for place, thing in enumerate(scene):
        if thing is None:
            continue
        radius = rng.uniform(0.34, 0.42) * cell
        x = (place % 2 + 0.5) * cell + rng.uniform(-0.06, 0.06) * cell
        y = (place // 2 + 0.5) * cell + rng.uniform(-0.06, 0.06) * cell
        box = (x - radius, y - radius, x + radius, y + radius)
        fill = COLOURS[thing.colour]
        bar = radius * 0.3
        match thing.shape[0]:
            case "ring":
                canvas.ellipse(box, outline=fill, width=round(radius * 0.4))
            case "square":
                canvas.rectangle(box, fill=fill)
            case "cross":
                canvas.rectangle((x - radius, y - bar, x + radius, y + bar), fill=fill)
                canvas.rectangle((x - bar, y - radius, x + bar, y + radius), fill=fill)
    return image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX)


def questions(scene: Scene) -> list[Question]:
    """All that can be asked about a scene with one right answer."""
    things = [thing for thing in scene if thing]
    asked = [Question("count", ("How many shapes are there?", "图中有几个图形？"), NUMBERS[len(things)])]
    for (place_en, place_zh), thing in zip(PLACES, scene, strict=True):
        if thing is None:
            continue
        colour = (f"What colour is the shape at the {place_en}?", f"{place_zh}的图形是什么颜色？")
        asked.append(Question("colour", colour, thing.colour))
        asked.append(Question("shape", (f"Which shape is at the {place_en}?", f"{place_zh}是什么图形？"), thing.shape))
        if [other.colour for other in things].count(thing.colour) == 1:
            position = (f"Where is the {thing.colour[0]} shape?", f"{thing.colour[1]}的图形在哪里？")
            asked.append(Question("position", position, (place_en, place_zh)))
    return asked


def descriptions(scene: Scene, rng: random.Random) -> list[Question]:
    """Two requests to tell all that is in an image: what stands in each place, and where each thing stands, in any order.

    A fixed order would be learned instead of the places: after "top left" would always come whatever is next.
    """
    seen = [(place, thing) for place, thing in zip(PLACES, scene, strict=True) if thing]
    rng.shuffle(seen)
    places_first = (
        ", ".join(f"{place[0]} {thing.colour[0]} {thing.shape[0]}" for place, thing in seen),
        "，".join(f"{place[1]}{thing.colour[1]}{thing.shape[1]}" for place, thing in seen),
    )
    things_first = (
        ", ".join(f"{thing.colour[0]} {thing.shape[0]} {place[0]}" for place, thing in seen),
        "，".join(f"{thing.colour[1]}{thing.shape[1]}{place[1]}" for place, thing in seen),
    )
    return [
        Question("description", ("Describe the picture.", "描述这张图片。"), places_first),
        Question("description", ("List the shapes.", "列出所有图形。"), things_first),
    ]


def ask(scene: Scene, turns: int, rng: random.Random) -> list[Question]:
    """So many different questions about a scene, or as many as there are, every kind as likely as the others."""
    possible, asked = questions(scene), list[Question]()
    while possible and len(asked) < turns:
        kind = rng.choice(sorted({question.kind for question in possible}))
        asked.append(rng.choice([question for question in possible if question.kind == kind]))
        possible.remove(asked[-1])
    return asked


def write_data_set(folder: Path, train_images: int, test_images: int, turns: int, seed: int = 0) -> None:
    """Write `train.jsonl`, `test.jsonl` and `images/` into a folder.

    No scene is in both files, so no combination of image contents and question is either. A training row is a
    conversation of several turns about one image; a test row is a single question, with its kind.

    Args:
        folder: created if need be.
        train_images: images to train on, each with one conversation.
        test_images: images to hold out, each with one question of each language.
        turns: questions in a training conversation.
        seed: of everything random.
    """
    rng = random.Random(seed)
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    # Images with one, two, three and four shapes alike, though there are far more arrangements of four
    held_out, seen = [], []
    for count in range(1, len(PLACES) + 1):
        scenes = [scene for scene in all_scenes() if sum(map(bool, scene)) == count]
        rng.shuffle(scenes)
        quota = min(len(scenes) // 6, round(test_images * count / 10))
        held_out += scenes[:quota]
        seen.append(scenes[quota:])
    rng.shuffle(held_out)
    with (
        open(folder / "train.jsonl", "w", encoding="utf-8") as train,
        open(folder / "test.jsonl", "w", encoding="utf-8") as test,
        tqdm(total=train_images + len(held_out), desc="Drawing images", unit="image") as progress,
    ):
        for number in range(train_images):
            scene, name = rng.choice(rng.choice(seen)), f"train-{number:05d}.jpg"
            draw(scene, rng).save(images / name, quality=92)
            # Direct questions teach to look things up sooner than descriptions do, so most rows ask
            asked = [rng.choice(descriptions(scene, rng))] if number % 10 == 0 else ask(scene, turns, rng)
            conversation = []
            for turn, question in enumerate(asked):
                language = rng.randrange(2)
                placeholder = "" if turn else "<image>\n"
                conversation.append({"role": "user", "content": placeholder + question.text[language]})
                conversation.append({"role": "assistant", "content": question.answer[language]})
            train.write(json.dumps({"conversations": conversation, "image": name}, ensure_ascii=False) + "\n")
            progress.update()
        for number, scene in enumerate(held_out):
            name = f"test-{number:05d}.jpg"
            draw(scene, rng).save(images / name, quality=92)
            (question,) = ask(scene, 1, rng)
            for language in range(2):
                conversation = [
                    {"role": "user", "content": "<image>\n" + question.text[language]},
                    {"role": "assistant", "content": question.answer[language]},
                ]
                row = {"conversations": conversation, "image": name, "kind": question.kind}
                test.write(json.dumps(row, ensure_ascii=False) + "\n")
            progress.update()


def write_presence_set(folder: Path, teach: int, prefer: int, test: int, seed: int = 0) -> None:
    """Write questions for a thing that may be in an image into `teach.jsonl`, `prefer.jsonl`, `test.jsonl` and `images/`.

    In `teach.jsonl` seven of ten things are there, since people ask about what they see: a model that learns from it says yes
    too often. In the others half of them are. `prefer.jsonl` has "choices", of which the right one is to be preferred, and
    `test.jsonl` has "contents". No scene is in two of the files.

    Args:
        folder: created if need be.
        teach: images with six questions each, in one conversation.
        prefer: images with six questions each, in rows of their own.
        test: held-out images with a question each.
        seed: of everything random.

    Raises:
        ValueError: there are not so many scenes.
    """
    rng, possible = random.Random(seed), all_scenes()
    if min(teach, prefer, test) < 1 or teach + prefer + test > len(possible):
        raise ValueError(f"{teach}, {prefer} and {test} images: expected 1 or more, and {len(possible)} in all at most.")
    (folder / "images").mkdir(parents=True, exist_ok=True)
    scenes = iter(rng.sample(possible, teach + prefer + test))
    names = [f"{colour[0]} {shape[0]}" for shape, colour in itertools.product(SHAPES, COLOURS)]
    for kind, count, turns, share in (("teach", teach, 6, 0.7), ("prefer", prefer, 6, 0.5), ("test", test, 1, 0.5)):
        with open(folder / f"{kind}.jsonl", "w", encoding="utf-8") as file:
            for number, scene in enumerate(itertools.islice(scenes, count)):
                image = f"{kind}-{number:05d}.jpg"
                draw(scene, rng).save(folder / "images" / image, quality=92)
                contents = sorted({f"{thing.colour[0]} {thing.shape[0]}" for thing in scene if thing})
                missing = [name for name in names if name not in contents]
                asked = [
                    (rng.choice(contents), "yes") if rng.random() < share else (rng.choice(missing), "no") for _ in range(turns)
                ]
                conversation = [
                    message
                    for name, answer in asked
                    for message in (
                        {"role": "user", "content": f"Is there a {name} in the image?"},
                        {"role": "assistant", "content": answer},
                    )
                ]
                size = len(conversation) if kind == "teach" else 2
                for start in range(0, len(conversation), size):
                    first, *others = conversation[start : start + size]
                    row = {"conversations": [{**first, "content": f"<image>\n{first['content']}"}, *others], "image": image}
                    row |= {"prefer": {"choices": ["yes", "no"]}, "test": {"contents": contents}}.get(kind, {})
                    file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    with errors_in_one_line():
        parser = argparse.ArgumentParser(description="Write questions for what is in an image: see examples/dpo.py.")
        parser.add_argument("folder", type=Path, help="folder to write")
        parser.add_argument(
            "--images", type=int, nargs=3, default=[4000, 1000, 600], help="in each file (default: %(default)s)"
        )
        given = parser.parse_args()
        write_presence_set(given.folder, *given.images)
