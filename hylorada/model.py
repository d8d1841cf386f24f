"""HyLoRADAModel: takes a base model and a config, adapts the base model's linear layers, merges them, saves them."""

import logging
import os
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, cast

from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from hylorada_kernels.layer_cache import refresh
from hylorada_kernels.nn import HybridLinear

from . import hub, storage
from .components import COMPONENTS, BaseComponent, Component, groups_of
from .config import DEFAULT_TARGET_MODULES, SWITCHES, HyLoRADAConfig
from .daa import DirectAttention
from .embeddings import is_norm, norm_parameters, tied_names
from .estimate import memory_estimate
from .landmark import LandmarkLoRA
from .lora import (
    PARAMETER_NAMES,
    UnifiedLayer,
    adapted_layers,
    adapter_parameters,
    find_targets,
    merge_layers,
    replace_modules,
)
from .position import PositionBias

logger = logging.getLogger(__name__)

# the parts of the method, as get_component_status names them: the option that switches each on, and its parameters
_PARTS = {
    "lora": ("lora_rank", ("lora_a", "lora_b")),
    "dora": ("use_dora_magnitude", ("magnitude",)),
    "blend": ("use_blend", ("residual_weight",)),
    "position_bias": ("position_bias_enabled", ("position_bias",)),
    "s2_attention": ("s2_attn_enabled", ()),
    "daa": ("daa_enabled", ("daa",)),
    "landmark": ("landmark_enabled", ("landmark",)),
    "rope_scaling": ("rope_scaling_type", ()),
    "embeddings": ("train_embeddings", ("embeddings",)),
    "norms": ("train_norms", ("norms",)),
}
# what acts beside all weights, in a merged model too, by the field that switches it on
RUNTIME_PARTS = {
    "position_bias_enabled": "the position bias",
    "landmark_enabled": "the landmarks",
    "daa_enabled": "Direct Attention Adaptation",
    "s2_attn_enabled": "shifted sparse attention",
}
# PEFT's names of an adapter's parts
_PEFT_KINDS = {
    "lora_A": "lora_a",
    "lora_B": "lora_b",
    "lora_magnitude_vector": "magnitude",
    "hylorada_A": "lora_a",
    "hylorada_B": "lora_b",
    "hylorada_lora_magnitude_vector": "magnitude",
    "hylorada_lora_magnitude_vector_blend": "residual_weight",
}
_LORA_OPTIONS = ("lora_alpha", "lora_dropout", "lora_target_modules", "use_rslora", "lora_init")
_LOAD = """from huggingface_hub import snapshot_download

from hylorada import HyLoRADAModel

model = HyLoRADAModel.from_pretrained({base}, snapshot_download("{repo_id}"))"""
COMPONENT_KINDS = tuple(component.kind for component in COMPONENTS)
_OTHER_BASE_OF_A_MERGED_MODEL = "pass base_model=None, or a base of the same architecture"
_FOREIGN_FULL_MODEL = "the full model beside the adapter is not the one that was saved with it; save or copy it again"


