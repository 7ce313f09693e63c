"""A vision-language model of any open_clip vision tower, an MLP projector and any causal language model.

`assemble` (assemble.py) creates one. The rest of the code treats it as one more Hugging Face class: after
`register()` the auto classes load such a folder. open_clip, which takes seconds to import, is imported only where a
tower is built or an image is transformed.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    BatchFeature,
    GenerationMixin,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_transforms import to_pil_image
from transformers.image_utils import make_flat_list_of_images
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils.generic import can_return_tuple

from vlopd.errors import ConfigError
from vlopd.models.openclip import MODEL_TYPE


def register() -> None:
    """Registers the classes below with transformers' auto classes. Idempotent."""
    AutoConfig.register(MODEL_TYPE, OpenClipVlmConfig, exist_ok=True)
    AutoModelForImageTextToText.register(
        OpenClipVlmConfig, OpenClipVlmForConditionalGeneration, exist_ok=True
    )
    AutoImageProcessor.register(
        OpenClipVlmConfig,
        image_processor_classes={"torchvision": OpenClipImageProcessor},
        exist_ok=True,
    )
    AutoProcessor.register(OpenClipVlmConfig, OpenClipVlmProcessor, exist_ok=True)


# -------------------------------------------------------------------------------------------- model


class OpenClipVlmConfig(PreTrainedConfig):
    """All settings needed to rebuild the model without weights or network access.

    `open_clip` is the vision part of open_clip's `model_cfg`: embed_dim, quick_gelu and vision_cfg.
    `preprocess` is the tower's image transform (open_clip's PreprocessCfg).
    """

    model_type = MODEL_TYPE
    sub_configs_defaults: ClassVar = {"text_config": SubConfigSpec(AutoConfig, model_type="llama")}

    open_clip: Any = None
    preprocess: Any = None
    text_config: Any = None  # becomes the language model's own config class
    image_token_id: int = 0
    image_seq_length: int = 0  # tokens of an image
    vision_hidden_size: int = 0  # their width
    vision_layer: int | None = (
        None  # None: the tower's own output tokens; else a block, without norm
    )
    keep_class_token: bool = False
    projector_hidden_size: int | None = None  # None: that of the language model
    projector_hidden_act: str = "gelu"
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.tie_word_embeddings |= bool(getattr(self.text_config, "tie_word_embeddings", False))


def build_tower(open_clip: dict[str, Any]) -> Any:
    """Builds open_clip's vision tower alone, with random weights.

    Uses open_clip's internal function, since the public one also builds a text tower.
    """
    from open_clip.model import _build_vision_tower

    return _build_vision_tower(**open_clip)


def check_tower(tower: Any, layer: int | None, keep_class_token: bool) -> None:
    """Raises ConfigError for features that this tower does not provide."""
    trunk = getattr(tower, "trunk", None)
    if layer is not None and trunk is not None and not hasattr(trunk, "forward_intermediates"):
        raise ConfigError(
            f"the timm model {type(trunk).__name__} has no intermediate features; "
            f"leave out vision_layer = {layer}"
        )
    class_token = hasattr(tower, "class_embedding") or getattr(trunk, "num_prefix_tokens", 0) > 0
    pooled = layer is None and getattr(tower, "attn_pool", None) is not None
    if keep_class_token and (pooled or not class_token):
        raise ConfigError(
            f"the tower {type(trunk or tower).__name__} has no class token; "
            "set keep_class_token to false"
        )


def image_tokens(tower: Any, pixels: Tensor, layer: int | None, keep_class_token: bool) -> Tensor:
    """The tower's features of each image before pooling: [I, 3, h, w] -> [I, S, W]."""
    trunk = getattr(tower, "trunk", None)
    if layer is None and trunk is not None:  # timm: its adapter in open_clip pools
        features = trunk.forward_features(pixels)
        if features.ndim == 4:
            channels_last = getattr(trunk, "output_fmt", "NCHW") == "NHWC"
            return features.flatten(1, 2) if channels_last else features.flatten(2).mT
        prefix = 0 if keep_class_token else getattr(trunk, "num_prefix_tokens", 0)
        return features[:, prefix:]
    if (
        layer is None and getattr(tower, "attn_pool", None) is not None
    ):  # its queries are the output
        tower.output_tokens = True
        return tower(pixels)[1]
    # the last block under the final norm is the tower's own output, class token included
    normalize = layer is None and not getattr(tower, "final_ln_after_pool", False)
    out = tower.forward_intermediates(
        pixels,
        indices=[-1 if layer is None else layer],
        normalize_intermediates=normalize,
        intermediates_only=True,
        stop_early=True,
        output_extra_tokens=keep_class_token,
    )
    tokens = out["image_intermediates"][0].flatten(2).mT
    if keep_class_token:
        tokens = torch.cat([out["image_intermediates_prefix"][0], tokens], 1)
    return tokens


class OpenClipVlmProjector(nn.Module):
    """Two linear maps with a nonlinearity between: image features [.., W] -> token embeddings [.., H]."""

    def __init__(self, config: OpenClipVlmConfig):
        super().__init__()
        width = config.text_config.hidden_size
        hidden = config.projector_hidden_size or width
        self.linear_1 = nn.Linear(config.vision_hidden_size, hidden)
        self.act = ACT2FN[config.projector_hidden_act]
        self.linear_2 = nn.Linear(hidden, width)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear_2(self.act(self.linear_1(features)))


