"""What every command shares: the app, errors of one line, options that several have."""

import sys
from functools import partial
from typing import Annotated

import typer
from rich.console import Console
from typer.core import TyperGroup


class OneLineErrors(TyperGroup):
    """What a user can set right is one line on stderr and exit code 2; `--traceback` shows where it came from."""

    def invoke(self, ctx):
        from ..build import CannotBuild

        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # `| head` is no error of ours
            raise
        except (ValueError, OSError, FloatingPointError, CannotBuild) as error:
            if ctx.params.get("traceback"):
                raise
            Console(stderr=True).print(f"[bold red]error:[/] {escaped(error) or type(error).__name__}", highlight=False, soft_wrap=True)
            raise typer.Exit(2) from None


app = typer.Typer(
    cls=OneLineErrors, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich",
    help="Linear attention on one operator: train, generate, measure.", context_settings={"help_option_names": ["-h", "--help"]},
)  # fmt: skip

MODEL, DATA, OPTIMISATION, MACHINE, RUN, SAMPLING = (
    partial(typer.Option, rich_help_panel=panel) for panel in ("Model", "Data", "Optimisation", "Machine", "Run", "Sampling")
)
VARIANTS = (
    "linear, retnet, lightning, mamba2, gla, delta, gated_delta, kda, lion_lit, lion_d, lion_s, lion_lit_mlm, lion_d_mlm, lion_s_mlm, "
    "taylorshift, ecoformer, molformer, sse_gla, sse_gdn or softmax"
)
Preset = Annotated[str | None, MODEL(help="Size: tiny, small, base, 350m or 1b.", show_default="tiny")]
Variant = Annotated[str | None, MODEL(help=f"Attention: {VARIANTS}.", show_default="gla")]
Threads = Annotated[int, MACHINE(help="CPU threads; 0: torch's default.")]
Device = Annotated[str, MACHINE(help="auto, cpu, cuda, cuda:1, …")]
Backend = Annotated[str, MACHINE(help="Backend of the operator; `linattn info` lists them.")]


@app.callback()
def root(
    traceback: Annotated[bool, typer.Option("--traceback", help="Show the Python traceback of an error.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
    local_rank: Annotated[int, typer.Option("--local_rank", hidden=True, help="Of the deepspeed launcher, which sets LOCAL_RANK too.")] = 0,
) -> None:
    if version:
        from .. import __version__

        print(__version__)
        raise typer.Exit


def escaped(text: object) -> str:
    from rich.markup import escape

    return escape(str(text))


def say_aside(message: str) -> None:
    print(message, file=sys.stderr)