class HyLoRADAModel(nn.Module):
    """A base model whose linear layers are adapted in place and whose own parameters are frozen.

    It computes what the base model computes until it is trained; with s2_attn_enabled in evaluation and generation
    only, for in train mode the attention is sparse. It starts in the base model's train or eval mode. Attributes and
    methods that it does not have are the base model's.

        model = HyLoRADAModel(base_model, HyLoRADAConfig(lora_rank=8))

    Args:
        base_model: a transformers PreTrainedModel. It is changed; where an error is raised it is left as it was.
        config: what to adapt and how; None takes the defaults.

    Attributes:
        base_model: the base model with its adapted layers.   config: the base model's own config.
        hylorada_config: the HyLoRADAConfig.   position_bias: the PositionBias, or None.   daa: the DirectAttention, or
        None.   landmark: the LandmarkLoRA, or None.
        merged: whether the updates are in the base weights.

    Raises:
        TypeError, ValueError: a model or config that does not fit.
    """

    base_model: PreTrainedModel
    hylorada_config: HyLoRADAConfig
    position_bias: PositionBias | None
    daa: DirectAttention | None
    landmark: LandmarkLoRA | None
    merged: bool
    _components: list[Component]
    _unmerged: dict[str, UnifiedLayer]
    _base_fingerprint: dict[str, Any]

    def __init__(self, base_model: PreTrainedModel, config: HyLoRADAConfig | None = None):
        super().__init__()
        self._assemble(base_model, HyLoRADAConfig() if config is None else config)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The base model's forward: the same arguments by name, the same output."""
        given = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "labels": labels,
        }
        kwargs |= {name: value for name, value in given.items() if value is not None}
        if self.training and hasattr(self.config, "use_cache"):
            # checkpointed layers drop the cache, and beside one transformers does not see packed documents
            kwargs.setdefault("use_cache", False)
        refresh(self.base_model)
        return self.base_model(**kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's generate."""
        with ExitStack() as stack:
            for component in self._components:
                stack.enter_context(component.generating())
            return cast(Any, self.base_model).generate(*args, **kwargs)

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """The adapter's parameters by the names that they have in a file; while merged, those that still act."""
        return adapter_parameters(adapted_layers(self.base_model)) | _component_parameters(self._components)

    def added_parameters(self) -> dict[str, nn.Parameter]:
        """The adapter's parameters that the base model does not have: all but its own embeddings and norms."""
        return _without_base(self.adapter_parameters())

    def count_params(self) -> dict[str, int]:
        """Numbers of parameters: "total", "trainable" and the adapter's, by kind."""
        own = self.adapter_parameters()
        counts = {
            "total": sum(parameter.numel() for parameter in self.parameters()),
            "trainable": sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad),
        }
        for kind in (*PARAMETER_NAMES, *COMPONENT_KINDS):
            counts[kind] = sum(parameter.numel() for name, parameter in own.items() if _kind(name) == kind)
        return counts

    def print_trainable_params(self) -> None:
        """Print for example "Trainable params: 811K / 125M (0.65%)"."""
        counts = self.count_params()
        share = counts["trainable"] / counts["total"]
        print(f"Trainable params: {_readable(counts['trainable'])} / {_readable(counts['total'])} ({share:.2%})")

    def get_component_status(self) -> dict[str, dict[str, Any]]:
        """What every part of the method does in this model, by its name ("lora", "dora", "position_bias", ...).

        state: "on"; "off"; "merged" into the base weights; or "training": on in train mode only, where shifted
            sparse attention evaluates with full attention.
        parameters: how many numbers of the part are trained.   options: its fields of the config.
        details: what the config does not say. Of "rope_scaling": method ("linear", "dynamic" or "yarn", of a learned
            position table "tile" or "interpolate"), original_length, target_length. Of "embeddings": tied, for the
            trained weights their other names in the model, such as the output head's.
        """
        config, counts = self.hylorada_config, self.count_params()
        norms = norm_parameters(self.base_model) if config.train_norms else {}
        own = self.adapter_parameters()
        counts["norms"] = sum(parameter.numel() for name, parameter in own.items() if name in norms)
        counts["embeddings"] = counts["base"] - counts["norms"]
        status: dict[str, dict[str, Any]] = {}
        for part, (switch, kinds) in _PARTS.items():
            options = [switch, *(option for option, of in SWITCHES.items() if of == switch)]
            is_on = bool(getattr(config, switch)) and not (part == "blend" and not config.use_dora_magnitude)
            state = "on" if is_on else "off"
            if is_on and self.merged and part in ("lora", "dora", "blend"):
                state = "merged"
            elif part == "s2_attention" and is_on and not config.s2_eval:
                state = "training"
            status[part] = {
                "state": state,
                "parameters": sum(counts[kind] for kind in kinds),
                "options": {option: getattr(config, option) for option in options},
                "details": {},
            }
        embeddings = {name: own[name] for name in own if _kind(name) == "base" and name not in norms}
        if embeddings:
            status["embeddings"]["details"] = {"tied": tied_names(self.base_model, embeddings)}
        for component in self._components:
            if isinstance(component, BaseComponent):
                status["rope_scaling"]["details"] = dict(component.length)
        status["lora"]["options"] |= {option: getattr(config, option) for option in _LORA_OPTIONS}
        return status

    def get_memory_estimate(self, seq_len: int, batch_size: int = 1) -> dict[str, float]:
        """What a training step on (batch_size, seq_len) tokens needs; see `memory_estimate` for the numbers."""
        config, adapter = self.hylorada_config, list(self.added_parameters().values())
        return memory_estimate(self, adapter, groups_of(config), config.mixed_precision, seq_len, batch_size)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """Switch on the base model's gradient checkpointing, non-reentrant unless {"use_reentrant": True} is given."""
        options = {"use_reentrant": False} | (gradient_checkpointing_kwargs or {})
        enable_checkpointing(self.base_model, options)

    def gradient_checkpointing_disable(self) -> None:
        """Switch off the base model's gradient checkpointing."""
        disable = getattr(self.base_model, "activation_checkpointing_disable", None)
        (disable or self.base_model.gradient_checkpointing_disable)()
        self.base_model.disable_input_require_grads()

    def merge_lora_weights(self, keep_base: bool = True) -> None:
        """Put the updates into the base weights: the adapted layers become plain linear layers again.

        A position bias stays, as a scale on their inputs, and so does what acts in the attention. Merging twice changes
        nothing.

        Args:
            keep_base: keep the original weights on the CPU for unmerge_lora_weights; False frees them and the updates.

        Raises:
            RuntimeError: a position bias of the low-rank part, or a weight that several layers share, cannot be merged.
        """
        if not self.merged:
            for component in self._components:
                component.check_mergeable()
            layers = adapted_layers(self.base_model)
            merge_layers(self.base_model, layers, keep_base)
            linears: dict[nn.Module, nn.Module] = {layer: layer.to_linear() for layer in layers.values()}
            replace_modules(self.base_model, linears)
            for component in self._components:
                component.after_merge(list(linears.values()))
            self._unmerged, self.merged = layers, True
        if not keep_base:
            self._unmerged = {}

    def unmerge_lora_weights(self) -> None:
        """Take the updates out of the base weights again; these are then what they were, bit for bit."""
        if not self.merged:
            return
        if not self._unmerged:
            raise RuntimeError(
                "the original weights are gone: the model was merged with keep_base=False, or loaded from the folder "
                "of a merged model; load the base model and its adapter again"
            )
        layers: dict[nn.Module, nn.Module] = {}
        for name, layer in self._unmerged.items():
            linear = self.base_model.get_submodule(name)
            # the model may have been moved, or put into another mode, since the merge
            layer.weight, layer.bias = linear.get_parameter("weight"), cast(Any, linear).bias
            layer.to(layer.weight.device).train(linear.training)
            layer.unmerge()
            layers[linear] = layer
        replace_modules(self.base_model, layers)
        self._unmerged, self.merged = {}, False

    def save_pretrained(self, directory: str | os.PathLike) -> None:
        """Save the adapter, adapter.safetensors with hylorada_config.json, and after a merge the full model beside it.

        transformers can load the full model too, but not the parts that no weight can hold, such as the position bias,
        which are in adapter.safetensors. Old files are replaced when all new ones are written; if that fails they stay.
        A merged model saved here before goes away.
        """
        self._warn_of_unsaved()
        adapter = storage.SavedAdapter(
            config=self.hylorada_config.to_dict(),
            merged=self.merged,
            base_model=getattr(self.config, "_name_or_path", None) or "",
            base_fingerprint=(
                storage.fingerprint(_base_parameters(self.base_model)) if self.merged else self._base_fingerprint
            ),
            tensors=self.added_parameters() if self.merged else self.adapter_parameters(),
        )
        with storage.replacing_files(directory, self._obsolete_files(directory)) as folder:
            if self.merged:
                self.base_model.save_pretrained(folder)
            storage.write_adapter(folder, adapter)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        revision: str | None = None,
        commit_message: str = "Upload a HyLoRADA model",
    ) -> str:
        """Upload what `save_pretrained` writes, with a model card, to a model hub. -> the commit's address.

        Args:
            repo_id: "name" or "owner/name"; the repository is made where it does not exist.
            private: of a new repository; None takes the owner's default.   token: None takes that of the login.
            revision: a branch; None takes the main one.   commit_message: of the commit.

        Raises:
            ValueError: no repository's name.   OSError: the hub could not be reached, or it refused.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            base_model = getattr(self.config, "_name_or_path", None) or ""
            hub.write_card(
                folder,
                kind="HyLoRADA model, merged" if self.merged else "HyLoRADA adapter",
                base_model=base_model,
                facts=self.card_facts(),
                load=_LOAD.format(base=None if self.merged or base_model else "base_model", repo_id=repo_id),
                library="hylorada",
            )
            options: dict[str, Any] = {"private": private, "token": token, "revision": revision}
            return hub.upload(folder, repo_id, commit_message=commit_message, **options)

    def card_facts(self) -> dict[str, Any]:
        """What a model card says of the adapter: method, rank, adapted layers and numbers of parameters."""
        config, status = self.hylorada_config, self.get_component_status()
        parts = [part for part, found in status.items() if found["state"] != "off"]
        scale = "alpha / sqrt(rank)" if config.use_rslora else "alpha / rank"
        return {
            "Method": ", ".join(parts),
            "Rank": config.lora_rank,
            "Alpha": f"{config.lora_alpha:g}, scale {scale}",
            "Target modules": ", ".join(f"`{name}`" for name in config.lora_target_modules),
            "Adapter's parameters": sum(found["parameters"] for found in status.values()),
        }

    @classmethod
    def from_pretrained(
        cls,
        base_model: PreTrainedModel | str | os.PathLike | None,
        directory: str | os.PathLike,
        *,
        strict_base: bool = True,
    ) -> "HyLoRADAModel":
        """Load what `save_pretrained` saved: the model that comes back computes what the saved one computed.

        Args:
            base_model: the base model, which is changed; its name or path; or None for the one that the adapter names.
                In the folder of a merged model None takes the full model, and a given base model gets its weights.
            directory: the folder.
            strict_base: refuse a base model whose parameters have other names, shapes or (in samples) norms of rows.
                With the folder of a merged model names and shapes must fit in any case, and norms need not.

        Raises:
            FileNotFoundError: no adapter there.
            ValueError: the adapter is damaged, foreign or of a newer format, or the base model is another one.
        """
        saved = storage.read_adapter(directory)
        config = HyLoRADAConfig.from_dict(saved.config)
        full_model = None
        if saved.merged:
            full_model = _load_full_model(directory, base_model)
            given = isinstance(base_model, PreTrainedModel)
            advice = _OTHER_BASE_OF_A_MERGED_MODEL if given else _FOREIGN_FULL_MODEL
            storage.check_base(saved.base_fingerprint, _base_parameters(full_model), advice)
            storage.check_full_model(directory)
        model = cls.__new__(cls)
        nn.Module.__init__(model)
        model._assemble(_load_base(base_model, full_model, saved.base_model), config, saved, strict_base)
        if full_model is not None and base_model is not None:
            model.base_model.load_state_dict(full_model.state_dict())
        return model

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model" or name.startswith("__"):
                raise
            return getattr(self.base_model, name)

    def _assemble(
        self,
        base_model: PreTrainedModel,
        config: HyLoRADAConfig,
        saved: storage.SavedAdapter | None = None,
        strict_base: bool = True,
    ) -> None:
        """Build every part, fill it with a saved adapter's values, and only then put it into the base model."""
        targets = _check(base_model, config)
        built = [component.build(base_model, targets, config) for component in COMPONENTS]
        components = [component for component in built if component is not None]
        is_merged = saved is not None and saved.merged
        if saved is not None and is_merged:
            # the weights are about to be replaced
            fingerprint = saved.base_fingerprint | {"row_norms": {}}
            present: dict[str, Tensor] = _base_parameters(base_model)
            for component in components:
                present |= component.base_parameters()
            storage.check_base(fingerprint, present, _OTHER_BASE_OF_A_MERGED_MODEL)
        elif saved is not None and strict_base:
            storage.check_base(saved.base_fingerprint, _base_parameters(base_model))
        was_trainable = [parameter for parameter in base_model.parameters() if parameter.requires_grad]
        try:
            base_model.requires_grad_(False)
            layers = {} if is_merged else {name: _build_layer(linear, config) for name, linear in targets.items()}
            if saved is not None:
                own = adapter_parameters(layers) | _component_parameters(components)
                _fill(_without_base(own) if is_merged else own, saved.tensors)
            if config.gradient_checkpointing and base_model.supports_gradient_checkpointing:
                enable_checkpointing(base_model, {"use_reentrant": False})
        except BaseException:
            for parameter in was_trainable:
                parameter.requires_grad_(True)
            raise

        self.base_model = base_model
        # of the base as it was given: components may change it
        self._base_fingerprint = storage.fingerprint(_base_parameters(base_model))
        self.hylorada_config = config
        self._unmerged = {}
        self.merged = is_merged
        # not by train(), which would reach into the base model
        self.training = base_model.training
        self._components = components
        for kind in COMPONENT_KINDS:
            setattr(self, kind, None)
        for component in components:
            setattr(self, component.kind, component.module and component.module.train(base_model.training))
            component.attach(base_model, layers)
            if is_merged:
                component.after_merge(list(targets.values()))
        replace_modules(base_model, {targets[name]: layer for name, layer in layers.items()})

    def _obsolete_files(self, directory: str | os.PathLike) -> tuple[str, ...]:
        if self.merged:
            return storage.FULL_MODEL_FILES
        name = getattr(self.config, "_name_or_path", None) or ""
        # a merged model that was loaded from here and adapted anew is this adapter's base
        is_base = name != "" and os.path.realpath(name) == os.path.realpath(directory)
        if is_base or not storage.holds_merged_model(directory):
            return ()
        return (*storage.FULL_MODEL_FILES, *storage.FULL_MODEL_CONFIGS)

    def _warn_of_unsaved(self) -> None:
        own = set(self.adapter_parameters().values())
        unsaved = [
            name for name, parameter in self.named_parameters() if parameter.requires_grad and parameter not in own
        ]
        if unsaved and not self.merged:
            logger.warning(
                "an adapter does not hold these trainable parameters of the base model: %s", ", ".join(unsaved)
            )


