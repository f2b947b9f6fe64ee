"""A run that is killed, stopped or out of disk goes on as if nothing had happened; several processes are one."""

from __future__ import annotations

import csv
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pgfast.train import state
from pgfast.train.presets import resolve
from pgfast.train.run import start
from PIL import Image
from safetensors.numpy import load_file

from pgfast.errors import TrainError

STEPS = 12
COLORS = {"red": (255, 0, 0), "blue": (0, 0, 255), "green": (0, 160, 0)}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty questions about twenty pictures, as JSONL."""
    folder = tmp_path_factory.mktemp("data")
    rng, rows = np.random.default_rng(0), []
    for number in range(20):
        color = list(COLORS)[number % 3]
        picture = rng.integers(0, 60, (40, 48, 3), dtype=np.uint8) + np.uint8(np.array(COLORS[color]) // 2)
        Image.fromarray(picture.astype(np.uint8)).save(folder / f"{number}.png")
        rows.append({"image": f"{number}.png", "question": "what color is the picture ?", "answer": color})
        rows.append(
            {"image": f"{number}.png", "question": "is there a red circle ?", "answer": "yes" if color == "red" else "no"}
        )
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "rows.jsonl"


def values(checkpoint: Path, data: Path, **extra: Any) -> dict[str, Any]:
    """A short run in the manner of the seed preset, fast enough to learn something."""
    base: dict[str, Any] = {
        "model": str(checkpoint),
        "data": str(data),
        "max_steps": STEPS,
        "batch_size": 2,
        "accumulation": 2,
        "learning_rate": 1e-3,
        "holdout": 0.2,
        "evaluations": 2,
        "max_new_tokens": 4,
        "save_every": 1,
        "threads": 1,
        "precision": "fp32",
    }
    return base | extra


def run(out: Path, **overrides: Any) -> dict[str, Any]:
    import torch
    from pgfast.train.distributed import Processes

    preset = overrides.pop("preset", "seed")
    return start(resolve(preset, overrides), out, Processes(0, 1, torch.device("cpu")), lambda *_: None)


def losses(out: Path) -> list[str]:
    """Losses as they are written, digit for digit."""
    with (out / "steps.csv").open(newline="") as file:
        return [row["loss"] for row in csv.DictReader(file)]


def same_weights(one: Path, two: Path, name: str = "model.safetensors") -> bool:
    first, second = (load_file(folder / "checkpoint" / name) for folder in (one, two))
    return first.keys() == second.keys() and all(np.array_equal(first[key], second[key]) for key in first)


def command(out: Path, options: dict[str, Any], launcher: tuple[str, ...] = ()) -> list[str]:
    words = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    return [sys.executable, "-m", *(launcher or ()), "pgfast", "train", "--preset", "seed", "-o", str(out), *words]


ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def whole(checkpoint: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing disturbs."""
    out = tmp_path_factory.mktemp("run") / "whole"
    run(out, **values(checkpoint, data))
    assert len(losses(out)) == STEPS
    assert float(losses(out)[-1]) < float(losses(out)[0])
    return out


