"""Targets, PopArt, critics, policies, who learns from what. Docstrings name the bugs they catch.

Numbers are worked out by hand where that is possible; what is batched in the file is a loop here.
"""

import copy
import inspect
import math

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from torch.distributions import Categorical, Normal

import amago_min
from amago_min import (Actor, Agent, Config, Critics, Learner, PopArt, Spec, actor_loss,
                       critic_loss, td_targets)
from test_network import random_tokens

GAMMAS = [.5, .9, .99]
SPECS = {"discrete": Spec(vector=3, actions=4, horizon=9),
         "continuous": Spec(vector=3, discrete=False, actions=2, horizon=9)}
both_kinds = pytest.mark.parametrize("kind", SPECS)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def make_agent(kind, critics=3, n_step=1):
    """A nano agent whose targets and PopArt are no longer what they were at the start."""
    agent = Agent(SPECS[kind], Config(gammas=GAMMAS, critics=critics, n_step=n_step))
    with torch.no_grad():
        for p in [*agent.target_actor.parameters(), *agent.target_critics.parameters()]:
            p += 0.1 * torch.randn_like(p)
        for name, value in dict(mean=0.3, square=2.0, w=1.5, b=0.2, count=3).items():
            getattr(agent.popart, name).fill_(value)
    return agent


def make_batch(kind, lengths=(5, 3, 1)):
    """Rollouts of these lengths; the first and the last of them end, the others are cut."""
    tokens, T = random_tokens(SPECS[kind], len(lengths), max(lengths) + 1), max(lengths)
    mask = torch.arange(T) < torch.tensor(lengths)[:, None]
    done = torch.zeros(len(lengths), T, dtype=torch.bool)
    done[0, lengths[0] - 1] = done[-1, lengths[-1] - 1] = True
    return dict(tokens=tokens, done=done, mask=mask)


def policy_value(critics, policy, s):
    """Values (..., C, G) of a policy at states s (..., D): exact, or at its sample"""
    if isinstance(policy, Categorical):
        return (critics(s) * policy.probs.unsqueeze(-3)).sum(-1)
    return critics(s, policy.rsample())


# ----------------------------------------------------------------------------- T7 TD targets

def test_td_targets_by_hand():
    """Catches a gamma on the reward, a swapped gamma axis, and a `done` read the wrong way round.
    The first rollout terminates at its last step, the second is cut there and goes on."""
    reward = torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]])
    done = torch.tensor([[False, False, True], [False, False, False]])
    next_value = torch.tensor([[10.0, 20.0], [30.0, 40.0], [50.0, 60.0]]).expand(2, 3, 2)
    target = td_targets(reward, done, next_value, torch.tensor([.5, .9]))
    expected = torch.tensor([[[6.0, 19.0], [17.0, 38.0], [3.0, 3.0]],
                             [[6.0, 19.0], [17.0, 38.0], [28.0, 57.0]]])
    torch.testing.assert_close(target, expected)


def test_the_example_of_td_targets_docstring():
    """Catches an example that is no longer true."""
    for done, expected in ((False, [2.0, 4.6]), (True, [1.0, 1.0])):
        target = td_targets(torch.ones(1, 1), torch.tensor([[done]]),
                            torch.tensor([[[2.0, 4.0]]]), torch.tensor([.5, .9]))
        torch.testing.assert_close(target[0, 0], torch.tensor(expected))


# ----------------------------------------------------------------------------- T8 PopArt

def test_popart_update_keeps_outputs():
    """Catches a rescaling of w and b that is not the inverse of what the statistics did."""
    popart, raw = PopArt(2, beta=0.1), torch.randn(7, 2)
    popart.update(raw)
    for i in range(30):
        before = popart.denormalize(popart(raw))
        targets = torch.randn(40, 2) * torch.tensor([3.0, 0.2]) + torch.tensor([i, -5.0])
        popart.update(targets)
        torch.testing.assert_close(popart.denormalize(popart(raw)), before, atol=1e-4, rtol=0)
    assert (popart.w - 1).abs().min() > 0.1 and popart.b.abs().min() > 0.1


def test_popart_normalize_and_denormalize_are_inverse():
    """Catches one of the two that scales where the other one shifts."""
    popart, targets = PopArt(2), torch.randn(50, 2) * 8 + 3
    popart.update(targets)
    torch.testing.assert_close(popart.denormalize(popart.normalize(targets)), targets)


