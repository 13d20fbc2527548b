"""The stages that bring quality back: each trains what it should, lowers what it should, and goes on where it was cut off."""

import copy

import pytest
import torch

import linattn
from linattn.swap import linearise

pytest.importorskip("transformers")
from swap_hosts import CAUSAL, IMAGE, build

from linattn.swap.losses import activation_matching, hide, vit_linearizer


def batches(step, labels=False):
    ids = torch.randint(3, 50, (4, 16), generator=torch.Generator().manual_seed(step))
    return dict(input_ids=ids, use_cache=False) | (dict(labels=ids) if labels else {})


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def changed(model, before):
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


@torch.no_grad()
def apart_on(model, teacher, batch):
    return float(linearise.kl(model(**batch).logits, teacher(**batch).logits))


def swapped(variant="hedgehog", **how):
    teacher = CAUSAL["llama"]()
    model = copy.deepcopy(teacher)
    return model, linattn.swap_attention(model, variant, **how), teacher


@pytest.mark.parametrize("how", [dict(), dict(variant="gla", window=4)], ids=["hedgehog", "gla and a window"])
def test_transfer_trains_the_added_parameters_alone_and_lowers_every_error(how):
    model, report, _ = swapped(**how)
    model.lm_head.weight.requires_grad_(False)
    before, at_start, seen = weights(model), linearise.errors(model, [batches(99)]), []
    linearise.transfer(model, batches, steps=30, told=lambda step, loss: seen.append(step))
    assert changed(model, before) == set(report.parameters("added"))
    after = linearise.errors(model, [batches(99)])
    assert list(after) == report.swapped and all(after[name] < 0.9 * at_start[name] for name in after)
    assert seen == list(range(1, 31))
    assert not model.lm_head.weight.requires_grad and model.model.embed_tokens.weight.requires_grad  # as before
    assert all(module.mode == "linear" for module in map(model.get_submodule, report.swapped))


def test_a_stage_goes_on_where_it_was_cut_off(tmp_path):
    class Cut(Exception):
        pass

    def cut(step):
        if step == 70:
            raise Cut
        return batches(step)

    whole, parted = swapped()[0], swapped()[0]
    state = torch.get_rng_state()
    linearise.transfer(whole, batches, steps=80)
    with pytest.raises(Cut):
        linearise.transfer(parted, cut, steps=80, checkpoint=tmp_path / "transfer.pt")
    fresh = swapped()[0]
    linearise.transfer(fresh, batches, steps=80, checkpoint=tmp_path / "transfer.pt")
    assert torch.equal(torch.get_rng_state(), state)
    for a, b in zip(whole.parameters(), fresh.parameters()):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="is of another model or stage"):
        linearise.transfer(swapped("gla")[0], batches, steps=80, checkpoint=tmp_path / "transfer.pt")


def test_distilling_brings_the_answers_nearer():
    model, report, teacher = swapped("gla", init="random")
    apart = lambda: apart_on(model, teacher, batches(99))
    first, of_teacher, before = apart(), weights(teacher), weights(model)
    linearise.distill(model, teacher, batches, steps=30, lr=3e-3, trained="attention")
    assert changed(model, before) == set(report.parameters("attention"))
    linearise.distill(model, teacher, lambda step: batches(step, labels=True), steps=30, lr=3e-3, hidden=0.5, temperature=2.0, labels=0.01)
    assert apart() < 0.7 * first
    assert not changed(teacher, of_teacher)


def test_images_with_hidden_patches():
    teacher = build("ViTForImageClassification", "ViTConfig", **IMAGE)
    model = copy.deepcopy(teacher)
    linattn.swap_attention(model, "lion_s")
    pixels = lambda step: dict(pixel_values=torch.randn(3, 1, 12, 12, generator=torch.Generator().manual_seed(step % 2)))
    seen = []
    how = dict(logits=0.0, masked=0.5, patch=4)
    linearise.distill(model, teacher, pixels, steps=40, lr=3e-3, told=lambda step, loss: seen.append(loss), **how)
    assert sum(seen[-10:]) < sum(seen[:10])
    away = linearise._patches(torch.ones(2, 1, 12, 12), 0.5, 4, 0)
    assert away.sum(1).tolist() == [4, 4] and not torch.equal(away[0], away[1])
    patches = hide(torch.ones(2, 1, 12, 12), away, 4).unfold(2, 4, 4).unfold(3, 4, 4).mean((-1, -2))
    assert torch.equal(patches.view(2, 9), (~away).float())


