"""vlmfx batch on tiny checkpoints: answers equal LLM.chat's, errors stay in their lines, a run that was cut goes on."""

from __future__ import annotations

import base64
import json
from collections import Counter

import pytest
import torch

from tests.golden_cases import TINY, load_model
from tests.pictures import encoded, picture
from vlmfx import LLM, SamplingParams
from vlmfx.batch.run import Run, run_batch
from vlmfx.cli import main
from vlmfx.errors import InvalidRequest

CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
URL = "data:image/png;base64," + base64.b64encode(encoded(picture(40, 30))).decode()


def llm_of(name: str = "qwen2_vl", task: str = "generate", **options) -> LLM:
    return LLM(load_model(TINY[name]), task=task, **options)


def line(custom_id, body, url=CHAT, **more) -> str:
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": body, **more})


def asks(text: str, *images: str, **fields) -> dict:
    parts = [{"type": "image_url", "image_url": {"url": image}} for image in images] + [{"type": "text", "text": text}]
    return {"messages": [{"role": "user", "content": parts}], "temperature": 0, "max_tokens": 5, **fields}


class Desk:
    """An input, its output, and runs of the one to the other."""

    def __init__(self, folder) -> None:
        self.source, self.target = folder / "in.jsonl", folder / "out.jsonl"

    def run(self, llm: LLM, *lines: str, task: str = "auto"):
        if lines:
            self.source.write_text("\n".join(lines), encoding="utf-8")
        return run_batch(self.source, self.target, lambda task: llm, served="tiny", task=task, use_tqdm=False)

    def results(self) -> list[dict]:
        text = self.target.read_text(encoding="utf-8")
        assert not text or text.endswith("\n")
        return [json.loads(one) for one in text.split("\n")[:-1]]

    def by_id(self) -> dict:
        results = self.results()
        assert max(Counter(one["custom_id"] for one in results if one["custom_id"]).values(), default=0) <= 1
        return {one["custom_id"] or one["id"]: one["response"] for one in results}


@pytest.fixture
def desk(tmp_path) -> Desk:
    return Desk(tmp_path)


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "minicpm_v"])
def test_tokens_equal_those_of_a_chat(desk, name):
    llm = llm_of(name)
    bodies = {"text": asks("Hello"), "image": asks("What?", URL), "long": asks("Why? " * 20, max_tokens=9)}
    bodies["drawn"] = asks("Hi", temperature=1, seed=3, top_k=20, n=2)
    shown = {"return_token_ids": True, "model": "tiny"}
    done = desk.run(llm, *(line(key, {**body, **shown}) for key, body in bodies.items()))
    assert (done.num_answered, done.num_failed, done.num_skipped) == (4, 0, 0)
    for key, response in desk.by_id().items():
        body = bodies[key]
        params = {k: v for k, v in body.items() if k != "messages"}
        (output,) = llm.chat(body["messages"], SamplingParams(**params))
        assert response["status_code"] == 200
        choices = response["body"]["choices"]
        assert [choice["token_ids"] for choice in choices] == [list(one.token_ids) for one in output.outputs]
        assert [choice["message"]["content"] for choice in choices] == [one.text for one in output.outputs]
        assert [choice["finish_reason"] for choice in choices] == [one.finish_reason for one in output.outputs]
        assert response["body"]["usage"]["prompt_tokens"] == len(output.prompt_token_ids)


def test_image_embeds_of_a_chat(desk):
    from safetensors.torch import save

    llm = llm_of("llava")
    rows = torch.randn(36, llm.model.config.text.hidden_size, generator=torch.Generator().manual_seed(0))
    content = [{"type": "image_embeds", "image_embeds": base64.b64encode(save({"image_embeds": rows})).decode()}]
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": "What?"}]}]
    desk.run(llm, line("a", {"messages": messages, "max_tokens": 4, "temperature": 0}))
    expected = llm.chat(messages, SamplingParams.greedy(max_tokens=4))[0].outputs[0].text
    assert desk.by_id()["a"]["body"]["choices"][0]["message"]["content"] == expected


def test_completions_share_a_line(desk):
    llm = llm_of()
    body = {"prompt": ["Hello", "Why"], "max_tokens": 3, "temperature": 0, "logprobs": 2}
    desk.run(llm, line("a", body, COMPLETIONS))
    choices = desk.by_id()["a"]["body"]["choices"]
    outputs = llm.generate(body["prompt"], SamplingParams.greedy(max_tokens=3, logprobs=2))
    assert [choice["text"] for choice in choices] == [output.outputs[0].text for output in outputs]
    assert all(len(choice["logprobs"]["tokens"]) == 3 for choice in choices)