def test_first_popart_update_takes_the_batch():
    """Catches statistics that crawl from their initial values: beta = 5e-4 alone would."""
    popart, targets = PopArt(2), torch.randn(6, 9, 2) * torch.tensor([4.0, 70.0]) + 20
    popart.update(targets)
    torch.testing.assert_close(popart.mean, targets.mean((0, 1)), rtol=1e-4, atol=0)
    torch.testing.assert_close(popart.std, targets.std((0, 1), correction=0), rtol=1e-3, atol=0)
    normal = popart.normalize(targets)
    torch.testing.assert_close(normal.mean((0, 1)), torch.zeros(2), atol=1e-4, rtol=0)


def test_first_popart_update_sets_the_scale_of_outputs():
    """Catches critics that have to grow to the size of the rewards: an output of 1 is one standard
    deviation of the first targets. Before them every value counts as 0."""
    popart, targets = PopArt(2), 3000 * torch.randn(50, 2) + 500
    raw = torch.randn(7, 2)
    assert popart.denormalize(popart(raw)).abs().max() < 1e-3
    popart.update(targets)
    torch.testing.assert_close(popart(raw), raw)


def test_popart_leaves_a_near_constant_small():
    """Catches a division by almost nothing: targets 1 +- .0001 are not blown up to 1 +- 1."""
    popart, targets = PopArt(2), torch.tensor([1.0, -20.0]) * (1 + 1e-4 * torch.randn(50, 2))
    popart.update(targets)
    torch.testing.assert_close(popart.std, torch.tensor([0.1, 2.0]), rtol=1e-3, atol=0)
    zeros = PopArt(2)
    zeros.update(torch.zeros(5, 2))
    assert zeros.normalize(torch.zeros(5, 2)).isfinite().all()


@both_kinds
def test_folding_popart_into_the_critics_keeps_outputs(kind):
    """Catches w and b in the wrong order of gammas and actions, and a target network left out."""
    agent, s = make_agent(kind), torch.randn(5, 64)
    agent.popart.w.copy_(torch.tensor([0.5, 2.0, 3.0]))
    agent.popart.b.copy_(torch.tensor([-1.0, 0.0, 4.0]))

    def outputs():
        policy = agent.actor(s)
        return [agent.popart(policy_value(critics, policy, s))
                for critics in (agent.critics, agent.target_critics)]
    torch.manual_seed(1)
    before = outputs()
    agent.fold_popart()
    torch.manual_seed(1)
    torch.testing.assert_close(outputs(), before)
    assert (agent.popart.w == 1).all() and (agent.popart.b == 0).all()


def test_an_update_folds_popart():
    """Catches w and b that stay outside of the critics, where they scale every step of Adam."""
    agent = make_agent("discrete").eval()
    Learner(agent, Config(gammas=GAMMAS)).update(make_batch("discrete"))
    assert (agent.popart.w == 1).all() and (agent.popart.b == 0).all() and agent.popart.count == 4


def test_popart_step_is_that_of_its_docstring():
    """Catches an average over updates whose later steps are too long or too short."""
    popart, mean, square = PopArt(1, beta=0.3), 0.0, 0.0
    for t in range(1, 5):
        targets = torch.randn(20, 1) + 3 * t
        popart.update(targets)
        step = 0.3 / (1 - 0.7 ** t)
        mean = (1 - step) * mean + step * targets.mean()
        square = (1 - step) * square + step * (targets ** 2).mean()
    torch.testing.assert_close(popart.mean[0], mean)
    torch.testing.assert_close(popart.square[0], square)


def test_popart_gammas_do_not_mix():
    """Catches statistics that are pooled over gammas."""
    targets = torch.randn(50, 2) + 1
    one, other = PopArt(2), PopArt(2)
    one.update(targets)
    other.update(targets * torch.tensor([1.0, 100.0]))
    assert one.mean[0] == other.mean[0] and one.std[0] == other.std[0] and one.w[0] == other.w[0]
    assert other.std[1] > 50 * one.std[1]


def test_popart_ignores_padding():
    """Catches padding (NaN here) that enters the sums, or their denominator."""
    targets, mask = torch.randn(4, 6, 2) + 1, torch.rand(4, 6) < 0.5
    alone, padded = PopArt(2), PopArt(2)
    alone.update(targets[mask])
    padded.update(torch.where(mask[..., None], targets, math.nan), mask)
    torch.testing.assert_close(padded.mean, alone.mean)
    torch.testing.assert_close(padded.std, alone.std)


