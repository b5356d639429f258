"""A federation across machines: the app that Flower runs, and the run that the server keeps.

`prepare` writes a run's directory that holds, beside what every run has,

    app/       a Flower app of one file: it names this package's two ends and this directory
    flower/    what Flower's command line needs to know of the server, and what the server must
               still know when it is started anew: its nodes, their keys, messages on their way
               (of a private federation these are among the server's secrets: found.link_of)
    sites.json the key of each site's node, from when it was first met, where nodes have keys
    told.toml  the recipe as the sites are told it (told.py)
    kept.json  which sites were ever met; after which round they were last given the adapter to keep
               (the federation's end), and who was not; why the server stopped
    set-aside/ what else was found in flower/ when a Flower run went on (found.py)
    .federate.lock  keeps a second command out while one goes on with the federation; empty

(and beside it, with [privacy], the directory of what only the server may know: rundir.py)
and `serve` is what the app's server end does: the same run as in one process (runner.py), with the
same checkpoints and logs, but clients that are sites (engine/flower.py). Flower itself cannot go on
with a run that lost its server; as ours is on the disk, a new Flower run goes on with it.

The server reads no training rows; it evaluates on rows of its own, or asks the sites to. A site's
budget and its number of examples come from the site: the recipe's [partition] and [budgets] are for
runs in one process.

Nothing here needs Flower, except that `check_installed` looks for it.
"""

import dataclasses
import datetime
import hashlib
import json
import os
import re
import secrets
import shlex
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import filelock
import tomli_w

from fedsieve.algebra.adapter import Adapter
from fedsieve.algebra.budget import Budget, Client
from fedsieve.algebra.keys import Key
from fedsieve.algebra.method import Method
from fedsieve.clients.privacy import PrivacyPlan
from fedsieve.clients.sampling import unknown_to
from fedsieve.disk import bytes_of, objects, parsed, refuse_link, remove_link, write_whole
from fedsieve.engine.cautions import cautioning
from fedsieve.engine.loop import Federation, Receipt, Round
from fedsieve.errors import FedSieveError, NoUsableUpdate, count, few, nearest, quoted
from fedsieve.recipe import read as recipes
from fedsieve.recipe import schema
from fedsieve.recipe.examples import (
    load_more,
    load_rows,
    more_tensors,
    sample,
    tensors,
    unused,
)
from fedsieve.recipe.experiment import (
    Experiment,
    absolute,
    absolute_more,
    all_cautions,
    keeping,
    locate,
    set_up_resident,
    with_privacy,
)
from fedsieve.recipe.method import build_method, norm_bound
from fedsieve.recipe.schema import Recipe, deployed
from fedsieve.run import back, checkpoint, rundir, runner, tracking
from fedsieve.run.progress import line_of
from fedsieve.settings import Sampling
from fedsieve.sites import certificates, found, told
from fedsieve.sites.certificates import CA, CERTIFICATE, PRIVATE
from fedsieve.sites.foreign import refuse_foreign
from fedsieve.sites.found import APP as APP
from fedsieve.sites.found import COMPONENTS, CONFIG, link_of
from fedsieve.sites.found import CONNECTION as CONNECTION
from fedsieve.sites.found import HOME as HOME
from fedsieve.sites.resident import whole_message
from fedsieve.sites.server import (
    RoundPolicy,
    Sites,
    Transport,
    cleaned,
    joint_score,
    number_of,
)
from fedsieve.sites.site import NAME
from fedsieve.sites.told import TOLD as TOLD
from fedsieve.sites.worker import SOCKET
from fedsieve.tasks import catalogue
from fedsieve.tasks.digest import RowsDigest, named_digest
from fedsieve.tasks.examples import Examples
from fedsieve.tasks.tally import Details, Score, beside
from fedsieve.train.lengths import check_rows
from fedsieve.train.local import evaluate
from fedsieve.train.model import pick_device
from fedsieve.train.reader import load_reader, reader_digest
from fedsieve.wire import longest
from fedsieve.wire.format import VERSION

FLOWER = (1, 41)
# What of a RoundPolicy users choose; the rest follows from the recipe.
ASKED_FOR = ("sites", "deadline", "setup", "wait", "extra")
KEYS = "sites.json"  # site -> its node's public key
_KEYS_BYTES = 1 << 24  # at most
KEPT = "kept.json"
DRAWN_FROM = "drawn_from"  # in it: see `History`
_KEPT_BYTES = 1 << 24  # at most
_ROOM = 1 << 18  # bytes: without so many Flower cannot even begin
SPARE = 2  # rounds in a row without an update, before the third ends the run
LEFT_OVER = 120.0  # seconds that processes of a federation that was killed may take to end
LOCK = ".federate.lock"
_SITES = "sites"  # in the recipe's [environment]: of how many a private one's noise is planned
LOOPBACK = ("127.0.0.1", "localhost", "::1")
# No word to anyone about what runs here.
QUIET = "FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1"
# Flower sends a message in objects of this many bytes, and a node begins one again that is not
# through after 30 s: its own 5 MiB never get through a slow uplink (docs/deploy.md, What travels).
OBJECTS = "FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE=131072"


