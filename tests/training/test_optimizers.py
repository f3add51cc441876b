"""Each optimizer of conf/optimizer lowers the loss and goes on exactly; what is judged of a schedule-free one."""

import contextlib
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import recursively_apply
from diffusers import AutoPipelineForText2Image, PriorTransformer
from omegaconf import OmegaConf
from running import composed, network, same, stopped_at, train
from safetensors.torch import load_file
from stepping import step
from torch import Tensor

from kandinsky_exp import build, schedules
from kandinsky_exp.errors import ConfigError
from kandinsky_exp.memory import optimizer_state
from kandinsky_exp.optimizers import Muon
from kandinsky_exp.run import run
from kandinsky_exp.runs import integrity
from kandinsky_exp.system import distributed
from kandinsky_exp.tiny.pipelines import build as build_tiny
from kandinsky_exp.training import checkpoint, ema, state_file

CONF = Path(__file__).parents[2] / "conf" / "optimizer"
# A rate for a few steps from nothing; 3e-3 where none is given.
RATES = {"prodigy": ["optimizer.lr=1", "optimizer.d0=1e-3"], "sgd": ["optimizer.lr=3e-2"]}


def option(name: str) -> Any:
    """A parameter of a test; one that cannot run here is skipped, and says why."""
    package = target(name).partition(".")[0]
    lacks = [f"{package} is not installed"] if find_spec(package) is None else []
    if name == "muon" and not hasattr(torch.optim, "Muon"):
        lacks = [f"torch {torch.__version__} has no Muon"]
    return pytest.param(name, marks=[pytest.mark.skip(reason=reason) for reason in lacks])


def target(name: str) -> str:
    return str(OmegaConf.load(CONF / f"{name}.yaml")["_target_"])


OPTIONS = [option(file.stem) for file in sorted(CONF.glob("*.yaml"))]
QUIET = ["model=prior", "tracker=none", "validation.reconstructions=0"]


def chosen(name: str) -> list[str]:
    return [f"optimizer={name}", *RATES.get(name, ["optimizer.lr=3e-3"])]


def last_checkpoint(folder: Path) -> Path:
    found = integrity.newest_good(folder / "checkpoints", print)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prior that knows nothing yet, beside the tiny one's encoders."""
    folder = tmp_path_factory.mktemp("untrained")
    pipeline = AutoPipelineForText2Image.from_pretrained(build_tiny(folder / "cache")).prior_pipe
    with torch.random.fork_rng():
        torch.manual_seed(0)
        fresh = PriorTransformer.from_config(pipeline.prior.config)
    fresh.clip_mean.data, fresh.clip_std.data = pipeline.prior.clip_mean.data, pipeline.prior.clip_std.data
    pipeline.register_modules(prior=fresh)
    pipeline.save_pretrained(folder / "prior")
    return folder / "prior"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("root")


@pytest.mark.parametrize("name", OPTIONS)
def test_lowers_the_loss(name: str, untrained: Path, root: Path) -> None:
    end = train(
        root, *QUIET, f"weights.prior={untrained}", *chosen(name), f"name={name}-alone", "validation.draws=2",
        "trainer.max_steps=12", "validation.every=12", "checkpoint.every=12",
    )  # fmt: skip
    begin = re.findall(r"step 0: validation loss ([\d.]+)", (root / f"{name}-alone" / "train.log").read_text())[0]
    assert end < 0.85 * float(begin)


@pytest.mark.parametrize("name", [option("muon"), option("prodigy"), option("schedule_free")])
def test_stopped_and_resumed_it_ends_the_same(name: str, root: Path) -> None:
    """With accumulation, an average and warm-up; and however often it is validated on the way."""
    common = [
        *QUIET, *chosen(name), *with_average(name), "trainer.max_steps=3", "trainer.grad_accumulation=2",
        "trainer.batch_size=2", "checkpoint.every=100", "validation.draws=1",
    ]  # fmt: skip
    train(root, *common, f"name={name}", "validation.every=1")
    with stopped_at("step 2 of"):
        train(root, *common, f"name={name}-stopped", "validation.every=100")
    train(root, *common, f"name={name}-stopped", "validation.every=100")
    whole, resumed = (last_checkpoint(root / folder) for folder in (name, f"{name}-stopped"))
    assert {path.name for path in whole.iterdir() if path.is_dir()} == {"prior", "prior_ema"}
    assert content(whole) == content(resumed)


