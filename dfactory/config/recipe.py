"""The whole recipe: flat, with TRL's and transformers' names, and `decode:` as the one group."""

from dataclasses import dataclass, field

from dfactory.config.data import DataKeys
from dfactory.config.decode import DecodeKeys
from dfactory.config.model import ModelKeys
from dfactory.config.noise import NoiseKeys
from dfactory.config.training import TrainingKeys


@dataclass
class Recipe(TrainingKeys, NoiseKeys, DataKeys, ModelKeys):
    decode: DecodeKeys = field(default_factory=DecodeKeys)

    @property
    def views_per_document(self) -> int:
        """K: the views that a document gets in one row."""
        return self.num_views * (2 if self.complementary else 1)