class History(NamedTuple):
    """What the log tells of the rounds up to the newest whole checkpoint.

    merged: site -> the last round in which its update was merged
    given: (site, digest of what an update said that was merged) -> its round
    last:   the newest of them
    met:    the sites that were ever met
    drawn_from: the sites from which a private federation's rounds so far were drawn; where the
            note of them is lost, those of them that the log names
    """

    merged: dict[str, int]
    given: dict[tuple[str, str], int]
    last: int = 0
    met: Collection[str] = ()
    drawn_from: Collection[str] = ()


class ServerAddress(NamedTuple):
    """Where the server listens, and with which certificates.

    insecure: that others than this machine may reach it without TLS was asked for
    """

    host: str = "127.0.0.1"
    port: int = 8000
    certificates: Path | None = None
    insecure: bool = False


def check_installed() -> None:
    """Raises FedSieveError if the Flower that FedSieve was written for is not installed."""
    wanted = ".".join(map(str, FLOWER))
    install = "pip install 'fedsieve[flower]'"
    try:
        version = metadata.version("flwr")
    except metadata.PackageNotFoundError:
        raise FedSieveError(f"a federation needs Flower {wanted}: {install}") from None
    if tuple(map(int, version.split(".")[:2])) != FLOWER:
        raise FedSieveError(f"Flower {version} is installed, {wanted} is needed: {install}")


def refuse_used(folder: Path) -> None:
    """Raises FedSieveError if the folder holds a run, or what a federation would write over."""
    rundir.refuse(folder)
    for name in (APP, HOME, found.HERE, found.ASIDE, TOLD, KEYS, KEPT):
        if os.path.lexists(folder / name):
            raise FedSieveError(
                f"{folder} holds no federation, and has {name}, in whose place one writes its own: "
                "choose another --out, or move it away"
            )


def prepare(recipe: Recipe, folder: Path, policy: RoundPolicy, listen: ServerAddress) -> list[str]:
    """Make a run's directory with its Flower app, and say how to start it.

    Returns the commands: on the server, at each site, and the one that begins.
    Raises FedSieveError for a recipe that cannot run on a network, an open door without TLS, or a
    folder with anything in it that would be replaced.
    """
    check_installed()
    _refuse_odd({name: getattr(policy, name) for name in ASKED_FOR})
    _refuse_open_door(listen)
    recipe, notes = _for_a_network(recipe, policy)
    folder = folder.absolute()
    name = secrets.token_hex(16)
    facts = {**rundir.environment("none"), told.FEDERATION: name}
    if recipe.privacy is not None:
        facts[_SITES] = policy.sites
    secret = rundir.new_secret() if deployed(recipe) else None
    if secret is not None:
        facts |= rundir.told_of(secret)
    with rundir.lock(folder):
        refuse_used(folder)
        text = recipes.dump(recipe, {**facts, "notes": notes} if notes else facts)
        rundir.create(folder, text, secret=secret)
        told.write(folder, recipe, name)
        _write_app(folder, policy, listen)
    return commands(folder, listen)


def commands(folder: Path, listen: ServerAddress) -> list[str]:
    """What to type on the server, at each site, and to begin. A folder's name may be anything."""
    home = f"{QUIET} FLWR_HOME={_word(folder / HOME)}"
    server = f"--host {_word(listen.host)} --port {listen.port}"
    name = "<name of this server>" if listen.host in ("0.0.0.0", "::") else _word(listen.host)
    if listen.certificates is None:
        tls, trust = "--insecure", "--insecure"
    else:
        at = listen.certificates.absolute()
        tls = (
            f"--ssl-ca-certfile {_word(at / CA)} --ssl-certfile {_word(at / CERTIFICATE)} "
            f"--ssl-keyfile {_word(at / PRIVATE)} --enable-supernode-auth"
        )
        trust = f"--root-certificates {CA} --auth-supernode-private-key <key of the site>"
    return [
        f"{home} flower-superlink {server} --database {_word(link_of(folder))} {tls} "
        "--disable-runtime-dependency-installation",
        f"{QUIET} {OBJECTS} flower-supernode --superlink {name}:{listen.port} {trust} "
        f"--node-config 'socket=\"<folder of the site>/{SOCKET}\"'",
        rundir.again(folder),
    ]


def _word(value: str | Path) -> str:
    return shlex.quote(str(value))


def cautions(listen: ServerAddress) -> list[str]:
    """What whoever starts the server should know: who may reach it, and for how long.

    Raises FedSieveError for certificates that do not hold now.
    """
    found = [] if listen.certificates is None else _of_certificates(listen.certificates)
    if listen.host in LOOPBACK:
        return found
    found += [
        f"Flower {'.'.join(map(str, FLOWER))} takes orders (`flwr run`, `flwr supernode register`) "
        "at the port at which it serves the nodes, from anyone who reaches it: let other machines "
        "reach the paths under /v1/fleet/ only (docs/deploy.md)"
    ]
    if listen.certificates is None:
        found.append("without TLS every update can be read, and changed, on its way")
    return found


