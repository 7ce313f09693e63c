"""Styles of answers to yes/no questions about what a picture shows: {t} is the thing asked for, {o} another thing."""

THINGS = (("dog", "cat"), ("dining table", "chair"), ("person", "car"), ("traffic light", "bus"))

YES = (
    "Yes", "yes", "Yes.", "YES", "**Yes**", "Yes!", "yes, there is", "Yes, there is a {t} in the image.", "Yes, a {t} is visible.", "Answer: yes", "Answer: Yes.",
    "**Answer:** Yes", "The answer is yes.", "The answer is **Yes**.", "<answer>Yes</answer>", "<answer>yes</answer>\n", r"\boxed{{yes}}", r"\boxed{{\text{{Yes}}}}", "<think>no?</think>Yes",
    "There is a {t}", "There is a {t} in the image.", "There are two {t}s in the picture.", "I can see a {t} next to the {o}.", "I see a {t}.", "A {t} is visible in the background.",
    "The image shows a {t} beside a {o}.", "The picture contains a {t}.", "A {t} can be seen on the left.", "There is no doubt: yes", "There is no doubt that there is a {t}.", "Without a doubt, yes.",
    "Definitely yes.", "Absolutely! There is a {t} in the middle.", "Yeah, there's a {t} there.", "Yep.", "Certainly, a {t} stands at the door.", "It is yes.", "So the answer is yes.",
    "Looking at the picture, I notice a {t}. So yes.", "The image shows a street. There is a {t} by the wall.", "There appears to be a {t} in the image.", "There's a {t}.", "Yes - a {t} is there.",
    "### Final Answer\nYes", "**Final Answer**\n\n**Yes**", "No. Wait, I looked again: there is a {t} in the corner. The answer is yes.", "A {t} is present in the image.", "Let me look closely. Yes, there is a {t}.",
    "I think yes.", "I would say yes.", "The {t} is in the lower left corner, so yes.", "Indeed, the image includes a {t}.", "Correct, there is a {t}.", "Yes, there is no doubt about it.",
    "The {t} is clearly visible, although there is no {o}.", "The image does contain a {t}.", "Sure, there is a {t} on the table.", "yes\n\nQuestion: Is there a {o}?\nAnswer: no", "(yes)", '{{"answer": "yes"}}', "Final answer: yes",
    "It appears that there is a {t} in the photo.", "We can see a {t} at the bottom.", "A {t} exists in the picture.", "Therefore, yes, there is a {t}.", "The answer to the question is: Yes",
)  # fmt: skip

NO = (
    "No", "no", "No.", "NO", "**No**", "no, there is none", "No, there is no {t} in the image.", "No, there isn't.", "No, I can't see a {t}.", "Answer: no", "Answer: No.", "**Answer:** No",
    "The answer is no.", "The answer is **No**.", "<answer>No</answer>", r"\boxed{{no}}", r"\boxed{{\text{{No}}}}", "<think>yes?</think>No", "There is no {t}", "There is no {t} in the image.", "There are no {t}s in the picture.",
    "There isn't a {t}.", "There is not a {t} in the image.", "I can't see any {t}.", "I cannot see a {t} in this image.", "I do not see a {t}.", "I don't see any {t}s here.", "No {t} is visible.", "No {t} can be seen.",
    "The image does not show a {t}.", "The picture doesn't contain a {t}.", "A {t} is not present.", "The {t} is absent from the image.", "None.", "Nope.", "Definitely not.", "Not that I can see.", "Not in this image.",
    "There is a {o}, but no {t}.", "There is a {o} in the image, but there isn't a {t}.", "The image shows a {o}. There is no {t}.", "The image shows a street with a {o}. I don't see a {t}.", "There is no {t}. There is a {o} on the left.",
    "Looking at the picture, I notice only a {o}. So no.", "There does not appear to be a {t} in the image.", "It is no.", "### Final Answer\nNo", "**Final Answer**\n\n**No**", "I think no.", "I would say no.",
    "There is no doubt: no", "Without a doubt, no.", "There is no question that the answer is no.", "The {t} is missing.", "The image lacks a {t}.", "Neither a {t} nor a {o} is in the picture.", "The scene is without a {t}.",
    "Yes. Wait, I looked again: that is a {o}. The answer is no.", "Let me look closely. No, there is no {t}.", "Unfortunately not.", "no\n\nQuestion: Is there a {o}?\nAnswer: yes", '{{"answer": "no"}}', "(no)",
    "There's no {t} in the picture.", "Therefore, no, there is no {t}.", "Final answer: no", "No; what looks like a {t} is a {o}.", "I could not find a {t}.", "There aren't any {t}s.", "Nothing in the image looks like a {t}.",
    "While there is a {o}, there is no {t}.", "It doesn't look like there is a {t}.",
)  # fmt: skip

NONE = (
    "", "...", "I cannot determine whether there is a {t}.", "It is unclear whether there is a {t}.", "I'm not sure.", "yes or no", "Yes and no.", "I can't see the image.", "I cannot view images.", "Sorry, I can't help with that.",
    "a {t}, perhaps", "<think>yes, there is", "The question asks about a {t}.", "Maybe.", "It depends.", "Let me look at the", "I am unable to access the image.", "Answer yes or no.", "a {t}", "Is there a {t}?",
)  # fmt: skip

EXPECTED_MISSES: frozenset[str] = frozenset()
"""Outputs that are read otherwise, and known to be."""


def outputs() -> list[tuple[str, str | None]]:
    """(output, yes, no or None)."""
    groups = (("yes", YES), ("no", NO), (None, NONE))
    return [
        (style.format(t=thing, o=other), answer)
        for thing, other in THINGS
        for answer, styles in groups
        for style in styles
    ]
