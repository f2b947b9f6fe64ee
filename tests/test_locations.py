"""Boxes and masks in a text: against what the grammar says, in any order that a model could write."""

from __future__ import annotations

import json
import math
import random
import re
import shutil
import subprocess
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_token_texts import gemma_like

from pgfast.engine import Engine
from pgfast.locations import BINS, Located, Objects, box_in_pixels, format_locations, parse, parse_tokens
from pgfast.prompt import Tokenizer
from pgfast.server.page import FILES

CAT = "<loc0256><loc0128><loc0768><loc0896>"
DOG = "<loc0000><loc0512><loc0102><loc1023>"
MASK = "".join(f"<seg{code:03d}>" for code in range(16))
SOUP = ["<loc0000>", "<loc0007>", "<loc0512>", "<loc1023>", "<loc1024>", "<seg000>", "<seg127>", "<seg128>"]
SOUP += ["cat", " dog", "ein Käfer", ";", " ; ", " ", "\n", "<", "<loc12>", "<seg12>", "loc0001>", "\0", "猫", CAT, DOG + MASK]


class Pieces:
    """A tokenizer whose ids are places in a list of texts; `<eos>` has none."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = texts

    def location(self, id: int) -> str | None:
        text = self.texts[id]
        return text if re.fullmatch(r"<(loc\d{4}|seg\d{3})>", text) else None

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self.texts[id] for id in ids if self.texts[id] != "<eos>")


def tokens(*texts: str, logprobs: Sequence[float] | None = None) -> Objects:
    return parse_tokens(range(len(texts)), logprobs or [-0.5] * len(texts), Pieces(texts))


def plain(objects: Objects) -> list[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    return [(o.label, o.bins, o.codes) for o in objects.objects]


# ---- what is well formed


def test_several_objects_and_labels() -> None:
    found = parse(f"{CAT} cat ; {DOG} big dog ; {CAT}{MASK} cat")
    cat, dog = (256, 128, 768, 896), (0, 512, 102, 1023)
    assert plain(found) == [("cat", cat, ()), ("big dog", dog, ()), ("cat", cat, tuple(range(16)))]
    assert found.problems == ()
    assert all(o.score is None for o in found.objects)


def test_nothing_is_no_problem() -> None:
    assert parse("") == parse(" ; \n") == tokens() == tokens("<eos>") == Objects((), ())


@pytest.mark.parametrize(
    "text",
    [
        f"{CAT} cat ;",
        f"{CAT} cat ; ",
        f"\n{CAT}cat;",
        f"; {CAT} cat",
        f"{' '.join(CAT.split('>')[:-1])}".replace(" ", "> ") + "> cat",
    ],
)
def test_separators_and_spaces_in_any_number(text: str) -> None:
    assert plain(parse(text)) == [("cat", (256, 128, 768, 896), ())]
    assert parse(text).problems == ()


def test_pixels_are_shares_of_the_picture() -> None:
    """The example of Google's documentation: divide by 1024, multiply y by the height and x by the width."""
    assert box_in_pixels((256, 128, 768, 896), 800, 300) == (100, 75, 700, 225)
    assert box_in_pixels((0, 0, 1023, 1023), 1024, 2048) == (0, 0, 1023, 2046)
    assert box_in_pixels((0, 0, 1, 1), 1, 1) == (0, 0, 1 / 1024, 1 / 1024)


# ---- what is malformed


@pytest.mark.parametrize(
    ("text", "labels", "problem"),
    [
        ("<loc0001><loc0002><loc0003> cat", [], "object 1 ('cat') has 3 of 4 locations and was left out"),
        (f"{CAT} cat ; <loc0001><loc0002>", ["cat"], "object 2 has 2 of 4 locations and was left out"),
        (f"<loc0001> cat ; {DOG} dog", ["dog"], "object 1 ('cat') has 1 of 4 locations and was left out"),
        (
            "<loc0001><loc0002><loc1024><loc0003> cat",
            [],
            "object 1 ('cat') has location 1024 and was left out: the last one is 1023",
        ),
        (
            "<loc0768><loc0128><loc0256><loc0896> cat",
            ["cat"],
            "object 1 ('cat') has edges in the wrong order: they were swapped",
        ),
        (
            "<loc0768><loc0896><loc0256><loc0128> cat",
            ["cat"],
            "object 1 ('cat') has edges in the wrong order: they were swapped",
        ),
        ("<loc0256><loc0128><loc0256><loc0896> cat", [], "object 1 ('cat') has an empty box and was left out"),
        ("<loc0256><loc0128><loc0768><loc0128> cat", [], "object 1 ('cat') has an empty box and was left out"),
        (f"{CAT} ; {DOG} dog", ["", "dog"], "object 1 has no label"),
        (f"{CAT}{DOG} dog", ["", "dog"], "object 1 has no label"),
        (f"{DOG} dog ; {CAT}", ["dog", ""], "object 2 has no label"),
        (f"{DOG} dog ; cat", ["dog"], "text without a box: 'cat'"),
        (f"I see {DOG} dog", ["dog"], "text without a box: 'I see'"),
        ("a picture of a cat", [], "text without a box: 'a picture of a cat'"),
        (f"{DOG}<seg001><seg002> dog", ["dog"], "object 1 ('dog') has 2 of 16 segment codes: its box has no mask"),
        (f"{DOG}{MASK[:-8]} dog", ["dog"], "object 1 ('dog') has 15 of 16 segment codes: its box has no mask"),
        (f"{DOG}{MASK}<seg001> dog", ["dog"], "object 1 ('dog') has 17 of 16 segment codes: its box has no mask"),
        (f"{DOG}{MASK[:-8]}<seg200> dog", ["dog"], "object 1 ('dog') has segment code 200: its box has no mask"),
        (f"{MASK}{DOG} dog ; <seg001>", ["dog"], "17 segment codes do not follow a box"),
        ("x" * 50, [], f"text without a box: '{'x' * 40}...'"),
    ],
)
def test_what_is_malformed_is_mended_or_left_out_and_said(text: str, labels: list[str], problem: str) -> None:
    found = parse(text)
    assert [o.label for o in found.objects] == labels
    assert found.problems == (problem,)


