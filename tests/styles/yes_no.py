"""Styles of answers to yes/no questions about what a picture shows: {t} is the thing asked for, {o} another thing."""

THINGS = (("dog", "cat"), ("dining table", "chair"), ("person", "car"), ("traffic light", "bus"))

YES = (
    "Yes", "yes", "Yes.", "YES", "**Yes**", "Yes!", "yes, there is", "Yes, there is a {t} in the image.",
    "Yes, a {t} is visible.", "Answer: yes", "Answer: Yes.",
    "**Answer:** Yes", "The answer is yes.", "The answer is **Yes**.", "<answer>Yes</answer>",
    "<answer>yes</answer>\n", r"\boxed{{yes}}", r"\boxed{{\text{{Yes}}}}", "<think>no?</think>Yes",
    "There is a {t}", "There is a {t} in the image.", "There are two {t}s in the picture.",
    "I can see a {t} next to the {o}.", "I see a {t}.", "A {t} is visible in the background.",
    "The image shows a {t} beside a {o}.", "The picture contains a {t}.", "A {t} can be seen on the left.",
    "There is no doubt: yes", "There is no doubt that there is a {t}.", "Without a doubt, yes.",
    "Definitely yes.", "Absolutely! There is a {t} in the middle.", "Yeah, there's a {t} there.", "Yep.",
    "Certainly, a {t} stands at the door.", "It is yes.", "So the answer is yes.",
    "Looking at the picture, I notice a {t}. So yes.",
    "The image shows a street. There is a {t} by the wall.", "There appears to be a {t} in the image.",
    "There's a {t}.", "Yes - a {t} is there.",
    "### Final Answer\nYes", "**Final Answer**\n\n**Yes**",
    "No. Wait, I looked again: there is a {t} in the corner. The answer is yes.",
    "A {t} is present in the image.", "Let me look closely. Yes, there is a {t}.",
    "I think yes.", "I would say yes.", "The {t} is in the lower left corner, so yes.",
    "Indeed, the image includes a {t}.", "Correct, there is a {t}.", "Yes, there is no doubt about it.",
    "The {t} is clearly visible, although there is no {o}.", "The image does contain a {t}.",
    "Sure, there is a {t} on the table.", "yes\n\nQuestion: Is there a {o}?\nAnswer: no", "(yes)",
    '{{"answer": "yes"}}', "Final answer: yes",
    "It appears that there is a {t} in the photo.", "We can see a {t} at the bottom.",
    "A {t} exists in the picture.", "Therefore, yes, there is a {t}.", "The answer to the question is: Yes",
)  # fmt: skip

NO = (
    "No", "no", "No.", "NO", "**No**", "no, there is none", "No, there is no {t} in the image.",
    "No, there isn't.", "No, I can't see a {t}.", "Answer: no", "Answer: No.", "**Answer:** No",
    "The answer is no.", "The answer is **No**.", "<answer>No</answer>", r"\boxed{{no}}",
    r"\boxed{{\text{{No}}}}", "<think>yes?</think>No", "There is no {t}", "There is no {t} in the image.",
    "There are no {t}s in the picture.",
    "There isn't a {t}.", "There is not a {t} in the image.", "I can't see any {t}.",
    "I cannot see a {t} in this image.", "I do not see a {t}.", "I don't see any {t}s here.",
    "No {t} is visible.", "No {t} can be seen.",
    "The image does not show a {t}.", "The picture doesn't contain a {t}.", "A {t} is not present.",
    "The {t} is absent from the image.", "None.", "Nope.", "Definitely not.", "Not that I can see.",
    "Not in this image.",
    "There is a {o}, but no {t}.", "There is a {o} in the image, but there isn't a {t}.",
    "The image shows a {o}. There is no {t}.", "The image shows a street with a {o}. I don't see a {t}.",
    "There is no {t}. There is a {o} on the left.",
    "Looking at the picture, I notice only a {o}. So no.", "There does not appear to be a {t} in the image.",
    "It is no.", "### Final Answer\nNo", "**Final Answer**\n\n**No**", "I think no.", "I would say no.",
    "There is no doubt: no", "Without a doubt, no.", "There is no question that the answer is no.",
    "The {t} is missing.", "The image lacks a {t}.", "Neither a {t} nor a {o} is in the picture.",
    "The scene is without a {t}.",
    "Yes. Wait, I looked again: that is a {o}. The answer is no.",
    "Let me look closely. No, there is no {t}.", "Unfortunately not.",
    "no\n\nQuestion: Is there a {o}?\nAnswer: yes", '{{"answer": "no"}}', "(no)",
    "There's no {t} in the picture.", "Therefore, no, there is no {t}.", "Final answer: no",
    "No; what looks like a {t} is a {o}.", "I could not find a {t}.", "There aren't any {t}s.",
    "Nothing in the image looks like a {t}.",
    "While there is a {o}, there is no {t}.", "It doesn't look like there is a {t}.",
)  # fmt: skip

