"""Too little memory is the fault of no file, row, setting or client: whoever tells what a library
raises lets a shortage pass as what it is, and nothing is taken for damaged or left out for it.
"""

import ast
import errno
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from transformers import AutoModel

import fedsieve
from fedsieve.algebra.budget import Client
from fedsieve.data import sources, templates
from fedsieve.data.files import Columns
from fedsieve.engine.client import Reply, facts
from fedsieve.engine.loop import Progress
from fedsieve.errors import FedSieveError, of_memory, short_of_memory
from fedsieve.methods import fedit
from fedsieve.recipe import worker
from fedsieve.run import checkpoint, runner, state
from fedsieve.run.checkpoint import Snapshot
from fedsieve.sites import journal
from fedsieve.study import jobs
from fedsieve.tasks import chat, images, tokens
from fedsieve.train import model, trial
from tests import toy

TORCHS = "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried"
SHORT = [
    MemoryError(),
    RuntimeError(TORCHS),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
]
BROAD = {"Exception", "BaseException", "RuntimeError", "MemoryError", "THEIRS", "_ODD"}
# Where it is told as it is, with its words: a device, a tracker, a cluster and the hub; where only
# what says that a disk is full is told; and where nothing is made that has a size.
TOLD_AS_IT_IS = {
    ("disk.py", "place"),
    ("engine/on_ray.py", "connected"),
    ("notebook.py", "save"),
    ("run/rundir.py", "disk_errors"),
    ("run/rundir.py", "own"),
    ("run/runner.py", "export"),
    ("run/tracking.py", "tracked"),
    ("run/upload.py", "_upload"),
    ("sites/certificates.py", "_spans"),
    ("sites/federate.py", "_known"),
    ("train/by_function.py", "_loss"),
    ("train/model.py", "pick_device"),
}


def _names(node: ast.AST | None) -> set[str]:
    return {each.id for each in ast.walk(node) if isinstance(each, ast.Name)} if node else set()


def _handlers(tree: ast.Module) -> Iterator[tuple[str, ast.ExceptHandler]]:
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef):
            for node in ast.walk(function):
                if isinstance(node, ast.ExceptHandler):
                    yield function.name, node


def _tells(handler: ast.ExceptHandler) -> bool:
    """Whether it makes an error of its own of whatever may come, a shortage of memory too."""
    raised = [each for each in ast.walk(handler) if isinstance(each, ast.Raise)]
    own = any(isinstance(each.exc, ast.Call) for each in raised)
    calls = {
        n for each in ast.walk(handler) if isinstance(each, ast.Call) for n in _names(each.func)
    }
    asked = calls & {"raise_of_memory", "of_memory", "_not_the_clients"}
    return own and bool(_names(handler.type) & BROAD) and not asked


def test_whoever_tells_a_librarys_error_asks_first_whether_memory_was_short() -> None:
    """A law over the code itself: the next place that catches whatever is raised has it too."""
    home = Path(fedsieve.__file__).parent
    found = {
        (str(path.relative_to(home)), function)
        for path in sorted(home.rglob("*.py"))
        for function, handler in _handlers(ast.parse(path.read_text()))
        if _tells(handler)
    }
    assert found == TOLD_AS_IT_IS


def _raising(error: BaseException) -> Callable[..., Any]:
    def fails(*given: object, **named: object) -> Any:
        raise error

    return fails


def _reading_texts(error: BaseException) -> None:
    tokens.read_by(_raising(error), "a text")


def _rendering(error: BaseException) -> None:
    chat._rendered(SimpleNamespace(apply_chat_template=_raising(error)), [])


def _reading_images(error: BaseException) -> None:
    images._values(_raising(error), [])


def _reading_a_column(error: BaseException) -> None:
    templates.values_of(SimpleNamespace(with_format=_raising(error)), "text")


def _streaming(error: BaseException) -> None:
    def rows() -> Iterator[dict[str, Any]]:
        yield {"text": "a", "label": "b"}
        raise error

    sources.listed(rows(), Columns(("text",), ("label",)))


def _loading_a_model(error: BaseException) -> None:
    model._made("a folder", AutoModel, _raising(error))


def _exporting(error: BaseException) -> None:
    method, start = fedit.method(), toy.start()
    resident: Any = SimpleNamespace(put=_raising(error))
    state.exported(Path("run"), method, resident, start, method.init(start))


