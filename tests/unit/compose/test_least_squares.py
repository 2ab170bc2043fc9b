"""Gates fitted in closed form: what a linear router can give is found again, in one pass."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.models import load_model
from xloom.compose.learned import LinearRouter
from xloom.compose.least_squares import fit, ridge_regression
from xloom.compose.mixture import Mixture
from xloom.mixtures.lora import read_lora
from xloom.mixtures.modules import linear_modules
from xloom.mixtures.stacking import stack_adapters

ROWS = torch.randint(0, 256, (12, 32), generator=torch.Generator().manual_seed(4))


@pytest.fixture(scope="module")
def mixture(llama: Path, adapters: dict[str, Path]) -> Mixture:
    modules = linear_modules(str(llama))
    stack = stack_adapters({name: read_lora(folder, modules) for name, folder in adapters.items()}, modules)
    return Mixture(load_model(llama), stack)


@torch.no_grad()
def random_router(mixture: Mixture, activation: str, temperature: float) -> LinearRouter:
    torch.manual_seed(6)
    router = LinearRouter(mixture.stack, activation=activation, temperature=temperature)
    router.look(mixture, ROWS)
    for parameter in router.parameters():
        parameter.normal_(0.0, 0.2)
    return router


@pytest.mark.parametrize(("activation", "temperature"), [("softmax", 1.0), ("sigmoid", 0.5)])
def test_gates_that_a_linear_router_can_give_are_found_again(
    mixture: Mixture, activation: str, temperature: float
) -> None:
    known = random_router(mixture, activation, temperature)
    logits: list[torch.Tensor] = []

    def keep(place: int, x: torch.Tensor, gates: torch.Tensor) -> None:
        weight, bias = known.folded(place)
        logits.append((x @ weight.T + bias).flatten(0, 1) / temperature)

    mixture.watch(ROWS, known, keep)
    found = LinearRouter(mixture.stack, activation=activation, temperature=temperature)
    found.look(mixture, ROWS)
    fit(mixture, found, ROWS, torch.stack(logits, dim=1))

    seen: list[torch.Tensor] = []
    wanted: list[torch.Tensor] = []
    mixture.watch(ROWS, found, lambda place, x, gates: seen.append(gates))
    mixture.watch(ROWS, known, lambda place, x, gates: wanted.append(gates))
    assert torch.stack(wanted).std() > 0.1
    torch.testing.assert_close(torch.stack(seen), torch.stack(wanted), atol=0.02, rtol=0.0)


def test_each_linear_is_fitted_to_the_input_that_the_fitted_gates_give_it(mixture: Mixture) -> None:
    wanted = torch.randn(ROWS.numel(), len(mixture.stack.modules), 2, generator=torch.Generator().manual_seed(7))
    wanted -= wanted.mean(-1, keepdim=True)
    router = LinearRouter(mixture.stack)
    router.look(mixture, ROWS)
    fit(mixture, router, ROWS, wanted)

    def compare(place: int, x: torch.Tensor, gates: torch.Tensor) -> None:
        weight, bias = ridge_regression(router.normalised(place, x).flatten(0, 1), wanted[:, place])
        torch.testing.assert_close(router.weights[place], weight, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(router.biases[place], bias, atol=1e-3, rtol=1e-3)

    mixture.watch(ROWS, router, compare)


def test_ridge_regression_is_least_squares_where_the_penalty_is_small() -> None:
    generator = torch.Generator().manual_seed(8)
    rows, noise = torch.randn(200, 5, generator=generator) + 3, torch.randn(200, 2, generator=generator)
    wanted = rows @ torch.randn(5, 2, generator=generator) + 1 + 0.1 * noise
    weight, bias = ridge_regression(rows, wanted, ridge=1e-9)
    expected = torch.linalg.lstsq(torch.cat([rows, torch.ones(200, 1)], dim=1), wanted).solution
    torch.testing.assert_close(weight, expected[:5].T, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(bias, expected[5], atol=1e-3, rtol=1e-4)
