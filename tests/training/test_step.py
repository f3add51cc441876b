"""A step without waste: batches read ahead, no wait for the device, metrics for nothing, compiled once."""

import contextlib
import copy
import logging
import shutil
import threading
import time
import weakref
from collections import Counter
from collections.abc import Generator, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from running import composed
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from kandinsky_exp import build, run_settings
from kandinsky_exp.data.prefetch import changed, prefetch
from kandinsky_exp.errors import DataError, Interrupted, NonFiniteLoss, RunFailure
from kandinsky_exp.models import pipelines
from kandinsky_exp.models.components import MODELS
from kandinsky_exp.system import distributed
from kandinsky_exp.system.halving import Halving
from kandinsky_exp.tracking.tracker import NullTracker
from kandinsky_exp.training import ema, loop, validation
from kandinsky_exp.training.average import Average
from kandinsky_exp.training.metrics import Meter, StepResult
from kandinsky_exp.training.seeding import NoiseSource

CPU = torch.device("cpu")
EVERYTHING = [
    "trainer.ema_decay=0.9",
    "trainer.grad_accumulation=2",
    "model.condition_dropout=0.5",
    "model.snr_gamma=5",
]
LORA = ["adapter=lora", "adapter.rank=2", "adapter.dropout=0.1"]
STAGES = pytest.mark.parametrize("stage", ["prior", "decoder"])


# --- batches ahead


def numbered(count: int, read: list[int] | None = None, closed: threading.Event | None = None) -> Generator[dict]:
    """`count` batches; `read` notes which ones were asked for, `closed` that the iterator was."""
    try:
        for number in range(count):
            if read is not None:
                read.append(number)
            yield {"x": torch.full((2, 3), float(number)), "index": torch.tensor([number, number + 1])}
    finally:
        if closed is not None:
            closed.set()


def threads() -> set[str]:
    return {thread.name for thread in threading.enumerate() if thread.name == "prefetch"}


def wait_for(condition: object) -> None:
    deadline = time.monotonic() + 10
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.005)


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_every_batch_comes_once_and_in_order(depth: int) -> None:
    batches = list(prefetch(numbered(50), CPU, depth))
    assert [int(batch["x"][0, 0]) for batch in batches] == list(range(50))
    assert [batch["index"].tolist() for batch in batches] == [[n, n + 1] for n in range(50)]
    assert not threads()


def test_an_empty_stream_ends() -> None:
    assert list(prefetch(numbered(0), CPU)) == []
    assert not threads()


def test_the_next_batches_are_read_before_they_are_asked_for() -> None:
    read: list[int] = []
    stream = prefetch(numbered(50, read), CPU, depth=2)
    assert read == []  # nothing happens before the first one is wanted
    next(stream)
    wait_for(lambda: len(read) == 4)  # one used, two ready, one in hand
    time.sleep(0.05)
    assert len(read) == 4
    stream.close()


def test_reading_happens_while_the_consumer_works() -> None:
    def slow() -> Iterator[dict[str, Tensor]]:
        for batch in numbered(10):
            time.sleep(0.03)
            yield batch

    began = time.monotonic()
    for _ in prefetch(slow(), CPU):
        time.sleep(0.03)
    assert time.monotonic() - began < 0.5  # 0.6 s one after the other


@pytest.mark.parametrize("used", [1, 3])
def test_closing_ends_the_thread_and_the_reader(used: int) -> None:
    closed = threading.Event()
    stream = prefetch(numbered(1000, closed=closed), CPU)
    for _ in range(used):
        next(stream)
    stream.close()
    assert closed.is_set()
    assert not threads()


def test_what_is_encoded_on_the_way_closes_its_reader_too() -> None:
    closed = threading.Event()
    source = numbered(1000, closed=closed)  # referred to, as by the frames of an exception
    stream = prefetch(changed(source, dict), CPU)
    assert next(stream)["index"].tolist() == [0, 1]
    stream.close()
    assert closed.is_set()
    assert not threads()


def test_an_exception_in_the_training_loop_ends_the_thread() -> None:
    def train() -> None:
        for batch in prefetch(numbered(1000), CPU):
            raise ValueError(f"at {int(batch['x'][0, 0])}")

    with pytest.raises(ValueError, match="at 0"):
        train()
    assert not threads()


