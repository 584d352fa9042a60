"""`vlmfx serve` as a process of its own: real clients, signals, sockets."""

from __future__ import annotations

import asyncio
import functools
import http.server
import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import requests

from tests.golden_cases import COMMITTED
from tests.server.harness import DEMO, PICTURE_URL, asks, noise_url
from vlmfx import LLM
from vlmfx.cli import main

STAR = {"role": "user", "content": [{"type": "text", "text": "What colour is the star?"}]}
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.endswith("_API_KEY")}


@dataclass
class Server:
    """A process that serves at `url`."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path

    def end(self, number: int = signal.SIGTERM, timeout: float = 30) -> int:
        """The exit code after a signal."""
        self.process.send_signal(number)
        return self.process.wait(timeout)


@contextmanager
def served(log: Path, *arguments: str, device: str = "cpu", **environment: str) -> Iterator[Server]:
    """A server of arguments, once it listens."""
    command = [sys.executable, "-m", "vlmfx", "serve", *arguments, "--device", device]
    with log.open("wb") as stderr:
        process = subprocess.Popen(command, stderr=stderr, stdout=stderr, env={**ENVIRONMENT, **environment})
    try:
        end = time.monotonic() + 60
        while not (found := re.search(r"serving .* at (\S+)", log.read_text())):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.05)
        yield Server(process, found[1], log)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def pictures() -> Iterator[str]:
    """A host of this machine that has the picture."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=str(DEMO.parent))
    ) as host:
        threading.Thread(target=host.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{host.server_address[1]}"
        host.shutdown()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, pictures: str) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    shutil.copy(DEMO, folder / "picture.png")
    arguments = ["--port", "0", "--host", "127.0.0.1", "--api-key", "key-1", "--api-key", "key-2"]
    media = ["--private-media-hosts", pictures, "--allowed-local-media-path", str(folder)]
    with served(folder / "log", "scenes", *arguments, *media, VLLM_API_KEY="key-3") as made:
        yield made
        assert made.end() == 0, made.log.read_text()
        assert "Traceback" not in made.log.read_text()


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="key-1", max_retries=0) as made:
        yield made


def about(url: str) -> Any:
    return [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}, *STAR["content"]]}]


def test_openais_client_asks_about_pictures(client, server, pictures):
    folder = server.log.parent
    for url in (PICTURE_URL, f"http://{pictures}/demo.png", (folder / "picture.png").as_uri()):
        found = client.chat.completions.create(model="scenes", messages=about(url), temperature=0, logprobs=True)
        assert found.choices[0].message.content == "red"
        assert found.usage.total_tokens == found.usage.prompt_tokens + found.usage.completion_tokens
        assert found.choices[0].logprobs.content[0].logprob <= 0
    assert [model.id for model in client.models.list()] == ["scenes"]
    text = client.completions.create(model="scenes", prompt="Hello", max_tokens=3, temperature=0)
    assert text.object == "text_completion"


def test_the_example_of_the_page(server):
    page = (Path(__file__).parents[2] / "docs" / "serve.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.S)
    code = code.replace("http://localhost:8000", server.url).replace("EMPTY", "key-1")
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=server.log.parent, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "red\n"), done.stderr


def test_openais_client_reads_streams(client, server):
    options = {"include_usage": True}
    stream = client.chat.completions.create(
        model="scenes", messages=about(PICTURE_URL), temperature=0, stream=True, stream_options=options
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "red"
    assert chunks[-1].usage.completion_tokens > 0

    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="key-3", max_retries=0) as client:

            async def one(stream: bool) -> str:
                found: Any = await client.chat.completions.create(
                    model="scenes", messages=about(PICTURE_URL), temperature=0, stream=stream
                )
                if not stream:
                    return str(found.choices[0].message.content)
                return "".join([chunk.choices[0].delta.content or "" async for chunk in found])

            return await asyncio.gather(*(one(i % 2 == 0) for i in range(6)))

    assert asyncio.run(ask()) == ["red"] * 6


def test_openais_client_knows_the_errors(client, server):
    messages = [{"role": "user", "content": "x"}]
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-4o", messages=messages)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="scenes", messages=messages, max_tokens=10**6)
    assert bad.value.param == "max_tokens"
    with pytest.raises(openai.AuthenticationError) as closed:
        client.with_options(api_key="key-4").models.list()
    assert closed.value.code == "invalid_api_key"
    with pytest.raises(openai.BadRequestError, match="no public address"):
        client.chat.completions.create(model="scenes", messages=about("http://127.0.0.1:9/x.png"))
    with pytest.raises(openai.BadRequestError, match="no readable file"):
        client.chat.completions.create(model="scenes", messages=about("file:///etc/passwd"))


