"""Small models beside each other: what a record says of its runs, that a run is kept and not done twice, that bad names are refused."""

import json
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from bench import learning, resolution
from bench.__main__ import app


def row(case, seed, accuracy, task="mnist5k"):
    curve = [(0, 0.1), (400, accuracy)]
    return dict(
        task=task, case=case, variant=case, seed=seed, overrides={}, config=dict(steps=400), accuracy=accuracy, curve=curve, cpu_s=10.0
    )


ROWS = [row(case, seed, value + seed / 100) for case, value in (("softmax", 0.9), ("near", 0.895), ("far", 0.88)) for seed in range(3)]


def test_summary_holds_each_against_the_first():
    first, near, far = learning.summary(ROWS)
    assert (first["case"], first["seeds"], first["against_first"]) == ("softmax", 3, 0.0)
    assert first["mean"] == pytest.approx(0.91) and first["std"] == pytest.approx(0.01)
    assert near["against_first"] == pytest.approx(-0.005) and far["against_first"] == pytest.approx(-0.02)


def test_record_table_and_plot(tmp_path):
    facts = dict(part="accuracy", command="python -m bench vision accuracy", machine={"cpu": "a chip"}, versions={"torch": "2"})
    path = tmp_path / "vision-accuracy.json"
    path.with_suffix(".jsonl").write_text("")
    learning.save(path, learning.pick("accuracy", None), ROWS, True, facts)
    assert len(json.loads(path.read_text())["rows"]) == 9 and not path.with_suffix(".jsonl").exists()
    table = path.with_suffix(".md").read_text()
    assert "| far | 89.0 | 88.0, 89.0, 90.0 | -2.0 (more than a point short) |" in table
    assert "| near | 90.5 | 89.5, 90.5, 91.5 | -0.5 |" in table
    assert path.with_suffix(".png").stat().st_size > 10_000


def test_a_run_is_kept_and_not_done_twice(tmp_path, monkeypatch):
    task = learning.PARTS["accuracy"]["digits"]
    tasks = {"digits": replace(task, overrides=dict(num_layers=1, dim=16), config=task.config | dict(steps=2, batch=4))}
    kept, said = tmp_path / "kept.jsonl", []
    rows, complete = learning.run(tasks, kept, 1, said.append, ["linear"])
    assert complete and [line["case"] for line in rows] == ["linear"] and len(said) == 1 and rows[0]["curve"][-1][0] == 2
    kept.write_text(kept.read_text() + json.dumps(row("linear", 0, 0.5, "digits")) + "\n")  # of another config: not this run
    monkeypatch.setattr(learning, "_trained", lambda *run: None)  # as if stopped: what is there is not lost
    assert learning.run(tasks, kept, 2, said.append, ["linear"]) == (json.loads(json.dumps(rows)), False) and len(said) == 1


def test_every_case_is_a_model():
    for part in learning.PARTS.values():
        for task in part.values():
            assert len({case.label for case in task.cases}) == len(task.cases)


@pytest.mark.parametrize(
    "arguments, message", [("nothing", "part must be"), ("accuracy --task x", "task must be"), ("longrange --variant x", "variant must be")]
)
def test_bad_names(tmp_path, arguments, message):
    done = CliRunner().invoke(app, ["vision", *arguments.split(), "--out", str(tmp_path)])
    assert done.exit_code == 2 and message in done.output and not list(tmp_path.iterdir())


def test_resolution_measures_and_draws(tmp_path, monkeypatch):
    monkeypatch.setattr(resolution, "MODES", resolution.MODES[1:])  # a process for its time, a process for its memory
    rows = resolution.run(["linear"], [64], "cpu", lambda line: None)
    assert [(line["mode"], line["tokens"]) for line in rows] == [("forward+backward", 16)]
    assert rows[0]["seconds"] > 0 and rows[0]["peak_bytes"] > 0
    resolution.save(tmp_path / "a.json", rows, command="")
    assert (tmp_path / "a.png").stat().st_size > 10_000 and json.loads((tmp_path / "a.json").read_text())["rows"] == rows


def test_resolution_says_what_failed():
    with pytest.raises(ValueError, match=r"times of .*'size': 65.* failed: ValueError: img_size must be a multiple"):
        resolution.run(["linear"], [65], "cpu", lambda line: None)
