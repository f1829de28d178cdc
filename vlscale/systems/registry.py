"""From a recipe to its system: the only place that asks which system it is."""

from __future__ import annotations

from torch import nn

from vlscale.config import AlbefSystem, CbVilaSystem, CodisSystem, MvptrSystem, Recipe, SohoSystem
from vlscale.data.sample import Vocabulary


def build_system(recipe: Recipe, vocabulary: Vocabulary) -> nn.Module:
    """The recipe's system, freshly initialised on the default device."""
    config, size = recipe.system, recipe.data.image_size
    if isinstance(config, AlbefSystem):
        from vlscale.systems.albef import Albef

        return Albef(config, size, vocabulary)
    if isinstance(config, CbVilaSystem):
        from vlscale.systems.cb_vila import CbVila

        return CbVila(config, size, vocabulary, contrast=recipe.weights.get("itc", 1.0) != 0)
    if isinstance(config, CodisSystem):
        from vlscale.systems.codis import Codis

        return Codis(config, size, vocabulary, code=recipe.weights.get("code", 1.0) != 0)
    if isinstance(config, SohoSystem):
        from vlscale.systems.soho import Soho

        return Soho(config, size, vocabulary)
    if isinstance(config, MvptrSystem):
        from vlscale.systems.mvptr import Mvptr

        assert recipe.data.concepts is not None
        left_out = frozenset(name for name, weight in recipe.weights.items() if weight == 0)
        return Mvptr(config, recipe.data.concepts.region_width, vocabulary, left_out)
    raise AssertionError(f"unregistered system {config.name}")
