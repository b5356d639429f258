"""docs/api.md: every public name, whose signature and docstring the docs site puts there:

python -m tests.api_page
"""

import fedsieve
from fedsieve import methods
from tests.pages import ROOT

PAGE = ROOT / "docs" / "api.md"
HEAD = """# Python

What `import fedsieve` gives; made by `python -m tests.api_page`. The docs site (`make docs`) puts
signature and docstring of each name here, from the code; in a terminal,
`python -m pydoc fedsieve.api.finetune` shows them.
"""
# Methods are told of together.
GROUPS = {
    "To train": ("finetune", "Run", "with_trainer", "FedSieveError"),
    "Settings": ("Training", "Lora", "Sampling", "Budget", "Client", "from_peft", "to_peft"),
    "Server optimizers": ("sgd", "adam", "fedadam", "fading"),
    "Methods": tuple(methods.names()),
}


def page() -> str:
    parts = [HEAD]
    for title, names in GROUPS.items():
        parts.append(f"## {title}\n")
        parts += [_entry(name) for name in names]
    return "\n".join(parts)


def _entry(name: str) -> str:
    found = getattr(fedsieve, name)
    where = f"{found.__module__}.{found.__qualname__}"
    return f"::: {where}\n    options:\n      heading: fedsieve.{name}\n      toc_label: {name}\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
