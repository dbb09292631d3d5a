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
        if not self.label_names and getattr(self.model, "active_head", None) is not None:
            self.label_names = self.model.heads[self.model.active_head].get_label_names()

    def train(self, *args, **kwargs):
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
        names = super().get_decay_parameter_names(model)
        return [name for name in names if not _FUSION_VALUE.search(name)]

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Writes adapters, fusions and heads, each into a folder of its name; no base weights."""
        if not self.args.should_save:
            return
        output_dir = self.args.output_dir if output_dir is None else output_dir
        os.makedirs(output_dir, exist_ok=True)
        self.model.save_all_adapters(output_dir)
        self.model.save_all_adapter_fusions(output_dir)
        if hasattr(self.model, "heads"):
            self.model.save_all_heads(output_dir)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(output_dir)
        torch.save(self.args, os.path.join(output_dir, "training_args.bin"))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self._load_adapters(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        self._load_adapters(self.state.best_model_checkpoint)

    def _load_adapters(self, checkpoint: str | os.PathLike) -> None:
        """Loads every adapter, fusion and head that `_save` left in the checkpoint."""
        loaders = {
            "adapter_config.json": self.model.load_adapter,
            "adapter_fusion_config.json": self.model.load_adapter_fusion,
            "head_config.json": getattr(self.model, "load_head", None),
        }
        folders = sorted(path for path in Path(checkpoint).glob("*/") if path.is_dir())
        found = False
        for config_name, load in loaders.items():
            for folder in folders:
                if load is not None and (folder / config_name).is_file():
                    load(str(folder))
                    found = True
        if not found:
            raise ValueError(
                f"checkpoint: expected folders of adapters in {checkpoint}; found none"
            )
