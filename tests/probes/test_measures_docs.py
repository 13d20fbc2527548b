"""The page on measures runs, and finds in models that it trains what its comments say, with slack for another machine's rounding."""

import re
from pathlib import Path

import pytest
import torch

PAGE = (Path(__file__).parents[2] / "docs" / "measures.md").read_text()
SECTIONS = {text.split("\n", 1)[0]: text for text in re.split(r"^## ", PAGE, flags=re.M)[1:]}


def run(*titles: str) -> dict:
    space: dict = {}
    for text in (SECTIONS["Controls"], *(SECTIONS[title] for title in titles)):
        for block in re.findall(r"```python\n(.*?)```", text, re.S):
            exec(block, space)
    return space


@pytest.mark.slow
def test_onions():
    """The one section without training: scales are the layer's decay, in closed form."""
    found = run("Onions: codes by magnitude")
    onion, decay = found["onion"], found["decay"]
    wanted = decay ** torch.arange(4.0, -1, -1).double()
    assert torch.allclose(onion.scales, wanted, rtol=1e-4) and onion.peeled.min() > 0.99 and onion.controls["shuffled labels"] < 0.25


@pytest.mark.slow
def test_relations_maps_and_directions():
    found = run("What a model knows by heart: relations, maps, directions")
    assert_above(found["relation"].faithfulness, 0.8, found["relation"].controls, 0.5)
    assert_above(found["lrc"].value, 0.8, found["lrc"].controls, 0.4)
    mat, across = found["mat"]["at the relation"], found["across"]
    assert mat.r2 > 0.8 > 0.6 > mat.controls["identity"][0] and mat.controls["shuffled rows"][0] < 0
    assert across.r2 > 0.9 and across.precision > 0.9 > 0.3 > max(precision for _, precision in across.controls.values())
    linear, kernel, _ = found["alike"]
    assert_above(linear.value, 0.7, linear.controls, 0.5)
    assert_above(kernel.value, 0.8, kernel.controls, 0.5)
    assert abs(found["batches"].result() - linear.value) < 0.15
    assert found["near"].value < 0.01 < found["near"].controls["untrained model"]
    assert found["spread"].value < found["spread"].controls["untrained model"]
    assert ((found["cosines"] - 8 / 7 * torch.eye(8) + 1 / 7).abs() < 0.05).all()


@pytest.mark.slow
def test_what_a_state_holds():
    found = run("What a state holds: readers found, associations counted")
    half_life, _, snr, remembered = found["figures"]
    assert 0.9 < remembered.controls["untrained model"] < remembered.value < 1
    assert half_life.value > 3 * half_life.controls["untrained model"] and snr.value > 2 * snr.controls["untrained model"]
    bilinear = found["found"]
    assert bilinear.score > 0.95 and bilinear.controls["shuffled labels"] < 0.2 and bilinear.controls["untrained model"] > 0.6
    assert_above(found["reader"].value, 0.8, found["reader"].controls, 0.3)
    direction = found["direction"].controls
    assert found["direction"].value > 0.95 and direction["without d"] < 0.65 and direction["without a random direction"] > 0.95
    assert found["erased"].score < 0.7 and found["erased_states"].score == pytest.approx(found["erased"].score, abs=0.02)
    assert found["apart"].value > found["apart"].controls["untrained model"]
    assert_above(found["ideal"].value, 0.7, found["ideal"].controls, 0.1)
    assert found["exact"] < 1e-12 and found["share"].argmax() == 2 * found["order"][0, 0] + 1


@pytest.mark.slow
def test_atoms():
    found = run("Atoms of what is written")
    code, adaptive = found["code"], found["adaptive"]
    assert found["bits"] < 2.6
    assert_above(code.explained, 0.75, code.controls, 0.55)
    assert code.active <= 8 and code.dead < 0.3 and adaptive.explained > 0.75 and adaptive.active < 9 and adaptive.complexity.score > 0.1


@pytest.mark.slow
def test_dissection():
    for found in run("Which channels see what")["seen"].values():
        assert len(found.detectors) > 15 and {concept for concept, _ in found.detectors.values()} == {0, 1, 2}
        assert found.controls["shuffled images"] < 3 and found.controls["untrained model"] < 12


def assert_above(value: float, least: float, controls: dict[str, float], most: float) -> None:
    assert value > least and max(controls.values()) < most
