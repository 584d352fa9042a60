"""The page in a headless Chromium, against servers that are processes of their own."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from tests.server.browser import CHROMIUM, Browser, Page, chromium
from tests.server.harness import DEMO, PICTURE_URL, scenes, serving
from tests.server.test_serve import served
from vlmfx.server.app import create_app

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine; Debian's package is chromium")
ENDED = "document.querySelector('.answer') && !document.querySelector('[aria-busy]')"
# Where the focus is: its id, or its name.
FOCUS = "document.activeElement.id || document.activeElement.getAttribute('aria-label') || document.activeElement.textContent"


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of `vlmfx serve scenes`."""
    arguments = ["scenes", "--port", "0", "--host", "127.0.0.1"]
    with served(tmp_path_factory.mktemp("server") / "log", *arguments) as server:
        yield server.url
        assert "Traceback" not in server.log.read_text()


@dataclass
class Host:
    """A server in a thread of this process, as each process takes seconds to start."""

    url: str
    server: uvicorn.Server
    thread: threading.Thread

    def break_off(self) -> None:
        """End it as a machine that goes down does."""
        connections: Any = list(self.server.server_state.connections)
        self.server.should_exit = self.server.force_exit = True
        for one in connections:
            one.loop.call_soon_threadsafe(one.transport.abort)
        self.thread.join(30)


@contextmanager
def hosted(llm_options: dict[str, Any] | None = None, **options: Any) -> Iterator[Host]:
    with serving(scenes(), llm_options, names=("scenes",), **options) as service, socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(create_app(service), log_config=None, lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            while not server.started:
                assert thread.is_alive()
                time.sleep(0.01)
            yield Host(f"http://127.0.0.1:{listener.getsockname()[1]}", server, thread)
        finally:
            server.should_exit = server.force_exit = True
            thread.join(30)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("chromium")) as made:
        yield made


@pytest.fixture
def page(browser: Browser, url: str) -> Iterator[Page]:
    """The page, ready. Nothing went wrong in it, and no other host was asked."""
    with browser.page(url) as made:
        made.until("document.activeElement?.id === 'question'")
        yield made
        assert made.problems == []
        assert made.hosts == {url}


def add(page: Page, *files: Path) -> None:
    page.choose("#files", *files)
    page.until_text("#pictures li span", "tokens")


def ask(page: Page, text: str) -> str:
    """The answer to a question, once it is whole."""
    number = page.js("document.querySelectorAll('.answer').length")
    page.fill("#question", text)
    page.key("Enter")
    page.until(f"document.querySelectorAll('.answer').length > {number}")
    page.until(ENDED)
    return page.text(".answer .text")


def other_fields(page: Page, **fields: object) -> None:
    page.fill("#other", json.dumps(fields))


def test_a_picture_is_counted_asked_about_and_remembered(page):
    assert page.text("#model") == "scenes"
    add(page, DEMO)
    assert page.text("#pictures li span") == "6 KiB, 83 tokens"
    page.fill("#question", "What colour is the star?")
    page.until_text("#count", "104 tokens of 2048, 83 of the picture")
    page.click("#send")
    page.until(ENDED)
    assert page.text(".answer .text") == "red"
    figures = page.until_text(".figures", "2 tokens to a prompt of 104")
    assert "first token after " in figures
    assert page.js("document.querySelector('.asked img').naturalWidth") == 252
    assert page.text("#status") == "red"  # what a screen reader is told
    assert page.text("#pictures") == ""
    assert ask(page, "Where is the purple heart?") == "bottom left"  # the picture goes along
    assert page.js("document.querySelectorAll('.asked img').length") == 1
    page.fill("#question", "x")
    page.until_text("#count", "148 tokens of 2048, 83 of the picture")
    page.key("Enter")
    page.until(ENDED)
    page.until_text(".figures", "to a prompt of 148")
    page.click("#anew")
    page.until_text("#count", "15 tokens of 2048")
    assert page.js("document.querySelectorAll('.turn').length") == 0
    assert ask(page, "What colour is the star?") != ""
    page.until_text(".figures", "to a prompt of 21")


