"""``router``: the command. Subcommands are imported when they are run, so none slows another down."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module, metadata
from typing import Final

import click

DISTRIBUTION: Final = "api-router"


@dataclass(frozen=True, slots=True, kw_only=True)
class Subcommand:
    """Where a subcommand lives: attribute ``name`` of ``module``."""

    name: str
    module: str
    summary: str


SUBCOMMANDS: Final = (
    Subcommand(name="up", module="cli.up", summary="Start everything on this machine."),
    Subcommand(name="policies", module="cli.policies", summary="Check routing policies."),
    Subcommand(name="keys", module="cli.keys", summary="Create, list and revoke API keys."),
    Subcommand(name="limits", module="cli.limits", summary="Show what is used of limits, or reset it."),
    Subcommand(name="budget", module="cli.budget", summary="Show and set budgets."),
    Subcommand(name="audit", module="cli.audit", summary="List audit events, explain requests."),
    Subcommand(name="usage", module="cli.usage", summary="Sum up usage, reconcile the counts."),
    Subcommand(name="status", module="cli.status", summary="Show the state of a running router."),
)

USER_ERRORS: Final[Mapping[str, str]] = {"gateway.settings": "SettingsError", "policies.load": "PolicyRejected"}
"""Exceptions a user can cause and mend, by the module that defines them."""


class LazyGroup(click.Group):
    """A group whose help does not import its commands."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names, in the order of the help."""
        return [subcommand.name for subcommand in SUBCOMMANDS]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one command."""
        subcommand = next((s for s in SUBCOMMANDS if s.name == cmd_name), None)
        if subcommand is None:
            return None
        try:
            module = import_module(subcommand.module)
        except ModuleNotFoundError as error:
            if error.name != subcommand.module:
                raise
            raise click.UsageError(f"{cmd_name} is not part of this installation") from error
        command: click.Command = getattr(module, subcommand.name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of commands, from the table above."""
        with formatter.section("Commands"):
            formatter.write_dl([(s.name, s.summary) for s in SUBCOMMANDS])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(metadata.version(DISTRIBUTION), prog_name="router")
def router() -> None:
    """One entry point for inference requests: run it, check its policies, hand out its keys."""


def main() -> None:
    """Run the command; a user's mistake is told without a traceback and exits with 2."""
    try:
        router(prog_name="router")
    except _user_errors() as error:
        click.echo(f"router: {error}", err=True)
        sys.exit(2)


def _user_errors() -> tuple[type[Exception], ...]:
    """Of the errors above, those whose module was imported: no other can have been raised."""
    return tuple(getattr(sys.modules[module], name) for module, name in USER_ERRORS.items() if module in sys.modules)


if __name__ == "__main__":
    main()
