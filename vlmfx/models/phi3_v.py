"""Phi-3.5-vision and VLM2Vec-Full: CLIP on crops and on the whole image, learned separators, a two-layer projector, Phi-3.

Source: TIGER-AI-Lab/VLM2Vec: src/model/baseline_backbone/phi3_v/modeling_phi3_v.py."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlmfx.models import clip, decoder, phi3
from vlmfx.models.join import is_head_copy_or_buffer, logits, merge
from vlmfx.models.layers import Batch, Cache, linear, linear_specs
from vlmfx.models.validate import refuse, section, supported
from vlmfx.models.vision_inputs import VisionInputs
from vlmfx.ops.activation import activation
from vlmfx.tree import Tree
from vlmfx.weights import ParamSpec

__all__ = ["logits", "merge"]

KEY_PREFIXES: tuple[tuple[str, str], ...] = ()
AT, TOWER = "model.vision_embed_tokens", "model.vision_embed_tokens.img_processor.vision_model"
MERGE = 2  # patches of a 2 × 2 block become one row

# The published code fixes these sizes, its config.json has none.
VIT_L_14_336 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
EMBEDDING = {
    "embedding_cls": "image",
    "hd_transform_order": "sub_glb",
    "projection_cls": "mlp",
    "use_hd_transform": True,
    "with_learnable_separator": True,
}
IMG_PROCESSOR = {"name": "clip_vision_model", "layer_idx": -2, "type_feature": "patch"}


@dataclass(frozen=True, kw_only=True)
class Phi3VConfig:
    """The two halves; the tower's last layer is not used."""

    text: decoder.DecoderConfig
    vision: clip.ClipConfig

    def __post_init__(self) -> None:
        if self.vision.image_size % (MERGE * self.vision.patch_size):
            expected = f"a multiple of {MERGE} patches of {self.vision.patch_size}"
            refuse("img_processor.vision_config.image_size", self.vision.image_size, expected)

    @property
    def crop_side(self) -> int:
        """Rows and columns of features that one crop has after merging."""
        return self.vision.image_size // self.vision.patch_size // MERGE


def config(hf: dict[str, Any]) -> Phi3VConfig:
    """The model of a config.json."""
    found = section(hf, "img_processor")
    supported(section(hf, "embd_layer"), EMBEDDING, at="embd_layer.")
    supported(found, IMG_PROCESSOR, at="img_processor.")
    vision = section(found, "vision_config", optional=True, at="img_processor.") or VIT_L_14_336
    cfg = Phi3VConfig(text=phi3.text_config(hf), vision=clip.vision_config(vision))
    for key, value in (("image_dim_out", cfg.vision.hidden_size), ("num_img_tokens", cfg.crop_side**2)):
        if found.get(key, value) != value:
            refuse(f"img_processor.{key}", found[key], f"{value}, as the tower has it")
    return cfg


def param_specs(cfg: Phi3VConfig) -> Tree:
    """The whole truth about weights."""
    width, hidden = cfg.vision.hidden_size * MERGE**2, cfg.text.hidden_size
    return {
        "vision": clip.param_specs(cfg.vision, TOWER, cfg.vision.num_layers - 1),
        "projector": {
            "line_end": ParamSpec(
                shape=(1, width), axes=(None, "embed"), sources=((f"{AT}.sub_GN", (1, 1, 1, width)),)
            ),
            "crops_end": ParamSpec(shape=(1, width), axes=(None, "embed"), sources=((f"{AT}.glb_GN", (1, 1, width)),)),
            "up": linear_specs(f"{AT}.img_projection.0", width, hidden, ("mlp", "embed")),
            "down": linear_specs(f"{AT}.img_projection.2", hidden, hidden, ("embed", "mlp")),
        },
        "text": decoder.param_specs(cfg.text, "model", "lm_head"),
    }


def is_unused(cfg: Phi3VConfig, name: str) -> bool:
    """True for checkpoint names that are right to be there and are not needed: the tower's last layer and what follows it, a second
    copy of the embeddings, buffers."""
    layer = re.match(rf"{re.escape(TOWER)}\.encoder\.layers\.([0-9]{{1,4}})\.", name)
    if layer:
        return int(layer[1]) == cfg.vision.num_layers - 1
    if name == f"{AT}.wte.weight" or name.startswith(f"{TOWER}.post_layernorm."):
        return True
    return is_head_copy_or_buffer(cfg, name, "lm_head.weight")


def extras(
    cfg: Phi3VConfig,
    max_lens: Sequence[int],
    seq_lens: Sequence[int],
    num_tokens: int,
    features: Tensor | None,
    feature_index: Tensor | None,
) -> Tree:
    """The rope factors of each token, see `phi3.long_extras`."""
    return phi3.long_extras(cfg.text, max_lens, seq_lens, num_tokens)


def vision_hidden(params: Tree, cfg: Phi3VConfig, inputs: VisionInputs) -> Tensor:
    """Patches of whole images and crops → the tower's features without the class token, (views·num_patches, vision hidden)."""
    patches = inputs.patches(cfg.vision.patch_size, params["vision"]["patch"].dtype)
    (x,) = clip.hidden_states(params["vision"], cfg.vision, patches, (cfg.vision.num_layers - 1,))
    return x[:, 1:].flatten(0, 1)


def project(params: Tree, cfg: Phi3VConfig, x: Tensor, inputs: VisionInputs) -> Tensor:
    """Tower features → feature rows, as the row index arranges crop_side² rows a view and, behind them all at −2 and −1, the
    separators that close a line and the crops."""
    assert inputs.row_index is not None, "the row index arranges crops and separators"
    p, side, width = params["projector"], cfg.crop_side, x.shape[-1]
    blocks = x.view(-1, side, MERGE, side, MERGE, width).transpose(2, 3).reshape(-1, MERGE**2 * width)
    rows = torch.cat((blocks, p["line_end"], p["crops_end"]))
    return linear(p["down"], activation(linear(p["up"], rows), "gelu"))[inputs.row_index]


def encode(params: Tree, cfg: Phi3VConfig, inputs: VisionInputs) -> Tensor:
    """Patches → (F, hidden), image after image: its crops as one picture line by line, a separator, the whole image line by line."""
    return project(params, cfg, vision_hidden(params, cfg, inputs), inputs)


def forward(
    params: Tree, cfg: Phi3VConfig, x: Tensor, positions: Tensor, cache: Cache | None, batch: Batch, extras: Tree
) -> tuple[Tensor, Cache | None]:
    """x (tokens, hidden), positions (tokens,) → hidden states after the final norm, and the cache; extras as `extras` made them."""
    more = text_inputs(cfg, x, extras)
    return decoder.forward(params["text"], cfg.text, x, positions, cache, batch, **more)


def text_inputs(cfg: Phi3VConfig, x: Tensor, extras: Tree) -> dict[str, Tensor | None]:
    """{"factors": (tokens, head_dim/2)} with long rope."""
    return {"factors": extras["factors"].to(x.device)} if cfg.text.long_rope is not None else {}
