"""FedSieve: federated LoRA fine-tuning over clients that differ in memory, speed and bandwidth.

    import fedsieve
    run = fedsieve.finetune("org/model", clients=[...], method=fedsieve.flasc(), rounds=20)
    for round in run:
        print(round.round, round.accuracy, round.total_bytes)

The command line (`fedsieve --help`) does the same from a recipe.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedsieve.api import Run, finetune
    from fedsieve.budget import Budget, Client
    from fedsieve.errors import FedSieveError
    from fedsieve.methods.fedit import method as fedit
    from fedsieve.methods.flasc import method as flasc
    from fedsieve.methods.fslora import method as fslora
    from fedsieve.methods.fslora_flasc import method as fslora_flasc
    from fedsieve.optim import adam, fading, fedadam, sgd
    from fedsieve.train.local import Training
    from fedsieve.train.model import Lora

__all__ = [
    "Budget",
    "Client",
    "FedSieveError",
    "Lora",
    "Run",
    "Training",
    "adam",
    "fading",
    "fedadam",
    "fedit",
    "finetune",
    "flasc",
    "fslora",
    "fslora_flasc",
    "sgd",
]

# Importing torch and transformers takes seconds, which `fedsieve --help` must not: a name is looked
# up where it lives when it is first used.
_HOMES = {
    "api": ("Run", "finetune"),
    "budget": ("Budget", "Client"),
    "errors": ("FedSieveError",),
    "optim": ("adam", "fading", "fedadam", "sgd"),
    "train.local": ("Training",),
    "train.model": ("Lora",),
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("fedsieve")
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"fedsieve.{home}"), name)
    if name in __all__:  # the rest are methods, each named like its file
        return importlib.import_module(f"fedsieve.methods.{name}").method
    raise AttributeError(f"module 'fedsieve' has no attribute {name!r}")
