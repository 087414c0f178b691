"""Learn the mean of a run's fixed features over the sites' images, in the first rounds of a run.

See ``common.model.features.frozen``. The server's mean of the sites' models makes
it the mean over all of them.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from client.data.bags import Bags
from client.data.batch import Batch, chunks, make_batch
from common.config import RunConfig
from common.model.classifier import HierarchicalClassifier
from common.model.features.frozen import FrozenFeatures

_BAGS_AT_ONCE = 64


def centred_in(model: HierarchicalClassifier, config: RunConfig, round: int) -> FrozenFeatures | None:
    """Return the backbone whose centre a round learns, or None where the round trains as usual."""
    backbone = model.backbone
    is_learned = isinstance(backbone, FrozenFeatures) and round <= config.train.centring_rounds
    return backbone if is_learned else None  # type: ignore[return-value]


@torch.no_grad()
def centre_exactly(backbone: FrozenFeatures, store: Bags, training: NDArray[np.int64]) -> float:
    """Set the centre to the mean feature of the training bags, without any privacy.

    Returns:
        The mean over bags of half the squared distance from the centre, which is the loss that it minimises.
    """
    batches = (make_batch(store, bags) for bags in chunks(training, _BAGS_AT_ONCE))
    means = torch.cat([_bag_means(backbone, batch.to(backbone.centre.device)) for batch in batches])
    centre = means.mean(dim=0)
    backbone.centre.copy_(centre)
    return float((means - centre).square().sum(dim=1).mean() / 2)


def centring_loss(backbone: FrozenFeatures, batch: Batch, clip_norm: float) -> Tensor:
    """Return a loss, linear in the centre, whose gradient is the bag's mean feature.

    Args:
        backbone: whose centre is learned.
        batch: one bag.
        clip_norm: length of the gradient of a mean feature of ``backbone.longest``.
    """
    with torch.no_grad():
        mean = _bag_means(backbone, batch)[0].to(backbone.centre.dtype)
    return -(clip_norm / backbone.longest) * (backbone.centre @ mean)


def _bag_means(backbone: FrozenFeatures, batch: Batch) -> Tensor:
    """Return the mean standardised feature of each bag, shape (B, F), float64."""
    features = backbone.standardised(batch.inputs).double()
    index = batch.inputs.bag_index
    total: Tensor = features.new_zeros(len(batch), features.shape[1]).index_add_(0, index, features)
    return total / torch.bincount(index, minlength=len(batch))[:, None]
