"""Late ranks, tables that change, few tokens: the Triton engine under the interpreter, in lock-step."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from moeserve.comm.all_to_all.one_sided.layout import EpConfig, RowFormat, mail_word
from tests.comm.one_sided.interpreted import (
    VERSION,
    Case,
    Interpreters,
    Steps,
    make_case,
    make_table,
    same_bits,
)

pytestmark = pytest.mark.multi_rank

FORM = RowFormat(24, torch.float32)
BOTH = pytest.mark.parametrize("combine", ["push", pytest.param("pull", marks=pytest.mark.slow)])


def config(combine: str, world: int = 3, tokens: int = 6) -> EpConfig:
    return EpConfig(world, tokens, 3, 2, FORM, FORM, combine)


@pytest.mark.parametrize(
    ("combine", "phase"),
    [
        ("push", "answer"),
        ("pull", "send"),
        pytest.param("push", "send", marks=pytest.mark.slow),
        pytest.param("pull", "answer", marks=pytest.mark.slow),
    ],
)
def test_a_late_rank_is_masked_and_the_step_goes_on(
    interpreter: Interpreters, combine: str, phase: str
) -> None:
    interpreter.run(check_late, combine, phase)


def check_late(rank: int, combine: str, phase: str) -> None:
    """The step in which it is late, and the steps without it, are exact for all that is not its own."""
    steps = Steps(config(combine))
    steps.run(make_case(steps.config, 3))
    late = {"late_to_send": [1]} if phase == "send" else {"late_to_answer": [1]}
    assert steps.run(make_case(steps.config, 6), **late)[1] is None
    for engine in (steps.engines[0], steps.engines[2]):
        assert engine.sent[1] > 0  # else push would not wait for its answer
        assert engine.query_fault() == [1]
        assert engine.late_at() == {1: 2}
        assert engine.fault.tolist() == [0, 2, 0]
        assert engine.mask.tolist() == [1, 0, 1]
    for seed in (8, 9, 10):
        steps.run(make_case(steps.config, seed))


@BOTH
def test_a_masked_rank_gets_and_gives_nothing(interpreter: Interpreters, combine: str) -> None:
    interpreter.run(check_masked, combine)


def check_masked(rank: int, combine: str) -> None:
    for out in range(3):
        steps = Steps(config(combine))
        members = [r != out for r in range(3)]
        for engine in steps.engines:
            if engine.rank != out:
                engine.set_membership(members, generation=1, epoch=4)
        steps.out, steps.epoch = {out}, 4
        before = steps.engines[out].block.clone()
        steps.run(make_case(steps.config, 8))
        steps.run(make_case(steps.config, 9))
        assert torch.equal(steps.engines[out].block, before)
        with pytest.raises(ValueError, match=f"rank {out} cannot go on without itself"):
            steps.engines[out].set_membership(members, generation=2, epoch=9)


def test_a_rank_that_wakes_up_late_changes_nothing(interpreter: Interpreters) -> None:
    interpreter.run(check_zombie)


def check_zombie(rank: int) -> None:
    """It answers the step in which it was given up while the others are in the next: with cells kept spare, in vain."""
    assert zombie_run(keep_spare=True) == []
    assert zombie_run(keep_spare=False) != []  # without, that answer does harm: the check can tell


def zombie_run(keep_spare: bool) -> list[str]:
    """-> what went wrong in the steps after the fault."""
    steps = Steps(config("push", tokens=12), keep_spare=keep_spare)
    wrong = []
    case = small_case(steps.config, 6)
    steps.run(case, late_to_answer=[1])
    if keep_spare:
        steps.first_token = 6
        assert [engine.words[device_word("UNSAFE")].item() for engine in steps.engines] == [1, 0, 1]
    zombie = steps.engines[1]
    ghost = torch.full((zombie.rows.numel(), FORM.width), 77.0)
    finish, woken = steps.finish, []

    def finish_after_ghost(*arguments: object) -> Tensor:
        if not woken:
            woken.append(zombie.send_back(ghost))
            zombie.send(case.xs[1], case.ids[1], case.weights[1])
        return finish(*arguments)  # type: ignore[arg-type]

    steps.finish = finish_after_ghost  # type: ignore[method-assign]
    for seed in (15, 14, 16):
        try:
            steps.run(small_case(steps.config, seed))
        except AssertionError as error:
            wrong.append(str(error))
    assert woken
    return wrong


def small_case(sizes: EpConfig, seed: int) -> Case:
    """Of 6 tokens at most."""
    case = make_case(sizes, seed)
    xs, ids, weights = ([tensor[:6] for tensor in tensors] for tensors in (case.xs, case.ids, case.weights))
    return replace(case, xs=xs, ids=[i.contiguous() for i in ids], weights=weights)


def device_word(name: str) -> int:
    from moeserve.comm.all_to_all.one_sided import device_words

    value: int = getattr(device_words, name).value
    return value


@BOTH
def test_a_late_rank_may_come_back(interpreter: Interpreters, combine: str) -> None:
    interpreter.run(check_return, combine)


def check_return(rank: int, combine: str) -> None:
    steps = Steps(config(combine))
    steps.run(make_case(steps.config, 3), late_to_send=[2])
    steps.run(make_case(steps.config, 8))
    for engine in steps.engines:
        with pytest.raises(ValueError, match="generation = 0: must be above 0"):
            engine.set_membership([True] * 3, generation=0, epoch=7)
        with pytest.raises(ValueError, match=f"epoch = {engine.epoch}: must be above"):
            engine.set_membership([True] * 3, generation=1, epoch=engine.epoch)
        engine.set_membership([True] * 3, generation=1, epoch=7)
        assert engine.query_fault() == []
    steps.out, steps.epoch = set(), 7
    for seed in (3, 4, 6):
        steps.run(make_case(steps.config, seed))


def test_the_others_went_on_without_us(interpreter: Interpreters) -> None:
    interpreter.run(check_left_behind)


def check_left_behind(rank: int) -> None:
    """A word of a later step is not taken for this one's."""
    steps = Steps(config("push"))
    case = make_case(steps.config, 3)
    for r in range(3):
        steps.send(r, case)
    mail = steps.layout.mail.view(steps.engines[0].block)
    mail[1, 2] = mail_word(3, int(mail[1, 2]) & 7)
    steps.engines[0].receive()
    assert steps.engines[0].query_fault() == [2]
    assert steps.engines[0].got[2] == 0


