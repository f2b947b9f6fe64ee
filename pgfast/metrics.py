"""The accuracy of VQA, as the official program computes it (GT-Vision-Lab/VQA, vqaEval.py), quirks included.

Copies of that program differ from it in small ways, so every quirk that changes a score is named here, and a test holds it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal, get_args

from pgfast.errors import InputError

Mode = Literal["official", "always-normalise", "simple"]
"""How an answer is scored: `vqa_accuracy` says what each means."""

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_DIGIT_COMMA_DIGIT = re.compile(r"\d,\d")
# the original's look-behind is misspelled and never fails, so only the character that follows counts
_PERIOD = re.compile(r"\.(?!\d)")
_MOST_PERIODS = 32
"""The original passes `re.UNICODE`, which is 32, where `sub` takes the number of replacements."""

_NUMBERS = {"none": "0"} | {
    word: str(number)
    for number, word in enumerate(["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"])
}
_ARTICLES = {"a", "an", "the"}
# as they stand in the original: keys with a capital never match, since texts are lower-case by then, one is the wrong way round
# (somebody'd) and two change nothing (let's, she's)
_CONTRACTIONS = dict(
    re.findall(
        r"(\S+)=(\S+)",
        """
    aint=ain't arent=aren't cant=can't couldve=could've couldnt=couldn't couldn'tve=couldn't've couldnt've=couldn't've
    didnt=didn't doesnt=doesn't dont=don't hadnt=hadn't hadnt've=hadn't've hadn'tve=hadn't've hasnt=hasn't havent=haven't
    hed=he'd hed've=he'd've he'dve=he'd've hes=he's howd=how'd howll=how'll hows=how's Id've=I'd've I'dve=I'd've Im=I'm
    Ive=I've isnt=isn't itd=it'd itd've=it'd've it'dve=it'd've itll=it'll let's=let's maam=ma'am mightnt=mightn't
    mightnt've=mightn't've mightn'tve=mightn't've mightve=might've mustnt=mustn't mustve=must've neednt=needn't notve=not've
    oclock=o'clock oughtnt=oughtn't ow's'at='ow's'at 'ows'at='ow's'at 'ow'sat='ow's'at shant=shan't shed've=she'd've
    she'dve=she'd've she's=she's shouldve=should've shouldnt=shouldn't shouldnt've=shouldn't've shouldn'tve=shouldn't've
    somebody'd=somebodyd somebodyd've=somebody'd've somebody'dve=somebody'd've somebodyll=somebody'll somebodys=somebody's
    someoned=someone'd someoned've=someone'd've someone'dve=someone'd've someonell=someone'll someones=someone's
    somethingd=something'd somethingd've=something'd've something'dve=something'd've somethingll=something'll thats=that's
    thered=there'd thered've=there'd've there'dve=there'd've therere=there're theres=there's theyd=they'd theyd've=they'd've
    they'dve=they'd've theyll=they'll theyre=they're theyve=they've twas='twas wasnt=wasn't wed've=we'd've we'dve=we'd've
    weve=we've werent=weren't whatll=what'll whatre=what're whats=what's whatve=what've whens=when's whered=where'd
    wheres=where's whereve=where've whod=who'd whod've=who'd've who'dve=who'd've wholl=who'll whos=who's whove=who've
    whyll=why'll whyre=why're whys=why's wont=won't wouldve=would've wouldnt=wouldn't wouldnt've=wouldn't've
    wouldn'tve=wouldn't've yall=y'all yall'll=y'all'll y'allll=y'all'll yall'd've=y'all'd've y'alld've=y'all'd've
    y'all'dve=y'all'd've youd=you'd youd've=you'd've you'dve=you'd've youll=you'll youre=you're youve=you've
    """,
    )
)


def vqa_accuracy(prediction: str, answers: Sequence[str], mode: Mode = "official") -> float:
    """Score one prediction against the answers of several people.

    For each person, the number of *other* people who gave the predicted answer is divided by three, at most 1; the score is
    the mean. With ten answers and k of them equal to the prediction: 0, 0.3, 0.6, 0.9 for k = 0 to 3, and 1 from 4 on.

    Args:
        prediction: What the model answered.
        answers: What people answered, ten in VQAv2. A single answer counts as ten equal ones: the rule needs several people,
            and one alone has no others. With two or three answers the rule cannot give 1.
        mode: `official`: prediction and answers are normalised only if the answers differ; where all agree, `Yes` or `yes.`
            is not `yes`. `always-normalise`: normalised in any case, as many newer programs do. `simple`: always normalised,
            and the score is min(k / 3, 1) with nobody left out.

    Returns:
        0 to 1.

    Raises:
        InputError: There are no answers, or no such mode.
    """
    if mode not in get_args(Mode):
        raise InputError(f"the mode is {mode!r}: choose one of {', '.join(get_args(Mode))}")
    if not answers:
        raise InputError("there is no reference answer: a score needs at least one")
    predicted, wanted = _strip(prediction), [_strip(answer) for answer in answers]
    if mode != "official" or len(set(wanted)) > 1:
        predicted, wanted = normalize_answer(predicted), [normalize_answer(answer) for answer in wanted]
    if len(wanted) == 1:
        wanted *= 10
    people, matches = len(wanted), wanted.count(predicted)
    if mode == "simple":
        return min(matches, 3) / 3
    # those who match see one match fewer among the others; in thirds, so that no order of summing can matter
    thirds = matches * min(matches - 1, 3) + (people - matches) * min(matches, 3)
    return thirds / (3 * people)


def normalize_answer(text: str) -> str:
    """Bring an answer into the form in which the official program compares answers.

    Punctuation goes, then articles; number words up to ten become digits (`none` becomes 0), and contractions get their
    apostrophe back.
    """
    return _words(_punctuation(_strip(text)))


def _strip(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _punctuation(text: str) -> str:
    out = text
    for mark in _PUNCTUATION:
        # beside a space anywhere, or with 1,000 anywhere in the text, the mark joins what it stood between
        joins = f"{mark} " in text or f" {mark}" in text or _DIGIT_COMMA_DIGIT.search(text) is not None
        out = out.replace(mark, "" if joins else " ")
    return _PERIOD.sub("", out, count=_MOST_PERIODS)


def _words(text: str) -> str:
    words = [_NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)