@contextmanager
def alone(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    """While this is open, no other command goes on with a federation; nor did a server work on it
    when it began. What a federation that was killed had begun takes some time to find out.

    Nothing that the folder holds is changed. Raises FedSieveError if it holds no federation, or if
    somebody else works on it.
    """
    _refuse_no_federation(folder)
    refuse_link(folder / LOCK)
    try:
        lock = filelock.FileLock(folder / LOCK).acquire(timeout=0)
    except filelock.Timeout:
        raise FedSieveError(f"another process is at work on the federation in {folder}") from None
    except OSError as error:
        raise FedSieveError(f"{folder} cannot be written: {error.strerror}") from error
    with lock:
        _wait_for_others(folder, say)
        yield


def _wait_for_others(folder: Path, say: Callable[[str], None]) -> None:
    """Until nobody works on the run. Raises FedSieveError where that does not end."""
    until, told = time.monotonic() + LEFT_OVER, False
    while True:
        try:
            with rundir.lock(folder):
                return
        except rundir.AtWork:
            if time.monotonic() > until:
                raise
        if not told:
            say("processes of this federation from before are still at work: waiting for their end")
            told = True
        time.sleep(1.0)


def _refuse_no_federation(folder: Path) -> None:
    check_installed()
    rundir.check(folder)
    if not rundir.federated(folder):
        raise FedSieveError(
            f"{folder} holds a run in one process: go on with `{rundir.again(folder)}`"
        )


def begin_again(
    folder: Path,
    at_round: int | None = None,
    say: Callable[[str], None] = lambda text: None,
    times: Mapping[str, float] | None = None,
) -> list[str]:
    """The command that goes on with a federation, as a list of its words.

    at_round: go back to the checkpoint of this round first (run/back.py). The sites need not be
        told: they go on from what they kept in the round that the server counts on (journal.py)
    say: told where what is later is kept, and of other times
    times: deadline, setup and wait, in seconds, those that are others from now on
    Warns of certificates that end soon. Raises FedSieveError if the folder holds no federation, or
    if its server's certificates do not hold now; and as `fall_back` does.
    """
    _refuse_odd(times or {})
    _refuse_no_federation(folder)
    app = folder.absolute() / APP
    found.check_app(app, ASKED_FOR)
    root = found.root_of(folder)
    if root is not None:
        for caution in _of_certificates(root.parent):
            warnings.warn(caution, stacklevel=2)
    told.text_for_sites(folder, recipes.load(str(folder / rundir.RECIPE)))
    _logged(folder)
    _known(folder / KEYS)
    with rundir.disk_errors(folder, "" if at_round is None else f" --at-round {at_round}"):
        trial = folder / HOME / ".room"  # Flower's own words for a full disk are a traceback
        remove_link(trial)
        write_whole(trial, bytes(_ROOM))
        trial.unlink()
    if at_round is not None:
        say(back.said(at_round, back.fall_back(folder, at_round)))
    if times:
        found.set_times(app, times)
        say("from now on: " + ", ".join(f"{name} {of:g} s" for name, of in times.items()))
    found.set_aside(folder)
    return ["flwr", "run", str(app), CONNECTION, "--stream"]


def has_ended(folder: Path, rounds: int) -> bool:
    """Whether nothing is left to do: the run has ended, and the sites were given what came out."""
    if not rundir.has_ended(folder, rundir.last_round(folder), rounds):
        return False
    return _kept(folder).get("round") == rounds


def without_adapter(folder: Path) -> list[str]:
    """The sites of a federation that has ended which did not get the final adapter, being away or
    having no room for it.
    """
    return _names(_kept(folder), "without")


def _names(note: Mapping[str, Any], key: str) -> list[str]:
    """The sites that a note names under a key."""
    names = note.get(key)
    return [cleaned(str(name), 64) for name in names] if isinstance(names, list) else []


def _note(folder: Path, **said: object) -> None:
    """Add to what is noted of a federation; None takes it out."""
    before = _kept(folder)
    note = {key: value for key, value in {**before, **said}.items() if value is not None}
    if note == before:
        return
    with rundir.disk_errors(folder):
        write_whole(folder / KEPT, json.dumps(note).encode(), mode=0o600)


def _kept(folder: Path) -> dict[str, Any]:
    try:
        return parsed(bytes_of(folder / KEPT, _KEPT_BYTES), str(folder / KEPT))
    except (FedSieveError, OSError):  # they are given it once more
        return {}


def refuse_unfinished(folder: Path) -> None:
    """Raises FedSieveError if a Flower run that has ended left the federation unfinished.

    `flwr run` ends with 0 whatever became of what it ran.
    """
    begun = (folder / rundir.METRICS).exists()
    last, rounds = rundir.last_round(folder) if begun else 0, runner.rounds_of(folder)
    if last < rounds:
        whole, _ = checkpoint.newest_round(rundir.place(folder, rundir.CHECKPOINTS))
        where = f"after round {min(last, whole)} of {rounds}"  # from where it goes on
    elif not (folder / rundir.ADAPTER).is_dir():
        where = "and has no final adapter yet"
    elif not rundir.has_ended(folder, last, rounds):
        where = "before its report was written"
    elif not has_ended(folder, rounds):
        where = "before its sites were given the final adapter"
    else:
        return
    refuse_at_work(folder)
    why = _kept(folder).get("why")
    said = cleaned(why, 2000) if isinstance(why, str) else "what it said last is above"
    raise FedSieveError(
        f"the federation in {folder} stopped {where}: {said} (the log of its Flower run has all). "
        f"Go on with `{rundir.again(folder)}`"
    )


def refuse_at_work(folder: Path) -> None:
    """Raises FedSieveError if a federation's server still works on it, whose Flower run could only
    not be followed any longer: where the SuperLink's database is held up, say.
    """
    try:
        with rundir.lock(folder):
            return
    except rundir.AtWork:
        raise FedSieveError(
            f"the log of the Flower run of {folder} broke off, and its server is still at work: "
            f"follow it with `fedsieve watch {folder}`. Where its SuperLink is gone, it ends "
            f"within a minute: go on then with `{rundir.again(folder)}`"
        ) from None


def why_not(folder: Path) -> str:
    """Why Flower could not go on with a federation, as far as it can be found out."""
    address, root = found.server_of(folder)
    host, _, port = address.rpartition(":")
    try:
        number = int(port)
    except ValueError:
        return f"{address} is no address of a server"
    return certificates.unreached(host.strip("[]"), number, root) or "why is said above"


def environment(folder: Path) -> dict[str, str]:
    """What Flower's command line must find in its environment."""
    quiet = dict(pair.split("=") for pair in QUIET.split())
    return {**quiet, **_without_proxy(), "FLWR_HOME": str(folder.absolute() / HOME)}


def _without_proxy() -> dict[str, str]:
    """That no proxy is asked for what is on this machine, beside what the user excepts."""
    return {
        name: ",".join(filter(None, [os.environ.get(name), *LOOPBACK]))
        for name in ("no_proxy", "NO_PROXY")
    }


def serve(
    folder: Path, transport: Transport, policy: RoundPolicy, say: Callable[[str], None]
) -> Adapter:
    """The server's end: run the federation in `folder` to its last round, from where it stands.

    Raises FedSieveError if it cannot go on, which is noted for `refuse_unfinished` to tell;
    runner.Stopped if it was stopped.
    """
    _note(folder, why=None)
    try:
        return _served(folder, transport, policy, say)
    except FedSieveError as error:
        with suppress(FedSieveError):  # a full disk, which is then the reason
            _note(folder, why=f"{error}{_ended_meanwhile(folder)}")
        raise


def _ended_meanwhile(folder: Path) -> str:
    """What of a server's certificates does not hold any more, as one more reason."""
    try:
        root = found.root_of(folder)
        if root is not None:
            _of_certificates(root.parent)
    except FedSieveError as error:
        return f". And {error}"
    return ""


def _served(
    folder: Path, transport: Transport, policy: RoundPolicy, say: Callable[[str], None]
) -> Adapter:
    rounds = runner.rounds_of(folder)
    source = str(folder / rundir.RECIPE)
    asked = recipes.parse(recipes.read(source), source).tracking
    if asked is not None:
        tracking.check(asked)
        say(f"tracked by {tracking.where(asked, folder)}")
    caution = found.left_open(folder)
    if caution is not None:
        say(f"warning: {caution}")
    board: list[Sites] = []
    new, note, in_vain = cautioning(), partial(_note, folder), 0

    def build(recipe: Recipe) -> Experiment:
        text = told.text_for_sites(folder, recipe)
        if recipe.privacy is not None:
            _refuse_other_number(folder, policy)
        experiment, sites = on_network(
            recipe, text, transport, policy, say, _history(folder), folder / KEYS, note
        )
        board.append(sites)
        return experiment

    def show(summary: Round, receipts: Sequence[Receipt]) -> None:
        nonlocal in_vain
        for receipt in receipts:
            if receipt.dropped is not None:
                say(f"round {summary.round}, site {receipt.client}: {receipt.dropped}")
        for caution in new(summary):
            say(f"warning: {caution}")
        say(line_of(summary, rounds))
        if summary.clients:  # else nobody was drawn
            in_vain = in_vain + 1 if summary.dropped == summary.clients else 0
        # Only a private round ends without an update here; the others are the round loop's to stop.
        if in_vain > SPARE and summary.epsilon is not None and summary.round < rounds:
            raise NoUsableUpdate(
                f"in {in_vain} rounds one after another no site that was drawn gave an update, and "
                "each cost the privacy of a round: see what the sites' workers say"
            )

    lacking = set(without_adapter(folder))
    if not has_ended(folder, rounds):
        _note(folder, round=None, without=None)
        lacking = set()
    adapter = runner.resume(folder, show, build)
    answers = board[0].ask_all("keep", whole_message(adapter), policy.setup)
    say(f"{count(len(answers), 'site')} got the final adapter: {', '.join(answers)}")
    without = sorted((lacking | set(board[0].known())) - answers.keys())
    _note(folder, round=rounds, without=without)
    return adapter


def on_network(
    recipe: Recipe,
    text: str,
    transport: Transport,
    policy: RoundPolicy,
    say: Callable[[str], None],
    history: History,
    keys: Path,
    note: Callable[..., None],
) -> tuple[Experiment, Sites]:
    """A federation whose clients are the sites that the transport reaches, once they are there.

    text: the recipe as the sites are told it
    history: what of the rounds before is in the log
    keys: the file with the key of each site's node; new sites are added to it
    note: keeps what it is given by name: `met`, all sites that were ever met, whenever one is
        added, and `drawn_from`
    Raises FedSieveError if too few sites come, or for what of the recipe does not fit.
    """
    method = build_method(recipe)
    key = Key(recipe.seed)
    plan: PrivacyPlan | None = None
    if recipe.privacy is not None:
        recipe, plan = with_privacy(recipe, policy.sites)
        _refuse_noise_that_sites_know(plan)
        method = build_method(recipe, partial(plan.around, key=key))
    _refuse_claimed_steps(method, recipe)
    tokenizer, _ = load_reader(locate(recipe.model.source), recipe.model.task)
    test, more = _test_rows(recipe, tokenizer)
    resident = set_up_resident(recipe, tokenizer, pick_device(recipe.device))
    check_rows(resident, test, *more.values())
    sampling = _sampling(recipe, policy)
    enough = sampling.size if sampling.extra else None
    policy = policy._replace(quorum=sampling.quorum, enough=enough)
    digest = hashlib.sha256(text.encode()).hexdigest()
    assert resident.digest is not None
    ours = Ours(resident.digest.whole, reader_digest(tokenizer))
    welcome = partial(_welcome, method=method, ours=ours, say=say)
    refuse_link(keys)
    known = _known(keys)

    sites = Sites(
        transport,
        text,
        digest,
        welcome,
        policy,
        say,
        merged=history.merged,
        given=history.given,
        number=history.last,
        keys=known,
        pin=partial(_keep, keys),
        most=longest(resident.layout),
        met=history.met,
        meet=lambda names: note(met=names),
    )
    before = {*history.drawn_from}
    if plan is not None and len(before) == policy.sites:
        _close(sites, before)
    say(f"waiting for {policy.sites} sites")
    clients = sites.there()
    for id in unknown_to(sampling, sites.known()):
        say(
            f"warning: sampling.availability names {quoted(id)}, and no site of that name has come "
            f"yet{nearest(id, sites.known())}: it counts for nothing till one does"
        )
    there = sites.there
    if plan is not None:
        # The account counts on a draw from all sites, whether they are there or not.
        names = [client.id for client in clients]
        if len(names) != policy.sites or before - {*names}:
            raise FedSieveError(_other_sites(policy.sites, names, before))
        _close(sites, names)
        note(**{DRAWN_FROM: names})

        def there() -> list[Client]:
            # As they are now: a site's budget may have been changed, and it was met again.
            sites.there()
            return [sites.as_now(client) for client in clients]

    lead = recipe.evaluation.metric

    def at_sites(adapter: Adapter) -> Score | None:
        answers = sites.ask_all("evaluate", whole_message(adapter), policy.deadline)
        return joint_score(answers, recipe.model.task, resident.classes, say, lead)

    def here(adapter: Adapter) -> Score:
        assert test is not None
        precision, batch = recipe.training.precision, recipe.evaluation.batch
        rate = partial(evaluate, resident, adapter, batch=batch, precision=precision, lead=lead)
        return beside(rate(test), {name: rate(rows) for name, rows in more.items()})

    score: Callable[[Adapter], Score | None] | None = at_sites if test is None else here
    if test is None and method.private == "system":
        score = None  # the sites' test rows are their own, and no noise covers figures from them
    details: list[Details] = []
    if score is not None and method.private != "system":
        score = keeping(score, details)
    federation = Federation(
        method=method,
        clients=clients,
        sampling=sampling,
        seed=recipe.seed,
        exchange=sites.exchange,
        evaluate=score,
        evaluate_every=recipe.evaluation.every,
        privacy=plan,
        there=there,
        aside=sites.aside,
        dense=resident.dense,
        norm_bound=norm_bound(recipe),
        before=sites.before,
        spare=SPARE,
    )
    notes = () if plan is None else (plan.guarantee, *_cautions(recipe, plan))
    ending = None if plan is None else plan.ending
    start = resident.adapter()
    # The server's own, which a run's figures are of; the sites' rows are theirs, and may grow.
    rated = named_digest([("test", test), *sorted(more.items())])
    rows = None if test is None else RowsDigest("", rated)
    built = Experiment(recipe, federation, resident, start, {}, notes, ending, details, rows=rows)
    return built, sites


def _close(sites: Sites, names: Collection[str]) -> None:
    """Take in nobody else from now on: a private federation draws from these in every round."""
    sites.close(names, f"[privacy] counts on {few(sorted(names))}, and on no other site")


def _other_sites(number: int, names: Collection[str], before: set[str]) -> str:
    """That others are there than [privacy] counts on, and what to do."""
    came = f"{count(len(names), 'site')} came ({few(sorted(names))})"
    said = f"[privacy] counts on {count(number, 'site')}, and {came}: "
    if missing := before - {*names}:
        named = few(sorted(missing))
        return said + f"start the workers and the nodes of {named} as well, then --resume"
    if len(names) > number:
        return said + "stop the nodes of those that take no part, or begin anew with more --sites"
    return said + "start the workers and the nodes of the others, then --resume"


def _refuse_other_number(folder: Path, policy: RoundPolicy) -> None:
    """Raises FedSieveError where the app names other sites than a private run was planned for."""
    planned = rundir.environment_of(folder).get(_SITES, policy.sites)
    if planned != policy.sites:
        raise FedSieveError(
            f"{folder / APP / 'pyproject.toml'}: sites is {policy.sites:g}, and [privacy] was "
            f"planned for {quoted(planned)}: put that back"
        )


class Ours(NamedTuple):
    """Of the server's base model, which every site must have: digests of weights and configuration,
    and of what makes of a row what it sees.
    """

    base: str
    reads: str


def _welcome(
    head: Mapping[str, Any],
    client: Client | None,
    method: Method,
    ours: Ours,
    say: Callable[[str], None],
) -> Client:
    """The client that a site says it is, and then what the recipe makes of it: its examples.

    Raises FedSieveError to refuse the site.
    """
    if client is not None:
        if head.get("base") != ours.base:
            raise FedSieveError(
                f"the base model of site {client.id!r} has other weights than the server's, or "
                "another configuration: give it the same model"
            )
        if head.get("reads") != ours.reads:
            raise FedSieveError(
                f"the model of site {client.id!r} reads rows otherwise than the server's: another "
                "tokenizer (its words, special tokens or chat template) or image processor. Give "
                "it the same model, with the same files beside its weights"
            )
        examples = int(number_of(head, "examples"))
        if examples < 1:
            raise FedSieveError(f"site {client.id!r} has no examples")
        return _of_use(client._replace(examples=examples), method, say)
    name, versions, given = head.get("name"), head.get("versions"), head.get("budget")
    if not isinstance(name, str) or not re.fullmatch(NAME, name):
        raise FedSieveError("its description has no usable name")
    wire = versions.get("wire") if isinstance(versions, Mapping) else None
    if wire != VERSION:
        raise FedSieveError(
            f"site {name!r} speaks version {cleaned(wire, 40)} of FedSieve's messages, this server "
            f"version {VERSION}: install the same FedSieve there"
        )
    shares = {}
    for knob in Budget._fields:
        value = given.get(knob, 1.0) if isinstance(given, Mapping) else 1.0
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
            raise FedSieveError(
                f"site {name!r}: its budget has {knob} {cleaned(value, 40)}, not in (0, 1]"
            )
        shares[knob] = float(value)
    return Client(name, 1, Budget(**shares))


def _of_use(client: Client, method: Method, say: Callable[[str], None]) -> Client:
    """A site that is taken, with what the method makes use of in its budget."""
    shares = client.budget._asdict()
    unused = [knob for knob, value in shares.items() if value < 1 and knob not in method.knobs]
    if unused:
        say(f"site {client.id!r}: the method makes no use of its budget's {', '.join(unused)}")
    if method.knobs and all(shares[knob] == 1 for knob in method.knobs):
        used = ", ".join(sorted(method.knobs))
        said = f"tells no budget below 1 ({used}): all of the adapter travels for it"
        say(f"site {client.id!r} {said}")
    return client._replace(budget=Budget(**{k: v for k, v in shares.items() if k in method.knobs}))


def _keep(place: Path, keys: Mapping[str, str]) -> None:
    """What `_known` reads back. Raises FedSieveError where the disk does not take it."""
    with rundir.disk_errors(place.parent):
        write_whole(place, json.dumps(keys, indent=1, sort_keys=True).encode())


def _known(place: Path) -> dict[str, str]:
    """site -> its node's key, in Flower's form; the file may hold OpenSSH's lines (`site-key.pub`).

    Raises FedSieveError, naming the site, for what no node can prove, or where one key has two
    names.
    """
    if not place.exists():
        return {}
    where = f"{place} does not list names and keys of sites (docs/deploy.md)"
    try:
        given = parsed(bytes_of(place, _KEYS_BYTES), str(place))
    except (FedSieveError, OSError) as error:
        raise FedSieveError(f"{where}: {error}") from error
    known = {}
    for name, key in given.items():
        if not re.fullmatch(NAME, name):
            raise FedSieveError(f"{where}: {cleaned(name, 80)!r} is no name of a site")
        try:
            known[name] = _flowers(key)
        except Exception as error:  # of cryptography, over whatever the line holds
            raise FedSieveError(
                f"{where}: the key of {name!r} is none that a node has: an ECDSA key, as "
                f"ssh-keygen writes it (ecdsa-sha2-..., it is {cleaned(key, 40)!r}: {error})"
            ) from error
    if len({*known.values()}) < len(known):
        raise FedSieveError(f"{place}: one key has two names; a key holds one")
    return known


def _flowers(said: str) -> str:
    """A public key as nodes prove it, PEM in hexadecimal digits, from that or from OpenSSH's form.

    Raises whatever is raised for anything but an elliptic curve's.
    """
    from cryptography.hazmat.primitives import serialization  # comes with Flower
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey

    if said.startswith("ecdsa-"):
        key = serialization.load_ssh_public_key(said.encode())
    else:
        key = serialization.load_pem_public_key(bytes.fromhex(said))
    if not isinstance(key, EllipticCurvePublicKey):
        raise ValueError("another kind of key")
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    told: bytes = key.public_bytes(serialization.Encoding.PEM, form)
    return told.hex()


def _for_a_network(recipe: Recipe, policy: RoundPolicy) -> tuple[Recipe, list[str]]:
    """The recipe with what a network asks of it, and notes for those who read the results.

    Raises FedSieveError where it cannot run there.
    """
    notes = unused(recipe)
    if catalogue.load(recipe.model.task).named and not recipe.data.classes:
        raise FedSieveError(
            "data.classes: list the labels in the recipe: no machine of a federation sees all rows "
            "(the recipe.toml of any run over such rows has them)"
        )
    recipes.check_metrics(recipe, by_row=_evaluates(recipe))
    refuse_foreign(recipe)
    method = build_method(recipe)
    _refuse_claimed_steps(method, recipe)
    if method.personal is not None and _evaluates(recipe):
        warnings.warn(
            f"data.test is not used: with {recipe.method.name} a client's own model is evaluated, "
            "a part of which no server has. The sites evaluate, on test rows of their own",
            stacklevel=3,
        )
        without = {"test": None, "test_split": None, "more_tests": None}
        recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update=without)})
    sampling = _sampling(recipe, policy)
    asked = sampling.size + sampling.extra
    if sampling.kind == "uniform" and asked > policy.sites:
        besides = f" and {sampling.extra} more are asked" if sampling.extra else ""
        warnings.warn(
            f"cohort is {sampling.size}{besides}, and {policy.sites} sites are waited for: a round "
            "may have fewer",
            stacklevel=3,
        )
    if recipe.privacy is not None:
        if sampling.extra:
            raise FedSieveError("--extra: the accountant of [privacy] does not cover it")
        recipe, plan = with_privacy(recipe, policy.sites)
        _refuse_noise_that_sites_know(plan)
        notes += [plan.guarantee, *_cautions(recipe, plan)]
    for note in notes:
        warnings.warn(note, stacklevel=3)
    test = recipe.data.test
    more = absolute_more(recipe.data)
    if more and not _evaluates(recipe):
        warnings.warn(
            "data.more_tests: the sites evaluate, on rows of their own, and not on these",
            stacklevel=3,
        )
        more = None
    changed = {"test": None if test is None else absolute(test), "more_tests": more}
    data = recipe.data.model_copy(update=changed)
    model = recipe.model.model_copy(update={"source": absolute(recipe.model.source)})
    return recipe.model_copy(update={"data": data, "model": model}), notes


