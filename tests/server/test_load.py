"""Two hundred clients at once, good, bad and gone: none is lost, none gets another's answer."""

from __future__ import annotations

import asyncio
import base64
import io
import random

import httpx
import pytest
from PIL import Image, ImageDraw

from tests.server.harness import asks, events
from tests.server.test_serve import served

COLOURS = {"red": (220, 40, 40), "green": (40, 160, 60), "blue": (40, 80, 220), "yellow": (235, 205, 50)}
NUM_CLIENTS = 200


def square(colour: str, seed: int) -> str:
    """A picture of its own with one square of a colour, as a data: URL."""
    place = random.Random(seed)
    image = Image.new("RGB", (168, 168), "white")
    x, y = place.randrange(20, 90), place.randrange(20, 90)
    ImageDraw.Draw(image).rectangle((x, y, x + 50, y + 50), fill=COLOURS[colour])
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


@pytest.mark.slow
def test_many_clients(tmp_path):
    async def client(number: int, session: httpx.AsyncClient) -> tuple[str, str]:
        """(what came of it, what should have)."""
        colour = [*COLOURS][number % 4]
        body = asks("What colour is the square?", square(colour, number), model="scenes", stream=number % 3 == 0)
        if number % 50 == 7:
            response = await session.post("/v1/chat/completions", json={**body, "temperature": "hot"})
            return str(response.status_code), "400"
        if number % 50 == 13:
            long = {**body, "stream": True, "ignore_eos": True, "max_tokens": 1500, "return_token_ids": True}
            async with session.stream("POST", "/v1/chat/completions", json=long) as response:
                async for line in response.aiter_lines():
                    if "token_ids" in line:
                        return "gone", "gone"
        if number % 5 == 4:
            response = await session.post("/v1/completions", json={"prompt": f"{number}", "max_tokens": 4})
            return str(response.status_code), "200"
        response = await session.post("/v1/chat/completions", json=body)
        if body["stream"]:
            deltas = [choice["delta"] for chunk in events(response) for choice in chunk["choices"]]
            return "".join(delta.get("content", "") for delta in deltas), colour
        return response.json()["choices"][0]["message"]["content"], colour

    async def all_of_them(url: str) -> list[tuple[str, str]]:
        limits = httpx.Limits(max_connections=NUM_CLIENTS)
        async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as session:
            return await asyncio.gather(*(client(number, session) for number in range(NUM_CLIENTS)))

    with served(tmp_path / "log", "scenes", "--port", "0", "--host", "127.0.0.1", "--max-num-seqs", "32") as server:
        found = asyncio.run(all_of_them(server.url))
        assert [pair for pair in found if pair[0] != pair[1]] == []
        for _ in range(100):
            text = httpx.get(f"{server.url}/metrics").text
            if 'num_requests_running{model_name="scenes"} 0.0' in text:
                break
            asyncio.run(asyncio.sleep(0.1))
        assert 'num_requests_running{model_name="scenes"} 0.0' in text
        assert 'compiles_total{model_name="scenes"} 0.0' in text
        assert server.end() == 0
        assert "Traceback" not in server.log.read_text()
