"""What the objectives of several levels cost MVPTR: MCR, VSC and WPG as a share of a step, in FLOPs and in time.

The paper (appendix) finds 3.87 % more pre-training time and 3.4 % more FLOPs for all three.
"""

from __future__ import annotations

import statistics

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.benchmarks.timing import interleaved
from vlscale.config import Recipe, load_recipe
from vlscale.data.sample import Batch, Vocabulary
from vlscale.systems.mvptr import Mvptr
from vlscale.systems.protocol import Progress

PAIRS, WORDS, PHRASES, PER_TEXT, TAGS = 8, 30522, 20_000, 2, 12
"""Two phrases a text (Table 5), and about as many word pieces of tags as a detector's 20 give."""
LEVELS = ("mcr_v", "mcr_s", "vsc", "wpg")


def system_of(recipe: Recipe, left_out: frozenset[str]) -> Mvptr:
    torch.manual_seed(0)
    assert recipe.system.name == "mvptr"
    assert recipe.data.concepts is not None
    pieces = ((4, 5),) * PHRASES
    vocabulary = Vocabulary(WORDS, 0, 101, 102, 103, pieces)
    return Mvptr(recipe.system, recipe.data.concepts.region_width, vocabulary, left_out).train()


def batch_of(recipe: Recipe, pairs: int) -> Batch:
    concepts = recipe.data.concepts
    assert concepts is not None
    length, slots = concepts.max_words + concepts.max_phrases, concepts.max_phrases
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, WORDS, (pairs, length), generator=generator)
    ids[:, 0], ids[:, -1] = 101, 102
    places, words = torch.zeros_like(ids), torch.zeros(pairs, slots, length, dtype=torch.bool)
    for slot in range(PER_TEXT):
        place = concepts.max_words - 1 + slot
        ids[:, place] = torch.randint(WORDS, WORDS + PHRASES, (pairs,), generator=generator)
        places[:, place] = slot + 1
        words[:, slot, 3 * slot + 1 : 3 * slot + 3] = True
    tags = torch.randint(1000, WORDS, (pairs, concepts.max_tags), generator=generator)
    tags[:, 0] = 101
    tag_places = torch.arange(concepts.max_tags).expand(pairs, -1).clone()
    tag_places[:, TAGS + 1 :] = 0
    regions = torch.randn(pairs, concepts.max_regions, concepts.region_width + 6, generator=generator)
    return Batch(
        torch.empty(pairs, 3, 0, 0),
        ids,
        torch.ones_like(ids),
        torch.arange(pairs),
        phrase_places=places,
        phrase_words=words,
        tag_ids=tags,
        tag_mask=torch.ones_like(tags),
        tag_places=tag_places,
        regions=regions,
        region_mask=torch.ones(regions.shape[:2], dtype=torch.int64),
    )


def step(system: Mvptr, batch: Batch) -> None:
    """Forward and backward in bf16 autocast."""
    with torch.autocast("cpu", torch.bfloat16):
        output = system(batch, Progress(10, 100, 10.0, torch.Generator().manual_seed(0)))
    torch.stack(list(output.losses.values())).sum().backward()
    system.zero_grad()


def flops(system: Mvptr, batch: Batch) -> int:
    with FlopCounterMode(display=False) as counter:
        step(system, batch)
    return counter.get_total_flops()


@pytest.mark.slow
def test_the_levels_cost_little() -> None:
    recipe = load_recipe("mvptr_base", ["system.text.init=random"])
    batch = batch_of(recipe, PAIRS)
    systems = {
        name: system_of(recipe, frozenset(left_out))
        for name, left_out in (
            ("full", ()),
            ("ITM + MLM", LEVELS),
            ("without WPG", ("wpg",)),
            ("without MCR", ("mcr_v", "mcr_s")),
            ("without VSC", ("vsc",)),
        )
    }
    on_pairs_of_itm = load_recipe("mvptr_base", ["system.text.init=random", "system.wpg.negatives=hard"])
    systems["full, WPG on ITM's pairs as in the release"] = system_of(on_pairs_of_itm, frozenset())
    counted = {name: flops(system, batch) for name, system in systems.items()}
    for name, count in counted.items():
        print(f"\n{name}: {count / PAIRS / 1e9:.2f} GFLOPs a pair, {counted['full'] / count - 1:+.2%} to full", end="")
    work = {name: lambda system=system: step(system, batch) for name, system in list(systems.items())[:2]}
    taken = interleaved(work, 5)
    extra = [full / plain - 1 for full, plain in zip(taken["full"], taken["ITM + MLM"], strict=True)]
    print(f"\na step of {PAIRS} pairs: {statistics.median(taken['full']) / 1e3:.2f} s CPU time, of which the levels")
    print(f"add {statistics.median(extra):+.2%} ({min(extra):+.2%} to {max(extra):+.2%})")
    assert counted["full"] > counted["ITM + MLM"]
    assert counted["full"] / counted["ITM + MLM"] - 1 < 0.2
