"""What a user calls on a model: `init`, `restore`, and the methods that a patched model has."""

import copy
import functools
import inspect
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import noop_context_fn

from . import reference, rows, saved_setups, serialization
from .composition import (
    AdapterCompositionBlock,
    Fuse,
    MultiTask,
    Split,
    as_fuse,
    blocks,
    fuses,
    fusion_name,
    parse_composition,
)
from .configuration import (
    LOCATIONS,
    AdapterConfig,
    AdapterFusionConfig,
    BnConfig,
    ModelAdaptersConfig,
)
from .context import AdapterSetup, ForwardContext
from .explain import AdapterPlan
from .modules import Adapter, AdapterFusion, check_module_name
from .ops import backends
from .patching import architecture_of, unpatch
from .places import CHECKPOINTING, Lowered, ModelAdapters

_ROW_ARGUMENTS = ("adapter_names", "adapter_ids", "task_ids")
"""The keyword arguments of a forward that choose a setup for each row."""
_HAS_COPIES = "adapter_input_parallelized"
"""The one that says that the rows hold the batch once for each channel of a Parallel."""


class ModelAdaptersMixin:
    """The methods of a model with adapters; their names and results are those of `adapters`."""

    model_adapters: ModelAdapters
    _positional: tuple[str, ...] = ()
    """The names of the forward's positional arguments."""

    # -- state ----------------------------------------------------------------------------------

    @property
    def adapters_config(self) -> ModelAdaptersConfig:
        """The adapters, fusions and the active setup of this model."""
        return self.model_adapters.config

    @property
    def model_frozen(self) -> bool:
        """Whether `train_adapter`, `train_adapter_fusion` or `freeze_model` froze the model."""
        return self.model_adapters.frozen

    def has_adapters(self) -> bool:
        """Whether any adapter was added."""
        return len(self.adapters_config.adapters) > 0

    def set_backend(self, backend: str | None) -> None:
        """Choose what runs the adapters.

        Args:
            backend: as for `fastfusion.init`.

        Raises:
            ValueError: there is no such backend.
        """
        backends.check_name(backend)
        self.model_adapters.backend = backend

    @property
    def active_adapters(self) -> AdapterCompositionBlock | None:
        """The setup that every forward runs; assigning is `set_active_adapters`."""
        return self.adapters_config.active_setup

    @active_adapters.setter
    def active_adapters(self, setup: Any) -> None:
        self.set_active_adapters(setup)

    def set_active_adapters(self, adapter_setup: Any, skip_layers: list[int] | None = None) -> None:
        """Choose the adapters that every forward runs.

        Args:
            adapter_setup: an adapter's name, a block, or None for no adapters.
            skip_layers: numbers of layers that run without adapters (AdapterDrop, Rückle et al.
                2021).

        Raises:
            ValueError: an adapter, fusion or layer that the model does not have, or a forbidden
                nesting.
        """
        setup = parse_composition(adapter_setup)
        self.model_adapters.check_setup(setup)
        skip_layers = () if skip_layers is None else skip_layers
        self.model_adapters.activate(setup, self.model_adapters.checked_layers(skip_layers))

    def adapter_plan(self, setups: Sequence[Any] | None = None) -> AdapterPlan:
        """What a setup becomes at every place: `print(model.adapter_plan().explain())`.

        Args:
            setups: the rows' setups, as for `adapter_names`; None for the setup of the next
                forward: of an `AdapterSetup` context, or the active one.

        Raises:
            ValueError: unknown adapters or fusions, or a block over rows in `setups`.
        """
        if setups is None:
            (setup,) = self._setups(None)
            text = repr(setup)
            lowered = self.model_adapters.current()
        else:
            distinct, _ = rows.row_numbers(setups, None)
            self._setups(distinct)
            text = "; ".join(f"{i}: {setup!r}" for i, setup in enumerate(distinct))
            lowered = self.model_adapters.lower(distinct, self.model_adapters.skip_layers)
        return AdapterPlan(text, list(lowered.plans.items()), self.config.hidden_size)

    # -- adding and deleting --------------------------------------------------------------------

    def add_adapter(
        self,
        adapter_name: str,
        config: Any = None,
        overwrite_ok: bool = False,
        set_active: bool = False,
    ) -> None:
        """Add a fresh bottleneck adapter.

        Args:
            adapter_name: its name.
            config: a config, a mapping, a name such as "seq_bn", a path or a config string; None is
                "seq_bn".
            overwrite_ok: replace an adapter of that name.
            set_active: also make it the active setup.

        Raises:
            ValueError: the name is taken or cannot be used, or the config is wrong.
            NotImplementedError: a kind of adapter that is not supported yet.
        """
        check_module_name(adapter_name, "adapter_name")
        if adapter_name == rows.BASE:
            raise ValueError(f"adapter_name: expected another name than {rows.BASE!r}, no adapter")
        config = AdapterConfig.load(config)
        config.check_supported()
        if adapter_name in self.adapters_config.adapters and not overwrite_ok:
            raise ValueError(
                f"adapter_name: an adapter {adapter_name!r} exists; pass overwrite_ok=True to "
                "replace it"
            )
        for fusion, names in self.adapters_config.fusion_names.items():
            if adapter_name in names:
                self._check_locations(names, {adapter_name: config}, f"config (in {fusion!r})")
        hidden_size = self.config.hidden_size
        new = []
        for layer in self.model_adapters.layers:
            if config.match(layer.layer_idx, layer.location):
                size = config.bottleneck_size(hidden_size, layer.layer_idx)
                new.append((layer, Adapter(config, hidden_size, size)))
        # modules of the old adapter may lie where the new one has none
        for layer, _ in list(self.model_adapters.modules(adapter_name)):
            del layer.adapters[adapter_name]
        for layer, module in new:
            layer.adapters[adapter_name] = self._placed(module)
        self.adapters_config.adapters[adapter_name] = config
        self.model_adapters.update_plans()
        if set_active:
            self.set_active_adapters(adapter_name)

    def _placed(self, module: nn.Module) -> nn.Module:
        base = self.base_model
        return module.to(device=base.device, dtype=base.dtype).train(base.training)

    def delete_adapter(self, adapter_name: str, force: bool = False) -> None:
        """Remove an adapter.

        Args:
            adapter_name: its name.
            force: remove it although the active setup or a fusion needs it: then nothing is active
                afterwards, and the fusions over it go too.

        Raises:
            ValueError: there is no such adapter, or the active setup or a fusion needs it.
        """
        if adapter_name not in self.adapters_config.adapters:
            raise ValueError(f"adapter_name: the model has no adapter {adapter_name!r}")
        active = self.active_adapters
        if active is not None and adapter_name in active.flatten():
            if not force:
                raise ValueError(
                    f"adapter_name: {adapter_name!r} is part of the active setup {active!r}; "
                    "deactivate it first or pass force=True"
                )
            self.set_active_adapters(None)
        fusions = [
            f for f, names in self.adapters_config.fusion_names.items() if adapter_name in names
        ]
        if fusions and not force:
            raise ValueError(
                f"adapter_name: {adapter_name!r} is fused by {fusions}; delete these fusions first "
                "or pass force=True"
            )
        for fusion in fusions:
            self.delete_adapter_fusion(fusion, force=True)
        for layer, _ in list(self.model_adapters.modules(adapter_name)):
            del layer.adapters[adapter_name]
        del self.adapters_config.adapters[adapter_name]
        self.model_adapters.update_plans()

    def add_adapter_fusion(
        self,
        adapter_names: Fuse | Sequence[str] | str,
        config: Any = None,
        name: str | None = None,
        overwrite_ok: bool = False,
        set_active: bool = False,
    ) -> None:
        """Add a fresh fusion layer over adapters.

        Args:
            adapter_names: a Fuse, a list of names, or "a,b,c".
            config: a config, a mapping, "dynamic" (None) or "static".
            name: the fusion's name; by default the Fuse's, or the names joined by commas.
            overwrite_ok: replace a fusion of that name.
            set_active: also make the Fuse, under this name, the active setup.

        Raises:
            ValueError: not adapters to fuse, or unknown ones; a name that is taken, or one that the
                active setup uses for other adapters; adapters that sit at different locations.
        """
        fuse = as_fuse(adapter_names, name)
        names, name = fuse.adapter_names, fuse.name
        check_module_name(name, "name")
        config = AdapterFusionConfig.load(config)
        for adapter_name in names:
            if adapter_name not in self.adapters_config.adapters:
                raise ValueError(f"adapter_names: the model has no adapter {adapter_name!r}")
        if set_active:
            for child in parse_composition(fuse):
                self.model_adapters.check_setup(parse_composition(child))
        if name in self.adapters_config.fusions and not overwrite_ok:
            raise ValueError(
                f"name: a fusion {name!r} exists; pass overwrite_ok=True to replace it"
            )
        for active in fuses(self.active_adapters):
            if active.name == name and active.adapter_names != names and not set_active:
                raise ValueError(
                    f"name: {name!r} is part of the active setup {self.active_adapters!r}, over "
                    f"{active.adapter_names}; deactivate it first"
                )
        self._check_locations(names, {}, "adapter_names")
        first = self.adapters_config.adapters[names[0]]
        dropout = self.model_adapters.attention_dropout
        new = [
            (layer, self._placed(AdapterFusion(config, self.config.hidden_size, dropout)))
            for layer in self.model_adapters.layers
            # as adapters does: in layers too that an adapter leaves out
            if first[layer.location]
        ]
        if set_active:
            self.set_active_adapters(None)  # it may need the fusion that goes
        for layer, _ in list(self.model_adapters.fusion_modules(name)):
            del layer.adapter_fusion_layer[name]
        for layer, module in new:
            layer.adapter_fusion_layer[name] = module
        self.adapters_config.fusions[name] = config
        self.adapters_config.fusion_names[name] = names
        self.model_adapters.update_plans()
        if set_active:
            self.set_active_adapters(fuse)

    add_fusion = add_adapter_fusion

    def _check_locations(
        self, names: Sequence[str], new: dict[str, BnConfig], argument: str
    ) -> None:
        """Raise a ValueError unless adapters, some with new configs, sit at the same locations."""
        configs = {name: new.get(name) or self.adapters_config.adapters[name] for name in names}
        for location in LOCATIONS:
            flags = {name: bool(config[location]) for name, config in configs.items()}
            if len(set(flags.values())) > 1:
                raise ValueError(
                    f"{argument}: expected adapters at the same locations; {location} is {flags}"
                )

    def delete_adapter_fusion(
        self, adapter_names: Fuse | Sequence[str] | str, force: bool = False
    ) -> None:
        """Remove a fusion layer.

        Args:
            adapter_names: a Fuse, a list of names, or the fusion's name.
            force: remove it although the active setup runs it; nothing is active afterwards.

        Raises:
            ValueError: there is no such fusion, or the active setup runs it.
        """
        name = self._fusion_name(adapter_names)
        active = self.active_adapters
        if active is not None and name in {fuse.name for fuse in fuses(active)}:
            if not force:
                raise ValueError(
                    f"adapter_names: {name!r} is part of the active setup {active!r}; "
                    "deactivate it first or pass force=True"
                )
            self.set_active_adapters(None)
        for layer, _ in list(self.model_adapters.fusion_modules(name)):
            del layer.adapter_fusion_layer[name]
        del self.adapters_config.fusions[name], self.adapters_config.fusion_names[name]
        self.model_adapters.update_plans()

    def _fusion_name(self, adapter_names: Fuse | Sequence[str] | str) -> str:
        name = fusion_name(adapter_names)
        if name not in self.adapters_config.fusions:
            known = ", ".join(map(repr, self.adapters_config.fusions)) or "none"
            raise ValueError(
                f"adapter_names: expected a fusion of the model ({known}); got {name!r}"
            )
        return name

    # -- training -------------------------------------------------------------------------------

    def freeze_model(self, freeze: bool = True) -> None:
        """Freeze or unfreeze all weights of the base model, adapters and fusions included.

        Args:
            freeze: True stops their training; False trains them all.
        """
        for parameter in self.base_model.parameters():
            parameter.requires_grad = not freeze
        self.model_adapters.frozen = freeze

    def train_adapter(self, adapter_setup: Any, train_embeddings: bool = False) -> None:
        """Activate a setup and train its adapters: everything else in the base model is frozen.

        Args:
            adapter_setup: as for `set_active_adapters`.
            train_embeddings: train the word embeddings too.

        Raises:
            ValueError: as `set_active_adapters`, or the setup has no adapters.
        """
        self._train_setup(adapter_setup, adapters=True, fusions=False)
        if train_embeddings:
            self.get_input_embeddings().weight.requires_grad = True

    def train_adapter_fusion(self, adapter_setup: Any, unfreeze_adapters: bool = False) -> None:
        """Activate a setup and train its fusion: everything else in the base model is frozen.

        Args:
            adapter_setup: a Fuse, or a Stack with Fuses in it.
            unfreeze_adapters: train the setup's adapters too.

        Raises:
            ValueError: as `set_active_adapters`, or the setup has no Fuse.
        """
        setup = parse_composition(adapter_setup)
        if setup is None or not any(fuses(setup)):
            raise ValueError(f"adapter_setup: expected a Fuse or a Stack with one; got {setup!r}")
        self._train_setup(setup, adapters=unfreeze_adapters, fusions=True)

    train_fusion = train_adapter_fusion

    def _train_setup(self, adapter_setup: Any, adapters: bool, fusions: bool) -> None:
        setup = parse_composition(adapter_setup)
        if setup is None:
            raise ValueError("adapter_setup: expected one or more adapters to train; got none")
        self.set_active_adapters(setup)
        self.base_model.train()
        self.freeze_model(True)
        trained: list[Iterable] = []
        if adapters:
            trained += [self.model_adapters.modules(name) for name in setup.flatten()]
        if fusions:
            trained += [self.model_adapters.fusion_modules(fuse.name) for fuse in fuses(setup)]
        for modules in trained:
            for _, module in modules:
                module.requires_grad_(True)

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """transformers' method, never reentrant: that gives frozen models no gradients.

        The base model inside of this one has it too. A layer that is computed again finds the setup
        of its forward, whatever is active by then.

        Args:
            gradient_checkpointing_kwargs: for `torch.utils.checkpoint.checkpoint`.
            kwargs: further arguments of transformers' method.

        Raises:
            ValueError: `use_reentrant=True` is asked for.
        """
        arguments = {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}
        if arguments["use_reentrant"]:
            raise ValueError(
                "gradient_checkpointing_kwargs: expected use_reentrant=False; reentrant "
                "checkpointing gives the adapters of a frozen model no gradients"
            )
        arguments["context_fn"] = self._context_fn(arguments)
        super().gradient_checkpointing_enable(arguments, **kwargs)

    def _context_fn(self, arguments: Mapping[str, Any]) -> Callable:
        """The `context_fn` for a checkpoint with these arguments, theirs included."""
        given = arguments.get("context_fn", noop_context_fn)
        return functools.partial(self.model_adapters.recomputation_contexts, given)

    def get_fusion_regularization_loss(self) -> Tensor | None:
        """The regulariser of every trained value matrix.

        Semantics::

            0.01 * sum(((I - value.weight) ** 2).sum() for value in trained value matrices)

        Returns:
            A scalar, or None where no value matrix is trained.
        """
        values = [
            fusion.value.weight
            for layer in self.model_adapters.layers
            for fusion in layer.adapter_fusion_layer.values()
            if fusion.config["value"] and fusion.value.weight.requires_grad
        ]
        return reference.fusion_regularization(values) if values else None

    # -- files ----------------------------------------------------------------------------------

    save_adapter = serialization.save_adapter
    save_all_adapters = serialization.save_all_adapters
    load_adapter = serialization.load_adapter
    save_adapter_fusion = serialization.save_adapter_fusion
    save_all_adapter_fusions = serialization.save_all_adapter_fusions
    load_adapter_fusion = serialization.load_adapter_fusion
    save_head = serialization.save_head
    save_all_heads = serialization.save_all_heads
    load_head = serialization.load_head
    save_adapter_setup = saved_setups.save_adapter_setup
    load_adapter_setup = saved_setups.load_adapter_setup

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """transformers' `save_pretrained`: the whole model, with its adapters and fusions.

        config.json lists them, so that `AutoAdapterModel.from_pretrained` makes them again.

        Args:
            save_directory: where to write.
            kwargs: further arguments of transformers' method.
        """
        state = kwargs.pop("state_dict", None) or self.state_dict()
        state = serialization.whole_state(self, state)
        # ln_before adapters hold their norm under two names; transformers wants no shared tensors
        state = {k: v.clone() if ".adapter_norm_before." in k else v for k, v in state.items()}
        before = self.config.__dict__.get("adapters")
        self.config.adapters = self._carried()
        try:
            super().save_pretrained(save_directory, state_dict=state, **kwargs)
        finally:
            # restore(model) gives back the config as it was
            if before is None:
                del self.config.adapters
            else:
                self.config.adapters = before

    def _carried(self) -> dict[str, Any]:
        """The key `adapters` of config.json."""
        # our own key, which adapters ignores: one value, the fusion's modules cool down together
        temperatures = {}
        for name in self.adapters_config.fusions:
            for _, fusion in self.model_adapters.fusion_modules(name):
                if fusion.temperature is not None:
                    fusion.settle_temperature()
                    temperatures[name] = fusion.temperature.item()
        record = copy.copy(self.adapters_config)
        record.adapters = {
            name: serialization.actual_config(self, name) for name in record.adapters
        }
        return {**record.to_dict(), "fusion_temperatures": temperatures}

    # -- looking ----------------------------------------------------------------------------------

    def get_adapter(self, name: str) -> dict[int, dict[str, Adapter]]:
        """An adapter's modules.

        Args:
            name: its name.

        Returns:
            `{layer: {location: module}}`, without the places where the adapter is absent.

        Raises:
            ValueError: there is no such adapter.
        """
        if name not in self.adapters_config.adapters:
            raise ValueError(f"name: the model has no adapter {name!r}")
        found: dict[int, dict[str, Adapter]] = {}
        for layer, module in self.model_adapters.modules(name):
            found.setdefault(layer.layer_idx, {})[layer.location] = module
        return found

    def adapter_to(self, name: str, device: Any = None, dtype: torch.dtype | None = None) -> None:
        """Move an adapter, or cast it.

        Args:
            name: its name.
            device: where to; None leaves it where it is.
            dtype: a floating-point type; None leaves it in its own.

        Raises:
            ValueError: there is no such adapter.
        """
        self.get_adapter(name)
        for layer, module in self.model_adapters.modules(name):
            module.to(device=device, dtype=dtype)
            layer.packs.drop()

    def adapter_fusion_to(
        self,
        adapter_names: Fuse | Sequence[str] | str,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Move a fusion layer, or cast it.

        Args:
            adapter_names: a Fuse, a list of names, or the fusion's name.
            device, dtype: as in `adapter_to`.

        Raises:
            ValueError: there is no such fusion.
        """
        for layer, module in self.model_adapters.fusion_modules(self._fusion_name(adapter_names)):
            module.to(device=device, dtype=dtype)
            layer.packs.drop()

    def adapter_summary(self, as_dict: bool = False) -> str | list[dict[str, Any]]:
        """Name, kind, size, activity and training of every adapter, and of the model without them.

        Args:
            as_dict: a list of rows in place of a table.

        Returns:
            A table to print, or a dictionary per row; sizes in parameters and in per cent of the
            model without adapters.
        """
        summary = []
        active = set() if self.active_adapters is None else self.active_adapters.flatten()
        for name in self.adapters_config.adapters:
            parameters = [p for _, m in self.model_adapters.modules(name) for p in m.parameters()]
            summary.append(
                {
                    "name": name,
                    "architecture": "bottleneck",
                    "active": name in active,
                    "#param": sum(p.numel() for p in parameters),
                    "train": all(p.requires_grad for p in parameters),
                }
            )
        total = sum(p.numel() for p in self.base_model.parameters())
        total -= sum(row["#param"] for row in summary)
        for row in summary:
            row["%param"] = row["#param"] / total * 100
        summary.append(
            {"name": "Full model", "#param": total, "%param": 100.0, "train": not self.model_frozen}
        )
        if as_dict:
            return summary
        line = "{:<25}{:<15}{:>12,}{:>12.3f}{:>8}{:>8}".format
        header = "{:<25}{:<15}{:>12}{:>12}{:>8}{:>8}".format
        columns = ("name", "architecture", "#param", "%param", "active", "train")
        body = [line(*(row.get(column, "") for column in columns)) for row in summary]
        table = [header("Name", "Architecture", "#Param", "%Param", "Active", "Train"), *body]
        table[1:1] = table[-1:-1] = ["-" * 80]
        return "\n".join(["=" * 80, *table, "=" * 80])

    # -- forward --------------------------------------------------------------------------------

    def _forward_with_adapters(self, forward, args: tuple, kwargs: dict[str, Any]) -> Any:
        """A model's forward with what the adapters need around it."""
        asked = {name: kwargs.pop(name) for name in ForwardContext.ARGUMENTS if name in kwargs}
        lowered, own = self._rows(args, kwargs)
        fusions = self._cooling_fusions(lowered.setups, own)
        for fusion in fusions:
            fusion.settle_temperature()
        # always a context: this may run inside another model's forward
        with ForwardContext(**asked, plans=lowered.plans, **own) as context:
            outputs = forward(*args, **kwargs)
        # train_adapter_fusion puts the base model alone into training mode
        in_training = self.base_model.training and torch.is_grad_enabled()
        for fusion in fusions:
            fusion.count_forward(in_training)
        for name, value in context.outputs().items():
            if isinstance(outputs, tuple):
                outputs = (*outputs, value)
            else:
                outputs[name] = value
        return outputs

    def _rows(self, args: tuple, kwargs: dict[str, Any]) -> tuple[Lowered, dict[str, Any]]:
        """Take the arguments that say which row has which setup; what the forward runs, and
        `ForwardContext`'s arguments for its rows."""
        given = {name: kwargs.pop(name, None) for name in _ROW_ARGUMENTS}
        given = {name: value for name, value in given.items() if value is not None}
        has_copies = bool(kwargs.pop(_HAS_COPIES, False))
        if len(given) > 1:
            raise ValueError(f"{min(given)}: expected only one of {sorted(given)}")
        inputs = dict(zip(self._positional, args, strict=False)) | kwargs
        shape = rows.input_shape(inputs)
        if "adapter_names" in given:
            setups, numbers = rows.row_numbers(given["adapter_names"], shape)
            lowered = self.model_adapters.kept(self._setups(setups))
        elif "adapter_ids" in given:
            lowered = self._routed_setups()
            numbers = rows.checked_numbers(
                given["adapter_ids"], len(lowered.setups), "adapter_ids", shape
            )
        else:
            self._setups(None)
            lowered, numbers = self.model_adapters.current(), None
        past = _cached_tokens(inputs, lowered.setups)
        if numbers is not None:
            rows.check_sizes(lowered.needed, shape, past)
            return lowered, {"row_setups": lowered.setups, "row_numbers": numbers, "past": past}
        (setup,) = lowered.setups
        if has_copies and setup is not None and shape is not None:
            shape = rows.channel_shape(shape, setup.parallel_channels, _HAS_COPIES)
        rows.check_sizes(lowered.needed, shape, past)
        numbers = rows.task_numbers(setup, given.get("task_ids"), shape)
        own = {"setup": setup, "row_numbers": numbers, "past": past, "has_copies": has_copies}
        return lowered, own

    def _prepare_model_inputs(self, *args: Any, **kwargs: Any) -> tuple:
        """What generate() starts with: under a Parallel each channel's own copy of the batch."""
        inputs, name, model_kwargs = super()._prepare_model_inputs(*args, **kwargs)
        (setup,) = self._setups(None)
        has_rows = any(model_kwargs.get(argument) is not None for argument in _ROW_ARGUMENTS[:2])
        channels = 1 if setup is None or has_rows else setup.parallel_channels
        if channels > 1:
            copied = {k: v for k, v in model_kwargs.items() if k != "task_ids"}
            for key, value in copied.items():
                if isinstance(value, Tensor) and value.dim() > 0:
                    model_kwargs[key] = value.repeat(channels, *[1] * (value.dim() - 1))
            inputs = inputs.repeat(channels, *[1] * (inputs.dim() - 1))
            model_kwargs[_HAS_COPIES] = True
        return inputs, name, model_kwargs

    def _routed_setups(self) -> Lowered:
        self._check_context()
        if not self.model_adapters.routed.setups:
            raise ValueError("adapter_ids: expected numbers of model.routing(...); got some before")
        if self.model_adapters.is_routed_stale and torch.compiler.is_compiling():
            raise ValueError(
                "adapter_ids: adapters have changed; call model.routing([]) before a compiled model"
            )
        try:
            return self.model_adapters.current_routed()
        except ValueError as error:
            raise ValueError(f"adapter_ids: {error}") from None

    def routing(self, setups: Sequence[Any]) -> Tensor:
        """Numbers for the rows' setups: `model(**inputs, adapter_ids=ids)` then needs no names.

        Semantics::

            model(**inputs, adapter_ids=model.routing(setups))
            model(**inputs, adapter_names=setups)               # the same

        Args:
            setups: one entry for each row: a name, a block, or "__base__" for no adapters.

        Returns:
            [B], int64, on the model's device. A setup keeps its number; the model remembers all
            that it was asked for. On a GPU and in compiled graphs, where nobody looks at the
            numbers, the temperatures of all these setups' fusions fall in a training step, not only
            of those that rows use.

        Raises:
            ValueError: unknown adapters or fusions, a block over rows, or one of the setups that it
                was asked for names an adapter or fusion that has gone: see `reset_routing`.
        """
        if isinstance(setups, str) or not isinstance(setups, Sequence):
            raise ValueError(f"setups: expected a list with one entry a row; got {setups!r}")
        parsed = [rows.parse_row(setup, "setups") for setup in setups]
        for setup in parsed:
            self.model_adapters.check_setup(setup)
        numbers = self.model_adapters.route(parsed)
        return torch.tensor(numbers, dtype=torch.int64, device=self.base_model.device)

    def reset_routing(self) -> None:
        """Forget the setups that `routing` numbered: the next ones are numbered from 0 again.

        Numbers from before must not be used any more.
        """
        self.model_adapters.reset_routed()

    def _setups(
        self, row_setups: Sequence[AdapterCompositionBlock | None] | None
    ) -> Sequence[AdapterCompositionBlock | None]:
        """The setups of the current forward: those of the rows, of a context, or the active one."""
        context = AdapterSetup.get_context()
        if row_setups is None and context is None:
            return (self.active_adapters,)
        self._check_context()
        setups = (context.adapter_setup,) if row_setups is None else row_setups
        for setup in setups:
            self.model_adapters.check_setup(setup)
        return setups

    def _check_context(self) -> None:
        context = AdapterSetup.get_context()
        if context is not None and context.skip_layers is not None:
            self.model_adapters.checked_layers(context.skip_layers)

    def _cooling_fusions(
        self, setups: Sequence[AdapterCompositionBlock | None], own: Mapping[str, Any]
    ) -> list[AdapterFusion]:
        """The modules of the fusions whose temperature falls in this forward.

        Args:
            setups: that it runs.
            own: what its rows have; of setups for each row, or of a MultiTask's children, those
                that no row has do not count, where the rows' numbers can be looked at.
        """
        if not any(config["temperature"] for config in self.adapters_config.fusions.values()):
            return []
        setup, numbers = own.get("setup"), own["row_numbers"]
        # a MultiTask inside a Stack has no Fuse
        choices = setup if isinstance(setup, MultiTask) else own.get("row_setups")
        if choices is not None and rows.can_look_at(numbers):
            setups = [choices[number] for number in numbers.unique().tolist()]
        names = {fuse.name for setup in setups for fuse in fuses(setup)}
        return [
            module
            for name in sorted(names)
            if self.adapters_config.fusions[name]["temperature"]
            for _, module in self.model_adapters.fusion_modules(name)
        ]


def _cached_tokens(
    inputs: Mapping[str, Any], setups: Sequence[AdapterCompositionBlock | None]
) -> int:
    """Tokens before a forward's own in its key-value cache; where no Split counts tokens, 0."""
    if not any(isinstance(block, Split) for setup in setups for block in blocks(setup)):
        return 0
    cache = inputs.get("past_key_values")
    if cache is None:
        return 0
    if isinstance(cache, tuple):
        # keys [B, heads, S, d] first in each layer's entry; transformers 4 still takes these
        return cache[0][0].shape[2] if cache else 0
    return int(cache.get_seq_length())


def with_adapter_arguments(forward: Callable) -> Callable:
    """A forward whose signature names what it takes for its adapters.

    generate() and Trainer look there for the arguments that they may pass on: a Trainer takes all
    other columns out of its data.
    """
    signature = inspect.signature(forward)
    *parameters, last = signature.parameters.values()
    own = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
        for name in (*_ROW_ARGUMENTS, *ForwardContext.ARGUMENTS)
    ]
    is_open = last.kind is inspect.Parameter.VAR_KEYWORD
    parameters += [*own, last] if is_open else [last, *own]
    forward.__signature__ = signature.replace(parameters=parameters)
    return forward


