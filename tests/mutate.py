"""Break one line at a time and see the tests go red: `python tests/mutate.py`, a few minutes.

A test that cannot fail protects nothing. Each row of MUTANTS is a bug that trains on without a
word: it is put into a copy of the repository, then the tests that guard the line have to fail.
`python tests/mutate.py WORD` takes only the rows that contain WORD.
"""

import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
NETWORK, LOSSES = "tests/test_network.py::test_", "tests/test_losses.py::test_"
DATA, LEARNING = "tests/test_data.py::test_", "tests/test_learning.py::test_"
CLI, ENVS = "tests/test_cli.py::test_", "tests/test_envs.py::test_"
RELABEL = "tests/test_relabel.py::test_"
AMAGO = "amago_min.py"

MUTANTS = [  # (the bug, file, old text: exactly once in the file, new text, tests that go red)
    # stable Transformer
    ("no gradient through sigma", AMAGO,
     "return self.weight * (self.gamma / (w_u @ v))",
     "return self.weight * (self.gamma / (w_u @ v).detach())",
     NETWORK + "gradient_reaches_the_weight_through_sigma"),
    ("power iteration in eval mode", AMAGO,
     "        if self.training:\n            with torch.no_grad():\n                u =",
     "        if True:\n            with torch.no_grad():\n                u =",
     NETWORK + "one_power_iteration_per_training_forward_and_none_in_eval"),
    ("W_hat for acting is never renewed", AMAGO,
     "if self.kept[0] != state:", "if self.kept[0] is None:",
     NETWORK + "acting_follows_every_change_of_the_weights"),
    ("W_hat for acting misses fused updates", AMAGO,
     "            self.kept = (None, None)\n", "            pass\n",
     LEARNING + "acting_uses_weights_that_were_learned_in_eval_mode"),
    ("causal mask leaks the future", AMAGO,
     "scaled_dot_product_attention(q, k, v, is_causal=True)",
     "scaled_dot_product_attention(q, k, v)",
     NETWORK + "the_future_changes_nothing"),
    ("cache attends one slot too few", AMAGO,
     "valid = np.arange(self.width) <= self.length[:, None]",
     "valid = np.arange(self.width) < self.length[:, None]",
     NETWORK + "cache_equals_full_forward_with_staggered_resets"),
    ("cache attends to unwritten slots", AMAGO,
     "valid = np.arange(self.width) <= self.length[:, None]",
     "valid = np.arange(self.width) <= self.length.max()",
     NETWORK + "cache_equals_full_forward_with_staggered_resets"),
    ("full cache writes its last slot only", AMAGO,
     "self.slot = torch.from_numpy(self.length % self.context)",
     "self.slot = torch.from_numpy(self.length.clip(max=self.context - 1))",
     NETWORK + "one_layer_sees_exactly_the_last_context_tokens"),
    ("cache is not emptied at a reset", AMAGO,
     "            self.length[ended] = 0", "            pass",
     NETWORK + "nothing_leaks_over_a_reset"),
    ("collector does not empty the cache", AMAGO,
     "self.cache.end_step(ended)", "self.cache.end_step()",
     DATA + "acting_and_training_know_the_same"),
    ("all layers share one cache", AMAGO,
     "x = block(x, rotation, cache, layer)", "x = block(x, rotation, cache, 0)",
     NETWORK + "cache_equals_full_forward_with_staggered_resets"),
    ("keys are not rotated", AMAGO,
     "q, k = rotate(q, *rotation), rotate(k, *rotation)", "q = rotate(q, *rotation)",
     NETWORK + "rotary_knows_how_long_ago_but_not_when"),
    ("positions count from the slice's start", AMAGO,
     "angle = time.unsqueeze(-1) * self.absolute",
     "angle = (time - time[:, :1]).unsqueeze(-1) * self.absolute",
     NETWORK + "absolute_positions_are_those_of_the_episode"),
    ("norm inside the feed-forward left out", AMAGO,
     "return x + self.ff2(self.norm4(h))", "return x + self.ff2(h)",
     NETWORK + "block_is_the_formula_of_its_docstring"),
    # timestep encoder
    ("input statistics of normalised inputs", AMAGO,
     "self.norm.update(flat, mask)", "self.norm.update(self.norm(flat), mask)",
     NETWORK + "statistics_are_those_of_raw_inputs_and_come_first"),
    ("padding enters the input statistics", AMAGO,
     "self.mean.lerp_(x.sum(0) / mask.sum(), step)", "self.mean.lerp_(x.mean(0), step)",
     DATA + "longer_padding_changes_nothing"),
    # targets, PopArt, critics
    ("done is ignored", AMAGO,
     "return reward.unsqueeze(-1) + gammas * going_on * next_value",
     "return reward.unsqueeze(-1) + gammas * next_value",
     LOSSES + "td_targets_by_hand"),
    ("reward of another step", AMAGO,
     'tokens["reward"][:, 1:], batch["done"]', 'tokens["reward"][:, :-1], batch["done"]',
     LOSSES + "loss_equals_loops"),
    ("action of another step", AMAGO,
     'action = tokens["action"][:, 1:]', 'action = tokens["action"][:, :-1]',
     LOSSES + "loss_equals_loops"),
    ("target from the same step", AMAGO,
     "after = s[:, 1:].contiguous()", "after = s[:, :-1].contiguous()",
     LOSSES + "loss_equals_loops"),
    ("mean over critics instead of min", AMAGO,
     "self.popart(q.amin(2))", "self.popart(q.mean(2))", LOSSES + "loss_equals_loops"),
    ("max over critics instead of min", AMAGO,
     "online = -masked_mean(value.amin(2), mask)", "online = -masked_mean(value.amax(2), mask)",
     LOSSES + "actor_loss_by_hand"),
    ("always the same two critics", AMAGO,
     "pair = torch.randperm(self.critics.num_critics, device=s.device)[:2]", "pair = [0, 1]",
     LOSSES + "target_takes_the_lower_of_a_pair_of_critics"),
    ("targets from the online critics", AMAGO,
     "q = (self.target_critics(after, members=pair) * pi",
     "q = (self.critics(after, members=pair) * pi", LOSSES + "loss_equals_loops"),
    ("tau the wrong way round", AMAGO,
     "p.lerp_(q, tau)", "p.lerp_(q, 1 - tau)", LOSSES + "targets_follow_slowly"),
    ("PopArt moves the outputs", AMAGO,
     "self.w * old_std / std", "self.w * std / old_std",
     LOSSES + "popart_update_keeps_outputs"),
    ("PopArt is folded into one network only", AMAGO,
     "for critics in (self.critics, self.target_critics):", "for critics in (self.critics,):",
     LOSSES + "folding_popart_into_the_critics_keeps_outputs"),
    ("PopArt counts padding", AMAGO,
     "self.mean.lerp_(targets.sum(0) / mask.sum(), step)", "self.mean.lerp_(targets.mean(0), step)",
     LOSSES + "popart_ignores_padding"),
    # losses, acting
    ("actor loss trains the critics", AMAGO,
     "v = (q_all.detach() * pi.probs.unsqueeze(2)).sum(-1)",
     "v = (q_all * pi.probs.unsqueeze(2)).sum(-1)",
     LOSSES + "actor_losses_train_trunk_and_actor"),
    ("actor loss trains the trunk past the actor", AMAGO,
     "(now.detach(), pi.rsample())", "(now, pi.rsample())",
     LOSSES + "actor_losses_reach_the_trunk_through_the_actor_only"),
    ("no gradient to the policy's own action", AMAGO,
     "(now.detach(), pi.rsample())", "(now.detach(), pi.sample())",
     LEARNING + "reward_depends_on_the_action"),
    ("cloning filter the wrong way round", AMAGO,
     "better = advantage > 0", "better = advantage < 0",
     LEARNING + "cloning_alone_imitates_the_better_half"),
    ("means count padding", AMAGO,
     "return torch.where(mask, x, 0.0).sum() / mask.sum()",
     "return torch.where(mask, x, 0.0).mean()",
     DATA + "longer_padding_changes_nothing"),
    ("padding reaches the network", AMAGO,
     "return each(clean, tokens), token_mask", "return tokens, token_mask",
     DATA + "padding_may_hold_anything"),
    ("the first gamma acts", AMAGO,
     "return self.actor(s).sample()[:, -1]", "return self.actor(s).sample()[:, 0]",
     LOSSES + "the_last_gamma_acts"),
    ("warm-up is forgotten", AMAGO,
     "self.config.lr * min(1.0, (self.updates + 1) / self.config.warmup)", "self.config.lr",
     LEARNING + "learning_rate_warms_up"),
    # replay
    ("tokens hold this step's reward", AMAGO,
     "tokens[name][here][1:] = getattr(trajectory, name)",
     "tokens[name][here][:-1] = getattr(trajectory, name)",
     DATA + "tokens_hold_the_previous_action_and_reward"),
    ("first token keeps an old rollout's reward", AMAGO,
     "tokens[name][here][0] = 0", "pass", DATA + "tokens_hold_the_previous_action_and_reward"),
    ("slices restart the clock", AMAGO,
     "time=tensor(time)), done=done", "time=tensor(time - offset[:, None])), done=done",
     DATA + "slices_of_long_rollouts_keep_their_place"),
    ("slices always begin at the start", AMAGO,
     "offset = self.rng.integers(", "offset = 0 * self.rng.integers(",
     DATA + "slices_of_long_rollouts_keep_their_place"),
    ("the newest rollout makes room", AMAGO,
     "self.first = (self.first + 1) % len(self.starts)", "self.first = self.first",
     DATA + "the_oldest_make_room"),
    ("rollouts overlap by a token", AMAGO,
     "if start >= high or", "if start >= high - 1 or",
     DATA + "the_oldest_make_room"),
    ("draws rollouts that are gone", AMAGO,
     "pick = (self.first + self.rng.integers(self.count, size=batch))",
     "pick = (self.rng.integers(self.count, size=batch))",
     DATA + "trajectories_are_drawn_uniformly"),
    ("one padded step counts as real", AMAGO,
     "mask = steps[:-1] < length[:, None]", "mask = steps[:-1] <= length[:, None]",
     DATA + "a_trajectory_comes_back_exactly"),
    # rollouts, exploration, evaluation
    ("reward is written one step early", AMAGO,
     'self.tokens["reward"][i, t] = reward', 'self.tokens["reward"][i, t - 1] = reward',
     DATA + "collector_equals_a_plain_loop"),
    ("values bootstrap through time limits", AMAGO,
     "terminated or (truncated and not self.bootstrap_truncated)", "terminated",
     DATA + "a_time_limit_ends_values_unless_asked_otherwise"),
    ("all environments are the same one", AMAGO,
     "environments.make_env(env, seed=seed + i)", "environments.make_env(env, seed=seed)",
     DATA + "collector_equals_a_plain_loop"),
    ("MultiDiscrete factors in the wrong order", AMAGO,
     "np.unravel_index(action, self.nvec)", 'np.unravel_index(action, self.nvec, order="F")',
     DATA + "collector_equals_a_plain_loop"),
    ("exploration never fades", AMAGO,
     "done = min(1.0, env_steps / self.anneal)", "done = 0.0", DATA + "epsilon"),
    ("epsilon and 1 - epsilon swapped", AMAGO,
     "self.rng.uniform(size=len(action)) < epsilon", "self.rng.uniform(size=len(action)) > epsilon",
     DATA + "share_of_greedy_actions"),
    ("one amount of noise for ever", AMAGO,
     "self.multiplier[ended] = self.rng.uniform(size=int(ended.sum()))", "pass",
     DATA + "new_rollouts_get_new_noise"),
    ("evaluation prefers short episodes", AMAGO,
     "if left[i] > 0:", "if True:",
     DATA + "short_episodes_do_not_count_more"),
    ("evaluation explores", AMAGO,
     "collector = Collector(env, n_envs, agent, context, seed)",
     "collector = Collector(env, n_envs, agent, context, seed, Exploration(agent.spec, n_envs, 1,"
     " np.random.default_rng()))", DATA + "evaluation_adds_no_noise"),
    ("evaluation cannot be repeated", AMAGO,
     "torch.manual_seed(seed)", "pass", DATA + "evaluation_depends_on_its_seed_alone"),
    ("evaluation changes the training", AMAGO,
     "with torch.random.fork_rng():", "if True:",
     DATA + "evaluation_leaves_the_training_alone"),
    ("evaluation on the training's environments", AMAGO,
     "for i in (1, 2))", "for i in (1, 1))",
     CLI + "training_never_sees_the_rollouts_of_evaluation"),
    ("replay ratio counts updates", AMAGO,
     "while buffer.replayed < owed and", "while learner.updates < owed and",
     CLI + "every_step_is_replayed_as_often_as_asked"),
    ("no episode of a meta rollout is marked", "envs.py",
     'info["reset"] = True', "pass", ENVS + "meta_repeats_one_task"),
    ("meta episodes are different tasks", "envs.py",
     "observation, _ = self.inner.reset(seed=self.episode)",
     "observation, _ = self.inner.reset()", ENVS + "meta_repeats_one_task"),
    # relabeling
    ("goals in the order of drawing, not of time", AMAGO,
     "met = sorted([*zip(done, goals), *zip(steps, chosen)], key=lambda pair: pair[0])",
     "met = [*zip(done, goals), *zip(steps, chosen)]", RELABEL + "by_hand"),
    ("one goal too few is added", AMAGO,
     "some=int(rng.integers(k - n + 1))", "some=int(rng.integers(max(1, k - n)))",
     RELABEL + "how_many_goals_are_added"),
    ("`all` adds a random number", AMAGO,
     "all=k - n)", "all=int(rng.integers(k - n + 1)))", RELABEL + "how_many_goals_are_added"),
    ("a paid step is used twice", AMAGO,
     "others = np.setdiff1d(busy, done)", "others = busy", RELABEL + "by_hand"),
    ("the last of the old goals go, not the next", AMAGO,
     "list(goals[n + h:])", "list(goals[n:len(goals) - h])", RELABEL + "by_hand"),
    ("a finished rollout goes on", AMAGO,
     "        if progress == k:", "        if False:", RELABEL + "by_hand"),
    ("the new end is no end", AMAGO,
     "ended[t], T = True, t + 1", "T = t + 1", RELABEL + "by_hand"),
    ("a status changes a step too early", AMAGO,
     "shown[t + 1:] = show_fn", "shown[t:] = show_fn", RELABEL + "what_is_seen_by_hand"),
    ("the old rewards are seen", AMAGO,
     "reward=reward[:T]", "reward=trajectory.reward[:T]",
     RELABEL + "a_relabeled_walk_is_a_real_one"),
    ("relabeling writes into the buffer", AMAGO,
     "reward, ended, progress = np.zeros(T, np.float32), trajectory.done.copy(), 0",
     "reward, ended, progress = np.zeros(T, np.float32), trajectory.done, 0",
     RELABEL + "batches_are_relabeled_rollouts"),
    ("empty rows are goals", AMAGO,
     "rng.choice(reached[t][reached[t][:, 0] != 0])", "rng.choice(reached[t])",
     RELABEL + "invariants_on_made_up_walks"),
    ("the first token holds the first reward", AMAGO,
     "np.concatenate([np.zeros_like(x[:1], shape=(1,) + x.shape[1:]), x])",
     "np.concatenate([x[:1], x])", RELABEL + "tokens_and_back"),
    ("goals of an older rollout stay", AMAGO,
     'self.tokens["achieved"][i, t, len(achieved):] = 0', "pass",
     RELABEL + "the_collector_writes_down_what_every_step_reached"),
    ("--no-importance has no effect", AMAGO,
     "GoalRarity() if config.importance else None", "GoalRarity()",
     RELABEL + "training_relabels_as_asked"),
    ("rarity has no effect", AMAGO,
     "    if rarity is None:", "    if True:", RELABEL + "rare_goals_are_preferred"),
    ("rollouts are not counted", AMAGO,
     "self.rarity.update(trajectory.achieved)", "pass", RELABEL + "training_relabels_as_asked"),
    ("--relabel is ignored where it cannot be", AMAGO,
     'if config.relabel in ("some", "all"):', "if False:",
     RELABEL + "relabeling_needs_instructions"),
    ("a goal counts twice in one rollout", "envs.py",
     "(self.rollouts, set(goals))", "(self.rollouts, goals)", RELABEL + "frequencies_by_hand"),
    ("saved goals are lists", "envs.py",
     "({tuple(goal): n for goal, n in table} for", "({str(goal): n for goal, n in table} for",
     RELABEL + "frequencies_are_saved"),
    ("rarity is squared", "envs.py",
     "np.log10(np.minimum(np.array(counts) / total, 1)) ** 4",
     "np.log10(np.minimum(np.array(counts) / total, 1)) ** 2", RELABEL + "weights_by_formula"),
    ("rarity by steps alone", "envs.py",
     "which = int(rng.integers(2))", "which = 0", RELABEL + "weights_by_formula"),
    ("a step is drawn twice", "envs.py",
     "left = np.setdiff1d(np.arange(len(steps)), picked)", "left = np.arange(len(steps))",
     RELABEL + "weights_by_formula"),
    ("the five least weights", "envs.py",
     "np.sort(weight)[-5:][0]", "np.sort(weight)[:5][-1]", RELABEL + "shapings_equal_plain_python"),
    ("equal weights leave no probability", "envs.py",
     "return shaped / shaped.sum() if shaped.sum() > 0", "return shaped / shaped.sum() if True",
     RELABEL + "shapings_equal_plain_python"),
    ("the active goal is hidden, not the plan", AMAGO,
     "!= environments.WAITING)", "!= environments.ACTIVE)", RELABEL + "a_hidden_plan_is_hidden"),
    ("memory reaches one step further", AMAGO,
     "triu(1 - self.memory)", "triu(-self.memory)",
     RELABEL + "memory_is_a_window_in_every_layer"),
    ("acting remembers more than training", AMAGO,
     "min(context, self.memory or context)", "context",
     RELABEL + "acting_with_a_memory_window_equals_training"),
    # running
    ("NaN reaches the buffer", AMAGO,
     "if not np.isfinite(x).all():", "if False:", CLI + "a_broken_environment_is_named"),
    ("a wrong shape is stretched", AMAGO,
     "if x.shape != shape:", "if False:", CLI + "a_broken_environment_is_named"),
    ("training goes on after NaN", AMAGO,
     "if not torch.isfinite(loss + norm):", "if False:",
     CLI + "a_loss_that_is_not_finite_stops_the_run"),
    ("a bad batch spoils saved statistics", AMAGO,
     "x.copy_(old)", "pass", CLI + "an_explosion_leaves_the_last_good_state"),
    ("NaN is a valid option", AMAGO,
     'rule["low"] <= x <= rule["high"] and math.isfinite(x)',
     'not (x < rule["low"] or x > rule["high"])',
     CLI + "bad_arguments[--lr nan]"),
    ("a run is overwritten", AMAGO,
     'if config.out and (out / "log.csv").exists():', "if False:",
     CLI + "a_run_is_never_overwritten"),
    ("Ctrl-C ends with exit code 0", AMAGO,
     "        if interrupted.is_set():\n            raise", "        if False:\n            raise",
     CLI + "control_c_waits_for_the_end_of_the_update"),
    ("the goal lies above a negative maximum", AMAGO,
     "env.max_return - 0.01 * abs(env.max_return)", "0.99 * env.max_return",
     CLI + "the_goal_is_one_percent_below_the_maximum"),
]


