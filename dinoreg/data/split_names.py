"""What people call the parts of a data set that are learnt from, chosen by and tested on: of folders and of tables."""

import re

_WORDS = {
    "train": "train|training|trn|tr|trainval|trainvalid|learn|learning|fit",
    "val": "val|valid|validation|validate|dev|devel|development",
    "test": "test|testing|tst|eval|evaluation|holdout|heldout",
}
_THING = "images?|imgs?|data|pictures?|photos?"
_FORM = re.compile(
    rf"(?:{_THING})?(?:{'|'.join(f'(?P<{split}>{words})' for split, words in _WORDS.items())})"
    rf"(?:sets?|datasets?|splits?|folder|dir|{_THING})?"
)
_YEAR = re.compile(r"(?<!\d)(?:19|20)\d\d(?!\d)")
_BETWEEN = re.compile(r"[\s_.\-]+")
_BESIDE = re.compile(r"un(?:labell?ed|sup(?:ervised)?|annotated)|samples?|extras?|all|misc|others?|pretrain.*|.*masks?")


def split_of(name: str) -> str | None:
    """ "train", "val" or "test" for a usual name of one in any case: "Training", "val2017", "test_set"; else None."""
    form = _FORM.fullmatch(_BETWEEN.sub("", _YEAR.sub("", name.strip().lower())))
    return form.lastgroup if form else None


def lies_beside_splits(name: str) -> bool:
    """Whether a folder of this name, that is no split, is sooner one beside splits than a class: "unlabeled"."""
    words = [word for word in _BETWEEN.split(name.lower()) if word]
    return _BESIDE.fullmatch("".join(words)) is not None or any(split_of(word) for word in words)
