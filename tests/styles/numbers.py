r"""Outputs of realistic styles for numbers (GSM8K, AIME): every style with five contents, labels by construction."""

from __future__ import annotations

from tests.styles.outputs import Output, outputs

CONTENTS = [("18", "20"), ("1234", "1243"), ("366", "60"), ("7", "70"), ("540", "54")]
"""A right answer and a wrong one."""

THOUGHT = "<think>\nAdd 3 and 4, then double: maybe 14? Hmm, 15. Let me redo it.\n</think>\n\n"

STYLES = [
    "#### @",
    "3 + 4 = 7 and so on.\n#### @",
    "She has 3 bags.\nShe buys 4 more.\n\n#### @",
    r"\boxed{@}",
    r"$\boxed{@}$",
    r"$$\boxed{@}$$",
    r"\[ \boxed{@} \]",
    r"The answer is $\boxed{@}$.",
    r"\boxed{@\text{ dollars}}",
    r"\boxed{\$@}",
    r"\boxed{x = @}",
    r"\boxed{@}, since 3 times 4 is 12.",
    "**Final Answer**\n\n" + r"\boxed{@}",
    "### Final Answer\n" + r"$\boxed{@}$",
    r"First guess \boxed{5}, which is wrong. So \boxed{@}.",
    "The answer is @.",
    "The answer is @",
    "The answer is: @",
    "The answer is **@**.",
    "The answer is $@.",
    "The answer is $@$.",
    "The answer is @ dollars.",
    "The final answer is @.",
    "The final answer is @. I hope it is correct.",
    "Final Answer: The final answer is $@$. I hope it is correct.",
    "Therefore, the answer is @.",
    "So the answer is @ apples.",
    "Hence, the final answer is **@ apples**.",
    "Answer: @",
    "answer: @",
    "ANSWER: @",
    "**Answer:** @",
    "**Answer**: @",
    "**Answer: @**",
    "*Answer*: @ dollars",
    "Answer:\n@",
    "Answer:\n\n**@**",
    "### Answer\n@",
    "### Final Answer\n**@**",
    "## Final Answer:\n\n@ dollars",
    "**Final Answer:** @",
    "**Final Answer**\n@",
    "Final answer: @",
    "FINAL ANSWER: $@",
    "Answer - @",
    "<answer>@</answer>",
    "<answer> @ </answer>",
    "<answer>$@$</answer>",
    "<answer>\n@\n</answer>",
    "The answer is 3 + 4 + 5 = @.",
    "The answer is 10/2 + 1 = @",
    "Answer: 3 * 4 = @",
    r"The answer is $3 \times 4 = @$.",
    "Answer: @\n\nExplanation: 3 bags of 4 make 12, and 2 are left over.",
    "The answer is @.\n\nTo check: 3 + 4 = 7, which agrees.",
    "Natalia sold 48 clips, then half of 48, so the total number is @.",
    "Adding up 10 and 20, we get @",
    "Total: 12 + 13 = @",
    THOUGHT + "The answer is @.",
    THOUGHT + r"\boxed{@}",
    THOUGHT + "<answer>@</answer>",
    THOUGHT + "#### @",
    THOUGHT + "**Final Answer:** @",
    "1. 3 bags\n2. 4 bags\n3. Add them.\n\nThe answer is @.",
    "- Monday: 12\n- Tuesday: 13\n\n**Answer:** @ pages",
]

UNREADABLE = ["", "I am not sure.", "<think>\nSo far there are 3 and then 4", "There is not enough information.",
              "Let me think step by step."]  # fmt: skip


def numbers() -> list[Output]:
    return outputs("numbers", STYLES, CONTENTS, UNREADABLE)
