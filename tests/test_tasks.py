"""Tasks beside answering: their prompts, their languages, their commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pgfast.export.plan import LANGUAGES, PROMPTS

from pgfast.cli import main
from pgfast.engine import Engine
from pgfast.errors import PromptError
from pgfast.loading import demo_bundle
from pgfast.tasks import task_prompt

BLUE = str(demo_bundle().parent / "blue_circle.png")


@pytest.fixture
def prompts(demo: Engine, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The raw prompts that reach the tokenizer."""
    seen: list[str] = []
    encode = demo._tokenizer.encode_prompt

    def noting(text: str, *, max_tokens: int) -> list[int]:
        seen.append(text)
        return encode("what shape", max_tokens=max_tokens)

    monkeypatch.setattr(demo._tokenizer, "encode_prompt", noting)
    return seen


def test_prompts_are_those_of_the_model_card(demo: Engine, prompts: list[str], picture: np.ndarray) -> None:
    """ai.google.dev/gemma/docs/paligemma/prompt-system-instructions; the newline is added by the tokenizer's part."""
    for style in ("cap", "caption", "describe"):
        demo.caption(picture, style=style)
    demo.ocr(picture)
    demo.question(picture, " blue ")
    demo.answer(picture, " what {text} is {language}? ")
    assert prompts == ["cap en", "caption en", "describe en", "ocr", "question en blue", "answer en what {text} is {language}?"]
    assert PROMPTS["detect"].replace("{text}", "cat ; dog") == "detect cat ; dog"
    assert PROMPTS["segment"].replace("{text}", "cat") == "segment cat"


def test_languages_are_those_of_the_bundle(demo: Engine, picture: np.ndarray) -> None:
    assert (len(LANGUAGES), len(set(LANGUAGES))) == (35, 35)
    for call in (demo.caption, lambda p, **k: demo.answer(p, "what", **k), lambda p, **k: demo.question(p, "blue", **k)):
        with pytest.raises(PromptError, match="not trained with the language 'xx': one of en"):
            call(picture, language="xx")  # type: ignore[operator]
    with pytest.raises(PromptError, match="a code such as 'en'"):
        demo.caption(picture, language=5)  # type: ignore[arg-type]


def test_what_is_no_task_is_refused(demo: Engine, picture: np.ndarray) -> None:
    with pytest.raises(PromptError, match="style is cap, caption or describe"):
        demo.caption(picture, style="long")  # type: ignore[arg-type]
    with pytest.raises(PromptError, match="the answer is empty"):
        demo.question(picture, " ")
    with pytest.raises(PromptError, match="the labels are empty"):
        task_prompt(demo.manifest, "detect", "")
    with pytest.raises(PromptError, match="no prompt for 'dance', only for answer, cap"):
        task_prompt(demo.manifest, "dance")


def called(*args: Any) -> int | str | None:
    with pytest.raises(SystemExit) as caught:
        main([str(arg) for arg in args])
    return caught.value.code


@pytest.mark.parametrize(
    "words", [("caption", BLUE), ("ocr", BLUE), ("question", BLUE, "blue"), ("caption", "--style", "describe", BLUE)]
)
def test_commands_print_what_the_engine_says(words: tuple[str, ...], demo: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    calls = {
        "caption": lambda: demo.caption(BLUE, style="describe" if "describe" in words else "caption"),
        "ocr": lambda: demo.ocr(BLUE),
        "question": lambda: demo.question(BLUE, "blue"),
    }
    assert called(*words, "--provider", "cpu") == 0
    expected = calls[words[0]]()
    assert capsys.readouterr().out == f"{expected.text}\n"
    assert called(*words, "--provider", "cpu", "--json") == 0
    assert json.loads(capsys.readouterr().out)["token_ids"] == list(expected.token_ids)


def test_a_video_is_its_frames(demo: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("av")
    from test_video import write_video

    from pgfast.video import read_frames

    clip = write_video(tmp_path / "clip.mp4", 12)
    most = demo.manifest.limits.images
    assert called("caption", clip, "--frames", most, "--provider", "cpu") == 0
    assert capsys.readouterr().out == f"{demo.caption(read_frames(clip, most)).text}\n"
    assert called("answer", clip, "what color is the shape?", "--provider", "cpu") == 0
    assert capsys.readouterr().out == f"{demo.answer(read_frames(clip, min(8, most)), 'what color is the shape?').text}\n"
    for words, message in (
        (("caption", clip, "--frames", most + 1), f"takes at most {most} picture{'s' * (most > 1)} ("),
        (("caption", clip, BLUE), "a video is given alone"),
        (("caption", "--frames", "0", clip), "number of frames is 0"),
        (("caption", "--frames", "1", BLUE), "cannot be read as a video"),
        (("answer", "-", "-", "what?"), "- can be given once"),
    ):
        assert called(*words, "--provider", "cpu") == 2
        assert message in capsys.readouterr().err
