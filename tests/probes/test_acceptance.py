"""The 23 claims that the probes were designed against, with the layers as users have them.

The table at the end of docs/probes.md has them by number, with what was wanted, what is reached, and the tests that hold them: these, the
walk-through of that page, which test_probe_docs.py runs for three seeds, and tests of exact properties in the files beside this one.

The model of the first group is the design's clean memory: a convolution of width 2 on keys alone and no activation, so that the token of
the value writes the pair. Layers as they come, which store it at one token or the next, are the walk-through's. What trains is slow.
"""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from linattn import Decoder, probe, probes
from linattn.probes.reading import carried

PAIRS, WORDS = 8, 32
slow = pytest.mark.slow


def draw(n, seed, pairs=PAIRS):
    """key value key value …, then key fill key fill …: tokens [n 4·pairs], values, and which pair is asked for when."""
    generator = torch.Generator().manual_seed(seed)
    some = lambda width: torch.rand(n, width, generator=generator).argsort(1)[:, :pairs]
    keys, order = some(WORDS), some(pairs)
    values = WORDS + torch.randint(WORDS, (n, pairs), generator=generator)
    questions = torch.stack([keys.gather(1, order), torch.full_like(order, 2 * WORDS)], -1)
    return torch.cat([torch.stack([keys, values], -1), questions], 1).flatten(1), values, order


def rows(pairs=PAIRS):
    return list(range(2 * pairs, 4 * pairs, 2))


def learnt(*, layers=1, heads=1, keys_alone=False, steps=600, seed=0):
    """keys_alone: the clean memory, whose convolution mixes each key with the one before and nothing else, and which bends nothing."""
    torch.manual_seed(seed)
    width = dict(expand_k=0.5 * heads, expand_v=0.5 * heads, mlp_dim=16 if layers == 1 else 128)  # K = V = 32
    model = Decoder.create("tiny", vocab_size=2 * WORDS + 1, variant="gated_delta", dim=64, num_layers=layers, num_heads=heads,
                           tie_embeddings=False, **width)  # fmt: skip
    untrained = Decoder(model.config).eval()
    if keys_alone:
        for each in (model, untrained):
            layer = each.blocks[0].attention
            layer.variant = replace(layer.variant, activation="identity")
    optimizer = torch.optim.AdamW(model.parameters())
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        if keys_alone:
            layer = model.blocks[0].attention
            keys, rest = layer.widths[0], sum(layer.widths[:2])
            with torch.no_grad():
                layer.conv.weight[keys:rest, :2] = 0
                for part in (slice(0, keys), slice(rest, None)):
                    layer.conv.weight[part] = torch.tensor([0.0, 0, 0, 1])
        tokens, values, order = draw(128, step + 1)
        logits = model(tokens)[0][:, rows()]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), values.gather(1, order).flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
    return model.eval(), untrained


class Told:
    """A model, a thousand sequences, and what it answers about the fourth pair and about the others."""

    def __init__(self, model):
        self.model, self.at = model, 2 * PAIRS - 1
        self.tokens, self.values, self.order = draw(1000, 0)
        self.meant, self.asks = self.values.gather(1, self.order), self.order == 3
        with probe(model, keep=("writes", "reads", "inputs")) as self.p:
            self.before = self.right()

    @torch.no_grad()
    def right(self):
        found = self.model(self.tokens)[0][:, rows()].argmax(-1)
        return tuple((found == self.meant)[which].float().mean().item() for which in (self.asks, ~self.asks))

    def readers(self, layer):
        """Of the question for the fourth pair [n H 1 K], and of the seven others."""
        r = self.p[layer].readers(rows(), self.at).transpose(1, 2)  # [n R H K]
        return r[self.asks][:, :, None], r[~self.asks].unflatten(0, (-1, PAIRS - 1)).transpose(1, 2)


@pytest.fixture(scope="module")
def clean():
    torch.set_num_threads(1)
    for seed in range(3):  # another start may be needed on another machine: the last bits decide when the keys are found
        model, untrained = learnt(keys_alone=True, steps=500, seed=seed)
        told = Told(model)
        if min(told.before) >= 0.99:
            break
    with probe(untrained, keep=("writes", "reads")) as u, torch.no_grad():
        untrained(told.tokens)
    return SimpleNamespace(model=model, told=told, trace=told.p[0], untrained=u[0])


