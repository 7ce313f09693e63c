import copy

import pytest
import torch
from transformers import (
    AutoModel,
    CLIPVisionConfig,
    DynamicCache,
    Gemma3TextConfig,
    LlamaConfig,
    LlavaConfig,
    PretrainedConfig,
    Qwen2_5_VLConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
    Qwen3VLConfig,
    SiglipVisionConfig,
)

from vlopd.config.objective import JSD, K1, NLL, ReverseKL
from vlopd.config.recipe import Recipe
from vlopd.data.shapes import ShapesDataset
from vlopd.distributed import accelerator
from vlopd.errors import UserError
from vlopd.loop import backward
from vlopd.models import families
from vlopd.models.cache_size import cache_bytes
from vlopd.models.meta import meta_model
from vlopd.preflight.memory import (
    DeviceSpeed,
    Reader,
    estimate,
    kept_bytes,
    loss_cost,
    measure_device,
    parameter_counts,
    tower_cost,
    trace,
)
from vlopd.train.allocations import Allocations
from vlopd.train.log import Stopwatch
from vlopd.train.losses import Sampled, TokenInputs, chunked_divergence
from vlopd.train.optimizers import build_optimizer
from vlopd.train.pair import load_pair
from vlopd.train.rollouts import collect
from vlopd.train.sparse import CompactSlot, Trainable

