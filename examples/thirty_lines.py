"""From a pair to a comparison, with a reward of one's own: distil, find the subnetwork, retrain it, compare, plot."""

import vlopd


def brief(example, completion):
    """1 where the completion is the example's answer, 0 elsewhere."""
    return float(completion.strip() == example.answer)


student, teacher = "builtin:shapes-text-student", "builtin:shapes-text-teacher"
data = vlopd.load_data({"type": "shapes", "modality": "text"}, size=1280)
recipe = vlopd.Recipe(
    train={"steps": 20, "prompts_per_step": 64},
    optim={"learning_rate": 3e-4},
    reward={"rule": brief, "alpha": 0.5},
    rollout={"max_new_tokens": 14, "completions_per_prompt": 2},
)
full = vlopd.distill(vlopd.load_pair(student, teacher), data, recipe, "out/full")
mask = vlopd.make_mask({"type": "top_fraction", "fraction": 0.05}, student, full)
pair = vlopd.load_pair(student, teacher)
sparse = vlopd.distill(pair, data, recipe, "out/sparse", seed=2, mask=mask)
models = {"base": student, "full": full, "sparse": sparse}
compared = vlopd.compare(models, ["shapes_text"], limit=200)
print(compared)
compared.plot().savefig("compared.svg")
vlopd.geometry(student, full).plot().savefig("geometry.svg")
