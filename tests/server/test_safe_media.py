"""Media that clients send or name cannot harm the server: each gets its own error, which tells nothing, and others their answers."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.golden_cases import EVERY, load_model
from tests.pictures import encoded, picture
from tests.processing import test_media as hosts
from tests.processing.test_media import names as names  # a fixture
from tests.server import hostile
from tests.server.harness import CHAT, COMPLETIONS, asks, client_of, noise_url, run, serving, tiny
from tests.server.hostile import DAMAGED, PICTURES, PNG, SMALL, answer, data_url, redirect
from tests.server.test_serve import served
from vlmfx.server.service import Service

# What no message may hold, unless its own request does.
PRIVATE = (
    "127.0.0.1",
    "169.254",
    "10.9.8.7",
    "secret",
    "/tmp",
    "/usr",
    "/home",
    "/work",
    ".py",
    "Errno",
    "Traceback",
    "0x7f",
    "PIL",
)
TIME_LIMIT_S = "0.5"


@dataclass
class Place:
    """A service that may fetch from one host of this machine, and read below one folder."""

    service: Service
    host: hostile.Host
    url: str
    folder: Path
    expected: dict[str, Any]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("media")
    (folder / "open").mkdir()
    (folder / "secret").mkdir()
    (folder / "secret" / "key.png").write_bytes(PNG)
    (folder / "open" / "a.png").write_bytes(PNG)
    (folder / "open" / "link.png").symlink_to(folder / "secret" / "key.png")
    (folder / "open" / "folder").symlink_to(folder / "secret")
    os.mkfifo(folder / "open" / "pipe.png")
    host = hostile.Host()
    host.answers = {**hostile.ANSWERS, "/good": answer(PNG)}
    host.answers |= {f"/to/{i}": redirect(to) for i, to in enumerate(hostile.REDIRECTS)}
    with hosts.serving(host) as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLMFX_IMAGE_FETCH_TIMEOUT", TIME_LIMIT_S)
        options = {"private_media_hosts": f"127.0.0.1:{server.port}", "allowed_local_media_path": str(folder / "open")}
        with serving(tiny(), options) as service:
            made = Place(service, host, server.url, folder, {})
            made.expected.update(asked(service, asks("What is it?", noise_url())).json())
            yield made


async def post(client: httpx.AsyncClient, body: Any, path: str = CHAT) -> httpx.Response:
    return await client.post(path, json=body)


def asked(service: Service, body: Any) -> httpx.Response:
    """What a client gets that is alone."""
    return run(lambda: post(client_of(service), body))


def harmless(place: Place, *bodies: Any, path: str = CHAT, status: int = 400) -> list[str]:
    """The messages of the errors that bodies get when they are sent at once, while another client is answered as ever."""

    async def work() -> list[httpx.Response]:
        async with client_of(place.service) as client:
            # A salt of its own: nothing of the good answer comes from a cache.
            good = post(client, asks("What is it?", noise_url(), cache_salt=f"{time.monotonic()}"))
            return await asyncio.gather(good, *(post(client, body, path) for body in bodies))

    good, *others = run(work)
    assert good.status_code == 200, good.text
    assert good.json()["choices"] == place.expected["choices"]
    messages = [message_of(one, body, status) for one, body in zip(others, bodies, strict=True)]
    assert place.service.engine.is_alive
    return messages


def message_of(response: httpx.Response, body: Any, status: int = 400) -> str:
    """The message of an error that names its field and tells nothing that the request does not say itself."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    sent = json.dumps(body)
    assert error["param"], error
    assert [word for word in PRIVATE if word in response.text and word not in sent] == [], error
    assert len(error["message"]) < 600
    return str(error["message"])


def with_part(**part: Any) -> dict[str, Any]:
    message = {"role": "user", "content": [part, {"type": "text", "text": "What?"}]}
    return {"messages": [message], "temperature": 0, "max_tokens": 4}


def image(url: str) -> dict[str, Any]:
    return with_part(type="image_url", image_url={"url": url})


def video(url: str) -> dict[str, Any]:
    return with_part(type="video_url", video_url={"url": url})


# ---- addresses


@pytest.mark.parametrize("kind", [image, video])
def test_private_addresses_in_every_spelling(place, kind):
    urls = [f"{scheme}://{host}/latest/meta-data" for host in hosts.PRIVATE for scheme in ("http", "HTTPS")]
    for message in harmless(place, *map(kind, urls)):
        assert "no public address" in message or "no valid host" in message


