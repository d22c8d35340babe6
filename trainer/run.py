"""One training run: from a config to a token file, a run folder and an evaluation."""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from be_serve.core.artifact import Manifest, Token, write_atomically
from be_serve.core.digests import digest_of
from be_serve.core.errors import BEError, InputError
from be_serve.core.prompts import read_prompt_file
from trainer.beginning import Beginner, Beginning
from trainer.config import TrainConfig
from trainer.data.chat_server import served_answers, served_writer
from trainer.data.queries import Query, drop_near_duplicates, read_queries, split_held_out, write_queries
from trainer.data.recall import with_recall
from trainer.data.synthesis import chats, synthesise, wanted, written
from trainer.data.teacher import Decoder, Example, Teacher
from trainer.evaluation.evaluate import Evaluation, evaluate, evaluation_steps
from trainer.evaluation.readable import readable
from trainer.evaluation.report_html import write_report
from trainer.evaluation.signatures import ends_in_loop
from trainer.evaluation.verdict import judge
from trainer.model.frozen import FrozenModel
from trainer.optim.checkpoint import Checkpoint
from trainer.optim.log import Log, draw_curves
from trainer.optim.loop import Optimisation, Training, fit
from trainer.optim.objectives import Distil, Joint, Reconstruct, Stage
from trainer.optim.starts import Start
from trainer.optim.validation import LEAST, Validation
from trainer.provenance import make_token, run_digest
from trainer.telling import Say, Telling

_SAMPLES = 12
"""Answers of each arm on which failure signatures are counted."""


