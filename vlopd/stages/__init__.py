"""The pipeline's stages up to geometry: each reads files of a run folder, writes one artifact, and is
skipped when the artifact is there and was made from the same inputs.

    source arm -> distilled arms -> masks -> retrained and transplanted arms -> geometry
"""

from vlopd.stages.arms import Making
from vlopd.stages.geometry import make_geometry, make_overlap
from vlopd.stages.make import make_arm, make_mask
from vlopd.stages.places import (
    arm_digest,
    hub_folder,
    read_tensors,
    scores_of,
    source_arm,
    teacher_folder,
)

__all__ = [
    "Making",
    "arm_digest",
    "hub_folder",
    "make_arm",
    "make_geometry",
    "make_mask",
    "make_overlap",
    "read_tensors",
    "scores_of",
    "source_arm",
    "teacher_folder",
]
