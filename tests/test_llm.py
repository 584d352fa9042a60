"""LLM and generate: what does not change an answer, when it ends, what goes in and what comes out."""

from __future__ import annotations

import io
import subprocess
import sys
import warnings
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import vlmfx
from tests import invariants, rows
from tests.golden_cases import TINY, load_model
from tests.invariants import token_ids
from tests.pictures import about, encoded, mixed, picture, placeholder
from vlmfx import LLM, BatchError, InvalidRequest, SamplingParams
from vlmfx import llm as llm_module
from vlmfx.checkpoint import Model
from vlmfx.compile.buckets import Plan
from vlmfx.engine import runner
from vlmfx.engine.completion import Completion
from vlmfx.engine.drain import run
from vlmfx.engine.sequence import Request
from vlmfx.errors import InternalError, PlanError
from vlmfx.processing.prompt import prepare

NUM_TOKENS = 16


def greedy(n: int = NUM_TOKENS, **overrides: Any) -> SamplingParams:
    return SamplingParams.greedy(max_tokens=n, ignore_eos=True, **overrides)


@lru_cache
def alone(family: str) -> list[list[int]]:
    """The greedy ids of each of mixed's prompts, every one run by itself."""
    model = load_model(TINY[family])
    return [token_ids(LLM(model, max_num_seqs=1).generate(p, greedy()))[0] for p in mixed(model)]


@pytest.fixture(params=TINY)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def model(family: str) -> Model:
    return load_model(TINY[family])


@pytest.fixture
def llm(model: Model) -> LLM:
    return LLM(model)


# What does not change an answer


@settings(max_examples=12, deadline=None)
@given(
    family=st.sampled_from(sorted(TINY)),
    order=st.permutations(range(7)),
    size=st.integers(1, 7),
    max_num_seqs=st.sampled_from([1, 2, 3, 16]),
    lengths=st.lists(st.integers(1, NUM_TOKENS), min_size=7, max_size=7),
)
def test_batch_mates_order_rows_and_lengths_do_not_show(family, order, size, max_num_seqs, lengths):
    """Prompts end after different lengths, so that rows become free and others move into them."""
    model = load_model(TINY[family])
    prompts, chosen = mixed(model), order[:size]
    params = [greedy(lengths[i]) for i in chosen]
    outputs = LLM(model, max_num_seqs=max_num_seqs).generate([prompts[i] for i in chosen], params, use_tqdm=False)
    assert token_ids(outputs) == [alone(family)[i][: lengths[i]] for i in chosen]


@pytest.mark.parametrize("max_num_seqs", [1, 2, 16])
def test_max_num_seqs_does_not_show(model, family, max_num_seqs):
    outputs = LLM(model, max_num_seqs=max_num_seqs).generate(mixed(model), greedy(), use_tqdm=False)
    assert token_ids(outputs) == alone(family)


@pytest.mark.parametrize("slack", [None, 0, 1, 3, 50])
def test_the_bucket_does_not_show(model, family, slack):
    requests = [prepare(model.processor, prompt) for prompt in mixed(model)]
    assert invariants.greedy_through_cache(model, requests, NUM_TOKENS, slack=slack) == alone(family)
    if slack is not None:
        paged = invariants.greedy_through_cache(model, requests, NUM_TOKENS, slack=slack, is_eager=False)
        assert paged == alone(family)
    for request, expected in zip(requests[:3], alone(family), strict=False):
        assert invariants.greedy_through_cache(model, [request], NUM_TOKENS, slack=slack) == [expected]


def test_decoding_over_the_cache_equals_recomputing(model, family):
    requests = [prepare(model.processor, prompt) for prompt in mixed(model)]
    with torch.no_grad():
        max_lens = [len(r.token_ids) + NUM_TOKENS for r in requests]
        executor = rows.paged(model, len(requests), max(max_lens))
        steps = [rows.prefill(model, requests, max_lens, executor)[1]]
        for step in range(1, NUM_TOKENS):
            ids = torch.tensor([tokens[step - 1] for tokens in alone(family)])
            positions = [r.next_position + step - 1 for r in requests]
            lens = [len(r.token_ids) + step for r in requests]
            steps.append(rows.decode(model, ids, positions, lens, max_lens, executor)[1])
    for row, (request, generated) in enumerate(zip(requests, alone(family), strict=True)):
        expected = invariants.recomputed(model, request, generated)
        torch.testing.assert_close(torch.stack(steps, 1)[row], expected, atol=1e-4, rtol=1e-4)
        assert expected.argmax(-1).tolist() == generated


