"""The short causal convolution over time, one filter per channel, with its state: for sequences, chunks, single tokens and packed rows."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .packing import check_input, sequence_of, sequences


class ShortConvolution(nn.Module):
    """y_t = bias + Σ_j weight[:, j] · x_{t−width+1+j}, j < width; what precedes a sequence is its state, or zero.

    x [B T dim] → y [B T dim] and, where asked, the state [B dim width−1]: the last width−1 inputs of each sequence, oldest first. With
    cu_seqlens (B = 1) nothing crosses from one sequence into the next and the state is [N dim width−1]. Starts from
    U(−1/√width, 1/√width), as `torch.nn.Conv1d`. The activation after it is the layer's.
    """

    def __init__(self, dim: int, width: int = 4, *, bias: bool = False):
        super().__init__()
        if width < 2:
            raise ValueError(f"width must be at least 2; got {width}")
        self.dim, self.width = dim, width
        self.weight = nn.Parameter(torch.empty(dim, width))
        self.bias = nn.Parameter(torch.empty(dim)) if bias else None
        self.conv_probe: Callable | None = None  # stands in for `_run`, which it is given first; set by `linattn.probe`
        self.reset_parameters()

    def reset_parameters(self):
        bound = 1 / math.sqrt(self.width)
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def extra_repr(self) -> str:
        return f"{self.dim}, width={self.width}, bias={self.bias is not None}"

    def forward(
        self, x: Tensor, state: Tensor | None = None, cu_seqlens: Tensor | None = None, *, return_state: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        if (probe := self.conv_probe) is not None:
            return probe(self._run, x, state, cu_seqlens, return_state=return_state)
        return self._run(x, state, cu_seqlens, return_state=return_state)

    def _run(self, x, state, cu_seqlens, *, return_state):
        check_input(x, self.dim, cu_seqlens)
        wanted = (sequences(x, cu_seqlens), self.dim, self.width - 1)
        if state is not None and state.shape != wanted:
            raise ValueError(f"the convolution's state must be [B dim width-1] = {wanted}; got {tuple(state.shape)}")
        before = x.new_zeros(wanted[0], self.width - 1, self.dim) if state is None else state.mT.to(x.dtype)
        if cu_seqlens is None:
            row = torch.cat([before, x], 1)
            y, after = self._filter(row, x.shape[1]), row[:, x.shape[1] :]
        else:
            y, after = self._packed(x[0], before, cu_seqlens.long())
        # the state is a copy of its own: a view would keep the whole input alive
        return y, after.mT.clone(memory_format=torch.contiguous_format) if return_state else None

    def _filter(self, x: Tensor, T: int) -> Tensor:
        """x [B width−1+T dim] → [B T dim]: width shifted products, faster here than a grouped conv1d, and fused by torch.compile."""
        weight = self.weight.to(x.dtype)
        y = x[:, :T] * weight[:, 0]
        for j in range(1, self.width):
            y = torch.addcmul(y, x[:, j : j + T], weight[:, j])
        return y if self.bias is None else y + self.bias.to(x.dtype)

    def _packed(self, x: Tensor, before: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
        """x [T dim], before [N width−1 dim]: lay each sequence behind its own past, filter the whole row, and take out what was asked."""
        T, N, past = x.shape[0], before.shape[0], before.shape[1]
        token = torch.arange(T, device=x.device) + (sequence_of(cu_seqlens, T) + 1) * past
        shift = torch.arange(N, device=x.device) * past + torch.arange(past, device=x.device)[:, None]
        first, last = (cu_seqlens[:-1] + shift).mT.flatten(), (cu_seqlens[1:] + shift).mT.flatten()
        row = x.new_zeros(T + N * past, self.dim)
        row = row.index_copy(0, torch.cat([first, token]), torch.cat([before.flatten(0, 1), x]))
        y = self._filter(row[None], T + (N - 1) * past)
        return y[:, token - past], row[last].unflatten(0, (N, past))
