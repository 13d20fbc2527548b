"""The table says what the model's own states say, and the page holds its figures, shows its text, and loads nothing."""

import base64
import io
import math
import re
import shutil
import subprocess

import pytest
import torch
from typer.testing import CliRunner

import linattn
from linattn import Decoder, Encoder, VisionTransformer, cli, probes
from linattn.layers import Mixer
from linattn.layers.decays import Place
from linattn.layers.variants import Variant
from linattn.models import L2ViT

TEXT = "To be, or not: <b>déjà $x$ vu</b> & 日本."


def test_the_table_is_of_the_models_own_states(decoder, tokens):
    model = decoder("retnet")
    with torch.no_grad(), linattn.probe(model, keep=("final", "writes", "gates", "reads")) as p:
        _, after = model(tokens, return_state=True)
    table = p.report()
    assert [(row.layer, row.head) for row in table.rows] == [(name, h) for name in p for h in range(2)]
    for row, (layer, h) in zip(table.rows, [(0, 0), (0, 1), (1, 0), (1, 1)], strict=True):
        S = after[layer].recurrent.kv[:, h].double()
        eigen = torch.linalg.eigvalsh(S.mT @ S)
        assert row.norm == pytest.approx(float(eigen.sum(-1).sqrt().mean()), rel=1e-4)
        assert row.participation == pytest.approx(float((eigen.sum(-1) ** 2 / eigen.square().sum(-1)).mean()), rel=1e-4)
        assert row.half_life == pytest.approx(math.log(0.5) / math.log(1 - 2.0 ** (-5 - h)), rel=1e-3)  # RetNet's constants
        assert row.bytes == S[0].numel() * 4
        assert row.beta is None and row.surprise is None and row.turned is None and row.side is None
    lines = str(table).splitlines()
    assert len(lines) == 6 and "half-life" in lines[0] and "surprise" not in lines[0] and lines[-1] == "no control"
    assert f"{table.rows[2].norm:.3g}" in lines[3].split() and lines[3].startswith(list(p)[1])
    assert table._repr_html_().count("<tr>") == 5 and "no control" in table._repr_html_()


def test_controls_stand_below_their_rows(decoder, tokens):
    model, tables = decoder("gla"), []
    for each in (model, probes.untrained(model)):
        with torch.no_grad(), linattn.probe(each, keep=("final", "gates")) as p:
            each(tokens)
        tables.append(p.report())
    table = p.report(against={"trained": tables[0], "itself": tables[1]})
    lines = str(table).splitlines()
    assert len(lines) == 1 + 4 * 3 + 1 and lines[-1] == "controls: trained, itself"
    for row, other, *three in zip(tables[1].rows, tables[0].rows, lines[1::3], lines[2::3], lines[3::3]):
        assert f"{row.norm:.3g}" in three[0].split() and three[0].split()[1:] == three[2].split()[1:]
        assert three[1].split()[0] == "trained" and f"{other.norm:.3g}" in three[1].split() and row.norm != other.norm
    assert table._repr_html_().count("<tr>") == 1 + 4 * 3
    with torch.no_grad(), linattn.probe(model, layers=1) as p:
        model(tokens)
    with pytest.raises(ValueError, match=r"against\['trained'\] must be a report of the same layers"):
        p.report(against={"trained": tables[0]})


def test_a_delta_rule_has_its_columns_and_padding_is_not_counted(decoder, tokens):
    model = decoder("gated_delta")
    with torch.no_grad(), linattn.probe(model, keep=("writes", "gates", "reads")) as p:
        model(tokens)
    row, trace = p.report().rows[1], p[0]
    assert row.beta == pytest.approx(float(trace.beta[..., 1].mean()), rel=1e-5) and 0 <= row.turned <= 1 and row.surprise > 0
    assert row.norm is None and row.bytes is None  # final was not kept

    mixer = Mixer(Variant(source="test"), Place(8, 2, 4))
    x, q, k, v = torch.randn(1, 9, 8), *torch.randn(3, 1, 9, 2, 4)
    mask = torch.arange(9)[None] < 6
    with torch.no_grad(), linattn.probe(mixer, keep="writes") as p:
        mixer(x, q, k, v, mask=mask)
    real = (k.norm(dim=-1) * v.norm(dim=-1))[:, :6].mean((0, 1))
    assert [row.write for row in p.report().rows] == pytest.approx(real.tolist(), rel=1e-4)
    assert all(row.half_life == math.inf for row in p.report().rows) and "∞" in str(p.report())