def get_lora_plus_param_groups(
    model: nn.Module,
    lr_lora: float = 2e-4,
    lr_magnitude: float = 1e-3,
    lr_position: float = 5e-4,
    lr_attention: float = 5e-4,
    lr_landmark: float = 5e-4,
    weight_decay: float = 0.0,
    lora_plus_ratio: float = 1.0,
) -> list[dict[str, Any]]:
    """An optimizer's parameter groups, one for each kind of trainable parameter.

    Args:
        model: a HyLoRADAModel, a wrapper of one, or PEFT's model of LoRA, DoRA or HyLoRADA.
        lr_lora: of A and B, and of trainable parameters of the base model.   lr_magnitude: of magnitudes and blends.
        lr_position: of the position bias.   lr_attention: of Direct Attention Adaptation.
        lr_landmark: of the landmarks.
        weight_decay: of A, B and the base model's matrices; none for magnitudes, gates and tables, whose neutral value
            is not 0, nor for the base model's norms, biases and embeddings ("base_undecayed").
        lora_plus_ratio: the learning rate of B over that of A (LoRA+; Hayou et al. 2024).
    """
    decayed = {"lora_a": lr_lora, "lora_b": lr_lora * lora_plus_ratio, "base": lr_lora}
    rates = decayed | {
        "base_undecayed": lr_lora,
        "magnitude": lr_magnitude,
        "residual_weight": lr_magnitude,
        "position_bias": lr_position,
        "daa": lr_attention,
        "landmark": lr_landmark,
    }
    members: dict[str, list[nn.Parameter]] = {kind: [] for kind in rates}
    undecayed = _undecayed(model)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind = _kind(_adapter_part(name))
            members["base_undecayed" if kind == "base" and parameter in undecayed else kind].append(parameter)
    if not any(members.values()):
        raise ValueError(f"{type(model).__name__} has no trainable parameters; give a HyLoRADAModel that is not merged")
    return [
        {"name": kind, "params": members[kind], "lr": rate, "weight_decay": weight_decay if kind in decayed else 0.0}
        for kind, rate in rates.items()
        if members[kind]
    ]


