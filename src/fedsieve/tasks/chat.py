"""Conversations: which tokens of a chat are the assistant's, and so are learned.

A model's chat template makes one text of the messages. Some templates mark themselves what the
assistant generates. With the others the text is made up to each of the assistant's turns, and with
it: what the turn adds is its own, the mark that ends it included.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from fedsieve.data.templates import LETTERS
from fedsieve.errors import FedSieveError, raise_of_memory, words
from fedsieve.tasks.tokens import IGNORED, read_by, too_long

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, Any]
MESSAGES = 2000  # of a conversation; the template writes those before each turn anew
_BLANK = "WHAT-IS-SAID"  # in the place of a message, to see what a template writes around it
_DRAWS = re.compile(r"\|\s*random\b")
_MARKED = re.compile(r"\{%-?\s*generation\b")


def are(values: Sequence[Any]) -> bool:
    """Whether a column holds conversations: lists of messages, and no texts."""
    first = next((value for value in values if value is not None), None)
    return isinstance(first, list)


def messages_of(value: Any) -> list[Message]:
    """A conversation's messages, without what is not set in them.

    Raises FedSieveError, with the end of a sentence that begins with the value's place, for
    anything but a list of messages with a role and a text each.
    """
    if not isinstance(value, list) or not value:
        raise FedSieveError("holds no list of messages")
    if len(value) > MESSAGES:
        raise FedSieveError(f"holds {len(value):,} messages: at most {MESSAGES:,} are read")
    found: list[Message] = []
    for number, message in enumerate(value):
        if not isinstance(message, Mapping):
            raise FedSieveError(f"holds in message {number} no role and content")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise FedSieveError(f"holds in message {number} no text as its {key}")
        found.append({key: each for key, each in message.items() if each is not None})
    if (letters := sum(len(message["content"]) for message in found)) > LETTERS:
        raise FedSieveError(too_long(letters))
    return found


def encode(
    tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message], first: int
) -> tuple[list[int], list[int]]:
    """A conversation's tokens, and what is to be learned: the assistant's turns.

    first: the number of the message from which on they are learned
    Raises FedSieveError, with the end of a sentence that begins with the row's place, where the
    template does not take the messages, or where its turns cannot be told apart.
    """
    return _learned(tokenizer, *_text(tokenizer, messages, first))


def _learned(
    tokenizer: "PreTrainedTokenizerBase", text: str, spans: Sequence[tuple[int, int]]
) -> tuple[list[int], list[int]]:
    """A text's tokens, and those of them that lie in the spans."""
    # The template brings the begin token itself.
    made = read_by(tokenizer, text, add_special_tokens=False, return_offsets_mapping=True)
    ids, places = made["input_ids"], made["offset_mapping"]
    targets = [
        token if any(end > a and start < b for a, b in spans) and end > start else IGNORED
        for token, (start, end) in zip(ids, places, strict=True)
    ]
    return ids, targets


class Turn(NamedTuple):
    """The assistant's last turn.

    said:    the text before it, up to where it is opened
    content: what it says
    tokens, targets: of the conversation up to its end, of which it alone is learned
    ends:    the token that ends it, if one alone does; mark: else the text that does, or nothing
    """

    said: str
    content: str
    tokens: list[int]
    targets: list[int]
    ends: tuple[int, ...]
    mark: str


def last_turn(tokenizer: "PreTrainedTokenizerBase", parts: Sequence[Sequence[Message]]) -> Turn:
    """The assistant's last turn in a conversation.

    parts: of one conversation, each a list of messages
    Raises FedSieveError, with the end of a sentence that begins with the row's place, where the
    assistant has no turn, or where the template does not take the messages.
    """
    messages = [message for part in parts for message in messages_of(part)]
    turns = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        raise FedSieveError("holds no turn of the assistant")
    messages, content = messages[: turns[-1] + 1], messages[turns[-1]]["content"]
    text, start, end = _span(tokenizer, messages, turns[-1])
    marked = _marked(tokenizer, messages, text, turns[-1])
    spans = [(start, end)] if marked is None else marked
    tokens, targets = _learned(tokenizer, text, spans)
    last = next((token for token in reversed(targets) if token != IGNORED), None)
    ends = (last,) if last is not None and last in tokenizer.added_tokens_decoder else ()
    own = text[start:end]
    mark = own[own.rindex(content) + len(content) :].strip() if content in own else ""
    return Turn(text[:start], content, tokens, targets, ends, "" if ends else mark)