SPEED = DeviceSpeed(1e12, 1e11, 10**10, 1e-5)
TEXT = dict(
    vocab_size=512,
    hidden_size=128,
    intermediate_size=352,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
AXES = dict(rope_type="default", rope_theta=1e4)
FAMILIES = {
    "llama": LlamaConfig(**TEXT),
    "qwen3": Qwen3Config(**TEXT, head_dim=64, tie_word_embeddings=True),
    "gemma3": Gemma3TextConfig(**TEXT, head_dim=32),
    "llava": LlavaConfig(
        text_config=LlamaConfig(**TEXT),
        vision_config=CLIPVisionConfig(num_hidden_layers=1, hidden_size=64, num_attention_heads=2),
    ),
    "qwen2_5_vl": Qwen2_5_VLConfig(
        text_config=dict(TEXT, rope_parameters=dict(AXES, mrope_section=[4, 6, 6])),
        vision_config=dict(
            depth=1, out_hidden_size=128, hidden_size=64, intermediate_size=128, num_heads=2
        ),
    ),
    "qwen3_vl": Qwen3VLConfig(
        text_config=dict(TEXT, head_dim=32, rope_parameters=dict(AXES, mrope_section=[8, 4, 4])),
        vision_config=dict(
            depth=1, out_hidden_size=128, deepstack_visual_indexes=[0], hidden_size=64, num_heads=2
        ),
    ),
}


@pytest.fixture(params=FAMILIES)
def family(request) -> PretrainedConfig:
    return FAMILIES[request.param]


def real_model(config: PretrainedConfig, dtype=torch.float32, attention="sdpa"):
    torch.manual_seed(0)
    model_class, _ = families.auto_classes(config)
    return model_class.from_config(
        copy.deepcopy(config), dtype=dtype, attn_implementation=attention
    ).eval()


def saved_bytes(model: torch.nn.Module, run) -> int:
    """Bytes of the distinct storages that autograd keeps in `run`, the model's own left out."""
    own = {parameter.data_ptr() for parameter in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage, tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = run()
    assert out.requires_grad
    return sum(storage.nbytes() for storage, _ in kept.values())


def small_estimate(config: PretrainedConfig, dtype=torch.float32, trained_fraction=1.0, **changes):
    reader = Reader(meta_model(config), prompt_tokens=8, patches=0)
    train = {"steps": 1, "prompts_per_step": 8, "micro_batch": 2} | changes.pop("train", {})
    recipe = Recipe(
        train=train,
        rollout={"max_new_tokens": 4, "batch": 2, **changes},
        loss={"type": "reverse_kl", "chunk_tokens": 16},
    )
    return estimate(recipe, reader, [reader], SPEED, dtype, trained_fraction)


# ------------------------------------------------------------------------------------------- models


def test_a_32b_model_takes_no_memory():
    """On the meta device a 32-billion-parameter model has its true count and not one real tensor."""
    config = Qwen3Config(
        vocab_size=151936, hidden_size=5120, intermediate_size=25600, num_hidden_layers=64,
        num_attention_heads=64, num_key_value_heads=8, head_dim=128, tie_word_embeddings=False,
    )  # fmt: skip
    model = meta_model(config)
    tensors = [*model.parameters(), *model.buffers()]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    attention = 5120 * 128 * (64 + 2 * 8 + 64) + 2 * 128
    layer = attention + 3 * 5120 * 25600 + 2 * 5120
    assert sum(parameter_counts(model).values()) == 2 * 151936 * 5120 + 64 * layer + 5120


def test_meta_models_leave_their_configuration_alone(family):
    """Every family builds without a real tensor, and the configuration is as it was."""
    before = family.to_dict()
    model = meta_model(family)
    assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {"meta"}
    assert {t.dtype for t in model.parameters()} == {torch.bfloat16}
    assert family.to_dict() == before


def test_counts_are_those_of_the_real_model(family):
    """Components add up to the real model's parameters, tied ones once."""
    counts = parameter_counts(meta_model(family))
    assert sum(counts.values()) == real_model(family).num_parameters()
    assert ("head" in counts) != family.tie_word_embeddings
    assert "other" not in counts


# --------------------------------------------------------------------------------------- activations


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_are_what_autograd_keeps(family, dtype, attention):
    """The estimate from the configuration is within 15 % of the bytes that a real forward saves."""
    model = real_model(family, dtype, attention)
    ids = torch.full((1, 95), 7)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0  # padding, so that the kernel gets a mask as it does in training
    body = families.backbone(model)
    real = saved_bytes(
        model, lambda: body(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    )
    kept = kept_bytes(trace(Reader(meta_model(family), 95), 0), attention, dtype)
    assert real / 1.15 < kept < real * 1.15


def test_probabilities_count_for_eager_attention_only():
    """Eager attention keeps [heads, T, T] a layer, in fp32 and again in bf16."""
    model = meta_model(FAMILIES["llama"])
    traced = trace(Reader(model, 0), 101)
    fused, eager = (kept_bytes(traced, each, torch.bfloat16) for each in ("sdpa", "eager"))
    assert eager - fused == 3 * 4 * 101 * 101 * (4 + 2)


def test_flops_are_two_a_weight_and_token_plus_attention():
    """A forward takes 2 N T FLOPs and 4 T^2 for each unit of attention width; a routed one its share."""
    tokens, config = 65, FAMILIES["llama"]
    matrices = 3 * (128 * 128 * 2 + 2 * 128 * 64 + 3 * 128 * 352)
    flops = trace(Reader(meta_model(config), 0), tokens).flops
    assert flops == pytest.approx(2 * matrices * tokens + 3 * 4 * tokens**2 * 128, rel=0.01)

    routed = Qwen3MoeConfig(
        **TEXT, head_dim=32, moe_intermediate_size=64, num_experts=8, num_experts_per_tok=2
    )
    matrices = 3 * (128 * 128 * 2 + 2 * 128 * 64 + 128 * 8 + 2 * 3 * 128 * 64)
    flops = trace(Reader(meta_model(routed), 0), tokens).flops
    assert flops == pytest.approx(2 * matrices * tokens + 3 * 4 * tokens**2 * 128, rel=0.01)


@pytest.mark.parametrize("vision_class", [CLIPVisionConfig, SiglipVisionConfig])
def test_vision_towers_are_right_within_half(vision_class):
    """A tower's kept bytes, by the rule of inputs and outputs, are within 1.5 of a real forward's."""
    vision = vision_class(
        hidden_size=64, intermediate_size=256, num_hidden_layers=3, num_attention_heads=2,
        image_size=96, patch_size=8,
    )  # fmt: skip
    vision.vision_use_head = False  # SigLIP's pooling, which no vision-language model reads
    config = LlavaConfig(text_config=LlamaConfig(**TEXT), vision_config=vision)
    tower = AutoModel.from_config(vision).eval()
    pixels = torch.zeros(1, 3, 96, 96)
    real = saved_bytes(tower, lambda: tower(pixel_values=pixels).last_hidden_state)
    flops, kept, inputs = tower_cost(Reader(meta_model(config), 200), torch.float32)
    assert inputs == 3 * 144 * 64 * 4
    assert real / 1.5 < kept < real * 1.5
    assert tower_cost(Reader(meta_model(config), 200, patches=0), torch.float32) == (0, 0, 0)
    assert flops > 2 * 144 * 3 * 12 * 64**2


def test_a_family_that_looks_at_values_is_refused():
    """Gated linear attention reads its tensors, so it gives one line instead of a wrong number."""
    config = Qwen3NextConfig(
        **{**TEXT, "num_hidden_layers": 4}, num_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=32, shared_expert_intermediate_size=32,
    )  # fmt: skip
    with pytest.raises(UserError, match="'qwen3_next' cannot be estimated"):
        trace(Reader(meta_model(config), 0), 9)


# ------------------------------------------------------------------------------------- what is held


@pytest.mark.parametrize(
    "dtype, density", [(torch.float32, 1.0), (torch.bfloat16, 1.0), (torch.bfloat16, 0.25)]
)
def test_values_gradients_and_moments_are_those_held(dtype, density):
    """Bytes of values, indices, gradients and moments equal those of a real step."""
    config = FAMILIES["qwen3"]
    model = real_model(config, dtype)
    mask = None
    if density < 1:  # every fourth coordinate
        mask = {n: torch.arange(p.numel()).view_as(p) % 4 == 0 for n, p in model.named_parameters()}
    trainable = Trainable(model, mask)
    optimizer = torch.optim.AdamW(trainable.parameters())
    model(input_ids=torch.full((1, 6), 7)).logits.float().sum().backward()
    optimizer.step()

    memory = small_estimate(config, dtype, trained_fraction=density).memory
    slots = trainable.slots.values()
    shared = {parameter.data_ptr() for parameter in model.parameters()}
    assert memory.student_weights == sum(p.nbytes for p in model.parameters())
    assert memory.values == sum(s.values.nbytes for s in slots if s.values.data_ptr() not in shared)
    places = [s.where.nbytes for s in slots if isinstance(s, CompactSlot)]
    assert memory.indices == sum(places)
    assert memory.gradients == sum(s.values.grad.nbytes for s in slots)
    moments = [optimizer.state[s.values] for s in slots]
    assert memory.moments == sum(m["exp_avg"].nbytes + m["exp_avg_sq"].nbytes for m in moments)


@pytest.mark.parametrize("kind, density, micro", [("llm", 1.0, 8), ("vlm", 0.2, 4)])
def test_each_phases_peak_is_the_one_counted(kind, density, micro):
    """The most bytes at once in the second step's rollout, gradient and update, counted allocation by allocation, are
    within 10 % of the estimate."""
    name = "shapes" if kind == "vlm" else "shapes-text"
    pair = load_pair(f"builtin:{name}-student", f"builtin:{name}-teacher", compute="fp32")
    modality = "image" if kind == "vlm" else "text"
    rendered = pair.render(list(ShapesDataset("train", 8, seed=3, modality=modality)))
    train = {"steps": 2, "prompts_per_step": 8, "micro_batch": micro}
    recipe = Recipe(train=train, rollout={"max_new_tokens": 8, "batch": micro})
    mask = None
    if density < 1:
        draws = torch.Generator().manual_seed(0)
        parameters = pair.student.model.named_parameters()
        mask = {n: torch.rand(p.shape, generator=draws) < density for n, p in parameters}
    models = [pair.student.model, pair.teachers[0].loaded.model]
    trainable = Trainable(pair.student.model, mask)
    optimizer = build_optimizer(recipe.optim, trainable)
    shared = {p.data_ptr() for model in models for p in model.parameters()}
    before = [p for model in models for p in model.parameters()]
    before += [s.values for s in trainable.slots.values() if s.values.data_ptr() not in shared]
    held, peaks = sum(tensor.nbytes for tensor in before), {}
    with Allocations() as counted:
        for step in range(2):
            trainable.zero_grad()
            counted.peak = counted.now
            batches = collect(pair, recipe, rendered, range(8), 1, step)
            peaks["rollout"] = held + counted.peak
            counted.peak = counted.now
            backward(pair, recipe, batches, accelerator(), Stopwatch())
            peaks["gradient"] = held + counted.peak
            counted.peak = counted.now
            optimizer.step(1e-4)
            peaks["update"] = held + counted.peak
    longest = max(batch.completions.ids.shape[1] for batch in batches)
    recipe = Recipe(train=train, rollout={"max_new_tokens": longest, "batch": micro})
    prompt = max(batch.prompts.input_ids.shape[1] for batch in batches)
    student, teacher = (Reader(model, prompt) for model in models)
    found = estimate(recipe, student, [teacher], SPEED, torch.float32, density)
    assert found.rollout_bytes == pytest.approx(peaks["rollout"], rel=0.1)
    assert found.gradient_bytes == pytest.approx(peaks["gradient"], rel=0.1)
    assert found.update_bytes == pytest.approx(peaks["update"], rel=0.1)


@pytest.mark.parametrize("loss", [ReverseKL(), JSD(), K1(), NLL()], ids=lambda loss: loss.type)
@pytest.mark.parametrize("chunk", [40, 20])
def test_the_losss_bytes_are_those_of_a_real_one(loss, chunk):
    """Counted on the meta device, they are what the same loss allocates on the CPU, in one chunk or several."""
    small = loss.model_copy(update={"chunk_tokens": chunk})
    heads = [torch.randn(5000, 4, requires_grad=own) for own in (True, False)]
    hidden = torch.randn(40, 4, requires_grad=True)
    sampled = Sampled(torch.zeros(40, dtype=torch.long), torch.zeros(40))
    teacher = None if loss.type == "nll" else hidden.detach()
    with Allocations() as counted:
        inputs = TokenInputs(
            hidden,
            lambda h: h @ heads[0].T,
            teacher,
            lambda h: h @ heads[1].T,
            sampled,
            torch.ones(40),
        )
        chunked_divergence(small, inputs)
    expected = loss_cost(small, 40, 5000, int(teacher is not None), None, torch.float32)
    assert expected.held == pytest.approx(counted.peak, rel=0.03)
    assert expected.moved * 40 == pytest.approx(counted.moved, rel=0.05)


def test_cache_bytes_are_those_of_a_filled_cache(family):
    """Grouped heads and a head width of their own are counted as the real cache holds them."""
    model = real_model(family)
    ids = torch.full((2, 9), 7)
    cache = DynamicCache(config=family.get_text_config())
    with torch.no_grad():
        families.backbone(model)(input_ids=ids, past_key_values=cache, use_cache=True)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert 2 * 9 * cache_bytes(family, torch.float32) == held


def test_phases_follow_the_settings(family):
    """Smaller micro-batches need less memory and more time; a mask shrinks what trains; time scales."""
    wide, narrow = (
        small_estimate(family, batch=size, train={"micro_batch": size}) for size in (8, 2)
    )
    assert wide.memory.activations == 4 * narrow.memory.activations
    assert wide.memory.kv_cache == 4 * narrow.memory.kv_cache
    assert wide.seconds.rollout < narrow.seconds.rollout
    assert wide.memory.gradients == narrow.memory.gradients
    masked = small_estimate(family, trained_fraction=0.1)
    assert masked.memory.moments == pytest.approx(0.1 * narrow.memory.moments, rel=1e-3)
    assert masked.peak_bytes < narrow.peak_bytes
    longer = small_estimate(family, max_new_tokens=40)
    assert longer.seconds.rollout > 5 * narrow.seconds.rollout
    assert narrow.peak_bytes == max(
        narrow.rollout_bytes, narrow.gradient_bytes, narrow.update_bytes
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_probe_gives_usable_numbers(dtype):
    """Every speed is finite and positive, and a product is slower than no time at all."""
    speed = measure_device("cpu", dtype)
    assert all(0 < value < float("inf") for value in speed[:4]) and speed.type == "cpu"
    assert speed.call_seconds < 1e-2
