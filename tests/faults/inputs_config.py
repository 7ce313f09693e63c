"""Malformed configs: values of settings, as overrides, and whole files."""

from __future__ import annotations

from tests.faults.harness import CONFIG, LOAD, Case, Put

RUN = ("run", "c.toml", "--out", "out")
DIGITS = "9" * 5000
DEEP = 3000

SETTINGS: dict[str, tuple[tuple[str, str, str], ...]] = {
    # key: (malformed, valid, what the line names)
    "train.steps": (
        ("true", "2", "train.steps"),
        ("0", "1", "train.steps"),
        ("-1", "3", "train.steps"),
        ("1.5", "4", "train.steps"),
        ("'3'", "3", "train.steps"),
        ("2147483648", "1000000000", "train.steps"),
        ("1e3", "1000", "train.steps"),
        ("inf", "1", "train.steps"),
        ("nan", "1", "train.steps"),
        ("[]", "1", "train.steps"),
        ("{}", "1", "train.steps"),
        ("1979-05-27", "1979", "train.steps"),
        (DIGITS, "9", "train.steps"),
        (f"0x{'f' * 5000}", "0xf", "train.steps"),
        (f"-{DIGITS}", "9", "train.steps"),
        (f"1e{DIGITS}", "9", "train.steps"),
    ),
    "train.prompts_per_step": (("0", "1", "prompts_per_step"), ("false", "2", "prompts_per_step")),
    "train.micro_batch": (("0", "1", "micro_batch"), ("'all'", "2", "micro_batch")),
    "train.freeze": (
        ("'language'", "['language']", "train.freeze"),
        ("['legs']", "['head']", "train.freeze"),
    ),
    "train.keep_steps": (
        ("[0]", "[1]", "keep_steps"),
        ("[1, 1]", "[1]", "keep_steps"),
        ("[5]", "[1]", "keep_steps"),
        ("{a = 1}", "[1]", "keep_steps"),
    ),
    "train.metrics": (
        ("['nothing']", "[]", "train.metrics"),
        ("[1]", "[]", "train.metrics"),
    ),
    "train.save_every": (("-5", "5", "save_every"), ("9.0", "9", "save_every")),
    "train.master": (("'fp64'", "'bf16'", "train.master"), ("32", "'fp32'", "train.master")),
    "train.sharding": (("'zero3'", "'state'", "train.sharding"),),
    "train.teacher_cache_gb": (
        ("inf", "0.5", "teacher_cache_gb"),
        ("-1", "1", "teacher_cache_gb"),
    ),
    "train.stepps": (("1", "", "did you mean"),),
    "optim.learning_rate": (
        ("inf", "1e-3", "learning_rate"),
        ("-inf", "1e-3", "learning_rate"),
        ("nan", "1e-3", "learning_rate"),
        ("-1e-3", "1e-3", "learning_rate"),
        ("1e400", "1e-4", "learning_rate"),
        ("'1e-3'", "1e-3", "learning_rate"),
        ("true", "1e-3", "learning_rate"),
        ("[1e-3]", "1e-3", "learning_rate"),
        (DIGITS, "1", "learning_rate"),
        ("1e-60", "1e-30", "learning_rate"),
    ),
    "optim.betas": (
        ("[0.9]", "[0.9, 0.99]", "optim.betas"),
        ("[0.9, 1.5]", "[0.9, 0.95]", "optim.betas"),
        ("[nan, 0.9]", "[0.0, 0.9]", "optim.betas"),
        ("0.9", "[0.9, 0.9]", "optim.betas"),
    ),
    "optim.type": (("'adam'", "'sgd'", "optim.type"), ("1", "'lion'", "optim")),
    "optim.eps": (("0", "1e-8", "optim.eps"),),
    "optim.weight_decay": (("-0.1", "0.1", "weight_decay"), ("nan", "0.0", "weight_decay")),
    "optim.warmup_steps": (("-1", "0", "warmup_steps"), ("0.5", "1", "warmup_steps")),
    "optim.state_bits": (("4", "8", "state_bits"),),
    "optim.component_rates": (
        ("{arm = 2.0}", "{head = 2.0}", "component_rates"),
        ("[1.0]", "{}", "component_rates"),
        ("{head = inf}", "{head = 0.5}", "component_rates"),
    ),
    "optim": (
        ("[]", "{learning_rate = 1e-4}", "optim"),
        ("1", "{}", "optim"),
        ("''", "{}", "optim"),
    ),
    "rollout.max_new_tokens": (
        ("0", "1", "max_new_tokens"),
        ("true", "1", "max_new_tokens"),
        (DIGITS, "5", "max_new_tokens"),
    ),
    "rollout.temperature": (
        ("0", "0.01", "temperature"),
        ("nan", "1.0", "temperature"),
        ("1e9", "100", "temperature"),
    ),
    "rollout.top_p": (("1.5", "0.5", "top_p"), ("0", "1.0", "top_p"), ("nan", "0.9", "top_p")),
    "rollout.top_k": (("0", "1", "top_k"), ("2.0", "2", "top_k")),
    "rollout.source": (
        ("'oracle'", "'teacher'", "rollout.source"),
        (
            "{type = 'mixture', student = nan}",
            "{type = 'mixture', student = 0.5, data = 0.5}",
            "rollout",
        ),
        ("[]", "'student'", "rollout.source"),
    ),
    "rollout.engine": (
        ("'warp'", "'static'", "rollout.engine"),
        ("{type = 'vlopd', url = 7}", "'eager'", "rollout.engine"),
    ),
    "rollout.completions_per_prompt": (("0", "1", "completions_per_prompt"),),
    "loss": (("'reverse'", "{type = 'forward_kl'}", "loss"), ("[]", "{type = 'jsd'}", "loss")),
    "loss.type": (("'kl'", "'k3'", "loss.type"), ("true", "'k1'", "loss")),
    "loss.support": (
        ("{type = 'teacher_top_k', k = 0}", "{type = 'teacher_top_k', k = 2}", "loss.support"),
        ("{type = 'top'}", "{type = 'full'}", "loss.support"),
        ("'everything'", "{type = 'full'}", "loss.support"),
    ),
    "loss.tokens": (
        (
            "{by = 'divergence', fraction = 2.0}",
            "{by = 'divergence', fraction = 0.5}",
            "loss.tokens",
        ),
        ("{by = 'colour', fraction = 0.5}", "{by = 'position', fraction = 0.5}", "loss.tokens"),
        ("{by = 'divergence'}", "{by = 'divergence', fraction = 0.5}", "loss.tokens"),
    ),
    "loss.chunk_tokens": (("-3", "3", "chunk_tokens"),),
    "loss.student_temperature": (("nan", "2.0", "student_temperature"),),
    "reward": (
        ("{rule = 'vibes'}", "", "reward.rule"),
        ("{rule = 'exact_match', alpha = -1.0}", "", "reward.alpha"),
        ("{alpha = 1.0}", "", "reward.rule"),
        ("true", "", "reward"),
    ),
    "geometry.ratios": (
        ("[nan]", "[0.1]", "geometry.ratios"),
        ("[inf]", "[0.2]", "geometry.ratios"),
        ("[0.1, 0.1]", "[0.1, 0.2]", "geometry.ratios"),
        ("[]", "[0.5]", "geometry.ratios"),
        ("0.1", "[0.1]", "geometry.ratios"),
        ("[0]", "[0.01]", "geometry.ratios"),
        ("[1]", "[0.99]", "geometry.ratios"),
        ("['0.1']", "[0.1]", "geometry.ratios"),
        ("[0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]", "[0.1, 0.2, 0.3]", "geometry.ratios"),
    ),
    "geometry.arms": (
        ("['nobody']", "['sub']", "nobody"),
        ("'full'", "['full']", "geometry.arms"),
        ("['full', 'full']", "['full', 'sub']", "geometry.arms"),
    ),
    "geometry.nulls": (
        ("['gaussian']", "[{type = 'gaussian'}]", "geometry.nulls"),
        ("[{type = 'normal'}]", "[{type = 'ulp'}]", "geometry.nulls"),
        ("[{type = 'adam', steps = 0}]", "[{type = 'adam', steps = 1}]", "geometry.nulls"),
        ("[{type = 'ulp'}, {type = 'ulp'}]", "[{type = 'permuted'}]", "nulls"),
        ("[{type = 'low_rank', rank = -2}]", "[{type = 'low_rank', rank = 2}]", "geometry.nulls"),
    ),
    "geometry.null_draws": (
        ("-1", "0", "null_draws"),
        (DIGITS, "9", "null_draws"),
        ("10001", "5", "null_draws"),
    ),
    "geometry.seed": (("-1", "0", "geometry.seed"), ("9223372036854775808", "7", "geometry.seed")),
    "geometry.max_exact_cost": (
        ("nan", "1e9", "max_exact_cost"),
        ("1e31", "1e30", "max_exact_cost"),
    ),
    "geometry.max_left_out": (("1.0", "0.5", "max_left_out"), ("nan", "0.0", "max_left_out")),
    "geometry.factorisation": (("'qr'", "'svd'", "factorisation"),),
    "eval.tasks": (
        ("[]", "['shapes_text']", "eval.tasks"),
        ("'shapes_text'", "['shapes_text']", "eval.tasks"),
        ("['shapes_text', 'shapes_text']", "['shapes_text']", "eval.tasks"),
        ("[1]", "['capitals']", "eval.tasks"),
        ("['']", "['capitals']", "eval.tasks"),
        ("{}", "['capitals']", "eval.tasks"),
    ),
    "eval.limit": (("0", "1", "eval.limit"), ("0.5", "5", "eval.limit"), ("-1", "1", "eval.limit")),
    "eval.confidence": (
        ("95", "0.95", "eval.confidence"),
        ("1.0", "0.9", "eval.confidence"),
        ("nan", "0.5", "eval.confidence"),
    ),
    "eval.bootstrap_draws": (
        ("0", "1", "bootstrap_draws"),
        ("1000001", "1000", "bootstrap_draws"),
        (DIGITS, "9", "bootstrap_draws"),
    ),
    "eval.batch_size": (("0", "1", "batch_size"), ("'auto'", "8", "batch_size")),
    "eval.margin": (("0", "0.01", "eval.margin"), ("inf", "0.1", "eval.margin")),
    "eval.contrasts": (
        ("[]", "['full - base']", "eval.contrasts"),
        ("['full']", "['full - base']", "full"),
        ("['full - nobody']", "['sub - full']", "nobody"),
        ("['full - full']", "['full - sub']", "full"),
    ),
    "eval.sampled": (
        ("{n = 1}", "{n = 2}", "eval.sampled"),
        ("{temperature = 0}", "{temperature = 1}", "eval.sampled"),
        ("true", "{n = 4}", "eval.sampled"),
    ),
    "eval.generation": (
        ("{shapes_text = {max_tokens = 0}}", "{shapes_text = {max_tokens = 3}}", "max_tokens"),
        ("{shapes_text = 3}", "{shapes_text = {top_k = 3}}", "eval.generation"),
        ("[]", "{}", "eval.generation"),
    ),
    "eval.validation": (
        ("{tasks = ['shapes_text']}", "{tasks = ['capitals']}", "shapes_text"),
        ("{}", "{tasks = ['capitals']}", "eval.validation"),
    ),
    "eval.max_pixels": (("0", "9999", "max_pixels"),),
    "precision.compute": (
        ("'fp8'", "'fp32'", "precision.compute"),
        ("16", "'bf16'", "precision.compute"),
    ),
    "precision": (("'fp32'", "{compute = 'fp32'}", "precision"), ("[]", "{}", "precision")),
    "masks": (
        ("[]", "{}", "masks"),
        ("'top'", "{}", "masks"),
        ("1", "{}", "masks"),
        ("[{type = 'top_fraction', fraction = 0.1}]", "{}", "masks"),
    ),
    "masks.top": (
        ("{type = 'top'}", "{type = 'visible'}", "masks.top.type"),
        ("[]", "{type = 'visible'}", "masks.top"),
        (
            "{type = 'top_fraction', fraction = nan}",
            "{type = 'top_fraction', fraction = 0.1}",
            "fraction",
        ),
        (
            "{type = 'top_fraction', fraction = 0}",
            "{type = 'top_fraction', fraction = 1}",
            "fraction",
        ),
        ("{type = 'top_fraction', fraction = 2}", "{type = 'energy', share = 0.5}", "fraction"),
        ("{type = 'visible', atol = inf}", "{type = 'visible', atol = 0}", "atol"),
        ("{type = 'visible', of = 'full@x'}", "{type = 'visible', of = 'full'}", "full@x"),
        ("{type = 'visible', of = 'full@-1'}", "{type = 'visible', of = 'full'}", "full@-1"),
        ("{type = 'visible', of = 'nobody'}", "{type = 'visible', of = 'full'}", "nobody"),
        ("{type = 'random', like = 'top', seed = 1}", "{type = 'visible'}", "top"),
        ("{type = 'union', masks = ['top']}", "{type = 'visible'}", "masks.top"),
        ("{type = 'complement', mask = 'gone'}", "{type = 'visible'}", "gone"),
        (
            "{type = 'principal', fraction = 0.1}",
            "{type = 'principal', fraction = 0.1, rank = 2}",
            "rank",
        ),
        ("{type = 'whole'}", "{type = 'whole', modules = ['ffn']}", "masks.top"),
        ("{type = 'whole', layers = [-1]}", "{type = 'whole', layers = [1]}", "layers"),
        ("{type = 'nothing:rule'}", "{type = 'visible'}", "nothing"),
        ("{type = 'file', path = ''}", "{type = 'visible'}", "masks.top"),
    ),
    "masks.'../up'": (("{type = 'visible'}", "", "../up"),),
    "arms": (
        (
            "[]",
            "{base = {type = 'base'}, full = {type = 'distill'}, sub = {type = 'distill'}}",
            "arms",
        ),
        ("1", "", "arms"),
    ),
    "arms.full": (
        ("{type = 'distil'}", "{type = 'distill'}", "arms.full.type"),
        ("{type = 'distill', seed = -1}", "{type = 'distill', seed = 0}", "seed"),
        ("{type = 'distill', seed = true}", "{type = 'distill', seed = 3}", "seed"),
        ("{type = 'distill', mask = 'gone'}", "{type = 'distill'}", "gone"),
        (
            "{type = 'distill', optim = {learning_rate = nan}}",
            "{type = 'distill', optim = {learning_rate = 1.0}}",
            "learning_rate",
        ),
        ("{type = 'distill', train = 1}", "{type = 'distill', train = {steps = 2}}", "train"),
        ("{type = 'distill', lora = {rank = 0}}", "{type = 'distill', lora = {rank = 1}}", "rank"),
        ("{type = 'distill', lora = 'yes'}", "{type = 'distill', lora = {rank = 2}}", "lora"),
        ("{type = 'distill', null = 'noise'}", "{type = 'distill', null = 'rademacher'}", "null"),
        ("{type = 'distill', sweep = {}}", "{type = 'distill'}", "sweep"),
        ("{type = 'distill', sweep = {'optim.learning_rate' = []}}", "{type = 'distill'}", "sweep"),
        ("{type = 'distill', sweep = {'optim.nothing' = [1]}}", "{type = 'distill'}", "nothing"),
        ("{type = 'distill', seeds = 3}", "{type = 'distill', seed = 3}", "seeds"),
        ("{type = 'distill', seeds = []}", "{type = 'distill', seed = 3}", "seeds"),
        ("{type = 'distill', seeds = [1, 1]}", "{type = 'distill', seed = 1}", "seeds"),
        ("{type = 'distill', role = 'hero'}", "{type = 'distill', role = 'full'}", "role"),
        ("'distill'", "{type = 'distill'}", "arms.full"),
        ("[]", "{type = 'distill'}", "arms.full"),
        ("{type = 'transplant', of = 'full'}", "{type = 'distill'}", "full"),
    ),
    "arms.x": (
        (
            "{type = 'transplant', of = 'gone', mask = 'top'}",
            "{type = 'transplant', mask = 'top'}",
            "gone",
        ),
        (
            "{type = 'extrapolate', of = 'full', factor = inf}",
            "{type = 'extrapolate', of = 'full', factor = 2.0}",
            "factor",
        ),
        ("{type = 'merge', of = []}", "{type = 'merge', of = ['full', 'sub']}", "arms.x"),
        (
            "{type = 'merge', of = ['full', 'sub'], density = 2.0}",
            "{type = 'merge', of = ['full', 'sub']}",
            "density",
        ),
        ("{type = 'checkpoint'}", "{type = 'checkpoint', model = 'student'}", "model"),
        ("{type = 'imported', results = 3}", "{type = 'imported', results = 'r'}", "results"),
        ("{type = 'teacher', teacher = 'gone'}", "{type = 'teacher'}", "gone"),
    ),
    "arms.con": (("{type = 'distill'}", "", "con"),),
    "arms.'a b'": (("{type = 'distill'}", "", "a b"),),
    "arms.FULL": (("{type = 'distill'}", "", "FULL"),),
    f"arms.{'a' * 200}": (("{type = 'distill'}", "", "100"),),
    "name": (
        ("'../up'", "'up'", "name"),
        ("''", "'a'", "name"),
        ("'a/b'", "'a-b'", "name"),
        ("7", "'7'", "name"),
        ("'con'", "'icon'", "name"),
        (f"'{'n' * 101}'", f"'{'n' * 100}'", "name"),
        ("'a\\u0000b'", "'ab'", "name"),
    ),
    "title": (("1", "'one'", "title"),),
    "student": (
        ("''", "'student'", "student"),
        ("1", "'student'", "student"),
        ("[]", "'student'", "student"),
    ),
    "student.attention": (("1", "'eager'", "student.attention"),),
    "student.trust_remote_code": (("1", "false", "trust_remote_code"),),
    "student.template_arguments": (
        ("{messages = 1}", "{}", "messages"),
        ("{x = nan}", "{}", "template_arguments"),
    ),
    "teacher": (("[]", "'teacher'", "teacher"), ("{model = 1}", "'teacher'", "teacher.model")),
    "teacher.ema": (("0.5", "", "ema"),),
    "teacher.context": (
        ("{type = 'system', text = ''}", "{type = 'system', text = 'a'}", "teacher.context"),
        ("{type = 'whisper'}", "{type = 'system', text = 'a'}", "teacher.context"),
        ("'hint'", "{type = 'system', text = 'a'}", "teacher.context"),
    ),
    "data": (
        ("'file'", "{type = 'shapes', modality = 'text'}", "data"),
        ("{type = 'shape'}", "{type = 'shapes', modality = 'text'}", "data.type"),
        ("[]", "{type = 'shapes', modality = 'text'}", "data"),
        ("{type = 'mixture', sources = {}}", "{type = 'shapes', modality = 'text'}", "sources"),
    ),
    "data.path": (
        ("1", "'rows.jsonl'", "data.path"),
        ("''", "'rows.jsonl'", "data.path"),
        ("[]", "['rows.jsonl']", "data.path"),
    ),
    "data.limit": (("0", "1", "data.limit"), ("'ten'", "10", "data.limit")),
    "data.skip": (("-1", "1", "data.skip"),),
    "tracking.trackers": (
        ("['mlflow']", "[]", "tracking.trackers"),
        ("'wandb'", "[]", "tracking.trackers"),
    ),
    "tracking.mode": (("'on'", "'offline'", "tracking.mode"),),
    "extra": (("1", "", "extra"),),
}
"""Settings whose values are refused; an empty valid one is the config as it is."""