def test_embeddings_of_texts_and_of_a_conversation(desk):
    llm = llm_of(task="embed")
    messages = asks("Hello", URL)["messages"]
    prompts = {"messages": messages, "add_generation_prompt": False}
    done = desk.run(
        llm,
        line("a", {"input": ["x y", "z"], "dimensions": 4}, EMBEDDINGS),
        line("b", {"messages": messages}, EMBEDDINGS),
        line("c", {"input": "x", "dimensions": 10**6}, EMBEDDINGS),
        line("d", asks("Hello")),
    )
    assert (done.num_answered, done.num_failed) == (2, 2)
    found = desk.by_id()
    vectors = [one["embedding"] for one in found["a"]["body"]["data"]]
    assert vectors == [pytest.approx(o.outputs.embedding, abs=1e-6) for o in llm.embed(["x y", "z"], dimensions=4)]
    expected = llm.embed(prompts)[0].outputs.embedding
    assert found["b"]["body"]["data"][0]["embedding"] == pytest.approx(expected, abs=1e-6)
    assert found["c"]["body"]["error"]["param"] == "dimensions"
    assert "--task generate" in found["d"]["body"]["error"]["message"]


def test_a_bad_line_is_an_error_line_and_nothing_more(desk):
    good = asks("Hello")
    bad = {
        "unknown": (line("unknown", {**good, "temprature": 1}), "temprature"),
        "model": (line("model", {**good, "model": "other"}), "model"),
        "stream": (line("stream", {**good, "stream": True}), "stream"),
        "image": (line("image", asks("x", "data:image/png;base64,AAAA")), None),
        "private": (line("private", asks("x", "http://127.0.0.1:9/x.png")), None),
        "url": (line("url", good, "/v1/audio"), "url"),
        "method": (line("method", good, method="GET"), "method"),
        "body": (line("body", None), "body"),
        "n": (line("n", {**good, "n": 20, "temperature": 1}), "n"),
        "vocab": (line("vocab", {**good, "logit_bias": {"99999999": 1}}), "logit_bias"),
        "task": (line("task", {"input": "x"}, EMBEDDINGS), "url"),
        "long": (line("long", asks("word " * 20000)), "prompt"),
    }
    lines = [line("first", good), *(text for text, _ in bad.values())]
    lines += [
        "{",
        "[1]",
        line(None, good),
        line("first", good),
        "",
        "\ud800".encode("utf-8", "replace").decode(),
        line("last", good),
    ]
    done = desk.run(llm_of(), *lines)
    found = desk.by_id()
    assert (done.num_answered, done.num_failed) == (2, len(bad) + 5)
    assert [found[key]["status_code"] for key in ("first", "last")] == [200, 200]
    for key, (_, param) in bad.items():
        error = found[key]["body"]["error"]
        expected = 404 if key == "model" else 400
        assert (found[key]["status_code"], error["type"]) == (expected, "invalid_request_error"), key
        assert error["message"].endswith("."), error
        assert param is None or error["param"] == param
    again = next(one for one in desk.results() if one["id"] == f"batch_req_line_{len(bad) + 5}")
    assert again["error"] == again["response"]["body"]["error"]
    assert "'first' again" in again["error"]["message"]
    before = desk.target.read_bytes()
    done = desk.run(llm_of())  # all there: nothing is done again, not even what has no id
    assert (done.num_answered, done.num_failed, done.num_skipped) == (0, 0, len(bad) + 7)
    assert desk.target.read_bytes() == before


def test_a_fault_of_ours_is_500_and_the_others_finish(desk, monkeypatch):
    llm = llm_of()
    real = llm.request

    def request(number, prompt, *args, **options):
        if "break" in str(prompt):
            raise RuntimeError("broken")
        return real(number, prompt, *args, **options)

    monkeypatch.setattr(llm, "request", request)
    done = desk.run(llm, line("a", asks("break")), line("b", asks("Hello")))
    assert (done.num_answered, done.num_failed) == (1, 1)
    found = desk.by_id()["a"]
    assert (found["status_code"], found["body"]["error"]["type"]) == (500, "server_error")


def test_a_step_that_fails_ends_what_was_in_it_and_no_more(desk, monkeypatch):
    llm = llm_of(max_num_seqs=1)
    real, calls = llm.engine.step, []

    def step(timeout=None):
        calls.append(timeout)
        if len(calls) == 2:
            raise RuntimeError("broken")
        return real(timeout)

    monkeypatch.setattr(llm.engine, "step", step)
    done = desk.run(llm, *(line(str(i), asks("Hello")) for i in range(6)))
    assert done.num_answered + done.num_failed == 6
    assert done.num_answered >= 4
    assert len(desk.by_id()) == 6


