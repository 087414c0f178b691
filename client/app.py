"""Define the ClientApp of a hospital and its answer to each question of the server."""

from flwr.app import Context, Message

from client import egress, journal
from client.data.bags import BagStore
from client.disclosure import bags_of_a_round, may_leave
from client.door import SiteApp
from client.evaluation import evaluate_bags, evaluate_labelled, sum_distances
from client.figures import suppress
from client.locate import find_site
from client.opening import open_site, receive_model, skips_bad, terms_of
from client.release import name_version, private_release, release_proportions
from client.seeds import training_seeds
from client.site import ReleaseProportions
from client.training import TrainingResult, train_round
from common.config import RunConfig
from common.errors import ConfigError, SecureAggregationRefused
from common.model.lhfglp import LHFGLP
from common.model.model_file import trainable_arrays
from common.records import Metric, ModelUpdate, PrivacyStatement
from common.secure_aggregation.records import (
    MaskedUpdate,
    MaskRequest,
    SessionOffer,
    SessionPlan,
    SurvivorList,
    UnmaskRequest,
)
from common.wire import from_records, to_records

# The journal is outermost, so that it records what the guard decided to send. The guard is next to the
# handlers, so that no reply goes around it.
app = SiteApp(mods=[journal.record, egress.guard])


@app.answers("query.keys")
def keys(message: Message, context: Context) -> Message:
    """Answer the first step of secure aggregation with fresh public keys, signed with the node key."""
    from client.secure_aggregation import Member

    return Message(
        to_records(Member.open(context).advertise(from_records(message.content, SessionOffer))),
        reply_to=message,
    )


@app.answers("query.shares")
def shares(message: Message, context: Context) -> Message:
    """Answer the second step of secure aggregation by checking all keys and sealing shares for the others."""
    from client.secure_aggregation import Member

    return Message(
        to_records(Member.open(context).share(from_records(message.content, SessionPlan))), reply_to=message
    )


@app.answers("query.survivors")
def survivors(message: Message, context: Context) -> Message:
    """Sign the list of the sites whose masked vectors have arrived, according to the server.

    This is the step of secure aggregation after training.
    """
    from client.secure_aggregation import Member

    return Message(
        to_records(Member.open(context).agree(from_records(message.content, SurvivorList))), reply_to=message
    )


@app.answers("query.unmask")
def unmask(message: Message, context: Context) -> Message:
    """Send the shares with which the masks are taken off the sum, as the last step of secure aggregation."""
    from client.secure_aggregation import Member

    return Message(
        to_records(Member.open(context).unmask(from_records(message.content, UnmaskRequest))),
        reply_to=message,
    )


@app.answers("query.proportions")
def proportions(message: Message, context: Context) -> Message:
    """Answer with the label counts of the site, as far as its policy releases them."""
    config, store = open_site(context)
    if not config.dp.epsilon or store.config.policy.release_proportions is ReleaseProportions.NONE:
        return Message(
            to_records(release_proportions(store, name_version(store, find_site(context)))), reply_to=message
        )
    from client.budget import open_budget

    budget = open_budget(context, config, store, find_site(context))
    noised = budget.release(store, config.dp.release_scale)
    return Message(to_records(private_release(store, noised, budget.ledger.identifier)), reply_to=message)


@app.answers("train")
def train(message: Message, context: Context) -> Message:
    """Train the server's model on the site's bags and send its arrays back."""
    config, store = open_site(context)
    refuse_in_clear(config, store)
    request = from_records(message.content, ModelUpdate)
    model, metrics, statement = train_locally(context, config, store, request)
    update = answer("train", context, store, request, metrics, model)
    reply = to_records(update, statement, transport=config.federation.transport)
    return Message(reply, reply_to=message)


@app.answers("train.masked")
def train_masked(message: Message, context: Context) -> Message:
    """Train like ``train``, and send the update under masks that come off only in the sum of many sites."""
    from client.secure_aggregation import Member

    config, store = open_site(context)
    request = from_records(message.content, ModelUpdate)
    member = Member.open(context)
    # Before training: a second model for the same round must be refused before anything is computed from
    # it.
    member.receive(from_records(message.content, MaskRequest), request)
    model, metrics, statement = train_locally(context, config, store, request)
    told = answer("train.masked", context, store, request, metrics).metrics
    update = MaskedUpdate(
        session=member.session,
        round=request.round,
        sender=store.name,
        vector=member.mask(request.arrays, trainable_arrays(model)),
        # The record of a masked update takes single numbers only.
        metrics={key: value for key, value in told.items() if not isinstance(value, tuple)},
    )
    return Message(to_records(update, statement), reply_to=message)


def train_locally(
    context: Context, config: RunConfig, store: BagStore, request: ModelUpdate
) -> tuple[LHFGLP, dict[str, Metric], PrivacyStatement]:
    """Train one round on the site's bags, and return the model, all metrics and the privacy statement."""
    model = receive_model(config, store.hierarchy, request.arrays)
    if config.dp.epsilon:
        result, statement = train_privately(context, config, store, model, request.round)
    else:
        refuse_few_bags(context, config, store)
        result = train_round(model, store, config, request.round, training_seeds(context, config, store.name))
        statement = PrivacyStatement(site=store.name, round=request.round)
    metrics: dict[str, Metric] = {
        "num-bags": result.bags,
        "num-images": result.images,
        "loss": result.loss,
    }
    return model, metrics, statement


