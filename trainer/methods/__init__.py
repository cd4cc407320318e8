"""The methods by name; a new one is one file and one line here."""

from trainer.methods.dino import DINOConfig
from trainer.methods.moco import MoCoConfig

METHODS = {"dino": DINOConfig, "moco": MoCoConfig}
