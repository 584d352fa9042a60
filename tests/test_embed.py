"""embed and score: the vectors of transformers' hidden states, every form of a prompt, errors, folders, the command line."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import vlmfx
from tests.golden_cases import COMMITTED, TINY, load_model
from tests.invariants import is_one_sentence, prompt_hidden
from tests.pictures import about, encoded, mixed, picture
from tests.processing import references
from tests.versions import transformers_from
from vlmfx import LLM, BatchError, CheckpointError, InvalidRequest, embed
from vlmfx.cli import main
from vlmfx.models.pooling import Pooling
from vlmfx.processing.prompt import prepare

OLD_KEYS = {"llava": "language_model.lm_head.weight", "qwen2_vl": "lm_head.weight"}


@pytest.fixture(params=OLD_KEYS)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def llm(family: str) -> LLM:
    return LLM(load_model(TINY[family]), task="embed")


@torch.no_grad()
def states_of_transformers(family: str, ids: list[int], images: list[Any]) -> Tensor:
    """(tokens, hidden) float64 after the final norm."""
    transformers = transformers_from(4, 46, "is older than the oldest promised")
    is_old = tuple(map(int, transformers.__version__.split(".")[:2])) < (4, 52)
    if family == "llava" and is_old:
        pytest.skip("transformers below 4.52 cannot load the newer key names of this folder")
    name = json.loads((TINY[family] / "config.json").read_text(encoding="utf-8"))["architectures"][0]
    reference = getattr(transformers, name).from_pretrained(
        TINY[family], torch_dtype=torch.float32, attn_implementation="eager"
    )
    batch = torch.tensor([ids])
    inputs: dict[str, Any] = {"input_ids": batch, "attention_mask": torch.ones_like(batch)}
    if images:
        pixels = references.image_processor(family, TINY[family])(images, return_tensors="pt")
        inputs |= {key: torch.as_tensor(value) for key, value in pixels.items()}
    if family == "qwen2_vl" and is_old:  # its plain forward counts positions as for text
        grid = inputs.get("image_grid_thw")
        inputs["position_ids"] = reference.get_rope_index(batch, grid, attention_mask=inputs["attention_mask"])[0]
    elif family == "qwen2_vl":
        inputs["mm_token_type_ids"] = (batch == reference.config.image_token_id).int()
    states: Tensor = reference(**inputs, output_hidden_states=True).hidden_states[-1][0]
    return states.double()


def test_vectors_are_those_of_transformers(family):
    """Of prompts of unequal length, in one batch, whole and cut, by each way of pooling."""
    model = load_model(TINY[family])
    pictures = [[picture(40, 60)], [picture(90, 30, 1), picture(50, 50, 2)], []]
    prompts = [about(model, *images, text="What is shown?" * n) for n, images in enumerate(pictures, 1)]
    states = [
        states_of_transformers(family, prepare(model.processor, prompt).token_ids, images)
        for prompt, images in zip(prompts, pictures, strict=True)
    ]
    rows: dict[Pooling, list[Tensor]] = {
        "last": [s[-1] for s in states],
        "cls": [s[0] for s in states],
        "mean": [s.mean(0) for s in states],
    }
    for kind, pooled in rows.items():
        llm = LLM(replace(model, pooling=kind), task="embedding")
        for dimensions in (None, 5):
            expected = torch.stack([p[:dimensions] / torch.linalg.vector_norm(p[:dimensions]) for p in pooled])
            vectors = embed(llm, prompts, dimensions, use_tqdm=False)
            assert vectors.dtype == torch.float32
            torch.testing.assert_close(vectors.double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("folder", sorted((COMMITTED / "models").iterdir()), ids=lambda folder: folder.name)
def test_every_family_embeds(folder):
    """Without its output matrix, what the last token's hidden state is with it."""
    whole = load_model(folder)
    model = vlmfx.load(folder, dtype="float32", device="cpu", task="embed")
    assert "head" not in model.params["text"]
    prompts = ["Hello there", about(whole, picture(50, 40)), about(whole, picture(30, 90, 1), picture(64, 64, 2))]
    with torch.no_grad():
        states = [prompt_hidden(whole, prepare(whole.processor, prompt))[-1] for prompt in prompts]
    expected = torch.stack([s / torch.linalg.vector_norm(s) for s in states])
    torch.testing.assert_close(embed(model, prompts, use_tqdm=False), expected, atol=2e-6, rtol=0)


