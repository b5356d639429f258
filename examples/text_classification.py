"""Text classification over three sites, each with a CSV file of its own.

    fedsieve fetch minilm-l6 20newsgroups
    python examples/text_classification.py
    python examples/text_classification.py sites=folder model=org/name rounds=10

The folder holds a CSV file for each site (`north.csv`, ...) with the columns `text` and `label`,
and `test.csv`, whose rows no site trains on. Without one, posts of 20 Newsgroups are written into
`sites`. The sites differ in what they can send, so each has a budget of its own.
"""

# %%
import sys
from pathlib import Path

import fedsieve
from fedsieve.data import sources

given = dict(word.split("=", 1) for word in sys.argv[1:] if "=" in word)
folder = Path(given.get("sites", "sites"))
model = given.get("model", "minilm-l6")  # a fetched name, a folder, or a name of the hub
rounds = int(given.get("rounds", "5"))

# %% [markdown]
# Rows. Each site's are read from its own file; the names of the files are those of the sites.

# %%
if not folder.is_dir():
    folder.mkdir()
    names = {"Text": "text", "Category": "label"}
    posts = sources.load("20newsgroups", "train").rename_columns(names).shuffle(seed=0)
    for number, name in enumerate(("north", "south", "east", "test")):
        part = posts.select(range(400 * number, 400 * (number + 1)))
        part.select_columns(["text", "label"]).to_csv(folder / f"{name}.csv")
sites = {path.stem: path for path in sorted(folder.glob("*.csv")) if path.stem != "test"}
test = folder / "test.csv"

# %% [markdown]
# Budgets. `down` and `up` are densities: the share of the adapter's entries that a site gets and
# returns in a round. The first has a fast line, the others a slow one and a very slow one.

# %%
lines = [fedsieve.Budget(), fedsieve.Budget(1, 1 / 2, 1 / 4), fedsieve.Budget(1, 1 / 4, 1 / 16)]
budgets = {site: lines[number % 3] for number, site in enumerate(sites)}

# %% [markdown]
# FLASC: what has changed most goes down, the largest changes come up, a byte each.

# %%
run = fedsieve.finetune(
    model,
    sites,
    fedsieve.flasc(server=fedsieve.adam(5e-3), ranked="change", up_values="int8"),
    rounds=rounds,
    budgets=budgets,
    training=fedsieve.Training(optimizer="adamw", lr=3e-3, steps=10),
    max_length=64,
    test=test,
)
for each in run:
    print(each.round, f"accuracy {each.accuracy:.3f}", f"{each.total_bytes / 1e6:.2f} MB so far")

# %% [markdown]
# What each site sent, how well the adapter does on each site's rows, and what it says of a text.

# %%
for site, score in run.score_by_client(sites).items():
    sent = sum(receipt.up_bytes for receipt in run.receipts if receipt.client == site)
    print(site, f"sent {sent / 1e6:.2f} MB, accuracy there {score.metrics['accuracy']:.3f}")
print(run.predict([{"text": "The goalie made forty saves in overtime."}]))
run.save("adapter")  # AutoPeftModelForSequenceClassification.from_pretrained("adapter") reads it
