"""The scores of public benchmarks: what of an answer counts, and how the counts become one number.

    pope       F1, the mean of three: absent things drawn at random, popular, often met together
    gqa        the answer is exactly right, but for a full stop and capitals
    textvqa    normalised, it agrees with ten people's: min(1, how many of the others / 3)
    vqav2      the same
    scienceqa  the letter is right, of the questions with a picture ("total": of all)
    mme        sum over ten tasks of accuracy + accuracy+ (both questions of a picture right), each
               of 100; "cognition": over the other four
    mmbench    the letter is right however its options are turned ("accuracy": of all turns). The
               official server also understands longer answers; here only a letter counts.
    seed       the answer is the letter, of the questions about pictures

The first number of each is the one in papers. A score takes [(question, answer), ...], where a
question has `truth` and `group` (benchmarks.py), and gives {name: number}, in percent. How an
answer is read is each benchmark's own scorer's, to its oddities, which are marked; numbers are only
worth something beside those of others.
"""

import collections
import re
from statistics import fmean

OPTIONS = tuple("ABCDE")
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")


# ----------------------------------------------------------------------- what an answer says


def says_no(text):
    """POPE: whether the first sentence says no. Everything else is a yes, even nothing at all."""
    return not {"No", "not", "no"}.isdisjoint(text.split(".")[0].replace(",", "").split(" "))


def yes_or_no(text):
    """MME: "yes" or "no", whichever the first four letters hold, or None."""
    start = text.lower()[:4]
    return next((word for word in ("yes", "no") if word in start), None)


def letter(text):
    """ScienceQA: the option that is named, "B" or "B. ..." or "The answer is B.", or None."""
    if text in OPTIONS or text[:1] in OPTIONS and text[1:3] == ". ":
        return text[0]
    named = re.findall(r"The answer is ([A-Z]).", text)  # any character is a full stop here
    return named[0] if len(named) == 1 else None


NUMBERS = {"none": "0"} | {
    word: str(n)
    for n, word in enumerate("zero one two three four five six seven eight nine ten".split())
}
CONTRACTIONS = (
    {  # couldnt've and couldn'tve: each word with any one of its apostrophes forgotten
        word[:i] + word[i + 1 :]: word
        for word in """
        ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've
        hasn't haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't
        mightn't've might've mustn't must've needn't not've o'clock oughtn't shan't she'd've
        should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've
        someone'll someone's something'd something'd've something'll that's there'd there'd've
        there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't
        what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's
        who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've
        you'd you'd've you'll you're you've""".split()
        for i in range(len(word))
        if word[i] == "'"
    }
    | {"somebody'd": "somebodyd", "'ows'at": "'ow's'at"}
)  # the wrong way round in its table, too


def normalised(text):
    """VQA: small letters, digits for numbers, no articles, no punctuation but within numbers, and
    contractions with their apostrophes."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = before = text.replace("\n", " ").replace("\t", " ").strip()
    for mark in ';/[]"{}()=+\\_-><@`!':
        beside_a_blank = f"{mark} " in before or f" {mark}" in before
        text = text.replace(mark, "" if beside_a_blank else " ")
    text = re.sub(r"\.(?!\d)", "", text, count=32)  # a flag, whose value is 32, stood in its place
    words = (NUMBERS.get(word, word) for word in text.split())
    return " ".join(
        CONTRACTIONS.get(word, word) for word in words if word not in "a an the".split()
    )


def agreement(text, answers):
    """VQA: how well an answer agrees with people's; each of them is left out in turn, and three of
    the others are enough."""
    text = normalised(text)
    n, same = len(answers), sum(normalised(answer) == text for answer in answers)
    return (same * min(1, (same - 1) / 3) + (n - same) * min(1, same / 3)) / n


# ----------------------------------------------------------------------- from answers to a score


def percent(values):
    return round(100 * fmean(values), 2)


def grouped(pairs):
    groups = collections.defaultdict(list)
    for group, value in pairs:
        groups[group].append(value)
    return groups


def each(right, name="accuracy"):
    """The score that is the mean of `right(answer, truth)`, and that of each group."""

    def score(answers):
        values = [(question.group, right(text, question.truth)) for question, text in answers]
        groups = grouped(values)
        apart = groups if len(groups) > 1 else {}
        return {name: percent(value for _, value in values)} | {
            group: percent(values) for group, values in apart.items()
        }

    return score


def score_pope(answers):
    kinds = grouped((q.group, (q.truth != "no", not says_no(text))) for q, text in answers)
    table = {}
    for kind, pairs in kinds.items():
        count = collections.Counter(pairs)  # of (is there, is said to be there)
        found, wrong, missed = count[True, True], count[False, True], count[True, False]
        table[kind] = {
            "f1": percent([2 * found / max(1, 2 * found + wrong + missed)]),
            "accuracy": percent(truth == said for truth, said in pairs),
            "precision": percent([found / max(1, found + wrong)]),
            "recall": percent([found / max(1, found + missed)]),
            "yes": percent(said for _, said in pairs),
        }
    means = {name: round(fmean(row[name] for row in table.values()), 2) for name in table[kind]}
    return means | table


def score_mme(answers):
    pictures = grouped((q.group, yes_or_no(text) == q.truth) for q, text in answers)
    tasks = grouped((task, fmean(right) + all(right)) for (task, _), right in pictures.items())
    table = {task: percent(values) for task, values in tasks.items()}
    cognition = sum(table[task] for task in table if task in COGNITION)
    perception = sum(table.values()) - cognition
    return {"perception": round(perception, 2), "cognition": round(cognition, 2)} | table


def score_scienceqa(answers):
    table = each(lambda text, truth: letter(text) == truth, "total")(answers)
    return {"picture": table.get("picture", table["total"])} | table


def score_mmbench(answers):
    turns = grouped((q.group, letter(text) == q.truth) for q, text in answers)
    every = [right for rights in turns.values() for right in rights]
    return {"circular": percent(map(all, turns.values())), "accuracy": percent(every)}


SCORES = {
    "pope": score_pope,
    "gqa": each(lambda text, truth: text.rstrip(".").lower() == truth),
    "textvqa": each(agreement),
    "vqav2": each(agreement),
    "scienceqa": score_scienceqa,
    "mme": score_mme,
    "mmbench": score_mmbench,
    "mmbench_cn": score_mmbench,
    "seed": each(lambda text, truth: text == truth),
}
