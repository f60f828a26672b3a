"""README is short, and the tables of the pages are those of the code: families, selectors, what is refused."""

from __future__ import annotations

import csv
import re
import subprocess
import sys
import tomllib

from mlx_flash.config import SELECTORS
from mlx_flash.engine.selection.factory import EXACT
from mlx_flash.models.specs.dense_families import DENSE
from mlx_flash.models.specs.families import FAMILIES
from mlx_flash.models.specs.known_keys import FIXED
from mlx_flash.models.specs.mixtures import MIXTURES

from .pages import ROOT, rows

README = (ROOT / "README.md").read_text(encoding="utf-8")
LONGEST = 150  # lines of README: what is longer belongs to docs/


def docs(name: str) -> str:
    return (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")


def test_readme_is_short() -> None:
    assert len(README.splitlines()) <= LONGEST


def test_the_two_commands_stand_on_lines_of_their_own() -> None:
    assert len(re.findall(r"^python3 .*-m venv \.venv-story .*generate.*$", README, re.MULTILINE)) == 1
    assert len(re.findall(r"^python3 .*-m venv \.venv-test .*pytest tests$", README, re.MULTILINE)) == 1


def test_readmes_commands_refuse_the_pythons_that_pip_would_refuse() -> None:
    script = (ROOT / "scripts" / "check_python.py").read_text(encoding="utf-8")
    oldest = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["requires-python"]
    found = re.search(r"^OLDEST = \((\d+), (\d+)\)$", script, re.MULTILINE)
    assert found is not None and oldest == f">={found[1]}.{found[2]}"
    commands = re.findall(r"^(python3 .*)-m venv", README, re.MULTILINE)
    assert commands == ["python3 scripts/check_python.py && python3 "] * 2
    old = script.replace("sys.version_info", "(3, 9, 6)")
    done = subprocess.run([sys.executable, "-c", old], capture_output=True, text=True)
    assert done.returncode == 1 and "needs Python 3.11 or later" in done.stderr and "is Python 3.9" in done.stderr


def test_the_family_table_is_the_codes() -> None:
    table = rows(docs("families"), "| family |")
    for family in FAMILIES.values():
        name = family.title.split(" ")[0]
        row = next((row for row in table if re.search(rf"\b{name}\b", row[0])), None)
        assert row is not None, f"the table lacks {family.title}"
        assert [row[1] == "yes", row[2] == "yes"] == ["mlx" in family.backends, "numpy" in family.backends]
    mixtures = next(row for row in table if row[0].startswith("mixtures"))
    assert all(family.title in mixtures[2] for family in MIXTURES.values() if "numpy" in family.backends)


def test_the_list_of_dense_architectures_is_as_long_as_the_codes() -> None:
    text = docs("families")
    listed = re.search(r"on the mlx backend only:\*\* (.*?)\. ", text, re.DOTALL)
    assert listed is not None
    names = listed[1].replace("\n", " ").split(", ")
    assert sum(name.count("/") + 1 for name in names) == len(DENSE)  # `OLMo 2/3` is two
    assert f"| {len(DENSE)} more, listed below |" in text


def test_the_table_of_selectors_is_the_codes() -> None:
    table = {re.match(r"`(\w+)", row[0])[1]: row[-1] for row in rows(docs("selectors"), "| selector |")}  # type: ignore[index]
    assert set(table) == set(SELECTORS)
    assert {name for name, exact in table.items() if exact == "yes"} == {*EXACT, "router", "auto"}


def test_readme_says_which_selector_is_for_which_model() -> None:
    table = {re.match(r"`(\w+)", row[1])[1]: row[-1] for row in rows(README, "| your model |")}  # type: ignore[index]
    assert set(table) == set(SELECTORS)
    assert {name for name, output in table.items() if output == "identical"} == {*EXACT, "router", "auto"}


def value_rows() -> list[str]:
    """The table of values that are refused, as docs/refused.md has it."""
    lines = ["| model type | key | what it may be |", "|---|---|---|"]
    for kind, keys in sorted(FIXED.items()):
        for key, values in sorted(keys.items()):
            may = " or ".join(f"`{str(value).lower()}`" for value in values) or "not there"
            lines.append(f"| {kind} | `{key}` | {may} |")
    return lines


def test_the_table_of_refused_values_is_the_codes() -> None:
    text = docs("refused")
    assert text[text.index("| model type |") :].splitlines() == value_rows()


def test_the_selectors_of_the_default_model_are_as_measured() -> None:
    with open(ROOT / "benchmarks" / "selectors-flash-stories-6m.csv", newline="", encoding="utf-8") as file:
        measured = {
            (
                f"`{row['selector']}`",
                f"{float(row['ffn_resident']):.0%} ({float(row['ffn_resident_bytes']) / 1e6:.2f} MB)",
                f"{float(row['perplexity']):.2f}",
                f"{float(row['loss']):+.2%}",
                f"{float(row['read_per_token']):.1%} ({float(row['bytes_read_per_token']) / 1e3:.0f} kB)",
                f"{float(row['hit_rate']):.0%}",
            )
            for row in csv.DictReader(file)
        }
    assert set(map(tuple, rows(docs("default-model"), "| selector |"))) == measured