def _refuse_claimed_steps(method: Method, recipe: Recipe) -> None:
    """Raises FedSieveError where the server would compute with numbers of steps that follow from
    what the sites say of their rows.
    """
    if method.trained_by is not None and recipe.training.steps is None:
        raise FedSieveError(
            f"training.steps: {recipe.method.name} computes with how many steps a site makes, and "
            "how many rows it has is its own word: give a number"
        )


def _refuse_noise_that_sites_know(plan: PrivacyPlan) -> None:
    """Raises FedSieveError where the noise follows from the seed, which every site is told."""
    if plan.spent is not None and plan.noise_from == "seed":
        raise FedSieveError(
            "privacy.noise_from: in a federation it must be 'system': every site is told the "
            "recipe's seed, and could take noise from it off again"
        )


def _cautions(recipe: Recipe, plan: PrivacyPlan) -> list[str]:
    found = all_cautions(plan, None if recipe.data.test is not None else "the sites' own rows")
    if plan.known is not None and recipe.sampling.kind == "uniform":
        # Its own draw tells a site of the others': with sizes fixed, one less or one more is left.
        found.append(
            "Privacy: with sampling.kind = 'uniform' a site that knows whether it took part knows "
            "more of the others' draw than the account has it: against sites the epsilon without "
            "amplification holds. With 'poisson' each is drawn by itself, and the other holds too."
        )
    return found


