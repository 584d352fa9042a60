"""Our side of a comparison: every value on the way from a prompt to its next tokens, under the names that goldens have.

Names are those of tests/goldens/README.md. Views give them the reference's shapes."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence

import torch

from vlmfx.checkpoint import Model
from vlmfx.engine.drain import run
from vlmfx.engine.request import SamplingParams
from vlmfx.engine.sequence import Request
from vlmfx.engine.taps import tap
from vlmfx.models.pooling import normalize, pool
from vlmfx.models.vision_inputs import cumulative
from vlmfx.parity.views import VIEWS, VIEWS_OF_IDS, Values, packed, plain_ids, see
from vlmfx.processing.inputs import ModelInputs

# In the order in which one follows from the others: what departs first is where to look.
STAGES = {
    "ids": r"prompt|input_ids|image_bound",
    "pixels": r"pixel_values(_videos)?|(image|video)_grid_thw|image_sizes(_wh)?|tgt_sizes",
    "vision": r"vision_selected_hidden|(image_|video_)?vision_hidden|patch_plus_position",
    "projected": r"(image|video|deepstack)_embeds",
    "merged": r"inputs_embeds",
    "positions": r"position_ids|rope_deltas",
    "logits": r"prompt_logits|last_logits|last_hidden_state_last_token|pooled|embedding(_\d+)?",
    "greedy": r"greedy_(ids|margins)",
}


def stage_of(name: str) -> str | None:
    """The stage of a value's name, which may be that of one image or slice ("image0.pixel_values"); None for an unknown name."""
    plain = re.sub(r"^(image|slice)\d+\.", "", name)
    return next((stage for stage, pattern in STAGES.items() if re.fullmatch(pattern, plain)), None)


@torch.no_grad()
def stages(model: Model, inputs: ModelInputs, dimensions: Sequence[int] = ()) -> Values:
    """(name, value) of one request up to its logits and embeddings, the model's own by its taps.

    dimensions: the lengths of embeddings asked for, as "embedding_64"."""
    family = model.functions.__name__.rpartition(".")[2]
    yield from VIEWS_OF_IDS.get(family, plain_ids)(model, inputs)
    taps = tap(model, inputs, ("vision", "projected", "merged", "hidden", "logits"))
    if inputs.vision is not None:
        yield from VIEWS.get(family, packed)(model, inputs, inputs.vision, see(model, inputs.vision, taps))
    yield "inputs_embeds", taps["merged"][None]
    if inputs.positions.dim() == 2:  # M-RoPE
        yield "position_ids", inputs.positions[:, None]
        yield "rope_deltas", torch.tensor([[inputs.next_position - len(inputs.token_ids)]])
    else:
        yield "position_ids", inputs.positions[None]
    hidden, logits = taps["hidden"], taps["logits"]
    yield "prompt_logits", logits
    yield "last_logits", logits[-1]
    yield "last_hidden_state_last_token", hidden[-1]
    pooled = pool(hidden, cumulative([len(hidden)]).to(hidden.device), model.pooling)
    yield "pooled", pooled[0]
    yield "embedding", normalize(pooled)[0]
    for size in dimensions:
        yield f"embedding_{size}", normalize(pooled, size)[0]


def greedy(model: Model, inputs: ModelInputs, num_tokens: int) -> Values:
    """greedy_ids and greedy_margins of num_tokens steps through the engine and its cache, or as many as the context allows."""
    params = SamplingParams.greedy(max_tokens=num_tokens, ignore_eos=True, logprobs=2, detokenize=False)
    request = Request.ready(0, inputs, params, time.perf_counter())
    (output,) = run(model, [request], max_num_seqs=1)
    completion = output.outputs[0]
    assert completion.logprobs is not None
    best = [sorted((c.logprob for c in step.values()), reverse=True)[:2] for step in completion.logprobs]
    yield "greedy_ids", torch.tensor(completion.token_ids)
    yield "greedy_margins", torch.tensor([first - second for first, second in best])
