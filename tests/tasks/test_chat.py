"""Conversations become tokens of which the assistant's turns, their ends with them, are learned."""

from typing import Any

import pytest
from datasets import Dataset
from jinja2 import TemplateError
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

import fedsieve
from fedsieve.errors import FedSieveError
from fedsieve.tasks import catalogue, chat
from fedsieve.tasks.task import Fields, Rows
from fedsieve.tasks.tokens import Texts
from tests.conftest import Tiny

CHATML = (
    "{% for m in messages %}{{ '<start>' + m['role'] + '\n' + m['content'] + '<stop>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start>assistant\n' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ '<start>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<stop>' }}{% endgeneration %}{% else %}"
    "{{ m['content'] + '<stop>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start>assistant\n' }}{% endif %}"
)
BEGUN = "{{ '<begin>' }}" + CHATML
# Qwen's way: what was thought in earlier turns is not kept.
FORGETS = CHATML.replace("m['content'] +", "(m['content'] if loop.last else m['content'][:1]) +")
STRICT = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}" + CHATML
)
UNOPENED = CHATML[: CHATML.index("{% if add_generation_prompt")]
THINKS = CHATML.replace("{{ '<start>assistant\n' }}", "{{ '<start>assistant\nw9 w8' }}")
TRIMS = CHATML.replace("m['content'] +", "m['content'] | trim +")
TEMPLATES = {
    "prefixes": CHATML,
    "marks": MARKED,
    "with a begin token": BEGUN,
    "that opens no turn": UNOPENED,
    "that opens a turn with thoughts": THINKS,
    "that trims": TRIMS,
}
WORDS = ["<pad>", "<start>", "<stop>", "<begin>", "user", "assistant", "system", "?", "hi", "ho"]
WORDS += [f"w{n}" for n in range(20)]

THREE = [
    {"role": "system", "content": "w0 w1"},
    {"role": "user", "content": "hi w2"},
    {"role": "assistant", "content": "ho w3"},
    {"role": "user", "content": "w4 ?"},
    {"role": "assistant", "content": "w5"},
]


def tokenizer(template: str | None = CHATML, side: str = "right") -> PreTrainedTokenizerFast:
    made = Tokenizer(WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="<pad>"))
    made.pre_tokenizer = Whitespace()
    made.add_special_tokens([AddedToken(w, special=True) for w in WORDS[:4]])
    ready = PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<begin>", eos_token="<stop>"
    )
    ready.chat_template = template
    ready.truncation_side = side
    return ready


def read(rows: list[dict[str, Any]], of: Any, length: int = 64, **columns: str) -> Rows:
    fields = Fields(**(columns or {"text": "messages"}), max_length=length)  # type: ignore[arg-type]
    return catalogue.load("causal-lm").read(Dataset.from_list(rows), of, fields)


def words(made: Rows, row: int = 0) -> tuple[list[str], list[str]]:
    """A row's tokens, and those of them that are learned."""
    assert isinstance(made.examples, Texts)
    mask = made.examples.attention_mask[row].bool()
    ids, targets = made.examples.input_ids[row][mask], made.examples.labels[row][mask]
    assert all(t in (-100, i) for t, i in zip(targets.tolist(), ids.tolist(), strict=True))
    return [WORDS[i] for i in ids], [WORDS[t] for t in targets if t != -100]


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_the_assistants_turns_and_their_ends_are_learned_and_nothing_else(template: str) -> None:
    of = tokenizer(template)
    tokens, learned = words(read([{"messages": THREE}], of))
    assert learned == ["ho", "w3", "<stop>", "w5", "<stop>"]
    assert tokens == of.convert_ids_to_tokens(of.apply_chat_template(THREE, return_dict=False))
    assert tokens.count("<begin>") == template.count("<begin>")


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_a_conversation_may_begin_with_the_assistant(template: str) -> None:
    _, learned = words(read([{"messages": THREE[2:]}], tokenizer(template)))
    assert learned == ["ho", "w3", "<stop>", "w5", "<stop>"]