def test_swapped_edges_give_the_same_box() -> None:
    right = parse(f"{CAT} cat").objects
    assert parse("<loc0768><loc0896><loc0256><loc0128> cat").objects == right


def test_problems_count_the_objects_of_the_text() -> None:
    found = parse(f"<loc0001> a ; {CAT} b ; <loc0001><loc0001><loc0001><loc0001> c ; {CAT}<seg001> d")
    assert [problem.split(" has")[0] for problem in found.problems] == ["object 1 ('a')", "object 3 ('c')", "object 4 ('d')"]


def test_a_label_that_the_caller_knows() -> None:
    """big_vision's RefCOCO transfers write box and mask only."""
    found = parse(f"{CAT}{MASK}", default_label="the cat on the left")
    assert [o.label for o in found.objects] == ["the cat on the left"]
    assert found.problems == ()
    assert [o.label for o in parse(f"{CAT} dog", default_label="cat").objects] == ["dog"]


# ---- tokens


def test_the_score_is_of_box_and_label() -> None:
    texts = [*re.findall("<.*?>", CAT), " big", " cat", " ;", " ", *re.findall("<.*?>", DOG + MASK), " dog", "<eos>"]
    logprobs = [-0.125 * place for place in range(len(texts))]
    cat, dog = tokens(*texts, logprobs=logprobs).objects
    assert (cat.label, dog.label, len(dog.codes)) == ("big cat", "dog", 16)
    assert cat.score == pytest.approx(math.exp(-0.125 * (0 + 1 + 2 + 3 + 4 + 5)))
    assert dog.score == pytest.approx(math.exp(-0.125 * (8 + 9 + 10 + 11 + 28)))  # neither codes nor <eos>


def test_a_token_with_the_end_of_a_label_and_the_separator_counts() -> None:
    boxes = re.findall("<.*?>", CAT)
    (found,) = tokens(*boxes, " c", "at; ", "<eos>").objects
    assert (found.label, found.score) == ("cat", pytest.approx(math.exp(-3)))
    (found,) = tokens(*boxes, "<eos>").objects
    assert (found.label, found.score) == ("", pytest.approx(math.exp(-2)))


def test_letters_that_look_like_a_location_are_a_label() -> None:
    boxes = re.findall("<.*?>", CAT)
    found = tokens(*boxes, " <loc", "0001>")
    assert [(o.label, o.bins) for o in found.objects] == [("<loc0001>", (256, 128, 768, 896))]


def test_the_tokenizer_of_a_bundle_says_what_a_location_is(demo: Engine) -> None:
    tokenizer = demo._tokenizer
    ids = tokenizer.encode_suffix(f"{CAT}{MASK} blue circle", locations=True)
    assert len(ids) == 4 + 16 + 2
    found = parse_tokens([*ids, demo.manifest.tokens.eos], [-0.25] * 22 + [-9.0], tokenizer)
    assert found == Objects((Located("blue circle", (256, 128, 768, 896), tuple(range(16)), math.exp(-1.5)),), ())
    assert [tokenizer.location(id) for id in ids[:5]] == [*re.findall("<.*?>", CAT), "<seg000>"]
    assert tokenizer.location(ids[-1]) is tokenizer.location(demo.manifest.tokens.eos) is None
    assert tokenizer.location(10**9) is tokenizer.location(-1) is None


