"""`transformers.Trainer` for adapters and fusions.

What differs from `Trainer`: the loss of a training step has the fusion regulariser added; the
fusion's value matrices are not decayed towards zero (the regulariser draws them to the identity);
checkpoints hold adapters, fusions and heads only. The rest (progress bar, evaluation, logging,
resuming, optimizers) is `Trainer`'s own; a plain `Trainer` trains a patched model too.
"""

import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainingArguments

from .heads import head_names

_FUSION_VALUE = re.compile(r"(^|\.)adapter_fusion_layer\.[^.]+\.value\.weight$")


class AdapterTrainer(Trainer):
    """Trains the adapters, fusions and heads that `train_adapter` or `train_adapter_fusion` chose.

    Semantics::

        loss = model(**batch).loss + model.get_fusion_regularization_loss()   # training steps
        loss = model(**batch).loss                                            # evaluation

    Under gradient accumulation the regulariser counts once per optimizer step, like the mean of the
    micro-batches' losses.

    Args:
        model, args, data_collator, train_dataset, eval_dataset, **kwargs: as `Trainer` takes them.
        tokenizer: another name for `processing_class`.
        adapter_names: an adapter setup to activate, as `model.set_active_adapters` takes it.

    Raises:
        ValueError: no adapter is active; in `train`, the base model's weights are not frozen.
    """

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | None = None,
        args: TrainingArguments | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        tokenizer: Any = None,
        *,
        processing_class: Any = None,
        adapter_names: Any = None,
        **kwargs,
    ):
        super().__init__(
            model,
            args,
            data_collator,
            train_dataset,
            eval_dataset,
            processing_class=tokenizer if processing_class is None else processing_class,
            **kwargs,
        )
        if adapter_names is not None:
            self.model.set_active_adapters(adapter_names)
        if getattr(self.model, "adapters_config", None) is None:
            raise ValueError(
                "model: expected a model with adapters; call fastfusion.init(model) first, or use "
                "transformers.Trainer to train the whole model"
            )
        if self.model.active_adapters is None:
            raise ValueError(
                "model: expected active adapters, got none; call model.train_adapter(name) or "
                "model.train_adapter_fusion(Fuse(...)) first, or use transformers.Trainer to train "
                "the whole model"
            )
        heads = head_names(getattr(self.model, "active_head", None))
        if not self.label_names and heads:
            names = [name for head in heads for name in self.model.heads[head].get_label_names()]
            self.label_names = list(dict.fromkeys(names))

    def train(self, *args, **kwargs):
        """`Trainer.train`, for a model whose base weights are frozen.

        Args:
            args, kwargs: as `Trainer.train` takes them.

        Returns:
            What `Trainer.train` returns: steps, mean training loss and metrics.

        Raises:
            ValueError: the base model's weights are not frozen.
        """
        if not self.model.model_frozen:
            raise ValueError(
                "model: expected frozen base weights; call model.train_adapter(name) or "
                "model.train_adapter_fusion(Fuse(...)) before training"
            )
        return super().train(*args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """The loss of one batch; where gradients are recorded, with the fusion regulariser.

        Args:
            model: the model, or what wraps it for training.
            inputs: the batch, as the model's forward takes it.
            return_outputs: return the model's outputs too.
            num_items_in_batch: labels in all micro-batches of the step; None where not counted.

        Returns:
            The loss, a scalar, or (loss, outputs); `outputs.loss` is without the regulariser.
        """
        loss, outputs = super().compute_loss(
            model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch
        )
        # evaluation records no gradients and reports the data's loss alone
        if torch.is_grad_enabled():
            regularization = self.model.get_fusion_regularization_loss()
            if regularization is not None:
                if self._loss_is_summed_over_step(num_items_in_batch):
                    regularization = regularization / self.current_gradient_accumulation_steps
                loss = loss + regularization
        return (loss, outputs) if return_outputs else loss

    def _loss_is_summed_over_step(self, num_items_in_batch: Tensor | int | None) -> bool:
        """Whether `training_step` leaves the loss as it is, instead of dividing it by the number of
        accumulated micro-batches."""
        declared = getattr(self, "loss_is_scaled_for_ga", None)  # transformers >= 5.20
        if declared is not None:
            return declared
        by_model = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        return by_model or self.compute_loss_func is not None

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """The names of the parameters that are weight-decayed: no value matrix of a fusion.

        Args:
            model: the model whose parameters are meant.
        """
        names = super().get_decay_parameter_names(model)
        return [name for name in names if not _FUSION_VALUE.search(name)]

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Writes adapters, fusions and heads, each into a folder of its name; no base weights."""
        if not self.args.should_save:
            return
        output_dir = self.args.output_dir if output_dir is None else output_dir
        os.makedirs(output_dir, exist_ok=True)
        # a head that belongs to the model's class has no name: every adapter's folder gets it
        self.model.save_all_adapters(output_dir, with_head=not self._has_named_heads)
        self.model.save_all_adapter_fusions(output_dir)
        if self._has_named_heads:
            self.model.save_all_heads(output_dir)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(output_dir)
        torch.save(self.args, os.path.join(output_dir, "training_args.bin"))

    @property
    def _has_named_heads(self) -> bool:
        return hasattr(self.model, "heads")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self._load_weights(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        self._load_weights(Path(self.state.best_model_checkpoint))

    def _load_weights(self, checkpoint: Path) -> None:
        """Gives the model every adapter, fusion and head that `_save` left in a checkpoint."""

        def folders_with(file_name: str) -> list[str]:
            return sorted(str(path.parent) for path in checkpoint.glob(f"*/{file_name}"))

        adapters = folders_with("adapter_config.json")
        if not adapters:
            raise ValueError(f"checkpoint: expected folders of adapters in {checkpoint}; got none")
        for folder in adapters:
            self.model.load_adapter(folder, with_head=not self._has_named_heads)
        for folder in folders_with("adapter_fusion_config.json"):
            self.model.load_adapter_fusion(folder, with_head=False)
        if self._has_named_heads:
            for folder in folders_with("head_config.json"):
                self.model.load_head(folder, set_active=False)
