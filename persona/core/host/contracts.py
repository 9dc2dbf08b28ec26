"""What a plugin gives, as types. A class that has these attributes fits; nothing has to be inherited."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np

    from persona.core.adapters.entry import Adapter, Checkpoint, Entry
    from persona.core.adapters.slots import Slots
    from persona.core.adapters.tensor import TensorRef
    from persona.core.training.base import Base
    from persona.core.training.batch import Batch
    from persona.core.training.plan import Picture, TrainingPlan
    from persona.core.training.processes import Processes
    from persona.core.training.settings import TrainSettings

    Array = np.ndarray[Any, np.dtype[Any]]


class Method(Protocol):
    """What is learned, from what. `Options` is a dataclass whose fields are made with `persona.core.options.option`."""

    name: str
    summary: str
    Options: type

    def plan(self, options: Any, settings: TrainSettings, base: Base, pictures: Sequence[Picture]) -> TrainingPlan:
        """The plan of a run from the method's own `options` and the `settings` every method shares. Raises UsageError
        for what cannot work on this base or with these pictures."""
        ...


@dataclass(frozen=True)
class Sharding:
    """That a run's processes have the denoiser, and the text encoders that are trained, in parts. Weights that were
    gathered for a forward are given back after it (`reshard_after_forward`) or kept for the backward; `offload` keeps
    the parts, gradients and the optimizer's state in main memory."""

    reshard_after_forward: bool = True
    offload: bool = False


@dataclass(frozen=True)
class Runtime:
    """Where and how a session executes: device ("auto", "cpu", "cuda", "cuda:1", "npu", "mps"), precision; `log` is
    where the words of a worker in another environment are kept."""

    device: str = "auto"
    precision: str = "fp32"
    gradient_checkpointing: bool = False
    log: Path | None = None
    processes: Processes | None = None  # of a run on several devices: what `Backend.join` gave
    sharding: Sharding | None = None  # None: every process has the whole model


@dataclass(frozen=True)
class SampleRequest:
    """Pictures to make: one prompt each, with its seed. `adapters` are (adapter, strength) pairs."""

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    negative_prompt: str = ""
    width: int = 0  # 0: the base's own size
    height: int = 0
    steps: int = 30
    guidance_scale: float = 5.0
    sampler: str = "ddim"
    batch: int = 4


@dataclass(frozen=True)
class Availability:
    """Whether a backend can be used here; `reason` in words and `hint` the line to type when it cannot."""

    available: bool
    version: str = ""
    reason: str = ""
    hint: str = ""


