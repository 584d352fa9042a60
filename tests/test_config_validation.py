"""Values of a model folder's JSON files that no model can have, or that vlmfx does not implement, are refused by name at load."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import vlmfx
from tests import invariants
from tests.golden_cases import TINY, load_model
from vlmfx import CheckpointError, InvalidRequest
from vlmfx.device import resolve_device, resolve_dtype
from vlmfx.errors import DeviceError
from vlmfx.processing import qwen2_vl
from vlmfx.processing.embeds import rows_of

CONFIG, PREPROCESSOR, GENERATION = "config.json", "preprocessor_config.json", "generation_config.json"
INDEX = "model.safetensors.index.json"
MROPE = "rope_scaling.mrope_section"
VISION, TEXT = "vision_config.", "text_config."
STEPS = ("do_resize", "do_normalize", "do_rescale", "do_convert_rgb")
DEEP, SIZES = "a deep list", (None, "4", True, 0, -1, 100.5, math.inf, 10**30)

# family → file → dotted key → the values to refuse, each alone
BAD: dict[str, dict[str, dict[str, tuple[Any, ...]]]] = {
    "llava": {
        CONFIG: {
            **{"vision_config": (None, [], "x"), "text_config": (None, [], "x"), TEXT + "rope_scaling": ([1], "x")},
            "architectures": (7, "LlavaForConditionalGeneration", [["x"]], {"a": 1}),
            "projector_hidden_act": ("gelu_new", [], None),
            "vision_feature_select_strategy": ("cls", None, []),
            "vision_feature_layer": ("x", [], [1.5], True, 9),
            **{"image_token_index": (-1, 448, "400"), "eos_token_id": ("2", 2.0, [[2]], True)},
            **{TEXT + key: SIZES for key in ("hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size")},
            **{TEXT + key: SIZES for key in ("max_position_embeddings", "intermediate_size")},
            **{TEXT + "num_key_value_heads": (0, 4, "2", -2), TEXT + "head_dim": (0, 7, "8")},
            TEXT + "rms_norm_eps": ("1e-5", None, 0, math.nan, math.inf),
            TEXT + "rope_theta": ("1e4", 0, -1.0, math.inf),
            **{VISION + "num_attention_heads": (*SIZES, 3), VISION + "image_size": (*SIZES, 83)},
            **{TEXT + "hidden_act": ("gelu", []), VISION + "hidden_act": ("gelu_fast", None, {})},
            VISION + "layer_norm_eps": ("x", 0, None),
        },
        PREPROCESSOR: {
            **dict.fromkeys((*STEPS, "do_center_crop"), (False,)),
            **{"do_pad": (True,), "rescale_factor": (1 / 256, 1, "x")},
            "size": (80, {"shortest_edge": 80}, {"height": 80, "width": 80}, {"height": 84, "width": 84}, None, []),
            "crop_size": (80, {"height": 84, "width": 90}, {}, "84"),
            "resample": (6, -1, "bicubic", None, []),
            "image_mean": (0.5, [0.5], [0.1, 0.2, "x"], [0.1, 0.2, math.nan], None),
            "image_std": ([1, 1, 0], [1, 1], [1, 1, math.inf], [1, 1, True]),
        },
        GENERATION: {"eos_token_id": ("2", [2, None], {"a": 2}), "deep": (DEEP,)},
        INDEX: {"weight_map": ([1], {"a": 7}, {"a": ""}, {"a": "."}, {"a": ".."}, {"a": "a/b"}, {"a": "\0"}, "x")},
    },
    "qwen2_vl": {
        CONFIG: {
            **{"vision_config": (None, [], "x"), "text_config": ([1], "x")},
            "rope_scaling": (None, {}, {"type": "mrope"}),
            MROPE: ([1, 1, 2, 2], [-2, 4, 4], [2.0, 2, 2], "222", [2, 2, 3], [6], None),
            **{"rms_norm_eps": ("1e-6", None, 0), "rope_theta": ("1e6", 0, None)},
            "max_position_embeddings": SIZES,
            **{"num_attention_heads": (*SIZES, 5), "num_key_value_heads": (*SIZES, 3)},
            **{"hidden_act": ("gelu",), "use_sliding_window": (True, 1)},
            **{"eos_token_id": ("382", [1.5]), "image_token_id": (-1, 448, "392")},
            VISION + "num_heads": (*SIZES, 3, 16),
            VISION + "mlp_ratio": (math.inf, math.nan, "4", 0, -1, None),
            VISION + "hidden_size": (*SIZES, 64),
            **{VISION + "hidden_act": ("gelu",), VISION + "in_chans": (1, "3"), "deep": (DEEP,)},
        },
        PREPROCESSOR: {
            **dict.fromkeys(STEPS, (False,)),
            "size": ([1], "x", 7),
            **{"patch_size": (16, "14"), "merge_size": (1, 4), "temporal_patch_size": (1,), "rescale_factor": (1,)},
            **{"min_pixels": (-1, 0, "3136", 3136.5, 2 * 12845056), "max_pixels": (-1, 0, [1], 10**30)},
            **{"resample": (6, "x"), "image_mean": ([0.5] * 4,), "image_std": ([0.0] * 3, None)},
        },
    },
    "qwen2_5_vl": {
        CONFIG: {
            **{"vision_config": (None, [])},
            "rope_scaling": ({"type": "yarn", "factor": 4}, {"type": "mrope"}),
            **{VISION + key: SIZES for key in ("hidden_size", "intermediate_size", "depth", "window_size")},
            **{VISION + "num_heads": (*SIZES, 3, 16), VISION + "out_hidden_size": (*SIZES, 64)},
            **{VISION + "window_size": (27,), VISION + "hidden_act": ("gelu",)},
            VISION + "fullatt_block_indexes": (None, 3, [-1], ["1"], [1.0], [True], [1000]),
            VISION + "tokens_per_second": ("2", 0, 2.5),
        },
        PREPROCESSOR: {"patch_size": (16,), "temporal_patch_size": (1,)},
    },
    "qwen3_vl": {
        CONFIG: {
            **{"vision_config": (None, []), "text_config": (None, [])},
            **{TEXT + key: SIZES for key in ("hidden_size", "num_hidden_layers", "vocab_size", "head_dim")},
            **{TEXT + "num_key_value_heads": (*SIZES, 3), TEXT + "attention_bias": (True,), "image_token_id": (448,)},
            TEXT + "rope_scaling.mrope_interleaved": (False, "no"),
            TEXT + "rope_scaling.mrope_section": ([2, 2, 2], [4, 4], None),
            TEXT + "rope_scaling.rope_type": ("yarn",),
            TEXT + "rope_scaling": ({"rope_type": "default"},),
            TEXT + "rms_norm_eps": (0, None),
            **{VISION + "num_position_embeddings": (*SIZES, 35), VISION + "out_hidden_size": (*SIZES, 64)},
            VISION + "deepstack_visual_indexes": (None, 3, [3], [-1], [2, 0], [0, 0], ["0"], [True]),
            **{VISION + "hidden_act": ("gelu",), VISION + "in_channels": (1,)},
        },
        PREPROCESSOR: {"patch_size": (14,), "merge_size": (1,)},
    },
}
NAMES = {  # else the key's own
    **{"in_chans": "in_channels", "deep": "not readable JSON"},
    **{"rope_scaling": "mrope_section|rope_scaling", "rope_type": "rope_scaling type"},
}
ALSO = {"num_heads": "num_heads|embed_dim", "hidden_size": "hidden_size|head_dim", "num_attention_heads": ".*heads"}
CASES = [
    pytest.param(family, file, key, value, id=f"{family}-{key}-{str(value)[:30]!r}")
    for family, files in BAD.items()
    for file, keys in files.items()
    for key, values in keys.items()
    for value in values
]


@pytest.mark.parametrize(("family", "file", "key", "value"), CASES)
def test_is_refused_at_load(family, file, key, value, tmp_path):
    folder = Path(shutil.copytree(TINY[family], tmp_path / "model"))
    *path, last = key.split(".")
    if file == CONFIG and key == "eos_token_id":
        (folder / GENERATION).unlink()
    inner = content = json.loads((folder / file).read_text(encoding="utf-8"))
    for part in path:
        inner = inner[part]
    inner[last] = value
    text = json.dumps(content).replace(f'"{DEEP}"', "[" * 200_000 + "]" * 200_000)
    (folder / file).write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match=NAMES.get(last, ALSO.get(last, last))) as caught:
        vlmfx.load(folder)
    assert invariants.is_one_sentence(caught.value)


def test_a_layer_without_a_number_is_no_unused_layer():
    model = load_model(TINY["llava"])
    for name in ("x", "", "²", "9" * 5000):
        assert not model.functions.is_unused(model.config, f"vision_tower.vision_model.encoder.layers.{name}.foo")


NO_GPU: list[Any] = [] if torch.cuda.is_available() else ["cuda", torch.device("cuda"), torch.device("cuda:0")]
META = torch.device("meta")


@pytest.mark.parametrize(
    "device", ["cpu:x", "cpu:1", "cuda:99", "meta", META, "tpu", "", "\ud800", 0, [], "mlu:9", *NO_GPU], ids=repr
)
def test_devices_that_are_not_here(device):
    with pytest.raises(DeviceError, match="device"):
        resolve_device(device)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float64, "float64", "", 32, [], {}], ids=repr)
def test_dtypes_that_do_not_compute(dtype):
    with pytest.raises(DeviceError, match="dtype is"):
        resolve_dtype(dtype, torch.device("cpu"), torch.float32)
    assert resolve_device("cpu:0") == resolve_device(torch.device("cpu")) == torch.device("cpu")


ROWS = torch.ones(4, 48)


@pytest.mark.parametrize("value", [ROWS.to_sparse(), ROWS.to(META), ROWS + 0j, ROWS.double() * 1e300, [2**70]])
def test_embeddings_that_hold_no_rows(value):
    with pytest.raises(InvalidRequest, match="embeddings"):
        rows_of(value, 48)


@pytest.mark.parametrize("grid", [ROWS[:1, :3] > 0, ROWS[:1, :3] + 0j, ROWS[:1, :3].int().to(META), 5, [[2**70, 2, 2]]])
def test_grids_of_another_type(grid):
    cfg = load_model(TINY["qwen2_vl"]).processor.config
    with pytest.raises(InvalidRequest, match="expected integers"):
        qwen2_vl.embed_inputs(cfg, {"image_embeds": ROWS, "image_grid_thw": grid})
