"""The engine for clients on other machines: sites, and a transport that reaches them.

A transport knows nodes and carries frames (worker.py); Flower's Grid is one, in flower_app.py,
and a test's list of functions is another. What a transport cannot know is here: which site is at
which node, who has answered, and when a round stops waiting. Nothing here needs Flower.

A node is met before it is used: it describes itself, and the recipe is told to it, once. A node
that comes back, as the same or as another, is met again. Only then can its site be drawn.

A round closes when all who were asked have answered, or when as many updates that can be merged
are there as it needs (over-selection), or at its deadline. Whoever has not answered by then is
late: the receipt says so, and what it sends afterwards is counted and thrown away. Until then its
site is busy and not drawn.
"""

import json
import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from fedsieve.algebra.budget import Client
from fedsieve.algebra.keys import Key
from fedsieve.engine.client import Reply
from fedsieve.engine.loop import Exchange
from fedsieve.errors import FedSieveError, WireError, count, few, printable
from fedsieve.frame import Frame, pack, unpack
from fedsieve.sites import worker
from fedsieve.sites.worker import check_seal
from fedsieve.tasks import catalogue
from fedsieve.tasks.tally import Score, Tally, scores

FACTS = 1 << 20  # bytes of what a site says of itself
SUMS = 1 << 22  # bytes: what a site counts in an evaluation, however small the adapter is
# Clocks of different machines differ, and a message's time to live is counted on all of them.
SKEW = 60.0
# Until a node that was refused is asked again: its worker may be running by then.
RETRY = 10.0
# Of any figure that a site tells, and of any time, in seconds: four months. The sum over a round of
# ten thousand sites is then still a time that a log may hold (report/read.py).
LARGEST, LONGEST = 1e15, 1e7
# Rows, or tokens, that a site counts in an evaluation: of ten thousand sites together a float still
# counts each (report/shown.py reads them back).
MOST_COUNTED = 1e11
# Between two looks at who is connected, while a round is under way.
LOOK = 2.0
# How often a request is sent that gets lost on its way.
TRIES = 3


class Node(NamedTuple):
    """A machine that is connected now.

    since: changes when it has been away
    key:   the public key that it has proved to hold, where nodes prove one; else nothing
    """

    id: int
    since: str = ""
    key: str = ""


class PendingRequest(NamedTuple):
    """A request on its way. transport: bytes of the message that carries it."""

    id: str
    transport: int


class Incoming(NamedTuple):
    """What came back for a request: a frame's bytes, or None and what went wrong.

    lost: without data, whether nothing came, so that asking again may help
    """

    request: str
    data: bytes | None
    error: str
    transport: int
    lost: bool = True


class Transport(NamedTuple):
    """What an engine needs of a network.

    nodes:   who is connected now
    send:    (node's id, "train", "evaluate" or "query", frame, seconds that it is worth carrying)
             -> a pending request, or None if the node cannot be reached
    collect: requests, each with the most bytes that its answer can have -> what has come back for
             them so far; each is given once
    What a node sends never raises: it is that request's failure. An error of the network does.
    """

    nodes: Callable[[], Sequence[Node]]
    send: Callable[[int, str, bytes, float], PendingRequest | None]
    collect: Callable[[Mapping[str, int]], Sequence[Incoming]]


class RoundPolicy(NamedTuple):
    """How long to wait, and for how many. Times in seconds.

    sites:    so many are waited for before the first round
    deadline: of a round, from its first message to the last answer that counts
    setup:    for a site to load model and data
    wait:     for enough sites to be there
    extra:    so many more sites are asked than the recipe's cohort, and the slowest left out
    quorum:   so many are waited for before any later round, and at least one
    enough:   a round closes with so many updates; None waits for all that were asked
    poll:     between two looks at what has arrived
    """

    sites: int = 1
    deadline: float = 600.0
    setup: float = 900.0
    wait: float = 600.0
    extra: int = 0
    quorum: int = 0
    enough: int | None = None
    poll: float = 0.2


class _Site(NamedTuple):
    client: Client
    node: Node


class _Asked(NamedTuple):
    """A request that has not been answered. until: when it is not worth waiting for any more.

    client: whom it was sent to; None if the node has not yet said who it is
    most: bytes that no answer to it can be longer than
    """

    node: Node
    until: float
    client: Client | None
    most: int


class Dispatch(NamedTuple):
    """A request to a site that is there.

    transport: bytes of all that was carried for it; asked: digest of the request (worker.digest)
    most: bytes that no answer to it can be longer than
    """

    client: Client
    node: Node
    kind: str
    data: bytes
    transport: int
    asked: bytes
    most: int
    tries: int = 1


