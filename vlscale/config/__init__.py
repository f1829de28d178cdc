"""The recipe: its schema, how it is found, overridden, resolved and written beside a run.

Imports neither torch nor deepspeed. Unknown keys are errors; every field says what it is and in which unit.
"""

from vlscale.config.bert import Bert
from vlscale.config.data import CLIP_MEAN, CLIP_STD, Aspect, Augmentation, Concepts, Data, Scenes, Texts, Tokenizer
from vlscale.config.loading import (
    apply_override,
    cache_dir,
    load_recipe,
    parse_recipe,
    recipe_names,
    write_recipe,
)
from vlscale.config.mvptr import Itm, Mcr, MvptrSystem, Stacks, Vsc, Wpg
from vlscale.config.recipe import Checkpoint, Evaluation, Rate, Recipe, Sgd, Train
from vlscale.config.section import Section
from vlscale.config.soho import Backbone, Dictionary, Joint, Mvm, Neck, SohoSystem
from vlscale.config.systems import (
    LOSSES,
    AlbefSystem,
    AlignOptions,
    CbVilaSystem,
    CodebookOptions,
    CodisSystem,
    MimOptions,
    PrototypeOptions,
    SystemConfig,
    Teacher,
    Text,
    TransportOptions,
    Vision,
)

__all__ = [
    "CLIP_MEAN",
    "CLIP_STD",
    "LOSSES",
    "AlbefSystem",
    "AlignOptions",
    "Aspect",
    "Augmentation",
    "Backbone",
    "Bert",
    "CbVilaSystem",
    "Checkpoint",
    "CodebookOptions",
    "CodisSystem",
    "Concepts",
    "Data",
    "Dictionary",
    "Evaluation",
    "Itm",
    "Joint",
    "Mcr",
    "MimOptions",
    "Mvm",
    "MvptrSystem",
    "Neck",
    "PrototypeOptions",
    "Rate",
    "Recipe",
    "Scenes",
    "Section",
    "Sgd",
    "SohoSystem",
    "Stacks",
    "SystemConfig",
    "Teacher",
    "Text",
    "Texts",
    "Tokenizer",
    "Train",
    "TransportOptions",
    "Vision",
    "Vsc",
    "Wpg",
    "apply_override",
    "cache_dir",
    "load_recipe",
    "parse_recipe",
    "recipe_names",
    "write_recipe",
]
