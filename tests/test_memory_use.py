"""Memory of a training: nothing is left behind, settings that hold less change no number, and it is recorded."""

import gc
import json
import threading
import weakref
from collections import deque

import pytest
import torch
from accelerate import Accelerator

from tests.conftest import pair_of, recipe_of
from tests.test_trainable import always, random_mask
from vlopd import loop
from vlopd.config.input import load_config
from vlopd.config.objective import FunctionLoss, ReverseKL
from vlopd.errors import (
    REMEDIES,
    ConfigError,
    OutOfMemory,
    is_out_of_memory,
    one_line_out_of_memory,
)
from vlopd.loop import Hooks, distill
from vlopd.plugins import Plugin
from vlopd.preflight.memory import Memory, loss_cost
from vlopd.train import pair as pair_module
from vlopd.train.checkpointing import layers_of, recomputed, refuse_without_layers
from vlopd.train.memory_use import MemoryUse
from vlopd.train.offload import Downloads, Resting
from vlopd.train.optimizers import build_optimizer
from vlopd.train.sparse import CompactSlot, Trainable
from vlopd.weights.subspace import update_projection

STEPS = {"steps": 2, "prompts_per_step": 2, "save_every": 1}
EMA = {"model": "student", "ema": 0.9}
NO_HOOKS = Hooks()


@pytest.fixture
def train(make_config, make_data, tmp_path):
    """(kind, settings of train, mask, hooks, **sections) -> a training of two steps, of a freshly loaded pair."""

    def train(kind, settings=None, mask=None, hooks=NO_HOOKS, name=None, **sections):
        config = make_config(kind, train={**STEPS, **(settings or {})}, **sections)
        out, identity = (None, None) if name is None else (tmp_path / name, "x")
        pair, recipe = pair_of(config), recipe_of(config)
        if callable(mask):
            mask = mask(pair.student.model)
        return distill(pair, make_data(kind, 8), recipe, out, 1, mask, hooks, identity=identity)

    return train


def weights(trained):
    return dict(trained.student.model.named_parameters())


def assert_same(one, other):
    for name, values in weights(one).items():
        assert torch.equal(values, weights(other)[name]), name


# ------------------------------------------------------------------------------------------ leaks


def test_six_arms_leave_no_tensor(kind, train):
    """After each of six arms in one process (dense, masked, with a moving-average teacher, offloaded, checkpointed,
    failed) not a byte of its weights and values is alive, and a result that is kept has no gradients."""
    alive = []  # of all arms: weak references to their parameters and values

    def watch(step, trainable):
        alive.extend(map(weakref.ref, trainable.parameters()))
        alive.extend(map(weakref.ref, trainable.model_parameters.values()))

    def fail(step, trainable):
        watch(step, trainable)
        raise OSError("disk full")

    held = Hooks(keep=watch)
    keeps = {"steps": 1, "keep_steps": [1]}
    arms = [
        lambda: train(kind, keeps, hooks=held),
        lambda: train(kind, keeps, random_mask, held, precision={"compute": "bf16"}),
        lambda: train(kind, keeps, hooks=held, teacher=EMA),
        lambda: train(kind, {**keeps, "offload_optimizer": True}, hooks=held),
        lambda: train(kind, {**keeps, "activation_checkpointing": True}, hooks=held),
    ]
    for k, arm in enumerate(arms, 1):
        trained = arm()
        assert all(value.grad is None for value in trained.trainable.parameters())
        del trained
        gc.collect()
        assert len(alive) > 10 * k
        assert sum(tensor.nbytes for ref in alive if (tensor := ref()) is not None) == 0, k
    with pytest.raises(OSError, match="disk full"):
        train(kind, keeps, hooks=Hooks(keep=fail))
    gc.collect()
    assert sum(tensor.nbytes for ref in alive if (tensor := ref()) is not None) == 0