def test_results_have_vllms_names(llm):
    first, second = llm.embed(["Hello", "Hello there"], use_tqdm=False)
    assert isinstance(first, vlmfx.EmbeddingRequestOutput)
    assert (first.request_id, second.request_id) == ("0", "1")
    assert first.finished
    assert first.error is None
    assert first.prompt_token_ids == prepare(llm.model.processor, "Hello").token_ids
    assert all(type(value) is float for value in first.outputs.embedding)
    assert len(first.outputs.embedding) == first.outputs.hidden_size == llm.model.config.text.hidden_size
    assert math.hypot(*first.outputs.embedding) == pytest.approx(1, abs=1e-6)
    (score,) = llm.score("Hello", "Hello there")
    assert isinstance(score, vlmfx.ScoringRequestOutput)
    assert score.request_id == "0_1"
    assert score.prompt_token_ids == [*first.prompt_token_ids, *second.prompt_token_ids]
    expected = sum(a * b for a, b in zip(first.outputs.embedding, second.outputs.embedding, strict=True))
    assert score.outputs.score == pytest.approx(expected, abs=1e-6)


def test_every_form_of_a_prompt(llm, tmp_path):
    """One picture, written in each way that `generate` takes, is one vector."""
    image = picture(60, 40)
    path = tmp_path / "picture.png"
    image.save(path)
    written = about(llm.model, image)
    ids = prepare(llm.model.processor, written).token_ids
    ways = [
        written,
        {**written, "multi_modal_data": {"image": str(path)}},
        {**written, "multi_modal_data": {"image": np.asarray(image)}},
        {"prompt_token_ids": ids, "multi_modal_data": {"image": image}},
    ]
    vectors = embed(llm, ways, use_tqdm=False)
    torch.testing.assert_close(vectors, vectors[:1].expand(len(ways), -1), atol=1e-6, rtol=0)
    parts = [{"type": "image", "image": image}, {"type": "text", "text": "What is it?"}]
    chatted = embed(llm, {"messages": [{"role": "user", "content": parts}]})
    text = prepare(llm.model.processor, {"messages": [{"role": "user", "content": parts}]}).prompt
    torch.testing.assert_close(chatted, embed(llm, {**written, "prompt": text}), atol=1e-6, rtol=0)


def test_the_model_may_be_a_folder_a_model_or_an_llm(family):
    model = load_model(TINY[family])
    expected = embed(model, "Hello")
    assert expected.shape == (1, model.config.text.hidden_size)
    assert torch.equal(embed(TINY[family], "Hello", dtype="float32", device="cpu"), expected)
    assert torch.equal(embed(str(TINY[family]), ["Hello"], dtype="float32", device="cpu", task="embedding"), expected)
    assert torch.equal(embed(LLM(model, task="embed"), "Hello"), expected)
    with pytest.raises(InvalidRequest, match="dtype: the LLM is built already"):
        embed(LLM(model, task="embed"), "Hello", dtype="float32")
    assert embed(model, []).shape == (0, model.config.text.hidden_size)
    assert embed(model, [], 3).shape == (0, 3)
    assert LLM(model, task="embed").embed([]) == []


@pytest.mark.parametrize("dimensions", [0, -1, 10_000, 2.0, True, "8"])
def test_dimensions_that_do_not_fit(llm, dimensions):
    with pytest.raises(InvalidRequest, match="expected a whole number from 1 to") as caught:
        llm.embed(["Hello"], dimensions=dimensions)
    assert caught.value.field == "dimensions"
    assert is_one_sentence(caught.value)


def test_all_dimensions_are_all_of_them(llm):
    width = llm.model.config.text.hidden_size
    assert torch.equal(embed(llm, "Hello", width), embed(llm, "Hello"))
    assert embed(llm, "Hello", 1).abs().tolist() == [[1.0]]


def test_a_wrong_prompt_in_a_list_fails_alone(llm):
    good = mixed(llm.model)[:3]
    wrong = [about(llm.model, b"no picture"), "", 7, {"prompt": "x", "multi_modal_data": {"image": [picture(9, 9)]}}]
    mixture = [wrong[0], good[0], wrong[1], good[1], wrong[2], good[2], wrong[3]]
    with pytest.warns(UserWarning, match="4 of 7 prompts failed; the first: multi_modal_data.image") as warned:
        outputs = llm.embed(mixture, use_tqdm=False)
    assert len(warned) == 1
    assert [o.error is None for o in outputs] == [False, True] * 3 + [False]
    assert [o.request_id for o in outputs] == [str(i) for i in range(7)]
    assert all(o.outputs.embedding == [] and o.finished and is_one_sentence(o.error) for o in outputs[::2])
    for output, prompt in zip(outputs[1::2], good, strict=True):
        alone = embed(llm, prompt)[0]
        torch.testing.assert_close(torch.tensor(output.outputs.embedding), alone, atol=1e-6, rtol=0)
    with pytest.raises(BatchError) as caught:
        embed(llm, mixture, use_tqdm=False)
    assert [o.error is None for o in caught.value.outputs] == [False, True] * 3 + [False]
    with pytest.raises(InvalidRequest):
        llm.embed(wrong[0])
    with pytest.raises(InvalidRequest):
        embed(llm, "")
    with pytest.raises(InvalidRequest, match="on_error"):
        llm.embed("x", on_error="ignore")


