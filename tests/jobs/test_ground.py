"""How many adapters train side by side: what one more takes, by the plan, into the memory that is free."""

import pytest

from rankwise.adapters.presets import TARGET_ROLES
from rankwise.jobs import ground
from rankwise.jobs.ground import ground_of
from rankwise.jobs.plan import predicted_training
from rankwise.jobs.watch import Quiet
from rankwise.surgery.bank import Bank
from tests.jobs.tasks import write_task
from tests.jobs.world import request, write_rows


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", range(40))


def on(world, rows, out, **own):
    found = ground_of(request(world / "llama", rows, out, rank=8, max_steps=4, **own), Quiet())
    return found, Bank(found.subject.base.model)


def with_free(monkeypatch, count):
    monkeypatch.setattr(ground, "available_bytes", lambda device: count)


def test_as_many_fit_as_the_plan_says(world, rows, tmp_path, monkeypatch):
    found, bank = on(world, rows, tmp_path / "s")
    bank.add("one", found.request.spec)
    memory = predicted_training(found.request, found.subject.base, bank, found.parts.train)
    bank.remove("one")
    each = memory.adapters + memory.gradients + memory.optimiser
    alone = memory.step - memory.weights - memory.process
    linear = [site for site in bank.sites.values() if site.role in TARGET_ROLES["all-linear"]]
    assert each == 16 * sum(site.shape.parameters(8) for site in linear)
    for many in (1, 2, 5):
        with_free(monkeypatch, int((alone + (many - 1) * each) / 0.8) + many)
        count, reason = found.fitting(bank, (4, 8))
        assert count == many
        assert "rank 8" in reason


def test_little_memory_leaves_one_and_much_no_more_than_are_of_use(world, rows, tmp_path, monkeypatch):
    found, bank = on(world, rows, tmp_path / "s")
    with_free(monkeypatch, 1000)
    assert found.fitting(bank, ())[0] == 1
    with_free(monkeypatch, 10**12)
    count, reason = found.fitting(bank, ())
    assert count == 8
    assert "rank 64" in reason, "the largest rank that is tried where nobody has said which"
    assert bank.names == ()


def test_tasks_without_a_prediction_go_by_the_parameters(world, tmp_path, monkeypatch):
    files = write_task(tmp_path / "files", "sequence-classification")
    model, data, valid = (files[name] for name in ("model", "data", "valid"))
    asked = request(model, data, tmp_path / "s", task="sequence-classification", valid=str(valid))
    found = ground_of(asked, Quiet())
    bank = Bank(found.subject.base.model)
    with_free(monkeypatch, 10**12)
    assert found.fitting(bank, ())[0] == 8
