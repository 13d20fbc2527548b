"""With its coefficients held still a model is a matrix: output = J · input, to rounding in float64, and biases make up all that is left."""

import pytest
import torch

import linattn
from linattn import VARIANTS, LinearAttention, VisionTransformer, probes
from linattn.layers import SparseStateExpansion, snakes

QUICK = ("linear", "mamba2", "gla", "gated_delta", "kda", "taylorshift", "softmax")
NAMES = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in (*VARIANTS, "softmax")]


def sharp(model):
    """In float64, with weights large enough that nothing is nearly linear anyway, and biases that are not 0."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in model.double().named_parameters():
            p.copy_(4 * p if p.ndim > 1 else p + 0.1 * torch.randn_like(p) * name.endswith("bias"))
    return model


def by_biases(model, f, x):
    """Σ_b ∂f/∂b · b, each bias an input of its own: what the biases add to f(x), after f alone is called."""
    biases = [p for name, p in model.named_parameters() if name.endswith("bias")]
    for b in biases:
        b.requires_grad_(True)
    y = f(x.clone().requires_grad_(True)).flatten()
    parts = torch.zeros_like(y)
    for i, one in enumerate(y.unbind()) if biases else ():
        grads = torch.autograd.grad(one, biases, retain_graph=True, allow_unused=True)
        parts[i] = sum((g * b).sum() for g, b in zip(grads, biases) if g is not None)
    return parts.detach()


@pytest.mark.parametrize("variant", NAMES)
def test_a_decoder_is_one_matrix(decoder, variant):
    """T16, for every variant: the value is the model's, J x plus what biases add is that value, and the plain Jacobian is far off."""
    model = sharp(decoder(variant, num_layers=2))
    x = torch.randn(1, 9, 32, dtype=torch.float64)

    def f(x):
        for block in model.blocks:
            x = block(x)[0]
        return model.norm(x)[0, -1, :8]

    plain = f(x).detach()
    with probes.frozen_coefficients(model):
        J, rest = probes.jacobian(f, x)
        added = by_biases(model, f, x)
    scale = plain.norm()
    assert ((J @ x.flatten() + rest) - plain).norm() <= 1e-12 * scale
    assert (rest - added).norm() <= 1e-10 * scale
    assert probes.jacobian(f, x)[1].norm() > 0.5 * scale
    assert all(p.requires_grad for p in model.parameters()) and f(x).requires_grad


def test_a_layer_by_hand():
    """J from token j to output t is W_o · diag(norm and gate of t) · a_tj · W_v, with the attention that a probe finds."""
    torch.manual_seed(0)
    layer = LinearAttention(16, 2, "gla").double()
    x = torch.randn(1, 8, 16, dtype=torch.float64)
    with linattn.probe(layer, keep=("reads", "output")) as p, torch.no_grad():
        layer(x)
    with probes.frozen_coefficients(layer):
        J = probes.jacobian(lambda x: layer(x)[0][0, 6], x)[0].unflatten(1, (8, 16))
    a, o = p[0].attention([6])[0, :, 0], p[0].o[0, 6]  # [H T], [H V]
    opened = torch.nn.functional.silu(layer.g_proj(x[0, 6])).view_as(o) * layer.norm.weight
    scale = (opened / (o.square().mean(-1, keepdim=True) + layer.norm.eps).sqrt()).flatten()  # [H·V]
    heads = a.repeat_interleave(o.shape[1], 0)  # [H·V T]
    by_hand = torch.einsum("oc,c,ct,ci->oti", layer.o_proj.weight, scale, heads, layer.v_proj.weight)
    assert torch.allclose(J, by_hand, atol=1e-12) and not J[:, 7].any()


