"""How fast amago_min is here, beside what this machine can do. By hand, on a quiet machine:

    python tests/benchmarks/speed.py --quick                             # contexts 64 and 256 only
    python tests/benchmarks/speed.py
    python tests/benchmarks/speed.py --device cuda --sizes paper

What was tried: CPU milliseconds per update, nano, batch 24, one thread, two trainings beside it
on an AMD EPYC, before -> after. RP = RepeatPreviousEasy, PE = PositionOnlyPendulumEasy.
    freed memory kept by malloc                        RP 60 -> 55, PE 882 -> 510            kept
    two critics per target, drawn once per update      RP 58 -> 54, PE 1083 -> 882           kept
      (PE: and the state's share of the first layer once, not once per gamma)
    no in-place activation on a view (CopySlices)      PE 510 -> 460..500                    kept
    critic ensemble: bmm on an expanded view against one wide first layer, or a loop over critics:
      forward 6.2 / 6.0 / 8.5 ms, backward 15.4 / 15.8 / 18.4 ms                  view kept
    W_hat kept while acting, env steps/s, 16 envs      RP 8 400 -> 9 600                     kept
    bfloat16 products (AVX-512 BF16, no AMX; LayerNorm, softmax, sigma, values in float32):
      nano RP 90 -> 93, small 250 -> 202, paper 613 -> 421            kept from width 128 on
    torch.compile of the whole loss, torch 2.13 on a CPU: NaN gradients at that time; see below
    baddbmm against bmm + bias: forward 6.2 / 7.0 ms, backward 15.4 / 13.3 ms     no difference
On an Intel Xeon with AMX (403 GFLOP/s in fp32), RP, one thread, both in one process by turns:
    attention in float32 (its bfloat16 backward is 5 times slower on a CPU):
      small 118 -> 70, paper 210 -> 139, nano (no bfloat16) 43 -> 42                       kept
    inference_mode for acting, env steps/s, 16 envs    12 000 -> 12 700                    kept
    bfloat16 for nano: 43 -> 39; at context 256 216 -> 173; its learning not tried     not used
    the norm inside the feed-forward in bfloat16: small, paper 139 -> 139              not used
    rotary as roll + addcmul instead of chunk + cat: small 68 -> 67, paper 149 -> 144  not used
    critics, first layer as one wide product / a loop over critics in bfloat16, forward and
      backward 10.9 -> 16.0 / 12.4                                                     not used
    torch.compile of the whole loss (its gradients are those of the plain one up to rounding, with
      padding, discrete and continuous), updates/s on two quiet threads: nano 30.3
      -> 39.4, small 19.1 -> 28.0, paper 10.4 -> 12.7; beside other trainings, ms per update, one
      thread, before Packing: CartPole 49 -> 25, maze:11x11 357 -> 265, Pendulum (continuous)
      807 -> 1042. Takes 20 to 100 s at first                         kept as an option, --compile
    compiling the Transformer's blocks only: small 138 -> 105, the whole loss 119 -> 67    whole
    nothing computed on padding (Packing), beside two trainings, processor ms per update, nano:
      maze:11x11 390 -> 245, Crafter 680 -> 430 (about half of a batch is real), CartPole 44 -> 33;
      RepeatPreviousEasy, without padding, 64 -> 63, small 105 -> 106                        kept
Paper, RP, on a slower day (334 GFLOP/s in fp32, 1 700 to 1 800 in bfloat16), two quiet threads,
by turns in one process; an update is 33 ms of matrix products, 9 of attention, 8 of AdamW, norm
and targets, 65 of operations that only move memory (compiled: 28, 9, 8, 38):
    queries, keys and values split, not sliced and joined again; no in-place activation on a view:
      nano 39.3 -> 38.2, small 62.5 -> 59.4, paper 127 -> 120; compiled small 47.7 -> 44.8   kept
    and rotary as a complex product: nano 37.7, small 58.7, paper 115; but compiled (no code for
      complex numbers) paper 86 -> 92, and all weights change their meaning            not used
    attention as plain products (SDPBackend.MATH): paper 115 -> 118                    not used
    TORCHINDUCTOR_CPP_WRAPPER=1: compiled small 35.0 -> 37.0                           not used
    PE, the critics of each gamma's action in chunks that fit the cache, one thread beside two
      trainings: 396 -> 375                                                            not used
Threads that sleep after waiting n turns (GOMP_SPINCOUNT, 300 000 by default), nano, RP, two cores,
updates/s alone / beside one busy process / beside three (alone: relative to the default then):
    default 24.1 / .2 / less than .1                   20 000: 23.0 / 4.1 / 2.0              kept
    15 000: 23.2; 10 000: 22.4 / 6.5; 5 000: 21 / - / 4.2; 1 000: 15 / - / 6.5; OMP_WAIT_POLICY=
    passive: 13 / - / 7.3                                                                not used
Small, Crafter, batches of ever new shapes in bfloat16, one thread beside three trainings: oneDNN
builds code for each of them, 540 ms per update (float32 570; one shape again and again 425, 575),
and keeps it: 4.6 GB; with caches for 64 instead of 1 024 of them 1.3 GB, as fast         kept
Paper, RP, on an AMD EPYC without bfloat16 (141 GFLOP/s, notebooks/results/speed/cpu-epyc-fp32.txt),
two threads: a compiled update is 222 ms (plain 256), of which matrix products 159, attention 19,
bias copied into an output before a product 4, AdamW 2.5:
    attention of short rollouts (52 tokens) as products, baddbmm with a mask, softmax, in place of
      scaled_dot_product_attention: by itself 3.3 -> 1.5 ms; of an update, one thread beside other
      work, ms of processor time: small 180 -> 179, paper 546 -> 538; compiled small 165 -> 161,
      paper 448 -> 441                                                               not used
Paper on an NVIDIA H200, whose host needs 20 us to launch a kernel (results/speed/gpu-h200.txt),
contexts 256, 1024, 8192, updates/s; the GPU is busy for 4.8 ms of 29 at 256, 107 of 115 at 8192:
    kernel by kernel, 1 200 of them: 33, 27, 8.7
    recorded as CUDA graphs (envs.Recorded): 164, 64, 8.9                                  kept
    torch.compile(mode="reduce-overhead") of the loss, which cannot record the rest: 98 at 256
    torch.compile and recorded: 308, -, 14.5                        kept as an option, --compile
"""

