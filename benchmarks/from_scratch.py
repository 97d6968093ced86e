"""What examples/recipes/from_scratch.yaml learns, from nothing, of two data sets that are unlike the first run's.

    python benchmarks/from_scratch.py --output runs/from_scratch

Draws both data sets, trains on each through examples/sft.py as a user would, asks examples/evaluate.py about held-out images,
and prints a table. What follows `--flags` is handed to sft.py, after the recipe.

* scenes: one to three things of seven shapes, eight colours and two sizes, anywhere, overlapping, on uneven ground. Asked are
  how many, how many of a colour, is there anything of a colour, what colour is the small or large one, and of a thing named by
  its colour: which shape, small or large, in which corner.
* symbols: one of 200 drawn symbols with made-up names, drawn by another hand every time, of any size and anywhere, in ink of
  six colours on paper of eight textures. What is it called, which paper, which ink, in changing words.
"""

import argparse
import functools
import json
import math
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from minimind_v_hf.measures import commonest_right
from minimind_v_hf.model_card import table


ROOT = Path(__file__).parents[1]
Question = tuple[str, str, str]
"""Kind, question, right answer."""


# ── Scenes ───────────────────────────────────────────────────────────────────────────────────────────────────────────

SCENE_SIZE = 128
SHAPES = ["circle", "square", "triangle", "star", "cross", "ring", "diamond"]
COLOURS = {
    "red": (205, 40, 40),
    "green": (40, 150, 50),
    "blue": (45, 80, 205),
    "yellow": (235, 205, 40),
    "purple": (135, 50, 165),
    "orange": (240, 130, 30),
    "cyan": (60, 195, 205),
    "black": (35, 35, 35),
}
SIZES = {"small": (9, 12), "large": (17, 23)}
MARGIN = 8  # pixels from the middle lines, within which nobody asks for the corner


def corners(shape: str) -> list[tuple[float, float]]:
    """The outline of a shape of radius 1."""
    if shape == "square":
        return [(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)]
    if shape == "cross":
        quarter = [(-0.3, -1), (0.3, -1), (0.3, -0.3)]
        turns = [(lambda x, y: (x, y)), (lambda x, y: (-y, x)), (lambda x, y: (-x, -y)), (lambda x, y: (y, -x))]
        return [turn(x, y) for turn in turns for x, y in quarter]
    if shape == "circle":
        return [(math.cos(angle / 20 * math.pi), math.sin(angle / 20 * math.pi)) for angle in range(40)]
    radii = {"triangle": [1.1], "diamond": [1.1, 0.7], "star": [1.1, 0.45]}[shape]
    count = {"triangle": 3, "diamond": 4, "star": 10}[shape]
    angles = [2 * math.pi * number / count - math.pi / 2 for number in range(count)]
    return [(radii[i % len(radii)] * math.cos(a), radii[i % len(radii)] * math.sin(a)) for i, a in enumerate(angles)]


def draw_scene(rng: random.Random) -> tuple[Image.Image, list[dict]]:
    """An image, and its things from back to front."""
    scale, noise = 2, np.random.default_rng(rng.getrandbits(32))
    patches = noise.uniform(150, 235, (6, 6, 3)).mean(2, keepdims=True) + noise.uniform(-12, 12, (6, 6, 3))
    ground = Image.fromarray(patches.astype(np.uint8)).resize((SCENE_SIZE * scale,) * 2, Image.Resampling.BICUBIC)
    things: list[dict] = []
    wanted, canvas = rng.randint(1, 3), ImageDraw.Draw(ground)
    for _ in range(200):
        if len(things) == wanted:
            break
        size = rng.choice(sorted(SIZES))
        radius = rng.uniform(*SIZES[size])
        x, y = (rng.uniform(radius + 2, SCENE_SIZE - radius - 2) for _ in range(2))
        # Overlaps, but nobody hides
        if any(math.dist((x, y), (other["x"], other["y"])) < 0.8 * (radius + other["radius"]) for other in things):
            continue
        shape, colour = rng.choice(SHAPES), rng.choice(sorted(COLOURS))
        things.append({"shape": shape, "colour": colour, "size": size, "x": x, "y": y, "radius": radius})
        tone = rng.uniform(0.85, 1.1)
        fill = tuple(min(255, round(part * tone)) for part in COLOURS[colour])
        if shape == "ring":
            box = [(x - radius) * scale, (y - radius) * scale, (x + radius) * scale, (y + radius) * scale]
            canvas.ellipse(box, outline=fill, width=round(0.4 * radius * scale))
        else:
            canvas.polygon([((x + dx * radius) * scale, (y + dy * radius) * scale) for dx, dy in corners(shape)], fill=fill)
    pixels = np.asarray(ground.resize((SCENE_SIZE,) * 2, Image.Resampling.BOX), dtype=np.float32)
    pixels = pixels + noise.normal(0, 5, pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), things


