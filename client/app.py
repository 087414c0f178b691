"""Define the ClientApp of a hospital and its answer to each question of the server."""

from typing import TYPE_CHECKING

from flwr.app import Message

from client import egress
from client.door import SiteApp
from client.evaluation import evaluate_bags, evaluate_labelled, sum_distances
from client.release import may_leave, private_release, release_proportions, suppress
from client.session import SiteSession
from client.site import ReleaseProportions
from client.training import TrainingResult, train_round
from common.errors import ConfigError, SecureAggregationRefused
from common.model.classifier import HierarchicalClassifier
from common.model.model_file import trainable_arrays
from common.records import Metric, ModelUpdate, PrivacyStatement
from common.secure_aggregation.records import (
    MaskedUpdate,
    MaskRequest,
    SessionOffer,
    SessionPlan,
    SurvivorList,
    UnmaskRequest,
    Words,
)
from common.wire import from_records, to_records

if TYPE_CHECKING:
    from client.secure_aggregation import Member

app = SiteApp(egress.guard)


def _member(session: SiteSession) -> "Member":
    # Imported here: a run in clear, which answers each message in a new process, loads no cryptography.
    from client.secure_aggregation import Member

    return Member.open(session)


@app.answers("query.keys")
def _keys(message: Message, session: SiteSession) -> Message:
    """Answer the first step of secure aggregation with fresh public keys, signed with the node key."""
    advert = _member(session).advertise(from_records(message.content, SessionOffer))
    return Message(to_records(advert), reply_to=message)


@app.answers("query.shares")
def _shares(message: Message, session: SiteSession) -> Message:
    """Answer the second step of secure aggregation by checking all keys and sealing shares for the others."""
    sealed = _member(session).share(from_records(message.content, SessionPlan))
    return Message(to_records(sealed), reply_to=message)


@app.answers("query.survivors")
def _survivors(message: Message, session: SiteSession) -> Message:
    """Sign the list of the sites whose masked vectors have arrived, according to the server.

    This is the step of secure aggregation after training.
    """
    signature = _member(session).agree(from_records(message.content, SurvivorList))
    return Message(to_records(signature), reply_to=message)


@app.answers("query.unmask")
def _unmask(message: Message, session: SiteSession) -> Message:
    """Send the shares with which the masks are taken off the sum, as the last step of secure aggregation."""
    opened = _member(session).unmask(from_records(message.content, UnmaskRequest))
    return Message(to_records(opened), reply_to=message)


@app.answers("query.proportions")
def _proportions(message: Message, session: SiteSession) -> Message:
    """Answer with the label counts of the site, as far as its policy releases them."""
    store = session.store
    if not session.private or session.site.policy.release_proportions is ReleaseProportions.NONE:
        released = release_proportions(store, session.version_name)
        return Message(to_records(released), reply_to=message)
    # Imported here, as in every private answer: the accountants take seconds, and other runs need none.
    from client.budget import open_budget

    budget = open_budget(session)
    noised = budget.release(session.config.dp.release_scale)
    return Message(to_records(private_release(store, noised, budget.ledger.identifier)), reply_to=message)


@app.answers("train")
def _train(message: Message, session: SiteSession) -> Message:
    """Train the server's model on the site's bags and send its arrays back."""
    _refuse_in_clear(session)
    request = from_records(message.content, ModelUpdate)
    model, metrics, statement = _train_locally(session, request)
    update = _answer("train", session, request, metrics, model)
    reply = to_records(update, statement, transport=session.config.federation.transport)
    return Message(reply, reply_to=message)


@app.answers("train.masked")
def _train_masked(message: Message, session: SiteSession) -> Message:
    """Train like ``_train``, and send the update under masks that come off only in the sum of many sites."""
    # The bags are opened before anything is claimed, so that a site with bad rows can be asked again.
    store = session.store
    request = from_records(message.content, ModelUpdate)
    member = _member(session)
    # Before training: a second model for the same round must be refused before anything is computed from
    # it.
    member.receive(from_records(message.content, MaskRequest), request)
    if session.config.shares > 1:
        vector, metrics, statement = _masked_sum(session, request, member)
    else:
        model, metrics, statement = _train_locally(session, request)
        vector = member.mask(request.arrays, trainable_arrays(model))
    allowed = _answer("train.masked", session, request, metrics).metrics
    update = MaskedUpdate(
        session=member.session,
        round=request.round,
        sender=store.name,
        vector=vector,
        # The record of a masked update takes single numbers only.
        metrics={key: value for key, value in allowed.items() if not isinstance(value, tuple)},
    )
    return Message(to_records(update, statement), reply_to=message)


def _train_locally(
    session: SiteSession, request: ModelUpdate
) -> tuple[HierarchicalClassifier, dict[str, Metric], PrivacyStatement]:
    """Train one round on the site's bags, and return the model, all metrics and the privacy statement."""
    model = session.receive_model(request.arrays)
    if session.private:
        result, statement = _train_privately(session, model, request.round)
    else:
        _refuse_few_bags(session)
        result = train_round(model, session.store, session.config, request.round, session.seeds)
        statement = PrivacyStatement(site=session.site.name, round=request.round)
    return model, _metrics_of(result), statement


def _metrics_of(result: TrainingResult) -> dict[str, Metric]:
    return {"num-bags": result.bags, "num-images": result.images, "loss": result.loss}