def test_a_projected_trainable_is_freed_without_being_closed(make_pair):
    """No cycle through the hooks, which the garbage collector could not see; then gradients are the model's own."""
    model = make_pair("llm").student.model
    name = next(n for n, p in model.named_parameters() if p.ndim == 2)
    early = torch.randn(model.get_parameter(name).shape)
    trainable = Trainable(model, None, {name: update_projection(early, 2, "both")})
    slots = [weakref.ref(slot) for slot in trainable.slots.values()]
    parameters = [weakref.ref(parameter) for parameter in model.parameters()]
    del trainable
    assert not any(slot() for slot in slots)
    model(input_ids=torch.tensor([[5, 6]])).logits.sum().backward()
    assert model.get_parameter(name).grad is not None
    del model
    gc.collect()
    assert not any(parameter() is not None for parameter in parameters)


# --------------------------------------------------------------------------------- same numbers, less held


def test_settings_of_memory_change_no_bit(kind, train):
    """Recomputed layers, an optimizer on the host, teachers that rest there: the plain run's weights and losses, over
    two micro-batches and two updates a step. Recomputing keeps less than half of the activations."""
    split = {"updates_per_rollout": 2, "micro_batch": 1}
    plain = train(kind, split)
    for name in ("activation_checkpointing", "offload_optimizer", "offload_teacher"):
        other = train(kind, {**split, name: True})
        assert_same(plain, other)
        assert plain.metrics.loss.tolist() == other.metrics.loss.tolist()
        kept = [its.memory["parts_bytes"]["activations"] for its in (plain, other)]
        assert kept[1] < 0.5 * kept[0] if name == "activation_checkpointing" else kept[1] == kept[0]


@pytest.mark.parametrize(
    ("name", "storage"),
    [
        ("adamw", "whole"),
        ("adamw", "listed"),
        ("sgd", "packed"),
        ("rmsprop", "whole"),
        ("lion", "packed"),
    ],
)
def test_an_offloaded_optimizer_has_the_same_bits(name, storage, make_pair, make_config):
    """Values, gradients over two micro-batches, clipping and state, for every optimizer and storage, in bf16; and
    values are other memory than the model's, which has the rounded ones."""
    optim = make_config("llm", optim={"type": name, "learning_rate": 1e-2}).optim
    found = []
    for offload in (False, True):
        model = make_pair("llm", "bf16").student.model
        mask = None if storage == "whole" else random_mask(model, 0.3)
        trainable = Trainable(model, mask, choose=always(storage), offload=offload)
        optimizer = build_optimizer(optim, trainable)
        ids = torch.arange(5, 25).view(4, 5)
        for _ in range(2):
            trainable.zero_grad()
            for part in ids.split(2):
                model(input_ids=part).logits.float().log_softmax(-1)[..., 3].sum().backward()
            trainable.wait()
            torch.nn.utils.clip_grad_norm_(list(trainable.parameters()), 1.0)
            optimizer.step(optim.learning_rate)
            trainable.write_back()
        found.append((trainable.state(), optimizer.state(), dict(model.named_parameters())))
    (values, state, parameters), (others, state_of_other, other_parameters) = found
    for n in values:
        assert torch.equal(values[n], others[n]), n
        assert others[n].data_ptr() != other_parameters[n].data_ptr()
        for key, entry in state[n].items():
            same = torch.equal if isinstance(entry, torch.Tensor) else lambda a, b: a == b
            assert same(entry, state_of_other[n][key]), (n, key)
    assert all(torch.equal(p, other_parameters[n]) for n, p in parameters.items())


def test_an_offloaded_run_resumes_as_a_plain_one(train, tmp_path):
    """And the other way round: the state is the same, and so are the weights at the end."""
    whole = train("llm")
    for first, then in [(True, False), (False, True)]:
        name = f"resumed-{first}"

        def stop(step, trainable):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            halted = {"offload_optimizer": first, "keep_steps": [2]}
            train("llm", halted, hooks=Hooks(keep=stop), name=name)
        assert (tmp_path / name / "state" / "state.safetensors").exists()
        resumed = train("llm", {"offload_optimizer": then}, name=name)
        assert_same(whole, resumed)
        assert len(resumed.metrics) == 2


