"""The house: the package starts fast, and what the documents name exists and runs."""

import importlib
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = ["method", "paper", "function", "command", "verified by", "limits"]
START = "import patchclamp"
HELP = """
import sys
from patchclamp.cli import main
sys.argv = ["patchclamp", "--help"]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
"""
MEASURE = """
import sys, time
heavy = sorted({"torch", "transformers"} & set(sys.modules))
print("\\n" + str(time.process_time()) + " " + ",".join(heavy))
"""


# --- starting


@pytest.mark.parametrize("program", [START, HELP], ids=["import patchclamp", "patchclamp --help"])
def test_starts_fast_and_without_torch(program: str, record_property: Callable[[str, object], None]) -> None:
    """Under 0.5 s of processor time, the interpreter's own start included; the best of three, since machines are busy."""
    seconds: list[float] = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", program + MEASURE], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        spent, heavy = done.stdout.splitlines()[-1].split(" ")
        assert heavy == "", f"imported at start: {heavy}"
        seconds.append(float(spent))
    record_property("seconds", min(seconds))
    assert min(seconds) < 0.5, f"took {min(seconds):.2f} s of processor time at best, of {seconds}"


# --- docs/methods.md


def method_rows() -> list[dict[str, str]]:
    """The rows of the table in docs/methods.md; a bar inside a cell is written `\\|`."""
    lines = [line for line in (ROOT / "docs/methods.md").read_text().splitlines() if line.startswith("|")]
    table = [[cell.strip().replace(r"\|", "|") for cell in re.split(r"(?<!\\)\|", line.strip().strip("|"))] for line in lines]
    assert table[0] == COLUMNS, f"the table's columns are {table[0]}, not {COLUMNS}"
    assert all(len(row) == len(COLUMNS) for row in table), [row for row in table if len(row) != len(COLUMNS)]
    return [dict(zip(COLUMNS, row, strict=True)) for row in table[2:]]


def quoted(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def function_fault(path: str) -> str:
    """Why a dotted path cannot be imported, or nothing."""
    module, _, last = path.rpartition(".")  # a function may be called as the module that it comes from
    attributes = [last]
    while True:
        try:
            found = importlib.import_module(module)
            break
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module}.".startswith(f"{error.name}.") or "." not in module:
                return f"{path}: {error}"
            module, _, last = module.rpartition(".")
            attributes.insert(0, last)
    for name in attributes:
        if not hasattr(found, name):
            return f"{path}: {name} is not there"
        found = getattr(found, name)
    return "" if callable(found) else f"{path} is not a function"


def command_fault(line: str) -> str:
    """Why the command line does not know a command or an option, or nothing."""
    from typer.main import get_command

    from patchclamp.cli import app

    program, *words = shlex.split(line, comments=True)
    if program != "patchclamp" or not words:
        return f"{line}: a command begins with `patchclamp` and names what to do"
    command = get_command(app)
    while getattr(command, "commands", None):
        if not words or words[0] not in command.commands:
            return f"{line}: there is no {' '.join(words[:1])}; there are {', '.join(command.commands)}"
        command = command.commands[words.pop(0)]
    known = {"--help"} | {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    unknown = [word for word in words if word.startswith("--") and word.partition("=")[0] not in known]
    return f"{line}: unknown {', '.join(unknown)}" if unknown else ""


def proof_fault(name: str) -> str:
    """Why a test or a benchmark does not exist, or nothing."""
    path, *inside = name.split("::")
    file = ROOT / path
    if not path.startswith(("tests/", "benchmarks/")) or not file.is_file():
        return f"{name}: no such file in tests/ or benchmarks/"
    text = file.read_text()
    missing = [word for word in inside if not re.search(rf"^\s*(?:def|class) {re.escape(word.partition('[')[0])}\b", text, re.M)]
    return f"{name}: {', '.join(missing)} is not in that file" if missing else ""


def test_every_method_in_the_table_exists() -> None:
    checks = {"function": function_fault, "command": command_fault, "verified by": proof_fault}
    faults: list[str] = []
    for row in method_rows():
        faults += [f"{row['method']}: {column} is empty" for column in COLUMNS if not row[column]]
        for column, check in checks.items():
            if not quoted(row[column]):
                faults.append(f"{row['method']}: {column} has nothing in backticks")
            faults += [f"{row['method']}: {fault}" for name in quoted(row[column]) if (fault := check(name))]
    assert not faults, "\n" + "\n".join(faults)


# --- README.md and examples/

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def test_python_in_the_readme_is_an_example() -> None:
    """A block of Python follows a line `<!-- examples/NAME.py -->` and is that file, word for word."""
    readme = (ROOT / "README.md").read_text()
    blocks = re.findall(r"(?:<!-- (examples/\S+\.py) -->\n+)?^```python\n(.*?)^```$", readme, re.M | re.S)
    for name, block in blocks:
        assert name, f"a block of Python with no `<!-- examples/NAME.py -->` above it:\n{block}"
        assert block == (ROOT / name).read_text(), f"README.md and {name} differ"
    for name in re.findall(r"\bexamples/\w+\.py\b", readme):
        assert (ROOT / name).is_file(), f"README.md names {name}, which does not exist"


TESTED = ("04_sweeps", "05_path_patching", "06_relations", "07_circuit_in_words")
"""Examples whose functions have tests of their own beside: as programs they run with the long tests."""


def is_long(example: Path) -> bool:
    """A line that begins with `# long` says so (and why)."""
    return example.stem in TESTED or re.search(r"^# long\b", example.read_text(), re.M) is not None


@pytest.mark.parametrize(
    "example", [pytest.param(path, id=path.name, marks=[pytest.mark.long] if is_long(path) else []) for path in EXAMPLES]
)
def test_example_runs(example: Path, tmp_path: Path) -> None:
    """In an empty folder, as a reader would run it."""
    done = subprocess.run([sys.executable, str(example)], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
