"""The bound of a text's tokens is never more than there are, whatever the text and the tokenizer, and tells a long text without them."""

from __future__ import annotations

import time

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, models, normalizers, pre_tokenizers

from tests.golden_cases import COMMITTED
from tests.processing.test_tokenizer import FRAGMENTS, MADE, byte_fallback, byte_level
from tests.server.harness import scenes
from vlmfx.processing import text_bound
from vlmfx.processing.tokenizer import Tokenizer

MODELS = ["llava-b", "qwen2vl-tiny", "phi3v-tiny", "minicpmv-tiny"]


def with_blanks() -> tokenizers.Tokenizer:
    """Tokens as code models have them: many blanks at once, beside tokens that take blanks with them."""
    backend = byte_level()
    backend.normalizer = normalizers.NFC()
    backend.add_tokens([" " * 128, "=" * 80, "a b"])
    backend.add_special_tokens([AddedToken("<|end|>", rstrip=True), AddedToken("<mask>", lstrip=True)])
    return backend


def metaspace_bpe() -> tokenizers.Tokenizer:
    backend = byte_fallback()
    backend.normalizer = None
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    return backend


def dropping() -> tokenizers.Tokenizer:
    """A vocabulary without most bytes: they become nothing."""
    backend = tokenizers.Tokenizer(models.BPE({"a": 0, "Ġ": 1, "Ġa": 2}, [("Ġ", "a")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return backend


def removing() -> tokenizers.Tokenizer:
    backend = byte_level()
    split = pre_tokenizers.Split(" ", "removed")
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return backend


def of_underscores() -> tokenizers.Tokenizer:
    """Blanks become underscores, of which one token is made."""
    names = [*(f"<0x{byte:02X}>" for byte in range(256)), *("_" * 2**i for i in range(5))]
    merges = [("_" * 2**i, "_" * 2**i) for i in range(4)]
    backend = tokenizers.Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, merges, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="_", prepend_scheme="never", split=False)
    return backend


def stripping() -> tokenizers.Tokenizer:
    """A token that takes blanks with it also where another text becomes it."""
    backend = byte_level()
    backend.normalizer = normalizers.Replace("AA", "<x>")
    backend.add_tokens([AddedToken("<x>", rstrip=True, normalized=True)])
    return backend


def shortening() -> tokenizers.Tokenizer:
    """An expression that drops text of any length."""
    backend = byte_level()
    backend.normalizer = normalizers.Replace(tokenizers.Regex(r"<think>[\s\S]*?</think>"), "")
    return backend


OWN = (with_blanks, metaspace_bpe, dropping, removing, of_underscores, stripping, shortening)
TOKENIZERS = {
    **{name: Tokenizer.load(COMMITTED / "models" / name) for name in MODELS},
    **{make.__name__: Tokenizer(make()) for make in OWN},
    **MADE,
}
MORE = [
    " " * 128,
    " " * 300,
    "=" * 80,
    "<mask>",
    "<|end|>",
    "<|im_end|>",
    "<unk>",
    "\u0301",
    "\u0338",
    "e",
    "\u1fbe\u0344",
]


@st.composite
def texts(draw: st.DrawFn, tokenizer: Tokenizer) -> str:
    """Of this tokenizer's longest tokens, of what is hard for any, and of anything."""
    longest = sorted((t for t in tokenizer.backend.get_vocab() if len(t) > 1), key=lambda t: (len(t), t))[-12:]
    decoded = [tokenizer.decode([i], skip_special_tokens=False) for t in longest if (i := tokenizer.token_to_id(t))]
    piece = st.sampled_from([*decoded, *longest, *FRAGMENTS, *MORE]) | st.text(
        st.characters(exclude_categories=["Cs"]), max_size=6
    )
    parts = draw(st.lists(st.tuples(piece, st.integers(1, 40)), max_size=8))
    return "".join(part * times for part, times in parts)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_no_text_has_fewer_tokens(name, data):
    tokenizer = TOKENIZERS[name]
    text = data.draw(texts(tokenizer))
    number = len(tokenizer.encode(text, add_special_tokens=False))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_bound, "PIECE", data.draw(st.sampled_from([100, text_bound.PIECE])))
        assert tokenizer._bound.least(text, number) <= number


@pytest.mark.parametrize(
    "text",
    [
        "<|end|>" + " " * 10**5,  # one token, however many blanks
        " " * 10**5 + "<mask>",
        "<|end|>\u0338" * 5000,  # the mark stands alone, and is no part of a ≯
        "\u1fbe\u0344" * 5000,  # five bytes that become two
        " " * 128 * 5000,
    ],
)
def test_texts_that_few_tokens_stand_for(text):
    tokenizer = TOKENIZERS["with_blanks"]
    number = len(tokenizer.encode(text, add_special_tokens=False))
    assert tokenizer.least_tokens(text, number) <= number


@pytest.mark.parametrize(
    ("name", "text"),
    [("of_underscores", " " * 4000), ("stripping", "AA" + " \u3000\n" * 4000),
     ("shortening", "<think>" + "abc " * 50_000 + "</think>ok")],
)  # fmt: skip
def test_texts_that_few_tokens_stand_for_by_what_is_done_to_them_first(name, text):
    tokenizer = TOKENIZERS[name]
    number = len(tokenizer.encode(text, add_special_tokens=False))
    assert tokenizer._bound.least(text, len(text)) <= number


@pytest.mark.parametrize("name", [*MODELS, "with_blanks"])
def test_a_text_that_is_all_longest_tokens_fits(name):
    tokenizer = TOKENIZERS[name]
    decoded = (tokenizer.decode([i], skip_special_tokens=False) for i in range(len(tokenizer)))
    text = max(decoded, key=len) * 5000
    number = len(tokenizer.encode(text, add_special_tokens=False))
    assert 0.1 * number < tokenizer.least_tokens(text, number) <= number


@pytest.mark.parametrize("name", [*MODELS, "scenes"])
@pytest.mark.parametrize(
    "words", ["The quick brown fox jumps over the lazy dog. ", "日本語のテキスト、", "  \n", "0123456789"]
)
def test_a_text_of_many_times_the_length_is_told_at_once(name, words):
    tokenizer = scenes().processor.tokenizer if name == "scenes" else TOKENIZERS[name]
    text = words * (2**24 // len(words))
    start = time.perf_counter()
    assert tokenizer.least_tokens(text, 4096) > 4096
    assert time.perf_counter() - start < 2
