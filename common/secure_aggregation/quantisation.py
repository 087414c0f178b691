"""Turn updates into words that are clipped, weighted, scaled and rounded at random.

The sum of such words is exact. An update is the difference between the site's model and the one that it was
sent. Its coordinate x becomes

    round(clip(x, -c, c) * w * s)  modulo 2**32,     s = (2**31 - 1 - n) / c

with the site's weight w, the clip range c and n sites. The weights sum to at most 1, so the sum of all n
lies within +-(c * s + n) <= 2**31 - 1 and never wraps. Rounding is up or down with the chance that makes
it unbiased (Konecny et al. 2016, section 4), by less than 1 per site; so a coordinate of the weighted mean
over sites of total weight W is off by less than

    n / (s * W)  =  n c / ((2**31 - 1 - n) W):   3.7e-8 for 5 sites and c = 16

plus what clipping changes. Turning the mean into float32, which resolves 6e-8 at size 1, comes on top.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from common.errors import RunError
from common.secure_aggregation.keys import CHUNK, Keystream, new_secret
from common.secure_aggregation.records import Words

_FloatArray = NDArray[np.float32]
_Arrays = Mapping[str, _FloatArray]

_MOST_BEYOND_HALF = 0.25
"""Largest share of a mean's numbers beyond half of the clip range. Of random words half are."""


@dataclass(frozen=True)
class Grid:
    """Define the whole numbers to which all sites of a session round."""

    clip_range: float
    """c > 0; each coordinate of an update is clipped to +-c."""
    sites: int
    """n, the sites whose weights sum to at most 1."""

    @property
    def scale(self) -> float:
        """Return the steps per unit (s above)."""
        return (2**31 - 1 - self.sites) / self.clip_range


def length(arrays: _Arrays) -> int:
    """Return the number of words of a model with these arrays."""
    return sum(array.size for array in arrays.values())


def digest(arrays: _Arrays) -> bytes:
    """Return the SHA-256 of arrays with their names and shapes.

    The 32 bytes are the same at server and sites.
    """
    state = hashlib.sha256()
    for name in sorted(arrays):
        # One byte order, so that sites and server on different machines get the same digest.
        array = np.ascontiguousarray(arrays[name], dtype="<f4")
        state.update(f"{name} {array.shape}\n".encode())
        state.update(array.data)
    return state.digest()


def quantise(sent: _Arrays, trained: _Arrays, grid: Grid, weight: float, most_clipped: float = 1.0) -> Words:
    """Return a site's update as words, shape (length(trained),), arrays in the order of their names.

    Args:
        sent: the model that the server sent; holds at least the names of ``trained``, in the same shapes.
        trained: what the site would send without secure aggregation.
        grid: of the session.
        weight: of this site, in [0, 1].
        most_clipped: largest share of coordinates that may lie beyond the clip range, in [0, 1].

    Raises:
        RunError: the update is not finite, or too much of it beyond the clip range. It must not be sent:
            masked, nobody could find a NaN, and a sum of clipped coordinates tells each site's signs.
    """
    words = np.empty(length(trained), np.uint32)
    # Rounding draws from a fresh secret key, so that nobody else can repeat it.
    chances = Keystream(new_secret())
    clip_range, factor = grid.clip_range, weight * grid.scale
    place = beyond = 0
    for name in sorted(trained):
        new, old = trained[name].reshape(-1), sent[name].reshape(-1)
        for start in range(0, len(new), CHUNK):
            # float64, because in float32 the product with a scale near 2**31 would lose the bits that
            # rounding decides on.
            step = np.subtract(new[start : start + CHUNK], old[start : start + CHUNK], dtype=np.float64)
            if not np.isfinite(step).all():
                raise RunError("local training diverged: the update is not finite; it is not sent")
            beyond += int(np.count_nonzero(np.abs(step) > clip_range))
            np.clip(step, -clip_range, clip_range, out=step)
            step *= factor
            step += chances.next(len(step)) * 2.0**-32
            np.floor(step, out=step)
            # Within int32 by the choice of the scale; its bit pattern is the word modulo 2**32.
            words[place : place + len(step)] = step.astype(np.int32).view(np.uint32)
            place += len(step)
    # If nearly all numbers are cut, the sum with its public weights would tell each site's signs.
    if beyond > most_clipped * len(words):
        raise RunError(
            f"{beyond} of {len(words)} numbers of the update are beyond the clip range {clip_range:g}; it is "
            "not sent: raise secure-aggregation.clip-range"
        )
    return words


def to_words(steps: NDArray[np.int64]) -> Words:
    """Return whole numbers of steps as words modulo 2**32, same shape."""
    return (steps & 0xFFFFFFFF).astype(np.uint32)


def sum_of(total: Words, trained: _Arrays, grid: Grid) -> dict[str, NDArray[np.float64]]:
    """Return a sum of ``to_words`` by name, in units.

    Args:
        total: the sum, modulo 2**32.
        trained: arrays with the names and shapes of what is summed.
        grid: of the session.
    """
    signed, place = total.view(np.int32) / grid.scale, 0
    found = {}
    for name in sorted(trained):
        size = trained[name].size
        found[name] = signed[place : place + size].reshape(trained[name].shape)
        place += size
    return found


def refuse_noise(total: Words, weight: float, sites: int) -> None:
    """Refuse a sum that is as large everywhere as one with random words in it.

    Args:
        total: as in ``mean_of``.
        weight: as in ``mean_of``.
        sites: n of the session.

    Raises:
        RunError: too many numbers are beyond half of the clip range.
    """
    signed = total.view(np.int32)
    half = weight * (2**31 - 1 - sites) / 2
    if np.count_nonzero((signed > half) | (signed < -half)) > _MOST_BEYOND_HALF * len(signed):
        raise RunError(
            "the unmasked sum looks like random words: too many of its numbers are beyond half of the clip "
            "range. A site sent words that are no update, or secure-aggregation.clip-range is far too small."
        )


def mean_of(total: Words, sent: _Arrays, grid: Grid, weight: float) -> dict[str, _FloatArray]:
    """Return the next model from the sum of the words and the model that was sent.

    Args:
        total: sum of the words of the sites in the mean, modulo 2**32.
        sent: the arrays that the sites started from, and were trained.
        grid: of the session.
        weight: total weight of the sites in the mean, in (0, 1].

    Raises:
        RunError: the sum is larger than sites that clip could make it: somebody sent something else.
    """
    steps = grid.scale
    signed = total.view(np.int32)
    farthest = max(-int(signed.min(initial=0)), int(signed.max(initial=0)))
    # No set of clipped updates can make a larger sum. A mask that was not removed, or words that are no
    # update, almost always do.
    if farthest > weight * grid.clip_range * steps + grid.sites:
        raise RunError(
            "the unmasked sum is out of range: a site sent words that are no clipped update, or masks were "
            "not removed. Nothing of it is used."
        )
    mean, place = {}, 0
    for name in sorted(sent):
        array = sent[name]
        part = signed[place : place + array.size].reshape(array.shape)
        mean[name] = (array + part / (steps * weight)).astype(np.float32)
        place += array.size
    return mean
