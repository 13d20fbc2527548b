"""A trained decoder as a folder of transformers: the same logits, loss, tokens and generation, there where linattn is only installed."""

import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest
import torch
from launching import some_text
from rich.console import Console
from typer.testing import CliRunner

from linattn.cli import app
from linattn.models import Decoder, next_token_loss
from linattn.train import Config, tokenizer, train

transformers = pytest.importorskip("transformers")
ELSEWHERE = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
text = AutoTokenizer.from_pretrained(sys.argv[1])
tokens = torch.tensor([text("def f")["input_ids"]])
out = model.generate(tokens, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
torch.save(dict(tokens=out, text=text.decode(out[0]), loss=model(tokens, labels=tokens).loss.detach()), sys.argv[2])
"""


@pytest.mark.parametrize(
    "coder, sizes", [("bytes", dict(softmax_every=2)), pytest.param("bpe", dict(tie_embeddings=False), marks=pytest.mark.slow)]
)
def test_the_same_there(tmp_path, coder, sizes):
    (tmp_path / "text").mkdir()
    config = Config(
        data=(str(some_text(tmp_path / "text")),), tokenizer=coder, vocab_size=300, variant="mamba2", held_out=0.2, context=16, batch=2,
        overrides=dict(dim=32, num_layers=2, **sizes), steps=2, warmup=1, device="cpu",
    )  # fmt: skip
    done = train(config, tmp_path / "run", console=Console(file=StringIO()))
    said = CliRunner().invoke(app, ["export", str(tmp_path / "run"), str(tmp_path / "out")])
    assert said.exit_code == 0, said.output
    root = Path(__file__).parent.parent.parent
    command = [sys.executable, "-W", "ignore", "-c", ELSEWHERE, str(tmp_path / "out"), str(tmp_path / "found.pt")]
    there = {
        "PYTHONPATH": str(root),
        "PATH": "/usr/bin:/bin",
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "1",
        "DS_ACCELERATOR": "cpu",
    }
    ran = subprocess.run(command, capture_output=True, text=True, env=there, timeout=300)
    assert ran.returncode == 0, ran.stderr
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    model, ours = Decoder.from_pretrained(done.checkpoint), tokenizer.load(done.checkpoint / "tokenizer.json")
    prompt = ours.encode([b"def f"])[0].long()[None]
    wanted = model.generate(prompt, 12, temperature=0)
    assert found["tokens"][0, prompt.shape[1] :].tolist() == wanted[0].tolist()[-12:]
    assert found["text"] == ours.decode(found["tokens"][0].tolist()).decode(errors="replace")
    torch.testing.assert_close(found["loss"], next_token_loss(model(prompt)[0], prompt).detach())
    again = CliRunner().invoke(app, ["export", str(tmp_path / "run"), str(tmp_path / "out")])
    assert again.exit_code == 2 and "is there already" in again.output
