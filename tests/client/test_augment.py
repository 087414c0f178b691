"""Augmentation: deterministic, shape-preserving, and only the changes that it promises."""

import pytest
import torch

from client.augment import JITTER, augment_bag


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_generator_fixes_the_result_and_the_input_is_kept() -> None:
    images = torch.rand(5, 3, 24, 24, generator=generator(0)) * 2 - 1
    before = images.clone()
    first = augment_bag(images, generator(1))
    assert torch.equal(first, augment_bag(images, generator(1)))
    assert not torch.equal(first, augment_bag(images, generator(2)))
    assert torch.equal(images, before)
    assert first.shape == images.shape
    assert first.dtype == images.dtype


@pytest.mark.parametrize("size", [8, 11])
def test_below_12_pixels_an_image_is_one_of_its_eight_turns_with_new_light(size: int) -> None:
    image = torch.rand(1, 3, size, size, generator=generator(0)) * 2 - 1
    turns = [torch.rot90(flipped, k, (2, 3)) for flipped in (image, image.flip(3)) for k in range(4)]
    found = set()
    for seed in range(60):
        out = augment_bag(image, generator(seed))
        # Undo the affine change of light: correlation with the right turn is exactly 1.
        fits = [float(torch.corrcoef(torch.stack([out.ravel(), turn.ravel()]))[0, 1]) for turn in turns]
        assert max(fits) > 0.9999
        found.add(fits.index(max(fits)))
    assert found == set(range(8))


def test_shifts_reflect_at_the_border_and_stay_small() -> None:
    size, reach = 24, 2
    ramp = torch.linspace(-1, 1, size).repeat(3, size, 1)[None]
    for seed in range(20):
        out = augment_bag(ramp, generator(seed))
        line = out[0, 0].float()
        axis = line[0] if (line[0] - line[0, 0]).abs().max() > 1e-3 else line[:, 0]
        assert len(axis.unique()) >= size - reach


def test_light_changes_by_at_most_ten_percent_and_alike_in_a_bag() -> None:
    images = torch.full((4, 3, 12, 12), 0.5)
    images[2:] = -0.5
    for seed in range(20):
        out = (augment_bag(images, generator(seed)) + 1) / 2
        means = out.mean(dim=(1, 2, 3))
        assert torch.allclose(means[0], means[1])
        assert torch.allclose(means[2], means[3])
        contrast = (means[0] - means[2]) / 0.5
        assert (1 - JITTER) ** 2 - 1e-5 <= contrast <= (1 + JITTER) ** 2 + 1e-5
        assert 0.5 * (1 - JITTER) - 1e-5 <= means.mean() <= 0.5 * (1 + JITTER) + 1e-5