NONE = (
    "", "...", "I cannot determine whether there is a {t}.", "It is unclear whether there is a {t}.",
    "I'm not sure.", "yes or no", "Yes and no.", "I can't see the image.", "I cannot view images.",
    "Sorry, I can't help with that.",
    "a {t}, perhaps", "<think>yes, there is", "The question asks about a {t}.", "Maybe.", "It depends.",
    "Let me look at the", "I am unable to access the image.", "Answer yes or no.", "a {t}", "Is there a {t}?",
)  # fmt: skip

CASES = (
    ("Yes, there is a dog in the image. The dog is sitting next to a man who isn't looking at it.", "yes"),
    ("No, there is no dog in the image. The image shows a cat.", "no"),
    ("No, the image does not contain a dog. There is a cat.", "no"),
    ("The image features a man riding a horse. There are no dogs visible.", "no"),
    ("There are several people in the image, including a man holding a phone.", "yes"),
    ("There is a dog in the image, sitting on a couch. There is no other animal.", "yes"),
    ("Yes. There is no doubt.", "yes"), ("no doubt, yes", "yes"), ("Not really.", "no"), ("I believe so.", "yes"),
    ("I believe not.", "no"), ("I don't think so.", "no"), ("I think so.", "yes"),
    ("Yes, I can see a bench.", "yes"), ("I can see a bench in the image.", "yes"),
    ("A bench is in the image.", "yes"), ("The bench is present.", "yes"), ("It is present.", "yes"),
    ("It is not present.", "no"), ("Present", "yes"), ("Absent", "no"), ("True", "yes"), ("False", "no"),
    ("None", "no"), ("Zero.", "no"), ("The answer: no", "no"), ("The answer is: **No.**", "no"),
    ("The correct answer is yes.", "yes"), ("Answer: There is a dog.", "yes"), ("Answer: There is no dog.", "no"),
    ("<answer>There is a dog.</answer>", "yes"), ("<answer>no</answer> because yes", "no"),
    ("Based on the image, there is a dog.", "yes"), ("Based on the image, there is not a dog.", "no"),
    ("It looks like there is a dog.", "yes"), ("It seems that there are no dogs.", "no"),
    ("In the picture, you can see a dog lying on the floor.", "yes"), ("There's one.", "yes"),
    ("There are none.", "no"), ("There is none.", "no"), ("I see none.", "no"), ("I see one.", "yes"),
    ("no dog", "no"), ("No dogs.", "no"), ("a dog", None), ("dog", None), ("Hmm... yes", "yes"),
    ("Let me think: yes.", "yes"), ("I would answer no.", "no"), ("My answer is no.", "no"),
    ("The image does not show any dog, so the answer is no.", "no"),
    ("The image does show a dog, so the answer is yes.", "yes"),
    ("Although the picture is blurry, there is a dog.", "yes"),
    ("Although there is a cat, I cannot find a dog.", "no"), ("There is a dog, isn't there?", None),
    ("I'm not sure, but I think there is a dog.", "yes"), ("I am not sure, but I think yes.", "yes"),
    ("I cannot tell.", None), ("unknown", None), ("It is impossible to tell from the image.", None),
    ("yes, yes, yes", "yes"), ("YES!!!", "yes"), ("Y", "yes"), ("n", "no"), ("Yes\nNo", None),
    ("No\n\nThe image shows a kitchen.", "no"),
    ("Yes, the image shows a kitchen. No dog is there though... wait, no. The answer is no.", "no"),
    ("Is there a dog? Yes.", "yes"), ("Question: Is there a dog? Answer: No", "no"),
    ("Step 1: look for dogs. Step 2: none found. Therefore, the answer is no.", "no"),
    ("The dog is sitting on the sofa.", "yes"), ("A dog is sitting on the sofa.", "yes"),
    ("Two dogs are playing.", None), ("The object is not visible in the image.", "no"), ("It's not there.", "no"),
    ("It is there.", "yes"), ("There is only a cat.", None), ("No, only a cat.", "no"),
    ("Yes, but it's a toy.", "yes"), ("No, but there is a cat.", "no"), ("Nothing.", "no"),
    ("Nope, nothing there.", "no"), ("I do see a dog.", "yes"), ("I do not think there is a dog.", "no"),
    ("I don't believe there's a dog here.", "no"), ("It would be no.", "no"), ("Definitely!", "yes"),
    ("Of course not.", "no"), ("Of course.", "yes"), ("There is a person in the picture without a hat.", "yes"),
    ("The person is not wearing a hat.", "no"), ("That is correct, there is a dog.", "yes"),
    ("That's right.", "yes"), ("Incorrect.", "no"), ('The answer is "yes".', "yes"), ('"Yes"', "yes"),
    ("'no'", "no"),
    ("The image depicts a dining table with plates. There are also chairs around.", "yes"),
    ("There is a dining table in the center of the image, and several chairs. No people are visible.", "yes"),
    ("Yes, there are two dogs in the image, but no cats.", "yes"),
    ("I see a man, a woman and a car, but I do not see a dog.", "no"),
    ("It is not possible to determine if there is a dog in the image.", None),
    ("The image is too blurry to tell.", None), ("A dog? No.", "no"), ("A dog? Yes, it is by the door.", "yes"),
    ("No dog is present in this picture.", "no"), ("There isn't any dog.", "no"), ("There ain't no dog.", "no"),
    ("Answer:\n\nYes", "yes"), ("**Answer: No**", "no"), ("Final Answer: **No**", "no"),
    ("The final answer is \\boxed{No}.", "no"), ("\\boxed{\\text{no}}", "no"), ("Output: yes", "yes"),
    ("Result: no", "no"), ("Response: Yes.", "yes"), ("Assistant: Yes", "yes"), ("I'm going to say yes.", "yes"),
    ("I'll say no.", "no"), ("My guess is no.", "no"), ("The answer might be no.", "no"), ("It's a yes.", "yes"),
    ("That would be a no.", "no"), ("That's a no.", "no"), ("Yes it is.", "yes"), ("No it isn't.", "no"),
    ("It is.", "yes"), ("It isn't.", "no"), ("There is.", "yes"), ("There isn't.", "no"), ("There are.", "yes"),
    ("There aren't any.", "no"), ("I can confirm that there is a dog.", "yes"),
    ("I can't confirm that there is a dog.", None), ("A bowl is sitting on the table.", "yes"),
    ("The bowl sits on the table.", None), ("The image contains no dogs.", "no"),
    ("The photo shows no dogs.", "no"), ("The image features no dog.", "no"), ("Dogs are absent.", "no"),
    ("The dog isn't visible.", "no"), ("Not visible.", "no"), ("Visible.", None), ("It does.", "yes"),
    ("It doesn't.", "no"), ("It does not.", "no"), ("Nah", "no"), ("Sure.", "yes"),
    ("No problem! Yes, there is a dog.", "yes"), ("No worries, there is a dog.", "yes"),
    ("Yes, there appears to be a dog, although it is not clearly visible.", "yes"),
    ("there is a dog in the image", "yes"), ("there is no dog in the image", "no"),
    ("The image does not have a dog in it. Instead it has a cat.", "no"),
    ("Based on the visual content, the answer is affirmative: yes.", "yes"),
    ("The picture is of a beach with umbrellas.", None),
)  # fmt: skip
"""Single outputs."""

EXPECTED_MISSES = frozenset(("There is a person in the picture without a hat.",))
"""Outputs that are read otherwise, and known to be."""


def outputs() -> list[tuple[str, str | None]]:
    """(output, yes, no or None)."""
    groups = (("yes", YES), ("no", NO), (None, NONE))
    made = [
        (style.format(t=thing, o=other), answer)
        for thing, other in THINGS
        for answer, styles in groups
        for style in styles
    ]
    return [*made, *CASES]
