"""Log lines hold numbers and named words, and no path, patient id or label, whatever is logged."""

import json
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.text import _PATH, _WITHHELD, JsonLines

CANARIES = ("patient-4711", "/secret/path", "melanoma")


def line(message: object, *args: object, error: BaseException | None = None) -> dict:
    trace = (type(error), error, error.__traceback__) if error else None
    record = logging.LogRecord("fedbags.test", logging.WARNING, __file__, 1, message, args, trace)
    text = JsonLines().format(record)
    assert "\n" not in text
    return json.loads(text)


def test_numbers_and_named_words_are_said() -> None:
    said = line("round %(round)d: %(site)s left", {"round": 3, "site": "hospital-1"})
    assert said["message"] == "round 3: hospital-1 left"
    assert (said["round"], said["site"], said["level"], said["logger"]) == (
        3, "hospital-1", "warning", "fedbags.test",
    )  # fmt: skip
    assert line("%d of %d, loss %s", 2, 3, None)["message"] == "2 of 3, loss None"
    assert said["time"].endswith("+00:00")


def test_words_without_a_name_are_withheld() -> None:
    assert line("bag %s is bad", "patient-4711")["message"] == f"bag {_WITHHELD} is bad"
    assert line("%(patient)s", {"patient": "patient-4711"})["patient"] == _WITHHELD
    assert line("%d bags", "patient-4711")["message"] == "%d bags"


def test_a_path_is_withheld_under_any_name() -> None:
    said = line("%(reason)s", {"reason": "cannot read /secret/path/patient-4711.png: denied"})
    assert said["message"] == f"cannot read {_PATH} denied"


def test_an_exception_is_its_class_and_place() -> None:
    try:
        json.loads("/secret/path patient-4711 melanoma")
    except ValueError as error:
        said = line("it failed", error=error)
    assert said["exception"] == "JSONDecodeError"
    assert not any(canary in json.dumps(said) for canary in CANARIES)


@pytest.mark.parametrize("message", [ValueError("/secret/path"), {"patient": "patient-4711"}])
def test_an_object_logged_in_place_of_a_message_is_its_class(message: object) -> None:
    assert line(message)["message"] == type(message).__name__


@given(
    st.lists(st.sampled_from([*CANARIES, 3, 0.5, None]), max_size=3),
    st.dictionaries(st.sampled_from(["patient", "label", "bag"]), st.sampled_from(CANARIES), max_size=3),
)
def test_no_planted_identifier_is_ever_said(values: list, named: dict) -> None:
    texts = [
        json.dumps(line(" ".join(["%s"] * len(values)) or "nothing", *values)),
        json.dumps(line(" ".join(f"%({key})s" for key in named) or "nothing", named)),
    ]
    assert not any(canary in text for canary in CANARIES for text in texts)
