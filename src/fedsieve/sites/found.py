"""A federation's directory as it is found, before a Flower run goes on with it.

It may come from somebody else, and what lies in it would be run: Flower puts the app's folder, and
its own copies of apps in FLWR_HOME, before all other modules. So the app is one file that says what
`prepare` writes and no more, and of Flower's folder what `prepare` and the SuperLink write stays
where it is; all else is set aside.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomli_w

from fedsieve.disk import place, refuse_link, remove, write_whole
from fedsieve.errors import FedSieveError, printable
from fedsieve.recipe import read as recipes
from fedsieve.run import rundir

APP = "app"
HOME = "flower"  # of Flower's command line
HERE = "sites"  # of a federation on one machine: a folder for each, and the processes' logs
ASIDE = "set-aside"  # what else was in HOME
LINK = "link.db"  # of the SuperLink: without it one that restarts knows none of its nodes
CONFIG = "config.toml"  # in HOME
CONNECTION = "fedsieve"  # what that calls this server
COMPONENTS = {
    "serverapp": "fedsieve.sites.flower_app:server",
    "clientapp": "fedsieve.sites.flower_app:client",
}
LONGEST = 1e9  # seconds, or sites; NaN is not below it
NAME, PUBLISHER = "fedsieve-federation", "fedsieve"
_LINKS = (LINK, *(f"{LINK}-{end}" for end in ("wal", "shm", "journal")))
_OURS = (CONFIG, *_LINKS)
_VERSION = re.compile(r"[0-9A-Za-z][0-9A-Za-z.+-]{0,63}")
_PROJECT = {"name", "version", "description", "license", "dependencies"}


def link_of(folder: Path) -> Path:
    """Where the SuperLink's database of a federation lies. What is sent, and the server's own log,
    stay in it: it tells who took part, and is among the server's secrets where there are any.
    """
    before, secret = folder / HOME / LINK, rundir.own(folder)
    if os.path.lexists(before) and not os.path.lexists(secret / LINK):
        return before  # as it was prepared before
    return secret / LINK if secret.is_dir() else before


def left_open(folder: Path) -> str | None:
    """That a private federation's database lies where all may look that are handed its directory,
    in words.
    """
    beside, secret = folder / HOME / LINK, rundir.own(folder)
    if not secret.is_dir() or not os.path.lexists(beside):
        return None
    return (
        f"{beside} holds what single clients sent, which the noise is to hide: hand it on to "
        f"nobody, or stop the SuperLink, move it to {secret / LINK} and start it with that as "
        "--database"
    )


def check_app(app: Path, asked_for: tuple[str, ...]) -> None:
    """Raises FedSieveError for an app that is not what `prepare` has written for its directory.

    asked_for: the settings that it holds beside folder and tls, all numbers
    One that 0.1 prepared is made to name our ends as they are now.
    """
    refuse_link(app, folder=True)
    if not app.is_dir():
        raise FedSieveError(
            f"{app} is not there, without which no federation goes on: put it back, or copy its "
            "directory whole"
        )
    for path in sorted(app.iterdir()):
        if path.name != "pyproject.toml":
            raise FedSieveError(f"{path} is no part of a federation, and would be run: remove it")
    source = app / "pyproject.toml"
    table = _table(source)
    try:
        ours = _is_ours(table, app.parent, asked_for)
    except (KeyError, TypeError, AttributeError, FedSieveError):
        ours = False
    if not ours and _is_moved(table, app.parent, asked_for):
        before = printable(table["tool"]["flwr"]["app"]["config"]["folder"][:200])
        raise FedSieveError(
            f"{source}: it was prepared as {before}, and its parts name each other: move it back"
        )
    if not ours:
        raise FedSieveError(
            f"{source} is not what `fedsieve federate` wrote for {app.parent}: begin a new one"
        )
    given = table["tool"]["flwr"]["app"]
    if given["components"] != COMPONENTS:
        given["components"] = COMPONENTS
        write_whole(source, tomli_w.dumps(table).encode())


def set_times(app: Path, times: Mapping[str, float]) -> None:
    """Other times to wait, in an app that `check_app` found to be ours.

    times: of `RoundPolicy`, in seconds
    """
    source = app / "pyproject.toml"
    table = _table(source)
    table["tool"]["flwr"]["app"]["config"] |= times
    write_whole(source, tomli_w.dumps(table).encode())


def _is_ours(table: dict[str, Any], folder: Path, asked_for: tuple[str, ...]) -> bool:
    project, app = table["project"], table["tool"]["flwr"]["app"]
    config = app["config"]
    numbers = [config[name] for name in asked_for]
    return (
        {*table} == {"project", "tool"}
        and {*table["tool"]} == {"flwr"}
        and {*table["tool"]["flwr"]} == {"app"}
        and {*app} == {"publisher", "components", "config"}
        and {*project} <= _PROJECT
        and (project["name"], app["publisher"]) == (NAME, PUBLISHER)
        and _VERSION.fullmatch(project["version"]) is not None
        and project["dependencies"] == []
        and {*app["components"]} == {*COMPONENTS}
        and {*config} == {"folder", "tls", *asked_for}
        and place(config["folder"]).resolve() == folder.resolve()
        and isinstance(config["tls"], bool)
        and all(type(number) in (int, float) and 0 <= number < LONGEST for number in numbers)
    )


def _is_moved(table: dict[str, Any], folder: Path, asked_for: tuple[str, ...]) -> bool:
    """Whether all is as we wrote it, but for another folder of the same kind."""
    try:
        config = table["tool"]["flwr"]["app"]["config"]
        here = {**config, "folder": str(folder.resolve())}
        app = {**table["tool"]["flwr"]["app"], "config": here}
        moved = {**table, "tool": {"flwr": {"app": app}}}
        return isinstance(config["folder"], str) and _is_ours(moved, folder, asked_for)
    except (KeyError, TypeError, AttributeError, FedSieveError):
        return False


def root_of(folder: Path) -> Path | None:
    """The certificate of the authority by which a federation's server is known, where it has one.

    Raises FedSieveError where Flower's folder does not say where the server is.
    """
    return server_of(folder)[1]


def server_of(folder: Path) -> tuple[str, Path | None]:
    """Where a federation's server is, and the certificate of `root_of`. Raises as that does."""
    refuse_link(folder / HOME, folder=True)
    source = folder / HOME / CONFIG
    table = _table(source)
    try:
        connection = table["superlink"][CONNECTION]
        root = connection.get("root-certificates")
        names = {*connection} - {"root-certificates", "insecure"}
        if names != {"address"} or not isinstance(connection["address"], str):
            raise KeyError
        return connection["address"], None if root is None else place(root)
    except (KeyError, TypeError, AttributeError, FedSieveError):
        raise FedSieveError(
            f"{source} does not say where the federation's server is: begin a new one"
        ) from None


def set_aside(folder: Path) -> None:
    """Move what Flower's folder should not hold out of Flower's way: its copies of apps, above all.

    Flower unpacks the app again.
    """
    home, aside = folder / HOME, folder / ASIDE
    refuse_link(aside, folder=True)
    database = link_of(folder)
    for name in _LINKS:
        refuse_link(database.with_name(name))
    for path in sorted(home.iterdir()):
        if path.name in _OURS:
            refuse_link(path)
            continue
        aside.mkdir(mode=0o700, exist_ok=True)
        old = aside / path.name
        if old.exists() or old.is_symlink():
            remove(old)
        path.rename(old)


def _table(path: Path) -> dict[str, Any]:
    refuse_link(path)
    return recipes.table_in(path)