def test_an_answer_comes_in_parts_with_its_figures_and_can_be_stopped(page):
    other_fields(page, min_tokens=1900)
    add(page, DEMO)
    page.fill("#question", "Describe the picture.")
    page.key("Enter")
    lengths = [page.until("document.querySelector('.answer .text')?.textContent.length")]
    lengths.append(
        page.until(f"((n) => n > {lengths[0]} && n)(document.querySelector('.answer .text').textContent.length)")
    )
    assert page.js("document.querySelector('.answer').getAttribute('aria-busy')") == "true"
    page.until_text(".figures", "tokens/s")
    page.until_text(".answer .text", "A red star")
    page.click("#stop")
    page.until(ENDED)
    assert page.until_text(".figures", "stopped")
    assert page.text(".answer .error") == ""
    page.fill("#other", "")
    assert ask(page, "What colour is the star?")  # what there was of the answer is part of the chat


def test_settings_go_with_the_request(page):
    page.fill("#max_tokens", "3")
    page.fill("#system", "Be short.")
    other_fields(page, min_tokens=3)
    ask(page, "Describe the picture.")
    page.until_text(".figures", "3 tokens to a prompt of")
    assert "cut at the limit" in page.text(".figures")
    page.click("#code-next")
    code = page.js("document.querySelector('#code-text').value")
    for part in ('"max_tokens": 3', '"temperature": 0', '"role": "system", "content": "Be short."', '"min_tokens": 3'):
        assert part in code
    page.click("#close")
    page.fill("#top_p", "7")
    page.until_text("#settings-say", "Top p: ")
    page.click("#show-settings")
    assert page.js("document.querySelector('#settings').hidden") is True
    page.fill("#question", "x")
    page.key("Enter")  # nothing is sent; what is wrong is shown
    page.until("document.activeElement?.id === 'top_p'")
    assert page.js("document.querySelectorAll('.answer').length") == 1
    page.fill("#other", "[1")
    page.until_text("#settings-say", "Other fields: write one JSON object")
    assert page.text("#settings-say").startswith("Top p: ")
    wrong = "[...document.querySelectorAll('[aria-invalid]')].map((one) => one.id)"
    assert page.js(wrong) == ["top_p", "other"]
    page.fill("#top_p", "")
    assert page.js(wrong) == ["other"]
    page.fill("#other", "")
    assert page.js(wrong) == []
    assert page.text("#settings-say") == ""


def test_alerts_are_said_once_and_not_at_each_key(page, tmp_path):
    """A screen reader says an alert whenever its text is set, be it the same text."""
    page.js("""window.said = []; for (const one of document.querySelectorAll("[role=alert], [role=status]"))
        new MutationObserver(() => said.push([one.id, one.textContent])).observe(one, { childList: true })""")
    notes = tmp_path / "notes.txt"
    notes.write_text("none")
    page.choose("#files", notes)
    page.until_text("#warning", "notes.txt: no picture by its type")
    page.fill("#top_p", "7")
    page.until_text("#settings-say", "Top p: ")
    for field in ("#question", "#system"):
        page.fill(field, "a")
        page.type("b")
        page.type("c")
    page.until_text("#count", "tokens of 2048")  # also where a setting is wrong
    said = page.js("said")
    assert [id for id, _ in said] == ["warning", "settings-say"], said


