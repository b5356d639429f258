"""No byte that came from elsewhere is ever unpickled, and no model's own code is run unasked.

Whoever starts a run may ask for it on the command line; what they said is handed on under one name,
and nothing here says it for them.
"""

import ast
from pathlib import Path

import fedsieve

SOURCE = Path(fedsieve.__file__).parent
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
CALLS = {("torch", "load"), ("torch", "save"), ("numpy", "load"), ("np", "load")}
HANDED_ON = "trust_remote_code"
NAMES = {"eval", "exec", "compile", "__import__"}


def faults(source: str) -> list[str]:
    """What of a module's text could run what a message holds."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.split(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom):
            found += [node.module or ""] * ((node.module or "").split(".")[0] in MODULES)
        elif isinstance(node, ast.Call):
            call = node.func
            if isinstance(call, ast.Attribute) and isinstance(call.value, ast.Name):
                pair = (call.value.id, call.attr)
                found += [".".join(pair)] * (pair in CALLS)
            if isinstance(call, ast.Name) and call.id in NAMES:
                found.append(call.id)
            found += [
                keyword.arg
                for keyword in node.keywords
                if keyword.arg in ("trust_remote_code", "allow_pickle")
                and not (isinstance(keyword.value, ast.Constant) and keyword.value.value is False)
                and not (isinstance(keyword.value, ast.Name) and keyword.value.id == HANDED_ON)
            ]
    return found


def test_nothing_is_unpickled() -> None:
    modules = sorted(SOURCE.rglob("*.py"))
    assert len(modules) > 50
    assert {str(path): faults(path.read_text(encoding="utf-8")) for path in modules} == {
        str(path): [] for path in modules
    }


def test_the_search_finds_what_it_looks_for() -> None:
    text = """
import pickle, os
from joblib import load
x = torch.load(path)
y = Model.from_pretrained(name, trust_remote_code=True)
w = Model.from_pretrained(name, trust_remote_code=given)
z = eval(text)
model.eval()
"""
    assert faults(text) == ["pickle", "joblib", "torch.load", *2 * ["trust_remote_code"], "eval"]