def test_what_a_row_held_before_does_not_show(model, family):
    """Embeddings that overflow make NaN of their own request's cache, and of nothing else."""
    feature_rows = {"llava": 36, "minicpm_v": 64}.get(family, 4)
    hidden = model.config.text.hidden_size
    rows = torch.full((feature_rows, hidden), 3e38)
    rows[:, ::2] = -3e38
    where = {"image_size_list": [(50, 40)]} if family == "minicpm_v" else {"image_grid_thw": [[1, 4, 4]]}
    embeds = rows if family == "llava" else {"image_embeds": rows, **where}
    bad = {"prompt": placeholder(model), "multi_modal_data": {"image": embeds}}
    for max_num_seqs in (1, 2, 16):
        prompts = [bad, *mixed(model)]
        outputs = LLM(model, max_num_seqs=max_num_seqs).generate(prompts, greedy(), use_tqdm=False)
        assert token_ids(outputs)[1:] == alone(family)


def test_equal_seeds_give_equal_tokens_in_any_batch(model):
    params = [
        SamplingParams(temperature=0.9, top_p=0.95, top_k=50, seed=i, max_tokens=10 + i, ignore_eos=True)
        for i in range(7)
    ]
    prompts = mixed(model)
    single = [token_ids(LLM(model).generate(p, s))[0] for p, s in zip(prompts, params, strict=True)]
    for max_num_seqs in (2, 16):
        outputs = LLM(model, max_num_seqs=max_num_seqs).generate(prompts[::-1], params[::-1], use_tqdm=False)
        assert token_ids(outputs)[::-1] == single
    same = LLM(model).generate(["x"] * 3, [params[0], params[0], params[1]], use_tqdm=False)
    assert token_ids(same)[0] == token_ids(same)[1] != token_ids(same)[2]


def test_without_a_seed_samples_differ(llm):
    outputs = llm.generate(["x"] * 4, SamplingParams(max_tokens=12, ignore_eos=True), use_tqdm=False)
    assert len({tuple(ids) for ids in token_ids(outputs)}) == 4


def test_greedy_and_sampled_rows_share_a_batch(model, family):
    params = [greedy() if i % 2 == 0 else SamplingParams(seed=i, max_tokens=9) for i in range(7)]
    outputs = LLM(model).generate(mixed(model), params, use_tqdm=False)
    assert token_ids(outputs)[::2] == alone(family)[::2]


# When it ends


def test_max_tokens(llm, family):
    for n in (1, 2, 7):
        (output,) = llm.generate("Hello there", greedy(n))
        assert token_ids([output]) == [alone(family)[0][:n]]
        assert output.outputs[0].finish_reason == "length"
        assert output.outputs[0].stop_reason is None
        assert output.metrics.output_tokens == n
        assert output.metrics.prompt_tokens == len(output.prompt_token_ids)


def test_eos_ends_and_is_not_in_the_text(model, family):
    ids = alone(family)[0]
    eos = next(i for i in ids[2:] if ids.index(i) > 1)
    at = ids.index(eos)
    ending = LLM(replace(model, eos_token_ids=(eos,)))
    (output,) = ending.generate("Hello there", SamplingParams.greedy(max_tokens=NUM_TOKENS))
    completion = output.outputs[0]
    assert list(completion.token_ids) == ids[: at + 1]
    assert (completion.finish_reason, completion.stop_reason) == ("stop", None)
    assert completion.text == model.processor.tokenizer.decode(ids[:at])
    (output,) = ending.generate("Hello there", greedy())
    assert list(output.outputs[0].token_ids) == ids


def test_none_means_greedy_to_eos(model, family):
    ids = alone(family)[0]
    (output,) = LLM(replace(model, eos_token_ids=(ids[4],))).generate("Hello there")
    assert list(output.outputs[0].token_ids) == ids[: ids.index(ids[4]) + 1]


def test_stop_token_ids_and_min_tokens(llm, family):
    ids = alone(family)[0]
    stop = ids[3]
    (output,) = llm.generate("Hello there", greedy(stop_token_ids=[stop]))
    assert output.outputs[0].stop_reason == stop
    assert list(output.outputs[0].token_ids) == ids[: ids.index(stop) + 1]
    (output,) = llm.generate("Hello there", greedy(stop_token_ids=[stop], min_tokens=NUM_TOKENS))
    found = list(output.outputs[0].token_ids)
    assert len(found) == NUM_TOKENS
    assert stop not in found, "it is not drawn before it may stop"
    assert found[: ids.index(stop)] == ids[: ids.index(stop)]


