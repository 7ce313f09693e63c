"""Styles of answers to multiple-choice questions: templates, and the questions that fill them.

{L}, {l} and {T}: the letter chosen, in capitals and small, and its text; {W}: another letter; {X}: a third.
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
    "{L}", "{L}.", "({L})", "[{L}]", "**{L}**", "**{L}.**", "`{L}`", "{L})", "{l}", "({l})", "{l})", " {L}\n",
    '"{L}"', "${L}$",
    "Option {L}", "option {l}", "Choice {L}.", "**Option {L}**", "{L}: {T}", "{L}. {T}", "({L}) {T}",
    "**{L}. {T}**", "{L}) {T}.",
    "{L} - {T}", "{T}", "{T}.", "**{T}**", "Option {L}: {T}", "Option ({L}) {T}",
    # labels and headings
    "Answer: {L}", "answer: {l}", "Answer - {L}", "Answer \u2014 {L}", "**Answer:** {L}",
    "**Answer**: **{L}**", "ANSWER: {L}", "Ans: {L}", "Ans. {L}",
    "Answer: ({L})", "Answer: {L}. {T}", "Answer: {T}", "Answer:\n{L}", "Answer:\n\n**{L}**",
    "The answer: {L}", "Correct answer: {L}",
    "Correct option: {L}", "Final Answer: {L}", "### Final Answer\n\n**{L}**", "### Final Answer\n{L}. {T}",
    "## Answer\n\n{L}", "**Final Answer**\n{L}",
    "**Final Answer:**\n\n({L}) {T}", "### Final Answer:\n$\\boxed{{{L}}}$", "Final answer = {L}",
    "Answer => {L}", "\u2705 **Answer: {L}**", "> **Answer: {L}**",
    "- **Answer:** {L}", "My choice: {L}", "Selected option: {L}", "Conclusion: {L}",
    "Question answered. Answer: option {L}",
    "Answer (letter only): {L}", '{{"answer": "{L}"}}',
    '```json\n{{"reasoning": "it fits", "answer": "{L}"}}\n```', "#### {L}",
    # the first mark before an explanation
    "Answer: {L}\n\nExplanation: Option {W} is wrong because it does not fit. Option {X} is not supported either.",
    "The correct answer is ({L}). The picture supports it. Choice ({W}) is incorrect because it is not shown.",
    "The correct answer is **{L}. {T}**.\n\nHere is why:\n- **{W}**: this is not shown.\n- **{X}**: this does not fit.",
    "{L}\n\nExplanation: {W} would need another picture, and {X} is ruled out.",
    "({L})\n\n({W}) is incorrect; ({X}) is incorrect.",
    "**{L}. {T}**\n\nThe other options are wrong: {W} does not fit, and {X} is unrelated.",
    "{L}. {T}\n\nReasoning: look at the diagram.",
    "{L}, because the others do not fit.", "{L} because the diagram shows it.",
    "Answer: {L}, since nothing else fits the description.",
    # tags and boxes
    "<answer>{L}</answer>", "<answer> ({L}) {T} </answer>",
    "<think>perhaps {W}</think>\n<answer>{L}</answer>", "<think>{W} or {X}?</think>{L}",
    "<answer>\n**{L}**\n</answer>", "<answer>\\boxed{{{L}}}</answer>", "<answer>The answer is {L}.</answer>",
    "<answer>{T}</answer>",
    "<SUMMARY>I look.</SUMMARY><CONCLUSION>{L}</CONCLUSION>", r"\boxed{{{L}}}", r"$\boxed{{\text{{{L}}}}}$",
    r"\boxed{{\text{{({L})}}}}", r"\boxed {{{L}}}", r"\boxed{{\textbf{{({L})}} \ {T}}}",
    r"So the answer is $\boxed{{{L}}}$.", r"\fbox{{{L}}}", "<|begin_of_box|>{L}<|end_of_box|>",
    r"\[\boxed{{{L}}}\]", r"\boxed{{{L}. \text{{{T}}}}}",
    # sentences
    "The answer is {L}", "The answer is {L}.", "The answer is ({L}) {T}.", "The answer is option {L}.",
    "The correct answer is {L}: {T}.", "The correct option is {L}.",
    "The best answer is {L}.", "The right choice would be {L}.", "Therefore, the answer is **{L}**.",
    "So the final answer is: {L}", "Hence the correct choice is ({L}).",
    "The answer to the question is {T}.", "The correct answer is {T}.", "The answer should be {L}.",
    "The answer must be {L}", "Thus the answer is clearly {L}.",
    "I would choose {L}.", "I choose option {L}.", "I'd go with {L}.", "so I'll go with option {L}.",
    "I will pick ({L}).", "My answer is {L}.", "I select {L}", "I'm going with {L}.",
    "{L} is the correct answer.", "{L} is correct.", "Option {L} is correct.",
    "Option {L} is the best choice.", "({L}) is the right answer.", "**{L}** is the answer.",
    "Option {L}, {T}, is the correct answer.", "Option {L} ({T}) is right.",
    "The diagram shows it clearly, which corresponds to option {L}.", "This matches option {L}.",
    "We look at the figure, and this leads to option {L}.", "Therefore, it must be ({L}).", "So it is {L}.",
    "Thus, {L}.", "Therefore, option {L}.", "Looking at the picture, it's {L}.",
    "Let me think. The figure is clear.\n\n{L}", "First I look at the labels.\nThen I compare them.\n**{L}**",
    "The figure settles it.\n({L})",
    "Only {L} fits, so the answer is {L}.", "I am not completely sure, but the answer is {L}.",
    "It's hard to say, but I'd pick {L}.",
    "The answer isn't {W}; the correct answer is {L}.", "The answer is not {W} but {L}.",
    "{W} is wrong and {L} is correct.", "Option {W} is incorrect. Option {L} is correct.",
    # corrections
    "The answer is {W}. Wait, I misread the figure. The answer is {L}.",
    r"\boxed{{{W}}}. Wait, that is not right. \boxed{{{L}}}",
    "At first I chose {W}. But the correct answer is {L}.",
    "Answer: {W}\n\nWait, let me check again. It cannot be {W}. So it is {L}.",
    "I thought the answer is {W}, but the correct option is {L}.",
    # judged options
    "- {W}: incorrect, it does not fit.\n- {L}: correct, it fits.\n\nThe answer is {L}.",
    "Eliminating {W} and {X}, the answer is {L}.", "We can rule out {W}. Only option {L} remains.",
    # texts in sentences
    "It is {T}.", "I believe the answer would be {T}, given the picture.",
    "Based on the image, the answer is {T}.", "The answer is {L}.\n\nQuestion: What is next?\nAnswer: {W}",
)  # fmt: skip
"""Outputs that choose {L}."""

NONE = (
    "", "I don't know.", "I cannot answer this question.", "The answer is {L} or {W}.", "Either {L} or {W}.",
    "It could be {L} or {W}.", "Answer: {L}, {W}", "Both {L} and {W} are correct.",
    "Let me look at the options. {L} says that", "To answer this, we need to compare the options in the",
    "<think>The answer is {L}", "<think>maybe {L}, maybe {W}", "Sorry, I can't help with that.",
    "None of the options is correct.", "The answer is not {L}.",
    "If the answer is {L}, then the picture would differ.", "Z", "...", "Let's think step by step.",
    "The image shows several things.",
    "I would not choose {L}.", "Option {L} is wrong.", "{L} and {W}", "A careful look is needed.", "I think about it.",
    "The options are {L}, {W} and {X}.", r"\boxed{{{L}, {W}}}", "<answer></answer>",
)  # fmt: skip
"""Outputs that choose none."""

CASES = (
    (
        ("a dog", "a cat", "a horse", "a parrot"),
        (
            ("Looking at the image, the animal has whiskers and a long tail. This is a cat.\n\nAnswer: B", "B"),
            (
                "Let's analyze each option:\n\nA. a dog - The animal does not look like a dog.\nB. a cat - The "
                "animal has whiskers, which matches a cat.\nC. a horse - Not a horse.\nD. a parrot - Not a parrot.\n"
                "\nTherefore, the correct answer is B.",
                "B",
            ),
            (
                "Let's analyze each option:\n\nA. a dog - incorrect.\nB. a cat - correct.\nC. a horse - incorrect.\n"
                "D. a parrot - incorrect.",
                "B",
            ),
            ("A. a dog ❌\nB. a cat ✅\nC. a horse ❌\nD. a parrot ❌", "B"),
            ("A) Incorrect, the animal isn't a dog.\nB) Incorrect.\nC) This is right.\nD) Incorrect.", "C"),
            ("The animal in the picture is a cat.", "B"), ("The animal in the picture is a cat, not a dog.", "B"),
            ("The picture shows a cat sitting on a mat. Hence B.", "B"),
            ("The animal is not a dog, not a cat and not a parrot, so it must be a horse.", "C"),
            ("Since the animal has four legs, options B and C are possible, but it has whiskers, so B.", "B"),
            ("Options A and C can be eliminated. Between B and D, B is more likely.", "B"),
            ("Options A and C can be eliminated. Between B and D, I'd lean towards B.", "B"),
            ("I think it's B", "B"), ("it's b", "B"), ("i think b", "B"), ("probably B", "B"), ("B?", "B"),
            ("B!", "B"), ("B\n", "B"), ("\n\nB", "B"), ("The answer is B, not A.", "B"),
            ("The answer is B. A is wrong because dogs bark. C is wrong.", "B"), ("**Answer: B) a cat**", "B"),
            ("**B**: a cat", "B"), ("The correct answer is:\n\n**B. a cat**", "B"),
            ("The correct answer is\n\n(B)", "B"),
            (
                "## Step 1: Identify the animal\nIt has whiskers.\n\n## Step 2: Compare\nOnly cats do.\n\nThe final "
                "answer is: $\\boxed{B}$",
                "B",
            ),
            ("<answer>B. a cat</answer>", "B"), ("<answer>b</answer>", "B"), ("<answer>Option B</answer>", "B"),
            ("<answer>The animal is a cat, so B</answer>", "B"),
            ("Thought: it has whiskers.\nAction: finish\nFinal Answer: B", "B"), ("Answer is B", "B"),
            ("answer is b.", "B"), ("Ans: b", "B"), ("ans - (b)", "B"), ("The ans is B.", "B"),
            ("The option which best describes the image is B.", "B"),
            ("The letter of the right choice is B.", "B"), ("B) a cat is the right choice.", "B"),
            ("Among the options, option B (a cat) best matches the image.", "B"),
            ("Out of the given options, B is the most accurate.", "B"), ("Correct: B", "B"),
            ("The solution is B.", "B"), ("Solution: B", "B"), ("Result: B", "B"),
            ("The answer would be the second option.", "B"), ("I will go with option (B) a cat.", "B"),
            ("So I'd answer B.", "B"), ("My final answer: B.", "B"), ("I'm confident that the answer is B.", "B"),
            ("To be safe, choose B.", "B"), ("You should select B.", "B"), ("Pick B", "B"),
            ("The image shows a cat; therefore the correct option is (B).", "B"),
            ("Here, option B is the correct one as the animal has whiskers.", "B"), ("Only B makes sense.", "B"),
            ("B makes the most sense.", "B"), ("B it is.", "B"), ("B fits best.", "B"), ("B seems right.", "B"),
            ("B would be correct.", "B"), ("The best match is B.", "B"),
            ("The best match is option B: a cat.", "B"), ("Hmm, A? No: B.", "B"), ("A or B? I say B.", "B"),
            ("Is it A? No, a dog has different ears. It is B.", "B"), ("Yes, B.", "B"), ("Answer: A cat", "B"),
            ("A cat", "B"), ("A cat.", "B"), ("It's a cat", "B"), ("cat", "B"), ("Cat.", "B"), ("The cat", "B"),
            ("A", "A"), ("A.", "A"), ("A. a dog", "A"), ("A, since it barks", "A"), ("A because it barks.", "A"),
            ("Answer: A because it barks", "A"), ("The answer is A because it barks", "A"),
            ("The answer is A dog", "A"), ("The answer is a dog.", "A"), ("a", "A"), ("(a)", "A"), ("a)", "A"),
            ("a.", "A"), ("answer: a", "A"), ("The answer is a.", "A"), ("option a", "A"),
            ("The answer is a bird.", None), ("A bird", None), ("A", "A"), ("a bird", None), ("I", None),
            ("I see a bird.", None), ("There is a dog and a cat.", None),
            ("The image may show a dog or a cat.", None),
            ("The question asks which animal is shown. Options are a dog, a cat, a horse, a parrot.", None),
            ("I need more information.", None), ("E. none", None), ("The answer is E.", None),
            ("The correct answer is not listed.", None), ("None of the above.", None),
            ("The answer is unclear.", None), ("It could be B, but it could also be D.", None),
            ("The answer is A. \n\nActually, looking again, the answer is C.", "C"),
            ("The answer is A... no wait, it's C.", "C"), ("Answer: A\nAnswer: C", None), ("Question 1: B", "B"),
            ("1. B", "B"), ("Assistant: B", "B"), ("Answer:B", "B"), ("Answer:(B)", "B"), ("Answer\uff1aB", "B"),
            ("答案\uff1aB", "B"), ("答案是B", "B"), ("B.a cat", "B"), ("B.cat", "B"), ("B.A cat", "B"),
            ('The correct choice: "B"', "B"), ("The answer is 'B'", "B"), ("The answer is `B`.", "B"),
            ("the answer is: b", "B"), ("Therefore the correct answer is option B - a cat.", "B"),
            ("\\text{B}", "B"), ("$\\text{B}$", "B"), ("\\(\\boxed{B}\\)", "B"), ("\\mathbf{B}", "B"),
            ("\\boxed{\\mathrm{B}}", "B"), ("\\boxed{\\text{B. a cat}}", "B"), ("\\boxed{a cat}", "B"),
            ("\\boxed{\\text{cat}}", "B"), ("The model is asked to choose between the options. The", None),
            ("Looking at option A, we see that dogs have", None),
            ("First, consider option A. Dogs bark. Next, consider option B", None),
            ("I'd eliminate A, C and D.", "B"), ("A, C, and D are incorrect.", "B"),
            ("It is definitely not A.", None), ("B is incorrect, so the answer is D.", "D"),
            ("While A is tempting, D is correct.", "D"),
            ("The correct answer is D. Many people choose A, which is wrong.", "D"),
            ("The answer can be found in the image: D.", "D"), ("Answer: D (a parrot)", "D"), ("[D]", "D"),
            ("{D}", "D"), ("<D>", "D"), ("(D)", "D"), ("D)", "D"), ("D:", "D"), ("D;", "D"),
            ("The parrot is shown.", "D"),
            ("Based on the image provided, the animal appears to be a parrot.", "D"),
            ("The bird has colorful feathers. It's most likely a parrot.", "D"),
            (
                "The image features a parrot perched on a branch. Parrots are birds known for mimicry, unlike a dog "
                "or a cat.",
                "D",
            ),
        ),
    ),
    (
        ("5", "10", "15", "20"),
        (
            ("15", "C"), ("The answer is 15.", "C"), ("5 + 10 = 15", "C"), ("So 5 + 10 = 15.", "C"),
            ("\\boxed{15}", "C"), ("There are 15.", "C"), ("\\boxed{C}", "C"), ("(C) 15", "C"), ("C. 15", "C"),
            ("The answer is 25.", None), ("5 and 10", None), ("<answer>15</answer>", "C"),
            ("There are 3 apples and 15 pears, so 15.", "C"),
        ),
    ),
    (
        ("5 cm", "15 cm", "10 cm", "25 cm"),
        (
            ("5", "A"), ("The answer is 5.", "A"), ("The length is 5cm.", "A"), ("The length is 15 cm.", "B"),
            ("5 cm + 10 cm = 15 cm", "B"), ("\\boxed{5}", "A"), ("\\boxed{15\\text{ cm}}", "B"),
            ("The answer is $15$ cm.", "B"), ("x = 15 cm", "B"),
        ),
    ),
    (
        ("$\\frac{1}{2}$", "$\\frac{1}{3}$", "$2$", "$-2$"),
        (
            ("\\boxed{\\frac{1}{2}}", "A"), ("1/2", "A"), ("The answer is 1/3.", "B"), ("-2", "D"), ("2", "C"),
            ("The answer is $-2$", "D"), ("\\boxed{\\dfrac{1}{3}}", "B"), ("The slope is $-2$.", "D"),
        ),
    ),
    (
        ("Yes", "No"),
        (
            ("Yes", "A"), ("No", "B"), ("No, it is not.", "B"), ("Yes, it is.", "A"), ("The answer is no.", "B"),
            ("A", "A"), ("B", "B"), ("B. No", "B"), ("Answer: No", "B"), ("Answer: Yes, because it is", "A"),
        ),
    ),
    (
        ("True", "False"),
        (
            ("The statement is true.", "A"), ("False", "B"), ("False.", "B"),
            ("The statement is false, so B", "B"),
        ),
    ),
    (
        ("A", "B", "C", "D"),
        (
            ("B", "B"), ("The answer is B", "B"), ("(C)", "C"), ("Answer: C", "C"),
        ),
    ),
    (
        ("angle A", "angle B", "angle C"),
        (
            ("The angle at B is 60 degrees. The angle at C is", None), ("angle B", "B"), ("Answer: angle B", "B"),
            ("The largest is angle C.", "C"), ("In triangle ABC, the side AB is opposite to C.", None),
        ),
    ),
    (
        ("increases", "decreases", "stays the same", "cannot be determined"),
        (
            ("It cannot be determined.", "D"), ("cannot be determined", "D"),
            ("The answer cannot be determined from the graph.", "D"), ("Answer: D", "D"),
            ("The pressure increases.", "A"), ("The pressure decreases as the volume increases.", None),
            ("It stays the same", "C"), ("The value increases, so A.", "A"),
        ),
    ),
    (
        ("all of the above", "none of the above", "I only", "I and II only"),
        (
            ("None of the above", "B"), ("none of the above.", "B"), ("I and II only", "D"),
            ("The answer is I only.", "C"), ("D. I and II only", "D"), ("All of the above.", "A"),
            ("The correct answer is B. none of the above", "B"),
        ),
    ),
    (
        ("Paris", "London", "Rome", "New York"),
        (
            ("The capital is Paris.", "A"), ("Paris is not the answer; it's Rome.", "C"),
            ("I have been to Paris and London.", None), ("It is New York City.", "D"), ("Not Paris.", None),
            ("The Eiffel Tower is in Paris, so the answer is A.", "A"), ("The answer is Berlin.", None),
            ("paris", "A"), ("PARIS", "A"),
        ),
    ),
    (
        ("vitamin A", "vitamin B", "vitamin C", "vitamin D"),
        (
            ("Vitamin C is found in oranges.", "C"), ("It contains vitamin C", "C"), ("Vitamin D", "D"),
            ("The answer is vitamin B.", "B"), ("The correct answer is D) vitamin D.", "D"), ("C", "C"),
        ),
    ),
    (
        ("the left", "the right"),
        (
            ("(B)", "B"), ("the left one", "A"), ("It is on the right.", "B"),
            ("The right one is the tallest.", "B"), ("The right answer is A.", "A"),
            ("The right answer is the left.", "A"), ("Left", "A"), ("The one on the left.", "A"),
        ),
    ),
    (
        ("a", "b", "c", "d", "e"),
        (
            ("e", "E"), ("E", "E"), ("The answer is E.", "E"), ("the answer is c", "C"),
        ),
    ),
    (
        ("a cell", "a leaf"),
        (
            ("Based on the diagram,\n\nthe answer is B.", "B"), ("The answer is **B**", "B"),
            ("**The answer is B.**", "B"), ("### Answer: B", "B"), ("### Answer:\nB", "B"), ("# B", "B"),
            ("***B***", "B"), ("_B_", "B"), ("<b>B</b>", "B"), ("B<|im_end|>", "B"), ("B</s>", "B"),
            ("answer is: (B) a leaf.", "B"),
            (
                "To solve this problem, let's look at the picture.\n\n1. The cell has a wall.\n2. The leaf is "
                "green.\n\nGiven this, the picture shows a leaf. So, the answer is (B) a leaf.",
                "B",
            ),
            ("The answer is A or B depending on the view.", None), ("Both.", None), ("neither", None),
            ("The picture shows a cell in a leaf.", None),
            ("Step 1: look at the leaf.\nStep 2: look at the", None),
            ("I would say that the thing shown here is a leaf", "B"),
            ("I am unable to view images, so I cannot answer.", None),
            ("As an AI model, I cannot see the picture. But if I had to guess, B.", "B"),
            ("The answer is B. \n\nNote: the answer is not A since cells are small.", "B"),
            ("Explanation: leaves are green.\nAnswer: B", "B"), ("Reason: cells have walls. Therefore: A", "A"),
            ("Final Answer: \\( \\boxed{B} \\)", "B"), ("**Final Answer**: $\\boxed{\\text{B}}$", "B"),
            ("The final answer is $\\boxed{B. a leaf}$", "B"),
            (
                "A is a cell. B is a leaf. The picture shows green tissue with veins. Therefore the correct choice "
                "is B.",
                "B",
            ),
            ("Option A: a cell. Option B: a leaf. I choose option B.", "B"),
            ("The correct answer is B because A describes a cell, while the picture shows a leaf.", "B"),
            ("Let me re-read the question. The options are A. a cell and B. a leaf.", None),
            ("My reasoning suggests A. However, the scale bar indicates otherwise. Final: B", "B"),
            ("Choose (B).", "B"), ("Thus (B).", "B"), ("=> B", "B"), ("→ B", "B"), ("→ **B**", "B"),
            ("So B", "B"), ("so, b.", "B"), ("Must be B", "B"),
        ),
    ),
    (
        ("Photosynthesis", "Respiration", "Transpiration", "Digestion"),
        (
            (
                "To determine the process shown, let's examine the diagram:\n\n1. **Sunlight** enters the leaf.\n2. "
                "**Carbon dioxide** is absorbed.\n3. **Oxygen** is released.\n\nThese are the hallmarks of "
                "photosynthesis.\n\n**Answer: A. Photosynthesis**",
                "A",
            ),
            ("The diagram shows sunlight entering the leaf. These are the hallmarks of photosynthesis.", "A"),
            (
                "The diagram shows sunlight entering the leaf and water leaving it. Respiration would need "
                "mitochondria. The answer is therefore A.",
                "A",
            ),
            (
                "**Step 1:** Look at the arrows.\n**Step 2:** They show CO2 going in.\n**Conclusion:** The process "
                "is photosynthesis (A).",
                "A",
            ),
            ("**Conclusion:** A", "A"), ("Conclusion: The correct answer is A.", "A"),
            (
                "- **A. Photosynthesis**: matches the diagram.\n- **B. Respiration**: does not match.\n- **C. "
                "Transpiration**: does not match.\n- **D. Digestion**: does not match.",
                "A",
            ),
            (
                "**A. Photosynthesis** - This is the correct answer because plants use light.\n\n**B. Respiration** "
                "- This is incorrect.\n\n**C. Transpiration** - Incorrect.\n\n**D. Digestion** - Incorrect.",
                "A",
            ),
            (
                "Let's evaluate:\n(A) Photosynthesis \u2013 possible.\n(B) Respiration \u2013 not shown.\n(C) "
                "Transpiration \u2013 not shown.\n(D) Digestion \u2013 not applicable.\nThus, (A).",
                "A",
            ),
            (
                "(A) Photosynthesis uses light. (B) Respiration uses oxygen. (C) Transpiration loses water. (D) "
                "Digestion breaks down food. The diagram shows light, so the answer is (A).",
                "A",
            ),
            ("Photosynthesis is the process shown, so the correct option is A.", "A"),
            ("The correct answer is Photosynthesis.", "A"),
            ("The correct answer is photosynthesis, which uses light.", "A"), ("It's photosynthesis!", "A"),
            ("The process is called photosynthesis.", "A"), ("Respiration, not photosynthesis.", "B"),
            ("B, not A.", "B"), ("Not A. B.", "B"), ("I first considered A, but the correct answer is B.", "B"),
            ("Although A seems plausible, the arrows indicate oxygen uptake. So the answer is B. Respiration.", "B"),
            ("A: Photosynthesis\nB: Respiration\nC: Transpiration\nD: Digestion\n\nThe answer is B.", "B"),
            ("A: Photosynthesis\nB: Respiration\nC: Transpiration\nD: Digestion", None),
            ("A. Photosynthesis\nB. Respiration\nC. Transpiration\nD. Digestion\n\nB", "B"),
            (
                "Given the options:\nA. Photosynthesis\nB. Respiration\nC. Transpiration\nD. Digestion\n\nThe "
                "diagram shows oxygen uptake, which is respiration.",
                "B",
            ),
            ("The answer is B (Respiration), as A (Photosynthesis) would release oxygen.", "B"),
            ("Answer: B\nReason: A requires light.", "B"), ("Answer: B, A requires light.", "B"),
            (
                "Answer: B\n\nLet me explain why the other options are incorrect:\nA. Photosynthesis requires "
                "light.\nC. Transpiration is water loss.\nD. Digestion occurs in animals.",
                "B",
            ),
            ("B\n\nA. Photosynthesis requires light.\nC. Transpiration is water loss.", "B"),
            (
                "B. Respiration\n\nRespiration is the process in which cells release energy. Photosynthesis is the "
                "reverse.",
                "B",
            ),
            ("The process shown here can't be determined from the image.", None),
            ("I'm sorry, but I cannot view the image. Could you describe it?", None),
            ("<answer>B</answer><answer>B</answer>", "B"), ("<answer>A</answer>\n<answer>B</answer>", "B"),
            ("<think>\nThe answer is A\n</think>\n\nThe answer is B", "B"), ("Answer: B.\nConfidence: 90%", "B"),
            ("Answer: B\nConfidence: high", "B"), ("Reasoning: The leaf.\nAnswer: B\nConfidence: A lot", "B"),
            ('{"answer": "B", "confidence": 0.9}', "B"), ("{'answer': 'B'}", "B"), ('{"choice": "B"}', "B"),
            ('{"answer": "B. Respiration"}', "B"), ("The letter is B", "B"), ("Letter: B", "B"),
            ("My answer would be option B", "B"), ("Going with B.", "B"), ("I'd say B", "B"),
            ("I'd say option B, Respiration.", "B"), ("The statement that best describes it is B.", "B"),
            ("B is the best description.", "B"), ("B best describes the process.", "B"),
            ("Option B best describes the diagram.", "B"),
            ("Choice B is supported by the arrows, so it is correct.", "B"),
            ("Option B: Respiration is the correct answer.", "B"), ("(B) Respiration is correct", "B"),
            ("**B) Respiration** is the correct answer.", "B"),
            ('The right answer here is "B) Respiration".', "B"), ('The answer is option "B".', "B"),
            ("Correct Answer: **B**", "B"), ("Correct Answer: Option B", "B"),
            ("**Correct Answer:**\n\nB. Respiration", "B"), ("The correct answer: B", "B"),
            ("Of the choices, only respiration takes in oxygen.", "B"), ("Respiration", "B"),
            ("respiration.", "B"), ("RESPIRATION", "B"), ("The answer is Respiration", "B"),
            ("cellular respiration", "B"), ("Digestion or respiration", None),
            ("It is either B or C, I can't decide.", None), ("Could be B.", "B"), ("B or maybe C", None),
            ("B/C", None), ("B & C", None), ("B and C.", None), ("B, C and D", None), ("Perhaps B", "B"),
            ("Probably option B.", "B"), ("most likely (B)", "B"), ("Likely B.", "B"), ("B (I guess)", "B"),
            ("Guess: B", "B"),
            ("The answer is B because the diagram shows O2 uptake; C would show water loss.", "B"),
            (
                "We can eliminate A since there is no light. We can eliminate C because there is no water loss. D is "
                "for animals. That leaves B.",
                "B",
            ),
            ("That leaves B as the only option.", "B"), ("This leaves us with option B.", "B"),
            ("By elimination, B.", "B"), ("By process of elimination, the answer is B.", "B"),
            ("So B is our answer.", "B"), ("So the answer here is B.", "B"), ("B would be my answer.", "B"),
            ("Hence, B is the answer.", "B"), ("Hence option B is the right one.", "B"),
            ("The answer is\nB", "B"), ("The answer is:\n\nB. Respiration", "B"), ("The answer is ... B", "B"),
            ("The answer is… B.", "B"), ("Ans: **(B)**", "B"), ("Answer\nB", "B"), ("answer B", "B"),
            ("Answer B.", "B"), ("Answer (B)", "B"), ("Answer is: B", "B"), ("ANSWER IS B", "B"),
            ("THE ANSWER IS B.", "B"), ("the correct answer is b) respiration", "B"), ("correct answer: b", "B"),
            ("the answer is option b", "B"), ("i'd go with b", "B"), ("i choose b.", "B"), ("b is correct", "B"),
            ("b. respiration", "B"), ("b respiration", "B"), ("B respiration", "B"), ("B Respiration", "B"),
            ("B - Respiration", "B"), ("B, Respiration", "B"), ("B; Respiration", "B"),
        ),
    ),
)  # fmt: skip
"""Single outputs, by their options."""

EXPECTED_MISSES = frozenset(
    (
        "The image features a parrot perched on a branch. Parrots are birds known for mimicry, unlike a dog "
        "or a cat.",
        "Let me re-read the question. The options are A. a cell and B. a leaf.",
    )
)
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
        made += [(style.format(**words), choices, letters[at]) for style in READ]
        made += [(style.format(**words), choices, None) for style in NONE]
    made += [(said, choices, letter) for choices, cases in CASES for said, letter in cases]
    return made
