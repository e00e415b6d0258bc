"""What a training goes on from: its checkpoint, and whether it is of what is asked for now."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from defenses.checkpoint import REMEDY, check_readable, differences, load, save
from defenses.data import digest
from defenses.identity import described, layers

KEPT = ["history", "states", "asked", "reached", "augment", "first"]


@dataclass(eq=False)
class Resumable:
    """A training run and the file that it is kept in, as `defenses.training.fit` uses it.

    Attributes
    ----------
    run : dict
        What must be as it was: data, loss, seed.
    parts : dict
        Those with a state: optimizer, schedule, model.
    asked : dict
        Layers, parameters and their groups, options of optimizer and schedule, in words, as they
        were before the first step.
    augment, first : str
        The augmentation in words, and a digest of what it made of the first batch.
    """

    path: Path
    run: dict[str, Any]
    parts: dict[str, Any]
    asked: dict[str, str]
    augment: str
    first: str = ""

    @classmethod
    def of(
        cls,
        path: str | Path,
        run: dict[str, Any],
        model: nn.Module,
        optimizer: Optimizer,
        schedule: LRScheduler | None,
        loss: Callable[..., Any],
        augment: Callable[..., Any] | None,
    ) -> Resumable:
        """The run of these parts.

        Raises
        ------
        ValueError
            If a checkpoint could not hold all of their state.
        """
        own = {id(weight) for weight in model.parameters()}
        trained = [weight for group in optimizer.param_groups for weight in group["params"]]
        if foreign := sum(id(weight) not in own for weight in trained):
            raise ValueError(
                f"the optimizer trains {foreign} tensors that are not the model's, which the "
                "checkpoint would not hold: make them parameters of the model"
            )
        parts: dict[str, Any] = {"optimizer": optimizer, "schedule": schedule, "model": model}
        parts = {name: part for name, part in parts.items() if part is not None}
        extra = {k: v for k, v in model.state_dict().items() if not isinstance(v, Tensor)}
        check_readable(extra, f"what get_extra_state of the model returns, {', '.join(extra)}")
        check_readable(optimizer.state_dict()["param_groups"], "the options of the optimizer")
        if schedule is not None:
            check_readable(schedule.state_dict(), f"the state of {type(schedule).__name__}")
        known = {id(part): f"the {name}" for name, part in parts.items()}
        run = run | {"loss": described(loss, known)}
        return cls(Path(path), run, parts, _asked(**parts), described(augment, known))

    def resume(self, epochs: int, first_batch: Callable[[], Tensor]) -> list[dict[str, float]]:
        """The history of the file, whose states the parts take on; empty without a file.

        Raises
        ------
        ValueError
            If the file is of another run or of more epochs; nothing has changed then.
        """
        found = load(self.path, self.run, KEPT)
        if found is None:
            return []
        history, states, asked, reached, augment, first = found
        if len(history) > epochs:
            done = f"{len(history)} epochs are done, {epochs} asked for"
            raise ValueError(f"{self.path} belongs to another run ({done}); {REMEDY}")
        if self.asked not in (asked, reached):
            raise ValueError(
                f"{self.path} was written for another model or optimizer "
                f"({differences(asked, self.asked)}); {REMEDY}"
            )
        # Another function that makes the same of the first batch is the same augmentation.
        if len(history) < epochs and augment != self.augment and first != digest([first_batch()]):
            changed = differences({"augment": augment}, {"augment": self.augment})
            raise ValueError(f"{self.path} belongs to another run ({changed}); {REMEDY}")
        if _forms(self.parts["model"].state_dict()) != _forms(states["model"]):
            raise ValueError(
                f"{self.path} was written for another model: its buffers differ; {REMEDY}"
            )
        for name, part in self.parts.items():
            part.load_state_dict(states[name])
        self.asked, self.augment, self.first = asked, augment, first
        return list(history)

    def note_first(self, x: Tensor) -> None:
        """Keep what the first batch of the run looks like."""
        self.first = self.first or digest([x])

    def save(self, history: list[dict[str, float]]) -> None:
        """Write the file anew, after an epoch."""
        states = {name: part.state_dict() for name, part in self.parts.items()}
        kept = [history, states, self.asked, _asked(**self.parts), self.augment, self.first]
        save(self.path, {"run": self.run, **dict(zip(KEPT, kept, strict=True))})


def _asked(
    model: nn.Module, optimizer: Optimizer, schedule: LRScheduler | None = None
) -> dict[str, str]:
    """What a run must have in common with the one that it goes on from, by name."""
    asked = {f"layer {name}": text for name, text in layers(model).items()}
    asked |= {"optimizer": type(optimizer).__name__}
    asked |= {"schedule": type(schedule).__name__ if schedule else "none"}
    known = {id(optimizer): "the optimizer", id(model): "the model", id(schedule): "the schedule"}
    members: dict[int, int] = {}
    for i, group in enumerate(optimizer.param_groups):
        members |= {id(weight): i for weight in group["params"]}
        options = {k: v for k, v in group.items() if k not in ("params", "param_names")}
        asked |= {f"group {i} {name}": described(v, known) for name, v in options.items()}
    for name, weight in model.named_parameters():
        place = f"group {members[id(weight)]}" if id(weight) in members else "no group"
        frozen = "" if weight.requires_grad else ", frozen"
        asked[f"parameter {name}"] = f"{tuple(weight.shape)} {weight.dtype} in {place}{frozen}"
    state = {k: v for k, v in vars(schedule).items() if k != "optimizer"} if schedule else {}
    return asked | {f"schedule {name}": described(v, known) for name, v in state.items()}


def _forms(state: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v.shape if isinstance(v, Tensor) else type(v) for k, v in state.items()}