def ask_scene(things: list[dict], rng: random.Random) -> list[Question]:
    """All questions that have one right answer."""
    colours, sizes = ([thing[key] for thing in things] for key in ("colour", "size"))
    asked = [("count", "How many things are there?", str(len(things)))]
    colour = rng.choice([rng.choice(colours), rng.choice(sorted(COLOURS))])
    asked.append(("count of a colour", f"How many {colour} things are there?", str(colours.count(colour))))
    colour = rng.choice([rng.choice(colours), rng.choice(sorted({*COLOURS} - {*colours}))])
    asked.append(("is there", f"Is there anything {colour}?", "yes" if colour in colours else "no"))
    for thing in things:
        colour, size = thing["colour"], thing["size"]
        if sizes.count(size) == 1:
            asked.append(("colour", f"What colour is the {size} thing?", colour))
        if colours.count(colour) > 1:
            continue
        asked.append(("shape", f"What shape is the {colour} thing?", thing["shape"]))
        asked.append(("size", f"Is the {colour} thing small or large?", size))
        right, down = (thing[axis] - SCENE_SIZE / 2 for axis in "xy")
        if min(abs(right), abs(down)) > MARGIN:
            corner = f"{'lower' if down > 0 else 'upper'} {'right' if right > 0 else 'left'}"
            asked.append(("corner", f"In which corner is the {colour} thing?", corner))
    return asked


# ── Symbols ──────────────────────────────────────────────────────────────────────────────────────────────────────────

SYMBOL_SIZE = 96
SYMBOLS = 200
INKS = {
    "red": (170, 25, 25),
    "green": (15, 105, 35),
    "blue": (25, 40, 160),
    "black": (20, 20, 20),
    "violet": (110, 25, 130),
    "brown": (95, 55, 20),
}
PAPERS = ["plain", "wooden", "chequered", "dotted", "brick", "cloudy", "rising stripes", "falling stripes"]


@functools.cache
def symbols() -> dict[str, list[np.ndarray]]:
    """Names, and strokes as corners (points, 2) within -1 to 1."""
    rng, drawn = random.Random(200), {}
    while len(drawn) < SYMBOLS:
        name = "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(rng.randint(2, 3)))
        strokes = []
        for _ in range(rng.randint(2, 3)):
            points = [(rng.uniform(-1, 1), rng.uniform(-1, 1))]
            while len(points) < rng.randint(2, 4):
                point = (rng.uniform(-1, 1), rng.uniform(-1, 1))
                if math.dist(point, points[-1]) > 0.8:
                    points.append(point)
            strokes.append(np.array(points))
        drawn[name] = strokes
    return drawn


def paper(texture: str, noise: np.random.Generator) -> np.ndarray:
    """Pixels (side, side, 3) of a texture in its own two tones."""
    y, x = np.mgrid[:SYMBOL_SIZE, :SYMBOL_SIZE] + noise.uniform(0, 30, (2, 1, 1))
    period = noise.uniform(7, 13)
    rough = Image.fromarray(noise.uniform(0, 255, (9, 9)).astype(np.uint8)).resize((SYMBOL_SIZE,) * 2, Image.Resampling.BICUBIC)
    cloud = np.asarray(rough) / 255.0
    row = (y // (period * 0.7)) % 2
    pattern = {
        "plain": np.zeros_like(x),
        "wooden": np.sin((x + 18 * cloud + 0.08 * y) * 2 * math.pi / (period * 0.6)) * 0.5 + 0.5,
        "chequered": ((x // period + y // period) % 2),
        "dotted": (np.hypot(x % period - period / 2, y % period - period / 2) < period * 0.3) * 1.0,
        "brick": np.maximum(y % (period * 0.7) < 1.8, (x + row * period * 0.8) % (period * 1.6) < 1.8) * 1.0,
        "cloudy": cloud,
        "rising stripes": np.sin((x + y) * 2 * math.pi / period) * 0.5 + 0.5,
        "falling stripes": np.sin((x - y) * 2 * math.pi / period) * 0.5 + 0.5,
    }[texture][..., None]
    light, dark = noise.uniform(215, 250, 3), noise.uniform(165, 205, 3)
    return light + (dark - light) * pattern + noise.normal(0, 4, (SYMBOL_SIZE, SYMBOL_SIZE, 3))


def draw_symbol(rng: random.Random) -> tuple[Image.Image, dict]:
    """An image, and what is on it: the symbol's name, the paper, the ink."""
    noise, scale = np.random.default_rng(rng.getrandbits(32)), 3
    name, texture, ink = rng.choice(sorted(symbols())), rng.choice(PAPERS), rng.choice(sorted(INKS))
    mask = Image.new("L", (SYMBOL_SIZE * scale,) * 2)
    canvas = ImageDraw.Draw(mask)
    radius = rng.uniform(0.25, 0.42) * SYMBOL_SIZE
    x, y = (SYMBOL_SIZE / 2 + rng.uniform(-0.9, 0.9) * (SYMBOL_SIZE / 2 - radius) for _ in range(2))
    turn, slant, squeeze = rng.uniform(-0.2, 0.2), rng.uniform(-0.2, 0.2), rng.uniform(0.85, 1.15)
    hand = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]]) @ [[squeeze, slant], [0, 1]]
    thickness = max(2, round(rng.uniform(0.1, 0.17) * radius * scale))
    for stroke in symbols()[name]:
        points = (stroke + noise.normal(0, 0.06, stroke.shape)) @ hand.T * radius + (x, y)
        canvas.line([(a * scale, b * scale) for a, b in points], fill=255, width=thickness, joint="curve")
    mask = mask.resize((SYMBOL_SIZE,) * 2, Image.Resampling.BOX).filter(ImageFilter.GaussianBlur(0.4))
    cover = np.asarray(mask)[..., None] / 255.0 * rng.uniform(0.8, 1.0)
    pixels = paper(texture, noise) * (1 - cover) + np.array(INKS[ink]) * cover
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), {"name": name, "paper": texture, "ink": ink}


