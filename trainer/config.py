"""Every setting of a training run, as one typed object that is saved beside its results."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from be_serve.core.artifact import Placement
from be_serve.core.errors import InputError
from be_serve.core.redaction import holds_credentials

TOKENS = 4
"""Learned vectors where nothing else is asked for and the trainer chooses no words."""
MAX_TOKENS = 16
MAX_PLACES = 64
PROBE_RANK = 64
"""Rank of the over-parameterisation of learned vectors that are trained alone."""
RECALL = 0.25
LR_OF_RMS = 0.15
"""The peak learning rate over the root mean square of a model's embeddings, which differs eightfold between models."""
BUILTIN_AE = "builtin"
"""As an [AE] file's name: the one that is shipped for the default model."""
_BUILTIN_AE_FILE = Path(__file__).parent / "assets" / "ae-smollm2-135m-instruct.safetensors"


def ae_file(name: str | Path) -> Path:
    """The [AE] file of a name."""
    return _BUILTIN_AE_FILE if str(name) == BUILTIN_AE else Path(name)


Places: TypeAlias = Annotated[int, Field(ge=1, le=MAX_PLACES)] | Literal["auto"]


class TrainConfig(BaseModel):
    """One run of `be-serve train`. `TrainConfig.load("run.yaml")` repeats it.

    Defaults are what measured best for the default model within minutes on two CPU cores; the
    paper's values stand in the field notes and in `RECIPES["paper"]`.
    """

    model_config = ConfigDict(extra="forbid", validate_assignment=True)

    # What to train.
    prompt_file: str
    """File with the system prompt to replace."""
    model: str
    """Model as the user named it; the caller resolves it to a folder."""
    id: str
    """be_id of the token."""
    output: str
    """Token file to write."""
    tokens: int | None = Field(default=None, ge=1, le=MAX_TOKENS)
    """The number of learned vectors. The paper: 1.

    None: TOKENS, or none beside words that the trainer chooses and trains: these carry the manner, too.
    """
    places: Places | None = None
    """Number of vectors with literal places: words of the prompt before `tokens` learned ones. None: learned only.

    `auto`: MAX_PLACES, at most half of the prompt's tokens. It is the default where neither `tokens` nor a start is
    given, and no secrecy asked for.
    """
    literal: bool = True
    """Whether places may begin as words of the prompt. Whoever has the token file and the model can read them."""
    freeze_literal: bool = False
    """Whether literal places stay the words that they begin as. Otherwise they are trained with the others."""
    keep_text: str | None = None
    """Words for the literal places, in place of those that the trainer chooses from the prompt."""
    probe_steps: int = Field(default=60, ge=0)
    """Steps of the learned vectors alone, before the trainer chooses the words that they do not carry."""
    placement: Placement = "system"
    """Where the vectors stand. The paper's code: in place of the whole system block (`block`)."""

    # Data.
    queries: str | None = None
    """JSONL of unlabeled queries; None: messages of the pool, and the model's own."""
    teacher: Literal["here", "vllm"] = "here"
    """What writes the responses: the frozen model itself, or a vLLM engine that ends before training begins."""
    teacher_url: str | None = None
    """OpenAI-compatible server of the same model that writes the responses; None: decoded here."""
    teacher_model: str | None = None
    """The model's name on that server; None: as `model`."""
    writer_url: str | None = None
    """OpenAI-compatible server of a larger model. It writes queries at the prompt's sentences, and is sent these."""
    writer_model: str | None = None
    """The model's name on that server."""
    gold: bool = False
    """Train on the file's `answer` fields instead of the teacher's own responses."""
    synthesise: int = Field(default=300, ge=8)
    """How many queries without a file: up to three in four written by the model, the others from the pool."""
    max_queries: int | None = Field(default=None, ge=2)
    """Use at most this many queries of the file, drawn at random."""
    held_out: int = Field(default=32, ge=1)
    """Queries kept from training for the final evaluation; at most a fifth of all."""
    validation: int = Field(default=16, ge=0)
    """Training queries kept to choose the best step, at most a tenth of them.

    0, or fewer than eight in a tenth: the last step's vectors are taken.
    """
    test_queries: str | None = None
    """JSONL of queries that are only measured on, in place of the held-out ones; what resembles them trains nothing."""
    response_tokens: int = Field(default=64, ge=1, le=4096)
    """Response tokens that count, each query. The paper's code: 32."""
    stop: list[str] = Field(default_factory=list)
    """Texts that end a response, as clients send them with their requests."""
    keep_recitals: bool = False
    """Also train on responses that recite the prompt: where its own words are meant to be said (a disclaimer)."""
    temperature: float = Field(default=0.0, ge=0)
    """Sampling temperature of the teacher's responses; 0 is greedy, as in the paper's code."""

    summary: str | None = None
    """A short text of the same intent, evaluated beside the token."""

    scores_only: bool = False
    """Evaluate by KL alone, without answers and clauses: for ablations."""
    answer_tokens: int = Field(default=512, ge=0)
    """Length to which the evaluation writes answers, to see facts, ends and loops; 0 writes none."""
    answer_queries: int | None = Field(default=None, ge=1)
    """Write them to at most so many queries, those with facts first; None: to all."""

    # Objective.
    recall: float | None = Field(default=None, ge=0, le=0.9)
    """Share of the examples that are sentences of the prompt itself (`trainer.data.recall`).

    None: `RECALL` where the trainer chooses words and trains them; 0 for learned vectors alone, and with `keep_text`.
    """
    ae: str | None = None
    """[AE] file of `train-ae`, or `builtin` for the default model's; needed for reconstruction (Eq. 2, lambda < 1)."""
    lam: float = Field(default=1.0, ge=0, le=1)
    """lambda of Eq. 4, the weight of distillation. The paper: 0.9, with an [AE]."""
    tau: float = Field(default=1.0, gt=0)
    """Distillation temperature of Eq. 3, scaled by tau squared. The paper: 2."""
    rank: int | None = Field(default=None, ge=0)
    """Rank of the over-parameterisation e = W z + b; 0 trains the vectors themselves, as the paper does.

    None: `PROBE_RANK` for learned vectors alone, 0 where words are trained with them.
    """
    reconstruct_steps: int = Field(default=0, ge=0)
    """Steps of stage 1 alone (Eq. 2) before distillation begins."""

    # Start and optimiser.
    init: str = "search"
    """`search` (real tokens of the prompt by KL), `text:<words>`, `file:<tokens>`, `mean`, or `random` (the paper)."""
    search_queries: int = Field(default=8, ge=1)
    """Training queries on which the search compares candidates."""
    steps: int = Field(default=480, ge=0)
    """Optimiser steps of distillation (stage 2)."""
    batch_size: int = Field(default=2, ge=1)
    """Queries a step. Small batches came further with as many queries (docs/results/training.md). The paper: 1."""
    lr: float | None = Field(default=None, gt=0)
    """Peak learning rate of AdamW; None: `LR_OF_RMS` of the model's embeddings. The paper's code: 1e-2."""
    warmup: int = Field(default=10, ge=0)
    """Steps of linear warm-up; a cosine to a tenth of the peak follows."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.9, ge=0, lt=1)
    weight_decay: float = Field(default=0.0, ge=0)
    clip: float = Field(default=1.0, gt=0)
    """Largest gradient norm."""
    seed: int = 0
    """Of the order of batches, of random starts, and of what is sampled; not of the held-out split."""

    # Machine.
    device: str = "auto"
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Of the frozen model; the vectors are float32 always."""
    serving_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Rounding of the arm `be_serving` in the evaluation."""
    checkpoint_every: int = Field(default=20, ge=1)
    with_prompt: bool = False
    """Write the prompt's text into the token file."""

    @model_validator(mode="before")
    @classmethod
    def _words_by_default(cls, values: Any) -> Any:
        if not isinstance(values, dict) or any(values.get(name) is not None for name in ("tokens", "places")):
            return values
        searched = values.get("init", "search") == "search" and values.get("literal", True) is True
        return {**values, "places": "auto"} if searched else values

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        if self.ae is None and (self.lam < 1 or self.reconstruct_steps):
            raise ValueError(
                "lambda < 1 and reconstruct_steps need an [AE] file: make one with `be-serve train-ae --corpus TEXTS "
                "-o ae.safetensors` and give it as --ae; reconstruction without one does harm"
            )
        if isinstance(self.places, int) and self.literal and self.places <= self.learned:
            raise ValueError(f"places: {self.places} leave no literal place beside {self.learned} learned vectors")
        if self.places is not None and self.literal and self.init in ("random", "mean") and self.keep_text is None:
            raise ValueError(
                f"places: {self.init} says that nothing begins at words of the prompt, and places begin at some. Give "
                "--tokens in place of --places, or --no-literal beside it"
            )
        if not (self.literal and self.places):
            if self.keep_text is not None:
                raise ValueError("keep_text: words need literal places; give --places, and no --no-literal")
            if self.freeze_literal:
                raise ValueError("freeze_literal: no literal places; give --places, and no --no-literal")
        if not all(self.stop):
            raise ValueError("stop: a text that ends a response cannot be empty")
        for role, url in (("teacher", self.teacher_url), ("writer", self.writer_url)):
            if url and holds_credentials(url):  # it is written into run.yaml
                raise ValueError(
                    f"{role}_url: leave user, password and key out of the URL; a key comes from BE_{role.upper()}_KEY"
                )
        if bool(self.writer_url) != bool(self.writer_model):
            raise ValueError(
                "a writer of queries needs both its server (--writer-url) and its name there (--writer-model)"
            )
        if self.writer_url and self.queries:
            raise ValueError("a file of queries (--queries) and a writer of queries (--writer-url) exclude each other")
        if self.gold and self.teacher_url:
            raise ValueError("gold answers and a teacher's server (--teacher-url) exclude each other")
        if self.teacher == "vllm" and (self.gold or self.teacher_url):
            raise ValueError("--teacher vllm excludes gold answers and a teacher's server (--teacher-url)")
        if self.gold and self.queries is None:
            raise ValueError("gold answers need a file of queries (--queries)")
        kind, _, rest = self.init.partition(":")
        if self.init not in ("search", "mean", "random") and not (kind in ("text", "file") and rest.strip()):
            raise ValueError(f"init {self.init!r}: use search, mean, random, text:<words> or file:<tokens>")
        return self

    @property
    def k(self) -> int:
        """The largest number of vectors that the token may have."""
        return MAX_PLACES if self.places == "auto" else self.places or self.tokens or TOKENS

    @property
    def learned(self) -> int:
        """The number of learned vectors."""
        if not self.literal:
            return self.k
        words_alone = self.words_trained and self.keep_text is None and self.init == "search"
        return self.tokens or (0 if words_alone else TOKENS)

    @property
    def words_trained(self) -> bool:
        """Whether literal places are trained with the others."""
        return self.places is not None and self.literal and not self.freeze_literal

    @property
    def trained(self) -> int:
        """The largest number of vectors that training moves."""
        return self.learned if self.freeze_literal else self.k

    def resolved(self, prompt_tokens: int) -> TrainConfig:
        """The settings for a prompt of so many tokens: what depends on its length has a number.

        Raises InputError where the prompt is too short.
        """
        places = self.places
        if places is not None and self.literal:
            places = min(self.k, prompt_tokens // 2 if places == "auto" else prompt_tokens)
            if places <= self.learned and (self.keep_text or self.freeze_literal):
                raise InputError(f"The prompt has {prompt_tokens} tokens: too few for literal places.")
            places = places if places > self.learned else None
        words = places is not None and self.words_trained
        rank = self.rank if self.rank is not None else 0 if words else PROBE_RANK
        recall = self.recall if self.recall is not None else RECALL if words and self.keep_text is None else 0.0
        found = self.model_copy(update={"places": places, "rank": rank, "recall": recall})
        if found.k > prompt_tokens:
            raise InputError(f"The prompt has {prompt_tokens} tokens, fewer than --tokens {found.k}: nothing to save.")
        return found

    def peak_lr(self, embedding_rms: float) -> float:
        """The peak learning rate, for embeddings of that root mean square."""
        return self.lr or LR_OF_RMS * embedding_rms

    def init_files(self) -> list[str]:
        """The token files that the run starts from."""
        return self.init.removeprefix("file:").split(",") if self.init.startswith("file:") else []

    def files(self) -> list[str]:
        """The files, beside the prompt's, whose content decides the run."""
        ae = str(ae_file(self.ae)) if self.ae else None
        return [name for name in (self.queries, self.test_queries, ae, *self.init_files()) if name]

    @staticmethod
    def overridden(loaded: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
        """Settings of a file under those of a command line, which may exclude words that the file asks for.

        `tokens` without `places` means learned vectors alone; a start or `literal: false` excludes the default's words.
        """
        kept = dict(loaded)
        excluded = given.get("init", "search") != "search" or given.get("literal") is False
        if "places" not in given and ("tokens" in given or (excluded and kept.get("places") == "auto")):
            kept.pop("places", None)
        return {**kept, **given}

    def save(self, path: Path) -> None:
        """Write the run's settings as YAML."""
        path.write_text(yaml.safe_dump(self.model_dump(), sort_keys=False, allow_unicode=True), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> TrainConfig:
        """Read settings written by `save`. Raises InputError."""
        return make_config(read_yaml(path))

    def recipe(self) -> dict[str, Any]:
        """What the manifest tells of the run: every choice, no path."""
        hidden = {
            "prompt_file",
            "output",
            "queries",
            "test_queries",
            "ae",
            "model",
            "id",
            "with_prompt",
            "teacher",
            "teacher_url",
            "teacher_model",
            "writer_url",
            "writer_model",
            "summary",
            "keep_text",
        }
        kept = self.model_dump(exclude=hidden)
        if not self.with_prompt or self.init_files():
            kept["init"] = self.init.partition(":")[0]  # its words may be the prompt's
        given = {"ae": self.ae is not None, "test_queries": self.test_queries is not None}
        return {**kept, "queries": "file" if self.queries else "synthetic", **given}


RECIPES: dict[str, dict[str, Any]] = {
    "default": {},
    # One vector, random start, joint loss; learning rate, betas and response length as in its public code.
    "paper": {
        "tokens": 1,
        "init": "random",
        "lam": 0.9,
        "tau": 2.0,
        "response_tokens": 32,
        "reconstruct_steps": 500,
        "steps": 2500,
        "batch_size": 1,
        "rank": 0,
        "beta2": 0.999,
        "lr": 1e-2,
        "placement": "block",
    },
}


def absolute_ae(name: str, folder: Path) -> str:
    """An [AE] file's name, relative to `folder`, made absolute."""
    return name if name == BUILTIN_AE else str((folder / name).absolute())


def absolute_init(init: str, folder: Path) -> str:
    """The setting `init` with its token files, if it names any, relative to `folder` made absolute."""
    if not init.startswith("file:"):
        return init
    files = [str((folder / name).absolute()) for name in init.removeprefix("file:").split(",")]
    return f"file:{','.join(files)}"


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML mapping from a file. Raises InputError."""
    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as exc:
        raise InputError(f"Cannot read the settings in {path}: {exc}.") from exc
    if not isinstance(data, dict):
        raise InputError(f"{path} holds no settings; give a run.yaml of an earlier run.")
    return data


def make_config(values: dict[str, Any]) -> TrainConfig:
    """A checked config. Raises InputError naming the first fault."""
    try:
        return TrainConfig.model_validate(values)
    except ValidationError as exc:
        first = exc.errors()[0]
        where = str(first["loc"][0]) if first["loc"] else ""
        raise InputError(f"Setting {where or 'combination'}: {first['msg'].removeprefix('Value error, ')}.") from exc
