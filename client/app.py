"""The ClientApp of a hospital: what it answers to each question of the server."""

from functools import lru_cache
from pathlib import Path

import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from client import egress
from client.bags import BagStore
from client.evaluation import evaluate_bags, evaluate_labelled
from client.locate import find_site
from client.release import release_proportions
from client.training import train_round
from common.build import rebuild_model
from common.config import ModelConfig, RunConfig
from common.hierarchy import Hierarchy
from common.lhfglp import LHFGLP
from common.messages import Metric, ModelUpdate, PrivacyStatement, from_records, to_records
from common.model_file import load_arrays, trainable_arrays

app = ClientApp(mods=[egress.guard])


@app.query("proportions")
def proportions(message: Message, context: Context) -> Message:
    """Say how many images of each leaf the site has, as far as its policy releases that."""
    _, store = open_site(context)
    return Message(to_records(release_proportions(store)), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train the server's model on the site's bags and send its arrays back."""
    config, store = open_site(context)
    request = from_records(message.content, ModelUpdate)
    model = receive_model(config, store, request)
    result = train_round(model, store, config, request.round)
    metrics: dict[str, Metric] = {
        "num-bags": result.bags,
        "num-images": result.images,
        "loss": result.loss,
    }
    return Message(
        to_records(
            answer(store, request, metrics, model),
            PrivacyStatement(site=store.name, round=request.round),
        ),
        reply_to=message,
    )


@app.evaluate("bags")
def evaluate_on_bags(message: Message, context: Context) -> Message:
    """Compare the model's proportions with those of the held-back bags."""
    config, store = open_site(context)
    request = from_records(message.content, ModelUpdate)
    metrics = evaluate_bags(receive_model(config, store, request), store, config)
    return Message(to_records(answer(store, request, metrics)), reply_to=message)


@app.evaluate("test")
def evaluate_on_test(message: Message, context: Context) -> Message:
    """Count the model's hits on the site's labelled test images, if it has any."""
    # Imported here so that training never loads the module that opens instance labels.
    from client.labelled import LabelledImages

    config, store = open_site(context)
    request = from_records(message.content, ModelUpdate)
    test = LabelledImages.open(find_site(context), config.model.image_size, skip_bad=config.skip_bad)
    metrics = evaluate_labelled(receive_model(config, store, request), test, config) if test else {}
    return Message(to_records(answer(store, request, metrics)), reply_to=message)


def open_site(context: Context) -> tuple[RunConfig, BagStore]:
    """The run's configuration and the site's bags; sets torch's threads as the run asks."""
    config = RunConfig.from_flat(context.run_config)
    if torch.get_num_threads() != config.train.threads:
        torch.set_num_threads(config.train.threads)
    folder = find_site(context)
    stamps = tuple(path.stat().st_mtime_ns for path in sorted(folder.glob("*.*")))
    return config, _open_store(folder, stamps, config.model.image_size, config.skip_bad)


@lru_cache(maxsize=64)
def _open_store(folder: Path, stamps: tuple[int, ...], size: int, skip_bad: bool) -> BagStore:
    """Opened once per process and version of the site's tables (a deployed site answers one message per
    process; a simulation answers many)."""
    return BagStore.open(folder, size, skip_bad=skip_bad)


def receive_model(config: RunConfig, store: BagStore, request: ModelUpdate) -> LHFGLP:
    """The model with the arrays that the server sent."""
    model = _architecture(config.model, store.hierarchy)
    load_arrays(model, request.arrays)
    return model


@lru_cache(maxsize=2)
def _architecture(config: ModelConfig, hierarchy: Hierarchy) -> LHFGLP:
    """Built once per process: every float of it is overwritten by the next message."""
    return rebuild_model(config, hierarchy)


def answer(
    store: BagStore, request: ModelUpdate, metrics: dict[str, Metric], model: LHFGLP | None = None
) -> ModelUpdate:
    """A reply with the metrics that the site's policy allows, and the trained arrays if any."""
    allowed = set(store.config.policy.metrics)
    return ModelUpdate(
        sender=store.name,
        round=request.round,
        arrays=trainable_arrays(model) if model is not None else {},
        metrics={key: value for key, value in metrics.items() if key.partition(".")[0] in allowed},
    )