def test_the_losses_of_vit_linearizer():
    f, masked = torch.randn(2, 9, 8), torch.zeros(2, 9, dtype=torch.bool)
    masked[:, 5:] = True
    turn, _ = torch.linalg.qr(torch.randn(8, 8))
    matching, prediction = vit_linearizer([3 * f @ turn], [f], masked)
    assert matching == pytest.approx(0, abs=1e-6) and prediction > 0.1  # the first cares for angles between tokens alone
    other = torch.where(masked[..., None], f, torch.randn(2, 9, 8))
    matching, prediction = vit_linearizer([other], [f], masked)
    assert matching > 0.1 and prediction == 0  # visible tokens, and masked ones
    a = torch.nn.functional.cosine_similarity(other[0, :5, None], other[0, None, :5], dim=-1)
    b = torch.nn.functional.cosine_similarity(f[0, :5, None], f[0, None, :5], dim=-1)
    wanted = 1 - torch.nn.functional.cosine_similarity(a, b, dim=-1).mean()
    torch.testing.assert_close(vit_linearizer([other[:1]], [f[:1]], masked[:1])[0], wanted)


@pytest.mark.parametrize("tokens", [5, 40])
def test_activations_are_matched_without_the_map_of_all_pairs(tokens):
    student, teacher = torch.randn(2, tokens, 6, requires_grad=True), torch.randn(2, tokens, 8)

    def row(f, b, i):
        a = torch.stack([torch.nn.functional.cosine_similarity(f[b, i], f[b, j], dim=0) for j in range(tokens)])
        return a / a.norm()

    wanted = sum(1 - row(student, b, i) @ row(teacher, b, i) for b in range(2) for i in range(tokens)) / (2 * tokens)
    got = activation_matching(student, teacher)
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(*(torch.autograd.grad(x, student)[0] for x in (got, wanted)), rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="of the same tokens"):
        activation_matching(student[:, 1:], teacher)


def test_importance_is_what_keeping_a_layer_gains():
    model, report, teacher = swapped()
    gain = linearise.importance(model, [batches(0)])
    assert set(gain) == set(report.swapped) and list(gain.values()) == sorted(gain.values(), reverse=True)
    best = next(iter(gain))
    apart = lambda: apart_on(model, teacher, batches(0))
    first = apart()
    report.undo([best])
    assert first - apart() == pytest.approx(gain[best], rel=1e-4)
    assert [row for row in report.swapped if row != best] == list(linattn.swap.swap.swapped_of(model))


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # PEFT asks transformers by the old name
@pytest.mark.parametrize("chain", [0, 2])
def test_low_rank_adapters_on_swapped_attention(chain):
    pytest.importorskip("peft")
    model, _, _ = swapped()
    before = weights(model)
    lora = linearise.with_lora(model, rank=2, alpha=4, chain=chain)
    trained = [name for name, p in lora.named_parameters() if p.requires_grad]
    assert len(trained) == 8 * (2 + chain) and {name.rsplit("lora_", 1)[0][-7:-1] for name in trained} == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
    }
    linearise.finetune(lora, lambda step: batches(step, labels=True), steps=3)
    answer = lora(**batches(5)).logits
    merged = lora.merge_and_unload()
    torch.testing.assert_close(merged(**batches(5)).logits, answer, rtol=1e-4, atol=1e-4)
    assert all("_proj" in name for name in changed(merged, before))
    with pytest.raises(ValueError, match=r"is wrapped by PEFT \(PeftModel\): swap attention first"):
        linattn.swap_attention(lora, "linear")


def test_errors():
    model, _, teacher = swapped("linear")
    with pytest.raises(ValueError, match="transfer trains the parameters a swap added, and this one added none"):
        linearise.transfer(model, batches, steps=1)
    with pytest.raises(ValueError, match="teacher must be the model before the swap"):
        linearise.distill(model, model, batches, steps=1)
    with pytest.raises(ValueError, match=r"trained must be one of \['all', 'attention', 'added'\]; got 'maps'"):
        linearise.distill(model, teacher, batches, steps=1, trained="maps")
    with pytest.raises(ValueError, match=r"masked is a share of the patches, in \(0, 1\), and needs patch"):
        linearise.distill(model, teacher, batches, steps=1, masked=0.5)
    with pytest.raises(ValueError, match=r"mode must be one of .*; got 'x'"), linearise.mode(model, "x"):
        pass
    with pytest.raises(ValueError, match=r"only must be names of swapped attention; got \['x'\]"), linearise.mode(model, "softmax", ["x"]):
        pass
    with pytest.raises(ValueError, match="lr must be above 0; got 0"):
        linearise.distill(model, teacher, batches, steps=1, lr=0)
    with pytest.raises(FloatingPointError, match="the loss of step 1 is not finite"):
        model.lm_head.weight.data.fill_(torch.nan)
        linearise.finetune(model, lambda step: batches(step, labels=True), steps=1)
    with pytest.raises(ValueError, match="attention transfer takes whole sequences"):
        with linearise.mode(model, "transfer"):
            model(batches(0)["input_ids"], use_cache=True)