def test_a_bidirectional_layer_has_a_row_for_each_side(tmp_path):
    mixer = Mixer(Variant(source="test"), Place(8, 2, 4), causal=False, gating="source")
    with torch.no_grad(), linattn.probe(mixer, keep=("final", "writes", "reads")) as p:
        mixer(torch.randn(1, 9, 8), *torch.randn(3, 1, 9, 2, 4))
    rows = p.report().rows
    assert [(row.side, row.head) for row in rows] == [("left", 0), ("left", 1), ("right", 0), ("right", 1)]
    assert [row.norm for row in rows] == pytest.approx(p[0].final[:, 0].norm(dim=(-2, -1)).flatten().tolist(), rel=1e-5)
    p.save(tmp_path / "t.safetensors")
    assert probes.load(tmp_path / "t.safetensors").report() == p.report()


def test_nothing_to_report_is_said(decoder, tokens):
    model = decoder()
    with linattn.probe(model, keep="output") as p:
        with pytest.raises(ValueError, match="nothing was kept"):
            p.report()
        model(tokens)
    with pytest.raises(ValueError, match="keep must name 'final'"):
        p.report()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    torch.manual_seed(0)
    Decoder.create("tiny", vocab_size=257, variant="gated_delta", dim=32, num_layers=2, num_heads=2).save_pretrained(folder)
    return folder


def run(*args):
    return CliRunner().invoke(cli.app, ["probe", *map(str, args), "--threads", "1", "--device", "cpu"], env={"COLUMNS": "200"})


@pytest.fixture(scope="module")
def written(saved):
    pytest.importorskip("matplotlib")
    out = saved.parent / "report.html"
    result = run(saved, "--text", TEXT, "--at", 7, "--out", out)
    assert result.exit_code == 0, result.output
    assert "half-life" in result.output and "2 layers" in result.output and "controls: untrained model" in result.output
    return out


def test_the_page_holds_what_it_says(written):
    from matplotlib.image import imread

    page = written.read_text(encoding="utf-8")
    images = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert len(images) == 1 + 2 * 3  # by layer; of each layer its states, its attention, and that of all tokens
    for image in images:
        pixels = imread(io.BytesIO(base64.b64decode(image)))
        assert pixels.shape[0] > 100 and pixels.std() > 0.01
    assert page.count("src=") == len(images) and "http:" not in page and "https:" not in page and "<script" not in page
    assert page.count("<span") == 2 * len(TEXT.encode()) and page.count('class="at"') == 2
    assert "<b>" not in page and "&lt;" in page
    for text in re.findall(r'<div class="text">(.*?)</div>', page, re.S):
        shares = [float(x) for x in re.findall(r"rgba\(200,85,61,([\d.]+)\)", text)]
        assert max(shares) == 1 and len(shares) <= 8  # token 7 sees eight tokens and none that follows


def test_what_is_drawn_is_what_was_kept(decoder, tokens):
    pytest.importorskip("matplotlib")
    from linattn.probes import plots

    model = decoder()
    with torch.no_grad(), linattn.probe(model, keep=("final", "writes", "reads")) as p:
        model(tokens)
    shown = plots.states(p[0], 40, sequence=1).axes[1].images[0].get_array()
    assert torch.equal(torch.tensor(shown.data), p[0].state(40)[1, 1])
    shown = plots.attention(p[1], 99).axes[0].images[0].get_array()
    assert torch.equal(torch.tensor(shown.data), p[1].attention([99])[0, :, 0])
    maps = [torch.tensor(axes.images[0].get_array().data) for axes in plots.pooled(p[0], 10, sequence=1).axes[:2]]
    exact = p[0].attention(range(100))[1].abs().unflatten(-1, (10, 10)).sum(-1).unflatten(1, (10, 10)).sum(2)
    assert torch.allclose(torch.stack(maps), exact, atol=1e-5)
    with pytest.raises(ValueError, match="words must be one for each of 100 tokens; got 1"):
        plots.attention(p[0], 5, ["a"])
    with pytest.raises(ValueError, match="sequence must be one of the 2"):
        plots.states(p[0], sequence=2)


