"""How the committed goldens were made: `cut` copies cases of a larger set, the others run transformers on a tiny model.

python tests/goldens/make.py cut ../shared/goldens llava-newnames-single llava-batch3
python tests/goldens/make.py qwen2vl        # needs transformers 5.23.0
python tests/goldens/make.py qwen25vl       # as above, and the folder of qwen2vl
python tests/goldens/make.py qwen3vl        # as above

Those of Phi-3.5-vision and MiniCPM-V 2.6 come from remote_code.py.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from torch import Tensor

HERE = Path(__file__).parent
MAX_ELEMENTS = 1000  # of a float tensor; a larger one keeps every step-th element


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(required=True)
    verb = verbs.add_parser("cut", help="copy cases and their model folders, with less of each tensor")
    verb.add_argument("source", type=Path)
    verb.add_argument("cases", nargs="+")
    verb.set_defaults(run=lambda args: cut(args.source, args.cases))
    for tiny in QWEN:
        verb = verbs.add_parser(tiny.name, help=f"weights of models/{tiny.name}-tiny, and its cases")
        verb.set_defaults(run=partial(qwen, tiny))
    args = parser.parse_args()
    args.run(args)


def cut(source: Path, names: list[str]) -> None:
    """Copy cases and their model folders; what the tensors lose, golden.json's `sampled` says."""
    for name in names:
        case, target = source / name, HERE / name
        meta = json.loads((case / "golden.json").read_text(encoding="utf-8"))
        _copy((case / meta["model"]).resolve(), HERE / "models" / Path(meta["model"]).name)
        _copy(case / "input", target / "input")
        write(target, meta, load_file(case / "golden.safetensors"))