def ask_symbol(seen: dict, rng: random.Random) -> list[Question]:
    """Questions of all kinds, in changing words."""
    questions = {
        "paper": ["What is the paper like?", "Describe the paper.", "Which texture has the ground?"],
        "ink": ["Which colour is the ink?", "What colour was used to write?"],
        "name": ["What is this symbol called?", "Name the symbol.", "Read the sign."],
    }
    return [(kind, rng.choice(words), seen[kind]) for kind, words in questions.items()]


# ── Data sets ────────────────────────────────────────────────────────────────────────────────────────────────────────


def write_data_set(folder: Path, draw: Callable, ask: Callable, images: int, held_out: int, turns: int) -> None:
    """`train.jsonl`, with so many turns about each image, and `test.jsonl`, with one question for each of other images."""
    rng = random.Random(1)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for name, count in (("train", images), ("test", held_out)):
        with open(folder / f"{name}.jsonl", "w", encoding="utf-8") as file:
            for number in range(count):
                image, contents = draw(rng)
                image.save(folder / "images" / f"{name}-{number:05d}.png")
                asked = ask(contents, rng)
                asked = rng.sample(asked, min(len(asked), turns if name == "train" else 1))
                conversation = []
                for turn, (_, question, answer) in enumerate(asked):
                    conversation.append({"role": "user", "content": ("" if turn else "<image>\n") + question})
                    conversation.append({"role": "assistant", "content": answer})
                row = {"conversations": conversation, "image": f"{name}-{number:05d}.png", "kind": asked[0][0]}
                file.write(json.dumps(row) + "\n")


DATA_SETS = {"scenes": (draw_scene, ask_scene), "symbols": (draw_symbol, ask_symbol)}
STEPS = {"scenes": 2700, "symbols": 3450}  # about ten minutes of two cores: a row of symbols has fewer turns


# ── The benchmark ────────────────────────────────────────────────────────────────────────────────────────────────────


def run(*command: str | Path) -> tuple[float, float]:
    """Run a command, and return its minutes: of the clock, and of all cores together."""
    began, used = time.monotonic(), os.times()
    subprocess.run([*map(str, command)], check=True)
    now = os.times()
    busy = now.children_user + now.children_system - used.children_user - used.children_system
    return (time.monotonic() - began) / 60, busy / 60


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/from_scratch"), help="folder to write (default: %(default)s)")
    parser.add_argument("--sets", nargs="+", choices=DATA_SETS, default=[*DATA_SETS], help="data sets (default: both)")
    parser.add_argument("--images", type=int, default=15_000, help="training images of each (default: %(default)s)")
    parser.add_argument("--held-out", type=int, default=1000, help="held-out images of each (default: %(default)s)")
    parser.add_argument("--turns", type=int, default=9, help="questions about a training image at most (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=2, help="of the training, one for each core (default: %(default)s)")
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="what follows is for sft.py, after the recipe")
    arguments = parser.parse_args()
    launch = [
        sys.executable,
        *(["-m", "torch.distributed.run", "--nproc_per_node", arguments.processes] if arguments.processes > 1 else []),
    ]
    lines = []
    for name in arguments.sets:
        folder = arguments.output / name
        data, model, answers = folder / "data", folder / "model", folder / "answers.jsonl"
        write_data_set(data, *DATA_SETS[name], arguments.images, arguments.held_out, arguments.turns)
        command = [*launch, ROOT / "examples/sft.py", ROOT / "examples/recipes/from_scratch.yaml"]
        command += ["--data_files", data / "train.jsonl", "--image_folder", data / "images", "--output_dir", model]
        command += ["--max_steps", STEPS[name]]
        minutes, busy = run(*command, *arguments.flags)
        command = [sys.executable, ROOT / "examples/evaluate.py", "--model", model, "--data", data / "test.jsonl"]
        run(*command, "--images", data / "images", "--output", answers, "--max-new-tokens", "12")
        rows = [json.loads(line) for line in answers.read_text(encoding="utf-8").splitlines()]
        shares = [sum(row[key] for row in rows) / len(rows) for key in ("right", "right_text_only")]
        shares.append(commonest_right(rows) / len(rows))
        lines.append([name, *(f"{share:.1%}" for share in shares), f"{minutes:.1f}", f"{busy:.1f}"])
    print(table(lines, ("data set", "exact", "text-only", "commonest", "minutes", "minutes of CPU")))


if __name__ == "__main__":
    main()