def test_a_wait_ends_at_its_deadline(interpreter: Interpreters) -> None:
    interpreter.run(check_deadline)


def check_deadline(rank: int) -> None:
    steps = Steps(config("push"))
    engine = steps.engines[0]
    engine.set_deadline(2e-3)
    case = make_case(steps.config, 3)
    steps.send(0, case)
    steps.send(1, case)
    engine.receive()
    assert engine.query_fault() == [2]
    _, waited, wrong = engine.stats_snapshot()
    assert waited.tolist() == [0, 0, 2_000_000]
    assert wrong == 0


@BOTH
def test_the_table_changes_between_steps(interpreter: Interpreters, combine: str) -> None:
    interpreter.run(check_flips, combine)


def check_flips(rank: int, combine: str) -> None:
    sizes = config(combine)
    old = make_table(sizes, np.random.default_rng(2))
    new = (old + 1) % 6  # each expert one slot further
    steps = Steps(sizes, old)
    steps.run(make_case(sizes, 3, old))
    for table in steps.tables:
        assert table is not None
        table.prepare(new)
    steps.run(make_case(sizes, 4, old))
    for table in steps.tables:
        assert table is not None
        table.flip(VERSION)
    steps.rotate(2)
    steps.run(make_case(sizes, 6, new))
    assert steps.tables[0] is not None
    steps.tables[0].flip(VERSION + 1)
    case = make_case(sizes, 3, new)
    for r in range(3):
        steps.send(r, case)
    received = [engine.receive() for engine in steps.engines]
    assert int(received[1].slot_start[-1]) > 0
    _, _, wrong = steps.engines[1].stats_snapshot()
    assert wrong == int(steps.engines[0].sent[1]) > 0


@BOTH
def test_fewer_tokens_than_rows(interpreter: Interpreters, combine: str) -> None:
    interpreter.run(check_padding, combine)


def check_padding(rank: int, combine: str) -> None:
    """A step over b rows of which the device knows that fewer are real equals one over those; the others get 0."""
    from moeserve.comm.all_to_all.one_sided.virtual import Inputs, Received, step, virtual_ranks

    sizes = config(combine)
    case = make_case(sizes, 3)
    counts = [0, 2, 5]

    def answer(rank: int, got: Received) -> Tensor:
        return torch.arange(got.rows.numel() * FORM.width, dtype=torch.float32).view(-1, FORM.width)

    padded = [
        Inputs(x, ids, weights, num_tokens=torch.tensor([count]))
        for x, ids, weights, count in zip(case.xs, case.ids, case.weights, counts, strict=True)
    ]
    cut = [
        Inputs(given.x[:count], given.ids[:count], given.weights[:count])
        for given, count in zip(padded, counts, strict=True)
    ]
    first = step(virtual_ranks(sizes), padded, answer)
    second = step(virtual_ranks(sizes), cut, answer)
    for a, b, count in zip(first, second, counts, strict=True):
        assert same_bits(a[:count], b)
        assert len(a) == 6 and not a[count:].any()


@pytest.mark.slow
def test_push_and_pull_give_the_same_bits_each_time(interpreter: Interpreters) -> None:
    interpreter.run(check_same_bits)


def check_same_bits(rank: int) -> None:
    outs = []
    for combine in ("push", "pull", "push"):
        steps = Steps(config(combine))
        outs.append([out for seed in (3, 4) for out in steps.run(make_case(steps.config, seed))])
    for a, b, c in zip(*outs, strict=True):
        assert a is not None and b is not None and c is not None
        assert same_bits(a, b) and same_bits(a, c)


def test_sizes_that_do_not_fit_are_refused(interpreter: Interpreters) -> None:
    interpreter.run(check_refusals)


def check_refusals(rank: int) -> None:
    from moeserve.comm.all_to_all.one_sided import triton_engine
    from moeserve.comm.all_to_all.one_sided.virtual import virtual_ranks

    with pytest.raises(ValueError, match="max_tokens, combine = 6, 'pull': half is kept spare"):
        virtual_ranks(config("pull"), keep_spare=True)
    scaled = RowFormat(300, torch.float8_e4m3fn, 2)
    with pytest.raises(ValueError, match="num_scales = 2: results have one for each 128 values"):
        virtual_ranks(EpConfig(2, 3, 1, 1, FORM, scaled))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_engine, "MOST_CHOICES", 53)
        with pytest.raises(ValueError, match=r"world \* max_tokens \* top_k = 54: must be at most 53"):
            virtual_ranks(config("push"))
