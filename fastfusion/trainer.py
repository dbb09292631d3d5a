"""`transformers.Trainer` for adapters and fusions.

What differs from `Trainer`: the loss of a training step has the fusion regulariser added; the
fusion's value matrices are not decayed towards zero (the regulariser draws them to the identity);
checkpoints hold adapters, fusions, heads and what else is trained, no frozen weights; predictions
of rows with heads of their own come in the rows' order. The rest (progress bar, evaluation,
logging, resuming, optimizers) is `Trainer`'s own; a plain `Trainer` trains a patched model too.
"""

import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainingArguments

from .files import ADAPTER_FILES, FUSION_FILES, HEAD_FILES
from .heads import head_names
from .serialization import has_static_head, subdirectory

_OTHER_WEIGHTS = "trained_base_weights.safetensors"
"""In a checkpoint: what the base model trains beside adapters and fusions, such as embeddings."""
_PADDING = -100
"""`Trainer`'s number where predictions of different widths lie one below the other."""
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
        if getattr(self.model, "adapters_config", None) is None:
            raise ValueError(
                "model: expected a model with adapters; call fastfusion.init(model) first, or use "
                "transformers.Trainer to train the whole model"
            )
        if adapter_names is not None:
            self.model.set_active_adapters(adapter_names)
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
            ValueError: the base model's weights are not frozen, or checkpoints are to be written
                and something has a name that no directory can have.
        """
        if not self.model.model_frozen:
            raise ValueError(
                "model: expected frozen base weights; call model.train_adapter(name) or "
                "model.train_adapter_fusion(Fuse(...)) before training"
            )
        if self.args.save_strategy != "no":
            config = self.model.adapters_config
            for name in (*config.adapters, *config.fusions, *getattr(self.model, "heads", ())):
                try:
                    subdirectory(self.args.output_dir, name)
                except ValueError as error:
                    raise ValueError(f"model: no checkpoint can be written: {error}") from None
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

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Any]:
        """`Trainer.prediction_step`; rows with heads of their own give one tensor of logits.

        Args:
            model, inputs, prediction_loss_only, ignore_keys: as `Trainer.prediction_step` takes
                them.

        Returns:
            Loss, predictions and labels, as `Trainer.prediction_step`. Where the heads have
            different numbers of labels, a row's logits are followed by -100.
        """
        loss, outputs, labels = super().prediction_step(
            model, inputs, prediction_loss_only, ignore_keys
        )
        if isinstance(outputs, tuple):
            return loss, tuple(map(_in_order_of_rows, outputs)), labels
        return loss, _in_order_of_rows(outputs), labels

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Writes adapters, fusions and named heads, each into a folder of its name; beside them the
        one head of the model's class, and what else is trained."""
        if not self.args.should_save:
            return
        output_dir = self.args.output_dir if output_dir is None else output_dir
        os.makedirs(output_dir, exist_ok=True)
        self.model.save_all_adapters(output_dir, with_head=False)
        self.model.save_all_adapter_fusions(output_dir)
        if has_static_head(self.model):
            self.model.save_head(output_dir)
        elif hasattr(self.model, "heads"):
            self.model.save_all_heads(output_dir)
        if others := self._other_weights(only_trained=True):
            copies = {
                name: p.detach().to("cpu", copy=True).contiguous() for name, p in others.items()
            }
            safetensors.torch.save_file(copies, os.path.join(output_dir, _OTHER_WEIGHTS))
        if self.processing_class is not None:
            self.processing_class.save_pretrained(output_dir)
        torch.save(self.args, os.path.join(output_dir, "training_args.bin"))

    def _other_weights(self, only_trained: bool) -> dict[str, nn.Parameter]:
        """The base model's parameters that belong to no adapter or fusion."""
        carried = {
            id(parameter)
            for place in self.model.model_adapters.layers
            for modules in (place.adapters, place.adapter_fusion_layer)
            for parameter in modules.parameters()
        }
        return {
            name.replace("_orig_mod.", ""): parameter
            for name, parameter in self.model.base_model.named_parameters()
            if id(parameter) not in carried and (parameter.requires_grad or not only_trained)
        }

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self._load_weights(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        self._load_weights(Path(self.state.best_model_checkpoint))

    def _load_weights(self, checkpoint: Path) -> None:
        """Gives the model everything that `_save` left in a checkpoint."""

        def folders_with(file_name: str) -> list[str]:
            return sorted(str(path.parent) for path in checkpoint.glob(f"*/{file_name}"))

        adapters = folders_with(ADAPTER_FILES.config)
        if not adapters:
            raise ValueError(f"checkpoint: expected folders of adapters in {checkpoint}; got none")
        self._load_other_weights(checkpoint)
        for folder in adapters:
            # where adapters leaves the one head of a class
            self.model.load_adapter(folder, with_head=has_static_head(self.model))
        for folder in folders_with(FUSION_FILES.config):
            self.model.load_adapter_fusion(folder, with_head=False)
        if hasattr(self.model, "heads"):
            for folder in folders_with(HEAD_FILES.config):
                self.model.load_head(folder, set_active=False)
        elif has_static_head(self.model) and (checkpoint / HEAD_FILES.config).is_file():
            self.model.load_head(str(checkpoint))

    def _load_other_weights(self, checkpoint: Path) -> None:
        path = checkpoint / _OTHER_WEIGHTS
        saved = safetensors.torch.load_file(path) if path.is_file() else {}
        own = self._other_weights(only_trained=False)
        wrong = [k for k, t in saved.items() if k not in own or own[k].shape != t.shape]
        if wrong:
            raise ValueError(
                f"checkpoint: expected weights of the base model in {path}, in its shapes; "
                f"got {wrong}"
            )
        if missing := sorted(self._other_weights(only_trained=True).keys() - saved.keys()):
            warnings.warn(
                f"checkpoint: {checkpoint} lacks {missing}, which are trained; they stay as they "
                "are",
                stacklevel=2,
            )
        with torch.no_grad():
            for name, tensor in saved.items():
                own[name].copy_(tensor)


def _in_order_of_rows(outputs: Any) -> Any:
    """The outputs of heads with rows of their own as logits [B, most labels]; others as they are.

    Batches differ in the heads that they have and in their order, so that `Trainer` could not put
    them one below the other.
    """
    is_listing = isinstance(outputs, list) and len(outputs) > 0
    if not is_listing or not all(isinstance(o, Mapping) and "rows" in o for o in outputs):
        return outputs
    count = sum(len(output["rows"]) for output in outputs)
    width = max(output["logits"].shape[1] for output in outputs)
    logits = outputs[0]["logits"].new_full((count, width), _PADDING)
    for output in outputs:
        logits[output["rows"], : output["logits"].shape[1]] = output["logits"]
    return logits