def test_an_image_model_and_its_biases():
    model = sharp(VisionTransformer.create("vit_tiny_lion_s", img_size=16, patch_size=8, num_classes=3, dim=24, num_layers=2, num_heads=2))
    image = torch.randn(1, 3, 16, 16, dtype=torch.float64)
    model.eval()
    with probes.frozen_coefficients(model):
        rest = probes.jacobian(model, image)[1]
        token = model.prefix.requires_grad_(True)  # an input that the model brings along, as biases are
        y = model(image)[0]
        own = torch.stack([(torch.autograd.grad(one, token, retain_graph=True)[0] * token).sum() for one in y])
        added = by_biases(model, model, image) + own.detach()
    assert (rest - added).norm() <= 1e-10 * y.norm() and rest.norm() > 1e-3 * y.norm()


@pytest.mark.parametrize("kind", ["sparse state expansion", "two curves"])
def test_layers_that_cannot_be_probed(kind):
    torch.manual_seed(0)
    layer = (
        SparseStateExpansion(32, 2, partitions=4, active=2) if kind[0] == "s" else LinearAttention(32, 2, "lion_d", causal=False, curves=2)
    )
    curves = {} if kind[0] == "s" else {"curves": snakes([(3, 4)])}
    layer, x = layer.double(), torch.randn(1, 12, 32, dtype=torch.float64)
    f = lambda x: layer(x, **curves)[0][0, -1]
    with probes.frozen_coefficients(layer):
        assert probes.jacobian(f, x)[1].norm() < 1e-10 * f(x).norm()
    assert probes.jacobian(f, x)[1].norm() > 1e-3 * f(x).norm()


@pytest.mark.slow
def test_beside_a_probe_and_in_a_foreign_model():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=20, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1
    )
    model = transformers.LlamaForCausalLM(config).eval()
    linattn.swap_attention(model, "hedgehog", layers=[1])
    model.double()
    x = torch.randn(1, 7, 32, dtype=torch.float64)
    f = lambda x: model.model(inputs_embeds=x, use_cache=False).last_hidden_state[0, -1, :5]
    with linattn.probe(model, keep=("writes",)) as p, probes.frozen_coefficients(model):
        rest = probes.jacobian(f, x)[1]
    assert rest.norm() < 1e-6 * f(x).norm() and p[0].u.shape[1] == 7  # its norms are in float32
    assert probes.jacobian(f, x)[1].norm() > 0.5 * f(x).norm()


def test_what_is_not_known_is_refused():
    class Squares(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = torch.nn.Linear(3, 3, bias=False), torch.nn.Linear(3, 3, bias=False)

        def forward(self, x):
            return self.left(x) * self.right(x)

    class Overwrites(torch.nn.Module):
        def forward(self, x):
            return (2 * x).exp_()

    model, x = Squares(), torch.randn(3, requires_grad=True)
    with pytest.raises(ValueError, match="mul multiplies two tensors"), probes.frozen_coefficients(model):
        model(x)
    with probes.frozen_coefficients(model, gates=["left"]):
        assert probes.jacobian(model, x)[1].norm() < 1e-6
    with pytest.raises(ValueError, match="matches nothing"), probes.frozen_coefficients(model, gates=["middle"]):
        pass
    with pytest.raises(ValueError, match="must not overwrite"), probes.frozen_coefficients(Overwrites()):
        Overwrites()(x)
    assert all(p.requires_grad and not p.grad for p in model.parameters())
    for module in (torch.nn.GLU(), torch.nn.Softsign(), torch.nn.Hardtanh(), torch.nn.GELU(), torch.nn.Sequential(torch.nn.LayerNorm(4))):
        x = torch.randn(4, dtype=torch.float64)
        with probes.frozen_coefficients(module.double()):
            J, rest = probes.jacobian(module, x)
        assert torch.allclose(J @ x, module(x)) and rest.abs().max() < 1e-12
    with probes.frozen_coefficients(torch.nn.ReLU(inplace=True)) as relu:  # x itself is left as it is
        assert relu(2 * x).allclose(2 * x.relu())