def test_a_curve_is_drawn_with_its_controls():
    pytest.importorskip("matplotlib")
    from linattn.probes import plots

    y = torch.arange(60) % 2
    layers = {"a": torch.randn(60, 4), "b": torch.randn(60, 4) + 3 * y[:, None]}
    found = probes.layer_curve(layers, y, untrained=dict.fromkeys(layers, torch.randn(60, 4)))
    lines = {line.get_label(): list(line.get_ydata()) for line in plots.curve(found).axes[0].lines}
    assert list(lines) == ["probe", *found.results["a"].controls, "chance"] and "untrained model" in lines
    assert lines["probe"] == [found.results["a"].score, found.results["b"].score]
    assert plots.curve(probes.layer_curve(layers, y, controls=())).axes[0].get_title() == "no control"


@pytest.mark.parametrize(
    "args, said",
    [
        (["--text", ""], "text must be at least one token"),
        (["--text", "abc", "--at", "3"], "at must be one of the 3 tokens, from 0"),
        ([], "text must be given, and nothing else, for the Decoder"),
        (["--text", "abc", "--image", "x.png"], "got text and image"),
        (["--text", "abc", "--out", "no/such/folder/report.html"], "out must be a file in a folder that is there"),
    ],
)
def test_bad_input_is_one_line(saved, args, said):
    pytest.importorskip("matplotlib")
    result = run(saved, *args)
    assert result.exit_code == 2 and said in result.output


@pytest.fixture(scope="module")
def pictured(tmp_path_factory):
    """The page of a picture in four quarters, two of them bright, seen by a model of one scan and by one of two curves."""
    pytest.importorskip("matplotlib")
    image = pytest.importorskip("PIL.Image")
    folder, pages = tmp_path_factory.mktemp("pictured"), []
    image.new("RGB", (50, 40)).save(folder / "dark.png")
    for name in ("lion_s", "retnet_natural"):
        torch.manual_seed(0)
        model = VisionTransformer.create(f"vit_micro_{name}", img_size=(32, 48), patch_size=8, num_classes=3, num_layers=1)
        model.save_pretrained(folder / name)
        result = run(folder / name, "--image", folder / "dark.png", "--at", 8, "--out", folder / f"{name}.html")
        assert result.exit_code == 0, result.output
        pages.append(folder / f"{name}.html")
    return pages


def test_the_page_of_an_image(pictured):
    for page, curves in zip(pictured, (1, 2), strict=True):
        text = page.read_text(encoding="utf-8")
        assert text.count("data:image/png") == 1 + curves * 4  # by layer; of each walk two states, the image, all tokens
        assert "32 × 48 pixels in 4 × 6 patches" in text and "the patch in row 1, column 1" in text and "<span" not in text


@pytest.mark.parametrize("name", ["lion_s", "retnet_natural"])
def test_attention_lies_over_the_patches_it_is_of(name):
    pytest.importorskip("matplotlib")
    from linattn.probes import plots

    torch.manual_seed(0)
    model = VisionTransformer.create(f"vit_micro_{name}", img_size=(32, 48), patch_size=8, num_classes=3, num_layers=1).eval()
    image = torch.randn(2, 3, 32, 48)
    with torch.no_grad(), linattn.probe(model, keep=("final", "reads")) as p:
        model(image)
    for trace in (p[i] for i in range(len(p))):
        order = torch.arange(25) if trace.order is None else trace.order
        at = int((order == 9).nonzero())
        figure = plots.over_image(trace, image[1], (4, 6), 9, sequence=1)
        picture, map_ = figure.axes[1].images
        assert torch.equal(torch.tensor(picture.get_array().data), image[1].mean(0))
        by_token = torch.empty(25)
        by_token[order] = trace.attention([at])[1, 1, 0]
        assert torch.equal(torch.tensor(map_.get_array().data), by_token[1:].view(4, 6))
        mean = torch.empty(25)
        mean[order] = trace.attention(range(25))[1, 1].abs().mean(0)
        assert torch.allclose(torch.tensor(figure.axes[3].images[1].get_array().data), mean[1:].view(4, 6), atol=1e-6)
    with pytest.raises(ValueError, match="grid must be rows and columns"):
        plots.over_image(p[0], image[0], (5, 6))


