"""Every refusal of the config names the field, says what was given and what is allowed."""

import dataclasses

import pytest

from hylorada import HyLoRADAConfig
from hylorada.config import _CHOICES

FIELDS = {field.name: field for field in dataclasses.fields(HyLoRADAConfig)}
# of every kind of value something that a field cannot be
STRANGE = [None, "", "no such thing", -1, -0.5, 0, 1.5, float("nan"), float("inf"), True, [], {}, object(), b"8", 1j]


def refusals():
    for name in FIELDS:
        for value in STRANGE:
            try:
                HyLoRADAConfig(**{name: value})
            except Exception as error:
                yield pytest.param(name, value, error, id=f"{name}={value!r:.20}")


REFUSALS = list(refusals())


def test_every_field_refuses_something():
    assert {case.values[0] for case in REFUSALS} == set(FIELDS)


@pytest.mark.parametrize(("name", "value", "error"), REFUSALS)
def test_a_refusal_names_the_field_what_was_given_and_what_is_allowed(name, value, error):
    message = str(error)
    assert type(error) in (TypeError, ValueError)
    assert name in message
    given = [repr(value), str(float(value))] if isinstance(value, (int, float)) else [repr(value)]
    assert any(text in message for text in given)
    if name in _CHOICES:
        assert all(repr(choice) in message for choice in _CHOICES[name])
    else:
        kinds = (
            "a number",
            "a whole number",
            "at least",
            "positive",
            "in [0, 1)",
            "True or False",
            "names",
            "needed",
            "exceed",
            "name such",
        )
        assert any(kind in message for kind in kinds)


@pytest.mark.parametrize("name", FIELDS)
def test_an_accepted_value_comes_back(name):
    value = getattr(HyLoRADAConfig(), name)
    assert getattr(HyLoRADAConfig(**{name: value}), name) == value
