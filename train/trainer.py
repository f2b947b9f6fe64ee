"""The loop: passes, optimizer steps, evaluations, states to continue from, and the checkpoint at the end."""

from __future__ import annotations

import contextlib
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

from pgfast.errors import TrainError

from . import schedule, state
from .answer_model import batch_tensors
from .batches import BatchMaker, MicroBatch
from .checkpoint import renew_card, write_checkpoint
from .config import difference
from .distributed import Processes, gradients_stay, wrap
from .feature_cache import FeatureCache
from .pictures import Pictures
from .plan import Plan, Progress
from .run_log import Evaluated, RunLog
from .setup import Trainee, build
from .validation import Validation

logger = logging.getLogger(__name__)

STATES, CHECKPOINT = "state", "checkpoint"


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
        self.step, self.best, self.since_best = 0, -1.0, 0
        found = state.newest(out / STATES)
        self._cursor = state.read_cursor(found) if found else None
        if self._cursor:
            self._check(self._cursor)
        torch.manual_seed(config.seed)
        self.trainee: Trainee = build(config, plan.base)
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
        if found and self._cursor:
            state.load(found, self.model, self.optimizer)
            self.step, extra = self._cursor.step, self._cursor.extra
            self.best, self.since_best = extra["best"], extra["since_best"]
            logger.info("continuing at step %d", self.step)
        self.log = RunLog(out, self.step) if processes.is_main else None

    def run(self) -> dict[str, Any]:
        """Train what is left and write the checkpoint.

        Returns:
            `steps`, `loss` of the last step (None if none was left), `accuracy` of the checkpoint (None without evaluation
            data), `stopped_early`.

        Raises:
            TrainError: The loss is not a number, a picture is broken, the disk is full. The last state is kept.
        """
        loss: float | None = None
        config, steps = self.plan.config, self.plan.steps
        self.model.train()
        try:
            for passes in self._batches.steps(steps if self._out_of_patience() else self.step, steps):
                start = time.perf_counter()
                loss, norm, lr = self._train(passes)
                self.step += 1
                self._log_step(loss, norm, lr, time.perf_counter() - start)
                if self.step in self._evaluation_steps():
                    self._evaluate()
                if self.step % config.save_every == 0 or self.step == steps or self._out_of_patience():
                    self._save()
                if self._out_of_patience():
                    break
        finally:
            self._batches.close()
            self._name_unreadable()
            if self.log:
                self.log.close()
        if self._validation is None or self.best < 0:
            self._write_checkpoint()
        else:
            renew_card(self.out / CHECKPOINT, self.plan, self.trainee, self.processes)
        accuracy = self.best if self.best >= 0 else None
        return {"steps": self.step, "loss": loss, "accuracy": accuracy, "stopped_early": self.step < steps}

    def _out_of_patience(self) -> bool:
        patience = self.plan.config.patience
        return bool(patience) and self.since_best >= patience

    def _name_unreadable(self) -> None:
        """Add the rows whose picture turned out to be broken to a report."""
        if not self._batches.unreadable:
            return
        record = self.plan.train.dataset.record
        with (self.out / f"unreadable-rows-process-{self.processes.rank}.jsonl").open("a") as file:
            for row, reason in self._batches.unreadable.items():
                file.write(json.dumps({"row": row, "id": record(row).id, "reason": reason}) + "\n")

    def _evaluation_steps(self) -> set[int]:
        if self._validation is None:
            return set()
        count = self.plan.config.evaluations
        return {max(1, round(self.plan.steps * (i + 1) / count)) for i in range(count)}

    def _train(self, passes: list[MicroBatch]) -> tuple[float, float, float]:
        """Do one optimizer step; return its loss, the norm of its gradients, and its learning rate."""
        config, world = self.plan.config, self.processes.world
        total = torch.zeros((), dtype=torch.float64)
        for number, micro in enumerate(passes):
            with gradients_stay(self.model, number + 1 < len(passes)):
                with self._autocast():
                    losses = self.model(**self._tensors(micro))  # [A]
                loss = (losses * torch.from_numpy(micro.weights).to(losses.device)).sum()
                # DDP and FSDP take the mean over processes; the weights already are shares of the whole step
                (loss * world).backward()
            total += loss.detach().double().cpu()
        value = float(self.processes.sum(total))
        whole: Any = nn.utils.clip_grad_norm_(self.model.parameters(), config.clip_norm or math.inf)
        norm = float(whole.full_tensor() if hasattr(whole, "full_tensor") else whole)  # sharded: each process has a part
        if not (math.isfinite(value) and math.isfinite(norm)):
            raise TrainError(self._keep_bad_batch(passes, value, norm))
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
            loss, score = self._validation.run(self.model, self.on_progress)
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
        self.since_best += 1
        if evaluated.accuracy > self.best:
            self.best, self.since_best = evaluated.accuracy, 0
            self._write_checkpoint()
        message = f"accuracy {evaluated.accuracy:.2%}, best {self.best:.2%}"
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
        plan = self.plan
        cursor = state.Cursor(
            step=self.step,
            digest=plan.config.digest(),
            fixed=plan.config.fixed(),
            base=plan.base.fingerprint(),
            data=plan.data_digest,
            world=self.processes.world,
            extra={"best": self.best, "since_best": self.since_best},
        )
        state.save(self.out / STATES, cursor, self.model, self.optimizer)

    def _check(self, cursor: state.Cursor) -> None:
        plan = self.plan
        way_out = f"choose another --out, or remove {self.out}"
        if cursor.digest != plan.config.digest():
            raise TrainError(f"{self.out} holds another run: {difference(cursor.fixed, plan.config.fixed())}; {way_out}")
        if cursor.base != plan.base.fingerprint():
            raise TrainError(f"{self.out} was trained from other weights than {plan.base.name} holds now; {way_out}")
        if cursor.data != plan.data_digest:
            raise TrainError(f"{self.out} was trained on other rows than {plan.config.data} holds now; {way_out}")
        if cursor.world != self.processes.world:
            raise TrainError(f"{self.out} ran with {cursor.world} processes, this is {self.processes.world}; {way_out}")

    def _write_checkpoint(self) -> None:
        write_checkpoint(self.out / CHECKPOINT, self.plan, self.trainee, self.model, self.processes)

    def _open_cache(self) -> FeatureCache | None:
        config, base = self.plan.config, self.plan.base
        if not config.feature_cache:
            return None
        key = json.dumps([asdict(base.image), config.precision, config.attention])
        self.trainee.answer_model.to(self.processes.device)
        return FeatureCache(Path(config.feature_cache), self.trainee.model.model.vision_tower, key)

    def _keep_bad_batch(self, passes: list[MicroBatch], loss: float, norm: float) -> str:
        """Write the rows of a step whose loss is not a number; return what to tell."""
        file = self.out / f"bad-batch-step-{self.step + 1}-process-{self.processes.rank}.json"
        dataset, tokenizer = self.plan.train.dataset, self.plan.base.tokenizer
        rows = [
            {
                "row": int(row),
                **{name: value for name, value in asdict(dataset.record(int(row))).items() if name != "answers"},
                "input_ids": ids[: int(length)].tolist(),
                "decoded": tokenizer.decode(ids[micro.batch.num_image_tokens : int(length)].tolist()),
            }
            for micro in passes
            for row, ids, length in zip(micro.rows, micro.batch.input_ids, micro.batch.lengths, strict=True)
        ]
        file.write_text(
            json.dumps({"step": self.step + 1, "loss": str(loss), "gradient_norm": str(norm), "rows": rows}, indent=1)
        )
        what = f"the loss is {loss} and the gradient norm {norm} at step {self.step + 1}"
        kept = f", the last good state in {self.out / STATES}" if state.newest(self.out / STATES) else ""
        return f"{what}: the batch is in {file}{kept}"