def curl(*arguments: str) -> tuple[int, str]:
    """(status, body) by curl."""
    command = ["curl", "-sS", "-N", "-m", "30", "-w", "\n%{http_code}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    body, _, status = done.stdout.rpartition("\n")
    return int(status), body


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not on this machine")
def test_curl(server, tmp_path):
    file = tmp_path / "body.json"
    file.write_text(json.dumps(asks("What colour is the star?", PICTURE_URL, model="scenes", stream=True)))
    url = f"{server.url}/v1/chat/completions"
    key, kind = ("-H", "Authorization: Bearer key-2"), ("-H", "Content-Type: application/json")
    status, text = curl(url, *key, *kind, "-d", f"@{file}")
    assert (status, text.rstrip().splitlines()[-1]) == (200, "data: [DONE]")
    assert '"content":"red"' in text
    assert curl(url, *kind, "-d", f"@{file}")[0] == 401
    status, text = curl(url, *key, "-d", f"@{file}")
    assert (status, json.loads(text)["error"]["code"]) == (415, "unsupported_media_type")
    big = tmp_path / "big.json"
    big.write_bytes(b'{"a": "' + b"x" * 70_000_000 + b'"}')
    for more in ((), ("-H", "Transfer-Encoding: chunked")):
        assert curl(url, *key, *kind, *more, "--data-binary", f"@{big}")[0] == 413
    assert curl(f"{server.url}/health")[0] == 200


def test_a_client_that_goes_away_frees_its_place(server):
    def running() -> float:
        text = httpx.get(f"{server.url}/metrics").text
        found = re.search(r"^vlmfx:num_requests_running\{.*\} (\S+)$", text, re.M)
        assert found is not None
        return float(found[1])

    body = asks("x", model="scenes", stream=True, max_tokens=1900, ignore_eos=True, return_token_ids=True)
    headers = {"Authorization": "Bearer key-1"}
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, headers=headers) as response:
        lines = response.iter_lines()
        while "token_ids" not in next(lines):
            pass
        assert running() == 1
    end = time.monotonic() + 3
    while running():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_the_pages_embedding_client(tmp_path):
    """`requests.post` as on the reference page, with a template that is shipped."""
    model = str(COMMITTED / "models" / "phi3v-tiny")
    options = ["--task", "embedding", "--trust-remote-code", "--max-model-len", "4096", "--chat-template"]
    names = ["--served-model-name", "TIGER-Lab/VLM2Vec-Full", "--dtype", "float32"]
    content = [
        {"type": "image_url", "image_url": {"url": noise_url(200, 200)}},
        {"type": "text", "text": "Represent the given image."},
    ]
    messages = [{"role": "user", "content": content}]
    with served(tmp_path / "log", model, *options, "template_vlm2vec.jinja", *names, "--port", "0") as server:
        port = server.url.rpartition(":")[2]
        body: Any = {"model": "TIGER-Lab/VLM2Vec-Full", "messages": messages, "encoding_format": "float"}
        response = requests.post(f"http://localhost:{port}/v1/embeddings", json=body)
        response.raise_for_status()
        found = response.json()["data"][0]["embedding"]
        with openai.OpenAI(base_url=f"http://localhost:{port}/v1", api_key="EMPTY") as client:
            by_client = client.embeddings.create(model="TIGER-Lab/VLM2Vec-Full", input="a text").data[0].embedding
        assert "no API key is set" in server.log.read_text()
    llm = LLM(model, task="embed", chat_template="template_vlm2vec", dtype="float32", device="cpu", max_model_len=4096)
    prompt = {"messages": messages, "add_generation_prompt": False}
    assert found == pytest.approx(llm.embed(prompt)[0].outputs.embedding, abs=1e-5)
    assert by_client == pytest.approx(llm.embed("a text")[0].outputs.embedding, abs=1e-5)


def is_refused(url: str) -> bool:
    try:
        httpx.get(f"{url}/health", timeout=2)
    except httpx.ConnectError:
        return True
    return False


