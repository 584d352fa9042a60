"""Arguments of `vlmfx serve` and the options they make."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from vlmfx.cli import _parser, main
from vlmfx.errors import InvalidRequest
from vlmfx.processing.images import MAX_PIXELS
from vlmfx.server.arguments import engine_options, media_limits, server_options
from vlmfx.server.options import ServerOptions, keys_of

PAGE = Path(__file__).parents[2] / "docs" / "serve.md"
REFERENCE = [
    "serve microsoft/Phi-3.5-vision-instruct --task generate --trust-remote-code --max-model-len 4096 --limit-mm-per-prompt image=2",
    "serve TIGER-Lab/VLM2Vec-Full --task embedding --trust-remote-code --max-model-len 4096 --chat-template x/vlm2vec.jinja",
    "serve MrLight/dse-qwen2-2b-mrl-v1 --task embedding --trust-remote-code --max-model-len 8192 --chat-template x.jinja",
]
BLOCKS = re.findall(r"^```\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.S | re.M)
SHOWN = [line[6:] for block in BLOCKS for line in block.splitlines() if line.startswith("vlmfx ")]


def options_of(text: str) -> ServerOptions:
    return server_options(_parser().parse_args(shlex.split(text)))


@pytest.mark.parametrize("text", [*REFERENCE, *SHOWN])
def test_commands_of_the_pages_are_right(text):
    assert options_of(text).names[0]


def test_what_is_given_is_what_is_had(monkeypatch):
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    monkeypatch.setenv("VLMFX_API_KEY", "from-env")
    made = options_of(
        "serve m --served-model-name a b --api-key one two --api-key three --port 0 --max-body-mib 2 --drain-timeout 5 "
        """--allowed-origins '["https://x"]' --root-path /p --metrics-prefix vllm --request-timeout 3"""
    )
    assert made.names == ("a", "b")
    assert made.api_keys == ("one", "two", "three", "from-env")
    assert (made.max_body_bytes, made.drain_timeout_s, made.request_timeout_s) == (2 * 2**20, 5.0, 3.0)
    assert (made.allowed_origins, made.allowed_methods, made.root_path) == (("https://x",), ("*",), "/p")
    limits = options_of("serve m --max-connections 7 --header-timeout 2 --max-image-pixels 9 --allowed-hosts a b")
    assert (limits.max_connections, limits.header_timeout_s, limits.max_image_pixels) == (7, 2.0, 9)
    assert limits.allowed_hosts == ("a", "b")
    plain = options_of("serve m")
    assert (plain.max_connections, plain.header_timeout_s, plain.max_image_pixels) == (1024, 30.0, MAX_PIXELS)
    assert (plain.names, plain.api_keys, plain.host, plain.port) == (("m",), ("from-env",), None, 8000)
    assert not plain.allowed_origins
    assert not plain.trust_request_chat_template


def test_keys_of_the_environment():
    assert keys_of(["a", "b", "a"], {"VLLM_API_KEY": "c", "VLMFX_API_KEY": "b"}) == ("a", "b", "c")
    assert keys_of([], {}) == ()
    with pytest.raises(InvalidRequest, match=r"^api_key"):
        ServerOptions(names=("m",), api_keys=keys_of([], {"VLMFX_API_KEY": ""}))


def test_engine_options_are_those_that_are_given():
    args = _parser().parse_args(shlex.split("serve m --max-num-seqs 3 --no-enable-prefix-caching --enforce-eager"))
    assert engine_options(args) == {
        "backend": "auto", "enforce_eager": True, "strict": False, "max_num_seqs": 3, "enable_prefix_caching": False,
    }  # fmt: skip
    assert media_limits(None) == ["image=64,video=8"]
    assert media_limits(["image=2"]) == ["image=64,video=8", "image=2"]


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("--port 70000", "port"),
        ("--allowed-origins https://x", "allowed_origins"),
        ("--allowed-origins 3", "allowed_origins"),
        ("--ssl-keyfile x", "ssl_keyfile"),
        ("--ssl-keyfile x --ssl-certfile y", "ssl_keyfile"),
        ("--api-key ''", "api_key"),
        ("--api-key 'a '", "api_key"),
        ("--api-key é", "api_key"),
        ("--root-path p", "root_path"),
        ("--max-body-mib 0", "max_body_bytes"),
        ("--max-waiting -1", "max_waiting"),
        ("--max-connections 0", "max_connections"),
        ("--header-timeout -1", "header_timeout_s"),
        ("--max-image-pixels 178956971", "max_image_pixels"),
        ("--allowed-hosts https://x", "allowed_hosts"),
        ("--allowed-hosts ''", "allowed_hosts"),
        ("--drain-timeout -1", "drain_timeout_s"),
        ("--served-model-name ''", "served_model_name"),
        ("--tensor-parallel-size 2 --port 0", "tensor_parallel_size"),
        ("--limit-mm-per-prompt sound=1 --port 0", "limit_mm_per_prompt"),
    ],
)
def test_a_wrong_option_is_one_sentence(text, field, capsys):
    assert main(["serve", "scenes", "--host", "127.0.0.1", *shlex.split(text)]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"vlmfx: {field}: ")
    assert error.endswith(".\n")
    assert error.count("\n") == 1


def test_help_imports_no_server_and_no_torch():
    code = "import sys; from vlmfx.cli import main\ntry: main(['serve', '--help'])\nexcept SystemExit: pass\n"
    heavy = "print(sorted({'torch', 'fastapi', 'uvicorn', 'starlette', 'orjson', 'pydantic'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code + heavy], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "--api-key" in done.stdout


def test_what_is_not_installed_is_named():
    code = "import sys; sys.modules['uvicorn'] = None; from vlmfx.cli import main; sys.exit(main(['serve', 'scenes']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "vlmfx: uvicorn is not installed; pip install 'vlmfx[serve]' brings what serving needs.\n"
