"""A server in this process that speaks what vlopd uses of vLLM's API, around transformers."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import torch
from aiohttp import web
from PIL import Image
from safetensors.torch import load_file

from vlopd.engines.worker.vlopd_worker import Extension
from vlopd.models import families
from vlopd.models.loaded import LoadedModel
from vlopd.models.save import original_names
from vlopd.train.draws import pick
from vlopd.train.weight_updates import tensors_of


class Worker(Extension):
    """A worker whose model is one of transformers."""

    def __init__(self, model: torch.nn.Module):
        self.model = model
        self.stored = {stored: name for name, stored in original_names(model).items()}

    @torch.no_grad()
    def reload_weights(self, weights_iterator=None, weights_path=None) -> None:
        own = tensors_of(self.model)
        if weights_iterator is None:
            files = sorted(Path(weights_path).glob("*.safetensors"))
            weights_iterator = [item for file in files for item in load_file(file).items()]
        for name, tensor in weights_iterator:
            own[self.stored.get(name, name)].copy_(tensor)


class FakeVllm:
    """The state of a server: model, the name of its weights, what a /collective_rpc calls."""

    def __init__(self, loaded: LoadedModel):
        self.loaded, self.worker = loaded, Worker(loaded.model)
        loaded.model.requires_grad_(False)
        self.first = {n: p.clone() for n, p in loaded.model.named_parameters()}
        self.is_blind = False
        self.restart()

    def restart(self) -> None:
        """As after a new start: the checkpoint's weights without a name."""
        self.version = "default"
        self.worker = Worker(self.loaded.model)
        for name, parameter in self.loaded.model.named_parameters():
            parameter.data.copy_(self.first[name])

    def read(self, body: dict[str, Any]) -> tuple[list[int], dict[str, torch.Tensor]]:
        """(expanded ids, per-image inputs) of a request."""
        parts = body.get("content_parts") or ()
        ids = body["token_ids"]
        if not parts:
            return ids, {}
        urls = [part["url"].partition(",")[2] for part in parts]
        images = [Image.open(io.BytesIO(base64.b64decode(url))) for url in urls]
        if self.is_blind:
            images = [image.point(lambda _: 0) for image in images]
        (placeholder, *_) = [i for token, i in self.loaded.placeholders.items() if "image" in token]
        text = "".join([self.loaded.tokenizer.convert_ids_to_tokens(placeholder)] * len(images))
        (read,) = families.encode_each(self.loaded.processor, [text], [images], True)
        n = int((read.input_ids == placeholder).sum()) // len(images)
        expanded = [each for i in ids for each in ([i] * n if i == placeholder else [i])]
        return expanded, dict(read.per_image)

    def logits(self, ids: list[int], images: dict[str, torch.Tensor]) -> torch.Tensor:
        with torch.no_grad():
            rows = torch.tensor([ids])
            return self.loaded.model(input_ids=rows, **images).logits[0]

    def generate(self, body: dict[str, Any]) -> dict[str, Any]:
        asked = body["sampling_params"]
        ids, images = self.read(body)
        prompt, found, content = list(ids), [], []
        uniforms = torch.rand(64, generator=torch.Generator().manual_seed(asked.get("seed", 0)))
        banned = torch.tensor([int(i) for i in asked.get("logit_bias", {})], dtype=torch.long)
        for step in range(asked["max_tokens"]):
            logits = self.logits(ids, images)[-1:]
            top_k = asked.get("top_k") or None
            token, logprob = pick(
                logits, asked["temperature"], banned, uniforms[step : step + 1], top_k,
                asked.get("top_p", 1.0),
            )  # fmt: skip
            found.append(int(token))
            content.append({"token_id": int(token), "logprob": float(logprob), "top_logprobs": []})
            ids = [*ids, int(token)]
            if int(token) in asked.get("stop_token_ids", ()):
                break
        is_end = found[-1] in asked.get("stop_token_ids", ())
        choice = {
            "finish_reason": "stop" if is_end else "length",
            "token_ids": found,
            "weight_versions": [{"version": self.version, "start": 0, "end": len(found)}],
            "logprobs": {"content": content} if asked.get("logprobs") is not None else None,
        }
        k, scores = asked.get("prompt_logprobs"), None
        if k is not None:
            every = torch.log_softmax(self.logits(prompt, images), -1)
            scores = [None]
            for row, token in zip(every[:-1], prompt[1:], strict=True):
                kept = dict.fromkeys([token, *row.topk(k).indices.tolist()])
                scores.append({str(i): {"logprob": float(row[i])} for i in kept})
        return {
            "request_id": f"generate-tokens-{body['request_id']}",
            "prompt_token_ids": prompt,
            "prompt_logprobs": scores,
            "choices": [choice],
        }


def application(fake: FakeVllm, token: str | None = None) -> web.Application:
    async def generate(request: web.Request) -> web.Response:
        if token and request.headers.get("Authorization") != f"Bearer {token}":
            return web.json_response({"error": "Unauthorized"}, status=401)
        return web.json_response(fake.generate(await request.json()))

    async def rpc(request: web.Request) -> web.Response:
        body = await request.json()
        method = getattr(fake.worker, body["method"])
        return web.json_response({"results": [method(**body["kwargs"])]})

    async def version(request: web.Request) -> web.Response:
        fake.version = (await request.json())["new_version"]
        return web.json_response({"success": True})

    async def fine(request: web.Request) -> web.Response:
        return web.json_response({"status": "fine"})

    app = web.Application(client_max_size=2**26)
    app.router.add_post("/inference/v1/generate", generate)
    app.router.add_post("/collective_rpc", rpc)
    app.router.add_post("/update_weight_version", version)
    for path in ("/pause", "/resume"):
        app.router.add_post(path, fine)
    app.router.add_get("/v1/models", fine)
    return app