def test_scores_one_to_many_and_pair_by_pair(llm):
    prompts = mixed(llm.model)[:4]
    vectors = embed(llm, prompts, use_tqdm=False).double()
    cosine = (vectors @ vectors.T).tolist()

    def scores(a: Any, b: Any) -> list[float]:
        return [s.outputs.score for s in llm.score(a, b, use_tqdm=False)]

    assert scores(prompts[0], prompts[1]) == pytest.approx(cosine[0][1:2], abs=1e-6)
    assert scores(prompts[0], prompts[1:]) == pytest.approx(cosine[0][1:], abs=1e-6)
    assert scores(prompts[:1], prompts[1:]) == pytest.approx(cosine[0][1:], abs=1e-6)
    assert scores(prompts[:2], prompts[2:]) == pytest.approx([cosine[0][2], cosine[1][3]], abs=1e-6)
    assert scores(prompts[0], prompts[0]) == [pytest.approx(1, abs=1e-6)]
    assert scores([], []) == scores("x", []) == []
    with pytest.raises(InvalidRequest, match="2 were given for 3 of text_2; give one for all, or as many"):
        llm.score(prompts[:2], prompts[:3])


def test_a_wrong_prompt_spoils_its_own_scores(llm):
    with pytest.warns(UserWarning, match="1 of 2 prompts failed"):
        good, bad = llm.score("Hello", ["there", ""], use_tqdm=False)
    assert good.error is None
    assert bad.error is not None
    assert math.isnan(bad.outputs.score)
    with pytest.raises(InvalidRequest):
        llm.score("Hello", "")


def test_a_task_is_kept_to(family):
    model = load_model(TINY[family])
    for task in ("generate", "auto"):
        for call in (LLM(model, task=task).embed, lambda p, task=task: LLM(model, task=task).score(p, p)):
            with pytest.raises(InvalidRequest, match='made for "generate"; make one with task="embed"') as caught:
                call("Hello")
            assert caught.value.field == "task"
    for task in ("embed", "embedding"):
        with pytest.raises(InvalidRequest, match='made for "embed"; make one with task="generate"') as caught:
            LLM(model, task=task).generate("Hello")
        assert caught.value.field == "task"
    for wrong in ("classify", None, 3):
        with pytest.raises(InvalidRequest, match="use one of generate, auto, embed, embedding"):
            LLM(model, task=wrong)  # type: ignore[arg-type]


@pytest.fixture
def folder(family: str, tmp_path: Path) -> Path:
    """A copy of a tiny folder, to be changed; one weight file, published key names, a head of its own."""
    target = tmp_path / "model"
    shutil.copytree(TINY[family], target, ignore=shutil.ignore_patterns("*.safetensors*"))
    tensors: dict[str, Tensor] = {}
    for path in TINY[family].glob("*.safetensors"):
        tensors |= load_file(path)
    config = json.loads((target / "config.json").read_text(encoding="utf-8"))
    config["tie_word_embeddings"] = False
    config.get("text_config", config)["tie_word_embeddings"] = False
    (target / "config.json").write_text(json.dumps(config), encoding="utf-8")
    head = {key for key in tensors if key.endswith("lm_head.weight")} or {OLD_KEYS[family]}
    embeds = next(value for key, value in tensors.items() if key.endswith("embed_tokens.weight"))
    tensors |= dict.fromkeys(head, embeds + 1)
    save_file(tensors, target / "model.safetensors")
    return target


def test_a_folder_without_an_output_matrix_embeds_and_does_not_generate(folder):
    whole = vlmfx.load(folder, dtype="float32", device="cpu", task="embed")
    assert "head" not in whole.params["text"], "what is not needed is not read"
    expected = embed(whole, "Hello")
    tensors = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if not k.endswith("lm_head.weight")}, folder / "model.safetensors")
    assert torch.equal(embed(folder, "Hello", dtype="float32", device="cpu"), expected)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is missing"):
        vlmfx.load(folder, device="cpu")
    headless = vlmfx.load(folder, dtype="float32", device="cpu", task="embedding")
    with pytest.raises(InvalidRequest, match=r'task: the model was loaded for "embed".*pass task="embed"') as caught:
        vlmfx.generate(headless, "Hello")
    assert is_one_sentence(caught.value)
    with pytest.raises(InvalidRequest, match="task: it is 'both'; use one of"):
        vlmfx.load(folder, task="both")


