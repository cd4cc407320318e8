"""The methods; `method.name` in a recipe says which. A new one is one file and one name here."""

from trainer.methods.barlow import BarlowConfig
from trainer.methods.dino import DINOConfig
from trainer.methods.ibot import IBOTConfig
from trainer.methods.moco import MoCoConfig
from trainer.methods.msn import MSNConfig
from trainer.methods.regression import RegressionConfig
from trainer.methods.seed import SEEDConfig
from trainer.methods.simsiam import SimSiamConfig
from trainer.methods.swav import SwAVConfig
from trainer.methods.vicreg import VICRegConfig

AnyMethod = (
    BarlowConfig
    | DINOConfig
    | IBOTConfig
    | MoCoConfig
    | MSNConfig
    | RegressionConfig
    | SEEDConfig
    | SimSiamConfig
    | SwAVConfig
    | VICRegConfig
)