def test_all_bytes_of_a_label_count() -> None:
    raw = gemma_like()
    raw.add_special_tokens([f"<loc{bin:04d}>" for bin in range(BINS)])
    tokenizer = Tokenizer.wrap(raw, bos_id=2)
    texts = [*re.findall("<.*?>", CAT), "\u2581", *(f"<0x{byte:02X}>" for byte in "猫".encode()), "<eos>"]
    ids = [raw.token_to_id(text) for text in texts]
    assert None not in ids
    (found,) = parse_tokens(ids, [-0.25] * len(ids), tokenizer).objects
    assert (found.label, found.score) == ("猫", pytest.approx(math.exp(-0.25 * 8)))
    (cut,) = parse_tokens(ids[:-2], [-0.25] * 7, tokenizer).objects  # cut off within a character
    assert cut.label == ""


# ---- properties

edges = st.tuples(st.integers(0, BINS - 1), st.integers(0, BINS - 1)).filter(lambda pair: pair[0] < pair[1])
labels = st.text(st.characters(exclude_characters=";<", exclude_categories=["Cs"]), max_size=20).map(str.strip)
codes = st.one_of(st.just(()), st.tuples(*[st.integers(0, 127)] * 16))
located = st.builds(
    lambda ys, xs, label, codes: Located(label, (ys[0], xs[0], ys[1], xs[1]), codes, None), edges, edges, labels, codes
)


@given(st.lists(located, max_size=8))
def test_objects_are_read_as_they_are_written(objects: list[Located]) -> None:
    text = format_locations(objects)
    found = parse(text)
    assert found.objects == tuple(objects)
    assert found.problems == tuple(f"object {i} has no label" for i, o in enumerate(objects, 1) if not o.label)
    pieces = re.findall(r"<loc\d{4}>|<seg\d{3}>|[^<]", text)  # a token per letter
    assert plain(tokens(*pieces)) == plain(found)
    assert tokens(*pieces).problems == found.problems


def check_any(found: Objects, markers: int) -> None:
    assert 4 * len(found.objects) <= markers
    for o in found.objects:
        for width, height in ((1, 1), (1, 10000), (640, 480)):
            x0, y0, x1, y1 = box_in_pixels(o.bins, width, height)
            assert 0 <= x0 < x1 < width
            assert 0 <= y0 < y1 < height
        assert len(o.codes) in (0, 16)
        assert all(0 <= code < 128 for code in o.codes)
        assert o.label == o.label.strip()
        assert ";" not in o.label


@given(st.lists(st.one_of(st.sampled_from(SOUP), st.text(max_size=5))))
def test_any_text_is_read(parts: list[str]) -> None:
    text = "".join(parts)
    check_any(parse(text), text.count("<loc"))


WHOLE = [part for part in SOUP if part not in (CAT, DOG + MASK, "loc0001>")] + ["<eos>"]  # none that join to a marker


@given(st.lists(st.tuples(st.sampled_from(WHOLE), st.floats(-50, 0))))
def test_any_tokens_are_read_like_their_text(soup: list[tuple[str, float]]) -> None:
    texts = [text for text, _ in soup]
    found = tokens(*texts, logprobs=[logprob for _, logprob in soup])
    check_any(found, len(texts))
    assert all(o.score is not None and 0 < o.score <= 1 for o in found.objects)
    joined = "".join(text for text in texts if text != "<eos>")
    assert plain(found) == plain(parse(joined))
    assert found.problems == parse(joined).problems


# ---- the page


def test_the_page_reads_the_same_boxes() -> None:
    if shutil.which("node") is None:
        pytest.skip("node is not installed")
    draw = random.Random(0)
    usual = [part for part in SOUP if part != "\0"]
    texts = ["".join(draw.choices([*usual, *SOUP[:4] * 8], k=draw.randrange(40))) for _ in range(500)]
    texts += [
        f"{CAT} x < y ; {DOG}",
        "<loc0001><loc0002><loc0001><loc0009> flat",
        f"{CAT} a{DOG}b",
        "<loc0768><loc0896><loc0256><loc0128> cat",
    ]
    script = f"""
        import {{ parseBoxes }} from {json.dumps((FILES / "boxes.js").as_uri())};
        import {{ readFileSync }} from "node:fs";
        const values = ({{ label, top, left, bottom, right }}) => [label, top, left, bottom, right];
        console.log(JSON.stringify(JSON.parse(readFileSync(0)).map((text) => parseBoxes(text).map(values))));"""
    command = ["node", "--input-type=module", "-e", script]
    done = subprocess.run(command, input=json.dumps(texts), capture_output=True, text=True, check=True)
    expected = [[[o.label or "unnamed", *(bin / 1024 for bin in o.bins)] for o in parse(text).objects] for text in texts]
    assert json.loads(done.stdout) == expected
    assert sum(map(len, expected)) > 300