def test_a_run_that_is_killed_goes_on_bit_for_bit(checkpoint: Path, data: Path, whole: Path, tmp_path: Path) -> None:
    """SIGKILL at random moments, in loading, steps, evaluations and while a state is written."""
    rng = random.Random(0)
    out, kills = tmp_path / "killed", 0
    while True:
        child = subprocess.Popen(
            command(out, values(checkpoint, data)), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=ENVIRONMENT
        )
        begun = len(losses(out)) if (out / "steps.csv").exists() else 0
        deadline = time.monotonic() + 120
        if kills < 4:
            while child.poll() is None and time.monotonic() < deadline:  # not before it did something new
                states = sorted(out.glob("state/step-*"))
                if states and int(states[-1].name[5:]) > begun:
                    break
                time.sleep(0.002)
            time.sleep(rng.random() * 0.05)
            child.send_signal(signal.SIGKILL)
            kills += 1
        _, error = child.communicate(timeout=120)
        if child.returncode != -signal.SIGKILL:
            assert child.returncode == 0, error.decode()
            break
    assert kills >= 2
    assert losses(out) == losses(whole)
    assert same_weights(out, whole)
    mine, theirs = ((folder / "evaluations.jsonl").read_text().splitlines() for folder in (out, whole))
    without_time = [
        [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines] for lines in (mine, theirs)
    ]
    assert without_time[0] == without_time[1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_after_its_step_with_the_state_saved(
    checkpoint: Path, data: Path, whole: Path, tmp_path: Path, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pgfast.train.trainer import Trainer

    train = Trainer._train

    def signalled(self: Trainer, passes: Any) -> Any:
        if self.step == 4:
            os.kill(os.getpid(), number)
        return train(self, passes)

    outside = signal.signal(number, signal.default_int_handler)  # whatever the tests were started with
    options = values(checkpoint, data, save_every=1000)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train", signalled)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, **options)
    assert signal.signal(number, outside) is signal.default_int_handler
    assert [folder.name for folder in (tmp_path / "state").iterdir()] == ["step-00000005"]
    run(tmp_path, **options)
    assert losses(tmp_path) == losses(whole)


def test_what_was_learned_before_a_broken_picture_is_kept(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(data.parent, tmp_path / "data")
    options = values(checkpoint, folder / "rows.jsonl", save_every=1000, holdout=0, evaluations=0)
    run(tmp_path / "whole", **options)
    # the header stays, so that only decoding finds it; the picture of the third step's first row
    broken = folder / f"{_picture_of_step(folder / 'rows.jsonl', 2)}.png"
    content = broken.read_bytes()
    broken.write_bytes(content[: len(content) // 2])
    with pytest.raises(TrainError, match=rf"{broken.name}.*--skip-bad"):
        run(tmp_path / "run", **options)
    (kept,) = (tmp_path / "run" / "state").iterdir()
    assert 1 <= int(kept.name[5:]) <= 2
    broken.write_bytes(content)
    run(tmp_path / "run", **options)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def _picture_of_step(rows: Path, step: int) -> int:
    """A picture that is shown in a step and in none before it, by the order that the seed gives."""
    from pgfast.train.order import EpochOrder

    order = EpochOrder(np.arange(len(rows.read_text().splitlines())), 42, 4)
    before = {int(row) // 2 for earlier in range(step) for row in order.draw(earlier)[0]}
    return next(int(row) // 2 for row in order.draw(step)[0] if int(row) // 2 not in before)


class Stopped(Exception):
    pass


@pytest.mark.parametrize("preset", ["lora", "seed"])
@pytest.mark.parametrize("cached", [False, True])
def test_a_run_stopped_at_any_step_goes_on(
    checkpoint: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, preset: str, cached: bool
) -> None:
    """With dropout (its random state is part of the state) and with features from a cache that the first try began."""
    extra: dict[str, Any] = {"preset": preset, "max_steps": 5, "evaluations": 1}
    if preset == "lora":
        extra["lora_dropout"] = 0.3
    options = values(checkpoint, data, **extra)
    caches = iter(tmp_path / f"features-{n}" for n in range(9))
    if cached:
        options["feature_cache"] = str(next(caches))
    run(tmp_path / "whole", **options)
    for stop in (1, 3, 4):
        out = tmp_path / f"stopped-{stop}"
        if cached:
            options["feature_cache"] = str(next(caches))
        with monkeypatch.context() as patch:
            from pgfast.train.trainer import Trainer

            train = Trainer._train

            def interrupted(self: Trainer, passes: Any, train: Any = train, stop: int = stop) -> Any:
                if self.step == stop:
                    raise Stopped
                return train(self, passes)

            patch.setattr(Trainer, "_train", interrupted)
            with pytest.raises(Stopped):
                run(out, **options)
        run(out, **options)
        assert losses(out) == losses(tmp_path / "whole")
        assert same_weights(out, tmp_path / "whole", "adapter_model.safetensors" if preset == "lora" else "model.safetensors")


def test_cached_features_give_the_losses_of_pictures(checkpoint: Path, data: Path, whole: Path, tmp_path: Path) -> None:
    options = values(checkpoint, data, feature_cache=str(tmp_path / "features"))
    run(tmp_path / "filling", **options)
    assert len(list((tmp_path / "features").rglob("*.npy"))) == 16  # the training pictures, each once
    run(tmp_path / "filled", **options)
    assert losses(tmp_path / "filled") == losses(tmp_path / "filling")
    np.testing.assert_allclose([float(x) for x in losses(tmp_path / "filled")], [float(x) for x in losses(whole)], rtol=1e-5)


def test_a_damaged_cached_picture_is_made_anew(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    options = values(checkpoint, data, feature_cache=str(tmp_path / "features"), max_steps=4, evaluations=1)
    run(tmp_path / "first", **options)
    for file in (tmp_path / "features").rglob("*.npy"):
        file.write_bytes(file.read_bytes()[:200])
    run(tmp_path / "second", **options)
    assert losses(tmp_path / "second") == losses(tmp_path / "first")


@pytest.mark.parametrize("method", ["full", "lora"])
def test_two_processes_give_the_losses_of_one_with_twice_the_batch(
    checkpoint: Path, data: Path, tmp_path: Path, method: str
) -> None:
    """torchrun with gloo on the CPU: FSDP2 for the whole model, DDP for adapters."""
    options = values(checkpoint, data, method=method, freeze="vision,projector" if method == "full" else "", max_steps=6)
    run(tmp_path / "one", **(options | {"batch_size": 4}))
    launcher = ("torch.distributed.run", "--nproc-per-node=2", "--standalone", "-m")
    done = subprocess.run(
        command(tmp_path / "two", options, launcher), capture_output=True, text=True, env=ENVIRONMENT, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = ([float(x) for x in losses(tmp_path / name)] for name in ("one", "two"))
    np.testing.assert_allclose(two, one, rtol=2e-5)
    name = "adapter_model.safetensors" if method == "lora" else "model.safetensors"
    first, second = (load_file(tmp_path / run / "checkpoint" / name) for run in ("one", "two"))
    assert first.keys() == second.keys()
    for key in first:
        np.testing.assert_allclose(second[key], first[key], atol=2e-4, err_msg=key)
    evaluated = [json.loads((tmp_path / run / "evaluations.jsonl").read_text().splitlines()[-1]) for run in ("one", "two")]
    assert evaluated[0]["count"] == evaluated[1]["count"] == 8
    assert evaluated[1]["loss"] == pytest.approx(evaluated[0]["loss"], rel=1e-3)
    # and goes on from its state, with two processes again
    more = command(tmp_path / "two", options, launcher)
    again = subprocess.run(more, capture_output=True, text=True, env=ENVIRONMENT, timeout=300)
    assert again.returncode == 0, again.stderr[-3000:]
    assert [float(x) for x in losses(tmp_path / "two")] == two


def test_a_full_disk_stops_the_run_and_loses_nothing(checkpoint: Path, data: Path, whole: Path, tmp_path: Path) -> None:
    """A limit on the size of files is the nearest thing to a full disk that a test can make."""
    out = tmp_path / "run"
    options = values(checkpoint, data)
    run(out, **(options | {"max_steps": STEPS}))
    shutil.rmtree(out)

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))

    full = subprocess.run(command(out, options), capture_output=True, text=True, env=ENVIRONMENT, timeout=120, preexec_fn=limit)
    assert full.returncode == 2, full.stderr
    assert "cannot be written" in full.stderr.splitlines()[-1]
    assert not list(out.glob("state/*"))
    assert not list(out.glob("state/.*"))
    run(out, **options)
    assert losses(out) == losses(whole)


def test_an_older_state_survives_a_failed_write(
    checkpoint: Path, data: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, count = state.save_file, 0

    def failing(*args: Any) -> None:
        nonlocal count
        count += 1
        if count >= 8:
            raise OSError(28, "No space left on device")
        save(*args)

    monkeypatch.setattr(state, "save_file", failing)
    with pytest.raises(TrainError, match=r"step 3 cannot be written .*No space left"):
        run(tmp_path, **values(checkpoint, data))
    monkeypatch.undo()
    assert [folder.name for folder in (tmp_path / "state").iterdir()] == ["step-00000002"]
    run(tmp_path, **values(checkpoint, data))
    assert losses(tmp_path) == losses(whole)


def test_what_a_run_may_not_change_is_named(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    options = values(checkpoint, data, max_steps=2, evaluations=1)
    run(tmp_path / "out", **options)
    with pytest.raises(TrainError, match=r"--learning-rate was 0.001 and is 0.002"):
        run(tmp_path / "out", **(options | {"learning_rate": 2e-3}))
    other = tmp_path / "rows.jsonl"
    other.write_text("".join(data.read_text().splitlines(keepends=True)[:-2]))
    moved = values(checkpoint, other, max_steps=2, evaluations=1, images=str(data.parent))
    run(tmp_path / "other", **moved)
    other.write_text(data.read_text())
    with pytest.raises(TrainError, match="other rows"):
        run(tmp_path / "other", **moved)
    run(tmp_path / "out", **(options | {"save_every": 7, "workers": 1}))  # these are free


@pytest.mark.parametrize("file", ["state.json", "weights.safetensors", "optimizer.safetensors"])
def test_a_damaged_state_is_named(checkpoint: Path, data: Path, tmp_path: Path, file: str) -> None:
    options = values(checkpoint, data, max_steps=2, evaluations=1)
    run(tmp_path, **options)
    (path,) = tmp_path.glob(f"state/*/{file}")
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(TrainError, match="is damaged: remove it"):
        run(tmp_path, **options)