@pytest.mark.parametrize("left", [0, 1, 9, -5, -1])
def test_a_torn_last_line_is_cut_off_and_done_again(desk, left):
    llm = llm_of()
    lines = [line(str(i), asks(f"Hello {i}", max_tokens=2)) for i in range(4)]
    desk.run(llm, *lines)
    kept = desk.target.read_bytes().splitlines(keepends=True)
    desk.target.write_bytes(kept[0] + kept[1] + kept[2][:left])
    done = desk.run(llm)
    assert done.num_skipped == (3 if left == -1 else 2)  # a line that lacks its end alone is whole
    assert done.num_answered == 4 - done.num_skipped
    assert sorted(desk.by_id()) == ["0", "1", "2", "3"]
    assert desk.target.read_bytes().startswith(kept[0] + kept[1])


def test_an_interrupted_run_goes_on(desk, monkeypatch):
    lines = [line(str(i), asks(f"Hello {i}", max_tokens=3)) for i in range(12)]
    llm, write, count = llm_of(max_num_seqs=2), Run._write, [0]

    def interrupted(self, *args):
        count[0] += 1
        if count[0] == 5:
            raise KeyboardInterrupt
        return write(self, *args)

    monkeypatch.setattr(Run, "_write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        desk.run(llm, *lines)
    assert len(desk.results()) == 4
    assert not llm.engine.has_work
    done = desk.run(llm)  # the same LLM is fit for use
    assert (done.num_answered, done.num_skipped) == (8, 4)
    assert sorted(desk.by_id(), key=int) == [str(i) for i in range(12)]


def test_lines_are_read_as_there_is_room_and_run_together(desk, monkeypatch):
    llm = llm_of(max_num_seqs=2)
    sizes, start = [], Run._start

    def watched(self, line):
        yield from start(self, line)
        sizes.append(len(self._in_flight))

    monkeypatch.setattr(Run, "_start", watched)
    # One long answer among short ones: static batches of two would take 24 + 3 × 3 steps of decoding, and their prefills.
    lines = [line("long", asks("x", max_tokens=24, ignore_eos=True))]
    lines += [line(str(i), asks(f"Hello {i}", max_tokens=3, ignore_eos=True)) for i in range(7)]
    desk.run(llm, *lines)
    assert max(sizes) == 2 * 2
    assert llm.engine.counters.num_steps < 33
    assert [one["custom_id"] for one in desk.results()][-1] == "long"


def test_files_that_cannot_be_used_are_told_before_a_model_is_loaded(tmp_path, capsys):
    source, other = tmp_path / "in.jsonl", tmp_path / "other.txt"
    source.write_text(line("a", asks("x")), encoding="utf-8")
    other.write_text("my notes", encoding="utf-8")
    (tmp_path / "link").symlink_to(source)
    for given, target, says in (
        (source, source, "is the input itself"),
        (source, tmp_path / "link", "is the input itself"),
        (tmp_path / "no.jsonl", tmp_path / "out", "cannot be read"),
        (source, tmp_path / "no" / "out", "cannot be written"),
        (source, tmp_path, "cannot be written"),
        (source, other, "is not a result of a batch"),
    ):
        assert main(["batch", "no/such/model", str(given), str(target)]) == 1
        told = capsys.readouterr().err
        assert says in told
        assert (told.count("\n"), told[:7]) == (1, "vlmfx: ")
    assert other.read_text(encoding="utf-8") == "my notes"
    assert source.read_text(encoding="utf-8") == line("a", asks("x"))


def test_two_runs_do_not_write_one_file(desk):
    from vlmfx.batch.files import Results

    first = Results(desk.target)
    try:
        with pytest.raises(InvalidRequest, match="another run"):
            Results(desk.target)
    finally:
        first.close()


def test_the_command_line(tmp_path, capsys):
    source, target, model = tmp_path / "in.jsonl", tmp_path / "out.jsonl", str(TINY["qwen2_vl"])
    source.write_text(
        "\ufeff" + line("a", asks("Hello", model="tiny")) + "\n" + line("b", {}) + "\r\n", encoding="utf-8"
    )
    arguments = ["batch", model, str(source), str(target), "--device", "cpu", "--served-model-name", "tiny"]
    assert main([*arguments, "--dtype", "float32", "--max-num-seqs", "2"]) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines()[-1] == f"{target}: 1 answered, 1 failed, 0 skipped"
    assert main(arguments) == 0
    assert "0 answered, 0 failed, 2 skipped" in capsys.readouterr().err
    first = json.loads(target.read_text(encoding="utf-8").splitlines()[-1])
    assert first["response"]["body"]["model"] == "tiny"


def test_an_interruption_is_told(tmp_path, capsys, monkeypatch):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("vlmfx.batch.run.run_batch", interrupted)
    assert main(["batch", "m", "in", "out"]) == 130
    assert capsys.readouterr().err == "vlmfx: interrupted; run the same command again to go on.\n"
