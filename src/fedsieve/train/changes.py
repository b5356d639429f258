"""Whether a model's layers can take what a method adds to the base.

A product B A is added to the weight of a linear layer or a convolution. An embedding's weight has a
row a token, so the product is none of its shape. To a quantised weight nothing is added at all
(quantise.py). Found out before the first round, not after it.
"""

import torch
from torch import nn

from fedsieve.algebra.adapter import Adapter, base_layout, layout_of
from fedsieve.algebra.budget import Budget, Client
from fedsieve.algebra.keys import Key
from fedsieve.algebra.method import ClientContext, Method
from fedsieve.errors import FedSieveError
from fedsieve.settings import Quantization
from fedsieve.train import quantise
from fedsieve.train.model import ResidentModel


def check_changes(resident: ResidentModel, method: Method) -> None:
    """Raises FedSieveError where the method changes the base under a layer that cannot take it."""
    layer = _first_unfit(resident)
    if layer is not None and _changes_the_base(resident, method):
        raise FedSieveError(
            f"lora.targets takes in {layer}, whose weight (an embedding's) cannot be changed: this "
            "method adds to the weights under its pairs, so name linear layers alone, or choose a "
            "method that leaves the base as it is"
        )


def refuse_quantised(
    source: str, quantization: Quantization, method: Method, called: str | None = None
) -> None:
    """Raises FedSieveError where the method changes the weights of a base that is, or is to be,
    quantised. Before it is loaded.

    called: the method's name, where it is known
    """
    form = quantise.form_in(source) if quantization == "none" else quantization
    if form is None:
        return
    # What a method sends is the same whatever the sizes: a layer of 2 x 2 shows it.
    pair = {"m.lora_A.weight": torch.zeros(2, 2), "m.lora_B.weight": torch.zeros(2, 2)}
    if method.trains == "all" or _changes(method, Adapter(layout_of(pair, 1.0), pair)):
        name = "this method" if called is None else f"method {called!r}"
        raise FedSieveError(
            f"{name} changes the base's weights, which a base of model.quantization = {form!r} "
            "cannot take: choose a method that leaves the base as it is, or give a base that is "
            "not quantised (quantization = 'none')"
        )


def _first_unfit(resident: ResidentModel) -> str | None:
    """The name of the first layer with a pair whose product does not fit its weight."""
    products = base_layout(resident.layout, 0).shapes
    for pair in resident.layout.pairs:
        layer = resident.model.get_submodule(pair.module)
        base = layer.get_base_layer()
        product = products[f"{pair.module}.base"]
        turned = product[::-1] if layer.fan_in_fan_out else product
        if isinstance(base, nn.Embedding) or tuple(base.weight.shape) != turned:
            return pair.module
    return None


def _changes_the_base(resident: ResidentModel, method: Method) -> bool:
    return _changes(method, resident.adapter())


def _changes(method: Method, start: Adapter) -> bool:
    """Whether the base is another one in or after a round of one client, which learned nothing in
    it, and can afford half of the ranks.
    """
    client = Client("0", 1, Budget(0.5))
    key = Key(0, 1)
    context = ClientContext(client, start, key._replace(client=client.id))
    state = method.init(start)
    payload = method.publish(method.plan(state, key), client, context.key)
    view, memory = method.view(payload, {}, context)
    report, _ = method.report(view, view.adapter.tensors, memory, context)
    after = method.export(method.merge(state, iter([(client, report)]), key))
    return bool(view.adapter.base or after.base)
