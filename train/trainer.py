"""The loop: passes, optimizer steps, evaluations, states to continue from, and the checkpoint at the end."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from pgfast.errors import ImageError, TrainError

from . import bad_rows, schedule, state
from .answer_model import batch_tensors
from .batches import BatchMaker, MicroBatch
from .checkpoint import renew_card, write_checkpoint
from .distributed import Processes, gradients_stay, wrap
from .feature_cache import FeatureCache
from .interruption import StopRequest
from .pictures import Pictures
from .plan import Plan, Progress
from .run_log import Evaluated, RunLog
from .setup import Trainee, build, count_parameters
from .validation import Validation

logger = logging.getLogger(__name__)

STATES, CHECKPOINT = "state", "checkpoint"


def cursor_of(plan: Plan, world: int) -> state.Cursor:
    """Return the start of a run: what a state must share with it to be continued."""
    return state.Cursor(
        step=0,
        fixed=plan.config.fixed(),
        base=plan.base.fingerprint(),
        data=plan.data_digest,
        world=world,
        best=None,
        since_best=0,
        evaluated=0,
    )


class Trainer:
    """One run in one folder; made again over the same folder it continues.

    Args:
        plan: What to do.
        out: Folder of the run.
        processes: This process among the others.
        on_progress: Called after every step.

    Raises:
        TrainError: The folder holds another run, or the base model does not load.
    """

    def __init__(self, plan: Plan, out: Path, processes: Processes, on_progress: Progress) -> None:
        config = plan.config
        self.plan, self.out, self.processes, self.on_progress = plan, out, processes, on_progress
        self.step = 0
        self.best: list[float] | None = None
        """Accuracy, loss and step of the checkpoint's evaluation."""
        self.since_best = self.evaluated = 0
        found = state.newest(out / STATES)
        cursor = state.read_cursor(found) if found else None
        if len(set(processes.gather([cursor.step if cursor else 0]))) > 1:
            raise TrainError(f"not all processes see the same state in {out}: it has to lie on a disk that they share")
        if cursor:
            state.check(cursor, cursor_of(plan, processes.world), out)
        torch.manual_seed(config.seed)  # adapters start the same in all processes
        self.trainee: Trainee = build(config, plan.base, sparse_embedding=processes.world == 1)
        torch.manual_seed(config.seed + processes.rank)  # dropout differs
        counts = count_parameters(self.trainee.answer_model)
        each = ", ".join(f"{tower} {trainable:,}" for tower, (trainable, _) in counts.items())
        on_progress("trainable parameters", sum(t for t, _ in counts.values()), sum(a for _, a in counts.values()), each)
        hf = plan.base.config
        special = {
            "image_token_id": hf.image_token_id,
            "num_image_tokens": plan.base.num_image_tokens,
            "pad_token_id": hf.pad_token_id,
        }
        shard = processes.world > 1 and config.method == "full"
        self._cache = self._open_cache()
        self.model: nn.Module = wrap(self.trainee.answer_model, processes, shard=shard)
        self.optimizer = schedule.adam(
            self.model.named_parameters(),
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            weight_decay=config.weight_decay,
        )
        self._batches = BatchMaker(
            config,
            plan.train.dataset,
            plan.order,
            plan.encoder,
            Pictures(plan.train.dataset, plan.base.image),
            special,
            cache=self._cache,
            augment=plan.augment,
            rank=processes.rank,
            world=processes.world,
        )
        self._validation = Validation(plan, special, processes, sharded=shard) if plan.evaluation else None
        if found and cursor:
            state.load(found, self.model, self.optimizer)
            self.step, self.best, self.since_best = cursor.step, cursor.best, cursor.since_best
            self.evaluated = cursor.evaluated
            on_progress("continuing", self.step, plan.steps, "")
        self._saved = self.step
        self.log = RunLog(out, self.step, self.evaluated) if processes.is_main else None

    def run(self) -> dict[str, Any]:
        """Train what is left and write the checkpoint.

        Returns:
            `steps`, `loss` of the last step (None if none was left), `accuracy` of the checkpoint (None without evaluation
            data) and the step it is from, `stopped_early`.

        Raises:
            TrainError: The loss is not a number, a picture is broken, the disk is full. The last state is kept.
            KeyboardInterrupt: Ctrl-C or SIGTERM came; the step was finished and its state saved.
        """
        loss: float | None = None
        steps, self._step_began = self.plan.steps, time.perf_counter()
        self.model.train()
        try:
            with StopRequest(self.processes.world == 1) as stop:
                if self._is_evaluation_due():  # a broken picture may have ended the last one
                    self._evaluate()
                    self._save()
                for passes in self._batches.steps(steps if self._out_of_patience() else self.step, steps):
                    loss = self._step(passes)
                    if stop.signal is not None:
                        if self._saved != self.step:
                            self._save()
                        raise KeyboardInterrupt
                    if self._out_of_patience():
                        break
        except (TrainError, ImageError):
            # between two steps of one process everything is whole: nothing that was learned has to be lost
            if self.processes.world == 1 and self.step > self._saved:
                with contextlib.suppress(TrainError):  # the full disk itself, perhaps
                    self._save()
            raise
        finally:
            self._batches.close()
            bad_rows.name_unreadable(self.plan, self.out, self.processes.rank, self._batches.unreadable)
            if self.log:
                self.log.close()
        if self.best is None or not (self.out / CHECKPOINT).exists():
            self._write_checkpoint()
        else:
            renew_card(self.out / CHECKPOINT, self.plan, self.trainee, self.processes, self.step)
        accuracy, _, step = self.best or (None, None, self.step)
        result = {"steps": self.step, "loss": loss, "accuracy": accuracy, "checkpoint_step": step}
        return result | {"stopped_early": self.step < steps}

    def _step(self, passes: list[MicroBatch]) -> float:
        """Do a step and all that is due after it; return its loss."""
        loss, norm, lr = self._train(passes)
        self.step += 1
        # waiting for the batch counts, evaluating and saving do not
        self._log_step(loss, norm, lr, time.perf_counter() - self._step_began)
        if self._is_evaluation_due():
            self._evaluate()
        if self.step % self.plan.config.save_every == 0 or self.step == self.plan.steps or self._out_of_patience():
            self._save()
        self._step_began = time.perf_counter()
        return loss

    def _out_of_patience(self) -> bool:
        patience = self.plan.config.patience
        return bool(patience) and self.since_best >= patience

    def _is_evaluation_due(self) -> bool:
        if self._validation is None or self.evaluated == self.step:
            return False
        count = self.plan.config.evaluations
        return self.step in {max(1, round(self.plan.steps * (i + 1) / count)) for i in range(count)}

    def _train(self, passes: list[MicroBatch]) -> tuple[float, float, float]:
        """Do one optimizer step; return its loss, the norm of its gradients, and its learning rate."""
        config, world = self.plan.config, self.processes.world
        total = torch.zeros((), dtype=torch.float64, device=self.processes.device)
        for number, micro in enumerate(passes):
            with gradients_stay(self.model, number + 1 < len(passes)):
                tensors, weights = self._tensors(micro), torch.from_numpy(micro.weights).to(self.processes.device)
                with self._autocast():
                    losses = self.model(**tensors)  # [A]
                loss = (losses * weights).sum()
                # DDP and FSDP take the mean over processes; the weights already are shares of the whole step
                (loss * world).backward()
            total += loss.detach().double()
        value = float(self.processes.sum(total))
        whole: Any = nn.utils.clip_grad_norm_(self.model.parameters(), config.clip_norm or math.inf)
        norm = float(whole.full_tensor() if hasattr(whole, "full_tensor") else whole)  # sharded: each process has a part
        if not (math.isfinite(value) and math.isfinite(norm)):
            raise TrainError(self._not_a_number(passes, value, norm))
        warmup = config.warmup_steps or round(config.warmup_fraction * self.plan.steps)
        lr = config.learning_rate * schedule.factor(self.step, self.plan.steps, kind=config.schedule, warmup=warmup)
        schedule.set_learning_rate(self.optimizer, lr)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return value, norm, lr

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.plan.config.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.processes.device.type, torch.bfloat16)

    def _tensors(self, micro: MicroBatch) -> dict[str, torch.Tensor]:
        device = self.processes.device
        tensors = batch_tensors(micro.batch, micro.image_index, device)
        if self._cache is None:
            assert micro.pixel_values is not None
            return tensors | {"pixel_values": torch.from_numpy(micro.pixel_values).to(device)}
        hidden = dict(micro.features)
        missing = [i for i in range(len(micro.names)) if i not in hidden]
        tower = self.trainee.model.model.vision_tower  # frozen, so no process shares or shards it
        for at, i in enumerate(missing):
            # one at a time: a picture's features must not depend on what was beside it
            pixels = torch.from_numpy(np.asarray(micro.pixel_values)[at : at + 1]).to(device)
            with torch.no_grad(), self._autocast():
                out = tower(pixels).last_hidden_state[0]  # [P, W]
            hidden[i] = out.to(torch.bfloat16 if self.plan.config.precision == "bf16" else torch.float32)
            if micro.names[i]:
                self._cache.save(micro.names[i], hidden[i])
        return tensors | {"image_hidden": torch.stack([hidden[i].to(device) for i in range(len(micro.names))])}

    def _evaluate(self) -> None:
        assert self._validation is not None
        start = time.perf_counter()
        with self._autocast():
            # sharded, each process has answered everything itself
            loss, score = self.processes.of_first(self._validation.run(self.model, self.on_progress))
        assert score.overall is not None
        evaluated = Evaluated(
            step=self.step,
            epoch=self._epoch(),
            training_loss=self.log.mean_loss() if self.log else math.nan,
            loss=loss,
            accuracy=score.overall.accuracy,
            by_type={name: group.accuracy for name, group in score.by_answer_type.items()},
            count=score.overall.count,
            seconds=round(time.perf_counter() - start, 2),
        )
        if self.log:
            self.log.evaluation(evaluated)
        self.evaluated = self.step
        self.since_best += 1
        # of two with the same accuracy the one that is surer of the right answers
        if self.best is None or (evaluated.accuracy, -loss) > (self.best[0], -self.best[1]):
            self._write_checkpoint()
            self.best, self.since_best = [evaluated.accuracy, loss, self.step], 0
        message = f"accuracy {evaluated.accuracy:.2%}, best {self.best[0]:.2%}"
        self.on_progress("evaluated", self.step, self.plan.steps, message)

    def _epoch(self) -> float:
        return self.step * self.plan.per_step / len(self.plan.train.rows)

    def _log_step(self, loss: float, norm: float, lr: float, seconds: float) -> None:
        speed = self.plan.per_step / seconds
        if self.log:
            row = {"step": self.step, "epoch": self._epoch(), "loss": loss, "learning_rate": lr, "gradient_norm": norm}
            self.log.step(row | {"examples_per_second": round(speed, 2), "seconds": round(seconds, 4)})
        self.on_progress("training", self.step, self.plan.steps, f"loss {loss:.4f}, {speed:.1f} examples/s")

    def _save(self) -> None:
        if self.log:
            self.log.flush()
        start = cursor_of(self.plan, self.processes.world)
        now: dict[str, Any] = {"step": self.step, "since_best": self.since_best, "evaluated": self.evaluated}
        cursor = dataclasses.replace(start, best=self.best, **now)
        state.save(self.out / STATES, cursor, self.model, self.optimizer)
        self._saved = self.step

    def _write_checkpoint(self) -> None:
        write_checkpoint(self.out / CHECKPOINT, self.plan, self.trainee, self.model, self.processes)

    def _open_cache(self) -> FeatureCache | None:
        config, base = self.plan.config, self.plan.base
        if not config.feature_cache:
            return None
        key = json.dumps([asdict(base.image), config.precision, config.attention, self.processes.device.type])
        self.trainee.answer_model.to(self.processes.device)
        return FeatureCache(Path(config.feature_cache), self.trainee.model.model.vision_tower, key)

    def _not_a_number(self, passes: list[MicroBatch], loss: float, norm: float) -> str:
        """Keep the batch of a step whose loss is not a number; return what to tell."""
        file = self.out / f"bad-batch-step-{self.step + 1}-process-{self.processes.rank}.json"
        found = {"step": self.step + 1, "loss": str(loss), "gradient_norm": str(norm)}
        bad_rows.keep_batch(self.plan, file, passes, {**found})
        what = f"the loss is {loss} and the gradient norm {norm} at step {self.step + 1}"
        kept = f", the last good state in {self.out / STATES}" if state.newest(self.out / STATES) else ""
        return f"{what}: the batch is in {file}{kept}"