def test_an_exception_of_the_reader_comes_as_it_is_after_the_good_batches() -> None:
    error = DataError("a.png is no image")

    def broken() -> Iterator[dict[str, Tensor]]:
        yield from numbered(3)
        raise error

    stream = prefetch(broken(), CPU)
    assert len([next(stream) for _ in range(3)]) == 3
    with pytest.raises(DataError) as caught:
        next(stream)
    assert caught.value is error
    assert not threads()


def test_a_used_batch_is_free() -> None:
    stream = prefetch(numbered(10), CPU)
    first = next(stream)
    seen = weakref.ref(first["x"])
    del first
    next(stream)
    assert seen() is None
    stream.close()


# --- real training steps on made-up features


class Recorder(NullTracker):
    """A tracker that keeps what it is given."""

    def __init__(self) -> None:
        self.metrics: dict[int, dict[str, float]] = {}

    def log_metrics(self, metrics: Any, step: int) -> None:
        self.metrics[step] = dict(metrics)


class Nothing:
    """No validation, no checkpoint, no signal."""

    signal_number = None

    def validate(self, step: int) -> None: ...

    def checkpoint(self, step: int) -> None: ...

    def trained(self, loss: float) -> None: ...

    wants_checkpoint = ended = False

    def wait(self) -> None: ...

    def settled(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    deferred = at_once = settled


class Bench:
    """A stage with its optimizer, EMA and schedule as a run builds them, and features out of nothing."""

    def __init__(self, cfg: Any, accelerator: Accelerator, folder: Path) -> None:
        self.cfg, self.accelerator = cfg, accelerator
        self.stage = build.stage(cfg, build.weights(cfg))
        self.training = build.training(cfg, self.stage, accelerator, 100)
        self.tracker = Recorder()
        self.random = torch.Generator().manual_seed(0)

    def features(self, rows: int = 4) -> dict[str, Tensor]:
        shapes = {"image_embeds": (64,), "latents": (4, 16, 16)}
        if self.stage.name == "prior":
            shapes = {"image_embeds": (64,), "text_embeds": (64,), "text_states": (77, 64)}
        made = {key: torch.randn(rows, *shape, generator=self.random) for key, shape in shapes.items()}
        if self.stage.name == "prior":
            made["text_mask"] = (torch.arange(77) < 9).expand(rows, 77).clone()
        return made

    def batches(self) -> Iterator[dict[str, Tensor]]:
        while True:
            yield self.features() | {"index": torch.arange(4)}

    def train(
        self, steps: int, batches: Iterator[dict[str, Tensor]] | None = None, events: "Nothing | None" = None
    ) -> None:
        loop.train(
            self.training,
            batches if batches is not None else self.batches(),
            NoiseSource(0, 0, self.accelerator.device),
            accelerator=self.accelerator,
            tracker=self.tracker,
            settings=run_settings.loop_settings(self.cfg, self.training.step + steps, self.accelerator),
            events=events or Nothing(),
            stop=events or Nothing(),
        )

    def validate(self) -> float:
        network = self.accelerator.unwrap_model(self.training.network)
        with ema.averaged_weights(self.training), validation.uncompiled(network):
            return validation.fixed_noise_loss(
                self.stage,
                network,
                MadeUpRows(self),
                accelerator=self.accelerator,
                seed=0,
                draws=2,
                batches=Halving("", 2),
            )


class MadeUpRows:
    """Three held-out rows, never the same: of them only the shapes count."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench

    def __len__(self) -> int:
        return 3

    def rows(self, indices: list[int]) -> dict[str, Tensor]:
        return self.bench.features(len(indices))

    def batches(self, indices: list[int], size: int) -> Iterator[list[int]]:
        for start in range(0, len(indices), size):
            yield indices[start : start + size]


@pytest.fixture
def bench(tiny_folder: Path, tmp_path: Path) -> Iterator[Any]:
    """Called with overrides: a `Bench`."""
    with contextlib.ExitStack() as stack:

        def make(stage: str, *overrides: str) -> Bench:
            weights = [f"weights.prior={tiny_folder}", f"weights.decoder={tiny_folder}"]
            quiet = ["validation.every=1000", "checkpoint.every=1000"]
            cfg = composed(tmp_path, f"model={stage}", *weights, *quiet, *overrides)
            accelerator = stack.enter_context(distributed.accelerated(lambda: build.accelerator(cfg)))
            return Bench(cfg, accelerator, tiny_folder)

        yield make


# --- nothing waits for the device


class PythonReads(TorchFunctionMode):
    """Counts what asks a tensor for its values."""

    ASKING = ("item", "tolist", "cpu", "numpy", "nonzero", "__float__", "__int__", "__bool__", "__index__")

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        if name in self.ASKING:
            self.found[name] += 1
        return function(*args, **(kwargs or {}))


class NativeReads(TorchDispatchMode):
    """Counts the kernels that give a value to the host, whoever called them."""

    ASKING = ("aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::nonzero", "aten::equal",
              "aten::masked_select")  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.name().split(".")[0] in self.ASKING:
            self.found[function.name()] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("extras", [[], EVERYTHING, [*EVERYTHING, *LORA]], ids=["plain", "everything", "lora"])
@STAGES
def test_one_transfer_per_log_point_and_none_between(stage: str, extras: list[str], bench: Any) -> None:
    made = bench(stage, "trainer.log_every=2", *extras)
    made.train(1)  # what happens once, such as moving the null condition, is over
    with PythonReads() as python, NativeReads() as native:
        made.train(4)  # log points: steps 2 and 4, and the last one, 5
    assert list(made.tracker.metrics) == [1, 2, 4, 5]
    assert not native.found
    assert python.found == {"tolist": 3}


def test_the_counters_see_what_they_count() -> None:
    with PythonReads() as python, NativeReads() as native:
        value = torch.ones(1)
        float(value), value.item(), bool(value > 0), value.tolist(), value[value > 0].sum()
    assert python.found["tolist"] == 1
    assert sum(native.found.values()) >= 3


@STAGES
def test_the_optimizer_is_fused(stage: str, bench: Any) -> None:
    assert all(group["fused"] for group in bench(stage).training.optimizer.param_groups)


def test_the_average_is_that_of_diffusers() -> None:
    random = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(size, generator=random)) for size in ((3, 4), (5,), ())]
    ours, theirs = (cls(parameters, decay=0.95, foreach=True) for cls in (Average, EMAModel))
    for _ in range(200):
        for parameter in parameters:
            parameter.data += torch.randn(parameter.shape, generator=random)
        ours.step(parameters)
        theirs.step(parameters)
    assert ours.optimization_step == theirs.optimization_step
    assert ours.cur_decay_value == theirs.cur_decay_value == 0.95
    for mine, expected in zip(ours.shadow_params, theirs.shadow_params, strict=True):
        torch.testing.assert_close(mine, expected)


# --- metrics


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    with distributed.accelerated(lambda: Accelerator(cpu=True)) as made:
        yield made


def result(loss: float, errors: list[float], timesteps: list[int], **others: Any) -> StepResult:
    samples = [(torch.tensor(errors), torch.tensor(timesteps))]
    values = {"norm": torch.tensor(1.0), "rows": [torch.arange(len(errors))], "waited": 0.0, **others}
    return StepResult(torch.tensor(loss), samples=samples, **values)


def test_the_loss_of_each_quarter_of_the_timesteps(accelerator: Accelerator) -> None:
    meter = Meter(accelerator, 4, 1000)
    meter.add(result(0.5, [1.0, 2.0, 3.0, 10.0], [0, 249, 250, 999]))
    meter.add(result(0.7, [4.0, 20.0], [100, 750]))
    found = meter.read(2, 1e-3)
    assert found["train/loss"] == pytest.approx(0.6)
    quarters = {key: value for key, value in found.items() if key.startswith("train/loss_t")}
    assert quarters == pytest.approx({"train/loss_t0": 7 / 3, "train/loss_t1": 3.0, "train/loss_t3": 15.0})
    meter.add(result(0.5, [6.0], [499]))  # what came before is forgotten
    again = {key: value for key, value in meter.read(3, 1e-3).items() if key.startswith("train/loss_t")}
    assert again == {"train/loss_t1": 6.0}


def test_quarters_over_many_steps(accelerator: Accelerator) -> None:
    meter, random = Meter(accelerator, 3, 77), torch.Generator().manual_seed(0)
    errors, timesteps = torch.rand(300, 3, generator=random), torch.randint(77, (300, 3), generator=random)
    for row in range(300):
        meter.add(result(1.0, errors[row].tolist(), timesteps[row].tolist()))
    assert len(meter._samples) < 64
    found = meter.read(300, 1e-3)
    for part in range(4):
        chosen = (timesteps * 4 / 77).long() == part
        assert found[f"train/loss_t{part}"] == pytest.approx(errors[chosen].mean().item(), rel=1e-5)


@STAGES
def test_the_quarters_come_from_the_plain_error_of_real_steps(stage: str, bench: Any) -> None:
    """Averaged over its samples, it is what `train/loss` is without weights or further terms."""
    extras = ["model.vlb_weight=0"] if stage == "decoder" else []
    made = bench(stage, "trainer.log_every=2", "trainer.batch_size=4", *extras)
    made.train(2)
    found = made.tracker.metrics[2]
    quarters = [value for key, value in found.items() if key.startswith("train/loss_t")]
    assert min(quarters) <= found["train/loss"] <= max(quarters)
    weighted = bench(stage, "trainer.log_every=2", "model.snr_gamma=0.01", *extras)
    weighted.train(2)
    unequal = weighted.tracker.metrics[2]
    assert unequal["train/loss"] < min(value for key, value in unequal.items() if key.startswith("train/loss_t"))


def test_times_and_memory(bench: Any) -> None:
    made = bench("prior", "trainer.log_every=5", "trainer.grad_accumulation=2")

    def slow() -> Iterator[dict[str, Tensor]]:
        for batch in made.batches():
            time.sleep(0.02)
            yield batch

    began = time.monotonic()
    made.train(5, slow())
    elapsed = time.monotonic() - began
    found = made.tracker.metrics[5]
    assert 0.04 <= found["train/data_seconds"] < found["train/step_seconds"] <= elapsed / 5
    assert found["train/samples_per_second"] == pytest.approx(8 / found["train/step_seconds"])
    assert 0.05 < found["train/peak_memory_gb"] < 64


def test_a_pause_does_not_count(accelerator: Accelerator) -> None:
    meter = Meter(accelerator, 4, 1000)
    with meter.paused():
        time.sleep(0.2)
    meter.add(result(0.5, [1.0], [0], waited=0.01))
    found = meter.read(1, 1e-3)
    assert found["train/step_seconds"] < 0.1
    assert found["train/data_seconds"] == 0.01


@pytest.mark.parametrize("before", ["nothing", "check", "read"])
def test_the_first_step_that_is_not_finite_is_named(before: str, accelerator: Accelerator) -> None:
    meter = Meter(accelerator, 4, 1000)
    for _ in range(3):
        meter.add(result(0.5, [1.0], [0]))
    if before == "check":
        meter.check(3, 1e-3)
    elif before == "read":
        meter.read(3, 1e-3)
    meter.add(result(0.5, [1.0], [0]))
    meter.add(result(0.5, [1.0, 2.0], [0, 1], norm=torch.tensor(float("inf")), rows=[torch.tensor([7, 9])]))
    meter.add(result(float("nan"), [1.0], [0]))
    with pytest.raises(NonFiniteLoss, match=r"not finite at step 5 \(.*gradient norm inf, lr 0\.001, samples 7, 9\)"):
        meter.read(6, 1e-3)


def test_samples_that_are_not_finite_have_the_names_of_the_data_set(accelerator: Accelerator) -> None:
    def identify(row: int) -> str:
        if row == 9:
            raise DataError("row 9 is damaged")
        return f"{row}.png"

    meter = Meter(accelerator, 4, 1000, identify)
    meter.add(result(float("nan"), [1.0], [0], rows=[torch.tensor([7, 9]), torch.arange(20, 40)]))
    with pytest.raises(NonFiniteLoss, match=r"samples 7\.png, row 9, 20\.png, .*33\.png and 6 more\)"):
        meter.check(1, 1e-3)


def test_a_process_without_a_bad_step_says_so(accelerator: Accelerator) -> None:
    meter = Meter(accelerator, 4, 1000)
    for _ in range(3):
        meter.add(result(0.5, [1.0], [0]))
    with pytest.raises(NonFiniteLoss, match=r"on another process, at one of the 3 steps up to step 8 \(lr 0\.001\)"):
        meter._raise(8, 1e-3, [False] * 3, 0)


@pytest.mark.parametrize("checked", [1, 7, 40])
def test_a_loss_scaler_may_skip_nineteen_steps_in_a_row(checked: int, accelerator: Accelerator) -> None:
    """At every rhythm of checks, and over a checkpoint."""
    scaled = copy.copy(accelerator)
    scaled.scaler = torch.amp.GradScaler("cpu")
    meter, step = Meter(scaled, 4, 1000), 0

    def steps(count: int, norm: float) -> None:
        nonlocal meter, step
        for _ in range(count):
            meter.add(result(0.5, [1.0], [0], norm=torch.tensor(norm)))
            step += 1
            if step % checked == 0:
                meter.check(step, 1e-3)
                state = meter.state()
                meter = Meter(scaled, 4, 1000)
                meter.restore(state)

    steps(19, float("inf"))
    steps(1, 1.0)
    steps(19, float("nan"))
    steps(1, 1.0)
    meter.check(step, 1e-3)

    def too_many() -> None:
        steps(25, float("inf"))
        meter.check(step, 1e-3)

    with pytest.raises(NonFiniteLoss, match=r"at step 60, the 20th in a row that the loss scaler skipped"):
        too_many()


def test_steps_that_a_loss_scaler_skipped_count_once(accelerator: Accelerator) -> None:
    """However often the meter is asked about them: by a checkpoint, and by the log point after it."""
    scaled = copy.copy(accelerator)
    scaled.scaler = torch.amp.GradScaler("cpu")
    meter = Meter(scaled, 4, 1000)
    for _ in range(10):
        meter.add(result(0.5, [1.0], [0], norm=torch.tensor(float("inf"))))
    meter.check(10, 1e-3)
    assert meter.read(10, 1e-3)["train/loss"] == 0.5


def test_a_loss_that_is_not_finite_is_a_failure_with_a_scaler_too(accelerator: Accelerator) -> None:
    scaled = copy.copy(accelerator)
    scaled.scaler = torch.amp.GradScaler("cpu")
    meter = Meter(scaled, 4, 1000)
    meter.add(result(float("nan"), [1.0], [0]))
    with pytest.raises(NonFiniteLoss):
        meter.check(1, 1e-3)


@pytest.mark.parametrize("processes_before", [1, 2])
def test_a_meter_goes_on_where_another_stopped(processes_before: int, accelerator: Accelerator) -> None:
    """To the last bit on one process; after two, with the means of both."""
    random = torch.Generator().manual_seed(0)
    results = [
        result(float(torch.rand((), generator=random)), torch.rand(3, generator=random).tolist(), [0, 500, 999])
        for _ in range(150)  # more than are added up at a time
    ]
    whole, first = Meter(accelerator, 3, 1000), Meter(accelerator, 3, 1000)
    for one in copy.deepcopy(results):
        whole.add(one)
    for one in copy.deepcopy(results[:100]):
        first.add(one)
    first.check(100, 1e-3)
    state = first.state()
    if processes_before == 2:
        state = {"processes": state["processes"] * 2}
    second = Meter(accelerator, 3, 1000)
    second.restore(state)
    for one in copy.deepcopy(results[100:]):
        second.add(one)
    expected, found = whole.read(150, 1e-3), second.read(150, 1e-3)
    for key in ("train/loss", "train/grad_norm", "train/loss_t0", "train/loss_t2"):
        if processes_before == 1:
            assert found[key] == expected[key], key
        elif key == "train/loss":
            assert found[key] == pytest.approx(expected[key])
    assert found["train/samples_per_second"] < 1e6  # the time before the stop counts


# --- ways out


class Stopping(Nothing):
    """A signal has come; what happens is noted."""

    signal_number = 15

    def __init__(self) -> None:
        self.seen: list[str] = []

    def checkpoint(self, step: int) -> None:
        self.seen.append(f"checkpoint {step}")

    def wait(self) -> None:
        self.seen.append("wait")


def test_a_stop_waits_for_its_checkpoint(bench: Any) -> None:
    """On every process: a launcher that sees one gone ends the one that writes."""
    made, events = bench("prior"), Stopping()
    with pytest.raises(Interrupted):
        made.train(3, events=events)
    assert events.seen == ["checkpoint 1", "wait"]


def test_data_that_fails_while_a_run_trains_is_a_failure_of_the_run(bench: Any) -> None:
    made = bench("prior")

    def damaged() -> Iterator[dict[str, Tensor]]:
        yield from islice(made.batches(), 2)
        raise DataError("a.png cannot be read")

    with pytest.raises(RunFailure, match=r"a\.png cannot be read\n\(training stopped after step 2"):
        made.train(5, damaged())


# --- what does not train leaves memory


def loaded(stage: Any) -> set[str]:
    return set(stage.weights._loaded) & set(MODELS)


def test_a_decoder_asks_the_prior_once_and_lets_it_go(bench: Any) -> None:
    made = bench("decoder")
    made.stage.use_null_condition(made.stage.encode_null())  # as it comes from a cache
    made.stage.weights.release(made.stage.encoders)
    settings = run_settings.sample_settings(made.cfg)
    network = made.stage.network.eval()
    first = made.stage.sample(network, ["a dog"], settings)
    assert loaded(made.stage) == {"movq"}
    assert made.stage.sample(network, ["a dog"], settings)[0].tobytes() == first[0].tobytes()
    embeds = pipelines.embed_prompts(pipelines.prior_pipeline(made.stage.weights), ["a dog"], settings)
    theirs = made.stage._decode(network, embeds, settings)
    assert theirs[0].tobytes() == first[0].tobytes()


def test_a_prior_needs_the_image_encoder_for_one_embedding(bench: Any) -> None:
    made = bench("prior")
    settings = run_settings.sample_settings(made.cfg)
    network = made.stage.network.eval()
    first = made.stage.sample(network, ["a dog"], settings)
    assert loaded(made.stage) == {"text_encoder", "unet", "movq"}
    embeds = pipelines.embed_prompts(pipelines.prior_pipeline(made.stage.weights, network), ["a dog"], settings)
    theirs = pipelines.decode(pipelines.decoder_pipeline(made.stage.weights), embeds, settings)
    assert theirs[0].tobytes() == first[0].tobytes()


def test_encoders_that_training_needs_stay(bench: Any) -> None:
    """Features encoded on the fly: an encoder that was loaded for them is not taken away by sampling."""
    made = bench("prior")
    made.stage.weights.load("image_encoder")
    made.stage.sample(made.stage.network.eval(), ["a dog"], run_settings.sample_settings(made.cfg))
    assert "image_encoder" in loaded(made.stage)


def test_the_decoder_trains_in_channels_last_and_the_prior_has_none(bench: Any) -> None:
    weight = bench("decoder").stage.network.conv_in.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not weight.is_contiguous()
    assert bench("prior").stage.memory_format == torch.preserve_format


def test_a_prior_redraws_nothing(bench: Any) -> None:
    made = bench("prior")
    assert made.stage.reconstruct(made.stage.network, made.features(), run_settings.sample_settings(made.cfg)) == []


# --- compiled once

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))),
    reason="torch.compile on a CPU needs a C++ compiler: none here",
)


@needs_compiler
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize(
    ("stage", "mode", "backend", "extras"),
    [
        pytest.param("prior", "true", "inductor", [], marks=pytest.mark.soak),
        pytest.param("prior", "regional", "inductor", [], marks=pytest.mark.soak),
        ("prior", "true", "aot_eager", [*EVERYTHING, *LORA, "trainer.gradient_checkpointing=true"]),
        ("prior", "regional", "eager", [*LORA, "trainer.gradient_checkpointing=true"]),
        ("decoder", "true", "eager", EVERYTHING),
        ("decoder", "regional", "eager", []),
        pytest.param("decoder", "true", "aot_eager", EVERYTHING, marks=pytest.mark.soak),
    ],
)
def test_the_network_is_compiled_once(
    stage: str, mode: str, backend: str, extras: list[str], bench: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """The front end decides what is compiled anew: with most settings it may do without the slow back ends."""
    from torch._dynamo.utils import counters

    caplog.set_level(logging.ERROR, "torch.__trace")  # megabytes otherwise, in front of whatever fails here
    torch._dynamo.reset()  # what tests before this one compiled counts too
    counters.clear()
    made = bench(stage, f"trainer.compile={mode}", *extras)
    compiles = [module for module in made.stage.network.modules() if module._compiled_call_impl is not None]
    assert (compiles == [made.stage.network]) == (mode == "true")
    for module in compiles if backend != "inductor" else ():
        module.compile(backend=backend)
    before = made.stage.network.state_dict().keys()
    made.train(2)
    compiled = counters["stats"]["unique_graphs"]
    assert compiled > 0
    made.validate()
    made.train(2)
    made.validate()
    made.train(1)
    assert counters["stats"]["unique_graphs"] == compiled
    assert made.stage.network.state_dict().keys() == before
    plain = bench(stage, *extras)
    plain.train(2)
    plain.validate()
    plain.train(2)
    assert made.tracker.metrics[4]["train/loss"] == pytest.approx(plain.tracker.metrics[4]["train/loss"], rel=1e-3)