@functools.cache
def _patched_class(original: type) -> type:
    """The subclass that a patched instance becomes one of; it keeps the name for saved configs."""

    @with_adapter_arguments
    @functools.wraps(original.forward)
    def forward(self, *args, **kwargs):
        return self._forward_with_adapters(super(patched, self).forward, args, kwargs)

    members = {"forward": forward, "__module__": original.__module__, "__doc__": original.__doc__}
    _, *positional = (
        p.name
        for p in inspect.signature(original.forward).parameters.values()
        if p.kind is p.POSITIONAL_OR_KEYWORD
    )
    members |= {"__wrapped_class__": original, "_positional": tuple(positional)}
    patched = type(original.__name__, (ModelAdaptersMixin, original), members)
    patched.__qualname__ = original.__qualname__
    return patched


def _uncompiled(model: Any) -> Any:
    """The model that `torch.compile` wrapped, or the model itself."""
    return getattr(model, "_modules", {}).get("_orig_mod", model)


def _is_patched(model: Any) -> bool:
    return "model_adapters" in getattr(model, "__dict__", {})


def init(model: nn.Module, backend: str | None = None) -> None:
    """Let a transformers model carry adapters, in place.

    Only this instance changes: its places of adapters get forwards of their own and it gains the
    methods of `ModelAdaptersMixin`. Its parameters and their names stay. A second call is harmless.

    Args:
        model: a transformers model of a supported architecture, with or without a head, before
            `torch.compile`.
        backend: what runs the adapters: "reference" (the literal formulas), "torch", "cpp",
            "triton", or None to choose by device, dtype and shape.

    Raises:
        TypeError: not a transformers model, or one that `torch.compile` made.
        ValueError: an architecture or backend that is not supported, or a model that another
            library patched.
    """
    backends.check_name(backend)
    if _is_patched(_uncompiled(model)):
        if backend is not None:
            model.set_backend(backend)
        return
    if _uncompiled(model) is not model:
        raise TypeError(
            "model: expected a transformers model; got a compiled one. Call "
            "fastfusion.init(model) before torch.compile(model)"
        )
    config = getattr(model, "config", None)
    if not isinstance(model, nn.Module) or not hasattr(config, "model_type"):
        raise TypeError(f"model: expected a transformers model; got {type(model).__name__}")
    architecture = architecture_of(config.model_type)
    model.model_adapters = ModelAdapters(model.base_model, architecture, backend)
    if not isinstance(model, ModelAdaptersMixin):
        model.__class__ = _patched_class(type(model))
    if model.base_model is not model:
        model.base_model.gradient_checkpointing_enable = model.gradient_checkpointing_enable
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            # enabled before, in whatever way
            function = module._gradient_checkpointing_func
            module._gradient_checkpointing_func = functools.partial(
                function,
                use_reentrant=False,
                context_fn=model._context_fn(getattr(function, "keywords", {})),
            )


