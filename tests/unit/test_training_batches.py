"""The order of rows: a function of seed and epoch alone, each row once, the same for all processes together."""

import itertools

import pytest

torch = pytest.importorskip("torch")

from fastft.config import schema  # noqa: E402 - after the check for torch
from fastft.training import trainer  # noqa: E402
from fastft.training.batches import EpochBatches, EpochLoader, order_of_epoch  # noqa: E402


def test_each_epoch_holds_every_row_once_in_another_order() -> None:
    orders = [order_of_epoch(50, shuffle=True, seed=3, epoch=epoch) for epoch in range(3)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert all(a != b for a, b in itertools.combinations(orders, 2))
    assert orders[1] == order_of_epoch(50, shuffle=True, seed=3, epoch=1)
    assert order_of_epoch(50, shuffle=True, seed=3, epoch=1) != order_of_epoch(50, shuffle=True, seed=4, epoch=0)
    assert order_of_epoch(5, shuffle=False, seed=3, epoch=9) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("num_rows", [1, 5, 12, 13])
def test_processes_share_the_rows_and_make_the_same_number_of_steps(num_rows: int, world: int) -> None:
    shares = [list(EpochBatches(num_rows, 2, shuffle=True, seed=0, rank=rank, world=world)) for rank in range(world)]
    assert len({len(share) for share in shares}) == 1
    rows = [row for share in shares for batch in share for row in batch]
    assert set(rows) == set(range(num_rows))
    if world == 1:
        assert len(rows) == num_rows


def test_the_loader_draws_no_global_random_number() -> None:
    before = torch.random.get_rng_state()
    batches = EpochBatches(5, 2, shuffle=True, seed=0)
    loader = EpochLoader(list("abcde"), batches, "".join, pin=False)
    first = list(loader)
    loader.set_epoch(1)
    assert list(loader) != first
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    ("rows", "settings", "processes", "steps"),
    [
        (10, {"epochs": 1, "batch_size": 1, "grad_accumulation": 4}, 1, 3),
        (10, {"epochs": 3, "batch_size": 2, "grad_accumulation": 2}, 1, 9),
        (10, {"epochs": 0.5, "batch_size": 1, "grad_accumulation": 1}, 1, 5),
        (10, {"epochs": 1, "batch_size": 1, "grad_accumulation": 1}, 4, 3),
        (10, {"epochs": 1, "max_steps": 77}, 1, 77),
    ],
)
def test_steps_of_a_run(rows: int, settings: dict[str, float], processes: int, steps: int) -> None:
    assert trainer.total_steps(schema.Train.model_validate(settings), rows, processes) == steps