def train_privately(
    context: Context, config: RunConfig, store: BagStore, model: LHFGLP, round: int
) -> tuple[TrainingResult, PrivacyStatement]:
    """Reserve the round's cost, train, and confirm.

    The order keeps every spending on record: a site that stops in between has charged too much and not too
    little.
    """
    # Imported here: Opacus and the accountants take seconds, and a run without privacy needs neither.
    from client.budget import open_budget
    from client.private_training import train_round_privately

    budget = open_budget(context, config, store, find_site(context))
    seeds = training_seeds(context, config, store.name)
    reservation = budget.reserve(round)
    result = train_round_privately(model, store, config, round, budget.plan, seeds)
    return result, budget.confirm(reservation, round)


@app.answers("evaluate.bags")
def evaluate_on_bags(message: Message, context: Context) -> Message:
    """Compare the model's proportions with those of the held-back bags, with noise in a private run."""
    config, store = open_site(context)
    request = from_records(message.content, ModelUpdate)
    model = receive_model(config, store.hierarchy, request.arrays)
    if not config.dp.epsilon:
        metrics = evaluate_bags(model, store, config)
        update = answer("evaluate.bags", context, store, request, metrics)
        return Message(to_records(update), reply_to=message)
    metrics, statement = look_privately(context, config, store, model, request.round)
    update = answer("evaluate.bags", context, store, request, metrics)
    return Message(to_records(update, statement), reply_to=message)


def look_privately(
    context: Context, config: RunConfig, store: BagStore, model: LHFGLP, round: int
) -> tuple[dict[str, Metric], PrivacyStatement]:
    """Reserve the cost of an evaluation on held-back bags, evaluate, add the noise, and confirm.

    Nothing is evaluated if the site's policy or the run wants no noised figures.
    """
    from client.budget import open_budget

    budget = open_budget(context, config, store, find_site(context))
    if not budget.plan.look:
        return {}, budget.ledger.statement(round)
    reservation = budget.reserve_look(round)
    sums = budget.plan.noised_look(sum_distances(model, store, config), round)
    _, held_back = store.split(config.train.held_back, config.seed)
    metrics: dict[str, Metric] = {"noised-bags-tv": tuple(sums.tolist()), "held-back-bags": len(held_back)}
    return metrics, budget.confirm(reservation, round)


@app.answers("evaluate.test")
def evaluate_on_test(message: Message, context: Context) -> Message:
    """Compare the model's predictions with the labels of the site's test images, if it has any."""
    # Imported here so that training never loads the module that opens instance labels.
    from client.data.labelled import LabelledImages

    config, store = open_site(context)
    request = from_records(message.content, ModelUpdate)
    terms = terms_of(context, store.config)
    size, skip_bad = config.model.image_size, skips_bad(config, terms)
    test = LabelledImages.open(find_site(context), size, skip_bad=skip_bad)
    model = receive_model(config, store.hierarchy, request.arrays)
    counts = evaluate_labelled(model, test, config) if test else {}
    metrics = suppress(counts, terms.minimum_cell_size)
    return Message(to_records(answer("evaluate.test", context, store, request, metrics)), reply_to=message)


def answer(
    kind: str,
    context: Context,
    store: BagStore,
    request: ModelUpdate,
    metrics: dict[str, Metric],
    model: LHFGLP | None = None,
) -> ModelUpdate:
    """Build a reply with the metrics that may leave, and with the trained arrays if a model is given."""
    config = RunConfig.from_flat(context.run_config)
    training, held_back = store.split(config.train.held_back, config.seed)
    terms = terms_of(context, store.config)
    allowed = may_leave(kind, config, store.config, terms, training=len(training), held_back=len(held_back))
    return ModelUpdate(
        sender=store.name,
        round=request.round,
        arrays=trainable_arrays(model) if model is not None else {},
        metrics={key: value for key, value in metrics.items() if key.partition(".")[0] in allowed},
    )


def refuse_in_clear(config: RunConfig, store: BagStore) -> None:
    """Refuse to send an update in clear if the run or the site's own policy demands masked ones.

    Raises:
        SecureAggregationRefused: one was asked for in clear.
    """
    if config.secure_aggregation.enabled or store.config.policy.secure_aggregation.required:
        raise SecureAggregationRefused("an update in clear was asked for, where only masked ones may leave")


def refuse_few_bags(context: Context, config: RunConfig, store: BagStore) -> None:
    """Refuse, at a real site, a run whose rounds use so few bags that an update nearly shows one of them.

    It bounds only the division of a pass. A round that is a full pass trains on all bags that there are,
    however few: an exact update tells of its bags whatever their number, and a privacy budget or secure
    aggregation is what protects them.

    Raises:
        ConfigError: the run divides the bags into such parts.
    """
    terms = terms_of(context, store.config)
    training, _ = store.split(config.train.held_back, config.seed)
    fewest = terms.minimum_held_back_bags
    if terms.strict and config.train.rounds_per_pass > 1 and bags_of_a_round(config, len(training)) < fewest:
        raise ConfigError(
            f"train.rounds-per-pass = {config.train.rounds_per_pass} makes rounds of fewer than {fewest} bags"
        )