def test_stop_strings(llm):
    (full,) = llm.generate("Hello there", greedy(40))
    text = full.outputs[0].text
    stop = next(text[i : i + 2] for i in range(len(text) // 2, len(text) - 2) if text[i : i + 2].isascii())
    for include in (False, True):
        params = greedy(40, stop=["never in it at all", stop], include_stop_str_in_output=include)
        pieces: list[str] = []
        (output,) = llm.generate("Hello there", params, on_text=lambda number, piece, to=pieces: to.append(piece))
        completion = output.outputs[0]
        assert completion.text == text[: text.index(stop) + (len(stop) if include else 0)]
        assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)
        assert "".join(pieces) == completion.text


def test_the_end_of_the_context_ends_it(family):
    llm = LLM(TINY[family], max_model_len=48)
    (output,) = llm.generate("Hello there", SamplingParams.greedy(ignore_eos=True))
    assert len(output.prompt_token_ids) + len(output.outputs[0].token_ids) == 48
    assert output.outputs[0].finish_reason == "length"


@pytest.mark.parametrize("last", ["eos", "stop token", "length"])
def test_text_that_is_still_open_at_the_end_comes_out(model, last):
    """An emoji at the end of an answer is four byte tokens, which the detokenizer holds until it knows what follows."""
    tokenizer = model.processor.tokenizer
    eos = tokenizer.eos_token_id
    assert eos is not None
    ids = tokenizer.encode("ok 🙂", add_special_tokens=False)
    end = [] if last == "length" else [eos]
    stops = {"stop_token_ids": [eos], "ignore_eos": True} if last == "stop token" else {}
    params = SamplingParams.greedy(max_tokens=len(ids) + len(end), **stops)
    made = Completion(replace(model, eos_token_ids=(eos,)), params, 0, len(ids) + len(end))
    streamed = "".join(made.push(i, None) for i in [*ids, *end])
    completion = made.output()
    assert completion.text == streamed == tokenizer.decode(ids)
    assert completion.text.endswith("ok 🙂")
    assert completion.finish_reason == ("length" if last == "length" else "stop")


# What comes out


def test_logprobs(llm, model):
    outputs = llm.generate(mixed(model), [greedy(logprobs=n) for n in (0, 1, 2, 5, 0, 20, 3)], use_tqdm=False)
    for output, n in zip(outputs, (0, 1, 2, 5, 0, 20, 3), strict=True):
        completion = output.outputs[0]
        assert completion.logprobs is not None
        assert len(completion.logprobs) == len(completion.token_ids)
        chosen = []
        for token, candidates in zip(completion.token_ids, completion.logprobs, strict=True):
            assert len(candidates) == max(n, 1)  # greedy: the sampled token is the most likely one
            assert candidates[token].rank == 1
            assert candidates[token].decoded_token == model.processor.tokenizer.decode(
                [token], skip_special_tokens=False
            )
            assert all(c.logprob <= candidates[token].logprob <= 0 for c in candidates.values())
            assert sorted(c.rank for c in candidates.values()) == list(range(1, max(n, 1) + 1))
            chosen.append(candidates[token].logprob)
        assert completion.cumulative_logprob == pytest.approx(sum(chosen))


def test_a_sampled_token_is_among_its_logprobs(llm):
    (output,) = llm.generate("x", SamplingParams(seed=1, max_tokens=40, logprobs=2, ignore_eos=True))
    completion = output.outputs[0]
    assert all(token in c for token, c in zip(completion.token_ids, completion.logprobs, strict=True))
    assert {len(c) for c in completion.logprobs} <= {2, 3}
    assert any(c[token].rank > 2 for token, c in zip(completion.token_ids, completion.logprobs, strict=True))


def test_logprobs_of_one_prompt_do_not_show_in_another(llm):
    first, second = llm.generate(["a", "b"], [greedy(logprobs=3), greedy()], use_tqdm=False)
    assert first.outputs[0].logprobs is not None
    assert second.outputs[0].logprobs is None
    assert second.outputs[0].cumulative_logprob is None


def test_streamed_pieces_add_up(model):
    pieces: dict[int, list[str]] = {}
    outputs = LLM(model, max_num_seqs=3).generate(
        mixed(model),
        [greedy(5 + i) for i in range(7)],
        use_tqdm=False,
        on_text=lambda number, piece: pieces.setdefault(number, []).append(piece),
    )
    for number, output in enumerate(outputs):
        assert output.request_id == str(number)
        assert "".join(pieces.get(number, [])) == output.outputs[0].text
        assert output.outputs[0].text == model.processor.tokenizer.decode(output.outputs[0].token_ids)
    assert any(len(p) > 2 for p in pieces.values())


def test_outputs_can_be_off(llm, model):
    (output,) = llm.generate("x", greedy(detokenize=False))
    assert output.outputs[0].text == ""
    assert len(output.outputs[0].token_ids) == NUM_TOKENS


def test_one_progress_bar_for_several_prompts(llm, capsys):
    llm.generate("x", greedy(2))
    llm.generate(["x"], greedy(2))
    llm.generate(["x", "y"], greedy(2), use_tqdm=False)
    assert capsys.readouterr().err == ""
    llm.generate(["x", "y", "z"], greedy(2))
    error = capsys.readouterr().err
    assert "3/3" in error
    assert {line.split(":")[0] for line in error.replace("\r", "\n").split("\n") if line.strip()} == {"generate"}


# What goes in


def test_forms_of_an_image_prompt(model, tmp_path):
    """One picture as PIL image, path, bytes, array and in messages: the same ids, pixels and answer."""
    llm, image = LLM(model), picture(50, 40)
    path = tmp_path / "picture.png"
    image.save(path)
    mark = placeholder(model)
    text = f"{mark}What is it?"
    forms: list[Any] = [image, [image], path, str(path), encoded(image), np.asarray(image), [np.asarray(image)]]
    expected = llm.generate({"prompt": text, "multi_modal_data": {"image": image}}, greedy())[0]
    for form in forms:
        (output,) = llm.generate({"prompt": text, "multi_modal_data": {"image": form}}, greedy())
        assert token_ids([output]) == token_ids([expected])
    ids = model.processor.tokenizer.encode(text)
    expanded = expected.prompt_token_ids
    id_forms = [ids, tuple(ids), np.array(ids), torch.tensor(ids), expanded]  # an output's ids may be passed on
    for prompt_ids in id_forms:
        request = {"prompt_token_ids": prompt_ids, "multi_modal_data": {"image": image}}
        (output,) = llm.generate(request, greedy())
        assert output.prompt_token_ids == expanded
        assert output.prompt is None
        assert token_ids([output]) == token_ids([expected])


def test_forms_of_messages(model, tmp_path):
    llm, image = LLM(model), picture(50, 40)
    path = tmp_path / "picture.png"
    image.save(path)
    url = "data:image/png;base64," + __import__("base64").b64encode(encoded(image)).decode()
    parts: list[Any] = [
        {"type": "image", "image": image},
        {"type": "image", "image": str(path)},
        {"type": "image", "path": str(path)},
        {"type": "image", "image": path},
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "image_url", "image_url": url},
    ]
    requests = [
        {"messages": [{"role": "user", "content": [part, {"type": "text", "text": "What is it?"}]}]} for part in parts
    ]
    outputs = llm.generate(requests, greedy(), use_tqdm=False)
    assert len({tuple(ids) for ids in token_ids(outputs)}) == 1
    assert len({tuple(output.prompt_token_ids) for output in outputs}) == 1
    assert outputs[0].prompt is not None
    assert "What is it?" in outputs[0].prompt