@pytest.mark.parametrize(
    ("template", "learned"),
    [
        ("{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' ? ' }}{% endfor %}", "w5 ?"),
        ("{% for m in messages %}{{ m['role'] + ' ' + m['content'] + '\n' }}{% endfor %}", "w5"),
        (
            "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ ' ' + m['content'] + "
            "'<stop>' }}{% else %}{{ 'user ' + m['content'] + ' ?' }}{% endif %}{% endfor %}",
            "w5 <stop>",
        ),
    ],
    ids=["a word ends it", "a line break ends it", "nothing opens it"],
)
def test_what_ends_a_turn_is_learned_whatever_it_is(template: str, learned: str) -> None:
    for messages in (THREE, THREE[3:]):
        _, found = words(read([{"messages": messages}], tokenizer(template)))
        assert " ".join(found).endswith(learned)
        assert "user" not in found
        assert found.count("w5") == 1


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize("eos", ["<stop>", "<begin>"])
def test_the_last_turn_is_what_is_learned_of_it(template: str, eos: str) -> None:
    """And it ends as its template ends it, whatever token else ends a text."""
    of = tokenizer(template)
    of.eos_token = eos
    turn = chat.last_turn(of, [THREE[:4], THREE[4:]])
    assert turn.content == "w5"
    assert [WORDS[t] for t in turn.targets if t != -100] == ["w5", "<stop>"]
    assert turn.ends == (WORDS.index("<stop>"),)
    assert turn.mark == ""
    begin = next(n for n, t in enumerate(turn.targets) if t != -100)
    assert turn.tokens[:begin] == of(turn.said, add_special_tokens=False)["input_ids"]
    assert turn.said.split("\n")[-2].endswith("assistant")


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_of_a_prompt_and_its_completion_the_completion_is_learned(template: str) -> None:
    rows = [{"prompt": THREE[:4], "completion": THREE[4:]}]
    made = read(rows, tokenizer(template), prompt="prompt", completion="completion")
    assert words(made)[1] == ["w5", "<stop>"]


def test_what_is_cut_keeps_what_is_learned_where_there_is_room() -> None:
    whole = words(read([{"messages": THREE}], tokenizer()))[0]
    tokens, learned = words(read([{"messages": THREE}], tokenizer(), len(whole) - 2))
    assert (tokens, learned) == (whole[:-2], ["ho", "w3", "<stop>"])
    tokens, learned = words(read([{"messages": THREE}], tokenizer(side="left"), 4))
    assert (tokens, learned) == (whole[-4:], ["w5", "<stop>"])
    rows = [{"messages": THREE}, {"messages": THREE[1:3]}]
    with pytest.warns(UserWarning, match="1 of 2 rows dropped: no token to learn"):
        made = read(rows, tokenizer(), 9)
    assert made.came.tolist() == [1]


USER = {"role": "user", "content": "hi"}
BAD: list[tuple[Any, str, str]] = [
    (None, CHATML, "holds no list of messages"),
    ([], CHATML, "holds no list of messages"),
    ([{"role": None, "content": "hi"}], CHATML, "holds in message 0 no text as its role"),
    ([USER, {"role": "assistant", "content": None}], CHATML, "message 1 no text as its content"),
    ([USER, USER, THREE[2]], STRICT, "is refused by the chat template: roles must alternate"),
    (THREE[1:], FORGETS, "(message 1) that the chat template writes differently"),
    (
        [USER, THREE[2]],
        "{{ messages[-1]['content'][::-1] }}",
        "whose words the chat template writes",
    ),
    ([USER, {"role": "assistant", "content": "x" * 4_000_000}], CHATML, "holds 4,000,002 letters"),
    ([USER] * 2001, CHATML, "holds 2,001 messages: at most 2,000"),
    *(
        ([USER, {"role": "assistant", "content": "ho"}], template, "by the chat template: at most")
        for template in (
            CHATML + "{{ 'w0 ' * 2000000 }}",
            "{% for n in range(2001) %}" + "x" * 2000 + "{% endfor %}" + CHATML,
            MARKED.replace("m['content']", "m['content'] * 3000000"),
            CHATML.replace(
                "m['content']", "m['content'] * (3000000 if m['content'] != 'ho' else 1)"
            ),
        )
    ),
    ([USER], "{{ nothing.at.all }}", "is refused by the chat template"),
]