def pytest(folder, tests):
    """Exit code of pytest in `folder`; 1 means that a test failed. -1 after 120 s."""
    environment = dict(os.environ, OMP_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="1")
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    try:
        return subprocess.run(command, cwd=folder, env=environment, timeout=120,
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode
    except subprocess.TimeoutExpired:
        return -1


def main(word=""):
    mutants = [mutant for mutant in MUTANTS if any(word in text for text in mutant)]
    sources = {name: (ROOT / name).read_text() for name in (AMAGO, "envs.py")}
    stale = [f"{bug}: {old!r} occurs {sources[name].count(old)} times in {name}, not once"
             for bug, name, old, _, _ in mutants if sources[name].count(old) != 1]
    if stale:
        sys.exit("\n".join(stale))
    survivors, start = 0, time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        copy = pathlib.Path(folder) / "repo"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "runs", "__pycache__"))
        if pytest(copy, sorted({mutant[-1] for mutant in mutants})) != 0:
            sys.exit("the tests are not green to begin with")
        for bug, name, old, new, tests in mutants:
            (copy / name).write_text(sources[name].replace(old, new))
            code = pytest(copy, [tests])
            (copy / name).write_text(sources[name])
            verdict = {1: "caught", 0: "SURVIVED", -1: "TIMEOUT"}.get(code, f"pytest broke: {code}")
            survivors += code != 1
            print(f"{bug:<44} {verdict:<9} {tests.removeprefix('tests/')}", flush=True)
    print(f"{len(mutants) - survivors} of {len(mutants)} caught,"
          f" {time.perf_counter() - start:.0f} s")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
