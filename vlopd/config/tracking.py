"""Settings of the trackers of training curves."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from vlopd.config.base import Section, Unique

Tracker = Literal["tensorboard", "trackio", "wandb"]

READS: dict[Tracker, tuple[str, ...]] = {
    "tensorboard": (),
    "trackio": ("project", "group"),
    "wandb": ("project", "group", "entity", "tags", "mode"),
}
"""Settings that each tracker has a place for; the name of its run is the arm's."""


class TrackingConfig(Section):
    """Trackers for training curves besides metrics.jsonl, through accelerate; they apply while an arm trains."""

    trackers: Annotated[tuple[Tracker, ...], Unique] = ()
    """Each must be installed: `pip install 'vlopd[trackers]'`."""
    project: str | None = None
    """Project of wandb and trackio; null for the experiment's name."""
    group: str | None = None
    """Group of wandb's and trackio's runs, one run per arm; null for the run folder's name."""
    entity: str | None = None
    """User or team of wandb's project; null for wandb's default."""
    tags: Annotated[tuple[str, ...], Unique] = ()
    """Tags of wandb's runs."""
    mode: Literal["online", "offline", "disabled"] | None = None
    """Mode of wandb; null for $WANDB_MODE, and offline without it."""

    @property
    def notes(self) -> list[str]:
        """Settings without effect, one line each."""
        default = TrackingConfig()
        changed = {key for key, value in self if key != "trackers" and value != dict(default)[key]}
        read = {key for tracker in self.trackers for key in READS[tracker]}
        if not changed - read:
            return []
        named = ", ".join(
            f"tracking.{key}" for key in TrackingConfig.model_fields if key in changed - read
        )
        if not self.trackers:
            return [f"{named}: no effect without tracking.trackers"]
        return [f"{named}: no effect on {', '.join(self.trackers)}"]

    def arguments(self, tracker: Tracker, experiment: str, run: str, arm: str) -> dict[str, Any]:
        """Arguments that start a tracker for one arm, by their names in its `init`."""
        if tracker == "tensorboard":
            return {"project": f"{experiment}-{arm}"}
        own = {
            "project": self.project or experiment,
            "group": self.group or run,
            "entity": self.entity,
            "tags": list(self.tags) or None,
            "mode": self.mode,
        }
        return {"name": arm, **{key: own[key] for key in READS[tracker] if own[key] is not None}}