import argparse
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

if "--cell" in sys.argv:    # not in the parent: a process inherits the peak memory of its parent
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    import numpy as np
    import torch
    import amago_min as am

ENV, BATCH = "popgym:RepeatPreviousEasy", 24
# updates/s on ENV and env steps/s while acting: the goals, and official AMAGO run eagerly, with 12
# to 16 environments. Measured once, with torch 2.13 on 2 cores with a matmul peak of 330 GFLOP/s.
GOALS = {"small": 25, "paper": 17, "acting": 30_000}
OFFICIAL = {"small": 7.6, "paper": 4.3, "acting": 2_900}


# ---- The cells, each in a process of its own: dict of settings -> dict of numbers ----
def seconds_per_call(call, cell):
    """-> dict(median, best) over 7 (--quick: 3) repeats of at least 0.2 s each, after a warm-up"""
    def timed(calls):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        if cell["device"] != "cpu":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / calls
    # On a GPU the fourth update is recorded, the later ones are replayed.
    calls = math.ceil(0.2 / min(timed(1) for _ in range(3 if cell["device"] == "cpu" else 6)))
    times = [timed(calls) for _ in range(3 if cell["quick"] else 7)]
    return dict(median=statistics.median(times), best=min(times))


def peak(cell):
    """The best of square matrix products of several sizes, in FLOP/s: in float32, on a GPU in
    bfloat16."""
    sizes, kind = (((1024, 2048, 4096), torch.float32) if cell["device"] == "cpu" else
                   ((4096, 8192, 16384), torch.bfloat16))
    pairs = [torch.randn(2, n, n, device=cell["device"]).to(kind) for n in sizes]
    rates = [2 * len(a) ** 3 / seconds_per_call(lambda: a @ b, cell)["best"] for a, b in pairs]
    return dict(rate=max(rates), threads=torch.get_num_threads(), torch=torch.__version__)


def flops(agent, T):
    """FLOPs of one update, a multiply-add counted as 2, and how many of them are attention's.

        linear layers of encoder and Transformer    2 |W| for each of B (T+1) tokens           x 3
        attention, q k' and weights v, causal       2 x 2 D (T+1)^2 / 2 per layer and rollout  x 3
        actor and C critics                         2 |W| for each of B T transitions          x 3
        target actor and 2 of the target critics    the same, forward only                     x 1

    x 3: one forward and one backward pass, which costs two. Left out: all but matrix products. For
    discrete actions. torch's FlopCounterMode (blind to attention on a CPU) agrees within 0.2 %.
    """
    def linear(part):
        return sum(2 * layer.weight.numel() for layer in part.modules()
                   if isinstance(layer, (am.nn.Linear, am.SigmaLinear)))
    trunk, tokens = agent.transformer, BATCH * (T + 1)
    attention = 3 * tokens * (T + 1) * 2 * trunk.width * len(trunk.blocks)
    actor, one_critic = linear(agent.actor), sum(2 * w[0].numel() for w in agent.critics.weights)
    heads = 3 * (actor + agent.critics.num_critics * one_critic) + actor + 2 * one_critic
    below = 3 * tokens * (linear(agent.encoder) + linear(trunk))
    return below + attention + BATCH * T * heads, attention


def build(cell):
    """-> Config, Agent, Collector on ENV; or, with a context, no Collector but made-up rollouts"""
    T, env = cell["context"], am.environments.make_env(ENV)
    spec = am.Spec(vector=4, actions=4, horizon=T) if T else am.Spec.of(env)
    config = am.Config(env=ENV, size=cell["size"], batch=BATCH, context=spec.horizon,
                       compile=cell["compile"])
    agent = am.Agent(spec, config).to(cell["device"]).eval()
    n, rng = cell.get("envs", 16), np.random.default_rng(0)
    noise = am.Exploration(spec, n, config.explore_steps, rng)
    return config, agent, None if T else am.Collector(ENV, n, agent, config.context, 0, noise)