def _sampling(recipe: Recipe, policy: RoundPolicy) -> Sampling:
    drawn = schema.sampling(recipe)
    return dataclasses.replace(drawn, extra=policy.extra or drawn.extra)


def _evaluates(recipe: Recipe) -> bool:
    """Whether the server has rows of its own to evaluate on; else the sites evaluate."""
    return recipe.data.test is not None and recipe.evaluation.on == "test"


def _test_rows(recipe: Recipe, tokenizer: Any) -> tuple[Examples | None, dict[str, Examples]]:
    """The server's own rows to evaluate on, and its `data.more_tests`; or None: then the sites
    evaluate.
    """
    data = recipe.data
    if not _evaluates(recipe):
        return None, {}
    assert data.test is not None
    rows = load_rows(data, data.test, data.test_split)
    examples, _, _ = tensors(recipe, sample(recipe, rows), tokenizer)
    return examples, more_tensors(recipe, load_more(data), tokenizer)


def _refuse_odd(given: Mapping[str, float]) -> None:
    """Raises FedSieveError for a time or a number that nothing can be waited with."""
    for name, value in given.items():
        if not 0 <= value < found.LONGEST:
            raise FedSieveError(f"--{name} {value:g}: it must be a number below {found.LONGEST:g}")


def _refuse_open_door(listen: ServerAddress) -> None:
    if listen.certificates is not None:
        for name in (CA, CERTIFICATE, PRIVATE):
            if not (listen.certificates / name).is_file():
                raise FedSieveError(
                    f"--certificates: {listen.certificates} has no {name} (docs/deploy.md makes it)"
                )
        _of_certificates(listen.certificates)
        certificates.refuse_unfit(listen.certificates, _own_host(listen))
    elif listen.host not in LOOPBACK and not listen.insecure:
        raise FedSieveError(
            f"--host {listen.host}: other machines reach it, so it needs TLS and the nodes' keys: "
            "give --certificates (docs/deploy.md makes them), or --insecure if you know that the "
            "network is yours alone"
        )


