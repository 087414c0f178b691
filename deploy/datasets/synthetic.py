"""Draw synthetic lesions of 27 classes in a three-level tree, seeded, with plain NumPy.

Level 1 is the outline (3), level 2 adds the pigment (9), level 3 the texture (27); each level needs a
closer look than the one above it. Every hospital has its own staining and its own mix of classes, so
that what federated learning is for can be shown without downloading anything.
"""

import numpy as np
from numpy.typing import NDArray

from common.hierarchy import Hierarchy
from deploy.datasets.files import ArrayImages, SourceTable
from deploy.datasets.options import SyntheticHospitals

_OUTLINES = ("round", "annular", "linear")
_PIGMENTS = ("brown", "blue", "red")
_TEXTURES = ("smooth", "dotted", "striped")

_PIGMENT_RGB = np.array([[118, 72, 40], [78, 84, 128], [178, 58, 64]], dtype=np.float32)
_SKIN_RGB = np.array([226, 180, 158], dtype=np.float32)

_HOSPITAL_CONCENTRATION = 2.0
"""Per class, of the Dirichlet law of a hospital's class mix; smaller makes hospitals more unlike."""

_SESSION_CONCENTRATION = 2.7
"""In all, of the Dirichlet law of a session's mix around its hospital's; smaller makes purer bags."""

_BLOCK = 64
"""Images drawn at once: large enough for NumPy, small enough for the processor's cache."""


def lesion_hierarchy() -> Hierarchy:
    """Return the tree of 3 outlines, 9 outline-pigment types and 27 leaves."""
    return Hierarchy.from_rows(
        ("outline", "type", "lesion"),
        [
            (outline, f"{outline} {pigment}", f"{outline} {pigment} {texture}")
            for outline in _OUTLINES
            for pigment in _PIGMENTS
            for texture in _TEXTURES
        ],
    )


def _draw_lesions(
    leaves: NDArray[np.int64], size: int, stain: NDArray[np.float32], rng: np.random.Generator
) -> NDArray[np.uint8]:
    """Draw one image per leaf index.

    Args:
        leaves: shape (N,), each in 0..26.
        size: side of the images, pixels.
        stain: shape (3,), the hospital's factor on red, green and blue.
        rng: its state fixes the images.

    Returns:
        Shape (N, size, size, 3).
    """
    out = np.empty((len(leaves), size, size, 3), dtype=np.uint8)
    for start in range(0, len(leaves), _BLOCK):
        block = leaves[start : start + _BLOCK]
        out[start : start + _BLOCK] = _draw_block(block, size, stain, rng)
    return out


def synthetic_source(hospitals: SyntheticHospitals = SyntheticHospitals()) -> SourceTable:
    """Draw hospitals of synthetic lesions as a table with columns ``hospital``, ``session`` and ``split``.

    A hospital's training images come from sessions whose class mixes scatter widely around the
    hospital's own, as clinic days do: bags made of sessions differ, and differences between bags are all
    that proportions can teach. Test images are drawn from the hospital's mix.
    """
    hierarchy = lesion_hierarchy()
    leaves, images = [], []
    columns: dict[str, list[str]] = {"hospital": [], "session": [], "split": []}
    images_per_site, test_images = hospitals.images_per_site, hospitals.test_images_per_site
    # A generator for each hospital, so that its images do not depend on how many hospitals there are.
    for site, child in enumerate(np.random.SeedSequence(hospitals.seed).spawn(hospitals.sites), start=1):
        rng = np.random.default_rng(child)
        mix = rng.dirichlet(np.full(hierarchy.sizes[-1], _HOSPITAL_CONCENTRATION))
        stain = rng.uniform(0.86, 1.14, 3).astype(np.float32)
        session = np.arange(images_per_site) // hospitals.session_size
        # The small constant keeps the law proper where a class has next to no share.
        mixes = rng.dirichlet(_SESSION_CONCENTRATION * mix + 1e-3, size=int(session[-1]) + 1)
        drawn = np.concatenate(
            [
                *(rng.choice(len(mix), np.sum(session == day), p=own) for day, own in enumerate(mixes)),
                rng.choice(len(mix), test_images, p=mix),
            ]
        )
        leaves.append(drawn)
        images.append(_draw_lesions(drawn, hospitals.image_size, stain, rng))
        columns["hospital"] += [f"hospital-{site:0{len(str(hospitals.sites))}d}"] * len(drawn)
        columns["session"] += [f"{site}.{day}" for day in session] + ["test"] * test_images
        columns["split"] += ["train"] * images_per_site + ["test"] * test_images
    pixels = np.concatenate(images)
    return SourceTable(
        file="synthetic",
        images=ArrayImages(lambda index: pixels[index]),
        labels=np.concatenate(leaves).astype(np.int64),
        hierarchy=hierarchy,
        lines=[None] * len(pixels),
        columns=columns,
        split_column="split",
    )