def test_keys_that_an_input_method_takes_are_not_the_pages(page):
    """Enter takes what it offers, and Escape drops it: neither sends or stops."""
    other_fields(page, min_tokens=1900)
    page.fill("#question", "Describe ")
    page.call("Input.imeSetComposition", text="に", selectionStart=1, selectionEnd=1)
    page.key("Enter")
    assert page.js("document.querySelectorAll('.answer').length") == 0
    page.call("Input.imeSetComposition", text="", selectionStart=0, selectionEnd=0)
    page.fill("#question", "Describe the picture.")
    page.key("Enter")
    page.until_text(".figures", "tokens/s")
    page.js("document.querySelector('#question').focus()")
    page.call("Input.imeSetComposition", text="に", selectionStart=1, selectionEnd=1)
    page.key("Escape")
    page.call("Input.imeSetComposition", text="", selectionStart=0, selectionEnd=0)
    length = page.js("document.querySelector('.answer .text').textContent.length")
    page.until(f"document.querySelector('.answer .text').textContent.length > {length} + 20")
    assert page.js("document.querySelector('#stop').hidden") is False
    page.key("Escape")
    page.until_text(".figures", "stopped")


# Names of the files that are read, in place of reading them with nobody looking.
READS = """window.read = []; const own = FileReader.prototype.readAsDataURL;
    FileReader.prototype.readAsDataURL = function (file) { read.push(file.name); own.call(this, file); };"""


def test_pictures_are_pasted_and_dropped(page):
    page.js(
        f"""(async () => {{
            const blob = await (await fetch({json.dumps(page_url(page, "/page/icon.svg"))})).blob();
            const bytes = Uint8Array.from(atob({json.dumps(PICTURE_URL.partition(",")[2])}), (c) => c.charCodeAt(0));
            const give = (kind, event, name, type, content) => {{
                const all = new DataTransfer();
                all.items.add(new File([content], name, {{ type }}));
                const made = kind === "paste" ? new ClipboardEvent("paste", {{ clipboardData: all, bubbles: true, cancelable: true }})
                    : new DragEvent(event, {{ dataTransfer: all, bubbles: true, cancelable: true }});
                document.activeElement.dispatchEvent(made);
                return made.defaultPrevented;
            }};
            window.give = (kind, event, name, type) => give(kind, event, name, type, type === "image/svg+xml" ? blob : bytes);
        }})()"""
    )
    assert page.js("give('paste', 'paste', 'image.png', 'image/png')") is True
    assert page.js("give('drag', 'dragenter', 'image.png', 'image/png')") is False
    assert page.js("document.body.className") == "dropping"
    assert page.js("give('drag', 'dragover', 'image.png', 'image/png')") is True
    assert page.js("give('drag', 'drop', 'image.png', 'image/png')") is True
    assert page.js("document.body.className") == ""
    page.until_text("#pictures li span", "83 tokens")
    page.until_text("#count", "166 of 2 pictures")
    names = page.js("[...document.querySelectorAll('#pictures img')].map((one) => one.alt)")
    assert names == ["image.png", "image-2.png"]  # code reads them by name
    page.js("give('paste', 'paste', 'notes.txt', 'text/plain')")
    assert page.until_text("#warning", "notes.txt").startswith("notes.txt: no picture by its type")
    page.js("give('paste', 'paste', 'drawing.svg', 'image/svg+xml')")
    page.until("document.querySelectorAll('#pictures li').length === 3")
    page.until_text("#pictures li span.error", "image")  # the server's reason
    page.click("#pictures li:last-child button")
    assert page.js(FOCUS) == "question"
    assert ask(page, "Do both pictures show the same number of objects?")


def test_text_is_never_markup(page):
    text = "<img src=x onerror=alert(1)> \"quoted\" $HOME `id` \\ 'é' 🙂"
    ask(page, text)
    assert page.text(".asked .text") == text
    assert page.js("document.querySelectorAll('.turn img').length") == 0


def page_url(page: Page, path: str) -> str:
    return str(page.js(f"new URL({json.dumps(path)}, location.href).href"))


