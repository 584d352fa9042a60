"""Images by handle: sent once, asked about many times, each client's own, and no more of them than there is room for."""

from __future__ import annotations

import asyncio
import base64
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.pictures import encoded, picture
from tests.server.harness import (
    CHAT,
    EMBEDDINGS,
    answer,
    asks,
    client_of,
    events,
    post,
    refused,
    request,
    run,
    serving,
    tiny,
)
from tests.server.hostile import DAMAGED, PICTURES, data_url
from tests.server.test_app import metrics_of
from vlmfx.errors import EngineFull
from vlmfx.server.image_store import ENTRY_BYTES, MAX_NAMES, ImageStore, StoredImage

IMAGES = "/v1/images"
PNG = encoded(picture(60, 40))
OTHER = encoded(picture(60, 40, seed=1))
ONE, TWO = {"authorization": "Bearer one"}, {"authorization": "Bearer two"}


@pytest.fixture
def service():
    with serving(tiny()) as made:
        yield made
        assert all(not one.num_users for images in made.images._images.values() for one in images.values())


@pytest.fixture(scope="module")
def closed():
    with serving(tiny(), api_keys=("one", "two")) as made:
        yield made


def put(service, blob: bytes = PNG, kind: str = "image/png", headers: Any = None) -> httpx.Response:
    return request(service, "POST", IMAGES, content=blob, headers={**(headers or {}), "content-type": kind})


def handle(service, blob: bytes = PNG, headers: Any = None) -> str:
    response = put(service, blob, headers=headers)
    assert response.status_code == 200, response.text
    return str(response.json()["id"])


def about(*parts: dict[str, Any], text: str = "What is it?", **more: Any) -> dict[str, Any]:
    """`asks`, about other parts than URLs."""
    message = {"role": "user", "content": [*parts, {"type": "text", "text": text}]}
    return {**asks(text), "messages": [message], **more}


def encoded_by(service) -> int:
    """Pictures that the engine has encoded so far."""
    return int(service.engine.engine.metrics()["num_encoded"])


def ref(id: Any) -> dict[str, Any]:
    return {"type": "image_ref", "id": id}


def text_of(body: dict[str, Any]) -> str:
    return str(body["choices"][0]["message"]["content"])


def missing(response: httpx.Response, field: str) -> None:
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (404, "image_not_found", field), response.text


# ---- over HTTP


