"""Host headers: by what names a server that has no key may be asked for."""

from __future__ import annotations

import pytest

from tests.server.harness import CHAT, asks, post, request, serving, tiny
from vlmfx.server.hosts import checked_hosts
from vlmfx.server.options import ServerOptions

GOOD = ("localhost", "LocalHost:8000", "localhost.:80", "vlmfx.localhost:8000", "127.0.0.1", "127.0.0.1:8000", "[::1]:8000", "[::1]",
        "192.168.0.7:8000")  # fmt: skip
BAD = ("evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example", "notlocalhost", "::1", "[::1", "",
       "localhost:80:80", "localhost:x", "[127.0.0.1]", "evil.example#localhost", "localhost@evil.example")  # fmt: skip


@pytest.fixture(scope="module")
def local():
    with serving(tiny(), host="127.0.0.1", allowed_origins=("https://example.com",)) as made:
        yield made


@pytest.mark.parametrize("host", GOOD)
def test_a_local_server_is_asked_for_by_its_own_names(local, host):
    assert request(local, "GET", "/v1/models", headers={"host": host}).status_code == 200


@pytest.mark.parametrize("host", BAD)
def test_another_name_may_be_a_page_that_was_rebound(local, host):
    for method, path in (("GET", "/"), ("GET", "/v1/models"), ("GET", "/health"), ("POST", CHAT), ("OPTIONS", CHAT)):
        response = request(local, method, path, headers={"host": host, "origin": "https://example.com"})
        error = response.json()["error"]
        assert (response.status_code, error["code"]) == (403, "host_not_allowed")
        assert "--allowed-hosts" in error["message"]
        assert error["message"].endswith(".")
    assert local.engine.engine.counters.num_drawn == 0


def test_names_that_were_allowed():
    with serving(tiny(), host="127.0.0.1", allowed_hosts=("GPU-box.example", "other")) as service:
        for host, status in (("gpu-BOX.example:80", 200), ("other", 200), ("localhost", 200), ("gpu.example", 403)):
            assert post(service, CHAT, asks("x", max_tokens=1), headers={"host": host}).status_code == status


@pytest.mark.parametrize(
    ("options", "is_checked"),
    [({}, False), ({"host": "0.0.0.0"}, False), ({"host": "10.0.0.1"}, False), ({"host": "gpu.example"}, False),
     ({"uds": "/s"}, False), ({"host": "localhost"}, True), ({"host": "::1"}, True), ({"host": "127.0.0.2"}, True),
     ({"host": "127.0.0.1", "api_keys": ("k",)}, False), ({"host": "127.0.0.1", "allowed_hosts": ("*",)}, False),
     ({"allowed_hosts": ("a",)}, True), ({"host": "127.0.0.1", "api_keys": ("k",), "allowed_hosts": ("a",)}, True)],
)  # fmt: skip
def test_which_servers_look(options, is_checked):
    assert (checked_hosts(ServerOptions(names=("m",), **options)) is not None) == is_checked
