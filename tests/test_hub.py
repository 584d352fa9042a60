"""hub: what a name resolves to, what is downloaded and what never is, against a small hub on this machine."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from vlmfx import hub
from vlmfx.errors import CheckpointError

ROOT = Path(__file__).parents[1]
MAIN, OLD = "a" * 40, "b" * 40

WANTED = [
    "config.json",
    "tokenizer.json",
    "tokenizer.model",
    "merges.txt",
    "chat_template.jinja",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "model.safetensors.index.json",
    "1_Pooling/config.json",
]
UNWANTED = [
    "README.md",
    "pytorch_model.bin",
    "model.pt",
    "model.gguf",
    "modeling_custom.py",
    "onnx/model.onnx",
    "onnx/config.json",
    "original/consolidated.00.pth",
    "original/params.json",
    "copy/model.safetensors",
    "copy/deep/config.json",
    "consolidated.safetensors",
    "images/a.png",
]
REPOS = {
    "org/full": {MAIN: [*WANTED, *UNWANTED], OLD: ["config.json", "old.safetensors"]},
    "plain": {MAIN: ["config.json", "model.safetensors"]},
    "org/bin": {MAIN: ["config.json", "pytorch_model-00001-of-00001.bin", "README.md"]},
    "org/empty": {MAIN: ["config.json"]},
    "org/bundle": {MAIN: ["bundle.json", "config.json", "model.safetensors", "programs/decode-1.pt2"]},
    "org/gated": {MAIN: ["config.json", "model.safetensors"]},
}
REVISIONS = {"main": MAIN, "v1.0": OLD, MAIN: MAIN, OLD: OLD}


class Server(ThreadingHTTPServer):
    requests: list[tuple[str, str, str | None]]


class Hub(BaseHTTPRequestHandler):
    """The few routes that snapshot_download asks for; writes down every request."""

    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = unquote(urlsplit(self.path).path).strip("/")
        self.server.requests.append((self.command, path, self.headers.get("Authorization")))
        if "/resolve/" in path:
            repo, rest = path.split("/resolve/")
            revision, name = rest.split("/", 1)
        else:
            repo, _, rest = path.removeprefix("api/models/").partition("/revision/")
            repo, _, tree = repo.partition("/tree/")
            revision, name = rest or tree or "main", None
        if repo not in REPOS:
            return self.fail(404, "RepoNotFound", f"Repository {repo} not found")
        if repo == "org/gated" and self.headers.get("Authorization") != "Bearer hf_good":
            return self.fail(403, "GatedRepo", "Access to model org/gated is restricted")
        commit = REVISIONS.get(revision, "")
        files = REPOS[repo].get(commit)
        if files is None:
            return self.fail(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if name is None and "/tree/" in path:
            entries = [
                {"type": "file", "path": f, "size": len(content(commit, f)), "oid": etag(commit, f)} for f in files
            ]
            return self.reply(json.dumps(entries).encode(), commit)
        if name is None:
            info = {"id": repo, "modelId": repo, "sha": commit, "siblings": [{"rfilename": f} for f in files]}
            return self.reply(json.dumps({**info, "tags": [], "private": False, "downloads": 0}).encode(), commit)
        if name not in files:
            return self.fail(404, "EntryNotFound", "Entry not found")
        return self.reply(content(commit, name), commit, etag(commit, name))

    def fail(self, status, code, message):
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", message)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def reply(self, body, commit, tag=None):
        self.send_response(200)
        self.send_header("X-Repo-Commit", commit)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if tag:
            self.send_header("ETag", f'"{tag}"')
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


def content(commit, name):
    return f"{commit} {name}".encode()


def etag(commit, name):
    body = content(commit, name)
    return hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()


@pytest.fixture
def server():
    server = Server(("127.0.0.1", 0), Hub)
    server.requests = []
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def resolve(server, tmp_path):
    """resolve(...) in a process of its own: huggingface_hub reads its settings when it is imported."""
    code = (
        "import json, sys\nfrom vlmfx import hub\nfrom vlmfx.errors import CheckpointError\n"
        "args, kwargs = json.loads(sys.argv[1])\n"
        "try: print(json.dumps([True, str(hub.resolve(*args, **kwargs))]))\n"
        "except CheckpointError as error: print(json.dumps([False, str(error)]))"
    )

    def run(*args, env=None, **kwargs):
        inherited = {
            k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING")) and "proxy" not in k.lower()
        }
        settings = {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "PYTHONPATH": str(ROOT),
        }
        done = subprocess.run(
            [sys.executable, "-c", code, json.dumps([args, kwargs])],
            env={**inherited, **settings, **(env or {})},
            capture_output=True,
            text=True,
            timeout=120,
            cwd=tmp_path,
        )
        assert done.returncode == 0, done.stderr
        found, text = json.loads(done.stdout.splitlines()[-1])
        return Path(text) if found else text

    return run


def files_in(folder):
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file())


def test_only_data_files_are_fetched_and_offline_finds_them(server, resolve):
    folder = resolve("org/full", token="hf_secret")
    assert files_in(folder) == sorted(WANTED)
    assert (folder / "config.json").read_bytes() == content(MAIN, "config.json")
    asked_for = {path.split(MAIN + "/")[1] for _, path, _ in server.requests if "/resolve/" in path}
    assert asked_for == set(WANTED)
    assert {token for _, _, token in server.requests} == {"Bearer hf_secret"}

    server.requests.clear()
    assert resolve("org/full", env={"HF_HUB_OFFLINE": "1"}) == folder
    assert resolve("org/full", local_files_only=True) == folder
    assert server.requests == []
    server.shutdown()
    server.server_close()
    assert resolve("org/full", env={"HF_HUB_OFFLINE": "1"}) == folder
    assert resolve("org/full") == folder  # the hub is down, the cache is whole
    assert "cannot be reached" in resolve("org/other")


def test_revision_cache_dir_and_short_names(resolve, tmp_path):
    for revision in ("v1.0", OLD):
        folder = resolve("org/full", revision=revision, cache_dir=str(tmp_path / "elsewhere"))
        assert files_in(folder) == ["config.json", "old.safetensors"]
        assert tmp_path / "elsewhere" in folder.parents
    assert files_in(resolve("plain")) == ["config.json", "model.safetensors"]
    message = resolve("org/full", revision="v9")
    assert "'org/full' has no revision 'v9'" in message


def test_no_token_is_sent_without_one(server, resolve):
    resolve("plain")
    assert {token for _, _, token in server.requests} == {None}


def test_gated(resolve):
    assert "is gated; accept its conditions" in resolve("org/gated")
    assert isinstance(resolve("org/gated", token="hf_good"), Path)


def test_repositories_without_safetensors(server, resolve):
    message = resolve("org/bin")
    assert "holds no .safetensors weights, only pytorch_model-00001-of-00001.bin" in message
    assert "save_pretrained" in message
    assert not any(".bin" in path for _, path, _ in server.requests)
    assert "holds no .safetensors weights, and" in resolve("org/empty")
    assert "holds no .safetensors weights" in resolve("org/bin", env={"HF_HUB_OFFLINE": "1"})


def test_what_makes_a_folder_a_bundle_is_written_once():
    sources = (ROOT / "vlmfx").rglob("*.py")
    assert [p.name for p in sources if '"bundle.json"' in p.read_text(encoding="utf-8")] == ["folder.py"]


def test_a_bundle_is_refused_and_its_programs_are_not_fetched(server, resolve):
    assert "'org/bundle' holds a bundle (bundle.json), which is a program and is never run from a hub" in resolve(
        "org/bundle"
    )
    assert not any(path.endswith(".pt2") for _, path, _ in server.requests)


def test_not_found_and_not_cached(resolve):
    message = resolve("org/none")
    assert "'org/none' is neither a local folder nor a model on the hub" in message
    assert "\n" not in message
    assert "is not (wholly) in the local cache" in resolve("plain", env={"HF_HUB_OFFLINE": "1"})
    assert "is not (wholly) in the local cache" in resolve("plain", local_files_only=True)
    for bad in ("a--b", "a..b", "org/name.", "x" * 120):  # the hub's own rules for names
        assert "could not be downloaded" in resolve(bad)


def test_local_folders_come_back_as_they_are(tmp_path, monkeypatch):
    assert hub.resolve(tmp_path) == tmp_path
    assert hub.resolve(str(tmp_path)) == tmp_path
    (tmp_path / "org" / "full").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub.resolve("org/full") == Path("org/full")
    assert hub.resolve(".") == Path(".")


@pytest.mark.parametrize(
    "model",
    [
        "./x",
        "../x",
        "/x/y",
        "~/x",
        "a/b/c",
        "x/",
        "",
        "a b",
        "-x",
        ".x/y",
        "http://h/m",
        Path("x"),
        "a\\b",
        "/" + "x" * 5000,
        "a\0",
    ],
)
def test_paths_that_do_not_exist_are_not_tried_as_hub_ids(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="there is no folder"):
        hub.resolve(model)


def test_a_file_is_not_a_folder(tmp_path):
    path = tmp_path / "model.safetensors"
    path.touch()
    with pytest.raises(CheckpointError, match="is a file"):
        hub.resolve(path)


def test_the_shipped_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "SCENES", tmp_path / "assets" / "scenes")
    with pytest.raises(CheckpointError, match="install vlmfx again"):
        hub.resolve("scenes")
    hub.SCENES.mkdir(parents=True)
    assert hub.resolve("scenes") == hub.SCENES


def test_the_shipped_model_wins_over_a_folder_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scenes").mkdir()
    assert hub.resolve("scenes") == hub.SCENES
    assert hub.resolve("./scenes").resolve() == tmp_path / "scenes"
