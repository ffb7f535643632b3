"""The scores of public benchmarks: how to read an answer, and how to count the right ones.

    pope       F1, mean of three sets: absent objects drawn at random, popular ones, and those often
               seen together with the present ones
    gqa        the answer is exactly right, ignoring a final full stop and capitals
    textvqa    agreement of the normalized answer with ten humans: min(1, matches / 3), leaving
               each human out in turn
    vqav2      agreement, with the official scorer's own normalization
    scienceqa  the letter is right, for questions with a picture ("total": for all)
    mme        sum over ten tasks of accuracy + accuracy+ (both questions of a picture right), 100
               each; "cognition": over the other four
    mmbench    the letter is right for every rotation of the options ("accuracy": of all rotations).
               The official toolkit also finds an option's text; here only a letter counts
    seed       the answer is the letter, for questions about pictures

The first number of each is the one in papers. A score maps [(question, answer), ...], where a
question has `truth` and `group` (benchmarks.py), to {name: percent}. Answers are read as by each
benchmark's own scorer, oddities included; comments mark the oddities.
"""

import collections
import re
from statistics import fmean

OPTIONS = tuple("ABCDE")
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")


# ----------------------------------------------------------------------- reading an answer


def says_no(text):
    """POPE: whether the first sentence says no. Everything else is a yes, even an empty answer."""
    return not {"No", "not", "no"}.isdisjoint(text.split(".")[0].replace(",", "").split(" "))


def yes_or_no(text):
    """MME: "yes" or "no", whichever is in the first four letters, or None."""
    start = text.lower()[:4]
    return next((word for word in ("yes", "no") if word in start), None)


def letter(text):
    """ScienceQA: the option named by "B", "B. ..." or "The answer is B.", or None."""
    if text in OPTIONS or text[:1] in OPTIONS and text[1:3] == ". ":
        return text[0]
    named = re.findall(r"The answer is ([A-Z]).", text)  # the unescaped dot matches any character
    return named[0] if len(named) == 1 else None


def only_letter(text):
    """MMBench: the option named by "A.", "(A)", "A: cat" or "It is A", as the official toolkit
    reads it without a judge, or None. An article is read as a letter, too: "A dog" names A."""
    words = re.sub(r"[.()\[\],:;!*#{}]", " ", text).split()
    named = [option for option in OPTIONS if option in words]
    return named[0] if len(named) == 1 else None


NUMBERS = {"none": "0"} | {
    word: str(n)
    for n, word in enumerate("zero one two three four five six seven eight nine ten".split())
}
CONTRACTIONS = {  # couldnt've and couldn'tve: each word with one of its apostrophes left out
    word[:i] + word[i + 1 :]: word
    for word in """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've
    hasn't haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't
    mightn't've might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've
    should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've
    someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't
    what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's
    who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've
    you'd you'd've you'll you're you've""".split()
    for i in range(len(word))
    if word[i] == "'"
}
CONTRACTIONS["somebody'd"] = "somebodyd"  # the wrong way round in the original, too


