"""Prediction heads, and the mixin that gives a model several of them by name.

A head is an `nn.Sequential` at `heads.<name>`; its modules are numbered as in `adapters`, so that
state dicts are interchangeable. `HEAD_TYPES` maps a configuration's `head_type` to its class.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import ModelOutput, SequenceClassifierOutput

from .composition import BatchSplit, Parallel
from .modules import check_module_name
from .ops.activations import ACTIVATIONS, activation_code

__all__ = [
    "HEAD_TYPES",
    "ClassificationHead",
    "FlexibleHeadsMixin",
    "MultiHeadOutput",
    "MultiLabelClassificationHead",
    "PredictionHead",
    "head_from_config",
]


class _Activation(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.code = activation_code(name)

    def forward(self, x: Tensor) -> Tensor:
        return ACTIVATIONS[self.code].forward(x)

    def extra_repr(self) -> str:
        return repr(self.name)


_DROPOUTS = ("classifier_dropout", "seq_classif_dropout", "hidden_dropout_prob", "dropout")
"""Where a model's configuration has a head's dropout: that of classifiers, then of hidden states;
the second name of each is DistilBERT's."""


def _dropout_prob(own: float | None, model_config: Any) -> float:
    """The head's own probability, or the model's for classifiers, or for hidden states, or 0."""
    inherited = (getattr(model_config, key, None) for key in _DROPOUTS)
    return next((p for p in (own, *inherited) if p is not None), 0.0)