class Sites:
    """The sites of a federation: who they are, where they are, and what they still owe."""

    def __init__(
        self,
        transport: Transport,
        recipe: str,
        digest: str,
        welcome: Callable[[Mapping[str, Any], Client | None], Client],
        policy: RoundPolicy,
        say: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        merged: Mapping[str, int] = MappingProxyType({}),
        keys: Mapping[str, str] = MappingProxyType({}),
        pin: Callable[[Mapping[str, str]], None] = lambda keys: None,
        given: Mapping[tuple[str, str], int] = MappingProxyType({}),
        number: int = 0,
        most: int = worker.BODY,
        met: Collection[str] = (),
        meet: Callable[[list[str]], None] = lambda sites: None,
    ) -> None:
        """
        recipe, digest: the recipe's text, which every site is told, and what requests call it
        welcome: a site's description -> the client that it is. Asked again with that client when
            the site is ready for the recipe and says how. Raises FedSieveError to refuse it
        merged: the last round in which each site's update was merged
        keys: site -> the key of its node, as far as they are known. A site that is met for the
            first time is bound to its node's key; with another one it is refused from then on
        pin: told all keys whenever one is added
        most: the longest update, in bytes, that the adapter's layout can fill (wire.longest)
        given: (site, digest of what an update said) -> its round, of the updates that were merged
        number: the last round before this
        met: the sites that were met before; meet: told all of them whenever one is added
        """
        self._transport, self._recipe, self._digest = transport, recipe, digest
        self._welcome, self._policy = welcome, policy
        self._say: Callable[[str], None] = lambda text: say(cleaned(text))
        self._clock, self._sleep = clock, sleep
        self._sites: dict[str, _Site] = {}
        self._connected: frozenset[Node] = frozenset()
        self._refused: dict[Node, tuple[float, str]] = {}  # until when, and why
        self._meeting: dict[str, _Asked] = {}  # by request: who it is, or that it is ready
        self._owed: dict[str, _Asked] = {}  # by request: rounds
        self._without: dict[tuple[str, str], str] = {}  # (site, what it was to do) -> why not
        self._stray: dict[str, int] = {}  # transport of what came too late, by site
        self._aside = 0  # transport of all that is not a round's
        self._begun = False
        self._looked = -math.inf  # when it was seen last who is connected
        self._number = number
        self._merged = dict(merged)
        self._usable = 0
        self._lost: set[str] = set()  # sites without their memory: they go on from what they have
        self._keys, self._pin = dict(keys), pin
        self._met, self._meet_one = {*met, *merged}, meet
        self._given = dict(given)
        self._said: dict[str, tuple[str, int]] = {}  # of this round: digest and round, by site
        self._only: frozenset[str] | None = None  # names, where no others are taken in any more
        self._only_why = ""
        self._most = most + worker.HEADER

    def there(self) -> list[Client]:
        """The sites that can be drawn now, in order of id; waits until there are enough.

        Raises FedSieveError if there are too few for too long.
        """
        policy = self._policy
        least = max(1, policy.quorum)
        wanted = least if self._begun else max(least, policy.sites)
        began = self._clock()
        while True:
            self._meet()
            free = self._free()
            if len(free) >= wanted:
                break
            if self._clock() - began > policy.wait:
                if len(free) < least:
                    raise FedSieveError(
                        f"after {policy.wait:g} s {len(free)} sites are there, and a round "
                        f"needs {least}: {self._what_to_do(len(free), least)}"
                    )
                self._say(f"{len(free)} of {wanted} sites are there: going on without the others")
                break
            self._sleep(policy.poll)
        self._begun = True
        return free

    def _what_to_do(self, free: int, least: int) -> str:
        busy = [site.client.id for site in self._owing()]
        if free + len(busy) >= least:
            return (
                f"{few(sorted(busy))} would be enough, still at an earlier round: go on with "
                "--resume, and a longer --deadline or --wait"
            )
        return "start the workers and the nodes of the sites, then go on with --resume"

    def _owing(self) -> list[_Site]:
        """The sites that are there and have a round to end first."""
        busy = {asked.node for asked in self._owed.values()}
        return [s for s in self._sites.values() if s.node in self._connected and s.node in busy]

    def as_now(self, client: Client) -> Client:
        """The site of this name as it was met last."""
        found = self._sites.get(client.id)
        return client if found is None else found.client

    def close(self, names: Collection[str], why: str) -> None:
        """Take in no site of another name from now on. why: what such a one is told"""
        self._only, self._only_why = frozenset(names), why

    @property
    def exchange(self) -> Exchange:
        """What the round loop needs of the sites."""
        return Exchange(self.carry, self.settle, usable=self.usable)

    def before(self, site: str, said: str, number: int) -> int | None:
        """The earlier round in which a site's update said the same and was merged, if there is one.

        said: digest of an update's meaning (`payload.digest`), which is noted if it is merged
        """
        self._said[site] = said, number
        first = self._given.get((site, said))
        return None if first == number else first  # of a round that is done again

    def settle(self, merged: Collection[str]) -> None:
        """Note whose updates of the last round were merged: what a site keeps begins there, and
        none may come again.
        """
        for site in merged & self._said.keys():
            said, number = self._said[site]
            self._given.setdefault((site, said), number)
        self._said.clear()
        self._merged |= dict.fromkeys(merged, self._number)
        self._lost -= {*merged}

    def usable(self, count: int) -> None:
        """Note how many updates of this round could be merged by now: it closes at enough."""
        self._usable = count

    def carry(self, messages: Iterable[tuple[Client, bytes]], key: Key) -> Iterator[Reply]:
        """The round's messages to their sites, all at once, and a reply for each, as it comes.

        A site that gives nothing to merge has a reply that says why.
        """
        policy = self._policy
        self._number, self._usable = key.round, 0
        head = {"do": "train", "recipe": self._digest, "seed": key.seed, "round": key.round}
        began = self._clock()
        waiting: dict[str, Dispatch] = {}
        unreached: list[Reply] = []
        for client, message in messages:
            stray = self._stray.pop(client.id, 0)
            own = {**head, "site": client.id, **self._after(client)}
            request, dispatch = self._go(
                client, "train", Frame(own, message), policy.deadline, stray
            )
            if request is None:
                reply = _nothing(client, "its node could not be reached")
                unreached.append(reply._replace(transport=dispatch.transport))
            else:
                waiting[request] = dispatch
        yield from unreached
        enough = math.inf if policy.enough is None else policy.enough
        for done in self._come_back(waiting, began + policy.deadline):
            for dispatch, incoming in done:
                reply = _reply(dispatch, incoming, key.round)
                said = _header(incoming, dispatch.most)
                if said.get("unknown_recipe") is True:
                    # Its worker lost its folder: it is met again.
                    self._sites.pop(dispatch.client.id, None)
                if said.get("lost_memory") is True:
                    self._lost.add(dispatch.client.id)
                if self._usable >= enough:
                    reply = reply._replace(update=None, reason=self._too_late(began, enough))
                yield reply._replace(transport=dispatch.transport)
            if self._usable >= enough:
                break
        for request, dispatch in waiting.items():
            self._owed[request] = _Asked(
                dispatch.node, began + policy.deadline + SKEW, dispatch.client, dispatch.most
            )
        late = self._too_late(began, enough)
        for dispatch in waiting.values():
            yield _nothing(dispatch.client, late)._replace(transport=dispatch.transport)

    def aside(self) -> int:
        """Transport of all but the rounds' own messages since this was last asked, in bytes."""
        spent, self._aside = self._aside, 0
        return spent

    def known(self) -> list[str]:
        """The sites that were ever met, there or not."""
        return sorted(self._met)

    def ask_all(self, do: str, body: bytes, seconds: float) -> dict[str, Frame]:
        """What the sites that are there answer about an adapter, by id; the others are left out.

        do: "evaluate" or "keep"; body: the adapter after the last round that was exchanged. What is
            to be kept is sent to those as well that have a round to end first; who is not there, or
            does not answer, is told in either case
        """
        kind = "evaluate" if do == "evaluate" else "query"
        head = {"do": do, "recipe": self._digest, "round": self._number}
        waiting: dict[str, Dispatch] = {}
        answers: dict[str, Frame] = {}
        until = self._clock() + seconds
        asked = self._free()
        free = {client.id for client in asked}
        others = [site for id, site in self._sites.items() if id not in free]
        busy = [site.client for site in self._owing()]
        if do == "keep":
            asked += busy
        away = {
            "still at a round": [] if do == "keep" else [client.id for client in busy],
            "not there": [site.client.id for site in others if site.node not in self._connected],
        }
        for why, names in away.items():
            if names:
                self._say(
                    f"{do}: {count(len(names), 'site')} not asked, {why}: {few(sorted(names))}"
                )
        for client in asked:
            frame = Frame({**head, "site": client.id, **self._after(client)}, body)
            request, dispatch = self._go(client, kind, frame, seconds, 0)
            if request is None:
                self._aside += dispatch.transport
            else:
                waiting[request] = dispatch
        for done in self._come_back(waiting, until):
            for dispatch, incoming in done:
                self._aside += dispatch.transport
                site = dispatch.client.id
                try:
                    answers[site] = _answer(incoming, dispatch)
                    self._without.pop((site, do), None)
                except WireError as error:
                    if self._without.get((site, do)) != str(error):  # not each time anew
                        self._say(f"{site}: {do}: {error}")
                    self._without[site, do] = str(error)
        for dispatch in waiting.values():
            self._aside += dispatch.transport
            self._say(f"{dispatch.client.id}: {do}: no answer in {seconds:g} s")
        return dict(sorted(answers.items()))

    def _after(self, client: Client) -> dict[str, Any]:
        """What a site is told of its own last round, and that it has lost what it kept of it."""
        after = {"after": self._merged.get(client.id, 0)}
        return {**after, "lost": True} if client.id in self._lost else after

    def _go(
        self, client: Client, kind: str, frame: Frame, seconds: float, transport: int
    ) -> tuple[str | None, Dispatch]:
        site = self._sites.get(client.id)
        node = Node(0) if site is None else site.node
        most = max(self._most, SUMS) if kind == "evaluate" else self._most
        dispatch = Dispatch(client, node, kind, pack(frame), transport, worker.digest(frame), most)
        there = site is not None and node in self._connected
        pending = (
            self._transport.send(node.id, kind, dispatch.data, seconds + SKEW) if there else None
        )
        if pending is None:
            return None, dispatch
        return pending.id, dispatch._replace(transport=transport + pending.transport)

    def _come_back(
        self, waiting: dict[str, Dispatch], until: float
    ) -> Iterator[list[tuple[Dispatch, Incoming]]]:
        """The dispatches that are done, as they are; those still in `waiting` at the end are not.

        Whoever asks for more takes its time with what it was given: what came meanwhile has come,
        and is looked for once more when the time is up. What was lost on its way is sent again: a
        worker that was asked before gives the same answer again, without training again.
        """
        up = False
        while waiting and not up:
            up = self._clock() >= until
            done: list[tuple[Dispatch, Incoming]] = []
            arrived = self._collect({name: each.most for name, each in waiting.items()})
            for incoming in arrived:
                dispatch = waiting.pop(incoming.request)
                dispatch = dispatch._replace(transport=dispatch.transport + incoming.transport)
                if incoming.data is None and incoming.lost and not up and dispatch.tries < TRIES:
                    self._say(f"site {dispatch.client.id}: {incoming.error}; it is asked again")
                    left = until - self._clock() + SKEW
                    again = self._transport.send(
                        dispatch.node.id, dispatch.kind, dispatch.data, left
                    )
                    if again is not None:
                        spent = dispatch.transport + again.transport
                        waiting[again.id] = dispatch._replace(
                            transport=spent, tries=dispatch.tries + 1
                        )
                        continue
                done.append((dispatch, incoming))
            yield sorted(done, key=lambda pair: pair[0].client.id)
            if not arrived and not up:
                if self._clock() - self._looked >= LOOK:
                    self._meet()  # whoever comes back now can be drawn in the next round
                self._sleep(self._policy.poll)

    def _too_late(self, began: float, enough: float) -> str:
        if self._usable < enough:
            return f"late: no answer in the round's {self._policy.deadline:g} s (--deadline)"
        return f"late: the round had its {enough:g} updates after {self._clock() - began:.4g} s"

    def _free(self) -> list[Client]:
        busy = {asked.node for asked in self._owed.values()}
        return [
            site.client
            for _, site in sorted(self._sites.items())
            if site.node in self._connected and site.node not in busy
        ]

    def _meet(self) -> None:
        """Get to know the nodes that are new, as far as they have answered."""
        self._connected = frozenset(self._transport.nodes())
        now = self._looked = self._clock()
        self._owed = {t: o for t, o in self._owed.items() if o.until > now}
        self._meeting = {t: m for t, m in self._meeting.items() if m.until > now}
        met = {s.node for s in self._sites.values()} | {m.node for m in self._meeting.values()}
        met |= {node for node, (until, _) in self._refused.items() if until > now}
        for node in sorted(self._connected - met):
            self._ask(node, Frame({"do": "describe"}), None)
        for incoming in self._collect({name: each.most for name, each in self._meeting.items()}):
            self._get_to_know(self._meeting.pop(incoming.request), incoming)

    def _get_to_know(self, asked: _Asked, incoming: Incoming) -> None:
        node, client = asked.node, asked.client
        self._aside += incoming.transport
        try:
            head = _told(incoming, FACTS).header
            if client is None:
                client = self._welcome(head, None)
                self._refuse_another(client.id, node)
                self._ask(node, Frame({"do": "recipe"}, self._recipe.encode()), client)
                return
            client = self._welcome(head, client)
            self._refuse_another(client.id, node)
        except FedSieveError as error:
            said = self._refused.get(node, (0.0, ""))[1]
            self._refused[node] = self._clock() + RETRY, str(error)
            if str(error) != said:
                who = f"node {node.id}" + (f", as site {client.id}," if client else "")
                self._say(f"{who} is not used: {error}")
            return
        if node.key and client.id not in self._keys:
            self._keys[client.id] = node.key
            self._pin(self._keys)
        known = client.id in self._sites
        self._sites[client.id] = _Site(client, node)
        if client.id not in self._met:
            self._met.add(client.id)
            self._meet_one(self.known())
        self._say(f"site {client.id} is {'back' if known else 'there'}: {client.examples} examples")

    def _refuse_another(self, name: str, node: Node) -> None:
        if self._only is not None and name not in self._only:
            raise FedSieveError(self._only_why)
        others = [site for site, key in self._keys.items() if key == node.key and site != name]
        if node.key and others:
            raise FedSieveError(
                f"its node's key is that of site {others[0]!r}: a key holds one name"
            )
        if self._keys.get(name, node.key) != node.key:
            raise FedSieveError(
                f"its node has another key than the one that was site {name!r} before"
            )
        holders = [site.node for site in self._sites.values() if site.client.id == name]
        holders += [a.node for a in self._meeting.values() if a.client and a.client.id == name]
        if any(holder.id != node.id and holder in self._connected for holder in holders):
            raise FedSieveError(f"another node is the site {name!r} already")

    def _ask(self, node: Node, frame: Frame, client: Client | None) -> None:
        seconds = self._policy.setup + SKEW
        until = self._clock() + seconds
        pending = self._transport.send(node.id, "query", pack(frame), seconds)
        if pending is not None:
            self._aside += pending.transport
            self._meeting[pending.id] = _Asked(node, until, client, FACTS)

    def _collect(self, wanted: Mapping[str, int]) -> list[Incoming]:
        """What has come back for these requests. What came too late for others is counted."""
        if not wanted and not self._owed:
            return []
        # By request: whoever carries an answer twice has brought one answer.
        requests = {**{name: each.most for name, each in self._owed.items()}, **wanted}
        arrived = {a.request: a for a in self._transport.collect(requests) if a.request in requests}
        for incoming in arrived.values():
            owed = self._owed.pop(incoming.request, None)
            if owed is not None and owed.client is not None and incoming.request not in wanted:
                site = owed.client.id
                self._stray[site] = self._stray.get(site, 0) + incoming.transport
                self._say(f"site {site}: an answer came too late and is thrown away")
        return [a for a in arrived.values() if a.request in wanted]


