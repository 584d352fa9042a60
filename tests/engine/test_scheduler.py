"""The scheduler over a model of the cache: whatever comes and goes, each text is computed over its own tokens, and all ends well."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from tests.engine.simulation import VOCAB, Simulation, Wish
from vlmfx.engine.scheduler import Limits

BLOCK = 4


@st.composite
def wishes(draw: st.DrawFn, most: int = 40) -> Wish:
    """Prompts that often begin alike, with images of a few contents at places that do not overlap."""
    prompt = draw(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=most))
    images, at = [], 0
    for _ in range(draw(st.integers(0, 3))):
        first = at + draw(st.integers(0, 6))
        places = draw(st.integers(1, 6))
        if first + places > len(prompt):
            break
        images.append((first, places, draw(st.integers(0, 2))))
        prompt[first : first + places] = [VOCAB] * places
        at = first + places
    return Wish(
        token_ids=tuple(prompt),
        images=tuple(images),
        num_texts=draw(st.integers(1, 3)),
        num_tokens=draw(st.integers(1, 12)),
        priority=draw(st.integers(0, 2)),
        salt=draw(st.sampled_from(["", "", "other"])),
    )


SIMULATIONS = st.builds(
    Simulation,
    num_blocks=st.integers(13, 40),  # at least as much as the largest wish needs
    block_size=st.just(BLOCK),
    limits=st.builds(
        Limits,
        max_num_seqs=st.integers(3, 8),
        max_num_batched_tokens=st.integers(1, 50),
        max_prefill_seqs=st.integers(3, 8),
        max_patches=st.integers(1, 60),
        max_segments=st.integers(1, 4),
    ),
    feature_bytes=st.integers(0, 20),
    caches_prefixes=st.booleans(),
    overlaps=st.booleans(),
)


def check_end(simulation: Simulation) -> None:
    """Everything asked for and not aborted was answered, and nothing is held."""
    for _ in range(5000):
        if simulation.is_idle:
            break
        simulation.step()
    assert simulation.is_idle, "some request starves"
    for job in simulation.jobs:
        if not job.is_aborted:
            assert [text.completion.token_ids for text in job.texts] == job.answers
    assert simulation.blocks.num_free == simulation.num_blocks
    assert simulation.features.num_pinned == 0
    assert simulation.features.num_bytes <= simulation.feature_bytes


class Machine(RuleBasedStateMachine):
    @initialize(simulation=SIMULATIONS)
    def begin(self, simulation: Simulation) -> None:
        self.simulation = simulation

    @rule(wish=wishes())
    def add(self, wish: Wish) -> None:
        self.simulation.add(wish)

    @rule(data=st.data())
    def abort(self, data: Any) -> None:
        if self.simulation.jobs:
            self.simulation.abort(data.draw(st.integers(0, len(self.simulation.jobs) - 1)))

    @rule(count=st.integers(1, 4))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.simulation.step()

    def teardown(self) -> None:
        if hasattr(self, "simulation"):
            check_end(self.simulation)


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)


@settings(max_examples=100, deadline=None)
@given(simulation=SIMULATIONS, asked=st.lists(wishes(), min_size=1, max_size=12))
def test_requests_that_come_together_are_all_answered(simulation, asked):
    for wish in asked:
        simulation.add(wish)
    check_end(simulation)


def limits(**changes: int) -> Limits:
    return Limits(**{"max_num_seqs": 8, "max_num_batched_tokens": 64, **changes})


def test_an_image_is_encoded_once_for_all_who_ask_about_it():
    simulation = Simulation(64, BLOCK, limits(), feature_bytes=100)
    for n in range(8):
        simulation.add(Wish(token_ids=(VOCAB,) * 5 + (n % VOCAB, n // VOCAB), images=((0, 5, 1),)))
    check_end(simulation)
    assert simulation.num_encoded == 1
    simulation.add(Wish(token_ids=(VOCAB,) * 5, images=((0, 5, 1),), salt="other"))
    check_end(simulation)
    assert simulation.num_encoded == 2, "salts share no image"


def test_a_prompt_that_was_there_is_not_computed_again():
    simulation = Simulation(64, BLOCK, limits())
    wish = Wish(token_ids=(1, 2, 3, 4) * 5 + (1,), num_tokens=1)
    simulation.add(wish)
    (first,) = simulation.step().prefill
    simulation.add(wish)
    (again,) = simulation.step().prefill
    assert (first.start, first.end, again.start, again.end) == (0, 21, 20, 21)
    simulation.add(Wish(token_ids=wish.token_ids, salt="other"))
    (other,) = simulation.step().prefill
    assert other.start == 0
    check_end(simulation)


def test_decoding_goes_on_while_a_long_prompt_comes_in_parts():
    simulation = Simulation(64, BLOCK, limits(max_num_batched_tokens=8))
    talker = simulation.add(Wish(token_ids=(1,), num_tokens=12))
    talker.answers[0] = [1] * 12
    simulation.step()
    simulation.add(Wish(token_ids=(2,) * 40))
    for _ in range(4):
        plan = simulation.step()
        assert plan.decode == talker.texts
        assert [chunk.end - chunk.start for chunk in plan.prefill] == [8]
    check_end(simulation)


def test_a_long_prompt_leaves_half_of_a_step_to_a_short_one():
    simulation = Simulation(64, BLOCK, limits(max_num_batched_tokens=8))
    simulation.add(Wish(token_ids=(2,) * 40))
    short = simulation.add(Wish(token_ids=(3,) * 4, num_tokens=1))
    simulation.step()
    assert short.texts[0].completion.token_ids == short.answers[0]
    check_end(simulation)


def test_for_want_of_blocks_the_last_is_preempted_and_answers_all_the_same():
    simulation = Simulation(8, BLOCK, limits(), caches_prefixes=False)
    jobs = [simulation.add(Wish(token_ids=(n,) * 8, num_tokens=12)) for n in (1, 2, 3)]
    for job in jobs:
        job.answers[0] = [1] * 12
    check_end(simulation)
    assert jobs[0].texts[0].num_preempted == 0
    assert sum(job.texts[0].num_preempted for job in jobs) > 0


def test_texts_of_one_prompt_share_its_blocks_and_copy_the_one_they_write_to():
    simulation = Simulation(64, BLOCK, limits())
    job = simulation.add(Wish(token_ids=(1,) * 10, num_texts=3, num_tokens=3))
    for answer in job.answers:
        answer[:] = [1] * 3
    simulation.step()
    assert len({tuple(text.blocks) for text in job.texts}) == 1
    plan = simulation.step()
    (source,) = {source for source, _ in plan.copies}
    assert len(plan.copies) == 2, "the last of the three goes on in the block itself"
    assert [text.blocks[-1] for text in job.texts] == [*(target for _, target in plan.copies), source]
    assert len({tuple(text.blocks[:2]) for text in job.texts}) == 1
    assert len({text.blocks[2] for text in job.texts}) == 3
    check_end(simulation)


@pytest.mark.parametrize("overlaps", [False, True])
def test_lower_priorities_go_first(overlaps):
    simulation = Simulation(64, BLOCK, limits(max_num_seqs=1), overlaps=overlaps)
    jobs = [simulation.add(Wish(token_ids=(1,), num_tokens=1, priority=p)) for p in (2, 0, 1)]
    done: list[int] = []
    while not simulation.is_idle:
        simulation.step()
        done += [n for n, job in enumerate(jobs) if job.texts[0].completion.token_ids and n not in done]
    assert done == [1, 2, 0]


@pytest.mark.parametrize("seed", [6, 7, 20, 42, 58])
def test_an_image_that_a_prompt_reads_is_not_dropped_by_the_preemption_that_makes_room_for_it(seed):
    draw = random.Random(seed)
    for _ in range(20):
        size = draw.randint(2, 20)
        simulation = Simulation(
            draw.randint(10, 16), BLOCK, limits(max_num_batched_tokens=size), feature_bytes=draw.choice([0, 2, 8])
        )
        for _ in range(draw.randint(2, 4)):
            before, places, after = draw.randint(0, 20), draw.randint(2, 10), draw.randint(0, 4)
            ids = (1,) * before + (VOCAB,) * places + (2,) * after
            wish = Wish(token_ids=ids, images=((before, places, 1),), num_tokens=4, priority=draw.randint(0, 1))
            simulation.add(wish)
        check_end(simulation)


def test_newcomers_do_not_take_the_blocks_that_a_long_prompt_waits_for():
    simulation = Simulation(40, BLOCK, limits(max_num_batched_tokens=64), caches_prefixes=False)

    def add(token: int, count: int, num_tokens: int) -> Any:
        job = simulation.add(Wish(token_ids=(token,) * count, num_tokens=num_tokens))
        job.answers[0] = [3] * num_tokens
        return job

    add(1, 60, 60)
    simulation.step()
    add(2, 130, 4)
    simulation.step()
    small = [add(4, 12, 8) for _ in range(4)]
    check_end(simulation)
    assert max(job.texts[0].num_preempted for job in small) <= 2