def test_a_moving_average_rests_and_is_offloaded(train):
    """A teacher that follows the student does so in host memory too, bit for bit."""
    plain = train("llm", {"steps": 3}, teacher=EMA)
    other = train(
        "llm", {"steps": 3, "offload_optimizer": True, "offload_teacher": True}, teacher=EMA
    )
    assert_same(plain, other)
    assert plain.metrics.kl.tolist() == other.metrics.kl.tolist()


def test_teachers_move_once_a_step(train, monkeypatch):
    """With two micro-batches and two updates a step; where teachers also write the completions, twice. Output layers
    never move, and all weights are the bits of before."""
    rests = []

    class Watched(Resting):
        def __init__(self, teachers, *more):
            super().__init__(teachers, *more)
            rests.append(self)
            self.names = sum(len(list(t.loaded.model.parameters())) for t in teachers)
            heads = [t.loaded.model.get_output_embeddings() for t in teachers]
            self.stay = [parameter for head in heads for parameter in head.parameters()]
            self.before = [parameter.clone() for parameter in self.parameters]
            moving = {id(parameter) for parameter in self.parameters}
            assert not any(id(parameter) in moving for parameter in self.stay)
            assert len(moving) == self.names - len(self.stay) > 0

    monkeypatch.setattr(loop, "Resting", Watched)
    settings = {"offload_teacher": True, "micro_batch": 1, "updates_per_rollout": 2}
    train("vlm", settings)
    train("llm", {**settings, "updates_per_rollout": 1}, rollout={"source": "teacher"})
    assert [rest.moves for rest in rests] == [2, 4]
    for rest in rests:
        for parameter, before in zip(rest.parameters, rest.before, strict=True):
            assert torch.equal(parameter, before)


def test_an_engine_is_chosen_with_weights_on_their_device(train, monkeypatch):
    """Of a teacher that rests and writes completions: the conformance test runs its forward pass."""
    found = []

    def choose(loaded, engine):
        found.append([parameter.data_ptr() for parameter in loaded.model.parameters()])
        return engine, None

    rests = []
    monkeypatch.setattr(loop, "Resting", lambda *its: rests.append(Resting(*its)) or rests[-1])
    monkeypatch.setattr(pair_module, "chosen_engine", choose)
    rollout = {"max_new_tokens": 4, "source": "teacher", "engine": "static"}
    train("llm", {"offload_teacher": True}, rollout=rollout)
    assert len(found) == 1
    assert not {parameter.data_ptr() for parameter in rests[0].parameters} & set(found[0])


def test_copies_under_way_are_bounded_and_in_order():
    """Beyond the bound the oldest is received first; what is dropped never arrives."""
    downloads, received = Downloads(most_bytes=8), []
    for k in range(4):
        downloads.start(torch.full((1,), float(k)), received.append)
    assert [float(x) for x in received] == [0.0, 1.0]
    downloads.finish()
    assert [float(x) for x in received] == [0.0, 1.0, 2.0, 3.0]
    downloads.start(torch.zeros(1), received.append)
    downloads.drop()
    downloads.finish()
    assert len(received) == 4 and downloads.pending == deque() and downloads.bytes == 0


def test_muon_is_not_offloaded():
    """Its matrix products on the host would take minutes a step: refused with the keys, before anything is loaded."""
    with pytest.raises(ConfigError, match=r"train\.offload_optimizer.*Muon.*adamw"):
        load_config({
            "name": "x", "student": "a", "teacher": "b", "data": {"type": "shapes"}, "optim": {"type": "muon"},
            "train": {**STEPS, "offload_optimizer": True}, "arms": {"full": {"type": "distill", "seed": 0}},
        })  # fmt: skip


