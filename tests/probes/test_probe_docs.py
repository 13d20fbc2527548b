"""The page on probes says what runs."""

import re
from pathlib import Path


def test_the_examples_of_the_page_run(capsys):
    text = (Path(__file__).parents[2] / "docs" / "probes.md").read_text()
    space: dict = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.S):
        exec(block, space)
    assert space["q"].last_edit.leak < 1e-3
