"""What holds for every objective: it is there, solves the toy problem, and is private only where sound."""

import copy

import numpy as np
import pytest
import torch

import client.private_training as private
from client.objectives import OBJECTIVES, build_objective
from common.config import RunConfig
from common.errors import ConfigError, UserError
from common.model.methods import Method

from .toy import Toy, accuracy_after_training, setting_of, toy_model

BOUNDS = [method for method in Method if method.sees_labels]
PRIVATE = {Method.LHFGLP, Method.DLLP, Method.DLLP_HIERARCHICAL}
FROM_BAGS = [method for method in Method if method not in BOUNDS]


def test_every_method_has_an_objective() -> None:
    assert set(OBJECTIVES) == set(Method)


@pytest.mark.parametrize("method", FROM_BAGS)
def test_it_solves_the_toy_problem(method: Method) -> None:
    """Chance is 0.25. The worst of three seeds: 0.96 (llpfc), 0.95 (easyllp), 0.997 (the others)."""
    accuracy = accuracy_after_training(method, smallest=4, largest=8, steps=120, seed=0)
    assert accuracy > (0.9 if method in (Method.LLPFC, Method.EASYLLP) else 0.98)


@pytest.mark.parametrize("method", BOUNDS)
def test_a_bound_solves_it_from_bags_of_one(method: Method) -> None:
    assert accuracy_after_training(method, smallest=1, largest=1, steps=120, seed=0) > 0.98


@pytest.mark.parametrize("method", BOUNDS)
def test_a_bound_refuses_larger_bags(method: Method) -> None:
    counts = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 3, 0]])
    with pytest.raises(UserError, match=rf"{method.value}.*2 training bags of site 'site-1'"):
        build_objective(setting_of(method, counts))
    build_objective(setting_of(method, counts[:1]))


@pytest.mark.parametrize("method", FROM_BAGS)
def test_the_same_seeds_give_the_same_loss_and_gradient(method: Method) -> None:
    toy = Toy.draw(12, 4, 8, torch.Generator().manual_seed(1))
    batch, results = toy.batch(torch.tensor([3, 0, 7, 11])), []
    model = toy_model(method)
    for twin in (model, copy.deepcopy(model)):
        loss = build_objective(setting_of(method, toy.leaf_counts, seed=5))(twin, batch)
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in twin.parameters())])
    assert results[0][0].shape == ()
    for first, second in zip(*results, strict=True):
        assert first is not None
        assert second is not None
        assert torch.equal(first, second)
        assert first.isfinite().all()


@pytest.mark.parametrize("method", sorted(PRIVATE))
def test_a_private_objective_is_a_mean_over_bags_and_needs_nothing_of_the_site(method: Method) -> None:
    toy = Toy.draw(12, 4, 8, torch.Generator().manual_seed(1))
    objective = build_objective(setting_of(method, toy.leaf_counts[:0]))
    model, bags = toy_model(method), torch.tensor([3, 0, 7])
    alone = torch.stack([objective(model, toy.batch(bags[i : i + 1])) for i in range(3)])
    torch.testing.assert_close(objective(model, toy.batch(bags)), alone.mean())


@pytest.mark.parametrize("method", list(Method))
def test_privacy_is_offered_for_losses_of_one_bag_each_only(method: Method) -> None:
    assert (not method.why_not_private) == (method in PRIVATE)
    changes: dict[str, str | float] = {"model.method": method.value, "dp.epsilon": 8.0}
    if method in PRIVATE:
        config = RunConfig().with_changes(changes)
        private._refuse_unsound(config)
        return
    with pytest.raises(ConfigError, match=f"'{method.value}'.*{method.why_not_private}.*unit of privacy"):
        RunConfig().with_changes(changes)
    with pytest.raises(ConfigError, match=method.value):
        private._refuse_unsound(RunConfig().with_changes({"model.method": method.value}))


def test_a_method_that_nobody_has_examined_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("common.model.methods._ONE_BAG_EACH", frozenset())
    assert "nobody has shown" in Method.LHFGLP.why_not_private


@pytest.mark.parametrize("method", FROM_BAGS)
def test_a_step_of_one_bag_and_bags_of_one_image_are_no_special_case(method: Method) -> None:
    toy = Toy.draw(8, 1, 3, torch.Generator().manual_seed(2))
    assert 1 in toy.sizes
    objective, model = build_objective(setting_of(method, toy.leaf_counts)), toy_model(method)
    for bag in range(len(toy.sizes)):
        loss = objective(model, toy.batch(torch.tensor([bag])))
        loss.backward()
        assert loss.isfinite()
    assert all(np.isfinite(p.grad.numpy()).all() for p in model.parameters() if p.grad is not None)
