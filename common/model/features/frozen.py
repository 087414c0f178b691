"""Serve fixed features as a backbone, less their mean over the hospitals' images.

Fixed features of one kind of image lie close together, far from zero: their common part would take up most
of the norm that a bag's gradient is clipped to. So the mean is learned before anything else, in the first
``train.centring-rounds`` rounds, by the same steps, clipping and noise as all that is learned.
"""

import torch
from torch import Tensor, nn

from common.errors import ConfigError
from common.model.features.bank import feature_bank
from common.model.interfaces import Features, Inputs


class FrozenFeatures(nn.Module):
    """Map inputs to standardised fixed features (N, F), which ``Inputs.features`` holds or images give.

    Args:
        names: of the features.
        image_size: S, pixels.
    """

    map_shape = None

    def __init__(self, names: tuple[str, ...], image_size: int) -> None:
        super().__init__()
        self.names, self.image_size = names, image_size
        bank = feature_bank(names, image_size)
        self.n_features = bank.n_features
        self.longest = 2 * bank.length
        """Length that a bag's mean feature is cut to in centring, twice that of public images."""
        self.ignored_weights: tuple[str, ...] = ()
        self.centre = nn.Parameter(torch.zeros(self.n_features))

    def forward(self, inputs: Inputs) -> Features:
        """Return the features of N images, and no map."""
        # The loss has no gradient to the centre: with it the heads would move the ground they stand on.
        return Features(self.standardised(inputs) - self.centre.detach())

    def standardised(self, inputs: Inputs) -> Tensor:
        """Return the features (N, F) before the centre is taken off."""
        if inputs.features is not None:
            return inputs.features
        # The bank is no part of this module: nothing of it is trained, sent or stored with the model.
        return feature_bank(self.names, self.image_size)(inputs.images)

    def centring_rate(self, clip_norm: float, steps: int) -> float:
        """Return the rate of SGD at which so many steps average the mean features that they are given.

        Args:
            clip_norm: length of the gradient that stands for a mean feature of length ``longest``.
            steps: of all rounds that learn the centre.
        """
        return self.longest / clip_norm / steps

    def tail(self, map: Tensor) -> Tensor:
        """Refuse: there is no map.

        Raises:
            ConfigError: always.
        """
        raise ConfigError("fixed features have no feature map: choose a convolutional backbone")
