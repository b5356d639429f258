"""What metrics are called for people."""

_MEASURES = {
    "eval_loss": "evaluation loss",
    "macro_f1": "macro F1",
    "micro_f1": "micro F1",
    "entity_f1": "entity F1",
    "map": "mAP",
    "token_f1": "token F1",
    "rouge_l": "ROUGE-L",
    "chrf": "chrF",
    "mse": "squared error",
    "matthews": "Matthews",
    "client_p10": "client 10th percentile",
    "pearson": "Pearson",
    "spearman": "Spearman",
}


def spoken(name: str) -> str:
    """A metric's name in words: "macro F1", "token accuracy"."""
    return _MEASURES.get(name, name.replace("_", " "))


def titled(name: str) -> str:
    """`spoken` as a heading."""
    words = spoken(name)
    return words[:1].upper() + words[1:]
