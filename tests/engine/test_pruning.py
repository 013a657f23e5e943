"""AdaLoRA's allocator against its paper, written out in float64, and what it leaves behind."""

import numpy as np
import peft
import pytest
import torch

from rankwise.engine.forward import Forward
from rankwise.engine.loop import train
from rankwise.engine.pruning import Allocator
from rankwise.engine.run import Loop, Pruning, Run
from rankwise.engine.trainee import Trainee
from rankwise.errors import SpecError
from rankwise.surgery.bank import Bank
from tests.corpora import pattern_corpus, random_corpus
from tests.grid import relative, spec, trained
from tests.models import ARCHITECTURES, output, tiny

TRIPLETS = {"form": "adalora", "rank": 6, "alpha": 12}


def held(**settings) -> Bank:
    bank = Bank(tiny("llama"))
    trained(bank, "a", spec(**TRIPLETS | settings))
    return bank


def gradients(bank: Bank, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random ones, put where training puts them."""
    generator, found = torch.Generator().manual_seed(seed), {}
    for name, parameter in bank.named_parameters("a"):
        parameter.grad = found[name] = torch.randn(parameter.shape, generator=generator)
    return found


# ── the schedule ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 57, 1000])
@pytest.mark.parametrize("target", [1, 3, 5])
def test_the_budget_falls_along_the_cubic_to_exactly_what_was_asked(steps, target):
    """arXiv:2303.10512, equation 12, with every number of it from the real number of steps."""
    with held() as bank:
        sites = bank.adapter("a").sites
        pruning = Pruning(target_rank=target, begin=0.2, settle=0.3)
        allocator = Allocator("a", sites, pruning, steps)
        start, end = 6 * len(sites), target * len(sites)
        begins, settles = round(0.2 * steps), max(1, steps - round(0.3 * steps))
        for step in range(1, steps + 1):
            budget = allocator.budget(step)
            if step >= settles:
                assert budget == end
            elif step <= begins:
                assert budget == start
            else:
                share = (step - begins) / (settles - begins)
                assert budget == int(end + (start - end) * (1 - share) ** 3 + 1e-9)


def test_a_target_that_is_no_smaller_is_an_error():
    with held() as bank, pytest.raises(SpecError, match="rank 6 a site and is to end with 6"):
        Trainee(bank, "a", Run(pruning=Pruning(target_rank=6)), 10)


def test_a_schedule_without_time_to_fall_is_an_error():
    with pytest.raises(SpecError, match="leave no steps"):
        Pruning(begin=0.5, settle=0.5)


# ── importance and orthogonality ─────────────────────────────────────────────────────────────────────────────────────


def test_importance_is_the_paper_s(monkeypatch):
    """Equations 7 to 11 in float64, over five steps of changing weights and gradients, none of them masked."""
    with held() as bank:
        allocator = Allocator("a", bank.adapter("a").sites, Pruning(memory=0.7), 100)
        smoothed: dict[str, torch.Tensor] = {}
        doubts: dict[str, torch.Tensor] = {}
        for step in range(5):
            grads = gradients(bank, step)
            for name, parameter in bank.named_parameters("a"):
                importance = (parameter.detach().double() * grads[name].double()).abs()
                smoothed[name] = 0.7 * smoothed.get(name, 0) + 0.3 * importance
                doubts[name] = 0.7 * doubts.get(name, 0) + 0.3 * (importance - smoothed[name]).abs()
            allocator.observe()
            with torch.no_grad():
                for _, parameter in bank.named_parameters("a"):
                    parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(step))
        for path in bank.adapter("a").sites:
            score = {part: smoothed[f"{path}.{part}"] * doubts[f"{path}.{part}"] for part in ("A", "B", "lam")}
            want = score["A"].mean(1) + score["B"].mean(0) + score["lam"]
            torch.testing.assert_close(allocator._scores(path).double(), want, rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("name", ["llama", "unet"])
@pytest.mark.parametrize("some", [False, True])
def test_the_orthogonality_term_s_gradient_is_autograd_s(name, some):
    with Bank(tiny(name)) as bank:
        trained(bank, "a", spec(ARCHITECTURES[name].targets, **TRIPLETS))
        sites = bank.adapter("a").sites
        allocator = Allocator("a", sites, Pruning(orthogonality=0.3), 100)
        if some:
            for factors in sites.values():
                factors.leave_out_all_but(torch.tensor([0, 2, 3]))
        before = {n: g.clone() for n, g in gradients(bank).items()}
        exact = {n: p.detach().double().requires_grad_() for n, p in bank.named_parameters("a")}
        total = torch.zeros((), dtype=torch.float64)
        for path, factors in sites.items():
            kept = torch.arange(6) if factors.kept is None else factors.kept
            A, B = exact[f"{path}.A"].flatten(1)[kept], exact[f"{path}.B"].flatten(1)[:, kept]
            one = torch.eye(len(kept), dtype=torch.float64)
            total = total + 0.3 * ((B.t() @ B - one).square().sum() + (A @ A.t() - one).square().sum())
        total.backward()
        assert allocator.straighten() == pytest.approx(float(total.detach()), rel=1e-5)
        for n, parameter in bank.named_parameters("a"):
            want = torch.zeros_like(exact[n]) if exact[n].grad is None else exact[n].grad
            assert relative(parameter.grad.double() - before[n].double(), want) < 1e-5 or not want.any(), n


# ── allocation ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_most_important_stay_over_all_sites_together_and_the_budget_is_exact():
    with held() as bank:
        sites = bank.adapter("a").sites
        trainee = Trainee(bank, "a", Run(pruning=Pruning(target_rank=2, begin=0, every=1)), 10)
        allocator = trainee.allocator
        gradients(bank)
        allocator.observe()
        scores = torch.cat([allocator._scores(path) for path in sites])
        trainee.prune(3)
        budget, kept = allocator.budget(3), []
        for i, (path, factors) in enumerate(sites.items()):
            own = range(6) if factors.kept is None else factors.kept.tolist()
            kept += [6 * i + k for k in own]
            assert not factors.lam.detach()[[k for k in range(6) if k not in own]].any(), path
        assert len(kept) == budget < 6 * len(sites)
        out = [k for k in range(len(scores)) if k not in kept]
        assert scores[kept].min() >= scores[out].max()


def test_equal_importance_prunes_no_more_than_the_budget():
    """Of a fresh adapter nothing is known yet: all scores are 0."""
    with held() as bank:
        trainee = Trainee(bank, "a", Run(pruning=Pruning(target_rank=4, begin=0, every=1)), 10)
        trainee.prune(2)
        assert sum(trainee.allocator.ranks.values()) == trainee.allocator.budget(2)


def test_what_is_left_out_keeps_its_importance_and_can_come_back():
    with held() as bank:
        sites = bank.adapter("a").sites
        trainee = Trainee(bank, "a", Run(pruning=Pruning(target_rank=2, begin=0, every=1)), 50)
        gradients(bank)
        trainee.allocator.observe()
        trainee.prune(10)
        path = next(path for path, factors in sites.items() if factors.kept is not None)
        left = [k for k in range(6) if k not in sites[path].kept.tolist()]
        known = trainee.allocator._scores(path)[left]
        for _ in range(60):  # whatever goes on is of no importance any more
            for _, parameter in bank.named_parameters("a"):
                parameter.grad = torch.zeros_like(parameter)
            trainee.allocator.observe()
        assert torch.equal(trainee.allocator._scores(path)[left], known)
        trainee.prune(11)
        back = range(6) if sites[path].kept is None else sites[path].kept.tolist()
        assert set(left) & set(back)


def test_a_step_that_is_passed_over_is_made_up_for():
    """As where the counter jumps over the final step."""
    with held() as bank:
        trainee = Trainee(bank, "a", Run(pruning=Pruning(target_rank=2, settle=0.3)), 10)
        trainee.prune(9)
        assert trainee.allocator.settled
        assert sum(trainee.allocator.ranks.values()) == 2 * len(bank.adapter("a").sites)


# ── training ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_left_out_directions_are_skipped_with_the_same_result(name):
    """Loss and gradients are those of all directions with the left-out numbers of Λ at 0."""
    corpus, found = random_corpus([20, 31, 14]), []
    for skipping in (True, False):
        with Bank(tiny(name)) as bank:
            trained(bank, "a", spec("all-linear", **TRIPLETS))
            generator = torch.Generator().manual_seed(5)
            for factors in bank.adapter("a").sites.values():
                kept = torch.randperm(6, generator=generator)[: int(torch.randint(0, 7, (), generator=generator))]
                with torch.no_grad():
                    factors.lam[[k for k in range(6) if k not in kept.tolist()]] = 0
                if skipping:
                    factors.leave_out_all_but(kept.sort().values)
            with Forward(bank) as forward:
                losses = forward.learn(corpus, range(3), [("a", 3)], np.ones(3), tick=0).documents
            grads = {n: p.grad for n, p in bank.named_parameters("a")}
            lams = {path: factors.lam.detach() != 0 for path, factors in bank.adapter("a").sites.items()}
        found.append((losses, grads))
    (losses, some), (want, every) = found
    np.testing.assert_allclose(losses, want, rtol=1e-5)
    for n, grad in every.items():
        path, _, part = n.rpartition(".")
        own = torch.zeros_like(grad) if some[n] is None else some[n]
        if part == "lam":  # what is left out is not asked how it would like to come back
            own, grad = own[lams[path]], grad[lams[path]]
        assert relative(own, grad) < 1e-4 or not (own.any() or grad.any()), n


def run(bank: Bank, steps: int = 20, **pruning) -> list[dict]:
    events: list[dict] = []
    run = Run(lr=5e-3, pruning=Pruning(**{"target_rank": 2, "every": 2, **pruning}))
    train(
        bank,
        {"a": run},
        pattern_corpus(40),
        valid=pattern_corpus(8, seed=1),
        loop=Loop(batch_documents=4, max_steps=steps, evaluate_every=5),
        observe=events.append,
    )
    return events


def test_tensors_shrink_for_good_and_the_run_ends_at_the_budget():
    with Bank(tiny("llama")) as bank:
        bank.add("a", spec("all-linear", **TRIPLETS))
        events = run(bank)
        sites = bank.adapter("a").sites
        steps = [event for event in events if event["kind"] == "step"]
        directions = [event["directions"] for event in steps]
        assert directions == sorted(directions, reverse=True)
        assert directions[0] == 6 * len(sites)
        assert directions[-1] == sum(factors.rank for factors in sites.values()) == 2 * len(sites)
        for factors in sites.values():
            assert factors.A.shape[0] == factors.B.shape[1] == len(factors.lam)
            assert factors.kept is None
        (final,) = [event for event in events if event.get("what") == "ranks are final"]
        assert final["step"] == 14
        best = [event["step"] for event in events if event["kind"] == "evaluation" and event["best"]]
        assert best
        assert min(best) > 14, "what was judged before is a larger adapter"


def test_the_loss_that_is_told_is_the_task_s_alone():
    """A fresh adapter is the base, whatever its form: the first loss is the base's, and orthogonality stands apart."""
    first = {}
    for form in ("lora", "adalora"):
        with Bank(tiny("llama")) as bank:
            bank.add("a", spec("all-linear", **TRIPLETS | {"form": form}))
            first[form] = next(event for event in run(bank, steps=2) if event["kind"] == "step")
    assert first["adalora"]["loss"] == first["lora"]["loss"]
    assert first["adalora"]["orthogonality"] > 1
    assert "orthogonality" not in first["lora"]


def test_pruned_it_is_saved_as_a_plain_adapter_that_peft_reads(tmp_path):
    with Bank(tiny("llama")) as bank:
        bank.add("a", spec("all-linear", **TRIPLETS))
        run(bank, target_rank=1)
        sites, inputs = bank.adapter("a").sites, ARCHITECTURES["llama"].inputs(3)
        assert {factors.rank for factors in sites.values()} > {0}, "no site has lost all its directions"
        with bank.use("a"), torch.no_grad():
            want = output(bank.model, inputs)
        bank.save("a", tmp_path)
        bank.load("again", tmp_path)
        again = bank.adapter("again").sites
        assert again.keys() == {path for path, factors in sites.items() if factors.rank}
        for path, factors in again.items():
            assert relative(factors.delta(), sites[path].delta()) < 1e-6
    theirs = peft.PeftModel.from_pretrained(tiny("llama"), tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(output(theirs, inputs), want, rtol=1e-5, atol=1e-5)
