"""amago_min: AMAGO [1], in-context reinforcement learning, in one file that reads like the paper.

One causal Transformer reads the whole rollout: what the agent saw, what it did, what it got.
Whatever has to be remembered or inferred (an earlier card, the rules of this maze, which arm pays)
is in its input, so remembering and adapting is nothing but attention over the past. An actor and an
ensemble of critics sit on the Transformer's outputs; they learn off-policy from a replay buffer of
whole rollouts, for many discount factors at once, in ONE update with ONE optimiser.

    python amago_min.py --env popgym:RepeatPrevious        # the main job: return 1.0 in seconds
    python amago_min.py --env "maze:7x7?goals=2" --env-steps 300000 --out runs/maze
    python amago_min.py --eval runs/maze --instruction "travel to (1, 1), travel to (5, 3)"
    python amago_min.py --help                             # every option, with default and meaning

How to read it
    15 minutes      Config, Trajectory (the picture), Agent.loss, train
    steal a piece   SigmaLinear, KVCache, PopArt, Critics and td_targets run when pasted alone
Letters       B batch (rollouts)    T transitions (so T+1 tokens)    D width     H attention heads
              G discount factors    C critics      A actions (dimensions)          L cache slots
              N real steps, or environments    K goals asked, M met in a step, W words in a goal
Conventions   tensors are batch first; masks are bool, True = a real step; the LAST gamma acts.

References
    [1] Grigsby, Fan, Zhu. AMAGO: Scalable In-Context RL for Adaptive Agents. ICLR 2024.
    [2] Zhai et al. Stabilizing Transformer Training by Preventing Attention Entropy Collapse. 2023.
    [3] Shleifer, Weston, Ott. NormFormer: Improved Transformer Pretraining. 2021.
    [4] van Hasselt et al. Learning Values across Many Orders of Magnitude (PopArt). NeurIPS 2016.
    [5] Chen et al. Randomized Ensembled Double Q-Learning (REDQ). ICLR 2021.
    [6] Wang et al. Critic Regularized Regression (CRR). NeurIPS 2020.
    [7] Su et al. RoFormer: Transformer with Rotary Position Embedding. 2021.
    [8] Morad et al. POPGym: Benchmarking Partially Observable RL. ICLR 2023.
"""

import contextlib
import copy
import dataclasses
import json
import math
import os
import re
import sys
import time
from pathlib import Path

import numpy as np

import envs as environments    # before torch: it says how long OpenMP's threads wait
from envs import (BrokenEnvironment, GoalRarity, Log, NonFiniteLoss, Recorded, Spec, UsageError,
                  blame, catch_signals, check_options_of, each, option, read_command_line,
                  report_disk_trouble, say, set_up_memory)
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import distributions

VERSION = 4    # of checkpoints
# ==================================================================================================
# 1. Config
#    One dataclass is the only place where an option lives: its fields are the command line's flags,
#    its defaults the defaults, its help texts `--help`, and its values `config.json`.
# --size: width D, layers, heads H, feed-forward width, width of the encoder's, actor's and critics'
# layers, learning rate. `paper`: Transformer, actor and critics as in [1] Table 3, POPGym [8].
SIZES = {
    "nano": dict(width=64, layers=2, heads=4, ff=256, hidden=128, lr=1e-3),
    "small": dict(width=128, layers=2, heads=8, ff=512, hidden=256, lr=5e-4),
    "paper": dict(width=256, layers=3, heads=8, ff=1024, hidden=256, lr=2e-4),
}


@dataclasses.dataclass
class Config:
    """All options: `Config(env=...)` or `--env ...`. UsageError for a value out of range."""
    # what to run
    env: str = option("popgym:RepeatPrevious", "environment, suite:Name; python envs.py lists them")
    size: str = option("nano", "size of the agent", choices=tuple(SIZES))
    seed: int = option(0, "seed of everything random", low=0, high=2**32)
    resume: str = option("", "continue the run in this folder from its last checkpoint")
    eval: str = option("", "no training: evaluate the agent saved in this folder")
    render: str = option("", "with --eval: draw one episode into this .gif or .png")
    instruction: str = option("", "with --eval: what to ask for, such as 'eat cow, collect wood'")
    # on which machine
    device: str = option("auto", "cpu, cuda, cuda:N, or auto = CUDA if there is one", free=True)
    threads: int = option(0, "CPU threads; 0 = torch's own choice", low=0, high=1024, free=True)
    workers: int = option(0, "worker processes for slow environments", low=0, high=1024, free=True)
    amp: str = option("auto", "bfloat16 matrix products; auto = where they are faster",
                      choices=("auto", "on", "off"), free=True)
    compile: bool = option(False, "compile the loss: 1 or 2 minutes, then faster", free=True)
    # when to stop, what to write
    env_steps: int = option(1_000_000, "stop after so many environment steps", low=1, free=True)
    target_return: str = option("auto", "stop when an evaluation reaches this: a number, none, auto"
                                " = the known maximum less 1 %%", words=("none", "auto"), free=True)
    out: str = option("", "folder to write to; if empty, runs/ENV-SEED")
    eval_every: int = option(0, "env steps between evaluations, later a tenth of all so far; 0 ="
                             " 1000, or a quarter of an evaluation's if more", low=0, free=True)
    episodes: int = option(64, "whole episodes per evaluation", low=1, free=True)
    checkpoint_minutes: float = option(10.0, "minutes between checkpoints", low=0, free=True)
    # data
    parallel_envs: int = option(16, "environments that act side by side", low=1, high=10**4)
    replay_ratio: float = option(24.0, "how often each environment step is replayed, on average:"
                                 " 24 at batch 24: one update per new rollout", low=.01, high=1000)
    buffer_steps: int = option(1_000_000, "capacity of the replay buffer, in time steps", low=100)
    explore_steps: int = option(0, "env steps over which noise fades; 0 = 200 000, 2000"
                               " rollouts and 100 with a reward, whichever is last", low=0)
    context: int = option(1024, "longest rollout to learn from, and to remember while acting; of"
                         " longer ones, a random slice is learned", low=1)
    relabel: str = option("auto", "hindsight goals: none, some (a random number), all; auto = some,"
                          " with instructions", choices=("auto", "none", "some", "all"))
    importance: bool = option(True, "prefer hindsight goals that are rarely reached")
    hide_plan: bool = option(False, "show the agent only the current goal of its instruction")
    # learning
    batch: int = option(24, "rollouts per update", low=1, high=10**5)
    lr: float = option(0.0, "learning rate; 0 = that of --size", low=0, high=1, free=True)
    warmup: int = option(100, "updates over which the learning rate rises from 0", low=1)
    weight_decay: float = option(1e-3, "AdamW's decoupled weight decay", low=0)
    grad_clip: float = option(1.0, "largest norm of the gradient", low=1e-9)
    gammas: tuple = option((.1, .9, .95, .97, .99, .995, .999),
                           "discount factors learned together; the last acts", low=0, high=.99999)
    n_step: int = option(1, "rewards summed in a TD target before V, uncorrected", low=1, high=1000)
    critics: int = option(4, "critics in the ensemble", low=2, high=1000)
    tau: float = option(.01, "speed of the target networks", low=0, high=1)
    memory: int = option(0, "steps that attention reaches back; 1 = no memory, 0 = all", low=0)
    positions: str = option("both", "how attention knows the time",
                            choices=("rotary", "learnable", "sinusoidal", "both"))
    bootstrap_truncated: bool = option(False, "bootstrap values through a time limit; off, because"
                                       " the agent sees the clock ([1], finite horizon)")

    def __post_init__(self):
        check_options_of(self)
        self.lr = self.lr or SIZES[self.size]["lr"]

    def torch_device(self):
        """The device to compute on; under torchrun, a GPU for each process."""
        cuda = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        auto = cuda if torch.cuda.is_available() else "cpu"
        name = dict(auto=auto, cuda=cuda).get(self.device, self.device)
        try:
            torch.empty(0, device=name if re.fullmatch(r"cpu|cuda:\d+", name) else "unknown")
            if name != "cpu":
                torch.cuda.set_device(name)                  # where CUDA graphs are recorded
            return torch.device(name)
        except (RuntimeError, AssertionError):
            raise environments.no_device(name, torch.cuda.device_count(), name == cuda) from None


# ==================================================================================================
# 2. The stable Transformer ([1] App. A.3, Fig. 16)
#    RL wants attention far sharper than language does ("look at exactly the card three steps ago").
#    A plain pre-norm Transformer gets there by growing its queries and keys until attention
#    saturates and its gradient dies. Three changes keep all activations bounded: projections of
#    learned sigma [2], more layer norms and a scale per head [3], Leaky ReLU. There is no dropout.
class SigmaLinear(nn.Module):
    """Linear layer whose spectral norm is one learned number, whatever its weights do [2].

        W_hat = (gamma / sigma(W)) W,    y = W_hat x + b,    sigma(W) = u' W v

    u, v are running estimates of W's leading singular vectors: one step of power iteration per
    training forward, none in eval mode. They take no gradient; W gets one through sigma(W) too.
    Initialised with trunc_normal_(std=0.02), u and v from the SVD, b = 0, gamma = 1.
    forward: x (..., d_in) -> (..., d_out).
    """

    def __init__(self, d_in, d_out, bias=True):
        super().__init__()
        self.weight = nn.Parameter(nn.init.trunc_normal_(torch.empty(d_out, d_in), std=0.02))
        self.bias = nn.Parameter(torch.zeros(d_out)) if bias else None
        self.gamma = nn.Parameter(torch.ones(()))
        left, _, right = torch.linalg.svd(self.weight.detach(), full_matrices=False)
        self.register_buffer("u", left[:, 0].clone())    # (d_out,)
        self.register_buffer("v", right[0].clone())      # (d_in,)
        self.kept = None                                 # W_hat, see keep

    @torch.autocast("cuda", enabled=False)               # sigma is a float32 number
    @torch.autocast("cpu", enabled=False)
    def scaled_weight(self):
        """W_hat (d_out, d_in): the weight that is really applied."""
        u, v = self.u, self.v
        if self.training:
            with torch.no_grad():
                u = F.normalize(self.weight @ v, dim=0)
        w_u = u @ self.weight                            # W'u (d_in,)
        if self.training:
            with torch.no_grad():
                v = F.normalize(w_u, dim=0)
                # New tensors were used above and are only now copied into the buffers: writing
                # in place first would spoil the backward pass of an earlier forward.
                self.u.copy_(u)
                self.v.copy_(v)
        return self.weight * (self.gamma / (w_u @ v))

    def forward(self, x):
        self.kept = None if self.training else self.kept       # about to change
        weight = self.scaled_weight() if self.kept is None else self.kept
        return F.linear(x, weight, self.bias)

    def keep(self):
        """Compute W_hat once for many steps in eval mode; stale until called on new weights."""
        weight = self.scaled_weight().detach()
        stays = self.kept is not None and self.kept.type() == weight.type()
        self.kept = self.kept.copy_(weight) if stays else weight         # in place, see Recorded


