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
    "{a}", "{a}.", "**{a}**", "**{a}.**", "`{a}`", '"{a}"', " {a}\n", "'{a}'", "Answer: {a}", "answer: {a}",
    "**Answer:** {a}", "**Answer**: **{a}**", "Answer - {a}", "ANSWER: {a}.", "Answer:\n{a}",
    "Answer:\n\n**{a}**", "A short answer: {a}",
    "Final Answer: {a}", "### Final Answer\n{a}", "### Final Answer\n\n**{a}**", "**Final Answer**\n\n{a}",
    "## Answer\n\n{a}.", "#### {a}", "<answer>{a}</answer>", "<answer> {a} </answer>",
    "<think>perhaps red, 3</think><answer>{a}</answer>", "<think>red or 3?</think>{a}",
    "<CONCLUSION>{a}</CONCLUSION>", r"\boxed{{{a}}}", r"\boxed{{\text{{{a}}}}}",
    r"The answer is $\boxed{{{a}}}$.", "<|begin_of_box|>{a}<|end_of_box|>", "The answer is {a}",
    "The answer is {a}.", "The answer is **{a}**.", "The correct answer is {a}.",
    "The final answer is {a}.", "So the answer is: {a}", "Therefore, the answer is {a}.",
    "The answer to the question is {a}.", "The answer is {a}, because the chart shows it.",
    "The answer is {a} because of the legend.",
    "Answer: {a}\n\nExplanation: The legend shows it, beside Red and 3.",
    "Let me look at the chart.\n{a}", "Let me see.\n\n**{a}**",
    "First I read the axis. Then I compare the bars.\n\nAnswer: {a}",
    "Based on the chart, the answer is {a}.", "{Q} is {a}.", "{Q} is **{a}**.",
    "Looking at the chart, {q} is {a}.", "{Q}: {a}", "{a} is {q}.",
    "According to the chart, {q} is {a}.", "In the picture, {q} is {a}. I hope this helps!",
    "I read the legend and the axis. So {q} is {a}.",
    "The answer is red. Wait, I misread the legend. The answer is {a}.", "The correct value is {a}.",
    "It is {a}.",
    "Step 1: read the legend.\nStep 2: compare.\n\nFinal answer: {a}", "My answer: {a}",
    '{{"answer": "{a}"}}', "{a}\n\nQuestion: What is next?\nAnswer: red", "The answer would be {a}.",
    "Hence, the final answer is {a}", "> **Answer: {a}**", "\u2705 Answer: {a}",
)  # fmt: skip

NONE = (
    "", " \n", "I don't know.", "I cannot determine the answer from the image.",
    "Sorry, I can't help with that.", "<think>It is {a}", "To find {q}, we need to look at the",
    "It is not possible to tell from this chart.", "The answer is unclear.", "...",
    "I'm unable to view the image.", "<answer></answer>", "Answer:", "The answer cannot be determined.",
    "There is not enough information.",
)  # fmt: skip

CASES = (
    ("The value is 57%.", "57%"), ("57 %", "57 %"), ("In 2019, the value was 960.", "960"),
    ("The bar for 2019 shows 960.", "960"), ("The chart shows that 960 people visited.", "960"),
    ("There are 5 bars.", "5"), ("5 bars", "5 bars"), ("Approximately 960", "960"), ("About 57%", "57%"),
    ("approximately 12.5", "12.5"), ("China has the highest value.", "China"),
    ("The country with the highest value is China.", "China"),
    ("China is the country with the highest value.", "China"),
    ("Answer: China (highest bar)", "China (highest bar)"), ("The answer is China with 57%.", "China"),
    ("The colour is light blue", "light blue"), ("It's light blue.", "light blue"),
    ("Light blue, since the bar is light blue.", "Light blue"), ("The difference is 12.5 - 3 = 9.5", "9.5"),
    ("12.5 - 3 = 9.5", "9.5"), ("The sum is 3 + 4 = 7.", "7"), ("The ratio is 3:4.", "3:4"), ("3:4", "3:4"),
    ("The year is 2015.", "2015"), ("2015", "2015"), ("The answer is 2015", "2015"),
    ("The total is $5,000", "$5,000"), ("$5 million", "$5 million"), ("Yes", "Yes"), ("No", "No"),
    ("Yes, it is larger than the other.", "Yes"), ("The answer is yes.", "yes"),
    ("No, the red bar is smaller.", "No"), ("Republicans", "Republicans"),
    ('The answer is "Republicans".', "Republicans"), ("**Answer: Republicans**", "Republicans"),
    ("Step 1: The bar is at 5.\nStep 2: The other is at 3.\nThe difference is 2.\n\nAnswer: 2", "2"),
    ("To find it, we subtract: 5 - 3 = 2.", "2"), ("I can't see the chart.", None),
    ("The chart does not provide this information.", None), ("2, 5", "2, 5"), ("[2, 5]", "[2, 5]"),
    ("Blue and red", "Blue and red"), ("-3.5", "-3.5"), ("The change is -3.5%.", "-3.5%"),
    ("The answer is 960 visitors.", "960 visitors"), ("As shown, the answer is Blue.", "Blue"),
    ("The line representing Norway reaches 57%.", "57%"),
    ("The style is Art Nouveau.", "Art Nouveau"), ("Baroque", "Baroque"),
    ("The name of the composer is Bach.", "Bach"), ("Bach is the composer.", "Bach"),
    ("The composer is Bach, who lived in Leipzig.", "Bach"), ("The final answer is 42.", "42"), ("**42**", "42"),
    ("The value of the resistor is 42 ohms.", "42 ohms"),
    ("The chart shows that the value for 2019 was 42%.", "42%"), ("In 2019 it was 42%.", "42%"),
    ("The percentage in 2019 is 42%.", "42%"), ("42% in 2019", "42% in 2019"), ("Two", "Two"),
    ("There are two.", "two"), ("The answer is two.", "two"), ("No, it is not.", "No"), ("Yes.", "Yes"),
    ('The largest segment is "Other".', "Other"), ("2015 had the highest value.", "2015"),
    ("The highest value was in 2015.", "2015"), ("The year with the highest value is 2015.", "2015"),
    ("United States", "United States"), ("The United States", "The United States"), ("The U.S.", "The U.S"),
    ("The color of the bar representing Italy is dark blue.", "dark blue"),
    ("The difference between the two is 42 - 12 = 30.", "30"), ("42 - 12 = **30**", "30"),
    ("The average of 42 and 12 is 27.", "27"), ("(42 + 12) / 2 = 27", "27"),
    ("The ratio of A to B is 1:2.", "1:2"), ("The sum of the two smallest bars is 0.42.", "0.42"),
)  # fmt: skip
"""Single outputs."""

EXPECTED_MISSES: frozenset[str] = frozenset()
"""Outputs that are read otherwise, and known to be."""


def outputs() -> list[tuple[str, str | None]]:
    """(output, its answer or None)."""
    made: list[tuple[str, str | None]] = []
    for answer, asked in QUESTIONS:
        words = {"a": answer, "q": asked, "Q": asked[0].upper() + asked[1:]}
        made += [(style.format(**words), answer) for style in READ]
        made += [(style.format(**words), None) for style in NONE]
    return [*made, *CASES]
