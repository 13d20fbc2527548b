"""The only place that brings a swapped model's quality back: attention transfer, choice of layers, distillation, low-rank finetuning.

Every stage takes `batches`, a function of the step that returns a batch, a dict of arguments for the model: a stage that was cut off and
goes on with `checkpoint` sees what an uninterrupted one would have seen.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .attention import MODES, SwappedAttention
from .find import swapped_of
from .loop import Told, frozen_but, switched, train
from .losses import four, hide, kl, relative, vit_linearizer

Batch = dict[str, Any]
Batches = Callable[[int], Batch]


@contextmanager
def mode(model: nn.Module, name: str, only: Sequence[str] | None = None) -> Iterator[None]:
    """`with mode(model, "softmax"):` the original attention answers, with the weights as they are now; `only` in these modules.

    "transfer": it answers, and each module notes how far it would have been from that. ValueError for an unknown mode or name.
    """
    if name not in MODES:
        raise ValueError(f"mode must be one of {list(MODES)}; got {name!r}")
    swapped = swapped_of(model)
    if unknown := [one for one in only or () if one not in swapped]:
        raise ValueError(f"only must be names of swapped attention; got {unknown}, there are {list(swapped)}")
    modules = [swapped[one] for one in (swapped if only is None else only)]
    before = [module.mode for module in modules]
    for module in modules:
        module.mode = name
    try:
        yield
    finally:
        for module, old in zip(modules, before):
            module.mode, module.error = old, None


def transfer(
    model: nn.Module, batches: Batches, *, steps: int, lr: float = 1e-2, checkpoint: Path | None = None, told: Told | None = None
) -> dict[str, float]:
    """Attention transfer (LoLCATs' first stage, arXiv:2410.10254): every swapped module learns the answers of the softmax it stands for.

    The softmax's own outputs go through the model, so that each module sees what it saw; only what the swap added is trained, by
    Σ (y − y')² / Σ y'² of each module's output, and every module by itself. Returns these at the last step, by module.
    ValueError where the swap added no parameters.
    """
    modules = swapped_of(model)
    added = [p for module in modules.values() for p in module.added().values()]
    if not added:
        raise ValueError("transfer trains the parameters a swap added, and this one added none (as 'linear' does): go on with distill")

    def loss(step: int) -> Tensor:
        with mode(model, "transfer"):
            _call(model, batches(step))
            return _errors(modules.values())

    with frozen_but(model, added), switched(model, training=False):
        train([(added, lr)], loss, steps, checkpoint=checkpoint, told=told)
    return errors(model, [batches(steps)])


@torch.no_grad()
def errors(model: nn.Module, batches: Iterable[Batch]) -> dict[str, float]:
    """Σ (y − y')² / Σ y'² of every swapped module's output against the softmax's, given the softmax's own input; mean over batches."""
    modules, count = swapped_of(model), 0
    total: dict[str, float] = {}
    with switched(model, training=False):
        for batch in batches:
            with mode(model, "transfer"):
                _call(model, batch)
                total = {name: total.get(name, 0.0) + float(_error(module)) for name, module in modules.items()}
            count += 1
    return {name: value / count for name, value in total.items()}


@torch.no_grad()
def importance(model: nn.Module, batches: Sequence[Batch]) -> dict[str, float]:
    """What each layer's softmax is worth: by how many nats KL(teacher ‖ student) falls where that layer alone stays softmax.

    The teacher is the model with all of its own softmax: call this before anything but the added parameters is trained. Largest first.
    """
    names = list(swapped_of(model))

    def divergence(softmax: Sequence[str]) -> float:
        with mode(model, "softmax", softmax):
            return sum(
                float(kl(_call(model, batch).logits, wanted, batch.get("attention_mask"))) for batch, wanted in zip(batches, answers)
            ) / len(batches)

    with switched(model, training=False):
        with mode(model, "softmax"):
            answers = [_call(model, batch).logits for batch in batches]
        linear = divergence([])
        gain = {name: linear - divergence([name]) for name in names}
    return dict(sorted(gain.items(), key=lambda item: -item[1]))


def distill(
    model: nn.Module,
    teacher: nn.Module,
    batches: Batches,
    *,
    steps: int,
    lr: float = 1e-3,
    lr_added: float | None = None,
    trained: str = "all",
    temperature: float = 1.0,
    logits: float = 1.0,
    hidden: float = 0.0,
    masked: float = 0.0,
    patch: int = 0,
    labels: float = 0.0,
    checkpoint: Path | None = None,
    told: Told | None = None,
) -> None:
    """Train `model` to answer as `teacher` does: temperature² · KL(teacher ‖ student) of their logits, and by weight

        logits   that term
        hidden   Σ (h − h')² / Σ h'² of the hidden states after each layer, mean over layers
        labels   the model's own loss, where batches have labels

    masked   for images: that share of the `patch` × `patch` patches of pixel_values is hidden from the student, and ViT-Linearizer's two
             losses are added, `losses.vit_linearizer` of four stages; its authors mask 0.75 and use no others (logits=0)

    trained  "all", "attention" (the swapped modules) or "added" (what the swap added); lr_added is for the latter, None: lr
    teacher  a model of its own, made before the swap; weights are shared by a swapped model and its originals, so `mode` is no teacher here
    """
    given = [(p, True) for module in swapped_of(model).values() for p in module.added().values()]
    added = [p for p, _ in given]
    pools = {"all": model.parameters(), "attention": (p for m in swapped_of(model).values() for p in m.parameters()), "added": added}
    if trained not in pools:
        raise ValueError(f"trained must be one of {list(pools)}; got {trained!r}")
    if masked and not (0 < masked < 1 and patch > 0):
        raise ValueError(f"masked is a share of the patches, in (0, 1), and needs patch, the width of one; got {masked}, patch={patch}")
    if any(p is q for p in teacher.parameters() for q in added) or any(isinstance(m, SwappedAttention) for m in teacher.modules()):
        raise ValueError("teacher must be the model before the swap: load or copy it first")
    ids = {id(p) for p in added}
    rest = [p for p in pools[trained] if id(p) not in ids and p.requires_grad]
    groups = [(params, rate) for params, rate in ((rest, lr), (added, lr if lr_added is None else lr_added)) if params]

    def loss(step: int) -> Tensor:
        batch = batches(step)
        asked = {name: value for name, value in batch.items() if name != "labels"}
        deep = bool(hidden or masked)
        with torch.no_grad():
            wanted = _call(teacher, asked, hidden=deep)
        own = dict(batch if labels else asked)
        if masked:
            away = _patches(own["pixel_values"], masked, patch, step)
            own["pixel_values"] = hide(own["pixel_values"], away, patch)
        answer = _call(model, own, hidden=deep)
        total = logits * temperature**2 * kl(answer.logits, wanted.logits, batch.get("attention_mask"), temperature)
        pairs = list(zip(answer.hidden_states[1:], wanted.hidden_states[1:])) if deep else []
        if hidden:
            total = total + hidden * sum(relative(h, w) for h, w in pairs) / len(pairs)
        if masked:
            stages = four(pairs)
            of_patches = lambda f: f[:, f.shape[1] - away.shape[1] :]  # behind the class token and its like
            matching, prediction = vit_linearizer([of_patches(h) for h, _ in stages], [of_patches(w) for _, w in stages], away)
            total = total + matching + prediction
        return total + labels * answer.loss if labels else total

    with frozen_but(model, [*rest, *added]), switched(model, training=True), switched(teacher, training=False):
        train(groups, loss, steps, checkpoint=checkpoint, told=told)


def finetune(
    model: nn.Module, batches: Batches, *, steps: int, lr: float = 1e-4, checkpoint: Path | None = None, told: Told | None = None
) -> None:
    """Train what requires a gradient by the model's own loss; batches have labels. After `with_lora`: LoLCATs' second stage."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    with switched(model, training=True):
        train([(parameters, lr)], lambda step: _call(model, batches(step)).loss, steps, checkpoint=checkpoint, told=told)


class _Chain(nn.Module):
    """W_n … W_1 A for A [r in]: square factors between the two of a low-rank adapter, from the identity."""

    def __init__(self, rank: int, links: int):
        super().__init__()
        self.links = nn.ParameterList([nn.Parameter(torch.eye(rank)) for _ in range(links)])

    def forward(self, a: Tensor) -> Tensor:
        for link in self.links:
            a = link.to(a.dtype) @ a
        return a


def with_lora(model: nn.Module, *, rank: int = 8, alpha: int = 16, chain: int = 0) -> Any:
    """The model with low-rank adapters (LoRA, by PEFT) on the projections of its swapped attention, which alone can then be trained.

    chain    that many rank × rank factors between the two of each adapter: LinChain, arXiv:2411.00039, of which 0 is LoRA

    `merged = lora.merge_and_unload()` folds them into the weights. ValueError where PEFT is missing.
    """
    if chain < 0:
        raise ValueError(f"chain must be at least 0; got {chain}")
    try:
        from peft import LoraConfig, get_peft_model
    except ModuleNotFoundError:
        raise ValueError("low-rank adapters need PEFT: pip install peft") from None
    targets = [
        f"{name}.{part}"
        for name, module in swapped_of(model).items()
        for part in module.adapter.parts
        if isinstance(getattr(module, part), nn.Linear) or type(getattr(module, part)).__name__ == "Conv1D"
    ]
    lora = get_peft_model(model, LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets))
    if chain:
        for name, module in list(lora.named_modules()):
            if name.endswith(".lora_A.default"):
                parametrize.register_parametrization(module, "weight", _Chain(rank, chain).to(module.weight.device))
    return lora


def _call(model: nn.Module, batch: Batch, *, hidden: bool = False) -> Any:
    return model(**batch, output_hidden_states=True) if hidden else model(**batch)


def _errors(modules: Iterable[SwappedAttention]) -> Tensor:
    return torch.stack([_error(module) for module in modules]).sum()


def _error(module: SwappedAttention) -> Tensor:
    if module.error is None:
        raise ValueError("a swapped module was not called: the batch must reach all of them")
    return module.error


def _patches(pixels: Tensor, share: float, patch: int, step: int) -> Tensor:
    """[B L] bool: `share` of the patches of pixels [B C Y X], equally many in each image, others at each step."""
    B, _, Y, X = pixels.shape
    L = (Y // patch) * (X // patch)
    order = torch.rand(B, L, generator=torch.Generator().manual_seed(step)).argsort(1)
    return (order < round(share * L)).to(pixels.device)
