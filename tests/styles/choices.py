"""Styles of answers to multiple-choice questions: templates, and the questions that fill them.

{L}, {l} and {T}: the letter chosen, in capitals and small, and its text; {W}, {V}: another option's; {X}: a third letter.
"""

QUESTIONS = (
    (("a dog", "a cat", "a horse", "a parrot"), 1),
    (("5 cm", "15 cm", "10 cm", "25 cm"), 0),
    (("Evaporation", "Condensation", "Precipitation", "Transpiration"), 2),
    ((r"$\frac{1}{2}$", r"$\frac{1}{3}$", r"$2$", r"$-2$"), 3),
    (("increases", "decreases", "stays the same", "cannot be determined"), 0),
    (("the red square", "the blue circle", "the green triangle"), 1),
)
"""(options, index of the one chosen)."""

READ = (
    # the letter alone
    "{L}", "{L}.", "({L})", "[{L}]", "**{L}**", "**{L}.**", "`{L}`", "{L})", "{l}", "({l})", "{l})", " {L}\n", '"{L}"', "${L}$",
    "Option {L}", "option {l}", "Choice {L}.", "**Option {L}**", "{L}: {T}", "{L}. {T}", "({L}) {T}", "**{L}. {T}**", "{L}) {T}.",
    "{L} - {T}", "{T}", "{T}.", "**{T}**", "Option {L}: {T}", "Option ({L}) {T}",
    # labels and headings
    "Answer: {L}", "answer: {l}", "Answer - {L}", "Answer \u2014 {L}", "**Answer:** {L}", "**Answer**: **{L}**", "ANSWER: {L}", "Ans: {L}", "Ans. {L}",
    "Answer: ({L})", "Answer: {L}. {T}", "Answer: {T}", "Answer:\n{L}", "Answer:\n\n**{L}**", "The answer: {L}", "Correct answer: {L}",
    "Correct option: {L}", "Final Answer: {L}", "### Final Answer\n\n**{L}**", "### Final Answer\n{L}. {T}", "## Answer\n\n{L}", "**Final Answer**\n{L}",
    "**Final Answer:**\n\n({L}) {T}", "### Final Answer:\n$\\boxed{{{L}}}$", "Final answer = {L}", "Answer => {L}", "\u2705 **Answer: {L}**", "> **Answer: {L}**",
    "- **Answer:** {L}", "My choice: {L}", "Selected option: {L}", "Conclusion: {L}", "Question answered. Answer: option {L}",
    "Answer (letter only): {L}", '{{"answer": "{L}"}}', '```json\n{{"reasoning": "it fits", "answer": "{L}"}}\n```', "#### {L}",
    # the first mark before an explanation
    "Answer: {L}\n\nExplanation: Option {W} is wrong because it does not fit. Option {X} is not supported either.",
    "The correct answer is ({L}). The picture supports it. Choice ({W}) is incorrect because it is not shown.",
    "The correct answer is **{L}. {T}**.\n\nHere is why:\n- **{W}**: this is not what is shown.\n- **{X}**: this does not fit.",
    "{L}\n\nExplanation: {W} would need another picture, and {X} is ruled out.", "({L})\n\n({W}) is incorrect; ({X}) is incorrect.",
    "**{L}. {T}**\n\nThe other options are wrong: {W} does not fit, and {X} is unrelated.", "{L}. {T}\n\nReasoning: look at the diagram.",
    "{L}, because the others do not fit.", "{L} because the diagram shows it.", "Answer: {L}, since nothing else fits the description.",
    # tags and boxes
    "<answer>{L}</answer>", "<answer> ({L}) {T} </answer>", "<think>perhaps {W}</think>\n<answer>{L}</answer>", "<think>{W} or {X}?</think>{L}",
    "<answer>\n**{L}**\n</answer>", "<answer>\\boxed{{{L}}}</answer>", "<answer>The answer is {L}.</answer>", "<answer>{T}</answer>",
    "<SUMMARY>I look.</SUMMARY><CONCLUSION>{L}</CONCLUSION>", r"\boxed{{{L}}}", r"$\boxed{{\text{{{L}}}}}$", r"\boxed{{\text{{({L})}}}}", r"\boxed {{{L}}}", r"\boxed{{\textbf{{({L})}} \ {T}}}",
    r"So the answer is $\boxed{{{L}}}$.", r"\fbox{{{L}}}", "<|begin_of_box|>{L}<|end_of_box|>", r"\[\boxed{{{L}}}\]", r"\boxed{{{L}. \text{{{T}}}}}",
    # sentences
    "The answer is {L}", "The answer is {L}.", "The answer is ({L}) {T}.", "The answer is option {L}.", "The correct answer is {L}: {T}.", "The correct option is {L}.",
    "The best answer is {L}.", "The right choice would be {L}.", "Therefore, the answer is **{L}**.", "So the final answer is: {L}", "Hence the correct choice is ({L}).",
    "The answer to the question is {T}.", "The correct answer is {T}.", "The answer should be {L}.", "The answer must be {L}", "Thus the answer is clearly {L}.",
    "I would choose {L}.", "I choose option {L}.", "I'd go with {L}.", "so I'll go with option {L}.", "I will pick ({L}).", "My answer is {L}.", "I select {L}", "I'm going with {L}.",
    "{L} is the correct answer.", "{L} is correct.", "Option {L} is correct.", "Option {L} is the best choice.", "({L}) is the right answer.", "**{L}** is the answer.",
    "Option {L}, {T}, is the correct answer.", "Option {L} ({T}) is right.", "The diagram shows it clearly, which corresponds to option {L}.", "This matches option {L}.",
    "We look at the figure, and this leads to option {L}.", "Therefore, it must be ({L}).", "So it is {L}.", "Thus, {L}.", "Therefore, option {L}.", "Looking at the picture, it's {L}.",
    "Let me think. The figure is clear.\n\n{L}", "First I look at the labels.\nThen I compare them.\n**{L}**", "The figure settles it.\n({L})",
    "Only {L} fits, so the answer is {L}.", "I am not completely sure, but the answer is {L}.", "It's hard to say, but I'd pick {L}.",
    "The answer isn't {W}; the correct answer is {L}.", "The answer is not {W} but {L}.", "{W} is wrong and {L} is correct.", "Option {W} is incorrect. Option {L} is correct.",
    # corrections
    "The answer is {W}. Wait, I misread the figure. The answer is {L}.", r"\boxed{{{W}}}. Wait, that is not right. \boxed{{{L}}}", "At first I chose {W}. But the correct answer is {L}.",
    "Answer: {W}\n\nWait, let me check again. It cannot be {W}. So it is {L}.", "I thought the answer is {W}, but the correct option is {L}.",
    # judged options
    "- {W}: incorrect, it does not fit.\n- {L}: correct, it fits.\n\nThe answer is {L}.", "Eliminating {W} and {X}, the answer is {L}.", "We can rule out {W}. Only option {L} remains.",
    # texts in sentences
    "It is {T}.", "I believe the answer would be {T}, given the picture.", "Based on the image, the answer is {T}.", "The answer is {L}.\n\nQuestion: What is next?\nAnswer: {W}",
)  # fmt: skip
"""Outputs that choose {L}."""