def vqa_words(text):
    """VQA's official scorer: digits for number words, no articles, punctuation only within numbers,
    and contractions with their apostrophes."""
    before, thousands = text, re.search(r"\d,\d", text)
    for mark in ';/[]"{}()=+\\_-><@`,?!':
        joins = thousands or f"{mark} " in before or f" {mark}" in before
        text = text.replace(mark, "" if joins else " ")
    text = re.sub(r"\.(?!\d)", "", text, count=32)  # the original passes a flag, 32, as the count
    words = (NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(
        CONTRACTIONS.get(word, word) for word in words if word not in "a an the".split()
    )


def normalize(text):
    """TextVQA: `vqa_words`, after capitals, commas and question marks are removed and the
    possessive is split off: "cat 's"."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    return vqa_words(text.replace("\n", " ").replace("\t", " ").strip())


def share_of(text, answers):
    """Agreement with human answers: each human is left out in turn, and three equal answers among
    the others are enough."""
    n, same = len(answers), answers.count(text)
    return (same * min(1, (same - 1) / 3) + (n - same) * min(1, same / 3)) / n


def agreement(text, answers):
    """TextVQA: both sides are normalized."""
    return share_of(normalize(text), [normalize(answer) for answer in answers])


def vqav2_agreement(text, answers):
    """VQAv2: LLaVA's converter normalizes the model's answer. The official scorer then reads both
    sides through `vqa_words`, but only where the humans differ: ten times "none" stays "none", and
    the model's "none" has become "0"."""
    text = normalize(text)
    answers = [answer.replace("\n", " ").replace("\t", " ").strip() for answer in answers]
    if len(set(answers)) > 1:
        text, answers = vqa_words(text), map(vqa_words, answers)
    return share_of(text, [answer.lower() for answer in answers])


# ----------------------------------------------------------------------- from answers to a score


def mean_percent(values):
    return 100 * fmean(values)


def grouped(pairs):
    groups = collections.defaultdict(list)
    for group, value in pairs:
        groups[group].append(value)
    return groups


def mean_of(right, name="accuracy"):
    """A score: the mean of `right(answer, truth)` over all questions, then over each group."""

    def score(answers):
        values = [(question.group, right(text, question.truth)) for question, text in answers]
        groups, table = grouped(values), {name: mean_percent(value for _, value in values)}
        if len(groups) > 1:
            table |= {group: mean_percent(some) for group, some in groups.items()}
        return table

    return score


def score_pope(answers):
    kinds = grouped((q.group, (q.truth != "no", not says_no(text))) for q, text in answers)
    table = {}
    for kind, pairs in kinds.items():
        count = collections.Counter(pairs)  # counts (object present, answer says so)
        found, wrong, missed = count[True, True], count[False, True], count[True, False]
        table[kind] = {
            "f1": mean_percent([2 * found / max(1, 2 * found + wrong + missed)]),
            "accuracy": mean_percent(truth == answer for truth, answer in pairs),
            "precision": mean_percent([found / max(1, found + wrong)]),
            "recall": mean_percent([found / max(1, found + missed)]),
            "yes": mean_percent(answer for _, answer in pairs),
        }
    return {name: fmean(row[name] for row in table.values()) for name in table[kind]} | table


def score_mme(answers):
    pictures = grouped((q.group, yes_or_no(text) == q.truth) for q, text in answers)
    tasks = grouped((task, fmean(right) + all(right)) for (task, _), right in pictures.items())
    table = {task: mean_percent(values) for task, values in tasks.items()}
    total = lambda of_cognition: sum(table[t] for t in table if (t in COGNITION) == of_cognition)
    return {"perception": total(False), "cognition": total(True)} | table


def score_scienceqa(answers):
    table = mean_of(lambda text, truth: letter(text) == truth, "total")(answers)
    return {"picture": table.get("picture", table["total"])} | table


def score_mmbench(answers):
    rotations = grouped((q.group, only_letter(text) == q.truth) for q, text in answers)
    every = [right for rights in rotations.values() for right in rights]
    return {"circular": mean_percent(map(all, rotations.values())), "accuracy": mean_percent(every)}


def rounded(score):
    """The score with two decimals. Rounding comes last, after all sums and means."""

    def two_decimals(value):
        if isinstance(value, dict):
            return {name: two_decimals(part) for name, part in value.items()}
        return round(value, 2)

    return lambda answers: two_decimals(score(answers))


SCORES = {name: rounded(score) for name, score in {
    "pope": score_pope,
    "gqa": mean_of(lambda text, truth: text.rstrip(".").lower() == truth),
    "textvqa": mean_of(agreement),
    "vqav2": mean_of(vqav2_agreement),
    "scienceqa": score_scienceqa,
    "mme": score_mme,
    "mmbench": score_mmbench,
    "mmbench_cn": score_mmbench,
    "seed": mean_of(lambda text, truth: text == truth),
}.items()}  # fmt: skip
