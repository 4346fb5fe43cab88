"""The counters keep phases apart and padding out."""

from __future__ import annotations

import torch

from moeserve.stats.expert_load import MAX_ROWS, MAX_STEPS, ExpertLoad


def test_counts_by_layer_and_phase_without_padding() -> None:
    load = ExpertLoad(num_layers=2, num_experts=4)
    load.begin_step(torch.tensor([True, True, True, False]), torch.tensor([True, False, False, False]))
    load.add(1, torch.tensor([[0, 3], [3, 2], [3, 0], [3, 1]]))
    load.add(0, torch.tensor([[1, 2]] * 4))
    assert load.decode.tolist() == [[0, 1, 1, 0], [1, 0, 0, 1]]
    assert load.prefill.tolist() == [[0, 2, 2, 0], [1, 0, 1, 2]]
    load.begin_step(torch.tensor([True]), torch.tensor([True]))
    load.add(0, torch.tensor([[1, 2]]))
    load.add(1, torch.tensor([[3, 0]]))
    assert load.decode.tolist() == [[0, 2, 2, 0], [2, 0, 0, 2]]
    load.reset()
    assert not load.decode.any() and not load.prefill.any()


def test_steps_that_were_counted_together_are_all_there() -> None:
    load = ExpertLoad(num_layers=1, num_experts=4)
    steps = 3 * MAX_STEPS + 1
    for step in range(steps):
        rows = MAX_ROWS if step == 5 else 1
        load.begin_step(torch.ones(rows, dtype=torch.bool), torch.full((rows,), step % 2 == 0))
        load.add(0, torch.tensor([[0, step % 4]]).expand(rows, 2))
    total = load.prefill + load.decode
    assert total.sum() == 2 * (steps - 1 + MAX_ROWS)
    assert load.decode.sum() == 2 * (steps // 2 + 1)
    assert load.prefill[0, 1] == MAX_ROWS + steps // 4 - 1


def test_taken_counts_are_the_callers_own() -> None:
    for num_layers in (1, 3):
        load = ExpertLoad(num_layers, num_experts=4)
        for decode in (False, True):
            load.begin_step(torch.tensor([True]), torch.tensor([decode]))
            for layer in range(num_layers):
                load.add(layer, torch.tensor([[int(decode), 3]]))
        taken = load.take()
        assert taken.shape == (2, num_layers, 4)
        assert taken[:, -1].tolist() == [[1, 0, 0, 1], [0, 1, 0, 1]]
        assert not load.take().any()
        assert taken.sum() == 4 * num_layers


def test_no_tokens() -> None:
    load = ExpertLoad(num_layers=1, num_experts=4)
    nothing = torch.zeros(0, dtype=torch.bool)
    load.begin_step(nothing, nothing)
    load.add(0, torch.zeros(0, 2, dtype=torch.int64))
    assert not load.prefill.any()
