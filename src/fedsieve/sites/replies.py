"""Replies of nodes, looked at before Flower makes objects of them.

Flower sends a message in objects: the message, its records, their arrays, and an array's chunks.
`Grid.pull_messages` puts them together in the server's own process, without a bound: an array may
name one chunk any number of times, so that a reply of 5 MB becomes gigabytes. And what is no object
raises whatever it raises, which would end the run for all.

So a reply is fetched here, object by object, and added up first. Whatever is wrong with it is the
failure of that one request; only an error of the connection to the SuperLink is raised. And a reply
answers the request for which the SuperLink has it, whatever it says of itself.
"""

import json
import threading
from collections.abc import Mapping
from typing import Any

import httpx
from flwr.app import Array, Message
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest
from flwr.proto.runtime_pb2 import PullAppMessagesRequest
from flwr.serverapp import Grid
from flwr.supercore.constant import HEAD_BODY_DIVIDER
from flwr.supercore.inflatable.inflatable_object import (
    get_object_body,
    get_object_head_values_from_object_content,
    iterate_object_tree,
)
from flwr.supercore.inflatable.inflatable_protobuf_utils import make_pull_object_fn_protobuf
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    inflate_object_from_contents,
    pull_objects,
)
from flwr.supercore.run import RunNotRunningException

from fedsieve.errors import WireError, with_type
from fedsieve.sites.flower_app import frame_of
from fedsieve.sites.server import Incoming

KINDS = ("Message", "RecordDict", "ArrayRecord", "Array", "ArrayChunk")
# Of the objects beside a frame's bytes: heads, ids, and a list of chunks, which may be short ones.
AROUND = 1 << 20
SMALL = 1 << 18  # bytes of one object that holds no bytes of a frame: it becomes many times as much


def fetch(grid: Grid, request: str, most: int) -> list[Incoming]:
    """The reply to a request, or nothing where there is none yet.

    most: bytes of the longest frame that it can hold
    Raises what the connection to the SuperLink raised; all else is in what is returned.
    """
    link, run = grid._runtime_client, grid.run.run_id
    pull = make_pull_object_fn_protobuf(link.PullObject, grid.node, run)
    size, adding = 0, threading.Lock()

    def pull_one(name: str) -> bytes:
        nonlocal size
        content: bytes = pull(name)
        with adding:  # Flower pulls several at once
            size += len(content)
            if size > 2 * most + AROUND:
                raise WireError(f"it is longer than all that {most} bytes can be sent in")
        return content

    def failed(error: object, lost: bool) -> list[Incoming]:
        return [Incoming(request, None, str(error), size, lost)]

    try:
        there = link.PullMessages(PullAppMessagesRequest(message_ids=[request]))
        if not there.messages_list:
            return []
        name = there.messages_list[0].metadata.message_id
        tree = iterate_object_tree(there.message_object_trees[0])
        try:
            contents = pull_objects(list(dict.fromkeys(part.object_id for part in tree)), pull_one)
        finally:  # the SuperLink need not keep it
            link.ConfirmMessageReceived(
                ConfirmMessageReceivedRequest(node=grid.node, run_id=run, message_object_id=name)
            )
        check(contents, most)
        message: Message = inflate_object_from_contents(name, contents)
        if message.has_error():
            reason = message.error.reason or f"Flower's error {message.error.code}"
            return failed(reason, lost=True)
        return [Incoming(request, frame_of(message), "", size)]
    except (httpx.TransportError, RunNotRunningException):
        raise
    except httpx.HTTPStatusError as error:
        # A full or a locked database, say: no word of the node's, which is asked again.
        return failed(f"the SuperLink could not give it: {error}", lost=True)
    except ObjectPullError as error:  # its node was too slow for Flower, or ended
        return failed(f"its bytes did not come: {error}", lost=True)
    except WireError as error:
        return failed(error, lost=False)
    except Exception as error:  # of Flower, protobuf or JSON, over whatever a node has made up
        return failed(with_type(error), lost=False)


def check(contents: Mapping[str, bytes], most: int) -> None:
    """Raises WireError for objects that would make more than one array of so many bytes.

    contents: all objects of a message, by id. Whatever is not as Flower writes it raises anything.
    """
    arrays = 0
    for content in contents.values():
        kind, children, _ = get_object_head_values_from_object_content(content)
        if kind not in KINDS:
            raise WireError(f"it holds a {kind!r:.40}, which no frame is sent in")
        if kind != "ArrayChunk" and len(content) > SMALL:
            raise WireError(f"its {kind} is {len(content)} bytes long, and says no more than that")
        if kind != Array.__qualname__:
            continue
        arrays += 1
        if arrays > 1:
            raise WireError("it holds several arrays, and a frame is one")
        said: dict[str, Any] = json.loads(get_object_body(content, Array))
        lengths = [_body_length(contents[child]) for child in children]
        length = sum(lengths[index] for index in said["arraychunk_ids"])
        if length > most:
            raise WireError(f"it would be {length} bytes: at most {most} can be")


def _body_length(content: bytes) -> int:
    return len(content) - content.find(HEAD_BODY_DIVIDER) - len(HEAD_BODY_DIVIDER)
