"""What is handed out is complete: the source distribution holds every file of the repository, and says what it is."""

from __future__ import annotations

import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import yaml

import dinoreg

ROOT = Path(__file__).resolve().parent.parent
BUILD = "import sys; from setuptools.build_meta import build_sdist; build_sdist(sys.argv[1])"


@pytest.mark.slow
def test_the_source_distribution_holds_every_file_of_the_repository(tmp_path: Path) -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a checkout of git")
    names = {name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()}
    copy = tmp_path / "source"
    for name in names:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run([sys.executable, "-c", BUILD, str(tmp_path)], cwd=copy, check=True, capture_output=True)
    with tarfile.open(tmp_path / f"dinoreg-{dinoreg.__version__}.tar.gz") as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert sorted(names - held) == []


def test_the_citation_is_of_this_version_and_licence() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert (citation["title"].partition(":")[0], citation["version"]) == ("dinoreg", dinoreg.__version__)
    assert citation["license"] in (ROOT / "LICENSE").read_text()
    assert {"message", "authors"} <= set(citation)