def _of_certificates(folder: Path) -> list[str]:
    """What to know of a folder of certificates. Raises FedSieveError as `endings` does."""
    found = certificates.endings(folder, datetime.datetime.now(datetime.UTC))
    return found + certificates.open_key(folder)


def _write_app(folder: Path, policy: RoundPolicy, listen: ServerAddress) -> None:
    """The Flower app, and the connection through which `flwr` finds the server."""
    app: dict[str, Any] = {
        "project": {
            "name": found.NAME,
            "version": metadata.version("fedsieve"),
            "description": "A federation of FedSieve; the program itself is installed, not here.",
            "license": "Apache-2.0",
            "dependencies": [],
        },
        "tool": {
            "flwr": {
                "app": {
                    "publisher": found.PUBLISHER,
                    "components": COMPONENTS,
                    "config": {
                        "folder": str(folder),
                        "tls": listen.certificates is not None,
                        **{name: getattr(policy, name) for name in ASKED_FOR},
                    },
                }
            }
        },
    }
    _put(folder / APP / "pyproject.toml", app)
    write_connection(folder, listen)
    database = link_of(folder)
    refuse_link(database)
    database.touch(mode=0o600)  # updates of the sites pass through it


def _own_host(listen: ServerAddress) -> str:
    """How a server is reached from its own machine."""
    return "127.0.0.1" if listen.host in ("0.0.0.0", "::") else listen.host


