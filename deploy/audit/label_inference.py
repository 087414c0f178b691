"""Measure how well labels are guessed from released proportions, and from models with and without DP.

The attacker has the images of a bag and guesses one leaf for all of them. The share of images for which this
is right follows from the bag's counts, so no instance label is opened. It is compared with two figures. One
is the site's most frequent leaf, which the public marginals give away in any case. The other, for a model, is
the same guess on bags that it was not trained on, since naming the class of any image is its purpose. These
are simple attacks, so a low figure is no proof of privacy. The unit is an image's label, and no confidence is
claimed.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from client.data.bags import BagStore
from client.data.batch import chunks, make_batch
from client.training import choose_device
from common.config import RunConfig
from common.model.classifier import HierarchicalClassifier
from common.model.losses import bag_mean_probabilities
from common.privacy.proportions import Granularity, release_counts
from common.privacy.randomness import Randomness

_BAGS_AT_ONCE = 8


def _hit_rate(guesses: NDArray[np.int64], leaf_counts: NDArray[np.int64]) -> float:
    """Return the share of images that have the leaf guessed for their bag.

    Args:
        guesses: shape (B,), a leaf per bag.
        leaf_counts: shape (B, C_L).
    """
    return float(leaf_counts[np.arange(len(guesses)), guesses].sum() / leaf_counts.sum())


def _most_frequent(leaf_counts: NDArray[np.int64]) -> float:
    """Return the share of images of the site's most frequent leaf, which the marginals alone give away."""
    return float(leaf_counts.sum(axis=0).max() / leaf_counts.sum())


def attack_proportions(store: BagStore, scale: float, randomness: Randomness) -> dict[str, Any]:
    """Guess each bag's most frequent leaf from counts, exact and noised, of the site and of every bag.

    Args:
        store: the site's bags.
        scale: b of the noise, relative to the largest bag (see ``common.privacy.proportions``).
        randomness: of the noise. The noised counts are drawn for this attack and never leave it.

    Returns:
        ``prior``, the share of the most frequent leaf; for each kind of counts the accuracy and its
        advantage over the prior; and what the site's policy releases.
    """
    counts, bags = store.leaf_counts, len(store)

    def noised(granularity: Granularity) -> NDArray[np.int64]:
        return release_counts(counts, scale=scale, granularity=granularity, randomness=randomness).array()

    known = {
        "site_exact": counts.sum(axis=0, keepdims=True),
        "site_noised": noised(Granularity.TOTAL),
        "bags_exact": counts,
        "bags_noised": noised(Granularity.PER_BAG),
    }
    prior = _most_frequent(counts)
    result: dict[str, Any] = {
        "prior": prior,
        "released": str(store.config.policy.release_proportions),
        "noise_scale": scale,
    }
    for name, rows in known.items():
        rate = _hit_rate(np.broadcast_to(rows.argmax(axis=1), bags), counts)
        result[name] = {"accuracy": rate, "advantage": rate - prior}
    return result


def attack_model(
    model: HierarchicalClassifier, store: BagStore, config: RunConfig, groups: Sequence[NDArray[np.int64]]
) -> dict[str, float]:
    """Guess the leaf with the highest mean probability in each bag, and return the accuracies.

    Args:
        model: trained on the first group of bags, not on the second.
        store: the site's bags.
        config: the run, for the device to compute on.
        groups: bag indices, trained on and not.

    Returns:
        ``trained`` and ``not_trained``, the accuracies; ``advantage`` of the first over the prior of its
        bags; ``memorised``, the first less the second: what training on a bag tells about its labels.
    """
    trained, other = (_model_hit_rate(model, store, config, bags) for bags in groups)
    return {
        "trained": trained,
        "not_trained": other,
        "advantage": trained - _most_frequent(store.leaf_counts[groups[0]]),
        "memorised": trained - other,
    }


@torch.no_grad()
def _model_hit_rate(
    model: HierarchicalClassifier, store: BagStore, config: RunConfig, bags: NDArray[np.int64]
) -> float:
    device = choose_device(config.train.device)
    model.to(device).eval()
    guesses = []
    for some in chunks(bags, _BAGS_AT_ONCE):
        batch = make_batch(store, some).to(device)
        predicted = bag_mean_probabilities(model(batch.inputs).scores[-1], batch.inputs.bag_index, len(some))
        guesses.append(predicted.argmax(dim=1).cpu().numpy())
    return _hit_rate(np.concatenate(guesses), store.leaf_counts[bags])
