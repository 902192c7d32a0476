"""An agent behind MLflow's ``AgentServer``, as its documentation has it."""

import os
from collections.abc import AsyncIterator

import mlflow
from mlflow.genai.agent_server import AgentServer, invoke, stream
from mlflow.types.responses import (
    ResponsesAgentRequest,
    ResponsesAgentResponse,
    ResponsesAgentStreamEvent,
    create_text_delta,
    create_text_output_item,
    to_chat_completions_input,
)
from openai import AsyncOpenAI

mlflow.openai.autolog()


@mlflow.trace(span_type="TOOL")
async def look_up(question: str) -> str:
    return f"about {question}"


@stream()
async def stream_answer(request: ResponsesAgentRequest) -> AsyncIterator[ResponsesAgentStreamEvent]:
    behaviour = (request.custom_inputs or {}).get("behaviour", "")
    url = "/".join(filter(None, (os.environ["MODEL_SERVER"], behaviour, "v1")))
    messages = to_chat_completions_input([item.model_dump() for item in request.input])
    await look_up(str(messages[-1]["content"]))
    text = ""
    async with AsyncOpenAI(base_url=url, api_key="secret-key", max_retries=0) as client:
        chunks = await client.chat.completions.create(model="gpt-test", messages=messages, stream=True)
        async for chunk in chunks:
            if delta := chunk.choices[0].delta.content:
                text += delta
                yield ResponsesAgentStreamEvent(**create_text_delta(delta, "msg_1"))
    yield ResponsesAgentStreamEvent(
        type="response.output_item.done", item=create_text_output_item(text, "msg_1")
    )


@invoke()
async def answer(request: ResponsesAgentRequest) -> ResponsesAgentResponse:
    events = [event async for event in stream_answer(request)]
    return ResponsesAgentResponse(output=[events[-1].item])


agent_server = AgentServer("ResponsesAgent")
app = agent_server.app
