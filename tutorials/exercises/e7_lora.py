"""Exercise 7: LoRA.

Exact gradients of a long text cost the memory of one chunk now; what remains is the model, and the
gradients and optimizer states of its parameters. LoRA freezes the weight W of a layer and trains the
product of two small matrices beside it: y = x Wᵀ + bias + alpha / rank · x Aᵀ Bᵀ.

Check: python -m pytest tutorials/exercises -k lora
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class LoraLinear(nn.Module):
    """A frozen linear layer and, beside it, a trainable product of two small matrices.

    base: the layer, which stays as it is and receives no gradient; kept as `self.base`.
    lora_A: a parameter (rank, in). lora_B: a parameter (out, rank). Both in the dtype of base.weight.

    At the start the layer must compute what the base computes, and still be able to learn: so A is drawn
    at random (for example by nn.init.kaiming_uniform_(self.lora_A, a=5**0.5)), and B is zero.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        raise NotImplementedError("LoraLinear.__init__: freeze the base and make lora_A and lora_B")

    def forward(self, x: Tensor) -> Tensor:
        """The base of x, plus the adapter's part: (…, in) to (…, out)."""
        raise NotImplementedError("LoraLinear.forward: the base's output plus the adapter's")

    def merged(self) -> nn.Linear:
        """A new nn.Linear that computes the same without an adapter. Changes nothing in this layer."""
        raise NotImplementedError("LoraLinear.merged: a plain linear layer with the adapter folded in")


def add_lora(model: nn.Module, rank: int, alpha: float, targets: Sequence[str]) -> None:
    """Freeze the model and put a LoraLinear in the place of every linear layer named in `targets`.

    targets: the last part of the layers' names: "q_proj" stands for model.layers.0.self_attn.q_proj
    and for that of every other layer. Afterwards only the adapters' A and B require a gradient.

    Hints. `model.named_modules()` gives full names and modules; take a list of it, since you change the
    model on the way. `model.get_submodule(parent)` and `setattr` put the new layer in place.
    """
    raise NotImplementedError("add_lora: freeze the model and replace the layers that are named")
