"""Which bags a round trains on."""

import numpy as np
import pytest

from client.site import TrainingSeeds
from client.training import _passes_of_round
from common.config import RunConfig
from common.errors import ConfigError

TRAINING = np.arange(100, 111)


def seen(config: RunConfig, round: int) -> list[list[int]]:
    seeds = TrainingSeeds(config.seed, "site-1")
    return [bags.tolist() for bags in _passes_of_round(TRAINING, config, seeds, round)]


def test_a_round_is_whole_passes_each_in_an_order_of_its_own() -> None:
    config = RunConfig().with_changes({"train.local-epochs": 2})
    first, second = seen(config, 1)
    assert sorted(first) == sorted(second) == TRAINING.tolist()
    assert first != second
    assert seen(config, 2) != [first, second]


@pytest.mark.parametrize("parts", [2, 4, 11])
def test_rounds_that_share_a_pass_see_every_bag_once(parts: int) -> None:
    config = RunConfig().with_changes({"train.rounds-per-pass": parts})
    for number in range(3):
        rounds = [seen(config, number * parts + part + 1) for part in range(parts)]
        assert all(len(passes) == 1 and passes[0] for passes in rounds)
        whole = [bag for passes in rounds for bag in passes[0]]
        assert whole == seen(RunConfig(), number + 1)[0]  # the order of the pass that is not divided


def test_a_site_with_fewer_bags_than_parts_trains_in_every_round() -> None:
    config = RunConfig().with_changes({"train.rounds-per-pass": 30})
    rounds = [seen(config, round)[0] for round in range(1, 31)]
    assert {len(bags) for bags in rounds} == {1}
    assert {bag for bags in rounds for bag in bags} == set(TRAINING.tolist())


def test_a_round_is_not_both_several_passes_and_a_part_of_one() -> None:
    with pytest.raises(ConfigError, match="rounds-per-pass"):
        RunConfig().with_changes({"train.rounds-per-pass": 2, "train.local-epochs": 2})