@pytest.mark.parametrize("error", SHORT, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize(
    "act",
    [
        _reading_texts,
        _rendering,
        _reading_images,
        _reading_a_column,
        _streaming,
        _loading_a_model,
        _exporting,
    ],
)
def test_a_shortage_passes_as_what_it_is(
    act: Callable[[BaseException], None], error: BaseException
) -> None:
    with pytest.raises(type(error)) as raised:
        act(error)
    assert of_memory(raised.value)
    assert not isinstance(raised.value, FedSieveError)


def test_the_first_pass_with_pairs_is_short_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "made_up", _raising(RuntimeError(TORCHS)))
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator"):
        trial.run_with_pairs(torch.nn.Module(), "classification", {})


@pytest.mark.parametrize("error", SHORT, ids=lambda error: type(error).__name__)
def test_no_checkpoint_is_damaged_for_want_of_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    """The newest would be passed over, and removed as what a run that goes on leaves behind."""
    start, method = toy.start(), fedit.method()
    for number in (1, 2):
        checkpoint.save(tmp_path, Snapshot(Progress(number, method.init(start)), {}, {}))
    with monkeypatch.context() as patched:
        patched.setattr(safetensors, "safe_open", _raising(error))
        with pytest.raises(MemoryError, match=type(error).__name__):
            checkpoint.load(tmp_path, start.layout)
    assert checkpoint.load(tmp_path, start.layout).progress.round == 2


@pytest.mark.parametrize("error", SHORT, ids=lambda error: type(error).__name__)
def test_a_site_keeps_what_it_has_no_memory_to_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    said = facts(Reply(Client("north", 1), b"", None, 0.5, 1, 0.0, 0.0, 0.0, 0))
    for number in (1, 2):
        memory = {"residual": {"x": torch.tensor([float(number)])}}
        done = journal.Entry(
            number, number - 1, "a", "w", {"ok": True, "round": number, **said}, b"x", memory
        )
        journal.write(tmp_path, done, keep=2)
    with monkeypatch.context() as patched:
        patched.setattr(safetensors.torch, "load", _raising(error))
        with pytest.raises(MemoryError):
            list(journal.memories(tmp_path, 9, "w"))
    assert [number for number, _ in journal.memories(tmp_path, 9, "w")] == [2, 1, 0]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        *((error, "memory does not suffice") for error in SHORT),
        (SystemExit(0), "code that is not FedSieve's ended the run (SystemExit: 0)"),
        (GeneratorExit("x"), "code that is not FedSieve's ended the run (GeneratorExit: x)"),
        (BaseException("x"), "code that is not FedSieve's ended the run (BaseException: x)"),
        (RuntimeError("odd"), "Traceback"),
        (OSError(errno.ENOSPC, "No space left on device", "/full"), "/full: No space left"),
    ],
)
def test_a_run_of_a_study_that_fails_is_one_of_its_problems(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, said: str
) -> None:
    """Whatever ends it, the others go on."""
    monkeypatch.setattr(runner, "start", _raising(error))
    job: Any = SimpleNamespace(folder=tmp_path, recipe=None)
    assert said in (jobs._problem(job, jobs.Ground(None, None, None), lambda *told: None) or "")


def test_a_worker_that_cannot_load_its_model_says_so_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "ready", _raising(MemoryError()))
    monkeypatch.setattr(worker, "unpack", lambda data: data)
    answer, said = worker.ready_in(b"", tmp_path)
    assert answer is None
    assert b"memory does not suffice (MemoryError)" in said
    assert b"Traceback" not in said


def test_what_takes_less_is_told_where_a_client_trained() -> None:
    error = MemoryError()
    assert short_of_memory(error) == "memory does not suffice (MemoryError)"
    error.add_note("client '7', round 2")
    assert short_of_memory(error).startswith("client '7', round 2: memory does not suffice")
    assert "training.batch" in short_of_memory(error)


@pytest.mark.parametrize("notes", [5, None, "a note", ("a", "b")])
def test_notes_that_are_no_list_stand_in_no_ones_way(notes: Any) -> None:
    error = MemoryError()
    error.__notes__ = notes
    assert short_of_memory(error) == "memory does not suffice (MemoryError)"


@pytest.mark.parametrize("error", ["MemoryError()", "OSError(12, 'Cannot allocate memory')"])
def test_the_command_line_says_it_in_a_sentence(error: str) -> None:
    code = f"from fedsieve import cli\ndef app(): raise {error}\ncli.app = app\ncli.main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert "error: memory does not suffice" in done.stderr + done.stdout
    assert "Traceback" not in done.stderr
