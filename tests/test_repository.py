"""What is tracked can be published: no paths of one machine, no huge files, no dead links."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAX_FILE_BYTES = 33_000_000
# An absolute path below one of these names somebody's machine. Put together here so that this file does not match.
MACHINE_PATH = re.compile(rb"(?<![\w.~*})-])/(?:%s)/" % b"|".join([b"work", b"root", b"home", b"Users"]))
CODE = re.compile(r"^ *(```|~~~).*?^ *\1|`[^`\n]*`", flags=re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(<?([^)<>\s]+)>?(?:\s[^)]*)?\)")


def git_files(*options: str) -> list[Path]:
    """Files that `git ls-files` names and that are there (one that was deleted by hand is still listed)."""
    try:
        run = subprocess.run(["git", "ls-files", "-z", *options], cwd=ROOT, capture_output=True, text=True, check=True)
    except FileNotFoundError:
        pytest.skip("git is not installed")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"not a git checkout: {error.stderr.strip()}")
    return [ROOT / name for name in run.stdout.split("\0") if (ROOT / name).is_file()]


def links(markdown: str) -> list[str]:
    """Targets of inline links to other files of the repository, without their #fragment."""
    targets = [unquote(target.partition("#")[0]) for target in LINK.findall(CODE.sub("", markdown))]
    return [target for target in targets if target and not re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*:", target)]


def test_no_tracked_file_names_a_path_of_one_machine():
    found = {
        f"{path.relative_to(ROOT)}:{number}"
        for path in git_files()
        for number, line in enumerate(path.read_bytes().splitlines(), start=1)
        if MACHINE_PATH.search(line)
    }
    assert found == set()


def test_no_tracked_file_is_huge():
    sizes = {str(path.relative_to(ROOT)): path.stat().st_size for path in git_files()}
    assert {name: size for name, size in sizes.items() if size > MAX_FILE_BYTES} == {}


def test_decisions_are_named_by_number_and_title():
    names = [path.name for path in git_files("--cached", "--others", "--exclude-standard", "docs/adr/*.md")]
    assert [name for name in names if not re.fullmatch(r"\d{4}-[a-z0-9]+(-[a-z0-9]+)*\.md", name)] == []


def test_links_between_files_resolve():
    # Also files that are not added yet, so that a page and its link can be written before `git add`; not ignored ones.
    files = set(git_files("--cached", "--others", "--exclude-standard"))
    known = files | {folder for path in files for folder in path.parents if folder.is_relative_to(ROOT)}
    dead = {
        f"{page.relative_to(ROOT)} → {target}"
        for page in files
        if page.suffix == ".md"
        for target in links(page.read_text(encoding="utf-8"))
        if ((ROOT / target.lstrip("/")) if target.startswith("/") else (page.parent / target)).resolve() not in known
    }
    assert dead == set()


def test_the_checks_can_fail():
    named = [b"%s/%s/x" % (before, name) for before in (b"", b" ", b"file://", b'"') for name in (b"work", b"root")]
    assert all(map(MACHINE_PATH.search, named))
    harmless = [b"a/work/b", b"~/work/b", b"https://x.org/home/", b"/workshop/", b"../root/"]
    assert not any(map(MACHINE_PATH.search, harmless))
    page = "[a](b.md#c) ![d](e/f.png 'g') [h](https://x.org) [i](#j) `[k](l.md)`\n```\n[m](n.md)\n```\n[o](p%20q.md)"
    assert links(page) == ["b.md", "e/f.png", "p q.md"]
