"""The command line: options become arguments, errors become one line. Nothing is computed here, nothing heavy imported before its use."""

from . import training, using, machine  # noqa: F401, I001 - each adds its commands to the app, in this order
from .app import VARIANTS, app

__all__ = ["VARIANTS", "app", "main"]


def main() -> None:
    app()
