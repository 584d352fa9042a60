"""Backends: every one gives what the function gives, writes the cache where it is, and refuses what it was not lowered for.

The programs are compiled once for all tests: a step by Inductor and by AOTInductor, an MLP by the latter alone."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from zipfile import ZipFile

import pytest
import torch

from tests.compile.functions import mlp, mlp_args, needs_compiler, step, step_args
from vlmfx.compile.counter import CompileCounter
from vlmfx.compile.package import load
from vlmfx.compile.stages import jit
from vlmfx.errors import CompileError, DeviceError
from vlmfx.tree import leaves, tree_map

ROOT = Path(__file__).resolve().parents[2]
BACKENDS = ["eager", "inductor", "aot"]

pytestmark = needs_compiler


@pytest.fixture(scope="module")
def programs():
    """(function, backend) → Compiled, made when first asked for."""
    lowered = {
        "mlp": jit(mlp, static="cfg").lower(*mlp_args()),
        "step": jit(step, static="cfg", donate="cache").lower(*step_args()),
    }
    made = {}

    def program(name, backend):
        if (name, backend) not in made:
            made[name, backend] = lowered[name].compile(backend)
        return made[name, backend]

    return program


@pytest.mark.parametrize("backend", ["eager", "aot"])
def test_a_program_gives_what_the_function_gives(programs, backend):
    params, cfg, x = mlp_args()
    with CompileCounter() as first:
        program = programs("mlp", backend)
    for seed in (1, 2):
        params, x = tree_map(lambda t, seed=seed: t * seed, (params, x))
        expected = mlp(params, cfg, x)
        with CompileCounter() as counter:
            torch.testing.assert_close(program(params, x), expected)
            torch.testing.assert_close(program.partial(params)(x), expected)
        assert counter.total == 0
    assert first.compiles == ((0, 0, 0) if backend == "eager" else (0, 1, 0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_cache_is_written_where_it_is(programs, backend):
    cfg, *args = step_args()
    expected, cache = step(cfg, *args)
    _, *args = step_args()
    mine = args[2]
    addresses = [t.data_ptr() for t in leaves(mine)]
    out, returned = programs("step", backend)(*args)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(mine, cache)
    assert [t.data_ptr() for t in leaves(mine)] == addresses
    assert all(a is b for a, b in zip(leaves(returned), leaves(mine), strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("slots", [[-1, 9], [6, -1], [-1, 0], [0, -1], [-1, -1]])
def test_a_padding_row_writes_nowhere(programs, backend, slots):
    """And the others all the same, also into slot 0."""

    def after(run):
        _, qkv, table, cache, batch = step_args()
        return run(qkv, table, cache, replace(batch, slot_mapping=torch.tensor(slots, dtype=torch.int32)))

    out, cache = after(programs("step", backend))
    torch.testing.assert_close((out, cache), after(partial(step, step_args()[0])))
    before = step_args()[3]
    untouched = torch.ones(20, dtype=torch.bool)
    untouched[[slot for slot in slots if slot >= 0]] = False
    for mine, old in zip(leaves(cache), leaves(before), strict=True):
        by_slot, as_before = (t.transpose(1, 2).flatten(0, 1) for t in (mine, old))
        assert torch.equal(by_slot[untouched], as_before[untouched])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_slot_beyond_the_cache_is_an_error(programs, backend):
    _, qkv, table, cache, batch = step_args()
    batch = replace(batch, slot_mapping=torch.tensor([0, 20], dtype=torch.int32))
    with pytest.raises((IndexError, RuntimeError)):
        programs("step", backend)(qkv, table, cache, batch)


def test_inductor_gets_ops_that_it_can_fuse_as_plain_torch(programs, tmp_path):
    """Of the step, a package calls attention alone through the dispatcher."""
    programs("step", "aot").save(tmp_path / "step.pt2")
    with ZipFile(tmp_path / "step.pt2") as package:
        called = b"".join(package.read(name) for name in package.namelist() if name.endswith(".json"))
    assert b"vlmfx::paged_decode_attention" in called
    assert b"vlmfx::rotary_cache_write" not in called


@pytest.mark.parametrize("backend", ["eager", "aot"])
def test_what_it_was_not_lowered_for_is_refused(programs, backend):
    params, _, x = mlp_args()
    program = programs("mlp", backend)
    wrong = {
        "x is float32 (4, 8) on cpu with strides (8, 1) but was lowered as float32 (3, 8) on cpu with strides (8, 1)": (
            params,
            torch.zeros(4, 8),
        ),
        "x is float64 (3, 8)": (params, x.double()),
        "x is float32 (3, 8) on meta": (params, x.to("meta")),
        "x is float32 (3, 8) on cpu with strides (1, 3)": (params, x.T.contiguous().T),
        "x is 5 but": (params, 5),
        "params['layers'][1]['norm'] is nothing but was lowered as a leaf": ({"layers": params["layers"][:1]}, x),
        "params['more'] is a leaf but was lowered as nothing": ({**params, "more": x}, x),
        "1 arguments were given but it takes 2 (params, x); pass these, without the static ones.": (params,),
    }
    for message, args in wrong.items():
        with pytest.raises(CompileError) as caught:
            program(*args)
        assert message in str(caught.value)
        assert str(caught.value).startswith("mlp: ")


def test_memory_is_told_by_kind(programs):
    params, _, x = mlp_args()
    memory = programs("mlp", "aot").memory_analysis()
    assert memory.argument == sum(t.nbytes for t in leaves(params)) + x.nbytes
    assert memory.output == x.nbytes + 2 * 3 * 4
    assert (memory.constant, memory.temp) == (0, None)
    _, *args = step_args()
    memory = programs("step", "eager").memory_analysis()
    assert memory.argument == sum(t.nbytes for t in leaves(args) if t is not None)
    assert memory.output == 2 * 4 * 16 * 4  # the cache is an argument, not an output


def test_a_loaded_package_has_the_whole_signature(programs, tmp_path):
    made = programs("mlp", "aot")
    made.save(tmp_path / "mlp.pt2")
    loaded = load(tmp_path / "mlp.pt2")
    assert loaded.signature == made.signature
    params, cfg, x = mlp_args()
    torch.testing.assert_close(loaded(params, x), mlp(params, cfg, x))
    with pytest.raises(CompileError, match=r"^mlp: params\['more'\] is a leaf but was lowered as nothing"):
        loaded({**params, "more": x}, x)
    assert loaded.memory_analysis() == made.memory_analysis()


def test_a_package_that_cannot_be_written_is_one_sentence(programs, tmp_path):
    with pytest.raises(CompileError, match=r'^mlp: backend eager keeps no file; compile with backend="aot" to save\.$'):
        programs("mlp", "eager").save(tmp_path / "mlp.pt2")
    made = programs("mlp", "aot")
    with pytest.raises(CompileError, match=r"^mlp: path 'mlp.zip' must end in \.pt2"):
        made.save(tmp_path / "mlp.zip")
    with pytest.raises(CompileError, match=r"^mlp: mlp.pt2 cannot be written \(No such file or directory\); choose"):
        made.save(tmp_path / "missing" / "mlp.pt2")
    assert list(tmp_path.iterdir()) == []


def test_a_package_of_another_torch_is_refused(programs, tmp_path, monkeypatch):
    programs("mlp", "aot").save(tmp_path / "mlp.pt2")
    monkeypatch.setattr(torch, "__version__", "2.99")
    with pytest.raises(
        CompileError, match=r"^mlp\.pt2 was built by torch 2\.\d+\S* but this is 2\.99; export it again"
    ):
        load(tmp_path / "mlp.pt2")


def test_a_file_that_is_no_package_is_refused(programs, tmp_path):
    for content in (None, b"", b"PK nonsense"):
        path = tmp_path / "some.pt2"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(CompileError, match=r"^some\.pt2 cannot be read as a package \(.+\); export it again\.$"):
            load(path)
    programs("mlp", "aot").save(tmp_path / "whole.pt2")
    whole = (tmp_path / "whole.pt2").read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CompileError, match=r"^some\.pt2 cannot be read as a package"):
        load(path)


def test_backends_and_options_that_there_are_not_are_refused(programs):
    params, _, x = mlp_args()
    lowered = jit(lambda params, x: x + params["layers"][0]["norm"]).lower(params, x)
    with pytest.raises(
        CompileError,
        match=r"^backend is 'jax' but must be one of eager, inductor, cuda_graph, inductor\+cuda_graph, aot",
    ):
        lowered.compile("jax")
    for backend in BACKENDS:
        with pytest.raises(CompileError, match=rf"^backend {backend} has no option 'speed'; use "):
            lowered.compile(backend, speed=11)
    with pytest.raises(
        DeviceError, match=r'inductor\+cuda_graph needs "cuda" but this was lowered for "cpu"; use "inductor"'
    ):
        lowered.compile("inductor+cuda_graph")
    with pytest.raises(DeviceError, match=r'cuda_graph needs "cuda" but this was lowered for "cpu"; use "eager"'):
        lowered.compile("cuda_graph")
    with pytest.raises(DeviceError, match=r"mlu_graph needs torch_mlu, which is not imported"):
        lowered.compile("mlu_graph")
