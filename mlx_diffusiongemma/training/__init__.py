"""Fine-tuning: `train`, its options, and the published objective."""

from .loss import diffusion_loss
from .options import TrainingOptions
from .trainer import train

__all__ = ["TrainingOptions", "diffusion_loss", "train"]