def test_reward_scale_does_not_matter():
    """Catches a scale that has to be tuned: a thousandfold reward gives the same targets."""
    targets, normal = torch.randn(50, 2) + 1, []
    for scale in (1.0, 1000.0):
        popart = PopArt(2)
        popart.update(scale * targets)
        normal.append(popart.normalize(scale * targets))
    torch.testing.assert_close(normal[0], normal[1], atol=1e-4, rtol=0)


# ----------------------------------------------------------------------------- T9 critics

def one_critic(critics, c, x):
    """Critic c as three matrix products: x (d_in,) -> (d_out,)"""
    for layer, (weight, bias) in enumerate(zip(critics.weights, critics.biases)):
        x = x @ weight[c] + bias[c, 0]
        x = F.leaky_relu(x, 0.01) if layer < 2 else x
    return x


def test_discrete_critics_equal_a_loop():
    """Catches critics that share weights, and outputs cut up as (A, G) and not (G, A)."""
    critics, s = Critics(6, actions=4, num_gammas=3, num_critics=2, hidden=8), torch.randn(2, 5, 6)
    q = critics(s)
    assert q.shape == (2, 5, 2, 3, 4)
    for b, t, c in np.ndindex(2, 5, 2):
        torch.testing.assert_close(q[b, t, c].flatten(), one_critic(critics, c, s[b, t]))


def test_continuous_critics_equal_a_loop():
    """Catches an action that the critics do not read, or read of another step."""
    critics = Critics(6, 2, num_gammas=3, num_critics=2, hidden=8, discrete=False)
    s, action = torch.randn(2, 5, 6), torch.randn(2, 5, 2)
    q = critics(s, action)
    assert q.shape == (2, 5, 2, 3)
    for b, t, c in np.ndindex(2, 5, 2):
        x = torch.cat([s[b, t], action[b, t]])
        torch.testing.assert_close(q[b, t, c], one_critic(critics, c, x))


def test_each_gamma_judges_its_own_action():
    """Catches a diagonal over the wrong axes: gamma 0 that judges gamma 1's action."""
    critics = Critics(6, 2, num_gammas=3, num_critics=2, hidden=8, discrete=False)
    s, action = torch.randn(2, 5, 6), torch.randn(2, 5, 3, 2)
    q = critics(s, action)
    assert q.shape == (2, 5, 2, 3)
    for g in range(3):
        torch.testing.assert_close(q[..., g], critics(s, action[:, :, g])[..., g])


def test_critics_start_like_nn_linear_and_apart():
    """Catches an ensemble of equal critics, and a fan-in taken from the wrong axis."""
    critics = Critics(64, actions=4, num_gammas=3, num_critics=2, hidden=256)
    for weight, fan_in in zip(critics.weights, (64, 256, 256)):
        assert not torch.equal(weight[0], weight[1])
        assert 0.95 / fan_in ** .5 < weight.abs().max() <= 1 / fan_in ** .5


@both_kinds
def test_some_members_are_the_same_critics(kind):
    """Catches members that index gammas or rows and not critics."""
    agent, s = make_agent(kind), torch.randn(2, 5, 64)
    inputs = [s] if kind == "discrete" else [s, torch.randn(2, 5, 3, 2)]
    some, all_of_them = agent.critics(*inputs, members=[2, 0]), agent.critics(*inputs)
    torch.testing.assert_close(some, all_of_them[:, :, [2, 0]])


def test_target_takes_the_lower_of_a_pair_of_critics():
    """Catches a minimum over all critics or their mean, a critic that is never or too often drawn,
    and a draw that no seed repeats."""
    agent, s, done = make_agent("discrete", 4), torch.randn(1, 64), torch.tensor([False])
    with torch.no_grad():
        q = policy_value(agent.target_critics, agent.target_actor(s), s)[0].sort(0).values
        values = (agent.gammas * agent.popart.denormalize(agent.popart(q)))[:, -1]       # (C,)

    def drawn():
        """Rank of the critic that the last gamma's target came from: 0 is the lowest."""
        target = agent.td_target(s, torch.zeros(1), done)[0, -1]
        rank = (values - target).abs().argmin()
        torch.testing.assert_close(values[rank], target)
        return rank.item()
    torch.manual_seed(1)
    ranks = [drawn() for _ in range(600)]
    torch.manual_seed(1)
    assert [drawn() for _ in range(20)] == ranks[:20]
    # Of the 6 pairs 3 hold the lowest critic, 2 others the second lowest, 1 the two highest.
    for rank, share in enumerate((3 / 6, 2 / 6, 1 / 6, 0)):
        std = math.sqrt(share * (1 - share) / 600)
        assert abs(ranks.count(rank) / 600 - share) <= 4 * std