STEPS = [{"path": "", "type": "sentence_transformers.models.Transformer"},
         {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
         {"path": "2_Normalize", "type": "sentence_transformers.models.Normalize"}]  # fmt: skip


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


@pytest.mark.parametrize("steps", [None, STEPS, [STEPS[0], {**STEPS[1], "path": "pool"}]])
def test_a_folder_says_how_to_pool(folder, steps):
    model = vlmfx.load(folder, dtype="float32", device="cpu")
    assert model.pooling == "last"
    at = "1_Pooling"
    if steps is not None:
        write(folder / "modules.json", steps)
        at = steps[1]["path"]
    write(folder / at / "config.json", {"pooling_mode_mean_tokens": True, "pooling_mode_lasttoken": False})
    assert vlmfx.load(folder, device="cpu").pooling == "mean"
    mean = embed(folder, "Hello there", dtype="float32", device="cpu")
    assert torch.equal(mean, embed(replace(model, pooling="mean"), "Hello there"))
    assert not torch.equal(mean, embed(model, "Hello there"))


@pytest.mark.parametrize(
    ("steps", "says"),
    [
        ([STEPS[0], {**STEPS[1], "path": "../elsewhere"}], "path is '../elsewhere', expected the name of a folder"),
        ([STEPS[0], {**STEPS[1], "path": 3}], "path is 3"),
        (
            [*STEPS, {"path": "3_Dense", "type": "sentence_transformers.models.Dense"}],
            "type is 'Dense', expected one of",
        ),
        ({"0": "Transformer"}, "expected a list of objects"),
        (["Transformer"], "expected a list of objects"),
        (STEPS, "there is no 1_Pooling/config.json"),
    ],
)
def test_modules_that_are_refused(folder, steps, says):
    write(folder / "modules.json", steps)
    with pytest.raises(CheckpointError, match=says) as caught:
        vlmfx.load(folder, device="cpu")
    assert is_one_sentence(caught.value)


def run(folder: Path, *arguments: str) -> int:
    return main(["embed", "--model", str(folder), "--dtype", "float32", "--device", "cpu", *arguments])


def test_the_command_line(family, tmp_path, capsys):
    path = tmp_path / "picture.png"
    path.write_bytes(encoded(picture(40, 50)))
    model = load_model(TINY[family])
    parts = [{"type": "image", "image": path}]
    messages = [[{"role": "user", "content": [*parts, {"type": "text", "text": text}]}] for text in ("One", "Two")]
    expected = embed(model, [{"messages": m} for m in messages], 8, use_tqdm=False)
    asked = ["--image", str(path), "--text", "One", "--text", "Two", "--dimensions", "8"]
    assert run(TINY[family], *asked) == 0
    assert torch.allclose(torch.tensor(json.loads(capsys.readouterr().out)), expected, atol=1e-6)
    assert run(TINY[family], *asked, "-o", str(tmp_path / "v.npy")) == 0
    assert run(TINY[family], *asked, "--output", str(tmp_path / "v.safetensors")) == 0
    assert capsys.readouterr().out == ""
    array = np.load(tmp_path / "v.npy", allow_pickle=False)
    assert array.dtype == np.float32
    assert torch.allclose(torch.from_numpy(array), expected, atol=1e-6)
    assert torch.allclose(load_file(tmp_path / "v.safetensors")["embeddings"], expected, atol=1e-6)
    assert run(TINY[family], "--image", str(path)) == 0
    (alone,) = json.loads(capsys.readouterr().out)
    whole = embed(model, {"messages": [{"role": "user", "content": parts}]})[0]
    assert torch.allclose(torch.tensor(alone), whole, atol=1e-6)
    assert run(TINY[family], "--raw", "--text", "Hello") == 0
    assert torch.allclose(torch.tensor(json.loads(capsys.readouterr().out)), embed(model, "Hello"), atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "text: there is nothing to embed"),
        (["--raw", "--image", "x.png"], "text: there is nothing to embed"),
        (["--text", "x", "-o", "x.pt"], "output: 'x.pt' ends in neither .npy nor .safetensors"),
        (["--text", "x", "-o", "vectors"], "output: 'vectors' ends in neither"),
        (["--text", "x", "-o", "no/such/folder/x.npy"], "cannot be written"),
        (["--text", "x", "-o", "no/such/folder/x.safetensors"], "cannot be written"),
        (["--text", "x", "--dimensions", "0"], "dimensions: it is 0"),
        (["--text", "x", "--image", "no/such.png"], "no/such.png"),
        (["--text", "x", "--chat-template", "no/such.jinja"], "chat_template"),
    ],
)
def test_an_error_is_one_sentence_on_stderr(arguments, says, capsys):
    assert run(TINY["llava"], *arguments) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("vlmfx: ")
    assert says in captured.err
    assert captured.err.endswith(".\n")
    assert captured.err.count("\n") == 1


def test_a_bare_conversation_is_one_prompt(llm):
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    (output,) = llm.embed(messages)
    assert output.outputs.embedding == llm.embed({"messages": messages})[0].outputs.embedding
    assert llm.score(messages, messages)[0].outputs.score == pytest.approx(1.0)
