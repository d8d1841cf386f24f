"""The parts of the method beside the adapted linears: how a config asks for them and how a model carries them."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

from torch import nn
from transformers import PreTrainedModel

from .config import LANDMARK_POSITION_BUCKETS, HyLoRADAConfig
from .daa import DirectAttention
from .embeddings import embedding_parameters, norm_parameters
from .landmark import LandmarkHook, LandmarkLoRA, check_gate, find_head_input, has_landmarks
from .lora import UnifiedLayer
from .position import PositionBias, PositionScale, find_backbone, has_position_scale
from .position_table import PositionTable, find_position_table
from .rope import RopeScaling, find_rotary_modules
from .s2_attention import AttentionSwitch, Groups, attention_layers, has_attention_switch


class Component:
    """One part of one model.

    `build` checks everything and changes nothing; then saved values are loaded into `module`; `attach` puts the part
    into the base model and does not fail. What it needs to run must survive deepcopy and pickle with the model.

    Attributes:
        kind: the model's attribute that holds `module`, and the name of its parameters in files, counts and groups.
        module: the part's own parameters, or None.
    """

    kind: ClassVar[str]
    module: nn.Module | None = None

    @classmethod
    def build(
        cls, base_model: PreTrainedModel, targets: dict[str, nn.Module], config: HyLoRADAConfig
    ) -> "Component | None":
        """The part, or None where the config leaves it out. targets: the linears that are adapted, by name."""
        raise NotImplementedError

    @staticmethod
    def is_attached(module: nn.Module) -> bool:
        """Whether a module of a base model carries this kind of part already."""
        return False

    def parameters(self) -> dict[str, nn.Parameter]:
        """What is trained and saved, by the names in a file."""
        return {} if self.module is None else dict(self.module.named_parameters(prefix=self.kind))

    def base_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters of the base model that `attach` gives other values or shapes, by their names there."""
        return {}

    def attach(self, base_model: PreTrainedModel, layers: dict[str, UnifiedLayer]) -> None:
        """Act from now on. layers: the adapted linears, which may not stand in the base model yet; none if merged."""

    def check_mergeable(self) -> None:
        """RuntimeError where the part cannot act beside merged layers."""

    def after_merge(self, linears: list[nn.Module]) -> None:
        """Act on plain linears, which took the places of the adapted ones."""

    def generating(self) -> AbstractContextManager[None]:
        """The context of the base model's generate."""
        return nullcontext()


class PositionComponent(Component):
    """A PositionBias, which scales the output of every adapted linear."""

    kind = "position_bias"

    def __init__(self, bias: PositionBias, targets: dict[str, nn.Module], target: str):
        self.module, self._targets, self._target = bias, set(targets.values()), target

    @classmethod
    def build(cls, base_model, targets, config):
        if not config.position_bias_enabled:
            return None
        if getattr(base_model.config, "is_encoder_decoder", False):
            raise ValueError(
                "position bias needs one sequence of positions, not an encoder's and a decoder's; "
                "set position_bias_enabled=False"
            )
        head = base_model.get_output_embeddings()
        heads = [name for name, linear in targets.items() if linear is head]
        if heads:
            raise ValueError(
                f"position bias cannot scale the output head {heads[0]}, which may see only some of the tokens; "
                "leave it out of lora_target_modules or set position_bias_enabled=False"
            )
        device = next(iter(targets.values())).weight.device
        bias = PositionBias(config.position_num_buckets, config.max_sequence_length, config.position_bucket, device)
        return cls(bias, targets, config.position_bias_target)

    is_attached = staticmethod(has_position_scale)

    def attach(self, base_model, layers):
        assert isinstance(self.module, PositionBias)
        self._positions = PositionScale(self.module, find_backbone(base_model, self._targets))
        del self._targets
        for layer in layers.values():
            layer.positions = self._positions

    def check_mergeable(self):
        if self._target == "delta":
            raise RuntimeError(
                'position_bias_target="delta" scales the low-rank update by position, which no weight can hold; '
                'do not merge, or train with position_bias_target="output" or without position bias'
            )

    def after_merge(self, linears):
        for linear in linears:
            linear.register_forward_pre_hook(self._positions.scale_input)


class AttentionComponent(Component):
    """Shifted sparse attention and Direct Attention Adaptation, which share one attention function."""

    kind = "daa"

    def __init__(self, groups: Groups | None, direct: DirectAttention | None):
        self._groups, self.module = groups, direct

    @classmethod
    def build(cls, base_model, targets, config):
        if not (config.s2_attn_enabled or config.daa_enabled):
            return None
        asked = " and ".join(option for option in ("s2_attn_enabled", "daa_enabled") if getattr(config, option))
        heads = _check_attention(base_model, asked)
        if config.s2_attn_enabled and config.s2_shift_mode == "heads" and heads < 2:
            raise ValueError(f's2_shift_mode="heads" needs 2 heads or more, got {heads}; use "layers"')
        direct = None
        if config.daa_enabled:
            device = next(iter(targets.values())).weight.device
            layers = len(attention_layers(base_model))
            direct = DirectAttention(layers, heads, config.daa_num_buckets, config.max_sequence_length, device)
        return cls(groups_of(config), direct)

    is_attached = staticmethod(has_attention_switch)

    def attach(self, base_model, layers):
        assert self.module is None or isinstance(self.module, DirectAttention)
        self._switch = AttentionSwitch(base_model, self._groups, self.module)

    def generating(self):
        return self._switch.generating()


def groups_of(config: HyLoRADAConfig) -> Groups | None:
    """The groups that a config asks for."""
    if not config.s2_attn_enabled:
        return None
    return Groups(
        size=config.s2_group_size,
        shift_ratio=config.s2_shift_ratio,
        sink_tokens=config.s2_sink_tokens,
        shift_mode=config.s2_shift_mode,
        in_evaluation=config.s2_eval,
    )