@slow
def test_t1_it_learns(clean):
    assert min(clean.told.before) >= 0.99


@slow
def test_t2_t3_a_probe_reads_what_stands_under_the_stored_keys_and_its_controls_do_not(clean):
    told, wrote = clean.told, list(range(1, 2 * PAIRS, 2))
    read = lambda trace, keys: trace.read(keys, told.at)[:, 0].flatten(0, 1)
    stored = clean.trace.k[:, wrote].transpose(1, 2)
    found = probes.LinearProbe().fit(
        read(clean.trace, stored), told.values.flatten(), groups=torch.arange(1000).repeat_interleave(PAIRS),
        against={"random key": read(clean.trace, probes.random_keys(stored)),
                 "untrained": read(clean.untrained, clean.untrained.readers(rows(), told.at))},
    )  # fmt: skip
    print(found)
    assert found.score >= 0.95 and len(found.controls) == 3 and max(found.controls.values()) <= 0.10


@slow
@torch.no_grad()
def test_t4_the_lens_says_the_answers_without_training(clean):
    told = clean.told
    said = probes.lens(told.model, clean.trace, rows(), told.at, residual=told.model.embedding(told.tokens)[:, rows()])
    assert (said.argmax(-1) == told.meant).float().mean() >= 0.95


@slow
def test_t5_t6_one_association_is_erased_three_ways_and_by_no_random_direction(clean):
    told, trace, at, wrote = clean.told, clean.trace, clean.told.at, 2 * 3 + 1
    mine, others = told.readers(0)
    after = slice(wrote + 1, at + 1)
    written = trace.k[:, wrote, :, :, None] * trace.u[:, wrote, :, None]
    left = carried(written, trace.k[:, after], trace.log_decay[:, after], trace.beta[:, after])  # of the write, where it is erased
    edits = {
        "reader": lambda q: q.erase(0, at=at, readers=mine, protect=others),
        "key": lambda q: q.erase(0, at=at, readers=trace.k[:, wrote][:, :, None]),
        "write": lambda q: q.edit(0, at=at, fn=lambda S: S - left),
    }
    for name, edit in edits.items():
        with probe(told.model, keep=()) as q:
            edit(q)
            erased, kept = told.right()
        print(name, erased, kept, q.last_edit)
        assert erased <= 0.08 and kept >= told.before[1] - 0.01, name
    with probe(told.model, keep=()) as q:
        q.erase(0, at=at, readers=probes.random_keys(mine))
        assert told.right()[0] >= 0.98


@slow
@torch.no_grad()
def test_t13_rank_grows_with_the_pairs(clean):
    tokens, _, _ = draw(200, 0, pairs=WORDS)
    with probe(clean.model, keep="writes") as p:
        clean.model(tokens)
    found = [probes.ranks(p[0].state(2 * n - 1)) for n in (1, 2, 4, 8, 16)]
    numeric, participation = ([float(x.mean()) for x in each] for each in ([f.numeric for f in found], [f.participation for f in found]))
    print(numeric, participation)
    assert numeric == sorted(numeric) and participation == sorted(participation) and 6 <= numeric[2] <= 9


@slow
@torch.no_grad()
def test_t9_tokens_that_hold_a_pair_by_their_offsets_are_kept_from_writing(clean):
    """As many offsets as make up 90 % of what rows place around their own pair beyond what they place around another."""
    told, trace = clean.told, clean.trace
    share, other = (probes.offsets(trace, rows(), 2 * pair + 1) for pair in (told.order, (told.order + 3) % PAIRS))
    beyond = (share - other).clamp(0) / (share - other).clamp(0).sum()
    order = beyond.argsort(descending=True)
    where = [int(o) - 4 for o in order[: int((beyond[order].cumsum(0) < 0.9).sum()) + 1]]
    with probe(told.model, keep=()) as q:
        q.knockout(0, tokens=[2 * 3 + 1 + offset for offset in where])
        unwritten, kept = told.right()
    print(beyond, where, unwritten, kept)
    assert where == [0] and unwritten <= 0.10 and kept >= 0.98


