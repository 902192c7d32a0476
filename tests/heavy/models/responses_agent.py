"""A ``ResponsesAgent`` around OpenAI's client, which MLflow traces by itself."""

import os
from collections.abc import Iterator

import mlflow
from mlflow.pyfunc import ResponsesAgent
from mlflow.types.responses import (
    ResponsesAgentRequest,
    ResponsesAgentResponse,
    ResponsesAgentStreamEvent,
    to_chat_completions_input,
)
from openai import OpenAI

mlflow.openai.autolog()


class Agent(ResponsesAgent):
    def predict(self, request: ResponsesAgentRequest) -> ResponsesAgentResponse:
        events = list(self.predict_stream(request))
        items = [event.item for event in events if event.type == "response.output_item.done"]
        return ResponsesAgentResponse(output=items, custom_outputs=request.custom_inputs)

    def predict_stream(self, request: ResponsesAgentRequest) -> Iterator[ResponsesAgentStreamEvent]:
        behaviour = (request.custom_inputs or {}).get("behaviour", "")
        url = "/".join(filter(None, (os.environ["MODEL_SERVER"], behaviour, "v1")))
        client = OpenAI(base_url=url, api_key="secret-key", max_retries=0)
        messages = to_chat_completions_input([item.model_dump() for item in request.input])
        text = ""
        for chunk in client.chat.completions.create(model="gpt-test", messages=messages, stream=True):
            delta = chunk.choices[0].delta.content if chunk.choices else None
            if delta:
                text += delta
                yield ResponsesAgentStreamEvent(**self.create_text_delta(delta, "msg_1"))
        yield ResponsesAgentStreamEvent(
            type="response.output_item.done", item=self.create_text_output_item(text, "msg_1")
        )


mlflow.models.set_model(Agent())
