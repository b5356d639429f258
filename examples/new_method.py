"""A federated method of one's own in 30 lines, beside one that ships.

    fedsieve fetch minilm-l6 20newsgroups
    python examples/new_method.py
    python examples/new_method.py data=rows.csv text=review label=stars model=org/name

The method: everything goes down, and random entries of a client's change come up, as many as its
budget says (Konečný et al. 2016). FLASC returns the largest ones instead. Both pass the same real
wire, so their bytes can be compared.
"""

# %%
import sys

import torch

import fedsieve
from fedsieve.algebra.adapter import Layout, Tree
from fedsieve.algebra.budget import Client
from fedsieve.algebra.keys import Key, generator
from fedsieve.algebra.method import compose
from fedsieve.algebra.sieve import Passed, dense
from fedsieve.algebra.support import Support, top_k
from fedsieve.data import sources

given = dict(word.split("=", 1) for word in sys.argv[1:] if "=" in word)
model = given.get("model", "minilm-l6")  # a fetched name, a folder, or a name of the hub
data = given.get("data", "20newsgroups")  # a fetched name, a file, or a data set of the hub
text, label = given.get("text", "Text"), given.get("label", "Category")  # its columns
rounds = int(given.get("rounds", "5"))

# %% [markdown]
# A sieve says which coordinates of a tree of tensors pass: here each entry draws a lot, and the
# highest win. All randomness comes from the key, so the run can be repeated.


# %%
def random_entries(tree: Tree, layout: Layout, client: Client, key: Key) -> Passed:
    """The sieve: `client.budget.up` of all entries, at random; the mask is sent with them."""
    names = tuple(sorted(tree))
    draws = generator(key.at("random entries"))
    lots = {name: torch.rand(tree[name].shape, generator=draws) for name in names}
    return Passed(Support(names, None, top_k(lots, client.budget.up, names)), "known", "sent")


# %% [markdown]
# A method is two sieves and a server optimizer. Adam, as FLASC has it: a random eighth of the
# change moves the mean an eighth of the way, and Adam's step does not shrink with it.

# %%
adam = fedsieve.adam(5e-3)
methods = {
    "random": compose(down=dense, up=random_entries, knobs=frozenset({"up"}), server=adam),
    "largest": fedsieve.flasc(server=adam),
}
rows = sources.load(data, "train" if data == "20newsgroups" else None)
rows = rows.shuffle(seed=0).select(range(min(len(rows), 1500)))
split = rows.train_test_split(test_size=0.2, seed=0)
for name, method in methods.items():
    run = fedsieve.finetune(
        model,
        split["train"],
        method,
        partition=10,
        rounds=rounds,
        cohort=5,
        budgets=fedsieve.Budget(up=1 / 8),
        training=fedsieve.Training(optimizer="adamw", lr=3e-3, steps=5),
        test=split["test"],
        text=text,
        label=label,
        max_length=64,
    )
    last = run.finish().metrics[-1]
    up = sum(each.up_bytes for each in run.metrics)
    print(name, f"accuracy {last.accuracy:.3f}", f"{up / 1e6:.2f} MB up")
