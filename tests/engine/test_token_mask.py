"""Masks hold the ids that are in them, in llguidance's layout, and none beyond the vocabulary."""

from hypothesis import given
from hypothesis import strategies as st

from vlmfx.engine.token_mask import Mask, every_token, forbid, mask_of, num_words


def ids_of(mask: Mask) -> set[int]:
    """By definition: token i is bit i % 32 of word i // 32."""
    return {32 * w + bit for w, word in enumerate(mask.tolist()) for bit in range(32) if word >> bit & 1}


IDS = st.lists(st.integers(0, 200), max_size=20)


@given(vocab=st.integers(1, 130), ids=IDS, taken=IDS)
def test_masks_are_sets(vocab, ids, taken):
    mask = mask_of(ids, vocab)
    assert mask.dtype == "int32"
    assert len(mask) == num_words(vocab) == -(-vocab // 32)
    assert ids_of(mask) == {i for i in ids if i < vocab}
    forbid(mask, taken)
    assert ids_of(mask) == {i for i in ids if i < vocab} - set(taken)
    assert ids_of(every_token(vocab)) == set(range(vocab))
