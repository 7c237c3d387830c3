"""General ability before and after a run, by the tasks of `lm-eval`."""

from __future__ import annotations

from collections.abc import Sequence

from sculpt.models.learner import Learner
from sculpt.runs.directory import RunError
from sculpt.storage.nested import random_states, set_random_states


def check_lm_eval(tasks: Sequence[str]) -> None:
    """Raise `RunError` where `tasks` are asked for and `lm-eval` is not installed."""
    from importlib.util import find_spec

    if tasks and find_spec("lm_eval") is None:
        raise RunError(
            f"evaluation.lm_eval={list(tasks)}: lm-eval is not installed: pip install lm-eval"
        )


def general_ability(learner: Learner, tasks: Sequence[str], limit: int | None) -> dict[str, float]:
    """Main score of each task by name, e.g. `{"piqa acc": 0.78}`; the model is left as it was."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    was_training, states = learner.model.training, random_states()
    learner.model.eval()
    found = lm_eval.simple_evaluate(
        model=HFLM(pretrained=learner.model, tokenizer=learner.tokenizer),
        tasks=list(tasks),
        limit=limit,
    )
    learner.model.train(was_training)
    set_random_states(states)  # it sets seeds of its own
    return {
        f"{task} {measure.split(',')[0]}": float(value)
        for task, scores in found["results"].items()
        for measure, value in scores.items()
        if isinstance(value, int | float) and "stderr" not in measure and measure != "sample_len"
    }