# ----------------------------------------------------------------------------- T12 policies

def policy_of(params, discrete=False):
    """An actor whose network says exactly `params` (N, G, A or 2A), and its policy."""
    actor = Actor(1, 1, params.shape[-2], hidden=1, discrete=discrete)
    actor.mlp = nn.Identity()
    return actor, actor(params.flatten(-2))


def test_discrete_policy_by_hand():
    """Catches gammas mixed with actions, in the probabilities and for the action taken."""
    logits, action = torch.randn(5, 3, 4), torch.tensor([0, 3, 1, 2, 3])
    actor, pi = policy_of(logits, discrete=True)
    torch.testing.assert_close(pi.probs, logits.softmax(-1))
    log_prob = actor.log_prob(pi, action)
    assert log_prob.shape == (5, 3) and pi.sample().shape == (5, 3)
    for i, g in np.ndindex(5, 3):
        torch.testing.assert_close(log_prob[i, g], logits.softmax(-1)[i, g, action[i]].log())


def test_continuous_policy_by_hand():
    """Catches a missing or wrong tanh correction, a last axis halved the wrong way round, and a sum
    over gammas in place of dimensions."""
    params, action = torch.randn(5, 3, 4), torch.rand(5, 2) * 1.8 - 0.9
    actor, pi = policy_of(params)
    log_prob = actor.log_prob(pi, action)
    assert log_prob.shape == (5, 3) and pi.sample().shape == (5, 3, 2)
    for i, g in np.ndindex(5, 3):
        mean, log_std = params[i, g, :2], -5 + 3.5 * (params[i, g, 2:].tanh() + 1)
        noise = (action[i].atanh() - mean) / log_std.exp()
        log_normal = -0.5 * noise ** 2 - log_std - 0.5 * math.log(2 * math.pi)
        expected = (log_normal - (1 - action[i] ** 2).log()).sum().clamp(-1e3, 1e3)
        torch.testing.assert_close(log_prob[i, g], expected, rtol=1e-4, atol=1e-4)


def test_continuous_density_integrates_to_one():
    """Catches a wrong tanh correction without trusting anyone's formula."""
    actor, pi = policy_of(torch.tensor([[[0.3, 0.2]]]))  # one gamma, one dimension, std 0.4
    action = torch.linspace(-0.995, 0.995, 20_001)
    density = actor.log_prob(pi, action[:, None]).exp()[:, 0]
    assert abs(torch.trapezoid(density, action) - 1) < 1e-3


def test_tanh_correction_is_the_derivative():
    """Catches the correction of another squashing function: d tanh / dx, measured numerically."""
    x = torch.tensor([-2.0, -.5, 0, 1, 2.5]).double()
    actor, pi = policy_of(torch.zeros(1, 1, 2).double())
    slope = (torch.tanh(x + 1e-5) - torch.tanh(x - 1e-5)) / 2e-5
    expected = Normal(0.0, math.exp(-1.5)).log_prob(x) - slope.log()
    log_prob = actor.log_prob(pi, torch.tanh(x)[:, None])[:, 0]
    torch.testing.assert_close(log_prob, expected, rtol=1e-4, atol=1e-4)


def test_continuous_actions_at_the_border_are_finite():
    """Catches atanh(1) = inf: noise pushes real actions exactly to the border."""
    actor, pi = policy_of(torch.zeros(2, 1, 4))
    border = actor.log_prob(pi, torch.tensor([[1.0, -1.0], [0.995, -0.995]]))
    assert border.isfinite().all() and torch.equal(border[0], border[1])


