"""Choose the training objective by the name of the run's method."""

from collections.abc import Callable, Mapping

from client.objectives.base import Objective as Objective
from client.objectives.base import Setting as Setting
from client.objectives.dllp import LeafProportions, LevelProportions
from client.objectives.easyllp import DebiasedLoss
from client.objectives.lhfglp import HierarchicalProportions
from client.objectives.llpfc import ForwardCorrection
from client.objectives.mixbag import MixedBags
from client.objectives.rot import TransportedLabels
from client.objectives.supervised import LeafLabels, LevelLabels
from client.objectives.vat import VirtualAdversarial
from common.model.methods import Method

OBJECTIVES: Mapping[Method, Callable[[Setting], Objective]] = {
    Method.LHFGLP: HierarchicalProportions,
    Method.DLLP_HIERARCHICAL: LevelProportions,
    Method.DLLP: LeafProportions,
    Method.LLP_VAT: VirtualAdversarial,
    Method.ROT: TransportedLabels,
    Method.LLPFC: ForwardCorrection,
    Method.EASYLLP: DebiasedLoss,
    Method.MIXBAG: MixedBags,
    Method.SUPERVISED: LeafLabels,
    Method.SUPERVISED_HIERARCHICAL: LevelLabels,
}


def build_objective(setting: Setting) -> Objective:
    """Build the objective of the run's method for one round at one site.

    Raises:
        UserError: the method cannot be trained on this site's bags.
    """
    return OBJECTIVES[setting.config.model.method](setting)