def test_the_code_runs(page, tmp_path):
    picture = tmp_path / "it's $a `picture`.png"
    picture.write_bytes(DEMO.read_bytes())
    other_fields(page, min_tokens=1, stop=["$HOME `id` \\ \"x\" 'y'", "é🙂"])
    add(page, picture)
    assert ask(page, "What colour is the star?") == "red"
    page.click(".answer [aria-label='Code of this request']")
    assert "it's $a `picture`.png" in page.text("#code-needs")
    curl = page.js("document.querySelector('#code-text').value")
    page.js("navigator.clipboard.writeText = async (text) => { window.copied = text; }")
    page.click("#copy")
    page.until_text("#code-says", "Copied.")
    assert page.js("copied") == curl
    page.js("navigator.clipboard.writeText = () => Promise.reject(new Error('no clipboard without TLS'))")
    page.click("#copy")
    page.until("/^(Copied|It is selected)/.test(document.querySelector('#code-says').textContent)")
    chosen = "((one) => one.value.slice(one.selectionStart, one.selectionEnd))(document.querySelector('#code-text'))"
    assert page.js(chosen) == curl
    page.click("input[value=python]")
    python = page.js("document.querySelector('#code-text').value")
    page.key("Escape")
    assert page.js("document.querySelector('#code').open") is False
    options = {"cwd": tmp_path, "capture_output": True, "text": True, "check": False}
    done = subprocess.run(["bash", "-c", curl], **options)
    assert json.loads(done.stdout)["choices"][0]["message"]["content"] == "red", done
    done = subprocess.run([sys.executable, "-c", python], **options)
    assert done.stdout == "red\n", done.stderr


def test_sizes_are_known_before_files_are_read(page):
    sizes = """(async () => {
        const { Picture } = await import("/page/pictures.js");
        const right = [];
        for (let size = 0; size < 5; size++) {
            const picture = new Picture(new File([new Uint8Array(size)], "x.png", { type: "image/png" }), []);
            right.push(picture.url === "" && picture.urlLength === (await picture.read()).length);
        }
        return right;
    })()"""
    assert page.js(sizes) == [True] * 5


# The next files that are chosen are not told of yet.
LATER = """document.querySelector('#files').addEventListener(
    'change', (event) => event.stopImmediatePropagation(), { capture: true, once: true })"""


def test_a_file_that_cannot_be_read(browser, url, tmp_path):
    """It is said so, and the code of the request is there all the same."""
    with browser.page(url) as page:
        page.until("document.activeElement?.id === 'question'")
        ask_about_a_file_that_is_gone(page, tmp_path / "gone.png")
        assert [one for one in page.problems if "blob:" not in one] == []  # there is no picture to show


def ask_about_a_file_that_is_gone(page: Page, gone: Path) -> None:
    gone.write_bytes(DEMO.read_bytes())
    page.js(LATER)
    page.choose("#files", gone)
    gone.unlink()
    page.js("document.querySelector('#files').dispatchEvent(new Event('change'))")
    page.until_text("#pictures li span.error", "gone.png cannot be read; add it again.")
    ask(page, "What colour is the star?")
    assert page.text(".answer .error") == "gone.png cannot be read; add it again."
    for language in ("curl", "python"):
        page.click(".answer [aria-label='Code of this request']")
        page.click(f"input[value={language}]")
        assert "gone.png" in page.js("document.querySelector('#code-text').value")
        page.key("Escape")
        assert page.js("document.querySelector('#code').open") is False
    add(page, DEMO)
    assert ask(page, "What colour is the star?") == "red"