LINES: dict[str, tuple[str, str]] = {
    "no-equals": ("train.steps", "train.steps"),
    "space": (" ", "override"),
    "unclosed": ("train.freeze=['a'", "train.freeze"),
    "not-toml-key": ("train..steps=1", "train..steps"),
    "deep": (f"train.steps={'[' * DEEP}{']' * DEEP}", "train.steps"),
    "deep-table": (f"train.steps={'{a=' * DEEP}1{'}' * DEEP}", "train.steps"),
    "long-key": (f"{'a.' * DEEP}b=1", "levels deep"),
    "nul": ("name='a\x01b'", "name"),
    "escape": ("optim.type='\\u001b[31m'", "optim.type"),
    "into-a-value": ("name.first='a'", "name"),
    "newline": ("name='a\nb'", "name"),
}
"""Overrides that are no TOML line, or of unreasonable size: (line, what is named)."""

FILES: dict[str, tuple[str | bytes, str]] = {
    "empty": ("", "c.toml"),
    "binary": (b"\x00\xff\xfe", "c.toml"),
    "latin-1": (CONFIG.replace("mine", "m\u00ef").encode("latin-1"), "c.toml"),
    "utf-16": (CONFIG.encode("utf-16"), "c.toml"),
    "json": ("{}", "c.toml"),
    "yaml": ("name: mine\nstudent: a\n", "c.toml"),
    "twice": (CONFIG + '\n[arms]\nz = {type = "base"}\n', "c.toml"),
    "unclosed": (CONFIG.replace("[arms]", "[arms"), "c.toml"),
    "huge-integer": (CONFIG.replace("steps = 1", f"steps = {DIGITS}"), "c.toml"),
    "huge-hex": (CONFIG.replace("steps = 1", f"steps = 0x{'f' * 9000}"), "train.steps"),
    "deep-lists": (f"name = {'[' * DEEP}{']' * DEEP}", "c.toml"),
    "deep-tables": (f"name = {'{a=' * DEEP}1{'}' * DEEP}", "c.toml"),
    "deep-keys": (f"{'a.' * DEEP}b = 1", "c.toml"),
    "deep-headers": (f"[{'a.' * DEEP}b]\nc = 1", "c.toml"),
    "masks-list": (CONFIG.replace("[masks]", "").replace("top = {", "masks = []\n#"), "masks"),
    "arms-list": (CONFIG.replace("[arms]", "[[arms]]"), "arms"),
    "no-arms": (CONFIG.partition("[masks]")[0], "arms"),
    "no-arm": (CONFIG.partition("[masks]")[0] + "[arms]\n", "arms"),
    "no-name": (CONFIG.replace('name = "mine"', ""), "name"),
    "no-student": (CONFIG.replace("student = {", "# {"), "student"),
    "no-data": (CONFIG.replace("data = {", "# {"), "data"),
    "no-train": (CONFIG.replace("train = {", "# {"), "train"),
    "extends-itself": ('extends = "c.toml"\n' + CONFIG, "extends"),
    "extends-missing": ('extends = "gone.toml"\n' + CONFIG, "gone.toml"),
    "extends-number": ("extends = 1\n" + CONFIG, "extends"),
    "extends-folder": ('extends = "student"\n' + CONFIG, "student"),
    "extends-binary": ('extends = "student/model.safetensors"\n' + CONFIG, "model.safetensors"),
    "remove-alone": ('remove = ["arms.full"]\n' + CONFIG, "remove"),
    "date": (CONFIG.replace("steps = 1", "steps = 1979-05-27T07:32:00Z"), "train.steps"),
    "null-byte": (CONFIG.replace("mine", "mi\x00ne"), "c.toml"),
    "bom-twice": (b"\xef\xbb\xbf\xef\xbb\xbf" + CONFIG.encode(), "c.toml"),
    "student-table-list": (CONFIG.replace("student = {", "student = [1] # {"), "student"),
}
"""Whole config files: (content, what is named)."""


def cases() -> list[Case]:
    found = []
    for key, tries in SETTINGS.items():
        for bad, good, says in tries:
            twin = (LOAD, "c.toml", f"{key}={good}") if good else (LOAD, "c.toml")
            name = f"{key}={bad}"
            name = name if len(name) < 80 else f"{name[:60]}... ({len(name)})"
            found.append(Case((*RUN, f"{key}={bad}"), says, twin=twin, name=f"config {name}"))
    for label, (line, says) in LINES.items():
        twin = (LOAD, "c.toml", "train.steps=2")
        found.append(Case((*RUN, line), says, twin=twin, name=f"override {label}"))
    for label, (content, says) in FILES.items():
        spoil = Put("c.toml", content)
        found.append(Case(RUN, says, spoil, twin=(LOAD, "c.toml"), name=f"config file {label}"))
    return found
