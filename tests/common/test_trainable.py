"""Which parameters are trained: heads and dictionary, with normalisation, or all; and changing that."""

import pytest

from common.config_tables import ModelConfig
from common.hierarchy import Hierarchy
from common.model.build import TrainedPart, build_model, trainable_parameters
from common.model.model_file import trainable_arrays


@pytest.mark.parametrize("backbone", ["resnet-small", "resnet18", "convnext_tiny"])
def test_parts_nest_and_only_what_is_trained_is_sent(tree: Hierarchy, backbone: str) -> None:
    config = ModelConfig(backbone=backbone, image_size=32, atoms_per_class=2)
    model = build_model(config, tree, seed=0)
    sent = {}
    for part in (TrainedPart.HEAD, TrainedPart.ALL, TrainedPart.NORM_HEAD):
        parameters = trainable_parameters(model, part)
        names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        assert len(parameters) == len(names) > 0
        sent[part] = set(trainable_arrays(model))
        assert sent[part] == set(names)
    assert sent[TrainedPart.HEAD] < sent[TrainedPart.NORM_HEAD] < sent[TrainedPart.ALL]
    assert {name.split(".")[0] for name in sent[TrainedPart.HEAD]} == {"heads", "blocks"}
    extra = sent[TrainedPart.NORM_HEAD] - sent[TrainedPart.HEAD]
    assert {name.split(".")[-1] for name in extra} == {"weight", "bias"}
    assert all(model.get_parameter(name).dim() == 1 for name in extra)


def test_a_model_without_a_dictionary_has_heads_alone(tree: Hierarchy) -> None:
    model = build_model(ModelConfig(method="dllp", image_size=32), tree, seed=0)
    trainable_parameters(model, TrainedPart.HEAD)
    assert set(trainable_arrays(model)) == {"heads.0.weight", "heads.0.bias"}