def test_keys_prefixes_and_limits(browser, tmp_path):
    options: Any = {"api_keys": ("key-1",), "root_path": "/llm", "max_body_bytes": 2**20}
    with hosted(**options) as host, browser.page(f"{host.url}/llm/") as page:
        page.until("document.activeElement?.id === 'key'")
        assert page.js("document.querySelector('#ask').hidden") is True
        page.type("wrong")
        page.key("Enter")
        page.until_text("#key-says", "The server does not take this key.")
        page.type("key-1")
        page.key("Enter")
        page.until("document.activeElement?.id === 'question'")
        stored = page.js("[Object.values(sessionStorage), Object.keys(localStorage), document.cookie]")
        assert stored == [["key-1"], [], ""]
        add(page, DEMO)
        assert ask(page, "What colour is the star?") == "red"
        page.click("#code-next")
        assert "key-1" not in page.js("document.querySelector('#code-text').value")
        assert page.text("#code-needs").endswith("The key is to be in VLMFX_API_KEY.")
        page.click("#close")

        page.js("sessionStorage.setItem('vlmfx-key', 'old')")  # a key that is taken back
        page.fill("#question", "What colour is the ring?")
        page.key("Enter")
        assert "no API key that is valid" in page.until_text(".answer .error", "key")
        page.until("document.activeElement?.id === 'key'")
        page.type("key-1")
        page.key("Enter")
        page.until("document.activeElement?.id === 'question'")
        page.click(".answer [aria-label='Try again']")
        page.until_text(".answer .text", "green")
        assert page.js("document.querySelectorAll('.answer').length") == 2
        assert page.js("document.querySelectorAll('.answer .error:not(:empty)').length") == 0
        page.call("Page.reload")
        page.until("document.activeElement?.id === 'question'")  # the key is still there


def test_what_is_too_much_is_neither_read_nor_sent(browser, tmp_path):
    """Two pictures of which each would do."""
    files = [tmp_path / f"{name}.png" for name in ("first", "second")]
    for file in files:
        file.write_bytes(DEMO.read_bytes() + os.urandom(2**19))
    with hosted(max_body_bytes=2**20) as host, browser.page(host.url) as page:
        page.until("document.activeElement?.id === 'question'")
        page.js(READS)
        page.choose("#files", *files)
        assert "the server takes 1.0 MiB; remove a picture" in page.until_text("#warning", "The request has 1.3 MiB")
        assert page.text("#pictures li span") == "518 KiB"
        page.key("Enter")
        assert page.js("document.querySelectorAll('.answer').length") == 0
        assert page.js("read") == []
        page.click("#pictures li button")
        page.until_text("#pictures li span", "83 tokens")
        assert page.text("#warning") == ""
        assert page.js("read") == ["first.png"]

        other_fields(page, wrong=1)
        ask(page, "What colour is the star?")
        other_fields(page)
        add(page, files[1])
        ask(page, "What colour is the star?")
        page.click(".answer [aria-label='Try again']:not([hidden])")
        page.until_text(".answer .error", "the server takes 1.0 MiB; remove a picture, or start a new chat")


def test_errors_stand_by_the_answer_they_belong_to(browser):
    with hosted() as host, browser.page(host.url) as page:
        page.until("document.activeElement?.id === 'question'")
        other_fields(page, temprature=1)
        ask(page, "x")
        assert page.text(".answer .error").startswith("temprature: ")
        assert page.js("document.querySelector('.answer .error').getAttribute('role')") == "alert"
        other_fields(page, min_tokens=1900)
        page.click(".answer [aria-label='Try again']")
        assert page.js(FOCUS) == "stop"  # as from Send: the button itself is gone
        page.until_text(".figures", "tokens/s")
        host.break_off()
        page.until_text(".answer .error", "The connection ended before the answer did.")
        ask(page, "y")
        assert page.text(".answer .error") == "The server cannot be reached; see whether it still runs."
        assert page.js("document.querySelectorAll('.answer .error:not(:empty)').length") == 2


def test_a_model_of_vectors_has_nothing_to_chat_with(browser):
    with hosted({"task": "embed"}) as host, browser.page(host.url) as page:
        says = page.until_text("#notice", "nothing to chat with")
        assert says.startswith("scenes is served for vectors (--task embed)")
        assert page.js("document.querySelector('#ask').hidden") is True
        assert page.problems == []


