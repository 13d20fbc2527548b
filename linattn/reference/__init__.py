"""The maths, in torch alone: `scan` token by token (the oracle), `chunked` chunk by chunk (the text every kernel is read against)."""

from .scan import scan

__all__ = ["scan"]