def _draw_block(
    leaves: NDArray[np.int64], size: int, stain: NDArray[np.float32], rng: np.random.Generator
) -> NDArray[np.uint8]:
    number = len(leaves)
    outline, pigment, texture = leaves // 9, leaves // 3 % 3, leaves % 3

    def uniform(low: float, high: float, *shape: int) -> NDArray[np.float32]:
        values = low + (high - low) * rng.random((number, *(shape or (1, 1))), dtype=np.float32)
        return values.astype(np.float32)

    axis = np.linspace(-1, 1, size, dtype=np.float32)
    x = axis[None, None, :] - uniform(-0.15, 0.15)
    y = axis[None, :, None] - uniform(-0.15, 0.15)
    angle = uniform(0, np.pi)
    u, v = np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x

    # Outline: a disc, a ring, or a long ellipse, each with an uneven border.
    kind = outline[:, None, None]
    ratio = np.where(kind == 2, uniform(0.3, 0.4), uniform(0.88, 1.0))
    radius = np.where(kind == 2, uniform(0.76, 0.88), uniform(0.6, 0.74))
    distance = np.sqrt(u * u + (v / ratio) ** 2)
    # cos and sin of 2 and 3 phi as polynomials: no arctangent per pixel.
    cosine, sine = u / (distance + 1e-6), v / (distance + 1e-6)
    square = cosine * cosine
    wobble = uniform(-0.07, 0.07) * (2 * square - 1) + uniform(-0.07, 0.07) * (2 * sine * cosine)
    wobble += uniform(-0.08, 0.08) * cosine * (4 * square - 3)
    wobble += uniform(-0.08, 0.08) * sine * (4 * square - 1)
    depth = radius * (1 + wobble) - distance
    hole = np.where(kind == 1, uniform(0.3, 0.4), 2.0)
    depth = np.minimum(depth, hole - depth)
    mask = np.clip(depth * uniform(4, 8) + 0.5, 0, 1)

    # Texture: none, dots on a lattice, or stripes, at a random angle.
    turn = uniform(0, np.pi)
    frequency = uniform(15, 19)
    s = frequency * (np.cos(turn) * x + np.sin(turn) * y) + uniform(0, 2 * np.pi)
    t = frequency * (np.cos(turn) * y - np.sin(turn) * x) + uniform(0, 2 * np.pi)
    wave = np.sin(s)
    pattern = np.where(
        (texture == 2)[:, None, None], 0.9 * wave, np.clip(2.4 * wave * np.sin(t) - 0.6, -0.6, 1)
    )
    pattern = np.where((texture == 0)[:, None, None], 0, pattern)
    strength = uniform(0.26, 0.4)

    # Colour: skin with uneven light, pigment with a jitter of its own, then the hospital's stain.
    light = uniform(0.92, 1.06) + uniform(-0.07, 0.07) * x + uniform(-0.07, 0.07) * y
    grain = rng.standard_normal((number, size, size), dtype=np.float32) * 0.025
    shade = np.clip(1.12 - strength * pattern - 0.3 * mask * np.minimum(depth, 0.4), 0.35, 1.5)
    skin = _SKIN_RGB * uniform(0.93, 1.05, 3)
    colour = _PIGMENT_RGB[pigment] * uniform(0.82, 1.18, 3)
    image = np.empty((number, size, size, 3), dtype=np.uint8)
    field = light + grain
    for channel in range(3):
        ground = skin[:, channel, None, None]
        plane = ground + mask * (colour[:, channel, None, None] * shade - ground)
        plane *= field * stain[channel]
        image[..., channel] = np.clip(plane, 0, 255)
    return image