def test_the_chat_stays_at_its_end_unless_it_is_scrolled(page):
    add(page, DEMO)
    ask(page, "Describe the picture.")
    ask(page, "What colour is the star?")
    rest = "((log) => log.scrollHeight - log.scrollTop - log.clientHeight)(document.querySelector('#log'))"
    page.until(f"{rest} < 2")
    add(page, DEMO)  # what waits takes room from the chat
    page.until(f"{rest} < 2")
    other_fields(page, min_tokens=1900, bad_words=["."], repetition_penalty=1.3)
    page.fill("#question", "Describe the picture.")
    page.key("Enter")
    page.until_text(".figures", "tokens/s")
    page.until(f"{rest} < 2")
    page.js("document.querySelector('#log').scrollTop = 0")
    length = page.js("document.querySelector('.answer:last-child .text').textContent.length")
    page.until(f"document.querySelector('.answer:last-child .text').textContent.length > {length} + 20")
    assert page.js("document.querySelector('#log').scrollTop") == 0
    page.click("#stop")
    page.until(ENDED)


def tab(page: Page, until: str, most: int = 30) -> None:
    """Press Tab until the focus is where it shall be."""
    for _ in range(most):
        if until in page.js(FOCUS):
            return
        page.key("Tab")
    raise AssertionError((until, page.js(FOCUS)))


def test_the_keyboard_is_enough(page):
    page.js(
        "document.querySelector('#files').addEventListener('click', (e) => { e.preventDefault(); window.opened = true; })"
    )
    tab(page, "choose")
    page.key("Enter")
    assert page.js("opened") is True
    page.choose("#files", DEMO)
    page.until_text("#pictures li span", "tokens")
    assert page.js(FOCUS) == "question"
    tab(page, "Remove demo.png")
    page.key("Enter")
    assert page.js("document.querySelectorAll('#pictures li').length") == 0
    assert page.js(FOCUS) == "question"
    page.type("one")
    page.key("Enter", shift=True)
    page.type("two")
    assert page.js("document.activeElement.value") == "one\ntwo"
    tab(page, "other")
    page.type('{"min_tokens": 1900}')
    tab(page, "send", 60)
    page.key("Enter")
    page.until_text(".figures", "tokens/s")
    assert page.js(FOCUS) == "stop"
    page.key("Escape")
    page.until(ENDED)
    page.until_text(".figures", "stopped")
    assert page.js(FOCUS) == "question"
    tab(page, "Code of this request", 60)
    page.key("Enter")
    assert page.js("document.querySelector('#code').open") is True
    tab(page, "close")
    page.key("Enter")
    assert page.js(FOCUS) == "Code of this request"  # back where it was
    tab(page, "anew", 60)
    page.key(" ")
    assert page.js(FOCUS) == "question"
    tab(page, "show-settings", 60)
    page.key(" ")
    assert page.js("[document.querySelector('#settings').hidden, document.activeElement.ariaExpanded]") == [
        True,
        "false",
    ]


NAMELESS = """[...document.querySelectorAll('button, input:not([hidden]), textarea')].filter((one) =>
    !(one.getAttribute('aria-label') || one.labels?.length || one.textContent.trim())).map((one) => one.outerHTML)"""
# Texts whose contrast with what is behind them is too small, and fields whose edge is.
PALE = """(() => {
    const parts = (colour) => colour.match(/[\\d.]+/g).map(Number);
    const linear = (c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
    const light = (colour) => [0.2126, 0.7152, 0.0722].reduce((sum, share, i) => sum + share * linear(parts(colour)[i] / 255), 0);
    const ratio = (a, b) => (Math.max(light(a), light(b)) + 0.05) / (Math.min(light(a), light(b)) + 0.05);
    const behind = (one) => { for (; one; one = one.parentElement) { const c = getComputedStyle(one).backgroundColor;
        if ((parts(c)[3] ?? 1) > 0) return c; } return 'rgb(255, 255, 255)'; };
    const found = [];
    for (const one of document.body.querySelectorAll('*')) {
        if (!one.checkVisibility()) continue;
        const style = getComputedStyle(one), says = [...one.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
        const field = one.matches('input:not([type=radio]), aside textarea, button');
        if ((says || one.matches('input, textarea')) && ratio(style.color, behind(one)) < 4.5) found.push([one.outerHTML, style.color]);
        if (one.placeholder && ratio(getComputedStyle(one, '::placeholder').color, behind(one)) < 4.5) found.push([one.id, 'placeholder']);
        if (field && ratio(style.borderColor, behind(one.parentElement)) < 3) found.push([one.outerHTML, style.borderColor]);
    }
    return found;
})()"""


