"""Masks: which coordinates may train. A mask is a dict of bool tensors by parameter name."""

from vlopd.masks.apply import transplanted
from vlopd.masks.compare import density, jaccard
from vlopd.masks.files import check_mask, check_shapes, load_mask, save_mask
from vlopd.masks.rules import Mask, build_mask, random_like, visible
from vlopd.masks.select import largest, quota, select, smallest

__all__ = [
    "Mask", "build_mask", "check_mask", "check_shapes", "density", "jaccard", "largest", "load_mask", "quota",
    "random_like", "save_mask", "select", "smallest", "transplanted", "visible",
]  # fmt: skip
