"""What a system's section says of the inputs it can take; the recipe is held against it."""

from __future__ import annotations

from typing import ClassVar

from vlscale.config.section import Section


class Abilities(Section):
    """Base of every system's section: square images, one text each, unless it says otherwise."""

    padded_inputs: ClassVar[bool] = False
    """Whether it takes images of any aspect ratio, padded."""
    many_texts: ClassVar[bool] = False
    """Whether it takes several texts per image, not all of them its own."""
    second_view: ClassVar[bool] = False
    """Whether its teacher can see another crop."""
    asks_images: ClassVar[bool] = False
    """Whether its texts ask images through layers of their own, which can be doubled to ask two."""
    concepts: ClassVar[bool] = False
    """Whether it reads phrases, tags and regions in place of pixels."""
    stages: ClassVar[int] = 1
    """Stages of its pre-training, one after the other; where there are several it has the key `stage`."""

    @property
    def skips_to_last(self) -> bool:
        """Whether it can be trained in the last stage alone, for the epochs of all."""
        return False
