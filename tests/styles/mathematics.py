r"""Outputs of realistic styles for mathematics: every style with five contents in LaTeX, labels by construction."""

from __future__ import annotations

from tests.styles.outputs import Output, outputs

CONTENTS = [
    (r"\frac{3}{4}", r"\frac{4}{3}"),
    (r"2\sqrt{2}", r"3\sqrt{2}"),
    (r"(3,-1)", r"(-1,3)"),
    (r"x^2+2x+1", r"x^2-2x+1"),
    (r"12\pi", r"12"),
]
"""A right answer and a wrong one."""

THOUGHT = "<think>\nMaybe it is $7$. No, let me check again. The answer is 5? Wait.\n</think>\n\n"

STYLES = [
    r"\boxed{@}",
    r"$\boxed{@}$",
    r"$$\boxed{@}$$",
    r"\[\boxed{@}\]",
    r"The answer is $\boxed{@}$.",
    r"Thus, the final answer is \(\boxed{@}\).",
    "### Final Answer\n\n" + r"$\boxed{@}$",
    "**Final Answer**\n\n" + r"\[ \boxed{@} \]",
    r"\boxed{ @ }",
    r"$\boxed{\displaystyle @}$",
    "First I tried " + r"\boxed{17}" + ", which fails. Corrected: " + r"$\boxed{@}$",
    r"Final Answer: The final answer is $@$. I hope it is correct.",
    r"The final answer is $@$.",
    r"The final answer is: $@$",
    r"The answer is $@$.",
    r"The answer is \(@\).",
    r"Answer: $@$",
    r"**Answer:** $@$",
    r"**Answer**: \(@\)",
    r"Answer: @",
    "Answer:\n\n" + r"$@$",
    "Answer:\n" + r"$$@$$",
    "Answer:\n" + r"\[" + "\n@\n" + r"\]",
    r"**Final Answer:** $@$",
    "**Final Answer**\n\n" + r"$$@$$",
    "**Final Answer**\n" + r"$$y = @$$",
    "## Final Answer\n" + r"$@$",
    "### Answer\n\n" + r"$@$",
    "### Final Answer:\n" + r"**$@$**",
    r"<answer>@</answer>",
    r"<answer>$@$</answer>",
    r"<answer> @ </answer>",
    "<answer>\n" + r"\boxed{@}" + "\n</answer>",
    r"#### @",
    r"Therefore, the answer is **$@$**.",
    r"So the answer is $@$",
    r"Hence the answer is: $@$.",
    r"The correct answer is $@$.",
    r"The value we want is $7+5$. After simplifying, the answer is $@$.",
    r"Our final answer is $@$.",
    r"The result simplifies, and the answer is therefore $@$.",
    r"Answer - $@$",
    r"ANSWER: $@$",
    r"answer: $@$",
    r"Final answer: $@$",
    r"FINAL ANSWER: $@$",
    r"*Answer:* $@$",
    r"> **Answer:** $@$",
    "Step 1: we set $n=2$.\nStep 2: we substitute.\n\nAnswer: "
    + r"$@$"
    + "\n\nExplanation: with $n=2$ this follows.",
    THOUGHT + r"\boxed{@}",
    THOUGHT + r"The answer is $@$.",
    THOUGHT + r"**Answer:** $@$",
    THOUGHT + r"<answer>@</answer>",
    THOUGHT + "**Final Answer**\n\n" + r"$$\boxed{@}$$",
    "Let me verify.\n- check 1: ok\n- check 2: ok\n\n"
    + r"$\boxed{@}$"
    + "\n\nThis matches all 2 checks.",
    "1. Expand.\n2. Collect.\n3. Done.\n\n**Final Answer**: " + r"\(@\)",
    r"We get $\boxed{@}$, using the identity from step 3.",
    r"The answer to the problem is $@$.",
    r"In conclusion, the answer is $@$.",
    r"\boxed{\boxed{@}}",
    r"\fbox{@} is not needed; \boxed{@}",
    r"The final answer is \boxed{@}. $\blacksquare$",
]

UNREADABLE = ["", "I cannot solve this problem.", "<think>\nSo far I have 3 and then",
"Let me think about it step by step.",
              "It is impossible to say."]  # fmt: skip


def mathematics() -> list[Output]:
    return outputs("mathematics", STYLES, CONTENTS, UNREADABLE)