class Session(Protocol):
    """An opened base, perhaps with a plan's trainable weights attached. Arrays are numpy at this border."""

    notes: list[str]  # what the user should know, each once, in order: prompts cut, an autoencoder upcast, …

    def encode_pictures(self, pictures: Array) -> tuple[Array, Array]:
        """[n, 3, h, w] float32 in −1..1 to the latent mean and log-variance, each [n, c, h/f, w/f], unscaled."""
        ...

    def encode_text(self, captions: Sequence[str]) -> dict[str, Array]:
        """Named conditioning arrays for the denoiser, first axis one per caption (hidden_states; pooled for SDXL)."""
        ...

    def accumulate(self, batch: Batch) -> Array:
        """Forward and backward of one micro-batch; gradients add up. Returns the unweighted loss per sample, [n]."""
        ...

    def evaluate(self, batch: Batch) -> Array:
        """The unweighted loss per sample, [n], as `accumulate` would give it, but without gradients and dropout, and of
        the averages when there are some. Changes nothing."""
        ...

    def update(self, learning_rates: Sequence[float], max_norm: float) -> tuple[float, bool]:
        """One optimizer step with one learning rate per `plan.trains` entry, times `rate_factor` of each of its values
        (core/training/lora_values.py; LoRA+). Returns the gradient norm before clipping, and whether the step was
        skipped (loss scaling overflow)."""
        ...

    def average(self, decay: float) -> None:
        """average ← decay · average + (1 − decay) · value, for every trained value. Called after every `update` of a
        plan with an `ema_decay`, and only then; the core says how fast (core/training/averages.py). Averages start as
        the values themselves; they are what `evaluate`, `sample` and `product` use."""
        ...

    def sample(self, request: SampleRequest) -> Array:
        """[n, height, width, 3] uint8 pictures; request n starts from the core's noise for its seed."""
        ...

    def load_adapters(self, adapters: Sequence[tuple[Adapter, float]]) -> list[str]:
        """Put adapters (ΔW × strength, and their new tokens) into the opened base; returns notes for the user.
        Raises ConversionError when an entry has no home in this base."""
        ...

    def product(self) -> Adapter | Checkpoint:
        """What was trained, in torch layout."""
        ...

    def state(self) -> dict[str, Array]:
        """Everything that has to be kept to go on exactly: trained values, optimizer state, EMA. No generator's state:
        what is drawn follows from the plan (for dropout, `persona.core.training.noise.dropout_seed`)."""
        ...

    def load_state(self, state: Mapping[str, Array]) -> None:
        """Inverse of `state`. Raises ResumeError when names or shapes differ."""
        ...

    # A session may also have these:
    #
    # is_sharded: bool. True when its model is spread over the processes of `Runtime.sharding`: accumulate, evaluate,
    #     sample, state and product are then calls that all of them have to make, in the same order. `state` and
    #     `product` are whole in the first; what the others get is of no use.
    # first_step() -> what the first step does besides, in a word or two, where it takes long: told while it lasts.
    # write_state(path) -> None: write `state` to a file itself (persona.core.training.run.write_state), where sending
    #     it would take twice the memory.

    def close(self) -> None:
        """Free the memory."""
        ...


class Backend(Protocol):
    """Who computes it."""

    name: str
    summary: str

    def availability(self) -> Availability:
        """Cheap: looks for the packages, imports none."""
        ...

    def capabilities(self, device: str) -> Mapping[str, bool]:
        """What works on that device, by the names of `persona.core.host.capabilities`: bf16, dora, sampler:unipc, …"""
        ...

    # A backend that can work on several devices at once also has these three:
    #
    # devices(device, count) -> the name of the device of each of `count` processes; BackendMissing when they are not
    #     there, UsageError for a device that is only one.
    # launch_line(count, boot, module, logs) -> the words that start the framework's own launcher, which runs the Python
    #     file `boot` with the word `module` in `count` processes on this machine. What a launcher writes down goes to
    #     the folder `logs`.
    # join(device) -> Processes: called once in each launched process, before `open`; the others are there then. A
    #     session gets them in its runtime, takes the device of its rank, and `update` adds up the gradients of all.

    def open(self, base: Base, plan: TrainingPlan | None, runtime: Runtime) -> Session:
        """Load the base (missing or unknown weights are a BaseModelError) and attach the plan's trainable weights."""
        ...


@dataclass(frozen=True)
class State:
    """A file as its container explains it: names to lazy tensors with text metadata.

    `tensors` maps names to lazy tensors exactly as they are there; `metadata` is the file's own text metadata;
    `notes` are what the user should know about how it was read; `container` is the container's name."""

    tensors: Mapping[str, TensorRef]
    metadata: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    container: str = ""


class Container(Protocol):
    """Bytes to named tensors and back."""

    name: str
    suffixes: tuple[str, ...]

    def sniff(self, head: bytes, path: Path) -> bool:
        """Whether a file that starts with `head` (its first 4 KiB) is this container. Bytes decide, not the suffix."""
        ...

    def read(self, path: Path) -> State:
        """Lazy. Raises UnreadableFile for anything that is not exactly this container."""
        ...

    def write(self, path: Path, tensors: Mapping[str, TensorRef], metadata: Mapping[str, str]) -> None:
        """Write `path` (the caller gives a temporary name and renames it)."""
        ...


