"""How the goldens of Phi-3.5-vision and MiniCPM-V 2.6 were made: by the code published with the models, which no release
of transformers has in this form. It is not part of this repository: CODE is the folder with its .py files, in a clone of

    phi3v     TIGER-AI-Lab/VLM2Vec at 6e1e1d4: src/model/baseline_backbone/phi3_v
    minicpmv  404805854/minicpmv2.6-onnx at 8490e59: the repository itself

Needs transformers 4.46.3 and torch 2.4. From the root of the checkout:

    python -m tests.goldens.remote_code phi3v CODE
    python -m tests.goldens.remote_code minicpmv CODE
    python -m tests.goldens.remote_code phi3v CODE --check ../shared/goldens   # writes nothing: is CODE used rightly?

Tokenizer, preprocessor_config.json and generation_config.json are those of the larger set's `phi3v-a` and `minicpmv-a`;
config.json and the weights are made here, the weights stored as bfloat16 and cast to float32 to compute.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import PIL
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.goldens.make import HERE, picture, write

MIN_MARGIN, MIN_DIFFERENT = 0.03, 8  # of the greedy ids of a case, none of them special
PIXELS_KEPT = 400  # of a slice of MiniCPM-V, and of what its tower makes of it: there are many

PHI3V_CONFIG: dict[str, Any] = {
    "architectures": ["Phi3VForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "embd_layer": {
        "embedding_cls": "image",
        "hd_transform_order": "sub_glb",
        "projection_cls": "mlp",
        "use_hd_transform": True,
        "with_learnable_separator": True,
    },
    "embd_pdrop": 0.0,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 32,
    "img_processor": {
        "image_dim_out": 16,
        "model_name": "openai/clip-vit-large-patch14-336",
        "name": "clip_vision_model",
        "num_img_tokens": 144,
        "vision_config": {  # the published code has the sizes of ViT-L/14-336 in its source, and no such key
            "hidden_act": "quick_gelu",
            "hidden_size": 16,
            "image_size": 336,
            "intermediate_size": 32,
            "layer_norm_eps": 1e-05,
            "num_attention_heads": 2,
            "num_channels": 3,
            "num_hidden_layers": 3,
            "patch_size": 14,
            "projection_dim": 768,
        },
    },
    "initializer_range": 0.02,
    "intermediate_size": 48,
    "max_position_embeddings": 8192,
    "model_type": "phi3_v",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "original_max_position_embeddings": 512,
    "pad_token_id": 420,
    "resid_pdrop": 0.0,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "long_factor": [1.03, 1.74, 2.71, 4.58],
        "short_factor": [1.01, 1.19, 1.26, 1.37],
        "type": "su",
    },
    "rope_theta": 10000.0,
    "sliding_window": 262144,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 448,
}

MINICPMV_CONFIG: dict[str, Any] = {
    "architectures": ["MiniCPMV"],
    "attention_dropout": 0.0,
    "batch_vision_input": True,
    "bos_token_id": 400,
    "drop_vision_last_layer": False,
    "eos_token_id": 402,
    "hidden_act": "silu",
    "hidden_size": 128,  # the resampler has a head for every 128
    "image_size": 448,
    "initializer_range": 0.02,
    "intermediate_size": 16,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "model_type": "minicpmv",
    "num_attention_heads": 8,
    "num_hidden_layers": 1,
    "num_key_value_heads": 2,
    "patch_size": 14,
    "query_num": 64,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "slice_config": {"max_slice_nums": 9, "model_type": "minicpmv", "patch_size": 14},
    "slice_mode": True,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "version": 2.6,
    "vision_config": {
        "hidden_size": 8,
        "image_size": 700,  # 980 as published would make the table of positions twice as large
        "intermediate_size": 16,
        "model_type": "siglip",
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "patch_size": 14,
    },
    "vocab_size": 448,
}


@dataclass
class Reference:
    """A model and its processor, both of the published code, on one folder."""

    model: Any
    processor: Any


@dataclass
class Run:
    """What one prompt gives: tensors by their golden names, and what golden.json says besides."""

    tensors: dict[str, Tensor]
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Family:
    name: str  # as in golden.json
    source: str
    folder: str
    config: dict[str, Any]
    seed: int  # the first from 1 on whose greedy ids are as above
    num_tokens: int
    load: Callable[[Path, Path], Reference]
    run: Callable[[Reference, str, list[Image.Image], int], Run]
    message: Callable[[int, str], str]
    cases: dict[str, tuple[str, list[tuple[int, int]], str]]  # name → description, (width, height)s, question
    larger: tuple[str, ...]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("code", type=Path)
    parser.add_argument("--check", type=Path, metavar="LARGER_SET")
    args = parser.parse_args()
    family = FAMILIES[args.family]
    if args.check:
        check(family, args.code, args.check)
    else:
        make(family, args.code)


def check(family: Family, code: Path, larger: Path) -> None:
    """The largest difference of each tensor of the larger set's cases from what the code gives here."""
    for name in family.larger:
        case = larger / name
        meta = json.loads((case / "golden.json").read_text(encoding="utf-8"))
        gold = load_file(case / "golden.safetensors")
        reference = family.load(code, (case / meta["model"]).resolve())
        text = (case / "input" / "prompt.txt").read_text(encoding="utf-8")
        paths = sorted((case / "input").glob("image_*.png"))
        run = family.run(reference, text, [Image.open(path) for path in paths], gold["greedy_ids"].numel())
        if set(run.tensors) != set(gold):
            raise SystemExit(f"{name}: tensors {sorted(set(run.tensors) ^ set(gold))} on one side only")
        for key, tensor in run.tensors.items():
            sampled = meta["sampled"].get(key)
            thinned = tensor.flatten()[:: sampled["step"]] if sampled else tensor
            if list(tensor.shape) != meta["tensors"][key]["shape"] or thinned.dtype != gold[key].dtype:
                raise SystemExit(f"{name} {key}: {tensor.shape} {tensor.dtype}, golden {meta['tensors'][key]}")
            difference = float((thinned.double() - gold[key].double()).abs().max())
            print(f"{name} {key}: {difference:.1e} of {float(gold[key].double().abs().max()):.3g}")
        for key, value in run.meta.items():
            if key != "greedy" and meta[key] != value:
                raise SystemExit(f"{name} {key}: {value}, golden {meta[key]}")