@dataclass
class RunResult:
    """What a run made."""

    token: Token
    folder: Path
    evaluation: Evaluation
    start: Start
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall time of each phase of this call; `step` is the median of one optimiser step."""
    before: dict[str, float] | None = None
    """Of a run that was continued: the `steps` that it had done, and the `seconds` that these took."""

    def to_json(self) -> dict[str, Any]:
        """The object of `train --json`."""
        return {
            "id": self.token.manifest.id,
            "run_dir": str(self.folder),
            "verdict": self.token.manifest.quality["verdict"],
            "readable": self.token.manifest.quality["readable"],
            **self.evaluation.to_json(),
            "start": {"text": self.start.text, "kl": self.start.kl},
            "seconds": {name: round(value, 2) for name, value in self.seconds.items()},
            **({"before": self.before} if self.before else {}),
        }


class Run:
    """One run of `be-serve train`.

    result = Run(config, model, Path("runs/captain-1f2e3d4c")).execute()

    The folder holds `run.yaml` (the settings), the queries, `heldout.jsonl`,
    the teacher's cache, `checkpoint.safetensors`, `log.jsonl`, `curves.png` and
    `evaluation.json`. A run that finds its own checkpoint there continues it.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: FrozenModel,
        folder: Path,
        *,
        cache: Path | None = None,
        decoder: Decoder | None = None,
        say: Say = lambda text: None,
        quiet: bool = False,
    ) -> None:
        self.model = model
        self.folder = folder
        self.cache = cache or folder
        self.decoder = decoder
        self.telling = Telling(say, quiet)
        self._training: Training
        self._teacher: Teacher
        self._begin: Beginning
        self._held_out: list[Query]
        self._test: list[Query]
        self.prompt = read_prompt_file(config.prompt_file)
        self.prompt_ids = model.slots.prompt_ids(self.prompt, template_kwargs=model.template_kwargs)
        self._given = config
        self.config = config = config.resolved(len(self.prompt_ids))

    def execute(self) -> RunResult:
        """Train, evaluate, write the token. Raises Stopped after a signal, InputError for faulty input."""
        try:
            training = self.prepare()
        finally:
            if self.decoder:
                self.decoder.close()
        fit(self.model, [training], quiet=self.telling.quiet)
        return self.finish()

    def finished(self) -> bool:
        """Whether the folder holds the result of these very settings, prompt and files, and the token is written."""
        try:
            found = json.loads((self.folder / "evaluation.json").read_text(encoding="utf-8"))
            Token.load(self.config.output)
        except (OSError, ValueError, BEError):
            return False
        return isinstance(found, dict) and found.get("inputs") == self._inputs()

    def forget(self) -> None:
        """Begin anew: drop the checkpoint, the result and what the model or a server wrote for this run."""
        made = ("checkpoint.safetensors", "probe/*", "evaluation.json", "queries-*.jsonl", "answers-*.jsonl")
        for pattern in made:
            for file in self.folder.glob(pattern):
                file.unlink()

    def _inputs(self) -> str:
        """Digest of the settings and of the files that they name."""
        config = self.config
        files = [Path(name).read_bytes() for name in config.files() if Path(name).is_file()]
        return digest_of([config.model_dump(), self.prompt, [hashlib.sha256(data).hexdigest() for data in files]])

    def prepare(self) -> Training:
        """All that comes before the first step: queries, the teacher's responses, the start.

        Raises InputError for faulty input; what was made stays in the folder.
        """
        config = self.config
        self.folder.mkdir(parents=True, exist_ok=True)
        training, self._held_out, self._test = self._queries()
        if self.config.teacher_url:
            training = self._served(training)
        digest = run_digest(config, self.model, self.prompt, training)
        checkpoint = self.folder / "checkpoint.safetensors"
        if checkpoint.exists():
            Checkpoint.load(checkpoint, digest)  # another run's folder is refused before anything in it changes
        (self.folder / "evaluation.json").unlink(missing_ok=True)
        self._given.save(self.folder / "run.yaml")  # for another prompt, or other options, `auto` means another number
        write_queries(self.folder / "heldout.jsonl", self._held_out)
        self._teacher = Teacher(self.model, self.prompt, self.cache, stop=config.stop)
        # Only training data comes from elsewhere: every token is measured on the frozen model's own answers.
        writer = Teacher(self.model, self.prompt, self.cache, stop=config.stop, decoder=self.decoder)
        examples = self._usable(writer, self._examples(writer, training))
        count = min(config.validation, len(examples) // 10)
        count = count if count >= LEAST else 0
        examples, validation = examples[count:], examples[:count]
        beginner = Beginner(
            config, self.model, self.prompt, self.prompt_ids, self.folder, cache=self.cache, telling=self.telling
        )
        self._begin = beginner.begin(examples, digest, self._distil, self._optimisation())
        frozen = self._begin.frozen(config)
        with self.telling.timed("teacher"):
            examples = with_recall(writer, examples, config.recall or 0.0, response_tokens=config.response_tokens)
        self._training = Training(
            self._begin.token,
            self._stages(examples, frozen),
            self._optimisation(),
            folder=self.folder,
            digest=digest,
            validation=Validation(self._distil(validation, frozen, tau=1.0)) if validation else None,
        )
        return self._training

    def finish(self) -> RunResult:
        """Evaluate the trained vectors and write the token. Raises InputError where the training diverged."""
        training = self._training
        if training.fault:
            raise training.fault
        seconds = self.telling.seconds
        if training.seconds:
            seconds["training"] = sum(training.seconds) + training.validation_seconds
            seconds["step"] = statistics.median(training.seconds)
        vectors_KH = training.vectors.cpu()
        if training.best and training.best.step < training.stages[-1][1]:
            self.telling.say(
                f"Step {training.best.step} is the best on the validation queries (KL {training.best.kl:.3f})."
            )
        evaluation = self._evaluate(self._teacher, self._test, vectors_KH)
        evaluation.training_queries = self._begin.training_queries
        seconds["total"] = sum(value for name, value in seconds.items() if name != "step")
        size = len(self.prompt_ids)
        read = readable(self.model, vectors_KH, self.prompt_ids)
        made = make_token(self.config, self.model, self.prompt, size, vectors_KH, self._begin.start, evaluation, read)
        made.save(self.config.output)
        if read:
            self.telling.say(
                f"Of {len(vectors_KH)} vectors, {read} can be read as words of the prompt by whoever has the token "
                "file and the model (`readable`)."
            )
        self._report(made.manifest, evaluation)
        for way in self.model.slow_ways():
            self.telling.say(f"Slower than on most models: {way} ({self.model.name}).")
        earlier = training.seconds_before
        before = {"steps": len(earlier), "seconds": round(sum(earlier), 2)} if self._begin.continued else None
        return RunResult(made, self.folder, evaluation, self._begin.start, seconds, before)

    def _queries(self) -> tuple[list[Query], list[Query], list[Query]]:
        """Training, held-out and test queries, without near-duplicates across; a file of test queries stays whole."""
        config = self.config
        test = read_queries(config.test_queries) if config.test_queries else []
        key = [self.prompt, config.synthesise, config.seed, str(self.model.fingerprint), str(self.model.dtype)]
        if config.writer_url:
            key += [config.writer_url, config.writer_model]
        kept = self.folder / f"queries-{digest_of(key)}.jsonl"
        if config.queries:
            found = read_queries(config.queries)
        elif kept.exists():
            found = read_queries(kept)
        else:
            with (
                self.telling.timed("queries"),
                self.telling.bar("writing queries", chats(config.synthesise)) as progress,
            ):
                writer = None
                if config.writer_url and config.writer_model:
                    writer = served_writer(config.writer_url, config.writer_model, seed=config.seed, progress=progress)
                found = synthesise(
                    self.model, self.prompt, config.synthesise, seed=config.seed, writer=writer, progress=progress
                )
            write_queries(kept, found)
            if written(found) < wanted(config.synthesise) / 2:
                self.telling.say(
                    f"Only {written(found)} of {wanted(config.synthesise)} messages that the model wrote at the prompt "
                    "are usable; others of the pool make up for them. Better are your own (--queries), or a larger "
                    "model's (--writer-url)."
                )
        unique = drop_near_duplicates(found, beside=test)
        if len(unique) < len(found):
            those = " (of each other, or of a test query)" if test else ""
            self.telling.say(f"{len(found) - len(unique)} near-duplicates{those} of {len(found)} queries left out.")
        training, held_out = split_held_out(unique, config.held_out, latest=config.queries is not None)
        training = training[: config.max_queries]
        apart = f", {len(test)} to test on" if test else ""
        self.telling.say(f"{len(training)} queries to train on, {len(held_out)} held out{apart}.")
        return training, held_out, test or held_out

    def _examples(self, teacher: Teacher, training: list[Query]) -> list[Example]:
        config = self.config
        with self.telling.timed("teacher"), self.telling.bar("teacher", 2 * len(training)) as progress:
            return teacher.examples(
                training,
                response_tokens=config.response_tokens,
                temperature=config.temperature,
                gold=config.gold or config.teacher_url is not None,
                seed=config.seed,
                progress=progress,
            )

    def _usable(self, teacher: Teacher, examples: list[Example]) -> list[Example]:
        """Without responses that recite the prompt or go round in a loop: a token shall learn neither."""
        if self.config.gold:
            return examples
        kept = examples
        if not self.config.keep_recitals:
            kept = [example for example in examples if not teacher.recites(example)]
            if len(kept) < len(examples):
                self.telling.say(
                    f"{len(examples) - len(kept)} responses that recite the prompt left out (--keep-recitals)."
                )
            if not kept:
                raise InputError(
                    "Every response recites the prompt: give other --queries, or --keep-recitals if that is meant."
                )
        ending = [example for example in kept if not ends_in_loop(teacher.text(example.response))]
        if ending and len(ending) < len(kept):
            self.telling.say(f"{len(kept) - len(ending)} responses that go round in a loop left out.")
        return ending or kept

    def _served(self, training: list[Query]) -> list[Query]:
        """The queries with a server's answers; those of an interrupted run, or of another row, are not asked again."""
        with self.telling.timed("teacher"), self.telling.bar("asking the teacher", len(training)) as progress:
            return served_answers(self.config, self.model, self.prompt, training, self.cache, progress)

    def _distil(
        self,
        examples: list[Example],
        literal: Sequence[int] = (),
        *,
        tau: float | None = None,
        focused: bool = False,
    ) -> Distil:
        config = self.config
        return Distil(
            self.model,
            examples,
            placement=config.placement,
            tau=config.tau if tau is None else tau,
            batch_size=config.batch_size,
            seed=config.seed,
            literal_LH=self.model.embed(literal) if literal else None,
            focused=focused,
        )

    def _optimisation(self) -> Optimisation:
        config = self.config
        return Optimisation(
            config.peak_lr(self.model.embedding_rms),
            config.warmup,
            (config.beta1, config.beta2),
            config.weight_decay,
            config.clip,
            config.checkpoint_every,
        )

    def _stages(self, examples: list[Example], literal: Sequence[int]) -> list[tuple[Stage, int]]:
        config, model = self.config, self.model
        stage: Stage = self._distil(examples, literal, focused=config.words_trained)
        stages: list[tuple[Stage, int]] = []
        if config.ae is not None:
            from trainer.optim.autoencoder import load_ae

            reconstruct = Reconstruct(model, self.prompt, load_ae(config.ae, model))
            if config.reconstruct_steps:
                stages.append((reconstruct, config.reconstruct_steps))
            if config.lam < 1:
                stage = Joint(reconstruct, stage, config.lam)
        return [*stages, (stage, config.steps)]

    def _evaluate(self, teacher: Teacher, test: list[Query], vectors_KH: Tensor) -> Evaluation:
        config, whole = self.config, not self.config.scores_only
        tokens, most = (config.answer_tokens if whole else 0), config.answer_queries
        given: dict[str, Any] = {"clauses": whole, "answer_tokens": tokens, "answer_queries": most}
        total = evaluation_steps(self.prompt, len(test), summary=bool(config.summary), **given)
        with self.telling.timed("evaluation"), self.telling.bar("evaluating", total) as progress:
            return evaluate(
                teacher,
                test,
                vectors_KH,
                placement=config.placement,
                summary=config.summary,
                serving_dtype=config.serving_dtype,
                samples=_SAMPLES if whole else 0,
                **given,
                progress=progress,
            )

    def _report(self, manifest: Manifest, evaluation: Evaluation) -> None:
        levels: dict[str, float] = {
            name: evaluation.arms[name]["kl"] for name in ("none", "summary") if name in evaluation.arms
        }
        curves = self.folder / "curves.png"
        draw_curves(Log(self.folder / "log.jsonl").rows(), curves, levels)
        write_report(self.folder / "report.html", manifest, evaluation, judge(evaluation), curves)
        # Last, for it marks the run as finished.
        text = json.dumps({**evaluation.to_json(), "inputs": self._inputs()}, indent=1, ensure_ascii=False)
        write_atomically(self.folder / "evaluation.json", f"{text}\n".encode())
