"""All hostile cases, by name."""

from hostile import adapter_cases, config_cases, data_cases, model_cases, pickle_cases, weights_cases
from hostile.case import Case


def all_cases() -> dict[str, Case]:
    """Every case by its name, which is its alone."""
    rooms = (weights_cases, adapter_cases, pickle_cases, config_cases, data_cases, model_cases)
    found = [case for room in rooms for case in room.cases()]
    named = {case.name: case for case in found}
    assert len(named) == len(found), [case.name for case in found if named[case.name] is not case]
    return named
