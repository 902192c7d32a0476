"""A ``ChatAgent``, which MLflow does not trace by itself."""

from collections.abc import Iterator
from typing import Any

import mlflow
from mlflow.pyfunc import ChatAgent
from mlflow.types.agent import ChatAgentChunk, ChatAgentMessage, ChatAgentResponse, ChatContext


@mlflow.trace(span_type="TOOL")
def look_up(question: str) -> str:
    if question == "fail":
        raise RuntimeError("the index is away")
    return f"about {question}"


class Agent(ChatAgent):
    def predict(
        self,
        messages: list[ChatAgentMessage],
        context: ChatContext | None = None,
        custom_inputs: dict[str, Any] | None = None,
    ) -> ChatAgentResponse:
        text = look_up(messages[-1].content or "")
        who = context.user_id if context else None
        return ChatAgentResponse(
            messages=[ChatAgentMessage(role="assistant", content=text, id="1")], custom_outputs={"for": who}
        )

    def predict_stream(
        self,
        messages: list[ChatAgentMessage],
        context: ChatContext | None = None,
        custom_inputs: dict[str, Any] | None = None,
    ) -> Iterator[ChatAgentChunk]:
        for word in look_up(messages[-1].content or "").split():
            yield ChatAgentChunk(delta=ChatAgentMessage(role="assistant", content=f"{word} ", id="1"))


mlflow.models.set_model(Agent())