def test_the_page_of_a_text_seen_from_both_sides(tmp_path):
    pytest.importorskip("matplotlib")
    torch.manual_seed(0)
    Encoder.create("tiny", vocab_size=257, dim=32, num_layers=1).save_pretrained(tmp_path / "encoder")
    result = run(tmp_path / "encoder", "--text", "a text", "--out", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert result.exit_code == 0 and page.count("data:image/png") == 1 + 4 and page.count("<span") == 6


def test_the_page_of_a_swapped_model(tmp_path):
    """The layer that was swapped, a text in the tokens of the model's own tokenizer, and a control that was swapped too."""
    pytest.importorskip("matplotlib")
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    shape = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=5, pad_token_id=None)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, bos_token_id=None, eos_token_id=0))
    linattn.swap_attention(model, "hedgehog", layers=[1])
    model.save_pretrained(tmp_path)
    assert "the text token 121: save its tokenizer beside it" in run(tmp_path, "--text", "my text", "--out", tmp_path / "a.html").output
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"</s>": 0, "to": 1, "be": 2, "or": 3, "not": 4}, unk_token="</s>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>").save_pretrained(tmp_path)
    result = run(tmp_path, "--text", "to be or not to be", "--out", tmp_path / "a.html")
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert result.exit_code == 0 and "1 layers" in result.output and "controls: untrained model" in result.output, result.output
    assert page.count("<span") == 6 and ">not</span>" in page and page.count("data:image/png") == 1 + 3
    assert "layers.1.self_attn.mixer" in page and "text must be given, and nothing else, for the LlamaForCausalLM" in run(tmp_path).output


def test_the_page_of_a_pyramid(tmp_path):
    """Each layer of L²ViT has patches of its own size; only its global attention is linear."""
    pytest.importorskip("matplotlib")
    pytest.importorskip("PIL.Image").new("RGB", (50, 40)).save(tmp_path / "dark.png")
    L2ViT.create("l2vit_tiny", depths=(1, 1, 2, 2), dims=(32, 32, 32, 32), num_classes=0).save_pretrained(tmp_path / "model")
    result = run(tmp_path / "model", "--image", tmp_path / "dark.png", "--out", tmp_path / "a.html")
    assert result.exit_code == 0 and "2 layers" in result.output, result.output
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert "224 × 224 pixels in 14 × 14, 7 × 7 patches" in page and page.count("data:image/png") == 1 + 2 * 4
    assert "at must not be given for a pyramid" in run(tmp_path / "model", "--image", tmp_path / "dark.png", "--at", 3).output


def test_a_picture_that_cannot_be_read(pictured):
    folder = pictured[0].parent / "lion_s"
    (folder.parent / "no.png").write_text("no picture")
    for args, said in (
        (["--image", folder.parent / "no.png"], "cannot be read as an image"),
        (["--image", folder.parent / "dark.png", "--at", 25], "at must be one of the 25 tokens"),
        (["--text", "abc"], "image must be given, and nothing else, for the VisionTransformer"),
    ):
        result = run(folder, *args)
        assert result.exit_code == 2 and said in result.output, result.output


@pytest.mark.parametrize("kind", ["written", "pictured"])
def test_a_browser_shows_the_page(kind, request):
    """Under the page's own policy of loading nothing, but for the script by which the browser tells what it drew."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium on the PATH")
    written = request.getfixturevalue(kind)
    written = written if kind == "written" else written[1]
    copy = written.with_name("told.html")
    script = "<script>onload = () => document.title = [...document.images].filter(i => i.naturalWidth > 100).length + ' drawn'</script>"
    page = written.read_text(encoding="utf-8").replace("default-src 'none';", "default-src 'none'; script-src 'unsafe-inline';", 1)
    copy.write_text(page.replace("</body>", f"{script}</body>"), encoding="utf-8")
    command = [
        browser,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={copy.parent / 'profile'}",
        "--dump-dom",
        copy.as_uri(),
    ]
    dom = subprocess.run(command, capture_output=True, timeout=120).stdout.decode()
    figures = written.read_text(encoding="utf-8").count("data:image/png")
    assert f"<title>{figures} drawn</title>" in dom and figures >= 7
    assert dom.count("<td>") == written.read_text(encoding="utf-8").count("<td>") > 0
