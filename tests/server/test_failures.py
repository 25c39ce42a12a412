"""One table from error to status, and it is complete."""

import inspect

import pytest

from minigpt4_runtime import errors
from minigpt4_runtime.server.failures import STATUSES, Failure, failure_of

ALL = [
    cls
    for _, cls in inspect.getmembers(errors, inspect.isclass)
    if cls.__module__ == errors.__name__
]


def test_the_table_has_every_error_and_no_other():
    assert set(STATUSES) == set(ALL)


@pytest.mark.parametrize("cls", ALL)
def test_an_error_has_its_own_row(cls):
    arguments = (5, 4) if cls is errors.PromptTooLongError else ("What is wrong.",)
    error = cls(*arguments)
    failure = failure_of(error)
    assert (failure.status, failure.kind, failure.code) == STATUSES[cls]
    # What an error of the server's own quotes is for its log.
    assert (failure.message == str(error)) == (failure.status != 500)
    assert (failure.status < 500) == issubclass(cls, (errors.RequestError, errors.ConfigError))
    assert set(failure.as_body()["error"]) == {"message", "type", "param", "code"}


def test_what_a_prompt_is_refused_for_stands_in_its_messages():
    assert failure_of(errors.ImageError("It is no picture.")).param == "messages"
    assert failure_of(errors.PromptTooLongError(5, 4)).param == "messages"
    assert failure_of(errors.RequestError("The engine has ended.")).param is None


def test_an_error_of_a_later_kind_is_as_bad_as_its_parent():
    class OtherError(errors.ImageError):
        pass

    assert failure_of(OtherError("x")).status == 400


def test_what_nobody_raised_on_purpose_is_not_quoted():
    failure = failure_of(ValueError("the prompt was: my secret"))
    assert failure.status == 500
    assert "secret" not in failure.message


def test_a_refusal_is_its_own_failure():
    assert failure_of(Failure(418, "No.", param="x")).as_body()["error"]["param"] == "x"
