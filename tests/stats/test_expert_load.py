"""The counters keep phases apart and padding out."""

from __future__ import annotations

import torch

from moeserve.stats.expert_load import MAX_ROWS, MAX_STEPS, ExpertLoad


def test_counts_by_layer_and_phase_without_padding() -> None:
    for gather_steps in (True, False):
        load = ExpertLoad(num_layers=2, num_experts=4, num_slots=6, gather_steps=gather_steps)
        load.begin_step(torch.tensor([True, True, True, False]), torch.tensor([True, False, False, False]))
        none = [-1, -1]
        load.add(
            1, torch.tensor([[0, 3], [3, 2], [3, 0], [3, 3]]), torch.tensor([[0, 5], [3, 2], [5, 4], none])
        )
        load.add(0, torch.tensor([[1, 2]] * 4), torch.tensor([[1, 2], [1, 2], [1, 2], none]))
        assert load.decode.tolist() == [[0, 1, 1, 0], [1, 0, 0, 1]]
        assert load.prefill.tolist() == [[0, 2, 2, 0], [1, 0, 1, 2]]
        assert load.slots.tolist() == [
            [[0, 2, 2, 0, 0, 0], [0, 0, 1, 1, 1, 1]],
            [[0, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 1]],
        ]
        load.begin_step(torch.tensor([True]), torch.tensor([True]))
        load.add(0, torch.tensor([[1, 2]]), torch.tensor([[1, 2]]))
        load.add(1, torch.tensor([[3, 0]]), torch.tensor([[5, 4]]))
        assert load.decode.tolist() == [[0, 2, 2, 0], [2, 0, 0, 2]]
        assert load.slots[1].tolist() == [[0, 2, 2, 0, 0, 0], [1, 0, 0, 0, 1, 2]]
        load.reset()
        assert not load.decode.any() and not load.prefill.any() and not load.slots.any()


def test_steps_that_were_counted_together_are_all_there() -> None:
    load = ExpertLoad(num_layers=1, num_experts=4, num_slots=4)
    steps = 3 * MAX_STEPS + 1
    for step in range(steps):
        rows = MAX_ROWS if step == 5 else 1
        load.begin_step(torch.ones(rows, dtype=torch.bool), torch.full((rows,), step % 2 == 0))
        experts = torch.tensor([[0, step % 4]]).expand(rows, 2)
        load.add(0, experts, experts)
    total = load.prefill + load.decode
    assert total.sum() == 2 * (steps - 1 + MAX_ROWS)
    assert load.decode.sum() == 2 * (steps // 2 + 1)
    assert load.prefill[0, 1] == MAX_ROWS + steps // 4 - 1
    assert torch.equal(load.slots, torch.stack((load.prefill, load.decode)))


def test_taken_counts_are_the_callers_own() -> None:
    for num_layers in (1, 3):
        load = ExpertLoad(num_layers, num_experts=4, num_slots=8)
        for decode in (False, True):
            load.begin_step(torch.tensor([True]), torch.tensor([decode]))
            for layer in range(num_layers):
                experts = torch.tensor([[int(decode), 3]])
                load.add(layer, experts, experts + 4)
        experts, slots = load.take()
        assert experts.shape == (2, num_layers, 4) and slots.shape == (2, num_layers, 8)
        assert experts[:, -1].tolist() == [[1, 0, 0, 1], [0, 1, 0, 1]]
        assert slots[:, -1].tolist() == [[0, 0, 0, 0, 1, 0, 0, 1], [0, 0, 0, 0, 0, 1, 0, 1]]
        assert not any(counts.any() for counts in load.take())
        assert experts.sum() == slots.sum() == 4 * num_layers


def test_a_step_that_is_run_again_counts_once() -> None:
    load = ExpertLoad(num_layers=2, num_experts=4, num_slots=4)
    one = torch.tensor([True])
    for step, layers in enumerate((2, 1, 0, 2, 2)):  # how far each comes; those that do not end are dropped
        load.begin_step(one, one)
        for layer in range(layers):
            load.add(layer, torch.tensor([[step % 4]]), torch.tensor([[step % 4]]))
        if layers < 2 or step == 3:
            load.drop_step()
    assert load.decode.tolist() == load.slots[1].tolist() == [[2, 0, 0, 0]] * 2


def test_no_tokens() -> None:
    load = ExpertLoad(num_layers=1, num_experts=4, num_slots=4)
    nothing = torch.zeros(0, dtype=torch.bool)
    load.begin_step(nothing, nothing)
    load.add(0, torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2, dtype=torch.int64))
    assert not load.prefill.any()