def test_names_and_passwords_in_urls(place):
    port = place.url.rpartition(":")[2]
    urls = [
        form.format(port=port)
        for form in (
            "http://user@127.0.0.1:{port}/good", "http://good.example@127.0.0.1:{port}/good", "http://127.0.0.1:{port}@good.example/",
            "http://127.0.0.1:{port}\\@good.example/", "http://good.example\\@127.0.0.1:{port}/good", "http://127.0.0.1%00:{port}/good",
            "http://127.0.0.1:{port}/good\r\nX: y", "http:\\\\127.0.0.1:{port}/good", "http:127.0.0.1:{port}/good",
            "http://127.0.0.1:{port} /good", "http://[::1%25lo]:{port}/good", "http://127.0.0.1:{port}#@good.example/\\",
        )
    ]  # fmt: skip
    before = len(place.host.asked)
    harmless(place, *map(image, urls))
    assert len(place.host.asked) == before


def test_a_name_that_turns_private_after_it_was_checked(place, names):
    """Looked up once, it has a public address; looked up again, it would have that of this machine."""

    class Turning(list[str]):
        def __iter__(self) -> Iterator[str]:
            return iter([hosts.PUBLIC] if names[""].count("turning.example") == 1 else ["127.0.0.1"])

    names["turning.example"] = Turning()
    names["inner.example"] = ["10.9.8.7"]
    names["both.example"] = [hosts.PUBLIC, "127.0.0.1"]
    before = len(place.host.asked)
    port = place.url.rpartition(":")[2]
    harmless(place, *(image(f"http://{name}.example:{port}/good") for name in ("turning", "inner", "both")))
    assert len(place.host.asked) == before
    assert names[""].count("turning.example") == 1


def test_redirects_to_private_addresses(place, names):
    names["inner.example"] = ["10.9.8.7"]
    urls = [f"{place.url}/to/{number}" for number in range(len(hostile.REDIRECTS))]
    for message in harmless(place, *map(image, urls)):
        assert "redirects to what is not fetched" in message


# ---- hosts


def test_answers_that_no_picture_comes_of(place):
    start = time.monotonic()
    harmless(place, *(image(place.url + path) for path in hostile.ANSWERS))
    assert time.monotonic() - start < 30


# ---- files


def test_files_that_may_not_be_read_get_one_answer(place):
    root = place.folder.as_uri()
    paths = (
        "open/../secret/key.png", "open/%2e%2e/secret/key.png", "open/..%2fsecret%2fkey.png", "open/%252e%252e/secret/key.png",
        "open/link.png", "open/folder/key.png", "open/pipe.png", "open/none.png", "secret/key.png", "open/a.png%00.jpg", "open",
        "open/%c0%ae%c0%ae/secret/key.png", "open\\..\\secret\\key.png", "open/" + "a" * 5000,
    )  # fmt: skip
    urls = [f"{root}/{path}" for path in paths] + [
        "file:///etc/passwd",
        "file:///proc/self/environ",
        "file:///dev/zero",
    ]
    messages = harmless(place, *map(image, urls), *map(video, urls))
    assert len({message.partition(": ")[2] for message in messages}) == 1
    good = asked(place.service, image(f"{root}/open/a.png"))
    assert good.status_code == 200, good.text


@pytest.mark.parametrize("kind", ["image", "video", "image_embeds", "image_url"])
def test_paths_are_not_read(place, kind):
    for path in ("/etc/passwd", f"{place.folder}/open/a.png", "/etc/passwd.npy", "../secret/key.png", "~/.ssh/id_rsa"):
        harmless(place, with_part(**{"type": kind, kind: path}))


# ---- pictures


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_that_are_none(place, name):
    """By a data: URL, and from a host, where the type that is claimed plays no part."""
    place.host.answers["/picture"] = answer(PICTURES[name], "Content-Type: image/png")
    bodies = [
        image(data_url(PICTURES[name])),
        image(f"{place.url}/picture"),
        video(data_url(PICTURES[name], "video/mp4")),
    ]
    harmless(place, *bodies)
    harmless(place, *({"messages": body["messages"]} for body in bodies), path="/tokenize")


@pytest.mark.parametrize("name", DAMAGED)
def test_pictures_that_are_damaged_behind_their_header(place, name):
    harmless(place, image(data_url(DAMAGED[name])))
    film = asked(place.service, video(data_url(DAMAGED[name], "video/mp4")))
    assert film.status_code in (200, 400), film.text  # of half a GIF there is half a frame to show


