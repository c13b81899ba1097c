"""Programs in the docs: every block of Python in docs/ runs as it stands there, and prints something."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"
BLOCKS = {
    f"{page.stem}-{number}": block
    for page in sorted(DOCS.glob("*.md"))
    for number, block in enumerate(re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.M | re.S))
}

LONG = ("attribution-0", "circuits-0")
"""More than a few seconds while shapes are checked: they run with the long tests."""


def test_what_is_from_python_only_has_a_program():
    programs = "".join(block for name, block in BLOCKS.items() if name.startswith("circuits"))
    for name in ("probe", "codes", "signals", "neuron_path", "flow_heads"):
        assert f"{name}(" in programs
    assert {*LONG} <= {*BLOCKS}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.long] if name in LONG else []) for name in BLOCKS])
def test_programs_in_the_docs_run(name: str, capsys: pytest.CaptureFixture[str]):
    exec(compile(BLOCKS[name], f"docs: {name}", "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out.strip()
