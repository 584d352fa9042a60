"""Two hundred clients at once, good, bad and gone, four times over: none is lost, none gets another's answer, memory stays flat."""

from __future__ import annotations

import asyncio
import base64
import io
import random
from pathlib import Path

import httpx
import pytest
from PIL import Image, ImageDraw

from tests.server.harness import asks, events
from tests.server.test_serve import served

COLOURS = {"red": (220, 40, 40), "green": (40, 160, 60), "blue": (40, 80, 220), "yellow": (235, 205, 50)}
NUM_CLIENTS = 200
NUM_WAVES = 4
MOST_GROWTH_MB = 40  # of the last two waves: fragments of freed memory come and go


def resident_mb(pid: int) -> float:
    """Of a process."""
    (line,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS")]
    return int(line.split()[1]) / 1024


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

    async def all_of_them(url: str, wave: int) -> list[tuple[str, str]]:
        limits = httpx.Limits(max_connections=NUM_CLIENTS)
        async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as session:
            numbers = range(wave * NUM_CLIENTS, (wave + 1) * NUM_CLIENTS)  # each wave has pictures of its own
            return await asyncio.gather(*(client(number, session) for number in numbers))

    few = "--mm-feature-cache-bytes", str(1 << 22)  # which the first wave fills
    with served(
        tmp_path / "log", "scenes", "--port", "0", "--host", "127.0.0.1", "--max-num-seqs", "32", *few
    ) as server:
        memory = []
        for wave in range(NUM_WAVES):
            found = asyncio.run(all_of_them(server.url, wave))
            assert [pair for pair in found if pair[0] != pair[1]] == []
            memory.append(resident_mb(server.process.pid))
            print(f"after {(wave + 1) * NUM_CLIENTS} requests: {memory[-1]:.0f} MB")
        assert memory[-1] - memory[-3] < MOST_GROWTH_MB, memory
        for _ in range(100):
            text = httpx.get(f"{server.url}/metrics").text
            if 'num_requests_running{model_name="scenes"} 0.0' in text:
                break
            asyncio.run(asyncio.sleep(0.1))
        assert 'num_requests_running{model_name="scenes"} 0.0' in text
        assert 'compiles_total{model_name="scenes"} 0.0' in text
        assert server.end() == 0
        assert "Traceback" not in server.log.read_text()
