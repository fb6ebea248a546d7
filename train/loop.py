"""The training run, from weights and pairs to Long-CLIP weights: reads top to bottom."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longclip_rt.errors import TrainingError
from longclip_rt.metrics import retrieval
from longclip_rt.train.config import TrainConfig
from longclip_rt.train.data.training_data import Batch
from longclip_rt.train.distributed import Processes, processes
from longclip_rt.train.loss import Objective
from longclip_rt.train.model import TrainableClip
from longclip_rt.train.run.checkpoints import TrainState, save_checkpoint
from longclip_rt.train.run.folder import claim_folder, note_config, only_run
from longclip_rt.train.run.report import RunLog, TrainProgress
from longclip_rt.train.run.results import WEIGHTS, finished_figures, load_bad_rows, save_bad_rows, save_results
from longclip_rt.train.setup import announce, open_training_data, precision_of, starting_weights
from longclip_rt.train.step import backward

logger = logging.getLogger("longclip_rt")

LOG_EVERY = 10
"""Steps between two lines of metrics."""

# A few such steps are normal while fp16's loss scale settles; many in a row, or most of the run's, are a run that has
# diverged.
_MOST_BROKEN_STEPS = 20

_ADVICE = (
    "Begin anew with another --out and a lower --lr, bound the gradients with --clip-grad-norm 1, or compute in bf16 "
    "or fp32."
)


@dataclass(frozen=True)
class TrainReport:
    """What a run gave.

    Attributes:
        folder: The run's folder.
        weights: The trained weights, safetensors.
        steps: Steps done in all.
        seconds: Time spent in training, resumed parts included.
        figures: The last validation's figures.
        bad_rows: Rows that could not be used.
        main: Whether this is the process that writes and prints; the figures of others are empty.
    """

    folder: Path
    weights: Path
    steps: int
    seconds: float
    figures: dict[str, float]
    bad_rows: int
    main: bool = True


def train(
    config: TrainConfig, folder: Path, *, resume: bool = False, device: str = "auto", quiet: bool = False
) -> TrainReport:
    """Trains a model and writes its weights, figures, curves and card into a folder.

    Args:
        config: The run.
        folder: Where it lives; made where it is not there.
        resume: Go on with the run in `folder` from its newest good checkpoint; begin it where there is none. On a
            CPU, with the same number of threads, the result is bit for bit that of a run without a stop. A run that is
            finished stays as it is.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        quiet: Show no progress.

    Returns:
        What came out.

    Raises:
        TrainingError: The run cannot begin, or cannot go on; the message says why.
        WeightsError: The weights to begin with cannot be used.
        OutputError: The folder cannot be written.
        MissingExtraError: A package is not installed.
    """
    with processes(device) as procs, contextlib.ExitStack() as stack:
        if config.batch_size % procs.world:
            raise TrainingError(
                f"A batch of {config.batch_size} cannot be shared by {procs.world} processes; choose a multiple."
            )
        if procs.main:
            stack.enter_context(only_run(folder))
        try:
            return _Run(config, folder, procs, resume=resume, quiet=quiet).run()
        except torch.OutOfMemoryError as error:
            held = config.chunk_size or config.batch_size // procs.world
            raise TrainingError(
                f"The GPU's memory does not hold the activations of {held} pairs. Lower --chunk-size below that (the "
                "gradients stay the same), or add --gradient-checkpointing; --resume then goes on with the run."
            ) from error


class _Run:
    """One run's parts: what `train` sets up once and every step uses."""

    def __init__(self, config: TrainConfig, folder: Path, procs: Processes, *, resume: bool, quiet: bool) -> None:
        self.config, self.folder, self.procs, self.quiet = config, folder, procs, quiet
        self.precision = precision_of(config.precision, procs.device)
        resumed = claim_folder(config, folder, resume, procs)
        torch.manual_seed(config.seed)
        start = starting_weights(config, progress=procs.main and not quiet)
        self.model = TrainableClip(
            start.architecture,
            start.state_dict,
            stretch=config.positions,
            logit_scale=config.logit_scale,
            frozen=config.frozen,
            gradient_checkpointing=config.gradient_checkpointing,
        ).to(procs.device)
        self.start = dataclasses.replace(start, state_dict={})  # the model has copied them
        self.data = open_training_data(config, self.model.architecture, self.start, procs)
        self.objective = Objective(config.objective, config.components, config.label_smoothing, config.pcm_scope)
        self.trained = [one for one in self.model.parameters() if one.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=config.lr, weight_decay=config.weight_decay)
        self.scaler = torch.amp.GradScaler(procs.device.type, enabled=self.precision == "fp16")
        self.total = self.data.steps_per_epoch * config.epochs
        if config.steps is not None:
            self.total = config.steps
        self.step, self.seconds, self.broken, self.skipped = 0, 0.0, 0, 0
        if resumed is not None:
            self._restore(resumed)
        self.first = self.step
        if config.compile:
            self.model.compile_towers()
        if procs.main:
            announce(config, self.model, self.data, procs, self.precision, self.step, self.total, quiet)

    def run(self) -> TrainReport:
        """Trains from the current step to the last, and writes what came out."""
        trained = self.step < self.total
        if self.procs.main:
            note_config(self.config, self.folder)
        log = RunLog(self.folder, resume_step=self.step) if self.procs.main else None
        quiet = self.quiet or not self.procs.main
        progress = TrainProgress(self.total, self.config.batch_size, start=self.step, quiet=quiet)
        figures: dict[str, float] = {}
        began = time.perf_counter() - self.seconds
        with contextlib.ExitStack() as stack:
            if log is not None:
                stack.enter_context(log)
            stack.enter_context(progress)
            for batch in self._batches():
                batch = batch.to(self.procs.device)
                losses = self._train_step(batch)
                self.step += 1
                last = self.step == self.total
                if log is not None and (self.step % LOG_EVERY == 0 or last):
                    values = {name: float(value) for name, value in losses.items()}
                    log.record(self.step, values | {"lr": self.config.lr_at(self.step - 1, self.total)})
                    progress.loss(values["loss"])
                progress.advance()
                if self.step % self.config.validate_every == 0 or last:
                    with progress.pause():
                        figures = self.validate()
                    if log is not None:
                        log.record(self.step, figures)
                if self.step % self.config.checkpoint_every == 0 or last:
                    self._refuse_diverged(batch)
                    self.seconds = time.perf_counter() - began
                    self._save()
        if trained:
            self.seconds = time.perf_counter() - began
        return self._finish(figures, trained)

    def _batches(self) -> Iterator[Batch]:
        """This process's batches from the current step to the last, epoch after epoch."""
        while self.step < self.total:
            epoch, start = divmod(self.step, self.data.steps_per_epoch)
            for batch in self.data.batches(epoch, start):
                yield batch
                # Not at an epoch's end, at which the data look whether too many rows of it were bad.
                if self.step >= self.total and self.step % self.data.steps_per_epoch:
                    return

    def _train_step(self, batch: Batch) -> dict[str, Tensor]:
        """One step of the optimiser; a step whose gradients are not finite changes nothing and is counted."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr_at(self.step, self.total)
        self.optimizer.zero_grad(set_to_none=True)
        losses = backward(
            self.model,
            batch,
            self.objective,
            self.procs,
            chunk=self.config.chunk_size,
            autocast=self._autocast,
            scale=self.scaler.scale,
        )
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.get_total_norm([one.grad for one in self.trained if one.grad is not None])
        finite = bool(torch.isfinite(norm))
        if finite and self.config.clip_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self.trained, self.config.clip_grad_norm, norm)
        if finite:
            self.scaler.step(self.optimizer)
        self.scaler.update()  # lowers the scale, too, after gradients that are not finite
        self._note_broken(finite)
        if self.config.max_logit_scale is not None:
            with torch.no_grad():
                self.model.logit_scale.clamp_(max=self.config.max_logit_scale)
        return {
            "loss": losses.total,
            "loss_long": losses.long,
            "loss_short": losses.short,
            "grad_norm": norm,
            "logit_scale": self.model.logit_scale.detach(),
            "skipped_steps": torch.tensor(self.skipped),
        }

    def _note_broken(self, finite: bool) -> None:
        self.broken = 0 if finite else self.broken + 1
        if finite:
            return
        self.skipped += 1
        if self.procs.main:
            logger.warning("step %d: the gradients are not finite; the step was left out", self.step + 1)
        if self.broken >= _MOST_BROKEN_STEPS:
            raise TrainingError(
                f"The gradients of {self.broken} steps in a row, up to step {self.step + 1}, are not finite. {_ADVICE}"
            )
        done = self.step + 1 - self.first
        if self.skipped >= _MOST_BROKEN_STEPS and 2 * self.skipped > done:
            raise TrainingError(
                f"The gradients of {self.skipped} of {done} steps, up to step {self.step + 1}, are not finite. "
                f"{_ADVICE}"
            )

    @torch.no_grad()
    def _refuse_diverged(self, batch: Batch) -> None:
        """Refuses weights that give no features any more, before they are saved: going on from them is of no use."""
        rows = self.config.chunk_size
        with self._autocast():
            both = self.model.encode_image(batch.pixels[:rows]), self.model.encode_text(batch.long_ids[:rows])
        sound = all(bool(torch.isfinite(one).all()) and bool(one.any()) for one in both)
        if not all(self.procs.collect(sound)):
            raise TrainingError(
                f"The run diverged: after step {self.step} the weights give no numbers any more, so they were not "
                f"saved. {_ADVICE}"
            )

    def _autocast(self) -> Any:
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.precision)
        return torch.autocast(self.procs.device.type, dtype, enabled=dtype is not None)

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Retrieval on the validation rows, long and short captions, both directions; empty on processes above 0."""
        figures: dict[str, float] = {}
        if self.procs.main:
            parts: dict[str, list[Tensor]] = {"image": [], "long": [], "short": []}
            self.model.eval()
            for batch in self.data.validation():
                batch = batch.to(self.procs.device)
                with self._autocast():
                    parts["image"].append(self.model.encode_image(batch.pixels).float())
                    parts["long"].append(self.model.encode_text(batch.long_ids).float())
                    parts["short"].append(self.model.encode_text(batch.short_ids).float())
            self.model.train()
            if parts["image"]:
                image, long, short = (torch.cat(rows).cpu().numpy() for rows in parts.values())
                for name, text in (("long", long), ("short", short)):
                    figures |= {f"{name}_{key}": value for key, value in retrieval(image, text).items()}
        self.procs.wait()
        return figures

    def _save(self) -> None:
        self._gather_bad_rows()
        if not self.procs.main:
            return
        save_bad_rows(self.data.bad, self.folder)
        random = {"cpu": torch.get_rng_state()}
        if self.procs.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(self.procs.device)
        state = TrainState(
            self.step,
            self.config.to_dict(),
            self.model.weights(),
            self.optimizer.state_dict(),
            self.scaler.state_dict(),
            random,
            self.seconds,
            self.procs.world,
        )
        save_checkpoint(self.folder, state, self.config.keep_checkpoints)

    def _restore(self, state: TrainState) -> None:
        self.step, self.seconds = state.step, state.seconds
        self.model.load_weights(state.weights)
        self.optimizer.load_state_dict(state.optimizer)
        if state.scaler:  # none where the run was on a CPU so far
            self.scaler.load_state_dict(state.scaler)
        torch.set_rng_state(state.random["cpu"])
        if self.procs.device.type == "cuda" and "cuda" in state.random:
            torch.cuda.set_rng_state(state.random["cuda"], self.procs.device)
        load_bad_rows(self.data.bad, self.folder)

    def _gather_bad_rows(self) -> None:
        """Gives the first process the bad rows of all."""
        for rows in self.procs.collect(list(self.data.bad)):
            if self.procs.main:
                for row in rows:
                    self.data.bad.add(row)

    def _finish(self, figures: dict[str, float], trained: bool) -> TrainReport:
        self._gather_bad_rows()
        written = None if trained else finished_figures(self.folder, self.total)
        if not trained and not self.procs.collect(written is not None)[0]:
            figures = self.validate()  # the run was stopped between its last checkpoint and its results
        if self.procs.main and written is not None:
            figures = written
        elif self.procs.main:
            if self.skipped:
                logger.warning("%d steps were left out: their gradients were not finite", self.skipped)
            save_results(
                self.folder,
                self.config,
                self.model,
                self.start,
                self.data,
                figures,
                steps=self.step,
                seconds=self.seconds,
                precision=self.precision,
                processes=self.procs,
            )
        self.procs.wait()
        return TrainReport(
            self.folder, self.folder / WEIGHTS, self.step, self.seconds, figures, self.data.bad.count, self.procs.main
        )
