"""Prove that the laws can fail: break the library in one place at a time and require that some test goes red.

    python tests/mutations.py [WORD]      all mutations, or those with WORD in their name

Each mutation replaces one text of one file in a copy of the package and of the tests, made in a temporary folder, and
runs the named tests there; the process asserts that it imported the copy. Exit status 1 if a mutant survives, if its
tests cannot run, or if they fail without it.
"""

import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GREEN, RED = 0, 1  # pytest's exit statuses; anything else is no answer
RUN = """
import pathlib, sys, pytest, relora_opt
here = pathlib.Path.cwd().resolve()
assert here in pathlib.Path(relora_opt.__file__).resolve().parents, f"{relora_opt.__file__} is not the copy in {here}"
sys.exit(pytest.main(sys.argv[1:]))
"""


@dataclass(frozen=True)
class Mutation:
    """One text replaced in one file, and the tests, `file -k expression`, that must notice."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, str]

    def fits(self, package: Path) -> bool:
        """Whether the text to replace stands in the file exactly once."""
        return (package / self.file).read_text().count(self.old) == 1

    def apply(self, package: Path) -> None:
        path = package / self.file
        assert self.fits(package), f"{self.name}: {self.file} does not hold this text exactly once: {self.old!r}"
        path.write_text(path.read_text().replace(self.old, self.new))


FIRST_UPDATE = "test_the_first_update_after_wrapping"
WALK = "test_every_path_equals_the_reference and AdamW and float64"

MUTATIONS = (
    Mutation(
        "drop the gradient of B in products",
        "weight.py",
        "dB = (rows.mT @ (x_rows @ A.mT)) * ctx.scale",
        "dB = torch.zeros_like(B)",
        ("test_laws.py", f"{FIRST_UPDATE} and functional"),
    ),
    Mutation(
        "drop the gradient of A in products",
        "weight.py",
        "dA = ((rows @ B).mT @ x_rows) * ctx.scale",
        "dA = torch.zeros_like(A)",
        ("test_laws_ops.py", "any_expression and linear"),
    ),
    Mutation(
        "forget the scale where the dense gradient is cheaper",
        "weight.py",
        "project(rows.mT @ x_rows, A, B, ctx.scale)",
        "project(rows.mT @ x_rows, A, B, 1.0)",
        ("test_laws_ops.py", "any_expression and linear"),
    ),
    Mutation(
        "drop the gradient of B in projections",
        "weight.py",
        "return (B.mT @ G) * scale, (G @ A.mT) * scale",
        "return (B.mT @ G) * scale, torch.zeros_like(B)",
        ("test_laws.py", f"{FIRST_UPDATE} and dense"),
    ),
    Mutation(
        "forget the scale",
        "weight.py",
        "dA = ((rows @ B).mT @ x_rows) * ctx.scale",
        "dA = (rows @ B).mT @ x_rows",
        ("test_laws_reference.py", f"{WALK} and functional"),
    ),
    Mutation(
        "forget the bias",
        "weight.py",
        "return F.linear(x, W, bias)",
        "return F.linear(x, W)",
        ("test_laws.py", "test_wrapping_leaves_the_output"),
    ),
    Mutation(
        "hand an unknown operation the bare tensor",
        "weight.py",
        "pytree.tree_map_only(LowRankWeight, _universal, (args, kwargs))\n        return func",
        "pytree.tree_map_only(LowRankWeight, lambda weight: weight.dense, (args, kwargs))\n        return func",
        ("test_laws_ops.py", "any_module and conv2d"),
    ),
    Mutation(
        "differentiate twice through the bare weight",
        "weight.py",
        "(_projected(W, A, B, ctx.scale) if torch.is_grad_enabled() else W)",
        "W",
        ("test_laws_autograd.py", "gradient_penalty"),
    ),
    Mutation(
        "redraw A from the global generator",
        "factors.py",
        "A.uniform_(-1 / math.sqrt(n), 1 / math.sqrt(n), generator=generator)",
        "A.uniform_(-1 / math.sqrt(n), 1 / math.sqrt(n))",
        ("test_laws_resume.py", "continuing_from_a_file and dense and float32 and SGD"),
    ),
    Mutation(
        "zero A as well as B",
        "state.py",
        '"A": nn.Parameter(A)',
        '"A": nn.Parameter(torch.zeros_like(A))',
        ("test_laws.py", FIRST_UPDATE),
    ),
    Mutation(
        "merge at a restart",
        "state.py",
        'entry["B"].copy_(B)',
        'W.add_((entry["B"] @ entry["A"]).to(W.dtype).view(W.shape)); entry["B"].copy_(B)',
        ("test_laws.py", "test_a_restart_leaves_the_output"),
    ),
    Mutation(
        "keep B at a restart",
        "state.py",
        'entry["B"].copy_(B)',
        "pass",
        ("test_laws.py", "test_a_restart_leaves_the_output"),
    ),
    Mutation(
        "round the float32 master at every update",
        "state.py",
        "W.copy_(master)",
        "master.copy_(W.copy_(master))",
        ("test_memory_of_16bit.py", "2000_recorded_gradients"),
    ),
    Mutation(
        "move the weight twice",
        "factors.py",
        "W.addmm_(left, right, alpha=scale)",
        "W.addmm_(left, right, alpha=2 * scale)",
        ("test_laws_reference.py", WALK),
    ),
    Mutation(
        "take the movement for a difference of large products",
        "factors.py",
        "torch.cat((moved_B, B), dim=-1), torch.cat((new_A, moved_A), dim=-2)",
        "torch.cat((moved_B + B, -B), dim=-1), torch.cat((new_A, new_A - moved_A), dim=-2)",
        ("test_laws_step.py", "small_step_of_large_factors"),
    ),
    Mutation(
        "keep the factors' state at a restart",
        "prune.py",
        "if isinstance(strategy, Keep) or not state:",
        "if True:",
        ("test_laws_prune.py", "fresh_base_optimizers_bitwise and AdamW"),
    ),
    Mutation(
        "keep Adam's step at a reset",
        "restart.py",
        "            _zero_(state)\n        elif",
        '            _zero_({key: value for key, value in state.items() if key != "step"})\n        elif',
        ("test_laws_prune.py", "fresh_base_optimizers_bitwise and AdamW"),
    ),
    Mutation(
        "take zeros for a fresh state, whichever the base",
        "restart.py",
        "self._zero_is_fresh = not self._initial and self._behaves_as_fresh(factor)",
        "self._zero_is_fresh = True",
        ("test_laws_prune.py", "fresh_base_optimizers_bitwise and (Rprop or NAdam or dampening or Adagrad)"),
    ),
    Mutation(
        "prune every moment by a mask of its own",
        "prune.py",
        "moment.copy_(value * laid_out_as(kept.to(value.dtype), moment))",
        "moment.mul_(_largest(moment.abs(), int(kept.sum())).to(moment.dtype))",
        ("test_laws_prune.py", "one_mask_for_every_moment"),
    ),
    Mutation(
        "keep every tie",
        "prune.py",
        "mask[order[:count]] = True",
        "mask |= scores.flatten() >= scores.flatten()[order[count - 1]]",
        ("test_laws_prune.py", "among_ties"),
    ),
    Mutation(
        "restart one update late",
        "optimizer.py",
        "self.schedule.restarts_after(self.num_updates)",
        "self.schedule.restarts_after(self.num_updates - 1)",
        ("test_laws_reference.py", WALK),
    ),
    Mutation(
        "start the ramp one update late",
        "schedule.py",
        "since = update - start\n        ramps",
        "since = update - start - 1\n        ramps",
        ("test_laws_schedule.py", "multiplier_is_the_formula"),
    ),
    Mutation(
        "ramp from the first update on",
        "schedule.py",
        "ramps = (start > 0 or num_restarts > 0) and since",
        "ramps = since",
        ("test_laws_schedule.py", "multiplier_is_the_formula"),
    ),
    Mutation(
        "forget factor_lr",
        "optimizer.py",
        'multiplier * group["factor_lr"]',
        "multiplier",
        ("test_laws_schedule.py", "the_base_sees"),
    ),
    Mutation(
        "forget to clip",
        "optimizer.py",
        "            if self.max_grad_norm is not None:\n",
        "            if False:\n",
        ("test_laws_reference.py", WALK),
    ),
    Mutation(
        "find a matched scale anew at a load",
        "factored.py",
        "        self._matched.update(scales)\n",
        "",
        ("test_matched_scale.py", "loaded_to_the_last_digit"),
    ),
    Mutation(
        "drop all state at the switch",
        "optimizer.py",
        "self.state.pop(selected.W, None)",
        "self.state.clear()",
        ("test_laws.py", "unselected_state_survives"),
    ),
    Mutation(
        "touch unselected parameters' state at a restart",
        "optimizer.py",
        "        self._pruned = prune_states_(",
        "        [entry.clear() for entry in self.state.values() if not is_low_rank(entry)]\n"
        "        self._pruned = prune_states_(",
        ("test_laws.py", "untouched_by_a_restart"),
    ),
    Mutation(
        "count the phantom step of distributed checkpoint",
        "optimizer.py",
        "counts = not phantom.is_phantom(self.param_groups, self.state, self._all_factors())",
        "counts = True",
        ("test_laws_resume.py", "phantom"),
    ),
    Mutation(
        "let no GradScaler unscale",
        "optimizer.py",
        "return any(factor.grad is not None for factor in self._all_factors())",
        "return True",
        ("test_laws_step.py", "grad_scaler_the_dense_path"),
    ),
    Mutation(
        "make and count non-finite updates",
        "guard.py",
        "if self.reason is None:",
        "if True:",
        ("test_laws_step.py", "skip_nonfinite"),
    ),
    Mutation(
        "remember what was skipped",
        "guard.py",
        "            optimizer.step()\n            self.losses.append(loss)",
        "            optimizer.step()\n        self.losses.append(loss)",
        ("test_guard.py", "excuse_the_next"),
    ),
    Mutation(
        "judge a process's own loss",
        "step.py",
        "dist.all_reduce(loss.div_(dist.get_world_size(self.process_group)), group=self.process_group)",
        "pass",
        ("test_step_parallel.py", "jump_in_one_process"),
    ),
    Mutation(
        "sum micro-batches instead of averaging",
        "step.py",
        "(loss / accumulate).backward()",
        "loss.backward()",
        ("test_laws_step.py", "accumulating_k"),
    ),
    Mutation(
        "keep the cast of a weight that has been written into",
        "functional.py",
        "self._cast_of.get(key) != value",
        "key not in self._cast_of",
        ("test_step_autocast.py", "between_micro_batches"),
    ),
    Mutation(
        "keep the casts of an update beyond it",
        "step.py",
        "        self._functional.drop_casts()\n        try:",
        "        try:",
        ("test_step_autocast.py", "outlasts"),
    ),
    Mutation(
        "cast weights anew that have been cast",
        "weight.py",
        "if weight.cast is None or weight.cast.dtype != dtype else weight.cast",
        "if True else weight.cast",
        ("test_step_autocast.py", "once_an_update"),
    ),
    Mutation(
        "swap the weights back before the backward pass",
        "functional.py",
        "        if not self._is_swapped:\n",
        "        if False:\n",
        ("test_laws_autograd.py", "activation_checkpointing and functional"),
    ),
    Mutation(
        "let loading cast factors to the weight's dtype",
        "saved.py",
        "self.state[W] = dtypes.cast_entry(entry, number, W)",
        "pass",
        ("test_laws_resume.py", "continuing_from_a_file and dense and bfloat16 and SGD"),
    ),
    Mutation(
        "leave in a template what the phantom step has made up",
        "phantom.py",
        "state[p].update(A_state={}, B_state={})",
        "pass",
        ("test_dcp.py", "without_fresh"),
    ),
    Mutation(
        "let the phantom step count in a base's groups",
        "optimizer.py",
        "                    group.pop(key, None)\n",
        "                    pass\n",
        ("test_foreign_bases.py", "counts_nothing"),
    ),
    Mutation(
        "leave in a template of a later warm start what the phantom step has made up",
        "phantom.py",
        "            del state[p]",
        "            pass",
        ("test_dcp.py", "without_fresh"),
    ),
    Mutation(
        "keep the factors in a later warm start",
        "optimizer.py",
        "if self.schedule.changes_after(self.num_updates):",
        "if self.schedule.switches_after(self.num_updates):",
        ("test_laws_reference.py", WALK),
    ),
    Mutation(
        "draw the A's of before a later warm start again",
        "optimizer.py",
        "is_restart = ended is not None and ended + self.schedule.warm_start_at > 0",
        "is_restart = False",
        ("test_laws_reference.py", WALK),
    ),
    Mutation(
        "begin every turn of a warm start anew for all weights",
        "optimizer.py",
        "strict=True) if turn in (ended, begun)",
        "strict=True) if turn in (ended, begun) or True",
        ("test_laws_reference.py", WALK),
    ),
    Mutation(
        "train the factors of the turn before at the rate of weights",
        "optimizer.py",
        "if self._has_factors(number) else multiplier)",
        "if self.is_low_rank else multiplier)",
        ("test_laws_schedule.py", "base_sees"),
    ),
    Mutation(
        "let a base count on in a later warm start",
        "optimizer.py",
        "        reset_counters_(weights, self._base, self._options, trained)\n",
        "",
        ("test_foreign_bases.py", "later_warm_start"),
    ),
    Mutation(
        "forget the ramp of a later warm start",
        "schedule.py",
        "            return self.warm_start_at + turn * self.warm_start\n",
        "            return turn * self.warm_start\n",
        ("test_laws_schedule.py", "multiplier_is_the_formula"),
    ),
    Mutation(
        "save an added group without its factors",
        "optimizer.py",
        "self._make_entries()  # what is saved before its first update has its factors",
        "pass",
        ("test_contract_traps.py", "saved_before_its_first_update"),
    ),
    Mutation(
        "fire the hooks of both optimizers in one",
        "bases.py",
        "inner.step(part)",
        "part.step()",
        ("test_bases.py", "hooks_fire_once"),
    ),
    Mutation(
        "step on what other losses have left",
        "step.py",
        "if not self._num_begun and self.optimizer._has_gradients:",
        "if False:",
        ("test_own_gradients.py", "other_losses or zeroes_at_its_top"),
    ),
    Mutation(
        "count a step without a gradient",
        "optimizer.py",
        "if closure is None and not self._has_gradients and self.selected:",
        "if False:",
        ("test_own_gradients.py", "without_a_gradient"),
    ),
    Mutation(
        "train a frozen factor on the dense path",
        "gradients.py",
        "            if factor.requires_grad:",
        "            if True:",
        ("test_own_gradients.py", "frozen_factor_stays"),
    ),
    Mutation(
        "take any schedule in the place of another",
        "factored.py",
        "is_other_turn = given.turn(coming) != followed.turn(coming)",
        "is_other_turn = False",
        ("test_own_gradients.py", "other_weights_at_full_rank_now or at_once"),
    ),
    Mutation(
        "keep the gradients of a batch that failed",
        "step.py",
        "            self._begin_anew()\n            raise",
        "            raise",
        ("test_meddling.py", "a_batch_that_failed"),
    ),
    Mutation(
        "train factors that are no longer the optimizer's",
        "functional.py",
        "        is_same &= all(self._optimizer._holds(*factors) for factors in self._factors)\n",
        "",
        ("test_meddling.py", "looked_into_or_cleared and step and clear"),
    ),
    Mutation(
        "take state that was put there for a template",
        "optimizer.py",
        "if counts and self._is_template:",
        "if counts:",
        ("test_meddling.py", "put_there_before_the_first_update"),
    ),
    Mutation(
        "go on counting in the group after a reset",
        "restart.py",
        "                counters[number].reset_(group)\n",
        "                pass\n",
        ("test_laws_prune.py", "fresh_base_optimizers_bitwise and counts"),
    ),
    Mutation(
        "take zero for what remembers the factor",
        "restart.py",
        "if any(_is_equal(value, remembered) for value in state for remembered in (start, used)):",
        "if False:",
        ("test_laws_prune.py", "fresh_base_optimizers_bitwise and looks"),
    ),
    Mutation(
        "leave a weight where a base moves idle factors",
        "state.py",
        "if place[0].has_gradient or place[0].W in written]",
        "if place[0].has_gradient]",
        ("test_moves.py", "moves_without_gradients"),
    ),
    Mutation(
        "match a scale that goes with the size of the weight",
        "matched.py",
        "if not 0.8 < of_large < 1.25:",
        "if False:",
        ("test_matched_scale.py", "has_its_scale_or_none and Adafactor"),
    ),
    Mutation(
        "load the state of other weights of the same shapes",
        "loading.py",
        "if theirs is None or list(theirs) == names:",
        "if theirs is None or len(theirs) == len(names):",
        ("test_contract_traps.py", "other_weights_of_the_same_shapes"),
    ),
    Mutation(
        "take the state of another shape",
        "loading.py",
        "if (A.shape, B.shape) != ((*stacked, rank, n), (*stacked, m, rank)):",
        "if False:",
        ("test_contract_traps.py", "disagrees_with_itself"),
    ),
    Mutation(
        "leave a 16-bit weight without a master",
        "factored.py",
        "            add_master_(entry, selected.W)\n",
        "",
        ("test_contract_traps.py", "gives_a_16_bit_model_its_masters"),
    ),
    Mutation(
        "forget what no state holds at every load",
        "saved.py",
        'if not hasattr(self, "_functionals"):',
        "if True:",
        ("test_functional_follows.py", "from_before_the_switch_reaches"),
    ),
    Mutation(
        "swap a shared module once for each of its names",
        "functional.py",
        "output = functional_call(model, self._weights(), args, kwargs, tie_weights=False)",
        "output = functional_call(model, self._weights(), args, kwargs)",
        ("test_functional.py", "module_under_two_names"),
    ),
    Mutation(
        "point A along the last singular directions",
        "pointing.py",
        "Vh[..., :count, :]",
        "Vh[..., -count:, :]",
        ("test_pointing.py", "the_best_a_there_is"),
    ),
    Mutation(
        "step on the sketches",
        "pointing.py",
        "A.grad = B.grad = None",
        "pass",
        ("test_pointing.py", "moves_the_dense_parameters_and_no_low_rank_weight"),
    ),
    Mutation(
        "leave the last sketch in B",
        "pointing.py",
        "        if is_last and B.requires_grad:\n            B.zero_()\n        elif",
        "        if",
        ("test_pointing.py", "come_near_the_best_a"),
    ),
    Mutation(
        "point A once and never at a restart",
        "optimizer.py",
        "            if self._has_factors(number):\n                group",
        "            if False:\n                group",
        ("test_pointing.py", "every_cycle_points"),
    ),
    Mutation(
        "match every base as if it were Adam",
        "matched.py",
        "** (1 / (1 + math.log2(ratio)))",
        "** 1.0",
        ("test_matched_scale.py", "sgd_is_matched"),
    ),
    Mutation(
        "match without A's norm",
        "matched.py",
        "(once @ A).norm()",
        "once.norm()",
        ("test_matched_scale.py", "first_update_moves_w_as_far"),
    ),
    Mutation(
        "try a base at the rate that its factory sets",
        "matched.py",
        "torch.ones_like(lr) if isinstance(lr, Tensor) else 1.0",
        "lr",
        ("test_matched_scale.py", "factory_that_sets_a_rate_of_0"),
    ),
    Mutation(
        "try a base in a group alone",
        "matched.py",
        "optimizer = base.build(own)",
        "optimizer, number = base.build([own[number]]), 0",
        ("test_matched_scale.py", "factory_sees_its_groups"),
    ),
    Mutation(
        "show autograd functions the bare weight",
        "weight.py",
        "weight = _projected(W.detach(), A, B, scale).as_subclass(cls)",
        "weight = W.detach().as_subclass(cls)",
        ("test_laws_ops.py", "any_expression and autograd"),
    ),
    Mutation(
        "hide that the weight requires a gradient",
        "weight.py",
        ', "requires_grad")',
        ")",
        ("test_laws_autograd.py", "argument_of_a_checkpoint"),
    ),
    Mutation(
        "let autograd track the weight as a view",
        "weight.py",
        "        return W.detach()\n",
        "        return W.view_as(W)\n",
        ("test_functional.py", "outside_autograd"),
    ),
    Mutation(
        "let a forward pass write to the weight in place",
        "weight.py",
        "torch.is_grad_enabled() and func in _IN_PLACE",
        "False and func in _IN_PLACE",
        ("test_functional.py", "changed_in_place"),
    ),
    Mutation(
        "swap the weights in without gradients",
        "functional.py",
        "with torch.enable_grad():  # which a backward pass is without",
        "with torch.no_grad():",
        ("test_laws_autograd.py", "autograd_function"),
    ),
    Mutation(
        "leave out a weight that sits in a list, too",
        "functional.py",
        "if W is None or number is None:",
        "if W is None or number is None or name == 'weight_ih_l0':",
        ("test_models.py", "oracles and recurrent"),
    ),
    Mutation(
        "do not see that layers were moved",
        "functional.py",
        "if not is_same or structure(self._models[0]) != self._structure:",
        "if not is_same:",
        ("test_functional_follows.py", "test_layers_that_are_moved and swap-functional"),
    ),
    Mutation(
        "do not see that a weight was frozen",
        "functional.py",
        "if not is_same or ",
        "if ",
        ("test_functional_follows.py", "shows_no_factors"),
    ),
    Mutation(
        "train what is frozen, compiled",
        "functional.py",
        "            if place.W.requires_grad  # asked here too, for torch.compile, which skips `follow`\n",
        "",
        ("test_functional_follows.py", "under_a_compiler_of_ones_own"),
    ),
    Mutation(
        "hook the parameters that a model returns",
        "functional.py",
        "if tensor.grad_fn is not None and",
        "if tensor.requires_grad and",
        ("test_functional_follows.py", "keeps_no_hook"),
    ),
    Mutation(
        "leave the model swapped when a backward pass fails",
        "functional.py",
        "    __del__ = __call__\n",
        "",
        ("test_functional_follows.py", "leaves_the_model_whole"),
    ),
    Mutation(
        "take the short cut for sparse inputs",
        "weight.py",
        "if x.layout in _SPARSE:",
        "if False:",
        ("test_functional_follows.py", "sparse_inputs"),
    ),
    Mutation(
        "lose the data that a forward pass assigns",
        "weight.py",
        "    weight.W.data = value\n",
        "",
        ("test_functional_follows.py", "data_that_a_forward_pass_assigns"),
    ),
    Mutation(
        "train a weight whose gradient hook nobody calls",
        "places.py",
        "        if has_hook(place.W):\n",
        "        if False:\n",
        ("test_functional_follows.py", "gradient_hook_is_refused and False"),
    ),
    Mutation(
        "let the factors' gradients outlast their step",
        "gradients.py",
        "            weight.A.grad = weight.B.grad = None",
        "            pass",
        ("test_functional.py", "test_zeroing_the_models_gradients_is_enough and functional"),
    ),
    Mutation(
        "move the weight by A's step along the B from after it",
        "factors.py",
        "(moved_B, B)",
        "(moved_B, moved_B + B)",
        ("test_laws_reference.py", WALK),
    ),
    Mutation(
        "measure the rounded weight, not its master",
        "metrics.py",
        "W = exact_weight(weight.W, weight.entry if is_low_rank(weight.entry) else None)",
        "W = weight.W",
        ("test_metrics.py", "equals_one_of_dense_matrices and bfloat16"),
    ),
    Mutation(
        "take sketches for factors that are in the weight",
        "metrics.py",
        "if not is_low_rank(weight.entry) or weight.is_pointing:",
        "if not is_low_rank(weight.entry):",
        ("test_metrics.py", "test_sketches_are_no_part"),
    ),
    Mutation(
        "do not reduce the gradient of A over the ranks",
        "gradients.py",
        "gradient = laid_out_as(projection, factor)",
        "gradient = factor.from_local(projection.to_local(), factor.device_mesh, factor.placements)",
        ("test_distributed.py", "test_fsdp2_trains_what_one_process_trains and SGD"),
    ),
    Mutation(
        "prune a sharded state by what this rank has of it",
        "prune.py",
        "moment.copy_(value * laid_out_as(kept.to(value.dtype), moment))",
        "(held := getattr(moment, '_local_tensor', moment)).mul_(kept.to(moment.dtype)[: len(held)])",
        ("test_distributed.py", "test_fsdp2_trains_what_one_process_trains and magnitude"),
    ),
    Mutation(
        "clip by the norm of this rank's part",
        "gradients.py",
        "[p.grad for p in part if p.grad is not None]",
        "[getattr(p.grad, '_local_tensor', p.grad) for p in part]",
        ("test_distributed.py", "test_fsdp2_trains_what_one_process_trains and clipped"),
    ),
    Mutation(
        "leave every rank its own weights under the functional model",
        "functional.py",
        "broadcast_(W, ddp.process_group)",
        "pass",
        ("test_distributed.py", "test_ddp_around_the_functional_model_starts_from_the_first and float32"),
    ),
    Mutation(
        "leave every process of a step its own weights",
        "step.py",
        "        broadcast_(tensor, group)\n",
        "        pass\n",
        ("test_step_parallel.py", "start_apart"),
    ),
    Mutation(
        "leave every process of a step its own seed",
        "step.py",
        "    optimizer.seed = held[0][0]\n",
        "",
        ("test_step_parallel.py", "start_apart"),
    ),
    Mutation(
        "leave gradients of the weights themselves to each process",
        "step.py",
        "            self._functional.project_dense()  # a penalty's, say: averages are of what is trained\n",
        "",
        ("test_step_parallel.py", "read_elsewhere"),
    ),
    Mutation(
        "use the warm start's last gradient again",
        "optimizer.py",
        "            selected.W.grad = None  # used up",
        "            pass  # used up",
        ("test_functional.py", "last_gradient_of_the_warm_start"),
    ),
    Mutation(
        "lose what a base keeps of no parameter",
        "inner.py",
        "        state.update(_of_no_parameter(self._optimizer.state))\n",
        "",
        ("test_laws_resume.py", "of_no_parameter"),
    ),
    Mutation(
        "step on micro-batches from before a load",
        "optimizer.py",
        "None, {}, [], None, None\n        self._num_breaks += 1\n",
        "None, {}, [], None, None\n",
        ("test_laws_step.py", "loaded_in_the_middle"),
    ),
    Mutation(
        "take a DistributedDataParallel from before the switch",
        "functional.py",
        "            _refuse_stale(ddp, self)\n",
        "",
        ("test_distributed.py", "test_ddp_around_the_functional_model_communicates and None-kaiming"),
    ),
    Mutation(
        "forget the micro-batches before the last",
        "release.py",
        "part + new",
        "new",
        ("test_release.py", "every_model_trains_as_without and shared"),
    ),
    Mutation(
        "keep the dense gradients that were released",
        "release.py",
        "W.grad = ProjectedGradient(",
        "W.released = ProjectedGradient(",
        ("test_release.py", "one_dense_gradient_lives"),
    ),
    Mutation(
        "let an earlier optimizer keep the gradients",
        "release.py",
        "            detach(weight.W)\n",
        "            if weight.W in _HANDLES:\n                continue\n",
        ("test_release.py", "last_optimizer_gets and True"),
    ),
    Mutation(
        "use a released gradient in two steps",
        "release.py",
        "parts, self.parts = self._unused(), None",
        "parts = self._unused()",
        ("test_release.py", "serves_one_step"),
    ),
    Mutation(
        "leave gradients where the next replay of a graph writes",
        "step.py",
        "            gradients.keep_(without)",
        "            pass",
        ("test_replays.py", "train_as_without"),
    ),
    Mutation(
        "keep the gradients of the optimizer's own alone over replays",
        "step.py",
        "(*self._model.parameters(), *self._functional.parameters())",
        "(*self._functional.parameters(),)",
        ("test_replays.py", "another_optimizer"),
    ),
    Mutation(
        "move all weights by the first few's factors",
        "factors.py",
        "before[i : i + starts.step]",
        "before[: starts.step]",
        ("test_laws_step.py", "every_pair_of_factors"),
    ),
    Mutation(
        "return the very loss that the next replay overwrites",
        "step.py",
        "pytree.tree_map_only(Tensor, Tensor.clone, (loss, aux))",
        "(loss, aux)",
        ("test_replays.py", "train_as_without"),
    ),
    Mutation(
        "count micro-batches whose gradients somebody has dropped",
        "step.py",
        "if self._num_begun and self._num_breaks != self.optimizer._num_breaks:",
        "if False:",
        ("test_meddling.py", "zeroing_or_restart"),
    ),
    Mutation(
        "reset what follows the gradients of other groups",
        "restart.py",
        "followed = changed(idle, other_idle)",
        "followed: set[str] = set()",
        ("test_foreign_bases.py", "keeps_of_all"),
    ),
    Mutation(
        "try a base by a single step",
        "restart.py",
        "_TRIALS = 8",
        "_TRIALS = 1",
        ("test_foreign_bases.py", "is_a_fresh_one and Grows"),
    ),
    Mutation(
        "let groups share a rate that is a tensor",
        "optimizer.py",
        "value.clone() if isinstance(value, Tensor) else value",
        "value",
        ("test_foreign_bases.py", "each_groups_own"),
    ),
    Mutation(
        "swap low-rank weights in where a compiled module hides them",
        "functional.py",
        """traced_path = f"{traced[module_path]}.{name}".lstrip(".")""",
        "traced_path = path",
        ("test_laws_compiled.py", "compiled_already"),
    ),
    Mutation(
        "look through every module with a child of that name",
        "places.py",
        'is_inside = name == "_orig_mod" and _is_compiled(modules[parent])',
        'is_inside = name == "_orig_mod"',
        ("test_laws_compiled.py", "compiled_already"),
    ),
)


def run_tests(folder: Path, arguments: list[str]) -> tuple[int, str]:
    """Run pytest in a copy; return its exit status and its first failure, or else the last line of its output."""
    command = [sys.executable, "-c", RUN, "-q", "-x", "-p", "no:cacheprovider", "--tb=no", "-rf", *arguments]
    environment = {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "PATH": "", "HOME": str(folder)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    lines = (done.stderr + done.stdout).strip().splitlines() or [""]
    return done.returncode, next((line for line in lines if line.startswith("FAILED")), lines[-1])


def copy_to(folder: Path) -> Path:
    """Copy the package, the tests and their configuration; return the package's copy."""
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "relora_opt", folder / "relora_opt", ignore=ignored)
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder / "relora_opt"