def _int_above_0(argument: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise ValueError(f"{argument}: expected an int above 0; got {value!r}")
    return int(value)  # numpy's integers too, which JSON does not know


def checked_label2id(argument: str, given: Any) -> dict[str, int]:
    """Labels with their numbers as label -> number.

    Args:
        argument: "id2label" for number -> label, "label2id" for label -> number.
        given: such a mapping. Numbers may be strings, as JSON's keys are; a label that is an int
            becomes the string that JSON makes of it.

    Raises:
        ValueError: something else, equal labels, or numbers other than 0, 1, 2, ...
    """
    try:
        pairs = list(given.items())
        if argument == "id2label":
            pairs = [(label, i) for i, label in pairs]
        label2id = {str(label): int(i) for label, i in pairs}
        is_valid = sorted(float(i) for _, i in pairs) == list(range(len(label2id))) and all(
            isinstance(label, (str, Integral)) and not isinstance(label, bool) for label, _ in pairs
        )
    except (AttributeError, TypeError, ValueError, OverflowError):
        is_valid = False
    if not is_valid:
        raise ValueError(
            f"{argument}: expected different labels, strings or ints, with the numbers 0, 1, 2, "
            f"...; got {given!r}"
        )
    return label2id


class PredictionHead(nn.Sequential):
    """Base of the heads: `layers` times (dropout, linear, activation) without the last activation.

    A subclass names its `head_type`, fills `config` in its constructor (whose keyword arguments are
    the configuration's keys) and computes its output in `forward`.
    """

    head_type: ClassVar[str]

    def __init__(self, name: str, config: dict[str, Any]) -> None:
        super().__init__()
        check_module_name(name, "head_name")
        self.name = name
        self.config = {"head_type": self.head_type, **config}

    def build_mlp(self, model: nn.Module, num_outputs: int) -> None:
        """Append the modules, initialised by the model, on its device, in its dtype and mode.

        Args:
            model: as in `ClassificationHead`.
            num_outputs: size of the last layer.
        """
        layers, activation = self.config["layers"], self.config["activation_function"]
        dropout = _dropout_prob(self.config["dropout_prob"], model.config)
        hidden_size = model.config.hidden_size
        for _ in range(layers - 1):
            self.append(nn.Dropout(dropout))
            self.append(nn.Linear(hidden_size, hidden_size))
            if activation is not None:
                self.append(_Activation(activation))
        self.append(nn.Dropout(dropout))
        self.append(nn.Linear(hidden_size, num_outputs, bias=self.config["bias"]))
        self.apply(model._init_weights)
        self.to(device=model.device, dtype=model.dtype)
        self.train(model.training)

    def get_label_names(self) -> list[str]:
        """Names of the forward arguments that carry this head's labels."""
        return ["labels"]


class ClassificationHead(PredictionHead):
    """One label per sequence, from the first token; with `num_labels=1` a regression.

    Args:
        model: the model whose hidden size, dropout and initialisation the head takes.
        head_name: its name in `model.heads`.
        num_labels: size of the output; 1 is a regression.
        layers: linear layers; all but the last are `hidden_size` wide.
        activation_function: between the layers; None for none.
        id2label: number -> label, one for each number from 0 to `num_labels - 1`; an int as a label
            is kept as a string, as files have it. None or empty: LABEL_0, LABEL_1, ...
        use_pooler: read the model's pooled output in place of the first token.
        bias: whether the last layer has a bias.
        dropout_prob: by default the model's for classifiers (`classifier_dropout`), then for hidden
            states (`hidden_dropout_prob`), under the names of its configuration.

    Raises:
        ValueError: a value is not valid.
    """

    head_type = "classification"

    def __init__(
        self,
        model: nn.Module,
        head_name: str,
        num_labels: int = 2,
        layers: int = 2,
        activation_function: str | None = "tanh",
        id2label: Mapping[int, str] | None = None,
        use_pooler: bool = False,
        bias: bool = True,
        dropout_prob: float | None = None,
    ) -> None:
        num_labels = _int_above_0("num_labels", num_labels)
        label2id = {} if id2label is None else checked_label2id("id2label", id2label)
        label2id = label2id or {f"LABEL_{i}": i for i in range(num_labels)}
        if len(label2id) != num_labels:
            raise ValueError(
                f"num_labels: expected {len(label2id)}, the number of labels in {list(label2id)}; "
                f"got {num_labels}"
            )
        super().__init__(
            head_name,
            {
                "num_labels": num_labels,
                "layers": _int_above_0("layers", layers),
                "activation_function": activation_function,
                "label2id": label2id,
                "use_pooler": use_pooler,
                "bias": bias,
                "dropout_prob": dropout_prob,
            },
        )
        self.build_mlp(model, num_labels)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy, or the squared error where there is one label.

        Args:
            logits: [B, num_labels].
            labels: [B], class numbers, or floats for the squared error.

        Returns:
            A scalar, the mean over the rows.
        """
        if self.config["num_labels"] == 1:
            return F.mse_loss(logits.view(-1), labels.view(-1).to(logits.dtype))
        return F.cross_entropy(logits, labels.view(-1))

    def forward(
        self,
        outputs: ModelOutput | tuple,
        cls_output: Tensor | None = None,
        attention_mask: Tensor | None = None,
        return_dict: bool = False,
        pooled_output: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> SequenceClassifierOutput | tuple:
        """Logits [B, num_labels] and, with labels, their loss.

        Args:
            outputs: what the base model returned; the first entry is its last state [B, S, H].
            cls_output: [B, H], read in place of the first token's state.
            attention_mask: not read by this head.
            return_dict: return transformers' output class in place of a tuple.
            pooled_output: [B, H], needed with `use_pooler`.
            labels: [B] class numbers; floats [B] for a regression, [B, num_labels] for multi-label.

        Returns:
            `loss` (None without labels), `logits`, and the base model's hidden states and
            attentions; as a tuple the loss, if any, the logits and the rest of `outputs`.

        Raises:
            ValueError: `use_pooler` and no pooled output.
        """
        if cls_output is None and self.config["use_pooler"]:
            if pooled_output is None:
                raise ValueError(f"use_pooler: head {self.name!r} needs a model with a pooler")
            cls_output = pooled_output
        logits = super().forward(outputs[0][:, 0] if cls_output is None else cls_output)
        loss = None if labels is None else self.loss(logits, labels)
        if not return_dict:
            return (() if loss is None else (loss,)) + (logits,) + tuple(outputs[1:])
        return SequenceClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class MultiLabelClassificationHead(ClassificationHead):
    """Any number of labels per sequence; arguments as `ClassificationHead`."""

    head_type = "multilabel_classification"

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Binary cross-entropy.

        Args:
            logits: [B, num_labels].
            labels: [B, num_labels], from 0 to 1.

        Returns:
            A scalar, the mean over rows and labels.
        """
        return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))


