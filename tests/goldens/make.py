"""How the committed goldens were made: `cut` copies cases of a larger set, `qwen2vl` runs transformers on a tiny model.

python tests/goldens/make.py cut ../shared/goldens llava-newnames-single llava-batch3
python tests/goldens/make.py qwen2vl        # needs transformers 5.23.0
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
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
    verb = verbs.add_parser("qwen2vl", help="weights of models/qwen2vl-tiny, and its cases")
    verb.set_defaults(run=lambda args: qwen2vl())
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


# The rest is Qwen2-VL. The folder's tokenizer, chat template, preprocessor_config.json and generation_config.json are
# those of the larger set's qwen2vl-a; config.json and the weights are made here.

CONFIG: dict[str, Any] = {
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
SEED = 27  # the first from 1 on with margins over MIN_MARGIN, neither EOS nor image tokens among the greedy ids, and
# bfloat16 logits within 1.2 percent of the range
MIN_MARGIN = 0.01
NUM_TOKENS = 20
CASES: dict[str, tuple[str, list[tuple[list[tuple[int, int]], str]]]] = {
    # name → description, and of each prompt the (width, height) of its images and the question
    "qwen2vl-tiny-two-images": (
        "two images of different size, text after; all prompt logits",
        [([(120, 90), (50, 130)], "Which of the two images is larger?")],
    ),
    "qwen2vl-tiny-batch": (
        "three prompts of unequal length: image and long text, text only, image and short text",
        [
            ([(112, 140)], "Describe the image in detail, from the top left to the bottom right corner, and its colours."),
            ([], "What is the capital of France?"),
            ([(30, 40)], "Why?"),
        ],
    ),
}  # fmt: skip


def qwen2vl() -> None:
    """Weights, and stage outputs of transformers' Qwen2VLForConditionalGeneration in float32, eager attention."""
    import transformers
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    folder = HERE / "models" / "qwen2vl-tiny"
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=1) + "\n", encoding="utf-8")
    config = Qwen2VLConfig.from_pretrained(folder, attn_implementation="eager")
    model = Qwen2VLForConditionalGeneration(config).eval()
    weights = {
        published(name): random_weight(published(name), tensor)
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    model = Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    template = json.loads((folder / "chat_template.json").read_text(encoding="utf-8"))["chat_template"]

    for name, (description, prompts) in CASES.items():
        target = HERE / name
        (target / "input").mkdir(parents=True, exist_ok=True)
        meta: dict[str, Any] = {
            "case": name,
            "family": "qwen2_vl",
            "model": "../models/qwen2vl-tiny",
            "description": description,
            "reference": f"transformers {transformers.__version__} Qwen2VLForConditionalGeneration (eager attention, "
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
            assert stages["greedy_margins"].min() > MIN_MARGIN, "another SEED: rounding could change a greedy id"
            print(f"{name} {prefix}: {stages['input_ids'].numel()} tokens, {meta['greedy'][prefix or 'main']}")
        write(target, meta, tensors)


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

    def keep(key: str) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            stages[key] = (output[0] if isinstance(output, tuple) else output).clone()

        return hook

    def keep_inputs(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        # (4, 1, L) where transformers puts a row for masks before M-RoPE's three
        stages["inputs_embeds"] = kwargs["inputs_embeds"].clone()
        counted = torch.arange(ids.shape[1]).expand(3, 1, -1)  # what the language model counts itself for text
        positions = kwargs.get("position_ids")
        stages["position_ids"] = (counted if positions is None else positions[-3:]).clone()

    visual, language = model.model.visual, model.model.language_model
    handles = [
        visual.blocks[-1].register_forward_hook(keep("image_vision_hidden")),
        visual.merger.register_forward_hook(keep("image_embeds")),
        language.register_forward_pre_hook(keep_inputs, with_kwargs=True),
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


def published(name: str) -> str:
    """A state_dict name of transformers 5 as the published checkpoints write it."""
    return name.removeprefix("model.").replace("language_model.", "model.", 1)


def random_weight(name: str, like: Tensor) -> Tensor:
    """Normal, keyed by the name; norms near 1 and biases not 0, so that one that is forgotten shows."""
    digest = hashlib.sha256(f"{SEED} {name}".encode()).digest()
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