def run_faithful(file: str, mutations: list[Mutation]) -> tuple[int, str]:
    """Run all the tests that mutations name in one file, against a faithful copy."""
    expression = " or ".join(sorted({f"({mutation.tests[1]})" for mutation in mutations if mutation.tests[0] == file}))
    with tempfile.TemporaryDirectory() as name:
        copy_to(Path(name))
        return run_tests(Path(name), [f"tests/{file}", "-k", expression])


def run_mutant(mutation: Mutation) -> tuple[int, str]:
    """Run a mutation's tests against a mutated copy."""
    with tempfile.TemporaryDirectory() as name:
        mutation.apply(copy_to(Path(name)))
        return run_tests(Path(name), [f"tests/{mutation.tests[0]}", "-k", mutation.tests[1]])


def main(word: str = "") -> int:
    """Run the mutations; print a table; return the exit status."""
    chosen = [mutation for mutation in MUTATIONS if word in mutation.name]
    for mutation in chosen:
        assert mutation.fits(ROOT / "relora_opt"), f"{mutation.name}: not exactly once in {mutation.file}"
    files = sorted({mutation.tests[0] for mutation in chosen})
    started = time.monotonic()
    with ThreadPoolExecutor(2) as pool:
        faithful = dict(zip(files, pool.map(lambda file: run_faithful(file, chosen), files), strict=True))
        results = list(pool.map(run_mutant, chosen))
    failures = 0
    for mutation, (status, line) in zip(chosen, results, strict=True):
        is_killed = status == RED and faithful[mutation.tests[0]][0] == GREEN
        failures += not is_killed
        verdict = "killed" if is_killed else "SURVIVED" if status == GREEN else "NO ANSWER"
        print(f"{verdict:9}  {mutation.file:12}  {mutation.name:50}  {line.removeprefix('FAILED tests/')[:150]}")
        if not is_killed:
            print(f"           {mutation.tests}, faithful: {faithful[mutation.tests[0]]}")
    print(f"{len(chosen) - failures} of {len(chosen)} mutants killed in {time.monotonic() - started:.0f} s")
    return 1 if failures or not chosen else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2]))