def with_average(name: str) -> list[str]:
    """Warm-up and an average: a schedule-free optimizer has its own."""
    if name == "schedule_free":
        return ["optimizer.warmup_steps=3"]
    return ["scheduler.warmup_steps=3", "trainer.ema_decay=0.9"]


def content(folder: Path) -> dict[str, Any]:
    """All that the next step depends on: networks, and what optimizer and schedule have learned."""
    networks = {file.parent.name: load_file(file) for file in folder.glob("*/*.safetensors")}
    state = {key: value for key, value in state_file.read(folder / state_file.NAME).items() if key != "unread"}
    return recursively_apply(as_bytes, {**networks, **state})


def as_bytes(value: Tensor) -> bytes:
    return value.contiguous().flatten().view(torch.uint8).numpy().tobytes()


# --- adapters, and the decoder's kernels: steps over made-up gradients


@pytest.fixture
def built(tiny_folder: Path, tmp_path: Path) -> Iterator[Any]:
    """Called with overrides: (training, accelerator) as a run builds them."""
    with contextlib.ExitStack() as stack:
        weights = [f"weights.prior={tiny_folder}", f"weights.decoder={tiny_folder}"]

        def make(*overrides: str) -> Any:
            cfg = composed(tmp_path, *weights, *overrides)
            accelerator = stack.enter_context(distributed.accelerated(lambda: build.accelerator(cfg)))
            return build.training(cfg, build.stage(cfg, build.weights(cfg)), accelerator, 100), accelerator

        yield make


def state_of(training: Any, accelerator: Any) -> Any:
    made = checkpoint.snapshot(
        training, accelerator, validated=False, validation_loss=None, total_batch=1, order={"order": "permutation"}
    ).on_host()
    return made, recursively_apply(
        as_bytes, [{name: files.tensors for name, files in made.networks.items()}, made.tensors]
    )


@pytest.mark.parametrize("trains", ["model=prior adapter=dora", "model=decoder"])
@pytest.mark.parametrize("name", OPTIONS)
def test_its_state_survives_a_checkpoint(name: str, trains: str, built: Any, tmp_path: Path) -> None:
    settings = [
        *chosen(name),
        *with_average(name),
        *trains.split(" "),
        "optimizer.ns_steps=1" if name == "muon" else "seed=0",
    ]
    (whole, accelerator), (resumed, other) = built(*settings), built(*settings)
    for _ in range(2):
        step(whole)
    begun, _ = state_of(whole, accelerator)
    with ema.averaged_weights(whole):  # as a validation has it
        pass
    checkpoint.load(resumed, begun.write(tmp_path), other)
    step(whole)
    step(resumed)
    assert state_of(whole, accelerator)[1] == state_of(resumed, other)[1]
    if trains == "model=decoder":
        assert_its_state_is_known_before(composed(tmp_path, *settings), whole)


def assert_its_state_is_known_before(cfg: Any, training: Any) -> None:
    large = [weight for weight in training.trainable if weight.numel() >= 4096]  # 8 bits are for these alone
    held = {id(value): value for weight in large for value in training.optimizer.state[weight].values()}
    measured = sum(value.nbytes for value in held.values() if isinstance(value, Tensor))
    assert measured == pytest.approx(optimizer_state.measure(cfg, large, torch.device("cpu")).state, rel=0.05)


# --- what is particular to one of them


