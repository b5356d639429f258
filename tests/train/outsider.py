"""What somebody does with a saved folder who has PEFT and transformers, and no FedSieve.

Run by test_ready.py in a process of its own, where the import of FedSieve is an error. A job is
{"folder", "task", "rows"}: the rows that the run was evaluated on. OUT gets, job by job, the inputs
of some rows, their logits by each way to load the folder, and the scores of its pipeline by
scikit-learn and its like.
"""

import io
import json
import logging
import sys
from pathlib import Path
from typing import Any

import conlleval
import peft
import torch
import transformers
from peft import PeftConfig, PeftModel
from PIL import Image
from scipy.stats import pearsonr
from sklearn.metrics import accuracy_score, f1_score, mean_squared_error
from transformers import AutoImageProcessor, AutoTokenizer, pipeline

# What a user calls for each kind of task: transformers' loader, PEFT's, and the pipeline.
HABITS = {
    **dict.fromkeys(
        ("classification", "regression", "multi-label"),
        (
            "AutoModelForSequenceClassification",
            "AutoPeftModelForSequenceClassification",
            "text-classification",
        ),
    ),
    "token-classification": (
        "AutoModelForTokenClassification",
        "AutoPeftModelForTokenClassification",
        "token-classification",
    ),
    **dict.fromkeys(
        ("image-classification", "image-multi-label"),
        ("AutoModelForImageClassification", "AutoPeftModel", "image-classification"),
    ),
    **dict.fromkeys(
        ("causal-lm", "chat", "multiple-choice", "generation"),
        ("AutoModelForCausalLM", "AutoPeftModelForCausalLM", "text-generation"),
    ),
}
LOGITS_OF = 4  # rows


def loaded(folder: Path, task: str) -> dict[str, Any]:
    """The folder's model by every way to load it."""
    plain, tuned, _ = HABITS[task]
    found = {"transformers": getattr(transformers, plain).from_pretrained(folder)}
    if (folder / "adapter_config.json").exists():
        found["AutoPeftModel"] = getattr(peft, tuned).from_pretrained(folder)
        told = PeftConfig.from_pretrained(folder)
        base = getattr(transformers, plain).from_pretrained(
            told.base_model_name_or_path, revision=told.revision
        )
        found["PeftModel"] = PeftModel.from_pretrained(base, folder)
    return {name: model.eval() for name, model in found.items()}


def image(row: dict[str, Any]) -> Image.Image:
    return Image.open(io.BytesIO(bytes.fromhex(row["image"]))).convert("RGB")


def inputs(folder: Path, task: str, row: dict[str, Any]) -> dict[str, torch.Tensor]:
    if "image" in row:
        reader = AutoImageProcessor.from_pretrained(folder)
        return {"pixel_values": reader(images=image(row), return_tensors="pt")["pixel_values"]}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if task == "chat":
        given = tokenizer.apply_chat_template(
            row["messages"], return_tensors="pt", return_dict=True
        )
    else:
        text = row.get("ask", row.get("text"))
        given = tokenizer(text, is_split_into_words=isinstance(text, list), return_tensors="pt")
    return {name: given[name] for name in ("input_ids", "attention_mask")}


def one(pipe: Any, rows: list[dict[str, Any]], **given: Any) -> list[str]:
    return [pipe(each, **given)[0]["label"] for each in map(read, rows)]


def read(row: dict[str, Any]) -> Any:
    return image(row) if "image" in row else row["text"]


def many(pipe: Any, rows: list[dict[str, Any]], labels: list[str]) -> dict[str, float]:
    """A pipeline gives every label a chance of its own where the configuration says so."""
    told, so = [], []
    for row in rows:
        chances = {each["label"]: each["score"] for each in pipe(read(row), top_k=None)}
        told.append([chances[name] > 0.5 for name in labels])
        so.append([name in row["label"] for name in labels])
    return {"micro_f1": f1_score(so, told, average="micro", zero_division=0)}


def tags(pipe: Any, rows: list[dict[str, Any]]) -> dict[str, float]:
    lines = []
    for row in rows:
        found = ["O"] * len(row["text"])
        for each in pipe(" ".join(row["text"])):
            found[each["index"] - 1] = each["entity"]  # a word is a token, after [CLS]
        lines += [f"word {so} {said}" for so, said in zip(row["label"], found, strict=True)]
        lines.append("")
    return {"entity_f1": conlleval.evaluate(lines)["overall"]["chunks"]["evals"]["f1"]}


