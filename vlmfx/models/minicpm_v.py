"""MiniCPM-V 2.6: SigLIP over an image and its slices, a resampler to 64 rows each, Qwen2.

Source: openbmb/MiniCPM-V-2_6: modeling_minicpmv.py; vllm-project/vllm: vllm/model_executor/models/minicpmv.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vlmfx.models import decoder, qwen2, resampler, siglip
from vlmfx.models.join import forward, is_head_copy_or_buffer, logits, merge, text_inputs
from vlmfx.models.layers import no_extras
from vlmfx.models.validate import one_of, section, supported
from vlmfx.models.vision_inputs import VisionInputs
from vlmfx.models.vit import EncoderConfig
from vlmfx.tree import Tree

__all__ = ["forward", "logits", "merge", "text_inputs"]

KEY_PREFIXES: tuple[tuple[str, str], ...] = ()
SUPPORTED = {"drop_vision_last_layer": False, "slice_mode": True}

extras = no_extras


@dataclass(frozen=True, kw_only=True)
class MiniCPMVConfig:
    """The three parts."""

    text: decoder.DecoderConfig
    vision: EncoderConfig
    resampler: resampler.ResamplerConfig


def config(hf: dict[str, Any]) -> MiniCPMVConfig:
    """The model of a config.json, whose top level holds the text half; other versions share the architecture's name."""
    one_of("version", hf.get("version"), (2.6,))
    supported(hf, SUPPORTED)
    text, vision = qwen2.plain_text_config(hf), siglip.vision_config(section(hf, "vision_config"))
    return MiniCPMVConfig(
        text=text,
        vision=vision,
        resampler=resampler.ResamplerConfig(
            num_queries=hf.get("query_num", 64), hidden_size=text.hidden_size, input_size=vision.hidden_size
        ),
    )


def param_specs(cfg: MiniCPMVConfig) -> Tree:
    """The whole truth about weights."""
    return {
        "vision": siglip.param_specs(cfg.vision, "vpm"),
        "resampler": resampler.param_specs(cfg.resampler, "resampler"),
        "text": decoder.param_specs(cfg.text, "llm.model", "llm.lm_head"),
    }


def is_unused(cfg: MiniCPMVConfig, name: str) -> bool:
    """True for checkpoint names that are right to be there and are not needed: a copy of tied embeddings, buffers."""
    return name == "resampler.pos_embed" or is_head_copy_or_buffer(cfg, name, "llm.lm_head.weight")


def vision_hidden(params: Tree, cfg: MiniCPMVConfig, inputs: VisionInputs) -> Tensor:
    """pixels, position_ids (P, 3) of table row, row and column → the tower's output (P, vision hidden)."""
    p = params["vision"]
    patches = inputs.patches(cfg.vision.patch_size, p["positions"].dtype)
    x = siglip.embed(p, patches, inputs.position_ids[:, 0])
    return siglip.tower(p, cfg.vision, x, inputs.cu_seqlens)


def project(params: Tree, cfg: MiniCPMVConfig, x: Tensor, inputs: VisionInputs) -> Tensor:
    """Tower output → rows of the language model's width, num_queries a slice."""
    positions = inputs.position_ids[:, 1:]
    return resampler.resample(params["resampler"], cfg.resampler, x, positions, inputs.cu_seqlens)


def encode(params: Tree, cfg: MiniCPMVConfig, inputs: VisionInputs) -> Tensor:
    """Images and their slices as pixels → (F, hidden), slice after slice."""
    return project(params, cfg, vision_hidden(params, cfg, inputs), inputs)