def make(family: Family, code: Path) -> None:
    """config.json, weights and cases of a family."""
    import transformers

    folder = HERE / "models" / family.folder
    (folder / "config.json").write_text(json.dumps(family.config, indent=1) + "\n", encoding="utf-8")
    (folder / "model.safetensors").unlink(missing_ok=True)
    shapes = family.load(code, folder).model.state_dict()
    weights = {name: draw(family.seed, name, like) for name, like in shapes.items() if ".wte." not in name}
    save_file({name: w.bfloat16() for name, w in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    reference = family.load(code, folder)

    for name, (description, sizes, question) in family.cases.items():
        target = HERE / name
        (target / "input").mkdir(parents=True, exist_ok=True)
        images = [picture(width, height) for width, height in sizes]
        for i, image in enumerate(images):
            image.save(target / "input" / f"image_{i}.png", optimize=True)
        messages: list[Any] = [{"role": "user", "content": family.message(len(images), question)}]
        text = reference.processor.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        (target / "input" / "messages.json").write_text(json.dumps(messages, indent=1), encoding="utf-8")
        (target / "input" / "prompt.txt").write_text(text, encoding="utf-8")
        if family.name == "phi3_v":  # the same with the images as parts, which its own template does not read
            parts = [{"type": "image", "path": f"image_{i}.png"} for i in range(len(images))]
            messages = [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]
            (target / "input" / "messages_parts.json").write_text(json.dumps(messages, indent=1), encoding="utf-8")
        run = family.run(reference, text, images, family.num_tokens)
        greedy = run.meta["greedy"]["main"]
        print(f"{name}: {run.tensors['input_ids'].numel()} tokens, {greedy}, {run.meta}")
        added = reference.processor.tokenizer.added_tokens_decoder
        special = {number for number, token in added.items() if token.special}
        different = set(greedy["ids"])
        if greedy["min_margin"] < MIN_MARGIN or len(different) < MIN_DIFFERENT or special & different:
            raise SystemExit(f"{name}: another seed than {family.seed}: {greedy}")
        meta: dict[str, Any] = {
            "case": name,
            "family": family.name,
            "model": f"../models/{family.folder}",
            "description": description,
            "reference": f"{family.source}, transformers {transformers.__version__}, eager attention, float32, CPU; "
            f"torch {torch.__version__}, pillow {PIL.__version__}",
            "sampled": {},
            "tensors": {key: described(tensor) for key, tensor in run.tensors.items()},
            "weights_seed": family.seed,
            **run.meta,
        }
        for key, tensor in run.tensors.items():
            if key.startswith("slice"):
                step = tensor.numel() // PIXELS_KEPT | 1
                meta["sampled"][key] = {"shape": list(tensor.shape), "step": step}
                run.tensors[key] = tensor.flatten()[::step].contiguous()
        write(target, meta, run.tensors)


def described(tensor: Tensor) -> dict[str, Any]:
    """Shape and dtype; of floats also what a thinned out tensor cannot tell."""
    description: dict[str, Any] = {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
    if tensor.is_floating_point():
        x = tensor.double()
        values = {"mean": x.mean(), "std": x.std(), "absmax": x.abs().max(), "sum": x.sum()}
        description["stats"] = {key: float(value) for key, value in values.items()}
    return description


def draw(seed: int, name: str, like: Tensor) -> Tensor:
    """Normal, keyed by the name; norms near 1 and biases not 0, so that one that is forgotten shows."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    x = torch.randn(like.shape, generator=torch.Generator().manual_seed(int.from_bytes(digest[:6], "big")))
    if like.dim() == 1:
        return 0.2 * x + (1.0 if name.endswith("weight") else 0.0)
    if name.endswith(("embed_tokens.weight", "_GN", "query", "position_embedding.weight")):
        return x / 2
    return x * 1.5 / like[0].numel() ** 0.5


def package(name: str, folder: Path) -> None:
    """Modules below `name` come from a folder that need not be called so."""
    module = ModuleType(name)
    module.__path__ = [str(folder)]
    sys.modules[name] = module


def stored(folder: Path) -> dict[str, Tensor]:
    path = folder / "model.safetensors"
    return {name: w.float() for name, w in load_file(path).items()} if path.exists() else {}


def load_weights(model: Any, weights: dict[str, Tensor], shared: set[str]) -> None:
    """All weights of the folder into the model; `shared` are those it has from elsewhere."""
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if weights and (set(missing) != shared or unexpected):
        raise SystemExit(f"the folder lacks {missing} and has {unexpected} besides")


def torchvision_by_pil() -> None:
    """What the published code calls of torchvision, on PIL images."""
    import numpy as np

    importlib.import_module("transformers.utils")  # looks for the real one when it is imported

    def resize(image: Image.Image, size: list[int]) -> Image.Image:
        return image.resize((size[1], size[0]), Image.Resampling.BILINEAR)

    def pad(image: Image.Image, padding: list[int], fill: list[int]) -> Image.Image:
        left, top, right, bottom = padding
        padded = Image.new("RGB", (left + image.width + right, top + image.height + bottom), tuple(fill))
        padded.paste(image, (left, top))
        return padded

    def normalize(mean: list[float], std: list[float]) -> Callable[[Tensor], Tensor]:
        by = [torch.tensor(values)[:, None, None] for values in (mean, std)]
        return lambda x: (x - by[0]) / by[1]

    def to_tensor() -> Callable[[Image.Image], Tensor]:
        return lambda image: torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div(255)

    def compose(steps: list[Callable[[Any], Any]]) -> Callable[[Any], Any]:
        def run(x: Any) -> Any:
            for step in steps:
                x = step(x)
            return x

        return run

    torchvision: Any = ModuleType("torchvision")
    torchvision.transforms = ModuleType("torchvision.transforms")
    torchvision.transforms.functional = ModuleType("torchvision.transforms.functional")
    torchvision.transforms.functional.resize = resize
    torchvision.transforms.functional.pad = pad
    torchvision.transforms.Normalize = normalize
    torchvision.transforms.ToTensor = to_tensor
    torchvision.transforms.Compose = compose
    sys.modules["torchvision"] = torchvision


def keep(stages: dict[str, Any], key: str) -> Any:
    """A hook that keeps what a module gave first."""

    def hook(module: Any, args: Any, output: Any) -> None:
        stages.setdefault(key, output)

    return hook


def continued(logits: Callable[[list[int]], Tensor], n: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """n greedy ids, each from the whole sequence; logits(ids) are those after the prompt and ids."""
    ids: list[int] = []
    margins: list[float] = []
    last = logits(ids)
    for _ in range(n):
        best = (logits(ids) if ids else last).topk(2)
        ids.append(int(best.indices[0]))
        margins.append(float(best.values[0] - best.values[1]))
    tensors = {"last_logits": last.clone(), "greedy_ids": torch.tensor(ids), "greedy_margins": torch.tensor(margins)}
    rounded = [round(margin, 5) for margin in margins]
    return tensors, {"main": {"ids": ids, "min_margin": min(margins), "margins": rounded}}


# Phi-3.5-vision


def load_phi3v(code: Path, folder: Path) -> Reference:
    transformers: Any = importlib.import_module("transformers")
    torchvision_by_pil()
    package("phi3v_code", code)
    # The merge of patches asserts the width of ViT-L/14.
    embedding: Any = ModuleType("phi3v_code.image_embedding_phi3_v")
    embedding.__package__ = "phi3v_code"
    source = (code / "image_embedding_phi3_v.py").read_text(encoding="utf-8")
    if source.count("C == 1024 and") != 1:
        raise SystemExit("image_embedding_phi3_v.py is not that of the commit named above")
    exec(compile(source.replace("C == 1024 and", ""), "image_embedding_phi3_v.py", "exec"), embedding.__dict__)
    sys.modules[embedding.__name__] = embedding
    modeling = importlib.import_module("phi3v_code.modeling_phi3_v")
    processing = importlib.import_module("phi3v_code.processing_phi3_v")
    images = importlib.import_module("phi3v_code.image_processing_phi3_v")

    config = modeling.Phi3VConfig.from_pretrained(folder, attn_implementation="eager")
    embedding.CLIP_VIT_LARGE_PATCH14_336_CONFIG = transformers.CLIPVisionConfig(
        **config.img_processor["vision_config"], attn_implementation="eager"
    )
    model = modeling.Phi3VForCausalLM(config).eval()
    load_weights(model, stored(folder), {"model.vision_embed_tokens.wte.weight"})
    processor = processing.Phi3VProcessor(
        images.Phi3VImageProcessor.from_pretrained(folder), transformers.AutoTokenizer.from_pretrained(folder)
    )
    return Reference(model, processor)


@torch.no_grad()
def run_phi3v(reference: Reference, text: str, images: list[Image.Image], num_tokens: int) -> Run:
    model, processor = reference.model, reference.processor
    inputs = processor(text, images, return_tensors="pt")
    counts = processor.image_processor(images)["num_img_tokens"]
    ids, pixels, sizes = inputs["input_ids"], inputs["pixel_values"], inputs["image_sizes"]
    crops = [1 + h * w // 336**2 for h, w in sizes.tolist()]
    seen: dict[str, Any] = {}
    vision = model.model.vision_embed_tokens
    handles = [
        vision.img_processor.register_forward_hook(keep(seen, "tower")),
        vision.img_projection.register_forward_hook(keep(seen, "rows")),
        vision.register_forward_hook(keep(seen, "inputs_embeds")),
    ]

    def logits(more: list[int]) -> Tensor:
        all_ids = torch.cat([ids, torch.tensor([more], dtype=torch.int64)], 1)
        out: Tensor = model(all_ids, pixel_values=[pixels], image_sizes=[sizes], use_cache=False).logits[0, -1]
        return out

    tensors, greedy = continued(logits, num_tokens)
    for handle in handles:
        handle.remove()
    hidden = seen["tower"].hidden_states[-2][:, 1:].unflatten(0, (len(images), -1))
    tensors |= {"input_ids": ids, "image_sizes": sizes, "inputs_embeds": seen["inputs_embeds"]}
    for i, rows in enumerate(seen["rows"].split(counts)):
        tensors[f"image{i}.pixel_values"] = pixels[i, : crops[i]]
        tensors[f"image{i}.vision_selected_hidden"] = hidden[i, : crops[i]]
        tensors[f"image{i}.image_embeds"] = rows
    before, after = ids.shape[1], ids.shape[1] + num_tokens
    original = model.config.original_max_position_embeddings
    if before <= original < after:
        raise SystemExit("the continuation would cross from short to long rope factors")
    starts = [int((ids[0] == -1 - i).nonzero()[0]) for i in range(len(images))]
    meta = {
        "num_crops": processor.image_processor.num_crops,
        "placeholders": [{"image": i + 1, "range": [starts[i], counts[i]]} for i in range(len(images))],
        "image_sizes_hw": sizes.tolist(),
        "num_img_tokens": counts,
        "real_crops_incl_global": crops,
        "pixel_values_shape": list(pixels.shape),
        "position_ids": "arange(len(input_ids))",
        "rope_factors": "long" if before > original else "short",
        "greedy": greedy,
        "text": processor.tokenizer.decode(greedy["main"]["ids"], skip_special_tokens=True),
    }
    return Run(tensors, meta)


# MiniCPM-V 2.6


def load_minicpmv(code: Path, folder: Path) -> Reference:
    torchvision_by_pil()
    package("minicpmv_code", code)
    modeling = importlib.import_module("minicpmv_code.modeling_minicpmv")
    processing = importlib.import_module("minicpmv_code.processing_minicpmv")
    images = importlib.import_module("minicpmv_code.image_processing_minicpmv")
    tokenization = importlib.import_module("minicpmv_code.tokenization_minicpmv_fast")

    config = modeling.MiniCPMVConfig.from_pretrained(folder, attn_implementation="eager")
    model = modeling.MiniCPMV(config).eval()
    load_weights(model, stored(folder), set())
    processor = processing.MiniCPMVProcessor(
        images.MiniCPMVImageProcessor.from_pretrained(folder),
        tokenization.MiniCPMVTokenizerFast.from_pretrained(folder),
    )
    return Reference(model, processor)


@torch.no_grad()
def run_minicpmv(reference: Reference, text: str, images: list[Image.Image], num_tokens: int) -> Run:
    model, processor = reference.model, reference.processor
    inputs = processor([text], [images], return_tensors="pt")
    ids, bounds, slices = inputs["input_ids"], inputs["image_bound"][0], inputs["pixel_values"][0]
    sizes = inputs["tgt_sizes"][0]
    seen: dict[str, Any] = {}
    handles = [
        model.vpm.embeddings.register_forward_hook(keep(seen, "patches")),
        model.vpm.register_forward_hook(keep(seen, "tower")),
        model.resampler.register_forward_hook(keep(seen, "image_embeds")),
    ]
    embeds, _ = model.get_vllm_embedding(inputs)
    for handle in handles:
        handle.remove()
    embeds = embeds.clone()

    def logits(more: list[int]) -> Tensor:
        x = torch.cat([embeds, model.llm.get_input_embeddings()(torch.tensor([more], dtype=torch.int64))], 1)
        out: Tensor = model.llm(inputs_embeds=x, use_cache=False).logits[0, -1]
        return out

    tensors, greedy = continued(logits, num_tokens)
    tensors |= {
        "tgt_sizes": sizes.long(),
        "image_sizes_wh": torch.tensor([image.size for image in images]),
        "image_embeds": seen["image_embeds"],
        "input_ids": ids.long(),
        "image_bound": bounds.long(),
        "inputs_embeds": embeds,
    }
    for k, (pixels, n) in enumerate(zip(slices, sizes.prod(1).tolist(), strict=True)):
        tensors[f"slice{k}.pixel_values"] = pixels
        tensors[f"slice{k}.patch_plus_position"] = seen["patches"][k, :n]
        tensors[f"slice{k}.vision_hidden"] = seen["tower"].last_hidden_state[k, :n]
    of = processor.image_processor
    meta = {
        "processor_kwargs": {"main": {}},
        "slice_grids_cols_rows": {"main": [of.get_sliced_grid(image.size, of.max_slice_nums) for image in images]},
        "placeholders": {"main": [[start, end - start] for start, end in bounds.tolist()]},
        "position_ids": "arange(len(input_ids)) of each unpadded prompt",
        "greedy": greedy,
        "text": {"main": processor.tokenizer.decode(greedy["main"]["ids"], skip_special_tokens=True)},
    }
    return Run(tensors, meta)


FAMILIES = {
    "phi3v": Family(
        name="phi3_v",
        source="Phi3VForCausalLM + Phi3VProcessor of TIGER-AI-Lab/VLM2Vec @ 6e1e1d4 (copy of the Hugging Face remote code; "
        "torchvision calls by their PIL equivalents)",
        folder="phi3v-tiny",
        config=PHI3V_CONFIG,
        seed=45,
        num_tokens=16,
        load=load_phi3v,
        run=run_phi3v,
        message=lambda n, question: "".join(f"<|image_{i + 1}|>\n" for i in range(n)) + question,
        cases={
            "phi3v-tiny-single": (
                "one landscape image, 2 of 4 crops, short rope factors",
                [(100, 40)],
                "What is shown in this image?",
            ),
            "phi3v-tiny-two-images": (
                "two images (portrait and landscape) of 2 and 3 crops, long rope factors (longer than "
                "original_max_position_embeddings)",
                [(50, 110), (128, 40)],
                "Compare the two pictures.",
            ),
        },
        larger=("phi3v-single", "phi3v-two-images"),
    ),
    "minicpmv": Family(
        name="minicpmv",
        source="openbmb/MiniCPM-V-2_6 remote code (copy in 404805854/minicpmv2.6-onnx @ 8490e59)",
        folder="minicpmv-tiny",
        config=MINICPMV_CONFIG,
        seed=3,
        num_tokens=16,
        load=load_minicpmv,
        run=run_minicpmv,
        message=lambda n, question: "(<image>./</image>)\n" * n + question,
        cases={
            "minicpmv-tiny-sliced": ("one image of 640 x 480, sliced", [(640, 480)], "Read the text in the document."),
            "minicpmv-tiny-two-images": (
                "two images of different size, the second one sliced",
                [(90, 60), (400, 620)],
                "Compare the two pictures.",
            ),
        },
        larger=("minicpmv-sliced", "minicpmv-two-images"),
    ),
}

if __name__ == "__main__":
    main()