@pytest.mark.parametrize("name", ["sgd", "rmsprop", "lion"])
def test_the_kernels_of_gpus_have_the_bits_of_the_loop(name, make_pair, make_config):
    """torch and timm update all tensors at once (foreach) where they are on a GPU; the numbers are the loop's."""
    optim = make_config("llm", optim={"type": name, "learning_rate": 1e-2, "weight_decay": 0.1})
    found = []
    for foreach in (False, True):
        trainable = Trainable(make_pair("llm").student.model)
        optimizer = build_optimizer(optim.optim, trainable)
        for group in optimizer.parts[0].param_groups:
            group["foreach"] = foreach
        draws = torch.Generator().manual_seed(0)
        for _ in range(3):
            for values in trainable.parameters():
                values.grad = torch.randn(values.shape, generator=draws)
            optimizer.step(1e-2)
        found.append(list(trainable.parameters()))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


# --------------------------------------------------------------------------------- checkpointing


def test_only_forward_passes_with_gradients_are_recomputed(kind, make_pair, make_data):
    """Sampling runs each layer once, and training twice; afterwards the model is as it was."""
    pair = make_pair(kind)
    model, calls = pair.student.model, []
    layers = layers_of(model)
    assert len(layers) == (3 if kind == "vlm" else 2)
    for layer in layers:
        next(layer.children()).register_forward_hook(lambda *_: calls.append(1))
    prompts = pair.student.render(make_data(kind, 1))
    inputs = {"input_ids": prompts.input_ids, **prompts.per_image}
    with recomputed(model):
        with torch.no_grad():
            model(**inputs)
        assert len(calls) == len(layers)
        out = model(**inputs).logits.sum()
    assert not any("forward" in vars(module) for module in model.modules())
    out.backward()
    assert len(calls) == 3 * len(layers)


def test_a_layer_with_a_forward_of_its_own_keeps_it():
    """One that a library has set on the instance, of a layer that occurs twice."""
    layer = torch.nn.Linear(2, 2)
    layer.forward = forward = lambda x: 2 * x
    model = torch.nn.Module()
    model.above = torch.nn.Sequential(layer, torch.nn.Linear(2, 2))
    model.below = torch.nn.Sequential(layer, torch.nn.Linear(2, 2))
    with recomputed(model):
        assert layer(torch.ones(2)).tolist() == [2, 2]
    assert layer.forward is forward


def test_repeated_blocks_of_another_library_are_found():
    """Without transformers' marks: the outermost list of blocks of one class; a model without any is refused."""
    block = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU())
    tower = torch.nn.Module()
    tower.stem = torch.nn.Linear(2, 2)
    tower.blocks = torch.nn.Sequential(block, torch.nn.Sequential(torch.nn.Linear(2, 2)))
    assert layers_of(tower) == list(tower.blocks)
    tower.blocks = torch.nn.Identity()
    assert layers_of(tower) == []
    tower.config = type("Config", (), {"model_type": "odd"})
    with pytest.raises(ConfigError, match=r"activation_checkpointing: model type 'odd'"):
        refuse_without_layers(tower)


# --------------------------------------------------------------------------------- record


