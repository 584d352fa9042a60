"""kernels: what Triton compiled in one folder is found in another, where Triton's own cache manager looks for it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.invariants import is_one_sentence
from vlmfx.compile.kernels import gathered, install
from vlmfx.errors import CheckpointError

knobs = pytest.importorskip("triton.knobs", reason="Triton from 3.6 on")
FILES = {"some.cubin": b"code", "some.json": b"{}"}


def test_kernels_are_found_where_they_were_put(tmp_path, monkeypatch):
    cache = pytest.importorskip("triton.runtime.cache")
    before = knobs.cache.dir
    with gathered(tmp_path / "there"):
        manager = cache.get_cache_manager("0" * 64)
        manager.put_group("some.json", {name: manager.put(data, name) for name, data in FILES.items()})
    assert knobs.cache.dir == before
    assert not any(str(tmp_path) in p.read_text() for p in (tmp_path / "there").rglob("__grp__*"))
    moved = Path(shutil.move(tmp_path / "there", tmp_path / "bundle"))
    monkeypatch.setattr(knobs.cache, "dir", str(tmp_path / "here"))
    for _ in range(2):  # the second time they are there
        install(moved)
        found = cache.get_cache_manager("0" * 64).get_group("some.json")
        assert {name: Path(path).read_bytes() for name, path in found.items()} == FILES
        assert all(Path(path).is_relative_to(tmp_path / "here") for path in found.values())


def test_kernels_that_another_process_puts_there_meanwhile_are_left_as_they_are(tmp_path, monkeypatch):
    here, copytree = tmp_path / "here", shutil.copytree
    (tmp_path / "kernels" / "key").mkdir(parents=True)
    (tmp_path / "kernels" / "key" / "some.cubin").write_bytes(b"code")

    def copied(source: Path, target: Path) -> None:
        copytree(source, target)
        copytree(source, here / "key")
        (here / "key" / "some.cubin").write_bytes(b"of the other")

    monkeypatch.setattr(knobs.cache, "dir", str(here))
    monkeypatch.setattr(shutil, "copytree", copied)
    install(tmp_path / "kernels")
    assert [p.name for p in here.iterdir()] == ["key"]
    assert (here / "key" / "some.cubin").read_bytes() == b"of the other"


def test_a_cache_that_cannot_be_written_is_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "kernels" / "k").mkdir(parents=True)
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setattr(knobs.cache, "dir", str(tmp_path / "file" / "cache"))
    with pytest.raises(CheckpointError, match=r"cannot be put into Triton's cache .*; set TRITON_CACHE_DIR") as caught:
        install(tmp_path / "kernels")
    assert is_one_sentence(caught.value)
