"""What an engine's worker does: the recipe's model, made ready once, and clients trained on it.

The first request says what to be ready for: in its body the recipe, settled by whoever asks, in its
header device, threads, and where examples and weights lie. Its answer has the digest of the model
and of the adapter's start, which must be the asker's own. Each further request is a client's round
(`engine/request.py`).
"""

import os
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from fedsieve import console
from fedsieve.algebra.budget import Client
from fedsieve.algebra.keys import Key
from fedsieve.algebra.method import View
from fedsieve.engine import pool
from fedsieve.engine.request import Rows, work
from fedsieve.errors import FedSieveError, of_memory, short_of_memory
from fedsieve.frame import Frame, pack, refusal, unpack
from fedsieve.recipe import read as recipes
from fedsieve.recipe.experiment import locate, set_up_resident
from fedsieve.recipe.method import build_method
from fedsieve.recipe.workers import mark
from fedsieve.settings import in_round
from fedsieve.tasks.examples import take
from fedsieve.tasks.stored import stored
from fedsieve.train import by_function, mapped
from fedsieve.train.local import Fit, fit
from fedsieve.train.model import pick_device
from fedsieve.train.reader import load_reader


def ready_in(asked: bytes, folder: Path) -> tuple[Callable[[bytes], bytes] | None, bytes]:
    """`ready` for bytes; no function where the answer says why not. folder: as in `ready`"""
    try:
        answer, said = ready(unpack(asked), folder)
    except FedSieveError as error:
        return None, pack(refusal(str(error)))
    except Exception as error:
        why = short_of_memory(error) if of_memory(error) else traceback.format_exc()[-20_000:]
        return None, pack(refusal(why))
    return answer, pack(said)


def ready(asked: Frame, folder: Path) -> tuple[Callable[[bytes], bytes], Frame]:
    """A function that answers requests, from the first of them; and the answer to that one.

    folder: in which relative paths are
    Raises FedSieveError where device or model cannot be had.
    """
    head = asked.header
    warnings.simplefilter("ignore")  # whoever asks was told
    torch.set_num_threads(head["threads"])
    recipe = recipes.parse_text(asked.body.decode(), "the recipe")
    model = recipe.model
    if head["model"] is not None:
        model = model.model_copy(update={"source": str(folder / head["model"])})
    recipe = recipe.model_copy(update={"device": head["device"], "model": model})
    trust_remote_code = bool(head["trust_remote_code"])
    source, task = locate(recipe.model.source), recipe.model.task
    tokenizer, _ = load_reader(source, task, trust_remote_code=trust_remote_code)
    resident = set_up_resident(
        recipe, tokenizer, pick_device(head["device"]), trust_remote_code=trust_remote_code
    )
    if head["weights"] is not None:
        mapped.use(resident, folder / head["weights"])
    method, start = build_method(recipe), resident.adapter()
    examples, numbers = stored(folder / head["examples"])
    training = recipe.training
    function = None if training.function is None else by_function.load(training.function)

    def fitting(view: View, client: Client, key: Key, rows: Rows) -> Fit:
        some = take(examples, numbers[slice(*rows)])
        if function is not None:
            return by_function.fit(resident, view, some, function, key)
        return fit(resident, view, some, in_round(training, key.round, recipe.rounds), key)

    def answer(request: bytes) -> bytes:
        try:
            return pack(work(method, fitting, start, unpack(request)))
        except FedSieveError as error:
            return pack(refusal(str(error)))
        except Exception as error:
            if of_memory(error):
                os._exit(pool.OUT_OF_MEMORY)
            return pack(refusal(traceback.format_exc()[-20_000:], ours=True))

    return answer, Frame({"ok": True, "mark": mark(resident, start)})


def main() -> None:
    """`python -m fedsieve.recipe.worker DESCRIPTOR`, started by pool.py."""
    console.quiet()
    warnings.simplefilter("ignore")
    answer: Callable[[bytes], bytes] | None = None

    def first_then_rest(request: bytes) -> bytes:
        nonlocal answer
        if answer is not None:
            return answer(request)
        answer, said = ready_in(request, Path.cwd())
        return said

    pool.serve(int(sys.argv[1]), first_then_rest)


if __name__ == "__main__":
    main()
