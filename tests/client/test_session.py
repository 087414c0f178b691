"""A message opens one session, in which the run's configuration and site.toml are read once."""

from pathlib import Path
from typing import Any

import pytest

from client.door import QUESTIONS
from client.egress import guard
from client.session import SiteSession
from client.site import SiteConfig
from common.config import RunConfig
from common.errors import UserError

from .asking import PRIVATE, Node, with_policy

MASKED: dict[str, Any] = {"secure-aggregation.enabled": True}


@pytest.mark.parametrize("settings", [{}, PRIVATE, MASKED], ids=["clear", "private", "masked"])
@pytest.mark.parametrize("kind", QUESTIONS)
def test_configuration_and_site_file_are_read_once_a_message(
    kind: str, settings: dict[str, Any], sites_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    budget = {"budget": {"epsilon": 50.0, "delta": 1e-3}} if settings is PRIVATE else {}
    node = Node(with_policy(sites_dir / "hospital-1", tmp_path / "site", **budget))
    message, context = node.message(kind, node.request(kind, settings)), node.context(settings)
    read: list[str] = []

    def counted(right: Any) -> Any:
        def count(*given: Any) -> Any:
            read.append(right.__qualname__)
            return right(*given)

        return count

    monkeypatch.setattr(RunConfig, "from_flat", counted(RunConfig.from_flat))
    monkeypatch.setattr(SiteConfig, "load", counted(SiteConfig.load))
    answered = []

    def handler(message: Any, session: SiteSession) -> Any:
        from client.app import app

        answered.append(session)
        return app.handlers[kind](message, session)

    guard(message, context, handler)
    assert answered
    assert sorted(read) == ["RunConfig.from_flat", "SiteConfig.load"]


def test_a_plan_that_was_made_before_the_run_is_the_one_that_the_site_trains_with(
    sites_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from client import budget
    from client.data.bags import BagStore
    from deploy.simulation.simulate import _check_plan

    site = with_policy(sites_dir / "hospital-1", tmp_path / "site", **{"held-back": 0.4})
    node = Node(site, simulated=True)
    session = SiteSession.open(node.context(PRIVATE))
    _check_plan(session.config, BagStore.open(site, session.config.model.image_size), site)

    def search(*asked: Any, **more: Any) -> float:
        raise UserError("searched for a second time")

    monkeypatch.setattr(budget, "calibrate", search)
    assert budget._plan_of(session).number_of_bags == session.training
