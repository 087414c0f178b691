"""Augmentation: deterministic, shape-preserving, and only the changes that it promises."""

import pytest
import torch
from torch import Tensor

from client.data.batch import _JITTER, _augment_images
from common.config_tables import Augmentation


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def augment_bag(
    images: Tensor, source: torch.Generator, augmentation: Augmentation = Augmentation.FULL
) -> Tensor:
    return _augment_images(images, torch.zeros(len(images), dtype=torch.int64), 1, augmentation, source)


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
        assert (1 - _JITTER) ** 2 - 1e-5 <= contrast <= (1 + _JITTER) ** 2 + 1e-5
        assert 0.5 * (1 - _JITTER) - 1e-5 <= means.mean() <= 0.5 * (1 + _JITTER) + 1e-5


def test_light_is_drawn_for_each_bag_of_a_batch_around_its_own_mean() -> None:
    """Flat bags stay flat, each with a brightness of its own; contrast acts around the bag's mean."""
    bag_index = torch.tensor([0, 0, 1, 2, 2, 2])
    images = torch.tensor([0.2, 0.4, 0.0, -0.6, -0.6, -0.6]).view(-1, 1, 1, 1).expand(6, 3, 12, 12)
    out = _augment_images(images, bag_index, 3, Augmentation.SHIFT, generator(0))
    level = (out.mean(dim=(1, 2, 3)) + 1) / 2
    before = (torch.tensor([0.3, 0.0, -0.6]) + 1) / 2
    factors = torch.stack([level[:2].mean(), level[2], level[3:].mean()]) / before
    assert len(factors.unique()) == 3
    assert ((factors - 1).abs() <= _JITTER + 1e-5).all()
    assert (1 - _JITTER) ** 2 <= (level[1] - level[0]) / 0.1 <= (1 + _JITTER) ** 2


def test_shift_keeps_every_image_upright() -> None:
    """A ramp from left to right and a step from top to bottom keep their directions."""
    ramp = torch.linspace(-1, 0, 24).repeat(24, 1) + (torch.arange(24) >= 12).float()[:, None]
    images = ramp.expand(64, 3, 24, 24)
    inside = augment_bag(images, generator(3), Augmentation.SHIFT)[:, :, 3:-3, 3:-3]
    assert (inside.diff(dim=3) > 0).all()
    assert (inside.diff(dim=2) > -1e-6).all()
    assert len({tuple(image.flatten().tolist()) for image in inside}) > 8, "they are shifted all the same"
    turned = augment_bag(images, generator(3))[:, :, 3:-3, 3:-3]
    assert not (turned.diff(dim=3) > 0).all()


def test_none_gives_the_images_back_and_draws_nothing() -> None:
    images, source = torch.rand(3, 3, 12, 12), generator(0)
    before = source.get_state()
    assert torch.equal(augment_bag(images, source, Augmentation.NONE), images)
    assert torch.equal(source.get_state(), before)


def test_a_bag_alone_gets_what_it_got_before_batches_were_made_as_one() -> None:
    """The stream of one bag: shifts, flips, turns, then light (what a private run's bag seeds draw)."""
    images, source = torch.rand(4, 3, 24, 24, generator=generator(1)), generator(2)
    shifts = torch.randint(-2, 3, (2, 4, 1), generator=source)
    flips = torch.rand((2, 4, 1), generator=source) < 0.5
    turned = torch.rand((4, 1, 1, 1), generator=source) < 0.5
    brightness, contrast = (1 + _JITTER * (2 * torch.rand(2, generator=source) - 1)).tolist()
    expected = []
    for image, (row, column), (up, left), turn in zip(
        images, shifts[:, :, 0].T.tolist(), flips[:, :, 0].T.tolist(), turned.flatten().tolist(), strict=True
    ):
        padded = torch.nn.functional.pad(image[None], (2, 2, 2, 2), mode="reflect")[0]
        moved = padded[:, 2 + row : 26 + row, 2 + column : 26 + column]
        moved = moved.flip(1) if up else moved
        moved = moved.flip(2) if left else moved
        expected.append(moved.transpose(1, 2) if turn else moved)
    moved = torch.stack(expected)
    mean = moved.mean()
    light = brightness * (mean + contrast * (moved - mean) + 1) - 1
    torch.testing.assert_close(augment_bag(images, generator(2)), light)
