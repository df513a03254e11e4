"""Learning, from the easiest problem up: overfit one batch, then probes with known values.

A probe that fails names the culprit: Constant the critic loss, Observed the encoder, Delayed the
TD target, Choice the action's index, Memory attention, Meta the previous action and reward.
"""

import copy

import numpy as np
import pytest
import torch

import amago_min as am
from probes import (Choice, Choice1d, Constant, Delayed, Match, Memory, Meta, Observed, Patience,
                    Run, use)

# ---- one batch ----


@pytest.mark.parametrize("kind", [Choice, Choice1d], ids=["discrete", "continuous"])
def test_critics_fit_one_batch(monkeypatch, kind):
    """Catches critics that hardly learn, or at another step. Observations and rewards are noise,
    and every step is a last one: only values that belong to their own step fit the targets."""
    env = use(monkeypatch, kind, horizon=8)
    run = Run(env, weight_decay=0.).act(8)
    batch = run.sample(4)
    batch["done"].fill_(True)
    for x in (batch["tokens"]["reward"], batch["tokens"]["obs"]["vector"]):
        x.normal_()
    losses = [run.learner.update(batch)["critic_loss"].item() for _ in range(200)]
    assert max(losses[-10:]) < losses[0] / 50


@pytest.mark.parametrize("kind", [Memory, Choice1d], ids=["discrete", "continuous"])
def test_a_compiled_loss_is_the_same_loss(monkeypatch, kind):
    """Catches a loss that torch.compile cannot take in one piece, for batches of any length. What
    it makes of that piece, which takes a minute, is torch's own and left out."""
    compile = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compile(
        self, backend="eager", fullgraph=True, dynamic=True))
    env = use(monkeypatch, kind, horizon=20)
    plain, fast = (Run(env, compile=flag, n_step=2).act(21) for flag in (False, True))
    assert fast.agent._compiled_call_impl and not fast.learner.average._compiled_call_impl
    for length in (20, 15):
        batch, seen = plain.sample(5, length), []
        if length == 15:
            batch["mask"][1:, 9:] = False                     # packed
        for run in (plain, fast):
            torch.manual_seed(0)
            seen.append({name: x.item() for name, x in run.learner.update(batch).items()})
        assert seen[0] == pytest.approx(seen[1], rel=1e-4, abs=1e-5)


def test_cloning_alone_imitates_the_better_half(monkeypatch):
    """Catches a cloning loss with the wrong sign, action or filter: half of the random play in
    this fixed buffer is paid 1, the other half -1."""
    monkeypatch.setattr(am, "ONLINE_WEIGHT", 0.)          # nothing but cloning moves the actor
    run = Run(use(monkeypatch, Match)).act(10).learn(80)
    assert am.evaluate(run.agent, "probe", 64)["return_mean"] > 0.9


# ---- probes ----


def largest_error(run, expected):
    """Of Q against `expected(batch, gammas)`, over steps, actions and every gamma."""
    batch = run.sample()
    return (run.q(batch) - expected(batch, run.agent.gammas)).abs().max()


def test_constant_reward(monkeypatch):
    """Catches critics that do not learn, or a PopArt that does not undo itself."""
    run = Run(use(monkeypatch, Constant)).act(4).learn(60)
    assert largest_error(run, lambda batch, gammas: 1.) < 0.1


def test_reward_depends_on_the_observation(monkeypatch):
    """Catches observations that do not reach the critics, or those of another step."""
    run = Run(use(monkeypatch, Observed)).act(8).learn(80)

    def expected(batch, gammas):
        return batch["tokens"]["obs"]["vector"][:, :-1, :, None]         # (B, T, 1, 1)
    assert largest_error(run, expected) < 0.1


def test_reward_at_the_end_is_discounted(monkeypatch):
    """Catches a wrong gamma, a `done` that is ignored, a target from the wrong step."""
    run = Run(use(monkeypatch, Delayed)).act(40).learn(150)

    def expected(batch, gammas):
        return gammas[:, None] ** torch.tensor([3, 2, 1, 0])[:, None, None]
    assert largest_error(run, expected) < 0.1


@pytest.mark.parametrize("kind", [Choice, Choice1d])
def test_reward_depends_on_the_action(monkeypatch, kind):
    """Catches critics that get the wrong action, and an actor that does not climb them."""
    run = Run(use(monkeypatch, kind), explore_steps=10_000).act(40).learn(150)

    def expected(batch, gammas):
        if kind is Choice:
            return torch.tensor([-1., 1.])
        return batch["tokens"]["action"][:, 1:]                          # (B, T, 1)
    assert largest_error(run, expected) < 0.1
    assert am.evaluate(run.agent, "probe", 32)["return_mean"] > 0.8


def play(run, steps):
    """Mean reward of each step of a rollout, (steps,), over 200 rollouts without noise."""
    collector = am.Collector("probe", 200, run.agent, run.config.context, seed=99)
    trajectory = [t for _ in range(steps) for _, t in collector.step()]
    return np.mean([t.reward for t in trajectory], axis=0)


@pytest.mark.parametrize("context, solves", [(1, False), (4, True)])
def test_memory(monkeypatch, context, solves):
    """Catches attention that does not reach back. Context 1 is the control: nothing else helps."""
    run = Run(use(monkeypatch, Memory), context=context).act(60)
    for _ in range(25):
        run.act(4).learn(6)
    last = play(run, 4)[-1]
    assert last > 0.8 if solves else abs(last) < 0.3


