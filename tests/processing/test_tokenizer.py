"""tokenizer: the same ids and text as transformers; pieces of text add up to the whole."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers

from tests.versions import transformers_from
from vlmfx.errors import CheckpointError, InvalidRequest
from vlmfx.processing.detokenizer import IncrementalDetokenizer
from vlmfx.processing.tokenizer import Tokenizer

MODELS = Path(__file__).parents[3] / "shared" / "goldens" / "models"
FOLDERS = sorted(MODELS.glob("*/tokenizer.json"))
needs_goldens = pytest.mark.skipif(not FOLDERS, reason=f"needs the golden checkpoints in {MODELS}")

FRAGMENTS = ["hello", " ", "  ", "\n", "world", "é", "日本", "😀", "▁", "a b", "\t", "<", ">", " x", "<s", "<|", "|>"]
FRAGMENTS += ["!", " .", "'s", "ﬁ", "e\u0301", "\0", "\ufffd", "</s>", "<0x41>"]


def byte_level():
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: i for i, letter in enumerate(letters)} | {"ab": 256, "Ġa": 257, "ð": letters.index("ð")}
    backend = tokenizers.Tokenizer(models.BPE(vocab, [("a", "b"), ("Ġ", "a")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def byte_fallback():
    pieces = ["<unk>", "▁", "a", "b", "▁a", ".", "\ufffd", *(f"<0x{i:02X}>" for i in range(256))]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    backend = tokenizers.Tokenizer(models.BPE(vocab, [("▁", "a")], unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    return backend


def metaspace():
    backend = tokenizers.Tokenizer(models.Unigram([("<unk>", 0.0), ("▁", -1.0), ("▁a", -2.0), ("b", -3.0)], 0, False))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return backend


def word_piece():
    words = ["[UNK]", "a", "##b", ".", "'", "n", "t", "s", "n't", "##'", "?", "m", "##s"]
    backend = tokenizers.Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece(cleanup=False)
    return backend


def with_specials(backend):
    backend.add_special_tokens(["<sp>", "<|end|>"])
    backend.add_tokens(["<plain>"])
    return backend


MADE = {
    "byte_level": Tokenizer(with_specials(byte_level())),
    "byte_fallback": Tokenizer(with_specials(byte_fallback())),
    "metaspace": Tokenizer(with_specials(metaspace())),
    "word_piece": Tokenizer(with_specials(word_piece())),
    "word_piece_cleaned": Tokenizer(with_specials(word_piece()), cleans_up_spaces=True),
}


def pieces_of(tokenizer, ids, skip):
    detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=skip)
    return [*(detokenizer.push(i) for i in ids), detokenizer.finish()]


@pytest.mark.parametrize("name", list(MADE))
@settings(deadline=None, max_examples=200)
@given(data=st.data(), skip=st.booleans())
def test_pieces_add_up_to_the_whole(name, data, skip):
    tokenizer = MADE[name]
    any_id = st.integers(-2, len(tokenizer) + 3)
    few = data.draw(st.lists(any_id, min_size=1, max_size=6))  # repeats make long open runs
    ids = data.draw(st.lists(st.sampled_from(few) | any_id, max_size=60))
    assert "".join(pieces_of(tokenizer, ids, skip)) == tokenizer.decode(ids, skip_special_tokens=skip)


@needs_goldens
@pytest.mark.parametrize("path", FOLDERS, ids=lambda path: path.parent.name)
@settings(deadline=None, max_examples=40)
@given(data=st.data(), skip=st.booleans())
def test_pieces_add_up_to_the_whole_for_the_goldens(path, data, skip):
    tokenizer = Tokenizer.load(path.parent)
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) + 3), max_size=60))
    assert "".join(pieces_of(tokenizer, ids, skip)) == tokenizer.decode(ids, skip_special_tokens=skip)
    ids = tokenizer.encode("".join(data.draw(st.lists(st.sampled_from(FRAGMENTS), max_size=12))))
    assert "".join(pieces_of(tokenizer, ids, skip)) == tokenizer.decode(ids, skip_special_tokens=skip)


def test_pieces_come_early_and_are_final():
    tokenizer = MADE["byte_level"]
    assert pieces_of(tokenizer, tokenizer.encode("ab a😀!"), True) == ["ab", " a", "", "", "", "😀", "!", ""]
    tokenizer = MADE["byte_fallback"]
    assert pieces_of(tokenizer, tokenizer.encode("a aéb"), True) == ["a", " a", "", "", "éb", ""]


@pytest.mark.parametrize("name", list(MADE))
def test_a_step_costs_a_window_not_the_whole(name, monkeypatch):
    tokenizer = MADE[name]
    num_decoded = 0
    decode = Tokenizer.decode_raw

    def counted(self, ids, skip):
        nonlocal num_decoded
        num_decoded += len(ids)
        return decode(self, ids, skip)

    monkeypatch.setattr(Tokenizer, "decode_raw", counted)
    rng = random.Random(0)
    detokenizer = IncrementalDetokenizer(tokenizer)
    invalid = tokenizer.encode("é", add_special_tokens=False)[-1]  # the second half of é, again and again
    ids = [rng.randrange(len(tokenizer)) for _ in range(500)] + [invalid] * 500
    for token_id in ids:
        detokenizer.push(token_id)
    assert num_decoded < 24 * len(ids)  # a whole decode at each step would be 500 * len(ids)


@pytest.mark.parametrize("ids", [[-1], [10**6], [2**32], [2**70], [-(2**70), 0]])
def test_ids_beyond_the_vocabulary_are_nothing(ids):
    for tokenizer in MADE.values():
        known = [i for i in ids if i == 0]
        assert tokenizer.decode(ids) == tokenizer.decode(known) == "".join(pieces_of(tokenizer, ids, True))
        assert tokenizer.id_to_token(ids[0]) is None


def test_lone_surrogates_and_non_strings_are_refused():
    texts: list = ["a\ud800b", 3, None]
    for text in texts:
        with pytest.raises(InvalidRequest):
            MADE["byte_level"].encode(text)


# ---- against transformers


def auto_tokenizer(folder):
    transformers = transformers_from(5, 0, "is older than the version followed (5)")
    return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def assert_same(ours, theirs, num_texts=300):
    rng = random.Random(0)
    fragments = FRAGMENTS + [token.content for token in theirs.added_tokens_decoder.values()]
    assert len(ours) == len(theirs)
    assert ours.special_tokens == theirs.special_tokens_map
    for name in ("bos_token", "eos_token", "pad_token", "bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(ours, name) == getattr(theirs, name)
    for _ in range(num_texts):
        text = "".join(rng.choices(fragments, k=rng.randint(0, 7)))
        for add in (True, False):
            assert ours.encode(text, add_special_tokens=add) == theirs.encode(text, add_special_tokens=add), text
        ids = [rng.randrange(len(theirs) + 70) for _ in range(rng.randint(0, 9))]
        for skip in (True, False):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip), ids
    for i in range(len(ours) + 2):
        assert ours.id_to_token(i) == theirs.convert_ids_to_tokens(i)
    assert all(ours.token_to_id(token) == i for token, i in theirs.get_vocab().items())


@needs_goldens
@pytest.mark.parametrize("path", FOLDERS, ids=lambda path: path.parent.name)
def test_goldens_equal_transformers(path):
    assert_same(Tokenizer.load(path.parent), auto_tokenizer(path.parent))


ADDED = {"content": "<new>", "lstrip": True, "rstrip": False, "normalized": False, "single_word": False}


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"tokenizer_config.json": {"bos_token": "<sp>", "add_bos_token": True, "add_eos_token": True}},
        {"tokenizer_config.json": {"eos_token": {"__type": "AddedToken", "content": "<eos>", "lstrip": True}}},
        {"tokenizer_config.json": {"added_tokens_decoder": {"900": {**ADDED, "special": True}}, "pad_token": "<pad>"}},
        {"tokenizer_config.json": {"added_tokens_decoder": {"900": {**ADDED, "special": False}}}},
        {"tokenizer_config.json": {"additional_special_tokens": ["<x>", "<sp>", "a"], "image_token": "<img>"}},
        {"tokenizer_config.json": {"extra_special_tokens": {"video_token": "<vid>"}, "split_special_tokens": True}},
        {"tokenizer_config.json": {"clean_up_tokenization_spaces": True}},
        {
            "special_tokens_map.json": {"bos_token": {"content": "<b>", "normalized": False}, "unk_token": "<sp>"},
            "added_tokens.json": {"<b>": 901, "<plain2>": 902},
        },
    ],
    ids=lambda files: "+".join(f"{name}:{','.join(content)}" for name, content in files.items()) or "alone",
)
@pytest.mark.parametrize("name", ["byte_level", "byte_fallback", "word_piece"])
def test_config_files_equal_transformers(tmp_path, name, files):
    backend = tokenizers.Tokenizer.from_str(MADE[name].backend.to_str())
    backend.enable_truncation(3)
    backend.enable_padding(length=12, pad_token="<sp>")
    backend.save(str(tmp_path / "tokenizer.json"))
    for file, content in files.items():
        (tmp_path / file).write_text(json.dumps(content))
    if "tokenizer_config.json" not in files:
        (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    (tmp_path / "config.json").write_text('{"model_type": "llava"}')
    theirs = auto_tokenizer(tmp_path)
    ours = Tokenizer.load(tmp_path)
    if theirs.pad_token == "<sp>" and ours.pad_token is None:
        theirs.pad_token = None  # transformers names tokenizer.json's padding token where no config does
        theirs._special_tokens_map.pop("pad_token", None)
    assert_same(ours, theirs, num_texts=60)


@needs_goldens
def test_vocabulary_files_are_converted_by_transformers(tmp_path):
    source = MODELS / "qwen2vl-a"
    model = json.loads((source / "tokenizer.json").read_text())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    for name in ("tokenizer_config.json", "config.json"):
        (tmp_path / name).write_bytes((source / name).read_bytes())
    auto_tokenizer(tmp_path)  # or skip
    assert_same(Tokenizer.load(tmp_path), auto_tokenizer(source), num_texts=60)


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(CheckpointError, match=r"tokenizer\.json, tokenizer\.model, vocab\.json"):
        Tokenizer.load(tmp_path)
    for text in ("{}", "not json", "[]", '"\ud83d"'.encode("utf-8", "surrogatepass")):
        (tmp_path / "tokenizer.json").write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(CheckpointError):
            Tokenizer.load(tmp_path)
    MADE["byte_level"].backend.save(str(tmp_path / "tokenizer.json"))
    for broken in ("{", "[]", '{"added_tokens_decoder": {"x": 1}}', '{"bos_token": {"a": 1}}'):
        (tmp_path / "tokenizer_config.json").write_text(broken)
        with pytest.raises(CheckpointError):
            Tokenizer.load(tmp_path)


def test_neither_torch_nor_transformers_is_imported():
    code = "import sys, vlmfx.processing.tokenizer; assert not {'torch', 'transformers'} & set(sys.modules)"
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root, env={**os.environ, "PYTHONPATH": str(root)})
