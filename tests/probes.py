"""Tiny environments whose right answer is known by hand, and short ways to train on them."""

import dataclasses

import gymnasium
import numpy as np
import torch
from gymnasium.spaces import Box, Discrete

import amago_min as am


class Probe(gymnasium.Env):
    """`horizon` steps of the observation `self.seen()`, each paid with `self.pay(action)`."""
    name, horizon, references, max_return = "probe", 1, {}, None
    observation_space = Box(-1, 1, (1,), np.float32)
    action_space = Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        options = options or {"episode": int(self.np_random.integers(2**31))}
        self.episode = options["episode"]
        self.rng = np.random.default_rng(self.episode)
        self.t, self.secret = 0, int(self.rng.integers(2))
        return self.look(), {}

    def step(self, action):
        reward = float(self.pay(action))
        self.t += 1
        return self.look(), reward, self.t == self.horizon, False, {}

    def look(self):
        return np.full(1, self.seen(), np.float32)

    def seen(self):
        return 0

    def pay(self, action):
        return 0


class Constant(Probe):
    """Q = 1."""

    def pay(self, action):
        return 1


class Observed(Probe):
    """Q = the observation, -1 or 1."""

    def seen(self):
        return 2 * self.secret - 1

    def pay(self, action):
        return self.seen()


class Delayed(Probe):
    """One reward at the end of 4 steps: Q at step t is gamma ** (3 - t)."""
    horizon = 4

    def pay(self, action):
        return self.t == self.horizon - 1


class Choice(Probe):
    """Q of action 0 is -1, of action 1 it is 1."""

    def pay(self, action):
        return 2 * int(action) - 1


class Choice1d(Probe):
    """Q(a) = a for one continuous action."""
    action_space = Box(-1, 1, (1,), np.float32)

    def pay(self, action):
        return action[0]


class Match(Probe):
    """The right action is what is seen."""

    def seen(self):
        return 2 * self.secret - 1

    def pay(self, action):
        return 1 if action == self.secret else -1


class Memory(Probe):
    """The first observation is the right action of the fourth and last step."""
    horizon = 4

    def seen(self):
        return 2 * self.secret - 1 if self.t == 0 else 0

    def pay(self, action):
        return (self.t == self.horizon - 1) * (1 if action == self.secret else -1)


class Meta(Probe):
    """Which of two actions pays is hidden; what the first one paid is the only clue."""
    horizon = 2

    def pay(self, action):
        return 1 if action == self.secret else -1


class Patience(Probe):
    """Action 0 at once pays 0.3; action 1, whatever follows, pays 1 a step later."""
    horizon = 2

    def pay(self, action):
        if self.t == 0:
            self.waits = action == 1
            return 0 if self.waits else 0.3
        return self.waits


class Count(Probe):
    """Rollouts of 1 to 9 steps that pay 1 per step; every part of the data tells its step."""
    horizon = 9
    observation_space = Box(0, 9, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        observation, info = super().reset(seed=seed, options=options)
        self.end = int(self.rng.integers(1, self.horizon + 1))
        return observation, info

    def seen(self):
        return self.t

    def pay(self, action):
        return self.t + 1

    def step(self, action):
        observation, reward, _, _, info = super().step(action)
        return observation, reward, self.t == self.end, False, info


def use(monkeypatch, kind, **attributes):
    """From here on every environment name means kind(), with these attributes changed."""
    def make_env(name, seed=None):
        env = kind()
        vars(env).update(attributes)
        gymnasium.Env.reset(env, seed=seed)
        return env
    monkeypatch.setattr(am.environments, "make_env", make_env)
    return make_env("probe")


class Run:
    """What `train` builds, without files: small, quick to learn, `act` and `learn` by hand."""

    def __init__(self, env, seed=0, **options):
        torch.manual_seed(seed)
        defaults = dict(batch=16, warmup=10, tau=.1, parallel_envs=16, explore_steps=1)
        self.config = dataclasses.replace(am.Config(**{**defaults, **options}), seed=seed)
        rng = np.random.default_rng(seed)
        n_envs, spec = self.config.parallel_envs, am.Spec.of(env)
        self.agent = am.Agent(spec, self.config).eval()
        self.learner = am.Learner(self.agent, self.config)
        self.buffer = am.ReplayBuffer(spec, self.config.buffer_steps, rng)
        noise = am.Exploration(spec, n_envs, self.config.explore_steps, rng)
        self.collector = am.Collector("probe", n_envs, self.agent, self.config.context, seed,
                                      noise)

    def act(self, steps):
        for _ in range(steps):
            for _, trajectory in self.collector.step():
                self.buffer.add(trajectory)
        return self

    def learn(self, updates):
        for _ in range(updates):
            self.learner.update(self.sample())
        return self

    def sample(self, batch=None, context=None):
        return self.buffer.sample(batch or self.config.batch, context or self.config.context)

    @torch.no_grad()
    def q(self, batch):
        """Mean of the critics' Q in units of reward: (B, T, G, A), or (B, T, G) at the action."""
        s = self.agent.trunk(batch["tokens"])[:, :-1]
        if self.agent.spec.discrete:
            q = self.agent.critics(s).movedim(-1, 0)                     # (A, B, T, C, G)
            values = self.agent.popart.denormalize(self.agent.popart(q))
            return values.mean(3).movedim(0, -1)
        q = self.agent.critics(s, batch["tokens"]["action"][:, 1:])      # (B, T, C, G)
        return self.agent.popart.denormalize(self.agent.popart(q)).mean(2)