NONE = (
    "", "I don't know.", "I cannot answer this question.", "The answer is {L} or {W}.", "Either {L} or {W}.", "It could be {L} or {W}.", "Answer: {L}, {W}", "Both {L} and {W} are correct.",
    "Let me look at the options. {L} says that", "To answer this, we need to compare the options in the", "<think>The answer is {L}", "<think>maybe {L}, maybe {W}", "Sorry, I can't help with that.",
    "None of the options is correct.", "The answer is not {L}.", "If the answer is {L}, then the picture would differ.", "Z", "...", "Let's think step by step.", "The image shows several things.",
    "I would not choose {L}.", "Option {L} is wrong.", "{L} and {W}", "A careful look is needed.", "I think about it.",
    "The options are {L}, {W} and {X}.", r"\boxed{{{L}, {W}}}", "<answer></answer>",
)  # fmt: skip
"""Outputs that choose none."""

EXPECTED_MISSES: frozenset[str] = frozenset()
"""Outputs that are read otherwise, and known to be."""


def outputs() -> list[tuple[str, tuple[str, ...], str | None]]:
    """(output, options, letter that it chooses)."""
    made = []
    for choices, at in QUESTIONS:
        letters = "ABCD"[: len(choices)]
        other, third = (letters[(at + k) % len(letters)] for k in (1, 2))
        words = {
            "L": letters[at],
            "l": letters[at].lower(),
            "T": choices[at],
            "W": other,
            "X": third,
        }
        words["V"] = choices[(at + 1) % len(choices)]
        made += [(style.format(**words), choices, letters[at]) for style in READ]
        made += [(style.format(**words), choices, None) for style in NONE]
    return made
