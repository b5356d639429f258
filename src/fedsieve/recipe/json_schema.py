"""The JSON Schema of a recipe, by which an editor completes keys, shows what they mean, and marks
what is wrong before anything is run.

It is made from `schema.Recipe` and the methods' files, and says no more than those: what only a
validator sees (that two keys exclude each other) is refused when the recipe is read.
"""

import inspect
import json
import re
from collections.abc import Collection
from typing import Any

from fedsieve.methods import catalogue
from fedsieve.recipe.schema import SERVERS, Recipe
from fedsieve.tasks import catalogue as tasks

_ENTRY = re.compile(r"(\w+(?:, \w+)*):\s+(.*)")


def recipe() -> dict[str, Any]:
    """The schema, as plain values."""
    made: dict[str, Any] = _plain(Recipe.model_json_schema())
    tables = made["$defs"]
    for table in (made, *tables.values()):
        _describe(table)
    _as_written(tables)
    tables["Model"]["properties"]["task"]["enum"] = list(tasks.names())
    tables["MethodTable"] |= _method()
    tables["ServerTable"] |= _server(tables["ServerTable"]["properties"])
    # What a run writes of itself, and what is not read again.
    made["properties"]["environment"] = {
        "type": "object",
        "description": "Versions and commit of a run that was; not read.",
    }
    head = {"$schema": "http://json-schema.org/draft-07/schema#", "title": "A recipe of FedSieve"}
    return head | made


def text() -> str:
    """The schema as a file."""
    return json.dumps(recipe(), indent=2, ensure_ascii=False)


def parts(docstring: str, names: Collection[str]) -> tuple[str, dict[str, str]]:
    """A docstring's prose, and what it says of each of these names.

    A name's words stand on a line of their own, `name: words` or `one, other: words`, and go on in
    lines that are indented; a second name may follow after a semicolon.
    """
    prose: list[str] = []
    said: dict[str, str] = {}
    of: list[str] = []  # whose words the line before was
    for line in inspect.cleandoc(docstring).splitlines():
        if of and line.startswith(" "):
            for name in of:
                said[name] += " " + line.strip()
            continue
        entry = _ENTRY.fullmatch(line)
        of = entry[1].split(", ") if entry else []
        if entry and all(name in names for name in of):
            said |= dict.fromkeys(of, entry[2])
        else:
            of = []
            prose.append(line)
    for name, words in list(said.items()):
        first, *more = re.split(rf"; (?=(?:{'|'.join(map(re.escape, names))}): )", words)
        said[name] = first
        said |= dict(each.split(": ", 1) for each in more)
    return " ".join("\n".join(prose).split()), said


def _describe(table: dict[str, Any]) -> None:
    """Give each key of a table what the table's docstring says of it, in place."""
    properties = table.get("properties", {})
    prose, said = parts(table.pop("description", ""), list(properties))
    if prose:
        table["description"] = prose
    for name, words in said.items():
        properties[name]["description"] = words


def _plain(value: Any) -> Any:
    """Without the titles that only repeat a key, and without null, which TOML does not have."""
    if isinstance(value, list):
        return [_plain(each) for each in value if each != {"type": "null"}]
    if not isinstance(value, dict):
        return value
    kept = {
        key: _plain(inner)
        for key, inner in value.items()
        if not (key == "title" and isinstance(inner, str)) and (key, inner) != ("default", None)
    }
    only = kept.get("anyOf", ())
    return (
        kept if len(only) != 1 else {**only[0], **{k: v for k, v in kept.items() if k != "anyOf"}}
    )


def _as_written(tables: dict[str, Any]) -> None:
    """What a file may say in short, and pydantic's schema does not know of, in place."""
    data = tables["Data"]
    del data["required"]
    data["anyOf"] = [{"required": ["train"]}, {"required": ["set"]}]
    for each in data["properties"]["more_tests"]["patternProperties"].values():
        each["anyOf"] = [{"type": "string"}, {"$ref": each.pop("$ref")}]
    layers = tables["Lora"]["properties"]["layers_to_transform"]
    number = layers["items"]
    layers["anyOf"] = [{"type": layers.pop("type"), "items": layers.pop("items")}, number]


def _method() -> dict[str, Any]:
    """A method that ships has its own options and no others; a module may have any."""
    known = [catalogue.known(name) for name in catalogue.names()]
    of: dict[str, list[str]] = {}
    for each in known:
        for option in each.options:
            of.setdefault(option, []).append(each.name)
    whose = {o: "all methods" if len(by) == len(known) else ", ".join(by) for o, by in of.items()}
    properties = {option: {"description": f"Of {whose[option]}."} for option in sorted(of)}
    name = {
        "description": "The method; or a module of one's own, with a dot (and --allow-code).",
        "anyOf": [
            {"enum": [each.name for each in known]},
            {"type": "string", "pattern": r"\."},
        ],
    }
    return {
        "properties": {"name": name, **properties},
        "allOf": [
            {
                "if": {"properties": {"name": {"const": each.name}}},
                "then": {"propertyNames": {"enum": ["name", *each.options]}},
            }
            for each in known
        ],
    }


def _server(properties: dict[str, Any]) -> dict[str, Any]:
    """An optimizer has its own parameters; without one, those of any, as the method's is meant."""
    own = {name: catalogue.options(catalogue.OPTIMIZERS, name) for name in SERVERS}
    every = sorted({option for options in own.values() for option in options})
    numbers = {
        option: {
            "type": "number",
            "description": f"Of {', '.join(name for name in SERVERS if option in own[name])}.",
        }
        for option in every
    }
    return {
        "properties": {**properties, **numbers},
        "additionalProperties": False,
        "allOf": [
            {
                "if": {"properties": {"optimizer": {"const": name}}, "required": ["optimizer"]},
                "then": {"propertyNames": {"enum": [*properties, *options]}},
            }
            for name, options in own.items()
        ],
    }
