"""Probes beside TransformerLens on one gated-delta model, with the same weights: `python -m bench probes`.

The model is a Qwen3.5 of linear attention alone, trained on MQAR as in docs/probes.md. TransformerLens wraps it as it is; for linattn its
linear-attention module is replaced by `LinearAttention` with that module's weights. Errors are against the same model in float64, token
by token. Time and memory are each of one process: a forward with capture, one state from the middle, one row of implicit attention.
"""

import ctypes
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import linattn
from linattn import LinearAttention

from .machine import ROOT, facts, git, versions
from .memory import CLEAR, _resident

PAIRS, WORDS, STEPS, TESTS = 8, 32, 600, 256
AT = 2 * PAIRS - 1  # the state after it has seen the pairs and no question
ROWS = list(range(2 * PAIRS, 4 * PAIRS, 2))
LENGTHS = (256, 1024, 4096)
SIDES = ("linattn", "transformer_lens")


class Ours(nn.Module):
    """`LinearAttention` in the place of Qwen3.5's gated delta net, with its weights."""

    def __init__(self, theirs: Any, backend: str = "auto"):
        super().__init__()
        dim, heads = theirs.hidden_size, theirs.num_v_heads
        self.layer = LinearAttention(
            dim, heads, "gated_delta", expand_k=theirs.key_dim / dim, expand_v=theirs.value_dim / dim, norm_eps=1e-6, backend=backend
        )
        self.read(theirs)

    def pairs(self, theirs: Any):
        """Our parameters beside views of theirs."""
        ours, K = self.layer, theirs.key_dim
        qkv: list[nn.Module | None] = [ours.q_proj, ours.k_proj, ours.v_proj]
        for part, weight in zip(qkv, theirs.in_proj_qkv.weight.split([K, K, theirs.value_dim]), strict=True):
            yield part.weight, weight
        yield ours.conv.weight, theirs.conv1d.weight[:, 0]
        gates = (ours.mixer.b_proj, theirs.in_proj_b), (ours.mixer.decay.proj, theirs.in_proj_a), (ours.g_proj, theirs.in_proj_z)
        for mine, other in (*gates, (ours.norm, theirs.norm), (ours.o_proj, theirs.out_proj)):
            yield mine.weight, other.weight
        yield ours.mixer.decay.step.A_log, theirs.A_log
        yield ours.mixer.decay.step.dt_bias, theirs.dt_bias

    @torch.no_grad()
    def read(self, theirs: Any) -> None:
        for mine, other in self.pairs(theirs):
            mine.copy_(other)

    @torch.no_grad()
    def write(self, theirs: Any) -> None:
        for mine, other in self.pairs(theirs):
            other.copy_(mine)

    def forward(self, hidden_states: Tensor, **_: Any) -> Tensor:
        return self.layer(hidden_states)[0]


def host(heads: int = 1, width: int = 32) -> Any:
    """The model, as drawn by seed 0."""
    from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(
        vocab_size=2 * WORDS + 1, hidden_size=2 * width * heads, intermediate_size=16, num_hidden_layers=1,
        layer_types=["linear_attention"], num_attention_heads=2, num_key_value_heads=1, head_dim=16,
        linear_num_key_heads=heads, linear_num_value_heads=heads,
        linear_key_head_dim=width, linear_value_head_dim=width, use_cache=False,
    )  # fmt: skip
    return Qwen3_5ForCausalLM(Qwen3_5TextConfig(**sizes)).eval()


def with_ours(model: Any, backend: str = "auto") -> Any:
    """A copy of `model` with our layer in it."""
    found = host(model.config.linear_num_value_heads, model.config.linear_value_head_dim)
    found.load_state_dict(model.state_dict())
    found.model.layers[0].linear_attn = Ours(model.model.layers[0].linear_attn, backend)
    return found.eval()


def bridged(model: Any) -> Any:
    """`model`, wrapped by TransformerLens."""
    try:
        from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
    except ModuleNotFoundError:
        raise ValueError(
            "this benchmark needs TransformerLens 4.3, in an environment of its own: pip install 'transformer-lens>=4.3,<5'"
        ) from None
    return build_bridge_from_module(model, "Qwen3_5ForCausalLM", hf_config=model.config)


def draw(n: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """key value key value …, then key fill key fill …: tokens [n 32], values [n 8], and which pair is asked for when."""
    generator = torch.Generator().manual_seed(seed)
    some = lambda width: torch.rand(n, width, generator=generator).argsort(1)[:, :PAIRS]
    keys, order = some(WORDS), some(PAIRS)
    values = WORDS + torch.randint(WORDS, (n, PAIRS), generator=generator)
    asked = keys.gather(1, order)
    questions = torch.stack([asked, torch.full_like(asked, 2 * WORDS)], -1)
    return torch.cat([torch.stack([keys, values], -1), questions], 1).flatten(1), values, order


def trained() -> Any:
    """The host, after STEPS steps of MQAR that were made with our layer in it."""
    model = host()
    ours = with_ours(model).train()
    ours.model.layers[0].linear_attn.layer.mixer.decay.step.reset_parameters()  # transformers' own start forgets at once
    optimizer = torch.optim.AdamW(ours.parameters())
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=STEPS, pct_start=0.1)
    for step in range(STEPS):
        tokens, values, order = draw(128, step + 1)
        logits = ours(input_ids=tokens).logits[:, ROWS]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), values.gather(1, order).flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(ours.parameters(), 1.0)
        optimizer.step()
        rate.step()
    layer = ours.model.layers[0].linear_attn
    layer.write(model.model.layers[0].linear_attn)
    kept = {name: x for name, x in ours.state_dict().items() if "linear_attn" not in name}
    model.load_state_dict(kept, strict=False)
    return model.eval()