@pytest.mark.parametrize("name", [option("schedule_free")])
def test_a_schedule_free_average_is_what_is_judged_and_kept(name: str, root: Path) -> None:
    common = [*QUIET, "validation.every=3", "validation.draws=2", "trainer.max_steps=3"]
    loss = train(root, *common, *chosen(name), "optimizer.betas=[0.8, 0.99]", "name=judged")
    last = last_checkpoint(root / "judged")
    trains, average = network(last / "prior"), network(last / "prior_ema")
    states = state_file.read(last / state_file.NAME)["optimizer"]["state"]
    keys = [key for key in trains if key not in ("clip_mean", "clip_std")]
    names = [key for key, _ in PriorTransformer.from_pretrained(last / "prior").named_parameters() if key in keys]
    for index, key in enumerate(names):  # y = (1 - β) z + β x, equation 3 of the paper
        expected = (trains[key] - (1 - 0.8) * states[index]["z"]) / 0.8
        torch.testing.assert_close(average[key], expected, rtol=1e-5, atol=1e-6)
    assert not same(trains, average)
    assert same(network(root / "judged" / "pipeline" / "prior"), average)
    train(root, *common, f"weights.prior={root}/judged/pipeline", "name=from_it")
    begin = re.findall(r"step 0: validation loss ([\d.]+)", (root / "from_it" / "train.log").read_text())[0]
    assert float(begin) == pytest.approx(loss, abs=2e-5)


@pytest.mark.parametrize("name", [option("prodigy")])
def test_the_rate_that_prodigy_found_is_the_one_that_is_logged(name: str, built: Any) -> None:
    training, _ = built(*chosen(name), "model=prior", "optimizer.lr=0.8")
    for _ in range(40):
        for weight in training.trainable:
            weight.grad = weight.detach().clone()  # one direction all along
        found = training.optimizer.param_groups[0]["d"]
        training.note_rate()
        training.optimizer.step()
    assert training.rate() == 0.8 * found
    assert found > 1.1e-3  # not where it began


@pytest.mark.parametrize("name", [option("muon")])
def test_muon_is_torchs_own_for_matrices_and_adamw_for_the_rest(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    ours, theirs = ([torch.nn.Parameter(torch.ones(shape)) for shape in ((8, 4), (4,), (2, 3, 3, 3))] for _ in range(2))
    made = Muon(ours, lr=0.1, weight_decay=0.2, betas=(0.5, 0.7))
    schedule = schedules.linear(made, total_steps=4)
    matrices = torch.optim.Muon(theirs[:1], lr=0.1, weight_decay=0.2, adjust_lr_fn="match_rms_adamw")
    rest = torch.optim.AdamW(theirs[1:], lr=0.1, weight_decay=0.2, betas=(0.5, 0.7))
    for rate in (0.1, 0.075, 0.05):
        matrices.param_groups[0]["lr"] = rest.param_groups[0]["lr"] = rate
        for mine, its in zip(ours, theirs, strict=True):
            mine.grad = torch.randn(mine.shape, generator=generator)
            its.grad = mine.grad.clone()
        for optimizer in (made, schedule, matrices, rest):
            optimizer.step()
    assert all(torch.equal(mine, its) for mine, its in zip(ours, theirs, strict=True))


def test_a_torch_without_muon_is_told_before_anything_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    with pytest.raises(ConfigError, match=r"Muon needs torch 2\.9 or newer, this is "):
        run(composed(tmp_path, *QUIET, "optimizer=muon"))
    assert not list(tmp_path.iterdir())


def test_one_that_does_not_work_on_this_device_is_told_before_anything_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "for_cuda.py").write_text(
        "import torch\n\n\nclass Adam(torch.optim.Adam):\n    def step(self, closure=None):\n"
        "        raise NotImplementedError(f'no kernel for {self.param_groups[0][\"params\"][0].device}')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    cfg = composed(tmp_path / "root", *QUIET, "optimizer._target_=for_cuda.Adam", "trusted_modules=[for_cuda]")
    with pytest.raises(ConfigError) as caught:
        run(cfg, trusted_modules=["for_cuda"])
    message = "does not work on this device, cpu (NotImplementedError: no kernel for cpu); take another"
    assert message in str(caught.value)
    assert not (tmp_path / "root").exists()
