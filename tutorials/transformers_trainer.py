"""transformers' Trainer, or one that is made of it, with SeCO or SpaCO in the place of its backpropagation.

Copy the first class, put it before a trainer's own, and use that as ever:

    Trainer(model=model, args=TrainingArguments(...), train_dataset=rows, chunk_size=512).train()

    class SFT(Chunkwise, trl.SFTTrainer): ...   # with SFTConfig(gradient_checkpointing=False, ...)
"""

from collections.abc import Callable
from typing import Any

import transformers
from torch import Tensor

import minichunk as mc


class Chunkwise:
    """Of a trainer with two arguments more: on one device, in the model's dtype, with batches padded right.

    chunk_size: see `seco`. step: adds the gradient, called as `seco` is: `functools.partial(mc.spaco, sampler=...)`, or
    `functools.partial(mc.seco, recompute=True)`. Raises InputError for what would go wrong.
    """

    def __init__(self, *given: Any, chunk_size: int, step: Callable[..., Tensor] = mc.seco, **named: Any) -> None:
        super().__init__(*given, **named)
        if self.args.world_size > 1 or self.args.n_gpu > 1 or self.args.fp16:
            raise mc.InputError("this trainer trains on one device, and not in float16")
        if self.compute_loss_func or self.label_smoother or getattr(self.args, "loss_type", "nll") != "nll":
            raise mc.InputError("this trainer's loss is the mean over all tokens: leave out what changes it")
        self.wrapped, self.chunk_size, self.step = mc.wrap(self.model), chunk_size, step

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """See transformers' Trainer."""
        model.train()
        inputs = dict(self._prepare_inputs(inputs))
        ids, labels = inputs.pop("input_ids"), inputs.pop("labels")
        mask = inputs.pop("attention_mask", None)
        if inputs or (mask is not None and bool((mask.diff() > 0).any())):
            raise mc.InputError(f"this trainer takes no {', '.join(inputs) or 'batches that are padded on the left'}")
        count = num_items_in_batch  # of all batches of this step; None: each counts as much
        if count is None:
            count = (labels[:, 1:] != -100).sum() * self.current_gradient_accumulation_steps
        return self.step(self.wrapped, ids, labels, self.chunk_size, num_targets=count)


class Trainer(Chunkwise, transformers.Trainer):
    """`transformers.Trainer(...)`, chunk by chunk."""
