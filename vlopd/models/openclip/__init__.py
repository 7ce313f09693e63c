"""Vision-language models with an OpenCLIP tower, as one more Hugging Face model class."""

MODEL_TYPE = "openclip_vlm"
"""Not part of transformers; vlopd.models.openclip.vlm registers it."""