def test_first_try_is_the_only_clue(monkeypatch):
    """Catches a previous action or reward that is missing from the tokens, or one step off."""
    run = Run(use(monkeypatch, Meta)).act(40)
    for _ in range(20):
        run.act(4).learn(8)
    first, second = play(run, 2)
    assert abs(first) < 0.3 and second > 0.8


def test_the_last_gamma_acts(monkeypatch):
    """Catches an agent that acts by another gamma: gamma = .1 would rather take 0.3 now."""
    run = Run(use(monkeypatch, Patience)).act(40)
    for _ in range(15):
        run.act(4).learn(8)
    assert am.evaluate(run.agent, "probe", 64)["return_mean"] > 0.9


def test_learning_rate_warms_up(monkeypatch):
    """Catches a warm-up that never ends, or that is one update late."""
    run = Run(use(monkeypatch, Constant), warmup=4, lr=1e-3).act(1)
    rates = [float(run.learn(1).learner.optimizer.param_groups[0]["lr"]) for _ in range(6)]
    assert rates == pytest.approx([.25e-3, .5e-3, .75e-3, 1e-3, 1e-3, 1e-3])


def test_acting_uses_the_newest_weights(monkeypatch):
    """Catches a copy of the weights, kept for speed, that an update leaves behind."""
    env = use(monkeypatch, Choice)
    run = Run(env).act(5)
    tokens = run.sample(4)["tokens"]
    for _ in range(3):
        run.learn(1)
        twin = am.Agent(run.agent.spec, run.config).eval()
        twin.load_state_dict(run.agent.state_dict())
        with torch.no_grad():
            assert torch.equal(run.agent.trunk(tokens), twin.trunk(tokens))


def test_the_average_follows_and_acts_with_its_own_weights(monkeypatch):
    """Catches an average that stands still, keeps old statistics or critics on an old scale of
    PopArt, or acts with weights W_hat of an earlier update."""
    run, scales = Run(use(monkeypatch, Choice)).act(20), []
    average, agent = run.learner.average, run.agent
    fold = agent.fold_popart
    monkeypatch.setattr(agent, "fold_popart", lambda: (
        scales.append((agent.popart.w.clone(), agent.popart.b.clone())), fold()))
    average.keep()
    for update in range(1, 4):
        old = copy.deepcopy(average)
        run.learn(1)
        old.critics.rescale(*scales[-1])
        rate = 30 / (update + 30)
        for p, before, q in zip(average.parameters(), old.parameters(), agent.parameters()):
            torch.testing.assert_close(p, (1 - rate) * before + rate * q)
        assert all(torch.equal(x, y) for x, y in zip(average.buffers(), agent.buffers()))
        with torch.no_grad():
            fresh = copy.deepcopy(average)
            for layer in fresh.modules():
                layer.kept = None
            tokens = run.sample()["tokens"]
            torch.testing.assert_close(average.trunk(tokens), fresh.trunk(tokens))
    run.learner.updates = 10**6
    old = next(average.parameters()).clone()
    run.learn(1)                                          # r never falls below .01
    moved = next(average.parameters()) - old
    torch.testing.assert_close(moved, .01 * (next(agent.parameters()) - old))


def test_the_average_acts_and_is_saved(monkeypatch, tmp_path):
    """Catches a run whose learning agent acts, is evaluated, or is what --eval loads."""
    use(monkeypatch, Choice)
    learners, actors, act = [], set(), am.Agent.act
    begin_update = am.Learner.begin_update
    monkeypatch.setattr(am.Learner, "begin_update", lambda self, batch: (
        learners.append(self), begin_update(self, batch))[1])
    monkeypatch.setattr(am.Agent, "act", lambda self, *rest: (actors.add(id(self)),
                                                              act(self, *rest))[1])
    folder = am.train(am.Config(env="probe", env_steps=100, replay_ratio=2., episodes=2,
                                out=str(tmp_path / "run")))
    average = learners[-1].average
    assert actors == {id(average)}
    for (name, x), y in zip(average.state_dict().items(),
                            am.load_checkpoint(folder)[1].state_dict().values()):
        assert torch.equal(x, y), name


# ---- random numbers (T19) ----


def first_updates(monkeypatch, folder, seed):
    """Losses of the first updates and all actions of a training run."""
    losses, actions = [], []
    begin_update, act = am.Learner.begin_update, am.Agent.act

    def record_update(self, batch):
        begin_update(self, batch)
        losses.append(self.begun[-1]["critic_loss"].item())

    def record_act(self, tokens, cache):
        actions.append(act(self, tokens, cache))
        return actions[-1]
    with monkeypatch.context() as patch:
        patch.setattr(am.Learner, "begin_update", record_update)
        patch.setattr(am.Agent, "act", record_act)
        am.train(am.Config(env="gym:CartPole-v1?horizon=20", env_steps=200, parallel_envs=4,
                           episodes=2, seed=seed, out=str(folder)))
    return losses[:5], torch.cat(actions).tolist()


def test_the_seed_decides_everything(monkeypatch, tmp_path):
    """Catches randomness outside the seed, and a seed that is not used."""
    (loss, act), (loss_again, act_again), (other_loss, other_act) = (
        first_updates(monkeypatch, tmp_path / str(i), seed) for i, seed in enumerate((3, 3, 4)))
    assert loss == loss_again and act == act_again
    assert len(loss) == 5 and not set(loss) & set(other_loss) and act != other_act