def restore(model: nn.Module) -> None:
    """Undo `init`: the model as it was, without adapters, bit for bit.

    The training mode stays as it is.

    Args:
        model: a model that `init` patched, compiled or not.

    Raises:
        ValueError: the model was not patched by `init`.
    """
    model = _uncompiled(model)
    if not _is_patched(model):
        raise ValueError("model: expected a model that fastfusion.init patched")
    if "__wrapped_class__" not in type(model).__dict__:
        raise ValueError(
            f"model: {type(model).__name__} has adapters by its class; take model.base_model"
        )
    state = model.model_adapters
    model.__class__ = type(model).__wrapped_class__
    del model.model_adapters
    unpatch(state.done)
    vars(model.base_model).pop("gradient_checkpointing_enable", None)
    for module, before in state.checkpointing:
        for name in CHECKPOINTING:
            vars(module).pop(name, None)
        vars(module).update(before)
    for name, parameter in model.base_model.named_parameters():
        # parameters that came after init keep what they have
        parameter.requires_grad = state.requires_grad.get(name, parameter.requires_grad)


def refresh(model: nn.Module) -> None:
    """Drop the packed weights: after writes to parameters that leave no trace (`.data`).

    Args:
        model: a patched model, compiled or not.

    Raises:
        ValueError: the model carries no adapters.
    """
    model = _uncompiled(model)
    if not _is_patched(model):
        raise ValueError("model: expected a model with adapters (see fastfusion.init)")
    for layer in model.model_adapters.layers:
        layer.packs.drop()