def joint_score(
    answers: Mapping[str, Frame],
    task: str,
    classes: tuple[str, ...],
    say: Callable[[str], None],
    lead: str | None = None,
) -> Score | None:
    """The scores over all that the sites counted, exact since they send sums, and their spread over
    the sites; None if none counted. lead: as in `tally.score`

    A site whose answer holds no such sums is left out, and that is said; so is one whose loss is no
    number, where another's is one: a model that diverged has none anywhere.
    """
    counts: dict[str, Tally] = {}
    for site, frame in answers.items():
        try:
            counts[site] = _tally(frame, task, classes)
        except WireError as error:
            say(f"site {site}: its evaluation is left out: {error}")
    own = [site for site in counts if counts[site].counted]
    odd = [site for site in own if math.isnan(counts[site].loss)]
    for site in odd:
        if len(odd) == len(own):
            say(f"site {site}: its evaluation has no loss that is a number, nor has any other's")
        else:
            del counts[site]
            say(f"site {site}: its evaluation is left out: its loss is no number, as others' is")
    try:
        joint = scores(catalogue.load(task), [*counts.values()], classes, lead, [*counts])
    except Exception as error:  # a library's, of numbers that no rows would have given it
        say(f"the sites' evaluation is left out: no scores can be made of it ({error!r:.200})")
        return None
    return joint if joint.counted else None