def write_connection(folder: Path, listen: ServerAddress) -> None:
    """Where `flwr` finds the server."""
    connection: dict[str, Any] = {"address": f"{_own_host(listen)}:{listen.port}"}
    if listen.certificates is None:
        connection["insecure"] = True
    else:
        connection["root-certificates"] = str(listen.certificates.absolute() / CA)
    config = {"superlink": {"default": CONNECTION, CONNECTION: connection}}
    _put(folder / HOME / CONFIG, config)


def _put(path: Path, table: Mapping[str, Any]) -> None:
    """A table in a folder of its own, which is made if need be."""
    refuse_link(path.parent, folder=True)
    path.parent.mkdir(exist_ok=True)
    write_whole(path, tomli_w.dumps(table).encode())


def _history(folder: Path) -> History:
    """The log may hold lines of a round after the checkpoint: that round is done again."""
    last, unlogged = checkpoint.newest_round(rundir.place(folder, rundir.CHECKPOINTS))
    receipts = [r for r in _logged(folder) if r["round"] <= last] + unlogged
    merged = {r["client"]: r["round"] for r in receipts if r.get("dropped") is None}
    said = [r for r in receipts if r.get("digest") and r.get("dropped") is None]
    given = {(r["client"], r["digest"]): r["round"] for r in reversed(said)}
    note, logged = _kept(folder), {row["client"] for row in receipts}
    met = {*logged, *_names(note, "met")}
    drawn_from = (_names(note, DRAWN_FROM) or logged) if last else ()
    return History(merged, given, last, met, drawn_from)


def _logged(folder: Path) -> list[dict[str, Any]]:
    """The lines of the log of clients. Raises FedSieveError for one that no federation writes."""
    log, rows = rundir.place(folder, rundir.CLIENTS), []
    for number, row in objects(log):
        if row is None:
            continue
        if type(row.get("round")) is not int or not isinstance(row.get("client"), str):
            raise FedSieveError(f"{log}, line {number}: no federation writes that: take it out")
        rows.append(row)
    return rows
