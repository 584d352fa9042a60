"""Taps: the values on a prompt's way through the model, by name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

from torch import Tensor

from vlmfx.checkpoint import Model
from vlmfx.compile import layered
from vlmfx.engine import runner
from vlmfx.errors import InvalidRequest, shown
from vlmfx.models import decoder
from vlmfx.processing.inputs import ModelInputs


def names_of(model: Model) -> list[str]:
    """The names of a model's taps, in the order in which each follows from those before it."""
    layers = [f"layer.{i}" for i in range(model.config.text.num_layers)]
    return ["vision", "projected", "merged", *layers, "hidden", "logits"]


def checked(model: Model, names: Sequence[str] | None) -> tuple[str, ...]:
    """The names, none for None. Raises InvalidRequest for what is no list of names of the model's taps."""
    known = names_of(model)
    names = () if names is None else names
    is_list = isinstance(names, (list, tuple))
    for name in names if is_list else [names]:
        if not is_list or name not in known:
            last = model.config.text.num_layers - 1
            raise InvalidRequest(
                "taps",
                f'found {shown(name)}; pass a list of names out of "vision", "projected", "merged", "layer.0" to "layer.{last}", '
                '"hidden" or "logits".',
                found=name,
                expected=tuple(known),
            )
    return tuple(names)


def tap(model: Model, inputs: ModelInputs, names: Sequence[str], *, max_len: int | None = None) -> dict[str, Tensor]:
    """name → value of one prompt, on the model's device and in its dtype, in the order of `names_of`.

    vision (P, width): the tower's hidden states before the projector, in the tower's order.
    projected (F, row): feature rows as `encode` gives them, or the ready embeddings.
    merged (tokens, hidden): embeddings, with feature rows in their places.
    layer.N (tokens, hidden): the residual stream after decoder layer N, counted from 0, and after what deepstack adds there.
    hidden (tokens, hidden): after the final norm.
    logits (tokens, vocab): after each token.
    What a prompt has not is left out: vision without pixels, projected without images.

    Computed in a pass of the prompt by itself, without a cache, as far as the last of the names and no further. max_len: the most
    tokens that prompt and answer may have, by which Phi-3.5 chooses its rope; by default the prompt's own. Raises InvalidRequest for a
    name that the model has not."""
    known = names_of(model)
    needed = known[: 1 + max(map(known.index, checked(model, names)), default=-1)]
    values = zip(needed, _values(model, inputs, max_len or len(inputs.token_ids)), strict=False)
    return {name: value for name, value in values if name in names and value is not None}


def _values(model: Model, inputs: ModelInputs, max_len: int) -> Iterator[Tensor | None]:
    """The values of `names_of`, each computed when it is asked for; None for those that the prompt has not."""
    f, params, config = model.functions, model.params, model.config
    if inputs.vision is not None:
        vision = inputs.vision.to(model.device)
        hidden = f.vision_hidden(params, config, vision)
        yield hidden
        rows = f.project(params, config, hidden, vision)
    else:
        yield None
        (rows,) = runner.encode(model, [inputs])
    yield rows
    step = runner.with_extras(model, runner.pack([inputs], [rows]), [max_len], [len(inputs.token_ids)])
    entered = layered.enter(f, config, params, decoder.norm_weights(params["text"])[0], step)
    carry = entered.carry
    yield carry.x
    for carry in layered.carries(partial(decoder.block, config.text), params, entered, step.batch, None):
        yield carry.x
    yield carry.h
    yield f.logits(params, config, carry.h)
