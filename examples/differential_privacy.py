"""Differential privacy for each client, with a trusted server.

    pip install 'fedsieve[privacy]'
    fedsieve fetch minilm-l6 20newsgroups
    python examples/differential_privacy.py
    python examples/differential_privacy.py data=rows.csv text=review label=stars epsilon=4

Whoever sees the adapters that come out learns little of any one client: each update is clipped,
and noise is added to the mean. docs/privacy.md says against whom that holds. Privacy of this kind
needs many clients: with few, the noise that hides one of them hides what they have in common too.
"""

# %%
import sys

import fedsieve
from fedsieve.algebra.keys import Key
from fedsieve.clients.noise import private
from fedsieve.clients.privacy import Cohorts, calibrate, ledger
from fedsieve.data import sources

given = dict(word.split("=", 1) for word in sys.argv[1:] if "=" in word)
model = given.get("model", "minilm-l6")  # a fetched name, a folder, or a name of the hub
data = given.get("data", "20newsgroups")  # a fetched name, a file, or a data set of the hub
text, label = given.get("text", "Text"), given.get("label", "Category")  # its columns
clients = int(given.get("clients", "400"))
cohort = int(given.get("cohort", "20"))
rounds = int(given.get("rounds", "10"))
epsilon = float(given.get("epsilon", "8"))

# %% [markdown]
# How much noise that takes follows from who is drawn and how often. Each client is in a round with
# probability cohort / clients, by itself (Poisson); delta is well below one in so many clients.

# %%
cohorts = Cohorts("poisson", cohort, clients)
delta = 0.1 / clients
noise = calibrate(cohorts, epsilon=epsilon, delta=delta, rounds=rounds)
print(f"noise multiplier {noise:.3f}")

# %% [markdown]
# The server's optimizer clips every update to an L2 norm of 0.2, and adds fresh noise of the system
# to their mean. What is sent down is made of that mean, so masks on the way down cost no privacy.

# %%
server = private(
    fedsieve.fedadam(1e-2),
    clip=0.2,
    noise_multiplier=noise,
    expected=cohort,
    key=Key(0),
    noise_from="system",
)
split = sources.load(data, "train" if data == "20newsgroups" else None)
split = split.train_test_split(test_size=0.1, seed=0)
run = fedsieve.finetune(
    model,
    split["train"],
    fedsieve.flasc(server=server, ranked="change"),
    partition=clients,
    rounds=rounds,
    cohort=fedsieve.Sampling("poisson", cohort),
    budgets=1 / 4,
    training=fedsieve.Training(lr=0.2, steps=2),
    evaluate_every=rounds,
    test=split["test"],
    text=text,
    label=label,
    max_length=64,
)
spent = ledger(cohorts, noise, delta)
for each in run:
    print(each.round, f"epsilon {spent(each.round):.2f}", f"{each.clients} clients were drawn")
print(f"accuracy {run.metrics[-1].accuracy:.3f} at epsilon {epsilon:g}, delta {delta:g}")
