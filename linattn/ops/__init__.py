"""Tensors in, tensors out: the operator for sequences, its one-token step, and the backends behind them."""

from .backends import BY_NAME, Refusal, why_not
from .linear_attention import Record, State, linear_attention, step

BACKENDS = tuple(BY_NAME)

__all__ = ["BACKENDS", "Record", "Refusal", "State", "linear_attention", "step", "why_not"]
