"""Arithmetic: word problems of 2 to 8 steps with written-out chains of thought, made from an index.

A story has holders (people, or places such as shelves) whose amounts change, are compared, pooled, sold
and shared; every step is one calculation, and every calculation is needed for the answer. The formula
of the answer, stripped of the story, decides by its hash whether a problem is of the train or the test
split, so no test problem is a training problem under other names.

Every random number is a digit of SHAKE-128 of (split, index): the text of a problem depends on this file
alone, not on Python's version or the machine. A change of a sentence, of a number's range or of the
order of draws changes the problems, and with them what past runs and trained models mean.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b, shake_128
from operator import add, floordiv, mul, sub
from typing import Literal

MIN_STEPS, MAX_STEPS = 2, 8
MAX_VALUE = 999  # of every number in a story
TEST_SHARE = 16  # one formula in so many is of the test split

Split = Literal["train", "test"]


@dataclass(frozen=True)
class ArithmeticProblem:
    """A word problem.

    Args:
        question: The story and what is asked, one paragraph.
        solution: One line with one calculation a step, then `#### answer`.
        answer: The number, at least 2 as every number of the story.
        steps: How many calculations it takes.
        formula: What is calculated, operands of + and * sorted, so that neither names nor wording nor
            the order of telling matter: `((12+7)*2)`.
    """

    question: str
    solution: str
    answer: int
    steps: int
    formula: str


def problem(index: int, split: Split = "train", steps: int | None = None) -> ArithmeticProblem:
    """Make one problem; a pure function of its arguments.

    Args:
        index: Which one, from 0.
        split: "train" or "test"; no formula is in both.
        steps: 2 to 8; None draws it, each as likely as the others.

    Returns:
        The problem. Two indices may lead to the same one, though seldom.

    Raises:
        ValueError: An argument out of range.
    """
    if index < 0:
        raise ValueError(f"problem: index expected at least 0, got {index}")
    if split not in ("train", "test"):
        raise ValueError(f"problem: split expected train or test, got {split!r}")
    if steps is not None and not MIN_STEPS <= steps <= MAX_STEPS:
        raise ValueError(f"problem: steps expected {MIN_STEPS} to {MAX_STEPS}, got {steps}")
    draws = _Draws(f"arithmetic 1/{split}/{index}")
    # Drawn before the first try: else the lengths whose stories fail more often would be rarer.
    drawn = MIN_STEPS + draws.below(MAX_STEPS - MIN_STEPS + 1)
    steps = drawn if steps is None else steps
    while True:
        story = _Story(draws, steps)
        if story.plan() and split_of(story.formulas[-1]) == split:
            return ArithmeticProblem(
                story.tell(), story.work_out(), story.answer, steps, story.formulas[-1]
            )


def split_of(formula: str) -> Split:
    """The split that all problems of a formula belong to."""
    digest = blake2b(formula.encode(), digest_size=8, key=b"reasoners arithmetic").digest()
    return "train" if int.from_bytes(digest, "big") % TEST_SHARE else "test"


class _Draws:
    """Random numbers: the mixed-radix digits of the blocks SHAKE-128(key/0), SHAKE-128(key/1), ..."""

    def __init__(self, key: str) -> None:
        self._key, self._block, self._rest = key, 0, 0

    def below(self, n: int) -> int:
        """A number of 0 to n - 1; n up to a thousand or so, else the bias is no longer nothing."""
        if self._rest < 1 << 64:
            digest = shake_128(f"{self._key}/{self._block}".encode()).digest(128)
            self._rest, self._block = int.from_bytes(digest, "big"), self._block + 1
        self._rest, digit = divmod(self._rest, n)
        return digit

    def pick(self, options):
        """One of a sequence."""
        return options[self.below(len(options))]

    def number(self, low: int, high: int) -> int:
        """A number of low to high, small ones oftener than large ones; high is at least low."""
        ceiling = max(low, min(high, self.pick(_CEILINGS)))
        return low + self.below(ceiling - low + 1)


_CEILINGS = (20, 50, 99, 99, 99, 99, 250, 600)


@dataclass(frozen=True)
class _Scene:
    """What may be told of one kind of things.

    In a template {A} is the holder it is about, {B} another one, {n} and {k} numbers, {things} the
    things, {verb} what holders do with them, {s} and {es} the endings of the holder's verbs, {has}
    and {does} those verbs, {his} its possessive, {part} "half", "a third" and the like, {calc} the
    calculation.

    Args:
        things: Names of the things, plural; a story picks one.
        verb: "has" or what stands for it, singular and plural.
        begin: A holder has n.
        groups: A holder has k groups of n.
        gain, loss: n more, n less.
        gain_groups, loss_groups: k times n more, less.
        part: A part of them goes.
        move: n go from A to B.
        pool: What two holders have comes together; people are both {A}, places are {A} and {B}.
        pooled: The place it comes to; None where it stays with the people.
        share: What ends in a division by n: sentence, question, line of the solution.
        gap: What ends in a subtraction from n: sentence, question, line of the solution.
        become: Sentence that turns all things into others, "*" or "/" by n, the scene of those.
        facts: Irrelevant facts: sentence, lowest and highest n. These and the holders are those of
            the scene a story begins in.
        holders: Places; empty for people.
        start: Lowest and highest amount to begin with.
        limit: Highest amount.
        when: The question's last words.
    """

    things: tuple[str, ...]
    verb: tuple[str, str] = ("has", "have")
    begin: tuple[str, ...] = ("{A} {verb} {n} {things}.",)
    groups: tuple[str, ...] = ()
    gain: tuple[str, ...] = ()
    loss: tuple[str, ...] = ()
    gain_groups: tuple[str, ...] = ()
    loss_groups: tuple[str, ...] = ()
    part: tuple[str, ...] = ()
    move: tuple[str, ...] = ()
    pool: tuple[str, ...] = ()
    pooled: str | None = None
    share: tuple[tuple[str, str, str], ...] = ()
    gap: tuple[tuple[str, str, str], ...] = ()
    become: tuple[tuple[str, str, str], ...] = ()
    facts: tuple[tuple[str, int, int], ...] = (
        ("{A} is {n} years old.", 8, 15),
        ("{A} lives {n} minutes from school.", 3, 40),
        ("{A} has {n} cousins.", 2, 12),
    )
    holders: tuple[str, ...] = ()
    start: tuple[int, int] = (5, 200)
    limit: int = MAX_VALUE
    when: str = "now"


_GIRLS = (
    "Mia", "Zoe", "Lena", "Anna", "Ruth", "Nora", "Emma", "Ella", "Iris", "Clara", "Sara", "Lily",
    "Eva", "Rosa",
)  # fmt: skip
_BOYS = (
    "Ben", "Tom", "Omar", "Paul", "Leo", "Max", "Noah", "Adam", "Ivan", "Hugo", "Jack", "Sam",
    "Finn", "Luis",
)  # fmt: skip
_PEOPLE = (*_GIRLS, *_BOYS)

_PARTS = {2: "half", 3: "a third", 4: "a quarter", 5: "a fifth", 6: "a sixth"}
_TIMES = {2: "twice", 3: "three times", 4: "four times", 5: "five times", 6: "six times"}

_NEED = (
    "{A} want{s} to have {n} {things}.",
    "How many more {things} {does} {A} need?",
    "{A} need{s} {calc} more {things}.",
)
_FRIENDS = (
    "{A} share{s} {his} {things} equally among {n} friends.",
    "How many {things} does each friend get?",
    "Each friend gets {calc} {things}.",
)
_SELL = ("{A} sell{s} all {his} {things} for {n} dollars each.", "*", "savings")

_SCENES: dict[str, _Scene] = {
    "collection": _Scene(
        things=("marbles", "stickers", "shells", "stamps", "coins", "buttons", "cards"),
        begin=("{A} has {n} {things}.", "{A} owns {n} {things}."),
        groups=(
            "{A} has {k} boxes with {n} {things} each.",
            "{A} fills {k} jars with {n} {things} each.",
        ),
        gain=(
            "{A} find{s} {n} more {things}.",
            "{A} get{s} {n} more {things} as a present.",
            "{A} win{s} {n} {things} in a game.",
        ),
        loss=(
            "{A} lose{s} {n} {things}.",
            "{A} give{s} {n} {things} to a cousin.",
            "{A} trade{s} {n} {things} for a toy car.",
        ),
        gain_groups=(
            "{A} buy{s} {k} bags with {n} {things} each.",
            "{A} get{s} {n} {things} from each of {k} friends.",
        ),
        loss_groups=("{A} give{s} {n} {things} to each of {k} friends.",),
        part=(
            "{A} give{s} {part} of {his} {things} away.",
            "{A} lose{s} {part} of {his} {things} on a trip.",
        ),
        move=("{A} give{s} {n} {things} to {B}.", "{A} lose{s} {n} {things} to {B} in a game."),
        pool=("{A} put their {things} together.",),
        share=(
            _FRIENDS,
            (
                "{A} put{s} {his} {things} into {n} drawers, the same number in each.",
                "How many {things} are in each drawer?",
                "Each drawer holds {calc} {things}.",
            ),
        ),
        gap=(_NEED,),
        become=(_SELL, ("{A} pack{s} all {his} {things} into boxes of {n}.", "/", "boxes")),
    ),
    "bakery": _Scene(
        things=("cookies", "muffins", "rolls", "buns", "waffles", "pretzels"),
        begin=("{A} bakes {n} {things}.",),
        groups=("{A} bakes {k} trays of {n} {things}.",),
        gain=("{A} bake{s} {n} more {things}.", "{A} get{s} {n} {things} from a neighbor."),
        loss=(
            "{A} sell{s} {n} {things}.",
            "{A} take{s} {n} {things} to school.",
            "{A} burn{s} {n} of the {things} and throw{s} them away.",
        ),
        gain_groups=("{A} bake{s} {k} more trays of {n} {things}.",),
        loss_groups=(
            "{A} fill{s} {k} bags with {n} {things} each and give{s} them away.",
            "{A} give{s} {n} {things} to each of {k} guests.",
        ),
        part=("{A} sell{s} {part} of {his} {things}.", "{A} freeze{s} {part} of {his} {things}."),
        move=("{A} give{s} {n} {things} to {B}.",),
        pool=("{A} put their {things} on one table.",),
        share=(
            _FRIENDS,
            (
                "{A} put{s} {his} {things} on {n} plates, the same number on each.",
                "How many {things} are on each plate?",
                "On each plate there are {calc} {things}.",
            ),
        ),
        gap=(
            (
                "{A} need{s} {n} {things} for a party.",
                "How many {things} {does} {A} still have to bake?",
                "{A} still {verb} to bake {calc} {things}.",
            ),
        ),
        become=(_SELL, ("{A} pack{s} all {his} {things} into boxes of {n}.", "/", "boxes")),
        facts=(
            ("{A} is {n} years old.", 8, 60),
            ("The oven is {n} years old.", 2, 20),
            ("{A} wakes up at {n} o'clock.", 4, 9),
        ),
    ),
    "garden": _Scene(
        things=("tomatoes", "carrots", "apples", "pears", "onions", "melons", "plums"),
        begin=("{A} picks {n} {things}.", "{A} harvests {n} {things}."),
        groups=("{A} fills {k} baskets with {n} {things} each.",),
        gain=("{A} pick{s} {n} more {things}.", "{A} buy{s} {n} more {things}."),
        loss=(
            "{A} cook{s} {n} of the {things}.",
            "{A} give{s} {n} {things} to a neighbor.",
            "{A} throw{s} away {n} bad {things}.",
        ),
        gain_groups=("{A} pick{s} {n} {things} on each of the next {k} days.",),
        loss_groups=("{A} use{s} {n} {things} for each of {k} salads.",),
        part=(
            "{A} sell{s} {part} of {his} {things}.",
            "{A} give{s} {part} of {his} {things} away.",
        ),
        move=("{A} give{s} {n} {things} to {B}.",),
        pool=("{A} bring their {things} to the market together.",),
        share=(
            _FRIENDS,
            (
                "{A} use{s} all {his} {things} for {n} soups, the same number for each.",
                "How many {things} are in each soup?",
                "In each soup there are {calc} {things}.",
            ),
        ),
        gap=(_NEED,),
        become=(_SELL, ("{A} pack{s} all {his} {things} into crates of {n}.", "/", "crates")),
        facts=(
            ("The garden is {n} meters long.", 8, 60),
            ("It rains on {n} days of the month.", 2, 20),
            ("{A} is {n} years old.", 8, 60),
        ),
    ),
    "shop": _Scene(
        things=("notebooks", "lamps", "pencils", "candles", "mugs", "kites", "hats"),
        begin=("{A} has a small shop with {n} {things}.", "{A} has {n} {things} in a shop."),
        groups=("{A} opens a shop with {k} shelves of {n} {things}.",),
        gain=("{A} order{s} {n} more {things}.", "{A} make{s} {n} more {things}."),
        loss=(
            "{A} sell{s} {n} {things}.",
            "{A} send{s} {n} {things} back.",
            "{A} give{s} {n} {things} to a school.",
        ),
        gain_groups=("{A} order{s} {k} boxes of {n} {things}.",),
        loss_groups=(
            "{A} sell{s} {n} {things} to each of {k} customers.",
            "{A} sell{s} {n} {things} a day for {k} days.",
        ),
        part=("{A} sell{s} {part} of {his} {things} in a week.",),
        move=("{A} send{s} {n} {things} to {B}.",),
        pool=("{A} put their {things} into one shop.",),
        share=(
            (
                "{A} sell{s} all {his} {things} in {n} days, the same number each day.",
                "How many {things} {does} {A} sell each day?",
                "{A} sell{s} {calc} {things} each day.",
            ),
        ),
        gap=(_NEED,),
        become=(_SELL, ("{A} pack{s} all {his} {things} into boxes of {n}.", "/", "boxes")),
        facts=(
            ("The shop is open {n} hours a day.", 5, 12),
            ("The shop is {n} years old.", 2, 80),
            ("A street near the shop has {n} trees.", 5, 60),
        ),
    ),
    "savings": _Scene(
        things=("dollars",),
        begin=("{A} has {n} dollars.", "{A} has saved {n} dollars."),
        groups=(
            "{A} saves {n} dollars a week for {k} weeks.",
            "{A} earns {n} dollars for each of {k} lawns.",
        ),
        gain=(
            "{A} earn{s} {n} dollars.",
            "{A} get{s} {n} dollars from an aunt.",
            "{A} find{s} {n} dollars in an old coat.",
        ),
        loss=(
            "{A} spend{s} {n} dollars on a book.",
            "{A} spend{s} {n} dollars on shoes.",
            "{A} pay{s} {n} dollars for a ticket.",
        ),
        gain_groups=("{A} wash{es} {k} cars for {n} dollars each.",),
        loss_groups=(
            "{A} buy{s} {k} games for {n} dollars each.",
            "{A} buy{s} {k} plants at {n} dollars each.",
        ),
        part=("{A} spend{s} {part} of {his} money.", "{A} give{s} {part} of {his} money away."),
        move=("{A} give{s} {n} dollars to {B}.", "{A} pay{s} {n} dollars to {B}."),
        pool=("{A} put their money together.",),
        share=(
            (
                "{A} spend{s} all {his} money on tickets for {n} dollars each.",
                "How many tickets {does} {A} buy?",
                "{A} buy{s} {calc} tickets.",
            ),
            (
                "{A} share{s} {his} money equally among {n} friends.",
                "How many dollars does each friend get?",
                "Each friend gets {calc} dollars.",
            ),
        ),
        gap=(
            (
                "{A} want{s} to buy a bike for {n} dollars.",
                "How many more dollars {does} {A} need?",
                "{A} need{s} {calc} more dollars.",
            ),
        ),
    ),
    "reading": _Scene(
        things=("pages",),
        verb=("reads", "read"),
        groups=("{A} reads {n} pages a day for {k} days.",),
        begin=("{A} reads {n} pages.", "{A} reads {n} pages in a week."),
        gain=("{A} read{s} {n} more pages.", "on Sunday {A} read{s} another {n} pages."),
        gain_groups=(
            "{A} read{s} {n} pages on each of the next {k} evenings.",
            "{A} read{s} {k} more chapters of {n} pages.",
        ),
        gap=(
            (
                "The book of {A} has {n} pages.",
                "How many pages of the book are left?",
                "There are {calc} pages left.",
            ),
        ),
        become=(("For every page {A} get{s} {n} points in a contest.", "*", "game"),),
        facts=(
            ("The library has {n} tables.", 4, 40),
            ("{A} is {n} years old.", 8, 60),
            ("The book costs {n} dollars.", 5, 30),
        ),
        when="in all",
    ),
    "distance": _Scene(
        things=("kilometers",),
        verb=("rides", "ride"),
        begin=("{A} rides {n} kilometers on a bike.", "{A} rides {n} kilometers to a lake."),
        groups=("{A} rides {n} kilometers a day for {k} days.",),
        gain=(
            "{A} ride{s} {n} more kilometers.",
            "after a break {A} ride{s} another {n} kilometers.",
        ),
        gain_groups=("{A} ride{s} {n} kilometers on each of the next {k} days.",),
        share=(
            (
                "{A} ride{s} {n} kilometers an hour.",
                "How many hours {does} {A} ride?",
                "{A} ride{s} for {calc} hours.",
            ),
        ),
        gap=(
            (
                "The whole tour of {A} is {n} kilometers long.",
                "How many kilometers are left?",
                "There are {calc} kilometers left.",
            ),
        ),
        become=(("For every kilometer {A} get{s} {n} dollars from a sponsor.", "*", "savings"),),
        facts=(
            ("The bike of {A} has {n} gears.", 3, 27),
            ("A hill on the way is {n} meters high.", 60, 600),
            ("{A} drinks {n} cups of water.", 2, 9),
        ),
        when="in all",
    ),
    "game": _Scene(
        things=("points",),
        begin=("{A} has {n} points in a game.", "{A} scores {n} points."),
        groups=(
            "{A} scores {n} points in each of {k} rounds.",
            "{A} hits {k} targets for {n} points each.",
        ),
        gain=("{A} win{s} {n} points.", "{A} score{s} {n} more points."),
        loss=("{A} lose{s} {n} points.", "{A} pay{s} {n} points for a clue."),
        gain_groups=("{A} win{s} {n} points in each of the next {k} rounds.",),
        loss_groups=("{A} break{s} {k} rules and lose{s} {n} points each time.",),
        part=("{A} lose{s} {part} of {his} points.",),
        move=("{A} lose{s} {n} points to {B}.",),
        pool=("{A} form a team and put their points together.",),
        share=(
            (
                "{A} trade{s} all {his} points for prizes of {n} points each.",
                "How many prizes {does} {A} get?",
                "{A} get{s} {calc} prizes.",
            ),
        ),
        gap=(
            (
                "The winner needs {n} points.",
                "How many more points {does} {A} need to win?",
                "{A} need{s} {calc} more points.",
            ),
        ),
        facts=(
            ("The game lasts {n} minutes.", 10, 90),
            ("{A} is {n} years old.", 8, 40),
            ("There are {n} players in the room.", 5, 30),
        ),
    ),
    "crafts": _Scene(
        things=("paper birds", "masks", "bracelets", "beads", "paper stars", "dolls"),
        verb=("makes", "make"),
        begin=("{A} makes {n} {things}.",),
        groups=(
            "{A} makes {n} {things} an hour for {k} hours.",
            "{A} makes {k} sets of {n} {things}.",
        ),
        gain=("{A} make{s} {n} more {things}.", "in the evening {A} make{s} another {n} {things}."),
        gain_groups=("{A} make{s} {n} {things} on each of the next {k} days.",),
        share=(
            (
                "{A} give{s} all {his} {things} to {n} friends, the same number to each.",
                "How many {things} does each friend get?",
                "Each friend gets {calc} {things}.",
            ),
        ),
        gap=(
            (
                "{A} want{s} to make {n} {things}.",
                "How many more {things} {does} {A} have to make?",
                "{A} still {has} to make {calc} {things}.",
            ),
        ),
        become=(
            ("{A} sell{s} all {his} {things} for {n} dollars each.", "*", "savings"),
            ("{A} pack{s} all {his} {things} into boxes of {n}.", "/", "boxes"),
        ),
        facts=(
            ("{A} is {n} years old.", 8, 60),
            ("The table of {A} is {n} years old.", 2, 60),
            ("{A} has {n} colors of paint.", 3, 24),
        ),
        when="in all",
    ),
    "bus": _Scene(
        things=("passengers",),
        verb=("carries", "carry"),
        groups=("{A} has {k} rows with {n} {things} each.",),
        gain=("at the next stop {n} passengers get on {A}.", "{A} pick{s} up {n} more passengers."),
        loss=("at the next stop {n} passengers get off {A}.", "{n} passengers leave {A}."),
        gain_groups=("at each of the next {k} stops {n} passengers get on {A}.",),
        loss_groups=("at each of the next {k} stops {n} passengers get off {A}.",),
        part=("at the station {part} of the passengers leave {A}.",),
        move=("{n} passengers change from {A} to {B}.",),
        pool=("All passengers of {A} and {B} change to an empty train.",),
        pooled="the train",
        share=(
            (
                "The passengers of {A} sit in {n} rows, the same number in each.",
                "How many passengers are in each row?",
                "In each row there are {calc} passengers.",
            ),
        ),
        gap=(
            (
                "There are {n} seats in {A}.",
                "How many seats are free?",
                "There are {calc} free seats.",
            ),
        ),
        become=(("Every passenger of {A} pays {n} dollars.", "*", "earnings"),),
        facts=(
            ("{A} is {n} meters long.", 8, 60),
            ("The driver of {A} is {n} years old.", 25, 60),
            ("{A} stops for {n} minutes.", 2, 20),
        ),
        holders=("the red bus", "the blue bus", "the green bus", "the old bus"),
        start=(8, 90),
        limit=500,
    ),
    "library": _Scene(
        things=("books", "comics", "atlases"),
        verb=("holds", "hold"),
        groups=("{A} holds {k} rows of {n} {things}.",),
        gain=("{n} more {things} are put on {A}.", "a teacher brings back {n} {things} to {A}."),
        loss=("a class borrows {n} {things} from {A}.", "{n} {things} are taken from {A}."),
        gain_groups=("{k} boxes with {n} {things} each are unpacked onto {A}.",),
        loss_groups=("each of {k} children borrows {n} {things} from {A}.",),
        part=("in spring {part} of the {things} on {A} are sold.",),
        move=("{n} {things} are moved from {A} to {B}.",),
        pool=("All {things} from {A} and {B} are moved into a new cabinet.",),
        pooled="the cabinet",
        share=(
            (
                "All {things} from {A} are packed into {n} boxes, the same number in each.",
                "How many {things} are in each box?",
                "Each box holds {calc} {things}.",
            ),
        ),
        gap=(
            (
                "{A} can hold {n} {things} in all.",
                "How many more {things} can be put on {A}?",
                "There is room for {calc} more {things}.",
            ),
        ),
        facts=(
            ("The library is open {n} hours a day.", 5, 12),
            ("{A} is {n} years old.", 2, 90),
            ("There are {n} chairs in the room.", 6, 60),
        ),
        holders=("the top shelf", "the middle shelf", "the low shelf", "the long shelf"),
    ),
    "parking": _Scene(
        things=("cars",),
        verb=("holds", "hold"),
        groups=("{A} holds {k} rows of {n} cars.",),
        gain=("in the morning {n} cars drive into {A}.", "{n} more cars come to {A}."),
        loss=("{n} cars leave {A}.", "at noon {n} cars drive out of {A}."),
        gain_groups=("in each of the next {k} hours {n} cars come to {A}.",),
        loss_groups=("in each of the next {k} hours {n} cars leave {A}.",),
        part=("in the evening {part} of the cars leave {A}.",),
        move=("{n} cars are moved from {A} to {B}.",),
        pool=("All cars from {A} and {B} are moved to an empty garage.",),
        pooled="the garage",
        gap=(
            (
                "{A} has {n} places in all.",
                "How many places are free?",
                "There are {calc} free places.",
            ),
        ),
        become=(("Every driver at {A} pays {n} dollars.", "*", "earnings"),),
        facts=(
            ("{A} is {n} meters wide.", 20, 90),
            ("There are {n} lamps around {A}.", 4, 40),
            ("A guard walks around {A} in {n} minutes.", 3, 20),
        ),
        holders=("the north lot", "the south lot", "the east lot", "the west lot"),
    ),
    "farm": _Scene(
        things=("hens", "ducks", "geese"),
        groups=("{A} has {k} pens with {n} {things} each.",),
        gain=("the farmer buys {n} more {things} for {A}.", "{n} young {things} hatch in {A}."),
        loss=("the farmer sells {n} {things} from {A}.", "{n} {things} run away from {A}."),
        gain_groups=("the farmer brings {k} cages with {n} {things} each to {A}.",),
        loss_groups=("the farmer sells {n} {things} from {A} to each of {k} neighbors.",),
        part=("the farmer sells {part} of the {things} in {A}.",),
        move=("the farmer moves {n} {things} from {A} to {B}.",),
        pool=("The farmer brings all {things} from {A} and {B} into an empty shed.",),
        pooled="the shed",
        share=(
            (
                "The {things} in {A} live in {n} pens, the same number in each.",
                "How many {things} are in each pen?",
                "In each pen there are {calc} {things}.",
            ),
        ),
        become=(("In one week each bird in {A} lays {n} eggs.", "*", "eggs"),),
        facts=(
            ("{A} is {n} meters long.", 8, 60),
            ("The farmer has {n} cows.", 3, 40),
            ("A bag of corn weighs {n} kilograms.", 10, 50),
        ),
        holders=("the red barn", "the white barn", "the stone barn", "the small barn"),
    ),
    "aquarium": _Scene(
        things=("fish", "crabs", "shrimps", "snails"),
        groups=("{A} has {k} groups of {n} {things}.",),
        gain=("a diver brings {n} more {things} to {A}.", "{n} more {things} come into {A}."),
        loss=("a zoo buys {n} {things} from {A}.", "{n} {things} are taken out of {A}."),
        gain_groups=("{k} bags with {n} {things} each are emptied into {A}.",),
        loss_groups=("each of {k} schools gets {n} {things} from {A}.",),
        part=("a zoo buys {part} of the {things} in {A}.",),
        move=("{n} {things} are moved from {A} to {B}.",),
        pool=("All {things} from {A} and {B} are put into a new pool.",),
        pooled="the new pool",
        share=(
            (
                "All {things} from {A} are put into {n} bowls, the same number in each.",
                "How many {things} are in each bowl?",
                "Each bowl has {calc} {things}.",
            ),
        ),
        gap=(
            (
                "{A} can hold {n} {things} in all.",
                "How many more {things} can live in {A}?",
                "There is room for {calc} more {things}.",
            ),
        ),
        facts=(
            ("{A} is {n} years old.", 2, 20),
            ("The water in {A} is {n} degrees warm.", 15, 28),
            ("A ticket for the aquarium costs {n} dollars.", 4, 30),
        ),
        holders=("the first tank", "the second tank", "the third tank", "the round tank"),
    ),
    "water": _Scene(
        things=("liters",),
        verb=("holds", "hold"),
        begin=("{A} holds {n} liters of water.",),
        groups=("{A} gets {k} buckets of {n} liters.",),
        gain=("rain adds {n} liters to {A}.", "{n} liters are poured into {A}."),
        loss=("{n} liters leak from {A}.", "a gardener takes {n} liters from {A}."),
        gain_groups=("a pump adds {n} liters a minute to {A} for {k} minutes.",),
        loss_groups=("a gardener takes {k} cans of {n} liters from {A}.",),
        part=("{part} of the water in {A} is used up.",),
        move=("{n} liters are pumped from {A} to {B}.",),
        pool=("All water from {A} and {B} is pumped into a new pond.",),
        pooled="the new pond",
        share=(
            (
                "A pump takes {n} liters a minute from {A}.",
                "After how many minutes is {A} empty?",
                "It takes {calc} minutes.",
            ),
            (
                "The water from {A} fills {n} barrels equally.",
                "How many liters are in each barrel?",
                "Each barrel holds {calc} liters.",
            ),
        ),
        gap=(
            (
                "{A} can hold {n} liters in all.",
                "How many more liters can be added to {A}?",
                "There is room for {calc} more liters.",
            ),
        ),
        facts=(
            ("{A} is {n} years old.", 2, 50),
            ("The path to {A} is {n} meters long.", 5, 90),
            ("There are {n} roses in the garden.", 5, 60),
        ),
        holders=("the steel tank", "the green tank", "the tall tank", "the old tank"),
        start=(20, 400),
    ),
    "trees": _Scene(
        things=("birds", "sparrows", "crows"),
        groups=("{A} has {k} branches with {n} {things} each.",),
        gain=("{n} more {things} fly to {A}.", "{n} {things} land on {A}."),
        loss=("a noise scares {n} {things} away from {A}.", "{n} {things} fly away from {A}."),
        gain_groups=("{k} flocks of {n} {things} land on {A}.",),
        loss_groups=("{k} flocks of {n} {things} leave {A}.",),
        part=("{part} of the {things} on {A} fly away.",),
        move=("{n} {things} fly from {A} to {B}.",),
        pool=("All {things} from {A} and {B} fly to the roof.",),
        pooled="the roof",
        share=(
            (
                "The {things} on {A} fly away in {n} flocks of the same size.",
                "How many {things} are in each flock?",
                "In each flock there are {calc} {things}.",
            ),
        ),
        facts=(
            ("{A} is {n} meters high.", 6, 40),
            ("{A} is {n} years old.", 10, 200),
            ("{n} children play under the trees.", 3, 20),
        ),
        holders=("the oak", "the maple", "the birch", "the pine"),
    ),
    "harbor": _Scene(
        things=("crates", "barrels", "sacks"),
        verb=("carries", "carry"),
        groups=("{A} carries {k} stacks of {n} {things}.",),
        gain=("{n} more {things} are loaded onto {A}.", "workers bring {n} {things} to {A}."),
        loss=("{n} {things} are unloaded from {A}.", "a storm throws {n} {things} off {A}."),
        gain_groups=("{k} trucks bring {n} {things} each to {A}.",),
        loss_groups=("{k} trucks take {n} {things} each from {A}.",),
        part=("in the first port {part} of the {things} are unloaded from {A}.",),
        move=("workers move {n} {things} from {A} to {B}.",),
        pool=("All {things} from {A} and {B} are loaded onto an empty ship.",),
        pooled="the ship",
        share=(
            (
                "All {things} from {A} go to {n} shops, the same number to each.",
                "How many {things} does each shop get?",
                "Each shop gets {calc} {things}.",
            ),
        ),
        gap=(
            (
                "{A} can carry {n} {things} in all.",
                "How many more {things} can be loaded onto {A}?",
                "There is room for {calc} more {things}.",
            ),
        ),
        become=(("Each of the {things} on {A} weighs {n} kilograms.", "*", "load"),),
        facts=(
            ("{A} is {n} meters long.", 8, 90),
            ("{A} has a crew of {n} sailors.", 3, 30),
            ("The captain of {A} is {n} years old.", 25, 70),
        ),
        holders=("the red boat", "the white boat", "the black boat", "the new boat"),
    ),
    "boxes": _Scene(
        things=("boxes",),
        gain=("{A} fill{s} {n} more boxes.", "{A} get{s} {n} more boxes from a friend."),
        loss=("{A} give{s} {n} boxes away.", "{A} sell{s} {n} boxes."),
        move=("{A} give{s} {n} boxes to {B}.",),
        pool=("{A} put their boxes together.",),
        become=(("{A} sell{s} all {his} boxes for {n} dollars each.", "*", "savings"),),
    ),
    "crates": _Scene(
        things=("crates",),
        gain=("{A} fill{s} {n} more crates.", "{A} get{s} {n} more crates from a friend."),
        loss=("{A} give{s} {n} crates away.", "{A} sell{s} {n} crates."),
        move=("{A} give{s} {n} crates to {B}.",),
        pool=("{A} put their crates together.",),
        become=(("{A} sell{s} all {his} crates for {n} dollars each.", "*", "savings"),),
    ),
    "earnings": _Scene(
        things=("dollars",),
        verb=("earns", "earn"),
        gain=("{A} earn{s} {n} more dollars.", "later {A} earn{s} another {n} dollars."),
        when="in all",
    ),
    "eggs": _Scene(
        things=("eggs",),
        verb=("gives", "give"),
        gain=("in the next days {A} give{s} {n} more eggs.",),
        share=(
            (
                "The eggs from {A} are packed into cartons of {n}.",
                "How many cartons are filled?",
                "They fill {calc} cartons.",
            ),
        ),
        when="in all",
    ),
    "load": _Scene(
        things=("kilograms",),
        verb=("carries", "carry"),
        gain=("{n} kilograms of fuel are loaded onto {A}.",),
        loss=("{n} kilograms of goods are unloaded from {A}.",),
    ),
}
# The others are what a scene's things turn into.
_STORIES = tuple(
    name for name in _SCENES if name not in ("boxes", "crates", "earnings", "eggs", "load")
)

_OPERATORS = {"+": add, "-": sub, "*": mul, "/": floordiv}  # every division is exact

_STATE = "{A} {verb} {calc} {things}."
_ASIDE = "That is {calc} {things}."
_MULTIPLE = "{times} as many as {B} is {calc} {things}."
_TOTAL = "{A} {verb} {calc} {things} together."
_DIFFERENCE = "{A} {verb} {calc} more {things} than {B}."

_MORE = "{A} {verb} {n} more {things} than {B}."
_FEWER = "{A} {verb} {n} fewer {things} than {B}."
_AS_MANY = "{A} {verb} {times} as many {things} as {B}."
_MORE_THAN_TIMES = "{A} {verb} {n} more than {times} as many {things} as {B}."

_HOW_MANY = "How many {things} {does} {A} {have} {when}?"
_HOW_MANY_TOGETHER = "How many {things} do {A} {have} together?"
_HOW_MANY_MORE = "How many more {things} {does} {A} {have} than {B}?"

# What the sentence of an event may open with.
_OPENERS = ("", "", "", "", "then ", "later ", "after that ")


@dataclass(frozen=True, slots=True)
class _Amount:
    """A number, and the formula it comes from."""

    value: int
    formula: str


def _given(n: int) -> _Amount:
    return _Amount(n, str(n))


def _formula(a: _Amount, operator: str, b: _Amount) -> str:
    left, right = a.formula, b.formula
    if operator in "+*" and right < left:
        left, right = right, left
    return f"({left}{operator}{right})"


class _Holder:
    """Who has an amount; `is_open` while no step has used it."""

    __slots__ = ("amount", "is_open", "members", "name", "plural", "reference", "words")

    def __init__(self, members: tuple[str, ...], people: bool) -> None:
        *most, last = self.members = members
        self.plural = bool(most)
        self.name = f"{', '.join(most)} and {last}" if most else last
        # Without the word, "than Mia and Ben" could mean each of them.
        self.reference = f"{self.name} together" if most else self.name
        self.amount, self.is_open = _given(0), False
        if most:
            pronoun, his = "they", "their"
        elif people:
            pronoun, his = ("he", "his") if last in _BOYS else ("she", "her")
        else:
            pronoun, his = "it", "its"
        s, es, has, does = ("", "", "have", "do") if most else ("s", "es", "has", "does")
        self.words = {
            "A": self.name, "pronoun": pronoun, "his": his, "s": s, "es": es, "has": has,
            "does": does,
        }  # fmt: skip


class _Story:
    """One try at a problem: `plan` chooses what happens, `tell` and `work_out` put it into words.

    What is open at the end is the answer, and it must be one amount: an event happens only if the
    steps left after it are enough to bring all that is open together.
    """

    def __init__(self, draws: _Draws, steps: int) -> None:
        self.draws = draws
        self.left = steps
        self.home = self.scene = _SCENES[draws.pick(_STORIES)]
        self.things = draws.pick(self.home.things)
        self.live: list[_Holder] = []  # those that later events may be about
        self.used: set[str] = set()
        self.sentences: list[tuple[str, _Holder, dict, bool]] = []
        self.lines: list[tuple[str, dict]] = []
        self.formulas: list[str] = []
        self.answer = 0

    def plan(self) -> bool:
        """Choose every step; False for a story that comes to a dead end."""
        self.begin(with_groups=self.draws.below(3) == 0)
        has_fact = False
        failures = 0
        while self.left:
            to_merge = sum(holder.is_open for holder in self.live) - 1
            events = _MERGES if to_merge == self.left else _ENDINGS if self.left == 1 else _EVENTS
            if not self.draws.pick(events)(self):
                failures += 1
                if failures == 40:
                    return False
            elif self.left and not has_fact and not self.draws.below(8):
                self.digress()
                has_fact = True
        return True

    def tell(self) -> str:
        """The question."""
        told, subject = [], None
        for template, holder, words, is_event in self.sentences:
            leads = template.startswith("{A}")
            if leads and holder is subject and self.draws.below(4):
                words["A"] = words["pronoun"]
            sentence = template.format_map(words)
            if leads and is_event:
                sentence = self.draws.pick(_OPENERS) + sentence
            told.append(sentence[0].upper() + sentence[1:])
            # After a sentence about two, a pronoun could mean either.
            subject = holder if leads and "B" not in words else None
        return " ".join(told)

    def work_out(self) -> str:
        """The solution."""
        lines = (template.format_map(words) for template, words in self.lines)
        return "\n".join([*(line[0].upper() + line[1:] for line in lines), f"#### {self.answer}"])

    # What events are made of.

    def fits(self, steps: int, touched: Sequence[_Holder], results: int = 1) -> bool:
        """Whether an event of so many steps leaves enough of them.

        It uses or changes the amounts of the holders `touched`, and has so many results.
        """
        others = sum(holder.is_open for holder in self.live if holder not in touched)
        return others + results - 1 <= self.left - steps

    def is_last(self, touched: Sequence[_Holder], steps: int = 1) -> bool:
        """Whether so many steps are left, and no other amount is open."""
        return self.left == steps and self.fits(steps, touched)

    def words(self, holder: _Holder, words: dict) -> dict:
        """All that a template may name."""
        verb, have = self.scene.verb
        words["verb"] = have if holder.plural else verb
        words["have"] = have
        words["things"] = self.things
        words["when"] = self.scene.when
        words.update(holder.words)
        return words

    def say(self, template: str, holder: _Holder, is_event: bool = False, **words) -> None:
        """Add a sentence to the question."""
        self.sentences.append((template, holder, self.words(holder, words), is_event))

    def calculate(
        self, template: str, holder: _Holder, a: _Amount, operator: str, b: _Amount, **words
    ) -> _Amount:
        """Add a line to the solution, and return what comes out."""
        value = _OPERATORS[operator](a.value, b.value)
        words["calc"] = f"{a.value} {operator} {b.value} = {value}"
        self.lines.append((template, self.words(holder, words)))
        self.left -= 1
        self.answer = value
        self.formulas.append(_formula(a, operator, b))
        return _Amount(value, self.formulas[-1])

    def add(self, template: str, holder: _Holder, pair: Sequence[_Holder]) -> _Amount:
        """Add a line for the sum of two amounts, which are used by that."""
        first, second = pair
        first.is_open = second.is_open = False
        return self.calculate(template, holder, first.amount, "+", second.amount)

    def settle(self, holder: _Holder, amount: _Amount) -> bool:
        """Give a holder the result of an event, and ask for it if it is the last. Always True."""
        holder.amount, holder.is_open = amount, True
        if holder not in self.live:
            self.live.append(holder)
        if not self.left:
            self.say(_HOW_MANY, holder)
        return True

    def some_holder(self) -> _Holder:
        """A holder, the newest oftener."""
        return self.live[-1] if self.draws.below(2) else self.draws.pick(self.live)

    def some_pair(self) -> tuple[_Holder, ...]:
        """Two different holders; none where there is one alone."""
        num_live = len(self.live)
        if num_live < 2:
            return ()
        first = self.draws.below(num_live)
        second = (first + 1 + self.draws.below(num_live - 1)) % num_live
        return self.live[first], self.live[second]

    def newcomer(self) -> _Holder | None:
        """A holder that the story has not had; None after four."""
        if len(self.used) >= 4:
            return None
        names = self.home.holders or _PEOPLE
        while (name := self.draws.pick(names)) in self.used:
            pass
        self.used.add(name)
        return _Holder((name,), people=not self.home.holders)

    def together(self, *holders: _Holder) -> _Holder:
        """Several holders as one subject."""
        members = [member for holder in holders for member in holder.members]
        return _Holder(tuple(members), people=not self.home.holders)

    def can_add(self, pair: Sequence[_Holder]) -> bool:
        """Whether the sum of two amounts is not too large, and not known already."""
        a, b = (holder.amount for holder in pair)
        return a.value + b.value <= self.scene.limit and _formula(a, "+", b) not in self.formulas

    def some_groups(self, room: int) -> tuple[int, int] | None:
        """k groups of n, `room` at most; None where there is too little."""
        k = 2 + self.draws.below(8)
        largest = min(60, room // k)
        return (k, self.draws.number(2, largest)) if largest > 1 else None

    def some_divisor(self, value: int, divisors) -> int | None:
        """One that divides the value, and not down to 1; None where there is none."""
        found = [n for n in divisors if value % n == 0 and value > n]
        return self.draws.pick(found) if found else None

    def digress(self) -> None:
        """Say something that does not matter."""
        if not self.draws.below(3) and (stranger := self.newcomer()):
            n = self.draws.number(*self.scene.start)
            self.say(self.draws.pick(self.scene.begin), stranger, n=n)
            return
        single = [holder for holder in self.live if not holder.plural]
        if single:
            template, low, high = self.draws.pick(self.home.facts)
            n = low + self.draws.below(high - low + 1)
            self.say(template, self.draws.pick(single), n=n)

    # Events: each adds what is said and calculated and returns True, or changes nothing that the
    # story has told and returns False.

    def begin(self, with_groups: bool) -> bool:
        """A holder with a given amount, or with k n."""
        with_groups = with_groups and bool(self.scene.groups)
        if not self.fits(with_groups, ()) or not (holder := self.newcomer()):
            return False
        if with_groups:
            k, n = self.some_groups(min(400, self.scene.limit))
            self.say(self.draws.pick(self.scene.groups), holder, k=k, n=n)
            amount = self.calculate(_STATE, holder, _given(k), "*", _given(n))
        else:
            n = self.draws.number(*self.scene.start)
            self.say(self.draws.pick(self.scene.begin), holder, n=n)
            amount = _given(n)
        return self.settle(holder, amount)

    def begin_another(self) -> bool:
        """A holder that has nothing to do with the others yet."""
        return self.begin(with_groups=self.draws.below(3) == 0)

    def gain(self) -> bool:
        """X + n."""
        holder = self.some_holder()
        room = self.scene.limit - holder.amount.value
        return self.change(holder, self.scene.gain, "+", room)

    def lose(self) -> bool:
        """X - n."""
        holder = self.some_holder()
        return self.change(holder, self.scene.loss, "-", holder.amount.value - 2)

    def change(self, holder: _Holder, templates: tuple[str, ...], operator: str, room: int) -> bool:
        """X + n or X - n, n at most `room`."""
        if not templates or room < 2 or not self.fits(1, (holder,)):
            return False
        n = self.draws.number(2, room)
        self.say(self.draws.pick(templates), holder, True, n=n)
        amount = self.calculate(_STATE, holder, holder.amount, operator, _given(n))
        return self.settle(holder, amount)

    def gain_groups(self) -> bool:
        """X + k n."""
        holder = self.some_holder()
        room = min(400, self.scene.limit - holder.amount.value)
        return self.change_groups(holder, self.scene.gain_groups, "+", room)

    def lose_groups(self) -> bool:
        """X - k n."""
        holder = self.some_holder()
        return self.change_groups(holder, self.scene.loss_groups, "-", holder.amount.value - 2)

    def change_groups(
        self, holder: _Holder, templates: tuple[str, ...], operator: str, room: int
    ) -> bool:
        """X + k n or X - k n, k n at most `room`."""
        if not templates or not self.fits(2, (holder,)) or not (groups := self.some_groups(room)):
            return False
        k, n = groups
        self.say(self.draws.pick(templates), holder, True, k=k, n=n)
        change = self.calculate(_ASIDE, holder, _given(k), "*", _given(n))
        amount = self.calculate(_STATE, holder, holder.amount, operator, change)
        return self.settle(holder, amount)

    def lose_part(self) -> bool:
        """X / 2, or X - X / n."""
        holder = self.some_holder()
        n = self.some_divisor(holder.amount.value, _PARTS)
        if not self.scene.part or n is None or not self.fits(1 if n == 2 else 2, (holder,)):
            return False
        self.say(self.draws.pick(self.scene.part), holder, True, part=_PARTS[n])
        if n == 2:
            amount = self.calculate(_STATE, holder, holder.amount, "/", _given(2))
        else:
            change = self.calculate(_ASIDE, holder, holder.amount, "/", _given(n))
            amount = self.calculate(_STATE, holder, holder.amount, "-", change)
        return self.settle(holder, amount)

    def relate(self) -> bool:
        """Y from X, see `compare`."""
        other = self.some_holder()
        if not self.fits(1, (other,)) or not (holder := self.newcomer()):
            return False
        other.is_open = False
        return self.compare(holder, other.amount, other.reference)

    def relate_to_sum(self) -> bool:
        """Z from X + Y, see `compare`."""
        pair = self.some_pair()
        if not pair or not self.fits(2, pair) or not self.can_add(pair):
            return False
        if not (holder := self.newcomer()):
            return False
        both = self.together(*pair)
        return self.compare(holder, self.add(_TOTAL, both, pair), both.reference)

    def compare(self, holder: _Holder, amount: _Amount, other: str) -> bool:
        """X + n, X - n, n X or X / n for a newcomer. Always True: one of them always can be."""
        value, limit = amount.value, self.scene.limit
        most = min(max(_TIMES), limit // value)
        divisor = self.some_divisor(value, _PARTS)
        operators = "+" * (limit - value > 1) + "-" * (value > 3) + "*" * (most > 1)
        operator = self.draws.pick(operators + "/" * (divisor is not None))
        if operator == "*":
            n = 2 + self.draws.below(most - 1)
            self.say(_AS_MANY, holder, times=_TIMES[n], B=other)
            return self.settle(holder, self.calculate(_STATE, holder, _given(n), "*", amount))
        if operator == "/":
            n = divisor
            self.say(_AS_MANY, holder, times=_PARTS[n], B=other)
        elif operator == "+":
            n = self.draws.number(2, limit - value)
            self.say(_MORE, holder, n=n, B=other)
        else:
            n = self.draws.number(2, value - 2)
            self.say(_FEWER, holder, n=n, B=other)
        return self.settle(holder, self.calculate(_STATE, holder, amount, operator, _given(n)))

    def relate_to_multiple(self) -> bool:
        """Y = k X + n."""
        other = self.some_holder()
        amount = other.amount
        most = min(max(_TIMES), (self.scene.limit - 2) // amount.value)
        if most < 2 or not self.fits(2, (other,)):
            return False
        k = 2 + self.draws.below(most - 1)
        if _formula(_given(k), "*", amount) in self.formulas or not (holder := self.newcomer()):
            return False
        other.is_open = False
        n = self.draws.number(2, self.scene.limit - k * amount.value)
        words = {"times": _TIMES[k], "B": other.reference}
        self.say(_MORE_THAN_TIMES, holder, n=n, **words)
        multiple = self.calculate(_MULTIPLE, holder, _given(k), "*", amount, **words)
        return self.settle(holder, self.calculate(_STATE, holder, multiple, "+", _given(n)))

    def move(self) -> bool:
        """X - n and Y + n; or one of them, and the other holder is not heard of again."""
        pair = self.some_pair()
        if not pair or not self.scene.move:
            return False
        giver, taker = pair
        room = min(giver.amount.value - 2, self.scene.limit - taker.amount.value)
        silent = self.draws.pick((giver, taker))
        if silent.is_open or self.draws.below(2):
            silent = None
        num_results = 1 if silent else 2
        if room < 2 or not self.fits(num_results, pair, num_results):
            return False
        n = self.draws.number(2, room)
        self.say(self.draws.pick(self.scene.move), giver, True, n=n, B=taker.name)
        for holder, operator in ((giver, "-"), (taker, "+")):
            if holder is silent:
                self.live.remove(holder)
            else:
                amount = self.calculate(_STATE, holder, holder.amount, operator, _given(n))
                self.settle(holder, amount)
        return True

    def pool(self) -> bool:
        """X + Y, and no X and Y any more."""
        pair, place = self.some_pair(), self.scene.pooled
        if not pair or not self.scene.pool or self.left < 2 or place in self.used:
            return False
        if not self.fits(1, pair) or not self.can_add(pair):
            return False
        template = self.draws.pick(self.scene.pool)
        if place:
            self.used.add(place)
            self.say(template, pair[0], B=pair[1].name)
            holder, clause = _Holder((place,), people=False), _STATE
        else:
            holder, clause = self.together(*pair), _TOTAL
            self.say(template, holder)
        amount = self.add(clause, holder, pair)
        self.live = [other for other in self.live if other not in pair]
        return self.settle(holder, amount)

    def turn(self) -> bool:
        """n X or X / n of other things; the other holders are not heard of again."""
        holder = self.some_holder()
        if not self.scene.become or any(h.is_open for h in self.live if h is not holder):
            return False
        template, operator, scene = self.draws.pick(self.scene.become)
        value = holder.amount.value
        n = self.some_divisor(value, range(2, 13))
        if operator == "*":
            most = min(9, MAX_VALUE // value)
            n = 2 + self.draws.below(most - 1) if most > 1 else None
        if n is None:
            return False
        self.say(template, holder, True, n=n)
        self.live, self.scene = [holder], _SCENES[scene]
        (self.things,) = self.scene.things
        amount = self.calculate(_STATE, holder, holder.amount, operator, _given(n))
        return self.settle(holder, amount)

    # Endings: events with a question of their own.

    def ask_sum(self) -> bool:
        """X + Y."""
        pair = self.some_pair()
        if not pair or not self.is_last(pair) or not self.can_add(pair):
            return False
        both = self.together(*pair)
        self.add(_TOTAL, both, pair)
        self.say(_HOW_MANY_TOGETHER, both)
        return True

    def ask_sum_of_three(self) -> bool:
        """X + Y + Z."""
        if len(self.live) != 3 or not self.is_last(self.live, 2):
            return False
        *pair, third = self.live
        if sum(holder.amount.value for holder in self.live) > self.scene.limit:
            return False
        if not self.can_add(pair):
            return False
        both, everyone = self.together(*pair), self.together(*self.live)
        both.amount = self.add(_TOTAL, both, pair)
        self.add(_TOTAL, everyone, (both, third))
        self.say(_HOW_MANY_TOGETHER, everyone)
        return True

    def ask_difference(self) -> bool:
        """X - Y."""
        pair = self.some_pair()
        if not pair or not self.is_last(pair):
            return False
        less, more = sorted(pair, key=lambda holder: holder.amount.value)
        if more.amount.value - less.amount.value < 2:
            return False
        self.calculate(_DIFFERENCE, more, more.amount, "-", less.amount, B=less.reference)
        self.say(_HOW_MANY_MORE, more, B=less.reference)
        return True

    def ask_share(self) -> bool:
        """X / n."""
        holder = self.some_holder()
        if not self.scene.share or not self.is_last((holder,)):
            return False
        n = self.some_divisor(holder.amount.value, range(2, 13))
        if n is None:
            return False
        sentence, question, clause = self.draws.pick(self.scene.share)
        self.say(sentence, holder, n=n)
        self.calculate(clause, holder, holder.amount, "/", _given(n))
        self.say(question, holder)
        return True

    def ask_gap(self) -> bool:
        """n - X."""
        holder = self.some_holder()
        value = holder.amount.value
        room = min(300, MAX_VALUE - value)
        if not self.scene.gap or room < 2 or not self.is_last((holder,)):
            return False
        sentence, question, clause = self.draws.pick(self.scene.gap)
        n = value + self.draws.number(2, room)
        self.say(sentence, holder, n=n)
        self.calculate(clause, holder, _given(n), "-", holder.amount)
        self.say(question, holder)
        return True


# How often each event is tried while there are steps left, for the last step, and when all steps
# left must bring together what is open. Many tries fail.
_EVENTS = (
    *[_Story.gain, _Story.lose, _Story.gain_groups, _Story.lose_groups, _Story.lose_part] * 2,
    *[_Story.relate, _Story.relate_to_multiple, _Story.move, _Story.turn] * 3,
    *[_Story.begin_another, _Story.relate_to_sum, _Story.pool] * 2,
    _Story.ask_sum_of_three,
)
_ENDINGS = (
    *[_Story.gain, _Story.lose, _Story.lose_part, _Story.move, _Story.turn],
    *[_Story.relate, _Story.ask_share, _Story.ask_gap] * 2,
    *[_Story.ask_sum, _Story.ask_difference] * 3,
)
_MERGES = (
    *[_Story.ask_sum, _Story.ask_difference, _Story.ask_sum_of_three],
    *[_Story.pool, _Story.relate_to_sum],
)
