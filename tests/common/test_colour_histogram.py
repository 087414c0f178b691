"""The fixed colour features: their length, what they see, and that nothing in them is learned."""

import pytest
import torch

from common.model.colour_histogram import ColourHistogram


@pytest.mark.parametrize("size", [8, 15, 48])
def test_features_have_one_length_and_see_no_position_within_a_ring(size: int) -> None:
    features = ColourHistogram(size)
    images = torch.rand(3, 3, size, size) * 2 - 1
    out = features(images)
    assert out.shape == (3, features.n_features)
    assert torch.allclose(out.square().mean(dim=1), torch.ones(3), atol=1e-5)
    assert torch.allclose(features(images.rot90(1, (2, 3)).flip(3)), out, atol=1e-5)
    assert torch.allclose(features(3 * images), features((3 * images).clamp(-1, 1)))


def test_a_colour_in_the_centre_is_not_one_at_the_border() -> None:
    features = ColourHistogram(16)
    centre = -torch.ones(1, 3, 16, 16)
    centre[:, 0, 6:10, 6:10] = 1
    border = -torch.ones(1, 3, 16, 16)
    border[:, 0, 0, :] = 1
    assert (features(centre) - features(border)).norm() > 1


def test_nothing_is_learned_or_saved() -> None:
    features = ColourHistogram(16)
    assert not list(features.parameters())
    assert not features.state_dict()
