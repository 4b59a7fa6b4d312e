"""Editing by a low-rank adapter: LoRA and AdaLoRA, trained by peft."""

from modelwright.editing.lora.editor import AdaLoRA, LoRA

__all__ = ["AdaLoRA", "LoRA"]
