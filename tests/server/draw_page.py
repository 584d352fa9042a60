"""docs/images/page.png and page-dark.png: python -m tests.server.draw_page"""

from __future__ import annotations

import tempfile
from pathlib import Path

from tests.server.browser import chromium
from tests.server.harness import DEMO
from tests.server.test_page_in_browser import add, ask
from tests.server.test_serve import served

IMAGES = Path(__file__).parents[2] / "docs" / "images"


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with (
            served(folder / "server", "scenes", "--port", "0", "--host", "127.0.0.1") as server,
            chromium(folder) as made,
            made.page(server.url, 1100, 820) as page,
        ):
            page.until("document.activeElement.id === 'question'")
            add(page, DEMO)
            ask(page, "Describe the picture.")
            ask(page, "Where is the purple heart?")
            page.fill("#question", "Is the star left of the ring?")
            page.until_text("#count", "183 tokens")
            for file, scheme in (("page.png", "light"), ("page-dark.png", "dark")):
                page.prefer(color_scheme=scheme)
                (IMAGES / file).write_bytes(page.picture())


if __name__ == "__main__":
    main()
