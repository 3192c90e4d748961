"""RunSpec: what a person requests, resolved, validated and frozen. A hash of what differs from the defaults names the
run."""

import hashlib
import json
import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from ftlib.errors import InputError, nearest

M = TypeVar("M", bound=BaseModel)


class Model(BaseModel):
    """Frozen, and a field it does not know is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


class ModelSpec(Model):
    """The base model that is tuned."""

    name: str = Field(description="A folder (absolute, or inside the checkout) or a name on the Hugging Face hub")
    revision: str | None = Field(None, description="Branch, tag or commit on the hub")
    init_from: str | None = Field(
        None, description="Go on from another run (its name) or an export's folder: merged weights, else an adapter")


class TokensSpec(Model):
    """Additions to the tokenizer."""

    add: tuple[str, ...] = Field((), description="New tokens; their embedding rows are drawn by train.seed and trained")


class DataSpec(Model):
    """Where the examples come from and how they become rows of tokens."""

    path: str | None = Field(None, description="JSONL or JSON file of examples; without it the generator makes them")
    hub: str | None = Field(None, description="Dataset on the Hugging Face hub, such as yahma/alpaca-cleaned")
    revision: str | None = Field(None, description="Branch, tag or commit of the hub dataset")
    split: str = Field("train", description="Split of the hub dataset")
    format: Literal["alpaca", "prompt", "messages", "oasst-trees", "oasst-messages"] | None = Field(
        None, description="What a row of the file or hub dataset is; without it the rows themselves tell")
    functions: Literal["natural"] = Field("natural", description="The generator's set of functions")
    pairs: int = Field(10_000, ge=1, description="How many pairs the generator makes for training")
    template: Literal["alpaca", "brief", "chatml", "guanaco"] = Field(
        "alpaca", description="How an example becomes prompt and response")
    seq_len: int = Field(1024, ge=16, description="Tokens in a packed row")
    limit: int | None = Field(None, ge=1, description="Use only so many training examples")
    share: float | None = Field(None, gt=0, le=1, description="Use only this share of the training examples")
    held_out: float = Field(0.05, gt=0, lt=0.5, description="Share of a file held out, half validation, half test")
    seed: int = Field(0, ge=0, description="Seed of the generator, of the split and of the choice of limit and share")

    @model_validator(mode="after")
    def _one_source(self) -> "DataSpec":
        if self.path and self.hub:
            raise ValueError(f"give one of path and hub; found path {self.path!r} and hub {self.hub!r}")
        if self.hub and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", self.hub):
            raise ValueError(f"hub: {self.hub!r} is no dataset's name, such as yahma/alpaca-cleaned; a file is a path")
        return self


class MethodSpec(Model):
    """What is trained."""

    kind: Literal["qlora", "lora", "full", "freeze", "prompt", "two-stage"] = Field(
        "qlora",
        description="qlora: adapters on a 4-bit base; lora: on the base; full: every weight; freeze: only "
        "train_layers; prompt: a soft prompt; two-stage: a soft prompt, then adapters with it in place")
    base_bits: Literal[16, 8, 4] | None = Field(
        None, description="Bits of the base's linear layers; default: 4 for qlora, else 16")
    rank: int = Field(16, ge=1, description="Rank of the adapters")
    alpha: int = Field(32, ge=1, description="LoRA scaling: updates are multiplied by alpha / rank")
    rslora: bool = Field(False, description="Scale by alpha / sqrt(rank) instead")
    dora: bool = Field(False, description="Weight-decomposed adapters (DoRA)")
    dropout: float = Field(0.05, ge=0, lt=1, description="Dropout before the adapter")
    targets: Literal["all-linear"] | tuple[str, ...] = Field("all-linear", description="Linear layers with an adapter")
    train_layers: tuple[Annotated[str, Field(coerce_numbers_to_str=True)], ...] = Field(
        (), description="freeze: patterns of what is trained, such as 28-31, 24-31.mlp, lm_head ('make layers')")
    prompt_tokens: int = Field(20, ge=1, description="Length of the soft prompt")
    prompt_text: str | None = Field(None, description="Text whose embeddings begin the soft prompt; else random rows")
    prompt_share: float = Field(0.3, gt=0, lt=1, description="two-stage: share of the steps that train the prompt")
    prompt_lr: float | None = Field(None, gt=0, description="two-stage: the prompt's learning rate; default: optim.lr")
    quant_type: Literal["nf4", "fp4"] = Field("nf4", description="4-bit data type of the base")
    double_quant: bool = Field(True, description="Quantise the quantisation constants too")

    @property
    def bits(self) -> int:
        """Bits of the base's linear layers."""
        return self.base_bits or (4 if self.kind == "qlora" else 16)

    @property
    def adapts(self) -> bool:
        """Whether LoRA adapters are trained."""
        return self.kind in ("qlora", "lora", "two-stage")

    @property
    def prompted(self) -> bool:
        """Whether a soft prompt stands before each document: then rows are not packed."""
        return self.kind in ("prompt", "two-stage")