def test_many_questions_about_one_picture_encode_it_once(service):
    """The answers are those that the picture itself gets."""
    id = handle(service)
    questions = [f"What is at {i}?" for i in range(6)]
    answers = [text_of(answer(service, CHAT, about(ref(id), text=text))) for text in questions]
    assert encoded_by(service) == 1
    assert answers == [text_of(answer(service, CHAT, asks(text, data_url(PNG)))) for text in questions]
    assert encoded_by(service) == 1
    chunks = events(post(service, CHAT, about(ref(id), text=questions[0], stream=True)))
    deltas = [choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"]]
    assert "".join(deltas) == answers[0]
    assert encoded_by(service) == 1
    several = answer(service, CHAT, about(ref(id), ref(handle(service, OTHER)), ref(id)))
    assert (
        several["choices"] == answer(service, CHAT, asks("What is it?", *map(data_url, (PNG, OTHER, PNG))))["choices"]
    )
    assert encoded_by(service) == 2
    found = metrics_of(service)
    assert found["vlmfx:stored_images{}"] == 2
    assert found["vlmfx:stored_image_bytes{}"] == len(PNG) + len(OTHER) + 2 * ENTRY_BYTES
    assert found["vlmfx:stored_image_queries_total{}"] == found["vlmfx:stored_image_hits_total{}"] == 10


def test_what_is_said_of_a_picture(service):
    made = put(service).json()
    assert re.fullmatch("img-[0-9a-f]{32}", made["id"])
    tokens = answer(service, "/tokenize", about(ref(made["id"])) | {"temperature": None, "max_tokens": None})["count"]
    without = answer(service, "/tokenize", about() | {"temperature": None, "max_tokens": None})["count"]
    assert made == {
        "id": made["id"], "object": "image", "created": made["created"], "bytes": len(PNG), "width": 60, "height": 40,
        "num_tokens": made["num_tokens"], "expires_at": made["expires_at"],
    }  # fmt: skip
    assert 0 < made["num_tokens"] < tokens - without + 1
    assert 3595 <= made["expires_at"] - made["created"] <= 3605
    found = request(service, "GET", f"{IMAGES}/{made['id']}").json()
    assert {**found, "expires_at": 0} == {**made, "expires_at": 0}
    assert request(service, "DELETE", f"{IMAGES}/{made['id']}").json() == {
        "id": made["id"],
        "object": "image",
        "deleted": True,
    }
    for method in ("GET", "DELETE"):
        missing(request(service, method, f"{IMAGES}/{made['id']}"), "id")
    missing(post(service, CHAT, about(ref(made["id"]))), "messages[0].content[0].id")
    assert service.images.num_bytes == 0


def test_ways_to_send_one(service):
    id = handle(service)
    assert post(service, IMAGES, {"url": data_url(PNG)}).json()["id"] == id
    assert put(service, kind="IMAGE/jpeg; q=1").json()["id"] == id  # what it is, its bytes say
    assert len(service.images) == 1
    assert handle(service, OTHER) != id
    with serving(tiny()) as another:
        assert handle(another) != id


@pytest.mark.parametrize("name", [*PICTURES, *DAMAGED])
def test_pictures_that_are_none(service, name):
    for response, field in (
        (put(service, {**PICTURES, **DAMAGED}[name]), "body"),
        (post(service, IMAGES, {"url": data_url({**PICTURES, **DAMAGED}[name])}), "url"),
    ):
        assert (response.status_code, response.json()["error"]["param"]) == (400, field), response.text
    assert len(service.images) == service.images.num_bytes == 0


@pytest.mark.parametrize(
    ("body", "field"),
    [({}, "url"), ({"url": 3}, "url"), ({"url": "a.png"}, "url"), ({"url": "/etc/passwd"}, "url"), ({"image": "x"}, "image"),
     ({"url": "http://127.0.0.1/"}, "url"), ({"url": "file:///etc/passwd"}, "url"), ([], "body"),
     ({"url": data_url(encoded(picture(300, 1)))}, "url")],
)  # fmt: skip
def test_bodies_that_are_wrong(service, body, field):
    response = post(service, IMAGES, body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, field), response.text
    assert response.json()["error"]["message"].endswith(".")


def test_types_that_are_none(service):
    for kind in ("text/plain", "multipart/form-data; boundary=x", "application/octet-stream", "images/png", ""):
        assert put(service, kind=kind).status_code == 415
    assert post(service, CHAT, {}, headers={"content-type": "image/png"}).status_code == 415


@pytest.mark.parametrize("id", [None, 3, "", "x" * 257, ["img-1"], {"id": "x"}])
def test_ids_that_are_none(service, id):
    error = refused(service, CHAT, about(ref(id)))
    assert error["param"] == "messages[0].content[0].id"
    if id is not None:
        part = {"type": "image_url", "image_url": None, "uuid": id}
        assert refused(service, CHAT, about(part))["param"] == "messages[0].content[0].uuid"


@pytest.mark.parametrize("id", ["img-" + "0" * 32, "x", "../../etc/passwd", "a b", "%00", "é"])
def test_ids_of_nothing(service, id):
    missing(post(service, CHAT, about(ref(id))), "messages[0].content[0].id")
    missing(post(service, CHAT, about(ref(id), stream=True)), "messages[0].content[0].id")
    missing(
        post(service, CHAT, about({"type": "image_url", "image_url": None, "uuid": id})), "messages[0].content[0].uuid"
    )
    assert service.images.num_queries == 3
    assert service.images.num_hits == 0


def test_ones_images_are_nobody_elses(closed):
    id, other = handle(closed, headers=ONE), handle(closed, headers=TWO)
    assert id != other
    assert len(closed.images) == 2
    for method in ("GET", "DELETE"):
        theirs = request(closed, method, f"{IMAGES}/{id}", headers=TWO)
        nobodys = request(closed, method, f"{IMAGES}/{id[:-1]}x", headers=TWO)
        missing(theirs, "id")
        assert theirs.text.replace(id, "") == nobodys.text.replace(f"{id[:-1]}x", "")
    missing(post(closed, CHAT, about(ref(id)), headers=TWO), "messages[0].content[0].id")
    named = {"type": "image_url", "image_url": {"url": data_url(OTHER)}, "uuid": "mine"}
    assert post(closed, CHAT, about(named), headers=ONE).status_code == 200
    bare = {**named, "image_url": None}
    missing(post(closed, CHAT, about(bare), headers=TWO), "messages[0].content[0].uuid")
    for part in (ref(id), bare):
        assert post(closed, CHAT, about(part), headers=ONE).status_code == 200
    assert request(closed, "POST", IMAGES, content=PNG, headers={"content-type": "image/png"}).status_code == 401


@pytest.mark.parametrize("kind", ["image_url", "image"])
def test_a_uuid_with_pixels_and_then_without(service, kind):
    """As vLLM's clients do it."""
    value: Any = {"url": data_url(PNG)} if kind == "image_url" else data_url(PNG)
    first = answer(service, CHAT, about({"type": kind, kind: value, "uuid": "picture-1"}))
    for part in (
        {"type": kind, kind: None, "uuid": "picture-1"},
        {"type": kind, "uuid": "picture-1"},
        ref("picture-1"),
    ):
        assert answer(service, CHAT, about(part))["choices"] == first["choices"]
    assert encoded_by(service) == 1
    assert request(service, "GET", f"{IMAGES}/picture-1").json()["id"] == handle(service)
    answer(service, CHAT, about({"type": kind, kind: data_url(OTHER), "uuid": "picture-1"}))  # the name moves on
    assert request(service, "GET", f"{IMAGES}/picture-1").json()["id"] == handle(service, OTHER)


@pytest.mark.parametrize("key", ["url", "path"])
def test_a_uuid_beside_a_url_by_transformers_names(service, key):
    """The picture is named, not asked for by its name."""
    part = {"type": "image", key: data_url(PNG), "uuid": "picture-1"}
    first = answer(service, CHAT, about(part))
    assert answer(service, CHAT, about(ref("picture-1")))["choices"] == first["choices"]
    assert encoded_by(service) == 1


@pytest.mark.parametrize("name", ["https://example.com/a.png", "a/b", "/a", "a/", "files"])
def test_names_of_any_characters_are_asked_for(service, name):
    answer(service, CHAT, about({"type": "image_url", "image_url": {"url": data_url(PNG)}, "uuid": name}))
    path = f"{IMAGES}/{quote(name, safe='')}"
    assert request(service, "GET", path).json()["id"] == handle(service)
    assert request(service, "DELETE", path).json()["deleted"]
    missing(request(service, "GET", path), "id")


def test_limits_of_a_prompt_hold_for_handles():
    with serving(tiny(), {"limit_mm_per_prompt": {"image": 2}}) as service:
        id = handle(service)
        assert post(service, CHAT, about(ref(id), ref(id))).status_code == 200
        response = post(service, CHAT, about(ref(id), ref(id), ref(id)))
        assert (response.status_code, response.json()["error"]["param"]) == (400, "multi_modal_data.image")


def test_vectors_of_handles():
    with serving(tiny(), {"task": "embed"}) as service:
        id = handle(service)
        bodies = [
            {"messages": about(part)["messages"]}
            for part in (ref(id), {"type": "image_url", "image_url": {"url": data_url(PNG)}})
        ]
        first, second = (answer(service, EMBEDDINGS, body)["data"][0]["embedding"] for body in bodies)
        assert first == second
        assert answer(service, "/v1/score", {"text_1": {"content": [ref(id)]}, "text_2": {"content": [ref(id)]}})[
            "data"
        ][0]["score"] == pytest.approx(1)


def test_the_most_pixels_of_an_image():
    """By every way that one comes, frames among them."""
    with serving(tiny(), max_image_pixels=60 * 40) as service:
        large = encoded(picture(61, 40))
        jpeg = base64.b64encode(encoded(picture(61, 40), "JPEG")).decode()
        for part in (
            {"type": "image_url", "image_url": {"url": data_url(large)}},
            {"type": "image_url", "image_url": {"url": data_url(large)}, "uuid": "x"},
            {"type": "video_url", "video_url": {"url": f"data:video/jpeg;base64,{jpeg},{jpeg}"}},
        ):
            assert "2400" in refused(service, CHAT, about(part))["message"]
        assert "2400" in put(service, large).json()["error"]["message"]
        assert len(service.images) == 0
        answer(service, CHAT, about({"type": "image_url", "image_url": {"url": data_url(PNG)}}))
        handle(service)


def test_a_server_that_keeps_none():
    with serving(tiny(), max_image_store_bytes=0) as service:
        response = put(service)
        assert (response.status_code, response.json()["error"]["code"]) == (404, "images_not_stored")
        answer(service, CHAT, about({"type": "image_url", "image_url": {"url": data_url(PNG)}, "uuid": "x"}))
        missing(post(service, CHAT, about(ref("x"))), "messages[0].content[0].id")


def test_a_server_with_little_room():
    room = len(PNG) + ENTRY_BYTES
    with serving(tiny(), max_image_store_bytes=room + 10) as service:
        first = handle(service)
        second = handle(service, OTHER)
        missing(post(service, CHAT, about(ref(first))), "messages[0].content[0].id")
        assert post(service, CHAT, about(ref(second))).status_code == 200
        response = put(service, encoded(picture(200, 200)))
        assert (response.status_code, response.json()["error"]["param"]) == (400, "body")
        assert "are kept at most" in response.text
        large = data_url(encoded(picture(200, 200)))
        answer(
            service, CHAT, about({"type": "image_url", "image_url": {"url": large}, "uuid": "x"})
        )  # answered, not kept
        assert service.images.num_bytes <= room + 10


def test_an_image_stays_while_it_is_read(service):
    """Deleted and pushed out, it is still there for the request that began before, and counts until that ends."""
    id = handle(service)
    body = about(ref(id), max_tokens=400, ignore_eos=True, stream=True)

    async def work() -> str:
        async with client_of(service) as client:
            stream = asyncio.ensure_future(client.post(CHAT, json=body))
            while not service.images.num_hits:
                await asyncio.sleep(0.001)
            assert (await client.delete(f"{IMAGES}/{id}")).status_code == 200
            assert stream.done() or service.images.num_bytes == len(PNG) + ENTRY_BYTES
            return str((await stream).text)

    assert run(work).endswith("data: [DONE]\n\n")
    assert service.images.num_bytes == 0


# ---- the store alone


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def kept(store: ImageStore, owner: bytes, size: int, fill: int = 0, name: str | None = None) -> str:
    return store.put(owner, bytes([fill]) * size, width=1, height=1, num_tokens=1, name=name).id


def test_images_expire_when_nobody_uses_them():
    clock = Clock()
    store = ImageStore(10**6, 60, clock)
    old, used = kept(store, b"", 10), kept(store, b"", 10, 1, "name")
    clock.now += 59
    assert store.find(b"", "name") is not None
    clock.now += 2
    assert store.find(b"", old) is None
    image = store.find(b"", used)
    assert image is not None
    assert (image.created, image.used) == (1000, 1061)
    clock.now += 61
    assert len(store) == store.num_bytes == 0
    assert store.find(b"", "name") is None
    assert not store._images
    assert not store._named
    assert not store._owned


def test_the_one_who_has_most_makes_room():
    store = ImageStore(10 * (1000 + ENTRY_BYTES), 60)
    small = kept(store, b"small", 1000)
    ids = [kept(store, b"large", 1000, i) for i in range(20)]
    assert store.find(b"small", small) is not None
    assert [store.find(b"large", id) is not None for id in ids] == [False] * 11 + [True] * 9
    assert len(store) == 10


def test_what_is_read_is_not_dropped_and_a_full_store_says_so():
    store = ImageStore(2 * (100 + ENTRY_BYTES), 60)
    first, second = kept(store, b"", 100), kept(store, b"", 100, 1)
    held = [store.find(b"", id, reads=True) for id in (first, second)]
    with pytest.raises(EngineFull, match="send it again"):
        kept(store, b"", 100, 2)
    assert store.delete(b"", first) is held[0]
    with pytest.raises(EngineFull):
        kept(store, b"", 100, 2)  # it is still read
    assert held[0] is not None
    store.release(held[0])
    kept(store, b"", 100, 2)
    assert len(store) == 2


def test_a_put_that_is_refused_drops_nothing():
    """There is less that may go than it takes: what may go stays."""
    store = ImageStore(3 * (100 + ENTRY_BYTES), 60)
    unread = kept(store, b"other", 100, 0, "name")
    for fill in (1, 2):
        assert store.find(b"large", kept(store, b"large", 100, fill), reads=True) is not None
    for size in (101, 10**5):
        with pytest.raises(EngineFull):
            kept(store, b"third", size)
    assert len(store) == 3
    found = store.find(b"other", "name")
    assert found is not None
    assert found.id == unread


def test_a_deleted_image_counts_for_its_owner_while_it_is_read():
    store = ImageStore(4 * (100 + ENTRY_BYTES), 60)
    held = [store.find(b"large", kept(store, b"large", 100, fill), reads=True) for fill in (0, 1)]
    for image in held:
        assert image is not None
        store.delete(b"large", image.id)
    others, larges = kept(store, b"other", 100, 2), kept(store, b"large", 100, 3)
    kept(store, b"third", 100)  # of large's three only one is not read
    assert store.find(b"other", others) is not None
    assert store.find(b"large", larges) is None
    for image in held:
        assert image is not None
        store.release(image)
    assert store.num_bytes == 2 * (100 + ENTRY_BYTES)


def test_names_are_few_and_one_images_each():
    store = ImageStore(10**6, 60)
    for i in range(MAX_NAMES + 3):
        kept(store, b"", 10, 0, f"name {i}")
    assert [store.find(b"", f"name {i}") is not None for i in range(MAX_NAMES + 3)] == [False] * 3 + [True] * MAX_NAMES
    kept(store, b"", 10, 1, "name 5")
    assert len(store) == 2
    store.delete(b"", "name 6")
    assert [name for _, name in store._named] == ["name 5"]


actions = st.lists(
    st.tuples(
        st.sampled_from(["put", "find", "read", "release", "delete", "wait"]), st.integers(0, 3), st.integers(0, 12)
    ),
    max_size=60,
)


@settings(max_examples=300, deadline=None)
@given(actions)
def test_whatever_is_done_the_bytes_are_right_and_bounded(todo):
    clock = Clock()
    store = ImageStore(5 * ENTRY_BYTES, 60, clock)
    ids: dict[tuple[int, int], str] = {}
    reading: list[StoredImage] = []
    for what, owner, number in todo:
        key = b"%d" % owner
        name = ids.get((owner, number), "none")
        if what == "put":
            num_before = len(store)
            try:
                ids[owner, number] = kept(store, key, 300 * number, number, f"n{number % 4}")
            except EngineFull:
                assert reading
                assert len(store) == num_before
        elif what == "read" and (image := store.find(key, name, reads=True)):
            reading.append(image)
        elif what == "release" and reading:
            store.release(reading.pop())
        elif what == "find":
            store.find(key, name)
        elif what == "delete":
            store.delete(key, name)
        elif what == "wait":
            clock.now += number
        there = [one for images in store._images.values() for one in images.values()]
        owned: Counter[bytes] = Counter()
        for one in {*there, *reading}:
            owned[one.owner] += one.size
        assert store._owned == owned
        assert owned.total() <= store.max_bytes
        assert sorted(name for one in there for name in one.names) == sorted(name for _, name in store._named)
    for image in reading:
        store.release(image)
    clock.now += 61
    assert store.num_bytes == 0


def test_threads_may_share_it():
    store = ImageStore(20 * ENTRY_BYTES, 60)

    def work(number: int) -> None:
        for i in range(300):
            id = kept(store, b"%d" % (number % 2), 10, i % 7, f"{i % 5}")
            image = store.find(b"%d" % (number % 2), id, reads=True)
            if image is not None:
                store.release(image)

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(work, range(8)))
    assert len(store) == 14
    assert store.num_bytes == 14 * (10 + ENTRY_BYTES)


def test_an_id_says_nothing_of_a_picture_to_those_who_have_it():
    ids = {
        ImageStore(10**6, 60).put(owner, PNG, width=1, height=1, num_tokens=1).id
        for owner in (b"", b"1", b"2")
        for _ in range(3)
    }
    assert len(ids) == 9
    assert base64.b16encode(PNG[:4]).decode().lower() not in "".join(ids)
