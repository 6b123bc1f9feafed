"""Learning curves: how they are recorded, and what they are turned into.

A curve is a list of points in the order of training; each is a mapping with `seconds` (of training), `targets` (trained
on so far) and `auc`. Between two points AUC is taken to run straight.
"""

import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from transformers import TrainerCallback

Curve = Sequence[Mapping[str, float]]


class Recorder(TrainerCallback):
    """Times a Trainer's steps with their data, stops it, and asks for answers now and then, outside the time.

    Args:
        model: whose embedding tells how many positions training computed, padding included.
        answer: gives probabilities [targets, labels] of the validation targets.
        targets_after: targets trained on after so many steps.
        seconds: of training, after which the run ends with the step that is under way.
        steps: end earlier, after so many; None for no such end.
        points: answers are asked for at so many even parts of `seconds`, and before the first step.
        at_targets: answers are also asked for once so many targets are trained on.

    Attributes:
        points: the curve, without AUC.
        answers: float arrays [targets, labels], one a point.
        positions: computed in training.
    """

    def __init__(
        self, model: torch.nn.Module, answer: Callable[[], np.ndarray], targets_after: Callable[[int], int], *,
        seconds: float, steps: int | None, points: int, at_targets: int | None = None,
    ):  # fmt: skip
        self.answer, self.targets_after = answer, targets_after
        self.limit, self.most_steps, self.parts = seconds, steps, points
        self.at_targets = float("inf") if at_targets is None else at_targets
        self.points: list[dict[str, float]] = []
        self.answers: list[np.ndarray] = []
        self.seconds, self.steps, self.positions = 0.0, 0, 0
        self._mark: float | None = None
        model.get_input_embeddings().register_forward_hook(self._count)

    def _count(self, module, inputs, output) -> None:
        if module.training:
            self.positions += inputs[0].numel()

    def on_epoch_begin(self, args, state, control, **kwargs):
        """Answer once before the first step, and start the clock."""
        if self._mark is None:
            self._record()
            self._mark = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        """Add the step's time; answer where that is due; stop at the end."""
        self.seconds += time.perf_counter() - self._mark
        self.steps += 1
        last = self.points[-1]
        ended = self.seconds >= self.limit or self.steps == self.most_steps
        due = self.seconds // (self.limit / self.parts) > last["seconds"] // (self.limit / self.parts)
        reached = last["targets"] < self.at_targets <= self.targets_after(self.steps)
        if ended or due or reached:
            self._record()
        control.should_training_stop = control.should_training_stop or ended
        self._mark = time.perf_counter()

    def _record(self) -> None:
        self.points.append({"seconds": self.seconds, "steps": self.steps, "targets": self.targets_after(self.steps)})
        self.answers.append(np.asarray(self.answer(), np.float64))


def auc_at(curve: Curve, axis: str, value: float) -> float | None:
    """AUC where `axis` ("seconds" or "targets") has `value`; None outside the curve."""
    places = [point[axis] for point in curve]
    if not places or not places[0] <= value <= places[-1]:
        return None
    return float(np.interp(value, places, [point["auc"] for point in curve]))


def seconds_to(curve: Curve, auc: float) -> float | None:
    """Training seconds until the curve first has `auc`; None where it never does."""
    for number, point in enumerate(curve):
        if point["auc"] >= auc:
            if number == 0:
                return float(point["seconds"])
            before = curve[number - 1]
            share = (auc - before["auc"]) / (point["auc"] - before["auc"])
            return float(before["seconds"] + share * (point["seconds"] - before["seconds"]))
    return None


def side_by_side(curves: Mapping[str, Curve], auc: float) -> dict:
    """All curves at the time and at the number of targets that the shortest of them ends with, and their time to `auc`.

    `seconds` and `targets` are those ends; `systems` has `auc_at_equal_seconds`, `auc_at_equal_targets` and
    `seconds_to_auc` by system, None for what a curve does not tell.
    """
    seconds, targets = (min(curve[-1][axis] for curve in curves.values()) for axis in ("seconds", "targets"))
    return {
        "seconds": seconds,
        "targets": targets,
        "auc": auc,
        "systems": {
            name: {
                "auc_at_equal_seconds": auc_at(curve, "seconds", seconds),
                "auc_at_equal_targets": auc_at(curve, "targets", targets),
                "seconds_to_auc": seconds_to(curve, auc),
            }
            for name, curve in curves.items()
        },
    }
