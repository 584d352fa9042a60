"""Token ids from text and text from token ids, as transformers' AutoTokenizer gives them, without importing it.

Follows huggingface/transformers 5.23: src/transformers/tokenization_utils_base.py and tokenization_utils_tokenizers.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from vlmfx.errors import CheckpointError, InvalidRequest, reason_of
from vlmfx.processing.text_bound import TextBound

# What transformers calls SPECIAL_TOKENS_ATTRIBUTES, in its order.
_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_VOCABULARIES = ("tokenizer.model", "vocab.json", "vocab.txt")  # what transformers can convert
_CLEAN_UP = (" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't")
_CLEAN_UP_SUFFIXES = ("'m", "'s", "'ve", "'re")
UNCLEAN = frozenset(" .?!,'ntmsver")  # every character that clean-up reads or writes


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A checkpoint's tokenizer; frozen, and safe to share between threads."""

    backend: tokenizers.Tokenizer
    special_tokens: dict[str, str] = field(default_factory=dict)  # name → text, what chat templates may refer to
    cleans_up_spaces: bool = False

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """The tokenizer of a checkpoint folder.

        Reads tokenizer.json with tokenizer_config.json, or where that lists no added tokens special_tokens_map.json
        and added_tokens.json. As in transformers 5, tokenizer.json's post-processor decides about bos and eos;
        add_bos_token and add_eos_token are not read beside it. A folder with only tokenizer.model, or vocab.json and
        merges.txt, is converted by transformers. Raises CheckpointError.
        """
        folder = Path(folder)
        if not (folder / "tokenizer.json").is_file():
            return cls._converted(folder)
        config = _read_json(folder / "tokenizer_config.json")
        try:
            backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
            backend.no_truncation()  # tokenizer.json may ask for either; lengths are decided at admission
            backend.no_padding()
            names, missing = _special_and_missing(folder, config, backend.get_added_tokens_decoder())
            backend.add_tokens(missing)
            backend.encode_special_tokens = bool(config.get("split_special_tokens", False))
        except CheckpointError:
            raise
        except Exception as error:  # the tokenizers library raises plain Exception
            raise CheckpointError(
                f"{folder}: its tokenizer cannot be read ({reason_of(error)}); download it again."
            ) from error
        cleans_up = bool(config.get("clean_up_tokenization_spaces")) and type(backend.model).__name__ != "BPE"
        return cls(backend, names, cleans_up)

    @classmethod
    def _converted(cls, folder: Path) -> Tokenizer:
        if not any((folder / name).is_file() for name in _VOCABULARIES):
            looked_for = ", ".join(("tokenizer.json", *_VOCABULARIES))
            raise CheckpointError(f"{folder} holds no tokenizer (looked for {looked_for}); add its tokenizer.json.")
        import transformers  # several seconds: only where there is no tokenizer.json

        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            backend: tokenizers.Tokenizer = tokenizer.backend_tokenizer
            names = {k: str(v) for k, v in tokenizer.special_tokens_map.items() if isinstance(v, (str, AddedToken))}
        except Exception as error:
            reason = reason_of(error)
            message = f"{folder}: transformers cannot convert its tokenizer ({reason}); add its tokenizer.json."
            raise CheckpointError(message) from error
        cleans_up = bool(tokenizer.clean_up_tokenization_spaces) and type(backend.model).__name__ != "BPE"
        return cls(backend, names, cleans_up)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of text; special tokens written in it become their ids. Raises InvalidRequest."""
        _check_unicode(text)
        ids: list[int] = self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def encode_prompt(self, text: str) -> list[int]:
        """`encode` with special tokens, but a text that begins with bos, as some chat templates write it, does not get a second one."""
        has_bos = self.bos_token is not None and text.startswith(self.bos_token)
        return self.encode(text, add_special_tokens=not has_bos)

    def least_tokens(self, text: str, enough: int) -> int:
        """How many tokens of its own a text has at least, told in a fraction of the time that `encode` takes; what is over `enough` is
        not looked for. 0 where that cannot be told. Raises InvalidRequest."""
        _check_unicode(text)
        return self._bound.least(text, enough) if len(text) > enough else 0

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Text of ids; an id beyond the vocabulary (embedding tables are padded) decodes to nothing."""
        return self.cleaned(self.decode_raw(ids, skip_special_tokens))

    def decode_raw(self, ids: Iterable[int], skip_special_tokens: bool) -> str:
        """`decode` before spaces are cleaned up."""
        in_range = [i for i in ids if 0 <= i < 2**32]  # the library drops unknown ids, but fails outside uint32
        text: str = self.backend.decode(in_range, skip_special_tokens=skip_special_tokens)
        return text

    def cleaned(self, text: str) -> str:
        """text without the spaces before signs, for a tokenizer that wants it so."""
        if self.cleans_up_spaces:
            for spaced, joined in (*_CLEAN_UP, *((f" {s}", s) for s in _CLEAN_UP_SUFFIXES)):
                text = text.replace(spaced, joined)
        return text

    def token_to_id(self, token: str) -> int | None:
        """The id of one token's exact text, or None."""
        token_id: int | None = self.backend.token_to_id(token)
        return token_id

    def id_to_token(self, token_id: int) -> str | None:
        """The token as the vocabulary writes it ("▁the", "Ġthe", "<0x0A>"), or None."""
        token: str | None = self.backend.id_to_token(token_id) if 0 <= token_id < 2**32 else None
        return token

    def __len__(self) -> int:
        size: int = self.backend.get_vocab_size(with_added_tokens=True)
        return size

    @property
    def bos_token(self) -> str | None:
        return self.special_tokens.get("bos_token")

    @property
    def eos_token(self) -> str | None:
        return self.special_tokens.get("eos_token")

    @property
    def pad_token(self) -> str | None:
        return self.special_tokens.get("pad_token")

    @property
    def bos_token_id(self) -> int | None:
        return self._id_of("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        return self._id_of("eos_token")

    @property
    def pad_token_id(self) -> int | None:
        return self._id_of("pad_token")

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """The ids that decoding skips."""
        return frozenset(i for i, token in self.backend.get_added_tokens_decoder().items() if token.special)

    @cached_property
    def has_byte_tokens(self) -> bool:
        """Whether "<0x41>" and its like are bytes of a character."""
        return self.backend.decoder is not None and b'"ByteFallback"' in self.backend.decoder.__getstate__()

    @cached_property
    def _bound(self) -> TextBound:
        return TextBound(self.backend)

    def _id_of(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return None if token is None else self.token_to_id(token)


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except (AttributeError, UnicodeError) as error:  # JSON can carry half a surrogate pair, UTF-8 cannot
        message = "the text is not valid Unicode (it has a lone surrogate, or is not a string); remove it."
        raise InvalidRequest("prompt", message, found=type(text).__name__, expected="str") from error


def _special_and_missing(
    folder: Path, config: dict[str, Any], known: dict[int, AddedToken]
) -> tuple[dict[str, str], list[AddedToken]]:
    """Named special tokens, and the tokens of the config files that tokenizer.json's (known) lack or differ from."""
    named = {name: config[name] for name in _NAMES if config.get(name) is not None}
    # Names of a family's own ("image_token") come from keys, or from a dict of extra special tokens.
    own = {k: v for k, v in config.items() if k.endswith("_token") and k not in _NAMES and isinstance(v, (str, dict))}
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    if "added_tokens_decoder" in config:
        by_id = {int(i): _added_token(token) for i, token in config["added_tokens_decoder"].items()}
    else:
        for key, value in _read_json(folder / "special_tokens_map.json").items():
            if key in ("extra_special_tokens", "additional_special_tokens"):
                extra = value
            elif value is not None:
                (named if key in _NAMES else own)[key] = value
        special = {_content(token) for token in (*named.values(), *extra)}
        by_id = {
            index: AddedToken(text, special=text in special, normalized=text not in special)
            for text, index in _read_json(folder / "added_tokens.json").items()
        } | known
    if isinstance(extra, dict):
        own, extra = own | extra, []
    same = {repr(token) for token in known.values()}
    missing = [token for _, token in sorted(by_id.items()) if repr(token) not in same]
    contents = {token.content for token in (*known.values(), *missing)}
    for token in (*named.values(), *own.values(), *extra):
        if _content(token) not in contents:
            missing.append(_added_token(token))
            contents.add(_content(token))
    names = {name: _content(token) for name, token in (named | own).items()}
    for token in missing:
        token.special = token.special or token.content in names.values()
    return names, missing


def _content(token: Any) -> str:
    return str(token["content"] if isinstance(token, dict) else token)


def _added_token(token: Any) -> AddedToken:
    if isinstance(token, dict):
        return AddedToken(**{k: v for k, v in token.items() if k not in ("__type", "id")})
    return AddedToken(token, special=True)


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is no file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON ({reason_of(error)}); download it again.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, expected an object; download it again.")
    return content