def test_ready_embeddings_answer_as_their_images(model, family):
    """Rows that `encode` made, in each form they may be handed over, for two images."""
    llm, images = LLM(model), [picture(50, 40), picture(40, 60, 1)]
    request = about(model, *images)
    inputs = prepare(model.processor, request)
    (rows,) = runner.encode(model, [inputs])
    assert rows is not None
    expected = token_ids(llm.generate(request, greedy()))
    forms: list[Any]
    if family == "llava":
        per_image = list(rows.split(36))
        forms = [rows, torch.stack(per_image), per_image, [r[None] for r in per_image]]
    elif family == "minicpm_v":
        sizes, per_image = [image.size for image in images], list(rows.split(64))
        forms = [
            {"image_embeds": rows, "image_size_list": sizes},
            {"image_embeds": torch.stack(per_image), "image_sizes": torch.tensor(sizes)},
            {"image_embeds": per_image, "image_size_list": sizes},
            [{"image_embeds": r, "image_size_list": [s]} for r, s in zip(per_image, sizes, strict=True)],
        ]
    else:
        layouts = [model.processor.functions.layout(model.processor.config, (i.height, i.width)) for i in images]
        grids = [[1, layout.grid[1] * 2, layout.grid[2] * 2] for layout in layouts]
        per_image = list(rows.split([layout.num_rows for layout in layouts]))
        forms = [
            {"image_embeds": rows, "image_grid_thw": torch.tensor(grids)},
            {"image_embeds": rows[None], "image_grid_thw": grids},
            {"image_embeds": per_image, "image_grid_thw": grids},
            [{"image_embeds": r, "image_grid_thw": g} for r, g in zip(per_image, grids, strict=True)],
        ]
    for form in forms:
        outputs = llm.generate({"prompt": request["prompt"], "multi_modal_data": {"image": form}}, greedy())
        assert token_ids(outputs) == expected
    part = per_image[0] if family == "llava" else forms[3][0]
    message = {
        "role": "user",
        "content": [{"type": "image_embeds", "image_embeds": part}, {"type": "text", "text": "?"}],
    }
    plain = {"role": "user", "content": [{"type": "image", "image": images[0]}, {"type": "text", "text": "?"}]}
    both = llm.generate([{"messages": [message]}, {"messages": [plain]}], greedy(), use_tqdm=False)
    assert token_ids(both)[0] == token_ids(both)[1]


