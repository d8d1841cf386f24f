"""HyLoRADAModel under TRL's SFTTrainer: the head that TRL fuses with its loss is the base model's."""

from __future__ import annotations

from typing import Any

from ..model import HyLoRADAModel

# what SFTTrainer reads from it
_OUTPUTS = ("log_probs", "entropy", "is_top1")


def prepare_sft(trainer: Any) -> Any:
    """Make an SFTTrainer of a HyLoRADAModel ready to train. -> the trainer

        trainer = prepare_sft(SFTTrainer(model=HyLoRADAModel(base, config), train_dataset=dataset))

    SFTTrainer replaces its model's forward by one that ends in hidden states, and takes them from `model.base_model`,
    which is a whole language model here. The same replacement fits the base model, and the adapted model's own forward
    leads there. Releases of TRL without a fused head need nothing.
    """
    model = trainer.model
    if not isinstance(model, HyLoRADAModel):
        raise TypeError(f"the trainer's model must be a HyLoRADAModel, got {type(model).__name__}")
    if vars(model).pop("forward", None) is not None:
        from trl.trainer.utils import add_fused_lm_head

        add_fused_lm_head(model.base_model, outputs=_OUTPUTS)
    return trainer
