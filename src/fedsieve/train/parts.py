"""Which parts of a model are trained whole, beside or instead of LoRA pairs.

Three kinds: a classifier's head, which is all that lies outside the model's body; what the
checkpoint did not hold, so that its numbers were drawn at load (a pooler, say); and the modules
that the user names. Whoever loads the adapter draws other numbers, so what was drawn must be saved,
and so it is trained.

A base model says itself what was drawn: those parameters require a gradient, all others are frozen.
"""

import re
from collections.abc import Iterable, Mapping, Sequence

from torch import nn
from transformers import PreTrainedModel

from fedsieve.errors import FedSieveError, nearest
from fedsieve.settings import Task
from fedsieve.tasks import catalogue
from fedsieve.train.targets import called

Place = tuple[nn.Module, str]  # the module that holds a parameter, and its attribute there


def freeze_loaded(base: PreTrainedModel, drawn: Iterable[str]) -> None:
    """Let those of the named parameters that exist require a gradient, and nothing else."""
    base.requires_grad_(False)
    names = set(drawn)
    for name, parameter in base.named_parameters():
        parameter.requires_grad_(name in names)


def refuse_random_body(base: PreTrainedModel, source: str, task: Task) -> None:
    """Raises FedSieveError where what was drawn is no head: a base of random weights is no base.

    A classifier's head, and modules between it and the layers such as a pooler, can be trained
    from the beginning; layers, embeddings and the head of a language model cannot.
    """
    outside = set(_head(base))
    embeddings = (nn.Embedding, nn.EmbeddingBag)
    for name in _drawn(base):
        holder = base.get_submodule(name.rpartition(".")[0])
        if name in outside and not catalogue.load(task).head:
            raise FedSieveError(
                f"model {source!r}: its checkpoint holds no {name}, the head of a language model: "
                "give a model that was trained to continue texts"
            )
        # A norm that is half there lost something: its name is another, or the file is damaged.
        half = "norm" in type(holder).__name__.lower() and not all(
            parameter.requires_grad for parameter in holder.parameters(recurse=False)
        )
        if name not in outside and (half or in_layer(name) or isinstance(holder, embeddings)):
            raise FedSieveError(
                f"model {source!r}: its checkpoint holds no {name}, which belongs to the model's "
                "body: give a whole checkpoint of this model; see also model.settings"
            )


def unread_layers(base: PreTrainedModel, unexpected: Iterable[str]) -> list[str]:
    """Those tensors of a checkpoint that are one more layer of a row that the model has."""
    like = re.compile(r"(?<=\.)[0-9]+(?=\.)")
    known = {like.sub("0", f".{name}") for name, _ in base.named_parameters()}
    return sorted(
        name
        for name in unexpected
        if like.search(name) and any(each.endswith(like.sub("0", f".{name}")) for each in known)
    )


def in_layer(name: str) -> bool:
    """Whether a parameter belongs to one of a row of layers."""
    return re.search(r"\.\d+\.", name) is not None


def trained_whole(base: PreTrainedModel, named: Sequence[str], *, head: bool) -> set[str]:
    """The names of the parameters that are trained whole; see the module's head. A tied one may be
    there under any of its names.

    named: modules (their whole names, or the last parts of these) that the user asks for
    head:  whether all that lies outside the body is among them
    Raises FedSieveError for a name that no module has, and where a head is asked for and there is
    none.
    """
    names = set(_drawn(base))
    if head:
        outside = _head(base)
        if not outside and not named:
            raise FedSieveError(
                "the model has no head outside its body: name modules in lora.whole"
            )
        names |= set(outside)
    for each in named:
        modules = [name for name, _ in base.named_modules() if called(name, each)]
        found = {
            name
            for name, _ in base.named_parameters(remove_duplicate=False)
            if any(name.startswith(f"{module}.") for module in modules)
        }
        if not found:
            known = {name.rpartition(".")[2] for name, _ in base.named_modules() if name}
            raise FedSieveError(
                f"lora.whole names {each!r}, and no module with weights of its own is called so"
                + nearest(each.rpartition(".")[2], known)
            )
        names |= found
    return names


def modules_of(base: PreTrainedModel, names: set[str]) -> list[str]:
    """The fewest modules that hold all the named parameters, and but few others: sorted names.

    Raises FedSieveError for a parameter that no module beneath the body holds: PEFT can only train
    modules whole.
    """
    body = {"", *_body(base)}
    modules = set()
    for name in names:
        module = name.rpartition(".")[0]
        if module in body:
            raise FedSieveError(
                f"the checkpoint of the model holds no {name}, and a parameter that no module of "
                "its own holds cannot be trained and saved: give a whole checkpoint"
            )
        while (parent := module.rpartition(".")[0]) not in body and _holds_only(
            base, parent, names
        ):
            module = parent
        modules.add(module)
    inner = {m for m in modules if any(m.startswith(f"{other}.") for other in modules)}
    return sorted(modules - inner)


def tied_places(model: nn.Module) -> dict[int, list[tuple[str, Place]]]:
    """id of a parameter -> where it sits, by name; a tied one sits in several places."""
    places: dict[int, list[tuple[str, Place]]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        holder, _, attribute = name.rpartition(".")
        places.setdefault(id(parameter), []).append(
            (name, (model.get_submodule(holder), attribute))
        )
    return places


def refuse_tied(
    known: Mapping[int, Sequence[tuple[str, Place]]], modules: Iterable[str], key: str
) -> None:
    """Raises FedSieveError if a weight of a module belongs to a module outside it too.

    known: what `tied_places` gave; key: of the recipe, that named the modules

    PEFT would train a copy: the model that is merged, saved and loaded ties both again.
    """
    chosen = list(modules)
    for places in known.values():
        for module in chosen:
            own = [name for name, _ in places if name.startswith(f"{module}.")]
            others = [name for name, _ in places if not name.startswith(f"{module}.")]
            if own and others:
                raise FedSieveError(
                    f"{key} takes in {own[0]}, which is one weight with {others[0]}: training one "
                    "of two tied weights would part them; leave it out, or train all (method "
                    "'full')"
                )


def _head(base: PreTrainedModel) -> list[str]:
    """The parameters outside the model's body; of tied ones, those that the body has not."""
    modules = [base.get_submodule(name) for name in _body(base)] or [base]
    body = {id(parameter) for module in modules for parameter in module.parameters()}
    return [name for name, parameter in base.named_parameters() if id(parameter) not in body]


def _body(base: PreTrainedModel) -> list[str]:
    """The names of the modules that hold the body: the one that the model says; of those of CLIP's
    kin, which say none that is there, each model within.
    """
    if base.base_model is not base:
        return [base.base_model_prefix]
    return [name for name, each in base.named_children() if isinstance(each, PreTrainedModel)]


def _drawn(base: PreTrainedModel) -> list[str]:
    return [name for name, parameter in base.named_parameters() if parameter.requires_grad]


def _holds_only(base: PreTrainedModel, module: str, names: set[str]) -> bool:
    return all(
        f"{module}.{name}" in names for name, _ in base.get_submodule(module).named_parameters()
    )
