"""What is released: the pages of the repository's root, the wheel and the sdist, and a run from the
wheel in an environment of its own, out of the repository.
"""

import os
import re
import runpy
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import fedsieve
from tests.conftest import Tiny
from tests.pages import ROOT, read

PROJECT = tomllib.loads(read(ROOT / "pyproject.toml"))["project"]


@pytest.fixture(scope="module")
def description() -> str:
    """What setup.py tells of the package, at length."""
    given: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("setuptools.setup", lambda **all: given.update(all))
        runpy.run_path(str(ROOT / "setup.py"))
    assert given["long_description_content_type"] == "text/markdown"
    return str(given["long_description"])


def test_the_description_leads_to_no_file(description: str) -> None:
    """On a package index there are none beside it."""
    targets = re.findall(r"\]\(\s*([^)\s]+)", description)
    assert targets
    assert [each for each in targets if not each.startswith("https://")] == []
    assert "![" not in description
    assert "src=" not in description


def test_the_description_is_the_readme_with_its_words(description: str) -> None:
    assert "docs/finetune.md has\nthe rest of `finetune`" in description
    assert "(why, and by how much (docs/methods.md))" in description
    known = set(re.findall(r"\w+", description))
    for line in read(ROOT / "README.md").splitlines():
        words = re.sub(r"!\[.*|(?<=\])\([^)]*\)", "", line)
        assert set(re.findall(r"\w+", words)) <= known, line


def test_the_version_is_said_once_and_repeated_rightly() -> None:
    version = PROJECT["version"]
    assert fedsieve.__version__ == version
    assert f"\nversion: {version}\n" in read(ROOT / "CITATION.cff")
    assert read(ROOT / "CHANGELOG.md").split("## ")[1].startswith(version)


def test_each_extra_is_in_the_constraints_that_are_tested() -> None:
    """What `make` installs beside the run's own needs is pinned."""
    pinned = {_name(line) for line in read(ROOT / "constraints.txt").splitlines() if line[0] != "#"}
    for extra in ("dev", "docs"):
        for each in PROJECT["optional-dependencies"][extra]:
            assert _name(each) in pinned | {"fedsieve"}, each


def _name(requirement: str) -> str:
    (name,) = re.findall(r"^[\w.-]+", requirement)
    return str(name).lower().replace("_", "-")


# --- the files, and a run from them


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel that was made from it."""
    folder = tmp_path_factory.mktemp("dist")
    _done(sys.executable, "-m", "build", "--outdir", folder, ROOT, timeout=300)
    return folder


def _done(*words: str | Path, timeout: float = 120, **more: Any) -> str:
    done = subprocess.run(
        [*map(str, words)], capture_output=True, text=True, check=False, timeout=timeout, **more
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return str(done.stdout)


@pytest.mark.slow
def test_wheel_and_sdist_hold_what_they_should(built: Path) -> None:
    (wheel,), (sdist,) = built.glob("*.whl"), built.glob("*.tar.gz")
    names = set(zipfile.ZipFile(wheel).namelist())
    ours = {
        path.relative_to(ROOT / "src").as_posix()
        for path in (ROOT / "src" / "fedsieve").rglob("*")
        if path.suffix in (".py", ".toml", ".typed")
    }
    assert {name for name in names if ".dist-info/" not in name} == ours
    with tarfile.open(sdist) as held:
        files = {name.partition("/")[2] for name in held.getnames()}
    assert {"README.md", "LICENSE", "setup.py", "pyproject.toml", "src/fedsieve/cli.py"} <= files
    assert "PASSED" in _done(sys.executable, "-m", "twine", "check", "--strict", wheel, sdist)


@pytest.mark.slow
def test_the_wheel_runs_in_an_environment_of_its_own(
    built: Path, tmp_path: Path, tiny: Tiny
) -> None:
    """What it needs is taken from this environment; FedSieve is the wheel's."""
    (wheel,) = built.glob("*.whl")
    venv.create(tmp_path / "venv", with_pip=False, symlinks=True)
    own = tmp_path / "venv" / "bin"
    (packages,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    needs = sysconfig.get_path("purelib")
    # A PYTHONPATH that leads to the sources would be taken for an installation.
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    pip = (sys.executable, "-m", "pip", "--python", own / "python")
    _done(*pip, "install", "--no-deps", wheel, env=clean)
    (packages / "needs.pth").write_text(needs + "\n", encoding="utf-8")
    work = tmp_path / "work"
    work.mkdir()

    def command(*words: str | Path) -> str:
        environment: Mapping[str, str] = {**clean, "HF_HUB_OFFLINE": "1"}
        return _done(own / "fedsieve", *words, cwd=work, env=environment, timeout=300)

    where = _done(own / "python", "-c", "import fedsieve; print(fedsieve.__file__)", env=clean)
    assert Path(where.strip()).is_relative_to(packages)
    assert command("--version") == f"fedsieve {PROJECT['version']}\n"
    assert {"demo", "own-csv", "sites"} <= set(command("recipes").split())
    assert command("schema").startswith("{")
    assert "glue/mrpc" in command("sets")
    assert "flasc/fig2" in command("reproduce")
    rows = (f"data.train={tiny.train}", f"data.test={tiny.test}", "data.text=text")
    command(
        *("run", "demo", "rounds=1", "cohort=3", "partition.clients=6", "partition.alpha=1.0"),
        *(*rows, "data.label=label", "data.train_split=", "data.test_split="),
        *(f"model.source={tiny.bert}", "data.max_length=16", "--out", "out"),
    )
    assert (work / "out" / "adapter" / "adapter_model.safetensors").is_file()
    assert (work / "out" / "report.html").is_file()


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    """Each link and anchor leads somewhere, each public name is found, and nothing is fetched."""
    pytest.importorskip("mkdocs")
    site, quiet = tmp_path / "site", {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    words = (sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", site)
    _done(*words, cwd=ROOT, env=quiet, timeout=300)
    pages = [path.read_text("utf-8") for path in site.rglob("*.html")]
    assert len(pages) > 25
    for page in pages:
        assert re.findall(r"<(?:script|img|link)[^>]*(?:src|href)=\"?https?://", page) == []
    told = (site / "api.html").read_text("utf-8")
    for name in fedsieve.__all__:
        assert f"fedsieve.{name}" in told
    # A docstring's words of each argument are a list.
    assert re.search(r"<li>\s*(<p>)?<code>budgets</code>: what each client can afford", told)