def _masked_sum(
    session: SiteSession, request: ModelUpdate, member: "Member"
) -> tuple[Words, dict[str, Metric], PrivacyStatement]:
    """Reserve the cost of a step with shared noise, return the site's noised sum under masks, and confirm."""
    from client import budget, private_training  # see ``_train_privately``

    model = session.receive_model(request.arrays)
    own = budget.open_budget(session)
    reservation = own.reserve(request.round)
    steps, result = private_training.noised_sum_of_round(
        model, session.store, session.config, request.round, own.plan, member.steps_per_unit, session.seeds
    )
    vector = member.mask_sum(steps)
    return vector, _metrics_of(result), own.confirm(reservation, request.round)


def _train_privately(
    session: SiteSession, model: HierarchicalClassifier, round: int
) -> tuple[TrainingResult, PrivacyStatement]:
    """Reserve the round's cost, train, and confirm.

    The order keeps every spending on record: a site that stops in between has charged too much and not too
    little.
    """
    # Imported here: Opacus and the accountants take seconds, and a run without privacy needs neither.
    from client import budget, private_training

    own = budget.open_budget(session)
    seeds = session.seeds
    reservation = own.reserve(round)
    result = private_training.train_round_privately(
        model, session.store, session.config, round, own.plan, seeds
    )
    return result, own.confirm(reservation, round)


@app.answers("evaluate.bags")
def _evaluate_on_bags(message: Message, session: SiteSession) -> Message:
    """Compare the model's proportions with those of the held-back bags, with noise in a private run."""
    request = from_records(message.content, ModelUpdate)
    model = session.receive_model(request.arrays)
    if not session.private:
        metrics = evaluate_bags(model, session.store, session.config)
        return Message(to_records(_answer("evaluate.bags", session, request, metrics)), reply_to=message)
    metrics, statement = _evaluate_privately(session, model, request.round)
    update = _answer("evaluate.bags", session, request, metrics)
    return Message(to_records(update, statement), reply_to=message)


def _evaluate_privately(
    session: SiteSession, model: HierarchicalClassifier, round: int
) -> tuple[dict[str, Metric], PrivacyStatement]:
    """Reserve the cost of an evaluation on held-back bags, evaluate, add the noise, and confirm.

    Nothing is evaluated if the site's policy or the run wants no noised figures.
    """
    from client.budget import open_budget  # see ``_proportions``

    budget = open_budget(session)
    if not budget.plan.evaluation:
        return {}, budget.ledger.statement(round)
    reservation = budget.reserve_evaluation(round)
    sums = budget.plan.noised_evaluation(sum_distances(model, session.store, session.config), round)
    metrics: dict[str, Metric] = {"noised-bags-tv": tuple(sums.tolist()), "held-back-bags": session.held_back}
    return metrics, budget.confirm(reservation, round)


@app.answers("evaluate.test")
def _evaluate_on_test(message: Message, session: SiteSession) -> Message:
    """Compare the model's predictions with the labels of the site's test images, if it has any."""
    # Imported here so that training never loads the module that opens instance labels.
    from client.data.labelled import LabelledImages

    request = from_records(message.content, ModelUpdate)
    wanted = session.config.model
    test = LabelledImages.open(
        session.folder,
        wanted.image_size,
        features=wanted.feature_names,
        skip_bad=session.skip_bad,
        site=session.site,
    )
    model = session.receive_model(request.arrays)
    counts = evaluate_labelled(model, test, session.config) if test else {}
    metrics = suppress(counts, session.terms.minimum_cell_size)
    return Message(to_records(_answer("evaluate.test", session, request, metrics)), reply_to=message)


def _answer(
    kind: str,
    session: SiteSession,
    request: ModelUpdate,
    metrics: dict[str, Metric],
    model: HierarchicalClassifier | None = None,
) -> ModelUpdate:
    """Build a reply with the metrics that may leave, and with the trained arrays if a model is given."""
    allowed = may_leave(kind, session.config, session.store, session.terms)
    return ModelUpdate(
        sender=session.site.name,
        round=request.round,
        arrays=trainable_arrays(model) if model is not None else {},
        metrics={key: value for key, value in metrics.items() if key.partition(".")[0] in allowed},
    )


def _refuse_in_clear(session: SiteSession) -> None:
    """Refuse to send an update in clear if the run or the site's own policy demands masked ones.

    Raises:
        SecureAggregationRefused: one was asked for in clear.
    """
    if session.config.secure_aggregation.enabled or session.site.policy.secure_aggregation.required:
        raise SecureAggregationRefused("an update in clear was asked for, where only masked ones may leave")


def _refuse_few_bags(session: SiteSession) -> None:
    """Refuse, at a real site, a run whose rounds use so few bags that an update nearly shows one of them.

    It bounds only the division of a pass. A round that is a full pass trains on all bags that there are,
    however few: an exact update tells of its bags whatever their number, and a privacy budget or secure
    aggregation is what protects them.

    Raises:
        ConfigError: the run divides the bags into such parts.
    """
    parts, fewest = session.config.train.rounds_per_pass, session.terms.minimum_held_back_bags
    # A part of a pass is of no bag less than one, however small the site.
    if session.terms.strict and parts > 1 and max(1, session.training // parts) < fewest:
        raise ConfigError(f"train.rounds-per-pass = {parts} makes rounds of fewer than {fewest} bags")
