"""Sampling text from a model with a state: a prefill, then one token at a time, in memory that does not grow with the text."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

PREFILL_CHUNK = 1024  # tokens per prefill call: bounds the activations, costs nothing in speed from a few hundred on


def generate(
    model,
    prompt: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_tokens: Sequence[int] = (),
    seed: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """prompt [B T] followed by all that `stream` yields: [B T+n], n <= max_new_tokens. A row that stopped early repeats its stop token."""
    new = stream(
        model, prompt, max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p,
        stop_tokens=stop_tokens, seed=seed, generator=generator,
    )  # fmt: skip
    return torch.cat([prompt, *(token[:, None] for token in new)], 1)


def stream(
    model,
    prompt: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_tokens: Sequence[int] = (),
    seed: int | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """Yield the next token [B] of each row, again and again, until max_new_tokens are there or every row has yielded a stop token.

    temperature  0: the likeliest token; else logits are divided by it
    top_k        sample among the k likeliest tokens
    top_p        sample among the fewest likeliest tokens whose probabilities reach p together; after top_k where both are given
    seed         of this call's own generator; or give a `generator` on the model's device. Neither: torch's global one

    ValueError for every argument out of range, before anything runs.
    """
    _check(prompt, max_new_tokens, temperature, top_k, top_p, seed, generator, model.config.vocab_size, stop_tokens)
    if seed is not None:
        generator = torch.Generator(prompt.device).manual_seed(seed)
    return _stream(model, prompt, max_new_tokens, temperature, top_k, top_p, tuple(stop_tokens), generator)


@torch.no_grad()
def _stream(model, prompt, max_new_tokens, temperature, top_k, top_p, stop_tokens, generator):
    logits, state = prefill(model, prompt) if max_new_tokens else (None, None)
    stopped = torch.zeros(prompt.shape[0], dtype=torch.bool, device=prompt.device)
    stops, token = torch.tensor(stop_tokens, device=prompt.device, dtype=prompt.dtype), prompt[:, -1]
    for i in range(max_new_tokens):
        if i:
            logits, state = decode(model, token, state)
        token = torch.where(stopped, token, sample(logits, temperature, top_k, top_p, generator).to(prompt.dtype))
        yield token
        if stop_tokens:
            stopped = stopped | torch.isin(token, stops)
            if stopped.all():
                return


@torch.no_grad()
def prefill(model, tokens: Tensor, state=None, *, chunk: int = PREFILL_CHUNK) -> tuple[Tensor, tuple]:
    """tokens [B T], T >= 1, after `state` → logits of the last one [B vocab] and the state. `chunk` tokens go through the model at once."""
    if tokens.ndim != 2 or tokens.shape[1] < 1 or chunk < 1:
        raise ValueError(f"tokens must be [B T] with T >= 1, and chunk at least 1; got {tuple(tokens.shape)} and chunk={chunk}")
    for part in tokens.split(chunk, 1):
        x, state = model.features(part, state, return_state=True)
    return model.logits(x[:, -1]), state


@torch.no_grad()
def decode(model, token: Tensor, state) -> tuple[Tensor, tuple]:
    """One token [B] after `state` → logits [B vocab] and the state after it."""
    logits, state = model(token[:, None], state)
    return logits[:, 0], state


def sample(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator | None) -> Tensor:
    """logits [B vocab] → tokens [B]."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k is not None:
        logits = keep_top_k(logits, top_k)
    if top_p is not None:
        logits = keep_top_p(logits, top_p)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """All but exactly the k largest of each row become −inf; of equal ones, any."""
    best = logits.topk(min(k, logits.shape[-1]), -1)
    return torch.full_like(logits, -torch.inf).scatter(-1, best.indices, best.values)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """All but the fewest largest of each row whose probabilities reach p together become −inf. At least one stays."""
    values, order = logits.sort(-1, descending=True)
    probability = values.softmax(-1)
    before = probability.cumsum(-1) - probability  # what the likelier ones have reached: the first has 0
    return torch.full_like(logits, -torch.inf).scatter(-1, order, values.masked_fill(before >= p, -torch.inf))


def _check(prompt, max_new_tokens, temperature, top_k, top_p, seed, generator, vocab_size, stop_tokens):
    if prompt.ndim != 2 or prompt.shape[1] < 1 or prompt.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"prompt must be [B T] int64 or int32 with T >= 1; got {prompt.dtype} {tuple(prompt.shape)}")
    if not isinstance(max_new_tokens, int) or max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be an integer, at least 0; got {max_new_tokens!r}")
    if not temperature >= 0:
        raise ValueError(f"temperature must be at least 0; got {temperature}")
    if top_k is not None and (not isinstance(top_k, int) or top_k < 1):
        raise ValueError(f"top_k must be an integer, at least 1, or None; got {top_k!r}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must lie in (0, 1], or be None; got {top_p}")
    if seed is not None and generator is not None:
        raise ValueError("give seed or generator, not both")
    if outside := [token for token in stop_tokens if not 0 <= token < vocab_size]:
        raise ValueError(f"stop_tokens must lie in [0, vocab_size={vocab_size}); got {outside}")
