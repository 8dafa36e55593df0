"""The command `rnnfast`: info, selftest, bench. One file a command; none is imported before it is called."""

from __future__ import annotations

import importlib

import click

INTERRUPTED = 130  # the exit status after Ctrl-C, as a shell gives it: 128 + SIGINT

# command -> (module, what it does); the line is here so that --help imports nothing
_COMMANDS = {
    "info": ("info", "What this installation can do on this machine."),
    "selftest": ("selftest", "Check every kernel on this machine against the reference."),
    "bench": ("bench", "Check, then time rnnfast and its rivals in turn."),
}


class _Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        command: click.Command = importlib.import_module(f".{_COMMANDS[cmd_name][0]}", __name__).command
        return command

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:  # click alone would make it 1, that of a failure
            click.echo("interrupted", err=True)
            ctx.exit(INTERRUPTED)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in _COMMANDS.items()])


def _print_version(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted:
        from .. import __version__

        click.echo(f"rnnfast {__version__}")
        ctx.exit()


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_version, help="Show it.")
def main() -> None:
    """Fused recurrent networks: vanilla RNN, LSTM and GRU, forward and backward through time."""
