import pickle

import pytest

from baton.core import errors
from baton.core.errors import (
    BatonError,
    InvalidConfig,
    InvalidRequest,
    Overloaded,
    all_errors,
    show,
)


def example(cls: type[BatonError]) -> BatonError:
    if issubclass(cls, (InvalidRequest, InvalidConfig)):
        return cls("top_p", -1.5, "over 0, up to 1")
    return Overloaded("full", 2.5) if cls is Overloaded else cls("it went wrong")


def test_every_class_is_found_under_its_own_code():
    classes = {
        value
        for value in vars(errors).values()
        if isinstance(value, type) and issubclass(value, BatonError)
    }
    public = {cls for cls in classes if not cls.__name__.startswith("_")} - {BatonError}
    assert set(all_errors().values()) == public
    assert len(all_errors()) == len(public)


def test_the_tree_in_the_docstring_is_the_tree():
    drawn = [line.split("──")[1].split()[0] for line in errors.__doc__.splitlines() if "──" in line]
    assert sorted(drawn) == sorted(cls.__name__ for cls in all_errors().values())


def test_a_code_used_twice_is_a_bug():
    class Double(BatonError):
        __module__ = errors.__name__
        code = "overloaded"

    try:
        with pytest.raises(AssertionError, match="used twice"):
            all_errors()
    finally:
        Double.__name__ = "_Double"  # hidden: the class itself lives until it is collected


def test_a_subclass_that_a_library_makes_is_none_of_ours():
    """As Ray does, to raise what an actor has raised both as its own error and as ours."""
    dual = type("RayTaskError(Overloaded)", (RuntimeError, Overloaded), {})
    assert all_errors()["overloaded"] is Overloaded
    assert dual in Overloaded.__subclasses__()


@pytest.mark.parametrize("cls", list(all_errors().values()))
def test_errors_survive_pickling(cls: type[BatonError]):
    error = example(cls)
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is cls
    assert back.message == str(back) == str(error)
    assert vars(back) == vars(error)


@pytest.mark.parametrize("cls", list(all_errors().values()))
def test_codes_and_statuses_make_sense(cls: type[BatonError]):
    assert cls.code.replace("_", "").isalpha()
    assert 400 <= cls.http_status <= 599
    assert cls.retryable == (cls.http_status in {429, 503, 504})


def test_a_refusal_names_field_value_and_what_is_allowed():
    error = InvalidRequest("top_p", -1.5, "over 0, up to 1")
    assert str(error) == "top_p: -1.5 is not allowed; allowed: over 0, up to 1"


@pytest.mark.parametrize("length", [10, 118, 119, 5000])
def test_a_long_value_is_cut_to_a_line(length: int):
    shown = show("x" * length)
    assert len(shown) <= 120
    assert shown == repr("x" * length) or shown.endswith("…")
    assert (length <= 118) == (shown == repr("x" * length))
