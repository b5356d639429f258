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
    from fedsieve.algebra.budget import Budget, Client
    from fedsieve.algebra.optim import adam, fading, fedadam, sgd
    from fedsieve.api import Run, finetune
    from fedsieve.errors import FedSieveError
    from fedsieve.methods.adapter_lth import method as adapter_lth
    from fedsieve.methods.fed_plora import method as fed_plora
    from fedsieve.methods.fed_sb import method as fed_sb
    from fedsieve.methods.fed_select import method as fed_select
    from fedsieve.methods.fedex_lora import method as fedex_lora
    from fedsieve.methods.fedit import method as fedit
    from fedsieve.methods.fedsa_lora import method as fedsa_lora
    from fedsieve.methods.fedsvd import method as fedsvd
    from fedsieve.methods.ffa_lora import method as ffa_lora
    from fedsieve.methods.flasc import method as flasc
    from fedsieve.methods.flexlora import method as flexlora
    from fedsieve.methods.flora import method as flora
    from fedsieve.methods.florist import method as florist
    from fedsieve.methods.fslora import method as fslora
    from fedsieve.methods.fslora_flasc import method as fslora_flasc
    from fedsieve.methods.full import method as full
    from fedsieve.methods.head import method as head
    from fedsieve.methods.hetlora import method as hetlora
    from fedsieve.methods.lora_a2 import method as lora_a2
    from fedsieve.methods.lora_fair import method as lora_fair
    from fedsieve.methods.raflora import method as raflora
    from fedsieve.methods.ravan import method as ravan
    from fedsieve.methods.rolora import method as rolora
    from fedsieve.methods.scaffold import method as scaffold
    from fedsieve.methods.sparse_adapter import method as sparse_adapter
    from fedsieve.settings import Lora, Sampling, Training
    from fedsieve.train.by_function import with_trainer
    from fedsieve.train.peft_config import from_peft, to_peft

__all__ = [
    "Budget",
    "Client",
    "FedSieveError",
    "Lora",
    "Run",
    "Sampling",
    "Training",
    "adam",
    "adapter_lth",
    "fading",
    "fed_plora",
    "fed_sb",
    "fed_select",
    "fedadam",
    "fedex_lora",
    "fedit",
    "fedsa_lora",
    "fedsvd",
    "ffa_lora",
    "finetune",
    "flasc",
    "flexlora",
    "flora",
    "florist",
    "from_peft",
    "fslora",
    "fslora_flasc",
    "full",
    "head",
    "hetlora",
    "lora_a2",
    "lora_fair",
    "raflora",
    "ravan",
    "rolora",
    "scaffold",
    "sgd",
    "sparse_adapter",
    "to_peft",
    "with_trainer",
]

# Importing torch and transformers takes seconds, which `fedsieve --help` must not: a name is looked
# up where it lives when it is first used.
_HOMES = {
    "api": ("Run", "finetune"),
    "algebra.budget": ("Budget", "Client"),
    "errors": ("FedSieveError",),
    "algebra.optim": ("adam", "fading", "fedadam", "sgd"),
    "settings": ("Lora", "Sampling", "Training"),
    "train.by_function": ("with_trainer",),
    "train.peft_config": ("from_peft", "to_peft"),
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


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__")), "__version__"})