class OptimSpec(Model):
    """Optimizer and learning-rate schedule."""

    name: Literal["adamw_torch", "adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"] = Field(
        "paged_adamw_8bit", description="Optimizer; paged ones page only on a GPU")
    lr: float = Field(2e-4, gt=0, le=1, description="Peak learning rate")
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="Shape after the warm-up")
    warmup_share: float = Field(0.03, ge=0, lt=1, description="Share of the steps with a rising learning rate")
    weight_decay: float = Field(0.0, ge=0, description="Decoupled weight decay")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradients are clipped to this norm")


class TrainSpec(Model):
    """How long and in what portions."""

    steps: int | None = Field(None, ge=1, description="Optimizer steps; this or epochs")
    epochs: float | None = Field(None, gt=0, description="Passes over the data; this or steps")
    global_batch: int = Field(16, ge=1, description="Rows per optimizer step, over all GPUs")
    micro_batch: int | None = Field(None, ge=1, description="Rows per forward pass; without it the plan decides")
    gradient_checkpointing: bool = Field(True, description="Recompute activations in the backward pass: less memory")
    log_every_steps: int = Field(10, ge=1, description="Steps between progress lines (metrics.jsonl has every step)")
    eval_every_steps: int | None = Field(None, ge=1, description="Steps between validation losses; none without it")
    save_every_steps: int | None = Field(
        None, ge=1, description="Steps between checkpoints; without it the measured cost of a save decides")
    keep_every_steps: int | None = Field(
        None, ge=1, description="Save every so many steps and keep these checkpoints; else the newest two and the best")
    stop_after_worse: int | None = Field(
        None, ge=1, description="Stop early after so many validations in a row without a new lowest loss")
    keep_best: bool = Field(False, description="Export the checkpoint with the lowest validation loss, not the last")
    deterministic: bool | None = Field(None, description="Bit-equal resumes; default: on a CPU yes, on a GPU no")
    seed: int = Field(0, ge=0, description="Seed of weights, order and dropout")

    @model_validator(mode="after")
    def _one_length(self) -> "TrainSpec":
        if (self.steps is None) == (self.epochs is None):
            found = "neither" if self.steps is None else "both"
            raise ValueError(f"give exactly one of steps and epochs; found {found}")
        if self.micro_batch and self.global_batch % self.micro_batch:
            raise ValueError(
                f"global_batch {self.global_batch} is no multiple of micro_batch {self.micro_batch}; "
                f"fitting micro_batch values: {divisors(self.global_batch)}")
        if (self.stop_after_worse or self.keep_best) and not self.eval_every_steps:
            raise ValueError("stop_after_worse and keep_best need eval_every_steps")
        return self

    def total_steps(self, rows: float) -> int:
        """Optimizer steps of the training on `rows` packed rows."""
        return self.steps or max(1, math.ceil((self.epochs or 0) * rows / self.global_batch))


class ZeroSpec(Model):
    """ZeRO (arXiv 1910.02054): full fine-tuning whose state is shared out over the GPUs; its DeepSpeed configuration
    follows from here and the plan."""

    stage: Literal[0, 1, 2, 3] = Field(
        0, description="What each GPU holds only its share of: 1 the optimizer's state, 2 gradients too, 3 weights too")
    offload: Literal["none", "cpu"] = Field(
        "none", description="cpu: master weights, gradients and the optimizer's state lie in host memory")

    @model_validator(mode="after")
    def _offload_of_what(self) -> "ZeroSpec":
        if self.offload != "none" and not self.stage:
            raise ValueError("offload needs a stage: use stage 1, 2 or 3")
        return self


class ExportSpec(Model):
    """What is written beside the adapter, and how equal it must be."""

    merged: bool = Field(
        True, description="Write merged weights, loadable by plain transformers; default: no for method.kind=prompt")
    dtype: Literal["float16", "bfloat16", "float32"] = Field("bfloat16", description="Type of the merged weights")
    max_logit_diff: float = Field(
        0.05, gt=0, description="Allowed mean |difference| of logits to the trained model's, as a share of their spread"
    )
    equality_minutes: float = Field(
        10, gt=0, description="Time for comparing logits, in minutes; at least one batch of rows is compared")


class EvaluateSpec(Model):
    """How the model is judged."""

    pairs: int = Field(256, ge=1, description="Held-out examples scored")
    batch: int = Field(32, ge=1, description="Prompts generated at once")
    max_new_tokens: int = Field(128, ge=1, description="Longest answer, in tokens")
    few_shot: int = Field(0, ge=0, description="Ask the base model, too, with so many training examples before it")


