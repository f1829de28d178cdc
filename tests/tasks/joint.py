"""A small system with one transformer over words and visual cells: images of different sizes, no first stage."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlscale.data.sample import Batch
from vlscale.systems.protocol import ImageStates, TextStates

CELL = 8
"""Side of a visual cell in pixels."""


class Joint(nn.Module):
    """What evaluation and timing ask of a system; padded cells hold rubbish, so that it shows where one counts."""

    def __init__(self, width: int = 32, layers: int = 2, heads: int = 2, vocabulary: int = 200) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, width)
        self.cells = nn.Linear(3, width)
        self.places = nn.Linear(2, width)
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, 2)
        self.seen: list[tuple[int, ...]] = []
        """Shape of the images of each call."""

    def encode_image(self, batch: Batch) -> ImageStates:
        self.seen.append(tuple(batch.images.shape))
        cells = self.cells(F.avg_pool2d(batch.images, CELL).movedim(1, -1))  # [B, rows, columns, D]
        count, rows, columns, width = cells.shape
        row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        place = torch.stack([row, column], dim=-1).to(cells)
        sizes = batch.image_sizes
        if sizes is None:
            sizes = torch.tensor([batch.images.shape[2:]] * count)  # [B, 2]
        inside = torch.stack([row, column], dim=-1) * CELL < sizes[:, None, None]  # [B, rows, columns, 2]
        mask = inside.all(dim=-1)
        tokens = torch.where(mask[..., None], cells + self.places(0.3 * place), 1e4)
        return ImageStates(
            tokens.reshape(count, rows * columns, width), mask.flatten(1).long(), tokens.new_zeros(count, 0)
        )

    def encode_text(self, batch: Batch) -> TextStates:
        tokens = self.words(batch.input_ids)
        return TextStates(tokens, batch.attention_mask, tokens.new_zeros(len(tokens), 0))

    def fuse(self, text: TextStates, image: ImageStates) -> Tensor:
        count = len(text.tokens)
        tokens, mask = image.tokens.expand(count, -1, -1), image.mask.expand(count, -1)
        states = torch.cat([text.tokens, tokens], dim=1)
        padding = torch.cat([text.mask, mask], dim=1) == 0
        return self.layers(states, src_key_padding_mask=padding)[:, : text.tokens.shape[1]]

    def similarity(self, image: ImageStates, text: TextStates) -> Tensor | None:
        return None

    def match_logits(self, states: Tensor) -> Tensor:
        return self.head(states[:, 0])
