"""Samples from a student in vLLM, whose weights follow the training's through files that both sides see."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from vlopd.engines.client import Doubtful, EngineError, LostWeights, shortest
from vlopd.engines.process import WORKER, Server
from vlopd.engines.sampler import Updates
from vlopd.engines.vllm import VllmClient, raw_prompts, sample, score
from vlopd.engines.worker.vlopd_worker import WHOLE, checksum, values_of
from vlopd.models.loaded import LoadedModel
from vlopd.models.save import in_original_format, original_names
from vlopd.trust import exchange, why_withheld
from vlopd.types import Completions, Example, Prompts

SHARD_BYTES = 2**31
"""Of a file, about."""


class VllmSampler:
    """A student's copy in vLLM. session: a name of the training that no other has.

    After `send`, completions are of those weights: the workers' copy has them to the bit (`changes`), and every answer
    names the version.
    """

    def __init__(
        self,
        client: VllmClient,
        session: str,
        student: LoadedModel,
        weights: Literal["changes", "whole"] = "changes",
        folder: str | None = None,
        server: Server | None = None,
    ):
        self.client, self.session, self.student, self.server = client, session, student, server
        self.weights = weights
        if folder is not None and (why := why_withheld(exchange(folder))):
            raise EngineError(why)
        self.temporary = TemporaryDirectory(prefix="vlopd-weights-") if folder is None else None
        self.folder = Path(self.temporary.name if self.temporary else str(folder)).resolve()
        self.client.follows, self.version = True, -1
        self.names: dict[str, str] | None = None

    @property
    def version(self) -> int:
        """Of the weights that were sent last; -1 before."""
        return self._version

    @version.setter
    def version(self, version: int) -> None:
        self._version = version
        self.client.version = f"{self.session}/{version}"

    def send(self, version: int, updates: Updates, first: bool) -> int:
        """Brings the copy to a version; returns the bytes that were sent. first: whatever it holds.

        Raises LostWeights where it does not hold the version before or took other values, EngineError.
        """
        before = None if first else self.version
        if first:
            updates.forget()
        where = self.folder / f"{self.session}-{version}"
        try:
            if self.weights == "whole":
                state = in_original_format(self.student.model, updates.state())
                files, sent, _ = self._write(where, shards(state))
                method, arguments = "reload_weights", {"weights_path": str(where)}
                sums = None
            else:
                whole = (
                    {f"{WHOLE}/{n}": t for n, t in part.items()} for part in shards(updates.state())
                )
                parts = [*(whole if first else ()), updates.next()]
                files, sent, sums = self._write(where, parts)
                method, arguments = "vlopd_take", self._take(version, before, files)
            with self.client.paused():
                try:
                    results = self.client.rpc(method, arguments)
                except EngineError as error:
                    raise EngineError(f"{error}; {self._remedy}") if first else error from None
                refuse_other_values(results, sums)
                self.client.post(
                    "/update_weight_version", {"new_version": f"{self.session}/{version}"}
                )
        finally:
            shutil.rmtree(where, ignore_errors=True)
        self.version = version
        return sent

    def sample(
        self,
        prompts: Prompts,
        max_new_tokens: int,
        temperature: float,
        uniforms: Tensor,
        columns: int | Tensor,
        top_k: int | None = None,
        top_p: float = 1.0,
        banned_ids: Sequence[int] = (),
        rows: Sequence[int] | None = None,
        engine: str = "eager",
        *,
        device: torch.device,
        examples: Sequence[Example] | None = None,
    ) -> Completions:
        """As train.generation.sample, by other random numbers. Raises LostWeights, EngineError."""
        raw = raw_prompts(self.student, prompts, examples)
        asked = raw if rows is None else [raw[row] for row in rows]
        settings = (max_new_tokens, temperature, uniforms, top_k, top_p, banned_ids)
        return sample(self.client, self.student, asked, *settings).to(device)

    def logprobs(
        self, examples: Sequence[Example], prompts: Prompts, completions: Completions
    ) -> Tensor:
        """[N] log-probs of completions. Raises LostWeights, EngineError."""
        raw = raw_prompts(self.student, prompts, examples)
        ids = [
            row[mask].tolist() for row, mask in zip(completions.ids, completions.mask, strict=True)
        ]
        return score(self.client, raw, ids, 0, self.student.vocabulary_rows)[:, 1]

    @property
    def _remedy(self) -> str:
        if self.weights == "whole":
            return "start vLLM with VLLM_SERVER_DEV_MODE=1"
        return (
            f"start vLLM with VLLM_SERVER_DEV_MODE=1 PYTHONPATH={WORKER} and --worker-extension-cls "
            'vlopd_worker.Extension, or set rollout.engine.weights = "whole"'
        )

    def _take(self, version: int, before: int | None, files: Sequence[Path]) -> dict[str, Any]:
        if before is None and self.names is None:
            self.names = original_names(self.student.model)
        return {
            "session": self.session,
            "version": version,
            "before": before,
            "files": [str(file) for file in files],
            "names": self.names if before is None else None,
        }

    def _write(
        self, where: Path, parts: Iterable[Mapping[str, Tensor]]
    ) -> tuple[list[Path], int, list[str]]:
        """Writes files of tensors: their paths, bytes, and the checksum of each one's values. Raises EngineError."""
        files, sent, sums = [], 0, []
        for k, part in enumerate(parts):
            host = {name: tensor.detach().cpu().contiguous() for name, tensor in part.items()}
            file = where / f"{k:05}.safetensors"

            def write(file: Path = file, host: dict[str, Tensor] = host) -> None:
                try:
                    file.parent.mkdir(parents=True, exist_ok=True)
                    save_file(host, file)
                except (OSError, SafetensorError) as error:
                    file.unlink(missing_ok=True)
                    raise Doubtful(
                        f"no weights can be written to {where}: {shortest(error)}"
                    ) from None

            self.client.persist(write)
            files.append(file)
            sent += sum(tensor.nbytes for tensor in host.values())
            sums.append(checksum(values_of(host)) if self.weights == "changes" else "")
        return files, sent, sums


def shards(state: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """A model's tensors in parts of about SHARD_BYTES."""
    part: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if part and sum(each.nbytes for each in part.values()) + tensor.nbytes > SHARD_BYTES:
            yield part
            part = {}
        part[name] = tensor
    yield part


def refuse_other_values(results: Sequence[Any], sums: Sequence[str] | None) -> None:
    """Raises LostWeights unless every worker wrote the values of the checksums; None: of workers that do not say."""
    if sums is None:
        return
    for result in results:
        if not isinstance(result, Mapping) or result.get("lost"):
            raise LostWeights("it has not the version before")
        if result.get("checksums") != list(sums):
            raise LostWeights(str(result.get("wrong", "it wrote other values")))
