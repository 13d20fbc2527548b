"""Leaf modules that start from normal(0, std). Each draws its own weights: DeepSpeed's zero.Init leaves nothing to draw from above."""

import math

from torch import nn

STD = 0.02  # GPT-2, Llama


class Linear(nn.Linear):
    """`torch.nn.Linear` with weights from normal(0, std), bias 0, and no bias unless asked."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool = False, std: float = STD):
        self.std = std  # before the base class, which draws
        super().__init__(in_features, out_features, bias=bias)

    def reset_parameters(self):
        nn.init.normal_(self.weight, std=self.std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class Embedding(nn.Embedding):
    """`torch.nn.Embedding` with weights from normal(0, 0.02)."""

    def reset_parameters(self):
        nn.init.normal_(self.weight, std=STD)


def without_weight_decay(parameter: nn.Parameter) -> nn.Parameter:
    """`parameter`, marked as one that an optimizer must not pull towards zero."""
    parameter._no_weight_decay = True  # type: ignore[attr-defined]
    return parameter


def residual_std(num_layers: int) -> float:
    """Std of a projection that writes to the residual stream, which 2 · num_layers of them add up in (GPT-2)."""
    return STD / math.sqrt(2 * num_layers)
