"""Fine-tuning for retrieval: the queues know whose their columns are, and the teacher goes on from the other run's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.systems.albef_fixtures import IMAGE_SIZE, VOCABULARY, DirectWriter, progress, tiny_batch, tiny_config
from tests.systems.test_codis import Writer as CodisWriter
from tests.systems.test_codis import codis
from vlscale import distributed
from vlscale.interop import layout
from vlscale.interop.export import module_tensors, write_tensors
from vlscale.interop.start import start_from
from vlscale.nn.queue import EMPTY
from vlscale.systems.albef import Albef
from vlscale.systems.codis import Codis

QUEUE = 10
"""Columns of the fixtures' queues."""
KEPT = {torch.float32: lambda system: system.momentum.kept, torch.int64: lambda system: system.momentum.kept_ids}
"""What a rank keeps until the step is done, by its type."""


def albef(seed: int = 0, ids: bool = True, image_size: int = IMAGE_SIZE) -> Albef:
    torch.manual_seed(seed)
    return Albef(tiny_config(), image_size, VOCABULARY, frozenset({"mlm"}), queue_ids=ids).train()


def system_of(name: str) -> Albef | Codis:
    return albef() if name == "albef" else codis(left_out=frozenset({"mlm", "code"}), queue_ids=True).train()


def a_step(system: Albef | Codis, ids: list[int], number: int = 1) -> None:
    batch = tiny_batch(len(ids), seed=number)
    batch.image_ids = torch.tensor(ids)
    system(batch, progress(number))
    system.after_step(progress(number), DirectWriter() if isinstance(system, Albef) else CodisWriter())


@pytest.mark.parametrize("name", ["albef", "codis"])
def test_ids_go_with_their_features(name: str) -> None:
    system = system_of(name)
    a_step(system, [7, 2**62, 7, 3], number=1)
    a_step(system, [5, 3, 1, 0], number=2)
    found = system.carried_state()["id_queue.ids"]
    assert found.tolist() == [7, 2**62, 7, 3, 5, 3, 1, 0, EMPTY, EMPTY]
    assert system.carried_state()["id_queue.pointer"].tolist() == [8]
    a_step(system, [8, 9, 6, 4], number=3)
    assert found.tolist() == [6, 4, 7, 3, 5, 3, 1, 0, 8, 9]
    queue = system.momentum.image_queue
    batch = tiny_batch(4, seed=3)
    with torch.no_grad():  # the teacher has moved since, but hardly
        features = system.momentum.teach(batch, None, 0.0, torch.float32).image_feat
    place = found.tolist().index(9)
    assert int((queue.features.T @ features[1]).argmax()) == place


def test_the_same_image_in_the_queue_is_a_right_answer() -> None:
    system = albef()
    a_step(system, [7, 8, 7, 3])
    batch = tiny_batch(4, seed=2)
    batch.image_ids = torch.tensor([3, 7, 1, 2])
    with torch.no_grad():
        taught = system.momentum.teach(batch, None, 0.0, torch.float32)
        features = system.image_feature(system.vision(batch.images)), taught.text_feat
        hard = system.contrast(*features, taught, batch.image_ids, 0.0).hard
    third = 1 / 3
    assert hard[0].tolist() == [0.5, 0, 0, 0] + [0, 0, 0, 0.5] + [0] * 6
    assert hard[1].tolist() == pytest.approx([0, third, 0, 0] + [third, 0, third, 0] + [0] * 6)
    assert hard[2].tolist() == [0, 0, 1, 0] + [0] * 10
    plain = albef(ids=False)
    a_step(plain, [7, 8, 7, 3])
    with torch.no_grad():
        hard = plain.contrast(*features, taught, batch.image_ids, 0.0).hard
    assert hard[1].tolist() == [0, 1, 0, 0] + [0] * 10
    assert not any(name.startswith("id_queue") for name in plain.carried_state())


