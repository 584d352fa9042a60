"""The examples that are clients run as they stand, against `vlmfx serve`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.golden_cases import COMMITTED
from tests.pictures import picture
from tests.server.harness import DEMO
from tests.server.test_serve import Server, served
from tests.test_examples import EXAMPLES, example
from vlmfx import LLM


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with served(tmp_path_factory.mktemp("server") / "log", "scenes", "--port", "0", "--host", "127.0.0.1") as made:
        yield made


def run(server: Server, name: str, *arguments: str) -> str:
    """What an example prints, run as a user does."""
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), *arguments, "--base-url", f"{server.url}/v1"]
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.parametrize("way", [(), ("--stream",)])
def test_pictures_and_videos(server, tmp_path, way):
    (tmp_path / "noise.png").write_bytes(DEMO.read_bytes())
    assert run(server, "openai_vision_client", "single", *way) == "red\n"
    asked = ["--question", "What colour is the ring?", "--image", str(tmp_path / "noise.png")]
    assert run(server, "openai_vision_client", "single", *asked, *way) == "green\n"
    assert run(server, "openai_vision_client", "multi", *way) in ("first\n", "second\n")
    assert run(server, "openai_vision_client", "video", *way) in ("yes\n", "no\n")


def test_a_receipt_becomes_json(server):
    module = example("structured_output")
    printed, _, said = run(server, "structured_output").partition("\n}\n")
    items = [{"name": name, "price": price} for name, price in module.ITEMS.items()]
    assert json.loads(printed + "}") == {"items": items, "total": 9.34}
    assert said == "the items cost 9.34 together, and the receipt says 9.34\n"


def test_a_receipt_is_asked_for_whole(monkeypatch, capsys):
    module, asked = example("structured_output"), []

    def ask(client, model, picture, question, schema):
        asked.append((picture.size, schema))
        return '{"items": [{"name": "a", "price": 1}], "total": 2}'

    class Client:
        """One that knows a model."""

        def __init__(self, **options):
            self.models = self

        def list(self):
            return type("Page", (), {"data": [type("Model", (), {"id": "m"})]})

    monkeypatch.setattr(module, "ask", ask)
    monkeypatch.setattr(module, "OpenAI", Client)
    module.main(["--whole", "--image", str(DEMO)])
    assert asked == [((252, 252), module.RECEIPT)]
    assert capsys.readouterr().out.endswith("the items cost 1.00 together, and the receipt says 2.00\n")


@pytest.mark.parametrize(
    ("kind", "folder", "template"),
    [
        ("vlm2vec", "phi3v-tiny", "template_vlm2vec.jinja"),
        ("dse", "qwen2vl-tiny", "template_dse_qwen2_vl.jinja"),
    ],
)
def test_vectors_by_requests(tmp_path, kind, folder, template):
    model = str(COMMITTED / "models" / folder)
    picture(80, 60).save(tmp_path / "picture.png")
    options = ["--task", "embedding", "--chat-template", template, "--dtype", "float32", "--max-model-len", "4096"]
    asked = ["--image", str(tmp_path / "picture.png"), "--text", "a star", "--text", "a page", "--dimensions", "8"]
    with served(tmp_path / "log", model, *options, "--port", "0", "--host", "127.0.0.1") as server:
        printed = run(server, "embedding_client", kind, *asked)
    module = example("embedding_client")
    llm = LLM(model, task="embed", chat_template=template, dtype="float32", device="cpu", max_model_len=4096)
    parts = [
        module.image_parts(kind, module.url_of(asked[1])),
        *(module.text_parts(kind, t) for t in ("a star", "a page")),
    ]
    prompts = [{"messages": [{"role": "user", "content": p}], "add_generation_prompt": False} for p in parts]
    mine, *others = (output.outputs.embedding for output in llm.embed(prompts, dimensions=8, use_tqdm=False))
    expected = [sum(a * b for a, b in zip(mine, other, strict=True)) for other in others]
    lines = [line.split("  ") for line in printed.splitlines()]
    assert [line[1:] for line in lines] == [[asked[1], "a star"], [asked[1], "a page"]]
    assert [float(line[0]) for line in lines] == pytest.approx(expected, abs=1e-4)
