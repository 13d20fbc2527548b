"""Saving and loading: what comes back is what went out, a failed save changes nothing, and a broken folder says what is wrong with it."""

import json
import resource

import pytest
import torch
from hashes import fitted
from safetensors.torch import load_file, save_file

from linattn.models import Decoder, DecoderConfig
from linattn.models.config import MIXERS

SIZES = dict(vocab_size=17, dim=16, num_layers=2, num_heads=2, mlp_dim=24)


def make(variant="gla", **sizes):
    return fitted(Decoder(DecoderConfig(variant=variant, **{**SIZES, **sizes})))


@pytest.fixture
def folder(tmp_path):
    make().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def edit(folder, **fields):
    config = json.loads((folder / "config.json").read_text())
    config.update(fields)
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value != "gone"}))


@pytest.mark.parametrize("variant", MIXERS)
def test_round_trip(variant, tmp_path):
    model, text = make(variant, softmax_every=2, tie_embeddings=variant != "gla"), torch.randint(0, 17, (1, 9))
    model.save_pretrained(tmp_path)
    before = torch.random.get_rng_state()
    again = Decoder.from_pretrained(tmp_path)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert again.config == model.config
    assert torch.equal(again(text)[0], model(text)[0])
    for (name, one), (_, other) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert vars(one) == vars(other), name  # _no_weight_decay
        assert other.requires_grad


def test_dtypes_are_kept(tmp_path):
    make("mamba2").bfloat16().save_pretrained(tmp_path)
    assert {p.dtype for p in Decoder.from_pretrained(tmp_path).parameters()} == {torch.bfloat16}


def test_tied_embeddings_are_saved_once(folder):
    names = load_file(folder / "model.safetensors").keys()
    assert "embedding.weight" in names and "head.weight" not in names


def test_only_two_files(folder):
    make().save_pretrained(folder)  # over the old ones
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_a_full_disk_leaves_the_old_model(folder):
    old = {path.name: path.read_bytes() for path in folder.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))  # no file beyond 8 KiB: what a full disk does, to one process
    try:
        with pytest.raises(OSError, match=r"could not save the model in .*; what was there before is as it was"):
            make().save_pretrained(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == old
    Decoder.from_pretrained(folder)


def test_a_failing_sync_leaves_the_old_model(folder, monkeypatch):
    old = {path.name: path.read_bytes() for path in folder.iterdir()}

    def fail(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="No space left on device; what was there before is as it was"):
        make().save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == old


def refused(folder, kind, message):
    with pytest.raises(kind, match=message):
        Decoder.from_pretrained(folder)


def test_missing(folder, tmp_path):
    refused(tmp_path / "nowhere", FileNotFoundError, "there is no folder .*nowhere to load a model from")
    (folder / "model.safetensors").unlink()
    refused(folder, FileNotFoundError, r"holds no model: model.safetensors is missing")
    (folder / "config.json").unlink()
    refused(folder, FileNotFoundError, r"holds no model: config.json is missing")


@pytest.mark.parametrize("keep", [0, 5, 100, 4000])
def test_truncated_weights(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(folder, ValueError, "model.safetensors is truncated, or no safetensors file")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"model_type": ', "config.json cannot be read"),
        ("\xff", "config.json cannot be read"),
        ("[1, 2]", "model_type must be 'linattn_decoder'; got 'no object but list'"),
        ('{"model_type": "llama", "hidden_size": 64}', "is not of a linattn decoder: model_type must be 'linattn_decoder'; got 'llama'"),
        ('{"dim": 64}', "got None"),
    ],
)
def test_foreign_configs(folder, text, message):
    (folder / "config.json").write_text(text, encoding="latin-1")
    refused(folder, ValueError, message)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(hidden_size=3), "config.json has no field 'hidden_size'; there are .*'dim'"),
        (dict(vocab_size="gone"), "config.json: .*vocab_size"),
        (dict(num_layers=0), "config.json: num_layers must be an integer, at least 1; got 0"),
        (dict(variant="gal"), "config.json: variant must be one of .*; got 'gal'"),
        (dict(dim=32), r"does not fit its config.json: embedding.weight must be \(17, 32\); got \(17, 16\)"),
        (dict(num_layers=3), r"it lacks blocks.2.norm1.weight, .* and \d+ more"),
        (dict(num_layers=1), r"it has besides blocks.1..* and \d+ more"),
        (dict(norm_eps=1e-3), r"are of different saves: \{'norm_eps': 1e-05\} in the one, \{'norm_eps': 0.001\} in the other"),
    ],
)
def test_configs_that_do_not_fit(folder, fields, message):
    edit(folder, **fields)
    refused(folder, ValueError, message)


def test_foreign_weights(folder):
    save_file({"transformer.wte.weight": torch.zeros(4, 4)}, folder / "model.safetensors")
    refused(folder, ValueError, "it lacks embedding.weight, .* it has besides transformer.wte.weight")


def test_weights_that_are_not_numbers_of_the_right_kind(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["norm.weight"] = tensors["norm.weight"].long()
    save_file(tensors, folder / "model.safetensors")
    refused(folder, ValueError, r"norm.weight must be of \('F64', .*\); got I64")