def _undecayed(model: nn.Module) -> set[nn.Parameter]:
    """Norms, embeddings (a tied head too) and biases."""
    shared = [module for module in model.modules() if isinstance(module, nn.Embedding) or is_norm(module)]
    parameters = {parameter for module in shared for parameter in module.parameters(recurse=False)}
    return parameters | {parameter for parameter in model.parameters() if parameter.dim() < 2}


def _adapter_part(name: str) -> str:
    """A parameter's name, or the part that it is of an adapter of PEFT's."""
    kinds = [_PEFT_KINDS[part] for part in name.split(".") if part in _PEFT_KINDS]
    return kinds[0] if kinds else name


def _check(base_model: PreTrainedModel, config: HyLoRADAConfig) -> dict[str, nn.Module]:
    """Everything that can be known before the base model is touched. -> the layers to adapt."""
    if not isinstance(config, HyLoRADAConfig):
        raise TypeError(
            f"config must be a HyLoRADAConfig, got {type(config).__name__}; HyLoRADAConfig.from_dict takes a dict"
        )
    if isinstance(base_model, nn.Module) and any(
        isinstance(module, HybridLinear) or any(component.is_attached(module) for component in COMPONENTS)
        for module in base_model.modules()
    ):
        raise ValueError(f"{type(base_model).__name__} is adapted already; load the base model again to adapt it anew")
    if not isinstance(base_model, PreTrainedModel):
        raise TypeError(f"base_model must be a transformers PreTrainedModel, got {type(base_model).__name__}")
    for option, switch in config.idle_options().items():
        logger.warning(
            "%s=%r does nothing while %s is %r", option, getattr(config, option), switch, getattr(config, switch)
        )
    if config.gradient_checkpointing and not base_model.supports_gradient_checkpointing:
        logger.warning(
            "gradient_checkpointing=True does nothing: %s does not support gradient checkpointing",
            type(base_model).__name__,
        )
    is_default = config.lora_target_modules == DEFAULT_TARGET_MODULES
    return find_targets(base_model, config.lora_target_modules, warn_unmatched=not is_default)


