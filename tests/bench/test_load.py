"""The formulas that a grid under load is compared with, and the grid itself with a few model cards."""

from __future__ import annotations

import random
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from bench.driver import Answers, Driver
from bench.load_grid import LoadGrid, every
from bench.waiting import erlang_c, ideal_waits, mean_wait


@pytest.mark.parametrize(
    ("servers", "offered", "probability"),
    # One server: its utilisation. Two with one erlang: 1/3. Ten with eight, and fifty with forty: as tables have it.
    [(1, 0.7, 0.7), (2, 1.0, 1 / 3), (10, 8.0, 0.4092), (50, 40.0, 0.0870), (8, 0.0, 0.0)],
)
def test_erlangs_formula(servers: int, offered: float, probability: float) -> None:
    assert erlang_c(servers, offered) == pytest.approx(probability, abs=1e-4)


def test_more_than_the_servers_can_do_has_no_mean() -> None:
    with pytest.raises(ValueError, match="more is offered"):
        erlang_c(2, 2.0)


def test_mean_wait_of_one_server() -> None:
    # M/M/1: rho / (mu - lambda).
    assert mean_wait(1, 3.0, 0.25) == pytest.approx(0.75 / (4 - 3))


def test_an_ideal_queue() -> None:
    assert ideal_waits(1, [(0.0, 2.0), (1.0, 2.0), (5.0, 1.0)]) == [0.0, 1.0, 0.0]
    assert ideal_waits(2, [(0.0, 2.0), (0.5, 2.0), (1.0, 1.0)]) == [0.0, 0.0, 1.0]


def test_an_ideal_queue_waits_as_the_formula_says() -> None:
    chance = random.Random(7)  # noqa: S311 - no secrets
    now, customers = 0.0, []
    for _ in range(200_000):
        now += chance.expovariate(8.0)
        customers.append((now, chance.expovariate(1.0)))
    waits = ideal_waits(10, customers)
    assert sum(waits) / len(waits) == pytest.approx(mean_wait(10, 8.0, 1.0), rel=0.05)


def test_a_rate_is_between_the_first_answer_and_the_last() -> None:
    assert Answers("vm", [1.0, 1.5, 2.0]).rate() == 2.0
    assert Answers("vm", [1.0]).rate() == 0.0


@pytest.mark.e2e
async def test_a_grid_with_model_cards_is_slow_and_right() -> None:
    with TemporaryDirectory(prefix="lg-", dir="/tmp") as folder:
        async with LoadGrid(Path(folder), vms=3) as load:
            await load.start(every(load.vms, {"private_key": 0.1}))
            async with Driver(load) as driver:
                answers = await driver.sign(load.vms, seconds=1.5, depth=2)
                assert driver.check(answers) == sum(len(one.kept) for one in answers) >= 3
                assert all(len(one.times) <= 1.5 / 0.1 + 1 for one in answers), "no card is faster than its model"
            assert load.memory() > 0