def test_intra_modal_terms_know_them_too() -> None:
    known, unknown = (codis(left_out=frozenset({"mlm", "code"}), queue_ids=flag).train() for flag in (True, False))
    for system in (known, unknown):
        a_step(system, [7, 8, 7, 3])
    batch = tiny_batch(4, seed=2)
    for ids, equal in (([20, 21, 22, 23], True), ([3, 7, 1, 2], False)):
        batch.image_ids = torch.tensor(ids)
        first, second = (system(batch, progress(2)).metrics for system in (known, unknown))
        for term in ("align_i2t", "align_t2i", "align_i2i", "align_t2t"):
            assert torch.equal(first[term], second[term]) == equal, term


def test_ids_of_a_skipped_step_are_not_pushed() -> None:
    system = albef()
    batch = tiny_batch(4)
    system(batch, progress(1))  # after_step is not called
    a_step(system, [5, 6], number=2)
    assert system.carried_state()["id_queue.ids"].tolist() == [5, 6] + [EMPTY] * 8


def test_every_rank_has_the_ids_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = [albef() for _ in range(2)]
    for rank, system in enumerate(ranks):
        batch = tiny_batch(2, seed=rank)
        batch.image_ids = torch.tensor([10 * rank, 10 * rank + 1])
        system(batch, progress())
    gathered = {kind: torch.cat([torch.cat(kept(one)) for one in ranks]) for kind, kept in KEPT.items()}
    monkeypatch.setattr(distributed, "gather", lambda local: gathered[local.dtype])
    for system in ranks:
        system.after_step(progress(), DirectWriter())
        assert system.carried_state()["id_queue.ids"].tolist() == [0, 1, 10, 11] + [EMPTY] * 6


def test_a_checkpoint_from_before_loads() -> None:
    old = albef(ids=False)
    a_step(old, [7, 8, 7, 3])
    new = albef(seed=1)
    new.load_carried_state({name: value.clone() for name, value in old.carried_state().items()})
    state = new.carried_state()
    assert state["id_queue.ids"].tolist() == [EMPTY] * QUEUE
    assert state["id_queue.pointer"].tolist() == state["image_queue.pointer"].tolist() == [4]
    with pytest.raises(KeyError, match="id_queue"):
        old.load_carried_state(state)


def checkpoint(folder: Path, system: Albef, carried: bool = True) -> Path:
    folder.mkdir()
    write_tensors(folder / layout.MODEL, module_tensors(system))
    if carried:
        write_tensors(folder / layout.CARRIED, system.carried_state())
    return folder / layout.MODEL


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def test_a_fine_tuning_starts_with_the_teacher_and_queues_of_the_run(tmp_path: Path) -> None:
    before = albef(ids=False)
    with torch.no_grad():
        for parameter in before.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    a_step(before, [7, 8, 7, 3])
    tuned = albef(seed=1)
    start_from(tuned, checkpoint(tmp_path / "a", before))
    assert equal(tuned.momentum.teacher.state(), before.momentum.teacher.state())
    assert not torch.equal(tuned.vision_proj.weight, tuned.momentum.teacher["vision_proj"].weight)
    state = tuned.carried_state()
    assert equal(
        {name: value for name, value in state.items() if not name.startswith("id_queue")}, before.carried_state()
    )
    assert state["id_queue.ids"].tolist() == [EMPTY] * QUEUE
    assert state["id_queue.pointer"].tolist() == [4]


def test_it_starts_as_the_student_where_there_is_no_teacher(tmp_path: Path) -> None:
    before, tuned = albef(ids=False), albef(seed=1)
    start_from(tuned, checkpoint(tmp_path / "a", before, carried=False))
    for name, module in tuned.momentum.teacher.modules.items():
        assert equal(module.state_dict(), dict(getattr(before, name).state_dict())), name
    assert tuned.carried_state()["id_queue.pointer"].tolist() == [0]


def test_the_teachers_positions_are_resized_too(tmp_path: Path) -> None:
    before, tuned = albef(ids=False), albef(seed=1, image_size=2 * IMAGE_SIZE)
    a_step(before, [7, 8, 7, 3])
    start_from(tuned, checkpoint(tmp_path / "a", before))
    student, teacher = tuned.vision.vit.pos_embed, tuned.momentum.teacher["vision"].vit.pos_embed
    assert teacher.shape == student.shape == (1, 65, 24)
    assert torch.allclose(student, teacher, atol=1e-4)  # one step with a momentum of 0.9 behind