HEAD_TYPES: dict[str, type[PredictionHead]] = {
    head.head_type: head for head in (ClassificationHead, MultiLabelClassificationHead)
}
"""`head_type` of a head's configuration -> class."""


def head_from_config(model: nn.Module, name: str, config: Mapping[str, Any]) -> PredictionHead:
    """Make the head that a configuration describes, without adding it to the model.

    Args:
        model: as in `ClassificationHead`.
        name: the head's name.
        config: its `head_type`, the constructor's arguments, and `label2id` or `id2label`.

    Returns:
        The head, with fresh weights.

    Raises:
        NotImplementedError: the head type is not supported.
        ValueError: a key or value is not valid.
    """
    if not isinstance(config, Mapping):
        raise ValueError(f"config of head {name!r}: expected a mapping; got {config!r}")
    arguments = dict(config)
    head_type = arguments.pop("head_type", None)
    if head_type not in HEAD_TYPES:
        raise NotImplementedError(
            f"head_type: expected one of {', '.join(HEAD_TYPES)}; got {head_type!r}, which is not "
            "supported yet"
        )
    label2id = arguments.pop("label2id", None)
    if arguments.get("id2label") is None and label2id is not None:
        id2label = {i: label for label, i in checked_label2id("label2id", label2id).items()}
        # adapters writes two labels for a regression that it converts from transformers' head
        is_regression = id2label and arguments.get("num_labels") == 1
        arguments["id2label"] = {0: id2label[0]} if is_regression else id2label
    try:
        return HEAD_TYPES[head_type](model, name, **arguments)
    except TypeError as error:
        raise ValueError(f"config of head {name!r}: {error}") from error


Heads = str | Sequence[str] | BatchSplit
"""One head, several for the same rows or for the channels of a Parallel, or several with their
numbers of rows."""


def head_names(heads: Heads | None) -> list[str]:
    """The names in what `active_head` may be."""
    return [] if heads is None else [heads] if isinstance(heads, str) else list(heads)


@dataclass
class MultiHeadOutput(ModelOutput):
    """What several heads gave in one forward: an index, or iterating, gives their own outputs.

    Semantics::

        first, second = output                      # output.head_outputs
        output.logits == torch.vstack([first.logits, second.logits])
        output.loss == first.loss + second.loss

    Args:
        head_outputs: each head's output, a tuple with `return_dict=False`. Where setups were chosen
            row by row each has `rows`, or a tuple as its last item: an int64 tensor, the rows of
            the batch that it is for.
        loss: the sum of the heads' losses, which are means over their rows; a head without rows has
            none. None without labels, and where several heads read the same rows.
    """

    head_outputs: list[ModelOutput | tuple] | None = None
    loss: Tensor | None = None

    @property
    def logits(self) -> Tensor:
        """The heads' logits one below the other; they must have the same number of labels."""
        return torch.vstack([output["logits"] for output in self.head_outputs])

    def __getitem__(self, key: str | int | slice) -> Any:
        if isinstance(key, (int, slice)):
            return self.head_outputs[key]
        return super().__getitem__(key)

    def __setitem__(self, key: str | int, value: Any) -> None:
        if isinstance(key, int):
            self.head_outputs[key] = value
        else:
            super().__setitem__(key, value)

    def __iter__(self) -> Iterator[ModelOutput | tuple]:
        return iter(self.head_outputs)

    def __len__(self) -> int:
        return len(self.head_outputs)


