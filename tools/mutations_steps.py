"""Changes of the code around steps that the tests must notice; `mutations.py` makes them."""

STEPPING = "tests/sculpt/test_stepping.py::"
STANDING = "tests/sculpt/test_standing.py::"
STRAY = "tests/sculpt/test_stray.py::"
FAILING = "tests/sculpt/test_failing_steps.py::"
LAYERS = "tests/sculpt/test_layers.py::"

# Name, file, what stands there, what is put in its place, and the test that must fail.
STEPS = [
    (
        "steps: weights do not follow",
        "sculpt/stepping.py",
        "if not self._left_out:\n            self._update()",
        "if self._left_out:\n            self._update()",
        STEPPING + "test_a_closure_gives_the_steps_of_a_plain_loop",
    ),
    (
        "steps: weights stay behind between evaluations of a closure",
        "sculpt/stepping.py",
        "if evaluations:",
        "if False:",
        STEPPING + "test_a_closure_that_is_called_many_times_computes_with_current_weights",
    ),
    (
        "steps: the last evaluation of a closure counts for all",
        "sculpt/stepping.py",
        "dropped and (self._left_out or not evaluations)",
        "dropped",
        STEPPING + "test_weights_follow_what_any_finite_evaluation_moved",
    ),
    (
        "steps: the first evaluation of a closure counts for all",
        "sculpt/stepping.py",
        "dropped and (self._left_out or not evaluations)",
        "self._left_out or (dropped and not evaluations)",
        STEPPING + "test_weights_follow_what_any_finite_evaluation_moved",
    ),
    (
        "steps: a closure that is named is not watched",
        "sculpt/stepping.py",
        'kwargs | {"closure": watched}',
        "kwargs",
        STEPPING + "test_a_closure_without_finite_gradients_changes_nothing",
    ),
    (
        "steps: gradients that are not finite are dropped in any case",
        "sculpt/stepping.py",
        "if not self._skip_nonfinite:",
        "if False:",
        STEPPING + "test_steps_that_are_not_finite_are_taken_where_that_is_wanted",
    ),
    (
        "steps: nobody looks at the optimizer before the first one",
        "sculpt/stepping.py",
        "self._first(optimizer)",
        "pass",
        STEPPING + "test_an_optimizer_that_lost_coordinates_before_its_first_step",
    ),
    (
        "steps: modules are not looked at",
        "sculpt/stepping.py",
        "        self._check()\n",
        "",
        STANDING + "test_a_replaced_module_is_found_before_the_step",
    ),
    (
        "steps: hooks of a task stay when it ends",
        "sculpt/stepping.py",
        "            handle.remove()",
        "            pass",
        STRAY + "test_an_attached_optimizer_whose_task_is_over",
    ),
    (
        "steps: those after the end are taken",
        "sculpt/stepping.py",
        "register_step_pre_hook(refuse_idle_steps)",
        "register_step_pre_hook(lambda *_: None)",
        STRAY + "test_an_attached_optimizer_whose_task_is_over",
    ),
    (
        "steps: every one of an optimizer from before the task is taken once another is attached",
        "sculpt/stray.py",
        "(self.driven and not is_idle(optimizer))",
        "self.driven",
        STRAY + "test_the_optimizer_of_the_task_before",
    ),
    (
        "steps: those of others are refused beside an attached optimizer",
        "sculpt/stray.py",
        "(self.driven and not is_idle(optimizer))",
        "False",
        STRAY + "test_optimizers_of_others_are_left_alone",
    ),
    (
        "steps: coordinates beside frozen weights are not seen",
        "sculpt/stray.py",
        "if running.isdisjoint(map(id, held_by(optimizer))):",
        "if True:",
        STRAY + "test_all_parameters_of_the_model_by_hand",
    ),
    (
        "steps: the watch goes on after the task",
        "sculpt/stray.py",
        "        _watches.discard(self)\n",
        "",
        STRAY + "test_nobody_looks_between_tasks_or_without_a_sculptor",
    ),
    (
        "standing: another device is no move",
        "sculpt/standing.py",
        "if (now.dtype, now.device) != (was.dtype, was.device):",
        "if now.dtype != was.dtype:",
        STANDING + "test_a_moved_model_is_refused_before_anything_moves",
    ),
    (
        "standing: the model is held for ever",
        "sculpt/standing.py",
        'model.__dict__.pop("_apply", None)',
        "pass",
        STANDING + "test_a_moved_model_is_refused_before_anything_moves",
    ),
    (
        "standing: parameters move before one refuses",
        "sculpt/standing.py",
        "            refuse_to_move(parameter, change)",
        "            pass",
        STANDING + "test_a_moved_model_is_refused_before_anything_moves",
    ),
    (
        "standing: a running task is not seen",
        "sculpt/standing.py",
        'return isinstance(model.__dict__.get("_apply"), Standing)',
        "return False",
        STANDING + "test_one_task_at_a_time",
    ),
    (
        "standing: only the last step of a way is looked at",
        "sculpt/standing.py",
        "                links[id(children), child]",
        "            links[id(children), child]",
        STANDING + "test_a_replaced_module_is_found_before_the_step",
    ),
    (
        "standing: anything may be in the place of a module",
        "sculpt/standing.py",
        "children.get(child) is not module for",
        "children.get(child) is None for",
        STANDING + "test_a_replaced_module_is_found_before_the_step",
    ),
    (
        "standing: a wrapper is taken for another module",
        "sculpt/standing.py",
        "if id(module) not in paths:",
        "if self._model.get_submodule(name) is not module:",
        STANDING + "test_a_wrapped_module_goes_on_training",
    ),
    (
        "steps: a fold that fails leaves what it did",
        "sculpt/engines.py",
        "            matrix.undo(index in done)",
        "            pass",
        FAILING + "test_a_failing_fold_leaves_the_weights_as_before_the_step",
    ),
    (
        "steps: random roundings are taken back",
        "sculpt/matrices.py",
        "if followed and not self.recompute:",
        "if False:",
        FAILING + "test_a_failing_fold_of_16_bit_weights_loses_no_weight_its_coordinates",
    ),
    (
        "steps: coordinates are looked at while compiling",
        "sculpt/layers.py",
        "if not torch.compiler.is_compiling():",
        "if True:",
        LAYERS + "test_other_layers_compile_without_a_graph_break",
    ),
]
