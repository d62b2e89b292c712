"""A server that draws with another mix of adapters for each request, several requests in one batch.

pip install fastapi uvicorn
python examples/server.py LORAS --model MODEL --port 8000
curl -d '{"prompt": "an emoji of lemon", "mix": {"style": 0.8}, "seed": 1}' -H 'content-type: application/json' localhost:8000/draw -o lemon.png

LORAS is a folder of .safetensors files; a mix names them without the ending. Files are loaded when they are first asked for, and those that were
not asked for the longest go when all together have more than --budget MiB.
"""

from __future__ import annotations

import argparse
import io
import queue
import threading
from collections import OrderedDict
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import diffpeft
from diffpeft.pipeline.open import open_pipeline

if TYPE_CHECKING:
    from fastapi import FastAPI
    from PIL.Image import Image


@dataclass(frozen=True)
class Request:
    """One picture: a prompt, the strengths of adapters, and the seed of its noise."""

    prompt: str
    mix: dict[str, float] = field(default_factory=dict)
    seed: int = 0


@dataclass(frozen=True)
class Job:
    """A request, and where its picture will be."""

    request: Request
    answer: Future[Image] = field(default_factory=Future)


class Painter:
    """One thread that owns the pipeline: it takes what waits, loads what is asked for, and draws it in one batch."""

    def __init__(
        self, folder: str | Path, model: str | None = None, batch: int = 8, steps: int = 20, budget: int = 512
    ):
        self.pipe = open_pipeline(model)
        self.pipe.set_progress_bar_config(disable=True)
        self.folder, self.batch, self.steps, self.budget = Path(folder), batch, steps, budget << 20
        self.loaded: OrderedDict[str, int] = OrderedDict()  # name: bytes, what was not asked for the longest first
        self.waiting: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    def draw(self, request: Request) -> Future[Image]:
        """A picture to come. Raises KeyError, at once, for an adapter that the folder lacks."""
        for name in request.mix:
            if name not in self.names():
                raise KeyError(f"no adapter {name!r}. There are: {', '.join(self.names())}")
        job = Job(request)
        self.waiting.put(job)
        return job.answer

    def names(self) -> list[str]:
        """The adapters of the folder."""
        return sorted(path.stem for path in self.folder.glob("*.safetensors"))

    def close(self) -> None:
        """End the thread after what waits."""
        self.waiting.put(None)
        self.thread.join()

    def _work(self) -> None:
        while (job := self.waiting.get()) is not None:
            jobs = [job]
            while len(jobs) < self.batch and not self.waiting.empty():
                if (job := self.waiting.get()) is None:
                    self.waiting.put(None)
                    break
                jobs.append(job)
            self._answer(jobs)

    def _answer(self, jobs: list[Job]) -> None:
        """Draw a batch; an adapter that cannot be loaded fails the requests that name it, and no other."""
        ready = []
        for job in jobs:
            try:
                for name in job.request.mix:
                    self._need(name)
                ready.append(job)
            except Exception as error:
                job.answer.set_exception(error)
        try:
            images = self._pictures([job.request for job in ready]) if ready else []
        except Exception as error:
            for job in ready:
                job.answer.set_exception(error)
        else:
            for job, image in zip(ready, images, strict=True):
                job.answer.set_result(image)
        self._evict()

    def _need(self, name: str) -> None:
        if name not in self.loaded:
            path = self.folder / f"{name}.safetensors"
            diffpeft.load_lora(self.pipe, path, name=name, active=False)
            self.loaded[name] = path.stat().st_size  # tensors keep the dtype of their file
        self.loaded.move_to_end(name)

    def _pictures(self, requests: list[Request]) -> list[Image]:
        """Row i of the batch has mix i."""
        with diffpeft.adapters(self.pipe, [request.mix for request in requests]):
            return self.pipe(
                [request.prompt for request in requests],
                generator=[torch.Generator().manual_seed(request.seed) for request in requests],
                num_inference_steps=self.steps,
            ).images

    def _evict(self) -> None:
        while len(self.loaded) > 1 and sum(self.loaded.values()) > self.budget:
            name, _ = self.loaded.popitem(last=False)
            diffpeft.unload(self.pipe, [name])


def app(painter: Painter) -> FastAPI:
    """POST /draw with a Request gives a PNG; GET /adapters names what can stand in a mix."""
    import asyncio

    from fastapi import FastAPI, HTTPException, Response

    server = FastAPI(title="diffpeft")

    @server.get("/adapters")
    def adapters() -> dict[str, list[str]]:
        return {"adapters": painter.names(), "loaded": list(painter.loaded)}

    @server.post("/draw", response_model=None)
    async def draw(request: Request) -> object:
        try:
            image = await asyncio.wrap_future(painter.draw(request))
        except KeyError as error:
            raise HTTPException(404, error.args[0]) from None
        except diffpeft.DiffpeftError as error:
            raise HTTPException(422, str(error)) from None
        file = io.BytesIO()
        image.save(file, "PNG")
        return Response(file.getvalue(), media_type="image/png")

    return server


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("loras", help="folder of .safetensors files")
    parser.add_argument("--model", help="a diffusers folder or a Hub id; the embedded base if left out")
    parser.add_argument("--batch", type=int, default=8, help="most pictures in one batch")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--budget", type=int, default=512, help="MiB of adapters to keep")
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args(argv)

    import uvicorn

    painter = Painter(args.loras, args.model, args.batch, args.steps, args.budget)
    uvicorn.run(app(painter), port=args.port)


if __name__ == "__main__":
    main()