class HeadRows(NamedTuple):
    """A head and the rows that it is for."""

    head: str
    rows: slice | Tensor | None
    """A tensor: int64 row numbers, which are part of the output. None: all rows, for no loss."""

    def of(self, value: Any, size: int) -> Any:
        """These rows of a tensor [size, ...], or of one that all channels share; else the value.

        Args:
            value: a tensor, an output of the base model, or anything else.
            size: rows of all channels.
        """
        if self.rows is None:
            return value
        if isinstance(value, ModelOutput):
            tensors = {k: self.of(v, size) for k, v in value.items() if isinstance(v, Tensor)}
            return type(value)(**tensors)
        if isinstance(value, tuple):
            return tuple(self.of(v, size) for v in value if isinstance(v, Tensor))
        if not isinstance(value, Tensor) or value.dim() == 0:
            return value
        if len(value) < size:
            value = value.repeat(size // len(value), *[1] * (value.dim() - 1))
        return value[self.rows]


def consecutive_rows(
    heads: BatchSplit, batch_size: int, channels: int = 1, argument: str = "active_head"
) -> list[HeadRows]:
    """The rows of a BatchSplit's heads, in each channel of a Parallel.

    Args:
        heads: with their numbers of rows.
        batch_size: rows of one channel.
        channels: how many follow one another.
        argument: what the caller's user calls the heads, for errors.

    Raises:
        ValueError: the batch has another size.
    """
    if sum(heads.batch_sizes) != batch_size:
        raise ValueError(
            f"{argument}: expected a batch of {sum(heads.batch_sizes)} rows for {heads!r}; "
            f"got {batch_size}"
        )
    parts, start = [], 0
    for name, count in zip([*heads] * channels, heads.batch_sizes * channels, strict=True):
        parts.append(HeadRows(name, slice(start, start + count)))
        start += count
    return parts


class FlexibleHeadsMixin:
    """Prediction heads by name, for a model class on top of transformers' `PreTrainedModel`.

    The class calls `init_heads()` at the end of its constructor and `forward_head` at the end of
    its forward.
    """

    heads: nn.ModuleDict

    # The heads' losses are means over the batch: transformers' Trainer has to divide them by the
    # number of accumulation steps itself.
    accepts_loss_kwargs = False

    def init_heads(self) -> None:
        """Make the heads that `config.prediction_heads` lists."""
        self.heads = nn.ModuleDict()
        self._active_head: Heads | None = None
        self._head_came_along = False
        """Whether a setup brought the active head; else the user chose it."""
        configs = getattr(self.config, "prediction_heads", None) or {}
        self.config.prediction_heads = {}
        for name, config in configs.items():
            self.add_prediction_head_from_config(name, config)

    def add_classification_head(
        self,
        head_name: str,
        num_labels: int = 2,
        layers: int = 2,
        activation_function: str | None = "tanh",
        overwrite_ok: bool = False,
        multilabel: bool = False,
        id2label: Mapping[int, str] | None = None,
        use_pooler: bool = False,
        bias: bool = True,
        dropout_prob: float | None = None,
    ) -> None:
        """Add a head for sequence classification and make it the active one.

        Args:
            head_name: its name; an adapter of the same name brings it along when activated.
            overwrite_ok: replace a head of this name.
            multilabel: any number of labels per sequence, with binary cross-entropy.
            num_labels, layers, activation_function, id2label, use_pooler, bias, dropout_prob: as
                in `ClassificationHead`.

        Raises:
            ValueError: the name is taken or a value is not valid.
        """
        self._check_new_head(head_name, overwrite_ok)
        head_class = MultiLabelClassificationHead if multilabel else ClassificationHead
        head = head_class(
            self,
            head_name,
            num_labels=num_labels,
            layers=layers,
            activation_function=activation_function,
            id2label=id2label,
            use_pooler=use_pooler,
            bias=bias,
            dropout_prob=dropout_prob,
        )
        self.add_prediction_head(head, overwrite_ok=overwrite_ok)

    def add_prediction_head_from_config(
        self,
        head_name: str,
        config: Mapping[str, Any],
        overwrite_ok: bool = False,
        set_active: bool = True,
    ) -> None:
        """Add the head that a configuration describes.

        Args:
            head_name: its name.
            config: as in `head_from_config`.
            overwrite_ok: replace a head of this name.
            set_active: make it the active head.

        Raises:
            NotImplementedError: the head type is not supported.
            ValueError: the name is taken, or a key or value is not valid.
        """
        self._check_new_head(head_name, overwrite_ok)
        head = head_from_config(self, head_name, config)
        self.add_prediction_head(head, overwrite_ok=overwrite_ok, set_active=set_active)

    def add_prediction_head(
        self, head: PredictionHead, overwrite_ok: bool = False, set_active: bool = True
    ) -> None:
        """Add a head under its own name.

        Args:
            head: the head.
            overwrite_ok: replace a head of this name.
            set_active: make it the active head.

        Raises:
            ValueError: the name is taken and `overwrite_ok` is not set.
        """
        self._check_new_head(head.name, overwrite_ok)
        self.heads[head.name] = head
        self.config.prediction_heads[head.name] = head.config
        if set_active:
            self.active_head = head.name

    def _check_new_head(self, name: str, overwrite_ok: bool) -> None:
        if name in self.heads and not overwrite_ok:
            raise ValueError(f"head_name: the model has a head {name!r}; pass overwrite_ok=True")

    def delete_head(self, head_name: str) -> None:
        """Remove a head; if it was active, alone or among others, none is afterwards.

        Args:
            head_name: its name.

        Raises:
            ValueError: there is no head of this name.
        """
        self._head(head_name)
        del self.heads[head_name]
        del self.config.prediction_heads[head_name]
        if head_name in head_names(self._active_head):
            self._active_head = None

    @property
    def active_head(self) -> Heads | None:
        """The head that a forward runs through, or None for the base model's own output.

        A list of names gives the channels of a Parallel a head each, or the whole batch to all of
        them where there is no Parallel; a BatchSplit of names gives each its part of the rows.
        Setting a single head also sets the labels of `config`.
        """
        return self._active_head

    @active_head.setter
    def active_head(self, heads: Heads | None) -> None:
        heads = self.check_heads(heads, "active_head")
        if isinstance(heads, str):
            self.config.label2id = dict(self.heads[heads].config["label2id"])
            self.config.id2label = self.get_labels_dict(heads)
        self._active_head = heads
        self._head_came_along = False

    def check_heads(self, heads: Heads | None, argument: str) -> Heads | None:
        """Heads as `active_head` takes them, with a list of one as its name, of none as None.

        Args:
            heads: a name, a list or a Parallel of names, a BatchSplit of names, or None.
            argument: what the caller's user calls it, for errors.

        Raises:
            ValueError: something else, or a head that the model does not have.
        """
        if heads is None:
            return None
        names = [heads] if isinstance(heads, str) else heads
        is_listing = isinstance(names, (list, tuple, BatchSplit, Parallel))
        if not is_listing or not all(isinstance(name, str) for name in names):
            raise ValueError(
                f"{argument}: expected a head's name, a list or a BatchSplit of names, or None; "
                f"got {heads!r}"
            )
        for name in names:
            if name not in self.heads:
                raise ValueError(f"{argument}: expected one of {list(self.heads)}; got {name!r}")
        if len(names) < 2:
            return names[0] if names else None
        return names if isinstance(names, BatchSplit) else list(names)

    def _head(self, name: str | None) -> PredictionHead:
        """A head by name, or the active one."""
        if name is None:
            name = self._active_head
        if name is None:
            raise ValueError("head_name: none given, and no head is active")
        if not isinstance(name, str):
            raise ValueError(f"head_name: expected a name; got none, and {name!r} are active")
        if name not in self.heads:
            raise ValueError(f"head_name: expected one of {list(self.heads)}; got {name!r}")
        return self.heads[name]

    def head_type(self, head_name: str | None = None) -> str:
        """The `head_type` of a head.

        Args:
            head_name: the head; None for the active one.

        Returns:
            One of `HEAD_TYPES`.

        Raises:
            ValueError: there is no head of this name, or none is active.
        """
        return self._head(head_name).head_type

    def get_labels_dict(self, head_name: str | None = None) -> dict[int, str]:
        """Number -> label of a head.

        Args:
            head_name: the head; None for the active one.

        Raises:
            ValueError: there is no head of this name, or none is active.
        """
        return {i: label for label, i in self._head(head_name).config["label2id"].items()}

    def get_labels(self, head_name: str | None = None) -> list[str]:
        """The labels of a head.

        Args:
            head_name: the head; None for the active one.

        Raises:
            ValueError: there is no head of this name, or none is active.
        """
        return list(self.get_labels_dict(head_name).values())

    def forward_head(
        self,
        all_outputs: ModelOutput | tuple,
        head_name: Heads | None = None,
        cls_output: Tensor | None = None,
        attention_mask: Tensor | None = None,
        return_dict: bool = False,
        pooled_output: Tensor | None = None,
        **kwargs: Any,
    ) -> ModelOutput | tuple:
        """Run one or several heads on the base model's output.

        Args:
            all_outputs: the base model's output.
            head_name: the head, or several as `active_head` takes them; None for the active one.
            cls_output, attention_mask, return_dict, pooled_output: see the head's forward.
            kwargs: further arguments of the head's forward, such as `labels`; a BatchSplit's heads
                get their rows of each tensor.

        Returns:
            The head's output; a `MultiHeadOutput` of several; `all_outputs` where neither a name is
            given nor a head active.

        Raises:
            ValueError: there is no head of this name, or the batch has not the size that a
                BatchSplit needs.
        """
        if head_name is None:
            head_name = self._active_head
        heads = self.check_heads(head_name, "head_name")
        if heads is None:
            return all_outputs
        arguments = {
            "cls_output": cls_output,
            "attention_mask": attention_mask,
            "pooled_output": pooled_output,
            **kwargs,
        }
        if isinstance(heads, str):
            return self.heads[heads](all_outputs, return_dict=return_dict, **arguments)
        size = len(all_outputs[0])
        if isinstance(heads, BatchSplit):
            parts = consecutive_rows(heads, size, argument="head_name")
        else:
            parts = [HeadRows(name, None) for name in heads]
        return self.forward_head_rows(all_outputs, parts, size, return_dict, **arguments)

    def forward_head_rows(
        self,
        all_outputs: ModelOutput | tuple,
        parts: Sequence[HeadRows],
        size: int,
        return_dict: bool = False,
        **kwargs: Any,
    ) -> MultiHeadOutput:
        """Run heads on rows of their own.

        Args:
            all_outputs: the base model's output.
            parts: the heads and their rows.
            size: rows of all channels; tensors with fewer are the same in every channel.
            return_dict: see the head's forward.
            kwargs: further arguments of the head's forward; each head gets its rows of tensors.

        Returns:
            The heads' outputs in the order of `parts`.
        """
        outputs, losses = [], []
        for part in parts:
            inputs = part.of(all_outputs, size)
            arguments = {key: part.of(value, size) for key, value in kwargs.items()}
            has_loss = arguments.get("labels") is not None and len(inputs[0]) > 0
            if not has_loss:
                # the mean over no rows is NaN
                arguments.pop("labels", None)
            output = self.heads[part.head](inputs, return_dict=return_dict, **arguments)
            if has_loss and part.rows is not None:
                losses.append(output[0])
            if isinstance(part.rows, Tensor):
                if return_dict:
                    output["rows"] = part.rows
                else:
                    output = (*output, part.rows)
            outputs.append(output)
        combined = MultiHeadOutput(head_outputs=outputs, loss=sum(losses) if losses else None)
        for name in ("hidden_states", "attentions"):
            if (value := getattr(all_outputs, name, None)) is not None:
                combined[name] = value
        return combined