def test_it_can_be_read_by_day_and_night_on_a_desk_and_on_a_phone(page):
    add(page, DEMO)
    assert ask(page, "Describe the picture.").startswith("A red star at the top left")
    other_fields(page, wrong=1)
    ask(page, "What colour is the star?")
    assert page.text(".answer .error")
    page.choose("#files", DEMO)
    page.until_text("#pictures li span", "tokens")
    grounds = []
    for scheme in ("light", "dark"):
        page.prefer(color_scheme=scheme)
        assert page.js(PALE) == []
        grounds.append(page.js("getComputedStyle(document.body).backgroundColor"))
        assert len(page.picture()) < 150_000
        for size in ((320, 568), (390, 844), (768, 1024), (1100, 760), (1920, 1080)):
            page.resize(*size)
            for hidden in ("true", "false"):
                page.js(f"document.querySelector('#settings').hidden = {hidden}")
                wide = page.js("document.documentElement.scrollWidth")
                assert wide <= size[0], (size, wide)
                below = page.js("document.querySelector('#send').getBoundingClientRect().bottom")
                if size[1] > 600 and hidden == "true":
                    assert below <= size[1], (size, below)  # else it is scrolled to
                assert page.js("document.querySelector('#log').clientHeight") > 100
    assert len(set(grounds)) == 2
    assert page.js(NAMELESS) == []
    busy = "document.querySelector('.answer').setAttribute('aria-busy', 'true');"
    name = "getComputedStyle(document.querySelector('.answer .text'), '::after').animationName"
    assert page.js(busy + name) == "blink"
    page.prefer(reduced_motion="reduce")
    assert page.js(name) == "none"


# What is asked for takes two frames at least, so that what was hidden meanwhile has lost the focus.
SLOW = """window.asked = window.fetch; window.fetch = async (...all) => {
    await new Promise((resolve) => requestAnimationFrame(() => requestAnimationFrame(resolve)));
    return asked(...all);
};"""


def test_a_server_that_is_away_can_be_asked_again(browser, url):
    with browser.page("about:blank") as page:
        page.call("Network.setBlockedURLs", urls=["*/v1/models"])
        page.call("Page.navigate", url=url)
        page.until_text("#notice", "The server cannot be reached")
        page.js("document.querySelector('#notice p').textContent = 'before'")
        page.js(SLOW)
        page.click("#notice button")
        page.until_text("#notice", "The server cannot be reached")  # said again
        assert page.js(FOCUS) == "Try again"
        page.call("Network.setBlockedURLs", urls=[])
        page.click("#notice button")
        page.until("document.activeElement?.id === 'question'")
        assert page.js("document.querySelector('#notice').hidden") is True


def test_time_is_kept(page):
    """The figures are those of the answer: within what can be seen from here."""
    other_fields(page, min_tokens=60)
    page.fill("#max_tokens", "60")
    page.fill("#question", "x")
    start = time.monotonic()
    page.key("Enter")
    page.until(ENDED)
    seconds = time.monotonic() - start
    parts = page.until_text(".figures", "60 tokens").split()
    first, rate = float(parts[3]), float(parts[6])
    assert 0 < first < seconds
    assert 59 / rate < seconds