@slow
@torch.no_grad()
def test_t14_interference_foretells_which_answers_fail(clean):
    pairs, recall = 24, {}
    for n in (8, pairs):
        tokens, values, order = draw(500, 0, pairs=n)
        with probe(clean.model, keep=("writes", "reads")) as p:
            found = clean.model(tokens)[0][:, rows(n)].argmax(-1)
        right = found == values.gather(1, order)
        recall[n] = float(right.float().mean())
    heard = probes.interference(p[0], rows(pairs), 2 * order + 1)

    def auc(figure):
        return float((figure[right][:, None] > figure[~right][None]).float().mean())

    snr, cosine = auc(heard.snr[:, 0]), auc(heard.cosine[:, 0])
    written = p[0].attention(rows(pairs), over="writes")[:, 0].abs() * p[0].u[:, :, 0].norm(dim=-1)[:, None]  # as first designed
    signal = written.gather(-1, (2 * order + 1)[..., None])[..., 0]
    over_writes = auc(signal / (written.square().sum(-1) - signal.square()).sqrt())
    print(recall, snr, cosine, over_writes)
    assert recall[pairs] < recall[8] and (~right).sum() >= 50 and cosine >= 0.75 and snr >= 0.65 and snr > over_writes


@pytest.fixture(scope="module")
def stacked():
    """Two layers of two heads; right answers after the pair was erased in either."""
    torch.set_num_threads(1)
    told = Told(learnt(layers=2, heads=2, steps=800)[0])
    left = []
    for layer in (0, 1):
        mine, others = told.readers(layer)
        with probe(told.model, keep=()) as q:
            q.erase(layer, at=told.at, readers=mine, protect=others)
            left.append(told.right())
    tokens, values, order = draw(3000, 1)
    hidden = []  # [3000·R dim] of the questions, before and behind each block
    take = lambda _, __, out: hidden.append((out[0] if isinstance(out, tuple) else out)[:, rows()].flatten(0, 1))
    hooks = [part.register_forward_hook(take) for part in (told.model.embedding, *told.model.blocks)]
    with torch.no_grad():
        told.model(tokens)
    for hook in hooks:
        hook.remove()
    meant = values.gather(1, order).flatten()
    return SimpleNamespace(told=told, left=left, hidden=hidden, meant=meant, held=min((0, 1), key=lambda layer: left[layer][0]))


@slow
def test_t11_the_layer_that_holds_the_pair_is_found(stacked):
    (erased, kept), (beside, _) = stacked.left[stacked.held], stacked.left[1 - stacked.held]
    print(stacked.left)
    assert min(stacked.told.before) >= 0.99
    assert erased <= 0.08 and kept >= stacked.told.before[1] - 0.01 and beside >= 0.95


@slow
def test_t12_the_answer_appears_behind_that_layer(stacked):
    seen = {f"{i} blocks": x for i, x in enumerate(stacked.hidden)}
    found = probes.layer_curve(seen, stacked.meant, groups=torch.arange(3000).repeat_interleave(PAIRS))
    print(found)
    results = list(found.results.values())
    before, behind = results[stacked.held], results[stacked.held + 1]
    assert before.score <= 0.15 and behind.score >= 0.95 and max(behind.controls.values()) <= 0.10


@slow
def test_t20_leace_takes_the_answer_out_of_the_last_hidden_state(stacked):
    """Fitted on 2000 sequences, told on 1000 others by a probe of the erased: all 32 values, and odd ones from even."""
    X, meant, fitted = stacked.hidden[-1], stacked.meant, 2000 * PAIRS
    for y, least, most in ((meant, 0.95, 0.10), (meant % 2, 0.80, 0.55)):

        def told(X, y=y):
            found = probes.LinearProbe().fit(X[:fitted], y[:fitted], controls=())
            return float((found.predict(X[fitted:]) == y[fitted:]).float().mean())

        before, after = told(X), told(probes.leace(X[:fitted], y[:fitted])(X))
        print(before, after)
        assert before >= least and after <= most