def apart(found: Tensor, want: Tensor) -> float:
    """Largest difference, relative to the largest entry."""
    return float((found.double() - want.double()).abs().max() / want.double().abs().max())


@torch.no_grad()
def compared(model: Any) -> dict[str, Any]:
    """Errors of states and rows, and who follows a transplanted state."""
    tokens, values, order = draw(TESTS, 0)
    donor = values[torch.randperm(TESTS, generator=torch.Generator().manual_seed(1))]
    other = tokens.clone()
    other[:, 1 : 2 * PAIRS : 2] = donor
    meant, followed = values.gather(1, order), donor.gather(1, order)
    share = lambda logits, answers: float((logits[:, ROWS].argmax(-1) == answers).float().mean())

    exact = with_ours(model, "reference").double()
    with linattn.probe(exact, keep="writes") as p:
        exact(input_ids=tokens)
    want = p[0].state(AT)

    ours = with_ours(model)
    with linattn.probe(ours, keep=("writes", "reads", "output")) as p:
        base = share(ours(input_ids=tokens).logits, meant)
    trace = p[0]
    row = torch.einsum("bhrt,bthv->brhv", trace.attention(ROWS), trace.v)
    with linattn.probe(ours, keep=("final", "conv")) as d:
        ours(input_ids=other[:, : AT + 1])
    with linattn.probe(ours, keep=()) as q:
        q.patch(0, at=AT, source=d)
        moved = share(ours(input_ids=tokens).logits, followed)
    mine = {
        "recall": base, "state_error": apart(trace.state(AT), want), "row_error": apart(row, trace.o[:, ROWS]),
        "follow_the_donor": moved, "donor_tokens_run": AT + 1,
    }  # fmt: skip

    lens = bridged(model)
    names = [f"blocks.0.linear_attn.hook_{x}" for x in ("q", "k", "v", "beta", "log_decay", "recurrence_out", "ssm_state")]
    logits, cache = lens.run_with_cache(tokens, names_filter=names, use_cache=False)
    mixer = lens.blocks[0].linear_attn
    state = mixer.compute_ssm_state(cache, 0, AT)
    attention = mixer.compute_effective_attention(cache, 0)[:, :, ROWS]
    row = torch.einsum("bhrt,bthv->brhv", attention, cache[names[2]])
    mixer.eager_scan = True
    _, given = lens.run_with_cache(other, names_filter=names[-1:], use_cache=False)
    given = given[names[-1]]

    def patched(positions: slice) -> float:
        def put(states, hook):
            states = states.clone()
            states[:, positions] = given[:, positions]
            return states

        return share(lens.run_with_hooks(tokens, fwd_hooks=[(names[-1], put)], use_cache=False), followed)

    theirs = {
        "recall": share(logits, meant), "state_error": apart(state, want),
        "row_error": apart(row, cache[names[5]][:, ROWS]),
        "follow_the_donor": patched(slice(AT, AT + 1)), "follow_the_donor_all_later_states_patched": patched(slice(AT, None)),
        "donor_tokens_run": tokens.shape[1],
    }  # fmt: skip
    return {"linattn": mine, "transformer_lens": theirs}


@torch.no_grad()
def cell(side: str, T: int) -> dict[str, float]:
    """Seconds (the median of three) and the most bytes beyond what was there before, of one forward, one state and one row."""
    torch.set_num_threads(1)
    model = host(heads=4, width=64)
    run = with_ours(model) if side == "linattn" else bridged(model)
    tokens = torch.randint(0, 2 * WORDS, (1, T), generator=torch.Generator().manual_seed(0))

    def ask(tokens):
        middle = tokens.shape[1] // 2
        if side == "linattn":
            with linattn.probe(run, keep=("boundaries", "writes", "reads")) as p:
                run(input_ids=tokens)
            return p[0].state(middle), p[0].attention([middle])
        names = [f"blocks.0.linear_attn.hook_{x}" for x in ("q", "k", "v", "beta", "log_decay")]
        _, cache = run.run_with_cache(tokens, names_filter=names, use_cache=False)
        mixer = run.blocks[0].linear_attn
        return mixer.compute_ssm_state(cache, 0, middle), mixer.compute_effective_attention(cache, 0)[:, :, middle]

    ask(tokens[:, :64])
    ctypes.CDLL(None).malloc_trim(0)
    extra = None
    if CLEAR.exists():
        CLEAR.write_text("5")
        before = _resident("VmRSS")
        ask(tokens)
        extra = max(0, _resident("VmHWM") - before)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        ask(tokens)
        times.append(time.perf_counter() - start)
    return {"side": side, "T": T, "seconds": statistics.median(times), "extra_bytes": extra}


def run(out: Path) -> Path:
    """All of it, in about two minutes."""
    from importlib.metadata import version

    torch.set_num_threads(1)
    bridged(host())  # says at once what is missing
    found = compared(trained())
    rows = []
    for T in LENGTHS:
        for side in SIDES:
            done = subprocess.run(
                [sys.executable, "-m", "bench.probes", side, str(T)], cwd=ROOT, capture_output=True, text=True, check=True
            )
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            print(rows[-1], flush=True)
    record = {
        "command": "python -m bench probes", "machine": facts() | versions() | git() | {"threads": 1},
        "transformer_lens": version("transformer-lens"), "transformers": version("transformers"),
        "model": f"Qwen3.5, one gated-delta layer, {STEPS} steps of MQAR: {PAIRS} pairs of {WORDS} keys and values, {TESTS} test sequences",
        "answers": found, "cost": {"model": "one layer, H=4, K=V=64, B=1, float32", "rows": rows},
    }  # fmt: skip
    path = out / "probes.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path


if __name__ == "__main__":
    print(json.dumps(cell(sys.argv[1], int(sys.argv[2]))))