@dataclass(frozen=True)
class Evidence:
    """How well a dialect explains a state: `score` 0 (not at all) to 1 (every key), with the reasons."""

    score: float
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True)
class Told:
    """What the user said about a file, and what lies beside it.

    `alpha` fills what the file leaves open, `override_alpha` lets it replace what the file says; `family` settles what
    the evidence leaves open; `configs` are the parsed JSON files of a folder (`adapter_config.json`)."""

    alpha: float | None = None
    override_alpha: bool = False
    family: str | None = None
    path: str = ""
    siblings: tuple[str, ...] = ()
    configs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Output:
    """One file that a dialect writes: tensors with text metadata, or a JSON `document`, or bytes as they are.

    `name` is its path below the destination when the dialect is a folder, "" when it is a single file."""

    tensors: Mapping[str, TensorRef] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    name: str = ""
    document: Mapping[str, Any] | bytes | None = None


class Dialect(Protocol):
    """Named tensors to meaning and back.

    `slots` says what the dialect can hold; `write` renames and reshapes only, because the planner
    (core/adapters/conversion.py) has folded, split or expanded before whatever the slots cannot hold."""

    @property
    def name(self) -> str: ...

    @property
    def summary(self) -> str: ...

    @property
    def slots(self) -> Slots: ...

    def detect(self, state: State, siblings: Sequence[str]) -> Evidence:
        """Whether these names are spelt this way; `siblings` are the names of the files beside it."""
        ...

    def read(self, state: State, told: Told) -> Adapter:
        """The meaning, lazily: no arithmetic, nothing folded, cast or dropped; what no rule explains is a leftover.
        Raises UnreadableFile for an entry that is incomplete or contradicts itself."""
        ...

    def joined(self, adapter: Adapter) -> Callable[[Entry], str | None]:
        """For each module that this dialect keeps as rows of a larger one: the larger one's path, else None."""
        ...

    def write(self, adapter: Adapter) -> Sequence[Output]:
        """The files that spell `adapter`. Raises ConversionError for an entry that has no name or slot here."""
        ...


@dataclass(frozen=True)
class OptimizerChoice:
    """An optimizer of another package, for `persona_optimizers`.

    `package` is the module to look for and `install` the line that installs it. `classes` names by backend the class,
    "module:attribute", which is called with the parameter groups. `keywords` are the plan's fields (betas, epsilon,
    weight_decay) by what the class calls them, `constants` what it is told besides; --optimizer-option adds to both.
    `learning_rate` is the one it wants when it is not AdamW's."""

    package: str
    install: str
    classes: Mapping[str, str]
    keywords: Mapping[str, str] = field(default_factory=dict)
    constants: Mapping[str, Any] = field(default_factory=dict)
    learning_rate: float | None = None


class Scorer(Protocol):
    """A judge of pictures. The class is called with `model` (what it judges with; "" is its own choice) and `device`
    ("auto", "cpu", "cuda:1", …); it may load both when it is first asked."""

    name: str
    summary: str
    figures: Mapping[str, str]  # what it measures: the name of each figure, and a line about it

    def score(
        self, pictures: Sequence[Array], *, references: Sequence[Array] = (), prompts: Sequence[str] = ()
    ) -> Mapping[str, Array]:
        """Each figure of each picture, [n] float, higher is better. Pictures and references are [height, width, 3]
        uint8; `prompts` has one text a picture, "" for none (its figure is then NaN). A figure that needs references or
        prompts is left out when there are none."""
        ...


class Tracker(Protocol):
    """Somebody who is told how a run goes."""

    name: str

    def start(self, run_folder: Path, settings: Mapping[str, Any]) -> None:
        """Before the first step."""
        ...

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """After a step."""
        ...

    def finish(self) -> None:
        """After the last step, or when the run is interrupted."""
        ...
