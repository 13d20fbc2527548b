"""The 23 claims that the probes were designed against, with the layers as users have them.

By number, with the tests that hold them; "walk" is the walk-through of docs/probes.md, run for three seeds by test_probe_docs.py. What
trains is marked slow.

T1   a model learns to recall                           here, walk
T2   a linear probe reads the values                    here, walk
T3   and its controls do not                            here, walk
T4   so does the lens, without training                 here, walk
T5   one pair is erased, in three ways                  here
T6   along a random direction nothing is                here, walk
T7   along the reader also where no key is right        walk
T8   a value is rewritten                               walk
T9   tokens kept from writing                           walk
T10  a state is transplanted                            walk
T11  the layer that holds a pair                        here
T12  the layer curve of its value                       here
T13  rank grows with the pairs                          here; test_measures.py: test_ranks_and_interference_of_known_memories
T14  interference foretells failures                    here: it does not with this model, which the test says
T15  all forms agree                                    test_capture.py: …_rows_and_readers…, …_packed…, …_padding…, …_decoding…
T16  the detached Jacobian is exact                     test_measures_frozen.py: test_a_decoder_is_one_matrix
T17  parity by reflection                               test_measures.py: test_parity_by_reflection
T18  survival and half-life                             test_measures.py: test_survival_and_half_life
T19  the delta rule is Kaczmarz' iteration              here
T20  LEACE takes a label away                           test_fitted.py: test_leace_takes_a_label_away_and_little_else
T21  minibatch CKA                                      test_measures.py: test_cka_knows_rotations_and_strangers
T22  no bit changes, compiled, kept once                test_capture.py: test_keeping_changes_no_bit…, …_in_one_graph…, …_captured_once
T23  resuming from any state is going on                test_edits.py: test_a_patched_run_goes_on_as_its_donor_would

The model of the first group is the design's clean memory: a convolution on keys alone, so that the value's token writes the pair.
"""

from types import SimpleNamespace

import pytest
import torch

from linattn import Decoder, linear_attention, probe, probes
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
    torch.manual_seed(seed)
    width = dict(expand_k=0.5 * heads, expand_v=0.5 * heads, mlp_dim=16 if layers == 1 else 128)  # K = V = 32
    model = Decoder.create("tiny", vocab_size=2 * WORDS + 1, variant="gated_delta", dim=64, num_layers=layers, num_heads=heads,
                           tie_embeddings=False, **width)  # fmt: skip
    untrained = Decoder(model.config).eval()
    optimizer = torch.optim.AdamW(model.parameters())
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        if keys_alone:
            layer = model.blocks[0].attention
            with torch.no_grad():
                for part in (slice(0, layer.widths[0]), slice(sum(layer.widths[:2]), None)):
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
        model, untrained = learnt(keys_alone=True, steps=1000, seed=seed)
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
    assert numeric == sorted(numeric) and participation == sorted(participation) and 3 <= numeric[2] <= 9


@slow
@pytest.mark.xfail(
    strict=True, reason="with these layers recall falls to 0.95 at 24 pairs, and SNR tells failures at 0.53 alone; 0.65 was wanted"
)
@torch.no_grad()
def test_t14_interference_foretells_which_answers_fail(clean):
    pairs, recall = 24, {}
    for n in (8, pairs):
        tokens, values, order = draw(500, 0, pairs=n)
        with probe(clean.model, keep=("writes", "reads")) as p:
            found = clean.model(tokens)[0][:, rows(n)].argmax(-1)
        right = found == values.gather(1, order)
        recall[n] = float(right.float().mean())
    snr = probes.interference(p[0], rows(pairs), 2 * order + 1).snr[:, 0]
    good, bad = snr[right], snr[~right]
    auc = (good[:, None] > bad[None, :: max(1, len(bad) // 500)]).float().mean()
    print(recall, float(auc), len(bad))
    assert recall[pairs] < recall[8] - 0.01 and auc >= 0.65


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
    return SimpleNamespace(told=told, left=left, held=min((0, 1), key=lambda layer: left[layer][0]))


@slow
def test_t11_the_layer_that_holds_the_pair_is_found(stacked):
    (erased, kept), (beside, _) = stacked.left[stacked.held], stacked.left[1 - stacked.held]
    print(stacked.left)
    assert min(stacked.told.before) >= 0.99
    assert erased <= 0.08 and kept >= stacked.told.before[1] - 0.01 and beside >= 0.95


@slow
@torch.no_grad()
def test_t12_the_answer_appears_behind_that_layer(stacked):
    told, seen = stacked.told, {}
    keep = lambda name: lambda _, __, out: seen.update({name: (out[0] if isinstance(out, tuple) else out)[:, rows()].flatten(0, 1)})
    parts = [told.model.embedding, *told.model.blocks]
    hooks = [part.register_forward_hook(keep(f"{i} blocks")) for i, part in enumerate(parts)]
    told.model(told.tokens)
    for hook in hooks:
        hook.remove()
    found = probes.layer_curve(seen, told.meant.flatten(), groups=torch.arange(1000).repeat_interleave(PAIRS))
    print(found)
    results = list(found.results.values())
    before, behind = results[stacked.held], results[stacked.held + 1]
    assert before.score <= 0.15 and behind.score >= 0.95 and max(behind.controls.values()) <= 0.10


def test_t19_a_delta_rule_learns_eight_linear_maps():
    """Unit keys and beta = 1 make the state Kaczmarz' iterate; surprise falls with its error. The median of eight problems."""
    w, X = torch.randn(8, 16, 1).double(), torch.randn(8, 256, 16).double()
    n = X.norm(dim=-1, keepdim=True)
    k, v = (X / n)[:, :, None], (X @ w / n)[:, :, None]
    _, state, found = linear_attention(k, k, v, None, torch.ones(8, 256, 1).double(), return_state=True, record=("writes",))
    errors = (state.kv[:, 0] - w).norm(dim=(-2, -1)) / w.norm(dim=(-2, -1))
    surprise = (found.writes.norm(dim=-1) / v.norm(dim=-1))[..., 0]
    assert errors.median() <= 1e-3
    assert (surprise[:, :16].mean(1) / surprise[:, -16:].median(1).values).median() >= 100
