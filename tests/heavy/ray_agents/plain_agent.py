"""An agent that says who answered: the version's constant, the process and its raylet."""

import asyncio
import os
from typing import Any

import mlflow

VERSION = "first"


@mlflow.trace(span_type="TOOL")
async def look_up(question: str) -> str:
    await asyncio.sleep(0.005)
    return f"about {question}"


async def predict(request: dict[str, Any]) -> dict[str, Any]:
    about = await look_up(str(request["question"]))
    return {"answer": about, "version": VERSION, "pid": os.getpid(), "raylet": os.getppid()}