def _build_layer(linear: nn.Module, config: HyLoRADAConfig) -> UnifiedLayer:
    layer = UnifiedLayer.from_linear(
        linear,
        config.lora_rank,
        config.lora_alpha,
        dropout=config.lora_dropout,
        use_rslora=config.use_rslora,
        use_magnitude=config.use_dora_magnitude,
        use_blend=config.use_blend,
        init=config.lora_init,
        norm_grad=config.dora_norm_grad,
        token_scale_target=config.position_bias_target,
        keep_scaled_weight=config.keep_scaled_weight,
    )
    return cast(UnifiedLayer, layer.train(linear.training))


def _component_parameters(components: list[Component]) -> dict[str, nn.Parameter]:
    return {name: parameter for component in components for name, parameter in component.parameters().items()}


def _without_base(parameters: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Those that were added to the base model. Its own that are trained are in the full model of a merge too."""
    return {name: parameter for name, parameter in parameters.items() if _kind(name) != "base"}


def _fill(parameters: dict[str, nn.Parameter], tensors: Mapping[str, Tensor]) -> None:
    storage.check_tensors(tensors, parameters)
    for name, parameter in parameters.items():
        parameter.data = tensors[name].to(parameter.device)


def enable_checkpointing(base_model: PreTrainedModel, options: dict[str, Any]) -> None:
    """Switch on a base model's gradient checkpointing, as its own options say."""
    # transformers makes the embeddings' output require a gradient, which only reentrant checkpointing needs: elsewhere
    # it costs a backward through the first layer's frozen weights, and its hook is a closure that cannot be pickled
    base_model.disable_input_require_grads()
    # the older releases of transformers 5 know the other name only
    enable = getattr(base_model, "activation_checkpointing_enable", None) or base_model.gradient_checkpointing_enable
    enable(options)
    base_model.disable_input_require_grads()
    if options["use_reentrant"]:
        base_model.enable_input_require_grads()


def _base_parameters(base_model: nn.Module) -> dict[str, Tensor]:
    own = set(adapter_parameters(adapted_layers(base_model)).values())
    parameters = base_model.named_parameters(remove_duplicate=False)
    return {name: parameter for name, parameter in parameters if parameter not in own}


def _load_base(
    base_model: PreTrainedModel | str | os.PathLike | None, full_model: PreTrainedModel | None, name: str
) -> PreTrainedModel:
    if base_model is None and full_model is not None:
        return full_model
    if base_model is None and not name:
        raise ValueError("the adapter does not name its base model; pass base_model")
    if base_model is None:
        base_model = name
    if isinstance(base_model, (str, os.PathLike)):
        return AutoModelForCausalLM.from_pretrained(base_model, dtype="auto")
    return base_model


def _load_full_model(directory: str | os.PathLike, like: Any) -> PreTrainedModel:
    model_class = type(like) if isinstance(like, PreTrainedModel) else AutoModelForCausalLM
    try:
        return model_class.from_pretrained(directory, dtype="auto")
    except SafetensorError as error:
        raise ValueError(f"the merged model in {directory} is damaged: {error}; save or copy it again") from error


def _kind(name: str) -> str:
    parent, _, leaf = name.rpartition(".")
    if parent.rpartition(".")[2] in COMPONENT_KINDS:
        return parent.rpartition(".")[2]
    return leaf if leaf in PARAMETER_NAMES else "base"


def _readable(count: int) -> str:
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if count >= 0.9995 * size:
            return f"{count / size:.3g}{unit}"
    return str(count)
