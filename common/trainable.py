"""Choose the parameters that a run trains.

The rest keep the values they have, and are never sent.

Noise for privacy is added to every trained parameter, so its norm grows with their number: a private run
trains few. This module knows nothing of training and privacy.
"""

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from common.config_tables import Part
from common.lhfglp import LHFGLP

NORMALISATIONS = (nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, _BatchNorm, _InstanceNorm)


def trainable_parameters(model: LHFGLP, part: Part) -> list[nn.Parameter]:
    """Freeze everything outside ``part`` and free everything inside it.

    ``requires_grad`` of every parameter is set, whatever it was, so the choice can be changed;
    ``common.model_file.trainable_arrays`` then holds exactly the parameters returned.

    Returns:
        The trained parameters in the order of ``model.parameters()``; never empty, for a model has heads.
    """
    model.requires_grad_(part is Part.ALL)
    if part is not Part.ALL:
        model.heads.requires_grad_(True)
        model.blocks.requires_grad_(True)
    if part is Part.NORM_HEAD:
        for module in model.backbone.modules():
            if isinstance(module, NORMALISATIONS):
                module.requires_grad_(True)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
