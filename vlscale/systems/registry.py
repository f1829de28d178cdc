"""From a recipe to its system: the only place that asks which system it is."""

from __future__ import annotations

from torch import nn

from vlscale.config import AlbefSystem, CbVilaSystem, CodisSystem, MvptrSystem, Recipe, SohoSystem
from vlscale.data.sample import Vocabulary


def build_system(recipe: Recipe, vocabulary: Vocabulary) -> nn.Module:
    """The recipe's system, freshly initialised on the default device; with a head where it is tuned for a task."""
    task = recipe.task
    if task is None or task.name == "retrieval":
        return _system(recipe, vocabulary)
    from vlscale.systems.tuned import Tuned

    return Tuned(_system(recipe, vocabulary, taught=False), task, vocabulary)


def _system(recipe: Recipe, vocabulary: Vocabulary, taught: bool = True) -> nn.Module:
    """
    Args:
        taught: with the momentum teacher of pre-training, where the system has one.
    """
    config, size = recipe.system, recipe.data.image_size
    left_out = frozenset(name for name, weight in recipe.weights.items() if weight == 0)
    knows_ids = recipe.task is not None and recipe.task.name == "retrieval"
    if isinstance(config, AlbefSystem):
        from vlscale.systems.albef import Albef

        return Albef(config, size, vocabulary, left_out, queue_ids=knows_ids, taught=taught)
    if isinstance(config, CbVilaSystem):
        from vlscale.systems.cb_vila import CbVila

        return CbVila(config, size, vocabulary, left_out, contrast="itc" not in left_out)
    if isinstance(config, CodisSystem):
        from vlscale.systems.codis import Codis

        return Codis(config, size, vocabulary, left_out, queue_ids=knows_ids, taught=taught)
    if isinstance(config, SohoSystem):
        from vlscale.systems.soho import Soho

        return Soho(config, size, vocabulary, left_out, quantise=recipe.task is None)
    if isinstance(config, MvptrSystem):
        from vlscale.systems.mvptr import Mvptr

        assert recipe.data.concepts is not None
        return Mvptr(config, recipe.data.concepts.region_width, vocabulary, left_out)
    raise AssertionError(f"unregistered system {config.name}")