@pytest.mark.parametrize("density", [1.0, 0.3])
def test_the_record_has_the_bytes_of_each_part(kind, density, train):
    """memory.json: bytes of weights, values, indices, gradients and moments are those of the tensors; its names are
    those that `check` predicts; activations are what autograd kept, no less than the loss's inputs."""
    mask = None if density == 1 else lambda model: random_mask(model, density)
    trained = train(kind, {"steps": 1}, mask, precision={"compute": "bf16"})
    about = trained.memory
    assert about == json.loads((trained.out / "memory.json").read_text())
    parts, slots = about["parts_bytes"], trained.trainable.slots.values()
    assert parts.keys() <= set(Memory._fields)
    tensors = [*trained.student.model.parameters(), *trained.student.model.buffers()]
    assert parts["student_weights"] == sum(t.nbytes for t in tensors)
    assert parts["values"] == 4 * sum(slot.values.numel() for slot in slots)
    indices = sum(slot.where.nbytes for slot in slots if isinstance(slot, CompactSlot))
    assert parts["indices"] == indices and (indices > 0) == (density < 1)
    # LLaVA leaves its tower's last norm out
    assert 0.9 * parts["values"] < parts["gradients"] <= parts["values"]
    assert parts["moments"] == 2 * parts["gradients"]
    rows, tokens = about["largest_batch"]["rows"], about["largest_batch"]["tokens"]
    assert rows == 2 and tokens > about["largest_batch"]["completion_tokens"]
    assert (
        parts["kv_cache"] == rows * tokens * 2 * 2 * 16 * 2
    )  # layers, keys and values, width, bf16
    assert parts["activations"] > 2 * rows * tokens * 32 * 2
    batch, width = about["sampling_batch"], trained.student.vocabulary_rows
    assert batch["rows"] == 2 and batch["engine"] == "eager" and batch["why"] is None
    assert parts["sampling"] == 2 * width * 16  # as of a large vocabulary
    # logits of both models in bf16 and fp32, and gradients: what the loss's real chunk of tokens takes
    chunk = rows * about["largest_batch"]["completion_tokens"]
    expected = loss_cost(ReverseKL(), chunk, width, 1, None, torch.bfloat16).held
    assert parts["logits"] == pytest.approx(expected, rel=0.15)
    assert max(about["peak_bytes"].values()) > parts["student_weights"]


def test_a_resting_teacher_samples_with_a_static_cache(train):
    """Teachers that rest in host memory write the same completions, by an engine chosen while they are awake."""
    sections = {"rollout": {"max_new_tokens": 6, "engine": "static", "source": "teacher"}}
    plain, other = (
        train("llm", {"offload_teacher": rests, "micro_batch": 1}, **sections)
        for rests in (False, True)
    )
    assert_same(plain, other)
    batch = other.memory["sampling_batch"]
    assert batch["engine"] == "static" and batch["model"] != other.student.name


def test_the_record_has_the_sampling_batch_and_its_engine(kind, train):
    """Rows of the largest sampling batch, not of a micro-batch, and its cache; a static cache is of full length, and
    the engine that could not run is said."""
    for engine, ran in (("eager", "eager"), ("static", "static"), ("graphs", "eager")):
        rollout = {"max_new_tokens": 6, "batch": 3, "completions_per_prompt": 2, "engine": engine}
        about = train(kind, {"steps": 1, "micro_batch": 1}, rollout=rollout).memory
        batch = about["sampling_batch"]
        assert about["largest_batch"]["rows"] == 1 and batch["rows"] == 3
        assert batch["engine"] == ran and ("CUDA" in (batch["why"] or "")) == (engine == "graphs")
        new = 6 if ran == "static" else batch["completion_tokens"]
        assert (
            about["parts_bytes"]["kv_cache"] == 3 * (batch["prompt_tokens"] + new) * 2 * 2 * 16 * 4
        )


# --------------------------------------------------------------------------------- out of memory


def test_the_count_ends_with_the_first_step_in_every_process(train, monkeypatch):
    """It costs a call for every tensor that autograd keeps; the record is the first process's alone."""
    counts = []

    class Watched(MemoryUse):
        def saved(self, checkpointing=False):
            counts.append(self.counts)
            return super().saved(checkpointing)

    monkeypatch.setattr(loop, "MemoryUse", Watched)
    monkeypatch.setattr(Accelerator, "is_main_process", False)
    trained = train("llm")
    assert counts == [True, False]
    assert not (trained.out / "memory.json").exists()


def too_much(student_logprobs, teacher_logprobs):
    """A loss that asks for 4 PiB."""
    return student_logprobs.sum(-1) + torch.empty(2**50)[0]


def wordy(example, completion):
    """A reward that asks for 4 PiB."""
    return float(torch.empty(2**50)[0])