def test_continuous_samples_have_their_density():
    """Catches a variance used for a standard deviation, and other limits than the docstring's."""
    raw = policy_of(torch.tensor([0.4, -0.3]).expand(20_000, 1, 2))[1].sample().atanh()
    std = math.exp(-5 + 3.5 * (math.tanh(-0.3) + 1))
    assert abs(raw.mean() - 0.4) < 4 * std / math.sqrt(20_000)
    assert abs(raw.std() / std - 1) < 4 / math.sqrt(2 * 20_000)
    limits = policy_of(torch.tensor([[[0.0, 0.0, -99.0, 99.0]]]))[1].base_dist.base_dist.scale.log()
    torch.testing.assert_close(limits[0, 0], torch.tensor([-5.0, 2.0]))


@pytest.mark.parametrize("discrete", [True, False])
def test_actor_reads_the_state(discrete):
    """Catches states of a rollout that swap places on their way through the flat network."""
    actor, s = Actor(6, 4, num_gammas=3, hidden=8, discrete=discrete), torch.randn(2, 5, 6)
    action = torch.ones(2, 5).long() if discrete else torch.rand(2, 5, 4)
    whole = actor.log_prob(actor(s), action)
    assert whole.shape == (2, 5, 3)
    for b, t in np.ndindex(2, 5):
        alone = actor.log_prob(actor(s[b, t][None]), action[b, t][None])[0]
        torch.testing.assert_close(whole[b, t], alone, rtol=1e-4, atol=1e-5)


# ----------------------------------------------------------------------------- loss terms

def test_critic_loss_by_hand():
    """Catches a target that meets another gamma or critic."""
    q = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[9.0, 9.0], [9.0, 9.0]]])        # (2, C, G)
    target = torch.tensor([[0.0, 1.0], [9.0, 9.0]])
    # (1 - 0)^2, (2 - 1)^2, (3 - 0)^2, (4 - 1)^2 -> 1, 1, 9, 9, and four times 0
    torch.testing.assert_close(critic_loss(q, target), torch.tensor(2.5))


def test_actor_loss_by_hand():
    """Catches cloning of what is no better (advantage <= 0), a mean over critics for the minimum,
    and a wrong sign. One step, two gammas, two critics."""
    value, log_prob = torch.tensor([[[1.0, 8.0], [3.0, 4.0]]]), torch.tensor([[-2.0, -6.0]])
    cases = ([.5, .5], 4.0), ([.5, -.5], 1.0), ([0.0, .5], 3.0), ([0.0, -1.0], 0.0)
    for advantage, expected in cases:
        online, offline = actor_loss(value, log_prob, torch.tensor([advantage]))
        torch.testing.assert_close(online, torch.tensor(-2.5))           # minima 1 and 4
        torch.testing.assert_close(offline, torch.tensor(expected))


# ----------------------------------------------------------------------------- T10 who learns

def loss_by_hand(agent, popart, batch):
    """Agent.loss as loops over rollouts, steps, gammas and critics, of which there are two, so that
    the target has no choice. `popart` is the agent's from before the loss; it is updated here."""
    tokens, td, online, offline = batch["tokens"], [], [], []
    s, real = agent.trunk(tokens), list(zip(*torch.where(batch["mask"])))

    def target(b, t, steps):
        """(G,): so many rewards from step t on, then the value, or as many as the rollout has."""
        after = s[b, t + 1][None]                                        # (1, D)
        next_q = policy_value(agent.target_critics, agent.target_actor(after), after)[0]
        next_value = popart.denormalize(popart(next_q.amin(0)))          # (G,)
        if steps > 1 and batch["mask"][b, t + 1:t + 2].any():
            next_value = target(b, t + 1, steps - 1)
        going_on = 0 if batch["done"][b, t] else 1
        return tokens["reward"][b, t + 1] + agent.gammas * going_on * next_value
    targets = [target(b, t, agent.n_step) for b, t in real]
    popart.update(torch.stack(targets), torch.ones(len(targets), dtype=torch.bool))
    for (b, t), y in zip(real, targets):
        now, action = s[b, t][None], tokens["action"][b, t + 1]          # it led to token t + 1
        q = (agent.critics(now)[0, :, :, action] if agent.spec.discrete else
             agent.critics(now, action[None])[0])                        # (C, G)
        pi = agent.actor(now)
        v = policy_value(agent.critics, pi, now)[0]
        for g in range(len(GAMMAS)):
            for c in range(len(q)):
                td.append((popart(q[c]) - popart.normalize(y))[g] ** 2)
            online.append(-popart(v)[:, g].min())
            imitate = q[:, g].mean() > v[:, g].mean()
            offline.append(-imitate.float() * agent.actor.log_prob(pi, action[None])[0, g])
    return [torch.stack(terms).mean() for terms in (td, online, offline)]