def write(target: Path, meta: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """golden.json and golden.safetensors, with float tensors of more than MAX_ELEMENTS sampled."""
    target.mkdir(exist_ok=True)
    kept = {}
    for key, tensor in tensors.items():
        kept[key] = tensor.contiguous()
        step = -(-tensor.numel() // MAX_ELEMENTS)
        if tensor.is_floating_point() and step > 1:
            before = meta["sampled"].get(key, {"shape": list(tensor.shape), "step": 1})
            step += step % 2 == 0  # odd: an even step would visit few columns of a matrix
            kept[key] = tensor.flatten()[::step].contiguous()
            meta["sampled"][key] = {"shape": before["shape"], "step": before["step"] * step}
    save_file(kept, target / "golden.safetensors")
    (target / "golden.json").write_text(json.dumps(meta, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _copy(source: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        shutil.copyfile(path, target / path.name)


# The rest is Qwen. Tokenizer, chat template, preprocessor_config.json and generation_config.json of models/qwen2vl-tiny are
# those of the larger set's qwen2vl-a; config.json and the weights are made here. The later generations take what they
# share from that folder.

QWEN2_VL: dict[str, Any] = {
    "architectures": ["Qwen2VLForConditionalGeneration"],
    "attention_dropout": 0.0,
    "bos_token_id": 380,
    "eos_token_id": 382,
    "vision_start_token_id": 389,
    "vision_end_token_id": 390,
    "vision_token_id": 391,
    "image_token_id": 392,
    "video_token_id": 393,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 32768,
    "max_window_layers": 2,
    "model_type": "qwen2_vl",
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
    "use_cache": True,
    "use_sliding_window": False,
    "vision_config": {
        "depth": 2,
        "embed_dim": 16,
        "hidden_size": 48,
        "in_chans": 3,
        "mlp_ratio": 4,
        "model_type": "qwen2_vl",
        "num_heads": 2,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "temporal_patch_size": 2,
    },
    "rope_scaling": {"type": "mrope", "mrope_section": [2, 2, 2]},
    "vocab_size": 448,
    "hidden_size": 48,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}

SHARED_KEYS = (
    "bos_token_id",
    "eos_token_id",
    "vision_start_token_id",
    "vision_end_token_id",
    "image_token_id",
    "video_token_id",
)
QWEN25_VL: dict[str, Any] = {
    **QWEN2_VL,
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "model_type": "qwen2_5_vl",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vision_config": {
        "depth": 3,
        "fullatt_block_indexes": [1],
        "hidden_act": "silu",
        "hidden_size": 16,
        "in_chans": 3,
        "intermediate_size": 40,
        "model_type": "qwen2_5_vl",
        "num_heads": 2,
        "out_hidden_size": 48,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "temporal_patch_size": 2,
        "tokens_per_second": 2,
        "window_size": 56,
    },
}
QWEN3_VL: dict[str, Any] = {
    **{key: QWEN2_VL[key] for key in SHARED_KEYS},
    "architectures": ["Qwen3VLForConditionalGeneration"],
    "model_type": "qwen3_vl",
    "tie_word_embeddings": True,
    "text_config": {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 380,
        "dtype": "bfloat16",
        "eos_token_id": 382,
        "head_dim": 16,
        "hidden_act": "silu",
        "hidden_size": 48,
        "initializer_range": 0.02,
        "intermediate_size": 48,
        "max_position_embeddings": 32768,
        "model_type": "qwen3_vl_text",
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {"mrope_interleaved": True, "mrope_section": [4, 2, 2], "rope_type": "default"},
        "rope_theta": 5000000,
        "tie_word_embeddings": True,
        "use_cache": True,
        "vocab_size": 448,
    },
    "vision_config": {
        "deepstack_visual_indexes": [0, 2],
        "depth": 3,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": 16,
        "in_channels": 3,
        "initializer_range": 0.02,
        "intermediate_size": 40,
        "model_type": "qwen3_vl",
        "num_heads": 2,
        "num_position_embeddings": 36,
        "out_hidden_size": 48,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    },
}
QWEN3_VL_PREPROCESSOR: dict[str, Any] = {
    "size": {"longest_edge": 16777216, "shortest_edge": 1024},
    "patch_size": 16,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "processor_class": "Qwen3VLProcessor",
    "image_processor_type": "Qwen2VLImageProcessorFast",
}
# As the published one in short: no system message of its own.
QWEN3_VL_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|>"
    "<|vision_end|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

MIN_MARGIN = 0.01
NUM_TOKENS = 20
TWO_IMAGES = (
    "two images of different size, text after; all prompt logits",
    [([(120, 90), (50, 130)], "Which of the two images is larger?")],
)
# Sizes that are not resized: Pillow 11 and 12 differ in a pixel or two of others that Qwen3-VL enlarges.
TWO_WHOLE_IMAGES = (TWO_IMAGES[0], [([(128, 96), (64, 160)], TWO_IMAGES[1][0][1])])
BATCH = (
    "three prompts of unequal length: image and long text, text only, image and short text",
    [
        ([(112, 140)], "Describe the image in detail, from the top left to the bottom right corner, and its colours."),
        ([], "What is the capital of France?"),
        ([(30, 40)], "Why?"),
    ],
)


@dataclass(frozen=True)
class Tiny:
    """A tiny model and its cases: each a description, and of each prompt the (width, height) of its images and the question.

    seed: the first from 1 on with margins over MIN_MARGIN, neither EOS nor image tokens among the greedy ids, and bfloat16 logits
    within 1.2 percent of the range."""

    name: str
    family: str
    config: dict[str, Any]
    seed: int
    dtype: torch.dtype
    cases: dict[str, tuple[str, list[tuple[list[tuple[int, int]], str]]]]

    @property
    def architecture(self) -> str:
        return str(self.config["architectures"][0])

    @property
    def folder(self) -> Path:
        return HERE / "models" / f"{self.name}-tiny"


QWEN = (
    Tiny("qwen2vl", "qwen2_vl", QWEN2_VL, 27, torch.float32, {"two-images": TWO_IMAGES, "batch": BATCH}),
    Tiny("qwen25vl", "qwen2_5_vl", QWEN25_VL, 5, torch.bfloat16, {"two-images": TWO_IMAGES}),
    Tiny("qwen3vl", "qwen3_vl", QWEN3_VL, 1, torch.bfloat16, {"two-images": TWO_WHOLE_IMAGES}),
)


def qwen(tiny: Tiny, args: argparse.Namespace) -> None:
    """Weights, and stage outputs of transformers' model in float32, eager attention."""
    import transformers
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    model = make_folder(tiny)
    processor = Qwen2VLImageProcessorPil.from_pretrained(tiny.folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny.folder)
    template = json.loads((tiny.folder / "chat_template.json").read_text(encoding="utf-8"))["chat_template"]

    for case, (description, prompts) in tiny.cases.items():
        name = f"{tiny.name}-tiny-{case}"
        target = HERE / name
        (target / "input").mkdir(parents=True, exist_ok=True)
        meta: dict[str, Any] = {
            "case": name,
            "family": tiny.family,
            "model": f"../models/{tiny.folder.name}",
            "description": description,
            "reference": f"transformers {transformers.__version__} {tiny.architecture} (eager attention, "
            f"float32, CPU), Qwen2VLImageProcessorPil; torch {torch.__version__}",
            "sampled": {},
            "greedy": {},
            "text": {},
        }
        tensors: dict[str, Tensor] = {}
        for number, (sizes, question) in enumerate(prompts):
            prefix = f"p{number}." if len(prompts) > 1 else ""
            stem = f"p{number}_" if len(prompts) > 1 else ""
            images = [picture(width, height) for width, height in sizes]
            parts = [{"type": "image", "image": f"{stem}image_{i}.png"} for i in range(len(images))]
            messages: list[Any] = [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]
            for i, image in enumerate(images):
                image.save(target / "input" / f"{stem}image_{i}.png", optimize=True)
            text = str(
                tokenizer.apply_chat_template(
                    messages, chat_template=template, tokenize=False, add_generation_prompt=True
                )
            )
            (target / "input" / f"{stem}messages.json").write_text(json.dumps(messages, indent=1), encoding="utf-8")
            (target / "input" / f"{stem}prompt.txt").write_text(text, encoding="utf-8")
            stages = run(model, processor, tokenizer, text, images, all_logits=len(prompts) == 1)
            tensors |= {prefix + key: value for key, value in stages.items()}
            ids = stages["greedy_ids"].tolist()
            meta["greedy"][prefix or "main"] = {"ids": ids, "min_margin": float(stages["greedy_margins"].min())}
            meta["text"][prefix or "main"] = tokenizer.decode(ids, skip_special_tokens=True)
            assert stages["greedy_margins"].min() > MIN_MARGIN, "another seed: rounding could change a greedy id"
            print(f"{name} {prefix}: {stages['input_ids'].numel()} tokens, {meta['greedy'][prefix or 'main']}")
        write(target, meta, tensors)


def make_folder(tiny: Tiny) -> Any:
    """The model folder, and transformers' model of it in float32."""
    import transformers

    source, folder, cls = QWEN[0].folder, tiny.folder, getattr(transformers, tiny.architecture)
    folder.mkdir(exist_ok=True)
    if folder != source:
        for path in source.iterdir():
            if path.name not in ("config.json", "model.safetensors"):
                shutil.copyfile(path, folder / path.name)
    if tiny.config is QWEN3_VL:
        files = {"preprocessor_config": QWEN3_VL_PREPROCESSOR, "chat_template": {"chat_template": QWEN3_VL_TEMPLATE}}
        for name, content in files.items():
            (folder / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(tiny.config, indent=1) + "\n", encoding="utf-8")
    config = transformers.AutoConfig.from_pretrained(folder, attn_implementation="eager")
    is_tied = tiny.config["tie_word_embeddings"]
    weights = {
        published(tiny, name): random_weight(published(tiny, name), tensor, tiny.seed).to(tiny.dtype)
        for name, tensor in cls(config).state_dict().items()
        if not (is_tied and name == "lm_head.weight")
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return cls.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


@torch.no_grad()
def run(
    model: Any, processor: Any, tokenizer: Any, text: str, images: list[Any], *, all_logits: bool
) -> dict[str, Tensor]:
    """The stages of one prompt, from hooks; greedy decoding recomputes the whole sequence for each token."""
    stages: dict[str, Tensor] = {}
    inputs: dict[str, Any] = {}
    if images:
        pixels = processor(images, return_tensors="pt")
        grids = pixels["image_grid_thw"]
        stages |= {"pixel_values": pixels["pixel_values"], "image_grid_thw": grids}
        inputs = {"pixel_values": pixels["pixel_values"], "image_grid_thw": grids}
        before, *rest = text.split("<|image_pad|>")
        for grid, after in zip(grids.tolist(), rest, strict=True):
            before += "<|image_pad|>" * (grid[0] * grid[1] * grid[2] // 4) + after
        text = before
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    stages["input_ids"] = ids

    def keep_vision(module: Any, args: Any, output: Any) -> None:
        # Qwen2.5-VL's first is in the order of its windows, the second in that of the image
        stages.update(image_vision_hidden=output.last_hidden_state.clone(), image_embeds=output.pooler_output.clone())
        if getattr(output, "deepstack_features", None):
            stages["deepstack_embeds"] = torch.stack(output.deepstack_features)

    def keep_inputs(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        # (4, 1, L) where transformers puts a row for masks before M-RoPE's three
        stages["inputs_embeds"] = kwargs["inputs_embeds"].clone()
        counted = torch.arange(ids.shape[1]).expand(3, 1, -1)  # what the language model counts itself for text
        positions = kwargs.get("position_ids")
        stages["position_ids"] = (counted if positions is None else positions[-3:]).clone()

    handles = [
        model.model.visual.register_forward_hook(keep_vision),
        model.model.language_model.register_forward_pre_hook(keep_inputs, with_kwargs=True),
    ]

    def forward(ids: Tensor) -> Tensor:
        marks = (ids == model.config.image_token_id).int()
        model.model.rope_deltas = None  # left over from the call before
        logits: Tensor = model(input_ids=ids, mm_token_type_ids=marks, use_cache=False, **inputs).logits[0]
        return logits

    logits = forward(ids)
    for handle in handles:
        handle.remove()
    last_position = int(stages["position_ids"].max())
    stages["rope_deltas"] = torch.tensor([[last_position + 1 - ids.shape[1]]])
    stages["last_logits"] = logits[-1].clone()
    if all_logits:
        stages["prompt_logits"] = logits.clone()
    greedy: list[int] = []
    margins: list[float] = []
    for _ in range(NUM_TOKENS):
        best = forward(torch.cat([ids, torch.tensor([greedy], dtype=torch.int64)], 1))[-1].topk(2)
        greedy.append(int(best.indices[0]))
        margins.append(float(best.values[0] - best.values[1]))
    return stages | {"greedy_ids": torch.tensor(greedy), "greedy_margins": torch.tensor(margins)}


def published(tiny: Tiny, name: str) -> str:
    """A state_dict name of transformers 5 as the published checkpoints write it; Qwen3-VL's are the same."""
    if tiny.config is QWEN3_VL:
        return name
    return name.removeprefix("model.").replace("language_model.", "model.", 1)


def random_weight(name: str, like: Tensor, seed: int) -> Tensor:
    """Normal, keyed by the name; norms near 1 and biases not 0, so that one that is forgotten shows."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    x = torch.randn(like.shape, generator=torch.Generator().manual_seed(int.from_bytes(digest[:6], "big")))
    if like.dim() == 1:
        return 0.2 * x + (1.0 if name.endswith("weight") else 0.0)
    if "embed_tokens" in name:
        return x / 4  # small beside what the layers add: with tied embeddings each token would else repeat itself
    return x * 1.5 / like[0].numel() ** 0.5


def picture(width: int, height: int) -> Image.Image:
    """A drawing whose file is small: a gradient and two shapes."""
    image = Image.linear_gradient("L").resize((width, height)).convert("RGB")
    draw = ImageDraw.Draw(image)
    draw.ellipse((width // 8, height // 8, width // 2, height // 2), fill=(200, 30, 40))
    draw.rectangle((width // 2, height // 3, width - 5, height - 7), fill=(20, 90, 220))
    return image


if __name__ == "__main__":
    main()
