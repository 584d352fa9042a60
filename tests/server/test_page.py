"""The page at /: its files, their headers, and that they ship. test_page_in_browser.py uses it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.server.harness import request, serving, tiny
from vlmfx.server.page import FOLDER, endpoints, path_of

ROOT = Path(__file__).parents[2]
FILES = sorted(path.name for path in FOLDER.iterdir() if path.is_file())
CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@pytest.fixture(scope="module")
def service():
    with serving(tiny(), api_keys=("one",), root_path="/llm") as made:
        yield made


@pytest.mark.parametrize("name", FILES)
def test_files_need_no_key_and_carry_their_policy(service, name):
    for prefix in ("", "/llm"):
        response = request(service, "GET", prefix + path_of(name))
        assert response.status_code == 200
        assert response.content == (FOLDER / name).read_bytes()
        assert response.headers["content-security-policy"] == CSP
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["referrer-policy"] == "no-referrer"
    kinds = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
    assert response.headers["content-type"].startswith(kinds[Path(name).suffix])
    known = request(service, "GET", path_of(name), headers={"if-none-match": response.headers["etag"]})
    assert (known.status_code, known.content) == (304, b"")
    assert request(service, "HEAD", path_of(name)).content == b""


@pytest.mark.parametrize(
    "path", ["/page/", "/page", "/page/index.html", "/page/%2e%2e/page.py", "/page/../v1/models", "/index.html"]
)
def test_nothing_else_is_open(service, path):
    assert request(service, "GET", path).status_code == 401
    assert request(service, "GET", path, headers={"authorization": "Bearer one"}).status_code in (200, 404)
    assert request(service, "POST", "/").status_code == 405


def test_the_prefix_without_a_slash_leads_to_the_page(service):
    response = request(service, "GET", "/llm")
    assert (response.status_code, response.headers["location"]) == (307, "/llm/")


@pytest.mark.parametrize(("options", "status"), [({}, 404), ({"api_keys": ("one",)}, 401)])
def test_it_can_be_left_out(options, status):
    with serving(tiny(), page=False, **options) as service:
        for path in endpoints():
            assert request(service, "GET", path).status_code == status


def test_what_the_page_has_to_know_is_in_the_models_card(service):
    card = request(service, "GET", "/v1/models", headers={"authorization": "Bearer one"}).json()["data"][0]
    assert (card["task"], card["max_body_bytes"]) == ("generate", service.options.max_body_bytes)


def test_files_name_no_other_host_and_make_no_markup_of_text():
    assert {"index.html", "app.js", "style.css"} <= set(FILES)
    for name in FILES:
        text = (FOLDER / name).read_text(encoding="utf-8")
        assert set(re.findall(r"\w+://[^\s\"')]+", text)) <= {"http://www.w3.org/2000/svg"}  # a name, not an address
        assert not re.search(r"""["'(]//""", text)
        wrong = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function|localStorage|document\.cookie"
        assert not re.search(wrong, text)
    html = (FOLDER / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)|javascript:", html)


def test_all_that_the_page_names_is_there():
    named = re.findall(r'(?:src|href)="([^"]+)"', (FOLDER / "index.html").read_text(encoding="utf-8"))
    for name in FILES:
        if name.endswith(".js"):
            text = (FOLDER / name).read_text(encoding="utf-8")
            named += [f"page/{found}" for found in re.findall(r'^import .*from "\./(.+)";$', text, re.M)]
            assert len(re.findall(r"^import ", text, re.M)) == len(re.findall(r'^import .*from "\./', text, re.M))
    assert {f"/{name}" for name in named} | {"/"} == set(endpoints())


def test_the_package_has_the_files():
    listed = re.search(r'^"vlmfx\.server" = \["web/\*"\]$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M)
    assert listed is not None
    assert {path.parent for path in FOLDER.rglob("*") if path.is_file()} == {FOLDER}  # web/* is no other folder's files
    assert len(endpoints()) == len(FILES)