def lines_until_the_end(server: Server, num_tokens: int) -> tuple[list[str], float, bool]:
    """The events of a long stream, at whose first tokens the server is told to end; the seconds from there on; and whether new connections
    were refused while it went on."""
    body = asks("x", model="scenes", stream=True, max_tokens=num_tokens, ignore_eos=True, return_token_ids=True)
    found: list[str] = []
    told_at, is_seen, is_closed = 0.0, False, False
    url = f"{server.url}/v1/chat/completions"
    with httpx.Client(timeout=60) as client, client.stream("POST", url, json=body) as response:
        for line in response.iter_lines():
            found += [line.removeprefix("data: ")] if line else []
            if not told_at and "token_ids" in line:
                server.process.send_signal(signal.SIGTERM)
                told_at = time.monotonic()
            elif told_at and not is_seen and time.monotonic() - told_at > 0.5:
                is_seen = True
                is_closed = is_refused(server.url)
    return found, time.monotonic() - told_at, is_closed


def test_at_sigterm_what_runs_is_finished(tmp_path):
    with served(tmp_path / "log", "scenes", "--port", "0", "--host", "127.0.0.1") as server:
        found, _, is_closed = lines_until_the_end(server, 250)
        assert found[-1] == "[DONE]"
        assert json.loads(found[-2])["choices"][0]["finish_reason"] == "length"
        ids = [i for line in found[:-1] for c in json.loads(line)["choices"] for i in c.get("token_ids", ())]
        assert len(ids) == 250
        assert is_closed
        assert server.process.wait(30) == 0, server.log.read_text()
        assert "Traceback" not in server.log.read_text()
        assert is_refused(server.url)


def test_at_sigterm_what_takes_too_long_is_ended_in_order(tmp_path):
    arguments = ["--port", "0", "--host", "127.0.0.1", "--drain-timeout", "0.3"]
    with served(tmp_path / "log", "scenes", *arguments) as server:
        found, seconds, _ = lines_until_the_end(server, 1900)
        assert found[-1] == "[DONE]"
        assert "shut down" in json.loads(found[-2])["error"]["message"]
        assert seconds < 5
        assert server.process.wait(30) == 0, server.log.read_text()
        assert "Traceback" not in server.log.read_text()


def test_a_host_that_never_answers_does_not_hold_up_the_end(tmp_path):
    with socket.socket() as host:
        host.bind(("127.0.0.1", 0))
        host.listen()
        place = f"127.0.0.1:{host.getsockname()[1]}"
        arguments = ["--port", "0", "--host", "127.0.0.1", "--private-media-hosts", place, "--drain-timeout", "0.3"]
        with served(tmp_path / "log", "scenes", *arguments, VLMFX_IMAGE_FETCH_TIMEOUT="50") as server:
            told_at, kept = 0.0, []

            def end() -> None:
                nonlocal told_at
                kept.append(host.accept())
                told_at = time.monotonic()
                server.process.send_signal(signal.SIGTERM)

            threading.Thread(target=end).start()
            body = asks("x", f"http://{place}/x.png", model="scenes")
            response = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)
            assert (response.status_code, response.json()["error"]["type"]) == (503, "server_error")
            assert server.process.wait(30) == 0, server.log.read_text()
            assert time.monotonic() - told_at < 8
            assert "Traceback" not in server.log.read_text()


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not on this machine")
def test_tls(tmp_path):
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    names = ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*command, *names], check=True, capture_output=True)
    files = ["--ssl-keyfile", str(key), "--ssl-certfile", str(certificate)]
    with served(tmp_path / "log", "scenes", "--port", "0", "--host", "127.0.0.1", *files) as server:
        assert server.url.startswith("https://")
        assert (
            httpx.get(f"{server.url}/ready", verify=ssl.create_default_context(cafile=certificate)).status_code == 200
        )
        assert server.end(signal.SIGINT) == 130


def test_a_socket_file(tmp_path):
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))  # as a server that was killed leaves it
    with served(tmp_path / "log", "scenes", "--uds", str(path)) as server:
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://x") as client:
            assert client.get("/v1/models").json()["data"][0]["id"] == "scenes"
        assert main(["serve", "scenes", "--uds", str(path)]) == 1
        assert server.end() == 0
    assert not path.exists()


def test_an_address_in_use_is_told_before_the_model_is_loaded(capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        start = time.monotonic()
        assert main(["serve", "no/such/model", "--host", "127.0.0.1", "--port", str(port)]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == f"vlmfx: port: 127.0.0.1:{port}: it is in use; choose another."
    assert time.monotonic() - start < 5