class KVCache:
    """What N environments have attended to so far, so that acting costs one token per step.

    Environments reset at different times, so each has its own write position. A row that is longer
    than the context is a ring: the newest token overwrites the oldest (slots are then not in order
    of time, which attention does not mind: positions are in the keys).

        slot      0    1    2    3             length
        env 0   [ k0   k1   k2   --- ]           3       --- = not written: NaN, masked out
        env 1   [ k4   k5   k2   k3  ]           6       4 slots: k4 and k5 replaced k0 and k1

    Unwritten keys are NaN so that a mistake in the mask is loud; values start at 0 and stay finite,
    as 0 NaN is NaN. For every token: in each layer i attend to `append(i, k, v)`, softmax over the
    slots `written`, as CausalAttention does; then call `end_step(ended)` once.

    keys, values: (layers, N, H, context, d_head), qkv's dtype; length: (N,) numpy, since the reset.
    """

    def __init__(self, layers, n_envs, heads, context, d_head, device="cpu", dtype=torch.float32):
        self.static = torch.device(device).type == "cuda"    # all slots at every step: see Recorded
        shape = (layers, n_envs, heads, context, d_head)
        self.keys = torch.full(shape, math.nan, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.context = context
        self.length = np.zeros(n_envs, dtype=np.int64)   # on the host: no read-back from a GPU
        self.rows = torch.arange(n_envs, device=device)
        self.slot = torch.zeros_like(self.rows)
        self.written = torch.zeros(n_envs, context, dtype=torch.bool, device=device)
        self.begin_step()

    def begin_step(self):
        """Fix where this step's token goes in every layer, and which slots may be attended to."""
        self.width = int(min(self.context if self.static else self.length.max() + 1, self.context))
        self.slot.copy_(torch.from_numpy(self.length % self.context), non_blocking=True)
        written = np.arange(self.width) <= self.length[:, None]              # (N, width)
        self.written[:, :self.width].copy_(torch.from_numpy(written), non_blocking=True)

    def append(self, layer, key, value):
        """key, value (N, H, d_head) of this step -> all keys, values (N, H, width, d_head) so far,
        and the mask (N, width) of slots that hold a token; all views, changed by the next step."""
        self.keys[layer, self.rows, :, self.slot] = key
        self.values[layer, self.rows, :, self.slot] = value
        return (self.keys[layer, :, :, :self.width], self.values[layer, :, :, :self.width],
                self.written[:, :self.width])

    def end_step(self, ended=None):
        """Count this step's token; environments whose `ended` (N,) numpy is True start over."""
        self.length += 1
        if ended is not None and ended.any():
            self.length[ended] = 0
            self.keys[:, torch.from_numpy(np.flatnonzero(ended)).to(self.keys.device)] = math.nan
        self.begin_step()


class Packing:
    """The real tokens of B rollouts one after the other, without the padding behind the shorter
    ones, which is half of a batch where rollouts end early. Only attention needs the rows.

        rows (B, T + 1, ...)   a0 a1 a2 --     pack ->     a0 a1 a2 b0 b1 b2 b3   (1, N + B, ...)
                               b0 b1 b2 b3    <- unpack
    mask (B, T): the N real transitions, on the CPU: counting those on a GPU, we would wait for it.
    now (N,): packed places of all tokens but each rollout's last; the next step's is at now + 1.
    """

    def __init__(self, mask, device="cpu"):
        there = F.pad(mask, (1, 0), value=True)                          # (B, T + 1)
        self.shape, self.full = there.shape, bool(there.all())           # full: nothing to copy
        places = [x.flatten().nonzero().squeeze(1) for x in (there, F.pad(mask, (0, 1))[there])]
        self.real, self.now = (x if str(device) == "cpu" else
                               x.pin_memory().to(device, non_blocking=True) for x in places)

    def pack(self, x):
        x = x.flatten(0, 1)
        return (x if self.full else x.index_select(0, self.real)).unsqueeze(0)

    def unpack(self, x):
        """The inverse, with zeros where nothing is."""
        if not self.full:
            x = x.new_zeros(1, self.shape.numel(), *x.shape[2:]).index_copy(1, self.real, x)
        return x[0].unflatten(0, self.shape)


def rotate(x, cos, sin):
    """Rotary positions [7]: turn each pair (x_i, x_{i + d/2}) by an angle proportional to time, so
    that a query-key product depends on how long ago, not on when. x (..., d) -> the same."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class CausalAttention(nn.Module):
    """Multi-head causal attention with a learned scale per head [3]. gamma: qkv's initial norm.

        o_h = s_h softmax(q k' / sqrt(d)) v
    """

    def __init__(self, width, heads, gamma=1.0):
        super().__init__()
        self.heads = heads
        self.qkv = SigmaLinear(width, 3 * width, bias=False)
        nn.init.constant_(self.qkv.gamma, gamma)
        self.out = SigmaLinear(width, width)
        self.head_scale = nn.Parameter(torch.ones(heads, 1, 1))

    def forward(self, x, rotation=None, cache=None, layer=0, window=None, packing=None):
        """x (B, T, D) -> (B, T, D). With a cache: T = 1, and attention is over the cache.
        rotation: cos, sin of time 10000^(-2i/d), (B, T, 1, 1, d / 2). packing: how x was packed.
        window: (T, T) bool, what may be attended to (not with a cache); None = the whole past."""
        B, T, D = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.heads, D // self.heads)
        if x.device.type == "cpu":                       # bfloat16's backward is 5 times slower
            qkv = qkv.float()
        qk, v = qkv.split((2, 1), dim=2)
        if rotation is not None:
            qk = rotate(qk, *rotation).to(v.dtype)           # the angles are in float32
        q, k, v = ((part if packing is None else packing.unpack(part)).transpose(1, 2)
                   for part in (*qk.unbind(2), v.squeeze(2)))            # 3 x (B, H, T, d)
        if cache is None:
            with torch.autocast("cpu", enabled=False):
                y = F.scaled_dot_product_attention(q, k, v, window, is_causal=window is None)
        else:
            k, v, written = cache.append(layer, k.squeeze(2), v.squeeze(2))  # (B, H, L, d)
            score = q @ k.transpose(2, 3) / math.sqrt(D // self.heads)   # (B, H, 1, L)
            y = score.masked_fill(~written[:, None, None], -math.inf).softmax(-1) @ v
        y = (self.head_scale * y).transpose(1, 2)                        # (B, T, H, d)
        return self.out((y if packing is None else packing.pack(y)).flatten(2))


class StableBlock(nn.Module):
    """One Transformer block ([1] Fig. 16): pre-norm, plus a norm after attention (LN2) and one
    inside the feed-forward (LN4), so that both branches stay bounded.

        x <- x + LN2(attention(LN1(x)))
        x <- x + W2 LN4(leaky_relu(W1 LN3(x)))
    """

    def __init__(self, width, heads, ff, gamma=1.0):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.norm4 = nn.LayerNorm(ff)
        self.attention = CausalAttention(width, heads, gamma)
        self.ff1, self.ff2 = SigmaLinear(width, ff), SigmaLinear(ff, width)

    def forward(self, x, *how):
        """x (B, T, D) -> (B, T, D); how: CausalAttention.forward's arguments after x"""
        x = x + self.norm2(self.attention(self.norm1(x), *how))
        h = F.leaky_relu(self.ff1(self.norm3(x)))                        # (B, T, ff)
        return x + self.ff2(self.norm4(h))


class Transformer(nn.Module):
    """Causal Transformer over tokens. Two ways to run it; the same weights give the same numbers:

        training   forward(x (B, T, D), time (B, T))          whole rollouts at once
        acting     forward(x (N, 1, D), time (N, 1), cache)   one token, the past from the cache

    memory: how many tokens attention reaches back, in both ways; 0 = to the first. A rollout longer
    than the context is cut into slices for training, while acting slides: there a cached key of
    layer 2 still carries what its token saw in layer 1, so acting remembers a little MORE.
    """

    def __init__(self, width, layers, heads, ff, positions="rotary", horizon=1024, memory=0):
        super().__init__()
        self.memory = memory
        assert width % (2 * heads) == 0, f"{width} does not split into {heads} heads of even size"
        self.width, self.heads, self.positions, self.horizon = width, heads, positions, horizon
        # At gamma = 1 scores of random tokens vary by .13: a fresh head takes a mean of the past,
        # in which one token of a hundred is lost. At 3 by 1.2: some head looks at the unusual one.
        # Only in the first layer: with 3 everywhere, what has to be counted is learned later.
        self.blocks = nn.ModuleList([StableBlock(width, heads, ff, gamma)
                                     for gamma in [3.0] + [1.0] * (layers - 1)])
        self.norm = nn.LayerNorm(width)
        for name, dim in (("relative", width // heads), ("absolute", width)):
            frequency = 10_000.0 ** (-torch.arange(0, dim, 2) / dim)     # (dim / 2,)
            self.register_buffer(name, frequency, persistent=False)
        if positions == "learnable":
            self.table = nn.Parameter(torch.randn(horizon + 1, width) * 0.02)

    def forward(self, x, time, cache=None, packing=None):
        """x (B, T, D), time (B, T) int: the rollout's step -> (B, T, D); packed, (1, N + B, D)"""
        assert x.shape == time.shape + (self.width,), (x.shape, time.shape)
        T = packing.shape[1] if packing else x.shape[1]                  # of an unpacked row
        rotation = window = None
        if self.positions == "learnable":
            x = x + self.table[time]
        if self.positions in ("sinusoidal", "both"):
            angle = time.unsqueeze(-1) * self.absolute                   # (B, T, D / 2)
            x = x + torch.cat([angle.sin(), angle.cos()], dim=-1)
        if self.positions in ("rotary", "both"):
            angle = time[:, :, None, None, None] * self.relative         # (B, T, 1, 1, d / 2)
            rotation = angle.cos(), angle.sin()
        if 0 < self.memory < T:
            window = x.new_ones(T, T, dtype=torch.bool).tril().triu(1 - self.memory)
        for layer, block in enumerate(self.blocks):
            x = block(x, rotation, cache, layer, window, packing)
        return self.norm(x)

    def new_cache(self, n_envs, context):
        """An empty KVCache that fits this network, on its device."""
        return KVCache(len(self.blocks), n_envs, self.heads, min(context, self.memory or context),
                       self.width // self.heads, self.relative.device)


# ==================================================================================================
# 3. Timestep encoder ([1] App. A.1)
#    All that happened at a step becomes one token: observation, previous action and reward, reset
#    flag, clock, and the instruction: in every token, so that an agent without memory can read it.
class RunningNorm(nn.Module):
    """Normalise inputs by running statistics of RAW inputs ([1] App. A.1), per dimension.

        beta_t = beta / (1 - (1 - beta)^t)      so that the first update counts fully
        mean <- (1 - beta_t) mean + beta_t E[x],    square likewise with E[x^2]
        y = (x - mean) / sqrt(square - mean^2),     only centred where that is below 0.001
        and within +-10: a first reward after 10 000 updates of zeros would read 900 and drown all
    """

    def __init__(self, dim, beta=1e-4):
        super().__init__()
        self.beta = beta
        # float64: the difference of two squares would lose a small std beside a large mean.
        for name, value in dict(mean=torch.zeros(dim), square=torch.ones(dim), count=0).items():
            self.register_buffer(name, torch.as_tensor(value, dtype=torch.float64))

    @torch.no_grad()
    def update(self, x):
        """Take in new raw inputs x (..., dim)."""
        self.count += 1
        step = self.beta / (1 - (1 - self.beta) ** self.count)
        x = x.flatten(0, -2).double()
        total = sum_over_ranks(torch.stack([y.sum(0) for y in (x, x * x, torch.ones_like(x))]))
        self.mean.lerp_(total[0] / total[2], step)
        self.square.lerp_(total[1] / total[2], step)

    def forward(self, x):
        std = (self.square - self.mean ** 2).clamp(min=0).sqrt().float()
        return ((x - self.mean.float()) / torch.where(std > 1e-3, std, 1.0)).clamp(-10, 10)


class TimestepEncoder(nn.Module):
    """One token per step from everything that happened at it: (B, T, ...) -> (B, T, D).

    The vector part is [reset flag, previous reward, time / horizon, previous action, observation],
    normalised by RunningNorm. The previous action is one-hot (zeros at the start of the rollout).
    A picture goes through a small CNN; a map of textures, and an instruction, through an embedding
    per word and a linear layer that sees all in order. The active goal stands once more in front,
    as which of K places to look at is learned slowly; with hide_plan it stands there alone."""

    def __init__(self, spec, width, hidden, hide_plan=False):
        super().__init__()
        self.spec, self.hide_plan = spec, hide_plan
        d_in = 3 + spec.actions + spec.vector
        self.norm = RunningNorm(d_in)
        if spec.image:
            layers = []
            for c_in, c_out in ((spec.image[2], 32), (32, 64), (64, 64)):    # each halves the sides
                layers += [nn.Conv2d(c_in, c_out, 3, 2, 1), nn.LeakyReLU(inplace=True)]
            pixels = math.prod(-(-side // 8) for side in spec.image[:2])
            self.image = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * pixels, hidden),
                                       nn.LayerNorm(hidden))
            d_in += hidden
        K, *word = spec.instruction or (0,)
        for name, words in (("texture", spec.texture),
                            ("instruction", K and (1 if hide_plan else K + 1, *word))):
            if words:
                *shape, vocabulary = words
                setattr(self, name, nn.Sequential(
                    nn.Embedding(vocabulary, 16), nn.Flatten(2),
                    nn.Linear(math.prod(shape) * 16, hidden), nn.LayerNorm(hidden)))
                d_in += hidden
        self.mlp = nn.Sequential(nn.Linear(d_in, hidden), nn.LeakyReLU(inplace=True),
                                 nn.Linear(hidden, width), nn.LayerNorm(width))

    def forward(self, tokens, learn=False):
        """tokens: dict of obs (dict), action, reward, reset, time, each (B, T, ...), see
        `Trajectory`; learn: update the statistics with these tokens (training only)."""
        spec, time = self.spec, tokens["time"]
        acted = (time > 0).unsqueeze(-1)                                 # (B, T, 1)
        action = F.one_hot(tokens["action"], spec.actions) if spec.discrete else tokens["action"]
        flat = torch.cat([tokens["reset"].unsqueeze(-1).float(), tokens["reward"].unsqueeze(-1),
                          time.unsqueeze(-1) / spec.horizon, action * acted]
                         + ([tokens["obs"]["vector"]] if spec.vector else []), dim=-1)
        if learn:
            self.norm.update(flat)
        parts = [self.norm(flat)]
        if spec.image:
            image = tokens["obs"]["image"].flatten(0, 1).permute(0, 3, 1, 2)   # (BT, C, H, W)
            parts.append(self.image(image / 128 - 1).unflatten(0, time.shape))
        if spec.texture:
            parts.append(self.texture(tokens["obs"]["texture"].int()))
        if spec.instruction:
            words = tokens["obs"]["instruction"]                         # (B, T, K, 1 + W)
            active = (words * (words[..., :1] == environments.ACTIVE)).sum(2, keepdim=True)
            words = active if self.hide_plan else torch.cat([active, words], 2)
            parts.append(self.instruction(words))
        return self.mlp(torch.cat(parts, dim=-1))


# ==================================================================================================
# 4. Actor, critics, PopArt ([1] App. A.2, A.4)
#    Both heads answer for all G discount factors at once: gamma = .1 is an easy problem that shapes
#    the Transformer's features within minutes, gamma = .999 is the one that we want solved.
class Actor(nn.Module):
    """G policies on one MLP: s (..., D) -> a torch distribution over actions, batch (..., G).

        discrete      Categorical over A actions
        continuous    a = tanh(m + std noise) in (-1, 1)^A,  log std = -5 + 3.5 (tanh(raw) + 1)
    """

    def __init__(self, width, actions, num_gammas, hidden, discrete=True):
        super().__init__()
        self.discrete, self.num_gammas = discrete, num_gammas
        outputs = actions if discrete else 2 * actions
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.LeakyReLU(inplace=True),
                                 nn.Linear(hidden, hidden), nn.LeakyReLU(inplace=True),
                                 nn.Linear(hidden, num_gammas * outputs))

    def forward(self, s):
        # Flat (N, D): on a 3-d input the in-place activations would make hidden copies.
        out = self.mlp(s.flatten(0, -2)).float().view(*s.shape[:-1], self.num_gammas, -1)
        if self.discrete:
            return distributions.Categorical(logits=out, validate_args=False)
        mean, raw = out.chunk(2, dim=-1)
        std = (-5 + 3.5 * (raw.tanh() + 1)).exp()
        normal = distributions.Normal(mean, std, validate_args=False)
        return distributions.TransformedDistribution(distributions.Independent(normal, 1),
                                                     distributions.TanhTransform(), False)

    def log_prob(self, pi, action):
        """What each gamma's policy makes of the same action (...) or (..., A) -> (..., G)."""
        if self.discrete:
            return pi.log_prob(action.unsqueeze(-1))
        # Noise pushed some actions to the border, where atanh is infinite.
        return pi.log_prob(action.clamp(-0.995, 0.995).unsqueeze(-2)).clamp(-1e3, 1e3)


class Critics(nn.Module):
    """C independent Q-networks for G discount factors, as one batched MLP.

        discrete      critics(s)        s (..., D)                       -> (..., C, G, A)
        continuous    critics(s, a)     a (..., A), one action           -> (..., C, G)
                      critics(s, a)     a (..., G, A), one per gamma     -> (..., C, G)

    Discrete critics never see the action: all A values come out at once, so that the value of a
    policy is an exact expectation, sum_a pi(a) Q(a).
    """

    def __init__(self, width, actions, num_gammas, num_critics, hidden, discrete=True):
        super().__init__()
        self.discrete, self.num_gammas, self.num_critics = discrete, num_gammas, num_critics
        sizes = ([width, hidden, hidden, num_gammas * actions] if discrete else
                 [width + actions, hidden, hidden, num_gammas])
        # Each critic is initialised like nn.Linear: uniform in +-1 / sqrt(fan in).
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for d_in, d_out in zip(sizes[:-1], sizes[1:]):
            bound = 1 / math.sqrt(d_in)
            self.weights.append(torch.empty(num_critics, d_in, d_out).uniform_(-bound, bound))
            self.biases.append(torch.empty(num_critics, 1, d_out).uniform_(-bound, bound))

    def forward(self, s, action=None, members=slice(None)):
        """members: indices of critics, to evaluate only those; C is then their number."""
        G, batch = self.num_gammas, s.shape[:-1]
        weights, biases = ([x[members] for x in part] for part in (self.weights, self.biases))
        C, D = len(weights[0]), s.shape[-1]
        x = s.reshape(1, -1, D).expand(C, -1, -1)                        # (C, N, D), nothing copied
        h = torch.baddbmm(biases[0], x, weights[0][:, :D])               # the state's share
        if action is not None:                                           # and the action's
            a = action.reshape(1, -1, action.shape[-1]).expand(C, -1, -1)
            h = h.unsqueeze(2) + (a @ weights[0][:, D:]).unflatten(1, (x.shape[1], -1))
        # In place on h itself: on a view of it, autograd would copy the whole tensor.
        h = F.leaky_relu(h, inplace=True).view(C, -1, h.shape[-1])       # (C, N or N G, hidden)
        h = F.leaky_relu(torch.baddbmm(biases[1], h, weights[1]), inplace=True)
        with torch.autocast(s.device.type, enabled=False):               # values in float32
            q = torch.baddbmm(biases[2], h.float(), weights[2])          # (C, rows, outputs)
        if self.discrete:
            return q.view((C,) + batch + (G, -1)).movedim(0, -3)         # (..., C, G, A)
        if action.dim() == s.dim():
            return q.view((C,) + batch + (G,)).movedim(0, -2)            # (..., C, G)
        # Row i holds the action of gamma i; only gamma i's own output of it is wanted.
        return q.view((C,) + batch + (G, G)).diagonal(dim1=-2, dim2=-1).movedim(0, -2)

    @torch.no_grad()
    def rescale(self, w, b):
        """Change the last layer so that every output q_g becomes w_g q_g + b_g; w, b (G,)."""
        w, b = (x.repeat_interleave(self.biases[-1].shape[-1] // self.num_gammas) for x in (w, b))
        self.weights[-1].mul_(w)
        self.biases[-1].mul_(w).add_(b)


class PopArt(nn.Module):
    """Learn values on one scale, whatever the rewards [4]: normalised targets, kept outputs.

        normalize(y) = (y - mean) / std        call: w x + b, the raw output x on that scale
        on new statistics    w <- w std_old / std_new
                             b <- (std_old b + mean_old - mean_new) / std_new
        so that denormalize(w x + b) is the same number before and after.

    In an update: y = r + gamma denormalize(popart(target q)), then update(y), then the loss between
    popart(q) and normalize(y); at last w and b may move into the network, see Agent.fold_popart.
    mean and std are running ones per gamma (the first counts fully), of real steps only. Before
    the first update std is at its floor: all values count as 0, so the first targets are rewards.
    Here it keeps critic and actor losses at a fixed ratio, so that no reward scale needs tuning.
    """

    def __init__(self, num_gammas, beta=5e-4):
        super().__init__()
        self.beta = beta
        for name, value in dict(mean=0.0, square=0.0, w=1.0, b=0.0).items():
            self.register_buffer(name, torch.full((num_gammas,), value))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    @property
    def std(self):
        """(G,). At least a tenth of the targets' size: a near-constant must not be blown up."""
        variance = torch.maximum(self.square - self.mean ** 2, 0.01 * self.square)
        return variance.sqrt().clamp(1e-4, 1e6)

    @torch.no_grad()
    def update(self, targets, mask=None):
        """targets (..., G): take in those where mask is True (at least one), rescale w and b."""
        y = targets.flatten(0, -2) if mask is None else targets[mask]    # (N, G)
        self.count += 1
        step = (self.beta / (1 - (1 - self.beta) ** self.count)).float()
        total = torch.stack([z.sum(0) for z in (y, y ** 2, torch.ones_like(y))])     # (3, G)
        if torch.distributed.is_initialized():               # one statistic in all processes
            torch.distributed.all_reduce(total)
        old_mean, old_std = self.mean.clone(), self.std
        self.mean.lerp_(total[0] / total[2], step)
        self.square.lerp_(total[1] / total[2], step)
        # With std at its floor all targets were below .001 or so: too little to keep, and shrinking
        # w by the ratio of the two would all but erase the critics.
        fresh, std = old_std <= 1e-4, self.std
        self.b.copy_(torch.where(fresh, self.b, (old_std * self.b + old_mean - self.mean) / std))
        self.w.copy_(torch.where(fresh, self.w, self.w * old_std / std))

    def normalize(self, values):
        return (values - self.mean) / self.std

    def denormalize(self, normalized):
        return normalized * self.std + self.mean

    def forward(self, raw):
        return self.w * raw + self.b


# ==================================================================================================
# 5. Losses ([1] App. A.2)
#    Written as plain functions of tensors, so that each can be checked by hand and copied.
def td_targets(reward, done, next_value, gammas):
    """One-step TD targets for every discount factor at once.

        y_g = r + gamma_g (1 - d) V_g(s')

    reward (...), done (...) bool, next_value (..., G), gammas (G,) -> (..., G)
    r = 1, d = 0, V(s') = (2, 4), gammas (.5, .9) -> (2.0, 4.6);  with d = 1 -> (1, 1)
    """
    going_on = (~done).unsqueeze(-1)
    return reward.unsqueeze(-1) + gammas * going_on * next_value


def critic_loss(q, target):
    """Mean squared TD error of what PopArt normalised: q (..., C, G), target (..., G) -> scalar"""
    return ((q - target.unsqueeze(-2)) ** 2).mean()


def actor_loss(value, log_prob, advantage):
    """The two actor terms, each averaged over steps and gammas.

        online   -min_c PopArt(Q_c(s, pi))            climb the critics, as in DDPG
        offline  -1[A > 0] log pi(a | s)              filtered behaviour cloning [6]: imitate what
                  A = mean_c Q_c(s,a) - mean_c Q_c(s,pi)      the buffer did better than the policy

    value (..., C, G), log_prob (..., G), advantage (..., G) -> two scalars
    """
    online = -value.amin(-2).mean()
    offline = -torch.where(advantage > 0, log_prob, 0.0).mean()
    return online, offline


# ==================================================================================================
# 6. Agent
#    One forward pass of the Transformer over B whole rollouts serves every loss:
#
#      tokens 0..T --> encoder --> Transformer --> s_0 .. s_T
#                                                   |-> critics(s_t) ----- TD loss x 10
#                                                   |     ^ target = r + gamma target(s_t+1)
#                                                   |-> actor(s_t) ------- -min_c Q(stop(s_t), pi)
#                                                                          0.1 x filtered cloning
#
#    Who learns from what ([1] App. A.1; the shared update is unstable otherwise):
#                              encoder, Transformer    actor    critics
#      TD loss                         yes               -        yes
#      online actor loss       through the actor        yes        NO
#      filtered cloning        through the actor        yes        NO
#    Target networks (slow copies) exist for actor and critics only; they read the online s_t+1.
CRITIC_WEIGHT, ONLINE_WEIGHT, OFFLINE_WEIGHT = 10.0, 1.0, 0.1    # [1] Table 4


class Agent(nn.Module):
    """Encoder, Transformer, actor, critics, their targets and PopArt, for a Spec and a Config."""

    def __init__(self, spec, config):
        super().__init__()
        dims, critics, G = SIZES[config.size], config.critics, len(config.gammas)
        self.spec, self.n_step, width, hidden = spec, config.n_step, dims["width"], dims["hidden"]
        self.register_buffer("gammas", torch.tensor(config.gammas), persistent=False)
        self.encoder = TimestepEncoder(spec, width, hidden, config.hide_plan)
        self.transformer = Transformer(width, dims["layers"], dims["heads"], dims["ff"],
                                       config.positions, spec.horizon, config.memory)
        self.actor = Actor(width, spec.actions, G, hidden, spec.discrete)
        self.critics = Critics(width, spec.actions, G, critics, hidden, spec.discrete)
        self.target_actor = copy.deepcopy(self.actor).requires_grad_(False)
        self.target_critics = copy.deepcopy(self.critics).requires_grad_(False)
        self.popart = PopArt(G)

    @torch.no_grad()
    def update_targets(self, tau):
        """target <- (1 - tau) target + tau online, for the heads only."""
        for target, online in ((self.target_actor, self.actor),
                               (self.target_critics, self.critics)):
            torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), tau)

    @torch.no_grad()
    def fold_popart(self):
        """After an update, move PopArt's w and b into the critics' last layers, as in [4]. Left
        outside, w scales every later step of Adam, and a task with tiny rewards never learns."""
        for critics in (self.critics, self.target_critics):
            critics.rescale(self.popart.w, self.popart.b)
        self.popart.w.fill_(1.0)
        self.popart.b.zero_()

    def keep(self):
        """For an agent that only acts, see SigmaLinear.keep."""
        self.apply(lambda layer: layer.keep() if isinstance(layer, SigmaLinear) else None)

    def trunk(self, tokens, cache=None, packing=None):
        """tokens -> s (B, T+1, D); packed, (1, N + B, D), and the input statistics learn."""
        x = self.encoder(tokens, learn=packing is not None)
        return self.transformer(x, tokens["time"], cache, packing)

    @torch.inference_mode()
    def act(self, tokens, cache):
        """One step's tokens (N, 1, ...), see Collector.act -> the last gamma's actions (N, ...)"""
        assert not self.training, "act in eval mode: a training forward changes sigma's u and v"
        pi = self.actor(self.trunk(tokens, cache=cache)[:, 0])           # batch (N, G)
        if not self.spec.discrete:
            return pi.rsample()[:, -1]
        # As pi.sample() draws, the largest of p / Exp(1), but without checks that a GPU waits for.
        action = (pi.probs / torch.empty_like(pi.probs).exponential_()).argmax(-1)
        return torch.where(pi.probs[..., 0].isnan(), -1, action)[:, -1]  # -1 = none, an error

    def forward(self, *args):
        return self.loss(*args)    # DistributedDataParallel wraps calls

    def loss(self, batch, pair=None, packing=None):
        """For a batch of ReplayBuffer.sample -> (scalar, dict of scalars); moves all statistics.

            L = 10 L_TD + L_online + 0.1 L_offline

        pair (2,): the target's critics, by default random; packing: the batch's, see Learner."""
        packing = packing or Packing(batch["mask"], self.gammas.device)
        tokens = each(packing.pack, dict(batch["tokens"], done=F.pad(batch["done"], (1, 0))))
        states = self.trunk(tokens, packing=packing)[0].float()          # (N + B, D)
        s, later = states.index_select(0, packing.now), packing.now + 1  # (N, D), (N,)
        action, reward, done = (tokens[name][0, later] for name in ("action", "reward", "done"))
        N, G, C = len(s), len(self.gammas), self.critics.num_critics
        target = self.td_target(states[later], reward, done, pair, packing.now)      # (N, G)
        self.popart.update(target)
        # q: the critics at the action that was taken. v: at the policy's, with neither the critics
        # nor s in the graph, so that the actor's losses reach the trunk through pi alone.
        pi = self.actor(s)
        if self.spec.discrete:
            q_all = self.critics(s)                                      # (N, C, G, A)
            index = action[:, None, None, None].expand(N, C, G, 1)
            q = q_all.gather(-1, index).squeeze(-1)
            v = (q_all.detach() * pi.probs.unsqueeze(1)).sum(-1)
        else:
            q = self.critics(s, action)
            frozen = {name: p.detach() for name, p in self.critics.named_parameters()}
            v = torch.func.functional_call(self.critics, frozen, (s.detach(), pi.rsample()))
        assert q.shape == v.shape == (N, C, G), (q.shape, v.shape)
        advantage, log_prob = (q.mean(1) - v.mean(1)).detach(), self.actor.log_prob(pi, action)
        assert advantage.shape == log_prob.shape == (N, G), log_prob.shape
        td = critic_loss(self.popart(q), self.popart.normalize(target))
        online, offline = actor_loss(self.popart(v), log_prob, advantage)
        info = dict(critic_loss=td, actor_loss=online, bc_loss=offline,
                    filter=(advantage > 0).float().mean(), value=target[:, -1].mean())
        # The mean over all processes must weigh every step the same, not every process.
        share = N * world_size() / sum_over_ranks(s.new_full((), N))
        return (share * (CRITIC_WEIGHT * td + ONLINE_WEIGHT * online + OFFLINE_WEIGHT * offline),
                {name: x.detach() for name, x in info.items()})

    @torch.no_grad()
    def td_target(self, after, reward, done, pair=None, now=None):
        """after (N, D), the next states; reward, done, now (N,), see Packing -> targets (N, G)"""
        pi = self.target_actor(after)
        # REDQ [5]: the lower of two critics, drawn anew for every update. The lowest of all would
        # be too pessimistic, their mean too optimistic.
        pair = torch.randperm(self.critics.num_critics)[:2] if pair is None else pair
        if self.spec.discrete:
            q = (self.target_critics(after, members=pair) * pi.probs.unsqueeze(-3)).sum(-1)
        else:
            q = self.target_critics(after, pi.rsample(), members=pair)   # sample(): a GPU waits
        assert q.shape == done.shape + (2, len(self.gammas)), q.shape
        value = self.popart.denormalize(self.popart(q.amin(-2)))
        y = td_targets(reward, done, value, self.gammas)
        # n steps: the target of the next step in place of V(s'), where the slice goes on.
        for _ in range(self.n_step - 1):
            onward = F.pad(now.diff() == 1, (0, 1)).unsqueeze(-1)        # (N, 1)
            y = td_targets(reward, done, torch.where(onward, y.roll(-1, 0), value), self.gammas)
        return y


# ==================================================================================================
# 7. Replay ([1] section 4: whole trajectories, sampled uniformly)
@dataclasses.dataclass
class Trajectory:
    """One whole rollout of T transitions, hence T + 1 tokens.

        step t              0            1            2                  T
        token t          obs_0        obs_1        obs_2      ...     obs_T      T + 1
                         reset_0      reset_1      reset_2            reset_T    T + 1
                         (none)       action_0     action_1           action_T-1   what led here
                         (0)          reward_0     reward_1           reward_T-1
        transition t   action_0 --> action_1 --> action_2 ...                    T
                       reward_0     reward_1     reward_2                        T
                       done_0       done_1       done_2                          T

    So token t holds what is known when action_t is chosen, and reward_t is first seen in token
    t + 1. done = "nothing after this counts"; reset marks the first token of an inner episode.
    """
    obs: dict               # part name -> (T + 1, ...)
    action: np.ndarray      # (T,) int64 or (T, A) float32
    reward: np.ndarray      # (T,) float32
    done: np.ndarray        # (T,) bool
    reset: np.ndarray       # (T + 1,) bool
    achieved: np.ndarray = None  # (T, M, W) int32: goals that each step reached; zeros = none
    success: float = math.nan
    episode: object = None  # begins this episode of the environment again, see envs.py

    def __len__(self):
        return len(self.reward)

    def tokens(self):
        """The same as arrays of T + 1 tokens, see Spec.token_arrays in envs.py."""
        led_to = dict(action=self.action, reward=self.reward, done=self.done)
        if self.achieved is not None:
            led_to["achieved"] = self.achieved
        first = {name: np.concatenate([np.zeros_like(x[:1]), x]) for name, x in led_to.items()}
        return dict(first, obs=self.obs, reset=self.reset)

    @staticmethod
    def of_tokens(tokens, **more):
        """The inverse of `tokens`; more: the fields that are not arrays."""
        led_to = {name: x[1:] for name, x in tokens.items() if name not in ("obs", "reset")}
        return Trajectory(tokens["obs"], reset=tokens["reset"], **led_to, **more)


class ReplayBuffer:
    """Whole trajectories, first in first out: (start, length) in flat ring arrays of tokens.

    relabel: a function Trajectory -> Trajectory, applied to every rollout that is drawn.
    rarity: a GoalRarity, which counts the goals of every rollout that comes in."""

    def __init__(self, spec, capacity, rng, relabel=None, rarity=None):
        self.spec, self.capacity, self.rng = spec, capacity, rng
        self.relabel, self.rarity = relabel, rarity
        if capacity < spec.horizon + 1:
            raise UsageError(f"--buffer-steps {capacity} is less than one rollout of this"
                             f" environment; the least is {spec.horizon + 1}")
        self.tokens = spec.token_arrays(capacity)
        # Ring of trajectories: the oldest is at `first`, there are `count`.
        self.starts, self.lengths = np.zeros((2, capacity // 2 + 1), np.int64)
        self.first = self.count = self.write = 0
        self.replayed = 0                                # transitions handed out so far

    def __len__(self):
        return self.count

    def _evict(self, low, high):
        """Drop the oldest trajectories for as long as they touch tokens low..high-1."""
        while self.count:
            start = self.starts[self.first]
            if start >= high or start + self.lengths[self.first] + 1 <= low:
                return
            self.first = (self.first + 1) % len(self.starts)
            self.count -= 1

    def add(self, trajectory):
        """Copy a trajectory of at most capacity - 1 steps in; the oldest make room."""
        size = len(trajectory) + 1
        if self.write + size > self.capacity:            # trajectories never wrap around the end
            self._evict(self.write, self.capacity)
            self.write = 0
        self._evict(self.write, self.write + size)
        here = slice(self.write, self.write + size)
        each(lambda store, x: np.copyto(store[here], x), self.tokens, trajectory.tokens())
        if self.rarity:
            self.rarity.update(trajectory.achieved)
        slot = (self.first + self.count) % len(self.starts)
        self.starts[slot], self.lengths[slot] = self.write, size - 1
        self.count += 1
        self.write += size

    def sample(self, batch, context, device="cpu"):
        """B rollouts drawn uniformly; of one longer than `context`, a random slice that long.

        -> dict(tokens=dict(obs=dict, action, reward, reset, time), each (B, T+1, ...),
                done (B, T)) on `device`, mask (B, T) on the CPU. T is the longest of the B."""
        rollouts = []
        for i in (self.first + self.rng.integers(self.count, size=batch)) % len(self.starts):
            start, end = self.starts[i], self.starts[i] + self.lengths[i] + 1
            tokens = each(lambda x: x[start:end], self.tokens)           # views, nothing copied
            if self.relabel:
                tokens = self.relabel(Trajectory.of_tokens(tokens)).tokens()
            rollouts.append(tokens)
        whole = np.array([len(tokens["reset"]) - 1 for tokens in rollouts])
        length = np.minimum(whole, context)                              # (B,)
        offset = self.rng.integers(whole - length + 1)                   # (B,)
        steps = np.arange(length.max() + 1)
        out = self.spec.token_arrays(batch, len(steps))
        for b, tokens in enumerate(rollouts):
            here = slice(offset[b], offset[b] + length[b] + 1)
            each(lambda x, y: np.copyto(x[b, :length[b] + 1], y[here]), out, tokens)
        self.replayed += int(length.sum())

        def tensor(x):
            x = torch.from_numpy(np.ascontiguousarray(x))    # else its pinned copy is not used
            return x if str(device) == "cpu" else x.pin_memory().to(device, non_blocking=True)
        out.pop("achieved", None)
        out["time"] = offset[:, None] + np.minimum(steps, length[:, None])       # (B, T+1)
        mask = torch.from_numpy(steps[:-1] < length[:, None])            # on the CPU, see Packing
        return dict(each(tensor, dict(tokens=out, done=out.pop("done")[:, 1:])), mask=mask)

    def state(self):
        """For a checkpoint: the trajectories from the oldest on, and the tokens that are in use."""
        order = (self.first + np.arange(self.count)) % len(self.starts)
        starts, lengths = self.starts[order], self.lengths[order]
        used = max(starts + lengths + 1, default=0)
        return dict(tokens=each(lambda x: x[:used], self.tokens), starts=starts, lengths=lengths,
                    write=self.write, replayed=self.replayed,
                    rarity=json.dumps(self.rarity and self.rarity.state()))

    def restore(self, state):
        """Into an empty buffer of the same capacity: what `state` gave, as tensors."""
        self.count, self.replayed = len(state["starts"]), state["replayed"]
        self.write = state["write"]
        self.starts[:self.count], self.lengths[:self.count] = state["starts"], state["lengths"]
        each(lambda mine, saved: np.copyto(mine[:len(saved)], saved), self.tokens, state["tokens"])
        if self.rarity:
            self.rarity.restore(json.loads(state["rarity"]))


# ==================================================================================================
# 8. Hindsight instruction relabeling ([1] section 4, Algorithm 1)
#    A rollout that failed at its instruction is a perfect example of how to do what it did instead.
#    So pretend that this was asked for: goals that were missed give way to goals that were met.
def relabel(trajectory, reward_fn, show_fn, rng, scheme="some", rarity=None):
    """Algorithm 1 -> a new Trajectory, or the one given, never touched, if nothing is to be done.
    achieved[t]: the goals that step t reached, then rows of 0; a reward: the next one was there.

    reward_fn(instruction (K, W), progress, achieved (M, W)) -> (reward, new progress)
    show_fn(instruction, progress) -> what the agent sees of it, (K, 1 + W)
    scheme: some = a random number of missed goals, all = as many as can be, none.
    rarity: a GoalRarity, to prefer goals that are rarely met; None = any step is as good."""
    goals = trajectory.obs["instruction"][0, :, 1:]                      # (K, W)
    k, T = int((goals[:, 0] != 0).sum()), len(trajectory)
    reached = trajectory.achieved                                        # (T, M, W)
    # (1) n of the k goals were completed, at the steps `paid`.
    paid = np.flatnonzero(trajectory.reward)
    n = len(paid)
    # (2) Draw how many goals h to add,
    h = dict(none=0, some=int(rng.integers(k - n + 1)), all=k - n)[scheme]
    # (3) and so many other steps that reached something, with one of its goals each.
    busy = np.flatnonzero(reached[:, 0, 0])                              # steps that reached any
    others = np.setdiff1d(busy, paid)
    h = min(h, len(others))
    if h == 0:
        return trajectory
    if rarity is None:
        steps = rng.choice(others, size=h, replace=False)
        chosen = [rng.choice(reached[t][reached[t][:, 0] != 0]) for t in steps]
    else:
        steps, chosen = rarity.choose(reached, others, h, rng)
    # (4) Merge them with the completed ones in order of time; the tail stays as it was.
    met = sorted([*zip(paid, goals), *zip(steps, chosen)], key=lambda pair: pair[0])
    instruction = np.stack([goal for _, goal in met] + list(goals[n + h:]))
    # (5) Replay: rewards, what the agent sees, and the end, which now may come earlier.
    reward, ended, progress = np.zeros(T, np.float32), trajectory.done.copy(), 0
    shown = np.tile(show_fn(instruction, 0), (T + 1, 1, 1))
    for t in busy:
        reward[t], progress = reward_fn(instruction, progress, reached[t])
        if reward[t]:
            shown[t + 1:] = show_fn(instruction, progress)
        if progress == k:
            ended[t], T = True, t + 1
            break
    obs = {name: x[:T + 1] for name, x in dict(trajectory.obs, instruction=shown).items()}
    return dataclasses.replace(
        trajectory, obs=obs, action=trajectory.action[:T], reward=reward[:T], done=ended[:T],
        reset=trajectory.reset[:T + 1], achieved=reached[:T], success=float(progress == k))


# ==================================================================================================
# 9. Rollouts and exploration ([1] App. A.2, Fig. 13)
class Exploration:
    """The randomised bi-level epsilon schedule, which may begin late in a rollout.

        epsilon = m [e_start - (e_start - e_end) (t - b) / horizon]   from step b on; before it, 0
        m ~ U(0, 1);   b = 0 or, equally likely, L - L^U(0, 1), L the length of the last rollout

    e_start falls from 1 to .05, e_end from .8 to .01 over `anneal` env steps; if that is 0, as the
    last of: 200 000 env steps, 2000 rollouts, 100 rollouts with a reward. Noise fades within a
    rollout, too: late steps need an early part played well; a late b tries them after it.
    Discrete: a uniform action with probability epsilon. Continuous: + epsilon N(0, 1), b = 0."""

    def __init__(self, spec, n_envs, anneal, rng):
        self.spec, self.anneal, self.rng = spec, anneal, rng
        self.begun = self.barren = n_envs * world_size()   # rollouts; those without a reward, yet
        self.plan = self.draw(np.full(n_envs, spec.horizon))

    def draw(self, length):
        """length (n,) -> (2, n): m and b of n rollouts"""
        multiplier, late, u = self.rng.uniform(size=(3, len(length)))
        return np.stack([multiplier, (late < 0.5 * self.spec.discrete) * (length - length ** u)])

    def epsilon(self, time, env_steps):
        """time (N,) steps since each rollout's start, env_steps so far -> (N,)"""
        done = min(1, env_steps / self.anneal if self.anneal else min(
            env_steps / 200_000, self.begun / 2000, (1 + self.begun - self.barren) / 100))
        start, end = 1.0 + (0.05 - 1.0) * done, 0.8 + (0.01 - 0.8) * done
        multiplier, fade = self.plan[0], (time - self.plan[1]) / self.spec.horizon
        return np.where(fade >= 0, multiplier * (start - (start - end) * fade), 0.0)

    def __call__(self, action, time, env_steps):
        """actions (N,) or (N, A) -> the same with noise"""
        epsilon = self.epsilon(time, env_steps)
        if self.spec.discrete:
            other = self.rng.integers(self.spec.actions, size=len(action))
            return np.where(self.rng.uniform(size=len(action)) < epsilon, other, action)
        noise = self.rng.normal(size=action.shape).astype(np.float32)
        return np.clip(action + epsilon[:, None].astype(np.float32) * noise, -1, 1)

    def reset(self, ended, length, barren):
        """Draw anew where `ended` (N,) is True: rollouts of length (N,), `barren` got no reward."""
        self.plan[:, ended] = self.draw(length[ended])
        self.begun += int(ended.sum()) * world_size()
        self.barren += barren * world_size()


class Collector:
    """N environments side by side, one batched token per step. `act` starts a step in all of them,
    `receive` ends it and returns the rollouts that ended; between the two, worker processes step
    while the caller learns. Rollouts in the making lie in token_arrays of (N, horizon + 1, ...).

    env: a name, made N times with seeds seed, seed + 1, ...; context: tokens that the cache
    holds; exploration: an Exploration, None = no noise; workers: see ParallelEnvs."""

    def __init__(self, env, n_envs, agent, context, seed, exploration=None,
                 bootstrap_truncated=False, workers=0):
        self.envs = environments.ParallelEnvs(env, seed + np.arange(n_envs), workers)
        self.agent, self.spec = agent, agent.spec
        self.exploration, self.bootstrap_truncated = exploration, bootstrap_truncated
        # A slice of `context` transitions trains actions that saw at most `context` tokens.
        self.cache = cache = agent.transformer.new_cache(n_envs, min(context, self.spec.horizon))
        self.decide = Recorded(lambda tokens: agent.act(tokens, cache),
                               cache.static and world_size() == 1)
        self.tokens = self.spec.token_arrays(n_envs, self.spec.horizon + 1)
        self.time, self.rows = np.zeros(n_envs, np.int64), np.arange(n_envs)
        self.episode = [None] * n_envs                   # what begins each one's episode again
        self.env_steps, self.waiting = 0, False          # env_steps: of all processes of the run
        for i, first in enumerate(self.envs.call("begin_all")):
            self._begin(i, *first)

    def act(self):
        """Choose an action everywhere, given the newest tokens, and start the step."""
        newest = dict(each(lambda x: x[self.rows, self.time], self.tokens), time=self.time)
        newest = each(lambda x: torch.from_numpy(x[:, None]).to(self.cache.rows.device), newest)
        action = self.decide(newest).cpu().numpy()
        if self.exploration:
            action = self.exploration(action, self.time, self.env_steps)
        self.time += 1
        self.tokens["action"][self.rows, self.time] = action
        self.envs.send("step", self.spec.to_env(action))
        self.waiting = True

    def receive(self):
        """End the step. -> [(environment, Trajectory)] of the rollouts that just ended"""
        finished, ended, length = [], np.zeros(len(self.rows), bool), self.time.copy()
        for i, (obs, reward, terminated, truncated, info, first) in enumerate(self.envs.receive()):
            t = self.time[i]
            self._store(i, t, obs)
            self.tokens["reward"][i, t] = reward
            self.tokens["done"][i, t] = terminated or (truncated and not self.bootstrap_truncated)
            self.tokens["reset"][i, t] = info.get("reset", False)
            if "achieved" in self.tokens:
                row, achieved = self.tokens["achieved"][i, t], info["achieved"]
                row[:len(achieved)], row[len(achieved):] = achieved, 0
            if terminated or truncated:
                rollout = each(lambda x: x[i, :t + 1].copy(), self.tokens)
                finished.append((i, Trajectory.of_tokens(
                    rollout, success=float(info.get("success", math.nan)),
                    episode=self.episode[i])))
                ended[i] = True
                self._begin(i, *first)
        self.env_steps += len(self.rows) * world_size()
        self.cache.end_step(ended)
        if self.exploration:
            self.exploration.reset(ended, length, sum(not x.reward.any() for _, x in finished))
        self.waiting = False
        return finished

    def step(self):
        """Act once in every environment, see `receive`."""
        self.act()
        return self.receive()

    def _store(self, i, t, observation):
        for part, store in self.tokens["obs"].items():
            store[i, t] = observation[part] if isinstance(observation, dict) else observation

    def _begin(self, i, observation, episode):
        """Write the first token of environment i's new rollout."""
        self.time[i], self.episode[i] = 0, episode
        self._store(i, 0, observation)
        for name, first in (("action", 0), ("reward", 0), ("done", False), ("reset", True)):
            self.tokens[name][i, 0] = first

    def state(self):
        """For a checkpoint; nothing of environments that broke, or whose worker is gone."""
        counts = dict(env_steps=self.env_steps, begun=self.exploration.begun,
                      barren=self.exploration.barren)
        if self.waiting or (envs := self.envs.state()) is None:
            return counts
        return dict(counts, tokens=each(lambda x: x[:, :self.time.max() + 1], self.tokens),
                    time=self.time, length=self.cache.length, episode=json.dumps(self.episode),
                    noise=self.exploration.plan, envs=json.dumps(envs),
                    keys=self.cache.keys.cpu(), values=self.cache.values.cpu())

    def restore(self, state):
        """What `state` gave, as tensors; for rollouts that cannot be brought back, others begin."""
        self.env_steps, noise = state["env_steps"], self.exploration     # earlier ones may lack:
        noise.begun, noise.barren = state.get("begun", noise.begun), state.get("barren", 0)
        others = self.envs.restore(json.loads(state.get("envs", "[]")), self.env_steps)
        for i, first in enumerate(others):
            self._begin(i, *first)
        if not others:
            each(lambda mine, saved: np.copyto(mine[:, :saved.shape[1]], saved), self.tokens,
                 state["tokens"])
            self.time, self.episode = state["time"].numpy(), json.loads(state["episode"])
            noise.plan = state["noise"].numpy()
            self.cache.keys.copy_(state["keys"])
            self.cache.values.copy_(state["values"])
            self.cache.length = state["length"].numpy()
            self.cache.begin_step()


def evaluate(agent, env, episodes, context=1024, seed=0, max_envs=32, stop=lambda: False):
    """Play whole episodes with the stochastic policy of the last gamma, without noise -> what
    `summary` in envs.py explains; None if stop() came true. How many each environment plays is
    fixed: the first to end would be short ones. Same seed, same result; training's state stays."""
    n_envs, was_training, played = min(episodes, max_envs), agent.training, []
    agent.eval()
    with torch.random.fork_rng([d for d in (agent.gammas.device,) if d.type == "cuda"]):
        torch.manual_seed(seed)
        collector = Collector(env, n_envs, agent, context, seed)
        left = episodes // n_envs + (np.arange(n_envs) < episodes % n_envs)
        with environments.progress_bar(left.max() * agent.spec.horizon, process_rank() == 0,
                                       delay=3) as bar:      # full if no episode ends early
            while left.max() > 0 and not stop():
                for i, trajectory in collector.step():
                    if left[i] > 0:
                        played.append(trajectory)
                    left[i] -= 1
                bar.update()
    agent.train(was_training)
    return environments.summary(played) if left.max() <= 0 else None


# ==================================================================================================
# 10. Training
#    Act once in every environment; learn until every step has been replayed `replay_ratio` times on
#    average; from time to time evaluate. What a run writes goes through Log and save_checkpoint.
class Learner:
    """The one optimiser, AdamW over everything that learns, with warm-up and clipping.

    `agent` learns; `average`, a running average of its weights, acts, is evaluated and is saved.

        average <- (1 - r) average + r agent,    r = max(.01, 30 / (updates + 30))
    """

    def __init__(self, agent, config):
        self.agent, self.config, self.updates = agent, config, 0
        self.average = copy.deepcopy(agent).requires_grad_(False).eval()
        self.average.keep()
        self.started = self.begun = None   # env steps when learning began; an update not yet ended
        self.device = agent.gammas.device
        self.trainable = [p for p in agent.parameters() if p.requires_grad]
        gpu = self.device.type == "cuda"
        self.optimizer = torch.optim.AdamW(                  # a rate that a Recorded step can read
            self.trainable, torch.tensor(config.lr, device=self.device), fused=True,
            weight_decay=config.weight_decay, capturable=gpu)
        # bfloat16 where it is faster: on a GPU or CPU that has it, for tiny sizes not on a CPU.
        faster = (torch.cuda.is_bf16_supported(False) if gpu else agent.transformer.width >= 128
                  and torch.cpu.get_capabilities().get("avx512_bf16", False))
        self.autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=(
            config.amp == "on" or config.amp == "auto" and faster))
        self.forward = agent
        if config.compile:        # agent(batch), the loss; acting stays as it is
            environments.check_compiler()
            agent.compile()
        if world_size() > 1:      # averages the gradients; `loss` sees to statistics and counts
            self.forward = nn.parallel.DistributedDataParallel(self.forward)
            self.forward.broadcast_buffers = False           # the statistics agree by themselves
        self.gradient_again, self.step_again = (
            Recorded(part, gpu and world_size() == 1) for part in (self.gradient, self.step))

    def update(self, batch):
        """One gradient update on a batch from ReplayBuffer.sample -> dict of detached scalars, on
        a GPU overwritten by the next. Raises NonFiniteLoss, with the agent as it was before."""
        self.begin_update(batch)
        return self.end_update()

    def begin_update(self, batch):
        """The first part of `update`, in which nothing waits for a GPU: up to the gradient."""
        # A function of the update's number, so that all processes draw the same pair of critics.
        rng = np.random.default_rng((self.config.seed, self.updates))
        pair = torch.from_numpy(rng.permutation(self.config.critics)[:2])
        inputs = dict(batch, pair=pair.to(self.device, non_blocking=True))
        packing = Packing(batch["mask"], self.device)        # cannot be compiled
        gradient = self.gradient_again if packing.full else self.gradient_again.plain
        self.begun = batch, *gradient(inputs, packing)

    def gradient(self, inputs, packing):
        """-> loss, norm, the buffers (running statistics, sigma's u and v) as they were, info. On
        a GPU this and all that it calls is recorded: a `print` is seen four times."""
        before = [x.clone() for x in self.agent.buffers()]
        self.agent.train()
        with self.autocast:
            loss, info = self.forward(inputs, inputs["pair"], packing)
        self.agent.eval()
        self.optimizer.zero_grad(set_to_none=self.device.type == "cpu")  # else in place: Recorded
        loss.backward()
        norm = info["grad_norm"] = nn.utils.clip_grad_norm_(self.trainable, self.config.grad_clip)
        return loss.detach(), norm, before, info

    def end_update(self):
        """The second part, if there was a first: wait for the gradient, take the step -> info."""
        if self.begun is None:
            return {}
        (batch, loss, norm, before, info), self.begun = self.begun, None
        if not torch.isfinite(sum_over_ranks(loss + norm)):
            torch._foreach_copy_(list(self.agent.buffers()), before)
            raise NonFiniteLoss(environments.describe_batch(batch, loss, norm, self.updates))
        self.updates += 1
        now = dict(lr=self.config.lr * min(1.0, self.updates / self.config.warmup),
                   r=max(0.01, 30 / (self.updates + 30)))
        self.step_again({name: torch.full((), x, device=self.device) for name, x in now.items()})
        return info

    @torch.no_grad()
    def step(self, now):
        """Take the optimiser's step and move the average; now: the learning rate lr and r."""
        self.optimizer.param_groups[0]["lr"].copy_(now["lr"])
        self.optimizer.step()
        self.average.critics.rescale(self.agent.popart.w, self.agent.popart.b)
        self.agent.fold_popart()
        self.agent.update_targets(self.config.tau)
        average = list(self.average.parameters())
        torch._foreach_lerp_(average, list(self.agent.parameters()), [now["r"]] * len(average))
        torch._foreach_copy_(list(self.average.buffers()), list(self.agent.buffers()))
        self.average.keep()

    def state(self):
        """For a checkpoint: what learns, what acts, and how far they have come."""
        with contextlib.suppress(NonFiniteLoss):         # an environment broke in its middle
            self.end_update()
        return dict(agent=self.agent.state_dict(), average=self.average.state_dict(),
                    optimizer=self.optimizer.state_dict(), updates=self.updates,
                    started=self.started)

    def restore(self, state):
        """Into a Learner for the same Spec and Config that has made no update."""
        self.agent.load_state_dict(state["agent"])
        self.average.load_state_dict(state["average"])
        self.average.keep()
        mine, saved = self.optimizer.state_dict(), state["optimizer"]
        mine["param_groups"][0]["lr"].fill_(saved["param_groups"][0]["lr"])  # stays on this device
        self.optimizer.load_state_dict(dict(saved, param_groups=mine["param_groups"]))
        self.updates, self.started = state["updates"], state["started"]


# Several processes (torchrun): each has its own environments and replay buffer; gradients and
# statistics are averaged over all of them; all evaluate alike, and the first, rank 0, writes.
def join_processes():
    """Under torchrun, meet the other processes: NCCL between GPUs, Gloo for what is on the CPU."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")


def world_size():
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def process_rank():
    """Which of them this one is; 0 writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def sum_over_ranks(x):
    """Sum of a tensor (in place) or number over all processes: the same in each of them."""
    if world_size() > 1:
        total = x if torch.is_tensor(x) else torch.tensor(float(x))
        dist.all_reduce(total)
        x = total if torch.is_tensor(x) else total.item()
    return x


def train(config, saved=None):
    """The main job -> the folder that holds everything it wrote. saved: a checkpoint to go on from.
    Raises UsageError before anything is written; KeyboardInterrupt after Ctrl-C, NonFiniteLoss and
    BrokenEnvironment after saving what can be saved, see save_run."""
    join_processes()
    device, rank = config.torch_device(), process_rank()
    set_up_memory()
    torch.set_num_threads(config.threads or torch.get_num_threads())
    torch.manual_seed(config.seed)                            # every process begins with one agent
    env = environments.make_env(config.env)
    spec = Spec.of(env)
    agent = Agent(spec, config).to(device).eval()
    torch.manual_seed(config.seed + 2**32 * rank)             # and goes its own way from here
    rng = np.random.default_rng((config.seed, rank))
    learner = Learner(agent, config)
    buffer = ReplayBuffer(spec, config.buffer_steps, rng, *hindsight(config, env, rng))
    enough = min(config.parallel_envs, -(-config.buffer_steps // (2 * spec.horizon + 2)))
    exploration = Exploration(spec, config.parallel_envs, config.explore_steps, rng)
    # Training and evaluation draw their environments' seeds from ranges that never meet.
    train_seed, eval_seed = (1_000_000 * (2 * config.seed + i) for i in (1, 2))
    collector = Collector(config.env, config.parallel_envs, learner.average, config.context,
                          train_seed + 10_000 * rank, exploration, config.bootstrap_truncated,
                          config.workers)
    parameters = sum(p.numel() for p in learner.trainable)
    log = Log(config, env, f"{config.size} agent, {parameters:,} parameters on {device}", rank == 0)
    run = dict(learner=learner, buffer=buffer, collector=collector, log=log, rng=rng)
    if saved:
        with blame(log.folder / "checkpoint.pt"):
            restore_run(run, saved)
    with catch_signals() as caught, log.files(lambda end: save_run(log.folder, run, True, end)):
        while not sum_over_ranks(caught.is_set()):
            # 1. Evaluate, log, and stop if the goal is reached or the budget spent.
            steps = collector.env_steps
            over = steps >= config.env_steps or log.reached_goal()
            if over or steps >= log.next_eval:
                score = evaluate(learner.average, config.env, config.episodes, config.context,
                                 eval_seed, stop=caught.is_set)        # alike in every process
                if sum_over_ranks(caught.is_set()):
                    break
                log.row(score, steps, learner.updates)
                if sum_over_ranks(over or log.reached_goal()):
                    return log.folder
            if sum_over_ranks(log.checkpoint_due()):
                save_run(log.folder, run)
            # 2. Start a step in every environment.
            with log.timer("acting"):
                collector.act()
            # 3. Learn, once there are as many rollouts as environments, or no room for so many.
            if learner.started is None and not sum_over_ranks(len(buffer) < enough):
                learner.started = steps
            owed = config.replay_ratio * (steps - (learner.started or steps))
            with log.timer("learning"):
                while sum_over_ranks(buffer.replayed) < owed:
                    batch = buffer.sample(config.batch, config.context, device)
                    log.add(learner.end_update())             # a GPU worked on while we sampled
                    learner.begin_update(batch)
            # 4. End the step, and keep the rollouts that ended with it; then the last update.
            with log.timer("acting"):
                for _, trajectory in collector.receive():
                    buffer.add(trajectory)
                    log.returns.append(float(trajectory.reward.sum()))
            with log.timer("learning"):
                log.add(learner.end_update())
            log.progress(collector.env_steps)
    raise KeyboardInterrupt("everything is saved; --resume continues")


def hindsight(config, env, rng):
    """-> what ReplayBuffer takes to relabel what it draws: a function and a GoalRarity, or None."""
    if not environments.has_hindsight(env, config):
        return None, None
    rarity = GoalRarity() if config.importance else None
    scheme = "some" if config.relabel == "auto" else config.relabel
    return (lambda x: relabel(x, env.reward, env.show, rng, scheme, rarity)), rarity


# ==================================================================================================
# 11. Checkpoint
#    Plain tensors, numbers and strings, so that loading never runs code: weights_only=True.
def save_run(folder, run, final=False, end=None):
    """Write all it takes to continue `run`, the dict of `train`'s parts, exactly. Every process
    hands its own to the first, which writes. A full disk is reported; at the end, an OSError."""
    together = world_size() == 1 or isinstance(end, NonFiniteLoss)      # end: what ended the run
    if end and not together or isinstance(end, KeyboardInterrupt):
        return               # in the middle of something, or alone: the previous checkpoint stays
    learner = run["learner"]
    own = dict(buffer=run["buffer"].state(), collector=run["collector"].state(),
               rng=json.dumps(run["rng"].bit_generator.state), torch_rng=torch.get_rng_state())
    if learner.device.type == "cuda":
        own["cuda_rng"] = torch.cuda.get_rng_state(learner.device)
    processes = [own] * world_size()
    if world_size() > 1:
        dist.gather_object(own, processes if process_rank() == 0 else None)
    run["log"].saved_at = time.monotonic()
    if process_rank() == 0:
        state = dict(version=VERSION, config=dataclasses.asdict(learner.config),
                     spec=dataclasses.asdict(learner.agent.spec), learner=learner.state(),
                     env_steps=run["collector"].env_steps, log=run["log"].state(),
                     processes=dict(enumerate(processes)))
        with contextlib.nullcontext() if final else report_disk_trouble():
            save_checkpoint(folder / "checkpoint.pt", state)


def restore_run(run, state):
    """The inverse of save_run; consumes `state`, of load_checkpoint. `run` is freshly made."""
    own = state.pop("processes")[process_rank()]             # freed when it has been copied
    for name, part in (("learner", state), ("log", state), ("buffer", own), ("collector", own)):
        run[name].restore(part[name])
    run["rng"].bit_generator.state = json.loads(own["rng"])
    torch.set_rng_state(own["torch_rng"])
    if "cuda_rng" in own and run["learner"].device.type == "cuda":
        torch.cuda.set_rng_state(own["cuda_rng"], run["learner"].device)


def save_checkpoint(path, state):
    """Write nested dicts of tensors, arrays, numbers and strings, see write_atomically."""
    # As tensors, because loading refuses everything that could run code, numpy's arrays too.
    state = each(lambda x: torch.from_numpy(np.ascontiguousarray(x)) if isinstance(x, np.ndarray)
                 else x, state)
    environments.write_atomically(path, lambda file: torch.save(state, file))


def load_checkpoint(folder, device="cpu"):
    """-> config, agent (in eval mode, on `device`), and the whole checkpoint, on the CPU.
    UsageError if there is none, or one that is damaged, foreign, of another version or env."""
    path = Path(folder) / "checkpoint.pt"
    state = environments.read_archive(path, VERSION, lambda: torch.load(
        path, map_location="cpu", weights_only=True))
    with blame(path):
        config, spec = Config(**state["config"]), Spec(**state["spec"])
        state["env_steps"] + len(state["processes"])         # are there, a number and a dict
    if Spec.of(environments.make_env(config.env)) != spec:
        raise UsageError(f"{folder} was trained when {config.env} had other spaces than now")
    agent = Agent(spec, config).to(device).eval()
    with blame(path):
        agent.load_state_dict(state["learner"]["average"])
    agent.keep()
    return config, agent, state


# ==================================================================================================
# 12. Command line
def parse_command_line(argv=None):
    """-> Config, and the checkpoint to resume or None. UsageError also for what may not change."""
    values, given = read_command_line(Config, "amago_min.py", argv)
    environments.check_together(given)
    if not values["resume"]:
        return Config(**values), None
    config, _, state = load_checkpoint(values["resume"])
    environments.check_processes(values["resume"], len(state["processes"]))
    return environments.changed_options(config, given), state


def evaluate_saved(config):
    """--eval: load an agent, play, print what it reached, and --render one episode."""
    saved, agent, state = load_checkpoint(config.eval, config.torch_device())
    torch.set_num_threads(config.threads or torch.get_num_threads())
    if config.instruction:
        saved.env = environments.fix_instruction(saved.env, config.instruction)
    seed = 2**31 + config.seed                    # seeds that no training has seen
    if config.render:
        from notebooks import plots               # drawing is not what this file is about
        say(plots.render(agent, saved, config.render, seed=seed))
    score = evaluate(agent, saved.env, config.episodes, saved.context, seed)
    say(f"{saved.env} after {state['env_steps']:,} env steps: {environments.in_words(score)}")


def main(argv=None):
    """-> exit code: 0 done, 1 the run broke, 2 bad arguments, 130 Ctrl-C; 1, 130: see save_run."""
    def work():
        config, saved = parse_command_line(argv)
        evaluate_saved(config) if config.eval else train(config, saved)
    try:
        return environments.exit_code("amago_min.py", work, lambda problem: (
            isinstance(problem, dist.DistError) or "gloo" in str(problem)))     # torch's own words
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