class TrackingSpec(Model):
    """Weights & Biases; metrics.jsonl in the run folder is the truth either way."""

    mode: Literal["offline", "online", "disabled"] = Field("offline", description="wandb mode")
    project: str = Field("ftlib", description="wandb project")
    entity: str | None = Field(None, description="wandb entity (user or team)")


class ResourceSpec(Model):
    """Overrides of what the plan would ask the scheduler for."""

    nodes: int = Field(1, ge=1, description="Nodes of the training job")
    gpus_per_node: int = Field(1, ge=1, description="GPUs a node of the training job")
    train_time_min: int | None = Field(None, ge=1, description="Time limit of one life of the training job, in minutes")


class RunSpec(Model):
    """The whole request. `RunSpec.run_hash` names its run."""

    recipe: str = Field(description="Name of the recipe this came from")
    description: str = Field("", description="One line for people; not part of the hash")
    model: ModelSpec
    tokens: TokensSpec = TokensSpec()
    data: DataSpec = DataSpec()
    method: MethodSpec = MethodSpec()
    optim: OptimSpec = OptimSpec()
    train: TrainSpec
    zero: ZeroSpec = ZeroSpec()
    export: ExportSpec = ExportSpec()
    evaluate: EvaluateSpec = EvaluateSpec()
    tracking: TrackingSpec = TrackingSpec()
    resources: ResourceSpec = ResourceSpec()

    @model_validator(mode="before")
    @classmethod
    def _merged_where_possible(cls, values: Any) -> Any:
        """A soft prompt cannot be merged: not saying export.merged means no."""
        if isinstance(values, dict):
            method, export = values.get("method"), values.get("export", {})
            if isinstance(method, dict) and method.get("kind") == "prompt" and isinstance(export, dict):
                return {**values, "export": {"merged": False, **export}}
        return values

    def changed(self) -> dict[str, Any]:
        """What differs from the fields' defaults, as plain data; the description does not count."""
        return self.model_dump(mode="json", exclude_defaults=True, exclude={"description"})

    def run_hash(self, *, data_digest: str, cluster: str) -> str:
        """Eight hex digits from what differs from the defaults, the data's content and the cluster's name.

        So a field that a later version adds, with a default, changes no id.
        """
        text = json.dumps([self.changed(), data_digest, cluster], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:8]


def divisors(n: int) -> list[int]:
    """Every whole number that divides `n`, ascending."""
    return [d for d in range(1, n + 1) if n % d == 0]


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def validate(kind: type[M], values: dict[str, Any], where: str) -> M:
    """`values` as a `kind`, or one InputError that lists every problem with field, found, allowed and nearest name."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        lines = [_explain(kind, values, problem) for problem in error.errors()]
        raise InputError([f"{where}: {line}" for line in dict.fromkeys(lines)]) from None


def read(kind: type[M], path: Path) -> M:
    """A frozen JSON file of the kind; InputError where it is another version's, or cannot be read."""
    try:
        return kind.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: is no {kind.__name__} of this version ({str(error).splitlines()[0]})") from None


def _explain(kind: type[BaseModel], values: dict[str, Any], problem: ErrorDetails) -> str:
    """One of pydantic's problems in our words."""
    loc = [part for part in problem["loc"] if not (isinstance(part, str) and part.startswith(("literal[", "tuple[")))]
    field = ".".join(str(part) for part in loc) or "(the whole)"
    found: Any = values
    for part in loc:
        try:
            found = found[part]
        except (KeyError, TypeError, IndexError):
            found = None
    if problem["type"] == "extra_forbidden":
        inner = kind
        for part in loc[:-1]:  # a list's index is no field
            inner = (part in inner.model_fields and _nested(inner.model_fields[part].annotation)) or inner
        names = list(inner.model_fields)
        everywhere = [path for path in leaves(kind) if path.rsplit(".", 1)[-1] == str(loc[-1])]
        hint = f" Did you mean {everywhere[0]}?" if everywhere else nearest(str(loc[-1]), names)
        return f"{field} is no known field (found {found!r}). Allowed: {', '.join(names)}.{hint}"
    if problem["type"] == "missing":
        return f"{field} is missing and has no default"
    message = problem["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    if problem["type"] == "value_error":
        return f"{field}: {message}"
    if problem["type"] == "literal_error":
        allowed = problem["ctx"]["expected"]
        hint = nearest(str(found), allowed.replace("'", "").replace(" or ", ", ").split(", "))
        return f"{field}: found {found!r}. Allowed: {allowed}.{hint}"
    return f"{field}: {message[0].lower() + message[1:]} (found {found!r})"


def leaves(kind: type[BaseModel], prefix: str = "") -> list[str]:
    """Dotted paths of every field that is not itself a model."""
    found: list[str] = []
    for name, field in kind.model_fields.items():
        nested = _nested(field.annotation)
        found += leaves(nested, f"{prefix}{name}.") if nested else [prefix + name]
    return found


def _nested(annotation: Any) -> type[BaseModel] | None:
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None
