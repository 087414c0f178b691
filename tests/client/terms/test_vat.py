"""Virtual adversarial training: its terms by hand, and the direction that it finds."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from client.terms.base import Objective
from client.terms.vat import adversarial_change, divergences, ramp
from common.model.classifier import HierarchicalClassifier, Levels, Pieces
from common.model.heads import LinearHead
from common.model.interfaces import Features, Inputs

from .toy import TREE, GivenScores, Toy, batch_of, build_objective, setting_of, toy_model


class Pixels(nn.Module):
    """The pixels themselves as features."""

    n_features = 12

    def forward(self, inputs: Inputs) -> Features:
        return Features(inputs.images.flatten(1))


def linear_model(weight: Tensor) -> HierarchicalClassifier:
    """Leaf scores = weight @ pixels; weight of shape (4, 12)."""
    head = LinearHead(12, 4)
    model = HierarchicalClassifier(TREE, Pieces(backbone=Pixels(), heads=[head]), Levels(leaf_only=True))
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.zero_()
    return model


def test_the_weight_rises_over_the_first_part_of_the_run() -> None:
    assert ramp(0.0) == pytest.approx(math.exp(-5))
    assert ramp(0.2) == pytest.approx(math.exp(-1.25))
    assert ramp(0.4) == ramp(1.0) == 1.0


def test_the_loss_by_hand_where_one_pixel_matters() -> None:
    """Only pixel 0 moves the scores, so the worst change of norm eps is +-eps there, whatever the start."""
    weight = torch.zeros(4, 12)
    weight[:, 0] = torch.tensor([1.0, 0.5, -0.5, -1.0])
    batch = batch_of([2], torch.tensor([[1, 1]]), torch.tensor([[1, 0, 1, 0]]))
    images, radius = (0.1 * batch.inputs.images).double().numpy(), 0.5

    def softmax(pixels: np.ndarray) -> np.ndarray:
        raw = np.exp(np.outer(pixels, weight[:, 0].numpy().astype(float)))
        return raw / raw.sum(axis=1, keepdims=True)

    p = softmax(images[:, 0, 0, 0])
    kl = {sign: (p * np.log(p / softmax(images[:, 0, 0, 0] + sign * radius))).sum(axis=1) for sign in (1, -1)}
    mean = p.mean(axis=0)
    matching = 0.5 * np.log(0.5 / mean[0]) + 0.5 * np.log(0.5 / mean[2])
    possible = [matching + 0.7 * np.mean([kl[a][0], kl[b][1]]) for a in (1, -1) for b in (1, -1)]
    setting = setting_of("llp-vat", torch.tensor([[1, 0, 1, 0]]), vat_weight=0.7, vat_radius=radius)
    scaled = replace(batch, inputs=batch.inputs.with_images(0.1 * batch.inputs.images))
    loss = build_objective(setting)(linear_model(weight), scaled).item()
    assert min(abs(loss - value) for value in possible) < 1e-5


def test_the_change_moves_predictions_more_than_chance_and_has_the_asked_norm() -> None:
    generator = torch.Generator().manual_seed(0)
    model = linear_model(torch.randn(4, 12, generator=generator))
    images = torch.randn(40, 3, 2, 2, generator=generator)
    with torch.no_grad():
        target = model(Inputs.alone(images)).scores[-1].log_softmax(1)
    noise = torch.randn(images.shape, generator=generator)
    inputs = Inputs.alone(images)
    change = adversarial_change(model, inputs, target, noise, radius=0.1)
    torch.testing.assert_close(change.flatten(1).norm(dim=1), torch.full((40,), 0.1))
    random = 0.1 * noise / noise.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    worst, usual = (
        divergences(model, inputs.with_images(images + moved), target).mean() for moved in (change, random)
    )
    assert worst > 2 * usual
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_weight_of_zero_is_dllp_and_draws_nothing() -> None:
    toy = Toy.draw(4, 4, 8, torch.Generator().manual_seed(0))
    model, batch = toy_model("dllp"), toy.batch(torch.arange(4))
    setting = setting_of("llp-vat", toy.leaf_counts, vat_weight=0.0)
    generator = torch.Generator()
    before = generator.get_state()
    plain = build_objective(setting_of("dllp", toy.leaf_counts))(model, batch)
    assert torch.equal(Objective(setting)(model, batch, generator), plain)
    assert torch.equal(generator.get_state(), before)


def test_a_model_that_no_gradient_passes_gets_no_change() -> None:
    """As with colour histograms: the consistency is then 0, and training goes on."""
    scores = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    counts = torch.tensor([[1, 1, 1, 1]])
    batch = batch_of([4], counts.view(1, 2, 2).sum(2), counts)
    losses = [
        build_objective(setting_of(method, counts))(GivenScores(scores), batch)
        for method in ("llp-vat", "dllp")
    ]
    torch.testing.assert_close(*losses)
