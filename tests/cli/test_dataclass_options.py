"""Command-line options read off dataclasses: names, types, defaults and help are the dataclass's own."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import click
import pytest
from click.testing import CliRunner

from equipoise.cli.dataclass_options import attribute_help, options_of, take
from equipoise.options import EvalOptions, PlanOptions, ProfileOptions
from equipoise.pipeline.balance import BalanceOptions


@dataclass(frozen=True)
class Sample:
    """A sample.

    Attributes:
        first_name: what it is called,
            on two lines, with `quotes`.
        size: how much.
        kind: which.
        flag: whether.
        maybe: perhaps.
    """

    first_name: str = "x"
    size: float = 0.5
    kind: Literal["a", "b"] = "b"
    flag: bool = False
    maybe: int | None = None


@click.command()
@options_of(Sample)
def sample(**values: Any) -> None:
    """Print the sample."""
    click.echo(repr(take(Sample, values)))
    assert not values


def run(*arguments: str) -> Any:
    return CliRunner().invoke(sample, list(arguments))


def test_defaults_are_the_dataclass():
    assert run().output.strip() == repr(Sample())


def test_every_field_can_be_given():
    done = run("--first-name", "y", "--size", "2", "--kind", "a", "--flag", "--maybe", "3")
    assert done.output.strip() == repr(Sample("y", 2.0, "a", True, 3))
    assert run("--no-flag").output.strip() == repr(Sample())


@pytest.mark.parametrize("arguments", [("--size", "big"), ("--kind", "c"), ("--maybe", "1.5"), ("--other", "1")])
def test_wrong_values_are_usage_errors(arguments: tuple[str, ...]):
    assert run(*arguments).exit_code == 2


def test_help_is_the_docstring():
    shown = " ".join(run("--help").output.split())
    assert "what it is called, on two lines, with quotes." in shown
    assert "[default: 0.5]" in shown
    assert "--kind [a|b]" in shown
    assert "perhaps. --help" in shown  # no default is shown where there is none


def test_fields_can_be_left_out():
    @click.command()
    @options_of(Sample, leave_out=("size",))
    def less(**values: Any) -> None:
        click.echo(repr(take(Sample, values)))

    assert CliRunner().invoke(less, ["--size", "1"]).exit_code == 2
    assert CliRunner().invoke(less, []).output.strip() == repr(Sample())


@pytest.mark.parametrize("kind", [ProfileOptions, PlanOptions, EvalOptions, BalanceOptions])
def test_every_option_has_help(kind: type):
    assert set(attribute_help(kind)) == {field.name for field in dataclasses.fields(kind)}
