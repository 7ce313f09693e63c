"""Styles of short answers: templates for {a}, the answer, and the questions that fill them."""

QUESTIONS = (
    ("Light blue", "the leading colour"),
    ("960", "the number of visitors in 2019"),
    ("57%", "the share of the largest group"),
    ("12.5", "the highest value in the chart"),
    ("Blue whale", "the largest animal shown"),
)
"""(answer, what the question asks for)."""

READ = (
    "{a}", "{a}.", "**{a}**", "**{a}.**", "`{a}`", '"{a}"', " {a}\n", "'{a}'", "Answer: {a}", "answer: {a}", "**Answer:** {a}", "**Answer**: **{a}**", "Answer - {a}", "ANSWER: {a}.", "Answer:\n{a}", "Answer:\n\n**{a}**", "A short answer: {a}",
    "Final Answer: {a}", "### Final Answer\n{a}", "### Final Answer\n\n**{a}**", "**Final Answer**\n\n{a}", "## Answer\n\n{a}.", "#### {a}", "<answer>{a}</answer>", "<answer> {a} </answer>", "<think>perhaps red, 3</think><answer>{a}</answer>", "<think>red or 3?</think>{a}",
    "<CONCLUSION>{a}</CONCLUSION>", r"\boxed{{{a}}}", r"\boxed{{\text{{{a}}}}}", r"The answer is $\boxed{{{a}}}$.", "<|begin_of_box|>{a}<|end_of_box|>", "The answer is {a}", "The answer is {a}.", "The answer is **{a}**.", "The correct answer is {a}.",
    "The final answer is {a}.", "So the answer is: {a}", "Therefore, the answer is {a}.", "The answer to the question is {a}.", "The answer is {a}, because the chart shows it.", "The answer is {a} because of the legend.", "Answer: {a}\n\nExplanation: The legend shows it, beside Red and 3.",
    "Let me look at the chart.\n{a}", "Let me see.\n\n**{a}**", "First I read the axis. Then I compare the bars.\n\nAnswer: {a}", "Based on the chart, the answer is {a}.", "{Q} is {a}.", "{Q} is **{a}**.", "Looking at the chart, {q} is {a}.", "{Q}: {a}", "{a} is {q}.",
    "According to the chart, {q} is {a}.", "In the picture, {q} is {a}. I hope this helps!", "I read the legend and the axis. So {q} is {a}.", "The answer is red. Wait, I misread the legend. The answer is {a}.", "The correct value is {a}.", "It is {a}.",
    "Step 1: read the legend.\nStep 2: compare.\n\nFinal answer: {a}", "My answer: {a}", '{{"answer": "{a}"}}', "{a}\n\nQuestion: What is next?\nAnswer: red", "The answer would be {a}.", "Hence, the final answer is {a}", "> **Answer: {a}**", "\u2705 Answer: {a}",
)  # fmt: skip

NONE = (
    "", " \n", "I don't know.", "I cannot determine the answer from the image.", "Sorry, I can't help with that.", "<think>It is {a}", "To find {q}, we need to look at the", "It is not possible to tell from this chart.", "The answer is unclear.", "...",
    "I'm unable to view the image.", "<answer></answer>", "Answer:", "The answer cannot be determined.", "There is not enough information.",
)  # fmt: skip

EXPECTED_MISSES: frozenset[str] = frozenset()
"""Outputs that are read otherwise, and known to be."""


def outputs() -> list[tuple[str, str | None]]:
    """(output, its answer or None)."""
    made: list[tuple[str, str | None]] = []
    for answer, asked in QUESTIONS:
        words = {"a": answer, "q": asked, "Q": asked[0].upper() + asked[1:]}
        made += [(style.format(**words), answer) for style in READ]
        made += [(style.format(**words), None) for style in NONE]
    return made