@pytest.mark.parametrize("n_step", [1, 2, 3, 9])
@both_kinds
def test_loss_equals_loops(kind, n_step, monkeypatch):
    """Catches s_t taken for s_t+1, an action or reward of another step, online heads for target
    heads, old statistics for new ones, and n steps that are one more or run into the next rollout:
    the whole of Agent.loss against its definition."""
    for sample in ("sample", "rsample"):                # a continuous policy without its noise
        monkeypatch.setattr(Normal, sample, lambda self, _: self.mean)
    agent, batch = make_agent(kind, 2, n_step).eval(), make_batch(kind, (5, 1, 3, 4))
    before = copy.deepcopy(agent.popart)                # loss_by_hand updates it on its own
    with torch.no_grad():
        loss, info = agent.loss(batch)
        td, online, offline = loss_by_hand(agent, before, batch)
    torch.testing.assert_close(info["critic_loss"], td, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(info["actor_loss"], online, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(info["bc_loss"], offline, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(loss, 10 * td + online + 0.1 * offline, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(agent.popart.state_dict(), before.state_dict())


def gradients(agent, batch, monkeypatch, critic=0.0, online=0.0, offline=0.0):
    """Sum of |gradient| of every part of the agent, for these weights of the three terms."""
    for name, weight in dict(CRITIC=critic, ONLINE=online, OFFLINE=offline).items():
        monkeypatch.setattr(amago_min, f"{name}_WEIGHT", weight)
    agent.zero_grad(set_to_none=True)
    agent.train().loss(batch)[0].backward()
    return {name: sum(p.grad.abs().sum().item() for p in part.parameters() if p.grad is not None)
            for name, part in agent.named_children()}


@both_kinds
def test_td_loss_trains_trunk_and_critics(kind, monkeypatch):
    """Catches a TD loss that reaches the actor or a target network, or not the Transformer."""
    size = gradients(make_agent(kind), make_batch(kind), monkeypatch, critic=1.0)
    assert all(size[part] > 0 for part in ("encoder", "transformer", "critics"))
    assert size["actor"] == size["target_actor"] == size["target_critics"] == 0


@both_kinds
@pytest.mark.parametrize("term", ["online", "offline"])
def test_actor_losses_train_trunk_and_actor(kind, term, monkeypatch):
    """Catches critics that learn to please the actor: the shared update is unstable then."""
    size = gradients(make_agent(kind), make_batch(kind), monkeypatch, **{term: 1.0})
    assert all(size[part] > 0 for part in ("encoder", "transformer", "actor"))
    assert size["critics"] == size["target_actor"] == size["target_critics"] == 0


@both_kinds
@pytest.mark.parametrize("term", ["online", "offline"])
def test_actor_losses_reach_the_trunk_through_the_actor_only(kind, term, monkeypatch):
    """Catches an s that is not stopped on its way into the critics: with an actor that ignores s,
    nothing may arrive at the trunk."""
    agent = make_agent(kind)
    nn.init.zeros_(agent.actor.mlp[0].weight)
    size = gradients(agent, make_batch(kind), monkeypatch, **{term: 1.0})
    assert size["actor"] > 0 and size["encoder"] == size["transformer"] == 0


@both_kinds
def test_td_targets_give_no_gradient_to_the_next_state(kind, monkeypatch):
    """Catches a target that is learned instead of the value: a one-step rollout's last token is
    read by the target only, so its input gets no gradient."""
    agent, batch = make_agent(kind), make_batch(kind, lengths=(1, 1))
    batch["done"][:] = False
    batch["tokens"]["obs"]["vector"].requires_grad_(True)
    gradients(agent, batch, monkeypatch, critic=1.0, online=1.0, offline=1.0)
    grad = batch["tokens"]["obs"]["vector"].grad
    assert grad[:, 0].abs().sum() > 0 and (grad[:, 1] == 0).all()


@both_kinds
def test_every_trainable_parameter_learns(kind, monkeypatch):
    """Catches a layer that is built and never used, or frozen by mistake."""
    agent = make_agent(kind)
    gradients(agent, make_batch(kind), monkeypatch, 10.0, 1.0, 0.1)
    for name, p in agent.named_parameters():
        if name.startswith("target_"):
            assert not p.requires_grad and p.grad is None, name
        else:
            assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), name


# ----------------------------------------------------------------------------- T11 targets

def pairs(agent):
    """(name, target, online) of every parameter that has a slow copy."""
    for head in ("actor", "critics"):
        online = dict(getattr(agent, head).named_parameters())
        for name, target in getattr(agent, f"target_{head}").named_parameters():
            yield f"{head}.{name}", target, online[name]


def test_targets_start_as_copies():
    """Catches targets that are other random networks, or the same tensors, at the start."""
    for name, target, online in pairs(Agent(SPECS["discrete"], Config())):
        assert torch.equal(target, online) and target is not online, name


@both_kinds
def test_targets_follow_slowly(kind):
    """Catches tau and 1 - tau swapped, and a head that is forgotten."""
    agent = make_agent(kind)
    before = {name: (target.clone(), online.clone()) for name, target, online in pairs(agent)}
    agent.update_targets(tau=0.003)
    for name, target, online in pairs(agent):
        old, same = before[name]
        assert torch.equal(online, same) and not torch.equal(target, old), name
        torch.testing.assert_close(target, 0.003 * online + 0.997 * old, atol=1e-7, rtol=0)


def test_the_trunk_has_no_target():
    """Catches a slow copy of the trunk: targets read the online s_t+1, as the picture says."""
    assert [name for name, _ in make_agent("discrete").named_children() if "target" in name] == [
        "target_actor", "target_critics"]


# ----------------------------------------------------------------------------- acting, contract

def test_the_last_gamma_acts():
    """Catches actions of gamma = .1: the policy of gamma number g always takes action g here."""
    agent = make_agent("discrete").eval()
    nn.init.zeros_(agent.actor.mlp[-1].weight)
    with torch.no_grad():
        agent.actor.mlp[-1].bias.copy_(100 * torch.eye(3, 4).flatten())
    cache = agent.transformer.new_cache(5, 9)
    assert agent.act(random_tokens(SPECS["discrete"], 5, T=1), cache).tolist() == [2] * 5


def test_an_agent_of_nans_chooses_no_action():
    """Catches weights that are broken, or a cache's unwritten slot, behind a policy that always
    takes action 0: -1 is in no action space."""
    agent, tokens = make_agent("discrete").eval(), random_tokens(SPECS["discrete"], 2, T=1)
    nn.init.constant_(agent.actor.mlp[-1].bias, math.nan)
    assert agent.act(tokens, agent.transformer.new_cache(2, 9)).tolist() == [-1, -1]


@both_kinds
def test_acting_equals_training_forward(kind):
    """Catches an encoder, clock or cache that treats one token unlike a whole rollout."""
    agent, tokens = make_agent(kind).eval(), random_tokens(SPECS[kind], 3, T=9)
    cache = agent.transformer.new_cache(3, 9)
    full = agent.trunk(tokens)
    for t in range(9):
        now = {name: x[:, t:t + 1] for name, x in tokens.items() if name != "obs"}
        now["obs"] = {name: x[:, t:t + 1] for name, x in tokens["obs"].items()}
        s = agent.trunk(now, cache=cache)
        cache.end_step()
        torch.testing.assert_close(s[:, 0], full[:, t], atol=1e-5, rtol=1e-5)


def test_acting_in_training_mode_is_refused():
    """Catches a collector that forgets eval(): every action would change u and v."""
    agent = make_agent("discrete").train()
    with pytest.raises(AssertionError, match="eval"):
        agent.act(random_tokens(SPECS["discrete"], 1, T=1), agent.transformer.new_cache(1, 9))


def test_signatures_of_the_contract():
    """Catches a renamed argument that other people's code relies on."""
    def arguments(function):
        return list(inspect.signature(function).parameters)
    assert arguments(td_targets) == ["reward", "done", "next_value", "gammas"]
    assert arguments(PopArt)[0] == "num_gammas"
    assert arguments(PopArt.update) == ["self", "targets", "mask"]
    assert arguments(PopArt.normalize) == ["self", "values"]
    assert arguments(PopArt.denormalize) == ["self", "normalized"]
