"""The package's metadata lists both packages, compatible dependencies and one version."""

import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

import dfatools

ROOT = Path(dfatools.__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT, SETUPTOOLS = PYPROJECT["project"], PYPROJECT["tool"]["setuptools"]


def requirements(lines):
    return {requirement.name: requirement.specifier for requirement in map(Requirement, lines)}


def test_the_dependencies_allow_the_pinned_versions():
    pinned = requirements((ROOT / "requirements.txt").read_text().split())
    library = requirements(PROJECT["dependencies"])
    assert list(library) == ["torch"]  # dfatools imports nothing else
    taken = library | requirements(PROJECT["optional-dependencies"]["scripts"])
    assert taken.keys() == pinned.keys()
    for name, specifier in pinned.items():
        (pin,) = specifier
        assert pin.operator == "==" and taken[name].contains(pin.version), name


def test_the_metadata_lists_both_packages_and_their_data_files():
    assert SETUPTOOLS["packages"] == ["dfatools", "mltools"]
    for package, files in SETUPTOOLS["package-data"].items():
        there = {path.name for path in (ROOT / package).iterdir() if path.is_file()}
        assert set(files) == {name for name in there if not name.endswith(".py")}


def test_the_version_is_read_from_dfatools():
    assert SETUPTOOLS["dynamic"]["version"] == {"attr": "dfatools.__version__"}
    assert str(Version(dfatools.__version__)) == dfatools.__version__
