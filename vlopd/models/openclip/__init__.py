"""Vision-language models with an OpenCLIP tower, as one more Hugging Face model class."""

MODEL_TYPE = "openclip_vlm"
"""Which transformers does not know by itself; vlopd.models.openclip.vlm registers it."""