def test_out_of_memory_is_one_line_and_releases_the_memory(kind, train):
    """The phase, the bytes wanted, those held by part and what needs less. Whoever holds the error holds no tensor,
    with the garbage collector off."""
    loss, alive = FunctionLoss(type=Plugin.of(too_much)), []

    def watch(student):
        alive.extend(map(weakref.ref, student.model.parameters()))
        return {}

    gc.collect()
    gc.disable()
    with pytest.raises(OutOfMemory) as caught:
        train(kind, loss=loss, hooks=Hooks(evaluate=watch))
    error = caught.value
    assert error.phase == "student" and error.wanted_bytes == 2**52
    assert error.held["student_weights"] > 0 and error.held["teacher_weights"] > 0
    assert "\n" not in str(error) and "4,096.0 TiB" in str(error)
    assert "train.activation_checkpointing" in str(error)
    assert error.__context__ is None and error.__cause__ is None
    error.__traceback__ = None  # the callers' own frames, which hold the pair
    del caught
    still = [parameter for parameter in alive if parameter() is not None]
    gc.enable()
    assert len(alive) > 10 and not still


def test_what_was_written_survives_and_resumes_with_other_settings(train, tmp_path):
    """Out of memory in the last step: metrics and state of those before stay, and the rerun ends as an uninterrupted
    one, whatever it holds less."""
    whole = train("llm", {"steps": 3})

    def full(student):
        return fill() and {}

    def late(student):
        lines = (tmp_path / "arm" / "metrics.jsonl").read_text().splitlines()
        return full(student) if len(lines) == 2 else {}

    with pytest.raises(OutOfMemory):
        train("llm", {"steps": 3}, name="arm", hooks=Hooks(evaluate=late, evaluate_every=1))
    again = train("llm", {"steps": 3, "activation_checkpointing": True}, name="arm")
    assert_same(whole, again)
    assert again.metrics.step.tolist() == [0, 1, 2]


def fill():
    return torch.empty(2**50)


def fill_in_worker(example):
    """A teacher's context, of whose examples the first is also read in the main thread."""
    return example if threading.current_thread() is threading.main_thread() else fill()


@pytest.mark.parametrize("phase", ["data", "rollout", "evaluation"])
def test_other_phases_are_named(phase, train):
    """Reading of data with teachers' contexts, sampling with its rewards, and held-out evaluation."""
    sections, hooks = {}, Hooks()
    if phase == "data":
        context = {"type": str(Plugin.of(fill_in_worker))}
        sections = {"teacher": {"model": "student", "context": context}}
    if phase == "rollout":
        sections = {
            "reward": {"rule": Plugin.of(wordy), "alpha": 0.5},
            "rollout": {"max_new_tokens": 4, "completions_per_prompt": 2},
        }
    if phase == "evaluation":
        hooks = Hooks(evaluate=lambda student: fill() and {})
    with pytest.raises(OutOfMemory) as caught:
        train("llm", hooks=hooks, **sections)
    assert caught.value.phase == phase
    assert REMEDIES[phase] in str(caught.value)


CUDA = (
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1.50 GiB is "
    "free. Of the allocated memory 70.00 GiB is allocated by PyTorch"
)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (torch.OutOfMemoryError(CUDA), "2.5 GiB more were wanted, 1.5 GiB are free"),
        (RuntimeError("MPS backend out of memory"), r"\(load\);"),
        (MemoryError("Unable to allocate 3.00 GiB for an array"), "3.0 GiB more were wanted"),
    ],
)
def test_every_allocators_error_is_recognised(error, line):
    """torch's for a GPU, its CPU allocator's, Python's; another RuntimeError passes as it is."""
    kept = []

    def work(failure):
        mine = torch.zeros(3)
        kept.append(weakref.ref(mine))
        raise failure

    with pytest.raises(OutOfMemory, match=line) as caught:
        one_line_out_of_memory("load")(work)(error)
    del error
    assert caught.value.phase == "load"
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes"):
        one_line_out_of_memory("load")(work)(RuntimeError("shapes do not match"))