@pytest.mark.parametrize(("messages", "template", "said"), BAD)
def test_conversations_that_cannot_be_used(messages: Any, template: str, said: str) -> None:
    good = [USER, {"role": "assistant", "content": "ho"}]
    rows = Dataset.from_list([{"messages": good}, {"messages": messages}])
    of, fields, task = tokenizer(template), Fields(text="messages"), catalogue.load("causal-lm")
    bad = task.bad(rows, of, fields)
    assert 1 in bad
    assert str(bad[1]).startswith("row 1 of column 'messages' ")
    assert said in str(bad[1])
    with pytest.raises(FedSieveError, match=r"row \d of column 'messages'"):
        task.read(rows, of, fields)


def by_bytes(template: str) -> PreTrainedTokenizerFast:
    """A tokenizer that gives a letter as many tokens as it has bytes."""
    letters = ["<pad>", "<stop>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    made = Tokenizer(BPE({letter: n for n, letter in enumerate(letters)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(w, special=True) for w in letters[:2]])
    ready = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<stop>")
    ready.chat_template = template
    return ready


INSIDE = (
    "{% for m in messages %}{{ '[' + m['role'] + ']' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}"
    "{{ '<stop>' }}{% endfor %}"
)
REMARK = "{# no {% generation %} here #}" + CHATML


@pytest.mark.parametrize(
    ("template", "ends"), [(INSIDE, ""), (MARKED, "<stop>"), (CHATML, "<stop>"), (REMARK, "<stop>")]
)
@pytest.mark.parametrize("said", ["é😀", " a b ", "😀 ü", "a"])
def test_all_bytes_of_what_is_said_are_learned(template: str, ends: str, said: str) -> None:
    of = by_bytes(template)
    chat_of = [USER, {"role": "assistant", "content": said}, USER]
    chat_of.append({"role": "assistant", "content": "ok"})
    made = read([{"messages": chat_of}], of, 200)
    learned = made.examples.labels[0]
    # HF closes a text with its eos where none is there: it is learned, too.
    told = of.decode(learned[learned != -100]).removesuffix("<stop>")
    assert told == f"{said}{ends}ok"


def test_a_tokenizer_without_a_template_is_refused() -> None:
    with pytest.raises(FedSieveError, match="no chat template"):
        read([{"messages": THREE}], tokenizer(None))


@pytest.mark.parametrize("drawn", ["{{ [1, 2]|random }}", "{{ messages |  random }}"])
def test_a_template_that_draws_is_refused(drawn: str) -> None:
    """Two ends, and two runs, would learn other tokens of equal files."""
    with pytest.raises(FedSieveError, match="draws at random"):
        read([{"messages": THREE}], tokenizer(CHATML + drawn))


def test_what_marks_raise_is_the_templates_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A text with marks is made twice, and the second time may fail alone."""

    def odd(*_: Any, **__: Any) -> Any:
        raise TemplateError("no second time")

    monkeypatch.setattr("transformers.utils.chat_template_utils.render_jinja_template", odd)
    with pytest.raises(FedSieveError, match="refused by the chat template: no second time"):
        read([{"messages": THREE}], tokenizer(MARKED))


def test_a_chat_is_trained_over_clients(tiny: Tiny, tmp_path: Any) -> None:
    """And one with a bad conversation is left out by name."""
    folder = tmp_path / "gpt2"
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoModelForCausalLM.from_pretrained(tiny.gpt2).save_pretrained(folder)
    of = AutoTokenizer.from_pretrained(tiny.gpt2)
    of.chat_template = "{% for m in messages %}{{ m['content'] + ' <end> ' }}{% endfor %}"
    of.save_pretrained(folder)
    ask = {"role": "user", "content": "cars0 cars1"}
    good = Dataset.from_list([{"messages": [ask, {"role": "assistant", "content": "cars2"}]}] * 6)
    bad = Dataset.from_list([{"messages": [{"role": "user", "content": None}]}])
    with pytest.warns(UserWarning, match="'bad': row 0 of column 'messages' holds in message 0 no"):
        run = fedsieve.finetune(
            folder,
            {"north": good, "south": good, "bad": bad},
            fedsieve.fedit(),
            rounds=3,
            test=good,
            task="causal-lm",
            text="messages",
            training=fedsieve.Training(optimizer="adamw", lr=0.05, batch=4),
        )
    run.finish()
    first, *_, last = run.metrics
    assert first.eval_loss is not None
    assert last.eval_loss is not None
    assert last.eval_loss < first.eval_loss
