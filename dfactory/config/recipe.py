"""The whole recipe: flat, with TRL's and transformers' names."""

from dataclasses import dataclass

from dfactory.config.data import DataKeys
from dfactory.config.model import ModelKeys
from dfactory.config.noise import NoiseKeys
from dfactory.config.training import TrainingKeys


@dataclass
class Recipe(TrainingKeys, NoiseKeys, DataKeys, ModelKeys):
    @property
    def views_per_document(self) -> int:
        """K: the views that a document gets in one row."""
        return self.num_views * (2 if self.complementary else 1)
