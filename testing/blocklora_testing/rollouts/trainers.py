"""Sends a name's next weights, in every way there is, and now and then something that is none."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from pathlib import Path
from random import Random
from typing import Any

import safetensors.torch
import torch

from blocklora_testing.rollouts.run import Run
from blocklora_testing.soak.client import Answer

WAYS = ("put", "put", "put", "json", "folder")
HARMS = ("cut", "nan", "shapes", "no config")


class Trainer:
    """Updates one name until all updates of the run are done."""

    def __init__(self, run: Run, name: str) -> None:
        self._run, self._name = run, name
        self._rng = Random(f"{run.seed}/{name}")

    async def run(self) -> None:
        while self._run.take_update():
            if self._rng.random() < 0.05:
                await self._harm()
            if self._rng.random() < 0.03:
                await self._paused()
            else:
                await self.update()
            await asyncio.sleep(self._rng.uniform(0, self._run.size.gap_s))

    async def update(self) -> None:
        """Other contents, or, one time in ten, those that the name has."""
        run, name = self._run, self._name
        before = run.ledger.updates.get(name, [])
        same = bool(before) and self._rng.random() < 0.1
        contents = before[-1].contents if same else self._rng.choice(sorted(run.world.contents))
        way = self._rng.choice(WAYS)
        update = run.ledger.coming(name, contents, time.monotonic())
        answer = await self._send(way, run.world.contents[contents])
        update.ready = time.monotonic()
        if answer.status != 200 or answer.version is None:
            run.ledger.failed(name, update)
            run.tally.problem(f"update: {way}", f"{name} to {contents}: {answer.status} {str(answer.body)[:300]}")
            return
        wrong = run.ledger.told(answer.version, contents)
        if wrong:
            run.tally.problem(f"update: {way}", wrong)
        else:
            run.tally.right(f"update: {way}", answer.end - answer.begin)

    async def _send(self, way: str, folder: Path) -> Answer:
        client, name = self._run.client, self._name
        if way == "put":
            return await client.call(f"/adapters/{name}", as_one_file(folder), admin=True, method="PUT")
        if way == "json":
            config = json.loads((folder / "adapter_config.json").read_text())
            weights = base64.b64encode((folder / "adapter_model.safetensors").read_bytes()).decode()
            body = {"lora_name": name, "config_dict": config, "serialized_named_tensors": [weights]}
            body |= {"load_format": "safetensors", "load_inplace": True}
            return await client.call("/load_lora_adapter_from_tensors", body, admin=True)
        body = {"lora_name": name, "lora_path": str(folder), "load_inplace": True}
        return await client.call("/v1/load_lora_adapter", body, admin=True)

    async def _harm(self) -> None:
        """What is refused, and changes nothing."""
        run, how = self._run, self._rng.choice(HARMS)
        data = broken(run.world.contents[self._rng.choice(sorted(run.world.contents))], how)
        answer = await run.client.call(f"/adapters/{self._name}", data, admin=True, method="PUT")
        if answer.status == 400:
            run.tally.refused(f"refused: {how}", answer.end - answer.begin)
        else:
            run.tally.problem(f"refused: {how}", f"{answer.status} {str(answer.body)[:300]}")

    async def _paused(self) -> None:
        """Pause, update, continue."""
        run, mode = self._run, self._rng.choice(["in_place", "retract"])
        async with run.pauses:
            begin = time.monotonic()
            await run.client.call("/pause_generation", {"mode": mode}, admin=True)
            await self.update()
            await run.client.call("/continue_generation", {}, admin=True)
        run.tally.right(f"pause: {mode}", time.monotonic() - begin)


def as_one_file(folder: Path) -> bytes:
    """An adapter as one file: its config in the metadata."""
    config = json.dumps(json.loads((folder / "adapter_config.json").read_text()))
    tensors = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    return safetensors.torch.save(tensors, {"adapter_config": config})


def broken(folder: Path, how: str) -> bytes:
    """An adapter that cannot be served."""
    if how == "no config":
        return (folder / "adapter_model.safetensors").read_bytes()
    if how == "cut":
        return as_one_file(folder)[:-64]
    tensors: dict[str, Any] = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    name = max(tensors)
    if how == "shapes":
        tensors[name] = torch.zeros(3, 5)
    else:  # in the last row, which one TP rank alone reads
        tensors[name][-1, -1] = float("nan")
    config = json.dumps(json.loads((folder / "adapter_config.json").read_text()))
    return safetensors.torch.save(tensors, {"adapter_config": config})