def update(cell):
    """Sample and learn, on made-up rollouts of `context` steps; if that is 0, on those of ENV."""
    config, agent, collector = build(cell)
    T, rng = config.context, np.random.default_rng(0)
    total, attention = flops(agent, T)
    expected = (3 + 7) * total / cell["rate"]                # as fast as it was at the last context
    if expected > cell["limit"]:
        return dict(skipped=f"skipped: {expected:.0f} s or more, over --limit {cell['limit']}")
    learner, buffer = am.Learner(agent, config), am.ReplayBuffer(agent.spec, 48 * T + 48, rng)
    while len(buffer) < 32:
        for _, trajectory in collector.step() if collector else [(0, am.Trajectory(
                dict(vector=rng.normal(size=(T + 1, 4))), rng.integers(4, size=T),
                rng.normal(size=T), np.arange(1, T + 1) == T, np.arange(T + 1) == 0))]:
            buffer.add(trajectory)

    def one():                               # as train does: a GPU works while a batch is drawn
        batch = buffer.sample(BATCH, T, cell["device"])
        learner.end_update()
        learner.begin_update(batch)
    found = seconds_per_call(one, cell)
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10 if cell["device"] == "cpu"
              else torch.cuda.max_memory_allocated() / 2**20)
    return dict(found, flops=total, attention=attention / total, memory=memory)


def act(cell):
    """Act as training does. One timed call is one rollout in every environment, resets included."""
    config, agent, collector = build(cell)
    agent.keep()                                             # as the average of a Learner does
    found = seconds_per_call(lambda: [collector.step() for _ in range(config.context)], cell)
    return {name: x / config.context / cell["envs"] for name, x in found.items()}


def read_options():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", nargs="+", default=["nano", "small", "paper"])
    parser.add_argument("--contexts", nargs="+", type=int, default=[64 << i for i in range(6)])
    parser.add_argument("--quick", action="store_true", help="contexts 64 and 256, fewer repeats")
    parser.add_argument("--compile", action="store_true", help="compile the loss first")
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0 leaves its own choice")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--limit", type=int, default=180, help="most seconds for a cell, else skip")
    parser.add_argument("--cell", type=json.loads, help=argparse.SUPPRESS)
    return parser.parse_args()


def main():
    if cell := (options := read_options()).cell:
        am.set_up_memory()                  # as train does
        torch.set_num_threads(cell["threads"] or torch.get_num_threads())
        return print(json.dumps(dict(peak=peak, update=update, act=act)[cell["what"]](cell)))

    def run(what, row="", **settings):
        """Print the start of a row, run a cell -> its numbers, or None after printing why not."""
        print(row, end="", flush=True)
        settings = json.dumps(dict(vars(options), what=what, **settings))
        done = subprocess.run([sys.executable, __file__, "--cell", settings], capture_output=True)
        found = json.loads(done.stdout) if not done.returncode else dict(
            skipped=f"exit {done.returncode}: {done.stderr.decode()[-80:].strip() or 'killed'}")
        return print(" ", found["skipped"]) if "skipped" in found else found

    here = run("peak") or sys.exit(1)
    kind = "fp32" if options.device == "cpu" else "bf16"
    print(f"{kind} matmul peak {here['rate'] / 1e9:.0f} GFLOP/s on {options.device},"
          f" {os.cpu_count()} cores, {here['threads']} threads, torch {here['torch']},"
          f" load {os.getloadavg()[0]:.1f}"
          f"\n\nmade-up rollouts, batch {BATCH}\n  size context updates/s    (best)  tokens/s"
          "  GFLOP/s  of peak  peak MB  attention  time per doubling")
    for size in options.sizes:
        rate, before = here["rate"], None
        for T in [64, 256] if options.quick else options.contexts:
            if found := run("update", f"{size:>6}{T:8}", size=size, context=T, rate=rate):
                seconds, rate = found["median"], found["flops"] / found["median"]
                growth = before and (seconds / before[1]) ** (1 / math.log2(T / before[0]))
                print(f"{1 / seconds:10.2f}{1 / found['best']:10.2f}{BATCH * T / seconds:10,.0f}"
                      f"{rate / 1e9:9.1f}{rate / here['rate']:9.0%}{found['memory']:9,.0f}"
                      f"{found['attention']:11.0%}" + (f"{growth:10.2f} x" if before else ""))
                before = T, seconds
    print(f"\n{ENV}, batch {BATCH}{'':19}median      best      goal  official AMAGO")
    for size in options.sizes:
        for what, title, key, n in (("update", "updates/s", size, 16),
                                    ("act", "env steps/s in 16 environments", "acting", 16),
                                    ("act", "env steps/s in 64 environments", "acting", 64)):
            if found := run(what, f"{size:>6}  {title:46}", size=size, context=0, envs=n, **here):
                print(f"{1 / found['median']:10,.1f}{1 / found['best']:10,.1f}"
                      f"{GOALS.get(key, '-'):>10}{OFFICIAL.get(key, '-'):>10}")


if __name__ == "__main__":
    sys.exit(main())