def _tally(frame: Frame, task: str, classes: tuple[str, ...]) -> Tally:
    """What a site counted. Raises WireError for what cannot have been counted."""
    head = frame.header
    counted = number_of(head, "counted", MOST_COUNTED)
    loss = math.nan if head.get("loss_sum") is None else number_of(head, "loss_sum")
    try:
        sums = json.loads(frame.body)
        if not isinstance(sums, dict):
            raise TypeError
        sums = {name: float(value) for name, value in sums.items()}
    except (ValueError, TypeError, RecursionError, OverflowError):
        raise WireError("its sums cannot be read") from None
    found = Tally(loss, int(counted), sums)
    # The squares of those of all sites together are still numbers.
    real = all(abs(value) <= LARGEST**2 for value in sums.values())
    real = real and (counted > 0 or found.loss == 0)
    if not (real and counted == found.counted >= 0 and catalogue.load(task).fits(found, classes)):
        raise WireError(f"such sums over {counted:g} cannot be")
    return found


def _answer(incoming: Incoming, dispatch: Dispatch) -> Frame:
    """What a site answers to this request. Raises WireError for a refusal or another's answer."""
    frame = _told(incoming, dispatch.most)
    check_seal(dispatch.asked, frame)
    return frame


def _told(incoming: Incoming, most: int) -> Frame:
    if incoming.data is None:
        what = "no answer" if incoming.lost else "answered with bytes that are no answer"
        raise WireError(f"{what}: {incoming.error}")
    if len(incoming.data) > most:
        raise WireError(f"an answer of {len(incoming.data)} bytes: at most {most} can be")
    frame = unpack(incoming.data)
    if frame.header.get("ok") is not True:
        raise WireError(f"the site says: {_words(frame.header.get('error', 'nothing'))}")
    return frame


