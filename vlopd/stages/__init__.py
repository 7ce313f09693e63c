"""The pipeline's stages up to geometry: each reads files of a run folder, writes one artifact, and is
skipped when the artifact is there and was made from the same inputs.

    source arm -> distilled arms -> masks -> retrained and transplanted arms -> geometry
"""

from vlopd.stages.arms import Making
from vlopd.stages.geometry import make_geometry, make_overlap
from vlopd.stages.make import make_arm, make_mask
from vlopd.stages.places import (
    arm_content,
    arm_digest,
    data_content,
    hub_folder,
    model_content,
    read_tensors,
    scores_of,
    source_arm,
    teacher_content,
    teacher_folder,
)
from vlopd.stages.verify import verify_run

__all__ = [
    "Making",
    "arm_content",
    "arm_digest",
    "data_content",
    "hub_folder",
    "make_arm",
    "make_geometry",
    "make_mask",
    "make_overlap",
    "model_content",
    "read_tensors",
    "scores_of",
    "source_arm",
    "teacher_content",
    "teacher_folder",
    "verify_run",
]
