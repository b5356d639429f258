"""Instruction tuning of a small language model on conversations that stay with their owners.

    fedsieve fetch smollm2 20newsgroups
    python examples/instruction_tuning.py
    python examples/instruction_tuning.py chats=chats.jsonl model=org/name clients=user

Each line of the file holds `messages`, a list of `{"role": ..., "content": ...}`; only what the
assistant says is learned. `clients` is the column that says whose a conversation is, or into how
many equal parts all are dealt. Without a file, questions on posts of 20 Newsgroups are made.
"""

# %%
import json
import sys
from pathlib import Path

import fedsieve
from fedsieve.data import sources

given = dict(word.split("=", 1) for word in sys.argv[1:] if "=" in word)
chats = Path(given.get("chats", "chats.jsonl"))
model = given.get("model", "smollm2")  # a fetched name, a folder, or a name of the hub
clients = given.get("clients", "4")
rounds = int(given.get("rounds", "3"))
length = int(given.get("length", "192"))  # tokens of a conversation

# %% [markdown]
# The conversations: one question and one answer each.

# %%
if not chats.exists():
    with chats.open("w", encoding="utf-8") as file:
        for post in sources.load("20newsgroups", "train").shuffle(seed=0).select(range(400)):
            words = " ".join(post["Text"].split()[:60])
            ask = {"role": "user", "content": f"Which newsgroup is this of? {words}"}
            answer = {"role": "assistant", "content": post["Category"]}
            file.write(json.dumps({"messages": [ask, answer]}) + "\n")
rows = sources.load(chats).train_test_split(test_size=0.1, seed=0)

# %% [markdown]
# FSLoRA: a client trains k of the server's r ranks, drawn anew in each round. All of these have
# memory for a quarter of them. `generation` learns as `causal-lm` does, and has the model write
# the assistant's last turn at each evaluation.

# %%
run = fedsieve.finetune(
    model,
    rows["train"],
    fedsieve.fslora(),
    partition=int(clients) if clients.isdigit() else clients,
    task="generation",
    text="messages",
    rounds=rounds,
    budgets=fedsieve.Budget(ratio=1 / 4),
    lora=fedsieve.Lora(rank=16, alpha=32),
    training=fedsieve.Training(optimizer="adamw", lr=2e-3, steps=8, batch=8),
    max_length=length,
    new_tokens=12,
    test=rows["test"],
)
for each in run:
    print(each.round, each.metrics, f"{each.total_bytes / 1e6:.2f} MB so far")

# %% [markdown]
# What it answers now, beside what was expected.

# %%
few = rows["test"].select(range(3))
for row, said in zip(few, run.predict(few), strict=True):
    print(f"{row['messages'][-1]['content']!r}: {said!r}")
run.save("adapter")  # AutoPeftModelForCausalLM.from_pretrained("adapter") reads it