def _header(incoming: Incoming, most: int) -> Mapping[str, Any]:
    """What a site's answer says of itself; nothing where there is none, or one that is too long."""
    try:
        there = incoming.data is not None and len(incoming.data) <= most
        return unpack(incoming.data).header if there and incoming.data is not None else {}
    except WireError:
        return {}


def _reply(dispatch: Dispatch, incoming: Incoming, number: int) -> Reply:
    client = dispatch.client
    try:
        frame = _answer(incoming, dispatch)
        head = frame.header
        if head.get("round") != number:
            said = cleaned(head.get("round"), 20)
            raise WireError(f"an answer for round {said} in round {number}")
        reason = head.get("reason")
        if reason is None and not frame.body:
            raise WireError("an answer without an update")
        return Reply(
            client=client,
            update=None if reason is not None else frame.body,
            reason=None if reason is None else _words(reason),
            # Below zero where a method adds a term of its own to it, as SCAFFOLD does.
            loss=math.nan if head.get("loss") is None else number_of(head, "loss", least=-LARGEST),
            steps=int(number_of(head, "steps")),
            seconds=number_of(head, "seconds", LONGEST),
            compute=number_of(head, "compute", LONGEST),
            wire=number_of(head, "wire", LONGEST),
            memory=int(number_of(head, "memory")),
        )
    except WireError as error:
        return _nothing(client, str(error))


def _nothing(client: Client, reason: str) -> Reply:
    return Reply(client, None, cleaned(reason), math.nan, 0, 0.0, 0.0, 0.0, 0)


def _words(said: object) -> str:
    """What a site says in a text of its own."""
    return (
        (cleaned(said) or "no reason given") if isinstance(said, str) else "what it says is no text"
    )


def cleaned(said: object, most: int = 500) -> str:
    """What a site says, for a log, a terminal or a page.

    It is trusted with neither its length nor its characters: at most so many, and printable ones.
    """
    if isinstance(said, int) and not isinstance(said, bool) and abs(said) > LARGEST:
        return "a number beyond all sense"  # Python refuses to write one of 5000 digits
    text = said if isinstance(said, str) else repr(said)
    return printable(text[:most]) + ("..." if len(text) > most else "")


def number_of(head: Mapping[str, Any], name: str, most: float = LARGEST, least: float = 0) -> float:
    """A number of an answer's header, at most so large that sums of them make sense.

    Raises WireError if it is none, or not from `least` to `most`.
    """
    value = head.get(name)
    # In this order: NaN is not within, and an int may be too large for a float.
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise WireError(f"an answer whose {name} is no number from {least:g} to {most:g}")
    return value