def after(pipe: Any, prompt: str) -> list[str]:
    """The words that are written after a prompt."""
    made = pipe(prompt, max_new_tokens=4, do_sample=False, return_full_text=False)
    return str(made[0]["generated_text"]).split()


def likeliest(pipe: Any, row: dict[str, Any]) -> str:
    """The option, each of one token, that the model would rather write than the others."""
    given = pipe.tokenizer(row["text"], return_tensors="pt")
    with torch.no_grad():
        logits = pipe.model(input_ids=given["input_ids"]).logits[0, -1]
    chances = [logits[pipe.tokenizer(word)["input_ids"][0]].item() for word in row["of"]]
    return str(row["of"][chances.index(max(chances))])


def learned_tokens(pipe: Any, rows: list[dict[str, Any]], task: str) -> dict[str, float]:
    """How many of the tokens that the assistant says, or that complete a prompt, are foretold."""
    tokenizer, so, told = pipe.tokenizer, [], []
    for row in rows:
        if task == "chat":
            given = tokenizer.apply_chat_template(
                row["messages"], return_dict=True, return_assistant_tokens_mask=True
            )
            ids, learned = given["input_ids"], given["assistant_masks"]
        else:
            ids = [*tokenizer(row["ask"] + row["say"])["input_ids"], tokenizer.eos_token_id]
            learned = [
                number >= len(tokenizer(row["ask"])["input_ids"]) for number in range(len(ids))
            ]
        with torch.no_grad():
            best = pipe.model(input_ids=torch.tensor([ids])).logits[0].argmax(-1).tolist()
        so += [ids[n] for n in range(1, len(ids)) if learned[n]]
        told += [best[n - 1] for n in range(1, len(ids)) if learned[n]]
    return {"token_accuracy": accuracy_score(so, told)}


def scores(pipe: Any, task: str, rows: list[dict[str, Any]]) -> dict[str, float]:
    so = [row.get("label") for row in rows]
    if task in ("classification", "image-classification"):
        told = one(pipe, rows)
        of_classes = f1_score(so, told, average="macro", zero_division=0)
        return {"accuracy": accuracy_score(so, told), "macro_f1": of_classes}
    if task == "regression":
        values = [pipe(row["text"])[0]["score"] for row in rows]
        return {"pearson": pearsonr(values, so)[0], "mse": mean_squared_error(so, values)}
    if task in ("multi-label", "image-multi-label"):
        return many(pipe, rows, [*pipe.model.config.label2id])
    if task == "token-classification":
        return tags(pipe, rows)
    if task == "multiple-choice":
        told = [next((w for w in after(pipe, row["text"]) if w in row["of"]), "") for row in rows]
        likely = accuracy_score(so, [likeliest(pipe, row) for row in rows])
        return {"accuracy": likely, "accuracy_written": accuracy_score(so, told)}
    if task == "generation":
        exact = [" ".join(after(pipe, row["ask"])) == row["say"].strip() for row in rows]
        return {"exact_match": sum(exact) / len(exact)}
    if task == "chat":
        said = pipe(rows[0]["messages"][:-1], max_new_tokens=2, do_sample=False)
        assert said[0]["generated_text"][-1]["role"] == "assistant"
    return learned_tokens(pipe, rows, task)


def main(jobs: Path, out: Path) -> None:
    logging.disable(logging.WARNING)
    results = []
    for job in json.loads(jobs.read_text(encoding="utf-8")):
        folder, task, rows = Path(job["folder"]), job["task"], job["rows"]
        given = [inputs(folder, task, row) for row in rows[:LOGITS_OF]]
        with torch.no_grad():
            logits = {
                name: [model(**each).logits for each in given]
                for name, model in loaded(folder, task).items()
            }
        pipe = pipeline(HABITS[task][2], model=str(folder))
        labels = pipe.model.config.id2label
        found = {name: float(value) for name, value in scores(pipe, task, rows).items()}
        results.append({"inputs": given, "logits": logits, "scores": found, "labels": labels})
    torch.save(results, out)
    assert not any(name.startswith("fedsieve.") for name in sys.modules)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