class OpenClipVlmPreTrainedModel(PreTrainedModel):
    config_class = OpenClipVlmConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True  # the language model raises for an unsupported kernel
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _skip_keys_device_placement: ClassVar = ["past_key_values"]

    @torch.no_grad()
    def _init_weights(self, module: Any) -> None:
        super()._init_weights(module)
        # Loading builds the model on the meta device, where timm's non-persistent buffers are empty.
        if hasattr(module, "init_non_persistent_buffers"):
            module.init_non_persistent_buffers()


class OpenClipVlmModel(OpenClipVlmPreTrainedModel):
    """The model without its output layer."""

    def __init__(self, config: OpenClipVlmConfig):
        super().__init__(config)
        self.vision_tower = build_tower(config.open_clip)
        self.multi_modal_projector = OpenClipVlmProjector(config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """Pixels [I, 3, h, w] -> embeddings of the image tokens [I, S, H]."""
        pixels = pixel_values.to(self.multi_modal_projector.linear_1.weight.dtype)
        config = self.config
        features = image_tokens(
            self.vision_tower, pixels, config.vision_layer, config.keep_class_token
        )
        return self.multi_modal_projector(features)

    def embed(self, input_ids: Tensor, pixel_values: Tensor | None) -> Tensor:
        """Token embeddings [B, T, H], with image features at the placeholders.

        Raises ValueError when placeholders and image features differ in number.
        """
        embeddings = self.get_input_embeddings()(input_ids)
        places = input_ids == self.config.image_token_id
        features = None if pixel_values is None else self.get_image_features(pixel_values)
        wanted, given = int(places.sum()), 0 if features is None else features[..., 0].numel()
        if wanted != given:
            raise ValueError(
                f"the text has {wanted} image tokens (id {self.config.image_token_id}) and the images "
                f"give {given} features; expand each image to {self.config.image_seq_length} tokens"
            )
        if features is None:
            return embeddings
        return embeddings.masked_scatter(places[..., None], features.to(embeddings.dtype))

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Ids [B, T] with the pixels of their images [I, 3, h, w], in order -> last_hidden_state [B, T, H].

        Raises ValueError for both or neither of ids and embeddings, and for pixels beside embeddings.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if input_ids is not None:
            inputs_embeds = self.embed(input_ids, pixel_values)
        elif pixel_values is not None:
            raise ValueError("pixel_values need input_ids, which hold the image placeholders")
        return self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )


class OpenClipVlmForConditionalGeneration(OpenClipVlmPreTrainedModel, GenerationMixin):
    """The model with its output layer, tied to the embedding where the language model's is."""

    def __init__(self, config: OpenClipVlmConfig):
        super().__init__(config)
        self.model = OpenClipVlmModel(config)
        text = config.text_config
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        embedding = self.model.get_input_embeddings()
        name = next(name for name, module in self.named_modules() if module is embedding)
        self._tied_weights_keys = {"lm_head.weight": f"{name}.weight"}
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        return self.model.get_image_features(pixel_values)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """As `OpenClipVlmModel.forward`, with logits [B, T, V]; with labels [B, T] (-100: left out) a loss."""
        out = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(out.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            size = self.config.text_config.vocab_size
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
        )


# ---------------------------------------------------------------------------------------- processor


class OpenClipImageProcessor(BaseImageProcessor):
    """open_clip's evaluation image transform; takes the arguments of its PreprocessCfg."""

    def __init__(self, **kwargs: Any):
        from open_clip.transform import PreprocessCfg

        names = PreprocessCfg.__dataclass_fields__
        cfg = PreprocessCfg(**{k: kwargs.pop(k) for k in list(kwargs) if k in names})
        super().__init__(**kwargs)
        self.size, self.mode, self.fill_color = cfg.size, cfg.mode, cfg.fill_color
        self.mean, self.std = list(cfg.mean), list(cfg.std)
        self.interpolation, self.resize_mode = cfg.interpolation, cfg.resize_mode

    def preprocess(
        self, images: Any, return_tensors: str | None = None, **kwargs: Any
    ) -> BatchFeature:
        """Images, flat or nested by prompt -> pixel_values [I, 3, h, w]."""
        from open_clip.transform import PreprocessCfg, image_transform_v2

        if kwargs:
            raise TypeError(f"the image transform is fixed; remove {', '.join(kwargs)}")
        names = PreprocessCfg.__dataclass_fields__
        transform = image_transform_v2(
            PreprocessCfg(**{name: getattr(self, name) for name in names}), is_train=False
        )
        flat = make_flat_list_of_images(self.fetch_images(images))
        pixels = torch.stack([transform(to_pil_image(image)) for image in flat])
        return BatchFeature({"pixel_values": pixels}, tensor_type=return_tensors)


class OpenClipVlmProcessor(ProcessorMixin):
    """Expands each image placeholder of the text to `image_seq_length` tokens; transforms the images."""

    def __init__(
        self,
        image_processor: OpenClipImageProcessor | None = None,
        tokenizer: Any = None,
        image_seq_length: int = 0,
        image_token: str = "<image>",
        chat_template: str | None = None,
    ):
        self.image_seq_length = image_seq_length
        self.image_token = image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs: Any) -> str:
        return self.image_token * self.image_seq_length
