"""Draws vlmfx/assets/demo.png, the picture of `vlmfx demo`, and docs/images/scenes.png, a strip of what the model is trained for.

python scripts/draw_demo.py        # from the repository's root; the strip's texts want SCENES_FONTS, see scripts/scenes/fonts.py
"""

from __future__ import annotations

from pathlib import Path
from random import Random

import scenes
from PIL import Image
from scenes import backgrounds
from scenes.paint import drawn
from scenes.questions import describe
from scenes.scene import Scene, Thing
from scenes.shapes import draw_mask

ROOT = Path(__file__).resolve().parents[1]
SIDE = 252
GROUND = (205, 220, 240)
OBJECTS = (  # colour, shape, centre, radius: clear of the borders of the picture's thirds
    ("red", "star", (48, 44), 33),
    ("green", "ring", (212, 50), 27),
    ("yellow", "circle", (128, 134), 36),
    ("purple", "heart", (60, 214), 26),
)
STRIP = (("objects", 21), ("text", 4), ("chart", 5), ("objects", 33))  # kind and seed of held-out samples, 196 px high
GAP = 8


def draw_demo() -> tuple[Image.Image, Scene]:
    """The picture, and what is in it."""
    rng = Random(7)
    x, y = backgrounds.axes(SIDE, SIDE)
    level = Image.fromarray(((x + y) * (255 / (2 * SIDE))).astype("uint8"))  # darker to the lower right
    picture = Image.composite(
        Image.new("RGB", (SIDE, SIDE), GROUND), Image.new("RGB", (SIDE, SIDE), (232, 238, 246)), level
    )
    things = []
    for colour, shape, (cx, cy), radius in OBJECTS:
        mask, (left, top, right, bottom) = draw_mask(rng, shape, radius)
        at = cx - mask.width // 2, cy - mask.height // 2
        picture.paste(drawn(rng, colour), at, mask)
        things.append(Thing(colour, shape, (at[0] + left, at[1] + top, at[0] + right, at[1] + bottom)))
    return picture, Scene(picture.size, None, tuple(things))


def draw_strip() -> Image.Image:
    """Held-out pictures of objects, text and a chart beside one another."""
    pictures = [scenes.sample(seed, split="heldout", kind=kind, size=(196, 196)).images[0] for kind, seed in STRIP]
    strip = Image.new("RGB", (len(pictures) * (196 + GAP) - GAP, 196), "white")
    for i, picture in enumerate(pictures):
        strip.paste(picture, (i * (196 + GAP), 0))
    return strip


def main() -> None:
    picture, scene = draw_demo()
    demo, strip = ROOT / "vlmfx" / "assets" / "demo.png", ROOT / "docs" / "images" / "scenes.png"
    picture.save(demo, optimize=True)
    strip.parent.mkdir(exist_ok=True)
    draw_strip().save(strip, optimize=True)
    print(demo, describe(scene), *(f"{thing.name}: {list(thing.box)}" for thing in scene.things), strip, sep="\n")


if __name__ == "__main__":
    main()
