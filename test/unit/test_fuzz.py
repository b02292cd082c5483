"""A slice of ``make fuzz`` against the checks by themselves, and that its properties can fail."""

from __future__ import annotations

from random import Random

import pytest
from blocklora_testing.fuzz import validators
from blocklora_testing.fuzz.validators import Validators

CASES = 400


@pytest.fixture(scope="module")
def checks(tmp_path_factory: pytest.TempPathFactory) -> Validators:
    return Validators(tmp_path_factory.mktemp("fuzz"))


def run(checks: Validators, name: str, cases: int) -> None:
    rng = Random(f"0/{name}")
    for _ in range(cases):
        checks.properties[name][1](rng)


@pytest.mark.parametrize(
    "name",
    [
        "model names",
        "names of folders",
        "paths to load",
        "extra keys",
        "salted tokens",
        "adapter_config.json",
        "adapter_config.json, files",
        "headers of weights",
        "token ids",
        "values of requests",
    ],
)
def test_random_input_is_understood_or_refused(checks: Validators, name: str) -> None:
    run(checks, name, CASES)


def test_all_properties_are_tested(checks: Validators) -> None:
    (mark,) = test_random_input_is_understood_or_refused.pytestmark
    assert mark.args[1] == list(checks.properties)


@pytest.mark.parametrize(
    ("name", "broken", "wrong"),
    [
        ("model names", "resolve_model", lambda model, base, default, loaded: None),
        ("model names", "resolve_model", lambda model, base, default, loaded: next(iter(loaded), "sql")),
        ("model names", "reason_not_to_name", lambda name, base, default: None),
        ("adapter_config.json", "parse_config", lambda name, raw: raw["r"]),
    ],
)
def test_a_broken_check_is_found(checks: Validators, monkeypatch, name: str, broken: str, wrong) -> None:
    monkeypatch.setattr(validators, broken, wrong)
    with pytest.raises((AssertionError, KeyError, AttributeError)):
        run(checks, name, CASES)


def test_a_path_out_of_the_root_is_found(checks: Validators, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the root, adapters beside it load: the property sees that."""
    read = validators.read_adapter
    monkeypatch.setattr(
        validators, "read_adapter", lambda name, path, spec, rank, root: read(name, path, spec, rank, None)
    )
    with pytest.raises(AssertionError, match="is not below"):
        run(checks, "paths to load", 20 * CASES)