def test_touching_expanded_placeholders_are_understood(model):
    """Two images side by side in ids that are expanded already, as an output's prompt_token_ids are."""
    llm, images = LLM(model), [picture(50, 40), picture(40, 60, 1)]
    (first,) = llm.generate(about(model, *images), greedy())
    again = {"prompt_token_ids": first.prompt_token_ids, "multi_modal_data": {"image": images}}
    (second,) = llm.generate(again, greedy())
    assert second.prompt_token_ids == first.prompt_token_ids
    assert token_ids([second]) == token_ids([first])


@pytest.mark.parametrize("kind", ["1x1", "CMYK", "P", "I;16", "L", "LA", "RGBA", "animated", "1x60", "60x1"])
def test_unusual_images_work(model, kind):
    if "x" in kind:
        width, height = map(int, kind.split("x"))
        source: Any = encoded(picture(width, height))
    elif kind == "CMYK":
        source = encoded(picture(40, 30, mode="CMYK"), "JPEG")
    elif kind == "I;16":
        source = encoded(Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40) * 50))
    elif kind == "animated":
        frames = [picture(40, 30, seed) for seed in range(3)]
        source = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
        assert Image.open(io.BytesIO(source)).n_frames == 3  # type: ignore[attr-defined]
    else:
        source = encoded(picture(40, 30, mode=kind))
    (output,) = LLM(model).generate(about(model, source), greedy(4))
    assert len(token_ids([output])[0]) == 4


def test_mm_processor_kwargs(model, family):
    llm, image = LLM(model), picture(100, 100)
    if family == "llava":
        with pytest.raises(InvalidRequest, match="'max_pixels'; this model knows none"):
            llm.generate({**about(model, image), "mm_processor_kwargs": {"max_pixels": 100}})
        return
    setting = {"max_pixels": 56 * 56}
    if family == "minicpm_v":
        image, setting = picture(640, 480), {"max_slice_nums": 1}
    small, plain = llm.generate(
        [{**about(model, image), "mm_processor_kwargs": setting}, about(model, image)],
        greedy(2),
        use_tqdm=False,
    )
    # In Qwen-VL a row is 28 pixels wide, in the last 32; in MiniCPM-V a picture is 64 rows between two marks.
    rows = {"minicpm_v": (3 * 66, 66), "qwen2_vl": (16, 4), "qwen2_5_vl": (16, 4), "qwen3_vl": (9, 1)}[family]
    assert len(plain.prompt_token_ids) - len(small.prompt_token_ids) == rows[0] - rows[1]


def test_generate_takes_a_folder_a_model_and_an_llm(family, model):
    expected = alone(family)[0]
    for source in (TINY[family], str(TINY[family]), model, LLM(model)):
        outputs = vlmfx.generate(source, "Hello there", greedy())
        assert token_ids(outputs) == [expected]
    assert token_ids(vlmfx.generate(TINY[family], ["Hello there"], greedy(), dtype="float32", max_model_len=256)) == [
        expected
    ]
    assert vlmfx.generate(model, []) == []


# Errors


def test_a_bare_prompt_that_is_wrong_raises(model):
    llm = LLM(invariants.without_compute(model))
    with pytest.raises(InvalidRequest, match="1 image placeholder but 0 images were given") as caught:
        llm.generate(placeholder(model) + "What is it?")
    assert (caught.value.field, caught.value.found, caught.value.expected) == ("prompt", 1, 0)
    assert invariants.is_one_sentence(caught.value)


def test_a_wrong_place_of_a_list_holds_its_error(llm, model, family):
    prompts = [*mixed(model), placeholder(model), about(model, b"")]
    with pytest.warns(UserWarning, match=r"2 of 9 prompts failed; the first: prompt: ") as caught:
        outputs = llm.generate(prompts, greedy(), use_tqdm=False)
    assert len(caught) == 1
    assert token_ids(outputs[:-2]) == alone(family)
    for number, output in enumerate(outputs[-2:], start=7):
        assert isinstance(output.error, InvalidRequest)
        assert output.request_id == str(number)
        assert output.finished
        assert (output.outputs[0].text, output.outputs[0].finish_reason) == ("", "error")
        assert output.outputs[0].token_ids == ()
    assert outputs[-2].prompt == prompts[-2]


