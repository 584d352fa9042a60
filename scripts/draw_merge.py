"""The picture of the merge: how token embeddings and image features become the decoder's input, on a bucket of 8 tokens."""

from __future__ import annotations

from svg import BLUE, FAINT, INK, ORANGE, arrow, box, document, text

IMAGE, PADDING = "image", "padding"
TOKENS = [("start", 1), ("What", 724), (IMAGE, 9), (IMAGE, 9), (IMAGE, 9), ("is", 338), ("it?", 372), (PADDING, 0)]
LEFT, CELL, HEIGHT, STEP = 190, 58, 28, 62  # the first cell, its width and height, and from row to row
WIDTH, TABLE = 860, LEFT + 8 * CELL + 26


def draw_merge() -> str:
    """The picture: from above ids choose rows of the embedding, from below the index chooses features, and one `where` joins them."""
    names = [name for name, _ in TOKENS]
    index = [names[:t].count(IMAGE) if name == IMAGE else -1 for t, name in enumerate(names)]
    is_image = [i >= 0 for i in index]
    top = [40 + STEP * row for row in range(5)]
    parts = [
        *(text(_middle(t), top[0] - 10, name, anchor="middle", font_size=11) for t, name in enumerate(names)),
        *_labels(top),
    ]
    for t, (_, token) in enumerate(TOKENS):
        x, middle, feature = LEFT + CELL * t + 3, _middle(t), max(index[t], 0)
        chosen = (f"f{feature}", ORANGE) if is_image[t] else (f"e{token}", BLUE)
        parts += [
            _cell(x, top[0], str(token), INK),
            arrow(middle, top[0] + HEIGHT, middle, top[1], FAINT),
            _cell(x, top[1], f"e{token}", BLUE, is_faint=is_image[t]),
            _cell(x, top[2], *chosen),
            _cell(x, top[3], f"f{feature}", ORANGE, is_faint=not is_image[t]),
            arrow(middle, top[4], middle, top[3] + HEIGHT, FAINT),
            _cell(x, top[4], str(index[t]).replace("-", "−"), INK),
            arrow(middle, top[3], middle, top[2] + HEIGHT, ORANGE)
            if is_image[t]
            else arrow(middle, top[1] + HEIGHT, middle, top[2], BLUE),
        ]
    return document(WIDTH, top[4] + HEIGHT + 14, "The merge: one gather and one where", parts)


def _labels(top: list[int]) -> list[str]:
    """What each row is, on the left, and where its values come from, on the right."""
    rows = [
        ("ids", "(tokens,)"),
        ("embed[ids]", "the embedding"),
        ("embeddings", "where(index ≥ 0, …)"),
        ("features[index]", "one gather"),
        ("feature_index", "(tokens,)"),
    ]
    parts = []
    for y, (name, what) in zip(top, rows, strict=True):
        parts.append(text(LEFT - 12, y + 12, name, anchor="end", font_weight="bold"))
        parts.append(text(LEFT - 12, y + 27, what, anchor="end", font_size=11))
    width = WIDTH - TABLE - 20
    features = "f0 f1 f2, padding"
    for y, name, rows_of, color in ((top[1], "embed", "(vocab, hidden)", BLUE), (top[3], "features", features, ORANGE)):
        parts.append(box(TABLE, y - 11, width, HEIGHT + 22, "", color))
        parts.append(text(TABLE + width / 2, y + 10, name, anchor="middle", font_weight="bold", fill=color))
        parts.append(text(TABLE + width / 2, y + 27, rows_of, anchor="middle", font_size=11, fill=color))
        parts.append(arrow(TABLE, y + HEIGHT / 2, LEFT + 8 * CELL + 2, y + HEIGHT / 2, color))
    parts.append(text(TABLE + width / 2, top[2] + 12, "to the decoder", anchor="middle", font_size=11))
    parts.append(arrow(LEFT + 8 * CELL + 2, top[2] + HEIGHT / 2 + 4, WIDTH - 20, top[2] + HEIGHT / 2 + 4))
    return parts


def _middle(t: int) -> float:
    return LEFT + CELL * (t + 0.5)


def _cell(x: float, y: float, words: str, color: str, *, is_faint: bool = False) -> str:
    return box(x, y, CELL - 6, HEIGHT, words, color, is_faint=is_faint)
