"""text_config: rope settings under both of their names, and when a head is tied."""

from __future__ import annotations

from typing import Any

import pytest

from vlmfx.errors import CheckpointError
from vlmfx.models import llama, llava, qwen2, qwen3
from vlmfx.models.text_config import is_tied, rope_settings

SIZES = {
    **{"vocab_size": 448, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "rms_norm_eps": 1e-6},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "head_dim": 12},
}
ROPE = {"rope_type": "default", "mrope_section": [2, 2, 2], "mrope_interleaved": True}
TIED = "tie_word_embeddings"


def is_tied_in(family: str, whole: dict[str, Any], text: dict[str, Any]) -> bool:
    """Whether the family's text half is tied by a config with `whole` at its top and `text` in its text_config."""
    hf = {**whole, "text_config": {**SIZES, **text}}
    if family == "llava":
        return llava.config({**hf, "vision_config": {}, "image_token_index": 7}).text.tie_word_embeddings
    hf["text_config"]["rope_scaling"] = ROPE
    return (qwen2 if family == "qwen2" else qwen3).text_config(hf).tie_word_embeddings


@pytest.mark.parametrize("family", ["llava", "qwen2", "qwen3"])
@pytest.mark.parametrize(
    ("whole", "text", "expected"),
    [
        ({}, {}, False),
        ({TIED: True}, {}, True),
        ({}, {TIED: True}, True),
        ({TIED: False}, {TIED: True}, True),  # saved before transformers 5
        ({TIED: True}, {TIED: False}, True),
        ({TIED: None}, {TIED: False}, False),
    ],
)
def test_a_head_is_tied_where_either_half_says_so_but_in_qwen3_the_top_level_first(family, whole, text, expected):
    if family == "qwen3" and whole.get(TIED) is False:
        expected = False
    assert is_tied_in(family, whole, text) is expected


@pytest.mark.parametrize("value", ["yes", 2, []])
def test_a_tie_that_is_no_boolean(value):
    with pytest.raises(CheckpointError, match=r"tie_word_embeddings is .*, expected one of True, False"):
        is_tied({}, {TIED: value})


@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
def test_rope_types(key):
    assert rope_settings({key: None}) == ("default", {})
    assert rope_settings({key: {"type": "su"}}, ("su",)) == ("su", {"type": "su"})
    assert rope_settings({key: {"type": "su", "rope_type": "longrope"}}, ("longrope",))[0] == "longrope"
    with pytest.raises(CheckpointError, match="rope_scaling type is 'yarn', expected one of default"):
        llama.text_config({key: {"rope_type": "yarn"}})
    with pytest.raises(CheckpointError, match=f"{key} is .*, expected an object"):
        rope_settings({key: [1]})