def test_a_list_of_one_wrong_prompt_does_not_raise(llm, model):
    with pytest.warns(UserWarning, match="1 of 1 prompts failed"):
        (output,) = llm.generate([placeholder(model)])
    assert output.error is not None


def test_on_error_raise_comes_after_the_others_are_done(llm, model, family):
    prompts = [mixed(model)[0], placeholder(model), mixed(model)[1]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(BatchError, match="1 of 3 prompts failed; the first: prompt: ") as caught:
            llm.generate(prompts, greedy(), use_tqdm=False, on_error="raise")
    outputs = caught.value.outputs
    assert token_ids([outputs[0], outputs[2]]) == alone(family)[:2]
    assert outputs[1].error is not None
    with pytest.raises(InvalidRequest, match="on_error"):
        llm.generate("x", on_error="ignore")


def test_a_decode_step_that_fails_is_tried_one_by_one(model, family, monkeypatch):
    """As where the program of so many rows cannot be loaded."""
    decode = runner.decode

    def fail(model: Any, ids: torch.Tensor, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        if len(ids) == 2:
            raise RuntimeError("no such program")
        return decode(model, ids, *args)

    monkeypatch.setattr(runner, "decode", fail)
    outputs = LLM(model, max_num_seqs=2).generate(mixed(model), greedy(), use_tqdm=False)
    assert token_ids(outputs) == alone(family)


def test_a_text_that_cannot_be_decoded_fails_alone(model, family, monkeypatch):
    prompts, decode = mixed(model), runner.decode
    longest = max(len(prepare(model.processor, p).token_ids) for p in prompts) + NUM_TOKENS

    def fail(model: Any, ids: torch.Tensor, rows: Any, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        if any(row.max_len == longest for row in rows):
            raise RuntimeError("out of memory")
        return decode(model, ids, rows, *args)

    monkeypatch.setattr(runner, "decode", fail)
    llm = LLM(model)
    with pytest.warns(UserWarning, match=f"1 of {len(prompts)} prompts failed"):
        outputs = llm.generate(prompts, greedy(), use_tqdm=False)
    (bad,) = [i for i, o in enumerate(outputs) if o.error is not None]
    assert isinstance(outputs[bad].error, InternalError)
    assert "out of memory" in str(outputs[bad].error)
    assert token_ids(outputs[:bad] + outputs[bad + 1 :]) == alone(family)[:bad] + alone(family)[bad + 1 :]
    monkeypatch.undo()
    assert token_ids(llm.generate(prompts, greedy(), use_tqdm=False)) == alone(family)


@pytest.mark.parametrize(("option", "value"), [("plan", Plan(max_segments=1, max_seqs=1)), ("strict", True)])
def test_options_of_programs_are_refused_where_there_are_none(model, option, value):
    with pytest.raises(
        InvalidRequest, match=f'^{option}: it was given, but backend "eager" on cpu compiles nothing; choose another or'
    ):
        LLM(model, **{option: value})


def test_a_plan_must_be_one_for_the_model(model):
    plan = Plan(prefill=(16,), decode=(1,), max_segments=1, max_seqs=1)
    with pytest.raises(PlanError, match=r"^plan: it has no rungs for encode, which the task needs; use"):
        LLM(model, backend="inductor", plan=plan)


def test_options(model, family):
    with pytest.raises(InvalidRequest, match="LLM has no option max_modle_len; remove it") as caught:
        LLM(TINY[family], max_modle_len=10)
    assert caught.value.field == "max_modle_len"
    with pytest.raises(InvalidRequest, match="tensor_parallel_size: 2 is not implemented; leave it at 1"):
        LLM(TINY[family], tensor_parallel_size=2)
    LLM(model, tensor_parallel_size=1, task="generate", quantization=None, trust_remote_code=True)
    wrong: Any
    for wrong in (0, -1, 1.5, "2"):
        with pytest.raises(InvalidRequest, match="max_num_seqs"):
            LLM(model, max_num_seqs=wrong)
    for wrong in (1, 0, 10**9, "100"):
        with pytest.raises(InvalidRequest, match="max_model_len"):
            LLM(TINY[family], max_model_len=wrong)
    with pytest.raises(InvalidRequest, match=r"dtype: the model is loaded already; pass it to vlmfx.load"):
        LLM(model, dtype="float32")
    with pytest.raises(InvalidRequest, match="the LLM is built already"):
        vlmfx.generate(LLM(model), "x", max_model_len=20)
    with pytest.raises(vlmfx.VlmfxError, match='dtype is "float8"'):
        LLM(TINY[family], dtype="float8")
    with pytest.raises(vlmfx.VlmfxError, match='device is "tpu"'):
        LLM(TINY[family], device="tpu")


def test_sampling_params_are_one_or_one_a_prompt(llm):
    with pytest.raises(InvalidRequest, match="1 were given for 2 prompts; pass one, or one a prompt") as caught:
        llm.generate(["x", "y"], [greedy()])
    assert (caught.value.found, caught.value.expected) == (1, 2)
    for wrong in ({"temperature": 0}, 0.5, [greedy(), None], [{"max_tokens": 1}] * 2, "greedy"):
        with pytest.raises(InvalidRequest, match="sampling_params: found a "):
            llm.generate(["x", "y"], wrong)
    outputs = llm.generate(["x", "y"], (greedy(2), greedy(3)), use_tqdm=False)
    assert [len(ids) for ids in token_ids(outputs)] == [2, 3]


def test_the_common_path_imports_no_transformers(family):
    code = f"""
import sys, vlmfx
from PIL import Image
request = {{"messages": [{{"role": "user", "content": [
    {{"type": "image", "image": Image.new("RGB", (40, 30))}}, {{"type": "text", "text": "What?"}}]}}]}}
print(len(vlmfx.generate({str(TINY[family])!r}, request, vlmfx.SamplingParams(max_tokens=3))[0].outputs[0].token_ids))
assert "transformers" not in sys.modules, "transformers was imported"
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) in (1, 2, 3)


def test_an_unexpected_exception_fails_its_prompt_alone(llm, model, monkeypatch):
    def fail(cfg, ids, layouts):
        if list(ids) == bad["prompt_token_ids"]:
            raise RuntimeError("boom")
        return positions(cfg, ids, layouts)

    bad = {"prompt_token_ids": [3] * 5}
    positions = model.processor.functions.positions
    monkeypatch.setattr(model.processor.functions, "positions", fail)
    with pytest.raises(InternalError, match="boom"):
        llm.generate(bad, greedy(), use_tqdm=False)
    with pytest.warns(UserWarning, match="1 of 2"):
        good, failed = llm.generate(["Hello", bad], greedy(), use_tqdm=False)
    assert good.error is None
    assert isinstance(failed.error, InternalError)


def test_the_first_token_is_timed_from_the_call(llm, model):
    """Not from when a row became free: of prompts that run one after the other, each waits for those before it."""
    outputs = LLM(model, max_num_seqs=1).generate(["Hello"] * 3, greedy(), use_tqdm=False)
    metrics = [output.metrics for output in outputs]
    firsts = [m.time_to_first_token_s or 0.0 for m in metrics if m is not None]
    assert len(firsts) == 3
    assert 0 < firsts[0] < firsts[1] < firsts[2]


# What starts together, and what fails there


def test_the_budget_of_a_prefill_does_not_show(model, family):
    requests = [Request.ready(n, prepare(model.processor, p), greedy(), 0.0) for n, p in enumerate(mixed(model))]
    for max_tokens in (1, 40, 100):
        outputs = run(model, requests, max_num_seqs=4, max_tokens=max_tokens)
        ordered = sorted(outputs, key=lambda o: int(o.request_id))
        assert token_ids(ordered) == alone(family)


def test_a_prefill_that_fails_for_one_prompt_fails_it_alone(model, family, monkeypatch):
    """As when memory runs out: the batch is tried again one prompt at a time."""
    prompts = mixed(model)
    bad = len(prepare(model.processor, prompts[2]).token_ids)
    prefill = runner.prefill

    def fail(model: Any, inputs: Any, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        if any(len(one.token_ids) == bad for one in inputs):
            raise RuntimeError("out of memory")
        return prefill(model, inputs, *args)

    monkeypatch.setattr(runner, "prefill", fail)
    with pytest.warns(UserWarning, match="1 of 7 prompts failed"):
        outputs = LLM(model).generate(prompts, greedy(), use_tqdm=False)
    error = outputs[2].error
    assert isinstance(error, InternalError)
    assert "out of memory" in str(error)
    assert token_ids(outputs[:2] + outputs[3:]) == alone(family)[:2] + alone(family)[3:]
    with pytest.raises(InternalError, match="out of memory"):
        LLM(model).generate(prompts[2], greedy())


def test_pixels_are_loaded_when_there_is_room(model, monkeypatch):
    """Of many prompts with images only those that run have their pixels in memory."""
    loaded: list[int] = []
    complete = vars(llm_module)["complete"]

    def count(processor: Any, made: Any) -> Any:
        loaded.append(1)
        return complete(processor, made)

    monkeypatch.setattr(llm_module, "complete", count)
    seen: list[int] = []
    LLM(model, max_num_seqs=2).generate(
        [about(model, picture(30, 40, n)) for n in range(6)],
        greedy(3),
        use_tqdm=False,
        on_text=lambda number, piece: seen.append(len(loaded)),
    )
    assert seen[0] <= 4  # two that run, and two that may be next
    assert len(loaded) == 6


@pytest.mark.parametrize("fill", [1e5, -1e38])
def test_embeddings_beyond_the_dtype_are_refused(fill):
    llm = LLM(TINY["llava"], dtype="float16")
    prompt = {"prompt": "<image>What?", "multi_modal_data": {"image": torch.full((36, 48), fill)}}
    with pytest.raises(InvalidRequest, match="hold values beyond float16"):
        llm.generate(prompt, greedy())
    with pytest.raises(InvalidRequest, match="hold values beyond float16"):
        LLM(TINY["llava"], dtype="float16", task="embed").embed(prompt)


def test_settings_of_the_model_hold_where_a_prompt_sets_none():
    """vLLM's own example makes its LLM with them."""
    model = load_model(TINY["qwen2_vl"])
    plain = about(model, picture(200, 200))
    few: dict[str, Any] = {"mm_processor_kwargs": {"max_pixels": 3136}}
    expected = {
        True: len(prepare(model.processor, plain | few).token_ids),
        False: len(prepare(model.processor, plain).token_ids),
    }
    assert expected[True] < expected[False]
    llm = LLM(model, **few)
    own = {"mm_processor_kwargs": {"max_pixels": model.processor.config.max_pixels}}
    params = greedy(1)
    outputs = llm.generate([plain, plain | own], params, use_tqdm=False)
    assert [len(output.prompt_token_ids) for output in outputs] == [expected[True], expected[False]]
    assert vlmfx.count_tokens(llm, plain) == vlmfx.count_tokens(TINY["qwen2_vl"], plain, **few) == expected[True]
    assert len(LLM(TINY["qwen2_vl"], **few).generate(plain, params)[0].prompt_token_ids) == expected[True]


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"max_pixels": 0}, "mm_processor_kwargs.max_pixels"),
        ({"crops": 1}, "mm_processor_kwargs"),
        ([1], "mm_processor_kwargs"),
    ],
)
def test_settings_of_the_model_are_checked_when_it_is_made(settings, field):
    with pytest.raises(InvalidRequest) as caught:
        LLM(load_model(TINY["qwen2_vl"]), mm_processor_kwargs=settings)
    assert caught.value.field == field