class LandmarkComponent(Component):
    """LandmarkLoRA, which changes the hidden states that the head receives."""

    kind = "landmark"

    def __init__(self, landmarks: LandmarkLoRA, backbone: nn.Module):
        self.module, self._backbone = landmarks, backbone

    @classmethod
    def build(cls, base_model, targets, config):
        if not config.landmark_enabled:
            return None
        backbone, hidden = find_head_input(base_model)
        check_gate(base_model, backbone, config.landmark_gate)
        landmarks = LandmarkLoRA(
            hidden.shape[-1],
            config.num_landmarks,
            config.landmark_gate,
            LANDMARK_POSITION_BUCKETS if config.landmark_position else 0,
            config.max_sequence_length,
            hidden.device,
        )
        return cls(landmarks, backbone)

    is_attached = staticmethod(has_landmarks)

    def attach(self, base_model, layers):
        assert isinstance(self.module, LandmarkLoRA)
        LandmarkHook(self.module, self._backbone)


class BaseComponent(Component):
    """What changes in the base model itself: how long its texts may be, and which of its own parameters are trained.

    length: how its texts become longer, {"method", "original_length", "target_length"}, or {} where they do not.
    """

    kind = "base"

    def __init__(
        self,
        length: RopeScaling | PositionTable | None,
        trained: dict[str, nn.Parameter],
        tables: dict[str, nn.Parameter],
    ):
        self._length, self._trained = length, list(trained)
        self.length: dict[str, Any] = {} if length is None else _described(length)
        # values are loaded into copies first
        self._new = {name: nn.Parameter(parameter.detach().clone()) for name, parameter in trained.items()} | tables
        self._base_model: PreTrainedModel | None = None

    @classmethod
    def build(cls, base_model, targets, config):
        length = length_scaling(base_model, config)
        trained = embedding_parameters(base_model, config.train_embeddings)
        if config.train_norms:
            trained |= norm_parameters(base_model)
        if length is None and not trained:
            return None
        weights = {id(linear.weight): name for name, linear in targets.items()}
        for name, parameter in trained.items():
            if id(parameter) in weights:
                raise ValueError(
                    f"train_embeddings={config.train_embeddings!r} trains {name}, also the weight of the adapted layer "
                    f"{weights[id(parameter)]}; leave that layer out of lora_target_modules"
                )
        tables = {}
        if isinstance(length, PositionTable):
            present = length.embedding.weight
            tables = {name: length.weight for name, value in base_model.named_parameters() if value is present}
        return cls(length, trained, tables)

    def parameters(self):
        return {name: parameter for name, parameter in self.base_parameters().items() if name in self._trained}

    def base_parameters(self):
        if self._base_model is None:
            return self._new
        return {name: self._base_model.get_parameter(name) for name in self._trained}

    def attach(self, base_model, layers):
        if self._length is not None:
            self._length.apply()
        for name in self._trained:
            parameter = base_model.get_parameter(name)
            parameter.data = self._new[name].data.to(parameter.dtype)
            parameter.requires_grad_(True)
        # by name from now on: what the model is moved or loaded into is what is saved
        self._base_model, self._new, self._length = base_model, {}, None


def length_scaling(base_model: PreTrainedModel, config: HyLoRADAConfig) -> RopeScaling | PositionTable | None:
    """What makes the model's texts longer as the config says, not applied yet; None where it says nothing."""
    scaling_type, factor = config.rope_scaling_type, config.rope_scaling_factor
    extension = config.position_extension
    if scaling_type is None:
        return None
    if scaling_type == "auto" and not find_rotary_modules(base_model):
        if find_position_table(base_model) is None:
            raise ValueError(
                f'rope_scaling_type="auto": {type(base_model).__name__} has neither rotary embeddings nor a learned '
                "position table; leave it None"
            )
        return PositionTable(base_model, factor, extension)
    if extension != HyLoRADAConfig.position_extension:
        raise ValueError(
            f'position_extension={extension!r} is for learned position tables with rope_scaling_type="auto"; '
            f"{type(base_model).__name__} with rope_scaling_type={scaling_type!r} has none, leave it "
            f"{HyLoRADAConfig.position_extension!r}"
        )
    return RopeScaling(base_model, scaling_type, factor)


def _described(length: RopeScaling | PositionTable) -> dict[str, Any]:
    return {
        "method": length.type if isinstance(length, RopeScaling) else length.method,
        "original_length": length.original_length,
        "target_length": length.target_length,
    }


def _check_attention(base_model: PreTrainedModel, asked: str) -> int:
    """The number of query heads of a model whose attention can be exchanged; ValueError for others."""
    name = type(base_model).__name__
    config = base_model.config.get_text_config(decoder=True)
    layers = attention_layers(base_model)
    if getattr(base_model.config, "is_encoder_decoder", False) or not getattr(config, "is_causal", True):
        raise ValueError(f"{asked}: {name} is no causal language model; leave it False")
    if not layers or not base_model._can_set_attn_implementation():
        raise ValueError(
            f"{asked}: {name} does not take its attention from transformers' AttentionInterface; leave it False"
        )
    if any(layer.config is not layers[0].config for layer in layers):
        raise ValueError(f"{asked}: the attention layers of {name} have different configs; leave it False")
    if getattr(config, "reorder_and_upcast_attn", False) or config.output_attentions:
        raise ValueError(
            f"{asked}: there are no attention weights and no reorder_and_upcast_attn; switch these off in the model's "
            "config, or leave it False"
        )
    return config.num_attention_heads


COMPONENTS: tuple[type[Component], ...] = (BaseComponent, PositionComponent, AttentionComponent, LandmarkComponent)