def test_a_gif_of_20000_frames(place):
    """As a picture it is its first frame, as a video some of its frames; too large ones are not begun."""
    many = hostile.gif(20_000)
    for body in (image(data_url(many)), video(data_url(many, "video/gif"))):
        start = time.monotonic()
        response = asked(place.service, body)
        assert response.status_code in (200, 400), response.text
        assert time.monotonic() - start < 20
    harmless(place, video(data_url(hostile.gif(20_000, screen=(2000, 2000)), "video/gif")))


# ---- embeddings


def test_embeddings_are_never_unpickled(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for blob in hosts.HARMFUL.values():
        text = base64.b64encode(blob).decode()
        place.host.answers["/embeds"] = answer(blob)
        values = (text, data_url(blob, "application/octet-stream"), f"{place.url}/embeds")
        bodies = [with_part(type="image_embeds", image_embeds=value) for value in values]
        grid = {"image_embeds": text, "image_grid_thw": [[1, 4, 4]]}
        harmless(
            place,
            *bodies,
            with_part(type="image_embeds", image_embeds=grid),
            with_part(type="image_embeds", image_embeds={"image_embeds": 1, "image_grid_thw": text}),
        )
    assert not list(tmp_path.iterdir())


# ---- what the peers had


def test_cve_2025_62164_prompt_embeddings_are_not_loaded(place, tmp_path, monkeypatch):
    """vLLM gave a completion's `prompt_embeds` to torch.load, whose sparse tensors, unchecked since PyTorch 2.8, wrote out of bounds when
    they were made dense. Here there is no such field, and embeddings of images are safetensors or npy."""
    monkeypatch.chdir(tmp_path)
    for name in ("sparse torch.save", "torch.save", "old torch.save", "pickle"):
        text = base64.b64encode(hosts.HARMFUL[name]).decode()
        (message,) = harmless(place, {"prompt": "x", "prompt_embeds": text}, path=COMPLETIONS)
        assert "prompt_embeds" in message
        harmless(place, {"prompt": "x", "prompt_embeds": [text]}, path=COMPLETIONS)
        harmless(place, with_part(type="image_embeds", image_embeds=text))
    assert not list(tmp_path.iterdir())


def test_cve_2025_6242_no_address_is_taken_from_a_url_unchecked(place, names):
    """vLLM's MediaConnector fetched any URL that a client named, the metadata service of a cloud among them, and followed redirects
    without looking where they led. Here each address is checked, before and behind redirects, and `--allowed-media-domains` too."""
    names["inner.example"] = ["10.9.8.7"]
    before = len(place.host.asked)
    urls = (
        "http://169.254.169.254/latest/meta-data/iam/security-credentials/",
        "http://127.0.0.1:1/health",
        "http://inner.example/",
    )
    harmless(place, *map(image, urls), *map(video, urls))
    assert len(place.host.asked) == before
    harmless(place, *(image(f"{place.url}/to/{i}") for i in range(3)))
    options = {"private_media_hosts": place.url.removeprefix("http://"), "allowed_media_domains": ("good.example",)}
    with serving(tiny(), options) as service:
        names["good.example"] = [hosts.PUBLIC]
        response = asked(service, image(f"{place.url}/good"))
        assert "allowed_media_domains" in message_of(response, image(f"{place.url}/good"))


def test_cve_2026_24779_one_parser_reads_a_url(place, names):
    """vLLM checked a URL's host as urllib reads it and fetched it as urllib3 does, which stop at a backslash in different places: of
    http://allowed.example\\@127.0.0.1/ one took the first name, the other the second. Here what is parsed once is what is
    connected to, and a backslash, an @ or a control character is refused."""
    names.update({"good.example": [hosts.PUBLIC]})
    port = place.url.rpartition(":")[2]
    options = {"private_media_hosts": f"127.0.0.1:{port}", "allowed_media_domains": ("good.example",)}
    forms = ("good.example\\@127.0.0.1:{p}", "127.0.0.1:{p}\\@good.example", "good.example@127.0.0.1:{p}", "127.0.0.1:{p}#@good.example",
             "127.0.0.1:{p}?@good.example", "good.example\t@127.0.0.1:{p}", "127.0.0.1:{p}/\\@good.example", "good.example\\.127.0.0.1:{p}",
             "good.example:80@127.0.0.1:{p}", "[good.example]@127.0.0.1:{p}")  # fmt: skip
    before = len(place.host.asked)
    with serving(tiny(), options) as service:
        for form in forms:
            body = image(f"http://{form.format(p=port)}/good")
            message_of(asked(service, body), body)
    assert len(place.host.asked) == before


@pytest.mark.parametrize("family", EVERY)
def test_cve_2026_22773_pictures_of_one_pixel(family):
    """vLLM's Idefics3 took the shape (1, 1, 3) of a picture of one pixel for channels first, counted other patches than it made, and the
    error ended the engine. Here sizes are those of the header, rows (height, width, 3), and each picture is answered or refused."""
    urls = [data_url(blob) for blob in SMALL.values()]
    with serving(load_model(EVERY[family])) as service:

        async def work() -> list[httpx.Response]:
            async with client_of(service) as client:
                return await asyncio.gather(*(post(client, image(url)) for url in urls))

        before = asked(service, image(data_url(PNG))).json()["choices"]
        for response, url in zip(run(work), urls, strict=True):
            if response.status_code != 200:
                message_of(response, url)
        after = asked(service, {**image(data_url(PNG)), "cache_salt": "new"}).json()["choices"]
        assert after == before


def test_cve_2026_5497_frames_in_a_url_are_counted_before_they_are_read(place):
    """vLLM split a data:video/jpeg URL at its commas and decoded every piece, however many there were, until memory ended. Here frames are
    counted first, and all frames of a video have a limit of pixels."""
    frame = base64.b64encode(encoded(picture(16, 16), "JPEG")).decode()
    urls = ["data:video/jpeg;base64," + ",".join([frame] * 20_000), "data:video/jpeg;base64," + "," * 900_000]
    for message in harmless(place, *map(video, urls)):
        assert "expected at most 768" in message
    large = base64.b64encode(hostile.png(13_000, 13_000)).decode()
    shrunk = {"mm_processor_kwargs": {"min_pixels": 784, "max_pixels": 784}}
    (message,) = harmless(place, {**video("data:video/jpeg;base64," + ",".join([large] * 700)), **shrunk})
    assert "700 frames of 13000x13000 pixels" in message
    few = asked(place.service, video("data:video/jpeg;base64," + ",".join([frame] * 4)))
    assert few.status_code == 200, few.text


# ---- all of it at once, by a process of its own


def test_a_server_outlives_all_of_it(tmp_path):
    """Many hostile clients at once, pictures that take hundreds of megabytes among them: good ones are answered, memory is bounded."""
    url = noise_url(168, 168)
    large = [data_url(hostile.large_png(8_000, 8_000 - i)) for i in range(3)]
    bodies = [image(data_url(blob)) for blob in (*PICTURES.values(), *DAMAGED.values(), *SMALL.values())]
    bodies += [image(f"http://{host}/") for host in hosts.PRIVATE[::4]] + [image("file:///etc/passwd")]
    bodies += [video(data_url(hostile.gif(20_000), "video/gif"))]

    async def work(url_of_server: str) -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=url_of_server, timeout=300) as client:
            bad = [asyncio.ensure_future(post(client, {**body, "model": "scenes"})) for body in bodies]
            heavy = [asyncio.ensure_future(post(client, {**image(one), "model": "scenes"})) for one in large]
            good = []
            for number in range(8):
                body = {**asks("What is it?", url, model="scenes", cache_salt=f"{number}")}
                good.append((await post(client, body)).json()["choices"])
            assert all(choices == good[0] for choices in good)
            answers = [*await asyncio.gather(*bad), *await asyncio.gather(*heavy)]
            assert (await client.get("/ready")).status_code == 200
            after = await post(client, asks("What is it?", url, model="scenes", cache_salt="after"))
            assert after.json()["choices"] == good[0]
            return answers

    with served(tmp_path / "log", "scenes", "--port", "0", "--host", "127.0.0.1") as server:
        before = memory_of(server.process.pid, "VmRSS")
        answers = asyncio.run(work(server.url))
        assert {response.status_code for response in answers} <= {200, 400}
        assert memory_of(server.process.pid, "VmHWM") - before < 1200  # one large picture, not all
        assert server.end() == 0
        assert "Traceback" not in server.log.read_text()


def memory_of(process: int, name: str) -> float:
    """MiB of a process, as Linux counts them."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{name}:"))