@pytest.mark.parametrize(
    "name",
    [
        "swap_space",
        "disable_mm_preprocessor_cache",
    ],
)
def test_options_of_vllm_without_an_effect_are_named(name):
    for make in (
        lambda **options: LLM("no/such/folder", **options),
        lambda **o: vlmfx.count_tokens("no/such", "x", **o),
    ):
        with pytest.raises(
            InvalidRequest, match=f"{name}: vLLM has it, but it has no effect here yet; remove it"
        ) as caught:
            make(**{name: 0.9})
        assert caught.value.field == name


@pytest.mark.parametrize(
    "options",
    [
        {"tensor_parallel_size": np.array([1, 2])},
        {"tensor_parallel_size": np.array([1])},
        {"tensor_parallel_size": True},
        {"quantization": torch.zeros(2)},
        {"tensor_parallel_size": 10**5000},
        {"max_num_seqs": 10**5000 * -1},
        {"max_num_seqs": True},
        {"media_io_kwargs": {"video": {"num_frames": 0}}},
        {"media_io_kwargs": 5},
        {"limit_mm_per_prompt": {"image": -(10**5000)}},
        {"limit_mm_per_prompt": {10**5000: 1}},
        {"mm_processor_kwargs": 5},
        {"task": 10**5000},
    ],
)
def test_wrong_options_are_refused_before_anything_is_loaded(options):
    with pytest.raises(InvalidRequest) as caught:
        LLM("no/such/folder", **options)
    assert caught.value.field.startswith(next(iter(options)))
    assert invariants.is_one_sentence(caught.value)


def test_numbers_of_5001_digits_are_refused_wherever_they_stand():
    model = load_model(TINY["llava"])
    with pytest.raises(InvalidRequest, match="max_model_len"):
        LLM(TINY["llava"], max_model_len=10**5000)
    wrong: Any = 10**5000
    with pytest.raises(InvalidRequest, match="on_error"):
        LLM(model).generate("x", on_error=wrong)
    with pytest.raises(InvalidRequest, match="dimensions"):
        vlmfx.embed(model, "x", dimensions=wrong)