def check(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Raises FedSieveError for a tokenizer that cannot make texts of conversations."""
    if not tokenizer.chat_template:
        raise FedSieveError(
            "the rows are conversations, and the model's tokenizer has no chat template: take a "
            "model that was made for chat, or set tokenizer.chat_template and save it"
        )
    if not tokenizer.is_fast:
        raise FedSieveError(
            "conversations need a tokenizer that tells where its tokens lie in a text (a fast "
            "one), and this model's does not"
        )
    if _DRAWS.search(str(tokenizer.chat_template)):
        raise FedSieveError(
            "the tokenizer's chat template draws at random, so that a row would be other tokens "
            "each time: take `| random` out of it"
        )


def _text(
    tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message], first: int
) -> tuple[str, list[tuple[int, int]]]:
    """The text of all messages, and from where to where the assistant's turns go: as the template
    marks them itself, or else as they add to the text.
    """
    text: str = _rendered(tokenizer, messages, tokenize=False)
    if (marked := _marked(tokenizer, messages, text, first)) is not None:
        return text, marked
    spans = []
    for number, message in enumerate(messages):
        if message["role"] != "assistant" or number < first:
            continue
        after, start, end = _span(tokenizer, messages[: number + 1], number)
        if not text.startswith(after):
            raise FedSieveError(
                f"has a turn of the assistant (message {number}) that the chat template writes "
                "differently when others follow, so that its tokens cannot be told: take a "
                "template with generation marks"
            )
        spans.append((start, end))
    return text, spans


def _marked(
    tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message], text: str, first: int
) -> list[tuple[int, int]] | None:
    """From where to where the template says that the assistant writes, from a message on; None
    where it does not say. (The mask of tokens that transformers makes of it leaves out letters of
    several tokens.)
    """
    template = str(tokenizer.chat_template)
    if not _MARKED.search(template):
        return None
    from transformers.utils.chat_template_utils import render_jinja_template

    with _told():
        made, spans = render_jinja_template(
            [list(messages)],
            chat_template=template,
            return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
        )
    if made != [text] or not spans[0]:
        return None
    head = _rendered(tokenizer, messages[:first], tokenize=False) if first else ""
    return [(start, end) for start, end in spans[0] if start >= len(head)]


def _span(
    tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message], number: int
) -> tuple[str, int, int]:
    """The text of the messages, of which the last is the assistant's, and where its turn begins and
    ends in it: after what opens it, and with the mark that ends it.
    """
    text: str = _rendered(tokenizer, messages, tokenize=False)
    content: str = messages[-1]["content"]
    start = None
    if number and "add_generation_prompt" in str(tokenizer.chat_template):
        opened = _rendered(tokenizer, messages[:-1], tokenize=False, add_generation_prompt=True)
        start = len(opened) if text.startswith(opened) else None
    if start is None:
        # Nothing opens a turn, or something does with which none that is told begins ("<think>").
        other = _rendered(
            tokenizer, [*messages[:-1], {**messages[-1], "content": _BLANK}], tokenize=False
        )
        head = other[: max(0, other.find(_BLANK))].rstrip(" ")
        if _BLANK not in other or not text.startswith(head):
            raise FedSieveError(
                f"has a turn of the assistant (message {number}) whose words the chat template "
                "writes differently than others, so that its tokens cannot be told: take a "
                "template with generation marks"
            )
        start = len(head)
    # What follows the mark that ends a turn, a line break mostly, is nobody's. Where there is no
    # mark, it is the mark.
    end = len(text.rstrip())
    if content.strip() and text[:end].endswith(content.strip()):
        end = len(text)
    return text, start, end


def _rendered(tokenizer: Any, messages: Sequence[Message], **how: Any) -> Any:
    """What the template makes of the messages: a text, of which a tokenizer takes hundreds of bytes
    a letter, whatever the messages are.
    """
    with _told():
        made = tokenizer.apply_chat_template(list(messages), **how)
    if len(made) > LETTERS:
        raise FedSieveError(
            f"becomes a text of {len(made):,} letters by the chat template: at most {LETTERS:,} "
            "are read"
        )
    return made


@contextmanager
def _told() -> Iterator[None]:
    """What a template may raise, as the end of a sentence."""
    try:
        yield
    except Exception as error:
        raise_of_memory(error)
        why = words(error, 200)
        raise FedSieveError(f"is refused by the chat template: {why}") from error
